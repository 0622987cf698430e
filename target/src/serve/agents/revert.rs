//! What an online revert asks of the agent that speaks for the hypervisors (agent-protocol.md §10). The operation itself, with its
//! record, is `snapshots::online`.

use std::sync::{Arc, PoisonError};

use ring::digest::{SHA256, digest};
use stillpoint_agentproto::message::{
    Blob, BlobKind, Capabilities, Document, FetchBlob, Gather, MAX_BLOB, Reattached, Reply, Request,
    RevertDone, RevertPrepare, RevertReady, piece_of,
};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal as WireRefusal, SessionId};
use tokio::sync::OwnedMutexGuard;

use super::{Agents, link};
use crate::serve::control::api::Refusal;

fn other() -> WireRefusal {
    WireRefusal::new(ErrorCode::Malformed, "the answer is not the one to the request")
}

fn malformed(error: &impl std::fmt::Display) -> WireRefusal {
    WireRefusal::new(
        ErrorCode::Malformed,
        format!("the manifest that the agent sends: {error}"),
    )
}

impl Agents {
    /// The agent that can take a LUN from its hypervisors: it speaks for a vCenter, and has the LUN mounted there.
    pub(crate) fn reverter(&self, lun: LunId) -> Option<AgentId> {
        let can = |record: &super::Record| {
            record.features.has(Capabilities::VMWARE)
                && record.luns.contains(&lun)
                && record.mounted.contains(&lun)
        };
        self.0.records.all().into_iter().find(can).map(|record| record.id)
    }

    /// Its host, for people.
    pub(crate) fn host_of(&self, agent: AgentId) -> String {
        self.0
            .records
            .get(agent)
            .map_or_else(|| agent.to_string(), |record| record.host)
    }

    /// Snapshots and reverts of one LUN wait for each other.
    pub(crate) async fn lock_lun(&self, lun: LunId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(lun).or_default())
        };
        lock.lock_owned().await
    }

    /// RevertPrepare, and the manifest that came of it.
    ///
    /// # Errors
    /// The agent refuses (nothing is touched, or all is as before), or cannot be asked to the end (nobody knows).
    pub(crate) async fn revert_prepare(
        &self,
        agent: AgentId,
        ask: RevertPrepare,
    ) -> Result<(RevertReady, Option<Vec<u8>>), WireRefusal> {
        let session = ask.session;
        let mut link = self.link(agent).await?;
        let Reply::RevertPrepare(ready) = link.ask(Request::RevertPrepare(ask)).await? else {
            return Err(other());
        };
        let manifest = match &ready.manifest {
            None => None,
            Some(document) => Some(fetch(&mut link, session, document).await?),
        };
        link.close().await;
        Ok((ready, manifest))
    }

    /// RevertDone. An agent that has lost the manifest gets it again.
    ///
    /// # Errors
    /// It cannot be asked, or does not know what to do: to be tried again.
    pub(crate) async fn revert_done(
        &self,
        agent: AgentId,
        ask: RevertDone,
        manifest: Option<&[u8]>,
    ) -> Result<Reattached, WireRefusal> {
        let ask = RevertDone {
            manifest: manifest.and_then(document),
            ..ask
        };
        let mut link = self.link(agent).await?;
        let answer = match link.ask(Request::RevertDone(ask.clone())).await {
            Err(refusal) if refusal.code == ErrorCode::UnknownSession => {
                hand_over(&mut link, ask.session, manifest.unwrap_or_default()).await?;
                link.ask(Request::RevertDone(ask)).await?
            }
            answer => answer?,
        };
        let Reply::RevertDone(reattached) = answer else {
            return Err(other());
        };
        link.close().await;
        Ok(reattached)
    }

    async fn link(&self, agent: AgentId) -> Result<link::Link, WireRefusal> {
        let record = self.0.records.get(agent).ok_or_else(|| {
            WireRefusal::new(
                ErrorCode::NotEnrolled,
                format!("agent {agent}, which took the LUN from its hosts, is not enrolled any more: enrol it again"),
            )
        })?;
        link::dial(&self.0, &record).await
    }
}

/// A refusal of the protocol, as the operator reads it.
pub(crate) fn told(refusal: &WireRefusal) -> Refusal {
    super::snapshot::wire_refusal(refusal)
}

fn document(bytes: &[u8]) -> Option<Document> {
    Some(Document {
        kind: BlobKind::RevertManifest,
        total_bytes: u32::try_from(bytes.len())
            .ok()
            .filter(|total| *total <= MAX_BLOB)?,
        sha256: digest(&SHA256, bytes).as_ref().try_into().ok()?,
    })
}

async fn fetch(
    link: &mut link::Link,
    session: SessionId,
    document: &Document,
) -> Result<Vec<u8>, WireRefusal> {
    let mut gather = Gather::new(session, document.kind);
    while gather.whole().is_none() {
        let ask = FetchBlob {
            session,
            kind: document.kind,
            offset_bytes: gather.next_offset(),
        };
        let Reply::FetchBlob(piece) = link.ask(Request::FetchBlob(ask)).await? else {
            return Err(other());
        };
        gather.take(&piece).map_err(|error| malformed(&error))?;
    }
    let bytes = gather.whole().unwrap_or_default().to_vec();
    if digest(&SHA256, &bytes).as_ref() != document.sha256.as_slice() {
        return Err(malformed(&"its checksum is wrong"));
    }
    Ok(bytes)
}

async fn hand_over(link: &mut link::Link, session: SessionId, bytes: &[u8]) -> Result<(), WireRefusal> {
    let mut offset = 0;
    while let Some(piece) = piece_of(bytes, session, BlobKind::RevertManifest, offset) {
        let end = offset.saturating_add(u32::try_from(piece.bytes.0.len()).unwrap_or(u32::MAX));
        let Reply::Blob(kept) = link.ask(Request::Blob(Blob { ..piece })).await? else {
            return Err(other());
        };
        if kept.received_bytes < end {
            return Err(WireRefusal::new(
                ErrorCode::Malformed,
                "the agent did not keep a piece of the manifest",
            ));
        }
        if usize::try_from(end).is_ok_and(|end| end >= bytes.len()) {
            break;
        }
        offset = end;
    }
    Ok(())
}
