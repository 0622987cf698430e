//! The registration channel (agent -> target): Hello, Enrol or Register with a lease, heartbeats (specification §§1, 2).
//!
//! ```text
//! agent:   Hello ─▶ [Enrol ─▶ Enrolled]  or  [provider's requests …]  or
//!           Register ─▶ Registered ─ Heartbeat every 30 s ─▶ …   no answer for the lease: Lost
//! target:  Hello ─▶ unknown key: Enrol only   known key: Register ─▶ Heartbeat …                 silent for the lease: Expired
//! ```

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::channel::{Channel, ChannelError, ChannelEvent, RequestError};
use crate::error::{ErrorCode, Refusal};
use crate::frame::{MAX_BODY, MAX_BODY_UNAUTHENTICATED};
use crate::ident::AgentId;
use crate::message::{
    Capabilities, Enrol, EnrolOk, Heartbeat, HeartbeatOk, Hello, LogEvent, LunIdentity, Register, RegisterOk,
    Reply, Request,
};

/// An agent counts as connected while its last heartbeat is younger than this.
pub const LEASE: Duration = Duration::from_secs(90);
/// How often an agent sends a heartbeat.
pub const HEARTBEAT: Duration = Duration::from_secs(30);

/// What the agent wants of the connection.
#[derive(Clone, Debug)]
pub enum Purpose {
    /// Enrol with a token, nothing else; the channel is closed afterwards.
    Enrol(Enrol),
    /// Register, and stay.
    Register(Register),
    /// Only the VSS provider's requests ([`AgentEnd::provider`]): no registration, no lease.
    Provide,
}

/// What the agent's end tells its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentEvent {
    /// The target's Hello: fence its generation ([`crate::client::Agent::fence`]); on a refusal drop the connection.
    Hello {
        /// What it says.
        hello: Hello,
        /// Its generation.
        generation: u32,
    },
    /// The target accepted the token: verify its MAC, then store its key.
    Enrolled(EnrolOk),
    /// Registered; the LUNs that may be seen and frozen.
    Registered {
        /// The allow-list.
        luns: Vec<LunIdentity>,
    },
    /// The allow-list as the last heartbeat's answer has it.
    Luns(Vec<LunIdentity>),
    /// Send the state: call [`AgentEnd::heartbeat`].
    HeartbeatDue,
    /// The target says no (to Hello, Enrol or Register): drop the connection.
    Refused(Refusal),
    /// The lease is over: thaw ([`crate::client::Agent::lease_lost`]), drop the connection, dial again.
    LeaseLost,
    /// The answer to a request of the VSS provider.
    Answer {
        /// What [`AgentEnd::provider`] gave.
        id: u32,
        /// The answer; `Deadline` when none came in time.
        result: Result<Reply, Refusal>,
    },
    /// A line from the target ("port 11169 is not reachable from here").
    Log(LogEvent),
}

/// The agent's end of the registration channel.
#[derive(Debug)]
pub struct AgentEnd {
    channel: Channel,
    purpose: Purpose,
    /// Once registered.
    lease: Option<Lease>,
    /// The provider's requests without an answer.
    provider: BTreeSet<u32>,
    events: VecDeque<AgentEvent>,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    length: Duration,
    interval: Duration,
    ends: Instant,
    next: Instant,
}

impl AgentEnd {
    /// Begins on a fresh TLS connection. `generation` is the highest seen of that target.
    #[must_use]
    pub fn new(now: Instant, hello: Hello, generation: u32, purpose: Purpose) -> Self {
        let channel = Channel::dial(now, hello, generation, MAX_BODY);
        Self {
            channel,
            purpose,
            lease: None,
            provider: BTreeSet::new(),
            events: VecDeque::new(),
        }
    }

    /// Takes bytes from the connection.
    ///
    /// # Errors
    /// Drop the connection.
    pub fn receive(&mut self, now: Instant, bytes: &[u8]) -> Result<(), ChannelError> {
        self.channel.receive(now, bytes)?;
        self.pump(now);
        Ok(())
    }

