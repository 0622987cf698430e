//! What a running agent tells `stillpoint-agent status`: a file in the run directory, written anew at every change.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use stillpoint_agentproto::Fingerprint;

/// How the registration with a target stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum Connection {
    /// Dialling, or not yet registered.
    Connecting,
    /// Registered.
    Registered {
        /// The LUNs that may be frozen.
        luns: Vec<String>,
        /// Why no snapshot would work all the same: the target does not reach this agent.
        trouble: Option<String>,
    },
    /// Waiting to dial again.
    Down {
        /// Why.
        error: String,
    },
}

/// All of them.
pub(crate) type Connections = BTreeMap<Fingerprint, Connection>;

/// Where registrations write how they stand.
pub(crate) struct Board {
    path: PathBuf,
    connections: Mutex<Connections>,
}

impl Board {
    /// A board without entries.
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self {
            path: path(run_dir),
            connections: Mutex::default(),
        }
    }

    /// Notes how a registration stands.
    pub(crate) fn set(&self, target: Fingerprint, connection: Connection) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.get(&target) != Some(&connection) {
            connections.insert(target, connection);
            self.write(&connections);
        }
    }

    /// Forgets a target.
    pub(crate) fn remove(&self, target: Fingerprint) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.remove(&target).is_some() {
            self.write(&connections);
        }
    }

    fn write(&self, connections: &Connections) {
        let beside = self.path.with_extension("new");
        let text = serde_json::to_vec(connections).unwrap_or_default();
        if let Err(error) = fs::write(&beside, text).and_then(|()| fs::rename(&beside, &self.path)) {
            tracing::warn!(path = %self.path.display(), %error, "`stillpoint-agent status` will show old news");
        }
    }
}

/// What a running agent wrote last.
pub(crate) fn read(run_dir: &Path) -> Connections {
    fs::read(path(run_dir))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("status.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let board = Board::new(dir.path());
        let (one, two) = (Fingerprint([1; 32]), Fingerprint([2; 32]));
        board.set(
            one,
            Connection::Registered {
                luns: vec!["naa.6".to_owned()],
                trouble: None,
            },
        );
        board.set(
            two,
            Connection::Down {
                error: "no route".to_owned(),
            },
        );
        board.remove(one);
        let read = read(dir.path());
        assert_eq!(
            read.into_iter().collect::<Vec<_>>(),
            [(
                two,
                Connection::Down {
                    error: "no route".to_owned()
                }
            )]
        );
    }

    #[test]
    fn no_file_and_garbage_are_no_news() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert!(read(dir.path()).is_empty());
        fs::write(dir.path().join("status.json"), "[").expect("write");
        assert!(read(dir.path()).is_empty());
    }
}
