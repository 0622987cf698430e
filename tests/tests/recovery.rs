//! The kernel's initiator when the target goes away under load, and what it may negotiate.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use stillpoint_tests::{Daemon, Guest, GuestSpec, Scratch, Tgt, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const INITIATOR: &str = "iqn.2026-11.test.guest:recovery";

fn boot(scratch: &Scratch) -> Result<Guest> {
    Guest::boot(
        scratch,
        GuestSpec {
            name: "guest",
            initiator: INITIATOR,
            payload: vec![],
            forward: vec![],
        },
    )
}

/// fio writes blocks that carry their checksums, and reads them all back; meanwhile `blow` strikes three times.
fn verified_load(guest: &mut Guest, disk: &str, mut blow: impl FnMut() -> Result<()>) -> Result<()> {
    // The rate keeps the writing phase longer than the blows on any machine.
    guest.run(&format!(
        "(fio --name=load --filename={disk} --size=32m --rw=randwrite --bs=4k --direct=1 --ioengine=libaio \
           --iodepth=8 --rate=,2m --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/run/fio.txt \
           >/run/fio.err 2>&1 && echo done >/run/fio.done || echo $? >/run/fio.failed) &"
    ))?;
    for round in 1..=3 {
        thread::sleep(Duration::from_secs(3));
        let ended = guest
            .ask(
                Duration::from_secs(10),
                "ls /run/fio.done /run/fio.failed 2>/dev/null",
            )?
            .output;
        ensure!(
            ended.is_empty(),
            "round {round}: the load ended too early: {ended}"
        );
        blow()?;
    }
    guest.wait_for(
        "the load's end",
        Duration::from_secs(240),
        "[ -e /run/fio.done ] || [ -e /run/fio.failed ]",
    )?;
    let report = guest.run("cat /run/fio.txt /run/fio.err; ls /run/fio.*")?;
    ensure!(report.contains("/run/fio.done"), "fio failed:\n{report}");
    let kernel = guest.run("dmesg")?;
    ensure!(
        kernel.contains("detected conn error"),
        "the session never broke; the story proves nothing:\n{kernel}"
    );
    ensure!(
        !kernel.contains("I/O error"),
        "the guest saw I/O errors:\n{kernel}"
    );
    Ok(())
}

/// A daemon that is killed loses no acknowledged write, flushed or not: its host did not lose power, and the initiator does not send again what
/// was acknowledged.
fn daemon_killed(scratch: &Scratch, write_cache: bool) -> Result<()> {
    let config = format!(
        "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
         [[lun]]\nname = \"disk\"\nsize = \"256MiB\"\nwrite_cache = {write_cache}\n\
         [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"{INITIATOR}\"]\n"
    );
    let mut daemon = Daemon::start(BINARY, scratch, &config)?;
    let mut guest = boot(scratch)?;
    let disk = guest.run(&format!("iscsi-login {} iqn.2026-11.test:disk", daemon.portal()))?;
    verified_load(&mut guest, disk.trim(), || {
        daemon.kill()?;
        thread::sleep(Duration::from_millis(500));
        daemon.resume()
    })
}

#[test]
fn daemon_killed_under_verified_load() {
    story("daemon killed under fio --verify", |scratch| {
        daemon_killed(scratch, true)
    });
}

#[test]
fn daemon_killed_under_verified_load_without_write_cache() {
    story("daemon killed under fio --verify, no write cache", |scratch| {
        daemon_killed(scratch, false)
    });
}

#[test]
fn the_same_story_is_fair_to_tgt() {
    story("oracle: tgt killed under fio --verify", |scratch| {
        let mut tgt = Tgt::start(scratch, 256 << 20)?;
        let mut guest = boot(scratch)?;
        let disk = guest.run(&format!("iscsi-login {} {} 1", tgt.portal(), tgt.iqn()))?;
        verified_load(&mut guest, disk.trim(), || {
            tgt.kill();
            thread::sleep(Duration::from_millis(500));
            tgt.resume()
        })
    });
}

const ALGORITHMS: [(&str, &str); 4] = [
    ("md5", "MD5"),
    ("sha1", "SHA1"),
    ("sha256", "SHA256"),
    ("sha3-256", "SHA3-256"),
];

fn chap_config(scratch: &Scratch) -> Result<String> {
    let mut config = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n".to_owned();
    for (name, text) in [
        ("secret", "a-good-secret-of-length"),
        ("mutual", "another-good-secret"),
    ] {
        fs::write(scratch.file(name), text)?;
        fs::set_permissions(scratch.file(name), fs::Permissions::from_mode(0o600))?;
    }
    for (algorithm, _) in ALGORITHMS {
        write!(
            config,
            "[[lun]]\nname = \"{algorithm}\"\nsize = \"16MiB\"\n\
             [[target]]\niqn = \"iqn.2026-11.test:{algorithm}\"\nluns = [\"{algorithm}\"]\ninitiators = [\"{INITIATOR}\"]\n\
             [target.chap]\nuser = \"guest\"\nsecret_file = \"$DIR/secret\"\nmutual_user = \"target\"\n\
             mutual_secret_file = \"$DIR/mutual\"\nalgorithms = [\"{algorithm}\"]\n"
        )?;
    }
    Ok(config)
}

