//! What changed between two points of a history: exact to the grain, across reverts and clones.

use std::collections::BTreeSet;

use crate::loan::Loan;
use crate::page::PageNo;
use crate::pool::Pool;
use crate::tomb::Tomb;
use crate::types::{BranchId, DiffPart, DiffTo, Epoch, Extent, SnapshotId};
use crate::volume::{Extents, kind_of};
use crate::{Error, Result};

/// Pages looked at per step.
const PAGES: usize = 4096;
/// Extents per step of [`Pool::diff`].
const EXTENTS: usize = 65_536;

/// Versions of a branch with `after < epoch <= upto` may differ between the two sides.
struct Segment {
    branch: BranchId,
    after: Epoch,
    upto: Epoch,
}

/// A point in time: a branch as of an epoch.
#[derive(Clone, Copy)]
struct At {
    branch: BranchId,
    epoch: Epoch,
}

impl Pool {
    /// Ranges that differ between `from` (`None` = an empty volume) and `to`. For very large results use
    /// [`Pool::diff_part`].
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Poisoned`.
    pub fn diff(&self, from: Option<SnapshotId>, to: DiffTo) -> Result<Vec<Extent>> {
        let mut all = Extents::new(usize::MAX);
        let mut next = Some(0);
        while let Some(start) = next {
            let part = self.diff_part(from, to, start, EXTENTS)?;
            for e in part.extents {
                all.add(e.offset..e.offset + e.len, e.kind);
            }
            next = part.next;
        }
        Ok(all.list)
    }

    /// A piece of a diff: from byte `start` on, at most `max` extents.
    ///
    /// # Errors
    /// As [`Pool::diff`].
    pub fn diff_part(
        &self,
        from: Option<SnapshotId>,
        to: DiffTo,
        start: u64,
        max: usize,
    ) -> Result<DiffPart> {
        let inner = &self.inner;
        // `E` lists what is committed, so that comes after the last step of a job.
        let _no_jobs = inner
            .job_gate
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        inner.commit_now()?;
        let (old, new, size, segments) = self.sides(from, to)?;
        let page_bytes = inner.page_bytes();
        if start >= size {
            return Ok(DiffPart {
                extents: Vec::new(),
                next: None,
            });
        }
        let first = PageNo::try_from(start / page_bytes).map_err(|_| out_of_range(start, size))?;
        let (pages, complete) = self.candidates(&segments, first)?;
        let mut out = Extents::new(max.max(1));
        for page in pages {
            let older = match old {
                Some(at) => inner.resolve(at.branch, at.epoch, page)?.1,
                None => crate::page::Page::default(),
            };
            let newer = inner.resolve(new.branch, new.epoch, page)?.1;
            let base = u64::from(page) * page_bytes;
            for (i, (a, b)) in (0u64..).zip(older.iter().zip(newer.iter())) {
                let begin = (base + i * u64::from(inner.grain_bytes)).max(start);
                let end = (base + (i + 1) * u64::from(inner.grain_bytes)).min(size);
                if a.grain() != b.grain() && begin < end && !out.add(begin..end, kind_of(b)) {
                    return Ok(DiffPart {
                        extents: out.list,
                        next: Some(begin),
                    });
                }
            }
        }
        let next = complete.map(|p| u64::from(p) * page_bytes).filter(|n| *n < size);
        Ok(DiffPart {
            extents: out.list,
            next,
        })
    }

    fn sides(&self, from: Option<SnapshotId>, to: DiffTo) -> Result<(Option<At>, At, u64, Vec<Segment>)> {
        let state = self.inner.state();
        let (new, size) = match to {
            DiffTo::Snapshot(id) => (
                At {
                    branch: id.branch,
                    epoch: id.epoch,
                },
                state.live(id)?.size_bytes,
            ),
            DiffTo::Head(id) => {
                let shared = state.volumes.get(&id);
                let shared = shared.ok_or_else(|| Error::NotFound {
                    what: format!("volume number {id}"),
                })?;
                (
                    At {
                        branch: shared.head(),
                        epoch: Epoch(u32::MAX),
                    },
                    shared.size(),
                )
            }
        };
        let old = match from {
            Some(id) => {
                state.live(id)?;
                Some(At {
                    branch: id.branch,
                    epoch: id.epoch,
                })
            }
            None => None,
        };
        let chain = |start: At| {
            let below = |at: &At| {
                let parent = state.branches.get(&at.branch)?.record.parent?;
                Some(At {
                    branch: parent.branch,
                    epoch: parent.epoch,
                })
            };
            std::iter::successors(Some(start), below).collect::<Vec<At>>()
        };
        let olds = old.map(chain).unwrap_or_default();
        Ok((old, new, size, segments(&chain(new), &olds)))
    }

    /// Pages that may differ, from `first` on, and the page from which on the list is not complete.
    fn candidates(&self, segments: &[Segment], first: PageNo) -> Result<(BTreeSet<PageNo>, Option<PageNo>)> {
        let mut pages = BTreeSet::new();
        let mut next: Option<PageNo> = None;
        for s in segments {
            let changed = self
                .inner
                .changed_pages(s.branch, s.after, s.upto, first, PAGES)?;
            pages.extend(changed.pages.into_keys());
            next = [next, changed.next].into_iter().flatten().min();
            // What a tombstone or a loan between the two changes has no version of its own yet.
            let tombs: Vec<_> = {
                let state = self.inner.state();
                let between = |t: &&Tomb| t.epoch >= s.after && t.epoch < s.upto;
                state.tombs.of_branch(s.branch).filter(between).copied().collect()
            };
            let loans: Vec<_> = {
                let state = self.inner.state();
                let between = |l: &&Loan| l.to.epoch >= s.after && l.to.epoch < s.upto;
                state.loans.of_branch(s.branch).filter(between).copied().collect()
            };
            let tombs = tombs.iter().map(|t| (t.first, t.end));
            for (begin, end) in tombs.chain(loans.iter().map(|l| (l.first, l.end))) {
                let (from, to) = (first.max(begin), end.saturating_sub(1));
                let (hidden, more) = self.inner.present_pages(s.branch, from, to, PAGES)?;
                pages.extend(hidden);
                next = [next, more].into_iter().flatten().min();
            }
        }
        if let Some(next) = next {
            pages.retain(|p| *p < next);
        }
        Ok((pages, next))
    }
}

fn out_of_range(offset: u64, size: u64) -> Error {
    Error::OutOfRange { offset, len: 0, size }
}

/// What lies between the two sides and the point where their histories part.
fn segments(new: &[At], old: &[At]) -> Vec<Segment> {
    let meeting = new
        .iter()
        .find_map(|n| Some((*n, *old.iter().find(|o| o.branch == n.branch)?)));
    let mut segments = Vec::new();
    for side in [new, old] {
        let own = side
            .iter()
            .take_while(|at| meeting.is_none_or(|(n, _)| n.branch != at.branch));
        segments.extend(own.map(|at| Segment {
            branch: at.branch,
            after: Epoch::ZERO,
            upto: at.epoch,
        }));
    }
    if let Some((n, o)) = meeting {
        let (after, upto) = (n.epoch.min(o.epoch), n.epoch.max(o.epoch));
        segments.push(Segment {
            branch: n.branch,
            after,
            upto,
        });
    }
    segments
}
