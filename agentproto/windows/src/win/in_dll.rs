//! The provider without its service, for the tests' fake coordinator.

use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use windows::Win32::Foundation::{CLASS_E_CLASSNOTAVAILABLE, E_FAIL, E_POINTER};
use windows::core::GUID;

use crate::config::Config;
use crate::provider::Provider;
use crate::run::Running;

static PROVIDER: OnceLock<Option<Arc<Provider>>> = OnceLock::new();

/// A provider whose engines run on threads of their own: the grants come from the registration, as in the service.
fn start() -> anyhow::Result<Arc<Provider>> {
    let path = std::env::var_os("STILLPOINT_AGENT_CONFIG").map(PathBuf::from);
    let config = Config::load(path.as_deref())?;
    let flush = crate::log::start(&config.log)?;
    let platform = Arc::new(super::Windows {
        test_luns: config.test_luns.clone(),
    });
    let running = Running::new(config, platform)?;
    let provider = running.provider();
    std::thread::spawn(move || {
        let _flush = flush;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        match runtime {
            Ok(runtime) => {
                let ended = runtime.block_on(running.run(tokio_util::sync::CancellationToken::new()));
                if let Err(error) = ended {
                    tracing::error!("{error:#}");
                }
            }
            Err(error) => tracing::error!("the runtime cannot be started: {error}"),
        }
    });
    Ok(provider)
}

/// `DllGetClassObject`.
///
/// # Safety
/// The pointers are what COM hands in.
pub unsafe fn get_class_object(class: *const c_void, id: *const c_void, object: *mut *mut c_void) -> i32 {
    if class.is_null() || id.is_null() || object.is_null() {
        return E_POINTER.0;
    }
    // SAFETY: COM's GUID.
    if unsafe { *class.cast::<GUID>() } != GUID::from_u128(super::register::CLASS) {
        return CLASS_E_CLASSNOTAVAILABLE.0;
    }
    let provider =
        PROVIDER.get_or_init(|| start().inspect_err(|error| eprintln!("provider: {error:#}")).ok());
    match provider {
        // SAFETY: checked above.
        Some(provider) => unsafe { super::com::class_object(Arc::clone(provider), id.cast(), object) }.0,
        None => E_FAIL.0,
    }
}
