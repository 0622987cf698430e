//! Two paths to one LUN, with the kernel's initiator and dm-multipath: a writer goes on when a path goes silent, when a
//! session is dropped, and when the paths come back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{Daemon, Guest, GuestSpec, Payload, Proxy, Scratch, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const WRITER: &str = env!("CARGO_BIN_EXE_record-writer");
const IQN: &str = "iqn.2026-11.test:paths";
const INITIATOR: &str = "iqn.2026-11.test.guest:paths";
/// Pings, their timeout and the replacement timeout of the initiator, on an emulated CPU.
const LIMIT: Duration = Duration::from_secs(90);

fn config(second: u16) -> String {
    format!(
        "[[portal]]\naddress = \"127.0.0.1:$PORT\"\ngroup = 1\n\
         [[portal]]\naddress = \"127.0.0.1:$PORT2\"\ngroup = 2\nadvertise = \"127.0.0.1:{second}\"\n\
         [[lun]]\nname = \"paths\"\nsize = \"256MiB\"\n\
         [[target]]\niqn = \"{IQN}\"\nluns = [\"paths\"]\ninitiators = [\"{INITIATOR}\"]\nportal_groups = [1, 2]\nmax_sessions = 2\n"
    )
}

/// One path as the guest sees it.
#[derive(Clone, Debug)]
struct Path {
    disk: String,
    device: String,
}

struct Scene {
    daemon: Daemon,
    guest: Guest,
    proxy: Proxy,
    /// By portal group: the first directly, the second through the proxy.
    paths: [Path; 2],
}

