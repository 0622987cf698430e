//! Runs the coordinator of one snapshot against live agents and the store.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use stillpoint_agentproto::freeze::HOLD_DEFAULT;
use stillpoint_agentproto::message::{LunIdentity, Mode, Request};
use stillpoint_agentproto::registration::LEASE;
use stillpoint_agentproto::server::{
    Action, Candidate, Coordinator, IscsiSession, LunSpec, OnFailure, Phase, Spec, Verdict,
};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal as WireRefusal, SessionId};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio_util::task::TaskTracker;

use super::link::{Heard, speak};
use super::records::Record;
use super::view::LastFreeze;
use super::{Agents, Shared, limits};
use crate::serve::control::api::Refusal;
use crate::serve::events::code;

/// What the store does for a snapshot. Called one after another on a thread that may block.
pub(crate) trait Cutter: Send + 'static {
    /// Commits what is dirty, so that little is left to do while agents are frozen.
    fn settle(&mut self) -> anyhow::Result<()>;
    /// Cuts all LUNs of the set: returns as soon as the cut is made in RAM.
    fn cut(&mut self) -> anyhow::Result<()>;
    /// Waits until the cut is durable.
    fn commit(&mut self) -> anyhow::Result<()>;
    /// Records the levels (also when all are `crash`) in one durable commit.
    fn promote(&mut self, verdict: &Verdict) -> anyhow::Result<()>;
    /// Deletes what was made.
    fn discard(&mut self) -> anyhow::Result<()>;
}

/// The snapshot that is wanted. `crash` is not asked for here.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotAsk {
    /// Its name, as the agents' logs will show it.
    pub(crate) name: String,
    /// The LUNs, cut together.
    pub(crate) luns: Vec<String>,
    pub(crate) mode: Mode,
    pub(crate) on_failure: OnFailure,
}

impl Agents {
    /// Takes a snapshot with the agents of its LUNs. Goes on in the background when the caller does not wait any more.
    ///
    /// The cutter comes back with the verdict. Snapshots of one LUN wait for each other.
    pub(crate) async fn snapshot<C: Cutter>(
        &self,
        ask: SnapshotAsk,
        cutter: C,
        progress: impl Fn(String) + Send + 'static,
    ) -> (Verdict, C) {
        let (decided, verdict) = oneshot::channel();
        let shared = Arc::clone(&self.0);
        self.0.spawn(async move {
            let (spec, records) = plan(&shared, ask);
            let locks = lock(&shared, &spec).await;
            Run::new(shared, spec, records)
                .drive(cutter, progress, decided, locks)
                .await;
        });
        verdict
            .await
            .expect("a run always decides: it ends with its verdict or with the process")
    }
}

/// What is asked of whom.
fn plan(shared: &Shared, ask: SnapshotAsk) -> (Spec, Vec<Record>) {
    let mut refused = None;
    let mut luns = Vec::new();
    for name in &ask.luns {
        let facts = shared.site().and_then(|site| site.lun(name));
        let Some(facts) = facts else {
            let text = format!("LUN {name} is not served");
            refused.get_or_insert_with(|| WireRefusal::new(ErrorCode::NotAllowed, text));
            // Keeps the place, so that levels and LUNs stay in step; nothing is proved for it.
            let identity = LunIdentity {
                lun: LunId([0; 16]),
                serial: None,
                iqn: None,
                number: None,
                size_bytes: None,
            };
            luns.push(LunSpec {
                name: name.clone(),
                identity,
            });
            continue;
        };
        if let Err(refusal) = limits(&facts) {
            refused.get_or_insert(refusal);
        }
        luns.push(LunSpec {
            name: name.clone(),
            identity: facts.identity,
        });
    }
    if shared.bound.get().is_none() {
        let text = "this daemon takes no agents: add [agents] to the configuration, or take the snapshot with --consistency crash";
        refused.get_or_insert_with(|| WireRefusal::new(ErrorCode::Unsupported, text));
    }
    let sessions = sessions(shared, &luns);
    let allowed = |record: &Record| luns.iter().any(|lun| record.luns.contains(&lun.identity.lun));
    let records = if refused.is_none() {
        shared.records.all()
    } else {
        Vec::new()
    };
    let records = records.into_iter().filter(allowed).collect();
    let mut random = [0; 16];
    if let Err(error) = getrandom::fill(&mut random) {
        refused.get_or_insert_with(|| {
            WireRefusal::new(ErrorCode::Internal, format!("no random numbers: {error}"))
        });
    }
    let spec = Spec {
        session: SessionId::from_random(random),
        snapshot: ask.name,
        luns,
        mode: ask.mode,
        on_failure: ask.on_failure,
        hold: HOLD_DEFAULT,
        sessions,
        refused,
    };
    (spec, records)
}

