//! THIRD-PARTY COPY IN (84h): what became of copies (SPC-4 §6.24 to §6.28, SBC-3 §5.18).

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    NexusId,
    cdb::Cdb,
    plan::{Reply, status},
    sense::Sense,
    unit::Unit,
};

use super::{Kind, ListId, Record, RodToken, State, limits, reported};

const COPY_STATUS_LID1: u8 = 0x00;
const OPERATING_PARAMETERS: u8 = 0x03;
const FAILED_SEGMENT_DETAILS: u8 = 0x04;
const COPY_STATUS_LID4: u8 = 0x05;
const ROD_TOKEN_INFORMATION: u8 = 0x07;

/// COPY OPERATION STATUS.
const DONE: u8 = 0x01;
const FAILED: u8 = 0x02;
const DONE_IN_PART: u8 = 0x03;
const IN_FOREGROUND: u8 = 0x11;
const IN_BACKGROUND: u8 = 0x12;

/// TRANSFER COUNT UNITS.
const BYTES: u8 = 0x00;
const MEBIBYTES: u8 = 0x02;
const LOGICAL_BLOCKS: u8 = 0xf1;

/// THIRD-PARTY COPY IN.
///
/// # Errors
/// INVALID FIELD IN CDB for a list identifier under which this I_T nexus has no copy.
pub(crate) fn receive(unit: &Unit, nexus: NexusId, cdb: &Cdb) -> Result<Reply, Sense> {
    let find = |list| unit.copies.find(nexus, list).ok_or(Sense::invalid_cdb(2));
    let (short, long) = (ListId::One(cdb.byte(2)), ListId::Four(cdb.u32(2)));
    let data = match cdb.service_action() {
        COPY_STATUS_LID1 => copy_status(find(short)?),
        OPERATING_PARAMETERS => limits::operating_parameters(unit),
        FAILED_SEGMENT_DETAILS => failed_segment(find(short)?),
        COPY_STATUS_LID4 => information(find(long)?, unit.block_size()),
        ROD_TOKEN_INFORMATION => token_information(find(long)?, unit.block_size()),
        _ => return Err(Sense::invalid_cdb(1)),
    };
    Ok(Reply::parameter_data(data, u64::from(cdb.u32(10))))
}

/// COPY STATUS. A transfer count of four bytes: in bytes as long as that fits.
fn copy_status(record: &Record) -> Bytes {
    let manager_status = match &record.state {
        State::Running { .. } => 0x00,
        State::Ended { sense: None, .. } => 0x01,
        State::Ended { .. } => 0x02,
    };
    let (units, count) = match u32::try_from(record.bytes) {
        Ok(bytes) => (BYTES, bytes),
        Err(_) => (MEBIBYTES, u32::try_from(record.bytes >> 20).unwrap_or(u32::MAX)),
    };
    let mut data = BytesMut::with_capacity(12);
    data.put_u32(8);
    data.put_u8(manager_status);
    data.put_u16(record.segments);
    data.put_u8(units);
    data.put_u32(count);
    data.freeze()
}

/// FAILED SEGMENT DETAILS: no bytes are available when nothing failed.
fn failed_segment(record: &Record) -> Bytes {
    let State::Ended {
        sense: Some(sense), ..
    } = record.state
    else {
        return Bytes::from_static(&[0; 4]);
    };
    let sense = reported(Some(sense));
    let mut data = BytesMut::with_capacity(60 + sense.len());
    data.put_u32(u32::try_from(56 + sense.len()).unwrap_or(u32::MAX));
    data.put_bytes(0, 52);
    data.put_slice(&[status::CHECK_CONDITION, 0]);
    data.put_u16(u16::try_from(sense.len()).unwrap_or(u16::MAX));
    data.put(sense);
    data.freeze()
}

/// What RECEIVE COPY STATUS(LID4) and RECEIVE ROD TOKEN INFORMATION have in common. AVAILABLE DATA is of the former.
fn information(record: &Record, block_size: u32) -> Bytes {
    let (operation, completion, sense) = match &record.state {
        State::Running { .. } if record.background => (IN_BACKGROUND, 0, None),
        State::Running { .. } => (IN_FOREGROUND, 0, None),
        State::Ended {
            sense: Some(sense), ..
        } => (FAILED, status::CHECK_CONDITION, Some(*sense)),
        State::Ended { partial: true, .. } => (DONE_IN_PART, status::GOOD, None),
        State::Ended { .. } => (DONE, status::GOOD, None),
    };
    let running = matches!(record.state, State::Running { .. });
    let sense = reported(sense);
    let sense_len = u8::try_from(sense.len()).unwrap_or(u8::MAX);
    let (units, count) = match record.kind {
        Kind::Segments => (BYTES, record.bytes),
        Kind::Token => (LOGICAL_BLOCKS, record.bytes / u64::from(block_size)),
    };
    let mut data = BytesMut::with_capacity(64);
    data.put_u32(28 + u32::from(sense_len));
    // RESPONSE TO SERVICE ACTION: of the command that began the copy; Windows compares it.
    data.put_slice(&[record.action, operation]);
    // OPERATION COUNTER.
    data.put_u16(record.segments);
    // ESTIMATED STATUS UPDATE DELAY in milliseconds; FFFFFFFEh: nothing more will change.
    data.put_u32(if running { 500 } else { 0xffff_fffe });
    data.put_slice(&[completion, sense_len, sense_len, units]);
    data.put_u64(count);
    data.put_u16(record.segments);
    data.put_bytes(0, 6);
    data.put(sense);
    data.freeze()
}

/// RECEIVE ROD TOKEN INFORMATION: the token of a POPULATE TOKEN that succeeded behind the common part.
fn token_information(record: &Record, block_size: u32) -> Bytes {
    let mut data = BytesMut::from(information(record, block_size));
    match &record.state {
        State::Ended {
            token: Some(token), ..
        } => {
            data.put_u32(u32::try_from(2 + RodToken::LEN).unwrap_or(u32::MAX));
            // ID FOR CREATING ROD CSCD DESCRIPTOR: zero, as no EXTENDED COPY made it.
            data.put_u16(0);
            data.put_slice(token.bytes());
        }
        _ => data.put_u32(0),
    }
    let available = u32::try_from(data.len() - 4).unwrap_or(u32::MAX);
    if let Some(field) = data.first_chunk_mut() {
        *field = available.to_be_bytes();
    }
    data.freeze()
}
