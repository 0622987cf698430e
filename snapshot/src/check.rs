//! Offline check: every record decodes and belongs to its key, every grain has exactly the placements that the map
//! gives it (invariants I1, I2, I6 of the format), volumes and snapshots hang together, and the metadata is not older
//! than the data file (I7). Changes nothing; sled recovers by writing, so its files are copied first.

mod data;
mod records;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use self::data::Data;
pub(crate) use self::records::Records;
pub(crate) use self::walk::{Placements, Tally, Walk};
use crate::disk::Disk;
use crate::loan::Loans;
use crate::meta::{MAX_VALUE_BYTES, MetaStore};
use crate::offline::{self, Overlay, Pages, each};
use crate::page::MAX_GRAINS;
use crate::record::{
    self, Bits, BranchRecord, CHUNK_GRAINS, ChunkCount, JobKind, JobRecord, Key, PageKey, SnapshotRecord,
    SystemRecord, table,
};
use crate::refs::Refs;
use crate::superblock::{RESERVED_BYTES, Superblock};
use crate::tomb::Tombs;
use crate::types::{BranchId, Epoch, SnapshotId, SnapshotState, limits};
use crate::{Error, Result};

/// Problems listed at most; the rest is counted.
const MOST_PROBLEMS: usize = 1000;
/// Free grains of an empty chunk.
#[expect(clippy::cast_possible_truncation, reason = "4,096")]
const ALL_FREE: u16 = CHUNK_GRAINS as u16;

/// What kind of promise is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// A record does not decode, or lies under another key than its own.
    Damaged,
    /// Records contradict each other.
    Inconsistent,
    /// The map uses a grain that counts as free (I1): it would be given away a second time.
    NotAllocated,
    /// A grain counts as used and nothing uses it (I1): lost space, no lost data.
    Leaked,
    /// A grain has more placements than references (I2).
    SharedGrain,
    /// Data is not what its recorded checksum says, or cannot be read.
    BadData,
    /// A page version that no snapshot and no head can see (I6).
    UselessVersion,
    /// The metadata is older than the data file (I7).
    LostCommits,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Kind.
    pub kind: ProblemKind,
    /// Where and what, for people.
    pub text: String,
}

/// What an offline check has seen.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CheckReport {
    /// Newest transaction group of the metadata.
    pub txg: u64,
    /// Newest transaction group that a superblock of the data file names; `None` = no valid superblock.
    pub superblock_txg: Option<u64>,
    /// Branches (volumes, and older lines of their history).
    pub branches: u64,
    /// Snapshots, hidden and dying ones included.
    pub snapshots: u64,
    /// Page versions.
    pub page_versions: u64,
    /// Delta records that are not yet in their pages.
    pub deltas: u64,
    /// Grains that the map uses.
    pub grains_used: u64,
    /// Placements of grains beyond their first.
    pub references: u64,
    /// Grains that are known to be bad.
    pub bad_grains: u64,
    /// Grains that were compared with their recorded checksums; `None` = the data was not asked for.
    pub grains_verified: Option<u64>,
    /// Unfinished background jobs.
    pub jobs: u64,
    /// Operations that a killed process had acknowledged and not committed; the next start on this boot takes them up.
    pub warm_operations: u64,
    /// The first problems found.
    pub problems: Vec<Problem>,
    /// All problems found.
    pub problem_count: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    fn add(&mut self, kind: ProblemKind, text: impl Into<String>) {
        self.problem_count += 1;
        if self.problems.len() < MOST_PROBLEMS {
            self.problems.push(Problem {
                kind,
                text: text.into(),
            });
        }
    }

    fn damaged(&mut self, error: &Error) {
        self.add(ProblemKind::Damaged, error.to_string());
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "transaction group {}: {} volumes and branches, {} snapshots, {} page versions, {} grains in use",
            self.txg, self.branches, self.snapshots, self.page_versions, self.grains_used
        )?;
        if self.warm_operations > 0 {
            writeln!(
                f,
                "the daemon was killed: {} operations to recover at the next start",
                self.warm_operations
            )?;
        }
        if let Some(verified) = self.grains_verified {
            writeln!(f, "{verified} grains compared with their checksums")?;
        }
        if self.bad_grains > 0 {
            writeln!(f, "{} grains are known to be bad", self.bad_grains)?;
        }
        for problem in &self.problems {
            writeln!(f, "{:?}: {}", problem.kind, problem.text)?;
        }
        let more = self.problem_count - self.problems.len() as u64;
        if more > 0 {
            writeln!(f, "and {more} more")?;
        }
        match self.problem_count {
            0 => write!(f, "no problem found"),
            n => write!(f, "{n} problems found"),
        }
    }
}

