//! What can go wrong in the store. Each variant answers what the caller does next.

use std::io;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Bytes on disk are not what was written. Nothing was changed; run the offline check.
    #[error("{what} is damaged ({where_})")]
    Corrupt {
        /// The thing that is damaged, as a noun.
        what: String,
        /// Key, file or offset where it was found.
        where_: String,
    },
    /// The write needs a grain and there is no room for one. Reads and overwrites in place go on.
    #[error("the pool has no space left for new data")]
    NoSpace,
    /// The operating system refused. A write that failed this way was not acknowledged.
    #[error("{op} {path}: {source}")]
    Io {
        /// The call, as a verb.
        op: &'static str,
        /// File or directory.
        path: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// A sync or the metadata store failed earlier: nothing is acknowledged until the pool is opened again.
    #[error("the pool stopped accepting writes: {reason}; restart to recover")]
    Poisoned {
        /// The first failure.
        reason: String,
    },
    /// The medium cannot return this byte of the volume.
    #[error("unreadable data at byte {offset} of the volume")]
    Medium {
        /// Byte on the volume.
        offset: u64,
    },
    /// No volume, snapshot or key of that name.
    #[error("{what} does not exist")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// The name is taken.
    #[error("{what} exists already")]
    Exists {
        /// What was to be made.
        what: String,
    },
    /// A rule forbids it; the reason says which and what to do.
    #[error("{reason}")]
    Refused {
        /// The rule and the way out.
        reason: String,
    },
    /// The volume is a read-only clone.
    #[error("the volume is read-only")]
    ReadOnly,
    /// The range is not inside the volume.
    #[error("bytes {offset}..+{len} are outside of a volume of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Length asked for, in bytes.
        len: u64,
        /// Size of the volume in bytes.
        size: u64,
    },
    /// A limit of the store is reached.
    #[error("limit reached: {what} (at most {max})")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// The limit.
        max: u64,
    },
    /// Written by a newer version of Stillpoint.
    #[error("the store has format {found}; this build reads format {supported}")]
    Version {
        /// Format found on disk.
        found: u32,
        /// Format that this build reads and writes.
        supported: u32,
    },
    /// The metadata is older than the data file (invariant I7): committed work is missing.
    #[error(
        "the metadata store has lost commits: it is at {metadata}, the data file has seen {superblock}; not opened for writing"
    )]
    LostCommits {
        /// Newest transaction group that the data file has seen durable.
        superblock: u64,
        /// Transaction group of the metadata store.
        metadata: u64,
    },
}

impl Error {
    /// Wraps an I/O error of the operating system; "no space" becomes [`Error::NoSpace`].
    pub fn io(op: &'static str, path: impl Into<String>, source: io::Error) -> Self {
        if is_no_space(&source) {
            Self::NoSpace
        } else {
            Self::Io {
                op,
                path: path.into(),
                source,
            }
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>, where_: impl Into<String>) -> Self {
        Self::Corrupt {
            what: what.into(),
            where_: where_.into(),
        }
    }

    pub(crate) fn refused(reason: impl Into<String>) -> Self {
        Self::Refused {
            reason: reason.into(),
        }
    }
}

/// Whether the operating system said ENOSPC or EDQUOT.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
