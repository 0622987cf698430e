//! VSS's documents of the sessions under way: the target fetches them before Complete, in pieces.

use std::collections::HashMap;
use std::sync::Mutex;

use stillpoint_agentproto::message::{Blob, BlobKind, Document, FetchBlob, MAX_BLOB, piece_of};
use stillpoint_agentproto::{ErrorCode, Refusal, SessionId};

use crate::engine::lock;

/// Sessions under way whose documents are kept.
const SESSIONS_MAX: usize = 16;

/// Those of one session.
type Kept = Vec<(BlobKind, Vec<u8>)>;

/// All of them.
#[derive(Default)]
pub(crate) struct Documents(Mutex<HashMap<SessionId, Kept>>);

impl Documents {
    /// Keeps one. `None`: it is too long for the protocol, or too many are kept.
    pub(crate) fn keep(&self, session: SessionId, kind: BlobKind, bytes: Vec<u8>) -> Option<Document> {
        let total_bytes = u32::try_from(bytes.len()).ok().filter(|total| *total <= MAX_BLOB);
        let Some(total_bytes) = total_bytes else {
            tracing::warn!(%session, bytes = bytes.len(), "a document of VSS is too long to be kept with the snapshot");
            return None;
        };
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, &bytes).as_ref());
        let mut all = lock(&self.0);
        if !all.contains_key(&session) && all.len() >= SESSIONS_MAX {
            return None;
        }
        all.entry(session).or_default().push((kind, bytes));
        Some(Document {
            kind,
            total_bytes,
            sha256,
        })
    }

    /// A piece of one.
    pub(crate) fn piece(&self, ask: &FetchBlob) -> Result<Blob, Refusal> {
        let all = lock(&self.0);
        let document = all
            .get(&ask.session)
            .and_then(|kinds| kinds.iter().find(|(kind, _)| *kind == ask.kind));
        let (_, document) =
            document.ok_or_else(|| Refusal::new(ErrorCode::UnknownSession, "no such document here"))?;
        piece_of(document, ask.session, ask.kind, ask.offset_bytes)
            .ok_or_else(|| Refusal::new(ErrorCode::Malformed, "the document ends before that offset"))
    }

    /// The session is over.
    pub(crate) fn forget(&self, session: SessionId) {
        lock(&self.0).remove(&session);
    }
}
