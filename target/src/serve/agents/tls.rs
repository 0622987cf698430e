//! TLS 1.3 of both agent connections: self-signed certificates, pinned keys, nothing else (agent-protocol.md §2).
//!
//! There are no names and no authorities: a peer is its key. The listener lets any key in (an unknown one may enrol, nothing
//! more); a dialled agent must show exactly the key that was pinned.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, SignatureScheme,
};
use stillpoint_agentproto::Fingerprint;
use zeroize::Zeroizing;

const FILE: &str = "identity.pem";

/// The target's own key and certificate.
pub(super) struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    pub(super) fingerprint: Fingerprint,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the key of this data directory, or makes one. Agents pin it: it is never replaced by itself.
    pub(super) fn open(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let path = dir.join(FILE);
        let pem = match fs::read(&path) {
            Ok(pem) => Zeroizing::new(pem),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => create(dir, &path)?,
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
        };
        Self::parse(&pem).with_context(|| {
            format!(
                "{} is damaged: restore it from a backup (agents have pinned its key), or remove it and enrol every agent again",
                path.display()
            )
        })
    }

    fn parse(pem: &[u8]) -> anyhow::Result<Self> {
        let key = PrivateKeyDer::from_pem_slice(pem)
            .map_err(|error| anyhow::anyhow!("its private key: {error}"))?;
        let certificate = CertificateDer::from_pem_slice(pem)
            .map_err(|error| anyhow::anyhow!("its certificate: {error}"))?;
        let fingerprint = fingerprint(&certificate).context("its certificate is no X.509 certificate")?;
        Ok(Self {
            certificate,
            key,
            fingerprint,
        })
    }
}

/// Written to a side file and renamed: a power cut leaves a whole identity or none.
fn create(dir: &Path, path: &Path) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    let key = rcgen::KeyPair::generate().context("no key could be made")?;
    let certificate = rcgen::CertificateParams::new(vec!["stillpoint".to_owned()])?.self_signed(&key)?;
    let mut pem = Zeroizing::new(key.serialize_pem().into_bytes());
    pem.extend_from_slice(certificate.pem().as_bytes());
    let side = dir.join("identity.pem.new");
    let write = || -> std::io::Result<()> {
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&side)?;
        file.write_all(&pem)?;
        file.sync_all()?;
        fs::rename(&side, path)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(pem)
}

/// The fingerprint of a certificate's key; `None` when it is no certificate.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(Fingerprint::of_spki(parsed.public_key().raw))
}

/// For the registration listener: whoever proves to have a key comes in; what the key may do is decided above.
pub(super) fn server(identity: &Identity) -> anyhow::Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier::new(&provider, None));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())?;
    // No resumption, no early data: nothing to replay.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// For a snapshot channel: only the agent with this key.
pub(super) fn client(identity: &Identity, pin: Fingerprint) -> anyhow::Result<Arc<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier::new(&provider, Some(pin)));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![identity.certificate.clone()], identity.key.clone_key())?;
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// A name for the handshake; nobody looks at it.
pub(super) fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST).into())
}

#[derive(Debug)]
struct Verifier {
    pin: Option<Fingerprint>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(provider: &CryptoProvider, pin: Option<Fingerprint>) -> Self {
        Self {
            pin,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let shown =
            fingerprint(certificate).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        match self.pin {
            Some(pin) if pin != shown => Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
            _ => Ok(()),
        }
    }

    /// The proof that the peer has the key of the certificate that it shows.
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
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_identity_is_made_once_and_kept() {
        let dir = tempfile::tempdir().expect("temp");
        let first = Identity::open(dir.path()).expect("made");
        let again = Identity::open(dir.path()).expect("read");
        assert_eq!(first.fingerprint, again.fingerprint);
        let mode = fs::metadata(dir.path().join(FILE))
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let shown = format!("{first:?}");
        assert!(
            shown.contains(&first.fingerprint.to_string()) && !shown.contains("key:"),
            "{shown}"
        );
    }

    #[test]
    fn a_damaged_identity_is_not_replaced() {
        let dir = tempfile::tempdir().expect("temp");
        fs::write(dir.path().join(FILE), "-----BEGIN").expect("written");
        let error = format!("{:#}", Identity::open(dir.path()).expect_err("damaged"));
        assert!(error.contains("restore it from a backup"), "{error}");
        assert_eq!(fs::read(dir.path().join(FILE)).expect("there"), b"-----BEGIN");
    }
}
