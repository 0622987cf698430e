//! Which grains are free. Bitmaps follow the transaction group that is being closed; what the open one has taken,
//! what it has released and what is being punched is *blocked*: neither free nor yet recorded (invariant I3).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::page::MAX_GRAINS;
use crate::record::{Bits, CHUNK_GRAINS, COUNTS_PER_BLOCK, ChunkCount};
use crate::refs::{Refs, Touched};
use crate::{Error, Result};

/// Number of an allocation chunk.
pub(crate) type ChunkNo = u32;

const WORD: usize = 64;
/// The same, for counts of set bits.
const CHUNK_GRAINS_U32: u32 = 4096;
const _: () = assert!(CHUNK_GRAINS == 4096);
const EMPTY: Bits = [0; CHUNK_GRAINS / WORD];
/// A chunk with fewer free grains is passed over while others (or the end of the file) offer longer runs.
const WORTH_A_SEEK: u16 = 512;
/// Chunks in RAM before idle ones are dropped: 16 MiB.
const CACHED_CHUNKS: usize = 16_384;

/// What must happen before a grain can be reserved.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Load this chunk's bitmap and ask again.
    Chunk(ChunkNo),
    /// The pool has reached its bound.
    Space,
}

#[derive(Clone)]
struct Chunk {
    /// In use as of the transaction group being closed.
    bits: Bits,
    /// Not to be handed out although the bit may be clear.
    blocked: Bits,
    /// Extra references as of the transaction group being closed.
    refs: Refs,
    /// `bits` or `refs` are not in the metadata store yet.
    changed: bool,
}

#[derive(Clone, Copy)]
struct Counts {
    /// Clear bits: what is recorded.
    free: u16,
    /// Clear and not blocked: what can be handed out.
    available: u16,
    /// Some grain has extra references.
    shared: bool,
}

/// The allocator of a pool.
pub(crate) struct Allocator {
    chunks: HashMap<ChunkNo, Chunk>,
    counts: Vec<Counts>,
    available: u64,
    current: Option<ChunkNo>,
    position: usize,
    search_from: usize,
    max_grains: u64,
    reserved: usize,
    punch: BTreeMap<ChunkNo, Bits>,
    punch_run: usize,
    /// References that the closing transaction group adds.
    sharing: Shares,
    /// Grains whose last extra reference the closing transaction group drops: the durable state still has it (I4).
    cooling: HashSet<u64>,
}

/// Grains that get more references, and how many.
pub(crate) type Shares = HashMap<u64, u64>;

fn split(grain: u64) -> (ChunkNo, usize) {
    let chunk = ChunkNo::try_from(grain / CHUNK_GRAINS as u64).expect("34-bit grains make 22-bit chunks");
    (
        chunk,
        usize::try_from(grain % CHUNK_GRAINS as u64).expect("below 4096"),
    )
}

fn grain_of(chunk: ChunkNo, index: usize) -> u64 {
    u64::from(chunk) * CHUNK_GRAINS as u64 + index as u64
}

fn test(bits: &Bits, index: usize) -> bool {
    bits.get(index / WORD)
        .is_some_and(|w| w & (1 << (index % WORD)) != 0)
}

fn put(bits: &mut Bits, index: usize, on: bool) {
    let word = bits
        .get_mut(index / WORD)
        .expect("index below the grains of a chunk");
    if on {
        *word |= 1 << (index % WORD)
    } else {
        *word &= !(1 << (index % WORD))
    }
}

fn at_least_one(counts: &[Counts]) -> Option<usize> {
    counts.iter().position(|c| c.available > 0)
}

impl Chunk {
    fn fresh(bits: Bits, refs: Refs) -> Self {
        Self {
            bits,
            blocked: EMPTY,
            refs,
            changed: false,
        }
    }

    fn is_available(&self, index: usize) -> bool {
        !test(&self.bits, index) && !test(&self.blocked, index)
    }

    fn next_available(&self, from: usize) -> Option<usize> {
        (from / WORD..CHUNK_GRAINS / WORD).find_map(|w| {
            let mut open = !(self.bits.get(w)? | self.blocked.get(w)?);
            if w == from / WORD {
                open &= u64::MAX << (from % WORD);
            }
            (open != 0).then(|| w * WORD + open.trailing_zeros() as usize)
        })
    }

