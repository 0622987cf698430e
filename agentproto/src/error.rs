//! What a peer refuses, and how it travels.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ident::SessionId;

/// Why a request was refused: the number on the wire. Unknown numbers survive, so that a newer peer's refusal is
/// still shown as it came.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ErrorCode(pub u16);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal $text:literal),* $(,)?) => {
        #[allow(non_upper_case_globals, reason = "the names of the specification, used like variants")]
        impl ErrorCode {
            $($(#[$doc])* pub const $name: Self = Self($number);)*

            /// The specification's name, or nothing for a number that this version does not know.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }

            /// Every code of the specification, in the order of its numbers.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

codes! {
    /// The message type is not known (or not served) here; the connection stays.
    UnknownMessage = 1 "UnknownMessage",
    /// A field marked critical is not known here.
    UnknownField = 2 "UnknownField",
    /// A frame, list or string beyond the limits.
    TooLarge = 3 "TooLarge",
    /// The peer's key is not pinned here.
    NotEnrolled = 4 "NotEnrolled",
    /// The agent has no right to that LUN, or the target no right to that volume.
    NotAllowed = 5 "NotAllowed",
    /// The target's generation is lower than one seen before: a stale or restored target.
    StaleGeneration = 6 "StaleGeneration",
    /// Another session holds the LUN, or the rate limit: `retry_after_ms` and `session` say which.
    Busy = 7 "Busy",
    /// The same session with other content.
    Conflict = 8 "Conflict",
    /// No such session here.
    UnknownSession = 9 "UnknownSession",
    /// The request does not fit the session's state.
    WrongState = 10 "WrongState",
    /// The work was not done in its time.
    Deadline = 11 "Deadline",
    /// The hold ended before it was released.
    HoldExpired = 12 "HoldExpired",
    /// Designator, serial, target name, LUN number or size do not belong together.
    IdentityMismatch = 13 "IdentityMismatch",
    /// The target of the LUN uses CHAP.
    LimitChap = 14 "LimitChap",
    /// The LUN is reached over more than one path.
    LimitMpio = 15 "LimitMpio",
    /// The target carries more than one LUN.
    LimitMultiLun = 16 "LimitMultiLun",
    /// The VMware datastore has more than one extent.
    LimitExtent = 17 "LimitExtent",
    /// An SMI-S provider is installed on the host.
    LimitSmis = 18 "LimitSmis",
    /// A VM's files are spread over several LUNs.
    LimitVmSpread = 19 "LimitVmSpread",
    /// The VM is not in the inventory.
    NotInInventory = 20 "NotInInventory",
    /// A VSS writer (or another application) failed.
    WriterFailed = 21 "WriterFailed",
    /// A hook failed or overran its budget.
    HookFailed = 22 "HookFailed",
    /// The guest or file system cannot be quiesced.
    NoQuiesce = 23 "NoQuiesce",
    /// Not supported by this agent.
    Unsupported = 24 "Unsupported",
    /// A fault of the peer itself.
    Internal = 25 "Internal",
    /// The body does not follow the rules of framing (a missing or repeated field, a wrong length, no UTF-8).
    Malformed = 26 "Malformed",
    /// Nothing of the LUN is mounted at the agent.
    NotMounted = 27 "NotMounted",
    /// The agent cannot be reached on its snapshot port.
    Unreachable = 28 "Unreachable",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "error {}", self.0),
        }
    }
}

impl fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The refusal of a request: the body of an error frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{code}: {text}{}", .subject.as_deref().map(|s| format!(" ({s})")).unwrap_or_default())]
pub struct Refusal {
    /// Which rule.
    pub code: ErrorCode,
    /// For people: what is wrong and what to do.
    pub text: String,
    /// What it is about: a LUN, a mount, a hook, a host.
    pub subject: Option<String>,
    /// With `Busy`: when to ask again, in milliseconds from now.
    pub retry_after_ms: Option<u32>,
    /// With `Busy`: the session that is in the way.
    pub session: Option<SessionId>,
}

impl Refusal {
    /// A refusal with a text and no subject.
    #[must_use]
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
            subject: None,
            retry_after_ms: None,
            session: None,
        }
    }

    /// The same, about something.
    #[must_use]
    pub fn about(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// The same, with the session that is in the way.
    #[must_use]
    pub fn held_by(mut self, session: SessionId) -> Self {
        self.session = Some(session);
        self
    }

    /// The same, with the time after which asking again makes sense.
    #[must_use]
    pub fn retry_after(mut self, ms: u32) -> Self {
        self.retry_after_ms = Some(ms);
        self
    }
}
