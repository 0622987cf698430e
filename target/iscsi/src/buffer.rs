//! The memory of write data: one buffer per task, filled straight from the socket, handed to the owner as [`Bytes`], and
//! used again when the owner drops it.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// A buffer grows by at most so many bytes ahead of the data that really came.
const GROW_STEP: usize = 256 << 10;
/// Below this, a fresh allocation is as good as a used one.
const POOLED_MIN: usize = 32 << 10;
/// The most memory that a pool keeps for later.
const POOL_BYTES: usize = 8 << 20;

/// Used buffers of one connection. Their bytes stay initialised, so that filling them again needs no zeroing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pool(Arc<Mutex<Idle>>);

#[derive(Debug, Default)]
struct Idle {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

impl Pool {
    /// A buffer for `capacity` bytes.
    fn take(&self, capacity: usize) -> Vec<u8> {
        if capacity >= POOLED_MIN {
            let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = idle
                .buffers
                .iter()
                .position(|buffer| buffer.capacity() >= capacity)
            {
                let buffer = idle.buffers.swap_remove(at);
                idle.bytes -= buffer.capacity();
                return buffer;
            }
        }
        Vec::with_capacity(capacity)
    }

    /// Gives the memory back to the system.
    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Idle::default();
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.bytes + buffer.capacity() <= POOL_BYTES {
            idle.bytes += buffer.capacity();
            idle.buffers.push(buffer);
        }
    }
}

/// Data on its way in. Grows as it arrives, never by what a header announces.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    filled: usize,
    capacity: usize,
    pool: Option<Pool>,
}

impl Buffer {
    /// `capacity` is what the first allocation will hold, made when the first byte is about to come.
    pub(crate) fn new(capacity: usize, pool: &Pool) -> Self {
        Self {
            bytes: Vec::new(),
            filled: 0,
            capacity,
            pool: Some(pool.clone()),
        }
    }

    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    pub(crate) fn data(&self) -> &[u8] {
        self.bytes.get(..self.filled).unwrap_or_default()
    }

    /// Room for the next bytes, at most `wanted`, never empty unless `wanted` is 0.
    pub(crate) fn space(&mut self, wanted: usize) -> &mut [u8] {
        if self.bytes.capacity() == 0
            && let Some(pool) = &self.pool
        {
            self.bytes = pool.take(self.capacity.max(wanted.min(GROW_STEP)));
        }
        let end = self.filled + wanted.min(GROW_STEP);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes.get_mut(self.filled..end).unwrap_or_default()
    }

    /// `n` bytes were put into the space.
    pub(crate) fn advance(&mut self, n: usize) {
        self.filled += n;
        assert!(
            self.filled <= self.bytes.len(),
            "more bytes than there was space for"
        );
    }

    /// The newest `n` bytes.
    pub(crate) fn newest(&self, n: usize) -> &[u8] {
        self.bytes
            .get(self.filled.saturating_sub(n)..self.filled)
            .unwrap_or_default()
    }

    /// Copies from elsewhere.
    pub(crate) fn extend(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let space = self.space(data.len());
            let (now, later) = data.split_at(space.len().min(data.len()));
            space.copy_from_slice(now);
            data = later;
            self.advance(now.len());
        }
    }

    /// The data, to be read only. Its memory comes back to the pool when the last clone is dropped.
    pub(crate) fn freeze(mut self) -> Bytes {
        match self.pool.take() {
            Some(pool) if self.bytes.capacity() >= POOLED_MIN => Bytes::from_owner(Frozen {
                bytes: self.bytes,
                filled: self.filled,
                pool,
            }),
            _ => {
                self.bytes.truncate(self.filled);
                Bytes::from(self.bytes)
            }
        }
    }
}

struct Frozen {
    bytes: Vec<u8>,
    filled: usize,
    pool: Pool,
}

impl AsRef<[u8]> for Frozen {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(..self.filled).unwrap_or_default()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.pool.give_back(core::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_with_the_data_and_not_before() {
        let pool = Pool::default();
        let mut buffer = Buffer::new(1 << 20, &pool);
        assert_eq!(buffer.bytes.capacity(), 0);
        assert_eq!(buffer.space(1 << 20).len(), GROW_STEP);
        buffer.advance(5);
        assert_eq!(buffer.space(10).len(), 10);
        assert_eq!(buffer.freeze().len(), 5);
    }

    #[test]
    fn memory_comes_back() {
        let pool = Pool::default();
        let mut buffer = Buffer::new(POOLED_MIN, &pool);
        buffer.extend(&vec![7; POOLED_MIN]);
        let frozen = buffer.freeze();
        let copy = frozen.clone();
        drop(frozen);
        assert_eq!(pool.0.lock().unwrap().buffers.len(), 0);
        drop(copy);
        assert_eq!(pool.0.lock().unwrap().bytes, POOLED_MIN);
        // Old bytes are not part of new data.
        let mut again = Buffer::new(POOLED_MIN, &pool);
        again.extend(b"abc");
        assert_eq!(pool.0.lock().unwrap().buffers.len(), 0);
        assert_eq!(again.freeze(), Bytes::from_static(b"abc"));
    }

    #[test]
    fn the_pool_keeps_only_so_much() {
        let pool = Pool::default();
        for _ in 0..3 {
            let mut buffers = Vec::new();
            for _ in 0..20 {
                let mut buffer = Buffer::new(1 << 20, &pool);
                buffer.extend(b"x");
                buffers.push(buffer.freeze());
            }
        }
        assert!(pool.0.lock().unwrap().bytes <= POOL_BYTES);
    }
}
