//! VMs on a LUN: their vCenter (govmomi's simulator with our extension), the real agent, the real daemon.
//!
//! `STILLPOINT_SOAK_FAULTS=1` (minutes) breaks every single call to the vCenter in each way, instead of the first of each kind that changes
//! something in two ways, and kills either end at each of these.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{
    Daemon, Finished, PASSWORD, Running, Scratch, USER, Vcsim, free_port, qemu_io, run, story, wait_until,
};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");
const LIMIT: Duration = Duration::from_secs(120);
const IQN: &str = "iqn.2026-11.test:vms";
const HOSTS: [&str; 3] = [
    "iqn.1998-01.com.vmware:esx0",
    "iqn.1998-01.com.vmware:esx1",
    "iqn.1998-01.com.vmware:esx2",
];
const CONFIG: &str = r#"
[[portal]]
address = "127.0.0.1:$PORT"

[[lun]]
name = "vms"
size = "64MiB"

[[target]]
iqn = "iqn.2026-11.test:vms"
luns = ["vms"]
initiators = ["*"]
agents = true

[agents]
listen = "127.0.0.1:$AGENTS"
"#;
/// The agent looks at the vCenter for an answer; between two looks of its own, its registration follows within seconds.
const VM: &str = "DC0_C0_RP0_VM0";

/// Daemon, agent and vCenter.
struct Scene {
    daemon: Daemon,
    vcsim: Vcsim,
    agent: Option<Running>,
    dir: PathBuf,
}

/// One of the two states in which a revert may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    Reverted,
}

impl Scene {
    fn new(scratch: &Scratch) -> Result<Self> {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let dir = scratch.path().to_owned();
        let naa = daemon.json(&["lun", "show", "vms"])?["naa"]
            .as_str()
            .context("an naa")?
            .to_owned();
        let content = dir.join("content");
        let script = format!(
            "#!/bin/sh\nnow=$({BINARY} --config {} --json snapshot list vms | grep -c before-revert)\n\
             [ \"$now\" -gt \"$(cat {}/baseline)\" ] && echo cut\nexit 0\n",
            daemon.config().display(),
            dir.display()
        );
        fs::write(&content, script)?;
        fs::set_permissions(&content, fs::Permissions::from_mode(0o755))?;
        fs::write(dir.join("baseline"), "0")?;
        let vcsim = Vcsim::start(&dir, &naa, &HOSTS, &content)?;
        let text = format!(
            "listen = \"127.0.0.1:{}\"\nstate_dir = \"{dir}/agent-state\"\nrun_dir = \"{dir}/agent-run\"\nhooks_dir = \"{dir}/hooks.d\"\n\
             min_interval_s = 1\nlog = \"debug\"\n",
            free_port()?,
            dir = dir.display()
        );
        fs::write(dir.join("agent.toml"), text)?;
        fs::write(dir.join("password"), format!("{PASSWORD}\n"))?;
        Ok(Self {
            daemon,
            vcsim,
            agent: None,
            dir,
        })
    }

    fn agent_cli(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(AGENT);
        command
            .arg("--config")
            .arg(self.dir.join("agent.toml"))
            .args(arguments);
        run(&mut command, LIMIT)
    }

    fn set(&self, fingerprint: &str, more: &[&str]) -> Result<Finished> {
        let password = self.dir.join("password").display().to_string();
        let base = [
            "--json",
            "vcenter",
            "set",
            self.vcsim.sdk(),
            "--user",
            USER,
            "--password-file",
            &password,
            "--fingerprint",
            fingerprint,
        ];
        self.agent_cli(&[&base, more].concat())
    }

    fn enrol(&mut self) -> Result<()> {
        let created = self.daemon.json(&["agent", "token", "create", "--lun", "vms"])?;
        let token = created["token"].as_str().context("a token")?;
        self.agent_cli(&[
            "enrol",
            &format!("{token}@127.0.0.1:{}", self.daemon.agent_port()),
        ])?
        .success()?;
        self.start_agent()
    }

