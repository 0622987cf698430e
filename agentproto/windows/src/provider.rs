//! The hardware provider without COM (agent-protocol.md §9, table "VSS calls | provider does | target operation").
//!
//! A set that our own requester made ends in its [`Hold`]; any other one is a backup program's and goes to the target:
//!
//! ```text
//! BeginPrepareSnapshot… ─▶ Gathering ─ EndPrepareSnapshots: connect, ProvBegin ─▶ Ready ─ PreCommit: ping ─ Commit: ProvCommit ─▶ Taken
//! AbortSnapshots, in any state ─ ProvDelete{abort} ─▶ gone          Taken ─ LocateLuns: ProvExpose, OnLunEmpty: ProvDelete ─▶ …
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use stillpoint_agentproto::message::{
    DeleteReason, LunIdentity, ProvBegin, ProvCommit, ProvDelete, ProvExpose, ProvReady, Shadow, ShadowAsk,
    Visibility,
};
use stillpoint_agentproto::provider::CallError;
use stillpoint_agentproto::{Fingerprint, LunId, SetId, ShadowId};

use crate::backup::OwnSets;
use crate::hold::Hold;
use crate::ledger::{Entry, Ledger};
use crate::lun_info::LunInfo;

/// A set that never came to its commit is forgotten after this: a new set may start without an abort for the old one (MS docs).
const STALE: Duration = Duration::from_secs(15 * 60);
/// Sets in creation; VSS itself makes one at a time.
const SETS_MAX: usize = 4;
/// LUNs of one set: VSS allows 64 volumes.
const LUNS_MAX: usize = 64;

/// A connection to one target, with nothing on it but the provider's requests. It blocks.
pub(crate) trait Wire: Send {
    /// ProvQuery; of no LUNs it is a ping.
    fn query(&mut self, luns: Vec<LunIdentity>) -> Result<Vec<bool>, CallError>;
    /// ProvBegin.
    fn begin(&mut self, ask: ProvBegin) -> Result<ProvReady, CallError>;
    /// ProvCommit.
    fn commit(&mut self, ask: ProvCommit) -> Result<(), CallError>;
    /// ProvExpose.
    fn expose(&mut self, ask: ProvExpose) -> Result<LunIdentity, CallError>;
    /// ProvDelete.
    fn delete(&mut self, ask: ProvDelete) -> Result<(), CallError>;
}

/// The enrolled targets.
pub(crate) trait Targets: Send + Sync {
    /// The one whose LUN this is, and that lets this agent use it.
    fn of(&self, lun: LunId) -> Option<Fingerprint>;
    /// Dials it.
    ///
    /// # Errors
    /// For people.
    fn connect(&self, target: Fingerprint) -> Result<Box<dyn Wire>, String>;
    /// This host's initiator name.
    fn initiator(&self) -> Option<String>;
}

/// What VSS is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProviderError {
    /// `VSS_E_PROVIDER_VETO`: logged by us, the set fails.
    #[error("{0}")]
    Veto(String),
    /// `VSS_E_OBJECT_NOT_FOUND`.
    #[error("not known here: {0}")]
    NotFound(String),
    /// `VSS_E_BAD_STATE`.
    #[error("not in this state: {0}")]
    State(&'static str),
}

fn veto(error: impl std::fmt::Display) -> ProviderError {
    ProviderError::Veto(error.to_string())
}

/// One LUN of a set.
struct Source {
    snapshot: u128,
    info: LunInfo,
    lun: LunId,
}

enum Phase {
    Gathering,
    /// One connection, token and answer for each target of the set.
    Ready(Vec<Party>),
    Taken(Vec<Party>),
}

struct Party {
    target: Fingerprint,
    /// Open until the cut is made.
    wire: Option<Box<dyn Wire>>,
    ready: ProvReady,
}

impl Party {
    fn wire(&mut self) -> Result<&mut dyn Wire, ProviderError> {
        match &mut self.wire {
            Some(wire) => Ok(wire.as_mut()),
            None => Err(ProviderError::State("the connection is closed")),
        }
    }
}

struct Set {
    sources: Vec<Source>,
    phase: Phase,
    since: Instant,
}

impl Set {
    fn parties(&self) -> &[Party] {
        match &self.phase {
            Phase::Gathering => &[],
            Phase::Ready(parties) | Phase::Taken(parties) => parties,
        }
    }
}

