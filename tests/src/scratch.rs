//! A story's own directory and ports.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// First port tried, and how many there are: below the ephemeral range, so that no outgoing connection takes a port while
/// its daemon is being restarted.
const PORTS: (u16, u16) = (12_000, 20_000);
/// Lines of each log shown when a story fails.
const TAIL_LINES: usize = 80;

/// A directory that goes away with the story. Short, because a control socket's path may have 107 bytes.
#[derive(Debug)]
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("sp-")
            .tempdir()
            .context("cannot make a scratch directory")?;
        Ok(Self { dir })
    }

    /// A scratch directory in a place of its own, for a benchmark that names the file system.
    ///
    /// # Errors
    /// It cannot be made there.
    pub fn below(parent: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("sp-")
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        Ok(Self { dir })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tails(&self) -> String {
        let mut logs: Vec<PathBuf> = fs::read_dir(self.path())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "log"))
            .collect();
        logs.sort();
        let mut text = String::new();
        for log in logs {
            let bytes = fs::read(&log).unwrap_or_default();
            let all = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = all.lines().collect();
            let shown = lines.iter().skip(lines.len().saturating_sub(TAIL_LINES));
            text.push_str(&format!("--- {} (end) ---\n", log.display()));
            shown.for_each(|line| text.push_str(&format!("{line}\n")));
        }
        text
    }
}

/// Runs a story in a scratch directory. When it fails, the ends of all `*.log` files there go to standard error.
///
/// # Panics
/// The story failed: that is how a test says so.
pub fn story(name: &str, body: impl FnOnce(&Scratch) -> Result<()>) {
    let started = Instant::now();
    let scratch = Scratch::new().expect("a scratch directory");
    if let Err(error) = body(&scratch) {
        eprintln!("{}", scratch.tails());
        panic!("story {name}: {error:#}");
    }
    println!("story {name}: {:.1} s", started.elapsed().as_secs_f64());
}

/// A TCP port of the loopback that nobody listens on.
///
/// # Errors
/// None of the range is free.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let (first, count) = PORTS;
    // Test programs of one run start at different places; within one program the counter goes on.
    let salt = u16::try_from(std::process::id().wrapping_mul(641) % u32::from(count)).unwrap_or(0);
    for _ in 0..count {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = first + salt.wrapping_add(step) % count;
        let free =
            TcpListener::bind(("127.0.0.1", port)).is_ok() && TcpListener::bind(("0.0.0.0", port)).is_ok();
        if free {
            return Ok(port);
        }
    }
    bail!("no free TCP port from {first} on")
}
