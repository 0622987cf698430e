//! NOP-Out and NOP-In (RFC 7143 §11.18, §11.19).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32};

use super::{Bhs, FINAL, IMMEDIATE, Numbers, Opcode, Writer, cmd_sn, itt, lun, stat_sn, ttt, whole};
use crate::types::{CmdSn, Itt, Lun, StatSn, Ttt};

/// NOP-Out (RFC 7143 §11.18).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NopOut {
    /// I.
    pub immediate: bool,
    /// Copied from the NOP-In it answers.
    pub lun: Lun,
    /// A tag if an answer is wanted, else reserved.
    pub itt: Itt,
    /// The tag of the NOP-In it answers, else reserved.
    pub ttt: Ttt,
    /// Command number.
    pub cmd_sn: CmdSn,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
}

impl NopOut {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (first, _, _, _lengths)) = (be_u8, be_u8, be_u16, be_u32).parse(i)?;
            let (i, (lun, itt, ttt, cmd_sn, exp_stat_sn)) = (lun, itt, ttt, cmd_sn, stat_sn).parse(i)?;
            Ok((
                i,
                Self {
                    immediate: first & IMMEDIATE != 0,
                    lun,
                    itt,
                    ttt,
                    cmd_sn,
                    exp_stat_sn,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::NOP_OUT, self.immediate, FINAL)
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.ttt.0)
            .u32(self.cmd_sn.0)
            .u32(self.exp_stat_sn.0)
            .bhs
    }
}

/// NOP-In (RFC 7143 §11.19). Advances StatSN only as the answer to a NOP-Out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NopIn {
    /// A LUN that exists, in a ping.
    pub lun: Lun,
    /// The tag of the NOP-Out it answers, else reserved.
    pub itt: Itt,
    /// Our tag if an answer is wanted, else reserved.
    pub ttt: Ttt,
    /// Window and status numbers.
    pub numbers: Numbers,
}

impl NopIn {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, _, _, _lengths)) = (be_u8, be_u8, be_u16, be_u32).parse(i)?;
            let (i, (lun, itt, ttt, numbers)) = (lun, itt, ttt, Numbers::fields).parse(i)?;
            Ok((
                i,
                Self {
                    lun,
                    itt,
                    ttt,
                    numbers,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::NOP_IN, false, FINAL)
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.ttt.0)
            .numbers(self.numbers)
            .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let out = NopOut {
            immediate: true,
            lun: Lun([0; 8]),
            itt: Itt::RESERVED,
            ttt: Ttt(3),
            cmd_sn: CmdSn(4),
            exp_stat_sn: StatSn(5),
        };
        assert_eq!(NopOut::parse(&out.encode()), out);
        assert_eq!(out.encode()[..2], [0x40, 0x80]);
        let answer = NopIn {
            lun: Lun([0; 8]),
            itt: Itt(1),
            ttt: Ttt::RESERVED,
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
        };
        assert_eq!(NopIn::parse(&answer.encode()), answer);
    }
}
