//! What a workload asked for and what was acknowledged, and the judge of what is left after a crash.
//!
//! A workload appends one line before each operation (`b`), one after its acknowledgement (`d`) or its refusal (`x`),
//! and one when the store passes a point of interest (`p`); a single `write` each, so the lines of many threads have
//! one order. Every sector that is written carries the number of its
//! operation, so the bytes found later say which operation they are from.
//!
//! Threads never write the same sectors at the same time (they do write different sectors of the same grain). So for
//! each sector the operations have one order, and after a crash it must hold the last operation that a flush covered
//! or any later one. A snapshot must hold, for every thread, exactly a prefix of its operations, and whenever it
//! holds an operation it holds all that were acknowledged before that one began.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) const SECTOR: usize = 512;
const MAGIC: u64 = 0x5354_494c_4c50_4e54;

/// What ended a run, and so what must be left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The process died, the kernel went on: everything that was acknowledged.
    Kill,
    /// The machine died: everything that a flush covers.
    Power,
}

/// Number of the operation that wrote a sector; 0 = zeroes.
pub(crate) type Stamp = u64;

/// The bytes that operation `stamp` writes to `sector` of the volume named `volume`.
pub(crate) fn stamped(sector: u64, stamp: Stamp) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if stamp == 0 {
        return bytes;
    }
    let mut word = MAGIC ^ sector.rotate_left(32) ^ stamp;
    let head = [MAGIC, sector, stamp];
    for (i, slot) in bytes.chunks_exact_mut(8).enumerate() {
        let value = head.get(i).copied().unwrap_or_else(|| {
            word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
            word
        });
        slot.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Bytes of a write of `count` sectors.
pub(crate) fn stamped_run(sector: u64, count: u64, stamp: Stamp) -> Vec<u8> {
    (sector..sector + count)
        .flat_map(|sector| stamped(sector, stamp))
        .collect()
}

/// Which operation the bytes of each sector are from; an error names the first sector that no single operation wrote.
pub(crate) fn stamps(bytes: &[u8]) -> Result<Vec<Stamp>, String> {
    let read = |(sector, bytes): (usize, &[u8])| {
        let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().unwrap());
        let stamp = if word(0) == MAGIC { word(2) } else { 0 };
        if stamped(sector as u64, stamp) == bytes {
            Ok(stamp)
        } else {
            Err(format!("sector {sector} is torn or foreign: {:x?}", &bytes[..32]))
        }
    };
    bytes.chunks_exact(SECTOR).enumerate().map(read).collect()
}

/// One operation as the facts name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// New empty volume of so many sectors.
    Create {
        volume: String,
        sectors: u64,
    },
    Write {
        volume: String,
        sector: u64,
        count: u64,
        fua: bool,
    },
    /// WRITE SAME of zeroes or UNMAP.
    Zero {
        volume: String,
        sector: u64,
        count: u64,
    },
    /// The same of so much that it leaves a tombstone.
    Bury {
        volume: String,
        sector: u64,
        count: u64,
    },
    Flush {
        volume: String,
    },
    /// A point in time that copies read from; no restart keeps it.
    Pin {
        volume: String,
        name: String,
    },
    Snapshot {
        name: String,
        volumes: Vec<String>,
    },
    Clone {
        volume: String,
        snapshot: String,
        to: String,
    },
    Revert {
        volume: String,
        snapshot: String,
    },
    DeleteSnapshot {
        volume: String,
        snapshot: String,
    },
    DeleteVolume {
        volume: String,
    },
    Grow {
        volume: String,
        sectors: u64,
    },
    /// Sectors of another volume (or of a snapshot of it) at the same place, by reference where grains are whole.
    Copy {
        volume: String,
        sector: u64,
        count: u64,
        source: String,
        snapshot: Option<String>,
    },
    /// Another mode of checksums: changes no content.
    Checksums {
        volume: String,
    },
    /// The metadata was rewritten while the pool worked.
    Compact,
    /// The metadata was made anew from its own dump, while nobody had the pool open.
    Restore,
    /// Seen after a restart: what each sector holds from now on.
    Observed {
        volume: String,
        stamps: Vec<Stamp>,
    },
}

