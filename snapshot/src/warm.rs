//! The warm log: what the open transaction group has changed in the map, kept in the page cache so that the death of the
//! process loses nothing that was acknowledged. It is never synced and promises nothing for a power cut: only while the
//! same kernel runs is the page cache (this log, and the grains that it points to) whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::codec::{Dec, Enc, seal, unseal};
use crate::disk::Disk;
use crate::inner::Inner;
use crate::lock::lock;
use crate::page::{Entry, PageNo};
use crate::record::{Delta, FORMAT};
use crate::state::State;
use crate::superblock::Superblock;
use crate::types::BranchId;
use crate::{Error, Result};

/// One file for each parity: one transaction group is open and at most one is closing.
const FILES: [&str; 2] = ["warm.0", "warm.1"];
const MAGIC: &[u8; 16] = b"STILLPOINT WARM\n";
/// A record is a length and at most one whole page of entries; more is damage.
const MAX_RECORD_BYTES: usize = 1024;
/// A longer log is no longer small: the transaction group is committed instead.
const MAX_BYTES: u64 = 64 << 20;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where the log is kept: two short files in memory that survives the process but no power cut.
pub(crate) trait WarmMedium: Send + Sync {
    /// All of a file.
    ///
    /// # Errors
    /// What the operating system says.
    fn read(&self, file: usize) -> io::Result<Vec<u8>>;

    /// Replaces the content of a file.
    ///
    /// # Errors
    /// What the operating system says; the content is then undefined.
    fn rewrite(&self, file: usize, bytes: &[u8]) -> io::Result<()>;

    /// Writes at an offset.
    ///
    /// # Errors
    /// What the operating system says; part of it may have been written.
    fn write_at(&self, file: usize, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Two files in the pool's directory.
pub(crate) struct WarmFiles([File; 2]);

impl WarmFiles {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let open = |name: &str| {
            let path = dir.join(name);
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path);
            file.map_err(|e| Error::io("open", path.display().to_string(), e))
        };
        let [a, b] = FILES;
        Ok(Self([open(a)?, open(b)?]))
    }

    fn file(&self, n: usize) -> &File {
        let [a, b] = &self.0;
        if n == 0 { a } else { b }
    }
}

impl WarmMedium for WarmFiles {
    fn read(&self, file: usize) -> io::Result<Vec<u8>> {
        let mut reader = self.file(file);
        let mut bytes = Vec::new();
        io::Seek::rewind(&mut reader)?;
        reader.take(2 * MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn rewrite(&self, file: usize, bytes: &[u8]) -> io::Result<()> {
        self.file(file).set_len(0)?;
        self.file(file).write_all_at(bytes, 0)
    }

    fn write_at(&self, file: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(file).write_all_at(bytes, offset)
    }
}

/// Forgets the log in a pool's directory: what it says does not fit other metadata.
///
/// # Errors
/// `Io`.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    for name in FILES {
        match std::fs::remove_file(dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", name, e)),
            _ => {}
        }
    }
    Ok(())
}

/// Operations that the next start would take up. Reads only; what cannot be read is nothing to recover.
pub(crate) fn pending(dir: &Path, disk: &dyn Disk, durable: u64) -> u64 {
    let (Ok(superblock), Ok(boot_id)) = (Superblock::newest(disk), boot_id()) else {
        return 0;
    };
    let identity = Identity {
        pool_id: superblock.pool_id,
        boot_id,
    };
    let logs = FILES
        .iter()
        .filter_map(|name| identity.parse(&std::fs::read(dir.join(name)).ok()?));
    logs.filter(|(txg, _)| follows(*txg, durable))
        .map(|(_, records)| records.len() as u64)
        .sum()
}

/// Whether a file's group is the one that was open, or closing, after `durable`.
fn follows(txg: u64, durable: u64) -> bool {
    (durable + 1..=durable + 2).contains(&txg)
}

/// Names the running kernel.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// What `State::publish` hands out: the place of a change in the order of all changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a change is acknowledged only after it is in the warm log"]
pub(crate) struct Ticket {
    /// The transaction group that it belongs to.
    pub(crate) txg: u64,
    /// Counts publications since the pool was opened; taken under the state's lock.
    pub(crate) sequence: u64,
}

#[derive(Clone, Copy, Default)]
struct Half {
    txg: u64,
    len: u64,
}

/// Both files as this process wrote them.
#[derive(Default)]
struct Halves {
    files: [Half; 2],
    /// Nothing is logged any more. Beside the files, so that no record comes after the decision.
    off: bool,
}

