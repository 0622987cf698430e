//! One bit flipped anywhere in the files of a pool: what is read is what was written, or an error, or the pool says clearly why
//! it does not open. Never other data, never a hang, never a panic. Each flip is judged in a process of its own, under a
//! time limit (FORMAT.md, rule 6 for sled).
//!
//! `STILLPOINT_SOAK_FLIPS` raises the number of flips per kind of file, `STILLPOINT_SEED` repeats a run.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use stillpoint_snapshot::sim::Rng;
use stillpoint_snapshot::{
    Checksums, CloneSpec, Error, Pool, PoolOptions, SnapshotSpec, Volume, VolumeSpec, check_data,
};

use common::recorder::{child, scratch};

const GRAIN: u64 = 4096;
const GRAINS: u64 = 300;
/// Far above what a loaded machine needs; below it, the store gives up opening by itself.
const PATIENCE: Duration = Duration::from_secs(150);
const QUICK_FLIPS: u64 = 8;
/// Told by the child when the pool does not open.
const REFUSED: &str = "refused: ";

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        checkpoint_txgs: 4,
        open_timeout_ms: 30_000,
        ..PoolOptions::default()
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn volume(pool: &Pool, name: &str, mode: Checksums) -> Volume {
    let spec = VolumeSpec {
        name: name.into(),
        size_bytes: GRAINS * GRAIN,
        block_size: 512,
        attributes: b"owner".to_vec(),
    };
    let volume = pool.create_volume(&spec).unwrap();
    volume.set_checksums(mode).unwrap();
    volume
}

fn fill(volume: &Volume, grain: u64, grains: u64, rng: &mut Rng) {
    let data: Vec<u8> = (0..grains * GRAIN / 8)
        .flat_map(|_| rng.bits().to_be_bytes())
        .collect();
    volume.write(grain * GRAIN, &data, false).unwrap();
}

fn snapshot(pool: &Pool, volume: &Volume, name: &str) -> stillpoint_snapshot::SnapshotInfo {
    let spec = SnapshotSpec {
        name: name.into(),
        ..SnapshotSpec::default()
    };
    let cut = pool.begin_cut(&[volume.id()], &spec).unwrap();
    cut.commit().unwrap().remove(0)
}

/// A pool of which every byte that is compared has a checksum; with history, a clone and values. `killed`: it was not
/// closed, and what came last is in the warm log only.
fn lived_in(dir: &Path, killed: bool) {
    let mut rng = Rng::new(77);
    let pool = Pool::create(dir, &options()).unwrap();
    let always = volume(&pool, "always", Checksums::Always);
    let sealed = volume(&pool, "sealed", Checksums::Sealed);
    pool.meta_put("agents", Some(b"one")).unwrap();
    for round in 0..4 {
        (0..20).for_each(|_| fill(&always, rng.below(GRAINS - 9), 9, &mut Rng::new(round)));
        (0..20).for_each(|_| fill(&sealed, rng.below(GRAINS - 9), 9, &mut Rng::new(round + 50)));
        snapshot(&pool, &always, &format!("a{round}"));
        let cut = snapshot(&pool, &sealed, &format!("s{round}"));
        if round == 2 {
            let spec = CloneSpec {
                name: "clone".into(),
                read_only: false,
                attributes: Vec::new(),
            };
            pool.clone_snapshot(cut.id, &spec).unwrap();
        }
        pool.step().unwrap();
    }
    while pool.run_sealing(9).unwrap() > 0 {}
    pool.step().unwrap();
    if killed {
        (0..30).for_each(|_| fill(&always, rng.below(GRAINS - 3), 3, &mut rng));
        // As a killed process leaves it: no end of anything.
        std::mem::forget(pool);
    } else {
        pool.shutdown().unwrap();
        // sled sums its log up in a file of its own when it opens.
        Pool::open(dir, &options()).unwrap().shutdown().unwrap();
    }
}

/// Reads from a byte on.
type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<(), Error>;

/// Everything that can be read, told line by line: `volume snapshot grain crc`, or `-` for a medium error.
fn tell(pool: &Pool) -> String {
    let mut told = String::new();
    let mut add = |name: &str, read: Read<'_>| {
        for grain in 0..GRAINS {
            let mut bytes = vec![0; GRAIN as usize];
            let crc = match read(grain * GRAIN, &mut bytes) {
                Ok(()) => format!("{:08x}", crc32c::crc32c(&bytes)),
                Err(Error::Medium { .. } | Error::Corrupt { .. } | Error::Poisoned { .. }) => "-".to_owned(),
                Err(other) => panic!("{other}"),
            };
            told.push_str(&format!("{name} {grain} {crc}\n"));
        }
    };
    for info in pool.volumes() {
        let v = pool.volume(&info.name).unwrap();
        add(&info.name, &|at, buf| v.read(at, buf));
    }
    for s in pool.snapshots(None) {
        let name = format!("{}@{}", s.volume_name, s.name);
        add(&name, &|at, buf| pool.read_snapshot(s.id, at, buf));
    }
    for (name, value) in pool.meta_list("agents") {
        told.push_str(&format!("value {name} {value:?}\n"));
    }
    if pool.stats().recovery_incomplete {
        told.push_str("recovery incomplete\n");
    }
    told.push_str("end\n");
    told
}

