//! What snapshots alone hold: the bytes that deleting one of them, or a set, would give back.
//!
//! First on paper: the lines of history with and without the snapshots, both after everything that the background jobs
//! will do. Then only pages with a version in an interval that loses its readers are looked at: what is seen from
//! there, by nobody older (its birth tells) and by nobody younger (the next reader's page tells), would be freed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::inner::Inner;
use crate::lock::lock;
use crate::page::PageNo;
use crate::pool::Pool;
use crate::record::PageKey;
use crate::state::State;
use crate::types::{BranchId, DeletePlan, Epoch, SnapshotId, SnapshotState};
use crate::{Error, Result};

/// Pages looked at per step.
const PAGES: usize = 4096;
/// Epoch of a head among the readers of its branch.
const HEAD: Epoch = Epoch(u32::MAX);

/// A point of a branch that somebody reads: a snapshot, or the head.
type Reader = SnapshotId;

/// A branch on paper.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    /// The branch itself, after those that are folded into it, oldest first; each up to the epoch where the next one
    /// stands on it.
    branches: Vec<(BranchId, Epoch)>,
    head: bool,
    parent: Option<SnapshotId>,
    /// Its snapshots; `true` = hidden.
    snapshots: BTreeMap<Epoch, bool>,
}

/// The branches that have a common root, as they will be when no job is left.
#[derive(Clone, Debug)]
struct Tree(BTreeMap<BranchId, Line>);

/// Readers that go, between two that stay.
#[derive(Debug)]
struct Gap {
    /// Branches with versions that the readers see, oldest first, and up to which epoch.
    branches: Vec<(BranchId, Epoch)>,
    /// What goes, as (index in `branches`, epoch), oldest first.
    gone: Vec<(usize, Epoch)>,
    /// Entries born up to here are seen by an older reader.
    older: Epoch,
    /// In the first of `branches`, versions up to here are an older reader's.
    after: Epoch,
    newer: Option<Reader>,
}

/// Places that grains with several would lose.
type Lost = HashMap<u64, u64>;

/// What is known of a snapshot between two others: their content never changes.
pub(crate) type Known = HashMap<SnapshotId, (Epoch, Reader, u64)>;

impl Tree {
    /// The branches that have their root in common with one of these snapshots.
    fn of(state: &State, ids: &[SnapshotId]) -> Self {
        let root = |mut branch: BranchId| {
            while let Some(parent) = state.branches.get(&branch).and_then(|b| b.record.parent) {
                branch = parent.branch;
            }
            branch
        };
        let roots: BTreeSet<BranchId> = ids.iter().map(|id| root(id.branch)).collect();
        let line = |id: BranchId| {
            let record = &state.branches.get(&id)?.record;
            let snapshots = state.snapshots_of(id);
            Some(Line {
                branches: vec![(id, HEAD)],
                head: record.head,
                parent: record.parent,
                snapshots: snapshots
                    .filter(|(_, n)| n.state != SnapshotState::Dying)
                    // What a loan needs is read as long as that runs.
                    .map(|(id, n)| {
                        (
                            id.epoch,
                            n.state == SnapshotState::Hidden && !state.loans.keep(id),
                        )
                    })
                    .collect(),
            })
        };
        let ids = state.branches.keys().copied();
        let same = ids.filter(|b| roots.contains(&root(*b)));
        let mut tree = Self(same.filter_map(|b| Some((b, line(b)?))).collect());
        tree.settle();
        tree
    }

    fn children(&self, id: SnapshotId) -> impl Iterator<Item = BranchId> {
        let stands = move |l: &Line| l.parent == Some(id);
        self.0.iter().filter(move |(_, l)| stands(l)).map(|(b, _)| *b)
    }

    /// The tree after these snapshots were deleted and all jobs have ended.
    fn without(&self, ids: &[SnapshotId]) -> Self {
        let mut tree = self.clone();
        for id in ids {
            let Some(line) = tree.0.get_mut(&id.branch) else {
                continue;
            };
            line.snapshots.entry(id.epoch).and_modify(|hidden| *hidden = true);
        }
        tree.settle();
        tree
    }

