//! `snapshot documents`: what agents handed over with a snapshot.

use serde_json::Value;
use stillpoint_agentproto::SessionId;

use super::{Meta, find, session_of};
use crate::serve::Daemon;
use crate::serve::control::api::{DocumentReply, Refusal, SnapshotRef};
use crate::serve::documents::DocumentRow;

fn unreadable(error: &anyhow::Error) -> Refusal {
    Refusal::failed(
        "document",
        format!("{error:#}"),
        "restore the data directory from a backup; the snapshot itself is whole",
    )
}

/// What there is of a session.
pub(super) fn list(daemon: &Daemon, session: SessionId) -> Result<Vec<DocumentRow>, Refusal> {
    let listed = daemon.agents.documents().list(session);
    listed.map_err(|error| unreadable(&error))
}

/// The documents of a snapshot.
pub(crate) fn rows(daemon: &Daemon, snapshot: &SnapshotRef) -> Result<Vec<DocumentRow>, Refusal> {
    let info = find(daemon, snapshot)?;
    session_of(daemon, &info).map_or_else(|| Ok(Vec::new()), |session| list(daemon, session))
}

/// One document with its content.
pub(crate) fn one(
    daemon: &Daemon,
    snapshot: &SnapshotRef,
    kind: &str,
    agent: Option<&str>,
) -> Result<DocumentReply, Refusal> {
    let info = find(daemon, snapshot)?;
    let hint = format!("`stillpoint snapshot documents {snapshot}` lists what there is");
    let none = || {
        Refusal::failed(
            "not_found",
            format!("{snapshot} has no document {kind:?}"),
            hint.clone(),
        )
    };
    let session = session_of(daemon, &info).ok_or_else(none)?;
    let mut rows = list(daemon, session)?;
    rows.retain(|row| row.kind == kind && agent.is_none_or(|agent| row.agent.starts_with(agent)));
    if rows.len() > 1 {
        let message = format!("{} agents handed over a document {kind:?}", rows.len());
        return Err(Refusal::usage("ambiguous", message, "name one with --agent"));
    }
    let row = rows.pop().ok_or_else(none)?;
    let bytes = daemon.agents.documents().read(session, &row.agent, &row.kind);
    let bytes = bytes.map_err(|error| unreadable(&error))?;
    Ok(DocumentReply {
        row,
        content_base64: data_encoding::BASE64.encode(&bytes),
    })
}

/// The VMs of all manifests (`PROTOCOL.md` §11: the list `vms`). One that cannot be read is left out: it is still listed as a document.
pub(super) fn vms(daemon: &Daemon, session: Option<SessionId>, documents: &[DocumentRow]) -> Vec<Value> {
    let Some(session) = session else {
        return Vec::new();
    };
    let manifests = documents.iter().filter(|row| row.kind == "vm-manifest");
    let mut vms = Vec::new();
    for row in manifests {
        let bytes = daemon.agents.documents().read(session, &row.agent, &row.kind);
        let manifest = bytes
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        if let Some(list) = manifest.as_ref().and_then(|manifest| manifest["vms"].as_array()) {
            vms.extend(list.iter().cloned());
        }
    }
    vms
}

/// The documents of sessions of which no snapshot is left go.
pub(super) fn forget(daemon: &Daemon, sessions: Vec<SessionId>) {
    if sessions.is_empty() {
        return;
    }
    let left = daemon.pool.snapshots(None);
    let used: Vec<SessionId> = left
        .iter()
        .filter_map(|snapshot| Meta::of(snapshot).proof(&daemon.state, snapshot.id).session)
        .collect();
    for session in sessions.into_iter().filter(|session| !used.contains(session)) {
        daemon.agents.documents().remove(session);
    }
}
