//! Unit attention conditions (SAM-5 §5.14): what each I_T nexus has to hear before its next command is
//! carried out.

use crate::sense::{Sense, SenseKey};

/// A unit attention condition, most urgent first: the order is the one in which they are reported (SAM-5
/// §5.14.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnitAttention {
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED: the first thing that a new I_T nexus hears.
    PowerOn,
    /// BUS DEVICE RESET FUNCTION OCCURRED: a logical unit or target reset.
    DeviceReset,
    /// COMMANDS CLEARED BY ANOTHER INITIATOR.
    CommandsCleared,
    /// RESERVATIONS PREEMPTED.
    ReservationsPreempted,
    /// RESERVATIONS RELEASED.
    ReservationsReleased,
    /// REGISTRATIONS PREEMPTED.
    RegistrationsPreempted,
    /// MODE PARAMETERS CHANGED.
    ModeParametersChanged,
    /// CAPACITY DATA HAS CHANGED.
    CapacityChanged,
    /// INQUIRY DATA HAS CHANGED.
    InquiryChanged,
    /// NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED: other contents under the same identity (a revert).
    MediumChanged,
    /// THIN PROVISIONING SOFT THRESHOLD REACHED: Windows logs the figures of log page 0Ch and repeats its command.
    ThinThreshold,
    /// REPORTED LUNS DATA HAS CHANGED.
    ReportLunsChanged,
}

impl UnitAttention {
    /// Its sense data.
    pub const fn sense(self) -> Sense {
        let (asc, ascq) = match self {
            Self::PowerOn => (0x29, 0x00),
            Self::DeviceReset => (0x29, 0x03),
            Self::CommandsCleared => (0x2f, 0x00),
            Self::ReservationsPreempted => (0x2a, 0x03),
            Self::ReservationsReleased => (0x2a, 0x04),
            Self::RegistrationsPreempted => (0x2a, 0x05),
            Self::ModeParametersChanged => (0x2a, 0x01),
            Self::CapacityChanged => (0x2a, 0x09),
            Self::InquiryChanged => (0x3f, 0x03),
            Self::MediumChanged => (0x28, 0x00),
            Self::ThinThreshold => (0x38, 0x07),
            Self::ReportLunsChanged => (0x3f, 0x0e),
        };
        Sense::new(SenseKey::UNIT_ATTENTION, asc, ascq)
    }
}

/// Conditions pending for one I_T nexus: each kind at most once, so the queue is bounded by the kinds.
#[derive(Debug, Default)]
pub(crate) struct Pending(Vec<UnitAttention>);

impl Pending {
    pub(crate) fn raise(&mut self, attention: UnitAttention) {
        if let Err(at) = self.0.binary_search(&attention) {
            self.0.insert(at, attention);
        }
    }

    /// Takes the most urgent one: reporting a condition clears it (UA_INTLCK_CTRL is zero).
    pub(crate) fn take(&mut self) -> Option<UnitAttention> {
        if self.0.is_empty() {
            None
        } else {
            Some(self.0.remove(0))
        }
    }

    pub(crate) fn clear(&mut self, attention: UnitAttention) {
        self.0.retain(|pending| *pending != attention);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_reported_once_in_order_of_urgency() {
        let mut pending = Pending::default();
        for attention in [
            UnitAttention::ReportLunsChanged,
            UnitAttention::CapacityChanged,
            UnitAttention::PowerOn,
            UnitAttention::CapacityChanged,
        ] {
            pending.raise(attention);
        }
        assert_eq!(pending.take(), Some(UnitAttention::PowerOn));
        assert_eq!(pending.take(), Some(UnitAttention::CapacityChanged));
        pending.clear(UnitAttention::ReportLunsChanged);
        assert_eq!(pending.take(), None);
    }
}
