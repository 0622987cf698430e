//! The control socket's language: what a client may ask, and what it is told. Client and daemon share these types.
//!
//! One request per connection, one JSON document per line. The answer is any number of `progress` and `event` lines, and then one
//! `result` or `error`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use stillpoint_config::{Consistency, LunName, OnFailure, Trouble};
use stillpoint_snapshot::Error as StoreError;

pub(crate) use crate::serve::documents::DocumentRow;
pub(crate) use crate::serve::events::{Event, Severity};
pub(crate) use crate::serve::registry::{PortalView, SessionView};
pub(crate) use crate::serve::state::VolumeKind;

/// Longest request line in bytes.
pub(crate) const MAX_REQUEST_BYTES: u64 = 64 * 1024;
/// Longest answer line in bytes that a client accepts.
pub(crate) const MAX_REPLY_BYTES: u64 = 64 * 1024 * 1024;

/// `LUN@NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct SnapshotRef {
    pub(crate) lun: String,
    pub(crate) name: String,
}

impl FromStr for SnapshotRef {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<Self, Trouble> {
        let (lun, name) = text.split_once('@').ok_or_else(|| Trouble {
            trouble: format!("{text:?} names no snapshot"),
            way_out: "write LUN@NAME; `stillpoint snapshot list` shows them".to_owned(),
        })?;
        let (lun, name) = (lun.parse::<LunName>()?, name.parse::<LunName>()?);
        Ok(Self {
            lun: lun.to_string(),
            name: name.to_string(),
        })
    }
}

impl TryFrom<String> for SnapshotRef {
    type Error = Trouble;

    fn try_from(text: String) -> Result<Self, Trouble> {
        text.parse()
    }
}

impl From<SnapshotRef> for String {
    fn from(snapshot: SnapshotRef) -> Self {
        snapshot.to_string()
    }
}

impl fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.lun, self.name)
    }
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    Status {},
    ConfigPlan {},
    ConfigApply {
        /// The person has seen whose sessions it touches, or which volumes it creates.
        confirmed: bool,
    },
    LunList {},
    LunShow {
        lun: String,
    },
    LunPreflight {
        lun: String,
        consistency: Consistency,
    },
    VolumeList {},
    VolumeRename {
        old: String,
        new: String,
    },
    VolumeDelete {
        name: String,
    },
    SessionList {},
    SessionDrop {
        id: u64,
    },
    Trace(TraceRequest),
    SnapshotCreate(SnapshotCreate),
    SnapshotList {
        lun: Option<String>,
    },
    SnapshotShow {
        snapshot: SnapshotRef,
    },
    SnapshotDocuments {
        snapshot: SnapshotRef,
        /// Only this one, with its content.
        kind: Option<String>,
        /// Of this agent, when several have one.
        agent: Option<String>,
    },
    SnapshotDelete {
        snapshots: Vec<SnapshotRef>,
        /// Only say what it would free.
        plan: bool,
    },
    SnapshotHold {
        snapshot: SnapshotRef,
        hold: bool,
    },
    SnapshotDiff {
        from: SnapshotRef,
        to: Option<SnapshotRef>,
    },
    SnapshotRevert {
        snapshot: SnapshotRef,
        force: bool,
        /// Power off VMs that run on the LUN.
        #[serde(default)]
        power_off: bool,
        /// Only say what would happen.
        plan: bool,
    },
    SnapshotMount {
        snapshot: SnapshotRef,
        read_only: bool,
        initiators: Vec<String>,
    },
    SnapshotUnmount {
        name: String,
        force: bool,
    },
    CloneCreate {
        snapshot: SnapshotRef,
        new: String,
    },
    AgentTokenCreate {
        luns: Vec<String>,
        ttl_seconds: u64,
    },
    AgentList {},
    AgentShow {
        id: String,
    },
    AgentTest {
        id: String,
    },
    AgentAllow {
        id: String,
        lun: String,
    },
    AgentApprove {
        id: String,
    },
    AgentRevoke {
        id: String,
    },
    AgentGenerationBump {},
    StoreStats {},
    StoreCompact {},
    StoreScrub {
        action: ScrubAction,
    },
    Events {
        follow: bool,
        newest: usize,
    },
}

/// What to do with the scrub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ScrubAction {
    /// Begin, go on or rejoin, and wait for its end.
    Run {
        /// Bytes per second; None: as it is, or the default.
        rate: Option<u64>,
        restart: bool,
    },
    Status,
    Stop,
}

