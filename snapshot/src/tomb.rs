//! Tombstones: a very large range reads as zeroes at once, and its pages are worked through afterwards.
//!
//! A tombstone takes an epoch, as a cut does, and is a job (`D`) until its pages are done. Whoever looks at the branch as of
//! a later epoch (the head, snapshots cut since, what stands on those) sees nothing in its range that was born up to that
//! epoch; older snapshots see everything. A page is *buried* for good by the job, or before the first change to it: what the
//! older snapshots do not hold is released, and the page gets a version of the epoch after the tombstone's where they see
//! the one before.

use std::collections::BTreeSet;

use crate::inner::Inner;
use crate::loan::Loans;
use crate::lock::Mode;
use crate::map::Version;
use crate::page::{Entry, Page, PageNo};
use crate::record::{JobKind, JobRecord, PageKey, SnapshotRecord};
use crate::state::State;
use crate::types::{BranchId, Epoch, SnapshotId};
use crate::volume::Volume;
use crate::{Error, Result};

/// Tombstones of one branch at a time: further ranges are worked through before they are answered.
const MOST: usize = 16;

/// A range of pages that an unfinished job zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tomb {
    job: u64,
    pub(crate) branch: BranchId,
    /// What was born up to here is gone for everybody who looks as of a later epoch.
    pub(crate) epoch: Epoch,
    pub(crate) first: PageNo,
    /// The page after the last.
    pub(crate) end: PageNo,
    unmap: bool,
    /// Entries with a grain that were buried so far.
    masked: u64,
}

impl Tomb {
    /// Of a job, if it is one.
    pub(crate) fn of(job: u64, record: &JobRecord) -> Option<Self> {
        let JobKind::Zero {
            branch,
            epoch,
            first,
            end,
            unmap,
        } = record.kind
        else {
            return None;
        };
        Some(Self {
            job,
            branch,
            epoch,
            first,
            end,
            unmap,
            masked: record.masked,
        })
    }

    /// Where it is in the history of its branch.
    fn at(&self) -> SnapshotId {
        SnapshotId {
            branch: self.branch,
            epoch: self.epoch,
        }
    }

    /// Whether it changes what a reader of its branch at `epoch` sees of a page.
    fn hides(&self, epoch: Epoch, page: PageNo) -> bool {
        self.epoch < epoch && (self.first..self.end).contains(&page)
    }

    /// Buries what a page has from before.
    fn mask(&self, page: &mut Page) {
        for index in 0..64u8 {
            let entry = page.at(index);
            if !entry.is_hole() && entry.birth() <= self.epoch {
                let zero = !self.unmap && (entry.is_zero() || entry.grain().is_some());
                page.set(
                    index,
                    if zero {
                        Entry::zero(self.epoch)
                    } else {
                        Entry::HOLE
                    },
                );
            }
        }
    }
}

/// The tombstones of a pool, by branch and epoch. Few.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tombs(Vec<Tomb>);

