//! `stillpoint-agent enrol TOKEN@HOST[:PORT]`: the token proves both ends to each other, once; then keys are pinned.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use stillpoint_agentproto::enrol::Token;
use stillpoint_agentproto::message::{Enrol, EnrolOk};
use stillpoint_agentproto::registration::{AgentEnd, AgentEvent, Purpose};
use stillpoint_agentproto::{DEFAULT_PORT, Fingerprint};

use crate::dial::{Dialled, dial};
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
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let (token, place) = text
            .trim()
            .split_once('@')
            .context("write TOKEN@HOST or TOKEN@HOST:PORT")?;
        let token = Token::parse(token)?;
        let (host, port) = place_of(place)?;
        Ok(Self { token, host, port })
    }
}

/// `HOST[:PORT]`; an IPv6 address with a port is written in brackets.
pub(crate) fn place_of(place: &str) -> anyhow::Result<(String, u16)> {
    let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => (
            host,
            Some(rest.strip_prefix(':').context("write [ADDRESS]:PORT")?),
        ),
        None => match place.split_once(':') {
            Some((_, port)) if port.contains(':') => (place, None),
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    if host.is_empty() {
        bail!("the target's host is missing after the @");
    }
    let port = port
        .map_or(Ok(DEFAULT_PORT), str::parse)
        .with_context(|| format!("{place}: no port number"))?;
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
pub(crate) async fn enrol(state: &StateDir, invitation: Invitation) -> anyhow::Result<Target> {
    let identity = state.identity()?;
    let Invitation { token, host, port } = invitation;
    let token = Arc::new(token);
    if state.targets()?.len() >= TARGETS_MAX {
        bail!("this agent is enrolled with {TARGETS_MAX} targets already: `unenrol` one of them");
    }
    let pins = Arc::new(TokenPin(Arc::clone(&token)));
    let address = address(&host, port);
    let dialled = dial(&address, &identity, pins).await.context(
        "enrolment did not begin (if TLS failed: the token belongs to another target, or something sits in between)",
    )?;
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
    let end = AgentEnd::new(Instant::now(), host::hello(identity.agent_id), 0, purpose);
    let mut link = Link::new(stream, end);
    let talk = async {
        loop {
            match link.event().await? {
                AgentEvent::Enrolled(EnrolOk { mac }) => return Ok(mac),
                AgentEvent::Refused(refusal) => bail!("the target refused: {refusal}"),
                _ => {}
            }
        }
    };
    let mac = tokio::time::timeout(TALK_TIME_MAX, talk)
        .await
        .context("the target did not answer in time")??;
    if !token.verify_target(identity.agent_id, &exporter, &mac) {
        bail!("{address} does not know the token: nothing was pinned");
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