/// `store scrub`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ScrubView {
    /// `never`, `running`, `stopped` or `done`.
    pub(crate) state: String,
    /// `records`, `map`, `data` or `done`.
    pub(crate) phase: stillpoint_snapshot::ScrubPhase,
    pub(crate) percent: u8,
    pub(crate) started_at: Option<String>,
    pub(crate) ended_at: Option<String>,
    pub(crate) rate_bytes: u64,
    /// Transaction group that the map was compared at.
    pub(crate) txg: u64,
    pub(crate) records: u64,
    pub(crate) page_versions: u64,
    pub(crate) verified_bytes: u64,
    /// Data without a recorded checksum.
    pub(crate) unverified_bytes: u64,
    pub(crate) problem_count: u64,
    /// The first of them, one line each.
    pub(crate) problems: Vec<String>,
    /// All known bad data.
    pub(crate) bad_data: Vec<BadRange>,
}

/// `snapshot create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SnapshotCreate {
    pub(crate) luns: Vec<String>,
    pub(crate) name: Option<String>,
    pub(crate) consistency: Consistency,
    /// None: `[agents] on_failure`.
    pub(crate) on_failure: Option<OnFailure>,
    pub(crate) lock_seconds: Option<u64>,
    pub(crate) note: Option<String>,
}

/// One line of the answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    /// Long work goes on.
    Progress(String),
    /// An event, for `events`.
    Event(Event),
    /// A piece of a file, in base64, for `trace`.
    Data(String),
    /// The end: it is done.
    Result(Value),
    /// The end: it is not.
    Error(Refusal),
}

/// Why something was not done. Its shape is what `--json` prints on standard error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// Stable word for scripts.
    pub(crate) code: String,
    /// The thing and the trouble.
    pub(crate) message: String,
    /// The way out.
    pub(crate) hint: String,
    /// Exit code of the client.
    pub(crate) exit: u8,
    /// Further details, such as every problem of a configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) details: Vec<String>,
}

/// It did not work.
pub(crate) const EXIT_FAILED: u8 = 1;
/// The command line is wrong.
pub(crate) const EXIT_USAGE: u8 = 2;
/// A rule forbids it.
pub(crate) const EXIT_REFUSED: u8 = 3;
/// No daemon answers.
pub(crate) const EXIT_UNREACHABLE: u8 = 4;

/// Code of the refusal that `--yes`, or a person at the terminal, overcomes.
pub(crate) const CONFIRMATION: &str = "confirmation_needed";

impl Refusal {
    fn new(exit: u8, code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
            hint: hint.into(),
            exit,
            details: Vec::new(),
        }
    }

    pub(crate) fn failed(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(EXIT_FAILED, code, message, hint)
    }

    pub(crate) fn usage(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(EXIT_USAGE, code, message, hint)
    }

    pub(crate) fn refused(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(EXIT_REFUSED, code, message, hint)
    }

    pub(crate) fn unreachable(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(EXIT_UNREACHABLE, "unreachable", message, hint)
    }

    pub(crate) fn with_details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match error {
            StoreError::Refused { .. } => Self::refused("refused", message, ""),
            StoreError::Limit { .. } => Self::refused("limit", message, "delete what is no longer needed"),
            StoreError::ReadOnly => Self::refused("read_only", message, ""),
            StoreError::NotFound { .. } => Self::failed("not_found", message, ""),
            StoreError::Exists { .. } => Self::failed("exists", message, "choose another name"),
            StoreError::NoSpace => Self::failed(
                "no_space",
                message,
                "delete snapshots or give the file system more room",
            ),
            StoreError::Poisoned { .. } => Self::failed(
                "poisoned",
                message,
                "see `stillpoint events` for the first failure, then restart the daemon",
            ),
            _ => Self::failed(
                "store",
                message,
                "see `stillpoint events`; with the daemon stopped, `stillpoint store check`",
            ),
        }
    }
}

impl From<crate::serve::state::StateError> for Refusal {
    fn from(error: crate::serve::state::StateError) -> Self {
        match error {
            crate::serve::state::StateError::Store(error) => error.into(),
            other => Self::failed(
                "state",
                other.to_string(),
                "restore the data directory from a backup, or report this",
            ),
        }
    }
}