impl What {
    fn text(&self) -> String {
        match self {
            Self::Create { volume, sectors } => format!("create {volume} {sectors}"),
            Self::Write {
                volume,
                sector,
                count,
                fua,
            } => format!("write {volume} {sector} {count} {fua}"),
            Self::Zero {
                volume,
                sector,
                count,
            } => format!("zero {volume} {sector} {count}"),
            Self::Bury {
                volume,
                sector,
                count,
            } => format!("bury {volume} {sector} {count}"),
            Self::Pin { volume, name } => format!("pin {volume} {name}"),
            Self::Flush { volume } => format!("flush {volume}"),
            Self::Snapshot { name, volumes } => format!("snapshot {name} {}", volumes.join(" ")),
            Self::Clone { volume, snapshot, to } => format!("clone {volume} {snapshot} {to}"),
            Self::Revert { volume, snapshot } => format!("revert {volume} {snapshot}"),
            Self::DeleteSnapshot { volume, snapshot } => format!("unsnap {volume} {snapshot}"),
            Self::DeleteVolume { volume } => format!("delete {volume}"),
            Self::Grow { volume, sectors } => format!("grow {volume} {sectors}"),
            Self::Copy {
                volume,
                sector,
                count,
                source,
                snapshot,
            } => {
                let snapshot = snapshot.as_deref().unwrap_or("-");
                format!("copy {volume} {sector} {count} {source} {snapshot}")
            }
            Self::Checksums { volume } => format!("checksums {volume}"),
            Self::Compact => "compact pool".to_owned(),
            Self::Restore => "restore pool".to_owned(),
            Self::Observed { volume, stamps } => {
                // Runs, because most sectors of a test volume are alike: stamp*count.
                let mut text = format!("observed {volume}");
                for run in stamps.chunk_by(|a, b| a == b) {
                    let _ = write!(text, " {}*{}", run[0], run.len());
                }
                text
            }
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        let verb = parts.next()?;
        let volume = parts.next()?.to_owned();
        let rest: Vec<&str> = parts.collect();
        let number = |i: usize| rest.get(i).and_then(|text| text.parse::<u64>().ok());
        let name = |i: usize| rest.get(i).map(|&text| text.to_owned());
        Some(match verb {
            "create" => Self::Create {
                volume,
                sectors: number(0)?,
            },
            "write" => Self::Write {
                volume,
                sector: number(0)?,
                count: number(1)?,
                fua: *rest.get(2)? == "true",
            },
            "zero" => Self::Zero {
                volume,
                sector: number(0)?,
                count: number(1)?,
            },
            "bury" => Self::Bury {
                volume,
                sector: number(0)?,
                count: number(1)?,
            },
            "pin" => Self::Pin {
                volume,
                name: name(0)?,
            },
            "compact" => Self::Compact,
            "flush" => Self::Flush { volume },
            "snapshot" => Self::Snapshot {
                name: volume,
                volumes: rest.iter().map(|&text| text.to_owned()).collect(),
            },
            "clone" => Self::Clone {
                volume,
                snapshot: name(0)?,
                to: name(1)?,
            },
            "revert" => Self::Revert {
                volume,
                snapshot: name(0)?,
            },
            "unsnap" => Self::DeleteSnapshot {
                volume,
                snapshot: name(0)?,
            },
            "delete" => Self::DeleteVolume { volume },
            "grow" => Self::Grow {
                volume,
                sectors: number(0)?,
            },
            "copy" => Self::Copy {
                volume,
                sector: number(0)?,
                count: number(1)?,
                source: name(2)?,
                snapshot: name(3).filter(|name| name != "-"),
            },
            "checksums" => Self::Checksums { volume },
            "restore" => Self::Restore,
            "observed" => {
                let run = |text: &&str| {
                    let (stamp, count) = text.split_once('*')?;
                    Some(std::iter::repeat_n(stamp.parse().ok()?, count.parse().ok()?))
                };
                let runs: Option<Vec<_>> = rest.iter().map(run).collect();
                Self::Observed {
                    volume,
                    stamps: runs?.into_iter().flatten().collect(),
                }
            }
            _ => return None,
        })
    }
}

/// The writing end, shared by the threads of a workload.
pub(crate) struct Facts {
    file: Mutex<File>,
    next: AtomicU64,
}

impl Facts {
    /// Appends to `path`; operations are numbered from after those already there.
    pub(crate) fn append(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let last = text
            .lines()
            .filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok())
            .max()
            .unwrap_or(0);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .expect("the facts");
        Self {
            file: Mutex::new(file),
            next: AtomicU64::new(last + 1),
        }
    }

