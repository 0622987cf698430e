//! Programs of Debian's packages, unpacked below `build/` by the scripts in `tests/vm/`: nothing is installed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::run;

/// Fetching, unpacking and imaging on a slow line.
const BUILD_LIMIT: Duration = Duration::from_secs(600);

/// One of QEMU's, libiscsi's or tgt's programs.
///
/// # Errors
/// They cannot be fetched.
pub fn tool(name: &str) -> Result<Command> {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    let bin = match BIN.get() {
        Some(bin) => bin,
        None => {
            let bin = made("tools", "tools")?.join("bin");
            BIN.get_or_init(|| bin)
        }
    };
    Ok(Command::new(bin.join(name)))
}

/// Wireshark's dissector.
///
/// # Errors
/// It cannot be fetched.
pub fn tshark() -> Result<Command> {
    Ok(Command::new(made("tshark", "tshark")?.join("bin/tshark")))
}

/// A program of one of the database servers' packages, which runs in their own tree; `shared` is seen there at the same place.
/// Needs root.
///
/// # Errors
/// The packages cannot be fetched.
pub fn database_tool(user: u32, shared: &Path, program: &str) -> Result<Command> {
    static IN_ROOT: OnceLock<PathBuf> = OnceLock::new();
    let in_root = match IN_ROOT.get() {
        Some(in_root) => in_root,
        None => {
            let in_root = made("databases", "databases")?.join("bin/in-root");
            IN_ROOT.get_or_init(|| in_root)
        }
    };
    let mut command = Command::new(in_root);
    command.arg(user.to_string()).arg(shared).arg(program);
    Ok(command)
}

/// The directory with the guest's kernel, initrd and root disk.
pub(crate) fn guest_parts() -> Result<PathBuf> {
    made("build", "vm")
}

/// Runs a script of `tests/vm/`, which does nothing when its result is there and up to date.
pub(crate) fn made(script: &str, directory: &str) -> Result<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tests
        .parent()
        .context("the workspace's root")?
        .join("build")
        .join(directory);
    let script = tests.join("vm").join(script);
    run(Command::new("bash").arg(&script).arg(&out), BUILD_LIMIT)?
        .success()
        .with_context(|| format!("{} failed", script.display()))?;
    Ok(out)
}
