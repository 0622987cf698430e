//! Snapshots: cut, list, change, delete, clone, revert. All of them O(1); what they free is freed by jobs.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::inner::Inner;
use crate::lock::Mode;
use crate::page::Entry;
use crate::pool::{Pool, check_limit, check_name};
use crate::record::{BranchRecord, JobKind, SnapshotRecord};
use crate::state::State;
use crate::types::{
    BranchId, Checksums, CloneSpec, Epoch, SnapshotChange, SnapshotId, SnapshotInfo, SnapshotSpec,
    SnapshotState, VolumeId, limits,
};
use crate::volume::{Runs, Shared, Volume, check_attributes, check_range};
use crate::{Error, Result};

/// A cut that has been made in RAM: writes issued from now on are not in it. Not durable before
/// [`Cut::commit`]; dropped without it, the snapshots become durable with the next commit.
#[must_use = "a cut is acknowledged only after `commit`"]
#[derive(Debug)]
pub struct Cut {
    pool: Pool,
    snapshots: Vec<SnapshotId>,
    txg: u64,
}

impl Cut {
    /// The snapshots, in the order in which the volumes were named.
    #[must_use]
    pub fn snapshots(&self) -> &[SnapshotId] {
        &self.snapshots
    }

    /// Waits until the snapshots are durable.
    ///
    /// # Errors
    /// `Poisoned`: whether they exist shows after the next open.
    pub fn commit(self) -> Result<Vec<SnapshotInfo>> {
        self.pool.inner.commit_through(self.txg)?;
        // Makes the superblock of this commit durable too: I7 then covers the snapshot (FORMAT.md).
        self.pool.inner.sync_data()?;
        let state = self.pool.inner.state();
        let info = |id: &SnapshotId| {
            state
                .info(*id, &self.pool.inner)
                .ok_or_else(|| not_a_snapshot(&id.to_string()))
        };
        self.snapshots.iter().map(info).collect()
    }
}

impl Pool {
    /// Cuts all these volumes at one point in time. Block operations that were issued before are in it; new ones
    /// wait until this returns, and are not.
    ///
    /// # Errors
    /// `NotFound`, `Exists` (the name, on one of the volumes), `Refused`, `Limit`, `Poisoned`; no volume is cut then.
    pub fn begin_cut(&self, volumes: &[VolumeId], spec: &SnapshotSpec) -> Result<Cut> {
        check_name(&spec.name)?;
        check_limit(
            "bytes of a snapshot's metadata",
            spec.meta.len(),
            limits::SNAPSHOT_META_BYTES,
        )?;
        self.inner.poison.check()?;
        let mut shared = self.shared_of(volumes)?;
        let named: Vec<VolumeId> = shared.iter().map(|s| s.id).collect();
        // One order for everybody: two cuts never wait for each other. Reads go on; writes are drained and held.
        shared.sort_by_key(|s| s.id);
        let held: Vec<_> = shared.iter().map(|s| s.locks.lock_all(Mode::Shared)).collect();
        self.inner.hook("cut.drained");
        let created_ms = if spec.created_ms == 0 {
            self.inner.now_ms()
        } else {
            spec.created_ms
        };
        let (snapshots, txg) = {
            let mut state = self.inner.state();
            let made = state.cut(&shared, spec, created_ms)?;
            let of = |v: &VolumeId| made.iter().find(|(id, _)| id == v).map(|(_, s)| *s);
            (named.iter().filter_map(of).collect(), state.open.id)
        };
        drop(held);
        self.inner.hook("cut.released");
        Ok(Cut {
            pool: self.clone(),
            snapshots,
            txg,
        })
    }

