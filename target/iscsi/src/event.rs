//! What passes between a [`crate::Connection`] and its owner.

use core::fmt;
use core::net::SocketAddr;
use core::ops::Deref;

use bytes::Bytes;

use crate::error::LoginStatus;
use crate::login::{ChapPolicy, Params};
use crate::types::{
    Cid, Isid, Itt, LogoutReason, Lun, SessionType, TaskAttribute, TaskId, TmfFunction, TmfId, Tsih,
};

/// What the owner knows about targets. Called from within [`crate::Connection::advance`]: it must not block.
pub trait Directory: Send + Sync {
    /// May this initiator log in here?
    ///
    /// # Errors
    /// The status that the login is refused with.
    fn login(&self, ask: &LoginAsk<'_>) -> Result<TargetGrant, LoginStatus>;

    /// Whether there is a session of this name, which a second connection could want to join.
    fn has_session(&self, initiator: &str, isid: Isid, tsih: Tsih) -> bool;

    /// The targets that this initiator may see (RFC 7143 appendix C).
    fn discover(&self, ask: &DiscoveryAsk<'_>) -> Vec<TargetRecord>;
}

/// A login, as soon as its names are known.
#[derive(Debug, Clone, Copy)]
pub struct LoginAsk<'a> {
    /// InitiatorName.
    pub initiator: &'a str,
    /// InitiatorAlias.
    pub initiator_alias: Option<&'a str>,
    /// TargetName; always there in a normal session.
    pub target: Option<&'a str>,
    /// Normal or discovery.
    pub session_type: SessionType,
    /// The initiator's half of the session's name.
    pub isid: Isid,
    /// Connection id.
    pub cid: Cid,
    /// Address of the initiator.
    pub peer: SocketAddr,
    /// Address that it connected to.
    pub local: SocketAddr,
    /// Portal group of that address.
    pub portal_group: u16,
}

/// A SendTargets request.
#[derive(Debug, Clone, Copy)]
pub struct DiscoveryAsk<'a> {
    /// InitiatorName.
    pub initiator: &'a str,
    /// Only this target; `None` asks for all.
    pub target: Option<&'a str>,
    /// Address of the initiator.
    pub peer: SocketAddr,
    /// Address that it connected to.
    pub local: SocketAddr,
    /// Portal group of that address.
    pub portal_group: u16,
}

/// The login may go on.
#[derive(Debug, Clone)]
pub struct TargetGrant {
    /// The owner's key of the target; comes back in [`Event::Admission`]. Not used in a discovery session.
    pub target: u64,
    /// TargetAlias to declare.
    pub alias: Option<String>,
    /// TargetPortalGroupTag to declare.
    pub portal_group: u16,
    /// The secrets, when this login needs CHAP.
    pub chap: Option<ChapPolicy>,
}

/// A target in a SendTargets answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetRecord {
    /// TargetName.
    pub name: String,
    /// Addresses (`host:port`, IPv6 in brackets) with their portal group tags.
    pub portals: Vec<(String, u16)>,
}

/// What the owner must do.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// Login is complete but for the owner's word (session limits, reinstatement). Nothing is sent until
    /// [`crate::Connection::admit`].
    Admission {
        /// InitiatorName.
        initiator: String,
        /// The initiator's half of the session's name.
        isid: Isid,
        /// TargetName.
        target_name: Option<String>,
        /// The key of [`TargetGrant`]; `None` = discovery session.
        target: Option<u64>,
    },
    /// The full feature phase begins (the final Login Response is queued).
    LoggedIn,
    /// A SCSI command whose data is complete.
    Command(Command),
    /// A task management function. The affected tasks need no status: finish (or cancel) and
    /// [`crate::Connection::complete`] each of `affected`, and answer with [`crate::Connection::tmf_complete`];
    /// the response leaves when all of that is done.
    TaskManagement {
        /// For the answer.
        tmf: TmfId,
        /// What to do.
        function: TmfFunction,
        /// The LUN it concerns (not for target resets).
        lun: Lun,
        /// Tasks of this connection that the owner runs and that the function ends; some it may have completed since.
        affected: Vec<TaskId>,
    },
    /// The initiator logged out. Every task that the owner still runs is over: complete it all the same.
    LoggedOut {
        /// Why.
        reason: LogoutReason,
    },
    /// A ping of [`crate::Connection::ping`] was answered.
    Pong,
}

