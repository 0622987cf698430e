//! Repair: bitmaps and lists come back from the map; of a damaged page every byte is what it was or an error, never
//! something else; what cannot be repaired is refused with the way out.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::collections::BTreeMap;
use std::sync::Arc;

use stillpoint_snapshot::meta::{Batch, MetaStore};
use stillpoint_snapshot::sim::{Loss, Rng, World};
use stillpoint_snapshot::{
    CheckReport, Checksums, CloneSpec, CopySource, Error, Pool, PoolOptions, ProblemKind, RepairOptions,
    RepairPlan, SnapshotSpec, Volume, VolumeSpec, check_media, repair_media,
};

const GRAIN: usize = 4096;
const GRAINS: u64 = 3 * 64 + 7;

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        cache_bytes: 16 << 10,
        checkpoint_txgs: 2,
        job_pages: 1,
        tombstone_bytes: 64 * GRAIN as u64,
        loan_bytes: 64 * GRAIN as u64,
        ..PoolOptions::default()
    }
}

fn open(world: &World) -> Pool {
    Pool::open_with(Arc::new(world.disk()), Box::new(world.meta()), &options()).unwrap()
}

fn still(world: &World) -> World {
    world.after_cut(Loss::Nothing, &mut Rng::new(0))
}

fn check(world: &World) -> CheckReport {
    let still = still(world);
    check_media(&still.disk(), &mut still.meta()).unwrap()
}

fn fill(volume: &Volume, rng: &mut Rng) {
    let at = rng.below(GRAINS - 1);
    let n = (1 + rng.below(30)).min(GRAINS - at);
    let tag = rng.bits();
    let grain = |g: u64| (0..GRAIN as u64 / 8).flat_map(move |_| (tag ^ g).to_be_bytes());
    let data: Vec<u8> = (at..at + n).flat_map(grain).collect();
    volume.write(at * GRAIN as u64, &data, false).unwrap();
}

/// Zeroes more than a page: a tombstone.
fn bury(volume: &Volume, rng: &mut Rng) {
    let first = rng.below(GRAINS - 140);
    let count = 130 + rng.below(GRAINS - 130 - first);
    let (at, len) = (first * GRAIN as u64, count * GRAIN as u64);
    match rng.chance(50) {
        true => volume.unmap(&[(at, len)]).unwrap(),
        false => volume.write_zeroes(at, len, false).unwrap(),
    }
}

/// A pool with history: snapshots, a clone with its own pages, holes.
fn lived_in(seed: u64) -> World {
    history(seed, false)
}

/// The same with tombstones and copies by reference; some of their jobs are not done.
fn lived_in_with_jobs(seed: u64) -> World {
    history(seed, true)
}

fn history(seed: u64, jobs: bool) -> World {
    let (world, mut rng) = (World::new(), Rng::new(seed));
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options()).unwrap();
    for name in ["a", "b"] {
        let spec = VolumeSpec {
            name: name.into(),
            size_bytes: GRAINS * GRAIN as u64,
            block_size: 512,
            attributes: Vec::new(),
        };
        pool.create_volume(&spec).unwrap();
    }
    pool.volume("b")
        .unwrap()
        .set_checksums(Checksums::Always)
        .unwrap();
    for round in 0..6 {
        for info in pool.volumes() {
            let v = pool.volume(&info.name).unwrap();
            (0..4).for_each(|_| fill(&v, &mut rng));
            v.unmap(&[(rng.below(GRAINS) * GRAIN as u64, GRAIN as u64)])
                .unwrap();
            if jobs && rng.chance(40) {
                bury(&v, &mut rng);
                if rng.chance(50) {
                    fill(&v, &mut rng);
                }
            }
            if jobs && rng.chance(30) {
                let other = pool.volume("b").unwrap();
                let (from, to) = (rng.below(100), rng.below(100));
                let [from, to] = [from, to].map(|g| g * GRAIN as u64);
                v.copy(to, &CopySource::Volume(&other), from, 90 * GRAIN as u64)
                    .unwrap();
            }
            let spec = SnapshotSpec {
                name: format!("s{round}"),
                ..SnapshotSpec::default()
            };
            let made = pool.begin_cut(&[v.id()], &spec).unwrap().commit().unwrap();
            if round == 2 && info.name == "a" {
                let spec = CloneSpec {
                    name: "c".into(),
                    read_only: false,
                    attributes: Vec::new(),
                };
                pool.clone_snapshot(made[0].id, &spec).unwrap();
            }
        }
        if rng.chance(50) {
            pool.run_sealing(20).unwrap();
        }
        pool.step().unwrap();
        if jobs && rng.chance(50) {
            pool.run_jobs(1 + rng.index(4)).unwrap();
        }
    }
    let snapshots = pool.snapshots(None);
    pool.delete_snapshot(rng.pick(&snapshots).unwrap().id).unwrap();
    pool.volumes()
        .iter()
        .for_each(|v| fill(&pool.volume(&v.name).unwrap(), &mut rng));
    if jobs {
        pool.run_jobs(rng.index(6)).unwrap();
    } else {
        while pool.run_jobs(10).unwrap() > 0 {}
    }
    pool.shutdown().unwrap();
    still(&world)
}

