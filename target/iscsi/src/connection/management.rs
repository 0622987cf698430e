//! Task management and logout: how tasks end without a status.

use std::time::Instant;

use bytes::Bytes;

use super::full::Full;
use crate::error::RejectReason;
use crate::event::{EndedTasks, Event};
use crate::pdu::{LogoutRequest, LogoutResponse, NopIn, Numbers, TmfReply, TmfRequest};
use crate::receive::Head;
use crate::task::{Progress, Task};
use crate::transmit::{Control, Mark};
use crate::types::{
    CmdSn, Itt, LogoutReason, Lun, SessionType, TaskId, TmfFunction, TmfId, TmfResponse, Ttt,
};

/// The most task management requests that may wait for their answers.
const MAX_OPEN_TMFS: usize = 16;

/// A task that ended by abort while the owner runs it: nothing of it may happen once the abort is acknowledged.
pub(super) struct Aborted {
    itt: Itt,
    lun: Lun,
    cmd_sn: CmdSn,
    reserved: usize,
    read_limit: u32,
    charged: usize,
    /// Functions that wait for it.
    waiters: Vec<TmfId>,
}

/// A task management request that is not answered.
pub(super) struct OpenTmf {
    itt: Itt,
    function: TmfFunction,
    waits_for: usize,
    response: Option<TmfResponse>,
    /// R2Ts of its tasks whose data is still to come, and how long we wait for it.
    data: Vec<(Itt, Ttt)>,
    data_until: Instant,
}

impl OpenTmf {
    /// When it waits for data no longer.
    pub(super) fn data_deadline(&self) -> Option<Instant> {
        (!self.data.is_empty()).then_some(self.data_until)
    }
}

/// What an abort has ended.
#[derive(Default)]
struct Ended {
    tasks: usize,
    /// R2Ts that the initiator may still answer.
    asked: Vec<(Itt, Ttt)>,
}

/// A logout that is not answered: the owner still runs tasks.
pub(super) struct Logout {
    itt: Itt,
    pub(super) deadline: Instant,
}

/// Which tasks a function ends (RFC 7143 §4.2.3.2).
#[derive(Clone, Copy)]
enum Scope {
    /// One task.
    Task(Itt),
    /// The LUN's tasks before this CmdSN.
    Before(Lun, CmdSn),
    /// All tasks of the LUN, whatever their CmdSN.
    Lun(Lun),
    /// All.
    All,
}

impl Scope {
    fn covers(self, itt: Itt, lun: Lun, cmd_sn: CmdSn) -> bool {
        match self {
            Self::Task(one) => one == itt,
            // An immediate command carries the CmdSN that the next command will have, so does the function.
            Self::Before(its_lun, limit) => its_lun.names_same(lun) && !limit.precedes(cmd_sn),
            Self::Lun(its_lun) => its_lun.names_same(lun),
            Self::All => true,
        }
    }
}

