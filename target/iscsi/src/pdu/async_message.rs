//! Asynchronous Message (RFC 7143 §11.9).

use nom::Parser;
use nom::number::complete::{be_u8, be_u16, be_u32};

use super::{Bhs, FINAL, Numbers, Opcode, Writer, lun, whole};
use crate::types::{Itt, Lun};

/// AsyncEvent (RFC 7143 §11.9.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AsyncEvent(pub u8);

impl AsyncEvent {
    /// A SCSI event, with sense data.
    pub const SCSI: Self = Self(0);
    /// Please log out.
    pub const LOGOUT: Self = Self(1);
    /// We are about to drop the connection.
    pub const DROP_CONNECTION: Self = Self(2);
    /// We are about to drop the session.
    pub const DROP_SESSION: Self = Self(3);
    /// Please negotiate.
    pub const NEGOTIATE: Self = Self(4);
}

/// Asynchronous Message (RFC 7143 §11.9). Advances StatSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AsyncMessage {
    /// The logical unit of a SCSI event.
    pub lun: Lun,
    /// Window and status numbers.
    pub numbers: Numbers,
    /// What happened.
    pub event: AsyncEvent,
    /// Vendor code.
    pub vendor_code: u8,
    /// Parameter1 to Parameter3; their meaning depends on the event.
    pub parameters: [u16; 3],
}

impl AsyncMessage {
    /// Reads a header.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (_, _, _, _lengths, lun)) = (be_u8, be_u8, be_u16, be_u32, lun).parse(i)?;
            let (i, (_, _, numbers, event, vendor_code)) =
                (be_u32, be_u32, Numbers::fields, be_u8, be_u8).parse(i)?;
            let (i, (first, second, third)) = (be_u16, be_u16, be_u16).parse(i)?;
            Ok((
                i,
                Self {
                    lun,
                    numbers,
                    event: AsyncEvent(event),
                    vendor_code,
                    parameters: [first, second, third],
                },
            ))
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> Bhs {
        let [first, second, third] = self.parameters;
        Writer::new(Opcode::ASYNC_MESSAGE, false, FINAL)
            .at(8)
            .bytes(&self.lun.0)
            .u32(Itt::RESERVED.0)
            .at(24)
            .numbers(self.numbers)
            .u8(self.event.0)
            .u8(self.vendor_code)
            .u16(first)
            .u16(second)
            .u16(third)
            .bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{CmdSn, StatSn};

    #[test]
    fn round_trip() {
        let message = AsyncMessage {
            lun: Lun([0, 1, 0, 0, 0, 0, 0, 0]),
            numbers: Numbers {
                stat_sn: StatSn(1),
                exp_cmd_sn: CmdSn(2),
                max_cmd_sn: CmdSn(3),
            },
            event: AsyncEvent::LOGOUT,
            vendor_code: 0,
            parameters: [1, 2, 30],
        };
        let bhs = message.encode();
        assert_eq!(AsyncMessage::parse(&bhs), message);
        assert_eq!(bhs[36..44], [1, 0, 0, 1, 0, 2, 0, 30]);
    }
}
