//! Fields: `tag u16 | length u32 | value`, big-endian, and records made of them (specification §3).
//!
//! Framing arithmetic only: what a tag means is in `message`. Everything here is total (no panic, no unbounded
//! allocation) and both directions keep the same limits, so that whatever one end writes the other end reads.

mod value;

use std::marker::PhantomData;

use nom::multi::length_data;
use nom::number::complete::{be_u16, be_u32};
use nom::{IResult, Parser};

pub(crate) use value::{Record, Value, record, wire_enum};

use crate::error::{ErrorCode, Refusal};
use crate::message::MAX_PIECE;

/// Fields of one body or record, at most.
pub(crate) const MAX_FIELDS: usize = 1024;
/// Bytes of one string, at most.
pub(crate) const MAX_STRING: usize = 1024;
/// Elements of one list, at most.
pub(crate) const MAX_LIST: usize = 256;
/// Records inside records inside a body: two levels.
pub(crate) const MAX_DEPTH: u8 = 2;
/// Bit 15 of a tag: a receiver that does not know the tag must refuse the message.
const CRITICAL: u16 = 0x8000;

/// A body that does not follow the rules. The frame around it was whole, so the connection can go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// A field's length runs beyond its body or record.
    #[error("a field is cut off")]
    Truncated,
    /// More than 1,024 fields in one body or record.
    #[error("more than {MAX_FIELDS} fields")]
    TooManyFields,
    /// More than 256 elements in one list.
    #[error("more than {MAX_LIST} elements of field {tag:#06x}")]
    ListTooLong {
        /// The list's tag.
        tag: u16,
    },
    /// More than 1,024 bytes in one string.
    #[error("a string longer than {MAX_STRING} bytes")]
    StringTooLong,
    /// More bytes of a document than one frame may carry.
    #[error("a piece longer than {MAX_PIECE} bytes")]
    PieceTooLong,
    /// Records nested deeper than two levels.
    #[error("records nested deeper than {MAX_DEPTH}")]
    TooDeep,
    /// A string that is not UTF-8.
    #[error("a string is not UTF-8")]
    NotUtf8,
    /// A value whose length does not fit its type.
    #[error("a value of {got} bytes where {expected} are expected")]
    Length {
        /// Bytes that the type has.
        expected: usize,
        /// Bytes that came.
        got: usize,
    },
    /// A number outside its table.
    #[error("{value} is no {what}")]
    OutOfTable {
        /// The table.
        what: &'static str,
        /// The number that came.
        value: u8,
    },
    /// A field that the message must have is missing.
    #[error("field {tag:#06x} is missing")]
    Missing {
        /// Its tag.
        tag: u16,
    },
    /// A field that may come once came again.
    #[error("field {tag:#06x} comes twice")]
    Repeated {
        /// Its tag.
        tag: u16,
    },
    /// A critical field that this version does not know.
    #[error("field {tag:#06x} is critical and not known here")]
    UnknownField {
        /// Its tag.
        tag: u16,
    },
    /// A message type that this version does not know, in this direction.
    #[error("message type {0} is not known here")]
    UnknownMessage(u16),
}

impl From<BodyError> for Refusal {
    fn from(error: BodyError) -> Self {
        let code = match error {
            BodyError::UnknownField { .. } => ErrorCode::UnknownField,
            BodyError::UnknownMessage(_) => ErrorCode::UnknownMessage,
            BodyError::TooManyFields
            | BodyError::ListTooLong { .. }
            | BodyError::StringTooLong
            | BodyError::PieceTooLong => ErrorCode::TooLarge,
            _ => ErrorCode::Malformed,
        };
        Self::new(code, error.to_string())
    }
}

/// Something that cannot be sent within the limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A list that the peer would refuse.
    #[error("a list of {0} elements: {MAX_LIST} can be sent")]
    ListTooLong(usize),
    /// More bytes of a document than the peer would take at once.
    #[error("a piece of {0} bytes: {MAX_PIECE} can be sent")]
    PieceTooLong(usize),
    /// A body that the peer would refuse.
    #[error("a body of {0} bytes: too large to send")]
    BodyTooLong(usize),
}

/// A tag together with the type of its value.
pub(crate) struct Tag<T> {
    number: u16,
    value: PhantomData<fn() -> T>,
}

impl<T> Tag<T> {
    /// A tag that a receiver may skip.
    pub(crate) const fn plain(number: u16) -> Self {
        Self {
            number,
            value: PhantomData,
        }
    }

    /// A tag that a receiver must know.
    pub(crate) const fn critical(number: u16) -> Self {
        Self {
            number: number | CRITICAL,
            value: PhantomData,
        }
    }
}

/// The fields of one body or record, before anybody asked for them.
pub(crate) struct Fields<'a> {
    entries: Vec<Entry<'a>>,
    /// How many more levels of records may follow below this one.
    depth_left: u8,
}

struct Entry<'a> {
    tag: u16,
    value: &'a [u8],
    taken: bool,
}

impl<'a> Fields<'a> {
    /// Cuts a body into fields.
    pub(crate) fn of_body(body: &'a [u8]) -> Result<Self, BodyError> {
        Self::parse(body, MAX_DEPTH)
    }

    fn parse(mut rest: &'a [u8], depth_left: u8) -> Result<Self, BodyError> {
        let mut entries = Vec::new();
        while !rest.is_empty() {
            if entries.len() == MAX_FIELDS {
                return Err(BodyError::TooManyFields);
            }
            let (after, (tag, value)) = field(rest).map_err(|_| BodyError::Truncated)?;
            entries.push(Entry {
                tag,
                value,
                taken: false,
            });
            rest = after;
        }
        Ok(Self { entries, depth_left })
    }

