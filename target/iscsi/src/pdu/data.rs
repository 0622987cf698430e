//! SCSI Data-Out, SCSI Data-In and R2T (RFC 7143 §11.7, §11.8).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32, be_u64};

use super::{
    Bhs, FINAL, Numbers, Opcode, Residual, Writer, data_sn, flag, itt, lun, r2t_sn, stat_sn, ttt, whole,
};
use crate::types::{DataSn, Itt, Lun, R2tSn, StatSn, Ttt};

const STATUS: u8 = 0x01;

/// SCSI Data-Out (RFC 7143 §11.7): one piece of the data of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataOut {
    /// F: last PDU of its sequence.
    pub is_final: bool,
    /// Not checked against the command: Windows does not fill it.
    pub lun: Lun,
    /// Task tag.
    pub itt: Itt,
    /// Tag of the R2T it answers; reserved value for unsolicited data.
    pub ttt: Ttt,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
    /// Number within its sequence.
    pub data_sn: DataSn,
    /// Where the data goes, in bytes from the start of the task's transfer.
    pub buffer_offset: u32,
}

impl DataOut {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, flags, _, _lengths)) = (be_u8, be_u8, be_u16, be_u32).parse(i)?;
            let (i, (lun, itt, ttt, _, exp_stat_sn)) = (lun, itt, ttt, be_u32, stat_sn).parse(i)?;
            let (i, (_, data_sn, buffer_offset)) = (be_u32, data_sn, be_u32).parse(i)?;
            Ok((
                i,
                Self {
                    is_final: flags & FINAL != 0,
                    lun,
                    itt,
                    ttt,
                    exp_stat_sn,
                    data_sn,
                    buffer_offset,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::DATA_OUT, false, flag(self.is_final, FINAL))
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.ttt.0)
            .at(28)
            .u32(self.exp_stat_sn.0)
            .at(36)
            .u32(self.data_sn.0)
            .u32(self.buffer_offset)
            .bhs
    }
}

/// SCSI Data-In (RFC 7143 §11.7): one piece of the data of a read. Advances StatSN when it carries the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataIn {
    /// F: last PDU of its sequence.
    pub is_final: bool,
    /// Status of the command and its residual (S bit), in the last PDU of a command that ended well.
    pub status: Option<(u8, Residual)>,
    /// Task tag.
    pub itt: Itt,
    /// Window and status numbers; StatSN is only valid with a status.
    pub numbers: Numbers,
    /// Number within the command.
    pub data_sn: DataSn,
    /// Place of the data, in bytes from the start of the transfer.
    pub buffer_offset: u32,
}

impl DataIn {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, flags, _, status, _lengths, _lun)) =
                (be_u8, be_u8, be_u8, be_u8, be_u32, be_u64).parse(i)?;
            let (i, (itt, _ttt, numbers, data_sn, buffer_offset, count)) =
                (itt, ttt, Numbers::fields, data_sn, be_u32, be_u32).parse(i)?;
            Ok((
                i,
                Self {
                    is_final: flags & FINAL != 0,
                    status: (flags & STATUS != 0).then(|| (status, Residual::from_flags(flags, count))),
                    itt,
                    numbers,
                    data_sn,
                    buffer_offset,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        let (status, flags, count) = match self.status {
            None => (0, 0, 0),
            Some((status, residual)) => {
                let (flags, count) = residual.flags_and_count();
                (status, flags | STATUS, count)
            }
        };
        Writer::new(Opcode::DATA_IN, false, flag(self.is_final, FINAL) | flags)
            .u8(0)
            .u8(status)
            .at(16)
            .u32(self.itt.0)
            // The A bit is never set at ErrorRecoveryLevel 0, so that tag and LUN are reserved (§11.7.4).
            .u32(Ttt::RESERVED.0)
            .numbers(self.numbers)
            .u32(self.data_sn.0)
            .u32(self.buffer_offset)
            .u32(count)
            .bhs
    }
}

/// Ready To Transfer (RFC 7143 §11.8). Carries the next StatSN and does not advance it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct R2t {
    /// The command's LUN.
    pub lun: Lun,
    /// Task tag.
    pub itt: Itt,
    /// Tag for the Data-Out PDUs that answer.
    pub ttt: Ttt,
    /// Window and status numbers.
    pub numbers: Numbers,
    /// Number within the command.
    pub r2t_sn: R2tSn,
    /// First byte wanted, from the start of the transfer.
    pub buffer_offset: u32,
    /// Bytes wanted.
    pub desired_len: u32,
}

impl R2t {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_prefix, lun, itt, ttt, numbers)) = (be_u64, lun, itt, ttt, Numbers::fields).parse(i)?;
            let (i, (r2t_sn, buffer_offset, desired_len)) = (r2t_sn, be_u32, be_u32).parse(i)?;
            Ok((
                i,
                Self {
                    lun,
                    itt,
                    ttt,
                    numbers,
                    r2t_sn,
                    buffer_offset,
                    desired_len,
                },
            ))
        })
    }

    /// Writes the header. Byte 1 is 0x80: with 0x00 Windows drops the connection.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::R2T, false, FINAL)
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.ttt.0)
            .numbers(self.numbers)
            .u32(self.r2t_sn.0)
            .u32(self.buffer_offset)
            .u32(self.desired_len)
            .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::CmdSn;

    const NUMBERS: Numbers = Numbers {
        stat_sn: StatSn(1),
        exp_cmd_sn: CmdSn(2),
        max_cmd_sn: CmdSn(130),
    };

    #[test]
    fn data_out_round_trip() {
        let pdu = DataOut {
            is_final: true,
            lun: Lun([0; 8]),
            itt: Itt(1),
            ttt: Ttt(2),
            exp_stat_sn: StatSn(3),
            data_sn: DataSn(4),
            buffer_offset: 8192,
        };
        assert_eq!(DataOut::parse(&pdu.encode()), pdu);
        assert_eq!(pdu.encode()[36..44], [0, 0, 0, 4, 0, 0, 0x20, 0]);
    }

    #[test]
    fn data_in_round_trip() {
        let mut pdu = DataIn {
            is_final: true,
            status: Some((0, Residual::Underflow(12))),
            itt: Itt(1),
            numbers: NUMBERS,
            data_sn: DataSn(4),
            buffer_offset: 0x0102_0304,
        };
        let bhs = pdu.encode();
        assert_eq!(DataIn::parse(&bhs), pdu);
        assert_eq!(bhs[1], 0x83);
        // The residual must not disturb the offset: Windows could not format where it did.
        assert_eq!(bhs[40..48], [1, 2, 3, 4, 0, 0, 0, 12]);
        pdu.status = None;
        pdu.is_final = false;
        assert_eq!(pdu.encode()[1], 0);
        assert_eq!(DataIn::parse(&pdu.encode()), pdu);
    }

    #[test]
    fn r2t_round_trip() {
        let pdu = R2t {
            lun: Lun([0, 1, 0, 0, 0, 0, 0, 0]),
            itt: Itt(1),
            ttt: Ttt(2),
            numbers: NUMBERS,
            r2t_sn: R2tSn(3),
            buffer_offset: 8192,
            desired_len: 262_144,
        };
        let bhs = pdu.encode();
        assert_eq!(R2t::parse(&bhs), pdu);
        assert_eq!(bhs[..2], [0x31, 0x80]);
    }
}
