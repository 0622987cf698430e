//! The README's table and the charts beside it: nothing there comes from anywhere else.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::fio::Measured;
use crate::peers::Peer;
use crate::report::{Row, Table, mid, ratio};

const BEGIN: &str = "<!-- speed: written by `tests/bench/run all --publish`, not by hand -->\n";
const END: &str = "<!-- end of speed -->\n";
/// Where the charts and the numbers go, from the top of the repository.
const RESULTS: &str = "tests/bench/results";

/// Puts tables into the README at the top of the repository, and copies what was written to `out` beside the bench.
///
/// # Errors
/// The README has one of the two marks only, or a file cannot be written.
pub(crate) fn publish(
    root: &Path,
    out: &Path,
    tables: &[Table],
    states: &[Table],
    idle: &str,
    minutes: f64,
) -> Result<()> {
    let results = root.join(RESULTS);
    fs::create_dir_all(&results).with_context(|| results.display().to_string())?;
    for entry in fs::read_dir(out).context("the results")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = ["results", "states", "sweep"]
            .iter()
            .any(|kind| name.starts_with(kind));
        if ours && (name.ends_with(".svg") || name.ends_with(".json")) {
            fs::copy(entry.path(), results.join(&name)).with_context(|| name.clone())?;
        }
    }
    let path = root.join("README.md");
    let old = fs::read_to_string(&path).context("README.md")?;
    let new = with_section(&old, &section(tables, states, idle, minutes)?)?;
    fs::write(&path, new).context("README.md")?;
    println!("published: README.md, {RESULTS}");
    Ok(())
}

/// The README with another section between the marks, or with the marks at its end.
fn with_section(old: &str, section: &str) -> Result<String> {
    match (old.split_once(BEGIN), old.split_once(END)) {
        (Some((before, _)), Some((_, after))) => Ok(format!("{before}{BEGIN}{section}{END}{after}")),
        (None, None) => Ok(format!("{}\n\n{BEGIN}{section}{END}", old.trim_end())),
        _ => {
            ensure!(
                false,
                "README.md has one of the marks around the speed table only"
            );
            Ok(String::new())
        }
    }
}

fn section(tables: &[Table], states: &[Table], idle: &str, minutes: f64) -> Result<String> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut text = format!(
        "## Speed\n\nMeasured by `tests/bench/run all --quick --publish` in {minutes:.0} minutes on {processors} processors that clients and \
         servers share, over loopback; medians of interleaved rounds, so only the ratios mean anything elsewhere. tgt and istgt are \
         Debian's; nbdkit is not iSCSI and stands for the ceiling, raw-file for the file without a server. All figures: `{RESULTS}/`.\n"
    );
    for table in tables {
        writeln!(text, "\n### On {} ({})\n", table.kind, table.note)?;
        text.push_str(
            "| point | Stillpoint | tgt | istgt | nbdkit | x the better of tgt, istgt | server µs per I/O: ours, tgt, istgt | asked |\n\
             |---|---|---|---|---|---|---|---|\n",
        );
        for row in &table.rows {
            line(&mut text, table, row)?;
        }
        writeln!(
            text,
            "\n![Throughput on {0}]({RESULTS}/results-{0}.svg)",
            table.kind
        )?;
    }
    for table in states {
        writeln!(
            text,
            "\n### After snapshots, on {} ({})\n",
            table.kind, table.note
        )?;
        text.push_str(
            "| point | before | right after a snapshot | with many | asked |\n|---|---|---|---|---|\n",
        );
        for row in &table.rows {
            let speed =
                |peer| of(table, row, peer).map_or_else(String::new, |runs| amount(mid(runs, |m| m.iops)));
            let cells = [Peer::Stillpoint, Peer::AfterSnapshot, Peer::ManySnapshots].map(speed);
            writeln!(
                text,
                "| {} | {} | {} |",
                row.point,
                cells.join(" | "),
                asked(table, row)
            )?;
        }
    }
    writeln!(
        text,
        "\n### How the cost grows\n\n![Growth]({RESULTS}/sweep.svg)\n\n{idle}"
    )?;
    Ok(text)
}

fn of<'a>(table: &Table, row: &'a Row, peer: Peer) -> Option<&'a [Measured]> {
    let at = table.peers.iter().position(|one| *one == peer)?;
    row.runs
        .get(at)
        .map(Vec::as_slice)
        .filter(|runs| !runs.is_empty())
}

fn line(text: &mut String, table: &Table, row: &Row) -> Result<()> {
    let measured = |peer| of(table, row, peer);
    let speed = |peer| measured(peer).map_or_else(String::new, |runs| amount(mid(runs, |m| m.iops)));
    let cpu = |peer| {
        measured(peer).map_or_else(
            || "-".to_owned(),
            |runs| format!("{:.1}", mid(runs, |m| m.server_us)),
        )
    };
    let ours = measured(Peer::Stillpoint).unwrap_or_default();
    // Against the better one: the lower ratio.
    let against = [Peer::Tgt, Peer::Istgt].map(|peer| measured(peer).map(|theirs| ratio(ours, theirs)));
    let better = against.into_iter().flatten().min_by(|a, b| a.0.total_cmp(&b.0));
    writeln!(
        text,
        "| {} | {} | {} | {} | {} | {} | {}, {}, {} | {} |",
        row.point,
        speed(Peer::Stillpoint),
        speed(Peer::Tgt),
        speed(Peer::Istgt),
        speed(Peer::Nbdkit),
        better.map_or_else(String::new, |(middle, low, high)| format!(
            "{middle:.2} ({low:.2}-{high:.2})"
        )),
        cpu(Peer::Stillpoint),
        cpu(Peer::Tgt),
        cpu(Peer::Istgt),
        asked(table, row)
    )?;
    Ok(())
}

fn asked(table: &Table, row: &Row) -> String {
    let words: Vec<String> = table
        .verdicts(row)
        .iter()
        .map(|verdict| format!("{}{}", if verdict.met { "" } else { "**missed** " }, verdict.text))
        .collect();
    words.join("; ")
}

/// I/Os per second as people say them.
fn amount(iops: f64) -> String {
    if iops >= 10_000.0 {
        format!("{:.0}k", iops / 1000.0)
    } else if iops >= 1000.0 {
        format!("{:.1}k", iops / 1000.0)
    } else {
        format!("{iops:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_is_replaced_and_nothing_else() {
        let first = with_section("# Title\n\nText.\n", "one\n").unwrap();
        assert_eq!(first, format!("# Title\n\nText.\n\n{BEGIN}one\n{END}"));
        let longer = format!("{first}\n## More\n");
        let second = with_section(&longer, "two\n").unwrap();
        assert_eq!(
            second,
            format!("# Title\n\nText.\n\n{BEGIN}two\n{END}\n## More\n")
        );
        assert!(with_section(END, "three").is_err());
    }

    #[test]
    fn amounts_are_short() {
        assert_eq!(
            [123.4, 4567.0, 98_765.0].map(amount),
            ["123", "4.6k", "99k"].map(str::to_owned)
        );
    }
}
