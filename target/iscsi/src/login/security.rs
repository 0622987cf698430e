//! The security stage: which method, and CHAP in both directions (RFC 7143 §6.3.2, §12.1).

use subtle::ConstantTimeEq;

use super::Entropy;
use super::chap::{BINARY_MAX, Challenge, ChapPolicy, Credential};
use crate::error::{AuthFault, LoginFault, LoginStatus};
use crate::text::{Outgoing, binary, hex, number};

/// Where authentication stands.
///
/// ```text
/// Open ──AuthMethod=CHAP──▶ Algorithm ──CHAP_A──▶ Response ──CHAP_N, CHAP_R──▶ Done
///   └────AuthMethod=None (or nothing, when no secret is needed)──────────────────▲
/// ```
#[derive(Debug)]
pub(super) enum Security {
    /// No method agreed.
    Open,
    /// CHAP agreed; the initiator names algorithms next.
    Algorithm,
    /// Our challenge is out.
    Response(Challenge),
    /// Authenticated, or nothing to authenticate.
    Done,
}

/// The security keys of one complete text.
#[derive(Debug, Default)]
pub(super) struct SecurityKeys<'a> {
    auth_method: Option<&'a str>,
    algorithms: Option<&'a str>,
    name: Option<&'a str>,
    response: Option<&'a str>,
    identifier: Option<&'a str>,
    challenge: Option<&'a str>,
}

impl<'a> SecurityKeys<'a> {
    /// Takes a key if it is one of ours.
    pub(super) fn take(&mut self, key: &str, value: &'a str) -> bool {
        let slot = match key {
            "AuthMethod" => &mut self.auth_method,
            "CHAP_A" => &mut self.algorithms,
            "CHAP_N" => &mut self.name,
            "CHAP_R" => &mut self.response,
            "CHAP_I" => &mut self.identifier,
            "CHAP_C" => &mut self.challenge,
            _ => return false,
        };
        *slot = Some(value);
        true
    }

    fn any_proof(&self) -> bool {
        [self.name, self.response, self.identifier, self.challenge]
            .iter()
            .any(Option::is_some)
    }
}

impl Security {
    /// Goes on with the keys of one text; the answers go to `out`.
    pub(super) fn step(
        self,
        keys: &SecurityKeys<'_>,
        policy: Option<&ChapPolicy>,
        entropy: &mut Entropy,
        out: &mut Outgoing,
    ) -> Result<Self, LoginStatus> {
        match (self, policy) {
            (Self::Open, None) => open_without_secret(keys, out),
            (Self::Open, Some(policy)) => match keys.auth_method {
                None if keys.algorithms.is_some() || keys.any_proof() => {
                    Err(AuthFault::OutOfTurn("AuthMethod").into())
                }
                None => Ok(Self::Open),
                Some(methods) if methods.split(',').any(|method| method == "CHAP") => {
                    out.pair("AuthMethod", "CHAP");
                    // Some initiators name their algorithms along with the method.
                    challenge(keys, policy, entropy, out)
                }
                Some(_) => Err(AuthFault::ChapNotOffered.into()),
            },
            (Self::Algorithm, Some(policy)) => challenge(keys, policy, entropy, out),
            (Self::Response(sent), Some(policy)) => prove(sent, keys, policy, out),
            (state, _) if keys.algorithms.is_none() && !keys.any_proof() => Ok(state),
            _ => Err(AuthFault::OutOfTurn("CHAP").into()),
        }
    }

    /// Whether the stage may be left: always when no secret is asked for.
    pub(super) fn may_leave(&self, policy: Option<&ChapPolicy>) -> bool {
        matches!(self, Self::Done) || (policy.is_none() && matches!(self, Self::Open))
    }
}

fn open_without_secret(keys: &SecurityKeys<'_>, out: &mut Outgoing) -> Result<Security, LoginStatus> {
    if keys.algorithms.is_some() || keys.any_proof() {
        return Err(AuthFault::OutOfTurn("CHAP").into());
    }
    match keys.auth_method {
        None => Ok(Security::Open),
        Some(methods) if methods.split(',').any(|method| method == "None") => {
            out.pair("AuthMethod", "None");
            Ok(Security::Done)
        }
        Some(_) => Err(AuthFault::NoMethod.into()),
    }
}