/// Reads from a byte on.
type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<(), Error>;

/// Every grain of everything: its bytes, or that it cannot be had.
type Seen = BTreeMap<(String, String), Vec<Option<Vec<u8>>>>;

fn see(pool: &Pool) -> Seen {
    let mut seen = Seen::new();
    let mut add = |name: (String, String), read: Read<'_>| {
        let grain = |g: u64| {
            let mut bytes = vec![0; GRAIN];
            match read(g * GRAIN as u64, &mut bytes) {
                Ok(()) => Some(bytes),
                Err(Error::Medium { .. }) => None,
                Err(other) => panic!("{other}"),
            }
        };
        seen.insert(name, (0..GRAINS).map(grain).collect());
    };
    for info in pool.volumes() {
        let v = pool.volume(&info.name).unwrap();
        add((info.name, String::new()), &|at, buf| v.read(at, buf));
    }
    for info in pool.snapshots(None) {
        add((info.volume_name, info.name), &|at, buf| {
            pool.read_snapshot(info.id, at, buf)
        });
    }
    seen
}

fn apply(world: &World, changes: Vec<(Vec<u8>, Option<Vec<u8>>)>) {
    let mut meta = world.meta();
    meta.apply(&Batch { changes }).unwrap();
    meta.flush().unwrap();
    meta.barrier().sync().unwrap();
}

fn all_of(world: &World, table: u8) -> Vec<(Vec<u8>, Vec<u8>)> {
    world.meta().scan(&[table], &[table + 1], usize::MAX).unwrap()
}

/// Repairs: the data stays where it is, the metadata is new.
fn repaired(world: &World, options: RepairOptions) -> Result<(RepairPlan, Pool, World), Error> {
    let new = still(world);
    let keys: Vec<_> = (0..=255u8)
        .filter(|t| *t < 255)
        .flat_map(|t| all_of(&new, t))
        .map(|(key, _)| (key, None))
        .collect();
    apply(&new, keys);
    let plan = repair_media(&world.disk(), &mut world.meta(), &mut new.meta(), options)?;
    new.meta().flush().unwrap();
    new.meta().barrier().sync().unwrap();
    let pool = open(&new);
    Ok((plan, pool, new))
}

#[test]
fn bitmaps_counts_and_lists_come_back_from_the_map() {
    bitmaps_come_back(lived_in(1));
}

#[test]
fn bitmaps_come_back_below_tombstones_and_copies() {
    let mut unfinished = 0;
    for seed in 0..8 {
        let world = lived_in_with_jobs(seed);
        unfinished += usize::from(!all_of(&world, b'D').is_empty());
        bitmaps_come_back(world);
    }
    assert!(unfinished > 3, "{unfinished} of 8 had jobs");
}

fn bitmaps_come_back(world: World) {
    let before = see(&open(&still(&world)));
    let plan = repair_media(
        &world.disk(),
        &mut world.meta(),
        &mut World::new().meta(),
        RepairOptions::default(),
    )
    .unwrap();
    assert!(plan.is_empty(), "a sound pool needs nothing: {plan:?}");
    let gone = [b'A', b'a', b'E'].into_iter().flat_map(|t| all_of(&world, t));
    apply(&world, gone.map(|(key, _)| (key, None)).collect());
    assert!(!check(&world).is_clean());
    let (plan, pool, new) = repaired(&world, RepairOptions::default()).unwrap();
    assert!(plan.losses.is_empty() && !plan.fixes.is_empty(), "{plan:?}");
    assert!(check(&new).is_clean(), "{}", check(&new));
    assert_eq!(see(&pool), before);
    for info in pool.volumes() {
        pool.delete_volume(&info.name, true).unwrap();
    }
    while pool.run_jobs(10).unwrap() > 0 {}
    assert_eq!(pool.stats().allocated_bytes, 0);
}

