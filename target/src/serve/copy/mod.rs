//! Third-party copies: EXTENDED COPY and tokens between the LUNs of the daemon.
//!
//! A copy runs on a worker, in pieces: between two pieces it looks whether it is to end. It reads from points in time, which the
//! store keeps at no cost, so that overwriting the source in place changes nothing; what has the same place in its grain is
//! copied by reference.

mod pieces;
mod reach;
mod tokens;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use stillpoint_scsi::{
    BlockError, BlockOp, CopyEnd, CopyError, CopyOutcome, CopyRequest, CopySegment, CopyUnit, CopyWork,
    RodToken,
};

use self::pieces::Pieces;
use self::reach::Reached;
use self::tokens::Held;
pub(crate) use self::tokens::Tokens;
use super::Daemon;
use super::backend::Pinned;
use super::lun::Lun;
use super::operations::Running;
use super::registry::Session;

/// Copies of all LUNs that run at once: each holds a worker.
const MAX_COPIES: usize = 64;
/// A token operation answers after this long with what it has done: Windows gives it four seconds in all.
const TOKEN_TIME: Duration = Duration::from_secs(2);
/// Bytes of a segment that is copied at once, without a point in time of its own: what ESXi sends.
const SHORT: u64 = 16 << 20;
/// How often tokens that nobody uses are looked for.
const EXPIRY: Duration = Duration::from_secs(2);

/// Says that a command is to end early.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Lets it end.
    pub(crate) fn cancel(&self) {
        self.0.store(true, Relaxed);
    }

    /// Whether it is to.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// What copies share.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    tokens: Tokens,
    running: AtomicUsize,
}

/// Lets go of tokens in time, until the daemon stops; then of all.
pub(crate) async fn expire(daemon: Arc<Daemon>) {
    loop {
        let stops = tokio::time::timeout(EXPIRY, daemon.shutdown.cancelled())
            .await
            .is_ok();
        let held = Arc::clone(&daemon);
        let sweep = move || {
            if stops {
                held.copies.tokens.clear();
            } else {
                held.copies.tokens.expire(Instant::now());
            }
        };
        // Points in time are let go on a worker: that may wait for the store.
        drop(tokio::task::spawn_blocking(sweep).await);
        if stops {
            return;
        }
    }
}

/// One copy for one command.
pub(crate) struct Job<'a> {
    pub(crate) daemon: &'a Daemon,
    /// Who asks.
    pub(crate) session: &'a Arc<Session>,
    /// The LUN that was asked.
    pub(crate) lun: &'a Arc<Lun>,
    pub(crate) cancel: &'a Cancel,
}

/// What is to be done, and the operation of the LUN that it counts as.
type Order<'a> = (&'a CopyRequest, &'a Running);

/// How far a copy is.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    segments: u16,
    bytes: u64,
}

/// How a copy ended before all of it was done.
enum Stop {
    Partial,
    Failed(CopyError),
}

impl From<CopyError> for Stop {
    fn from(error: CopyError) -> Self {
        Self::Failed(error)
    }
}

impl From<BlockError> for Stop {
    fn from(error: BlockError) -> Self {
        Self::Failed(CopyError::Block(error))
    }
}

