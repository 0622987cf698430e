//! Map pages in RAM: a bounded cache of resolved pages, in which versions that the metadata store does not have yet
//! (their deltas are in `J` only) are pinned.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use crate::loan::Lent;
use crate::page::{Page, PageNo};
use crate::record::PageKey;
use crate::types::{BranchId, Epoch};

/// Identifies a page of a branch, whatever its version.
pub(crate) type PageAt = (BranchId, PageNo);

/// RAM of one cached version, its share of the tables included (measured: 64 entries of 8 bytes + some 130), and up to 64
/// checksums of 4 bytes.
const VERSION_BYTES: usize = 912;

/// Pages that one insertion looks at to make room: it holds the pool's lock.
const EVICT_TURNS: usize = 256;

/// One version of a page.
pub(crate) struct Version {
    /// Epoch of its key; `None` = the branch has no version of its own, this was found below or nowhere.
    pub(crate) epoch: Option<Epoch>,
    pub(crate) page: Page,
    /// It is what a loan shows, and not stored: above all versions of the branch's own.
    pub(crate) lent: Option<Lent>,
    /// First transaction group whose deltas are not in the stored page.
    pub(crate) dirty: Option<u64>,
    /// Last transaction group that changed it.
    pub(crate) last_change: u64,
    /// The metadata store has a page under this key, or gets one with the commit that is being built.
    pub(crate) based: bool,
}

impl Version {
    pub(crate) fn clean(epoch: Option<Epoch>, page: Page) -> Self {
        Self {
            epoch,
            page,
            lent: None,
            dirty: None,
            last_change: 0,
            based: true,
        }
    }
}

/// The versions of one page that are in RAM.
struct Slot {
    /// Newest first. The first is what the branch's head reads; the others are here only because they are dirty.
    versions: Vec<Version>,
    /// Used since the clock hand last passed.
    referenced: bool,
    /// The first is the newest version of the branch; not so after that one was removed.
    resolved: bool,
}

impl Slot {
    fn pinned(&self) -> bool {
        self.versions.iter().any(|v| v.dirty.is_some())
    }
}

/// All pages in RAM.
pub(crate) struct PageMap {
    slots: HashMap<PageAt, Slot>,
    clock: VecDeque<PageAt>,
    dirty: BTreeSet<PageAt>,
    dirty_since: BTreeMap<u64, BTreeSet<PageKey>>,
    versions: usize,
    dirty_versions: usize,
    capacity: usize,
    /// Pages that a thread is reading from the metadata store: one reader each, so that nothing stale is inserted.
    pub(crate) loading: HashSet<PageAt>,
    /// Grows whenever a version leaves the pinned set: what was not found in RAM may be in the store only now.
    pub(crate) clean_gen: u64,
    /// Grows whenever pages move between branches.
    pub(crate) structure_gen: u64,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

impl PageMap {
    pub(crate) fn new(cache_bytes: usize) -> Self {
        Self {
            slots: HashMap::new(),
            clock: VecDeque::new(),
            dirty: BTreeSet::new(),
            dirty_since: BTreeMap::new(),
            versions: 0,
            dirty_versions: 0,
            capacity: (cache_bytes / VERSION_BYTES).max(8),
            loading: HashSet::new(),
            clean_gen: 0,
            structure_gen: 0,
            hits: 0,
            misses: 0,
        }
    }

    pub(crate) fn cached(&self) -> usize {
        self.versions
    }

    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty_versions
    }

    /// Whether dirty versions fill so much of the cache that a checkpoint should not wait.
    pub(crate) fn crowded(&self) -> bool {
        self.dirty_versions * 2 > self.capacity
    }

    pub(crate) fn contains(&self, at: PageAt) -> bool {
        self.slots.contains_key(&at)
    }

    /// What the head of the branch reads, if it is in RAM.
    pub(crate) fn newest(&mut self, at: PageAt) -> Option<&Version> {
        let slot = self.slots.get_mut(&at)?;
        slot.referenced = true;
        slot.versions.first()
    }

