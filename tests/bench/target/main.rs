//! Speed of the release daemon against other targets, as ratios of one run.
//!
//! All servers run side by side with equal LUNs; each point is measured on one after the other, forwards and backwards in turn
//! (A B C, C B A, …), so that a machine that changes its speed treats all alike. Medians are shown, with the spread of the ratios.

mod curve;
mod fio;
mod goals;
mod grow;
mod initiator;
mod peers;
mod points;
mod publish;
mod report;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use fio::{Fio, Measured};
use peers::{Peer, Plan, Served};
use points::{DISK_POINTS, POINTS, Point, SNAPSHOT_POINTS};
use report::{Row, Table};

/// Everybody; some cannot be measured at some points.
const PEERS: &[Peer] = &[Peer::Stillpoint, Peer::Tgt, Peer::Istgt, Peer::Nbdkit, Peer::Raw];
/// One daemon in three states.
const STATES: &[Peer] = &[Peer::Stillpoint, Peer::AfterSnapshot, Peer::ManySnapshots];
/// LUNs of each server: what the widest point needs.
const LUNS: u32 = 17;

const HELP: &str = "usage: tests/bench/run [all|states|sweep|idle] [OPTION…]

  all                points, states, sweep and idle
  states             our daemon alone: no snapshot, right after one, with --snapshots of them
  sweep              how the cost grows with sessions, LUNs, snapshots and size
  idle               what an idle daemon with 1,000 LUNs costs

  --on DIR           file system under test; default: /dev/shm and build/bench in turn
  --only TEXT        points whose name contains TEXT
  --peers A,B        default: stillpoint,tgt,istgt,nbdkit,raw-file
  --states           the same as `states`
  --snapshots N      default 1000
  --size-mib N       each LUN, filled before; default 256
  --fill BYTES       size of one write of the fill; default 4096 (see snapshot-store notes on large folios)
  --seconds S        one measurement; default 2
  --rounds N         default 3
  --quick            64 MiB, 0.5 s, fewer steps; on disk the most telling points only: `all` takes about 11 minutes
  --publish          writes the README's tables and tests/bench/results (with `all`)
";

/// What the command line says.
pub(crate) struct Options {
    pub(crate) tools: PathBuf,
    pub(crate) daemon: PathBuf,
    pub(crate) out: PathBuf,
    root: PathBuf,
    pub(crate) on: Vec<PathBuf>,
    only: String,
    peers: Vec<Peer>,
    pub(crate) snapshots: u32,
    pub(crate) size_mib: u64,
    fill: u32,
    pub(crate) seconds: f64,
    pub(crate) rounds: u32,
    pub(crate) quick: bool,
    publish: bool,
    command: String,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            tools: PathBuf::new(),
            daemon: PathBuf::new(),
            out: PathBuf::new(),
            root: PathBuf::new(),
            on: Vec::new(),
            only: String::new(),
            peers: PEERS.to_vec(),
            snapshots: 1000,
            size_mib: 256,
            fill: 4096,
            seconds: 2.0,
            rounds: 3,
            quick: false,
            publish: false,
            command: "points".to_owned(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{name} needs a value\n{HELP}"))
            };
            match name.as_str() {
                "all" | "states" | "sweep" | "idle" => options.command = name,
                "--states" => options.command = "states".to_owned(),
                "--quick" => (options.quick, options.seconds, options.size_mib) = (true, 0.5, 64),
                "--publish" => options.publish = true,
                "--root" => options.root = value()?.into(),
                "--help" | "-h" => {
                    print!("{HELP}");
                    std::process::exit(0);
                }
                "--tools" => options.tools = value()?.into(),
                "--daemon" => options.daemon = value()?.into(),
                "--out" => options.out = value()?.into(),
                "--on" => options.on.push(value()?.into()),
                "--only" => options.only = value()?,
                "--peers" => options.peers = value()?.split(',').map(peer).collect::<Result<_>>()?,
                "--snapshots" => options.snapshots = value()?.parse().context("--snapshots")?,
                "--size-mib" => options.size_mib = value()?.parse().context("--size-mib")?,
                "--fill" => options.fill = value()?.parse().context("--fill")?,
                "--seconds" => options.seconds = value()?.parse().context("--seconds")?,
                "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
                _ => bail!("unknown option {name}\n{HELP}"),
            }
        }
        ensure!(options.daemon.exists(), "start it by tests/bench/run");
        ensure!(
            options.rounds > 0 && options.seconds > 0.0 && options.size_mib > 0,
            "--rounds, --seconds, --size-mib: more than 0"
        );
        if options.on.is_empty() {
            options.on = vec!["/dev/shm".into(), options.out.clone()];
        }
        Ok(options)
    }

    fn points(&self, on: &Path, states: bool) -> impl Iterator<Item = &'static Point> {
        let few = self.quick && !states && !report::is_memory(on);
        POINTS
            .iter()
            .filter(|point| point.name.contains(&self.only))
            .filter(move |point| !states || SNAPSHOT_POINTS.contains(&point.name))
            .filter(move |point| !few || DISK_POINTS.contains(&point.name))
    }

    pub(crate) fn plan<'a>(&'a self, on: &'a Path, luns: u32) -> Plan<'a> {
        Plan {
            daemon: &self.daemon,
            tools: &self.tools,
            on,
            luns,
            size_bytes: self.size_mib << 20,
        }
    }

    pub(crate) fn fio<'a>(&self, dir: &'a Path) -> Fio<'a> {
        Fio {
            program: self.tools.join("fio"),
            dir,
            seconds: self.seconds,
            size_bytes: self.size_mib << 20,
        }
    }
}

