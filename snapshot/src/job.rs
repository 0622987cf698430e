//! Background jobs: freeing what only a deleted snapshot or an abandoned head holds, and folding branches. One job at
//! a time, in the order in which they were made, a bounded number of pages per commit, resumed by page number.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use crate::inner::Inner;
use crate::map::Version;
use crate::page::{Page, PageNo};
use crate::record::{JobKind, JobRecord, Key, PageKey, key};
use crate::state::State;
use crate::types::{BranchId, Epoch, SnapshotId, StoreEvent};
use crate::{Error, Result};

/// Pages whose versions are read before the lock is taken to compare them.
const BATCH: usize = 64;
/// Fewest keys read per epoch when many epochs are merged.
const LEAST_KEYS: usize = 16;

/// Pages with a version in a range of epochs, and the page from which on the list is not complete.
pub(crate) struct Changed {
    pub(crate) pages: BTreeMap<PageNo, Vec<Epoch>>,
    pub(crate) next: Option<PageNo>,
}

/// A page of a job and what was read for it.
struct Candidate {
    page: PageNo,
    /// Versions that may go, oldest first.
    versions: Vec<(Epoch, Page)>,
    /// The stored version that follows them.
    newer: Option<(Epoch, Page)>,
}

/// Who sees versions below and above those of a job.
struct Neighbours {
    /// Entries born up to here belong to an older snapshot (or to the branch below).
    older: Epoch,
    /// Versions up to here hide the job's from everybody; `None` = nobody is above.
    newer: Option<Epoch>,
}

/// Counts a step of a job until it is durable.
struct Step<'a>(&'a Inner);

