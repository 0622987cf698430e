//! Cuts under load: writers on several volumes, each a chain of writes that were acknowledged before the next was
//! issued. What a cut of all volumes holds must be a beginning of each chain: not shorter than what was acknowledged
//! before the cut began, not longer than what was issued before it returned. Meanwhile snapshots are cloned, reverted and
//! deleted.
//!
//! `STILLPOINT_SOAK_CUTS` raises the number of cuts; `STILLPOINT_SOAK_STALLS=1` runs the measurement of stalls.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use stillpoint_snapshot::sim::{Rng, World};
use stillpoint_snapshot::{CloneSpec, Pool, PoolOptions, SnapshotId, SnapshotSpec, Volume, VolumeSpec};

const GRAIN: u64 = 4096;
const VOLUMES: usize = 3;
const WRITERS: usize = 4;
/// Blocks of 512 bytes of one writer on each volume: several share a grain, and writers share grains too.
const BLOCKS: u64 = 96;
const CUTS: u64 = 60;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn volume(pool: &Pool, name: &str, size_bytes: u64) -> Volume {
    let spec = VolumeSpec {
        name: name.into(),
        size_bytes,
        block_size: 512,
        attributes: Vec::new(),
    };
    pool.create_volume(&spec).unwrap()
}

/// A writer's blocks lie between those of the others.
fn place(writer: usize, block: u64) -> u64 {
    (block * WRITERS as u64 + writer as u64) * 512
}

/// One writer's chain.
#[derive(Default)]
struct Chain {
    issued: AtomicU64,
    acknowledged: AtomicU64,
}

/// Which volume and block the `n`-th write of a writer goes to: the same for the judge.
fn target(writer: usize, n: u64) -> (usize, u64) {
    let mut rng = Rng::new(n * WRITERS as u64 + writer as u64);
    (rng.index(VOLUMES), rng.below(BLOCKS))
}

fn write_on(writer: usize, volumes: &[Volume], chain: &Chain, stop: &AtomicBool) {
    for n in 1.. {
        if stop.load(SeqCst) {
            return;
        }
        let (volume, block) = target(writer, n);
        let mut data = [0; 512];
        data.chunks_mut(8)
            .for_each(|c| c.copy_from_slice(&n.to_be_bytes()));
        chain.issued.store(n, SeqCst);
        volumes[volume]
            .write(place(writer, block), &data, n % 61 == 0)
            .unwrap();
        chain.acknowledged.store(n, SeqCst);
    }
}

fn found(pool: &Pool, id: SnapshotId, writer: usize, block: u64) -> u64 {
    let mut data = [0; 512];
    pool.read_snapshot(id, place(writer, block), &mut data).unwrap();
    let numbers: Vec<u64> = data
        .chunks(8)
        .map(|c| u64::from_be_bytes(c.try_into().unwrap()))
        .collect();
    assert!(
        numbers.iter().all(|n| *n == numbers[0]),
        "a block is torn: {numbers:?}"
    );
    numbers[0]
}

/// Compares a cut with the chains.
fn judge(pool: &Pool, cut: &[SnapshotId], before: &[u64], after: &[u64]) {
    for writer in 0..WRITERS {
        let seen: Vec<Vec<u64>> = cut
            .iter()
            .map(|id| (0..BLOCKS).map(|block| found(pool, *id, writer, block)).collect())
            .collect();
        let length = seen.iter().flatten().copied().max().unwrap();
        assert!(
            length >= before[writer],
            "writer {writer}: write {} was acknowledged before the cut, and only {length} are in",
            before[writer]
        );
        assert!(
            length <= after[writer],
            "writer {writer}: write {length} is in, and only {} were issued before the cut returned",
            after[writer]
        );
        let mut expected = vec![vec![0; BLOCKS as usize]; VOLUMES];
        for n in 1..=length {
            let (volume, block) = target(writer, n);
            expected[volume][block as usize] = n;
        }
        assert_eq!(seen, expected, "writer {writer}: not one point in time");
    }
}

