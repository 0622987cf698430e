//! Scrub: a pass over everything, while the pool works. First every record is decoded, then the map is held against the
//! bitmaps (I1, I2, I6) as of one transaction group, then every recorded checksum is compared with the data, once for each
//! placement. Slow on purpose (a rate), in small steps, with its cursor on disk.
//!
//! The map changes while it is read. A grain that was taken or given back since the pass over the map began is left
//! out of the comparison; every other one had the same placements all the time.

mod map;
mod pages;

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub(crate) use self::map::GrainSet;
use self::map::MapPass;
use crate::check::{Problem, ProblemKind};
use crate::inner::Inner;
use crate::lock::lock;
use crate::page::PageNo;
use crate::pool::Pool;
use crate::record::table;
use crate::superblock::Superblock;
use crate::types::{BranchId, StoreEvent};
use crate::{Error, Result};

/// Name of the value (`K`) that keeps the cursor and the figures.
const SAVED: &str = "store.scrub";
/// Problems that are listed; the rest is counted.
const MOST_PROBLEMS: usize = 1000;
/// Problems that are kept over a restart, and the longest text of one: a value has 4 KiB.
const SAVED_PROBLEMS: usize = 8;
const SAVED_TEXT: usize = 300;
/// Pages of the map per step while data is read (4 MiB with grains of 4 KiB), and while it is not.
const DATA_PAGES: usize = 16;
const MAP_PAGES: usize = 64;
/// Records per step.
const RECORDS: usize = 1024;
/// How often the cursor goes to disk.
const SAVE_EVERY: Duration = Duration::from_secs(5);
const TURN: Duration = Duration::from_secs(1);
/// Tables whose records stand alone; pages and bitmaps are read by the pass over the map.
const TABLES: [u8; 8] = [
    table::SYSTEM,
    table::BRANCH,
    table::SNAPSHOT,
    table::CHANGED,
    table::COUNTS,
    table::JOB,
    table::BAD,
    table::VALUE,
];

/// What a scrub is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubPhase {
    /// Decodes every record.
    #[default]
    Records,
    /// Compares the map with the bitmaps.
    Map,
    /// Compares data with recorded checksums.
    Data,
    /// Has seen everything.
    Done,
}

/// A scrub that runs, was stopped, or has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// It goes on by itself, also after a restart.
    pub running: bool,
    /// What it is at.
    pub phase: ScrubPhase,
    /// How far it is, in percent; an estimate.
    pub percent: u8,
    /// When it began, in milliseconds since 1970 UTC.
    pub started_ms: i64,
    /// When it ended.
    pub ended_ms: Option<i64>,
    /// Bytes per second that it reads at most; 0 = as fast as it can.
    pub rate: u64,
    /// Transaction group that the map was compared at.
    pub txg: u64,
    /// Records that were decoded.
    pub records: u64,
    /// Page versions that were held against the bitmaps.
    pub page_versions: u64,
    /// Grains that they place.
    pub grains_placed: u64,
    /// Grains that were compared with their checksum.
    pub grains_verified: u64,
    /// Grains without a recorded checksum: nobody can tell.
    pub grains_without: u64,
    /// All problems found.
    pub problem_count: u64,
    /// The first of them.
    pub problems: Vec<Problem>,
}

impl ScrubStatus {
    fn add(&mut self, kind: ProblemKind, text: impl Into<String>) {
        let text = text.into();
        // A pass that begins again after a restart meets the same once more.
        if self.problems.iter().any(|p| p.text == text) {
            return;
        }
        self.problem_count += 1;
        tracing::error!(?kind, "scrub: {text}");
        if self.problems.len() < MOST_PROBLEMS {
            self.problems.push(Problem { kind, text });
        }
    }

    fn damaged(&mut self, error: &Error) {
        self.add(ProblemKind::Damaged, error.to_string());
    }
}

/// Where a pass over pages is: the last page that was seen.
type Cursor = Option<(BranchId, PageNo)>;

/// A scrub in RAM.
#[derive(Default)]
pub(crate) struct Scrub {
    status: ScrubStatus,
    /// Next record, while records are decoded.
    key: Vec<u8>,
    cursor: Cursor,
    map: Option<MapPass>,
}

/// What goes to disk.
#[derive(Serialize, Deserialize)]
struct Saved {
    status: ScrubStatus,
    /// Of the pass over the data; the others begin again.
    cursor: Option<(u32, u32)>,
}

