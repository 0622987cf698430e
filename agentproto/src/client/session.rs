//! One session at the agent.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::state::{Ending, Released, State};
use super::{Asked, FREEZE_DEADLINE, FreezeReport, Output, ThawReport, Work, keepalive_deadline, log};
use crate::error::{ErrorCode, Refusal};
use crate::freeze::Hold;
use crate::ident::{LunId, SessionId};
use crate::message::{
    Aborted, AppState, Completed, CutOutcome, Frozen, Level, Mode, Prepare, Prepared, Reply, Request,
    Require, SessionState, Severity, StatusReport, Thawed,
};

/// One step's request and its answer, kept for repeats.
#[derive(Debug)]
struct Step {
    content: Request,
    waiters: Vec<Asked>,
    answer: Option<Result<Reply, Refusal>>,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) luns: Vec<LunId>,
    pub(super) generation: u32,
    /// The channel that a freeze depends on.
    pub(super) channel: u64,
    /// When something was last heard on it.
    pub(super) heard: Instant,
    /// When it began, and once over: when it ended.
    pub(super) since: Instant,
    pub(super) state: State,
    mode: Mode,
    require: Require,
    steps: BTreeMap<u16, Step>,
    result: Option<Thawed>,
    last: Option<String>,
}

type Outputs = VecDeque<Output>;

impl Session {
    pub(super) fn preparing(now: Instant, asked: Asked, generation: u32, prepare: Prepare) -> Self {
        let mut session = Self {
            id: prepare.session,
            luns: prepare.luns.clone(),
            generation,
            channel: asked.channel,
            heard: now,
            since: now,
            state: State::Preparing,
            mode: prepare.mode,
            require: prepare.require,
            steps: BTreeMap::new(),
            result: None,
            last: None,
        };
        session.wait(asked, Request::Prepare(prepare));
        session
    }

    /// A session that was aborted before it was heard of.
    pub(super) fn aborted(now: Instant, id: SessionId, generation: u32) -> Self {
        Self {
            id,
            luns: Vec::new(),
            generation,
            channel: 0,
            heard: now,
            since: now,
            state: State::Aborted,
            mode: Mode::Filesystem,
            require: Require::BestEffort,
            steps: BTreeMap::new(),
            result: None,
            last: Some("aborted before it began".into()),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Completed | State::Aborted)
    }

    /// Whether a second session on one of its LUNs has to wait.
    pub(super) fn holds_luns(&self) -> bool {
        !matches!(
            self.state,
            State::Thawed { .. } | State::Cleaning { .. } | State::Completed | State::Aborted
        )
    }

    pub(super) fn state(&self) -> SessionState {
        match self.state {
            State::Preparing => SessionState::Preparing,
            State::Prepared { .. } => SessionState::Prepared,
            State::Freezing { .. } => SessionState::Freezing,
            State::Frozen { .. } => SessionState::Frozen,
            State::Thawing { .. } => SessionState::Thawing,
            State::Thawed { .. } | State::Cleaning { .. } => SessionState::Thawed,
            State::Completed => SessionState::Completed,
            State::Aborted => SessionState::Aborted,
        }
    }

    /// Which session a heartbeat tells about when there are several: what is frozen first.
    pub(super) fn urgency(&self) -> u8 {
        match self.state {
            State::Frozen { .. } | State::Thawing { .. } => 3,
            State::Freezing { .. } => 2,
            State::Preparing | State::Prepared { .. } => 1,
            _ => 0,
        }
    }

    fn hold(&self) -> Option<&Hold> {
        match &self.state {
            State::Freezing { hold, .. } | State::Thawing { hold, .. } => hold.as_ref(),
            State::Frozen { hold } => Some(hold),
            _ => None,
        }
    }

    pub(super) fn frozen_ms(&self, now: Instant) -> Option<u32> {
        self.hold().map(|hold| hold.held_ms(now))
    }

    pub(super) fn report(&self, now: Instant) -> StatusReport {
        let held_ms = self
            .frozen_ms(now)
            .or_else(|| self.result.as_ref().map(|thawed| thawed.held_ms));
        StatusReport {
            state: self.state(),
            session: Some(self.id),
            held_ms,
            last_result: self.last.clone(),
        }
    }

    pub(super) fn waiters(&self) -> Vec<Asked> {
        self.steps
            .values()
            .flat_map(|step| step.waiters.iter().copied())
            .collect()
    }

    pub(super) fn forget_channel(&mut self, channel: u64) {
        for step in self.steps.values_mut() {
            step.waiters.retain(|asked| asked.channel != channel);
        }
    }

