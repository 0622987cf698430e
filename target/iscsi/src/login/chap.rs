//! CHAP, both directions (RFC 7143 §12.1.3, RFC 1994; algorithm numbers: IANA "PPP Authentication Algorithms").

use core::fmt;

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use sha3::Sha3_256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The longest challenge or response, in binary bytes (RFC 7143 §12.1.3).
pub(crate) const BINARY_MAX: usize = 1024;

/// A CHAP algorithm that we implement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChapAlgorithm {
    /// 5
    Md5,
    /// 6
    Sha1,
    /// 7
    Sha256,
    /// 8
    Sha3_256,
}

impl ChapAlgorithm {
    /// All of them, strongest first.
    pub const ALL: [Self; 4] = [Self::Sha3_256, Self::Sha256, Self::Sha1, Self::Md5];

    /// The number in CHAP_A.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Md5 => 5,
            Self::Sha1 => 6,
            Self::Sha256 => 7,
            Self::Sha3_256 => 8,
        }
    }

    /// The algorithm of a number, if we implement it.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|algorithm| u64::from(algorithm.number()) == number)
    }

    /// Bytes of our challenge: as many as the hash has, so that none is weaker than its algorithm.
    #[must_use]
    pub fn challenge_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 | Self::Sha3_256 => 32,
        }
    }

    /// Hash of identifier, secret and challenge (RFC 1994 §4.1).
    #[must_use]
    pub fn response(self, identifier: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
        fn hash<D: Digest>(identifier: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
            D::new()
                .chain_update([identifier])
                .chain_update(secret)
                .chain_update(challenge)
                .finalize()
                .to_vec()
        }
        match self {
            Self::Md5 => hash::<Md5>(identifier, secret, challenge),
            Self::Sha1 => hash::<Sha1>(identifier, secret, challenge),
            Self::Sha256 => hash::<Sha256>(identifier, secret, challenge),
            Self::Sha3_256 => hash::<Sha3_256>(identifier, secret, challenge),
        }
    }
}

/// A name and its secret. `Debug` shows the name only.
#[derive(Clone)]
pub(crate) struct Credential {
    pub(crate) user: String,
    pub(crate) secret: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// What a login must prove, and what we can prove to the initiator.
#[derive(Debug, Clone)]
pub struct ChapPolicy {
    pub(crate) initiator: Credential,
    pub(crate) target: Option<Credential>,
    pub(crate) algorithms: Vec<ChapAlgorithm>,
}

/// Secrets that would not protect anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChapPolicyError {
    /// A secret is empty.
    #[error("a CHAP secret is empty")]
    EmptySecret,
    /// One secret for both directions: each side could answer with the other's response (RFC 7143 §9.2.1).
    #[error("the mutual CHAP secret is the same as the initiator's")]
    SameSecret,
    /// No algorithm is allowed.
    #[error("no CHAP algorithm is allowed")]
    NoAlgorithm,
}

impl ChapPolicy {
    /// `user` and `secret` are the initiator's; `mutual` is ours, for initiators that ask.
    ///
    /// # Errors
    /// Empty or equal secrets, no algorithm.
    pub fn new(
        user: impl Into<String>,
        secret: impl Into<Vec<u8>>,
        mutual: Option<(String, Vec<u8>)>,
        algorithms: impl Into<Vec<ChapAlgorithm>>,
    ) -> Result<Self, ChapPolicyError> {
        let initiator = Credential {
            user: user.into(),
            secret: Zeroizing::new(secret.into()),
        };
        let target = mutual.map(|(user, secret)| Credential {
            user,
            secret: Zeroizing::new(secret),
        });
        let algorithms = algorithms.into();
        if initiator.secret.is_empty() || target.as_ref().is_some_and(|target| target.secret.is_empty()) {
            return Err(ChapPolicyError::EmptySecret);
        }
        if target
            .as_ref()
            .is_some_and(|target| bool::from(target.secret.ct_eq(&initiator.secret)))
        {
            return Err(ChapPolicyError::SameSecret);
        }
        if algorithms.is_empty() {
            return Err(ChapPolicyError::NoAlgorithm);
        }
        Ok(Self {
            initiator,
            target,
            algorithms,
        })
    }

