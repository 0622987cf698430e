//! The SCSI commands of a session, from the header to the owner's answer, and the order in which they start.

use std::collections::{HashMap, VecDeque};

use crate::event::Cdb;
use crate::session::CommandWindow;
use crate::transfer::Inbound;
use crate::types::{CmdSn, Itt, Lun, TaskAttribute, TaskId};

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Data is still to come.
    Collecting,
    /// Waits for its turn.
    Ready,
    /// The owner has it.
    Running,
}

/// One SCSI command.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) id: TaskId,
    pub(crate) lun: Lun,
    pub(crate) cdb: Cdb,
    pub(crate) attribute: TaskAttribute,
    pub(crate) edtl: u32,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) bidi_read_edtl: Option<u32>,
    pub(crate) immediate: bool,
    pub(crate) cmd_sn: CmdSn,
    pub(crate) progress: Progress,
    pub(crate) inbound: Inbound,
    /// Bytes of the shared memory that it holds.
    pub(crate) charged: usize,
    /// Whether it waits for the budget to send an R2T.
    pub(crate) wants_r2t: bool,
}

impl Task {
    pub(crate) fn itt(&self) -> Itt {
        Itt(self.id.itt)
    }

    /// The most bytes that the initiator takes.
    pub(crate) fn read_limit(&self) -> u32 {
        match (self.read, self.bidi_read_edtl) {
            (false, _) => 0,
            (true, Some(bidi)) => bidi,
            // A bidirectional command without its length segment: EDTL is the write's (§11.3.4).
            (true, None) if self.write => 0,
            (true, None) => self.edtl,
        }
    }
}

/// The tasks that exist, by tag.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    by_itt: HashMap<Itt, Task>,
    ready: VecDeque<TaskId>,
    numbers: u64,
    ordered: usize,
}

impl Tasks {
    pub(crate) fn next_id(&mut self, itt: Itt) -> TaskId {
        self.numbers += 1;
        TaskId {
            number: self.numbers,
            itt: itt.0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.by_itt.len()
    }

    pub(crate) fn insert(&mut self, task: Task) {
        if task.attribute == TaskAttribute::ORDERED {
            self.ordered += 1;
        }
        let previous = self.by_itt.insert(task.itt(), task);
        assert!(previous.is_none(), "a tag names one task");
    }

    pub(crate) fn by_itt(&mut self, itt: Itt) -> Option<&mut Task> {
        self.by_itt.get_mut(&itt)
    }

    pub(crate) fn get(&mut self, id: TaskId) -> Option<&mut Task> {
        self.by_itt.get_mut(&Itt(id.itt)).filter(|task| task.id == id)
    }

    pub(crate) fn remove(&mut self, id: TaskId) -> Option<Task> {
        self.get(id)?;
        let task = self.by_itt.remove(&Itt(id.itt))?;
        if task.attribute == TaskAttribute::ORDERED {
            self.ordered -= 1;
        }
        if task.progress == Progress::Ready {
            self.ready.retain(|ready| *ready != id);
        }
        Some(task)
    }

    pub(crate) fn matching(&self, filter: impl Fn(&Task) -> bool) -> Vec<TaskId> {
        let mut ids: Vec<_> = self
            .by_itt
            .values()
            .filter(|task| filter(task))
            .map(|task| task.id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// The data is complete: the task waits for its turn, in CmdSN order among those that wait.
    pub(crate) fn make_ready(&mut self, id: TaskId) {
        let Some(task) = self.get(id) else { return };
        task.progress = Progress::Ready;
        let (cmd_sn, attribute) = (task.cmd_sn, task.attribute);
        if attribute == TaskAttribute::HEAD_OF_QUEUE {
            self.ready.push_front(id);
            return;
        }
        let by_itt = &self.by_itt;
        let comes_after = |other: &TaskId| {
            by_itt.get(&Itt(other.itt)).is_some_and(|other| {
                cmd_sn.precedes(other.cmd_sn) && other.attribute != TaskAttribute::HEAD_OF_QUEUE
            })
        };
        let later = self
            .ready
            .iter()
            .rev()
            .take_while(|other| comes_after(other))
            .count();
        self.ready.insert(self.ready.len() - later, id);
    }

    /// The task whose turn it is.
    pub(crate) fn next_ready(&self, window: &CommandWindow) -> Option<TaskId> {
        if self.ordered == 0 && !window.has_holes() {
            return self.ready.front().copied();
        }
        self.ready.iter().copied().find(|id| {
            self.by_itt
                .get(&Itt(id.itt))
                .is_some_and(|task| (task.immediate || window.is_due(task.cmd_sn)) && !self.is_barred(task))
        })
    }

    /// An ORDERED task starts after all older tasks of its LUN have ended, and before all newer ones (SAM-5 §8.6).
    fn is_barred(&self, task: &Task) -> bool {
        if task.attribute == TaskAttribute::HEAD_OF_QUEUE {
            return false;
        }
        // In the order of CmdSN, not of arrival. An immediate command carries the number of the next one that is not.
        let precedes = |other: &Task| {
            other.cmd_sn.precedes(task.cmd_sn) || (other.cmd_sn == task.cmd_sn && other.id < task.id)
        };
        let older = self
            .by_itt
            .values()
            .filter(|other| other.lun.names_same(task.lun) && precedes(other));
        match task.attribute {
            TaskAttribute::ORDERED => older.count() > 0,
            _ => {
                older
                    .filter(|other| other.attribute == TaskAttribute::ORDERED)
                    .count()
                    > 0
            }
        }
    }

    /// The owner gets the task.
    pub(crate) fn start(&mut self, id: TaskId) -> Option<&mut Task> {
        match self.ready.front() {
            Some(front) if *front == id => {
                self.ready.pop_front();
            }
            _ => self.ready.retain(|ready| *ready != id),
        }
        let task = self.get(id)?;
        task.progress = Progress::Running;
        Some(task)
    }
}
