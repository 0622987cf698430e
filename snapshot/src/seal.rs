//! Sealing: recording the checksums of what a snapshot holds, in the background.
//!
//! A checksum may be recorded only of bytes that nobody could change between the moment when they were read and the
//! moment when the entry has it (from then on it is never overwritten in place, I5). Grains that a snapshot holds are
//! such: the cut has waited for every write, and later ones go elsewhere as long as the hold lasts. Holds end inside the
//! steps of background jobs only; the sealer keeps those out from before the read until after the entry is changed, and so is
//! a hold itself. A crash in between leaves entries without checksums, which is no harm.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::Result;
use crate::inner::Inner;
use crate::lock::lock;
use crate::map::{PageAt, Version};
use crate::page::{Entry, Page, PageNo};
use crate::pool::Pool;
use crate::record::PageKey;
use crate::state::State;
use crate::types::{BranchId, Checksums, Epoch, SnapshotId, SnapshotState};

/// Pages per step: jobs wait for one step at most.
const STEP_PAGES: usize = 64;
/// How often the sealer looks for work, at least.
const TURN: Duration = Duration::from_millis(1000);
/// The cursor is on disk only as "done": a start in between begins the snapshot again, and finds its pages sealed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SealCursor {
    /// What is being sealed, and its next page.
    now: Option<(SnapshotId, PageNo)>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sealed {
    /// Bytes that were read.
    pub(crate) bytes: u64,
    /// There is nothing more to do now.
    pub(crate) idle: bool,
}