impl<'a> Step<'a> {
    fn of(inner: &'a Inner) -> Self {
        inner.steps.fetch_add(1, Ordering::AcqRel);
        Self(inner)
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.steps.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Inner {
    /// One step of the first job, committed; `false` when there is nothing to do.
    ///
    /// # Errors
    /// `Poisoned`, `Corrupt`.
    pub(crate) fn job_step(&self) -> Result<bool> {
        self.poison.check()?;
        let first = {
            let state = self.state();
            state
                .jobs
                .iter()
                .next()
                .map(|(id, job)| (*id, *job, state.job_since.get(id).copied()))
        };
        let Some((id, job, since)) = first else {
            return Ok(false);
        };
        // What the job will free must not be held by the durable state any more, and its pages must be listed in `E`.
        self.commit_through(since.unwrap_or(0))?;
        let _step = Step::of(self);
        {
            let _alone = self
                .job_gate
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            self.hook("job.step");
            match job.kind {
                JobKind::DropSnapshot(s) => self.drop_step(id, job, s.branch, Some(s.epoch))?,
                JobKind::DropHead(b) => self.drop_step(id, job, b, None)?,
                JobKind::Collapse { from, into } => self.collapse_step(id, job, from, into)?,
                JobKind::Zero { .. } => self.zero_step(id, job)?,
                JobKind::Lend { .. } => self.lend_step(id, job)?,
            }
        }
        // The next step lists versions again: those removed by this one must be gone from the store.
        self.commit_now()?;
        Ok(true)
    }

    /// Frees versions of one snapshot's interval (`upto`), or of the head.
    fn drop_step(&self, id: u64, job: JobRecord, branch: BranchId, upto: Option<Epoch>) -> Result<()> {
        let last = upto.unwrap_or(Epoch(u32::MAX));
        let older = {
            let mut state = self.state();
            let gone = match upto {
                Some(epoch) => !state.snapshots.contains_key(&SnapshotId { branch, epoch }),
                None => !state.branches.contains_key(&branch),
            };
            if gone {
                state.end_job(id);
                return Ok(());
            }
            state.neighbours(branch, upto).older
        };
        let changed = self.changed_pages(branch, older, last, job.cursor, self.options.job_pages)?;
        let pages: Vec<(PageNo, Vec<Epoch>)> = changed.pages.into_iter().collect();
        for batch in pages.chunks(BATCH) {
            self.hook("job.page");
            self.drop_batch(id, branch, upto, batch)?;
        }
        let mut state = self.state();
        match changed.next {
            Some(cursor) => state.advance(id, cursor, branch),
            None => state.finish_drop(id, branch, upto),
        }
        Ok(())
    }

    fn drop_batch(
        &self,
        id: u64,
        branch: BranchId,
        upto: Option<Epoch>,
        batch: &[(PageNo, Vec<Epoch>)],
    ) -> Result<()> {
        loop {
            let generation = self.state().map.clean_gen;
            let candidates = batch
                .iter()
                .map(|(page, epochs)| self.candidate(branch, *page, epochs))
                .collect::<Result<Vec<_>>>()?;
            let mut state = self.state();
            // A version that left RAM since it was looked for is in the store now: look again.
            if state.map.clean_gen != generation {
                continue;
            }
            let neighbours = state.neighbours(branch, upto);
            state.handled(candidates.len());
            candidates
                .iter()
                .for_each(|c| state.drop_page(branch, &neighbours, c));
            if let Some((page, _)) = batch.last() {
                state.advance(id, page.saturating_add(1), branch);
            }
            return Ok(());
        }
    }

    fn candidate(&self, branch: BranchId, page: PageNo, epochs: &[Epoch]) -> Result<Candidate> {
        let version = |epoch: &Epoch| {
            Ok((
                *epoch,
                self.exact(PageKey {
                    branch,
                    page,
                    epoch: *epoch,
                })?,
            ))
        };
        let versions = epochs.iter().map(version).collect::<Result<Vec<_>>>()?;
        let youngest = epochs.last().copied().unwrap_or(Epoch::ZERO);
        let newer = self
            .stored_after(branch, page, youngest)?
            .map(|(k, p)| (k.epoch, p));
        Ok(Candidate {
            page,
            versions,
            newer,
        })
    }

    /// Pages of a branch that have a version in `after < epoch <= upto`, from page `from` on, about `limit` of them.
    pub(crate) fn changed_pages(
        &self,
        branch: BranchId,
        after: Epoch,
        upto: Epoch,
        from: PageNo,
        limit: usize,
    ) -> Result<Changed> {
        let epochs = self.epochs_in(branch, after, upto)?;
        let each = (limit / epochs.len().max(1)).max(LEAST_KEYS);
        let mut pages: BTreeMap<PageNo, Vec<Epoch>> = BTreeMap::new();
        let mut complete: Option<PageNo> = None;
        for epoch in epochs {
            let start = key::changed_from(branch, epoch, from);
            let found = self.meta(self.meta.scan(start, key::changed_end(branch, epoch), each))?;
            let full = found.len() == each;
            let mut last = from;
            for (k, _) in found {
                last = changed_key(&k)?.page;
                pages.entry(last).or_default().push(epoch);
            }
            if full {
                complete = Some(complete.map_or(last, |c| c.min(last)));
            }
        }
        if let Some(complete) = complete {
            pages.retain(|page, _| *page <= complete);
        }
        Ok(Changed {
            pages,
            next: complete.and_then(|c| c.checked_add(1)),
        })
    }

    /// Epochs of a branch's versions in `after < epoch <= upto`, ascending.
    fn epochs_in(&self, branch: BranchId, after: Epoch, upto: Epoch) -> Result<Vec<Epoch>> {
        let mut epochs = Vec::new();
        let mut next = after.0.checked_add(1);
        while let Some(from) = next {
            let start = key::changed_from(branch, Epoch(from), 0);
            let found = self.meta(self.meta.scan(start, key::changed_end(branch, upto), 1))?;
            let Some((k, _)) = found.first() else { break };
            let epoch = changed_key(k)?.epoch;
            epochs.push(epoch);
            next = epoch.0.checked_add(1);
        }
        Ok(epochs)
    }

    /// Moves pages of a branch without head and with one hidden snapshot up into its only child.
    fn collapse_step(&self, id: u64, job: JobRecord, from: SnapshotId, into: BranchId) -> Result<()> {
        let dirty = {
            let mut state = self.state();
            let valid = state.snapshots.contains_key(&from)
                && state
                    .branches
                    .get(&into)
                    .is_some_and(|b| b.record.parent == Some(from))
                // Nobody would free what moves into a branch after its own jobs. Once begun, those come later.
                && (job.cursor > 0 || state.is_wanted(into));
            if !valid {
                state.end_job(id);
                state.follow_up();
                return Ok(());
            }
            // The branch does not change any more; once stored, all of its pages can be listed in order.
            let dirty = state.map.next_dirty(from.branch, 0, PageNo::MAX).is_some();
            dirty.then_some(state.durable)
        };
        if let Some(durable) = dirty {
            self.checkpoint(durable)?;
        }
        let limit = self.options.job_pages.max(2);
        let start = key::page(PageKey {
            branch: from.branch,
            page: job.cursor,
            epoch: Epoch(u32::MAX),
        });
        let found = self.meta(self.meta.scan(start, key::pages_end(from.branch), limit))?;
        let full = found.len() == limit;
        for (k, v) in found {
            self.hook("job.page");
            let (k, page) = crate::inner::parse_page(&k, &v)?;
            self.collapse_page(id, k, &page, into)?;
        }
        if !full {
            let mut state = self.state();
            state.replace_branch(from, into)?;
            state.end_job(id);
            state.refresh_holds(into);
            state.follow_up();
        }
        Ok(())
    }

    fn collapse_page(&self, id: u64, old: PageKey, page: &Page, into: BranchId) -> Result<()> {
        let at = (into, old.page);
        loop {
            let generation = self.state().map.clean_gen;
            self.load_page(at)?;
            let stored = self
                .stored_after(into, old.page, Epoch::ZERO)?
                .map(|(k, p)| (k.epoch, p));
            let mut state = self.state();
            if state.map.clean_gen != generation || !state.map.contains(at) {
                continue;
            }
            state.fold_page(old, page, into, stored);
            // One version per page (I6): the branch has a single interval.
            state.advance(id, old.page.saturating_add(1), into);
            return Ok(());
        }
    }
}

fn changed_key(bytes: &[u8]) -> Result<PageKey> {
    match Key::parse(bytes)? {
        Key::Changed(k) => Ok(k),
        _ => Err(Error::corrupt("E key", crate::codec::hex(bytes))),
    }
}

impl State {
    /// The holders next to a snapshot's interval (or to the head's).
    fn neighbours(&self, branch: BranchId, upto: Option<Epoch>) -> Neighbours {
        let last = upto.unwrap_or(Epoch(u32::MAX));
        let below = self
            .snapshots_of(branch)
            .map(|(id, _)| id.epoch)
            .rfind(|e| *e < last);
        let older = below.unwrap_or_else(|| self.origin(branch));
        let above = self
            .snapshots_of(branch)
            .map(|(id, _)| id.epoch)
            .find(|e| *e > last);
        let has_head = self.branches.get(&branch).is_some_and(|b| b.record.head)
            || self.jobs.values().any(|j| j.kind == JobKind::DropHead(branch));
        let newer = match upto {
            None => None,
            Some(_) => above.or_else(|| has_head.then_some(Epoch(u32::MAX))),
        };
        Neighbours { older, newer }
    }

    /// Removes the versions of one page that nobody sees any more, and releases what only they placed.
    fn drop_page(&mut self, branch: BranchId, neighbours: &Neighbours, candidate: &Candidate) {
        let at = (branch, candidate.page);
        for (i, (epoch, page)) in candidate.versions.iter().enumerate() {
            let key = PageKey {
                branch,
                page: candidate.page,
                epoch: *epoch,
            };
            let next = match candidate.versions.get(i + 1) {
                Some(next) => Some(next.clone()),
                None => neighbours.newer.and_then(|limit| {
                    let ram = self
                        .map
                        .own_after(at, *epoch)
                        .and_then(|v| Some((v.epoch?, v.page.clone())));
                    let both = [ram, candidate.newer.clone()];
                    // On a tie RAM is first, and newer.
                    both.into_iter()
                        .flatten()
                        .filter(|(e, _)| *e <= limit)
                        .min_by_key(|(e, _)| *e)
                }),
            };
            match next {
                Some((newer, newer_page)) => {
                    self.release_difference(page, Some(&newer_page), neighbours.older);
                    self.force(PageKey { epoch: newer, ..key });
                }
                // It belongs to the next holder from now on.
                None if neighbours.newer.is_some() => continue,
                None => self.release_difference(page, None, neighbours.older),
            }
            self.remove_version(key);
        }
    }

    /// Releases grains that were placed after `older` and that the newer version does not place.
    fn release_difference(&mut self, page: &Page, newer: Option<&Page>, older: Epoch) {
        for (i, entry) in (0u8..).zip(page.iter()) {
            if let Some(grain) = entry.grain()
                && entry.birth() > older
                && newer.is_none_or(|n| !n.at(i).same_place(entry))
            {
                self.open.releases.push(grain);
            }
        }
    }

    /// Stores a version's whole page with this commit: its deltas may stand on a page that goes away now.
    fn force(&mut self, key: PageKey) {
        if self.map.exact(key).is_some_and(|v| !v.based) {
            self.open.forced.insert(key);
        }
    }

    /// Moves one page of the branch below into a branch, or frees it when the branch has its own.
    fn fold_page(&mut self, old: PageKey, page: &Page, into: BranchId, stored: Option<(Epoch, Page)>) {
        let at = (into, old.page);
        let older = self.origin(old.branch);
        let first_holder = self
            .snapshots_of(into)
            .map(|(id, _)| id.epoch)
            .next()
            .unwrap_or(Epoch(u32::MAX));
        let ram = self
            .map
            .own_after(at, Epoch::ZERO)
            .and_then(|v| Some((v.epoch?, v.page.clone())));
        let oldest = [ram, stored].into_iter().flatten().min_by_key(|(e, _)| *e);
        match oldest.filter(|(e, _)| *e <= first_holder) {
            Some((epoch, newer)) => {
                self.release_difference(page, Some(&newer), older);
                self.force(PageKey {
                    branch: into,
                    page: old.page,
                    epoch,
                });
            }
            None => self.adopt(old, page, into),
        }
        self.map.structure_gen += 1;
        self.touch_page(page);
        self.remove_version(old);
    }

    /// The version moves under the same epoch: it is older than all of the branch's own.
    fn adopt(&mut self, old: PageKey, page: &Page, into: BranchId) {
        let (at, key) = ((into, old.page), PageKey { branch: into, ..old });
        let newest = self.map.newest_mut(at).expect("the caller has the page in RAM");
        if newest.epoch.is_none() && newest.lent.is_none() {
            assert!(
                newest.page.same_places(page),
                "a branch without a version of its own shows the one below"
            );
            (newest.epoch, newest.page) = (Some(old.epoch), page.clone());
        } else {
            self.map
                .push_oldest(at, Version::clean(Some(old.epoch), page.clone()));
        }
        self.map.touch(key, self.open.id);
        self.open.created.insert(key);
        self.open.forced.insert(key);
    }

    /// Pages below `cursor` are done.
    pub(crate) fn advance(&mut self, id: u64, cursor: PageNo, branch: BranchId) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.cursor = cursor;
            self.open.jobs.insert(id);
            self.refresh_holds(branch);
        }
    }

    fn finish_drop(&mut self, id: u64, branch: BranchId, upto: Option<Epoch>) {
        self.end_job(id);
        if let Some(epoch) = upto {
            let snapshot = SnapshotId { branch, epoch };
            self.unseal_next(snapshot);
            self.put_snapshot(snapshot, None);
            self.open.events.push(StoreEvent::SnapshotFreed(snapshot));
        }
        self.follow_up();
    }
}
