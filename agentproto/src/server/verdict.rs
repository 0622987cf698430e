//! What a snapshot came to: levels, and who said what.

use serde::{Deserialize, Serialize};

use crate::error::Refusal;
use crate::freeze::Level;
use crate::ident::{AgentId, Fingerprint, LunId, SessionId};
use crate::message::{App, Exclusion, Finding};

/// How far a snapshot was when something went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Asking who is there and whether it would work. A failure here is a refusal: nothing was touched.
    Preflight,
    /// Getting ready.
    Prepare,
    /// Freezing.
    Freeze,
    /// Cutting.
    Cut,
    /// Thawing.
    Release,
    /// Recording the level.
    Record,
}

/// What went wrong first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// When.
    pub phase: Phase,
    /// With which agent, if it was one.
    pub agent: Option<AgentId>,
    /// Its host.
    pub host: Option<String>,
    /// Why, with what to do.
    pub refusal: Refusal,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            Some(host) => write!(f, "agent on {host}: {}", self.refusal.text),
            None => f.write_str(&self.refusal.text),
        }
    }
}

/// The level of one LUN of the set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LunLevel {
    /// The LUN.
    pub lun: LunId,
    /// What is proved.
    pub level: Level,
    /// Why it is not more.
    pub shortfalls: Vec<String>,
}

/// How one agent came out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Nothing of the LUNs is mounted there: it was not needed.
    NotInvolved,
    /// A cluster node that does not own the disk.
    Standby,
    /// It could not be reached.
    Unreachable,
    /// It refused or failed.
    Failed,
    /// The session was aborted because of something else.
    Aborted,
    /// Thawed, but the hold is not proved.
    HoldLost,
    /// Frozen over the cut, proved.
    HoldOk,
}

/// What is recorded of one agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentReport {
    /// The agent.
    pub id: AgentId,
    /// Its host.
    pub host: String,
    /// Its version.
    pub version: String,
    /// Its pinned key.
    pub fingerprint: Fingerprint,
    /// How it came out.
    pub outcome: Outcome,
    /// More about it, for people.
    pub detail: Option<String>,
    /// Findings of the preflight.
    pub findings: Vec<Finding>,
    /// The applications, as last told.
    pub apps: Vec<App>,
    /// What was left out.
    pub exclusions: Vec<Exclusion>,
    /// How long it was frozen, in milliseconds.
    pub held_ms: Option<u32>,
}

/// When things happened, in milliseconds from the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// All agents prepared.
    pub prepared_ms: Option<u64>,
    /// The first Freeze was sent.
    pub freeze_sent_ms: Option<u64>,
    /// The last agent was frozen.
    pub frozen_ms: Option<u64>,
    /// The cut was asked for.
    pub cut_asked_ms: Option<u64>,
    /// The cut was made (in RAM).
    pub cut_ms: Option<u64>,
    /// The last agent had thawed.
    pub thawed_ms: Option<u64>,
}

/// The end of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// In which session.
    pub session: SessionId,
    /// Whether there is a snapshot: it is durable and its levels are recorded.
    pub kept: bool,
    /// Per LUN, in the order asked for. All `crash` unless proved.
    pub levels: Vec<LunLevel>,
    /// What went wrong first. With `kept`, the levels are lower than asked for because of it.
    pub failure: Option<Failure>,
    /// Per agent.
    pub agents: Vec<AgentReport>,
    /// When.
    pub times: Times,
}

impl Verdict {
    /// The lowest level of the set.
    #[must_use]
    pub fn lowest(&self) -> Level {
        self.levels
            .iter()
            .map(|lun| lun.level)
            .min()
            .unwrap_or(Level::Crash)
    }
}
