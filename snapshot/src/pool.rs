//! The pool: volumes by name, the owner's small values, statistics, and the threads that work in the background.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use crate::disk::Disk;
use crate::inner::{Directory, Inner};
use crate::keeper::{keep, work};
use crate::lock::{Mode, lock};
use crate::meta::MetaStore;
use crate::meta_client::Meta;
use crate::open;
use crate::record::{BranchRecord, JobKind};
use crate::scrub::scrub;
use crate::seal::seal;
use crate::state::{Branch, Holds, State};
use crate::types::{
    BranchId, Checksums, Epoch, PoolOptions, PoolStats, SnapshotId, SnapshotState, StoreEvent, VolumeId,
    VolumeInfo, VolumeSpec, limits,
};
use crate::volume::{Shared, Volume, check_attributes, check_size, volume_info};
use crate::{Error, Result};

/// A pool of volumes in one data file. Handles are cheap to clone; all calls may come from many threads.
#[derive(Clone)]
pub struct Pool {
    pub(crate) inner: Arc<Inner>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("grain_bytes", &self.inner.grain_bytes)
            .finish_non_exhaustive()
    }
}

/// Volumes that are added under one hold of the state.
const VOLUMES_PER_HOLD: usize = 256;

impl Pool {
    /// Whether `dir` holds a pool.
    #[must_use]
    pub fn exists(dir: &Path) -> bool {
        open::exists(dir)
    }

    /// Makes a pool in `dir`, durable on return. A creation that was cut off is begun again.
    ///
    /// # Errors
    /// `Exists`, `Refused` (grain, or in use by another process), `Io`, `NoSpace`.
    pub fn create(dir: &Path, options: &PoolOptions) -> Result<Self> {
        Self::start(open::create(dir, options)?)
    }

    /// Opens the pool in `dir`.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `LostCommits`, `Version`, `Refused` (in use by another process), `Io`, `NoSpace`.
    pub fn open(dir: &Path, options: &PoolOptions) -> Result<Self> {
        Self::start(open::open(dir, options)?)
    }

    /// Makes a pool on any medium and an empty metadata store, without directory, lock and ballast.
    ///
    /// # Errors
    /// As [`Pool::create`].
    pub fn create_with(disk: Arc<dyn Disk>, meta: Box<dyn MetaStore>, options: &PoolOptions) -> Result<Self> {
        Self::start(open::create_on(
            disk,
            client(meta, options)?,
            options,
            Directory::default(),
        )?)
    }

    /// Opens a pool on any medium.
    ///
    /// # Errors
    /// As [`Pool::open`].
    pub fn open_with(disk: Arc<dyn Disk>, meta: Box<dyn MetaStore>, options: &PoolOptions) -> Result<Self> {
        Self::start(open::open_on(
            disk,
            client(meta, options)?,
            options,
            Directory::default(),
        )?)
    }

    fn start(inner: Inner) -> Result<Self> {
        let inner = Arc::new(inner);
        if !inner.options.manual {
            spawn(&inner, "stillpoint-keeper", keep)?;
            spawn(&inner, "stillpoint-jobs", work)?;
            spawn(&inner, "stillpoint-sealer", seal)?;
            spawn(&inner, "stillpoint-scrub", scrub)?;
        }
        Ok(Self { inner })
    }

    /// Makes a volume. Durable on return.
    ///
    /// # Errors
    /// `Exists`, `Refused` (name, size, block size), `Limit`, `Poisoned`.
    pub fn create_volume(&self, spec: &VolumeSpec) -> Result<Volume> {
        let made = self.create_volumes(std::slice::from_ref(spec))?;
        made.into_iter()
            .next()
            .ok_or_else(|| Error::refused("no volume was asked for"))
    }

    /// Makes several volumes, durable on return: one commit, where one for each would take a thousand times as long.
    ///
    /// # Errors
    /// As [`Pool::create_volume`], of the first that cannot be made; those before it are made, those behind it are not.
    pub fn create_volumes(&self, specs: &[VolumeSpec]) -> Result<Vec<Volume>> {
        for spec in specs {
            check_name(&spec.name)?;
            check_attributes(&spec.attributes)?;
            if ![512, 4096].contains(&spec.block_size) {
                return Err(Error::refused(format!(
                    "a block size of {}: 512 or 4096",
                    spec.block_size
                )));
            }
            check_size(spec.size_bytes, spec.block_size)?;
        }
        let created_ms = self.inner.now_ms();
        let mut made = Vec::with_capacity(specs.len());
        for some in specs.chunks(VOLUMES_PER_HOLD) {
            let (added, txg) = {
                let mut state = self.inner.state();
                let added: Result<Vec<_>> = some
                    .iter()
                    .map(|spec| add(&mut state, spec, created_ms))
                    .collect();
                (added, state.open.id)
            };
            // Also what came before one that was refused.
            self.inner.commit_through(txg)?;
            made.extend(added?.into_iter().map(|volume| self.handle(volume)));
        }
        Ok(made)
    }

