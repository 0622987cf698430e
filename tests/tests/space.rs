//! A full disk: writes that need space fail, everything else goes on, and the daemon is well again when space is back.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stillpoint_tests::raw::{Cdb, Nexus, Raw};
use stillpoint_tests::{Daemon, Scratch, qemu_io, run, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const LIMIT: Duration = Duration::from_secs(30);
const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"disk\"\nsize = \"4GiB\"\n\
                      [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n";

/// A small file system of its own at the daemon's data directory.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(scratch: &Scratch, size: &str) -> Result<Self> {
        let dir = scratch.file("data");
        std::fs::create_dir(&dir)?;
        run(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
                .arg(&dir),
            LIMIT,
        )?
        .success()
        .context("this story needs root, to mount a small file system")?;
        Ok(Self(dir))
    }

    fn resize(&self, size: &str) -> Result<()> {
        run(
            Command::new("mount")
                .args(["-o", &format!("remount,size={size}")])
                .arg(&self.0),
            LIMIT,
        )?
        .success()?;
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run(Command::new("umount").arg("--lazy").arg(&self.0), LIMIT).ok();
    }
}

/// Writes 8 MiB pieces from `from` MiB on until one fails; how many MiB went in.
fn fill(url: &str, from: usize, until: usize) -> Result<usize> {
    for at in (from..until).step_by(8) {
        let finished = qemu_io(url, &[&format!("write -P 0x33 {at}M 8M"), "flush"])?;
        if finished.code != 0 {
            return Ok(at);
        }
    }
    anyhow::bail!("{until} MiB went into a smaller file system")
}

#[test]
fn full_disk() {
    story("full disk", |scratch| {
        let disk = SmallDisk::mount(scratch, "640M")?;
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let url = daemon.url("iqn.2026-11.test:disk", 0);
        let full_at = fill(&url, 0, 1024)?;
        println!("story full disk: {full_at} MiB went into 640 MiB");
        ensure!(
            full_at >= 64,
            "only {full_at} MiB went into a file system of 640 MiB"
        );

        // What was acknowledged is there, what needs no space works, and the daemon says what is wrong.
        qemu_io(
            &url,
            &[
                "read -P 0x33 0 8M",
                "write -P 0x34 0 1M",
                "read -P 0x34 0 1M",
                "flush",
            ],
        )?
        .success()?;
        let last = full_at - 8;
        qemu_io(&url, &[&format!("read -P 0x33 {last}M 8M")])?.success()?;
        daemon.json(&["status"])?;
        daemon.json(&["lun", "list"])?;
        let events = daemon.json(&["events"])?;
        ensure!(
            events
                .as_array()
                .into_iter()
                .flatten()
                .any(|event| event["text"].as_str().is_some_and(|t| t.contains("space"))),
            "no event speaks of space: {events}"
        );

        // Space made by the initiator: discarded, committed, usable again.
        qemu_io(&url, &["discard 8M 32M", "flush"])?.success()?;
        wait_until("discarded space to be usable", LIMIT, || {
            Ok(qemu_io(&url, &["write -P 0x35 8M 4M", "flush", "read -P 0x35 8M 4M"])?.code == 0)
        })?;

        // Space made by the operator, with no restart.
        fill(&url, full_at, 1024)?;
        disk.resize("1G")?;
        wait_until("new space to be usable", LIMIT, || {
            Ok(qemu_io(
                &url,
                &["write -P 0x36 2048M 8M", "flush", "read -P 0x36 2048M 8M"],
            )?
            .code
                == 0)
        })?;

        // Full again, then stopped and started while full.
        disk.resize("640M").ok();
        let end = fill(&url, 2048 + 8, 4096)?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well on a full disk");
        daemon.resume()?;
        qemu_io(
            &url,
            &["read -P 0x36 2048M 8M", "read -P 0x34 0 1M", "read -P 0x35 8M 4M"],
        )?
        .success()?;
        ensure!(end >= 2056, "nothing fitted after the disk grew");
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.text(&["store", "check"])?;
        Ok(())
    });
}

