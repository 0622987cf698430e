//! Joins neighbours: grains into runs (one system call each), ranges into extents.

use std::ops::Range;

use smallvec::SmallVec;

use crate::bad::Bad;
use crate::inner::Inner;
use crate::page::Entry;
use crate::types::{Extent, ExtentKind, VolumeId};
use crate::{Error, Result};

impl Inner {
    /// Adds a grain (or `within` of it) to a read: `buffer` is its place, `offset` where that begins on the volume.
    pub(crate) fn add_grain(
        &self,
        runs: &mut Runs,
        entry: Entry,
        within: Range<u64>,
        buffer: Range<usize>,
        offset: u64,
    ) {
        let Some(grain) = entry.grain() else {
            return runs.add(None, buffer, offset);
        };
        let whole = within.end - within.start == u64::from(self.grain_bytes);
        let crc = self.expected_crc(entry);
        if whole || crc.is_none() {
            runs.add(Some(self.place(grain) + within.start), buffer.clone(), offset);
        }
        if let Some(crc) = crc {
            runs.sums.push(Sum {
                grain,
                crc,
                within,
                buffer,
                offset,
            });
        }
    }

    /// Reads runs into their places of `buf` and verifies every checksum that is recorded of them.
    ///
    /// # Errors
    /// `Medium` with the first byte that cannot be had; what is bad is remembered.
    pub(crate) fn read_runs(&self, runs: &Runs, volume: Option<VolumeId>, buf: &mut [u8]) -> Result<()> {
        let mut bad = Vec::new();
        for run in &runs.runs {
            let part = part_mut(buf, run.buffer.clone());
            match run.place {
                None => part.fill(0),
                Some(place) => {
                    if let Err(e) = self.disk.read_at(place, part) {
                        tracing::error!("data file: read of {} bytes at {place}: {e}", part.len());
                        self.unreadable(run, place, part, &mut bad);
                    }
                }
            }
        }
        for sum in &runs.sums {
            self.verify(sum, buf, &mut bad);
        }
        let Some(offset) = bad.iter().map(|b: &Bad| b.offset).min() else {
            return Ok(());
        };
        self.found_bad(volume, &bad);
        Err(Error::Medium { offset })
    }

    /// Which grains of a run could not be read: each is tried alone.
    fn unreadable(&self, run: &Run, place: u64, part: &mut [u8], bad: &mut Vec<Bad>) {
        let grain_bytes = u64::from(self.grain_bytes);
        let (mut at, end) = (place, place + part.len() as u64);
        while at < end {
            let next = (at - at % grain_bytes + grain_bytes).min(end);
            let index = |byte: u64| usize::try_from(byte - place).expect("inside of the buffer");
            if self
                .disk
                .read_at(at, part_mut(part, index(at)..index(next)))
                .is_err()
            {
                let offset = run.offset + (at - place);
                bad.push(Bad {
                    grain: at / grain_bytes,
                    crc: None,
                    place: offset / grain_bytes,
                    offset,
                });
            }
            at = next;
        }
    }

    /// Compares a grain with its checksum. Of one that is wanted in part only, all is read.
    fn verify(&self, sum: &Sum, buf: &mut [u8], bad: &mut Vec<Bad>) {
        let wanted = part_mut(buf, sum.buffer.clone());
        let right = if wanted.len() == self.grain_bytes as usize {
            crc32c::crc32c(wanted) == sum.crc
        } else {
            let mut grain = vec![0; self.grain_bytes as usize];
            let read = self.disk.read_at(self.place(sum.grain), &mut grain);
            sum.take(read.is_ok(), &grain, wanted)
        };
        if !right {
            bad.push(Bad {
                grain: sum.grain,
                crc: Some(sum.crc),
                place: sum.offset / u64::from(self.grain_bytes),
                offset: sum.offset,
            });
        }
    }

