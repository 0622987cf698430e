//! [`MetaStore`] on sled 0.34.7, by the rules of FORMAT.md (measured: without our own fdatasync a power cut loses
//! flushed batches).

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::compact::{CompactState, CompactStep};
use crate::meta::{Barrier, Batch, MAX_VALUE_BYTES, MetaStore, Pair};
use crate::open::take_lock;
use crate::{Error, Result};

mod copy;

use copy::Copy;

/// Our page cache is the real one.
const CACHE_BYTES: u64 = 64 << 20;
const FLUSH_EVERY_MS: u64 = 500;
const READ_THROUGH_BYTES: usize = 1 << 20;
/// Name of sled's log in its directory.
const LOG: &str = "db";
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// The metadata store of a pool on a local file system.
pub struct SledMeta {
    /// None only after a compaction that failed at its end.
    db: Option<sled::Db>,
    dir: PathBuf,
    barrier: Arc<LogFile>,
    copy: Option<Copy>,
}

/// Our own descriptor of sled's log.
struct LogFile {
    file: File,
    path: PathBuf,
}

impl LogFile {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(LOG);
        let file = File::open(&path).map_err(|e| Error::io("open", path.display().to_string(), e))?;
        Ok(Self { file, path })
    }
}

impl Barrier for LogFile {
    fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::io("fdatasync", self.path.display().to_string(), e))
    }
}

impl SledMeta {
    /// Opens the store in `dir`, or makes one. Opening recovers, that is, writes.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, or `Corrupt` as sled says.
    pub fn open(dir: &Path) -> Result<Self> {
        remove_unfinished(dir)?;
        read_through(&dir.join(LOG))?;
        let store = Self {
            db: Some(open_unlocked(dir)?),
            dir: dir.to_owned(),
            barrier: Arc::new(LogFile::open(dir)?),
            copy: None,
        };
        store.assert_no_blobs()?;
        // sled renames and unlinks `snap.*` while it opens and never syncs the directory.
        sync_tree(dir)?;
        Ok(store)
    }

    fn db(&self) -> Result<&sled::Db> {
        let closed = || Error::corrupt("metadata store", "closed by a compaction that failed");
        self.db.as_ref().ok_or_else(closed)
    }

    /// A value above the limit would make nodes that sled moves to separate files, which it never syncs (§3.3).
    fn assert_no_blobs(&self) -> Result<()> {
        let blobs = self.dir.join("blobs");
        let Ok(mut entries) = std::fs::read_dir(&blobs) else {
            return Ok(());
        };
        match entries.next() {
            Some(_) => Err(Error::corrupt(
                "metadata store: unexpected blob files",
                blobs.display().to_string(),
            )),
            None => Ok(()),
        }
    }
}

/// Removes `snap.*.generating`: what is left of a summary of the log that a crash interrupted. sled takes it for the newest
/// one and then refuses to open (seen with power cuts; its own rule is to write, sync and rename). The summary only saves
/// reading the log from its start, so nothing goes with it.
fn remove_unfinished(dir: &Path) -> Result<()> {
    let io = |op, path: &Path, e| Error::io(op, path.display().to_string(), e);
    let log = dir.join("db");
    let file = match File::open(&log) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io("open", &log, e)),
    };
    // Threads of a store that was just dropped may still be at it: they keep sled's lock. Who cannot have it now does not
    // get the store open either, and is told so there.
    let free = take_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| io("lock", &log, e))?;
    if !free {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir).map_err(|e| io("list", dir, e))? {
        let path = entry.map_err(|e| io("list", dir, e))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy());
        if name.is_some_and(|name| name.starts_with("snap.") && name.ends_with(".generating")) {
            tracing::info!("removing {}, which a crash left unfinished", path.display());
            std::fs::remove_file(&path).map_err(|e| io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// Reads the whole log once, so that a device that cannot give it is found before sled is. sled takes a read error while it
/// opens for the end of its log and begins a new one over the old (seen with failing reads: one error at the first block, and
/// the store was empty for good). What was read stays in the page cache, where sled finds it a moment later.
fn read_through(path: &Path) -> Result<()> {
    let io = |e| Error::io("read", path.display().to_string(), e);
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io(e)),
    };
    let mut buffer = vec![0; READ_THROUGH_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(e) if e.kind() != std::io::ErrorKind::Interrupted => return Err(io(e)),
            _ => {}
        }
    }
}

/// Opens sled, waiting a moment for its lock: when a store is dropped, sled's own threads keep the file a little longer
/// (seen in tests). Other processes are kept out by the pool's own lock.
fn open_unlocked(dir: &Path) -> Result<sled::Db> {
    let begun = Instant::now();
    loop {
        let opened = sled::Config::default()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(Some(FLUSH_EVERY_MS))
            .open();
        match opened {
            Err(sled::Error::Io(e)) if is_locked(&e) && begun.elapsed() < LOCK_WAIT => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other.map_err(|e| failure("open", dir, e)),
        }
    }
}

/// sled wraps the reason in a text.
fn is_locked(error: &std::io::Error) -> bool {
    error.to_string().contains("could not acquire lock")
}

