//! The registration listener: enrol, register with dial-back, heartbeats (agent-protocol.md §§1-3).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustls::ServerConfig;
use stillpoint_agentproto::enrol::{EXPORTER_LABEL, EXPORTER_LEN};
use stillpoint_agentproto::freeze::HOLD_MAX;
use stillpoint_agentproto::message::{
    Enrol, Heartbeat, LogEvent, LunIdentity, Register, Reply, Request, Severity,
};
use stillpoint_agentproto::registration::{Peer, TargetEnd, TargetEvent};
use stillpoint_agentproto::{AgentId, ErrorCode, Fingerprint, LunId, Refusal};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::link::{dial, hello};
use super::pipe::{Pipe, Turn};
use super::records::{MAX_AGENTS, MAX_LUNS, Record};
use super::shared::{Live, Shared, clock_off_seconds};
use super::tls;
use crate::serve::events::code;

/// Connections that are not authenticated, in all …
const MAX_UNKNOWN: usize = 64;
/// … and from one source.
const MAX_UNKNOWN_PER_SOURCE: usize = 4;
/// Known agents may hold so many connections together (a reconnecting agent has two for a moment).
const MAX_KNOWN: usize = 2 * MAX_AGENTS;
const TLS_TIMEOUT: Duration = Duration::from_secs(5);
/// Log lines of one agent and connection that become events: an agent must not fill the log.
const MAX_LOG_LINES: u32 = 1000;

/// The answer to a request of the VSS provider, with the request's id.
type Provided = (u32, Result<Reply, Refusal>);

/// Counts connections before they are authenticated.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<BTreeMap<IpAddr, usize>>);

impl Gate {
    /// A place for one more connection of this source, as long as the permit lives.
    fn enter(self: &Arc<Self>, source: IpAddr) -> Option<Permit> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let count = counts.entry(source).or_default();
        if all >= MAX_UNKNOWN || *count >= MAX_UNKNOWN_PER_SOURCE {
            return None;
        }
        *count += 1;
        Some(Permit {
            gate: Arc::clone(self),
            source,
        })
    }
}

/// A place in the [`Gate`].
struct Permit {
    gate: Arc<Gate>,
    source: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.gate.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.source);
            }
        }
    }
}

