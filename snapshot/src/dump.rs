//! The metadata as text, and back: one JSON object per line, for people to read and for a new start from a store
//! whose database is damaged or has grown. User data stays in the data file and is not part of it.
//!
//! The text is the state of the last commit: the delta log is applied to its pages, and what follows from the rest
//! (free counts, lists of changed pages) is left out and made anew by [`restore`].

mod line;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Write};
use std::path::Path;

use self::line::{
    Line, entries_text, parse_entries, parse_ranges, parse_references, pool_line, ranges_text, record_line,
    references_line, unhex,
};
use crate::loan::Loans;
use crate::meta::{Batch, MetaStore};
use crate::offline::{self, Overlay, Pages, Parents, each};
use crate::record::{
    self, BranchRecord, CHUNK_GRAINS, ChunkCount, JobRecord, Key, PageKey, SnapshotRecord, SystemRecord, key,
    table,
};
use crate::refs::Refs;
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, SnapshotId, VolumeId};
use crate::{Error, Result};

/// Version of the text.
const DUMP: u32 = 1;
/// Changes per batch of a restore.
const BATCH: usize = 1024;

/// Writes the metadata of the pool in `dir` as text. No process may have the pool open.
///
/// # Errors
/// `Corrupt` at the first damaged record (a dump must not leave out what it cannot read), `Io` of `out` and the files.
pub fn dump(dir: &Path, out: &mut dyn Write) -> Result<()> {
    let copy = offline::Copy::of(dir)?;
    let (_, mut meta) = copy.open()?;
    dump_meta(&mut *meta, out)
}

/// Writes the metadata as text.
///
/// # Errors
/// As [`dump`].
pub fn dump_meta(meta: &mut dyn MetaStore, out: &mut dyn Write) -> Result<()> {
    let mut out = Lines { out, lines: 0 };
    let system = offline::system(meta)?;
    out.put(&Line::Stillpoint {
        dump: DUMP,
        format: record::FORMAT,
    })?;
    out.put(&pool_line(&system))?;
    let mut parents = Parents::new();
    for table in [
        table::BRANCH,
        table::SNAPSHOT,
        table::JOB,
        table::BAD,
        table::VALUE,
    ] {
        each(meta, table, |_, (key, value)| {
            let line = record_line(&Key::parse(&key)?, &value)?;
            if let Line::Branch {
                id,
                parent: Some((branch, epoch)),
                ..
            } = &line
            {
                parents.insert(
                    BranchId(*id),
                    SnapshotId {
                        branch: BranchId(*branch),
                        epoch: Epoch(*epoch),
                    },
                );
            }
            out.put(&line)
        })?;
    }
    if parents.iter().any(|(child, parent)| parent.branch >= *child) {
        return Err(Error::corrupt(
            "volume records",
            "a branch stands on a younger one",
        ));
    }
    dump_pages(meta, &system, &parents, &mut out)?;
    each(meta, table::BITMAP, |_, (key, value)| {
        let Key::Bitmap(chunk) = Key::parse(&key)? else {
            return Ok(());
        };
        let grains = ranges_text(&record::decode_bitmap(chunk, &value)?);
        out.put(&Line::Used { chunk, grains })
    })?;
    dump_references(meta, &mut out)?;
    let lines = out.lines;
    out.put(&Line::End { lines })?;
    out.out
        .flush()
        .map_err(|error| Error::io("write", "the dump", error))
}

fn dump_references(meta: &mut dyn MetaStore, out: &mut Lines<'_>) -> Result<()> {
    let mut now: Option<(u32, Refs)> = None;
    each(meta, table::REFERENCES, |_, (key, value)| {
        let key = Key::parse(&key)?;
        let (Key::References(chunk, _) | Key::Spilled(chunk, _)) = key else {
            return Ok(());
        };
        let (_, refs) = match &mut now {
            Some((same, refs)) if *same == chunk => (chunk, refs),
            other => {
                // In the order of the keys: the chunk before is whole.
                if let Some((whole, refs)) = other.take() {
                    out.put(&references_line(whole, &refs))?;
                }
                let (_, refs) = other.insert((chunk, Refs::default()));
                (chunk, refs)
            }
        };
        refs.decode(&key, &value)
    })?;
    now.map_or(Ok(()), |(chunk, refs)| out.put(&references_line(chunk, &refs)))
}

struct Lines<'a> {
    out: &'a mut dyn Write,
    lines: u64,
}

impl Lines<'_> {
    fn put(&mut self, line: &Line) -> Result<()> {
        let mut text =
            serde_json::to_string(line).map_err(|error| Error::corrupt("dump line", error.to_string()))?;
        text.push('\n');
        self.lines += 1;
        self.out
            .write_all(text.as_bytes())
            .map_err(|error| Error::io("write", "the dump", error))
    }
}

