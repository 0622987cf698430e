//! Measures the snapshot store against a plain file; README.md says what is compared with what.
#![forbid(unsafe_code)]

mod cases;
mod measure;
mod report;
mod sides;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::json;
use stillpoint_snapshot::Checksums;

use report::Report;
use sides::Place;

const USAGE: &str = "\
tests/bench/store [OPTIONS]

  --dir DIR            where the files go (a directory of their own is made in it); default: build/
  --size-mib N         size of each volume and of the file (256)
  --rounds N           rounds of each comparison (15)
  --snapshots N        snapshots of the volume with many (1000)
  --checksums MODE     off, sealed or always (sealed: the default of a LUN)
  --fill SIZE          4k or 1m only; default: both
  --json FILE          also write everything as JSON
";

/// What is to be measured, and how long.
pub(crate) struct Settings {
    pub(crate) dir: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) rounds: u64,
    pub(crate) snapshots: u64,
    pub(crate) checksums: Checksums,
    pub(crate) fills: Vec<u64>,
    json: Option<PathBuf>,
}

impl Settings {
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let mut settings = Self {
            dir: "build".into(),
            bytes: 256 << 20,
            rounds: 15,
            snapshots: 1000,
            checksums: Checksums::Sealed,
            fills: vec![4 << 10, 1 << 20],
            json: None,
        };
        while let Some(name) = arguments.next() {
            if ["-h", "--help"].contains(&name.as_str()) {
                return Ok(None);
            }
            let value = arguments
                .next()
                .with_context(|| format!("{name} needs a value\n\n{USAGE}"))?;
            let number = || {
                value
                    .parse::<u64>()
                    .with_context(|| format!("{name} {value:?} is not a number"))
            };
            match name.as_str() {
                "--dir" => settings.dir = value.into(),
                "--size-mib" => settings.bytes = number()?.max(16) << 20,
                "--rounds" => settings.rounds = number()?.max(1),
                "--snapshots" => settings.snapshots = number()?,
                "--checksums" => {
                    settings.checksums = match value.as_str() {
                        "off" => Checksums::Off,
                        "sealed" => Checksums::Sealed,
                        "always" => Checksums::Always,
                        _ => bail!("--checksums {value:?}: off, sealed or always"),
                    }
                }
                "--fill" => {
                    settings.fills = match value.as_str() {
                        "4k" => vec![4 << 10],
                        "1m" => vec![1 << 20],
                        _ => bail!("--fill {value:?}: 4k or 1m"),
                    }
                }
                "--json" => settings.json = Some(value.into()),
                _ => bail!("unknown option {name}\n\n{USAGE}"),
            }
        }
        Ok(Some(settings))
    }
}

fn run() -> anyhow::Result<()> {
    let Some(settings) = Settings::parse(std::env::args().skip(1))? else {
        print!("{USAGE}");
        return Ok(());
    };
    println!(
        "{} MiB each in {}, {} rounds, checksums {:?}; ratio = speed of the first in units of the second, median (quartiles)",
        settings.bytes >> 20,
        settings.dir.display(),
        settings.rounds,
        settings.checksums,
    );
    let mut report = Report::default();
    for &fill in &settings.fills {
        let place = Place::new(&settings.dir)?;
        cases::comparisons(&settings, &place, fill, &mut report)?;
    }
    let place = Place::new(&settings.dir)?;
    cases::latencies(&settings, &place, &mut report)?;
    println!("\n{} targets missed", report.missed());
    if let Some(path) = &settings.json {
        let described = json!({
            "size_bytes": settings.bytes, "rounds": settings.rounds, "snapshots": settings.snapshots,
            "checksums": settings.checksums,
        });
        let text = serde_json::to_string_pretty(&report.json(&described))?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
