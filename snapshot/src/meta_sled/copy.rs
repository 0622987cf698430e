//! The copy that a compaction makes of a store, and its end: both are closed, change places, and the copy is opened.
//! sled names its `snap.*` files by the path that it was opened with, so neither may be open while the names change.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, renameat_with};

use super::{LOG, LogFile, SledMeta, failure, open_unlocked, read_through, sync_dir, sync_tree};
use crate::compact::{CompactState, CompactStep};
use crate::meta::Batch;
use crate::open::{COMPACT_DIR, take_lock};
use crate::{Error, Result};

/// A new store, as far as it has come.
pub(super) struct Copy {
    db: sled::Db,
    dir: PathBuf,
    /// Keys below are in it; all of them, once it is done.
    below: Vec<u8>,
    copied: CompactState,
    /// Keys below have been compared.
    equal_below: Vec<u8>,
    compared: CompactState,
    /// Why it is of no use any more.
    failed: Option<Error>,
}

impl Copy {
    fn has(&self, key: &[u8]) -> bool {
        self.copied.done || key < self.below.as_slice()
    }

    fn step_copy(&mut self, from: &sled::Db, limit: usize) -> Result<CompactState> {
        let (mut batch, mut count) = (sled::Batch::default(), 0);
        for item in from.range(self.below.clone()..).take(limit) {
            let (k, v) = item.map_err(|e| failure("scan", &self.dir, e))?;
            self.copied.keys += 1;
            self.copied.bytes += (k.len() + v.len()) as u64;
            self.below = after(&k);
            batch.insert(k, v);
            count += 1;
        }
        let applied = self.db.apply_batch(batch);
        applied.map_err(|e| failure("write", &self.dir, e))?;
        self.copied.done = count < limit;
        Ok(self.copied)
    }

    fn step_compare(&mut self, with: &sled::Db, limit: usize) -> Result<CompactState> {
        let range = self.equal_below.clone()..;
        let mut ours = self.db.range(range.clone());
        let mut count = 0;
        for item in with.range(range).take(limit) {
            let pair = item.map_err(|e| failure("scan", &self.dir, e))?;
            let copy = ours
                .next()
                .transpose()
                .map_err(|e| failure("scan", &self.dir, e))?;
            if copy.as_ref() != Some(&pair) {
                return Err(differs(&pair.0));
            }
            self.compared.keys += 1;
            self.compared.bytes += (pair.0.len() + pair.1.len()) as u64;
            self.equal_below = after(&pair.0);
            count += 1;
        }
        self.compared.done = count < limit;
        match ours.next() {
            Some(Ok((k, _))) if self.compared.done => Err(differs(&k)),
            Some(Err(e)) => Err(failure("scan", &self.dir, e)),
            _ => Ok(self.compared),
        }
    }
}

fn after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

fn differs(key: &[u8]) -> Error {
    Error::corrupt("the compacted copy of the metadata", crate::codec::hex(key))
}

/// Closes a store; returns when none of sled's threads has its files open any more (they keep the lock until then).
fn close(db: sled::Db, dir: &Path) -> Result<()> {
    drop(db);
    let path = dir.join(LOG);
    let io = |e| Error::io("lock", path.display().to_string(), e);
    let file = File::open(&path).map_err(io)?;
    if take_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(io)? {
        Ok(())
    } else {
        Err(Error::refused(format!("{} does not close", path.display())))
    }
}

impl SledMeta {
    /// Writes what the copy has passed into it too.
    pub(super) fn copy_changes(&mut self, batch: &Batch) {
        let Some(copy) = self.copy.as_mut().filter(|c| c.failed.is_none()) else {
            return;
        };
        let mut changes = sled::Batch::default();
        for (key, value) in batch.changes.iter().filter(|(key, _)| copy.has(key)) {
            match value {
                Some(v) => changes.insert(key.as_slice(), v.as_slice()),
                None => changes.remove(key.as_slice()),
            }
        }
        if let Err(e) = copy.db.apply_batch(changes) {
            copy.failed = Some(failure("write", &copy.dir, e));
        }
    }

    pub(super) fn compact_step(&mut self, step: CompactStep) -> Result<Result<CompactState>> {
        let done = match step {
            CompactStep::Begin => self.begin_copy(),
            CompactStep::Abort => self.drop_copy(),
            CompactStep::Finish => return self.change_places(),
            CompactStep::Copy(_) | CompactStep::Compare(_) => self.go_on(step),
        };
        Ok(done)
    }

    fn begin_copy(&mut self) -> Result<CompactState> {
        self.drop_copy()?;
        let dir = self.dir.with_file_name(COMPACT_DIR);
        self.copy = Some(Copy {
            db: open_unlocked(&dir)?,
            dir,
            below: Vec::new(),
            copied: CompactState::default(),
            equal_below: Vec::new(),
            compared: CompactState::default(),
            failed: None,
        });
        Ok(CompactState::default())
    }

    fn drop_copy(&mut self) -> Result<CompactState> {
        let dir = self.dir.with_file_name(COMPACT_DIR);
        if let Some(copy) = self.copy.take() {
            close(copy.db, &dir)?;
        }
        if dir.is_dir() {
            let removed = std::fs::remove_dir_all(&dir);
            removed.map_err(|e| Error::io("remove", dir.display().to_string(), e))?;
        }
        Ok(CompactState::default())
    }

    fn go_on(&mut self, step: CompactStep) -> Result<CompactState> {
        let none = || Error::refused("no compaction was begun");
        let from = self.db()?.clone();
        let copy = self.copy.as_mut().ok_or_else(none)?;
        if let Some(e) = copy.failed.take() {
            return Err(e);
        }
        match step {
            CompactStep::Copy(limit) => copy.step_copy(&from, limit),
            CompactStep::Compare(limit) => copy.step_compare(&from, limit),
            _ => Err(none()),
        }
    }

    /// The owner has made the store durable and writes nothing meanwhile.
    fn change_places(&mut self) -> Result<Result<CompactState>> {
        let whole = |c: &Copy| c.failed.is_none() && c.copied.done && c.compared.done;
        let Some(copy) = self.copy.take_if(|c| whole(c)) else {
            return Ok(Err(Error::refused("the copy is not whole")));
        };
        let (dir, state) = (copy.dir, copy.copied);
        // As before every opening: sled takes a read error for the end of its log. The old store is still there then.
        let ready = close(copy.db, &dir)
            .and_then(|()| sync_tree(&dir))
            .and_then(|()| read_through(&dir.join(LOG)));
        if let Err(e) = ready {
            return Ok(Err(e));
        }
        if let Some(db) = self.db.take() {
            close(db, &self.dir)?;
        }
        let exchanged = renameat_with(CWD, &self.dir, CWD, &dir, RenameFlags::EXCHANGE)
            .map_err(|e| Error::io("exchange", dir.display().to_string(), e.into()));
        if exchanged.is_ok()
            && let Some(parent) = self.dir.parent()
        {
            sync_dir(parent)?;
        }
        self.db = Some(open_unlocked(&self.dir)?);
        self.barrier = std::sync::Arc::new(LogFile::open(&self.dir)?);
        self.assert_no_blobs()?;
        sync_tree(&self.dir)?;
        // The other one is of no use any more, whichever it is; if it cannot be removed, the next start does it.
        if let Err(e) = std::fs::remove_dir_all(&dir) {
            tracing::warn!("{} is left over and cannot be removed: {e}", dir.display());
        }
        Ok(exchanged.map(|()| state))
    }
}