/// A set of our own requester.
struct Own {
    hold: Weak<Hold>,
    /// Snapshot and LUN, for `GetTargetLuns`.
    sources: Vec<(u128, LunInfo)>,
}

/// The provider. Its calls come on VSS's threads, also of two sets at once.
pub(crate) struct Provider {
    targets: Arc<dyn Targets>,
    own: Mutex<HashMap<u128, Own>>,
    /// Each set has a lock of its own: one that waits for its target does not hold up another.
    sets: Mutex<HashMap<u128, Arc<Mutex<Set>>>>,
    ledger: Ledger,
}

impl OwnSets for Provider {
    fn add(&self, set: u128, hold: &Arc<Hold>) {
        let own = Own {
            hold: Arc::downgrade(hold),
            sources: Vec::new(),
        };
        lock(&self.own).insert(set, own);
    }

    fn remove(&self, set: u128) {
        lock(&self.own).remove(&set);
    }
}

impl Provider {
    /// A provider for these targets; `ledger` remembers what they made for us.
    pub(crate) fn new(targets: Arc<dyn Targets>, ledger: Ledger) -> Self {
        Self {
            targets,
            own: Mutex::default(),
            sets: Mutex::default(),
            ledger,
        }
    }

    /// `AreLunsSupported`, `FillInLunInfo`: all LUNs of the volume are LUNs that a target lets this agent use.
    pub(crate) fn supports(&self, luns: &[LunInfo]) -> bool {
        let known = |info: &LunInfo| {
            let lun = info.lun()?;
            // A shadow copy is ours, too, while it is exposed: VSS asks for it at import.
            let granted = self.targets.of(lun).is_some() || self.ledger.find(lun).is_some();
            granted.then_some(())
        };
        !luns.is_empty() && luns.iter().all(|info| known(info).is_some())
    }

    /// `BeginPrepareSnapshot`, once for each volume; the same LUN may come twice.
    pub(crate) fn begin_prepare(
        &self,
        set: u128,
        snapshot: u128,
        luns: &[LunInfo],
    ) -> Result<(), ProviderError> {
        if let Some(own) = lock(&self.own).get_mut(&set) {
            own.sources
                .extend(luns.iter().map(|info| (snapshot, info.clone())));
            return Ok(());
        }
        if !self.supports(luns) {
            return Err(veto(
                "a LUN of the volume is not one that a Stillpoint target lets this agent use",
            ));
        }
        let stale = self.take_stale();
        for (id, old) in stale {
            self.undo(id, &old);
        }
        let found = {
            let mut sets = lock(&self.sets);
            // A set that is locked is being worked on.
            let is_made = |set: &Arc<Mutex<Set>>| {
                set.try_lock()
                    .is_ok_and(|set| matches!(set.phase, Phase::Taken(_)))
            };
            let in_creation = sets.values().filter(|set| !is_made(set)).count();
            if !sets.contains_key(&set) && in_creation >= SETS_MAX {
                return Err(veto(format!(
                    "{in_creation} shadow copy sets are being made already"
                )));
            }
            let fresh = || {
                Arc::new(Mutex::new(Set {
                    sources: Vec::new(),
                    phase: Phase::Gathering,
                    since: Instant::now(),
                }))
            };
            Arc::clone(sets.entry(set).or_insert_with(fresh))
        };
        let mut found = lock(&found);
        if !matches!(found.phase, Phase::Gathering) {
            return Err(ProviderError::State("the set is prepared already"));
        }
        for info in luns {
            let lun = info.lun().ok_or_else(|| veto("a LUN without an NAA name"))?;
            if found.sources.len() >= LUNS_MAX {
                return Err(veto(format!("a set has {LUNS_MAX} LUNs at most")));
            }
            if found
                .sources
                .iter()
                .any(|source| source.snapshot == snapshot && source.lun == lun)
            {
                continue;
            }
            let info = info.clone();
            found.sources.push(Source { snapshot, info, lun });
        }
        Ok(())
    }

