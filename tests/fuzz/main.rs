//! The libFuzzer end of `targets.rs`. One program for all targets: `STILLPOINT_FUZZ` names the one to run.
#![no_main]

#[path = "targets.rs"]
mod targets;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let run = TARGET.get_or_init(|| {
        let wanted = std::env::var("STILLPOINT_FUZZ").unwrap_or_default();
        let found = targets::ALL.iter().find(|target| target.name == wanted);
        found.unwrap_or_else(|| panic!("STILLPOINT_FUZZ={wanted:?} names no target")).run
    });
    run(data);
});
