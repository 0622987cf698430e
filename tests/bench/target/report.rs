//! Table, JSON and chart of one run.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::fio::Measured;
use crate::goals::{Verdict, state_verdicts, verdicts};
use crate::median;
use crate::peers::Peer;
use crate::points::Point;

/// A point that keeps the client this busy says little of the server's throughput.
const CLIENT_BOUND: f64 = 0.85;

/// One point on every server.
pub(crate) struct Row {
    pub(crate) point: &'static str,
    /// In the order of the servers; nothing of those that cannot be measured here.
    pub(crate) runs: Vec<Vec<Measured>>,
    sessions: f64,
}

impl Row {
    pub(crate) fn of(point: &Point, runs: Vec<Vec<Measured>>) -> Self {
        Self {
            point: point.name,
            runs,
            sessions: f64::from(point.sessions * point.luns),
        }
    }

    /// Whether the client could do no more against ours.
    pub(crate) fn is_client_bound(&self) -> bool {
        let ours = self.runs.first();
        ours.is_some_and(|runs| mid(runs, |m| m.client_cores) >= CLIENT_BOUND * self.sessions.min(2.0))
    }
}

/// Whether files there live in memory.
pub(crate) fn is_memory(on: &Path) -> bool {
    on.starts_with("/dev/shm")
}

/// One file system.
pub(crate) struct Table {
    on: String,
    pub(crate) kind: String,
    pub(crate) peers: Vec<Peer>,
    pub(crate) note: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) states: bool,
}

pub(crate) fn mid(runs: &[Measured], value: impl Fn(&Measured) -> f64) -> f64 {
    median(&mut runs.iter().map(value).collect::<Vec<_>>())
}

impl Table {
    pub(crate) fn new(on: &Path, peers: &[Peer], size_mib: u64, rounds: u32, seconds: f64) -> Self {
        let kind = if is_memory(on) { "tmpfs" } else { "disk" };
        Self {
            on: on.display().to_string(),
            kind: kind.to_owned(),
            peers: peers.to_vec(),
            note: format!("{size_mib} MiB LUNs, warm, {rounds} rounds of {seconds} s"),
            rows: Vec::new(),
            states: peers.contains(&Peer::AfterSnapshot),
        }
    }

    pub(crate) fn head(&self) {
        println!("\n{} ({}), {}", self.kind, self.on, self.note);
        println!(
            "{:<22} {:<12} {:>9} {:>9} {:>8} {:>8} {:>9} {:>8} {:>6} {:>5} {:>7}  ratio to ours-first column (spread)",
            "point",
            "server",
            "IOPS",
            "MiB/s",
            "p50 us",
            "p99 us",
            "p99.9 us",
            "us/IO",
            "client",
            "box",
            "RSS MiB"
        );
    }

    /// Prints a row as soon as it is there.
    pub(crate) fn add(&mut self, row: Row) {
        let first = row.runs.first().cloned().unwrap_or_default();
        let measured = self.peers.iter().zip(&row.runs);
        for (peer, runs) in measured.filter(|(_, runs)| !runs.is_empty()) {
            let (ratio, low, high) = ratio(&first, runs);
            println!(
                "{:<22} {:<12} {:>9.0} {:>9.1} {:>8.1} {:>8.1} {:>9.1} {:>8.2} {:>6.2} {:>5.2} {:>7.0}  {:.2} ({:.2}-{:.2}){}",
                row.point,
                peer.name(),
                mid(runs, |m| m.iops),
                mid(runs, |m| m.mib_s),
                mid(runs, |m| m.p50_us),
                mid(runs, |m| m.p99_us),
                mid(runs, |m| m.p999_us),
                mid(runs, |m| m.server_us),
                mid(runs, |m| m.client_cores),
                mid(runs, |m| m.box_load),
                mid(runs, |m| m.rss_bytes as f64) / f64::from(1 << 20),
                ratio,
                low,
                high,
                bound(runs, row.sessions)
            );
        }
        for verdict in self.verdicts(&row) {
            let word = if verdict.met { "met" } else { "MISSED" };
            println!("{:<22} {word}: {}", "", verdict.text);
        }
        self.rows.push(row);
    }

