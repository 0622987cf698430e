//! Loans: a large copy within the pool is there at once, and its pages are worked through afterwards.
//!
//! A loan is a job (`D`) that names a range of pages of a branch, a snapshot `to` of what the branch showed before, and a
//! snapshot `from` whose pages it shows from now on. Both snapshots stay (hidden, if nobody else wants them) as long as the
//! job runs. Whoever looks at the branch as of an epoch after `to` (the head, snapshots cut since, what stands on those)
//! and finds no version that is younger than `to` sees the lender's page, born in the epoch after `to`. A page is *taken
//! over* for good by the job, or before the first change to it: exactly that page becomes the branch's own version of
//! that epoch, stored whole, and its grains get one reference more. What was there before goes with `to`.
//!
//! Lookups follow a loan only to loans that were made before it (smaller job numbers): a snapshot shows none that is
//! younger than itself, so that nothing is missed, and no lookup runs in circles.

use std::ops::Range;

use crate::Result;
use crate::inner::Inner;
use crate::lock::Mode;
use crate::map::{PageAt, Version};
use crate::page::{PAGE_ENTRIES, Page, PageNo};
use crate::pin::Pin;
use crate::record::{JobKind, JobRecord, PageKey};
use crate::state::{State, WHOLE_ENTRIES};
use crate::types::{BranchId, Epoch, SnapshotId};
use crate::volume::{Volume, check_range};

/// Loans of one branch at a time: further copies are worked through before they are answered.
const MOST: usize = 16;
/// Loans that one lookup may follow: a page that does not lie like the lender's takes two pages at each.
const DEEPEST: usize = 4;
/// Pages taken over per commit: map misses of everybody wait while one is stored.
const STEP_PAGES: usize = 256;
/// Pages in RAM that are looked at to see whether a loan can be continued.
const LOOKED_AT: usize = 256;

const ENTRIES: u64 = PAGE_ENTRIES as u64;

/// A range of pages that shows what a snapshot does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loan {
    pub(crate) job: u64,
    /// Branch that borrows, and the epoch after which it shows the lender's pages.
    pub(crate) to: SnapshotId,
    pub(crate) from: SnapshotId,
    pub(crate) first: PageNo,
    /// The page after the last.
    pub(crate) end: PageNo,
    /// Number of the lender's grain under the first entry of the first page.
    grain: u64,
    gained: i64,
}

/// What the map remembers of a page that is shown by a loan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lent {
    /// The loan.
    pub(crate) job: u64,
    /// Entries with a grain that the page showed before.
    before: u64,
}

/// A page of a head, the epoch of its version if that is its branch's own, and the loan that shows it.
type Looked = (Option<Epoch>, Page, Option<Lent>);

impl Loan {
    /// Of a job, if it is one.
    pub(crate) fn of(job: u64, record: &JobRecord) -> Option<Self> {
        let JobKind::Lend {
            to,
            from,
            first,
            end,
            grain,
        } = record.kind
        else {
            return None;
        };
        Some(Self {
            job,
            to,
            from,
            first,
            end,
            grain,
            gained: record.gained,
        })
    }

    /// Epoch of the versions that it makes, and of what they place.
    pub(crate) fn birth(&self) -> Epoch {
        Epoch(self.to.epoch.0.saturating_add(1))
    }

    fn pages(&self) -> Range<PageNo> {
        self.first..self.end
    }

    /// The lender's grain under the first entry of a page.
    fn grain_of(&self, page: PageNo) -> u64 {
        self.grain + u64::from(page.saturating_sub(self.first)) * ENTRIES
    }

    /// The lender's pages under a range of pages.
    fn lenders(&self, pages: &Range<PageNo>) -> Range<PageNo> {
        let (first, end) = (pages.start.max(self.first), pages.end.min(self.end));
        if first >= end {
            return 0..0;
        }
        page_of(self.grain_of(first))..page_of(self.grain_of(end - 1) + ENTRIES - 1).saturating_add(1)
    }

    /// The first page that shows something of the lender's page.
    fn shows(&self, lender: PageNo) -> PageNo {
        let ahead = (u64::from(lender) * ENTRIES).saturating_sub(self.grain) / ENTRIES;
        self.first
            .saturating_add(PageNo::try_from(ahead).unwrap_or(PageNo::MAX))
    }

