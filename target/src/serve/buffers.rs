//! Memory for data that is read, used again as soon as it was sent.
//!
//! Each thread that serves connections keeps its own: no lock, and what was sent last is still in the processor's cache. A buffer
//! stays initialised, so that nothing is zeroed a second time. Nothing is allocated for a read when its size was read before.

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};

/// Sizes are powers of two from here on.
const SMALLEST: usize = 4096;
/// Memory that a thread keeps, what is on its way to initiators included.
const KEPT_BYTES: usize = 8 << 20;
/// Buffers of one size that are looked through for a free one.
const LOOKED_AT: usize = 64;

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

/// Buffers of one thread: handed out ones too, until they are free again.
#[derive(Debug, Default)]
struct Kept {
    /// By size; each list has those that were handed out last at its end.
    sizes: Vec<Vec<Bytes>>,
    bytes: usize,
}

impl Kept {
    /// A buffer of at least `len` bytes, of the size class that it belongs to if it is to be kept.
    fn take(&mut self, len: usize) -> (BytesMut, Option<usize>) {
        let size = len.max(1).div_ceil(SMALLEST).next_power_of_two() * SMALLEST;
        let class = (size / SMALLEST).ilog2() as usize;
        if self.sizes.len() <= class {
            self.sizes.resize_with(class + 1, Vec::new);
        }
        let Some(list) = self.sizes.get_mut(class) else {
            return (BytesMut::zeroed(len), None);
        };
        let last = list.iter().rev().take(LOOKED_AT);
        if let Some(back) = last.into_iter().position(Bytes::is_unique) {
            let buffer = list.remove(list.len() - 1 - back);
            if let Ok(buffer) = buffer.try_into_mut() {
                return (buffer, Some(class));
            }
            self.bytes -= size;
        }
        if self.bytes + size > KEPT_BYTES {
            return (BytesMut::zeroed(len), None);
        }
        self.bytes += size;
        let mut buffer = BytesMut::zeroed(size);
        // Shared from the start: becoming so later would be an allocation each time.
        drop(buffer.split_off(size));
        (buffer, Some(class))
    }
}

/// Has `fill` put `len` bytes into a buffer. What it leaves alone holds old data of any LUN: only after it has filled all may the
/// buffer go anywhere.
pub(crate) fn read_into<T>(len: usize, fill: impl FnOnce(&mut [u8]) -> T) -> (T, Bytes) {
    let (mut buffer, class) = KEPT.with_borrow_mut(|kept| kept.take(len));
    let result = fill(buffer.get_mut(..len).unwrap_or_default());
    let whole = buffer.freeze();
    let data = whole.slice(..len);
    if let Some(class) = class {
        KEPT.with_borrow_mut(|kept| {
            if let Some(list) = kept.sizes.get_mut(class) {
                list.push(whole);
            }
        });
    }
    (result, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(len: usize, byte: u8) -> Bytes {
        read_into(len, |buffer| buffer.fill(byte)).1
    }

    #[test]
    fn memory_is_used_again_once_nobody_has_it() {
        let first = read(5000, 1);
        let place = first.as_ptr();
        let second = read(6000, 2);
        assert_ne!(second.as_ptr(), place, "the first is still on its way");
        assert!(first.iter().all(|byte| *byte == 1) && first.len() == 5000);
        drop(first);
        let third = read(8192, 3);
        assert_eq!(third.as_ptr(), place);
        assert!(second.iter().all(|byte| *byte == 2) && third.iter().all(|byte| *byte == 3));
        let part = third.slice(..10);
        drop(third);
        assert_ne!(read(8192, 4).as_ptr(), place, "a part of it is still on its way");
        drop(part);
    }

    #[test]
    fn a_thread_keeps_only_so_much() {
        let all: Vec<Bytes> = (0..20).map(|_| read(1 << 20, 1)).collect();
        let kept = || KEPT.with_borrow(|kept| (kept.bytes, kept.sizes.iter().map(Vec::len).sum::<usize>()));
        assert_eq!(kept(), (KEPT_BYTES, 8));
        drop(all);
        assert_eq!(read(3, 9), [9; 3].as_slice());
        assert_eq!(read(0, 9), [].as_slice());
    }
}
