//! The service actions of PERSISTENT RESERVE OUT (SPC-4 §5.12.7 to §5.12.11, §6.16).

use crate::{NexusName, TargetPort, attention::UnitAttention, sense::Sense};

use super::{
    Effects, Kind, MAX_REGISTRATIONS, Registration, Reservation, Reservations,
    parameters::{Parameters, TransportId},
};

pub(super) const REGISTER: u8 = 0x00;
const RESERVE: u8 = 0x01;
const RELEASE: u8 = 0x02;
const CLEAR: u8 = 0x03;
const PREEMPT: u8 = 0x04;
const PREEMPT_AND_ABORT: u8 = 0x05;
const REGISTER_AND_IGNORE: u8 = 0x06;
pub(super) const REGISTER_AND_MOVE: u8 = 0x07;

/// Why a service action is not carried out. Nothing has changed then.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Conflict,
    Check(Sense),
}

/// What a registration may name beside the sender.
#[derive(Debug)]
pub(super) struct World<'a> {
    /// All target ports of the unit.
    pub(super) ports: &'a [TargetPort],
    /// The I_T nexuses that are logged in.
    pub(super) nexuses: Vec<&'a NexusName>,
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
        world: &World<'_>,
    ) -> Result<Effects, Refusal> {
        if matches!(action, REGISTER | REGISTER_AND_IGNORE) {
            return self.register(sender, action == REGISTER, parameters, world);
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
            REGISTER_AND_MOVE => self.register_and_move(sender, parameters, world),
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
        world: &World<'_>,
    ) -> Result<Effects, Refusal> {
        let registered = self.key_of(sender);
        // An unregistered nexus has to give the key zero.
        if checks_key && parameters.key != registered.unwrap_or(0) {
            return Err(Refusal::Conflict);
        }
        if registered.is_some() && parameters.others.is_some() {
            return Err(Refusal::Check(Sense::invalid_list(20)));
        }
        let own = if parameters.all_ports {
            at_all_ports(sender, world.ports)
        } else {
            vec![sender.clone()]
        };
        let effects = match (registered, parameters.action_key) {
            (None, 0) => Effects::default(),
            (Some(_), 0) => self.unregister(&own),
            (_, key) => {
                let others = self.named(sender, parameters, world)?;
                self.enter(&own, &others, key)?;
                Effects::default()
            }
        };
        self.aptpl = parameters.aptpl;
        self.next_generation();
        Ok(effects)
    }

    /// The I_T nexuses that the TransportIDs name: through the sender's target port, or through all.
    ///
    /// A TransportID of a whole initiator device stands for its ports that are known here, and there must be one.
    fn named(
        &self,
        sender: &NexusName,
        parameters: &Parameters,
        world: &World<'_>,
    ) -> Result<Vec<NexusName>, Refusal> {
        let mut named = Vec::new();
        for TransportId { initiator, isid } in parameters.others.iter().flatten() {
            let registered = self.registrations.iter().map(|r| &r.name);
            let known = world.nexuses.iter().copied().chain(registered);
            let known = known
                .filter(|name| name.initiator == *initiator)
                .map(|name| name.isid);
            let mut isids: Vec<[u8; 6]> = isid.map_or_else(|| known.collect(), |isid| vec![isid]);
            isids.sort_unstable();
            isids.dedup();
            if isids.is_empty() {
                return Err(Refusal::Check(Sense::invalid_list(28)));
            }
            for isid in isids {
                let name = NexusName {
                    initiator: initiator.clone(),
                    isid,
                    port: sender.port.clone(),
                };
                if parameters.all_ports {
                    named.extend(at_all_ports(&name, world.ports));
                } else {
                    named.push(name);
                }
            }
        }
        Ok(named)
    }

    /// Registers `own`, or gives them another key, and registers those of `others` that are not registered: all or
    /// nothing (SPC-4 §5.12.7.3).
    fn enter(&mut self, own: &[NexusName], others: &[NexusName], key: u64) -> Result<(), Refusal> {
        let mut entered = self.registrations.clone();
        let both = own
            .iter()
            .map(|name| (name, true))
            .chain(others.iter().map(|name| (name, false)));
        for (name, changes) in both {
            match entered.iter_mut().find(|registration| registration.name == *name) {
                Some(registration) if changes => registration.key = key,
                Some(_) => {}
                None => entered.push(Registration {
                    name: name.clone(),
                    key,
                }),
            }
        }
        if entered.len() > MAX_REGISTRATIONS {
            return Err(Refusal::Check(Sense::NO_REGISTRATION_RESOURCES));
        }
        self.registrations = entered;
        Ok(())
    }

    /// REGISTER AND MOVE (SPC-4 §5.12.8): the reservation and a registration for another I_T nexus.
    fn register_and_move(
        &mut self,
        sender: &NexusName,
        parameters: &Parameters,
        world: &World<'_>,
    ) -> Result<Effects, Refusal> {
        let kind = match &self.reservation {
            // "the command shall be completed with RESERVATION CONFLICT status": there is no holder to move it from.
            Some(Reservation { holder: None, .. }) => return Err(Refusal::Conflict),
            Some(Reservation {
                kind,
                holder: Some(holder),
            }) if holder == sender => *kind,
            // Table 65: a registrant that is not the holder.
            _ => return Err(Refusal::Check(Sense::invalid_cdb(1))),
        };
        if parameters.action_key == 0 {
            return Err(Refusal::Check(Sense::invalid_list(8)));
        }
        let destination = parameters
            .destination
            .as_ref()
            .ok_or(Refusal::Check(Sense::LIST_LENGTH))?;
        let to = destination.nexus(sender, world.ports)?;
        if to == *sender {
            return Err(Refusal::Check(Sense::invalid_list(24)));
        }
        // The sender's registration makes room for the new one.
        let mut moved = self.registrations.clone();
        if destination.unregister {
            moved.retain(|registration| registration.name != *sender);
        }
        let before = std::mem::replace(&mut self.registrations, moved);
        if let Err(refusal) = self.enter(std::slice::from_ref(&to), &[], parameters.action_key) {
            self.registrations = before;
            return Err(refusal);
        }
        self.reservation = Some(Self::reservation_of(&to, kind));
        self.aptpl = parameters.aptpl;
        self.next_generation();
        Ok(Effects::default())
    }

    /// Unregistering releases what one of the nexuses alone held (SPC-4 §5.12.11.2), and what all held with the last of
    /// them.
    fn unregister(&mut self, names: &[NexusName]) -> Effects {
        let held_alone = self
            .reservation
            .as_ref()
            .is_some_and(|r| r.holder.as_ref().is_some_and(|holder| names.contains(holder)));
        self.registrations
            .retain(|registration| !names.contains(&registration.name));
        let mut effects = Effects::default();
        if held_alone {
            if let Some(Reservation { kind, .. }) = self.reservation.take()
                && kind.admits_registrants()
            {
                let told = self.registrations.iter().map(|r| r.name.clone());
                effects.attentions = told
                    .map(|name| (name, UnitAttention::ReservationsReleased))
                    .collect();
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

/// The initiator port behind `sender` at every target port of the unit, its own among them.
fn at_all_ports(sender: &NexusName, ports: &[TargetPort]) -> Vec<NexusName> {
    let others = ports.iter().filter(|port| **port != sender.port);
    [&sender.port]
        .into_iter()
        .chain(others)
        .map(|port| NexusName {
            port: port.clone(),
            ..sender.clone()
        })
        .collect()
}
