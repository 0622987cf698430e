//! Commands on the medium (SBC-3 §5): every field is checked here, and a [`BlockOp`] never leaves the
//! capacity.
//!
//! The order of checks is the same everywhere: fields of the CDB, the range, limits, nothing to do, write
//! protection, the data that came.

use crate::{
    cdb::{Blocks, Cdb, opcode},
    plan::{Answer, BlockOp, Compare, Reply, status},
    sense::Sense,
    unit::{Context, Ready, Unit},
};

/// Checked bytes of the unit.
#[derive(Debug, Clone, Copy)]
struct Range {
    offset: u64,
    len: u64,
}

/// "If the LBA plus the transfer length exceeds the capacity": an empty range right at the end is inside, one
/// behind it is not.
fn range(unit: &Unit, blocks: Blocks) -> Result<Range, Sense> {
    let end = blocks
        .lba
        .checked_add(blocks.count)
        .ok_or(Sense::LBA_OUT_OF_RANGE)?;
    if end > unit.spec.blocks {
        return Err(Sense::LBA_OUT_OF_RANGE);
    }
    let size = u64::from(unit.block_size());
    Ok(Range {
        offset: blocks.lba * size,
        len: blocks.count * size,
    })
}

/// RDPROTECT, WRPROTECT, VRPROTECT, ORPROTECT: there is no protection information, so they must be zero.
fn no_protection(cdb: &Cdb) -> Result<(), Sense> {
    if cdb.len() > 6 && cdb.bit(1, 0xe0) {
        Err(Sense::invalid_cdb(1))
    } else {
        Ok(())
    }
}

/// The range of a command that moves it whole, within MAXIMUM TRANSFER LENGTH.
fn transfer(unit: &Unit, cdb: &Cdb) -> Result<(u64, u32), Sense> {
    no_protection(cdb)?;
    let Range { offset, len } = range(unit, cdb.extent())?;
    match u32::try_from(len) {
        Ok(len) if len <= unit.spec.limits.max_transfer_bytes => Ok((offset, len)),
        _ => Err(Sense::invalid_cdb(cdb.length_field())),
    }
}

fn writable(unit: &Unit) -> Result<(), Sense> {
    unit.write_protection().map_or(Ok(()), Err)
}

/// With the write cache off, every write is one through it.
fn fua(unit: &Unit, cdb: &Cdb) -> bool {
    (cdb.len() > 6 && cdb.bit(1, 0x08)) || !unit.write_cache()
}

/// READ(6), (10), (12), (16). What the initiator has no room for is not even read.
pub(crate) fn read(unit: &Unit, context: &Context<'_>, cdb: &Cdb) -> Result<Ready, Sense> {
    let (offset, len) = transfer(unit, cdb)?;
    let room = context.data_in_max.next_multiple_of(u64::from(unit.block_size()));
    let wanted = u32::try_from(room).map_or(len, |room| len.min(room));
    if wanted == 0 {
        return Ok(Ready::Reply(Reply::took(u64::from(len))));
    }
    let op = BlockOp::Read {
        offset,
        len: wanted,
        fua: cdb.len() > 6 && cdb.bit(1, 0x08),
    };
    Ok(Ready::Transfer(op, Answer::Data, u64::from(len)))
}

/// How much of the data that a command wants has come, in whole blocks.
enum Came {
    All,
    /// Fewer whole blocks: they are written and the residual tells the rest (FCP-4 §9.4.2 words it; for iSCSI
    /// RFC 7143 §11.4.5.1 only counts it).
    Part(u32),
    /// It ends within a block: nothing is written.
    Torn,
}

fn came(unit: &Unit, data_out: &[u8], len: u32) -> Came {
    match u32::try_from(data_out.len()) {
        Ok(came) if came < len && came % unit.block_size() != 0 => Came::Torn,
        Ok(came) if came < len => Came::Part(came),
        _ => Came::All,
    }
}

/// A CHECK CONDITION that still counts the residual: the data of the command and the data that came do not
/// agree.
fn wrong_data_length(unit: &Unit, transfer_len: u64) -> Ready {
    Ready::Reply(Reply {
        transfer_len,
        ..unit.check(Sense::DATA_OUT_LENGTH)
    })
}

/// Everything that writes `data_out` block by block: `op` makes the operation of an offset and a length.
fn write_with(
    unit: &Unit,
    cdb: &Cdb,
    data_out: &[u8],
    op: impl FnOnce(u64, u32) -> BlockOp,
) -> Result<Ready, Sense> {
    let (offset, len) = transfer(unit, cdb)?;
    let transfer_len = u64::from(len);
    if len == 0 {
        return Ok(Ready::Reply(Reply::good()));
    }
    writable(unit)?;
    Ok(match came(unit, data_out, len) {
        Came::All => Ready::Transfer(op(offset, len), Answer::Good, transfer_len),
        Came::Part(0) => Ready::Reply(Reply::took(transfer_len)),
        Came::Part(part) => Ready::Transfer(op(offset, part), Answer::Good, transfer_len),
        Came::Torn => wrong_data_length(unit, transfer_len),
    })
}