    fn line(&self, text: &str) {
        // One write per line: a crash cannot leave half of an acknowledgement in front of another line.
        self.file
            .lock()
            .unwrap()
            .write_all(text.as_bytes())
            .expect("the facts");
    }

    /// To be called before the operation; returns its number, which is also the stamp of its sectors.
    pub(crate) fn begin(&self, thread: u64, what: &What) -> Stamp {
        let op = self.next.fetch_add(1, Ordering::SeqCst);
        self.line(&format!("b {op} {thread} {}\n", what.text()));
        op
    }

    /// To be called once the operation was acknowledged.
    pub(crate) fn done(&self, op: Stamp) {
        self.line(&format!("d {op}\n"));
    }

    /// To be called when the operation was answered with an error: any part of it may have happened.
    pub(crate) fn failed(&self, op: Stamp) {
        self.line(&format!("x {op}\n"));
    }

    /// The store has passed a point: what was in the background when the crash came.
    pub(crate) fn passed(&self, point: &str) {
        self.line(&format!("p {point}\n"));
    }
}

#[derive(Clone, Debug)]
struct Op {
    thread: u64,
    began: usize,
    done: Option<usize>,
    failed: bool,
    what: What,
}

/// What is found in a pool; implemented over the store by the tests.
pub(crate) trait Found {
    fn volumes(&self) -> Vec<String>;
    fn read_volume(&self, name: &str) -> Result<Vec<u8>, String>;
    /// Live snapshots as (volume, snapshot).
    fn snapshots(&self) -> Vec<(String, String)>;
    fn read_snapshot(&self, volume: &str, snapshot: &str) -> Result<Vec<u8>, String>;
}

/// One value of one sector in time.
#[derive(Clone, Copy, Debug)]
struct Version {
    op: Stamp,
    value: Stamp,
}

/// All values that the sectors of a volume ever had, oldest first, and all its sizes.
#[derive(Default)]
struct Versions {
    sectors: Vec<Vec<Version>>,
    /// (operation, sectors), oldest first.
    sizes: Vec<(Stamp, usize)>,
}

impl Versions {
    fn new(op: Stamp, stamps: impl IntoIterator<Item = Stamp>) -> Self {
        let mut versions = Self::default();
        versions.all(op, stamps);
        versions
    }

    fn push(&mut self, sector: usize, op: Stamp, value: Stamp) {
        if self.sectors.len() <= sector {
            self.sectors.resize(sector + 1, Vec::new());
        }
        self.sectors[sector].push(Version { op, value });
    }

    /// From `op` on the volume is exactly this; what was beyond its end is gone for good.
    fn all(&mut self, op: Stamp, stamps: impl IntoIterator<Item = Stamp>) {
        let mut size = 0;
        for (sector, value) in stamps.into_iter().enumerate() {
            size = sector + 1;
            let known = self.sectors.get(sector).and_then(|versions| versions.last());
            if known.is_none_or(|last| last.value != value) {
                self.push(sector, op, value);
            }
        }
        for versions in self.sectors.iter_mut().skip(size) {
            versions.push(Version { op, value: 0 });
        }
        self.sizes.push((op, size));
    }

