//! Third-party copies (SPC-4 §5.16, SBC-3 §4.28): EXTENDED COPY, and tokens (ODX).
//!
//! A copy names other logical units, which only the owner knows: a command becomes one [`CopyRequest`], the owner carries
//! it out and tells of its progress and its end. What RECEIVE COPY RESULTS reports is kept here, for each I_T nexus.

mod extended;
pub(crate) mod limits;
mod results;
mod token;

use std::collections::VecDeque;

use bytes::Bytes;

pub(crate) use results::receive;
pub use token::RodToken;

use crate::{
    NexusId,
    cdb::Cdb,
    command::Access,
    plan::{Answer, BlockError, BlockOp, Reply},
    sense::{Sense, SenseKey},
    unit::{Context, Ready, Unit},
};

/// Service actions of THIRD-PARTY COPY OUT (83h).
const EXTENDED_COPY_LID1: u8 = 0x00;
const EXTENDED_COPY_LID4: u8 = 0x01;
const POPULATE_TOKEN: u8 = 0x10;
const WRITE_USING_TOKEN: u8 = 0x11;
const COPY_OPERATION_ABORT: u8 = 0x1c;

/// Names a copy that runs, between the unit and its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyTicket(pub u64);

/// One copy for the owner to carry out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyRequest {
    /// For [`Unit::copy_progress`] and [`Unit::copy_ended`].
    pub ticket: CopyTicket,
    /// What is to be done.
    pub work: CopyWork,
}

/// What a copy does. Ranges are `(offset, len)` in bytes on the unit that planned it, inside its capacity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyWork {
    /// EXTENDED COPY: the segments one after the other, each from a point in time.
    Segments {
        /// The units that segments name by index.
        units: Vec<CopyUnit>,
        /// At most 256.
        segments: Vec<CopySegment>,
    },
    /// POPULATE TOKEN: a token for the ranges as they are now, one behind the other.
    Populate {
        /// At most 64, without overlap.
        ranges: Vec<(u64, u64)>,
        /// The token dies when it is not used for so many seconds.
        inactivity_s: u32,
    },
    /// WRITE USING TOKEN.
    WriteToken {
        /// As the initiator sent it.
        token: RodToken,
        /// Bytes of the token's data to pass over.
        skip: u64,
        /// Where to, in this order.
        ranges: Vec<(u64, u64)>,
    },
    /// WRITE USING TOKEN with the token of zeroes.
    WriteZeroes {
        /// Where to, in this order.
        ranges: Vec<(u64, u64)>,
    },
}

/// A unit as a copy names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyUnit {
    /// Its NAA designator; `None` when it was named by something that no unit here has.
    pub naa: Option<[u8; 16]>,
    /// DISK BLOCK LENGTH, as the initiator believes it; zero when it does not say.
    pub block_len: u32,
}

/// One run of blocks from unit to unit; nothing of it is checked against the units yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopySegment {
    /// Index of the source, always within the units.
    pub source: u16,
    /// Index of the destination, always within the units.
    pub destination: u16,
    /// How many blocks.
    pub blocks: u16,
    /// DC: they are blocks of the destination, else of the source.
    pub by_destination: bool,
    /// First block on the source.
    pub source_lba: u64,
    /// First block on the destination.
    pub destination_lba: u64,
}

/// How a copy ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOutcome {
    /// Segments, or ranges, that are complete.
    pub segments: u16,
    /// Bytes that were copied, or that the token stands for.
    pub bytes: u64,
    /// Why it ended.
    pub end: CopyEnd,
}

/// Why a copy ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyEnd {
    /// All is copied.
    Done,
    /// Not all of it: a WRITE USING TOKEN that took long enough. The initiator asks for the rest.
    Partial,
    /// POPULATE TOKEN has made this one.
    Token(RodToken),
    /// It failed in the segment after the complete ones.
    Failed(CopyError),
}

/// Why a copy failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// There is no such unit, or the initiator cannot reach it.
    #[error("a unit of the copy cannot be reached")]
    Unreachable,
    /// A reservation on a unit forbids it.
    #[error("a unit of the copy is reserved")]
    Reserved,
    /// A segment ends behind the unit.
    #[error("a segment ends behind the unit")]
    OutOfRange,
    /// The initiator believes in another block length than the unit has.
    #[error("the block length is another one")]
    BlockLength,
    /// The bytes do not make whole blocks of the destination.
    #[error("the segment does not fill the last block")]
    Inexact,
    /// No token like this was made here, or it is over since long.
    #[error("unknown token")]
    TokenUnknown,
    /// It was not used for too long.
    #[error("expired token")]
    TokenExpired,
    /// What it stood for is gone: its LUN was reverted or removed, or there were too many tokens.
    #[error("cancelled token")]
    TokenCancelled,
    /// The ranges are longer than the rest of the token's data.
    #[error("more data than the token has")]
    TokenTooShort,
    /// No room for another token.
    #[error("too many tokens")]
    NoTokenResources,
    /// A read or a write failed.
    #[error(transparent)]
    Block(BlockError),
}

