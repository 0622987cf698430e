//! What is measured.

use std::fs::File;
use std::time::Duration;

use anyhow::Context as _;
use stillpoint_snapshot::{CloneSpec, SnapshotId, Volume};

use crate::Settings;
use crate::measure::{Contender, Rng, compute_time, take_turns, time};
use crate::report::Report;
use crate::sides::{Place, Side};

const BLOCK: u64 = 4096;
const WRITES: u64 = 4096;
const FLUSH_EVERY: u64 = 1024;
const READS: u64 = 16_384;
const FLUSHED_WRITES: u64 = 128;
const SEQUENTIAL: u64 = 1 << 20;
const SEQUENTIAL_OPERATIONS: u64 = 64;
/// Grains rewritten between two of many snapshots.
const BETWEEN_SNAPSHOTS: u64 = 48;
const LATENCY_SAMPLES: u32 = 200;
/// Entries of the commits that are measured.
const COMMITS: [u64; 4] = [1, 64, 1024, 16_384];

#[expect(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn float(count: u64) -> f64 {
    count as f64
}

fn random_writes(
    side: &dyn Side,
    bytes: u64,
    seed: u64,
    count: u64,
    flush_every: u64,
) -> anyhow::Result<Duration> {
    let mut rng = Rng::new(seed);
    let mut data = vec![0; 4096];
    time(|| {
        for write in 1..=count {
            data.fill(u8::try_from(write % 251)?);
            side.write(rng.below(bytes / BLOCK) * BLOCK, &data)?;
            if write % flush_every == 0 {
                side.flush()?;
            }
        }
        Ok(())
    })
}

fn random_reads(side: &dyn Side, bytes: u64, seed: u64) -> anyhow::Result<Duration> {
    let mut rng = Rng::new(seed);
    let mut data = vec![0; 4096];
    compute_time(|| (0..READS).try_for_each(|_| side.read(rng.below(bytes / BLOCK) * BLOCK, &mut data)))
}

fn sequential(side: &dyn Side, bytes: u64, seed: u64, write: bool) -> anyhow::Result<Duration> {
    let mut data = vec![u8::try_from(seed % 251)?; usize::try_from(SEQUENTIAL)?];
    let places = bytes / SEQUENTIAL;
    let first = Rng::new(seed).below(places);
    let run = || {
        for operation in 0..SEQUENTIAL_OPERATIONS {
            let offset = (first + operation) % places * SEQUENTIAL;
            if !write {
                side.read(offset, &mut data)?;
                continue;
            }
            side.write(offset, &data)?;
            if operation % 16 == 15 {
                side.flush()?;
            }
        }
        Ok(())
    };
    if write { time(run) } else { compute_time(run) }
}

/// Who takes part in the comparisons.
struct Field<'a> {
    settings: &'a Settings,
    place: &'a Place,
    file: File,
    /// No snapshot holds anything of it.
    free: Volume,
    /// A snapshot before each round of writes.
    held: Volume,
    /// Many snapshots, each with something of its own.
    many: Volume,
}

/// Ratios to a file filled by writes of `fill` bytes.
pub(crate) fn comparisons(
    settings: &Settings,
    place: &Place,
    fill: u64,
    report: &mut Report,
) -> anyhow::Result<()> {
    report.section(&format!("filled by writes of {} KiB", fill >> 10));
    report.figure("resident memory, empty pool", resident()?, "KiB");
    let volume = |name| place.volume(name, settings.bytes, fill, settings.checksums);
    let field = Field {
        settings,
        place,
        file: place.file(settings.bytes, fill)?,
        free: volume("free")?,
        held: volume("held")?,
        many: volume("many")?,
    };
    for number in 0..settings.snapshots {
        place.snapshot(&field.many, &format!("many-{number}"))?;
        random_writes(&field.many, settings.bytes, number, BETWEEN_SNAPSHOTS, u64::MAX)?;
    }
    place.settle()?;
    field.random_writes(report)?;
    place.seal()?;
    field.random_reads(report)?;
    field.in_place(report)?;
    field.commits(report)?;
    report.figure("resident memory at the end", resident()?, "KiB");
    let stats = place.pool.stats();
    report.figure("metadata on disk", stats.metadata_bytes >> 10, "KiB");
    place.pool.shutdown()?;
    Ok(())
}

