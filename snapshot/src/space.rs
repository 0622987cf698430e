//! Whether there is room for new data: the file system must never become so full that the metadata store cannot
//! commit (FORMAT.md, "Space").

use std::time::{Duration, Instant};

use crate::disk::Disk;

const ASK_EVERY: Duration = Duration::from_millis(250);
/// Percent of what the pool can hold at which operators and initiators are told.
pub(crate) const THRESHOLDS: [u8; 3] = [75, 85, 95];
/// A threshold is over when the pool is more than this many percent below it: use that swings around it tells nobody twice.
const HYSTERESIS: u8 = 3;

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
    /// When the last shortage began.
    pub(crate) out_since: Option<Instant>,
    /// Ask at every allocation (deterministic tests).
    always: bool,
    /// How many of [`THRESHOLDS`] the pool has passed.
    passed: usize,
}

/// A threshold that was passed, or is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    pub(crate) percent: u8,
    pub(crate) reached: bool,
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
            out_since: None,
            always,
            passed: 0,
        }
    }

    /// The highest threshold that the pool has passed, in percent.
    pub(crate) fn threshold(&self) -> u8 {
        self.passed
            .checked_sub(1)
            .and_then(|i| THRESHOLDS.get(i))
            .copied()
            .unwrap_or(0)
    }

    /// Compares with the thresholds; gives the highest that was passed since the last look, or the lowest that is over.
    pub(crate) fn cross(&mut self, used: u64, available: u64) -> Option<Passed> {
        let percent = fullness(used, available);
        let reached = THRESHOLDS.iter().take_while(|t| percent >= **t).count();
        let kept = THRESHOLDS
            .iter()
            .take_while(|t| percent >= **t - HYSTERESIS)
            .count();
        let (before, now) = (self.passed, self.passed.max(reached).min(kept.max(reached)));
        self.passed = now;
        let told = if now > before { now - 1 } else { now };
        let percent = *THRESHOLDS.get(told)?;
        (now != before).then_some(Passed {
            percent,
            reached: now > before,
        })
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

/// What is left of so many bytes when each threshold is reached.
pub(crate) fn room_at_thresholds(all_bytes: u64) -> [u64; 3] {
    THRESHOLDS.map(|percent| {
        let left = u128::from(all_bytes) * u128::from(100 - percent) / 100;
        u64::try_from(left).unwrap_or(u64::MAX)
    })
}

/// Percent in use of what the pool can hold.
fn fullness(used: u64, available: u64) -> u8 {
    let all = u128::from(used) + u128::from(available);
    let percent = (u128::from(used) * 100).checked_div(all).unwrap_or(100);
    u8::try_from(percent).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_at_a_threshold_is_where_it_is_told() {
        for all in [1000, 100, 64 << 20, u64::MAX] {
            for (percent, room) in THRESHOLDS.into_iter().zip(room_at_thresholds(all)) {
                assert_eq!(fullness(all - room, room), percent, "{all}");
                assert!(fullness(all - room - all / 100 - 1, room + all / 100 + 1) < percent);
            }
        }
    }

    #[test]
    fn thresholds_are_told_once_and_end_with_hysteresis() {
        let mut space = Space::new(4096, 0, true);
        let mut at = |used| space.cross(used, 1000 - used).map(|p| (p.percent, p.reached));
        assert_eq!(at(749), None);
        assert_eq!(at(750), Some((75, true)));
        for used in [760, 740, 750, 721, 849] {
            assert_eq!(at(used), None, "{used}: told already");
        }
        assert_eq!(at(960), Some((95, true)), "the highest of several");
        assert_eq!(at(930), None);
        assert_eq!(at(910), Some((95, false)));
        assert_eq!(at(990), Some((95, true)));
        assert_eq!(at(800), Some((85, false)), "the lowest of several");
        assert_eq!(at(700), Some((75, false)));
        assert_eq!(at(0), None);
        assert_eq!(space.threshold(), 0);
        assert_eq!(
            space.cross(0, 0).map(|p| p.percent),
            Some(95),
            "no room at all is full"
        );
    }
}
