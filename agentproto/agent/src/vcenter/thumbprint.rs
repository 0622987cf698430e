//! The SHA-256 of a certificate, as browsers and the vSphere client show it.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// SHA-256 of a certificate in DER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Thumbprint([u8; 32]);

impl Thumbprint {
    /// Of this certificate.
    pub(crate) fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

impl std::fmt::Display for Thumbprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes: Vec<String> = self.0.iter().map(|byte| format!("{byte:02X}")).collect();
        f.write_str(&bytes.join(":"))
    }
}

impl std::str::FromStr for Thumbprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits: String = text.chars().filter(|c| *c != ':').collect();
        let bytes = data_encoding::HEXUPPER_PERMISSIVE.decode(digits.as_bytes()).ok();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| {
            format!("{text:?} is no SHA-256 fingerprint: 32 bytes in hex, as the vSphere client or a browser shows it")
        })
    }
}

impl TryFrom<String> for Thumbprint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Thumbprint> for String {
    fn from(thumbprint: Thumbprint) -> Self {
        thumbprint.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_with_and_without_colons() {
        let one = Thumbprint::of(b"certificate");
        assert_eq!(one.to_string().parse(), Ok(one));
        assert_eq!(one.to_string().replace(':', "").to_lowercase().parse(), Ok(one));
        assert!("AA:BB".parse::<Thumbprint>().is_err());
    }
}
