//! Pins: points in time of a volume that nobody lists and that no restart keeps. A copy reads from one, and so does a
//! token until it expires.
//!
//! A pin stands on a snapshot. One that is made for it is *hidden* from the start; a hidden snapshot that nothing stands
//! on is what every start frees, so a pin needs no record of its own.

use std::sync::Arc;

use crate::inner::Inner;
use crate::lock::Mode;
use crate::page::Page;
use crate::pool::check_limit;
use crate::record::SnapshotRecord;
use crate::state::State;
use crate::types::{BranchId, Consistency, SnapshotId, SnapshotState, VolumeId, limits};
use crate::volume::{Runs, Shared, Volume, check_range};
use crate::{Error, Result};

/// A point in time of a whole volume. What it shows stays until it is dropped, whatever happens to the volume; after a
/// restart it is gone, and so is what it held.
pub struct Pin {
    pub(crate) pool: Arc<Inner>,
    pub(crate) snapshot: SnapshotId,
    volume: VolumeId,
    size_bytes: u64,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pin")
            .field("volume", &self.volume)
            .field("snapshot", &self.snapshot)
            .finish_non_exhaustive()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.pool.state().unpin(self.snapshot);
        // What only it held is freed by a job.
        self.pool.changed.notify_all();
    }
}

impl Volume {
    /// Keeps the volume as it is now, for copies. Waits for the writes that were issued before; later ones are not in it.
    /// Costs one epoch at most: none when nothing was written since the last snapshot.
    ///
    /// # Errors
    /// `NotFound` after a delete, `Limit`, `Poisoned`.
    pub fn pin(&self) -> Result<Pin> {
        self.shared.alive()?;
        self.pool.poison.check()?;
        let _writers = self.shared.locks.lock_all(Mode::Shared);
        self.shared.alive()?;
        let created_ms = self.pool.now_ms();
        let snapshot = self.pool.state().pin_head(&self.shared, created_ms)?;
        self.pool.hook("pin.made");
        Ok(Pin {
            pool: self.pool.clone(),
            snapshot,
            volume: self.shared.id,
            size_bytes: self.size_bytes(),
        })
    }
}

impl Pin {
    /// Keeps a live snapshot, also when it is deleted meanwhile.
    pub(crate) fn of_snapshot(pool: &Arc<Inner>, id: SnapshotId) -> Result<Self> {
        let mut state = pool.state();
        let size_bytes = state.live(id)?.size_bytes;
        let volume = state.branch(id.branch)?.record.volume;
        *state.pins.entry(id).or_default() += 1;
        drop(state);
        Ok(Self {
            pool: pool.clone(),
            snapshot: id,
            volume,
            size_bytes,
        })
    }

    /// The volume that it is of.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Size of the volume at that time, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buf` from `offset` (bytes).
    ///
    /// # Errors
    /// `OutOfRange`, `Medium`, `Corrupt`, `Poisoned`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size_bytes)?;
        let grain = u64::from(self.pool.grain_bytes);
        let page_bytes = self.pool.page_bytes();
        let (mut runs, mut done) = (Runs::default(), 0usize);
        let mut page: Option<(u32, Page)> = None;
        while done < buf.len() {
            let at = offset + done as u64;
            let no = u32::try_from(at / page_bytes).expect("checked by the range");
            let len = usize::try_from(grain - at % grain).expect("at most a grain");
            let len = len.min(buf.len() - done);
            let shown = match page.take().filter(|(have, _)| *have == no) {
                Some((_, page)) => page,
                None => {
                    self.pool
                        .resolve(self.snapshot.branch, self.snapshot.epoch, no)?
                        .1
                }
            };
            let entry = shown.at(u8::try_from(at % page_bytes / grain).expect("64 entries"));
            let within = at % grain..at % grain + len as u64;
            self.pool
                .add_grain(&mut runs, entry, within, done..done + len, at);
            page = Some((no, shown));
            done += len;
        }
        self.pool.hook("read.looked_up");
        self.pool.read_runs(&runs, Some(self.volume), buf)
    }
}

impl State {
    /// Keeps what the head of a volume shows. The caller has its writers wait.
    fn pin_head(&mut self, shared: &Shared, created_ms: i64) -> Result<SnapshotId> {
        let id = self.still(shared.head(), created_ms)?;
        *self.pins.entry(id).or_default() += 1;
        Ok(id)
    }

    /// A snapshot of what the head of a branch shows: its newest, or a hidden one made for it. The caller has writers wait.
    pub(crate) fn still(&mut self, branch: BranchId, created_ms: i64) -> Result<SnapshotId> {
        let newest = self.snapshots_of(branch).next_back();
        let newest = newest.map(|(id, record)| (id, record.state));
        let written = self.branches.get(&branch).is_none_or(|b| b.written);
        match newest {
            Some((id, SnapshotState::Live | SnapshotState::Hidden)) if !written => Ok(id),
            _ => self.cut_hidden(branch, created_ms),
        }
    }

    fn cut_hidden(&mut self, branch: BranchId, created_ms: i64) -> Result<SnapshotId> {
        check_limit("snapshots", self.snapshots.len() + 1, limits::SNAPSHOTS)?;
        let epoch = self.next_epoch()?;
        let current = self.epoch;
        let record = self.branch_mut(branch)?;
        record.current = current;
        let snapshot = SnapshotRecord {
            name: String::new(),
            created_ms,
            size_bytes: record.size_bytes,
            block_size: record.block_size,
            mapped_grains: record.mapped_grains,
            consistency: Consistency::Crash,
            state: SnapshotState::Hidden,
            hold: false,
            // Nobody reads it for long: its checksums are not worth the reading.
            sealed: true,
            lock_until_ms: 0,
            meta: Vec::new(),
        };
        let id = SnapshotId { branch, epoch };
        self.put_snapshot(id, Some(snapshot));
        self.written(branch, false);
        Ok(id)
    }

    /// A pin goes. The last one of a snapshot that its owner does not want lets that go too.
    fn unpin(&mut self, id: SnapshotId) {
        let Some(count) = self.pins.get_mut(&id) else {
            return;
        };
        *count -= 1;
        if *count > 0 {
            return;
        }
        self.pins.remove(&id);
        if self
            .snapshots
            .get(&id)
            .is_some_and(|n| n.state == SnapshotState::Hidden)
        {
            self.follow_up();
        }
    }
}

/// Pins of different pools have nothing in common.
pub(crate) fn same_pool(a: &Arc<Inner>, b: &Arc<Inner>) -> Result<()> {
    if Arc::ptr_eq(a, b) {
        Ok(())
    } else {
        Err(Error::refused(
            "the source is in another pool: read it and write the data instead",
        ))
    }
}
