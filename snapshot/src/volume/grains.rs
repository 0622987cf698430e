//! The way of a volume's bytes to grains and back: cut at map pages, choose for each grain, do the I/O, publish.

use std::ops::Range;

use super::Volume;
use super::runs::{Extents, Runs, kind_of, part, part_mut};
use crate::alloc::Need;
use crate::inner::Inner;
use crate::page::{Entry, PAGE_ENTRIES, Page, PageNo};
use crate::state::State;
use crate::types::{BranchId, Checksums};
use crate::{Error, Result};

/// A part of an operation that lies in one map page.
pub(super) struct Piece {
    pub(super) page: PageNo,
    /// Bytes within the page.
    within: Range<u64>,
    /// Bytes within the operation's buffer.
    pub(super) buffer: Range<usize>,
}

/// A place in the data file and the bytes of the buffer that go there.
pub(super) type Placed = (u64, Range<usize>);

/// What happens to one grain of a write.
pub(super) struct Step {
    index: u8,
    old: Entry,
    /// Where the data goes.
    grain: u64,
    /// Overwritten in place: the map does not change.
    in_place: bool,
    /// Checksum of the whole new grain, once it is written, if it is to be recorded.
    crc: Option<u32>,
}

/// The grains that a write has taken for itself.
fn taken(steps: &[Step]) -> impl Iterator<Item = u64> {
    steps.iter().filter(|s| !s.in_place).map(|s| s.grain)
}

impl Volume {
    /// The grain of an entry that may be overwritten: nothing holds it but the head, and its bytes have no recorded
    /// checksum, nor shall they get one (I5).
    fn in_place(&self, entry: Entry, held: crate::Epoch) -> Option<u64> {
        let open = entry.crc().is_none() && self.shared.checksums() != Checksums::Always;
        entry.grain().filter(|_| open && entry.birth() > held)
    }

    pub(super) fn grain_of(&self, offset: u64) -> u64 {
        offset / u64::from(self.pool.grain_bytes)
    }

    pub(super) fn last_grain(&self, offset: u64, len: u64) -> u64 {
        self.grain_of(offset + len.saturating_sub(1))
    }

    pub(super) fn page_of(&self, offset: u64) -> PageNo {
        PageNo::try_from(offset / self.pool.page_bytes()).expect("64 TiB are 2^28 pages of 256 KiB")
    }

