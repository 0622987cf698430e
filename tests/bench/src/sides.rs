//! The contenders: a plain file, and volumes of a pool beside it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use stillpoint_snapshot::{Checksums, Pool, PoolOptions, SnapshotId, SnapshotSpec, Volume, VolumeSpec};

const PATIENCE: Duration = Duration::from_secs(600);

/// Something that takes blocks.
pub(crate) trait Side {
    fn write(&self, offset: u64, data: &[u8]) -> anyhow::Result<()>;
    fn read(&self, offset: u64, buf: &mut [u8]) -> anyhow::Result<()>;
    fn flush(&self) -> anyhow::Result<()>;
}

impl Side for File {
    fn write(&self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        Ok(self.write_all_at(data, offset)?)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> anyhow::Result<()> {
        Ok(self.read_exact_at(buf, offset)?)
    }

    fn flush(&self) -> anyhow::Result<()> {
        Ok(self.sync_data()?)
    }
}

/// As the daemon does it: in place without waiting where that is possible, else the long way.
impl Side for Volume {
    fn write(&self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        if self.try_write(offset, data)? {
            return Ok(());
        }
        Ok(Self::write(self, offset, data, false)?)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> anyhow::Result<()> {
        if self.try_read(offset, buf)? {
            return Ok(());
        }
        Ok(Self::read(self, offset, buf)?)
    }

    fn flush(&self) -> anyhow::Result<()> {
        Ok(Self::flush(self)?)
    }
}

/// A directory with a file and a pool.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    pub(crate) pool: Pool,
}

impl Place {
    pub(crate) fn new(parent: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("bench-")
            .tempdir_in(parent)
            .with_context(|| format!("a directory in {}", parent.display()))?;
        let pool = Pool::create(&dir.path().join("pool"), &PoolOptions::default())?;
        Ok(Self { dir, pool })
    }

    pub(crate) fn file(&self, bytes: u64, fill: u64) -> anyhow::Result<File> {
        let path = self.dir.path().join("file");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        fill_up(&file, bytes, fill)?;
        Ok(file)
    }

    pub(crate) fn volume(
        &self,
        name: &str,
        bytes: u64,
        fill: u64,
        checksums: Checksums,
    ) -> anyhow::Result<Volume> {
        let volume = self.pool.create_volume(&VolumeSpec {
            name: name.to_owned(),
            size_bytes: bytes,
            block_size: 512,
            attributes: Vec::new(),
        })?;
        volume.set_checksums(checksums)?;
        fill_up(&volume, bytes, fill)?;
        Ok(volume)
    }

    pub(crate) fn snapshot(&self, volume: &Volume, name: &str) -> anyhow::Result<SnapshotId> {
        let spec = SnapshotSpec {
            name: name.to_owned(),
            ..SnapshotSpec::default()
        };
        let made = self.pool.begin_cut(&[volume.id()], &spec)?.commit()?;
        Ok(made.first().context("one volume was cut")?.id)
    }

    /// Waits until what was deleted is free.
    pub(crate) fn settle(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.pool.stats().jobs > 0 {
            anyhow::ensure!(begun.elapsed() < PATIENCE, "the deletions do not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(self.pool.flush()?)
    }

    /// Records the checksums of what snapshots hold now, which the pool does at leisure.
    pub(crate) fn seal(&self) -> anyhow::Result<()> {
        while self.pool.run_sealing(64)? > 0 {}
        Ok(self.pool.flush()?)
    }
}

fn fill_up(side: &dyn Side, bytes: u64, fill: u64) -> anyhow::Result<()> {
    let data = vec![0x5a; usize::try_from(fill)?];
    for (count, offset) in (0..bytes / fill).map(|index| index * fill).enumerate() {
        side.write(offset, &data)?;
        if count % 4096 == 4095 {
            side.flush()?;
        }
    }
    side.flush()
}
