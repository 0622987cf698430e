//! The sessions with one target: feeds [`client::Agent`] and carries out what it says, with VSS.
//!
//! ```text
//!  snapshot channels ──request──▶ ┌─────────┐ ──reply──▶ snapshot channels
//!  registration ──lease, grants─▶ │  Agent  │
//!  VSS's calls ── hold, frozen ─▶ │ (mutex) │ ──work──▶ session threads (`session`), holds (`hold`)
//!                     timer ────▶ └─────────┘
//! ```

use std::collections::HashMap;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stillpoint_agentproto::client::{self, Agent, FreezeReport, Output, ThawReport, Work};
use stillpoint_agentproto::message::{
    BlobKind, Capabilities, Document, LogEvent, LunIdentity, Mode, PreflightReport, Prepare, Reply, Request,
    SessionState, Severity, Volumes,
};
use stillpoint_agentproto::{ErrorCode, Fingerprint, LunId, Refusal, SessionId};
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::documents::Documents;
use crate::features::Features;
use crate::hold::Hold;
use crate::hyperv::HyperV;
use crate::link::sleep_until;
use crate::plan::{self, Survey};
use crate::platform::Platform;
use crate::provider::Provider;
use crate::session::{Session, Teller, Word};
use crate::state::StateDir;

/// How long a request for a LUN that is not granted waits for the target's newest word.
const GRANT_TIME_MAX: Duration = Duration::from_secs(5);
/// Lines for the operator that wait while the registration channel is busy.
const EVENTS_KEPT: usize = 64;

/// What all engines share.
pub(crate) struct Shared {
    /// The configuration.
    pub(crate) config: Config,
    /// Generations are stored here.
    pub(crate) state: StateDir,
    /// The host.
    pub(crate) platform: Arc<dyn Platform>,
    /// Our hardware provider: VSS calls it also for our own backups.
    pub(crate) provider: Arc<Provider>,
    /// Checkpoints with memory.
    pub(crate) hyperv: HyperV,
    /// What takes part; changes while the agent runs.
    pub(crate) features: watch::Sender<Features>,
}

/// An answer on its way to a snapshot channel.
pub(crate) type Answer = (u32, Result<Reply, Refusal>);

/// The sessions with one target.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    target: Fingerprint,
    machine: Mutex<Agent>,
    wake: Notify,
    channels: Mutex<HashMap<u64, mpsc::UnboundedSender<Answer>>>,
    sessions: Mutex<HashMap<SessionId, Live>>,
    documents: Documents,
    /// What the target lets this agent do; `None` before the first registration.
    grants: watch::Sender<Option<Vec<LunIdentity>>>,
    /// Asks the registration channel for a heartbeat now: the answer brings the newest grants.
    pub(crate) refresh: Notify,
    ended: CancellationToken,
    events: broadcast::Sender<LogEvent>,
}

/// What belongs to a session between Prepare and Clean.
struct Live {
    words: std_mpsc::Sender<Word>,
    hold: Arc<Hold>,
    /// What Frozen will say; made by Prepare, because nothing is made while writes are held.
    report: Option<FreezeReport>,
}

impl Engine {
    /// The sessions with a target.
    pub(crate) fn new(shared: Arc<Shared>, target: Fingerprint, generation: u32) -> Arc<Self> {
        let rules = client::Config {
            min_interval: shared.config.min_interval,
            hold_max: shared.config.hold_max,
            ..client::Config::default()
        };
        Arc::new(Self {
            shared,
            target,
            machine: Mutex::new(Agent::new(rules, generation)),
            wake: Notify::new(),
            channels: Mutex::default(),
            sessions: Mutex::default(),
            documents: Documents::default(),
            grants: watch::Sender::new(None),
            refresh: Notify::new(),
            ended: CancellationToken::new(),
            events: broadcast::Sender::new(EVENTS_KEPT),
        })
    }

    /// What all engines share.
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The pinned key.
    pub(crate) fn target(&self) -> Fingerprint {
        self.target
    }