    /// Cuts a range of the volume at the borders of map pages.
    pub(super) fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = Piece> + use<> {
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
    pub(super) fn grains(
        &self,
        piece: &Piece,
    ) -> impl Iterator<Item = (u8, Range<u64>, Range<usize>)> + use<> {
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
        self.pool.read_runs(&runs, Some(self.shared.id), buf)
    }

    pub(super) fn add_runs(&self, page: &Page, piece: &Piece, offset: u64, runs: &mut Runs) {
        for (index, within, buffer) in self.grains(piece) {
            self.pool.add_grain(
                runs,
                page.at(index),
                within,
                buffer.clone(),
                offset + buffer.start as u64,
            );
        }
    }

    /// The runs of a read, if the whole map of it is in RAM.
    pub(super) fn cached_runs(&self, offset: u64, len: usize) -> Result<Option<Runs>> {
        let branch = self.shared.head();
        let mut runs = Runs::default();
        for piece in self.pieces(offset, len) {
            let mut state = self.pool.state();
            let Some(page) = state.head_page(branch, piece.page) else {
                return Ok(None);
            };
            state.map.hits += 1;
            drop(state);
            self.add_runs(&page, &piece, offset, &mut runs);
        }
        Ok(Some(runs))
    }

    /// Where a write goes if all of it is overwritten in place and its map is in RAM.
    pub(super) fn places_in_place(&self, offset: u64, len: usize) -> Result<Option<Runs>> {
        let branch = self.shared.head();
        let mut runs = Runs::default();
        for piece in self.pieces(offset, len) {
            let mut guard = self.pool.state();
            let state = &mut *guard;
            let held = state.write_hold(branch, piece.page)?;
            let Some(page) = state.head_page(branch, piece.page) else {
                return Ok(None);
            };
            if state.is_lent((branch, piece.page)) {
                return Ok(None);
            }
            for (index, within, buffer) in self.grains(&piece) {
                let grain = self.in_place(page.at(index), held);
                let Some(grain) = grain.filter(|g| !state.bad.contains(*g)) else {
                    return Ok(None);
                };
                if state.is_shared(grain) != Ok(false) {
                    return Ok(None);
                }
                runs.add(Some(self.pool.place(grain) + within.start), buffer.clone(), 0);
            }
        }
        Ok(Some(runs))
    }

    pub(crate) fn write_locked(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.pieces(offset, data.len())
            .try_for_each(|piece| self.write_piece(&piece, data))
    }

    /// Chooses for each grain, writes the data, then publishes: in this order (invariants I3 and I4).
    pub(super) fn write_piece(&self, piece: &Piece, data: &[u8]) -> Result<()> {
        let branch = self.shared.head();
        let mut steps = self.plan(branch, piece)?;
        self.pool.hook("write.chosen");
        if let Err(e) = self.write_steps(piece, &mut steps, data) {
            self.pool.unreserve(taken(&steps));
            return Err(e);
        }
        self.publish_steps(branch, piece, &steps)
    }

    /// As [`Volume::write_piece`], but gives `false` instead of waiting for the map, the allocator, a commit or a device: a
    /// piece of whole grains of which the head's page is in RAM, some to be redirected. The range is locked.
    pub(super) fn try_write_piece(&self, piece: &Piece, data: &[u8]) -> Result<bool> {
        let grain = u64::from(self.pool.grain_bytes);
        let whole = piece.within.start.is_multiple_of(grain) && piece.within.end.is_multiple_of(grain);
        if !whole || !self.pool.keeps_warm_at_once() {
            return Ok(false);
        }
        let branch = self.shared.head();
        let mut steps = Vec::new();
        let planned = {
            let mut state = self.pool.state();
            if state.open_is_full() || !state.has_page((branch, piece.page)) {
                return Ok(false);
            }
            state.map.hits += 1;
            self.plan_in(&mut state, branch, piece, &mut steps)
        };
        self.pool.hook("write.chosen");
        let written = match planned {
            Ok(None) => self.try_write_steps(piece, &mut steps, data),
            Ok(Some(_)) => Ok(false),
            Err(e) => Err(e),
        };
        match written {
            Ok(true) => self.publish_steps(branch, piece, &steps).map(|()| true),
            not_written => {
                self.pool.unreserve(taken(&steps));
                not_written
            }
        }
    }

    /// Publishes what was written elsewhere (invariants I3 and I4).
    fn publish_steps(&self, branch: BranchId, piece: &Piece, steps: &[Step]) -> Result<()> {
        self.pool.wrote(piece.buffer.len() as u64);
        self.pool.hook("write.data");
        if taken(steps).next().is_none() {
            return Ok(());
        }
        let published = self.pool.with_page(branch, piece.page, |state| {
            let birth = state.branch(branch)?.record.current;
            let fresh = steps.iter().filter(|s| !s.in_place);
            let entry = |s: &Step| Entry::mapped(s.grain, birth).with_crc(s.crc);
            let changes: Vec<_> = fresh.map(|s| (s.index, entry(s))).collect();
            Ok((state.publish(branch, piece.page, &changes)?, changes))
        });
        let (ticket, changes) = published.inspect_err(|_| self.pool.unreserve(taken(steps)))?;
        self.pool.hook("write.published");
        self.pool.keep_warm(ticket, branch, piece.page, &changes)
    }

    pub(super) fn plan(&self, branch: BranchId, piece: &Piece) -> Result<Vec<Step>> {
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
            self.pool.unreserve(taken(&steps));
            return Err(failed);
        }
    }

