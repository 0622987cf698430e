//! One PDU ready to be sent: header, data, padding and digests, as slices for one `writev`.

use bytes::Bytes;

use crate::pdu::{BHS_LEN, Bhs};

const DIGEST_LEN: usize = 4;
const PAD_MAX: usize = 3;

/// Bytes of padding after a segment of `len` bytes (RFC 7143 §11.1).
pub(crate) fn padding(len: usize) -> usize {
    len.wrapping_neg() % 4
}

/// The digest words of a PDU (RFC 7143 §13.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Digests {
    pub(crate) header: bool,
    pub(crate) data: bool,
}

/// A PDU on its way out. The data is a slice of the owner's buffer: nothing was copied.
#[derive(Debug, Clone)]
pub struct Frame {
    head: [u8; BHS_LEN + DIGEST_LEN],
    head_len: usize,
    data: Bytes,
    tail: [u8; PAD_MAX + DIGEST_LEN],
    tail_len: usize,
}

impl Frame {
    /// Puts header and data together. DataSegmentLength is written here, so that it cannot differ from the data.
    pub(crate) fn new(mut bhs: Bhs, data: Bytes, digests: Digests) -> Self {
        let len = u32::try_from(data.len()).expect("segments are cut to at most 2^24 - 1 bytes");
        assert!(len < 1 << 24, "DataSegmentLength has 24 bits");
        let [_, high, mid, low] = len.to_be_bytes();
        if let Some(field) = bhs.get_mut(5..8) {
            field.copy_from_slice(&[high, mid, low]);
        }
        let mut frame = Self {
            head: [0; BHS_LEN + DIGEST_LEN],
            head_len: BHS_LEN,
            data,
            tail: [0; PAD_MAX + DIGEST_LEN],
            tail_len: 0,
        };
        if let Some(head) = frame.head.first_chunk_mut::<BHS_LEN>() {
            *head = bhs;
        }
        if digests.header
            && let Some(word) = frame.head.last_chunk_mut::<DIGEST_LEN>()
        {
            *word = crc32c::crc32c(&bhs).to_le_bytes();
            frame.head_len += DIGEST_LEN;
        }
        frame.close_data(digests.data);
        frame
    }

    fn close_data(&mut self, digest: bool) {
        if self.data.is_empty() {
            return;
        }
        let pad = padding(self.data.len());
        self.tail_len = pad;
        if digest {
            let crc = crc32c::crc32c_append(
                crc32c::crc32c(&self.data),
                self.tail.get(..pad).unwrap_or_default(),
            );
            if let Some(word) = self.tail.get_mut(pad..pad + DIGEST_LEN) {
                word.copy_from_slice(&crc.to_le_bytes());
            }
            self.tail_len += DIGEST_LEN;
        }
    }

    /// Header and header digest.
    #[must_use]
    pub fn head(&self) -> &[u8] {
        self.head.get(..self.head_len).unwrap_or_default()
    }

    /// The data segment, shared with the owner's buffer.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Padding and data digest.
    #[must_use]
    pub fn tail(&self) -> &[u8] {
        self.tail.get(..self.tail_len).unwrap_or_default()
    }

    /// The three pieces in order; the last two may be empty.
    #[must_use]
    pub fn chunks(&self) -> [&[u8]; 3] {
        [self.head(), &self.data, self.tail()]
    }

    /// Bytes on the wire.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a PDU is never empty")]
    pub fn len(&self) -> usize {
        self.head_len + self.data.len() + self.tail_len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_fills_words() {
        assert_eq!([0, 1, 2, 3, 4, 5].map(padding), [0, 3, 2, 1, 0, 3]);
    }

    /// CRC of 32 zero bytes, RFC 7143 appendix A.4, in wire order aa 36 91 8a.
    #[test]
    fn data_digest_matches_the_rfc() {
        let frame = Frame::new(
            [0; 48],
            Bytes::from_static(&[0; 32]),
            Digests {
                header: false,
                data: true,
            },
        );
        assert_eq!(frame.tail(), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(frame.len(), 48 + 32 + 4);
    }

    #[test]
    fn digests_cover_padding_and_no_data_means_no_digest() {
        let digests = Digests {
            header: true,
            data: true,
        };
        let frame = Frame::new([0; 48], Bytes::from_static(b"abcde"), digests);
        assert_eq!(frame.tail().len(), 7);
        assert_eq!(frame.tail()[..3], [0, 0, 0]);
        assert_eq!(frame.tail()[3..], crc32c::crc32c(b"abcde\0\0\0").to_le_bytes());
        assert_eq!(frame.head()[4..8], [0, 0, 0, 5]);
        assert_eq!(Frame::new([0; 48], Bytes::new(), digests).tail(), [0u8; 0]);
    }
}
