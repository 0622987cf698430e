//! TOML text to a [`Config`] that cannot be wrong.
//!
//! Reading has two steps. [`file::v1`](file) walks the text as written, keeps the line of every value and collects
//! *every* problem, not only the first. `check` then looks at what the parts mean for each other and builds the
//! [`Config`], whose types leave no room for an impossible combination: a [`TargetKind::Agent`] has no field for CHAP,
//! a second LUN or a second portal group.
//!
//! No sockets, no async, no command line: only text, and the secret files that the text names.
#![forbid(unsafe_code)]

mod check;
mod config;
mod diff;
mod duration;
mod embedded;
mod file;
mod limits;
mod listen;
mod name;
mod problem;
mod schedule;
mod secret;
mod size;
mod suggest;

pub use check::DEFAULT_CONFIG_FILE;
pub use config::{
    Access, AgentTarget, Agents, Chap, ChapAlgorithm, Checksums, CompanyId, Config, Consistency, Credentials,
    Daemon, Grain, Http, HttpUser, Initiators, Lun, Metrics, OnFailure, Origin, PlainTarget, Pool, Portal,
    Role, Target, TargetKind, Tls, Unserved,
};
pub use diff::{Change, Effect, diff};
pub use duration::{format_duration, parse_duration};
pub use embedded::{EMBEDDED_DATA_DIR, EMBEDDED_IQN, EMBEDDED_LUN};
pub use limits::*;
pub use listen::{parse_advertise, parse_listen};
pub use name::{IscsiName, LunName};
pub use problem::{Problem, Problems, Trouble};
pub use schedule::{Keep, Schedule};
pub use secret::Secret;
pub use size::Size;
