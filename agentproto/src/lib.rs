//! The snapshot agents' protocol ("SPA", TCP 11169): frames, messages, and the state machines of both ends.
//!
//! Sans-IO: no socket, no clock, no task. Time is an argument, randomness comes from the caller, and what has to
//! happen outside comes out as events and actions. `PROTOCOL.md` beside this crate describes the same bytes for
//! people who write an agent in another language.
//!
//! | module | what it owns |
//! |---|---|
//! | [`frame`] | header, limits, cutting a byte stream into frames |
//! | [`message`] | every message: its fields, its reply, its deadline |
//! | [`channel`] | one connection: Hello, request ids, deadlines, requests in flight |
//! | [`registration`] | the agent-dialled connection: enrol, register with lease, heartbeat |
//! | [`enrol`] | tokens and the MACs that bind one to a TLS session |
//! | [`discovery`] | "which targets are there?", by UDP |
//! | [`freeze`] | holds, cut windows and what may be claimed |
//! | [`server`] | the coordinator: one machine per snapshot, on the target |
//! | [`provider`] | the VSS hardware provider's requests: what the target serves, and a client for agents |
//! | [`client`] | the agent's sessions: prepare, freeze, hold, thaw |
#![forbid(unsafe_code)]

pub mod channel;
pub mod client;
pub mod discovery;
pub mod enrol;
pub mod error;
pub mod frame;
pub mod freeze;
pub mod ident;
pub mod message;
pub mod provider;
pub mod registration;
pub mod server;
#[cfg(feature = "tls")]
pub mod tls;
mod wire;

pub use error::{ErrorCode, Refusal};
pub use ident::{AgentId, Fingerprint, LunId, SessionId, SetId, ShadowId};

/// TCP port of both ends unless configured otherwise (the agent's snapshot channel, the target's registration channel).
pub const DEFAULT_PORT: u16 = 11169;
/// The protocol version that this crate speaks.
pub const VERSION: u8 = 1;