fn dump_pages(
    meta: &mut dyn MetaStore,
    system: &SystemRecord,
    parents: &Parents,
    out: &mut Lines<'_>,
) -> Result<()> {
    let mut damage = None;
    let overlay = Overlay::read(meta, system, |error| damage = Some(error))?;
    if let Some(error) = damage {
        return Err(error);
    }
    let mut jobs = BTreeMap::new();
    each(meta, table::JOB, |_, (key, value)| {
        if let Key::Job(id) = Key::parse(&key)? {
            jobs.insert(id, JobRecord::decode(id, &value)?);
        }
        Ok(())
    })?;
    let (tombs, loans) = (Tombs::of(&jobs), Loans::of(&jobs));
    let pages = Pages {
        tombs: &tombs,
        loans: &loans,
        overlay: &overlay,
        parents,
    };
    let damage = std::cell::RefCell::new(None);
    pages.each(
        meta,
        &mut |error| drop(damage.borrow_mut().replace(error)),
        |versions| {
            if let Some(error) = damage.borrow_mut().take() {
                return Err(error);
            }
            for (epoch, page) in &versions.versions {
                let (branch, no) = (versions.branch.0, versions.page);
                out.put(&Line::Page {
                    branch,
                    page: no,
                    epoch: epoch.0,
                    entries: entries_text(page),
                })?;
            }
            Ok(())
        },
    )
}

/// Makes the metadata of the pool in `dir` anew from the text of [`dump`]. What was there is kept as
/// `meta.before-restore`; the data file stays as it is. A failed restore changes nothing.
///
/// # Errors
/// `Corrupt` with the line number when the text is not a whole dump, `Version`, `NotFound` without a data file,
/// `LostCommits` when the dump is older than the data file, `Refused` when it is of another pool or the pool is in
/// use, `Io`.
pub fn restore(text: &mut dyn BufRead, dir: &Path) -> Result<()> {
    offline::make_new(dir, |meta| restore_meta(text, meta))
}

/// Fills an empty metadata store from the text of [`dump`]. Not durable until the caller flushes and syncs it.
///
/// # Errors
/// As [`restore`].
pub fn restore_meta(text: &mut dyn BufRead, meta: &mut dyn MetaStore) -> Result<()> {
    let mut restore = Restore {
        meta,
        batch: Batch::default(),
        system: None,
        free: BTreeMap::new(),
        shared: BTreeSet::new(),
        ended: false,
    };
    for (number, line) in (1u64..).zip(text.lines()) {
        let line = line.map_err(|error| Error::io("read", "the dump", error))?;
        let bad = |why: &str| Error::corrupt("dump", format!("line {number}: {why}"));
        let line: Line = serde_json::from_str(&line).map_err(|error| bad(&error.to_string()))?;
        if restore.ended {
            return Err(bad("text after the end"));
        }
        match (number, &line) {
            (1, Line::Stillpoint { .. }) | (2, Line::Pool { .. }) | (3.., _) => {}
            _ => return Err(bad("not the beginning of a dump")),
        }
        restore
            .line(line, number)?
            .ok_or_else(|| bad("a value is out of range"))?;
    }
    if restore.ended {
        restore.finish()
    } else {
        Err(Error::corrupt("dump", "the end is missing"))
    }
}

struct Restore<'a> {
    meta: &'a mut dyn MetaStore,
    batch: Batch,
    system: Option<SystemRecord>,
    free: BTreeMap<u32, u16>,
    /// Chunks with extra references.
    shared: BTreeSet<u32>,
    ended: bool,
}

