//! Table, JSON and chart of one run.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::fio::Measured;
use crate::median;
use crate::peers::Peer;
use crate::points::Point;

/// A point that keeps the client this busy says little of the server's throughput.
const CLIENT_BOUND: f64 = 0.85;

/// One point on every server.
pub(crate) struct Row {
    point: &'static str,
    /// In the order of the servers.
    runs: Vec<Vec<Measured>>,
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
}

/// One file system.
pub(crate) struct Table {
    on: String,
    kind: String,
    peers: Vec<Peer>,
    note: String,
    rows: Vec<Row>,
}

fn mid(runs: &[Measured], value: impl Fn(&Measured) -> f64) -> f64 {
    median(&mut runs.iter().map(value).collect::<Vec<_>>())
}

impl Table {
    pub(crate) fn new(on: &Path, peers: &[Peer], size_mib: u64, rounds: u32, seconds: f64) -> Self {
        let kind = if on.starts_with("/dev/shm") {
            "tmpfs"
        } else {
            "disk"
        };
        Self {
            on: on.display().to_string(),
            kind: kind.to_owned(),
            peers: peers.to_vec(),
            note: format!("{size_mib} MiB LUNs, warm, {rounds} rounds of {seconds} s"),
            rows: Vec::new(),
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
        for (peer, runs) in self.peers.iter().zip(&row.runs) {
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
        self.rows.push(row);
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
                    .map(|(peer, runs)| json!({ "server": peer.name(), "runs": runs.iter().map(Measured::json).collect::<Vec<_>>() }))
                    .collect();
                json!({ "point": row.point, "servers": servers })
            })
            .collect();
        json!({ "on": self.kind, "note": self.note, "points": rows })
    }
}

/// Speed of ours over theirs: median, lowest and highest over the rounds.
fn ratio(ours: &[Measured], theirs: &[Measured]) -> (f64, f64, f64) {
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

/// Writes the JSON and the chart.
pub(crate) fn save(out: &Path, tables: &[Table], states: bool) -> Result<()> {
    let name = if states { "states" } else { "results" };
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
