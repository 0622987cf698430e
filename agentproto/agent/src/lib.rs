//! The reference snapshot agent for Linux: one program with its whole logic here, so that tests can run it as it is.
//!
//! ```text
//!   target ◀─── registration ───┐                ┌── plan ── volumes (sysfs, mountinfo), hooks
//!      │                        ├── engine ──────┤
//!      └──────▶ listener ───────┘  (one per      └── freeze ── sys (ioctls), guard (2nd process), journal
//!              snapshot channels    target)
//! ```
//!
//! What the protocol says is decided in `stillpoint-agentproto`; here is what happens on the host.
#![deny(unsafe_code)]

mod apps;
mod cli;
mod config;
mod dial;
mod discover;
mod engine;
mod enrol;
mod failure;
mod features;
mod freeze;
mod guard;
mod hooks;
mod host;
mod install;
mod journal;
mod libvirt;
mod link;
mod listener;
mod log;
mod manual;
mod plan;
mod private;
mod registration;
mod report;
mod run;
mod state;
mod status;
mod sys;
mod tls;
mod vcenter;
mod volumes;

/// Runs the program with the process's arguments.
#[must_use]
pub fn main() -> std::process::ExitCode {
    cli::main()
}