    /// Does on paper what [`State::follow_up`] has the jobs do.
    fn settle(&mut self) {
        while self.drop_lonely() | self.forget_empty() | self.fold_one() {}
    }

    fn drop_lonely(&mut self) -> bool {
        let hidden = self.0.iter().flat_map(|(b, l)| {
            let of = l.snapshots.iter().filter(|(_, hidden)| **hidden);
            of.map(|(epoch, _)| SnapshotId {
                branch: *b,
                epoch: *epoch,
            })
        });
        let parents: BTreeSet<SnapshotId> = self.0.values().filter_map(|l| l.parent).collect();
        let lonely: Vec<_> = hidden.filter(|id| !parents.contains(id)).collect();
        for id in &lonely {
            if let Some(line) = self.0.get_mut(&id.branch) {
                line.snapshots.remove(&id.epoch);
            }
        }
        !lonely.is_empty()
    }

    fn forget_empty(&mut self) -> bool {
        let before = self.0.len();
        self.0.retain(|_, l| l.head || !l.snapshots.is_empty());
        before != self.0.len()
    }

    fn fold_one(&mut self) -> bool {
        let found = self.0.iter().find_map(|(b, l)| {
            let (epoch, hidden) = l.snapshots.iter().next()?;
            let id = SnapshotId {
                branch: *b,
                epoch: *epoch,
            };
            let mut children = self.children(id);
            let only = children.next().filter(|_| children.next().is_none())?;
            (!l.head && l.snapshots.len() == 1 && *hidden).then_some((id, only))
        });
        let Some((from, into)) = found else { return false };
        let Some(mut below) = self.0.remove(&from.branch) else {
            return false;
        };
        if let Some((_, upto)) = below.branches.last_mut() {
            *upto = from.epoch;
        }
        if let Some(line) = self.0.get_mut(&into) {
            line.branches.splice(0..0, below.branches);
            line.parent = below.parent;
        }
        true
    }

    fn readers(&self) -> BTreeSet<Reader> {
        let of = |(b, l): (&BranchId, &Line)| {
            let branch = *b;
            let epochs: Vec<Epoch> = l
                .snapshots
                .keys()
                .copied()
                .chain(l.head.then_some(HEAD))
                .collect();
            epochs.into_iter().map(move |epoch| Reader { branch, epoch })
        };
        self.0.iter().flat_map(of).collect()
    }

    /// The gaps that open between this tree and a later one.
    fn gaps(&self, later: &Self) -> Vec<Gap> {
        let stay = later.readers();
        let forgotten = |b: &BranchId| !later.0.values().any(|l| l.branches.iter().any(|(of, _)| of == b));
        let gone = self.0.iter().filter(|(b, _)| forgotten(b)).map(|(_, l)| l);
        later
            .0
            .values()
            .chain(gone)
            .flat_map(|l| self.gaps_of(l, &stay))
            .collect()
    }

    fn gaps_of(&self, line: &Line, stay: &BTreeSet<Reader>) -> Vec<Gap> {
        let now = self.readers();
        let of = |branch: BranchId, after: Epoch, upto: Epoch| {
            let of = now.range(Reader { branch, epoch: after }..=Reader { branch, epoch: upto });
            of.map(|r| r.epoch).filter(|e| *e > after).collect::<Vec<_>>()
        };
        let mut gaps = Vec::new();
        let (mut last, mut gone) = (None::<(usize, Epoch)>, Vec::new());
        for (at, (branch, upto)) in line.branches.iter().enumerate() {
            // Readers younger than the point where the next branch stands: nobody follows them.
            let aside: Vec<_> = of(*branch, *upto, HEAD).into_iter().map(|e| (0, e)).collect();
            if !aside.is_empty() {
                gaps.push(Gap {
                    branches: vec![(*branch, HEAD)],
                    gone: aside,
                    older: *upto,
                    after: *upto,
                    newer: None,
                });
            }
            for epoch in of(*branch, Epoch::ZERO, *upto) {
                let reader = Reader {
                    branch: *branch,
                    epoch,
                };
                if stay.contains(&reader) {
                    gaps.extend(line.gap(last, std::mem::take(&mut gone), Some(reader)));
                    last = Some((at, epoch));
                } else {
                    gone.push((at, epoch));
                }
            }
        }
        gaps.extend(line.gap(last, gone, None));
        gaps
    }
}

