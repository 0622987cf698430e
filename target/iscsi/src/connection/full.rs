//! The full feature phase: what a session holds, and which PDU goes where.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

use bytes::Bytes;

use super::Who;
use super::management::{Aborted, Logout, OpenTmf};
use super::text_phase::Exchange;
use super::timers::Timers;
use crate::buffer::{Buffer, Pool};
use crate::config::ConnectionConfig;
use crate::error::{Error, RejectReason};
use crate::event::{Counters, Directory, Event};
use crate::frame::Digests;
use crate::login::{Names, Params};
use crate::memory::Share;
use crate::pdu::{
    LogoutRequest, NopIn, NopOut, Numbers, Opcode, Reject, ScsiCommand, TextRequest, TmfRequest,
};
use crate::receive::{Head, Received, Sink};
use crate::session::{CommandWindow, Place, WriteBudget};
use crate::task::Tasks;
use crate::transfer::SegmentLimits;
use crate::transmit::{Control, Transmitter};
use crate::types::{CmdSn, DataSn, Itt, Lun, SessionType, TaskId, TmfId, Ttt};

/// ESXi answers a "task does not exist" with a reset of the LUN, and 6.7 drops the connection after four of them: to it,
/// the abort of a task that has just ended is complete.
const VMWARE_NAME: &str = "iqn.1998-01.com.vmware:";

/// How many finished tasks are remembered.
pub(super) const MEMORY: usize = 256;

/// How many tags of aborted transfers are remembered: a whole window of writes has four R2Ts each.
pub(super) const DEAD_TAGS: usize = 512;

/// A session in full feature phase.
pub(super) struct Session {
    pub(super) params: Params,
    pub(super) session_type: SessionType,
    pub(super) tasks: Tasks,
    pub(super) aborted: HashMap<TaskId, Aborted>,
    pub(super) tmfs: BTreeMap<TmfId, OpenTmf>,
    pub(super) next_tmf: u64,
    pub(super) budget: WriteBudget,
    pub(super) share: Share,
    pub(super) waiting_for_r2t: VecDeque<TaskId>,
    next_ttt: u32,
    /// Read bytes that the owner may deliver.
    pub(super) read_running: usize,
    /// Read bytes that wait to be sent.
    pub(super) read_queued: usize,
    /// Immediate SCSI commands that are not answered.
    pub(super) immediate_open: usize,
    /// Transfer tags of aborted tasks: their data may still come.
    pub(super) dead_tags: VecDeque<(Itt, Ttt)>,
    /// Tasks that ended lately.
    pub(super) finished: VecDeque<(Itt, CmdSn)>,
    pub(super) forgiving_abort: bool,
    /// Requests other than SCSI commands whose CmdSN is not yet due.
    held: Vec<(CmdSn, Received)>,
    pub(super) text: Option<Exchange>,
    pub(super) logout: Option<Logout>,
    pub(super) over: bool,
    pub(super) pool: Pool,
}

impl Session {
    pub(super) fn new(params: Params, names: &Names, config: &ConnectionConfig) -> Self {
        Self {
            params,
            session_type: names.session_type,
            tasks: Tasks::default(),
            aborted: HashMap::new(),
            tmfs: BTreeMap::new(),
            next_tmf: 0,
            budget: WriteBudget::new(config.limits.write_buffer_bytes),
            share: Share::new(config.memory.clone()),
            waiting_for_r2t: VecDeque::new(),
            next_ttt: 0,
            read_running: 0,
            read_queued: 0,
            immediate_open: 0,
            dead_tags: VecDeque::new(),
            finished: VecDeque::new(),
            forgiving_abort: names.initiator.starts_with(VMWARE_NAME),
            held: Vec::new(),
            text: None,
            logout: None,
            over: false,
            pool: Pool::default(),
        }
    }

    pub(super) fn params(&self) -> &Params {
        &self.params
    }

    pub(super) fn session_type(&self) -> SessionType {
        self.session_type
    }

    pub(super) fn digests(&self) -> Digests {
        Digests {
            header: self.params.header_digest,
            data: self.params.data_digest,
        }
    }