    fn shared_of(&self, volumes: &[VolumeId]) -> Result<Vec<Arc<Shared>>> {
        if volumes.is_empty() {
            return Err(Error::refused("a cut needs at least one volume"));
        }
        let state = self.inner.state();
        let mut shared: Vec<Arc<Shared>> = Vec::new();
        for id in volumes {
            let found = state.volumes.get(id).cloned();
            let found = found.ok_or_else(|| Error::NotFound {
                what: format!("volume number {id}"),
            })?;
            if !shared.iter().any(|s| s.id == *id) {
                shared.push(found);
            }
        }
        Ok(shared)
    }

    /// Live snapshots of one volume or of all, oldest first.
    #[must_use]
    pub fn snapshots(&self, volume: Option<VolumeId>) -> Vec<SnapshotInfo> {
        let state = self.inner.state();
        // Counted once: asking each snapshot for its children would hold the lock for as long as both lists multiplied.
        let mut children: HashMap<SnapshotId, usize> = HashMap::new();
        for parent in state.branches.values().filter_map(|b| b.record.parent) {
            *children.entry(parent).or_default() += 1;
        }
        let of = |id: &SnapshotId| state.branches.get(&id.branch).map(|b| b.record.volume);
        let live = state
            .snapshots
            .iter()
            .filter(|(id, n)| n.state == SnapshotState::Live && volume.is_none_or(|v| of(id) == Some(v)));
        let info = |id: &SnapshotId| {
            let children = children.get(id).copied().unwrap_or(0);
            state.info_with(*id, &self.inner, children)
        };
        let mut list: Vec<_> = live.filter_map(|(id, _)| info(id)).collect();
        list.sort_by_key(|s| (s.volume, s.id.epoch));
        list
    }

    /// The live snapshot of that name in the volume's history.
    #[must_use]
    pub fn snapshot(&self, volume: &str, name: &str) -> Option<SnapshotInfo> {
        let state = self.inner.state();
        let id = state.named_snapshot(*state.names.get(volume)?, name)?;
        state.info(id, &self.inner)
    }

    /// A snapshot in any state.
    #[must_use]
    pub fn snapshot_by_id(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        self.inner.state().info(id, &self.inner)
    }

    /// Changes name, level, owner's bytes, hold or lock of a live snapshot. Durable on return.
    ///
    /// # Errors
    /// `NotFound`, `Exists` (name), `Refused` (shortening a lock), `Limit`, `Poisoned`.
    pub fn set_snapshot(&self, id: SnapshotId, change: &SnapshotChange) -> Result<SnapshotInfo> {
        let mut changed = self.set_snapshots(&[(id, change.clone())])?;
        changed.pop().ok_or_else(|| not_a_snapshot(&id.to_string()))
    }

    /// Like [`Pool::set_snapshot`] for several snapshots: all of them in one durable commit, or none.
    ///
    /// # Errors
    /// As [`Pool::set_snapshot`].
    pub fn set_snapshots(&self, changes: &[(SnapshotId, SnapshotChange)]) -> Result<Vec<SnapshotInfo>> {
        let now = self.inner.now_ms();
        let txg = {
            let mut state = self.inner.state();
            let records = changes
                .iter()
                .map(|(id, change)| Ok((*id, state.changed(*id, change, now)?)))
                .collect::<Result<Vec<_>>>()?;
            records
                .into_iter()
                .for_each(|(id, record)| state.put_snapshot(id, Some(record)));
            state.open.id
        };
        self.inner.commit_through(txg)?;
        let state = self.inner.state();
        let info = |(id, _): &(SnapshotId, SnapshotChange)| {
            state
                .info(*id, &self.inner)
                .ok_or_else(|| not_a_snapshot(&id.to_string()))
        };
        changes.iter().map(info).collect()
    }

    /// Deletes a snapshot: gone from every list at once, durable on return, its grains freed in the background. With
    /// clones on it, it stays hidden until the last of them goes.
    ///
    /// # Errors
    /// `NotFound`, `Refused` (held or locked), `Poisoned`.
    pub fn delete_snapshot(&self, id: SnapshotId) -> Result<()> {
        self.delete_snapshots(&[id])
    }

