//! What a command turns into: a finished reply, or one block operation for the owner and what to make of its
//! result.

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    NexusId,
    copy::{CopyOutcome, CopyRequest, Kind},
    mode::SavedModePages,
    sense::{Sense, SenseKey},
};

/// SAM-5 status codes.
pub mod status {
    /// Done.
    pub const GOOD: u8 = 0x00;
    /// Failed; sense data says why.
    pub const CHECK_CONDITION: u8 = 0x02;
    /// PRE-FETCH: the blocks are where a read finds them quickly.
    pub const CONDITION_MET: u8 = 0x04;
    /// Not now; send it again.
    pub const BUSY: u8 = 0x08;
    /// Another I_T nexus holds a reservation that forbids this.
    pub const RESERVATION_CONFLICT: u8 = 0x18;
}

/// The end of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// SAM status, see [`status`].
    pub status: u8,
    /// Encoded sense data; empty unless the status is CHECK CONDITION.
    pub sense: Bytes,
    /// Data-in, already cut to the allocation length and to what the initiator takes.
    pub data: Bytes,
    /// Bytes the command wanted to move in its direction: residuals are counted against this.
    pub transfer_len: u64,
}

impl Reply {
    pub(crate) const fn status(status: u8) -> Self {
        Self {
            status,
            sense: Bytes::new(),
            data: Bytes::new(),
            transfer_len: 0,
        }
    }

    pub(crate) const fn good() -> Self {
        Self::status(status::GOOD)
    }

    pub(crate) const fn busy() -> Self {
        Self::status(status::BUSY)
    }

    /// GOOD for a command that took (or would have taken) `transfer_len` bytes of data-out.
    pub(crate) fn took(transfer_len: u64) -> Self {
        Self {
            transfer_len,
            ..Self::good()
        }
    }

    /// GOOD with parameter data. Truncation by allocation length is no error (SPC-4 §4.2.5.6): initiators
    /// probe with four bytes first, and the length fields inside the data stay what they were.
    pub(crate) fn parameter_data(mut data: Bytes, allocation: u64) -> Self {
        data.truncate(usize::try_from(allocation).unwrap_or(usize::MAX));
        Self {
            transfer_len: data.len() as u64,
            data,
            ..Self::good()
        }
    }

    /// Cuts the data to what the initiator has room for; `transfer_len` stays, and makes the residual
    /// overflow.
    pub(crate) fn cut(mut self, data_in_max: u64) -> Self {
        self.data
            .truncate(usize::try_from(data_in_max).unwrap_or(usize::MAX));
        self
    }

    pub(crate) fn check(sense: Sense, descriptor_sense: bool) -> Self {
        Self {
            sense: sense.encode(descriptor_sense),
            ..Self::status(status::CHECK_CONDITION)
        }
    }

    /// Whether the command ended well (GOOD or CONDITION MET).
    pub const fn is_good(&self) -> bool {
        matches!(self.status, status::GOOD | status::CONDITION_MET)
    }
}

/// What to do with a command.
#[derive(Debug)]
pub enum Plan {
    /// It is answered already.
    Done(Reply),
    /// The owner carries out [`Planned::op`] and gives the result to [`Planned::finish`].
    Op(Planned),
    /// The owner answers at once and carries the operation out afterwards (IMMED): nobody hears of its result.
    Early(Reply, BlockOp),
}

/// Which bytes a VERIFY compares with the medium (BYTCHK).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// None: the medium has to be readable (BYTCHK 00b).
    None,
    /// `data_out[..len]` against the range (BYTCHK 01b).
    Data,
    /// `data_out[..block size]` against every block of the range (BYTCHK 11b).
    OneBlock,
}