    /// What a page of the range shows, made of one or two pages of the lender.
    pub(crate) fn shown(&self, page: PageNo, mut look: impl FnMut(PageNo) -> Result<Page>) -> Result<Page> {
        let first = self.grain_of(page);
        let (mut shown, mut lender): (Page, Option<(PageNo, Page)>) = (Page::default(), None);
        for index in 0..64u8 {
            let grain = first + u64::from(index);
            let no = page_of(grain);
            let source = match lender.take().filter(|(have, _)| *have == no) {
                Some((_, page)) => page,
                None => look(no)?,
            };
            let at = u8::try_from(grain % ENTRIES).expect("64 entries");
            shown.set(index, source.at(at).reborn(self.birth()));
            lender = Some((no, source));
        }
        Ok(shown)
    }
}

/// A damaged record may name any grain; a page that cannot be is one of holes.
fn page_of(grain: u64) -> PageNo {
    PageNo::try_from(grain / ENTRIES).unwrap_or(PageNo::MAX)
}

/// The loans of a pool. Few.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loans(Vec<Loan>);

impl Loans {
    pub(crate) fn of<'a>(jobs: impl IntoIterator<Item = (&'a u64, &'a JobRecord)>) -> Self {
        Self(
            jobs.into_iter()
                .filter_map(|(id, job)| Loan::of(*id, job))
                .collect(),
        )
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Those onto a branch.
    pub(crate) fn of_branch(&self, branch: BranchId) -> impl Iterator<Item = &Loan> {
        self.0.iter().filter(move |l| l.to.branch == branch)
    }

    /// Those that a reader of a branch may see, made before the job `below`.
    fn seen(&self, branch: BranchId, epoch: Epoch, below: u64) -> impl Iterator<Item = &Loan> {
        self.of_branch(branch)
            .filter(move |l| l.to.epoch < epoch && l.job < below)
    }

    /// The one that shows a page to a reader, unless the branch has a version that is younger.
    pub(crate) fn over(&self, branch: BranchId, epoch: Epoch, page: PageNo, below: u64) -> Option<&Loan> {
        self.seen(branch, epoch, below)
            .filter(|l| l.pages().contains(&page))
            .max_by_key(|l| l.to.epoch)
    }

    /// Whether a loan needs a snapshot.
    pub(crate) fn keep(&self, id: SnapshotId) -> bool {
        self.0.iter().any(|l| l.to == id || l.from == id)
    }

    /// Whether what a snapshot shows is not all in the map yet.
    pub(crate) fn reach(&self, id: SnapshotId) -> bool {
        self.of_branch(id.branch).any(|l| l.to.epoch < id.epoch)
    }

    /// By how many entries with a grain the map shows more to a reader than its recorded count says: the count follows when
    /// a loan is done. `below` gives what a branch stands on.
    pub(crate) fn gained(
        &self,
        mut reader: SnapshotId,
        below: impl Fn(BranchId) -> Option<SnapshotId>,
    ) -> i64 {
        let mut gained = 0;
        loop {
            let seen = self.seen(reader.branch, reader.epoch, u64::MAX);
            gained += seen.map(|l| l.gained).sum::<i64>();
            match below(reader.branch) {
                Some(parent) => reader = parent,
                None => return gained,
            }
        }
    }
}

impl State {
    /// Whether the head's page is in RAM as it is now: its own version, or what a loan shows.
    pub(crate) fn has_page(&self, at: PageAt) -> bool {
        let Some(newest) = self.map.first(at) else {
            return false;
        };
        match self.loans.over(at.0, Epoch::MAX, at.1, u64::MAX) {
            None => true,
            Some(loan) => {
                newest.epoch.is_some_and(|epoch| epoch > loan.to.epoch)
                    || newest.lent.is_some_and(|lent| lent.job == loan.job)
            }
        }
    }

    /// Whether the head's page, which is in RAM, is still the lender's: its grains are not to be written.
    pub(crate) fn is_lent(&self, at: PageAt) -> bool {
        if self.loans.is_empty() {
            return false;
        }
        let lent = self.map.first(at).and_then(|v| v.lent);
        lent.is_some_and(|lent| self.jobs.contains_key(&lent.job))
    }