/// What the coordinator knows of an agent beforehand.
pub(super) fn candidate(record: &Record, luns: &[LunSpec]) -> Candidate {
    let of_set = |lun: &LunSpec| {
        let id = lun.identity.lun;
        record.luns.contains(&id).then_some(id)
    };
    Candidate {
        agent: record.id,
        host: record.host.clone(),
        version: record.version.clone(),
        fingerprint: record.fingerprint,
        capabilities: record.features,
        luns: luns.iter().filter_map(of_set).collect(),
        last_mounted: record.mounted.clone(),
    }
}

pub(super) fn sessions(shared: &Shared, luns: &[LunSpec]) -> Vec<IscsiSession> {
    let Some(site) = shared.site() else {
        return Vec::new();
    };
    let of = |lun: &LunSpec| {
        let id = lun.identity.lun;
        site.initiators(&lun.name)
            .into_iter()
            .map(move |initiator| IscsiSession { lun: id, initiator })
    };
    luns.iter().flat_map(of).collect()
}

/// One snapshot per LUN at a time. Taken in the order of the LUNs, so that two sets never wait for each other.
async fn lock(shared: &Shared, spec: &Spec) -> Vec<OwnedMutexGuard<()>> {
    let mut luns: Vec<LunId> = spec.luns.iter().map(|lun| lun.identity.lun).collect();
    luns.sort_unstable();
    luns.dedup();
    let mut guards = Vec::new();
    for lun in luns {
        let lock = {
            let mut locks = shared.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(lun).or_default())
        };
        guards.push(lock.lock_owned().await);
    }
    guards
}

/// A step for the store's thread.
enum Job {
    Settle,
    Cut,
    Commit,
    Promote(Box<Verdict>),
    Discard,
}

/// What the store's thread did.
enum Done {
    Settled,
    Cut {
        at: Instant,
        unix_ms: u64,
        result: Result<(), String>,
    },
    Committed(Result<(), String>),
    Promoted(Result<(), String>),
    Discarded(Result<(), String>),
}

/// The thread that the cutter lives on.
fn work<C: Cutter>(mut cutter: C, mut jobs: UnboundedReceiver<Job>, done: &UnboundedSender<Done>) -> C {
    let text = |result: anyhow::Result<()>| result.map_err(|error| format!("{error:#}"));
    while let Some(job) = jobs.blocking_recv() {
        let what = match job {
            Job::Settle => {
                if let Err(error) = cutter.settle() {
                    tracing::warn!("the commit before the freeze failed: {error:#}");
                }
                Done::Settled
            }
            Job::Cut => {
                let result = text(cutter.cut());
                let unix_ms = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0);
                Done::Cut {
                    at: Instant::now(),
                    unix_ms,
                    result,
                }
            }
            Job::Commit => Done::Committed(text(cutter.commit())),
            Job::Promote(verdict) => Done::Promoted(text(cutter.promote(&verdict))),
            Job::Discard => Done::Discarded(text(cutter.discard())),
        };
        // Nobody listens any more: the run is over, the jobs will end too.
        let _over = done.send(what);
    }
    cutter
}

/// One snapshot under way.
struct Run {
    shared: Arc<Shared>,
    luns: Vec<LunSpec>,
    machine: Coordinator,
    asks: BTreeMap<AgentId, (UnboundedSender<(u64, Request)>, String)>,
    heard: UnboundedReceiver<Heard>,
    speakers: TaskTracker,
}

impl Run {
    fn new(shared: Arc<Shared>, spec: Spec, records: Vec<Record>) -> Self {
        let (tell, heard) = mpsc::unbounded_channel();
        let speakers = TaskTracker::new();
        let mut asks = BTreeMap::new();
        let mut candidates = Vec::new();
        for record in records {
            let (ask, to_ask) = mpsc::unbounded_channel();
            asks.insert(record.id, (ask, record.host.clone()));
            candidates.push(candidate(&record, &spec.luns));
            let (shared, tell) = (Arc::clone(&shared), tell.clone());
            speakers.spawn(async move { speak(&shared, &record, to_ask, &tell).await });
        }
        let luns = spec.luns.clone();
        let machine = Coordinator::new(Instant::now(), spec, candidates);
        Self {
            shared,
            luns,
            machine,
            asks,
            heard,
            speakers,
        }
    }

