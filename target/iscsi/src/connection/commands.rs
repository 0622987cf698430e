//! SCSI commands: their data on its way in, their turn, and their answers.

use super::full::{DEAD_TAGS, Full, MEMORY};
use crate::buffer::Buffer;
use crate::error::{Error, RejectReason};
use crate::event::{Cdb, Command, Outcome};
use crate::pdu::{Ahs, DataOut, Numbers, R2t, Residual, ScsiCommand};
use crate::receive::{Head, Received, Sink};
use crate::task::{Progress, Task};
use crate::transfer::{Inbound, Outbound, Placement, aborted_command_sense};
use crate::transmit::Control;
use crate::types::{CmdSn, DataSn, Itt, SessionType, TaskId, Ttt};

const CHECK_CONDITION: u8 = 0x02;

impl Full<'_> {
    /// Immediate data goes into the task's buffer; what may not be sent goes nowhere.
    pub(super) fn immediate_sink(&self, command: &ScsiCommand, len: u32) -> Sink {
        let params = &self.session.params;
        let may = command.write
            && params.immediate_data
            && len <= params.first_burst_length
            && len <= command.edtl
            && self.session.session_type == SessionType::Normal;
        if len == 0 || !may {
            return Sink::Discard;
        }
        let want = command.edtl.min(self.config.limits.transfer_bytes);
        Sink::Into(Buffer::new(Inbound::capacity(want, params), &self.session.pool))
    }

    /// A SCSI Command whose CmdSN was taken.
    pub(super) fn on_command(&mut self, received: Received) -> Result<(), Error> {
        let command = ScsiCommand::parse(&received.head.bhs);
        if let Some(reason) = self.refusal(&command) {
            if !command.immediate {
                self.window.release();
            }
            self.forget_sequences_of(&received);
            self.reject(&received.head, reason);
            return Ok(());
        }
        let ahs = Ahs::parse(&received.head.ahs, &command.cdb)?;
        let immediate = match received.sink {
            Sink::Into(buffer) => Some(buffer),
            Sink::Discard => None,
        };
        let inbound = Inbound::new(
            &command,
            immediate,
            received.head.prefix.data_len,
            &self.session.params,
            self.config.limits.transfer_bytes,
            &self.session.pool,
        );
        if command.immediate {
            self.session.immediate_open += 1;
        }
        self.session.budget.reserve(inbound.reserved());
        self.session.share.force(inbound.reserved());
        self.sequences_begin(inbound.open_sequences());
        let id = self.session.tasks.next_id(command.itt);
        self.session.tasks.insert(Task {
            id,
            lun: command.lun,
            cdb: ahs.extended_cdb.map_or(Cdb::Short(command.cdb), Cdb::Extended),
            attribute: command.attribute,
            edtl: command.edtl,
            read: command.read,
            write: command.write,
            bidi_read_edtl: ahs.bidi_read_edtl,
            immediate: command.immediate,
            cmd_sn: command.cmd_sn,
            progress: Progress::Collecting,
            charged: inbound.reserved(),
            inbound,
            wants_r2t: false,
        });
        self.go_on(id);
        Ok(())
    }

    /// Why a command is not even taken on (§11.3.1, §11.17.1).
    fn refusal(&mut self, command: &ScsiCommand) -> Option<RejectReason> {
        let limit = self.config.limits.immediate_commands;
        if self.session.session_type == SessionType::Discovery {
            Some(RejectReason::PROTOCOL_ERROR)
        } else if command.itt == Itt::RESERVED || (!command.is_final && !command.write) {
            // "At least one of the W and F bits MUST be set to 1."
            Some(RejectReason::INVALID_FIELD)
        } else if self.session.tasks.by_itt(command.itt).is_some() {
            Some(RejectReason::TASK_IN_PROGRESS)
        } else if command.immediate && self.session.immediate_open >= limit {
            Some(RejectReason::TOO_MANY_IMMEDIATE)
        } else {
            None
        }
    }

    /// A command was ignored or rejected: unsolicited data may follow it all the same, and is no fault of its own.
    pub(super) fn forget_sequences_of(&mut self, received: &Received) {
        let command = ScsiCommand::parse(&received.head.bhs);
        if received.head.prefix.opcode == crate::pdu::Opcode::SCSI_COMMAND && !command.is_final {
            self.bury(command.itt, Ttt::RESERVED);
        }
    }

    /// Remembers a tag whose data may still come.
    pub(super) fn bury(&mut self, itt: Itt, ttt: Ttt) {
        if self.session.dead_tags.len() == DEAD_TAGS {
            self.session.dead_tags.pop_front();
        }
        self.session.dead_tags.push_back((itt, ttt));
    }

    fn is_dead(&self, pdu: &DataOut) -> bool {
        self.session.dead_tags.contains(&(pdu.itt, pdu.ttt))
    }

    pub(super) fn data_out_sink(&mut self, head: &Head, len: u32) -> Sink {
        let pdu = DataOut::parse(&head.bhs);
        let dead = pdu.ttt != Ttt::RESERVED && self.is_dead(&pdu);
        match self.session.tasks.by_itt(pdu.itt) {
            Some(task) if task.progress == Progress::Collecting && !dead => {
                match task.inbound.begin(&pdu, len) {
                    Placement::Into(buffer) => Sink::Into(buffer),
                    Placement::Discard => Sink::Discard,
                }
            }
            _ => Sink::Discard,
        }
    }

    /// A Data-Out is here with all its data.
    pub(super) fn on_data_out(&mut self, received: Received) {
        let pdu = DataOut::parse(&received.head.bhs);
        self.timers.data_progress(self.now);
        if !received.digest_ok {
            self.counters.digest_errors += 1;
            self.reject(&received.head, RejectReason::DATA_DIGEST);
        }
        let dead = self.is_dead(&pdu);
        let task = self
            .session
            .tasks
            .by_itt(pdu.itt)
            .filter(|task| task.progress == Progress::Collecting);
        let Some(task) = task.filter(|_| !dead || pdu.ttt == Ttt::RESERVED) else {
            // Late data of an aborted task is expected and ignored; a tag that never was is the initiator's fault.
            if dead && pdu.is_final {
                self.aborted_data_ended(pdu.itt, pdu.ttt);
            } else if !dead && received.digest_ok {
                self.reject(&received.head, RejectReason::INVALID_FIELD);
            }
            return;
        };
        let buffer = match received.sink {
            Sink::Into(buffer) => Some(buffer),
            Sink::Discard => None,
        };
        let ended = task.inbound.end(&pdu, buffer, received.digest_ok);
        let id = task.id;
        self.session.budget.sequences_end(ended);
        self.go_on(id);
    }

    /// After data came: is the task complete, or what does it need next?
    fn go_on(&mut self, id: TaskId) {
        let Some(task) = self.session.tasks.get(id) else {
            return;
        };
        if task.inbound.is_complete() {
            match task.inbound.fault() {
                None => self.session.tasks.make_ready(id),
                Some(_) => self.fail_transfer(id),
            }
        } else if task.inbound.next_r2t(&self.session.params).is_some() && !task.wants_r2t {
            task.wants_r2t = true;
            // A task that has begun goes before those that have not: it frees its memory sooner.
            if task.inbound.r2ts().0 > 0 {
                self.session.waiting_for_r2t.push_front(id);
            } else {
                self.session.waiting_for_r2t.push_back(id);
            }
        }
        self.pump_r2ts();
    }

    /// The initiator broke a rule of the transfer: the command ends without having run (§11.4.7.2).
    fn fail_transfer(&mut self, id: TaskId) {
        let Some(task) = self.session.tasks.remove(id) else {
            return;
        };
        let Some(fault) = task.inbound.fault() else { return };
        self.counters.transfer_faults += 1;
        self.session.budget.release(task.inbound.reserved());
        self.session.share.give(task.charged);
        let outcome = Outcome {
            status: CHECK_CONDITION,
            sense: aborted_command_sense(fault.asc_ascq()),
            ..Outcome::default()
        };
        self.answer(&task, outcome);
    }

    /// Sends R2Ts as far as the budgets go, oldest task first.
    pub(super) fn pump_r2ts(&mut self) {
        while let Some(&id) = self.session.waiting_for_r2t.front() {
            let params = &self.session.params;
            let next = self
                .session
                .tasks
                .get(id)
                .and_then(|task| task.inbound.next_r2t(params));
            let Some((offset, len)) = next else {
                self.session.waiting_for_r2t.pop_front();
                if let Some(task) = self.session.tasks.get(id) {
                    task.wants_r2t = false;
                }
                continue;
            };
            let idle = self.session.tasks.next_ready(self.window).is_none();
            if !self.session.budget.allows(len as usize, idle) || !self.charge_all(id, idle) {
                return;
            }
            self.send_r2t(id, offset, len);
        }
    }

    /// Takes the shared memory for all of a write before its first R2T: once begun, it can end.
    fn charge_all(&mut self, id: TaskId, idle: bool) -> bool {
        let session = &mut *self.session;
        let Some(task) = session.tasks.get(id) else {
            return true;
        };
        let missing = task.inbound.wanted().saturating_sub(task.charged);
        let idle = idle && session.budget.is_quiet() && session.read_running == 0;
        let may = missing == 0 || session.share.take(self.now, missing, idle);
        if may {
            task.charged += missing;
        }
        may
    }

    fn send_r2t(&mut self, id: TaskId, buffer_offset: u32, desired_len: u32) {
        let ttt = self.session.new_ttt();
        let Some(task) = self.session.tasks.get(id) else {
            return;
        };
        let r2t = R2t {
            lun: task.lun,
            itt: task.itt(),
            ttt,
            numbers: Numbers::default(),
            r2t_sn: task.inbound.solicit(ttt, buffer_offset, desired_len),
            buffer_offset,
            desired_len,
        };
        self.session.budget.reserve(desired_len as usize);
        self.sequences_begin(1);
        self.counters.r2ts += 1;
        self.tx.send(Control::peek(r2t.encode()));
    }

    fn sequences_begin(&mut self, n: usize) {
        if n > 0 && self.session.budget.open_sequences() == 0 {
            self.timers.data_progress(self.now);
        }
        self.session.budget.sequences_begin(n);
    }

    /// The command whose turn it is, unless it reads and too much read data is held already.
    pub(super) fn next_command(&mut self) -> Option<Command> {
        let id = self.session.tasks.next_ready(self.window)?;
        let limit = self.config.limits.transfer_bytes;
        let wants = self.session.tasks.get(id)?.read_limit().min(limit) as usize;
        let held = self.session.read_running + self.session.read_queued;
        if wants > 0 && held > 0 && held + wants > self.config.limits.read_buffer_bytes {
            return None;
        }
        let idle = held == 0 && self.session.budget.is_quiet();
        if wants > 0 && !self.session.share.take(self.now, wants, idle) {
            return None;
        }
        let task = self.session.tasks.start(id)?;
        task.charged += wants;
        self.session.read_running += wants;
        self.session.budget.run(task.inbound.reserved());
        self.counters.commands += 1;
        Some(Command {
            task: id,
            itt: task.itt(),
            lun: task.lun,
            cdb: task.cdb.clone(),
            attribute: task.attribute,
            edtl: task.edtl,
            read: task.read,
            write: task.write,
            bidi_read_edtl: task.bidi_read_edtl,
            data: task.inbound.take_data(),
            immediate: task.immediate,
        })
    }

    /// The owner's answer.
    pub(super) fn complete(&mut self, id: TaskId, outcome: Outcome) {
        if self.complete_aborted(id) {
            return;
        }
        let running = self
            .session
            .tasks
            .get(id)
            .is_some_and(|task| task.progress == Progress::Running);
        if !running {
            return;
        }
        let Some(task) = self.session.tasks.remove(id) else {
            return;
        };
        self.came_back(task.inbound.reserved(), task.read_limit(), task.charged);
        self.answer(&task, outcome);
        self.pump_r2ts();
    }

    /// The owner holds nothing of this task any more.
    pub(super) fn came_back(&mut self, reserved: usize, read_limit: u32, charged: usize) {
        self.session.budget.ran(reserved);
        self.session.share.give(charged);
        if self.session.share.is_scarce() {
            self.session.pool.clear();
        }
        self.session.read_running -= read_limit.min(self.config.limits.transfer_bytes) as usize;
    }

    fn answer(&mut self, task: &Task, mut outcome: Outcome) {
        let limit = task.read_limit() as usize;
        let delivered = outcome.data.len();
        outcome.data.truncate(limit);
        let data = outcome.data;
        let bidirectional = task.read && task.write;
        let transfer_len = if bidirectional {
            outcome.transfer_len
        } else {
            outcome.transfer_len.max(delivered as u64)
        };
        self.session.read_queued += data.len();
        self.session.share.force(data.len());
        self.remember(task.itt(), task.cmd_sn);
        self.tx.answer(Outbound {
            itt: task.itt(),
            status: outcome.status,
            sense: outcome.sense,
            data,
            residual: Residual::of(task.edtl, transfer_len),
            bidi_residual: match task.bidi_read_edtl {
                Some(edtl) if bidirectional => Residual::of(edtl, delivered as u64),
                _ => Residual::Exact,
            },
            data_sn: if bidirectional {
                DataSn(task.inbound.r2ts().0)
            } else {
                DataSn(0)
            },
            bidirectional,
            windowed: !task.immediate,
            sent: 0,
            in_burst: 0,
        });
    }

    fn remember(&mut self, itt: Itt, cmd_sn: CmdSn) {
        if self.session.finished.len() == MEMORY {
            self.session.finished.pop_front();
        }
        self.session.finished.push_back((itt, cmd_sn));
    }
}