    fn idle(&self) -> bool {
        !self.changed && self.blocked == EMPTY
    }
}

impl Allocator {
    /// `reserved` grains at the start hold the superblocks; `recorded[c]` is the recorded count of chunk `c`.
    pub(crate) fn new(reserved: u64, max_grains: u64, recorded: &[ChunkCount], punch_run: u64) -> Self {
        let counts: Vec<_> = recorded
            .iter()
            .map(|n| Counts {
                free: n.free,
                available: n.free,
                shared: n.shared,
            })
            .collect();
        Self {
            chunks: HashMap::new(),
            available: counts.iter().map(|c| u64::from(c.available)).sum(),
            counts,
            current: None,
            position: 0,
            search_from: 0,
            max_grains: if max_grains == 0 {
                MAX_GRAINS
            } else {
                max_grains.min(MAX_GRAINS)
            },
            reserved: usize::try_from(reserved).expect("two 4 KiB slots"),
            punch: BTreeMap::new(),
            punch_run: usize::try_from(punch_run)
                .unwrap_or(CHUNK_GRAINS)
                .clamp(1, CHUNK_GRAINS),
            sharing: Shares::new(),
            cooling: HashSet::new(),
        }
    }

    /// Bitmap of a chunk that has no record yet.
    pub(crate) fn blank(&self, chunk: ChunkNo) -> Bits {
        let mut bits = EMPTY;
        if chunk == 0 {
            (0..self.reserved).for_each(|i| put(&mut bits, i, true));
        }
        bits
    }

    /// Free count of a chunk that has no record yet.
    pub(crate) fn blank_free(reserved: u64, chunk: usize) -> u16 {
        let taken = if chunk == 0 {
            u16::try_from(reserved).unwrap_or(0)
        } else {
            0
        };
        u16::try_from(CHUNK_GRAINS).expect("4096") - taken
    }

    pub(crate) fn chunk_count(&self) -> u32 {
        u32::try_from(self.counts.len()).expect("22 bits")
    }

    /// Grains that are taken, the superblocks' excluded.
    pub(crate) fn in_use(&self) -> u64 {
        let total = self.counts.len() as u64 * CHUNK_GRAINS as u64;
        total
            .saturating_sub(self.available)
            .saturating_sub(if total == 0 { 0 } else { self.reserved as u64 })
    }

    pub(crate) fn available(&self) -> u64 {
        self.available
    }

    /// Bitmap of a chunk that is in RAM, as of the transaction group that was closed last.
    pub(crate) fn bits(&self, chunk: ChunkNo) -> Option<&Bits> {
        self.chunks.get(&chunk).map(|c| &c.bits)
    }

    pub(crate) fn is_loaded(&self, chunk: ChunkNo) -> bool {
        self.chunks.contains_key(&chunk)
    }

    /// Takes in a bitmap read from the metadata store; one that is there already is newer and stays.
    ///
    /// # Errors
    /// `Corrupt` when it does not agree with the recorded free count.
    pub(crate) fn insert(&mut self, chunk: ChunkNo, bits: Bits, refs: Refs) -> Result<()> {
        let used: u32 = bits.iter().map(|w| w.count_ones()).sum();
        let counts = self.counts.get(chunk as usize);
        let free = counts.map(|c| u32::from(c.free));
        if free != Some(CHUNK_GRAINS_U32 - used) {
            return Err(Error::corrupt(
                "allocation bitmap",
                format!("chunk {chunk}: {used} used, free {free:?}"),
            ));
        }
        if counts.is_some_and(|c| c.shared == refs.is_empty()) {
            return Err(Error::corrupt(
                "extra references",
                format!("chunk {chunk}: not there, or not counted"),
            ));
        }
        self.chunks
            .entry(chunk)
            .or_insert_with(|| Chunk::fresh(bits, refs));
        Ok(())
    }

    /// Extra references of a chunk, if it is in RAM.
    pub(crate) fn references(&self, chunk: ChunkNo) -> Option<&Refs> {
        self.chunks.get(&chunk).map(|c| &c.refs)
    }

    /// Extra references of a grain, as of the last group that was closed.
    pub(crate) fn references_of(&self, grain: u64) -> std::result::Result<u64, Need> {
        let (chunk, index) = split(grain);
        if !self.has_references(chunk) {
            return Ok(0);
        }
        let refs = self.references(chunk).ok_or(Need::Chunk(chunk))?;
        Ok(refs.get(index))
    }

