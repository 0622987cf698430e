//! The target's own key, and what it trusts (agent-protocol.md §2); the TLS itself is `stillpoint_agentproto::tls`.
//!
//! There are no names and no authorities: a peer is its key. The listener lets any key in (an unknown one may enrol, nothing
//! more); a dialled agent must show exactly the key that was pinned.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ServerConfig};
pub(super) use stillpoint_agentproto::tls::{fingerprint, server_name};
use stillpoint_agentproto::{Fingerprint, tls};
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
    replace(dir, path, &pem).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(pem)
}

/// Replaces a file of mode 0600 in `dir`; durable when it returns.
pub(super) fn replace(dir: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let side = path.with_extension("new");
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&side)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&side, path)?;
    File::open(dir)?.sync_all()
}

/// For the registration listener: whoever proves to have a key comes in; what the key may do is decided above.
pub(super) fn server(identity: &Identity) -> anyhow::Result<Arc<ServerConfig>> {
    Ok(tls::server(
        &identity.certificate,
        &identity.key,
        Arc::new(tls::Anyone),
    )?)
}

/// For a snapshot channel: only the agent with the pinned key.
pub(super) fn client(identity: &Identity, pins: Arc<dyn tls::Pins>) -> anyhow::Result<Arc<ClientConfig>> {
    Ok(tls::client(&identity.certificate, &identity.key, pins)?)
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