/// A SCSI command with all its data.
#[derive(Debug)]
pub struct Command {
    /// For the answer.
    pub task: TaskId,
    /// The initiator's tag, for logs.
    pub itt: Itt,
    /// The logical unit.
    pub lun: Lun,
    /// The command descriptor block.
    pub cdb: Cdb,
    /// Simple, ordered, head of queue. Order within the session is already taken care of.
    pub attribute: TaskAttribute,
    /// Expected Data Transfer Length in bytes. Not the CDB's, and not `data.len()`: check all three.
    pub edtl: u32,
    /// R: the initiator expects data.
    pub read: bool,
    /// W: the initiator sends data.
    pub write: bool,
    /// Bidirectional Read Expected Data Transfer Length in bytes, when both are set.
    pub bidi_read_edtl: Option<u32>,
    /// The data of a write: `min(edtl, limits.transfer_bytes)` bytes. Hands its memory back when dropped.
    pub data: Bytes,
    /// Delivered outside the command window.
    pub immediate: bool,
}

/// A command descriptor block: 16 bytes in the header, longer ones with an extended CDB segment.
#[derive(Clone, PartialEq, Eq)]
pub enum Cdb {
    /// The sixteen bytes of the header; a shorter CDB is padded.
    Short([u8; 16]),
    /// Seventeen to 260 bytes (RFC 7143 §11.2.2.3).
    Extended(Bytes),
}

impl Deref for Cdb {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Short(bytes) => bytes,
            Self::Extended(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Cdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cdb({:02x?})", &**self)
    }
}

/// The owner's word on [`Event::Admission`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Let the session begin.
    Accept {
        /// Its handle: not 0.
        tsih: Tsih,
    },
    /// Refuse it.
    Refuse(LoginStatus),
}

/// Tasks that ended without a status, because another I_T nexus said so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndedTasks {
    /// How many they are.
    pub count: usize,
    /// Those that the owner still runs, and those of before that it has not finished; their completion is swallowed.
    pub running: Vec<TaskId>,
}

/// How a SCSI command ended.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// SCSI status.
    pub status: u8,
    /// Sense data, without the iSCSI length prefix.
    pub sense: Bytes,
    /// Data for the initiator; what exceeds its expected length is not sent.
    pub data: Bytes,
    /// Bytes that the command wanted to move (SPDTL), truncation by ALLOCATION LENGTH already applied: the residual is
    /// the difference to the Expected Data Transfer Length. For reads at least `data.len()`.
    pub transfer_len: u64,
}

/// What `session list` shows of a connection.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// InitiatorName, once known.
    pub initiator: Option<String>,
    /// InitiatorAlias.
    pub initiator_alias: Option<String>,
    /// TargetName, once known.
    pub target_name: Option<String>,
    /// Normal or discovery.
    pub session_type: SessionType,
    /// The initiator's half of the session's name.
    pub isid: Option<Isid>,
    /// Our half, once admitted.
    pub tsih: Option<Tsih>,
    /// Connection id.
    pub cid: Option<Cid>,
    /// What was negotiated, in the full feature phase.
    pub params: Option<Params>,
    /// Where the connection stands.
    pub phase: Phase,
    /// Figures since the connection began.
    pub counters: Counters,
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not logged in.
    Login,
    /// Waits for the owner's admission.
    Admission,
    /// Logged in.
    FullFeature,
    /// Logged out; the answer may still be on its way.
    LoggedOut,
    /// Closed or closing after an error.
    Closed,
}

/// Figures since the connection began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// PDUs received whole.
    pub pdus_in: u64,
    /// PDUs sent.
    pub pdus_out: u64,
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// SCSI commands handed to the owner.
    pub commands: u64,
    /// R2Ts sent.
    pub r2ts: u64,
    /// Reject PDUs sent.
    pub rejects: u64,
    /// Data digest mismatches.
    pub digest_errors: u64,
    /// Write tasks that broke a transfer rule.
    pub transfer_faults: u64,
    /// Non-immediate commands ignored because of their CmdSN.
    pub outside_window: u64,
}