    /// `EndPrepareSnapshots`: all slow work. Dials, and reserves the identities.
    pub(crate) fn end_prepare(&self, set: u128) -> Result<(), ProviderError> {
        let Some(found) = self.foreign(set)? else {
            return Ok(());
        };
        let mut found = lock(&found);
        if !matches!(found.phase, Phase::Gathering) {
            return Err(ProviderError::State("the set is prepared already"));
        }
        let initiator = self.targets.initiator();
        let initiator = initiator.ok_or_else(|| veto("this host has no iSCSI initiator name"))?;
        let mut asks: Vec<(Fingerprint, Vec<ShadowAsk>)> = Vec::new();
        for source in &found.sources {
            let target = self
                .targets
                .of(source.lun)
                .ok_or_else(|| veto(format!("{} is granted no more", source.lun)))?;
            let shadow = shadow_of(&found.sources, source);
            let ask = ShadowAsk {
                shadow,
                lun: source.lun,
            };
            match asks.iter_mut().find(|(of, _)| *of == target) {
                // Two volumes on one LUN are one shadow copy.
                Some((_, asks)) if asks.iter().any(|other| other.lun == source.lun) => {}
                Some((_, asks)) => asks.push(ask),
                None => asks.push((target, vec![ask])),
            }
        }
        let mut parties = Vec::new();
        for (target, shadows) in asks {
            let begun = self.begin_at(target, set, shadows, &initiator);
            match begun {
                Ok(party) => parties.push(party),
                Err(error) => {
                    abort_all(set, &mut parties);
                    return Err(veto(error));
                }
            }
        }
        found.phase = Phase::Ready(parties);
        Ok(())
    }

    fn begin_at(
        &self,
        target: Fingerprint,
        set: u128,
        shadows: Vec<ShadowAsk>,
        initiator: &str,
    ) -> Result<Party, String> {
        let mut wire = self.targets.connect(target)?;
        let expected: Vec<ShadowAsk> = shadows.clone();
        let ask = ProvBegin {
            set: SetId(set.to_be_bytes()),
            shadows,
            initiator: initiator.to_owned(),
            // Auto-recovery writes into it.
            writable: true,
        };
        let ready = wire.begin(ask).map_err(|error| error.to_string())?;
        let promised = |ask: &ShadowAsk| {
            ready
                .shadows
                .iter()
                .any(|one| one.shadow == ask.shadow && one.source == ask.lun)
        };
        if !expected.iter().all(promised) {
            return Err("the target reserved other shadow copies than asked for".to_owned());
        }
        let wire = Some(wire);
        Ok(Party { target, wire, ready })
    }

    /// `PreCommitSnapshots`: is the connection good? Of our own set: the hold begins.
    pub(crate) fn pre_commit(&self, set: u128) -> Result<(), ProviderError> {
        if let Some(hold) = self.own(set) {
            return hold?.pre_commit().map_err(|_| veto("the snapshot was given up"));
        }
        let found = self.foreign(set)?.ok_or(ProviderError::State("no set"))?;
        let mut found = lock(&found);
        let Phase::Ready(parties) = &mut found.phase else {
            return Err(ProviderError::State("the set is not prepared"));
        };
        for party in parties {
            party.wire()?.query(Vec::new()).map_err(veto)?;
        }
        Ok(())
    }

    /// `CommitSnapshots`: one request, one answer, no file, no log.
    pub(crate) fn commit(&self, set: u128) -> Result<(), ProviderError> {
        if let Some(hold) = self.own(set) {
            return hold?.commit().map_err(|_| veto("the hold ended before the cut"));
        }
        let found = self.foreign(set)?.ok_or(ProviderError::State("no set"))?;
        let mut found = lock(&found);
        let Phase::Ready(parties) = &mut found.phase else {
            return Err(ProviderError::State("the set is not prepared"));
        };
        for party in parties.iter_mut() {
            let token = party.ready.token;
            let ask = ProvCommit {
                set: SetId(set.to_be_bytes()),
                token,
            };
            party.wire()?.commit(ask).map_err(veto)?;
        }
        let parties = std::mem::take(parties);
        found.phase = Phase::Taken(parties);
        Ok(())
    }

    /// `PostCommitSnapshots`: writes are flowing again, so what was made can be written down.
    pub(crate) fn post_commit(&self, set: u128) -> Result<(), ProviderError> {
        let Some(found) = self.foreign(set)? else {
            return Ok(());
        };
        let mut found = lock(&found);
        let Phase::Taken(parties) = &mut found.phase else {
            return Err(ProviderError::State("the set is not committed"));
        };
        for party in parties {
            party.wire = None;
            let entry = |shadow: &Shadow| Entry {
                target: party.target,
                set: SetId(set.to_be_bytes()),
                shadow: shadow.shadow,
                source: shadow.source,
                lun: shadow.identity.lun,
            };
            let entries = party.ready.shadows.iter().map(entry);
            self.ledger
                .add(entries)
                .map_err(|error| veto(format!("the shadow copies cannot be remembered: {error}")))?;
        }
        Ok(())
    }