    fn grow(&mut self, op: Stamp, sectors: usize) {
        (self.sectors.len()..sectors).for_each(|sector| self.push(sector, op, 0));
        self.sizes.push((op, sectors));
    }

    /// What the volume holds when its thread is between two operations.
    fn now(&self) -> impl Iterator<Item = Stamp> {
        let size = self.sizes.last().map_or(0, |(_, size)| *size);
        let last = |versions: &Vec<Version>| versions.last().map_or(0, |last| last.value);
        self.sectors.iter().take(size).map(last)
    }
}

/// All that happened, as far as the facts say.
pub(crate) struct History {
    ops: BTreeMap<Stamp, Op>,
    /// Points that the store of the last process passed, oldest first.
    points: Vec<String>,
    /// Line at which the last process began.
    session: usize,
    crash: Crash,
}

impl History {
    /// Reads facts; a last line without an end is dropped.
    pub(crate) fn read(text: &str, crash: Crash) -> Self {
        let mut ops = BTreeMap::new();
        let (mut points, mut session) = (Vec::new(), 0);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for (position, line) in whole.lines().enumerate() {
            let mut parts = line.splitn(4, ' ');
            let kind = parts.next();
            if kind == Some("p") {
                match parts.next().expect("the name of a point") {
                    "process" => {
                        points.clear();
                        session = position;
                    }
                    point => points.push(point.to_owned()),
                }
                continue;
            }
            let op: Stamp = parts
                .next()
                .and_then(|text| text.parse().ok())
                .expect("a number of an operation");
            match kind {
                Some("b") => {
                    let thread = parts.next().and_then(|text| text.parse().ok()).expect("a thread");
                    let what = parts
                        .next()
                        .and_then(What::parse)
                        .unwrap_or_else(|| panic!("bad fact: {line}"));
                    ops.insert(
                        op,
                        Op {
                            thread,
                            began: position,
                            done: None,
                            failed: false,
                            what,
                        },
                    );
                }
                Some("d") => ops.get_mut(&op).expect("begun before it is done").done = Some(position),
                Some("x") => ops.get_mut(&op).expect("begun before it fails").failed = true,
                _ => panic!("bad fact: {line}"),
            }
        }
        Self {
            ops,
            points,
            session,
            crash,
        }
    }

    /// What was under way when the crash came: operations that were neither acknowledged nor refused, and the last steps
    /// of what commits and frees.
    pub(crate) fn under_way(&self) -> BTreeSet<String> {
        let waiting = self
            .ops
            .values()
            .filter(|op| op.done.is_none() && !op.failed && op.began > self.session);
        let verb = |op: &Op| match &op.what {
            What::Snapshot { volumes, .. } if volumes.len() > 1 => "group snapshot".to_owned(),
            what => what.text().split(' ').next().unwrap_or_default().to_owned(),
        };
        let mut all: BTreeSet<String> = waiting.map(verb).collect();
        if !self.points.iter().any(|point| point == "start") {
            let start = if self.ops.is_empty() {
                "first start"
            } else {
                "start"
            };
            all.insert(start.to_owned());
        }
        all.extend(
            self.points
                .last()
                .filter(|point| point.contains('.') && *point != "commit.released")
                .cloned(),
        );
        all
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.ops.values().filter(|op| op.done.is_some()).count()
    }

    /// Operations in the order they began.
    fn in_order(&self) -> Vec<(Stamp, &Op)> {
        let mut ops: Vec<_> = self.ops.iter().map(|(&stamp, op)| (stamp, op)).collect();
        ops.sort_by_key(|(_, op)| op.began);
        ops
    }

