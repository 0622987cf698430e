//! Messages of a session: Prepare, Freeze, Release, Complete, Abort, Status (12-17).

use super::tags;
use super::{App, Document, Mode, SessionState};
use crate::freeze::Level;
use crate::ident::{LunId, SessionId};
use crate::wire::{record, wire_enum};

wire_enum!(
    /// What an application that cannot take part means.
    Require {
        /// It becomes an exclusion (or a failed state); the rest goes on.
        BestEffort = 0 "best-effort",
        /// The request fails.
        All = 1 "all",
    }
);

record!(
    /// Target to agent: get ready. Slow work (VM snapshots) belongs here.
    Prepare {
        /// New for every snapshot.
        session: SessionId = required tags::SESSION,
        /// The LUNs that will be cut.
        luns: Vec<LunId> = list tags::LUN,
        /// What the snapshot shall be able to claim.
        mode: Mode = required tags::MODE,
        /// The hold that Freeze will ask for, in milliseconds.
        hold_ms: u32 = required tags::HOLD_MS,
        /// What an application that cannot take part means.
        require: Require = required tags::REQUIRE,
    }
);

wire_enum!(
    /// What was left out.
    ExclusionKind {
        /// A file system of the LUN will not be frozen: nothing above `crash` can be claimed for it.
        Volume = 0 "volume",
        /// An application will not take part: nothing above `filesystem`.
        Application = 1 "application",
    }
);

record!(
    /// Something on the LUN that does not take part, and why.
    Exclusion {
        /// What kind.
        kind: ExclusionKind = required tags::EXCLUSION_KIND,
        /// Mount, VM, writer …
        subject: String = required tags::SUBJECT,
        /// Why.
        reason: String = required tags::REASON,
        /// On which LUN; none = on every LUN of the session.
        lun: Option<LunId> = optional tags::LUN,
    }
);

record!(
    /// Ready to freeze.
    Prepared {
        /// Applications that will take part.
        apps: Vec<App> = list tags::APP,
        /// What will not.
        exclusions: Vec<Exclusion> = list tags::EXCLUSION,
    }
);

record!(
    /// Target to agent: freeze now, and hold for so long at most.
    Freeze {
        /// The session.
        session: SessionId = required tags::SESSION,
        /// The longest hold, in milliseconds; the agent caps it with its own limit.
        hold_ms: u32 = required tags::HOLD_MS,
    }
);

record!(
    /// One file system as Freeze left it.
    FrozenVolume {
        /// The LUN.
        lun: LunId = required tags::LUN,
        /// Its mount.
        path: String = required tags::PATH,
        /// Whether it is frozen.
        frozen: bool = required tags::FROZEN,
        /// Why not.
        error: Option<String> = optional tags::ERROR,
    }
);

record!(
    /// Frozen; the agent's own timer runs.
    Frozen {
        /// What is left of the hold when this was sent, in milliseconds.
        remaining_ms: u32 = required tags::REMAINING_MS,
        /// Each file system of the LUNs.
        volumes: Vec<FrozenVolume> = list tags::FROZEN_VOLUME,
        /// Each application.
        apps: Vec<App> = list tags::APP,
    }
);

wire_enum!(
    /// What happened at the target.
    CutOutcome {
        /// No snapshot: the hold is over, nothing was cut.
        NotTaken = 0 "not-taken",
        /// The cut is made.
        Taken = 1 "taken",
    }
);

record!(
    /// Target to agent: thaw, and say whether the hold was in force until now.
    Release {
        /// The session.
        session: SessionId = required tags::SESSION,
        /// Whether the cut was made.
        outcome: CutOutcome = required tags::OUTCOME,
        /// The snapshot's name.
        snapshot: Option<String> = optional tags::SNAPSHOT,
        /// When, Unix time in milliseconds (the target's clock; for logs).
        cut_unix_ms: Option<u64> = optional tags::CUT_UNIX_MS,
    }
);

record!(
    /// Thawed. `hold_ok` is the whole proof: never true by default.
    Thawed {
        /// How long it was frozen, in milliseconds.
        held_ms: u32 = required tags::HELD_MS,
        /// The hold was still in force when it was released, and every application said so.
        hold_ok: bool = required tags::HOLD_OK,
        /// Each application.
        apps: Vec<App> = list tags::APP,
        /// Why `hold_ok` is false.
        reason: Option<String> = optional tags::REASON,
        /// What the target should fetch before Complete, and keep with the snapshot.
        documents: Vec<Document> = list tags::DOCUMENT,
    }
);

record!(
    /// Target to agent: the snapshot is recorded; clean up.
    Complete {
        /// The session.
        session: SessionId = required tags::SESSION,
        /// The level that was recorded (the lowest of the session's LUNs).
        level: Level = required tags::LEVEL,
    }
);

record!(
    /// Nothing of the session is left behind.
    Completed {
        /// What could not be cleaned up.
        reason: Option<String> = optional tags::REASON,
    }
);

record!(
    /// Target to agent: undo, in whatever state. Idempotent; an unknown session is aborted by definition.
    Abort {
        /// The session.
        session: SessionId = required tags::SESSION,
        /// Why.
        reason: String = required tags::REASON,
    }
);

record!(
    /// Thawed and cleaned up.
    Aborted {
        /// How long it was frozen, in milliseconds, if it was.
        held_ms: Option<u32> = optional tags::HELD_MS,
        /// What could not be cleaned up.
        reason: Option<String> = optional tags::REASON,
    }
);

record!(
    /// Target to agent: where do you stand? Sent each second while something is frozen (the keepalive).
    Status {
        /// Of this session; none = of whatever is in flight.
        session: Option<SessionId> = optional tags::OTHER_SESSION,
    }
);

record!(
    /// Where the agent stands.
    StatusReport {
        /// The state.
        state: SessionState = required tags::STATE,
        /// The session.
        session: Option<SessionId> = optional tags::OTHER_SESSION,
        /// How long it has been (or was) frozen, in milliseconds.
        held_ms: Option<u32> = optional tags::HELD_MS,
        /// The last result, for people.
        last_result: Option<String> = optional tags::LAST_RESULT,
    }
);
