//! Map entries and pages of 64 entries, and how a page is written down.

use crate::codec::{Dec, Enc};
use crate::{Epoch, Result};

/// Entries of a page.
pub const PAGE_ENTRIES: usize = 64;

/// Number of a map page within a branch: grain index / 64.
pub type PageNo = u32;

/// Where one grain of a volume is: 34 bits grain number, 2 bits flags, 28 bits birth epoch.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Entry(u64);

const MAPPED: u64 = 1 << 63;
const ZERO: u64 = 1 << 62;
const GRAIN_BITS: u32 = 34;
const BIRTH_BITS: u32 = 28;
const BIRTH_MASK: u64 = (1 << BIRTH_BITS) - 1;

/// Most grains that a pool can number.
pub const MAX_GRAINS: u64 = 1 << GRAIN_BITS;

impl Entry {
    /// Unmapped: reads as zeroes.
    pub const HOLE: Self = Self(0);

    /// Placed at `grain` since `birth`.
    #[must_use]
    pub fn mapped(grain: u64, birth: Epoch) -> Self {
        assert!(grain < MAX_GRAINS && birth <= Epoch::MAX, "entry out of range");
        Self(MAPPED | (grain << BIRTH_BITS) | u64::from(birth.0))
    }

    /// Written with zeroes since `birth`: no grain, but not unmapped either.
    #[must_use]
    pub fn zero(birth: Epoch) -> Self {
        assert!(birth <= Epoch::MAX, "entry out of range");
        Self(ZERO | u64::from(birth.0))
    }

    /// The grain, if there is one.
    #[must_use]
    pub fn grain(self) -> Option<u64> {
        (self.0 & MAPPED != 0).then_some((self.0 >> BIRTH_BITS) & (MAX_GRAINS - 1))
    }

    /// Whether it is explicit zeroes.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 & (MAPPED | ZERO) == ZERO
    }

    /// Whether it is unmapped.
    #[must_use]
    pub fn is_hole(self) -> bool {
        self.0 & (MAPPED | ZERO) == 0
    }

    /// Epoch in which this placement was made.
    #[must_use]
    pub fn birth(self) -> Epoch {
        Epoch(u32::try_from(self.0 & BIRTH_MASK).unwrap_or(u32::MAX))
    }

    /// The 64 bits on disk.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// From the 64 bits on disk; `None` when both flags are set or an unmapped entry is not all zero.
    #[must_use]
    pub fn from_bits(bits: u64) -> Option<Self> {
        let valid = match (bits & MAPPED != 0, bits & ZERO != 0) {
            (true, true) => false,
            (true, false) => true,
            (false, true) => bits & !(ZERO | BIRTH_MASK) == 0,
            (false, false) => bits == 0,
        };
        valid.then_some(Self(bits))
    }

    /// Whether `self` can follow `first` by `n` places in one run.
    fn continues(self, first: Self, n: u64) -> bool {
        match first.grain() {
            Some(g) => self.grain() == Some(g + n) && self.birth() == first.birth(),
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
            Some(g) => write!(f, "{g}@{}", self.birth().0),
            None if self.is_zero() => write!(f, "zero@{}", self.birth().0),
            None => write!(f, "-"),
        }
    }
}

/// 64 consecutive entries of a branch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    entries: [Entry; PAGE_ENTRIES],
}

impl Default for Page {
    fn default() -> Self {
        Self {
            entries: [Entry::HOLE; PAGE_ENTRIES],
        }
    }
}

const KIND_RAW: u8 = 1;
const KIND_RUNS: u8 = 2;

impl Page {
    /// The entry at `index`; an index past the page is a hole.
    #[must_use]
    pub fn at(&self, index: u8) -> Entry {
        self.entries
            .get(usize::from(index))
            .copied()
            .unwrap_or(Entry::HOLE)
    }

    /// Replaces the entry at `index` and gives the old one.
    ///
    /// # Panics
    /// When `index` is not below [`PAGE_ENTRIES`].
    pub fn set(&mut self, index: u8, entry: Entry) -> Entry {
        let place = self
            .entries
            .get_mut(usize::from(index))
            .expect("callers number entries below 64");
        std::mem::replace(place, entry)
    }

    /// Entries in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        self.entries.iter().copied()
    }

    /// Entries that are backed by a grain.
    #[must_use]
    pub fn mapped(&self) -> u64 {
        self.iter().filter(|e| e.grain().is_some()).count() as u64
    }

    /// The shorter of the two encodings, without key binding and CRC.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let runs = self.runs();
        let mut out = Enc::default();
        if runs.len() * 9 + 1 < PAGE_ENTRIES * 8 {
            out.u8(KIND_RUNS);
            out.u8(u8::try_from(runs.len()).expect("at most 64 runs"));
            for (len, entry) in runs {
                out.u8(len);
                out.u64(entry.to_bits());
            }
        } else {
            out.u8(KIND_RAW);
            self.iter().for_each(|e| out.u64(e.to_bits()));
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
                for place in &mut page.entries {
                    *place = Self::entry(&mut d)?;
                }
            }
            KIND_RUNS => Self::decode_runs(&mut d, &mut page.entries)?,
            _ => return Err(d.bad("unknown kind")),
        }
        d.end()?;
        Ok(page)
    }

    fn decode_runs(d: &mut Dec<'_>, entries: &mut [Entry]) -> Result<()> {
        let mut places = entries.iter_mut();
        for _ in 0..d.u8()? {
            let len = d.u8()?;
            let first = Self::entry(d)?;
            for n in 0..u64::from(len) {
                let entry = first.advanced(n).ok_or_else(|| d.bad("grain number"))?;
                *places.next().ok_or_else(|| d.bad("runs too long"))? = entry;
            }
        }
        if places.next().is_some() {
            Err(d.bad("runs too short"))
        } else {
            Ok(())
        }
    }

    fn entry(d: &mut Dec<'_>) -> Result<Entry> {
        let bits = d.u64()?;
        Entry::from_bits(bits).ok_or_else(|| d.bad("entry flags"))
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
