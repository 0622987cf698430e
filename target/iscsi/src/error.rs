//! What went wrong, by what the caller does now.
//!
//! - [`Error`]: drop the connection, after what [`crate::Connection::poll_transmit`] still yields.
//! - [`LoginStatus`]: refuse this login, with class and detail.
//! - [`RejectReason`]: refuse this one PDU and go on.

use crate::types::{Cid, CmdSn, DataSn, Isid, Itt, Ttt};

/// The connection cannot go on. Flush what is still to be sent (a Login Response that refuses, a Reject), then close.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The first PDU of a connection, or one during login, is no Login Request (RFC 7143 §6.3).
    #[error("opcode {opcode:#04x} before login is complete")]
    NotLoggedIn {
        /// What came instead.
        opcode: u8,
    },
    /// The login was refused, and the initiator is told so.
    #[error("login refused: {0}")]
    LoginRefused(LoginStatus),
    /// Login took longer than the deadline.
    #[error("login not complete in time")]
    LoginTimeout,
    /// A Login Request came while the answer to the last one was not yet sent (RFC 7143 §6.3).
    #[error("login request before the answer to the last one")]
    LoginOutOfTurn,
    /// Header digest mismatch: the length of this PDU cannot be trusted, so neither can the place of the next (§7.8).
    #[error("header digest is {got:#010x}, computed {computed:#010x}")]
    HeaderDigest {
        /// The digest that came with the header.
        got: u32,
        /// The digest of the header that came.
        computed: u32,
    },
    /// Data digest mismatch on a PDU that takes a CmdSN: at ErrorRecoveryLevel 0 nothing can fill the hole (§7.1.5).
    #[error("data digest of a PDU with opcode {opcode:#04x} does not match")]
    DataDigest {
        /// The opcode of that PDU.
        opcode: u8,
    },
    /// Data segment longer than what we declared (RFC 7143 §13.12), or than what this kind of PDU may carry.
    #[error("data segment of {len} bytes on opcode {opcode:#04x}, at most {max} allowed")]
    SegmentTooLong {
        /// The opcode of the PDU.
        opcode: u8,
        /// The announced length in bytes.
        len: u32,
        /// The limit in bytes.
        max: u32,
    },
    /// Additional header segments on a PDU that has none (RFC 7143 §11.2.1.5).
    #[error("additional header segment on opcode {opcode:#04x}")]
    UnexpectedAhs {
        /// The opcode of the PDU.
        opcode: u8,
    },
    /// The additional header segments contradict their own lengths (RFC 7143 §11.2.2).
    #[error("malformed additional header segment")]
    MalformedAhs,
    /// The peer answered no ping.
    #[error("no answer to a NOP-In ping")]
    PingTimeout,
    /// The peer was silent for longer than an initiator without NOP may be.
    #[error("peer silent for too long")]
    Silent,
    /// The peer does not read what we send.
    #[error("peer reads nothing")]
    PeerNotReading,
    /// The peer did not send the data that an R2T asked for.
    #[error("solicited data did not come")]
    DataOutTimeout,
    /// The initiator was asked to log out and did not in time.
    #[error("peer did not log out when asked to")]
    LogoutTimeout,
    /// The owner did not finish the tasks that a logout ended in time.
    #[error("tasks of a logged-out session did not finish in time")]
    CleanupTimeout,
}

/// Why a login is refused: Status-Class and Status-Detail of RFC 7143 §11.13.5.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoginStatus {
    /// 0101: log in at this address for now (`host:port`, IPv6 in brackets).
    #[error("target moved temporarily to {0}")]
    MovedTemporarily(String),
    /// 0102: log in at this address from now on.
    #[error("target moved permanently to {0}")]
    MovedPermanently(String),
    /// 0200
    #[error("initiator error: {0}")]
    InitiatorError(LoginFault),
    /// 0201
    #[error("authentication failure: {0}")]
    AuthenticationFailure(AuthFault),
    /// 0202
    #[error("authorization failure")]
    AuthorizationFailure,
    /// 0203
    #[error("target not found")]
    NotFound,
    /// 0204
    #[error("target removed")]
    TargetRemoved,
    /// 0205
    #[error("unsupported version")]
    UnsupportedVersion,
    /// 0206
    #[error("too many connections")]
    TooManyConnections,
    /// 0207
    #[error("missing parameter {0}")]
    MissingParameter(&'static str),
    /// 0208
    #[error("can't include in session")]
    CantIncludeInSession,
    /// 0209
    #[error("session type not supported")]
    SessionTypeNotSupported,
    /// 020a
    #[error("session does not exist")]
    SessionDoesNotExist,
    /// 020b
    #[error("invalid request type during login")]
    InvalidDuringLogin,
    /// 0300
    #[error("target error")]
    TargetError,
    /// 0301
    #[error("service unavailable")]
    ServiceUnavailable,
    /// 0302
    #[error("out of resources")]
    OutOfResources,
}

