//! A scheduler for named interleavings: stops the next thread that reaches a point of the store until it is let go.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use stillpoint_snapshot::{Hooks, Point};

/// Longest wait for another thread: far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug)]
struct Stop {
    id: u64,
    point: Point,
    reached: bool,
    released: bool,
}

#[derive(Default)]
struct Stops {
    next: u64,
    all: Vec<Stop>,
}

/// The hooks of a pool under test.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<Stops>, Condvar)>);

/// One armed point.
pub(crate) struct Pause {
    gate: Gate,
    id: u64,
    point: Point,
}

impl Hooks for Gate {
    fn at(&self, point: Point) {
        let (stops, changed) = &*self.0;
        let mut stops = stops.lock().unwrap();
        let Some(stop) = stops
            .all
            .iter_mut()
            .find(|stop| stop.point == point && !stop.reached)
        else {
            return;
        };
        stop.reached = true;
        let id = stop.id;
        changed.notify_all();
        let until = Instant::now() + 2 * PATIENCE;
        while stops.all.iter().any(|stop| stop.id == id && !stop.released) {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nobody released the thread at {point}");
            stops = changed.wait_timeout(stops, left).unwrap().0;
        }
    }
}

impl Gate {
    /// The next thread that reaches `point` stops there.
    pub(crate) fn arm(&self, point: Point) -> Pause {
        let mut stops = self.0.0.lock().unwrap();
        stops.next += 1;
        let id = stops.next;
        stops.all.push(Stop {
            id,
            point,
            reached: false,
            released: false,
        });
        Pause {
            gate: self.clone(),
            id,
            point,
        }
    }
}

impl Pause {
    fn is_reached(&self, within: Duration) -> bool {
        let (stops, changed) = &*self.gate.0;
        let mut stops = stops.lock().unwrap();
        let until = Instant::now() + within;
        while !stops.all.iter().any(|stop| stop.id == self.id && stop.reached) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            stops = changed.wait_timeout(stops, left).unwrap().0;
        }
        true
    }

    /// Waits until a thread stands here.
    pub(crate) fn wait(&self) {
        assert!(self.is_reached(PATIENCE), "no thread came to {}", self.point);
    }

    /// Lets the thread go on (or takes the stop back when none has come).
    pub(crate) fn release(self) {
        drop(self);
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        let (stops, changed) = &*self.gate.0;
        // A failing test drops its pauses while it panics: the others must be let go all the same.
        let mut stops = stops.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        stops.all.retain(|stop| stop.id != self.id);
        changed.notify_all();
    }
}
