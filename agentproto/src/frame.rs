//! Frames: a 20-byte header and a body, cut out of a byte stream (specification §3).
//!
//! ```text
//!  0        4    5     6      8            12            16           20
//!  | "SPA1" | v  |flags| type | request id | body length | generation | body …
//! ```

use nom::bytes::complete::tag;
use nom::number::complete::{be_u8, be_u16, be_u32};
use nom::{IResult, Parser};

use crate::message::{
    BodyError, EncodeError, LOG_EVENT, LogEvent, Message, MessageType, Progress, Reply, Request, record_body,
    record_from_body, refusal_from_body,
};

/// Bytes of a header.
pub const HEADER_LEN: usize = 20;
/// Largest body before the peer is authenticated, in bytes.
pub const MAX_BODY_UNAUTHENTICATED: u32 = 4 * 1024;
/// Largest body of an authenticated peer, in bytes.
pub const MAX_BODY: u32 = 256 * 1024;
const MAGIC: &[u8] = b"SPA1";

const RESPONSE: u8 = 1;
const ERROR: u8 = 2;
const EVENT: u8 = 4;

/// A stream that is no SPA stream (any more): the connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are not `SPA1`.
    #[error("no SPA frame")]
    Magic,
    /// A version that was not agreed on.
    #[error("a frame of protocol version {0}")]
    Version(u8),
    /// A combination of flags that means nothing.
    #[error("flags {0:#04x} mean nothing")]
    Flags(u8),
    /// A body beyond what the connection allows now.
    #[error("a body of {len} bytes: {limit} are allowed here")]
    BodyTooLong {
        /// Bytes announced.
        len: u32,
        /// Bytes allowed.
        limit: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Request,
    Reply,
    Refused,
    Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    kind: Kind,
    message: MessageType,
    request_id: u32,
    body_len: u32,
    generation: u32,
}

/// One frame. The body of a whole frame may still be wrong; then `message` says how, and the connection goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Chosen by the requester; a reply repeats it.
    pub request_id: u32,
    /// The target's generation: the sender's own (target), or the highest seen of it (agent).
    pub generation: u32,
    /// The content.
    pub message: Message,
}

impl Frame {
    /// The bytes of the frame.
    ///
    /// # Errors
    /// A list or body that the peer would have to refuse.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let (flags, message, body) = match &self.message {
            Message::Request(request) => (0, request.message_type(), request.body()?),
            Message::Reply(reply) => (RESPONSE, reply.message_type(), reply.body()?),
            Message::Refused(message, refusal) => (RESPONSE | ERROR, *message, record_body(refusal)?),
            Message::Progress(message, progress) => (EVENT, *message, record_body(progress)?),
            Message::Log(event) => (EVENT, LOG_EVENT, record_body(event)?),
        };
        let len = u32::try_from(body.len()).ok().filter(|len| *len <= MAX_BODY);
        let len = len.ok_or(EncodeError::BodyTooLong(body.len()))?;
        let mut out = Vec::with_capacity(HEADER_LEN + body.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&[crate::VERSION, flags]);
        out.extend_from_slice(&message.0.to_be_bytes());
        for word in [self.request_id, len, self.generation] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(&body);
        Ok(out)
    }
}

/// What a frame turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A frame.
    Frame(Frame),
    /// A frame whose body does not follow the rules. A request gets the refusal; anything else is ignored.
    BadBody {
        /// Its request id.
        request_id: u32,
        /// Its type.
        message: MessageType,
        /// Whether it was a request.
        is_request: bool,
        /// What is wrong.
        error: BodyError,
    },
}

/// Cuts a byte stream into frames. Holds at most one frame and what came with the read that completed it.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    limit: u32,
}

