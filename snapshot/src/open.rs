//! Making a pool, and finding it again: reading every small table, replaying the delta log, checking I7.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::alloc::Allocator;
use crate::bad::BadGrains;
use crate::disk::{Disk, FileDisk};
use crate::inner::{Directory, Inner};
use crate::loan::Loans;
use crate::map::{PageMap, Version};
use crate::meta::{Batch, MetaStore, Pair};
use crate::meta_client::{Meta, OpenMeta};
use crate::meta_sled::{SledMeta, sync_dir, sync_tree};
use crate::page::{MAX_GRAINS, PageNo};
use crate::record::{
    self, BranchRecord, CHUNK_GRAINS, COUNTS_PER_BLOCK, ChunkCount, Delta, JobRecord, Key, PageKey,
    SnapshotRecord, SystemRecord, key, table,
};
use crate::seal::SealCursor;
use crate::space::Space;
use crate::state::{Branch, Holds, JournalPart, State, Txg};
use crate::superblock::{RESERVED_BYTES, Superblock};
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, PoolOptions, SnapshotId};
use crate::volume::Shared;
use crate::warm::{self, WarmFiles, WarmMedium};
use crate::{Error, Result};

/// Name of the data file in the pool's directory.
pub const DATA_FILE: &str = "data";
/// Name of the metadata store's directory in the pool's directory.
pub const META_DIR: &str = "meta";
const BALLAST_FILE: &str = "ballast";
/// A store that a compaction was making, or has replaced.
pub(crate) const COMPACT_DIR: &str = "meta.compact";
pub(crate) const LOCK_FILE: &str = "lock";
/// How long another holder of the lock may take to go.
const LOCK_WAIT: Duration = Duration::from_secs(3);
/// Smallest run of free grains that is punched, in bytes.
const PUNCH_BYTES: u64 = 64 << 10;
/// Pairs read per call while tables are loaded.
const LOAD_SLICE: usize = 1024;

fn io<'a>(op: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Error + 'a {
    move |e| Error::io(op, path.display().to_string(), e)
}

/// Grains at the start of the data file that hold the superblocks.
#[must_use]
pub fn reserved_grains(grain_bytes: u32) -> u64 {
    RESERVED_BYTES.div_ceil(u64::from(grain_bytes))
}

/// Whether a directory holds a pool (or the beginning of one).
pub(crate) fn exists(dir: &Path) -> bool {
    dir.join(DATA_FILE).exists()
}

/// Makes a pool in a directory: nothing is there before both halves are durable, the data file last.
pub(crate) fn create(dir: &Path, options: &PoolOptions) -> Result<Inner> {
    if exists(dir) {
        return Err(Error::Exists {
            what: format!("a pool in {}", dir.display()),
        });
    }
    std::fs::create_dir_all(dir).map_err(io("create directory", dir))?;
    let guard = lock_directory(dir)?;
    let (meta_dir, temporary) = (dir.join(META_DIR), dir.join("data.new"));
    // A creation has `data.new` from before the first byte of metadata until both are whole. Metadata alone is that of a pool
    // whose data file is gone, or not mounted: not to be touched.
    if meta_dir.exists() && !temporary.exists() {
        return Err(Error::refused(format!(
            "{} is missing, but its metadata is there: mount or restore it; for a new, empty pool move {} away",
            dir.join(DATA_FILE).display(),
            meta_dir.display()
        )));
    }
    if meta_dir.exists() {
        std::fs::remove_dir_all(&meta_dir).map_err(io("remove", &meta_dir))?;
    }
    if temporary.exists() {
        std::fs::remove_file(&temporary).map_err(io("remove", &temporary))?;
    }
    let disk = Arc::new(FileDisk::create(&temporary).map_err(io("create", &temporary))?);
    sync_dir(dir)?;
    let path = meta_dir.clone();
    let meta = Meta::open(
        Box::new(move || boxed(SledMeta::open(&path)?)),
        open_timeout(options),
    )?;
    let inner = create_on(disk, meta, options, directory(dir, guard, options)?)?;
    sync_tree(&meta_dir)?;
    ballast(dir, inner.disk.as_ref(), options.ballast_bytes)?;
    let data = dir.join(DATA_FILE);
    std::fs::rename(&temporary, &data).map_err(io("rename", &temporary))?;
    sync_dir(dir)?;
    dir.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .map_or(Ok(()), sync_dir)?;
    Ok(inner)
}

