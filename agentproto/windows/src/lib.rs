//! The snapshot agent for Windows: one service that is VSS requester, VSS hardware provider, and the TLS end of the agents' protocol.
//!
//! ```text
//!   target ◀─── registration ───┐            ┌── session ── backup ── win::requester ──▶ VSS ──┐
//!      │                        ├── engine ──┤                                               │ COM
//!      └──────▶ listener ───────┘            └── hold ◀── provider ◀── win::com ◀────────────┘
//!      ◀──────────── wire (ProvBegin, ProvCommit …) ──────┘
//! ```
//!
//! What is decided is decided in modules that know nothing of Windows; they are built and tested everywhere. `win` is what only Windows
//! has. Modules of `../agent/src` that know nothing of Linux are built here, too, from the same files.
#![deny(unsafe_code)]
#![cfg_attr(not(windows), allow(dead_code, reason = "only `win` calls it"))]

mod backup;
mod config;
mod documents;
mod engine;
mod features;
mod hold;
mod host;
mod hyperv;
mod install;
mod ledger;
mod lun_info;
mod plan;
mod platform;
mod private;
mod provider;
mod registration;
mod run;
mod session;
mod volumes;
mod wire;
mod writers;

#[path = "../../agent/src/dial.rs"]
mod dial;
#[path = "../../agent/src/discover.rs"]
mod discover;
#[path = "../../agent/src/enrol.rs"]
mod enrol;
#[path = "../../agent/src/failure.rs"]
mod failure;
#[path = "../../agent/src/link.rs"]
mod link;
#[path = "../../agent/src/listener.rs"]
mod listener;
#[path = "../../agent/src/log.rs"]
mod log;
#[path = "../../agent/src/state.rs"]
mod state;
#[path = "../../agent/src/status.rs"]
mod status;
#[path = "../../agent/src/tls.rs"]
mod tls;

#[cfg(windows)]
mod cli;
#[cfg(windows)]
#[allow(unsafe_code, reason = "COM and Win32")]
mod win;

/// Runs the program with the process's arguments.
#[must_use]
pub fn main() -> std::process::ExitCode {
    #[cfg(windows)]
    return cli::main();
    #[cfg(not(windows))]
    {
        eprintln!(
            "this is the agent for Windows: build it with tests/run-windows; on Linux it is stillpoint-agent"
        );
        std::process::ExitCode::FAILURE
    }
}

/// For the tests' fake coordinator: a provider whose class object comes from a DLL.
#[cfg(windows)]
#[allow(unsafe_code, reason = "COM")]
pub mod testing {
    pub use crate::win::in_dll::get_class_object;
}
