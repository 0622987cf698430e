//! The coordinator: one machine per snapshot, on the target (specification §6, "Target, per snapshot").
//!
//! ```text
//! Preflight ─▶ Preparing ─▶ Settling ─▶ Freezing ─▶ Cutting ─▶ Releasing ─▶ Recording ─▶ Closing ─▶ Closed
//!     └───────────┴────────────┴───────────┴──── failure: Abort to all ──▶ on_failure = fail ─▶ Closing
//!                                                                     └──▶ crash-consistent ─▶ CutAlone ─▶ Recording
//! Releasing, level below what was asked, on_failure = fail ─▶ Discarding ─▶ Closing
//! ```
//! It says what to do ([`Action`]) and is told what happened. The LUN's I/O keeps flowing all the time: the agents'
//! flushes arrive as writes.

mod party;
mod rules;
mod verdict;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

pub use verdict::{AgentReport, Failure, LunLevel, Outcome, Phase, Times, Verdict};

use crate::error::{ErrorCode, Refusal};
use crate::freeze::{CUT_MAX, CutWindow, KEEPALIVE, Level, prove};
use crate::ident::{AgentId, Fingerprint, LunId, SessionId};
use crate::message::{
    Abort, Capabilities, Complete, CutOutcome, Freeze, ListVolumes, LunIdentity, Mode, Preflight, Prepare,
    Release, Reply, Request, Require, SessionState, Status,
};
use party::{Call, Party, Step};

/// Beyond a request's own deadline: time to dial.
const DIAL_GRACE: Duration = Duration::from_secs(6);
/// How long to wait between attempts to reach an agent that still has to hear Release or Abort.
const RETRY: Duration = Duration::from_millis(500);
/// An agent's rate limit is waited for, up to this.
const BUSY_WAIT_MAX: Duration = Duration::from_secs(15);
/// How long the verdict waits for the agents' last answers.
const VERDICT_WAIT: Duration = Duration::from_secs(3);
/// How long Release and Abort are repeated for an agent that cannot be reached.
const INSIST: Duration = Duration::from_secs(30);

/// What to do when the level asked for cannot be proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// No snapshot.
    Fail,
    /// A snapshot with what is proved, at least `crash`.
    CrashConsistent,
}

/// One LUN of the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunSpec {
    /// The operator's name for it.
    pub name: String,
    /// Everything that identifies it.
    pub identity: LunIdentity,
}

/// A session of an initiator to a LUN, as the target sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IscsiSession {
    /// The LUN.
    pub lun: LunId,
    /// The initiator's name.
    pub initiator: String,
}

/// The snapshot that is wanted.
#[derive(Clone, Debug)]
pub struct Spec {
    /// New for every snapshot.
    pub session: SessionId,
    /// The snapshot's name, told to the agents with Release.
    pub snapshot: String,
    /// The LUNs, cut together.
    pub luns: Vec<LunSpec>,
    /// The level asked for. (A `crash` snapshot asks no agent, and never gets here.)
    pub mode: Mode,
    /// What to do when it cannot be proved.
    pub on_failure: OnFailure,
    /// The hold to ask of Linux agents ([`crate::freeze::HOLD_DEFAULT`]).
    pub hold: Duration,
    /// The sessions on the LUNs now.
    pub sessions: Vec<IscsiSession>,
    /// What the target itself found against it (CHAP, several LUNs …): a failure of the preflight.
    pub refused: Option<Refusal>,
}

/// An agent that is allowed on at least one of the LUNs.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The agent.
    pub agent: AgentId,
    /// Its host.
    pub host: String,
    /// Its version.
    pub version: String,
    /// Its pinned key.
    pub fingerprint: Fingerprint,
    /// What it can do.
    pub capabilities: Capabilities,
    /// The LUNs of the set that it is allowed on.
    pub luns: Vec<LunId>,
    /// The LUNs that its last report had mounted.
    pub last_mounted: Vec<LunId>,
}