/// The log of an open pool.
pub(crate) struct WarmLog {
    medium: Box<dyn WarmMedium>,
    identity: Identity,
    halves: Mutex<Halves>,
    warned: AtomicBool,
}

/// What a file must say to belong to this pool and this kernel.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) pool_id: [u8; 16],
    pub(crate) boot_id: String,
}

impl Identity {
    fn header(&self, txg: u64) -> Vec<u8> {
        let mut e = Enc::default();
        e.raw(MAGIC);
        e.u32(FORMAT);
        e.raw(&self.pool_id);
        e.bytes(self.boot_id.as_bytes());
        e.u64(txg);
        seal(MAGIC, e.into_bytes())
    }

    /// The transaction group of a file and where its records begin, if it is ours.
    fn parse_header(&self, bytes: &[u8]) -> Option<(u64, usize)> {
        let len = self.header(0).len();
        let payload = unseal(MAGIC, bytes.get(..len)?).ok()?;
        let txg = u64::from_be_bytes(*payload.last_chunk::<8>()?);
        (bytes.get(..len)? == self.header(txg)).then_some((txg, len))
    }

    /// Binds a record to pool, kernel and transaction group: what an earlier group left behind never fits.
    fn record_key(&self, txg: u64) -> Vec<u8> {
        let mut e = Enc::default();
        e.raw(&self.pool_id);
        e.bytes(self.boot_id.as_bytes());
        e.u64(txg);
        e.into_bytes()
    }

    /// Length, sequence, changes, CRC.
    fn record(&self, ticket: Ticket, delta: &Delta) -> Vec<u8> {
        let mut payload = Enc::default();
        payload.u64(ticket.sequence);
        delta.encode(&mut payload);
        let sealed = seal(&self.record_key(ticket.txg), payload.into_bytes());
        let mut e = Enc::default();
        e.u32(u32::try_from(sealed.len()).expect("at most a page of entries"));
        e.raw(&sealed);
        e.into_bytes()
    }

    /// The transaction group and the records of a file, up to the first that is not whole.
    fn parse(&self, bytes: &[u8]) -> Option<(u64, Vec<(u64, Delta)>)> {
        let (txg, start) = self.parse_header(bytes)?;
        let key = self.record_key(txg);
        let mut d = Dec::new(bytes.get(start..)?, "warm log");
        let mut records = Vec::new();
        while let Ok(record) = parse_record(&mut d, &key) {
            records.push(record);
        }
        Some((txg, records))
    }
}

impl Identity {
    /// Whether a file of this pool and kernel has lost records in its middle: a kill tears the last one only. What is left of
    /// an earlier group does not fit the key and is no loss.
    fn is_damaged(&self, bytes: &[u8], durable: u64) -> bool {
        let len = self.header(0).len();
        let Some((txg, start)) = self.parse_header(bytes) else {
            let whole = bytes.get(..len).map(|head| unseal(MAGIC, head));
            return !bytes.is_empty() && !matches!(whole, Some(Ok(_)));
        };
        if !follows(txg, durable) {
            return false;
        }
        let (key, rest) = (self.record_key(txg), bytes.get(start..).unwrap_or_default());
        let mut d = Dec::new(rest, "warm log");
        let mut at = 0;
        while parse_record(&mut d, &key).is_ok() {
            at = rest.len() - d.left();
        }
        let later = (at + 1..rest.len()).filter_map(|from| rest.get(from..));
        later
            .filter(|bytes| bytes.starts_with(&[0, 0]))
            .any(|bytes| parse_record(&mut Dec::new(bytes, "warm log"), &key).is_ok())
    }
}

fn parse_record(d: &mut Dec<'_>, key: &[u8]) -> Result<(u64, Delta)> {
    let len = d.u32()? as usize;
    if len > MAX_RECORD_BYTES {
        return Err(d.bad("length"));
    }
    let mut payload = Dec::new(unseal(key, d.raw(len)?)?, "warm log");
    let record = (payload.u64()?, Delta::decode(&mut payload)?);
    payload.end()?;
    Ok(record)
}

impl WarmLog {
    pub(crate) fn new(medium: Box<dyn WarmMedium>, identity: Identity) -> Self {
        Self {
            medium,
            identity,
            halves: Mutex::default(),
            warned: AtomicBool::new(false),
        }
    }