impl Full<'_> {
    pub(super) fn on_tmf(&mut self, head: &Head, request: &TmfRequest) {
        if self.session.session_type == SessionType::Discovery || request.itt == Itt::RESERVED {
            self.reject(head, RejectReason::PROTOCOL_ERROR);
            return;
        }
        if self.session.tmfs.len() >= MAX_OPEN_TMFS {
            self.reject(head, RejectReason::TOO_MANY_IMMEDIATE);
            return;
        }
        let scope = match request.function {
            TmfFunction::ABORT_TASK => return self.on_abort_task(request),
            TmfFunction::ABORT_TASK_SET | TmfFunction::CLEAR_TASK_SET => {
                Scope::Before(request.lun, request.cmd_sn)
            }
            TmfFunction::LOGICAL_UNIT_RESET => Scope::Lun(request.lun),
            TmfFunction::TARGET_WARM_RESET | TmfFunction::TARGET_COLD_RESET => Scope::All,
            // "Task allegiance reassignment not supported": there is no other connection (§7.2.2).
            TmfFunction::TASK_REASSIGN => {
                return self.reply_tmf(request.itt, TmfResponse::REASSIGN_NOT_SUPPORTED);
            }
            // We never establish an ACA, and speak iSCSIProtocolLevel 1, without the functions of RFC 7144.
            _ => return self.reply_tmf(request.itt, TmfResponse::NOT_SUPPORTED),
        };
        self.begin_tmf(request, scope);
    }

    fn on_abort_task(&mut self, request: &TmfRequest) {
        let itt = request.referenced_itt;
        let exists = self.session.tasks.by_itt(itt).is_some()
            || self.session.aborted.values().any(|aborted| aborted.itt == itt);
        if exists {
            self.begin_tmf(request, Scope::Task(itt));
        } else {
            let response = self.abort_of_nothing(request);
            self.reply_tmf(request.itt, response);
        }
    }

    /// ABORT TASK for a tag that names no task (§11.6.1).
    fn abort_of_nothing(&mut self, request: &TmfRequest) -> TmfResponse {
        let (itt, cmd_sn) = (request.referenced_itt, request.ref_cmd_sn);
        if self.session.tmfs.values().any(|tmf| tmf.itt == itt) {
            // "an ABORT TASK function MUST NOT be executed on a task management request" (§11.5.1).
            return TmfResponse::REJECTED;
        }
        if self.window.is_open(cmd_sn) && cmd_sn.precedes(request.cmd_sn) {
            // b) "targets must consider the CmdSN as received": the command will not come any more.
            self.window.take(cmd_sn);
            self.window.release();
            return TmfResponse::COMPLETE;
        }
        if self.session.forgiving_abort && self.session.finished.contains(&(itt, cmd_sn)) {
            return TmfResponse::COMPLETE;
        }
        // c)
        TmfResponse::TASK_DOES_NOT_EXIST
    }

    /// Ends the tasks of the scope here, and lets the owner do the rest. An abort that needs no owner is answered at once.
    fn begin_tmf(&mut self, request: &TmfRequest, scope: Scope) {
        let tmf = TmfId(self.session.next_tmf);
        self.session.next_tmf += 1;
        let ended = self.abort(scope);
        let mut affected = Vec::new();
        for (id, aborted) in &mut self.session.aborted {
            if scope.covers(aborted.itt, aborted.lun, aborted.cmd_sn) {
                aborted.waiters.push(tmf);
                affected.push(*id);
            }
        }
        affected.sort_unstable();
        if matches!(scope, Scope::Task(_)) && affected.is_empty() {
            self.reply_tmf(request.itt, TmfResponse::COMPLETE);
            return;
        }
        let open = OpenTmf {
            itt: request.itt,
            function: request.function,
            waits_for: affected.len(),
            response: None,
            // "MUST wait for responses on currently valid Target Transfer Tags of the affected tasks" (§4.2.3.3 a).
            data: match scope {
                Scope::Task(_) => Vec::new(),
                _ => ended.asked,
            },
            data_until: self.now + self.config.times.aborted_data,
        };
        self.session.tmfs.insert(tmf, open);
        self.events.push_back(Event::TaskManagement {
            tmf,
            function: request.function,
            lun: request.lun,
            affected,
        });
    }

    /// Ends tasks without a status. Those that the owner runs stay known until it is done with them.
    fn abort(&mut self, scope: Scope) -> Ended {
        let mut ended = Ended::default();
        let covered = |task: &Task| scope.covers(task.itt(), task.lun, task.cmd_sn);
        for id in self.session.tasks.matching(covered) {
            let Some(task) = self.session.tasks.remove(id) else {
                continue;
            };
            ended.tasks += 1;
            for ttt in task.inbound.open_tags().collect::<Vec<Ttt>>() {
                self.bury(task.itt(), ttt);
                if ttt != Ttt::RESERVED {
                    ended.asked.push((task.itt(), ttt));
                }
            }
            self.session.budget.sequences_end(task.inbound.open_sequences());
            if task.immediate {
                self.session.immediate_open -= 1;
            } else {
                self.window.release();
            }
            if task.progress == Progress::Running {
                self.session.aborted.insert(
                    id,
                    Aborted {
                        itt: task.itt(),
                        lun: task.lun,
                        cmd_sn: task.cmd_sn,
                        reserved: task.inbound.reserved(),
                        read_limit: task.read_limit(),
                        charged: task.charged,
                        waiters: Vec::new(),
                    },
                );
            } else {
                self.session.budget.release(task.inbound.reserved());
                self.session.share.give(task.charged);
            }
        }
        self.pump_r2ts();
        ended
    }

    /// The last data of an R2T came whose task has been aborted: a function that waits for it may be over.
    pub(super) fn aborted_data_ended(&mut self, itt: Itt, ttt: Ttt) {
        self.session.dead_tags.retain(|tag| *tag != (itt, ttt));
        let mut told = Vec::new();
        for (id, tmf) in &mut self.session.tmfs {
            let before = tmf.data.len();
            tmf.data.retain(|tag| *tag != (itt, ttt));
            if tmf.data.len() < before {
                told.push(*id);
            }
        }
        told.into_iter().for_each(|tmf| self.finish_tmf(tmf));
    }

    /// Functions whose time to wait for data is over go on without: what comes late is ignored by its tag. open-iscsi sends
    /// nothing any more (`FastAbort = Yes`, its default).
    pub(super) fn aborted_data_overdue(&mut self) {
        let mut told = Vec::new();
        for (id, tmf) in &mut self.session.tmfs {
            if tmf.data_deadline().is_some_and(|until| until <= self.now) {
                tmf.data.clear();
                told.push(*id);
            }
        }
        told.into_iter().for_each(|tmf| self.finish_tmf(tmf));
    }

    /// Another I_T nexus ended these tasks.
    pub(super) fn abort_for_other(&mut self, lun: Option<Lun>) -> EndedTasks {
        let scope = lun.map_or(Scope::All, Scope::Lun);
        let before = self.window.max_cmd_sn();
        let ended = self.abort(scope);
        if self.window.max_cmd_sn() != before && self.session.session_type == SessionType::Normal {
            // No status will tell that the window has moved (§11.19).
            let news = NopIn {
                lun: Lun::default(),
                itt: Itt::RESERVED,
                ttt: Ttt::RESERVED,
                numbers: Numbers::default(),
            };
            self.tx.send(Control::peek(news.encode()));
        }
        let covers = |aborted: &Aborted| scope.covers(aborted.itt, aborted.lun, aborted.cmd_sn);
        let mut running: Vec<_> = self
            .session
            .aborted
            .iter()
            .filter(|(_, aborted)| covers(aborted))
            .map(|(id, _)| *id)
            .collect();
        running.sort_unstable();
        EndedTasks {
            count: ended.tasks,
            running,
        }
    }

    /// The owner is done with a task that was aborted: whoever waited for that may go on.
    pub(super) fn complete_aborted(&mut self, id: TaskId) -> bool {
        let Some(aborted) = self.session.aborted.remove(&id) else {
            return false;
        };
        self.came_back(aborted.reserved, aborted.read_limit, aborted.charged);
        for tmf in aborted.waiters {
            if let Some(open) = self.session.tmfs.get_mut(&tmf) {
                open.waits_for -= 1;
            }
            self.finish_tmf(tmf);
        }
        self.finish_logout();
        self.pump_r2ts();
        true
    }

    pub(super) fn tmf_complete(&mut self, tmf: TmfId, response: TmfResponse) {
        if let Some(open) = self.session.tmfs.get_mut(&tmf) {
            open.response.get_or_insert(response);
        }
        self.finish_tmf(tmf);
    }

    fn finish_tmf(&mut self, tmf: TmfId) {
        let Some(&OpenTmf {
            itt,
            function,
            waits_for: 0,
            response: Some(response),
            ref data,
            ..
        }) = self.session.tmfs.get(&tmf)
        else {
            return;
        };
        if !data.is_empty() {
            return;
        }
        self.session.tmfs.remove(&tmf);
        self.reply_tmf(itt, response);
        if function == TmfFunction::TARGET_COLD_RESET && response == TmfResponse::COMPLETE {
            // "the target MUST then close all of its TCP connections" (§11.6.1).
            self.session.over = true;
        }
    }

    /// After every answer that waits: "no responses for the tasks covered [...] after the task management response".
    fn reply_tmf(&mut self, itt: Itt, response: TmfResponse) {
        let reply = TmfReply {
            response,
            itt,
            numbers: Numbers::default(),
        };
        self.tx.send_fenced(Control::new(reply.encode(), Bytes::new()));
    }

    pub(super) fn on_logout(&mut self, head: &Head, request: &LogoutRequest) {
        let ours = self.who.cid == Some(request.cid);
        match request.reason {
            LogoutReason::CLOSE_SESSION => self.begin_logout(request),
            LogoutReason::CLOSE_CONNECTION if ours => self.begin_logout(request),
            LogoutReason::REMOVE_FOR_RECOVERY if ours => {
                self.reply_logout(request.itt, RECOVERY_NOT_SUPPORTED)
            }
            LogoutReason::CLOSE_CONNECTION | LogoutReason::REMOVE_FOR_RECOVERY => {
                self.reply_logout(request.itt, CID_NOT_FOUND);
            }
            _ => self.reject(head, RejectReason::INVALID_FIELD),
        }
    }

    /// "the target MUST terminate all pending commands" (§11.14); the response says that nothing of them happens any more.
    fn begin_logout(&mut self, request: &LogoutRequest) {
        self.abort(Scope::All);
        self.tx.drop_answers();
        let dropped = core::mem::take(&mut self.session.read_queued);
        self.session.share.give(dropped);
        self.session.tmfs.clear();
        self.session.share.retry_at = None;
        self.session.logout = Some(Logout {
            itt: request.itt,
            deadline: self.now + self.config.times.cleanup,
        });
        self.events.push_back(Event::LoggedOut {
            reason: request.reason,
        });
        self.finish_logout();
    }

    fn finish_logout(&mut self) {
        if let Some(logout) = &self.session.logout
            && self.session.aborted.is_empty()
            && !self.session.over
        {
            self.session.over = true;
            self.reply_logout(logout.itt, CLOSED);
        }
    }

    fn reply_logout(&mut self, itt: Itt, response: u8) {
        let params = &self.session.params;
        let reply = LogoutResponse {
            response,
            itt,
            numbers: Numbers::default(),
            time2wait_s: params.time2wait_s,
            time2retain_s: params.time2retain_s,
        };
        self.tx.send_fenced(Control::new(reply.encode(), Bytes::new()));
    }

    /// Sends a ping, unless one is on its way already.
    pub(super) fn ping(&mut self, for_owner: bool) {
        if self.session.session_type == SessionType::Discovery || self.timers.ping_is_open(for_owner) {
            return;
        }
        let ttt = self.session.new_ttt();
        self.timers.ping_queued(ttt, for_owner);
        let ping = NopIn {
            lun: Lun::default(),
            itt: Itt::RESERVED,
            ttt,
            numbers: Numbers::default(),
        };
        self.tx.send(Control::peek(ping.encode()).marked(Mark::Ping));
    }
}

const CLOSED: u8 = 0;
const CID_NOT_FOUND: u8 = 1;
const RECOVERY_NOT_SUPPORTED: u8 = 2;