/// What the owner has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a request (dial first if there is no channel), answer with [`Coordinator::replied`]. What cannot be
    /// delivered is answered with the refusal `Unreachable`.
    Send {
        /// Number of the call.
        call: u64,
        /// To whom.
        agent: AgentId,
        /// What.
        request: Request,
    },
    /// Commit what is dirty, so that little is left inside the window; then [`Coordinator::settled`].
    Settle,
    /// Cut now; then [`Coordinator::cut_made`] as soon as it is made in RAM, and [`Coordinator::cut_durable`].
    Cut,
    /// Record these levels in one commit; then [`Coordinator::promoted`].
    Promote(Box<Verdict>),
    /// Delete the snapshot; then [`Coordinator::discarded`].
    Discard,
    /// This is what it came to. Agents may still be hearing Complete or Abort.
    Decided(Box<Verdict>),
    /// Everything is over: close the channels, let the next snapshot of these LUNs begin.
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Preflight,
    Preparing,
    Settling,
    Freezing {
        class: u8,
    },
    Cutting {
        asked: Instant,
    },
    /// No cut after 2 s: the agents thaw, the cut is waited for so that it can be thrown away or kept as `crash`.
    CutLate,
    /// After a failure, with `on_failure = crash-consistent`: nobody is frozen.
    CutAlone,
    Releasing,
    Recording,
    Discarding,
    Closing {
        verdict_by: Instant,
    },
    Closed,
}

/// The machine.
pub struct Coordinator {
    spec: Spec,
    parties: Vec<Party>,
    stage: Stage,
    began: Instant,
    window: CutWindow,
    next_ping: Option<Instant>,
    pings: BTreeMap<u64, usize>,
    next_call: u64,
    /// When the cut was made, Unix time in milliseconds.
    cut_made: Option<u64>,
    /// The commit that made the cut durable, once it came.
    durable: Option<Result<(), Refusal>>,
    /// LUNs that had an unknown session at the cut.
    strangers: BTreeMap<LunId, String>,
    kept: bool,
    failure: Option<Failure>,
    levels: Vec<LunLevel>,
    times: Times,
    decided: bool,
    actions: VecDeque<Action>,
}

impl Coordinator {
    /// Begins: asks every candidate what it sees.
    #[must_use]
    pub fn new(now: Instant, spec: Spec, candidates: Vec<Candidate>) -> Self {
        let levels = spec.luns.iter().map(|lun| LunLevel {
            lun: lun.identity.lun,
            level: Level::Crash,
            shortfalls: Vec::new(),
        });
        let mut machine = Self {
            levels: levels.collect(),
            parties: candidates.into_iter().map(Party::new).collect(),
            spec,
            stage: Stage::Preflight,
            began: now,
            window: CutWindow::default(),
            next_ping: None,
            pings: BTreeMap::new(),
            next_call: 1,
            cut_made: None,
            durable: None,
            strangers: BTreeMap::new(),
            kept: false,
            failure: None,
            times: Times::default(),
            decided: false,
            actions: VecDeque::new(),
        };
        for at in 0..machine.parties.len() {
            machine.send(now, at, Step::ListVolumes);
        }
        machine.advance(now);
        machine
    }

    /// What to do next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The answer to a call, or why there is none.
    pub fn replied(&mut self, now: Instant, call: u64, result: Result<Reply, Refusal>) {
        if let Some(at) = self.pings.remove(&call) {
            self.pinged(now, at, &result);
        } else if let Some(at) = self.position(call) {
            let step = self
                .parties
                .get_mut(at)
                .and_then(|party| party.call.take())
                .map(|call| call.step);
            if let Some(step) = step {
                self.answered(now, at, step, result);
            }
        }
        self.advance(now);
    }

    /// An agent's channel is gone. Its calls have been answered with `Unreachable` already.
    pub fn channel_lost(&mut self, now: Instant, agent: AgentId) {
        let Some(at) = self.parties.iter().position(|party| party.who.agent == agent) else {
            return;
        };
        let frozen = self.parties.get(at).is_some_and(|party| party.freeze_sent);
        if matches!(self.stage, Stage::Freezing { .. }) && frozen {
            let text = "the connection was lost while it was frozen: it thaws by itself";
            self.fail(
                now,
                Phase::Freeze,
                Some(at),
                Refusal::new(ErrorCode::Unreachable, text),
            );
            self.advance(now);
        }
    }

    /// The commit before the freeze is done (its failure is no reason to stop: the cut will tell).
    pub fn settled(&mut self, now: Instant) {
        if self.stage == Stage::Settling {
            self.times.freeze_sent_ms = Some(self.elapsed(now));
            self.next_ping = Some(now + KEEPALIVE);
            self.stage = Stage::Freezing { class: 0 };
            self.advance(now);
        }
    }

