//! Framing of what comes in: how many bytes to wait for, and where they go.
//!
//! Small PDUs arrive together in one staging buffer, many per read. The data of a larger one is read from the socket
//! straight into its own buffer; at most what the staging buffer already held of it is copied.

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::error::Error;
use crate::frame::{Digests, padding};
use crate::pdu::{BHS_LEN, Bhs, Opcode, Prefix};

/// Room for at least one header with the longest additional segments (255 words) and its digest, and for many small PDUs.
const STAGING_LEN: usize = 16 << 10;
/// From so many missing bytes on, data is read straight into its place.
const DIRECT_MIN: usize = 4 << 10;
const DIGEST_LEN: usize = 4;

/// A complete header.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) bhs: Bhs,
    pub(crate) ahs: Bytes,
    pub(crate) prefix: Prefix,
}

impl Head {
    /// "Complete Header of Bad PDU" (RFC 7143 §11.17.4).
    pub(crate) fn to_bytes(&self) -> Bytes {
        [self.bhs.as_slice(), &self.ahs].concat().into()
    }
}

/// Where a data segment goes.
#[derive(Debug)]
pub(crate) enum Sink {
    /// Into a buffer.
    Into(Buffer),
    /// Nowhere.
    Discard,
}

/// A whole PDU.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) head: Head,
    pub(crate) sink: Sink,
    pub(crate) digest_ok: bool,
}

#[derive(Debug)]
enum State {
    Header,
    Data {
        head: Head,
        sink: Sink,
        missing: usize,
        crc: u32,
    },
    Tail {
        head: Head,
        sink: Sink,
        crc: u32,
    },
}

