//! The data file seam: what the store asks of the medium that holds superblocks and grains.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

/// A flat array of bytes with explicit durability. All calls may come from many threads at once.
///
/// After [`Disk::sync_data`] has failed, nothing may be concluded from a later success: the store never calls it again.
pub trait Disk: Send + Sync {
    /// Fills `buf` from `offset`. Bytes beyond the end read as zeroes.
    ///
    /// # Errors
    /// What the operating system says; the buffer's content is then undefined.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Like [`Disk::read_at`] but gives `false` instead of waiting for a device. `buf` is then undefined.
    ///
    /// # Errors
    /// As [`Disk::read_at`].
    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool>;

    /// Writes all of `data` at `offset`, growing the file as needed. Not durable until [`Disk::sync_data`].
    ///
    /// # Errors
    /// What the operating system says; any part of `data` may have been written.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Like [`Disk::write_at`] but gives `false` instead of waiting; some of `data` may have been written then.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    fn try_write_at(&self, offset: u64, data: &[u8]) -> io::Result<bool>;

    /// Makes every write that returned before this call durable, the file's size included (fdatasync).
    ///
    /// # Errors
    /// Some of those writes may be lost.
    fn sync_data(&self) -> io::Result<()>;

    /// Whether [`Disk::sync_data`] never waits for anything, because there is no device.
    fn syncs_at_once(&self) -> bool {
        false
    }

    /// Gives the range back to the file system; it reads as zeroes afterwards.
    ///
    /// # Errors
    /// `Unsupported` when the medium cannot; the range is then unchanged.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Size in bytes.
    ///
    /// # Errors
    /// What the operating system says.
    fn size(&self) -> io::Result<u64>;

    /// Bytes that may still be allocated on the medium.
    ///
    /// # Errors
    /// What the operating system says.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// The data file of a pool on a local file system, through the page cache.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    path: PathBuf,
    patience: Patience,
}