    /// Deletes several snapshots as [`Pool::delete_snapshot`] does: all of them in one durable commit, or none.
    ///
    /// # Errors
    /// As [`Pool::delete_snapshot`].
    pub fn delete_snapshots(&self, ids: &[SnapshotId]) -> Result<()> {
        let now = self.inner.now_ms();
        let txg = {
            let mut state = self.inner.state();
            ids.iter().try_for_each(|id| state.check_deletable(*id, now))?;
            for id in BTreeSet::from_iter(ids) {
                state.retire(*id);
            }
            state.follow_up();
            state.open.id
        };
        self.inner.changed.notify_all();
        self.inner.commit_through(txg)
    }

    /// Makes a volume of a snapshot, sharing every grain. Durable on return.
    ///
    /// # Errors
    /// `NotFound`, `Exists` (name), `Refused` (the snapshot is being deleted), `Limit`, `Poisoned`.
    pub fn clone_snapshot(&self, id: SnapshotId, spec: &CloneSpec) -> Result<Volume> {
        check_name(&spec.name)?;
        check_attributes(&spec.attributes)?;
        let created_ms = self.inner.now_ms();
        let (shared, txg) = {
            let mut state = self.inner.state();
            let origin = state.live(id)?.clone();
            let checksums = state.branch(id.branch)?.record.checksums;
            check_limit("depth of clones", state.depth(id.branch) + 1, limits::DEPTH)?;
            // Entries found below were born at or before the snapshot; its own must be younger (+1 at each clone).
            state.next_epoch()?;
            let shared = state.add_volume(|volume, current| BranchRecord {
                volume,
                head: true,
                read_only: spec.read_only,
                checksums,
                name: spec.name.clone(),
                attributes: spec.attributes.clone(),
                ..branch_on(id, &origin, volume, current, created_ms)
            })?;
            (shared, state.open.id)
        };
        self.inner.commit_through(txg)?;
        Ok(self.handle(shared))
    }

    /// Puts a volume back to a snapshot of its own history. Number, name and attributes stay, the size becomes the
    /// snapshot's; what was written since is freed in the background. O(1), durable on return; open handles go on
    /// with the old content. Keep a snapshot before if it must be undone.
    ///
    /// # Errors
    /// `NotFound` (also when the snapshot belongs to another volume), `Limit`, `Poisoned`.
    pub fn revert(&self, volume: VolumeId, id: SnapshotId) -> Result<Volume> {
        let [shared] = self
            .shared_of(&[volume])?
            .try_into()
            .map_err(|_| not_a_snapshot(&id.to_string()))?;
        // Writers are held until the revert is durable: little should be left to sync by then.
        self.inner.flush()?;
        let whole = shared.locks.lock_all(Mode::Exclusive);
        shared.alive()?;
        let txg = {
            let mut state = self.inner.state();
            let target = state.live(id)?.clone();
            if state.branch(id.branch)?.record.volume != volume {
                return Err(Error::NotFound {
                    what: format!("snapshot {id} of this volume"),
                });
            }
            check_limit("depth of reverts", state.depth(id.branch) + 1, limits::DEPTH)?;
            check_limit("volumes", state.branches.len(), limits::BRANCHES - 1)?;
            state.next_epoch()?;
            let current = state.epoch;
            let old = shared.head();
            let before = state.branch(old)?.record.clone();
            let record = BranchRecord {
                head: true,
                read_only: before.read_only,
                checksums: before.checksums,
                name: before.name,
                attributes: before.attributes,
                ..branch_on(id, &target, volume, current, before.created_ms)
            };
            let head = state.add_branch(record)?;
            state.branch_mut(old)?.head = false;
            state.add_job(JobKind::DropHead(old));
            shared.switch(head, target.size_bytes, target.block_size);
            state.open.id
        };
        self.inner.changed.notify_all();
        // A write to the new head may be acknowledged only when a kill can no longer take that head away.
        let durable = self.inner.commit_through(txg);
        drop(whole);
        durable?;
        Ok(self.handle(shared))
    }

