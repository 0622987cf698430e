//! Simulated media for tests: what a disk may hold after a power cut (feature `sim` only).
//!
//! [`Medium`] is the model of one file. It is the pessimistic one of POSIX: after a cut each 4 KiB page holds the
//! version of the last completed sync or any later one, each page by itself, and so does the length.
//! [`World`] puts one such file and a metadata store under a pool, behind the seams [`crate::disk::Disk`] and
//! [`crate::meta::MetaStore`].

mod world;

use std::collections::BTreeMap;
use std::sync::Arc;

/// Unit in which a disk keeps or loses what was not synced, in bytes.
pub const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

pub use world::{Call, Failure, Fault, SimDisk, SimMeta, World};

type Page = Arc<[u8; PAGE_LEN]>;

/// How unkind a power cut is to what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Nothing that was not synced survives.
    All,
    /// Every page and every length chooses by itself.
    Random,
    /// Everything survives (as after kill -9).
    Nothing,
}

/// A small seeded generator (SplitMix64), so that every failure is one number.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound` (0 when `bound` is 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits().checked_rem(bound).unwrap_or(0)
    }

    /// An index into something of `len` items.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True in `percent` of the cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `from`, or nothing when it is empty.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.index(from.len()))
    }

    /// How many of `pending` changes in a row reached the disk.
    pub fn kept(&mut self, pending: usize, loss: Loss) -> usize {
        match loss {
            Loss::All => 0,
            Loss::Nothing => pending,
            Loss::Random => self.index(pending + 1),
        }
    }
}

/// One file: what a process sees of it, and what a disk may hold of it.
#[derive(Clone, Debug, Default)]
pub struct Medium {
    now: u64,
    pages: BTreeMap<u64, Page>,
    len: u64,
    durable: BTreeMap<u64, Page>,
    durable_len: u64,
    pending: BTreeMap<u64, Vec<(u64, Page)>>,
    pending_len: Vec<(u64, u64)>,
}

impl Medium {
    /// Length in bytes as the process sees it.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when the file holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes in pages that are not holes.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Bytes of holes that a write there would fill.
    #[must_use]
    pub fn would_allocate(&self, offset: u64, len: u64) -> u64 {
        let pages = offset / PAGE..offset.saturating_add(len).div_ceil(PAGE);
        pages.filter(|index| !self.pages.contains_key(index)).count() as u64 * PAGE
    }

    fn page(&self, index: u64) -> [u8; PAGE_LEN] {
        self.pages.get(&index).map_or([0; PAGE_LEN], |page| **page)
    }

    fn set_page(&mut self, index: u64, page: [u8; PAGE_LEN]) {
        let page = Arc::new(page);
        self.pages.insert(index, Arc::clone(&page));
        self.pending.entry(index).or_default().push((self.now, page));
    }

    fn change_len(&mut self, len: u64) {
        if len != self.len {
            self.len = len;
            self.pending_len.push((self.now, len));
        }
    }

    /// Reads as `pread` does; returns how many bytes lie before the end of the file.
    #[must_use]
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let there = usize::try_from(self.len.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let mut at = offset;
        let mut rest = buf.get_mut(..there).unwrap_or_default();
        while !rest.is_empty() {
            let start = in_page(at);
            let n = (PAGE_LEN - start).min(rest.len());
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(n);
            match self
                .pages
                .get(&(at / PAGE))
                .and_then(|page| page.get(start..start + n))
            {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(0),
            }
            at += n as u64;
            rest = tail;
        }
        there
    }

