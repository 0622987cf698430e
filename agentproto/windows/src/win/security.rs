//! A directory for SYSTEM and Administrators alone.

use std::io;
use std::os::windows::ffi::OsStrExt as _;
use std::path::Path;

use windows::Win32::Foundation::{HLOCAL, LocalFree};
use windows::Win32::Security::Authorization::ConvertStringSecurityDescriptorToSecurityDescriptorW;
use windows::Win32::Security::{PSECURITY_DESCRIPTOR, SECURITY_ATTRIBUTES};
use windows::Win32::Storage::FileSystem::CreateDirectoryW;
use windows::core::PCWSTR;

/// Protected (nothing is inherited from above), full access for SYSTEM and Administrators, inherited by what is inside.
const ACCESS: &str = "D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)";

/// Makes the directory.
pub(crate) fn make_private_dir(path: &Path) -> io::Result<()> {
    let name: Vec<u16> = path.as_os_str().encode_wide().chain(std::iter::once(0)).collect();
    let access = super::wide(ACCESS);
    let mut descriptor = PSECURITY_DESCRIPTOR::default();
    // SAFETY: both texts end with a zero and live through the calls; the descriptor is freed below, once.
    unsafe {
        ConvertStringSecurityDescriptorToSecurityDescriptorW(
            PCWSTR(access.as_ptr()),
            1,
            &raw mut descriptor,
            None,
        )?;
        let attributes = SECURITY_ATTRIBUTES {
            nLength: u32::try_from(size_of::<SECURITY_ATTRIBUTES>()).unwrap_or(0),
            lpSecurityDescriptor: descriptor.0,
            bInheritHandle: false.into(),
        };
        let made = CreateDirectoryW(PCWSTR(name.as_ptr()), Some(&raw const attributes));
        LocalFree(Some(HLOCAL(descriptor.0)));
        Ok(made?)
    }
}