    /// Takes in a page of a head that was looked up; not when a loan has begun or ended since.
    pub(crate) fn take_in(&mut self, at: PageAt, (epoch, page, lent): Looked) {
        if self.has_page(at) {
            return;
        }
        let loan = self.loans.over(at.0, Epoch::MAX, at.1, u64::MAX);
        let younger = |l: &Loan| epoch.is_some_and(|epoch| epoch > l.to.epoch);
        let fits = match (loan, lent) {
            (None, None) => true,
            (Some(loan), None) => younger(loan),
            (Some(loan), Some(lent)) => loan.job == lent.job,
            (None, Some(_)) => false,
        };
        if !fits {
            return;
        }
        let version = Version {
            lent,
            ..Version::clean(epoch, page)
        };
        if self.map.contains(at) {
            self.map.push(at, version);
        } else {
            self.map.insert(at, version);
        }
    }

    /// Makes a page, which is in RAM, the branch's own before anything is changed in it.
    pub(crate) fn take_over(&mut self, branch: BranchId, no: PageNo) {
        let at = (branch, no);
        let Some(loan) = self.loans.over(branch, Epoch::MAX, no, u64::MAX).copied() else {
            return;
        };
        let newest = self.map.first(at).expect("the caller has the page in RAM");
        let Some(lent) = newest.lent.filter(|lent| lent.job == loan.job) else {
            return;
        };
        let page = newest.page.clone();
        let key = PageKey {
            branch,
            page: no,
            epoch: loan.birth(),
        };
        let (mut mapped, mut places) = (0, Vec::with_capacity(PAGE_ENTRIES));
        for grain in page.iter().filter_map(crate::page::Entry::grain) {
            mapped += 1;
            places.push(grain);
        }
        let fresh = Version {
            based: false,
            ..Version::clean(Some(key.epoch), page)
        };
        self.map.push(at, fresh);
        // Stored whole with this group: no delta ever stands on what the lender showed.
        self.open.created.insert(key);
        self.open.whole.insert(key);
        self.open.entries += WHOLE_ENTRIES;
        for grain in places {
            *self.open.shares.entry(grain).or_default() += 1;
        }
        self.map.touch(key, self.open.id);
        self.open.mark();
        if let Some(job) = self.jobs.get_mut(&loan.job) {
            job.gained += mapped - i64::try_from(lent.before).expect("at most 64");
            self.open.jobs.insert(loan.job);
        }
    }

    /// Loans that a lookup of some pages may follow, one after the other.
    fn depth_of_loans(&self, at: SnapshotId, pages: &Range<PageNo>, below: u64) -> usize {
        let (mut depth, mut level) = (0, Some(at));
        while let Some(at) = level {
            for loan in self.loans.seen(at.branch, at.epoch, below) {
                let lenders = loan.lenders(pages);
                if !lenders.is_empty() {
                    depth = depth.max(1 + self.depth_of_loans(loan.from, &lenders, loan.job));
                }
            }
            level = self.branches.get(&at.branch).and_then(|b| b.record.parent);
        }
        depth
    }

    /// Whether a range of pages can be lent: nothing unfinished lies there, and no lookup would take too long.
    fn can_lend(&self, branch: BranchId, wanted: &Wanted) -> bool {
        let pages = &wanted.pages;
        let meets = |first: PageNo, end: PageNo| first < pages.end && pages.start < end;
        let lender = Loan {
            job: u64::MAX,
            to: wanted.from,
            from: wanted.from,
            first: pages.start,
            end: pages.end,
            grain: wanted.grain,
            gained: 0,
        };
        !self.loans.of_branch(branch).any(|l| meets(l.first, l.end))
            && !self.tombs.of_branch(branch).any(|t| meets(t.first, t.end))
            && self.depth_of_loans(wanted.from, &lender.lenders(pages), u64::MAX) < DEEPEST
    }

