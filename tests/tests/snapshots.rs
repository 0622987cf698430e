//! A snapshot's life without agents, with libiscsi as the initiator: cut, look in, hold, compare, clone, revert, delete.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{
    Daemon, Scratch, qemu_img, qemu_io, qemu_io_read_only, qemu_session, story, wait_until,
};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const LIMIT: Duration = Duration::from_secs(30);
const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
    [[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n\
    [[lun]]\nname = \"log\"\nsize = \"64MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n\
    [[target]]\niqn = \"iqn.2026-11.test:log\"\nluns = [\"log\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n";
const DISK: &str = "iqn.2026-11.test:disk";
const LOG: &str = "iqn.2026-11.test:log";

fn names(daemon: &Daemon, lun: &str) -> Result<Vec<String>> {
    let list = daemon.json(&["snapshot", "list", lun])?;
    Ok(list
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|s| s["name"].as_str())
        .map(str::to_owned)
        .collect())
}

/// Mounts a snapshot; gives the mount's name and its URL.
fn mount(daemon: &Daemon, snapshot: &str, options: &[&str]) -> Result<(String, String)> {
    let mount = daemon.json(&[&["snapshot", "mount", snapshot], options].concat())?;
    let text = |key: &str| {
        mount[key]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("no {key} in {mount}"))
    };
    let lun = mount["lun"]
        .as_u64()
        .and_then(|lun| u16::try_from(lun).ok())
        .with_context(|| format!("no lun in {mount}"))?;
    Ok((text("name")?, daemon.url(&text("iqn")?, lun)))
}

#[test]
fn default_names_and_json() {
    story("snapshot names", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let mut made = Vec::new();
        for _ in 0..3 {
            let created = daemon.json(&["snapshot", "create", "disk"])?;
            let name = created["name"]
                .as_str()
                .with_context(|| format!("no name in {created}"))?
                .to_owned();
            let stamp = name.split('-').next().unwrap_or_default();
            let form: String = stamp
                .chars()
                .map(|c| if c.is_ascii_digit() { '0' } else { c })
                .collect();
            ensure!(form == "00000000T000000Z", "{name}");
            ensure!(
                created["consistency"] == "crash" && created["lun"] == "disk",
                "{created}"
            );
            ensure!(
                created["cut_ms"]
                    .as_f64()
                    .is_some_and(|ms| (0.0..2000.0).contains(&ms)),
                "{created}"
            );
            ensure!(
                created["agents"].as_array().is_some_and(Vec::is_empty),
                "{created}"
            );
            made.push(name);
        }
        ensure!(names(&daemon, "disk")? == made, "{made:?}");
        daemon.refused(
            1,
            &[
                "snapshot",
                "create",
                "disk",
                "--name",
                made.first().context("one was made")?,
            ],
        )?;
        // Several LUNs: one cut, one group.
        let group = daemon.json(&[
            "snapshot",
            "create",
            "disk,log",
            "--name",
            "both",
            "--note",
            "before the update",
        ])?;
        let group = group
            .as_array()
            .with_context(|| format!("not an array: {group}"))?;
        ensure!(group.len() == 2, "{group:?}");
        let id = |value: &Value| value["group_id"].as_str().map(str::to_owned);
        let ids: Vec<_> = group.iter().map(id).collect();
        ensure!(
            ids.first().is_some_and(Option::is_some) && ids.first() == ids.last(),
            "{group:?}"
        );
        let shown = daemon.json(&["snapshot", "show", "log@both"])?;
        ensure!(shown["name"] == "both" && shown["lun"] == "log", "{shown}");
        ensure!(shown.to_string().contains("before the update"), "{shown}");
        Ok(())
    });
}