    /// True when a flush (or a group snapshot, which commits) that began after `op` was done has been acknowledged.
    fn covered(&self, volume: &str, op: Stamp) -> bool {
        let Some(Op {
            done: Some(done),
            what,
            ..
        }) = self.ops.get(&op)
        else {
            return false;
        };
        match what {
            What::Write { fua: true, .. }
            | What::Create { .. }
            | What::Clone { .. }
            | What::Grow { .. }
            | What::Copy { .. }
            | What::Revert { .. } => true,
            _ if self.crash == Crash::Kill => true,
            _ => self.flushes(volume).any(|flush| flush.began > *done),
        }
    }

    fn flushes<'a>(&'a self, volume: &'a str) -> impl Iterator<Item = &'a Op> {
        self.ops.values().filter(move |op| {
            op.done.is_some()
                && match &op.what {
                    What::Flush { volume: flushed } => flushed == volume,
                    What::Snapshot { volumes, .. } => volumes.iter().any(|name| name == volume),
                    _ => false,
                }
        })
    }

    /// Every value each sector of each volume ever had, oldest first.
    fn versions(&self) -> BTreeMap<String, Versions> {
        let mut volumes: BTreeMap<String, Versions> = BTreeMap::new();
        let mut cuts: BTreeMap<(String, String), Vec<Stamp>> = BTreeMap::new();
        for (stamp, op) in self.in_order() {
            let (volume, range, value) = match &op.what {
                What::Create { volume, sectors } => {
                    let zeroes = std::iter::repeat_n(0, *sectors as usize);
                    volumes.insert(volume.clone(), Versions::new(stamp, zeroes));
                    continue;
                }
                What::Write {
                    volume,
                    sector,
                    count,
                    ..
                } => (volume, *sector..sector + count, stamp),
                What::Zero {
                    volume,
                    sector,
                    count,
                }
                | What::Bury {
                    volume,
                    sector,
                    count,
                } => (volume, *sector..sector + count, 0),
                What::Pin { volume, name } => {
                    cuts.insert((volume.clone(), name.clone()), volumes[volume].now().collect());
                    continue;
                }
                What::Observed { volume, stamps } => {
                    // A volume whose creation was not acknowledged may be there after the restart.
                    let known = volumes.entry(volume.clone()).or_default();
                    known.all(stamp, stamps.iter().copied());
                    continue;
                }
                What::Grow { volume, sectors } => {
                    let known = volumes.get_mut(volume).expect("the volume exists");
                    known.grow(stamp, *sectors as usize);
                    continue;
                }
                What::Snapshot {
                    name,
                    volumes: members,
                } => {
                    // Only clones and reverts look here: their volumes have one thread, so this is exact.
                    for member in members {
                        cuts.insert((member.clone(), name.clone()), volumes[member].now().collect());
                    }
                    continue;
                }
                What::Copy {
                    volume,
                    sector,
                    count,
                    source,
                    snapshot,
                } => {
                    let (first, count) = (*sector as usize, *count as usize);
                    let from: Vec<Stamp> = match snapshot {
                        Some(name) => cuts[&(source.clone(), name.clone())].clone(),
                        None => volumes[source].now().collect(),
                    };
                    let known = volumes.get_mut(volume).expect("the volume exists");
                    for (sector, value) in from.into_iter().enumerate().skip(first).take(count) {
                        known.push(sector, stamp, value);
                    }
                    continue;
                }
                What::Clone { volume, snapshot, to } => {
                    let cut = &cuts[&(volume.clone(), snapshot.clone())];
                    volumes.insert(to.clone(), Versions::new(stamp, cut.iter().copied()));
                    continue;
                }
                What::Revert { volume, snapshot } => {
                    let cut = &cuts[&(volume.clone(), snapshot.clone())];
                    let known = volumes.get_mut(volume).expect("the volume exists");
                    known.all(stamp, cut.iter().copied());
                    continue;
                }
                What::Flush { .. }
                | What::DeleteSnapshot { .. }
                | What::DeleteVolume { .. }
                | What::Checksums { .. }
                | What::Compact
                | What::Restore => continue,
            };
            let known = volumes
                .get_mut(volume)
                .unwrap_or_else(|| panic!("{volume} is written but never created"));
            range.for_each(|sector| known.push(sector as usize, stamp, value));
        }
        volumes
    }

