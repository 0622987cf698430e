//! "Which targets are there?": one UDP datagram to port 11169, answered by targets whose operator switched it on (specification §1).
//!
//! The answer is a hint and proves nothing: the token carries the target's fingerprint, and enrolment authenticates.
//!
//! ```text
//! probe  (512 bytes):    "SPD1" | 1 | min version | max version | 0 | nonce (8) | zeros
//! answer (<= 256 bytes): "SPD1" | 2 | version | TCP port u16 | nonce (8) | fingerprint (32) | length u8, name (UTF-8)
//! ```
//! An answer is never longer than half its probe, so nobody can use a target to amplify a flood.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nom::Parser as _;
use nom::bytes::complete::{tag, take};
use nom::number::complete::{be_u8, be_u16};

use crate::ident::Fingerprint;

/// Length of a probe.
pub const PROBE_LEN: usize = 512;
/// Longest answer.
pub const ANSWER_MAX: usize = 256;
/// One answer per source in this time.
pub const INTERVAL: Duration = Duration::from_secs(1);

const MAGIC: &[u8] = b"SPD1";
const PROBE: u8 = 1;
const ANSWER: u8 = 2;
const NAME_MAX: usize = 128;
/// Sources that are remembered; when more ask within a second, the rest waits.
const SOURCES_MAX: usize = 256;

/// "Who is there?"
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Lowest protocol version that the agent speaks.
    pub min_version: u8,
    /// Highest.
    pub max_version: u8,
    /// Random: an answer without it was not given to this probe.
    pub nonce: [u8; 8],
}

/// "I am."
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Protocol version that both ends speak.
    pub version: u8,
    /// TCP port of the registration channel; the host is the one that the answer came from.
    pub port: u16,
    /// The probe's.
    pub nonce: [u8; 8],
    /// The target's key, to compare with what its operator says.
    pub fingerprint: Fingerprint,
    /// The target's name for people.
    pub name: String,
}

impl Probe {
    /// The datagram.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([PROBE, self.min_version, self.max_version, 0]);
        out.extend(self.nonce);
        out.resize(PROBE_LEN, 0);
        out
    }

    /// Reads a datagram; `None` for everything that is no probe of full length.
    #[must_use]
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        if datagram.len() != PROBE_LEN {
            return None;
        }
        let (rest, _) = start(datagram, PROBE)?;
        let (rest, min_version) = byte(rest)?;
        let (rest, max_version) = byte(rest)?;
        let (rest, _reserved) = byte(rest)?;
        let (_, nonce) = nonce(rest)?;
        Some(Self {
            min_version,
            max_version,
            nonce,
        })
    }
}

impl Answer {
    /// The datagram. A longer name is cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let end = (0..=NAME_MAX.min(self.name.len()))
            .rev()
            .find(|end| self.name.is_char_boundary(*end));
        let name = self.name.get(..end.unwrap_or(0)).unwrap_or_default();
        let mut out = MAGIC.to_vec();
        out.extend([ANSWER, self.version]);
        out.extend(self.port.to_be_bytes());
        out.extend(self.nonce);
        out.extend(self.fingerprint.0);
        out.push(u8::try_from(name.len()).unwrap_or(0));
        out.extend(name.as_bytes());
        out
    }

    /// Reads a datagram; `None` for everything that is no answer.
    #[must_use]
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        if datagram.len() > ANSWER_MAX {
            return None;
        }
        let (rest, _) = start(datagram, ANSWER)?;
        let (rest, version) = byte(rest)?;
        let (rest, port) = be_u16::<_, nom::error::Error<&[u8]>>(rest).ok()?;
        let (rest, nonce) = nonce(rest)?;
        let (rest, fingerprint) = bytes(rest, 32)?;
        let (rest, length) = byte(rest)?;
        let (_, name) = bytes(rest, usize::from(length))?;
        Some(Self {
            version,
            port,
            nonce,
            fingerprint: Fingerprint(fingerprint.try_into().ok()?),
            name: std::str::from_utf8(name).ok()?.to_owned(),
        })
    }
}

fn start(datagram: &[u8], kind: u8) -> Option<(&[u8], u8)> {
    let (rest, _) = tag::<_, _, nom::error::Error<&[u8]>>(MAGIC)
        .parse(datagram)
        .ok()?;
    byte(rest).filter(|(_, found)| *found == kind)
}

fn byte(input: &[u8]) -> Option<(&[u8], u8)> {
    be_u8::<_, nom::error::Error<&[u8]>>(input).ok()
}

fn bytes(input: &[u8], count: usize) -> Option<(&[u8], &[u8])> {
    take::<_, _, nom::error::Error<&[u8]>>(count).parse(input).ok()
}