#[test]
fn one_cut_over_two_luns() {
    story("one cut over two LUNs", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let (disk, log) = (daemon.url(DISK, 0), daemon.url(LOG, 0));
        qemu_io(&disk, &["write -P 1 0 1M"])?.success()?;
        qemu_io(&log, &["write -P 2 0 1M"])?.success()?;
        daemon.json(&["snapshot", "create", "disk,log", "--name", "both"])?;
        qemu_io(&disk, &["write -P 3 0 1M"])?.success()?;
        qemu_io(&log, &["write -P 4 0 1M"])?.success()?;
        for (snapshot, pattern) in [("disk@both", 1), ("log@both", 2)] {
            let (_, url) = mount(&daemon, snapshot, &["--read-only"])?;
            qemu_io_read_only(&url, &[&format!("read -P {pattern} 0 1M"), "read -P 0 1M 1M"])?.success()?;
            ensure!(
                qemu_io(&url, &["write -P 9 0 4k"])?.code != 0,
                "a read-only mount was written"
            );
        }
        Ok(())
    });
}

#[test]
fn mounts_are_writable_and_survive_a_restart() {
    story("snapshot mounts", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let disk = daemon.url(DISK, 0);
        qemu_io(&disk, &["write -P 0x41 0 2M"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "s"])?;
        let (name, url) = mount(&daemon, "disk@s", &[])?;
        qemu_io(&url, &["read -P 0x41 0 2M", "write -P 0x42 0 1M", "flush"])?.success()?;
        qemu_io(&disk, &["read -P 0x41 0 2M"])?.success()?;

        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.resume()?;
        qemu_io(&url, &["read -P 0x42 0 1M", "read -P 0x41 1M 1M"])?.success()?;

        // In use: refused, unless its sessions may be ended.
        let session = qemu_session(scratch, "mount", &url)?;
        wait_until("the session", LIMIT, || {
            Ok(daemon
                .json(&["session", "list"])?
                .as_array()
                .is_some_and(|sessions| !sessions.is_empty()))
        })?;
        daemon.refused(3, &["snapshot", "unmount", &name, "--yes"])?;
        daemon.json(&["snapshot", "unmount", &name, "--force", "--yes"])?;
        drop(session);
        ensure!(
            qemu_img(&["info", "-f", "raw", &url])?.code != 0,
            "an unmounted snapshot is still there"
        );

        // What was written to the mount is gone; the snapshot is as it was.
        let (_, url) = mount(&daemon, "disk@s", &[])?;
        qemu_io(&url, &["read -P 0x41 0 2M"])?.success()?;
        daemon.refused(3, &["snapshot", "delete", "disk@s", "--yes"])?;
        Ok(())
    });
}

#[test]
fn revert_and_undo() {
    story("revert", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let disk = daemon.url(DISK, 0);
        qemu_io(&disk, &["write -P 0x51 0 4M"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "good"])?;
        qemu_io(&disk, &["write -P 0x52 1M 1M", "discard 3M 1M"])?.success()?;
        let identity = daemon.json(&["lun", "show", "disk"])?["naa"].clone();

        let plan = daemon.text(&["snapshot", "revert", "disk@good", "--plan"])?;
        ensure!(plan.contains("good"), "{plan}");
        ensure!(names(&daemon, "disk")? == ["good"], "a plan made a snapshot");

        let session = qemu_session(scratch, "busy", &disk)?;
        wait_until("the session", LIMIT, || {
            Ok(daemon
                .json(&["session", "list"])?
                .as_array()
                .is_some_and(|sessions| !sessions.is_empty()))
        })?;
        let refusal = daemon.refused(3, &["snapshot", "revert", "disk@good", "--yes"])?;
        ensure!(
            refusal["message"]
                .as_str()
                .is_some_and(|text| text.contains("iqn.2008-11.org.linux-kvm")),
            "{refusal}"
        );
        drop(session);
        wait_until("the session to end", LIMIT, || {
            Ok(daemon
                .json(&["session", "list"])?
                .as_array()
                .is_some_and(Vec::is_empty))
        })?;
        ensure!(
            daemon.cli(&["snapshot", "revert", "disk@good"])?.code != 0,
            "reverted without a question"
        );
        daemon.json(&["snapshot", "revert", "disk@good", "--yes"])?;
        qemu_io(&disk, &["read -P 0x51 0 4M"])?.success()?;
        ensure!(
            daemon.json(&["lun", "show", "disk"])?["naa"] == identity,
            "a revert keeps the identity"
        );

        let automatic = names(&daemon, "disk")?
            .into_iter()
            .find(|name| name != "good")
            .context("no automatic snapshot")?;
        daemon.json(&["snapshot", "revert", &format!("disk@{automatic}"), "--yes"])?;
        qemu_io(
            &disk,
            &[
                "read -P 0x51 0 1M",
                "read -P 0x52 1M 1M",
                "read -P 0x51 2M 1M",
                "read -P 0 3M 1M",
            ],
        )?
        .success()?;
        Ok(())
    });
}