impl Tombs {
    pub(crate) fn of<'a>(jobs: impl IntoIterator<Item = (&'a u64, &'a JobRecord)>) -> Self {
        let tombs = jobs.into_iter().filter_map(|(id, job)| Tomb::of(*id, job));
        let mut list: Vec<Tomb> = tombs.collect();
        list.sort_by_key(|t| (t.branch, t.epoch));
        Self(list)
    }

    /// Those of a branch, oldest first.
    pub(crate) fn of_branch(&self, branch: BranchId) -> impl Iterator<Item = &Tomb> {
        self.0.iter().filter(move |t| t.branch == branch)
    }

    /// Buries what a reader of `branch` at `epoch` does not see of a page.
    pub(crate) fn mask(&self, branch: BranchId, epoch: Epoch, no: PageNo, page: &mut Page) {
        self.of_branch(branch)
            .filter(|t| t.hides(epoch, no))
            .for_each(|t| t.mask(page));
    }

    /// Those that hide something of a page from a reader.
    pub(crate) fn over(&self, branch: BranchId, epoch: Epoch, page: PageNo) -> Self {
        let over = self.of_branch(branch).filter(|t| t.hides(epoch, page));
        Self(over.copied().collect())
    }

    /// Adds those of another level of a look-up.
    pub(crate) fn join(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    /// Buries what all of these do.
    pub(crate) fn mask_all(&self, page: &mut Page) {
        self.0.iter().for_each(|t| t.mask(page));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// By how much the recorded count of mapped entries of a reader is ahead of what the map has: what was buried
    /// comes off when a tombstone is done. `below` gives what a branch stands on.
    pub(crate) fn ahead(
        &self,
        mut reader: SnapshotId,
        below: impl Fn(BranchId) -> Option<SnapshotId>,
    ) -> u64 {
        let mut ahead = 0;
        loop {
            let seen = self.of_branch(reader.branch).filter(|t| t.epoch < reader.epoch);
            ahead += seen.map(|t| t.masked).sum::<u64>();
            match below(reader.branch) {
                Some(parent) => reader = parent,
                None => return ahead,
            }
        }
    }
}

impl State {
    /// The head's page, which is in RAM, as a reader sees it.
    pub(crate) fn head_page(&mut self, branch: BranchId, no: PageNo) -> Option<Page> {
        if !self.loans.is_empty() && !self.has_page((branch, no)) {
            return None;
        }
        let mut page = self.map.newest((branch, no))?.page.clone();
        self.tombs.mask(branch, Epoch::MAX, no, &mut page);
        Some(page)
    }

    /// Follows the jobs.
    pub(crate) fn refresh_views(&mut self) {
        self.tombs = Tombs::of(&self.jobs);
        self.loans = Loans::of(&self.jobs);
    }

    /// Zeroes whole pages of a branch that has more than a few, in one step; `None` when there are too many
    /// tombstones.
    fn bury(&mut self, branch: BranchId, first: PageNo, end: PageNo, unmap: bool) -> Result<Option<u64>> {
        if self.tombs.of_branch(branch).count() >= MOST {
            return Ok(None);
        }
        let epoch = self.next_epoch()?;
        let current = self.epoch;
        self.branch_mut(branch)?.current = current;
        self.written(branch, true);
        self.add_job(JobKind::Zero {
            branch,
            epoch,
            first,
            end,
            unmap,
        });
        Ok(Some(self.open.id))
    }

    /// Buries a page, which is in RAM, before anything is changed in it. One that a loan shows is taken over before.
    pub(crate) fn bury_page(&mut self, branch: BranchId, no: PageNo) -> Result<()> {
        self.take_over(branch, no);
        for tomb in self.tombs.over(branch, Epoch::MAX, no).0 {
            self.bury_under(&tomb, no)?;
        }
        Ok(())
    }

    fn bury_under(&mut self, tomb: &Tomb, no: PageNo) -> Result<()> {
        let (branch, at) = (tomb.branch, (tomb.branch, no));
        let newest = self.map.newest(at).expect("the caller has the page in RAM");
        let (own, before) = (newest.epoch, newest.page.clone());
        if own.is_some_and(|epoch| epoch > tomb.epoch) {
            // It began after the tombstone, and buried.
            return Ok(());
        }
        let mut after = before.clone();
        tomb.mask(&mut after);
        let changes: Vec<(u8, Entry, Entry)> = (0u8..)
            .zip(before.iter().zip(after.iter()))
            .filter(|(_, (old, new))| !old.same_place(*new))
            .map(|(index, (old, new))| (index, old, new))
            .collect();
        if changes.is_empty() {
            return Ok(());
        }
        let held = self.branch(branch)?.holds.newest_upto(no, tomb.epoch);
        let epoch = match own {
            // Nobody looks at it as of the tombstone's time or before.
            Some(epoch) if epoch > held => epoch,
            _ => {
                let epoch = Epoch(tomb.epoch.0 + 1);
                let fresh = Version {
                    based: false,
                    ..Version::clean(Some(epoch), before)
                };
                self.map.push(at, fresh);
                self.open.created.insert(PageKey {
                    branch,
                    page: no,
                    epoch,
                });
                epoch
            }
        };
        let key = PageKey {
            branch,
            page: no,
            epoch,
        };
        let mut masked = 0;
        for (index, old, new) in changes {
            let version = self.map.exact_mut(key).expect("just chosen");
            version.page.set(index, new);
            self.open.remember(key, index, old);
            if let Some(grain) = old.grain() {
                masked += 1;
                if old.birth() > held {
                    self.open.releases.push(grain);
                }
            }
        }
        self.map.touch(key, self.open.id);
        self.open.mark();
        if let Some(job) = self.jobs.get_mut(&tomb.job) {
            job.masked += masked;
            self.open.jobs.insert(tomb.job);
        }
        Ok(())
    }

    fn is_seen(&self, tomb: &Tomb) -> bool {
        self.is_seen_after(tomb.at())
    }

    /// Whether anybody looks at a branch as of a later epoch: otherwise a job frees what was below, or older snapshots
    /// have it.
    pub(crate) fn is_seen_after(&self, at: SnapshotId) -> bool {
        self.branches.get(&at.branch).is_some_and(|b| b.record.head)
            || self.snapshots_of(at.branch).any(|(id, _)| id.epoch > at.epoch)
    }

    /// All pages are done: the counts of everybody who looks as of a later epoch follow.
    fn finish_zero(&mut self, tomb: &Tomb) -> Result<()> {
        let masked = self.jobs.get(&tomb.job).map_or(0, |j| j.masked);
        self.recount(tomb.at(), -i64::try_from(masked).unwrap_or(i64::MAX))?;
        self.end_job(tomb.job);
        self.follow_up();
        Ok(())
    }

    /// Adds to the counts of mapped entries of everybody who looks at a branch as of a later epoch: its head, its later
    /// snapshots, what stands on those.
    pub(crate) fn recount(&mut self, at: SnapshotId, by: i64) -> Result<()> {
        let mut after: BTreeSet<SnapshotId> = BTreeSet::new();
        // Numbers grow from parent to child.
        let branches: Vec<BranchId> = self.branches.range(at.branch..).map(|(id, _)| *id).collect();
        for branch in branches {
            let parent = self.branches.get(&branch).and_then(|b| b.record.parent);
            let since = match parent {
                _ if branch == at.branch => at.epoch,
                Some(p) if after.contains(&p) => Epoch::ZERO,
                _ => continue,
            };
            let later = self.snapshots_of(branch).filter(|(id, _)| id.epoch > since);
            let later: Vec<_> = later.map(|(id, record)| (id, record.clone())).collect();
            for (id, record) in later {
                after.insert(id);
                let mapped_grains = record.mapped_grains.wrapping_add_signed(by);
                self.put_snapshot(
                    id,
                    Some(SnapshotRecord {
                        mapped_grains,
                        ..record
                    }),
                );
            }
            let record = self.branch_mut(branch)?;
            record.mapped_grains = record.mapped_grains.wrapping_add_signed(by);
        }
        Ok(())
    }
}

impl Inner {
    /// One step of a tombstone's job.
    pub(crate) fn zero_step(&self, id: u64, job: JobRecord) -> Result<()> {
        let Some(tomb) = Tomb::of(id, &job) else {
            return Ok(());
        };
        let mut cursor = job.cursor.max(tomb.first);
        for _ in 0..self.options.job_pages.max(1) {
            if !self.state().is_seen(&tomb) {
                cursor = tomb.end;
                break;
            }
            let last = tomb.end.saturating_sub(1);
            let Some(next) = self.next_present(tomb.branch, cursor, last)? else {
                cursor = tomb.end;
                break;
            };
            self.hook("job.page");
            self.with_page(tomb.branch, next, |state| state.bury_page(tomb.branch, next))?;
            cursor = next + 1;
        }
        if cursor < tomb.end {
            self.state().advance(id, cursor, tomb.branch);
            return Ok(());
        }
        // What was made above a buried page must not be made again above one that is not: no delta of this time is
        // needed any more when the tombstone goes.
        self.commit_now()?;
        let durable = self.state().durable;
        self.checkpoint(durable)?;
        let mut state = self.state();
        if state.is_seen(&tomb) {
            state.finish_zero(&tomb)
        } else {
            state.end_job(id);
            state.follow_up();
            Ok(())
        }
    }

    /// Up to `limit` pages of `from..=to` that a branch may show something of, and where the list goes on.
    pub(crate) fn present_pages(
        &self,
        branch: BranchId,
        from: PageNo,
        to: PageNo,
        limit: usize,
    ) -> Result<(Vec<PageNo>, Option<PageNo>)> {
        let (mut pages, mut at) = (Vec::new(), Some(from));
        while let Some(from) = at {
            if pages.len() >= limit {
                return Ok((pages, at));
            }
            let next = self.next_present(branch, from, to)?;
            pages.extend(next);
            at = next.and_then(|p| p.checked_add(1)).filter(|p| *p <= to);
        }
        Ok((pages, None))
    }
}

impl Volume {
    /// Zeroes a very large range with a tombstone: its border pages now, the others for everybody who looks from now
    /// on. `false` when it must be done the long way. Durable on return.
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub(crate) fn bury(&self, offset: u64, len: u64, unmap: bool) -> Result<bool> {
        let page_bytes = self.pool.page_bytes();
        let (first, end) = (offset.div_ceil(page_bytes), (offset + len) / page_bytes);
        let number = |page: u64| {
            PageNo::try_from(page).map_err(|_| Error::OutOfRange {
                offset,
                len,
                size: self.size_bytes(),
            })
        };
        let (first_page, end_page) = (number(first)?, number(end)?);
        if first_page >= end_page {
            return Ok(false);
        }
        self.pool.throttle()?;
        let txg = {
            // What was issued before is done, what comes later finds the tombstone.
            let _range = self.lock(offset, len, Mode::Exclusive)?;
            self.zero_locked(offset..first * page_bytes, unmap, false)?;
            self.zero_locked(end * page_bytes..offset + len, unmap, false)?;
            let branch = self.shared.head();
            if self
                .pool
                .next_present(branch, first_page, end_page - 1)?
                .is_none()
            {
                return Ok(true);
            }
            match self.pool.state().bury(branch, first_page, end_page, unmap)? {
                Some(txg) => txg,
                None => return Ok(false),
            }
        };
        self.pool.changed.notify_all();
        self.pool.hook("zero.buried");
        // The warm log knows nothing of it.
        self.pool.commit_through(txg)?;
        Ok(true)
    }
}
