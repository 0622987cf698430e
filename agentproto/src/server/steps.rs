//! From stage to stage: what has to be settled before the next one, and how a snapshot ends.

use std::time::Instant;

use super::party::{Party, Step};
use super::verdict::{Phase, Verdict};
use super::{Action, Coordinator, OnFailure, Stage, VERDICT_WAIT, rules};
use crate::error::{ErrorCode, Refusal};
use crate::freeze::{Level, prove};
use crate::message::Mode;

impl Coordinator {
    /// Goes on as far as it can.
    pub(super) fn advance(&mut self, now: Instant) {
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

    pub(super) fn after_preflight(&mut self, now: Instant) {
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

    pub(super) fn after_prepare(&mut self, now: Instant) {
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

    pub(super) fn freeze(&mut self, now: Instant, class: u8) {
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

    pub(super) fn cut(&mut self, now: Instant) {
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

    pub(super) fn release(&mut self, now: Instant) {
        self.stage = Stage::Releasing;
        for at in 0..self.parties.len() {
            if self.parties.get(at).is_some_and(|party| party.frozen.is_some()) {
                self.send(now, at, Step::Release);
            }
        }
    }

    pub(super) fn cut_alone(&mut self, now: Instant) {
        if self.cut_made.is_some() && self.durable.is_some() {
            self.record(now);
        }
    }

    pub(super) fn after_release(&mut self, now: Instant) {
        let elapsed = self.elapsed(now);
        self.times.thawed_ms.get_or_insert(elapsed);
        if self.durable.is_some() {
            self.prove();
            self.record(now);
        }
    }

    pub(super) fn prove(&mut self) {
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

    pub(super) fn wanted(&self) -> Level {
        match self.spec.mode {
            Mode::Filesystem => Level::Filesystem,
            Mode::Application => Level::Application,
        }
    }

    pub(super) fn record(&mut self, now: Instant) {
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

    pub(super) fn conclude_failed(&mut self, now: Instant) {
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
    pub(super) fn finish_agents(&mut self, now: Instant) {
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

    pub(super) fn close(&mut self, now: Instant) {
        self.next_ping = None;
        self.stage = Stage::Closing {
            verdict_by: now + VERDICT_WAIT,
        };
    }

    pub(super) fn closing(&mut self, now: Instant, verdict_by: Instant) {
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

    pub(super) fn verdict(&self) -> Verdict {
        Verdict {
            session: self.spec.session,
            kept: self.kept,
            levels: self.levels.clone(),
            failure: self.failure.clone(),
            agents: self.parties.iter().map(Party::report).collect(),
            times: self.times,
        }
    }
}
