//! What stands below a LUN: the seam between SCSI and a store.
//!
//! An enum and not a trait object: the variants are few and known, and every I/O would otherwise pay for a boxed future. The
//! `try_` form answers in place when nothing would block; the other blocks the calling thread and belongs on a worker.
//! Nothing above this file names the store's data path.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use stillpoint_scsi::{BlockError, BlockOp, BlockResult, Compare, LbaExtent, ThinFigures};
use stillpoint_snapshot::{Caw, CopySource, Error as StoreError, ExtentKind, Pin, Volume};

use super::buffers;

/// Long operations (VERIFY, WRITE SAME) go through the store in steps of this many bytes: the memory they take is bounded, and
/// other commands get their turn in between.
const STEP: u64 = 1 << 20;

/// Longer reads and writes always go to a worker: copying them would keep the connection's thread from its other connections.
const IN_PLACE_MAX: u32 = 1 << 20;

/// One LUN's storage.
#[derive(Clone, Debug)]
pub(crate) enum LunBackend {
    /// A volume of the local redirect-on-write store.
    Local(Volume),
}

/// A point in time of a LUN's storage: what is written later is not seen in it. It keeps the space of what it shows until it is
/// dropped, which may wait for the store: that belongs on a worker.
#[derive(Clone, Debug)]
pub(crate) enum Pinned {
    /// Of a volume of the local store.
    Local(Arc<Pin>),
}

impl LunBackend {
    /// A point in time of all of it, now; takes no longer for a large LUN than for a small one.
    ///
    /// # Errors
    /// When the store is out of order.
    pub(crate) fn pin(&self) -> Result<Pinned, BlockError> {
        let Self::Local(volume) = self;
        match volume.pin() {
            Ok(pin) => Ok(Pinned::Local(Arc::new(pin))),
            Err(error) => Err(failure(&error)),
        }
    }

    /// Copies `len` bytes at `from` of a point in time to `to`, by reference where both have the same place in their grain;
    /// blocks until they are durable.
    ///
    /// # Errors
    /// As of a write, and a medium error of the source; a part may have been copied then.
    pub(crate) fn copy_from(&self, point: &Pinned, from: u64, to: u64, len: u64) -> Result<(), BlockError> {
        let (Self::Local(volume), Pinned::Local(pin)) = (self, point);
        let copied = volume.copy(to, &CopySource::Pin(pin), from, len);
        copied.map(drop).map_err(|error| failure(&error))
    }

    /// Copies as [`Self::copy_from`] does, from a LUN's storage as it is now. A short range needs no point in time: it is locked
    /// for a moment.
    ///
    /// # Errors
    /// As [`Self::copy_from`].
    pub(crate) fn copy_now(&self, source: &Self, from: u64, to: u64, len: u64) -> Result<(), BlockError> {
        let (Self::Local(volume), Self::Local(other)) = (self, source);
        let copied = volume.copy(to, &CopySource::Volume(other), from, len);
        copied.map(drop).map_err(|error| failure(&error))
    }

