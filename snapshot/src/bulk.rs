//! Many neighbouring pages at once: one question to the metadata store instead of one for each.

use std::ops::RangeInclusive;

use crate::Result;
use crate::inner::{Inner, parse_page};
use crate::page::{Page, PageNo};
use crate::record::{PageKey, key};
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch};

/// A page and the epoch of its version, if that is the branch's own.
type Found = (Option<Epoch>, Page);

impl Inner {
    /// What [`Inner::resolve`] says of each of these pages, in their order.
    pub(crate) fn resolve_many(
        &self,
        branch: BranchId,
        epoch: Epoch,
        pages: RangeInclusive<PageNo>,
    ) -> Result<Vec<Found>> {
        self.resolve_all(branch, epoch, pages, true)
    }

    fn resolve_all(
        &self,
        branch: BranchId,
        epoch: Epoch,
        pages: RangeInclusive<PageNo>,
        own_tombs: bool,
    ) -> Result<Vec<Found>> {
        self.stable(|| {
            // Asked at each look: a loan that begins before it must not be passed over.
            if !self.state().loans.is_empty() {
                let one = |page| self.resolve_once(branch, epoch, page, own_tombs, u64::MAX);
                return pages.clone().map(one).collect();
            }
            let mut tombs = vec![Tombs::default(); pages.clone().count()];
            let mut found: Vec<Option<Found>> = pages.clone().map(|_| None).collect();
            let (mut b, mut e) = (branch, epoch);
            loop {
                if own_tombs || b != branch {
                    self.tombs_over(b, e, *pages.start(), &found, &mut tombs);
                }
                let parent = self.resolve_level(b, e, b == branch, *pages.start(), &mut found)?;
                match parent {
                    Some(p) if found.iter().any(Option::is_none) => (b, e) = (p.branch, p.epoch),
                    _ => break,
                }
            }
            let nothing = || (None, Page::default());
            let mut found: Vec<Found> = found.into_iter().map(|f| f.unwrap_or_else(nothing)).collect();
            for ((_, page), tombs) in found.iter_mut().zip(&tombs) {
                tombs.mask_all(page);
            }
            Ok(found)
        })
    }

    /// Tombstones of one branch over pages that are still missing. Before these are looked for: one that goes meanwhile
    /// has buried its pages.
    fn tombs_over(
        &self,
        branch: BranchId,
        epoch: Epoch,
        first: PageNo,
        found: &[Option<Found>],
        over: &mut [Tombs],
    ) {
        let state = self.state();
        if state.tombs.is_empty() {
            return;
        }
        for (page, (found, over)) in (first..).zip(found.iter().zip(over)) {
            if found.is_none() {
                over.join(state.tombs.over(branch, epoch, page));
            }
        }
    }

    /// Fills in what one branch has of the pages that are still missing; gives what it stands on.
    fn resolve_level(
        &self,
        branch: BranchId,
        epoch: Epoch,
        own: bool,
        first: PageNo,
        found: &mut [Option<Found>],
    ) -> Result<Option<crate::SnapshotId>> {
        // RAM first: a version that leaves RAM after this look is in the store before the next.
        let mut ram: Vec<Option<(Found, bool)>> = Vec::with_capacity(found.len());
        let parent = {
            let state = self.state();
            for (page, slot) in (first..).zip(found.iter()) {
                let here = state.map.own_at((branch, page), epoch).filter(|_| slot.is_none());
                ram.push(here.map(|(v, newest)| ((v.epoch, v.page.clone()), newest)));
            }
            state.branch(branch)?.record.parent
        };
        let open = |slot: &Option<Found>, ram: &Option<(Found, bool)>| {
            slot.is_none() && !ram.as_ref().is_some_and(|(_, newest)| *newest)
        };
        let wanted = (first..).zip(found.iter().zip(&ram));
        let wanted: Vec<PageNo> = wanted.filter(|(_, (s, r))| open(s, r)).map(|(p, _)| p).collect();
        let mut stored = self.stored_many(branch, epoch, &wanted)?.into_iter().peekable();
        for ((page, slot), ram) in (first..).zip(found.iter_mut()).zip(ram) {
            let stored = stored.next_if(|(no, _)| *no == page).map(|(_, found)| found);
            if slot.is_some() {
                continue;
            }
            // On a tie RAM is last, and newer.
            let both = [stored, ram.map(|(found, _)| found)];
            let newest = both.into_iter().flatten().max_by_key(|(epoch, _)| *epoch);
            *slot = newest.map(|(epoch, page)| (epoch.filter(|_| own), page));
        }
        Ok(parent)
    }

    /// The newest stored version that is not younger than `epoch` of each of these pages that has one.
    fn stored_many(&self, branch: BranchId, epoch: Epoch, pages: &[PageNo]) -> Result<Vec<(PageNo, Found)>> {
        let (Some(first), Some(last)) = (pages.first(), pages.last()) else {
            return Ok(Vec::new());
        };
        // As many versions as there are pages is the usual case; where there are more, the rest is asked for one by one.
        let limit = (*last - *first) as usize * 2 + 16;
        let newest = |page| PageKey {
            branch,
            page,
            epoch: Epoch(u32::MAX),
        };
        let pairs = self
            .meta
            .scan(key::page(newest(*first)), key::page_end(branch, *last), limit);
        let pairs = self.meta(pairs)?;
        let full = pairs.len() == limit;
        let mut out: Vec<(PageNo, Found)> = Vec::new();
        let mut wanted = pages.iter().copied().peekable();
        let mut seen = *first;
        for (k, v) in pairs {
            let (at, page) = parse_page(&k, &v)?;
            seen = at.page;
            while wanted.next_if(|p| *p < at.page).is_some() {}
            if at.epoch <= epoch && wanted.next_if_eq(&at.page).is_some() {
                out.push((at.page, (Some(at.epoch), page)));
            }
        }
        if full {
            out.retain(|(page, _)| *page < seen);
            for page in pages.iter().copied().filter(|p| *p >= seen) {
                let one = self.stored_at(branch, page, epoch)?;
                out.extend(one.map(|(k, p)| (page, (Some(k.epoch), p))));
            }
        }
        Ok(out)
    }

    /// Brings the head's pages into RAM, those that nobody else is reading.
    pub(crate) fn load_pages(&self, branch: BranchId, pages: RangeInclusive<PageNo>) -> Result<()> {
        let mine: Vec<PageNo> = {
            let mut state = self.state();
            // A page that a loan shows is more than what is stored: each is looked up by itself.
            if !state.loans.is_empty() {
                return Ok(());
            }
            let absent = pages.clone().filter(|p| !state.map.contains((branch, *p)));
            let absent: Vec<PageNo> = absent.collect();
            absent
                .into_iter()
                .filter(|p| state.map.loading.insert((branch, *p)))
                .collect()
        };
        let (Some(first), Some(last)) = (mine.first(), mine.last()) else {
            return Ok(());
        };
        let found = self.resolve_all(branch, Epoch::MAX, *first..=*last, false);
        let mut state = self.state();
        for page in &mine {
            state.map.loading.remove(&(branch, *page));
        }
        let inserted = found.map(|found| {
            for (page, (epoch, content)) in (*first..=*last).zip(found) {
                let at = (branch, page);
                if mine.binary_search(&page).is_ok() {
                    state.map.misses += 1;
                    state.take_in(at, (epoch, content, None));
                }
            }
        });
        drop(state);
        self.changed.notify_all();
        inserted
    }
}
