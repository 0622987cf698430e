//! `IVssBackupComponents` (MS docs, vsbackup.h), which crate `windows` does not have: the calls that a backup needs, each at its
//! place in the table. The tests' stand-in is compiled from MinGW's own vsbackup.h, so that a wrong place is found.

use std::ffi::c_void;
use std::time::Duration;

use stillpoint_agentproto::{ErrorCode, Refusal};
use windows::Win32::Foundation::E_FAIL;
use windows::Win32::Storage::Vss::{
    IVssAsync, IVssWMFiledesc, VSS_BT_COPY, VSS_CTX_APP_ROLLBACK, VSS_S_ASYNC_CANCELLED,
    VSS_S_ASYNC_FINISHED, VSS_VOLSNAP_ATTR_NO_AUTORECOVERY, VSS_VOLSNAP_ATTR_TRANSPORTABLE,
    VSS_VOLSNAP_ATTR_TXF_RECOVERY,
};
use windows::Win32::System::LibraryLoader::{
    GetProcAddress, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS, LoadLibraryExW,
};
use windows::core::{BSTR, GUID, HRESULT, Interface as _, PCSTR, PCWSTR};

use crate::backup::{CONTEXT, Vss, VssError};
use crate::writers::{Component, Writer, WriterStatus};

/// How often a call that VSS carries out apart is asked for: VSS wants to be asked (MS docs, IVssAsync).
const POLL: Duration = Duration::from_millis(20);
/// Writers of a host, and components of a writer, that are looked at.
const COUNT_MAX: u32 = 4096;

const _: () = assert!(
    CONTEXT
        == VSS_CTX_APP_ROLLBACK.0
            | VSS_VOLSNAP_ATTR_TRANSPORTABLE.0
            | VSS_VOLSNAP_ATTR_NO_AUTORECOVERY.0
            | VSS_VOLSNAP_ATTR_TXF_RECOVERY.0
);

/// A call that is not made here: only its place counts.
type Unused = *const c_void;
type Raw = *mut c_void;
type Async = *mut *mut c_void;

#[repr(C)]
struct BackupTable {
    query_interface: Unused,
    add_ref: Unused,
    release: unsafe extern "system" fn(Raw) -> u32,
    get_writer_components_count: Unused,
    get_writer_components: Unused,
    initialize_for_backup: unsafe extern "system" fn(Raw, *const u16) -> HRESULT,
    set_backup_state: unsafe extern "system" fn(Raw, bool, bool, i32, bool) -> HRESULT,
    initialize_for_restore: Unused,
    set_restore_state: Unused,
    gather_writer_metadata: unsafe extern "system" fn(Raw, Async) -> HRESULT,
    get_writer_metadata_count: unsafe extern "system" fn(Raw, *mut u32) -> HRESULT,
    get_writer_metadata: unsafe extern "system" fn(Raw, u32, *mut GUID, *mut *mut MetadataObject) -> HRESULT,
    free_writer_metadata: unsafe extern "system" fn(Raw) -> HRESULT,
    add_component: unsafe extern "system" fn(Raw, GUID, GUID, i32, *const u16, *const u16) -> HRESULT,
    prepare_for_backup: unsafe extern "system" fn(Raw, Async) -> HRESULT,
    abort_backup: unsafe extern "system" fn(Raw) -> HRESULT,
    gather_writer_status: unsafe extern "system" fn(Raw, Async) -> HRESULT,
    get_writer_status_count: unsafe extern "system" fn(Raw, *mut u32) -> HRESULT,
    free_writer_status: unsafe extern "system" fn(Raw) -> HRESULT,
    get_writer_status: unsafe extern "system" fn(
        Raw,
        u32,
        *mut GUID,
        *mut GUID,
        *mut *const u16,
        *mut i32,
        *mut HRESULT,
    ) -> HRESULT,
    set_backup_succeeded:
        unsafe extern "system" fn(Raw, GUID, GUID, i32, *const u16, *const u16, bool) -> HRESULT,
    set_backup_options: Unused,
    set_selected_for_restore: Unused,
    set_restore_options: Unused,
    set_additional_restores: Unused,
    set_previous_backup_stamp: Unused,
    save_as_xml: unsafe extern "system" fn(Raw, *mut *const u16) -> HRESULT,
    backup_complete: unsafe extern "system" fn(Raw, Async) -> HRESULT,
    add_alternative_location_mapping: Unused,
    add_restore_subcomponent: Unused,
    set_file_restore_status: Unused,
    add_new_target: Unused,
    set_ranges_file_path: Unused,
    pre_restore: Unused,
    post_restore: Unused,
    set_context: unsafe extern "system" fn(Raw, i32) -> HRESULT,
    start_snapshot_set: unsafe extern "system" fn(Raw, *mut GUID) -> HRESULT,
    add_to_snapshot_set: unsafe extern "system" fn(Raw, *const u16, GUID, *mut GUID) -> HRESULT,
    do_snapshot_set: unsafe extern "system" fn(Raw, Async) -> HRESULT,
}

