//! A daemon, its LUN mounted on this host, and the real agent beside it. No guest, so that a story of many snapshots stays quick.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::export::Export;
use crate::process::{Running, run, wait_until};
use crate::proxy::Proxy;
use crate::scratch::{Scratch, free_port};

const LIMIT: Duration = Duration::from_secs(60);
/// The target of the LUN `app`.
const IQN: &str = "iqn.2026-11.test:app";
/// Who logs in.
const INITIATOR: &str = "iqn.2026-11.test.host:app";
const CONFIG: &str = r#"
[[portal]]
address = "127.0.0.1:$PORT"

[[lun]]
name = "app"
size = "1GiB"

[[target]]
iqn = "iqn.2026-11.test:app"
luns = ["app"]
initiators = ["iqn.2026-11.test.host:app"]
agents = true

[agents]
listen = "127.0.0.1:$AGENTS"
"#;

/// The whole stage. The order is that of the end.
#[derive(Debug)]
pub struct AgentHost {
    agent: Option<Running>,
    lun: Export,
    /// The daemon, with the LUN `app`.
    pub daemon: Daemon,
    /// The way from the daemon to the agent.
    pub proxy: Proxy,
    program: PathBuf,
    port: u16,
    dir: PathBuf,
}

impl AgentHost {
    /// Starts the daemon and mounts the LUN `app`, with a new file system.
    ///
    /// # Errors
    /// One of the programs fails.
    pub fn new(scratch: &Scratch, daemon: &str, agent: &str) -> Result<Self> {
        let daemon = Daemon::start(daemon, scratch, CONFIG)?;
        let dir = scratch.path().to_owned();
        // Databases run as users of their own.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        fs::create_dir(dir.join("hooks.d"))?;
        let lun = Export::mount(&dir, "lun", &daemon.portal(), IQN, INITIATOR, true)?;
        let host = Self {
            agent: None,
            lun,
            daemon,
            proxy: Proxy::start()?,
            program: PathBuf::from(agent),
            port: free_port()?,
            dir,
        };
        host.proxy.lead_to(host.port);
        Ok(host)
    }

    /// Everything of the story.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the LUN is mounted.
    #[must_use]
    pub fn point(&self) -> &Path {
        self.lun.point()
    }

    /// Adds a hook; `$DIR` in it is the story's directory, `$POINT` the mount point.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn hook(&self, name: &str, text: &str, application: Option<&str>) -> Result<()> {
        let path = self.dir.join("hooks.d").join(name);
        let text = text
            .replace("$DIR", &self.dir.display().to_string())
            .replace("$POINT", &self.point().display().to_string());
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        if let Some(application) = application {
            let sidecar = path.with_file_name(format!("{name}.toml"));
            fs::write(sidecar, format!("application = \"{application}\"\n"))?;
        }
        Ok(())
    }

    /// Writes agent.toml (with `more` in it), enrols the agent and starts it.
    ///
    /// # Errors
    /// The agent refuses, or does not become connected.
    pub fn enrol(&mut self, more: &str) -> Result<()> {
        let naa = self.daemon.json(&["lun", "show", "app"])?["naa"].to_string();
        let at = |name: &str| self.dir.join(name).display().to_string();
        let text = format!(
            "listen = \"127.0.0.1:{}\"\nadvertise_port = {}\nstate_dir = \"{}\"\nrun_dir = \"{}\"\nhooks_dir = \"{}\"\n\
             min_interval_s = 1\nlog = \"debug\"\ninitiators = [\"{INITIATOR}\"]\n{more}\n\
             [[test_lun]]\npath = \"{}\"\nnaa = {naa}\n",
            self.port,
            self.proxy.port(),
            at("agent-state"),
            at("agent-run"),
            at("hooks.d"),
            self.lun.image().display(),
        );
        fs::write(self.dir.join("agent.toml"), text)?;
        let created = self.daemon.json(&["agent", "token", "create", "--lun", "app"])?;
        let token = created["token"].as_str().context("a token")?;
        let invitation = format!("{token}@127.0.0.1:{}", self.daemon.agent_port());
        run(self.agent_command().args(["enrol", &invitation]), LIMIT)?.success()?;
        self.start_agent()
    }

    /// The agent's program with its configuration.
    #[must_use]
    pub fn agent_command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--config")
            .arg(self.dir.join("agent.toml"))
            .env_remove("RUST_LOG");
        command
    }

    /// Starts the agent (one that was killed is forgotten), and waits until it is connected.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_agent(&mut self) -> Result<()> {
        self.agent = None;
        let log = self.dir.join("agent.log");
        let agent = Running::start("stillpoint-agent", self.agent_command().arg("run"), &log)?;
        self.agent = Some(agent);
        wait_until("the agent to be connected", LIMIT, || {
            let agents = self.daemon.json(&["agent", "list"])?;
            Ok(agents[0]["state"] == "connected")
        })
    }

    /// The running agent.
    ///
    /// # Errors
    /// It was not started.
    pub fn agent(&self) -> Result<&Running> {
        self.agent.as_ref().context("the agent was not started")
    }

    /// Takes a snapshot of the LUN that must succeed.
    ///
    /// # Errors
    /// It does not.
    pub fn create(&self, name: &str, options: &[&str]) -> Result<Value> {
        let arguments = ["snapshot", "create", "app", "--name", name];
        self.daemon.json(&[&arguments, options].concat())
    }

    /// Mounts a snapshot as a LUN of its own, and its file system on this host.
    ///
    /// # Errors
    /// One of the steps fails.
    pub fn look_into(&self, snapshot: &str) -> Result<Export> {
        let mount = self
            .daemon
            .json(&["snapshot", "mount", &format!("app@{snapshot}")])?;
        let iqn = mount["iqn"].as_str().context("its target")?;
        let name = format!("look-{snapshot}");
        Export::mount(&self.dir, &name, &self.daemon.portal(), iqn, INITIATOR, false)
    }
}
