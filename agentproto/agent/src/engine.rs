//! The sessions with one target: feeds [`client::Agent`] and carries out what it says.
//!
//! ```text
//!  snapshot channels ──request──▶ ┌─────────┐ ──reply──▶ snapshot channels
//!  registration ──lease, grants─▶ │  Agent  │
//!  freeze threads ──frozen, … ──▶ │ (mutex) │ ──work──▶ freeze threads, blocking tasks
//!                     timer ────▶ └─────────┘
//! ```
//!
//! Any thread may feed the machine; one task ([`Engine::drive`]) acts on its outputs, in their order. A freeze lives on a
//! thread of its own that is there before anything is frozen and waits for its release: thawing needs no new thread.

mod vms;

use std::collections::HashMap;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stillpoint_agentproto::client::{self, Agent, Asked, FreezeReport, Output, ThawReport, Work};
use stillpoint_agentproto::message::{
    AppState, Capabilities, FrozenVolume, LogEvent, Mode, Reply, Severity, Volumes,
};
use stillpoint_agentproto::message::{LunIdentity, SessionState};
use stillpoint_agentproto::{ErrorCode, Fingerprint, LunId, Refusal, SessionId};
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::features::Features;
use crate::freeze::{Broken, FreezeError, Freezer, Hold, Order, Released, Settings};
use crate::host;
use crate::link::sleep_until;
use crate::plan::{self, Plan};
use crate::state::StateDir;
use crate::vcenter::{self, Vcenter};
use crate::volumes::Inventory;

/// How long a request for a LUN that is not granted waits for the target's newest word.
const GRANT_TIME_MAX: Duration = Duration::from_secs(5);

/// Lines for the operator that wait while the registration channel is busy.
const EVENTS_KEPT: usize = 64;

/// What all engines share.
pub(crate) struct Shared {
    /// The configuration.
    pub(crate) config: Config,
    /// For freezes.
    pub(crate) settings: Settings,
    /// Generations are stored here.
    pub(crate) state: StateDir,
    /// VMs on LUNs.
    pub(crate) vcenter: Arc<Vcenter>,
    /// What the operator chose; changes while the agent runs.
    pub(crate) features: Mutex<Features>,
}

impl Shared {
    /// What this agent takes part in now.
    pub(crate) fn features(&self) -> Features {
        lock(&self.features).clone()
    }

    /// The same for the wire: with a vCenter, VMs, too.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let vms = if self.vcenter.is_set() {
            Capabilities::VMWARE.0
        } else {
            0
        };
        Capabilities(self.features().capabilities().0 | vms)
    }

    /// The rules of a freeze that begins now.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            features: self.features(),
            ..self.settings.clone()
        }
    }
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
    /// What the target lets this agent do; `None` before the first registration.
    grants: watch::Sender<Option<Vec<LunIdentity>>>,
    /// Asks the registration channel for a heartbeat now: the answer brings the newest grants.
    pub(crate) refresh: Notify,
    /// The target got through to this agent.
    pub(crate) reached: Notify,
    /// Everything is over: [`Engine::drive`] ends.
    ended: CancellationToken,
    /// Lines for the operator, sent on the registration channel.
    events: broadcast::Sender<LogEvent>,
}

/// What belongs to a session between Prepare and Clean.
#[derive(Default)]
struct Live {
    plan: Option<Plan>,
    /// VM snapshots that Prepare made.
    vms: Option<vcenter::Prepared>,
    /// The hold of a session that has VMs only.
    vms_held: bool,
    freezing: Option<(Arc<Hold>, std_mpsc::Sender<bool>)>,
}

