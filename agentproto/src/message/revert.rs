//! Messages of an online revert: RevertPrepare and RevertDone (20, 21).
//!
//! ```text
//! target  RevertPrepare{plan_only} ─▶ RevertReady          who would lose what; nothing is touched
//!         RevertPrepare ─▶ RevertReady{manifest}  ─ FetchBlob … ─▶ the target keeps the manifest, then switches the LUN
//!         Blob … (the manifest, when the agent may have lost it)  ─▶ RevertDone{reverted | failed} ─▶ Reattached
//! ```
//! Both are idempotent: a repeat of the session goes on where the last one stopped.

use super::tags;
use super::{Document, Finding};
use crate::ident::{LunId, SessionId};
use crate::wire::{record, wire_enum};

record!(
    /// Target to agent: let go of the LUN, so that its content can be changed under it.
    RevertPrepare {
        /// One revert; every repeat has the same.
        session: SessionId = required tags::SESSION,
        /// The LUN that will be reverted.
        lun: LunId = required tags::LUN,
        /// The snapshot that it goes back to, by name.
        snapshot: String = required tags::SNAPSHOT,
        /// The session in which that snapshot was taken: VM snapshots in it are called `stillpoint-<session>`.
        taken_in: Option<SessionId> = optional tags::OTHER_SESSION,
        /// When it was taken, Unix time in milliseconds.
        cut_unix_ms: Option<u64> = optional tags::CUT_UNIX_MS,
        /// Running VMs may be powered off.
        power_off: bool = required tags::POWER_OFF,
        /// Only say what would happen.
        plan_only: bool = required tags::PLAN_ONLY,
    }
);

wire_enum!(
    /// How a host or a VM stands in a revert.
    RevertState {
        /// It would be, or will be, touched.
        Planned = 0 "planned",
        /// Let go of: detached, or not registered any more.
        Released = 1 "released",
        /// Back as it was before.
        Restored = 2 "restored",
        /// It did not work; `error` says why.
        Failed = 3 "failed",
        /// Left out: `error` says why (not in the inventory, not on this LUN alone).
        LeftOut = 4 "left-out",
    }
);

record!(
    /// One host that has the LUN.
    RevertHost {
        /// Its name.
        host: String = required tags::HOST,
        /// Its iSCSI initiator names: their sessions do not count when the target looks who is still there.
        initiators: Vec<String> = list tags::INITIATOR,
        /// How it stands.
        state: RevertState = required tags::REVERT_STATE,
        /// What went wrong.
        error: Option<String> = optional tags::ERROR,
    }
);

record!(
    /// One VM on the LUN.
    RevertVm {
        /// Its name.
        name: String = required tags::INSTANCE,
        /// vCenter's instance UUID, which a new registration keeps.
        instance_uuid: Option<String> = optional tags::INSTANCE_UUID,
        /// Its managed object id; a new registration changes it.
        moref: Option<String> = optional tags::MOREF,
        /// The host it is (or was) on.
        host: Option<String> = optional tags::HOST,
        /// Its configuration file, `[datastore] folder/name.vmx`.
        vmx_path: Option<String> = optional tags::PATH,
        /// It runs.
        powered_on: bool = required tags::POWERED_ON,
        /// How it stands.
        state: RevertState = required tags::REVERT_STATE,
        /// What is lost, or what comes back: for people.
        text: Option<String> = optional tags::TEXT,
        /// What went wrong.
        error: Option<String> = optional tags::ERROR,
    }
);

record!(
    /// The LUN may be switched (or, with `plan_only`: this is what would happen).
    RevertReady {
        /// Every host.
        hosts: Vec<RevertHost> = list tags::REVERT_HOST,
        /// The VMs, the first 256 of them; the manifest has all.
        vms: Vec<RevertVm> = list tags::REVERT_VM,
        /// How many VMs in all.
        vms_total: u32 = required tags::TOTAL,
        /// What stands in the way, or should be known.
        findings: Vec<Finding> = list tags::FINDING,
        /// What has to be brought back; none when only a plan was asked for.
        manifest: Option<Document> = optional tags::DOCUMENT,
    }
);

wire_enum!(
    /// What became of the LUN.
    RevertOutcome {
        /// It has its old content still: bring everything back as it was.
        Failed = 0 "failed",
        /// It has the snapshot's content.
        Reverted = 1 "reverted",
    }
);

record!(
    /// Target to agent: attach the LUN again and bring back what the manifest names.
    RevertDone {
        /// The session of the RevertPrepare.
        session: SessionId = required tags::SESSION,
        /// The LUN.
        lun: LunId = required tags::LUN,
        /// What became of it.
        outcome: RevertOutcome = required tags::REVERT_OUTCOME,
        /// The manifest as the target has it. An agent that has lost its own gets it by Blob before.
        manifest: Option<Document> = optional tags::DOCUMENT,
    }
);

record!(
    /// What came back.
    Reattached {
        /// Every host.
        hosts: Vec<RevertHost> = list tags::REVERT_HOST,
        /// The VMs, the first 256 of them.
        vms: Vec<RevertVm> = list tags::REVERT_VM,
        /// How many VMs in all.
        vms_total: u32 = required tags::TOTAL,
        /// What the operator should know.
        findings: Vec<Finding> = list tags::FINDING,
    }
);
