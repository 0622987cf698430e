//! The registration channel to one target, for as long as the target is enrolled: dial, register, heartbeat, dial again.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use stillpoint_agentproto::LunId;
use stillpoint_agentproto::message::{Heartbeat, LunIdentity, Severity};
use stillpoint_agentproto::registration::{AgentEnd, AgentEvent, LEASE, Purpose};

use crate::dial::{Dialled, dial};
use crate::engine::{Engine, Shared};
use crate::host;
use crate::link::Link;
use crate::state::{Identity, Target};
use crate::status::{Board, Connection};
use crate::tls::Exactly;

/// First pause after a failed connection; doubles each time.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause: a target that comes back is found again within half a minute.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The target's time to answer a heartbeat (agent-protocol.md §5); after it, it counts as lost.
const HEARTBEAT_TIME_MAX: Duration = Duration::from_secs(10);
/// How often the volumes are looked at: one that was just mounted must count in the next snapshot.
const MOUNTS_EVERY: Duration = Duration::from_secs(3);

/// One target's registration.
pub(crate) struct Registration {
    shared: Arc<Shared>,
    identity: Arc<Identity>,
    target: Target,
    engine: Arc<Engine>,
    board: Arc<Board>,
    /// When the target counts this agent as gone; its freezes are worth nothing then.
    lease_ends: Option<Instant>,
    said: Said,
    /// When the heartbeat without an answer was sent; they go one at a time.
    beat: Option<Instant>,
    /// Something changed since.
    again: bool,
}

/// What the target was told last; a difference is told at once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    mounted: Vec<LunId>,
    initiators: Vec<String>,
}

impl Registration {
    /// A registration that has not begun.
    pub(crate) fn new(
        shared: Arc<Shared>,
        identity: Arc<Identity>,
        target: Target,
        engine: Arc<Engine>,
        board: Arc<Board>,
    ) -> Self {
        Self {
            shared,
            identity,
            target,
            engine,
            board,
            lease_ends: None,
            said: Said::default(),
            beat: None,
            again: false,
        }
    }

