//! Copies within a pool: whole grains by reference, what is not aligned to the grain by data.

use std::ops::Range;

use super::{Volume, check_range};
use crate::inner::Inner;
use crate::lock::{Mode, RangeGuard, Span};
use crate::page::{Entry, PAGE_ENTRIES, PageNo};
use crate::pin::{Pin, same_pool};
use crate::types::{BranchId, Copied, Epoch, SnapshotId};
use crate::{Error, Result};

/// Up to here both ranges are locked for the time of the copy; a longer one reads from a pin instead.
const DIRECT_BYTES: u64 = 16 << 20;
/// Pages of the destination whose range is locked at once.
const SLICE_PAGES: u64 = 64;
/// Bytes per step of a copy by data.
const DATA_STEP: u64 = 1 << 20;

/// Where a copy comes from. In the same pool.
#[derive(Clone, Copy, Debug)]
pub enum CopySource<'a> {
    /// A volume as it is now.
    Volume(&'a Volume),
    /// A live snapshot.
    Snapshot(SnapshotId),
    /// A point in time that was taken before.
    Pin(&'a Pin),
}

/// How a copy is done: the unaligned begin by data, whole grains by reference, the rest by data. Lengths in bytes.
struct Parts {
    head: u64,
    grains: u64,
    tail: u64,
}

impl Parts {
    fn new(offset: u64, source_offset: u64, len: u64, grain: u64) -> Self {
        if offset % grain != source_offset % grain {
            return Self {
                head: len,
                grains: 0,
                tail: 0,
            };
        }
        let head = ((grain - offset % grain) % grain).min(len);
        let tail = (len - head) % grain;
        Self {
            head,
            grains: len - head - tail,
            tail,
        }
    }

    fn done(&self) -> Copied {
        Copied {
            referenced_bytes: self.grains,
            copied_bytes: self.head + self.tail,
        }
    }

    /// What is copied by data, from the begin of the copy.
    fn edges(&self) -> [Range<u64>; 2] {
        let tail = self.head + self.grains;
        [0..self.head, tail..tail + self.tail]
    }
}

impl Volume {
    /// Whether both are in one pool: only then a copy takes references.
    #[must_use]
    pub fn same_pool(&self, other: &Self) -> bool {
        std::sync::Arc::ptr_eq(&self.pool, &other.pool)
    }

    /// Copies `len` bytes of `source` from `source_offset` to `offset` of this volume. Whole grains are not copied but
    /// placed a second time when both offsets lie alike within their grains; the rest goes by data. Holes and explicit zeroes
    /// stay what they are. One point in time of the source; where source and destination overlap, as if the source had been
    /// read whole before. Durable on return.
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `NotFound`, `Refused` (another pool), `NoSpace`, `Medium` (with the byte on the source),
    /// `Io`, `Poisoned`. After an error any part may have been copied.
    pub fn copy(&self, offset: u64, source: &CopySource<'_>, source_offset: u64, len: u64) -> Result<Copied> {
        self.writable()?;
        self.shared.alive()?;
        check_range(offset, len, self.size_bytes())?;
        let parts = Parts::new(offset, source_offset, len, self.pool.grain_bytes.into());
        match *source {
            CopySource::Volume(volume) => {
                same_pool(&self.pool, &volume.pool)?;
                check_range(source_offset, len, volume.size_bytes())?;
                let apart = source_offset.abs_diff(offset) >= len;
                // Where both overlap, a grain could lose its old place before it has its new one.
                let direct = len <= DIRECT_BYTES.min(self.pool.options.loan_bytes);
                if direct && (apart || self.shared.id != volume.shared.id) {
                    self.copy_direct(offset, volume, source_offset, &parts)?;
                } else {
                    self.copy_pinned(offset, &volume.pin()?, source_offset, &parts)?;
                }
            }
            CopySource::Snapshot(id) => {
                let pin = Pin::of_snapshot(&self.pool, id)?;
                self.copy_pinned(offset, &pin, source_offset, &parts)?;
            }
            CopySource::Pin(pin) => self.copy_pinned(offset, pin, source_offset, &parts)?,
        }
        // References are not in the warm log.
        self.pool.flush()?;
        Ok(parts.done())
    }

    /// Copies with both ranges locked: nothing is written to the source meanwhile.
    fn copy_direct(&self, offset: u64, source: &Self, source_offset: u64, parts: &Parts) -> Result<()> {
        self.pool.throttle()?;
        let len = parts.head + parts.grains + parts.tail;
        let _locked = self.lock_both(offset, source, source_offset, len)?;
        source.shared.alive()?;
        check_range(source_offset, len, source.size_bytes())?;
        // All of the source is read before any of the destination changes: they may meet within a grain.
        let mut data = Vec::new();
        for edge in parts.edges() {
            let len = usize::try_from(edge.end - edge.start).expect("at most what is locked");
            let mut bytes = vec![0; len];
            source.read_locked(source_offset + edge.start, &mut bytes)?;
            data.push((edge.start, bytes));
        }
        let from = (source_offset + parts.head) / u64::from(self.pool.grain_bytes);
        let count = parts.grains / u64::from(self.pool.grain_bytes);
        let head = source.shared.head();
        let entries = self.pool.entries_of(head, Epoch::MAX, from, count)?;
        self.pool.hook("copy.looked_up");
        for (at, bytes) in data {
            self.write_locked(offset + at, &bytes)?;
        }
        self.place_locked(offset + parts.head, from, &entries)
    }

    /// Locks this volume's range for writing and the source's for reading, volumes in the order of their numbers.
    fn lock_both<'a>(
        &'a self,
        offset: u64,
        source: &'a Self,
        source_offset: u64,
        len: u64,
    ) -> Result<[Option<RangeGuard<'a>>; 2]> {
        let span = |volume: &Self, offset, mode| Span {
            first: volume.grain_of(offset),
            last: volume.last_grain(offset, len),
            mode,
        };
        let to = span(self, offset, Mode::Exclusive);
        let from = span(source, source_offset, Mode::Shared);
        let guards = if self.shared.id == source.shared.id {
            [Some(self.shared.locks.lock_spans(to, Some(from))), None]
        } else {
            let mut both = [(self, to), (source, from)];
            both.sort_by_key(|(volume, _)| volume.shared.id);
            both.map(|(volume, span)| Some(volume.shared.locks.lock_spans(span, None)))
        };
        self.shared.alive()?;
        check_range(offset, len, self.size_bytes())?;
        Ok(guards)
    }

    /// Copies from a point in time, piece by piece.
    fn copy_pinned(&self, offset: u64, pin: &Pin, source_offset: u64, parts: &Parts) -> Result<()> {
        same_pool(&self.pool, &pin.pool)?;
        let len = parts.head + parts.grains + parts.tail;
        check_range(source_offset, len, pin.size_bytes())?;
        for edge in parts.edges() {
            self.copy_data(
                offset + edge.start,
                pin,
                source_offset + edge.start,
                edge.end - edge.start,
            )?;
        }
        let (begin, end) = (offset + parts.head, offset + parts.head + parts.grains);
        let source = |at: u64| source_offset + (at - offset);
        if parts.grains > self.pool.options.loan_bytes {
            let page_bytes = self.pool.page_bytes();
            let (first, last) = (begin.next_multiple_of(page_bytes), end - end % page_bytes);
            if first < last {
                self.place_pinned(begin..first, pin, source(begin))?;
                let pages = self.page_of(first)..self.page_of(last - 1) + 1;
                let grain = source(first) / u64::from(self.pool.grain_bytes);
                if !self.borrow_pages(pages, pin, grain)? {
                    self.place_pinned(first..last, pin, source(first))?;
                }
                return self.place_pinned(last..end, pin, source(last));
            }
        }
        self.place_pinned(begin..end, pin, source(begin))
    }

    /// Places whole grains from a point in time, slice by slice.
    fn place_pinned(&self, range: Range<u64>, pin: &Pin, source_offset: u64) -> Result<()> {
        let grain = u64::from(self.pool.grain_bytes);
        let (offset, mut at, end) = (range.start, range.start, range.end);
        while at < end {
            let slice = self.pool.page_bytes() * SLICE_PAGES;
            let next = (at - at % slice + slice).min(end);
            self.pool.throttle()?;
            let from = (source_offset + (at - offset)) / grain;
            let id = pin.snapshot;
            let entries = self
                .pool
                .entries_of(id.branch, id.epoch, from, (next - at) / grain)?;
            self.pool.hook("copy.looked_up");
            let _range = self.lock(at, next - at, Mode::Exclusive)?;
            self.place_locked(at, from, &entries)?;
            at = next;
        }
        Ok(())
    }

    fn copy_data(&self, offset: u64, pin: &Pin, source_offset: u64, len: u64) -> Result<()> {
        let mut buffer = vec![0; usize::try_from(len.min(DATA_STEP)).expect("a step")];
        let mut done = 0;
        while done < len {
            let n = usize::try_from((len - done).min(DATA_STEP)).expect("a step");
            let bytes = super::runs::part_mut(&mut buffer, 0..n);
            pin.read(source_offset + done, bytes)?;
            self.write(offset + done, bytes, false)?;
            done += n as u64;
        }
        Ok(())
    }

    /// Places entries of another place from `offset` on, whose range is locked. Their grains do not go meanwhile: the
    /// source is locked or pinned. `source` is the number of the first grain there, for the error.
    fn place_locked(&self, offset: u64, source: u64, entries: &[Entry]) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let grain = u64::from(self.pool.grain_bytes);
        let len = usize::try_from(entries.len() as u64 * grain).expect("at most what is locked");
        let branch = self.shared.head();
        self.pool.load_pages(
            branch,
            self.page_of(offset)..=self.page_of(offset + len as u64 - 1),
        )?;
        let mut entries = (source..).zip(entries.iter().copied());
        for piece in self.pieces(offset, len) {
            let count = piece.buffer.len() / self.pool.grain_bytes as usize;
            let wanted: Vec<_> = self
                .grains(&piece)
                .map(|(index, ..)| index)
                .zip(entries.by_ref().take(count))
                .collect();
            self.pool.with_page(branch, piece.page, |state| {
                let birth = state.branch(branch)?.record.current;
                let page = state.head_page(branch, piece.page).unwrap_or_default();
                let mut changes = Vec::with_capacity(wanted.len());
                for (index, (number, entry)) in &wanted {
                    if entry.grain().is_some_and(|g| state.bad.contains(g)) {
                        return Err(Error::Medium {
                            offset: number * grain,
                        });
                    }
                    // The same grain has the same content: nothing to do, as when a snapshot is copied back.
                    let old = page.at(*index);
                    if old.grain() != entry.grain() || old.is_hole() != entry.is_hole() {
                        changes.push((*index, entry.reborn(birth)));
                    }
                }
                if !changes.is_empty() {
                    // A copy is durable before it is acknowledged: the warm log need not know.
                    let _ticket = state.publish_shared(branch, piece.page, &changes)?;
                }
                Ok(())
            })?;
        }
        self.pool.hook("copy.published");
        Ok(())
    }
}

impl Inner {
    /// Entries of grains `first..first + count` as a reader of `branch` at `epoch` sees them.
    fn entries_of(&self, branch: BranchId, epoch: Epoch, first: u64, count: u64) -> Result<Vec<Entry>> {
        let per_page = PAGE_ENTRIES as u64;
        let page = |grain: u64| PageNo::try_from(grain / per_page).expect("checked by the range");
        if count == 0 {
            return Ok(Vec::new());
        }
        let pages = self.resolve_many(branch, epoch, page(first)..=page(first + count - 1))?;
        let skip = usize::try_from(first % per_page).expect("below 64");
        let all = pages.iter().flat_map(|(_, page)| page.iter());
        Ok(all
            .skip(skip)
            .take(usize::try_from(count).expect("a slice"))
            .collect())
    }
}