    /// Goes on where `steps` ends; what was chosen stays chosen, since the range is locked.
    pub(super) fn plan_in(
        &self,
        state: &mut State,
        branch: BranchId,
        piece: &Piece,
        steps: &mut Vec<Step>,
    ) -> Result<Option<Need>> {
        let held = state.write_hold(branch, piece.page)?;
        let page = state.head_page(branch, piece.page).unwrap_or_default();
        let lent = state.is_lent((branch, piece.page));
        for (index, _, _) in self.grains(piece).skip(steps.len()) {
            let old = page.at(index);
            let place = self
                .in_place(old, held)
                .filter(|g| !lent && !state.bad.contains(*g));
            // What is placed elsewhere too is not ours alone.
            let place = match place.map(|g| state.is_shared(g).map(|shared| (g, shared))) {
                Some(Err(need)) => return Ok(Some(need)),
                Some(Ok((grain, false))) => Some(grain),
                Some(Ok((_, true))) | None => None,
            };
            let (grain, in_place) = match place {
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
                crc: None,
            });
        }
        Ok(None)
    }

    pub(super) fn write_steps(&self, piece: &Piece, steps: &mut [Step], data: &[u8]) -> Result<()> {
        let record = self.shared.checksums() == Checksums::Always;
        let grain_bytes = u64::from(self.pool.grain_bytes);
        let io = |e| Error::io("write", "data file", e);
        let mut runs = Runs::default();
        for ((_, within, buffer), step) in self.grains(piece).zip(steps) {
            let place = self.pool.place(step.grain);
            let whole = within.end - within.start == grain_bytes;
            let crc = |grain: &[u8]| record.then(|| crc32c::crc32c(grain));
            if step.in_place {
                runs.add(Some(place + within.start), buffer.clone(), 0);
            } else if whole {
                step.crc = crc(part(data, buffer.clone()));
                runs.add(Some(place), buffer.clone(), 0);
            } else {
                let at = u64::from(piece.page) * self.pool.page_bytes() + u64::from(step.index) * grain_bytes;
                let merged = self.merge(step.old, at, &within, part(data, buffer))?;
                step.crc = crc(&merged);
                self.pool.disk.write_at(place, &merged).map_err(io)?;
            }
        }
        let write = |(place, buffer): Placed| self.pool.disk.write_at(place, part(data, buffer));
        runs.placed().try_for_each(write).map_err(io)
    }

    /// As [`Volume::write_steps`] of whole grains, but gives `false` instead of waiting for a device.
    fn try_write_steps(&self, piece: &Piece, steps: &mut [Step], data: &[u8]) -> Result<bool> {
        let record = self.shared.checksums() == Checksums::Always;
        let mut runs = Runs::default();
        for ((_, _, buffer), step) in self.grains(piece).zip(steps) {
            if !step.in_place {
                step.crc = record.then(|| crc32c::crc32c(part(data, buffer.clone())));
            }
            runs.add(Some(self.pool.place(step.grain)), buffer, 0);
        }
        for (place, buffer) in runs.placed() {
            let io = |e| Error::io("write", "data file", e);
            if !self
                .pool
                .disk
                .try_write_at(place, part(data, buffer))
                .map_err(io)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A whole grain: the old content (of byte `at` of the volume) with `data` at `within`. What is bad is not
    /// copied: it would get a right checksum.
    pub(super) fn merge(&self, old: Entry, at: u64, within: &Range<u64>, data: &[u8]) -> Result<Vec<u8>> {
        let mut grain = vec![0; self.pool.grain_bytes as usize];
        let mut runs = Runs::default();
        let all = 0..u64::from(self.pool.grain_bytes);
        self.pool.add_grain(&mut runs, old, all, 0..grain.len(), at);
        let read = self.pool.read_runs(&runs, Some(self.shared.id), &mut grain);
        read.map_err(|e| match e {
            Error::Medium { .. } => Error::Medium {
                offset: at + within.start,
            },
            other => other,
        })?;
        let start = usize::try_from(within.start).expect("inside of a grain");
        part_mut(&mut grain, start..start + data.len()).copy_from_slice(data);
        Ok(grain)
    }

    /// Zeroes a range whose lock is held. Pages that were never written are skipped without being looked at.
    pub(crate) fn zero_locked(&self, range: Range<u64>, unmap: bool, skip_absent: bool) -> Result<()> {
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

    pub(super) fn zero_piece(&self, branch: BranchId, range: Range<u64>, unmap: bool) -> Result<()> {
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
        let published = self.pool.with_page(branch, piece.page, |state| {
            let birth = state.branch(branch)?.record.current;
            let entry = if unmap { Entry::HOLE } else { Entry::zero(birth) };
            let page = state.head_page(branch, piece.page).unwrap_or_default();
            let differs = |old: Entry| if unmap { !old.is_hole() } else { !old.is_zero() };
            let changes: Vec<_> = whole
                .iter()
                .filter(|i| differs(page.at(**i)))
                .map(|i| (*i, entry))
                .collect();
            if changes.is_empty() {
                return Ok(None);
            }
            Ok(Some((state.publish(branch, piece.page, &changes)?, changes)))
        })?;
        let Some((ticket, changes)) = published else {
            return Ok(());
        };
        self.pool.hook("write.published");
        self.pool.keep_warm(ticket, branch, piece.page, &changes)
    }

    /// Adds the extents of a page within `range`; `false` when the list is full.
    pub(super) fn page_extents(&self, page: &Page, start: u64, range: Range<u64>, out: &mut Extents) -> bool {
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
}

const _: () = assert!(PAGE_ENTRIES == 64, "grain indices of a page are u8");