/// Opens the pool in a directory.
pub(crate) fn open(dir: &Path, options: &PoolOptions) -> Result<Inner> {
    if !exists(dir) {
        return Err(Error::NotFound {
            what: format!("a pool in {}", dir.display()),
        });
    }
    let guard = lock_directory(dir)?;
    let data = dir.join(DATA_FILE);
    let disk = Arc::new(FileDisk::open(&data).map_err(io("open", &data))?);
    let path = dir.join(META_DIR);
    if !path.is_dir() {
        return Err(Error::corrupt(
            "the metadata store is missing",
            path.display().to_string(),
        ));
    }
    // Before it changed places with the store it was not whole, and after it the old one: never needed.
    let left = dir.join(COMPACT_DIR);
    if left.is_dir() {
        std::fs::remove_dir_all(&left).map_err(io("remove", &left))?;
    }
    // The ballast goes first when the file system is full: sled must be able to write while it recovers.
    release_ballast_if_full(dir, disk.as_ref())?;
    let opener: OpenMeta = Box::new(move || boxed(SledMeta::open(&path)?));
    let meta = Meta::open(opener, open_timeout(options))?;
    let inner = open_on(disk, meta, options, directory(dir, guard, options)?)?;
    if let Err(e) = ballast(dir, inner.disk.as_ref(), options.ballast_bytes) {
        tracing::warn!("no ballast file beside the metadata: {e}");
    }
    Ok(inner)
}

/// The lock of a directory, and its warm log if the running kernel has a name.
fn directory(dir: &Path, lock: File, options: &PoolOptions) -> Result<Directory> {
    let warm = match running_kernel(options) {
        Ok(boot_id) => Some((Box::new(WarmFiles::open(dir)?) as Box<dyn WarmMedium>, boot_id)),
        Err(e) => {
            tracing::warn!("no boot id ({e}): a killed process loses what it had not committed");
            None
        }
    };
    Ok(Directory {
        lock: Some(lock),
        warm,
    })
}

#[cfg(feature = "sim")]
fn running_kernel(options: &PoolOptions) -> std::io::Result<String> {
    options.boot_id.clone().map_or_else(warm::boot_id, Ok)
}

#[cfg(not(feature = "sim"))]
fn running_kernel(_options: &PoolOptions) -> std::io::Result<String> {
    warm::boot_id()
}

fn boxed(meta: SledMeta) -> Result<Box<dyn MetaStore>> {
    Ok(Box::new(meta))
}

fn open_timeout(options: &PoolOptions) -> Duration {
    Duration::from_millis(options.open_timeout_ms)
}

/// Takes a lock, or says that somebody else keeps it. A child process between fork and exec still has the descriptor of a
/// pool that was just closed, so the holder gets a moment to go.
pub(crate) fn take_lock(file: &File, how: FlockOperation) -> std::io::Result<bool> {
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(file, how) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() > LOCK_WAIT => return Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn lock_directory(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK_FILE);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = file.map_err(io("open", &path))?;
    if !take_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(io("lock", &path))? {
        return Err(Error::refused(format!(
            "the pool in {} is in use by another process",
            dir.display()
        )));
    }
    Ok(file)
}

/// Keeps the ballast file at its size: allocated, not sparse, so that removing it gives space.
fn ballast(dir: &Path, disk: &dyn Disk, bytes: u64) -> Result<()> {
    let path = dir.join(BALLAST_FILE);
    let there = std::fs::metadata(&path).map(|m| m.len()).ok();
    if bytes == 0 || there == Some(bytes) {
        return Ok(());
    }
    if disk.free_bytes().map_err(io("statvfs", dir))? < bytes.saturating_mul(2) {
        // The head room still keeps new data out; the ballast is made when a later start finds space.
        tracing::warn!("no room for a ballast file of {bytes} bytes beside the metadata");
        return Ok(());
    }
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(&path);
    let file = file.map_err(io("create", &path))?;
    let filled = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes);
    if let Err(e) = filled {
        drop(file);
        std::fs::remove_file(&path).map_err(io("remove", &path))?;
        tracing::warn!("the file system cannot allocate a ballast file: {e}");
        return Ok(());
    }
    file.sync_all().map_err(io("fsync", &path))
}

fn release_ballast_if_full(dir: &Path, disk: &dyn Disk) -> Result<()> {
    let path = dir.join(BALLAST_FILE);
    let Ok(size) = std::fs::metadata(&path).map(|m| m.len()) else {
        return Ok(());
    };
    if disk.free_bytes().map_err(io("statvfs", dir))? < size {
        tracing::warn!("the pool's file system is nearly full: removing the ballast to recover");
        std::fs::remove_file(&path).map_err(io("remove", &path))?;
        sync_dir(dir)?;
    }
    Ok(())
}

