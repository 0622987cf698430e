//! Harness of the stories in `tests/tests/`: real initiators against the real programs.
//!
//! A story starts `stillpoint` as an operator would (a config file, a control socket, the CLI), points a real initiator
//! at it (libiscsi's test suite, QEMU's block driver, the Linux kernel in a QEMU guest) and looks at what came of it.
//! Everything that a story starts ends with it, also when it fails: [`Scratch`] owns the directory, [`Running`] the
//! process.

#![forbid(unsafe_code)]

mod agent_host;
mod cpio;
mod daemon;
mod database;
mod export;
mod guest;
mod process;
mod proxy;
mod qemu_img;
pub mod raw;
pub mod replay;
mod scratch;
mod test_cu;
mod tgt;
mod tools;
mod vcsim;
pub mod windows;

pub use agent_host::AgentHost;
pub use daemon::Daemon;
pub use database::{Database, Server, Writer};
pub use export::Export;
pub use guest::{Answer, Guest, GuestSpec, Payload};
pub use process::{Finished, Running, run, wait_until};
pub use proxy::{Fault, Proxy, Way};
pub use qemu_img::{qemu_img, qemu_io, qemu_io_read_only, qemu_session};
pub use scratch::{Scratch, free_port, story};
pub use test_cu::{Lists, Outcome, Tally, suite, tests_of_suite};
pub use tgt::Tgt;
pub use tools::{database_tool, tool, tshark};
pub use vcsim::{PASSWORD, USER, Vcsim};
