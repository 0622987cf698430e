//! How the cost grows: with sessions, LUNs, snapshots and size; and what a daemon costs that has nothing to do.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::curve;
use crate::fio::{Fio, cpu_seconds, rss};
use crate::peers::{Peer, Served};
use crate::points::{POINTS, Point};
use crate::{Options, median};

/// LUNs of an idle daemon.
const IDLE_LUNS: u32 = 1000;
/// How long it is watched.
const IDLE_TIME: Duration = Duration::from_secs(20);
/// What an idle daemon may cost: percent of a core, MiB.
const IDLE_GOALS: (f64, u64) = (0.2, 150);

/// A series: what changes, and what was measured at each step.
#[derive(Debug)]
pub(crate) struct Series {
    /// What changes.
    pub(crate) name: &'static str,
    /// In order.
    pub(crate) steps: Vec<Step>,
}

/// One step of a series.
#[derive(Debug)]
pub(crate) struct Step {
    /// Sessions, LUNs, snapshots or MiB.
    pub(crate) at: u32,
    /// I/Os per second.
    pub(crate) read_iops: f64,
    /// I/Os per second.
    pub(crate) write_iops: f64,
    rss_bytes: u64,
}

/// Takes snapshots with a few writes between them, as a LUN that lives.
pub(crate) fn age(served: &mut Served, fio: &Fio<'_>, snapshots: u32, quick: bool) -> Result<()> {
    let writes = sample("4k-write-qd32")?;
    let short = Fio {
        program: fio.program.clone(),
        seconds: 0.2,
        ..*fio
    };
    // A start of fio takes longer than a snapshot: many in a row share one burst.
    let each = if quick { 50 } else { 10 };
    for n in 0..snapshots {
        served.snapshot()?;
        if n % each == 0 {
            short.measure(&writes, &served.luns, served.pid())?;
        }
    }
    Ok(())
}

fn sample(name: &str) -> Result<Point> {
    let found = POINTS.iter().find(|point| point.name == name).copied();
    found.with_context(|| format!("the point {name}"))
}

/// All series, printed and written as JSON and as charts.
pub(crate) fn sweep(options: &Options) -> Result<()> {
    let on = options.on.first().context("a file system")?;
    let mut all = Vec::new();
    for series in [sessions, luns, snapshots, sizes] {
        let one = series(options, on)?;
        println!("\n{}", one.name);
        for step in &one.steps {
            println!(
                "  {:>6}: {:>8.0} reads/s {:>8.0} writes/s, {} MiB resident",
                step.at,
                step.read_iops,
                step.write_iops,
                step.rss_bytes >> 20
            );
        }
        all.push(one);
    }
    let written = |name: &str, text: String| -> Result<()> {
        let path = options.out.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        println!("written: {}", path.display());
        Ok(())
    };
    let json: Vec<Value> = all.iter().map(Series::json).collect();
    written("sweep.json", serde_json::to_string_pretty(&json)?)?;
    written("sweep.svg", curve::chart(&all))
}

impl Series {
    fn json(&self) -> Value {
        let steps: Vec<Value> = self
            .steps
            .iter()
            .map(|step| {
                json!({
                    "at": step.at, "read_iops": step.read_iops.round(), "write_iops": step.write_iops.round(),
                    "rss_bytes": step.rss_bytes,
                })
            })
            .collect();
        json!({ "name": self.name, "steps": steps })
    }
}

/// Reads and writes of 4 KiB at a step of a series.
fn step(options: &Options, served: &Served, fio: &Fio<'_>, base: Point, at: u32) -> Result<Step> {
    let load = |rw| -> Result<f64> {
        let mut iops = Vec::new();
        for _ in 0..options.rounds {
            let point = Point { rw, ..base };
            iops.push(fio.measure(&point, &served.luns, served.pid())?.iops);
        }
        Ok(median(&mut iops))
    };
    Ok(Step {
        at,
        read_iops: load("randread")?,
        write_iops: load("randwrite")?,
        rss_bytes: served.pid().map_or(0, rss),
    })
}

fn few(options: &Options, quick: &'static [u32], all: &'static [u32]) -> &'static [u32] {
    if options.quick { quick } else { all }
}

