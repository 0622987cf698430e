//! What copies may ask for, as initiators are told: VPD page 8Fh (SPC-4 §7.8.17, SBC-3 §6.6.6) and OPERATING PARAMETERS
//! (SPC-4 §6.26).

use bytes::{BufMut, Bytes, BytesMut};

use crate::{cdb::opcode, command::COMMANDS, unit::Unit};

use super::MAX_RUNNING;

/// CSCD descriptor type code: identification descriptor.
pub(super) const IDENTIFICATION_CSCD: u8 = 0xe4;
/// Segment descriptor type code: block device to block device.
pub(super) const BLOCK_TO_BLOCK_SEGMENT: u8 = 0x02;
/// Units that one EXTENDED COPY names.
pub(super) const MAX_CSCD: usize = 16;
/// Segments of one EXTENDED COPY.
pub(super) const MAX_SEGMENTS: usize = 256;
/// Bytes of both lists together.
pub(super) const MAX_DESCRIPTOR_BYTES: usize = MAX_CSCD * 32 + MAX_SEGMENTS * 28;
/// Ranges of one token operation: as many as Windows sends.
pub(super) const MAX_RANGES: usize = 64;
/// Bytes that one token stands for, and that one WRITE USING TOKEN writes.
pub(super) const MAX_TOKEN_BYTES: u64 = 64 << 30;
/// OPTIMAL TRANSFER COUNT: Windows takes at most 256 MiB.
const OPTIMAL_TOKEN_BYTES: u64 = 256 << 20;
/// Seconds after which an unused token dies when the initiator names none.
pub(super) const DEFAULT_INACTIVITY_S: u32 = 60;
/// Most seconds that an initiator may name: a token keeps the space of what it stands for.
pub(super) const MAX_INACTIVITY_S: u32 = 300;

/// One third-party copy descriptor: type, length, and zeroes up to a multiple of four.
fn descriptor(page: &mut BytesMut, kind: u16, body: &[u8]) {
    let len = body.len().next_multiple_of(4);
    page.put_u16(kind);
    page.put_u16(u16::try_from(len).unwrap_or(u16::MAX));
    page.put_slice(body);
    page.put_bytes(0, len - body.len());
}

fn u16_of(count: usize) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

/// The third-party copy VPD page, without its header.
pub(crate) fn page(unit: &Unit) -> Bytes {
    let mut page = BytesMut::with_capacity(256);
    descriptor(&mut page, 0x0000, &token_limits(unit));
    descriptor(&mut page, 0x0001, &supported_commands());
    descriptor(&mut page, 0x0004, &parameter_data());
    // SUPPORTED DESCRIPTOR LIST LENGTH, then segment and CSCD descriptor type codes, ascending.
    descriptor(
        &mut page,
        0x0008,
        &[2, BLOCK_TO_BLOCK_SEGMENT, IDENTIFICATION_CSCD],
    );
    descriptor(&mut page, 0x0106, &token_features(unit));
    descriptor(&mut page, 0x0108, &token_types());
    descriptor(&mut page, 0x8001, &general_operations(unit));
    page.freeze()
}

/// Block device ROD token limits: the descriptor that Windows looks for.
fn token_limits(unit: &Unit) -> Bytes {
    let blocks = |bytes: u64| bytes / u64::from(unit.block_size());
    let mut body = BytesMut::with_capacity(32);
    body.put_bytes(0, 6);
    body.put_u16(u16_of(MAX_RANGES));
    body.put_u32(MAX_INACTIVITY_S);
    body.put_u32(DEFAULT_INACTIVITY_S);
    body.put_u64(blocks(MAX_TOKEN_BYTES));
    body.put_u64(blocks(OPTIMAL_TOKEN_BYTES));
    body.freeze()
}

/// Supported commands: from the table that dispatches them.
fn supported_commands() -> Bytes {
    let mut list = BytesMut::with_capacity(16);
    for code in [opcode::THIRD_PARTY_COPY_OUT, opcode::THIRD_PARTY_COPY_IN] {
        let of_code = COMMANDS.iter().filter(|command| command.opcode == code);
        let actions: Vec<u8> = of_code.filter_map(|command| command.service_action).collect();
        list.put_slice(&[code, u8::try_from(actions.len()).unwrap_or(u8::MAX)]);
        list.put_slice(&actions);
    }
    let mut body = BytesMut::with_capacity(1 + list.len());
    body.put_u8(u8::try_from(list.len()).unwrap_or(u8::MAX));
    body.put(list);
    body.freeze()
}