impl CopyError {
    /// A failed segment of EXTENDED COPY is COPY ABORTED, whatever the reason; a token operation fails like a write.
    const fn sense(self, segments: bool) -> Sense {
        let (key, asc, ascq) = match self {
            Self::Unreachable => (SenseKey::COPY_ABORTED, 0x0d, 0x02),
            Self::Reserved => (SenseKey::COPY_ABORTED, 0x0d, 0x01),
            Self::OutOfRange => (SenseKey::COPY_ABORTED, 0x00, 0x00),
            Self::BlockLength => (SenseKey::ILLEGAL_REQUEST, 0x26, 0x00),
            Self::Inexact => (SenseKey::COPY_ABORTED, 0x26, 0x0a),
            Self::TokenUnknown => (SenseKey::ILLEGAL_REQUEST, 0x23, 0x04),
            Self::TokenExpired => (SenseKey::ILLEGAL_REQUEST, 0x23, 0x07),
            Self::TokenCancelled => (SenseKey::ILLEGAL_REQUEST, 0x23, 0x08),
            Self::TokenTooShort => (SenseKey::ILLEGAL_REQUEST, 0x26, 0x00),
            Self::NoTokenResources => (SenseKey::ILLEGAL_REQUEST, 0x55, 0x0d),
            Self::Block(error) => {
                let (key, asc, ascq) = match error {
                    BlockError::NoSpace => (SenseKey::DATA_PROTECT, 0x27, 0x07),
                    BlockError::Growing => (SenseKey::NOT_READY, 0x04, 0x14),
                    BlockError::Medium { .. } => (SenseKey::MEDIUM_ERROR, 0x11, 0x00),
                    BlockError::ReadOnly => (SenseKey::DATA_PROTECT, 0x27, 0x00),
                    BlockError::Aborted | BlockError::Busy => (SenseKey::ABORTED_COMMAND, 0x00, 0x00),
                    BlockError::Miscompare { .. } | BlockError::Fault => {
                        (SenseKey::HARDWARE_ERROR, 0x44, 0x00)
                    }
                };
                (if segments { SenseKey::COPY_ABORTED } else { key }, asc, ascq)
            }
        };
        Sense::new(key, asc, ascq)
    }
}

impl CopyOutcome {
    /// The sense of a copy that failed.
    pub(crate) fn sense(&self, work: Kind) -> Option<Sense> {
        let CopyEnd::Failed(error) = &self.end else {
            return None;
        };
        let segments = work == Kind::Segments;
        Some(Sense {
            segment: segments.then_some(self.segments),
            ..error.sense(segments)
        })
    }
}

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Segments,
    Token,
}

impl CopyWork {
    pub(crate) const fn kind(&self) -> Kind {
        match self {
            Self::Segments { .. } => Kind::Segments,
            Self::Populate { .. } | Self::WriteToken { .. } | Self::WriteZeroes { .. } => Kind::Token,
        }
    }
}

/// LIST IDENTIFIER: of one byte (LID1) or of four; they are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ListId {
    One(u8),
    Four(u32),
}

/// Copies of one unit that may run at once.
const MAX_RUNNING: usize = 16;
/// Ended copies that are remembered for one I_T nexus.
const MAX_ENDED: usize = 32;

#[derive(Debug)]
struct Record {
    ticket: CopyTicket,
    nexus: NexusId,
    /// `None`: the initiator does not want to hear of it (LIST ID USAGE 11b).
    list: Option<ListId>,
    /// The service action that began it.
    action: u8,
    kind: Kind,
    /// IMMED: it runs behind an answer that has been given.
    background: bool,
    segments: u16,
    bytes: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Running {
        /// It is to end as soon as it can.
        cancelled: bool,
    },
    Ended {
        partial: bool,
        sense: Option<Sense>,
        token: Option<RodToken>,
    },
}

/// The copies of one unit: those that run, and what is still to be told of others.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    records: VecDeque<Record>,
    last_ticket: u64,
}

