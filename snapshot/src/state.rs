//! What the pool knows, under one short lock: branches, snapshots, pages in RAM, and the open transaction group.
//! Nothing here does I/O.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::alloc::{Allocator, Need, Shares};
use crate::bad::BadGrains;
use crate::loan::Loans;
use crate::map::{PageMap, Version};
use crate::page::{Entry, Page, PageNo};
use crate::record::{BranchRecord, JobKind, JobRecord, PageKey, SnapshotRecord};
use crate::scrub::GrainSet;
use crate::seal::SealCursor;
use crate::space::Space;
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, SnapshotId, SnapshotState, StoreEvent, VolumeId};
use crate::volume::Shared;
use crate::warm::Ticket;
use crate::{Error, Result};

/// One thing that keeps older grains of a branch: a snapshot, or the snapshot that the branch stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hold {
    /// Entries born up to here are held.
    pub(crate) epoch: Epoch,
    /// Not on pages below this one: a job has released them there.
    pub(crate) done_below: PageNo,
}

/// All holds of a branch, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holds(Vec<Hold>);

impl Holds {
    /// Epoch of the newest hold on a page: an entry born later belongs to the head alone.
    pub(crate) fn newest(&self, page: PageNo) -> Epoch {
        self.0
            .iter()
            .rev()
            .find(|h| page >= h.done_below)
            .map_or(Epoch::ZERO, |h| h.epoch)
    }

    /// Epoch of the newest hold on a page that is not younger than `epoch`.
    pub(crate) fn newest_upto(&self, page: PageNo, epoch: Epoch) -> Epoch {
        let holds = self.0.iter().rev().filter(|h| h.epoch <= epoch);
        let mut holds = holds.filter(|h| page >= h.done_below);
        holds.next().map_or(Epoch::ZERO, |h| h.epoch)
    }
}

/// A branch and what holds its grains.
pub(crate) struct Branch {
    pub(crate) record: BranchRecord,
    /// As the open transaction group sees it.
    pub(crate) holds: Holds,
    /// As the last durable state sees it: a hold that was dropped since still forbids overwriting (I4).
    pub(crate) durable_holds: Holds,
    /// Something was published since the last cut: the newest snapshot is not what the head shows.
    pub(crate) written: bool,
}

/// The old entries of a page version, before the open transaction group changed them.
#[derive(Default)]
pub(crate) struct Undo {
    pub(crate) mask: u64,
    pub(crate) old: Vec<(u8, Entry)>,
}

/// The open transaction group: what the next commit makes durable.
pub(crate) struct Txg {
    pub(crate) id: u64,
    pub(crate) changed: BTreeMap<PageKey, Undo>,
    pub(crate) entries: u64,
    /// New versions: their `E` keys.
    pub(crate) created: BTreeSet<PageKey>,
    /// Versions that go: their `M` and `E` keys.
    pub(crate) removed: BTreeSet<PageKey>,
    /// Versions whose page must be stored whole with this commit, because what their deltas stand on goes away.
    pub(crate) forced: BTreeSet<PageKey>,
    /// New versions of which so much is new that their pages are stored whole, instead of deltas.
    pub(crate) whole: BTreeSet<PageKey>,
    pub(crate) allocs: Vec<u64>,
    /// Grains that get one more placement, and how many times.
    pub(crate) shares: Shares,
    /// Placements that go; the grain with its last one.
    pub(crate) releases: Vec<u64>,
    pub(crate) branches: BTreeSet<BranchId>,
    pub(crate) snapshots: BTreeSet<SnapshotId>,
    pub(crate) jobs: BTreeSet<u64>,
    pub(crate) values: BTreeSet<String>,
    /// Grains that became bad, or are so no more.
    pub(crate) bad: BTreeSet<u64>,
    /// Branches whose holds changed.
    pub(crate) holds: BTreeSet<BranchId>,
    /// Told when durable.
    pub(crate) events: Vec<StoreEvent>,
    /// Commit although nothing else changed (the checkpoint mark moved, or the pool closes).
    pub(crate) forced_close: bool,
    /// When the first change came.
    pub(crate) since: Option<Instant>,
}

