//! Data of one task: on its way in (immediate, unsolicited, solicited), and on its way out (Data-In and status).

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::buffer::{Buffer, Pool};
use crate::error::TransferFault;
use crate::login::Params;
use crate::pdu::{Bhs, DataIn, DataOut, Numbers, Residual, ScsiCommand, ScsiResponse};
use crate::types::{DataSn, Itt, R2tSn, Ttt};

/// A run of Data-Out PDUs: the unsolicited ones, or the answer to one R2T.
#[derive(Debug)]
struct Sequence {
    ttt: Ttt,
    next: u32,
    end: u32,
    data_sn: DataSn,
}

/// Where the data of a PDU goes.
#[derive(Debug)]
pub(crate) enum Placement {
    /// Into this buffer, which comes back with [`Inbound::end`].
    Into(Buffer),
    /// Nowhere: the task has failed, or the data was not asked for.
    Discard,
}

/// The write data of one task. Data arrives in order (DataPDUInOrder and DataSequenceInOrder are always Yes), so that
/// the buffer only ever grows at its end.
#[derive(Debug)]
pub(crate) struct Inbound {
    itt: Itt,
    /// Bytes to collect: the expected length, or the limit of one transfer.
    want: u32,
    buffer: Buffer,
    unsolicited: Option<Sequence>,
    bursts: VecDeque<Sequence>,
    /// Bytes that were sent unasked or asked for by R2Ts so far.
    requested: u32,
    r2t_sn: R2tSn,
    fault: Option<TransferFault>,
    reserved: usize,
}

impl Inbound {
    /// `immediate` is what came with the command, `immediate_len` its length on the wire (0 buffer bytes of it when it was
    /// not allowed).
    pub(crate) fn new(
        command: &ScsiCommand,
        immediate: Option<Buffer>,
        immediate_len: u32,
        params: &Params,
        transfer_limit: u32,
        pool: &Pool,
    ) -> Self {
        let itt = command.itt;
        let edtl = if command.write { command.edtl } else { 0 };
        let want = edtl.min(transfer_limit);
        let first_burst = edtl.min(params.first_burst_length);
        let mut fault = None;
        if immediate_len > 0 && (!command.write || !params.immediate_data) {
            fault = Some(TransferFault::UnexpectedUnsolicited { itt });
        } else if immediate_len > first_burst {
            fault = Some(TransferFault::IncorrectAmount { itt });
        }
        let more = command.write && !command.is_final && !params.initial_r2t && immediate_len < first_burst;
        let unsolicited = more.then_some(Sequence {
            ttt: Ttt::RESERVED,
            next: immediate_len,
            end: first_burst,
            data_sn: DataSn(0),
        });
        let requested = if unsolicited.is_some() {
            first_burst
        } else {
            immediate_len.min(want)
        };
        Self {
            itt,
            want,
            buffer: immediate.unwrap_or_else(|| Buffer::new(Self::capacity(want, params), pool)),
            unsolicited,
            bursts: VecDeque::new(),
            requested,
            r2t_sn: R2tSn(0),
            fault,
            reserved: requested as usize,
        }
    }

    /// First allocation of a transfer of `want` bytes: never more than one burst.
    pub(crate) fn capacity(want: u32, params: &Params) -> usize {
        want.min(params.max_burst_length.max(params.first_burst_length)) as usize
    }

    /// Bytes that the budget counts for this task.
    pub(crate) fn reserved(&self) -> usize {
        self.reserved
    }

    /// Bytes of all its data.
    pub(crate) fn wanted(&self) -> usize {
        self.want as usize
    }

    pub(crate) fn fault(&self) -> Option<TransferFault> {
        self.fault
    }

    /// R2Ts sent.
    pub(crate) fn r2ts(&self) -> R2tSn {
        self.r2t_sn
    }

