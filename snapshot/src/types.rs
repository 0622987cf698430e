//! The values that callers and the store exchange.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A volume as its users know it: stays the same over rename and revert. Never reused within a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumeId(pub u32);

/// One line of history of a volume, the `vol` of the on-disk keys. A revert starts a new branch of the same volume;
/// the first branch has the number of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BranchId(pub u32);

/// Pool-wide counter that grows by one at each cut and each clone. 28 bits on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u32);

impl Epoch {
    /// Before everything: no snapshot has this epoch.
    pub const ZERO: Self = Self(0);
    /// The last epoch that an entry can carry (28 bits).
    pub const MAX: Self = Self((1 << 28) - 1);
}

/// Names a snapshot for ever: the branch that it was taken of and the epoch that it closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId {
    /// Branch that the snapshot was taken of.
    pub branch: BranchId,
    /// The epoch that the cut closed; all snapshots of one cut share it.
    pub epoch: Epoch,
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.branch.0, self.epoch.0)
    }
}

impl std::str::FromStr for SnapshotId {
    type Err = crate::Error;

    /// Reads what [`fmt::Display`] wrote: `branch.epoch`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text
            .split_once('.')
            .and_then(|(b, e)| Some((b.parse().ok()?, e.parse().ok()?)));
        let (branch, epoch) = parts.ok_or_else(|| crate::Error::NotFound {
            what: format!("snapshot id {text:?}"),
        })?;
        Ok(Self {
            branch: BranchId(branch),
            epoch: Epoch(epoch),
        })
    }
}

/// What a new volume shall be.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    /// Unique among the volumes of the pool; 1 to [`crate::limits::NAME_BYTES`] bytes.
    pub name: String,
    /// Size in bytes, a multiple of the block size.
    pub size_bytes: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// The owner's bytes (identity and the like), at most [`crate::limits::ATTRIBUTES_BYTES`].
    pub attributes: Vec<u8>,
}

/// What a clone shall be.
#[derive(Clone, Debug)]
pub struct CloneSpec {
    /// Name of the new volume.
    pub name: String,
    /// Refuse writes for ever.
    pub read_only: bool,
    /// The owner's bytes, as in [`VolumeSpec`].
    pub attributes: Vec<u8>,
}

/// A volume as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Stable number.
    pub id: VolumeId,
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Grain of the pool in bytes.
    pub grain_bytes: u32,
    /// The owner's bytes.
    pub attributes: Vec<u8>,
    /// The snapshot that this is a clone of (or was reverted to).
    pub parent: Option<SnapshotId>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// When checksums of its grains are recorded.
    pub checksums: Checksums,
    /// Bytes of the volume that are backed by a grain, shared ones included.
    pub mapped_bytes: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_ms: i64,
}

/// Room of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeSpace {
    /// Bytes of the volume that are backed by a grain, shared ones included.
    pub used_bytes: u64,
    /// Bytes of new data that the pool would take now.
    pub available_bytes: u64,
}

/// How much a snapshot proves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// One point in time, nobody was asked.
    #[default]
    Crash,
    /// Every file system on it was frozen.
    Filesystem,
    /// And every application took part.
    Application,
}

/// When checksums (CRC-32C) of a volume's grains are recorded. A grain that has one is never overwritten in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checksums {
    /// Never. Those that are recorded already are still verified.
    Off,
    /// In the background, of what a snapshot holds.
    #[default]
    Sealed,
    /// At each write, which therefore always goes to a fresh grain.
    Always,
}

/// Life of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// Listed and usable.
    Live,
    /// Deleted by its owner but a clone stands on it.
    Hidden,
    /// Being freed by a job.
    Dying,
}

/// What a cut shall be called and remember; the same for all volumes of the cut.
#[derive(Clone, Debug, Default)]
pub struct SnapshotSpec {
    /// Unique among the snapshots of each volume.
    pub name: String,
    /// Level proved so far; raised later with [`crate::Pool::set_snapshot`].
    pub consistency: Consistency,
    /// The owner's bytes, at most [`crate::limits::SNAPSHOT_META_BYTES`].
    pub meta: Vec<u8>,
    /// Not to be deleted before this time (milliseconds since 1970 UTC); 0 = no lock.
    pub lock_until_ms: i64,
    /// Not to be deleted until released.
    pub hold: bool,
    /// Time of the cut (milliseconds since 1970 UTC); 0 = the pool's clock.
    pub created_ms: i64,
}

