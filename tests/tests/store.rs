//! The store's files gone wrong, as operators and initiators see it: bad data is an error for its own blocks, listed and healed;
//! a file that is not what it should be is one clear sentence, an exit code, and nothing is changed.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_snapshot::{Pool, PoolOptions};
use stillpoint_tests::raw::{Cdb, Nexus, Raw};
use stillpoint_tests::{Daemon, Scratch, run, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const DISK: &str = "iqn.2026-11.test:disk";
const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
    [[lun]]\nname = \"disk\"\nsize = \"16MiB\"\nchecksums = \"always\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n";
const BLOCK: usize = 512;
/// Blocks of a grain.
const GRAIN: usize = 8;
const CHECK_CONDITION: u8 = 2;
/// Large, and without a meaning: left out, the daemon makes it again.
const BALLAST: &str = "ballast";

fn log_in(daemon: &Daemon) -> Result<Raw> {
    let address = SocketAddr::from(([127, 0, 0, 1], daemon.port()));
    let mut raw = Raw::login(address, &Nexus::new("iqn.2026-11.test.store:me", DISK))?.session()?;
    raw.ready(0)?;
    Ok(raw)
}

/// Blocks that say which they are.
fn content(tag: u8, lba: usize, blocks: usize) -> Vec<u8> {
    let block = |n: usize| {
        let mut bytes = vec![tag; BLOCK];
        bytes.splice(..8, (n as u64).to_be_bytes());
        bytes
    };
    (lba..lba + blocks).flat_map(block).collect()
}

/// Flips a bit of a block in the data file.
fn rot(pool: &Path, tag: u8, lba: usize) -> Result<()> {
    let path = pool.join("data");
    let (bytes, wanted) = (fs::read(&path)?, content(tag, lba, 1));
    let place = bytes
        .chunks_exact(BLOCK)
        .position(|block| block == wanted)
        .context("the block is not in the data file")?;
    let file = fs::File::options().write(true).open(&path)?;
    file.write_all_at(&[tag ^ 1], (place * BLOCK + 100) as u64)?;
    Ok(())
}

/// The block that INFORMATION names, of a read that must fail with MEDIUM ERROR, UNRECOVERED READ ERROR (3/11/00).
fn unread(raw: &mut Raw, lba: u32, blocks: u16) -> Result<u32> {
    let reply = raw.run(&Cdb::read10(0, lba, blocks))?;
    ensure!(
        reply.status == CHECK_CONDITION && reply.sense_code() == (3, 0x11, 0),
        "{reply:?}"
    );
    ensure!(
        reply.sense.first() == Some(&0xf0),
        "INFORMATION is valid: {reply:?}"
    );
    let information = reply.sense.get(3..7).context("fixed sense")?;
    Ok(u32::from_be_bytes(information.try_into()?))
}

fn ranges(value: &Value) -> Result<Vec<(Option<String>, u64, u64)>> {
    let list = value["bad_data"].as_array().with_context(|| format!("{value}"))?;
    let range = |bad: &Value| {
        ensure!(bad["reason"] == "checksum" && bad["lun"] == "disk", "{bad}");
        Ok((
            bad["snapshot"].as_str().map(str::to_owned),
            bad["lba"].as_u64().context("lba")?,
            bad["blocks"].as_u64().context("blocks")?,
        ))
    };
    list.iter().map(range).collect()
}

#[test]
fn bad_data_is_an_error_of_its_blocks_listed_scrubbed_and_healed() {
    story("bad data", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let mut raw = log_in(&daemon)?;
        raw.write(0, 0, &content(7, 0, 64))?;
        let shown = daemon.json(&["lun", "show", "disk"])?;
        ensure!(
            shown["checksums"] == "always" && shown["bad_data"] == serde_json::json!([]),
            "{shown}"
        );
        daemon.text(&["store", "scrub", "--rate", "0B"])?;

        rot(&daemon.data().join("pool"), 7, 19)?;
        ensure!(unread(&mut raw, 0, 64)? == 16, "the first block of the grain");
        ensure!(unread(&mut raw, 20, 2)? == 20, "the first that was asked for");
        ensure!(raw.read(0, 0, 16)? == content(7, 0, 16), "blocks before it");
        ensure!(raw.read(0, 24, 40)? == content(7, 24, 40), "blocks after it");
        let here = (None, 16, GRAIN as u64);
        ensure!(ranges(&daemon.json(&["lun", "show", "disk"])?)? == std::slice::from_ref(&here));
        daemon.text(&[
            "snapshot",
            "create",
            "disk",
            "--name",
            "s",
            "--consistency",
            "crash",
        ])?;
        let there = (Some("s".to_owned()), 16, GRAIN as u64);
        ensure!(ranges(&daemon.json(&["snapshot", "show", "disk@s"])?)? == std::slice::from_ref(&there));
        ensure!(daemon.json(&["status"])?["health"] == "error");
        let events = daemon.text(&["events"])?;
        ensure!(events.contains("SP-3010"), "{events}");

        let scrub = daemon.cli(&["store", "scrub", "--rate", "0B", "--json"])?;
        ensure!(scrub.code == 1, "{scrub:?}");
        let found: Value = serde_json::from_str(&scrub.stdout)?;
        ensure!(found["state"] == "done" && found["problem_count"] == 1, "{found}");
        ensure!(ranges(&found)? == [here, there.clone()], "{found}");

        raw.write(0, 16, &content(8, 16, GRAIN))?;
        ensure!(raw.read(0, 16, 8)? == content(8, 16, 8), "written anew");
        ensure!(ranges(&daemon.json(&["lun", "show", "disk"])?)? == [there]);
        daemon.text(&["snapshot", "delete", "disk@s", "--yes"])?;
        wait_until("the last placement to go", Duration::from_secs(20), || {
            Ok(daemon.json(&["store", "stats"])?["bad_grains"] == 0)
        })?;
        daemon.text(&["store", "scrub", "--restart", "--rate", "0B"])?;
        ensure!(daemon.json(&["store", "scrub", "--status"])?["problem_count"] == 0);
        Ok(())
    });
}