#[test]
fn of_a_damaged_page_every_byte_is_what_it_was_or_an_error() {
    damaged_pages(16, lived_in);
}

#[test]
fn of_a_damaged_page_below_tombstones_and_copies_every_byte_is_what_it_was_or_an_error() {
    damaged_pages(12, lived_in_with_jobs);
}

fn damaged_pages(seeds: u64, make: fn(u64) -> World) {
    let (mut lost_something, mut lost_nothing) = (0, 0);
    for seed in 0..seeds {
        let world = make(seed);
        let before = see(&open(&still(&world)));
        let mut rng = Rng::new(seed ^ 0x77);
        for _ in 0..=rng.below(2) {
            let pages = all_of(&world, b'M');
            let (key, mut value) = rng.pick(&pages).unwrap().clone();
            let at = rng.index(value.len());
            value[at] ^= 1 << rng.below(8);
            apply(&world, vec![(key, Some(value))]);
        }
        let (plan, pool, new) = repaired(&world, RepairOptions::default()).unwrap();
        let after = see(&pool);
        assert_eq!(
            after.keys().collect::<Vec<_>>(),
            before.keys().collect::<Vec<_>>()
        );
        let mut lost = 0;
        for (name, grains) in &after {
            for (i, (now, then)) in grains.iter().zip(&before[name]).enumerate() {
                match now {
                    None => lost += 1,
                    Some(_) => assert!(now == then, "seed {seed}: {name:?} grain {i}: {plan:?}"),
                }
            }
        }
        if lost > 0 {
            lost_something += 1;
            assert!(!plan.losses.is_empty(), "seed {seed}: named");
            assert!(!pool.bad_data(None).unwrap().is_empty(), "seed {seed}: listed");
        } else {
            lost_nothing += 1;
        }
        let report = check(&new);
        let other: Vec<_> = report
            .problems
            .iter()
            .filter(|p| p.kind != ProblemKind::BadData)
            .collect();
        assert!(other.is_empty(), "seed {seed}: {other:?}");
        // Written anew, it is right again.
        for info in pool.volumes() {
            let v = pool.volume(&info.name).unwrap();
            v.write(0, &vec![7; (GRAINS as usize) * GRAIN], false).unwrap();
            let mut bytes = vec![0; (GRAINS as usize) * GRAIN];
            v.read(0, &mut bytes).unwrap();
            pool.delete_volume(&info.name, true).unwrap();
        }
        while pool.run_jobs(10).unwrap() > 0 {}
        assert_eq!(
            (pool.stats().allocated_bytes, pool.stats().bad_grains),
            (0, 0),
            "seed {seed}"
        );
    }
    assert!(lost_something > 3 && lost_something + lost_nothing == seeds);
}

/// One volume, every grain of it written.
fn full_volume() -> (World, Pool, Volume) {
    let world = World::new();
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options()).unwrap();
    let spec = VolumeSpec {
        name: "a".into(),
        size_bytes: GRAINS * GRAIN as u64,
        block_size: 512,
        attributes: Vec::new(),
    };
    let a = pool.create_volume(&spec).unwrap();
    a.write(0, &vec![7; GRAINS as usize * GRAIN], false).unwrap();
    (world, pool, a)
}

/// What a tombstone made of a page is no witness of what the page was before.
#[test]
fn a_damaged_page_below_a_tombstone_is_not_taken_for_zeroes() {
    let (world, pool, a) = full_volume();
    let spec = SnapshotSpec {
        name: "s".into(),
        ..SnapshotSpec::default()
    };
    pool.begin_cut(&[a.id()], &spec).unwrap().commit().unwrap();
    a.write_zeroes(0, GRAINS * GRAIN as u64, false).unwrap();
    while pool.run_jobs(10).unwrap() > 0 {}
    pool.shutdown().unwrap();
    let world = still(&world);
    // Page 1, the older of its two versions: epochs are stored so that the younger comes first.
    let pages = all_of(&world, b'M');
    let page = |key: &[u8]| key[5..9] == [0, 0, 0, 1];
    let (key, mut value) = pages.into_iter().rfind(|(key, _)| page(key)).unwrap();
    value[3] ^= 1;
    apply(&world, vec![(key, Some(value))]);
    let (plan, pool, _) = repaired(&world, RepairOptions::default()).unwrap();
    assert!(!plan.losses.is_empty(), "{plan:?}");
    let id = pool.snapshot("a", "s").unwrap().id;
    let mut bytes = vec![1; GRAIN];
    let read = pool.read_snapshot(id, 70 * GRAIN as u64, &mut bytes);
    assert!(
        matches!(read, Err(Error::Medium { .. })),
        "{read:?}, {}",
        bytes[0]
    );
    pool.read_snapshot(id, 140 * GRAIN as u64, &mut bytes).unwrap();
    assert!(bytes == [7; GRAIN]);
    pool.volume("a")
        .unwrap()
        .read(70 * GRAIN as u64, &mut bytes)
        .unwrap();
    assert!(
        bytes == [0; GRAIN],
        "the volume as it is now is not touched by it"
    );
}

