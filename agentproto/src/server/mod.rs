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

mod ask;
mod calls;
mod examine;
mod party;
mod rules;
mod steps;
#[cfg(test)]
mod tests;
mod verdict;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

pub use ask::{Action, Candidate, IscsiSession, LunSpec, OnFailure, Spec};
pub use examine::{Trouble, Witness, examine};
pub use verdict::{AgentReport, Failure, LunLevel, Outcome, Phase, Times, Verdict};

use crate::error::{ErrorCode, Refusal};
use crate::freeze::{CUT_MAX, CutWindow, KEEPALIVE, Level};
use crate::ident::{AgentId, LunId};
use crate::message::Reply;
use party::{Party, Step};

/// Beyond a request's own deadline: time to dial.
const DIAL_GRACE: Duration = Duration::from_secs(6);
/// How long to wait between attempts to reach an agent that still has to hear Release or Abort.
const RETRY: Duration = Duration::from_millis(500);
/// An agent's rate limit is waited for, up to this.
const BUSY_WAIT_MAX: Duration = Duration::from_secs(15);
/// How long the verdict waits for the agents' last answers.
const VERDICT_WAIT: Duration = Duration::from_secs(3);
/// How long Abort is repeated for an agent that cannot be reached.
const INSIST: Duration = Duration::from_secs(30);
/// How long Release is repeated for an agent whose registration is gone, too: it was killed, or its host is. Abort follows. (While it
/// is registered, Release is repeated to the end of its lease: it has thawed by itself long before, but keeps its answer, and with
/// it the proof.)
const INSIST_RELEASE: Duration = Duration::from_secs(10);

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

    /// Whether an agent's registration lives now (it is taken to live until this says otherwise).
    pub fn registered(&mut self, agent: AgentId, lives: bool) {
        if let Some(party) = self.parties.iter_mut().find(|party| party.who.agent == agent) {
            party.registered = lives;
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
                    if let Some(refusal) = rules::strangers(lun, sessions, &self.parties).into_iter().next() {
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
            party.unreached_since = None;
            if party.prepare_sent {
                self.send(now, at, Step::Abort);
            }
        }
    }

    fn all_settled(&self) -> bool {
        self.parties.iter().all(Party::is_settled)
    }
}
