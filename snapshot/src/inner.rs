//! What all handles of a pool share, and the services that every part uses: poison, group sync, pages, grains.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::alloc::Need;
use crate::disk::Disk;
use crate::lock::{lock, wait};
use crate::map::PageAt;
use crate::meta_client::Meta;
use crate::page::{PAGE_ENTRIES, Page, PageNo};
use crate::record::{self, PageKey, key};
use crate::refs::Refs;
use crate::scrub::Scrubbing;
use crate::state::State;
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, Point, PoolOptions, SnapshotId, StoreEvent};
use crate::unsynced::Unsynced;
use crate::usage::Known;
use crate::warm::{Identity, WarmLog, WarmMedium};
use crate::{Error, Result};

/// The shared part of a pool.
pub(crate) struct Inner {
    pub(crate) options: PoolOptions,
    pub(crate) grain_bytes: u32,
    pub(crate) pool_id: [u8; 16],
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) meta: Meta,
    state: Mutex<State>,
    /// A commit ended, a page was loaded, a job was added, the pool stops, …
    pub(crate) changed: Condvar,
    data_sync: GroupSync,
    pub(crate) poison: Poison,
    pub(crate) warm: Option<WarmLog>,
    pub(crate) threads: Mutex<Vec<JoinHandle<()>>>,
    /// Jobs free what a dying snapshot holds; readers of snapshots (not of volumes) keep them out.
    pub(crate) job_gate: RwLock<()>,
    /// Steps of jobs that are not durable yet: what they gave back counts as in use until then.
    pub(crate) steps: AtomicUsize,
    pub(crate) unsynced: Unsynced,
    pub(crate) data_syncs: AtomicU64,
    /// Grains known to be bad: what keeps reads from asking when there are none.
    pub(crate) bad_count: Arc<AtomicUsize>,
    /// The warm log was damaged when the pool was opened.
    pub(crate) recovery_incomplete: AtomicBool,
    /// One sealer at a time.
    pub(crate) sealing: Mutex<()>,
    pub(crate) scrubbing: Scrubbing,
    /// Bytes that snapshots alone hold, as far as they were counted.
    pub(crate) unique: Mutex<Known>,
    /// One compaction at a time.
    pub(crate) compacting: Mutex<()>,
    /// Held as long as the pool is open, so that no second daemon opens it.
    pub(crate) directory_lock: Mutex<Option<std::fs::File>>,
}

/// What a pool in a directory has and one on any medium has not.
#[derive(Default)]
pub(crate) struct Directory {
    pub(crate) lock: Option<std::fs::File>,
    /// Medium of the warm log, and the name of the running kernel.
    pub(crate) warm: Option<(Box<dyn WarmMedium>, String)>,
}

/// The first failure after which nothing is acknowledged any more.
#[derive(Default)]
pub(crate) struct Poison {
    set: AtomicBool,
    reason: Mutex<Option<String>>,
    listeners: Mutex<Vec<Sender<StoreEvent>>>,
}

impl Poison {
    pub(crate) fn check(&self) -> Result<()> {
        match self.reason() {
            Some(reason) => Err(Error::Poisoned { reason }),
            None => Ok(()),
        }
    }

    pub(crate) fn reason(&self) -> Option<String> {
        if self.set.load(Ordering::Acquire) {
            lock(&self.reason).clone()
        } else {
            None
        }
    }
}

/// fdatasync of the data file, shared by everyone who waits for one. One at a time: Linux reports a failed
/// writeback to one caller only, so the next sync must not start before the failure is known to all.
#[derive(Default)]
struct GroupSync {
    turns: Mutex<Turns>,
    ended: Condvar,
}

#[derive(Default)]
struct Turns {
    asked: u64,
    done: u64,
    running: bool,
}