fn peer(name: &str) -> Result<Peer> {
    let all = [Peer::Stillpoint, Peer::Tgt, Peer::Istgt, Peer::Nbdkit, Peer::Raw];
    let found = all.into_iter().find(|peer| peer.name() == name);
    found.with_context(|| format!("no peer {name}; there are stillpoint, tgt, istgt, nbdkit, raw-file"))
}

/// The middle value; the mean of the two in the middle when their number is even; 0 of nothing.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.get(middle.wrapping_sub(1))) {
        (Some(&high), Some(&low)) if values.len().is_multiple_of(2) => f64::midpoint(low, high),
        (Some(&value), _) => value,
        _ => 0.0,
    }
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    match options.command.as_str() {
        "sweep" => grow::sweep(&options),
        "idle" => grow::idle(&options).map(drop),
        "states" => points(&options, STATES).map(drop),
        "all" => all(&options),
        _ => points(&options, &options.peers).map(drop),
    }
}

fn all(options: &Options) -> Result<()> {
    let started = Instant::now();
    let tables = points(options, &options.peers)?;
    let states = points(options, STATES)?;
    // Ten minutes of points are not thrown away because a thousand LUNs took too long to start: it is said instead.
    let mut failed = grow::sweep(options).err();
    let idle = grow::idle(options).unwrap_or_else(|error| {
        let text = format!("The idle daemon was not measured: {error:#}.\n");
        failed.get_or_insert(error);
        text
    });
    let minutes = started.elapsed().as_secs_f64() / 60.0;
    println!("\nall took {minutes:.1} minutes");
    if options.publish {
        publish::publish(&options.root, &options.out, &tables, &states, &idle, minutes)?;
    }
    failed.map_or(Ok(()), Err)
}

/// All points on all file systems; of the states in a hurry, in memory only.
fn points(options: &Options, peers: &[Peer]) -> Result<Vec<Table>> {
    let states = peers.contains(&Peer::AfterSnapshot);
    let mut tables = Vec::new();
    for on in &options.on {
        if !(states && options.quick && !tables.is_empty()) {
            tables.push(measure(options, on, peers)?);
        }
    }
    report::save(&options.out, &tables, if states { "states" } else { "results" })?;
    Ok(tables)
}

/// The servers on one file system, their LUNs filled.
fn start(options: &Options, on: &Path, peers: &[Peer], luns: u32, fio: &Fio<'_>) -> Result<Vec<Served>> {
    let plan = options.plan(on, luns);
    let one = |peer: &Peer| {
        eprintln!("starting and filling {} on {} …", peer.name(), on.display());
        let mut served = Served::start(*peer, &plan)?;
        for lun in &served.luns {
            fio.fill(lun, options.fill)?;
        }
        if *peer == Peer::ManySnapshots {
            grow::age(&mut served, fio, options.snapshots, options.quick)?;
        }
        Ok(served)
    };
    peers.iter().map(one).collect()
}

fn measure(options: &Options, on: &Path, peers: &[Peer]) -> Result<Table> {
    let states = peers.contains(&Peer::AfterSnapshot);
    let luns = options
        .points(on, states)
        .map(|point| point.luns + u32::from(point.neighbour))
        .max()
        .with_context(|| format!("no point is called {}", options.only))?
        .min(LUNS);
    let scratch = tempfile_dir(on)?;
    let fio = options.fio(scratch.path());
    let mut servers = start(options, on, peers, luns, &fio)?;
    let mut table = Table::new(on, peers, options.size_mib, options.rounds, options.seconds);
    table.head();
    for point in options.points(on, states) {
        let mut runs: Vec<Vec<Measured>> = vec![Vec::new(); servers.len()];
        for round in 0..options.rounds {
            let mut order: Vec<usize> = (0..servers.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for index in order {
                let (Some(server), Some(into)) = (servers.get_mut(index), runs.get_mut(index)) else {
                    continue;
                };
                if !server.peer.serves(point) {
                    continue;
                }
                if server.peer == Peer::AfterSnapshot {
                    server.snapshot()?;
                }
                let measured = fio
                    .measure(point, &server.luns, server.pid())
                    .with_context(|| format!("{} on {}", point.name, server.peer.name()))?;
                into.push(measured);
            }
        }
        table.add(Row::of(point, runs));
    }
    Ok(table)
}

pub(crate) fn tempfile_dir(on: &Path) -> Result<stillpoint_tests::Scratch> {
    stillpoint_tests::Scratch::below(on)
}
