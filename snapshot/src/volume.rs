//! A volume: bytes in, bytes out. Overwrites in place what nothing holds, redirects the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::inner::Inner;
use crate::lock::{Mode, RangeGuard, RangeLocks};
use crate::types::{BranchId, Caw, Checksums, Extent, ExtentKind, VolumeId, VolumeInfo, VolumeSpace, limits};
use crate::{Error, Result};

mod copy;
mod grains;
mod runs;

pub use copy::CopySource;
use runs::part;
pub(crate) use runs::{Extents, Runs, kind_of};

/// Largest span whose range is locked at once by a zeroing command: others get their turn in between.
const ZERO_SLICE_BYTES: u64 = 64 << 20;
/// Up to here explicit zeroes are recorded grain by grain; of longer ranges what was never written stays unmapped.
const EXPLICIT_ZERO_BYTES: u64 = 64 << 20;
/// Pages that one question for the status looks at.
const STATUS_PAGES: usize = 4096;
/// Largest transfer that the non-blocking calls try.
const TRY_BYTES: u64 = 1 << 20;

/// What all handles of a volume share. Its head changes at a revert, under the exclusive lock of the whole volume.
pub(crate) struct Shared {
    pub(crate) id: VolumeId,
    pub(crate) locks: RangeLocks,
    head: AtomicU32,
    size: AtomicU64,
    block_size: AtomicU32,
    pub(crate) read_only: AtomicBool,
    /// Discriminant of [`Checksums`].
    checksums: AtomicU8,
    gone: AtomicBool,
}

impl Shared {
    pub(crate) fn new(id: VolumeId, head: BranchId, size: u64, block_size: u32, read_only: bool) -> Self {
        Self {
            id,
            locks: RangeLocks::default(),
            head: AtomicU32::new(head.0),
            size: AtomicU64::new(size),
            block_size: AtomicU32::new(block_size),
            read_only: AtomicBool::new(read_only),
            checksums: AtomicU8::new(mode_number(Checksums::default())),
            gone: AtomicBool::new(false),
        }
    }

    pub(crate) fn with_checksums(self, mode: Checksums) -> Self {
        self.set_checksums(mode);
        self
    }

    pub(crate) fn checksums(&self) -> Checksums {
        let mode = self.checksums.load(Ordering::Acquire);
        let known = [Checksums::Off, Checksums::Always].into_iter();
        known
            .into_iter()
            .find(|m| mode_number(*m) == mode)
            .unwrap_or_default()
    }

    pub(crate) fn set_checksums(&self, mode: Checksums) {
        self.checksums.store(mode_number(mode), Ordering::Release);
    }

