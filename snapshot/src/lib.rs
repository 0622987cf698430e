//! Redirect-on-write snapshot store: thin volumes in one data file of grains, their map in an ordered key-value
//! store, snapshots that cost one closed epoch. Knows bytes, grains and snapshots; not SCSI, not tokio.
//!
//! FORMAT.md describes every key, value and file; README.md the parts of this crate.
#![forbid(unsafe_code)]

mod codec;
pub mod disk;
mod error;
pub mod meta;
pub mod page;
pub mod record;
mod types;

pub use error::{Error, Result};
pub use types::*;

#[cfg(feature = "sim")]
pub mod sim;
