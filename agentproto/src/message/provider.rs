//! Messages of the VSS hardware provider, agent to target: ProvQuery, ProvBegin, ProvCommit, ProvExpose, ProvDelete (30-34).
//!
//! ```text
//! ProvBegin ─▶ Begun ─ ProvCommit ─▶ Committed ─ ProvExpose{expose | mask} … ─▶ ─ ProvDelete{delete} ─▶ gone
//!                └────────────── ProvDelete{abort}, also when the set is not known ──────────────────▶ gone
//! ```
//! All are idempotent: a repeat with the same content gets the same answer.

use super::{LunIdentity, tags};
use crate::error::ErrorCode;
use crate::ident::{LunId, SetId, ShadowId};
use crate::wire::{record, wire_enum};

record!(
    /// Could the target take a hardware snapshot of these LUNs?
    ProvQuery {
        /// The LUNs, as the host's INQUIRY names them.
        luns: Vec<LunIdentity> = list tags::IDENTITY,
    }
);

record!(
    /// The answer for one LUN.
    LunSupport {
        /// The LUN asked for.
        lun: LunId = required tags::LUN,
        /// Whether it can.
        supported: bool = required tags::SUPPORTED,
        /// Which rule says no.
        code: Option<ErrorCode> = optional tags::CODE,
        /// Why not, for people.
        text: Option<String> = optional tags::TEXT,
    }
);

record!(
    /// One entry for each LUN asked for, in the same order.
    ProvSupport {
        /// The answers.
        luns: Vec<LunSupport> = list tags::LUN_SUPPORT,
    }
);

record!(
    /// One shadow copy to be taken.
    ShadowAsk {
        /// The coordinator's number for it.
        shadow: ShadowId = required tags::SHADOW,
        /// The LUN to be cut.
        lun: LunId = required tags::LUN,
    }
);

record!(
    /// Get ready: reserves the identities that the shadow copies will have. All slow work is done here.
    ProvBegin {
        /// The set.
        set: SetId = required tags::SET,
        /// What is to be cut, all at one instant.
        shadows: Vec<ShadowAsk> = list tags::SHADOW_ASK,
        /// The one initiator that will be able to see them: one that the agent registered.
        initiator: String = required tags::INITIATOR,
        /// Whether the host will write to them (auto-recovery does).
        writable: bool = required tags::WRITABLE,
    }
);

record!(
    /// A shadow copy, with the identity that INQUIRY will show.
    Shadow {
        /// The coordinator's number for it.
        shadow: ShadowId = required tags::SHADOW,
        /// The LUN it is a copy of.
        source: LunId = required tags::LUN,
        /// Its own identity. `number` only while it is exposed.
        identity: LunIdentity = required tags::IDENTITY,
    }
);

record!(
    /// Ready to cut.
    ProvReady {
        /// What ProvCommit has to show.
        token: [u8; 16] = required tags::COMMIT_TOKEN,
        /// How long the set waits for its commit, in milliseconds.
        waits_ms: u32 = required tags::LEASE_MS,
        /// One for each shadow copy asked for, in the same order.
        shadows: Vec<Shadow> = list tags::SHADOW_COPY,
    }
);

record!(
    /// Cut now. One request, one answer, within a second.
    ProvCommit {
        /// The set.
        set: SetId = required tags::SET,
        /// From ProvReady.
        token: [u8; 16] = required tags::COMMIT_TOKEN,
    }
);

record!(
    /// The name of a shadow copy at the target.
    TakenShadow {
        /// The coordinator's number for it.
        shadow: ShadowId = required tags::SHADOW,
        /// The LUN's name that operators see, `vss-…`.
        name: String = required tags::INSTANCE,
    }
);

record!(
    /// Cut and durable.
    ProvTaken {
        /// When, Unix time in milliseconds.
        cut_unix_ms: Option<u64> = optional tags::CUT_UNIX_MS,
        /// One for each shadow copy.
        shadows: Vec<TakenShadow> = list tags::TAKEN_SHADOW,
    }
);

wire_enum!(
    /// Whether the initiator sees a shadow copy.
    Visibility {
        /// It does not.
        Masked = 0 "masked",
        /// As a further LUN of the source's target, announced by unit attention 3Fh/0Eh.
        Exposed = 1 "exposed",
    }
);

record!(
    /// Show a shadow copy to its initiator, or hide it again.
    ProvExpose {
        /// The set.
        set: SetId = required tags::SET,
        /// Which shadow copy.
        shadow: ShadowId = required tags::SHADOW,
        /// The initiator of ProvBegin, or another of the same agent (the shadow copy moves to it).
        initiator: String = required tags::INITIATOR,
        /// What is wanted.
        visibility: Visibility = required tags::VISIBILITY,
    }
);

record!(
    /// Where the shadow copy is.
    ProvExposed {
        /// What is so now.
        visibility: Visibility = required tags::VISIBILITY,
        /// Target, LUN number (while exposed), NAA designator, serial and size.
        identity: LunIdentity = required tags::IDENTITY,
    }
);

wire_enum!(
    /// Why something is deleted.
    DeleteReason {
        /// It has done its work.
        Delete = 1 "delete",
        /// The set failed (MS docs: `AbortSnapshots`): whatever there is of it goes, in any state.
        Abort = 2 "abort",
    }
);

record!(
    /// Delete a shadow copy, or a whole set. Good when it is gone already.
    ProvDelete {
        /// The set.
        set: SetId = required tags::SET,
        /// Which shadow copy; none = all of the set.
        shadow: Option<ShadowId> = optional tags::SHADOW,
        /// Why.
        why: DeleteReason = required tags::DELETE_REASON,
    }
);

record!(
    /// It is gone.
    ProvGone {
        /// How many shadow copies (or reservations) this request removed; 0 = there was nothing any more.
        removed: u32 = required tags::DONE,
    }
);
