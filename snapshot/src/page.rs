//! Map entries and pages of 64 entries, and how a page is written down.

use crate::codec::{Dec, Enc};
use crate::{Epoch, Result};

/// Entries of a page.
pub const PAGE_ENTRIES: usize = 64;

/// Number of a map page within a branch: grain index / 64.
pub type PageNo = u32;

/// Where one grain of a volume is: 34 bits grain number, 2 bits flags, 28 bits birth epoch; and the checksum of its
/// bytes, where one is recorded. Such a grain is never written again (invariant I5).
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Entry {
    bits: u64,
    crc: Option<u32>,
}

const MAPPED: u64 = 1 << 63;
const ZERO: u64 = 1 << 62;
const GRAIN_BITS: u32 = 34;
const BIRTH_BITS: u32 = 28;
const BIRTH_MASK: u64 = (1 << BIRTH_BITS) - 1;

/// Most grains that a pool can number.
pub const MAX_GRAINS: u64 = 1 << GRAIN_BITS;

impl Entry {
    /// Unmapped: reads as zeroes.
    pub const HOLE: Self = Self::bare(0);

    const fn bare(bits: u64) -> Self {
        Self { bits, crc: None }
    }

    /// Placed at `grain` since `birth`.
    #[must_use]
    pub fn mapped(grain: u64, birth: Epoch) -> Self {
        assert!(grain < MAX_GRAINS && birth <= Epoch::MAX, "entry out of range");
        Self::bare(MAPPED | (grain << BIRTH_BITS) | u64::from(birth.0))
    }

    /// Written with zeroes since `birth`: no grain, but not unmapped either.
    #[must_use]
    pub fn zero(birth: Epoch) -> Self {
        assert!(birth <= Epoch::MAX, "entry out of range");
        Self::bare(ZERO | u64::from(birth.0))
    }

    /// The grain, if there is one.
    #[must_use]
    pub fn grain(self) -> Option<u64> {
        (self.bits & MAPPED != 0).then_some((self.bits >> BIRTH_BITS) & (MAX_GRAINS - 1))
    }

    /// Whether it is explicit zeroes.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.bits & (MAPPED | ZERO) == ZERO
    }

    /// Whether it is unmapped.
    #[must_use]
    pub fn is_hole(self) -> bool {
        self.bits & (MAPPED | ZERO) == 0
    }

    /// Epoch in which this placement was made.
    #[must_use]
    pub fn birth(self) -> Epoch {
        Epoch(u32::try_from(self.bits & BIRTH_MASK).unwrap_or(u32::MAX))
    }

    /// CRC-32C of the grain's bytes, if it is recorded.
    #[must_use]
    pub fn crc(self) -> Option<u32> {
        self.crc
    }

    /// The same placement with its checksum recorded. Only what has a grain has one.
    #[must_use]
    pub fn with_crc(self, crc: Option<u32>) -> Self {
        Self {
            crc: crc.filter(|_| self.grain().is_some()),
            ..self
        }
    }

    /// The same content, placed since `birth`.
    #[must_use]
    pub fn reborn(self, birth: Epoch) -> Self {
        match self.grain() {
            Some(grain) => Self::mapped(grain, birth).with_crc(self.crc),
            None if self.is_zero() => Self::zero(birth),
            None => Self::HOLE,
        }
    }

    /// Whether both are the same placement, recorded checksums aside.
    #[must_use]
    pub fn same_place(self, other: Self) -> bool {
        self.bits == other.bits
    }

    /// As on disk: both flags mean "mapped, and the checksum follows".
    pub(crate) fn encode(self, e: &mut Enc) {
        match self.crc {
            Some(crc) => {
                e.u64(self.bits | ZERO);
                e.u32(crc);
            }
            None => e.u64(self.bits),
        }
    }

    /// Reads what [`Entry::encode`] wrote.
    pub(crate) fn decode(d: &mut Dec<'_>) -> Result<Self> {
        let (entry, has_crc) = Self::decode_place(d)?;
        let crc = has_crc.then(|| d.u32()).transpose()?;
        Ok(entry.with_crc(crc))
    }

    /// The placement, and whether checksums follow.
    fn decode_place(d: &mut Dec<'_>) -> Result<(Self, bool)> {
        let bits = d.u64()?;
        let has_crc = bits & (MAPPED | ZERO) == MAPPED | ZERO;
        let bits = if has_crc { bits & !ZERO } else { bits };
        let entry = Self::from_bits(bits).ok_or_else(|| d.bad("entry flags"))?;
        Ok((entry, has_crc))
    }

    /// `None` when both flags are set or an unmapped entry is not all zero.
    fn from_bits(bits: u64) -> Option<Self> {
        let valid = match (bits & MAPPED != 0, bits & ZERO != 0) {
            (true, true) => false,
            (true, false) => true,
            (false, true) => bits & !(ZERO | BIRTH_MASK) == 0,
            (false, false) => bits == 0,
        };
        valid.then_some(Self::bare(bits))
    }

    /// Whether `self` can follow `first` by `n` places in one run.
    pub(crate) fn continues(self, first: Self, n: u64) -> bool {
        match first.grain() {
            Some(g) => {
                self.grain() == Some(g + n)
                    && self.birth() == first.birth()
                    && self.crc.is_some() == first.crc.is_some()
            }
            None => self == first,
        }
    }

    /// The entry `n` places after `self` in its run.
    fn advanced(self, n: u64) -> Option<Self> {
        match self.grain() {
            Some(g) if g + n < MAX_GRAINS => Some(Self::mapped(g + n, self.birth())),
            Some(_) => None,
            None => Some(self),
        }
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.grain() {
            Some(g) => match self.crc {
                Some(crc) => write!(f, "{g}@{}#{crc:08x}", self.birth().0),
                None => write!(f, "{g}@{}", self.birth().0),
            },
            None if self.is_zero() => write!(f, "zero@{}", self.birth().0),
            None => write!(f, "-"),
        }
    }
}

