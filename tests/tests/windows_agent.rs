//! The agent for Windows under Wine, with the real daemon over loopback. VSS is a stand-in (tests/windows/vssapi.c) that records the order of
//! the calls, plays writers, and drives the agent's hardware provider through its COM tables. Only `tests/run-windows` runs this.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::{Daemon, Finished, Running, Scratch, free_port, run, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const LIMIT: Duration = Duration::from_secs(120);
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

/// A path of this host as Wine's programs see it.
fn seen(path: &Path) -> String {
    format!("Z:{}", path.display()).replace('/', "\\")
}

struct Scene {
    daemon: Daemon,
    agent: Option<Running>,
    windows: PathBuf,
    dir: PathBuf,
    port: u16,
    naa: String,
    serial: String,
    taken: u32,
}

impl Scene {
    fn new(scratch: &Scratch) -> Result<Self> {
        let windows = std::env::var_os("STILLPOINT_WINDOWS").context("run this with tests/run-windows")?;
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let shown = daemon.json(&["lun", "show", "app"])?;
        let naa = shown["naa"].as_str().context("its identity")?.to_owned();
        let serial = shown["serial"].as_str().context("its serial number")?.to_owned();
        let scene = Self {
            daemon,
            agent: None,
            windows: PathBuf::from(windows),
            dir: scratch.path().to_owned(),
            port: free_port()?,
            naa,
            serial,
            taken: 0,
        };
        fs::create_dir(scene.dir.join("ps"))?;
        scene.configure("")?;
        Ok(scene)
    }

    fn configure(&self, more: &str) -> Result<()> {
        let text = format!(
            "listen = '127.0.0.1:{}'\nstate_dir = '{}'\nmin_interval_s = 1\nlog = 'debug'\n\
             initiators = ['iqn.2026-11.test.host:app']\n{more}\n\
             [hyperv]\ncheckpoints = '{}'\npowershell = '{}'\n\
             [[test_lun]]\npath = 'S:\\'\nnaa = '{}'\nserial = '{}'\n",
            self.port,
            seen(&self.dir.join("state")),
            if more.contains("# memory") {
                "memory"
            } else {
                "production"
            },
            seen(&self.windows.join("agent/powershell.exe")),
            self.naa,
            self.serial,
        );
        Ok(fs::write(self.dir.join("agent.toml"), text)?)
    }

    /// The agent's program under Wine, with the stand-ins.
    fn program(&self) -> Command {
        let mut command = Command::new(self.windows.join("bin/wine"));
        command
            .arg(self.windows.join("agent/stillpoint-agent.exe"))
            .args(["--config", &seen(&self.dir.join("agent.toml"))])
            .env("WINEPREFIX", self.windows.join("prefix"))
            .env("WINEDLLOVERRIDES", "vssapi=n")
            .env("STANDIN_LOG", seen(&self.dir.join("calls")))
            .env("STANDIN_BEHAVIOUR", seen(&self.dir.join("behaviour")))
            .env("STANDIN_PS", self.dir.join("ps"))
            .env_remove("RUST_LOG");
        command
    }

    fn verb(&self, arguments: &[&str]) -> Result<Finished> {
        run(self.program().args(arguments), LIMIT)
    }

    fn start(&mut self) -> Result<()> {
        self.agent = None;
        let agent = Running::start(
            "stillpoint-agent.exe",
            self.program().arg("run"),
            &self.dir.join("agent.log"),
        )?;
        self.agent = Some(agent);
        self.connected()
    }

    fn connected(&self) -> Result<()> {
        wait_until("the agent to be connected", LIMIT, || {
            Ok(self.daemon.json(&["agent", "list"])?[0]["state"] == "connected")
        })
    }

    fn behave(&self, lines: &str) -> Result<()> {
        fs::write(self.dir.join("calls"), "")?;
        let naa = self.naa.trim_start_matches("naa.");
        Ok(fs::write(
            self.dir.join("behaviour"),
            format!("naa={naa}\n{lines}"),
        )?)
    }

    fn calls(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.dir.join("calls"))?;
        Ok(text.lines().map(ToOwned::to_owned).collect())
    }

    /// One snapshot; `policy` is its `--on-failure`.
    fn snapshot(&mut self, policy: &str) -> Result<Finished> {
        self.taken += 1;
        // The agent's rest between two freezes of a LUN.
        std::thread::sleep(Duration::from_millis(1100));
        let name = format!("s{}", self.taken);
        self.daemon.cli(&[
            "--json",
            "snapshot",
            "create",
            "app",
            "--name",
            &name,
            "--consistency",
            "application",
            "--on-failure",
            policy,
        ])
    }

    fn taken(&mut self) -> Result<Value> {
        let finished = self.snapshot("fail")?;
        ensure!(finished.code == 0, "{finished:?}\n{:#?}", self.calls()?);
        Ok(serde_json::from_str(&finished.stdout)?)
    }

    /// The requester has let go of VSS: nothing is left of the backup.
    fn let_go(&self) -> Result<()> {
        wait_until("the backup to be over", LIMIT, || {
            Ok(self.calls()?.last().is_some_and(|call| call == "Release"))
        })
    }
}