/// Checks a pool that no process has open. Only the copy of the metadata is written, in the directory for temporary
/// files.
///
/// # Errors
/// When the check itself could not run: `NotFound`, `Io`, `Refused` for a pool in use, or a metadata store that does
/// not open at all. What is wrong *in* the pool is in the report.
pub fn check(dir: &Path) -> Result<CheckReport> {
    check_dir(dir, false)
}

/// As [`check`], and reads all data that has a recorded checksum.
///
/// # Errors
/// As [`check`].
pub fn check_data(dir: &Path) -> Result<CheckReport> {
    check_dir(dir, true)
}

fn check_dir(dir: &Path, data: bool) -> Result<CheckReport> {
    let copy = offline::Copy::of(dir)?;
    let (disk, mut meta) = copy.open()?;
    let mut report = check_parts(&disk, &mut *meta, data)?;
    report.warm_operations = crate::warm::pending(dir, &disk, report.txg);
    Ok(report)
}

/// Checks the media of a pool that is not running, its data included.
///
/// # Errors
/// Errors of the media themselves; what is wrong in the pool is in the report.
pub fn check_media(disk: &dyn Disk, meta: &mut dyn MetaStore) -> Result<CheckReport> {
    check_parts(disk, meta, true)
}

pub(crate) fn check_parts(disk: &dyn Disk, meta: &mut dyn MetaStore, data: bool) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let system = match offline::system(meta) {
        Ok(system) => system,
        Err(error @ (Error::Corrupt { .. } | Error::Version { .. })) => {
            report.damaged(&error);
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    report.txg = system.txg;
    let mut checker = Checker {
        meta,
        system,
        report,
        records: Records::default(),
        used: BTreeMap::new(),
        referenced: BTreeSet::new(),
    };
    checker.superblocks(disk)?;
    checker.read_records()?;
    checker.structure();
    checker.map(disk, data)?;
    checker.allocation()?;
    Ok(checker.report)
}

struct Checker<'a> {
    meta: &'a mut dyn MetaStore,
    system: SystemRecord,
    report: CheckReport,
    records: Records,
    /// Grains that the map uses, by chunk.
    used: BTreeMap<u32, Box<Bits>>,
    /// Chunks that have extra references.
    referenced: BTreeSet<u32>,
}

