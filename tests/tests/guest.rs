//! The main job, with the kernel's initiator and the real agent in a guest: a snapshot that can be trusted, while a writer
//! writes; data broken, looked up in the snapshot, reverted. And what happens when the agent dies at the worst moment.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{Daemon, Guest, GuestSpec, Payload, Proxy, Scratch, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");
const WRITER: &str = env!("CARGO_BIN_EXE_record-writer");

const IQN: &str = "iqn.2026-11.test:app";
const INITIATOR: &str = "iqn.2026-11.test.guest:app";
const AGENT_PORT: u16 = 11169;
/// What the daemon asks for on Linux when nobody says otherwise (agent-protocol.md §6).
const HOLD: Duration = Duration::from_secs(5);

const CONFIG: &str = r#"
[[portal]]
address = "127.0.0.1:$PORT"

[[lun]]
name = "app"
size = "512MiB"

[[target]]
iqn = "iqn.2026-11.test:app"
luns = ["app"]
initiators = ["iqn.2026-11.test.guest:app"]
agents = true

[agents]
listen = "127.0.0.1:$AGENTS"
"#;

/// Notes when the agent called: before it froze, after it thawed.
const TIMES_HOOK: &str = "#!/bin/sh\necho \"$1 $(date +%s%6N)\" >>/run/hook-times\n";

/// Makes the writer put its records on disk and stand still.
const RECORDS_HOOK: &str = "#!/bin/sh
case $1 in
    freeze)
        touch /run/records/freeze
        until [ -e /run/records/frozen ]; do sleep 0.02; done
        ;;
    thaw) rm -f /run/records/freeze ;;
esac
";

