//! The PDUs of RFC 7143 §11: one struct each, one file per family, both directions.
//!
//! How many bytes a PDU has is arithmetic ([`Prefix`]); the structs here read and write the 48 bytes of a complete
//! header. TotalAHSLength and DataSegmentLength belong to framing and are in no struct.

mod ahs;
mod async_message;
mod data;
mod login;
mod logout;
mod nop;
mod reject;
mod scsi;
mod text;
mod tmf;

use nom::number::complete::{be_u8, be_u16, be_u24, be_u32, be_u64};
use nom::{IResult, Parser};

pub use ahs::{Ahs, MAX_CDB_LEN};
pub use async_message::{AsyncEvent, AsyncMessage};
pub use data::{DataIn, DataOut, R2t};
pub use login::{LoginRequest, LoginResponse, Stage};
pub use logout::{LogoutRequest, LogoutResponse};
pub use nop::{NopIn, NopOut};
pub use reject::{Reject, SnackRequest};
pub use scsi::{Residual, ScsiCommand, ScsiResponse};
pub use text::{TextRequest, TextResponse};
pub use tmf::{TmfReply, TmfRequest};

use crate::types::{CmdSn, DataSn, Isid, Itt, Lun, R2tSn, StatSn, Ttt};

/// Bytes of a basic header segment (RFC 7143 §11.2.1).
pub const BHS_LEN: usize = 48;

/// A basic header segment as it is on the wire.
pub type Bhs = [u8; BHS_LEN];

/// iSCSI opcode (RFC 7143 §11.2.1.2). Unknown values survive parsing: policy answers them, not the parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Opcode(pub u8);

#[expect(missing_docs, reason = "each is the PDU of its name, RFC 7143 §11.2.1.2")]
impl Opcode {
    pub const NOP_OUT: Self = Self(0x00);
    pub const SCSI_COMMAND: Self = Self(0x01);
    pub const TMF_REQUEST: Self = Self(0x02);
    pub const LOGIN_REQUEST: Self = Self(0x03);
    pub const TEXT_REQUEST: Self = Self(0x04);
    pub const DATA_OUT: Self = Self(0x05);
    pub const LOGOUT_REQUEST: Self = Self(0x06);
    pub const SNACK_REQUEST: Self = Self(0x10);
    pub const NOP_IN: Self = Self(0x20);
    pub const SCSI_RESPONSE: Self = Self(0x21);
    pub const TMF_RESPONSE: Self = Self(0x22);
    pub const LOGIN_RESPONSE: Self = Self(0x23);
    pub const TEXT_RESPONSE: Self = Self(0x24);
    pub const DATA_IN: Self = Self(0x25);
    pub const LOGOUT_RESPONSE: Self = Self(0x26);
    pub const R2T: Self = Self(0x31);
    pub const ASYNC_MESSAGE: Self = Self(0x32);
    pub const REJECT: Self = Self(0x3f);
}

const IMMEDIATE: u8 = 0x40;
const FINAL: u8 = 0x80;
const CONTINUE: u8 = 0x40;

/// What every header begins with, and what framing needs (RFC 7143 §11.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Which PDU it is.
    pub opcode: Opcode,
    /// I: delivered outside the command window (requests only).
    pub immediate: bool,
    /// F, or what byte 1 bit 7 means in this PDU.
    pub is_final: bool,
    /// TotalAHSLength in bytes.
    pub ahs_len: usize,
    /// DataSegmentLength in bytes, padding excluded.
    pub data_len: u32,
}

impl Prefix {
    /// Reads the first eight bytes.
    #[must_use]
    pub fn parse(bhs: &Bhs) -> Self {
        whole(bhs, |i| {
            let (i, (first, flags, _, ahs_words, data_len)) =
                (be_u8, be_u8, be_u16, be_u8, be_u24).parse(i)?;
            Ok((
                i,
                Self {
                    opcode: Opcode(first & 0x3f),
                    immediate: first & IMMEDIATE != 0,
                    is_final: flags & FINAL != 0,
                    ahs_len: usize::from(ahs_words) * 4,
                    data_len,
                },
            ))
        })
    }
}

