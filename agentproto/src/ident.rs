//! Names that travel in the protocol: agents, sessions, LUNs and keys.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A text that is not the identity it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentError {
    /// A LUN identity is `naa.` and 32 hexadecimal digits (page 0x83, NAA IEEE Registered Extended).
    #[error("{0:?} is not a LUN identity: expected `naa.` and 32 hexadecimal digits")]
    Lun(String),
    /// A fingerprint is 64 hexadecimal digits.
    #[error("{0:?} is not a fingerprint: expected 64 hexadecimal digits")]
    Fingerprint(String),
    /// Agents and sessions are UUIDs.
    #[error("{0:?} is not a UUID")]
    Uuid(String),
}

macro_rules! uuid_name {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The name that has these 16 random bytes (made a version 4 UUID).
            #[must_use]
            pub fn from_random(bytes: [u8; 16]) -> Self {
                Self(*uuid::Builder::from_random_bytes(bytes).as_uuid().as_bytes())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&Uuid::from_bytes(self.0), f)
            }
        }

        impl FromStr for $name {
            type Err = IdentError;

            fn from_str(text: &str) -> Result<Self, IdentError> {
                let uuid = Uuid::parse_str(text).map_err(|_| IdentError::Uuid(text.to_owned()))?;
                Ok(Self(uuid.into_bytes()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdentError;

            fn try_from(text: String) -> Result<Self, IdentError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.to_string()
            }
        }
    };
}

uuid_name!(
    /// An agent installation, made once when it is installed. Targets know agents by this, never by address.
    AgentId
);
uuid_name!(
    /// One snapshot as the agents see it, from Prepare to Complete. The key of every idempotent repeat.
    SessionId
);

uuid_name!(
    /// A VSS snapshot set, as the coordinator numbers it (MS docs: `VSS_ID` of `StartSnapshotSet`).
    SetId
);
uuid_name!(
    /// One shadow copy of a set (MS docs: `VSS_ID` of `AddToSnapshotSet`).
    ShadowId
);

/// A LUN's primary key: the 16-byte NAA designator of INQUIRY page 0x83 (SPC-4 §7.8.6.6). Survives a revert; a clone
/// or a mounted snapshot has another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LunId(pub [u8; 16]);

impl fmt::Display for LunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("naa.")?;
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for LunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for LunId {
    type Err = IdentError;

    fn from_str(text: &str) -> Result<Self, IdentError> {
        let digits = text
            .strip_prefix("naa.")
            .or_else(|| text.strip_prefix("0x"))
            .unwrap_or(text);
        parse_hex(digits)
            .map(Self)
            .ok_or_else(|| IdentError::Lun(text.to_owned()))
    }
}

impl TryFrom<String> for LunId {
    type Error = IdentError;

    fn try_from(text: String) -> Result<Self, IdentError> {
        text.parse()
    }
}

impl From<LunId> for String {
    fn from(lun: LunId) -> Self {
        lun.to_string()
    }
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo (RFC 7469 §2.4): what each end pins of the other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a DER-encoded SubjectPublicKeyInfo.
    #[must_use]
    pub fn of_spki(der: &[u8]) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, der);
        let mut bytes = [0; 32];
        // SHA-256 yields 32 bytes; zip never reads past either side.
        bytes
            .iter_mut()
            .zip(digest.as_ref())
            .for_each(|(to, from)| *to = *from);
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = IdentError;

    fn from_str(text: &str) -> Result<Self, IdentError> {
        parse_hex(text)
            .map(Self)
            .ok_or_else(|| IdentError::Fingerprint(text.to_owned()))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = IdentError;

    fn try_from(text: String) -> Result<Self, IdentError> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let bytes = data_encoding::HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lun_identities_read_what_they_write() {
        let lun = LunId([0x60, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        assert_eq!(
            lun.to_string(),
            "naa.600203040506070809".to_owned() + "0a0b0c0d0e0f10"
        );
        assert_eq!(lun.to_string().parse(), Ok(lun));
        assert_eq!(
            "naa.600203040506070".parse::<LunId>(),
            Err(IdentError::Lun("naa.600203040506070".into()))
        );
        assert!("naa.zz0203040506070809".parse::<LunId>().is_err());
    }

    #[test]
    fn random_names_are_version_4_uuids() {
        let id = AgentId::from_random([0xff; 16]);
        assert_eq!(id.to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    /// `printf '' | openssl dgst -sha256`
    #[test]
    fn fingerprint_is_sha256() {
        let text = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Fingerprint::of_spki(b"").to_string(), text);
        assert_eq!(text.parse(), Ok(Fingerprint::of_spki(b"")));
    }
}
