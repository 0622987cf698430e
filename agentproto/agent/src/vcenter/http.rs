//! One HTTPS connection to a vCenter whose certificate is pinned. Nothing is sent before its key is proved.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::thumbprint::Thumbprint;

/// Name, route and TCP handshake.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// TLS handshake: a vCenter under load takes longer than a target.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(15);
/// From a request to its whole answer. Long work is a task at the vCenter, and waits come back sooner than this.
pub(crate) const CALL_TIME_MAX: Duration = Duration::from_secs(120);
/// The largest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why there was no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum HttpError {
    /// Nothing was sent: no route, no listener, no TLS.
    #[error("{host} cannot be reached from this host: {why}")]
    Unreachable {
        /// `HOST:PORT`.
        host: String,
        /// The system's word.
        why: String,
    },
    /// Another certificate than the one that an operator confirmed.
    #[error(
        "{host} shows another certificate ({seen}) than the one that was confirmed ({pinned}): if it was renewed, \
         confirm it with `stillpoint-agent vcenter set`"
    )]
    OtherCertificate {
        /// `HOST:PORT`.
        host: String,
        /// What it showed.
        seen: Thumbprint,
        /// What was confirmed.
        pinned: Thumbprint,
    },
    /// The request may have been carried out.
    #[error("the connection to {host} was lost before the answer: {why}")]
    Lost {
        /// `HOST:PORT`.
        host: String,
        /// The system's word.
        why: String,
    },
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// HTTP's.
    pub(crate) status: u16,
    /// A new session cookie, `name=value`.
    pub(crate) cookie: Option<String>,
    /// The body.
    pub(crate) body: String,
}

/// A connection; used for one request at a time.
#[derive(Debug)]
pub(crate) struct Connection {
    host: String,
    sender: http1::SendRequest<Full<Bytes>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    /// Connects, and accepts the pinned certificate only.
    pub(crate) async fn open(host: &str, pinned: Thumbprint) -> Result<Self, HttpError> {
        let pin = Arc::new(Pin::new(Some(pinned)));
        let stream = connect(host, &pin).await.map_err(|why| match pin.seen() {
            Some(seen) if seen != pinned => HttpError::OtherCertificate {
                host: host.to_owned(),
                seen,
                pinned,
            },
            _ => unreachable(host, why),
        })?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| unreachable(host, error.to_string()))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("the connection to the vCenter ended: {error}");
            }
        });
        Ok(Self {
            host: host.to_owned(),
            sender,
            task,
        })
    }

    /// Can it take another request?
    pub(crate) fn is_open(&self) -> bool {
        self.sender.is_ready()
    }

    /// Sends a SOAP request and reads the whole answer.
    pub(crate) async fn post(
        &mut self,
        action: &str,
        cookie: Option<&str>,
        body: String,
    ) -> Result<Answer, HttpError> {
        let lost = |host: &str, why: String| HttpError::Lost {
            host: host.to_owned(),
            why,
        };
        let mut request = hyper::Request::post("/sdk")
            .header("Host", self.host.as_str())
            .header("Content-Type", "text/xml; charset=utf-8")
            .header(
                "User-Agent",
                concat!("stillpoint-agent/", env!("CARGO_PKG_VERSION")),
            )
            .header("SOAPAction", action);
        if let Some(cookie) = cookie {
            request = request.header("Cookie", cookie);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| unreachable(&self.host, error.to_string()))?;
        self.sender
            .ready()
            .await
            .map_err(|error| unreachable(&self.host, error.to_string()))?;
        let exchange = async {
            let answer = self
                .sender
                .send_request(request)
                .await
                .map_err(|error| error.to_string())?;
            let status = answer.status().as_u16();
            let set = answer.headers().get("Set-Cookie");
            let cookie = set
                .and_then(|value| value.to_str().ok())
                .and_then(|value| value.split(';').next())
                .map(str::to_owned);
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            let body = String::from_utf8(body.into()).map_err(|_| "an answer that is no UTF-8".to_owned())?;
            Ok(Answer { status, cookie, body })
        };
        match tokio::time::timeout(CALL_TIME_MAX, exchange).await {
            Ok(result) => result.map_err(|why| lost(&self.host, why)),
            Err(_) => Err(lost(
                &self.host,
                format!("no answer within {} s", CALL_TIME_MAX.as_secs()),
            )),
        }
    }
}

fn unreachable(host: &str, why: impl Into<String>) -> HttpError {
    HttpError::Unreachable {
        host: host.to_owned(),
        why: why.into(),
    }
}

/// What certificate a vCenter shows, for an operator to confirm. Nothing is sent to it.
pub(crate) async fn look(host: &str) -> Result<Thumbprint, HttpError> {
    let pin = Arc::new(Pin::new(None));
    let end = connect(host, &pin).await;
    match (pin.seen(), end) {
        (Some(seen), _) => Ok(seen),
        (None, Err(why)) => Err(unreachable(host, why)),
        (None, Ok(_)) => Err(unreachable(host, "it showed no certificate")),
    }
}

async fn connect(host: &str, pin: &Arc<Pin>) -> Result<tokio_rustls::client::TlsStream<TcpStream>, String> {
    let config = ClientConfig::builder_with_provider(Arc::clone(&pin.provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(pin) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    let stream = tokio::time::timeout(CONNECT_TIME_MAX, TcpStream::connect(host)).await;
    let stream = stream.map_err(|_| format!("no answer within {} s", CONNECT_TIME_MAX.as_secs()))?;
    let stream = stream.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(name).map_err(|error| error.to_string())?;
    let handshake = TlsConnector::from(Arc::new(config)).connect(name, stream);
    let stream = tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake).await;
    let stream = stream.map_err(|_| format!("no TLS answer within {} s", HANDSHAKE_TIME_MAX.as_secs()))?;
    stream.map_err(|error| error.to_string())
}

/// Accepts one certificate. Names, dates and authorities are not looked at: the operator has confirmed this very one. That the server
/// holds its key is checked as ever, by the handshake's signature.
#[derive(Debug)]
struct Pin {
    pinned: Option<Thumbprint>,
    seen: Mutex<Option<Thumbprint>>,
    provider: Arc<CryptoProvider>,
}

impl Pin {
    fn new(pinned: Option<Thumbprint>) -> Self {
        Self {
            pinned,
            seen: Mutex::default(),
            provider: Arc::new(rustls::crypto::ring::default_provider()),
        }
    }

    fn seen(&self) -> Option<Thumbprint> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let seen = Thumbprint::of(end_entity);
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
        // `None` only looks: with this error the handshake ends, and nothing was sent.
        if self.pinned == Some(seen) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::CertificateError::UnknownIssuer.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
