//! Data that was written and not synced yet, and when the keeper syncs it unasked.
//!
//! What lies in the page cache is the kernel's to write back; the keeper only sees to it that a flush finds little left. A fixed
//! bound does not fit: 64 MiB take 0.4 s on one disk and 30 ms on another, where syncing that often halved the throughput of large
//! writes in place. So the bound is what the device has shown to sync in a second.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A sync is due after this many bytes at the earliest: the bound of a device that nothing is known of.
const DUE_MIN: u64 = 64 << 20;
/// And after this many at the latest, however fast the device. Overwriting the same place again counts each time, so that the
/// measured speed may be too high; this bounds the error.
const DUE_MAX: u64 = 1 << 30;
/// A sync of less says little about the device: its cost is that of the round trip.
const TELLING: u64 = 8 << 20;

/// As much as a sync takes along with its round trip to the device.
const LITTLE: u64 = 256 << 10;
/// A sync of little that is expected to take less than this is not worth a hop to another thread and back, which takes 100 µs.
const SOON_US: u64 = 400;

/// See the module.
#[derive(Debug)]
pub(crate) struct Unsynced {
    /// Bytes written since the last sync of the data file began.
    bytes: AtomicU64,
    due: AtomicU64,
    /// What syncs of little took of late, in microseconds: the mean of the last few.
    little_us: AtomicU64,
}

impl Default for Unsynced {
    fn default() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            due: AtomicU64::new(DUE_MIN),
            little_us: AtomicU64::new(u64::MAX),
        }
    }
}

impl Unsynced {
    /// Counts written data. `true` once: this write has made a sync due.
    pub(crate) fn wrote(&self, bytes: u64) -> bool {
        let (before, due) = (self.bytes.fetch_add(bytes, Relaxed), self.due.load(Relaxed));
        before < due && before + bytes >= due
    }

    pub(crate) fn any(&self) -> bool {
        self.bytes.load(Relaxed) > 0
    }

    pub(crate) fn is_due(&self) -> bool {
        self.bytes.load(Relaxed) >= self.due.load(Relaxed)
    }

    /// A sync begins: gives the bytes that it covers.
    pub(crate) fn begin(&self) -> u64 {
        self.bytes.swap(0, Relaxed)
    }

    /// Whether a sync would be over about as soon as another thread could be asked for it. A device that was slow once is left
    /// to other threads until their syncs were quick again.
    pub(crate) fn syncs_soon(&self) -> bool {
        self.bytes.load(Relaxed) <= LITTLE && self.little_us.load(Relaxed) < SOON_US
    }

    /// The sync of `bytes` took `time`.
    pub(crate) fn ended(&self, bytes: u64, time: Duration) {
        if bytes <= LITTLE {
            let (mean, now) = (self.little_us.load(Relaxed), micros(time));
            let mean = if mean == u64::MAX {
                now
            } else {
                (mean * 7 + now) / 8
            };
            self.little_us.store(mean, Relaxed);
        }
        if bytes >= TELLING {
            let a_second = u128::from(bytes) * 1_000_000 / time.as_micros().max(1);
            let due = u64::try_from(a_second).unwrap_or(DUE_MAX);
            self.due.store(due.clamp(DUE_MIN, DUE_MAX), Relaxed);
        }
    }
}

fn micros(time: Duration) -> u64 {
    // So that the mean of a few cannot overflow.
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).min(1 << 40)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_waited_for_while_it_is_quick() {
        let unsynced = Unsynced::default();
        assert!(!unsynced.syncs_soon(), "nothing is known");
        unsynced.ended(4096, Duration::from_micros(SOON_US / 2));
        assert!(unsynced.syncs_soon());
        unsynced.wrote(LITTLE + 1);
        assert!(!unsynced.syncs_soon(), "much to sync");
        unsynced.ended(unsynced.begin(), Duration::from_secs(1));
        assert!(unsynced.syncs_soon(), "it took long because it was much");
        unsynced.ended(4096, Duration::from_millis(10));
        assert!(!unsynced.syncs_soon(), "slow once");
        for _ in 0..20 {
            unsynced.ended(4096, Duration::from_micros(SOON_US / 2));
        }
        assert!(unsynced.syncs_soon(), "quick again");
    }

    #[test]
    fn the_bound_follows_the_device() {
        let unsynced = Unsynced::default();
        assert!(!unsynced.any() && !unsynced.wrote(DUE_MIN - 1) && unsynced.any());
        assert!(unsynced.wrote(1), "due");
        assert!(unsynced.is_due() && !unsynced.wrote(1), "said once");
        assert_eq!(unsynced.begin(), DUE_MIN + 1);
        assert!(!unsynced.any() && !unsynced.is_due());

        // 64 MiB in a quarter of a second: 256 MiB from now on.
        unsynced.ended(DUE_MIN, Duration::from_millis(250));
        assert!(!unsynced.wrote(4 * DUE_MIN - 1) && unsynced.wrote(1));
        // A slow disk, a very fast one, and what says nothing.
        unsynced.ended(unsynced.begin(), Duration::from_secs(100));
        assert!(unsynced.wrote(DUE_MIN));
        unsynced.ended(unsynced.begin(), Duration::ZERO);
        assert!(!unsynced.wrote(DUE_MAX - 1) && unsynced.wrote(1));
        unsynced.begin();
        unsynced.ended(TELLING - 1, Duration::from_secs(100));
        assert!(!unsynced.wrote(DUE_MAX - 1), "a small sync changed the bound");
    }
}