    /// Reads a live snapshot without making a volume of it: fills `buf` from `offset` (bytes).
    ///
    /// # Errors
    /// `NotFound`, `OutOfRange`, `Medium`, `Corrupt`.
    pub fn read_snapshot(&self, id: SnapshotId, offset: u64, buf: &mut [u8]) -> Result<()> {
        // Nothing that this snapshot holds is freed meanwhile (I3).
        let _no_jobs = self
            .inner
            .job_gate
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let (size, volume) = {
            let state = self.inner.state();
            let volume = state.branches.get(&id.branch).map(|b| b.record.volume);
            (state.live(id)?.size_bytes, volume)
        };
        check_range(offset, buf.len() as u64, size)?;
        let grain = u64::from(self.inner.grain_bytes);
        let page_bytes = self.inner.page_bytes();
        let (mut runs, mut done) = (Runs::default(), 0usize);
        let mut page = None;
        while done < buf.len() {
            let at = offset + done as u64;
            let page_no = u32::try_from(at / page_bytes).expect("checked by the range");
            if page.as_ref().is_none_or(|(no, _)| *no != page_no) {
                page = Some((page_no, self.inner.resolve(id.branch, id.epoch, page_no)?.1));
            }
            let index = u8::try_from(at % page_bytes / grain).expect("64 entries");
            let len = usize::try_from(grain - at % grain)
                .expect("at most a grain")
                .min(buf.len() - done);
            let entry = page.as_ref().map_or(Entry::HOLE, |(_, p)| p.at(index));
            let within = at % grain..at % grain + len as u64;
            self.inner
                .add_grain(&mut runs, entry, within, done..done + len, at);
            done += len;
        }
        self.inner.hook("read.looked_up");
        self.inner.read_runs(&runs, volume, buf)
    }
}

/// A branch that stands on a snapshot and has written nothing yet.
fn branch_on(
    id: SnapshotId,
    origin: &SnapshotRecord,
    volume: VolumeId,
    current: Epoch,
    created_ms: i64,
) -> BranchRecord {
    BranchRecord {
        volume,
        head: true,
        read_only: false,
        checksums: Checksums::default(),
        name: String::new(),
        attributes: Vec::new(),
        size_bytes: origin.size_bytes,
        block_size: origin.block_size,
        parent: Some(id),
        current,
        mapped_grains: origin.mapped_grains,
        created_ms,
    }
}

impl State {
    /// Closes the epoch for all these volumes. Either all or none.
    fn cut(
        &mut self,
        volumes: &[Arc<Shared>],
        spec: &SnapshotSpec,
        created_ms: i64,
    ) -> Result<Vec<(VolumeId, SnapshotId)>> {
        check_limit(
            "snapshots",
            self.snapshots.len() + volumes.len(),
            limits::SNAPSHOTS,
        )?;
        for shared in volumes {
            shared.alive()?;
            if self.named_snapshot(shared.id, &spec.name).is_some() {
                return Err(Error::Exists {
                    what: format!("a snapshot {:?}", spec.name),
                });
            }
        }
        let epoch = self.next_epoch()?;
        let mut made = Vec::new();
        for shared in volumes {
            let branch: BranchId = shared.head();
            let current = self.epoch;
            let record = self.branch_mut(branch)?;
            assert!(
                record.current <= epoch,
                "a branch never writes ahead of the pool's epoch"
            );
            record.current = current;
            let snapshot = SnapshotRecord {
                name: spec.name.clone(),
                created_ms,
                size_bytes: record.size_bytes,
                block_size: record.block_size,
                mapped_grains: record.mapped_grains,
                consistency: spec.consistency,
                state: SnapshotState::Live,
                hold: spec.hold,
                sealed: false,
                lock_until_ms: spec.lock_until_ms,
                meta: spec.meta.clone(),
            };
            let id = SnapshotId { branch, epoch };
            self.put_snapshot(id, Some(snapshot));
            self.written(branch, false);
            made.push((shared.id, id));
        }
        Ok(made)
    }