/// CRC-32C, bit by bit: a header of a later version must be right in everything else.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    })
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_name() == BALLAST {
            continue;
        }
        if entry.path().is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Every file below a directory and what is in it, lock and ballast aside.
fn files(dir: &Path) -> Result<BTreeMap<PathBuf, u32>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name == "lock" || name == BALLAST {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.insert(path.clone(), crc32c(&fs::read(&path)?));
        }
    }
    Ok(found)
}

fn cut(path: &Path, part: u64) -> Result<()> {
    let file = fs::File::options().write(true).open(path)?;
    let len = file.metadata()?.len();
    Ok(file.set_len(len.checked_div(part).unwrap_or(0))?)
}

/// The superblocks say a format that nobody knows yet, with right checksums.
fn newer(data: &Path) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(data)?;
    for slot in [0, 4096] {
        let mut bytes = [0; 16 + 4 + 16 + 4 + 8];
        file.read_exact_at(&mut bytes, slot)?;
        if let Some(format) = bytes.get_mut(16..20) {
            format.copy_from_slice(&9u32.to_be_bytes());
        }
        let (magic, _) = bytes.split_at(16);
        let crc = crc32c(&[magic, &bytes[..]].concat());
        file.write_all_at(&[&bytes[..], &crc.to_be_bytes()].concat(), slot)?;
    }
    Ok(())
}

/// A data file that has seen later commits.
const LATER: &str = "later-data";

/// What was done to the pool, how, and a word of what is said about it.
type Damage = (&'static str, fn(&Path, &Path) -> Result<()>, &'static str);

const DAMAGES: &[Damage] = &[
    (
        "data file cut off",
        |pool, _| cut(&pool.join("data"), 2),
        "data file",
    ),
    (
        "data file empty",
        |pool, _| cut(&pool.join("data"), 0),
        "superblock",
    ),
    (
        "data file missing",
        |pool, _| Ok(fs::remove_file(pool.join("data"))?),
        "pool",
    ),
    (
        "data file of another pool",
        |pool, other| {
            fs::copy(other.join("data"), pool.join("data"))
                .map(drop)
                .map_err(Into::into)
        },
        "different pools",
    ),
    (
        "data file of a newer version",
        |pool, _| newer(&pool.join("data")),
        "format 9",
    ),
    (
        "metadata missing",
        |pool, _| Ok(fs::remove_dir_all(pool.join("meta"))?),
        "pool",
    ),
    (
        "log of the metadata cut off",
        |pool, _| cut(&pool.join("meta/db"), 3),
        "",
    ),
    (
        "log of the metadata empty",
        |pool, _| cut(&pool.join("meta/db"), 0),
        "",
    ),
    (
        "metadata of another pool",
        |pool, other| {
            fs::remove_dir_all(pool.join("meta"))?;
            copy(&other.join("meta"), &pool.join("meta"))
        },
        "different pools",
    ),
    (
        "metadata of an earlier commit",
        |pool, other| {
            fs::copy(other.with_file_name(LATER), pool.join("data"))
                .map(drop)
                .map_err(Into::into)
        },
        "the data file has seen",
    ),
    (
        "metadata is a file",
        |pool, _| {
            fs::remove_dir_all(pool.join("meta"))?;
            Ok(fs::write(pool.join("meta"), b"x")?)
        },
        "pool",
    ),
    (
        "data file is a directory",
        |pool, _| {
            fs::remove_file(pool.join("data"))?;
            Ok(fs::create_dir(pool.join("data"))?)
        },
        "pool",
    ),
    (
        "settings of the metadata cut off",
        |pool, _| cut(&pool.join("meta/conf"), 2),
        "",
    ),
];