    /// The volume of that name.
    #[must_use]
    pub fn volume(&self, name: &str) -> Option<Volume> {
        let state = self.inner.state();
        let shared = state.volumes.get(state.names.get(name)?)?.clone();
        Some(self.handle(shared))
    }

    /// The volume of that number.
    #[must_use]
    pub fn volume_by_id(&self, id: VolumeId) -> Option<Volume> {
        let shared = self.inner.state().volumes.get(&id)?.clone();
        Some(self.handle(shared))
    }

    /// All volumes, in the order of their numbers.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let state = self.inner.state();
        let info = |s: &Arc<Shared>| {
            Some(volume_info(
                s.id,
                &state.branches.get(&s.head())?.record,
                self.inner.grain_bytes,
            ))
        };
        state.volumes.values().filter_map(info).collect()
    }

    pub(crate) fn handle(&self, shared: Arc<Shared>) -> Volume {
        Volume {
            pool: self.inner.clone(),
            shared,
        }
    }

    /// Gives a volume another name; its snapshots go along. Durable on return.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Refused` (name), `Poisoned`.
    pub fn rename_volume(&self, old: &str, new: &str) -> Result<()> {
        check_name(new)?;
        let txg = {
            let mut state = self.inner.state();
            let id = state.volume_named(old)?;
            if old == new {
                return Ok(());
            }
            if state.names.contains_key(new) {
                return Err(Error::Exists {
                    what: format!("a volume {new:?}"),
                });
            }
            let branches: Vec<BranchId> = state.branches_of(id).collect();
            for branch in branches {
                state.branch_mut(branch)?.name = new.to_owned();
            }
            state.names.remove(old);
            state.names.insert(new.to_owned(), id);
            state.open.id
        };
        self.inner.commit_through(txg)
    }

    /// Deletes a volume; its grains are freed in the background. With `with_snapshots` its snapshots go too (those
    /// that clones stand on stay, hidden). Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Refused` when it has snapshots and they were not meant, or one of them is held or locked;
    /// `Poisoned`.
    pub fn delete_volume(&self, name: &str, with_snapshots: bool) -> Result<()> {
        let shared = {
            let state = self.inner.state();
            let id = state.volume_named(name)?;
            state
                .volumes
                .get(&id)
                .cloned()
                .ok_or_else(|| not_a_volume(name))?
        };
        // Waits for the operations that were issued before; later ones find the volume gone.
        let whole = shared.locks.lock_all(Mode::Exclusive);
        shared.alive()?;
        let now = self.inner.now_ms();
        let txg = {
            let mut state = self.inner.state();
            let live: Vec<SnapshotId> = state.live_snapshots(shared.id);
            if let (Some(_), false) = (live.first(), with_snapshots) {
                return Err(Error::refused(format!(
                    "volume {name:?} has {} snapshots: delete them first, or ask for both",
                    live.len()
                )));
            }
            live.iter().try_for_each(|id| state.check_deletable(*id, now))?;
            state.volumes.remove(&shared.id);
            state.names.retain(|_, id| *id != shared.id);
            let head = shared.head();
            state.branch_mut(head)?.head = false;
            live.into_iter().for_each(|id| state.retire(id));
            state.add_job(JobKind::DropHead(head));
            shared.delete();
            state.open.id
        };
        drop(whole);
        self.inner.changed.notify_all();
        self.inner.commit_through(txg)
    }

    /// A small value of the owner's.
    #[must_use]
    pub fn meta_get(&self, key: &str) -> Option<Vec<u8>> {
        self.inner.state().values.get(key).cloned()
    }

    /// Names and values whose name begins with `prefix`.
    #[must_use]
    pub fn meta_list(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let state = self.inner.state();
        let from = state.values.range(prefix.to_owned()..);
        from.take_while(|(k, _)| k.starts_with(prefix))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    }

    /// Sets (or with `None` removes) a small value. Durable on return.
    ///
    /// # Errors
    /// `Limit`, `Poisoned`.
    pub fn meta_put(&self, key: &str, value: Option<&[u8]>) -> Result<()> {
        self.meta_put_many(&[(key.to_owned(), value.map(<[u8]>::to_vec))])
    }

    /// Sets several small values together or not at all. Durable on return.
    ///
    /// # Errors
    /// `Limit`, `Poisoned`.
    pub fn meta_put_many(&self, changes: &[(String, Option<Vec<u8>>)]) -> Result<()> {
        for (key, value) in changes {
            let len = value.as_ref().map_or(0, Vec::len);
            check_limit("bytes of a value", len, limits::META_VALUE_BYTES)?;
            check_limit("bytes of a key", key.len(), limits::META_KEY_BYTES)?;
        }
        let txg = {
            let mut state = self.inner.state();
            check_limit("values", state.values.len() + changes.len(), limits::META_KEYS)?;
            for (key, value) in changes {
                match value {
                    Some(v) => drop(state.values.insert(key.clone(), v.clone())),
                    None => drop(state.values.remove(key)),
                }
                state.open.values.insert(key.clone());
            }
            state.open.id
        };
        self.inner.commit_through(txg)
    }

    /// Counters and sizes.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let available_bytes = self.inner.available_bytes();
        let state = self.inner.state();
        let grain = u64::from(self.inner.grain_bytes);
        PoolStats {
            grain_bytes: self.inner.grain_bytes,
            allocated_bytes: state.alloc.in_use() * grain,
            free_bytes: state.alloc.available() * grain,
            max_bytes: self.inner.options.max_bytes,
            available_bytes,
            threshold_percent: state.space.threshold(),
            filesystem_free_bytes: self.inner.disk.free_bytes().unwrap_or(state.space.free),
            headroom_bytes: state.space.headroom(),
            out_of_space: state.space.out,
            metadata_bytes: state.space.metadata_bytes,
            txg: state.durable,
            epoch: state.epoch.0,
            commits: state.commits,
            data_syncs: self.inner.data_syncs.load(Ordering::Relaxed),
            cached_pages: state.map.cached(),
            dirty_pages: state.map.dirty_count(),
            page_hits: state.map.hits,
            page_misses: state.map.misses,
            journal_bytes: state.journal_bytes(),
            most_pages_per_hold: state.most_pages,
            jobs: state.jobs.len().max(self.inner.steps.load(Ordering::Acquire)),
            loans: state.loans.len(),
            volumes: state.volumes.len(),
            snapshots: state.snapshots.len(),
            recovery_incomplete: self.inner.recovery_incomplete.load(Ordering::Acquire),
            bad_grains: state.bad.len(),
            poisoned: self.inner.poison.reason(),
        }
    }

    /// The bytes of new data that the pool still takes when it passes each of its thresholds of fullness
    /// ([`StoreEvent::Threshold`]), the lowest first. Without an operator's bound they change with the file system's free space.
    #[must_use]
    pub fn room_at_thresholds(&self) -> [u64; 3] {
        self.inner.room_at_thresholds()
    }

    /// Tells what happens from now on.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<StoreEvent> {
        self.inner.subscribe()
    }

    /// Why the pool acknowledges nothing any more, if so.
    #[must_use]
    pub fn poisoned(&self) -> Option<String> {
        self.inner.poison.reason()
    }

    /// Makes everything durable that was acknowledged before this call, on all volumes. Before a cut: so that
    /// little is dirty inside of the window.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    /// Commits what has changed until now.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn commit_now(&self) -> Result<()> {
        self.inner.commit_now()
    }

    /// What the background threads do on their own, once: commit, checkpoint if due, punch. Not the jobs.
    ///
    /// # Errors
    /// `Poisoned`, `Io`.
    pub fn step(&self) -> Result<()> {
        self.inner.commit_now()?;
        self.inner.checkpoint_if_due()?;
        while self.inner.punch_one()? {}
        self.inner.look_for_space();
        self.inner.look_at_thresholds();
        Ok(())
    }

    /// Stores every page whose changes are in the delta log only, and empties the log.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn checkpoint_now(&self) -> Result<()> {
        self.inner.commit_now()?;
        let durable = self.inner.state().durable;
        self.inner.checkpoint(durable)?;
        let txg = {
            let mut state = self.inner.state();
            state.open.forced_close = true;
            state.open.id
        };
        self.inner.commit_through(txg)
    }

    /// Runs up to `steps` steps of background jobs; gives how many there were to run.
    ///
    /// # Errors
    /// `Poisoned`, `Corrupt`.
    pub fn run_jobs(&self, steps: usize) -> Result<usize> {
        for done in 0..steps {
            if !self.inner.job_step()? {
                return Ok(done);
            }
        }
        Ok(steps)
    }

    /// Ends the background threads and makes everything durable. Handles that are still around fail afterwards.
    ///
    /// # Errors
    /// `Poisoned`, `Io`: the pool is closed all the same.
    pub fn shutdown(&self) -> Result<()> {
        if std::mem::replace(&mut self.inner.state().stopping, true) {
            return Ok(());
        }
        self.inner.changed.notify_all();
        self.inner.wait_for_compaction();
        let threads = std::mem::take(&mut *lock(&self.inner.threads));
        for thread in threads {
            if thread.join().is_err() {
                self.inner.fail(&Error::Poisoned {
                    reason: "a background thread panicked".into(),
                });
            }
        }
        let result = self.checkpoint_now().and_then(|()| self.inner.sync_data());
        if let (Ok(()), Some(warm)) = (&result, &self.inner.warm) {
            warm.clear();
        }
        self.inner.fail_quietly("the pool is closed");
        self.inner.meta.close();
        drop(lock(&self.inner.directory_lock).take());
        result
    }
}