/// Accepts agents until the shutdown.
pub(super) async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    config: Arc<ServerConfig>,
    shutdown: CancellationToken,
) {
    let tasks = tokio_util::task::TaskTracker::new();
    loop {
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: wait for some to come back instead of spinning.
                    tracing::warn!(%error, "an agent's connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            },
        };
        let Some(permit) = shared.gate.enter(peer.ip().to_canonical()) else {
            tracing::debug!(%peer, "too many connections that are not authenticated: one more is closed");
            continue;
        };
        if tasks.len() >= MAX_UNKNOWN + MAX_KNOWN {
            continue;
        }
        let (shared, config, shutdown) = (Arc::clone(&shared), Arc::clone(&config), shutdown.clone());
        tasks.spawn(async move {
            if let Err(error) = connection(&shared, stream, peer, config, permit, shutdown).await {
                tracing::debug!(%peer, "an agent's connection ended: {error:#}");
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn connection(
    shared: &Arc<Shared>,
    stream: TcpStream,
    peer: SocketAddr,
    config: Arc<ServerConfig>,
    permit: Permit,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let own = stream.local_addr()?;
    let handshake = TlsAcceptor::from(config).accept(stream);
    let stream = tokio::select! {
        stream = tokio::time::timeout(TLS_TIMEOUT, handshake) => stream.context("no TLS handshake in time")??,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (fingerprint, exporter) = identify(&stream)?;
    let known = shared.records.by_fingerprint(fingerprint).map(|record| record.id);
    let end = TargetEnd::new(
        Instant::now(),
        hello(),
        shared.generation(),
        known.map_or(Peer::Unknown, Peer::Known),
    );
    let (notes, from_tasks) = mpsc::channel(4);
    // The protocol bounds the requests in flight, and so what waits here.
    let (answers, provided) = mpsc::unbounded_channel();
    let mut connection = Connection {
        shared,
        number: shared.next_connection(),
        peer: SocketAddr::new(peer.ip().to_canonical(), peer.port()),
        own,
        fingerprint,
        exporter,
        known,
        said: None,
        end,
        kick: CancellationToken::new(),
        notes,
        answers,
        log_lines: 0,
        warned_frozen: false,
        warned_clock: false,
    };
    let permit = known.is_none().then_some(permit);
    let result = connection.run(stream, from_tasks, provided, shutdown).await;
    connection.leave();
    drop(permit);
    result
}

/// Who is there, and the keying material that binds an enrolment to this TLS session.
fn identify(stream: &TlsStream<TcpStream>) -> anyhow::Result<(Fingerprint, Zeroizing<[u8; EXPORTER_LEN]>)> {
    let (_, session) = stream.get_ref();
    let certificate = session
        .peer_certificates()
        .and_then(<[_]>::first)
        .context("no certificate was shown")?;
    let fingerprint = tls::fingerprint(certificate).context("its certificate is no X.509 certificate")?;
    let exporter = session.export_keying_material([0; EXPORTER_LEN], EXPORTER_LABEL, None)?;
    Ok((fingerprint, Zeroizing::new(exporter)))
}

/// One agent's registration channel.
struct Connection<'a> {
    shared: &'a Arc<Shared>,
    number: u64,
    peer: SocketAddr,
    /// Where it found us.
    own: SocketAddr,
    fingerprint: Fingerprint,
    exporter: Zeroizing<[u8; EXPORTER_LEN]>,
    /// The agent that has this key.
    known: Option<AgentId>,
    /// The agent id of the Hello.
    said: Option<AgentId>,
    end: TargetEnd,
    /// Cancelled when the agent is revoked, or comes back over another connection.
    kick: CancellationToken,
    notes: mpsc::Sender<LogEvent>,
    answers: mpsc::UnboundedSender<Provided>,
    log_lines: u32,
    warned_frozen: bool,
    warned_clock: bool,
}

impl Connection<'_> {
    async fn run(
        &mut self,
        stream: TlsStream<TcpStream>,
        mut from_tasks: mpsc::Receiver<LogEvent>,
        mut provided: mpsc::UnboundedReceiver<Provided>,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let mut pipe = Pipe::new(stream);
        let ended = loop {
            while let Some(event) = self.end.poll_event() {
                if event == TargetEvent::Expired {
                    pipe.finish().await;
                    anyhow::bail!("nothing came in time");
                }
                self.event(event).await;
            }
            while let Some(bytes) = self.end.poll_transmit() {
                pipe.push(&bytes);
            }
            if self.end.is_closed() {
                break Ok(());
            }
            let turn = tokio::select! {
                turn = pipe.turn(self.end.wants_receive(), Some(self.end.poll_timeout())) => turn,
                Some(note) = from_tasks.recv() => {
                    self.end.log(note);
                    continue;
                }
                Some((id, result)) = provided.recv() => {
                    self.end.provided(id, result);
                    continue;
                }
                () = self.kick.cancelled() => break Ok(()),
                () = shutdown.cancelled() => break Ok(()),
            };
            let now = Instant::now();
            let handled = match turn {
                Ok(Turn::Read(count)) => self.end.receive(now, pipe.bytes(count)),
                Ok(Turn::Time) => self.end.handle_timeout(now),
                Err(error) => return Err(error.into()),
            };
            if let Err(error) = handled {
                break Err(error);
            }
        };
        while let Some(bytes) = self.end.poll_transmit() {
            pipe.push(&bytes);
        }
        pipe.finish().await;
        Ok(ended?)
    }

    async fn event(&mut self, event: TargetEvent) {
        match event {
            TargetEvent::Hello { hello, generation } => {
                self.said = hello.agent_id;
                self.shared.saw_generation(generation, &hello.product);
            }
            TargetEvent::Enrol(enrol) => {
                let result = self.enrol(enrol).await;
                self.end.enrolled(result);
            }
            TargetEvent::Register(register) => {
                let result = self.register(register).await;
                self.end.registered(Instant::now(), result);
            }
            TargetEvent::Heartbeat(heartbeat) => {
                let luns = self.heartbeat(heartbeat).await;
                self.end.heartbeat_ok(luns);
            }
            TargetEvent::Provider { id, request } => self.provide(id, request),
            TargetEvent::Log(line) => self.log(&line),
            TargetEvent::VersionRefused(refusal) => self.version_refused(&refusal),
            TargetEvent::Expired => {}
        }
    }

    /// Known agents only: whoever finds the port may not fill the log.
    fn version_refused(&self, refusal: &Refusal) {
        let Some(record) = self.known.and_then(|id| self.shared.records.get(id)) else {
            return;
        };
        let text = format!(
            "the agent on {} ({}) cannot register: {}",
            record.host, self.peer, refusal.text
        );
        self.shared
            .event(code::AGENT_TROUBLE, record.id.to_string(), text);
    }

    /// Hands a request of the VSS provider on; the answer comes back by itself. Each on a thread of its own: a commit, for which VSS
    /// holds the host's writes, is never behind anything else.
    fn provide(&self, id: u32, request: Request) {
        let (shared, known, answers) = (Arc::clone(self.shared), self.known, self.answers.clone());
        let work = move || {
            let asker = known.and_then(|agent| shared.asker(agent));
            let result = match (shared.site(), asker) {
                (Some(site), Some(asker)) => site.provide(asker, request),
                (_, None) => Err(Refusal::new(ErrorCode::NotEnrolled, "this agent was revoked")),
                (None, _) => Err(Refusal::new(
                    ErrorCode::Internal,
                    "the target is starting or stopping",
                )),
            };
            // A connection that is gone needs no answer: the agent asks again, or aborts.
            drop(answers.send((id, result)));
        };
        drop(tokio::task::spawn_blocking(work));
    }

    async fn enrol(&self, enrol: Enrol) -> Result<[u8; 32], Refusal> {
        let agent = enrol.agent_id;
        if self.known.is_some() || self.shared.records.get(agent).is_some() {
            // "no token replaces a pin silently"
            let text = format!(
                "agent {agent} is enrolled here already: run `stillpoint agent revoke {agent}` on the target first"
            );
            return Err(Refusal::new(ErrorCode::NotAllowed, text));
        }
        if self.said != Some(agent) {
            return Err(Refusal::new(
                ErrorCode::Malformed,
                "Enrol and Hello name different agents",
            ));
        }
        let (token_id, mac, exporter) = (enrol.token_id, enrol.mac, self.exporter.clone());
        let grant = self
            .shared
            .blocking(move |shared| Ok(shared.tokens.enrol(agent, token_id, &mac, &exporter)))
            .await?;
        let grant = grant.inspect_err(|_| {
            let text = format!(
                "an enrolment from {} ({}) was refused: wrong, used or expired token",
                Record::clip(&enrol.host),
                self.peer
            );
            self.shared.event(code::AGENT_TROUBLE, agent.to_string(), text);
        })?;
        let record = Record {
            id: agent,
            fingerprint: self.fingerprint,
            luns: grant.luns,
            mounted: Vec::new(),
            host: Record::clip(&enrol.host),
            os: String::new(),
            version: String::new(),
            features: stillpoint_agentproto::message::Capabilities::default(),
            address: None,
            listen_port: stillpoint_agentproto::DEFAULT_PORT,
            advertised: None,
            approved: None,
            enrolled_at: jiff::Timestamp::now().to_string(),
            registered_at: None,
        };
        let text = format!(
            "enrolled on {} from {}, key {}",
            record.host, self.peer, record.fingerprint
        );
        self.shared
            .blocking(move |shared| shared.records.add(record))
            .await?;
        self.shared.event(code::AGENT_CHANGED, agent.to_string(), text);
        Ok(grant.mac)
    }

    async fn register(&mut self, register: Register) -> Result<Vec<LunIdentity>, Refusal> {
        let gone = || Refusal::new(ErrorCode::NotEnrolled, "this agent was revoked");
        let id = self.known.ok_or_else(gone)?;
        let Register {
            host,
            os,
            agent_version,
            listen_port,
            advertise_host,
            features,
            initiators,
            mounted,
            ..
        } = register;
        if listen_port == 0 {
            return Err(Refusal::new(
                ErrorCode::Malformed,
                "listen_port is 0: say on which TCP port the agent listens",
            ));
        }
        let advertised = match advertise_host.as_deref().map(str::parse::<IpAddr>) {
            None => None,
            Some(Ok(host)) => Some(host.to_canonical()),
            Some(Err(_)) => {
                let text = "advertise_host is no IP address: say which address the target has to dial";
                return Err(Refusal::new(ErrorCode::Malformed, text));
            }
        };
        let address = self.peer.ip();
        let changed = self.shared.blocking(move |shared| {
            shared.records.change(id, |record| {
                record.host = Record::clip(&host);
                record.os = Record::clip(&os);
                record.version = Record::clip(&agent_version);
                record.features = features;
                record.address = Some(address);
                record.listen_port = listen_port;
                record.advertised = advertised;
                record.registered_at = Some(jiff::Timestamp::now().to_string());
                record.mounted = own(&record.luns, &mounted);
            })
        });
        let record = changed.await?.ok_or_else(gone)?;
        let live = Live::new(self.number, self.kick.clone(), initiators);
        if let Some(before) = self.shared.live().insert(id, live) {
            before.kick.cancel();
        }
        let text = format!(
            "registered: {} ({}, agent {}) from {}",
            record.host, record.os, record.version, self.peer
        );
        self.shared.event(code::AGENT_CHANGED, id.to_string(), text);
        if let Some(host) = record.unapproved() {
            let text = format!(
                "{} asks to be dialled at {host} instead of {address}: if that is right, `stillpoint agent approve {id}`",
                record.host
            );
            self.shared.event(code::AGENT_TROUBLE, id.to_string(), text);
        }
        self.look_at_own_address(&record);
        self.dial_back(&record);
        Ok(self.shared.grants(&record))
    }

    /// Agents dial this target for ever at the address that they enrolled with: one that a lease may take away is told.
    fn look_at_own_address(&mut self, record: &Record) {
        let own = self.own.ip().to_canonical();
        if super::lease::is_temporary(own) != Some(true) {
            return;
        }
        let text = format!(
            "{} reaches this target at {own}, which is no permanent address of it (a DHCP lease, or autoconfigured): agents need a \
             fixed one; set it on this host, or reserve it in the DHCP server",
            record.host
        );
        self.shared
            .event(code::AGENT_TROUBLE, record.id.to_string(), text.clone());
        self.end.log(LogEvent {
            severity: Severity::Warning,
            code: ErrorCode(0),
            subject: own.to_string(),
            text,
        });
    }

    async fn heartbeat(&mut self, heartbeat: Heartbeat) -> Vec<LunIdentity> {
        let Some(id) = self.known else { return Vec::new() };
        let mounted = heartbeat.mounted.clone();
        let change = self.shared.blocking(move |shared| {
            shared
                .records
                .change(id, |record| record.mounted = own(&record.luns, &mounted))
        });
        let record = match change.await {
            Ok(Some(record)) => record,
            // Revoked: the kick ends this connection.
            Ok(None) => return Vec::new(),
            Err(refusal) => {
                tracing::error!(agent = %id, "{refusal}");
                return Vec::new();
            }
        };
        let now_unix_ms = jiff::Timestamp::now().as_millisecond();
        let unreached = self.shared.heard(id, self.number, &heartbeat, now_unix_ms);
        self.look_at_clock(&record, clock_off_seconds(heartbeat.clock_unix_ms, now_unix_ms));
        let frozen = heartbeat.frozen_ms.unwrap_or(0);
        let limit = u32::try_from(HOLD_MAX.as_millis()).unwrap_or(u32::MAX);
        if frozen > limit && !self.warned_frozen {
            self.warned_frozen = true;
            let text = format!(
                "{} has had file systems frozen for {} s: look at that host now",
                record.host,
                frozen / 1000
            );
            self.shared.event(code::AGENT_TROUBLE, id.to_string(), text);
        }
        if unreached {
            self.dial_back(&record);
        }
        self.shared.grants(&record)
    }

    /// Once a connection: a wrong clock stays wrong.
    fn look_at_clock(&mut self, record: &Record, off_seconds: Option<i64>) {
        let Some(off_seconds) = off_seconds.filter(|_| !self.warned_clock) else {
            return;
        };
        self.warned_clock = true;
        let way = if off_seconds > 0 { "ahead of" } else { "behind" };
        let text = format!(
            "the clock of {} ({}) is {} s {way} this target's: snapshots are not affected, but times in logs and records do not match; \
             set both by NTP",
            record.host,
            self.peer.ip(),
            off_seconds.unsigned_abs()
        );
        self.shared
            .event(code::AGENT_TROUBLE, record.id.to_string(), text.clone());
        self.end.log(LogEvent {
            severity: Severity::Warning,
            code: ErrorCode(0),
            subject: record.host.clone(),
            text,
        });
    }

    /// Tells the operator, and the agent, at once whether the target gets through to the agent's port.
    fn dial_back(&self, record: &Record) {
        let (shared, record, number, notes) = (
            Arc::clone(self.shared),
            record.clone(),
            self.number,
            self.notes.clone(),
        );
        self.shared.spawn(async move {
            let outcome = match dial(&shared, &record).await {
                Ok(link) => {
                    link.close().await;
                    Ok(())
                }
                Err(refusal) => Err(refusal),
            };
            let text = outcome.as_ref().err().map(|refusal| refusal.text.clone());
            if !shared.dialled_back(record.id, number, outcome.map_err(|refusal| refusal.text)) {
                return;
            }
            let note = match text {
                None => LogEvent {
                    severity: Severity::Info,
                    code: ErrorCode(0),
                    subject: record.host.clone(),
                    text: "the target reaches this agent".to_owned(),
                },
                Some(text) => {
                    shared.event(code::AGENT_TROUBLE, record.id.to_string(), text.clone());
                    LogEvent {
                        severity: Severity::Error,
                        code: ErrorCode::Unreachable,
                        subject: record.host.clone(),
                        text,
                    }
                }
            };
            // A connection that is gone, or busy with older notes, needs none.
            let _unsent = notes.try_send(note);
        });
    }

    /// The agent's own event log, as far as the operator should see it.
    fn log(&mut self, line: &LogEvent) {
        let Some(id) = self.known else { return };
        self.log_lines = self.log_lines.saturating_add(1);
        if self.log_lines > MAX_LOG_LINES {
            return;
        }
        let kind = if line.severity == Severity::Info {
            code::AGENT_CHANGED
        } else {
            code::AGENT_TROUBLE
        };
        let text = format!(
            "the agent says: {}: {}",
            Record::clip(&line.subject),
            Record::clip(&line.text)
        );
        self.shared.event(kind, id.to_string(), text);
    }

    fn leave(&self) {
        let Some(id) = self.known else { return };
        let mut live = self.shared.live();
        if live.get(&id).is_some_and(|live| live.number == self.number) {
            live.remove(&id);
            drop(live);
            self.shared
                .event(code::AGENT_CHANGED, id.to_string(), "disconnected".to_owned());
        }
    }
}

/// The LUNs of a report that the agent is allowed on.
fn own(allowed: &[LunId], reported: &[LunId]) -> Vec<LunId> {
    allowed
        .iter()
        .copied()
        .filter(|lun| reported.contains(lun))
        .take(MAX_LUNS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_connections_are_bounded_per_source_and_in_all() {
        let gate = Arc::new(Gate::default());
        let source = |n: u8| IpAddr::from([10, 0, 0, n]);
        let mut permits: Vec<_> = (0..4).filter_map(|_| gate.enter(source(1))).collect();
        assert_eq!(permits.len(), MAX_UNKNOWN_PER_SOURCE);
        assert!(gate.enter(source(1)).is_none());
        permits.pop();
        permits.extend(gate.enter(source(1)));
        for n in 2..=16 {
            permits.extend((0..4).filter_map(|_| gate.enter(source(n))));
        }
        assert_eq!(permits.len(), MAX_UNKNOWN);
        assert!(gate.enter(source(99)).is_none());
        drop(permits);
        assert!(gate.enter(source(99)).is_some());
        assert!(
            gate.0.lock().expect("not poisoned").is_empty(),
            "an empty source is forgotten"
        );
    }
}
