//! Where a session can stand, and how it can end.

use std::time::{Duration, Instant};

use crate::freeze::{Hold, Level};

/// What follows when a session under way is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Thaw what is frozen; the target may still come back with Release or Abort.
    Wait,
    /// Thaw, and clean up: nobody will come back.
    Clean,
}

/// Where a session stands, with what is valid only there.
#[derive(Clone, Debug)]
pub(super) enum State {
    Preparing,
    Prepared {
        since: Instant,
    },
    /// Hooks or file systems; `hold` once the first file system is about to be frozen.
    Freezing {
        since: Instant,
        asked: Duration,
        hold: Option<Hold>,
    },
    Frozen {
        hold: Hold,
    },
    Thawing {
        hold: Option<Hold>,
        released: Option<Released>,
        why: Option<String>,
        then_clean: bool,
    },
    Thawed {
        since: Instant,
    },
    Cleaning {
        recorded: Option<Level>,
    },
    Completed,
    Aborted,
}

/// A Release that came in time: thawing may still find that it was too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Released;