    /// Handles a request that came before: the stored answer, or the same wait, or `Conflict`.
    pub(super) fn repeats(&mut self, asked: Asked, request: &Request, outputs: &mut Outputs) -> bool {
        let active = matches!(
            self.state,
            State::Preparing | State::Freezing { .. } | State::Frozen { .. }
        );
        let Some(step) = self.steps.get_mut(&request.message_type().0) else {
            return false;
        };
        // "valid in any state, idempotent": the reason of an Abort is a text for people, no content.
        if step.content != *request && !matches!(request, Request::Abort(_)) {
            let text = "this session had this request with other content";
            outputs.push_back(Output::Reply {
                asked,
                result: Err(Refusal::new(ErrorCode::Conflict, text)),
            });
            return true;
        }
        match &step.answer {
            Some(answer) => outputs.push_back(Output::Reply {
                asked,
                result: answer.clone(),
            }),
            None => step.waiters.push(asked),
        }
        // The target came back over another connection: that one counts from now on.
        if active {
            self.channel = asked.channel;
        }
        true
    }

    /// Remembers a request as one whose answer is still to come.
    fn wait(&mut self, asked: Asked, request: Request) {
        let number = request.message_type().0;
        self.steps.insert(
            number,
            Step {
                content: request,
                waiters: vec![asked],
                answer: None,
            },
        );
    }

    /// Answers a step, for those who wait and for repeats. A step that nobody asked for stays unanswered.
    fn answer(&mut self, number: u16, answer: Result<Reply, Refusal>, outputs: &mut Outputs) {
        let Some(step) = self.steps.get_mut(&number) else {
            return;
        };
        if step.answer.is_some() {
            return;
        }
        for asked in step.waiters.drain(..) {
            outputs.push_back(Output::Reply {
                asked,
                result: answer.clone(),
            });
        }
        step.answer = Some(answer);
    }

    /// A step that was not asked before.
    pub(super) fn step(
        &mut self,
        now: Instant,
        asked: Asked,
        request: Request,
        hold_max: Duration,
        outputs: &mut Outputs,
    ) {
        let number = request.message_type().0;
        match (&request, &self.state) {
            (Request::Freeze(freeze), State::Prepared { .. }) => {
                let hold = Duration::from_millis(u64::from(freeze.hold_ms)).min(hold_max);
                self.wait(asked, request);
                self.begin_freeze(now, asked.channel, hold, outputs);
            }
            (
                Request::Release(release),
                State::Freezing { .. } | State::Frozen { .. } | State::Thawing { .. },
            ) => {
                let taken = release.outcome == CutOutcome::Taken;
                self.wait(asked, request);
                self.release(now, taken, outputs);
            }
            (Request::Release(_), State::Thawed { .. }) if self.result.is_some() => {
                self.wait(asked, request);
                self.answer_release(outputs);
            }
            (Request::Complete(complete), State::Thawed { .. }) => {
                let recorded = Some(complete.level);
                self.wait(asked, request);
                self.clean(recorded, outputs);
            }
            (Request::Abort(abort), _) => {
                let why = format!("aborted by the target: {}", abort.reason);
                self.wait(asked, request);
                self.abort(now, &why, outputs);
            }
            _ => {
                let text = format!("the session is {}{}", self.state(), self.because());
                let refusal = Refusal::new(ErrorCode::WrongState, text);
                self.wait(asked, request);
                self.answer(number, Err(refusal), outputs);
            }
        }
    }

    fn because(&self) -> String {
        self.last
            .as_ref()
            .map(|last| format!(" ({last})"))
            .unwrap_or_default()
    }

    fn begin_freeze(&mut self, now: Instant, channel: u64, hold: Duration, outputs: &mut Outputs) {
        self.channel = channel;
        self.heard = now;
        self.state = State::Freezing {
            since: now,
            asked: hold,
            hold: None,
        };
        outputs.push_back(log(
            Severity::Info,
            ErrorCode(0),
            self.id.to_string(),
            "freeze begins",
        ));
        outputs.push_back(Output::Work(Work::Freeze {
            session: self.id,
            luns: self.luns.clone(),
            mode: self.mode,
            require: self.require,
            hold,
        }));
    }