    /// Whether a chunk has `R` values.
    pub(crate) fn has_references(&self, chunk: ChunkNo) -> bool {
        self.counts.get(chunk as usize).is_some_and(|c| c.shared)
    }

    /// Whether a grain is placed more than once, in the closing transaction group or in the last durable one.
    pub(crate) fn is_shared(&self, grain: u64) -> std::result::Result<bool, Need> {
        if self.sharing.contains_key(&grain) || self.cooling.contains(&grain) {
            return Ok(true);
        }
        Ok(self.references_of(grain)? > 0)
    }

    /// A transaction group closes: what it adds counts from now on, until [`Allocator::settle`].
    pub(crate) fn begin_close(&mut self, shares: Shares) {
        self.sharing = shares;
    }

    /// Reserves one grain, next to the last one where possible.
    pub(crate) fn reserve(&mut self) -> std::result::Result<u64, Need> {
        if self.in_use() >= self.max_grains {
            return Err(Need::Space);
        }
        loop {
            let Some(chunk_no) = self.current else {
                let next = self.next_chunk().ok_or(Need::Space)?;
                if !self.is_loaded(next) {
                    return Err(Need::Chunk(next));
                }
                (self.current, self.position) = (Some(next), 0);
                continue;
            };
            let chunk = self.chunks.get_mut(&chunk_no).ok_or(Need::Chunk(chunk_no))?;
            if let Some(index) = chunk.next_available(self.position) {
                put(&mut chunk.blocked, index, true);
                self.position = index + 1;
                self.count(chunk_no, -1);
                return Ok(grain_of(chunk_no, index));
            }
            // Grains freed behind the position are found when the chunk's turn comes again.
            (self.current, self.search_from) = (None, chunk_no as usize + 1);
        }
    }

    /// The next chunk to fill, adding one at the end of the file when the rest is too fragmented.
    fn next_chunk(&mut self) -> Option<ChunkNo> {
        let after = self.search_from.min(self.counts.len());
        let order = || (after..self.counts.len()).chain(0..after);
        let at_least = |n: u16| order().find(|c| self.counts.get(*c).is_some_and(|x| x.available >= n));
        let total = self.counts.len() as u64 * CHUNK_GRAINS as u64;
        let mostly_free = self.available * 4 > total;
        let found = at_least(WORTH_A_SEEK).or_else(|| if mostly_free { at_least(1) } else { None });
        let found = match found {
            Some(c) => Some(c),
            None => self.extend().or_else(|| at_least_one(&self.counts)),
        };
        found.and_then(|c| ChunkNo::try_from(c).ok())
    }

    fn extend(&mut self) -> Option<usize> {
        let chunk = self.counts.len();
        if (chunk as u64 + 1) * CHUNK_GRAINS as u64 > MAX_GRAINS {
            return None;
        }
        let free = Self::blank_free(self.reserved as u64, chunk);
        self.counts.push(Counts {
            free,
            available: free,
            shared: false,
        });
        self.available += u64::from(free);
        let bits = self.blank(ChunkNo::try_from(chunk).ok()?);
        self.chunks.insert(
            ChunkNo::try_from(chunk).ok()?,
            Chunk::fresh(bits, Refs::default()),
        );
        Some(chunk)
    }

    fn count(&mut self, chunk: ChunkNo, by: i32) {
        let counts = self
            .counts
            .get_mut(chunk as usize)
            .expect("a loaded chunk is counted");
        let now = i32::from(counts.available) + by;
        counts.available = u16::try_from(now).expect("0 to 4096 available");
        self.available = self
            .available
            .checked_add_signed(i64::from(by))
            .expect("sum of the chunks");
    }

    /// Adds chunks until the grain has one.
    pub(crate) fn extend_to(&mut self, grain: u64) -> ChunkNo {
        let (chunk, _) = split(grain);
        while self.counts.len() <= chunk as usize && self.extend().is_some() {}
        chunk
    }

    /// Reserves the grain that an earlier process had reserved; its bitmap is in RAM. `false` when it is taken.
    pub(crate) fn reserve_exactly(&mut self, grain: u64) -> bool {
        let (chunk_no, index) = split(grain);
        let Some(chunk) = self.chunks.get_mut(&chunk_no).filter(|c| c.is_available(index)) else {
            return false;
        };
        put(&mut chunk.blocked, index, true);
        self.count(chunk_no, -1);
        true
    }