    /// What is asked of a row, and whether it is met.
    pub(crate) fn verdicts(&self, row: &Row) -> Vec<Verdict> {
        if self.states {
            state_verdicts(row, &self.peers)
        } else {
            verdicts(row, &self.peers, &self.rows)
        }
    }

    fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let servers: Vec<Value> = self
                    .peers
                    .iter()
                    .zip(&row.runs)
                    .filter(|(_, runs)| !runs.is_empty())
                    .map(|(peer, runs)| json!({ "server": peer.name(), "runs": runs.iter().map(Measured::json).collect::<Vec<_>>() }))
                    .collect();
                let goals: Vec<Value> = self
                    .verdicts(row)
                    .iter()
                    .map(|verdict| json!({ "goal": verdict.text, "met": verdict.met }))
                    .collect();
                json!({ "point": row.point, "servers": servers, "goals": goals })
            })
            .collect();
        json!({ "on": self.kind, "note": self.note, "points": rows })
    }
}

/// Speed of ours over theirs: median, lowest and highest over the rounds.
pub(crate) fn ratio(ours: &[Measured], theirs: &[Measured]) -> (f64, f64, f64) {
    let mut all: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| a.iops / b.iops.max(1e-9))
        .collect();
    let middle = median(&mut all);
    (
        middle,
        all.first().copied().unwrap_or(0.0),
        all.last().copied().unwrap_or(0.0),
    )
}

/// Which side could do no more.
fn bound(runs: &[Measured], sessions: f64) -> &'static str {
    let (client, server) = (mid(runs, |m| m.client_cores), mid(runs, |m| m.server_cores));
    if client >= CLIENT_BOUND * sessions.min(2.0) {
        ", client-bound"
    } else if server >= CLIENT_BOUND {
        ", server-bound"
    } else if mid(runs, |m| m.box_load) >= 0.97 {
        ", box full"
    } else {
        ", waiting"
    }
}

/// Writes the JSON and the charts, as `NAME.json` and `NAME-FILESYSTEM.svg`.
pub(crate) fn save(out: &Path, tables: &[Table], name: &str) -> Result<()> {
    let path = out.join(format!("{name}.json"));
    let all: Vec<Value> = tables.iter().map(Table::json).collect();
    fs::write(&path, serde_json::to_string_pretty(&all)?).with_context(|| path.display().to_string())?;
    println!("\nwritten: {}", path.display());
    for table in tables {
        let path = out.join(format!("{name}-{}.svg", table.kind));
        fs::write(&path, chart(table)).with_context(|| path.display().to_string())?;
        println!("written: {}", path.display());
    }
    Ok(())
}

const COLOURS: &[&str] = &["#1b6ca8", "#c2571a", "#7a9e3b", "#8c8c8c", "#6b4fa0"];

/// Bars of throughput relative to the first server.
fn chart(table: &Table) -> String {
    let (bar, gap, left, width) = (14, 10, 190, 460.0);
    let height = table.rows.len() * (table.peers.len() * bar + gap) + 50;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"10\" y=\"18\" font-size=\"13\">I/Os per second, {} = 1 ({}, {})</text>\n",
        table.peers.first().map_or("", |peer| peer.name()),
        table.kind,
        table.note
    );
    let mut y = 34;
    for row in &table.rows {
        let base = row
            .runs
            .first()
            .map_or(1.0, |runs| mid(runs, |m| m.iops))
            .max(1e-9);
        for (n, (peer, runs)) in table.peers.iter().zip(&row.runs).enumerate() {
            if runs.is_empty() {
                continue;
            }
            let share = mid(runs, |m| m.iops) / base;
            let colour = COLOURS.get(n % COLOURS.len()).copied().unwrap_or("black");
            if n == 0 {
                let _ = writeln!(svg, "<text x=\"10\" y=\"{}\">{}</text>", y + 11, row.point);
            }
            let _ = writeln!(
                svg,
                "<rect x=\"{left}\" y=\"{y}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\">{} {share:.2}</text>",
                (share / 2.5).min(1.0) * width,
                bar - 2,
                f64::from(left) + (share / 2.5).min(1.0) * width + 4.0,
                y + 10,
                peer.name()
            );
            y += bar;
        }
        y += gap;
    }
    svg.push_str("</svg>\n");
    svg
}
