//! The hardware provider in a DLL, for the tests' fake coordinator (tests/windows/coordinator.c): Wine has no proxies for VSS's interfaces,
//! so nothing can be called in another process there. A real one is hosted by the service.

/// What COM asks of a DLL. `STILLPOINT_AGENT_CONFIG` names the agent's configuration file.
///
/// # Safety
/// The pointers are what COM hands in.
#[cfg(windows)]
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "COM's name")]
pub unsafe extern "system" fn DllGetClassObject(
    class: *const core::ffi::c_void,
    id: *const core::ffi::c_void,
    object: *mut *mut core::ffi::c_void,
) -> i32 {
    // SAFETY: handed on as it came.
    unsafe { stillpoint_agent_windows::testing::get_class_object(class, id, object) }
}
