//! What `check` and `dump` share: the metadata as of its last commit, read in order and without a pool.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{CWD, FlockOperation, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::disk::FileDisk;
use crate::loan::Loans;
use crate::meta::{Barrier, Batch, MetaStore, Pair};
use crate::meta_client::Meta;
use crate::meta_sled::{SledMeta, sync_dir, sync_tree};
use crate::open::{DATA_FILE, LOCK_FILE, META_DIR, take_lock};
use crate::page::{Page, PageNo};
use crate::record::{self, Delta, Key, PageKey, SystemRecord, key, table};
use crate::superblock::Superblock;
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, SnapshotId};
use crate::{Error, Result};

/// Pairs per scan: bounds memory, and 4 KiB values keep that at 1 MiB.
const SLICE: usize = 256;
/// A damaged store may loop for ever while it opens (measured).
const OPEN_TIMEOUT: Duration = Duration::from_secs(120);

const META_DIR_NEW: &str = "meta.new";
const META_DIR_KEPT: &str = "meta.before-restore";

/// Calls `visit` with every pair of one table, in the order of the keys.
pub(crate) fn each(
    meta: &mut dyn MetaStore,
    table: u8,
    mut visit: impl FnMut(&mut dyn MetaStore, Pair) -> Result<()>,
) -> Result<()> {
    let mut from = vec![table];
    let below = [table + 1];
    loop {
        let pairs = meta.scan(&from, &below, SLICE)?;
        let Some((last, _)) = pairs.last() else {
            return Ok(());
        };
        from.clone_from(last);
        from.push(0);
        for pair in pairs {
            visit(meta, pair)?;
        }
    }
}

/// The pool record.
///
/// # Errors
/// `Corrupt` when it is damaged or missing.
pub(crate) fn system(meta: &mut dyn MetaStore) -> Result<SystemRecord> {
    let value = meta
        .get(&key::system())?
        .ok_or_else(|| Error::corrupt("pool record", "key S is missing"))?;
    SystemRecord::decode(&value)
}

/// The delta log on top of the stored pages: what a pool has in RAM after it was opened.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    deltas: BTreeMap<PageKey, Vec<Delta>>,
}

impl Overlay {
    /// Takes what is newer than the last checkpoint and not newer than the last commit. `damaged` gets the rest.
    pub(crate) fn read(
        meta: &mut dyn MetaStore,
        system: &SystemRecord,
        mut damaged: impl FnMut(Error),
    ) -> Result<Self> {
        let mut overlay = Self::default();
        each(meta, table::JOURNAL, |_, (key, value)| {
            let decoded = Key::parse(&key).and_then(|key| match key {
                Key::Journal(txg, seq) => Ok((txg, record::decode_journal(txg, seq, &value)?)),
                other => Err(Error::corrupt("delta log", format!("{other:?}"))),
            });
            match decoded {
                Ok((txg, deltas)) if txg > system.checkpoint && txg <= system.txg => {
                    for delta in deltas {
                        overlay.deltas.entry(delta.key).or_default().push(delta);
                    }
                }
                // Older ones are in their pages, newer ones were never closed.
                Ok(_) => {}
                Err(error) => damaged(error),
            }
            Ok(())
        })?;
        // A version that was removed since has no `E` key any more; its deltas are history.
        let mut gone = Vec::new();
        for key in overlay.deltas.keys() {
            if meta.get(&key::changed(*key))?.is_none() {
                gone.push(*key);
            }
        }
        gone.iter().for_each(|key| drop(overlay.deltas.remove(key)));
        Ok(overlay)
    }

    /// Entries of a version that the log has.
    pub(crate) fn mask(&self, key: PageKey) -> u64 {
        let deltas = self.deltas.get(&key).into_iter().flatten();
        deltas.fold(0, |mask, delta| mask | delta.mask)
    }

    /// Delta records.
    pub(crate) fn len(&self) -> u64 {
        self.deltas.values().map(|deltas| deltas.len() as u64).sum()
    }

    fn first_after(&self, after: Option<(BranchId, PageNo)>) -> Option<(BranchId, PageNo)> {
        let from = after.map_or(
            PageKey {
                branch: BranchId(0),
                page: 0,
                epoch: Epoch::ZERO,
            },
            |(branch, page)| PageKey {
                branch,
                page,
                epoch: Epoch(u32::MAX),
            },
        );
        let mut later = self.deltas.range(from..).map(|(key, _)| (key.branch, key.page));
        later.find(|place| after.is_none_or(|after| *place > after))
    }

