//! The Linux kernel's initiator at work: two nodes of a cluster with fencing, xfs with fstrim and a disk that grows under it, resets and
//! aborts under a verified load, a daemon that stands still.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::{Daemon, Guest, GuestSpec, Scratch, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const MIB: u64 = 1 << 20;
const PORTAL: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n";

fn initiator(node: &str) -> String {
    format!("iqn.2026-11.test.guest:{node}")
}

fn boot(scratch: &Scratch, node: &'static str) -> Result<Guest> {
    Guest::boot(
        scratch,
        GuestSpec {
            name: node,
            initiator: &initiator(node),
            payload: vec![],
            forward: vec![],
        },
    )
}

/// One LUN on one target that `nodes` may use.
fn disk(name: &str, size: &str, nodes: &[&str]) -> String {
    let initiators: Vec<String> = nodes
        .iter()
        .map(|node| format!("\"{}\"", initiator(node)))
        .collect();
    format!(
        "[[lun]]\nname = \"{name}\"\nsize = \"{size}\"\n\
         [[target]]\niqn = \"iqn.2026-11.test:{name}\"\nluns = [\"{name}\"]\ninitiators = [{}]\n",
        initiators.join(", ")
    )
}

fn log_in(guest: &mut Guest, daemon: &Daemon, name: &str) -> Result<String> {
    let script = format!("iscsi-login {} iqn.2026-11.test:{name}", daemon.portal());
    Ok(guest.run(&script)?.trim().to_owned())
}

fn number(text: &str) -> Result<u64> {
    text.trim()
        .parse()
        .with_context(|| format!("no number: {text:?}"))
}

fn used_bytes(daemon: &Daemon, lun: &str) -> Result<u64> {
    let shown = daemon.json(&["lun", "show", lun])?;
    let used = shown.get("used_bytes").and_then(Value::as_u64);
    used.with_context(|| format!("no used_bytes in {shown}"))
}

/// One node: a guest with the shared file system's disk and the raw quorum disk.
struct Node {
    guest: Guest,
    data: String,
    quorum: String,
    key: &'static str,
}

impl Node {
    fn join(scratch: &Scratch, daemon: &Daemon, name: &'static str, key: &'static str) -> Result<Self> {
        let mut guest = boot(scratch, name)?;
        let data = log_in(&mut guest, daemon, "data")?;
        let quorum = log_in(&mut guest, daemon, "quorum")?;
        guest.run("mkdir -p /data")?;
        Ok(Self {
            guest,
            data,
            quorum,
            key,
        })
    }

    /// `sg_persist --out` on both disks. A unit attention (exit code 6) may hit any command: once more then.
    fn persist(&mut self, arguments: &str) -> Result<()> {
        let script = format!(
            "for d in {} {}
             do sg_persist -n --out {arguments} $d || {{ [ $? = 6 ]; sg_persist -n --out {arguments} $d; }}; done",
            self.data, self.quorum
        );
        self.guest.run(&script).map(drop)
    }

    fn register(&mut self) -> Result<()> {
        let key = self.key;
        self.persist(&format!("--register-ignore --param-sark={key} --param-aptpl"))
    }

    fn reserve(&mut self) -> Result<()> {
        let key = self.key;
        self.persist(&format!("--reserve --param-rk={key} --prout-type=5"))
    }

    /// Takes the disks away from the node with this key, commands in flight included.
    fn fence(&mut self, other: &str) -> Result<()> {
        let key = self.key;
        self.persist(&format!(
            "--preempt-abort --param-rk={key} --param-sark={other} --prout-type=5"
        ))
    }

    /// Keys and reservation of the quorum disk, as the node sees them.
    fn view(&mut self) -> Result<String> {
        let quorum = &self.quorum;
        let script = format!(
            "sg_persist -n --in --read-keys {quorum}; sg_persist -n --in --read-reservation {quorum}"
        );
        self.guest.run(&script)
    }

    /// The counter on the quorum disk, read from the disk.
    fn counter(&mut self) -> Result<u64> {
        let script = format!("dd if={} bs=512 count=1 iflag=direct 2>/dev/null", self.quorum);
        number(&self.guest.run(&script)?)
    }

