//! Every message: number, fields, reply, deadline (specification §5).

mod blob;
mod provider;
mod records;
mod revert;
#[cfg(test)]
pub(crate) mod sample;
mod session;
mod tags;

use std::time::Duration;

pub use crate::freeze::Level;
pub use blob::*;
pub use provider::*;
pub use records::*;
pub use revert::*;
pub use session::*;

pub use crate::wire::{BodyError, EncodeError};

use crate::error::Refusal;
use crate::ident::SessionId;
use crate::wire::{Fields, Record, Writer};

/// The number of a message; a reply, an error and the progress of a request carry the request's number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct MessageType(pub u16);

/// The number of [`LogEvent`].
pub const LOG_EVENT: MessageType = MessageType(40);

macro_rules! exchanges {
    ($($(#[$doc:meta])* $name:ident = $number:literal => $reply:ident),* $(,)?) => {
        /// What one end asks of the other.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Request { $($(#[$doc])* $name($name)),* }

        /// What the other answers; the variant has the request's name.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Reply { $($(#[$doc])* $name($reply)),* }

        impl Request {
            /// The number on the wire.
            #[must_use]
            pub fn message_type(&self) -> MessageType {
                match self { $(Self::$name(_) => MessageType($number)),* }
            }

            pub(crate) fn from_body(message: MessageType, body: &[u8]) -> Result<Self, BodyError> {
                match message.0 {
                    $($number => <$name as Record>::from_body(body).map(Self::$name),)*
                    other => Err(BodyError::UnknownMessage(other)),
                }
            }

            pub(crate) fn body(&self) -> Result<Vec<u8>, EncodeError> {
                match self { $(Self::$name(body) => body_of(body)),* }
            }
        }

        impl Reply {
            /// The number on the wire.
            #[must_use]
            pub fn message_type(&self) -> MessageType {
                match self { $(Self::$name(_) => MessageType($number)),* }
            }

            pub(crate) fn from_body(message: MessageType, body: &[u8]) -> Result<Self, BodyError> {
                match message.0 {
                    $($number => <$reply as Record>::from_body(body).map(Self::$name),)*
                    other => Err(BodyError::UnknownMessage(other)),
                }
            }

            pub(crate) fn body(&self) -> Result<Vec<u8>, EncodeError> {
                match self { $(Self::$name(body) => body_of(body)),* }
            }
        }

        #[cfg(test)]
        impl sample::Sample for Request {
            fn sample(dice: &mut sample::Dice) -> Self {
                let all: &[fn(&mut sample::Dice) -> Self] = &[$(|dice| Self::$name(sample::Sample::sample(dice))),*];
                all[dice.below(all.len())](dice)
            }
        }

        #[cfg(test)]
        impl sample::Sample for Reply {
            fn sample(dice: &mut sample::Dice) -> Self {
                let all: &[fn(&mut sample::Dice) -> Self] = &[$(|dice| Self::$name(sample::Sample::sample(dice))),*];
                all[dice.below(all.len())](dice)
            }
        }
    };
}

exchanges! {
    /// First frame of either side.
    Hello = 1 => Hello,
    /// Bind a token to the two keys.
    Enrol = 2 => EnrolOk,
    /// Announce the agent.
    Register = 3 => RegisterOk,
    /// Still there.
    Heartbeat = 4 => HeartbeatOk,
    /// What is on these LUNs?
    ListVolumes = 10 => Volumes,
    /// Would it work?
    Preflight = 11 => PreflightReport,
    /// Get ready.
    Prepare = 12 => Prepared,
    /// Freeze.
    Freeze = 13 => Frozen,
    /// Thaw.
    Release = 14 => Thawed,
    /// Clean up after success.
    Complete = 15 => Completed,
    /// Undo.
    Abort = 16 => Aborted,
    /// Where do you stand?
    Status = 17 => StatusReport,
    /// Keep this piece of a document.
    Blob = 18 => BlobOk,
    /// A piece of a document, please.
    FetchBlob = 19 => Blob,
    /// Let go of a LUN.
    RevertPrepare = 20 => RevertReady,
    /// Take it back.
    RevertDone = 21 => Reattached,
    /// Can these LUNs be cut for VSS?
    ProvQuery = 30 => ProvSupport,
    /// Reserve a set.
    ProvBegin = 31 => ProvReady,
    /// Cut it.
    ProvCommit = 32 => ProvTaken,
    /// Show or hide a shadow copy.
    ProvExpose = 33 => ProvExposed,
    /// Delete or abort.
    ProvDelete = 34 => ProvGone,
}

fn body_of(record: &impl Record) -> Result<Vec<u8>, EncodeError> {
    let mut writer = Writer::default();
    record.write_fields(&mut writer)?;
    Ok(writer.into_bytes())
}

/// A frame's content, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A request.
    Request(Request),
    /// A good reply.
    Reply(Reply),
    /// A refusal of a request of this type.
    Refused(MessageType, Refusal),
    /// Progress of a request of this type.
    Progress(MessageType, Progress),
    /// A line for the operator.
    Log(LogEvent),
}

pub(crate) fn refusal_from_body(body: &[u8]) -> Result<Refusal, BodyError> {
    let mut fields = Fields::of_body(body)?;
    let refusal = Refusal::read_fields(&mut fields)?;
    fields.finish()?;
    Ok(refusal)
}

pub(crate) fn record_from_body<R: Record>(body: &[u8]) -> Result<R, BodyError> {
    R::from_body(body)
}

pub(crate) fn record_body(record: &impl Record) -> Result<Vec<u8>, EncodeError> {
    body_of(record)
}

impl Request {
    /// The session that the request belongs to, when it is one of a session's steps.
    #[must_use]
    pub fn session(&self) -> Option<SessionId> {
        match self {
            Self::Prepare(Prepare { session, .. })
            | Self::Freeze(Freeze { session, .. })
            | Self::Release(Release { session, .. })
            | Self::Complete(Complete { session, .. })
            | Self::Abort(Abort { session, .. }) => Some(*session),
            _ => None,
        }
    }

    /// How long the answer may take, from an agent with these capabilities (specification §5, last column).
    #[must_use]
    pub fn deadline(&self, agent: Capabilities) -> Duration {
        let vss = agent.has(Capabilities::VSS_REQUESTER);
        let vmware = agent.has(Capabilities::VMWARE);
        Duration::from_secs(match self {
            // MS docs: CommitSnapshots should end within a second.
            Self::ProvCommit(_) => 1,
            Self::Hello(_) | Self::Enrol(_) | Self::Register(_) | Self::Status(_) | Self::ProvQuery(_) => 5,
            Self::Heartbeat(_) | Self::ProvBegin(_) | Self::ProvExpose(_) | Self::ProvDelete(_) => 10,
            Self::ListVolumes(_) | Self::Abort(_) | Self::Blob(_) | Self::FetchBlob(_) => 30,
            Self::Preflight(_) | Self::Freeze(_) => 60,
            Self::Prepare(_) if vmware => 900,
            Self::Prepare(_) => 120,
            Self::Release(_) if vss => 180,
            Self::Release(_) => 30,
            Self::Complete(_) | Self::RevertPrepare(_) | Self::RevertDone(_) => 900,
        })
    }
}
