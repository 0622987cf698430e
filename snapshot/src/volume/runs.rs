//! Joins neighbours: grains into runs (one system call each), ranges into extents.

use std::ops::Range;

use crate::inner::Inner;
use crate::page::Entry;
use crate::types::{Extent, ExtentKind};
use crate::{Error, Result};

impl Inner {
    /// Reads runs into their places of `buf`.
    pub(crate) fn read_runs(&self, runs: Vec<Run>, buf: &mut [u8]) -> Result<()> {
        for run in runs {
            let part = part_mut(buf, run.buffer);
            match run.place {
                None => part.fill(0),
                Some(place) => self.disk.read_at(place, part).map_err(|e| {
                    tracing::error!("data file: read of {} bytes at {place}: {e}", part.len());
                    Error::Medium { offset: run.offset }
                })?,
            }
        }
        Ok(())
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
    pub(super) place: Option<u64>,
    pub(super) buffer: Range<usize>,
    /// Where it is on the volume.
    pub(super) offset: u64,
}

/// Joins neighbours into runs: one system call for each.
#[derive(Default)]
pub(crate) struct Runs(pub(crate) Vec<Run>);

impl Runs {
    pub(crate) fn add(&mut self, place: Option<u64>, buffer: Range<usize>, offset: u64) {
        if let Some(last) = self.0.last_mut()
            && last.buffer.end == buffer.start
            && last.place.map(|p| p + last.buffer.len() as u64) == place
        {
            last.buffer.end = buffer.end;
            return;
        }
        self.0.push(Run {
            place,
            buffer,
            offset,
        });
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
