//! Commits: data first, then the map, then the answer (invariants I3, I4, I7). One in flight, the next collects.

use std::time::{Duration, Instant};

use crate::alloc::Closed;
use crate::inner::Inner;
use crate::meta::Batch;
use crate::record::{self, Delta, PageKey, SystemRecord, key};
use crate::state::{Holds, JournalPart, State, Txg};
use crate::superblock::Superblock;
use crate::types::{BranchId, StoreEvent};
use crate::{Error, Result};

/// Changed entries after which a commit is due.
const ENTRIES_DUE: u64 = 4096;
/// Changed entries beyond which writers wait for a commit: what bounds the RAM of a transaction group.
const ENTRIES_MAX: u64 = 65_536;
/// New page versions beyond which writers wait too: their `E` keys all go with the batch that closes the group, behind
/// which map misses wait.
const CREATED_MAX: usize = 8192;
/// `J` values per batch that goes ahead of the closing one: map misses are served between.
const JOURNAL_SLICE: usize = 64;
/// Pages per batch of a checkpoint.
const CHECKPOINT_SLICE: usize = 256;

/// A closed transaction group on its way to durability.
struct Closing {
    txg: u64,
    journal: Vec<(Vec<u8>, Vec<u8>)>,
    batch: Batch,
    system: SystemRecord,
    allocs: Vec<u64>,
    releases: Vec<u64>,
    /// Versions whose pages are stored with this group, instead of deltas.
    whole: Vec<PageKey>,
    holds: Vec<(BranchId, Holds)>,
    events: Vec<StoreEvent>,
}

/// The right to commit; given back on drop, also by a panic.
pub(crate) struct Turn<'a>(pub(crate) &'a Inner);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(&Error::Poisoned {
                reason: "panic during a commit".into(),
            });
        }
        self.0.state().committing = false;
        self.0.changed.notify_all();
    }
}

impl State {
    /// Closes the open transaction group (step 1): everything is encoded as it is now, later changes are the next
    /// group's.
    fn close(&mut self, pool_id: [u8; 16], grain_bytes: u32) -> Closing {
        self.handled(self.open.changed.len().max(self.open.created.len()));
        let next = Txg::new(self.open.id + 1);
        let mut txg = std::mem::replace(&mut self.open, next);
        self.touch_closing(&txg);
        self.alloc.begin_close(std::mem::take(&mut txg.shares));
        self.closing = Some(txg.id);
        let mut batch = Batch::default();
        for k in &txg.removed {
            batch.remove(key::page(*k));
            batch.remove(key::changed(*k));
        }
        for k in txg.created.difference(&txg.removed) {
            batch.put(key::changed(*k), Vec::new());
        }
        // What an earlier group has no delta of needs none of this one either.
        let whole: Vec<PageKey> = txg.whole.intersection(&txg.created).copied().collect();
        whole.iter().for_each(|k| drop(txg.changed.remove(k)));
        for k in txg.forced.iter().chain(&whole) {
            if let Some(version) = self.map.exact_mut(*k) {
                version.based = true;
                batch.put(key::page(*k), record::encode_page(*k, &version.page));
            }
        }
        self.encode_records(&txg, &mut batch);
        let journal = record::encode_journal(txg.id, &self.deltas(&txg));
        self.drop_journal(&mut batch);
        if !journal.is_empty() {
            let bytes = journal.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>() as u64;
            let values = u32::try_from(journal.len()).expect("bounded by ENTRIES_MAX");
            self.journal.push_back(JournalPart {
                txg: txg.id,
                values,
                bytes,
            });
        }
        let system = SystemRecord {
            pool_id,
            grain_bytes,
            txg: txg.id,
            checkpoint: self.checkpoint,
            epoch: self.epoch,
            next_branch: self.next_branch,
            next_job: self.next_job,
            chunks: self.alloc.chunk_count(),
        };
        let holds = txg
            .holds
            .iter()
            .filter_map(|b| Some((*b, self.branches.get(b)?.holds.clone())));
        Closing {
            txg: txg.id,
            journal,
            batch,
            system,
            holds: holds.collect(),
            allocs: txg.allocs,
            releases: txg.releases,
            whole,
            events: txg.events,
        }
    }

    /// Whether writers must wait for a commit.
    pub(crate) fn open_is_full(&self) -> bool {
        self.open.entries >= ENTRIES_MAX || self.open.created.len() >= CREATED_MAX
    }

    fn encode_records(&self, txg: &Txg, batch: &mut Batch) {
        let mut put = |key: Vec<u8>, value: Option<Vec<u8>>| batch.changes.push((key, value));
        for b in &txg.branches {
            put(key::branch(*b), self.branches.get(b).map(|x| x.record.encode(*b)));
        }
        for id in &txg.snapshots {
            put(
                key::snapshot(id.branch, id.epoch),
                self.snapshots.get(id).map(|n| n.encode(*id)),
            );
        }
        for id in &txg.jobs {
            put(key::job(*id), self.jobs.get(id).map(|j| j.encode(*id)));
        }
        for grain in &txg.bad {
            put(key::bad(*grain), self.bad.get(*grain).map(|b| b.encode(*grain)));
        }
        for name in &txg.values {
            put(
                key::value(name),
                self.values.get(name).map(|v| record::encode_value(name, v)),
            );
        }
    }