    /// Writes as `pwrite` does.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.now += 1;
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let start = in_page(at);
            let (part, tail) = rest.split_at((PAGE_LEN - start).min(rest.len()));
            let mut page = self.page(at / PAGE);
            if let Some(place) = page.get_mut(start..start + part.len()) {
                place.copy_from_slice(part);
            }
            self.set_page(at / PAGE, page);
            at += part.len() as u64;
            rest = tail;
        }
        self.change_len(self.len.max(at));
    }

    /// Makes a range read as zeroes (`FALLOC_FL_PUNCH_HOLE`); the length stays.
    pub fn punch(&mut self, offset: u64, len: u64) {
        self.now += 1;
        self.zero(offset, len);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len.next_multiple_of(PAGE));
        if offset >= end {
            return;
        }
        let known: Vec<u64> = self
            .pages
            .range(offset / PAGE..end.div_ceil(PAGE))
            .map(|(&index, _)| index)
            .collect();
        for index in known {
            let mut page = self.page(index);
            let from = usize::try_from(offset.saturating_sub(index * PAGE).min(PAGE)).unwrap_or(PAGE_LEN);
            let to = usize::try_from(end.saturating_sub(index * PAGE).min(PAGE)).unwrap_or(PAGE_LEN);
            page.get_mut(from..to).unwrap_or_default().fill(0);
            self.set_page(index, page);
            if from == 0 && to == PAGE_LEN {
                self.pages.remove(&index);
            }
        }
    }

    /// Sets the length as `ftruncate` does.
    pub fn set_len(&mut self, len: u64) {
        self.now += 1;
        if len < self.len {
            self.zero(len, self.len.next_multiple_of(PAGE) - len);
        }
        self.change_len(len);
    }

    /// Now: to be taken when a sync begins, since it covers only what was written before.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.now
    }

    /// A sync that began at `mark` has ended.
    pub fn make_durable(&mut self, mark: u64) {
        for (&index, versions) in &mut self.pending {
            let covered = versions.partition_point(|(when, _)| *when <= mark);
            if let Some((_, page)) = versions.drain(..covered).next_back() {
                self.durable.insert(index, page);
            }
        }
        self.pending.retain(|_, versions| !versions.is_empty());
        let covered = self.pending_len.partition_point(|(when, _)| *when <= mark);
        if let Some((_, len)) = self.pending_len.drain(..covered).next_back() {
            self.durable_len = len;
        }
    }

    /// A sync that began at `mark` has failed, and what it was to write is forgotten: the process goes on seeing it, no
    /// later sync writes it (as page caches behave after an error of writeback).
    pub fn forget(&mut self, mark: u64) {
        for versions in self.pending.values_mut() {
            versions.retain(|(when, _)| *when > mark);
        }
        self.pending.retain(|_, versions| !versions.is_empty());
    }

    /// A range written with `RWF_DSYNC` is on the disk.
    pub fn make_range_durable(&mut self, offset: u64, len: u64) {
        for index in offset / PAGE..offset.saturating_add(len).div_ceil(PAGE) {
            if let Some((_, page)) = self
                .pending
                .remove(&index)
                .and_then(|versions| versions.last().cloned())
            {
                self.durable.insert(index, page);
            }
        }
        let end = offset.saturating_add(len);
        if end > self.durable_len {
            self.durable_len = end;
            self.pending_len.retain(|(_, len)| *len > end);
        }
    }

    /// What a power cut here could leave: the pages that are not holes, and the length. All of it is durable then.
    #[must_use]
    pub fn after_cut(&self, loss: Loss, rng: &mut Rng) -> Self {
        let mut pages = self.durable.clone();
        for (&index, versions) in &self.pending {
            if let Some((_, page)) = rng
                .kept(versions.len(), loss)
                .checked_sub(1)
                .and_then(|last| versions.get(last))
            {
                pages.insert(index, Arc::clone(page));
            }
        }
        let lens = rng.kept(self.pending_len.len(), loss).checked_sub(1);
        let len = lens
            .and_then(|last| self.pending_len.get(last))
            .map_or(self.durable_len, |(_, len)| *len);
        pages.retain(|&index, _| index * PAGE < len);
        if let Some(page) = pages.get_mut(&(len / PAGE)) {
            // The rest of the last page lies beyond the end: it must read as zeroes if the file grows again.
            Arc::make_mut(page)
                .get_mut(in_page(len)..)
                .unwrap_or_default()
                .fill(0);
        }
        Self {
            pages: pages.clone(),
            len,
            durable: pages,
            durable_len: len,
            ..Self::default()
        }
    }

    /// The pages that are not holes, as (offset in bytes, bytes); the last may reach beyond the length.
    pub fn extents(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages
            .iter()
            .map(|(&index, page)| (index * PAGE, page.as_slice()))
    }
}

fn in_page(offset: u64) -> usize {
    usize::try_from(offset % PAGE).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(medium: &Medium, offset: u64) -> u8 {
        let mut buf = [0xee];
        let _ = medium.read(offset, &mut buf);
        buf[0]
    }

    #[test]
    fn a_sync_covers_what_was_written_before_it_began() {
        let mut medium = Medium::default();
        medium.write(0, &[1; 4096]);
        let mark = medium.mark();
        medium.write(0, &[2; 4096]);
        medium.make_durable(mark);
        let mut rng = Rng::new(1);
        assert_eq!(byte(&medium, 5), 2);
        assert_eq!(byte(&medium.after_cut(Loss::All, &mut rng), 5), 1);
        assert_eq!(byte(&medium.after_cut(Loss::Nothing, &mut rng), 5), 2);
        let seen: std::collections::BTreeSet<u8> = (0..50)
            .map(|_| byte(&medium.after_cut(Loss::Random, &mut rng), 5))
            .collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn pages_are_lost_one_by_one_and_so_is_the_length() {
        let mut medium = Medium::default();
        medium.write(0, &[7; 3 * 4096]);
        let mut rng = Rng::new(2);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let cut = medium.after_cut(Loss::Random, &mut rng);
            seen.insert((
                cut.len(),
                byte(&cut, 0) == 7,
                byte(&cut, 4096) == 7,
                byte(&cut, 8192) == 7,
            ));
        }
        assert!(seen.contains(&(3 * 4096, true, false, true)), "{seen:?}");
        assert!(
            seen.contains(&(0, false, false, false)) && !seen.contains(&(0, true, true, true)),
            "{seen:?}"
        );
    }

    #[test]
    fn truncation_and_holes_read_as_zeroes() {
        let mut medium = Medium::default();
        medium.write(100, &[9; 9000]);
        medium.set_len(5000);
        medium.set_len(10_000);
        assert_eq!(
            (byte(&medium, 4999), byte(&medium, 5000), byte(&medium, 9000)),
            (9, 0, 0)
        );
        medium.punch(0, 4096);
        assert_eq!(
            (byte(&medium, 200), byte(&medium, 4500), medium.len()),
            (0, 9, 10_000)
        );
        let mut rng = Rng::new(3);
        medium.make_durable(medium.mark());
        let cut = medium.after_cut(Loss::All, &mut rng);
        assert_eq!((byte(&cut, 200), byte(&cut, 4500), byte(&cut, 6000)), (0, 9, 0));
    }
}