impl Inner {
    pub(crate) fn new(
        options: PoolOptions,
        grain_bytes: u32,
        pool_id: [u8; 16],
        disk: Arc<dyn Disk>,
        meta: Meta,
        state: State,
        directory: Directory,
    ) -> Self {
        let Directory { lock, warm } = directory;
        let bad_count = state.bad.counter();
        let warm = warm.map(|(medium, boot_id)| WarmLog::new(medium, Identity { pool_id, boot_id }));
        Self {
            options,
            grain_bytes,
            pool_id,
            disk,
            meta,
            state: Mutex::new(state),
            changed: Condvar::new(),
            data_sync: GroupSync::default(),
            poison: Poison::default(),
            warm,
            threads: Mutex::new(Vec::new()),
            job_gate: RwLock::new(()),
            steps: AtomicUsize::new(0),
            unsynced: Unsynced::default(),
            data_syncs: AtomicU64::new(0),
            bad_count,
            recovery_incomplete: AtomicBool::new(false),
            sealing: Mutex::new(()),
            scrubbing: Scrubbing::default(),
            unique: Mutex::default(),
            compacting: Mutex::new(()),
            directory_lock: Mutex::new(lock),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        wait(&self.changed, state)
    }

    /// A named place where tests stop threads.
    #[cfg(feature = "sim")]
    pub(crate) fn hook(&self, point: Point) {
        if let Some(hooks) = &self.options.hooks {
            hooks.at(point);
        }
    }

    /// A named place where tests stop threads: nothing in a shipped build.
    #[cfg(not(feature = "sim"))]
    #[expect(clippy::unused_self, reason = "the other build uses it")]
    pub(crate) fn hook(&self, _point: Point) {}

    /// Milliseconds since 1970 UTC.
    pub(crate) fn now_ms(&self) -> i64 {
        match &self.options.clock {
            Some(clock) => clock(),
            None => jiff::Timestamp::now().as_millisecond(),
        }
    }

    /// Bytes of the volume that a map page covers.
    pub(crate) fn page_bytes(&self) -> u64 {
        u64::from(self.grain_bytes) * PAGE_ENTRIES as u64
    }

    /// Where a grain is in the data file, in bytes.
    pub(crate) fn place(&self, grain: u64) -> u64 {
        grain * u64::from(self.grain_bytes)
    }

    /// Remembers the first failure. From here on nothing is acknowledged.
    pub(crate) fn fail(&self, error: &Error) {
        {
            let mut reason = lock(&self.poison.reason);
            if reason.is_some() {
                return;
            }
            let text = match error {
                Error::Poisoned { reason } => reason.clone(),
                other => other.to_string(),
            };
            tracing::error!("the pool stops accepting writes: {text}");
            *reason = Some(text.clone());
            self.poison.set.store(true, Ordering::Release);
            drop(reason);
            self.tell(StoreEvent::Poisoned { reason: text });
        }
        self.data_sync.ended.notify_all();
        self.changed.notify_all();
    }

    /// Nothing is acknowledged from here on, and nobody needs to be told: the pool was closed.
    pub(crate) fn fail_quietly(&self, reason: &str) {
        lock(&self.poison.reason).get_or_insert_with(|| reason.to_owned());
        self.poison.set.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Any failure of the metadata store poisons the pool (FORMAT.md, rules for sled).
    pub(crate) fn meta<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|e| self.fail(e))
    }

    pub(crate) fn tell(&self, event: StoreEvent) {
        lock(&self.poison.listeners).retain(|to| to.send(event.clone()).is_ok());
    }

    pub(crate) fn subscribe(&self) -> Receiver<StoreEvent> {
        let (to, from) = channel();
        lock(&self.poison.listeners).push(to);
        from
    }

    /// Whether a sync of the data file is expected to be over about as soon as another thread could be asked for it.
    pub(crate) fn syncs_soon(&self) -> bool {
        self.unsynced.syncs_soon() && !lock(&self.data_sync.turns).running
    }