    /// The one value of a tag.
    pub(crate) fn required<T: Value>(&mut self, tag: Tag<T>) -> Result<T, BodyError> {
        let number = tag.number;
        self.optional(tag)?.ok_or(BodyError::Missing { tag: number })
    }

    /// The one value of a tag, if it is there.
    pub(crate) fn optional<T: Value>(&mut self, tag: Tag<T>) -> Result<Option<T>, BodyError> {
        let mut found = None;
        for entry in self
            .entries
            .iter_mut()
            .filter(|entry| same_tag(entry.tag, tag.number))
        {
            if found.is_some() {
                return Err(BodyError::Repeated { tag: tag.number });
            }
            entry.taken = true;
            found = Some(T::read(entry.value, self.depth_left)?);
        }
        Ok(found)
    }

    /// Every value of a tag, in order.
    pub(crate) fn list<T: Value>(&mut self, tag: Tag<T>) -> Result<Vec<T>, BodyError> {
        let mut list = Vec::new();
        for entry in self
            .entries
            .iter_mut()
            .filter(|entry| same_tag(entry.tag, tag.number))
        {
            if list.len() == MAX_LIST {
                return Err(BodyError::ListTooLong { tag: tag.number });
            }
            entry.taken = true;
            list.push(T::read(entry.value, self.depth_left)?);
        }
        Ok(list)
    }

    /// Ends the reading: what nobody asked for must not be critical.
    pub(crate) fn finish(self) -> Result<(), BodyError> {
        match self
            .entries
            .iter()
            .find(|entry| !entry.taken && entry.tag & CRITICAL != 0)
        {
            Some(entry) => Err(BodyError::UnknownField { tag: entry.tag }),
            None => Ok(()),
        }
    }
}

/// The critical bit is advice to those who do not know the tag, no part of its number.
fn same_tag(a: u16, b: u16) -> bool {
    a & !CRITICAL == b & !CRITICAL
}

fn field(i: &[u8]) -> IResult<&[u8], (u16, &[u8])> {
    (be_u16, length_data(be_u32)).parse(i)
}

/// Writes fields.
#[derive(Default)]
pub(crate) struct Writer {
    out: Vec<u8>,
}

impl Writer {
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.out
    }

    pub(crate) fn required<T: Value>(&mut self, tag: Tag<T>, value: &T) -> Result<(), EncodeError> {
        self.out.extend_from_slice(&tag.number.to_be_bytes());
        let at = self.out.len();
        self.out.extend_from_slice(&[0; 4]);
        value.write(self)?;
        let len = self.out.len() - at - 4;
        let len = u32::try_from(len).map_err(|_| EncodeError::BodyTooLong(len))?;
        self.out
            .iter_mut()
            .skip(at)
            .zip(len.to_be_bytes())
            .for_each(|(to, from)| *to = from);
        Ok(())
    }

    pub(crate) fn optional<T: Value>(&mut self, tag: Tag<T>, value: &Option<T>) -> Result<(), EncodeError> {
        value.as_ref().map_or(Ok(()), |value| self.required(tag, value))
    }

    pub(crate) fn list<T: Value>(&mut self, tag: Tag<T>, values: &[T]) -> Result<(), EncodeError> {
        if values.len() > MAX_LIST {
            return Err(EncodeError::ListTooLong(values.len()));
        }
        let Tag { number, value } = tag;
        values
            .iter()
            .try_for_each(|one| self.required(Tag { number, value }, one))
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBER: Tag<u32> = Tag::plain(7);
    const NAME: Tag<String> = Tag::critical(8);

    fn body(fields: &[(u16, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (tag, value) in fields {
            out.extend_from_slice(&tag.to_be_bytes());
            out.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
            out.extend_from_slice(value);
        }
        out
    }

    #[test]
    fn unknown_plain_fields_are_skipped_and_critical_ones_refused() {
        let bytes = body(&[(7, &[0, 0, 0, 1]), (99, b"?")]);
        let mut fields = Fields::of_body(&bytes).unwrap();
        assert_eq!(fields.required(NUMBER), Ok(1));
        assert_eq!(fields.finish(), Ok(()));
        let bytes = body(&[(0x8063, b"?")]);
        assert_eq!(
            Fields::of_body(&bytes).unwrap().finish(),
            Err(BodyError::UnknownField { tag: 0x8063 })
        );
    }

    #[test]
    fn limits_of_a_body_are_kept() {
        let many = body(&vec![(7u16, &[0u8, 0, 0, 1][..]); MAX_FIELDS + 1]);
        assert_eq!(Fields::of_body(&many).err(), Some(BodyError::TooManyFields));
        let list = body(&vec![(7u16, &[0u8, 0, 0, 1][..]); MAX_LIST + 1]);
        let mut fields = Fields::of_body(&list).unwrap();
        assert_eq!(fields.list(NUMBER), Err(BodyError::ListTooLong { tag: 7 }));
        let long = body(&[(0x8008, &[b'a'; MAX_STRING + 1])]);
        assert_eq!(
            Fields::of_body(&long).unwrap().required(NAME),
            Err(BodyError::StringTooLong)
        );
        let twice = body(&[(7, &[0, 0, 0, 1]), (7, &[0, 0, 0, 2])]);
        assert_eq!(
            Fields::of_body(&twice).unwrap().required(NUMBER),
            Err(BodyError::Repeated { tag: 7 })
        );
        assert_eq!(
            Fields::of_body(&[0, 7, 0, 0, 0, 9, 1]).err(),
            Some(BodyError::Truncated)
        );
        let utf8 = body(&[(8, &[0xff])]);
        assert_eq!(
            Fields::of_body(&utf8).unwrap().required(NAME),
            Err(BodyError::NotUtf8)
        );
    }
}