#[test]
fn holds_locks_and_deletion() {
    story("holds, locks, deletion", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        qemu_io(&daemon.url(DISK, 0), &["write -P 1 0 1M"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "held"])?;
        daemon.json(&["snapshot", "create", "disk", "--name", "locked", "--lock", "7d"])?;
        daemon.json(&["snapshot", "create", "disk", "--name", "plain"])?;
        daemon.json(&["snapshot", "hold", "disk@held"])?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.resume()?;
        for name in ["held", "locked"] {
            let refusal = daemon.refused(3, &["snapshot", "delete", &format!("disk@{name}"), "--yes"])?;
            ensure!(
                refusal["message"]
                    .as_str()
                    .is_some_and(|text| text.contains(name)),
                "{refusal}"
            );
        }
        ensure!(
            daemon.cli(&["snapshot", "delete", "disk@plain"])?.code != 0,
            "deleted without a question"
        );
        daemon.json(&["snapshot", "delete", "disk@plain", "--yes"])?;
        daemon.json(&["snapshot", "release", "disk@held"])?;
        daemon.json(&["snapshot", "delete", "disk@held", "--yes"])?;
        ensure!(
            names(&daemon, "disk")? == ["locked"],
            "{:?}",
            names(&daemon, "disk")?
        );
        qemu_io(&daemon.url(DISK, 0), &["read -P 1 0 1M"])?.success()?;
        Ok(())
    });
}

#[test]
fn differences() {
    story("snapshot diff", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let disk = daemon.url(DISK, 0);
        qemu_io(&disk, &["write -P 1 0 8M"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "a"])?;
        qemu_io(&disk, &["write -P 2 2M 64k", "discard 4M 1M"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "b"])?;
        qemu_io(&disk, &["write -P 3 16M 4k"])?.success()?;
        let changed = |arguments: &[&str]| -> Result<Vec<(u64, u64)>> {
            let diff = daemon.json(&[&["snapshot", "diff"], arguments].concat())?;
            let extents = diff
                .as_array()
                .or_else(|| diff["extents"].as_array())
                .with_context(|| format!("{diff}"))?;
            let mut ranges = Vec::<(u64, u64)>::new();
            for extent in extents {
                let number = |key: &str| {
                    extent[key]
                        .as_u64()
                        .with_context(|| format!("no {key} in {extent}"))
                };
                let (offset, length) = (number("offset_bytes")?, number("length_bytes")?);
                match ranges.last_mut() {
                    Some(last) if last.0 + last.1 == offset => last.1 += length,
                    _ => ranges.push((offset, length)),
                }
            }
            Ok(ranges)
        };
        const MIB: u64 = 1 << 20;
        ensure!(
            changed(&["disk@a", "disk@b"])? == [(2 * MIB, 65536), (4 * MIB, MIB)],
            "{:?}",
            changed(&["disk@a", "disk@b"])?
        );
        ensure!(
            changed(&["disk@b"])? == [(16 * MIB, 4096)],
            "{:?}",
            changed(&["disk@b"])?
        );
        Ok(())
    });
}

#[test]
fn clones() {
    story("clones", clone_story);
}