#[repr(C)]
struct BackupObject(*const BackupTable);

#[repr(C)]
struct MetadataTable {
    query_interface: Unused,
    add_ref: Unused,
    release: unsafe extern "system" fn(Raw) -> u32,
    get_identity:
        unsafe extern "system" fn(Raw, *mut GUID, *mut GUID, *mut *const u16, *mut i32, *mut i32) -> HRESULT,
    get_file_counts: unsafe extern "system" fn(Raw, *mut u32, *mut u32, *mut u32) -> HRESULT,
    get_include_file: Unused,
    get_exclude_file: Unused,
    get_component: unsafe extern "system" fn(Raw, u32, *mut *mut ComponentObject) -> HRESULT,
}

#[repr(C)]
struct MetadataObject(*const MetadataTable);

#[repr(C)]
struct ComponentTable {
    query_interface: Unused,
    add_ref: Unused,
    release: unsafe extern "system" fn(Raw) -> u32,
    get_component_info: unsafe extern "system" fn(Raw, *mut *mut ComponentInfo) -> HRESULT,
    free_component_info: unsafe extern "system" fn(Raw, *mut ComponentInfo) -> HRESULT,
    get_file: unsafe extern "system" fn(Raw, u32, *mut Raw) -> HRESULT,
    get_database_file: unsafe extern "system" fn(Raw, u32, *mut Raw) -> HRESULT,
    get_database_log_file: unsafe extern "system" fn(Raw, u32, *mut Raw) -> HRESULT,
}

#[repr(C)]
struct ComponentObject(*const ComponentTable);

/// `VSS_COMPONENTINFO`.
#[repr(C)]
struct ComponentInfo {
    kind: i32,
    logical_path: *const u16,
    name: *const u16,
    caption: *const u16,
    icon: *const u8,
    icon_bytes: u32,
    restore_metadata: bool,
    notify_on_backup_complete: bool,
    selectable: bool,
    selectable_for_restore: bool,
    flags: u32,
    files: u32,
    databases: u32,
    log_files: u32,
    dependencies: u32,
}

/// A backup of this thread.
pub(super) struct Requester {
    object: *mut BackupObject,
}

macro_rules! call {
    ($self:ident, $method:ident $(, $argument:expr)*) => {{
        // SAFETY: the object lives until `drop`; arguments are what this method of IVssBackupComponents takes, texts end with a
        // zero, and what it writes to lives through the call.
        let code = unsafe { ((*(*$self.object).0).$method)($self.object.cast() $(, $argument)*) };
        check(stringify!($method), code)
    }};
}

fn check(call: &'static str, code: HRESULT) -> Result<(), VssError> {
    if code.is_ok() {
        return Ok(());
    }
    Err(VssError { call, code: code.0 })
}

impl Requester {
    /// `CreateVssBackupComponents`: exported under the name that the header's inline function calls.
    pub(super) fn new() -> Result<Self, Refusal> {
        type Create = unsafe extern "system" fn(*mut *mut BackupObject) -> HRESULT;
        let failed = |why: String| Refusal::new(ErrorCode::NoQuiesce, format!("VSS cannot be used: {why}"));
        super::com::join().map_err(|error| failed(error.to_string()))?;
        let library = super::wide("vssapi.dll");
        let mut object = std::ptr::null_mut();
        // SAFETY: the library stays loaded; the function has this signature (vsbackup.h).
        let code = unsafe {
            let library = LoadLibraryExW(PCWSTR(library.as_ptr()), None, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS);
            let library = library.map_err(|error| failed(format!("vssapi.dll: {error}")))?;
            let function = GetProcAddress(
                library,
                PCSTR(c"CreateVssBackupComponentsInternal".as_ptr().cast()),
            );
            let function = function
                .ok_or_else(|| failed("vssapi.dll has no CreateVssBackupComponentsInternal".to_owned()))?;
            let create = std::mem::transmute::<unsafe extern "system" fn() -> isize, Create>(function);
            create(&raw mut object)
        };
        check("CreateVssBackupComponents", code).map_err(|error| failed(error.to_string()))?;
        if object.is_null() {
            return Err(failed("CreateVssBackupComponents gave nothing".to_owned()));
        }
        Ok(Self { object })
    }