    fn start_agent(&mut self) -> Result<()> {
        self.agent = None;
        let mut command = Command::new(AGENT);
        command
            .arg("--config")
            .arg(self.dir.join("agent.toml"))
            .arg("run");
        self.agent = Some(Running::start(
            "stillpoint-agent",
            &mut command,
            &self.dir.join("agent.log"),
        )?);
        self.wait_agent()
    }

    fn wait_agent(&self) -> Result<()> {
        wait_until("the agent to be connected with the datastore", LIMIT, || {
            let agents = self.daemon.json(&["agent", "list"])?;
            Ok(agents[0]["state"] == "connected" && agents[0]["mounted"].to_string().contains("vms"))
        })
    }

    fn create(&self, name: &str, policy: &str) -> Result<Finished> {
        let arguments = [
            "--json",
            "snapshot",
            "create",
            "vms",
            "--name",
            name,
            "--consistency",
            "application",
            "--on-failure",
            policy,
        ];
        self.daemon.cli(&arguments)
    }

    fn revert(&self, more: &[&str]) -> Result<Finished> {
        self.daemon
            .cli(&[&["--json", "--yes", "snapshot", "revert", "vms@base"], more].concat())
    }

    /// Nothing of ours is left on any VM.
    fn ensure_no_leftovers(&self) -> Result<()> {
        let state = self.vcsim.state()?;
        let vms = state["vms"].as_array().context("VMs")?;
        for vm in vms {
            ensure!(!vm["snapshots"].to_string().contains("stillpoint-"), "{vm}");
        }
        Ok(())
    }

    /// Changes the LUN, so that the snapshot's content and its own differ.
    fn write(&self, byte: u8) -> Result<()> {
        qemu_io(&self.daemon.url(IQN, 0), &[&format!("write -P {byte} 0 4096")])?
            .success()
            .map(drop)
    }

    /// What the LUN holds.
    fn content(&self) -> Result<State> {
        let changed = self.daemon.json(&["snapshot", "diff", "vms@base"])?["changed_bytes"].as_u64();
        Ok(if changed == Some(0) {
            State::Reverted
        } else {
            State::Before
        })
    }

    fn baseline(&self) -> Result<()> {
        let list = self.daemon.json(&["snapshot", "list", "vms"])?;
        let count = list
            .as_array()
            .context("a list")?
            .iter()
            .filter(|s| s["name"].to_string().contains("before-revert"))
            .count();
        Ok(fs::write(self.dir.join("baseline"), count.to_string())?)
    }

    /// Every host has the LUN and the datastore, every VM runs where it ran: what both honest states have in common.
    fn is_whole(&self) -> Result<bool> {
        let state = self.vcsim.state()?;
        let hosts = state["hosts"].as_array().context("hosts")?;
        let vms = state["vms"].as_array().context("VMs")?;
        let attached = |host: &Value| {
            host["luns"]
                .as_object()
                .is_some_and(|luns| luns.values().all(|lun| lun == "ok"))
        };
        let mounted = |host: &Value| host["mounted"].to_string().contains("LocalDS_0");
        let runs = |vm: &Value| vm["power"] == "poweredOn" && !vm["host"].to_string().is_empty();
        Ok(
            hosts.iter().all(|host| attached(host) && mounted(host))
                && vms.len() == 3
                && vms.iter().all(runs),
        )
    }

    /// Waits until the revert has come to its end, and looks which one it is.
    fn settle(&self, what: &str) -> Result<State> {
        wait_until(&format!("the inventory to be whole after {what}"), LIMIT, || {
            self.is_whole()
        })?;
        let text = self.daemon.text(&["snapshot", "list", "vms"])?;
        ensure!(!text.is_empty());
        self.content()
    }
}

