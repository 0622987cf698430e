//! Moves the bytes of one connection. The protocol's machines decide everything else.

use std::io;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};

/// A peer that does not take a byte for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const READ_BYTES: usize = 16 * 1024;

/// What happened first.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// So many bytes came: [`Pipe::bytes`].
    Read(usize),
    /// The time is over.
    Time,
}

/// Both halves of a connection, and what waits to go out.
#[derive(Debug)]
pub(super) struct Pipe<S> {
    read: ReadHalf<S>,
    write: WriteHalf<S>,
    input: Box<[u8]>,
    output: Vec<u8>,
    unflushed: bool,
    /// When the bytes that wait must have moved.
    write_by: Option<Instant>,
}

impl<S: AsyncRead + AsyncWrite> Pipe<S> {
    pub(super) fn new(stream: S) -> Self {
        let (read, write) = tokio::io::split(stream);
        let input = vec![0; READ_BYTES].into_boxed_slice();
        Self {
            read,
            write,
            input,
            output: Vec::new(),
            unflushed: false,
            write_by: None,
        }
    }

    /// Adds bytes to what goes out.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// The bytes of the last [`Turn::Read`].
    pub(super) fn bytes(&self, count: usize) -> &[u8] {
        self.input.get(..count).unwrap_or_default()
    }

    fn is_idle(&self) -> bool {
        self.output.is_empty() && !self.unflushed
    }

    /// Writes, and waits for bytes (if they are wanted) or for the time. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The connection is over; `UnexpectedEof` when the peer closed it.
    pub(super) async fn turn(&mut self, wants: bool, until: Option<Instant>) -> io::Result<Turn> {
        loop {
            if self.is_idle() {
                self.write_by = None;
            } else if self.write_by.is_none() {
                self.write_by = Some(Instant::now() + WRITE_TIMEOUT);
            }
            let idle = self.is_idle();
            let wake = until.into_iter().chain(self.write_by).min();
            tokio::select! {
                moved = advance(&mut self.write, &mut self.output, &mut self.unflushed), if !idle => {
                    moved?;
                    self.write_by = None;
                }
                count = self.read.read(&mut self.input), if wants => {
                    return match count? {
                        0 => Err(io::ErrorKind::UnexpectedEof.into()),
                        count => Ok(Turn::Read(count)),
                    };
                }
                () = sleep_until(wake) => {
                    if self.write_by.is_some_and(|by| by <= Instant::now()) {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read"));
                    }
                    return Ok(Turn::Time);
                }
            }
        }
    }

    /// Sends what is left, then says goodbye.
    pub(super) async fn finish(mut self) {
        let last = async {
            while !self.is_idle() {
                advance(&mut self.write, &mut self.output, &mut self.unflushed).await?;
            }
            self.write.shutdown().await
        };
        // The peer may be gone already, which is what is wanted.
        let _gone = tokio::time::timeout(Duration::from_secs(1), last).await;
    }
}

async fn advance<S: AsyncWrite>(
    write: &mut WriteHalf<S>,
    output: &mut Vec<u8>,
    unflushed: &mut bool,
) -> io::Result<()> {
    if output.is_empty() {
        write.flush().await?;
        *unflushed = false;
        return Ok(());
    }
    let count = write.write(output).await?;
    if count == 0 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    output.drain(..count);
    *unflushed = true;
    Ok(())
}

/// Sleeps for ever without a time.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
