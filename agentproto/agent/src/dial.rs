//! Connections that the agent dials: to a target's registration port.

use std::sync::Arc;
use std::time::Duration;

use stillpoint_agentproto::Fingerprint;
use stillpoint_agentproto::enrol::{EXPORTER_LABEL, EXPORTER_LEN};
use stillpoint_agentproto::tls::Shown;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use zeroize::Zeroizing;

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
    pub(crate) exporter: Zeroizing<[u8; EXPORTER_LEN]>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// No name, no route, nobody there, or a firewall.
    #[error(
        "{address} cannot be reached from this host (the agent dials the target): {cause}; check that `stillpoint serve` runs \
         there with [agents] listen, and that TCP port {port} is open towards it"
    )]
    Unreachable {
        /// `HOST:PORT`.
        address: String,
        /// Its port.
        port: String,
        /// The system's word.
        cause: String,
    },
    /// Another key than the pinned one.
    #[error("{address} shows another key than the pinned one: {seen}")]
    OtherKey {
        /// `HOST:PORT`.
        address: String,
        /// The key it shows.
        seen: Fingerprint,
    },
    /// Something is there, but no target.
    #[error("{address} does not speak the agents' protocol ({cause}): is another service on that port?")]
    NoTarget {
        /// `HOST:PORT`.
        address: String,
        /// What TLS says.
        cause: String,
    },
    /// A fault of this host.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// Dials `address` and accepts only a peer with a pinned key.
pub(crate) async fn dial(
    address: &str,
    identity: &Identity,
    pins: Arc<dyn Pins>,
) -> Result<Dialled, DialError> {
    let shown = Shown::new(pins);
    let config = tls::client(identity, Arc::<Shown>::clone(&shown))?;
    let stream = connect(address).await.map_err(|cause| DialError::Unreachable {
        address: address.to_owned(),
        port: address.rsplit(':').next().unwrap_or_default().to_owned(),
        cause,
    })?;
    let handshake = TlsConnector::from(config).connect(tls::server_name(), stream);
    let no_target = |cause: String| DialError::NoTarget {
        address: address.to_owned(),
        cause,
    };
    let stream = match tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return Err(match shown.refused() {
                Some(seen) => DialError::OtherKey {
                    address: address.to_owned(),
                    seen,
                },
                None => no_target(error.to_string()),
            });
        }
        Err(_) => {
            return Err(no_target(format!(
                "no TLS answer within {} s",
                HANDSHAKE_TIME_MAX.as_secs()
            )));
        }
    };
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let fingerprint = certificate
        .and_then(tls::fingerprint)
        .ok_or_else(|| no_target("a certificate that cannot be read".to_owned()))?;
    let exporter = session.export_keying_material([0; EXPORTER_LEN], EXPORTER_LABEL, None)?;
    Ok(Dialled {
        stream,
        fingerprint,
        exporter: Zeroizing::new(exporter),
    })
}

async fn connect(address: &str) -> Result<TcpStream, String> {
    let stream = tokio::time::timeout(CONNECT_TIME_MAX, TcpStream::connect(address)).await;
    let stream = stream.map_err(|_| {
        format!(
            "no answer within {} s, which is what a firewall that drops does",
            CONNECT_TIME_MAX.as_secs()
        )
    })?;
    let stream = stream.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    Ok(stream)
}
