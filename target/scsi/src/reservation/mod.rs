//! Reservations of one logical unit: persistent ones (SPC-4 §5.12) and the RESERVE and RELEASE of SPC-2.
//!
//! Persistent registrations belong to the names of an I_T nexus and outlive its logins; a RESERVE belongs to
//! the login.

mod change;
mod parameters;
mod report;
mod store;

use bytes::Bytes;

pub use store::RestoreError;

use crate::{
    NexusId, NexusName,
    attention::UnitAttention,
    cdb::{Cdb, opcode},
    command::Access,
    plan::{Answer, BlockOp, Reply, ReservationChange, status},
    sense::Sense,
    unit::{Ready, Unit},
};
use change::{Refusal, World};
use parameters::Parameters;
pub(crate) use report::read;

/// Most registrations of one unit: one more is answered INSUFFICIENT REGISTRATION RESOURCES.
pub const MAX_REGISTRATIONS: usize = 128;

/// TYPE of a persistent reservation (SPC-4 table 151).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrantsOnly = 5,
    ExclusiveAccessRegistrantsOnly = 6,
    WriteExclusiveAllRegistrants = 7,
    ExclusiveAccessAllRegistrants = 8,
}

impl Kind {
    const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrantsOnly,
            6 => Self::ExclusiveAccessRegistrantsOnly,
            7 => Self::WriteExclusiveAllRegistrants,
            8 => Self::ExclusiveAccessAllRegistrants,
            _ => return None,
        })
    }

    const fn code(self) -> u8 {
        self as u8
    }

    /// Every registrant holds it.
    const fn all_registrants(self) -> bool {
        matches!(
            self,
            Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants
        )
    }

    /// Registrants have access, whoever holds it: "registrants only" and "all registrants".
    const fn admits_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    /// The others may read.
    const fn write_exclusive(self) -> bool {
        matches!(
            self,
            Self::WriteExclusive | Self::WriteExclusiveRegistrantsOnly | Self::WriteExclusiveAllRegistrants
        )
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Registration {
    name: NexusName,
    key: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Reservation {
    kind: Kind,
    /// `None` when all registrants hold it.
    holder: Option<NexusName>,
}

/// Everything that is reserved on one unit.
#[derive(Debug, Default)]
pub(crate) struct Reservations {
    registrations: Vec<Registration>,
    reservation: Option<Reservation>,
    /// PRGENERATION: zero at power on, APTPL or not (SPC-4 §6.15.2).
    generation: u32,
    /// Persist through power loss, as the last registration asked for it.
    aptpl: bool,
    /// Counts the states given out for saving, over restarts too.
    sequence: u64,
    /// Holder of an SPC-2 RESERVE.
    reserved_by: Option<NexusId>,
}

impl Reservations {
    /// Whether a command of this access class ends with RESERVATION CONFLICT.
    pub(crate) fn conflicts(&self, nexus: NexusId, name: &NexusName, access: Access) -> bool {
        match (self.reserved_by, access) {
            (_, Access::Free | Access::Reserve) => return false,
            // SPC-2 §5.5.1: while RESERVEd, persistent reservation commands conflict for everybody.
            (Some(_), Access::Persistent) => return true,
            (Some(holder), _) => return holder != nexus,
            (None, _) => {}
        }
        let Some(reservation) = &self.reservation else {
            return false;
        };
        match access {
            Access::Read => !self.admits(reservation, name) && !reservation.kind.write_exclusive(),
            Access::Exclusive => !self.admits(reservation, name),
            _ => false,
        }
    }

    /// Full access under the reservation: its holder, and the registrants if the type lets them in.
    fn admits(&self, reservation: &Reservation, name: &NexusName) -> bool {
        reservation.holder.as_ref() == Some(name)
            || (reservation.kind.admits_registrants() && self.key_of(name).is_some())
    }

    fn key_of(&self, name: &NexusName) -> Option<u64> {
        self.registrations.iter().find(|r| r.name == *name).map(|r| r.key)
    }

    /// Whether this I_T nexus holds the persistent reservation: with an all-registrants type every registrant
    /// does.
    fn holds(&self, name: &NexusName) -> bool {
        self.reservation
            .as_ref()
            .is_some_and(|reservation| match &reservation.holder {
                Some(holder) => holder == name,
                None => self.key_of(name).is_some(),
            })
    }

    /// I_T nexus loss ends a RESERVE.
    pub(crate) fn nexus_lost(&mut self, nexus: NexusId) {
        if self.reserved_by == Some(nexus) {
            self.reserved_by = None;
        }
    }

    /// A reset ends a RESERVE; persistent reservations stay.
    pub(crate) const fn reset(&mut self) {
        self.reserved_by = None;
    }

    /// RESERVE and RELEASE where persistent reservations are in use too (SPC-4 §5.12.3, CRH): GOOD without
    /// effect for those who have access anyway, a conflict for the others.
    fn reserve_or_release(&mut self, nexus: NexusId, name: &NexusName, reserve: bool) -> Reply {
        const CONFLICT: Reply = Reply::status(status::RESERVATION_CONFLICT);
        if let Some(reservation) = &self.reservation {
            return if self.admits(reservation, name) {
                Reply::good()
            } else {
                CONFLICT
            };
        }
        if !self.registrations.is_empty() {
            return CONFLICT;
        }
        match (self.reserved_by, reserve) {
            (Some(holder), true) if holder != nexus => return CONFLICT,
            (_, true) => self.reserved_by = Some(nexus),
            (Some(holder), false) if holder == nexus => self.reserved_by = None,
            // RELEASE by somebody else is GOOD and alters nothing (SPC-2 §7.21).
            (_, false) => {}
        }
        Reply::good()
    }

    /// The persistent state as bytes.
    pub(crate) fn persistent(&self) -> Bytes {
        store::encode(self)
    }

    /// # Errors
    /// When the bytes are not a state of ours.
    pub(crate) fn restore(state: &[u8]) -> Result<Self, RestoreError> {
        store::decode(state)
    }
}

/// RESERVE(6), RESERVE(10), RELEASE(6), RELEASE(10), of the whole unit for the sender itself.
///
/// # Errors
/// INVALID FIELD IN CDB for extents and third parties.
pub(crate) fn reserve_or_release(unit: &mut Unit, nexus: NexusId, cdb: &Cdb) -> Result<Reply, Sense> {
    if cdb.bit(1, 0x11) {
        return Err(Sense::invalid_cdb(1));
    }
    let reserve = matches!(cdb.opcode(), opcode::RESERVE_6 | opcode::RESERVE_10);
    let Some(sender) = unit.nexuses.get(&nexus) else {
        return Ok(Reply::status(status::BUSY));
    };
    Ok(unit.reservations.reserve_or_release(nexus, &sender.name, reserve))
}

/// PERSISTENT RESERVE OUT (SPC-4 §6.16).
///
/// # Errors
/// The sense of a request that is wrong; a conflict is a reply of its own.
pub(crate) fn out(unit: &mut Unit, nexus: NexusId, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    let Some(sender) = unit.nexuses.get(&nexus).map(|nexus| nexus.name.clone()) else {
        return Ok(Ready::Reply(Reply::status(status::BUSY)));
    };
    let parameters = Parameters::parse(cdb, data_out)?;
    let was_persistent = unit.reservations.aptpl;
    let world = World {
        ports: &unit.spec.ports,
        nexuses: unit.nexuses.values().map(|nexus| &nexus.name).collect(),
    };
    let effects = match unit
        .reservations
        .apply(&sender, cdb.service_action(), &parameters, &world)
    {
        Ok(effects) => effects,
        Err(Refusal::Conflict) => return Ok(Ready::Reply(Reply::status(status::RESERVATION_CONFLICT))),
        Err(Refusal::Check(sense)) => return Err(sense),
    };
    for (name, attention) in &effects.attentions {
        unit.raise_for(name, *attention);
    }
    let aborts = |name: &NexusName| effects.abort && effects.removed.contains(name);
    let abort_tasks_of: Vec<NexusId> = unit
        .nexuses
        .iter()
        .filter(|(_, nexus)| aborts(&nexus.name))
        .map(|(id, _)| *id)
        .collect();
    let saves = was_persistent || unit.reservations.aptpl;
    if !saves && abort_tasks_of.is_empty() {
        return Ok(Ready::Reply(Reply::took(parameters.len)));
    }
    if saves {
        unit.reservations.sequence += 1;
    }
    let save = saves.then(|| unit.reservations.persistent());
    let sequence = unit.reservations.sequence;
    let op = BlockOp::Reservations(ReservationChange {
        save,
        sequence,
        abort_tasks_of,
    });
    Ok(Ready::Transfer(op, Answer::Good, parameters.len))
}

/// What a change does to the others.
#[derive(Debug, Default)]
struct Effects {
    attentions: Vec<(NexusName, UnitAttention)>,
    /// Registrations of others that PREEMPT took away.
    removed: Vec<NexusName>,
    /// PREEMPT AND ABORT.
    abort: bool,
}
