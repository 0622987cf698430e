//! The daemon as an operator starts it, and the CLI as an operator uses it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::process::{Finished, Running, run, wait_until};
use crate::scratch::{Scratch, free_port};

/// From start to an answered `status`, also when the store has to be recovered on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(30);
/// From SIGTERM to the end.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// One CLI command. Snapshots with agents are bounded by the protocol's own deadlines, far below.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// One daemon with its config file, data directory and ports.
#[derive(Debug)]
pub struct Daemon {
    binary: PathBuf,
    dir: PathBuf,
    port: u16,
    second_port: u16,
    agent_port: u16,
    running: Option<Running>,
}

impl Daemon {
    /// Writes the config and starts the daemon.
    ///
    /// In `config` stand `$DIR` (the scratch directory), `$PORT` and `$PORT2` (for portals), `$AGENTS` (for the agent
    /// listener). A `[daemon]` section with data directory and control socket is put in front.
    ///
    /// # Errors
    /// The daemon does not come up; its log is printed by [`crate::story`].
    pub fn start(binary: &str, scratch: &Scratch, config: &str) -> Result<Self> {
        let mut daemon = Self::prepare(binary, scratch, config)?;
        daemon.resume()?;
        Ok(daemon)
    }

    /// As [`Self::start`], but leaves the daemon stopped.
    ///
    /// # Errors
    /// No free port, or the file cannot be written.
    pub fn prepare(binary: &str, scratch: &Scratch, config: &str) -> Result<Self> {
        let daemon = Self {
            binary: PathBuf::from(binary),
            dir: scratch.path().to_owned(),
            port: free_port()?,
            second_port: free_port()?,
            agent_port: free_port()?,
            running: None,
        };
        daemon.write_config(config)?;
        Ok(daemon)
    }

    /// Replaces the config file; the running daemon does not look at it by itself.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_config(&self, config: &str) -> Result<()> {
        let head = "[daemon]\ndata_dir = \"$DIR/data\"\ncontrol_socket = \"$DIR/control.sock\"\n\n";
        // The longer name first: `$PORT` is a part of it.
        let text = format!("{head}{config}")
            .replace("$DIR", &self.dir.display().to_string())
            .replace("$PORT2", &self.second_port.to_string())
            .replace("$PORT", &self.port.to_string())
            .replace("$AGENTS", &self.agent_port.to_string());
        fs::write(self.config(), text).context("cannot write the daemon's config")
    }

    /// Starts the stopped daemon and waits until it answers.
    ///
    /// # Errors
    /// It ends, or does not answer in time.
    pub fn resume(&mut self) -> Result<()> {
        ensure!(self.running.is_none(), "the daemon runs already");
        let mut command = Command::new(&self.binary);
        command
            .args(["serve", "--config"])
            .arg(self.config())
            .current_dir(&self.dir);
        let mut running = Running::start("stillpoint serve", &mut command, &self.dir.join("stillpoint.log"))?;
        wait_until("the daemon to answer", START_LIMIT, || {
            if let Some(code) = running.ended()? {
                bail!("`stillpoint serve` ended with exit code {code}");
            }
            Ok(self.cli(&["status", "--json"])?.code == 0)
        })?;
        self.running = Some(running);
        Ok(())
    }

    /// Starts the stopped daemon expecting that it refuses to, and gives what it printed.
    ///
    /// # Errors
    /// It starts.
    pub fn refuses_to_start(&self) -> Result<(i32, String)> {
        let mut command = Command::new(&self.binary);
        command
            .args(["serve", "--config"])
            .arg(self.config())
            .current_dir(&self.dir);
        let finished = run(&mut command, START_LIMIT)?;
        ensure!(
            finished.code != 0,
            "the daemon should not have started:\n{}",
            finished.stdout
        );
        Ok((finished.code, finished.stderr))
    }

    /// SIGTERM, and the exit code.
    ///
    /// # Errors
    /// It does not run, or does not end in time.
    pub fn stop(&mut self) -> Result<i32> {
        let mut running = self.running.take().context("the daemon does not run")?;
        running.signal(Signal::TERM)?;
        running.wait(STOP_LIMIT)
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        drop(self.running.take().context("the daemon does not run")?);
        Ok(())
    }

    /// Any signal.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.running
            .as_ref()
            .context("the daemon does not run")?
            .signal(signal)
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(Running::id)
    }

    /// Everything that it logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("stillpoint.log")).unwrap_or_default()
    }

    /// Its config file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.dir.join("stillpoint.toml")
    }

    /// Its data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The directory that holds all of it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// First portal, as initiators write it.
    #[must_use]
    pub fn portal(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// TCP port of the first portal.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// TCP port of the second portal.
    #[must_use]
    pub fn second_port(&self) -> u16 {
        self.second_port
    }

    /// TCP port of the agents' listener.
    #[must_use]
    pub fn agent_port(&self) -> u16 {
        self.agent_port
    }

    /// The URL that libiscsi and QEMU take.
    #[must_use]
    pub fn url(&self, iqn: &str, lun: u16) -> String {
        format!("iscsi://127.0.0.1:{}/{iqn}/{lun}", self.port)
    }

    /// Runs one CLI command against this daemon's config.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn cli(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(&self.binary);
        command
            .arg("--config")
            .arg(self.config())
            .args(arguments)
            .current_dir(&self.dir);
        run(&mut command, COMMAND_LIMIT)
    }

    /// Standard output of a command that must succeed.
    ///
    /// # Errors
    /// It does not.
    pub fn text(&self, arguments: &[&str]) -> Result<String> {
        self.cli(arguments)?
            .success()
            .with_context(|| format!("stillpoint {}", arguments.join(" ")))
    }

    /// `--json` of a command that must succeed.
    ///
    /// # Errors
    /// It does not, or does not print one JSON document.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.text(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("stillpoint {}: {text:?}", arguments.join(" ")))
    }

    /// The `error` object of a command that must be refused with `code`: never a bare text, always a message and a code.
    ///
    /// # Errors
    /// It succeeds, ends otherwise, or its standard error is not the promised object.
    pub fn refused(&self, code: i32, arguments: &[&str]) -> Result<Value> {
        let shown = arguments.join(" ");
        let stderr = self
            .cli(&[arguments, &["--json"]].concat())?
            .refused(code)
            .with_context(|| format!("stillpoint {shown}"))?;
        let value: Value =
            serde_json::from_str(&stderr).with_context(|| format!("stillpoint {shown}: {stderr:?}"))?;
        let error = value
            .get("error")
            .with_context(|| format!("stillpoint {shown}: {value}"))?
            .clone();
        for key in ["code", "message"] {
            ensure!(
                error
                    .get(key)
                    .and_then(Value::as_str)
                    .is_some_and(|text| !text.is_empty()),
                "stillpoint {shown}: the error has no `{key}`: {error}"
            );
        }
        Ok(error)
    }
}
