//! One pass over all versions of all pages: placements, who sees what, and what is seen by nobody.

use std::collections::{BTreeMap, BTreeSet};

use super::records::Records;
use super::{CheckReport, ProblemKind};
use crate::offline::Versions;
use crate::page::{PAGE_ENTRIES, Page};
use crate::record::{Bits, BranchRecord, CHUNK_GRAINS, PageKey};
use crate::types::{BranchId, Epoch, SnapshotId};

/// Mapped entries that each snapshot and each head sees, relative to what it inherits.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) snapshots: BTreeMap<SnapshotId, i64>,
    pub(crate) heads: BTreeMap<BranchId, i64>,
}

/// A recorded checksum, where it was met first.
pub(crate) struct Recorded {
    pub(crate) grain: u64,
    pub(crate) crc: u32,
    pub(crate) branch: BranchId,
    /// First byte of the grain on the volume.
    pub(crate) offset: u64,
}

/// Counts by grain, by chunk: only chunks that have any.
pub(crate) type Placements = BTreeMap<u32, Box<[u64; CHUNK_GRAINS]>>;

fn split(grain: u64) -> (u32, usize) {
    let chunk = u32::try_from(grain / CHUNK_GRAINS as u64).unwrap_or(u32::MAX);
    (chunk, usize::try_from(grain % CHUNK_GRAINS as u64).unwrap_or(0))
}

/// One pass over the map.
pub(crate) struct Walk<'a> {
    pub(crate) records: &'a Records,
    pub(crate) report: &'a mut CheckReport,
    pub(crate) used: &'a mut BTreeMap<u32, Box<Bits>>,
    pub(crate) tally: Tally,
    pub(crate) changed: BTreeSet<PageKey>,
    /// Recorded checksums of the page that was passed last, each grain once.
    pub(crate) recorded: Vec<Recorded>,
    /// Placements of grains beyond the first, by chunk.
    pub(crate) extra: Placements,
    /// Grains below this exist in the data file.
    pub(crate) limit: u64,
    pub(crate) grain_bytes: u64,
    /// Branches whose head a job is freeing.
    pub(crate) abandoned: BTreeSet<BranchId>,
}

impl Walk<'_> {
    pub(crate) fn page(&mut self, page: &Versions) {
        let (id, no) = (page.branch, page.page);
        self.report.page_versions += page.versions.len() as u64;
        let Some(branch) = self.records.branches.get(&id) else {
            self.report.add(
                ProblemKind::Inconsistent,
                format!("page {no} of branch {}, which is gone", id.0),
            );
            return;
        };
        let mut before = &page.inherited;
        for (epoch, content) in &page.versions {
            self.changed.insert(PageKey {
                branch: id,
                page: no,
                epoch: *epoch,
            });
            if *epoch > branch.current {
                let text = format!("page {no} of branch {} has epoch {} of the future", id.0, epoch.0);
                self.report.add(ProblemKind::Inconsistent, text);
            }
            self.place(page, *epoch, before, content, branch);
            before = content;
        }
        self.see(page, branch);
    }

    /// A grain that differs from the version before is a placement of its own; every grain may have one (I2).
    fn place(&mut self, at: &Versions, epoch: Epoch, before: &Page, now: &Page, branch: &BranchRecord) {
        for (index, (old, new)) in (0u64..).zip(before.iter().zip(now.iter())) {
            let offset = (u64::from(at.page) * PAGE_ENTRIES as u64 + index) * self.grain_bytes;
            let place = || format!("byte {offset} of branch {} at epoch {}", at.branch.0, epoch.0);
            if !new.is_hole() && (new.birth() > branch.current || offset >= branch.size_bytes) {
                self.report.add(
                    ProblemKind::Inconsistent,
                    format!("{}: entry {new:?} cannot be", place()),
                );
            }
            let Some(grain) = new.grain() else { continue };
            let known = old.grain() == Some(grain) && old.crc().is_some();
            if let Some(crc) = new.crc().filter(|_| !known) {
                self.recorded.push(Recorded {
                    grain,
                    crc,
                    branch: at.branch,
                    offset,
                });
            }
            if old.grain() == Some(grain) && new.birth() < old.birth() {
                let text = format!("{}: grain {grain} became older, {old:?} to {new:?}", place());
                self.report.add(ProblemKind::Inconsistent, text);
            }
            // The same grain with another birth was copied back by reference: a second placement.
            if old.same_place(new) {
                if old.crc().zip(new.crc()).is_some_and(|(a, b)| a != b) {
                    let text = format!(
                        "{}: grain {grain} changed its checksum, {old:?} to {new:?}",
                        place()
                    );
                    self.report.add(ProblemKind::Inconsistent, text);
                }
                continue;
            }
            // A known bad one may stand for what is lost: there was never data.
            if grain >= self.limit && !self.records.bad.contains_key(&grain) {
                let text = format!("{}: grain {grain} lies beyond the data file", place());
                self.report.add(ProblemKind::Inconsistent, text);
            }
            if !self.mark(grain) {
                let (chunk, index) = split(grain);
                let counts = self.extra.entry(chunk);
                let counts = counts.or_insert_with(|| Box::new([0; CHUNK_GRAINS]));
                if let Some(count) = counts.get_mut(index) {
                    *count += 1;
                }
            }
        }
    }

    pub(crate) fn mark(&mut self, grain: u64) -> bool {
        let (chunk, within) = split(grain);
        let bits = self
            .used
            .entry(chunk)
            .or_insert_with(|| Box::new([0; CHUNK_GRAINS / 64]));
        let Some(word) = bits.get_mut(within / 64) else {
            return false;
        };
        let mask = 1 << (within % 64);
        let fresh = *word & mask == 0;
        *word |= mask;
        fresh
    }

    /// Which snapshots and heads see which version: for the counts, and for versions that nobody sees (I6).
    fn see(&mut self, page: &Versions, branch: &BranchRecord) {
        let inherited = i64::try_from(page.inherited.mapped()).unwrap_or(0);
        let more = |content: &Page| i64::try_from(content.mapped()).unwrap_or(0) - inherited;
        let mut next = page.versions.iter().map(|(epoch, _)| *epoch).skip(1);
        for (epoch, content) in &page.versions {
            let until = next.next();
            let mut seen = until.is_none() && branch.head;
            let at = |epoch| SnapshotId {
                branch: page.branch,
                epoch,
            };
            let end = until.unwrap_or(Epoch(u32::MAX));
            for (id, _) in self.records.snapshots.range(at(*epoch)..at(end)) {
                *self.tally.snapshots.entry(*id).or_default() += more(content);
                seen = true;
            }
            if until.is_none() && branch.head {
                *self.tally.heads.entry(page.branch).or_default() += more(content);
            }
            // A job frees what lies above the last snapshot of an abandoned head.
            let abandoned = until.is_none() && self.abandoned.contains(&page.branch);
            if !seen && !abandoned {
                let text = format!(
                    "page {} of branch {}: nobody sees epoch {}",
                    page.page, page.branch.0, epoch.0
                );
                self.report.add(ProblemKind::UselessVersion, text);
            }
        }
    }
}