    /// Waits for what VSS does apart.
    fn wait(call: &'static str, raw: Raw, given_up: &dyn Fn() -> bool) -> Result<(), VssError> {
        if raw.is_null() {
            return Err(VssError { call, code: E_FAIL.0 });
        }
        // SAFETY: VSS gave this reference to us.
        let running = unsafe { IVssAsync::from_raw(raw) };
        let mut cancelled = false;
        loop {
            let mut state = HRESULT(0);
            // SAFETY: `state` lives through the call; the second argument may be null.
            let asked = unsafe { running.QueryStatus(&raw mut state, std::ptr::null_mut()) };
            asked.map_err(|error| VssError {
                call,
                code: error.code().0,
            })?;
            match state {
                VSS_S_ASYNC_FINISHED => return Ok(()),
                VSS_S_ASYNC_CANCELLED => return Err(VssError { call, code: state.0 }),
                failed if failed.is_err() => return Err(VssError { call, code: failed.0 }),
                _ => {}
            }
            if !cancelled && given_up() {
                cancelled = true;
                // SAFETY: no argument. What it leads to is seen in the state.
                unsafe { running.Cancel() }.ok();
            }
            std::thread::sleep(POLL);
        }
    }

    fn writer(&self, index: u32) -> Result<Writer, VssError> {
        let mut instance = GUID::zeroed();
        let mut metadata = std::ptr::null_mut();
        call!(
            self,
            get_writer_metadata,
            index,
            &raw mut instance,
            &raw mut metadata
        )?;
        let metadata = Owned::new("GetWriterMetadata", metadata)?;
        let (mut class, mut usage, mut source) = (GUID::zeroed(), 0, 0);
        let mut name = std::ptr::null();
        // SAFETY: IVssExamineWriterMetadata::GetIdentity; everything written to lives through the call.
        let code = unsafe {
            ((*(*metadata.0).0).get_identity)(
                metadata.0.cast(),
                &raw mut instance,
                &raw mut class,
                &raw mut name,
                &raw mut usage,
                &raw mut source,
            )
        };
        check("GetIdentity", code)?;
        let (mut include, mut exclude, mut count) = (0, 0, 0);
        // SAFETY: as above.
        let code = unsafe {
            ((*(*metadata.0).0).get_file_counts)(
                metadata.0.cast(),
                &raw mut include,
                &raw mut exclude,
                &raw mut count,
            )
        };
        check("GetFileCounts", code)?;
        let components = (0..count.min(COUNT_MAX)).map(|index| component(metadata.0, index));
        Ok(Writer {
            instance: instance.to_u128(),
            class: class.to_u128(),
            name: owned_text(name),
            components: components.collect::<Result<_, _>>()?,
        })
    }

    fn status(&self, index: u32) -> Result<WriterStatus, VssError> {
        let (mut instance, mut class) = (GUID::zeroed(), GUID::zeroed());
        let (mut name, mut state, mut failure) = (std::ptr::null(), 0, HRESULT(0));
        call!(
            self,
            get_writer_status,
            index,
            &raw mut instance,
            &raw mut class,
            &raw mut name,
            &raw mut state,
            &raw mut failure
        )?;
        Ok(WriterStatus {
            instance: instance.to_u128(),
            class: class.to_u128(),
            name: owned_text(name),
            state,
            failure: failure.0,
        })
    }
}

/// A reference that is given back.
struct Owned<T>(*mut T);

