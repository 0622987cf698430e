//! SCSI Command and SCSI Response (RFC 7143 §11.3, §11.4).

use nom::Parser;
use nom::number::complete::{be_u8, be_u32, be_u64, be_u128};

use super::{
    Bhs, FINAL, IMMEDIATE, Numbers, Opcode, Writer, cmd_sn, data_sn, flag, itt, lun, stat_sn, whole,
};
use crate::types::{CmdSn, DataSn, Itt, Lun, StatSn, TaskAttribute};

const READ: u8 = 0x40;
const WRITE: u8 = 0x20;
const ATTRIBUTE: u8 = 0x07;
const BIDI_OVERFLOW: u8 = 0x10;
const BIDI_UNDERFLOW: u8 = 0x08;
const OVERFLOW: u8 = 0x04;
const UNDERFLOW: u8 = 0x02;

/// SCSI Command (RFC 7143 §11.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScsiCommand {
    /// I.
    pub immediate: bool,
    /// F: no unsolicited Data-Out follows.
    pub is_final: bool,
    /// R: data for the initiator is expected.
    pub read: bool,
    /// W: the initiator has data.
    pub write: bool,
    /// Task attribute.
    pub attribute: TaskAttribute,
    /// Logical unit.
    pub lun: Lun,
    /// Task tag.
    pub itt: Itt,
    /// Expected Data Transfer Length in bytes.
    pub edtl: u32,
    /// Command number.
    pub cmd_sn: CmdSn,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
    /// The first 16 bytes of the CDB.
    pub cdb: [u8; 16],
}

impl ScsiCommand {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (first, flags, _, _lengths)) =
                (be_u8, be_u8, nom::number::complete::be_u16, be_u32).parse(i)?;
            let (i, (lun, itt, edtl, cmd_sn, exp_stat_sn, cdb)) =
                (lun, itt, be_u32, cmd_sn, stat_sn, be_u128).parse(i)?;
            Ok((
                i,
                Self {
                    immediate: first & IMMEDIATE != 0,
                    is_final: flags & FINAL != 0,
                    read: flags & READ != 0,
                    write: flags & WRITE != 0,
                    attribute: TaskAttribute(flags & ATTRIBUTE),
                    lun,
                    itt,
                    edtl,
                    cmd_sn,
                    exp_stat_sn,
                    cdb: cdb.to_be_bytes(),
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        let flags = flag(self.is_final, FINAL)
            | flag(self.read, READ)
            | flag(self.write, WRITE)
            | (self.attribute.0 & ATTRIBUTE);
        Writer::new(Opcode::SCSI_COMMAND, self.immediate, flags)
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.edtl)
            .u32(self.cmd_sn.0)
            .u32(self.exp_stat_sn.0)
            .bytes(&self.cdb)
            .bhs
    }
}

/// The difference between what was expected and what the command wanted to move (RFC 7143 §11.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Residual {
    /// None.
    #[default]
    Exact,
    /// The initiator expected too little: so many bytes were not transferred.
    Overflow(u32),
    /// The initiator expected so many bytes more.
    Underflow(u32),
}

impl Residual {
    /// Compares the expected length with what the command wanted to move.
    #[must_use]
    pub fn of(edtl: u32, transfer_len: u64) -> Self {
        let expected = u64::from(edtl);
        let clamp = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        match transfer_len.cmp(&expected) {
            core::cmp::Ordering::Equal => Self::Exact,
            core::cmp::Ordering::Greater => Self::Overflow(clamp(transfer_len - expected)),
            core::cmp::Ordering::Less => Self::Underflow(clamp(expected - transfer_len)),
        }
    }

    pub(super) fn from_bits(flags: u8, count: u32, overflow: u8, underflow: u8) -> Self {
        match (flags & overflow != 0, flags & underflow != 0) {
            (true, _) => Self::Overflow(count),
            (false, true) => Self::Underflow(count),
            (false, false) => Self::Exact,
        }
    }

    pub(super) fn from_flags(flags: u8, count: u32) -> Self {
        Self::from_bits(flags, count, OVERFLOW, UNDERFLOW)
    }

