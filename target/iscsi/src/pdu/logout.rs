//! Logout Request and Logout Response (RFC 7143 §11.14, §11.15).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32, be_u64};

use super::{Bhs, FINAL, IMMEDIATE, Numbers, Opcode, Writer, cmd_sn, itt, stat_sn, whole};
use crate::types::{Cid, CmdSn, Itt, LogoutReason, StatSn};

/// Logout Request (RFC 7143 §11.14).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogoutRequest {
    /// I.
    pub immediate: bool,
    /// Why.
    pub reason: LogoutReason,
    /// Tag of the request.
    pub itt: Itt,
    /// The connection to close, unless the session closes.
    pub cid: Cid,
    /// Command number.
    pub cmd_sn: CmdSn,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
}

impl LogoutRequest {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (first, reason, _, _lengths, _)) = (be_u8, be_u8, be_u16, be_u32, be_u64).parse(i)?;
            let (i, (itt, cid, _, cmd_sn, exp_stat_sn)) = (itt, be_u16, be_u16, cmd_sn, stat_sn).parse(i)?;
            Ok((
                i,
                Self {
                    immediate: first & IMMEDIATE != 0,
                    reason: LogoutReason(reason & 0x7f),
                    itt,
                    cid: Cid(cid),
                    cmd_sn,
                    exp_stat_sn,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::LOGOUT_REQUEST, self.immediate, FINAL | self.reason.0)
            .at(16)
            .u32(self.itt.0)
            .u16(self.cid.0)
            .at(24)
            .u32(self.cmd_sn.0)
            .u32(self.exp_stat_sn.0)
            .bhs
    }
}

/// Logout Response (RFC 7143 §11.15). Advances StatSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogoutResponse {
    /// 0 closed, 1 CID not found, 2 recovery not supported, 3 cleanup failed.
    pub response: u8,
    /// Tag of the request.
    pub itt: Itt,
    /// Window and status numbers.
    pub numbers: Numbers,
    /// Seconds.
    pub time2wait_s: u16,
    /// Seconds.
    pub time2retain_s: u16,
}

impl LogoutResponse {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, _, response, _, _lengths, _)) =
                (be_u8, be_u8, be_u8, be_u8, be_u32, be_u64).parse(i)?;
            let (i, (itt, _, numbers, _)) = (itt, be_u32, Numbers::fields, be_u32).parse(i)?;
            let (i, (time2wait_s, time2retain_s)) = (be_u16, be_u16).parse(i)?;
            Ok((
                i,
                Self {
                    response,
                    itt,
                    numbers,
                    time2wait_s,
                    time2retain_s,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(Opcode::LOGOUT_RESPONSE, false, FINAL)
            .u8(self.response)
            .at(16)
            .u32(self.itt.0)
            .at(24)
            .numbers(self.numbers)
            .at(40)
            .u16(self.time2wait_s)
            .u16(self.time2retain_s)
            .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let request = LogoutRequest {
            immediate: true,
            reason: LogoutReason::REMOVE_FOR_RECOVERY,
            itt: Itt(1),
            cid: Cid(2),
            cmd_sn: CmdSn(3),
            exp_stat_sn: StatSn(4),
        };
        assert_eq!(LogoutRequest::parse(&request.encode()), request);
        let response = LogoutResponse {
            response: 2,
            itt: Itt(1),
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
            time2wait_s: 5,
            time2retain_s: 6,
        };
        assert_eq!(LogoutResponse::parse(&response.encode()), response);
    }
}
