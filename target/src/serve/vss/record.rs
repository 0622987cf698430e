//! What is kept of a set: over restarts, in the daemon's saved state.

use serde::{Deserialize, Serialize};
use serde_json::json;
use stillpoint_agentproto::message::{LunIdentity, ProvBegin, ProvReady, Shadow};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal, SetId, ShadowId};
use stillpoint_snapshot::{SnapshotInfo, VolumeId};

use crate::serve::state::{Identity, State, StateError};

/// Keys of the sets in the saved state.
const PREFIX: &str = "vss/";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SetState {
    /// Reserved; nothing was cut, or nobody was told.
    Begun,
    /// Cut, and the agent may know.
    Taken,
    /// Deleted while somebody waited for its lock.
    Gone,
}

/// One shadow copy: one source LUN of the set. Several volumes on one LUN are several shadows of one copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Copy {
    pub(super) shadows: Vec<ShadowId>,
    pub(super) source: LunId,
    pub(super) source_name: String,
    source_volume: u32,
    /// The target that shows the source, and will show the copy.
    pub(super) iqn: String,
    /// Of the copy: its LUN and volume.
    pub(super) name: String,
    pub(super) naa: LunId,
    pub(super) serial: String,
    pub(super) size_bytes: u64,
    pub(super) block_size: u32,
    /// Who sees it; none = masked.
    pub(super) shown_to: Option<String>,
    /// Its number while it is shown; the same one is tried again later.
    pub(super) number: Option<u16>,
    /// Deleting has begun.
    #[serde(default)]
    pub(super) going: bool,
    /// Last I/O or request of the agent, Unix time in milliseconds.
    pub(super) used_ms: i64,
    /// When a session last saw it.
    #[serde(skip)]
    pub(super) seen_ms: i64,
    /// Commands of the LUN when that was seen.
    #[serde(skip)]
    pub(super) commands: u64,
    /// The operator was told that it lies idle.
    #[serde(skip)]
    pub(super) warned: bool,
}

impl Copy {
    pub(super) fn new(
        source: (LunId, String, VolumeId),
        iqn: String,
        name: String,
        identity: Identity,
        (size_bytes, block_size): (u64, u32),
        now_ms: i64,
    ) -> Self {
        let (lun, source_name, volume) = source;
        Self {
            shadows: Vec::new(),
            source: lun,
            source_name,
            source_volume: volume.0,
            iqn,
            name,
            naa: LunId(identity.naa),
            serial: identity.serial,
            size_bytes,
            block_size,
            shown_to: None,
            number: None,
            going: false,
            used_ms: now_ms,
            seen_ms: 0,
            commands: 0,
            warned: false,
        }
    }

    pub(super) fn volume(&self) -> VolumeId {
        VolumeId(self.source_volume)
    }

    /// What INQUIRY says of it, and where it is while it is shown.
    pub(super) fn identity(&self) -> LunIdentity {
        LunIdentity {
            lun: self.naa,
            serial: Some(self.serial.clone()),
            iqn: Some(self.iqn.clone()),
            number: self.number.filter(|_| self.shown_to.is_some()),
            size_bytes: Some(self.size_bytes),
        }
    }

    pub(super) fn scsi_identity(&self) -> Identity {
        Identity {
            naa: self.naa.0,
            serial: self.serial.clone(),
        }
    }
}

/// One snapshot set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SetRecord {
    pub(super) set: SetId,
    pub(super) state: SetState,
    pub(super) agent: AgentId,
    /// The agent's host when the set was begun.
    pub(super) host: String,
    /// Who ProvBegin said would see the copies.
    initiator: String,
    pub(super) writable: bool,
    /// What ProvCommit has to show.
    pub(super) token: [u8; 16],
    /// Name of the snapshots, the same on every source.
    pub(super) snapshot: String,
    pub(super) begun_ms: i64,
    pub(super) cut_ms: Option<i64>,
    pub(super) copies: Vec<Copy>,
}

impl SetRecord {
    pub(super) fn new(
        ask: &ProvBegin,
        owner: (AgentId, String),
        token: [u8; 16],
        snapshot: String,
        copies: Vec<Copy>,
        now_ms: i64,
    ) -> Self {
        let (agent, host) = owner;
        Self {
            set: ask.set,
            state: SetState::Begun,
            agent,
            host,
            initiator: ask.initiator.clone(),
            writable: ask.writable,
            token,
            snapshot,
            begun_ms: now_ms,
            cut_ms: None,
            copies,
        }
    }

    /// Whether a ProvBegin asks for this very set.
    pub(super) fn is_repeat(&self, ask: &ProvBegin) -> bool {
        let same = |shadow: &stillpoint_agentproto::message::ShadowAsk| {
            let copy = self.copies.iter().find(|copy| copy.source == shadow.lun);
            copy.is_some_and(|copy| copy.shadows.contains(&shadow.shadow))
        };
        let count: usize = self.copies.iter().map(|copy| copy.shadows.len()).sum();
        count == ask.shadows.len()
            && ask.shadows.iter().all(same)
            && self.writable == ask.writable
            && self.initiator.eq_ignore_ascii_case(&ask.initiator)
    }

