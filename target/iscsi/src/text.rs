//! Text keys (RFC 7143 §6.1): reading pairs, numbers, binary values and lists; writing pairs.

use bytes::{Bytes, BytesMut};
use data_encoding::{BASE64_NOPAD, HEXLOWER, HEXLOWER_PERMISSIVE};

use crate::error::TextError;

/// The most text in one negotiation, over all its PDUs. The RFC asks for 8192 bytes at least, and for 64 KiB where
/// authentication needs it (§6.1).
pub(crate) const MAX_TEXT_LEN: usize = 65536;
/// The most keys in one negotiation; all keys of the RFC are fewer than forty.
pub(crate) const MAX_KEYS: usize = 128;
/// The longest key name (standard-label, §6.1).
const MAX_KEY_LEN: usize = 63;
/// The longest simple value (§6.1).
const MAX_VALUE_LEN: usize = 255;
/// The longest value of keys that carry lists or binary values: 1024 bytes in hexadecimal, and then some.
const MAX_LONG_VALUE_LEN: usize = 4096;

/// Answer for a key that we do not know.
pub(crate) const NOT_UNDERSTOOD: &str = "NotUnderstood";
/// Answer for a value that is not admissible.
pub(crate) const REJECT: &str = "Reject";
/// Answer for a key that has no meaning in this session.
pub(crate) const IRRELEVANT: &str = "Irrelevant";

/// One `key=value` pair.
pub(crate) type Pair<'a> = (&'a str, &'a str);

/// Reads the pairs of a complete text. Pairs end with NUL; empty ones (some initiators count their padding) are skipped.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Pair<'_>>, TextError> {
    let text = core::str::from_utf8(text).map_err(|_| TextError::NotUtf8)?;
    let mut pairs = Vec::new();
    for pair in text.split('\0').filter(|pair| !pair.is_empty()) {
        if pairs.len() == MAX_KEYS {
            return Err(TextError::TooManyKeys(MAX_KEYS));
        }
        let (key, value) = pair.split_once('=').ok_or(TextError::NoEquals)?;
        check_key(key)?;
        if value.len() > max_value_len(key) {
            return Err(TextError::ValueTooLong(key.to_owned()));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// A standard-label: starts with a capital letter, at most 63 characters of a small set (§6.1). The RFC's own keys
/// break the rule twice: `X#NodeArchitecture`, and `iSCSIProtocolLevel` with its small letter.
fn check_key(key: &str) -> Result<(), TextError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+' | '@' | '_' | '#');
    let starts_well = key.starts_with(|c: char| c.is_ascii_uppercase()) || key == "iSCSIProtocolLevel";
    if key.len() <= MAX_KEY_LEN && starts_well && key.chars().all(allowed) {
        Ok(())
    } else {
        Err(TextError::BadKey)
    }
}

fn max_value_len(key: &str) -> usize {
    if key.starts_with("CHAP_") || key.starts_with("X-") || key.starts_with("X#") || key == "AuthMethod" {
        MAX_LONG_VALUE_LEN
    } else {
        MAX_VALUE_LEN
    }
}

/// A numerical-value: decimal without leading zeros, or hexadecimal, below 2^64.
pub(crate) fn number(value: &str) -> Option<u64> {
    if let Some(digits) = hex_digits(value) {
        let all_hex = !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_hexdigit());
        return all_hex.then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    }
    let canonical = value == "0" || (!value.starts_with('0') && value.bytes().all(|c| c.is_ascii_digit()));
    (canonical && !value.is_empty())
        .then(|| value.parse().ok())
        .flatten()
}

/// A boolean-value.
pub(crate) fn boolean(value: &str) -> Option<bool> {
    match value {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

/// How we write a boolean-value.
pub(crate) fn yes_no(value: bool) -> &'static str {
    if value { "Yes" } else { "No" }
}

/// A binary-value: hexadecimal (an odd digit count has an implicit leading zero) or base64.
pub(crate) fn binary(value: &str) -> Option<Vec<u8>> {
    if let Some(digits) = hex_digits(value) {
        let even = if digits.len() % 2 == 1 {
            format!("0{digits}")
        } else {
            digits.to_owned()
        };
        return (!even.is_empty())
            .then(|| HEXLOWER_PERMISSIVE.decode(even.as_bytes()).ok())
            .flatten();
    }
    let digits = value.strip_prefix("0b").or_else(|| value.strip_prefix("0B"))?;
    let bare = digits.trim_end_matches('=');
    (!bare.is_empty() && digits.len() - bare.len() <= 2)
        .then(|| BASE64_NOPAD.decode(bare.as_bytes()).ok())
        .flatten()
}

/// How we write a binary-value.
pub(crate) fn hex(bytes: &[u8]) -> String {
    format!("0x{}", HEXLOWER.encode(bytes))
}

fn hex_digits(value: &str) -> Option<&str> {
    value.strip_prefix("0x").or_else(|| value.strip_prefix("0X"))
}

/// Collects the text of one negotiation over its PDUs, under a cap.
#[derive(Debug, Default)]
pub(crate) struct Collector(Vec<u8>);

impl Collector {
    pub(crate) fn push(&mut self, piece: &[u8]) -> Result<(), TextError> {
        if self.0.len() + piece.len() > MAX_TEXT_LEN {
            return Err(TextError::TooLong(MAX_TEXT_LEN));
        }
        self.0.extend_from_slice(piece);
        Ok(())
    }

    pub(crate) fn take(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.0)
    }
}