#[test]
fn a_file_that_is_not_what_it_should_be_is_refused_and_left_alone() {
    story("bad store files", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let mut raw = log_in(&daemon)?;
        for lba in (0..2048).step_by(64) {
            raw.write(0, u32::try_from(lba)?, &content(7, lba, 64))?;
        }
        raw.hang_up()?;
        ensure!(daemon.stop()? == 0);
        let (pool, good, other) = (
            daemon.data().join("pool"),
            scratch.file("good"),
            scratch.file("other"),
        );
        copy(&pool, &good)?;
        daemon.resume()?;
        for name in ["a", "b"] {
            daemon.text(&[
                "snapshot",
                "create",
                "disk",
                "--name",
                name,
                "--consistency",
                "crash",
            ])?;
        }
        ensure!(daemon.stop()? == 0);
        fs::copy(pool.join("data"), scratch.file(LATER))?;
        let options = PoolOptions {
            ballast_bytes: 0,
            ..PoolOptions::default()
        };
        Pool::create(&other, &options)?.shutdown()?;
        for (name, damage, word) in DAMAGES {
            fs::remove_dir_all(&pool)?;
            copy(&good, &pool)?;
            damage(&pool, &other).with_context(|| (*name).to_owned())?;
            let before = files(&pool)?;
            let checked = daemon.cli(&["store", "check"])?;
            let said = format!("{}{}", checked.stdout, checked.stderr);
            ensure!(checked.code == 1 && said.contains(word), "{name}: {checked:?}");
            ensure!(files(&pool)? == before, "{name}: the check changed a file");
            let repaired = daemon.cli(&["store", "repair", "--plan"])?;
            ensure!(
                repaired.code <= 3 && !repaired.stderr.contains("panic"),
                "{name}: {repaired:?}"
            );
            ensure!(
                files(&pool)? == before,
                "{name}: the plan of a repair changed a file"
            );
            let (code, log) = daemon.refuses_to_start().with_context(|| (*name).to_owned())?;
            ensure!(
                code == 1 && log.contains(word) && !log.contains("panicked"),
                "{name}: exit {code}: {log}"
            );
            // sled has its own ideas of what opening writes; ours are as they were, and what is right again opens.
            let ours = |all: BTreeMap<PathBuf, u32>| -> BTreeMap<PathBuf, u32> {
                let own = |path: &PathBuf| !path.starts_with(pool.join("meta"));
                all.into_iter()
                    .filter(|(path, crc)| own(path) && *crc != 0)
                    .collect()
            };
            ensure!(
                ours(files(&pool)?) == ours(before),
                "{name}: the daemon changed a file"
            );
        }
        fs::remove_dir_all(&pool)?;
        copy(&good, &pool)?;
        daemon.resume()?;
        ensure!(
            log_in(&daemon)?.read(0, 0, 64)? == content(7, 0, 64),
            "the pool as it was"
        );
        Ok(())
    });
}

/// A file system of its own at the daemon's data directory.
struct Disk(PathBuf);

impl Disk {
    fn mount(scratch: &Scratch) -> Result<Self> {
        let dir = scratch.file("data");
        fs::create_dir(&dir)?;
        let disk = Self(dir);
        disk.call(&["-t", "tmpfs", "-o", "size=512M", "tmpfs"])
            .context("this story needs root, to mount a file system")?;
        Ok(disk)
    }

    fn call(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new("mount");
        command.args(arguments).arg(&self.0);
        run(&mut command, Duration::from_secs(30))?.success().map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        command.arg("--lazy").arg(&self.0);
        run(&mut command, Duration::from_secs(30)).ok();
    }
}

/// One sentence that has these words, the exit code, and no trace of a panic.
fn refused(daemon: &Daemon, verb: &[&str], code: i32, word: &str) -> Result<()> {
    let finished = daemon.cli(verb)?;
    ensure!(
        finished.code == code && finished.stderr.contains(word) && !finished.stderr.contains("panick"),
        "{verb:?}: wanted exit code {code} and {word:?}: {finished:?}"
    );
    Ok(())
}