/// Parameter data: how long the lists of EXTENDED COPY may be.
fn parameter_data() -> Bytes {
    let mut body = BytesMut::with_capacity(28);
    body.put_u32(0);
    body.put_u16(u16_of(MAX_CSCD));
    body.put_u16(u16_of(MAX_SEGMENTS));
    body.put_u32(u32::try_from(MAX_DESCRIPTOR_BYTES).unwrap_or(u32::MAX));
    // No inline data.
    body.put_bytes(0, 16);
    body.freeze()
}

/// ROD token features, with the one block device descriptor.
fn token_features(unit: &Unit) -> Bytes {
    let mut body = BytesMut::with_capacity(92);
    // REMOTE TOKENS zero: tokens of this daemon only.
    body.put_bytes(0, 12);
    // MINIMUM and MAXIMUM TOKEN LIFETIME: only inactivity ends one; MAXIMUM TOKEN INACTIVITY TIMEOUT.
    body.put_u32(0);
    body.put_u32(0);
    body.put_u32(MAX_INACTIVITY_S);
    body.put_bytes(0, 18);
    body.put_u16(48);
    // DESCRIPTOR FORMAT 000b, direct access block device, and its length.
    body.put_slice(&[0x00, 0, 0, 0x2c, 0, 0]);
    // OPTIMAL BLOCK ROD LENGTH GRANULARITY in blocks: what is aligned to it is copied by reference.
    body.put_u16(u16::try_from(unit.spec.grain / unit.block_size()).unwrap_or(u16::MAX));
    body.put_u64(MAX_TOKEN_BYTES);
    body.put_u64(OPTIMAL_TOKEN_BYTES);
    body.put_u64(OPTIMAL_TOKEN_BYTES);
    body.put_u64(OPTIMAL_TOKEN_BYTES);
    body.put_bytes(0, 8);
    body.freeze()
}

/// Supported ROD token and ROD types: points in time and zeroes.
fn token_types() -> Bytes {
    let mut body = BytesMut::with_capacity(132);
    body.put_u16(0);
    body.put_u16(2 * 64);
    // TOKEN_IN and TOKEN_OUT; zeroes only come in.
    for (kind, flags) in [(0x0080_0000_u32, 0x03_u8), (0xffff_0001, 0x02)] {
        body.put_u32(kind);
        body.put_slice(&[flags, 0]);
        body.put_u16(0x8000);
        body.put_bytes(0, 56);
    }
    body.freeze()
}

/// DATA SEGMENT GRANULARITY: a power of two, in bytes.
fn granularity(unit: &Unit) -> u8 {
    u8::try_from(unit.block_size().trailing_zeros()).unwrap_or(0)
}

/// The longest segment that a block count of 16 bits makes, in bytes.
fn max_segment_bytes(unit: &Unit) -> u32 {
    u32::from(u16::MAX) * unit.block_size()
}

fn general_operations(unit: &Unit) -> Bytes {
    let running = u32::try_from(MAX_RUNNING).unwrap_or(u32::MAX);
    let mut body = BytesMut::with_capacity(32);
    body.put_u32(running);
    body.put_u32(running);
    body.put_u32(max_segment_bytes(unit));
    body.put_slice(&[granularity(unit), 0]);
    body.put_bytes(0, 18);
    body.freeze()
}

/// RECEIVE COPY RESULTS, OPERATING PARAMETERS.
pub(super) fn operating_parameters(unit: &Unit) -> Bytes {
    let codes = [BLOCK_TO_BLOCK_SEGMENT, IDENTIFICATION_CSCD];
    let mut data = BytesMut::with_capacity(46);
    // AVAILABLE DATA: all behind this field.
    data.put_u32(40 + u32::from(u16_of(codes.len())));
    // SNLID: a copy may have no list identifier.
    data.put_slice(&[0x01, 0, 0, 0]);
    data.put_u16(u16_of(MAX_CSCD));
    data.put_u16(u16_of(MAX_SEGMENTS));
    data.put_u32(u32::try_from(MAX_DESCRIPTOR_BYTES).unwrap_or(u32::MAX));
    data.put_u32(max_segment_bytes(unit));
    // No inline data, no held data, no stream devices.
    data.put_bytes(0, 14);
    data.put_u16(u16_of(MAX_RUNNING));
    data.put_slice(&[
        u8::try_from(MAX_RUNNING).unwrap_or(u8::MAX),
        granularity(unit),
        0,
        0,
    ]);
    data.put_slice(&[0, 0, 0, u8::try_from(codes.len()).unwrap_or(u8::MAX)]);
    data.put_slice(&codes);
    data.freeze()
}
