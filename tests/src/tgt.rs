//! tgt, another target, as the oracle: a story that it passes is a fair one.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{Running, run, wait_until};
use crate::scratch::{Scratch, free_port};
use crate::tools::tool;

/// The oracle's only target.
const IQN: &str = "iqn.2026-11.test.oracle:disk";

/// tgtd with one thin disk as LUN 1 (LUN 0 is tgt's controller).
#[derive(Debug)]
pub struct Tgt {
    control_port: u16,
    port: u16,
    disk: PathBuf,
    log: PathBuf,
    running: Option<Running>,
}

impl Tgt {
    /// Starts it.
    ///
    /// # Errors
    /// The daemon does not come up.
    pub fn start(scratch: &Scratch, size_bytes: u64) -> Result<Self> {
        let disk = scratch.file("tgt.img");
        File::create(&disk)
            .and_then(|file| file.set_len(size_bytes))
            .context("tgt's backing file")?;
        let log = scratch.file("tgt.log");
        let mut tgt = Self {
            control_port: free_port()?,
            port: free_port()?,
            disk,
            log,
            running: None,
        };
        tgt.resume()?;
        Ok(tgt)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Starts it again on the same port with the same disk.
    ///
    /// # Errors
    /// It does not come up.
    pub fn resume(&mut self) -> Result<()> {
        let mut command = tool("tgtd")?;
        let portal = format!("portal=127.0.0.1:{}", self.port);
        command.args(["-f", "-C", &self.control_port.to_string(), "--iscsi", &portal]);
        self.running = Some(Running::start("tgtd", &mut command, &self.log)?);
        wait_until("tgtd", Duration::from_secs(10), || {
            Ok(self.admin("--op show --mode target").is_ok())
        })?;
        self.admin(&format!("--op new --mode target --tid 1 -T {IQN}"))?;
        self.admin(&format!(
            "--op new --mode logicalunit --tid 1 --lun 1 -b {}",
            self.disk.display()
        ))?;
        self.admin("--op update --mode logicalunit --tid 1 --lun 1 --params thin_provisioning=1,lbppbe=3")?;
        self.admin("--op bind --mode target --tid 1 -I ALL")?;
        Ok(())
    }

    /// One `tgtadm` command.
    ///
    /// # Errors
    /// tgt refuses it.
    pub fn admin(&self, arguments: &str) -> Result<String> {
        let mut command = tool("tgtadm")?;
        command
            .args(["-C", &self.control_port.to_string(), "--lld", "iscsi"])
            .args(arguments.split(' '));
        run(&mut command, Duration::from_secs(10))?
            .success()
            .with_context(|| format!("tgtadm {arguments}"))
    }

    /// Its target's name.
    #[must_use]
    pub fn iqn(&self) -> &'static str {
        IQN
    }

    /// Its portal.
    #[must_use]
    pub fn portal(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// TCP port of its portal.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The disk's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("iscsi://{}/{IQN}/1", self.portal())
    }
}
