//! POPULATE TOKEN and WRITE USING TOKEN (SBC-3 §5.7, §5.52), and the token itself (SPC-4 §5.16.6.4).

use core::fmt;

use bytes::BufMut;

use crate::{
    cdb::Cdb,
    sense::Sense,
    unit::{Unit, UnitSpec},
};

use super::{CopyWork, List, ListId, Parsed, limits};

/// ROD TYPE: point in time copy, default.
const POINT_IN_TIME: u32 = 0x0080_0000;
/// ROD TYPE: block device zero ROD token.
const ZERO: u32 = 0xffff_0001;
/// ROD TOKEN LENGTH: the bytes behind it.
const TOKEN_REST: u16 = 0x01f8;

/// A ROD token: whoever shows it may write what it stands for. Two are equal in constant time or not at all.
///
/// ```text
/// 0 ROD TYPE   6 length   8 identifier   16 CSCD descriptor of the unit   48 bytes represented   96 block geometry
/// 128 secret
/// ```
#[derive(Clone)]
pub struct RodToken(Box<[u8; Self::LEN]>);

impl RodToken {
    /// Length in bytes.
    pub const LEN: usize = 512;
    /// Bytes that nobody can guess.
    pub const SECRET_LEN: usize = Self::LEN - 128;

    pub(super) fn new(
        spec: &UnitSpec,
        physical_exponent: u8,
        bytes: u64,
        identifier: u64,
        secret: &[u8; Self::SECRET_LEN],
    ) -> Self {
        let block_len = spec.block_size.bytes();
        let mut token = Box::new([0; Self::LEN]);
        let mut fields = token.as_mut_slice();
        fields.put_u32(POINT_IN_TIME);
        fields.put_u16(0);
        fields.put_u16(TOKEN_REST);
        fields.put_u64(identifier);
        // CREATOR LOGICAL UNIT DESCRIPTOR: E4h, a binary NAA designator of 16 bytes, DISK BLOCK LENGTH.
        fields.put_slice(&[limits::IDENTIFICATION_CSCD, 0, 0, 0, 0x01, 0x03, 0, 16]);
        fields.put_slice(&spec.naa);
        fields.put_u32(0);
        fields.put_u32(block_len);
        // NUMBER OF BYTES REPRESENTED has sixteen bytes.
        fields.put_u128(u128::from(bytes));
        fields.put_bytes(0, 32);
        // Device type specific data: as bytes 8 to 15 of READ CAPACITY(16).
        fields.put_u32(block_len);
        fields.put_slice(&[0, physical_exponent, 0xc0, 0]);
        fields.put_bytes(0, 24);
        fields.put_slice(secret);
        Self(token)
    }

    /// The number that the owner gave it: a place to look, no proof.
    pub const fn identifier(&self) -> u64 {
        let [_, _, _, _, _, _, _, _, a, b, c, d, e, f, g, h, ..] = *self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl PartialEq for RodToken {
    fn eq(&self, other: &Self) -> bool {
        let pairs = self.0.iter().zip(other.0.iter());
        pairs.fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
    }
}

impl Eq for RodToken {}

/// The secret stays out of logs.
impl fmt::Debug for RodToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RodToken({})", self.identifier())
    }
}

/// The parameter list up to the length that it says of itself; its fixed part has `header` bytes and ends with the length
/// of the range descriptors. `None` for no list at all.
fn list<'a>(cdb: &Cdb, data_out: &'a [u8], header: usize) -> Result<Option<List<'a>>, Sense> {
    let Some(list) = List::of(cdb, data_out)? else {
        return Ok(None);
    };
    let said = usize::from(list.u16(0)?) + 2;
    if list.0.len() < header || said > list.0.len() {
        return Err(Sense::LIST_LENGTH);
    }
    if said < header + RANGE_LEN {
        return Err(Sense::invalid_list(0));
    }
    list.split(said).map(|(list, _)| Some(list))
}

const RANGE_LEN: usize = 16;

