//! The service actions of PERSISTENT RESERVE OUT (SPC-4 §5.12.7 to §5.12.11, §6.16).

use crate::{NexusName, attention::UnitAttention, cdb::Cdb, sense::Sense};

use super::{Effects, Kind, MAX_REGISTRATIONS, Registration, Reservation, Reservations};

const REGISTER: u8 = 0x00;
const RESERVE: u8 = 0x01;
const RELEASE: u8 = 0x02;
const CLEAR: u8 = 0x03;
const PREEMPT: u8 = 0x04;
const PREEMPT_AND_ABORT: u8 = 0x05;
const REGISTER_AND_IGNORE: u8 = 0x06;

/// The parameter list and what the CDB says of the reservation.
#[derive(Debug)]
pub(super) struct Parameters {
    /// RESERVATION KEY: who the sender says it is.
    key: u64,
    /// SERVICE ACTION RESERVATION KEY: the new key, or the one to preempt.
    action_key: u64,
    /// SPEC_I_PT or ALL_TG_PT, neither of which is supported.
    other_ports: bool,
    aptpl: bool,
    /// Of the CDB: SCOPE zero (logical unit) and a known TYPE.
    kind: Option<Kind>,
}

impl Parameters {
    /// Length of the basic parameter list, the only one that there is without SPEC_I_PT and REGISTER AND
    /// MOVE.
    pub(super) const LEN: u64 = 24;

    /// # Errors
    /// PARAMETER LIST LENGTH ERROR when the list is not exactly 24 bytes, or did not come whole.
    pub(super) fn parse(cdb: &Cdb, data_out: &[u8]) -> Result<Self, Sense> {
        let list = data_out.first_chunk::<24>().ok_or(Sense::LIST_LENGTH)?;
        if u64::from(cdb.u32(5)) != Self::LEN {
            return Err(Sense::LIST_LENGTH);
        }
        let key = |at: [u8; 8]| u64::from_be_bytes(at);
        let [
            k0,
            k1,
            k2,
            k3,
            k4,
            k5,
            k6,
            k7,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            _,
            _,
            _,
            _,
            flags,
            ..,
        ] = *list;
        Ok(Self {
            key: key([k0, k1, k2, k3, k4, k5, k6, k7]),
            action_key: key([a0, a1, a2, a3, a4, a5, a6, a7]),
            other_ports: flags & 0x0c != 0,
            aptpl: flags & 0x01 != 0,
            kind: if cdb.byte(2) >> 4 == 0 {
                Kind::from_code(cdb.byte(2) & 0x0f)
            } else {
                None
            },
        })
    }

    fn kind(&self) -> Result<Kind, Refusal> {
        self.kind.ok_or(Refusal::Check(Sense::invalid_cdb(2)))
    }
}

/// Why a service action is not carried out. Nothing has changed then.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Conflict,
    Check(Sense),
}

impl Reservations {
    /// Carries out one service action for `sender`.
    ///
    /// # Errors
    /// [`Refusal`], with nothing changed.
    pub(super) fn apply(
        &mut self,
        sender: &NexusName,
        action: u8,
        parameters: &Parameters,
    ) -> Result<Effects, Refusal> {
        if matches!(action, REGISTER | REGISTER_AND_IGNORE) {
            return self.register(sender, action == REGISTER, parameters);
        }
        // An unregistered I_T nexus, or the wrong key: a conflict (SPC-4 §5.12.6 and table 67).
        if self.key_of(sender) != Some(parameters.key) {
            return Err(Refusal::Conflict);
        }
        match action {
            RESERVE => self.reserve(sender, parameters),
            RELEASE => self.release(sender, parameters),
            CLEAR => Ok(self.clear(sender)),
            PREEMPT => self.preempt(sender, parameters),
            PREEMPT_AND_ABORT => self.preempt(sender, parameters).map(|effects| Effects {
                abort: true,
                ..effects
            }),
            _ => Err(Refusal::Check(Sense::invalid_cdb(1))),
        }
    }

    const fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    fn register(
        &mut self,
        sender: &NexusName,
        checks_key: bool,
        parameters: &Parameters,
    ) -> Result<Effects, Refusal> {
        let registered = self.key_of(sender);
        // An unregistered nexus has to give the key zero.
        if checks_key && parameters.key != registered.unwrap_or(0) {
            return Err(Refusal::Conflict);
        }
        if parameters.other_ports {
            return Err(Refusal::Check(Sense::invalid_list(20)));
        }
        let effects = match (registered, parameters.action_key) {
            (None, 0) => Effects::default(),
            (Some(_), 0) => self.unregister(sender),
            (None, key) => {
                if self.registrations.len() >= MAX_REGISTRATIONS {
                    return Err(Refusal::Check(Sense::NO_REGISTRATION_RESOURCES));
                }
                self.registrations.push(Registration {
                    name: sender.clone(),
                    key,
                });
                Effects::default()
            }
            (Some(_), key) => {
                for registration in self.registrations.iter_mut().filter(|r| r.name == *sender) {
                    registration.key = key;
                }
                Effects::default()
            }
        };
        self.aptpl = parameters.aptpl;
        self.next_generation();
        Ok(effects)
    }