impl LoginStatus {
    /// Status-Class and Status-Detail.
    #[must_use]
    pub fn code(&self) -> (u8, u8) {
        match self {
            Self::MovedTemporarily(_) => (1, 1),
            Self::MovedPermanently(_) => (1, 2),
            Self::InitiatorError(_) => (2, 0),
            Self::AuthenticationFailure(_) => (2, 1),
            Self::AuthorizationFailure => (2, 2),
            Self::NotFound => (2, 3),
            Self::TargetRemoved => (2, 4),
            Self::UnsupportedVersion => (2, 5),
            Self::TooManyConnections => (2, 6),
            Self::MissingParameter(_) => (2, 7),
            Self::CantIncludeInSession => (2, 8),
            Self::SessionTypeNotSupported => (2, 9),
            Self::SessionDoesNotExist => (2, 0xa),
            Self::InvalidDuringLogin => (2, 0xb),
            Self::TargetError => (3, 0),
            Self::ServiceUnavailable => (3, 1),
            Self::OutOfResources => (3, 2),
        }
    }

    /// The address of a redirection.
    #[must_use]
    pub fn address(&self) -> Option<&str> {
        match self {
            Self::MovedTemporarily(address) | Self::MovedPermanently(address) => Some(address),
            _ => None,
        }
    }
}

impl From<LoginFault> for LoginStatus {
    fn from(fault: LoginFault) -> Self {
        Self::InitiatorError(fault)
    }
}

impl From<AuthFault> for LoginStatus {
    fn from(fault: AuthFault) -> Self {
        Self::AuthenticationFailure(fault)
    }
}

impl From<TextError> for LoginStatus {
    fn from(error: TextError) -> Self {
        Self::InitiatorError(LoginFault::Text(error))
    }
}

