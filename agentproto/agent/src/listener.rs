//! Snapshot channels: targets dial this port (11169). Only enrolled ones get past the TLS handshake.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use socket2::{SockRef, TcpKeepalive};
use stillpoint_agentproto::channel::{Channel, ChannelEvent, HELLO_TIMEOUT};
use stillpoint_agentproto::client::Asked;
use stillpoint_agentproto::frame::MAX_BODY;
use stillpoint_agentproto::{ErrorCode, Fingerprint, Refusal};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::dial::HANDSHAKE_TIME_MAX;
use crate::engine::Engine;
use crate::host;
use crate::link::Link;
use crate::state::Identity;
use crate::tls;

/// Connections that have not proved their key yet, per source (agent-protocol.md §3).
const UNPROVED_PER_SOURCE_MAX: usize = 4;
/// The same, in all.
const UNPROVED_MAX: usize = 64;
/// Connections of one target that has proved its key.
const CHANNELS_PER_TARGET_MAX: usize = 8;
/// After an error of accept (no descriptors): do not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Finds the sessions of a target.
pub(crate) type Engines = Mutex<HashMap<Fingerprint, (Arc<Engine>, CancellationToken)>>;

/// The listener.
pub(crate) struct Listener {
    pub(crate) identity: Arc<Identity>,
    pub(crate) acceptor: TlsAcceptor,
    pub(crate) engines: Arc<Engines>,
    unproved: Mutex<HashMap<IpAddr, usize>>,
    next_channel: AtomicU64,
}

impl Listener {
    /// A listener for these engines.
    pub(crate) fn new(identity: Arc<Identity>, acceptor: TlsAcceptor, engines: Arc<Engines>) -> Arc<Self> {
        // Channel 0 is nobody's: the machine uses it for sessions that never had one.
        Arc::new(Self {
            identity,
            acceptor,
            engines,
            unproved: Mutex::default(),
            next_channel: AtomicU64::new(1),
        })
    }