    fn pump(&mut self, now: Instant) {
        while let Some(event) = self.channel.poll_event() {
            match event {
                ChannelEvent::Opened { hello, generation } => {
                    self.events.push_back(AgentEvent::Hello { hello, generation });
                    self.ask(now);
                }
                ChannelEvent::HelloRefused(refusal) => self.events.push_back(AgentEvent::Refused(refusal)),
                ChannelEvent::Reply { id, result } if self.provider.remove(&id) => {
                    self.events.push_back(AgentEvent::Answer { id, result });
                }
                ChannelEvent::Reply { result, .. } => self.replied(now, result),
                ChannelEvent::Log(event) => self.events.push_back(AgentEvent::Log(event)),
                ChannelEvent::Request { id, .. } => {
                    let text = "the registration channel takes no requests from the target";
                    self.channel
                        .reply(id, Err(Refusal::new(ErrorCode::Unsupported, text)));
                }
                ChannelEvent::HelloAsked { .. }
                | ChannelEvent::VersionRefused(_)
                | ChannelEvent::Progress { .. } => {}
            }
        }
    }

    fn ask(&mut self, now: Instant) {
        let request = match self.purpose.clone() {
            Purpose::Enrol(enrol) => Request::Enrol(enrol),
            Purpose::Register(register) => Request::Register(register),
            Purpose::Provide => return,
        };
        self.send(now, request);
    }

    fn send(&mut self, now: Instant, request: Request) {
        if let Err(error) = self.channel.request(now, request, Capabilities::default()) {
            let refusal = Refusal::new(ErrorCode::TooLarge, error.to_string());
            self.events.push_back(AgentEvent::Refused(refusal));
        }
    }

    fn replied(&mut self, now: Instant, result: Result<Reply, Refusal>) {
        match result {
            Ok(Reply::Enrol(ok)) => self.events.push_back(AgentEvent::Enrolled(ok)),
            Ok(Reply::Register(RegisterOk {
                lease_ms,
                heartbeat_ms,
                luns,
            })) => {
                let length = Duration::from_millis(u64::from(lease_ms));
                // The target cannot make us hammer it, nor forget it.
                let interval = Duration::from_millis(u64::from(heartbeat_ms))
                    .clamp(Duration::from_millis(100), HEARTBEAT);
                self.lease = Some(Lease {
                    length,
                    interval,
                    ends: now + length,
                    next: now + interval,
                });
                self.events.push_back(AgentEvent::Registered { luns });
            }
            Ok(Reply::Heartbeat(HeartbeatOk { luns })) => {
                if let Some(lease) = &mut self.lease {
                    lease.ends = now + lease.length;
                }
                self.events.push_back(AgentEvent::Luns(luns));
            }
            Ok(_) => {}
            // A heartbeat that was not answered costs nothing yet: the lease counts.
            Err(refusal) if refusal.code == ErrorCode::Deadline && self.lease.is_some() => {}
            Err(refusal) => self.events.push_back(AgentEvent::Refused(refusal)),
        }
    }

    /// Sends a heartbeat: when it is due, or at once when something changed (frozen, mounted).
    pub fn heartbeat(&mut self, now: Instant, heartbeat: Heartbeat) {
        if let Some(lease) = &mut self.lease {
            lease.next = now + lease.interval;
            self.send(now, Request::Heartbeat(heartbeat));
        }
    }

    /// Sends a request of the VSS provider, once the Hello is through; its answer comes as [`AgentEvent::Answer`].
    /// A ProvQuery of no LUNs is a ping.
    ///
    /// # Errors
    /// Nothing was sent.
    pub fn provider(&mut self, now: Instant, request: Request) -> Result<u32, RequestError> {
        if !crate::provider::is_provider_request(&request) {
            return Err(RequestError::NotProvider);
        }
        let id = self.channel.request(now, request, Capabilities::default())?;
        self.provider.insert(id);
        Ok(id)
    }

    /// Sends a line for the operator's event log.
    pub fn log(&mut self, event: LogEvent) {
        self.channel.log(event);
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<AgentEvent> {
        self.events.pop_front()
    }

    /// The next bytes to send.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        self.channel.poll_transmit()
    }

    /// Whether nothing will come any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.channel.is_closed()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let lease = self.lease.map(|lease| lease.ends.min(lease.next));
        [self.channel.poll_timeout(), lease].into_iter().flatten().min()
    }

    /// Lets deadlines pass.
    ///
    /// # Errors
    /// Drop the connection.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), ChannelError> {
        self.channel.handle_timeout(now)?;
        self.pump(now);
        let Some(lease) = &mut self.lease else {
            return Ok(());
        };
        if lease.ends <= now {
            self.lease = None;
            self.events.push_back(AgentEvent::LeaseLost);
        } else if lease.next <= now {
            lease.next = now + lease.interval;
            self.events.push_back(AgentEvent::HeartbeatDue);
        }
        Ok(())
    }
}

