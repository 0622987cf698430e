//! The commands that this device server knows: one table for dispatch, reservations and REPORT SUPPORTED
//! OPERATION CODES.

use crate::cdb::{Cdb, opcode as op};

/// How a command fares while a reservation of another I_T nexus stands (SPC-4 tables 66 and 67, SBC-3 table
/// 13; for RESERVE(6)/(10) SPC-2 §5.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Never conflicts.
    Free,
    /// TEST UNIT READY: conflicts with a RESERVE only.
    Ready,
    /// Reads the medium or the settings: conflicts with exclusive access.
    Read,
    /// Changes the medium or what all nexuses share: conflicts with every reservation.
    Exclusive,
    /// START STOP UNIT: starting is free, everything else is exclusive.
    StartStop,
    /// PREVENT ALLOW MEDIUM REMOVAL: allowing is free, preventing is exclusive.
    PreventAllow,
    /// PERSISTENT RESERVE IN and OUT: conflict with a RESERVE of anyone; OUT judges by key on its own.
    Persistent,
    /// RESERVE and RELEASE judge on their own.
    Reserve,
}

impl Access {
    /// The class of this very command, without the conditional ones.
    pub(crate) fn of(self, cdb: &Cdb) -> Self {
        match self {
            Self::StartStop if cdb.bit(4, 0x01) && cdb.byte(4) & 0xf0 == 0 => Self::Free,
            Self::PreventAllow if cdb.byte(4) & 0x03 == 0 => Self::Free,
            Self::StartStop | Self::PreventAllow => Self::Exclusive,
            other => other,
        }
    }
}

/// One supported command.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) opcode: u8,
    /// SERVICE ACTION, for the operation codes that have one.
    pub(crate) service_action: Option<u8>,
    pub(crate) access: Access,
    /// CDB USAGE DATA: the operation code, then a bit for each one that is looked at (SPC-4 §6.35.3).
    pub(crate) usage: &'static [u8],
}

const fn command(access: Access, usage: &'static [u8]) -> Command {
    let [opcode, ..] = usage else {
        panic!("a CDB has an operation code")
    };
    Command {
        opcode: *opcode,
        service_action: None,
        access,
        usage,
    }
}

/// The low bits of `usage[1]` are the service action itself.
const fn action(access: Access, usage: &'static [u8]) -> Command {
    let [opcode, service_action, ..] = usage else {
        panic!("a service action has two bytes")
    };
    Command {
        opcode: *opcode,
        service_action: Some(*service_action & 0x1f),
        access,
        usage,
    }
}

/// What a CDB is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lookup {
    Known(&'static Command),
    /// A known operation code with a service action that it does not have here.
    UnknownServiceAction,
    Unknown,
}

pub(crate) fn lookup(cdb: &Cdb) -> Lookup {
    let mut found = Lookup::Unknown;
    for command in COMMANDS.iter().filter(|command| command.opcode == cdb.opcode()) {
        match command.service_action {
            None => return Lookup::Known(command),
            Some(action) if action == cdb.service_action() => return Lookup::Known(command),
            Some(_) => found = Lookup::UnknownServiceAction,
        }
    }
    found
}

/// All bits of a byte of usage data.
const F: u8 = 0xff;

use Access::{Exclusive, Free, Persistent, PreventAllow, Read, Ready, Reserve, StartStop};