    /// The cut is made in RAM (at this Unix time in milliseconds, for the agents' logs), or not. `sessions` are those on
    /// the LUNs at that moment.
    pub fn cut_made(&mut self, now: Instant, result: Result<u64, String>, sessions: &[IscsiSession]) {
        match result {
            Ok(unix_ms) => {
                self.cut_made = Some(unix_ms);
                self.times.cut_ms = Some(self.elapsed(now));
                for lun in &self.spec.luns {
                    if let Some(refusal) = rules::strangers(lun, sessions, &self.parties) {
                        self.strangers.insert(lun.identity.lun, refusal.text);
                    }
                }
                match self.stage {
                    Stage::Cutting { .. } => self.release(now),
                    Stage::CutLate if self.spec.on_failure == OnFailure::Fail => {
                        self.stage = Stage::Discarding;
                        self.actions.push_back(Action::Discard);
                    }
                    Stage::CutLate => self.stage = Stage::CutAlone,
                    _ => {}
                }
            }
            Err(error) => self.cut_failed(now, &error),
        }
        self.advance(now);
    }

    fn cut_failed(&mut self, now: Instant, error: &str) {
        let refusal = Refusal::new(ErrorCode::Internal, format!("the store could not cut: {error}"));
        match self.stage {
            Stage::Cutting { .. } | Stage::CutLate | Stage::CutAlone => {
                self.note(Phase::Cut, None, refusal);
                self.abort_all(now);
                self.close(now);
            }
            _ => {}
        }
    }

    /// The commit that holds the cut is durable (or failed).
    pub fn cut_durable(&mut self, now: Instant, result: Result<(), String>) {
        let result = result.map_err(|error| {
            Refusal::new(
                ErrorCode::Internal,
                format!("the snapshot could not be made durable: {error}"),
            )
        });
        self.durable = Some(result);
        self.advance(now);
    }

    /// The levels are recorded (or not).
    pub fn promoted(&mut self, now: Instant, result: Result<(), String>) {
        if self.stage != Stage::Recording {
            return;
        }
        match result {
            Ok(()) => {
                self.kept = true;
                self.finish_agents(now);
                self.close(now);
            }
            Err(error) => {
                self.levels.iter_mut().for_each(|lun| lun.level = Level::Crash);
                let refusal = Refusal::new(
                    ErrorCode::Internal,
                    format!("the level could not be recorded: {error}"),
                );
                self.note(Phase::Record, None, refusal);
                self.conclude_failed(now);
            }
        }
        self.advance(now);
    }

    /// The snapshot is deleted (a failure leaves a `crash` snapshot, which is what it is).
    pub fn discarded(&mut self, now: Instant, result: Result<(), String>) {
        if self.stage != Stage::Discarding {
            return;
        }
        if let Err(error) = result {
            let text = format!("the snapshot could not be deleted, it stays as `crash`: {error}");
            self.note(Phase::Record, None, Refusal::new(ErrorCode::Internal, text));
        }
        self.abort_all(now);
        self.close(now);
        self.advance(now);
    }

    /// The daemon stops, or the operator gave up: before the cut everything is undone, after it, it is finished.
    pub fn cancel(&mut self, now: Instant, why: &str) {
        let before = matches!(
            self.stage,
            Stage::Preflight | Stage::Preparing | Stage::Settling | Stage::Freezing { .. }
        );
        if before {
            self.spec.on_failure = OnFailure::Fail;
            self.fail(
                now,
                Phase::Prepare,
                None,
                Refusal::new(ErrorCode::WrongState, why),
            );
            self.advance(now);
        }
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let stage = match self.stage {
            Stage::Freezing { .. } => self.window.cut_by(),
            Stage::Cutting { asked } => Some(asked + CUT_MAX),
            Stage::Closing { verdict_by } if !self.decided => Some(verdict_by),
            Stage::Closed => return None,
            _ => None,
        };
        let calls = self
            .parties
            .iter()
            .filter_map(|party| party.call.map(|call| call.deadline));
        let retries = self
            .parties
            .iter()
            .filter_map(|party| party.retry.map(|(at, _)| at));
        calls.chain(retries).chain(stage).chain(self.next_ping).min()
    }