    /// Compares what a crash left with what was promised. The error names the broken promise.
    pub(crate) fn judge(&self, found: &dyn Found) -> Result<(), String> {
        let versions = self.versions();
        self.judge_volumes(found, &versions)?;
        self.judge_snapshots(found, &versions)
    }

    fn judge_volumes(&self, found: &dyn Found, versions: &BTreeMap<String, Versions>) -> Result<(), String> {
        let names: BTreeSet<String> = found.volumes().into_iter().collect();
        for op in self.ops.values() {
            let created = match &op.what {
                What::Create { volume, .. } => volume,
                What::Clone { to, .. } => to,
                What::DeleteVolume { volume } if op.done.is_some() && names.contains(volume) => {
                    return Err(format!("volume {volume} is back after its acknowledged deletion"));
                }
                _ => continue,
            };
            let deleting = |op: &Op| matches!(&op.what, What::DeleteVolume { volume } if volume == created);
            if op.done.is_some() && !names.contains(created) && !self.ops.values().any(deleting) {
                return Err(format!("volume {created} was acknowledged and is gone"));
            }
        }
        for name in &names {
            let Some(expected) = versions.get(name) else {
                return Err(format!("volume {name} was never asked for"));
            };
            let actual =
                stamps(&found.read_volume(name)?).map_err(|what| format!("volume {name}: {what}"))?;
            let is_done = |(op, _): &(Stamp, usize)| self.ops[op].done.is_some();
            let durable = expected.sizes.iter().rposition(is_done).unwrap_or(0);
            let sizes = &expected.sizes[durable..];
            if !sizes.iter().any(|(_, size)| *size == actual.len()) {
                return Err(format!(
                    "volume {name} has {} sectors, not {sizes:?}",
                    actual.len()
                ));
            }
            let mut covered = BTreeMap::new();
            for (sector, (&actual, versions)) in actual.iter().zip(&expected.sectors).enumerate() {
                let is_covered = |version: &Version| {
                    *covered
                        .entry(version.op)
                        .or_insert_with(|| self.covered(name, version.op))
                };
                let first = versions.iter().rposition(is_covered).unwrap_or(0);
                if !versions[first..].iter().any(|version| version.value == actual) {
                    return Err(format!(
                        "volume {name} sector {sector} holds {actual}, durable was {:?}, all {versions:?}",
                        versions[first]
                    ));
                }
            }
        }
        Ok(())
    }