    /// As [`Inner::read_runs`] without waiting; `false` also when something is bad: the way that waits tells what.
    pub(crate) fn try_read_runs(&self, runs: &Runs, buf: &mut [u8]) -> bool {
        let runs_read = runs.runs.iter().all(|run| {
            let part = part_mut(buf, run.buffer.clone());
            match run.place {
                None => {
                    part.fill(0);
                    true
                }
                Some(place) => self.disk.try_read_at(place, part).unwrap_or(false),
            }
        });
        runs_read
            && runs.sums.iter().all(|sum| {
                let wanted = part_mut(buf, sum.buffer.clone());
                if wanted.len() == self.grain_bytes as usize {
                    return crc32c::crc32c(wanted) == sum.crc;
                }
                let mut grain = vec![0; self.grain_bytes as usize];
                let read = self.disk.try_read_at(self.place(sum.grain), &mut grain);
                sum.take(read.unwrap_or(false), &grain, wanted)
            })
    }
}

/// What an entry is, for people and for GET LBA STATUS.
pub(crate) fn kind_of(entry: Entry) -> ExtentKind {
    match entry.grain() {
        Some(_) => ExtentKind::Data,
        None if entry.is_zero() => ExtentKind::Zero,
        None => ExtentKind::Hole,
    }
}

/// A stretch of a buffer and where its bytes are in the data file.
pub(crate) struct Run {
    /// `None` = zeroes.
    place: Option<u64>,
    buffer: Range<usize>,
    /// Where it is on the volume.
    offset: u64,
}

/// A grain of a read whose checksum is recorded.
struct Sum {
    grain: u64,
    crc: u32,
    /// Bytes of the grain that are wanted.
    within: Range<u64>,
    buffer: Range<usize>,
    /// Where they are on the volume.
    offset: u64,
}

impl Sum {
    /// Takes what is wanted out of a whole grain, if that is right.
    fn take(&self, read: bool, grain: &[u8], wanted: &mut [u8]) -> bool {
        let right = read && crc32c::crc32c(grain) == self.crc;
        if right {
            let start = usize::try_from(self.within.start).expect("inside of a grain");
            wanted.copy_from_slice(part(grain, start..start + wanted.len()));
        }
        right
    }
}

/// Runs that need no allocation: most reads and writes are one.
const FEW: usize = 4;

/// Joins neighbours into runs: one system call for each; and remembers what to verify.
#[derive(Default)]
pub(crate) struct Runs {
    runs: SmallVec<[Run; FEW]>,
    sums: Vec<Sum>,
}

impl Runs {
    pub(crate) fn add(&mut self, place: Option<u64>, buffer: Range<usize>, offset: u64) {
        if let Some(last) = self.runs.last_mut()
            && last.buffer.end == buffer.start
            && last.place.map(|p| p + last.buffer.len() as u64) == place
        {
            last.buffer.end = buffer.end;
            return;
        }
        self.runs.push(Run {
            place,
            buffer,
            offset,
        });
    }

    /// Places in the data file and the parts of the buffer that belong there.
    pub(crate) fn placed(self) -> impl Iterator<Item = (u64, Range<usize>)> {
        self.runs.into_iter().filter_map(|r| Some((r.place?, r.buffer)))
    }
}

/// Collects extents, joining neighbours of one kind, up to a limit.
pub(crate) struct Extents {
    pub(crate) list: Vec<Extent>,
    max: usize,
}

impl Extents {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            list: Vec::new(),
            max,
        }
    }

    /// `false` when the range did not fit any more.
    pub(crate) fn add(&mut self, range: Range<u64>, kind: ExtentKind) -> bool {
        if let Some(last) = self.list.last_mut()
            && last.kind == kind
            && last.offset + last.len == range.start
        {
            last.len += range.end - range.start;
            return true;
        }
        if self.list.len() >= self.max {
            return false;
        }
        self.list.push(Extent {
            offset: range.start,
            len: range.end - range.start,
            kind,
        });
        true
    }
}

pub(super) fn part(data: &[u8], range: Range<usize>) -> &[u8] {
    data.get(range).expect("runs lie within the buffer")
}

pub(super) fn part_mut(data: &mut [u8], range: Range<usize>) -> &mut [u8] {
    data.get_mut(range).expect("runs lie within the buffer")
}