    /// `GetTargetLuns`: what the shadow copies of these LUNs will say about themselves. The call names no set: the newest one
    /// that was committed and has them all is meant.
    pub(crate) fn target_luns(&self, sources: &[LunInfo]) -> Result<Vec<LunInfo>, ProviderError> {
        if let Some(own) = self.own_targets(sources) {
            return Ok(own);
        }
        let sets: Vec<Arc<Mutex<Set>>> = lock(&self.sets).values().cloned().collect();
        let mut newest: Option<(Instant, Vec<LunInfo>)> = None;
        for set in sets {
            let set = lock(&set);
            if !matches!(set.phase, Phase::Taken(_))
                || newest.as_ref().is_some_and(|(since, _)| *since > set.since)
            {
                continue;
            }
            if let Some(luns) = sources
                .iter()
                .map(|info| destination(&set, info))
                .collect::<Option<Vec<_>>>()
            {
                newest = Some((set.since, luns));
            }
        }
        newest
            .map(|(_, luns)| luns)
            .ok_or_else(|| ProviderError::NotFound("a shadow copy of these LUNs".to_owned()))
    }

    fn own_targets(&self, sources: &[LunInfo]) -> Option<Vec<LunInfo>> {
        let own = lock(&self.own);
        own.values()
            .filter(|own| own.hold.upgrade().is_some_and(|hold| hold.was_kept()))
            .find_map(|own| {
                let placeholder = |info: &LunInfo| {
                    let (snapshot, _) = own.sources.iter().find(|(_, source)| source.is_same_lun(info))?;
                    Some(info.placeholder(snapshot.to_be_bytes()))
                };
                sources.iter().map(placeholder).collect()
            })
    }

    /// `LocateLuns`: these shadow copies shall be visible; VSS rescans right afterwards.
    pub(crate) fn locate(&self, luns: &[LunInfo]) -> Result<(), ProviderError> {
        let initiator = self.targets.initiator();
        let initiator = initiator.ok_or_else(|| veto("this host has no iSCSI initiator name"))?;
        for info in luns {
            let entry = self.entry(info)?;
            let mut wire = self.targets.connect(entry.target).map_err(veto)?;
            let ask = ProvExpose {
                set: entry.set,
                shadow: entry.shadow,
                initiator: initiator.clone(),
                visibility: Visibility::Exposed,
            };
            let seen = wire.expose(ask).map_err(veto)?;
            if seen.lun != entry.lun {
                return Err(veto(format!(
                    "the target shows {} instead of {}",
                    seen.lun, entry.lun
                )));
            }
        }
        Ok(())
    }

    /// `OnLunEmpty`: VSS has removed the last volume of it.
    pub(crate) fn lun_empty(&self, info: &LunInfo) -> Result<(), ProviderError> {
        let entry = self.entry(info)?;
        let mut wire = self.targets.connect(entry.target).map_err(veto)?;
        let ask = ProvDelete {
            set: entry.set,
            shadow: Some(entry.shadow),
            why: DeleteReason::Delete,
        };
        wire.delete(ask).map_err(veto)?;
        self.ledger.remove(entry.lun).map_err(veto)
    }

    /// `PreFinalCommitSnapshots`, `PostFinalCommitSnapshots`: auto-recovery writes into the exposed copies; nothing is to be done.
    pub(crate) fn final_commit(&self, set: u128) -> Result<(), ProviderError> {
        self.foreign(set).map(drop)
    }

    /// `AbortSnapshots`: whatever there is of the set goes. Idempotent, also for a set that is not known.
    pub(crate) fn abort(&self, set: u128) -> Result<(), ProviderError> {
        if let Some(hold) = self.own(set) {
            if let Ok(hold) = hold {
                hold.thaw(false);
            }
            return Ok(());
        }
        let found = lock(&self.sets).remove(&set);
        if let Some(found) = found {
            self.undo(set, &found);
        }
        Ok(())
    }