/// WRITE(6), (10), (12), (16).
pub(crate) fn write(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    let fua = fua(unit, cdb);
    write_with(unit, cdb, data_out, |offset, len| BlockOp::Write {
        offset,
        len,
        fua,
    })
}

/// ORWRITE(16).
pub(crate) fn or_write(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    let fua = fua(unit, cdb);
    write_with(unit, cdb, data_out, |offset, len| BlockOp::OrWrite {
        offset,
        len,
        fua,
    })
}

/// BYTCHK of VERIFY and WRITE AND VERIFY.
fn bytchk(cdb: &Cdb) -> u8 {
    (cdb.byte(1) >> 1) & 0x03
}

/// WRITE AND VERIFY(10), (12), (16).
pub(crate) fn write_and_verify(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    if bytchk(cdb) > 1 {
        return Err(Sense::invalid_cdb(1));
    }
    let compare = bytchk(cdb) == 1;
    write_with(unit, cdb, data_out, |offset, len| BlockOp::WriteAndVerify {
        offset,
        len,
        compare,
    })
}

/// VERIFY(10), (12), (16). A comparison needs all of its data: verifying a part is not what was asked for.
pub(crate) fn verify(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    let compare = match bytchk(cdb) {
        0 => Compare::None,
        1 => Compare::Data,
        3 => Compare::OneBlock,
        _ => return Err(Sense::invalid_cdb(1)),
    };
    let (offset, len) = transfer(unit, cdb)?;
    if len == 0 {
        return Ok(Ready::Reply(Reply::good()));
    }
    let transfer_len = match compare {
        Compare::None => 0,
        Compare::Data => u64::from(len),
        Compare::OneBlock => u64::from(unit.block_size()),
    };
    if (data_out.len() as u64) < transfer_len {
        return Ok(wrong_data_length(unit, transfer_len));
    }
    Ok(Ready::Transfer(
        BlockOp::Verify { offset, len, compare },
        Answer::Good,
        transfer_len,
    ))
}

/// IMMED of PRE-FETCH and SYNCHRONIZE CACHE: the answer comes once the CDB is found to be right.
fn immediate(cdb: &Cdb) -> bool {
    cdb.bit(1, 0x02)
}

/// What one PRE-FETCH reads ahead at most: a longer range would push out of the cache what others use.
const MAX_PREFETCH_BYTES: u64 = 16 << 20;

/// PRE-FETCH(10) and (16) (SBC-3 §5.10): CONDITION MET when all blocks are in the cache, GOOD when there is no room for
/// all of them. A length of zero means "to the last block".
pub(crate) fn prefetch(unit: &Unit, cdb: &Cdb) -> Result<Ready, Sense> {
    let Blocks { lba, mut count } = cdb.extent();
    if count == 0 {
        count = unit.spec.blocks.checked_sub(lba).ok_or(Sense::LBA_OUT_OF_RANGE)?;
    }
    let Range { offset, len } = range(unit, Blocks { lba, count })?;
    let (answer, early) = if len <= MAX_PREFETCH_BYTES {
        (Answer::Met, Reply::status(status::CONDITION_MET))
    } else {
        (Answer::Good, Reply::good())
    };
    if len == 0 {
        return Ok(Ready::Reply(early));
    }
    let op = BlockOp::PreFetch {
        offset,
        len: len.min(MAX_PREFETCH_BYTES),
    };
    Ok(if immediate(cdb) {
        Ready::Early(early, op)
    } else {
        Ready::Op(op, answer)
    })
}

/// SYNCHRONIZE CACHE(10) and (16): the whole unit, whatever the range.
pub(crate) fn synchronize(unit: &Unit, cdb: &Cdb) -> Result<Ready, Sense> {
    range(unit, cdb.extent())?;
    Ok(if immediate(cdb) {
        Ready::Early(Reply::good(), BlockOp::Flush)
    } else {
        Ready::Op(BlockOp::Flush, Answer::Good)
    })
}

/// WRITE SAME(10) and (16).
pub(crate) fn write_same(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    no_protection(cdb)?;
    let long = cdb.opcode() == opcode::WRITE_SAME_16;
    // ANCHOR (ANC_SUP is zero), and the obsolete PBDATA and LBDATA which would write something else.
    if cdb.bit(1, 0x10 | 0x06) {
        return Err(Sense::invalid_cdb(1));
    }
    let (unmap, no_data) = (cdb.bit(1, 0x08), long && cdb.bit(1, 0x01));
    let Range { offset, len } = range(unit, cdb.extent())?;
    // WSNZ: zero does not mean "to the end" here.
    if len == 0 || len > unit.spec.limits.max_write_same_bytes {
        return Err(Sense::invalid_cdb(cdb.length_field()));
    }
    writable(unit)?;
    let fua = !unit.write_cache();
    let transfer_len = if no_data { 0 } else { u64::from(unit.block_size()) };
    if !no_data && data_out.len() as u64 != transfer_len {
        return Ok(wrong_data_length(unit, transfer_len));
    }
    // Deallocated blocks read as zeroes (LBPRZ), so any other block is written even if it may be unmapped.
    let op = if no_data || data_out.iter().all(|byte| *byte == 0) {
        BlockOp::WriteZeroes {
            offset,
            len,
            unmap,
            fua,
        }
    } else {
        BlockOp::WriteSame { offset, len, fua }
    };
    Ok(Ready::Transfer(op, Answer::Good, transfer_len))
}