    /// The first algorithm of the offer that we implement and this policy allows (RFC 7143 §6.2.1).
    pub(crate) fn choose(&self, offer: impl Iterator<Item = u64>) -> Option<ChapAlgorithm> {
        offer
            .filter_map(ChapAlgorithm::from_number)
            .find(|algorithm| self.algorithms.contains(algorithm))
    }
}

/// A challenge that we sent.
#[derive(Debug, Clone)]
pub(crate) struct Challenge {
    pub(crate) algorithm: ChapAlgorithm,
    pub(crate) identifier: u8,
    pub(crate) bytes: Vec<u8>,
}

impl Challenge {
    /// Whether `response` proves the secret. Takes as long for a near miss as for a far one.
    pub(crate) fn verify(&self, credential: &Credential, response: &[u8]) -> bool {
        let expected = self
            .algorithm
            .response(self.identifier, &credential.secret, &self.bytes);
        expected.ct_eq(response).into()
    }
}

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    /// Expected values computed with Python's hashlib over 01 "secret12secret" 000102..0f.
    #[test]
    fn responses_of_all_algorithms() {
        let challenge: Vec<u8> = (0..16).collect();
        let response =
            |algorithm: ChapAlgorithm| HEXLOWER.encode(&algorithm.response(1, b"secret12secret", &challenge));
        assert_eq!(response(ChapAlgorithm::Md5), "29f61be97be10b4aa63f1b9db780ad69");
        assert_eq!(
            response(ChapAlgorithm::Sha1),
            "0155a56a398cbb9822fb82250e9d129ae2603aee"
        );
        assert_eq!(
            response(ChapAlgorithm::Sha256),
            "c8a29fcca5e5132c734f1d3b3f4a42267918ceb70c232c06e9e93a5d5bd68012"
        );
        assert_eq!(
            response(ChapAlgorithm::Sha3_256),
            "39e1af4dfb9ba7a6ae8a108ad659f02eb8a12563aa225ef7404bb4f396b2977c"
        );
    }

    #[test]
    fn the_offers_order_decides_among_what_is_allowed() {
        let policy = |algorithms: &[ChapAlgorithm]| ChapPolicy::new("u", "s", None, algorithms).unwrap();
        let all = policy(&ChapAlgorithm::ALL);
        assert_eq!(
            all.choose([8, 7, 6, 5].into_iter()),
            Some(ChapAlgorithm::Sha3_256)
        );
        assert_eq!(all.choose([5, 7].into_iter()), Some(ChapAlgorithm::Md5));
        assert_eq!(all.choose([56, 128, 0].into_iter()), None);
        assert_eq!(
            policy(&[ChapAlgorithm::Sha256]).choose([5, 7].into_iter()),
            Some(ChapAlgorithm::Sha256)
        );
    }

    #[test]
    fn weak_policies_are_refused() {
        let mutual = |secret: &[u8]| Some(("t".to_owned(), secret.to_vec()));
        let new = |secret: &str, mutual, algorithms: &[ChapAlgorithm]| {
            ChapPolicy::new("u", secret, mutual, algorithms).map(|_| ())
        };
        assert_eq!(
            new("", None, &ChapAlgorithm::ALL),
            Err(ChapPolicyError::EmptySecret)
        );
        assert_eq!(
            new("a", mutual(b""), &ChapAlgorithm::ALL),
            Err(ChapPolicyError::EmptySecret)
        );
        assert_eq!(
            new("a", mutual(b"a"), &ChapAlgorithm::ALL),
            Err(ChapPolicyError::SameSecret)
        );
        assert_eq!(new("a", mutual(b"b"), &[]), Err(ChapPolicyError::NoAlgorithm));
        assert_eq!(new("a", mutual(b"b"), &ChapAlgorithm::ALL), Ok(()));
    }

    #[test]
    fn debug_shows_no_secret() {
        let policy = ChapPolicy::new("u", "hunter2hunter2", None, ChapAlgorithm::ALL).unwrap();
        assert!(!format!("{policy:?}").contains("hunter2"));
    }
}
