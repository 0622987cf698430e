//! The memory that all sessions of a daemon share for data on its way.
//!
//! Every session has bounds of its own; with many sessions their sum would have none that a machine could keep. A command takes
//! all the memory that it will need before its first R2T, or before its read starts, so that whoever has begun can always end.
//! Data that comes unasked cannot be refused: it is counted, and a session that holds some while memory is scarce is not read.
//!
//! - The first half of the memory is anybody's. The second half is for sessions below their share: the whole by the number of
//!   sessions. One that wants much cannot keep out those that want little.
//! - What a session holds up to a floor ([`FLOOR`], less of a small memory) it always gets: small commands go on whatever others do.
//! - When all of it is held by commands that have not begun, nobody would ever end. So one session at a time has a turn ([`TURN`]):
//!   if it can do nothing else, it gets what it wants.
//! - Far above the bound, of the sessions whose data was asked for only that one is read: behind such data more may come unasked.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use core::time::Duration;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Bytes that every session may hold.
pub(crate) const FLOOR: usize = 256 << 10;
/// How long a session keeps its turn without making something of it …
const TURN: Duration = Duration::from_secs(2);
/// … and at all. Else it has the turn until it is back at its floor: what it had sent in its turn would stay, and the next one's too.
const TURN_MAX: Duration = Duration::from_secs(10);
/// No session has this id.
const NOBODY: u64 = 0;
/// How often a session that waits looks again, even though nothing came back: its turn may have come.
pub(crate) const RETRY: Duration = Duration::from_secs(1);

/// The session that may go beyond the bound.
#[derive(Debug)]
struct Turn {
    holder: u64,
    began: Instant,
    /// When it last made something of it.
    moved: Instant,
}

/// See the module.
pub struct SharedMemory {
    cap: usize,
    floor: usize,
    used: AtomicUsize,
    sessions: AtomicUsize,
    /// A session found none since the last wake-up.
    waiting: AtomicBool,
    turn: Mutex<Option<Turn>>,
    /// Who has the turn, to look at without the lock.
    holder: AtomicU64,
    last_session: AtomicU64,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory")
            .field("cap", &self.cap)
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}

impl SharedMemory {
    /// Memory of `cap` bytes. `wake` is called when some came back that a session waits for: the owner then calls
    /// [`crate::Connection::memory_freed`] on every connection that says it waits.
    pub fn new(cap: usize, wake: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            cap,
            floor: FLOOR.min(cap / 64),
            used: AtomicUsize::new(0),
            sessions: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            turn: Mutex::new(None),
            holder: AtomicU64::new(NOBODY),
            last_session: AtomicU64::new(0),
            wake: Box::new(wake),
        })
    }

    /// Bytes in use or promised.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(SeqCst)
    }

    fn allows(&self, used: usize, held: usize, bytes: usize) -> bool {
        let share = self.cap / self.sessions.load(SeqCst).max(1);
        held + bytes <= self.floor
            || used + bytes <= self.cap / 2
            || (used + bytes <= self.cap && held + bytes <= share)
    }

    fn try_take(&self, held: usize, bytes: usize) -> bool {
        let taken = self.used.fetch_update(SeqCst, SeqCst, |used| {
            self.allows(used, held, bytes).then_some(used + bytes)
        });
        taken.is_ok()
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, SeqCst);
        if bytes > 0 && self.waiting.swap(false, SeqCst) {
            (self.wake)();
        }
    }

    /// Whether it is this session's turn; with `moves`, it makes something of it.
    fn has_turn(&self, session: u64, now: Instant, moves: bool) -> bool {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Turn { holder, began, moved }) = &mut *turn {
            let still = now.saturating_duration_since(*moved) < TURN
                && now.saturating_duration_since(*began) < TURN_MAX;
            if still {
                if moves && *holder == session {
                    *moved = now;
                }
                return *holder == session;
            }
            if *holder == session {
                // Its time is up: somebody else first.
                *turn = None;
                self.holder.store(NOBODY, SeqCst);
                return false;
            }
        }
        *turn = Some(Turn {
            holder: session,
            began: now,
            moved: now,
        });
        self.holder.store(session, SeqCst);
        true
    }

    fn end_turn(&self, session: u64) {
        if self.holder.load(SeqCst) != session {
            return;
        }
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if turn.take_if(|turn| turn.holder == session).is_some() {
            self.holder.store(NOBODY, SeqCst);
            drop(turn);
            if self.waiting.swap(false, SeqCst) {
                (self.wake)();
            }
        }
    }
}

/// What one session holds of the shared memory; given back when dropped. Without a shared memory there is no bound.
#[derive(Debug)]
pub(crate) struct Share {
    id: u64,
    memory: Option<Arc<SharedMemory>>,
    held: usize,
    /// When to try again although nobody gave anything back; set while something waits.
    pub(crate) retry_at: Option<Instant>,
}

impl Share {
    pub(crate) fn new(memory: Option<Arc<SharedMemory>>) -> Self {
        let mut id = NOBODY;
        if let Some(memory) = &memory {
            memory.sessions.fetch_add(1, SeqCst);
            id = memory.last_session.fetch_add(1, SeqCst) + 1;
        }
        Self {
            id,
            memory,
            held: 0,
            retry_at: None,
        }
    }

