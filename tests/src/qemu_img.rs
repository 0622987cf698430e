//! QEMU's own initiator: `qemu-img` and `qemu-io`.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process::{Finished, Running, run};
use crate::scratch::Scratch;
use crate::tools::tool;

/// One invocation on a small disk.
const LIMIT: Duration = Duration::from_secs(60);

/// One `qemu-img` command.
///
/// # Errors
/// It cannot be started or does not end.
pub fn qemu_img(arguments: &[&str]) -> Result<Finished> {
    run(tool("qemu-img")?.args(arguments), LIMIT)
}

/// Runs qemu-io commands on one opened disk. qemu-io's own exit code is 0 also when a pattern does not match, so its words
/// count too: the code is 1 then.
///
/// # Errors
/// It cannot be started or does not end.
pub fn qemu_io(url: &str, commands: &[&str]) -> Result<Finished> {
    spoken(run(&mut qemu_io_command(url, commands)?, LIMIT)?)
}

/// As [`qemu_io`] on a disk opened for reading only: QEMU opens a write-protected LUN in no other way.
///
/// # Errors
/// It cannot be started or does not end.
pub fn qemu_io_read_only(url: &str, commands: &[&str]) -> Result<Finished> {
    spoken(run(qemu_io_command(url, commands)?.arg("-r"), LIMIT)?)
}

fn spoken(mut finished: Finished) -> Result<Finished> {
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
    let mut command = qemu_io_command(url, &["sleep 3600000"])?;
    Running::start(name, &mut command, &scratch.file(&format!("{name}.log")))
}

fn qemu_io_command(url: &str, commands: &[&str]) -> Result<Command> {
    let mut command = tool("qemu-io")?;
    command.args(["-f", "raw"]);
    for text in commands {
        command.args(["-c", text]);
    }
    command.arg(url);
    Ok(command)
}
