//! A firewall in one direction between target and agent: two network namespaces, a cable, real processes. The message names host,
//! port, direction and what to do, on both ends; when the way is open again, it works.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{Daemon, Finished, Running, run, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");
const LIMIT: Duration = Duration::from_secs(120);
/// Nobody else is in these namespaces: any address and port will do.
const TARGET_IP: &str = "10.99.0.1";
const AGENT_IP: &str = "10.99.0.2";
const PORT: u16 = 11169;
const CONFIG: &str = r#"
[[portal]]
address = "127.0.0.1:$PORT"

[[lun]]
name = "app"
size = "64MiB"

[[target]]
iqn = "iqn.2026-11.test:app"
luns = ["app"]
initiators = ["*"]
agents = true

[agents]
listen = "10.99.0.1:11169"
"#;

/// Two namespaces with a cable; they go with this value.
struct Cable([String; 2]);

impl Cable {
    /// `None`, said loudly, where namespaces with a cable and a firewall cannot be made.
    fn lay() -> Option<Self> {
        let id = std::process::id();
        let cable = Self([format!("sp{id}t"), format!("sp{id}a")]);
        match cable.set_up() {
            Ok(()) => Some(cable),
            Err(error) => {
                eprintln!("SKIPPED: no network namespaces can be made here: {error:#}");
                None
            }
        }
    }

    fn set_up(&self) -> Result<()> {
        let [target, agent] = &self.0;
        ip(&["netns", "add", target])?;
        ip(&["netns", "add", agent])?;
        let peers = ["type", "veth", "peer", "name", "eth", "netns", agent];
        ip(&[&["link", "add", "eth", "netns", target], &peers[..]].concat())?;
        for (at, namespace, address) in [(AT_TARGET, target, TARGET_IP), (AT_AGENT, agent, AGENT_IP)] {
            ip(&[
                "-n",
                namespace,
                "address",
                "add",
                &format!("{address}/24"),
                "dev",
                "eth",
            ])?;
            for link in ["lo", "eth"] {
                ip(&["-n", namespace, "link", "set", link, "up"])?;
            }
            // A rule before the one for our own addresses has to be possible.
            ip(&["-n", namespace, "rule", "add", "pref", "100", "lookup", "local"])?;
            ip(&["-n", namespace, "rule", "del", "pref", "0"])?;
            self.wall(at, "add")?;
            self.wall(at, "del")?;
        }
        Ok(())
    }

    /// Drops what comes in there for the port, as a firewall does; what goes out from there is answered.
    fn wall(&self, at: usize, verb: &str) -> Result<()> {
        let namespace = self.0.get(at).context("a namespace")?;
        let port = PORT.to_string();
        let rule = ["-n", namespace, "rule", verb, "pref", "50"];
        let inbound = ["iif", "eth", "ipproto", "tcp", "dport", &port, "blackhole"];
        ip(&[&rule[..], &inbound].concat())
    }

    fn command(&self, at: usize, program: &str) -> Result<Command> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.0.get(at).context("a namespace")?, program]);
        command.env_remove("RUST_LOG");
        Ok(command)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for namespace in &self.0 {
            // One that was never made cannot be removed either.
            run(Command::new("ip").args(["netns", "del", namespace]), LIMIT).ok();
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run(Command::new("ip").args(arguments), LIMIT)?.success()?;
    Ok(())
}

const AT_TARGET: usize = 0;
const AT_AGENT: usize = 1;

struct Agent<'a> {
    cable: &'a Cable,
    dir: &'a Path,
}

