//! One hold of our own requester: where VSS's call of our provider and the target's word meet.
//!
//! ```text
//! VSS (provider thread):  PreCommitSnapshots ─▶ hold begins     CommitSnapshots ─▶ "frozen" ─▶ waits ─▶ S_OK | veto
//! engine:                                                        Release{Taken}, Abort, channel lost … ─▶ thaw()
//! ```
//! CommitSnapshots runs while VSS holds writes: nothing here does I/O, takes a lock for long or writes a log (MS docs: a
//! provider that writes to a held volume deadlocks).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// After the deadline of the hold the machine itself orders a thaw; this is for a machine that hangs.
const GRACE: Duration = Duration::from_millis(500);

/// What the engine is told, from within VSS's calls. Must not block.
pub(crate) trait Told: Send + Sync {
    /// The hold begins. `None`: do not freeze any more.
    fn hold_started(&self) -> Option<Instant>;
    /// All writers and file systems are frozen.
    fn frozen(&self);
}

/// Why VSS is told to give the snapshot up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Veto;

#[derive(Debug, Default)]
struct State {
    /// Between PreCommitSnapshots and the thaw.
    began: Option<Instant>,
    deadline: Option<Instant>,
    /// CommitSnapshots was called.
    frozen: bool,
    /// The engine's word: whether the cut is made and all was in order.
    word: Option<bool>,
    /// CommitSnapshots gave S_OK: the word came while the hold was in force.
    kept: bool,
    ended: Option<Instant>,
}

/// The hold.
pub(crate) struct Hold {
    told: Box<dyn Told>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Hold {
    /// A hold that has not begun.
    pub(crate) fn new(told: Box<dyn Told>) -> Self {
        Self {
            told,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// PreCommitSnapshots: from here on the 10 s of VSS may run.
    pub(crate) fn pre_commit(&self) -> Result<(), Veto> {
        if self.lock().word.is_some() {
            return Err(Veto);
        }
        // Not under our lock: the engine has one of its own.
        let deadline = self.told.hold_started().ok_or(Veto)?;
        let mut state = self.lock();
        state.began = Some(Instant::now());
        state.deadline = Some(deadline);
        Ok(())
    }

    /// CommitSnapshots: says "frozen" and waits for the engine's word, no longer than the hold.
    pub(crate) fn commit(&self) -> Result<(), Veto> {
        let deadline = {
            let mut state = self.lock();
            let Some(deadline) = state.deadline.filter(|_| state.word.is_none()) else {
                return Err(Veto);
            };
            state.frozen = true;
            deadline
        };
        self.told.frozen();
        let mut state = self.lock();
        while state.word.is_none() {
            let Some(left) = (deadline + GRACE).checked_duration_since(Instant::now()) else {
                break;
            };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let now = Instant::now();
        state.ended = Some(now);
        state.kept = state.word == Some(true) && now < deadline;
        if state.kept { Ok(()) } else { Err(Veto) }
    }

    /// The engine's word. The first one counts.
    pub(crate) fn thaw(&self, released: bool) {
        self.lock().word.get_or_insert(released);
        self.changed.notify_all();
    }

    /// Waits for the engine's word.
    pub(crate) fn word(&self) -> bool {
        let mut state = self.lock();
        loop {
            if let Some(word) = state.word {
                return word;
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// VSS shall stop: the engine wants an end, and no good one.
    pub(crate) fn is_given_up(&self) -> bool {
        self.lock().word == Some(false)
    }

    /// Whether CommitSnapshots was reached.
    pub(crate) fn was_frozen(&self) -> bool {
        self.lock().frozen
    }

    /// Whether it was in force until it was released.
    pub(crate) fn was_kept(&self) -> bool {
        self.lock().kept
    }

    /// How long it lasted.
    pub(crate) fn held(&self) -> Option<Duration> {
        let state = self.lock();
        Some(state.ended?.saturating_duration_since(state.began?))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Grants(Option<Duration>, Arc<AtomicU32>);

    impl Told for Grants {
        fn hold_started(&self) -> Option<Instant> {
            self.0.map(|hold| Instant::now() + hold)
        }
        fn frozen(&self) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn hold(grant: Option<Duration>) -> (Arc<Hold>, Arc<AtomicU32>) {
        let told = Arc::new(AtomicU32::new(0));
        (
            Arc::new(Hold::new(Box::new(Grants(grant, Arc::clone(&told))))),
            told,
        )
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_release_in_time_keeps_it() {
        let (hold, told) = hold(Some(LONG));
        assert_eq!(hold.pre_commit(), Ok(()));
        let committing = std::thread::spawn({
            let hold = Arc::clone(&hold);
            move || hold.commit()
        });
        while told.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        hold.thaw(true);
        // A second word changes nothing.
        hold.thaw(false);
        assert_eq!(committing.join().expect("no panic"), Ok(()));
        assert!(hold.was_kept() && hold.was_frozen() && hold.word() && hold.held().is_some());
    }

    #[test]
    fn every_other_end_is_a_veto() {
        // Given up before it began.
        let (early, told) = hold(Some(LONG));
        early.thaw(false);
        assert_eq!((early.pre_commit(), early.commit()), (Err(Veto), Err(Veto)));
        // The engine does not want it any more.
        let (refused, _) = hold(None);
        assert_eq!((refused.pre_commit(), refused.commit()), (Err(Veto), Err(Veto)));
        // VSS skipped PreCommitSnapshots.
        let (skipped, _) = hold(Some(LONG));
        assert_eq!(skipped.commit(), Err(Veto));
        // Given up while it froze.
        let (late, _) = hold(Some(LONG));
        assert_eq!(late.pre_commit(), Ok(()));
        late.thaw(false);
        assert_eq!(late.commit(), Err(Veto));
        // The word never comes.
        let (silent, _) = hold(Some(Duration::ZERO));
        assert_eq!(silent.pre_commit(), Ok(()));
        assert_eq!(silent.commit(), Err(Veto));
        for hold in [early, refused, skipped, late, silent] {
            assert!(!hold.was_kept());
        }
        assert_eq!(told.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_release_after_the_deadline_is_none() {
        let (hold, _) = hold(Some(Duration::ZERO));
        assert_eq!(hold.pre_commit(), Ok(()));
        let committing = std::thread::spawn({
            let hold = Arc::clone(&hold);
            move || hold.commit()
        });
        hold.thaw(true);
        assert_eq!(committing.join().expect("no panic"), Err(Veto));
        assert!(!hold.was_kept());
    }
}