#[test]
fn on_a_read_only_and_on_a_full_file_system_nothing_changes() {
    story("store on a read-only or full file system", |scratch| {
        let disk = Disk::mount(scratch)?;
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let mut raw = log_in(&daemon)?;
        raw.write(0, 0, &content(7, 0, 64))?;
        raw.hang_up()?;
        ensure!(daemon.stop()? == 0);
        let (pool, dump) = (daemon.data().join("pool"), scratch.file("good.dump"));
        let named = dump.to_str().context("a path of the test")?;
        let before = files(&pool)?;

        disk.call(&["-o", "remount,ro"])?;
        daemon.text(&["store", "check"])?;
        daemon.text(&["store", "dump", "--out", named])?;
        daemon.text(&["store", "repair", "--plan"])?;
        refused(
            &daemon,
            &["store", "restore", named, "--yes"],
            1,
            "ead-only file system",
        )?;
        let (code, log) = daemon.refuses_to_start()?;
        ensure!(
            code == 1 && log.contains("ead-only file system") && !log.contains("panick"),
            "exit {code}: {log}"
        );
        ensure!(files(&pool)? == before, "a file was changed");
        disk.call(&["-o", "remount,rw"])?;

        // Not a byte is left for what is made new beside the old.
        let (full, within) = (disk.0.join("full"), disk.0.join("a.dump"));
        let mut rest = fs::File::create(&full)?;
        let filled = std::io::copy(&mut std::io::repeat(1), &mut rest);
        ensure!(
            filled.is_err_and(|e| e.kind() == std::io::ErrorKind::StorageFull),
            "the file system is not full"
        );
        daemon.text(&["store", "check"])?;
        refused(&daemon, &["store", "restore", named, "--yes"], 1, "space")?;
        let within = within.to_str().context("a path of the test")?;
        refused(&daemon, &["store", "dump", "--out", within], 1, "space")?;
        ensure!(!Path::new(within).exists(), "a part of a dump is left");
        ensure!(files(&pool)? == before, "a file was changed");
        drop(rest);
        fs::remove_file(&full)?;
        daemon.resume()?;
        ensure!(
            log_in(&daemon)?.read(0, 0, 64)? == content(7, 0, 64),
            "the pool as it was"
        );
        Ok(())
    });
}

#[test]
fn a_dump_that_is_not_what_it_should_be_is_refused_and_nothing_is_changed() {
    story("bad dumps", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let mut raw = log_in(&daemon)?;
        raw.write(0, 0, &content(7, 0, 64))?;
        raw.hang_up()?;
        ensure!(daemon.stop()? == 0);
        let (pool, other) = (daemon.data().join("pool"), scratch.file("other"));
        let text = daemon.text(&["store", "dump"])?;
        let options = PoolOptions {
            ballast_bytes: 0,
            ..PoolOptions::default()
        };
        Pool::create(&other, &options)?.shutdown()?;
        let mut foreign = Vec::new();
        stillpoint_snapshot::dump(&other, &mut foreign)?;
        let lines: Vec<&str> = text.lines().collect();
        let half = lines.len() / 2;
        let (first, last) = lines.split_at(half);
        let dumps: [(&str, Vec<u8>, &str); 6] = [
            ("empty", Vec::new(), ""),
            ("cut off", first.join("\n").into_bytes(), ""),
            ("without its begin", last.join("\n").into_bytes(), "line 1"),
            ("no text", vec![0xfe; 5000], "dump"),
            (
                "of a newer version",
                text.replacen("\"dump\":1", "\"dump\":9", 1)
                    .replacen("\"format\":1", "\"format\":9", 1)
                    .into_bytes(),
                "9",
            ),
            ("of another pool", foreign, "not the metadata of"),
        ];
        let before = files(&pool)?;
        for (name, bytes, word) in dumps {
            let path = scratch.file("bad.dump");
            fs::write(&path, bytes)?;
            let named = path.to_str().context("a path of the test")?;
            let code = if name == "of another pool" { 3 } else { 1 };
            refused(&daemon, &["store", "restore", named, "--yes"], code, word).context(name)?;
            ensure!(files(&pool)? == before, "{name}: a file was changed");
        }
        refused(
            &daemon,
            &["store", "restore", "/nowhere/at-all", "--yes"],
            1,
            "/nowhere/at-all",
        )?;
        daemon.resume()?;
        ensure!(
            log_in(&daemon)?.read(0, 0, 64)? == content(7, 0, 64),
            "the pool as it was"
        );
        Ok(())
    });
}