    pub(super) fn segment_limits(&self) -> SegmentLimits {
        SegmentLimits {
            max_recv: self.params.initiator_max_recv,
            max_burst: self.params.max_burst_length,
        }
    }

    pub(super) fn time2wait_s(&self) -> u16 {
        self.params.time2wait_s
    }

    pub(super) fn outstanding(&self) -> usize {
        self.tasks.len() + self.aborted.len()
    }

    pub(super) fn is_logging_out(&self) -> bool {
        self.logout.is_some()
    }

    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// Whether the shared memory allows no more to be read from the peer.
    pub(super) fn must_pause(&self, now: Instant) -> bool {
        self.share.must_pause(now, self.budget.open_sequences() > 0)
    }

    /// A frame left.
    pub(super) fn on_sent(&mut self, read_bytes: usize, command_over: Option<bool>) {
        let sent = read_bytes.min(self.read_queued);
        self.read_queued -= sent;
        self.share.give(sent);
        if command_over == Some(false) {
            self.immediate_open = self.immediate_open.saturating_sub(1);
        }
    }

    /// A transfer tag that no living transfer has.
    pub(super) fn new_ttt(&mut self) -> Ttt {
        self.next_ttt = match self.next_ttt.wrapping_add(1) {
            0xffff_ffff => 0,
            next => next,
        };
        Ttt(self.next_ttt)
    }
}

/// A session together with what it needs of its connection.
pub(super) struct Full<'a> {
    pub(super) now: Instant,
    pub(super) config: &'a ConnectionConfig,
    pub(super) directory: &'a dyn Directory,
    pub(super) session: &'a mut Session,
    pub(super) tx: &'a mut Transmitter,
    pub(super) window: &'a mut CommandWindow,
    pub(super) events: &'a mut VecDeque<Event>,
    pub(super) timers: &'a mut Timers,
    pub(super) who: &'a mut Who,
    pub(super) counters: &'a mut Counters,
    pub(super) our_turn: &'a mut bool,
}

