//! Requests to the agents and their answers.

use std::time::{Duration, Instant};

use super::party::{Call, Party, Step};
use super::verdict::Phase;
use super::{
    Action, BUSY_WAIT_MAX, Coordinator, DIAL_GRACE, INSIST, INSIST_RELEASE, OnFailure, RETRY, Stage,
};
use crate::error::{ErrorCode, Refusal};
use crate::freeze::{KEEPALIVE, Level};
use crate::message::{
    Abort, Complete, CutOutcome, Freeze, ListVolumes, Mode, Preflight, Prepare, Release, Reply, Request,
    Require, SessionState, Status,
};
use crate::registration::LEASE;

impl Coordinator {
    pub(super) fn position(&self, number: u64) -> Option<usize> {
        self.parties
            .iter()
            .position(|party| party.call.is_some_and(|call| call.number == number))
    }

    pub(super) fn elapsed(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn send(&mut self, now: Instant, at: usize, step: Step) {
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

    pub(super) fn request(&self, party: &Party, step: Step) -> Request {
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

    pub(super) fn answered(&mut self, now: Instant, at: usize, step: Step, result: Result<Reply, Refusal>) {
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

    pub(super) fn refused(&mut self, now: Instant, at: usize, step: Step, refusal: Refusal) {
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
                let insist = match step {
                    Step::Release if party.registered => LEASE,
                    Step::Release => INSIST_RELEASE,
                    _ => INSIST,
                };
                let since = *party.unreached_since.get_or_insert(now);
                if now + RETRY < since + insist {
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

    pub(super) fn ping(&mut self, now: Instant) {
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
    pub(super) fn pinged(&mut self, now: Instant, at: usize, result: &Result<Reply, Refusal>) {
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
}