    /// Release{Taken} of a hold that is in force is the only way to `hold_ok`.
    fn release(&mut self, now: Instant, taken: bool, outputs: &mut Outputs) {
        match &self.state {
            State::Frozen { hold } => {
                let in_time = hold.in_force(now);
                let released = (taken && in_time).then_some(Released);
                let why = match (taken, in_time) {
                    (true, true) => None,
                    (true, false) => Some("the hold had expired"),
                    (false, _) => Some("released without a cut"),
                };
                self.thaw(released, why, false, outputs);
            }
            State::Freezing { .. } => {
                self.fail_freeze(ErrorCode::WrongState, "released before it was frozen", outputs);
                self.thaw(None, Some("released before it was frozen"), false, outputs);
            }
            // Thawing for another reason already; the answer follows when it is done.
            _ => {}
        }
    }

    fn fail_freeze(&mut self, code: ErrorCode, why: &str, outputs: &mut Outputs) {
        self.answer(13, Err(Refusal::new(code, why)), outputs);
    }

    fn thaw(
        &mut self,
        released: Option<Released>,
        why: Option<&str>,
        then_clean: bool,
        outputs: &mut Outputs,
    ) {
        let hold = self.hold().copied();
        let why = why.map(str::to_owned);
        if let Some(why) = &why {
            self.last = Some(why.clone());
            outputs.push_back(log(
                Severity::Warning,
                ErrorCode::HoldExpired,
                self.id.to_string(),
                why.clone(),
            ));
        }
        self.state = State::Thawing {
            hold,
            released,
            why,
            then_clean,
        };
        outputs.push_back(Output::Work(Work::Thaw {
            session: self.id,
            released: released.is_some(),
        }));
    }

    fn clean(&mut self, recorded: Option<Level>, outputs: &mut Outputs) {
        self.state = State::Cleaning { recorded };
        outputs.push_back(Output::Work(Work::Clean {
            session: self.id,
            recorded,
        }));
    }

    fn abort(&mut self, now: Instant, why: &str, outputs: &mut Outputs) {
        match self.state {
            State::Completed | State::Aborted => self.answer_abort(None, outputs),
            _ => self.end(now, why, Ending::Clean, outputs),
        }
    }

    /// Ends what is under way: thaws what may be frozen, and cleans up if nobody will come back.
    pub(super) fn end(&mut self, _now: Instant, why: &str, ending: Ending, outputs: &mut Outputs) {
        let clean = ending == Ending::Clean;
        match &mut self.state {
            State::Freezing { .. } | State::Frozen { .. } => {
                self.fail_freeze(ErrorCode::HoldExpired, why, outputs);
                self.thaw(None, Some(why), clean, outputs);
            }
            State::Thawing { then_clean, .. } => *then_clean |= clean,
            State::Preparing | State::Prepared { .. } | State::Thawed { .. } if clean => {
                self.last = Some(why.to_owned());
                self.answer(12, Err(Refusal::new(ErrorCode::WrongState, why)), outputs);
                self.clean(None, outputs);
            }
            _ => {}
        }
    }

    pub(super) fn prepared(
        &mut self,
        now: Instant,
        result: Result<Prepared, Refusal>,
        outputs: &mut Outputs,
    ) {
        if !matches!(self.state, State::Preparing) {
            return;
        }
        match result {
            Ok(prepared) => {
                self.state = State::Prepared { since: now };
                self.answer(12, Ok(Reply::Prepare(prepared)), outputs);
            }
            Err(refusal) => {
                self.last = Some(refusal.to_string());
                self.answer(12, Err(refusal), outputs);
                self.clean(None, outputs);
            }
        }
    }

    pub(super) fn start_hold(&mut self, now: Instant, cap: Duration) -> Option<Instant> {
        let State::Freezing { asked, hold, .. } = &mut self.state else {
            return None;
        };
        let hold = hold.get_or_insert_with(|| Hold::start(now, *asked, cap));
        hold.in_force(now).then(|| hold.deadline())
    }

    pub(super) fn frozen(
        &mut self,
        now: Instant,
        result: Result<FreezeReport, Refusal>,
        outputs: &mut Outputs,
    ) {
        let State::Freezing { hold, .. } = &self.state else {
            return;
        };
        match (result, hold.filter(|hold| hold.in_force(now))) {
            (Ok(report), Some(hold)) => {
                let FreezeReport { volumes, apps } = report;
                let remaining_ms = hold.remaining_ms(now);
                self.state = State::Frozen { hold };
                outputs.push_back(log(Severity::Info, ErrorCode(0), self.id.to_string(), "frozen"));
                self.answer(
                    13,
                    Ok(Reply::Freeze(Frozen {
                        remaining_ms,
                        volumes,
                        apps,
                    })),
                    outputs,
                );
            }
            (Ok(_), None) => {
                self.fail_freeze(
                    ErrorCode::HoldExpired,
                    "freezing took longer than the hold",
                    outputs,
                );
                self.thaw(None, Some("freezing took longer than the hold"), false, outputs);
            }
            (Err(refusal), _) => {
                let why = refusal.to_string();
                self.answer(13, Err(refusal), outputs);
                self.thaw(None, Some(&why), false, outputs);
            }
        }
    }