/// One operation on the bytes of the logical unit. Offsets and lengths are bytes, multiples of the block
/// size, inside the capacity and (except for lists) not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "offset, len and fua mean the same in every variant and are described above"
)]
pub enum BlockOp {
    /// Read into [`BlockResult::Data`], exactly `len` bytes.
    Read { offset: u64, len: u32, fua: bool },
    /// Write `data_out[..len]`; durable before the answer when `fua`.
    Write { offset: u64, len: u32, fua: bool },
    /// Write `data_out[..len]`, make it durable, read it back; `compare` it with what was sent.
    WriteAndVerify { offset: u64, len: u32, compare: bool },
    /// Read the range from the medium and compare.
    Verify { offset: u64, len: u32, compare: Compare },
    /// Zeroes; the blocks may be deallocated when `unmap`.
    WriteZeroes {
        offset: u64,
        len: u64,
        unmap: bool,
        fua: bool,
    },
    /// Fill with the block `data_out[..block size]`, which is not all zeroes.
    WriteSame { offset: u64, len: u64, fua: bool },
    /// Deallocate the ranges `(offset, len)`; they read as zeroes afterwards (LBPRZ is one).
    Unmap { ranges: Vec<(u64, u64)> },
    /// When the range equals `data_out[..len]`, write `data_out[len..2 * len]`: one atomic step against every
    /// other write.
    CompareAndWrite { offset: u64, len: u32, fua: bool },
    /// Write the bitwise OR of the range and `data_out[..len]`: one atomic step against every other write.
    OrWrite { offset: u64, len: u32, fua: bool },
    /// Make everything that was acknowledged durable.
    Flush,
    /// Bring the range where a read finds it quickly.
    PreFetch { offset: u64, len: u64 },
    /// Provisioning of the range, in order, as [`BlockResult::Extents`].
    LbaStatus {
        offset: u64,
        len: u64,
        max_descriptors: usize,
    },
    /// Space figures, as [`BlockResult::Thin`].
    ThinFigures,
    /// Keep the saved mode pages over restarts.
    SaveModePages(SavedModePages),
    /// Copy, or make a token; ends with [`crate::Unit::copy_ended`] and [`BlockResult::Copied`].
    Copy(CopyRequest),
    /// Persist and enforce a change of reservations before the answer.
    Reservations(ReservationChange),
}

/// What PERSISTENT RESERVE OUT asks of the owner. The unit enforces the change from its plan on: a save that fails is
/// answered with INTERNAL TARGET FAILURE and takes nothing back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationChange {
    /// State to keep over restarts (APTPL); `None` when nothing persistent changed.
    pub save: Option<Bytes>,
    /// Order of `save`s of this unit: an older one must never overwrite a newer one. It is part of the saved state, so
    /// that it goes on after [`crate::Unit::restore_reservations`].
    pub sequence: u64,
    /// PREEMPT AND ABORT: the I_T nexuses whose tasks on this unit end without status before the answer.
    pub abort_tasks_of: Vec<NexusId>,
}

/// One run of blocks with the same provisioning; bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LbaExtent {
    /// Start on the logical unit.
    pub offset: u64,
    /// Length.
    pub len: u64,
    /// Mapped, or else deallocated.
    pub mapped: bool,
}

/// Space as the pool sees it; bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThinFigures {
    /// Still available to this unit.
    pub available_bytes: u64,
    /// Used by this unit.
    pub used_bytes: u64,
}

/// How a [`BlockOp`] ended.
#[derive(Debug)]
pub enum BlockResult {
    /// Done; nothing to give back.
    Done,
    /// The bytes of a read.
    Data(Bytes),
    /// The answer to [`BlockOp::LbaStatus`].
    Extents(Vec<LbaExtent>),
    /// The answer to [`BlockOp::ThinFigures`].
    Thin(ThinFigures),
    /// How a copy ended, well or not.
    Copied(CopyOutcome),
    /// It failed.
    Failed(BlockError),
}

/// Why a [`BlockOp`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The data differs; `offset` counts bytes from the start of the data-out buffer to the first difference.
    #[error("miscompare at byte {offset} of the data-out buffer")]
    Miscompare {
        /// Bytes from the start of the data-out buffer.
        offset: u64,
    },
    /// The pool has no space for this write.
    #[error("no space")]
    NoSpace,
    /// The pool has no space for this write yet: it grows right now.
    #[error("space allocation in progress")]
    Growing,
    /// The medium failed at this byte of the logical unit.
    #[error("medium error at byte {offset}")]
    Medium {
        /// Byte on the logical unit.
        offset: u64,
    },
    /// The backend refuses writes.
    #[error("read-only")]
    ReadOnly,
    /// The backend is out of order (a poisoned pool).
    #[error("backend failure")]
    Fault,
    /// The operation was given up before it changed anything.
    #[error("aborted")]
    Aborted,
    /// The backend cannot take it now.
    #[error("busy")]
    Busy,
}

