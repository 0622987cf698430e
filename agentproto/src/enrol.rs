//! Enrolment: a one-time token lets two ends pin each other's keys (specification §2).
//!
//! ```text
//! token text = "SP1-" base32( secret (16 bytes) || first 16 bytes of SHA-256(target's SPKI) )
//! token id   = first 8 bytes of HMAC-SHA256(secret, "stillpoint-token-id")
//! mac        = HMAC-SHA256(secret, role || agent id (16 bytes) || exporter (32 bytes)),  role = "agent" | "target"
//! ```
//! The exporter binds the token to this TLS session: a man in the middle has another one, so relaying is useless.

use std::time::{Duration, Instant};

use ring::hmac;
use zeroize::Zeroizing;

use crate::error::{ErrorCode, Refusal};
use crate::ident::{AgentId, Fingerprint, LunId};

/// Label of the TLS exporter (RFC 8446 §7.5), without context.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-stillpoint-enrol-v1";
/// Bytes of keying material that the exporter yields.
pub const EXPORTER_LEN: usize = 32;
/// How long a token lives unless it is told otherwise.
pub const TOKEN_TTL_DEFAULT: Duration = Duration::from_secs(15 * 60);
/// Tokens waiting to be used, at most.
pub const MAX_TOKENS: usize = 64;
/// Wrong MACs for one token before it is burnt.
pub const MAX_FAILURES: u8 = 3;

const PREFIX: &str = "SP1-";
const SECRET_LEN: usize = 16;
const PIN_LEN: usize = 16;

/// A text that is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not an enrolment token: it begins with `SP1-` and has 56 characters (create one with `stillpoint agent token create`)"
)]
pub struct BadToken;

/// A one-time token. Has no `Debug` and no `Display`; the bytes are wiped when it goes.
pub struct Token {
    secret: Zeroizing<[u8; SECRET_LEN]>,
    pin: [u8; PIN_LEN],
}

impl Token {
    /// The token of 16 random bytes for a target with this key.
    #[must_use]
    pub fn new(secret: [u8; SECRET_LEN], target: &Fingerprint) -> Self {
        Self {
            secret: Zeroizing::new(secret),
            pin: first(&target.0),
        }
    }

    /// Reads a token as the operator pasted it: case and surrounding blanks do not matter.
    ///
    /// # Errors
    /// It is no token.
    pub fn parse(text: &str) -> Result<Self, BadToken> {
        let text = Zeroizing::new(text.trim().to_ascii_uppercase());
        let digits = text.strip_prefix(PREFIX).ok_or(BadToken)?;
        let bytes = data_encoding::BASE32_NOPAD
            .decode(digits.as_bytes())
            .map_err(|_| BadToken)?;
        let bytes = Zeroizing::new(bytes);
        let (secret, pin) = bytes.split_at_checked(SECRET_LEN).ok_or(BadToken)?;
        let pin = pin.try_into().map_err(|_| BadToken)?;
        Ok(Self {
            secret: Zeroizing::new(first(secret)),
            pin,
        })
    }

    /// The text to hand to the agent's administrator. The only way out of the wrapper.
    #[must_use]
    pub fn reveal(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(self.secret.to_vec());
        bytes.extend_from_slice(&self.pin);
        Zeroizing::new(format!("{PREFIX}{}", data_encoding::BASE32_NOPAD.encode(&bytes)))
    }

    /// Whether this key is the one of the target that made the token: the agent's first check, before it sends anything.
    #[must_use]
    pub fn is_for(&self, target: &Fingerprint) -> bool {
        self.pin == first(&target.0)
    }

    /// Names the token in `Enrol` without showing it, so that wrong guesses are counted against the right one.
    #[must_use]
    pub fn id(&self) -> [u8; 8] {
        first(hmac::sign(&self.key(), b"stillpoint-token-id").as_ref())
    }

    /// What the agent sends.
    #[must_use]
    pub fn agent_mac(&self, agent: AgentId, exporter: &[u8; EXPORTER_LEN]) -> [u8; 32] {
        self.mac(b"agent", agent, exporter)
    }

    /// What the target answers.
    #[must_use]
    pub fn target_mac(&self, agent: AgentId, exporter: &[u8; EXPORTER_LEN]) -> [u8; 32] {
        self.mac(b"target", agent, exporter)
    }

    /// Checks the agent's MAC, in constant time.
    #[must_use]
    pub fn verify_agent(&self, agent: AgentId, exporter: &[u8; EXPORTER_LEN], mac: &[u8; 32]) -> bool {
        hmac::verify(&self.key(), &mac_input(b"agent", agent, exporter), mac).is_ok()
    }

    /// Checks the target's MAC, in constant time.
    #[must_use]
    pub fn verify_target(&self, agent: AgentId, exporter: &[u8; EXPORTER_LEN], mac: &[u8; 32]) -> bool {
        hmac::verify(&self.key(), &mac_input(b"target", agent, exporter), mac).is_ok()
    }

    fn mac(&self, role: &[u8], agent: AgentId, exporter: &[u8; EXPORTER_LEN]) -> [u8; 32] {
        first(hmac::sign(&self.key(), &mac_input(role, agent, exporter)).as_ref())
    }

    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &*self.secret)
    }
}

