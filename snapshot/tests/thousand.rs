//! A thousand snapshots of one volume, one overwritten grain between each and the next, deleted in random order while the
//! background works: what the store says that deletions free is exact at every moment, and what they free is that.
//! `STILLPOINT_SOAK_SNAPSHOTS` changes their number, `STILLPOINT_SEED` repeats a run.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillpoint_snapshot::sim::{Rng, World};
use stillpoint_snapshot::{
    CheckReport, Pool, PoolOptions, SnapshotId, SnapshotSpec, Volume, VolumeSpec, check_media,
};

const GRAIN: u64 = 4096;
const GRAINS: u64 = 5 * 64;
const SNAPSHOTS: u64 = 1000;
/// Far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(300);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is not a number"))
    })
}

/// For each grain of the volume the number of the write that it shows.
type Content = Vec<u64>;

struct Thousand {
    world: World,
    pool: Pool,
    volume: Volume,
    rng: Rng,
    head: Content,
    writes: u64,
    snapshots: BTreeMap<SnapshotId, Content>,
}

impl Thousand {
    fn new(seed: u64) -> Self {
        let world = World::new();
        let options = PoolOptions {
            ballast_bytes: 0,
            min_free_bytes: 0,
            commit_ms: 2,
            checkpoint_txgs: 5,
            job_pages: 2,
            seal_after_ms: 0,
            seal_rate: 1 << 30,
            ..PoolOptions::default()
        };
        let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options).unwrap();
        let spec = VolumeSpec {
            name: "a".into(),
            size_bytes: GRAINS * GRAIN,
            block_size: 512,
            attributes: Vec::new(),
        };
        let volume = pool.create_volume(&spec).unwrap();
        let mut new = Self {
            world,
            pool,
            volume,
            rng: Rng::new(seed),
            head: vec![0; usize::try_from(GRAINS).unwrap()],
            writes: 0,
            snapshots: BTreeMap::new(),
        };
        (0..GRAINS).for_each(|grain| new.write(grain));
        new
    }

    fn write(&mut self, grain: u64) {
        self.writes += 1;
        let data = self.writes.to_be_bytes().repeat(512);
        self.volume.write(grain * GRAIN, &data, false).unwrap();
        self.head[usize::try_from(grain).unwrap()] = self.writes;
    }

    fn cut(&mut self) {
        let spec = SnapshotSpec {
            name: format!("s{}", self.writes),
            ..SnapshotSpec::default()
        };
        let cut = self.pool.begin_cut(&[self.volume.id()], &spec).unwrap();
        let id = cut.commit().unwrap()[0].id;
        self.snapshots.insert(id, self.head.clone());
    }

    /// Bytes that only these snapshots show.
    fn held(&self, ids: &[SnapshotId]) -> u64 {
        let others = self.snapshots.iter().filter(|(id, _)| !ids.contains(id));
        let kept: BTreeSet<(usize, u64)> = others
            .map(|(_, content)| content)
            .chain([&self.head])
            .flat_map(|content| content.iter().copied().enumerate())
            .collect();
        let theirs = ids
            .iter()
            .flat_map(|id| self.snapshots[id].iter().copied().enumerate());
        let gone: BTreeSet<(usize, u64)> = theirs.filter(|place| !kept.contains(place)).collect();
        gone.len() as u64 * GRAIN
    }

    fn some(&mut self, at_most: u64) -> Vec<SnapshotId> {
        let all: Vec<SnapshotId> = self.snapshots.keys().copied().collect();
        let count = (1 + self.rng.below(at_most)).min(all.len() as u64);
        let picked: BTreeSet<SnapshotId> = (0..count).filter_map(|_| self.rng.pick(&all).copied()).collect();
        picked.into_iter().collect()
    }

    fn plan(&self, ids: &[SnapshotId]) -> u64 {
        self.pool.plan_delete(ids).unwrap().freed_bytes
    }

    /// Bytes that the volume and its snapshots show.
    fn shown(&self) -> u64 {
        let all = self.snapshots.values().chain([&self.head]);
        let places: BTreeSet<(usize, u64)> = all.flat_map(|c| c.iter().copied().enumerate()).collect();
        places.len() as u64 * GRAIN
    }

    /// Waits until what is in use is exactly what is shown.
    fn settle(&self) {
        let begun = Instant::now();
        loop {
            let stats = self.pool.stats();
            if stats.jobs == 0 && stats.allocated_bytes == self.shown() {
                return;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{} are shown: {stats:?}",
                self.shown()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn check(&self) -> CheckReport {
        self.pool.commit_now().unwrap();
        check_media(&self.world.disk(), &mut self.world.meta()).unwrap()
    }
}

#[test]
fn a_thousand_snapshots_deleted_in_random_order_free_what_was_said() {
    let seed = number("STILLPOINT_SEED", 1);
    let mut all = Thousand::new(seed);
    for n in 0..number("STILLPOINT_SOAK_SNAPSHOTS", SNAPSHOTS) {
        all.cut();
        // Most pages have many versions, one has none.
        let grain = all.rng.below(GRAINS - 64);
        all.write(grain);
        if n % 100 == 99 {
            let ids: Vec<SnapshotId> = all.snapshots.keys().copied().collect();
            assert_eq!(
                all.plan(&ids),
                all.held(&ids),
                "seed {seed}: all of {}",
                ids.len()
            );
        }
    }
    let made = all.snapshots.len();
    let mut rounds = 0;
    while !all.snapshots.is_empty() {
        rounds += 1;
        let set = all.some(60);
        let (said, held) = (all.plan(&set), all.held(&set));
        assert_eq!(
            said,
            held,
            "seed {seed}: {} of {}",
            set.len(),
            all.snapshots.len()
        );
        let idle = rounds % 4 == 0;
        if idle {
            all.settle();
        }
        let before = all.pool.stats().allocated_bytes;
        all.pool.delete_snapshots(&set).unwrap();
        all.snapshots.retain(|id, _| !set.contains(id));
        if idle {
            all.settle();
            let freed = before - all.pool.stats().allocated_bytes;
            assert_eq!(freed, said, "seed {seed}: {} left", all.snapshots.len());
        } else {
            // Jobs that run and wait change nothing of it.
            let left: Vec<SnapshotId> = all.snapshots.keys().copied().collect();
            assert_eq!(
                all.plan(&left),
                all.held(&left),
                "seed {seed}: {} left",
                left.len()
            );
        }
    }
    all.settle();
    assert_eq!(all.pool.stats().allocated_bytes, GRAINS * GRAIN, "of {made}");
    let report = all.check();
    assert!(report.is_clean(), "{report}");
}