    /// The loan that a range of pages continues: the next piece of a copy in pieces.
    fn continued(&self, branch: BranchId, wanted: &Wanted) -> Option<Loan> {
        let newest = self.snapshots_of(branch).next_back().map(|(id, _)| id)?;
        let first = wanted.pages.start;
        let loan = self.loans.of_branch(branch).find(|l| {
            // A younger snapshot would show the new pages too.
            l.to == newest
                && l.from == wanted.from
                && l.end <= first
                && first - l.end <= 1
                && l.grain_of(first) == wanted.grain
        })?;
        // Where pieces meet within a page, that one was copied by itself.
        let between = (loan.end..first).all(|page| {
            let own = self.map.first((branch, page)).and_then(|v| v.epoch);
            own.is_some_and(|epoch| epoch > loan.to.epoch)
        });
        between.then_some(*loan)
    }

    fn lend(
        &mut self,
        branch: BranchId,
        wanted: &Wanted,
        goes_on: Option<Loan>,
        now_ms: i64,
    ) -> Result<bool> {
        if !self.can_lend(branch, wanted) {
            return Ok(false);
        }
        let end = wanted.pages.end;
        let same = goes_on.filter(|l| self.continued(branch, wanted).is_some_and(|now| now.job == l.job));
        if let Some(loan) = same
            && let Some(job) = self.jobs.get_mut(&loan.job)
            && let JobKind::Lend { end: last, .. } = &mut job.kind
        {
            *last = end;
            self.open.jobs.insert(loan.job);
            self.open.mark();
            self.refresh_views();
            self.written(branch, true);
            self.map.structure_gen += 1;
            return Ok(true);
        }
        if self.loans.of_branch(branch).count() >= MOST {
            return Ok(false);
        }
        let to = self.still(branch, now_ms)?;
        self.written(branch, true);
        self.add_job(JobKind::Lend {
            to,
            from: wanted.from,
            first: wanted.pages.start,
            end,
            grain: wanted.grain,
        });
        // A lookup that is under way looks again.
        self.map.structure_gen += 1;
        Ok(true)
    }

    /// All pages are taken over: the counts of everybody who looks as of a later epoch follow.
    fn finish_loan(&mut self, id: u64) -> Result<()> {
        if let Some((loan, gained)) = self
            .jobs
            .get(&id)
            .and_then(|j| Some((Loan::of(id, j)?, j.gained)))
        {
            self.recount(loan.to, gained)?;
        }
        self.end_loan(id);
        Ok(())
    }

    fn end_loan(&mut self, id: u64) {
        self.end_job(id);
        // A lookup that has met the loan, and not its version yet, must not go on below a snapshot that goes.
        self.map.structure_gen += 1;
        self.follow_up();
    }
}

/// What shall be lent.
struct Wanted {
    pages: Range<PageNo>,
    from: SnapshotId,
    grain: u64,
}

impl Inner {
    /// The head's page: what its own tombstones hide is there, what a loan shows too.
    pub(crate) fn look_up(&self, (branch, no): PageAt) -> Result<Looked> {
        self.stable(|| {
            let (epoch, page) = self.resolve_once(branch, Epoch::MAX, no, false, u64::MAX)?;
            let loan = {
                let state = self.state();
                state.loans.over(branch, Epoch::MAX, no, u64::MAX).copied()
            };
            let Some(loan) = loan.filter(|l| epoch.is_none_or(|epoch| epoch <= l.to.epoch)) else {
                return Ok((epoch, page, None));
            };
            // What `to` shows never changes.
            let before = self
                .resolve_once(branch, loan.to.epoch, no, true, u64::MAX)?
                .1
                .mapped();
            let lent = Lent {
                job: loan.job,
                before,
            };
            Ok((epoch, page, Some(lent)))
        })
    }

