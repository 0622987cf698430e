//! The state directory: who this agent is, and which targets it trusts.
//!
//! | file | what |
//! |---|---|
//! | `agent-id` | UUID, made once |
//! | `key.pem`, `cert.pem` | self-signed; targets pin the key. Mode 0600 |
//! | `targets/FINGERPRINT.json` | one enrolled target (written by `enrol`, removed by `unenrol`) |
//! | `features.json` | what the agent takes part in (written by `features`) |
//! | `generations/FINGERPRINT` | the highest generation seen of it (written by `run`) |
//!
//! One file per target and one writer per file: `enrol` may run while the agent runs.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stillpoint_agentproto::{AgentId, Fingerprint};

/// An agent serves this many targets at most.
pub(crate) const TARGETS_MAX: usize = 64;

/// A state directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// A file cannot be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {what}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The key could not be made.
    #[error("the key cannot be made: {0}")]
    Key(String),
}

/// A target that this agent enrolled with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Target {
    /// What it is pinned by.
    pub(crate) fingerprint: Fingerprint,
    /// As written in `enrol`.
    pub(crate) host: String,
    /// TCP port of its registration channel.
    pub(crate) port: u16,
    /// When (RFC 3339).
    pub(crate) enrolled_at: String,
}

impl Target {
    /// `HOST:PORT`, as people and the resolver read it.
    pub(crate) fn address(&self) -> String {
        address(&self.host, self.port)
    }
}

/// `HOST:PORT`; an IPv6 address gets its brackets.
pub(crate) fn address(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// This agent's name and key.
pub(crate) struct Identity {
    /// What targets know it by.
    pub(crate) agent_id: AgentId,
    /// DER.
    pub(crate) certificate: rustls::pki_types::CertificateDer<'static>,
    /// DER.
    pub(crate) key: rustls::pki_types::PrivateKeyDer<'static>,
}

/// The directory.
#[derive(Debug, Clone)]
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// Opens the directory, and makes it (mode 0700) when it is not there.
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        for dir in [path.to_owned(), path.join("targets"), path.join("generations")] {
            crate::private::make_dir(&dir).map_err(|error| StateError::Io { path: dir, error })?;
        }
        Ok(Self(path.to_owned()))
    }

    /// This agent's identity; makes it at the first call.
    pub(crate) fn identity(&self) -> Result<Identity, StateError> {
        let agent_id = self.agent_id()?;
        if !self.0.join("cert.pem").exists() {
            self.make_key(agent_id)?;
        }
        let certificate = self.pem("cert.pem")?;
        let key = self.pem("key.pem")?;
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key);
        Ok(Identity {
            agent_id,
            certificate: certificate.into(),
            key: key.into(),
        })
    }

    /// The enrolled targets.
    pub(crate) fn targets(&self) -> Result<Vec<Target>, StateError> {
        let dir = self.0.join("targets");
        let io = |error| StateError::Io {
            path: dir.clone(),
            error,
        };
        let mut targets = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.extension().is_some_and(|extension| extension == "json") && targets.len() < TARGETS_MAX {
                let text = fs::read(&path).map_err(|error| StateError::Io {
                    path: path.clone(),
                    error,
                })?;
                let target = serde_json::from_slice(&text);
                targets.push(target.map_err(|error| StateError::Corrupt {
                    path,
                    what: error.to_string(),
                })?);
            }
        }
        targets.sort_by_key(|target: &Target| target.fingerprint);
        Ok(targets)
    }

    /// Trusts a target from now on.
    pub(crate) fn add_target(&self, target: &Target) -> Result<(), StateError> {
        let path = self.target_path(target.fingerprint);
        let text = serde_json::to_vec_pretty(target).map_err(|error| StateError::Key(error.to_string()))?;
        replace(&path, &text).map_err(|error| StateError::Io { path, error })
    }

    /// Trusts a target no longer, and forgets its generation.
    pub(crate) fn remove_target(&self, fingerprint: Fingerprint) -> Result<(), StateError> {
        for path in [self.target_path(fingerprint), self.generation_path(fingerprint)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StateError::Io { path, error });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The highest generation seen of a target; 0 before the first.
    pub(crate) fn generation(&self, fingerprint: Fingerprint) -> Result<u32, StateError> {
        let path = self.generation_path(fingerprint);
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|_| StateError::Corrupt {
                path,
                what: "no number".to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(StateError::Io { path, error }),
        }
    }

    /// Remembers a higher generation.
    pub(crate) fn set_generation(&self, fingerprint: Fingerprint, generation: u32) -> Result<(), StateError> {
        let path = self.generation_path(fingerprint);
        replace(&path, generation.to_string().as_bytes()).map_err(|error| StateError::Io { path, error })
    }

    fn target_path(&self, fingerprint: Fingerprint) -> PathBuf {
        self.0.join("targets").join(format!("{fingerprint}.json"))
    }

    fn generation_path(&self, fingerprint: Fingerprint) -> PathBuf {
        self.0.join("generations").join(fingerprint.to_string())
    }

    fn agent_id(&self) -> Result<AgentId, StateError> {
        let path = self.0.join("agent-id");
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|_| StateError::Corrupt {
                path,
                what: "no UUID".to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut random = [0; 16];
                getrandom::fill(&mut random).map_err(|error| StateError::Key(error.to_string()))?;
                let id = AgentId::from_random(random);
                replace(&path, id.to_string().as_bytes()).map_err(|error| StateError::Io { path, error })?;
                Ok(id)
            }
            Err(error) => Err(StateError::Io { path, error }),
        }
    }

    /// The certificate is written last: it is the sign that the pair is whole.
    fn make_key(&self, agent_id: AgentId) -> Result<(), StateError> {
        let broken = |error: rcgen::Error| StateError::Key(error.to_string());
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(broken)?;
        let mut params = rcgen::CertificateParams::new(Vec::new()).map_err(broken)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, format!("stillpoint-agent {agent_id}"));
        let certificate = params.self_signed(&key).map_err(broken)?;
        for (name, text) in [("key.pem", key.serialize_pem()), ("cert.pem", certificate.pem())] {
            let path = self.0.join(name);
            replace(&path, text.as_bytes()).map_err(|error| StateError::Io { path, error })?;
        }
        Ok(())
    }

    fn pem(&self, name: &str) -> Result<Vec<u8>, StateError> {
        let path = self.0.join(name);
        let text = fs::read(&path).map_err(|error| StateError::Io {
            path: path.clone(),
            error,
        })?;
        let parsed = x509_parser::pem::parse_x509_pem(&text);
        let (_, pem) = parsed.map_err(|error| StateError::Corrupt {
            path,
            what: error.to_string(),
        })?;
        Ok(pem.contents)
    }
}