impl<T> Owned<T> {
    fn new(call: &'static str, object: *mut T) -> Result<Self, VssError> {
        if object.is_null() {
            return Err(VssError { call, code: E_FAIL.0 });
        }
        Ok(Self(object))
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: a COM object of ours: IUnknown::Release is the third entry of every table.
        unsafe {
            let table = *self.0.cast::<*const [Unused; 3]>();
            let release = std::mem::transmute::<Unused, unsafe extern "system" fn(Raw) -> u32>((*table)[2]);
            release(self.0.cast());
        }
    }
}

fn component(metadata: *mut MetadataObject, index: u32) -> Result<Component, VssError> {
    let mut object = std::ptr::null_mut();
    // SAFETY: IVssExamineWriterMetadata::GetComponent.
    let code = unsafe { ((*(*metadata).0).get_component)(metadata.cast(), index, &raw mut object) };
    check("GetComponent", code)?;
    let object = Owned::new("GetComponent", object)?;
    let mut info = std::ptr::null_mut();
    // SAFETY: IVssWMComponent::GetComponentInfo; freed below, once.
    let code = unsafe { ((*(*object.0).0).get_component_info)(object.0.cast(), &raw mut info) };
    check("GetComponentInfo", code)?;
    if info.is_null() {
        return Err(VssError {
            call: "GetComponentInfo",
            code: E_FAIL.0,
        });
    }
    // SAFETY: VSS's structure, whose texts are BSTRs or null, until it is freed.
    let (read, counts) = unsafe {
        let one = &*info;
        let text = |text: *const u16| (!text.is_null()).then(|| super::text_of(text, 4096));
        let read = Component {
            kind: one.kind,
            logical_path: text(one.logical_path),
            name: text(one.name).unwrap_or_default(),
            caption: text(one.caption),
            selectable: one.selectable,
            paths: Vec::new(),
        };
        let counts = [one.files, one.databases, one.log_files];
        let freed = ((*(*object.0).0).free_component_info)(object.0.cast(), info);
        check("FreeComponentInfo", freed)?;
        (read, counts)
    };
    // SAFETY: the table lives as long as the object.
    let table = unsafe { &*(*object.0).0 };
    let mut paths = Vec::new();
    for (count, get) in counts.into_iter().zip([
        table.get_file,
        table.get_database_file,
        table.get_database_log_file,
    ]) {
        for index in 0..count.min(COUNT_MAX) {
            let mut file = std::ptr::null_mut();
            // SAFETY: one of IVssWMComponent's three, which have the same signature.
            check("GetFile", unsafe { get(object.0.cast(), index, &raw mut file) })?;
            if file.is_null() {
                return Err(VssError {
                    call: "GetFile",
                    code: E_FAIL.0,
                });
            }
            // SAFETY: VSS gave this reference to us.
            let file = unsafe { IVssWMFiledesc::from_raw(file) };
            // SAFETY: no argument.
            let path = unsafe { file.GetPath() }.map_err(|error| VssError {
                call: "GetPath",
                code: error.code().0,
            })?;
            paths.push(expand(&path.to_string()));
        }
    }
    Ok(Component { paths, ..read })
}

/// `%NAME%` in a path becomes the environment's value; an unknown one stays.
fn expand(path: &str) -> String {
    let mut parts = path.split('%');
    let mut out = parts.next().unwrap_or_default().to_owned();
    while let Some(name) = parts.next() {
        match (std::env::var(name), parts.next()) {
            (Ok(value), Some(rest)) => {
                out.push_str(&value);
                out.push_str(rest);
            }
            (_, rest) => {
                out.push('%');
                out.push_str(name);
                if let Some(rest) = rest {
                    out.push('%');
                    out.push_str(rest);
                }
            }
        }
    }
    out
}

/// A BSTR that VSS gave to us.
fn owned_text(text: *const u16) -> String {
    // SAFETY: null or a BSTR that nobody else frees.
    let text = unsafe { BSTR::from_raw(text) };
    text.to_string()
}

/// `None` is the empty logical path: VSS takes null for it.
fn optional(text: Option<&str>) -> Option<Vec<u16>> {
    text.filter(|text| !text.is_empty()).map(super::wide)
}

fn pointer(text: &Option<Vec<u16>>) -> *const u16 {
    text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr())
}

fn never() -> bool {
    false
}

impl Vss for Requester {
    fn initialize(&mut self) -> Result<(), VssError> {
        call!(self, initialize_for_backup, std::ptr::null())
    }

