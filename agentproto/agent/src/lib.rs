//! The reference snapshot agent for Linux.
#![deny(unsafe_code)]
#![expect(dead_code, reason = "wip")]

mod config;
mod freeze;
mod guard;
mod hooks;
mod journal;
mod link;
mod plan;
mod state;
mod sys;
mod tls;
mod volumes;

/// Runs the program.
#[must_use]
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
