//! Stillpoint: a userspace iSCSI target whose snapshots can be trusted.
//!
//! One program: `stillpoint serve` is the daemon, every other verb talks to it over its control socket.
#![forbid(unsafe_code)]

mod cli;
mod serve;

/// Runs the program.
#[must_use]
pub fn main() -> std::process::ExitCode {
    cli::run()
}