/// Keying material of the exporter is a secret: wiped after use.
fn mac_input(role: &[u8], agent: AgentId, exporter: &[u8; EXPORTER_LEN]) -> Zeroizing<Vec<u8>> {
    let mut input = Zeroizing::new(Vec::with_capacity(role.len() + 16 + EXPORTER_LEN));
    input.extend_from_slice(role);
    input.extend_from_slice(&agent.0);
    input.extend_from_slice(exporter);
    input
}

/// The first `N` bytes; what is missing is zero (no caller passes less).
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    out
}

struct Waiting {
    token: Token,
    luns: Vec<LunId>,
    expires: Instant,
    failures: u8,
}

/// What a token granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The LUNs that the token was made for.
    pub luns: Vec<LunId>,
    /// The target's proof, for `EnrolOk`.
    pub mac: [u8; 32],
}

/// A token that waits, in a shape that its owner can keep over a restart. Has no `Debug`: the text is a secret.
pub struct SavedToken {
    /// The token itself ([`Token::reveal`]).
    pub text: Zeroizing<String>,
    /// The LUNs that it grants.
    pub luns: Vec<LunId>,
    /// How long it still lives.
    pub left: Duration,
    /// Wrong MACs so far.
    pub failures: u8,
}

/// The target's unused tokens.
#[derive(Default)]
pub struct TokenBook {
    waiting: Vec<Waiting>,
    /// Counts what `enrol` changed.
    changes: u64,
}

