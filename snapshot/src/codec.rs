//! Bytes of keys and values: big-endian fields, and the CRC that binds a value to its key.

use crate::{Error, Result};

/// Appends fields.
#[derive(Default)]
pub(crate) struct Enc(Vec<u8>);

impl Enc {
    pub(crate) fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    pub(crate) fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_be_bytes());
    }
    pub(crate) fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_be_bytes());
    }
    pub(crate) fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_be_bytes());
    }
    pub(crate) fn i64(&mut self, v: i64) {
        self.0.extend_from_slice(&v.to_be_bytes());
    }
    pub(crate) fn raw(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }
    /// Length (16 bits) and bytes. Longer than 64 KiB is cut by no caller: the limits are far below.
    pub(crate) fn bytes(&mut self, v: &[u8]) {
        self.u16(u16::try_from(v.len()).expect("limits keep fields below 64 KiB"));
        self.raw(v);
    }
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Takes fields apart; every step checks the length.
pub(crate) struct Dec<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Dec<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    /// The error for a value that cannot be.
    pub(crate) fn bad(&self, why: &str) -> Error {
        Error::corrupt(self.what, why)
    }

    pub(crate) fn raw(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self
            .rest
            .split_at_checked(n)
            .ok_or_else(|| self.bad("too short"))?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.raw(N)?;
        bytes.try_into().map_err(|_| self.bad("too short"))
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        self.array::<1>().map(|[b]| b)
    }
    pub(crate) fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }
    pub(crate) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }
    pub(crate) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_be_bytes)
    }
    pub(crate) fn i64(&mut self) -> Result<i64> {
        self.array().map(i64::from_be_bytes)
    }
    pub(crate) fn bytes(&mut self) -> Result<Vec<u8>> {
        let n = self.u16()?;
        self.raw(usize::from(n)).map(<[u8]>::to_vec)
    }
    pub(crate) fn text(&mut self) -> Result<String> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes).map_err(|_| self.bad("not UTF-8"))
    }
    /// Bytes that have not been taken.
    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
    pub(crate) fn end(&self) -> Result<()> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.bad("too long"))
        }
    }
}

/// Appends a CRC-32C over key and payload: a value found under another key is as wrong as a flipped bit.
pub(crate) fn seal(key: &[u8], mut payload: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c_append(crc32c::crc32c(key), &payload);
    payload.extend_from_slice(&crc.to_be_bytes());
    payload
}

/// Checks and removes what [`seal`] appended.
pub(crate) fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8]> {
    let damaged = || Error::corrupt("metadata record", format!("key {}", hex(key)));
    let (payload, crc) = value.split_last_chunk::<4>().ok_or_else(damaged)?;
    let found = crc32c::crc32c_append(crc32c::crc32c(key), payload);
    if found == u32::from_be_bytes(*crc) {
        Ok(payload)
    } else {
        Err(damaged())
    }
}

/// A key for people: table letter, then hexadecimal.
pub(crate) fn hex(key: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for (i, b) in key.iter().enumerate() {
        match i {
            0 if b.is_ascii_graphic() => text.push(char::from(*b)),
            _ => write!(text, "{b:02x}").expect("a String takes all"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_belongs_to_its_key() {
        let v = seal(b"Mabc", vec![1, 2, 3]);
        assert_eq!(unseal(b"Mabc", &v).unwrap(), &[1, 2, 3]);
        assert!(unseal(b"Mabd", &v).is_err());
        assert!(unseal(b"Mabc", &v[1..]).is_err());
        assert!(unseal(b"Mabc", &[]).is_err());
    }
}