impl Engine {
    /// The sessions with a target.
    pub(crate) fn new(shared: Arc<Shared>, target: Fingerprint, generation: u32) -> Arc<Self> {
        let rules = client::Config {
            min_interval: shared.config.min_interval,
            hold_max: shared.config.hold_max,
            idle: vms::idle(&shared.vcenter),
        };
        Arc::new(Self {
            shared,
            target,
            machine: Mutex::new(Agent::new(rules, generation)),
            wake: Notify::new(),
            channels: Mutex::default(),
            sessions: Mutex::default(),
            grants: watch::Sender::new(None),
            refresh: Notify::new(),
            reached: Notify::new(),
            ended: CancellationToken::new(),
            events: broadcast::Sender::new(EVENTS_KEPT),
        })
    }

    /// What this agent takes part in now.
    pub(crate) fn capabilities(&self) -> Capabilities {
        self.shared.capabilities()
    }

    /// The pinned key.
    pub(crate) fn target(&self) -> Fingerprint {
        self.target
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
        self.reached.notify_one();
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
        self.grants
            .borrow()
            .as_ref()
            .map(|grants| grants.iter().map(|grant| grant.lun).collect())
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
            Output::Reply { asked, result } => self.reply(asked, result),
            Output::SaveGeneration(generation) => self.save_generation(generation),
            Output::Log(event) => self.log(event),
            Output::Work(work) => self.work(work),
        }
    }

    fn reply(&self, asked: Asked, result: Result<Reply, Refusal>) {
        if let Some(channel) = lock(&self.channels).get(&asked.channel)
            && channel.send((asked.id, result)).is_err()
        {
            tracing::debug!("an answer came too late for its channel");
        }
    }

    fn save_generation(&self, generation: u32) {
        if let Err(error) = self.shared.state.set_generation(self.target, generation) {
            tracing::error!(%error, "the target's generation cannot be kept: after a restart a stale target may be believed");
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
        // Without a registration channel nobody listens; this log has it all the same.
        if *severity != Severity::Info && self.events.send(event).is_err() {
            tracing::debug!("the target cannot be told now");
        }
    }

    fn work(self: &Arc<Self>, work: Work) {
        match work {
            Work::ListVolumes { asked, luns } => {
                tokio::spawn(Arc::clone(self).volumes(asked, luns));
            }
            Work::Preflight { asked, luns, mode } => {
                tokio::spawn(Arc::clone(self).findings(asked, luns, mode));
            }
            Work::Other { asked, request } => {
                tokio::spawn(Arc::clone(self).other(asked, request));
            }
            Work::Prepare(prepare) => {
                lock(&self.sessions).insert(prepare.session, Live::default());
                tokio::spawn(Arc::clone(self).prepare_all(prepare));
            }
            Work::Freeze { session, hold, .. } => self.freeze(session, hold),
            Work::Thaw { session, released } => self.thaw(session, released),
            Work::Clean { session, .. } => {
                // Prepare makes nothing on this host, but VM snapshots. A survey that still runs finds its session gone.
                tokio::spawn(Arc::clone(self).clean_vms(session));
            }
        }
    }

    /// `agent allow` on the target reaches this agent with the next heartbeat: a LUN that is not granted asks for one.
    async fn await_grants(&self, luns: &[LunId]) {
        let covered = |grants: &Option<Vec<LunIdentity>>| {
            grants.as_ref().is_some_and(|grants| {
                luns.iter()
                    .all(|lun| grants.iter().any(|grant| grant.lun == *lun))
            })
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

    fn inventory(&self) -> Inventory {
        plan::inventory(&self.shared.settings(), &self.shared.config.test_luns)
    }

    fn survey(&self, luns: &[LunId], mode: Mode) -> plan::Survey {
        let grants = self.grants.borrow().clone().unwrap_or_default();
        let (config, settings) = (&self.shared.config, self.shared.settings());
        plan::survey(
            &self.inventory(),
            &settings,
            &config.applications,
            luns,
            mode,
            Some(&grants),
        )
    }

    fn list(&self, luns: &[LunId]) -> Result<Reply, Refusal> {
        let granted = self.granted().unwrap_or_default();
        let luns: Vec<LunId> = luns.iter().copied().filter(|lun| granted.contains(lun)).collect();
        let hooks = plan::hooks(&self.shared.settings(), &self.shared.config.applications);
        let hooks = hooks.map_err(|error| Refusal::new(ErrorCode::HookFailed, error.to_string()))?;
        let initiators = host::initiators(&self.shared.settings.root, &self.shared.config);
        Ok(Reply::ListVolumes(Volumes {
            luns: plan::list(&self.inventory(), &hooks, &luns, &self.shared.config.standby),
            initiators,
        }))
    }

    fn freeze(self: &Arc<Self>, session: SessionId, hold_time: Duration) {
        if self.freeze_vms(session) {
            return;
        }
        let (release, released) = std_mpsc::channel();
        let hold = Hold::new();
        let plan = {
            let mut sessions = lock(&self.sessions);
            let live = sessions.entry(session).or_default();
            live.freezing = Some((Arc::clone(&hold), release));
            live.plan.clone()
        };
        let Some(plan) = plan else {
            return self.not_frozen(session, "the session has no plan");
        };
        let freeze = Freeze {
            engine: Arc::clone(self),
            session,
            plan,
            hold,
            hold_time,
        };
        let thread = std::thread::Builder::new().name("freeze".to_owned());
        if let Err(error) = thread.spawn(move || freeze.run(&released)) {
            self.not_frozen(session, &format!("no thread to freeze on: {error}"));
        }
    }

    /// Nothing was begun. The Thaw that follows is answered by [`Self::thaw`], because nobody waits for it.
    fn not_frozen(&self, session: SessionId, why: &str) {
        if let Some(live) = lock(&self.sessions).get_mut(&session) {
            live.freezing = None;
        }
        let refusal = Refusal::new(ErrorCode::Internal, why);
        self.feed(|agent| agent.frozen(Instant::now(), session, Err(refusal)));
    }

    fn thaw(&self, session: SessionId, released: bool) {
        if self.thaw_vms(session, released) {
            return;
        }
        let freezing = lock(&self.sessions)
            .get_mut(&session)
            .and_then(|live| live.freezing.take());
        let Some((hold, release)) = freezing else {
            let reason = Some("nothing was frozen".to_owned());
            let report = ThawReport {
                in_force: false,
                apps: Vec::new(),
                reason,
                held: None,
                documents: Vec::new(),
            };
            return self.feed(|agent| agent.thawed(Instant::now(), session, report));
        };
        // The thread waits for this word until it has it; it cannot be gone.
        if release.send(released).is_err() {
            tracing::error!(%session, "the freezing thread is gone; the guard thaws");
        }
        if !released {
            // It may still be freezing: what it has frozen thaws now. Not here, because a thaw writes the superblock
            // and may wait for a LUN that does not answer.
            let why = Broken::Asked("the hold was ended before its release".to_owned());
            tokio::task::spawn_blocking(move || hold.break_off(why));
        }
    }
}

/// One freeze, on its own thread.
struct Freeze {
    engine: Arc<Engine>,
    session: SessionId,
    plan: Plan,
    hold: Arc<Hold>,
    hold_time: Duration,
}

impl Freeze {
    fn run(self, release: &std_mpsc::Receiver<bool>) {
        let order = Order {
            session: self.session.to_string(),
            volumes: self.plan.volumes.clone(),
            hooks: self.plan.hooks.clone(),
            apps_may_fail: self.plan.apps_may_fail,
            hold: self.hold_time,
        };
        let (engine, session) = (&self.engine, self.session);
        let begin = || {
            engine
                .feed(|agent| agent.hold_started(Instant::now(), session))
                .is_some()
        };
        let report = match Freezer::freeze(&engine.shared.settings, &order, &self.hold, begin) {
            Ok(freezer) => {
                let report = self
                    .newcomer()
                    .map_or_else(|| Ok(self.freeze_report(&freezer)), Err);
                let vms = engine.vms_of(session);
                let report = report.map(|report| with_vms(report, vms.as_ref()));
                engine.feed(|agent| agent.frozen(Instant::now(), session, report));
                // A machine that is gone has no word any more: thaw.
                let released = release.recv().unwrap_or(false);
                let mut report = thaw_report(&freezer.release(released));
                if let Some(vms) = &vms {
                    report.apps.extend(vms.apps_in(AppState::Thawed));
                    report.documents = vms.documents();
                }
                match self.newcomer() {
                    None => report,
                    Some(late) => ThawReport {
                        in_force: false,
                        reason: Some(late.text),
                        ..report
                    },
                }
            }
            Err(failed) => {
                let (error, released) = *failed;
                engine.feed(|agent| agent.frozen(Instant::now(), session, Err(refusal(&error))));
                // Its word, `released` or not, changes nothing: everything is thawed already.
                release.recv().ok();
                let reason = Some(error.to_string());
                ThawReport {
                    in_force: false,
                    reason,
                    ..thaw_report(&released)
                }
            }
        };
        engine.feed(|agent| agent.thawed(Instant::now(), session, report));
    }

    /// Looks once everything is frozen, and again after the thaw: what was mounted in between was not held.
    fn newcomer(&self) -> Option<Refusal> {
        let point = self.plan.newcomer(&self.engine.inventory())?;
        let text = format!("{point} was mounted after Prepare and is not frozen: take the snapshot again");
        Some(Refusal::new(ErrorCode::NoQuiesce, text).about(point))
    }

    fn freeze_report(&self, freezer: &Freezer) -> FreezeReport {
        let on = |lun: &LunId| {
            let name = plan::naa(*lun);
            let volumes = self
                .plan
                .volumes
                .iter()
                .filter(move |volume| volume.naas.contains(&name));
            let lun = *lun;
            volumes.map(move |volume| FrozenVolume {
                lun,
                path: volume.name(),
                frozen: true,
                error: None,
            })
        };
        let volumes = self.plan.luns.iter().flat_map(on).collect();
        let app = |ran: &crate::freeze::HookResult| match ran.freeze_error.clone() {
            None => plan::app(&ran.hook, AppState::Frozen, None),
            error => plan::app(&ran.hook, AppState::Failed, error),
        };
        FreezeReport {
            volumes,
            apps: freezer.hooks().iter().filter_map(app).collect(),
        }
    }
}

/// The VMs beside the file systems.
fn with_vms(mut report: FreezeReport, vms: Option<&vcenter::Prepared>) -> FreezeReport {
    if let Some(vms) = vms {
        report.volumes.extend(vms.volumes.iter().cloned());
        report.apps.extend(vms.apps_in(AppState::Frozen));
    }
    report
}

/// A hook whose `freeze` failed (and was allowed to) took no part: it is not in the answer to Release.
fn thaw_report(released: &Released) -> ThawReport {
    let took_part = released.hooks.iter().filter(|ran| ran.freeze_error.is_none());
    let app = |ran: &crate::freeze::HookResult| match ran.thaw_error.clone() {
        None => plan::app(&ran.hook, AppState::Thawed, None),
        error => plan::app(&ran.hook, AppState::Failed, error),
    };
    ThawReport {
        in_force: released.broken.is_none(),
        apps: took_part.filter_map(app).collect(),
        reason: released.broken.as_ref().map(ToString::to_string),
        held: Some(released.held),
        documents: Vec::new(),
    }
}

fn refusal(error: &FreezeError) -> Refusal {
    let code = match error {
        FreezeError::Hook(_) => ErrorCode::HookFailed,
        FreezeError::Foreign { .. } => ErrorCode::Busy,
        FreezeError::Protected { .. } | FreezeError::Open { .. } | FreezeError::Refused { .. } => {
            ErrorCode::NoQuiesce
        }
        FreezeError::BrokenOff(_) => ErrorCode::HoldExpired,
        FreezeError::Guard(_) | FreezeError::Io { .. } => ErrorCode::Internal,
    };
    Refusal::new(code, error.to_string())
}

/// No code that holds one of these locks panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
