//! Extra references of the grains of a chunk (table `R`): how often a grain is placed beyond the first time.

use std::collections::{BTreeMap, BTreeSet};

use crate::Result;
use crate::record::{self, CHUNK_GRAINS, REFERENCE_PART, SPILLED, key};

/// Parts that the counts of a chunk are recorded in.
const PARTS: usize = CHUNK_GRAINS / REFERENCE_PART;

/// Extra references of one chunk.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Refs {
    /// One byte per grain; [`SPILLED`] = look in `spilled`. None at all is the usual case.
    counts: Option<Box<[u8; CHUNK_GRAINS]>>,
    spilled: BTreeMap<u16, u64>,
    /// Grains that have any.
    shared: usize,
}

/// What a transaction group has changed of a chunk's references.
#[derive(Default)]
pub(crate) struct Touched {
    parts: BTreeSet<usize>,
    spilled: BTreeSet<u16>,
}

impl Refs {
    pub(crate) fn is_empty(&self) -> bool {
        self.shared == 0
    }

    pub(crate) fn get(&self, index: usize) -> u64 {
        let count = self.counts.as_ref().and_then(|c| c.get(index)).copied();
        match count {
            None => 0,
            Some(SPILLED) => self
                .spilled
                .get(&number(index))
                .copied()
                .unwrap_or_else(|| SPILLED.into()),
            Some(n) => n.into(),
        }
    }

    /// Sets a count.
    fn set(&mut self, index: usize, now: u64, touched: &mut Touched) {
        let before = self.get(index);
        let counts = self.counts.get_or_insert_with(|| Box::new([0; CHUNK_GRAINS]));
        let byte = u8::try_from(now).unwrap_or(SPILLED);
        *counts.get_mut(index).expect("index below the grains of a chunk") = byte;
        touched.parts.insert(index / REFERENCE_PART);
        if byte == SPILLED {
            self.spilled.insert(number(index), now);
            touched.spilled.insert(number(index));
        } else if self.spilled.remove(&number(index)).is_some() {
            touched.spilled.insert(number(index));
        }
        match (before, now) {
            (0, 1..) => self.shared += 1,
            (1.., 0) => self.shared -= 1,
            _ => {}
        }
        if self.shared == 0 {
            self.counts = None;
        }
    }

    pub(crate) fn add(&mut self, index: usize, more: u64, touched: &mut Touched) {
        self.set(index, self.get(index).saturating_add(more), touched);
    }

    /// One less; `None` when there was none to take, else what is left.
    pub(crate) fn take(&mut self, index: usize, touched: &mut Touched) -> Option<u64> {
        let left = self.get(index).checked_sub(1)?;
        self.set(index, left, touched);
        Some(left)
    }

