//! Messages outside a session: Hello, Enrol, Register, Heartbeat, ListVolumes, Preflight, Event (1-4, 10, 11, 40).

use super::tags;
use crate::error::{ErrorCode, Refusal};
use crate::ident::{AgentId, LunId, SessionId};
use crate::wire::{BodyError, EncodeError, Value, Writer, record, wire_enum};

/// What an agent can do (Hello, Register): a set of bits; bits that this version does not know are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Capabilities(pub u32);

impl Capabilities {
    /// Drives VSS writers.
    pub const VSS_REQUESTER: Self = Self(1);
    /// Is a VSS hardware provider.
    pub const VSS_PROVIDER: Self = Self(1 << 1);
    /// Hyper-V guests on CSV or NTFS.
    pub const HYPERV: Self = Self(1 << 2);
    /// Microsoft SQL Server.
    pub const MSSQL: Self = Self(1 << 3);
    /// vCenter: VM snapshots before the cut.
    pub const VMWARE: Self = Self(1 << 4);
    /// Freezes Linux file systems (FIFREEZE).
    pub const LINUX_FS: Self = Self(1 << 5);
    /// Runs hooks around the freeze.
    pub const HOOKS: Self = Self(1 << 6);
    /// libvirt domains.
    pub const LIBVIRT: Self = Self(1 << 7);

    const NAMES: [(Self, &'static str); 8] = [
        (Self::VSS_REQUESTER, "vss-requester"),
        (Self::VSS_PROVIDER, "vss-provider"),
        (Self::HYPERV, "hyperv"),
        (Self::MSSQL, "mssql"),
        (Self::VMWARE, "vmware"),
        (Self::LINUX_FS, "linux-fs"),
        (Self::HOOKS, "hooks"),
        (Self::LIBVIRT, "libvirt"),
    ];

    /// Whether every bit of `other` is set here.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The names of the known bits, in the order of their numbers.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        Self::NAMES
            .iter()
            .filter(|(bit, _)| self.has(*bit))
            .map(|(_, name)| *name)
            .collect()
    }
}

impl Value for Capabilities {
    fn read(bytes: &[u8], depth_left: u8) -> Result<Self, BodyError> {
        u32::read(bytes, depth_left).map(Self)
    }

    fn write(&self, out: &mut Writer) -> Result<(), EncodeError> {
        self.0.write(out)
    }
}

record!(
    /// The first frame of either side, and its own reply.
    Hello {
        /// Lowest version that the sender speaks.
        min_version: u8 = required tags::MIN_VERSION,
        /// Highest version that the sender speaks.
        max_version: u8 = required tags::MAX_VERSION,
        /// The agent's id; a target has none (its key is its name).
        agent_id: Option<AgentId> = optional tags::AGENT_ID,
        /// Product and version, for people.
        product: String = required tags::PRODUCT,
        /// What the sender can do.
        capabilities: Capabilities = required tags::CAPABILITIES,
    }
);

record!(
    /// Agent to target: the one-time token binds the two keys.
    Enrol {
        /// The agent's id.
        agent_id: AgentId = required tags::AGENT_ID,
        /// Which token (see `enrol::Token::id`).
        token_id: [u8; 8] = required tags::TOKEN_ID,
        /// See `enrol::agent_mac`.
        mac: [u8; 32] = required tags::MAC,
        /// The host, for the operator's event.
        host: String = required tags::HOST,
    }
);

record!(
    /// The target's proof that it knows the token too.
    EnrolOk {
        /// See `enrol::target_mac`.
        mac: [u8; 32] = required tags::MAC,
    }
);

record!(
    /// Agent to target: here I am.
    Register {
        /// Host name.
        host: String = required tags::HOST,
        /// Operating system and version.
        os: String = required tags::OS,
        /// The agent's version.
        agent_version: String = required tags::AGENT_VERSION,
        /// Changes at each boot of the host.
        boot_id: String = required tags::BOOT_ID,
        /// TCP port of the snapshot channel, as reached from the target (behind address translation: the outer one).
        listen_port: u16 = required tags::LISTEN_PORT,
        /// The IP address to dial instead of the registration's source (address translation). An operator has to approve it: the
        /// dial-back must not become a scanner.
        advertise_host: Option<String> = optional tags::ADVERTISE_HOST,
        /// Features switched on.
        features: Capabilities = required tags::CAPABILITIES,
        /// Every iSCSI initiator name of the host (at most 256).
        initiators: Vec<String> = list tags::INITIATOR,
        /// LUNs of this target that are mounted now.
        mounted: Vec<LunId> = list tags::MOUNTED,
    }
);