impl Copies {
    /// # Errors
    /// OPERATION IN PROGRESS when the nexus has a copy under this list identifier, BUSY when too many run.
    fn begin(
        &mut self,
        nexus: NexusId,
        list: Option<ListId>,
        (action, kind): (u8, Kind),
        background: bool,
    ) -> Result<CopyTicket, Refusal> {
        let running = |record: &&Record| matches!(record.state, State::Running { .. });
        let same = |record: &Record| record.nexus == nexus && list.is_some() && record.list == list;
        if self.records.iter().filter(running).any(same) {
            return Err(Refusal::Check(Sense::OPERATION_IN_PROGRESS));
        }
        if self.records.iter().filter(running).count() >= MAX_RUNNING {
            return Err(Refusal::Busy);
        }
        // A new copy takes the place of an old one's report.
        self.records.retain(|record| !same(record));
        self.last_ticket += 1;
        let ticket = CopyTicket(self.last_ticket);
        self.records.push_back(Record {
            ticket,
            nexus,
            list,
            action,
            kind,
            background,
            segments: 0,
            bytes: 0,
            state: State::Running { cancelled: false },
        });
        Ok(ticket)
    }

    fn running(&mut self, ticket: CopyTicket) -> Option<&mut Record> {
        self.records
            .iter_mut()
            .find(|record| record.ticket == ticket && matches!(record.state, State::Running { .. }))
    }

    fn progress(&mut self, ticket: CopyTicket, segments: u16, bytes: u64) -> bool {
        let Some(record) = self.running(ticket) else {
            return false;
        };
        (record.segments, record.bytes) = (segments, bytes);
        matches!(record.state, State::Running { cancelled: false })
    }

    fn ended(&mut self, ticket: CopyTicket, outcome: &CopyOutcome) {
        let Some(record) = self.running(ticket) else {
            return;
        };
        (record.segments, record.bytes) = (outcome.segments, outcome.bytes);
        record.state = State::Ended {
            partial: outcome.end == CopyEnd::Partial,
            sense: outcome.sense(record.kind),
            token: match &outcome.end {
                CopyEnd::Token(token) => Some(token.clone()),
                _ => None,
            },
        };
        let nexus = record.nexus;
        let ended = |record: &Record| record.nexus == nexus && matches!(record.state, State::Ended { .. });
        self.records
            .retain(|record| record.list.is_some() || !matches!(record.state, State::Ended { .. }));
        if self.records.iter().filter(|record| ended(record)).count() > MAX_ENDED
            && let Some(oldest) = self.records.iter().position(ended)
        {
            self.records.remove(oldest);
        }
    }

    /// The newest record of the nexus under this identifier.
    fn find(&self, nexus: NexusId, list: ListId) -> Option<&Record> {
        self.records
            .iter()
            .rev()
            .find(|record| record.nexus == nexus && record.list == Some(list))
    }

    /// Ends what runs for which `wanted` holds, as soon as it can.
    fn cancel(&mut self, wanted: impl Fn(&Record) -> bool) -> bool {
        let mut any = false;
        for record in self.records.iter_mut().filter(|record| wanted(record)) {
            if let State::Running { cancelled } = &mut record.state {
                *cancelled = true;
                any = true;
            }
        }
        any
    }

    /// A reset: every copy ends.
    pub(crate) fn reset(&mut self) {
        self.cancel(|_| true);
    }

    /// I_T nexus loss: its copies end, and nobody asks for their results any more.
    pub(crate) fn nexus_lost(&mut self, nexus: NexusId) {
        self.cancel(|record| record.nexus == nexus);
        self.records
            .retain(|record| record.nexus != nexus || matches!(record.state, State::Running { .. }));
        for record in self.records.iter_mut().filter(|record| record.nexus == nexus) {
            record.list = None;
        }
    }
}

/// Why a copy does not begin.
#[derive(Debug)]
enum Refusal {
    Check(Sense),
    Busy,
}

/// A copy as its parameter list describes it.
#[derive(Debug)]
struct Parsed {
    list: Option<ListId>,
    immediate: bool,
    work: CopyWork,
    /// Bytes of the parameter list.
    transfer_len: u64,
}

/// THIRD-PARTY COPY OUT.
///
/// # Errors
/// The sense of a parameter list that is wrong; nothing has begun then.
pub(crate) fn out(
    unit: &mut Unit,
    context: &Context<'_>,
    cdb: &Cdb,
    data_out: &[u8],
) -> Result<Ready, Sense> {
    let parsed = match cdb.service_action() {
        EXTENDED_COPY_LID1 => extended::lid1(cdb, data_out)?,
        EXTENDED_COPY_LID4 => extended::lid4(cdb, data_out)?,
        POPULATE_TOKEN => token::populate(unit, cdb, data_out)?,
        WRITE_USING_TOKEN => token::write(unit, cdb, data_out)?,
        COPY_OPERATION_ABORT => return abort(unit, context.nexus, cdb),
        _ => return Err(Sense::invalid_cdb(1)),
    };
    let Some(parsed) = parsed else {
        // A parameter list of no bytes asks for nothing, and that is no error.
        return Ok(Ready::Reply(Reply::good()));
    };
    let Parsed {
        list,
        immediate,
        work,
        transfer_len,
    } = parsed;
    let kind = work.kind();
    let ticket = match unit
        .copies
        .begin(context.nexus, list, (cdb.service_action(), kind), immediate)
    {
        Ok(ticket) => ticket,
        Err(Refusal::Check(sense)) => return Err(sense),
        Err(Refusal::Busy) => return Ok(Ready::Reply(Reply::busy())),
    };
    let op = BlockOp::Copy(CopyRequest { ticket, work });
    Ok(if immediate {
        Ready::Early(Reply::took(transfer_len), op)
    } else {
        Ready::Transfer(op, Answer::Copy(kind), transfer_len)
    })
}