fn clone_story(scratch: &Scratch) -> Result<()> {
    let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
    let disk = daemon.url(DISK, 0);
    qemu_io(&disk, &["write -P 0x61 0 2M"])?.success()?;
    daemon.json(&["snapshot", "create", "disk", "--name", "s"])?;
    daemon.json(&["clone", "create", "disk@s", "copy"])?;
    let volumes = daemon.json(&["volume", "list"])?;
    ensure!(
        volumes
            .as_array()
            .into_iter()
            .flatten()
            .any(|volume| volume["name"] == "copy"),
        "{volumes}"
    );
    daemon.write_config(&format!(
        "{CONFIG}[[lun]]\nname = \"copy\"\nsize = \"64MiB\"\n\
         [[target]]\niqn = \"iqn.2026-11.test:copy\"\nluns = [\"copy\"]\ninitiators = [\"*\"]\n"
    ))?;
    daemon.text(&["config", "apply", "--yes"])?;
    let copy = daemon.url("iqn.2026-11.test:copy", 0);
    qemu_io(&copy, &["read -P 0x61 0 2M", "write -P 0x62 0 1M"])?.success()?;
    qemu_io(&disk, &["read -P 0x61 0 2M", "write -P 0x63 1M 1M"])?.success()?;
    qemu_io(&copy, &["read -P 0x62 0 1M", "read -P 0x61 1M 1M"])?.success()?;
    let identity = |lun: &str| -> Result<Value> { Ok(daemon.json(&["lun", "show", lun])?["naa"].clone()) };
    ensure!(
        identity("copy")? != identity("disk")?,
        "a clone has an identity of its own"
    );
    Ok(())
}

#[test]
fn what_snapshots_hold() {
    story("space of snapshots", |scratch| {
        const MIB: u64 = 1 << 20;
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let disk = daemon.url(DISK, 0);
        qemu_io(&disk, &["write -P 1 0 8M", "flush"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "a"])?;
        daemon.json(&["snapshot", "create", "disk", "--name", "b"])?;
        qemu_io(&disk, &["write -P 2 0 4M", "flush"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "c"])?;
        qemu_io(&disk, &["write -P 3 7M 1M", "flush"])?.success()?;
        let used = || -> Result<u64> {
            let status = daemon.json(&["status"])?;
            status["pool"]["used_bytes"].as_u64().context("no figure")
        };
        let list = daemon.json(&["snapshot", "list", "disk"])?;
        let figures = |i: usize| {
            (
                list[i]["referenced_bytes"].as_u64(),
                list[i]["unique_bytes"].as_u64(),
            )
        };
        let same = Some(8 * MIB);
        ensure!(
            [figures(0), figures(1), figures(2)] == [(same, Some(0)), (same, Some(0)), (same, Some(0))],
            "{list}"
        );

        // `a` and `b` share 4 MiB with nobody else; all three also the MiB that was overwritten last.
        let plan = daemon.json(&["snapshot", "delete", "disk@a", "disk@b", "--plan"])?;
        ensure!(plan["frees_bytes"] == 4 * MIB, "{plan}");
        let plan = daemon.json(&["snapshot", "delete", "disk@c", "disk@a", "disk@b", "--plan"])?;
        ensure!(plan["frees_bytes"] == 5 * MIB, "{plan}");
        ensure!(names(&daemon, "disk")?.len() == 3, "a plan deleted something");
        daemon.refused(1, &["snapshot", "delete", "disk@a", "disk@none", "--yes"])?;
        ensure!(names(&daemon, "disk")?.len() == 3, "all or none");

        let before = used()?;
        let deleted = daemon.json(&["snapshot", "delete", "disk@a", "disk@b", "--yes"])?;
        ensure!(
            deleted.as_array().is_some_and(|list| list.len() == 2),
            "{deleted}"
        );
        wait_until("the space to be free", LIMIT, || Ok(before - used()? == 4 * MIB))?;
        let shown = daemon.json(&["snapshot", "show", "disk@c"])?;
        ensure!(shown["unique_bytes"] == MIB, "{shown}");
        let before = used()?;
        daemon.json(&["snapshot", "delete", "disk@c", "--yes"])?;
        wait_until("the space to be free", LIMIT, || Ok(before - used()? == MIB))
    });
}
