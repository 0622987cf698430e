//! Range locks of one volume, in the order of arrival, and the small helpers for mutexes.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Locks a mutex. A panic ends the process (house style §5); where tests catch one, what it left is still the
/// best there is, and the pool is poisoned by whoever saw it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on a condition.
pub(crate) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// How a range is locked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Beside other readers.
    Shared,
    /// Alone.
    Exclusive,
}

/// Grains `first..=last`, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) mode: Mode,
}

impl Span {
    fn conflicts(self, other: Self) -> bool {
        let overlap = self.first <= other.last && other.first <= self.last;
        overlap && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
    }
}

#[derive(Debug)]
struct Ticket {
    id: u64,
    span: Span,
    /// A copy within a volume has two: locked at once, so that it never waits for one while it holds the other.
    second: Option<Span>,
}

impl Ticket {
    fn spans(&self) -> impl Iterator<Item = Span> {
        [Some(self.span), self.second].into_iter().flatten()
    }

    fn conflicts(&self, other: &Self) -> bool {
        self.spans().any(|a| other.spans().any(|b| a.conflicts(b)))
    }
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    /// Held and waiting, in the order of arrival. A ticket goes when nothing before it conflicts: nobody starves.
    tickets: Vec<Ticket>,
}

impl Queue {
    fn blocked(&self, id: u64) -> bool {
        let Some(at) = self.tickets.iter().position(|t| t.id == id) else {
            return false;
        };
        let (before, rest) = self.tickets.split_at(at);
        rest.first()
            .is_some_and(|me| before.iter().any(|t| t.conflicts(me)))
    }
}

/// Locks over the grains of one volume.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    queue: Mutex<Queue>,
    freed: Condvar,
}

impl RangeLocks {
    /// Locks grains `first..=last`, after everything that came before and conflicts.
    pub(crate) fn lock(&self, first: u64, last: u64, mode: Mode) -> RangeGuard<'_> {
        self.lock_spans(Span { first, last, mode }, None)
    }

    /// Locks one or two ranges at once.
    pub(crate) fn lock_spans(&self, span: Span, second: Option<Span>) -> RangeGuard<'_> {
        let mut queue = lock(&self.queue);
        let id = queue.next;
        queue.next += 1;
        queue.tickets.push(Ticket { id, span, second });
        while queue.blocked(id) {
            queue = wait(&self.freed, queue);
        }
        RangeGuard { locks: self, id }
    }

    /// The whole volume.
    pub(crate) fn lock_all(&self, mode: Mode) -> RangeGuard<'_> {
        self.lock(0, u64::MAX, mode)
    }

    /// Locks without waiting.
    pub(crate) fn try_lock(&self, first: u64, last: u64, mode: Mode) -> Option<RangeGuard<'_>> {
        let mut queue = lock(&self.queue);
        let ticket = Ticket {
            id: queue.next,
            span: Span { first, last, mode },
            second: None,
        };
        if queue.tickets.iter().any(|t| t.conflicts(&ticket)) {
            return None;
        }
        queue.next += 1;
        let id = ticket.id;
        queue.tickets.push(ticket);
        Some(RangeGuard { locks: self, id })
    }
}

/// A held range; released on drop.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = lock(&self.locks.queue);
        queue.tickets.retain(|t| t.id != self.id);
        let others = !queue.tickets.is_empty();
        drop(queue);
        if others {
            self.locks.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn readers_share_writers_do_not() {
        let l = RangeLocks::default();
        let a = l.lock(0, 9, Mode::Shared);
        assert!(l.try_lock(5, 6, Mode::Shared).is_some());
        assert!(l.try_lock(9, 9, Mode::Exclusive).is_none());
        assert!(l.try_lock(10, 20, Mode::Exclusive).is_some());
        drop(a);
        assert!(l.try_lock(9, 9, Mode::Exclusive).is_some());
    }

    #[test]
    fn two_ranges_are_locked_at_once() {
        let l = RangeLocks::default();
        let span = |first, last, mode| Span { first, last, mode };
        let g = l.lock_spans(span(0, 9, Mode::Shared), Some(span(5, 20, Mode::Exclusive)));
        assert!(l.try_lock(0, 4, Mode::Shared).is_some());
        assert!(l.try_lock(0, 4, Mode::Exclusive).is_none());
        assert!(l.try_lock(7, 7, Mode::Shared).is_none() && l.try_lock(20, 30, Mode::Shared).is_none());
        assert!(l.try_lock(21, 30, Mode::Exclusive).is_some());
        drop(g);
        assert!(l.try_lock(0, 30, Mode::Exclusive).is_some());
    }

    #[test]
    fn a_waiting_writer_is_not_overtaken_by_later_readers() {
        let l = Arc::new(RangeLocks::default());
        let step = Arc::new(AtomicU32::new(0));
        let first = l.lock(0, 9, Mode::Shared);
        let writer = std::thread::spawn({
            let (l, step) = (l.clone(), step.clone());
            move || {
                let _g = l.lock(3, 3, Mode::Exclusive);
                step.store(1, Ordering::SeqCst);
            }
        });
        while lock(&l.queue).tickets.len() < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(l.try_lock(3, 3, Mode::Shared).is_none(), "the writer comes first");
        assert_eq!(step.load(Ordering::SeqCst), 0);
        drop(first);
        writer.join().unwrap();
        assert_eq!(step.load(Ordering::SeqCst), 1);
    }
}
