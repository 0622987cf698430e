//! Login Request and Login Response (RFC 7143 §11.12, §11.13).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32};

use super::{
    Bhs, CONTINUE, FINAL, IMMEDIATE, Numbers, Opcode, Writer, cmd_sn, flag, isid, itt, stat_sn, whole,
};
use crate::types::{Cid, CmdSn, Isid, Itt, StatSn, Tsih};

/// A stage of the login phase (RFC 7143 §11.12.3). Reserved values survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stage(pub u8);

impl Stage {
    /// SecurityNegotiation.
    pub const SECURITY: Self = Self(0);
    /// LoginOperationalNegotiation.
    pub const OPERATIONAL: Self = Self(1);
    /// FullFeaturePhase.
    pub const FULL_FEATURE: Self = Self(3);
}

/// Login Request (RFC 7143 §11.12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginRequest {
    /// I: always set, says the RFC.
    pub immediate: bool,
    /// T: ready for the next stage.
    pub transit: bool,
    /// C: the text goes on in the next request.
    pub continues: bool,
    /// CSG.
    pub current: Stage,
    /// NSG: valid with T.
    pub next: Stage,
    /// Highest version that the initiator knows.
    pub version_max: u8,
    /// Lowest version that it knows.
    pub version_min: u8,
    /// The initiator's half of the session's name.
    pub isid: Isid,
    /// 0 for a new session.
    pub tsih: Tsih,
    /// Tag of the whole login.
    pub itt: Itt,
    /// Connection id.
    pub cid: Cid,
    /// Number of the first command of the full feature phase.
    pub cmd_sn: CmdSn,
    /// Status acknowledged up to here.
    pub exp_stat_sn: StatSn,
}

impl LoginRequest {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (first, flags, version_max, version_min, _lengths)) =
                (be_u8, be_u8, be_u8, be_u8, be_u32).parse(i)?;
            let (i, (isid, tsih, itt, cid, _)) = (isid, be_u16, itt, be_u16, be_u16).parse(i)?;
            let (i, (cmd_sn, exp_stat_sn)) = (cmd_sn, stat_sn).parse(i)?;
            Ok((
                i,
                Self {
                    immediate: first & IMMEDIATE != 0,
                    transit: flags & FINAL != 0,
                    continues: flags & CONTINUE != 0,
                    current: Stage(flags >> 2 & 3),
                    next: Stage(flags & 3),
                    version_max,
                    version_min,
                    isid,
                    tsih: Tsih(tsih),
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
        Writer::new(
            Opcode::LOGIN_REQUEST,
            self.immediate,
            stages(self.transit, self.continues, self.current, self.next),
        )
        .u8(self.version_max)
        .u8(self.version_min)
        .at(8)
        .bytes(&self.isid.0)
        .u16(self.tsih.0)
        .u32(self.itt.0)
        .u16(self.cid.0)
        .at(24)
        .u32(self.cmd_sn.0)
        .u32(self.exp_stat_sn.0)
        .bhs
    }
}

fn stages(transit: bool, continues: bool, current: Stage, next: Stage) -> u8 {
    flag(transit, FINAL) | flag(continues, CONTINUE) | (current.0 & 3) << 2 | next.0 & 3
}

/// Login Response (RFC 7143 §11.13). Advances StatSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginResponse {
    /// T: on to the next stage.
    pub transit: bool,
    /// C: the text goes on in the next response.
    pub continues: bool,
    /// CSG.
    pub current: Stage,
    /// NSG: valid with T.
    pub next: Stage,
    /// Highest version that we know.
    pub version_max: u8,
    /// The version spoken.
    pub version_active: u8,
    /// The initiator's half of the session's name.
    pub isid: Isid,
    /// The request's; in the final response of a new session the new handle.
    pub tsih: Tsih,
    /// Tag of the login.
    pub itt: Itt,
    /// Window and status numbers: valid with Status-Class 0.
    pub numbers: Numbers,
    /// Status-Class and Status-Detail.
    pub status: (u8, u8),
}

impl LoginResponse {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, flags, version_max, version_active, _lengths)) =
                (be_u8, be_u8, be_u8, be_u8, be_u32).parse(i)?;
            let (i, (isid, tsih, itt, _, numbers)) = (isid, be_u16, itt, be_u32, Numbers::fields).parse(i)?;
            let (i, status) = (be_u8, be_u8).parse(i)?;
            Ok((
                i,
                Self {
                    transit: flags & FINAL != 0,
                    continues: flags & CONTINUE != 0,
                    current: Stage(flags >> 2 & 3),
                    next: Stage(flags & 3),
                    version_max,
                    version_active,
                    isid,
                    tsih: Tsih(tsih),
                    itt,
                    numbers,
                    status,
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        Writer::new(
            Opcode::LOGIN_RESPONSE,
            false,
            stages(self.transit, self.continues, self.current, self.next),
        )
        .u8(self.version_max)
        .u8(self.version_active)
        .at(8)
        .bytes(&self.isid.0)
        .u16(self.tsih.0)
        .u32(self.itt.0)
        .at(24)
        .numbers(self.numbers)
        .u8(self.status.0)
        .u8(self.status.1)
        .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_round_trip() {
        // First PDU of the Microsoft initiator: 0x43, byte 1 = 0x81, ISID 40 00 01 37 00 00, CID 1, ITT 1, CmdSN 1.
        let request = LoginRequest {
            immediate: true,
            transit: true,
            continues: false,
            current: Stage::SECURITY,
            next: Stage::OPERATIONAL,
            version_max: 0,
            version_min: 0,
            isid: Isid([0x40, 0, 1, 0x37, 0, 0]),
            tsih: Tsih(0),
            itt: Itt(1),
            cid: Cid(1),
            cmd_sn: CmdSn(1),
            exp_stat_sn: StatSn(0),
        };
        let bhs = request.encode();
        assert_eq!(bhs[..2], [0x43, 0x81]);
        assert_eq!(
            bhs[8..28],
            [0x40, 0, 1, 0x37, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1]
        );
        assert_eq!(LoginRequest::parse(&bhs), request);
    }

    #[test]
    fn response_round_trip() {
        let response = LoginResponse {
            transit: true,
            continues: false,
            current: Stage::OPERATIONAL,
            next: Stage::FULL_FEATURE,
            version_max: 0,
            version_active: 0,
            isid: Isid([1, 2, 3, 4, 5, 6]),
            tsih: Tsih(7),
            itt: Itt(8),
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
            status: (2, 0xb),
        };
        assert_eq!(LoginResponse::parse(&response.encode()), response);
        assert_eq!(response.encode()[1], 0x87);
    }
}