#[test]
fn a_cut_of_several_volumes_is_a_beginning_of_every_chain() {
    let world = World::new();
    let options = PoolOptions {
        min_free_bytes: 0,
        commit_ms: 5,
        job_pages: 4,
        cache_bytes: 16 << 10,
        ..PoolOptions::default()
    };
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options).unwrap();
    let size = place(0, BLOCKS).next_multiple_of(GRAIN);
    let volumes: Vec<Volume> = (0..VOLUMES)
        .map(|i| volume(&pool, &format!("v{i}"), size))
        .collect();
    let aside = volume(&pool, "aside", size);
    let ids: Vec<_> = volumes.iter().map(Volume::id).collect();
    let chains: Vec<Chain> = (0..WRITERS).map(|_| Chain::default()).collect();
    let stop = AtomicBool::new(false);
    let look = |of: fn(&Chain) -> &AtomicU64| chains.iter().map(|c| of(c).load(SeqCst)).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        for (writer, chain) in chains.iter().enumerate() {
            let (volumes, stop) = (&volumes, &stop);
            scope.spawn(move || write_on(writer, volumes, chain, stop));
        }
        let mut rng = Rng::new(7);
        let mut kept: Vec<Vec<SnapshotId>> = Vec::new();
        for n in 0..number("STILLPOINT_SOAK_CUTS", CUTS) {
            std::thread::sleep(Duration::from_micros(rng.below(3000)));
            let spec = SnapshotSpec {
                name: format!("s{n}"),
                ..SnapshotSpec::default()
            };
            let before = look(|c| &c.acknowledged);
            let cut = pool.begin_cut(&ids, &spec).unwrap();
            let after = look(|c| &c.issued);
            let cut: Vec<_> = cut.commit().unwrap().iter().map(|s| s.id).collect();
            judge(&pool, &cut, &before, &after);
            // What came before must still be what it was, whatever is cloned, reverted and freed around it.
            if rng.chance(30) {
                let spec = CloneSpec {
                    name: format!("c{n}"),
                    read_only: false,
                    attributes: Vec::new(),
                };
                pool.clone_snapshot(cut[0], &spec)
                    .unwrap()
                    .write(0, &[9; 512], false)
                    .unwrap();
                pool.delete_volume(&spec.name, true).unwrap();
            }
            if rng.chance(20) {
                let spec = SnapshotSpec {
                    name: format!("a{n}"),
                    ..SnapshotSpec::default()
                };
                let id = pool.begin_cut(&[aside.id()], &spec).unwrap().commit().unwrap()[0].id;
                aside.write(0, &[n as u8; 512], false).unwrap();
                pool.revert(aside.id(), id).unwrap();
                pool.delete_snapshot(id).unwrap();
            }
            kept.push(cut);
            if kept.len() > 4 {
                let at = rng.index(kept.len());
                pool.delete_snapshots(&kept.swap_remove(at)).unwrap();
            }
        }
        stop.store(true, SeqCst);
    });
    let written: u64 = look(|c| &c.acknowledged).iter().sum();
    println!(
        "{written} writes; at most {} pages under one hold",
        pool.stats().most_pages_per_hold
    );
    assert!(written > 100, "nobody wrote while the cuts were made");
    pool.shutdown().unwrap();
}

#[test]
fn nobody_waits_for_more_than_a_bounded_number_of_pages() {
    const PAGES: u64 = 9000;
    let world = World::new();
    let options = PoolOptions {
        min_free_bytes: 0,
        commit_ms: 60_000,
        ..PoolOptions::default()
    };
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options).unwrap();
    let v = volume(&pool, "v", PAGES * 64 * GRAIN);
    for round in 0..2 {
        for page in 0..PAGES {
            v.write(page * 64 * GRAIN, &[7; 512], false).unwrap();
        }
        let spec = SnapshotSpec {
            name: format!("s{round}"),
            ..SnapshotSpec::default()
        };
        let id = pool.begin_cut(&[v.id()], &spec).unwrap().commit().unwrap()[0].id;
        if round == 1 {
            pool.delete_snapshot(id).unwrap();
        }
    }
    let begun = Instant::now();
    while pool.stats().jobs > 0 && begun.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // One write can touch two pages beyond the bound before it waits.
    let most = pool.stats().most_pages_per_hold;
    assert!(most <= 8192 + 2, "{most} pages under one hold of the lock");
    pool.shutdown().unwrap();
}

