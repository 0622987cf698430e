//! Text Request and Text Response (RFC 7143 §11.10, §11.11).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32, be_u64};

use super::{
    Bhs, CONTINUE, FINAL, IMMEDIATE, Numbers, Opcode, Writer, cmd_sn, flag, itt, lun, stat_sn, ttt, whole,
};
use crate::types::{CmdSn, Itt, Lun, StatSn, Ttt};

/// Text Request (RFC 7143 §11.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextRequest {
    /// I.
    pub immediate: bool,
    /// F: the initiator has no more to say.
    pub is_final: bool,
    /// C: the text goes on in the next request.
    pub continues: bool,
    /// Copied from the response with a tag.
    pub lun: Lun,
    /// Tag of the exchange.
    pub itt: Itt,
    /// Our tag, when it continues an exchange.
    pub ttt: Ttt,
    /// Command number.
    pub cmd_sn: CmdSn,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
}

impl TextRequest {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (first, flags, _, _lengths)) = (be_u8, be_u8, be_u16, be_u32).parse(i)?;
            let (i, (lun, itt, ttt, cmd_sn, exp_stat_sn)) = (lun, itt, ttt, cmd_sn, stat_sn).parse(i)?;
            Ok((
                i,
                Self {
                    immediate: first & IMMEDIATE != 0,
                    is_final: flags & FINAL != 0,
                    continues: flags & CONTINUE != 0,
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
        let flags = flag(self.is_final, FINAL) | flag(self.continues, CONTINUE);
        Writer::new(Opcode::TEXT_REQUEST, self.immediate, flags)
            .at(8)
            .bytes(&self.lun.0)
            .u32(self.itt.0)
            .u32(self.ttt.0)
            .u32(self.cmd_sn.0)
            .u32(self.exp_stat_sn.0)
            .bhs
    }
}

/// Text Response (RFC 7143 §11.11). Advances StatSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextResponse {
    /// F: the exchange is over.
    pub is_final: bool,
    /// C: the text goes on in the next response.
    pub continues: bool,
    /// Tag of the exchange.
    pub itt: Itt,
    /// Our tag while the exchange goes on, else reserved.
    pub ttt: Ttt,
    /// Window and status numbers.
    pub numbers: Numbers,
}

impl TextResponse {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, flags, _, _lengths, _lun)) = (be_u8, be_u8, be_u16, be_u32, be_u64).parse(i)?;
            let (i, (itt, ttt, numbers)) = (itt, ttt, Numbers::fields).parse(i)?;
            Ok((
                i,
                Self {
                    is_final: flags & FINAL != 0,
                    continues: flags & CONTINUE != 0,
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
        let flags = flag(self.is_final, FINAL) | flag(self.continues, CONTINUE);
        Writer::new(Opcode::TEXT_RESPONSE, false, flags)
            .at(16)
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
        let request = TextRequest {
            immediate: false,
            is_final: true,
            continues: false,
            lun: Lun([0; 8]),
            itt: Itt(1),
            ttt: Ttt::RESERVED,
            cmd_sn: CmdSn(2),
            exp_stat_sn: StatSn(3),
        };
        assert_eq!(TextRequest::parse(&request.encode()), request);
        let response = TextResponse {
            is_final: false,
            continues: true,
            itt: Itt(1),
            ttt: Ttt(9),
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
        };
        assert_eq!(TextResponse::parse(&response.encode()), response);
    }
}