#[test]
fn a_snapshot_with_vms_and_what_keeps_them_out() {
    story("vcenter snapshots", |scratch| {
        let mut scene = Scene::new(scratch)?;
        let wrong = "AA".repeat(32);
        ensure!(
            scene.set(&wrong, &[])?.code == 3,
            "a certificate that is not the confirmed one"
        );
        let fingerprint = scene.vcsim.fingerprint().to_owned();
        ensure!(
            scene.vcsim.state()?["calls"].is_null(),
            "nothing may be sent to it"
        );
        scene.set(&fingerprint, &["--mode", "quiesce"])?.success()?;
        let test = scene.agent_cli(&["--json", "vcenter", "test"])?.success()?;
        ensure!(test.contains("LocalDS_0") && !test.contains(PASSWORD), "{test}");
        scene.enrol()?;
        for (mode, how) in [
            ("quiesce", "quiesced"),
            ("memory", "memory"),
            ("both", "quiesced"),
        ] {
            scene.set(&fingerprint, &["--mode", mode])?.success()?;
            let created: Value = serde_json::from_str(&scene.create(mode, "fail")?.success()?)?;
            ensure!(created["consistency"] == "application", "{created}");
            let apps = &created["agents"][0]["apps"];
            ensure!(apps.as_array().is_some_and(|apps| apps.len() == 3), "{created}");
            ensure!(apps[0]["version"] == how, "{created}");
            scene.ensure_no_leftovers()?;
        }
        scene
            .set(
                &fingerprint,
                &["--mode", "quiesce", "--vm", &format!("{VM}=plain")],
            )?
            .success()?;
        ensure!(
            scene.create("refused", "fail")?.code == 3,
            "a VM that is taken plain proves nothing"
        );
        let weaker: Value = serde_json::from_str(&scene.create("weaker", "crash-consistent")?.success()?)?;
        ensure!(
            weaker["consistency"] == "crash" && weaker.to_string().contains(VM),
            "{weaker}"
        );
        scene.ensure_no_leftovers()?;
        scene
            .set(&fingerprint, &["--vm", &format!("{VM}=quiesce")])?
            .success()?;
        for (what, word) in [
            ("notools", "VMware Tools"),
            ("independent", "independent disk"),
            ("busshare", "shares its bus"),
            ("passthrough", "passed through"),
            ("ft", "Fault Tolerance"),
            ("spread", "not on one LUN"),
            ("rdm", "raw device mapping"),
        ] {
            scene.vcsim.vm(VM, what)?;
            let found = scene.daemon.cli(&["--json", "lun", "preflight", "vms"])?;
            ensure!(
                found.code == 3 && found.stdout.contains(word) && found.stdout.contains(VM),
                "{what}: {found:?}"
            );
        }
        let refused = scene.create("excluded", "fail")?;
        ensure!(refused.code == 3 && refused.stderr.contains(VM), "{refused:?}");
        let agent_log = fs::read_to_string(scene.dir.join("agent.log"))?;
        ensure!(
            !agent_log.contains(PASSWORD) && !scene.daemon.log().contains(PASSWORD),
            "the password is in a log"
        );
        Ok(())
    });
}

#[test]
fn a_snapshot_survives_a_lost_call_and_a_killed_agent() {
    story("vcenter faults of snapshots", |scratch| {
        let mut scene = Scene::new(scratch)?;
        let fingerprint = scene.vcsim.fingerprint().to_owned();
        scene.set(&fingerprint, &["--mode", "quiesce"])?.success()?;
        scene.enrol()?;
        for (at, (method, kind)) in [
            ("CreateSnapshot_Task", "lost"),
            ("CreateSnapshot_Task", "fault"),
            ("CreateSnapshot_Task", "drop"),
            ("RemoveSnapshot_Task", "lost"),
            ("RemoveSnapshot_Task", "fault"),
            ("WaitForUpdatesEx", "drop"),
        ]
        .into_iter()
        .enumerate()
        {
            scene.vcsim.reset()?;
            scene
                .vcsim
                .rule(&format!("{{\"Method\": \"{method}\", \"Kind\": \"{kind}\"}}"))?;
            let end = scene.create(&format!("s{at}"), "fail")?;
            ensure!([0, 3].contains(&end.code), "{method} {kind}: {end:?}");
            scene
                .ensure_no_leftovers()
                .with_context(|| format!("{method} {kind}: {end:?}"))?;
        }
        // Killed with the VM snapshots made: the next start removes them.
        scene.vcsim.reset()?;
        scene
            .vcsim
            .rule("{\"Method\": \"RemoveSnapshot_Task\", \"Kind\": \"drop\", \"Times\": 1000}")?;
        let made = scene.create("kept", "fail")?;
        ensure!(made.code == 0, "{made:?}");
        let left = scene.vcsim.state()?["vms"].to_string();
        ensure!(left.contains("stillpoint-"), "the rule kept them: {left}");
        scene.agent = None;
        scene.vcsim.reset()?;
        scene.start_agent()?;
        wait_until("the leftovers to be swept", LIMIT, || {
            Ok(scene.ensure_no_leftovers().is_ok())
        })
    });
}