    /// As [`PageMap::newest`], without using it.
    pub(crate) fn first(&self, at: PageAt) -> Option<&Version> {
        self.slots.get(&at)?.versions.first()
    }

    pub(crate) fn newest_mut(&mut self, at: PageAt) -> Option<&mut Version> {
        self.slots.get_mut(&at)?.versions.first_mut()
    }

    /// The branch's own newest version in RAM that is not younger than `epoch`, and whether the metadata store cannot
    /// have a newer one: a dirty old version may lie below clean ones that are not in RAM (a fold adopts such).
    pub(crate) fn own_at(&self, at: PageAt, epoch: Epoch) -> Option<(&Version, bool)> {
        let slot = self.slots.get(&at)?;
        let index = slot
            .versions
            .iter()
            .position(|v| v.epoch.is_some_and(|e| e <= epoch))?;
        slot.versions.get(index).map(|v| (v, index == 0 && slot.resolved))
    }

    /// The branch's own oldest version in RAM that is younger than `epoch`.
    pub(crate) fn own_after(&self, at: PageAt, epoch: Epoch) -> Option<&Version> {
        self.slots
            .get(&at)?
            .versions
            .iter()
            .rev()
            .find(|v| v.epoch.is_some_and(|e| e > epoch))
    }

    pub(crate) fn exact(&self, key: PageKey) -> Option<&Version> {
        self.slots
            .get(&(key.branch, key.page))?
            .versions
            .iter()
            .find(|v| v.epoch == Some(key.epoch))
    }

    pub(crate) fn exact_mut(&mut self, key: PageKey) -> Option<&mut Version> {
        let slot = self.slots.get_mut(&(key.branch, key.page))?;
        slot.versions.iter_mut().find(|v| v.epoch == Some(key.epoch))
    }

    /// The first page of the branch in `from..=to` that has a dirty version of its own.
    pub(crate) fn next_dirty(&self, branch: BranchId, from: PageNo, to: PageNo) -> Option<PageNo> {
        if from > to {
            return None;
        }
        self.dirty
            .range((branch, from)..=(branch, to))
            .next()
            .map(|(_, page)| *page)
    }