impl State {
    /// Adds a volume with its first branch.
    pub(crate) fn add_volume(
        &mut self,
        record: impl FnOnce(VolumeId, Epoch) -> BranchRecord,
    ) -> Result<Arc<Shared>> {
        check_limit("volumes", self.branches.len(), limits::BRANCHES - 1)?;
        let id = BranchId(self.next_branch);
        let record = record(VolumeId(id.0), self.epoch);
        if self.names.contains_key(&record.name) {
            return Err(Error::Exists {
                what: format!("a volume {:?}", record.name),
            });
        }
        let shared = Shared::new(
            record.volume,
            id,
            record.size_bytes,
            record.block_size,
            record.read_only,
        )
        .with_checksums(record.checksums);
        let shared = Arc::new(shared);
        self.names.insert(record.name.clone(), record.volume);
        self.volumes.insert(record.volume, shared.clone());
        self.add_branch(record)?;
        Ok(shared)
    }

    /// Adds a branch that writes with the record's epoch.
    pub(crate) fn add_branch(&mut self, record: BranchRecord) -> Result<BranchId> {
        let id = BranchId(self.next_branch);
        self.next_branch += 1;
        self.branches.insert(
            id,
            Branch {
                record,
                holds: Holds::default(),
                durable_holds: Holds::default(),
                written: true,
            },
        );
        self.refresh_holds(id);
        if let Some(b) = self.branches.get_mut(&id) {
            b.durable_holds = b.holds.clone();
        }
        self.branch_mut(id)?;
        Ok(id)
    }

