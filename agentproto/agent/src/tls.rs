//! TLS 1.3, both ends with self-signed certificates, both ends pinned by the SHA-256 of the key (agent-protocol.md §2).
//! No names, no authorities, no dates: the pin is all there is. No resumption and no early data: nothing to replay.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, SignatureScheme,
};
use stillpoint_agentproto::Fingerprint;

use crate::state::Identity;

/// Which keys are trusted.
pub(crate) trait Pins: Send + Sync + std::fmt::Debug {
    /// Is this one?
    fn accepts(&self, fingerprint: Fingerprint) -> bool;
}

/// The enrolled targets; changes while the agent runs.
#[derive(Debug, Default)]
pub(crate) struct Enrolled(RwLock<Vec<Fingerprint>>);

impl Enrolled {
    /// Trusts exactly these from now on.
    pub(crate) fn set(&self, pins: Vec<Fingerprint>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pins;
    }
}

impl Pins for Enrolled {
    fn accepts(&self, fingerprint: Fingerprint) -> bool {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&fingerprint)
    }
}

/// Exactly one key.
#[derive(Debug)]
pub(crate) struct Exactly(pub(crate) Fingerprint);

impl Pins for Exactly {
    fn accepts(&self, fingerprint: Fingerprint) -> bool {
        fingerprint == self.0
    }
}

/// The fingerprint of a certificate's key; `None` when it is no certificate.
pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(Fingerprint::of_spki(parsed.public_key().raw))
}

/// For the registration channel: this agent is the TLS client.
pub(crate) fn client(identity: &Identity, pins: Arc<dyn Pins>) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier::new(&provider, pins));
    let builder =
        ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config =
        builder.with_client_auth_cert(vec![identity.certificate.clone()], identity.key.clone_key())?;
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// For snapshot channels: this agent is the TLS server.
pub(crate) fn server(identity: &Identity, pins: Arc<dyn Pins>) -> Result<ServerConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier::new(&provider, pins));
    let builder =
        ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = builder.with_client_cert_verifier(verifier);
    let mut config =
        builder.with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
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
        tracing::debug!(%fingerprint, "a peer with a key that is not pinned here");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateDir;
    use rustls::{ClientConnection, ServerConnection};

    fn identity() -> Identity {
        let dir = tempfile::tempdir().expect("a temporary directory");
        StateDir::open(dir.path())
            .expect("a state directory")
            .identity()
            .expect("an identity")
    }

    fn pin(identity: &Identity) -> Arc<dyn Pins> {
        Arc::new(Exactly(
            fingerprint(&identity.certificate).expect("our own certificate"),
        ))
    }

    /// Runs a whole handshake in memory.
    fn handshake(client: ClientConfig, server: ServerConfig) -> Result<(), Error> {
        let name = ServerName::try_from("stillpoint").expect("a name");
        let mut client = ClientConnection::new(Arc::new(client), name)?;
        let mut server = ServerConnection::new(Arc::new(server))?;
        for _ in 0..10 {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).expect("into memory");
            }
            server.read_tls(&mut wire.as_slice()).expect("from memory");
            server.process_new_packets()?;
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).expect("into memory");
            }
            client.read_tls(&mut wire.as_slice()).expect("from memory");
            client.process_new_packets()?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        Ok(())
    }

    #[test]
    fn pinned_peers_meet_and_others_do_not() {
        let (agent, target, stranger) = (identity(), identity(), identity());
        let dial = |who: &Identity, pins| client(who, pins).expect("a client");
        let listen = |who: &Identity, pins| server(who, pins).expect("a server");
        handshake(dial(&agent, pin(&target)), listen(&target, pin(&agent))).expect("both pinned");
        handshake(dial(&agent, pin(&stranger)), listen(&target, pin(&agent))).expect_err("a wrong server");
        handshake(dial(&stranger, pin(&target)), listen(&target, pin(&agent))).expect_err("a wrong client");
    }

    #[test]
    fn a_stolen_certificate_without_its_key_is_refused() {
        let (agent, target, thief) = (identity(), identity(), identity());
        let stolen = Identity {
            agent_id: agent.agent_id,
            certificate: target.certificate.clone(),
            key: thief.key.clone_key(),
        };
        // rustls itself refuses to pair them; were it not so, the handshake's signature would be wrong.
        let pins: Arc<dyn Pins> = pin(&agent);
        assert!(server(&stolen, pins).is_err());
    }

    #[test]
    fn enrolled_pins_change_while_running() {
        let enrolled = Enrolled::default();
        assert!(!enrolled.accepts(Fingerprint([1; 32])));
        enrolled.set(vec![Fingerprint([1; 32])]);
        assert!(enrolled.accepts(Fingerprint([1; 32])));
        enrolled.set(Vec::new());
        assert!(!enrolled.accepts(Fingerprint([1; 32])));
    }
}
