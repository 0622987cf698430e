//! The map against the bitmaps, while both change.

use std::collections::BTreeMap;

use super::pages::Versions;
use super::{MAP_PAGES, Scrub, ScrubPhase, ScrubStatus};
use crate::Result;
use crate::check::ProblemKind;
use crate::inner::Inner;
use crate::page::Page;
use crate::record::{self, Bits, CHUNK_GRAINS};
use crate::refs::{Refs, Touched};
use crate::state::{State, Txg};
use crate::types::{BranchId, Epoch, SnapshotId};

/// Chunks that are compared in one pass over the map: at most 64 MiB for their bits, twice.
const WINDOW: u32 = 65_536;

/// One bit for each of a set of grains.
#[derive(Default)]
pub(crate) struct GrainSet(BTreeMap<u32, Box<Bits>>);

impl GrainSet {
    /// Adds a grain; `false` when it was there.
    pub(crate) fn insert(&mut self, grain: u64) -> bool {
        let (chunk, word, bit) = place(grain);
        let bits = self
            .0
            .entry(chunk)
            .or_insert_with(|| Box::new([0; CHUNK_GRAINS / 64]));
        let Some(word) = bits.get_mut(word) else {
            return false;
        };
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    fn words(&self, chunk: u32) -> Bits {
        self.0.get(&chunk).map_or([0; CHUNK_GRAINS / 64], |bits| **bits)
    }
}

fn place(grain: u64) -> (u32, usize, u64) {
    let chunk = u32::try_from(grain / CHUNK_GRAINS as u64).unwrap_or(u32::MAX);
    let within = usize::try_from(grain % CHUNK_GRAINS as u64).unwrap_or(0);
    (chunk, within / 64, 1 << (within % 64))
}

/// A pass over the map for one window of chunks.
pub(super) struct MapPass {
    window: u32,
    used: GrainSet,
    /// How often grains were met after the first time, by chunk.
    again: BTreeMap<u32, Refs>,
}

impl MapPass {
    fn holds(&self, grain: u64) -> bool {
        place(grain).0 / WINDOW == self.window
    }
}

impl State {
    /// A page moves from one branch to another: a pass over the map may meet it twice or never.
    pub(crate) fn touch_page(&mut self, page: &Page) {
        if let Some(touched) = &mut self.touched {
            page.iter().filter_map(crate::page::Entry::grain).for_each(|g| {
                touched.insert(g);
            });
        }
    }

    /// A transaction group closes: what it took and gave back changed while a pass over the map may run.
    pub(crate) fn touch_closing(&mut self, txg: &Txg) {
        if let Some(touched) = &mut self.touched {
            txg.grains().for_each(|g| {
                touched.insert(g);
            });
        }
    }
}

impl Inner {
    pub(super) fn scrub_map(&self, scrub: &mut Scrub) -> Result<u64> {
        if scrub.map.is_none() {
            self.begin_map(scrub, 0)?;
        }
        let pages = self.pages_after(scrub.cursor, MAP_PAGES, &mut scrub.status)?;
        let Some(pass) = &mut scrub.map else { return Ok(0) };
        let first = pass.window == 0;
        let mut bytes = 0;
        for page in &pages {
            bytes += 512 * page.versions.len() as u64;
            self.place_all(page, pass, &mut scrub.status);
            if first {
                scrub.status.page_versions += page.versions.len() as u64;
                self.seen_by_somebody(page, &mut scrub.status);
            }
        }
        scrub.cursor = pages.last().map(|page| (page.branch, page.page)).or(scrub.cursor);
        if pages.len() == MAP_PAGES {
            return Ok(bytes);
        }
        let pass = scrub.map.take().expect("just used");
        let next = pass.window + 1;
        let chunks = self.compare_bitmaps(pass, &mut scrub.status)?;
        if u64::from(next) * u64::from(WINDOW) < u64::from(chunks) {
            self.begin_map(scrub, next)?;
        } else {
            self.state().touched = None;
            (scrub.status.phase, scrub.cursor) = (ScrubPhase::Data, None);
        }
        Ok(bytes)
    }

    /// From a moment on at which no group is between its close and its bitmaps, every change is known.
    fn begin_map(&self, scrub: &mut Scrub, window: u32) -> Result<()> {
        loop {
            self.commit_now()?;
            let mut state = self.state();
            if state.closing.is_none() && !state.committing {
                state.touched = Some(GrainSet::default());
                scrub.status.txg = state.durable;
                break;
            }
        }
        scrub.cursor = None;
        if window == 0 {
            (scrub.status.page_versions, scrub.status.grains_placed) = (0, 0);
        }
        let mut used = GrainSet::default();
        if window == 0 {
            // The superblocks take the place of the first grains.
            (0..crate::open::reserved_grains(self.grain_bytes)).for_each(|grain| {
                used.insert(grain);
            });
        }
        scrub.map = Some(MapPass {
            window,
            used,
            again: BTreeMap::new(),
        });
        Ok(())
    }

