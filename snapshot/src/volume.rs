//! A volume: bytes in, bytes out. Overwrites in place what nothing holds, redirects the rest.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::alloc::Need;
use crate::inner::Inner;
use crate::lock::{Mode, RangeGuard, RangeLocks};
use crate::page::{Entry, PAGE_ENTRIES, Page, PageNo};
use crate::state::State;
use crate::types::{BranchId, Caw, Extent, ExtentKind, VolumeId, VolumeInfo, VolumeSpace, limits};
use crate::{Error, Result};

/// Largest span whose range is locked at once by a zeroing command: others get their turn in between.
const ZERO_SLICE_BYTES: u64 = 1 << 30;
/// Up to here explicit zeroes are recorded grain by grain; of longer ranges what was never written stays unmapped.
const EXPLICIT_ZERO_BYTES: u64 = 64 << 20;
/// Largest transfer that the non-blocking calls try.
const TRY_BYTES: u64 = 256 << 10;

/// What all handles of a volume share. Its head changes at a revert, under the exclusive lock of the whole volume.
pub(crate) struct Shared {
    pub(crate) id: VolumeId,
    pub(crate) locks: RangeLocks,
    head: AtomicU32,
    size: AtomicU64,
    block_size: AtomicU32,
    pub(crate) read_only: AtomicBool,
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
            gone: AtomicBool::new(false),
        }
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

/// A part of an operation that lies in one map page.
struct Piece {
    page: PageNo,
    /// Bytes within the page.
    within: Range<u64>,
    /// Bytes within the operation's buffer.
    buffer: Range<usize>,
}

/// A place in the data file and the bytes of the buffer that go there.
type Placed = (u64, Range<usize>);

/// What happens to one grain of a write.
struct Step {
    index: u8,
    old: Entry,
    /// Where the data goes.
    grain: u64,
    /// Overwritten in place: the map does not change.
    in_place: bool,
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
        for run in runs {
            let part = part_mut(buf, run.buffer);
            match run.place {
                None => part.fill(0),
                Some(place) => match self.pool.disk.try_read_at(place, part) {
                    Ok(true) => {}
                    Ok(false) => return Ok(false),
                    Err(_) => return Err(Error::Medium { offset: run.offset }),
                },
            }
        }
        Ok(true)
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

