//! Cuts a copy between two lists of ranges into pieces.

/// Bytes of a piece that is copied by reference: it takes a moment.
const BY_REFERENCE: u64 = 1 << 30;
/// Bytes of a piece whose data is moved: an abort waits for it.
const BY_DATA: u64 = 8 << 20;

/// One contiguous piece, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) len: u64,
}

/// Walks both lists side by side until one ends.
pub(super) struct Pieces<'a> {
    source: Ranges<'a>,
    destination: Ranges<'a>,
    grain: u64,
}

/// What is left of a list of ranges.
struct Ranges<'a> {
    current: Option<(u64, u64)>,
    rest: std::slice::Iter<'a, (u64, u64)>,
}

impl<'a> Ranges<'a> {
    fn new(ranges: &'a [(u64, u64)]) -> Self {
        let mut rest = ranges.iter();
        Self {
            current: rest.next().copied(),
            rest,
        }
    }

    /// Start and length of what is left of the range in front.
    fn front(&mut self) -> Option<(u64, u64)> {
        while let Some((_, 0)) = self.current {
            self.current = self.rest.next().copied();
        }
        self.current
    }

    /// Passes over at most the range in front; returns how much that was.
    fn advance(&mut self, len: u64) -> u64 {
        let Some((offset, left)) = &mut self.current else {
            return 0;
        };
        let len = len.min(*left);
        *offset += len;
        *left -= len;
        len
    }
}

impl<'a> Pieces<'a> {
    /// Leaves `skip` bytes of the source out. `grain` in bytes: what has the same place in it is copied by reference.
    pub(super) fn new(
        source: &'a [(u64, u64)],
        mut skip: u64,
        destination: &'a [(u64, u64)],
        grain: u64,
    ) -> Self {
        let mut source = Ranges::new(source);
        while skip > 0 && source.front().is_some() {
            skip -= source.advance(skip);
        }
        Self {
            source,
            destination: Ranges::new(destination),
            grain: grain.max(1),
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let (from, has) = self.source.front()?;
        let (to, wants) = self.destination.front()?;
        let most = if from % self.grain == to % self.grain {
            BY_REFERENCE
        } else {
            BY_DATA
        };
        let len = has.min(wants).min(most);
        self.source.advance(len);
        self.destination.advance(len);
        Some(Piece { from, to, len })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn aligned_pieces_are_long_and_others_short() {
        let pieces: Vec<_> = Pieces::new(&[(0, 3 << 30)], 1 << 29, &[(4096, 2 << 30)], 4096).collect();
        assert_eq!(pieces.len(), 2);
        assert_eq!(
            pieces.first(),
            Some(&Piece {
                from: 1 << 29,
                to: 4096,
                len: 1 << 30
            })
        );
        assert_eq!(
            Pieces::new(&[(512, 64 << 20)], 0, &[(0, 64 << 20)], 4096).count(),
            8
        );
        assert_eq!(Pieces::new(&[(0, 10)], 10, &[(0, 5)], 4096).count(), 0);
        assert_eq!(Pieces::new(&[], 0, &[(0, 5)], 4096).count(), 0);
    }

    /// Every byte of the lists, with its place.
    fn bytes(ranges: &[(u64, u64)]) -> Vec<u64> {
        ranges
            .iter()
            .flat_map(|(offset, len)| *offset..offset + len)
            .collect()
    }

    proptest! {
        #[test]
        fn pieces_pair_each_byte_once(
            source in prop::collection::vec((0..500_u64, 0..40_u64), 0..6),
            destination in prop::collection::vec((0..500_u64, 0..40_u64), 0..6),
            skip in 0..120_u64,
        ) {
            let pairs: Vec<(u64, u64)> = Pieces::new(&source, skip, &destination, 8)
                .flat_map(|piece| (0..piece.len).map(move |n| (piece.from + n, piece.to + n)))
                .collect();
            let skip = usize::try_from(skip).unwrap_or(usize::MAX);
            let expected: Vec<(u64, u64)> =
                bytes(&source).into_iter().skip(skip).zip(bytes(&destination)).collect();
            prop_assert_eq!(pairs, expected);
        }
    }
}