    /// Counts on the quorum disk for as long as it may; what was acknowledged stands in /run/acked.
    fn start_counting(&mut self) -> Result<()> {
        let quorum = &self.quorum;
        self.guest.run(&format!(
            "rm -f /run/fenced; echo 0 >/run/acked
             (n=0; while printf '%512d' $((n + 1)) | dd of={quorum} bs=512 oflag=direct conv=notrunc 2>/run/dd.err
              do n=$((n + 1)); echo $n >/run/acked; done; touch /run/fenced) >/dev/null 2>&1 &"
        ))?;
        self.guest.wait_for(
            "the counter",
            Duration::from_secs(30),
            "[ $(cat /run/acked) -gt 20 ]",
        )?;
        Ok(())
    }
}

/// Two nodes share a disk. The second takes it from the first while that is writing; nothing of the first reaches the disk afterwards. Then
/// the other way round, with a power cut and a restart of the daemon in between.
#[test]
fn two_node_cluster_with_fencing() {
    story("two-node cluster with fencing", |scratch| {
        let nodes = ["one", "two"];
        let config = [
            PORTAL,
            &disk("data", "64MiB", &nodes),
            &disk("quorum", "16MiB", &nodes),
        ]
        .concat();
        let mut daemon = Daemon::start(BINARY, scratch, &config)?;
        let (mut one, mut two) = thread::scope(|scope| -> Result<_> {
            let one = scope.spawn(|| Node::join(scratch, &daemon, "one", "0x111"));
            let two = Node::join(scratch, &daemon, "two", "0x222")?;
            Ok((one.join().map_err(|_| anyhow::anyhow!("a guest panicked"))??, two))
        })?;
        one.register()?;
        one.reserve()?;
        two.register()?;
        second_takes_over(&mut one, &mut two)?;
        first_comes_back(&mut one, &mut two)?;

        // The owner loses its power, then the daemon is restarted: the reservation is the same.
        one.start_counting()?;
        drop(one);
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.resume()?;
        two.guest.wait_for(
            "the session of the second node",
            Duration::from_secs(60),
            &format!("dd if={} bs=512 count=1 iflag=direct of=/dev/null", two.quorum),
        )?;
        let view = two.view()?;
        ensure!(
            view.contains("0x111") && view.contains("Write Exclusive, registrants only"),
            "after the restart: {view}"
        );
        two.fence("0x111")?;
        let view = two.view()?;
        ensure!(
            !view.contains("0x111"),
            "the dead node's key is there still: {view}"
        );
        two.start_counting()?;
        Ok(())
    });
}

fn second_takes_over(one: &mut Node, two: &mut Node) -> Result<()> {
    let data = one.data.clone();
    one.guest.run(&format!(
        "mkfs.ext4 -q {data}; mount {data} /data; echo from-one >/data/file; sync"
    ))?;
    // Registered, so it may write; the owner is another all the same.
    let refused = two.guest.ask(
        Duration::from_secs(60),
        &format!(
            "sg_persist -n --out --reserve --param-rk=0x222 --prout-type=5 {}",
            two.quorum
        ),
    )?;
    ensure!(refused.code == 24, "a second owner: {refused:?}");
    one.start_counting()?;

    two.fence("0x111")?;
    one.guest
        .wait_for("the fence", Duration::from_secs(60), "[ -e /run/fenced ]")?;
    let acknowledged = number(&one.guest.run("cat /run/acked")?)?;
    let counted = two.counter()?;
    println!("fenced after {acknowledged} acknowledged writes; the disk has {counted}");
    // One write may have reached the disk without its answer.
    ensure!(
        counted == acknowledged || counted == acknowledged + 1,
        "{acknowledged} were acknowledged, the disk has {counted}"
    );
    // The first node still thinks that it has the file system.
    let late = one.guest.ask(
        Duration::from_secs(60),
        "echo stale >/data/stale && sync -f /data/stale",
    )?;
    ensure!(late.code != 0, "a fenced node's sync succeeded: {late:?}");
    let kernel = one.guest.run("dmesg")?;
    ensure!(
        kernel.contains("reservation conflict"),
        "the kernel saw no conflict:\n{kernel}"
    );

    let data = two.data.clone();
    let seen = two.guest.run(&format!(
        "e2fsck -p {data} >/dev/null 2>&1 || [ $? = 1 ]; mount {data} /data
         cat /data/file; [ ! -e /data/stale ]; echo from-two >>/data/file; umount /data; e2fsck -fn {data} >/dev/null 2>&1"
    ))?;
    ensure!(
        seen.trim() == "from-one",
        "the second node sees {seen:?} of what the first had synced"
    );
    ensure!(two.counter()? == counted, "a fenced node wrote");
    Ok(())
}