/// Makes an empty pool on a medium and an empty metadata store.
pub(crate) fn create_on(
    disk: Arc<dyn Disk>,
    meta: Meta,
    options: &PoolOptions,
    directory: Directory,
) -> Result<Inner> {
    if ![4096, 8192, 16_384, 65_536].contains(&options.grain_bytes) {
        return Err(Error::refused(format!(
            "a grain of {} bytes: 4, 8, 16 or 64 KiB",
            options.grain_bytes
        )));
    }
    let mut pool_id = [0; 16];
    getrandom::fill(&mut pool_id).map_err(|e| Error::Io {
        op: "read",
        path: "random numbers".into(),
        source: std::io::Error::other(e),
    })?;
    let superblock = Superblock {
        pool_id,
        grain_bytes: options.grain_bytes,
        txg: 0,
    };
    superblock.write_both(disk.as_ref())?;
    disk.sync_data()
        .map_err(|e| Error::io("fdatasync", "data file", e))?;
    let system = SystemRecord {
        pool_id,
        grain_bytes: options.grain_bytes,
        txg: 0,
        checkpoint: 0,
        epoch: Epoch(1),
        next_branch: 1,
        next_job: 1,
        chunks: 0,
    };
    let mut batch = Batch::default();
    batch.put(key::system(), system.encode());
    meta.apply(batch)?;
    meta.commit()?;
    open_on(disk, meta, options, directory)
}

/// Opens a pool on a medium and its metadata store.
pub(crate) fn open_on(
    disk: Arc<dyn Disk>,
    meta: Meta,
    options: &PoolOptions,
    directory: Directory,
) -> Result<Inner> {
    let superblock = Superblock::newest(disk.as_ref())?;
    let value = meta.get(key::system())?;
    let value = value.ok_or(Error::LostCommits {
        superblock: superblock.txg,
        metadata: 0,
    })?;
    let system = SystemRecord::decode(&value)?;
    if system.pool_id != superblock.pool_id || system.grain_bytes != superblock.grain_bytes {
        return Err(Error::corrupt(
            "pool",
            "data file and metadata store belong to different pools",
        ));
    }
    // I7: sled cuts its log at a damaged place without an error.
    if system.txg < superblock.txg {
        return Err(Error::LostCommits {
            superblock: superblock.txg,
            metadata: system.txg,
        });
    }
    let state = load(&meta, &system, options)?;
    check_data_size(disk.as_ref(), &meta, &state, system.grain_bytes)?;
    let inner = Inner::new(
        options.clone(),
        system.grain_bytes,
        system.pool_id,
        disk,
        meta,
        state,
        directory,
    );
    inner.replay(&system)?;
    inner.drop_stray_journal(&system)?;
    let size = inner.meta.size_on_disk()?;
    let mut state = inner.state();
    state.map.forget_lent();
    state.space.metadata_bytes = size;
    let branches: Vec<BranchId> = state.branches.keys().copied().collect();
    for id in branches {
        state.refresh_holds(id);
        if let Some(b) = state.branches.get_mut(&id) {
            b.durable_holds = b.holds.clone();
        }
    }
    state.open.holds.clear();
    drop(state);
    inner.replay_warm()?;
    inner.load_scrub();
    inner.state().follow_up();
    Ok(inner)
}

/// Reads a whole table in slices.
fn read_table(meta: &Meta, t: u8, mut each: impl FnMut(Key, Pair) -> Result<()>) -> Result<()> {
    let mut from = vec![t];
    loop {
        let pairs = meta.scan(from, vec![t + 1], LOAD_SLICE)?;
        let Some((last, _)) = pairs.last() else {
            return Ok(());
        };
        from = last.clone();
        from.push(0);
        for pair in pairs {
            each(Key::parse(&pair.0)?, pair)?;
        }
    }
}

