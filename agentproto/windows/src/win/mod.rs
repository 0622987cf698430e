//! What only Windows can do: COM, VSS, disks, services. Everything here is thin; what is decided is decided outside.

pub(crate) mod com;
mod disks;
mod host;
pub(crate) mod in_dll;
pub(crate) mod register;
mod registry;
mod requester;
pub(crate) mod security;
pub(crate) mod service;
mod vds;

pub(crate) use host::Windows;

/// A text as Windows wants it.
fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().chain(std::iter::once(0)).collect()
}

/// A text of at most `max` units that ends with a zero.
///
/// # Safety
/// `text` is null or points to that many readable units, or to fewer with a zero among them.
unsafe fn text_of(text: *const u16, max: usize) -> String {
    let mut units = Vec::new();
    if text.is_null() {
        return String::new();
    }
    for index in 0..max {
        // SAFETY: no zero came before it, so it belongs to the text (see above).
        let unit = unsafe { *text.add(index) };
        if unit == 0 {
            break;
        }
        units.push(unit);
    }
    String::from_utf16_lossy(&units)
}
