//! Under Windows' service manager.

use std::fs::OpenOptions;
use std::os::windows::io::IntoRawHandle as _;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use tokio_util::sync::CancellationToken;
use windows::Win32::Foundation::{ERROR_CALL_NOT_IMPLEMENTED, HANDLE, NO_ERROR};
use windows::Win32::System::Console::{STD_ERROR_HANDLE, SetStdHandle};
use windows::Win32::System::Services::{
    RegisterServiceCtrlHandlerExW, SERVICE_ACCEPT_SHUTDOWN, SERVICE_ACCEPT_STOP, SERVICE_CONTROL_INTERROGATE,
    SERVICE_CONTROL_SHUTDOWN, SERVICE_CONTROL_STOP, SERVICE_RUNNING, SERVICE_STATUS,
    SERVICE_STATUS_CURRENT_STATE, SERVICE_STATUS_HANDLE, SERVICE_STOP_PENDING, SERVICE_STOPPED,
    SERVICE_TABLE_ENTRYW, SERVICE_WIN32_OWN_PROCESS, SetServiceStatus, StartServiceCtrlDispatcherW,
};
use windows::core::{PCWSTR, PWSTR};

/// A log that is longer becomes `agent.log.1` at the next start, in bytes.
const LOG_MAX: u64 = 16 * 1024 * 1024;
/// What we tell the service manager about stopping, in milliseconds: VSS may have to end a snapshot set first.
const STOP_HINT_MS: u32 = 30_000;

/// What the service does; `false` = it failed.
type Body = Box<dyn FnOnce(CancellationToken) -> bool + Send>;

static BODY: Mutex<Option<Body>> = Mutex::new(None);
static STOP: OnceLock<CancellationToken> = OnceLock::new();

/// Runs `body` as the service; returns when it has ended.
pub(crate) fn run(
    body: impl FnOnce(CancellationToken) -> bool + Send + 'static,
) -> windows::core::Result<()> {
    *BODY.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(body));
    let mut name = super::wide(crate::install::SERVICE);
    let table = [
        SERVICE_TABLE_ENTRYW {
            lpServiceName: PWSTR(name.as_mut_ptr()),
            lpServiceProc: Some(main),
        },
        SERVICE_TABLE_ENTRYW::default(),
    ];
    // SAFETY: the table ends with an empty entry and lives through the call, which lasts as long as the service.
    unsafe { StartServiceCtrlDispatcherW(table.as_ptr()) }
}

/// A service has no standard error: the log goes to a file beside the configuration.
pub(crate) fn log_to(path: &Path) -> std::io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|found| found.len() > LOG_MAX) {
        std::fs::rename(path, path.with_extension("log.1"))?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    // SAFETY: the handle is given away for good.
    unsafe { SetStdHandle(STD_ERROR_HANDLE, HANDLE(file.into_raw_handle()))? };
    Ok(())
}

unsafe extern "system" fn main(_count: u32, _arguments: *mut PWSTR) {
    let stop = STOP.get_or_init(CancellationToken::new).clone();
    let name = super::wide(crate::install::SERVICE);
    // SAFETY: the name ends with a zero; the handler is a function of ours.
    let handle = unsafe { RegisterServiceCtrlHandlerExW(PCWSTR(name.as_ptr()), Some(control), None) };
    let Ok(handle) = handle else { return };
    say(handle, SERVICE_RUNNING, 0);
    let body = BODY.lock().unwrap_or_else(PoisonError::into_inner).take();
    let well = body.is_some_and(|body| body(stop));
    say(handle, SERVICE_STOPPED, u32::from(!well));
}

fn say(handle: SERVICE_STATUS_HANDLE, state: SERVICE_STATUS_CURRENT_STATE, exit_code: u32) {
    let accepted = if state == SERVICE_RUNNING {
        SERVICE_ACCEPT_STOP | SERVICE_ACCEPT_SHUTDOWN
    } else {
        0
    };
    let status = SERVICE_STATUS {
        dwServiceType: SERVICE_WIN32_OWN_PROCESS,
        dwCurrentState: state,
        dwControlsAccepted: accepted,
        dwWin32ExitCode: exit_code,
        dwServiceSpecificExitCode: 0,
        dwCheckPoint: 0,
        dwWaitHint: if state == SERVICE_STOP_PENDING {
            STOP_HINT_MS
        } else {
            0
        },
    };
    // SAFETY: the structure lives through the call. A service manager that does not listen cannot be told.
    unsafe { SetServiceStatus(handle, &raw const status) }.ok();
}

unsafe extern "system" fn control(
    code: u32,
    _kind: u32,
    _data: *mut core::ffi::c_void,
    _context: *mut core::ffi::c_void,
) -> u32 {
    match code {
        SERVICE_CONTROL_STOP | SERVICE_CONTROL_SHUTDOWN => {
            STOP.get_or_init(CancellationToken::new).cancel();
            NO_ERROR.0
        }
        SERVICE_CONTROL_INTERROGATE => NO_ERROR.0,
        _ => ERROR_CALL_NOT_IMPLEMENTED.0,
    }
}
