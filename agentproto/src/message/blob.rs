//! Documents too large for one frame, in pieces: Blob and FetchBlob (18, 19).
//!
//! The target fetches what an agent has (`FetchBlob`), and hands over what an agent needs (`Blob`). Both go by offset, so that a
//! connection that was lost in the middle costs one piece.

use super::tags;
use crate::ident::SessionId;
use crate::wire::{BodyError, EncodeError, Value, Writer, record, wire_enum};

/// Bytes of one document, at most.
pub const MAX_BLOB: u32 = 4 * 1024 * 1024;
/// Bytes of one piece, at most: half of the largest body.
pub const MAX_PIECE: usize = 128 * 1024;

wire_enum!(
    /// Which document.
    BlobKind {
        /// The VSS backup-components document (MS docs: `IVssBackupComponents::SaveAsXML`): a component restore needs it.
        BackupComponents = 1 "backup-components",
        /// The writers' metadata documents of the same backup, one after another.
        WriterMetadata = 2 "writer-metadata",
        /// The VMs of a snapshot (JSON, `PROTOCOL.md` §11).
        VmManifest = 3 "vm-manifest",
        /// What a revert has to bring back (JSON, `PROTOCOL.md` §11).
        RevertManifest = 4 "revert-manifest",
    }
);

/// Raw bytes of a document.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Piece(pub Vec<u8>);

impl Value for Piece {
    fn read(bytes: &[u8], _depth_left: u8) -> Result<Self, BodyError> {
        if bytes.len() > MAX_PIECE {
            return Err(BodyError::PieceTooLong);
        }
        Ok(Self(bytes.to_vec()))
    }

    fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
        if self.0.len() > MAX_PIECE {
            return Err(EncodeError::PieceTooLong(self.0.len()));
        }
        out.raw(&self.0);
        Ok(())
    }
}

record!(
    /// A document that an agent has for the target, named before it is fetched.
    Document {
        /// Which.
        kind: BlobKind = required tags::BLOB_KIND,
        /// Its length in bytes, at most [`MAX_BLOB`].
        total_bytes: u32 = required tags::TOTAL_BYTES,
        /// SHA-256 of the whole.
        sha256: [u8; 32] = required tags::SHA256,
    }
);

record!(
    /// A piece of a document: the target's request to keep it, and the answer to [`FetchBlob`].
    Blob {
        /// The session that it belongs to.
        session: SessionId = required tags::SESSION,
        /// Which document.
        kind: BlobKind = required tags::BLOB_KIND,
        /// Where the piece goes, in bytes.
        offset_bytes: u32 = required tags::OFFSET_BYTES,
        /// Length of the whole in bytes, at most [`MAX_BLOB`].
        total_bytes: u32 = required tags::TOTAL_BYTES,
        /// The piece; empty only when the document is.
        bytes: Piece = required tags::BYTES,
    }
);

record!(
    /// Kept: a piece that came before may come again.
    BlobOk {
        /// How many bytes of the document are there now, from its start.
        received_bytes: u32 = required tags::OFFSET_BYTES,
    }
);

record!(
    /// Target to agent: the piece of a document that begins at an offset.
    FetchBlob {
        /// The session that it belongs to.
        session: SessionId = required tags::SESSION,
        /// Which document.
        kind: BlobKind = required tags::BLOB_KIND,
        /// From where, in bytes.
        offset_bytes: u32 = required tags::OFFSET_BYTES,
    }
);

/// Puts a document together from its pieces. It never holds more than [`MAX_BLOB`].
#[derive(Debug)]
pub struct Gather {
    session: SessionId,
    kind: BlobKind,
    total_bytes: Option<u32>,
    bytes: Vec<u8>,
}

/// A piece that does not continue the document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GatherError {
    /// Of another session or kind.
    #[error("a piece of another document")]
    Other,
    /// Longer than a document can be.
    #[error("a document of {0} bytes: {MAX_BLOB} are allowed")]
    TooLong(u32),
    /// The length changed under way.
    #[error("the document has {now} bytes, and had {before}")]
    TotalChanged {
        /// Said first.
        before: u32,
        /// Said now.
        now: u32,
    },
    /// Bytes are missing before it.
    #[error("a piece at {got}, where {expected} is next")]
    Gap {
        /// The next offset in bytes.
        expected: u32,
        /// The offset that came.
        got: u32,
    },
    /// The piece runs past the end, or has nothing in it.
    #[error("a piece of {0} bytes does not fit the document")]
    Length(usize),
}

impl Gather {
    /// Nothing is there yet.
    #[must_use]
    pub fn new(session: SessionId, kind: BlobKind) -> Self {
        Self {
            session,
            kind,
            total_bytes: None,
            bytes: Vec::new(),
        }
    }

