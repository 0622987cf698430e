//! The scrub: finds what is wrong, cries over nothing that only changes meanwhile, and goes on where it was.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::sync::Arc;

use stillpoint_snapshot::disk::Disk;
use stillpoint_snapshot::meta::{Batch, MetaStore};
use stillpoint_snapshot::record::{self, key};
use stillpoint_snapshot::sim::{Loss, Rng, World};
use stillpoint_snapshot::{
    Checksums, CloneSpec, Pool, PoolOptions, ProblemKind, ScrubPhase, ScrubStatus, SnapshotInfo,
    SnapshotSpec, Volume, VolumeSpec,
};

const GRAIN: u64 = 4096;
/// Grains of a volume: 40 pages, so that a pass takes several steps.
const GRAINS: u64 = 40 * 64;

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        cache_bytes: 32 << 10,
        checkpoint_txgs: 3,
        job_pages: 3,
        ..PoolOptions::default()
    }
}

fn create(world: &World) -> Pool {
    Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options()).unwrap()
}

fn open(world: &World) -> Pool {
    Pool::open_with(Arc::new(world.disk()), Box::new(world.meta()), &options()).unwrap()
}

fn volume(pool: &Pool, name: &str, mode: Checksums) -> Volume {
    let spec = VolumeSpec {
        name: name.into(),
        size_bytes: GRAINS * GRAIN,
        block_size: 512,
        attributes: Vec::new(),
    };
    let volume = pool.create_volume(&spec).unwrap();
    volume.set_checksums(mode).unwrap();
    volume
}

fn snapshot(pool: &Pool, volume: &Volume, name: &str) -> SnapshotInfo {
    let spec = SnapshotSpec {
        name: name.into(),
        ..SnapshotSpec::default()
    };
    let cut = pool.begin_cut(&[volume.id()], &spec).unwrap();
    cut.commit().unwrap().remove(0)
}

fn fill(volume: &Volume, grain: u64, grains: u64, byte: u8) {
    let data = vec![byte; (grains * GRAIN) as usize];
    volume.write(grain * GRAIN, &data, false).unwrap();
}

fn whole(pool: &Pool) -> ScrubStatus {
    pool.scrub_start(0, true).unwrap();
    while pool.run_scrub(64).unwrap() > 0 {}
    let status = pool.scrub_status().unwrap();
    assert!(!status.running && status.phase == ScrubPhase::Done && status.percent == 100);
    status
}

fn kinds(status: &ScrubStatus) -> Vec<ProblemKind> {
    status.problems.iter().map(|p| p.kind).collect()
}

/// Two volumes with history, and a clone.
fn lived_in(world: &World) -> Pool {
    let pool = create(world);
    let (a, b) = (
        volume(&pool, "a", Checksums::Sealed),
        volume(&pool, "b", Checksums::Always),
    );
    fill(&a, 0, 600, 1);
    fill(&b, 100, 300, 2);
    let one = snapshot(&pool, &a, "one");
    fill(&a, 50, 100, 3);
    snapshot(&pool, &b, "b-one");
    let spec = CloneSpec {
        name: "c".into(),
        read_only: false,
        attributes: Vec::new(),
    };
    let clone = pool.clone_snapshot(one.id, &spec).unwrap();
    fill(&clone, 500, 200, 4);
    snapshot(&pool, &a, "two");
    fill(&a, 0, 10, 5);
    while pool.run_sealing(8).unwrap() > 0 {}
    pool.commit_now().unwrap();
    pool
}

#[test]
fn a_sound_pool_is_clean_and_everything_is_looked_at() {
    let world = World::new();
    let pool = lived_in(&world);
    let status = whole(&pool);
    assert_eq!(status.problem_count, 0, "{status:?}");
    let used = pool.stats().allocated_bytes / GRAIN;
    assert_eq!(status.grains_placed, used);
    assert_eq!(status.grains_verified + status.grains_without, used);
    // What nothing holds yet: the last ten of "a", the clone's own.
    assert_eq!(status.grains_without, 10 + 200);
    assert!(status.records > 10 && status.page_versions > 20);
}