/// Latencies at queue depth 32 on real files while snapshots, clones, reverts and deletions go on beside.
#[test]
fn stalls_at_queue_depth_32() {
    if std::env::var_os("STILLPOINT_SOAK_STALLS").is_none() {
        return;
    }
    const SIZE: u64 = 1 << 30;
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::create(&dir.path().join("pool"), &PoolOptions::default()).unwrap();
    let v = volume(&pool, "v", SIZE);
    let other = volume(&pool, "other", SIZE);
    for at in (0..SIZE).step_by(1 << 20) {
        v.write(at, &vec![1; 1 << 20], false).unwrap();
        other.write(at, &vec![1; 1 << 20], false).unwrap();
    }
    v.flush().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..32)
            .map(|i| {
                let (v, stop) = (&v, &stop);
                scope.spawn(move || {
                    let (mut rng, mut times) = (Rng::new(i), Vec::new());
                    let mut buffer = [i as u8; 4096];
                    while !stop.load(SeqCst) {
                        let at = rng.below(SIZE / GRAIN) * GRAIN;
                        let begun = Instant::now();
                        if rng.chance(50) {
                            v.write(at, &buffer, false).unwrap();
                        } else {
                            v.read(at, &mut buffer).unwrap();
                        }
                        times.push(begun.elapsed());
                        std::thread::sleep(Duration::from_micros(500));
                    }
                    times
                })
            })
            .collect();
        let mut rng = Rng::new(99);
        let mut list: Vec<SnapshotId> = Vec::new();
        let begun = Instant::now();
        let mut longest: [Duration; 4] = [Duration::ZERO; 4];
        let mut timed = |which: usize, since: Instant| longest[which] = longest[which].max(since.elapsed());
        for n in 0.. {
            if begun.elapsed() > Duration::from_secs(20) {
                break;
            }
            let spec = SnapshotSpec {
                name: format!("s{n}"),
                ..SnapshotSpec::default()
            };
            let since = Instant::now();
            let cut = pool
                .begin_cut(&[v.id(), other.id()], &spec)
                .unwrap()
                .commit()
                .unwrap();
            timed(0, since);
            list.push(cut[0].id);
            let since = Instant::now();
            let clone = CloneSpec {
                name: format!("c{n}"),
                read_only: false,
                attributes: Vec::new(),
            };
            // Reverts nest until the background has folded them: at the limit, neither is possible for a while.
            if pool.clone_snapshot(cut[1].id, &clone).is_ok() {
                timed(1, since);
                pool.delete_volume(&clone.name, true).unwrap();
            }
            other
                .write(rng.below(SIZE - (8 << 20)) / 512 * 512, &vec![3; 4 << 20], false)
                .unwrap();
            let since = Instant::now();
            if pool.revert(other.id(), cut[1].id).is_ok() {
                timed(2, since);
            }
            pool.delete_snapshot(cut[1].id).unwrap();
            if list.len() > 3 {
                let since = Instant::now();
                pool.delete_snapshot(list.swap_remove(rng.index(3))).unwrap();
                timed(3, since);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        stop.store(true, SeqCst);
        let mut times: Vec<Duration> = readers.into_iter().flat_map(|r| r.join().unwrap()).collect();
        times.sort();
        let at = |permille: usize| times[(times.len() - 1) * permille / 1000];
        println!(
            "{} operations: p50 {:?}, p99 {:?}, p99.9 {:?}, max {:?}; longest cut {:?}, clone {:?}, revert {:?}, delete {:?}; {:?}",
            times.len(),
            at(500),
            at(990),
            at(999),
            at(1000),
            longest[0],
            longest[1],
            longest[2],
            longest[3],
            pool.stats()
        );
    });
    pool.shutdown().unwrap();
}
