//! Task Management Function Request and Response (RFC 7143 §11.5, §11.6).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32, be_u64};

use super::{Bhs, FINAL, IMMEDIATE, Numbers, Opcode, Writer, cmd_sn, data_sn, itt, lun, stat_sn, whole};
use crate::types::{CmdSn, DataSn, Itt, Lun, StatSn, TmfFunction, TmfResponse};

/// Task Management Function Request (RFC 7143 §11.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TmfRequest {
    /// I.
    pub immediate: bool,
    /// What to do.
    pub function: TmfFunction,
    /// Logical unit, for functions that have one.
    pub lun: Lun,
    /// Tag of this request.
    pub itt: Itt,
    /// Tag of the task to abort.
    pub referenced_itt: Itt,
    /// Command number.
    pub cmd_sn: CmdSn,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
    /// CmdSN of the task to abort.
    pub ref_cmd_sn: CmdSn,
    /// For TASK REASSIGN.
    pub exp_data_sn: DataSn,
}

impl TmfRequest {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (first, function, _, _lengths)) = (be_u8, be_u8, be_u16, be_u32).parse(i)?;
            let (i, (lun, own, referenced_itt, cmd_sn_field)) = (lun, itt, itt, cmd_sn).parse(i)?;
            let (i, (exp_stat_sn, ref_cmd_sn, exp_data_sn)) = (stat_sn, cmd_sn, data_sn).parse(i)?;
            Ok((
                i,
                Self {
                    immediate: first & IMMEDIATE != 0,
                    function: TmfFunction(function & 0x7f),
                    lun,
                    itt: own,
                    referenced_itt,
                    cmd_sn: cmd_sn_field,
                    exp_stat_sn,
                    ref_cmd_sn,
                    exp_data_sn,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::TMF_REQUEST, self.immediate, FINAL | self.function.0)
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.referenced_itt.0)
            .u32(self.cmd_sn.0)
            .u32(self.exp_stat_sn.0)
            .u32(self.ref_cmd_sn.0)
            .u32(self.exp_data_sn.0)
            .bhs
    }
}

/// Task Management Function Response (RFC 7143 §11.6). Advances StatSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TmfReply {
    /// How it went.
    pub response: TmfResponse,
    /// Tag of the request.
    pub itt: Itt,
    /// Window and status numbers.
    pub numbers: Numbers,
}

impl TmfReply {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, _, response, _, _lengths, _lun)) =
                (be_u8, be_u8, be_u8, be_u8, be_u32, be_u64).parse(i)?;
            let (i, (itt, _, numbers)) = (itt, be_u32, Numbers::fields).parse(i)?;
            Ok((
                i,
                Self {
                    response: TmfResponse(response),
                    itt,
                    numbers,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::TMF_RESPONSE, false, FINAL)
            .u8(self.response.0)
            .at(16)
            .u32(self.itt.0)
            .at(24)
            .numbers(self.numbers)
            .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let request = TmfRequest {
            immediate: true,
            function: TmfFunction::ABORT_TASK,
            lun: Lun([0, 1, 0, 0, 0, 0, 0, 0]),
            itt: Itt(1),
            referenced_itt: Itt(2),
            cmd_sn: CmdSn(3),
            exp_stat_sn: StatSn(4),
            ref_cmd_sn: CmdSn(5),
            exp_data_sn: DataSn(6),
        };
        assert_eq!(TmfRequest::parse(&request.encode()), request);
        assert_eq!(request.encode()[..2], [0x42, 0x81]);
        let reply = TmfReply {
            response: TmfResponse::REJECTED,
            itt: Itt(1),
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
        };
        assert_eq!(TmfReply::parse(&reply.encode()), reply);
    }
}
