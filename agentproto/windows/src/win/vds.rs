//! `VDS_LUN_INFORMATION` (MS docs, vdslun.h) from and to [`LunInfo`]. What goes to VSS lies in memory of `CoTaskMemAlloc`: VSS frees it.

use windows::Win32::Storage::VirtualDiskService::{
    VDS_LUN_INFORMATION, VDS_STORAGE_DEVICE_ID_DESCRIPTOR, VDS_STORAGE_IDENTIFIER,
    VDS_STORAGE_IDENTIFIER_CODE_SET, VDS_STORAGE_IDENTIFIER_TYPE,
};
use windows::Win32::System::Com::CoTaskMemAlloc;

use crate::lun_info::{Designator, LunInfo};

/// Bytes of a text of INQUIRY or page 0x80 that are looked at.
const TEXT_MAX: usize = 256;
/// Designators that are looked at.
const DESIGNATORS_MAX: u32 = 64;
/// Bytes of a designator: its length is one byte in page 0x83.
const DESIGNATOR_MAX: u32 = 255;

/// Reads it.
///
/// # Safety
/// A valid structure as VSS hands it out: each pointer is null or points to what its count says; texts end with a zero.
pub(super) unsafe fn read(info: &VDS_LUN_INFORMATION) -> LunInfo {
    let descriptor = &info.m_deviceIdDescriptor;
    let mut designators = Vec::new();
    if !descriptor.m_rgIdentifiers.is_null() {
        for index in 0..descriptor.m_cIdentifiers.min(DESIGNATORS_MAX) {
            // SAFETY: below the count.
            let one = unsafe {
                &*descriptor
                    .m_rgIdentifiers
                    .add(usize::try_from(index).unwrap_or(0))
            };
            let len = usize::try_from(one.m_cbIdentifier.min(DESIGNATOR_MAX)).unwrap_or(0);
            let value = if one.m_rgbIdentifier.is_null() {
                Vec::new()
            } else {
                // SAFETY: that many bytes are there.
                unsafe { std::slice::from_raw_parts(one.m_rgbIdentifier, len) }.to_vec()
            };
            designators.push(Designator {
                code_set: one.m_CodeSet.0.cast_unsigned(),
                kind: one.m_Type.0.cast_unsigned(),
                value,
            });
        }
    }
    // SAFETY: texts of the structure.
    unsafe {
        LunInfo {
            vendor: text(info.m_szVendorId),
            product: text(info.m_szProductId),
            revision: text(info.m_szProductRevision),
            serial: text(info.m_szSerialNumber),
            designators,
        }
    }
}

/// # Safety
/// Null, or a text that ends with a zero.
unsafe fn text(from: *const u8) -> String {
    let mut bytes = Vec::new();
    while !from.is_null() && bytes.len() < TEXT_MAX {
        // SAFETY: no zero came before it.
        let byte = unsafe { *from.add(bytes.len()) };
        if byte == 0 {
            break;
        }
        bytes.push(byte);
    }
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// Writes one that had nothing of ours in it before. `like`: what the LUN has in common with its source.
///
/// # Safety
/// `out` is writable, and what its pointers lead to belongs to somebody else.
pub(super) unsafe fn write(
    out: *mut VDS_LUN_INFORMATION,
    like: &VDS_LUN_INFORMATION,
    info: &LunInfo,
) -> Option<()> {
    let mut identifiers = Vec::new();
    for one in &info.designators {
        identifiers.push(VDS_STORAGE_IDENTIFIER {
            m_CodeSet: VDS_STORAGE_IDENTIFIER_CODE_SET(one.code_set.cast_signed()),
            m_Type: VDS_STORAGE_IDENTIFIER_TYPE(one.kind.cast_signed()),
            m_cbIdentifier: u32::try_from(one.value.len()).ok()?,
            m_rgbIdentifier: copy(&one.value)?,
        });
    }
    let made = VDS_LUN_INFORMATION {
        m_version: like.m_version,
        m_DeviceType: like.m_DeviceType,
        m_DeviceTypeModifier: like.m_DeviceTypeModifier,
        m_bCommandQueueing: like.m_bCommandQueueing,
        m_BusType: like.m_BusType,
        m_szVendorId: copy_text(&info.vendor)?,
        m_szProductId: copy_text(&info.product)?,
        m_szProductRevision: copy_text(&info.revision)?,
        m_szSerialNumber: copy_text(&info.serial)?,
        // The copy of a disk has the signature of the disk until Windows gives it another.
        m_diskSignature: windows::core::GUID::zeroed(),
        m_deviceIdDescriptor: VDS_STORAGE_DEVICE_ID_DESCRIPTOR {
            m_version: like.m_deviceIdDescriptor.m_version,
            m_cIdentifiers: u32::try_from(identifiers.len()).ok()?,
            m_rgIdentifiers: copy(&identifiers)?,
        },
        m_cInterconnects: 0,
        m_rgInterconnects: std::ptr::null_mut(),
    };
    // SAFETY: writable (see above).
    unsafe { out.write(made) };
    Some(())
}

fn copy_text(text: &str) -> Option<*mut u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    copy(&bytes)
}

fn copy<T: Copy>(values: &[T]) -> Option<*mut T> {
    // SAFETY: no precondition; null means that there is no memory.
    let memory: *mut T = unsafe { CoTaskMemAlloc(size_of_val(values).max(1)) }.cast();
    if memory.is_null() {
        return None;
    }
    // SAFETY: fresh, of that size, aligned for everything.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), memory, values.len()) };
    Some(memory)
}
