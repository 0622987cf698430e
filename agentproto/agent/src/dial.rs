//! Connections that the agent dials: to a target's registration port.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use stillpoint_agentproto::Fingerprint;
use stillpoint_agentproto::enrol::{EXPORTER_LABEL, EXPORTER_LEN};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::state::Identity;
use crate::tls::{self, Pins};

/// Name, route and TCP handshake.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// TLS handshake (agent-protocol.md §3).
pub(crate) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);

/// A connection whose peer has proved its key.
pub(crate) struct Dialled {
    /// TLS is up, nothing was said yet.
    pub(crate) stream: TlsStream<TcpStream>,
    /// The peer's key.
    pub(crate) fingerprint: Fingerprint,
    /// Keying material of this TLS session.
    pub(crate) exporter: [u8; EXPORTER_LEN],
}

/// Dials `address` and accepts only a peer with a pinned key.
pub(crate) async fn dial(address: &str, identity: &Identity, pins: Arc<dyn Pins>) -> anyhow::Result<Dialled> {
    let config = tls::client(identity, pins).context("TLS cannot be set up")?;
    let stream = tokio::time::timeout(CONNECT_TIME_MAX, TcpStream::connect(address)).await;
    let stream = stream.map_err(|_| anyhow::anyhow!("no answer within {} s", CONNECT_TIME_MAX.as_secs()));
    let stream = stream
        .and_then(|result| Ok(result?))
        .with_context(|| format!("{address} cannot be reached"))?;
    stream.set_nodelay(true)?;
    let handshake = TlsConnector::from(config).connect(tls::server_name(), stream);
    let stream = tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake).await;
    let stream =
        stream.map_err(|_| anyhow::anyhow!("no TLS answer within {} s", HANDSHAKE_TIME_MAX.as_secs()));
    let stream = stream
        .and_then(|result| Ok(result?))
        .with_context(|| format!("{address} is not the target"))?;
    let (_, session) = stream.get_ref();
    let certificate = session
        .peer_certificates()
        .and_then(|chain| chain.first())
        .context("no certificate")?;
    let fingerprint = tls::fingerprint(certificate).context("a certificate that cannot be read")?;
    let exporter = session.export_keying_material([0; EXPORTER_LEN], EXPORTER_LABEL, None)?;
    Ok(Dialled {
        stream,
        fingerprint,
        exporter,
    })
}