#[test]
fn bad_data_is_found_listed_and_forgotten_when_it_reads_right_again() {
    let world = World::new();
    let pool = lived_in(&world);
    let disk = world.disk();
    let (mut sector, mut rotten) = ([0; 8], None);
    for grain in 2.. {
        disk.read_at(grain * GRAIN, &mut sector).unwrap();
        if sector == [1; 8] {
            disk.write_at(grain * GRAIN + 5, &[9]).unwrap();
            rotten = Some(grain * GRAIN + 5);
            break;
        }
    }
    let status = whole(&pool);
    assert_eq!(kinds(&status), [ProblemKind::BadData]);
    assert_eq!(pool.stats().bad_grains, 1);
    let listed = pool.bad_data(None).unwrap();
    let names: Vec<_> = listed
        .iter()
        .map(|b| b.snapshot.as_ref().map(|(_, n)| n.as_str()))
        .collect();
    // Overwritten in the head of "a" since; its first snapshot and the clone show it.
    assert!(
        names.contains(&Some("one")) && listed.iter().any(|b| b.volume_name == "c"),
        "{listed:?}"
    );
    assert_eq!(kinds(&whole(&pool)), [ProblemKind::BadData], "still");
    disk.write_at(rotten.unwrap(), &[1]).unwrap();
    assert_eq!(whole(&pool).problem_count, 0);
    assert!(pool.bad_data(None).unwrap().is_empty() && pool.stats().bad_grains == 0);
}

/// Changes one bitmap, and its count.
fn edit(world: &World, change: impl FnOnce(&mut record::Bits) -> i16) {
    let mut meta = world.meta();
    let value = meta.get(&key::bitmap(0)).unwrap().unwrap();
    let mut bits = record::decode_bitmap(0, &value).unwrap();
    let by = change(&mut bits);
    let counts = meta.get(&key::counts(0)).unwrap().unwrap();
    let mut counts = record::decode_counts(0, &counts).unwrap();
    let free = i32::from(counts[0].free) - i32::from(by);
    counts[0].free = free.try_into().unwrap();
    let mut batch = Batch::default();
    batch.put(key::bitmap(0), record::encode_bitmap(0, &bits));
    batch.put(key::counts(0), record::encode_counts(0, &counts));
    meta.apply(&batch).unwrap();
    meta.flush().unwrap();
    meta.barrier().sync().unwrap();
}

#[test]
fn wrong_bitmaps_and_damaged_records_are_found() {
    let world = World::new();
    let pool = lived_in(&world);
    pool.shutdown().unwrap();
    // Within the file: data in use beyond its end would not open.
    world.disk().write_at(4095 * GRAIN, &[0; GRAIN as usize]).unwrap();
    edit(&world, |bits| {
        bits[63] |= 1 << 60;
        1
    });
    let pool = open(&world);
    assert_eq!(kinds(&whole(&pool)), [ProblemKind::Leaked]);
    pool.shutdown().unwrap();
    edit(&world, |bits| {
        bits[63] &= !(1 << 60);
        bits[1] &= !(1 << 7);
        -2
    });
    let pool = open(&world);
    let status = whole(&pool);
    assert_eq!(kinds(&status), [ProblemKind::NotAllocated], "{status:?}");
    pool.shutdown().unwrap();
    edit(&world, |bits| {
        bits[1] |= 1 << 7;
        1
    });
    // A page of a snapshot: everything else is still looked at.
    let page = world
        .meta()
        .scan(b"M", b"N", usize::MAX)
        .unwrap()
        .into_iter()
        .find(|(_, value)| value.len() > 100)
        .unwrap();
    let mut batch = Batch::default();
    let mut value = page.1.clone();
    value[50] ^= 4;
    batch.put(page.0, value);
    world.meta().apply(&batch).unwrap();
    let pool = open(&world);
    let status = whole(&pool);
    assert!(kinds(&status).contains(&ProblemKind::Damaged), "{status:?}");
    assert!(status.grains_verified > 100);
}

