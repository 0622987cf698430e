//! The hardware provider's COM class: three interfaces of VSS over [`Provider`] (MS docs: "Hardware Providers").

use std::sync::Arc;

use windows::Win32::Foundation::{CLASS_E_NOAGGREGATION, E_INVALIDARG, E_OUTOFMEMORY, E_POINTER};
use windows::Win32::Storage::VirtualDiskService::VDS_LUN_INFORMATION;
use windows::Win32::Storage::Vss::{
    IVssHardwareSnapshotProvider, IVssHardwareSnapshotProvider_Impl, IVssProviderCreateSnapshotSet,
    IVssProviderCreateSnapshotSet_Impl, IVssProviderNotifications, IVssProviderNotifications_Impl,
    VSS_E_BAD_STATE, VSS_E_OBJECT_NOT_FOUND, VSS_E_PROVIDER_VETO,
};
use windows::Win32::System::Com::{
    CLSCTX_LOCAL_SERVER, COINIT_MULTITHREADED, CoInitializeEx, CoInitializeSecurity, CoRegisterClassObject,
    CoRevokeClassObject, EOAC_NONE, IClassFactory, IClassFactory_Impl, REGCLS_MULTIPLEUSE,
    RPC_C_AUTHN_LEVEL_PKT_PRIVACY, RPC_C_IMP_LEVEL_IDENTIFY,
};
use windows::core::{BOOL, Error, GUID, HRESULT, IUnknown, Interface as _, Ref, Result, implement};

use super::{disks, vds};
use crate::lun_info::LunInfo;
use crate::provider::{Provider, ProviderError};

/// LUNs in one call: VSS allows 64 volumes.
const LUNS_MAX: usize = 1024;

impl From<ProviderError> for Error {
    fn from(error: ProviderError) -> Self {
        let code = match error {
            ProviderError::Veto(_) => VSS_E_PROVIDER_VETO,
            ProviderError::NotFound(_) => VSS_E_OBJECT_NOT_FOUND,
            ProviderError::State(_) => VSS_E_BAD_STATE,
        };
        Self::from_hresult(code)
    }
}

/// Logs and answers. Not for CommitSnapshots, which must write nothing.
fn told<T>(call: &'static str, result: std::result::Result<T, ProviderError>) -> Result<T> {
    match &result {
        Ok(_) => tracing::debug!(call, "VSS"),
        Err(error) => tracing::warn!(call, "VSS is refused: {error}"),
    }
    Ok(result?)
}

#[implement(
    IVssHardwareSnapshotProvider,
    IVssProviderCreateSnapshotSet,
    IVssProviderNotifications
)]
struct Object(Arc<Provider>);

/// # Safety
/// `luns` points to `count` structures of VSS.
unsafe fn read_all(luns: *const VDS_LUN_INFORMATION, count: i32) -> Result<Vec<LunInfo>> {
    let count = usize::try_from(count)
        .ok()
        .filter(|count| *count <= LUNS_MAX)
        .ok_or(E_INVALIDARG)?;
    if luns.is_null() {
        return Err(E_POINTER.into());
    }
    // SAFETY: below the count.
    Ok((0..count)
        .map(|index| unsafe { vds::read(&*luns.add(index)) })
        .collect())
}

/// The names of devices in a call.
///
/// # Safety
/// `names` is null or points to `count` texts.
unsafe fn device(names: *const *const u16, index: usize) -> String {
    if names.is_null() {
        return String::new();
    }
    // SAFETY: below the count; a text of VSS.
    unsafe { super::text_of(*names.add(index), 512) }
}

/// What VSS knows of a LUN, completed from the device when there is no designator in it yet.
fn completed(info: LunInfo, device: &str) -> LunInfo {
    if info.lun().is_some() || device.is_empty() {
        return info;
    }
    disks::lun_info(device).unwrap_or(info)
}