impl Job<'_> {
    /// Carries the copy out and records its end; blocks. `None` when too many run: BUSY.
    pub(crate) fn run(&self, request: &CopyRequest, operation: &Running) -> Option<CopyOutcome> {
        let running = &self.daemon.copies.running;
        let admitted = running.fetch_add(1, Relaxed) < MAX_COPIES;
        let outcome = if admitted {
            self.outcome((request, operation))
        } else {
            CopyOutcome {
                segments: 0,
                bytes: 0,
                end: CopyEnd::Failed(CopyError::Block(BlockError::Busy)),
            }
        };
        running.fetch_sub(1, Relaxed);
        if let CopyEnd::Failed(error) = &outcome.end {
            tracing::warn!(lun = self.lun.name(), segment = outcome.segments, bytes = outcome.bytes, %error, "copy failed");
        } else {
            tracing::debug!(lun = self.lun.name(), bytes = outcome.bytes, end = ?outcome.end, "copy ended");
        }
        self.lun.copy_ended(request.ticket, &outcome);
        admitted.then_some(outcome)
    }

    fn outcome(&self, order: Order<'_>) -> CopyOutcome {
        let mut done = Done::default();
        let ended = match &order.0.work {
            CopyWork::Segments { units, segments } => self
                .segments(order, units, segments, &mut done)
                .map(|()| CopyEnd::Done),
            CopyWork::Populate { ranges, inactivity_s } => self
                .populate(ranges, Duration::from_secs((*inactivity_s).into()), &mut done)
                .map(CopyEnd::Token),
            CopyWork::WriteToken { token, skip, ranges } => self
                .write_token(order, token, *skip, ranges, &mut done)
                .map(|()| CopyEnd::Done),
            CopyWork::WriteZeroes { ranges } => self
                .write_zeroes(order, ranges, &mut done)
                .map(|()| CopyEnd::Done),
        };
        CopyOutcome {
            segments: done.segments,
            bytes: done.bytes,
            end: match ended {
                Ok(end) => end,
                Err(Stop::Partial) => CopyEnd::Partial,
                Err(Stop::Failed(error)) => CopyEnd::Failed(error),
            },
        }
    }

    /// Between two pieces.
    ///
    /// # Errors
    /// ABORTED COMMAND when the copy is to end.
    fn go_on(&self, (request, running): Order<'_>, done: Done, reached: &[Reached]) -> Result<(), Stop> {
        let wanted = self.lun.copy_progress(request.ticket, done.segments, done.bytes);
        // Whoever ends a session, takes a LUN away or resets it waits for this copy.
        let shown = self.session.ending().is_none() && self.session.shows(self.lun);
        if !wanted || !shown || self.cancel.is_cancelled() || self.lun.is_waited_for(running) {
            return Err(BlockError::Aborted.into());
        }
        reached.iter().try_for_each(Reached::go_on)?;
        Ok(())
    }

    /// EXTENDED COPY. Each segment sees what the ones before it wrote.
    fn segments(
        &self,
        order: Order<'_>,
        units: &[CopyUnit],
        segments: &[CopySegment],
        done: &mut Done,
    ) -> Result<(), Stop> {
        let mut reached = Vec::new();
        let mut points = Points::default();
        for segment in segments {
            let named = |index: u16| units.get(usize::from(index)).ok_or(CopyError::Unreachable);
            let source = reach::find(self, &mut reached, named(segment.source)?, false)?;
            let destination = reach::find(self, &mut reached, named(segment.destination)?, true)?;
            let (from, to) = (
                reached.get(source).ok_or(CopyError::Unreachable)?,
                reached.get(destination).ok_or(CopyError::Unreachable)?,
            );
            let Some(span) = span(segment, from, to)? else {
                done.segments += 1;
                continue;
            };
            if span.len <= SHORT {
                self.go_on(order, *done, &reached)?;
                to.backend.copy_now(&from.backend, span.from, span.to, span.len)?;
                done.bytes += span.len;
                done.segments += 1;
                points.written(destination, (span.to, span.len));
                continue;
            }
            points.take(source, from, (span.from, span.len))?;
            let point = points.of(source).ok_or(CopyError::Unreachable)?;
            points_copy(self, order, point, to, span, done, &reached)?;
            points.written(destination, (span.to, span.len));
            done.segments += 1;
        }
        Ok(())
    }

    /// POPULATE TOKEN: one point in time, and no data moves.
    fn populate(
        &self,
        ranges: &[(u64, u64)],
        inactivity: Duration,
        done: &mut Done,
    ) -> Result<RodToken, Stop> {
        let bytes = ranges.iter().map(|(_, len)| len).sum();
        let held = Held {
            point: self.lun.backend().pin()?,
            ranges: ranges.to_vec(),
        };
        let tokens = &self.daemon.copies.tokens;
        let token = tokens.insert(held, inactivity, |identifier, secret| {
            self.lun.rod_token(bytes, identifier, secret)
        })?;
        (done.bytes, done.segments) = (bytes, u16::try_from(ranges.len()).unwrap_or(u16::MAX));
        Ok(token)
    }

    /// WRITE USING TOKEN.
    fn write_token(
        &self,
        order: Order<'_>,
        token: &RodToken,
        skip: u64,
        ranges: &[(u64, u64)],
        done: &mut Done,
    ) -> Result<(), Stop> {
        let begun = Instant::now();
        let held = self.daemon.copies.tokens.get(token, begun)?;
        let wanted: u64 = ranges.iter().map(|(_, len)| len).sum();
        let has: u64 = held.ranges.iter().map(|(_, len)| len).sum();
        if skip.checked_add(wanted).is_none_or(|end| end > has) {
            return Err(CopyError::TokenTooShort.into());
        }
        let backend = self.lun.backend();
        let grain = u64::from(self.lun.settings().grain);
        for piece in Pieces::new(&held.ranges, skip, ranges, grain) {
            self.go_on(order, *done, &[])?;
            if done.bytes > 0 && begun.elapsed() > TOKEN_TIME {
                return Err(Stop::Partial);
            }
            backend.copy_from(&held.point, piece.from, piece.to, piece.len)?;
            done.bytes += piece.len;
            done.segments = ranges_within(ranges, done.bytes);
        }
        self.daemon.copies.tokens.used(token, Instant::now());
        Ok(())
    }

    /// WRITE USING TOKEN of zeroes: they take no space.
    fn write_zeroes(&self, order: Order<'_>, ranges: &[(u64, u64)], done: &mut Done) -> Result<(), Stop> {
        const PIECE: u64 = 1 << 30;
        let begun = Instant::now();
        let block_size = self.lun.settings().block_size;
        for &(offset, len) in ranges {
            let mut at = 0;
            while at < len {
                self.go_on(order, *done, &[])?;
                if done.bytes > 0 && begun.elapsed() > TOKEN_TIME {
                    return Err(Stop::Partial);
                }
                let piece = PIECE.min(len - at);
                let op = BlockOp::WriteZeroes {
                    offset: offset + at,
                    len: piece,
                    unmap: true,
                    fua: false,
                };
                self.lun.backend().carry_out(&op, &[], block_size)?;
                at += piece;
                done.bytes += piece;
            }
            done.segments += 1;
        }
        Ok(())
    }
}