    async fn drive<C: Cutter>(
        mut self,
        cutter: C,
        progress: impl Fn(String) + Send,
        decided: oneshot::Sender<(Verdict, C)>,
        locks: Vec<OwnedMutexGuard<()>>,
    ) {
        let (jobs, to_do) = mpsc::unbounded_channel();
        let (done, mut results) = mpsc::unbounded_channel();
        let thread = tokio::task::spawn_blocking(move || work(cutter, to_do, &done));
        let shutdown = self
            .shared
            .tasks
            .get()
            .map(|(_, shutdown)| shutdown.clone())
            .unwrap_or_default();
        let mut cancelled = false;
        let mut end = Some((jobs, thread, decided, locks));
        loop {
            while let Some(action) = self.machine.poll_action() {
                match action {
                    Action::Send { call, agent, request } => self.send(call, agent, request, &progress),
                    Action::Settle => order(end.as_ref().map(|end| &end.0), Job::Settle),
                    Action::Cut => order(end.as_ref().map(|end| &end.0), Job::Cut),
                    Action::Promote(verdict) => order(end.as_ref().map(|end| &end.0), Job::Promote(verdict)),
                    Action::Discard => order(end.as_ref().map(|end| &end.0), Job::Discard),
                    Action::Decided(verdict) => {
                        self.remember(&verdict);
                        if let Some((jobs, thread, decided, locks)) = end.take() {
                            drop(jobs);
                            deliver(*verdict, thread, decided).await;
                            drop(locks);
                        }
                    }
                    Action::Closed => {
                        self.asks.clear();
                        self.speakers.close();
                        self.speakers.wait().await;
                        return;
                    }
                }
            }
            let timeout = self.machine.poll_timeout();
            tokio::select! {
                Some(heard) = self.heard.recv() => self.hear(heard, &progress),
                Some(done) = results.recv() => self.done(done, end.as_ref().map(|end| &end.0)),
                () = sleep_until(timeout) => self.machine.handle_timeout(Instant::now()),
                () = shutdown.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.machine.cancel(Instant::now(), "the daemon stops");
                }
            }
        }
    }

    fn send(&self, call: u64, agent: AgentId, request: Request, progress: &impl Fn(String)) {
        let Some((ask, host)) = self.asks.get(&agent) else {
            return;
        };
        if let Some(text) = step_text(&request) {
            progress(format!("{host}: {text}"));
        }
        if ask.send((call, request)).is_err() {
            tracing::debug!(%agent, "the task of the snapshot channel is gone");
        }
    }

    fn hear(&mut self, heard: Heard, progress: &impl Fn(String)) {
        let now = Instant::now();
        match heard {
            Heard::Reply { call, result } => {
                if result.is_err() {
                    self.look_at_leases();
                }
                self.machine.replied(now, call, result);
            }
            Heard::Progress(text) => progress(text),
            Heard::Lost(agent) => self.machine.channel_lost(now, agent),
        }
    }

    /// Tells the machine who is registered: what it repeats, and for how long, depends on it.
    fn look_at_leases(&mut self) {
        let live = self.shared.live();
        for agent in self.asks.keys() {
            let lives = live.get(agent).is_some_and(|live| live.heard.elapsed() < LEASE);
            self.machine.registered(*agent, lives);
        }
    }

    fn done(&mut self, done: Done, jobs: Option<&UnboundedSender<Job>>) {
        match done {
            Done::Settled => self.machine.settled(Instant::now()),
            Done::Cut { at, unix_ms, result } => {
                if result.is_ok() {
                    order(jobs, Job::Commit);
                }
                let sessions = sessions(&self.shared, &self.luns);
                self.machine.cut_made(at, result.map(|()| unix_ms), &sessions);
            }
            Done::Committed(result) => self.machine.cut_durable(Instant::now(), result),
            Done::Promoted(result) => self.machine.promoted(Instant::now(), result),
            Done::Discarded(result) => self.machine.discarded(Instant::now(), result),
        }
    }

    fn remember(&self, verdict: &Verdict) {
        let at = jiff::Timestamp::now().to_string();
        let mut last = self
            .shared
            .last_freeze
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for agent in verdict.agents.iter().filter(|agent| agent.held_ms.is_some()) {
            let outcome = serde_json::to_value(agent.outcome)
                .ok()
                .and_then(|value| value.as_str().map(str::to_owned));
            let freeze = LastFreeze {
                at: at.clone(),
                outcome: outcome.unwrap_or_default(),
                held_ms: agent.held_ms,
            };
            last.insert(agent.id, freeze);
        }
        drop(last);
        for agent in &verdict.agents {
            if let (Some(detail), true) = (&agent.detail, verdict.failure.is_some()) {
                self.shared.event(
                    code::AGENT_TROUBLE,
                    agent.id.to_string(),
                    format!("in a snapshot: {detail}"),
                );
            }
        }
    }
}

