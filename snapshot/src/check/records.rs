//! The records that fit in RAM, and how they hang together.

use std::collections::{BTreeMap, BTreeSet};

use crate::Result;
use crate::loan::Loans;
use crate::offline::Parents;
use crate::record::{self, BadRecord, BranchRecord, JobKind, JobRecord, Key, SnapshotRecord};
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, SnapshotId};

/// The records that fit in RAM: everything but pages and bitmaps.
#[derive(Default)]
pub(crate) struct Records {
    pub(crate) branches: BTreeMap<BranchId, BranchRecord>,
    pub(crate) snapshots: BTreeMap<SnapshotId, SnapshotRecord>,
    pub(crate) jobs: BTreeMap<u64, JobRecord>,
    pub(crate) bad: BTreeMap<u64, BadRecord>,
}

impl Records {
    pub(crate) fn children(&self, of: SnapshotId) -> usize {
        self.branches
            .values()
            .filter(|branch| branch.parent == Some(of))
            .count()
    }

    /// Branches that stand on any snapshot of a branch.
    pub(crate) fn children_of(&self, branch: BranchId) -> usize {
        let standing = self.branches.values().filter_map(|b| b.parent);
        standing.filter(|parent| parent.branch == branch).count()
    }

    pub(crate) fn snapshots_of(
        &self,
        branch: BranchId,
    ) -> impl DoubleEndedIterator<Item = (&SnapshotId, &SnapshotRecord)> {
        let at = |epoch| SnapshotId { branch, epoch };
        self.snapshots.range(at(Epoch::ZERO)..=at(Epoch(u32::MAX)))
    }

    pub(crate) fn has_job(&self, test: impl Fn(JobKind) -> bool) -> bool {
        self.jobs.values().any(|job| test(job.kind))
    }

    pub(crate) fn abandoned(&self) -> BTreeSet<BranchId> {
        let branch = |job: &JobRecord| match job.kind {
            JobKind::DropHead(branch) => Some(branch),
            JobKind::DropSnapshot(_)
            | JobKind::Collapse { .. }
            | JobKind::Zero { .. }
            | JobKind::Lend { .. } => None,
        };
        self.jobs.values().filter_map(branch).collect()
    }

    /// By how much the recorded count of mapped entries of a reader is ahead of the map: tombstones and loans bring the
    /// counts up to date when they end.
    pub(crate) fn ahead(&self, branch: BranchId, epoch: Epoch) -> i64 {
        let below = |branch| self.branches.get(&branch)?.parent;
        let reader = SnapshotId { branch, epoch };
        let masked = Tombs::of(&self.jobs).ahead(reader, below);
        i64::try_from(masked).unwrap_or(i64::MAX) - Loans::of(&self.jobs).gained(reader, below)
    }

    /// Parents that can be followed: known, and not in a ring.
    pub(crate) fn parents(&self) -> Parents {
        let mut parents = Parents::new();
        for (&id, branch) in &self.branches {
            if let Some(parent) = branch
                .parent
                .filter(|parent| self.branches.contains_key(&parent.branch))
            {
                // Numbers grow, so a parent that is not older than its child is damage, and no ring can pass this.
                if parent.branch < id {
                    parents.insert(id, parent);
                }
            }
        }
        parents
    }
}

impl Records {
    pub(crate) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match Key::parse(key)? {
            Key::Branch(id) => drop(self.branches.insert(id, BranchRecord::decode(id, value)?)),
            Key::Snapshot(id) => drop(self.snapshots.insert(id, SnapshotRecord::decode(id, value)?)),
            Key::Job(id) => drop(self.jobs.insert(id, JobRecord::decode(id, value)?)),
            Key::References(chunk, part) => drop(record::decode_references(chunk, part, value)?),
            Key::Spilled(chunk, index) => drop(record::decode_spilled(chunk, index, value)?),
            Key::Counts(block) => drop(record::decode_counts(block, value)?),
            Key::Bad(grain) => drop(self.bad.insert(grain, BadRecord::decode(grain, value)?)),
            Key::Value(name) => drop(record::decode_value(&name, value)?),
            Key::System | Key::Page(_) | Key::Changed(_) | Key::Bitmap(_) | Key::Journal(..) => {}
        }
        Ok(())
    }
}

impl JobKind {
    /// Branches whose page versions the job removes or moves.
    pub(crate) fn branches(self) -> Vec<BranchId> {
        match self {
            Self::DropHead(branch) | Self::Zero { branch, .. } => vec![branch],
            Self::DropSnapshot(snapshot) => vec![snapshot.branch],
            Self::Lend { to, .. } => vec![to.branch],
            Self::Collapse { from, into } => vec![from.branch, into],
        }
    }
}
