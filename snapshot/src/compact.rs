//! Rewriting the metadata store while the pool works: what sled leaves behind of overwritten values goes.
//!
//! The keys are copied in order into a new database beside the old one, a bounded number at a time. Whatever is written
//! meanwhile goes to the old one, and also to the new one where the copy has passed. Then both are compared, and between
//! two commits, when both hold the same durable transaction group, the directories change places in one system call. A
//! process that dies before that leaves the old store, after it the new one; the other is removed at the next start.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::commit::Turn;
use crate::inner::Inner;
use crate::pool::Pool;
use crate::types::CompactReport;
use crate::{Error, Result};

/// Keys per step of the copy and of the comparison: map misses and commits are served between.
const KEYS: usize = 256;
/// The pause after a step is as long as the step was, up to this: half of the time is the pool's.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// Room that must be left beside the new store.
const SPARE_BYTES: u64 = 64 << 20;

/// A step of the metadata store. Between two of them it serves other requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompactStep {
    /// Make an empty store beside the present one.
    Begin,
    /// Copy up to so many keys.
    Copy(usize),
    /// Compare up to so many keys with the copy.
    Compare(usize),
    /// Put the copy in the place of the store. Nothing may be written that is not durable.
    Finish,
    /// Give up.
    Abort,
}

/// How far a step has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactState {
    /// Nothing is left to copy, or to compare.
    pub done: bool,
    /// Keys copied, or compared, since the begin of that part.
    pub keys: u64,
    /// Bytes of these keys and their values.
    pub bytes: u64,
}

/// Gives a compaction up that does not come to its end.
struct Attempt<'a>(&'a Inner, bool);

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.1 {
            let given_up = self.0.meta.compact(CompactStep::Abort);
            if let Err(e) | Ok(Err(e)) = given_up {
                tracing::warn!("what is left of a compaction stays until the next start: {e}");
            }
        }
    }
}

impl Pool {
    /// Bytes of all keys and values of the metadata: what the store would need if it kept no garbage. Reads all of it.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn metadata_live_bytes(&self) -> Result<u64> {
        let (mut bytes, mut from) = (0, Vec::new());
        loop {
            let pairs = self
                .inner
                .meta(self.inner.meta.scan(from, vec![0xff], 4 * KEYS))?;
            let Some((last, _)) = pairs.last() else {
                return Ok(bytes);
            };
            from = last.clone();
            from.push(0);
            bytes += pairs.iter().map(|(k, v)| (k.len() + v.len()) as u64).sum::<u64>();
        }
    }

    /// Rewrites the metadata store without its garbage, while the pool works. `progress` is told what is being done and
    /// how many bytes of keys and values it has passed.
    ///
    /// # Errors
    /// `Refused` (one is running, or the file system cannot do it), `NoSpace`, `Io`: the store is as before. `Poisoned`.
    pub fn compact(&self, mut progress: impl FnMut(&'static str, u64)) -> Result<CompactReport> {
        let inner = &self.inner;
        let Ok(_alone) = inner.compacting.try_lock() else {
            return Err(Error::refused(
                "the metadata is being compacted already: wait for it",
            ));
        };
        let before_bytes = inner.meta(inner.meta.size_on_disk())?;
        let free = inner
            .disk
            .free_bytes()
            .map_err(|e| Error::io("statvfs", "pool", e))?;
        if free < before_bytes.saturating_add(SPARE_BYTES) {
            return Err(Error::NoSpace);
        }
        let mut attempt = Attempt(inner, false);
        inner.compact_step(CompactStep::Begin)?;
        inner.hook("compact.begun");
        let live = inner.compact_all(CompactStep::Copy(KEYS), |bytes| progress("copied", bytes))?;
        inner.hook("compact.copied");
        inner.compact_all(CompactStep::Compare(KEYS), |bytes| progress("compared", bytes))?;
        let begun = Instant::now();
        let after_bytes = inner.change_places(&mut attempt)?;
        Ok(CompactReport {
            before_bytes,
            after_bytes,
            live_bytes: live.bytes,
            keys: live.keys,
            switch_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }
}

impl Inner {
    /// One step. What leaves the store in an unknown state poisons the pool.
    fn compact_step(&self, step: CompactStep) -> Result<CompactState> {
        self.meta(self.meta.compact(step))?
    }

    fn compact_all(&self, step: CompactStep, mut progress: impl FnMut(u64)) -> Result<CompactState> {
        let mut told = Instant::now();
        loop {
            self.poison.check()?;
            if self.state().stopping {
                return Err(Error::refused("the pool closes"));
            }
            let begun = Instant::now();
            let state = self.compact_step(step)?;
            self.hook("compact.step");
            if state.done {
                progress(state.bytes);
                return Ok(state);
            }
            if told.elapsed() > Duration::from_secs(1) {
                told = Instant::now();
                progress(state.bytes);
            }
            std::thread::sleep(begun.elapsed().min(LONGEST_PAUSE));
        }
    }

    /// Between two commits, when the old store is durable.
    fn change_places(&self, attempt: &mut Attempt<'_>) -> Result<u64> {
        let mut state = self.state();
        while state.committing {
            self.poison.check()?;
            state = self.wait(state);
        }
        self.poison.check()?;
        // The shutdown closes the store at the end of the same turns.
        if state.stopping {
            return Err(Error::refused("the pool closes"));
        }
        state.committing = true;
        drop(state);
        let turn = Turn(self);
        self.meta(self.meta.commit())?;
        let finished = self.compact_step(CompactStep::Finish);
        attempt.1 = finished.is_ok();
        finished?;
        let size = self.meta(self.meta.size_on_disk())?;
        self.state().space.metadata_bytes = size;
        drop(turn);
        self.hook("compact.done");
        Ok(size)
    }

    /// Waits for a compaction to see that the pool closes.
    pub(crate) fn wait_for_compaction(&self) {
        drop(self.compacting.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