impl Field<'_> {
    fn turns(&self, contenders: &mut [Contender<'_>]) -> anyhow::Result<Vec<Vec<f64>>> {
        take_turns(self.settings.rounds, contenders)
    }

    fn random_writes(&self, report: &mut Report) -> anyhow::Result<()> {
        let bytes = self.settings.bytes;
        let writes = |side: &dyn Side, round| random_writes(side, bytes, round, WRITES, FLUSH_EVERY);
        let cut = |volume: &Volume, name: &str, round| {
            self.place
                .snapshot(volume, &format!("{name}-round-{round}"))
                .map(drop)
        };
        let seconds = self.turns(&mut [
            Box::new(|round| writes(&self.file, round)),
            Box::new(|round| writes(&self.free, round)),
            Box::new(|round| {
                cut(&self.held, "held", round)?;
                writes(&self.held, round)
            }),
            Box::new(|round| {
                cut(&self.many, "many", round)?;
                writes(&self.many, round)
            }),
        ])?;
        let [file, free, held, many] = seconds.try_into().ok().context("four contenders")?;
        let mut row = |name: &str, of, base: &[f64], subject: &[f64], target| {
            report.ratio(name, of, base, subject, float(WRITES), target);
        };
        row("random write, no snapshot", "the file", &file, &free, Some(0.90));
        row(
            "random write, right after a snapshot",
            "no snapshot",
            &free,
            &held,
            Some(0.95),
        );
        row(
            "random write, right after a snapshot",
            "the file",
            &file,
            &held,
            None,
        );
        let name = format!("random write, {} snapshots", self.settings.snapshots);
        row(&name, "no snapshot", &free, &many, Some(0.95));
        row(&name, "right after one", &held, &many, None);
        Ok(())
    }

    fn random_reads(&self, report: &mut Report) -> anyhow::Result<()> {
        let bytes = self.settings.bytes;
        let seconds = self.turns(&mut [
            Box::new(|round| random_reads(&self.file, bytes, round)),
            Box::new(|round| random_reads(&self.free, bytes, round)),
            Box::new(|round| random_reads(&self.many, bytes, round)),
        ])?;
        let [file, free, many] = seconds.try_into().ok().context("three contenders")?;
        report.ratio(
            "random read, no snapshot",
            "the file",
            &file,
            &free,
            float(READS),
            Some(0.90),
        );
        let name = format!("random read, {} snapshots", self.settings.snapshots);
        report.ratio(&name, "no snapshot", &free, &many, float(READS), Some(0.98));
        Ok(())
    }

    /// What needs no new grain.
    fn in_place(&self, report: &mut Report) -> anyhow::Result<()> {
        let bytes = self.settings.bytes;
        let flushed = |side: &dyn Side, round| random_writes(side, bytes, round, FLUSHED_WRITES, 1);
        let seconds = self.turns(&mut [
            Box::new(|round| flushed(&self.file, round)),
            Box::new(|round| flushed(&self.free, round)),
        ])?;
        let [file, free] = seconds.try_into().ok().context("two contenders")?;
        report.ratio(
            "4 KiB write + flush, in place",
            "the file",
            &file,
            &free,
            float(FLUSHED_WRITES),
            Some(0.90),
        );
        for (name, write) in [("sequential write 1 MiB", true), ("sequential read 1 MiB", false)] {
            let seconds = self.turns(&mut [
                Box::new(|round| sequential(&self.file, bytes, round, write)),
                Box::new(|round| sequential(&self.free, bytes, round, write)),
            ])?;
            let [file, free] = seconds.try_into().ok().context("two contenders")?;
            report.ratio(name, "the file", &file, &free, float(SEQUENTIAL_OPERATIONS), None);
        }
        Ok(())
    }

    fn commits(&self, report: &mut Report) -> anyhow::Result<()> {
        let bytes = self.settings.bytes;
        for count in COMMITS {
            let flushes = std::cell::RefCell::new(Vec::new());
            let write = |side: &dyn Side, round| random_writes(side, bytes, round, count, u64::MAX);
            let seconds = self.turns(&mut [
                Box::new(|round| Ok(write(&self.file, round)? + time(|| Side::flush(&self.file))?)),
                Box::new(|round| {
                    self.place
                        .snapshot(&self.held, &format!("commit-{count}-{round}"))?;
                    let written = write(&self.held, round)?;
                    let flushed = time(|| Side::flush(&self.held))?;
                    flushes.borrow_mut().push(flushed.as_secs_f64());
                    Ok(written + flushed)
                }),
            ])?;
            let [file, held] = seconds.try_into().ok().context("two contenders")?;
            let name = format!("{count} redirected writes and a flush");
            report.ratio(&name, "the file", &file, &held, float(count), None);
            report.latency(
                &format!("  of it the flush ({count} entries)"),
                &flushes.into_inner(),
                None,
            );
        }
        Ok(())
    }
}

/// Times of the calls that change what there is, on a pool with nothing else to do.
pub(crate) fn latencies(settings: &Settings, place: &Place, report: &mut Report) -> anyhow::Result<()> {
    report.section("calls on an idle pool");
    let volume = place.volume("volume", settings.bytes, SEQUENTIAL, settings.checksums)?;
    place.settle()?;
    let mut rng = Rng::new(1);
    let [mut cuts, mut clones, mut reverts, mut deletes] = [const { Vec::new() }; 4];
    for number in 0..LATENCY_SAMPLES {
        let some = |volume: &Volume, seed| random_writes(volume, settings.bytes, seed, 32, 32).map(drop);
        some(&volume, rng.below(u64::MAX))?;
        place.settle()?;
        let mut made: Option<SnapshotId> = None;
        let took = time(|| {
            made = Some(place.snapshot(&volume, &format!("s{number}"))?);
            Ok(())
        })?;
        cuts.push(took.as_secs_f64());
        let id = made.context("just made")?;
        // The other calls take more steps to set up: one in four.
        if number % 4 == 0 {
            let name = format!("c{number}");
            let spec = CloneSpec {
                name: name.clone(),
                read_only: false,
                attributes: Vec::new(),
            };
            clones.push(
                time(|| place.pool.clone_snapshot(id, &spec).map(drop).map_err(Into::into))?.as_secs_f64(),
            );
            place.pool.delete_volume(&name, true)?;
            some(&volume, rng.below(u64::MAX))?;
            place.settle()?;
            reverts.push(
                time(|| place.pool.revert(volume.id(), id).map(drop).map_err(Into::into))?.as_secs_f64(),
            );
            place.settle()?;
        }
        deletes.push(time(|| Ok(place.pool.delete_snapshot(id)?))?.as_secs_f64());
    }
    place.settle()?;
    report.latency("snapshot", &cuts, Some(20.0));
    report.latency("clone", &clones, None);
    report.latency("revert", &reverts, None);
    report.latency("delete (the call)", &deletes, None);
    place.pool.shutdown()?;
    Ok(())
}

/// Resident memory of this process in KiB.
fn resident() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line
        .and_then(|line| line.split_whitespace().next())
        .context("VmRSS")?;
    Ok(number.parse()?)
}