    fn of(&self, branch: BranchId, page: PageNo) -> impl Iterator<Item = (&PageKey, &Vec<Delta>)> {
        let place = |epoch| PageKey { branch, page, epoch };
        self.deltas.range(place(Epoch::ZERO)..=place(Epoch(u32::MAX)))
    }
}

/// All versions of one page of one branch, oldest first, deltas applied.
#[derive(Clone, Debug)]
pub(crate) struct Versions {
    pub(crate) branch: BranchId,
    pub(crate) page: PageNo,
    /// What the branch inherits here from the snapshot below it.
    pub(crate) inherited: Page,
    pub(crate) versions: Vec<(Epoch, Page)>,
}

/// Where branches stand: needed to look a page up below a clone.
pub(crate) type Parents = BTreeMap<BranchId, SnapshotId>;

/// Reads pages with the overlay applied; damaged ones are reported once and read as holes.
pub(crate) struct Pages<'a> {
    pub(crate) overlay: &'a Overlay,
    pub(crate) parents: &'a Parents,
    /// Ranges that are being zeroed.
    pub(crate) tombs: &'a Tombs,
    /// Ranges that show what another snapshot does.
    pub(crate) loans: &'a Loans,
}

impl Pages<'_> {
    /// All versions of one page, and what it inherits.
    pub(crate) fn versions(
        &self,
        meta: &mut dyn MetaStore,
        branch: BranchId,
        page: PageNo,
        damaged: &mut dyn FnMut(Error),
    ) -> Result<Versions> {
        let from = key::page(PageKey {
            branch,
            page,
            epoch: Epoch(u32::MAX),
        });
        let mut stored: BTreeMap<Epoch, Page> = BTreeMap::new();
        for (key, value) in meta.scan(&from, &key::page_end(branch, page), usize::MAX)? {
            let Ok(Key::Page(key)) = Key::parse(&key) else {
                continue;
            };
            let page = record::decode_page(key, &value).unwrap_or_else(|error| {
                damaged(error);
                Page::default()
            });
            stored.insert(key.epoch, page);
        }
        let inherited = match self.parents.get(&branch) {
            Some(parent) => self.lookup(meta, *parent, page, u64::MAX, damaged)?,
            None => Page::default(),
        };
        let mut versions: Vec<(Epoch, Page)> = Vec::new();
        let mut deltas: BTreeMap<Epoch, &Vec<Delta>> = BTreeMap::new();
        deltas.extend(
            self.overlay
                .of(branch, page)
                .map(|(key, deltas)| (key.epoch, deltas)),
        );
        let epochs: std::collections::BTreeSet<Epoch> = stored.keys().chain(deltas.keys()).copied().collect();
        for epoch in epochs {
            // A version that is only in the log so far began as a copy of the one before it.
            let before = || {
                versions
                    .last()
                    .map_or_else(|| inherited.clone(), |(_, page)| page.clone())
            };
            let mut content = stored.remove(&epoch).unwrap_or_else(before);
            for delta in deltas.get(&epoch).into_iter().copied().flatten() {
                for (index, entry) in delta.changes() {
                    content.set(index, entry);
                }
            }
            versions.push((epoch, content));
        }
        Ok(Versions {
            branch,
            page,
            inherited,
            versions,
        })
    }

    /// The page as a snapshot sees it.
    fn lookup(
        &self,
        meta: &mut dyn MetaStore,
        at: SnapshotId,
        page: PageNo,
        below: u64,
        damaged: &mut dyn FnMut(Error),
    ) -> Result<Page> {
        let all = self.versions(meta, at.branch, page, damaged)?;
        let newest = all
            .versions
            .into_iter()
            .rev()
            .find(|(epoch, _)| *epoch <= at.epoch);
        let loan = self.loans.over(at.branch, at.epoch, page, below).copied();
        let open = loan.filter(|l| newest.as_ref().is_none_or(|(epoch, _)| *epoch <= l.to.epoch));
        let mut seen = match open {
            Some(loan) => loan.shown(page, |p| self.lookup(meta, loan.from, p, loan.job, damaged))?,
            None => newest.map_or(all.inherited, |(_, page)| page),
        };
        self.tombs.mask(at.branch, at.epoch, page, &mut seen);
        Ok(seen)
    }

    /// Calls `visit` with every page that has a version, in the order of (branch, page).
    pub(crate) fn each(
        &self,
        meta: &mut dyn MetaStore,
        damaged: &mut dyn FnMut(Error),
        mut visit: impl FnMut(Versions) -> Result<()>,
    ) -> Result<()> {
        let mut after = None;
        loop {
            let stored = Self::first_stored(meta, after)?;
            let place = [stored, self.overlay.first_after(after)]
                .into_iter()
                .flatten()
                .min();
            let Some((branch, page)) = place else {
                return Ok(());
            };
            visit(self.versions(meta, branch, page, damaged)?)?;
            after = place;
        }
    }

    fn first_stored(
        meta: &mut dyn MetaStore,
        after: Option<(BranchId, PageNo)>,
    ) -> Result<Option<(BranchId, PageNo)>> {
        let mut from = match after {
            Some((branch, page)) => key::page_end(branch, page),
            None => vec![table::PAGE],
        };
        // A key that is no key of a page is reported elsewhere; here it is stepped over.
        while let Some((key, _)) = meta.scan(&from, &[table::PAGE + 1], 1)?.pop() {
            if let Ok(Key::Page(key)) = Key::parse(&key) {
                return Ok(Some((key.branch, key.page)));
            }
            from = key;
            from.push(0);
        }
        Ok(None)
    }
}