/// A snapshot as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Identifies it for ever.
    pub id: SnapshotId,
    /// The volume whose history it belongs to.
    pub volume: VolumeId,
    /// Name of that volume; empty when the volume is gone and only clones keep the snapshot.
    pub volume_name: String,
    /// Name.
    pub name: String,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_ms: i64,
    /// Size of the volume at the cut, in bytes.
    pub size_bytes: u64,
    /// Logical block size at the cut, in bytes.
    pub block_size: u32,
    /// Bytes that were backed by a grain at the cut.
    pub mapped_bytes: u64,
    /// Level proved.
    pub consistency: Consistency,
    /// Life.
    pub state: SnapshotState,
    /// Not to be deleted until released.
    pub hold: bool,
    /// Not to be deleted before (milliseconds since 1970 UTC); 0 = no lock.
    pub lock_until_ms: i64,
    /// Checksums of all that it holds (and that was readable) have been recorded.
    pub sealed: bool,
    /// Volumes that stand on it (clones, or the volume itself after a revert).
    pub children: usize,
    /// The owner's bytes.
    pub meta: Vec<u8>,
}

/// What [`crate::Pool::set_snapshot`] changes; `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub struct SnapshotChange {
    /// New name.
    pub name: Option<String>,
    /// New level.
    pub consistency: Option<Consistency>,
    /// New bytes of the owner.
    pub meta: Option<Vec<u8>>,
    /// Hold or release.
    pub hold: Option<bool>,
    /// New lock; refused when it would shorten a lock that still runs.
    pub lock_until_ms: Option<i64>,
}

/// The younger side of a diff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiffTo {
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A volume as it is while the diff runs.
    Head(VolumeId),
}

/// What a range of a volume is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExtentKind {
    /// Backed by grains.
    Data,
    /// Written with zeroes without being unmapped; needs no grain.
    Zero,
    /// Unmapped, reads as zeroes.
    Hole,
}

/// A range of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is made of (of the younger side, in a diff).
    pub kind: ExtentKind,
}

/// One piece of a long diff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffPart {
    /// Changed ranges in ascending order.
    pub extents: Vec<Extent>,
    /// Where to go on, or `None` at the end.
    pub next: Option<u64>,
}

/// Answer of a compare-and-write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caw {
    /// Equal, and written.
    Done,
    /// Not equal, nothing written.
    Miscompare {
        /// Index of the first byte that differs, within the compared range.
        offset: u64,
    },
}

/// What a compaction of the metadata did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CompactReport {
    /// Bytes of the metadata store on disk before.
    pub before_bytes: u64,
    /// And after.
    pub after_bytes: u64,
    /// Bytes of all keys and values.
    pub live_bytes: u64,
    /// Number of keys.
    pub keys: u64,
    /// How long commits and map misses waited for the change of places, in milliseconds.
    pub switch_ms: u64,
}

/// What deleting a set of snapshots would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletePlan {
    /// Bytes that nothing would use any more.
    pub freed_bytes: u64,
    /// Those that would stay, hidden, since clones stand on them.
    pub kept: Vec<SnapshotId>,
}

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes that share their grains with the source now (or that need none: holes and zeroes).
    pub referenced_bytes: u64,
    /// Bytes that were read and written.
    pub copied_bytes: u64,
}

