//! The threads that serve connections.
//!
//! Each has a runtime of its own, and a connection stays on the thread that it was given to: its readiness, its protocol state
//! and, for cached data, its I/O all happen there without a hop. On the shared runtime every readiness woke a second worker that
//! took over the polling: a 4 KiB read at queue depth 1 took 79-100 µs instead of 25, most of it spent on waking threads.
//!
//! What may block goes to the shared runtime's workers, and so does everything else that the daemon does.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use tokio::runtime::{Builder, Handle};

/// More threads than this share few LUNs only to wait for one another.
const THREADS_MAX: usize = 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct Reactors {
    threads: Vec<Reactor>,
    /// Connections that watch instead of sleeping.
    watching: AtomicUsize,
    watching_max: usize,
}

/// The right to keep a processor busy while waiting; see `session::watch`. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Watching<'a>(&'a AtomicUsize);

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[derive(Debug)]
struct Reactor {
    handle: Handle,
    /// Connections that it serves.
    load: Arc<AtomicUsize>,
}

/// A connection's place on one of the threads; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    handle: Handle,
    load: Arc<AtomicUsize>,
}

impl Reactors {
    /// Starts one thread for each processor. They live as long as the process.
    ///
    /// # Errors
    /// The system gives no more threads or file descriptors.
    pub(crate) fn start() -> io::Result<Self> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..processors.min(THREADS_MAX)).map(Reactor::start);
        Ok(Self {
            threads: threads.collect::<io::Result<_>>()?,
            watching: AtomicUsize::new(0),
            watching_max: processors / 2,
        })
    }

    /// The right to watch, unless half of the processors watch already.
    pub(crate) fn watch(&self) -> Option<Watching<'_>> {
        let free = |watching| (watching < self.watching_max).then_some(watching + 1);
        let taken = self.watching.fetch_update(Relaxed, Relaxed, free);
        // Lazily: one that is made and thrown away would give back a right that it never had.
        taken.is_ok().then(|| Watching(&self.watching))
    }

    /// A place on the thread that serves the fewest connections.
    pub(crate) fn place(&self) -> Place {
        let least = self
            .threads
            .iter()
            .min_by_key(|reactor| reactor.load.load(Relaxed));
        let Reactor { handle, load } = least.expect("at least one thread was started");
        load.fetch_add(1, Relaxed);
        Place {
            handle: handle.clone(),
            load: Arc::clone(load),
        }
    }
}

impl Reactor {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        thread::Builder::new()
            .name(format!("stillpoint-net{number}"))
            .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
        Ok(Self {
            handle,
            load: Arc::default(),
        })
    }
}

impl Place {
    /// The thread's runtime.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Whether the thread serves no other connection.
    pub(crate) fn is_alone(&self) -> bool {
        self.load.load(Relaxed) == 1
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_right_to_watch_gives_nothing_back() {
        let reactors = Reactors {
            threads: Vec::new(),
            watching: AtomicUsize::new(0),
            watching_max: 1,
        };
        let first = reactors.watch();
        assert!(first.is_some());
        for _ in 0..3 {
            assert!(reactors.watch().is_none());
            assert_eq!(reactors.watching.load(Relaxed), 1);
        }
        drop(first);
        assert_eq!(reactors.watching.load(Relaxed), 0);
        assert!(reactors.watch().is_some());
    }
}