/// COMPARE AND WRITE (SBC-3 §5.2): as many bytes to compare as to write, no more and no less.
pub(crate) fn compare_and_write(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    no_protection(cdb)?;
    let count = cdb.byte(13);
    let Range { offset, len } = range(
        unit,
        Blocks {
            lba: cdb.u64(2),
            count: u64::from(count),
        },
    )?;
    if count > unit.spec.limits.max_compare_and_write_blocks {
        return Err(Sense::invalid_cdb(13));
    }
    if count == 0 {
        // 256 blocks do not fit the byte: who sends the data of a wrapped count must not hear that it was compared.
        let nothing = data_out.is_empty();
        return if nothing {
            Ok(Ready::Reply(Reply::good()))
        } else {
            Err(Sense::invalid_cdb(13))
        };
    }
    writable(unit)?;
    let transfer_len = 2 * len;
    if data_out.len() as u64 != transfer_len {
        return Ok(wrong_data_length(unit, transfer_len));
    }
    // At most 255 blocks.
    let len = u32::try_from(len).map_err(|_| Sense::invalid_cdb(13))?;
    let op = BlockOp::CompareAndWrite {
        offset,
        len,
        fua: fua(unit, cdb),
    };
    Ok(Ready::Transfer(op, Answer::Good, transfer_len))
}

/// UNMAP (SBC-3 §5.28).
pub(crate) fn unmap(unit: &Unit, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    if cdb.bit(1, 0x01) {
        return Err(Sense::invalid_cdb(1));
    }
    let len = usize::from(cdb.u16(7));
    if len == 0 {
        return Ok(Ready::Reply(Reply::good()));
    }
    let ranges = unmap_ranges(unit, data_out.get(..len).ok_or(Sense::LIST_LENGTH)?)?;
    if ranges.is_empty() {
        return Ok(Ready::Reply(Reply::took(len as u64)));
    }
    writable(unit)?;
    Ok(Ready::Transfer(
        BlockOp::Unmap { ranges },
        Answer::Good,
        len as u64,
    ))
}

/// The parameter list: an 8-byte header with two lengths, then descriptors of 16 bytes.
fn unmap_ranges(unit: &Unit, list: &[u8]) -> Result<Vec<(u64, u64)>, Sense> {
    let (header, rest) = list.split_first_chunk::<8>().ok_or(Sense::LIST_LENGTH)?;
    let described = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let (descriptors, _) = rest.split_at_checked(described).ok_or(Sense::LIST_LENGTH)?;
    // An incomplete last descriptor is ignored (SBC-3 §5.28.2).
    let descriptors = descriptors.chunks_exact(16);
    let limits = &unit.spec.limits;
    if descriptors.len() as u64 > u64::from(limits.max_unmap_descriptors) {
        return Err(Sense::invalid_list(2));
    }
    let mut ranges = Vec::with_capacity(descriptors.len());
    let mut total = 0_u64;
    for descriptor in descriptors {
        let (lba, rest) = descriptor.split_first_chunk::<8>().ok_or(Sense::LIST_LENGTH)?;
        let (count, _) = rest.split_first_chunk::<4>().ok_or(Sense::LIST_LENGTH)?;
        let blocks = Blocks {
            lba: u64::from_be_bytes(*lba),
            count: u64::from(u32::from_be_bytes(*count)),
        };
        let Range { offset, len } = range(unit, blocks)?;
        total += blocks.count;
        if len > 0 {
            ranges.push((offset, len));
        }
    }
    if total > u64::from(limits.max_unmap_blocks) {
        return Err(Sense::invalid_list(8));
    }
    Ok(ranges)
}

/// Most descriptors that one GET LBA STATUS returns.
const MAX_LBA_STATUS_DESCRIPTORS: usize = 1024;

/// GET LBA STATUS (SBC-3 §5.4).
pub(crate) fn lba_status(unit: &Unit, cdb: &Cdb) -> Result<Ready, Sense> {
    let lba = cdb.u64(2);
    let Some(left) = unit.spec.blocks.checked_sub(lba).filter(|left| *left > 0) else {
        return Err(Sense::LBA_OUT_OF_RANGE);
    };
    let allocation = u64::from(cdb.u32(10));
    let room = usize::try_from(allocation.saturating_sub(8) / 16).unwrap_or(usize::MAX);
    let max_descriptors = room.clamp(1, MAX_LBA_STATUS_DESCRIPTORS);
    // One descriptor counts at most 2^32 - 1 blocks: more than that many times over cannot be told.
    let count = left.min(u64::from(u32::MAX) * max_descriptors as u64);
    let Range { offset, len } = range(unit, Blocks { lba, count })?;
    let op = BlockOp::LbaStatus {
        offset,
        len,
        max_descriptors,
    };
    Ok(Ready::Op(op, Answer::LbaStatus { lba, allocation }))
}