fn load(meta: &Meta, system: &SystemRecord, options: &PoolOptions) -> Result<State> {
    let mut branches = BTreeMap::new();
    let mut volumes = BTreeMap::new();
    let mut names = BTreeMap::new();
    read_table(meta, table::BRANCH, |k, (_, value)| {
        let Key::Branch(id) = k else { return Ok(()) };
        let record = BranchRecord::decode(id, &value)?;
        if record.head {
            let shared = Shared::new(
                record.volume,
                id,
                record.size_bytes,
                record.block_size,
                record.read_only,
            )
            .with_checksums(record.checksums);
            let twice = volumes.insert(record.volume, Arc::new(shared)).is_some()
                | names.insert(record.name.clone(), record.volume).is_some();
            if twice {
                return Err(Error::corrupt(
                    "volume record",
                    format!("{:?} exists twice", record.name),
                ));
            }
        }
        branches.insert(
            id,
            Branch {
                record,
                holds: Holds::default(),
                durable_holds: Holds::default(),
                written: true,
            },
        );
        Ok(())
    })?;
    let mut snapshots = BTreeMap::new();
    read_table(meta, table::SNAPSHOT, |k, (_, value)| {
        let Key::Snapshot(id) = k else { return Ok(()) };
        drop(snapshots.insert(id, SnapshotRecord::decode(id, &value)?));
        Ok(())
    })?;
    let mut jobs = BTreeMap::new();
    read_table(meta, table::JOB, |k, (_, value)| {
        let Key::Job(id) = k else { return Ok(()) };
        let _ = jobs.insert(id, JobRecord::decode(id, &value)?);
        Ok(())
    })?;
    let mut values = BTreeMap::new();
    read_table(meta, table::VALUE, |k, (_, value)| {
        let Key::Value(name) = k else { return Ok(()) };
        values.insert(name.clone(), record::decode_value(&name, &value)?);
        Ok(())
    })?;
    check_parents(&branches, &snapshots)?;
    Ok(State {
        bad: load_bad(meta)?,
        seal: SealCursor::default(),
        touched: None,
        volumes,
        names,
        snapshots,
        pins: BTreeMap::new(),
        job_since: jobs.keys().map(|id| (*id, 0)).collect(),
        tombs: Tombs::of(&jobs),
        loans: Loans::of(&jobs),
        jobs,
        values,
        epoch: system.epoch,
        next_branch: system.next_branch,
        next_job: system.next_job,
        map: PageMap::new(options.cache_bytes),
        alloc: load_counts(meta, system, options)?,
        loading_chunks: BTreeSet::new(),
        space: Space::new(system.grain_bytes, options.min_free_bytes, options.manual),
        open: Txg::new(system.txg + 1),
        durable: system.txg,
        committing: false,
        closing: None,
        journal: VecDeque::new(),
        checkpoint: system.checkpoint,
        publications: 0,
        stopping: false,
        commits: 0,
        most_pages: 0,
        branches,
    })
}

fn load_bad(meta: &Meta) -> Result<BadGrains> {
    let mut bad = BadGrains::default();
    read_table(meta, table::BAD, |k, (_, value)| {
        let Key::Bad(grain) = k else { return Ok(()) };
        bad.put(grain, record::BadRecord::decode(grain, &value)?);
        Ok(())
    })?;
    Ok(bad)
}

fn check_parents(
    branches: &BTreeMap<BranchId, Branch>,
    snapshots: &BTreeMap<SnapshotId, SnapshotRecord>,
) -> Result<()> {
    for (id, b) in branches {
        if let Some(parent) = b.record.parent
            && !(snapshots.contains_key(&parent) && parent.branch < *id)
        {
            return Err(Error::corrupt(
                "volume record",
                format!("branch {}: no parent {parent}", id.0),
            ));
        }
    }
    match snapshots.keys().find(|id| !branches.contains_key(&id.branch)) {
        Some(id) => Err(Error::corrupt(
            "snapshot record",
            format!("snapshot {id} has no branch"),
        )),
        None => Ok(()),
    }
}

/// What lies beyond the end of the data file would read as zeroes: grains in use must not. Known bad ones may, since nothing
/// of them is given to anybody.
fn check_data_size(disk: &dyn Disk, meta: &Meta, state: &State, grain_bytes: u32) -> Result<()> {
    let size = disk.size().map_err(|e| Error::io("stat", "data file", e))?;
    for chunk in (0..state.alloc.chunk_count()).rev() {
        let Some(value) = meta.get(key::bitmap(chunk))? else {
            continue;
        };
        let words = record::decode_bitmap(chunk, &value)?;
        let used = (0u32..64).zip(words).rev().find_map(|(word, bits)| {
            let first = u64::from(chunk) * CHUNK_GRAINS as u64 + u64::from(word) * 64;
            let known_good = |bit: &u8| !state.bad.contains(first + u64::from(*bit));
            let highest = record::indices(bits).filter(known_good).last();
            highest.map(|bit| first + u64::from(bit))
        });
        // The superblocks count as used, and are there.
        if let Some(grain) = used {
            let least = (grain + 1).saturating_mul(u64::from(grain_bytes));
            return if size >= least {
                Ok(())
            } else {
                Err(Error::corrupt(
                    "the data file",
                    format!("it has {size} bytes, data in use needs {least}: it was cut off"),
                ))
            };
        }
    }
    Ok(())
}