impl Txg {
    pub(crate) fn new(id: u64) -> Self {
        Self {
            id,
            changed: BTreeMap::new(),
            entries: 0,
            created: BTreeSet::new(),
            removed: BTreeSet::new(),
            forced: BTreeSet::new(),
            whole: BTreeSet::new(),
            allocs: Vec::new(),
            shares: Shares::new(),
            releases: Vec::new(),
            branches: BTreeSet::new(),
            snapshots: BTreeSet::new(),
            jobs: BTreeSet::new(),
            values: BTreeSet::new(),
            bad: BTreeSet::new(),
            holds: BTreeSet::new(),
            events: Vec::new(),
            forced_close: false,
            since: None,
        }
    }

    /// Grains that get or lose placements.
    pub(crate) fn grains(&self) -> impl Iterator<Item = u64> + '_ {
        let changed = self.allocs.iter().chain(self.shares.keys());
        changed.chain(&self.releases).copied()
    }

    /// Whether a commit has nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        !self.forced_close
            && self.changed.is_empty()
            && self.created.is_empty()
            && self.removed.is_empty()
            && self.allocs.is_empty()
            && self.shares.is_empty()
            && self.releases.is_empty()
            && self.branches.is_empty()
            && self.snapshots.is_empty()
            && self.jobs.is_empty()
            && self.values.is_empty()
            && self.bad.is_empty()
    }

    /// Keeps what an entry was before this transaction group.
    pub(crate) fn remember(&mut self, key: PageKey, index: u8, old: Entry) {
        let undo = self.changed.entry(key).or_default();
        if undo.mask & (1 << index) == 0 {
            undo.mask |= 1 << index;
            undo.old.push((index, old));
            self.entries += 1;
        }
    }

    pub(crate) fn mark(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }
}

/// `J` values of one durable transaction group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JournalPart {
    pub(crate) txg: u64,
    pub(crate) values: u32,
    pub(crate) bytes: u64,
}

/// What a page that is stored whole counts for in the size of a transaction group.
pub(crate) const WHOLE_ENTRIES: u64 = 8;

/// Where the grains of published entries come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Placing {
    /// They were reserved for this.
    Fresh,
    /// They are placed elsewhere already.
    Shared,
}

/// Everything under the pool's lock.
pub(crate) struct State {
    pub(crate) branches: BTreeMap<BranchId, Branch>,
    /// Head of each volume.
    pub(crate) volumes: BTreeMap<VolumeId, Arc<Shared>>,
    pub(crate) names: BTreeMap<String, VolumeId>,
    pub(crate) snapshots: BTreeMap<SnapshotId, SnapshotRecord>,
    /// Snapshots that [`crate::Pin`]s stand on, and how many. In RAM only: a start finds what they held unwanted.
    pub(crate) pins: BTreeMap<SnapshotId, usize>,
    pub(crate) jobs: BTreeMap<u64, JobRecord>,
    /// Those of the jobs that are tombstones.
    pub(crate) tombs: Tombs,
    /// Those of the jobs that are loans.
    pub(crate) loans: Loans,
    /// Transaction group that a job was made in: it starts when that is durable.
    pub(crate) job_since: BTreeMap<u64, u64>,
    pub(crate) values: BTreeMap<String, Vec<u8>>,
    pub(crate) bad: BadGrains,
    pub(crate) seal: SealCursor,
    /// Grains that were taken or given back since a pass of the scrub over the map began.
    pub(crate) touched: Option<GrainSet>,
    /// Next epoch.
    pub(crate) epoch: Epoch,
    pub(crate) next_branch: u32,
    pub(crate) next_job: u64,
    pub(crate) map: PageMap,
    pub(crate) alloc: Allocator,
    /// Bitmaps that a thread is reading.
    pub(crate) loading_chunks: BTreeSet<u32>,
    pub(crate) space: Space,
    pub(crate) open: Txg,
    /// Newest durable transaction group.
    pub(crate) durable: u64,
    /// A commit or a slice of a checkpoint is in flight.
    pub(crate) committing: bool,
    /// The transaction group between its close and its durability.
    pub(crate) closing: Option<u64>,
    pub(crate) journal: VecDeque<JournalPart>,
    /// `J` up to here is in the stored pages, durably.
    pub(crate) checkpoint: u64,
    /// Publications since the pool was opened: the order of the warm log.
    pub(crate) publications: u64,
    pub(crate) stopping: bool,
    pub(crate) commits: u64,
    /// Most pages that were handled while the lock was held once.
    pub(crate) most_pages: usize,
}

