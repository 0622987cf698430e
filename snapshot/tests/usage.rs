//! What the store says that deleting snapshots would free, against really deleting them: random histories of writes,
//! cuts, clones, reverts and deletions, random sets of snapshots. `STILLPOINT_SOAK_SEEDS` raises the number of seeds.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::sync::Arc;
use std::time::Duration;

use stillpoint_snapshot::sim::{Rng, World};
use stillpoint_snapshot::{CloneSpec, Pool, PoolOptions, SnapshotId, SnapshotSpec, Volume, VolumeSpec};

const GRAIN: u64 = 4096;
const GRAINS: u64 = 4 * 64;
const SEEDS: u64 = 60;

struct History {
    pool: Pool,
    rng: Rng,
    names: u64,
}

impl History {
    fn new(seed: u64) -> Self {
        let world = World::new();
        let options = PoolOptions {
            manual: true,
            min_free_bytes: 0,
            job_pages: 3,
            ..PoolOptions::default()
        };
        let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options).unwrap();
        let mut history = Self {
            pool,
            rng: Rng::new(seed),
            names: 0,
        };
        let name = history.name();
        let spec = VolumeSpec {
            name,
            size_bytes: GRAINS * GRAIN,
            block_size: 4096,
            attributes: Vec::new(),
        };
        history.pool.create_volume(&spec).unwrap();
        history
    }

    fn name(&mut self) -> String {
        self.names += 1;
        format!("n{}", self.names)
    }

    fn volume(&mut self) -> Volume {
        let all = self.pool.volumes();
        let at = self.rng.index(all.len());
        self.pool.volume_by_id(all.get(at).unwrap().id).unwrap()
    }

    fn snapshots(&self) -> Vec<SnapshotId> {
        self.pool.snapshots(None).iter().map(|s| s.id).collect()
    }

    fn some_snapshot(&mut self) -> Option<SnapshotId> {
        let all = self.snapshots();
        self.rng.pick(&all).copied()
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..50 => {
                let volume = self.volume();
                let first = self.rng.below(GRAINS);
                let count = (1 + self.rng.below(40)).min(GRAINS - first);
                let data = vec![self.rng.bits() as u8 | 1; (count * GRAIN) as usize];
                volume.write(first * GRAIN, &data, false).unwrap();
            }
            50..57 => {
                let volume = self.volume();
                let first = self.rng.below(GRAINS);
                let count = (1 + self.rng.below(100)).min(GRAINS - first);
                volume
                    .write_zeroes(first * GRAIN, count * GRAIN, self.rng.chance(50))
                    .unwrap();
            }
            57..76 => {
                let (volume, name) = (self.volume(), self.name());
                let spec = SnapshotSpec {
                    name,
                    ..SnapshotSpec::default()
                };
                self.pool
                    .begin_cut(&[volume.id()], &spec)
                    .unwrap()
                    .commit()
                    .unwrap();
            }
            76..81 => {
                let Some(id) = self.some_snapshot().filter(|_| self.pool.volumes().len() < 5) else {
                    return;
                };
                let spec = CloneSpec {
                    name: self.name(),
                    read_only: false,
                    attributes: Vec::new(),
                };
                drop(self.pool.clone_snapshot(id, &spec));
            }
            81..86 => {
                let Some(id) = self.some_snapshot() else { return };
                let volume = self.pool.snapshot_by_id(id).unwrap().volume;
                drop(self.pool.revert(volume, id));
            }
            86..92 => {
                if let Some(id) = self.some_snapshot() {
                    self.pool.delete_snapshot(id).unwrap();
                }
            }
            92..94 => {
                let volume = self.volume();
                if self.pool.volumes().len() > 1 {
                    self.pool.delete_volume(&volume.name().unwrap(), true).unwrap();
                }
            }
            94..97 => drop(self.pool.run_jobs(1 + self.rng.index(4)).unwrap()),
            _ => self.pool.checkpoint_now().unwrap(),
        }
    }

    /// Bytes in use when nothing is left to do.
    fn settled(&self) -> u64 {
        while self.pool.run_jobs(100).unwrap() > 0 {}
        self.pool.step().unwrap();
        self.pool.stats().allocated_bytes
    }

    fn judge(&mut self) {
        let all = self.snapshots();
        let share = 1 + self.rng.below(100);
        let set: Vec<SnapshotId> = all.iter().filter(|_| self.rng.chance(share)).copied().collect();
        let unique = |pool: &Pool| pool.unique_bytes(&all, Duration::MAX).unwrap();
        let before = (self.pool.plan_delete(&set).unwrap(), unique(&self.pool));
        let used = self.settled();
        let plan = self.pool.plan_delete(&set).unwrap();
        let alone = unique(&self.pool);
        assert_eq!(
            before,
            (plan.clone(), alone.clone()),
            "jobs that wait change nothing"
        );
        assert_eq!(alone, unique(&self.pool), "what is known by now is the same");
        for (id, bytes) in all.iter().zip(&alone) {
            assert_eq!(
                Some(self.pool.plan_delete(&[*id]).unwrap().freed_bytes),
                *bytes,
                "{id}"
            );
        }
        self.pool.delete_snapshots(&set).unwrap();
        let left = self.settled();
        assert_eq!(
            used - left,
            plan.freed_bytes,
            "deleting {set:?} of {all:?} freed another number of bytes than was said"
        );
        for id in &set {
            let hidden = self.pool.snapshot_by_id(*id).is_some();
            assert_eq!(hidden, plan.kept.contains(id), "{id}: kept by a clone");
        }
    }
}

#[test]
fn a_plan_says_what_deleting_frees() {
    let seeds = std::env::var("STILLPOINT_SOAK_SEEDS").map_or(SEEDS, |n| n.parse().unwrap());
    let one = std::env::var("STILLPOINT_SEED").ok().map(|n| n.parse().unwrap());
    for seed in one.map_or(0..seeds, |n| n..n + 1) {
        println!("seed {seed}");
        let mut history = History::new(seed);
        for _ in 0..4 {
            (0..40).for_each(|_| history.step());
            history.judge();
        }
    }
}

#[test]
fn a_set_frees_more_than_its_parts() {
    let mut history = History::new(0);
    let volume = history.volume();
    let write = |at: u64| volume.write(at * GRAIN, &[7; GRAIN as usize], false).unwrap();
    let mut cut = || {
        let name = history.name();
        let spec = SnapshotSpec {
            name,
            ..SnapshotSpec::default()
        };
        let cut = history.pool.begin_cut(&[volume.id()], &spec).unwrap();
        cut.commit().unwrap().first().unwrap().id
    };
    (0..10).for_each(write);
    let (a, b) = (cut(), cut());
    (0..10).for_each(write);
    let c = cut();
    write(3);
    let pool = &history.pool;
    let unique = pool.unique_bytes(&[a, b, c], Duration::MAX).unwrap();
    assert_eq!(unique, [Some(0), Some(0), Some(GRAIN)]);
    let freed = |ids: &[SnapshotId]| pool.plan_delete(ids).unwrap().freed_bytes / GRAIN;
    assert_eq!((freed(&[a, b]), freed(&[b, c]), freed(&[a, b, c])), (10, 1, 11));
    assert_eq!(freed(&[]), 0);
    assert!(
        pool.delete_snapshots(&[
            a,
            SnapshotId {
                branch: a.branch,
                ..b
            },
            a
        ])
        .is_ok()
    );
    assert!(pool.plan_delete(&[a]).is_err(), "it is deleted");
    assert_eq!(
        pool.unique_bytes(&[c], Duration::ZERO).unwrap(),
        [None],
        "no time to count"
    );
}