fn nonce(input: &[u8]) -> Option<(&[u8], [u8; 8])> {
    let (rest, nonce) = bytes(input, 8)?;
    Some((rest, nonce.try_into().ok()?))
}

/// The target's end: answers whom, and how often.
#[derive(Debug)]
pub struct Responder {
    port: u16,
    fingerprint: Fingerprint,
    name: String,
    /// When each source was answered last; older entries are dropped.
    answered: BTreeMap<IpAddr, Instant>,
}

impl Responder {
    /// A target that listens on this TCP port.
    #[must_use]
    pub fn new(port: u16, fingerprint: Fingerprint, name: String) -> Self {
        Self {
            port,
            fingerprint,
            name,
            answered: BTreeMap::new(),
        }
    }

    /// The answer to a datagram, if it gets one: a probe of full length, of a version that is spoken here, once a second and source.
    pub fn answer(&mut self, now: Instant, source: IpAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        let probe = Probe::parse(datagram)?;
        if !(probe.min_version..=probe.max_version).contains(&crate::VERSION) {
            return None;
        }
        self.answered
            .retain(|_, at| now.saturating_duration_since(*at) < INTERVAL);
        if self.answered.contains_key(&source) || self.answered.len() >= SOURCES_MAX {
            return None;
        }
        self.answered.insert(source, now);
        let answer = Answer {
            version: crate::VERSION,
            port: self.port,
            nonce: probe.nonce,
            fingerprint: self.fingerprint,
            name: self.name.clone(),
        };
        Some(answer.encode())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBE_1: Probe = Probe {
        min_version: 1,
        max_version: 1,
        nonce: [7; 8],
    };

    fn responder() -> Responder {
        Responder::new(11169, Fingerprint([3; 32]), "san1".to_owned())
    }

    fn source(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn a_probe_is_answered_with_the_half_of_its_bytes_at_most() {
        let probe = PROBE_1.encode();
        assert_eq!(Probe::parse(&probe), Some(PROBE_1));
        let now = Instant::now();
        let datagram = responder().answer(now, source(1), &probe).expect("answered");
        assert!(datagram.len() <= ANSWER_MAX && datagram.len() < probe.len());
        let answer = Answer::parse(&datagram).expect("an answer");
        assert_eq!(
            (answer.nonce, answer.port, answer.name.as_str()),
            ([7; 8], 11169, "san1")
        );
        let long =
            Responder::new(1, Fingerprint([3; 32]), "\u{fc}".repeat(200)).answer(now, source(1), &probe);
        let long = long.expect("answered");
        assert!(
            long.len() <= ANSWER_MAX && Answer::parse(&long).is_some_and(|a| a.name.chars().count() == 64)
        );
    }

    #[test]
    fn a_source_is_answered_once_a_second_and_sources_are_bounded() {
        let (mut responder, probe, now) = (responder(), PROBE_1.encode(), Instant::now());
        assert!(responder.answer(now, source(1), &probe).is_some());
        assert!(responder.answer(now + INTERVAL / 2, source(1), &probe).is_none());
        assert!(responder.answer(now + INTERVAL / 2, source(2), &probe).is_some());
        assert!(responder.answer(now + INTERVAL, source(1), &probe).is_some());
        let many = (0..=255_u8).flat_map(|a| [0, 1].map(|b| IpAddr::from([10, 1, a, b])));
        let answered = many.filter(|source| responder.answer(now + 2 * INTERVAL, *source, &probe).is_some());
        assert_eq!(answered.count(), SOURCES_MAX);
    }

    #[test]
    fn short_foreign_and_broken_datagrams_get_nothing() {
        let (mut responder, probe, now) = (responder(), PROBE_1.encode(), Instant::now());
        for end in 0..PROBE_LEN {
            let cut = probe.get(..end).expect("a prefix");
            assert_eq!(responder.answer(now, source(1), cut), None, "{end} bytes");
        }
        let other = Probe {
            min_version: 2,
            max_version: 9,
            nonce: [0; 8],
        };
        assert_eq!(
            responder.answer(now, source(1), &other.encode()),
            None,
            "another version"
        );
        let answer = responder.answer(now, source(1), &probe).expect("answered");
        assert_eq!(
            responder.answer(now, source(2), &answer),
            None,
            "an answer is no probe"
        );
        for end in 0..answer.len() {
            assert_eq!(Answer::parse(answer.get(..end).expect("a prefix")), None);
            let mut flipped = answer.clone();
            if let Some(byte) = flipped.get_mut(end) {
                *byte ^= 0x80;
            }
            // Whatever it says: it is read, or not, without a panic.
            drop(Answer::parse(&flipped));
        }
    }
}