impl State {
    /// Counts pages that are handled under one hold of the lock: everybody else waits for them.
    pub(crate) fn handled(&mut self, pages: usize) {
        self.most_pages = self.most_pages.max(pages);
    }

    pub(crate) fn branch(&self, id: BranchId) -> Result<&Branch> {
        self.branches.get(&id).ok_or_else(|| Error::NotFound {
            what: "the volume".into(),
        })
    }

    /// The branch, to be recorded with the open transaction group.
    pub(crate) fn branch_mut(&mut self, id: BranchId) -> Result<&mut BranchRecord> {
        let branch = self.branches.get_mut(&id).ok_or_else(|| Error::NotFound {
            what: "the volume".into(),
        })?;
        self.open.branches.insert(id);
        self.open.mark();
        Ok(&mut branch.record)
    }

    /// Snapshots of a branch in the order of their epochs, in any state.
    pub(crate) fn snapshots_of(
        &self,
        branch: BranchId,
    ) -> impl DoubleEndedIterator<Item = (SnapshotId, &SnapshotRecord)> {
        let (first, last) = (
            SnapshotId {
                branch,
                epoch: Epoch::ZERO,
            },
            SnapshotId {
                branch,
                epoch: Epoch(u32::MAX),
            },
        );
        self.snapshots
            .range(first..=last)
            .map(|(id, record)| (*id, record))
    }

    /// Branches of a volume's history.
    pub(crate) fn branches_of(&self, volume: VolumeId) -> impl Iterator<Item = BranchId> {
        self.branches
            .iter()
            .filter(move |(_, b)| b.record.volume == volume)
            .map(|(id, _)| *id)
    }

    /// Branches that stand on a snapshot.
    pub(crate) fn children(&self, id: SnapshotId) -> impl Iterator<Item = BranchId> {
        self.branches
            .iter()
            .filter(move |(_, b)| b.record.parent == Some(id))
            .map(|(id, _)| *id)
    }

    /// Branches below a branch, itself included.
    pub(crate) fn depth(&self, mut branch: BranchId) -> usize {
        let mut depth = 1;
        while let Some(parent) = self.branches.get(&branch).and_then(|b| b.record.parent) {
            (branch, depth) = (parent.branch, depth + 1);
        }
        depth
    }

    /// The epoch below which a branch's entries belong to the branch it stands on, on a given page.
    pub(crate) fn origin(&self, branch: BranchId) -> Epoch {
        self.branches
            .get(&branch)
            .and_then(|b| b.record.parent)
            .map_or(Epoch::ZERO, |p| p.epoch)
    }

    /// Takes the next epoch.
    pub(crate) fn next_epoch(&mut self) -> Result<Epoch> {
        if self.epoch >= Epoch::MAX {
            return Err(Error::Limit {
                what: "cuts and clones of a pool",
                max: u64::from(Epoch::MAX.0),
            });
        }
        let epoch = self.epoch;
        self.epoch = Epoch(epoch.0 + 1);
        Ok(epoch)
    }

