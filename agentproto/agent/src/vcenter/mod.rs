//! VMs on a LUN, through their vCenter (agent-protocol.md §10). It speaks to the vCenter only, so it runs on any host, and this module
//! knows nothing of Linux.
//!
//! ```text
//! engine ── service ──┬── rules        what stands in the way
//!                     ├── snapshots    VM snapshots around a snapshot of the LUN
//!                     └── revert       the hosts let the LUN go and take it again      (manifest)
//!                             └── inventory ── vim ── soap ── http (pinned certificate), xml (limits)
//! ```

mod cli;
mod files;
mod http;
mod inventory;
mod manifest;
mod revert;
mod revert_service;
mod rules;
mod service;
mod settings;
mod snapshots;
mod soap;
mod thumbprint;
mod vim;
mod xml;

pub(crate) use cli::{Verb, run};
pub(crate) use service::{Prepared, Vcenter};