impl Line {
    /// The gap that these readers leave between the one before and the one after them.
    fn gap(
        &self,
        last: Option<(usize, Epoch)>,
        gone: Vec<(usize, Epoch)>,
        newer: Option<Reader>,
    ) -> Option<Gap> {
        let first = last.map_or(0, |(at, _)| at);
        let origin = self.parent.map_or(Epoch::ZERO, |p| p.epoch);
        (!gone.is_empty()).then(|| Gap {
            branches: self.branches.iter().skip(first).copied().collect(),
            gone: gone.into_iter().map(|(at, e)| (at - first, e)).collect(),
            older: last.map_or(origin, |(_, e)| e),
            after: last.map_or(Epoch::ZERO, |(_, e)| e),
            newer,
        })
    }
}

impl Pool {
    /// What deleting all these snapshots together would give back, when the background has done its part. Exact for
    /// what no volume changes meanwhile.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Poisoned`.
    pub fn plan_delete(&self, ids: &[SnapshotId]) -> Result<DeletePlan> {
        let inner = &self.inner;
        // `E` lists what is committed, so that comes after the last step of a job.
        let _no_jobs = inner.job_gate.read().unwrap_or_else(PoisonError::into_inner);
        inner.commit_now()?;
        let now = {
            let state = inner.state();
            ids.iter().try_for_each(|id| state.live(*id).map(drop))?;
            Tree::of(&state, ids)
        };
        let later = now.without(ids);
        let stay = later.readers();
        let gaps = now.gaps(&later);

        let freed = inner.freed_by_all(&gaps)?.0;
        Ok(DeletePlan {
            freed_bytes: inner.place(freed),
            kept: ids.iter().filter(|id| stay.contains(id)).copied().collect(),
        })
    }

    /// What each of these snapshots alone holds: what deleting it, and nothing else, would give back. Counting stops
    /// after `limit`: the rest is `None`, and is found by a later call, which knows what this one has found.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Poisoned`.
    pub fn unique_bytes(&self, ids: &[SnapshotId], limit: Duration) -> Result<Vec<Option<u64>>> {
        let begun = Instant::now();
        self.inner.commit_now()?;
        ids.iter()
            .map(|id| {
                if begun.elapsed() < limit {
                    self.inner.unique_of(*id)
                } else {
                    Ok(None)
                }
            })
            .collect()
    }
}

impl Inner {
    fn unique_of(&self, id: SnapshotId) -> Result<Option<u64>> {
        let _no_jobs = self.job_gate.read().unwrap_or_else(PoisonError::into_inner);
        let now = {
            let state = self.state();
            // Deleted since it was listed.
            if state.live(id).is_err() {
                return Ok(None);
            }
            Tree::of(&state, &[id])
        };
        let gaps = now.gaps(&now.without(&[id]));
        // Between two snapshots of one branch nothing can change but by a deletion, which makes another gap.
        let fixed = match gaps.as_slice() {
            [gap] => gap
                .newer
                .filter(|r| r.epoch != HEAD)
                .map(|newer| (gap.older, newer)),
            _ => None,
        };
        let known = lock(&self.unique).get(&id).copied();
        if let (Some((older, newer)), Some((a, b, bytes))) = (fixed, known)
            && (a, b) == (older, newer)
        {
            return Ok(Some(bytes));
        }
        let (freed, alone) = self.freed_by_all(&gaps)?;
        let bytes = self.place(freed);
        let mut known = lock(&self.unique);
        // What is placed elsewhere too may lose that place without a deletion here.
        match fixed.filter(|_| alone) {
            Some((older, newer)) => known.insert(id, (older, newer, bytes)),
            None => known.remove(&id),
        };
        Ok(Some(bytes))
    }

