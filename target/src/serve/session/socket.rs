//! Bytes from the socket into place, and PDUs out in one `writev`. Nothing here waits.

use std::io::{self, IoSlice, IoSliceMut};
use std::time::Instant;

use stillpoint_iscsi::Frame;
use tokio::net::TcpStream;

use super::{End, Task};

/// PDUs that one `writev` takes; each is up to three slices.
const BATCH: usize = 32;
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
            let n = if kept.is_empty() {
                let wanted = place.len();
                match stream
                    .try_read_vectored(&mut [IoSliceMut::new(place), IoSliceMut::new(&mut self.ahead)])
                {
                    Ok(0) => return Err(End::Socket(io::ErrorKind::UnexpectedEof.into())),
                    Ok(n) => {
                        (self.ahead_at, self.ahead_end) = (0, n.saturating_sub(wanted));
                        n.min(wanted)
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
            self.conn.advance(Instant::now(), n).map_err(End::Protocol)?;
            self.events();
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
            if self.out.is_empty() {
                self.stalled = None;
                return Ok(());
            }
            let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(self.out.len() * 3);
            let mut skip = self.sent;
            for chunk in self.out.iter().flat_map(Frame::chunks) {
                match chunk.get(skip..) {
                    Some(rest) => {
                        skip = 0;
                        if !rest.is_empty() {
                            slices.push(IoSlice::new(rest));
                        }
                    }
                    None => skip -= chunk.len(),
                }
            }
            match stream.try_write_vectored(&slices) {
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
