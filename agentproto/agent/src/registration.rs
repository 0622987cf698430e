//! The registration channel to one target, for as long as the target is enrolled: dial, register, heartbeat, dial again.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use stillpoint_agentproto::message::{Capabilities, Heartbeat, LogEvent, LunIdentity, Severity};
use stillpoint_agentproto::registration::{AgentEnd, AgentEvent, LEASE, Purpose};
use stillpoint_agentproto::{ErrorCode, LunId};

use crate::dial::{DialError, Dialled, dial};
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
/// How often the mounts are looked at: a file system that was just mounted must count in the next snapshot.
const MOUNTS_EVERY: Duration = Duration::from_secs(3);

/// One target's registration.
pub(crate) struct Registration {
    pub(crate) shared: Arc<Shared>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) target: Target,
    pub(crate) engine: Arc<Engine>,
    pub(crate) board: Arc<Board>,
    /// When the target counts this agent as gone; its freezes are worth nothing then.
    lease_ends: Option<Instant>,
    said: Said,
    beat: Beat,
    /// Why the target does not reach this agent.
    trouble: Option<String>,
}

/// Heartbeats go one at a time (the target refuses a second one as it refuses any second request on this channel).
#[derive(Debug, Default)]
struct Beat {
    /// When the one without an answer was sent.
    sent: Option<Instant>,
    /// Something changed since.
    again: bool,
}