impl Restore<'_> {
    fn put(&mut self, key: Vec<u8>, value: Vec<u8>) -> Result<()> {
        self.batch.put(key, value);
        if self.batch.changes.len() >= BATCH {
            self.meta.apply(&std::mem::take(&mut self.batch))?;
        }
        Ok(())
    }

    /// `None` = a value of the line cannot be.
    fn line(&mut self, line: Line, number: u64) -> Result<Option<()>> {
        match line {
            Line::Stillpoint {
                dump: DUMP,
                format: record::FORMAT,
            } => {}
            Line::Stillpoint { dump, format } => {
                let (found, supported) = if dump == DUMP {
                    (format, record::FORMAT)
                } else {
                    (dump, DUMP)
                };
                return Err(Error::Version { found, supported });
            }
            Line::Pool {
                id,
                grain_bytes,
                txg,
                epoch,
                next_branch,
                next_job,
                chunks,
            } => {
                let Some(pool_id) = unhex(&id).and_then(|id| id.try_into().ok()) else {
                    return Ok(None);
                };
                let epoch = Epoch(epoch);
                // All deltas of the old store are in the pages of the dump.
                let checkpoint = txg;
                let system = SystemRecord {
                    pool_id,
                    grain_bytes,
                    txg,
                    checkpoint,
                    epoch,
                    next_branch,
                    next_job,
                    chunks,
                };
                self.system = Some(system);
            }
            line @ (Line::Branch { .. } | Line::Snapshot { .. }) => return self.named(line),
            line @ Line::Bad { .. } => return self.bad(line),
            line @ Line::Job { .. } => return self.job(&line),
            Line::Value { name, value } => {
                let Some(value) = value.into_bytes() else {
                    return Ok(None);
                };
                self.put(key::value(&name), record::encode_value(&name, &value))?;
            }
            Line::Page {
                branch,
                page,
                epoch,
                entries,
            } => {
                let Some(content) = parse_entries(&entries) else {
                    return Ok(None);
                };
                let place = PageKey {
                    branch: BranchId(branch),
                    page,
                    epoch: Epoch(epoch),
                };
                self.put(key::page(place), record::encode_page(place, &content))?;
                self.put(key::changed(place), Vec::new())?;
            }
            Line::Used { chunk, grains } => {
                let Some(bits) = parse_ranges(&grains) else {
                    return Ok(None);
                };
                let used: u32 = bits.iter().map(|word| word.count_ones()).sum();
                let free =
                    u16::try_from(CHUNK_GRAINS).unwrap_or(u16::MAX) - u16::try_from(used).unwrap_or(u16::MAX);
                self.free.insert(chunk, free);
                self.put(key::bitmap(chunk), record::encode_bitmap(chunk, &bits))?;
            }
            Line::References { chunk, counts } => return self.references(chunk, &counts),
            Line::End { lines } => {
                self.ended = true;
                if lines + 1 != number {
                    return Ok(None);
                }
            }
        }
        Ok(Some(()))
    }

    fn job(&mut self, line: &Line) -> Result<Option<()>> {
        let Line::Job {
            id,
            kind,
            cursor,
            masked,
            gained,
        } = *line
        else {
            return Ok(None);
        };
        let job = JobRecord {
            kind,
            cursor,
            masked,
            gained,
        };
        self.put(key::job(id), job.encode(id))?;
        Ok(Some(()))
    }

    fn references(&mut self, chunk: u32, counts: &str) -> Result<Option<()>> {
        let Some(refs) = parse_references(counts) else {
            return Ok(None);
        };
        for (key, value) in refs.encode_all(chunk) {
            if let Some(value) = value {
                self.put(key, value)?;
            }
        }
        self.shared.insert(chunk);
        Ok(Some(()))
    }

    fn bad(&mut self, line: Line) -> Result<Option<()>> {
        let Line::Bad {
            grain,
            crc,
            found_ms,
            places,
        } = line
        else {
            return Ok(None);
        };
        let record = record::BadRecord {
            crc,
            found_ms,
            places,
        };
        self.put(key::bad(grain), record.encode(grain))?;
        Ok(Some(()))
    }

    fn named(&mut self, line: Line) -> Result<Option<()>> {
        match line {
            Line::Branch {
                id,
                volume,
                head,
                read_only,
                checksums,
                name,
                attributes,
                size_bytes,
                block_size,
                parent,
                epoch,
                mapped_grains,
                created_ms,
            } => {
                let Some(attributes) = attributes.into_bytes() else {
                    return Ok(None);
                };
                let at = |(branch, epoch)| SnapshotId {
                    branch: BranchId(branch),
                    epoch: Epoch(epoch),
                };
                let (id, parent) = (BranchId(id), parent.map(at));
                let (volume, current) = (VolumeId(volume), Epoch(epoch));
                let record = BranchRecord {
                    volume,
                    head,
                    read_only,
                    checksums,
                    name,
                    attributes,
                    size_bytes,
                    block_size,
                    parent,
                    current,
                    mapped_grains,
                    created_ms,
                };
                self.put(key::branch(id), record.encode(id))?;
            }
            Line::Snapshot {
                branch,
                epoch,
                name,
                state,
                consistency,
                hold,
                sealed,
                lock_until_ms,
                created_ms,
                size_bytes,
                block_size,
                mapped_grains,
                meta,
            } => {
                let Some(meta) = meta.into_bytes() else {
                    return Ok(None);
                };
                let id = SnapshotId {
                    branch: BranchId(branch),
                    epoch: Epoch(epoch),
                };
                let record = SnapshotRecord {
                    name,
                    created_ms,
                    size_bytes,
                    block_size,
                    mapped_grains,
                    consistency,
                    state,
                    hold,
                    sealed,
                    lock_until_ms,
                    meta,
                };
                self.put(key::snapshot(id.branch, id.epoch), record.encode(id))?;
            }
            _ => return Ok(None),
        }
        Ok(Some(()))
    }

    /// Free counts, and last of all the pool record: without it nothing opens.
    fn finish(mut self) -> Result<()> {
        let system = self
            .system
            .take()
            .ok_or_else(|| Error::corrupt("dump", "the pool is missing"))?;
        let all_free = u16::try_from(CHUNK_GRAINS).unwrap_or(u16::MAX);
        let count = |chunk| ChunkCount {
            free: self.free.get(&chunk).copied().unwrap_or(all_free),
            shared: self.shared.contains(&chunk),
        };
        let counts: Vec<ChunkCount> = (0..system.chunks).map(count).collect();
        for (block, counts) in (0u32..).zip(counts.chunks(record::COUNTS_PER_BLOCK)) {
            self.put(key::counts(block), record::encode_counts(block, counts))?;
        }
        self.put(key::system(), system.encode())?;
        self.meta.apply(&std::mem::take(&mut self.batch))
    }
}