    /// The keys and values to record for what has changed; no value = remove the key.
    pub(crate) fn encode(&self, chunk: u32, touched: &Touched) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let mut out = Vec::new();
        for part in &touched.parts {
            let counts = self
                .counts
                .as_ref()
                .and_then(|c| c.chunks(REFERENCE_PART).nth(*part));
            let counts = counts.filter(|c| c.iter().any(|n| *n != 0));
            let part = u8::try_from(*part).expect("two parts");
            let value = counts.map(|c| record::encode_references(chunk, part, c));
            out.push((key::references(chunk, part), value));
        }
        for index in &touched.spilled {
            let count = self.spilled.get(index);
            let value = count.map(|n| record::encode_spilled(chunk, *index, *n));
            out.push((key::spilled(chunk, *index), value));
        }
        out
    }

    /// All keys and values of a chunk.
    pub(crate) fn encode_all(&self, chunk: u32) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let touched = Touched {
            parts: (0..PARTS).collect(),
            spilled: self.spilled.keys().copied().collect(),
        };
        self.encode(chunk, &touched)
    }

    /// Takes in a key and its value.
    ///
    /// # Errors
    /// `Corrupt`, `Version`.
    pub(crate) fn decode(&mut self, key: &record::Key, value: &[u8]) -> Result<()> {
        let mut ignored = Touched::default();
        match *key {
            record::Key::References(chunk, part) => {
                let counts = record::decode_references(chunk, part, value)?;
                let first = usize::from(part) * REFERENCE_PART;
                for (index, n) in (first..).zip(counts).filter(|(_, n)| *n != 0) {
                    // A spilled count comes after its part, in the order of the keys.
                    self.set(index, n.into(), &mut ignored);
                }
            }
            record::Key::Spilled(chunk, index) => {
                let count = record::decode_spilled(chunk, index, value)?;
                if self.get(usize::from(index)) != u64::from(SPILLED) || count < u64::from(SPILLED) {
                    return Err(crate::Error::corrupt(
                        "extra references",
                        format!("chunk {chunk}, grain {index}: {count}"),
                    ));
                }
                self.set(usize::from(index), count, &mut ignored);
            }
            _ => {}
        }
        Ok(())
    }

    /// Counts that are not zero.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let all = 0..self.counts.as_ref().map_or(0, |c| c.len());
        all.map(|i| (i, self.get(i))).filter(|(_, n)| *n != 0)
    }

    /// From counts by grain.
    pub(crate) fn of(counts: impl IntoIterator<Item = (usize, u64)>) -> Self {
        let mut refs = Self::default();
        let mut ignored = Touched::default();
        counts
            .into_iter()
            .for_each(|(index, n)| refs.set(index, n, &mut ignored));
        refs
    }
}

fn number(index: usize) -> u16 {
    u16::try_from(index).expect("below the grains of a chunk")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Key;

    fn back(refs: &Refs) -> Refs {
        let mut read = Refs::default();
        for (key, value) in refs.encode_all(7) {
            if let Some(value) = value {
                read.decode(&Key::parse(&key).unwrap(), &value).unwrap();
            }
        }
        read
    }

    #[test]
    fn counts_rise_spill_fall_and_read_back() {
        let (mut refs, mut touched) = (Refs::default(), Touched::default());
        for n in 1..=300 {
            refs.add(2048, 1, &mut touched);
            assert_eq!(refs.get(2048), n);
        }
        refs.add(9, 2, &mut touched);
        assert_eq!(back(&refs), refs);
        assert_eq!(refs.iter().collect::<Vec<_>>(), vec![(9, 2), (2048, 300)]);
        assert_eq!(Refs::of(refs.iter()), refs);
        assert_eq!(touched.parts.len(), 2);
        for left in (0..300).rev() {
            assert_eq!(refs.take(2048, &mut touched), Some(left));
            assert_eq!(back(&refs), refs);
        }
        assert_eq!(refs.take(2048, &mut touched), None);
        assert!(refs.encode(7, &touched).iter().any(|(_, value)| value.is_none()));
        assert_eq!(
            (refs.take(9, &mut touched), refs.take(9, &mut touched)),
            (Some(1), Some(0))
        );
        assert!(refs.is_empty() && refs == Refs::default());
        assert!(refs.encode(7, &touched).iter().all(|(_, value)| value.is_none()));
    }

    #[test]
    fn a_part_of_many_different_counts_is_kept_raw() {
        let refs = Refs::of((0..CHUNK_GRAINS).map(|i| (i, 1 + (i % 250) as u64)));
        assert_eq!(back(&refs), refs);
        let largest = refs
            .encode_all(7)
            .into_iter()
            .filter_map(|(_, v)| Some(v?.len()))
            .max();
        assert!(largest.unwrap() <= crate::meta::MAX_VALUE_BYTES);
        let mut strange = Refs::default();
        let value = record::encode_spilled(7, 3, 400);
        assert!(
            strange.decode(&Key::Spilled(7, 3), &value).is_err(),
            "no part says so"
        );
    }
}