/// `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    /// `ok`, `warning` or `error`.
    pub(crate) health: String,
    /// What is behind `health`, and what the configuration warns of.
    pub(crate) warnings: Vec<String>,
    pub(crate) started_at: String,
    pub(crate) uptime_seconds: u64,
    /// The file, or `embedded`.
    pub(crate) config: String,
    pub(crate) data_dir: String,
    pub(crate) portals: Vec<PortalView>,
    /// Their iSCSI names.
    pub(crate) targets: Vec<String>,
    /// Their names, mounted snapshots included.
    pub(crate) luns: Vec<String>,
    pub(crate) sessions: usize,
    pub(crate) volumes: usize,
    pub(crate) unassigned_volumes: Vec<String>,
    pub(crate) snapshots: usize,
    pub(crate) mounts: usize,
    pub(crate) pool: PoolSpace,
}

/// Space of the pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PoolSpace {
    pub(crate) used_bytes: u64,
    /// What can still be written; None when the file system did not say.
    pub(crate) available_bytes: u64,
    pub(crate) metadata_bytes: u64,
    pub(crate) grain_bytes: u32,
    pub(crate) out_of_space: bool,
}

/// One change of `config plan`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PlannedChange {
    pub(crate) subject: String,
    pub(crate) text: String,
    /// `none`, `told`, `ends_excluded`, `ends` or `refused`.
    pub(crate) effect: String,
    /// Sessions that it ends.
    pub(crate) ends_sessions: Vec<SessionLabel>,
}

/// A session in few words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionLabel {
    pub(crate) id: u64,
    pub(crate) initiator: String,
    pub(crate) target: String,
    pub(crate) peer: String,
}

impl fmt::Display for SessionLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {} of {} from {}", self.id, self.initiator, self.peer)
    }
}

impl From<&SessionView> for SessionLabel {
    fn from(session: &SessionView) -> Self {
        Self {
            id: session.id,
            initiator: session.initiator.clone(),
            target: session.target.clone(),
            peer: session.peer.to_string(),
        }
    }
}

/// `config plan` and `config apply`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ConfigPlan {
    pub(crate) file: String,
    pub(crate) changes: Vec<PlannedChange>,
    /// Volumes that would be created.
    pub(crate) creates_volumes: Vec<String>,
    /// Volumes that no `[[lun]]` names.
    pub(crate) unassigned_volumes: Vec<String>,
    pub(crate) warnings: Vec<String>,
    /// Checked but not served by this version.
    pub(crate) unserved: Vec<String>,
    /// False for `config plan`.
    pub(crate) applied: bool,
}

/// `lun list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LunRow {
    pub(crate) name: String,
    pub(crate) kind: VolumeKind,
    pub(crate) size_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) block_size: u32,
    pub(crate) read_only: bool,
    /// Where it is served; empty when no target serves it.
    pub(crate) targets: Vec<LunPath>,
    pub(crate) sessions: usize,
    pub(crate) snapshots: usize,
    pub(crate) naa: String,
    pub(crate) serial: String,
    /// With kind `vss`: whose it is, of what, for how long.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub(crate) shadow_copy: Option<ShadowCopy>,
}

/// What `lun list` says of a shadow copy beside what it says of every LUN.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ShadowCopy {
    /// Host of the agent that made it.
    pub(crate) owner: String,
    pub(crate) agent: String,
    /// VSS's number of the snapshot set.
    pub(crate) set: String,
    /// `LUN@NAME` that it is a copy of.
    pub(crate) source: String,
    /// Who sees it; none while it is masked.
    pub(crate) initiator: Option<String>,
    pub(crate) age_seconds: u64,
}

/// A LUN on a target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LunPath {
    pub(crate) iqn: String,
    /// Number of the LUN on that target.
    pub(crate) lun: u16,
    pub(crate) agents: bool,
    pub(crate) chap: bool,
    /// `*` for anyone.
    pub(crate) initiators: Vec<String>,
    pub(crate) allow_from: Vec<String>,
    pub(crate) portals: Vec<String>,
}

/// `lun show`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LunDetail {
    #[serde(flatten)]
    pub(crate) row: LunRow,
    pub(crate) grain_bytes: u32,
    /// WCE now.
    pub(crate) write_cache: bool,
    /// What the file says.
    pub(crate) write_cache_configured: bool,
    /// What an initiator saved; it wins.
    pub(crate) write_cache_saved: Option<bool>,
    pub(crate) origin: Option<String>,
    pub(crate) created_at: String,
    /// When checksums are recorded: `off`, `sealed` or `always`.
    pub(crate) checksums: stillpoint_snapshot::Checksums,
    /// Known bad data of the LUN and of its snapshots.
    pub(crate) bad_data: Vec<BadRange>,
    pub(crate) commands: u64,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) session_list: Vec<SessionView>,
}