/// Seals until the pool stops or is poisoned, at a bounded rate.
pub(crate) fn seal(inner: &Inner) {
    loop {
        let begun = Instant::now();
        let age_ms = i64::try_from(inner.options.seal_after_ms).unwrap_or(i64::MAX);
        let rest = match inner.seal_step(inner.now_ms().saturating_sub(age_ms)) {
            Ok(Sealed { idle: true, .. }) => TURN,
            Ok(Sealed { bytes, .. }) => {
                // A page takes a look-up also when nothing of it is read.
                let ms = (bytes + 4096).saturating_mul(1000) / inner.options.seal_rate.max(1);
                Duration::from_millis(ms).saturating_sub(begun.elapsed())
            }
            Err(e) => {
                tracing::error!("recording of checksums stopped until the next start: {e}");
                return;
            }
        };
        let until = Instant::now() + rest;
        let mut state = inner.state();
        loop {
            if state.stopping || inner.poison.check().is_err() {
                return;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = inner
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Pool {
    /// Records checksums of what snapshots hold, whatever their age: up to `steps` steps of 64 pages; gives how many
    /// there were to do. The background does it on its own.
    ///
    /// # Errors
    /// `Poisoned`, `Corrupt`.
    pub fn run_sealing(&self, steps: usize) -> Result<usize> {
        for done in 0..steps {
            if self.inner.seal_step(i64::MAX)?.idle {
                return Ok(done);
            }
        }
        Ok(steps)
    }
}

impl Inner {
    /// One step for the first snapshot that was cut before `made_before_ms` and is not sealed.
    ///
    /// # Errors
    /// `Poisoned`, `Corrupt`.
    pub(crate) fn seal_step(&self, made_before_ms: i64) -> Result<Sealed> {
        self.poison.check()?;
        let _alone = lock(&self.sealing);
        let _no_jobs = self.job_gate.read().unwrap_or_else(PoisonError::into_inner);
        let Some((snapshot, cursor)) = self.state().next_to_seal(made_before_ms) else {
            return Ok(Sealed { bytes: 0, idle: true });
        };
        // `E` lists what is committed: the cut, and the last step of a job.
        self.commit_now()?;
        let (branch, older, family) = {
            let state = self.state();
            let older = state.older_holder(snapshot);
            (snapshot.branch, older, state.family(snapshot.branch))
        };
        let changed = self.changed_pages(branch, older, snapshot.epoch, cursor, STEP_PAGES)?;
        let mut bytes = 0;
        for (page, epochs) in &changed.pages {
            for epoch in epochs {
                let key = PageKey {
                    branch,
                    page: *page,
                    epoch: *epoch,
                };
                bytes += self.seal_page(key, &family)?;
            }
            self.hook("seal.page");
        }
        let mut state = self.state();
        match changed.next {
            Some(next) => state.seal.now = Some((snapshot, next)),
            None => state.sealed(snapshot),
        }
        Ok(Sealed { bytes, idle: false })
    }

    /// Records what one version of a page lacks; gives the bytes that were read for it.
    fn seal_page(&self, key: PageKey, family: &[BranchId]) -> Result<u64> {
        let page = self.exact(key)?;
        let lacking: Vec<(u8, Entry)> = {
            let state = self.state();
            let all = (0u8..).zip(page.iter());
            all.filter(|(_, e)| e.crc().is_none() && e.grain().is_some_and(|g| !state.bad.contains(g)))
                .collect()
        };
        if lacking.is_empty() {
            return Ok(0);
        }
        let mut sums = Vec::new();
        for run in lacking.chunk_by(|(_, a), (_, b)| b.grain() == a.grain().map(|g| g + 1)) {
            self.read_sums(key.page, run, &mut sums);
        }
        self.hook("seal.read");
        let at = (key.branch, key.page);
        loop {
            self.load_page(at)?;
            let mut state = self.state();
            if state.map.contains(at) {
                state.record_sums(key, &page, &sums, family);
                break;
            }
        }
        Ok(lacking.len() as u64 * u64::from(self.grain_bytes))
    }

    /// Reads neighbouring grains and adds their entries with checksums. What cannot be read gets none.
    fn read_sums(&self, page: PageNo, run: &[(u8, Entry)], sums: &mut Vec<(u8, Entry)>) {
        let size = self.grain_bytes as usize;
        let Some((first, entry)) = run.first() else { return };
        let mut runs = crate::volume::Runs::default();
        let offset = u64::from(page) * self.page_bytes() + u64::from(*first) * u64::from(self.grain_bytes);
        runs.add(entry.grain().map(|g| self.place(g)), 0..run.len() * size, offset);
        let mut bytes = vec![0; run.len() * size];
        if self.read_runs(&runs, None, &mut bytes).is_ok() {
            let crcs = bytes.chunks_exact(size).map(crc32c::crc32c);
            let entries = run.iter().zip(crcs);
            sums.extend(entries.map(|((index, entry), crc)| (*index, entry.with_crc(Some(crc)))));
        } else if run.len() > 1 {
            run.chunks(1).for_each(|one| self.read_sums(page, one, sums));
        }
    }
}

impl State {
    fn next_to_seal(&mut self, made_before_ms: i64) -> Option<(SnapshotId, PageNo)> {
        let wanted = |state: &Self, id: &SnapshotId| {
            state.snapshots.get(id).is_some_and(|n| {
                !n.sealed && n.state != SnapshotState::Dying && n.created_ms <= made_before_ms
            }) && !state.loans.reach(*id)
                && state
                    .branches
                    .get(&id.branch)
                    .is_some_and(|b| b.record.checksums != Checksums::Off)
        };
        let now = self.seal.now.filter(|(id, _)| wanted(self, id));
        self.seal.now = now.or_else(|| {
            let mut ids = self.snapshots.keys();
            ids.find(|id| wanted(self, id)).map(|id| (*id, 0))
        });
        self.seal.now
    }

    /// Epoch of what holds the grains of a branch below a snapshot.
    fn older_holder(&self, id: SnapshotId) -> Epoch {
        let below = self.snapshots_of(id.branch).map(|(s, _)| s.epoch);
        below
            .take_while(|e| *e < id.epoch)
            .last()
            .unwrap_or_else(|| self.origin(id.branch))
    }

    /// A branch and all that stand on it, directly or not.
    fn family(&self, branch: BranchId) -> Vec<BranchId> {
        let mut family = vec![branch];
        // Numbers grow from parent to child.
        for (id, b) in self.branches.range(branch..).skip(1) {
            if b.record.parent.is_some_and(|p| family.contains(&p.branch)) {
                family.push(*id);
            }
        }
        family
    }

    /// Puts checksums into one version, and into the newest versions of the family that show the same placements: what
    /// heads read is then verified too.
    fn record_sums(&mut self, key: PageKey, stored: &Page, sums: &[(u8, Entry)], family: &[BranchId]) {
        let at = (key.branch, key.page);
        if self.map.exact(key).is_none() {
            // It leaves RAM only as it is in the store, and nobody but us changes it.
            self.map.put(at, Version::clean(Some(key.epoch), stored.clone()));
        }
        self.record_in(key, sums);
        for branch in family {
            self.record_newest((*branch, key.page), sums);
        }
    }

    fn record_newest(&mut self, at: PageAt, sums: &[(u8, Entry)]) {
        let Ok(held) = self.branch(at.0).map(|b| b.holds.newest(at.1)) else {
            return;
        };
        let Some(version) = self.map.newest_mut(at) else {
            return;
        };
        match version.epoch {
            Some(epoch) => {
                let key = PageKey {
                    branch: at.0,
                    page: at.1,
                    epoch,
                };
                let held: Vec<_> = sums.iter().copied().filter(|(_, e)| e.birth() <= held).collect();
                self.record_in(key, &held);
            }
            // It shows what lies below, and is not stored.
            None => {
                for (index, entry) in sums {
                    if version.page.at(*index).same_place(*entry) {
                        version.page.set(*index, *entry);
                    }
                }
            }
        }
    }

    fn record_in(&mut self, key: PageKey, sums: &[(u8, Entry)]) {
        let mut any = false;
        for (index, entry) in sums {
            let Some(version) = self.map.exact_mut(key) else {
                return;
            };
            let old = version.page.at(*index);
            if old.same_place(*entry) && old.crc().is_none() {
                version.page.set(*index, *entry);
                self.open.remember(key, *index, old);
                any = true;
            }
        }
        if any {
            self.map.touch(key, self.open.id);
            self.open.mark();
        }
    }

    /// All pages of a snapshot are done.
    fn sealed(&mut self, id: SnapshotId) {
        self.seal.now = None;
        if let Some(mut record) = self.snapshots.get(&id).cloned() {
            record.sealed = true;
            self.put_snapshot(id, Some(record));
        }
    }

    /// A snapshot goes that was not sealed: versions that only it had belong to the next one.
    pub(crate) fn unseal_next(&mut self, going: SnapshotId) {
        if self.snapshots.get(&going).is_none_or(|n| n.sealed) {
            return;
        }
        let next = self
            .snapshots_of(going.branch)
            .find(|(id, _)| id.epoch > going.epoch);
        if let Some((id, record)) = next.map(|(id, record)| (id, record.clone()))
            && record.sealed
        {
            self.put_snapshot(
                id,
                Some(crate::record::SnapshotRecord {
                    sealed: false,
                    ..record
                }),
            );
        }
    }
}
