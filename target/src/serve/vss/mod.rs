//! The VSS hardware provider's end on the target (agent-protocol.md §9): snapshot sets that an agent reserves, cuts, exposes and
//! deletes, each shadow copy a transient LUN `vss-…` on its source's own target.
//!
//! ```text
//! begin ─▶ Begun ─ commit ─▶ Taken ─ expose ⇄ mask ─▶ ─ delete ─▶ gone         abort: gone, from any state
//!            │ 10 min             └ 24 h without session and I/O ─▶ gone + event
//! ```
//! Order of what is durable: the record (Begun), then the cut, then the record (Taken), then the answer. So a Begun record at start
//! means that nobody was told: its snapshots go. A copy's volume is made when it is first exposed, and goes before its snapshot; the
//! record goes last.

mod copies;
mod reap;
mod record;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stillpoint_agentproto::message::{
    LunSupport, ProvBegin, ProvCommit, ProvDelete, ProvExpose, ProvExposed, ProvGone, ProvQuery, ProvReady,
    ProvSupport, ProvTaken, Reply, Request, TakenShadow, Visibility,
};
use stillpoint_agentproto::provider::{self, Provider};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal, SetId};
use stillpoint_snapshot::SnapshotSpec;

use super::Daemon;
use super::events::code;
pub(crate) use copies::{delete_by_operator, restore, serve_all};
pub(crate) use reap::watch;
pub(crate) use record::CopyView;
use record::{Copy, Quota, SetRecord, SetState};

/// A set waits this long for its commit: VSS gives writers 60 s to freeze, after preparations that may be slow.
const BEGUN_MAX_MS: u32 = 10 * 60 * 1000;
/// Sets of one agent at a time (agent-protocol.md §12).
const MAX_SETS: usize = 4;
/// Shadow copies of one set: as many volumes as VSS takes.
const MAX_SHADOWS: usize = 64;
/// Shadow copies of one LUN at a time, of all agents together.
const MAX_COPIES_OF_LUN: usize = 8;

/// Who asks: what the registration knows of the agent.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    pub(crate) agent: AgentId,
    pub(crate) host: String,
    /// Its allow-list.
    pub(crate) luns: Vec<LunId>,
    /// The initiator names that it registered; none when it is not connected.
    pub(crate) initiators: Option<Vec<String>>,
    /// Whether the feature is switched on.
    pub(crate) provides: bool,
}

type Shared = Arc<Mutex<SetRecord>>;

#[derive(Debug)]
struct Entry {
    quota: Quota,
    record: Shared,
}

/// All sets. A set's own lock is held while it is worked on, so that a repeat waits for the first; the table's only for a look. Whoever
/// has the table's lock never waits for a set's.
#[derive(Debug, Default)]
pub(crate) struct Sets(Mutex<BTreeMap<SetId, Entry>>);

impl Sets {
    fn table(&self) -> MutexGuard<'_, BTreeMap<SetId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, set: SetId) -> Option<Shared> {
        self.table().get(&set).map(|entry| Arc::clone(&entry.record))
    }

    fn all(&self) -> Vec<Shared> {
        self.table()
            .values()
            .map(|entry| Arc::clone(&entry.record))
            .collect()
    }

    /// Enters a set that was read back; its quota was granted when it was begun.
    fn enter(&self, record: SetRecord) {
        let (set, quota) = (record.set, Quota::of(&record));
        let record = Arc::new(Mutex::new(record));
        self.table().insert(set, Entry { quota, record });
    }

    /// The set has fewer copies now, or is gone.
    fn shrunk(&self, record: &SetRecord) {
        let mut table = self.table();
        if record.state == SetState::Gone {
            table.remove(&record.set);
        } else if let Some(entry) = table.get_mut(&record.set) {
            entry.quota = Quota::of(record);
        }
    }

    /// What operators see of the copies, by the name of their LUN.
    pub(crate) fn views(&self, now_ms: i64) -> BTreeMap<String, CopyView> {
        let mut views = BTreeMap::new();
        for set in self.all() {
            // The table's lock is not held here: a set that is worked on does not hold up the others.
            for view in lock(&set).views(now_ms) {
                views.insert(view.name.clone(), view);
            }
        }
        views
    }

    /// Names of the LUNs of all copies.
    pub(crate) fn names(&self) -> Vec<String> {
        let names = |set: &Shared| {
            lock(set)
                .copies
                .iter()
                .map(|copy| copy.name.clone())
                .collect::<Vec<_>>()
        };
        self.all().iter().flat_map(names).collect()
    }

    /// The names of the snapshots that a set stands on, `LUN@NAME`, with the agent's host.
    pub(crate) fn holder(&self, lun: &str, snapshot: &str) -> Option<String> {
        let holds = |set: &SetRecord| {
            set.snapshot == snapshot && set.copies.iter().any(|copy| copy.source_name == lun)
        };
        self.all().iter().find_map(|set| {
            let set = lock(set);
            holds(&set).then(|| set.host.clone())
        })
    }
}