/// Shows how many there are, nothing of them.
impl std::fmt::Debug for TokenBook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenBook")
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl TokenBook {
    /// Remembers a token.
    ///
    /// # Errors
    /// 64 tokens wait already.
    pub fn add(
        &mut self,
        now: Instant,
        token: Token,
        luns: Vec<LunId>,
        ttl: Duration,
    ) -> Result<(), Refusal> {
        self.expire(now);
        if self.waiting.len() >= MAX_TOKENS {
            let text = format!("{MAX_TOKENS} enrolment tokens wait already: use them or let them expire");
            return Err(Refusal::new(ErrorCode::Busy, text));
        }
        self.waiting.push(Waiting {
            token,
            luns,
            expires: now + ttl,
            failures: 0,
        });
        Ok(())
    }

    /// Every token that waits, to be kept over a restart.
    pub fn save(&mut self, now: Instant) -> Vec<SavedToken> {
        self.expire(now);
        let save = |waiting: &Waiting| SavedToken {
            text: waiting.token.reveal(),
            luns: waiting.luns.clone(),
            left: waiting.expires.saturating_duration_since(now),
            failures: waiting.failures,
        };
        self.waiting.iter().map(save).collect()
    }

    /// Counts what [`Self::enrol`] changed: a guess at a token that is not there changes nothing, and need not be kept.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Takes up what [`Self::save`] gave. What is no token, or has no time left, is left out.
    pub fn restore(&mut self, now: Instant, saved: Vec<SavedToken>) {
        let waiting = |saved: SavedToken| {
            Some(Waiting {
                token: Token::parse(&saved.text).ok()?,
                luns: saved.luns,
                expires: now + saved.left,
                failures: saved.failures,
            })
        };
        self.waiting = saved.into_iter().filter_map(waiting).take(MAX_TOKENS).collect();
        self.expire(now);
    }

    /// Tokens that can still be used.
    pub fn len(&mut self, now: Instant) -> usize {
        self.expire(now);
        self.waiting.len()
    }

    /// Answers an `Enrol`. Success burns the token, so does the third wrong MAC.
    ///
    /// # Errors
    /// `NotEnrolled`, the same text for every cause: a guesser learns nothing.
    pub fn enrol(
        &mut self,
        now: Instant,
        agent: AgentId,
        token_id: [u8; 8],
        mac: &[u8; 32],
        exporter: &[u8; EXPORTER_LEN],
    ) -> Result<Grant, Refusal> {
        self.expire(now);
        let refused = || {
            let text = "this token is not valid (used, expired or mistyped): make a new one with `stillpoint agent token create`";
            Refusal::new(ErrorCode::NotEnrolled, text)
        };
        let found = self
            .waiting
            .iter()
            .position(|waiting| waiting.token.id() == token_id)
            .ok_or_else(refused)?;
        let waiting = self.waiting.get_mut(found).ok_or_else(refused)?;
        self.changes += 1;
        if waiting.token.verify_agent(agent, exporter, mac) {
            let used = self.waiting.swap_remove(found);
            return Ok(Grant {
                luns: used.luns,
                mac: used.token.target_mac(agent, exporter),
            });
        }
        waiting.failures += 1;
        if waiting.failures >= MAX_FAILURES {
            self.waiting.swap_remove(found);
        }
        Err(refused())
    }

    fn expire(&mut self, now: Instant) {
        self.waiting.retain(|waiting| now < waiting.expires);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: AgentId = AgentId([1; 16]);
    const EXPORTER: [u8; 32] = [9; 32];
    const TARGET: Fingerprint = Fingerprint([0xab; 32]);

    fn token() -> Token {
        Token::new([0x11; 16], &TARGET)
    }

    #[test]
    fn the_text_form_reads_back() {
        let text = token().reveal();
        assert_eq!(
            &**text,
            "SP1-CEIRCEIRCEIRCEIRCEIRCEIRCGV2XK5LVOV2XK5LVOV2XK5LVOVQ"
        );
        let again = Token::parse(&format!(" {} ", text.to_lowercase())).ok().unwrap();
        assert_eq!(again.id(), token().id());
        assert!(again.is_for(&TARGET));
        assert!(!again.is_for(&Fingerprint([0xac; 32])));
        for bad in ["", "SP1-", "SP2-CEIR", "SP1-CEIRCEIR", &text[..text.len() - 2]] {
            assert!(Token::parse(bad).is_err(), "{bad}");
        }
    }

    /// Checked with: printf of role, id and exporter | openssl dgst -sha256 -mac HMAC -macopt hexkey:1111…
    #[test]
    fn the_mac_is_hmac_sha256_of_role_id_exporter() {
        let mac = token().agent_mac(AGENT, &EXPORTER);
        assert_eq!(
            data_encoding::HEXLOWER.encode(&mac),
            "22ce9733f2fa5b2a0b78e161a9f1fa9ccc919cd153004ad1846eebe2dc259895"
        );
        assert_ne!(mac, token().target_mac(AGENT, &EXPORTER));
    }

    #[test]
    fn success_burns_the_token() {
        let now = Instant::now();
        let mut book = TokenBook::default();
        book.add(now, token(), vec![LunId([5; 16])], TOKEN_TTL_DEFAULT)
            .unwrap();
        let mac = token().agent_mac(AGENT, &EXPORTER);
        let grant = book.enrol(now, AGENT, token().id(), &mac, &EXPORTER).unwrap();
        assert_eq!(grant.luns, [LunId([5; 16])]);
        assert!(token().verify_target(AGENT, &EXPORTER, &grant.mac));
        assert!(book.enrol(now, AGENT, token().id(), &mac, &EXPORTER).is_err());
    }

    #[test]
    fn a_mac_of_another_session_or_agent_is_refused_and_the_third_burns() {
        let now = Instant::now();
        let mut book = TokenBook::default();
        book.add(now, token(), vec![], TOKEN_TTL_DEFAULT).unwrap();
        let relayed = token().agent_mac(AGENT, &[8; 32]);
        let other = token().agent_mac(AgentId([2; 16]), &EXPORTER);
        let reflected = token().target_mac(AGENT, &EXPORTER);
        for mac in [relayed, other, reflected] {
            assert_eq!(book.len(now), 1);
            let refusal = book.enrol(now, AGENT, token().id(), &mac, &EXPORTER).unwrap_err();
            assert_eq!(refusal.code, ErrorCode::NotEnrolled);
        }
        assert_eq!(book.len(now), 0);
    }

    #[test]
    fn tokens_expire_and_are_bounded() {
        let now = Instant::now();
        let mut book = TokenBook::default();
        for n in 0..MAX_TOKENS {
            let secret = [u8::try_from(n).unwrap(); 16];
            book.add(now, Token::new(secret, &TARGET), vec![], TOKEN_TTL_DEFAULT)
                .unwrap();
        }
        assert_eq!(
            book.add(now, token(), vec![], TOKEN_TTL_DEFAULT)
                .unwrap_err()
                .code,
            ErrorCode::Busy
        );
        assert_eq!(book.len(now + TOKEN_TTL_DEFAULT), 0);
    }

    #[test]
    fn tokens_outlive_a_restart_with_their_time_and_their_failures() {
        let now = Instant::now();
        let agent = AgentId([1; 16]);
        let mut book = TokenBook::default();
        let lun = LunId([3; 16]);
        assert_eq!(book.add(now, token(), vec![lun], Duration::from_secs(60)), Ok(()));
        let wrong = [0; 32];
        for _ in 1..MAX_FAILURES {
            assert!(book.enrol(now, agent, token().id(), &wrong, &EXPORTER).is_err());
        }
        let later = now + Duration::from_secs(20);
        let saved = book.save(later);
        assert_eq!(saved[0].left, Duration::from_secs(40));
        let mut again = TokenBook::default();
        again.restore(later, saved);
        // The last failure of three burns it, wherever the others were counted.
        assert!(
            again
                .enrol(later, agent, token().id(), &wrong, &EXPORTER)
                .is_err()
        );
        let mac = token().agent_mac(agent, &EXPORTER);
        assert!(again.enrol(later, agent, token().id(), &mac, &EXPORTER).is_err());
        let mut third = TokenBook::default();
        third.restore(later, book.save(later));
        let grant = third.enrol(later, agent, token().id(), &mac, &EXPORTER);
        assert_eq!(grant.map(|grant| grant.luns), Ok(vec![lun]));
        let mut late = TokenBook::default();
        late.restore(later, book.save(later));
        assert_eq!(late.len(later + Duration::from_secs(40)), 0, "its time went on");
    }
}