/// The scrub of a pool: what the worker has, and what everybody may look at without waiting for it.
#[derive(Default)]
pub(crate) struct Scrubbing {
    work: std::sync::Mutex<Option<Scrub>>,
    seen: std::sync::Mutex<Option<ScrubStatus>>,
}

impl Pool {
    /// Begins a scrub, or goes on with one that was stopped; one that runs only gets the new rate. Bytes per second; 0 = as
    /// fast as it can. With `restart` it begins at the start in any case.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn scrub_start(&self, rate: u64, restart: bool) -> Result<()> {
        let inner = &self.inner;
        inner.poison.check()?;
        let mut work = lock(&inner.scrubbing.work);
        let fresh = restart
            || work
                .as_ref()
                .is_none_or(|scrub| scrub.status.phase == ScrubPhase::Done);
        if fresh {
            *work = Some(Scrub::default());
            inner.state().touched = None;
        }
        let scrub = work.get_or_insert_default();
        if fresh {
            scrub.status.started_ms = inner.now_ms();
        }
        (scrub.status.running, scrub.status.rate) = (true, rate);
        inner.save_scrub(scrub);
        drop(work);
        inner.changed.notify_all();
        Ok(())
    }

    /// Stops a scrub where it is. It goes on from there when it is started again.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn scrub_stop(&self) -> Result<()> {
        let mut work = lock(&self.inner.scrubbing.work);
        if let Some(scrub) = work.as_mut().filter(|scrub| scrub.status.running) {
            scrub.status.running = false;
            // The comparison with the bitmaps would have to follow every change meanwhile.
            (scrub.map, self.inner.state().touched) = (None, None);
            self.inner.save_scrub(scrub);
        }
        self.inner.poison.check()
    }

    /// The scrub that runs, or the last one.
    #[must_use]
    pub fn scrub_status(&self) -> Option<ScrubStatus> {
        lock(&self.inner.scrubbing.seen).clone()
    }

    /// Steps of a scrub that was started, without regard to its rate; gives how many there were to do. The background does
    /// it on its own.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn run_scrub(&self, steps: usize) -> Result<usize> {
        for done in 0..steps {
            if self.inner.scrub_step()?.is_none() {
                return Ok(done);
            }
        }
        Ok(steps)
    }
}