impl FileDisk {
    /// Makes a new file; fails when it exists.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        Ok(Self::over(file, path))
    }

    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self::over(file, path))
    }

    /// Opens an existing file for reading only: every write then fails.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open_read_only(path: &Path) -> io::Result<Self> {
        Ok(Self::over(File::open(path)?, path))
    }

    fn over(file: File, path: &Path) -> Self {
        Self {
            patience: Patience::of(&file),
            file,
            path: path.to_owned(),
        }
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Disk for FileDisk {
    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = buf.get_mut(n..).unwrap_or_default();
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.patience.in_ram {
            return self.read_at(offset, buf).map(|()| true);
        }
        let len = buf.len();
        let mut bufs = [io::IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.file, &mut bufs, offset, ReadWriteFlags::NOWAIT) {
            Ok(n) => Ok(n == len),
            Err(e) if would_block(e) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        if self.patience.in_ram {
            return self.write_at(offset, data).map(|()| true);
        }
        if self.patience.refuses_nowait.load(Relaxed) {
            return self.patience.write(&self.file, offset, data);
        }
        let bufs = [io::IoSlice::new(data)];
        match rustix::io::pwritev2(&self.file, &bufs, offset, ReadWriteFlags::NOWAIT) {
            Ok(n) => Ok(n == data.len()),
            Err(Errno::OPNOTSUPP) => {
                self.patience.refuses_nowait.store(true, Relaxed);
                self.patience.write(&self.file, offset, data)
            }
            Err(e) if would_block(e) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn syncs_at_once(&self) -> bool {
        self.patience.in_ram
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let s = rustix::fs::fstatvfs(&self.file)?;
        Ok(s.f_bavail.saturating_mul(s.f_frsize))
    }
}

/// EOPNOTSUPP: a file system without RWF_NOWAIT for this direction; the caller's slow path works everywhere.
fn would_block(e: Errno) -> bool {
    [
        Errno::AGAIN,
        Errno::OPNOTSUPP,
        Errno::INTR,
        Errno::INVAL,
        Errno::NOSYS,
    ]
    .contains(&e)
}

/// Memory pages: a write of whole ones needs nothing from the device.
const MEMORY_PAGE: u64 = 4096;
/// A write into the page cache that took longer than this has waited for something.
const SLOW: Duration = Duration::from_millis(2);
/// After a slow write the next ones wait elsewhere for at least, and at most, this long.
const AWAY_MIN: Duration = Duration::from_millis(50);
const AWAY_MAX: Duration = Duration::from_secs(10);

/// How far a file's writes may be trusted not to wait.
///
/// ext4 knows RWF_NOWAIT for reads only. Its buffered writes of whole memory pages wait for nothing but the writeback's
/// throttling (up to 200 ms at a time, while more is dirty than the system allows) and a busy journal. So they are made in
/// place until one is slow; then nobody tries for a while, twice as long each time that the first try is slow again.
#[derive(Debug)]
struct Patience {
    /// tmpfs or ramfs: no RWF_NOWAIT at all, and no device to wait for.
    in_ram: bool,
    refuses_nowait: AtomicBool,
    since: Instant,
    /// Milliseconds after `since` until which writes wait elsewhere.
    away_until: AtomicU64,
    away_ms: AtomicU64,
}

impl Patience {
    fn of(file: &File) -> Self {
        const TMPFS: u64 = 0x0102_1994;
        const RAMFS: u64 = 0x8584_58f6;
        let kind = rustix::fs::fstatfs(file).map_or(0, |fs| u64::try_from(fs.f_type).unwrap_or(0));
        Self {
            in_ram: [TMPFS, RAMFS].contains(&kind),
            refuses_nowait: AtomicBool::new(false),
            since: Instant::now(),
            away_until: AtomicU64::new(0),
            away_ms: AtomicU64::new(0),
        }
    }

    fn write(&self, file: &File, offset: u64, data: &[u8]) -> io::Result<bool> {
        let started = Instant::now();
        let whole = offset.is_multiple_of(MEMORY_PAGE) && (data.len() as u64).is_multiple_of(MEMORY_PAGE);
        if !whole || millis(started - self.since) < self.away_until.load(Relaxed) {
            return Ok(false);
        }
        file.write_all_at(data, offset)?;
        self.took(started.elapsed(), millis(started - self.since));
        Ok(true)
    }

    /// A write that began `at_ms` took this long.
    fn took(&self, time: Duration, at_ms: u64) {
        let away = self.away_ms.load(Relaxed);
        if time >= SLOW {
            let away = (away * 2).clamp(millis(AWAY_MIN), millis(AWAY_MAX));
            self.away_ms.store(away, Relaxed);
            self.away_until.store(at_ms + millis(time) + away, Relaxed);
        } else if away > 0 && at_ms > self.away_until.load(Relaxed) + away {
            // As long well as it was away: what made it slow is over.
            self.away_ms.store(0, Relaxed);
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_written_and_zeroes_beyond() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(&dir.path().join("data")).unwrap();
        disk.write_at(10, b"abc").unwrap();
        let mut buf = [9u8; 8];
        disk.read_at(9, &mut buf).unwrap();
        assert_eq!(&buf, b"\0abc\0\0\0\0");
        assert!(
            FileDisk::create(&dir.path().join("data")).is_err(),
            "create never truncates"
        );
        disk.sync_data().unwrap();
        assert_eq!(disk.size().unwrap(), 13);
        assert!(disk.free_bytes().unwrap() > 0);
    }

    #[test]
    fn a_slow_write_sends_the_next_ones_away_for_longer_and_longer() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("data")).unwrap();
        let patience = Patience::of(&file);
        let away = || patience.away_until.load(Relaxed);
        let (fast, slow) = (Duration::from_micros(9), Duration::from_millis(30));
        patience.took(fast, 10);
        assert_eq!(away(), 0);
        patience.took(slow, 1_000);
        assert_eq!(away(), 1_000 + 30 + 50);
        patience.took(slow, 2_000);
        assert_eq!(away(), 2_000 + 30 + 100, "the first try was slow again");
        (0..20).for_each(|i| patience.took(slow, 10_000 * i));
        assert_eq!(away(), 190_000 + 30 + 10_000, "but never longer than this");
        patience.took(fast, 199_000 + 30);
        patience.took(slow, 200_031);
        assert_eq!(away(), 200_031 + 30 + 10_000, "one fast write proves little");
        patience.took(fast, 300_000);
        patience.took(slow, 300_001);
        assert_eq!(
            away(),
            300_001 + 30 + 50,
            "it was well for as long as it was away"
        );
    }

    #[test]
    fn parts_of_memory_pages_are_never_written_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(&dir.path().join("data")).unwrap();
        let write = |offset, len| disk.patience.write(&disk.file, offset, &vec![1; len]).unwrap();
        assert!(write(0, 4096) && write(8192, 8192));
        assert!(
            !write(512, 4096) && !write(0, 512),
            "these may need the rest of the page from the device"
        );
        disk.patience.away_until.store(u64::MAX, Relaxed);
        assert!(!write(0, 4096));
    }
}
