//! TLS 1.3 of both connections: self-signed certificates, both ends pinned by the SHA-256 of their key (specification §2).
//!
//! No names, no authorities, no dates: the pin is all there is. No resumption and no early data: nothing to replay. This makes
//! configurations and opens no socket; behind the feature `tls`, because the state machines need none of it.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, SignatureScheme,
};

use crate::Fingerprint;

/// Which keys are trusted.
pub trait Pins: Send + Sync + std::fmt::Debug {
    /// Is this one?
    fn accepts(&self, fingerprint: Fingerprint) -> bool;
}

/// Exactly one key.
#[derive(Debug)]
pub struct Exactly(pub Fingerprint);

impl Pins for Exactly {
    fn accepts(&self, fingerprint: Fingerprint) -> bool {
        fingerprint == self.0
    }
}

/// Asks other pins, and remembers which key was shown: a refusal can then name it.
#[derive(Debug)]
pub struct Shown {
    pins: Arc<dyn Pins>,
    refused: Mutex<Option<Fingerprint>>,
}

impl Shown {
    /// Decides as `pins` does.
    #[must_use]
    pub fn new(pins: Arc<dyn Pins>) -> Arc<Self> {
        Arc::new(Self {
            pins,
            refused: Mutex::default(),
        })
    }

    /// The key that was shown and not accepted, if one was.
    #[must_use]
    pub fn refused(&self) -> Option<Fingerprint> {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pins for Shown {
    fn accepts(&self, fingerprint: Fingerprint) -> bool {
        let accepts = self.pins.accepts(fingerprint);
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = (!accepts).then_some(fingerprint);
        accepts
    }
}

/// Whoever proves to have a key: for the registration listener, where an unknown one may enrol and nothing more.
#[derive(Debug)]
pub struct Anyone;

impl Pins for Anyone {
    fn accepts(&self, _fingerprint: Fingerprint) -> bool {
        true
    }
}

/// The fingerprint of a certificate's key; `None` when it is no certificate.
#[must_use]
pub fn fingerprint(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(Fingerprint::of_spki(parsed.public_key().raw))
}

/// For the end that dials.
///
/// # Errors
/// The key is not the certificate's.
pub fn client(
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
    pins: Arc<dyn Pins>,
) -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier::new(&provider, pins));
    let builder =
        ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = builder.with_client_auth_cert(vec![certificate.clone()], key.clone_key())?;
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// For the end that listens.
///
/// # Errors
/// The key is not the certificate's.
pub fn server(
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
    pins: Arc<dyn Pins>,
) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier::new(&provider, pins));
    let builder =
        ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = builder.with_client_cert_verifier(verifier);
    let mut config = builder.with_single_cert(vec![certificate.clone()], key.clone_key())?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A name for the handshake; nobody looks at it.
#[must_use]
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST).into())
}

#[derive(Debug)]
struct Verifier {
    pins: Arc<dyn Pins>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(provider: &CryptoProvider, pins: Arc<dyn Pins>) -> Self {
        Self {
            pins,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let fingerprint =
            fingerprint(certificate).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.pins.accepts(fingerprint) {
            return Ok(());
        }
        Err(Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        ))
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