    pub(crate) fn volume_named(&self, name: &str) -> Result<VolumeId> {
        self.names.get(name).copied().ok_or_else(|| not_a_volume(name))
    }

    /// Live snapshots in a volume's history.
    pub(crate) fn live_snapshots(&self, volume: VolumeId) -> Vec<SnapshotId> {
        let all = self.branches_of(volume).flat_map(|b| self.snapshots_of(b));
        all.filter(|(_, n)| n.state == SnapshotState::Live)
            .map(|(id, _)| id)
            .collect()
    }
}

fn not_a_volume(name: &str) -> Error {
    Error::NotFound {
        what: format!("volume {name:?}"),
    }
}

pub(crate) fn check_limit(what: &'static str, value: usize, max: usize) -> Result<()> {
    if value > max {
        Err(Error::Limit {
            what,
            max: max as u64,
        })
    } else {
        Ok(())
    }
}

/// Names are for people and keys alike: no control characters, no `@` (it parts volume and snapshot).
pub(crate) fn check_name(name: &str) -> Result<()> {
    check_limit("bytes of a name", name.len(), limits::NAME_BYTES)?;
    if name.is_empty() || name.chars().any(|c| c.is_control() || c == '@' || c == '/') {
        return Err(Error::refused(format!(
            "the name {name:?} is empty or has a control character, @ or /"
        )));
    }
    Ok(())
}

fn client(meta: Box<dyn MetaStore>, options: &PoolOptions) -> Result<Meta> {
    if options.manual {
        return Ok(Meta::direct(meta));
    }
    Meta::open(
        Box::new(move || Ok(meta)),
        Duration::from_millis(options.open_timeout_ms),
    )
}

fn spawn(inner: &Arc<Inner>, name: &str, body: fn(&Inner)) -> Result<()> {
    let shared = inner.clone();
    let thread = std::thread::Builder::new()
        .name(name.into())
        .spawn(move || body(&shared));
    lock(&inner.threads).push(thread.map_err(|e| Error::io("start thread", name, e))?);
    Ok(())
}

/// Adds an empty volume to the open transaction group.
fn add(state: &mut State, spec: &VolumeSpec, created_ms: i64) -> Result<Arc<Shared>> {
    state.add_volume(|volume, current| BranchRecord {
        volume,
        head: true,
        read_only: false,
        checksums: Checksums::default(),
        name: spec.name.clone(),
        attributes: spec.attributes.clone(),
        size_bytes: spec.size_bytes,
        block_size: spec.block_size,
        parent: None,
        current,
        mapped_grains: 0,
        created_ms,
    })
}
