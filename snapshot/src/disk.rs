//! The data file seam: what the store asks of the medium that holds superblocks and grains.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::ReadWriteFlags;

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
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// Opens an existing file for reading only: every write then fails.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open_read_only(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
            path: path.to_owned(),
        })
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
        let bufs = [io::IoSlice::new(data)];
        match rustix::io::pwritev2(&self.file, &bufs, offset, ReadWriteFlags::NOWAIT) {
            Ok(n) => Ok(n == data.len()),
            Err(e) if would_block(e) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
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
fn would_block(e: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [
        Errno::AGAIN,
        Errno::OPNOTSUPP,
        Errno::INTR,
        Errno::INVAL,
        Errno::NOSYS,
    ]
    .contains(&e)
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
}