impl Full<'_> {
    /// Where the data of this PDU goes.
    pub(super) fn sink_for(&mut self, head: &Head) -> Result<Sink, Error> {
        let (opcode, len) = (head.prefix.opcode, head.prefix.data_len);
        let max = self.session.params.target_max_recv;
        if len > max {
            return Err(Error::SegmentTooLong {
                opcode: opcode.0,
                len,
                max,
            });
        }
        Ok(match opcode {
            Opcode::SCSI_COMMAND => self.immediate_sink(&ScsiCommand::parse(&head.bhs), len),
            Opcode::DATA_OUT => self.data_out_sink(head, len),
            Opcode::NOP_OUT | Opcode::TEXT_REQUEST if len > 0 => {
                Sink::Into(Buffer::new(len as usize, &self.session.pool))
            }
            _ => Sink::Discard,
        })
    }

    pub(super) fn on_pdu(&mut self, received: Received) -> Result<(), Error> {
        if self.session.logout.is_some() {
            // "An initiator MUST NOT send any new iSCSI requests" after its logout (§11.14).
            return Ok(());
        }
        match received.head.prefix.opcode {
            Opcode::DATA_OUT => self.on_data_out(received),
            Opcode::SNACK_REQUEST => self.reject(&received.head, RejectReason::SNACK),
            Opcode::LOGIN_REQUEST => self.reject(&received.head, RejectReason::PROTOCOL_ERROR),
            Opcode::SCSI_COMMAND
            | Opcode::TMF_REQUEST
            | Opcode::TEXT_REQUEST
            | Opcode::LOGOUT_REQUEST
            | Opcode::NOP_OUT => return self.on_numbered(received),
            _ => self.reject(&received.head, RejectReason::NOT_SUPPORTED),
        }
        Ok(())
    }

    /// A request with a CmdSN: those that are not immediate take their place in the window (§4.2.2.1).
    fn on_numbered(&mut self, received: Received) -> Result<(), Error> {
        let (opcode, immediate) = (received.head.prefix.opcode, received.head.prefix.immediate);
        if !received.digest_ok {
            self.counters.digest_errors += 1;
            self.reject(&received.head, RejectReason::DATA_DIGEST);
            // Its CmdSN is not taken, so that no later command could run. Filling the hole is recovery within the
            // connection, which ErrorRecoveryLevel 0 has not: escalate to session recovery (§7.8).
            return if immediate {
                Ok(())
            } else {
                Err(Error::DataDigest { opcode: opcode.0 })
            };
        }
        let cmd_sn = cmd_sn_of(&received.head);
        let place = if immediate {
            Place::Next
        } else {
            self.window.take(cmd_sn)
        };
        match place {
            Place::Outside => {
                self.counters.outside_window += 1;
                self.forget_sequences_of(&received);
            }
            Place::Next => self.dispatch(received)?,
            // A SCSI command may collect its data while it waits for its turn.
            Place::Ahead if opcode == Opcode::SCSI_COMMAND => self.dispatch(received)?,
            Place::Ahead => self.session.held.push((cmd_sn, received)),
        }
        while let Some(at) = self
            .session
            .held
            .iter()
            .position(|(sn, _)| self.window.is_due(*sn))
        {
            let (_, held) = self.session.held.swap_remove(at);
            self.dispatch(held)?;
        }
        Ok(())
    }

    fn dispatch(&mut self, received: Received) -> Result<(), Error> {
        let opcode = received.head.prefix.opcode;
        let windowed = !received.head.prefix.immediate;
        if opcode == Opcode::SCSI_COMMAND {
            return self.on_command(received);
        }
        // These are answered at once: their place in the window is free again with the answer.
        if windowed {
            self.window.release();
        }
        let data = match received.sink {
            Sink::Into(buffer) => buffer.freeze(),
            Sink::Discard => Bytes::new(),
        };
        match opcode {
            Opcode::NOP_OUT => self.on_nop_out(&received.head, data),
            Opcode::TEXT_REQUEST => {
                self.on_text(&received.head, &TextRequest::parse(&received.head.bhs), &data)
            }
            Opcode::TMF_REQUEST => self.on_tmf(&received.head, &TmfRequest::parse(&received.head.bhs)),
            _ => self.on_logout(&received.head, &LogoutRequest::parse(&received.head.bhs)),
        }
        Ok(())
    }

    /// Answers with the complete header of the offending PDU (§11.17).
    pub(super) fn reject(&mut self, head: &Head, reason: RejectReason) {
        self.counters.rejects += 1;
        let reject = Reject {
            reason,
            numbers: Numbers::default(),
            data_sn: DataSn(0),
        };
        self.tx.send(Control::new(reject.encode(), head.to_bytes()));
    }

    /// NOP-Out: a ping of the initiator's, the answer to one of ours, or only an acknowledgement (§11.18).
    fn on_nop_out(&mut self, head: &Head, data: Bytes) {
        let nop = NopOut::parse(&head.bhs);
        if self.session.session_type == SessionType::Discovery {
            // "MUST ONLY accept Text Requests [...] and a Logout Request. [...] All other requests MUST be rejected" (§4.3).
            self.reject(head, RejectReason::PROTOCOL_ERROR);
            return;
        }
        if nop.ttt != Ttt::RESERVED && self.timers.pong(nop.ttt) {
            self.events.push_back(Event::Pong);
        }
        if nop.itt == Itt::RESERVED {
            if !nop.immediate {
                // "If the Initiator Task Tag contains 0xffffffff, the I bit MUST be set to 1" (§11.18.1).
                self.reject(head, RejectReason::PROTOCOL_ERROR);
            }
            return;
        }
        self.timers.initiator_pings();
        let answer = NopIn {
            lun: Lun::default(),
            itt: nop.itt,
            ttt: Ttt::RESERVED,
            numbers: Numbers::default(),
        };
        // "up to the first MaxRecvDataSegmentLength bytes of the initiator-provided Ping Data" (§11.19).
        // Cut by copying: a slice would keep the memory of all of it while it waits.
        let echo = match data.get(..self.session.params.initiator_max_recv as usize) {
            Some(head) => Bytes::copy_from_slice(head),
            None => data,
        };
        self.tx.send(Control::new(answer.encode(), echo));
    }
}

fn cmd_sn_of(head: &Head) -> CmdSn {
    // All numbered requests have it at the same place.
    NopOut::parse(&head.bhs).cmd_sn
}