    /// Makes every data write that returned before this call durable.
    ///
    /// # Errors
    /// `Poisoned`: also when the sync of somebody else failed meanwhile. Never retried.
    pub(crate) fn sync_data(&self) -> Result<()> {
        let mut turns = lock(&self.data_sync.turns);
        turns.asked += 1;
        let mine = turns.asked;
        loop {
            self.poison.check()?;
            if turns.done >= mine {
                return Ok(());
            }
            if turns.running {
                turns = wait(&self.data_sync.ended, turns);
                continue;
            }
            turns.running = true;
            let covers = turns.asked;
            drop(turns);
            let (bytes, began) = (self.unsynced.begin(), Instant::now());
            self.data_syncs.fetch_add(1, Ordering::Relaxed);
            let result = self.disk.sync_data();
            self.unsynced.ended(bytes, began.elapsed());
            turns = lock(&self.data_sync.turns);
            turns.running = false;
            match result {
                Ok(()) => turns.done = covers,
                // No NoSpace here: whatever the reason, acknowledged writes may be lost.
                Err(source) => {
                    if let Some(warm) = &self.warm {
                        warm.invalidate();
                    }
                    self.fail(&Error::Io {
                        op: "fdatasync",
                        path: "data file".into(),
                        source,
                    });
                }
            }
            self.data_sync.ended.notify_all();
        }
    }

    /// Runs `work` with the head's page in RAM.
    pub(crate) fn with_page<T>(
        &self,
        branch: BranchId,
        page: PageNo,
        mut work: impl FnMut(&mut State) -> Result<T>,
    ) -> Result<T> {
        let at = (branch, page);
        loop {
            let mut state = self.state();
            if state.has_page(at) {
                state.map.hits += 1;
                return work(&mut state);
            }
            drop(state);
            self.load_page(at)?;
        }
    }

    /// A copy of the head's page.
    pub(crate) fn page(&self, branch: BranchId, page: PageNo) -> Result<Page> {
        self.with_page(branch, page, |state| {
            Ok(state.head_page(branch, page).unwrap_or_default())
        })
    }

    /// Brings the head's page into RAM. One thread reads it, the others wait.
    pub(crate) fn load_page(&self, at: PageAt) -> Result<()> {
        let mut state = self.state();
        loop {
            if state.has_page(at) {
                return Ok(());
            }
            if state.map.loading.insert(at) {
                break;
            }
            state = self.wait(state);
        }
        state.map.misses += 1;
        drop(state);
        let found = self.look_up(at);
        let mut state = self.state();
        state.map.loading.remove(&at);
        let inserted = found.map(|found| state.take_in(at, found));
        drop(state);
        self.changed.notify_all();
        inserted
    }

    /// The page that a reader of `branch` at `epoch` sees, and the epoch of its version if it is the branch's own.
    /// Follows the snapshots that the branch stands on.
    pub(crate) fn resolve(
        &self,
        branch: BranchId,
        epoch: Epoch,
        page: PageNo,
    ) -> Result<(Option<Epoch>, Page)> {
        self.stable(|| self.resolve_once(branch, epoch, page, true, u64::MAX))
    }

    /// Runs `look` until no page moved between branches meanwhile: it would be missed in both.
    pub(crate) fn stable<T>(&self, look: impl Fn() -> Result<T>) -> Result<T> {
        loop {
            let generation = self.state().map.structure_gen;
            let found = look();
            if self.state().map.structure_gen == generation {
                return found;
            }
        }
    }

