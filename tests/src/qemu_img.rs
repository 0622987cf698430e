//! QEMU's own initiator: `qemu-img` and `qemu-io`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process::{Finished, Running, run};
use crate::scratch::Scratch;

/// One invocation on a small disk.
const LIMIT: Duration = Duration::from_secs(60);

/// Where qemu-block-extra puts its drivers.
const MODULES: &str = "/usr/lib/x86_64-linux-gnu/qemu";

/// A program of package qemu-utils whose version fits the installed qemu-block-extra. `tests/run` unpacks one below `build/`
/// where the installed qemu-utils is of another version (it could not load the iSCSI driver then).
#[must_use]
pub fn qemu_tool(name: &str) -> Command {
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/qemu-utils");
    let unpacked = fs::read_dir(build)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("usr/bin").join(name))
        .find(|path| path.is_file());
    let Some(path) = unpacked else {
        return Command::new(name);
    };
    let mut command = Command::new(path);
    // QEMU looks for its modules beside its own directory.
    command.env("QEMU_MODULE_DIR", MODULES);
    command
}

/// One `qemu-img` command.
///
/// # Errors
/// It cannot be started or does not end.
pub fn qemu_img(arguments: &[&str]) -> Result<Finished> {
    run(qemu_tool("qemu-img").args(arguments), LIMIT)
}

/// Runs qemu-io commands on one opened disk. qemu-io's own exit code is 0 also when a pattern does not match, so its words
/// count too: the code is 1 then.
///
/// # Errors
/// It cannot be started or does not end.
pub fn qemu_io(url: &str, commands: &[&str]) -> Result<Finished> {
    let mut finished = run(&mut qemu_io_command(url, commands), LIMIT)?;
    let text = format!("{}{}", finished.stdout, finished.stderr).to_lowercase();
    if ["failed", "mismatch", "error", "can't", "no space"]
        .iter()
        .any(|word| text.contains(word))
    {
        finished.code = 1;
    }
    Ok(finished)
}

/// A logged-in session that does nothing, until it is dropped.
///
/// # Errors
/// It cannot be started.
pub fn qemu_session(scratch: &Scratch, name: &str, url: &str) -> Result<Running> {
    let mut command = qemu_io_command(url, &["sleep 3600000"]);
    Running::start(name, &mut command, &scratch.file(&format!("{name}.log")))
}

fn qemu_io_command(url: &str, commands: &[&str]) -> Command {
    let mut command = qemu_tool("qemu-io");
    command.args(["-f", "raw"]);
    for text in commands {
        command.args(["-c", text]);
    }
    command.arg(url);
    command
}
