//! Speed of the release daemon against other targets, as ratios of one run.
//!
//! All servers run side by side with equal LUNs; each point is measured on one after the other, forwards and backwards in turn
//! (A B C, C B A, …), so that a machine that changes its speed treats all alike. Medians are shown, with the spread of the ratios.

mod fio;
mod grow;
mod peers;
mod points;
mod report;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use fio::{Fio, Measured};
use peers::{Peer, Plan, Served};
use points::{POINTS, Point, SNAPSHOT_POINTS};
use report::{Row, Table};

/// LUNs of each server: what the widest point needs.
const LUNS: u32 = 17;

const HELP: &str = "usage: tests/bench/run [sweep|idle] [OPTION…]

  --on DIR           file system under test; default: /dev/shm and build/bench in turn
  --only TEXT        points whose name contains TEXT
  --peers A,B        default: stillpoint,tgt,istgt,nbdkit
  --states           our daemon alone: no snapshot, right after one, with --snapshots of them
  --snapshots N      default 1000
  --size-mib N       each LUN, filled before; default 256
  --fill BYTES       size of one write of the fill; default 4096 (see snapshot-store notes on large folios)
  --seconds S        one measurement; default 2
  --rounds N         default 3
";

/// What the command line says.
pub(crate) struct Options {
    pub(crate) tools: PathBuf,
    pub(crate) daemon: PathBuf,
    pub(crate) out: PathBuf,
    pub(crate) on: Vec<PathBuf>,
    only: String,
    peers: Vec<Peer>,
    pub(crate) snapshots: u32,
    pub(crate) size_mib: u64,
    fill: u32,
    pub(crate) seconds: f64,
    pub(crate) rounds: u32,
    command: String,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            tools: PathBuf::new(),
            daemon: PathBuf::new(),
            out: PathBuf::new(),
            on: Vec::new(),
            only: String::new(),
            peers: vec![Peer::Stillpoint, Peer::Tgt, Peer::Istgt, Peer::Nbdkit],
            snapshots: 1000,
            size_mib: 256,
            fill: 4096,
            seconds: 2.0,
            rounds: 3,
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
                "sweep" | "idle" => options.command = name,
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
                "--states" => {
                    options.peers = vec![Peer::Stillpoint, Peer::AfterSnapshot, Peer::ManySnapshots]
                }
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

    fn states(&self) -> bool {
        self.peers.contains(&Peer::AfterSnapshot)
    }

    fn points(&self) -> impl Iterator<Item = &'static Point> {
        POINTS
            .iter()
            .filter(|point| point.name.contains(&self.only))
            .filter(|point| !self.states() || SNAPSHOT_POINTS.contains(&point.name))
    }

    pub(crate) fn plan<'a>(&'a self, on: &'a std::path::Path, luns: u32) -> Plan<'a> {
        Plan {
            daemon: &self.daemon,
            tools: &self.tools,
            on,
            luns,
            size_bytes: self.size_mib << 20,
        }
    }

    pub(crate) fn fio<'a>(&self, dir: &'a std::path::Path) -> Fio<'a> {
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
        "sweep" => return grow::sweep(&options),
        "idle" => return grow::idle(&options),
        _ => {}
    }
    let mut tables = Vec::new();
    for on in &options.on {
        tables.push(measure(&options, on)?);
    }
    report::save(&options.out, &tables, options.states())
}

fn measure(options: &Options, on: &std::path::Path) -> Result<Table> {
    let luns = options
        .points()
        .map(|point| point.luns + u32::from(point.neighbour))
        .max()
        .with_context(|| format!("no point is called {}", options.only))?
        .min(LUNS);
    let plan = options.plan(on, luns);
    let scratch = tempfile_dir(on)?;
    let fio = options.fio(scratch.path());
    let mut servers: Vec<Served> = options
        .peers
        .iter()
        .map(|peer| {
            eprintln!("starting and filling {} on {} …", peer.name(), on.display());
            let mut served = Served::start(*peer, &plan)?;
            for lun in &served.luns {
                fio.fill(lun, options.fill)?;
            }
            if *peer == Peer::ManySnapshots {
                grow::age(&mut served, &fio, options.snapshots)?;
            }
            Ok(served)
        })
        .collect::<Result<_>>()?;
    let mut table = Table::new(
        on,
        &options.peers,
        options.size_mib,
        options.rounds,
        options.seconds,
    );
    table.head();
    for point in options.points() {
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

pub(crate) fn tempfile_dir(on: &std::path::Path) -> Result<stillpoint_tests::Scratch> {
    stillpoint_tests::Scratch::below(on)
}