    /// One look. Without `own_tombs` what the tombstones of the branch itself hide is there: what is stored, and changed.
    /// Loans that were made before the job `below` show their pages.
    pub(crate) fn resolve_once(
        &self,
        branch: BranchId,
        epoch: Epoch,
        no: PageNo,
        own_tombs: bool,
        below: u64,
    ) -> Result<(Option<Epoch>, Page)> {
        let (mut b, mut e) = (branch, epoch);
        let mut tombs = Tombs::default();
        loop {
            // RAM first: a version that leaves RAM after this look is in the store before the next.
            let (ram, parent, loan) = {
                let state = self.state();
                if !state.tombs.is_empty() && (own_tombs || b != branch) {
                    tombs.join(state.tombs.over(b, e, no));
                }
                let found = state.map.own_at((b, no), e);
                (
                    found.map(|(v, newest)| (v.epoch, v.page.clone(), newest)),
                    state.branch(b)?.record.parent,
                    state.loans.over(b, e, no, below).copied(),
                )
            };
            // What is not younger is what the branch showed before the loan.
            let after = |found: &Option<Epoch>| loan.is_none_or(|l| *found > Some(l.to.epoch));
            if let Some((found, mut page, true)) = ram.as_ref().filter(|(f, ..)| after(f)).cloned() {
                tombs.mask_all(&mut page);
                return Ok((found.filter(|_| b == branch), page));
            }
            // RAM may lack a stored version between those that it has: a page that moved in from the branch below is
            // older than all, and stays while it is dirty.
            let stored = self.stored_at(b, no, e)?.map(|(k, p)| (Some(k.epoch), p));
            let ram = ram.map(|(found, page, _)| (found, page));
            let both = [stored, ram]
                .into_iter()
                .flatten()
                .filter(|(found, _)| after(found));
            // On a tie RAM is last, and newer.
            if let Some((found, mut page)) = both.max_by_key(|(found, _)| *found) {
                tombs.mask_all(&mut page);
                return Ok((found.filter(|_| b == branch), page));
            }
            if let Some(loan) = loan {
                let lender = loan.from;
                let look = |p| self.resolve_once(lender.branch, lender.epoch, p, true, loan.job);
                let mut page = loan.shown(no, |p| Ok(look(p)?.1))?;
                tombs.mask_all(&mut page);
                return Ok((None, page));
            }
            match parent {
                Some(p) => (b, e) = (p.branch, p.epoch),
                None => return Ok((None, Page::default())),
            }
        }
    }

    /// The branch's own newest stored version that is not younger than `epoch`.
    pub(crate) fn stored_at(
        &self,
        branch: BranchId,
        page: PageNo,
        epoch: Epoch,
    ) -> Result<Option<(PageKey, Page)>> {
        let from = key::page(PageKey { branch, page, epoch });
        let found = self.meta(self.meta.scan(from, key::page_end(branch, page), 1))?;
        found
            .into_iter()
            .next()
            .map(|(k, v)| parse_page(&k, &v))
            .transpose()
    }

    /// The branch's own oldest stored version that is younger than `epoch`.
    pub(crate) fn stored_after(
        &self,
        branch: BranchId,
        page: PageNo,
        epoch: Epoch,
    ) -> Result<Option<(PageKey, Page)>> {
        let from = key::page(PageKey {
            branch,
            page,
            epoch: Epoch(u32::MAX),
        });
        let below = key::page(PageKey { branch, page, epoch });
        let found = self.meta(self.meta.last(from, below))?;
        found.map(|(k, v)| parse_page(&k, &v)).transpose()
    }

    /// One version of a page, from RAM or the store.
    pub(crate) fn exact(&self, key: PageKey) -> Result<Page> {
        if let Some(version) = self.state().map.exact(key) {
            return Ok(version.page.clone());
        }
        let bytes = key::page(key);
        let value = self.meta(self.meta.get(bytes.clone()))?;
        let value = value.ok_or_else(|| Error::corrupt("map page is missing", crate::codec::hex(&bytes)))?;
        record::decode_page(key, &value)
    }

    /// Reserves one grain under the lock.
    pub(crate) fn reserve_in(&self, state: &mut State) -> std::result::Result<u64, Need> {
        if !state.space.room(self.disk.as_ref()) {
            return Err(Need::Space);
        }
        state.alloc.reserve()
    }

    /// Remembers and tells that there is no room.
    pub(crate) fn out_of_space(&self) -> Error {
        let mut state = self.state();
        let first = !std::mem::replace(&mut state.space.out, true);
        if first {
            state.space.out_since = Some(Instant::now());
        }
        drop(state);
        if first {
            tracing::warn!("no space for new data: writes that need a grain are refused");
            self.tell(StoreEvent::OutOfSpace);
        }
        Error::NoSpace
    }

