//! Power cuts on the real store: sled and real files under a recorder, replayed with what was not synced dropped or
//! kept at random (`recorder/recorder.c`, `common/replay.rs`).
//!
//! `STILLPOINT_SOAK_CUTS` raises the number of cut points, `STILLPOINT_SEED` repeats a run; `tests/soak store` runs all
//! of it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use stillpoint_snapshot::sim::{Loss, Rng};

use common::counts::Counts;
use common::facts::Crash;
use common::recorder::{self, LeftOut};
use common::replay::{Event, FileSystem, read_log};
use common::workload::{self, Orders};

const QUICK_CUTS: usize = 90;
/// A new recording after so many, so that a long run sees other histories too.
const CUTS_PER_RECORDING: usize = 90;
const CONTROL_CUTS: usize = 60;
/// Syncs, names and lengths around an exchange of names after which the machine dies: before it and after it.
const AROUND: (usize, usize) = (8, 14);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is not a number"))
    })
}

/// The workload itself, in a process of its own.
#[test]
#[ignore = "run as a child by the tests of this file"]
fn workload_child() {
    workload::run(&Orders::from_env()).unwrap();
}

/// A recorded session: three processes one after another on one pool, the first of which makes it.
struct Recording {
    scratch: tempfile::TempDir,
    root: PathBuf,
    events: Vec<Event>,
}

fn record(seed: u64, left_out: LeftOut, sessions: u64, steps: u64) -> Recording {
    record_session(seed, left_out, (sessions, steps), false)
}

fn record_session(seed: u64, left_out: LeftOut, (sessions, steps): (u64, u64), exchanges: bool) -> Recording {
    let scratch = recorder::scratch();
    let base = fs::canonicalize(scratch.path()).unwrap();
    let (root, log) = (base.join("root"), base.join("log"));
    fs::create_dir(&root).unwrap();
    for session in 0..sessions {
        let orders = Orders {
            dir: root.clone(),
            seed: seed * 100 + session,
            steps,
            exchanges,
        };
        let output = recorder::record("workload_child", &root, &log, left_out, &orders.vars());
        assert!(
            output.status.success(),
            "seed {seed}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let events = read_log(&log);
    fs::remove_file(&log).unwrap();
    Recording {
        scratch,
        root,
        events,
    }
}

impl Recording {
    /// Places of what is not a write of data: what tells more happens between these (syncs, names, punches).
    fn others(&self) -> Vec<usize> {
        let is_other = |at: &usize| !matches!(self.events[*at], Event::Write { .. });
        (0..self.events.len()).filter(is_other).collect()
    }

    /// Follows the log and shows `look` the image of a power cut at `cuts` random points, until it says stop.
    fn cut(&self, seed: u64, cuts: usize, look: impl FnMut(usize, Loss, &Path, &str) -> bool) {
        let mut rng = Rng::new(seed);
        let others = self.others();
        let points = (0..cuts).map(|cut| {
            let point = match cut % 2 {
                0 => rng.index(self.events.len()),
                _ => *rng.pick(&others).unwrap() + rng.index(2),
            };
            let loss = match rng.below(10) {
                0 => Loss::All,
                1 => Loss::Nothing,
                _ => Loss::Random,
            };
            (point, loss)
        });
        let mut points: Vec<_> = points.collect();
        points.sort_by_key(|(point, _)| *point);
        self.cut_at(points, seed, look);
    }

    /// Shows `look` the images of power cuts at these points, which are in order, until it says stop.
    fn cut_at(
        &self,
        points: Vec<(usize, Loss)>,
        seed: u64,
        mut look: impl FnMut(usize, Loss, &Path, &str) -> bool,
    ) {
        let mut rng = Rng::new(seed);
        let mut system = FileSystem::new(&self.root);
        let mut followed = 0;
        for (point, loss) in points {
            for event in &self.events[followed..point] {
                system.apply(event);
            }
            followed = point;
            let image = self.scratch.path().join("image");
            fs::create_dir(&image).unwrap();
            system.image(&image, loss, &mut rng);
            let facts = system.content(&self.root.join("facts"));
            let go_on = look(point, loss, &image, std::str::from_utf8(&facts).unwrap());
            fs::remove_dir_all(&image).unwrap();
            if !go_on {
                return;
            }
        }
    }
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, found)
        } else {
            found.push(path)
        }
    }
}