/// Gives the story time to cut the agent off before the freeze.
const SLOW_HOOK: &str = "#!/bin/sh
[ \"$1\" = freeze ] || exit 0
touch /run/freezing
until [ ! -e /run/freezing ]; do sleep 0.05; done
";

/// One daemon and one guest with `/data` on the LUN and a connected agent.
struct Scene {
    daemon: Daemon,
    guest: Guest,
    /// The way from the daemon to the agent.
    proxy: Proxy,
    disk: String,
}

impl Scene {
    fn open(scratch: &Scratch, mut payload: Vec<Payload>) -> Result<Self> {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let proxy = Proxy::start()?;
        payload.push(Payload::program(scratch, "stillpoint-agent", AGENT)?);
        payload.push(Payload::program(scratch, "record-writer", WRITER)?);
        payload.push(Payload::text(
            "agent.toml",
            &format!(
                "advertise_port = {}\nmin_interval_s = 1\nlog = \"debug\"\n",
                proxy.port()
            ),
        ));
        let spec = GuestSpec {
            name: "guest",
            initiator: INITIATOR,
            payload,
            forward: vec![AGENT_PORT],
        };
        let guest = Guest::boot(scratch, spec)?;
        proxy.lead_to(guest.forwarded(AGENT_PORT)?);
        let mut scene = Self {
            daemon,
            guest,
            proxy,
            disk: String::new(),
        };
        scene.make_file_system()?;
        scene.enrol()?;
        Ok(scene)
    }

    fn make_file_system(&mut self) -> Result<()> {
        let portal = self.daemon.portal();
        let listed = self
            .guest
            .run(&format!("iscsiadm -m discovery -t sendtargets -p {portal}"))?;
        println!("guest# iscsiadm -m discovery -t sendtargets -p {portal}\n{listed}");
        ensure!(listed.contains(IQN), "discovery listed {listed:?}");
        self.disk = self
            .guest
            .run(&format!("iscsi-login {portal} {IQN}"))?
            .trim()
            .to_owned();
        let disk = &self.disk;
        self.guest.run(&format!(
            "mkfs.ext4 -q {disk}; mkdir -p /data /snap /run/records; mount {disk} /data
             mkdir /data/files /data/records
             for n in 1 2 3 4 5 6 7 8; do cat /sbin/e2fsck >/data/files/$n; echo $n >>/data/files/$n; done; sync"
        ))?;
        println!("guest# mkfs.ext4 -q {disk}; mount {disk} /data");
        Ok(())
    }

    fn enrol(&mut self) -> Result<()> {
        let created = self.daemon.json(&["agent", "token", "create", "--lun", "app"])?;
        let token = created["token"]
            .as_str()
            .with_context(|| format!("no token in {created}"))?
            .to_owned();
        ensure!(token.starts_with("SP1-"), "{created}");
        println!("$ stillpoint agent token create --lun app\nSP1-…");
        self.guest.run(&format!(
            "mkdir -p /etc/stillpoint-agent/hooks.d; cp /payload/agent.toml /etc/stillpoint-agent/
             cp /payload/stillpoint-agent /payload/record-writer /usr/bin/
             stillpoint-agent enrol {token}@127.0.0.1:{}",
            self.daemon.agent_port()
        ))?;
        println!("guest# stillpoint-agent enrol SP1-…@san1; stillpoint-agent run");
        self.start_agent()
    }

    fn start_agent(&mut self) -> Result<()> {
        self.guest
            .run("setsid stillpoint-agent run >>/run/agent.log 2>&1 & echo $! >/run/agent.pid")?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let agents = self.daemon.json(&["agent", "list"])?;
            let connected = agents
                .as_array()
                .into_iter()
                .flatten()
                .any(|agent| agent["state"] == "connected");
            if connected {
                return Ok(());
            }
            if Instant::now() > deadline {
                let log = self.guest.run("cat /run/agent.log")?;
                anyhow::bail!("the agent did not connect: {agents}\n{log}");
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Adds a hook; the agent looks at the directory at each freeze.
    fn hook(&mut self, name: &str, text: &str, application: Option<&str>) -> Result<()> {
        let sidecar = application.map(|application| {
            format!("echo 'application = \"{application}\"' >/etc/stillpoint-agent/hooks.d/{name}.toml\n")
        });
        self.guest.run(&format!(
            "{}cat >/etc/stillpoint-agent/hooks.d/{name} <<'END'\n{text}END\nchmod 755 /etc/stillpoint-agent/hooks.d/{name}",
            sidecar.unwrap_or_default()
        ))?;
        Ok(())
    }

    /// Starts the writer with its own directory; `control` makes it keep records in memory.
    fn start_writer(&mut self, name: &str, control: &str) -> Result<()> {
        self.guest.run(&format!(
            "mkdir /data/records/{name}
             setsid record-writer write /data/records/{name} /run/{name}.acknowledged {control} >/run/{name}.out 2>&1 &
             echo $! >/run/writer.pid"
        ))?;
        self.records_after(name, 0)
    }

    /// Waits for 20 more acknowledged records after record `number`.
    fn records_after(&mut self, name: &str, number: u64) -> Result<()> {
        let script = format!("[ $(wc -l </run/{name}.acknowledged) -gt {} ]", number + 20);
        self.guest
            .wait_for("20 more records", Duration::from_secs(30), &script)?;
        Ok(())
    }

    fn stop_writer(&mut self) -> Result<()> {
        self.guest.run("kill $(cat /run/writer.pid)")?;
        Ok(())
    }

    /// The number of the last record acknowledged before a time, and of the first one begun after another.
    fn bounds(&mut self, name: &str, before_us: &str, after_us: &str) -> Result<(u64, u64)> {
        let text = self.guest.run(&format!(
            "awk -v before={before_us} -v after={after_us} '
                $3 < before {{ last = $1 }}
                !first && $2 > after {{ first = $1 }}
                END {{ print last + 0, first + 0 }}' /run/{name}.acknowledged"
        ))?;
        let numbers: Vec<u64> = text
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        match numbers.as_slice() {
            [last, first] => Ok((*last, *first)),
            _ => anyhow::bail!("awk printed {text:?}"),
        }
    }

    /// When the hook that notes times was called last.
    fn hook_times(&mut self) -> Result<(String, String)> {
        let time = |guest: &mut Guest, verb: &str| -> Result<String> {
            let line = guest.run(&format!("grep '^{verb} ' /run/hook-times | tail -n 1"))?;
            Ok(line
                .trim()
                .strip_prefix(verb)
                .unwrap_or_default()
                .trim()
                .to_owned())
        };
        Ok((time(&mut self.guest, "freeze")?, time(&mut self.guest, "thaw")?))
    }

    /// Mounts a snapshot as a LUN of its own and logs the guest in.
    fn present(&mut self, snapshot: &str, options: &[&str]) -> Result<Presented> {
        let arguments = [&["snapshot", "mount", snapshot], options].concat();
        let mount = self.daemon.json(&arguments)?;
        println!("$ stillpoint {}\n{mount}", arguments.join(" "));
        let text = |key: &str| -> Result<String> {
            Ok(mount[key]
                .as_str()
                .with_context(|| format!("no {key} in {mount}"))?
                .to_owned())
        };
        let (name, iqn) = (text("name")?, text("iqn")?);
        ensure!(
            iqn != IQN,
            "a mounted snapshot needs a target of its own: {mount}"
        );
        let lun = mount["lun"]
            .as_u64()
            .with_context(|| format!("no lun in {mount}"))?;
        ensure!(
            mount["portals"]
                .as_array()
                .is_some_and(|portals| !portals.is_empty()),
            "{mount}"
        );
        let disk = self
            .guest
            .run(&format!("iscsi-login {} {iqn} {lun}", self.daemon.portal()))?
            .trim()
            .to_owned();
        ensure!(
            self.identity(&disk)? != self.identity(&self.disk.clone())?,
            "the snapshot has the LUN's identity"
        );
        Ok(Presented { name, iqn, disk })
    }

    fn dismiss(&mut self, presented: &Presented) -> Result<()> {
        self.guest
            .run(&format!("iscsiadm -m node -T {} -u >/dev/null", presented.iqn))?;
        self.daemon
            .json(&["snapshot", "unmount", &presented.name, "--yes"])?;
        Ok(())
    }

    /// Page 0x83 of a disk, as the kernel read it.
    fn identity(&mut self, disk: &str) -> Result<String> {
        self.guest.run(&format!(
            "cat /sys/block/{}/device/wwid",
            disk.trim_start_matches("/dev/")
        ))
    }

    /// The last record in a mounted snapshot, all of them checked.
    fn last_record(&mut self, disk: &str, options: &str, name: &str) -> Result<u64> {
        let text = self.guest.run(&format!(
            "mount {options} {disk} /snap; last=$(record-writer check /snap/records/{name}); umount /snap; echo $last"
        ))?;
        text.trim()
            .parse()
            .with_context(|| format!("record-writer printed {text:?}"))
    }

    fn hashes(&mut self) -> Result<String> {
        self.guest.run("cd /data/files; sha256sum *")
    }
}

/// A mounted snapshot in the guest.
struct Presented {
    name: String,
    iqn: String,
    disk: String,
}

/// fsck finds nothing to do and no journal to replay.
fn ensure_clean(guest: &mut Guest, disk: &str) -> Result<()> {
    let features = guest.run(&format!("dumpe2fs -h {disk} 2>/dev/null | grep features"))?;
    ensure!(
        !features.contains("needs_recovery"),
        "the journal has to be replayed: {features}"
    );
    let printed = guest.run(&format!("e2fsck -fn {disk} 2>&1"))?;
    println!("guest# e2fsck -fn {disk}\n{printed}");
    ensure!(
        !printed.contains("recover") && !printed.contains("orphan"),
        "fsck was not clean:\n{printed}"
    );
    Ok(())
}

fn ensure_level(created: &Value, level: &str) -> Result<()> {
    ensure!(created["consistency"] == level, "{created}");
    for key in ["lun", "name", "id", "requested", "created_at", "cut_ms", "agents"] {
        ensure!(!created[key].is_null(), "no {key} in {created}");
    }
    Ok(())
}

#[test]
fn main_job() {
    story("main job", |scratch| {
        let mut scene = Scene::open(scratch, vec![])?;
        filesystem_snapshot(&mut scene)?;
        crash_snapshot_beside_it(&mut scene)?;
        application_snapshot(&mut scene)?;
        overwrite_and_revert(&mut scene)?;
        ensure!(
            !scene.guest.console().contains("I/O error"),
            "the guest saw I/O errors:\n{}",
            scene.guest.console()
        );
        ensure!(scene.daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}

fn filesystem_snapshot(scene: &mut Scene) -> Result<()> {
    scene.hook("10-times", TIMES_HOOK, None)?;
    scene.start_writer("direct", "")?;
    let created = scene.daemon.json(&[
        "snapshot",
        "create",
        "app",
        "--name",
        "fs",
        "--consistency",
        "filesystem",
    ])?;
    println!("$ stillpoint snapshot create app --name fs --consistency filesystem --json\n{created:#}");
    ensure_level(&created, "filesystem")?;
    ensure!(
        created["agents"]
            .as_array()
            .is_some_and(|agents| agents.len() == 1),
        "{created}"
    );

    let (frozen, thawed) = scene.hook_times()?;
    let (acknowledged, _) = scene.bounds("direct", &frozen, &thawed)?;
    scene.records_after("direct", acknowledged)?;
    let (acknowledged, begun) = scene.bounds("direct", &frozen, &thawed)?;
    ensure!(begun > acknowledged, "the writer did not go on after the thaw");

    let presented = scene.present("app@fs", &["--read-only"])?;
    ensure_clean(&mut scene.guest, &presented.disk)?;
    let last = scene.last_record(&presented.disk, "-o ro", "direct")?;
    println!(
        "records: {acknowledged} acknowledged before the freeze, {last} in the snapshot, {begun} the first after the thaw"
    );
    ensure!(
        last >= acknowledged,
        "record {acknowledged} was acknowledged before the freeze, the snapshot ends with {last}"
    );
    ensure!(
        last < begun,
        "record {begun} was begun after the thaw and is in the snapshot, which ends with {last}"
    );
    scene.dismiss(&presented)
}

fn crash_snapshot_beside_it(scene: &mut Scene) -> Result<()> {
    let calls = scene.proxy.accepted();
    let count = scene.guest.run("wc -l </run/direct.acknowledged")?;
    let acknowledged: u64 = count
        .trim()
        .parse()
        .with_context(|| format!("wc printed {count:?}"))?;
    let created = scene.daemon.json(&[
        "snapshot",
        "create",
        "app",
        "--name",
        "crash",
        "--consistency",
        "crash",
    ])?;
    println!("$ stillpoint snapshot create app --name crash --consistency crash --json\n{created:#}");
    ensure_level(&created, "crash")?;
    ensure!(
        scene.proxy.accepted() == calls,
        "a crash-consistent snapshot called an agent"
    );

    let presented = scene.present("app@crash", &[])?;
    let disk = presented.disk.clone();
    let features = scene
        .guest
        .run(&format!("dumpe2fs -h {disk} 2>/dev/null | grep features"))?;
    ensure!(
        features.contains("needs_recovery"),
        "a crash-consistent snapshot of a mounted file system: {features}"
    );
    // Mounting replays the journal, as after a power cut; then the file system is clean.
    let last = scene.last_record(&disk, "", "direct")?;
    ensure_clean(&mut scene.guest, &disk)?;
    println!("records: {acknowledged} acknowledged before the command, {last} in the snapshot");
    ensure!(
        last >= acknowledged,
        "record {acknowledged} was fsynced before the snapshot, which ends with {last}"
    );
    scene.dismiss(&presented)?;
    scene.stop_writer()
}

/// `lun preflight` says what `snapshot create` would: refused without an application, ready with one.
fn preflight(scene: &mut Scene, code: i32) -> Result<()> {
    let finished = scene.daemon.cli(&["lun", "preflight", "app", "--json"])?;
    ensure!(finished.code == code, "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout)?;
    ensure!(report["ready"] == (code == 0), "{report}");
    ensure!(
        report["sessions"][0]["initiator"] == INITIATOR && report["agents"][0]["role"] == "mounted",
        "{report}"
    );
    ensure!(report["agents"][0]["mounts"][0]["path"] == "/data", "{report}");
    Ok(())
}

fn application_snapshot(scene: &mut Scene) -> Result<()> {
    preflight(scene, 3)?;
    scene.hook("20-records", RECORDS_HOOK, Some("records"))?;
    preflight(scene, 0)?;
    scene.start_writer("buffered", "/run/records")?;
    let on_disk = scene.guest.run("sync; wc -c </data/records/buffered/records")?;
    ensure!(
        on_disk.trim() == "0",
        "the writer should hold its records back, {on_disk} bytes are on disk"
    );

    let created = scene.daemon.json(&[
        "snapshot",
        "create",
        "app",
        "--name",
        "app1",
        "--consistency",
        "application",
    ])?;
    println!("$ stillpoint snapshot create app --name app1 --consistency application --json\n{created:#}");
    ensure_level(&created, "application")?;
    let (frozen, thawed) = scene.hook_times()?;
    let (acknowledged, _) = scene.bounds("buffered", &frozen, &thawed)?;
    scene.records_after("buffered", acknowledged)?;
    let (acknowledged, begun) = scene.bounds("buffered", &frozen, &thawed)?;

    let presented = scene.present("app@app1", &["--read-only"])?;
    ensure_clean(&mut scene.guest, &presented.disk)?;
    let last = scene.last_record(&presented.disk, "-o ro", "buffered")?;
    println!(
        "records: {acknowledged} acknowledged before the freeze, {last} in the snapshot, {begun} the first after the thaw"
    );
    ensure!(
        acknowledged >= 20 && last >= acknowledged,
        "the hook did not bring the records into the snapshot: {last}"
    );
    ensure!(
        last < begun,
        "record {begun} was begun after the thaw and is in the snapshot, which ends with {last}"
    );
    scene.dismiss(&presented)?;
    scene.stop_writer()
}

fn overwrite_and_revert(scene: &mut Scene) -> Result<()> {
    let before = scene.hashes()?;
    scene
        .guest
        .run("for f in /data/files/*; do tr a-y b-z <$f >/tmp/new; cat /tmp/new >$f; done; sync")?;
    let broken = scene.hashes()?;
    ensure!(
        before.lines().zip(broken.lines()).all(|(a, b)| a != b),
        "the files were not overwritten"
    );

    let identity = scene.identity(&scene.disk.clone())?;
    let snapshots = |scene: &Scene| -> Result<Vec<String>> {
        let list = scene.daemon.json(&["snapshot", "list", "app"])?;
        Ok(list
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|s| s["name"].as_str())
            .map(str::to_owned)
            .collect())
    };
    let listed = snapshots(scene)?;
    let refusal = scene
        .daemon
        .refused(3, &["snapshot", "revert", "app@app1", "--yes"])?;
    println!("$ stillpoint snapshot revert app@app1 --yes\n{refusal:#}");
    ensure!(
        refusal["message"]
            .as_str()
            .is_some_and(|text| text.contains(INITIATOR)),
        "{refusal}"
    );
    ensure!(scene.hashes()? == broken, "a refused revert changed something");

    scene
        .guest
        .run(&format!("umount /data; iscsiadm -m node -T {IQN} -u >/dev/null"))?;
    let reverted = scene.daemon.json(&["snapshot", "revert", "app@app1", "--yes"])?;
    println!(
        "guest# umount /data; iscsiadm -m node -u\n$ stillpoint snapshot revert app@app1 --yes --json\n{reverted:#}"
    );
    let now = snapshots(scene)?;
    let automatic: Vec<&String> = now.iter().filter(|name| !listed.contains(name)).collect();
    let [automatic] = automatic.as_slice() else {
        anyhow::bail!("before {listed:?}, after {now:?}")
    };
    attach(scene)?;
    ensure!(
        scene.identity(&scene.disk.clone())? == identity,
        "a revert keeps the LUN's identity"
    );
    ensure!(scene.hashes()? == before, "the old files did not come back");
    println!("guest# sha256sum /data/files/*      # as before the overwrite\n{before}");

    // The automatic snapshot undoes it.
    scene
        .guest
        .run(&format!("umount /data; iscsiadm -m node -T {IQN} -u >/dev/null"))?;
    scene
        .daemon
        .json(&["snapshot", "revert", &format!("app@{automatic}"), "--yes"])?;
    attach(scene)?;
    ensure!(scene.hashes()? == broken, "the revert could not be undone");
    Ok(())
}

fn attach(scene: &mut Scene) -> Result<()> {
    let portal = scene.daemon.portal();
    scene.disk = scene
        .guest
        .run(&format!("iscsi-login {portal} {IQN}"))?
        .trim()
        .to_owned();
    scene.guest.run(&format!("mount {} /data", scene.disk))?;
    Ok(())
}

#[test]
fn agent_lost_while_frozen() {
    story("agent lost while frozen", |scratch| {
        let mut scene = Scene::open(scratch, vec![])?;
        scene.hook("10-slow", SLOW_HOOK, None)?;
        scene.start_writer("direct", "")?;

        // The target's word never arrives: the agent's own timer thaws, and the snapshot is not what was asked for.
        let outcome = cut_off(
            &mut scene,
            "silent",
            &["--on-failure", "crash-consistent"],
            "true",
        )?;
        let created: Value = serde_json::from_str(&outcome.success()?)?;
        ensure!(
            created["consistency"] == "crash" && created["requested"] == "filesystem",
            "{created}"
        );
        ensure!(names(&scene)? == ["silent"], "{:?}", names(&scene)?);
        // The connection that was lost is made again before the next round.
        wait_connected(&scene)?;

        // The agent is killed: its guard thaws, and the snapshot is refused.
        let outcome = cut_off(&mut scene, "killed", &[], "kill -9 $(cat /run/agent.pid)")?;
        let refusal = outcome.refused(3)?;
        println!("$ stillpoint snapshot create app --name killed --consistency filesystem\n{refusal}");
        ensure!(names(&scene)? == ["silent"], "{:?}", names(&scene)?);

        // With the agent back everything works again.
        scene.guest.run("rm /etc/stillpoint-agent/hooks.d/10-slow")?;
        scene.start_agent()?;
        wait_connected(&scene)?;
        let created = scene.daemon.json(&[
            "snapshot",
            "create",
            "app",
            "--name",
            "again",
            "--consistency",
            "filesystem",
        ])?;
        ensure_level(&created, "filesystem")?;
        scene.stop_writer()
    });
}

fn names(scene: &Scene) -> Result<Vec<String>> {
    let list = scene.daemon.json(&["snapshot", "list", "app"])?;
    Ok(list
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|s| s["name"].as_str())
        .map(str::to_owned)
        .collect())
}

fn wait_connected(scene: &Scene) -> Result<()> {
    stillpoint_tests::wait_until("the agent to be connected", Duration::from_secs(90), || {
        let agents = scene.daemon.json(&["agent", "list"])?;
        Ok(agents
            .as_array()
            .into_iter()
            .flatten()
            .any(|agent| agent["state"] == "connected"))
    })
}

/// Takes a snapshot and loses the way to the agent right before it freezes; `then` runs in the guest while frozen. The writer
/// must stand still for no longer than the hold.
fn cut_off(
    scene: &mut Scene,
    name: &str,
    options: &[&str],
    then: &str,
) -> Result<stillpoint_tests::Finished> {
    let arguments = [
        &[
            "snapshot",
            "create",
            "app",
            "--name",
            name,
            "--consistency",
            "filesystem",
            "--json",
        ],
        options,
    ]
    .concat();
    let Scene {
        daemon, guest, proxy, ..
    } = scene;
    thread::scope(|scope| {
        let command = scope.spawn(|| daemon.cli(&arguments));
        let frozen = (|| -> Result<()> {
            guest.wait_for("the freeze hook", Duration::from_secs(30), "[ -e /run/freezing ]")?;
            proxy.hold();
            // One request, because the freeze may be over before a second one arrives. The journal is there from right before
            // the freeze until right after the thaw.
            guest.run(&format!(
                "wc -l </run/direct.acknowledged >/run/before; rm /run/freezing
                 frozen() {{ ls /run/stillpoint-agent/frozen-*.json >/dev/null 2>&1; }}
                 until frozen; do sleep 0.02; done
                 while :; do
                     frozen || {{ echo the freeze was over before the writer was seen standing still; exit 1; }}
                     a=$(wc -l </run/direct.acknowledged); sleep 0.15
                     [ $(wc -l </run/direct.acknowledged) != $a ] || break
                 done
                 {then}"
            ))?;
            let on = "a=$(wc -l </run/direct.acknowledged); sleep 0.2; [ $(wc -l </run/direct.acknowledged) -gt $a ]";
            guest.wait_for("the writer to go on by itself", HOLD * 3, on)?;
            let gap = guest.run(
                "tail -n +$(cat /run/before) /run/direct.acknowledged |
                 awk '{ if (last && $3 - last > gap) gap = $3 - last; last = $3 } END { printf \"%d\", gap / 1000 }'",
            )?;
            let gap = Duration::from_millis(
                gap.trim()
                    .parse()
                    .with_context(|| format!("awk printed {gap:?}"))?,
            );
            println!("story agent lost while frozen: {name}: the writer stood still for {gap:?}");
            // One second for an emulated CPU to notice.
            ensure!(
                gap < HOLD + Duration::from_secs(1),
                "the writer stood still for {gap:?}, the hold is {HOLD:?}"
            );
            Ok(())
        })();
        // Also when something went wrong: the command must come to an end.
        proxy.let_go();
        fs::write(daemon.dir().join("agent.log"), guest.run("cat /run/agent.log")?)?;
        let finished = command.join().expect("the CLI's thread does not panic");
        frozen?;
        finished
    })
}
