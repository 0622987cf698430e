//! Whether there is room for new data: the file system must never become so full that the metadata store cannot
//! commit (FORMAT.md, "Space").

use std::time::{Duration, Instant};

use crate::disk::Disk;

const ASK_EVERY: Duration = Duration::from_millis(250);

/// What was last seen of the file system.
#[derive(Debug)]
pub(crate) struct Space {
    grain_bytes: u64,
    min_free: u64,
    /// Bytes of the metadata store; it may need as much again before its own garbage is collected.
    pub(crate) metadata_bytes: u64,
    pub(crate) free: u64,
    /// Bytes handed out since `free` was read.
    handed_out: u64,
    asked: Option<Instant>,
    /// Writes that need a grain are being refused.
    pub(crate) out: bool,
    /// Ask at every allocation (deterministic tests).
    always: bool,
}

impl Space {
    pub(crate) fn new(grain_bytes: u32, min_free: u64, always: bool) -> Self {
        Self {
            grain_bytes: grain_bytes.into(),
            min_free,
            metadata_bytes: 0,
            free: 0,
            handed_out: 0,
            asked: None,
            out: false,
            always,
        }
    }

    /// Free bytes below which nothing new is allocated.
    pub(crate) fn headroom(&self) -> u64 {
        self.min_free.max(self.metadata_bytes)
    }

    /// Whether one more grain may be allocated. Asks the file system at most four times a second, more often when
    /// a quarter of the room may be gone.
    pub(crate) fn room(&mut self, disk: &dyn Disk) -> bool {
        let usable = self.free.saturating_sub(self.headroom());
        let fresh = self.asked.is_some_and(|t| t.elapsed() < ASK_EVERY);
        if self.always || !fresh || self.handed_out > usable / 4 {
            self.ask(disk);
        }
        let room = self.free >= self.headroom() + self.handed_out + self.grain_bytes;
        if room {
            self.handed_out += self.grain_bytes;
        }
        room
    }

    /// Reads the file system's free space again. If it cannot be read, the last answer stands.
    pub(crate) fn ask(&mut self, disk: &dyn Disk) {
        match disk.free_bytes() {
            Ok(free) => {
                self.free = free;
                self.handed_out = 0;
            }
            Err(e) => tracing::warn!("cannot read the free space of the pool's file system: {e}"),
        }
        self.asked = Some(Instant::now());
    }

    /// Whether there is clearly room again.
    pub(crate) fn recovered(&mut self, disk: &dyn Disk) -> bool {
        self.ask(disk);
        self.free >= self.headroom() + 16 * self.grain_bytes
    }
}