    /// Brings a bitmap into RAM.
    pub(crate) fn load_chunk(&self, chunk: u32) -> Result<()> {
        let mut state = self.state();
        loop {
            if state.alloc.is_loaded(chunk) {
                return Ok(());
            }
            if state.loading_chunks.insert(chunk) {
                break;
            }
            state = self.wait(state);
        }
        drop(state);
        let value = self.meta(self.meta.get(key::bitmap(chunk)));
        let refs = self.load_references(chunk);
        let mut state = self.state();
        state.loading_chunks.remove(&chunk);
        let inserted = value.and_then(|value| {
            let bits = match value {
                Some(v) => record::decode_bitmap(chunk, &v)?,
                None => state.alloc.blank(chunk),
            };
            state.alloc.insert(chunk, bits, refs?)
        });
        drop(state);
        self.changed.notify_all();
        inserted
    }

    fn load_references(&self, chunk: u32) -> Result<Refs> {
        let mut refs = Refs::default();
        if self.state().alloc.has_references(chunk) {
            let from = key::references(chunk, 0);
            let found = self.meta(self.meta.scan(from, key::references_end(chunk), usize::MAX))?;
            for (k, v) in found {
                refs.decode(&record::Key::parse(&k)?, &v)?;
            }
        }
        Ok(refs)
    }

    /// Brings all of these bitmaps into RAM.
    pub(crate) fn load_chunks(&self, chunks: BTreeSet<u32>) -> Result<()> {
        chunks.into_iter().try_for_each(|c| self.load_chunk(c))
    }

    /// Gives back reservations that were not published.
    pub(crate) fn unreserve(&self, grains: impl IntoIterator<Item = u64>) {
        let mut state = self.state();
        grains.into_iter().for_each(|g| state.alloc.unreserve(g));
    }

    /// Pages of a branch (its own versions and those below that show through) in `from..=to` that may exist: the
    /// first one, or none. Skips what was never written.
    pub(crate) fn next_present(&self, branch: BranchId, from: PageNo, to: PageNo) -> Result<Option<PageNo>> {
        if from > to {
            return Ok(None);
        }
        let at = SnapshotId {
            branch,
            epoch: Epoch::MAX,
        };
        self.stable(|| self.next_present_once(at, from, to, u64::MAX))
    }

    /// One look, as of an epoch as far as loans go: those made before the job `below`.
    pub(crate) fn next_present_once(
        &self,
        at: SnapshotId,
        from: PageNo,
        to: PageNo,
        below: u64,
    ) -> Result<Option<PageNo>> {
        let mut best: Option<PageNo> = None;
        let mut level = Some(at);
        while let Some(at) = level {
            let b = at.branch;
            let limit = best.unwrap_or(to);
            let (dirty, parent, lends) = {
                let state = self.state();
                (
                    state.map.next_dirty(b, from, limit),
                    state.branch(b)?.record.parent,
                    !state.loans.is_empty(),
                )
            };
            let lent = match lends {
                true => self.next_lent(b, at.epoch, from, limit, below)?,
                false => None,
            };
            let start = key::page(PageKey {
                branch: b,
                page: from,
                epoch: Epoch(u32::MAX),
            });
            let found = self.meta(self.meta.scan(start, key::page_end(b, limit), 1))?;
            let stored = match found.first() {
                Some((k, _)) => Some(parse_page_key(k)?.page),
                None => None,
            };
            best = [best, dirty, stored, lent].into_iter().flatten().min();
            level = parent;
        }
        Ok(best)
    }
}

fn parse_page_key(bytes: &[u8]) -> Result<PageKey> {
    match record::Key::parse(bytes)? {
        record::Key::Page(key) => Ok(key),
        _ => Err(Error::corrupt("map page key", crate::codec::hex(bytes))),
    }
}

/// A key and value of `M`.
pub(crate) fn parse_page(bytes: &[u8], value: &[u8]) -> Result<(PageKey, Page)> {
    let key = parse_page_key(bytes)?;
    Ok((key, record::decode_page(key, value)?))
}
