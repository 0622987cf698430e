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
pub(crate) struct Reactors(Vec<Reactor>);

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
        let threads = thread::available_parallelism()
            .map_or(1, usize::from)
            .min(THREADS_MAX);
        (0..threads)
            .map(Reactor::start)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// A place on the thread that serves the fewest connections.
    pub(crate) fn place(&self) -> Place {
        let least = self.0.iter().min_by_key(|reactor| reactor.load.load(Relaxed));
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
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Relaxed);
    }
}
