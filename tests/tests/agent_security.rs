//! Agents and whoever stands between, or looks at what is left: enrolment and registration cut before each single message, and core
//! dumps of both programs. Real processes.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::{
    Daemon, Fault, Finished, Proxy, Running, Scratch, Way, free_port, run, story, wait_until,
};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");
const LIMIT: Duration = Duration::from_secs(120);
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
listen = "127.0.0.1:$AGENTS"
"#;

/// An agent's program with files of its own.
struct Agent {
    file: PathBuf,
    dir: PathBuf,
}

impl Agent {
    fn new(scratch: &Scratch, name: &str) -> Result<Self> {
        let dir = scratch.file(name);
        fs::create_dir(&dir)?;
        let at = |name: &str| dir.join(name).display().to_string();
        let text = format!(
            "listen = \"127.0.0.1:{}\"\nstate_dir = \"{}\"\nrun_dir = \"{}\"\nhooks_dir = \"{}\"\nlog = \"debug\"\n",
            free_port()?,
            at("state"),
            at("run"),
            at("hooks.d")
        );
        let file = dir.join("agent.toml");
        fs::write(&file, text)?;
        Ok(Self { file, dir })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(AGENT);
        command.arg("--config").arg(&self.file).current_dir(&self.dir);
        command.env_remove("RUST_LOG").env_remove("STILLPOINT_FULL_CORE");
        command
    }

    fn enrol(&self, token: &str, port: u16) -> Result<Finished> {
        let invitation = format!("{token}@127.0.0.1:{port}");
        run(self.command().args(["--json", "enrol", &invitation]), LIMIT)
    }

    fn status(&self) -> Result<Value> {
        let status = run(self.command().args(["--json", "status"]), LIMIT)?;
        Ok(serde_json::from_str(&status.stdout)?)
    }

    fn start(&self) -> Result<Running> {
        Running::start(
            "stillpoint-agent",
            self.command().arg("run"),
            &self.dir.join("log"),
        )
    }
}

fn token(daemon: &Daemon) -> Result<String> {
    let created = daemon.json(&["agent", "token", "create", "--lun", "app"])?;
    Ok(created["token"].as_str().context("a token")?.to_owned())
}

fn agents(daemon: &Daemon) -> Result<Vec<Value>> {
    Ok(daemon
        .json(&["agent", "list"])?
        .as_array()
        .cloned()
        .unwrap_or_default())
}

/// Whatever is lost on the way: the agent never trusts a target that does not know it, and the operator gets through in the end.
#[test]
fn an_enrolment_that_is_cut_before_any_message_can_be_made_again() {
    story("enrolment faults", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let proxy = Proxy::start()?;
        proxy.lead_to(daemon.agent_port());
        let peace = Agent::new(scratch, "peace")?;
        peace.enrol(&token(&daemon)?, proxy.port())?.success()?;
        let records = [Way::There, Way::Back].map(|way| (way, proxy.records(way)));
        println!("records of an enrolment: {records:?}");
        let mut ends = std::collections::BTreeMap::new();
        for (way, count) in records {
            for record in 0..count {
                let end = enrol_with(
                    scratch,
                    &daemon,
                    &proxy,
                    Fault {
                        way,
                        record,
                        stall: None,
                    },
                );
                *ends
                    .entry(end.with_context(|| format!("{way:?} {record}"))?)
                    .or_insert(0) += 1;
            }
        }
        println!("ends: {ends:?}");
        ensure!(ends.len() >= 2, "nothing was cut: {ends:?}");
        Ok(())
    });
}

fn enrol_with(scratch: &Scratch, daemon: &Daemon, proxy: &Proxy, fault: Fault) -> Result<&'static str> {
    let agent = Agent::new(
        scratch,
        &format!("{:?}{}", fault.way, fault.record).to_lowercase(),
    )?;
    let first = token(daemon)?;
    proxy.arm(Some(fault));
    let finished = agent.enrol(&first, proxy.port())?;
    proxy.arm(None);
    ensure!([0, 3, 4].contains(&finished.code), "{finished:?}");
    ensure!(
        !finished.stderr.contains("SP1-"),
        "the token is a secret: {}",
        finished.stderr
    );
    let status = agent.status()?;
    let id = status["agent_id"].as_str().context("an id")?.to_owned();
    let trusts = status["targets"]
        .as_array()
        .is_some_and(|targets| !targets.is_empty());
    let known = agents(daemon)?.iter().any(|one| one["id"] == id.as_str());
    ensure!(trusts == (finished.code == 0), "{finished:?}: {status}");
    ensure!(
        !trusts || known,
        "the agent trusts a target that does not know it"
    );
    if trusts {
        return Ok("enrolled");
    }
    if !known {
        // The token was not used: it is still good.
        agent.enrol(&first, proxy.port())?.success()?;
        return Ok("again with the same token");
    }
    // The answer was lost. No token replaces a pin silently: it is said, and helped by a revoke.
    let refused = agent.enrol(&token(daemon)?, proxy.port())?.refused(3)?;
    ensure!(refused.contains("agent revoke"), "{refused}");
    daemon.text(&["agent", "revoke", &id, "--yes"])?;
    agent.enrol(&token(daemon)?, proxy.port())?.success()?;
    Ok("again after a revoke")
}

