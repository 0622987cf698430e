//! What a killed process had acknowledged is there at the next open on the same boot (FORMAT.md, "The warm log").
//!
//! The kill is played: the pool's directory is copied while nothing writes, which is what the page cache holds when
//! the process is gone. `kill9.rs` does it with real processes.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stillpoint_snapshot::sim::Rng;
use stillpoint_snapshot::{Hooks, Point, Pool, PoolOptions, SnapshotSpec, Volume, VolumeSpec, check};
use tempfile::TempDir;

use common::gate::Gate;

const GRAIN: u64 = 4096;
const GRAINS: u64 = 160;
const SIZE: u64 = GRAINS * GRAIN;
const LOGS: [&str; 2] = ["warm.0", "warm.1"];

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        job_pages: 1,
        ..PoolOptions::default()
    }
}

fn volume_spec(name: &str) -> VolumeSpec {
    VolumeSpec {
        name: name.into(),
        size_bytes: SIZE,
        block_size: 512,
        attributes: Vec::new(),
    }
}

fn snapshot_spec(name: &str) -> SnapshotSpec {
    SnapshotSpec {
        name: name.into(),
        ..SnapshotSpec::default()
    }
}

/// A pool in a directory of its own, with the gate of its threads.
struct Rig {
    dir: TempDir,
    gate: Gate,
    pool: Pool,
}

impl Rig {
    fn new() -> Self {
        let (dir, gate) = (tempfile::tempdir().unwrap(), Gate::default());
        let options = PoolOptions {
            hooks: Some(Arc::new(gate.clone())),
            ..options()
        };
        let pool = Pool::create(dir.path(), &options).unwrap();
        Self { dir, gate, pool }
    }

    /// A volume full of `byte`, flushed, and held by a snapshot: every write to it needs a new entry.
    fn held(&self, name: &str, byte: u8) -> Volume {
        let volume = self.volume(name);
        volume.write(0, &vec![byte; SIZE as usize], false).unwrap();
        self.cut(&volume, "base");
        volume
    }

    fn volume(&self, name: &str) -> Volume {
        self.pool.create_volume(&volume_spec(name)).unwrap()
    }

    fn cut(&self, volume: &Volume, name: &str) {
        let cut = self.pool.begin_cut(&[volume.id()], &snapshot_spec(name)).unwrap();
        cut.commit().unwrap();
    }

    fn kill(&self) -> TempDir {
        killed(self.dir.path())
    }
}

/// What a kill at this moment leaves of the pool in `dir`.
fn killed(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_tree(dir, copy.path());
    copy
}

fn copy_tree(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            fs::create_dir(&target).unwrap();
            copy_tree(&entry.path(), &target);
        } else if kind.is_file() {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

fn open(dir: &TempDir) -> Pool {
    Pool::open(dir.path(), &options()).unwrap()
}

fn grain(volume: &Volume, index: u64) -> u8 {
    let mut bytes = [0xee; GRAIN as usize];
    volume.read(index * GRAIN, &mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == bytes[0]), "grain {index} is torn");
    bytes[0]
}

fn put(volume: &Volume, index: u64, byte: u8) {
    volume
        .write(index * GRAIN, &[byte; GRAIN as usize], false)
        .unwrap();
}

fn zero(volume: &Volume, index: u64, unmap: bool) {
    volume.write_zeroes(index * GRAIN, GRAIN, unmap).unwrap();
}