fn sessions(options: &Options, on: &Path) -> Result<Series> {
    let served = Served::start(Peer::Stillpoint, &options.plan(on, 1))?;
    let dir = crate::tempfile_dir(on)?;
    let fio = options.fio(dir.path());
    served.luns.iter().try_for_each(|lun| fio.fill(lun, 4096))?;
    let base = sample("4k-read-4s-qd8")?;
    let steps = few(options, &[1, 4, 16, 64], &[1, 2, 4, 8, 16, 32, 64])
        .iter()
        .map(|&sessions| step(options, &served, &fio, Point { sessions, ..base }, sessions))
        .collect::<Result<Vec<_>>>()?;
    Ok(Series {
        name: "sessions on one LUN, queue depth 8 each",
        steps,
    })
}

fn luns(options: &Options, on: &Path) -> Result<Series> {
    // All LUNs are there; sixteen of them are filled and work.
    let dir = crate::tempfile_dir(on)?;
    let base = sample("4k-read-16luns-qd4")?;
    let mut steps = Vec::new();
    for &luns in few(options, &[16, 1000], &[16, 100, 1000]) {
        let mut plan = options.plan(on, luns);
        plan.size_bytes = 16 << 20;
        let served = Served::start(Peer::Stillpoint, &plan)?;
        let fio = Fio {
            size_bytes: plan.size_bytes,
            ..options.fio(dir.path())
        };
        let busy = served.luns.iter().take(16);
        busy.into_iter().try_for_each(|lun| fio.fill(lun, 4096))?;
        steps.push(step(options, &served, &fio, base, luns)?);
    }
    Ok(Series {
        name: "LUNs in the pool, 16 of them under load at queue depth 4",
        steps,
    })
}

fn snapshots(options: &Options, on: &Path) -> Result<Series> {
    let mut served = Served::start(Peer::Stillpoint, &options.plan(on, 1))?;
    let dir = crate::tempfile_dir(on)?;
    let fio = options.fio(dir.path());
    served.luns.iter().try_for_each(|lun| fio.fill(lun, 4096))?;
    let base = sample("4k-read-qd32")?;
    let (mut steps, mut there) = (Vec::new(), 0);
    for &wanted in few(options, &[0, 100, 1000], &[0, 10, 100, 1000, 10_000]) {
        age(&mut served, &fio, wanted - there, options.quick)?;
        there = wanted;
        steps.push(step(options, &served, &fio, base, wanted)?);
    }
    Ok(Series {
        name: "snapshots of the LUN, queue depth 32",
        steps,
    })
}

fn sizes(options: &Options, on: &Path) -> Result<Series> {
    let dir = crate::tempfile_dir(on)?;
    let base = sample("4k-read-qd32")?;
    let mut steps = Vec::new();
    for &mib in few(options, &[64, 1024], &[256, 1024, 4096]) {
        let mut plan = options.plan(on, 1);
        plan.size_bytes = u64::from(mib) << 20;
        let served = Served::start(Peer::Stillpoint, &plan)?;
        let fio = Fio {
            size_bytes: plan.size_bytes,
            ..options.fio(dir.path())
        };
        served.luns.iter().try_for_each(|lun| fio.fill(lun, 65_536))?;
        steps.push(step(options, &served, &fio, base, mib)?);
    }
    Ok(Series {
        name: "MiB written and read at random, queue depth 32",
        steps,
    })
}

/// An idle daemon with many LUNs: processor and memory, in a sentence.
pub(crate) fn idle(options: &Options) -> Result<String> {
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
    let percent = (cpu_seconds(pid)? - before) / IDLE_TIME.as_secs_f64() * 100.0;
    let mib = rss(pid) >> 20;
    let met = if percent <= IDLE_GOALS.0 && mib <= IDLE_GOALS.1 {
        "met"
    } else {
        "missed"
    };
    let text = format!(
        "An idle daemon with {IDLE_LUNS} LUNs and no sessions (started in {start_seconds:.1} s) takes {percent:.2} % of a core and {mib} MiB \
         (asked: {} %, {} MiB: {met}).\n",
        IDLE_GOALS.0, IDLE_GOALS.1
    );
    println!("\n{text}");
    Ok(text)
}