    fn deltas(&self, txg: &Txg) -> Vec<Delta> {
        let delta = |(key, undo): (&PageKey, &crate::state::Undo)| {
            // A version that the same group removed has no deltas to keep.
            let page = &self.map.exact(*key)?.page;
            let entries = record::indices(undo.mask).map(|i| page.at(i)).collect();
            Some(Delta {
                key: *key,
                mask: undo.mask,
                entries,
            })
        };
        txg.changed.iter().filter_map(delta).collect()
    }

    /// Removes `J` values that the stored pages have made needless.
    fn drop_journal(&mut self, batch: &mut Batch) {
        while let Some(part) = self.journal.front().copied().filter(|p| p.txg <= self.checkpoint) {
            (0..part.values).for_each(|seq| batch.remove(key::journal(part.txg, seq)));
            self.journal.pop_front();
        }
    }

    /// Bytes of `J` that no checkpoint covers.
    pub(crate) fn journal_bytes(&self) -> u64 {
        self.journal
            .iter()
            .filter(|p| p.txg > self.checkpoint)
            .map(|p| p.bytes)
            .sum()
    }
}

impl Inner {
    /// Waits until the transaction group is durable, committing it if nobody else does.
    ///
    /// # Errors
    /// `Poisoned` when it cannot become durable.
    pub(crate) fn commit_through(&self, txg: u64) -> Result<()> {
        let mut state = self.state();
        loop {
            self.poison.check()?;
            if state.durable >= txg
                || (state.open.id == txg && state.open.is_empty() && state.closing.is_none())
            {
                return Ok(());
            }
            if state.committing {
                state = self.wait(state);
                continue;
            }
            state.committing = true;
            drop(state);
            let turn = Turn(self);
            let result = self.commit_one();
            drop(turn);
            if let Err(e) = result {
                self.fail(&e);
                return self.poison.check();
            }
            state = self.state();
        }
    }

    /// Commits whatever has changed until now.
    ///
    /// # Errors
    /// `Poisoned`.
    pub(crate) fn commit_now(&self) -> Result<()> {
        let txg = {
            let state = self.state();
            if state.open.is_empty() {
                state.closing.unwrap_or(state.durable)
            } else {
                state.open.id
            }
        };
        self.commit_through(txg)
    }

    /// Makes everything durable that was acknowledged before this call.
    ///
    /// # Errors
    /// `Poisoned`.
    pub(crate) fn flush(&self) -> Result<()> {
        self.poison.check()?;
        let (open, closing) = {
            let state = self.state();
            ((!state.open.is_empty()).then_some(state.open.id), state.closing)
        };
        self.hook("flush.asked");
        match (open, closing) {
            (Some(txg), _) => self.commit_through(txg),
            // A write acknowledged before the close may have its entry in the closing group; one overwritten in
            // place after that group's data sync began is not covered by it.
            (None, Some(txg)) => {
                self.sync_data()?;
                self.commit_through(txg)
            }
            (None, None) => self.sync_data(),
        }
    }

    /// Steps 1 to 6 for one transaction group. Any error leaves the pool to be poisoned by the caller.
    fn commit_one(&self) -> Result<()> {
        let mut closing = self.state().close(self.pool_id, self.grain_bytes);
        // Writers that wait for room in the open group have it now.
        self.changed.notify_all();
        self.hook("commit.closed");
        // Entries are published after their data was written: all data of this group is in the file by now.
        self.sync_data()?;
        self.hook("commit.synced");
        let closed = self.close_bitmaps(&mut closing)?;
        for slice in closing.journal.chunks(JOURNAL_SLICE) {
            let changes = slice.iter().map(|(k, v)| (k.clone(), Some(v.clone()))).collect();
            self.meta(self.meta.apply(Batch { changes }))?;
        }
        self.hook("commit.journaled");
        self.meta(self.meta.apply(closing_batch(&closing, &closed)))?;
        self.meta(self.meta.commit())?;
        self.hook("commit.durable");
        let size = self.meta(self.meta.size_on_disk())?;
        {
            let mut state = self.state();
            state.durable = closing.txg;
            state.closing = None;
            state.commits += 1;
            state.space.metadata_bytes = size;
            state.alloc.settle(&closed);
            closing
                .whole
                .iter()
                .for_each(|k| state.map.stored(*k, closing.txg));
            for (branch, holds) in &closing.holds {
                if let Some(b) = state.branches.get_mut(branch) {
                    b.durable_holds = holds.clone();
                }
            }
        }
        self.changed.notify_all();
        closing.events.into_iter().for_each(|e| self.tell(e));
        self.hook("commit.released");
        let slot = Superblock {
            pool_id: self.pool_id,
            grain_bytes: self.grain_bytes,
            txg: closing.txg,
        };
        slot.write(self.disk.as_ref())
    }

