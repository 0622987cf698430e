//! What the coordinator is asked for, and what it asks of its owner.

use std::time::Duration;

use super::verdict::Verdict;
use crate::error::Refusal;
use crate::ident::{AgentId, Fingerprint, LunId, SessionId};
use crate::message::{Capabilities, LunIdentity, Mode, Request};

/// What to do when the level asked for cannot be proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// No snapshot.
    Fail,
    /// A snapshot with what is proved, at least `crash`.
    CrashConsistent,
}

/// One LUN of the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunSpec {
    /// The operator's name for it.
    pub name: String,
    /// Everything that identifies it.
    pub identity: LunIdentity,
}

/// A session of an initiator to a LUN, as the target sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IscsiSession {
    /// The LUN.
    pub lun: LunId,
    /// The initiator's name.
    pub initiator: String,
}

/// The snapshot that is wanted.
#[derive(Clone, Debug)]
pub struct Spec {
    /// New for every snapshot.
    pub session: SessionId,
    /// The snapshot's name, told to the agents with Release.
    pub snapshot: String,
    /// The LUNs, cut together.
    pub luns: Vec<LunSpec>,
    /// The level asked for. (A `crash` snapshot asks no agent, and never gets here.)
    pub mode: Mode,
    /// What to do when it cannot be proved.
    pub on_failure: OnFailure,
    /// The hold to ask of Linux agents ([`crate::freeze::HOLD_DEFAULT`]).
    pub hold: Duration,
    /// The sessions on the LUNs now.
    pub sessions: Vec<IscsiSession>,
    /// What the target itself found against it (CHAP, several LUNs …): a failure of the preflight.
    pub refused: Option<Refusal>,
}

/// An agent that is allowed on at least one of the LUNs.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The agent.
    pub agent: AgentId,
    /// Its host.
    pub host: String,
    /// Its version.
    pub version: String,
    /// Its pinned key.
    pub fingerprint: Fingerprint,
    /// What it can do.
    pub capabilities: Capabilities,
    /// The LUNs of the set that it is allowed on.
    pub luns: Vec<LunId>,
    /// The LUNs that its last report had mounted.
    pub last_mounted: Vec<LunId>,
}

/// What the owner has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a request (dial first if there is no channel), answer with [`super::Coordinator::replied`]. What cannot be
    /// delivered is answered with the refusal `Unreachable`.
    Send {
        /// Number of the call.
        call: u64,
        /// To whom.
        agent: AgentId,
        /// What.
        request: Request,
    },
    /// Commit what is dirty, so that little is left inside the window; then [`super::Coordinator::settled`].
    Settle,
    /// Cut now; then [`super::Coordinator::cut_made`] as soon as it is made in RAM, and [`super::Coordinator::cut_durable`].
    Cut,
    /// Record these levels in one commit; then [`super::Coordinator::promoted`].
    Promote(Box<Verdict>),
    /// Delete the snapshot; then [`super::Coordinator::discarded`].
    Discard,
    /// This is what it came to. Agents may still be hearing Complete or Abort.
    Decided(Box<Verdict>),
    /// Everything is over: close the channels, let the next snapshot of these LUNs begin.
    Closed,
}