    fn undo(&self, set: u128, found: &Mutex<Set>) {
        let mut found = lock(found);
        let gone: Vec<LunId> = found
            .parties()
            .iter()
            .flat_map(|party| &party.ready.shadows)
            .map(|one| one.identity.lun)
            .collect();
        match &mut found.phase {
            Phase::Gathering => {}
            Phase::Ready(parties) | Phase::Taken(parties) => {
                for mut party in std::mem::take(parties) {
                    // The connection may be what failed: dial again.
                    let aborted = party
                        .wire
                        .as_deref_mut()
                        .is_some_and(|wire| abort_at(set, wire).is_ok());
                    if !aborted {
                        let again = self.targets.connect(party.target);
                        let aborted = again.and_then(|mut wire| {
                            abort_at(set, wire.as_mut()).map_err(|error| error.to_string())
                        });
                        if let Err(error) = aborted {
                            tracing::warn!(
                                error,
                                "a shadow copy set is left at the target; its reaper removes it"
                            );
                        }
                    }
                }
            }
        }
        found.phase = Phase::Gathering;
        for lun in gone {
            self.ledger.remove(lun).ok();
        }
    }

    fn take_stale(&self) -> Vec<(u128, Arc<Mutex<Set>>)> {
        let mut sets = lock(&self.sets);
        // A set whose lock is taken is being worked on.
        let is_stale = |set: &Arc<Mutex<Set>>| set.try_lock().is_ok_and(|set| set.since.elapsed() > STALE);
        let ids: Vec<u128> = sets
            .iter()
            .filter(|(_, set)| is_stale(set))
            .map(|(id, _)| *id)
            .collect();
        let mut stale = Vec::new();
        for id in ids {
            if let Some(set) = sets.remove(&id) {
                // One that was taken lives on at the target, and in the ledger.
                if !matches!(lock(&set).phase, Phase::Taken(_)) {
                    stale.push((id, set));
                }
            }
        }
        stale
    }

    fn entry(&self, info: &LunInfo) -> Result<Entry, ProviderError> {
        let entry = info.lun().and_then(|lun| self.ledger.find(lun));
        entry.ok_or_else(|| {
            ProviderError::NotFound(format!("a shadow copy with the serial {:?}", info.serial))
        })
    }

    /// The hold of a set that is our requester's.
    fn own(&self, set: u128) -> Option<Result<Arc<Hold>, ProviderError>> {
        let hold = lock(&self.own).get(&set)?.hold.upgrade();
        Some(hold.ok_or(ProviderError::State("the backup is over")))
    }

    /// `None`: it is our requester's.
    fn foreign(&self, set: u128) -> Result<Option<Arc<Mutex<Set>>>, ProviderError> {
        if lock(&self.own).contains_key(&set) {
            return Ok(None);
        }
        let found = lock(&self.sets).get(&set).cloned();
        found
            .map(Some)
            .ok_or_else(|| ProviderError::NotFound("that shadow copy set".to_owned()))
    }
}

/// The number by which the target knows a shadow copy: that of the snapshot; a volume over several LUNs has one snapshot and as
/// many shadow copies, so the later ones get numbers of their own.
fn shadow_of(sources: &[Source], source: &Source) -> ShadowId {
    let of_snapshot = sources.iter().filter(|other| other.snapshot == source.snapshot);
    let index = of_snapshot.take_while(|other| other.lun != source.lun).count();
    ShadowId((source.snapshot ^ u128::try_from(index).unwrap_or(0)).to_be_bytes())
}

fn destination(set: &Set, info: &LunInfo) -> Option<LunInfo> {
    let source = set.sources.iter().find(|source| source.info.is_same_lun(info))?;
    let mut shadows = set.parties().iter().flat_map(|party| &party.ready.shadows);
    let shadow = shadows.find(|shadow| shadow.source == source.lun)?;
    let serial = shadow.identity.serial.as_deref().unwrap_or_default();
    Some(info.shadow(shadow.identity.lun, serial))
}

fn abort_at(set: u128, wire: &mut dyn Wire) -> Result<(), CallError> {
    wire.delete(ProvDelete {
        set: SetId(set.to_be_bytes()),
        shadow: None,
        why: DeleteReason::Abort,
    })
}

fn abort_all(set: u128, parties: &mut [Party]) {
    for party in parties {
        let Some(wire) = party.wire.as_deref_mut() else {
            continue;
        };
        if let Err(error) = abort_at(set, wire) {
            tracing::warn!(%error, "a reservation is left at the target; it expires there");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "provider_tests.rs"]
mod tests;
