//! `stillpoint-agent enrol TOKEN@HOST[:PORT]`: the token proves both ends to each other, once; then keys are pinned.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stillpoint_agentproto::enrol::Token;
use stillpoint_agentproto::message::{Enrol, EnrolOk};
use stillpoint_agentproto::registration::{AgentEnd, AgentEvent, Purpose};
use stillpoint_agentproto::{DEFAULT_PORT, Fingerprint};

use crate::dial::{DialError, Dialled, dial};
use crate::failure::Failure;
use crate::features::Features;
use crate::host;
use crate::link::Link;
use crate::state::{StateDir, TARGETS_MAX, Target, address};
use crate::tls::Pins;
use crate::volumes::Root;

/// Everything after the TLS handshake: Hello and Enrol have 5 s each.
const TALK_TIME_MAX: Duration = Duration::from_secs(12);

/// Where to enrol, and with what. No `Debug`: the token is a secret.
pub(crate) struct Invitation {
    token: Token,
    host: String,
    port: u16,
}

impl Invitation {
    /// Reads `TOKEN@HOST[:PORT]`; an IPv6 address is written in brackets.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let hint = "on the target, `stillpoint agent token create` prints the whole command";
        let wrong = |message: String| Failure::usage(message, hint);
        let (token, place) = text
            .trim()
            .split_once('@')
            .ok_or_else(|| wrong("write TOKEN@HOST or TOKEN@HOST:PORT".to_owned()))?;
        let token = Token::parse(token).map_err(|error| wrong(error.to_string()))?;
        let (host, port) = place_of(place)?;
        Ok(Self { token, host, port })
    }
}

/// `HOST[:PORT]`; an IPv6 address with a port is written in brackets.
pub(crate) fn place_of(place: &str) -> Result<(String, u16), Failure> {
    let wrong = |message: &str| Failure::usage(format!("{place:?}: {message}"), "write HOST or HOST:PORT");
    let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => {
            let port = rest
                .strip_prefix(':')
                .ok_or_else(|| wrong("write [ADDRESS]:PORT"))?;
            (host, Some(port))
        }
        None => match place.split_once(':') {
            Some((_, port)) if port.contains(':') => (place, None),
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    if host.is_empty() {
        return Err(wrong("the target's host is missing"));
    }
    let port = port
        .map_or(Ok(DEFAULT_PORT), str::parse)
        .map_err(|_| wrong("no port number"))?;
    Ok((host.to_owned(), port))
}

/// Accepts the one key that the token names, and nothing before it is proved.
struct TokenPin(Arc<Token>);

impl std::fmt::Debug for TokenPin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenPin")
    }
}

impl Pins for TokenPin {
    fn accepts(&self, fingerprint: Fingerprint) -> bool {
        self.0.is_for(&fingerprint)
    }
}

/// Enrols, and remembers the target.
pub(crate) async fn enrol(
    state: &StateDir,
    features: &Features,
    invitation: Invitation,
) -> anyhow::Result<Target> {
    let identity = state.identity()?;
    let Invitation { token, host, port } = invitation;
    let token = Arc::new(token);
    if state.targets()?.len() >= TARGETS_MAX {
        let message = format!("this agent is enrolled with {TARGETS_MAX} targets already");
        return Err(Failure::refused("limit", message, "`stillpoint-agent unenrol` one of them").into());
    }
    let pins = Arc::new(TokenPin(Arc::clone(&token)));
    let address = address(&host, port);
    let dialled = dial(&address, &identity, pins).await.map_err(not_dialled)?;
    let Dialled {
        stream,
        fingerprint,
        exporter,
    } = dialled;
    let purpose = Purpose::Enrol(Enrol {
        agent_id: identity.agent_id,
        token_id: token.id(),
        mac: token.agent_mac(identity.agent_id, &exporter),
        host: host::name(&Root::real()),
    });
    let hello = host::hello(identity.agent_id, features.capabilities());
    let mut link = Link::new(stream, AgentEnd::new(Instant::now(), hello, 0, purpose));
    let talk = async {
        loop {
            match link.event().await {
                Ok(AgentEvent::Enrolled(EnrolOk { mac })) => return Ok(mac),
                Ok(AgentEvent::Refused(refusal)) => return Err(Failure::of_target(&address, &refusal)),
                Ok(_) => {}
                Err(error) => {
                    let message = format!("{address} broke off the enrolment: {error}");
                    return Err(Failure::unreachable(
                        message,
                        "try again; the token is still good",
                    ));
                }
            }
        }
    };
    let mac = tokio::time::timeout(TALK_TIME_MAX, talk).await.map_err(|_| {
        let message = format!("{address} did not answer within {} s", TALK_TIME_MAX.as_secs());
        Failure::unreachable(message, "look at the target's log, then try again")
    })??;
    if !token.verify_target(identity.agent_id, &exporter, &mac) {
        let message = format!("{address} does not know the token: nothing was pinned");
        return Err(Failure::refused("wrong_target", message, "make a new token on that target").into());
    }
    let target = Target {
        fingerprint,
        host,
        port,
        enrolled_at: jiff::Timestamp::now().to_string(),
    };
    state.add_target(&target)?;
    link.close().await;
    Ok(target)
}

/// Enrolment did not begin: nothing was said, and the token is still good.
fn not_dialled(error: DialError) -> Failure {
    match error {
        DialError::OtherKey { address, seen } => Failure::refused(
            "wrong_target",
            format!("the token belongs to another target: {address} has the key {seen}"),
            "make the token on the target that you enrol with; if you did, something sits in between: do not go on",
        ),
        DialError::Unreachable { .. } => {
            Failure::unreachable(error.to_string(), "the token is still good: try again")
        }
        DialError::NoTarget { .. } => Failure::unreachable(
            error.to_string(),
            "`stillpoint status` on the target shows its port",
        ),
        DialError::Tls(_) => Failure::failed("internal", error.to_string(), "report this"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_with_and_without_port() {
        let place = |text| place_of(text).map_err(|error| error.to_string());
        assert_eq!(place("san1"), Ok(("san1".to_owned(), 11169)));
        assert_eq!(place("san1:5"), Ok(("san1".to_owned(), 5)));
        assert_eq!(place("[fe80::1]"), Ok(("fe80::1".to_owned(), 11169)));
        assert_eq!(place("[fe80::1]:5"), Ok(("fe80::1".to_owned(), 5)));
        assert_eq!(place("fe80::1"), Ok(("fe80::1".to_owned(), 11169)));
        for bad in ["", "san1:x", "[::1]5", ":5"] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_invitation_needs_a_token() {
        assert!(Invitation::parse("san1").is_err());
        assert!(Invitation::parse("SP1-ABC@san1").is_err());
        let token = Token::new([7; 16], &Fingerprint([9; 32])).reveal();
        let invitation = Invitation::parse(&format!("{}@san1:77", *token)).expect("a good one");
        assert_eq!((invitation.host.as_str(), invitation.port), ("san1", 77));
    }
}
