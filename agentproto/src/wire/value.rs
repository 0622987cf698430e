//! Values of fields, and the two tables-in-code (`record!`, `wire_enum!`) that messages are written with.

use super::{BodyError, EncodeError, Fields, MAX_STRING, Writer};
use crate::error::ErrorCode;
use crate::ident::{AgentId, Fingerprint, LunId, SessionId, SetId, ShadowId};

/// A type that a field can carry.
pub(crate) trait Value: Sized {
    fn read(bytes: &[u8], depth_left: u8) -> Result<Self, BodyError>;
    fn write(&self, out: &mut Writer) -> Result<(), EncodeError>;
}

/// A type made of fields: a message body, or a value that nests.
pub(crate) trait Record: Sized {
    fn read_fields(fields: &mut Fields<'_>) -> Result<Self, BodyError>;
    fn write_fields(&self, out: &mut Writer) -> Result<(), EncodeError>;

    /// A whole body.
    fn from_body(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of_body(body)?;
        let record = Self::read_fields(&mut fields)?;
        fields.finish()?;
        Ok(record)
    }

    /// One level down.
    fn read_nested(bytes: &[u8], depth_left: u8) -> Result<Self, BodyError> {
        let depth_left = depth_left.checked_sub(1).ok_or(BodyError::TooDeep)?;
        let mut fields = Fields::parse(bytes, depth_left)?;
        let record = Self::read_fields(&mut fields)?;
        fields.finish()?;
        Ok(record)
    }
}

fn exactly<const N: usize>(bytes: &[u8]) -> Result<[u8; N], BodyError> {
    bytes.try_into().map_err(|_| BodyError::Length {
        expected: N,
        got: bytes.len(),
    })
}

macro_rules! integers {
    ($($ty:ty),*) => {$(
        impl Value for $ty {
            fn read(bytes: &[u8], _depth_left: u8) -> Result<Self, BodyError> {
                exactly(bytes).map(Self::from_be_bytes)
            }

            fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
                out.raw(&self.to_be_bytes());
                Ok(())
            }
        }
    )*};
}
integers!(u8, u16, u32, u64);

macro_rules! byte_names {
    ($($ty:ident),*) => {$(
        impl Value for $ty {
            fn read(bytes: &[u8], _depth_left: u8) -> Result<Self, BodyError> {
                exactly(bytes).map(Self)
            }

            fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
                out.raw(&self.0);
                Ok(())
            }
        }
    )*};
}
byte_names!(AgentId, SessionId, SetId, ShadowId, LunId, Fingerprint);

impl<const N: usize> Value for [u8; N] {
    fn read(bytes: &[u8], _depth_left: u8) -> Result<Self, BodyError> {
        exactly(bytes)
    }

    fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
        out.raw(self);
        Ok(())
    }
}

impl Value for bool {
    fn read(bytes: &[u8], _depth_left: u8) -> Result<Self, BodyError> {
        match exactly::<1>(bytes)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [value] => Err(BodyError::OutOfTable {
                what: "boolean",
                value,
            }),
        }
    }

    fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
        out.raw(&[u8::from(*self)]);
        Ok(())
    }
}

impl Value for ErrorCode {
    fn read(bytes: &[u8], depth_left: u8) -> Result<Self, BodyError> {
        u16::read(bytes, depth_left).map(Self)
    }

    fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
        self.0.write(out)
    }
}

impl Value for String {
    fn read(bytes: &[u8], _depth_left: u8) -> Result<Self, BodyError> {
        if bytes.len() > MAX_STRING {
            return Err(BodyError::StringTooLong);
        }
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| BodyError::NotUtf8)
    }

    /// Longer texts are cut: they are for people (a hook's complaint), and the peer would refuse the whole message.
    fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
        let end = (0..=MAX_STRING.min(self.len()))
            .rev()
            .find(|&end| self.is_char_boundary(end))
            .unwrap_or(0);
        out.raw(self.get(..end).unwrap_or_default().as_bytes());
        Ok(())
    }
}

/// A struct whose fields are wire fields: `name: Type = required|optional|list TAG`.
macro_rules! record {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$field_meta:meta])* $field:ident: $ty:ty = $how:ident $tag:expr),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty),* }

        impl crate::wire::Record for $name {
            fn read_fields(_fields: &mut crate::wire::Fields<'_>) -> Result<Self, crate::wire::BodyError> {
                Ok(Self { $($field: _fields.$how($tag)?),* })
            }

            fn write_fields(&self, _out: &mut crate::wire::Writer) -> Result<(), crate::wire::EncodeError> {
                $(_out.$how($tag, &self.$field)?;)*
                Ok(())
            }
        }

        impl crate::wire::Value for $name {
            fn read(bytes: &[u8], depth_left: u8) -> Result<Self, crate::wire::BodyError> {
                <Self as crate::wire::Record>::read_nested(bytes, depth_left)
            }

            fn write(&self, out: &mut crate::wire::Writer) -> Result<(), crate::wire::EncodeError> {
                <Self as crate::wire::Record>::write_fields(self, out)
            }
        }

        #[cfg(test)]
        impl crate::message::sample::Sample for $name {
            fn sample(_dice: &mut crate::message::sample::Dice) -> Self {
                Self { $($field: crate::message::sample::Sample::sample(_dice)),* }
            }
        }
    };
}
pub(crate) use record;

/// An enum of one byte. A number outside the table is refused: these decide what happens, guessing would be wrong.
macro_rules! wire_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $number:literal $text:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name { $($(#[$variant_meta])* #[serde(rename = $text)] $variant),* }

        impl $name {
            /// As the command line and JSON spell it.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl crate::wire::Value for $name {
            fn read(bytes: &[u8], depth_left: u8) -> Result<Self, crate::wire::BodyError> {
                match <u8 as crate::wire::Value>::read(bytes, depth_left)? {
                    $($number => Ok(Self::$variant),)*
                    value => Err(crate::wire::BodyError::OutOfTable { what: stringify!($name), value }),
                }
            }

            fn write(&self, out: &mut crate::wire::Writer) -> Result<(), crate::wire::EncodeError> {
                let number: u8 = match self { $(Self::$variant => $number),* };
                number.write(out)
            }
        }

        #[cfg(test)]
        impl crate::message::sample::Sample for $name {
            fn sample(dice: &mut crate::message::sample::Dice) -> Self {
                let all = [$(Self::$variant),*];
                all[dice.below(all.len())]
            }
        }
    };
}
pub(crate) use wire_enum;