    fn judge_snapshots(
        &self,
        found: &dyn Found,
        versions: &BTreeMap<String, Versions>,
    ) -> Result<(), String> {
        let there: BTreeSet<(String, String)> = found.snapshots().into_iter().collect();
        for op in self.ops.values() {
            match &op.what {
                What::DeleteSnapshot { volume, snapshot }
                    if op.done.is_some() && there.contains(&(volume.clone(), snapshot.clone())) =>
                {
                    return Err(format!(
                        "snapshot {volume}@{snapshot} is back after its acknowledged deletion"
                    ));
                }
                What::Snapshot { name, volumes } => {
                    self.judge_cut(found, versions, &there, op, name, volumes)?
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// One snapshot over several volumes: whole, and one point in time.
    fn judge_cut(
        &self,
        found: &dyn Found,
        versions: &BTreeMap<String, Versions>,
        there: &BTreeSet<(String, String)>,
        cut: &Op,
        name: &str,
        volumes: &[String],
    ) -> Result<(), String> {
        let deleting = |member: &String| {
            self.ops.values().any(|op| match &op.what {
                What::DeleteSnapshot { volume, snapshot } => volume == member && snapshot == name,
                What::DeleteVolume { volume } => volume == member,
                _ => false,
            })
        };
        let kept: Vec<&String> = volumes.iter().filter(|member| !deleting(member)).collect();
        let (present, absent): (Vec<&String>, Vec<&String>) = kept
            .into_iter()
            .partition(|member| there.contains(&((*member).clone(), name.to_owned())));
        if let Some(absent) = absent.first() {
            if cut.done.is_some() {
                return Err(format!("snapshot {absent}@{name} was acknowledged and is gone"));
            }
            if let Some(present) = present.first() {
                return Err(format!("snapshot {name} exists of {present} but not of {absent}"));
            }
        }
        let mut threads: BTreeMap<u64, Prefix> = BTreeMap::new();
        for member in present {
            let bytes = found.read_snapshot(member, name)?;
            let actual = stamps(&bytes).map_err(|what| format!("snapshot {member}@{name}: {what}"))?;
            for (sector, &actual) in actual.iter().enumerate() {
                self.narrow(&mut threads, &versions[member].sectors[sector], actual, cut)
                    .map_err(|what| {
                        format!("snapshot {member}@{name} sector {sector} holds {actual}: {what}")
                    })?;
            }
        }
        self.judge_order(&threads, cut)
            .map_err(|what| format!("snapshot {name}: {what}"))
    }

    /// Narrows the prefix of each writing thread to what `actual` in a sector with `versions` allows.
    fn narrow(
        &self,
        threads: &mut BTreeMap<u64, Prefix>,
        versions: &[Version],
        actual: Stamp,
        cut: &Op,
    ) -> Result<(), String> {
        // Before the snapshot began: in. After it was acknowledged: out. Between: the snapshot decides.
        let surely = versions
            .iter()
            .rposition(|version| self.ops[&version.op].done.is_some_and(|done| done < cut.began));
        let first = surely.unwrap_or(0);
        let until = cut.done.unwrap_or(usize::MAX);
        let last = versions
            .iter()
            .rposition(|version| self.ops[&version.op].began < until)
            .unwrap_or(first);
        let range = versions.get(first..=last).unwrap_or_default();
        if !range.iter().any(|version| version.value == actual) {
            return Err(format!("not one point in time, could be {range:?}"));
        }
        // Unique stamps say exactly which operations are in and which are not; zeroes only where there is no choice.
        for (i, version) in range.iter().enumerate() {
            if self.ops[&version.op].failed {
                // Any part of it may be there, at any time until its sectors are written again.
                continue;
            }
            let prefix = threads.entry(self.ops[&version.op].thread).or_default();
            let matching = || {
                range
                    .iter()
                    .enumerate()
                    .filter(|(_, version)| version.value == actual)
                    .map(|(i, _)| i)
            };
            if matching().all(|m| m >= i) {
                prefix.newest_in = prefix.newest_in.max(version.op);
            }
            if matching().all(|m| m < i) {
                prefix.oldest_out = Some(prefix.oldest_out.map_or(version.op, |old| old.min(version.op)));
            }
        }
        Ok(())
    }

    /// Each thread's part is a prefix, and an operation is in only with all that were acknowledged before it began.
    fn judge_order(&self, threads: &BTreeMap<u64, Prefix>, cut: &Op) -> Result<(), String> {
        let began = |op: Stamp| self.ops.get(&op).map_or(0, |op| op.began);
        for (thread, prefix) in threads {
            if prefix.oldest_out.is_some_and(|out| out < prefix.newest_in) {
                return Err(format!(
                    "thread {thread}: has {} but not {:?}",
                    prefix.newest_in, prefix.oldest_out
                ));
            }
        }
        let newest = threads
            .values()
            .map(|prefix| began(prefix.newest_in))
            .max()
            .unwrap_or(0)
            .max(cut.began);
        for prefix in threads.values() {
            let Some(out) = prefix.oldest_out else { continue };
            if self.ops[&out].done.is_some_and(|done| done < newest) {
                return Err(format!(
                    "has an operation that began at line {newest}, but not {out}, done before"
                ));
            }
        }
        Ok(())
    }
}

/// What a snapshot is known to hold of one thread's operations.
#[derive(Default)]
struct Prefix {
    newest_in: Stamp,
    oldest_out: Option<Stamp>,
}