/// A tombstone is nothing but its job: without it, what it zeroed is back.
#[test]
fn a_job_whose_record_is_damaged_needs_its_own_yes() {
    let (world, pool, a) = full_volume();
    a.unmap(&[(0, GRAINS * GRAIN as u64)]).unwrap();
    pool.shutdown().unwrap();
    let world = still(&world);
    let (key, mut value) = all_of(&world, b'D').pop().unwrap();
    value[5] ^= 1;
    apply(&world, vec![(key, Some(value))]);
    let plan = repaired_plan(&world);
    assert_eq!((plan.lost_jobs.len(), plan.losses.len()), (1, 1), "{plan:?}");
    match repaired(&world, RepairOptions::default()) {
        Err(Error::Refused { reason }) => assert!(reason.contains("--accept-lost-jobs"), "{reason}"),
        other => panic!("{:?}", other.map(|(plan, ..)| plan)),
    }
    let accept = RepairOptions {
        accept_lost_jobs: true,
        ..RepairOptions::default()
    };
    let (plan, pool, new) = repaired(&world, accept).unwrap();
    assert!(plan.losses[0].contains("shows again"), "{plan:?}");
    assert!(check(&new).is_clean(), "{}", check(&new));
    let mut bytes = vec![0; GRAIN];
    pool.volume("a")
        .unwrap()
        .read(64 * GRAIN as u64, &mut bytes)
        .unwrap();
    assert!(bytes == [7; GRAIN], "what was said");
}

#[test]
fn what_cannot_be_repaired_is_refused() {
    for table in [b'S', b'V', b'J'] {
        let world = lived_in(3);
        if table == b'J' {
            let pool = open(&world);
            fill(&pool.volume("a").unwrap(), &mut Rng::new(1));
            pool.commit_now().unwrap();
        }
        let (key, mut value) = all_of(&world, table).pop().unwrap();
        value[5] ^= 1;
        apply(&world, vec![(key, Some(value))]);
        match repaired(&world, RepairOptions::default()) {
            Err(Error::Refused { reason }) => assert!(reason.contains("restore a dump"), "{reason}"),
            other => panic!("{:?}", other.map(|(plan, ..)| plan)),
        }
    }
}

#[test]
fn lost_commits_need_their_own_yes() {
    let world = lived_in(5);
    let old = still(&world);
    let pool = open(&world);
    let v = pool.volume("a").unwrap();
    for seed in 0..6 {
        fill(&v, &mut Rng::new(seed));
        pool.commit_now().unwrap();
        v.flush().unwrap();
    }
    // The metadata of before with the data file of now.
    let mixed = still(&world);
    let keys = (0..255u8)
        .flat_map(|t| all_of(&mixed, t))
        .map(|(key, _)| (key, None));
    apply(&mixed, keys.collect());
    let values = (0..255u8)
        .flat_map(|t| all_of(&old, t))
        .map(|(key, v)| (key, Some(v)));
    apply(&mixed, values.collect());
    let plan = repaired_plan(&mixed);
    assert!(plan.lost_commits.unwrap() >= 2, "{plan:?}");
    let accept = RepairOptions {
        accept_lost_commits: true,
        ..RepairOptions::default()
    };
    let refused = repair_media(
        &mixed.disk(),
        &mut mixed.meta(),
        &mut World::new().meta(),
        RepairOptions::default(),
    );
    assert!(matches!(refused, Err(Error::Refused { .. })));
    let (_, pool, new) = repaired(&mixed, accept).unwrap();
    assert_eq!(pool.volumes().len(), 3);
    assert!(
        !check(&new)
            .problems
            .iter()
            .any(|p| p.kind == ProblemKind::LostCommits)
    );
}

fn repaired_plan(world: &World) -> RepairPlan {
    let plan = RepairOptions {
        plan: true,
        ..RepairOptions::default()
    };
    repair_media(&world.disk(), &mut world.meta(), &mut World::new().meta(), plan).unwrap()
}
