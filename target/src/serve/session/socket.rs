//! Bytes from the socket into place, and PDUs out in one `writev`. Nothing here waits.

use std::io::{self, IoSlice, IoSliceMut};
use std::time::Instant;

use stillpoint_iscsi::Frame;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{End, Task};

/// PDUs that one `writev` takes.
const BATCH: usize = 32;
/// Slices of one PDU, at most: header, data, padding with digest.
const SLICES: usize = 3;
/// Rounds of reading before the loop looks after everything else.
const READS_PER_TURN: usize = 16;

impl Task {
    /// Reads what is there, the first part straight into the place where the protocol wants it. Whether there may be more.
    pub(super) fn read(&mut self, stream: &TcpStream) -> Result<bool, End> {
        for _ in 0..READS_PER_TURN {
            if self.conn.is_closed() || self.conn.receiving_paused() {
                return Ok(false);
            }
            let place = self.conn.space();
            let kept = self.ahead.get(self.ahead_at..self.ahead_end).unwrap_or_default();
            let mut drained = false;
            let n = if kept.is_empty() {
                let wanted = place.len();
                match receive(stream, place, &mut self.ahead) {
                    Ok(Received { bytes: 0, .. }) => {
                        return Err(End::Socket(io::ErrorKind::UnexpectedEof.into()));
                    }
                    Ok(Received { bytes, all }) => {
                        drained = all;
                        (self.ahead_at, self.ahead_end) = (0, bytes.saturating_sub(wanted));
                        bytes.min(wanted)
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    Err(error) => return Err(End::Socket(error)),
                }
            } else {
                let n = kept.len().min(place.len());
                if let (Some(to), Some(from)) = (place.get_mut(..n), kept.get(..n)) {
                    to.copy_from_slice(from);
                }
                self.ahead_at += n;
                n
            };
            let advanced = self.conn.advance(Instant::now(), n);
            self.record();
            advanced.map_err(End::Protocol)?;
            self.events();
            if drained && self.ahead_at == self.ahead_end {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sends what the socket takes without waiting.
    pub(super) fn write(&mut self, stream: &TcpStream) -> Result<(), End> {
        loop {
            while self.out.len() < BATCH {
                let Some(frame) = self.conn.poll_transmit() else {
                    break;
                };
                self.out.push_back(frame);
            }
            self.record();
            if self.out.is_empty() {
                self.stalled = None;
                return Ok(());
            }
            let mut slices = [IoSlice::new(&[]); BATCH * SLICES];
            let mut places = slices.iter_mut();
            let mut skip = self.sent;
            for chunk in self.out.iter().flat_map(Frame::chunks) {
                match chunk.get(skip..) {
                    Some(rest) => {
                        skip = 0;
                        if !rest.is_empty()
                            && let Some(place) = places.next()
                        {
                            *place = IoSlice::new(rest);
                        }
                    }
                    None => skip -= chunk.len(),
                }
            }
            let unused = places.len();
            let filled = slices.get(..slices.len() - unused).unwrap_or_default();
            match stream.try_write_vectored(filled) {
                Ok(n) => {
                    self.stalled = None;
                    self.take_sent(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stalled.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) => return Err(End::Socket(error)),
            }
        }
    }

    fn take_sent(&mut self, n: usize) {
        self.sent += n;
        while let Some(first) = self.out.front() {
            let len = first.len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            self.out.pop_front();
        }
    }
}

/// What one `readv` brought.
struct Received {
    bytes: usize,
    /// The socket had no more.
    all: bool,
}

/// One `readv` into `place` and what lies behind it into `ahead`.
///
/// A short read has emptied the socket. Saying so at once (a `WouldBlock` from the closure clears the readiness; whatever
/// arrives later sets it again, and a peer's end stays set) saves the second `readv` that would only be told "nothing there":
/// a system call of four for each small command at queue depth 1.
fn receive(stream: &TcpStream, place: &mut [u8], ahead: &mut [u8]) -> io::Result<Received> {
    let room = place.len() + ahead.len();
    let mut bytes = 0;
    let tried = stream.try_io(Interest::READABLE, || {
        bytes = rustix::io::readv(stream, &mut [IoSliceMut::new(place), IoSliceMut::new(ahead)])?;
        if 0 < bytes && bytes < room {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    });
    match tried {
        Err(_) if bytes > 0 => Ok(Received { bytes, all: true }),
        Err(error) => Err(error),
        Ok(()) => Ok(Received { bytes, all: false }),
    }
}