#[test]
fn the_recorder_misses_nothing() {
    let recording = record(number("STILLPOINT_SEED", 7), LeftOut::Nothing, 2, 60);
    let mut system = FileSystem::new(&recording.root);
    for event in &recording.events {
        system.apply(event);
    }
    let mut files = Vec::new();
    files_below(&recording.root, &mut files);
    assert!(files.len() >= 4, "{files:?}");
    for path in files {
        assert!(
            system.content(&path) == fs::read(&path).unwrap(),
            "{} differs from its replay",
            path.display()
        );
    }
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    let cuts = number("STILLPOINT_SOAK_CUTS", QUICK_CUTS as u64) as usize;
    let mut counts = Counts::default();
    for seed in number("STILLPOINT_SEED", 1).. {
        let recording = record(seed, LeftOut::Nothing, 3, 250);
        let now = CUTS_PER_RECORDING.min(cuts - counts.total());
        recording.cut(seed, now, |point, loss, image, facts| {
            let verdict = workload::judge(image, facts, Crash::Power);
            counts.add(verdict.under_way);
            if let Err(what) = verdict.judged {
                panic!(
                    "STILLPOINT_SEED={seed}, cut {point}/{} ({loss:?}): {what}",
                    recording.events.len()
                );
            }
            true
        });
        if counts.total() == cuts {
            break;
        }
    }
    counts.print("power cut", "points");
}

/// A restore and a compaction put one metadata store in the place of another while the power fails: before and after each
/// of the syncs and names around it.
#[test]
fn a_power_cut_around_an_exchange_of_names_leaves_one_whole_store() {
    let soak = std::env::var_os("STILLPOINT_SOAK_CUTS").is_some();
    let seed = number("STILLPOINT_SEED", 11);
    let mut counts = Counts::default();
    for seed in seed..seed + if soak { 4 } else { 1 } {
        let recording = record_session(seed, LeftOut::Nothing, (2, 30), true);
        let others = recording.others();
        let is_exchange = |at: &usize| matches!(recording.events[*at], Event::Rename { exchange: true, .. });
        let exchanges: Vec<usize> = (0..others.len()).filter(|at| is_exchange(&others[*at])).collect();
        // A compaction in each session, and the restore before the second; chance may add more.
        assert!(exchanges.len() >= 3, "{exchanges:?}");
        let around = |at: &usize| at.saturating_sub(AROUND.0)..(at + AROUND.1).min(others.len());
        let places: BTreeSet<usize> = exchanges.iter().flat_map(around).collect();
        let losses = [Loss::Nothing, Loss::All, Loss::Random];
        let points = places.iter().enumerate().flat_map(|(n, place)| {
            let losses = match soak {
                true => losses.to_vec(),
                false => vec![losses[n % losses.len()]],
            };
            losses.into_iter().map(|loss| (others[*place] + 1, loss))
        });
        recording.cut_at(points.collect(), seed, |point, loss, image, facts| {
            let verdict = workload::judge(image, facts, Crash::Power);
            counts.add(verdict.under_way);
            if let Err(what) = verdict.judged {
                let event = &recording.events[point - 1];
                panic!("STILLPOINT_SEED={seed}, cut {point} after {event:?} ({loss:?}): {what}");
            }
            true
        });
    }
    counts.print("power cut at an exchange", "points");
}

/// The control: the same experiment must see loss when one of our own syncs is left out.
fn sees_loss_without_fdatasync_of(suffix: &'static str) {
    let seed = number("STILLPOINT_SEED", 2);
    // The second process opens the data file under its final name.
    let recording = record(seed, LeftOut::Fdatasync(suffix), 2, 150);
    let mut seen = None;
    recording.cut(seed, CONTROL_CUTS, |point, _, image, facts| {
        seen = workload::judge(image, facts, Crash::Power)
            .judged
            .err()
            .map(|what| (point, what));
        seen.is_none()
    });
    let (point, what) =
        seen.unwrap_or_else(|| panic!("fdatasync of {suffix} was left out and nothing was lost"));
    println!("without fdatasync of {suffix}, cut {point}: {what}");
}

#[test]
fn control_without_our_fdatasync_of_the_metadata_loss_is_seen() {
    sees_loss_without_fdatasync_of("/db");
}

#[test]
fn control_without_our_fdatasync_of_the_data_loss_is_seen() {
    sees_loss_without_fdatasync_of("/data");
}