impl Decoder {
    /// A decoder that allows bodies of `limit` bytes.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        Self {
            buffer: Vec::new(),
            limit,
        }
    }

    /// Allows bodies of `limit` bytes from the next frame on.
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// Takes bytes as they came.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether a frame has been started and is not complete.
    #[must_use]
    pub fn mid_frame(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// The stream is no SPA stream: drop the connection.
    pub fn next_frame(&mut self) -> Result<Option<Decoded>, FrameError> {
        let Some(header) = self.header()? else {
            return Ok(None);
        };
        let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
        let Some(body) = self
            .buffer
            .get(HEADER_LEN..)
            .and_then(|rest| rest.get(..body_len))
        else {
            return Ok(None);
        };
        let decoded = decode(header, body);
        self.buffer.drain(..HEADER_LEN + body_len);
        Ok(Some(decoded))
    }

    fn header(&self) -> Result<Option<Header>, FrameError> {
        // A wrong magic is told from its first byte on: whoever speaks HTTP here need not wait for the timeout.
        if !self.buffer.iter().zip(MAGIC).all(|(got, want)| got == want) {
            return Err(FrameError::Magic);
        }
        let Ok((_, raw)) = raw_header(&self.buffer) else {
            return Ok(None);
        };
        let RawHeader {
            version,
            flags,
            message,
            request_id,
            body_len,
            generation,
        } = raw;
        if version != crate::VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = match flags {
            0 => Kind::Request,
            RESPONSE => Kind::Reply,
            f if f == RESPONSE | ERROR => Kind::Refused,
            EVENT => Kind::Event,
            other => return Err(FrameError::Flags(other)),
        };
        if body_len > self.limit {
            return Err(FrameError::BodyTooLong {
                len: body_len,
                limit: self.limit,
            });
        }
        Ok(Some(Header {
            kind,
            message: MessageType(message),
            request_id,
            body_len,
            generation,
        }))
    }
}

/// A header as it stands on the wire.
struct RawHeader {
    version: u8,
    flags: u8,
    message: u16,
    request_id: u32,
    body_len: u32,
    generation: u32,
}

fn raw_header(i: &[u8]) -> IResult<&[u8], RawHeader> {
    let (i, (_magic, version, flags, message)) = (tag(MAGIC), be_u8, be_u8, be_u16).parse(i)?;
    let (i, (request_id, body_len, generation)) = (be_u32, be_u32, be_u32).parse(i)?;
    Ok((
        i,
        RawHeader {
            version,
            flags,
            message,
            request_id,
            body_len,
            generation,
        },
    ))
}