/// Who is at the other end of a connection that the target accepted, by the key of its certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The pinned key of this agent.
    Known(AgentId),
    /// No agent has this key: it may enrol, nothing else.
    Unknown,
}

/// What the target's end tells its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// The agent said Hello (already answered). `generation` is the highest it has seen of this target: when it is above
    /// our own, our data directory came from a backup.
    Hello {
        /// What it says.
        hello: Hello,
        /// The highest generation it has seen.
        generation: u32,
    },
    /// Answer with [`TargetEnd::enrolled`].
    Enrol(Enrol),
    /// Answer with [`TargetEnd::registered`], then dial back.
    Register(Register),
    /// Answer with [`TargetEnd::heartbeat_ok`].
    Heartbeat(Heartbeat),
    /// A request of the VSS provider, from an agent whose key is known: hand it to [`crate::provider::serve`], on a task of
    /// its own, and answer with [`TargetEnd::provided`]. Several may wait at once.
    Provider {
        /// Its id on this connection.
        id: u32,
        /// What is asked.
        request: Request,
    },
    /// A line for the operator.
    Log(LogEvent),
    /// There is no version that both ends speak; the agent was told so. Tell the operator.
    VersionRefused(Refusal),
    /// No heartbeat within the lease: the agent is not connected any more; drop the connection.
    Expired,
}

/// The target's end of the registration channel.
#[derive(Debug)]
pub struct TargetEnd {
    channel: Channel,
    peer: Peer,
    pending: Option<u32>,
    /// Until when something has to come: Enrol or Register first, then heartbeats.
    expires: Instant,
    registered: bool,
    events: VecDeque<TargetEvent>,
}

impl TargetEnd {
    /// Begins on a connection whose TLS handshake is done.
    #[must_use]
    pub fn new(now: Instant, hello: Hello, generation: u32, peer: Peer) -> Self {
        let limit = if peer == Peer::Unknown {
            MAX_BODY_UNAUTHENTICATED
        } else {
            MAX_BODY
        };
        Self {
            channel: Channel::accepting(now, hello, generation, limit),
            peer,
            pending: None,
            expires: now + crate::channel::FRAME_TIMEOUT,
            registered: false,
            events: VecDeque::new(),
        }
    }

