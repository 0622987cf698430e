//! The daemon, built for the stories: cargo gives `CARGO_BIN_EXE_…` only to the package that has the binary.
//!
//! Where the working directory holds a file `allocations`, its first eight bytes count what the process asks the allocator for
//! (story `cost`): shared memory, so that the story reads the number without disturbing the daemon.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::OpenOptions;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};

use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Length of the file.
const PAGE_BYTES: usize = 4096;

/// The system's allocator, counted.
struct Counting;

/// Where the count is, once there is a place for it.
static COUNT: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    // SAFETY: null, or the start of a mapping that is never taken down.
    if let Some(count) = unsafe { COUNT.load(Relaxed).as_ref() } {
        count.fetch_add(1, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}

fn begin_counting() -> io::Result<()> {
    let file = match OpenOptions::new().read(true).write(true).open("allocations") {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    file.set_len(PAGE_BYTES as u64)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, of a file that is long enough; nobody else has a reference into it.
    let page = unsafe { mmap(ptr::null_mut(), PAGE_BYTES, access, MapFlags::SHARED, &file, 0)? };
    COUNT.store(page.cast(), Relaxed);
    Ok(())
}

fn main() -> std::process::ExitCode {
    if let Err(error) = begin_counting() {
        eprintln!("allocations cannot be counted: {error}");
        return std::process::ExitCode::FAILURE;
    }
    stillpoint::main()
}