/// Counters and sizes of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolStats {
    /// Grain in bytes.
    pub grain_bytes: u32,
    /// Bytes in grains that are in use (by volumes and snapshots).
    pub allocated_bytes: u64,
    /// Bytes in grains that the data file has and nothing uses.
    pub free_bytes: u64,
    /// Upper bound set by the operator; 0 = the file system's.
    pub max_bytes: u64,
    /// Bytes of new data that would be taken now: below the operator's bound and above the head room.
    pub available_bytes: u64,
    /// The highest threshold of fullness that the pool has passed, in percent; 0 = none.
    pub threshold_percent: u8,
    /// Free bytes of the file system below the pool.
    pub filesystem_free_bytes: u64,
    /// Bytes kept back for the metadata; new data is refused below.
    pub headroom_bytes: u64,
    /// Whether writes that need a grain are refused now.
    pub out_of_space: bool,
    /// Bytes of the metadata store on disk.
    pub metadata_bytes: u64,
    /// Durable transaction group.
    pub txg: u64,
    /// Next epoch.
    pub epoch: u32,
    /// Commits since the pool was opened.
    pub commits: u64,
    /// Syncs of the data file alone since the pool was opened.
    pub data_syncs: u64,
    /// Pages held in RAM.
    pub cached_pages: usize,
    /// Of these, pages that are not in the metadata store yet.
    pub dirty_pages: usize,
    /// Page lookups answered from RAM.
    pub page_hits: u64,
    /// Page lookups that asked the metadata store.
    pub page_misses: u64,
    /// Bytes of delta log not yet checkpointed.
    pub journal_bytes: u64,
    /// Most map pages that were handled while everybody else waited, since the pool was opened.
    pub most_pages_per_hold: usize,
    /// Background jobs waiting or running; 0 = what they gave back is given back.
    pub jobs: usize,
    /// Of these, copies by reference that are answered and not in the map yet.
    pub loans: usize,
    /// Volumes.
    pub volumes: usize,
    /// Snapshots, hidden and dying ones included.
    pub snapshots: usize,
    /// At the last start, something that a killed process had acknowledged and not flushed could not be recovered.
    pub recovery_incomplete: bool,
    /// Grains that are known to be bad.
    pub bad_grains: usize,
    /// Why the pool is poisoned, if it is.
    pub poisoned: Option<String>,
}

/// Something that the operator may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreEvent {
    /// Writes stopped; restart to recover.
    Poisoned {
        /// First failure.
        reason: String,
    },
    /// Writes that need a grain are refused.
    OutOfSpace,
    /// Space is back.
    SpaceRecovered,
    /// The pool has become this full, or has become clearly emptier again.
    Threshold {
        /// The threshold in percent of what the pool can hold.
        percent: u8,
        /// Passed upwards; `false` = the pool is below it again.
        reached: bool,
        /// Bytes in use.
        used_bytes: u64,
        /// Bytes of new data that the pool would still take.
        available_bytes: u64,
    },
    /// A background job met damage and waits for the next start.
    JobFailed {
        /// What it met.
        reason: String,
    },
    /// Bytes that are not what was written, or that the medium cannot read: told once for each grain.
    BadData {
        /// Volume in whose history they were met; `None` when a background task met them.
        volume: Option<VolumeId>,
        /// First byte on the volume, at a border of grains.
        offset: u64,
    },
    /// Bad data was overwritten or is not part of any volume or snapshot any more.
    BadDataGone {
        /// Grains that were known to be bad and are so no more.
        grains: usize,
    },
    /// A scrub has seen everything.
    ScrubEnded {
        /// Problems that it found.
        problems: u64,
    },
    /// A deleted snapshot is gone and its grains are free.
    SnapshotFreed(SnapshotId),
    /// A deleted (or reverted) line of history is gone.
    BranchFreed(BranchId),
}

/// Milliseconds since 1970-01-01 UTC.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// Places where a test may stop a thread. The name says what has just happened.
pub type Point = &'static str;

/// Called at named points of the store, so that tests can pause a thread between two steps. No lock is held there
/// except the operation's own range lock (and, inside a commit, the right to commit).
#[cfg(feature = "sim")]
pub trait Hooks: Send + Sync {
    /// `point` has been reached by the calling thread.
    fn at(&self, point: Point);
}

