//! Reject, and the SNACK Request that is always answered with it (RFC 7143 §11.17, §11.16).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32, be_u64};

use super::{Bhs, FINAL, Numbers, Opcode, Writer, data_sn, itt, lun, stat_sn, ttt, whole};
use crate::error::RejectReason;
use crate::types::{DataSn, Itt, Lun, StatSn, Ttt};

/// Reject (RFC 7143 §11.17). Advances StatSN. Its data is the complete header of the rejected PDU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reject {
    /// Why.
    pub reason: RejectReason,
    /// Window and status numbers.
    pub numbers: Numbers,
    /// The next DataSN or R2TSN, for a rejected data SNACK.
    pub data_sn: DataSn,
}

impl Reject {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, _, reason, _, _lengths, _)) =
                (be_u8, be_u8, be_u8, be_u8, be_u32, be_u64).parse(i)?;
            let (i, (_, _, numbers, data_sn)) = (be_u32, be_u32, Numbers::fields, data_sn).parse(i)?;
            Ok((
                i,
                Self {
                    reason: RejectReason(reason),
                    numbers,
                    data_sn,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::REJECT, false, FINAL)
            .u8(self.reason.0)
            .at(16)
            .u32(Itt::RESERVED.0)
            .at(24)
            .numbers(self.numbers)
            .u32(self.data_sn.0)
            .bhs
    }
}

/// SNACK Request (RFC 7143 §11.16): needs ErrorRecoveryLevel 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnackRequest {
    /// What is asked for.
    pub kind: u8,
    /// Logical unit.
    pub lun: Lun,
    /// Task tag.
    pub itt: Itt,
    /// Transfer or SNACK tag.
    pub ttt: Ttt,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
    /// First number wanted.
    pub beg_run: u32,
    /// How many.
    pub run_length: u32,
}

impl SnackRequest {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, kind, _, _lengths)) = (be_u8, be_u8, be_u16, be_u32).parse(i)?;
            let (i, (lun, itt, ttt, _, exp_stat_sn)) = (lun, itt, ttt, be_u32, stat_sn).parse(i)?;
            let (i, (_, beg_run, run_length)) = (be_u64, be_u32, be_u32).parse(i)?;
            Ok((
                i,
                Self {
                    kind: kind & 0x0f,
                    lun,
                    itt,
                    ttt,
                    exp_stat_sn,
                    beg_run,
                    run_length,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::SNACK_REQUEST, false, FINAL | self.kind & 0x0f)
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.ttt.0)
            .at(28)
            .u32(self.exp_stat_sn.0)
            .at(40)
            .u32(self.beg_run)
            .u32(self.run_length)
            .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::CmdSn;

    #[test]
    fn round_trips() {
        let reject = Reject {
            reason: RejectReason::SNACK,
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
            data_sn: DataSn(4),
        };
        assert_eq!(Reject::parse(&reject.encode()), reject);
        assert_eq!(reject.encode()[16..20], [0xff; 4]);
        let snack = SnackRequest {
            kind: 1,
            lun: Lun([0; 8]),
            itt: Itt::RESERVED,
            ttt: Ttt::RESERVED,
            exp_stat_sn: StatSn(5),
            beg_run: 6,
            run_length: 7,
        };
        assert_eq!(SnackRequest::parse(&snack.encode()), snack);
    }
}