    /// Accepts for ever.
    pub(crate) async fn run(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    if let Some(place) = Unproved::take(&self, peer.ip()) {
                        tokio::spawn(Arc::clone(&self).connection(stream, peer, place));
                    } else {
                        tracing::debug!(%peer, "too many connections without a proved key: closed");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a snapshot channel cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, place: Unproved) {
        match self.handshake(stream).await {
            Ok((stream, engine, cancel)) => {
                drop(place);
                let id = self.next_channel.fetch_add(1, Ordering::Relaxed);
                tokio::select! {
                    result = self.serve(id, stream, &engine) => {
                        tracing::debug!(%peer, id, "snapshot channel closed: {}", result.err().unwrap_or_default());
                    }
                    () = cancel.cancelled() => tracing::debug!(%peer, id, "snapshot channel dropped"),
                }
                engine.close_channel(id);
            }
            Err(error) => tracing::debug!(%peer, "no snapshot channel: {error:#}"),
        }
    }

    async fn handshake(
        &self,
        stream: TcpStream,
    ) -> anyhow::Result<(TlsStream<TcpStream>, Arc<Engine>, CancellationToken)> {
        stream.set_nodelay(true)?;
        keep_alive(&stream)?;
        let stream = tokio::time::timeout(HANDSHAKE_TIME_MAX, self.acceptor.accept(stream)).await??;
        let (_, session) = stream.get_ref();
        let certificate = session
            .peer_certificates()
            .and_then(|chain| chain.first())
            .context("no certificate")?;
        let fingerprint = tls::fingerprint(certificate).context("a certificate that cannot be read")?;
        // The pins were checked in the handshake; an `unenrol` may have come in between.
        let (engine, cancel) = lock(&self.engines)
            .get(&fingerprint)
            .cloned()
            .context("no longer enrolled")?;
        Ok((stream, engine, cancel))
    }

    /// Carries requests and answers until the channel ends; the reason it ended.
    async fn serve(&self, id: u64, stream: TlsStream<TcpStream>, engine: &Arc<Engine>) -> Result<(), String> {
        let crowded = engine.channels() >= CHANNELS_PER_TARGET_MAX;
        let mut answers = engine.open_channel(id);
        let generation = engine.feed(|agent| agent.generation());
        let hello = host::hello(self.identity.agent_id, engine.capabilities());
        let channel = Channel::accepting(Instant::now(), hello, generation, MAX_BODY);
        let mut link = Link::new(stream, channel);
        loop {
            tokio::select! {
                event = link.event() => {
                    let event = event.map_err(|error| error.to_string())?;
                    if crowded && matches!(event, ChannelEvent::HelloAsked { .. }) {
                        let text = format!("{CHANNELS_PER_TARGET_MAX} snapshot channels are open already");
                        link.machine.refuse(Refusal::new(ErrorCode::Busy, text));
                    } else {
                        take(&mut link.machine, id, engine, event);
                    }
                }
                answer = answers.recv() => {
                    let Some((request, result)) = answer else { return Err("replaced".to_owned()) };
                    link.machine.reply(request, result);
                }
            }
        }
    }
}

fn take(channel: &mut Channel, id: u64, engine: &Arc<Engine>, event: ChannelEvent) {
    let now = Instant::now();
    match event {
        ChannelEvent::HelloAsked { generation, .. } => {
            match engine.feed(|agent| agent.fence(now, generation)) {
                Ok(()) => {
                    channel.set_generation(generation);
                    channel.accept();
                }
                Err(refusal) => {
                    tracing::warn!(target = %engine.target(), "a target is refused: {refusal}");
                    channel.refuse(refusal);
                }
            }
        }
        ChannelEvent::Request {
            id: request,
            generation,
            request: content,
        } => {
            engine.feed(|agent| {
                agent.request(
                    now,
                    Asked {
                        channel: id,
                        id: request,
                    },
                    generation,
                    content,
                )
            });
        }
        ChannelEvent::Log(event) => {
            tracing::info!(subject = event.subject, "the target says: {}", event.text)
        }
        // This end asks nothing on a snapshot channel.
        ChannelEvent::VersionRefused(refusal) => {
            tracing::error!(target = %engine.target(), "a target is refused: {refusal}");
        }
        ChannelEvent::Opened { .. }
        | ChannelEvent::HelloRefused(_)
        | ChannelEvent::Reply { .. }
        | ChannelEvent::Progress { .. } => {}
    }
}

/// A target that vanished without a word must not keep its channels: the kernel asks after 30 s of silence, and gives up a
/// minute later. (What is frozen over such a channel has thawed after 3 s.)
fn keep_alive(stream: &TcpStream) -> std::io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(15));
    // Windows Server 2016 has no such option: its ten attempts cannot be changed.
    #[cfg(not(windows))]
    let keepalive = keepalive.with_retries(4);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// A place among the connections that have not proved their key; given back when it goes.
struct Unproved {
    listener: Arc<Listener>,
    source: IpAddr,
}

impl Unproved {
    fn take(listener: &Arc<Listener>, source: IpAddr) -> Option<Self> {
        let mut unproved = lock(&listener.unproved);
        let in_all: usize = unproved.values().sum();
        let here = unproved.get(&source).copied().unwrap_or_default();
        if here >= UNPROVED_PER_SOURCE_MAX || in_all >= UNPROVED_MAX {
            return None;
        }
        unproved.insert(source, here + 1);
        drop(unproved);
        Some(Self {
            listener: Arc::clone(listener),
            source,
        })
    }
}

impl Drop for Unproved {
    fn drop(&mut self) {
        let mut unproved = lock(&self.listener.unproved);
        match unproved.get_mut(&self.source) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                unproved.remove(&self.source);
            }
        }
    }
}

/// Handshake and Hello are two steps with a limit each; [`Channel`] keeps the second.
const _: () = assert!(HELLO_TIMEOUT.as_secs() == 5 && HANDSHAKE_TIME_MAX.as_secs() == 5);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