    /// Lets deadlines pass.
    pub fn handle_timeout(&mut self, now: Instant) {
        for at in 0..self.parties.len() {
            self.party_timeout(now, at);
        }
        if self.next_ping.is_some_and(|ping| ping <= now) {
            self.ping(now);
        }
        match self.stage {
            Stage::Freezing { .. } if self.window.cut_by().is_some_and(|by| by <= now) => {
                let text = "not every agent was frozen before the first hold came to its end";
                self.fail(
                    now,
                    Phase::Freeze,
                    None,
                    Refusal::new(ErrorCode::HoldExpired, text),
                );
            }
            Stage::Cutting { asked } if asked + CUT_MAX <= now => {
                let text = format!("the store did not cut within {} s", CUT_MAX.as_secs());
                self.note(Phase::Cut, None, Refusal::new(ErrorCode::Deadline, text));
                self.abort_all(now);
                self.stage = Stage::CutLate;
            }
            _ => {}
        }
        self.advance(now);
    }

    fn party_timeout(&mut self, now: Instant, at: usize) {
        let Some(party) = self.parties.get_mut(at) else {
            return;
        };
        if let Some(call) = party.call.filter(|call| call.deadline <= now) {
            party.call = None;
            let refusal = Refusal::new(ErrorCode::Deadline, "no answer in time");
            self.answered(now, at, call.step, Err(refusal));
        } else if let Some((_, step)) = party.retry.filter(|(when, _)| *when <= now) {
            party.retry = None;
            self.send(now, at, step);
        }
    }

    fn position(&self, number: u64) -> Option<usize> {
        self.parties
            .iter()
            .position(|party| party.call.is_some_and(|call| call.number == number))
    }