    /// What takes part now.
    pub(crate) fn features(&self) -> Features {
        *self.shared.features.borrow()
    }

    /// The same as the protocol tells it.
    pub(crate) fn capabilities(&self) -> Capabilities {
        self.features().capabilities()
    }

    /// Feeds the machine. Never held across anything that waits.
    pub(crate) fn feed<R>(&self, feed: impl FnOnce(&mut Agent) -> R) -> R {
        let result = feed(&mut lock(&self.machine));
        self.wake.notify_one();
        result
    }

    /// A snapshot channel is there; its answers come through the receiver.
    pub(crate) fn open_channel(&self, channel: u64) -> mpsc::UnboundedReceiver<Answer> {
        // Unbounded is bounded here: a channel has eight requests in flight at most, and each has one answer.
        let (answers, receiver) = mpsc::unbounded_channel();
        lock(&self.channels).insert(channel, answers);
        receiver
    }

    /// A snapshot channel is gone.
    pub(crate) fn close_channel(&self, channel: u64) {
        lock(&self.channels).remove(&channel);
        self.feed(|agent| agent.channel_lost(Instant::now(), channel));
    }

    /// How many snapshot channels the target has open.
    pub(crate) fn channels(&self) -> usize {
        lock(&self.channels).len()
    }

    /// The target's newest word on what this agent may do.
    pub(crate) fn set_grants(&self, grants: Vec<LunIdentity>) {
        self.grants.send_replace(Some(grants));
    }

    /// The LUNs of this target.
    pub(crate) fn granted(&self) -> Option<Vec<LunId>> {
        let grants = self.grants.borrow();
        let luns = grants.as_ref()?.iter().map(|grant| grant.lun);
        Some(luns.collect())
    }

    /// Lines for the operator.
    pub(crate) fn events(&self) -> broadcast::Receiver<LogEvent> {
        self.events.subscribe()
    }

    /// State, session and time frozen, for heartbeats.
    pub(crate) fn in_flight(&self) -> (SessionState, Option<SessionId>, Option<u32>) {
        lock(&self.machine).in_flight(Instant::now())
    }

    /// Runs the machine until [`Engine::stop`].
    pub(crate) async fn drive(self: Arc<Self>) {
        loop {
            while let Some(output) = self.next_output() {
                self.act(output);
            }
            let deadline = lock(&self.machine).poll_timeout();
            tokio::select! {
                () = self.wake.notified() => {}
                () = self.ended.cancelled() => return,
                () = sleep_until(deadline) => lock(&self.machine).handle_timeout(Instant::now()),
            }
        }
    }