/// How many of the ranges so many bytes fill.
fn ranges_within(ranges: &[(u64, u64)], bytes: u64) -> u16 {
    let ends = ranges.iter().scan(0, |end, (_, len)| {
        *end += len;
        Some(*end)
    });
    u16::try_from(ends.take_while(|end| *end <= bytes).count()).unwrap_or(u16::MAX)
}

/// A segment in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    from: u64,
    to: u64,
    len: u64,
}

/// `None` for a segment of no blocks.
///
/// # Errors
/// When it does not fit its units.
fn span(segment: &CopySegment, from: &Reached, to: &Reached) -> Result<Option<Span>, CopyError> {
    let (source_block, block) = (from.block_size(), to.block_size());
    let counted = if segment.by_destination {
        block
    } else {
        source_block
    };
    let len = u64::from(segment.blocks) * counted;
    if len % block != 0 || len % source_block != 0 {
        return Err(CopyError::Inexact);
    }
    let inside = |lba: u64, block: u64, reached: &Reached| {
        let offset = lba.checked_mul(block)?;
        let end = offset.checked_add(len)?;
        (end <= reached.backend.size_bytes()).then_some(offset)
    };
    let span = Span {
        from: inside(segment.source_lba, source_block, from).ok_or(CopyError::OutOfRange)?,
        to: inside(segment.destination_lba, block, to).ok_or(CopyError::OutOfRange)?,
        len,
    };
    Ok((len > 0).then_some(span))
}

/// Copies one span in pieces.
fn points_copy(
    job: &Job<'_>,
    order: Order<'_>,
    point: &Pinned,
    to: &Reached,
    span: Span,
    done: &mut Done,
    reached: &[Reached],
) -> Result<(), Stop> {
    let grain = u64::from(to.lun.settings().grain);
    let (source, destination) = ([(span.from, span.len)], [(span.to, span.len)]);
    for piece in Pieces::new(&source, 0, &destination, grain) {
        job.go_on(order, *done, reached)?;
        to.backend.copy_from(point, piece.from, piece.to, piece.len)?;
        done.bytes += piece.len;
    }
    Ok(())
}

/// The points in time that a command reads from, one for each LUN, and what it has written since.
#[derive(Default)]
struct Points(Vec<Point>);

struct Point {
    lun: usize,
    pinned: Pinned,
    written: Vec<(u64, u64)>,
}

impl Points {
    fn of(&self, lun: usize) -> Option<&Pinned> {
        self.0
            .iter()
            .find(|point| point.lun == lun)
            .map(|point| &point.pinned)
    }

    /// Makes sure that there is one which shows what this command has written to the range.
    fn take(&mut self, lun: usize, from: &Reached, (offset, len): (u64, u64)) -> Result<(), BlockError> {
        let overlaps = |(at, n): &(u64, u64)| *at < offset + len && offset < *at + *n;
        self.0
            .retain(|point| point.lun != lun || !point.written.iter().any(overlaps));
        if self.of(lun).is_none() {
            self.0.push(Point {
                lun,
                pinned: from.backend.pin()?,
                written: Vec::new(),
            });
        }
        Ok(())
    }

    fn written(&mut self, lun: usize, range: (u64, u64)) {
        if let Some(point) = self.0.iter_mut().find(|point| point.lun == lun) {
            point.written.push(range);
        }
    }
}