    /// Takes a piece; a piece that is there already is taken again (a repeat after a lost answer).
    ///
    /// # Errors
    /// It does not continue the document; what was there stays.
    pub fn take(&mut self, piece: &Blob) -> Result<(), GatherError> {
        if piece.session != self.session || piece.kind != self.kind {
            return Err(GatherError::Other);
        }
        if piece.total_bytes > MAX_BLOB {
            return Err(GatherError::TooLong(piece.total_bytes));
        }
        if let Some(before) = self.total_bytes.filter(|total| *total != piece.total_bytes) {
            let now = piece.total_bytes;
            return Err(GatherError::TotalChanged { before, now });
        }
        let expected = self.next_offset();
        let at = piece.offset_bytes;
        if at > expected {
            return Err(GatherError::Gap { expected, got: at });
        }
        let len = piece.bytes.0.len();
        let end = u32::try_from(len).ok().and_then(|len| at.checked_add(len));
        let empty = len == 0 && piece.total_bytes != 0;
        let Some(end) = end.filter(|end| *end <= piece.total_bytes && !empty) else {
            return Err(GatherError::Length(len));
        };
        self.total_bytes = Some(piece.total_bytes);
        if end > expected {
            let known = usize::try_from(expected - at).unwrap_or(usize::MAX);
            self.bytes
                .extend_from_slice(piece.bytes.0.get(known..).unwrap_or_default());
        }
        Ok(())
    }

    /// Where the next piece begins, in bytes.
    #[must_use]
    pub fn next_offset(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }

    /// The whole document, once it is there.
    #[must_use]
    pub fn whole(&self) -> Option<&[u8]> {
        (self.total_bytes == Some(self.next_offset())).then_some(self.bytes.as_slice())
    }
}

/// The piece of a document that begins at an offset; nothing beyond its end.
#[must_use]
pub fn piece_of(document: &[u8], session: SessionId, kind: BlobKind, offset_bytes: u32) -> Option<Blob> {
    let total_bytes = u32::try_from(document.len())
        .ok()
        .filter(|total| *total <= MAX_BLOB)?;
    let rest = document.get(usize::try_from(offset_bytes).ok()?..)?;
    if rest.is_empty() && total_bytes != 0 {
        return None;
    }
    let bytes = Piece(rest.get(..MAX_PIECE).unwrap_or(rest).to_vec());
    Some(Blob {
        session,
        kind,
        offset_bytes,
        total_bytes,
        bytes,
    })
}

#[cfg(test)]
impl super::sample::Sample for Piece {
    fn sample(dice: &mut super::sample::Dice) -> Self {
        Self(super::sample::Sample::sample(dice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId([3; 16]);
    const KIND: BlobKind = BlobKind::RevertManifest;

    fn gathered(document: &[u8]) -> Vec<u8> {
        let mut gather = Gather::new(SESSION, KIND);
        while gather.whole().is_none() {
            let piece = piece_of(document, SESSION, KIND, gather.next_offset()).unwrap();
            gather.take(&piece).unwrap();
            // A repeat after a lost answer changes nothing.
            gather.take(&piece).unwrap();
        }
        gather.whole().unwrap().to_vec()
    }

    #[test]
    fn documents_of_every_size_come_whole() {
        for len in [0, 1, MAX_PIECE - 1, MAX_PIECE, MAX_PIECE + 1, 3 * MAX_PIECE] {
            let document: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
            assert_eq!(gathered(&document), document, "{len} bytes");
        }
        let too_long = vec![0; usize::try_from(MAX_BLOB).unwrap() + 1];
        assert_eq!(piece_of(&too_long, SESSION, KIND, 0), None);
        assert_eq!(piece_of(b"abc", SESSION, KIND, 3), None);
        assert_eq!(piece_of(b"abc", SESSION, KIND, 4), None);
    }

    #[test]
    fn pieces_that_do_not_fit_are_refused_and_change_nothing() {
        let piece = |offset_bytes, total_bytes, len| Blob {
            session: SESSION,
            kind: KIND,
            offset_bytes,
            total_bytes,
            bytes: Piece(vec![7; len]),
        };
        let mut gather = Gather::new(SESSION, KIND);
        gather.take(&piece(0, 10, 4)).unwrap();
        let mut of_another = piece(4, 10, 6);
        of_another.kind = BlobKind::VmManifest;
        let refused = [
            (of_another, GatherError::Other),
            (piece(4, MAX_BLOB + 1, 6), GatherError::TooLong(MAX_BLOB + 1)),
            (piece(4, 11, 6), GatherError::TotalChanged { before: 10, now: 11 }),
            (piece(5, 10, 5), GatherError::Gap { expected: 4, got: 5 }),
            (piece(4, 10, 7), GatherError::Length(7)),
            (piece(4, 10, 0), GatherError::Length(0)),
            (
                piece(u32::MAX, 10, 1),
                GatherError::Gap {
                    expected: 4,
                    got: u32::MAX,
                },
            ),
        ];
        for (piece, error) in refused {
            assert_eq!(gather.take(&piece), Err(error));
            assert_eq!(gather.next_offset(), 4);
        }
        assert_eq!(gather.whole(), None);
        // Overlapping what is there: only the new part counts.
        gather.take(&piece(2, 10, 8)).unwrap();
        assert_eq!(gather.whole(), Some(&[7; 10][..]));
    }
}
