//! Documents that agents hand over with a snapshot: VSS backup components and writers' metadata, manifests of VMs. Files below
//! `documents/<session>/` in the data directory, named by agent and kind; they live as long as a snapshot of that session.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use stillpoint_agentproto::message::{BlobKind, MAX_BLOB};
use stillpoint_agentproto::{AgentId, SessionId};

/// Documents of one session that are listed; each agent has a handful.
const MAX_LISTED: usize = 1024;

/// What `snapshot show` and `snapshot documents` list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DocumentRow {
    pub(crate) agent: String,
    /// `backup-components`, `writer-metadata` or `vm-manifest`.
    pub(crate) kind: String,
    pub(crate) size_bytes: u64,
    pub(crate) sha256: String,
}

/// Where they are. Everything here blocks.
#[derive(Clone, Debug)]
pub(crate) struct Documents(PathBuf);

impl Documents {
    /// Those of this data directory.
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self(data_dir.join("documents"))
    }

    fn of(&self, session: SessionId) -> PathBuf {
        self.0.join(session.to_string())
    }

    /// Keeps a document; durable when it returns.
    pub(crate) fn put(
        &self,
        session: SessionId,
        agent: AgentId,
        kind: BlobKind,
        bytes: &[u8],
    ) -> anyhow::Result<()> {
        let dir = self.of(session);
        fs::create_dir_all(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let path = dir.join(format!("{agent}.{kind}"));
        let fresh = dir.join(format!("{agent}.{kind}.new"));
        let write = || {
            let mut file = File::create(&fresh)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(&dir)?.sync_all()?;
            // The directory itself is new, too.
            File::open(&self.0)?.sync_all()
        };
        write().with_context(|| format!("{} cannot be written", path.display()))
    }

    /// What there is of a session, by agent and kind.
    pub(crate) fn list(&self, session: SessionId) -> anyhow::Result<Vec<DocumentRow>> {
        let dir = self.of(session);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", dir.display())),
        };
        let mut rows = Vec::new();
        for entry in entries.take(MAX_LISTED) {
            let name = entry?.file_name();
            let Some((agent, kind)) = name.to_str().and_then(|name| name.split_once('.')) else {
                continue;
            };
            // What a crash left half-written has another ending.
            if !KINDS.iter().any(|known| known.as_str() == kind) {
                continue;
            }
            let bytes = self.read(session, agent, kind)?;
            rows.push(DocumentRow {
                agent: agent.to_owned(),
                kind: kind.to_owned(),
                size_bytes: bytes.len() as u64,
                sha256: data_encoding::HEXLOWER.encode(sha256(&bytes).as_ref()),
            });
        }
        rows.sort_by(|a, b| (&a.agent, &a.kind).cmp(&(&b.agent, &b.kind)));
        Ok(rows)
    }

    /// One document, whose row was listed.
    pub(crate) fn read(&self, session: SessionId, agent: &str, kind: &str) -> anyhow::Result<Vec<u8>> {
        let path = self.of(session).join(format!("{agent}.{kind}"));
        let len = fs::metadata(&path)
            .with_context(|| format!("{} cannot be read", path.display()))?
            .len();
        anyhow::ensure!(
            len <= u64::from(MAX_BLOB),
            "{} has {len} bytes: {MAX_BLOB} are allowed",
            path.display()
        );
        fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))
    }

    /// The last snapshot of the session is gone.
    pub(crate) fn remove(&self, session: SessionId) {
        let dir = self.of(session);
        match fs::remove_dir_all(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            // They cost room and nothing else.
            Err(error) => {
                tracing::warn!(%error, dir = %dir.display(), "documents of a deleted snapshot stay")
            }
        }
    }
}

const KINDS: [BlobKind; 4] = [
    BlobKind::BackupComponents,
    BlobKind::WriterMetadata,
    BlobKind::VmManifest,
    BlobKind::RevertManifest,
];

pub(crate) fn sha256(bytes: &[u8]) -> ring::digest::Digest {
    ring::digest::digest(&ring::digest::SHA256, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_kept_listed_and_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let documents = Documents::new(dir.path());
        let (session, agent) = (SessionId([1; 16]), AgentId([2; 16]));
        assert_eq!(documents.list(session).expect("nothing yet"), []);
        for content in [&b"<old/>"[..], b"<new/>"] {
            documents
                .put(session, agent, BlobKind::BackupComponents, content)
                .expect("kept");
        }
        documents
            .put(session, agent, BlobKind::VmManifest, b"{}")
            .expect("kept");
        // A crash in the middle of a write.
        let half = documents.of(session).join(format!("{agent}.writer-metadata.new"));
        fs::write(half, b"<ha").expect("written");
        let rows = documents.list(session).expect("a list");
        let kinds: Vec<_> = rows
            .iter()
            .map(|row| (row.kind.as_str(), row.size_bytes))
            .collect();
        assert_eq!(kinds, [("backup-components", 6), ("vm-manifest", 2)]);
        let row = rows.first().expect("a row");
        assert_eq!(
            documents.read(session, &row.agent, &row.kind).expect("read"),
            b"<new/>"
        );
        assert_eq!(documents.list(SessionId([3; 16])).expect("another"), []);
        documents.remove(session);
        documents.remove(session);
        assert_eq!(documents.list(session).expect("gone"), []);
    }
}
