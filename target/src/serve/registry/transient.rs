//! LUNs that one initiator alone sees on a target, beside those of the configuration: shadow copies that a VSS hardware provider
//! exposes. They come and go without a login; the initiator's sessions are told by 6/3F/0E.

use std::borrow::Cow;
use std::sync::{Arc, PoisonError};

use super::{Registry, Session, Target, TargetRules};
use crate::serve::lun::Lun;

/// Numbers of LUNs on one target: REPORT LUNS shows single-level ones, and Windows looks no further.
const LAST_NUMBER: u16 = 254;

/// One such LUN.
#[derive(Clone, Debug)]
pub(crate) struct Transient {
    /// Its number, which no other LUN of the target has, whoever sees it.
    pub(crate) number: u16,
    pub(crate) lun: Arc<Lun>,
    /// Who sees it.
    pub(crate) initiator: String,
}

impl Transient {
    /// Names are compared in lower case (RFC 3722).
    fn is_for(&self, initiator: &str) -> bool {
        self.initiator.eq_ignore_ascii_case(initiator)
    }
}

impl TargetRules {
    /// Every LUN of the target, whoever sees it.
    pub(crate) fn all_luns(&self) -> impl Iterator<Item = (u16, &Arc<Lun>)> {
        let transients = self.transients.iter().map(|one| (one.number, &one.lun));
        self.luns
            .iter()
            .map(|(number, lun)| (*number, lun))
            .chain(transients)
    }

    /// What this initiator sees, by number.
    pub(crate) fn shown_to<'a>(&'a self, initiator: &'a str) -> impl Iterator<Item = (u16, &'a Arc<Lun>)> {
        let transients = self.transients.iter().filter(move |one| one.is_for(initiator));
        let luns = self.luns.iter().map(|(number, lun)| (*number, lun));
        luns.chain(transients.map(|one| (one.number, &one.lun)))
    }

    /// Their numbers.
    pub(crate) fn numbers_for(&self, initiator: &str) -> Cow<'_, [u16]> {
        // Every command asks; almost no target has such LUNs.
        if self.transients.is_empty() {
            return Cow::Borrowed(self.numbers());
        }
        self.shown_to(initiator).map(|(number, _)| number).collect()
    }

    /// The LUN of that number, if this initiator sees it.
    pub(crate) fn find_for(&self, number: u16, initiator: &str) -> Option<(u16, &Arc<Lun>)> {
        if let Some(lun) = self.lun(number) {
            return Some((number, lun));
        }
        let mut transients = self.transients.iter();
        let found = transients.find(|one| one.number == number && one.is_for(initiator))?;
        Some((number, &found.lun))
    }

    /// The number under which the target shows this LUN, to whomever.
    pub(crate) fn number_of(&self, lun: &Lun) -> Option<u16> {
        self.all_luns()
            .find(|(_, served)| is(served, lun))
            .map(|(number, _)| number)
    }

    /// The number under which this initiator sees the LUN.
    pub(crate) fn number_for(&self, lun: &Lun, initiator: &str) -> Option<u16> {
        let mut shown = self.shown_to(initiator);
        shown
            .find(|(_, served)| is(served, lun))
            .map(|(number, _)| number)
    }

    /// The transient that this LUN is here.
    pub(crate) fn transient(&self, lun: &Lun) -> Option<&Transient> {
        self.transients.iter().find(|one| is(&one.lun, lun))
    }

    fn free_number(&self) -> Option<u16> {
        (1..=LAST_NUMBER).find(|number| self.all_luns().all(|(taken, _)| taken != *number))
    }
}

fn is(served: &Arc<Lun>, lun: &Lun) -> bool {
    std::ptr::eq(Arc::as_ptr(served), lun)
}

impl Session {
    /// Whether the session's initiator sees the LUN through it.
    pub(crate) fn shows(&self, lun: &Lun) -> bool {
        self.target.rules().number_for(lun, &self.initiator).is_some()
    }
}

impl Registry {
    /// Shows a LUN to one initiator, under the number that is wanted or the first that is free; a LUN that is shown to another one
    /// changes over, and keeps its number. `None`: the target is not served, or has no number left.
    pub(crate) fn show(
        &self,
        iqn: &str,
        lun: &Arc<Lun>,
        initiator: &str,
        wanted: Option<u16>,
    ) -> Option<u16> {
        let mut tables = self.write();
        let target = tables.targets.get(&iqn.to_lowercase()).cloned()?;
        let mut rules = TargetRules::clone(&target.rules());
        let before = rules.transient(lun).cloned();
        if let Some(before) = before.as_ref().filter(|one| one.is_for(initiator)) {
            // Nobody is told of what has not changed.
            return Some(before.number);
        }
        rules.transients.retain(|one| !is(&one.lun, lun));
        let wanted = before.as_ref().map(|one| one.number).or(wanted);
        let wanted = wanted.filter(|number| rules.all_luns().all(|(taken, _)| taken != *number));
        let number = wanted.or_else(|| rules.free_number())?;
        rules.transients.push(Transient {
            number,
            lun: Arc::clone(lun),
            initiator: initiator.to_owned(),
        });
        rules.transients.sort_by_key(|one| one.number);
        replace(&target, rules);
        tables.luns.insert(lun.name().to_owned(), Arc::clone(lun));
        tables.tell_ports();
        drop(tables);
        let changed_over = before.filter(|one| !one.is_for(initiator));
        self.announce(&target, initiator);
        if let Some(before) = changed_over {
            self.announce(&target, &before.initiator);
        }
        Some(number)
    }

    /// Shows a LUN to nobody any more. It stays known; [`Registry::remove_lun`] forgets it. False when it was not shown.
    pub(crate) fn hide(&self, lun: &Lun) -> bool {
        let tables = self.write();
        let mut hidden = Vec::new();
        for target in tables.targets.values() {
            let rules = target.rules();
            let Some(transient) = rules.transient(lun).cloned() else {
                continue;
            };
            let mut rules = TargetRules::clone(&rules);
            rules.transients.retain(|one| !is(&one.lun, lun));
            replace(target, rules);
            hidden.push((Arc::clone(target), transient.initiator));
        }
        tables.tell_ports();
        drop(tables);
        for (target, initiator) in &hidden {
            self.announce(target, initiator);
        }
        !hidden.is_empty()
    }

    /// SPC-4: REPORTED LUNS DATA HAS CHANGED (6/3F/0E), to the sessions whose list it is, on every LUN that they see.
    fn announce(&self, target: &Target, initiator: &str) {
        let concerned = |session: &Session| {
            session.target.key == target.key && session.initiator.eq_ignore_ascii_case(initiator)
        };
        let sessions: Vec<u64> = self
            .sessions_with(concerned)
            .iter()
            .map(|session| session.id)
            .collect();
        for (_, lun) in target.rules().shown_to(initiator) {
            lun.report_luns_changed_to(&sessions);
        }
    }
}

fn replace(target: &Target, rules: TargetRules) {
    *target.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
}