    /// Flag bits as in byte 1 of SCSI Response and Data-In, and the count.
    pub(super) fn flags_and_count(self) -> (u8, u32) {
        match self {
            Self::Exact => (0, 0),
            Self::Overflow(count) => (OVERFLOW, count),
            Self::Underflow(count) => (UNDERFLOW, count),
        }
    }
}

/// SCSI Response (RFC 7143 §11.4). Advances StatSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScsiResponse {
    /// iSCSI service response: 0 = command completed at target.
    pub response: u8,
    /// SCSI status.
    pub status: u8,
    /// Task tag.
    pub itt: Itt,
    /// Window and status numbers.
    pub numbers: Numbers,
    /// Data-In and R2T PDUs sent for the command.
    pub exp_data_sn: DataSn,
    /// Residual of the read half of a bidirectional command.
    pub bidi_residual: Residual,
    /// Residual.
    pub residual: Residual,
}

impl ScsiResponse {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, flags, response, status, _lengths, _lun)) =
                (be_u8, be_u8, be_u8, be_u8, be_u32, be_u64).parse(i)?;
            let (i, (itt, _snack, numbers, exp_data_sn, bidi, count)) =
                (itt, be_u32, Numbers::fields, data_sn, be_u32, be_u32).parse(i)?;
            Ok((
                i,
                Self {
                    response,
                    status,
                    itt,
                    numbers,
                    exp_data_sn,
                    bidi_residual: Residual::from_bits(flags, bidi, BIDI_OVERFLOW, BIDI_UNDERFLOW),
                    residual: Residual::from_flags(flags, count),
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        let (bidi_flags, bidi) = match self.bidi_residual {
            Residual::Exact => (0, 0),
            Residual::Overflow(count) => (BIDI_OVERFLOW, count),
            Residual::Underflow(count) => (BIDI_UNDERFLOW, count),
        };
        let (flags, count) = self.residual.flags_and_count();
        Writer::new(Opcode::SCSI_RESPONSE, false, FINAL | bidi_flags | flags)
            .u8(self.response)
            .u8(self.status)
            .at(16)
            .u32(self.itt.0)
            .at(24)
            .numbers(self.numbers)
            .u32(self.exp_data_sn.0)
            .u32(bidi)
            .u32(count)
            .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_round_trip() {
        let command = ScsiCommand {
            immediate: true,
            is_final: true,
            read: true,
            write: false,
            attribute: TaskAttribute::ORDERED,
            lun: Lun([0, 3, 0, 0, 0, 0, 0, 0]),
            itt: Itt(0x0102_0304),
            edtl: 4096,
            cmd_sn: CmdSn(7),
            exp_stat_sn: StatSn(9),
            cdb: *b"0123456789abcdef",
        };
        let bhs = command.encode();
        assert_eq!(bhs[..2], [0x41, 0xc2]);
        assert_eq!(bhs[8..24], [0, 3, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 16, 0]);
        assert_eq!(ScsiCommand::parse(&bhs), command);
    }

    #[test]
    fn response_round_trip() {
        let mut response = ScsiResponse {
            response: 0,
            status: 2,
            itt: Itt(5),
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
            exp_data_sn: DataSn(4),
            bidi_residual: Residual::Underflow(512),
            residual: Residual::Overflow(7),
        };
        assert_eq!(ScsiResponse::parse(&response.encode()), response);
        assert_eq!(response.encode()[1], 0x8c);
        response.bidi_residual = Residual::Exact;
        response.residual = Residual::Exact;
        assert_eq!(response.encode()[1], 0x80);
        assert_eq!(ScsiResponse::parse(&response.encode()), response);
    }

    #[test]
    fn residual_compares_both_lengths() {
        assert_eq!(Residual::of(512, 512), Residual::Exact);
        assert_eq!(Residual::of(0, 512), Residual::Overflow(512));
        assert_eq!(Residual::of(10_000, 512), Residual::Underflow(9488));
        assert_eq!(Residual::of(0, u64::MAX), Residual::Overflow(u32::MAX));
    }
}