impl Agent<'_> {
    fn command(&self) -> Result<Command> {
        let mut command = self.cable.command(AT_AGENT, AGENT)?;
        command.arg("--config").arg(self.dir.join("agent.toml"));
        Ok(command)
    }

    fn verb(&self, arguments: &[&str]) -> Result<Finished> {
        run(self.command()?.arg("--json").args(arguments), LIMIT)
    }

    /// What its status says about the target: exit code and trouble.
    fn trouble(&self) -> Result<(i32, Option<String>)> {
        let status = self.verb(&["status"])?;
        let shown: Value = serde_json::from_str(&status.stdout)?;
        let trouble = shown["targets"][0]["connection"]["trouble"]
            .as_str()
            .map(str::to_owned);
        Ok((status.code, trouble))
    }
}

#[test]
fn a_firewall_in_one_direction_is_named_on_both_ends() {
    story("one-way firewall", |scratch| {
        let Some(cable) = Cable::lay() else { return Ok(()) };
        let daemon = Daemon::prepare(BINARY, scratch, CONFIG)?;
        let mut serve = cable.command(AT_TARGET, BINARY)?;
        serve
            .args(["serve", "--config"])
            .arg(daemon.config())
            .current_dir(daemon.dir());
        let _serving = Running::start(
            "stillpoint serve",
            &mut serve,
            &daemon.dir().join("stillpoint.log"),
        )?;
        wait_until("the daemon to answer", LIMIT, || {
            Ok(daemon.cli(&["status"])?.code == 0)
        })?;
        let agent = Agent {
            cable: &cable,
            dir: scratch.path(),
        };
        let at = |name: &str| scratch.file(name).display().to_string();
        let text = format!(
            "listen = \"0.0.0.0:{PORT}\"\nstate_dir = \"{}\"\nrun_dir = \"{}\"\nhooks_dir = \"{}\"\n",
            at("agent-state"),
            at("agent-run"),
            at("hooks.d")
        );
        fs::write(scratch.file("agent.toml"), text)?;

        // From the agent to the target: nothing can begin.
        let created = daemon.json(&["agent", "token", "create", "--lun", "app"])?;
        let token = created["token"].as_str().context("a token")?;
        let invitation = format!("{token}@{TARGET_IP}");
        cable.wall(AT_TARGET, "add")?;
        let refused = agent.verb(&["enrol", &invitation])?.refused(4)?;
        for part in ["10.99.0.1:11169", "from this host", "11169 is open"] {
            ensure!(refused.contains(part), "{part}: {refused}");
        }
        cable.wall(AT_TARGET, "del")?;
        agent.verb(&["enrol", &invitation])?.success()?;

        // From the target to the agent: it registers, and both ends say why no snapshot would work.
        cable.wall(AT_AGENT, "add")?;
        let _running = Running::start(
            "stillpoint-agent",
            agent.command()?.arg("run"),
            &scratch.file("agent.log"),
        )?;
        let mut shown = Value::Null;
        wait_until("the target to say that it is unreachable", LIMIT, || {
            shown = daemon.json(&["agent", "list"])?[0].clone();
            Ok(shown["state"] == "unreachable")
        })?;
        let trouble = shown["trouble"].as_str().context("a trouble")?.to_owned();
        for part in [
            "10.99.0.2:11169",
            "the target dials the agent",
            "no answer",
            "inbound TCP port 11169",
        ] {
            ensure!(trouble.contains(part), "{part}: {trouble}");
        }
        wait_until("the agent's own status to say so", LIMIT, || {
            let (code, told) = agent.trouble()?;
            Ok(code == 1 && told.is_some_and(|told| told == trouble))
        })?;
        let id = shown["id"].as_str().context("an id")?;
        daemon.refused(3, &["agent", "test", id])?;

        // Opened: the next look finds the way.
        cable.wall(AT_AGENT, "del")?;
        wait_until("the way to be open", LIMIT, || {
            Ok(daemon.cli(&["agent", "test", id])?.code == 0)
        })?;
        let state = daemon.json(&["agent", "show", id])?["state"].clone();
        ensure!(state == "connected", "{state}");
        wait_until("the agent's own status to be well", LIMIT, || {
            Ok(agent.trouble()? == (0, None))
        })?;
        Ok(())
    });
}