    /// Carries out an operation that gives nothing back; blocks.
    ///
    /// # Errors
    /// Why it failed.
    pub(crate) fn carry_out(&self, op: &BlockOp, data: &[u8], block_size: u32) -> Result<(), BlockError> {
        match self.execute(op, data, block_size) {
            BlockResult::Failed(error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Bytes that the LUN offers now.
    pub(crate) fn size_bytes(&self) -> u64 {
        let Self::Local(volume) = self;
        volume.size_bytes()
    }

    /// Carries out `op` when that needs no waiting: the map page is cached, nobody holds the range, the data is in the page
    /// cache. With `may_sync` a sync of the device that is expected to be short counts as no waiting. After `None` hand the
    /// operation to a worker; what it writes may have been written in part.
    pub(crate) fn try_execute(&self, op: &BlockOp, data: &[u8], may_sync: bool) -> Option<BlockResult> {
        let Self::Local(volume) = self;
        let tried = match *op {
            BlockOp::Read { len, .. } | BlockOp::Write { len, .. } if len > IN_PLACE_MAX => return None,
            BlockOp::Read { offset, len, .. } => {
                let (done, data) = buffers::read_into(len as usize, |buffer| volume.try_read(offset, buffer));
                done.map(|done| done.then_some(BlockResult::Data(data)))
            }
            // With FUA a grain that moves needs a commit: tried here, the worker would have to write the data once more.
            BlockOp::Write {
                offset,
                len,
                fua: false,
            } => volume
                .try_write(offset, data.get(..len as usize)?)
                .map(|done| done.then_some(BlockResult::Done)),
            BlockOp::Flush => volume
                .try_flush(may_sync)
                .map(|done| done.then_some(BlockResult::Done)),
            _ => return None,
        };
        tried.unwrap_or_else(|error| Some(BlockResult::Failed(failure(&error))))
    }

    /// Carries out `op`; blocks until it is done. Operations on the unit's own state are not the backend's.
    pub(crate) fn execute(&self, op: &BlockOp, data: &[u8], block_size: u32) -> BlockResult {
        let Self::Local(volume) = self;
        let pattern = data.get(..block_size as usize);
        let done = match *op {
            BlockOp::Read { offset, len, .. } => {
                let mut buffer = BytesMut::zeroed(len as usize);
                return match volume.read(offset, &mut buffer) {
                    Ok(()) => BlockResult::Data(buffer.freeze()),
                    Err(error) => BlockResult::Failed(failure(&error)),
                };
            }
            BlockOp::Write { offset, len, fua } => {
                whole(data, len).and_then(|data| write(volume, offset, data, fua))
            }
            BlockOp::WriteAndVerify { offset, len, compare } => whole(data, len).and_then(|data| {
                write(volume, offset, data, true)?;
                if compare {
                    verify(volume, offset, data.len() as u64, &Expect::Data(data))
                } else {
                    Ok(())
                }
            }),
            BlockOp::Verify { offset, len, compare } => match compare {
                Compare::None => verify(volume, offset, len.into(), &Expect::Anything),
                Compare::Data => {
                    whole(data, len).and_then(|data| verify(volume, offset, len.into(), &Expect::Data(data)))
                }
                Compare::OneBlock => pattern
                    .ok_or(BlockError::Fault)
                    .and_then(|block| verify(volume, offset, len.into(), &Expect::Block(block))),
            },
            BlockOp::WriteZeroes {
                offset,
                len,
                unmap,
                fua,
            } => volume
                .write_zeroes(offset, len, unmap)
                .map_err(|e| failure(&e))
                .and_then(|()| flush_if(volume, fua)),
            BlockOp::WriteSame { offset, len, fua } => pattern
                .ok_or(BlockError::Fault)
                .and_then(|block| write_same(volume, offset, len, block, fua)),
            BlockOp::Unmap { ref ranges } => volume.unmap(ranges).map_err(|e| failure(&e)),
            BlockOp::CompareAndWrite { offset, len, fua } => {
                compare_and_write(volume, offset, data, len, fua)
            }
            BlockOp::OrWrite { offset, len, fua } => {
                whole(data, len).and_then(|data| volume.or_write(offset, data, fua).map_err(|e| failure(&e)))
            }
            BlockOp::Flush => volume.flush().map_err(|e| failure(&e)),
            // What is read once is in the page cache.
            BlockOp::PreFetch { offset, len } => verify(volume, offset, len, &Expect::Anything),
            BlockOp::LbaStatus {
                offset,
                len,
                max_descriptors,
            } => {
                return match volume.lba_status(offset, len, max_descriptors) {
                    Ok(extents) => BlockResult::Extents(
                        extents
                            .iter()
                            .map(|e| LbaExtent {
                                offset: e.offset,
                                len: e.len,
                                mapped: e.kind != ExtentKind::Hole,
                            })
                            .collect(),
                    ),
                    Err(error) => BlockResult::Failed(failure(&error)),
                };
            }
            BlockOp::ThinFigures => {
                return match volume.space() {
                    Ok(space) => BlockResult::Thin(ThinFigures {
                        available_bytes: space.available_bytes,
                        used_bytes: space.used_bytes,
                    }),
                    Err(error) => BlockResult::Failed(failure(&error)),
                };
            }
            BlockOp::SaveModePages(_) | BlockOp::Reservations(_) | BlockOp::Copy(_) => Err(BlockError::Fault),
        };
        match done {
            Ok(()) => BlockResult::Done,
            // Windows tries four times more, a second apart, and Linux waits too: better than a file system that goes offline
            // while the snapshots that took its space are being deleted.
            Err(BlockError::NoSpace) if volume.makes_room() => BlockResult::Failed(BlockError::Growing),
            Err(error) => BlockResult::Failed(error),
        }
    }
}

/// What VERIFY compares the medium with.
enum Expect<'a> {
    Anything,
    Data(&'a [u8]),
    Block(&'a [u8]),
}

/// The `len` bytes that the initiator sent for the operation. The planner has checked that they are there.
fn whole(data: &[u8], len: u32) -> Result<&[u8], BlockError> {
    data.get(..len as usize).ok_or(BlockError::Fault)
}

fn write(volume: &Volume, offset: u64, data: &[u8], fua: bool) -> Result<(), BlockError> {
    volume.write(offset, data, fua).map_err(|error| failure(&error))
}

fn flush_if(volume: &Volume, fua: bool) -> Result<(), BlockError> {
    if fua {
        volume.flush().map_err(|error| failure(&error))
    } else {
        Ok(())
    }
}

fn compare_and_write(
    volume: &Volume,
    offset: u64,
    data: &[u8],
    len: u32,
    fua: bool,
) -> Result<(), BlockError> {
    let (compare, new) = data.split_at_checked(len as usize).ok_or(BlockError::Fault)?;
    match volume.compare_and_write(offset, compare, whole(new, len)?, fua) {
        Ok(Caw::Done) => Ok(()),
        Ok(Caw::Miscompare { offset }) => Err(BlockError::Miscompare { offset }),
        Err(error) => Err(failure(&error)),
    }
}

fn write_same(volume: &Volume, offset: u64, len: u64, block: &[u8], fua: bool) -> Result<(), BlockError> {
    let filled = usize::try_from(len.min(STEP)).map_err(|_| BlockError::Fault)?;
    let buffer: Bytes = block.iter().copied().cycle().take(filled).collect();
    for (at, n) in steps(offset, len) {
        write(volume, at, buffer.get(..n).ok_or(BlockError::Fault)?, false)?;
    }
    flush_if(volume, fua)
}

fn verify(volume: &Volume, offset: u64, len: u64, expect: &Expect<'_>) -> Result<(), BlockError> {
    let mut buffer = vec![0; usize::try_from(len.min(STEP)).map_err(|_| BlockError::Fault)?];
    for (at, n) in steps(offset, len) {
        let read = buffer.get_mut(..n).ok_or(BlockError::Fault)?;
        volume.read(at, read).map_err(|error| failure(&error))?;
        let base = at - offset;
        let differs = match *expect {
            Expect::Anything => None,
            Expect::Data(data) => {
                let start = usize::try_from(base).map_err(|_| BlockError::Fault)?;
                first_difference(
                    read,
                    data.get(start..)
                        .and_then(|rest| rest.get(..n))
                        .ok_or(BlockError::Fault)?,
                )
            }
            // Steps and ranges are whole blocks, so each step starts with the pattern's first byte.
            Expect::Block(block) => (0_usize..)
                .step_by(block.len().max(1))
                .zip(read.chunks(block.len().max(1)))
                .find_map(|(at, chunk)| first_difference(chunk, block).map(|position| at + position)),
        };
        if let Some(position) = differs {
            return Err(BlockError::Miscompare {
                offset: base + position as u64,
            });
        }
    }
    Ok(())
}

/// Index of the first byte that differs; both are of the same length. Piece by piece, as a memcmp each: byte by byte, VERIFY of different
/// data took most of an unoptimised daemon's time in libiscsi's suite (3.4 s of CPU in `Verify10.Mismatch`; 0.6 s now).
fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    const PIECE: usize = 1 << 10;
    let differ = |(a, b): (&[u8], &[u8])| a != b;
    let start = PIECE * a.chunks(PIECE).zip(b.chunks(PIECE)).position(differ)?;
    let bytes = a.iter().zip(b).skip(start);
    bytes.take(PIECE).position(|(a, b)| a != b).map(|at| start + at)
}

/// Cuts a range into pieces of at most [`STEP`].
fn steps(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len.div_ceil(STEP)).map(move |i| {
        (
            offset + i * STEP,
            usize::try_from((len - i * STEP).min(STEP)).unwrap_or(usize::MAX),
        )
    })
}

/// What the initiator has to know of a store's error.
fn failure(error: &StoreError) -> BlockError {
    tracing::warn!(%error, "block operation failed");
    match *error {
        StoreError::NoSpace => BlockError::NoSpace,
        StoreError::Medium { offset, .. } => BlockError::Medium { offset },
        StoreError::ReadOnly => BlockError::ReadOnly,
        _ => BlockError::Fault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_wherever_it_is() {
        let data = vec![7; 3 * 1024 + 5];
        assert_eq!(first_difference(&data, &data), None);
        assert_eq!(first_difference(&[], &[]), None);
        for at in [0, 1, 1023, 1024, 1025, 2048, 3071, 3072, 3076] {
            let mut other = data.clone();
            other[at..].fill(8);
            assert_eq!(first_difference(&data, &other), Some(at));
        }
    }

    #[test]
    fn steps_cover_the_range_once() {
        let cut: Vec<_> = steps(512, 2 * STEP + 512).collect();
        let step = usize::try_from(STEP).unwrap();
        assert_eq!(cut, [(512, step), (512 + STEP, step), (512 + 2 * STEP, 512)]);
        assert_eq!(steps(0, 0).count(), 0);
    }
}