    /// Takes bytes from the connection.
    ///
    /// # Errors
    /// Drop the connection.
    pub fn receive(&mut self, now: Instant, bytes: &[u8]) -> Result<(), ChannelError> {
        self.channel.receive(now, bytes)?;
        while let Some(event) = self.channel.poll_event() {
            match event {
                ChannelEvent::HelloAsked { hello, generation } => self.hello(hello, generation),
                ChannelEvent::Request { id, request, .. } => self.request(now, id, request),
                ChannelEvent::Log(event) if self.registered => self.events.push_back(TargetEvent::Log(event)),
                ChannelEvent::VersionRefused(refusal) => {
                    self.events.push_back(TargetEvent::VersionRefused(refusal));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn hello(&mut self, hello: Hello, generation: u32) {
        match (&self.peer, hello.agent_id) {
            (Peer::Known(known), Some(said)) if *known != said => {
                let text = "this key is enrolled for another agent id: revoke it on the target, or restore the agent's id";
                self.channel.refuse(Refusal::new(ErrorCode::NotAllowed, text));
            }
            (_, None) => {
                self.channel.refuse(Refusal::new(
                    ErrorCode::Malformed,
                    "the Hello of an agent carries its agent_id",
                ));
            }
            _ => {
                self.channel.accept();
                self.events.push_back(TargetEvent::Hello { hello, generation });
            }
        }
    }

    fn request(&mut self, now: Instant, id: u32, request: Request) {
        if matches!(self.peer, Peer::Known(_)) && crate::provider::is_provider_request(&request) {
            if !self.registered {
                // A connection of the provider's own has no heartbeats: its requests keep it.
                self.expires = now + LEASE;
            }
            // Never behind a registration or a heartbeat: VSS holds writes meanwhile.
            self.events.push_back(TargetEvent::Provider { id, request });
            return;
        }
        if self.pending.is_some() {
            let text = "one request at a time on the registration channel";
            self.channel.reply(id, Err(Refusal::new(ErrorCode::Busy, text)));
            return;
        }
        let event = match (request, &self.peer) {
            (Request::Enrol(enrol), _) => TargetEvent::Enrol(enrol),
            (_, Peer::Unknown) => {
                let text =
                    "this agent is not enrolled (or was revoked): run `stillpoint-agent enrol TOKEN@HOST`";
                self.channel
                    .reply(id, Err(Refusal::new(ErrorCode::NotEnrolled, text)));
                return;
            }
            (Request::Register(register), Peer::Known(_)) => TargetEvent::Register(register),
            (Request::Heartbeat(heartbeat), Peer::Known(_)) if self.registered => {
                self.expires = now + LEASE;
                TargetEvent::Heartbeat(heartbeat)
            }
            (Request::Heartbeat(_), _) => {
                self.channel
                    .reply(id, Err(Refusal::new(ErrorCode::WrongState, "register first")));
                return;
            }
            (other, _) => {
                let text = format!(
                    "message {} is not for the registration channel",
                    other.message_type().0
                );
                self.channel
                    .reply(id, Err(Refusal::new(ErrorCode::Unsupported, text)));
                return;
            }
        };
        self.pending = Some(id);
        self.events.push_back(event);
    }

    fn reply(&mut self, result: Result<Reply, Refusal>) {
        if let Some(id) = self.pending.take() {
            self.channel.reply(id, result);
        }
    }

    /// Answers an Enrol with the target's MAC. The agent closes and comes back with its key pinned.
    pub fn enrolled(&mut self, result: Result<[u8; 32], Refusal>) {
        self.reply(result.map(|mac| Reply::Enrol(EnrolOk { mac })));
    }

    /// Answers a Register; the lease begins.
    pub fn registered(&mut self, now: Instant, result: Result<Vec<LunIdentity>, Refusal>) {
        if result.is_ok() {
            self.registered = true;
            self.expires = now + LEASE;
        }
        self.reply(result.map(|luns| {
            Reply::Register(RegisterOk {
                lease_ms: ms(LEASE),
                heartbeat_ms: ms(HEARTBEAT),
                luns,
            })
        }));
    }

    /// Answers a Heartbeat with the allow-list as it is now.
    pub fn heartbeat_ok(&mut self, luns: Vec<LunIdentity>) {
        self.reply(Ok(Reply::Heartbeat(HeartbeatOk { luns })));
    }

    /// Answers a request of the VSS provider.
    pub fn provided(&mut self, id: u32, result: Result<Reply, Refusal>) {
        self.channel.reply(id, result);
    }

    /// Sends a line for the agent's log.
    pub fn log(&mut self, event: LogEvent) {
        self.channel.log(event);
    }

    /// Whether the agent is registered.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        self.registered
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<TargetEvent> {
        self.events.pop_front()
    }

    /// The next bytes to send.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        self.channel.poll_transmit()
    }

    /// Whether the owner should read on.
    #[must_use]
    pub fn wants_receive(&self) -> bool {
        self.channel.wants_receive()
    }

    /// Whether nothing will come any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.channel.is_closed()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        self.channel
            .poll_timeout()
            .map_or(self.expires, |channel| channel.min(self.expires))
    }

    /// Lets deadlines pass.
    ///
    /// # Errors
    /// Drop the connection.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), ChannelError> {
        self.channel.handle_timeout(now)?;
        if self.expires <= now {
            self.events.push_back(TargetEvent::Expired);
        }
        Ok(())
    }
}

fn ms(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::SessionState;

    const AGENT: AgentId = AgentId([1; 16]);

    fn hello(agent_id: Option<AgentId>) -> Hello {
        let capabilities = Capabilities::default();
        Hello {
            min_version: 1,
            max_version: 1,
            agent_id,
            product: "x".into(),
            capabilities,
        }
    }

    fn register() -> Register {
        Register {
            host: "h".into(),
            os: "o".into(),
            agent_version: "1".into(),
            boot_id: "b".into(),
            advertise_host: None,
            listen_port: 11169,
            features: Capabilities::LINUX_FS,
            initiators: vec![],
            mounted: vec![],
        }
    }

    fn carry(now: Instant, agent: &mut AgentEnd, target: &mut TargetEnd) {
        while let Some(bytes) = agent.poll_transmit() {
            target.receive(now, &bytes).unwrap();
        }
        while let Some(bytes) = target.poll_transmit() {
            agent.receive(now, &bytes).unwrap();
        }
    }

    fn ends(now: Instant, peer: Peer) -> (AgentEnd, TargetEnd) {
        let mut agent = AgentEnd::new(now, hello(Some(AGENT)), 0, Purpose::Register(register()));
        let mut target = TargetEnd::new(now, hello(None), 4, peer);
        carry(now, &mut agent, &mut target);
        (agent, target)
    }

    fn registered(now: Instant) -> (AgentEnd, TargetEnd) {
        let (mut agent, mut target) = ends(now, Peer::Known(AGENT));
        carry(now, &mut agent, &mut target);
        assert!(matches!(target.poll_event(), Some(TargetEvent::Hello { .. })));
        assert_eq!(target.poll_event(), Some(TargetEvent::Register(register())));
        target.registered(now, Ok(vec![]));
        carry(now, &mut agent, &mut target);
        assert!(matches!(
            agent.poll_event(),
            Some(AgentEvent::Hello { generation: 4, .. })
        ));
        assert_eq!(agent.poll_event(), Some(AgentEvent::Registered { luns: vec![] }));
        (agent, target)
    }

    fn heartbeat() -> Heartbeat {
        Heartbeat {
            state: SessionState::Idle,
            session: None,
            frozen_ms: None,
            clock_unix_ms: 0,
            mounted: vec![],
        }
    }

    #[test]
    fn heartbeats_keep_both_leases_and_silence_ends_them() {
        let start = Instant::now();
        let (mut agent, mut target) = registered(start);
        let mut now = start;
        for _ in 0..10 {
            now += HEARTBEAT;
            agent.handle_timeout(now).unwrap();
            assert_eq!(agent.poll_event(), Some(AgentEvent::HeartbeatDue));
            agent.heartbeat(now, heartbeat());
            carry(now, &mut agent, &mut target);
            target.handle_timeout(now).unwrap();
            assert_eq!(target.poll_event(), Some(TargetEvent::Heartbeat(heartbeat())));
            target.heartbeat_ok(vec![]);
            carry(now, &mut agent, &mut target);
            assert_eq!(agent.poll_event(), Some(AgentEvent::Luns(vec![])));
        }
        now += LEASE;
        target.handle_timeout(now).unwrap();
        assert_eq!(target.poll_event(), Some(TargetEvent::Expired));
        agent.handle_timeout(now).unwrap();
        assert_eq!(agent.poll_event(), Some(AgentEvent::LeaseLost));
    }

    #[test]
    fn an_unknown_key_may_only_enrol() {
        let now = Instant::now();
        let (mut agent, mut target) = ends(now, Peer::Unknown);
        carry(now, &mut agent, &mut target);
        assert!(matches!(target.poll_event(), Some(TargetEvent::Hello { .. })));
        assert_eq!(
            target.poll_event(),
            None,
            "a Register of an unknown key never reaches the owner"
        );
        let refused = std::iter::from_fn(|| agent.poll_event()).find_map(|event| match event {
            AgentEvent::Refused(refusal) => Some(refusal.code),
            _ => None,
        });
        assert_eq!(refused, Some(ErrorCode::NotEnrolled));
    }

    #[test]
    fn a_key_speaks_for_its_own_agent_only() {
        let now = Instant::now();
        let (mut agent, target) = ends(now, Peer::Known(AgentId([2; 16])));
        assert!(target.is_closed());
        assert!(
            matches!(agent.poll_event(), Some(AgentEvent::Refused(refusal)) if refusal.code == ErrorCode::NotAllowed)
        );
    }

    #[test]
    fn whoever_says_hello_and_no_more_is_dropped() {
        let now = Instant::now();
        let mut target = TargetEnd::new(now, hello(None), 4, Peer::Unknown);
        let mut agent = Channel::dial(now, hello(Some(AGENT)), 0, MAX_BODY);
        target.receive(now, &agent.poll_transmit().unwrap()).unwrap();
        assert!(matches!(target.poll_event(), Some(TargetEvent::Hello { .. })));
        let at = target.poll_timeout();
        assert_eq!(at, now + crate::channel::FRAME_TIMEOUT);
        target.handle_timeout(at).unwrap();
        assert_eq!(target.poll_event(), Some(TargetEvent::Expired));
    }
}
