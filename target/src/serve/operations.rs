//! Which block operations of a LUN run, and how to wait for those that began before a moment.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

/// Operations in generations: a wait closes the newest one, and what begins later belongs to the next.
#[derive(Debug, Default)]
pub(super) struct Operations(Mutex<Generations>);

/// An operation that runs, as long as this lives.
#[derive(Debug)]
pub(crate) struct Running {
    _token: TaskTrackerToken,
    /// How many waits there had been when it began.
    waits: u64,
}

#[derive(Debug, Default)]
struct Generations {
    newest: TaskTracker,
    /// Waits so far.
    waits: u64,
    /// Generations that are waited for: whoever comes later must wait for them as well.
    older: Vec<TaskTracker>,
}

impl Operations {
    fn lock(&self) -> MutexGuard<'_, Generations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation begins.
    pub(super) fn begin(&self) -> Running {
        let generations = self.lock();
        Running {
            _token: generations.newest.token(),
            waits: generations.waits,
        }
    }

    /// Whether somebody waits for this operation: a long one that can end early does.
    pub(super) fn is_waited_for(&self, running: &Running) -> bool {
        self.lock().waits != running.waits
    }

    /// Waits for the operations that began before the call; later ones do not hold it up.
    pub(super) fn drain(&self) -> impl Future<Output = ()> + use<> {
        let mut generations = self.lock();
        generations.waits += 1;
        let newest = std::mem::take(&mut generations.newest);
        newest.close();
        generations.older.push(newest);
        generations.older.retain(|generation| !generation.is_empty());
        let waits = generations.older.clone();
        drop(generations);
        async move {
            for generation in waits {
                generation.wait().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn is_over(wait: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        wait.poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
    }

    #[test]
    fn a_wait_ends_with_the_operations_before_it() {
        let operations = Operations::default();
        let before = operations.begin();
        let mut wait = pin!(operations.drain());
        let after = operations.begin();
        assert!(!is_over(wait.as_mut()));
        assert!(operations.is_waited_for(&before) && !operations.is_waited_for(&after));
        drop(before);
        assert!(is_over(wait.as_mut()), "a later operation holds it up");
    }

    #[test]
    fn a_second_wait_waits_for_what_the_first_one_waits_for() {
        let operations = Operations::default();
        let before = operations.begin();
        let mut first = pin!(operations.drain());
        let mut second = pin!(operations.drain());
        assert!(!is_over(first.as_mut()) && !is_over(second.as_mut()));
        drop(before);
        assert!(is_over(first.as_mut()) && is_over(second.as_mut()));
        assert!(is_over(pin!(operations.drain())));
        assert!(
            operations.lock().older.is_empty(),
            "nothing is kept of what is over"
        );
    }
}