    pub(super) fn thawed(&mut self, now: Instant, report: ThawReport, outputs: &mut Outputs) {
        let State::Thawing {
            hold,
            released,
            why,
            then_clean,
        } = &self.state
        else {
            return;
        };
        let failed = report.apps.iter().find(|app| app.state == AppState::Failed);
        let failed = failed.map(|app| format!("{} {} failed", app.kind, app.instance));
        let lost = (!report.in_force).then(|| "somebody else thawed it".to_owned());
        let reason = why.clone().or(report.reason).or(lost).or(failed);
        let hold_ok = released.is_some() && report.in_force && reason.is_none();
        let measured = report.held.and_then(|held| u32::try_from(held.as_millis()).ok());
        let held_ms = measured.unwrap_or_else(|| hold.map_or(0, |hold| hold.held_ms(now)));
        let then_clean = *then_clean;
        let text = format!(
            "thawed after {held_ms} ms{}",
            if hold_ok { "" } else { ", hold not proved" }
        );
        outputs.push_back(log(Severity::Info, ErrorCode(0), self.id.to_string(), text));
        self.last = reason.clone().or_else(|| Some("thawed in time".into()));
        self.result = Some(Thawed {
            held_ms,
            hold_ok,
            apps: report.apps,
            reason,
            documents: report.documents,
        });
        self.state = State::Thawed { since: now };
        self.answer_release(outputs);
        if then_clean {
            self.clean(None, outputs);
        }
    }

    fn answer_release(&mut self, outputs: &mut Outputs) {
        if let Some(thawed) = self.result.clone() {
            self.answer(14, Ok(Reply::Release(thawed)), outputs);
        }
    }

    fn answer_abort(&mut self, left_behind: Option<String>, outputs: &mut Outputs) {
        let held_ms = self.result.as_ref().map(|thawed| thawed.held_ms);
        self.answer(
            16,
            Ok(Reply::Abort(Aborted {
                held_ms,
                reason: left_behind,
            })),
            outputs,
        );
    }

    pub(super) fn cleaned(&mut self, now: Instant, left_behind: Option<String>, outputs: &mut Outputs) {
        let State::Cleaning { recorded } = self.state else {
            return;
        };
        self.since = now;
        self.state = if recorded.is_some() {
            State::Completed
        } else {
            State::Aborted
        };
        if let Some(left) = &left_behind {
            let text = format!("left behind: {left}");
            outputs.push_back(log(
                Severity::Warning,
                ErrorCode::Internal,
                self.id.to_string(),
                text,
            ));
        }
        self.answer(
            15,
            Ok(Reply::Complete(Completed {
                reason: left_behind.clone(),
            })),
            outputs,
        );
        self.answer_abort(left_behind, outputs);
    }

    /// When time changes something by itself.
    pub(super) fn deadline(&self, idle: Duration) -> Option<Instant> {
        match &self.state {
            State::Prepared { since } | State::Thawed { since } => Some(*since + idle),
            State::Freezing { since, hold, .. } => {
                let limit = hold.map_or(*since + FREEZE_DEADLINE, |hold| hold.deadline());
                Some(limit.min(keepalive_deadline(self.heard)))
            }
            State::Frozen { hold } => Some(hold.deadline().min(keepalive_deadline(self.heard))),
            _ => None,
        }
    }

    pub(super) fn expire(&mut self, now: Instant, idle: Duration, outputs: &mut Outputs) {
        if self.deadline(idle).is_none_or(|deadline| now < deadline) {
            return;
        }
        let frozen = self.hold().is_some_and(|hold| !hold.in_force(now));
        let (why, ending) = match self.state {
            State::Prepared { .. } => ("prepared, and no Freeze came", Ending::Clean),
            State::Thawed { .. } => ("thawed, and no Complete came", Ending::Clean),
            _ if frozen => ("the hold expired", Ending::Wait),
            _ if now >= keepalive_deadline(self.heard) => {
                ("nothing was heard from the target for 3 s", Ending::Wait)
            }
            _ => ("freezing took too long", Ending::Wait),
        };
        self.end(now, why, ending, outputs);
    }
}