/// CHAP_A: picks an algorithm and sends a challenge.
fn challenge(
    keys: &SecurityKeys<'_>,
    policy: &ChapPolicy,
    entropy: &mut Entropy,
    out: &mut Outgoing,
) -> Result<Security, LoginStatus> {
    if keys.any_proof() {
        return Err(AuthFault::OutOfTurn("CHAP_A").into());
    }
    let Some(offer) = keys.algorithms else {
        return Ok(Security::Algorithm);
    };
    let algorithm = policy
        .choose(offer.split(',').filter_map(number))
        .ok_or(AuthFault::NoAlgorithm)?;
    let [identifier] = entropy.bytes::<1>();
    let bytes = entropy.vec(algorithm.challenge_len());
    out.pair("CHAP_A", &algorithm.number().to_string());
    out.pair("CHAP_I", &identifier.to_string());
    out.pair("CHAP_C", &hex(&bytes));
    Ok(Security::Response(Challenge {
        algorithm,
        identifier,
        bytes,
    }))
}

/// CHAP_N and CHAP_R: checks the proof, and gives ours when the initiator asks with CHAP_I and CHAP_C.
fn prove(
    sent: Challenge,
    keys: &SecurityKeys<'_>,
    policy: &ChapPolicy,
    out: &mut Outgoing,
) -> Result<Security, LoginStatus> {
    if keys.algorithms.is_some() {
        return Err(AuthFault::OutOfTurn("CHAP_A").into());
    }
    if !keys.any_proof() {
        return Ok(Security::Response(sent));
    }
    let name = keys.name.ok_or(AuthFault::OutOfTurn("CHAP_N"))?;
    let response = keys.response.ok_or(AuthFault::OutOfTurn("CHAP_R"))?;
    let response = binary(response)
        .filter(|r| r.len() <= BINARY_MAX)
        .ok_or(AuthFault::Unreadable("CHAP_R"))?;
    // Both are always computed: the time must not tell which one was wrong.
    let known = bool::from(name.as_bytes().ct_eq(policy.initiator.user.as_bytes()));
    let proven = sent.verify(&policy.initiator, &response);
    if !known {
        return Err(AuthFault::UnknownUser.into());
    }
    if !proven {
        return Err(AuthFault::WrongSecret.into());
    }
    match (keys.identifier, keys.challenge) {
        (None, None) => {}
        (Some(identifier), Some(challenge)) => {
            answer_challenge(&sent, identifier, challenge, policy.target.as_ref(), out)?;
        }
        (None, Some(_)) => return Err(AuthFault::OutOfTurn("CHAP_I").into()),
        (Some(_), None) => return Err(AuthFault::OutOfTurn("CHAP_C").into()),
    }
    Ok(Security::Done)
}

fn answer_challenge(
    sent: &Challenge,
    identifier: &str,
    challenge: &str,
    target: Option<&Credential>,
    out: &mut Outgoing,
) -> Result<(), LoginStatus> {
    let target = target.ok_or(AuthFault::NoMutualSecret)?;
    let identifier = number(identifier)
        .and_then(|i| u8::try_from(i).ok())
        .ok_or(AuthFault::Unreadable("CHAP_I"))?;
    let challenge = binary(challenge)
        .filter(|c| c.len() <= BINARY_MAX)
        .ok_or(AuthFault::Unreadable("CHAP_C"))?;
    if challenge == sent.bytes {
        return Err(AuthFault::ReflectedChallenge.into());
    }
    out.pair("CHAP_N", &target.user);
    out.pair(
        "CHAP_R",
        &hex(&sent.algorithm.response(identifier, &target.secret, &challenge)),
    );
    Ok(())
}

/// Keys of authentication methods that we do not offer: they cannot follow any answer of ours.
pub(super) fn check_foreign(key: &str) -> Result<(), LoginFault> {
    if key.starts_with("KRB_") || key.starts_with("SRP_") || key == "TargetAuth" {
        return Err(LoginFault::KeyNotAllowed(key.to_owned()));
    }
    Ok(())
}
