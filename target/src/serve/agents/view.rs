//! What the command line shows of agents.

use serde::{Deserialize, Serialize};
use stillpoint_agentproto::message::{App, Finding, LunVolumes, Mount, Severity};

/// `agent token create`. The token is in here because showing it once is the point of the command.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct TokenView {
    /// `SP1-…`.
    pub(crate) token: String,
    /// RFC 3339.
    pub(crate) expires_at: String,
    /// LUNs that the agent will be allowed on.
    pub(crate) luns: Vec<String>,
    /// What to run on the agent's host.
    pub(crate) enrol: String,
}

/// How an agent stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AgentState {
    /// Registered, heartbeats come, and the target reaches its port.
    Connected,
    /// Registered, and the dial-back runs.
    Checking,
    /// Registered, but the target does not reach its port.
    Unreachable,
    /// Not registered now.
    Disconnected,
}

/// `agent list`, `agent show`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AgentView {
    pub(crate) id: String,
    pub(crate) host: String,
    pub(crate) os: String,
    pub(crate) version: String,
    pub(crate) state: AgentState,
    /// Why it is unreachable.
    pub(crate) trouble: Option<String>,
    /// Where the target dials it.
    pub(crate) address: Option<String>,
    /// Where it asks to be dialled instead, which nobody approved yet.
    #[serde(default)]
    pub(crate) advertised: Option<String>,
    /// By how much its clock is ahead of the target's (negative: behind), when it is wrong.
    #[serde(default)]
    pub(crate) clock_off_seconds: Option<i64>,
    pub(crate) fingerprint: String,
    /// LUNs that it is allowed on; one that no longer exists is shown by its NAA id.
    pub(crate) luns: Vec<String>,
    /// LUNs that its last report had mounted.
    pub(crate) mounted: Vec<String>,
    pub(crate) features: Vec<String>,
    pub(crate) initiators: Vec<String>,
    /// State of the session in flight.
    pub(crate) session_state: Option<String>,
    /// How long something has been frozen.
    pub(crate) frozen_ms: Option<u32>,
    pub(crate) last_freeze: Option<LastFreeze>,
    /// RFC 3339.
    pub(crate) enrolled_at: String,
    pub(crate) registered_at: Option<String>,
    pub(crate) last_heartbeat_seconds: Option<u64>,
}

/// How the agent came out of its last snapshot since the daemon's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastFreeze {
    /// RFC 3339.
    pub(crate) at: String,
    /// As in a snapshot's `agents`.
    pub(crate) outcome: String,
    pub(crate) held_ms: Option<u32>,
}

/// `agent test`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TestView {
    pub(crate) id: String,
    pub(crate) host: String,
    pub(crate) address: Option<String>,
    /// Time of one Status request, dialling apart.
    pub(crate) round_trip_ms: u64,
    /// What the agent sees of its LUNs.
    pub(crate) volumes: Vec<LunVolumes>,
    /// What a preflight finds.
    pub(crate) findings: Vec<Finding>,
    /// No finding stops a snapshot, and a LUN is mounted.
    pub(crate) ready: bool,
}

impl TestView {
    pub(super) fn is_ready(volumes: &[LunVolumes], findings: &[Finding]) -> bool {
        let mounted = volumes
            .iter()
            .any(|lun| lun.role == stillpoint_agentproto::message::Role::Mounted);
        mounted && findings.iter().all(|finding| finding.severity != Severity::Error)
    }
}

/// `lun preflight`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PreflightView {
    pub(crate) lun: String,
    pub(crate) naa: String,
    /// What a snapshot should be able to prove: `filesystem` or `application`.
    pub(crate) consistency: String,
    /// No finding has the severity `error`: the next such snapshot would not be refused.
    pub(crate) ready: bool,
    /// RFC 3339.
    pub(crate) checked_at: String,
    /// The gravest first.
    pub(crate) findings: Vec<PreflightFinding>,
    /// Who is logged in to the LUN, and which agent speaks for it.
    pub(crate) sessions: Vec<PreflightSession>,
    /// Every agent that is allowed on the LUN.
    pub(crate) agents: Vec<PreflightAgent>,
}

/// Something that stands in the way (`error`), or that is worth knowing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PreflightFinding {
    pub(crate) severity: Severity,
    /// Stable word for scripts, the one of the refusal that it would become.
    pub(crate) code: String,
    /// LUN, initiator, mount, disk, application …
    pub(crate) subject: String,
    /// The trouble and the way out.
    pub(crate) text: String,
    /// The agent that found it, or that it is about.
    pub(crate) agent: Option<String>,
    pub(crate) host: Option<String>,
}

/// A session of the LUN.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PreflightSession {
    pub(crate) initiator: String,
    /// Who speaks for it; none = a writer that nobody would freeze.
    pub(crate) agent: Option<String>,
    pub(crate) host: Option<String>,
}

/// An agent of the LUN.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PreflightAgent {
    pub(crate) id: String,
    pub(crate) host: String,
    pub(crate) version: String,
    /// As in `agent list`.
    pub(crate) state: Option<AgentState>,
    /// It answered just now.
    pub(crate) reached: bool,
    /// `mounted` (required), `standby` or `none`.
    pub(crate) role: String,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) apps: Vec<App>,
}