    /// Thaws, cleans up and takes nothing new; returns when all is over, or after `wait`.
    pub(crate) async fn stop(&self, wait: Duration) {
        self.feed(|agent| agent.stop(Instant::now()));
        let idle = async {
            while !lock(&self.machine).is_idle() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(wait, idle).await.is_err() {
            tracing::warn!("a session was not cleaned up in time");
        }
        self.ended.cancel();
    }

    fn next_output(&self) -> Option<Output> {
        lock(&self.machine).poll_output()
    }

    fn act(self: &Arc<Self>, output: Output) {
        match output {
            Output::Reply { asked, result } => {
                if let Some(channel) = lock(&self.channels).get(&asked.channel)
                    && channel.send((asked.id, result)).is_err()
                {
                    tracing::debug!("an answer came too late for its channel");
                }
            }
            Output::SaveGeneration(generation) => {
                if let Err(error) = self.shared.state.set_generation(self.target, generation) {
                    tracing::error!(%error, "the target's generation cannot be kept: after a restart a stale target may be believed");
                }
            }
            Output::Log(event) => self.log(event),
            Output::Work(work) => self.work(work),
        }
    }

    fn log(&self, event: LogEvent) {
        let LogEvent {
            severity,
            subject,
            text,
            ..
        } = &event;
        match severity {
            Severity::Error => tracing::error!(session = subject, "{text}"),
            Severity::Warning => tracing::warn!(session = subject, "{text}"),
            Severity::Info => tracing::info!(session = subject, "{text}"),
        }
        if *severity != Severity::Info && self.events.send(event).is_err() {
            tracing::debug!("the target cannot be told now");
        }
    }

    fn work(self: &Arc<Self>, work: Work) {
        match work {
            Work::ListVolumes { asked, luns } => self.blocking(luns, move |engine, luns| {
                let volumes = engine.list(&luns);
                engine.feed(|agent| agent.answer(asked, Ok(Reply::ListVolumes(volumes))));
            }),
            Work::Preflight { asked, luns, mode } => self.blocking(luns, move |engine, luns| {
                let findings = engine.survey(&luns, mode).findings();
                engine.feed(|agent| agent.answer(asked, Ok(Reply::Preflight(PreflightReport { findings }))));
            }),
            Work::Other { asked, request } => {
                let result = self.other(request);
                self.feed(|agent| agent.answer(asked, result));
            }
            Work::Prepare(prepare) => self.prepare(prepare),
            Work::Freeze { session, .. } => {
                if !self.say(session, Word::Freeze) {
                    let refusal = Refusal::new(ErrorCode::Internal, "the session has no backup");
                    self.feed(|agent| agent.frozen(Instant::now(), session, Err(refusal)));
                }
            }
            Work::Thaw { session, released } => self.thaw(session, released),
            Work::Clean { session, recorded } => {
                self.documents.forget(session);
                let said = self.say(session, Word::Clean(recorded));
                let live = lock(&self.sessions).remove(&session);
                if let Some(live) = live.filter(|_| said) {
                    // VSS may be in the middle of something: it shall not go on.
                    live.hold.thaw(false);
                    return;
                }
                self.feed(|agent| agent.cleaned(Instant::now(), session, None));
            }
        }
    }

    fn say(&self, session: SessionId, word: Word) -> bool {
        lock(&self.sessions)
            .get(&session)
            .is_some_and(|live| live.words.send(word).is_ok())
    }

    /// Runs something that looks at the host, once the target's word on these LUNs is known.
    fn blocking(
        self: &Arc<Self>,
        luns: Vec<LunId>,
        run: impl FnOnce(&Arc<Self>, Vec<LunId>) + Send + 'static,
    ) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            engine.await_grants(&luns).await;
            let done = tokio::task::spawn_blocking(move || run(&engine, luns)).await;
            if let Err(error) = done {
                tracing::error!(%error, "a look at the host failed");
            }
        });
    }

    /// `agent allow` on the target reaches this agent with the next heartbeat: a LUN that is not granted asks for one.
    async fn await_grants(&self, luns: &[LunId]) {
        let covered = |grants: &Option<Vec<LunIdentity>>| {
            let granted = |lun: &LunId| grants.iter().flatten().any(|grant| grant.lun == *lun);
            grants.is_some() && luns.iter().all(granted)
        };
        let mut grants = self.grants.subscribe();
        if covered(&grants.borrow_and_update()) {
            return;
        }
        self.refresh.notify_one();
        let newest = async {
            if grants.changed().await.is_err() {
                tracing::debug!("nobody tells grants any more");
            }
        };
        // Without an answer the survey says NotAllowed.
        tokio::time::timeout(GRANT_TIME_MAX, newest).await.ok();
    }

    /// Looks at the host for a snapshot of these LUNs.
    pub(crate) fn survey(&self, luns: &[LunId], _mode: Mode) -> Survey {
        let grants = self.grants.borrow().clone().unwrap_or_default();
        let mut host = self.shared.platform.findings();
        if !self.features().vss_requester {
            let text = "the feature vss-requester is off at this agent: `stillpoint-agent features --enable vss-requester`";
            host.push(plan::error(ErrorCode::Unsupported, "vss-requester", text));
        }
        let inventory = self.shared.platform.inventory();
        if self.shared.config.memory_checkpoints && self.features().hyperv {
            host.extend(self.spread_vms(&inventory, luns));
        }
        plan::survey(inventory, luns, Some(&grants), host)
    }

    /// VMs that a checkpoint with memory cannot cover.
    fn spread_vms(
        &self,
        inventory: &crate::volumes::Inventory,
        luns: &[LunId],
    ) -> Vec<stillpoint_agentproto::message::Finding> {
        let finding = |code, subject, text| stillpoint_agentproto::message::Finding {
            code,
            severity: Severity::Warning,
            subject,
            text,
        };
        match self.shared.hyperv.spread(inventory, luns) {
            Ok(spread) => {
                let named = |(vm, other)| {
                    let text = format!(
                        "it has files on {other} too and will be left out: move all of it to one LUN"
                    );
                    finding(ErrorCode::LimitVmSpread, vm, text)
                };
                spread.into_iter().map(named).collect()
            }
            Err(why) => {
                let text = format!("the VMs of this host cannot be listed: {why}");
                vec![finding(ErrorCode::NoQuiesce, "Hyper-V".to_owned(), text)]
            }
        }
    }

    fn list(&self, luns: &[LunId]) -> Volumes {
        let granted = self.granted().unwrap_or_default();
        let luns: Vec<LunId> = luns.iter().copied().filter(|lun| granted.contains(lun)).collect();
        let platform = self.shared.platform.as_ref();
        Volumes {
            luns: plan::list(&platform.inventory(), &luns),
            initiators: crate::host::initiators(platform, &self.shared.config),
        }
    }

    fn other(&self, request: Request) -> Result<Reply, Refusal> {
        match request {
            Request::FetchBlob(ask) => self.documents.piece(&ask).map(Reply::FetchBlob),
            _ => Err(Refusal::new(
                ErrorCode::Unsupported,
                "an agent for Windows has no part in that",
            )),
        }
    }

    /// A document of a session, kept until it is cleaned; how Thawed names it.
    pub(crate) fn keep(&self, session: SessionId, kind: BlobKind, bytes: Vec<u8>) -> Option<Document> {
        self.documents.keep(session, kind, bytes)
    }

    fn prepare(self: &Arc<Self>, prepare: Prepare) {
        let session = prepare.session;
        let (words, listening) = std_mpsc::channel();
        let teller = Teller {
            engine: Arc::downgrade(self),
            session,
        };
        let hold = Arc::new(Hold::new(Box::new(teller)));
        let live = Live {
            words,
            hold: Arc::clone(&hold),
            report: None,
        };
        lock(&self.sessions).insert(session, live);
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            engine.await_grants(&prepare.luns).await;
            let thread = std::thread::Builder::new().name("vss".to_owned());
            let run = Session {
                engine: Arc::clone(&engine),
                prepare,
                hold,
            };
            if let Err(error) = thread.spawn(move || run.run(&listening)) {
                let refusal = Refusal::new(ErrorCode::Internal, format!("no thread for the backup: {error}"));
                engine.feed(|agent| agent.prepared(Instant::now(), session, Err(refusal)));
            }
        });
    }

    /// What Frozen will say.
    pub(crate) fn set_report(&self, session: SessionId, report: FreezeReport) {
        if let Some(live) = lock(&self.sessions).get_mut(&session) {
            live.report = Some(report);
        }
    }

    /// VSS holds the writes. Called within CommitSnapshots.
    pub(crate) fn frozen(&self, session: SessionId) {
        let report = lock(&self.sessions)
            .get_mut(&session)
            .and_then(|live| live.report.take());
        let report = report.ok_or_else(|| Refusal::new(ErrorCode::Internal, "the session was not prepared"));
        self.feed(|agent| agent.frozen(Instant::now(), session, report));
    }

    fn thaw(&self, session: SessionId, released: bool) {
        if let Some(live) = lock(&self.sessions).get(&session) {
            // Its thread answers when VSS has let go.
            return live.hold.thaw(released);
        }
        let report = ThawReport {
            in_force: false,
            apps: Vec::new(),
            reason: Some("nothing was frozen".to_owned()),
            documents: Vec::new(),
            held: None,
        };
        self.feed(|agent| agent.thawed(Instant::now(), session, report));
    }
}

/// No code that holds one of these locks panics half-way through a change.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