/// 64 consecutive entries of a branch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    places: [u64; PAGE_ENTRIES],
    /// Only where at least one entry has a checksum.
    sums: Option<Box<Sums>>,
}

/// Recorded checksums of a page's entries. Those that are not recorded are zero.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Sums {
    mask: u64,
    crcs: [u32; PAGE_ENTRIES],
}

impl Default for Page {
    fn default() -> Self {
        Self {
            places: [0; PAGE_ENTRIES],
            sums: None,
        }
    }
}

const KIND_RAW: u8 = 1;
const KIND_RUNS: u8 = 2;

impl Page {
    /// The entry at `index`; an index past the page is a hole.
    #[must_use]
    pub fn at(&self, index: u8) -> Entry {
        let bits = self.places.get(usize::from(index)).copied().unwrap_or(0);
        Entry {
            bits,
            crc: self.sums.as_ref().and_then(|sums| sums.at(index)),
        }
    }

    /// Replaces the entry at `index` and gives the old one.
    ///
    /// # Panics
    /// When `index` is not below [`PAGE_ENTRIES`].
    pub fn set(&mut self, index: u8, entry: Entry) -> Entry {
        let old = self.at(index);
        let place = self
            .places
            .get_mut(usize::from(index))
            .expect("callers number entries below 64");
        *place = entry.bits;
        if entry.crc.is_some() || old.crc.is_some() {
            let mut sums = self.sums.take().unwrap_or_default();
            sums.set(index, entry.crc);
            self.sums = (sums.mask != 0).then_some(sums);
        }
        old
    }

    /// Entries in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        (0..64u8).map(|index| self.at(index))
    }

    /// Entries that are backed by a grain.
    #[must_use]
    pub fn mapped(&self) -> u64 {
        self.iter().filter(|e| e.grain().is_some()).count() as u64
    }

    /// Whether both show the same placements, recorded checksums aside.
    #[must_use]
    pub fn same_places(&self, other: &Self) -> bool {
        self.places == other.places
    }

    /// The shorter of the two encodings, without key binding and CRC.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let runs = self.runs();
        let mut out = Enc::default();
        // Checksums take the same room in both.
        if runs.len() * 9 + 1 < PAGE_ENTRIES * 8 {
            out.u8(KIND_RUNS);
            out.u8(u8::try_from(runs.len()).expect("at most 64 runs"));
            let mut entries = self.iter();
            for (len, first) in runs {
                out.u8(len);
                first.encode(&mut out);
                let rest = entries.by_ref().take(usize::from(len)).skip(1);
                rest.filter_map(Entry::crc).for_each(|crc| out.u32(crc));
            }
        } else {
            out.u8(KIND_RAW);
            self.iter().for_each(|e| e.encode(&mut out));
        }
        out.into_bytes()
    }

    fn runs(&self) -> Vec<(u8, Entry)> {
        let mut runs: Vec<(u8, Entry)> = Vec::new();
        for entry in self.iter() {
            match runs.last_mut() {
                Some((len, first)) if entry.continues(*first, u64::from(*len)) => *len += 1,
                _ => runs.push((1, entry)),
            }
        }
        runs
    }

    /// Reads what [`Page::encode`] wrote.
    ///
    /// # Errors
    /// `Corrupt` when it is not a page.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut d = Dec::new(bytes, "map page");
        let mut page = Self::default();
        match d.u8()? {
            KIND_RAW => {
                for index in 0..64 {
                    page.set(index, Entry::decode(&mut d)?);
                }
            }
            KIND_RUNS => page.decode_runs(&mut d)?,
            _ => return Err(d.bad("unknown kind")),
        }
        d.end()?;
        Ok(page)
    }

    fn decode_runs(&mut self, d: &mut Dec<'_>) -> Result<()> {
        let mut indices = 0..64u8;
        for _ in 0..d.u8()? {
            let len = d.u8()?;
            let (first, has_crc) = Entry::decode_place(d)?;
            for n in 0..u64::from(len) {
                let entry = first.advanced(n).ok_or_else(|| d.bad("grain number"))?;
                let crc = has_crc.then(|| d.u32()).transpose()?;
                let index = indices.next().ok_or_else(|| d.bad("runs too long"))?;
                self.set(index, entry.with_crc(crc));
            }
        }
        if indices.next().is_some() {
            Err(d.bad("runs too short"))
        } else {
            Ok(())
        }
    }
}

