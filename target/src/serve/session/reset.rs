//! Task management: what it does to other sessions, and when it is over.

use std::sync::Arc;
use std::time::Instant;

use stillpoint_iscsi::{Lun as LunField, TmfFunction, TmfId, TmfResponse};
use stillpoint_scsi::UnitAttention;
use tokio::sync::oneshot;

use super::Task;
use crate::serve::lun::Lun;
use crate::serve::registry::{Control, Session};

impl Task {
    /// RFC 7143 §11.5. The protocol layer has marked this session's affected tasks; the response goes out when the last of them
    /// has ended, here and in other sessions.
    pub(super) fn task_management(&mut self, tmf: TmfId, function: TmfFunction, lun: LunField) {
        let now = Instant::now();
        let Some(session) = self.session.clone() else {
            self.conn.tmf_complete(now, tmf, TmfResponse::REJECTED);
            return;
        };
        let rules = session.target.rules();
        let there = lun
            .number()
            .is_some_and(|number| rules.find_for(number, &session.initiator).is_some());
        let everywhere = match function {
            TmfFunction::LOGICAL_UNIT_RESET => false,
            TmfFunction::TARGET_WARM_RESET | TmfFunction::TARGET_COLD_RESET => true,
            // The others concern this session's own tasks, which the protocol layer knows: every I_T nexus has a task set of its
            // own (TST 001b in the control mode page).
            TmfFunction::ABORT_TASK_SET | TmfFunction::CLEAR_TASK_SET if !there => {
                self.conn.tmf_complete(now, tmf, TmfResponse::LUN_DOES_NOT_EXIST);
                return;
            }
            _ => {
                self.conn.tmf_complete(now, tmf, TmfResponse::COMPLETE);
                return;
            }
        };
        if !everywhere && !there {
            self.conn.tmf_complete(now, tmf, TmfResponse::LUN_DOES_NOT_EXIST);
            return;
        }
        let affected: Vec<Arc<Lun>> = rules
            .shown_to(&session.initiator)
            .filter(|(number, _)| everywhere || lun.number() == Some(*number))
            .map(|(_, lun)| Arc::clone(lun))
            .collect();
        tracing::info!(?function, lun = ?lun.number(), "reset by the initiator");
        affected.iter().for_each(|lun| lun.reset());
        let others = self.daemon.registry.sessions_with(|other| other.id != session.id);
        let shares = |other: &Session, lun: &Lun| other.target.rules().number_for(lun, &other.initiator);
        let mut waits = Vec::new();
        for other in &others {
            let luns: Vec<u16> = affected.iter().filter_map(|lun| shares(other, lun)).collect();
            if !luns.is_empty() {
                let (done, wait) = oneshot::channel();
                let cause = UnitAttention::DeviceReset;
                other.tell(Control::AbortTasks { luns, cause, done });
                waits.push(wait);
            }
        }
        if function == TmfFunction::TARGET_COLD_RESET {
            // RFC 7143 §11.5.1: a cold reset ends all sessions to the target; this one ends after its answer.
            let same_target = others
                .iter()
                .filter(|other| other.target.key() == session.target.key());
            same_target.for_each(|other| other.end("target cold reset by another session"));
        }
        let finish = self.tmf_finish.clone();
        self.daemon.tracker.spawn(async move {
            for wait in waits {
                // A session that is ending begins no commands any more.
                drop(wait.await);
            }
            for lun in &affected {
                lun.drain().await;
            }
            let _ = finish.send((tmf, TmfResponse::COMPLETE));
        });
    }

    /// Another session ended the tasks of this LUN. Whatever of them has begun, the other waits for.
    ///
    /// The initiator is told here, and not by whoever ended them: its next command might have taken the unit attention before
    /// its last ones were ended, and would never have learnt of their end.
    pub(super) fn abort_lun(&mut self, number: u16, cause: UnitAttention) {
        let (Some(session), Some(field)) = (&self.session, LunField::from_number(number)) else {
            return;
        };
        let ended = self.conn.abort_lun_tasks(Some(field));
        let rules = session.target.rules();
        if ended.count > 0
            && let Some((_, lun)) = rules.find_for(number, &session.initiator)
        {
            lun.tasks_ended(session.id, cause);
        }
        self.cancel(&ended.running);
    }
}