    /// What can still be read: transaction groups with their records.
    fn read(&self) -> Vec<(u64, Vec<(u64, Delta)>)> {
        let file = |n| match self.medium.read(n) {
            Ok(bytes) => self.identity.parse(&bytes),
            Err(e) => {
                tracing::warn!("{}: {e}", FILES.get(n).copied().unwrap_or_default());
                None
            }
        };
        [0, 1].into_iter().filter_map(file).collect()
    }

    /// Whether a file has lost something that was acknowledged.
    fn is_damaged(&self, durable: u64) -> bool {
        let damaged = |n| match self.medium.read(n) {
            Ok(bytes) => self.identity.is_damaged(&bytes, durable),
            Err(_) => true,
        };
        [0, 1].into_iter().any(damaged)
    }

    /// Remembers a change; `false` when it cannot, and the change must be committed before it is acknowledged.
    /// Whether the log takes some more changes for sure, unless its medium fails now.
    fn has_room(&self) -> bool {
        let halves = lock(&self.halves);
        let longest = halves.files.iter().map(|half| half.len).max().unwrap_or(0);
        !halves.off && longest <= MAX_BYTES / 2 && !self.warned.load(Ordering::Relaxed)
    }

    fn append(&self, ticket: Ticket, delta: &Delta) -> bool {
        let n = usize::from(!ticket.txg.is_multiple_of(2));
        let mut halves = lock(&self.halves);
        if halves.off {
            return false;
        }
        let [even, odd] = &mut halves.files;
        let half = if n == 0 { even } else { odd };
        if half.txg > ticket.txg {
            // Its group has become durable meanwhile.
            return true;
        }
        match self.append_to(half, n, ticket, delta) {
            Ok(done) => done,
            Err(e) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!("the warm log cannot be written ({e}): committing instead, which is slow");
                }
                false
            }
        }
    }

    fn append_to(&self, half: &mut Half, n: usize, ticket: Ticket, delta: &Delta) -> io::Result<bool> {
        if half.txg < ticket.txg {
            // What is in there belongs to a group that is durable. It is written over, not truncated: growing a file
            // costs twice as much as filling it (measured), and old records do not fit the new group's key.
            let header = self.identity.header(ticket.txg);
            self.medium.write_at(n, 0, &header)?;
            *half = Half {
                txg: ticket.txg,
                len: header.len() as u64,
            };
        }
        if half.len > MAX_BYTES {
            return Ok(false);
        }
        // A torn record is overwritten by the next: the length grows only when all of it is there.
        let record = self.identity.record(ticket, delta);
        self.medium.write_at(n, half.len, &record)?;
        half.len += record.len() as u64;
        Ok(true)
    }

    /// Empties both files. Best effort: what stays behind is refused by its transaction group.
    pub(crate) fn clear(&self) {
        self.empty(&mut lock(&self.halves));
    }

    /// After a failed sync of the data file the page cache may have lost what the log points to: it must never be
    /// replayed. Other failures leave the page cache whole, and the log is what a restart recovers from.
    pub(crate) fn invalidate(&self) {
        let mut halves = lock(&self.halves);
        halves.off = true;
        self.empty(&mut halves);
    }

    /// The next record writes a header again.
    fn empty(&self, halves: &mut Halves) {
        halves.files = Default::default();
        for n in [0, 1] {
            if let Err(e) = self.medium.rewrite(n, &[]) {
                tracing::warn!("{}: {e}", FILES.get(n).copied().unwrap_or_default());
            }
        }
    }
}

/// What a replay did.
#[derive(Debug, Default)]
struct Replayed {
    operations: usize,
    /// Of branches that do not exist: they were never acknowledged.
    skipped: usize,
}

impl Inner {
    /// Whether [`Inner::keep_warm`] will not have to commit.
    pub(crate) fn keeps_warm_at_once(&self) -> bool {
        self.warm.as_ref().is_none_or(WarmLog::has_room)
    }

    /// Puts a published change into the warm log before it is acknowledged.
    ///
    /// # Errors
    /// `Poisoned`: where the log cannot take it, the change is committed.
    pub(crate) fn keep_warm(
        &self,
        ticket: Ticket,
        branch: BranchId,
        page: PageNo,
        changes: &[(u8, Entry)],
    ) -> Result<()> {
        let Some(warm) = &self.warm else { return Ok(()) };
        let mask = changes.iter().fold(0u64, |mask, (i, _)| mask | 1 << i);
        let entries = changes.iter().map(|(_, e)| *e).collect();
        let key = crate::record::PageKey {
            branch,
            page,
            epoch: crate::Epoch::ZERO,
        };
        if warm.append(ticket, &Delta { key, mask, entries }) {
            self.hook("write.warm");
            return Ok(());
        }
        self.commit_through(ticket.txg)
    }