record!(
    /// The target's answer: the agent counts as connected as long as the lease lives.
    RegisterOk {
        /// Without a heartbeat for this long the registration is over, in milliseconds.
        lease_ms: u32 = required tags::LEASE_MS,
        /// How often to send a heartbeat, in milliseconds.
        heartbeat_ms: u32 = required tags::HEARTBEAT_MS,
        /// The LUNs that this agent may see and freeze.
        luns: Vec<LunIdentity> = list tags::GRANT,
    }
);

record!(
    /// Agent to target, every `heartbeat_ms`.
    Heartbeat {
        /// State of the session in flight (`Idle` without one).
        state: SessionState = required tags::STATE,
        /// The session in flight.
        session: Option<SessionId> = optional tags::OTHER_SESSION,
        /// How long something has been frozen, in milliseconds, if it is.
        frozen_ms: Option<u32> = optional tags::FROZEN_MS,
        /// The host's clock, Unix time in milliseconds. Shown to people, never used in a decision.
        clock_unix_ms: u64 = required tags::CLOCK_UNIX_MS,
        /// LUNs of this target that are mounted now.
        mounted: Vec<LunId> = list tags::MOUNTED,
    }
);

record!(
    /// The target's answer to a heartbeat.
    HeartbeatOk {
        /// The allow-list as it is now.
        luns: Vec<LunIdentity> = list tags::GRANT,
    }
);

wire_enum!(
    /// Where a session stands, as the agent tells it.
    SessionState {
        /// No session.
        Idle = 0 "idle",
        /// Prepare runs.
        Preparing = 1 "preparing",
        /// Prepared, waiting for Freeze.
        Prepared = 2 "prepared",
        /// Hooks or freezing run.
        Freezing = 3 "freezing",
        /// Frozen.
        Frozen = 4 "frozen",
        /// Thaw runs.
        Thawing = 5 "thawing",
        /// Thawed, waiting for Complete.
        Thawed = 6 "thawed",
        /// Completed: nothing is left behind.
        Completed = 7 "completed",
        /// Aborted: nothing is left behind.
        Aborted = 8 "aborted",
    }
);

record!(
    /// A LUN, by everything that names it. `lun` is the key, the rest must agree with it.
    LunIdentity {
        /// NAA designator of page 0x83.
        lun: LunId = required tags::LUN,
        /// Page 0x80.
        serial: Option<String> = optional tags::SERIAL,
        /// Target name.
        iqn: Option<String> = optional tags::IQN,
        /// LUN number on that target.
        number: Option<u16> = optional tags::LUN_NUMBER,
        /// Size in bytes.
        size_bytes: Option<u64> = optional tags::SIZE_BYTES,
    }
);

wire_enum!(
    /// What an agent is to a LUN.
    Role {
        /// Nothing of the LUN is mounted here.
        None = 0 "none",
        /// Something of it is mounted here: this agent is required.
        Mounted = 1 "mounted",
        /// A cluster node that does not own the disk now.
        Standby = 2 "standby",
    }
);

record!(
    /// One mounted file system or datastore.
    Mount {
        /// Where.
        path: String = required tags::PATH,
        /// ext4, xfs, ntfs, vmfs …
        file_system: String = required tags::FILE_SYSTEM,
        /// The block device it is on.
        device: String = required tags::DEVICE,
        /// Mounted read-only.
        read_only: bool = required tags::READ_ONLY,
        /// A cluster file system: several hosts may mount it for writing.
        cluster: bool = required tags::CLUSTER,
    }
);

wire_enum!(
    /// How an application stands at a step.
    AppState {
        /// Known, and will take part.
        Ready = 0 "ready",
        /// Quiesced.
        Frozen = 1 "frozen",
        /// Released, and it reports success.
        Thawed = 2 "thawed",
        /// Failed; `error` says why.
        Failed = 3 "failed",
    }
);

