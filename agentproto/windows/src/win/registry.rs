//! Reading the registry.

use windows::Win32::System::Registry::{
    HKEY, HKEY_LOCAL_MACHINE, KEY_READ, REG_ROUTINE_FLAGS, RRF_RT_REG_SZ, RegCloseKey, RegGetValueW,
    RegOpenKeyExW,
};
use windows::core::PCWSTR;

/// Units of a value that are looked at.
const TEXT_MAX: usize = 512;

/// A text of HKEY_LOCAL_MACHINE.
pub(super) fn text(key: &str, value: &str) -> Option<String> {
    let (key, value) = (super::wide(key), super::wide(value));
    let mut text = [0u16; TEXT_MAX];
    let mut len = u32::try_from(size_of_val(&text)).ok()?;
    let flags: REG_ROUTINE_FLAGS = RRF_RT_REG_SZ;
    // SAFETY: the names end with a zero, and `len` is the buffer's size in bytes.
    let read = unsafe {
        RegGetValueW(
            HKEY_LOCAL_MACHINE,
            PCWSTR(key.as_ptr()),
            PCWSTR(value.as_ptr()),
            flags,
            None,
            Some(text.as_mut_ptr().cast()),
            Some(&raw mut len),
        )
    };
    read.is_ok().then(|| {
        let end = text.iter().position(|unit| *unit == 0).unwrap_or(TEXT_MAX);
        String::from_utf16_lossy(text.get(..end).unwrap_or_default())
    })
}

/// Whether HKEY_LOCAL_MACHINE has that key.
pub(super) fn has_key(key: &str) -> bool {
    let key = super::wide(key);
    let mut handle = HKEY::default();
    // SAFETY: the name ends with a zero; the handle is closed when there is one.
    unsafe {
        let opened = RegOpenKeyExW(
            HKEY_LOCAL_MACHINE,
            PCWSTR(key.as_ptr()),
            None,
            KEY_READ,
            &raw mut handle,
        )
        .is_ok();
        if opened && RegCloseKey(handle).is_err() {
            tracing::debug!("a key of the registry stays open");
        }
        opened
    }
}