    /// Tags whose data is still to come.
    pub(crate) fn open_tags(&self) -> impl Iterator<Item = Ttt> + '_ {
        self.unsolicited
            .iter()
            .chain(&self.bursts)
            .map(|sequence| sequence.ttt)
    }

    /// Sequences that have not ended.
    pub(crate) fn open_sequences(&self) -> usize {
        self.open_tags().count()
    }

    /// Nothing more will come: everything is here, or the task has failed and its last sequence has ended ("MUST wait
    /// until it receives a data PDU with the F bit set", §11.4.2).
    pub(crate) fn is_complete(&self) -> bool {
        let ended = self.unsolicited.is_none() && self.bursts.is_empty();
        ended && (self.fault.is_some() || self.buffer.filled() >= self.want as usize)
    }

    /// The next R2T: offset and length.
    pub(crate) fn next_r2t(&self, params: &Params) -> Option<(u32, u32)> {
        let rest = self.want.saturating_sub(self.requested);
        let may = self.fault.is_none()
            && self.unsolicited.is_none()
            && self.bursts.len() < usize::from(params.max_outstanding_r2t);
        (may && rest > 0).then(|| (self.requested, rest.min(params.max_burst_length)))
    }

    /// An R2T for what [`Self::next_r2t`] said is on its way; its number.
    pub(crate) fn solicit(&mut self, ttt: Ttt, offset: u32, len: u32) -> R2tSn {
        assert_eq!(offset, self.requested, "R2Ts are contiguous");
        self.requested = offset + len;
        self.reserved += len as usize;
        self.bursts.push_back(Sequence {
            ttt,
            next: offset,
            end: offset + len,
            data_sn: DataSn(0),
        });
        let number = self.r2t_sn;
        self.r2t_sn = number.next();
        number
    }

    /// A Data-Out header of `len` bytes came: checks its numbers and says where the data goes.
    pub(crate) fn begin(&mut self, pdu: &DataOut, len: u32) -> Placement {
        if let Err(fault) = self.check(pdu, len) {
            self.fault.get_or_insert(fault);
        }
        if self.fault.is_some() {
            return Placement::Discard;
        }
        let end = self.buffer.filled() + len as usize;
        assert!(
            end <= self.want as usize,
            "no sequence reaches beyond what is wanted"
        );
        Placement::Into(core::mem::take(&mut self.buffer))
    }

    fn check(&mut self, pdu: &DataOut, len: u32) -> Result<(), TransferFault> {
        let itt = self.itt;
        let sequence = if pdu.ttt == Ttt::RESERVED {
            self.unsolicited
                .as_mut()
                .ok_or(TransferFault::UnexpectedUnsolicited { itt })?
        } else {
            // "Within a task, outstanding R2Ts MUST be fulfilled in the order in which they were received" (§11.8).
            let wrong = TransferFault::WrongTtt { itt, got: pdu.ttt };
            self.bursts
                .front_mut()
                .filter(|burst| burst.ttt == pdu.ttt)
                .ok_or(wrong)?
        };
        let (expected_sn, expected_offset) = (sequence.data_sn, sequence.next);
        sequence.data_sn = expected_sn.next();
        sequence.next = sequence.next.saturating_add(len);
        if pdu.data_sn != expected_sn {
            return Err(TransferFault::DataSnOutOfOrder {
                itt,
                expected: expected_sn,
                got: pdu.data_sn,
            });
        }
        if pdu.buffer_offset != expected_offset {
            return Err(TransferFault::OffsetOutOfOrder {
                itt,
                expected: expected_offset,
                got: pdu.buffer_offset,
            });
        }
        if sequence.next > sequence.end || (pdu.is_final && sequence.next < sequence.end) {
            return Err(TransferFault::IncorrectAmount { itt });
        }
        Ok(())
    }

    /// The PDU is complete; its buffer comes back. Says how many sequences ended with it.
    pub(crate) fn end(&mut self, pdu: &DataOut, buffer: Option<Buffer>, digest_ok: bool) -> usize {
        if let Some(buffer) = buffer {
            self.buffer = buffer;
        }
        if !digest_ok {
            self.fault.get_or_insert(TransferFault::Digest { itt: self.itt });
        }
        if !pdu.is_final {
            return 0;
        }
        if pdu.ttt == Ttt::RESERVED {
            return usize::from(self.unsolicited.take().is_some());
        }
        let before = self.bursts.len();
        self.bursts.retain(|burst| burst.ttt != pdu.ttt);
        before - self.bursts.len()
    }

    /// Moves the data out, for the owner.
    pub(crate) fn take_data(&mut self) -> Bytes {
        core::mem::take(&mut self.buffer).freeze()
    }
}

/// What one PDU of ours may carry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SegmentLimits {
    pub(crate) max_recv: u32,
    pub(crate) max_burst: u32,
}