    /// Unregistering releases what the nexus alone held (SPC-4 §5.12.11.2), and what all held with the last
    /// of them.
    fn unregister(&mut self, sender: &NexusName) -> Effects {
        let held_alone = self
            .reservation
            .as_ref()
            .is_some_and(|r| r.holder.as_ref() == Some(sender));
        self.registrations
            .retain(|registration| registration.name != *sender);
        let mut effects = Effects::default();
        if held_alone {
            if let Some(Reservation { kind, .. }) = self.reservation.take()
                && kind.admits_registrants()
            {
                effects.attentions = self.tell_others(sender, UnitAttention::ReservationsReleased);
            }
        } else if self.registrations.is_empty() {
            self.reservation = None;
        }
        effects
    }

    /// The same unit attention for every registrant but `sender`.
    fn tell_others(&self, sender: &NexusName, attention: UnitAttention) -> Vec<(NexusName, UnitAttention)> {
        let others = self
            .registrations
            .iter()
            .filter(|registration| registration.name != *sender);
        others
            .map(|registration| (registration.name.clone(), attention))
            .collect()
    }

    /// RESERVE: nothing else may stand, except the same reservation of the same holder.
    fn reserve(&mut self, sender: &NexusName, parameters: &Parameters) -> Result<Effects, Refusal> {
        let wanted = Self::reservation_of(sender, parameters.kind()?);
        match &self.reservation {
            None => self.reservation = Some(wanted),
            Some(standing) if self.holds(sender) && standing.kind == wanted.kind => {}
            Some(_) => return Err(Refusal::Conflict),
        }
        Ok(Effects::default())
    }

    fn reservation_of(holder: &NexusName, kind: Kind) -> Reservation {
        Reservation {
            kind,
            holder: (!kind.all_registrants()).then(|| holder.clone()),
        }
    }

    /// RELEASE: by somebody who does not hold it, GOOD and no effect.
    fn release(&mut self, sender: &NexusName, parameters: &Parameters) -> Result<Effects, Refusal> {
        let Some(standing) = self.reservation.as_ref().map(|standing| standing.kind) else {
            return Ok(Effects::default());
        };
        if !self.holds(sender) {
            return Ok(Effects::default());
        }
        if parameters.kind != Some(standing) {
            return Err(Refusal::Check(Sense::INVALID_RELEASE));
        }
        self.reservation = None;
        let mut effects = Effects::default();
        if standing.admits_registrants() {
            effects.attentions = self.tell_others(sender, UnitAttention::ReservationsReleased);
        }
        Ok(effects)
    }

    fn clear(&mut self, sender: &NexusName) -> Effects {
        let attentions = self.tell_others(sender, UnitAttention::ReservationsPreempted);
        self.registrations.clear();
        self.reservation = None;
        self.next_generation();
        Effects {
            attentions,
            ..Effects::default()
        }
    }

    /// PREEMPT (SPC-4 §5.12.11.4): takes the reservation over when the key is its holder's (or zero for all
    /// registrants), else only registrations away.
    fn preempt(&mut self, sender: &NexusName, parameters: &Parameters) -> Result<Effects, Refusal> {
        let victim = parameters.action_key;
        let (takes_over, old_kind) = match &self.reservation {
            Some(Reservation { kind, holder: None }) => (victim == 0, Some(*kind)),
            Some(Reservation {
                kind,
                holder: Some(holder),
            }) => (self.key_of(holder) == Some(victim), Some(*kind)),
            None => (false, None),
        };
        let effects = if takes_over {
            let kind = parameters.kind()?;
            let effects = self.take_over(sender, victim, old_kind != Some(kind));
            self.reservation = Some(Self::reservation_of(sender, kind));
            effects
        } else if victim == 0 {
            return Err(Refusal::Check(Sense::invalid_list(8)));
        } else {
            self.remove_registrations(sender, victim)?
        };
        self.next_generation();
        Ok(effects)
    }

    /// Removes the registrations with the key (all for zero), the sender's own excepted.
    fn take_over(&mut self, sender: &NexusName, victim: u64, kind_changes: bool) -> Effects {
        let doomed = |r: &Registration| r.name != *sender && (victim == 0 || r.key == victim);
        let (removed, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.registrations)
            .into_iter()
            .partition(doomed);
        self.registrations = kept;
        let mut effects = Self::preempted(sender, removed);
        // With another type, the registrants that stay hear RESERVATIONS RELEASED (SPC-4 §5.12.11.4.2).
        if kind_changes {
            effects
                .attentions
                .extend(self.tell_others(sender, UnitAttention::ReservationsReleased));
        }
        effects
    }

    /// Removes all registrations with the key; none at all is a conflict.
    fn remove_registrations(&mut self, sender: &NexusName, victim: u64) -> Result<Effects, Refusal> {
        let doomed = |r: &Registration| r.key == victim;
        let (removed, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.registrations)
            .into_iter()
            .partition(doomed);
        self.registrations = kept;
        if removed.is_empty() {
            return Err(Refusal::Conflict);
        }
        if self.registrations.is_empty() {
            // Only an all-registrants reservation can stand here: a single holder's key was not the victim.
            self.reservation = None;
        }
        Ok(Self::preempted(sender, removed))
    }

    fn preempted(sender: &NexusName, removed: Vec<Registration>) -> Effects {
        let removed: Vec<_> = removed
            .into_iter()
            .map(|r| r.name)
            .filter(|name| name != sender)
            .collect();
        let attentions = removed
            .iter()
            .map(|name| (name.clone(), UnitAttention::RegistrationsPreempted))
            .collect();
        Effects {
            attentions,
            removed,
            abort: false,
        }
    }
}