#[test]
fn an_online_revert_ends_in_one_of_two_states() {
    story("vcenter revert", |scratch| {
        let mut scene = Scene::new(scratch)?;
        let fingerprint = scene.vcsim.fingerprint().to_owned();
        scene.set(&fingerprint, &["--mode", "quiesce"])?.success()?;
        scene.enrol()?;
        scene.create("base", "fail")?.success()?;
        scene
            .vcsim
            .control("/file?ds=LocalDS_0&path=stray/stray.vmx", "")?;
        scene.write(1)?;

        let plan: Value = serde_json::from_str(&scene.revert(&["--plan"])?.success()?)?;
        ensure!(
            plan["vms"].to_string().contains("stray.vmx") && plan["vms"].to_string().contains(VM),
            "{plan}"
        );
        ensure!(
            plan["hosts"].as_array().is_some_and(|hosts| hosts.len() == 3),
            "{plan}"
        );
        let refused = scene.revert(&[])?;
        ensure!(
            refused.code == 3 && refused.stderr.contains("power-off"),
            "{refused:?}"
        );
        ensure!(scene.settle("a refusal")? == State::Before);

        let began = std::time::Instant::now();
        scene.baseline()?;
        scene.vcsim.reset()?;
        let reverted = scene.revert(&["--power-off"])?.success()?;
        ensure!(scene.settle("a revert")? == State::Reverted, "{reverted}");
        let state = scene.vcsim.state()?;
        ensure!(
            !state["vms"].to_string().contains("stray"),
            "a VM that was in no inventory stays out"
        );
        let calls = state["calls"].as_array().context("calls")?.clone();
        ensure!(
            calls
                .iter()
                .filter(|call| *call == "RevertToSnapshot_Task")
                .count()
                == 3,
            "{calls:?}"
        );
        println!(
            "story vcenter: one revert is {} calls, {} ms",
            calls.len(),
            began.elapsed().as_millis()
        );

        let tally = scene.break_calls(&calls)?;
        println!(
            "story vcenter: {} faults led back, {} led to the snapshot",
            tally[0], tally[1]
        );
        Ok(())
    });
}

impl Scene {
    /// Reverts with each call broken in each way; how many ended as before, and at the snapshot.
    fn break_calls(&self, calls: &[Value]) -> Result<[u32; 2]> {
        let soak = std::env::var("STILLPOINT_SOAK_FAULTS").is_ok();
        let changing = [
            "PowerOffVM_Task",
            "UnregisterVM",
            "UnmountVmfsVolume",
            "DetachScsiLun",
            "AttachScsiLun",
            "RescanVmfs",
            "MountVmfsVolume",
            "RegisterVM_Task",
            "RevertToSnapshot_Task",
            "PowerOnVM_Task",
        ];
        let mut seen = Vec::new();
        let mut tally = [0, 0];
        for (at, call) in calls.iter().enumerate() {
            let name = call.as_str().unwrap_or_default();
            let first = changing.contains(&name) && !seen.contains(&name);
            seen.push(name);
            if !soak && !first {
                continue;
            }
            let kinds = [("lost", 1), ("fault", 100), ("fault", 1), ("drop", 1)];
            for (kind, times) in kinds.into_iter().take(if soak { 4 } else { 2 }) {
                let what = format!("{kind} ×{times} at call {} ({name})", at + 1);
                self.baseline()?;
                self.write(2)?;
                self.vcsim.reset()?;
                let rule = if times == 1 {
                    format!("{{\"At\": {}, \"Kind\": \"{kind}\"}}", at + 1)
                } else {
                    format!("{{\"Method\": \"{name}\", \"Kind\": \"{kind}\", \"Times\": {times}}}")
                };
                if times > 1 && !first {
                    continue;
                }
                self.vcsim.rule(&rule)?;
                let end = self.revert(&["--power-off"])?;
                self.vcsim.reset()?;
                let state = self.settle(&what).with_context(|| format!("{end:?}"))?;
                ensure!(
                    end.code != 0 || state == State::Reverted,
                    "{what}: {end:?}: {state:?}"
                );
                tally[usize::from(state == State::Reverted)] += 1;
            }
        }
        Ok(tally)
    }
}

