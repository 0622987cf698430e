//! The metadata seam: an ordered key-value store with atomic batches and an explicit durable commit.

use std::sync::Arc;

use crate::compact::{CompactState, CompactStep};
use crate::{Error, Result};

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// Largest value that the store hands to a [`MetaStore`], in bytes (snapshot-store.md §3.3).
pub const MAX_VALUE_BYTES: usize = 4096;

/// Changes that are applied together or not at all. A later change of the same key wins.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// In the order of insertion: `None` removes the key.
    pub changes: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

impl Batch {
    /// Sets a key.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        debug_assert!(value.len() <= MAX_VALUE_BYTES, "value of {} bytes", value.len());
        self.changes.push((key, Some(value)));
    }

    /// Removes a key; harmless when it does not exist.
    pub fn remove(&mut self, key: Vec<u8>) {
        self.changes.push((key, None));
    }

    /// Whether there is nothing to apply.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Bytes of keys and values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.changes
            .iter()
            .map(|(k, v)| k.len() + v.as_ref().map_or(0, Vec::len))
            .sum()
    }
}

/// An ordered key-value store. Called from one thread at a time (`&mut self`), the barrier from another.
///
/// Any error means that the store's state is unknown: the pool is poisoned and must be opened again.
pub trait MetaStore: Send {
    /// The value of `key`, changes that are not durable yet included.
    ///
    /// # Errors
    /// See the trait.
    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Up to `limit` pairs with `from <= key < below`, in ascending order.
    ///
    /// # Errors
    /// See the trait.
    fn scan(&mut self, from: &[u8], below: &[u8], limit: usize) -> Result<Vec<Pair>>;

    /// The pair with the greatest key in `from <= key < below`.
    ///
    /// # Errors
    /// See the trait.
    fn last(&mut self, from: &[u8], below: &[u8]) -> Result<Option<Pair>> {
        Ok(self.scan(from, below, usize::MAX)?.pop())
    }

    /// Applies a batch atomically. Batches become durable in the order in which they were applied.
    ///
    /// # Errors
    /// See the trait.
    fn apply(&mut self, batch: &Batch) -> Result<()>;

    /// Hands everything applied so far to the operating system. Durable only after the barrier's `sync`.
    ///
    /// # Errors
    /// See the trait.
    fn flush(&mut self) -> Result<()>;

    /// What makes flushed batches durable; usable on another thread while this one goes on.
    fn barrier(&self) -> Arc<dyn Barrier>;

    /// Bytes on disk.
    ///
    /// # Errors
    /// See the trait.
    fn size_on_disk(&mut self) -> Result<u64>;

    /// One step of rewriting the store without its garbage. An inner error gives the rewriting up and leaves the store
    /// as it was. A store that has nothing to gain refuses.
    ///
    /// # Errors
    /// See the trait.
    fn compact(&mut self, step: CompactStep) -> Result<Result<CompactState>> {
        match step {
            CompactStep::Abort => Ok(Ok(CompactState::default())),
            _ => Ok(Err(Error::refused("this metadata store cannot be compacted"))),
        }
    }
}

/// The durable half of a commit.
pub trait Barrier: Send + Sync {
    /// Makes everything durable that was flushed before this call.
    ///
    /// # Errors
    /// Some of it may be lost: the pool is poisoned, never retried.
    fn sync(&self) -> Result<()>;
}
