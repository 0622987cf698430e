//! Our provider's registration with VSS (`IVssAdmin`, MS docs).

use windows::Win32::Storage::Vss::{
    IVssAdmin, VSS_E_PROVIDER_ALREADY_REGISTERED, VSS_E_PROVIDER_NOT_REGISTERED, VSS_PROV_HARDWARE,
    VSSCoordinator,
};
use windows::Win32::System::Com::{CLSCTX_ALL, CoCreateInstance};
use windows::core::{GUID, Result};

/// The provider, as VSS lists it.
pub(crate) const PROVIDER: u128 = 0x9c7a_10f4_2f4b_4c8e_b1a0_5f0e_53a6_7d11;
/// Its COM class.
pub(crate) const CLASS: u128 = 0x1d6e_4b52_8f0a_4a3b_9a55_c1f0_7c2e_84d3;
/// This version of it: another one makes VSS look again at what it can do.
const VERSION: u128 = 0x5b0f_8a4e_61d2_4b7d_8e35_0d9c_2a71_f602;
const NAME: &str = "Stillpoint Hardware Provider";

fn admin() -> Result<IVssAdmin> {
    super::com::join()?;
    // SAFETY: a class of Windows; the interface is asked for by its id.
    unsafe { CoCreateInstance(&VSSCoordinator, None, CLSCTX_ALL) }
}

/// Registers it. Good when it is registered already.
pub(crate) fn register() -> Result<()> {
    let (name, version) = (super::wide(NAME), super::wide(env!("CARGO_PKG_VERSION")));
    // SAFETY: texts end with a zero and live through the call.
    let registered = unsafe {
        admin()?.RegisterProvider(
            GUID::from_u128(PROVIDER),
            GUID::from_u128(CLASS),
            name.as_ptr(),
            VSS_PROV_HARDWARE,
            version.as_ptr(),
            GUID::from_u128(VERSION),
        )
    };
    match registered {
        Err(error) if error.code() == VSS_E_PROVIDER_ALREADY_REGISTERED => Ok(()),
        other => other,
    }
}

/// Removes it. Good when it is gone already.
pub(crate) fn unregister() -> Result<()> {
    // SAFETY: no pointer.
    match unsafe { admin()?.UnregisterProvider(GUID::from_u128(PROVIDER)) } {
        Err(error) if error.code() == VSS_E_PROVIDER_NOT_REGISTERED => Ok(()),
        other => other,
    }
}