/// A copy of a pool's metadata, gone when it is dropped: opening sled recovers, that is, writes.
pub(crate) struct Copy {
    data: PathBuf,
    meta: PathBuf,
    scratch: PathBuf,
}

fn io(op: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |error| Error::io(op, path.display().to_string(), error)
}

impl Copy {
    /// Copies the metadata of the pool in `dir` to the directory for temporary files.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `NoSpace`, or `Refused` when a process has the pool open.
    pub(crate) fn of(dir: &Path) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let (data, from) = (dir.join(DATA_FILE), dir.join(META_DIR));
        if !data.is_file() || !from.is_dir() {
            return Err(Error::NotFound {
                what: format!("a pool in {}", dir.display()),
            });
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let scratch = std::env::temp_dir().join(format!("stillpoint-check-{}-{number}", std::process::id()));
        fs::create_dir(&scratch).map_err(io("create directory", &scratch))?;
        let copy = Self {
            data,
            meta: scratch.join(META_DIR),
            scratch,
        };
        let _unused = claim(dir)?;
        copy_tree(&from, &copy.meta)?;
        Ok(copy)
    }

    /// The data file, for reading only, and the copied metadata.
    ///
    /// # Errors
    /// `Io`, or `Corrupt` when the metadata store does not open at all.
    pub(crate) fn open(&self) -> Result<(FileDisk, Box<dyn MetaStore>)> {
        let disk = FileDisk::open_read_only(&self.data).map_err(io("open", &self.data))?;
        Ok((disk, open_guarded(&self.meta)?))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.scratch) {
            tracing::warn!("{} is left behind: {error}", self.scratch.display());
        }
    }
}

/// Holds the pool's lock and sled's own, so that nobody opens the store meanwhile.
fn claim(dir: &Path) -> Result<Vec<fs::File>> {
    let mut held = Vec::new();
    for path in [dir.join(LOCK_FILE), dir.join(META_DIR).join("db")] {
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io("open", &path)(error)),
        };
        if !take_lock(&file, FlockOperation::NonBlockingLockShared).map_err(io("lock", &path))? {
            return Err(Error::refused(
                "the pool is in use: stop the daemon that has it open first",
            ));
        }
        held.push(file);
    }
    Ok(held)
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).map_err(io("create directory", to))?;
    for entry in fs::read_dir(from).map_err(io("list", from))? {
        let entry = entry.map_err(io("list", from))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            fs::copy(&path, &target).map_err(io("copy", &path))?;
        }
    }
    Ok(())
}

/// A metadata store on the thread that catches sled's panics, as a [`MetaStore`] again.
struct Threaded(Arc<Meta>);

/// Opens the metadata store in `dir` (makes one when there is none), with a time limit.
fn open_guarded(dir: &Path) -> Result<Box<dyn MetaStore>> {
    let dir = dir.to_owned();
    let open = Box::new(move || Ok(Box::new(SledMeta::open(&dir)?) as Box<dyn MetaStore>));
    Ok(Box::new(Threaded(Arc::new(Meta::open(open, OPEN_TIMEOUT)?))))
}

