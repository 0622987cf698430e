//! The numbers and tags of RFC 7143, each its own type, so that an `Itt` is not a `Ttt`.

use core::fmt;

/// A 32-bit number compared by serial arithmetic (RFC 1982, `SERIAL_BITS` = 32): it has no `Ord` on purpose.
macro_rules! serial_number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub u32);

        impl $name {
            /// Whether this number comes before `other` (RFC 1982 §3.2).
            #[must_use]
            pub fn precedes(self, other: Self) -> bool {
                self != other && other.0.wrapping_sub(self.0) < 1 << 31
            }

            /// The number `n` steps later.
            #[must_use]
            pub fn plus(self, n: u32) -> Self {
                Self(self.0.wrapping_add(n))
            }

            /// The number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                self.plus(1)
            }
        }
    };
}

serial_number! {
    /// Command sequence number of a session (RFC 7143 §4.2.2.1).
    CmdSn
}
serial_number! {
    /// Status sequence number of a connection (RFC 7143 §4.2.2.2).
    StatSn
}
serial_number! {
    /// Number of a data PDU within its sequence (RFC 7143 §4.2.2.4).
    DataSn
}
serial_number! {
    /// Number of an R2T within its task (RFC 7143 §11.8.2).
    R2tSn
}

/// Initiator Task Tag (RFC 7143 §11.2.1.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Itt(pub u32);

impl Itt {
    /// The value that names no task.
    pub const RESERVED: Self = Self(0xffff_ffff);
}

/// Target Transfer Tag (RFC 7143 §11.8.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ttt(pub u32);

impl Ttt {
    /// The value that names no transfer.
    pub const RESERVED: Self = Self(0xffff_ffff);
}

/// Initiator session id (RFC 7143 §11.12.5): the initiator's half of the name of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Isid(pub [u8; 6]);

impl fmt::Display for Isid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Target session identifying handle (RFC 7143 §11.12.6); 0 asks for a new session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tsih(pub u16);

/// Connection id within a session (RFC 7143 §11.12.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cid(pub u16);

/// The eight bytes of a logical unit number as they stand in the header (RFC 7143 §11.2.1.7, SAM-5 §4.7).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Lun(pub [u8; 8]);

impl Lun {
    /// The largest number that the flat addressing of one level can carry.
    pub const MAX_NUMBER: u16 = 0x3fff;

    /// The single-level form of a number: peripheral device addressing below 256, flat space addressing above.
    ///
    /// Numbers above [`Self::MAX_NUMBER`] have no such form: `None`.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        let [high, low] = number.to_be_bytes();
        match number {
            0..=0xff => Some(Self([0, low, 0, 0, 0, 0, 0, 0])),
            0x100..=Self::MAX_NUMBER => Some(Self([0x40 | high, low, 0, 0, 0, 0, 0, 0])),
            _ => None,
        }
    }

    /// The number of a single-level LUN on bus 0; `None` for well-known, extended and multi-level forms.
    #[must_use]
    pub fn number(self) -> Option<u16> {
        let [first, second, rest @ ..] = self.0;
        if rest != [0; 6] {
            return None;
        }
        match first >> 6 {
            // Peripheral device addressing: the low six bits are the bus, and we have bus 0 only.
            0 if first == 0 => Some(u16::from(second)),
            1 => Some(u16::from_be_bytes([first & 0x3f, second])),
            _ => None,
        }
    }

    /// Whether both name the same logical unit: LUNs below 256 have two single-level forms, and one initiator may use the one
    /// where another uses the other.
    #[must_use]
    pub fn names_same(self, other: Self) -> bool {
        match (self.number(), other.number()) {
            (Some(one), Some(two)) => one == two,
            _ => self == other,
        }
    }
}

impl fmt::Debug for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number() {
            Some(number) => write!(f, "Lun({number})"),
            None => write!(f, "Lun({:02x?})", self.0),
        }
    }
}

/// Task attribute of a SCSI command (RFC 7143 §11.3.1). Reserved values survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TaskAttribute(pub u8);