impl IVssHardwareSnapshotProvider_Impl for Object_Impl {
    fn AreLunsSupported(
        &self,
        count: i32,
        _context: i32,
        devices: *const *const u16,
        luns: *mut VDS_LUN_INFORMATION,
        supported: *mut BOOL,
    ) -> Result<()> {
        if supported.is_null() {
            return Err(E_POINTER.into());
        }
        // SAFETY: VSS's arrays, of `count` entries each.
        let infos = unsafe { read_all(luns, count)? };
        let mut all = Vec::new();
        for (index, info) in infos.into_iter().enumerate() {
            // SAFETY: below the count; VSS lets the provider complete its structures.
            unsafe {
                let full = completed(info.clone(), &device(devices, index));
                if full != info {
                    let at = luns.add(index);
                    let before = *at;
                    vds::write(at, &before, &full).ok_or(E_OUTOFMEMORY)?;
                }
                all.push(full);
            }
        }
        let answer = self.0.supports(&all);
        // SAFETY: checked above.
        unsafe { *supported = answer.into() };
        tracing::debug!(count, answer, "AreLunsSupported");
        Ok(())
    }

    fn FillInLunInfo(
        &self,
        name: *const u16,
        lun: *mut VDS_LUN_INFORMATION,
        supported: *mut BOOL,
    ) -> Result<()> {
        self.AreLunsSupported(1, 0, &raw const name, lun, supported)
    }

    fn BeginPrepareSnapshot(
        &self,
        set: &GUID,
        snapshot: &GUID,
        _context: i32,
        count: i32,
        devices: *const *const u16,
        luns: *mut VDS_LUN_INFORMATION,
    ) -> Result<()> {
        // SAFETY: VSS's arrays, of `count` entries each.
        let infos = unsafe { read_all(luns, count)? };
        // SAFETY: as above.
        let infos: Vec<LunInfo> = infos
            .into_iter()
            .enumerate()
            .map(|(index, info)| completed(info, &unsafe { device(devices, index) }))
            .collect();
        told(
            "BeginPrepareSnapshot",
            self.0.begin_prepare(set.to_u128(), snapshot.to_u128(), &infos),
        )
    }

    fn GetTargetLuns(
        &self,
        count: i32,
        _devices: *const *const u16,
        sources: *const VDS_LUN_INFORMATION,
        destinations: *mut VDS_LUN_INFORMATION,
    ) -> Result<()> {
        if destinations.is_null() {
            return Err(E_POINTER.into());
        }
        // SAFETY: VSS's array of `count` entries.
        let infos = unsafe { read_all(sources, count)? };
        let found = told("GetTargetLuns", self.0.target_luns(&infos))?;
        for (index, info) in found.iter().enumerate() {
            // SAFETY: both arrays have `count` entries; the destinations are empty.
            unsafe { vds::write(destinations.add(index), &*sources.add(index), info).ok_or(E_OUTOFMEMORY)? };
        }
        Ok(())
    }

    fn LocateLuns(&self, count: i32, luns: *const VDS_LUN_INFORMATION) -> Result<()> {
        // SAFETY: VSS's array of `count` entries.
        let infos = unsafe { read_all(luns, count)? };
        told("LocateLuns", self.0.locate(&infos))
    }

    fn OnLunEmpty(&self, _device: *const u16, lun: *const VDS_LUN_INFORMATION) -> Result<()> {
        // SAFETY: one structure of VSS.
        let infos = unsafe { read_all(lun, 1)? };
        let info = infos.first().ok_or(E_INVALIDARG)?;
        told("OnLunEmpty", self.0.lun_empty(info))
    }
}

impl IVssProviderCreateSnapshotSet_Impl for Object_Impl {
    fn EndPrepareSnapshots(&self, set: &GUID) -> Result<()> {
        told("EndPrepareSnapshots", self.0.end_prepare(set.to_u128()))
    }

    fn PreCommitSnapshots(&self, set: &GUID) -> Result<()> {
        told("PreCommitSnapshots", self.0.pre_commit(set.to_u128()))
    }

    fn CommitSnapshots(&self, set: &GUID) -> Result<()> {
        Ok(self.0.commit(set.to_u128())?)
    }