record!(
    /// One application, VM or writer that takes part.
    App {
        /// `hook`, `vss-writer`, `vmware-vm`, `postgresql` …
        kind: String = required tags::KIND,
        /// Which one.
        instance: String = required tags::INSTANCE,
        /// Part of it.
        component: Option<String> = optional tags::COMPONENT,
        /// Its version.
        version: Option<String> = optional tags::APP_VERSION,
        /// How it stands.
        state: AppState = required tags::APP_STATE,
        /// What went wrong.
        error: Option<String> = optional tags::ERROR,
        /// The LUN it lives on; none = it counts for every LUN of the session.
        lun: Option<LunId> = optional tags::LUN,
    }
);

record!(
    /// What an agent sees of one LUN.
    LunVolumes {
        /// The LUN as the agent reads it.
        identity: LunIdentity = required tags::IDENTITY,
        /// What the agent is to it.
        role: Role = required tags::ROLE,
        /// What is mounted.
        mounts: Vec<Mount> = list tags::MOUNT,
        /// Applications known on it.
        apps: Vec<App> = list tags::APP,
    }
);

record!(
    /// Target to agent: what do you see of these LUNs?
    ListVolumes {
        /// The LUNs.
        luns: Vec<LunId> = list tags::LUN,
    }
);

record!(
    /// The answer: one entry per LUN asked for that the host sees (an absent one is not there).
    Volumes {
        /// Per LUN.
        luns: Vec<LunVolumes> = list tags::LUN_VOLUMES,
        /// Every initiator name of the host, as in Register.
        initiators: Vec<String> = list tags::INITIATOR,
    }
);

wire_enum!(
    /// What the snapshot shall be able to claim.
    Mode {
        /// File systems frozen.
        Filesystem = 1 "filesystem",
        /// And applications.
        Application = 2 "application",
    }
);

record!(
    /// Target to agent: would a snapshot work?
    Preflight {
        /// The LUNs.
        luns: Vec<LunId> = list tags::LUN,
        /// What for.
        mode: Mode = required tags::MODE,
    }
);

wire_enum!(
    /// How bad something is.
    Severity {
        /// Good to know.
        Info = 0 "info",
        /// Works, but less than it should.
        Warning = 1 "warning",
        /// Stops the snapshot.
        Error = 2 "error",
    }
);

record!(
    /// One finding of a preflight.
    Finding {
        /// Which rule.
        code: ErrorCode = required tags::CODE,
        /// How bad.
        severity: Severity = required tags::SEVERITY,
        /// What it is about.
        subject: String = required tags::SUBJECT,
        /// What is wrong and what to do.
        text: String = required tags::TEXT,
    }
);

record!(
    /// The findings; none = ready.
    PreflightReport {
        /// All of them, not only the first.
        findings: Vec<Finding> = list tags::FINDING,
    }
);

record!(
    /// Either direction, no reply: a line for the operator's event log.
    LogEvent {
        /// How bad.
        severity: Severity = required tags::SEVERITY,
        /// Which rule or fault; `Internal` when none fits.
        code: ErrorCode = required tags::CODE,
        /// What it is about.
        subject: String = required tags::SUBJECT,
        /// For people.
        text: String = required tags::TEXT,
    }
);

record!(
    /// How far a long request is (an event frame with the request's type and id).
    Progress {
        /// Steps done.
        done: u32 = required tags::DONE,
        /// Steps in all, 0 = not known.
        total: u32 = required tags::TOTAL,
        /// What is going on.
        text: String = required tags::TEXT,
    }
);

impl crate::wire::Record for Refusal {
    fn read_fields(fields: &mut crate::wire::Fields<'_>) -> Result<Self, BodyError> {
        Ok(Self {
            code: fields.required(tags::CODE)?,
            text: fields.required(tags::TEXT)?,
            subject: fields.optional(tags::SUBJECT)?,
            retry_after_ms: fields.optional(tags::RETRY_AFTER_MS)?,
            session: fields.optional(tags::OTHER_SESSION)?,
        })
    }

    fn write_fields(&self, out: &mut Writer) -> Result<(), EncodeError> {
        out.required(tags::CODE, &self.code)?;
        out.required(tags::TEXT, &self.text)?;
        out.optional(tags::SUBJECT, &self.subject)?;
        out.optional(tags::RETRY_AFTER_MS, &self.retry_after_ms)?;
        out.optional(tags::OTHER_SESSION, &self.session)
    }
}
