//! Pages of a pool at work, one after the other, and their data.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use super::{Cursor, DATA_PAGES, Scrub, ScrubPhase, ScrubStatus};
use crate::bad::Bad;
use crate::check::ProblemKind;
use crate::inner::Inner;
use crate::page::{Entry, PAGE_ENTRIES, Page, PageNo};
use crate::record::{self, Key, PageKey, key, table};
use crate::types::{BranchId, Epoch};
use crate::{Error, Result};

/// All versions of one page of one branch, oldest first, and what it shows of the snapshot below.
pub(super) struct Versions {
    pub(super) branch: BranchId,
    pub(super) page: PageNo,
    pub(super) inherited: Page,
    pub(super) versions: Vec<(Epoch, Page)>,
}

/// A grain whose checksum is recorded, and where.
#[derive(Clone, Copy)]
struct Recorded {
    key: PageKey,
    index: u8,
    grain: u64,
    entry: Entry,
}

impl Inner {
    /// Up to `limit` pages after a place, in the order of branches and pages.
    pub(super) fn pages_after(
        &self,
        mut after: Cursor,
        limit: usize,
        status: &mut ScrubStatus,
    ) -> Result<Vec<Versions>> {
        // Jobs move and remove pages; the store still has what they removed until their commit.
        let _no_jobs = self.job_gate.read().unwrap_or_else(PoisonError::into_inner);
        self.settle_removed()?;
        let mut pages = Vec::new();
        while pages.len() < limit {
            let Some(place) = self.page_after(after)? else {
                break;
            };
            after = Some(place);
            pages.extend(self.all_versions(place.0, place.1, status)?);
        }
        Ok(pages)
    }

    /// Waits until versions that were removed are gone from the store.
    fn settle_removed(&self) -> Result<()> {
        let (removed, closing) = {
            let state = self.state();
            (!state.open.removed.is_empty(), state.closing)
        };
        match closing {
            _ if removed => self.commit_now(),
            Some(txg) => self.commit_through(txg),
            None => Ok(()),
        }
    }

    /// The next page that has a version, in RAM or in the store.
    fn page_after(&self, after: Cursor) -> Result<Cursor> {
        let mut from = match after {
            Some((branch, page)) => key::page_end(branch, page),
            None => vec![table::PAGE],
        };
        let stored = loop {
            let found = self.meta(self.meta.scan(from, vec![table::PAGE + 1], 1))?.pop();
            match found {
                None => break None,
                Some((key, _)) => match Key::parse(&key) {
                    Ok(Key::Page(k)) => break Some((k.branch, k.page)),
                    // Reported with the value.
                    _ => {
                        from = key;
                        from.push(0);
                    }
                },
            }
        };
        let dirty = self.state().map.dirty_after(after);
        Ok([stored, dirty].into_iter().flatten().min())
    }

    /// What RAM has of a page is newer than what the store has.
    fn all_versions(
        &self,
        branch: BranchId,
        page: PageNo,
        status: &mut ScrubStatus,
    ) -> Result<Option<Versions>> {
        let (ram, parent) = {
            let state = self.state();
            let Some(b) = state.branches.get(&branch) else {
                drop(state);
                let text = format!("page {page} of branch {}, which is gone", branch.0);
                status.add(ProblemKind::Inconsistent, text);
                return Ok(None);
            };
            (state.map.own_versions((branch, page)), b.record.parent)
        };
        let from = key::page(PageKey {
            branch,
            page,
            epoch: Epoch(u32::MAX),
        });
        let mut versions = BTreeMap::new();
        for (k, value) in self.meta(self.meta.scan(from, key::page_end(branch, page), usize::MAX))? {
            match crate::inner::parse_page(&k, &value) {
                Ok((k, page)) => drop(versions.insert(k.epoch, page)),
                Err(error) => status.damaged(&error),
            }
        }
        versions.extend(ram);
        let inherited = match parent {
            Some(p) => match self.resolve(p.branch, p.epoch, page) {
                Ok((_, page)) => page,
                // Reported when its own turn comes.
                Err(Error::Corrupt { .. }) => Page::default(),
                Err(error) => return Err(error),
            },
            None => Page::default(),
        };
        Ok(Some(Versions {
            branch,
            page,
            inherited,
            versions: versions.into_iter().collect(),
        }))
    }

    pub(super) fn scrub_data(&self, scrub: &mut Scrub) -> Result<u64> {
        if scrub.cursor.is_none() {
            (scrub.status.grains_verified, scrub.status.grains_without) = (0, 0);
            self.retry_bad(&mut scrub.status);
        }
        let pages = self.pages_after(scrub.cursor, DATA_PAGES, &mut scrub.status)?;
        let mut bytes = 0;
        for page in &pages {
            let recorded = recorded(page, &mut scrub.status);
            bytes += recorded.len() as u64 * u64::from(self.grain_bytes);
            for run in recorded.chunk_by(|a, b| b.grain == a.grain + 1) {
                self.verify_run(run, &mut scrub.status);
            }
            self.hook("scrub.page");
        }
        scrub.cursor = pages.last().map(|page| (page.branch, page.page)).or(scrub.cursor);
        if pages.len() < DATA_PAGES {
            (scrub.status.phase, scrub.cursor) = (ScrubPhase::Done, None);
        }
        Ok(bytes)
    }

