//! Compaction of the metadata while volumes are written, cut and freed, on the real store; a copy of the files at every
//! named point is what a process that dies there leaves.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use stillpoint_snapshot::{Error, Hooks, Point, Pool, PoolOptions, SnapshotSpec, Volume, VolumeSpec, check};

const GRAIN: u64 = 4096;
const GRAINS: u64 = 64 * 40;

/// At each point of a compaction: some more work, and a copy of the files as a kill would leave them.
#[derive(Default)]
struct Meanwhile {
    pool: OnceLock<Pool>,
    dir: PathBuf,
    seen: Mutex<Vec<(Point, u64, PathBuf)>>,
}

fn content(n: u64) -> Vec<u8> {
    vec![(n % 251) as u8 + 1; GRAIN as usize]
}

fn work(pool: &Pool, n: u64) {
    let v = pool.volume("v").unwrap();
    for i in 0..7 {
        v.write((n * 31 + i * 97) % GRAINS * GRAIN, &content(n), false)
            .unwrap();
    }
    v.write(GRAINS * GRAIN, &n.to_be_bytes(), false).unwrap();
    let spec = SnapshotSpec {
        name: format!("s{n}"),
        ..SnapshotSpec::default()
    };
    let id = pool
        .begin_cut(&[v.id()], &spec)
        .unwrap()
        .commit()
        .unwrap()
        .first()
        .unwrap()
        .id;
    if n.is_multiple_of(2) {
        pool.delete_snapshot(id).unwrap();
    }
    pool.run_jobs(2).unwrap();
    pool.step().unwrap();
}

impl Hooks for Meanwhile {
    fn at(&self, point: Point) {
        let Some(pool) = self.pool.get().filter(|_| point.starts_with("compact.")) else {
            return;
        };
        let n = self.seen.lock().unwrap().len() as u64 + 1000;
        work(pool, n);
        let to = self.dir.join(format!("copy{n}"));
        let copied = std::process::Command::new("cp")
            .args([Path::new("-r"), &self.dir.join("pool"), &to])
            .status();
        assert!(copied.unwrap().success());
        self.seen.lock().unwrap().push((point, n, to));
    }
}

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        checkpoint_txgs: 3,
        ..PoolOptions::default()
    }
}

fn last_written(v: &Volume) -> u64 {
    let mut buffer = [0; 8];
    v.read(GRAINS * GRAIN, &mut buffer).unwrap();
    u64::from_be_bytes(buffer)
}

fn everything(pool: &Pool) -> Vec<Vec<u8>> {
    let v = pool.volume("v").unwrap();
    let read = |at: u64| {
        let mut buffer = vec![0; GRAIN as usize];
        v.read(at * GRAIN, &mut buffer).unwrap();
        buffer
    };
    let mut all: Vec<_> = (0..=GRAINS).map(read).collect();
    for snapshot in pool.snapshots(None) {
        for at in (0..GRAINS).step_by(5) {
            let mut buffer = vec![0; GRAIN as usize];
            pool.read_snapshot(snapshot.id, at * GRAIN, &mut buffer).unwrap();
            all.push(buffer);
        }
    }
    all
}

#[test]
fn a_compaction_beside_work_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let meanwhile = Arc::new(Meanwhile {
        dir: dir.path().to_owned(),
        ..Meanwhile::default()
    });
    let hooked = PoolOptions {
        hooks: Some(meanwhile.clone()),
        ..options()
    };
    let pool = Pool::create(&dir.path().join("pool"), &hooked).unwrap();
    let spec = VolumeSpec {
        name: "v".into(),
        size_bytes: (GRAINS + 1) * GRAIN,
        block_size: 512,
        attributes: Vec::new(),
    };
    let v = pool.create_volume(&spec).unwrap();
    for round in 0..12 {
        (0..GRAINS).for_each(|at| {
            v.write((at * 37 % GRAINS) * GRAIN, &content(at + round), false)
                .unwrap()
        });
        work(&pool, round);
        pool.checkpoint_now().unwrap();
    }
    drop(meanwhile.pool.set(pool.clone()));
    let mut told = Vec::new();
    let report = pool.compact(|what, bytes| told.push((what, bytes))).unwrap();
    println!("{report:?}");
    assert!(report.after_bytes < report.before_bytes, "{report:?}");
    assert!(
        report.live_bytes > 0 && told.contains(&("copied", report.live_bytes)),
        "{told:?}"
    );
    let left = dir.path().join("pool/meta.compact");
    assert!(!left.exists(), "the old store stays behind");

    // It goes on in the new store, and is whole after a restart.
    work(&pool, 5000);
    let before = everything(&pool);
    assert_eq!(last_written(&v), 5000);
    pool.shutdown().unwrap();
    let seen = std::mem::take(&mut *meanwhile.seen.lock().unwrap());
    drop((pool, v));
    let report = check(&dir.path().join("pool")).unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    let again = Pool::open(&dir.path().join("pool"), &options()).unwrap();
    assert_eq!(everything(&again), before);
    again.shutdown().unwrap();

    // Every copy opens with what had been made durable there.
    let points: Vec<Point> = seen.iter().map(|(point, ..)| *point).collect();
    for point in ["compact.begun", "compact.step", "compact.copied", "compact.done"] {
        assert!(points.contains(&point), "{point} of {points:?}");
    }
    for (point, n, copy) in seen.iter().rev().step_by(seen.len() / 8 + 1).chain(seen.first()) {
        let report = check(copy).unwrap();
        assert!(report.is_clean(), "{point} {n}: {:?}", report.problems);
        let pool = Pool::open(copy, &options()).unwrap();
        assert_eq!(last_written(&pool.volume("v").unwrap()), *n, "{point}");
        assert!(
            !copy.join("meta.compact").exists(),
            "{point}: the rest is removed"
        );
        pool.shutdown().unwrap();
    }
}

#[test]
fn a_compaction_that_cannot_be_changes_nothing() {
    let world = stillpoint_snapshot::sim::World::new();
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options()).unwrap();
    let refused = pool.compact(|_, _| {});
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    assert!(pool.poisoned().is_none());
    pool.shutdown().unwrap();

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    let pool = Pool::create(&path, &options()).unwrap();
    // Somebody put a file where the copy would be.
    std::fs::write(path.join("meta.compact"), b"x").unwrap();
    assert!(pool.compact(|_, _| {}).is_err());
    assert!(pool.poisoned().is_none());
    pool.commit_now().unwrap();
    std::fs::remove_file(path.join("meta.compact")).unwrap();
    pool.compact(|_, _| {}).unwrap();
    pool.shutdown().unwrap();
}