    /// Recomputes what holds the grains of a branch.
    pub(crate) fn refresh_holds(&mut self, branch: BranchId) {
        let mut holds = Vec::new();
        if let Some(parent) = self.branches.get(&branch).and_then(|b| b.record.parent) {
            let folding = self.jobs.values().find(
                |j| matches!(j.kind, JobKind::Collapse { from, into } if from == parent && into == branch),
            );
            if folding.is_some() {
                // Pages below the cursor have moved up: there the branch below the parent is what holds.
                holds.push(Hold {
                    epoch: self.origin(parent.branch),
                    done_below: 0,
                });
            }
            holds.push(Hold {
                epoch: parent.epoch,
                done_below: folding.map_or(0, |j| j.cursor),
            });
        }
        let started = self.jobs.values().filter(|j| j.cursor > 0);
        let started: Vec<_> = started.map(|j| (j.kind, j.cursor)).collect();
        for (id, _) in self.snapshots_of(branch) {
            let dying = started
                .iter()
                .find(|(kind, _)| *kind == JobKind::DropSnapshot(id));
            holds.push(Hold {
                epoch: id.epoch,
                done_below: dying.map_or(0, |(_, cursor)| *cursor),
            });
        }
        if let Some(b) = self.branches.get_mut(&branch) {
            b.holds = Holds(holds);
            self.open.holds.insert(branch);
        }
    }

    /// Epoch that nothing may be overwritten in place below, on a page: held now, or in the last durable state.
    pub(crate) fn write_hold(&self, branch: BranchId, page: PageNo) -> Result<Epoch> {
        let b = self.branch(branch)?;
        Ok(b.holds.newest(page).max(b.durable_holds.newest(page)))
    }

    /// Puts new entries into the head's page, whose slot is in RAM. Data of new grains has been written before.
    pub(crate) fn publish(
        &mut self,
        branch: BranchId,
        page_no: PageNo,
        changes: &[(u8, Entry)],
    ) -> Result<Ticket> {
        self.publish_as(branch, page_no, changes, Placing::Fresh)
    }

    /// Puts entries of another place into the head's page: their grains have one placement more from now on, and are not
    /// written any more (`State::is_shared`). Whoever calls keeps them from going meanwhile.
    pub(crate) fn publish_shared(
        &mut self,
        branch: BranchId,
        page_no: PageNo,
        changes: &[(u8, Entry)],
    ) -> Result<Ticket> {
        self.publish_as(branch, page_no, changes, Placing::Shared)
    }

    /// Whether a grain is placed more than once, in the open state or in the last durable one (I4). The allocator may
    /// have to load what it knows of it.
    pub(crate) fn is_shared(&self, grain: u64) -> std::result::Result<bool, Need> {
        Ok(self.open.shares.contains_key(&grain) || self.alloc.is_shared(grain)?)
    }

    fn publish_as(
        &mut self,
        branch: BranchId,
        page_no: PageNo,
        changes: &[(u8, Entry)],
        placing: Placing,
    ) -> Result<Ticket> {
        self.bury_page(branch, page_no)?;
        let (held, current) = {
            let b = self.branch(branch)?;
            (b.holds.newest(page_no), b.record.current)
        };
        assert!(
            current > held,
            "a branch writes with a younger epoch than all that it holds"
        );
        let key = self.writable_version(branch, page_no, held, current);
        // A version of this group that is stored whole needs no deltas, and nothing older to go back to.
        let whole = placing == Placing::Shared && self.open.created.contains(&key);
        if whole {
            self.open.whole.insert(key);
            self.open.entries += WHOLE_ENTRIES;
        }
        let (mut taken, mut given) = (0u64, 0u64);
        for (index, entry) in changes {
            let version = self.map.exact_mut(key).expect("the version that was just chosen");
            let old = version.page.set(*index, *entry);
            if old == *entry {
                continue;
            }
            if !whole {
                self.open.remember(key, *index, old);
            }
            if let Some(grain) = old.grain() {
                given += 1;
                // A held grain stays until the last holder goes; the others are free after this commit (I3).
                if old.birth() > held {
                    self.open.releases.push(grain);
                }
            }
            if let Some(grain) = entry.grain() {
                taken += 1;
                match placing {
                    Placing::Fresh => self.open.allocs.push(grain),
                    Placing::Shared => *self.open.shares.entry(grain).or_default() += 1,
                }
            }
        }
        self.map.touch(key, self.open.id);
        self.written(branch, true);
        let record = self.branch_mut(branch)?;
        // What a loan shows counts when its job ends, and may go before.
        record.mapped_grains = record.mapped_grains.wrapping_add(taken).wrapping_sub(given);
        self.publications += 1;
        Ok(Ticket {
            txg: self.open.id,
            sequence: self.publications,
        })
    }