/// The numbers at bytes 24 to 35 of every PDU of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Numbers {
    /// Status sequence number; advances only where the PDU says so.
    pub stat_sn: StatSn,
    /// The next command that we expect.
    pub exp_cmd_sn: CmdSn,
    /// The last command that we take.
    pub max_cmd_sn: CmdSn,
}

impl Numbers {
    /// Puts the numbers into a header that was written without them.
    pub(crate) fn write(self, bhs: &mut Bhs) {
        let words = [self.stat_sn.0, self.exp_cmd_sn.0, self.max_cmd_sn.0];
        let field = bhs.get_mut(24..36).expect("a header has 48 bytes");
        for (place, word) in field.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_be_bytes());
        }
    }

    fn fields(i: &[u8]) -> IResult<&[u8], Self> {
        let (i, (stat_sn, exp_cmd_sn, max_cmd_sn)) = (stat_sn, cmd_sn, cmd_sn).parse(i)?;
        Ok((
            i,
            Self {
                stat_sn,
                exp_cmd_sn,
                max_cmd_sn,
            },
        ))
    }
}

/// Runs a parser that reads fixed fields of a header and cannot fail.
fn whole<T>(bhs: &Bhs, parser: impl Fn(&[u8]) -> IResult<&[u8], T>) -> T {
    let (_, value) = parser(bhs).expect("a header has 48 bytes, and its fields have fixed places");
    value
}

fn lun(i: &[u8]) -> IResult<&[u8], Lun> {
    be_u64.map(|bytes| Lun(bytes.to_be_bytes())).parse(i)
}

fn isid(i: &[u8]) -> IResult<&[u8], Isid> {
    (be_u16, be_u32)
        .map(|(high, low)| {
            let ([a, b], [c, d, e, f]) = (high.to_be_bytes(), low.to_be_bytes());
            Isid([a, b, c, d, e, f])
        })
        .parse(i)
}

fn itt(i: &[u8]) -> IResult<&[u8], Itt> {
    be_u32.map(Itt).parse(i)
}

fn ttt(i: &[u8]) -> IResult<&[u8], Ttt> {
    be_u32.map(Ttt).parse(i)
}

fn cmd_sn(i: &[u8]) -> IResult<&[u8], CmdSn> {
    be_u32.map(CmdSn).parse(i)
}

fn stat_sn(i: &[u8]) -> IResult<&[u8], StatSn> {
    be_u32.map(StatSn).parse(i)
}

fn data_sn(i: &[u8]) -> IResult<&[u8], DataSn> {
    be_u32.map(DataSn).parse(i)
}

fn r2t_sn(i: &[u8]) -> IResult<&[u8], R2tSn> {
    be_u32.map(R2tSn).parse(i)
}

/// Fills a header from left to right; what is not written is zero.
struct Writer {
    bhs: Bhs,
    at: usize,
}

impl Writer {
    /// Byte 0 and byte 1.
    fn new(opcode: Opcode, immediate: bool, flags: u8) -> Self {
        Self {
            bhs: [0; BHS_LEN],
            at: 0,
        }
        .u8(opcode.0 | if immediate { IMMEDIATE } else { 0 })
        .u8(flags)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        let end = self.at + bytes.len();
        self.bhs
            .get_mut(self.at..end)
            .expect("fields end within the header")
            .copy_from_slice(bytes);
        self.at = end;
        self
    }

    /// Goes on at this byte: what lies between is reserved.
    fn at(mut self, at: usize) -> Self {
        assert!(at >= self.at, "fields are written in order");
        self.at = at;
        self
    }

    fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_be_bytes())
    }

    fn numbers(self, numbers: Numbers) -> Self {
        self.u32(numbers.stat_sn.0)
            .u32(numbers.exp_cmd_sn.0)
            .u32(numbers.max_cmd_sn.0)
    }
}

const fn flag(value: bool, bit: u8) -> u8 {
    if value { bit } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_reads_lengths() {
        let mut bhs = [0; BHS_LEN];
        bhs[..8].copy_from_slice(&[0x41, 0x80, 0, 0, 2, 1, 2, 3]);
        let prefix = Prefix {
            opcode: Opcode::SCSI_COMMAND,
            immediate: true,
            is_final: true,
            ahs_len: 8,
            data_len: 0x010203,
        };
        assert_eq!(Prefix::parse(&bhs), prefix);
    }
}
