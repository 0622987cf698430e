//! A protocol machine over a byte stream: the only place that moves protocol bytes.

use std::time::{Duration, Instant};

use stillpoint_agentproto::channel::{Channel, ChannelError, ChannelEvent};
use stillpoint_agentproto::registration::{AgentEnd, AgentEvent};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

/// A peer that does not take a single byte for this long is gone.
const WRITE_TIME_MAX: Duration = Duration::from_secs(10);

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The peer closed it, or one of us refused the other.
    #[error("the connection was closed")]
    Closed,
    /// The network.
    #[error(transparent)]
    Io(std::io::Error),
    /// The peer broke the protocol.
    #[error(transparent)]
    Protocol(#[from] ChannelError),
    /// The peer does not read.
    #[error("the peer did not take a byte within {} s", WRITE_TIME_MAX.as_secs())]
    WriteTimeout,
}

impl From<std::io::Error> for LinkError {
    /// A peer that was killed says no goodbye on the level of TLS: that is a closed connection like any other.
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            return Self::Closed;
        }
        Self::Io(error)
    }
}

/// The sans-IO half of a connection.
pub(crate) trait Machine {
    /// What it tells its owner.
    type Event;
    /// Takes bytes that came in.
    fn receive(&mut self, now: Instant, bytes: &[u8]) -> Result<(), ChannelError>;
    /// What came in.
    fn poll_event(&mut self) -> Option<Self::Event>;
    /// What has to go out.
    fn poll_transmit(&mut self) -> Option<Vec<u8>>;
    /// Shall more be read?
    fn wants_receive(&self) -> bool;
    /// Is nothing to come any more?
    fn is_closed(&self) -> bool;
    /// When time changes something.
    fn poll_timeout(&self) -> Option<Instant>;
    /// Lets time pass.
    fn handle_timeout(&mut self, now: Instant) -> Result<(), ChannelError>;
}

macro_rules! machine {
    ($machine:ty, $event:ty, $wants:expr) => {
        impl Machine for $machine {
            type Event = $event;
            fn receive(&mut self, now: Instant, bytes: &[u8]) -> Result<(), ChannelError> {
                <$machine>::receive(self, now, bytes)
            }
            fn poll_event(&mut self) -> Option<$event> {
                <$machine>::poll_event(self)
            }
            fn poll_transmit(&mut self) -> Option<Vec<u8>> {
                <$machine>::poll_transmit(self)
            }
            fn wants_receive(&self) -> bool {
                let wants: fn(&$machine) -> bool = $wants;
                wants(self)
            }
            fn is_closed(&self) -> bool {
                <$machine>::is_closed(self)
            }
            fn poll_timeout(&self) -> Option<Instant> {
                <$machine>::poll_timeout(self)
            }
            fn handle_timeout(&mut self, now: Instant) -> Result<(), ChannelError> {
                <$machine>::handle_timeout(self, now)
            }
        }
    };
}
machine!(Channel, ChannelEvent, Channel::wants_receive);
machine!(AgentEnd, AgentEvent, |end| !end.is_closed());

/// One connection.
pub(crate) struct Link<S, M> {
    read: ReadHalf<S>,
    write: WriteHalf<S>,
    /// The protocol's state: requests and replies are handed to it directly, [`Link::event`] sends them.
    pub(crate) machine: M,
    incoming: Box<[u8]>,
    outgoing: Vec<u8>,
    unflushed: bool,
    /// When the bytes that wait have to have moved.
    write_by: Option<Instant>,
}

impl<S: AsyncRead + AsyncWrite, M: Machine> Link<S, M> {
    /// A connection whose TLS handshake is done.
    pub(crate) fn new(stream: S, machine: M) -> Self {
        let (read, write) = tokio::io::split(stream);
        let incoming = vec![0; 16 * 1024].into_boxed_slice();
        Self {
            read,
            write,
            machine,
            incoming,
            outgoing: Vec::new(),
            unflushed: false,
            write_by: None,
        }
    }

    /// Moves bytes both ways until something has come in. Cancel-safe: nothing is lost when the future is dropped.
    pub(crate) async fn event(&mut self) -> Result<M::Event, LinkError> {
        loop {
            if let Some(event) = self.machine.poll_event() {
                return Ok(event);
            }
            self.fill();
            let idle = self.outgoing.is_empty() && !self.unflushed;
            if idle && self.machine.is_closed() {
                return Err(LinkError::Closed);
            }
            let deadline = self.machine.poll_timeout().into_iter().chain(self.write_by).min();
            tokio::select! {
                moved = push(&mut self.write, &mut self.outgoing, &mut self.unflushed), if !idle => {
                    moved?;
                    self.write_by = None;
                }
                count = self.read.read(&mut self.incoming), if self.machine.wants_receive() => {
                    let count = count?;
                    if count == 0 {
                        return Err(LinkError::Closed);
                    }
                    let received = self.machine.receive(Instant::now(), self.incoming.get(..count).unwrap_or_default());
                    self.last_words(received).await?;
                }
                () = sleep_until(deadline) => {
                    let now = Instant::now();
                    if self.write_by.is_some_and(|by| by <= now) {
                        return Err(LinkError::WriteTimeout);
                    }
                    let handled = self.machine.handle_timeout(now);
                    self.last_words(handled).await?;
                }
            }
        }
    }

    /// Sends what is left and closes, within a second: a peer that is slow to read its goodbye does not matter.
    pub(crate) async fn close(mut self) {
        let goodbye = async {
            self.fill();
            while !self.outgoing.is_empty() || self.unflushed {
                push(&mut self.write, &mut self.outgoing, &mut self.unflushed).await?;
                self.fill();
            }
            self.write.shutdown().await
        };
        if !matches!(
            tokio::time::timeout(Duration::from_secs(1), goodbye).await,
            Ok(Ok(()))
        ) {
            tracing::trace!("the connection did not end with a goodbye");
        }
    }

    fn fill(&mut self) {
        while let Some(bytes) = self.machine.poll_transmit() {
            self.outgoing.extend_from_slice(&bytes);
        }
        if self.outgoing.is_empty() && !self.unflushed {
            self.write_by = None;
        } else {
            self.write_by
                .get_or_insert_with(|| Instant::now() + WRITE_TIME_MAX);
        }
    }

    /// A refusal that says why may still be waiting when the protocol is broken.
    async fn last_words(&mut self, result: Result<(), ChannelError>) -> Result<(), LinkError> {
        if result.is_err() {
            self.fill();
            let push = push(&mut self.write, &mut self.outgoing, &mut self.unflushed);
            if tokio::time::timeout(Duration::from_secs(1), push).await.is_err() {
                tracing::trace!("the peer did not take the refusal");
            }
        }
        Ok(result?)
    }
}

/// One step of sending. Cancel-safe: either bytes were taken and are removed, or nothing happened.
async fn push<W: AsyncWrite + Unpin>(
    write: &mut W,
    bytes: &mut Vec<u8>,
    unflushed: &mut bool,
) -> std::io::Result<()> {
    if bytes.is_empty() {
        write.flush().await?;
        *unflushed = false;
        return Ok(());
    }
    let count = write.write(bytes).await?;
    if count == 0 {
        return Err(std::io::ErrorKind::WriteZero.into());
    }
    bytes.drain(..count);
    *unflushed = true;
    Ok(())
}

/// Sleeps until then; for ever without a deadline.
pub(crate) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