/// A range that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BadRange {
    pub(crate) lun: String,
    /// Name of the snapshot that shows it; None: the LUN as it is now.
    pub(crate) snapshot: Option<String>,
    pub(crate) offset_bytes: u64,
    pub(crate) length_bytes: u64,
    /// First logical block.
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
    /// `checksum`: other bytes than were written; `unreadable`: the disk does not answer.
    pub(crate) reason: String,
    pub(crate) found_at: String,
}

impl BadRange {
    /// What the store knows of one volume and its snapshots, or of all.
    pub(crate) fn list(
        pool: &stillpoint_snapshot::Pool,
        volume: Option<stillpoint_snapshot::VolumeId>,
    ) -> Result<Vec<Self>, Refusal> {
        let block_size = |bad: &stillpoint_snapshot::BadData| match &bad.snapshot {
            Some((id, _)) => pool.snapshot_by_id(*id).map(|snapshot| snapshot.block_size),
            None => pool.volume_by_id(bad.volume).map(|volume| volume.block_size()),
        };
        let range = |bad: stillpoint_snapshot::BadData| {
            let block = u64::from(block_size(&bad).unwrap_or(512).max(1));
            Self {
                lun: bad.volume_name,
                snapshot: bad.snapshot.map(|(_, name)| name),
                offset_bytes: bad.offset,
                length_bytes: bad.len,
                lba: bad.offset / block,
                blocks: bad.len.div_ceil(block),
                reason: if bad.checksum { "checksum" } else { "unreadable" }.to_owned(),
                found_at: time_text(bad.found_ms),
            }
        };
        Ok(pool.bad_data(volume)?.into_iter().map(range).collect())
    }
}

/// `snapshot show`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotDetail {
    #[serde(flatten)]
    pub(crate) row: SnapshotRow,
    /// The checksums of all that it holds have been recorded.
    pub(crate) sealed: bool,
    /// Known bad data that it shows.
    pub(crate) bad_data: Vec<BadRange>,
    /// The agents' session in which it was taken; VM snapshots are called after it.
    pub(crate) session: Option<String>,
    /// What agents handed over with it: `snapshot documents` brings them out.
    pub(crate) documents: Vec<DocumentRow>,
    /// The VMs in it, as the vCenter agent's manifest lists them.
    pub(crate) vms: Vec<Value>,
}

/// One document of a snapshot, with its content.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DocumentReply {
    #[serde(flatten)]
    pub(crate) row: DocumentRow,
    pub(crate) content_base64: String,
}

/// `volume list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VolumeRow {
    pub(crate) name: String,
    pub(crate) kind: VolumeKind,
    /// `assigned`, `unassigned` or `mounted`.
    pub(crate) state: String,
    pub(crate) size_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) block_size: u32,
    pub(crate) read_only: bool,
    pub(crate) snapshots: usize,
    pub(crate) origin: Option<String>,
    pub(crate) created_at: String,
    pub(crate) naa: String,
    pub(crate) serial: String,
}

/// A snapshot: `snapshot list`, `show`, `create`, `hold`, `release`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotRow {
    pub(crate) lun: String,
    pub(crate) name: String,
    pub(crate) id: String,
    /// What is proved.
    pub(crate) consistency: Consistency,
    /// What was asked for.
    pub(crate) requested: Consistency,
    pub(crate) created_at: String,
    /// How long block operations were held for the cut.
    pub(crate) cut_ms: u64,
    pub(crate) group_id: Option<String>,
    pub(crate) size_bytes: u64,
    /// Bytes that were in use at the cut; most are shared with other snapshots.
    pub(crate) referenced_bytes: u64,
    /// Bytes that nothing else uses: what deleting it alone gives back. None = not counted yet, since a long list is
    /// counted a part at a time.
    pub(crate) unique_bytes: Option<u64>,
    pub(crate) hold: bool,
    pub(crate) locked_until: Option<String>,
    pub(crate) note: Option<String>,
    pub(crate) created_by: String,
    /// Names of the mounts and clones that stand on it.
    pub(crate) used_by: Vec<String>,
    /// Who took part, as the agents reported.
    pub(crate) agents: Vec<Value>,
    /// Why less is proved than was asked for.
    pub(crate) reasons: Vec<String>,
    /// When the agents prepared, froze and thawed, in milliseconds from the beginning.
    pub(crate) times: Option<Value>,
}

/// `snapshot delete --plan`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotDeletePlan {
    pub(crate) snapshots: Vec<SnapshotRef>,
    /// What deleting all of them together gives back.
    pub(crate) frees_bytes: u64,
    /// Those whose data stays, since clones stand on them.
    pub(crate) kept_by_clones: Vec<SnapshotRef>,
}