impl Scene {
    fn open(scratch: &Scratch) -> Result<Self> {
        let proxy = Proxy::of_bytes()?;
        let daemon = Daemon::start(BINARY, scratch, &config(proxy.port()))?;
        proxy.lead_to(daemon.second_port());
        let spec = GuestSpec {
            name: "guest",
            initiator: INITIATOR,
            payload: vec![Payload::program(scratch, "record-writer", WRITER)?],
            forward: Vec::new(),
        };
        let mut guest = Guest::boot(scratch, spec)?;
        let listed = guest.run(&format!(
            "cp /payload/record-writer /usr/bin/
             for m in dm_multipath dm_round_robin; do modprobe $m; done
             iscsiadm -m discovery -t sendtargets -p {portal}
             for v in node.session.timeo.replacement_timeout=2 node.conn[0].timeo.noop_out_interval=1 node.conn[0].timeo.noop_out_timeout=2; do
                 iscsiadm -m node -T {IQN} -o update -n ${{v%=*}} -v ${{v#*=}}
             done
             iscsiadm -m node -T {IQN} --login >/dev/null",
            portal = daemon.portal()
        ))?;
        ensure!(
            listed.contains(&format!("{},1 {IQN}", daemon.portal()))
                && listed.contains(&format!("127.0.0.1:{},2 {IQN}", proxy.port())),
            "both portals with their groups, the second as advertised: {listed}"
        );
        let paths = [path(&mut guest, daemon.port())?, path(&mut guest, proxy.port())?];
        Ok(Self {
            daemon,
            guest,
            proxy,
            paths,
        })
    }

    /// What page 83h and REPORT TARGET PORT GROUPS say.
    fn identify(&mut self) -> Result<()> {
        let [one, two] = self.paths.clone();
        let (one, two) = (one.disk, two.disk);
        let wwids = self.guest.run(&format!(
            "cat /sys/block/{one}/device/wwid /sys/block/{two}/device/wwid"
        ))?;
        let mut lines = wwids.lines();
        ensure!(
            lines.next() == lines.next() && wwids.contains("naa."),
            "one LUN has one identity: {wwids}"
        );
        for (disk, port) in [(&one, 1), (&two, 2)] {
            let page = self.guest.run(&format!("sg_vpd -p di /dev/{disk}"))?;
            for words in [
                format!("Relative target port: 0x{port}"),
                "Target port group: 0x1".to_owned(),
                format!("{IQN},t,0x000{port}"),
            ] {
                ensure!(
                    page.contains(&words),
                    "page 83h through group {port} has no {words:?}:\n{page}"
                );
            }
        }
        let groups = self.guest.run(&format!("sg_rtpg -d /dev/{one}"))?;
        ensure!(
            groups
                .matches("target port group asymmetric access state")
                .count()
                == 1
                && groups.contains("active/optimized")
                && groups.contains("Relative target port ids:"),
            "{groups}"
        );
        Ok(())
    }

    fn status(&mut self) -> Result<String> {
        self.guest.run("dmsetup status --noflush paths")
    }

    /// Waits until dm-multipath calls a path failed (`F`) or active (`A`).
    fn path_is(&mut self, path: usize, state: char) -> Result<()> {
        let device = self.device(path)?;
        let script = format!("dmsetup status --noflush paths | grep -q '{device} {state}'");
        self.guest
            .wait_for(&format!("path {device} to be {state}"), LIMIT, &script)
            .map(drop)
    }

    fn device(&self, path: usize) -> Result<String> {
        Ok(self
            .paths
            .get(path)
            .context("there are two paths")?
            .device
            .clone())
    }

    /// Eight more records are on the disk.
    fn writer_goes_on(&mut self) -> Result<()> {
        let count = "wc -l </run/acknowledged";
        let before: u64 = self.guest.run(count)?.trim().parse()?;
        self.guest
            .wait_for(
                "the writer to go on",
                LIMIT,
                &format!("[ $({count}) -gt {} ]", before + 8),
            )
            .map(drop)
    }

    fn sessions(&self) -> Result<Vec<Value>> {
        let list = self.daemon.json(&["session", "list"])?;
        Ok(list.as_array().cloned().unwrap_or_default())
    }

    /// Sessions through a portal of ours.
    fn session_on(&self, port: u16) -> Result<Option<Value>> {
        let end = format!(":{port}");
        let mine = |row: &Value| {
            row.get("portal")
                .and_then(Value::as_str)
                .is_some_and(|portal| portal.ends_with(&end))
                && row.get("state").is_some_and(|state| state == "active")
        };
        Ok(self.sessions()?.into_iter().find(mine))
    }
}

/// The disk of the session through this port.
fn path(guest: &mut Guest, port: u16) -> Result<Path> {
    let found = guest.wait_for(
        "a disk of each path",
        LIMIT,
        &format!(
            "for c in /sys/class/iscsi_connection/*; do
                 [ \"$(cat $c/persistent_port)\" = {port} ] || continue
                 for b in $c/device/../target*/*/block/*; do
                     [ -b /dev/${{b##*/}} ] && echo ${{b##*/}} $(cat $b/dev) && exit 0
                 done
             done
             exit 1"
        ),
    )?;
    let mut words = found.split_whitespace().map(str::to_owned);
    Ok(Path {
        disk: words.next().context("a disk")?,
        device: words.next().context("its device number")?,
    })
}

#[test]
fn a_writer_goes_on_while_paths_come_and_go() {
    story("multipath: kernel initiator, dm-multipath", |scratch| {
        let mut scene = Scene::open(scratch)?;
        scene.identify()?;
        let (one, two) = (scene.device(0)?, scene.device(1)?);
        let disk = scene.paths.first().context("a path")?.disk.clone();
        scene.guest.run(&format!(
            "dmsetup create paths --noudevsync --table \"0 $(cat /sys/block/{disk}/size) multipath 1 queue_if_no_path 0 1 1 \\
                 round-robin 0 2 1 {one} 1 {two} 1\"
             dmsetup mknodes; mkfs.ext4 -q /dev/mapper/paths; mkdir -p /data; mount /dev/mapper/paths /data
             mkdir /data/records
             setsid record-writer write /data/records /run/acknowledged >/run/writer.out 2>&1 & echo $! >/run/writer.pid"
        ))?;
        scene
            .guest
            .wait_for("the first record", LIMIT, "[ -s /run/acknowledged ]")?;
        scene.writer_goes_on()?;

        // The second path swallows what the guest says. Its ping is not answered, the path fails, the first one goes on.
        scene.proxy.hold();
        scene.path_is(1, 'F')?;
        scene.path_is(0, 'A')?;
        scene.writer_goes_on()?;
        println!("story multipath: path 2 silent: {}", scene.status()?.trim());

        // It comes back: the initiator logs in anew, its old session is replaced, and the path is taken again.
        scene.proxy.let_go();
        let port = scene.daemon.second_port();
        wait_until("the second path's session", LIMIT, || {
            Ok(scene.session_on(port)?.is_some())
        })?;
        let reinstate = |device: &str| {
            // What multipathd does when its checker finds the path alive.
            format!(
                "dd if=/dev/block/{device} of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null && dmsetup message paths 0 'reinstate_path {device}'"
            )
        };
        scene.guest.run("mkdir -p /dev/block; for d in /sys/class/block/sd*; do mknod /dev/block/$(cat $d/dev) b $(tr : ' ' <$d/dev) 2>/dev/null || true; done")?;
        scene
            .guest
            .wait_for("the second path to answer", LIMIT, &reinstate(&two))?;
        scene.path_is(1, 'A')?;

        // The operator drops the first path's session: asked to log out, then cut. It logs in again by itself.
        let first = scene
            .session_on(scene.daemon.port())?
            .context("the first path's session")?;
        let id = first.get("id").context("its id")?.to_string();
        scene.daemon.json(&["session", "drop", &id])?;
        scene.writer_goes_on()?;
        let port = scene.daemon.port();
        wait_until("the first path's session", LIMIT, || {
            Ok(scene
                .session_on(port)?
                .is_some_and(|row| row.get("id").map(Value::to_string) != Some(id.clone())))
        })?;
        scene
            .guest
            .wait_for("the first path to answer", LIMIT, &reinstate(&one))?;
        scene.path_is(0, 'A')?;
        scene.writer_goes_on()?;

        let last = scene.guest.run(
            "kill $(cat /run/writer.pid); sync; umount /data; e2fsck -fn /dev/mapper/paths >/dev/null 2>&1
             mount /dev/mapper/paths /data; record-writer check /data/records; umount /data",
        )?;
        let acknowledged = scene.guest.run("tail -n 1 /run/acknowledged | cut -d ' ' -f 1")?;
        let (last, acknowledged): (u64, u64) = (last.trim().parse()?, acknowledged.trim().parse()?);
        ensure!(
            last >= acknowledged,
            "{acknowledged} records were acknowledged, {last} are on the disk"
        );
        println!("story multipath: {acknowledged} records acknowledged over three cuts, {last} on the disk");
        ensure!(scene.daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}