#[test]
fn chap_with_every_algorithm() {
    story("CHAP with every algorithm", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, &chap_config(scratch)?)?;
        let mut guest = boot(scratch)?;
        let portal = daemon.portal();
        let listed = guest.run(&format!("iscsiadm -m discovery -t sendtargets -p {portal}"))?;
        for (algorithm, offered) in ALGORITHMS {
            let iqn = format!("iqn.2026-11.test:{algorithm}");
            ensure!(listed.contains(&iqn), "discovery listed {listed:?}");
            let set = |key: &str, value: &str| {
                format!(
                    "iscsiadm -m node -T {iqn} -p {portal} -o update -n node.session.auth.{key} -v '{value}'\n"
                )
            };
            let login = format!("iscsiadm -m node -T {iqn} -p {portal} --login 2>&1");

            let refused = guest.ask(Duration::from_secs(60), &login)?;
            ensure!(refused.code != 0, "{algorithm}: login without CHAP was accepted");

            let base = set("authmethod", "CHAP") + &set("chap_algs", offered) + &set("username", "guest");
            guest.run(&(base + &set("password", "a-wrong-secret-of-length")))?;
            let refused = guest.ask(Duration::from_secs(60), &login)?;
            ensure!(refused.code != 0, "{algorithm}: a wrong secret was accepted");
            ensure!(
                refused.output.contains("authorization failure"),
                "{algorithm}: {}",
                refused.output
            );

            guest.run(&set("password", "a-good-secret-of-length"))?;
            guest.run(&(set("username_in", "target") + &set("password_in", "not-what-it-knows")))?;
            let refused = guest.ask(Duration::from_secs(60), &login)?;
            ensure!(
                refused.code != 0,
                "{algorithm}: the initiator believed a target with a wrong secret"
            );

            guest.run(&set("password_in", "another-good-secret"))?;
            guest.run(&format!(
                "{login} >/dev/null; disk=$(iscsi-disk {iqn})
                 echo {algorithm} | dd of=$disk bs=512 conv=sync,fsync 2>/dev/null
                 [ \"$(dd if=$disk bs=512 count=1 iflag=direct 2>/dev/null | head -n 1)\" = {algorithm} ]
                 iscsiadm -m node -T {iqn} -u >/dev/null"
            ))?;
        }
        Ok(())
    });
}

#[test]
fn every_way_of_sending_data() {
    story("negotiated ways of sending data", |scratch| {
        let daemon = Daemon::start(
            BINARY,
            scratch,
            "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n\
             [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"iqn.2026-11.test.guest:recovery\"]\n",
        )?;
        let mut guest = boot(scratch)?;
        let (iqn, portal) = ("iqn.2026-11.test:disk", daemon.portal());
        guest.run(&format!("iscsiadm -m discovery -t sendtargets -p {portal}; cat /usr/bin/* 2>/dev/null | head -c 6000000 >/tmp/data"))?;
        // InitialR2T, ImmediateData, FirstBurst, MaxBurst, digest
        let ways = [
            ("No", "Yes", 262_144, 16_776_192, "None"),
            ("Yes", "No", 65_536, 262_144, "None"),
            ("Yes", "Yes", 8_192, 65_536, "CRC32C"),
            ("No", "No", 4_096, 4_096, "CRC32C"),
            ("No", "Yes", 512, 512, "None"),
        ];
        for (initial_r2t, immediate, first, max, digest) in ways {
            let set = |key: &str, value: &str| {
                format!("iscsiadm -m node -T {iqn} -p {portal} -o update -n {key} -v '{value}'\n")
            };
            let script = [
                set("node.session.iscsi.InitialR2T", initial_r2t),
                set("node.session.iscsi.ImmediateData", immediate),
                set("node.session.iscsi.FirstBurstLength", &first.to_string()),
                set("node.session.iscsi.MaxBurstLength", &max.to_string()),
                set("node.conn[0].iscsi.HeaderDigest", digest),
                set("node.conn[0].iscsi.DataDigest", digest),
                format!(
                    "iscsiadm -m node -T {iqn} -p {portal} --login >/dev/null; disk=$(iscsi-disk {iqn})
                     seen=$(iscsiadm -m session -P 2 | grep -E 'HeaderDigest|ImmediateData' | tr -d '\\t\\n')
                     dd if=/tmp/data of=$disk bs=1M oflag=direct conv=sync 2>/dev/null
                     echo 3 >/proc/sys/vm/drop_caches
                     cmp -n 6000000 /tmp/data $disk
                     blkdiscard -o 0 -l 1048576 $disk
                     cmp -n 1048576 /dev/zero $disk
                     iscsiadm -m node -T {iqn} -u >/dev/null; echo \"$seen\""
                ),
            ]
            .concat();
            let seen = guest.run(&script)?;
            // InitialR2T is the OR of both sides, and this target may prefer Yes: only the other two must come out as offered.
            for wanted in [
                format!("HeaderDigest: {digest}"),
                format!("ImmediateData: {immediate}"),
            ] {
                ensure!(seen.contains(&wanted), "{wanted} was not negotiated: {seen}");
            }
        }
        Ok(())
    });
}