/// COPY OPERATION ABORT (SPC-4 §6.5): a copy under a four-byte list identifier.
fn abort(unit: &mut Unit, nexus: NexusId, cdb: &Cdb) -> Result<Ready, Sense> {
    let list = ListId::Four(cdb.u32(2));
    let found = unit
        .copies
        .cancel(|record| record.nexus == nexus && record.list == Some(list));
    if found {
        Ok(Ready::Reply(Reply::good()))
    } else {
        Err(Sense::invalid_cdb(2))
    }
}

impl Unit {
    /// How far a copy is. `false` when it is to end: by a reset, by COPY OPERATION ABORT, or because its I_T nexus is gone.
    pub fn copy_progress(&mut self, ticket: CopyTicket, segments: u16, bytes: u64) -> bool {
        self.copies.progress(ticket, segments, bytes)
    }

    /// A copy is over; to be told before its command is answered.
    pub fn copy_ended(&mut self, ticket: CopyTicket, outcome: &CopyOutcome) {
        self.copies.ended(ticket, outcome);
    }

    /// Whether the I_T nexus may read this unit, or write it, as part of a copy.
    ///
    /// # Errors
    /// [`CopyError::Reserved`] or [`BlockError::ReadOnly`], or [`CopyError::Unreachable`] for an I_T nexus that is not
    /// attached.
    pub fn copy_admits(&self, nexus: NexusId, writes: bool) -> Result<(), CopyError> {
        let access = if writes { Access::Exclusive } else { Access::Read };
        let name = &self.nexuses.get(&nexus).ok_or(CopyError::Unreachable)?.name;
        if self.reservations.conflicts(nexus, name, access) {
            return Err(CopyError::Reserved);
        }
        if writes && self.write_protection().is_some() {
            return Err(CopyError::Block(BlockError::ReadOnly));
        }
        Ok(())
    }

    /// Makes the token of a point in time of this unit. Whoever knows it can read `bytes` bytes, so `secret` must be
    /// random, and never used again.
    pub fn rod_token(&self, bytes: u64, identifier: u64, secret: &[u8; RodToken::SECRET_LEN]) -> RodToken {
        RodToken::new(&self.spec, self.physical_exponent(), bytes, identifier, secret)
    }
}

/// Bounded reads of a parameter list.
#[derive(Debug, Clone, Copy)]
struct List<'a>(&'a [u8]);

impl<'a> List<'a> {
    /// The list of a CDB with its length at byte 10; `None` for a length of zero.
    ///
    /// # Errors
    /// PARAMETER LIST LENGTH ERROR when it did not come whole.
    fn of(cdb: &Cdb, data_out: &'a [u8]) -> Result<Option<Self>, Sense> {
        let len = usize::try_from(cdb.u32(10)).map_err(|_| Sense::LIST_LENGTH)?;
        if len == 0 {
            return Ok(None);
        }
        data_out
            .get(..len)
            .map(|list| Some(Self(list)))
            .ok_or(Sense::LIST_LENGTH)
    }

    fn array<const N: usize>(self, at: usize) -> Result<[u8; N], Sense> {
        let field = self.0.get(at..).and_then(|rest| rest.first_chunk());
        field.copied().ok_or(Sense::LIST_LENGTH)
    }

    fn byte(self, at: usize) -> Result<u8, Sense> {
        self.array::<1>(at).map(|[byte]| byte)
    }

    fn u16(self, at: usize) -> Result<u16, Sense> {
        self.array(at).map(u16::from_be_bytes)
    }

    fn u32(self, at: usize) -> Result<u32, Sense> {
        self.array(at).map(u32::from_be_bytes)
    }

    fn u64(self, at: usize) -> Result<u64, Sense> {
        self.array(at).map(u64::from_be_bytes)
    }

    fn split(self, at: usize) -> Result<(Self, Self), Sense> {
        let (head, tail) = self.0.split_at_checked(at).ok_or(Sense::LIST_LENGTH)?;
        Ok((Self(head), Self(tail)))
    }
}

/// Sense data as reports carry it: always in fixed format.
fn reported(sense: Option<Sense>) -> Bytes {
    sense.map_or_else(Bytes::new, |sense| sense.encode(false))
}