/// What the target was told last; a difference is told at once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    mounted: Vec<LunId>,
    initiators: Vec<String>,
    features: Capabilities,
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
            beat: Beat::default(),
            trouble: None,
        }
    }

    /// Runs for ever.
    pub(crate) async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            let began = Instant::now();
            let error = match self.connection().await {
                Ok(()) => "the connection is made anew".to_owned(),
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

    /// One connection, from dialling to its end.
    async fn connection(&mut self) -> anyhow::Result<()> {
        let address = self.target.address();
        let pins = Arc::new(Exactly(self.target.fingerprint));
        let Dialled { stream, .. } = dial(&address, &self.identity, pins)
            .await
            .map_err(|error| self.not_dialled(error))?;
        self.said = self.look().await?;
        let root = &self.shared.settings.root;
        let (features, mounted) = (self.said.features, self.said.mounted.clone());
        let mut register = host::register(root, &self.shared.config, features, mounted);
        register.initiators.clone_from(&self.said.initiators);
        let generation = self.engine.feed(|agent| agent.generation());
        let hello = host::hello(self.identity.agent_id, features);
        let end = AgentEnd::new(Instant::now(), hello, generation, Purpose::Register(register));
        let mut link = Link::new(stream, end);
        self.trouble = None;
        // Counts as sent until the registration is answered.
        self.beat = Beat {
            sent: Some(Instant::now()),
            again: false,
        };
        let mut mounts = tokio::time::interval(MOUNTS_EVERY);
        let mut events = self.engine.events();
        loop {
            tokio::select! {
                event = link.event() => {
                    let event = event?;
                    if !self.event(&mut link.machine, event)? {
                        link.close().await;
                        return Ok(());
                    }
                }
                _ = mounts.tick() => {
                    let now = self.look().await?;
                    if now.initiators != self.said.initiators || now.features != self.said.features {
                        // Only Register carries these.
                        link.close().await;
                        return Ok(());
                    }
                    if now != self.said {
                        self.said = now;
                        self.heartbeat(&mut link.machine);
                    }
                }
                () = self.engine.reached.notified() => self.reached(),
                () = self.engine.refresh.notified() => self.heartbeat(&mut link.machine),
                event = events.recv() => {
                    if let Ok(event) = event {
                        link.machine.log(event);
                    }
                }
            }
        }
    }

    /// A key that changed is nothing to get over by dialling again: says what it can mean.
    fn not_dialled(&self, error: DialError) -> anyhow::Error {
        let pinned = self.target.fingerprint;
        let host = &self.target.host;
        let text = match error {
            DialError::OtherKey { address, seen } => format!(
                "{address} shows the key {seen}, but {pinned} was pinned at the enrolment. If the target was installed anew: \
                 `stillpoint-agent unenrol {host}` here, `stillpoint agent token create` there, and enrol again. If not, \
                 another machine answers there: do not"
            ),
            other => return other.into(),
        };
        anyhow::anyhow!(text)
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
                self.registered(&luns);
                self.granted(luns);
                if std::mem::take(&mut self.beat).again {
                    self.heartbeat(end);
                }
            }
            AgentEvent::Luns(luns) => {
                self.granted(luns);
                self.beat.sent = None;
                if self.beat.again {
                    self.heartbeat(end);
                }
            }
            AgentEvent::HeartbeatDue => self.heartbeat(end),
            AgentEvent::Refused(refusal) => anyhow::bail!("the target refused: {refusal}"),
            AgentEvent::LeaseLost => {
                self.lease_lost();
                return Ok(false);
            }
            AgentEvent::Log(event) => {
                self.heed(&event);
                match event.severity {
                    Severity::Info => {
                        tracing::info!(subject = event.subject, "the target says: {}", event.text)
                    }
                    Severity::Warning => {
                        tracing::warn!(subject = event.subject, "the target says: {}", event.text)
                    }
                    Severity::Error => {
                        tracing::error!(subject = event.subject, "the target says: {}", event.text)
                    }
                }
            }
            AgentEvent::Enrolled(_) | AgentEvent::Answer { .. } => {}
        }
        Ok(true)
    }

    /// The one line that says that all is well.
    fn registered(&self, luns: &[LunIdentity]) {
        let names: Vec<String> = luns.iter().map(|lun| lun.lun.to_string()).collect();
        let luns = if names.is_empty() {
            "none yet (`stillpoint agent allow`)".to_owned()
        } else {
            names.join(", ")
        };
        tracing::info!(
            "registered with {} as {}, LUNs {luns}, listening on {}",
            self.target.address(),
            self.identity.agent_id,
            self.shared.config.listen
        );
        self.show(names);
    }

    /// What the target said of its way to this agent, for `status`.
    fn heed(&mut self, event: &LogEvent) {
        self.trouble = match (event.severity, event.code) {
            (Severity::Error, ErrorCode::Unreachable) => Some(event.text.clone()),
            (Severity::Info, _) => None,
            _ => return,
        };
        let luns = self.engine.granted().unwrap_or_default();
        self.show(luns.iter().map(ToString::to_string).collect());
    }

    /// What it said of the way is over, however it was opened.
    fn reached(&mut self) {
        if self.trouble.take().is_some() {
            let luns = self.engine.granted().unwrap_or_default();
            self.show(luns.iter().map(ToString::to_string).collect());
        }
    }

    fn show(&self, luns: Vec<String>) {
        let trouble = self.trouble.clone();
        self.board
            .set(self.target.fingerprint, Connection::Registered { luns, trouble });
    }

    fn granted(&mut self, luns: Vec<LunIdentity>) {
        self.lease_ends = Some(Instant::now() + LEASE);
        self.show(luns.iter().map(|lun| lun.lun.to_string()).collect());
        self.engine.set_grants(luns);
    }

    fn heartbeat(&mut self, end: &mut AgentEnd) {
        if self
            .beat
            .sent
            .is_some_and(|sent| sent.elapsed() < HEARTBEAT_TIME_MAX)
        {
            self.beat.again = true;
            return;
        }
        self.beat = Beat {
            sent: Some(Instant::now()),
            again: false,
        };
        let (state, session, frozen_ms) = self.engine.in_flight();
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let clock_unix_ms = u64::try_from(clock.as_millis()).unwrap_or(u64::MAX);
        let mounted = self.said.mounted.clone();
        end.heartbeat(
            Instant::now(),
            Heartbeat {
                state,
                session,
                frozen_ms,
                clock_unix_ms,
                mounted,
            },
        );
    }

    /// What there is to say now. Before the target has said which LUNs are this agent's, every Stillpoint LUN counts.
    async fn look(&self) -> anyhow::Result<Said> {
        let shared = Arc::clone(&self.shared);
        let granted = self.engine.granted();
        let look = move || {
            let root = &shared.settings.root;
            let inventory = crate::plan::inventory(&shared.settings(), &shared.config.test_luns);
            let ours = inventory
                .stillpoint_luns()
                .into_iter()
                .filter_map(|naa| naa.parse().ok());
            let ours: Vec<LunId> = granted.unwrap_or_else(|| ours.collect());
            let mut mounted = crate::plan::mounted(&inventory, &ours);
            mounted.extend(shared.vcenter.mounted(&ours));
            mounted.sort_unstable();
            mounted.dedup();
            let mut initiators = host::initiators(root, &shared.config);
            initiators.extend(shared.vcenter.initiators());
            initiators.truncate(host::INITIATORS_MAX);
            Said {
                mounted,
                initiators,
                features: shared.capabilities(),
            }
        };
        Ok(tokio::task::spawn_blocking(look).await?)
    }
}
