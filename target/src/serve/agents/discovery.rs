//! Answers `stillpoint-agent discover` (agent-protocol.md §1); off unless `[agents] discovery = true`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use stillpoint_agentproto::discovery::{PROBE_LEN, Responder};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Shared;

/// After an error of the socket: do not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers on the UDP port of the same number as the registration listener's.
pub(super) async fn start(
    shared: &Shared,
    listening: SocketAddr,
    tracker: &TaskTracker,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let socket = UdpSocket::bind(listening).await.with_context(|| {
        format!(
            "UDP port {listening} cannot be opened: choose another [agents] listen, or switch `discovery` off"
        )
    })?;
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let responder = Responder::new(
        listening.port(),
        shared.identity.fingerprint,
        name.trim().to_owned(),
    );
    tracker.spawn(serve(socket, responder, shutdown));
    Ok(())
}

async fn serve(socket: UdpSocket, mut responder: Responder, shutdown: CancellationToken) {
    // One byte more than a probe has: a longer datagram is none.
    let mut buffer = [0; PROBE_LEN + 1];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = shutdown.cancelled() => return,
        };
        let (count, source) = match received {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "a discovery probe cannot be received");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let datagram = buffer.get(..count).unwrap_or_default();
        if let Some(answer) = responder.answer(Instant::now(), source.ip(), datagram)
            && let Err(error) = socket.send_to(&answer, source).await
        {
            tracing::debug!(%error, %source, "a discovery probe cannot be answered");
        }
    }
}