fn first_comes_back(one: &mut Node, two: &mut Node) -> Result<()> {
    // The file system of a fenced node is given up; its pages go nowhere.
    let data = one.data.clone();
    one.guest.ask(Duration::from_secs(60), "umount -l /data")?;
    one.register()?;
    let key = two.key;
    two.persist(&format!("--release --param-rk={key} --prout-type=5"))?;
    one.reserve()?;
    let seen = one.guest.run(&format!(
        "echo 3 >/proc/sys/vm/drop_caches
         dd if={data} of=/dev/null bs=1M iflag=direct 2>/dev/null
         debugfs -R 'cat /file' {data} 2>/dev/null"
    ))?;
    ensure!(
        seen.contains("from-one") && seen.contains("from-two"),
        "the first node sees {seen:?}"
    );
    let view = two.view()?;
    ensure!(view.contains("Key=0x111"), "the first node holds: {view}");
    Ok(())
}

fn xfs_config(size: &str) -> String {
    [PORTAL, &disk("disk", size, &["xfs"])].concat()
}

/// xfs, with what a file system's owner does in its life: fill, delete, trim, grow, check.
#[test]
fn xfs_trims_and_grows() {
    story("xfs: fstrim, online resize", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, &xfs_config("384MiB"))?;
        let mut guest = boot(scratch, "xfs")?;
        let disk = log_in(&mut guest, &daemon, "disk")?;
        guest.run(&format!(
            "mkdir -p /data; mkfs.xfs -q -K {disk}; mount -t xfs {disk} /data
             for n in 1 2 3 4 5 6; do (echo $n; cat /usr/bin/* 2>/dev/null) | head -c 10000000 >/data/$n; done
             sync; cd /data; sha256sum 5 6 >/run/sums"
        ))?;
        let full = used_bytes(&daemon, "disk")?;
        let trimmed = guest.run("rm /data/1 /data/2 /data/3 /data/4; sync; fstrim -v /data")?;
        let empty = used_bytes(&daemon, "disk")?;
        println!(
            "guest# fstrim -v /data\n{trimmed}{} MiB used, then {}",
            full / MIB,
            empty / MIB
        );
        ensure!(
            full > 55 * MIB && empty + 35 * MIB < full,
            "{full} bytes used before fstrim, {empty} after it"
        );

        let session = guest.run("iscsiadm -m session")?;
        daemon.write_config(&xfs_config("512MiB"))?;
        daemon.text(&["config", "apply", "--yes"])?;
        // The next command hears of it; the kernel says so, and leaves it to its user to look.
        guest.run("echo 1 >/data/touch; sync")?;
        let kernel = guest.run("dmesg")?;
        ensure!(
            kernel.contains("Capacity data has changed"),
            "the guest was not told that its disk grew:\n{kernel}"
        );
        let name = disk.trim_start_matches("/dev/");
        let size = guest.run(&format!(
            "echo 1 >/sys/block/{name}/device/rescan; blockdev --getsize64 {disk}"
        ))?;
        ensure!(number(&size)? == 512 * MIB, "the guest sees {size} bytes");
        guest.run("xfs_growfs /data >/dev/null; [ $(df -m /data | awk 'NR == 2 { print $2 }') -gt 400 ]")?;
        ensure!(
            guest.run("iscsiadm -m session")? == session,
            "the session was not the same all the time"
        );
        guest.run(&format!(
            "(cat /usr/bin/* /usr/sbin/* 2>/dev/null) | head -c 20000000 >/data/more; sync
             umount /data; echo 3 >/proc/sys/vm/drop_caches
             xfs_repair -n {disk} >/dev/null 2>&1; mount -t xfs {disk} /data; cd /data; sha256sum -c /run/sums"
        ))?;
        let kernel = guest.run("dmesg")?;
        ensure!(
            !kernel.contains("I/O error"),
            "the guest saw I/O errors:\n{kernel}"
        );
        Ok(())
    });
}

/// fio in the background of the guest: verified writes at a rate that keeps it writing longer than the blows take.
fn start_load(guest: &mut Guest, disk: &str, name: &str, options: &str) -> Result<()> {
    guest.run(&format!(
        "(fio --name=load --filename={disk} --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=8 \
           --verify=crc32c --verify_fatal=1 --do_verify=1 {options} --output=/run/{name}.txt \
           >/run/{name}.err 2>&1 && echo done >/run/{name}.done || echo $? >/run/{name}.failed) &"
    ))?;
    Ok(())
}

fn load_goes_on(guest: &mut Guest, name: &str) -> Result<()> {
    let look = format!("ls /run/{name}.done /run/{name}.failed 2>/dev/null");
    let ended = guest.ask(Duration::from_secs(60), &look)?.output;
    ensure!(ended.is_empty(), "the load {name} ended too early: {ended}");
    Ok(())
}

fn load_ends_well(guest: &mut Guest, name: &str) -> Result<()> {
    let ended = format!("[ -e /run/{name}.done ] || [ -e /run/{name}.failed ]");
    guest.wait_for("the load's end", Duration::from_secs(240), &ended)?;
    let report = guest.run(&format!("cat /run/{name}.txt /run/{name}.err; ls /run/{name}.*"))?;
    ensure!(
        report.contains(&format!("/run/{name}.done")),
        "fio {name} failed:\n{report}"
    );
    Ok(())
}

/// Task management functions that the initiator has sent in a session.
fn functions(guest: &mut Guest, session: u32) -> Result<u64> {
    let text = guest.run(&format!("iscsiadm -m session -r {session} -s"))?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("tmfcmd_pdus:"));
    number(line.with_context(|| format!("no tmfcmd_pdus in {text}"))?)
}

/// Resets, aborts, a daemon that stands still for 12 s: the load goes on, and reads what it wrote.
#[test]
fn resets_aborts_and_a_standstill_under_load() {
    story(
        "resets, aborts, 12 s of standstill under fio --verify",
        |scratch| {
            let node = ["resets"];
            let config = [
                PORTAL,
                &disk("disk", "128MiB", &node),
                &disk("patient", "128MiB", &node),
            ]
            .concat();
            let daemon = Daemon::start(BINARY, scratch, &config)?;
            let mut guest = boot(scratch, "resets")?;
            let disk = log_in(&mut guest, &daemon, "disk")?;
            // Without pings of its own the initiator aborts a command that takes too long; with pings it gives up the connection first.
            guest.run(
                "for key in noop_out_interval noop_out_timeout
             do iscsiadm -m node -T iqn.2026-11.test:patient -o update -n node.conn[0].timeo.$key -v 0; done",
            )?;
            let patient = log_in(&mut guest, &daemon, "patient")?;
            start_load(&mut guest, &disk, "pinging", "--size=40m --rate=,1600k")?;

            // LOGICAL UNIT RESET and TARGET RESET.
            guest.run(&format!(
            "sleep 1; for way in -d -d -t -d -t; do sg_reset --no-escalate $way {disk} >/dev/null; sleep 0.4; done"
        ))?;
            let resets = functions(&mut guest, 1)?;
            ensure!(resets >= 5, "{resets} task management functions for 5 resets");

            start_load(&mut guest, &patient, "silent", "--size=16m --rate=,800k")?;
            // Longer than the initiator's ping takes to give up; and where it does not ping, long enough for two rounds of a command's timeout,
            // as the first one only looks whether anything moves.
            load_goes_on(&mut guest, "pinging")?;
            load_goes_on(&mut guest, "silent")?;
            let timeout = format!(
                "/sys/block/{}/device/timeout",
                patient.trim_start_matches("/dev/")
            );
            guest.run(&format!("echo 2 >{timeout}"))?;
            still(&daemon, Duration::from_secs(12))?;
            guest.wait_for(
                "an abort",
                Duration::from_secs(60),
                "[ $(iscsiadm -m session -r 2 -s | awk '/tmfcmd_pdus/ { print $2 }') -gt 0 ]",
            )?;
            guest.run(&format!("echo 120 >{timeout}"))?;
            let aborts = functions(&mut guest, 2)?;
            load_ends_well(&mut guest, "silent")?;
            load_ends_well(&mut guest, "pinging")?;
            let kernel = guest.run("dmesg")?;
            println!("{resets} resets, {aborts} aborts, one standstill");
            ensure!(
                kernel.contains("ping timeout"),
                "12 s went by unseen; the story proves nothing:\n{kernel}"
            );
            ensure!(
                !kernel.contains("I/O error"),
                "the guest saw I/O errors:\n{kernel}"
            );
            Ok(())
        },
    );
}

/// Stops the daemon's process for a while.
fn still(daemon: &Daemon, time: Duration) -> Result<()> {
    daemon.signal(Signal::STOP)?;
    thread::sleep(time);
    daemon.signal(Signal::CONT)
}