/// The block device range descriptors behind the header, as bytes on the unit, without empty ones.
fn ranges(unit: &Unit, list: List<'_>, header: usize) -> Result<Vec<(u64, u64)>, Sense> {
    let at = header - 2;
    let len = usize::from(list.u16(at)?);
    let (_, rest) = list.split(header)?;
    if len < RANGE_LEN || len > rest.0.len() {
        return Err(Sense::invalid_list(0).pointing(at));
    }
    if len / RANGE_LEN > limits::MAX_RANGES {
        return Err(Sense::TOO_MANY_SEGMENTS);
    }
    let block = u64::from(unit.block_size());
    let mut ranges = Vec::new();
    for descriptor in rest.split(len)?.0.0.chunks_exact(RANGE_LEN) {
        let (lba, count) = (List(descriptor).u64(0)?, u64::from(List(descriptor).u32(8)?));
        let end = lba.checked_add(count).ok_or(Sense::LBA_OUT_OF_RANGE)?;
        if end > unit.spec.blocks {
            return Err(Sense::LBA_OUT_OF_RANGE);
        }
        if count > 0 {
            ranges.push((lba * block, count * block));
        }
    }
    let mut sorted = ranges.clone();
    sorted.sort_unstable();
    // "the same LBA in more than one descriptor".
    let overlaps = |pair: &[(u64, u64)]| matches!(pair, [(a, len), (b, _)] if a + len > *b);
    if sorted.windows(2).any(overlaps) {
        return Err(Sense::invalid_list(0).pointing(header));
    }
    // No more than 64 times 2^32 blocks of 4096 bytes.
    if ranges.iter().map(|(_, len)| len).sum::<u64>() > limits::MAX_TOKEN_BYTES {
        return Err(Sense::invalid_list(0).pointing(at));
    }
    Ok(ranges)
}

const POPULATE_HEADER: usize = 16;

/// POPULATE TOKEN.
///
/// # Errors
/// The sense of a list that is wrong.
pub(super) fn populate(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Option<Parsed>, Sense> {
    let Some(list) = list(cdb, data_out, POPULATE_HEADER)? else {
        return Ok(None);
    };
    let flags = list.byte(2)?;
    // RTV: the initiator chooses the ROD TYPE.
    if flags & 0x80 != 0 && list.u32(8)? != POINT_IN_TIME {
        return Err(Sense::invalid_list(8));
    }
    let inactivity_s = match list.u32(4)? {
        0 => limits::DEFAULT_INACTIVITY_S,
        seconds if seconds > limits::MAX_INACTIVITY_S => return Err(Sense::invalid_list(4)),
        seconds => seconds,
    };
    let ranges = ranges(unit, list, POPULATE_HEADER)?;
    if ranges.is_empty() {
        return Err(Sense::invalid_list(14));
    }
    Ok(Some(Parsed {
        list: Some(ListId::Four(cdb.u32(6))),
        immediate: flags & 0x01 != 0,
        work: CopyWork::Populate { ranges, inactivity_s },
        transfer_len: u64::from(cdb.u32(10)),
    }))
}

const WRITE_HEADER: usize = 536;

/// WRITE USING TOKEN.
///
/// # Errors
/// The sense of a list that is wrong, of a token of a kind that is not made here, and of write protection.
pub(super) fn write(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Option<Parsed>, Sense> {
    let Some(list) = list(cdb, data_out, WRITE_HEADER)? else {
        return Ok(None);
    };
    let token = Box::new(list.array::<{ RodToken::LEN }>(16)?);
    let token_list = List(token.as_slice());
    if token_list.u16(6)? != TOKEN_REST {
        return Err(Sense::TOKEN_LENGTH);
    }
    let ranges = ranges(unit, list, WRITE_HEADER)?;
    let blocks = list.u64(8)?;
    let work = match token_list.u32(0)? {
        // A skip makes no difference to zeroes.
        ZERO => CopyWork::WriteZeroes { ranges },
        POINT_IN_TIME => CopyWork::WriteToken {
            token: RodToken(token),
            skip: blocks
                .checked_mul(u64::from(unit.block_size()))
                .ok_or(Sense::invalid_list(8))?,
            ranges,
        },
        _ => return Err(Sense::TOKEN_TYPE),
    };
    unit.write_protection().map_or(Ok(()), Err)?;
    Ok(Some(Parsed {
        list: Some(ListId::Four(cdb.u32(6))),
        immediate: list.byte(2)? & 0x01 != 0,
        work,
        transfer_len: u64::from(cdb.u32(10)),
    }))
}