fn lock(set: &Shared) -> MutexGuard<'_, SetRecord> {
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Carries out a request of the provider. Blocks.
///
/// # Errors
/// What the rules or the store refuse.
pub(crate) fn serve(daemon: &Arc<Daemon>, asker: &Asker, request: Request) -> Result<Reply, Refusal> {
    let asker = Asking { daemon, asker };
    provider::serve(&asker, asker.asker.agent, request)
}

/// The provider, for one request of one agent.
struct Asking<'a> {
    daemon: &'a Arc<Daemon>,
    asker: &'a Asker,
}

impl Provider for Asking<'_> {
    fn query(&self, _: AgentId, ask: ProvQuery) -> Result<ProvSupport, Refusal> {
        let answer = |identity: &stillpoint_agentproto::message::LunIdentity| {
            let judged = rules::source(self.daemon, self.asker, identity.lun)
                .and_then(|source| source.agrees_with(identity));
            LunSupport {
                lun: identity.lun,
                supported: judged.is_ok(),
                code: judged.as_ref().err().map(|refusal| refusal.code),
                text: judged.err().map(|refusal| refusal.text),
            }
        };
        Ok(ProvSupport {
            luns: ask.luns.iter().map(answer).collect(),
        })
    }

    fn begin(&self, _: AgentId, ask: ProvBegin) -> Result<ProvReady, Refusal> {
        rules::initiator(self.asker, &ask.initiator)?;
        if let Some(set) = self.daemon.vss.get(ask.set) {
            let set = self.own(&set)?;
            return if set.is_repeat(&ask) {
                Ok(set.ready())
            } else {
                let text = format!("set {} was begun with other content", ask.set);
                Err(Refusal::new(ErrorCode::Conflict, text))
            };
        }
        let record = rules::begin(self.daemon, self.asker, &ask)?;
        let set = Arc::new(Mutex::new(record));
        let mut record = lock(&set);
        self.reserve(&set, &record)?;
        if let Err(error) = record.store(&self.daemon.state) {
            record.state = SetState::Gone;
            self.daemon.vss.shrunk(&record);
            return Err(internal(&error));
        }
        Ok(record.ready())
    }

    fn commit(&self, _: AgentId, ask: ProvCommit) -> Result<ProvTaken, Refusal> {
        let set = self.find(ask.set)?;
        let mut set = self.own(&set)?;
        if set.token != ask.token {
            let text = format!("that is not the token of set {}", ask.set);
            return Err(Refusal::new(ErrorCode::NotAllowed, text));
        }
        if set.state == SetState::Begun {
            self.cut(&mut set)?;
        }
        let shadows = set.copies.iter().flat_map(|copy| {
            copy.shadows.iter().map(|shadow| TakenShadow {
                shadow: *shadow,
                name: copy.name.clone(),
            })
        });
        Ok(ProvTaken {
            cut_unix_ms: set.cut_ms.and_then(|ms| u64::try_from(ms).ok()),
            shadows: shadows.collect(),
        })
    }

    fn expose(&self, _: AgentId, ask: ProvExpose) -> Result<ProvExposed, Refusal> {
        let set = self.find(ask.set)?;
        let mut set = self.own(&set)?;
        if set.state != SetState::Taken {
            let text = format!("set {} has not been committed", ask.set);
            return Err(Refusal::new(ErrorCode::WrongState, text));
        }
        match ask.visibility {
            Visibility::Exposed => {
                rules::initiator(self.asker, &ask.initiator)?;
                copies::expose(self.daemon, &mut set, ask.shadow, &ask.initiator)?;
            }
            Visibility::Masked => copies::mask(self.daemon, &mut set, ask.shadow)?,
        }
        let copy = set.copy_of(ask.shadow)?;
        Ok(ProvExposed {
            visibility: ask.visibility,
            identity: copy.identity(),
        })
    }

    fn delete(&self, _: AgentId, ask: ProvDelete) -> Result<ProvGone, Refusal> {
        let Some(set) = self.daemon.vss.get(ask.set) else {
            return Ok(ProvGone { removed: 0 });
        };
        let mut set = self.own(&set)?;
        let why = format!("deleted by the agent on {}", self.asker.host);
        let removed = copies::delete(self.daemon, &mut set, ask.shadow, &why)?;
        Ok(ProvGone { removed })
    }
}

