//! How the cost grows: with sessions, LUNs, snapshots; and what a daemon costs that has nothing to do.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use crate::fio::{Fio, cpu_seconds, rss};
use crate::peers::{Peer, Served};
use crate::points::{POINTS, Point};
use crate::{Options, median};

/// LUNs of an idle daemon.
const IDLE_LUNS: u32 = 1000;
/// How long it is watched.
const IDLE_TIME: Duration = Duration::from_secs(20);

/// Takes snapshots with a few writes between them, as a LUN that lives.
pub(crate) fn age(served: &mut Served, fio: &Fio<'_>, snapshots: u32) -> Result<()> {
    let writes = sample("4k-write-qd32")?;
    let short = Fio {
        program: fio.program.clone(),
        seconds: 0.2,
        ..*fio
    };
    for n in 0..snapshots {
        served.snapshot()?;
        // A start of fio takes longer than a snapshot: ten in a row share one burst.
        if n % 10 == 0 {
            short.measure(&writes, &served.luns, served.pid())?;
        }
    }
    Ok(())
}

fn sample(name: &str) -> Result<Point> {
    let found = POINTS.iter().find(|point| point.name == name).copied();
    found.with_context(|| format!("the point {name}"))
}

/// One series: a name, what changes, and I/Os per second at each step for reads and writes.
pub(crate) fn sweep(options: &Options) -> Result<()> {
    let on = options.on.first().context("a file system")?;
    let mut series = vec![
        sessions(options, on)?,
        luns(options, on)?,
        snapshots(options, on)?,
    ];
    for one in &mut series {
        println!(
            "{}",
            one.get("name").and_then(|name| name.as_str()).unwrap_or_default()
        );
        for step in one
            .get("steps")
            .and_then(|steps| steps.as_array())
            .into_iter()
            .flatten()
        {
            println!("  {step}");
        }
    }
    let path = options.out.join("sweep.json");
    std::fs::write(&path, serde_json::to_string_pretty(&series)?)?;
    println!("written: {}", path.display());
    Ok(())
}

/// Reads and writes of 4 KiB at a step of a series.
fn step(
    options: &Options,
    served: &Served,
    fio: &Fio<'_>,
    base: Point,
    at: u32,
) -> Result<serde_json::Value> {
    let mut both = Vec::new();
    for rw in ["randread", "randwrite"] {
        let mut iops = Vec::new();
        for _ in 0..options.rounds {
            iops.push(
                fio.measure(&Point { rw, ..base }, &served.luns, served.pid())?
                    .iops,
            );
        }
        both.push(median(&mut iops).round());
    }
    let [reads, writes] = both.as_slice() else {
        anyhow::bail!("two loads give two results");
    };
    let rss = served.pid().map_or(0, rss);
    Ok(json!({ "at": at, "read_iops": reads, "write_iops": writes, "rss_bytes": rss }))
}

fn sessions(options: &Options, on: &Path) -> Result<serde_json::Value> {
    let served = Served::start(Peer::Stillpoint, &options.plan(on, 1))?;
    let dir = crate::tempfile_dir(on)?;
    let fio = options.fio(dir.path());
    served.luns.iter().try_for_each(|lun| fio.fill(lun, 4096))?;
    let base = sample("4k-read-4s-qd8")?;
    let steps = [1, 2, 4, 8, 16, 32, 64]
        .into_iter()
        .map(|sessions| step(options, &served, &fio, Point { sessions, ..base }, sessions))
        .collect::<Result<Vec<_>>>()?;
    Ok(json!({ "name": "sessions on one LUN, queue depth 8 each", "steps": steps }))
}

fn luns(options: &Options, on: &Path) -> Result<serde_json::Value> {
    // All LUNs are there and filled a little; sixteen of them work.
    let dir = crate::tempfile_dir(on)?;
    let base = sample("4k-read-16luns-qd4")?;
    let mut steps = Vec::new();
    for luns in [16, 100, 1000] {
        let mut plan = options.plan(on, luns);
        plan.size_bytes = 16 << 20;
        let served = Served::start(Peer::Stillpoint, &plan)?;
        let fio = Fio {
            size_bytes: plan.size_bytes,
            ..options.fio(dir.path())
        };
        served
            .luns
            .iter()
            .take(16)
            .try_for_each(|lun| fio.fill(lun, 4096))?;
        steps.push(step(options, &served, &fio, base, luns)?);
    }
    Ok(json!({ "name": "LUNs in the pool, 16 of them under load at queue depth 4", "steps": steps }))
}

fn snapshots(options: &Options, on: &Path) -> Result<serde_json::Value> {
    let mut served = Served::start(Peer::Stillpoint, &options.plan(on, 1))?;
    let dir = crate::tempfile_dir(on)?;
    let fio = options.fio(dir.path());
    served.luns.iter().try_for_each(|lun| fio.fill(lun, 4096))?;
    let base = sample("4k-read-qd32")?;
    let (mut steps, mut there) = (Vec::new(), 0);
    for wanted in [0, 10, 100, options.snapshots] {
        age(&mut served, &fio, wanted.saturating_sub(there))?;
        there = wanted;
        steps.push(step(options, &served, &fio, base, wanted)?);
    }
    Ok(json!({ "name": "snapshots of the LUN, queue depth 32", "steps": steps }))
}

/// An idle daemon with many LUNs: processor and memory.
pub(crate) fn idle(options: &Options) -> Result<()> {
    let on = options.on.first().context("a file system")?;
    let mut plan = options.plan(on, IDLE_LUNS);
    plan.size_bytes = 1 << 30;
    let started = Instant::now();
    let served = Served::start(Peer::Stillpoint, &plan)?;
    let start_seconds = started.elapsed().as_secs_f64();
    let pid = served.pid().context("the daemon runs")?;
    // What the start left to do is done by then.
    thread::sleep(Duration::from_secs(3));
    let before = cpu_seconds(pid)?;
    thread::sleep(IDLE_TIME);
    let share = (cpu_seconds(pid)? - before) / IDLE_TIME.as_secs_f64();
    println!(
        "idle with {IDLE_LUNS} LUNs: started in {start_seconds:.1} s, {:.2} % of a core, {} MiB resident",
        share * 100.0,
        rss(pid) >> 20
    );
    Ok(())
}