/// How the result becomes a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// GOOD with the data that was read.
    Data,
    /// GOOD without data.
    Good,
    /// CONDITION MET without data.
    Met,
    /// GOOD, or why the copy failed.
    Copy(Kind),
    /// GET LBA STATUS parameter data.
    LbaStatus { lba: u64, allocation: u64 },
    /// LOG SENSE, logical block provisioning page.
    ThinLog {
        threshold_set_bytes: u64,
        start: u16,
        allocation: u64,
    },
}

/// A block operation and what becomes of its result.
#[derive(Debug)]
pub struct Planned {
    pub(crate) op: BlockOp,
    pub(crate) answer: Answer,
    pub(crate) transfer_len: u64,
    pub(crate) data_in_max: u64,
    pub(crate) block_size: u32,
    pub(crate) descriptor_sense: bool,
}

impl Planned {
    /// What the owner has to do.
    pub const fn op(&self) -> &BlockOp {
        &self.op
    }

    /// Turns the result into the command's reply. A result of the wrong kind is INTERNAL TARGET FAILURE, as
    /// is a read of the wrong length: the initiator must not take either for data.
    pub fn finish(self, result: BlockResult) -> Reply {
        let data_in_max = self.data_in_max;
        self.reply(result).cut(data_in_max)
    }

    fn reply(self, result: BlockResult) -> Reply {
        match (self.answer, result) {
            (_, BlockResult::Failed(error)) => self.failed(error),
            (Answer::Data, BlockResult::Data(data)) if self.is_whole_read(&data) => Reply {
                data,
                ..Reply::took(self.transfer_len)
            },
            (Answer::Good, BlockResult::Done) => Reply::took(self.transfer_len),
            (Answer::Met, BlockResult::Done) => Reply::status(status::CONDITION_MET),
            (Answer::Copy(kind), BlockResult::Copied(outcome)) => match outcome.sense(kind) {
                None => Reply::took(self.transfer_len),
                Some(sense) => Reply {
                    transfer_len: self.transfer_len,
                    ..Reply::check(sense, self.descriptor_sense)
                },
            },
            (Answer::LbaStatus { lba, allocation }, BlockResult::Extents(extents)) => {
                Reply::parameter_data(lba_status(lba, &extents, self.block_size), allocation)
            }
            (
                Answer::ThinLog {
                    threshold_set_bytes,
                    start,
                    allocation,
                },
                BlockResult::Thin(figures),
            ) => Reply::parameter_data(
                crate::log::thin_page(figures, threshold_set_bytes, start),
                allocation,
            ),
            _ => Reply::check(Sense::TARGET_FAILURE, self.descriptor_sense),
        }
    }

    fn is_whole_read(&self, data: &Bytes) -> bool {
        matches!(self.op, BlockOp::Read { len, .. } if len as usize == data.len())
    }

    fn failed(&self, error: BlockError) -> Reply {
        let sense = match error {
            BlockError::Miscompare { offset } => Sense::miscompare(offset),
            BlockError::NoSpace => Sense::NO_SPACE,
            BlockError::Growing => Sense::SPACE_IN_PROGRESS,
            BlockError::Medium { offset } => Sense::new(
                SenseKey::MEDIUM_ERROR,
                if self.writes() { 0x0c } else { 0x11 },
                0x00,
            )
            .with_information(offset / u64::from(self.block_size)),
            BlockError::ReadOnly => Sense::WRITE_PROTECTED,
            BlockError::Fault => Sense::TARGET_FAILURE,
            BlockError::Aborted => Sense::new(SenseKey::ABORTED_COMMAND, 0x00, 0x00),
            BlockError::Busy => return Reply::status(status::BUSY),
        };
        Reply::check(sense, self.descriptor_sense)
    }

    const fn writes(&self) -> bool {
        matches!(
            self.op,
            BlockOp::Write { .. }
                | BlockOp::WriteAndVerify { .. }
                | BlockOp::WriteZeroes { .. }
                | BlockOp::WriteSame { .. }
                | BlockOp::Unmap { .. }
                | BlockOp::CompareAndWrite { .. }
                | BlockOp::OrWrite { .. }
                | BlockOp::Flush
        )
    }
}