/// Who ends in the middle of a revert.
#[derive(Debug, Clone, Copy)]
enum Killed {
    Agent,
    Daemon,
}

impl Scene {
    /// A revert in which one end is killed while the vCenter carries out a call.
    fn killed_revert(&mut self, who: Killed, method: &str) -> Result<State> {
        let what = format!("{who:?} killed at {method}");
        self.baseline()?;
        self.write(3)?;
        self.vcsim.reset()?;
        self.vcsim.rule(&format!(
            "{{\"Method\": \"{method}\", \"Kind\": \"hold\", \"Delay\": 1000}}"
        ))?;
        let mut command = Command::new(BINARY);
        command.arg("--config").arg(self.daemon.config());
        command.args(["--yes", "snapshot", "revert", "vms@base", "--power-off"]);
        let asking = Running::start("revert", &mut command, &self.dir.join("revert.log"))?;
        wait_until(&format!("{method} to be called"), LIMIT, || {
            Ok(self.vcsim.state()?["calls"].to_string().contains(method))
        })?;
        match who {
            Killed::Agent => self.start_agent()?,
            Killed::Daemon => {
                self.daemon.kill()?;
                self.daemon.resume()?;
            }
        }
        drop(asking);
        let state = self.settle(&what)?;
        // Over means that nothing is remembered of it: the next one is not refused because of it.
        wait_until(&format!("the revert to be over, {what}"), LIMIT, || {
            let plan = self.revert(&["--plan"])?;
            Ok(plan.code == 0 && self.is_whole()?)
        })?;
        self.wait_agent()?;
        Ok(state)
    }
}

#[test]
fn a_revert_goes_on_after_either_end_was_killed() {
    story("vcenter kills", |scratch| {
        let mut scene = Scene::new(scratch)?;
        let fingerprint = scene.vcsim.fingerprint().to_owned();
        scene.set(&fingerprint, &["--mode", "quiesce"])?.success()?;
        scene.enrol()?;
        scene.create("base", "fail")?.success()?;
        let soak = std::env::var("STILLPOINT_SOAK_FAULTS").is_ok();
        let all = [
            "PowerOffVM_Task",
            "UnregisterVM",
            "UnmountVmfsVolume",
            "DetachScsiLun",
            "AttachScsiLun",
            "MountVmfsVolume",
            "RegisterVM_Task",
            "RevertToSnapshot_Task",
            "PowerOnVM_Task",
        ];
        for who in [Killed::Agent, Killed::Daemon] {
            let chosen: &[&str] = match (soak, who) {
                (true, _) => &all,
                (false, Killed::Agent) => &["UnmountVmfsVolume", "RegisterVM_Task"],
                (false, Killed::Daemon) => &["DetachScsiLun", "AttachScsiLun"],
            };
            for method in chosen {
                let state = scene.killed_revert(who, method)?;
                println!("story vcenter: {who:?} killed at {method}: {state:?}");
                let switched = all.iter().position(|one| one == method) >= Some(4);
                ensure!(
                    (state == State::Reverted) == switched,
                    "{who:?} killed at {method}: {state:?}"
                );
            }
        }
        Ok(())
    });
}
