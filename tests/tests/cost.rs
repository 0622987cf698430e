//! What one command costs the daemon, in things that a busy machine does not change: how often it asks the allocator, and how many
//! reads and writes it makes of the kernel (sockets, the data file, and the wake-ups of other threads are all such calls).
//!
//! Each load is repeated and the cheapest round counts: whatever else the daemon does meanwhile only ever adds. The limits are what
//! was counted when they were written; a change that makes a load a tenth more expensive fails here, and one that makes it cheaper
//! should lower its limit.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use stillpoint_tests::raw::{Cdb, Nexus, Raw};
use stillpoint_tests::{Daemon, Scratch, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const DISK: &str = "iqn.2026-11.test:disk";
const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\n";

/// Rounds of each load.
const ROUNDS: u32 = 12;
/// How much dearer a load may become.
const SLACK: f64 = 1.10;
/// What a command may ask of the allocator on top where a worker carries it out.
const WORKER_ALLOCATIONS: f64 = 10.0;
/// Blocks of 512 bytes in 4 KiB and in 64 KiB.
const SMALL: u16 = 8;
const LARGE: u16 = 128;
/// What is written before; the reads and the overwrites stay in it.
const WARM_BLOCKS: u32 = 16 << 11;
/// SYNCHRONIZE CACHE(10) of the whole LUN.
const SYNCHRONIZE: [u8; 10] = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A load, and what each command of it may cost. A worker that answers while its connection is awake makes no call for that: the
/// calls of loads that need one vary, and their limit is the most there can be.
struct Load {
    name: &'static str,
    /// Commands of one round.
    commands: u32,
    allocations: f64,
    calls: f64,
    run: fn(&mut Client, u32) -> Result<()>,
}

const LOADS: &[Load] = &[
    Load {
        name: "4 KiB reads, one by one",
        commands: 256,
        allocations: 0.05,
        calls: 3.00,
        run: |client, commands| (0..commands).try_for_each(|_| client.read(SMALL)),
    },
    Load {
        name: "4 KiB reads, 32 at once",
        commands: 512,
        allocations: 0.05,
        calls: 1.07,
        run: |client, commands| (0..commands / 32).try_for_each(|_| client.reads_at_once(32)),
    },
    Load {
        name: "4 KiB writes in place",
        commands: 256,
        allocations: 1.00,
        calls: 3.00,
        run: |client, commands| (0..commands).try_for_each(|_| client.overwrite(SMALL)),
    },
    Load {
        name: "4 KiB first writes",
        commands: 256,
        allocations: 13.40,
        calls: 4.10,
        run: |client, commands| (0..commands).try_for_each(|_| client.write_anew(SMALL)),
    },
    Load {
        name: "4 KiB writes, each flushed",
        commands: 128,
        allocations: 1.50,
        calls: 3.00,
        run: |client, commands| {
            (0..commands / 2).try_for_each(|_| {
                client.overwrite(SMALL)?;
                client.flush()
            })
        },
    },
    Load {
        name: "64 KiB reads",
        commands: 64,
        allocations: 0.05,
        calls: 3.00,
        run: |client, commands| (0..commands).try_for_each(|_| client.read(LARGE)),
    },
    Load {
        name: "64 KiB writes in place",
        commands: 64,
        allocations: 1.00,
        calls: 3.00,
        run: |client, commands| (0..commands).try_for_each(|_| client.overwrite(LARGE)),
    },
];

/// An initiator that walks over the LUN.
struct Client {
    raw: Raw,
    at: u32,
    /// Where nothing was written yet.
    fresh: u32,
}

impl Client {
    fn next(&mut self, blocks: u16) -> u32 {
        let lba = self.at;
        self.at = (lba + u32::from(blocks)) % WARM_BLOCKS;
        lba
    }

    fn read(&mut self, blocks: u16) -> Result<()> {
        let lba = self.next(blocks);
        self.raw.read(0, lba, blocks).map(drop)
    }

    fn reads_at_once(&mut self, count: u32) -> Result<()> {
        let (mut wire, mut tags) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let (lba, itt) = (self.next(SMALL), self.raw.new_itt());
            let pdu = self.raw.number(Cdb::read10(0, lba, SMALL).pdu(itt));
            wire.extend(pdu.wire());
            tags.push(itt);
        }
        self.raw.send_bytes(&wire)?;
        for itt in tags {
            let reply = self.raw.finish(itt)?;
            ensure!(reply.status == 0, "READ(10): {reply:?}");
        }
        Ok(())
    }

    fn overwrite(&mut self, blocks: u16) -> Result<()> {
        let lba = self.next(blocks);
        self.raw.write(0, lba, &vec![0x5a; usize::from(blocks) * 512])
    }

    fn write_anew(&mut self, blocks: u16) -> Result<()> {
        let lba = self.fresh;
        self.fresh += u32::from(blocks);
        self.raw.write(0, lba, &vec![0xa5; usize::from(blocks) * 512])
    }

    fn flush(&mut self) -> Result<()> {
        let reply = self.raw.run(&Cdb::none(0, &SYNCHRONIZE))?;
        ensure!(reply.status == 0, "SYNCHRONIZE CACHE: {reply:?}");
        Ok(())
    }
}

