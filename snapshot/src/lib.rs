//! Redirect-on-write snapshot store: thin volumes in one data file of grains, their map in an ordered key-value
//! store, snapshots that cost one closed epoch. Knows bytes, grains and snapshots; not SCSI, not tokio.
//!
//! FORMAT.md describes every key, value and file; README.md the parts of this crate.
#![forbid(unsafe_code)]

mod alloc;
mod bad;
mod bulk;
mod check;
mod codec;
mod commit;
mod compact;
mod diff;
pub mod disk;
mod dump;
mod error;
mod inner;
mod job;
mod keeper;
mod loan;
mod lock;
mod map;
pub mod meta;
mod meta_client;
mod meta_sled;
mod offline;
mod open;
pub mod page;
mod pin;
mod pool;
pub mod record;
mod refs;
mod repair;
mod scrub;
mod seal;
mod snap;
mod space;
mod state;
pub mod superblock;
mod tomb;
mod types;
mod unsynced;
mod usage;
mod volume;
mod warm;

pub use bad::BadData;
pub use check::{CheckReport, Problem, ProblemKind, check, check_data, check_media};
pub use compact::{CompactState, CompactStep};
pub use dump::{dump, dump_meta, restore, restore_meta};
pub use error::{Error, Result};
pub use meta_client::METADATA_THREAD;
pub use meta_sled::SledMeta;
pub use open::{DATA_FILE, META_DIR, paths, reserved_grains};
pub use pin::Pin;
pub use pool::Pool;
pub use repair::{RepairOptions, RepairPlan, repair, repair_media};
pub use scrub::{ScrubPhase, ScrubStatus};
pub use snap::Cut;
pub use types::*;
pub use volume::{CopySource, Volume};

#[cfg(feature = "sim")]
pub mod sim;

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    reason = "tests with small numbers, told in order"
)]
mod pool_tests;