#[test]
fn a_registration_that_is_cut_before_any_message_is_made_again() {
    story("registration faults", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let proxy = Proxy::start()?;
        proxy.lead_to(daemon.agent_port());
        let agent = Agent::new(scratch, "agent")?;
        agent.enrol(&token(&daemon)?, proxy.port())?.success()?;
        let state = |wanted: &str| {
            wait_until(&format!("the agent to be {wanted}"), LIMIT, || {
                Ok(agents(&daemon)?.first().is_some_and(|one| one["state"] == wanted))
            })
        };
        let running = agent.start()?;
        state("connected")?;
        let records = [Way::There, Way::Back].map(|way| (way, proxy.records(way)));
        println!("records of a registration: {records:?}");
        drop(running);
        state("disconnected")?;
        for (way, count) in records {
            for record in 0..count {
                let before = proxy.accepted();
                proxy.arm(Some(Fault {
                    way,
                    record,
                    stall: None,
                }));
                let running = agent.start()?;
                wait_until("the agent to come back by itself", LIMIT, || {
                    Ok(proxy.accepted() >= before + 2)
                })
                .with_context(|| format!("{way:?} {record}"))?;
                proxy.arm(None);
                state("connected").with_context(|| format!("{way:?} {record}"))?;
                ensure!(agents(&daemon)?.len() == 1, "one agent, however often it came");
                drop(running);
                state("disconnected")?;
            }
        }
        Ok(())
    });
}

/// A core dump, and what `gcore` would write, show neither tokens nor keys.
#[test]
fn no_core_shows_a_secret() {
    story("cores", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let token = token(&daemon)?;
        let pid = daemon.pid().context("it runs")?;
        let shown = aborted(pid, daemon.dir(), || daemon.signal(Signal::ABORT))?;
        daemon.kill()?;
        let secrets = [
            secret_of(&token)?,
            token.trim_start_matches("SP1-").as_bytes().to_vec(),
            pem_line(&daemon.data().join("agents/identity.pem"))?,
        ];
        let Some(core) = shown else { return Ok(()) };
        for secret in &secrets {
            ensure!(!holds(&core, secret)?, "the daemon's core shows a secret");
        }
        // The search can find them: with its memory, a core does show the token that still waits.
        let mut whole = Command::new(BINARY);
        whole.args(["serve", "--config"]).arg(daemon.config());
        whole.current_dir(daemon.dir()).env("STILLPOINT_FULL_CORE", "1");
        let running = Running::start("stillpoint serve", &mut whole, &daemon.dir().join("whole.log"))?;
        wait_until("the daemon to answer", LIMIT, || {
            Ok(daemon.cli(&["status"])?.code == 0)
        })?;
        let again = self::token(&daemon)?;
        let core = aborted(running.id(), daemon.dir(), || running.signal(Signal::ABORT))?;
        let core = core.context("there was a core before")?;
        ensure!(
            holds(&core, &secret_of(&again)?)?,
            "the search finds nothing even where it must"
        );

        let agent = Agent::new(scratch, "agent")?;
        let running = agent.start()?;
        wait_until("the agent's key", LIMIT, || {
            Ok(agent.dir.join("state/cert.pem").exists())
        })?;
        let key = pem_line(&agent.dir.join("state/key.pem"))?;
        let core = aborted(running.id(), &agent.dir, || running.signal(Signal::ABORT))?;
        ensure!(
            !holds(&core.context("a core")?, &key)?,
            "the agent's core shows its key"
        );
        Ok(())
    });
}

/// Ends a process by `abort`; its core. `None`, said loudly, where the kernel hands cores to another program.
fn aborted(pid: u32, dir: &Path, abort: impl FnOnce() -> Result<()>) -> Result<Option<PathBuf>> {
    let limit = ["--pid", &pid.to_string(), "--core=unlimited"];
    run(Command::new("prlimit").args(limit), LIMIT)?.success()?;
    let filter = || fs::read_to_string(format!("/proc/{pid}/coredump_filter"));
    println!("coredump_filter of {pid}: {}", filter()?.trim());
    abort()?;
    wait_until("the process to end", LIMIT, || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        Ok(stat.is_empty() || stat.contains(") Z "))
    })?;
    let written = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let is_core = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("core"))
    };
    let Some(core) = written.into_iter().find(is_core) else {
        let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern")?;
        eprintln!(
            "SKIPPED: the kernel writes no core here: core_pattern is {}",
            pattern.trim()
        );
        return Ok(None);
    };
    let kept = dir.join(format!("dump-{pid}"));
    fs::rename(&core, &kept)?;
    Ok(Some(kept))
}

/// The 16 bytes that a token hides (agent-protocol.md §2).
fn secret_of(token: &str) -> Result<Vec<u8>> {
    let text = token.trim_start_matches("SP1-").as_bytes();
    let bytes = data_encoding::BASE32_NOPAD.decode(text)?;
    Ok(bytes.get(..16).context("a secret")?.to_vec())
}

/// The second line of a PEM file: the key itself.
fn pem_line(path: &Path) -> Result<Vec<u8>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let after = text.split("PRIVATE KEY-----\n").nth(1).context("a private key")?;
    let line = after.lines().next().context("its first line")?;
    Ok(line.as_bytes().to_vec())
}

/// A core has the size of its process's address space and is mostly holes, which hold nothing.
fn holds(core: &Path, secret: &[u8]) -> Result<bool> {
    let file = fs::File::open(core)?;
    let mut offset = 0;
    loop {
        let begin = match seek(&file, SeekFrom::Data(offset)) {
            Ok(begin) => begin,
            Err(rustix::io::Errno::NXIO) => return Ok(false),
            Err(error) => return Err(error).with_context(|| core.display().to_string()),
        };
        offset = seek(&file, SeekFrom::Hole(begin))?;
        let mut bytes = vec![0; usize::try_from(offset - begin)?];
        file.read_exact_at(&mut bytes, begin)?;
        if bytes.windows(secret.len()).any(|window| window == secret) {
            return Ok(true);
        }
    }
}