/// The receiving half of a connection.
#[derive(Debug)]
pub(crate) struct Receiver {
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self {
            staging: vec![0; STAGING_LEN].into_boxed_slice(),
            start: 0,
            end: 0,
            state: State::Header,
        }
    }

    fn staged(&self) -> &[u8] {
        self.staging.get(self.start..self.end).unwrap_or_default()
    }

    /// Whether the next bytes go straight into a buffer.
    fn is_direct(&self) -> bool {
        match &self.state {
            State::Data {
                sink: Sink::Into(_),
                missing,
                ..
            } => self.start == self.end && *missing >= DIRECT_MIN,
            _ => false,
        }
    }

    /// Where the next bytes go: never empty.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        if self.is_direct()
            && let State::Data {
                sink: Sink::Into(buffer),
                missing,
                ..
            } = &mut self.state
        {
            return buffer.space(*missing);
        }
        // What is staged is shorter than one header or has been consumed: there is always room after it.
        self.staging.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        self.staging.get_mut(self.end..).unwrap_or_default()
    }

    /// `n` bytes are in the space.
    pub(crate) fn advance(&mut self, n: usize) {
        if self.is_direct()
            && let State::Data {
                sink: Sink::Into(buffer),
                missing,
                crc,
                ..
            } = &mut self.state
        {
            assert!(n <= *missing, "more bytes than there was space for");
            buffer.advance(n);
            *crc = crc32c::crc32c_append(*crc, buffer.newest(n));
            *missing -= n;
        } else {
            self.end += n;
            assert!(
                self.end <= self.staging.len(),
                "more bytes than there was space for"
            );
        }
    }

    /// Whether a header is due next.
    pub(crate) fn wants_header(&self) -> bool {
        matches!(self.state, State::Header)
    }

    /// The next header if all of it is here. [`Self::begin`] must follow.
    ///
    /// # Errors
    /// A header digest that does not match: nothing after it can be trusted (RFC 7143 §7.8).
    pub(crate) fn next_head(&mut self, digest: bool) -> Result<Option<Head>, Error> {
        let staged = self.staged();
        let Some(bhs) = staged.first_chunk::<BHS_LEN>() else {
            return Ok(None);
        };
        let prefix = Prefix::parse(bhs);
        if prefix.ahs_len > 0 && prefix.opcode != Opcode::SCSI_COMMAND {
            return Err(Error::UnexpectedAhs {
                opcode: prefix.opcode.0,
            });
        }
        let header_len = BHS_LEN + prefix.ahs_len;
        let total = header_len + if digest { DIGEST_LEN } else { 0 };
        let Some((header, word)) = staged
            .get(..total)
            .and_then(|whole| whole.split_at_checked(header_len))
        else {
            return Ok(None);
        };
        if let Ok(word) = <[u8; DIGEST_LEN]>::try_from(word) {
            let (got, computed) = (u32::from_le_bytes(word), crc32c::crc32c(header));
            if got != computed {
                return Err(Error::HeaderDigest { got, computed });
            }
        }
        let head = Head {
            bhs: *bhs,
            ahs: Bytes::copy_from_slice(header.get(BHS_LEN..).unwrap_or_default()),
            prefix,
        };
        self.start += total;
        Ok(Some(head))
    }

    /// Says where the data of the header goes.
    pub(crate) fn begin(&mut self, head: Head, sink: Sink) {
        let missing = head.prefix.data_len as usize;
        self.state = State::Data {
            head,
            sink,
            missing,
            crc: 0,
        };
    }

    /// Moves staged bytes on. The PDU, once all of it is here.
    pub(crate) fn finish(&mut self, digests: Digests) -> Option<Received> {
        self.move_data();
        let (data_len, crc) = match &self.state {
            State::Data {
                missing: 0,
                head,
                crc,
                ..
            } => (head.prefix.data_len as usize, *crc),
            State::Tail { head, crc, .. } => (head.prefix.data_len as usize, *crc),
            _ => return None,
        };
        let digest_len = if digests.data && data_len > 0 {
            DIGEST_LEN
        } else {
            0
        };
        let pad = padding(data_len);
        let Some((padding, word)) = self
            .staged()
            .get(..pad + digest_len)
            .and_then(|tail| tail.split_at_checked(pad))
        else {
            self.wait_for_tail();
            return None;
        };
        let digest_ok = <[u8; DIGEST_LEN]>::try_from(word).map_or(true, |word| {
            crc32c::crc32c_append(crc, padding) == u32::from_le_bytes(word)
        });
        self.start += pad + digest_len;
        match core::mem::replace(&mut self.state, State::Header) {
            State::Data { head, sink, .. } | State::Tail { head, sink, .. } => Some(Received {
                head,
                sink,
                digest_ok,
            }),
            State::Header => None,
        }
    }

    fn wait_for_tail(&mut self) {
        self.state = match core::mem::replace(&mut self.state, State::Header) {
            State::Data { head, sink, crc, .. } => State::Tail { head, sink, crc },
            other => other,
        };
    }

    fn move_data(&mut self) {
        let State::Data {
            sink, missing, crc, ..
        } = &mut self.state
        else {
            return;
        };
        let len = (self.end - self.start).min(*missing);
        let bytes = self.staging.get(self.start..self.start + len).unwrap_or_default();
        *crc = crc32c::crc32c_append(*crc, bytes);
        if let Sink::Into(buffer) = sink {
            buffer.extend(bytes);
        }
        *missing -= len;
        self.start += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Pool;

    fn feed(receiver: &mut Receiver, mut bytes: &[u8], step: usize) -> Vec<Received> {
        let mut all = Vec::new();
        let digests = Digests {
            header: true,
            data: true,
        };
        while !bytes.is_empty() {
            let space = receiver.space();
            assert!(!space.is_empty());
            let n = space.len().min(step).min(bytes.len());
            space[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            receiver.advance(n);
            loop {
                if receiver.wants_header() {
                    let Some(head) = receiver.next_head(true).unwrap() else {
                        break;
                    };
                    receiver.begin(head, Sink::Into(Buffer::new(0, &Pool::default())));
                }
                let Some(received) = receiver.finish(digests) else {
                    break;
                };
                all.push(received);
            }
        }
        all
    }

    fn wire(len: usize) -> Vec<u8> {
        let mut bhs = [0; BHS_LEN];
        bhs[0] = 5;
        let data: Vec<u8> = (0..=250).cycle().take(len).collect();
        let frame = crate::Frame::new(
            bhs,
            data.into(),
            Digests {
                header: true,
                data: true,
            },
        );
        frame.chunks().concat()
    }

    #[test]
    fn any_chunking_gives_the_same_pdus() {
        let lens = [0, 1, 4, 5000, 3, 70_000, 0, 16_000];
        let bytes: Vec<u8> = lens.iter().flat_map(|len| wire(*len)).collect();
        for step in [1, 7, 48, 52, 4096, 1 << 20] {
            let all = feed(&mut Receiver::new(), &bytes, step);
            assert_eq!(all.len(), lens.len());
            for (received, len) in all.iter().zip(lens) {
                assert!(received.digest_ok, "{len} in steps of {step}");
                let Sink::Into(buffer) = &received.sink else {
                    panic!("discarded")
                };
                assert_eq!(buffer.data().len(), len);
                assert!(buffer.data().iter().copied().eq((0..=250).cycle().take(len)));
            }
        }
    }

    #[test]
    fn digest_errors_are_seen() {
        let mut bytes = wire(5000);
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        assert!(!feed(&mut Receiver::new(), &bytes, 1000)[0].digest_ok);
        let mut bytes = wire(0);
        bytes[9] ^= 1;
        let mut receiver = Receiver::new();
        receiver.space()[..bytes.len()].copy_from_slice(&bytes);
        receiver.advance(bytes.len());
        assert!(matches!(
            receiver.next_head(true),
            Err(Error::HeaderDigest { .. })
        ));
    }
}