    /// Gives back a reservation that was never published.
    pub(crate) fn unreserve(&mut self, grain: u64) {
        let (chunk_no, index) = split(grain);
        let chunk = self
            .chunks
            .get_mut(&chunk_no)
            .expect("a chunk with reservations stays in RAM");
        assert!(
            test(&chunk.blocked, index) && !test(&chunk.bits, index),
            "grain {grain} was not reserved"
        );
        put(&mut chunk.blocked, index, false);
        self.count(chunk_no, 1);
    }

    /// Chunks that [`Allocator::close`] needs and that are not in RAM.
    pub(crate) fn missing(&self, releases: &[u64]) -> BTreeSet<ChunkNo> {
        releases
            .iter()
            .chain(self.sharing.keys())
            .map(|g| split(*g).0)
            .filter(|c| !self.is_loaded(*c))
            .collect()
    }

    /// Moves the bitmaps to the transaction group being closed. Gives the bitmaps and count blocks to record.
    ///
    /// # Errors
    /// `Corrupt` when a grain is taken or released twice: the map and the bitmaps disagree, nothing may be recorded.
    pub(crate) fn close(&mut self, allocs: &[u64], releases: &[u64]) -> Result<Closed> {
        let mut touched = BTreeSet::new();
        let mut closed = Closed::default();
        for grain in allocs {
            touched.insert(self.record(*grain, true)?);
        }
        // Taken before what is given back: a grain may be shared and lose its first place in one group.
        let mut references = self.add_references()?;
        for grain in releases {
            if !self.take_reference(*grain, &mut references)? {
                touched.insert(self.record(*grain, false)?);
                closed.freed.push(*grain);
            }
        }
        let mut blocks = BTreeSet::new();
        for chunk_no in touched {
            let chunk = self.chunks.get_mut(&chunk_no).expect("just recorded in it");
            chunk.changed = true;
            closed.bitmaps.push((chunk_no, chunk.bits));
            blocks.insert(chunk_no as usize / COUNTS_PER_BLOCK);
        }
        for (chunk_no, touched) in references {
            let chunk = self.chunks.get_mut(&chunk_no).expect("just counted in it");
            chunk.changed = true;
            closed.references.extend(chunk.refs.encode(chunk_no, &touched));
            closed.counted.push(chunk_no);
            let counts = self.counts.get_mut(chunk_no as usize).expect("it is loaded");
            counts.shared = !chunk.refs.is_empty();
            blocks.insert(chunk_no as usize / COUNTS_PER_BLOCK);
        }
        for block in blocks {
            let counts = self
                .counts
                .iter()
                .skip(block * COUNTS_PER_BLOCK)
                .take(COUNTS_PER_BLOCK);
            let counts = counts.map(|c| ChunkCount {
                free: c.free,
                shared: c.shared,
            });
            let counts = counts.collect();
            closed
                .counts
                .push((u32::try_from(block).expect("22 bits"), counts));
        }
        Ok(closed)
    }

    /// Counts the references that the closing group adds.
    fn add_references(&mut self) -> Result<BTreeMap<ChunkNo, Touched>> {
        let mut references: BTreeMap<ChunkNo, Touched> = BTreeMap::new();
        for (grain, more) in &self.sharing {
            let (chunk_no, index) = split(*grain);
            let wrong = |what: &str| Error::corrupt("extra references", format!("grain {grain}: {what}"));
            let chunk = self.chunks.get_mut(&chunk_no);
            let chunk = chunk.ok_or_else(|| wrong("its bitmap is not loaded"))?;
            if !test(&chunk.bits, index) {
                return Err(wrong("it is free"));
            }
            chunk
                .refs
                .add(index, *more, references.entry(chunk_no).or_default());
        }
        Ok(references)
    }

    /// A placement goes: takes one extra reference, if the grain has any.
    fn take_reference(&mut self, grain: u64, references: &mut BTreeMap<ChunkNo, Touched>) -> Result<bool> {
        let (chunk_no, index) = split(grain);
        let chunk = self.chunks.get_mut(&chunk_no).ok_or_else(|| {
            Error::corrupt("allocation", format!("grain {grain}: its bitmap is not loaded"))
        })?;
        if chunk.refs.get(index) == 0 {
            return Ok(false);
        }
        if chunk.refs.take(index, references.entry(chunk_no).or_default()) == Some(0) {
            self.cooling.insert(grain);
        }
        Ok(true)
    }