    /// Takes `bytes` before they are promised. `idle`: the session can do nothing else.
    pub(crate) fn take(&mut self, now: Instant, bytes: usize, idle: bool) -> bool {
        let Some(memory) = &self.memory else { return true };
        if !memory.try_take(self.held, bytes) {
            // First the flag, then the second look: whatever is given back after that look wakes us.
            memory.waiting.store(true, SeqCst);
            if !memory.try_take(self.held, bytes) {
                if !idle || !memory.has_turn(self.id, now, true) {
                    self.retry_at.get_or_insert(now + RETRY);
                    return false;
                }
                memory.used.fetch_add(bytes, SeqCst);
            }
        }
        self.held += bytes;
        true
    }

    /// Counts `bytes` that came unasked.
    pub(crate) fn force(&mut self, bytes: usize) {
        if let Some(memory) = &self.memory {
            memory.used.fetch_add(bytes, SeqCst);
            self.held += bytes;
        }
    }

    pub(crate) fn give(&mut self, bytes: usize) {
        if let Some(memory) = &self.memory {
            assert!(bytes <= self.held, "gave back more than it held");
            self.held -= bytes;
            memory.give(bytes);
        }
    }

    /// Whether nothing more should be read from this session's peer for now. With data on its way (`expects_data`) only when
    /// there is far too little memory, and then in turns: what was promised ought to come and go.
    pub(crate) fn must_pause(&self, now: Instant, expects_data: bool) -> bool {
        let Some(memory) = &self.memory else { return false };
        if self.held <= memory.floor {
            memory.end_turn(self.id);
            return false;
        }
        if memory.used() < memory.cap {
            return false;
        }
        let far_above = memory.used() >= memory.cap + memory.cap / 2;
        if expects_data && (!far_above || memory.has_turn(self.id, now, false)) {
            return false;
        }
        // First the flag, then the second look, as above.
        memory.waiting.store(true, SeqCst);
        memory.used() >= memory.cap
    }

    /// Whether used buffers should go back to the system instead of being kept.
    pub(crate) fn is_scarce(&self) -> bool {
        self.memory
            .as_ref()
            .is_some_and(|memory| memory.used() > memory.cap / 2)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give(self.held);
        if let Some(memory) = &self.memory {
            memory.sessions.fetch_sub(1, SeqCst);
            memory.end_turn(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    const MIB: usize = 1 << 20;

    fn memory(cap: usize) -> (Arc<SharedMemory>, Arc<AtomicU32>) {
        let wakes = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&wakes);
        let memory = SharedMemory::new(cap, move || {
            counted.fetch_add(1, SeqCst);
        });
        (memory, wakes)
    }

    #[test]
    fn the_second_half_is_for_those_who_hold_little() {
        let (memory, wakes) = memory(8 * MIB);
        let now = Instant::now();
        let mut greedy = Share::new(Some(Arc::clone(&memory)));
        let mut modest = Share::new(Some(Arc::clone(&memory)));
        assert!(greedy.take(now, 4 * MIB, false), "the first half is anybody's");
        assert!(!greedy.take(now, MIB, false), "its share is 4 MiB");
        assert!(modest.take(now, 4 * MIB, false));
        assert!(!modest.take(now, MIB, false), "all is used");
        assert_eq!(wakes.load(SeqCst), 0);
        greedy.give(2 * MIB);
        assert_eq!(wakes.load(SeqCst), 1, "somebody waits");
        greedy.give(MIB);
        assert_eq!(wakes.load(SeqCst), 1, "nobody has asked since");
        drop(modest);
        drop(greedy);
        assert_eq!((memory.used(), memory.sessions.load(SeqCst)), (0, 0));
    }

    #[test]
    fn little_is_always_to_be_had_and_much_once_in_a_while() {
        let (memory, _) = memory(16 * MIB);
        let now = Instant::now();
        let mut hog = Share::new(Some(Arc::clone(&memory)));
        hog.force(100 * MIB);
        let mut small = Share::new(Some(Arc::clone(&memory)));
        assert!(small.take(now, FLOOR, false));
        assert!(!small.take(now, 1, false), "beyond the floor it waits");
        assert_eq!(small.retry_at, Some(now + RETRY));
        assert!(!small.must_pause(now, false), "at the floor it is read");
        let mut large = Share::new(Some(Arc::clone(&memory)));
        assert!(!large.take(now, 32 * MIB, false));
        assert!(large.take(now, 32 * MIB, true), "it can do nothing else");
        assert!(!hog.take(now, MIB, true), "one at a time");
        assert!(hog.take(now + TURN, MIB, true));
        assert!(hog.must_pause(now, false) && hog.is_scarce());
    }

    #[test]
    fn sessions_whose_data_is_on_its_way_are_read_longer_and_then_in_turns() {
        let (memory, wakes) = memory(4 * MIB);
        let now = Instant::now();
        let mut one = Share::new(Some(Arc::clone(&memory)));
        let mut other = Share::new(Some(Arc::clone(&memory)));
        one.force(2 * MIB);
        other.force(2 * MIB);
        assert!(one.must_pause(now, false) && !one.must_pause(now, true));
        other.force(2 * MIB);
        assert!(!one.must_pause(now, true), "it is the first to ask");
        assert!(other.must_pause(now, true) && !one.must_pause(now, true));
        assert!(one.must_pause(now + TURN, true), "its time is up");
        assert!(!other.must_pause(now + TURN, true) && one.must_pause(now + TURN, true));
        one.force(4 * MIB);
        other.give(4 * MIB);
        let before = wakes.load(SeqCst);
        assert!(one.must_pause(now + TURN, true), "it waits");
        assert!(!other.must_pause(now + TURN, true), "at its floor");
        assert_eq!(wakes.load(SeqCst), before + 1, "its turn is over");
        assert!(!one.must_pause(now + TURN, true));
        one.give(4 * MIB);
        assert!(!one.must_pause(now, false) && !other.must_pause(now, false));
    }
}