    fn set_backup_state(&mut self) -> Result<(), VssError> {
        call!(self, set_backup_state, true, false, VSS_BT_COPY.0, false)
    }

    fn set_context(&mut self, context: i32) -> Result<(), VssError> {
        call!(self, set_context, context)
    }

    fn gather_writer_metadata(&mut self) -> Result<Vec<Writer>, VssError> {
        let mut running = std::ptr::null_mut();
        call!(self, gather_writer_metadata, &raw mut running)?;
        Self::wait("GatherWriterMetadata", running, &never)?;
        let mut count = 0;
        call!(self, get_writer_metadata_count, &raw mut count)?;
        let writers = (0..count.min(COUNT_MAX))
            .map(|index| self.writer(index))
            .collect();
        call!(self, free_writer_metadata)?;
        writers
    }

    fn add_component(&mut self, writer: &Writer, component: &Component) -> Result<(), VssError> {
        let (path, name) = (
            optional(component.logical_path.as_deref()),
            super::wide(&component.name),
        );
        let (instance, class) = (GUID::from_u128(writer.instance), GUID::from_u128(writer.class));
        call!(
            self,
            add_component,
            instance,
            class,
            component.kind,
            pointer(&path),
            name.as_ptr()
        )
    }

    fn start_snapshot_set(&mut self) -> Result<u128, VssError> {
        let mut set = GUID::zeroed();
        call!(self, start_snapshot_set, &raw mut set)?;
        Ok(set.to_u128())
    }

    fn add_to_snapshot_set(&mut self, volume: &str) -> Result<(), VssError> {
        let volume = super::wide(volume);
        let provider = GUID::from_u128(super::register::PROVIDER);
        let mut snapshot = GUID::zeroed();
        call!(
            self,
            add_to_snapshot_set,
            volume.as_ptr(),
            provider,
            &raw mut snapshot
        )
    }

    fn prepare_for_backup(&mut self) -> Result<(), VssError> {
        let mut running = std::ptr::null_mut();
        call!(self, prepare_for_backup, &raw mut running)?;
        Self::wait("PrepareForBackup", running, &never)
    }

    fn gather_writer_status(&mut self) -> Result<Vec<WriterStatus>, VssError> {
        let mut running = std::ptr::null_mut();
        call!(self, gather_writer_status, &raw mut running)?;
        Self::wait("GatherWriterStatus", running, &never)?;
        let mut count = 0;
        call!(self, get_writer_status_count, &raw mut count)?;
        let statuses = (0..count.min(COUNT_MAX))
            .map(|index| self.status(index))
            .collect();
        call!(self, free_writer_status)?;
        statuses
    }

    fn do_snapshot_set(&mut self, given_up: &dyn Fn() -> bool) -> Result<(), VssError> {
        let mut running = std::ptr::null_mut();
        call!(self, do_snapshot_set, &raw mut running)?;
        Self::wait("DoSnapshotSet", running, given_up)
    }

    fn set_backup_succeeded(&mut self, writer: &Writer, component: &Component) -> Result<(), VssError> {
        let (path, name) = (
            optional(component.logical_path.as_deref()),
            super::wide(&component.name),
        );
        let (instance, class) = (GUID::from_u128(writer.instance), GUID::from_u128(writer.class));
        call!(
            self,
            set_backup_succeeded,
            instance,
            class,
            component.kind,
            pointer(&path),
            name.as_ptr(),
            true
        )
    }

    fn backup_complete(&mut self) -> Result<(), VssError> {
        let mut running = std::ptr::null_mut();
        call!(self, backup_complete, &raw mut running)?;
        Self::wait("BackupComplete", running, &never)
    }

    fn abort_backup(&mut self) {
        if let Err(error) = call!(self, abort_backup) {
            tracing::debug!(%error, "there was no backup to abort");
        }
    }

    fn document(&mut self) -> Result<String, VssError> {
        let mut text = std::ptr::null();
        call!(self, save_as_xml, &raw mut text)?;
        Ok(owned_text(text))
    }
}

impl Drop for Requester {
    fn drop(&mut self) {
        // SAFETY: our reference, given back once.
        unsafe { ((*(*self.object).0).release)(self.object.cast()) };
    }
}