#[test]
fn it_goes_on_where_it_was_after_a_stop_and_after_a_restart() {
    let world = World::new();
    let pool = lived_in(&world);
    pool.scrub_start(0, false).unwrap();
    while pool.scrub_status().unwrap().phase != ScrubPhase::Data {
        assert_eq!(pool.run_scrub(1).unwrap(), 1);
    }
    assert_eq!(pool.run_scrub(1).unwrap(), 1);
    let before = pool.scrub_status().unwrap();
    assert!(before.running && before.grains_verified > 0);
    pool.scrub_stop().unwrap();
    assert_eq!(pool.run_scrub(1).unwrap(), 0, "stopped");
    pool.shutdown().unwrap();
    let pool = open(&world.after_cut(Loss::Nothing, &mut Rng::new(1)));
    let there = pool.scrub_status().unwrap();
    assert_eq!(
        (there.phase, there.grains_verified),
        (before.phase, before.grains_verified)
    );
    assert!(!there.running);
    pool.scrub_start(7, false).unwrap();
    let mut steps = 0;
    while pool.run_scrub(1).unwrap() > 0 {
        steps += 1;
    }
    let after = pool.scrub_status().unwrap();
    assert_eq!(
        (after.phase, after.rate, after.started_ms, after.problem_count),
        (ScrubPhase::Done, 7, before.started_ms, 0)
    );
    assert_eq!(
        after.grains_verified + after.grains_without,
        pool.stats().allocated_bytes / GRAIN,
        "every grain once, none twice"
    );
    assert!(steps < 8, "not from the beginning");
}

/// Steps of a scrub between the steps of everything else: nothing that only changes is taken for damage.
#[test]
fn what_changes_meanwhile_is_no_trouble() {
    let seeds = std::env::var("STILLPOINT_SOAK_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok());
    for seed in 0..seeds.unwrap_or(12) {
        let world = World::new();
        let pool = lived_in(&world);
        let mut rng = Rng::new(seed);
        let mut names = 0;
        pool.scrub_start(0, true).unwrap();
        let mut ended = 0;
        for _ in 0..220 {
            let volumes = pool.volumes();
            let v = pool.volume(&volumes[rng.index(volumes.len())].name).unwrap();
            let at = rng.below(800);
            match rng.below(12) {
                0..5 => fill(&v, at, 1 + rng.below(80), rng.bits() as u8),
                5 => v.unmap(&[(at * GRAIN, (1 + rng.below(100)) * GRAIN)]).unwrap(),
                6 if pool.snapshots(None).len() < 12 => {
                    names += 1;
                    drop(snapshot(&pool, &v, &format!("s{names}")));
                }
                7 => {
                    let all = pool.snapshots(None);
                    if let Some(s) = rng.pick(&all) {
                        pool.delete_snapshot(s.id).unwrap();
                    }
                }
                8 => {
                    let own = pool.snapshots(Some(v.id()));
                    if let Some(s) = rng.pick(&own) {
                        // Too deep a nesting is refused.
                        drop(pool.revert(v.id(), s.id));
                    }
                }
                9 => drop(pool.run_sealing(2).unwrap()),
                10 => drop(pool.run_jobs(3).unwrap()),
                _ => pool.step().unwrap(),
            }
            if pool.run_scrub(rng.index(3)).unwrap() == 0 && !pool.scrub_status().unwrap().running {
                ended += 1;
                let status = pool.scrub_status().unwrap();
                assert_eq!(status.problem_count, 0, "seed {seed}: {status:?}");
                pool.scrub_start(0, true).unwrap();
            }
        }
        while pool.run_scrub(64).unwrap() > 0 {}
        let status = pool.scrub_status().unwrap();
        assert_eq!(status.problem_count, 0, "seed {seed}: {status:?}");
        assert!(ended > 0, "seed {seed}: a scrub ends while others work");
        let report = stillpoint_snapshot::check_media(
            &world.after_cut(Loss::Nothing, &mut Rng::new(0)).disk(),
            &mut world.meta(),
        );
        assert!(report.unwrap().is_clean());
    }
}
