//! The one module with `unsafe`: the two file-system ioctls that have no safe wrapper.
#![expect(
    unsafe_code,
    reason = "FIFREEZE and FITHAW exist only as ioctls; this is the one module that may call them"
)]

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{IntegerSetter, Opcode, ioctl, opcode};

/// `FIFREEZE`, `_IOWR('X', 119, int)` (linux/fs.h).
const FIFREEZE: Opcode = opcode::read_write::<std::ffi::c_int>(b'X', 119);
/// `FITHAW`, `_IOWR('X', 120, int)` (linux/fs.h).
const FITHAW: Opcode = opcode::read_write::<std::ffi::c_int>(b'X', 120);

/// Freezes the file system that `dir` lies on: dirty data is written, then every writer sleeps until the thaw.
///
/// The file system STAYS frozen when the calling process ends: the kernel has no timeout for it.
///
/// # Errors
/// `EBUSY`: already frozen (by somebody else). `EOPNOTSUPP`: the file system cannot be frozen. `EPERM`: no CAP_SYS_ADMIN.
pub(crate) fn freeze(dir: impl AsFd) -> io::Result<()> {
    // SAFETY: FIFREEZE ignores its third argument (fs/ioctl.c, ioctl_fsfreeze takes only the file), so no memory of
    // ours is read or written through the zero that is passed; `dir` is a live descriptor for the whole call.
    unsafe { ioctl(dir, IntegerSetter::<FIFREEZE>::new_usize(0)) }.map_err(Into::into)
}

/// Thaws the file system that `dir` lies on.
///
/// # Errors
/// `EINVAL`: it is not frozen (somebody thawed it, or it never was). `EPERM`: no CAP_SYS_ADMIN.
pub(crate) fn thaw(dir: impl AsFd) -> io::Result<()> {
    // SAFETY: as for FIFREEZE: FITHAW (ioctl_fsthaw) takes only the file and ignores the argument.
    unsafe { ioctl(dir, IntegerSetter::<FITHAW>::new_usize(0)) }.map_err(Into::into)
}

/// Was this the kernel's answer to a thaw of something that is not frozen?
pub(crate) fn was_not_frozen(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error())
}

/// Was this the kernel's answer to a freeze of something that somebody froze before?
pub(crate) fn is_frozen_already(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error())
}

#[cfg(test)]
mod tests {
    #[test]
    fn opcodes_are_the_kernels() {
        // linux/fs.h as compiled on x86-64 and aarch64.
        assert_eq!(super::FIFREEZE, 0xC004_5877);
        assert_eq!(super::FITHAW, 0xC004_5878);
    }
}