fn decode(header: Header, body: &[u8]) -> Decoded {
    let Header {
        kind,
        message,
        request_id,
        generation,
        ..
    } = header;
    let content = match kind {
        Kind::Request => Request::from_body(message, body).map(Message::Request),
        Kind::Reply => Reply::from_body(message, body).map(Message::Reply),
        Kind::Refused => refusal_from_body(body).map(|refusal| Message::Refused(message, refusal)),
        Kind::Event if message == LOG_EVENT => record_from_body::<LogEvent>(body).map(Message::Log),
        Kind::Event => {
            record_from_body::<Progress>(body).map(|progress| Message::Progress(message, progress))
        }
    };
    match content {
        Ok(message) => Decoded::Frame(Frame {
            request_id,
            generation,
            message,
        }),
        Err(error) => Decoded::BadBody {
            request_id,
            message,
            is_request: kind == Kind::Request,
            error,
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::sample::{Dice, Sample};
    use crate::{ErrorCode, Refusal};

    fn roll(seed: u64) -> Frame {
        let mut dice = Dice(seed);
        let message = match dice.below(5) {
            0 => Message::Request(Sample::sample(&mut dice)),
            1 => Message::Reply(Sample::sample(&mut dice)),
            2 => Message::Refused(MessageType(Sample::sample(&mut dice)), Sample::sample(&mut dice)),
            3 => Message::Progress(MessageType(12), Sample::sample(&mut dice)),
            _ => Message::Log(Sample::sample(&mut dice)),
        };
        Frame {
            request_id: Sample::sample(&mut dice),
            generation: Sample::sample(&mut dice),
            message,
        }
    }

    fn decode_all(bytes: &[u8]) -> Result<Vec<Decoded>, FrameError> {
        let mut decoder = Decoder::new(MAX_BODY);
        decoder.feed(bytes);
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn every_message_reads_back(seed: u64) {
            let frame = roll(seed);
            prop_assert_eq!(decode_all(&frame.encode().unwrap()), Ok(vec![Decoded::Frame(frame)]));
        }

        /// `Incomplete` only inside the declared length: every proper prefix waits, and the rest completes it.
        #[test]
        fn every_prefix_waits(seed: u64, cut in 0.0f64..1.0) {
            let frame = roll(seed);
            let bytes = frame.encode().unwrap();
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a place in a short buffer")]
            let cut = (bytes.len() as f64 * cut) as usize;
            let mut decoder = Decoder::new(MAX_BODY);
            decoder.feed(&bytes[..cut]);
            prop_assert_eq!(decoder.next_frame(), Ok(None));
            prop_assert_eq!(decoder.mid_frame(), cut > 0);
            decoder.feed(&bytes[cut..]);
            prop_assert_eq!(decoder.next_frame(), Ok(Some(Decoded::Frame(frame))));
            prop_assert!(!decoder.mid_frame());
        }

        /// A flipped bit is another frame, a bad body, an error or an unfinished frame; never a panic, and what still
        /// decodes can be sent again.
        #[test]
        fn any_bit_flip_is_survived(seed: u64, at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = roll(seed).encode().unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(frames) = decode_all(&bytes) {
                for decoded in frames {
                    if let Decoded::Frame(frame) = decoded {
                        prop_assert!(frame.encode().is_ok());
                    }
                }
            }
        }

        #[test]
        fn any_body_is_survived(message: u16, flags in prop::sample::select(vec![0u8, 1, 3, 4]), body: Vec<u8>) {
            let mut bytes = b"SPA1\x01".to_vec();
            bytes.push(flags);
            bytes.extend_from_slice(&message.to_be_bytes());
            bytes.extend_from_slice(&[0, 0, 0, 9]);
            bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&body);
            prop_assert_eq!(decode_all(&bytes).map(|frames| frames.len()), Ok(1));
        }
    }

    #[test]
    fn streams_that_are_not_ours_end_at_once() {
        assert_eq!(decode_all(b"GET / HTTP/1.1\r\n"), Err(FrameError::Magic));
        assert_eq!(decode_all(b"G"), Err(FrameError::Magic));
        let version = b"SPA1\x02\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0";
        assert_eq!(decode_all(version), Err(FrameError::Version(2)));
        let flags = b"SPA1\x01\x07\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0";
        assert_eq!(decode_all(flags), Err(FrameError::Flags(7)));
    }

    /// The length is refused from the header alone: nothing of such a body is ever buffered.
    #[test]
    fn a_long_body_is_refused_before_it_comes() {
        let mut decoder = Decoder::new(MAX_BODY_UNAUTHENTICATED);
        decoder.feed(b"SPA1\x01\0\0\x01\0\0\0\x01\0\0\x10\x01\0\0\0\0");
        assert_eq!(
            decoder.next_frame(),
            Err(FrameError::BodyTooLong {
                len: 4097,
                limit: 4096
            })
        );
    }

    #[test]
    fn unknown_types_and_fields_have_their_refusals() {
        let unknown = b"SPA1\x01\0\0\x16\0\0\0\x07\0\0\0\0\0\0\0\0";
        let frames = decode_all(unknown).unwrap();
        let [
            Decoded::BadBody {
                request_id: 7,
                message: MessageType(22),
                is_request: true,
                error,
            },
        ] = &frames[..]
        else {
            panic!("{frames:?}");
        };
        assert_eq!(Refusal::from(error.clone()).code, ErrorCode::UnknownMessage);
        let critical = b"SPA1\x01\0\0\x11\0\0\0\x07\0\0\0\x06\0\0\0\0\xff\xff\0\0\0\0";
        let frames = decode_all(critical).unwrap();
        let [Decoded::BadBody { error, .. }] = &frames[..] else {
            panic!("{frames:?}")
        };
        assert_eq!(Refusal::from(error.clone()).code, ErrorCode::UnknownField);
    }
}