/// Opens a pool and tells all; in a process of its own.
#[test]
#[ignore = "run as a child by the tests of this file"]
fn reader_child() {
    let dir = PathBuf::from(std::env::var("FLIPS_DIR").unwrap());
    let told = match Pool::open(&dir.join("pool"), &options()) {
        Ok(pool) => {
            let told = tell(&pool);
            // Either may fail; neither may hang or panic.
            drop(pool.shutdown());
            drop(check_data(&dir.join("pool")).map(|report| report.problem_count));
            told
        }
        Err(error) => format!("{REFUSED}{error}\n"),
    };
    fs::write(dir.join("told"), told).unwrap();
    // A thread that still opens must not keep the process.
    std::process::exit(0);
}

/// What a reader says about the pool in `dir`.
fn ask(dir: &Path) -> String {
    let vars = [("FLIPS_DIR", dir.to_str().unwrap().to_owned())];
    let mut process = child("reader_child", &vars)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    while process.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            process.kill().unwrap();
            panic!("it hangs: {}", dir.display());
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    let output = process.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "it does not end in good order: {errors}");
    fs::read_to_string(dir.join("told")).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// Flips one bit of a file, most of the time where there is something.
fn flip(path: &Path, range: std::ops::Range<u64>, rng: &mut Rng) -> String {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    let mut at = range.start;
    for _ in 0..200 {
        at = range.start + rng.below(range.end - range.start);
        file.read_exact_at(&mut byte, at).unwrap();
        if byte[0] != 0 || rng.chance(3) {
            break;
        }
    }
    let bit = rng.below(8);
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).unwrap();
    format!(
        "{} byte {at} bit {bit}",
        path.file_name().unwrap().to_string_lossy()
    )
}

/// Files of a pool and the parts of them that are flipped.
fn targets(pool: &Path) -> Vec<(&'static str, PathBuf, std::ops::Range<u64>)> {
    let mut all = Vec::new();
    let mut add = |kind, path: PathBuf, from: u64, to: Option<u64>| {
        let len = fs::metadata(&path).map_or(0, |m| m.len());
        let end = to.unwrap_or(len).min(len);
        if from < end {
            all.push((kind, path, from..end));
        }
    };
    add("superblock", pool.join("data"), 0, Some(104));
    add("data", pool.join("data"), 2 * GRAIN, None);
    add("db", pool.join("meta/db"), 0, None);
    add("conf", pool.join("meta/conf"), 0, None);
    for entry in fs::read_dir(pool.join("meta")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("snap.") {
            add("snap", path, 0, None);
        }
    }
    for name in ["warm.0", "warm.1"] {
        add("warm", pool.join(name), 0, None);
    }
    all
}

#[derive(Debug, Default)]
struct Outcomes {
    harmless: u64,
    medium: u64,
    refused: u64,
    incomplete: u64,
}

/// Same content or a clear error: nothing else.
fn judge(expected: &str, told: &str, what: &str, outcomes: &mut Outcomes) {
    if let Some(reason) = told.strip_prefix(REFUSED) {
        assert!(reason.trim().len() > 20, "{what}: no clear sentence: {reason}");
        outcomes.refused += 1;
        return;
    }
    assert!(told.ends_with("end\n"), "{what}: {told}");
    let incomplete = told.contains("recovery incomplete");
    let parse = |text: &str| -> BTreeMap<String, String> {
        let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        lines
            .map(|(place, crc)| (place.to_owned(), crc.to_owned()))
            .collect()
    };
    let (expected, told) = (parse(expected), parse(told));
    let mut medium = false;
    for (place, crc) in &expected {
        match told.get(place) {
            Some(found) if found == crc => {}
            Some(found) if found == "-" => medium = true,
            // Said, and only where the killed process had written last.
            Some(_) if incomplete && place.starts_with("always ") => {}
            found => panic!("{what}: silently wrong: {place} is {found:?}, was {crc}"),
        }
    }
    if incomplete {
        outcomes.incomplete += 1;
    } else if medium {
        outcomes.medium += 1;
    } else {
        outcomes.harmless += 1;
    }
}

fn flips(killed: bool, kinds: &[&str]) {
    let (seed, count) = (
        number("STILLPOINT_SEED", 1),
        number("STILLPOINT_SOAK_FLIPS", QUICK_FLIPS),
    );
    let base = scratch();
    lived_in(&base.path().join("pool"), killed);
    let whole = scratch();
    copy(base.path(), whole.path());
    let expected = ask(whole.path());
    assert!(
        expected.ends_with("end\n") && !expected.contains(" -\n"),
        "{expected}"
    );
    let mut seen: BTreeMap<&str, Outcomes> = BTreeMap::new();
    for kind in kinds {
        for n in 0..count {
            let mut rng = Rng::new(seed * 1_000_003 + n);
            let one = scratch();
            copy(base.path(), one.path());
            let all = targets(&one.path().join("pool"));
            let mine: Vec<_> = all.iter().filter(|(k, ..)| k == kind).collect();
            let Some((_, path, range)) = rng.pick(&mine) else {
                continue;
            };
            let what = flip(path, range.clone(), &mut rng);
            let what = format!("STILLPOINT_SEED={seed}, flip {n}: {what}");
            judge(&expected, &ask(one.path()), &what, seen.entry(*kind).or_default());
        }
    }
    println!("soak flips: {seen:?}");
}

#[test]
fn one_bit_in_any_file_of_a_closed_pool() {
    flips(false, &["superblock", "data", "db", "conf", "snap"]);
}

#[test]
fn one_bit_in_any_file_of_a_killed_pool() {
    flips(true, &["warm", "db"]);
}