    /// The record of a live snapshot.
    pub(crate) fn live(&self, id: SnapshotId) -> Result<&SnapshotRecord> {
        let found = self.snapshots.get(&id).filter(|n| n.state == SnapshotState::Live);
        found.ok_or_else(|| not_a_snapshot(&id.to_string()))
    }

    /// A live snapshot's record with a change applied.
    fn changed(&self, id: SnapshotId, change: &SnapshotChange, now_ms: i64) -> Result<SnapshotRecord> {
        let meta = change.meta.as_ref().map_or(0, Vec::len);
        check_limit(
            "bytes of a snapshot's metadata",
            meta,
            limits::SNAPSHOT_META_BYTES,
        )?;
        let mut record = self.live(id)?.clone();
        if let Some(name) = &change.name {
            check_name(name)?;
            let volume = self.branch(id.branch)?.record.volume;
            if self.named_snapshot(volume, name).is_some_and(|other| other != id) {
                return Err(Error::Exists {
                    what: format!("a snapshot {name:?}"),
                });
            }
            record.name.clone_from(name);
        }
        if let Some(until) = change.lock_until_ms {
            if record.lock_until_ms > now_ms && until < record.lock_until_ms {
                return Err(Error::refused("a running lock cannot be shortened"));
            }
            record.lock_until_ms = until;
        }
        record.consistency = change.consistency.unwrap_or(record.consistency);
        record.hold = change.hold.unwrap_or(record.hold);
        if let Some(meta) = &change.meta {
            record.meta.clone_from(meta);
        }
        Ok(record)
    }

    /// The live snapshot of that name in a volume's history.
    pub(crate) fn named_snapshot(&self, volume: VolumeId, name: &str) -> Option<SnapshotId> {
        self.live_snapshots(volume)
            .into_iter()
            .find(|id| self.snapshots.get(id).is_some_and(|n| n.name == name))
    }

    /// Refuses to delete what its owner keeps.
    pub(crate) fn check_deletable(&self, id: SnapshotId, now_ms: i64) -> Result<()> {
        let record = self.live(id)?;
        if record.hold {
            return Err(Error::refused(format!(
                "snapshot {:?} is held: release it first",
                record.name
            )));
        }
        if record.lock_until_ms > now_ms {
            return Err(Error::refused(format!(
                "snapshot {:?} is locked until {}",
                record.name,
                jiff::Timestamp::from_millisecond(record.lock_until_ms)
                    .map_or_else(|_| "the end of time".into(), |t| t.to_string())
            )));
        }
        Ok(())
    }

    fn info(&self, id: SnapshotId, inner: &Inner) -> Option<SnapshotInfo> {
        self.info_with(id, inner, self.children(id).count())
    }

    fn info_with(&self, id: SnapshotId, inner: &Inner, children: usize) -> Option<SnapshotInfo> {
        let n = self.snapshots.get(&id)?;
        let volume = self.branches.get(&id.branch)?.record.volume;
        let head = self
            .volumes
            .get(&volume)
            .and_then(|s| self.branches.get(&s.head()));
        Some(SnapshotInfo {
            id,
            volume,
            volume_name: head.map(|b| b.record.name.clone()).unwrap_or_default(),
            name: n.name.clone(),
            created_ms: n.created_ms,
            size_bytes: n.size_bytes,
            block_size: n.block_size,
            mapped_bytes: crate::record::counted(n.mapped_grains) * u64::from(inner.grain_bytes),
            consistency: n.consistency,
            state: n.state,
            hold: n.hold,
            sealed: n.sealed,
            lock_until_ms: n.lock_until_ms,
            children,
            meta: n.meta.clone(),
        })
    }
}

pub(crate) fn not_a_snapshot(name: &str) -> Error {
    Error::NotFound {
        what: format!("snapshot {name}"),
    }
}