    fn PostCommitSnapshots(&self, set: &GUID, _count: i32) -> Result<()> {
        told("PostCommitSnapshots", self.0.post_commit(set.to_u128()))
    }

    fn PreFinalCommitSnapshots(&self, set: &GUID) -> Result<()> {
        told("PreFinalCommitSnapshots", self.0.final_commit(set.to_u128()))
    }

    fn PostFinalCommitSnapshots(&self, set: &GUID) -> Result<()> {
        told("PostFinalCommitSnapshots", self.0.final_commit(set.to_u128()))
    }

    fn AbortSnapshots(&self, set: &GUID) -> Result<()> {
        told("AbortSnapshots", self.0.abort(set.to_u128()))
    }
}

impl IVssProviderNotifications_Impl for Object_Impl {
    fn OnLoad(&self, _callback: Ref<'_, IUnknown>) -> Result<()> {
        tracing::debug!("VSS loads the provider");
        Ok(())
    }

    fn OnUnload(&self, _force: BOOL) -> Result<()> {
        tracing::debug!("VSS unloads the provider");
        Ok(())
    }
}

/// Makes the objects.
#[implement(IClassFactory)]
pub(crate) struct Factory(pub(crate) Arc<Provider>);

impl IClassFactory_Impl for Factory_Impl {
    fn CreateInstance(
        &self,
        outer: Ref<'_, IUnknown>,
        id: *const GUID,
        object: *mut *mut core::ffi::c_void,
    ) -> Result<()> {
        if id.is_null() || object.is_null() {
            return Err(E_POINTER.into());
        }
        if !outer.is_null() {
            return Err(CLASS_E_NOAGGREGATION.into());
        }
        let made: IUnknown = Object(Arc::clone(&self.0)).into();
        // SAFETY: both pointers were checked; `query` writes what they ask for.
        unsafe { made.query(id, object) }.ok()
    }

    fn LockServer(&self, _lock: BOOL) -> Result<()> {
        // A service: it does not end because nobody uses it.
        Ok(())
    }
}

/// The class is there for as long as this is.
pub(crate) struct Served(u32);

impl Drop for Served {
    fn drop(&mut self) {
        // SAFETY: registered by `serve`, revoked once.
        unsafe { CoRevokeClassObject(self.0) }.ok();
    }
}

/// This thread takes part in COM.
pub(crate) fn join() -> Result<()> {
    // SAFETY: never undone: the threads that call it live as long as they use COM.
    unsafe { CoInitializeEx(None, COINIT_MULTITHREADED) }.ok()
}

/// Once per process: VSS asks a requester to let the writers call it (MS docs: "Security Considerations for Requesters").
pub(crate) fn secure() -> Result<()> {
    // SAFETY: constants, and null for "as usual".
    unsafe {
        CoInitializeSecurity(
            None,
            -1,
            None,
            None,
            RPC_C_AUTHN_LEVEL_PKT_PRIVACY,
            RPC_C_IMP_LEVEL_IDENTIFY,
            None,
            EOAC_NONE,
            None,
        )
    }
}

/// Offers the class to VSS.
pub(crate) fn serve(provider: Arc<Provider>) -> Result<Served> {
    let factory: IClassFactory = Factory(provider).into();
    let class = GUID::from_u128(super::register::CLASS);
    // SAFETY: the factory lives as long as it is registered; COM counts it.
    let cookie = unsafe {
        CoRegisterClassObject(
            &raw const class,
            &factory,
            CLSCTX_LOCAL_SERVER,
            REGCLS_MULTIPLEUSE,
        )?
    };
    Ok(Served(cookie))
}

/// What a DLL's `DllGetClassObject` answers (the tests' fake coordinator loads one).
///
/// # Safety
/// `id` and `object` are what COM hands in.
pub(crate) unsafe fn class_object(
    provider: Arc<Provider>,
    id: *const GUID,
    object: *mut *mut core::ffi::c_void,
) -> HRESULT {
    let factory: IClassFactory = Factory(provider).into();
    // SAFETY: see above.
    unsafe { factory.query(id, object) }
}
