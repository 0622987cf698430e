//! Reports of the device server about itself: capacity, supported commands and task management functions,
//! port groups.

use std::collections::BTreeSet;

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    cdb::Cdb,
    command::{COMMANDS, Command},
    plan::Reply,
    relative_port_id,
    sense::Sense,
    unit::Unit,
};

/// The one target port group: all ports lead to the same process.
pub(crate) const TARGET_PORT_GROUP: u8 = 1;

/// Recommended command timeout in seconds: what initiators give a disk anyway.
const RECOMMENDED_TIMEOUT_S: u32 = 60;

/// READ CAPACITY(10) (SBC-3 §5.15): all ones when the last LBA does not fit.
pub(crate) fn capacity_10(unit: &Unit) -> Reply {
    let mut data = BytesMut::with_capacity(8);
    data.put_u32(u32::try_from(unit.spec.blocks.saturating_sub(1)).unwrap_or(u32::MAX));
    data.put_u32(unit.block_size());
    Reply::parameter_data(data.freeze(), 8)
}

/// READ CAPACITY(16) (SBC-3 §5.16).
pub(crate) fn capacity_16(unit: &Unit, cdb: &Cdb) -> Reply {
    let mut data = BytesMut::with_capacity(32);
    data.put_u64(unit.spec.blocks.saturating_sub(1));
    data.put_u32(unit.block_size());
    // No protection information; one LBA aligned at 0.
    data.put_slice(&[0, unit.physical_exponent()]);
    // LBPME, LBPRZ: the same as in VPD page B2h.
    data.put_u16(0xc000);
    data.put_bytes(0, 16);
    Reply::parameter_data(data.freeze(), u64::from(cdb.u32(10)))
}

/// REPORT TARGET PORT GROUPS (SPC-4 §6.37): one group, active/optimized.
///
/// # Errors
/// INVALID FIELD IN CDB for a parameter data format that is reserved.
pub(crate) fn target_port_groups(unit: &Unit, cdb: &Cdb) -> Result<Reply, Sense> {
    let all = &unit.spec.ports;
    let ports: BTreeSet<u16> = all.iter().map(|port| relative_port_id(all, port)).collect();
    let mut data = BytesMut::with_capacity(16 + 4 * ports.len());
    match cdb.byte(1) >> 5 {
        0 => {}
        // Extended header: format 001b, and no implicit transition ever takes time.
        1 => data.put_u32(0x1000_0000),
        _ => return Err(Sense::invalid_cdb(1)),
    }
    // ASYMMETRIC ACCESS STATE 0; T_SUP U_SUP S_SUP zero, AN_SUP zero, AO_SUP one.
    data.put_slice(&[0x00, 0x01]);
    data.put_u16(u16::from(TARGET_PORT_GROUP));
    data.put_slice(&[0, 0, 0, u8::try_from(ports.len()).unwrap_or(u8::MAX)]);
    for port in ports.iter().take(usize::from(u8::MAX)) {
        data.put_u32(u32::from(*port));
    }
    Ok(Reply::parameter_data(with_length(data), u64::from(cdb.u32(6))))
}

/// Puts the 32-bit length of what follows in front.
fn with_length(data: BytesMut) -> Bytes {
    let mut whole = BytesMut::with_capacity(4 + data.len());
    whole.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
    whole.put(data);
    whole.freeze()
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 §6.36): ABORT TASK, ABORT TASK SET, CLEAR TASK SET,
/// LOGICAL UNIT RESET and TARGET RESET; no ACA, no QUERY TASK.
pub(crate) fn task_management(cdb: &Cdb) -> Reply {
    let mut data = BytesMut::with_capacity(16);
    // ATS ATSS CLRTSS LURS (bits 7 6 4 3) and TRS (bit 1).
    data.put_slice(&[0x80 | 0x40 | 0x10 | 0x08 | 0x02, 0, 0]);
    if cdb.bit(2, 0x80) {
        data.put_u8(0x0c);
        // TMFTMOV zero: no timeouts are stated.
        data.put_bytes(0, 12);
    } else {
        data.put_u8(0);
    }
    Reply::parameter_data(data.freeze(), u64::from(cdb.u32(6)))
}

/// REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35).
///
/// # Errors
/// INVALID FIELD IN CDB: reserved reporting options, or a form (with or without service action) that does not
/// go with the operation code.
pub(crate) fn operation_codes(cdb: &Cdb) -> Result<Reply, Sense> {
    let timeouts = cdb.bit(2, 0x80);
    let (wanted, action) = (cdb.byte(3), cdb.u16(4));
    let mut with_code = COMMANDS
        .iter()
        .filter(|command| command.opcode == wanted)
        .peekable();
    let has_actions = with_code.peek().map(|command| command.service_action.is_some());
    let exact = || {
        COMMANDS
            .iter()
            .find(|c| c.opcode == wanted && c.service_action.map(u16::from) == Some(action))
    };
    let data = match (cdb.byte(2) & 0x07, has_actions) {
        (0, _) => all_commands(timeouts),
        // 001b is for operation codes without service actions, 010b for those with one: the other form is an
        // error.
        (1, Some(true)) | (2, Some(false)) => return Err(Sense::invalid_cdb(2)),
        (1, _) => one_command(with_code.next(), timeouts),
        (2, _) => one_command(exact(), timeouts),
        // 011b: either form, whichever fits.
        (3, Some(false)) if action == 0 => one_command(with_code.next(), timeouts),
        (3, _) => one_command(exact(), timeouts),
        _ => return Err(Sense::invalid_cdb(2)),
    };
    Ok(Reply::parameter_data(data, u64::from(cdb.u32(6))))
}

fn put_timeouts(data: &mut BytesMut) {
    data.put_u16(0x0a);
    data.put_u16(0);
    data.put_u32(0);
    data.put_u32(RECOMMENDED_TIMEOUT_S);
}

fn all_commands(timeouts: bool) -> Bytes {
    let mut data = BytesMut::with_capacity(COMMANDS.len() * 20);
    for command in COMMANDS {
        data.put_slice(&[command.opcode, 0]);
        data.put_u16(command.service_action.map_or(0, u16::from));
        // CTDP and SERVACTV.
        let flags = if timeouts { 0x02 } else { 0 } | u8::from(command.service_action.is_some());
        data.put_slice(&[0, flags]);
        data.put_u16(u16::try_from(command.usage.len()).unwrap_or(0));
        if timeouts {
            put_timeouts(&mut data);
        }
    }
    with_length(data)
}

/// SUPPORT 011b (as the standard says) with usage data, or 001b (not supported).
fn one_command(command: Option<&Command>, timeouts: bool) -> Bytes {
    let Some(command) = command else {
        return Bytes::from_static(&[0, 0x01, 0, 0]);
    };
    let mut data = BytesMut::with_capacity(32);
    data.put_slice(&[0, 0x03 | if timeouts { 0x80 } else { 0 }]);
    data.put_u16(u16::try_from(command.usage.len()).unwrap_or(0));
    data.put_slice(command.usage);
    if timeouts {
        put_timeouts(&mut data);
    }
    data.freeze()
}

/// READ DEFECT DATA(10) and (12) (SBC-3 §5.18): both lists are empty, in whatever format was asked for.
pub(crate) fn defects(cdb: &Cdb) -> Reply {
    if cdb.len() == 10 {
        let data = Bytes::copy_from_slice(&[0, cdb.byte(2) & 0x1f, 0, 0]);
        return Reply::parameter_data(data, u64::from(cdb.u16(7)));
    }
    let data = Bytes::copy_from_slice(&[0, cdb.byte(1) & 0x1f, 0, 0, 0, 0, 0, 0]);
    Reply::parameter_data(data, u64::from(cdb.u32(6)))
}