impl TaskAttribute {
    /// No attribute given: handled as simple.
    pub const UNTAGGED: Self = Self(0);
    /// May be reordered with other simple tasks.
    pub const SIMPLE: Self = Self(1);
    /// Runs after every older and before every newer task of its LUN.
    pub const ORDERED: Self = Self(2);
    /// Runs before waiting tasks.
    pub const HEAD_OF_QUEUE: Self = Self(3);
    /// Auto contingent allegiance: we never establish one, so it is handled as simple.
    pub const ACA: Self = Self(4);
}

/// Task management function (RFC 7143 §11.5.1). Unassigned values survive: policy answers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TmfFunction(pub u8);

impl TmfFunction {
    /// Aborts the one task that the Referenced Task Tag names.
    pub const ABORT_TASK: Self = Self(1);
    /// Aborts every task of this session on the LUN.
    pub const ABORT_TASK_SET: Self = Self(2);
    /// Clears an auto contingent allegiance.
    pub const CLEAR_ACA: Self = Self(3);
    /// Aborts every task in the LUN's task set, those of other sessions too.
    pub const CLEAR_TASK_SET: Self = Self(4);
    /// Resets the LUN.
    pub const LOGICAL_UNIT_RESET: Self = Self(5);
    /// Resets every LUN of the target.
    pub const TARGET_WARM_RESET: Self = Self(6);
    /// Resets every LUN of the target and ends every session.
    pub const TARGET_COLD_RESET: Self = Self(7);
    /// Moves a task to another connection: needs ErrorRecoveryLevel 2.
    pub const TASK_REASSIGN: Self = Self(8);
}

/// Answer to a task management function (RFC 7143 §11.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TmfResponse(pub u8);

impl TmfResponse {
    /// Done; no status of an affected task follows.
    pub const COMPLETE: Self = Self(0);
    /// The Referenced Task Tag names no task.
    pub const TASK_DOES_NOT_EXIST: Self = Self(1);
    /// The LUN field names no logical unit.
    pub const LUN_DOES_NOT_EXIST: Self = Self(2);
    /// Task allegiance reassignment is not supported.
    pub const REASSIGN_NOT_SUPPORTED: Self = Self(4);
    /// The function is not supported.
    pub const NOT_SUPPORTED: Self = Self(5);
    /// The initiator may not do this.
    pub const AUTHORIZATION_FAILED: Self = Self(6);
    /// The function was rejected.
    pub const REJECTED: Self = Self(255);
}

/// Why an initiator logs out (RFC 7143 §11.14.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LogoutReason(pub u8);

impl LogoutReason {
    /// Close the session.
    pub const CLOSE_SESSION: Self = Self(0);
    /// Close the connection: with one connection, the session too.
    pub const CLOSE_CONNECTION: Self = Self(1);
    /// Remove the connection for recovery: needs ErrorRecoveryLevel 2.
    pub const REMOVE_FOR_RECOVERY: Self = Self(2);
}

/// One SCSI command of one connection, never reused, not even when its ITT is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId {
    pub(crate) number: u64,
    pub(crate) itt: u32,
}

impl TaskId {
    /// The number, for logs.
    #[must_use]
    pub fn get(self) -> u64 {
        self.number
    }
}

/// One task management request of one connection, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TmfId(pub(crate) u64);

/// Normal or discovery (RFC 7143 §13.21).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SessionType {
    /// Carries SCSI commands.
    Normal,
    /// Only asks which targets there are.
    Discovery,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_wrap() {
        assert!(CmdSn(0xffff_ffff).precedes(CmdSn(0)));
        assert!(!CmdSn(0).precedes(CmdSn(0xffff_ffff)));
        assert!(!CmdSn(7).precedes(CmdSn(7)));
        assert_eq!(CmdSn(0xffff_ffff).next(), CmdSn(0));
    }

    #[test]
    fn lun_numbers_go_there_and_back() {
        for number in 0..=Lun::MAX_NUMBER {
            assert_eq!(Lun::from_number(number).and_then(Lun::number), Some(number));
        }
        assert_eq!(Lun::from_number(0x4000), None);
        // REPORT LUNS well-known logical unit, and a LUN of two levels.
        assert_eq!(Lun([0xc1, 1, 0, 0, 0, 0, 0, 0]).number(), None);
        assert_eq!(Lun([0, 1, 0, 1, 0, 0, 0, 0]).number(), None);
        assert_eq!(Lun([1, 1, 0, 0, 0, 0, 0, 0]).number(), None);
    }
}
