//! What runs without being asked: commits by the clock, checkpoints, jobs, punching, and the look for space.

use std::time::{Duration, Instant};

use crate::Result;
use crate::inner::Inner;
use crate::record::{JobKind, JobRecord};
use crate::space::room_at_thresholds;
use crate::types::StoreEvent;

/// The keeper looks at least this often, whatever it was told.
const KEEPER_TURN: Duration = Duration::from_secs(1);

/// How long after the beginning of a shortage its end may be near: Windows tries four times, a second apart.
const SOON: Duration = Duration::from_secs(4);

/// A pause between two steps of a job is as long as the step was, up to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Commits when it is time, checkpoints after, until the pool stops or is poisoned.
pub(crate) fn keep(inner: &Inner) {
    loop {
        {
            let mut state = inner.state();
            loop {
                if state.stopping || inner.poison.check().is_err() {
                    return;
                }
                let due = inner.due_in(&state);
                if due == Some(Duration::ZERO) {
                    break;
                }
                let (again, timeout) = inner
                    .changed
                    .wait_timeout(state, due.unwrap_or(KEEPER_TURN))
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                state = again;
                if timeout.timed_out() {
                    break;
                }
            }
        }
        inner.look_for_space();
        inner.look_at_thresholds();
        // A failure has poisoned the pool; the next turn ends.
        let done = inner.keep_once();
        if let Err(e) = done {
            tracing::error!("background commit: {e}");
        }
    }
}

/// Runs jobs and punches, until the pool stops or is poisoned.
pub(crate) fn work(inner: &Inner) {
    loop {
        let begun = Instant::now();
        let did = inner.job_step().and_then(|job| Ok(inner.punch_one()? || job));
        match did {
            // Half of the time is the initiators', unless they wait for the space.
            Ok(true) if inner.state().space.out => {}
            Ok(true) => std::thread::sleep(begun.elapsed().min(LONGEST_PAUSE)),
            Ok(false) => {
                let state = inner.state();
                if state.stopping {
                    return;
                }
                let waited = inner.changed.wait_timeout(state, KEEPER_TURN);
                drop(waited);
            }
            Err(e) => {
                // Damage found by a job is no reason to stop the volumes: nothing was freed, the job waits.
                tracing::error!("background job stopped until the next start: {e}");
                inner.tell(StoreEvent::JobFailed {
                    reason: e.to_string(),
                });
                return;
            }
        }
        if inner.state().stopping || inner.poison.check().is_err() {
            return;
        }
    }
}

impl Inner {
    pub(crate) fn keep_once(&self) -> Result<()> {
        if self.state().open.is_empty() {
            if self.unsynced.any() {
                self.sync_data()?;
            }
        } else {
            self.commit_now()?;
        }
        self.checkpoint_if_due()
    }

    /// Bytes of new data that would be taken now: below the operator's bound and above the head room.
    pub(crate) fn available_bytes(&self) -> u64 {
        let mut state = self.state();
        state.space.ask(self.disk.as_ref());
        let room = state.space.free.saturating_sub(state.space.headroom());
        let used = state.alloc.in_use() * u64::from(self.grain_bytes);
        match self.options.max_bytes {
            0 => room,
            max => room.min(max.saturating_sub(used)),
        }
    }

    /// Whether a write that finds no room may find some in a moment, because what was deleted is being freed. After the first
    /// seconds of a shortage it is one all the same: nobody shall try again and again for a job that takes an hour.
    pub(crate) fn makes_room(&self) -> bool {
        let state = self.state();
        let begun = state.space.out_since.is_some_and(|since| since.elapsed() < SOON);
        let frees = |job: &JobRecord| match job.kind {
            JobKind::DropSnapshot(_) | JobKind::DropHead(_) | JobKind::Collapse { .. } => true,
            JobKind::Zero { unmap, .. } => unmap,
            JobKind::Lend { .. } => false,
        };
        begun && (!state.open.releases.is_empty() || state.jobs.values().any(frees))
    }

    /// What is left at each threshold of fullness, in bytes.
    pub(crate) fn room_at_thresholds(&self) -> [u64; 3] {
        let available = self.available_bytes();
        let used = self.state().alloc.in_use() * u64::from(self.grain_bytes);
        room_at_thresholds(used.saturating_add(available))
    }

    /// Tells when the pool passes a threshold of fullness, in either direction.
    pub(crate) fn look_at_thresholds(&self) {
        let available_bytes = self.available_bytes();
        let (passed, used_bytes) = {
            let mut state = self.state();
            let used = state.alloc.in_use() * u64::from(self.grain_bytes);
            (state.space.cross(used, available_bytes), used)
        };
        if let Some(passed) = passed {
            self.tell(StoreEvent::Threshold {
                percent: passed.percent,
                reached: passed.reached,
                used_bytes,
                available_bytes,
            });
        }
    }

    /// Tells when space is back after it had run out.
    pub(crate) fn look_for_space(&self) {
        let recovered = {
            let mut state = self.state();
            if !state.space.out {
                return;
            }
            let bound = self.options.max_bytes.div_ceil(u64::from(self.grain_bytes));
            let below = bound == 0 || state.alloc.in_use() < bound;
            let room = below && state.space.recovered(self.disk.as_ref());
            state.space.out = !room;
            room
        };
        if recovered {
            tracing::info!("space is back: new data is accepted again");
            self.tell(StoreEvent::SpaceRecovered);
        }
    }

    /// Punches one run of free grains; `false` when there is none.
    pub(crate) fn punch_one(&self) -> Result<bool> {
        let Some((start, len)) = self.state().alloc.take_punch() else {
            return Ok(false);
        };
        self.hook("punch");
        let bytes = self.place(len);
        let done = self.disk.punch(self.place(start), bytes);
        self.state().alloc.punched(start, len);
        match done {
            Ok(()) => Ok(true),
            // The space stays allocated in the file and is reused from there: nothing is lost.
            Err(e) => {
                tracing::warn!("punching {bytes} bytes of the data file: {e}");
                Ok(true)
            }
        }
    }
}