/// In the order of operation codes. What must be zero (PROTECT fields, ANCHOR, SP of LOG SENSE, NACA and the
/// like) has no bits, nor has what is not looked at (group numbers).
#[rustfmt::skip]
pub(crate) static COMMANDS: &[Command] = &[
    command(Ready, &[op::TEST_UNIT_READY, 0, 0, 0, 0, 0]),
    command(Free, &[op::REQUEST_SENSE, 0x01, 0, 0, F, 0]),
    command(Read, &[op::READ_6, 0x1f, F, F, F, 0]),
    command(Exclusive, &[op::WRITE_6, 0x1f, F, F, F, 0]),
    command(Free, &[op::INQUIRY, 0x01, F, F, F, 0]),
    command(Exclusive, &[op::MODE_SELECT_6, 0x11, 0, 0, F, 0]),
    command(Reserve, &[op::RESERVE_6, 0, 0, 0, 0, 0]),
    command(Reserve, &[op::RELEASE_6, 0, 0, 0, 0, 0]),
    command(Read, &[op::MODE_SENSE_6, 0x08, F, F, F, 0]),
    command(StartStop, &[op::START_STOP_UNIT, 0x01, 0, 0, 0xf5, 0]),
    command(Exclusive, &[op::SEND_DIAGNOSTIC, 0xe4, 0, 0, 0, 0]),
    command(PreventAllow, &[op::PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 0x01, 0]),
    command(Free, &[op::READ_CAPACITY_10, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    command(Read, &[op::READ_10, 0x18, F, F, F, F, 0, F, F, 0]),
    command(Exclusive, &[op::WRITE_10, 0x18, F, F, F, F, 0, F, F, 0]),
    command(Exclusive, &[op::WRITE_AND_VERIFY_10, 0x16, F, F, F, F, 0, F, F, 0]),
    command(Read, &[op::VERIFY_10, 0x16, F, F, F, F, 0, F, F, 0]),
    command(Read, &[op::PRE_FETCH_10, 0x02, F, F, F, F, 0, F, F, 0]),
    command(Exclusive, &[op::SYNCHRONIZE_CACHE_10, 0x02, F, F, F, F, 0, F, F, 0]),
    command(Read, &[op::READ_DEFECT_DATA_10, 0, 0x1f, 0, 0, 0, 0, F, F, 0]),
    command(Exclusive, &[op::WRITE_SAME_10, 0x08, F, F, F, F, 0, F, F, 0]),
    command(Exclusive, &[op::UNMAP, 0, 0, 0, 0, 0, 0, F, F, 0]),
    command(Free, &[op::LOG_SENSE, 0, F, F, 0, F, F, F, F, 0]),
    command(Exclusive, &[op::MODE_SELECT_10, 0x11, 0, 0, 0, 0, 0, F, F, 0]),
    command(Reserve, &[op::RESERVE_10, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    command(Reserve, &[op::RELEASE_10, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    command(Read, &[op::MODE_SENSE_10, 0x18, F, F, 0, 0, 0, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_IN, 0x00, 0, 0, 0, 0, 0, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_IN, 0x01, 0, 0, 0, 0, 0, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_IN, 0x02, 0, 0, 0, 0, 0, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_IN, 0x03, 0, 0, 0, 0, 0, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x00, 0, 0, 0, F, F, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x01, F, 0, 0, F, F, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x02, F, 0, 0, F, F, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x03, 0, 0, 0, F, F, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x04, F, 0, 0, F, F, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x05, F, 0, 0, F, F, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x06, 0, 0, 0, F, F, F, F, 0]),
    action(Persistent, &[op::PERSISTENT_RESERVE_OUT, 0x07, 0, 0, 0, F, F, F, F, 0]),
    // EXTENDED COPY(LID1) and (LID4), POPULATE TOKEN, WRITE USING TOKEN, COPY OPERATION ABORT.
    action(Exclusive, &[op::THIRD_PARTY_COPY_OUT, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(Exclusive, &[op::THIRD_PARTY_COPY_OUT, 0x01, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(Read, &[op::THIRD_PARTY_COPY_OUT, 0x10, 0, 0, 0, 0, F, F, F, F, F, F, F, F, 0, 0]),
    action(Exclusive, &[op::THIRD_PARTY_COPY_OUT, 0x11, 0, 0, 0, 0, F, F, F, F, F, F, F, F, 0, 0]),
    action(Free, &[op::THIRD_PARTY_COPY_OUT, 0x1c, F, F, F, F, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    // COPY STATUS, OPERATING PARAMETERS, FAILED SEGMENT DETAILS, COPY STATUS(LID4), ROD TOKEN INFORMATION.
    action(Exclusive, &[op::THIRD_PARTY_COPY_IN, 0x00, F, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(Exclusive, &[op::THIRD_PARTY_COPY_IN, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(Exclusive, &[op::THIRD_PARTY_COPY_IN, 0x04, F, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(Exclusive, &[op::THIRD_PARTY_COPY_IN, 0x05, F, F, F, F, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    // Whoever may populate may ask for the token.
    action(Read, &[op::THIRD_PARTY_COPY_IN, 0x07, F, F, F, F, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    command(Read, &[op::READ_16, 0x18, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Exclusive, &[op::COMPARE_AND_WRITE, 0x18, F, F, F, F, F, F, F, F, 0, 0, 0, F, 0, 0]),
    command(Exclusive, &[op::WRITE_16, 0x18, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Exclusive, &[op::ORWRITE_16, 0x18, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Exclusive, &[op::WRITE_AND_VERIFY_16, 0x16, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Read, &[op::VERIFY_16, 0x16, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Read, &[op::PRE_FETCH_16, 0x02, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Exclusive, &[op::SYNCHRONIZE_CACHE_16, 0x02, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Exclusive, &[op::WRITE_SAME_16, 0x09, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    action(Free, &[op::SERVICE_ACTION_IN_16, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(Read, &[op::SERVICE_ACTION_IN_16, 0x12, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]),
    command(Free, &[op::REPORT_LUNS, 0, F, 0, 0, 0, F, F, F, F, 0, 0]),
    // Bits 7-5 of REPORT TARGET PORT GROUPS choose the header's format.
    action(Free, &[op::MAINTENANCE_IN, 0x2a, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(Read, &[op::MAINTENANCE_IN, 0x0c, 0x87, F, F, F, F, F, F, F, 0, 0]),
    action(Read, &[op::MAINTENANCE_IN, 0x0d, 0x80, 0, 0, 0, F, F, F, F, 0, 0]),
    command(Read, &[op::READ_12, 0x18, F, F, F, F, F, F, F, F, 0, 0]),
    command(Exclusive, &[op::WRITE_12, 0x18, F, F, F, F, F, F, F, F, 0, 0]),
    command(Exclusive, &[op::WRITE_AND_VERIFY_12, 0x16, F, F, F, F, F, F, F, F, 0, 0]),
    command(Read, &[op::VERIFY_12, 0x16, F, F, F, F, F, F, F, F, 0, 0]),
    command(Read, &[op::READ_DEFECT_DATA_12, 0x1f, 0, 0, 0, 0, F, F, F, F, 0, 0]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_usage_map_has_the_length_of_its_cdb() {
        for command in COMMANDS {
            let cdb = Cdb::new(command.usage);
            assert_eq!(command.usage.len(), cdb.len(), "{:#04x}", command.opcode);
            assert!(matches!(lookup(&cdb), Lookup::Known(found) if std::ptr::eq(found, command)));
        }
        assert!(COMMANDS.is_sorted_by_key(|command| command.opcode));
    }

    #[test]
    fn unknown_commands_and_unknown_service_actions_differ() {
        // ESXi polls ATA PASS-THROUGH (85h) on every LUN.
        assert!(matches!(lookup(&Cdb::new(&[0x85])), Lookup::Unknown));
        assert!(matches!(
            lookup(&Cdb::new(&[0xa3, 0x05])),
            Lookup::UnknownServiceAction
        ));
    }
}
