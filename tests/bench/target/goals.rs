//! What each point is asked for, and whether it is met.

use crate::fio::Measured;
use crate::median;
use crate::peers::Peer;
use crate::points::{Digests, Point};
use crate::report::{Row, mid};

/// Whom a point is compared with.
#[derive(Debug, Clone, Copy)]
enum Rival {
    /// The faster of tgt and istgt; of processor time, the one that needs less.
    Better,
    One(Peer),
}

/// One demand.
#[derive(Debug, Clone, Copy)]
enum Goal {
    /// At least so many times its speed.
    Speed(Rival, f64),
    /// The same, unless the client can do no more.
    SpeedOrClient(Rival, f64),
    /// At most this share of its processor time for one I/O.
    Cpu(Rival, f64),
    /// At most so many times its p99.9.
    Tail(Peer, f64),
    /// At most so many times the processor time of another point on ours.
    CpuOf(&'static str, f64),
}

const TGT: Rival = Rival::One(Peer::Tgt);
const ISTGT: Rival = Rival::One(Peer::Istgt);
const NBDKIT: Rival = Rival::One(Peer::Nbdkit);
const RAW: Rival = Rival::One(Peer::Raw);

fn goals(point: &str) -> &'static [Goal] {
    match point {
        "4k-read-qd1" | "4k-write-qd1" => &[Goal::Speed(Rival::Better, 1.15)],
        "4k-read-qd32" => &[
            Goal::SpeedOrClient(Rival::Better, 2.0),
            Goal::Cpu(Rival::Better, 0.45),
            Goal::Cpu(NBDKIT, 1.4),
        ],
        "4k-write-qd32" => &[
            Goal::SpeedOrClient(Rival::Better, 1.8),
            Goal::Cpu(Rival::Better, 0.5),
        ],
        "64k-read-qd16" | "1m-read-qd8" => &[Goal::Speed(Rival::Better, 1.5), Goal::Speed(NBDKIT, 0.75)],
        "64k-write-qd16" | "1m-write-qd8" => &[Goal::Speed(TGT, 2.5), Goal::Speed(ISTGT, 1.3)],
        "4k-write-flush" => &[Goal::Speed(Rival::Better, 1.1), Goal::Speed(RAW, 0.7)],
        "4k-write-flush-4s" => &[Goal::Speed(Rival::Better, 1.1)],
        "4k-read-qd1-noisy" => &[Goal::Tail(Peer::Tgt, 1.5)],
        "own-4k-read-qd32-hd" => &[Goal::CpuOf("own-4k-read-qd32", 1.2)],
        "own-64k-read-qd16-hd" => &[Goal::CpuOf("own-64k-read-qd16", 1.2)],
        _ => &[],
    }
}

/// A demand, what was measured, and whether that is enough.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// As `2.31 of 2.0 x tgt`.
    pub(crate) text: String,
    /// It is enough.
    pub(crate) met: bool,
}

impl Peer {
    /// Whether it can be measured at this point, and it says something.
    pub(crate) fn serves(self, point: &Point) -> bool {
        match self {
            Self::Stillpoint | Self::AfterSnapshot | Self::ManySnapshots | Self::Tgt => true,
            // It stalls under data digests.
            Self::Istgt => point.digests != Digests::HeaderAndData,
            // fio's NBD engine refuses fdatasync; the raw file is the ceiling of flushes.
            Self::Nbdkit => !point.own_initiator && point.flush_each == 0,
            Self::Raw => point.flush_each > 0,
        }
    }
}

/// What became of the demands on `row`. Those whose rival was not measured are left out.
pub(crate) fn verdicts(row: &Row, peers: &[Peer], all: &[Row]) -> Vec<Verdict> {
    goals(row.point)
        .iter()
        .filter_map(|goal| verdict(goal, row, peers, all))
        .collect()
}

/// In a table of states: right after a snapshot and with many of them, it is at least 0.95 of what it was before.
pub(crate) fn state_verdicts(row: &Row, peers: &[Peer]) -> Vec<Verdict> {
    let states = [Peer::AfterSnapshot, Peer::ManySnapshots];
    let one = |peer: Peer| {
        let share = 1.0 / ratio(row, peers, peer, |m| m.iops)?;
        Some(Verdict {
            text: format!("{}: {share:.2} of 0.95", peer.name()),
            met: share >= 0.95,
        })
    };
    states.into_iter().filter_map(one).collect()
}

fn verdict(goal: &Goal, row: &Row, peers: &[Peer], all: &[Row]) -> Option<Verdict> {
    let speed = |rival: Rival| against(row, peers, rival, f64::min, |m| m.iops);
    let (text, met) = match *goal {
        Goal::Speed(rival, least) => {
            let (value, name) = speed(rival)?;
            (format!("{value:.2} of {least} x {name}"), value >= least)
        }
        Goal::SpeedOrClient(rival, least) => {
            let (value, name) = speed(rival)?;
            let client = row.is_client_bound();
            let note = if client && value < least {
                ", client-bound"
            } else {
                ""
            };
            (
                format!("{value:.2} of {least} x {name}{note}"),
                value >= least || client,
            )
        }
        Goal::Cpu(rival, most) => {
            let (value, name) = against(row, peers, rival, f64::max, |m| m.server_us)?;
            (format!("CPU {value:.2}, at most {most} of {name}"), value <= most)
        }
        Goal::Tail(rival, most) => {
            let value = ratio(row, peers, rival, |m| m.p999_us)?;
            (
                format!("p99.9 {value:.2}, at most {most} of {}", rival.name()),
                value <= most,
            )
        }
        Goal::CpuOf(other, most) => {
            let cpu = |row: &Row| row.runs.first().map(|runs| mid(runs, |m| m.server_us));
            let base = cpu(all.iter().find(|row| row.point == other)?)?;
            let value = cpu(row)? / base.max(1e-9);
            (
                format!("CPU {value:.2}, at most {most} of without"),
                value <= most,
            )
        }
    };
    Some(Verdict { text, met })
}

fn against(
    row: &Row,
    peers: &[Peer],
    rival: Rival,
    worse: fn(f64, f64) -> f64,
    value: fn(&Measured) -> f64,
) -> Option<(f64, &'static str)> {
    match rival {
        Rival::One(peer) => Some((ratio(row, peers, peer, value)?, peer.name())),
        Rival::Better => {
            let both = [Peer::Tgt, Peer::Istgt].map(|peer| ratio(row, peers, peer, value));
            let worst = both.into_iter().flatten().reduce(worse)?;
            Some((worst, "the better"))
        }
    }
}

/// Ours over theirs, the median of the rounds.
fn ratio(row: &Row, peers: &[Peer], peer: Peer, value: impl Fn(&Measured) -> f64) -> Option<f64> {
    let at = peers.iter().position(|one| *one == peer)?;
    let (ours, theirs) = (row.runs.first()?, row.runs.get(at)?);
    let mut all: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| value(a) / value(b).max(1e-9))
        .collect();
    (!all.is_empty()).then(|| median(&mut all))
}