/// How a pool behaves.
#[derive(Clone)]
pub struct PoolOptions {
    /// Grain in bytes: 4, 8, 16 or 64 KiB. Used by create only; a pool keeps its grain.
    pub grain_bytes: u32,
    /// RAM bound of the map cache in bytes (clean pages; dirty ones are bounded by the checkpoint).
    pub cache_bytes: usize,
    /// Most bytes of grains in use; 0 = no bound but the file system's.
    pub max_bytes: u64,
    /// Free bytes of the file system below which nothing new is allocated; the live metadata size counts too.
    pub min_free_bytes: u64,
    /// Size of the ballast file beside the metadata; 0 = none.
    pub ballast_bytes: u64,
    /// Commit at latest this long after a change, in milliseconds.
    pub commit_ms: u64,
    /// Give up opening the metadata store after this long, in milliseconds (a damaged one may hang).
    pub open_timeout_ms: u64,
    /// No background threads: the caller drives [`crate::Pool::step`], [`crate::Pool::commit_now`] and
    /// [`crate::Pool::run_jobs`]. For deterministic tests.
    pub manual: bool,
    /// Wall clock; `None` = the system's.
    pub clock: Option<Clock>,
    /// Checkpoint pages whose oldest delta is this many transaction groups old.
    pub checkpoint_txgs: u64,
    /// Checkpoint everything when the delta log has this many bytes.
    pub checkpoint_bytes: u64,
    /// Zeroing more bytes than this at once leaves a tombstone: answered at once, worked through in the background.
    pub tombstone_bytes: u64,
    /// Copying more bytes than this within the pool leaves a loan: answered at once, worked through in the background.
    pub loan_bytes: u64,
    /// Pages that a background job handles per commit.
    pub job_pages: usize,
    /// Age of a snapshot, in milliseconds, from which on its checksums are recorded: short-lived ones cost nothing.
    pub seal_after_ms: u64,
    /// Bytes per second that are read to record checksums.
    pub seal_rate: u64,
    /// What the running kernel says its boot id is, when a test plays a power cut; `None` = ask it.
    #[cfg(feature = "sim")]
    pub boot_id: Option<String>,
    /// Pause points for tests.
    #[cfg(feature = "sim")]
    pub hooks: Option<Arc<dyn Hooks>>,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            grain_bytes: 4096,
            cache_bytes: 256 << 20,
            max_bytes: 0,
            min_free_bytes: 64 << 20,
            ballast_bytes: 256 << 20,
            commit_ms: 1000,
            open_timeout_ms: 120_000,
            manual: false,
            clock: None,
            checkpoint_txgs: 16,
            checkpoint_bytes: 8 << 20,
            tombstone_bytes: 1 << 30,
            loan_bytes: 16 << 20,
            job_pages: 1000,
            seal_after_ms: 10_000,
            seal_rate: 64 << 20,
            #[cfg(feature = "sim")]
            boot_id: None,
            #[cfg(feature = "sim")]
            hooks: None,
        }
    }
}

impl fmt::Debug for PoolOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolOptions")
            .field("grain_bytes", &self.grain_bytes)
            .field("cache_bytes", &self.cache_bytes)
            .field("max_bytes", &self.max_bytes)
            .field("min_free_bytes", &self.min_free_bytes)
            .field("ballast_bytes", &self.ballast_bytes)
            .field("commit_ms", &self.commit_ms)
            .field("manual", &self.manual)
            .field("checkpoint_txgs", &self.checkpoint_txgs)
            .field("checkpoint_bytes", &self.checkpoint_bytes)
            .field("job_pages", &self.job_pages)
            .field("seal_after_ms", &self.seal_after_ms)
            .field("seal_rate", &self.seal_rate)
            .finish_non_exhaustive()
    }
}

/// Limits of the store. Each refusal is [`crate::Error::Limit`].
pub mod limits {
    /// Longest name of a volume or snapshot, in bytes.
    pub const NAME_BYTES: usize = 200;
    /// Longest attributes of a volume, in bytes.
    pub const ATTRIBUTES_BYTES: usize = 3072;
    /// Longest owner's bytes of a snapshot.
    pub const SNAPSHOT_META_BYTES: usize = 3072;
    /// Longest value of [`crate::Pool::meta_put`], in bytes.
    pub const META_VALUE_BYTES: usize = 4080;
    /// Longest key of [`crate::Pool::meta_put`], in bytes.
    pub const META_KEY_BYTES: usize = 200;
    /// Most keys of [`crate::Pool::meta_put`].
    pub const META_KEYS: usize = 65_536;
    /// Largest volume: 64 TiB.
    pub const VOLUME_BYTES: u64 = 64 << 40;
    /// Most volumes (branches) of a pool.
    pub const BRANCHES: usize = 16_384;
    /// Most snapshots of a pool.
    pub const SNAPSHOTS: usize = 131_072;
    /// Deepest nesting of clones and reverts.
    pub const DEPTH: usize = 16;
}