/// How often each threshold was told: (reached, over).
fn thresholds(daemon: &Daemon) -> Result<(usize, usize)> {
    let events = daemon.json(&["events", "-n", "1000"])?;
    let count = |code: &str| {
        events
            .as_array()
            .into_iter()
            .flatten()
            .filter(|event| event["code"] == code)
            .count()
    };
    Ok((count("SP-3020"), count("SP-3021")))
}

#[test]
fn thin_thresholds() {
    story("thin thresholds", |scratch| {
        let config = format!("[pool]\nmax_size = \"64MiB\"\n{CONFIG}");
        let daemon = Daemon::start(BINARY, scratch, &config)?;
        let address = daemon.portal().parse()?;
        let nexus = |last| Nexus::new("iqn.2026-11.test:a", "iqn.2026-11.test:disk").isid(last);
        let mut writer = Raw::login(address, &nexus(1))?.session()?;
        let mut other = Raw::login(address, &nexus(2))?.session()?;
        let test_ready = Cdb::none(0, &[0; 6]);
        writer.ready(0)?;
        other.ready(0)?;
        let mut at = 0;
        let mut write_mib = |until: u32| -> Result<()> {
            while at < until * 16 {
                let piece = writer.run_write(&Cdb::write10(0, at * 128, 128), &[0x5a; 64 << 10])?;
                // Whoever fills the pool hears of it too; the command is to be sent again then.
                match (piece.status, piece.sense_code()) {
                    (0, _) => at += 1,
                    (_, (6, 0x38, 0x07)) => {}
                    _ => anyhow::bail!("WRITE(10): {piece:?}"),
                }
            }
            Ok(())
        };
        // Mode page 1Ch/02h, in mebibytes: what is left of 64 MiB at 75, 85 and 95 %.
        let page = other.run(&Cdb::reads(0, &[0x1a, 8, 0x1c, 2, 255, 0], 255))?;
        let counts = page.data.get(4 + 16..).unwrap_or_default().chunks_exact(8);
        let counts: Vec<u8> = counts
            .filter_map(|descriptor| descriptor.last().copied())
            .collect();
        ensure!(counts == [16, 9, 3], "the mode page lists {counts:?}");
        write_mib(40)?;
        ensure!(
            thresholds(&daemon)? == (0, 0),
            "62% of the pool is below every threshold"
        );
        write_mib(50)?;
        wait_until("75% to be told", LIMIT, || Ok(thresholds(&daemon)? == (1, 0)))?;
        let mut heard = Vec::new();
        wait_until("the other session to hear of it", LIMIT, || {
            heard.push(other.run(&test_ready)?.sense_code());
            Ok(heard.contains(&(6, 0x38, 0x07)))
        })?;
        other.ready(0)?;
        let status = daemon.json(&["status"])?;
        ensure!(
            status["health"] == "warning" && status["warnings"].to_string().contains("75%"),
            "the status is silent: {status}"
        );

        // Discarded in part: the pool is emptier, and is told so once.
        qemu_io(
            &daemon.url("iqn.2026-11.test:disk", 0),
            &["discard 0 32M", "flush"],
        )?
        .success()?;
        wait_until("the end to be told", LIMIT, || Ok(thresholds(&daemon)? == (1, 1)))
    });
}

#[test]
fn compaction() {
    story("store compact", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let url = daemon.url("iqn.2026-11.test:disk", 0);
        qemu_io(&url, &["write -P 1 0 16M", "flush", "discard 1M 2M", "flush"])?.success()?;
        daemon.json(&["snapshot", "create", "disk", "--name", "s"])?;
        let report = daemon.json(&["store", "compact"])?;
        let stats = daemon.json(&["store", "stats"])?;
        ensure!(
            report["live_bytes"].as_u64() > Some(0) && stats["metadata_live_bytes"].as_u64() > Some(0),
            "{report} {stats}"
        );
        qemu_io(
            &url,
            &["write -P 2 0 1M", "flush", "read -P 2 0 1M", "read -P 1 4M 8M"],
        )?
        .success()?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.text(&["store", "check"])?;
        daemon.resume()?;
        qemu_io(&url, &["read -P 2 0 1M", "read -P 0 1M 2M", "read -P 1 4M 8M"])?.success()?;
        Ok(())
    });
}