impl Drop for Threaded {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Barrier for Meta {
    fn sync(&self) -> Result<()> {
        self.commit()
    }
}

impl MetaStore for Threaded {
    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.0.get(key.to_vec())
    }

    fn scan(&mut self, from: &[u8], below: &[u8], limit: usize) -> Result<Vec<Pair>> {
        self.0.scan(from.to_vec(), below.to_vec(), limit)
    }

    fn last(&mut self, from: &[u8], below: &[u8]) -> Result<Option<Pair>> {
        self.0.last(from.to_vec(), below.to_vec())
    }

    fn apply(&mut self, batch: &Batch) -> Result<()> {
        self.0.apply(batch.clone())
    }

    /// The barrier flushes.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Arc<dyn Barrier> {
        Arc::clone(&self.0) as Arc<dyn Barrier>
    }

    fn size_on_disk(&mut self) -> Result<u64> {
        self.0.size_on_disk()
    }
}

/// Makes the metadata store of the pool in `dir` anew, filled by `fill`. It appears under its name only when it is
/// whole and durable; the one that was there is kept beside it.
///
/// # Errors
/// `NotFound` without a data file; `Refused` when the pool is in use, when the new metadata is of another pool, or when
/// one was kept before; `LostCommits` when it is older than the data file; what `fill` says; `Io`.
pub(crate) fn make_new(dir: &Path, fill: impl FnOnce(&mut dyn MetaStore) -> Result<()>) -> Result<()> {
    let [place, building, kept] = [META_DIR, META_DIR_NEW, META_DIR_KEPT].map(|name| dir.join(name));
    let data = dir.join(DATA_FILE);
    if !data.is_file() {
        return Err(Error::NotFound {
            what: format!("the data file {}", data.display()),
        });
    }
    let _unused = claim(dir)?;
    if place.exists() && kept.exists() {
        let both = (place.display(), kept.display());
        return Err(Error::refused(format!(
            "{} is kept as {}, which exists: move that away first",
            both.0, both.1
        )));
    }
    if building.exists() {
        // What an interrupted restore left.
        fs::remove_dir_all(&building).map_err(io("remove", &building))?;
    }
    let filled = open_guarded(&building).and_then(|mut meta| {
        fill(&mut *meta)?;
        fits(&data, &mut *meta)?;
        meta.barrier().sync()
    });
    if let Err(error) = filled.and_then(|()| sync_tree(&building)) {
        if let Err(left) = fs::remove_dir_all(&building) {
            tracing::warn!("{} is left behind: {left}", building.display());
        }
        return Err(error);
    }
    // What a killed process had not committed stood on the metadata that goes.
    crate::warm::remove(dir)?;
    if place.exists() {
        change_places(&building, &place, &kept)?;
    } else {
        fs::rename(&building, &place).map_err(io("rename", &building))?;
    }
    sync_dir(dir)
}

/// Puts `building` in the place of `place`, which is kept as `kept`. In one step where the file system can: a cut between two
/// renames would leave a pool without metadata. (A cut after the exchange leaves the old metadata under the name of a restore
/// that was cut off.)
fn change_places(building: &Path, place: &Path, kept: &Path) -> Result<()> {
    match renameat_with(CWD, building, CWD, place, RenameFlags::EXCHANGE) {
        Ok(()) => fs::rename(building, kept).map_err(io("rename", building)),
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::rename(place, kept).map_err(io("rename", place))?;
            fs::rename(building, place).map_err(io("rename", building))
        }
        Err(e) => Err(io("exchange", building)(e.into())),
    }
}

/// Whether metadata belongs to a data file and is not older.
fn fits(data: &Path, meta: &mut dyn MetaStore) -> Result<()> {
    let disk = FileDisk::open_read_only(data).map_err(io("open", data))?;
    let (superblock, system) = (Superblock::newest(&disk)?, system(meta)?);
    if superblock.pool_id != system.pool_id || superblock.grain_bytes != system.grain_bytes {
        return Err(Error::refused(format!(
            "this is not the metadata of {}",
            data.display()
        )));
    }
    if superblock.txg > system.txg {
        return Err(Error::LostCommits {
            superblock: superblock.txg,
            metadata: system.txg,
        });
    }
    Ok(())
}