fn position(calls: &[String], word: &str) -> Result<usize> {
    let found = calls.iter().position(|call| call.starts_with(word));
    found.with_context(|| format!("no {word} in {calls:#?}"))
}

fn ensure_order(calls: &[String], words: &[&str]) -> Result<()> {
    let mut rest = calls;
    for word in words {
        let at = position(rest, word).with_context(|| format!("in {calls:#?}"))?;
        rest = rest.get(at + 1..).unwrap_or_default();
    }
    Ok(())
}

#[test]
fn windows_agent() {
    story("windows agent", |scratch| {
        let mut scene = Scene::new(scratch)?;
        enrolment(&mut scene)?;
        whole_order(&mut scene)?;
        slow_writers(&mut scene)?;
        failing_writers(&mut scene)?;
        lost_target(&mut scene)?;
        features(&mut scene)?;
        memory(&mut scene)
    });
}

/// Enrolled with a token, registered, and reached on its port.
fn enrolment(scene: &mut Scene) -> Result<()> {
    let before = scene.verb(&["status"])?;
    ensure!(
        before.code == 4 && before.stdout.contains("not enrolled"),
        "{before:?}"
    );
    let created = scene.daemon.json(&["agent", "token", "create", "--lun", "app"])?;
    let token = created["token"].as_str().context("a token")?;
    let invitation = format!("{token}@127.0.0.1:{}", scene.daemon.agent_port());
    scene.verb(&["enrol", &invitation])?.success()?;
    let again = scene.verb(&["enrol", &invitation])?;
    ensure!(again.code == 3, "a token is good once: {again:?}");
    scene.start()?;
    let text = scene.daemon.json(&["agent", "list"])?.to_string();
    ensure!(
        text.contains("vss-requester") && text.contains("vss-provider"),
        "{text}"
    );
    let status: Value = serde_json::from_str(&scene.verb(&["status", "--json"])?.success()?)?;
    ensure!(
        status["running"] == true && status["targets"][0]["connection"]["state"] == "registered",
        "{status}"
    );
    Ok(())
}

/// Every call of §9, in its order; the level is proved.
fn whole_order(scene: &mut Scene) -> Result<()> {
    scene.behave("sql=S:\\db\nvm=C:\\vm\\web01\n")?;
    let created = scene.taken()?;
    ensure!(created["consistency"] == "application", "{created}");
    let shown = scene.daemon.json(&["snapshot", "show", "app@s1"])?.to_string();
    ensure!(
        shown.contains("SqlServerWriter") && !shown.contains("web01"),
        "{shown}"
    );
    scene.let_go()?;
    let calls = scene.calls()?;
    ensure_order(
        &calls,
        &[
            "InitializeForBackup",
            "SetBackupState select=1 type=5 partial=0",
            "SetContext 200002b",
            "GatherWriterMetadata",
            "AddComponent SRV\\INSTANCE sales type=1",
            "StartSnapshotSet",
            "AddToSnapshotSet S:\\",
            "PrepareForBackup",
            "GatherWriterStatus",
            "DoSnapshotSet",
            "AreLunsSupported 00000000 1",
            "BeginPrepareSnapshot 00000000",
            "EndPrepareSnapshots 00000000",
            "PreCommitSnapshots 00000000",
            "CommitSnapshots 00000000",
            "PostCommitSnapshots 00000000",
            "GetTargetLuns 00000000 3",
            "DoSnapshotSet ends 00000000",
            "GatherWriterStatus",
            "SetBackupSucceeded sales 1",
            "BackupComplete",
            "Release",
        ],
    )?;
    ensure!(
        !calls
            .iter()
            .any(|call| call.starts_with("AbortBackup") || call.contains("6A1C22B0")),
        "{calls:#?}"
    );
    Ok(())
}

/// Writers that freeze for longer than any hold: the hold begins at PreCommitSnapshots. (40 s with `STILLPOINT_SOAK_FREEZE=1`.)
fn slow_writers(scene: &mut Scene) -> Result<()> {
    let ms = if std::env::var_os("STILLPOINT_SOAK_FREEZE").is_some() {
        40_000
    } else {
        11_000
    };
    scene.behave(&format!("sql=S:\\db\nfreeze_ms={ms}\n"))?;
    let created = scene.taken()?;
    ensure!(created["consistency"] == "application", "{created}");
    scene.let_go()
}

