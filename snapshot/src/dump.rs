//! The metadata as text, and back: one JSON object per line, for people to read and for a new start from a store
//! whose database is damaged or has grown. User data stays in the data file and is not part of it.
//!
//! The text is the state of the last commit: the delta log is applied to its pages, and what follows from the rest
//! (free counts, lists of changed pages) is left out and made anew by [`restore`].

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::meta::{Batch, MetaStore};
use crate::offline::{self, Overlay, Pages, Parents, each};
use crate::page::{Entry, PAGE_ENTRIES, Page};
use crate::record::{
    self, Bits, BranchRecord, CHUNK_GRAINS, JobRecord, Key, PageKey, SnapshotRecord, SystemRecord, key, table,
};
use crate::types::{BranchId, Consistency, Epoch, SnapshotId, SnapshotState, VolumeId};
use crate::{Error, Result};

/// Version of the text.
const DUMP: u32 = 1;
/// Changes per batch of a restore.
const BATCH: usize = 1024;

/// The owner's bytes: text where they are text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Bytes {
    Text(String),
    Hex(String),
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes).map_or_else(|error| Self::Hex(hex(error.as_bytes())), Self::Text)
    }
}

impl Bytes {
    fn into_bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Text(text) => Some(text.into_bytes()),
            Self::Hex(text) => unhex(&text),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(
        digits
            .chunks_exact(2)
            .filter_map(|pair| Some(pair.first()? << 4 | pair.last()?))
            .collect(),
    )
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    Stillpoint {
        dump: u32,
        format: u32,
    },
    Pool {
        id: String,
        grain_bytes: u32,
        txg: u64,
        epoch: u32,
        next_branch: u32,
        next_job: u64,
        chunks: u32,
    },
    Branch {
        id: u32,
        volume: u32,
        head: bool,
        read_only: bool,
        name: String,
        attributes: Bytes,
        size_bytes: u64,
        block_size: u32,
        parent: Option<(u32, u32)>,
        epoch: u32,
        mapped_grains: u64,
        created_ms: i64,
    },
    Snapshot {
        branch: u32,
        epoch: u32,
        name: String,
        state: SnapshotState,
        consistency: Consistency,
        hold: bool,
        lock_until_ms: i64,
        created_ms: i64,
        size_bytes: u64,
        block_size: u32,
        mapped_grains: u64,
        meta: Bytes,
    },
    Job {
        id: u64,
        kind: record::JobKind,
        cursor: u32,
    },
    Value {
        name: String,
        value: Bytes,
    },
    /// Entries as runs: `count*grain@birth`, `count*zero@birth`, `count*-` (hole).
    Page {
        branch: u32,
        page: u32,
        epoch: u32,
        entries: String,
    },
    /// Grains in use as ranges `first+count`.
    Used {
        chunk: u32,
        grains: String,
    },
    /// A dump without its end is not restored.
    End {
        lines: u64,
    },
}

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
    for table in [table::BRANCH, table::SNAPSHOT, table::JOB, table::VALUE] {
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
    let lines = out.lines;
    out.put(&Line::End { lines })?;
    out.out
        .flush()
        .map_err(|error| Error::io("write", "the dump", error))
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
    let pages = Pages {
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

fn pool_line(system: &SystemRecord) -> Line {
    Line::Pool {
        id: hex(&system.pool_id),
        grain_bytes: system.grain_bytes,
        txg: system.txg,
        epoch: system.epoch.0,
        next_branch: system.next_branch,
        next_job: system.next_job,
        chunks: system.chunks,
    }
}

fn record_line(key: &Key, value: &[u8]) -> Result<Line> {
    Ok(match key {
        Key::Branch(id) => branch_line(*id, BranchRecord::decode(*id, value)?),
        Key::Snapshot(id) => snapshot_line(*id, SnapshotRecord::decode(*id, value)?),
        Key::Job(id) => {
            let job = JobRecord::decode(*id, value)?;
            Line::Job {
                id: *id,
                kind: job.kind,
                cursor: job.cursor,
            }
        }
        Key::Value(name) => Line::Value {
            name: name.clone(),
            value: record::decode_value(name, value)?.into(),
        },
        other => {
            return Err(Error::corrupt(
                "metadata key",
                format!("{other:?} in the wrong table"),
            ));
        }
    })
}

fn branch_line(id: BranchId, branch: BranchRecord) -> Line {
    Line::Branch {
        id: id.0,
        volume: branch.volume.0,
        head: branch.head,
        read_only: branch.read_only,
        name: branch.name,
        attributes: branch.attributes.into(),
        size_bytes: branch.size_bytes,
        block_size: branch.block_size,
        parent: branch.parent.map(|parent| (parent.branch.0, parent.epoch.0)),
        epoch: branch.current.0,
        mapped_grains: branch.mapped_grains,
        created_ms: branch.created_ms,
    }
}

fn snapshot_line(id: SnapshotId, snapshot: SnapshotRecord) -> Line {
    Line::Snapshot {
        branch: id.branch.0,
        epoch: id.epoch.0,
        name: snapshot.name,
        state: snapshot.state,
        consistency: snapshot.consistency,
        hold: snapshot.hold,
        lock_until_ms: snapshot.lock_until_ms,
        created_ms: snapshot.created_ms,
        size_bytes: snapshot.size_bytes,
        block_size: snapshot.block_size,
        mapped_grains: snapshot.mapped_grains,
        meta: snapshot.meta.into(),
    }
}

fn entries_text(page: &Page) -> String {
    let mut runs: Vec<(u64, Entry)> = Vec::new();
    for entry in page.iter() {
        match runs.last_mut() {
            Some((count, first)) if follows(*first, *count, entry) => *count += 1,
            _ => runs.push((1, entry)),
        }
    }
    let text: Vec<String> = runs
        .iter()
        .map(|(count, first)| format!("{count}*{first:?}"))
        .collect();
    text.join(" ")
}

fn follows(first: Entry, count: u64, entry: Entry) -> bool {
    match first.grain() {
        Some(grain) => entry.grain() == Some(grain + count) && entry.birth() == first.birth(),
        None => entry == first,
    }
}

fn parse_entries(text: &str) -> Option<Page> {
    let mut page = Page::default();
    let mut index = 0u8;
    for run in text.split(' ') {
        let (count, entry) = run.split_once('*')?;
        for n in 0..count.parse::<u64>().ok()? {
            if usize::from(index) >= PAGE_ENTRIES {
                return None;
            }
            page.set(index, parse_entry(entry, n)?);
            index += 1;
        }
    }
    (usize::from(index) == PAGE_ENTRIES).then_some(page)
}

fn parse_entry(text: &str, n: u64) -> Option<Entry> {
    if text == "-" {
        return Some(Entry::HOLE);
    }
    let (place, birth) = text.split_once('@')?;
    let birth = birth
        .parse()
        .ok()
        .map(Epoch)
        .filter(|birth| *birth <= Epoch::MAX)?;
    if place == "zero" {
        return Some(Entry::zero(birth));
    }
    let grain = place
        .parse::<u64>()
        .ok()?
        .checked_add(n)
        .filter(|grain| *grain < crate::page::MAX_GRAINS)?;
    Some(Entry::mapped(grain, birth))
}

fn ranges_text(bits: &Bits) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for grain in 0..CHUNK_GRAINS {
        if bits
            .get(grain / 64)
            .is_some_and(|word| word & (1 << (grain % 64)) != 0)
        {
            match ranges.last_mut() {
                Some((first, count)) if *first + *count == grain => *count += 1,
                _ => ranges.push((grain, 1)),
            }
        }
    }
    let text: Vec<String> = ranges
        .iter()
        .map(|(first, count)| format!("{first}+{count}"))
        .collect();
    text.join(" ")
}

fn parse_ranges(text: &str) -> Option<Bits> {
    let mut bits = [0u64; CHUNK_GRAINS / 64];
    for range in text.split(' ').filter(|range| !range.is_empty()) {
        let (first, count) = range.split_once('+')?;
        let (first, count): (usize, usize) = (first.parse().ok()?, count.parse().ok()?);
        for grain in first..first.checked_add(count).filter(|end| *end <= CHUNK_GRAINS)? {
            *bits.get_mut(grain / 64)? |= 1 << (grain % 64);
        }
    }
    Some(bits)
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
            Line::Job { id, kind, cursor } => {
                self.put(key::job(id), JobRecord { kind, cursor }.encode(id))?
            }
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
            Line::End { lines } => {
                self.ended = true;
                if lines + 1 != number {
                    return Ok(None);
                }
            }
        }
        Ok(Some(()))
    }

    fn named(&mut self, line: Line) -> Result<Option<()>> {
        match line {
            Line::Branch {
                id,
                volume,
                head,
                read_only,
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
        let counts: Vec<u16> = (0..system.chunks)
            .map(|chunk| self.free.get(&chunk).copied().unwrap_or(all_free))
            .collect();
        for (block, counts) in (0u32..).zip(counts.chunks(record::COUNTS_PER_BLOCK)) {
            self.put(key::counts(block), record::encode_counts(block, counts))?;
        }
        self.put(key::system(), system.encode())?;
        self.meta.apply(&std::mem::take(&mut self.batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_ranges_read_back() {
        let mut page = Page::default();
        for index in 3..40 {
            page.set(index, Entry::mapped(1000 + u64::from(index), Epoch(7)));
        }
        page.set(20, Entry::zero(Epoch(9)));
        page.set(21, Entry::mapped(5, Epoch(8)));
        let text = entries_text(&page);
        assert_eq!(text, "3*- 17*1003@7 1*zero@9 1*5@8 18*1022@7 24*-");
        assert_eq!(parse_entries(&text), Some(page));
        for bad in [
            "",
            "63*-",
            "65*-",
            "64*x",
            "1*5",
            "64*5@999999999999",
            "99999999999*-",
        ] {
            assert_eq!(parse_entries(bad), None, "{bad}");
        }
        let mut bits = [0; CHUNK_GRAINS / 64];
        bits[0] = 0b1101;
        bits[63] = 1 << 63;
        assert_eq!(ranges_text(&bits), "0+1 2+2 4095+1");
        assert_eq!(parse_ranges("0+1 2+2 4095+1"), Some(bits));
        assert!(parse_ranges("4095+2").is_none() && parse_ranges("1+18446744073709551615").is_none());
        assert_eq!(parse_ranges(""), Some([0; CHUNK_GRAINS / 64]));
    }

    #[test]
    fn the_owners_bytes_read_back() {
        for bytes in [&b"{\"naa\":1}"[..], &[0xff, 0x00, 0x80], b""] {
            assert_eq!(Bytes::from(bytes.to_vec()).into_bytes().unwrap(), bytes);
        }
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
    }
}