fn assert_clean(dir: &Path) {
    let report = check(dir).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

fn log_files(dir: &TempDir) -> Vec<PathBuf> {
    LOGS.iter()
        .map(|name| dir.path().join(name))
        .filter(|path| fs::metadata(path).is_ok_and(|m| m.len() > 0))
        .collect()
}

#[test]
fn a_kill_loses_nothing_that_was_acknowledged() {
    let rig = Rig::new();
    let (held, fresh) = (rig.held("held", 0x11), rig.volume("fresh"));
    put(&held, 0, 0x22);
    zero(&held, 1, false);
    zero(&held, 2, true);
    held.write(3 * GRAIN + 512, &[0x33; 512], false).unwrap();
    held.unmap(&[(64 * GRAIN - 512, 2 * GRAIN)]).unwrap();
    put(&fresh, 100, 0x44);
    put(&fresh, 100, 0x45);
    let killed = rig.kill();
    assert_clean(killed.path());

    let pool = open(&killed);
    let (held, fresh) = (pool.volume("held").unwrap(), pool.volume("fresh").unwrap());
    assert_eq!([0, 1, 2, 4].map(|i| grain(&held, i)), [0x22, 0, 0, 0x11]);
    let mut edge = vec![0xee; 4 * GRAIN as usize];
    held.read(63 * GRAIN, &mut edge).unwrap();
    let hole = GRAIN as usize - 512..3 * GRAIN as usize - 512;
    for (i, byte) in edge.iter().enumerate() {
        assert_eq!(*byte, if hole.contains(&i) { 0 } else { 0x11 }, "byte {i}");
    }
    let mut merged = [0xee; GRAIN as usize];
    held.read(3 * GRAIN, &mut merged).unwrap();
    let expected = |i: usize| if (512..1024).contains(&i) { 0x33 } else { 0x11 };
    assert!(merged.iter().enumerate().all(|(i, b)| *b == expected(i)));
    assert_eq!([99, 100, 101].map(|i| grain(&fresh, i)), [0, 0x45, 0]);
    let base = pool.snapshot("held", "base").unwrap();
    let mut old = vec![0; SIZE as usize];
    pool.read_snapshot(base.id, 0, &mut old).unwrap();
    assert!(old.iter().all(|b| *b == 0x11), "the snapshot has changed");
}

#[test]
fn recovered_is_durable_and_not_recovered_twice() {
    let rig = Rig::new();
    put(&rig.held("v", 0x11), 7, 0x22);
    let first = rig.kill();
    // No flush, no shutdown: the open itself has made it durable, also for another boot.
    let recovered = open(&first);
    let again = killed(first.path());
    drop(recovered);
    let other = PoolOptions {
        boot_id: Some("another boot".into()),
        ..options()
    };
    let pool = Pool::open(again.path(), &other).unwrap();
    let volume = pool.volume("v").unwrap();
    assert_eq!(grain(&volume, 7), 0x22);
    // Newer than what the log of the first process said.
    put(&volume, 7, 0x33);
    pool.shutdown().unwrap();
    drop((volume, pool));
    assert_clean(again.path());
    let pool = open(&again);
    assert_eq!(grain(&pool.volume("v").unwrap(), 7), 0x33);
}

#[test]
fn an_old_log_put_back_is_refused() {
    let rig = Rig::new();
    put(&rig.held("v", 0x11), 7, 0x22);
    let directory = rig.kill();
    let old: Vec<_> = log_files(&directory)
        .into_iter()
        .map(|path| (fs::read(&path).unwrap(), path))
        .collect();
    assert!(!old.is_empty(), "nothing was logged");
    let pool = open(&directory);
    let volume = pool.volume("v").unwrap();
    zero(&volume, 7, true);
    pool.shutdown().unwrap();
    drop((volume, pool));
    for (bytes, path) in old {
        fs::write(path, bytes).unwrap();
    }
    let pool = open(&directory);
    assert_eq!(grain(&pool.volume("v").unwrap(), 7), 0);
}

#[test]
fn another_boot_throws_the_log_away() {
    let rig = Rig::new();
    let volume = rig.held("v", 0x11);
    put(&volume, 1, 0x22);
    volume.flush().unwrap();
    put(&volume, 2, 0x33);
    zero(&volume, 3, true);
    let killed = rig.kill();
    assert_eq!(log_files(&killed).len(), 2, "one file for each parity");
    let other = PoolOptions {
        boot_id: Some("another boot".into()),
        ..options()
    };
    let pool = Pool::open(killed.path(), &other).unwrap();
    let volume = pool.volume("v").unwrap();
    assert_eq!([1, 2, 3].map(|i| grain(&volume, i)), [0x22, 0x11, 0x11]);
    drop((volume, pool));
    let pool = open(&killed);
    assert_eq!(grain(&pool.volume("v").unwrap(), 2), 0x11, "it came back");
    pool.shutdown().unwrap();
    drop(pool);
    assert_clean(killed.path());
}

#[test]
fn the_log_of_another_pool_is_ignored() {
    let (ours, theirs) = (Rig::new(), Rig::new());
    ours.held("v", 0x11);
    put(&theirs.held("v", 0x44), 5, 0x55);
    let (ours, theirs) = (ours.kill(), theirs.kill());
    let foreign = log_files(&theirs);
    assert!(!foreign.is_empty(), "nothing was logged");
    for path in foreign {
        fs::copy(&path, ours.path().join(path.file_name().unwrap())).unwrap();
    }
    let pool = open(&ours);
    assert_eq!(grain(&pool.volume("v").unwrap(), 5), 0x11);
}

/// A pool with `COUNT` changes in one log, the n-th of which touches the n-th grain only.
const COUNT: u64 = 24;

fn changed_grain_by_grain() -> (TempDir, PathBuf) {
    let rig = Rig::new();
    let volume = rig.held("v", 0x11);
    let before = LOGS.map(|name| fs::read(rig.dir.path().join(name)).unwrap());
    for i in 0..COUNT {
        match i % 3 {
            0 => put(&volume, i, 0x80 + i as u8),
            1 => zero(&volume, i, true),
            _ => zero(&volume, i, false),
        }
    }
    let killed = rig.kill();
    // The other file is what a group that is durable left behind.
    let grown = |path: &PathBuf| fs::read(path).unwrap() != before[usize::from(path.ends_with(LOGS[1]))];
    let logs: Vec<PathBuf> = log_files(&killed).into_iter().filter(grown).collect();
    assert_eq!(logs.len(), 1, "{logs:?}");
    (killed, logs[0].clone())
}

/// How many of the changes are there; they must be the first ones.
fn prefix(dir: &TempDir) -> u64 {
    let pool = open(dir);
    let volume = pool.volume("v").unwrap();
    let new = |i: u64| if i.is_multiple_of(3) { 0x80 + i as u8 } else { 0 };
    let found: Vec<u8> = (0..COUNT).map(|i| grain(&volume, i)).collect();
    let n = (0..COUNT).take_while(|i| found[*i as usize] == new(*i)).count() as u64;
    let rest = &found[n as usize..];
    assert!(rest.iter().all(|b| *b == 0x11), "not the first {n}: {found:?}");
    pool.shutdown().unwrap();
    drop((volume, pool));
    assert_clean(dir.path());
    n
}

#[test]
fn a_torn_log_gives_its_whole_records() {
    let (source, log) = changed_grain_by_grain();
    let (name, whole) = (log.file_name().unwrap(), fs::read(&log).unwrap());
    let (mut last, mut rng) = (0, Rng::new(5));
    let mut lengths: Vec<usize> = (0..24).map(|_| rng.index(whole.len())).collect();
    lengths.extend([0, 1, whole.len() - 1, whole.len()]);
    lengths.sort_unstable();
    for len in lengths {
        let dir = killed(source.path());
        fs::write(dir.path().join(name), &whole[..len]).unwrap();
        let n = prefix(&dir);
        assert!(n >= last, "{len} bytes give {n}, fewer gave {last}");
        assert_eq!(n == COUNT, len == whole.len(), "{len} of {} bytes", whole.len());
        last = n;
    }
}

#[test]
fn a_damaged_log_is_never_taken_for_changes() {
    let (source, log) = changed_grain_by_grain();
    let (name, whole) = (log.file_name().unwrap(), fs::read(&log).unwrap());
    let mut rng = Rng::new(6);
    for _ in 0..30 {
        let mut bytes = whole.clone();
        let at = rng.index(bytes.len());
        bytes[at] ^= 1 << rng.below(8);
        let dir = killed(source.path());
        fs::write(dir.path().join(name), &bytes).unwrap();
        assert!(prefix(&dir) < COUNT, "byte {at} counts for nothing");
    }
    for filler in [0x00, 0xff] {
        let dir = killed(source.path());
        let mut bytes = whole.clone();
        bytes.extend(vec![filler; 3000]);
        fs::write(dir.path().join(name), &bytes).unwrap();
        assert_eq!(prefix(&dir), COUNT, "after {filler:#x} behind the last record");
    }
}

/// Changes of one grain in the closing transaction group and in the open one, killed at `point` of the commit.
fn across_the_border(point: &'static str) {
    let rig = Rig::new();
    let volume = rig.held("v", 0x11);
    put(&volume, 0, 0x20);
    put(&volume, 1, 0x21);
    zero(&volume, 2, true);
    put(&volume, 3, 0x23);
    let killed = std::thread::scope(|scope| {
        let pause = rig.gate.arm(point);
        let flush = scope.spawn(|| volume.flush());
        pause.wait();
        put(&volume, 0, 0x30);
        zero(&volume, 1, true);
        put(&volume, 2, 0x32);
        // Not durable: what it holds is redirected all the same.
        let cut = rig
            .pool
            .begin_cut(&[volume.id()], &snapshot_spec("lost"))
            .unwrap();
        put(&volume, 3, 0x33);
        put(&volume, 0, 0x40);
        zero(&volume, 4, false);
        put(&volume, 4, 0x44);
        let killed = rig.kill();
        drop(cut);
        pause.release();
        flush.join().unwrap().unwrap();
        killed
    });
    let pool = open(&killed);
    let volume = pool.volume("v").unwrap();
    let found = [0, 1, 2, 3, 4, 5].map(|i| grain(&volume, i));
    assert_eq!(found, [0x40, 0, 0x32, 0x33, 0x44, 0x11], "killed at {point}");
    assert!(
        pool.snapshot("v", "lost").is_none(),
        "the cut was never acknowledged"
    );
    pool.shutdown().unwrap();
    drop((volume, pool));
    assert_clean(killed.path());
}

#[test]
fn order_holds_across_the_border_of_two_groups() {
    across_the_border("commit.closed");
    across_the_border("commit.synced");
    across_the_border("commit.durable");
}

#[test]
fn a_change_that_was_not_acknowledged_does_no_harm() {
    for point in ["write.data", "write.published"] {
        let rig = Rig::new();
        let volume = rig.held("v", 0x11);
        put(&volume, 0, 0x22);
        let killed = std::thread::scope(|scope| {
            let pause = rig.gate.arm(point);
            let write = scope.spawn(|| put(&volume, 1, 0x33));
            pause.wait();
            put(&volume, 2, 0x44);
            let killed = rig.kill();
            pause.release();
            write.join().unwrap();
            killed
        });
        let pool = open(&killed);
        let volume = pool.volume("v").unwrap();
        assert_eq!([0, 2].map(|i| grain(&volume, i)), [0x22, 0x44], "{point}");
        assert!([0x11, 0x33].contains(&grain(&volume, 1)), "{point}");
        pool.shutdown().unwrap();
        drop((volume, pool));
        assert_clean(killed.path());
    }
}

/// Stops `change` inside its commit, tries a write of 0x77 at `index` meanwhile, and kills: gives what a kill left, and
/// whether the write had been acknowledged.
fn write_during(rig: &Rig, volume: &Volume, index: u64, change: impl FnOnce() + Send) -> (TempDir, bool) {
    let acknowledged = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pause = rig.gate.arm("commit.synced");
        let change = scope.spawn(change);
        pause.wait();
        let write = scope.spawn(|| {
            // Refused is as good as not acknowledged.
            let done = volume
                .write(index * GRAIN, &[0x77; GRAIN as usize], false)
                .is_ok();
            acknowledged.store(done, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(200));
        let seen = acknowledged.load(Ordering::SeqCst);
        let killed = rig.kill();
        pause.release();
        change.join().unwrap();
        write.join().unwrap();
        (killed, seen)
    })
}

#[test]
fn a_write_after_a_revert_that_was_not_durable() {
    let rig = Rig::new();
    let volume = rig.held("v", 0x11);
    let base = rig.pool.snapshot("v", "base").unwrap();
    let (killed, acknowledged) = write_during(&rig, &volume, 9, || {
        rig.pool.revert(volume.id(), base.id).unwrap();
    });
    let pool = open(&killed);
    let found = grain(&pool.volume("v").unwrap(), 9);
    assert!(
        !acknowledged || found == 0x77,
        "acknowledged, and reads {found:#x}"
    );
}

#[test]
fn a_write_beyond_a_growth_that_was_not_durable() {
    let rig = Rig::new();
    let volume = rig.held("v", 0x11);
    let (killed, acknowledged) = write_during(&rig, &volume, GRAINS + 1, || {
        volume.grow(2 * SIZE).unwrap();
    });
    assert_clean(killed.path());
    let pool = open(&killed);
    let volume = pool.volume("v").unwrap();
    let grown = volume.size_bytes() == 2 * SIZE;
    assert!(!acknowledged || !grown || grain(&volume, GRAINS + 1) == 0x77);
    volume.grow(2 * SIZE).unwrap();
    if !grown {
        assert_eq!(grain(&volume, GRAINS + 1), 0, "the new part of a grown volume");
    }
    pool.shutdown().unwrap();
    drop((volume, pool));
    assert_clean(killed.path());
}

/// Panics at a point of a commit, as a bug would.
struct Panics(&'static str);

impl Hooks for Panics {
    fn at(&self, point: Point) {
        assert!(point != self.0, "planned");
    }
}

#[test]
fn a_panic_in_a_commit_loses_nothing_that_was_acknowledged() {
    for point in ["commit.closed", "commit.synced", "commit.durable"] {
        let mut rig = Rig::new();
        drop(rig.held("v", 0x11));
        rig.pool.shutdown().unwrap();
        let hooks: Arc<dyn Hooks> = Arc::new(Panics(point));
        let with_panics = PoolOptions {
            hooks: Some(hooks),
            ..options()
        };
        rig.pool = Pool::open(rig.dir.path(), &with_panics).unwrap();
        let volume = rig.pool.volume("v").unwrap();
        put(&volume, 1, 0x22);
        zero(&volume, 2, true);
        let flushed = catch_unwind(AssertUnwindSafe(|| volume.flush()));
        assert!(flushed.is_err() && rig.pool.poisoned().is_some(), "{point}");
        let pool = open(&rig.kill());
        let volume = pool.volume("v").unwrap();
        assert_eq!([0, 1, 2].map(|i| grain(&volume, i)), [0x11, 0x22, 0], "{point}");
    }
}

#[test]
fn without_a_log_that_can_be_written_changes_are_committed() {
    let rig = Rig::new();
    rig.held("v", 0x11);
    rig.pool.shutdown().unwrap();
    let source = rig.kill();
    for name in LOGS {
        let path = source.path().join(name);
        if path.exists() {
            fs::remove_file(&path).unwrap();
        }
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    }
    let pool = open(&source);
    let volume = pool.volume("v").unwrap();
    put(&volume, 1, 0x22);
    zero(&volume, 2, true);
    // Links are not copied: only what was committed can be there.
    let killed = killed(source.path());
    let pool = open(&killed);
    let volume = pool.volume("v").unwrap();
    assert_eq!([0, 1, 2].map(|i| grain(&volume, i)), [0x11, 0x22, 0]);
}

/// What a volume must read, byte by byte.
type Model = Vec<u8>;

/// One random change; the model follows.
fn change(volume: &Volume, model: &mut Model, rng: &mut Rng) {
    let sectors = SIZE / 512;
    let start = rng.below(sectors);
    let (from, byte) = (start * 512, rng.bits() as u8 | 1);
    let len = match rng.below(4) {
        0 => 512 * (1 + rng.below((sectors - start).min(300))),
        1 => 512,
        _ => GRAIN.min(SIZE - from),
    };
    let (from, len) = if rng.chance(50) && from + GRAIN <= SIZE {
        (from - from % GRAIN, GRAIN)
    } else {
        (from, len)
    };
    let range = from as usize..(from + len) as usize;
    match rng.below(5) {
        0 => {
            volume.write_zeroes(from, len, false).unwrap();
            model[range].fill(0);
        }
        1 => {
            volume.unmap(&[(from, len)]).unwrap();
            model[range].fill(0);
        }
        _ => {
            volume.write(from, &vec![byte; len as usize], false).unwrap();
            model[range].fill(byte);
        }
    }
}

fn assert_reads(pool: &Pool, models: &[Model], what: &str) {
    for (i, model) in models.iter().enumerate() {
        let mut bytes = vec![0; SIZE as usize];
        pool.volume(&format!("v{i}"))
            .unwrap()
            .read(0, &mut bytes)
            .unwrap();
        let wrong = bytes.iter().zip(model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{what}: volume {i} differs at this byte");
    }
}

#[test]
fn rounds_of_changes_and_kills() {
    let seed = std::env::var("STILLPOINT_SEED").map_or(8, |s| s.parse().unwrap());
    let rounds = std::env::var("STILLPOINT_SOAK_ROUNDS").map_or(40, |s| s.parse().unwrap());
    let mut rng = Rng::new(seed);
    let mut dir = tempfile::tempdir().unwrap();
    let mut pool = Pool::create(dir.path(), &options()).unwrap();
    let mut models = vec![vec![0; SIZE as usize]; 2];
    for i in 0..models.len() {
        pool.create_volume(&volume_spec(&format!("v{i}"))).unwrap();
    }
    let mut snapshots: Vec<(String, usize, Model)> = Vec::new();
    for round in 0..rounds {
        let what = format!("STILLPOINT_SEED={seed} round {round}");
        for step in 0..rng.below(40) {
            let i = rng.index(models.len());
            let volume = pool.volume(&format!("v{i}")).unwrap();
            match rng.below(20) {
                0 => volume.flush().unwrap(),
                1 => {
                    let name = format!("s{round}-{step}");
                    let cut = pool.begin_cut(&[volume.id()], &snapshot_spec(&name)).unwrap();
                    cut.commit().unwrap();
                    snapshots.push((name, i, models[i].clone()));
                }
                2 if !snapshots.is_empty() => {
                    let (name, i, _) = snapshots.swap_remove(rng.index(snapshots.len()));
                    let id = pool.snapshot(&format!("v{i}"), &name).unwrap().id;
                    pool.delete_snapshot(id).unwrap();
                }
                3 if !snapshots.is_empty() => {
                    let (name, i, then) = snapshots[rng.index(snapshots.len())].clone();
                    let at = pool.snapshot(&format!("v{i}"), &name).unwrap();
                    // Reverts nest; the limit of that is another test's.
                    if pool.revert(at.volume, at.id).is_ok() {
                        models[i] = then;
                    }
                }
                4 => drop(pool.run_jobs(3).unwrap()),
                5 => pool.checkpoint_now().unwrap(),
                _ => change(&volume, &mut models[i], &mut rng),
            }
        }
        let next = killed(dir.path());
        assert_clean(next.path());
        pool = open(&next);
        dir = next;
        assert_reads(&pool, &models, &what);
        for (name, i, then) in &snapshots {
            let id = pool.snapshot(&format!("v{i}"), name).unwrap().id;
            let mut bytes = vec![0; SIZE as usize];
            pool.read_snapshot(id, 0, &mut bytes).unwrap();
            assert!(
                bytes == *then,
                "{what}: snapshot {name} of volume {i} has changed"
            );
        }
    }
    pool.shutdown().unwrap();
    drop(pool);
    assert_clean(dir.path());
}