    /// The first page after a place that has a dirty version of its own.
    pub(crate) fn dirty_after(&self, after: Option<PageAt>) -> Option<PageAt> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.dirty.range((from, Unbounded)).next().copied()
    }

    /// The branch's own versions of a page that are in RAM.
    pub(crate) fn own_versions(&self, at: PageAt) -> Vec<(Epoch, Page)> {
        let versions = self.slots.get(&at).into_iter().flat_map(|slot| &slot.versions);
        versions
            .filter_map(|v| Some((v.epoch?, v.page.clone())))
            .collect()
    }

    /// Takes in a page that was read from the metadata store. No slot may exist: the caller is its only reader.
    pub(crate) fn insert(&mut self, at: PageAt, version: Version) {
        self.evict(1);
        self.versions += 1;
        let old = self.slots.insert(
            at,
            Slot {
                versions: vec![version],
                referenced: true,
                resolved: true,
            },
        );
        assert!(old.is_none(), "page {at:?} was inserted twice");
        self.clock.push_back(at);
    }

    /// Puts a new newest version on top of a slot. The old one stays only while it is dirty.
    pub(crate) fn push(&mut self, at: PageAt, version: Version) {
        let slot = self
            .slots
            .get_mut(&at)
            .expect("a version grows from the one below");
        if slot.versions.first().is_some_and(|v| v.dirty.is_none()) {
            slot.versions.remove(0);
            self.versions -= 1;
        }
        slot.versions.insert(0, version);
        self.versions += 1;
    }

    /// Puts a version of the branch's own in its place of a slot that exists.
    pub(crate) fn put(&mut self, at: PageAt, version: Version) {
        let slot = self.slots.get(&at).expect("the page was loaded");
        let above = |v: &Version| v.lent.is_some() || v.epoch >= version.epoch;
        match slot.versions.iter().position(|v| !above(v)) {
            Some(0) => self.push(at, version),
            Some(below) => {
                let slot = self.slots.get_mut(&at).expect("just seen");
                slot.versions.insert(below, version);
                self.versions += 1;
            }
            None => self.push_oldest(at, version),
        }
    }

    /// Puts a version below all others of its slot (a page that moved in from the branch below).
    pub(crate) fn push_oldest(&mut self, at: PageAt, version: Version) {
        let slot = self.slots.get_mut(&at).expect("the page was loaded");
        slot.versions.push(version);
        self.versions += 1;
    }

    /// Marks a version as changed by `txg`.
    pub(crate) fn touch(&mut self, key: PageKey, txg: u64) {
        let version = self.exact_mut(key).expect("only versions in RAM are changed");
        version.last_change = txg;
        if version.dirty.is_none() {
            version.dirty = Some(txg);
            self.dirty_versions += 1;
            self.dirty_since.entry(txg).or_default().insert(key);
            self.dirty.insert((key.branch, key.page));
        }
    }

    /// Up to `limit` versions that have been dirty since `through` or longer.
    pub(crate) fn oldest_dirty(&self, through: u64, limit: usize) -> Vec<PageKey> {
        self.dirty_since
            .range(..=through)
            .flat_map(|(_, keys)| keys.iter().copied())
            .take(limit)
            .collect()
    }

    /// The stored page of `key` has all changes up to `durable`. A version that was removed meanwhile is no matter.
    pub(crate) fn stored(&mut self, key: PageKey, durable: u64) {
        let Some(version) = self.exact_mut(key) else {
            return;
        };
        version.based = true;
        let Some(since) = version.dirty else { return };
        let still = (version.last_change > durable).then_some(durable + 1);
        version.dirty = still;
        self.clean_gen += 1;
        self.forget_dirty(key, since);
        match still {
            Some(txg) => drop(self.dirty_since.entry(txg).or_default().insert(key)),
            None => {
                self.dirty_versions -= 1;
                self.trim(key);
            }
        }
    }

    fn forget_dirty(&mut self, key: PageKey, since: u64) {
        if let Some(keys) = self.dirty_since.get_mut(&since) {
            keys.remove(&key);
            if keys.is_empty() {
                self.dirty_since.remove(&since);
            }
        }
    }

    /// Drops versions of the slot that are neither the newest nor dirty.
    fn trim(&mut self, key: PageKey) {
        let at = (key.branch, key.page);
        let Some(slot) = self.slots.get_mut(&at) else {
            return;
        };
        let before = slot.versions.len();
        let mut first = true;
        slot.versions
            .retain(|v| std::mem::take(&mut first) || v.dirty.is_some());
        self.versions -= before - slot.versions.len();
        if !slot.pinned() {
            self.dirty.remove(&at);
        }
    }

    /// Forgets what loans show: it was looked up while older versions were not all there.
    pub(crate) fn forget_lent(&mut self) {
        let mut gone = 0;
        self.slots.retain(|_, slot| {
            let before = slot.versions.len();
            slot.versions.retain(|v| v.lent.is_none());
            let lent = before - slot.versions.len();
            // What is below need not be the branch's newest: that may be in the store only.
            slot.resolved &= lent == 0;
            gone += lent;
            !slot.versions.is_empty()
        });
        self.versions -= gone;
    }

    /// Forgets a version that was removed from the map.
    pub(crate) fn remove(&mut self, key: PageKey) {
        let at = (key.branch, key.page);
        let Some(slot) = self.slots.get_mut(&at) else {
            return;
        };
        let Some(index) = slot.versions.iter().position(|v| v.epoch == Some(key.epoch)) else {
            return;
        };
        let version = slot.versions.remove(index);
        slot.resolved &= index > 0;
        self.versions -= 1;
        let (empty, pinned) = (slot.versions.is_empty(), slot.pinned());
        if !pinned {
            self.dirty.remove(&at);
        }
        if empty {
            self.slots.remove(&at);
        }
        if let Some(since) = version.dirty {
            self.dirty_versions -= 1;
            self.forget_dirty(key, since);
        }
    }

    /// Forgets every page of a branch that is gone.
    pub(crate) fn remove_branch(&mut self, branch: BranchId) {
        let gone: Vec<PageAt> = self.slots.keys().filter(|(b, _)| *b == branch).copied().collect();
        for at in gone {
            if let Some(slot) = self.slots.remove(&at) {
                assert!(!slot.pinned(), "a branch goes after its last version");
                self.versions -= slot.versions.len();
            }
        }
    }

    /// Second chance, in the order of arrival. Dirty pages stay: the checkpoint bounds them. Among many of them the hand
    /// goes on with the next page that comes in, and the cache is a little larger until then.
    fn evict(&mut self, room: usize) {
        let mut turns = (self.clock.len() * 2).min(EVICT_TURNS);
        while self.versions + room > self.capacity && turns > 0 {
            turns -= 1;
            let Some(at) = self.clock.pop_front() else { return };
            match self.slots.get_mut(&at) {
                None => {}
                Some(slot) if slot.referenced || slot.pinned() => {
                    slot.referenced = false;
                    self.clock.push_back(at);
                }
                Some(slot) => {
                    self.versions -= slot.versions.len();
                    self.slots.remove(&at);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(page: PageNo) -> PageAt {
        (BranchId(1), page)
    }

    fn key(page: PageNo, epoch: u32) -> PageKey {
        PageKey {
            branch: BranchId(1),
            page,
            epoch: Epoch(epoch),
        }
    }

    #[test]
    fn the_cache_is_bounded_and_dirty_pages_stay() {
        let mut map = PageMap::new(10 * VERSION_BYTES);
        map.insert(at(0), Version::clean(Some(Epoch(1)), Page::default()));
        map.touch(key(0, 1), 1);
        for page in 1..1000 {
            map.insert(at(page), Version::clean(None, Page::default()));
            assert!(map.cached() <= 10);
        }
        assert!(map.contains(at(0)) && map.contains(at(999)) && !map.contains(at(5)));
        assert_eq!(map.next_dirty(BranchId(1), 0, 9), Some(0));
        map.stored(key(0, 1), 1);
        assert_eq!((map.dirty_count(), map.next_dirty(BranchId(1), 0, 9)), (0, None));
    }

    #[test]
    fn a_version_changed_again_stays_dirty_from_then_on() {
        let mut map = PageMap::new(1 << 20);
        map.insert(at(0), Version::clean(Some(Epoch(1)), Page::default()));
        map.touch(key(0, 1), 3);
        map.touch(key(0, 1), 5);
        assert_eq!(map.oldest_dirty(3, 9), vec![key(0, 1)]);
        map.stored(key(0, 1), 4);
        assert_eq!(map.oldest_dirty(4, 9), vec![]);
        assert_eq!(map.oldest_dirty(5, 9), vec![key(0, 1)]);
        map.push(
            at(0),
            Version {
                epoch: Some(Epoch(2)),
                ..Version::clean(None, Page::default())
            },
        );
        assert_eq!(map.cached(), 2, "the older dirty version stays below");
        assert_eq!(
            map.own_at(at(0), Epoch(1)).map(|(v, sure)| (v.epoch, sure)),
            Some((Some(Epoch(1)), false))
        );
        assert_eq!(map.own_after(at(0), Epoch(1)).unwrap().epoch, Some(Epoch(2)));
        map.stored(key(0, 1), 5);
        assert_eq!(map.cached(), 1);
    }
}
