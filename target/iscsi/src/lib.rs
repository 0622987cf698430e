//! The target side of RFC 7143 without sockets and without a clock: bytes and times in, events and frames out.
//!
//! One [`Connection`] is one session (MaxConnections=1, ErrorRecoveryLevel=0). Its owner reads from the socket into
//! [`Connection::space`], tells [`Connection::advance`], does what [`Connection::poll_event`] asks and sends what
//! [`Connection::poll_transmit`] yields. See `README.md` for the whole loop.
#![forbid(unsafe_code)]

mod buffer;
mod config;
mod connection;
mod error;
mod event;
mod frame;
mod login;
mod memory;
pub mod pdu;
mod receive;
mod record;
mod session;
mod task;
mod text;
mod transfer;
mod transmit;
mod types;

pub use config::{ConnectionConfig, DigestPolicy, KeyConfig, LimitConfig, TimeConfig};
pub use connection::Connection;
pub use error::{AuthFault, Error, LoginFault, LoginStatus, RejectReason, TextError, TransferFault};
pub use event::{
    Admission, Cdb, Command, Counters, Directory, DiscoveryAsk, EndedTasks, Event, LoginAsk, Outcome, Phase,
    SessionInfo, TargetGrant, TargetRecord,
};
pub use frame::Frame;
pub use login::{ChapAlgorithm, ChapPolicy, ChapPolicyError, Params};
pub use memory::SharedMemory;
pub use record::{Direction, Payload, Recorded};
pub use types::{
    Cid, CmdSn, DataSn, Isid, Itt, LogoutReason, Lun, R2tSn, SessionType, StatSn, TaskAttribute, TaskId,
    TmfFunction, TmfId, TmfResponse, Tsih, Ttt,
};