fn order(jobs: Option<&UnboundedSender<Job>>, job: Job) {
    // The thread lives until the sender is dropped, which happens with the verdict; nothing is ordered after that.
    if let Some(jobs) = jobs
        && jobs.send(job).is_err()
    {
        tracing::error!("the store's thread of a snapshot is gone");
    }
}

async fn deliver<C>(
    verdict: Verdict,
    thread: tokio::task::JoinHandle<C>,
    decided: oneshot::Sender<(Verdict, C)>,
) {
    match thread.await {
        // Whoever asked may have gone away: the snapshot is recorded all the same.
        Ok(cutter) => drop(decided.send((verdict, cutter))),
        Err(error) => std::panic::resume_unwind(Box::new(error.to_string())),
    }
}

fn step_text(request: &Request) -> Option<&'static str> {
    match request {
        Request::ListVolumes(_) => Some("asking"),
        Request::Prepare(_) => Some("preparing"),
        Request::Freeze(_) => Some("freezing"),
        Request::Release(_) => Some("thawing"),
        Request::Abort(_) => Some("aborting"),
        _ => None,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// How a refusal of the protocol is told to the operator.
pub(super) fn wire_refusal(refusal: &WireRefusal) -> Refusal {
    told(refusal, refusal.text.clone())
}

/// Why there is no snapshot: what `snapshot create` says when a verdict was not kept.
pub(crate) fn refusal(verdict: &Verdict) -> Refusal {
    let Some(failure) = &verdict.failure else {
        return Refusal::failed(
            "internal",
            "no snapshot was taken, and nothing says why",
            "report this",
        );
    };
    let mut told = told(&failure.refusal, failure.to_string());
    if failure.phase == Phase::Cut {
        told.exit = crate::serve::control::api::EXIT_FAILED;
    }
    let of_agent = |agent: &stillpoint_agentproto::server::AgentReport| {
        agent
            .detail
            .as_ref()
            .map(|detail| format!("{} ({}): {detail}", agent.host, agent.id))
    };
    told.with_details(verdict.agents.iter().filter_map(of_agent).collect())
}

fn told(refusal: &WireRefusal, message: String) -> Refusal {
    let word = code_word(refusal.code);
    if refusal.code == ErrorCode::Internal {
        return Refusal::failed(&word, message, "see `stillpoint events`");
    }
    Refusal::refused(&word, message, hint(refusal.code))
}

/// The protocol's code as a word for scripts: `limit_chap`.
pub(super) fn code_word(code: ErrorCode) -> String {
    code.name().map_or_else(|| "agent".to_owned(), snake)
}

/// `LimitChap` as `limit_chap`.
fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

fn hint(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Unreachable => {
            "`stillpoint agent test ID` tries again; `--on-failure crash-consistent` takes what can be proved"
        }
        ErrorCode::NotMounted => {
            "`stillpoint agent list` shows who is there; `--consistency crash` needs no agent"
        }
        ErrorCode::StaleGeneration => "`stillpoint agent generation bump`",
        ErrorCode::HoldExpired => {
            "look at the agent's log, then try again; `--on-failure crash-consistent` takes what can be proved"
        }
        ErrorCode::Busy => "try again in a moment",
        ErrorCode::HookFailed | ErrorCode::WriterFailed => {
            "look at the agent's log on that host, then try again"
        }
        ErrorCode::LimitMpio | ErrorCode::LimitChap | ErrorCode::LimitMultiLun => {
            "agents need one path, no CHAP and a target of their own"
        }
        _ => "`stillpoint agent test ID` shows what the agent sees; `--consistency crash` needs no agent",
    }
}