    fn record(&mut self, grain: u64, take: bool) -> Result<ChunkNo> {
        let (chunk_no, index) = split(grain);
        let wrong = |what: &str| Error::corrupt("allocation", format!("grain {grain}: {what}"));
        let chunk = self
            .chunks
            .get_mut(&chunk_no)
            .ok_or_else(|| wrong("its bitmap is not loaded"))?;
        let counts = self
            .counts
            .get_mut(chunk_no as usize)
            .ok_or_else(|| wrong("no such chunk"))?;
        if test(&chunk.bits, index) == take {
            return Err(wrong(if take { "taken twice" } else { "released twice" }));
        }
        put(&mut chunk.bits, index, take);
        // A taken grain was blocked by its reservation; a released one is blocked until the commit is durable.
        put(&mut chunk.blocked, index, !take);
        counts.free = if take { counts.free - 1 } else { counts.free + 1 };
        Ok(chunk_no)
    }

    /// The commit is durable: what it released is free, what it recorded may leave the RAM.
    pub(crate) fn settle(&mut self, closed: &Closed) {
        self.sharing = Shares::new();
        self.cooling = HashSet::new();
        for grain in &closed.freed {
            let (chunk_no, index) = split(*grain);
            let chunk = self
                .chunks
                .get_mut(&chunk_no)
                .expect("a chunk being recorded stays in RAM");
            put(&mut chunk.blocked, index, false);
            put(self.punch.entry(chunk_no).or_insert(EMPTY), index, true);
            self.count(chunk_no, 1);
        }
        let bitmaps = closed.bitmaps.iter().map(|(chunk_no, _)| chunk_no);
        for chunk_no in bitmaps.chain(&closed.counted) {
            self.chunks
                .get_mut(chunk_no)
                .expect("a chunk being recorded stays in RAM")
                .changed = false;
        }
        if self.chunks.len() > CACHED_CHUNKS {
            let (current, punch) = (self.current, &self.punch);
            self.chunks
                .retain(|no, c| !c.idle() || Some(*no) == current || punch.contains_key(no));
        }
    }

    /// Takes a run of free grains that contains recently released ones out of the allocator, for punching.
    pub(crate) fn take_punch(&mut self) -> Option<(u64, u64)> {
        while let Some(mut entry) = self.punch.first_entry() {
            let chunk_no = *entry.key();
            let Some(index) = (0..CHUNK_GRAINS).find(|i| test(entry.get(), *i)) else {
                entry.remove();
                continue;
            };
            let Some(chunk) = self.chunks.get_mut(&chunk_no) else {
                entry.remove();
                continue;
            };
            let start = (0..=index).rev().take_while(|i| chunk.is_available(*i)).last();
            let end = (index..CHUNK_GRAINS)
                .find(|i| !chunk.is_available(*i))
                .unwrap_or(CHUNK_GRAINS);
            let start = start.unwrap_or(index);
            (start..end.max(index + 1)).for_each(|i| put(entry.get_mut(), i, false));
            if end.saturating_sub(start) >= self.punch_run {
                (start..end).for_each(|i| put(&mut chunk.blocked, i, true));
                let len = end - start;
                self.count(chunk_no, -i32::try_from(len).expect("at most 4096"));
                return Some((grain_of(chunk_no, start), len as u64));
            }
        }
        None
    }

    /// A run from [`Allocator::take_punch`] is available again.
    pub(crate) fn punched(&mut self, start: u64, len: u64) {
        (start..start + len).for_each(|g| self.unreserve(g));
    }
}

/// What closing a transaction group changed.
#[derive(Default)]
pub(crate) struct Closed {
    /// Bitmaps to record.
    pub(crate) bitmaps: Vec<(ChunkNo, Bits)>,
    /// Counts to record, by block.
    pub(crate) counts: Vec<(u32, Vec<ChunkCount>)>,
    /// Changes of `R`.
    pub(crate) references: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// Chunks whose `R` changes.
    counted: Vec<ChunkNo>,
    /// Grains that nothing places any more.
    pub(crate) freed: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(free: u16) -> ChunkCount {
        ChunkCount { free, shared: false }
    }