    /// The answer to ProvBegin.
    pub(super) fn ready(&self) -> ProvReady {
        let shadows = self.copies.iter().flat_map(|copy| {
            copy.shadows.iter().map(|shadow| Shadow {
                shadow: *shadow,
                source: copy.source,
                identity: copy.identity(),
            })
        });
        ProvReady {
            token: self.token,
            waits_ms: super::BEGUN_MAX_MS,
            shadows: shadows.collect(),
        }
    }

    /// The copy that a shadow is in.
    pub(super) fn copy_of(&self, shadow: ShadowId) -> Result<&Copy, Refusal> {
        let found = self.copies.iter().find(|copy| copy.shadows.contains(&shadow));
        found.ok_or_else(|| no_shadow(self.set, shadow))
    }

    pub(super) fn copy_mut(&mut self, shadow: ShadowId) -> Result<&mut Copy, Refusal> {
        let set = self.set;
        let found = self.copies.iter_mut().find(|copy| copy.shadows.contains(&shadow));
        found.ok_or_else(|| no_shadow(set, shadow))
    }

    /// The cut is durable.
    pub(super) fn taken(&mut self, cut_ms: i64, made: &[SnapshotInfo]) {
        self.state = SetState::Taken;
        self.cut_ms = Some(cut_ms);
        for copy in &mut self.copies {
            copy.used_ms = cut_ms;
            // Identity and content are reserved together: the size that counts is that at the cut.
            if let Some(snapshot) = made.iter().find(|snapshot| snapshot.volume == copy.volume()) {
                copy.size_bytes = snapshot.size_bytes;
            }
        }
    }

    /// The remarks of the snapshots, in the form of the daemon's own (`snapshots::Meta`).
    pub(super) fn snapshot_meta(&self) -> Vec<u8> {
        let note = format!("VSS set {} of {}", self.set, self.host);
        let meta = json!({"requested": "crash", "note": note, "created_by": self.who()});
        meta.to_string().into_bytes()
    }

    /// Who did it, in events.
    pub(super) fn who(&self) -> String {
        format!("agent {}", self.host)
    }

    pub(super) fn sources(&self) -> Vec<String> {
        self.copies.iter().map(|copy| copy.source_name.clone()).collect()
    }

    /// Writes the record down; durable when it returns. Blocks.
    pub(super) fn store(&self, state: &State) -> Result<(), StateError> {
        let bytes = serde_json::to_vec(self).expect("strings and numbers are always JSON");
        state.big_put(&key(self.set), Some(&bytes))
    }

    /// Forgets the record. Blocks.
    pub(super) fn forget(&self, state: &State) -> Result<(), StateError> {
        state.big_put(&key(self.set), None)
    }

    /// Reads all records back.
    pub(super) fn load(state: &State) -> Result<Vec<Self>, StateError> {
        let records = state.big_list(PREFIX).into_iter().map(|(key, bytes)| {
            serde_json::from_slice::<Self>(&bytes).map_err(|error| StateError::Damaged {
                what: key,
                why: error.to_string(),
            })
        });
        records.collect()
    }

    pub(super) fn views(&self, now_ms: i64) -> Vec<CopyView> {
        if self.state != SetState::Taken {
            return Vec::new();
        }
        let view = |copy: &Copy| {
            let cut_ms = self.cut_ms.unwrap_or(self.begun_ms);
            CopyView {
                name: copy.name.clone(),
                owner: self.host.clone(),
                agent: self.agent.to_string(),
                set: self.set.to_string(),
                source: format!("{}@{}", copy.source_name, self.snapshot),
                shown_to: copy.shown_to.clone(),
                age_seconds: u64::try_from(now_ms.saturating_sub(cut_ms) / 1000).unwrap_or(0),
                naa: copy.scsi_identity().naa_text(),
                serial: copy.serial.clone(),
                size_bytes: copy.size_bytes,
                writable: self.writable,
                block_size: copy.block_size,
            }
        };
        self.copies.iter().map(view).collect()
    }
}

fn no_shadow(set: SetId, shadow: ShadowId) -> Refusal {
    let text = format!("set {set} has no shadow copy {shadow} (any more)");
    Refusal::new(ErrorCode::UnknownSession, text)
}

fn key(set: SetId) -> String {
    format!("{PREFIX}{set}")
}

/// What `lun list` and `lun show` say of a shadow copy.
#[derive(Clone, Debug)]
pub(crate) struct CopyView {
    pub(crate) name: String,
    /// The agent's host.
    pub(crate) owner: String,
    pub(crate) agent: String,
    pub(crate) set: String,
    /// `LUN@NAME`.
    pub(crate) source: String,
    pub(crate) shown_to: Option<String>,
    pub(crate) age_seconds: u64,
    pub(crate) naa: String,
    pub(crate) serial: String,
    pub(crate) size_bytes: u64,
    pub(crate) writable: bool,
    pub(crate) block_size: u32,
}

/// What a set counts for in the quotas.
#[derive(Clone, Debug)]
pub(super) struct Quota {
    pub(super) agent: AgentId,
    pub(super) sources: Vec<LunId>,
}

impl Quota {
    pub(super) fn of(set: &SetRecord) -> Self {
        Self {
            agent: set.agent,
            sources: set.copies.iter().map(|copy| copy.source).collect(),
        }
    }
}