/// GET LBA STATUS parameter data (SBC-3 §5.4.2). The first descriptor starts at the LBA of the CDB: QEMU
/// takes anything else for an I/O error.
fn lba_status(lba: u64, extents: &[LbaExtent], block_size: u32) -> Bytes {
    let block_size = u64::from(block_size);
    let mut descriptors = BytesMut::with_capacity(16 * extents.len());
    let mut next = lba;
    for extent in extents {
        let end = extent.offset.saturating_add(extent.len) / block_size;
        while next < end {
            let blocks = u32::try_from(end - next).unwrap_or(u32::MAX);
            descriptors.put_u64(next);
            descriptors.put_u32(blocks);
            descriptors.put_u32(if extent.mapped { 0 } else { 0x0100_0000 });
            next += u64::from(blocks);
        }
    }
    let mut data = BytesMut::with_capacity(8 + descriptors.len());
    // PARAMETER DATA LENGTH counts the four reserved bytes behind it too.
    data.put_u32(u32::try_from(descriptors.len() + 4).unwrap_or(u32::MAX));
    data.put_u32(0);
    data.put(descriptors);
    data.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(op: BlockOp, answer: Answer) -> Planned {
        Planned {
            op,
            answer,
            transfer_len: 512,
            data_in_max: u64::MAX,
            block_size: 512,
            descriptor_sense: false,
        }
    }

    #[test]
    fn a_short_read_is_never_taken_for_data() {
        let read = || {
            planned(
                BlockOp::Read {
                    offset: 0,
                    len: 512,
                    fua: false,
                },
                Answer::Data,
            )
        };
        let short = read().finish(BlockResult::Data(Bytes::from_static(&[1; 511])));
        assert_eq!(
            (short.status, short.sense[2], short.data.len()),
            (status::CHECK_CONDITION, 4, 0)
        );
        assert_eq!(
            read()
                .finish(BlockResult::Data(Bytes::from_static(&[1; 512])))
                .data
                .len(),
            512
        );
        assert_eq!(read().finish(BlockResult::Done).status, status::CHECK_CONDITION);
    }

    #[test]
    fn errors_become_the_sense_that_initiators_act_on() {
        let cases = [
            (BlockError::Miscompare { offset: 7 }, [0xe, 0x1d, 0x00], Some(7)),
            (BlockError::NoSpace, [0x7, 0x27, 0x07], None),
            (BlockError::Growing, [0x2, 0x04, 0x14], None),
            (BlockError::Medium { offset: 1024 }, [0x3, 0x0c, 0x00], Some(2)),
            (BlockError::ReadOnly, [0x7, 0x27, 0x00], None),
            (BlockError::Fault, [0x4, 0x44, 0x00], None),
            (BlockError::Aborted, [0xb, 0x00, 0x00], None),
        ];
        for (error, [key, asc, ascq], information) in cases {
            let op = BlockOp::Write {
                offset: 1024,
                len: 512,
                fua: false,
            };
            let reply = planned(op, Answer::Good).finish(BlockResult::Failed(error));
            assert_eq!(
                [reply.sense[2], reply.sense[12], reply.sense[13]],
                [key, asc, ascq],
                "{error}"
            );
            let valid = (reply.sense[0] & 0x80 != 0).then(|| {
                u32::from_be_bytes([reply.sense[3], reply.sense[4], reply.sense[5], reply.sense[6]])
            });
            assert_eq!(valid, information, "{error}");
        }
        let op = BlockOp::Flush;
        let busy = planned(op, Answer::Good).finish(BlockResult::Failed(BlockError::Busy));
        assert_eq!((busy.status, busy.sense.len()), (status::BUSY, 0));
        let op = BlockOp::Read {
            offset: 0,
            len: 512,
            fua: false,
        };
        let answer = Answer::Data;
        let unread = planned(op, answer).finish(BlockResult::Failed(BlockError::Medium { offset: 0 }));
        assert_eq!([unread.sense[2], unread.sense[12]], [0x3, 0x11]);
    }

    #[test]
    fn lba_status_starts_at_the_requested_block() {
        let extents = [
            LbaExtent {
                offset: 0,
                len: 4096,
                mapped: true,
            },
            LbaExtent {
                offset: 4096,
                len: 1 << 42,
                mapped: false,
            },
        ];
        let data = lba_status(3, &extents, 512);
        assert_eq!(data[..8], [0, 0, 0, 68, 0, 0, 0, 0]);
        assert_eq!(data[8..24], [0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0, 0]);
        assert_eq!(
            data[24..40],
            [0, 0, 0, 0, 0, 0, 0, 8, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]
        );
        // 2^33 blocks take two full descriptors and one for the last two blocks.
        assert_eq!(data[56..], [0, 0, 0, 2, 0, 0, 0, 6, 0, 0, 0, 2, 1, 0, 0, 0]);
    }
}