    /// Notes whether the head shows something else than the newest snapshot.
    pub(crate) fn written(&mut self, branch: BranchId, written: bool) {
        if let Some(b) = self.branches.get_mut(&branch) {
            b.written = written;
        }
    }

    /// The version of the head's page that may be changed: its newest, unless a hold can see that one (I6).
    fn writable_version(
        &mut self,
        branch: BranchId,
        page_no: PageNo,
        held: Epoch,
        current: Epoch,
    ) -> PageKey {
        let at = (branch, page_no);
        let newest = self.map.newest_mut(at).expect("the caller has the page in RAM");
        match newest.epoch {
            Some(epoch) if epoch > held => PageKey {
                branch,
                page: page_no,
                epoch,
            },
            _ => {
                let page: Page = newest.page.clone();
                let fresh = Version {
                    epoch: Some(current),
                    page,
                    lent: None,
                    dirty: None,
                    last_change: 0,
                    based: false,
                };
                self.map.push(at, fresh);
                let key = PageKey {
                    branch,
                    page: page_no,
                    epoch: current,
                };
                self.open.created.insert(key);
                key
            }
        }
    }

    /// A page version as the last durable commit has it. Called only while no transaction group is closing.
    pub(crate) fn as_of_durable(&self, key: PageKey) -> Option<Page> {
        let mut page = self.map.exact(key)?.page.clone();
        if let Some(undo) = self.open.changed.get(&key) {
            for (index, old) in &undo.old {
                page.set(*index, *old);
            }
        }
        Some(page)
    }

    /// Removes a page version from the map with the open transaction group.
    pub(crate) fn remove_version(&mut self, key: PageKey) {
        self.map.remove(key);
        self.open.removed.insert(key);
        self.open.mark();
    }

    /// Adds a background job.
    pub(crate) fn add_job(&mut self, kind: JobKind) {
        let id = self.next_job;
        self.next_job += 1;
        self.jobs.insert(id, JobRecord::new(kind));
        self.refresh_views();
        self.job_since.insert(id, self.open.id);
        self.open.jobs.insert(id);
        self.open.mark();
        if let JobKind::Collapse { into, .. } = kind {
            self.refresh_holds(into);
        }
    }

    /// Ends a background job.
    pub(crate) fn end_job(&mut self, id: u64) {
        self.jobs.remove(&id);
        self.refresh_views();
        self.job_since.remove(&id);
        self.open.jobs.insert(id);
        self.open.mark();
    }

    /// Changes a snapshot's record with the open transaction group; `None` removes it.
    pub(crate) fn put_snapshot(&mut self, id: SnapshotId, record: Option<SnapshotRecord>) {
        match record {
            Some(record) => drop(self.snapshots.insert(id, record)),
            None => {
                self.snapshots.remove(&id);
                // The newest one that is left need not be what the head shows.
                self.written(id.branch, true);
            }
        }
        self.open.snapshots.insert(id);
        self.open.mark();
        self.refresh_holds(id.branch);
    }

    /// Whether a pin stands on a snapshot, or a loan needs it.
    pub(crate) fn is_kept(&self, id: SnapshotId) -> bool {
        self.pins.contains_key(&id) || self.loans.keep(id)
    }