/// Whatever a writer does wrong: no level that was not proved, and nothing stays held.
fn failing_writers(scene: &mut Scene) -> Result<()> {
    for (fail, why, held) in [
        ("prepare", "FAILED_AT_PREPARE_BACKUP", false),
        ("freeze", "UNEXPECTED_WRITER_ERROR", false),
        ("thaw", "FAILED_AT_THAW", true),
        ("gone", "SqlServerWriter failed", true),
        ("nocommit", "without Stillpoint's provider", false),
    ] {
        scene.behave(&format!("sql=S:\\db\nfail={fail}\n"))?;
        let refused = scene.snapshot("fail")?;
        ensure!(refused.code == 3, "{fail}: {refused:?}");
        scene.let_go()?;
        let calls = scene.calls()?;
        ensure!(
            calls.iter().any(|call| call == "CommitSnapshots 00000000") == held,
            "{fail}: {calls:#?}"
        );
        // What failed before the end was given up as a backup.
        ensure!(
            held || calls.iter().any(|call| call == "AbortBackup"),
            "{fail}: {calls:#?}"
        );
        let text = format!(
            "{}{}",
            refused.stderr,
            scene.agent.as_ref().context("the agent")?.output()
        );
        ensure!(text.contains(why), "{fail}: {text}");
    }
    scene.behave("sql=S:\\db\nfail=thaw\n")?;
    let kept = scene.snapshot("crash-consistent")?;
    let created: Value = serde_json::from_str(&kept.clone().success()?)?;
    ensure!(created["consistency"] == "crash", "{created}");
    scene.let_go()
}

/// The target stands still while VSS freezes: VSS is told a veto as soon as nothing is heard.
fn lost_target(scene: &mut Scene) -> Result<()> {
    scene.behave("sql=S:\\db\nfreeze_ms=1500\n")?;
    let result = std::thread::scope(|scope| -> Result<()> {
        let name = "lost";
        let daemon = &scene.daemon;
        let creating = scope.spawn(move || {
            daemon.cli(&[
                "snapshot",
                "create",
                "app",
                "--name",
                name,
                "--consistency",
                "application",
            ])
        });
        wait_until("the freeze", LIMIT, || {
            Ok(scene.calls()?.iter().any(|call| call == "DoSnapshotSet"))
        })?;
        scene.daemon.signal(Signal::STOP)?;
        let ended = wait_until("VSS to be let go", LIMIT, || {
            Ok(scene
                .calls()?
                .iter()
                .any(|call| call.starts_with("DoSnapshotSet ends")))
        });
        scene.daemon.signal(Signal::CONT)?;
        ended?;
        let finished = creating
            .join()
            .map_err(|_| anyhow::anyhow!("the command's thread"))??;
        ensure!(finished.code == 3, "{finished:?}");
        Ok(())
    });
    result?;
    scene.let_go()?;
    let calls = scene.calls()?;
    ensure!(
        !calls
            .iter()
            .any(|call| call == "CommitSnapshots 00000000" || call == "BackupComplete"),
        "{calls:#?}"
    );
    ensure_order(&calls, &["AbortSnapshots 00000000", "AbortBackup", "Release"])?;
    scene.connected()
}

/// Chosen and changed without a new enrolment.
fn features(scene: &mut Scene) -> Result<()> {
    let told =
        |scene: &Scene, word: &str| Ok(scene.daemon.json(&["agent", "list"])?.to_string().contains(word));
    scene
        .verb(&["features", "--disable", "vss-requester", "--disable", "mssql"])?
        .success()?;
    wait_until("the target to be told", LIMIT, || Ok(!told(scene, "mssql")?))?;
    scene.connected()?;
    scene.behave("sql=S:\\db\n")?;
    let refused = scene.snapshot("fail")?;
    ensure!(refused.code == 3 && scene.calls()?.is_empty(), "{refused:?}");
    scene
        .verb(&["features", "--enable", "vss-requester", "--enable", "mssql"])?
        .success()?;
    wait_until("the target to be told", LIMIT, || told(scene, "mssql"))?;
    scene.connected()?;
    let created = scene.taken()?;
    ensure!(created["consistency"] == "application", "{created}");
    scene.let_go()
}

/// Checkpoints with memory: made before the freeze, removed after the snapshot; the VM counts as an application.
fn memory(scene: &mut Scene) -> Result<()> {
    scene.configure("# memory")?;
    let ps = scene.dir.join("ps");
    fs::write(
        ps.join("vms.json"),
        r#"[{"id":"a1","name":"web01","state":"Running","paths":["S:\\vm\\web01"]},
            {"id":"a2","name":"other","state":"Running","paths":["C:\\vm\\other"]}]"#,
    )?;
    scene.start()?;
    scene.behave("vm=S:\\vm\\web01\n")?;
    let created = scene.taken()?;
    ensure!(created["consistency"] == "application", "{created}");
    scene.let_go()?;
    ensure!(
        !scene.calls()?.iter().any(|call| call.starts_with("AddComponent")),
        "no second checkpoint through the writer"
    );
    wait_until("the checkpoint to be removed", LIMIT, || {
        Ok(fs::read_to_string(ps.join("log"))?
            .lines()
            .any(|line| line.starts_with("remove a1 stillpoint-")))
    })?;
    let log = fs::read_to_string(ps.join("log"))?;
    ensure!(log.matches("make ").count() == 1 && !log.contains("a2"), "{log}");
    // One that cannot be made: the VM is named, and nothing is claimed for it.
    fs::write(ps.join("refuse"), "")?;
    let refused = scene.snapshot("fail")?;
    ensure!(refused.code == 3, "{refused:?}");
    ensure!(
        refused.stderr.contains("web01") || refused.stdout.contains("web01"),
        "{refused:?}"
    );
    Ok(())
}