/// The answer to one command: data cut into Data-In PDUs, one at a time as they are sent, and its status.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) itt: Itt,
    pub(crate) status: u8,
    pub(crate) sense: Bytes,
    /// What is not yet sent.
    pub(crate) data: Bytes,
    pub(crate) residual: Residual,
    pub(crate) bidi_residual: Residual,
    /// First DataSN: R2Ts and Data-In share the numbers of a bidirectional command (§4.2.2.4).
    pub(crate) data_sn: DataSn,
    pub(crate) bidirectional: bool,
    /// Whether it holds a place in the command window, or one of the immediate ones.
    pub(crate) windowed: bool,
    /// Bytes of data that are sent.
    pub(crate) sent: usize,
    pub(crate) in_burst: usize,
}

const GOOD: u8 = 0x00;
const CONDITION_MET: u8 = 0x04;

/// One PDU of an [`Outbound`].
pub(crate) enum Piece {
    /// Data; its status rides along when this is the last PDU.
    Data {
        /// Header without numbers.
        header: DataIn,
        /// Data segment.
        data: Bytes,
    },
    /// The status.
    Status {
        /// Header without numbers.
        header: ScsiResponse,
        /// Sense data with its length.
        data: Bytes,
    },
}

impl Piece {
    pub(crate) fn is_last(&self) -> bool {
        match self {
            Self::Data { header, .. } => header.status.is_some(),
            Self::Status { .. } => true,
        }
    }

    pub(crate) fn encode(self) -> (Bhs, Bytes) {
        match self {
            Self::Data { header, data } => (header.encode(), data),
            Self::Status { header, data } => (header.encode(), data),
        }
    }
}

impl Outbound {
    /// Bytes of data that are not yet sent.
    pub(crate) fn unsent(&self) -> usize {
        self.data.len()
    }

    /// "Status can accompany the last Data-In PDU if the command did not end with an exception", and never in a
    /// bidirectional command (§11.7, §11.7.3).
    fn status_rides(&self) -> bool {
        matches!(self.status, GOOD | CONDITION_MET) && self.sense.is_empty() && !self.bidirectional
    }

    /// The next PDU.
    pub(crate) fn next_piece(&mut self, limits: SegmentLimits) -> Piece {
        if self.unsent() == 0 {
            return self.status_piece();
        }
        let burst_left = (limits.max_burst as usize).saturating_sub(self.in_burst);
        // Segments other than the last of a sequence should be whole words (§11.7.7).
        let segment = (limits.max_recv & !3) as usize;
        let len = self.unsent().min(segment).min(burst_left);
        let offset = self.sent;
        let data = self.data.split_to(len);
        self.sent += len;
        self.in_burst += len;
        let last = self.unsent() == 0;
        let is_final = last || self.in_burst >= limits.max_burst as usize;
        if is_final {
            self.in_burst = 0;
        }
        let data_sn = self.data_sn;
        self.data_sn = data_sn.next();
        Piece::Data {
            header: DataIn {
                is_final,
                status: (last && self.status_rides()).then_some((self.status, self.residual)),
                itt: self.itt,
                numbers: Numbers::default(),
                data_sn,
                buffer_offset: u32::try_from(offset).expect("at most EDTL bytes are sent"),
            },
            data,
        }
    }

    fn status_piece(&self) -> Piece {
        let mut data = BytesMut::new();
        if !self.sense.is_empty() {
            let sense = self.sense.get(..SENSE_MAX).unwrap_or(&self.sense);
            data.extend_from_slice(&u16::try_from(sense.len()).unwrap_or(u16::MAX).to_be_bytes());
            data.extend_from_slice(sense);
        }
        Piece::Status {
            header: ScsiResponse {
                response: 0,
                status: self.status,
                itt: self.itt,
                numbers: Numbers::default(),
                exp_data_sn: self.data_sn,
                bidi_residual: self.bidi_residual,
                residual: self.residual,
            },
            data: data.freeze(),
        }
    }
}

/// The longest sense data (SPC-5 §4.4.1: 252 bytes).
const SENSE_MAX: usize = 252;

/// Fixed format sense data, ABORTED COMMAND with this ASC and ASCQ (§11.4.7.2).
pub(crate) fn aborted_command_sense((asc, ascq): (u8, u8)) -> Bytes {
    let mut sense = [0; 18];
    for (at, value) in [(0, 0x70), (2, 0x0b), (7, 10), (12, asc), (13, ascq)] {
        if let Some(byte) = sense.get_mut(at) {
            *byte = value;
        }
    }
    Bytes::copy_from_slice(&sense)
}