/// The counters of a daemon.
struct Counters {
    allocations: PathBuf,
    io: PathBuf,
}

impl Counters {
    /// Allocations, and calls that read or write, so far.
    fn now(&self) -> Result<(u64, u64)> {
        let page = fs::read(&self.allocations).context("the count of allocations")?;
        let allocations = page.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
        let io = fs::read_to_string(&self.io).context("the kernel's count of reads and writes")?;
        let field = |name: &str| -> Result<u64> {
            let value = io.lines().find_map(|line| line.strip_prefix(name));
            value
                .with_context(|| format!("no {name} in {io}"))?
                .trim()
                .parse()
                .context("a count")
        };
        Ok((allocations, field("syscr:")? + field("syscw:")?))
    }
}

/// The cheapest round of a load: allocations and calls of one command.
fn cheapest(load: &Load, client: &mut Client, counters: &Counters) -> Result<(f64, f64)> {
    let (mut allocations, mut calls) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        let before = counters.now()?;
        (load.run)(client, load.commands)?;
        let after = counters.now()?;
        let each = |before: u64, after: u64| (after - before) as f64 / f64::from(load.commands);
        allocations = allocations.min(each(before.0, after.0));
        calls = calls.min(each(before.1, after.1));
    }
    Ok((allocations, calls))
}

/// Memory, where there is room: writes into it never wait, so that none is handed to another thread for that.
fn steady_place(fallback: &Scratch) -> Result<(Option<Scratch>, PathBuf)> {
    let shm = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shm).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    if free < 512 << 20 {
        return Ok((None, fallback.path().to_owned()));
    }
    let scratch = Scratch::below(shm)?;
    let path = scratch.path().to_owned();
    Ok((Some(scratch), path))
}

#[test]
fn no_command_costs_more_than_it_did() {
    story("the cost of commands", |scratch| {
        let (steady, dir) = steady_place(scratch)?;
        let allocations = dir.join("allocations");
        fs::write(&allocations, [0; 8]).context("the count of allocations")?;
        let daemon = Daemon::start(BINARY, steady.as_ref().unwrap_or(scratch), CONFIG)?;
        let pid = daemon.pid().context("the daemon runs")?;
        let counters = Counters {
            allocations,
            io: format!("/proc/{pid}/io").into(),
        };
        let address = SocketAddr::from(([127, 0, 0, 1], daemon.port()));
        let mut raw = Raw::login(address, &Nexus::new("iqn.2026-11.test.cost:me", DISK))?.session()?;
        raw.ready(0)?;
        let mut client = Client {
            raw,
            at: 0,
            fresh: WARM_BLOCKS,
        };
        for _ in 0..WARM_BLOCKS / u32::from(SMALL) {
            client.overwrite(SMALL)?;
        }
        client.flush()?;
        let (counted, _) = counters.now()?;
        ensure!(counted > 1000, "the daemon counts no allocations: {counted}");
        let mut dearer = Vec::new();
        for load in LOADS {
            let (allocations, calls) = cheapest(load, &mut client, &counters)?;
            let line = format!(
                "{:<28} {allocations:6.2} allocations (limit {:.2}), {calls:5.2} reads and writes (limit {:.2})",
                load.name, load.allocations, load.calls
            );
            println!("{line}");
            // On a disk some of it goes to workers, more or less of it as the disk and the file system please.
            let (allocations_max, calls_max) = match steady {
                Some(_) => (load.allocations * SLACK, load.calls * SLACK),
                None => (load.allocations + WORKER_ALLOCATIONS, load.calls * 2.0),
            };
            if allocations > allocations_max || calls > calls_max {
                dearer.push(line);
            }
        }
        ensure!(
            dearer.is_empty(),
            "a command costs more than it did:\n{}\nmake it cheap again, or say in the commit why the limit has to rise",
            dearer.join("\n")
        );
        Ok(())
    });
}