/// Writes a file of mode 0600 so that it is there wholly or not at all, also after a power cut.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = crate::private::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    crate::private::sync_dir(path.parent().unwrap_or_else(|| Path::new("/")))
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(unix)]
    use std::os::unix::fs::PermissionsExt;

    fn target(byte: u8) -> Target {
        Target {
            fingerprint: Fingerprint([byte; 32]),
            host: "san1".to_owned(),
            port: 11169,
            enrolled_at: jiff::Timestamp::UNIX_EPOCH.to_string(),
        }
    }

    #[test]
    fn identity_is_made_once_and_private() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        let (first, second) = (state.identity().expect("made"), state.identity().expect("read"));
        assert_eq!(first.agent_id, second.agent_id);
        assert_eq!(first.certificate, second.certificate);
        let mode = fs::metadata(dir.path().join("key.pem"))
            .expect("the key")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn targets_and_generations_come_and_go() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        state.add_target(&target(2)).expect("written");
        state.add_target(&target(1)).expect("written");
        state.set_generation(target(1).fingerprint, 7).expect("written");
        assert_eq!(state.targets().expect("read"), [target(1), target(2)]);
        assert_eq!(state.generation(target(1).fingerprint).expect("read"), 7);
        state.remove_target(target(1).fingerprint).expect("removed");
        state
            .remove_target(target(1).fingerprint)
            .expect("removing twice is no error");
        assert_eq!(state.targets().expect("read"), [target(2)]);
        assert_eq!(state.generation(target(1).fingerprint).expect("read"), 0);
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        fs::write(dir.path().join("targets/x.json"), "{}").expect("write");
        assert!(
            state
                .targets()
                .expect_err("a broken target")
                .to_string()
                .contains("targets/x.json")
        );
        fs::write(dir.path().join("agent-id"), "me").expect("write");
        assert!(matches!(state.identity(), Err(StateError::Corrupt { .. })));
    }

    #[test]
    fn ipv6_addresses_get_brackets() {
        assert_eq!(address("::1", 5), "[::1]:5");
        assert_eq!(address("san1", 5), "san1:5");
    }
}