    /// Like [`Volume::write`] without `fua`, but gives `false` instead of waiting: only for data that is overwritten
    /// in place, on file systems that can write without waiting. After `false` any part may have been written.
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn try_write(&self, offset: u64, data: &[u8]) -> Result<bool> {
        self.writable()?;
        self.pool.poison.check()?;
        let Some(_range) = self.try_lock(offset, data.len() as u64, Mode::Exclusive)? else {
            return Ok(false);
        };
        let Some(places) = self.places_in_place(offset, data.len())? else {
            return Ok(false);
        };
        for (place, buffer) in places {
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

    /// Makes the range read as zeroes: unmapped with `unmap`, otherwise as explicit zeroes that need no grain either
    /// (in ranges above 64 MiB, what was never written stays unmapped).
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.writable()?;
        check_range(offset, len, self.size_bytes())?;
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

    /// What the range is made of: at most `max` extents from `offset` on, cut at the end of the range.
    ///
    /// # Errors
    /// `OutOfRange`, `NotFound`, `Corrupt`.
    pub fn lba_status(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        let _range = self.lock(offset, len, Mode::Shared)?;
        let branch = self.shared.head();
        let (mut out, mut at, end) = (Extents::new(max), offset, offset + len);
        while at < end {
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
    fn lock(&self, offset: u64, len: u64, mode: Mode) -> Result<RangeGuard<'_>> {
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

    fn grain_of(&self, offset: u64) -> u64 {
        offset / u64::from(self.pool.grain_bytes)
    }

    fn last_grain(&self, offset: u64, len: u64) -> u64 {
        self.grain_of(offset + len.saturating_sub(1))
    }

    fn page_of(&self, offset: u64) -> PageNo {
        PageNo::try_from(offset / self.pool.page_bytes()).expect("64 TiB are 2^28 pages of 256 KiB")
    }

    /// Cuts a range of the volume at the borders of map pages.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = Piece> + use<> {
        let page_bytes = self.pool.page_bytes();
        let mut done = 0usize;
        std::iter::from_fn(move || {
            if done >= len {
                return None;
            }
            let at = offset + done as u64;
            let start = at % page_bytes;
            let n = usize::try_from(page_bytes - start)
                .unwrap_or(usize::MAX)
                .min(len - done);
            let page = PageNo::try_from(at / page_bytes).expect("checked by the range");
            let piece = Piece {
                page,
                within: start..start + n as u64,
                buffer: done..done + n,
            };
            done += n;
            Some(piece)
        })
    }

    /// The grains that a piece touches: index in the page, bytes within the grain, bytes of the buffer.
    fn grains(&self, piece: &Piece) -> impl Iterator<Item = (u8, Range<u64>, Range<usize>)> + use<> {
        let grain = u64::from(self.pool.grain_bytes);
        let (within, base) = (piece.within.clone(), piece.buffer.start);
        (within.start / grain..within.end.div_ceil(grain)).map(move |index| {
            let start = (index * grain).max(within.start);
            let end = ((index + 1) * grain).min(within.end);
            let at = base + usize::try_from(start - within.start).expect("inside of the buffer");
            let len = usize::try_from(end - start).expect("at most a grain");
            let number = u8::try_from(index).expect("64 entries");
            (number, start - index * grain..end - index * grain, at..at + len)
        })
    }

    pub(crate) fn read_locked(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let branch = self.shared.head();
        let mut runs = Runs::default();
        for piece in self.pieces(offset, buf.len()) {
            let page = self.pool.page(branch, piece.page)?;
            self.add_runs(&page, &piece, offset, &mut runs);
        }
        self.pool.hook("read.looked_up");
        self.pool.read_runs(runs.0, buf)
    }

    fn add_runs(&self, page: &Page, piece: &Piece, offset: u64, runs: &mut Runs) {
        for (index, within, buffer) in self.grains(piece) {
            let place = page.at(index).grain().map(|g| self.pool.place(g) + within.start);
            runs.add(place, buffer.clone(), offset + buffer.start as u64);
        }
    }

    /// The runs of a read, if the whole map of it is in RAM.
    fn cached_runs(&self, offset: u64, len: usize) -> Result<Option<Vec<Run>>> {
        let branch = self.shared.head();
        let mut runs = Runs::default();
        for piece in self.pieces(offset, len) {
            let mut state = self.pool.state();
            let Some(version) = state.map.newest((branch, piece.page)) else {
                return Ok(None);
            };
            let page = version.page.clone();
            state.map.hits += 1;
            drop(state);
            self.add_runs(&page, &piece, offset, &mut runs);
        }
        Ok(Some(runs.0))
    }

    /// Where a write goes if all of it is overwritten in place and its map is in RAM.
    fn places_in_place(&self, offset: u64, len: usize) -> Result<Option<Vec<Placed>>> {
        let branch = self.shared.head();
        let mut runs = Runs::default();
        for piece in self.pieces(offset, len) {
            let mut state = self.pool.state();
            let held = state.write_hold(branch, piece.page)?;
            let Some(version) = state.map.newest((branch, piece.page)) else {
                return Ok(None);
            };
            for (index, within, buffer) in self.grains(&piece) {
                let Some(grain) = in_place(version.page.at(index), held) else {
                    return Ok(None);
                };
                runs.add(Some(self.pool.place(grain) + within.start), buffer.clone(), 0);
            }
        }
        Ok(Some(
            runs.0
                .into_iter()
                .filter_map(|r| Some((r.place?, r.buffer)))
                .collect(),
        ))
    }

    pub(crate) fn write_locked(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.pieces(offset, data.len())
            .try_for_each(|piece| self.write_piece(&piece, data))
    }

    /// Chooses for each grain, writes the data, then publishes: in this order (invariants I3 and I4).
    fn write_piece(&self, piece: &Piece, data: &[u8]) -> Result<()> {
        let branch = self.shared.head();
        let steps = self.plan(branch, piece)?;
        self.pool.hook("write.chosen");
        let taken = || steps.iter().filter(|s| !s.in_place).map(|s| s.grain);
        if let Err(e) = self.write_steps(piece, &steps, data) {
            self.pool.unreserve(taken());
            return Err(e);
        }
        self.pool.wrote(piece.buffer.len() as u64);
        self.pool.hook("write.data");
        if taken().next().is_none() {
            return Ok(());
        }
        let published = self.pool.with_page(branch, piece.page, |state| {
            let birth = state.branch(branch)?.record.current;
            let fresh = steps.iter().filter(|s| !s.in_place);
            let changes: Vec<_> = fresh.map(|s| (s.index, Entry::mapped(s.grain, birth))).collect();
            state.publish(branch, piece.page, &changes)
        });
        published.inspect_err(|_| self.pool.unreserve(taken()))
    }

    fn plan(&self, branch: BranchId, piece: &Piece) -> Result<Vec<Step>> {
        let mut steps: Vec<Step> = Vec::new();
        loop {
            let need = self.pool.with_page(branch, piece.page, |state| {
                self.plan_in(state, branch, piece, &mut steps)
            });
            let failed = match need {
                Ok(None) => return Ok(steps),
                Ok(Some(need)) => match self.pool.satisfy(need) {
                    Ok(()) => continue,
                    Err(e) => e,
                },
                Err(e) => e,
            };
            self.pool
                .unreserve(steps.iter().filter(|s| !s.in_place).map(|s| s.grain));
            return Err(failed);
        }
    }

    /// Goes on where `steps` ends; what was chosen stays chosen, since the range is locked.
    fn plan_in(
        &self,
        state: &mut State,
        branch: BranchId,
        piece: &Piece,
        steps: &mut Vec<Step>,
    ) -> Result<Option<Need>> {
        let held = state.write_hold(branch, piece.page)?;
        let page = state
            .map
            .newest((branch, piece.page))
            .map(|v| v.page.clone())
            .unwrap_or_default();
        for (index, _, _) in self.grains(piece).skip(steps.len()) {
            let old = page.at(index);
            let (grain, in_place) = match in_place(old, held) {
                Some(grain) => (grain, true),
                None => match self.pool.reserve_in(state) {
                    Ok(grain) => (grain, false),
                    Err(need) => return Ok(Some(need)),
                },
            };
            steps.push(Step {
                index,
                old,
                grain,
                in_place,
            });
        }
        Ok(None)
    }

    fn write_steps(&self, piece: &Piece, steps: &[Step], data: &[u8]) -> Result<()> {
        let grain_bytes = u64::from(self.pool.grain_bytes);
        let io = |e| Error::io("write", "data file", e);
        let mut runs = Runs::default();
        for ((_, within, buffer), step) in self.grains(piece).zip(steps) {
            let place = self.pool.place(step.grain);
            let whole = within.end - within.start == grain_bytes;
            if step.in_place || whole {
                runs.add(Some(place + within.start), buffer.clone(), 0);
            } else {
                let merged = self.merge(step.old, &within, part(data, buffer))?;
                self.pool.disk.write_at(place, &merged).map_err(io)?;
            }
        }
        for run in runs.0 {
            if let Some(place) = run.place {
                self.pool
                    .disk
                    .write_at(place, part(data, run.buffer))
                    .map_err(io)?;
            }
        }
        Ok(())
    }

    /// A whole grain: the old content with `data` at `within`.
    fn merge(&self, old: Entry, within: &Range<u64>, data: &[u8]) -> Result<Vec<u8>> {
        let mut grain = vec![0; self.pool.grain_bytes as usize];
        if let Some(from) = old.grain() {
            let read = self.pool.disk.read_at(self.pool.place(from), &mut grain);
            read.map_err(|e| Error::io("read", "data file", e))?;
        }
        let start = usize::try_from(within.start).expect("inside of a grain");
        part_mut(&mut grain, start..start + data.len()).copy_from_slice(data);
        Ok(grain)
    }

    /// Zeroes a range whose lock is held. Pages that were never written are skipped without being looked at.
    fn zero_locked(&self, range: Range<u64>, unmap: bool, skip_absent: bool) -> Result<()> {
        let branch = self.shared.head();
        let page_bytes = self.pool.page_bytes();
        let mut at = range.start;
        while at < range.end {
            if skip_absent {
                let Some(next) =
                    self.pool
                        .next_present(branch, self.page_of(at), self.page_of(range.end - 1))?
                else {
                    return Ok(());
                };
                at = at.max(u64::from(next) * page_bytes);
            }
            let end = (at - at % page_bytes + page_bytes).min(range.end);
            self.zero_piece(branch, at..end, unmap)?;
            self.pool.throttle()?;
            at = end;
        }
        Ok(())
    }

    fn zero_piece(&self, branch: BranchId, range: Range<u64>, unmap: bool) -> Result<()> {
        let grain = u64::from(self.pool.grain_bytes);
        let len = usize::try_from(range.end - range.start).expect("at most a page");
        let Some(piece) = self.pieces(range.start, len).next() else {
            return Ok(());
        };
        let page = self.pool.page(branch, piece.page)?;
        let mut whole = Vec::new();
        for (index, within, buffer) in self.grains(&piece) {
            let old = page.at(index);
            if within.end - within.start == grain {
                whole.push(index);
            } else if old.grain().is_some() {
                let zeroes = vec![0; buffer.len()];
                self.write_locked(range.start + buffer.start as u64, &zeroes)?;
            }
        }
        self.pool.with_page(branch, piece.page, |state| {
            let birth = state.branch(branch)?.record.current;
            let entry = if unmap { Entry::HOLE } else { Entry::zero(birth) };
            let page = state
                .map
                .newest((branch, piece.page))
                .map(|v| v.page.clone())
                .unwrap_or_default();
            let differs = |old: Entry| if unmap { !old.is_hole() } else { !old.is_zero() };
            let changes: Vec<_> = whole
                .iter()
                .filter(|i| differs(page.at(**i)))
                .map(|i| (*i, entry))
                .collect();
            if changes.is_empty() {
                Ok(())
            } else {
                state.publish(branch, piece.page, &changes)
            }
        })
    }

    /// Adds the extents of a page within `range`; `false` when the list is full.
    fn page_extents(&self, page: &Page, start: u64, range: Range<u64>, out: &mut Extents) -> bool {
        let grain = u64::from(self.pool.grain_bytes);
        page.iter().enumerate().all(|(i, entry)| {
            let from = (start + i as u64 * grain).max(range.start);
            let to = (start + (i as u64 + 1) * grain).min(range.end);
            from >= to || out.add(from..to, kind_of(entry))
        })
    }
}

impl Inner {
    /// Does what the allocator asked for.
    pub(crate) fn satisfy(&self, need: Need) -> Result<()> {
        match need {
            Need::Chunk(chunk) => self.load_chunk(chunk),
            Need::Space => Err(self.out_of_space()),
        }
    }

    /// Reads runs into their places of `buf`.
    pub(crate) fn read_runs(&self, runs: Vec<Run>, buf: &mut [u8]) -> Result<()> {
        for run in runs {
            let part = part_mut(buf, run.buffer);
            match run.place {
                None => part.fill(0),
                Some(place) => self.disk.read_at(place, part).map_err(|e| {
                    tracing::error!("data file: read of {} bytes at {place}: {e}", part.len());
                    Error::Medium { offset: run.offset }
                })?,
            }
        }
        Ok(())
    }
}

/// The grain of an entry that may be overwritten: nothing holds it but the head.
fn in_place(entry: Entry, held: crate::Epoch) -> Option<u64> {
    entry.grain().filter(|_| entry.birth() > held)
}

/// What an entry is, for people and for GET LBA STATUS.
pub(crate) fn kind_of(entry: Entry) -> ExtentKind {
    match entry.grain() {
        Some(_) => ExtentKind::Data,
        None if entry.is_zero() => ExtentKind::Zero,
        None => ExtentKind::Hole,
    }
}

/// A stretch of a buffer and where its bytes are in the data file.
pub(crate) struct Run {
    /// `None` = zeroes.
    place: Option<u64>,
    buffer: Range<usize>,
    /// Where it is on the volume.
    offset: u64,
}

/// Joins neighbours into runs: one system call for each.
#[derive(Default)]
pub(crate) struct Runs(pub(crate) Vec<Run>);

impl Runs {
    pub(crate) fn add(&mut self, place: Option<u64>, buffer: Range<usize>, offset: u64) {
        if let Some(last) = self.0.last_mut()
            && last.buffer.end == buffer.start
            && last.place.map(|p| p + last.buffer.len() as u64) == place
        {
            last.buffer.end = buffer.end;
            return;
        }
        self.0.push(Run {
            place,
            buffer,
            offset,
        });
    }
}

/// Collects extents, joining neighbours of one kind, up to a limit.
pub(crate) struct Extents {
    pub(crate) list: Vec<Extent>,
    max: usize,
}

impl Extents {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            list: Vec::new(),
            max,
        }
    }

    /// `false` when the range did not fit any more.
    pub(crate) fn add(&mut self, range: Range<u64>, kind: ExtentKind) -> bool {
        if let Some(last) = self.list.last_mut()
            && last.kind == kind
            && last.offset + last.len == range.start
        {
            last.len += range.end - range.start;
            return true;
        }
        if self.list.len() >= self.max {
            return false;
        }
        self.list.push(Extent {
            offset: range.start,
            len: range.end - range.start,
            kind,
        });
        true
    }
}

fn part(data: &[u8], range: Range<usize>) -> &[u8] {
    data.get(range).expect("runs lie within the buffer")
}

fn part_mut(data: &mut [u8], range: Range<usize>) -> &mut [u8] {
    data.get_mut(range).expect("runs lie within the buffer")
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
        mapped_bytes: record.mapped_grains * u64::from(grain_bytes),
        created_ms: record.created_ms,
    }
}

const _: () = assert!(PAGE_ENTRIES == 64, "grain indices of a page are u8");