    /// Marks the placements of a page: what differs from the version before.
    fn place_all(&self, page: &Versions, pass: &mut MapPass, status: &mut ScrubStatus) {
        let mut before = &page.inherited;
        for (_, now) in &page.versions {
            for (old, new) in before.iter().zip(now.iter()) {
                // The same grain with another birth was copied back by reference: a second placement.
                let Some(grain) = new.grain().filter(|_| !old.same_place(new)) else {
                    continue;
                };
                if !pass.holds(grain) {
                    continue;
                }
                status.grains_placed += 1;
                if !pass.used.insert(grain) {
                    let (chunk, word, bit) = place(grain);
                    let again = pass.again.entry(chunk).or_default();
                    again.add(
                        word * 64 + bit.trailing_zeros() as usize,
                        1,
                        &mut Touched::default(),
                    );
                }
            }
            before = now;
        }
    }

    /// Versions that neither a snapshot nor a head sees (I6). Branches that a job works on are left out.
    fn seen_by_somebody(&self, page: &Versions, status: &mut ScrubStatus) {
        let state = self.state();
        let Some(branch) = state.branches.get(&page.branch) else {
            return;
        };
        if state.jobs.values().any(|job| job.kind.touches(page.branch)) {
            return;
        }
        let at = |epoch| SnapshotId {
            branch: page.branch,
            epoch,
        };
        let mut next = page.versions.iter().map(|(epoch, _)| *epoch).skip(1);
        let mut useless = Vec::new();
        for (epoch, _) in &page.versions {
            let until = next.next();
            let head = until.is_none() && branch.record.head;
            let end = until.unwrap_or(Epoch(u32::MAX));
            if !head && state.snapshots.range(at(*epoch)..at(end)).next().is_none() {
                useless.push(*epoch);
            }
        }
        drop(state);
        for epoch in useless {
            let text = format!(
                "page {} of branch {}: nobody sees epoch {}",
                page.page, page.branch.0, epoch.0
            );
            status.add(ProblemKind::UselessVersion, text);
        }
    }

    /// Holds one window of the bitmaps against what the map uses; gives the number of chunks of the pool.
    fn compare_bitmaps(&self, pass: MapPass, status: &mut ScrubStatus) -> Result<u32> {
        let none = Refs::default();
        let chunks = self.state().alloc.chunk_count();
        let first = pass.window * WINDOW;
        let end = first.saturating_add(WINDOW).min(chunks);
        for chunk in first..end {
            let (bits, refs, touched) = loop {
                self.load_chunk(chunk)?;
                let state = self.state();
                let since = state.touched.as_ref();
                let mut touched = since.map_or([0; CHUNK_GRAINS / 64], |t| t.words(chunk));
                state.open_grains(chunk, &mut touched);
                if let Some((bits, refs)) = state.alloc.bits(chunk).zip(state.alloc.references(chunk)) {
                    break (*bits, refs.clone(), touched);
                }
            };
            let used = pass.used.words(chunk);
            compare_chunk(chunk, &bits, &used, &touched, status);
            let again = pass.again.get(&chunk).unwrap_or(&none);
            compare_references(chunk, &refs, again, &touched, status);
        }
        Ok(chunks)
    }
}

impl State {
    /// Adds the grains of a chunk that the open group has taken or given back.
    fn open_grains(&self, chunk: u32, touched: &mut Bits) {
        for grain in self.open.grains() {
            let (c, word, bit) = place(grain);
            if c == chunk
                && let Some(word) = touched.get_mut(word)
            {
                *word |= bit;
            }
        }
    }
}

fn compare_references(chunk: u32, stated: &Refs, again: &Refs, touched: &Bits, status: &mut ScrubStatus) {
    if stated.is_empty() && again.is_empty() {
        return;
    }
    for index in 0..CHUNK_GRAINS {
        let (says, placed) = (stated.get(index), again.get(index));
        let is_touched = touched
            .get(index / 64)
            .is_some_and(|w| w & (1 << (index % 64)) != 0);
        if says == placed || is_touched {
            continue;
        }
        let grain = u64::from(chunk) * CHUNK_GRAINS as u64 + index as u64;
        let kind = if placed > says {
            ProblemKind::SharedGrain
        } else {
            ProblemKind::Leaked
        };
        let text = format!(
            "grain {grain} is placed {} times and has {says} extra references",
            placed + 1
        );
        status.add(kind, text);
    }
}

fn compare_chunk(chunk: u32, bits: &Bits, used: &Bits, touched: &Bits, status: &mut ScrubStatus) {
    let words = bits.iter().zip(used).zip(touched);
    for (word, ((bits, used), touched)) in (0u64..).zip(words) {
        for bit in record::indices((bits ^ used) & !touched) {
            let grain = u64::from(chunk) * CHUNK_GRAINS as u64 + word * 64 + u64::from(bit);
            if used & (1 << bit) != 0 {
                let text = format!("grain {grain} is in use but counts as free");
                status.add(ProblemKind::NotAllocated, text);
            } else {
                let text = format!("grain {grain} is allocated and nothing uses it");
                status.add(ProblemKind::Leaked, text);
            }
        }
    }
}

impl record::JobKind {
    /// Whether the job removes or moves page versions of a branch.
    pub(super) fn touches(self, branch: BranchId) -> bool {
        match self {
            Self::DropHead(b) | Self::Zero { branch: b, .. } => b == branch,
            Self::DropSnapshot(s) | Self::Lend { to: s, .. } => s.branch == branch,
            Self::Collapse { from, into } => from.branch == branch || into == branch,
        }
    }
}