/// Makes every file below `dir` durable, then the directories, then the parent's entry for it.
pub(crate) fn sync_tree(dir: &Path) -> Result<()> {
    let io = |op, path: &Path, e| Error::io(op, path.display().to_string(), e);
    for entry in std::fs::read_dir(dir).map_err(|e| io("list", dir, e))? {
        let entry = entry.map_err(|e| io("list", dir, e))?;
        let path = entry.path();
        let kind = match entry.file_type() {
            Ok(kind) => kind,
            // sled removes an old `snap.*` while we look.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(io("stat", &path, e)),
        };
        if kind.is_dir() {
            sync_tree(&path)?;
            continue;
        }
        match File::open(&path).and_then(|f| f.sync_all()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("fsync", &path, e)),
            _ => {}
        }
    }
    sync_dir(dir)?;
    dir.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .map_or(Ok(()), sync_dir)
}

/// fsync of a directory.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io("fsync directory", dir.display().to_string(), e))
}

fn failure(op: &'static str, dir: &Path, error: sled::Error) -> Error {
    match error {
        sled::Error::Io(e) => Error::io(op, dir.display().to_string(), e),
        other => Error::corrupt("metadata store", format!("{}: {op}: {other}", dir.display())),
    }
}

impl MetaStore for SledMeta {
    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let value = self.db()?.get(key).map_err(|e| failure("read", &self.dir, e))?;
        Ok(value.map(|v| v.to_vec()))
    }

    fn scan(&mut self, from: &[u8], below: &[u8], limit: usize) -> Result<Vec<Pair>> {
        if from >= below {
            return Ok(Vec::new());
        }
        let mut out = Vec::new();
        for item in self.db()?.range(from..below).take(limit) {
            let (k, v) = item.map_err(|e| failure("scan", &self.dir, e))?;
            out.push((k.to_vec(), v.to_vec()));
        }
        Ok(out)
    }

    fn last(&mut self, from: &[u8], below: &[u8]) -> Result<Option<Pair>> {
        if from >= below {
            return Ok(None);
        }
        let item = self.db()?.range(from..below).next_back().transpose();
        let item = item.map_err(|e| failure("scan", &self.dir, e))?;
        Ok(item.map(|(k, v)| (k.to_vec(), v.to_vec())))
    }

    fn apply(&mut self, batch: &Batch) -> Result<()> {
        let mut sled_batch = sled::Batch::default();
        for (key, value) in &batch.changes {
            match value {
                Some(v) => {
                    assert!(
                        v.len() <= MAX_VALUE_BYTES,
                        "a value of {} bytes would make blobs",
                        v.len()
                    );
                    sled_batch.insert(key.as_slice(), v.as_slice());
                }
                None => sled_batch.remove(key.as_slice()),
            }
        }
        let applied = self.db()?.apply_batch(sled_batch);
        applied.map_err(|e| failure("write", &self.dir, e))?;
        self.copy_changes(batch);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.db()?
            .flush()
            .map(|_| ())
            .map_err(|e| failure("flush", &self.dir, e))
    }

    fn compact(&mut self, step: CompactStep) -> Result<Result<CompactState>> {
        self.compact_step(step)
    }

    fn barrier(&self) -> Arc<dyn Barrier> {
        Arc::clone(&self.barrier) as Arc<dyn Barrier>
    }

    fn size_on_disk(&mut self) -> Result<u64> {
        self.db()?
            .size_on_disk()
            .map_err(|e| failure("measure", &self.dir, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_while_sled_summed_up_its_log_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        let mut meta = SledMeta::open(&path).unwrap();
        let mut batch = Batch::default();
        batch.put(vec![b'S'], vec![1; 100]);
        meta.apply(&batch).unwrap();
        meta.flush().unwrap();
        meta.barrier().sync().unwrap();
        drop(meta);
        for left in [&b""[..], &[7; 40]] {
            let torn = path.join("snap.00FFFFFFFFFFFFFF.generating");
            std::fs::write(&torn, left).unwrap();
            let mut meta = SledMeta::open(&path).unwrap();
            assert_eq!(meta.get(b"S").unwrap(), Some(vec![1; 100]));
            assert!(!torn.exists());
        }
    }

    #[test]
    fn batches_are_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        let mut meta = SledMeta::open(&path).unwrap();
        let mut batch = Batch::default();
        for i in 0..200u8 {
            batch.put(vec![b'M', i], vec![i; MAX_VALUE_BYTES]);
        }
        batch.remove(vec![b'M', 7]);
        meta.apply(&batch).unwrap();
        meta.flush().unwrap();
        meta.barrier().sync().unwrap();
        assert_eq!(meta.scan(&[b'M', 5], &[b'M', 9], 10).unwrap().len(), 3, "5, 6, 8");
        assert_eq!(meta.last(b"M", &[b'M', 8]).unwrap().unwrap().0, vec![b'M', 6]);
        assert_eq!(meta.last(b"A", b"B").unwrap(), None);
        drop(meta);
        let mut meta = SledMeta::open(&path).unwrap();
        assert_eq!(
            meta.get(&[b'M', 199]).unwrap().unwrap(),
            vec![199; MAX_VALUE_BYTES]
        );
        assert_eq!(meta.get(&[b'M', 7]).unwrap(), None);
        assert_eq!(std::fs::read_dir(path.join("blobs")).unwrap().count(), 0);
    }
}