    /// Runs for ever.
    pub(crate) async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            self.board.set(self.target.fingerprint, Connection::Connecting);
            let began = Instant::now();
            let error = match self.connection().await {
                // Dial again at once: what is registered has changed.
                Ok(()) => continue,
                Err(error) => format!("{error:#}"),
            };
            self.board
                .set(self.target.fingerprint, Connection::Down { error: error.clone() });
            // A connection that lasted was a good one: begin with short pauses again.
            if began.elapsed() > PAUSE_MAX {
                pause = PAUSE_MIN;
            }
            tracing::warn!(
                target = self.target.address(),
                error,
                again_in_ms = pause.as_millis(),
                "not registered"
            );
            self.rest(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Pauses (with up to a quarter more, so that a fleet does not knock in step) and watches the lease meanwhile.
    async fn rest(&mut self, pause: Duration) {
        let mut byte = [0];
        // Without randomness the pause is merely regular.
        getrandom::fill(&mut byte).ok();
        let until = Instant::now() + pause + pause * u32::from(byte[0]) / 1024;
        if let Some(lease) = self.lease_ends.filter(|lease| *lease <= until) {
            tokio::time::sleep_until(lease.into()).await;
            self.lease_lost();
        }
        tokio::time::sleep_until(until.into()).await;
    }

    fn lease_lost(&mut self) {
        self.lease_ends = None;
        self.engine.feed(|agent| agent.lease_lost(Instant::now()));
    }

    /// One connection, from dialling to its end. `Ok`: what only Register says has changed.
    async fn connection(&mut self) -> anyhow::Result<()> {
        let address = self.target.address();
        let pins = Arc::new(Exactly(self.target.fingerprint));
        let Dialled { stream, .. } = dial(&address, &self.identity, pins).await?;
        self.said = self.look().await?;
        let mut features = self.shared.features.subscribe();
        let capabilities = features.borrow_and_update().capabilities();
        let platform = self.shared.platform.as_ref();
        let register = host::register(
            platform,
            &self.shared.config,
            capabilities,
            self.said.mounted.clone(),
        );
        let generation = self.engine.feed(|agent| agent.generation());
        let hello = host::hello(self.identity.agent_id, capabilities);
        let end = AgentEnd::new(Instant::now(), hello, generation, Purpose::Register(register));
        let mut link = Link::new(stream, end);
        // Counts as sent until the registration is answered.
        (self.beat, self.again) = (Some(Instant::now()), false);
        let mut mounts = tokio::time::interval(MOUNTS_EVERY);
        let mut events = self.engine.events();
        loop {
            tokio::select! {
                event = link.event() => {
                    let event = event?;
                    if !self.event(&mut link.machine, event)? {
                        break;
                    }
                }
                _ = mounts.tick() => {
                    let now = self.look().await?;
                    if now.initiators != self.said.initiators {
                        break;
                    }
                    if now != self.said {
                        self.said = now;
                        self.heartbeat(&mut link.machine);
                    }
                }
                changed = features.changed() => {
                    if changed.is_ok() {
                        break;
                    }
                }
                () = self.engine.refresh.notified() => self.heartbeat(&mut link.machine),
                event = events.recv() => {
                    if let Ok(event) = event {
                        link.machine.log(event);
                    }
                }
            }
        }
        link.close().await;
        Ok(())
    }

    /// `false`: dial again, this connection is of no more use.
    fn event(&mut self, end: &mut AgentEnd, event: AgentEvent) -> anyhow::Result<bool> {
        let now = Instant::now();
        match event {
            AgentEvent::Hello { generation, .. } => {
                if let Err(refusal) = self.engine.feed(|agent| agent.fence(now, generation)) {
                    anyhow::bail!("{refusal}");
                }
            }
            AgentEvent::Registered { luns } => {
                let names: Vec<String> = luns.iter().map(|lun| lun.lun.to_string()).collect();
                let names = if names.is_empty() {
                    "none yet (`stillpoint agent allow`)".to_owned()
                } else {
                    names.join(", ")
                };
                let (address, listen) = (self.target.address(), self.shared.config.listen);
                tracing::info!(
                    "registered with {address} as {}, LUNs {names}, listening on {listen}",
                    self.identity.agent_id
                );
                self.granted(luns);
                self.answered(end);
            }
            AgentEvent::Luns(luns) => {
                self.granted(luns);
                self.answered(end);
            }
            AgentEvent::HeartbeatDue => self.heartbeat(end),
            AgentEvent::Refused(refusal) => anyhow::bail!("the target refused: {refusal}"),
            AgentEvent::LeaseLost => {
                self.lease_lost();
                return Ok(false);
            }
            AgentEvent::Log(event) => match event.severity {
                Severity::Info => tracing::info!(subject = event.subject, "the target says: {}", event.text),
                Severity::Warning => {
                    tracing::warn!(subject = event.subject, "the target says: {}", event.text)
                }
                Severity::Error => {
                    tracing::error!(subject = event.subject, "the target says: {}", event.text)
                }
            },
            // The provider has connections of its own.
            AgentEvent::Enrolled(_) | AgentEvent::Answer { .. } => {}
        }
        Ok(true)
    }

    fn granted(&mut self, luns: Vec<LunIdentity>) {
        self.lease_ends = Some(Instant::now() + LEASE);
        let names = luns.iter().map(|lun| lun.lun.to_string()).collect();
        let registered = Connection::Registered {
            luns: names,
            trouble: None,
        };
        self.board.set(self.target.fingerprint, registered);
        self.engine.set_grants(luns);
    }

    fn answered(&mut self, end: &mut AgentEnd) {
        self.beat = None;
        if std::mem::take(&mut self.again) {
            self.heartbeat(end);
        }
    }

    fn heartbeat(&mut self, end: &mut AgentEnd) {
        if self.beat.is_some_and(|sent| sent.elapsed() < HEARTBEAT_TIME_MAX) {
            self.again = true;
            return;
        }
        (self.beat, self.again) = (Some(Instant::now()), false);
        let (state, session, frozen_ms) = self.engine.in_flight();
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let heartbeat = Heartbeat {
            state,
            session,
            frozen_ms,
            clock_unix_ms: u64::try_from(clock.as_millis()).unwrap_or(u64::MAX),
            mounted: self.said.mounted.clone(),
        };
        end.heartbeat(Instant::now(), heartbeat);
    }

    /// What there is to say now. Before the target has said which LUNs are this agent's, every Stillpoint LUN counts.
    async fn look(&self) -> anyhow::Result<Said> {
        let shared = Arc::clone(&self.shared);
        let granted = self.engine.granted();
        let look = move || {
            let inventory = shared.platform.inventory();
            let ours = granted.unwrap_or_else(|| inventory.stillpoint_luns());
            Said {
                mounted: inventory.mounted(&ours),
                initiators: host::initiators(shared.platform.as_ref(), &shared.config),
            }
        };
        Ok(tokio::task::spawn_blocking(look).await?)
    }
}