    fn elapsed(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX)
    }

    fn send(&mut self, now: Instant, at: usize, step: Step) {
        let Some(party) = self.parties.get(at) else { return };
        let request = self.request(party, step);
        let deadline = now + request.deadline(party.who.capabilities) + DIAL_GRACE;
        let number = self.next_call;
        self.next_call += 1;
        let Some(party) = self.parties.get_mut(at) else {
            return;
        };
        party.call = Some(Call {
            number,
            step,
            deadline,
        });
        party.prepare_sent |= step == Step::Prepare;
        party.freeze_sent |= step == Step::Freeze;
        let agent = party.who.agent;
        self.actions.push_back(Action::Send {
            call: number,
            agent,
            request,
        });
    }

    fn request(&self, party: &Party, step: Step) -> Request {
        let session = self.spec.session;
        match step {
            Step::ListVolumes => Request::ListVolumes(ListVolumes {
                luns: party.who.luns.clone(),
            }),
            Step::Preflight => Request::Preflight(Preflight {
                luns: party.required_luns(),
                mode: self.spec.mode,
            }),
            Step::Prepare => {
                let all = self.spec.on_failure == OnFailure::Fail && self.spec.mode == Mode::Application;
                Request::Prepare(Prepare {
                    session,
                    luns: party.required_luns(),
                    mode: self.spec.mode,
                    hold_ms: party.hold_ms(self.spec.hold),
                    require: if all { Require::All } else { Require::BestEffort },
                })
            }
            Step::Freeze => Request::Freeze(Freeze {
                session,
                hold_ms: party.hold_ms(self.spec.hold),
            }),
            Step::Release => Request::Release(Release {
                session,
                outcome: CutOutcome::Taken,
                snapshot: Some(self.spec.snapshot.clone()),
                cut_unix_ms: self.cut_made,
            }),
            Step::Complete => {
                let level = self
                    .levels
                    .iter()
                    .map(|lun| lun.level)
                    .min()
                    .unwrap_or(Level::Crash);
                Request::Complete(Complete { session, level })
            }
            Step::Abort => {
                let why = self
                    .failure
                    .as_ref()
                    .map_or_else(|| "given up".into(), ToString::to_string);
                Request::Abort(Abort { session, reason: why })
            }
        }
    }

    fn answered(&mut self, now: Instant, at: usize, step: Step, result: Result<Reply, Refusal>) {
        let Some(party) = self.parties.get_mut(at) else {
            return;
        };
        match (step, result) {
            (Step::ListVolumes, Ok(Reply::ListVolumes(volumes))) => {
                party.volumes = Some(volumes);
                if party.is_required() {
                    self.send(now, at, Step::Preflight);
                }
            }
            (Step::Preflight, Ok(Reply::Preflight(report))) => party.findings = report.findings,
            (Step::Prepare, Ok(Reply::Prepare(prepared))) => party.prepared = Some(prepared),
            (Step::Freeze, Ok(Reply::Freeze(frozen))) => {
                self.window.narrow(now, frozen.remaining_ms);
                party.frozen = Some(frozen);
            }
            (Step::Release, Ok(Reply::Release(thawed))) => party.thawed = Some(thawed),
            (Step::Complete, Ok(_)) => {}
            (Step::Abort, Ok(_)) => party.aborted = true,
            (step, Ok(_)) => {
                let refusal = Refusal::new(ErrorCode::Malformed, "the answer is not the one to the request");
                self.refused(now, at, step, refusal);
            }
            (step, Err(refusal)) => self.refused(now, at, step, refusal),
        }
    }

    fn refused(&mut self, now: Instant, at: usize, step: Step, refusal: Refusal) {
        let Some(party) = self.parties.get_mut(at) else {
            return;
        };
        let unreached = matches!(refusal.code, ErrorCode::Unreachable | ErrorCode::Deadline);
        match step {
            // The rules look at these once everybody has answered.
            Step::ListVolumes | Step::Preflight => party.failed = Some(refusal),
            Step::Prepare => {
                let wait = refusal
                    .retry_after_ms
                    .map(|ms| Duration::from_millis(u64::from(ms)));
                match wait.filter(|wait| refusal.code == ErrorCode::Busy && *wait <= BUSY_WAIT_MAX) {
                    Some(wait) if self.stage == Stage::Preparing => {
                        party.retry = Some((now + wait, Step::Prepare))
                    }
                    _ => self.fail(now, Phase::Prepare, Some(at), refusal),
                }
            }
            Step::Freeze => self.fail(now, Phase::Freeze, Some(at), refusal),
            // A repeat over a new connection gets the stored answer, so a lost connection loses no proof.
            Step::Release | Step::Abort if unreached => {
                let give_up = *party.give_up.get_or_insert(now + INSIST);
                if now + RETRY < give_up {
                    party.retry = Some((now + RETRY, step));
                } else {
                    party.failed.get_or_insert(refusal);
                }
            }
            Step::Release | Step::Abort | Step::Complete => {
                party.failed.get_or_insert(refusal);
            }
        }
    }

    fn ping(&mut self, now: Instant) {
        let session = Some(self.spec.session);
        for at in 0..self.parties.len() {
            let Some(party) = self
                .parties
                .get(at)
                .filter(|party| party.freeze_sent && party.thawed.is_none())
            else {
                continue;
            };
            let agent = party.who.agent;
            // One ping at a time: a slow agent is not flooded, its channel's deadline ends it.
            if self.pings.values().any(|pinged| *pinged == at) {
                continue;
            }
            let call = self.next_call;
            self.next_call += 1;
            self.pings.insert(call, at);
            self.actions.push_back(Action::Send {
                call,
                agent,
                request: Request::Status(Status { session }),
            });
        }
        let frozen = matches!(
            self.stage,
            Stage::Freezing { .. } | Stage::Cutting { .. } | Stage::Releasing
        );
        self.next_ping = frozen.then(|| now + KEEPALIVE);
    }

    /// A ping's answer may tell that a hold is over before the cut: then there is no use in cutting.
    fn pinged(&mut self, now: Instant, at: usize, result: &Result<Reply, Refusal>) {
        let Ok(Reply::Status(report)) = result else { return };
        let frozen = self.parties.get(at).is_some_and(|party| party.frozen.is_some());
        let over = !matches!(report.state, SessionState::Frozen | SessionState::Freezing);
        if matches!(self.stage, Stage::Freezing { .. }) && frozen && over {
            let why = report
                .last_result
                .clone()
                .unwrap_or_else(|| "no reason given".into());
            let refusal = Refusal::new(ErrorCode::HoldExpired, format!("the hold is over already: {why}"));
            self.fail(now, Phase::Freeze, Some(at), refusal);
        }
    }

    /// Keeps the first thing that went wrong.
    fn note(&mut self, phase: Phase, at: Option<usize>, refusal: Refusal) {
        if let Some(party) = at.and_then(|at| self.parties.get_mut(at)) {
            party.failed.get_or_insert_with(|| refusal.clone());
        }
        let party = at.and_then(|at| self.parties.get(at));
        let agent = party.map(|party| party.who.agent);
        let host = party.map(|party| party.who.host.clone());
        self.failure.get_or_insert(Failure {
            phase,
            agent,
            host,
            refusal,
        });
    }

    /// A failure before the cut.
    fn fail(&mut self, now: Instant, phase: Phase, at: Option<usize>, refusal: Refusal) {
        self.note(phase, at, refusal);
        let before = matches!(
            self.stage,
            Stage::Preflight | Stage::Preparing | Stage::Settling | Stage::Freezing { .. }
        );
        if !before {
            return;
        }
        self.abort_all(now);
        match self.spec.on_failure {
            OnFailure::Fail => self.close(now),
            OnFailure::CrashConsistent => {
                self.stage = Stage::CutAlone;
                self.times.cut_asked_ms = Some(self.elapsed(now));
                self.actions.push_back(Action::Cut);
            }
        }
    }

    /// Abort to everybody who was asked to prepare. Why is in `failure`.
    fn abort_all(&mut self, now: Instant) {
        self.next_ping = None;
        for at in 0..self.parties.len() {
            let Some(party) = self.parties.get_mut(at) else {
                continue;
            };
            party.retry = None;
            party.call = None;
            party.give_up = None;
            if party.prepare_sent {
                self.send(now, at, Step::Abort);
            }
        }
    }

    fn all_settled(&self) -> bool {
        self.parties.iter().all(Party::is_settled)
    }

    /// Goes on as far as it can.
    fn advance(&mut self, now: Instant) {
        loop {
            let before = self.stage;
            match self.stage {
                Stage::Preflight if self.all_settled() => self.after_preflight(now),
                Stage::Preparing if self.all_settled() => self.after_prepare(now),
                Stage::Freezing { class } => self.freeze(now, class),
                Stage::CutAlone => self.cut_alone(now),
                Stage::Releasing if self.all_settled() => self.after_release(now),
                Stage::Closing { verdict_by } => self.closing(now, verdict_by),
                _ => {}
            }
            if self.stage == before {
                return;
            }
        }
    }

    fn after_preflight(&mut self, now: Instant) {
        if let Err((at, refusal)) = rules::preflight(&self.spec, &self.parties) {
            self.fail(now, Phase::Preflight, at, refusal);
            return;
        }
        self.stage = Stage::Preparing;
        for at in 0..self.parties.len() {
            if self.parties.get(at).is_some_and(Party::is_required) {
                self.send(now, at, Step::Prepare);
            }
        }
    }

    fn after_prepare(&mut self, now: Instant) {
        if self.spec.on_failure == OnFailure::Fail
            && let Err((at, refusal)) = rules::reachable(&self.spec, &self.parties)
        {
            self.fail(now, Phase::Prepare, at, refusal);
            return;
        }
        self.times.prepared_ms = Some(self.elapsed(now));
        self.stage = Stage::Settling;
        self.actions.push_back(Action::Settle);
    }

    fn freeze(&mut self, now: Instant, class: u8) {
        if !self.all_settled() {
            return;
        }
        let waiting = |party: &&Party| party.is_required() && !party.freeze_sent;
        let Some(next) = self.parties.iter().filter(waiting).map(Party::freeze_class).min() else {
            self.cut(now);
            return;
        };
        for at in 0..self.parties.len() {
            if self
                .parties
                .get(at)
                .is_some_and(|party| waiting(&party) && party.freeze_class() == next)
            {
                self.send(now, at, Step::Freeze);
            }
        }
        self.stage = Stage::Freezing {
            class: next.max(class),
        };
    }

    fn cut(&mut self, now: Instant) {
        self.times.frozen_ms = Some(self.elapsed(now));
        if !self.window.is_open(now) {
            let text = "no time was left for the cut when the last agent was frozen";
            self.fail(
                now,
                Phase::Freeze,
                None,
                Refusal::new(ErrorCode::HoldExpired, text),
            );
            return;
        }
        self.times.cut_asked_ms = Some(self.elapsed(now));
        self.stage = Stage::Cutting { asked: now };
        self.actions.push_back(Action::Cut);
    }

    fn release(&mut self, now: Instant) {
        self.stage = Stage::Releasing;
        for at in 0..self.parties.len() {
            if self.parties.get(at).is_some_and(|party| party.frozen.is_some()) {
                self.send(now, at, Step::Release);
            }
        }
    }

    fn cut_alone(&mut self, now: Instant) {
        if self.cut_made.is_some() && self.durable.is_some() {
            self.record(now);
        }
    }

    fn after_release(&mut self, now: Instant) {
        let elapsed = self.elapsed(now);
        self.times.thawed_ms.get_or_insert(elapsed);
        if self.durable.is_some() {
            self.prove();
            self.record(now);
        }
    }

    fn prove(&mut self) {
        for lun in &mut self.levels {
            let id = lun.lun;
            let required = self
                .parties
                .iter()
                .filter(|party| party.required_luns().contains(&id));
            let evidence: Vec<_> = required.map(Party::evidence).collect();
            let proof = prove(id, &evidence);
            (lun.level, lun.shortfalls) = (proof.level, proof.shortfalls);
            if let Some(stranger) = self.strangers.get(&id) {
                lun.level = Level::Crash;
                lun.shortfalls.insert(0, stranger.clone());
            }
            // Whoever asked for `filesystem` is told `filesystem`, also when applications happened to take part.
            if self.spec.mode == Mode::Filesystem {
                lun.level = lun.level.min(Level::Filesystem);
            }
        }
    }

    fn wanted(&self) -> Level {
        match self.spec.mode {
            Mode::Filesystem => Level::Filesystem,
            Mode::Application => Level::Application,
        }
    }

    fn record(&mut self, now: Instant) {
        if let Some(Err(refusal)) = self.durable.clone() {
            self.levels.iter_mut().for_each(|lun| lun.level = Level::Crash);
            self.note(Phase::Record, None, refusal);
            self.abort_all(now);
            self.close(now);
            return;
        }
        let wanted = self.wanted();
        if let Some(short) = self.levels.iter().find(|lun| lun.level < wanted) {
            let why = short.shortfalls.join("; ");
            let text = format!("only `{}` is proved: {why}", short.level);
            self.note(Phase::Release, None, Refusal::new(ErrorCode::HoldExpired, text));
            if self.spec.on_failure == OnFailure::Fail {
                self.stage = Stage::Discarding;
                self.actions.push_back(Action::Discard);
                return;
            }
        }
        self.stage = Stage::Recording;
        self.kept = true;
        let verdict = Box::new(self.verdict());
        self.kept = false;
        self.actions.push_back(Action::Promote(verdict));
    }

    fn conclude_failed(&mut self, now: Instant) {
        match self.spec.on_failure {
            OnFailure::Fail => {
                self.stage = Stage::Discarding;
                self.actions.push_back(Action::Discard);
            }
            OnFailure::CrashConsistent => {
                self.kept = true;
                self.abort_all(now);
                self.close(now);
            }
        }
    }

    /// Complete to those who thawed; those who are being aborted hear that already.
    fn finish_agents(&mut self, now: Instant) {
        for at in 0..self.parties.len() {
            if self
                .parties
                .get(at)
                .is_some_and(|party| party.thawed.is_some() && party.is_settled())
            {
                self.send(now, at, Step::Complete);
            } else if self
                .parties
                .get(at)
                .is_some_and(|party| party.prepare_sent && party.is_settled() && !party.aborted)
            {
                self.send(now, at, Step::Abort);
            }
        }
    }

    fn close(&mut self, now: Instant) {
        self.next_ping = None;
        self.stage = Stage::Closing {
            verdict_by: now + VERDICT_WAIT,
        };
    }

    fn closing(&mut self, now: Instant, verdict_by: Instant) {
        let over = self.all_settled();
        if (over || verdict_by <= now) && !self.decided {
            self.decided = true;
            let verdict = Box::new(self.verdict());
            self.actions.push_back(Action::Decided(verdict));
        }
        if over {
            self.stage = Stage::Closed;
            self.actions.push_back(Action::Closed);
        }
    }

    fn verdict(&self) -> Verdict {
        Verdict {
            kept: self.kept,
            levels: self.levels.clone(),
            failure: self.failure.clone(),
            agents: self.parties.iter().map(Party::report).collect(),
            times: self.times,
        }
    }
}
