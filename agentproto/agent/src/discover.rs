//! `stillpoint-agent discover`: which targets answer on this network. A hint, no proof: enrolment authenticates.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use stillpoint_agentproto::discovery::{ANSWER_MAX, Answer, Probe};
use stillpoint_agentproto::{DEFAULT_PORT, VERSION};

use crate::enrol::place_of;

/// The probe is lost easily: it is sent again.
const AGAIN: Duration = Duration::from_millis(1100);

/// A target that answered.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Found {
    /// Its name for people; whoever answers may call itself anything.
    pub(crate) name: String,
    /// Where it registers agents.
    pub(crate) address: SocketAddr,
    /// Its key: compare it with `stillpoint agent token create`'s.
    pub(crate) fingerprint: String,
    /// The protocol's version.
    pub(crate) version: u8,
}

/// Asks (everybody on the local networks, unless `places` says whom) and listens for a time.
pub(crate) fn discover(places: &[String], listen: Duration) -> anyhow::Result<Vec<Found>> {
    let mut asked = Vec::new();
    for place in places {
        let (host, port) = place_of(place)?;
        let found = (host.as_str(), port).to_socket_addrs();
        asked.extend(found.with_context(|| format!("{host} cannot be resolved"))?);
    }
    if places.is_empty() {
        asked.push(SocketAddr::from((Ipv4Addr::BROADCAST, DEFAULT_PORT)));
    }
    let mut nonce = [0; 8];
    getrandom::fill(&mut nonce).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    let probe = Probe {
        min_version: VERSION,
        max_version: VERSION,
        nonce,
    };
    let mut found = BTreeMap::new();
    for family in [false, true] {
        let asked: Vec<_> = asked
            .iter()
            .filter(|to| to.is_ipv6() == family)
            .copied()
            .collect();
        if !asked.is_empty() {
            ask(&asked, probe, listen, &mut found)?;
        }
    }
    Ok(found.into_values().collect())
}

fn ask(
    asked: &[SocketAddr],
    probe: Probe,
    listen: Duration,
    found: &mut BTreeMap<SocketAddr, Found>,
) -> anyhow::Result<()> {
    let any = if asked.iter().any(SocketAddr::is_ipv6) {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    let socket = UdpSocket::bind(any).context("no UDP socket")?;
    socket.set_broadcast(true)?;
    let end = Instant::now() + listen;
    let mut next = Instant::now();
    let mut buffer = [0; ANSWER_MAX + 1];
    while Instant::now() < end {
        if Instant::now() >= next {
            next += AGAIN;
            for to in asked {
                let sent = socket.send_to(&probe.encode(), to);
                sent.with_context(|| format!("{to} cannot be asked: is there a network?"))?;
            }
        }
        let wait = end.min(next).saturating_duration_since(Instant::now());
        socket.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
        // A port that is closed answers with an ICMP error; it is no answer.
        let Ok((count, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let answer = Answer::parse(buffer.get(..count).unwrap_or_default());
        if let Some(answer) = answer.filter(|answer| answer.nonce == probe.nonce) {
            let address = SocketAddr::new(from.ip(), answer.port);
            let one = Found {
                // Names from other hosts must not steer the terminal.
                name: answer.name.chars().filter(|c| !c.is_control()).collect(),
                address,
                fingerprint: answer.fingerprint.to_string(),
                version: answer.version,
            };
            found.insert(address, one);
        }
    }
    Ok(())
}