    fn close_bitmaps(&self, closing: &mut Closing) -> Result<Closed> {
        loop {
            let missing = self.state().alloc.missing(&closing.releases);
            if missing.is_empty() {
                break;
            }
            self.load_chunks(missing)?;
        }
        // Chunks leave RAM in `settle` only, which is ours to call: nothing is missing now.
        let mut state = self.state();
        let closed = state.alloc.close(&closing.allocs, &closing.releases)?;
        let gone = state.forget_freed_bad(&closed.freed);
        gone.iter()
            .for_each(|grain| closing.batch.remove(key::bad(*grain)));
        if !gone.is_empty() {
            closing
                .events
                .push(StoreEvent::BadDataGone { grains: gone.len() });
        }
        Ok(closed)
    }

    /// Stores pages whose deltas have been in `J` since `through` or longer, then lets those `J` values go.
    ///
    /// # Errors
    /// `Poisoned`.
    pub(crate) fn checkpoint(&self, through: u64) -> Result<()> {
        while self.checkpoint_slice(through)? {}
        // The pages must be durable before the deltas go; those go with the next commit.
        self.meta(self.meta.commit())?;
        let mut state = self.state();
        state.checkpoint = state.checkpoint.max(through);
        Ok(())
    }

    fn checkpoint_slice(&self, through: u64) -> Result<bool> {
        let mut state = self.state();
        while state.committing {
            self.poison.check()?;
            state = self.wait(state);
        }
        self.poison.check()?;
        state.committing = true;
        let durable = state.durable;
        let keys = state.map.oldest_dirty(through.min(durable), CHECKPOINT_SLICE);
        state.handled(keys.len());
        let mut batch = Batch::default();
        for k in &keys {
            if let Some(page) = state.as_of_durable(*k) {
                batch.put(key::page(*k), record::encode_page(*k, &page));
            }
        }
        drop(state);
        let turn = Turn(self);
        let applied = self.meta(self.meta.apply(batch));
        if applied.is_ok() {
            let mut state = self.state();
            keys.iter().for_each(|k| state.map.stored(*k, durable));
        }
        drop(turn);
        self.hook("checkpoint.slice");
        applied.map(|()| !keys.is_empty())
    }

    /// Checkpoints when the delta log is old or long.
    ///
    /// # Errors
    /// `Poisoned`.
    pub(crate) fn checkpoint_if_due(&self) -> Result<()> {
        let through = {
            let state = self.state();
            let oldest = state
                .journal
                .iter()
                .map(|p| p.txg)
                .find(|t| *t > state.checkpoint);
            let Some(oldest) = oldest else { return Ok(()) };
            if state.journal_bytes() >= self.options.checkpoint_bytes || state.map.crowded() {
                state.durable
            } else if oldest + self.options.checkpoint_txgs <= state.durable {
                state.durable - self.options.checkpoint_txgs
            } else {
                return Ok(());
            }
        };
        self.checkpoint(through)
    }

    /// Holds a writer back while the open transaction group is too large.
    ///
    /// # Errors
    /// `Poisoned`.
    pub(crate) fn throttle(&self) -> Result<()> {
        let mut state = self.state();
        loop {
            self.poison.check()?;
            if !state.open_is_full() {
                return Ok(());
            }
            if !state.committing {
                let txg = state.open.id;
                drop(state);
                return self.commit_through(txg);
            }
            // Not until it is durable: room is made when it closes, which is when the commit before it ends.
            state = self.wait(state);
        }
    }

    /// Counts data that was written; wakes the keeper when a sync is due.
    pub(crate) fn wrote(&self, bytes: u64) {
        if self.unsynced.wrote(bytes) {
            self.changed.notify_all();
        }
    }

    /// How long the keeper may sleep before a commit is due; zero = now.
    pub(crate) fn due_in(&self, state: &State) -> Option<Duration> {
        if state.open.entries >= ENTRIES_DUE || self.unsynced.is_due() {
            return Some(Duration::ZERO);
        }
        if state.open.is_empty() {
            return None;
        }
        let every = Duration::from_millis(self.options.commit_ms);
        let since = state.open.since.unwrap_or_else(Instant::now);
        Some((since + every).saturating_duration_since(Instant::now()))
    }
}

/// The batch that closes the transaction group: `S` and everything that goes with it.
fn closing_batch(closing: &Closing, closed: &Closed) -> Batch {
    let mut batch = closing.batch.clone();
    for (chunk, bits) in &closed.bitmaps {
        batch.put(key::bitmap(*chunk), record::encode_bitmap(*chunk, bits));
    }
    for (block, counts) in &closed.counts {
        batch.put(key::counts(*block), record::encode_counts(*block, counts));
    }
    batch.changes.extend(closed.references.iter().cloned());
    batch.put(key::system(), closing.system.encode());
    batch
}