    /// The first page of a branch in `from..=to` that a loan may show something of.
    pub(crate) fn next_lent(
        &self,
        branch: BranchId,
        epoch: Epoch,
        from: PageNo,
        to: PageNo,
        below: u64,
    ) -> Result<Option<PageNo>> {
        let loans: Vec<Loan> = {
            let state = self.state();
            state.loans.seen(branch, epoch, below).copied().collect()
        };
        let mut best: Option<PageNo> = None;
        for loan in loans {
            let pages = from.max(loan.first)..best.unwrap_or(to).saturating_add(1).min(loan.end);
            let lenders = loan.lenders(&pages);
            if lenders.is_empty() {
                continue;
            }
            let next = self.next_present_once(loan.from, lenders.start, lenders.end - 1, loan.job)?;
            let next = next.map(|lender| loan.shows(lender).max(pages.start));
            best = [best, next.filter(|page| pages.contains(page))]
                .into_iter()
                .flatten()
                .min();
        }
        Ok(best)
    }

    /// One step of a loan's job.
    pub(crate) fn lend_step(&self, id: u64, job: JobRecord) -> Result<()> {
        let Some(loan) = Loan::of(id, &job) else {
            return Ok(());
        };
        let branch = loan.to.branch;
        let mut cursor = job.cursor.max(loan.first);
        for _ in 0..self.options.job_pages.clamp(1, STEP_PAGES) {
            if !self.state().is_seen_after(loan.to) {
                self.state().end_loan(id);
                return Ok(());
            }
            let Some(next) = self.next_present(branch, cursor, loan.end.saturating_sub(1))? else {
                cursor = loan.end;
                break;
            };
            self.hook("job.page");
            self.with_page(branch, next, |state| {
                state.take_over(branch, next);
                Ok(())
            })?;
            cursor = next + 1;
        }
        let mut state = self.state();
        // It may have been continued meanwhile.
        let end = state
            .jobs
            .get(&id)
            .and_then(|j| Loan::of(id, j))
            .map_or(0, |l| l.end);
        if cursor < end {
            state.advance(id, cursor, branch);
            return Ok(());
        }
        state.finish_loan(id)
    }

    /// Whether no page of a range has a version that is younger than `since`. The caller keeps writers out.
    fn untouched(&self, branch: BranchId, since: Epoch, pages: &Range<PageNo>) -> Result<bool> {
        let last = pages.end.saturating_sub(1);
        {
            let state = self.state();
            let (mut at, mut looked) = (Some(pages.start), 0);
            while let Some(page) = at.and_then(|at| state.map.next_dirty(branch, at, last)) {
                looked += 1;
                let own = state.map.own_after((branch, page), since);
                if own.is_some() || looked > LOOKED_AT {
                    return Ok(false);
                }
                at = page.checked_add(1);
            }
        }
        let after = self.changed_pages(branch, since, Epoch(u32::MAX), pages.start, 1)?;
        Ok(after.pages.keys().next().is_none_or(|page| *page >= pages.end)
            && after.next.is_none_or(|next| next >= pages.end))
    }
}

impl Volume {
    /// Shows whole pages of a pin in whole pages of this volume, from grain `grain` of the pin on. `false` when it must be
    /// done the long way. Durable with the next commit.
    ///
    /// # Errors
    /// As [`Volume::copy`].
    pub(crate) fn borrow_pages(&self, pages: Range<PageNo>, pin: &Pin, grain: u64) -> Result<bool> {
        self.pool.throttle()?;
        let page_bytes = self.pool.page_bytes();
        let (offset, len) = (
            u64::from(pages.start) * page_bytes,
            u64::from(pages.end - pages.start) * page_bytes,
        );
        let wanted = Wanted {
            pages,
            from: pin.snapshot,
            grain,
        };
        let now_ms = self.pool.now_ms();
        {
            // What was issued before is what `to` shows, what comes later finds the loan. Readers are waited for too: what
            // they have looked up is held by `to` only from here on, and that goes when the loan is done (I3).
            let _whole = self.shared.locks.lock_all(Mode::Exclusive);
            self.shared.alive()?;
            check_range(offset, len, self.size_bytes())?;
            let branch = self.shared.head();
            let found = self.pool.state().continued(branch, &wanted);
            let goes_on = match found {
                Some(loan) if self.pool.untouched(branch, loan.to.epoch, &wanted.pages)? => Some(loan),
                _ => None,
            };
            if !self.pool.state().lend(branch, &wanted, goes_on, now_ms)? {
                return Ok(false);
            }
        }
        self.pool.changed.notify_all();
        self.pool.hook("copy.lent");
        Ok(true)
    }
}