impl Default for Sums {
    fn default() -> Self {
        Self {
            mask: 0,
            crcs: [0; PAGE_ENTRIES],
        }
    }
}

impl Sums {
    fn at(&self, index: u8) -> Option<u32> {
        let recorded = index < 64 && self.mask & (1 << index) != 0;
        self.crcs.get(usize::from(index)).copied().filter(|_| recorded)
    }

    fn set(&mut self, index: u8, crc: Option<u32>) {
        let Some(place) = self.crcs.get_mut(usize::from(index)) else {
            return;
        };
        *place = crc.unwrap_or(0);
        match crc {
            Some(_) => self.mask |= 1 << index,
            None => self.mask &= !(1 << index),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_fields_do_not_overlap() {
        let e = Entry::mapped(MAX_GRAINS - 1, Epoch::MAX);
        assert_eq!((e.grain(), e.birth()), (Some(MAX_GRAINS - 1), Epoch::MAX));
        assert!(!e.is_zero() && !e.is_hole());
        let z = Entry::zero(Epoch(7));
        assert_eq!(
            (z.grain(), z.birth(), z.is_zero(), z.is_hole()),
            (None, Epoch(7), true, false)
        );
        assert_eq!(Entry::from_bits(MAPPED | ZERO), None);
        assert_eq!(Entry::from_bits(1), None, "a hole is all zero");
        let sealed = e.with_crc(Some(7));
        assert_eq!(
            (sealed.crc(), sealed.grain(), sealed.same_place(e)),
            (Some(7), e.grain(), true)
        );
        assert_ne!(sealed, e);
        assert_eq!(
            z.with_crc(Some(7)).crc(),
            None,
            "what has no grain has no checksum"
        );
        assert_eq!(
            sealed.reborn(Epoch(3)),
            Entry::mapped(MAX_GRAINS - 1, Epoch(3)).with_crc(Some(7))
        );
    }

    #[test]
    fn checksums_are_kept_in_both_encodings() {
        let mut page = Page::default();
        for i in 0..64 {
            let crc = (i % 3 != 0).then_some(u32::from(i) * 0x0101_0101);
            page.set(i, Entry::mapped(1000 + u64::from(i), Epoch(3)).with_crc(crc));
        }
        assert_eq!(Page::decode(&page.encode()).unwrap(), page, "runs of one or two");
        for i in 0..64 {
            page.set(i, page.at(i).with_crc(Some(u32::from(i))));
        }
        assert_eq!(page.encode().len(), 2 + 9 + 4 * 64, "one run");
        assert_eq!(Page::decode(&page.encode()).unwrap(), page);
        for i in 0..64 {
            page.set(
                i,
                Entry::mapped(u64::from(i) * 37, Epoch(u32::from(i))).with_crc(Some(9)),
            );
        }
        assert_eq!(page.encode().len(), 1 + 12 * 64, "raw");
        let bytes = page.encode();
        assert_eq!(Page::decode(&bytes).unwrap(), page);
        assert!(Page::decode(&bytes[..bytes.len() - 4]).is_err());
        let mut without = Page::default();
        for i in 0..64 {
            without.set(i, page.at(i).with_crc(None));
            page.set(i, page.at(i).with_crc(None));
        }
        assert_eq!(page, without, "no checksum left, no table of them");
    }

    #[test]
    fn pages_round_trip_in_both_encodings() {
        let mut page = Page::default();
        assert_eq!(page.encode().len(), 11, "one run");
        for i in 0..64 {
            page.set(i, Entry::mapped(1000 + u64::from(i), Epoch(3)));
        }
        page.set(5, Entry::zero(Epoch(4)));
        page.set(9, Entry::HOLE);
        assert!(page.encode().len() < 60);
        assert_eq!(Page::decode(&page.encode()).unwrap(), page);
        for i in 0..64 {
            page.set(i, Entry::mapped(u64::from(i) * 37, Epoch(u32::from(i))));
        }
        assert_eq!(page.encode().len(), 513, "raw");
        assert_eq!(Page::decode(&page.encode()).unwrap(), page);
    }

    #[test]
    fn damaged_pages_are_refused() {
        let good = Page::default().encode();
        for bytes in [
            &good[..good.len() - 1],
            &[],
            &[9],
            &[KIND_RUNS, 1, 65, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(Page::decode(bytes).is_err());
        }
    }
}