    /// Takes up what a process that died on this boot had acknowledged and not committed. Before anybody may write.
    ///
    /// # Errors
    /// `Poisoned`, `Corrupt`, `NoSpace`: nothing was changed for good.
    pub(crate) fn replay_warm(&self) -> Result<()> {
        let Some(warm) = &self.warm else { return Ok(()) };
        let durable = self.state().durable;
        if warm.is_damaged(durable) {
            tracing::error!(
                "the log of what a killed process had acknowledged is damaged: writes of its last second may be lost, \
                 although the initiator did not see a loss of power; check the file systems on the LUNs"
            );
            self.recovery_incomplete.store(true, Ordering::Release);
        }
        let mut logs = warm.read();
        logs.retain(|(txg, records)| follows(*txg, durable) && !records.is_empty());
        let newest = logs.iter().map(|(txg, _)| *txg).max();
        let mut records: Vec<(u64, Delta)> = logs.into_iter().flat_map(|(_, records)| records).collect();
        records.sort_by_key(|(sequence, _)| *sequence);
        let mut done = Replayed::default();
        for (_, delta) in &records {
            if self.replay_change(delta)? {
                done.operations += 1
            } else {
                done.skipped += 1
            }
        }
        if let Some(newest) = newest {
            self.commit_past(newest).inspect_err(|e| {
                tracing::error!(
                    "what a killed process had acknowledged could not be recovered ({e}); {} and {} keep it for the \
                     next start, unless the data file could not be synced",
                    FILES[0],
                    FILES[1]
                );
            })?;
            tracing::info!(
                operations = done.operations,
                skipped = done.skipped,
                "the pool was not closed: recovered what had been acknowledged"
            );
        }
        warm.clear();
        Ok(())
    }

    /// Commits under a number above both files' groups at once: a second replay after a cut in between would take
    /// grains that the first has freed. The number's parity differs from the durable one's, for the superblock slots.
    fn commit_past(&self, newest: u64) -> Result<()> {
        let txg = {
            let mut state = self.state();
            let next = if newest == state.durable + 1 {
                newest
            } else {
                newest + 1
            };
            state.open.id = next;
            state.open.forced_close = true;
            next
        };
        self.commit_through(txg)
    }

    fn replay_change(&self, delta: &Delta) -> Result<bool> {
        let (branch, page) = (delta.key.branch, delta.key.page);
        if !self.state().branches.get(&branch).is_some_and(|b| b.record.head) {
            return Ok(false);
        }
        let end = self.disk.size().map_err(|e| Error::io("stat", "data file", e))?;
        for grain in delta.entries.iter().filter_map(|e| e.grain()) {
            // Data is written before it is logged: a grain past the end of the file was never ours.
            if self.place(grain) < end {
                let chunk = self.state().alloc.extend_to(grain);
                self.load_chunk(chunk)?;
            }
        }
        self.with_page(branch, page, |state| {
            let changes = state.recovered_changes(delta)?;
            if changes.is_empty() {
                return Ok(());
            }
            // Not logged again: the files stay as they are until this is durable.
            state.publish(branch, page, &changes).map(|_| ())
        })?;
        Ok(true)
    }
}

impl State {
    /// The entries of a record as the present state would have made them, their grains reserved.
    fn recovered_changes(&mut self, delta: &Delta) -> Result<Vec<(u8, Entry)>> {
        let (branch, page) = (delta.key.branch, delta.key.page);
        // The epoch of a cut that was not durable is gone; nobody was told of it.
        let birth = self.branch(branch)?.record.current;
        let now = self.head_page(branch, page).unwrap_or_default();
        let mut changes = Vec::new();
        for (index, entry) in delta.changes() {
            match entry.grain() {
                Some(grain) if now.at(index).grain() == Some(grain) => {}
                Some(grain) if self.alloc.reserve_exactly(grain) => {
                    changes.push((index, entry.reborn(birth)));
                }
                Some(grain) => {
                    tracing::error!(
                        "warm log: grain {grain} of page {page} of branch {} is taken",
                        branch.0
                    );
                }
                None if entry.is_zero() => changes.push((index, Entry::zero(birth))),
                None => changes.push((index, Entry::HOLE)),
            }
        }
        Ok(changes)
    }
}

#[cfg(test)]
#[path = "warm_tests.rs"]
mod tests;