fn load_counts(meta: &Meta, system: &SystemRecord, options: &PoolOptions) -> Result<Allocator> {
    let chunks = system.chunks as usize;
    if chunks as u64 * CHUNK_GRAINS as u64 > MAX_GRAINS {
        return Err(Error::corrupt("pool record", format!("{chunks} chunks")));
    }
    let reserved = reserved_grains(system.grain_bytes);
    let blank = |chunk| ChunkCount {
        free: Allocator::blank_free(reserved, chunk),
        shared: false,
    };
    let mut recorded: Vec<ChunkCount> = (0..chunks).map(blank).collect();
    read_table(meta, table::COUNTS, |k, (_, value)| {
        let Key::Counts(block) = k else { return Ok(()) };
        let counts = record::decode_counts(block, &value)?;
        let places = recorded.iter_mut().skip(block as usize * COUNTS_PER_BLOCK);
        places.zip(counts).for_each(|(place, n)| *place = n);
        Ok(())
    })?;
    let grain = u64::from(system.grain_bytes);
    let max = options.max_bytes.div_ceil(grain);
    Ok(Allocator::new(
        reserved,
        max,
        &recorded,
        PUNCH_BYTES.div_ceil(grain),
    ))
}

impl Inner {
    /// Brings the versions back whose deltas are only in `J`.
    fn replay(&self, system: &SystemRecord) -> Result<()> {
        let mut parts: BTreeMap<u64, JournalPart> = BTreeMap::new();
        read_table(&self.meta, table::JOURNAL, |k, (bytes, value)| {
            let Key::Journal(txg, seq) = k else { return Ok(()) };
            if txg > system.txg {
                return Ok(());
            }
            let part = parts.entry(txg).or_insert(JournalPart {
                txg,
                values: 0,
                bytes: 0,
            });
            part.values = part.values.max(seq + 1);
            part.bytes += (bytes.len() + value.len()) as u64;
            if txg <= system.checkpoint {
                return Ok(());
            }
            record::decode_journal(txg, seq, &value)?
                .iter()
                .try_for_each(|d| self.replay_delta(txg, d))
        })?;
        self.state().journal = parts.into_values().collect();
        Ok(())
    }

    fn replay_delta(&self, txg: u64, delta: &Delta) -> Result<()> {
        let k = delta.key;
        let at = (k.branch, k.page);
        if self.state().map.exact(k).is_none() {
            // A version that was removed since has no `E` key any more; its deltas are history.
            if self.meta.get(key::changed(k))?.is_none() {
                return Ok(());
            }
            // The newest version first: the deltas of an older one (its checksums) may come after all of its own.
            self.load_page(at)?;
            if self.state().map.exact(k).is_none() {
                let version = self.stored_or_below(k)?;
                self.state().map.put(at, version);
            }
        }
        let mut state = self.state();
        let version = state.map.exact_mut(k).expect("just made");
        for (index, entry) in delta.changes() {
            version.page.set(index, entry);
        }
        state.map.touch(k, txg);
        Ok(())
    }

    /// What a version's deltas stand on: its stored page, or what its branch saw before it was made.
    fn stored_or_below(&self, k: PageKey) -> Result<Version> {
        if let Some(value) = self.meta.get(key::page(k))? {
            return Ok(Version::clean(Some(k.epoch), record::decode_page(k, &value)?));
        }
        let (_, page) = self.resolve(k.branch, Epoch(k.epoch.0.saturating_sub(1)), k.page)?;
        Ok(Version {
            based: false,
            ..Version::clean(Some(k.epoch), page)
        })
    }

    /// `J` values above `S`.txg belong to a commit that did not happen.
    fn drop_stray_journal(&self, system: &SystemRecord) -> Result<()> {
        let mut batch = Batch::default();
        let mut from = key::journal(system.txg + 1, 0);
        loop {
            let stray = self.meta.scan(from, vec![table::JOURNAL + 1], LOAD_SLICE)?;
            let Some((last, _)) = stray.last() else { break };
            from = last.clone();
            from.push(0);
            stray.into_iter().for_each(|(k, _)| batch.remove(k));
        }
        if batch.is_empty() {
            return Ok(());
        }
        // Durable before a new group of the same number writes its own.
        self.meta.apply(batch)?;
        self.meta.commit()
    }
}

/// Where the parts of a pool are.
#[must_use]
pub fn paths(dir: &Path) -> (PathBuf, PathBuf) {
    (dir.join(DATA_FILE), dir.join(META_DIR))
}

// The largest volume's pages can be numbered.
const _: () = assert!(PageNo::MAX as u64 >= crate::limits::VOLUME_BYTES / (4096 * 64));
