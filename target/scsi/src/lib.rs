//! The SCSI device server of a thin direct-access block device (SPC-4, SBC-3), without any I/O.
//!
//! A command goes in as CDB and data-out; a finished [`Reply`] comes out, or one [`BlockOp`] whose result
//! makes the reply. [`Unit`] holds what the I_T nexuses of one logical unit share: unit attentions,
//! reservations, mode pages. See the crate's README for the picture and for what this crate refuses to know.
#![forbid(unsafe_code)]

mod attention;
mod block;
mod cdb;
mod command;
mod copy;
mod inquiry;
mod log;
mod lun;
mod mode;
mod plan;
mod report;
mod reservation;
mod sense;
mod unit;

pub use attention::UnitAttention;
pub use cdb::opcode;
pub use copy::{
    CopyEnd, CopyError, CopyOutcome, CopyRequest, CopySegment, CopyTicket, CopyUnit, CopyWork, RodToken,
};
pub use inquiry::{PRODUCT, VENDOR};
pub use lun::absent_lun;
pub use mode::{MAX_THIN_THRESHOLDS, SavedModePages};
pub use plan::{
    BlockError, BlockOp, BlockResult, Compare, LbaExtent, Plan, Planned, Reply, ReservationChange,
    ThinFigures, status,
};
pub use reservation::{MAX_REGISTRATIONS, RestoreError};
pub use sense::{FieldPointer, Sense, SenseKey};
pub use unit::{BlockSize, Context, Limits, Unit, UnitSpec};

/// The owner's key for an I_T nexus; not reused while the unit lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NexusId(pub u64);

/// A SCSI target port as iSCSI has it: target name and portal group (RFC 7143 §4.4.2, "iSCSI target port
/// name").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPort {
    /// The iSCSI target name.
    pub target: String,
    /// Target portal group tag; it is the relative target port identifier too, as it is unique in the target.
    pub portal_group: u16,
}

impl TargetPort {
    /// The SCSI name string of the port: `iqn…,t,0x0001` (SPC-4 §7.8.6.11, RFC 7143 §4.4.2).
    pub fn name(&self) -> String {
        format!("{},t,0x{:04x}", self.target, self.portal_group)
    }
}

/// RELATIVE TARGET PORT IDENTIFIER of a port of the unit: the portal group tag as long as that is unique among the unit's
/// ports. A unit that several targets show has ports of equal tags: they are counted instead, in the order of their names.
pub(crate) fn relative_port_id(ports: &[TargetPort], port: &TargetPort) -> u16 {
    let tags: std::collections::BTreeSet<u16> = ports.iter().map(|port| port.portal_group).collect();
    if tags.len() == ports.len() {
        return port.portal_group;
    }
    let key = |port: &TargetPort| (port.target.clone(), port.portal_group);
    let before = ports.iter().filter(|other| key(other) < key(port)).count();
    u16::try_from(before + 1).unwrap_or(u16::MAX)
}

/// Both ends of an I_T nexus. Persistent reservations belong to these names and outlive a login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NexusName {
    /// iSCSI initiator name.
    pub initiator: String,
    /// Initiator session identifier: with the name it makes the initiator port.
    pub isid: [u8; 6],
    /// Target port.
    pub port: TargetPort,
}