/// `snapshot diff`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Diff {
    pub(crate) from: SnapshotRef,
    /// None: the LUN as it is now.
    pub(crate) to: Option<SnapshotRef>,
    pub(crate) changed_bytes: u64,
    pub(crate) extents: Vec<DiffExtent>,
}

/// A range that differs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DiffExtent {
    pub(crate) offset_bytes: u64,
    pub(crate) length_bytes: u64,
    /// What it is on the younger side: `data`, `zero` or `hole`.
    pub(crate) kind: stillpoint_snapshot::ExtentKind,
}

/// `snapshot revert`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Revert {
    pub(crate) lun: String,
    pub(crate) snapshot: String,
    /// Of the snapshot.
    pub(crate) created_at: String,
    pub(crate) consistency: Consistency,
    /// What is lost from the LUN; it stays in the automatic snapshot.
    pub(crate) changed_bytes: u64,
    pub(crate) size_before_bytes: u64,
    pub(crate) size_after_bytes: u64,
    /// Sessions that stand in the way, or that were ended.
    pub(crate) sessions: Vec<SessionLabel>,
    /// Taken first, so that the revert can be undone; None in a plan.
    pub(crate) automatic_snapshot: Option<String>,
    /// False for `--plan`.
    pub(crate) reverted: bool,
    /// The host of the agent that takes the LUN from its hypervisors; None when nobody has to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) agent: Option<String>,
    /// The hosts that let the LUN go and take it again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) hosts: Vec<Value>,
    /// The VMs on it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) vms: Vec<Value>,
    /// What stands in the way, or should be known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) findings: Vec<Value>,
}

/// `snapshot mount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MountReply {
    pub(crate) name: String,
    pub(crate) iqn: String,
    /// Number of the LUN on that target.
    pub(crate) lun: u16,
    pub(crate) portals: Vec<String>,
    /// `LUN@NAME`.
    pub(crate) snapshot: String,
    pub(crate) source_lun: String,
    pub(crate) read_only: bool,
    pub(crate) initiators: Vec<String>,
    pub(crate) naa: String,
    pub(crate) serial: String,
}

/// `clone create`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CloneReply {
    pub(crate) name: String,
    pub(crate) snapshot: String,
    pub(crate) size_bytes: u64,
    pub(crate) block_size: u32,
    pub(crate) naa: String,
    pub(crate) serial: String,
}

/// What was done, for verbs that have nothing else to say: `{"volume":"a","deleted":true}`.
pub(crate) fn done(pairs: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    Value::Object(
        pairs
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
    )
}

/// What to record of which session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TraceRequest {
    pub(crate) session: u64,
    /// The contents of blocks too.
    pub(crate) payload: bool,
    /// The file ends here.
    pub(crate) max_bytes: u64,
    /// … or after this time.
    pub(crate) seconds: Option<u64>,
}

/// `1 session`, `2 sessions`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Milliseconds since 1970 as RFC 3339.
pub(crate) fn time_text(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map_or_else(|_| "unknown".to_owned(), |t| t.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_named_lun_at_name() {
        let snapshot: SnapshotRef = "sql01@20261122T160000Z".parse().expect("right");
        assert_eq!(snapshot.to_string(), "sql01@20261122T160000Z");
        for text in ["sql01", "@x", "sql01@", "a@b@c", "a b@c"] {
            assert!(text.parse::<SnapshotRef>().is_err(), "{text}");
        }
    }

    #[test]
    fn requests_are_read_back_and_unknown_fields_refused() {
        let requests = [
            Request::Status {},
            Request::SnapshotRevert {
                snapshot: "a@b".parse().expect("right"),
                force: true,
                power_off: false,
                plan: false,
            },
            Request::SnapshotCreate(SnapshotCreate {
                luns: vec!["a".into()],
                name: None,
                consistency: Consistency::Application,
                on_failure: Some(OnFailure::CrashConsistent),
                lock_seconds: Some(60),
                note: None,
            }),
        ];
        for request in requests {
            let text = serde_json::to_string(&request).expect("json");
            assert_eq!(serde_json::from_str::<Request>(&text).expect(&text), request);
        }
        for text in [
            r#"{"verb":"status","x":1}"#,
            r#"{"verb":"format_disk"}"#,
            "{}",
            "[]",
            r#"{"verb":"snapshot_show","snapshot":"x"}"#,
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }
}