impl Checker<'_> {
    fn superblocks(&mut self, disk: &dyn Disk) -> Result<()> {
        // One bad slot is what a power cut during its write leaves.
        let slots = Superblock::read(disk)?;
        let Some(found) = slots.iter().flatten().max_by_key(|found| found.txg) else {
            slots
                .iter()
                .filter_map(|slot| slot.as_ref().err())
                .for_each(|error| self.report.damaged(error));
            return Ok(());
        };
        self.report.superblock_txg = Some(found.txg);
        if found.pool_id != self.system.pool_id || found.grain_bytes != self.system.grain_bytes {
            self.report.add(
                ProblemKind::Inconsistent,
                "data file and metadata belong to different pools",
            );
        }
        if found.txg > self.system.txg {
            let text = format!(
                "metadata is at {}, the data file has seen {}",
                self.system.txg, found.txg
            );
            self.report.add(ProblemKind::LostCommits, text);
        }
        Ok(())
    }

    fn read_records(&mut self) -> Result<()> {
        let (report, records) = (&mut self.report, &mut self.records);
        for table in 0..=u8::MAX - 1 {
            if [table::PAGE, table::BITMAP, table::JOURNAL].contains(&table) {
                continue;
            }
            each(self.meta, table, |_, (key, value)| {
                if value.len() > MAX_VALUE_BYTES {
                    let text = format!(
                        "key {}: a value of {} bytes",
                        crate::codec::hex(&key),
                        value.len()
                    );
                    report.add(ProblemKind::Damaged, text);
                }
                if let Err(error) = records.take(&key, &value) {
                    report.damaged(&error);
                }
                Ok(())
            })?;
        }
        report.branches = records.branches.len() as u64;
        report.snapshots = records.snapshots.len() as u64;
        report.jobs = records.jobs.len() as u64;
        report.bad_grains = records.bad.len() as u64;
        Ok(())
    }

    fn wrong(&mut self, text: String) {
        self.report.add(ProblemKind::Inconsistent, text);
    }

    fn structure(&mut self) {
        let records = std::mem::take(&mut self.records);
        let mut names: BTreeSet<&str> = BTreeSet::new();
        let mut heads = BTreeSet::new();
        for (&id, branch) in &records.branches {
            self.branch(&records, id, branch);
            if branch.head && !names.insert(&branch.name) {
                self.wrong(format!("two volumes are named {:?}", branch.name));
            }
            if branch.head && !heads.insert(branch.volume) {
                self.wrong(format!("volume {} has two heads", branch.volume));
            }
        }
        let mut snapshots: BTreeSet<_> = BTreeSet::new();
        for (&id, snapshot) in &records.snapshots {
            self.snapshot(&records, id, snapshot);
            let volume = records.branches.get(&id.branch).map(|branch| branch.volume);
            if snapshot.state == SnapshotState::Live && !snapshots.insert((volume, &snapshot.name)) {
                self.wrong(format!(
                    "volume {volume:?} has two snapshots named {:?}",
                    snapshot.name
                ));
            }
        }
        for (id, job) in &records.jobs {
            self.job(&records, *id, job);
        }
        self.records = records;
    }

    fn branch(&mut self, records: &Records, id: BranchId, branch: &BranchRecord) {
        if id.0 >= self.system.next_branch {
            self.wrong(format!("branch {} is above the next free number", id.0));
        }
        if branch.current > self.system.epoch {
            self.wrong(format!(
                "branch {} writes with epoch {} of the future",
                id.0, branch.current.0
            ));
        }
        if let Some((newest, _)) = records.snapshots_of(id).next_back()
            && newest.epoch >= branch.current
        {
            self.wrong(format!(
                "branch {} writes with epoch {}, below snapshot {newest}",
                id.0, branch.current.0
            ));
        }
        if let Some(parent) = branch.parent {
            if !records.snapshots.contains_key(&parent) {
                self.wrong(format!(
                    "branch {} stands on snapshot {parent}, which is gone",
                    id.0
                ));
            }
            if parent.branch >= id || parent.epoch >= branch.current {
                self.wrong(format!("branch {} stands on younger snapshot {parent}", id.0));
            }
        }
        let is_freed = records.has_job(|kind| kind.branches().contains(&id));
        if !branch.head && !is_freed && records.snapshots_of(id).next().is_none() {
            self.wrong(format!(
                "branch {} has neither head nor snapshot and no job frees it",
                id.0
            ));
        }
        if branch.size_bytes == 0 || branch.size_bytes > limits::VOLUME_BYTES {
            self.wrong(format!(
                "branch {} has a size of {} bytes",
                id.0, branch.size_bytes
            ));
        }
    }

    fn snapshot(&mut self, records: &Records, id: SnapshotId, snapshot: &SnapshotRecord) {
        if !records.branches.contains_key(&id.branch) {
            self.wrong(format!("snapshot {id} has no branch"));
        }
        if id.epoch >= self.system.epoch {
            self.wrong(format!("snapshot {id} closes an epoch of the future"));
        }
        let dropping = records.has_job(|kind| kind == JobKind::DropSnapshot(id));
        let children = records.children(id);
        let collapsing = records.has_job(|kind| matches!(kind, JobKind::Collapse { from, .. } if from == id));
        match snapshot.state {
            SnapshotState::Live if dropping || collapsing => {
                self.wrong(format!("live snapshot {id} is being freed"))
            }
            SnapshotState::Dying if !dropping => self.wrong(format!("dying snapshot {id} has no job")),
            SnapshotState::Dying if children > 0 => {
                self.wrong(format!("dying snapshot {id} has {children} children"))
            }
            _ => {}
        }
    }

    fn job(&mut self, records: &Records, id: u64, job: &JobRecord) {
        // A job whose object has gone meanwhile ends at its next step; one on something in use would destroy it.
        let in_use = match job.kind {
            JobKind::DropSnapshot(snapshot) => records
                .snapshots
                .get(&snapshot)
                .is_some_and(|found| found.state != SnapshotState::Dying),
            JobKind::DropHead(branch) => records.branches.get(&branch).is_some_and(|found| found.head),
            // A tombstone takes nothing that anybody sees.
            JobKind::Zero { .. } => false,
            JobKind::Lend { to, from, .. } => {
                self.loan(records, id, to, from);
                false
            }
            JobKind::Collapse { from, .. } => records
                .snapshots
                .get(&from)
                .is_some_and(|found| found.state == SnapshotState::Live),
        };
        if in_use {
            self.wrong(format!("job {id} works on something in use: {:?}", job.kind));
        }
        if id >= self.system.next_job {
            self.wrong(format!("job {id} is above the next free number"));
        }
    }

    /// Both snapshots of a loan stay as long as it runs.
    fn loan(&mut self, records: &Records, id: u64, to: SnapshotId, from: SnapshotId) {
        for snapshot in [to, from] {
            match records.snapshots.get(&snapshot) {
                None => self.wrong(format!("job {id} needs snapshot {snapshot}, which is gone")),
                Some(found) if found.state == SnapshotState::Dying => self.wrong(format!(
                    "job {id} needs snapshot {snapshot}, which is being freed"
                )),
                Some(_) => {}
            }
        }
    }

    fn map(&mut self, disk: &dyn Disk, verify: bool) -> Result<()> {
        let data_bytes = disk.size();
        let data_bytes = data_bytes.map_err(|error| Error::io("stat", "data file", error))?;
        let mut data = verify.then(|| Data::new(disk, self.system.grain_bytes));
        let mut damage = Vec::new();
        let overlay = Overlay::read(self.meta, &self.system, |error| damage.push(error))?;
        self.report.deltas = overlay.len();
        let parents = self.records.parents();
        let (tombs, loans) = (Tombs::of(&self.records.jobs), Loans::of(&self.records.jobs));
        let pages = Pages {
            tombs: &tombs,
            loans: &loans,
            overlay: &overlay,
            parents: &parents,
        };
        let mut walk = Walk {
            records: &self.records,
            report: &mut self.report,
            used: &mut self.used,
            tally: Tally::default(),
            changed: BTreeSet::new(),
            recorded: Vec::new(),
            extra: Placements::new(),
            limit: data_bytes
                .div_ceil(self.system.grain_bytes.max(1).into())
                .min(MAX_GRAINS),
            grain_bytes: self.system.grain_bytes.into(),
            abandoned: self.records.abandoned(),
        };
        let mut bad_pages = BTreeSet::new();
        pages.each(
            self.meta,
            &mut |error| {
                bad_pages.insert(error.to_string());
            },
            |versions| {
                walk.page(&versions);
                match &mut data {
                    Some(data) => data.compare(&mut walk),
                    None => walk.recorded.clear(),
                }
                Ok(())
            },
        )?;
        if let Some(mut data) = data {
            data.retry(&self.records, walk.report);
            walk.report.grains_verified = Some(data.verified);
        }
        // The superblocks take the place of the first grains.
        for grain in 0..RESERVED_BYTES.div_ceil(walk.grain_bytes.max(1)) {
            if self.system.chunks > 0 && !walk.mark(grain) {
                walk.report.add(
                    ProblemKind::SharedGrain,
                    format!("grain {grain} holds a superblock and data"),
                );
            }
        }
        let (tally, changed, extra) = (walk.tally, walk.changed, walk.extra);
        damage.iter().for_each(|error| self.report.damaged(error));
        bad_pages
            .into_iter()
            .for_each(|text| self.report.add(ProblemKind::Damaged, text));
        self.counts(&tally);
        self.changed(changed)?;
        self.references(extra)
    }

    /// "mapped" counts of records against the map.
    fn counts(&mut self, tally: &Tally) {
        let mut seen: BTreeMap<SnapshotId, i64> = BTreeMap::new();
        let ahead = |branch, epoch| self.records.ahead(branch, epoch);
        let mut wrong = Vec::new();
        // Parents have smaller numbers, so what a branch inherits is known when its turn comes.
        for (&id, branch) in &self.records.branches {
            let below = branch
                .parent
                .and_then(|parent| seen.get(&parent).copied())
                .unwrap_or(0);
            for (&snapshot, record) in self.records.snapshots_of(id) {
                let mapped = below + tally.snapshots.get(&snapshot).copied().unwrap_or(0);
                seen.insert(snapshot, mapped);
                let mapped = mapped + ahead(id, snapshot.epoch);
                if record.state == SnapshotState::Live && record.mapped_grains.cast_signed() != mapped {
                    wrong.push(format!(
                        "snapshot {snapshot} maps {mapped} grains, says {}",
                        record.mapped_grains
                    ));
                }
            }
            let mapped = below + tally.heads.get(&id).copied().unwrap_or(0);
            let mapped = mapped + ahead(id, Epoch(u32::MAX));
            if branch.head && branch.mapped_grains.cast_signed() != mapped {
                wrong.push(format!(
                    "branch {} maps {mapped} grains, says {}",
                    id.0, branch.mapped_grains
                ));
            }
        }
        wrong.into_iter().for_each(|text| self.wrong(text));
    }

    /// `E` keys against page versions.
    fn changed(&mut self, mut expected: BTreeSet<PageKey>) -> Result<()> {
        let report = &mut self.report;
        each(self.meta, table::CHANGED, |_, (key, _)| {
            if let Ok(Key::Changed(key)) = Key::parse(&key)
                && !expected.remove(&key)
            {
                report.add(
                    ProblemKind::Inconsistent,
                    format!("{key:?} is listed as changed but has no version"),
                );
            }
            Ok(())
        })?;
        for key in expected {
            report.add(
                ProblemKind::Inconsistent,
                format!("{key:?} is a version that is not listed as changed"),
            );
        }
        Ok(())
    }

    /// `R` against how often the map places each grain (I2).
    fn references(&mut self, placed: Placements) -> Result<()> {
        let mut stated: BTreeMap<u32, Refs> = BTreeMap::new();
        let report = &mut self.report;
        each(self.meta, table::REFERENCES, |_, (key, value)| {
            let key = Key::parse(&key)?;
            let (Key::References(chunk, _) | Key::Spilled(chunk, _)) = key else {
                return Ok(());
            };
            // What does not decode was reported with the records; what decodes and does not fit is told here.
            if let Err(error) = stated.entry(chunk).or_default().decode(&key, &value) {
                report.damaged(&error);
            }
            Ok(())
        })?;
        self.referenced = stated
            .iter()
            .filter(|(_, refs)| !refs.is_empty())
            .map(|(c, _)| *c)
            .collect();
        let chunks: BTreeSet<u32> = stated.keys().chain(placed.keys()).copied().collect();
        for chunk in chunks {
            let says = |index| stated.get(&chunk).map_or(0, |refs| refs.get(index));
            let counts = placed.get(&chunk);
            for index in 0..CHUNK_GRAINS {
                let actual = counts.and_then(|c| c.get(index)).copied().unwrap_or(0);
                self.report.references += actual;
                if actual == says(index) {
                    continue;
                }
                let grain = u64::from(chunk) * CHUNK_GRAINS as u64 + index as u64;
                let kind = if actual > says(index) {
                    ProblemKind::SharedGrain
                } else {
                    ProblemKind::Leaked
                };
                let text = format!(
                    "grain {grain} is placed {} times and has {} extra references",
                    actual + 1,
                    says(index)
                );
                self.report.add(kind, text);
            }
        }
        Ok(())
    }

    /// Bitmaps and free counts against what the map uses.
    fn allocation(&mut self) -> Result<()> {
        let (report, used) = (&mut self.report, &mut self.used);
        report.grains_used = used.values().map(|bits| count(bits)).sum();
        let mut free: BTreeMap<u32, u16> = BTreeMap::new();
        each(self.meta, table::BITMAP, |_, (key, value)| {
            let decoded = Key::parse(&key).and_then(|key| match key {
                Key::Bitmap(chunk) => Ok((chunk, record::decode_bitmap(chunk, &value)?)),
                other => Err(Error::corrupt("allocation bitmap", format!("{other:?}"))),
            });
            match decoded {
                Ok((chunk, bits)) => {
                    let in_use = used
                        .remove(&chunk)
                        .unwrap_or_else(|| Box::new([0; CHUNK_GRAINS / 64]));
                    compare(report, chunk, &bits, &in_use);
                    let taken = usize::try_from(count(&bits)).unwrap_or(CHUNK_GRAINS);
                    free.insert(chunk, u16::try_from(CHUNK_GRAINS - taken).unwrap_or(u16::MAX));
                }
                Err(error) => report.damaged(&error),
            }
            Ok(())
        })?;
        let reserved = RESERVED_BYTES.div_ceil(u64::from(self.system.grain_bytes.max(1)));
        for (chunk, bits) in std::mem::take(used) {
            // A chunk without a bitmap is free but for the superblocks.
            let mut blank = [0; CHUNK_GRAINS / 64];
            if let (0, Some(word)) = (chunk, blank.first_mut()) {
                *word = (1 << reserved) - 1;
            }
            compare(report, chunk, &blank, &bits);
        }
        self.free_counts(&free)
    }

    fn free_counts(&mut self, free: &BTreeMap<u32, u16>) -> Result<()> {
        let mut stated: BTreeMap<u32, ChunkCount> = BTreeMap::new();
        let report = &mut self.report;
        each(self.meta, table::COUNTS, |_, (key, value)| {
            let Ok(Key::Counts(block)) = Key::parse(&key) else {
                return Ok(());
            };
            match record::decode_counts(block, &value) {
                Ok(counts) => {
                    let first =
                        block.saturating_mul(u32::try_from(record::COUNTS_PER_BLOCK).unwrap_or(u32::MAX));
                    stated.extend((first..).zip(counts));
                }
                Err(error) => report.damaged(&error),
            }
            Ok(())
        })?;
        stated.retain(|chunk, _| *chunk < self.system.chunks);
        for chunk in 0..self.system.chunks {
            let actual = free.get(&chunk).copied().unwrap_or(ALL_FREE);
            // A chunk without a bitmap may have no count yet.
            let shared = stated.get(&chunk).is_some_and(|count| count.shared);
            if shared != self.referenced.contains(&chunk) {
                self.wrong(format!(
                    "chunk {chunk}: counted as {} extra references",
                    if shared { "with" } else { "without" }
                ));
            }
            match stated.get(&chunk).map(|count| &count.free) {
                Some(&count) if count == actual || !free.contains_key(&chunk) => {}
                None if !free.contains_key(&chunk) => {}
                found => self.wrong(format!(
                    "chunk {chunk} has {actual} free grains, the count says {found:?}"
                )),
            }
        }
        Ok(())
    }
}

fn count(bits: &Bits) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

fn compare(report: &mut CheckReport, chunk: u32, allocated: &Bits, used: &Bits) {
    for (word, (allocated, used)) in (0u64..).zip(allocated.iter().zip(used)) {
        for bit in record::indices(allocated ^ used) {
            let grain = u64::from(chunk) * CHUNK_GRAINS as u64 + word * 64 + u64::from(bit);
            if used & (1 << bit) != 0 {
                report.add(
                    ProblemKind::NotAllocated,
                    format!("grain {grain} is in use but counts as free"),
                );
            } else {
                report.add(
                    ProblemKind::Leaked,
                    format!("grain {grain} is allocated and nothing uses it"),
                );
            }
        }
    }
}