    pub(crate) fn head(&self) -> BranchId {
        BranchId(self.head.load(Ordering::Acquire))
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(crate) fn set_size(&self, bytes: u64) {
        self.size.store(bytes, Ordering::Release);
    }

    /// The volume becomes another branch. The caller holds the whole volume exclusively.
    pub(crate) fn switch(&self, head: BranchId, size: u64, block_size: u32) {
        self.set_size(size);
        self.block_size.store(block_size, Ordering::Release);
        self.head.store(head.0, Ordering::Release);
    }

    pub(crate) fn delete(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub(crate) fn alive(&self) -> Result<()> {
        if self.gone.load(Ordering::Acquire) {
            return Err(Error::NotFound {
                what: "the volume (it was deleted)".into(),
            });
        }
        Ok(())
    }
}

/// Handle of a volume. Stays valid over rename, grow and revert; after a delete every call fails with `NotFound`.
#[derive(Clone)]
pub struct Volume {
    pub(crate) pool: Arc<Inner>,
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volume")
            .field("id", &self.shared.id)
            .finish_non_exhaustive()
    }
}

impl Volume {
    /// Stable number.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        self.shared.id
    }

    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shared.size()
    }

    /// Logical block size in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.shared.block_size.load(Ordering::Acquire)
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.shared.read_only.load(Ordering::Acquire)
    }

    /// Name, size, parent and the rest as they are now.
    ///
    /// # Errors
    /// `NotFound` after a delete.
    pub fn info(&self) -> Result<VolumeInfo> {
        self.shared.alive()?;
        let state = self.pool.state();
        Ok(volume_info(
            self.shared.id,
            &state.branch(self.shared.head())?.record,
            self.pool.grain_bytes,
        ))
    }

    /// What the volume uses and what the pool has left for it. Asks the file system.
    ///
    /// # Errors
    /// `NotFound` after a delete.
    pub fn space(&self) -> Result<VolumeSpace> {
        let used_bytes = self.info()?.mapped_bytes;
        Ok(VolumeSpace {
            used_bytes,
            available_bytes: self.pool.available_bytes(),
        })
    }

    /// Whether a write that was refused for want of space may succeed in a moment: a deletion frees some right now.
    #[must_use]
    pub fn makes_room(&self) -> bool {
        self.pool.makes_room()
    }

    /// Name.
    ///
    /// # Errors
    /// `NotFound` after a delete.
    pub fn name(&self) -> Result<String> {
        Ok(self.info()?.name)
    }

    /// Fills `buf` from `offset` (bytes). What was never written reads as zeroes.
    ///
    /// # Errors
    /// `OutOfRange`, `NotFound` after a delete, `Medium` when the data cannot be read, `Corrupt` when the map cannot.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let _range = self.lock(offset, buf.len() as u64, Mode::Shared)?;
        self.read_locked(offset, buf)
    }

    /// Like [`Volume::read`], but gives `false` instead of waiting for a lock, the map or a device.
    ///
    /// # Errors
    /// As [`Volume::read`].
    pub fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        let len = buf.len() as u64;
        let Some(_range) = self.try_lock(offset, len, Mode::Shared)? else {
            return Ok(false);
        };
        let Some(runs) = self.cached_runs(offset, buf.len())? else {
            return Ok(false);
        };
        Ok(self.pool.try_read_runs(&runs, buf))
    }

    /// Writes `data` at `offset` (bytes). With `fua` it is durable on return, otherwise after the next flush.
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `NotFound`, `NoSpace`, `Io`, `Poisoned`. After an error any part may have been written.
    pub fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<()> {
        self.writable()?;
        self.pool.throttle()?;
        {
            let _range = self.lock(offset, data.len() as u64, Mode::Exclusive)?;
            self.write_locked(offset, data)?;
        }
        if fua { self.pool.flush() } else { Ok(()) }
    }

    /// Like [`Volume::write`] without `fua`, but gives `false` instead of waiting: for data that is overwritten in place, and
    /// for whole grains whose map is in RAM, on file systems that can write without waiting. After `false` any part may have
    /// been written.
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn try_write(&self, offset: u64, data: &[u8]) -> Result<bool> {
        self.writable()?;
        self.pool.poison.check()?;
        let Some(_range) = self.try_lock(offset, data.len() as u64, Mode::Exclusive)? else {
            return Ok(false);
        };
        let Some(runs) = self.places_in_place(offset, data.len())? else {
            for piece in self.pieces(offset, data.len()) {
                if !self.try_write_piece(&piece, data)? {
                    return Ok(false);
                }
            }
            return Ok(true);
        };
        for (place, buffer) in runs.placed() {
            let part = part(data, buffer);
            let io = |e| Error::io("write", "data file", e);
            if !self.pool.disk.try_write_at(place, part).map_err(io)? {
                return Ok(false);
            }
        }
        self.pool.wrote(data.len() as u64);
        Ok(true)
    }

    /// Makes everything durable that was acknowledged before this call.
    ///
    /// # Errors
    /// `Poisoned`: what was acknowledged since the last flush may be lost.
    pub fn flush(&self) -> Result<()> {
        self.shared.alive()?;
        self.pool.flush()
    }

    /// Like [`Volume::flush`], but gives `false` instead of waiting: for a pool whose map has not changed since the last commit,
    /// in memory or, `if_short`, on a device that has lately synced as little as there is now in less than half a millisecond.
    ///
    /// # Errors
    /// As [`Volume::flush`].
    pub fn try_flush(&self, if_short: bool) -> Result<bool> {
        self.shared.alive()?;
        self.pool.poison.check()?;
        let committed = {
            let state = self.pool.state();
            state.open.is_empty() && state.closing.is_none()
        };
        let soon = self.pool.disk.syncs_at_once() || if_short && self.pool.syncs_soon();
        if !committed || !soon {
            return Ok(false);
        }
        self.pool.sync_data().map(|()| true)
    }

    /// Makes the range read as zeroes: unmapped with `unmap`, otherwise as explicit zeroes that need no grain either
    /// (in ranges above 64 MiB, what was never written stays unmapped).
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.writable()?;
        check_range(offset, len, self.size_bytes())?;
        if len > self.pool.options.tombstone_bytes && self.bury(offset, len, unmap)? {
            return Ok(());
        }
        let skip_absent = unmap || len > EXPLICIT_ZERO_BYTES;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let next = (at - at % ZERO_SLICE_BYTES + ZERO_SLICE_BYTES).min(end);
            self.pool.throttle()?;
            let _range = self.lock(at, next - at, Mode::Exclusive)?;
            self.zero_locked(at..next, unmap, skip_absent)?;
            at = next;
        }
        Ok(())
    }

    /// Unmaps ranges of (offset, length) in bytes. Whole grains are released, the rest is filled with zeroes.
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn unmap(&self, ranges: &[(u64, u64)]) -> Result<()> {
        let size = self.size_bytes();
        ranges
            .iter()
            .try_for_each(|(offset, len)| check_range(*offset, *len, size))?;
        ranges
            .iter()
            .try_for_each(|(offset, len)| self.write_zeroes(*offset, *len, true))
    }

    /// Writes `new` if the bytes there equal `compare` (of the same length); nothing happens in between.
    ///
    /// # Errors
    /// As [`Volume::write`]; `Refused` when the lengths differ.
    pub fn compare_and_write(&self, offset: u64, compare: &[u8], new: &[u8], fua: bool) -> Result<Caw> {
        if compare.len() != new.len() {
            return Err(Error::refused(
                "compare-and-write: both halves must have the same length",
            ));
        }
        self.writable()?;
        self.pool.throttle()?;
        {
            let _range = self.lock(offset, new.len() as u64, Mode::Exclusive)?;
            let mut found = vec![0; compare.len()];
            self.read_locked(offset, &mut found)?;
            if let Some(at) = found.iter().zip(compare).position(|(a, b)| a != b) {
                return Ok(Caw::Miscompare { offset: at as u64 });
            }
            self.write_locked(offset, new)?;
        }
        if fua {
            self.pool.flush()?;
        }
        Ok(Caw::Done)
    }

    /// Sets every bit that is set in `data`; nothing happens between reading and writing.
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn or_write(&self, offset: u64, data: &[u8], fua: bool) -> Result<()> {
        self.writable()?;
        self.pool.throttle()?;
        {
            let _range = self.lock(offset, data.len() as u64, Mode::Exclusive)?;
            let mut merged = vec![0; data.len()];
            self.read_locked(offset, &mut merged)?;
            merged.iter_mut().zip(data).for_each(|(m, d)| *m |= d);
            self.write_locked(offset, &merged)?;
        }
        if fua { self.pool.flush() } else { Ok(()) }
    }

    /// What the range is made of: at most `max` extents from `offset` on, cut at the end of the range, or earlier where
    /// very much of it is written: ask again from there.
    ///
    /// # Errors
    /// `OutOfRange`, `NotFound`, `Corrupt`.
    pub fn lba_status(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        let _range = self.lock(offset, len, Mode::Shared)?;
        let branch = self.shared.head();
        let (mut out, mut at, end) = (Extents::new(max), offset, offset + len);
        let mut looked = 0;
        while at < end {
            looked += 1;
            // Below a tombstone there may be millions of pages that show nothing.
            if looked > STATUS_PAGES && !out.list.is_empty() {
                break;
            }
            let last = self.page_of(end - 1);
            let Some(next) = self.pool.next_present(branch, self.page_of(at), last)? else {
                out.add(at..end, ExtentKind::Hole);
                break;
            };
            let start = u64::from(next) * self.pool.page_bytes();
            if start > at && !out.add(at..start.min(end), ExtentKind::Hole) {
                break;
            }
            let range = at.max(start)..end.min(start + self.pool.page_bytes());
            let page = self.pool.page(branch, next)?;
            if !self.page_extents(&page, start, range.clone(), &mut out) {
                break;
            }
            at = range.end;
        }
        Ok(out.list)
    }

    /// Makes the volume larger. The new part reads as zeroes. Durable on return.
    ///
    /// # Errors
    /// `Refused` when it would shrink or is no multiple of the block size, `Limit`, `Poisoned`.
    pub fn grow(&self, new_size: u64) -> Result<()> {
        // Writers are held until the growth is durable: little should be left to sync by then.
        self.pool.flush()?;
        // Until it is durable no write passes the old end: a kill would take it back, and growing again reads zeroes.
        let _writers = self.shared.locks.lock_all(Mode::Shared);
        self.shared.alive()?;
        let txg = {
            let mut state = self.pool.state();
            let record = state.branch_mut(self.shared.head())?;
            if new_size == record.size_bytes {
                return Ok(());
            }
            if new_size < record.size_bytes {
                return Err(Error::refused(format!(
                    "the volume has {} bytes; shrinking to {new_size} would lose data",
                    record.size_bytes
                )));
            }
            check_size(new_size, record.block_size)?;
            record.size_bytes = new_size;
            self.shared.set_size(new_size);
            state.open.id
        };
        self.pool.commit_through(txg)
    }

    /// When checksums of its grains are recorded.
    #[must_use]
    pub fn checksums(&self) -> Checksums {
        self.shared.checksums()
    }

    /// Records checksums of later writes (`Always`), of what later snapshots hold (`Sealed`), or none. Those that are
    /// recorded stay. Durable on return.
    ///
    /// # Errors
    /// `NotFound` after a delete, `Poisoned`.
    pub fn set_checksums(&self, mode: Checksums) -> Result<()> {
        self.shared.alive()?;
        let txg = {
            let mut state = self.pool.state();
            if state.branch(self.shared.head())?.record.checksums == mode {
                return Ok(());
            }
            let branches: Vec<BranchId> = state.branches_of(self.shared.id).collect();
            for branch in branches {
                state.branch_mut(branch)?.checksums = mode;
            }
            self.shared.set_checksums(mode);
            state.open.id
        };
        self.pool.changed.notify_all();
        self.pool.commit_through(txg)
    }

    /// Replaces the owner's bytes. Durable on return.
    ///
    /// # Errors
    /// `Limit` when they are too long, `NotFound`, `Poisoned`.
    pub fn set_attributes(&self, attributes: &[u8]) -> Result<()> {
        self.shared.alive()?;
        check_attributes(attributes)?;
        let txg = {
            let mut state = self.pool.state();
            state.branch_mut(self.shared.head())?.attributes = attributes.to_vec();
            state.open.id
        };
        self.pool.commit_through(txg)
    }

    fn writable(&self) -> Result<()> {
        if self.is_read_only() {
            Err(Error::ReadOnly)
        } else {
            Ok(())
        }
    }

    /// Locks the grains of a range and checks it: again after the lock, since a revert or a delete may have come
    /// first.
    pub(crate) fn lock(&self, offset: u64, len: u64, mode: Mode) -> Result<RangeGuard<'_>> {
        self.shared.alive()?;
        check_range(offset, len, self.size_bytes())?;
        let guard = self
            .shared
            .locks
            .lock(self.grain_of(offset), self.last_grain(offset, len), mode);
        self.shared.alive()?;
        check_range(offset, len, self.size_bytes())?;
        Ok(guard)
    }

    fn try_lock(&self, offset: u64, len: u64, mode: Mode) -> Result<Option<RangeGuard<'_>>> {
        self.shared.alive()?;
        check_range(offset, len, self.size_bytes())?;
        if len > TRY_BYTES {
            return Ok(None);
        }
        let guard = self
            .shared
            .locks
            .try_lock(self.grain_of(offset), self.last_grain(offset, len), mode);
        self.shared.alive()?;
        check_range(offset, len, self.size_bytes())?;
        Ok(guard)
    }
}