    /// The owner no longer wants a snapshot: hidden while something stands on it, dying otherwise.
    pub(crate) fn retire(&mut self, id: SnapshotId) {
        let Some(mut record) = self.snapshots.get(&id).cloned() else {
            return;
        };
        record.state = if self.children(id).next().is_some() || self.is_kept(id) {
            SnapshotState::Hidden
        } else {
            SnapshotState::Dying
        };
        let dying = record.state == SnapshotState::Dying;
        self.put_snapshot(id, Some(record));
        if dying {
            self.add_job(JobKind::DropSnapshot(id));
        }
    }

    /// Makes the jobs that the present state calls for: hidden snapshots that nothing stands on any more, empty
    /// branches, and branches that can be folded into their only child.
    pub(crate) fn follow_up(&mut self) {
        loop {
            let hidden = self
                .snapshots
                .iter()
                .filter(|(_, n)| n.state == SnapshotState::Hidden);
            let lonely: Vec<SnapshotId> = hidden
                .map(|(id, _)| *id)
                .filter(|id| self.children(*id).next().is_none() && !self.is_kept(*id))
                .collect();
            lonely.into_iter().for_each(|id| self.retire(id));
            let headless = self
                .branches
                .iter()
                .filter(|(_, b)| !b.record.head)
                .map(|(id, _)| *id);
            let idle: Vec<BranchId> = headless
                .filter(|b| !self.jobs.values().any(|j| works_on(j.kind, *b)))
                .collect();
            let mut forgotten = false;
            for branch in idle {
                let held: Vec<_> = self
                    .snapshots_of(branch)
                    .map(|(id, n)| (id, n.state))
                    .take(2)
                    .collect();
                match held.as_slice() {
                    [] => {
                        self.forget_branch(branch);
                        forgotten = true;
                    }
                    [(id, SnapshotState::Hidden)] if !self.is_kept(*id) => self.fold(*id),
                    _ => {}
                }
            }
            // A branch that went may have been all that stood on a hidden snapshot.
            if !forgotten {
                return;
            }
        }
    }

    fn fold(&mut self, from: SnapshotId) {
        let children: Vec<BranchId> = self.children(from).take(2).collect();
        if let [into] = children.as_slice()
            && self.is_wanted(*into)
        {
            self.add_job(JobKind::Collapse { from, into: *into });
        }
    }

    /// Whether anybody reads the branch: otherwise it is being freed, and what it stands on is freed after it.
    pub(crate) fn is_wanted(&self, branch: BranchId) -> bool {
        self.branches.get(&branch).is_some_and(|b| b.record.head)
            || self.snapshots_of(branch).next().is_some()
    }

    /// A branch without head and snapshots is gone.
    fn forget_branch(&mut self, branch: BranchId) {
        self.branches.remove(&branch);
        self.map.remove_branch(branch);
        self.open.branches.insert(branch);
        self.open.holds.remove(&branch);
        self.open.events.push(StoreEvent::BranchFreed(branch));
        self.open.mark();
    }

    /// Removes a branch whose pages have all moved to `into`, which then stands where it stood.
    pub(crate) fn replace_branch(&mut self, from: SnapshotId, into: BranchId) -> Result<()> {
        let parent = self.branch(from.branch)?.record.parent;
        self.branch_mut(into)?.parent = parent;
        self.put_snapshot(from, None);
        self.branches.remove(&from.branch);
        self.map.remove_branch(from.branch);
        self.map.structure_gen += 1;
        self.open.branches.insert(from.branch);
        self.open.holds.remove(&from.branch);
        self.open.events.push(StoreEvent::BranchFreed(from.branch));
        self.refresh_holds(into);
        Ok(())
    }
}

/// Whether a job changes the pages of a branch.
fn works_on(kind: JobKind, branch: BranchId) -> bool {
    match kind {
        JobKind::DropSnapshot(id) | JobKind::Lend { to: id, .. } => id.branch == branch,
        JobKind::DropHead(b) | JobKind::Zero { branch: b, .. } => b == branch,
        JobKind::Collapse { from, into } => from.branch == branch || into == branch,
    }
}
