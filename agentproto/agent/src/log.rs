//! Logging that never blocks: lines go to a thread of their own that writes them to standard error.
//!
//! Standard error may lead to a file or to a journal on a file system that this very agent has frozen. A thread that
//! has to thaw it must not wait there; when the queue is full, lines are dropped and counted.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait.
const QUEUE_LINES: usize = 1024;

#[derive(Clone)]
struct Queue {
    lines: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

enum Line {
    Text(Vec<u8>),
    /// Everything before this is written: say so.
    Flush(SyncSender<()>),
}

/// One event on its way.
struct Pending<'a> {
    queue: &'a Queue,
    text: Vec<u8>,
}

/// Waits for the last lines when it goes.
pub(crate) struct Flush(Queue);

impl Write for Pending<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self
            .queue
            .lines
            .try_send(Line::Text(std::mem::take(&mut self.text)))
            .is_err()
        {
            self.queue.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Pending<'a>;

    fn make_writer(&'a self) -> Pending<'a> {
        Pending {
            queue: self,
            text: Vec::new(),
        }
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        let (done, wait) = sync_channel(1);
        if self.0.lines.try_send(Line::Flush(done)).is_ok() {
            // Bounded: the last lines are not worth a hanging exit.
            wait.recv_timeout(Duration::from_secs(2)).ok();
        }
    }
}

/// Starts logging. `RUST_LOG` beats the configuration's filter.
pub(crate) fn start(filter: &str) -> anyhow::Result<Flush> {
    let (lines, queue) = sync_channel(QUEUE_LINES);
    let dropped = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&dropped);
    std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_all(&queue, &counter))?;
    let writer = Queue { lines, dropped };
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(filter))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(writer.clone());
    builder
        .try_init()
        .map_err(|error| anyhow::anyhow!("logging cannot be set up: {error}"))?;
    Ok(Flush(writer))
}

fn write_all(queue: &Receiver<Line>, dropped: &AtomicU64) {
    let mut out = io::stderr();
    for line in queue {
        // Standard error that is gone is no reason to stop the agent.
        match line {
            Line::Text(text) => {
                out.write_all(&text).ok();
            }
            Line::Flush(done) => {
                done.try_send(()).ok();
            }
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            writeln!(
                out,
                "{lost} lines of this log were dropped: standard error was blocked"
            )
            .ok();
        }
    }
}