/// The rule of the login phase that the initiator broke (RFC 7143 §6.3).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoginFault {
    /// CSG or NSG is a reserved value.
    #[error("reserved stage {0}")]
    ReservedStage(u8),
    /// CSG is not the stage that the login is in.
    #[error("stage {got} in stage {expected}")]
    WrongStage {
        /// The stage the login is in.
        expected: u8,
        /// CSG of the request.
        got: u8,
    },
    /// The transition is not in the table of §6.3.
    #[error("no transition from stage {from} to stage {to}")]
    Transition {
        /// CSG.
        from: u8,
        /// NSG.
        to: u8,
    },
    /// T and C are both set (§11.12.2).
    #[error("transit and continue flags are both set")]
    TransitAndContinue,
    /// ITT, ISID, TSIH or CID changed between requests of one login.
    #[error("{0} changed during login")]
    Changed(&'static str),
    /// The initiator sent keys while our text is still to be fetched with empty requests (§6.2).
    #[error("keys in a request that should be empty")]
    NotEmpty,
    /// A key that may not be used in this stage or by this side.
    #[error("key {0} is not allowed here")]
    KeyNotAllowed(String),
    /// A key was declared or negotiated twice (§6.3).
    #[error("key {0} came twice")]
    KeyRepeated(String),
    /// A value that may not be proposed, or that names nothing.
    #[error("bad value of {0}")]
    BadValue(String),
    /// The text could not be read.
    #[error(transparent)]
    Text(#[from] TextError),
    /// More exchanges than a login needs.
    #[error("too many login requests")]
    TooManyRequests,
}

/// Why the initiator (or we) could not be authenticated. Nothing of this goes to the peer but "authentication failure".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthFault {
    /// The target wants CHAP and the initiator skips security or does not offer it.
    #[error("the initiator does not offer CHAP")]
    ChapNotOffered,
    /// The initiator insists on a method that this target has no secrets for.
    #[error("no offered authentication method is available")]
    NoMethod,
    /// No algorithm of the offer is implemented and allowed.
    #[error("no offered CHAP algorithm is allowed")]
    NoAlgorithm,
    /// A key of the exchange is missing or came out of turn.
    #[error("{0} is missing or out of turn")]
    OutOfTurn(&'static str),
    /// A key of the exchange cannot be read.
    #[error("{0} cannot be read")]
    Unreadable(&'static str),
    /// The user name is another.
    #[error("unknown user name")]
    UnknownUser,
    /// The response does not match the secret.
    #[error("wrong secret")]
    WrongSecret,
    /// The initiator wants us to prove ourselves and no mutual secret is configured.
    #[error("mutual authentication is not configured")]
    NoMutualSecret,
    /// The initiator sent our own challenge back (RFC 7143 §9.2.1 forbids to answer it).
    #[error("our own challenge was reflected")]
    ReflectedChallenge,
}

/// Text keys that cannot be read (RFC 7143 §6.1).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// More text than the limit.
    #[error("more than {0} bytes of text")]
    TooLong(usize),
    /// More keys than the limit.
    #[error("more than {0} keys")]
    TooManyKeys(usize),
    /// A pair without `=`.
    #[error("no '=' in a key=value pair")]
    NoEquals,
    /// The key is no standard-label of at most 63 characters.
    #[error("malformed key name")]
    BadKey,
    /// The value is longer than the key allows.
    #[error("value of {0} is too long")]
    ValueTooLong(String),
    /// Not UTF-8.
    #[error("text is not UTF-8")]
    NotUtf8,
}

/// Reason of a Reject PDU (RFC 7143 §11.17.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RejectReason(pub u8);

impl RejectReason {
    /// The data digest does not match.
    pub const DATA_DIGEST: Self = Self(0x02);
    /// SNACK is not supported at this ErrorRecoveryLevel.
    pub const SNACK: Self = Self(0x03);
    /// The PDU breaks a rule of the protocol.
    pub const PROTOCOL_ERROR: Self = Self(0x04);
    /// The opcode is unknown or not supported.
    pub const NOT_SUPPORTED: Self = Self(0x05);
    /// Too many immediate commands.
    pub const TOO_MANY_IMMEDIATE: Self = Self(0x06);
    /// A task with this ITT is in progress.
    pub const TASK_IN_PROGRESS: Self = Self(0x07);
    /// A field has an invalid value: a tag, an offset, flags.
    pub const INVALID_FIELD: Self = Self(0x09);
    /// No resources for a long text operation.
    pub const OUT_OF_RESOURCES: Self = Self(0x0a);
    /// The initiator was asked to log out.
    pub const WAITING_FOR_LOGOUT: Self = Self(0x0c);
}

/// Why a write task ends with CHECK CONDITION by our own hand (RFC 7143 §11.4.7.2), for counters and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransferFault {
    /// Data came that was not asked for.
    UnexpectedUnsolicited {
        /// The task.
        itt: Itt,
    },
    /// A sequence ended with less or more than was agreed.
    IncorrectAmount {
        /// The task.
        itt: Itt,
    },
    /// A Data-Out out of order: a PDU before it was lost (§7.9).
    DataSnOutOfOrder {
        /// The task.
        itt: Itt,
        /// The number that was due.
        expected: DataSn,
        /// The number that came.
        got: DataSn,
    },
    /// The offset does not continue the data (DataPDUInOrder=Yes).
    OffsetOutOfOrder {
        /// The task.
        itt: Itt,
        /// The offset that was due, in bytes.
        expected: u32,
        /// The offset that came, in bytes.
        got: u32,
    },
    /// A Data-Out for another R2T than the oldest outstanding.
    WrongTtt {
        /// The task.
        itt: Itt,
        /// The tag that came.
        got: Ttt,
    },
    /// The data digest does not match.
    Digest {
        /// The task.
        itt: Itt,
    },
}

impl TransferFault {
    /// Sense key ABORTED COMMAND with the ASC and ASCQ of RFC 7143 §11.4.7.2.
    #[must_use]
    pub fn asc_ascq(self) -> (u8, u8) {
        match self {
            Self::UnexpectedUnsolicited { .. } => (0x0c, 0x0c),
            Self::IncorrectAmount { .. } | Self::OffsetOutOfOrder { .. } | Self::WrongTtt { .. } => {
                (0x0c, 0x0d)
            }
            Self::DataSnOutOfOrder { .. } | Self::Digest { .. } => (0x47, 0x05),
        }
    }
}

/// The identity that all requests of one login share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LoginIdentity {
    pub(crate) itt: Itt,
    pub(crate) isid: Isid,
    pub(crate) tsih: crate::types::Tsih,
    pub(crate) cid: Cid,
    pub(crate) cmd_sn: CmdSn,
}