/// Scrubs when asked, until the pool stops or is poisoned.
pub(crate) fn scrub(inner: &Inner) {
    let mut saved = Instant::now();
    loop {
        let begun = Instant::now();
        let rest = match inner.scrub_step() {
            Ok(Some((bytes, rate))) => {
                let ms = (bytes.saturating_mul(1000)).checked_div(rate).unwrap_or(0);
                Duration::from_millis(ms).saturating_sub(begun.elapsed())
            }
            Ok(None) => TURN,
            Err(e) => return tracing::error!("the scrub stopped until the next start: {e}"),
        };
        if saved.elapsed() >= SAVE_EVERY {
            saved = Instant::now();
            if let Some(scrub) = lock(&inner.scrubbing.work).as_ref().filter(|s| s.status.running) {
                inner.save_scrub(scrub);
            }
        }
        let until = Instant::now() + rest;
        let mut state = inner.state();
        loop {
            if state.stopping || inner.poison.check().is_err() {
                return;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = inner.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Inner {
    /// Takes up what an earlier start left. A pass over the map begins again.
    pub(crate) fn load_scrub(&self) {
        let value = self.state().values.get(SAVED).cloned();
        let Some(saved) = value.and_then(|v| serde_json::from_slice::<Saved>(&v).ok()) else {
            return;
        };
        *lock(&self.scrubbing.seen) = Some(saved.status.clone());
        *lock(&self.scrubbing.work) = Some(Scrub {
            status: saved.status,
            cursor: saved.cursor.map(|(branch, page)| (BranchId(branch), page)),
            ..Scrub::default()
        });
    }

    /// Shows how far it is, and keeps it with the next commit.
    fn save_scrub(&self, scrub: &Scrub) {
        *lock(&self.scrubbing.seen) = Some(scrub.status.clone());
        let mut status = scrub.status.clone();
        status.problems.truncate(SAVED_PROBLEMS);
        for problem in &mut status.problems {
            problem.text = problem.text.chars().take(SAVED_TEXT).collect();
        }
        let data = status.phase == ScrubPhase::Data;
        let saved = Saved {
            status,
            cursor: scrub
                .cursor
                .filter(|_| data)
                .map(|(branch, page)| (branch.0, page)),
        };
        let value = serde_json::to_vec(&saved).expect("numbers and texts");
        if value.len() <= crate::limits::META_VALUE_BYTES {
            let mut state = self.state();
            state.values.insert(SAVED.to_owned(), value);
            state.open.values.insert(SAVED.to_owned());
            state.open.mark();
        }
    }

    /// One step: the bytes that it read and the rate; `None` when there is nothing to do.
    fn scrub_step(&self) -> Result<Option<(u64, u64)>> {
        self.poison.check()?;
        let mut work = lock(&self.scrubbing.work);
        let Some(scrub) = work.as_mut().filter(|scrub| scrub.status.running) else {
            return Ok(None);
        };
        let phase = scrub.status.phase;
        let bytes = match phase {
            ScrubPhase::Records => self.scrub_records(scrub)?,
            ScrubPhase::Map => self.scrub_map(scrub)?,
            ScrubPhase::Data => self.scrub_data(scrub)?,
            ScrubPhase::Done => 0,
        };
        scrub.status.percent = self.scrub_percent(&scrub.status);
        if scrub.status.phase == ScrubPhase::Done {
            (scrub.status.running, scrub.status.ended_ms) = (false, Some(self.now_ms()));
            self.tell(StoreEvent::ScrubEnded {
                problems: scrub.status.problem_count,
            });
        }
        if scrub.status.phase == phase {
            *lock(&self.scrubbing.seen) = Some(scrub.status.clone());
        } else {
            self.save_scrub(scrub);
        }
        Ok(Some((bytes, scrub.status.rate)))
    }

    fn scrub_percent(&self, status: &ScrubStatus) -> u8 {
        let all = self.state().alloc.in_use().max(1);
        let part = |done: u64, of: u64| u8::try_from((done.min(all) * of) / all).unwrap_or(0);
        match status.phase {
            ScrubPhase::Records => 0,
            ScrubPhase::Map => part(status.grains_placed, 10),
            ScrubPhase::Data => 10 + part(status.grains_verified + status.grains_without, 89),
            ScrubPhase::Done => 100,
        }
    }

    /// Decodes a slice of the small tables, and compares superblocks and metadata once (I7).
    fn scrub_records(&self, scrub: &mut Scrub) -> Result<u64> {
        if scrub.key.is_empty() {
            scrub.status.records = 0;
            self.scrub_superblocks(&mut scrub.status)?;
            scrub.key = vec![*TABLES.first().expect("not empty")];
        }
        let here = scrub.key.first().copied().unwrap_or(0);
        let pairs = self.meta(self.meta.scan(scrub.key.clone(), vec![here + 1], RECORDS))?;
        let mut bytes = 0;
        for (key, value) in &pairs {
            bytes += (key.len() + value.len()) as u64;
            if let Err(error) = pages::verify(key, value) {
                scrub.status.damaged(&error);
            }
        }
        scrub.status.records += pairs.len() as u64;
        if let Some((last, _)) = pairs.last().filter(|_| pairs.len() == RECORDS) {
            scrub.key = last.clone();
            scrub.key.push(0);
            return Ok(bytes);
        }
        match TABLES.iter().skip_while(|t| **t != here).nth(1) {
            Some(next) => scrub.key = vec![*next],
            None => scrub.status.phase = ScrubPhase::Map,
        }
        Ok(bytes)
    }

    fn scrub_superblocks(&self, status: &mut ScrubStatus) -> Result<()> {
        let newest = match Superblock::newest(self.disk.as_ref()) {
            Ok(found) => found,
            Err(error) => {
                status.damaged(&error);
                return Ok(());
            }
        };
        let durable = self.state().durable;
        if newest.pool_id != self.pool_id || newest.grain_bytes != self.grain_bytes {
            let text = "the data file's superblock is that of another pool";
            status.add(ProblemKind::Inconsistent, text);
        } else if newest.txg > durable {
            let text = format!("metadata is at {durable}, the data file has seen {}", newest.txg);
            status.add(ProblemKind::LostCommits, text);
        }
        Ok(())
    }
}
