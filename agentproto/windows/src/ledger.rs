//! The shadow copies that targets made for backup programs of this host: `LocateLuns` and `OnLunEmpty` name a LUN and nothing
//! else, and may come after a restart of the service.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use stillpoint_agentproto::{Fingerprint, LunId, SetId, ShadowId};

/// More than every target's quota allows; the oldest go first.
const ENTRIES_MAX: usize = 4096;

/// One shadow copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Where it is.
    pub(crate) target: Fingerprint,
    /// Its set.
    pub(crate) set: SetId,
    /// Its number in the set.
    pub(crate) shadow: ShadowId,
    /// The LUN it is a copy of.
    pub(crate) source: LunId,
    /// Its own name.
    pub(crate) lun: LunId,
}

/// All of them, in `shadows.json`.
pub(crate) struct Ledger {
    path: PathBuf,
    entries: Mutex<BTreeMap<LunId, Entry>>,
}

impl Ledger {
    /// Reads the file of a state directory. One that cannot be read is an empty one: the target's reaper removes what is forgotten.
    pub(crate) fn open(state_dir: &Path) -> Self {
        let path = state_dir.join("shadows.json");
        let read: Vec<Entry> = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::error!(path = %path.display(), %error, "the list of shadow copies is not readable: a new one begins");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        let entries = read
            .into_iter()
            .take(ENTRIES_MAX)
            .map(|entry| (entry.lun, entry))
            .collect();
        Self {
            path,
            entries: Mutex::new(entries),
        }
    }

    /// Remembers these.
    pub(crate) fn add(&self, new: impl Iterator<Item = Entry>) -> std::io::Result<()> {
        let mut entries = self.lock();
        entries.extend(new.map(|entry| (entry.lun, entry)));
        while entries.len() > ENTRIES_MAX {
            entries.pop_first();
        }
        self.write(&entries)
    }

    /// Forgets one.
    pub(crate) fn remove(&self, lun: LunId) -> std::io::Result<()> {
        let mut entries = self.lock();
        if entries.remove(&lun).is_none() {
            return Ok(());
        }
        self.write(&entries)
    }

    /// The one with that name.
    pub(crate) fn find(&self, lun: LunId) -> Option<Entry> {
        self.lock().get(&lun).cloned()
    }

    fn write(&self, entries: &BTreeMap<LunId, Entry>) -> std::io::Result<()> {
        let all: Vec<&Entry> = entries.values().collect();
        let text = serde_json::to_vec(&all)?;
        crate::state::replace(&self.path, &text)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LunId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(byte: u8) -> Entry {
        Entry {
            target: Fingerprint([1; 32]),
            set: SetId([2; 16]),
            shadow: ShadowId([3; 16]),
            source: LunId([4; 16]),
            lun: LunId([byte; 16]),
        }
    }

    #[test]
    fn it_outlives_a_restart() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let ledger = Ledger::open(dir.path());
        ledger.add([entry(7), entry(8)].into_iter()).expect("written");
        ledger.remove(entry(7).lun).expect("written");
        ledger.remove(entry(7).lun).expect("twice is no error");
        let again = Ledger::open(dir.path());
        assert_eq!(again.find(entry(8).lun), Some(entry(8)));
        assert_eq!(again.find(entry(7).lun), None);
        std::fs::write(dir.path().join("shadows.json"), "[{").expect("written");
        assert_eq!(Ledger::open(dir.path()).find(entry(8).lun), None);
    }
}