/// Text of ours, cut to what the peer can receive in one PDU.
#[derive(Debug, Default)]
pub(crate) struct Outgoing(BytesMut);

impl Outgoing {
    /// Appends a pair.
    pub(crate) fn pair(&mut self, key: &str, value: &str) {
        for piece in [key.as_bytes(), b"=", value.as_bytes(), b"\0"] {
            self.0.extend_from_slice(piece);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next piece of at most `max` bytes, and whether that was all. A pair may span pieces (§6.1).
    pub(crate) fn next_piece(&mut self, max: usize) -> (Bytes, bool) {
        let piece = self.0.split_to(self.0.len().min(max)).freeze();
        (piece, self.0.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs() {
        assert_eq!(
            parse(b"A=1\0B=x=y\0\0\0C=").unwrap(),
            [("A", "1"), ("B", "x=y"), ("C", "")]
        );
        assert_eq!(parse(b"").unwrap(), []);
        assert_eq!(parse(b"A\0"), Err(TextError::NoEquals));
        assert_eq!(parse(b"=1\0"), Err(TextError::BadKey));
        assert_eq!(parse(b"a=1\0"), Err(TextError::BadKey));
        assert_eq!(parse(b"A b=1\0"), Err(TextError::BadKey));
        assert_eq!(parse(b"A=\xff\0"), Err(TextError::NotUtf8));
        assert_eq!(
            parse("A=1\0".repeat(129).as_bytes()),
            Err(TextError::TooManyKeys(128))
        );
        let long = format!("{}=1\0", "K".repeat(64));
        assert_eq!(parse(long.as_bytes()), Err(TextError::BadKey));
        let long = format!("TargetName={}\0", "k".repeat(256));
        assert_eq!(
            parse(long.as_bytes()),
            Err(TextError::ValueTooLong("TargetName".to_owned()))
        );
        let long = format!("CHAP_R=0x{}\0", "k".repeat(2048));
        assert!(parse(long.as_bytes()).is_ok());
    }

    #[test]
    fn numbers() {
        for (text, value) in [
            ("0", Some(0)),
            ("262144", Some(262_144)),
            ("0x40000", Some(262_144)),
            ("0X0fF", Some(255)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("0x10000000000000000", None),
            ("007", None),
            ("", None),
            ("0x", None),
            ("+1", None),
            ("0x+1", None),
            ("-1", None),
            ("1 ", None),
            ("1~2", None),
        ] {
            assert_eq!(number(text), value, "{text:?}");
        }
    }

    #[test]
    fn binaries() {
        assert_eq!(binary("0xabC"), Some(vec![0x0a, 0xbc]));
        assert_eq!(binary("0bAQID"), Some(vec![1, 2, 3]));
        assert_eq!(binary("0BAQI="), Some(vec![1, 2]));
        assert_eq!(binary("0bAQI"), Some(vec![1, 2]));
        for bad in ["", "0x", "0b", "0b=", "0xzz", "17", "0bA", "0bAQID===="] {
            assert_eq!(binary(bad), None, "{bad:?}");
        }
        assert_eq!(hex(&[0, 0xff]), "0x00ff");
    }

    #[test]
    fn collector_has_a_cap() {
        let mut text = Collector::default();
        text.push(&vec![b'a'; MAX_TEXT_LEN]).unwrap();
        assert_eq!(text.push(b"a"), Err(TextError::TooLong(MAX_TEXT_LEN)));
        assert_eq!(text.take().len(), MAX_TEXT_LEN);
        text.push(b"a").unwrap();
    }

    #[test]
    fn outgoing_is_cut() {
        let mut out = Outgoing::default();
        out.pair("A", "12");
        assert_eq!(out.next_piece(3), (Bytes::from_static(b"A=1"), false));
        assert_eq!(out.next_piece(3), (Bytes::from_static(b"2\0"), true));
    }
}