impl Asking<'_> {
    fn find(&self, set: SetId) -> Result<Shared, Refusal> {
        self.daemon.vss.get(set).ok_or_else(|| {
            let text = format!(
                "set {set} is not known here: it was deleted, its time was over, or the target was restarted before its commit"
            );
            Refusal::new(ErrorCode::UnknownSession, text)
        })
    }

    /// A set is its agent's own; another one does not even learn that it exists.
    fn own<'s>(&self, set: &'s Shared) -> Result<MutexGuard<'s, SetRecord>, Refusal> {
        let set = lock(set);
        if set.agent == self.asker.agent && set.state != SetState::Gone {
            return Ok(set);
        }
        let text = format!("set {} is not known here", set.set);
        Err(Refusal::new(ErrorCode::UnknownSession, text))
    }

    /// Enters a set in the table, if the quotas allow it. They are counted under the table's lock: of two at once, one loses.
    fn reserve(&self, set: &Shared, record: &SetRecord) -> Result<(), Refusal> {
        let mut table = self.daemon.vss.table();
        let quota = Quota::of(record);
        rules::quota(&quota, record, table.values().map(|other| &other.quota))?;
        if table.contains_key(&record.set) {
            let text = format!("set {} is being begun", record.set);
            return Err(Refusal::new(ErrorCode::Busy, text).retry_after(1000));
        }
        let entry = Entry {
            quota,
            record: Arc::clone(set),
        };
        table.insert(record.set, entry);
        Ok(())
    }

    /// Cuts every source of the set at one instant, durably.
    fn cut(&self, set: &mut SetRecord) -> Result<(), Refusal> {
        let volumes: Vec<_> = set.copies.iter().map(Copy::volume).collect();
        let spec = SnapshotSpec {
            name: set.snapshot.clone(),
            meta: set.snapshot_meta(),
            ..SnapshotSpec::default()
        };
        let failed = |error: stillpoint_snapshot::Error| {
            Refusal::new(ErrorCode::Internal, format!("the set was not cut: {error}"))
        };
        let cut = self.daemon.pool.begin_cut(&volumes, &spec).map_err(failed)?;
        let made = cut.commit().map_err(failed)?;
        let cut_ms = made.first().map_or_else(now_ms, |snapshot| snapshot.created_ms);
        let before = set.clone();
        set.taken(cut_ms, &made);
        if let Err(error) = set.store(&self.daemon.state) {
            // Nobody is told of it: the snapshots go with the set, at the latest at the next start.
            *set = before;
            return Err(internal(&error));
        }
        let text = format!(
            "taken for VSS on {} as {}: {}",
            set.host,
            set.snapshot,
            set.sources().join(", ")
        );
        self.daemon
            .events
            .emit(code::VSS_TAKEN, format!("vss set {}", set.set), text, &set.who());
        Ok(())
    }
}

fn internal(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(ErrorCode::Internal, error.to_string())
}