fn mode_number(mode: Checksums) -> u8 {
    match mode {
        Checksums::Off => 0,
        Checksums::Sealed => 1,
        Checksums::Always => 2,
    }
}

pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::OutOfRange { offset, len, size }),
    }
}

pub(crate) fn check_size(bytes: u64, block_size: u32) -> Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(u64::from(block_size)) {
        return Err(Error::refused(format!(
            "a size of {bytes} bytes is no multiple of {block_size}"
        )));
    }
    if bytes > limits::VOLUME_BYTES {
        return Err(Error::Limit {
            what: "bytes of a volume",
            max: limits::VOLUME_BYTES,
        });
    }
    Ok(())
}

pub(crate) fn check_attributes(attributes: &[u8]) -> Result<()> {
    if attributes.len() > limits::ATTRIBUTES_BYTES {
        return Err(Error::Limit {
            what: "bytes of attributes",
            max: limits::ATTRIBUTES_BYTES as u64,
        });
    }
    Ok(())
}

pub(crate) fn volume_info(
    id: VolumeId,
    record: &crate::record::BranchRecord,
    grain_bytes: u32,
) -> VolumeInfo {
    VolumeInfo {
        id,
        name: record.name.clone(),
        size_bytes: record.size_bytes,
        block_size: record.block_size,
        grain_bytes,
        attributes: record.attributes.clone(),
        parent: record.parent,
        read_only: record.read_only,
        checksums: record.checksums,
        mapped_bytes: crate::record::counted(record.mapped_grains) * u64::from(grain_bytes),
        created_ms: record.created_ms,
    }
}
