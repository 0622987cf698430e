//! Looking for the next command a little while before the thread sleeps.
//!
//! A processor that has nothing to do halts, and in a virtual machine it takes 30 to 60 µs to wake it: at queue depth 1 more than all
//! the rest of a read. So while commands (or a worker's answers) have been following each other closely, the connection polls for the
//! next one instead of sleeping: each look is one `epoll_wait` that does not wait, and serves every other connection of the thread too.
//!
//! It costs nobody anything who needs the processor: only half of the processors ever watch, on a machine with one nobody does, and
//! who finds that it was held up between two looks (another process or another connection wanted the processor) sleeps as usual for a
//! while. A connection without traffic never watches.

use std::time::{Duration, Instant};

/// The longest watch. What takes longer is not worth a processor.
const WATCH: Duration = Duration::from_micros(100);
/// A wait with sleep that was so short would have been caught by watching: it holds one or two wake-ups.
const SHORT: Duration = Duration::from_micros(250);
/// So many waits in a row must have been short.
const IN_A_ROW: u8 = 4;
/// Between two looks lies a microsecond or two. So much says that the processor did something else.
const HELD_UP: Duration = Duration::from_micros(40);
/// How long nobody watches after that.
const REST: Duration = Duration::from_millis(10);

/// What the waits of a connection were like lately.
#[derive(Debug, Default)]
pub(super) struct Habits {
    commands: Habit,
    workers: Habit,
}

impl Habits {
    /// Of waits for workers, or else for the initiator.
    pub(super) fn of(&mut self, workers: bool) -> &mut Habit {
        if workers {
            &mut self.workers
        } else {
            &mut self.commands
        }
    }
}

/// What the waits of one kind were like lately.
#[derive(Debug, Default)]
pub(super) struct Habit {
    short_waits: u8,
    rests_until: Option<Instant>,
}

impl Habit {
    /// Whether the next wait is worth watching through.
    pub(super) fn is_worth_it(&self, now: Instant) -> bool {
        self.short_waits >= IN_A_ROW && self.rests_until.is_none_or(|until| until <= now)
    }

    /// A wait is over: what was waited for has come, and was seen to. Where several commands come at once nobody waits for the
    /// answer to a single one: a wake-up costs little there, and the processor's time is better left to others.
    pub(super) fn came(&mut self, began: Instant, now: Instant, commands: u64) {
        if commands <= 1 && now.saturating_duration_since(began) <= SHORT {
            self.short_waits = self.short_waits.saturating_add(1);
        } else {
            self.short_waits = 0;
        }
    }

    /// One look: whether to look again. `last` is when the look before was.
    fn looks_on(&mut self, began: Instant, last: Instant, now: Instant) -> bool {
        if now.saturating_duration_since(last) > HELD_UP {
            self.rests_until = Some(now + REST);
            return false;
        }
        if now.saturating_duration_since(began) > WATCH {
            self.short_waits = 0;
            return false;
        }
        true
    }

    /// Gives the thread's other connections and the kernel a look each time, until it is not worth it any more.
    pub(super) async fn watch(&mut self, began: Instant) {
        let mut last = began;
        loop {
            let now = Instant::now();
            if !self.looks_on(began, last, now) {
                return;
            }
            last = now;
            tokio::task::yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    fn hot(start: Instant) -> Habit {
        let mut habit = Habit::default();
        for _ in 0..IN_A_ROW {
            assert!(!habit.is_worth_it(start));
            habit.came(start, start + 100 * MICROSECOND, 1);
        }
        assert!(habit.is_worth_it(start));
        habit
    }

    #[test]
    fn it_takes_a_few_short_waits_to_begin_and_one_other_to_end() {
        let start = Instant::now();
        for (time, commands) in [(300, 1), (10, 2)] {
            let mut habit = hot(start);
            habit.came(start, start + time * MICROSECOND, commands);
            assert!(!habit.is_worth_it(start));
        }
    }

    #[test]
    fn a_watch_has_an_end() {
        let start = Instant::now();
        let mut habit = hot(start);
        let look = |n: u32| start + n * 2 * MICROSECOND;
        let looks = (1..1000).take_while(|n| habit.looks_on(start, look(n - 1), look(*n)));
        assert_eq!(looks.count(), 50, "100 µs in steps of 2");
        assert!(!habit.is_worth_it(start), "it was in vain");
    }

    #[test]
    fn who_is_held_up_leaves_the_processor_to_others_for_a_while() {
        let start = Instant::now();
        let mut habit = hot(start);
        let later = start + 41 * MICROSECOND;
        assert!(!habit.looks_on(start, start, later));
        habit.came(start, later, 1);
        assert!(!habit.is_worth_it(later) && !habit.is_worth_it(later + REST - MICROSECOND));
        assert!(habit.is_worth_it(later + REST));
    }
}