    #[test]
    fn a_shared_grain_is_free_after_its_last_placement() {
        let mut a = allocator();
        let g = a.reserve().unwrap();
        assert_eq!(a.is_shared(g), Ok(false));
        a.begin_close(Shares::from([(g, 2)]));
        assert_eq!(a.is_shared(g), Ok(true), "before the count is made");
        // One of three placements goes in the same group.
        let closed = a.close(&[g], &[g]).unwrap();
        assert!(
            closed.freed.is_empty()
                && closed.counts
                    == vec![(
                        0,
                        vec![ChunkCount {
                            free: 4093,
                            shared: true
                        }]
                    )]
        );
        a.settle(&closed);
        assert_eq!((a.is_shared(g), a.has_references(0)), (Ok(true), true));
        let closed = a.close(&[], &[g]).unwrap();
        assert_eq!(
            a.is_shared(g),
            Ok(true),
            "the durable state still has two placements (I4)"
        );
        assert!(closed.freed.is_empty());
        a.settle(&closed);
        assert_eq!((a.is_shared(g), a.has_references(0)), (Ok(false), false));
        let closed = a.close(&[], &[g]).unwrap();
        assert_eq!(closed.freed, vec![g]);
        a.settle(&closed);
        assert!(matches!(a.close(&[], &[g]), Err(Error::Corrupt { .. })));
        a.begin_close(Shares::from([(g, 1)]));
        assert!(
            matches!(a.close(&[], &[]), Err(Error::Corrupt { .. })),
            "a free grain is not shared"
        );
    }

    fn allocator() -> Allocator {
        Allocator::new(2, 0, &[], 16)
    }

    #[test]
    fn reserves_in_order_and_frees_only_after_the_commit() {
        let mut a = allocator();
        let grains: Vec<u64> = (0..20).map(|_| a.reserve().unwrap()).collect();
        assert_eq!(
            grains,
            (2..22).collect::<Vec<_>>(),
            "0 and 1 hold the superblocks"
        );
        assert_eq!(a.in_use(), 20);
        let closed = a.close(&grains, &[]).unwrap();
        assert_eq!(closed.counts, vec![(0, vec![free(4096 - 22)])]);
        a.settle(&closed);
        let closed = a.close(&[], &grains).unwrap();
        a.current = None;
        assert_eq!(
            a.reserve().unwrap(),
            22,
            "released grains are not reused before the commit is durable"
        );
        a.settle(&closed);
        assert_eq!(a.in_use(), 1);
        assert_eq!(a.take_punch(), Some((2, 20)));
        a.current = None;
        assert_eq!(a.reserve().unwrap(), 23, "nor while they are punched");
        a.punched(2, 20);
        assert_eq!(a.take_punch(), None);
        a.current = None;
        assert_eq!(a.reserve().unwrap(), 2);
    }

    #[test]
    fn a_grain_taken_and_released_in_one_group_stays_blocked() {
        let mut a = allocator();
        let g = a.reserve().unwrap();
        let closed = a.close(&[g], &[g]).unwrap();
        a.current = None;
        assert_ne!(a.reserve().unwrap(), g);
        a.settle(&closed);
        a.current = None;
        assert_eq!(a.reserve().unwrap(), g);
    }

    #[test]
    fn releasing_twice_is_seen() {
        let mut a = allocator();
        let g = a.reserve().unwrap();
        a.close(&[g], &[]).unwrap();
        assert!(matches!(a.close(&[], &[g, g]), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn bounds_and_missing_bitmaps() {
        let mut a = Allocator::new(2, 3, &[], 16);
        for _ in 0..3 {
            a.reserve().unwrap();
        }
        assert_eq!(a.reserve(), Err(Need::Space));
        let mut a = Allocator::new(2, 0, &[free(4094)], 16);
        assert_eq!(a.reserve(), Err(Need::Chunk(0)));
        assert!(
            a.insert(0, EMPTY, Refs::default()).is_err(),
            "does not agree with the count"
        );
        a.insert(0, a.blank(0), Refs::default()).unwrap();
        assert_eq!(a.reserve(), Ok(2));
        assert_eq!(a.missing(&[5, 5000, 9000]), BTreeSet::from([1, 2]));
    }
}
