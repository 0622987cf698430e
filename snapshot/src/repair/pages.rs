//! Map pages that cannot be read, and what is still known of them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{first_new_grain, is_seen};
use crate::Result;
use crate::check::Records;
use crate::loan::Loans;
use crate::meta::MetaStore;
use crate::offline::{Overlay, Pages, Versions, each};
use crate::page::{Entry, PAGE_ENTRIES, Page, PageNo};
use crate::record::{self, BadRecord, Key, PageKey, SystemRecord, table};
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, SnapshotId, SnapshotState};

/// Stored page versions that do not decode. Each gets grains of its own behind the end of the data file, with a checksum that
/// nothing there has: what is not known reads as an error until it is written.
#[derive(Default)]
pub(super) struct LostPages(BTreeMap<PageKey, u64>);

/// What is read while pages are repaired.
struct Known<'a> {
    system: &'a SystemRecord,
    records: &'a Records,
    overlay: &'a Overlay,
    pages: &'a Pages<'a>,
}

/// A page as it will be, and what is lost of it.
struct Repaired {
    versions: Versions,
    losses: Vec<String>,
}

impl LostPages {
    pub(super) fn find(meta: &mut dyn MetaStore) -> Result<Self> {
        let mut lost = BTreeMap::new();
        each(meta, table::PAGE, |_, (key, value)| {
            if let Ok(Key::Page(k)) = Key::parse(&key)
                && record::decode_page(k, &value).is_err()
            {
                let number = lost.len() as u64;
                lost.insert(k, number);
            }
            Ok(())
        })?;
        Ok(Self(lost))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Grains that stand for what is not known.
    pub(super) fn placeholders(&self, system: &SystemRecord) -> Range<u64> {
        let first = first_new_grain(system);
        first..first + self.0.len() as u64 * PAGE_ENTRIES as u64
    }

    /// Calls `visit` with every page as it will be, and what is lost of it.
    pub(super) fn each_page(
        &self,
        meta: &mut dyn MetaStore,
        system: &SystemRecord,
        records: &Records,
        overlay: &Overlay,
        mut visit: impl FnMut(Versions, Vec<String>) -> Result<()>,
    ) -> Result<()> {
        let parents = records.parents();
        let (tombs, loans) = (Tombs::of(&records.jobs), Loans::of(&records.jobs));
        let pages = Pages {
            tombs: &tombs,
            loans: &loans,
            overlay,
            parents: &parents,
        };
        let mut places = Vec::new();
        // Damaged versions are known already; here they are empty but for their deltas.
        pages.each(meta, &mut |_| {}, |page| {
            places.push((page.branch, page.page));
            Ok(())
        })?;
        for (branch, page) in places {
            let known = Known {
                system,
                records,
                overlay,
                pages: &pages,
            };
            let Repaired { mut versions, losses } = self.whole(meta, &known, branch, page)?;
            remove_unseen(&mut versions, records);
            visit(versions, losses)?;
        }
        Ok(())
    }

    /// A page as it will be, what it inherits included.
    fn whole(
        &self,
        meta: &mut dyn MetaStore,
        known: &Known<'_>,
        branch: BranchId,
        page: PageNo,
    ) -> Result<Repaired> {
        let mut versions = known.pages.versions(meta, branch, page, &mut |_| {})?;
        if self.0.keys().all(|k| k.page != page) {
            return Ok(Repaired {
                versions,
                losses: Vec::new(),
            });
        }
        if let Some(parent) = known.pages.parents.get(&branch) {
            let below = self.whole(meta, known, parent.branch, page)?.versions;
            let seen = below.versions.into_iter().rev().find(|(e, _)| *e <= parent.epoch);
            versions.inherited = seen.map_or(below.inherited, |(_, content)| content);
        }
        if versions
            .versions
            .iter()
            .all(|(e, _)| self.at(&versions, *e).is_none())
        {
            return Ok(Repaired {
                versions,
                losses: Vec::new(),
            });
        }
        let heirs = heirs(meta, known.pages, branch, page)?;
        Ok(self.repair(versions, known, &heirs))
    }

    fn at(&self, page: &Versions, epoch: Epoch) -> Option<u64> {
        let key = PageKey {
            branch: page.branch,
            page: page.page,
            epoch,
        };
        self.0.get(&key).copied()
    }

    /// From the newest version to the oldest: what a newer one has from before its own time, this one had too.
    fn repair(&self, mut page: Versions, known: &Known<'_>, heirs: &[(Epoch, Page)]) -> Repaired {
        let Known { system, records, .. } = *known;
        let mut losses = Vec::new();
        let mut newer: Option<(Epoch, Page)> = None;
        let all = std::mem::take(&mut page.versions);
        for (epoch, content) in all.into_iter().rev() {
            let mut content = content;
            if let Some(number) = self.at(&page, epoch) {
                let key = PageKey {
                    branch: page.branch,
                    page: page.page,
                    epoch,
                };
                let logged = known.overlay.mask(key);
                let until = newer.as_ref().map(|(e, _)| *e);
                let mut unknown = Vec::new();
                for index in 0..64u8 {
                    if logged & (1 << index) != 0 {
                        continue;
                    }
                    let copied = newer.as_ref().and_then(|n| inherited(n, index));
                    let copied = copied.or_else(|| {
                        let seen = heirs
                            .iter()
                            .filter(|(at, _)| *at >= epoch && until.is_none_or(|u| *at < u));
                        seen.map(|(at, heir)| (*at, heir.at(index)))
                            .find(|(at, e)| !e.is_hole() && e.birth() <= *at)
                            .map(|(_, e)| e)
                    });
                    let copied = copied.filter(|e| !is_no_witness(records, key, *e));
                    if let Some(entry) = copied {
                        content.set(index, entry);
                    } else if fits(records, system, key, index) {
                        let grain = first_new_grain(system) + number * PAGE_ENTRIES as u64 + u64::from(index);
                        let crc = Some(impossible_crc(system.grain_bytes));
                        content.set(index, Entry::mapped(grain, epoch).with_crc(crc));
                        unknown.push(index);
                    }
                }
                losses.extend(name_loss(records, system, key, until, &unknown));
            }
            newer = Some((epoch, content.clone()));
            page.versions.push((epoch, content));
        }
        page.versions.reverse();
        Repaired {
            versions: page,
            losses,
        }
    }
}

/// Whether an entry lies within the volume at all.
fn fits(records: &Records, system: &SystemRecord, key: PageKey, index: u8) -> bool {
    let number = u64::from(key.page) * PAGE_ENTRIES as u64 + u64::from(index);
    let offset = number * u64::from(system.grain_bytes);
    let branch = records.branches.get(&key.branch);
    branch.is_some_and(|branch| offset < branch.size_bytes)
}

/// An entry that a version got from the one before it: it was born earlier than the version.
fn inherited((epoch, page): &(Epoch, Page), index: u8) -> Option<Entry> {
    let entry = page.at(index);
    (!entry.is_hole() && entry.birth() < *epoch).then_some(entry)
}

/// Whether an entry of a younger reader says nothing of the damaged version. A loan shows another volume's grains, and a
/// tombstone zeroes, where older readers have their own: both are born after a snapshot that closed this version, or
/// in the epoch that the tombstone took (and no snapshot then).
fn is_no_witness(records: &Records, damaged: PageKey, entry: Entry) -> bool {
    let (branch, born) = (damaged.branch, entry.birth());
    let mut closed = records.snapshots_of(branch).map(|(id, _)| id.epoch);
    let is_later = closed.any(|epoch| epoch >= damaged.epoch && epoch < born);
    let cut = SnapshotId { branch, epoch: born };
    is_later || (entry.is_zero() && born >= damaged.epoch && !records.snapshots.contains_key(&cut))
}

/// What unwritten space does not have.
fn impossible_crc(grain_bytes: u32) -> u32 {
    !crc32c::crc32c(&vec![0; grain_bytes as usize])
}

/// Oldest versions of branches that stand on a branch, with the epoch at which they do: they began as copies.
fn heirs(
    meta: &mut dyn MetaStore,
    pages: &Pages<'_>,
    branch: BranchId,
    page: PageNo,
) -> Result<Vec<(Epoch, Page)>> {
    let mut found = Vec::new();
    for (child, parent) in pages.parents.iter().filter(|(_, p)| p.branch == branch) {
        let own = pages.versions(meta, *child, page, &mut |_| {})?;
        match own.versions.into_iter().next() {
            Some((_, oldest)) => found.push((parent.epoch, oldest)),
            None => {
                let below = heirs(meta, pages, *child, page)?;
                found.extend(below.into_iter().map(|(_, heir)| (parent.epoch, heir)));
            }
        }
    }
    Ok(found)
}

fn remove_unseen(page: &mut Versions, records: &Records) {
    let epochs: Vec<Epoch> = page.versions.iter().map(|(e, _)| *e).collect();
    let mut next = epochs.iter().skip(1);
    let seen: Vec<bool> = epochs
        .iter()
        .map(|epoch| {
            let key = PageKey {
                branch: page.branch,
                page: page.page,
                epoch: *epoch,
            };
            is_seen(records, key, next.next().copied())
        })
        .collect();
    let mut seen = seen.into_iter();
    page.versions.retain(|_| seen.next().unwrap_or(true));
}

/// Which range of which volume and snapshots is lost.
fn name_loss(
    records: &Records,
    system: &SystemRecord,
    key: PageKey,
    until: Option<Epoch>,
    unknown: &[u8],
) -> Option<String> {
    let (first, last) = (unknown.first()?, unknown.last()?);
    let branch = records.branches.get(&key.branch)?;
    let grain = u64::from(system.grain_bytes);
    let offset = |index: u64| (u64::from(key.page) * PAGE_ENTRIES as u64 + index) * grain;
    let (from, to) = (offset(u64::from(*first)), offset(u64::from(*last) + 1));
    let (from, to) = (from, to.min(branch.size_bytes));
    let block = u64::from(branch.block_size.max(1));
    let mut viewers = Vec::new();
    if until.is_none() && branch.head {
        viewers.push("the volume as it is now".to_owned());
    }
    let snapshots = records.snapshots_of(key.branch);
    let seen = snapshots.filter(|(id, n)| {
        n.state == SnapshotState::Live && id.epoch >= key.epoch && until.is_none_or(|u| id.epoch < u)
    });
    viewers.extend(seen.map(|(_, n)| format!("snapshot {:?}", n.name)));
    for child in records
        .branches
        .values()
        .filter(|b| b.parent.is_some_and(|p| p.branch == key.branch))
    {
        viewers.push(format!("what volume {:?} shares of it", child.name));
    }
    Some(format!(
        "volume {:?}: {} of the {} blocks {}..{} (bytes {from}..{to}) read as an error until they are written anew: {}",
        branch.name,
        unknown.len() as u64 * grain / block,
        (to - from) / block,
        from / block,
        to / block,
        viewers.join(", ")
    ))
}

/// The records of the grains that stand for lost ones, so that they are listed at once.
pub(super) fn bad_records(page: &Versions, placeholders: &Range<u64>, now_ms: i64) -> Vec<(u64, BadRecord)> {
    let mut list = Vec::new();
    for (_, content) in &page.versions {
        for (index, entry) in (0u64..).zip(content.iter()) {
            if let Some(grain) = entry.grain().filter(|g| placeholders.contains(g)) {
                let record = BadRecord {
                    crc: entry.crc(),
                    found_ms: now_ms,
                    places: vec![u64::from(page.page) * PAGE_ENTRIES as u64 + index],
                };
                list.push((grain, record));
            }
        }
    }
    list
}