    /// Grains that read right again are not bad any more: the cable was, or the memory.
    fn retry_bad(&self, status: &mut ScrubStatus) {
        let known: Vec<(u64, Option<u32>)> = self.state().bad.all().collect();
        for (grain, crc) in known {
            let right = match self.crc_of(grain) {
                Some(found) => crc.is_none_or(|crc| crc == found),
                None => false,
            };
            if right {
                self.state().forget_bad(grain);
            } else if crc.is_none() {
                // Those with a checksum are met again where it is recorded.
                status.add(ProblemKind::BadData, format!("grain {grain} cannot be read"));
            }
        }
    }

    fn crc_of(&self, grain: u64) -> Option<u32> {
        let mut bytes = vec![0; self.grain_bytes as usize];
        let read = self.disk.read_at(self.place(grain), &mut bytes);
        read.is_ok().then(|| crc32c::crc32c(&bytes))
    }

    /// Compares neighbouring grains.
    fn verify_run(&self, run: &[Recorded], status: &mut ScrubStatus) {
        let size = self.grain_bytes as usize;
        let Some(first) = run.first() else { return };
        let mut bytes = vec![0; run.len() * size];
        let read = self.disk.read_at(self.place(first.grain), &mut bytes).is_ok();
        status.grains_verified += run.len() as u64;
        for (sum, bytes) in run.iter().zip(bytes.chunks_exact(size)) {
            if !(read && Some(crc32c::crc32c(bytes)) == sum.entry.crc()) {
                self.suspect(sum, status);
            }
        }
    }

    /// Bytes that did not fit: if the entry is still there they should, since a grain with a checksum is never
    /// written again. Otherwise it was given back meanwhile.
    fn suspect(&self, sum: &Recorded, status: &mut ScrubStatus) {
        let now = self.exact(sum.key).ok().map(|page| page.at(sum.index));
        if now != Some(sum.entry) {
            return;
        }
        let found = self.crc_of(sum.grain);
        if found == sum.entry.crc() {
            return;
        }
        let place = u64::from(sum.key.page) * PAGE_ENTRIES as u64 + u64::from(sum.index);
        let offset = place * u64::from(self.grain_bytes);
        let (volume, name) = {
            let state = self.state();
            let record = state.branches.get(&sum.key.branch).map(|b| &b.record);
            (
                record.map(|r| r.volume),
                record.map(|r| r.name.clone()).unwrap_or_default(),
            )
        };
        let bad = Bad {
            grain: sum.grain,
            crc: sum.entry.crc(),
            place,
            offset,
        };
        self.found_bad(volume, &[bad]);
        let trouble = match found {
            Some(_) => "is not what was written (checksum)",
            None => "cannot be read",
        };
        let text = format!(
            "volume {name:?}: {} bytes at {offset} (grain {}): {trouble}",
            self.grain_bytes, sum.grain
        );
        status.add(ProblemKind::BadData, text);
    }
}

/// Checksums that this page records and that nothing older of it does: each grain once.
fn recorded(page: &Versions, status: &mut ScrubStatus) -> Vec<Recorded> {
    let mut list = Vec::new();
    let mut before = &page.inherited;
    for (epoch, now) in &page.versions {
        for (index, (old, new)) in (0u8..).zip(before.iter().zip(now.iter())) {
            let Some(grain) = new.grain() else { continue };
            let same = old.grain() == Some(grain);
            match new.crc() {
                Some(_) if !(same && old.crc().is_some()) => list.push(Recorded {
                    key: PageKey {
                        branch: page.branch,
                        page: page.page,
                        epoch: *epoch,
                    },
                    index,
                    grain,
                    entry: new,
                }),
                None if !same => status.grains_without += 1,
                _ => {}
            }
        }
        before = now;
    }
    list.sort_by_key(|sum| sum.grain);
    list
}

/// Decodes a record of any table.
///
/// # Errors
/// `Corrupt` or `Version`.
pub(crate) fn verify(bytes: &[u8], value: &[u8]) -> Result<()> {
    match Key::parse(bytes)? {
        Key::System => {
            record::SystemRecord::decode(value)?;
        }
        Key::Branch(id) => drop(record::BranchRecord::decode(id, value)?),
        Key::Snapshot(id) => drop(record::SnapshotRecord::decode(id, value)?),
        Key::Page(k) => drop(record::decode_page(k, value)?),
        Key::Changed(_) => {}
        Key::Bitmap(chunk) => drop(record::decode_bitmap(chunk, value)?),
        Key::References(chunk, part) => drop(record::decode_references(chunk, part, value)?),
        Key::Spilled(chunk, index) => drop(record::decode_spilled(chunk, index, value)?),
        Key::Counts(block) => drop(record::decode_counts(block, value)?),
        Key::Journal(txg, seq) => drop(record::decode_journal(txg, seq, value)?),
        Key::Job(id) => drop(record::JobRecord::decode(id, value)?),
        Key::Bad(grain) => drop(record::BadRecord::decode(grain, value)?),
        Key::Value(name) => drop(record::decode_value(&name, value)?),
    }
    Ok(())
}
