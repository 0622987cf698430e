//! Task management: what it does to other sessions, and when it is over.

use std::sync::Arc;
use std::time::Instant;

use stillpoint_iscsi::{Lun as LunField, TmfFunction, TmfId, TmfResponse};
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
        // ABORT TASK and ABORT TASK SET concern this session's own tasks, which the protocol layer knows.
        let (reset, everywhere) = match function {
            TmfFunction::CLEAR_TASK_SET => (false, false),
            TmfFunction::LOGICAL_UNIT_RESET => (true, false),
            TmfFunction::TARGET_WARM_RESET | TmfFunction::TARGET_COLD_RESET => (true, true),
            _ => {
                self.conn.tmf_complete(now, tmf, TmfResponse::COMPLETE);
                return;
            }
        };
        let rules = session.target.rules();
        let affected: Vec<Arc<Lun>> = rules
            .luns
            .iter()
            .filter(|(number, _)| everywhere || lun.number() == Some(*number))
            .map(|(_, lun)| Arc::clone(lun))
            .collect();
        if affected.is_empty() && !everywhere {
            self.conn.tmf_complete(now, tmf, TmfResponse::LUN_DOES_NOT_EXIST);
            return;
        }
        tracing::info!(?function, lun = ?lun.number(), "reset by the initiator");
        let others = self.daemon.registry.sessions_with(|other| other.id != session.id);
        let shares = |other: &Session, lun: &Lun| other.target.rules().number_of(lun);
        for lun in &affected {
            if reset {
                lun.reset();
            } else {
                let sharing = others.iter().filter(|other| shares(other, lun).is_some());
                lun.task_set_cleared(sharing.map(|other| other.id));
            }
        }
        let mut waits = Vec::new();
        for other in &others {
            let luns: Vec<u16> = affected.iter().filter_map(|lun| shares(other, lun)).collect();
            if !luns.is_empty() {
                let (done, wait) = oneshot::channel();
                other.tell(Control::AbortTasks { luns, done });
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
}