    /// Grains that would be free without the readers of these gaps, and whether none of theirs has several places.
    fn freed_by_all(&self, gaps: &[Gap]) -> Result<(u64, bool)> {
        let mut shared = Lost::new();
        let mut freed = 0;
        for gap in gaps {
            freed += self.freed_by(gap, &mut shared)?;
        }
        Ok((freed + self.freed_of_shared(&shared)?, shared.is_empty()))
    }

    /// Grains with one place that would be free without the readers of the gap; those with several go to `shared`.
    fn freed_by(&self, gap: &Gap, shared: &mut Lost) -> Result<u64> {
        let (mut freed, mut from) = (0, Some(0));
        while let Some(first) = from {
            let mut pages: BTreeMap<PageNo, Vec<(usize, Epoch)>> = BTreeMap::new();
            let mut next: Option<PageNo> = None;
            for (at, (branch, last_epoch)) in gap.branches.iter().enumerate() {
                let after = if at == 0 { gap.after } else { Epoch::ZERO };
                let Some((last, upto)) = gap.gone.last().copied().filter(|(last, _)| *last >= at) else {
                    continue;
                };
                let upto = if last == at { upto } else { *last_epoch };
                let changed = self.changed_pages(*branch, after, upto, first, PAGES)?;
                for (page, epochs) in changed.pages {
                    let versions = epochs.into_iter().map(|e| (at, e));
                    pages.entry(page).or_default().extend(versions);
                }
                next = [next, changed.next].into_iter().flatten().min();
            }
            let complete = pages.iter().filter(|(page, _)| next.is_none_or(|n| **page < n));
            for (page, versions) in complete {
                freed += self.freed_in_page(gap, *page, versions, shared)?;
            }
            from = next;
        }
        Ok(freed)
    }

    fn freed_in_page(
        &self,
        gap: &Gap,
        page: PageNo,
        versions: &[(usize, Epoch)],
        shared: &mut Lost,
    ) -> Result<u64> {
        // What a reader sees is the youngest version that is not younger than itself; both lists are in order.
        let seen: BTreeSet<(usize, Epoch)> = gap
            .gone
            .iter()
            .filter_map(|reader| versions.iter().rfind(|v| *v <= reader).copied())
            .collect();
        if seen.is_empty() {
            return Ok(0);
        }
        let newer = match gap.newer {
            Some(r) => Some(self.resolve(r.branch, r.epoch, page)?.1),
            None => None,
        };
        let mut gone = HashSet::new();
        for (at, epoch) in seen {
            let (branch, _) = *gap
                .branches
                .get(at)
                .ok_or_else(|| Error::corrupt("history", format!("page {page}")))?;
            let version = self.exact(PageKey { branch, page, epoch })?;
            for (i, entry) in (0u8..).zip(version.iter()) {
                if let Some(grain) = entry.grain()
                    && entry.birth() > gap.older
                    && newer.as_ref().is_none_or(|n| !n.at(i).same_place(entry))
                {
                    gone.insert((i, grain, entry.birth()));
                }
            }
        }
        let mut freed = 0;
        for (_, grain, _) in gone {
            match self.references_of(grain)? {
                0 => freed += 1,
                _ => *shared.entry(grain).or_default() += 1,
            }
        }
        Ok(freed)
    }

    /// Extra references of a grain.
    fn references_of(&self, grain: u64) -> Result<u64> {
        loop {
            let found = self.state().alloc.references_of(grain);
            match found {
                Ok(n) => return Ok(n),
                Err(need) => self.satisfy(need)?,
            }
        }
    }

    /// Of the grains that lose some of their places, those that lose all.
    fn freed_of_shared(&self, shared: &Lost) -> Result<u64> {
        let mut freed = 0;
        for (grain, lost) in shared {
            freed += u64::from(*lost > self.references_of(*grain)?);
        }
        Ok(freed)
    }
}
