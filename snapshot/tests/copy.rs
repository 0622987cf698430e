//! Copies by reference: against plain byte arrays at any offsets, and the interleavings that would break them.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::sync::Arc;

use stillpoint_snapshot::meta::{Batch, MetaStore};
use stillpoint_snapshot::record::{decode_references, encode_references, key};
use stillpoint_snapshot::sim::{Loss, Rng, World};
use stillpoint_snapshot::{
    CheckReport, Copied, CopySource, Error, ExtentKind, Pool, PoolOptions, ProblemKind, SnapshotInfo,
    SnapshotSpec, Volume, VolumeSpec, check_media, dump_meta, restore_meta,
};

use common::gate::Gate;

const GRAIN: u64 = 4096;
use ExtentKind::{Data, Hole, Zero};

const PAGE: u64 = 64 * GRAIN;

struct Bench {
    world: World,
    gate: Gate,
    pool: Pool,
}

fn options(gate: Gate) -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        job_pages: 2,
        cache_bytes: 32 << 10,
        checkpoint_txgs: 3,
        hooks: Some(Arc::new(gate)),
        ..PoolOptions::default()
    }
}

fn bench() -> Bench {
    let (world, gate) = (World::new(), Gate::default());
    let pool = Pool::create_with(
        Arc::new(world.disk()),
        Box::new(world.meta()),
        &options(gate.clone()),
    );
    Bench {
        pool: pool.unwrap(),
        world,
        gate,
    }
}

fn open(world: World) -> Bench {
    let gate = Gate::default();
    let pool = Pool::open_with(
        Arc::new(world.disk()),
        Box::new(world.meta()),
        &options(gate.clone()),
    );
    Bench {
        pool: pool.unwrap(),
        world,
        gate,
    }
}

fn bytes(volume: &Volume, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; len as usize];
    volume.read(offset, &mut bytes).unwrap();
    bytes
}

fn byte(volume: &Volume, offset: u64) -> u8 {
    let bytes = bytes(volume, offset, GRAIN);
    assert!(bytes.iter().all(|b| *b == bytes[0]), "a torn grain at {offset}");
    bytes[0]
}

fn fill(volume: &Volume, offset: u64, grains: u64, byte: u8) {
    let data = vec![byte; (grains * GRAIN) as usize];
    volume.write(offset, &data, false).unwrap();
}

impl Bench {
    fn volume(&self, name: &str, size_bytes: u64) -> Volume {
        let spec = VolumeSpec {
            name: name.into(),
            size_bytes,
            block_size: 512,
            attributes: Vec::new(),
        };
        self.pool.create_volume(&spec).unwrap()
    }

    fn snapshot(&self, volume: &Volume, name: &str) -> SnapshotInfo {
        let spec = SnapshotSpec {
            name: name.into(),
            ..SnapshotSpec::default()
        };
        let cut = self.pool.begin_cut(&[volume.id()], &spec).unwrap();
        cut.commit().unwrap().remove(0)
    }

    fn jobs(&self) {
        while self.pool.run_jobs(8).unwrap() > 0 {}
        self.pool.commit_now().unwrap();
    }

    /// The offline check of what is durable now; nothing may be wrong.
    fn check(&self) -> CheckReport {
        self.pool.commit_now().unwrap();
        let still = self.world.after_cut(Loss::Nothing, &mut Rng::new(0));
        let report = check_media(&still.disk(), &mut still.meta()).unwrap();
        assert!(report.is_clean(), "{report}");
        report
    }

    fn grains(&self) -> u64 {
        self.pool.stats().allocated_bytes / GRAIN
    }

    /// What every kind of power cut at this moment leaves.
    fn cuts(&self, look: impl Fn(&Self)) {
        let all = [Loss::All, Loss::Nothing, Loss::Random];
        for (seed, (disk, meta)) in (0..).zip(all.iter().flat_map(|d| all.map(|m| (*d, m)))) {
            let left = open(self.world.after_cuts(disk, meta, &mut Rng::new(seed)));
            left.check();
            look(&left);
            left.jobs();
            left.check();
        }
    }
}

#[test]
fn a_copy_takes_no_space_and_each_side_goes_its_own_way() {
    let b = bench();
    let (a, c) = (b.volume("a", 4 * PAGE), b.volume("c", 4 * PAGE));
    fill(&a, 0, 100, 1);
    a.write_zeroes(10 * GRAIN, GRAIN, false).unwrap();
    a.unmap(&[(11 * GRAIN, GRAIN)]).unwrap();
    fill(&c, 0, 200, 9);
    b.check();
    let done = c
        .copy(PAGE + GRAIN, &CopySource::Volume(&a), 0, 100 * GRAIN)
        .unwrap();
    assert_eq!(
        done,
        Copied {
            referenced_bytes: 100 * GRAIN,
            copied_bytes: 0
        }
    );
    assert_eq!(b.check().references, 98);
    assert_eq!(
        b.grains(),
        98 + 100,
        "what it replaced is free, and nothing is new"
    );
    assert_eq!(
        (byte(&c, 64 * GRAIN), byte(&c, 65 * GRAIN), byte(&c, 164 * GRAIN)),
        (9, 1, 1)
    );
    let status = c.lba_status(PAGE + 10 * GRAIN, 4 * GRAIN, 9).unwrap();
    let kinds: Vec<_> = status.iter().map(|e| (e.kind, e.len / GRAIN)).collect();
    assert_eq!(kinds, [(Data, 1), (Zero, 1), (Hole, 1), (Data, 1)]);
    // Neither side writes where the other looks, also not without waiting.
    fill(&a, 0, 1, 2);
    c.try_write(PAGE + 2 * GRAIN, &[3; GRAIN as usize]).unwrap();
    assert_eq!(byte(&a, GRAIN), 1);
    fill(&c, PAGE + 2 * GRAIN, 1, 3);
    assert_eq!((byte(&a, 0), byte(&c, PAGE + GRAIN)), (2, 1));
    assert_eq!((byte(&a, GRAIN), byte(&c, PAGE + 2 * GRAIN)), (1, 3));
    assert_eq!(b.check().references, 96);
    b.pool.delete_volume("a", true).unwrap();
    b.jobs();
    assert_eq!(b.check().references, 0);
    assert_eq!(byte(&c, PAGE + 50 * GRAIN), 1);
    let before = b.grains();
    fill(&c, PAGE + 50 * GRAIN, 1, 4);
    assert_eq!(b.grains(), before, "alone again: overwritten in place");
    b.pool.delete_volume("c", true).unwrap();
    b.jobs();
    b.check();
    assert_eq!(b.grains(), 0);
}

#[test]
fn a_grain_with_very_many_places_is_counted_exactly() {
    let b = bench();
    let a = b.volume("a", 4096 * GRAIN);
    fill(&a, 0, 2, 7);
    // 600 places: the count leaves its byte, and comes back.
    for n in 1..300 {
        a.copy(2 * n * GRAIN, &CopySource::Volume(&a), 0, 2 * GRAIN)
            .unwrap();
    }
    assert_eq!(b.check().references, 598);
    let mut text = Vec::new();
    let still = b.world.after_cut(Loss::Nothing, &mut Rng::new(0));
    dump_meta(&mut still.meta(), &mut text).unwrap();
    let told = String::from_utf8(text.clone()).unwrap();
    assert!(told.contains("*299"), "the dump tells the exact count");
    let restored = World::new();
    restore_meta(&mut text.as_slice(), &mut restored.meta()).unwrap();
    let report = check_media(&still.disk(), &mut restored.meta()).unwrap();
    assert!(report.is_clean() && report.references == 598, "{report}");
    let b = open(still);
    let a = b.pool.volume("a").unwrap();
    a.unmap(&[(2 * GRAIN, 500 * GRAIN)]).unwrap();
    assert_eq!(b.check().references, 98);
    assert_eq!((byte(&a, 0), byte(&a, 550 * GRAIN), b.grains()), (7, 7, 2));
    a.unmap(&[(0, 4096 * GRAIN)]).unwrap();
    assert_eq!(b.check().references, 0);
    assert_eq!(b.grains(), 0);
}

#[test]
fn i_a_copy_waits_for_an_in_place_write_already_chosen_and_keeps_later_ones_out() {
    for pinned in [false, true] {
        let b = bench();
        let (a, c) = (b.volume("a", PAGE), b.volume("c", PAGE));
        fill(&a, 0, 4, 1);
        b.pool.flush().unwrap();
        let chosen = b.gate.arm("write.chosen");
        let looked_up = b.gate.arm("copy.looked_up");
        std::thread::scope(|s| {
            let writer = s.spawn(|| fill(&a, 0, 1, 2));
            chosen.wait();
            let copier = s.spawn(|| {
                let pin = pinned.then(|| a.pin().unwrap());
                let source = pin.as_ref().map_or(CopySource::Volume(&a), CopySource::Pin);
                c.copy(0, &source, 0, 4 * GRAIN).unwrap()
            });
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!copier.is_finished(), "it did not wait for the write");
            chosen.release();
            writer.join().unwrap();
            looked_up.wait();
            // After the copy has looked: with a pin the source goes on, elsewhere.
            let later = s.spawn(|| fill(&a, GRAIN, 1, 3));
            if pinned {
                later.join().unwrap();
                looked_up.release();
                copier.join().unwrap();
            } else {
                looked_up.release();
                copier.join().unwrap();
                later.join().unwrap();
            }
        });
        assert_eq!((byte(&a, 0), byte(&a, GRAIN)), (2, 3));
        assert_eq!((byte(&c, 0), byte(&c, GRAIN), byte(&c, 2 * GRAIN)), (2, 1, 1));
        fill(&a, 2 * GRAIN, 1, 5);
        assert_eq!(
            byte(&c, 2 * GRAIN),
            1,
            "an overwrite after the copy goes elsewhere"
        );
        b.jobs();
        b.check();
        b.cuts(|left| {
            let c = left.pool.volume("c").unwrap();
            assert_eq!((byte(&c, 0), byte(&c, GRAIN), byte(&c, 2 * GRAIN)), (2, 1, 1));
        });
    }
}

#[test]
fn i2_a_dropped_reference_allows_in_place_only_after_its_own_commit() {
    let b = bench();
    let (a, c) = (b.volume("a", PAGE), b.volume("c", PAGE));
    fill(&a, 0, 1, 1);
    c.copy(0, &CopySource::Volume(&a), 0, GRAIN).unwrap();
    // In the open state the grain is a's alone; in the durable one c shows it too.
    c.unmap(&[(0, GRAIN)]).unwrap();
    fill(&a, 0, 1, 2);
    b.cuts(|left| {
        let c = left.pool.volume("c").unwrap();
        assert!([0, 1].contains(&byte(&c, 0)), "never what a wrote later");
    });
    // While the group that drops it is on its way the durable state still has it.
    c.copy(0, &CopySource::Volume(&a), 0, GRAIN).unwrap();
    c.unmap(&[(0, GRAIN)]).unwrap();
    for point in ["commit.closed", "commit.synced", "commit.journaled"] {
        let at = b.gate.arm(point);
        std::thread::scope(|s| {
            let commit = s.spawn(|| b.pool.commit_now().unwrap());
            at.wait();
            fill(&a, 0, 1, 3);
            b.cuts(|left| {
                let c = left.pool.volume("c").unwrap();
                assert!([0, 2, 3].contains(&byte(&c, 0)));
                assert!(byte(&c, 0) != 3 || point == "commit.closed", "{point}");
            });
            at.release();
            commit.join().unwrap();
        });
        c.copy(0, &CopySource::Volume(&a), 0, GRAIN).unwrap();
        fill(&a, 0, 1, 2);
        c.copy(0, &CopySource::Volume(&a), 0, GRAIN).unwrap();
        c.unmap(&[(0, GRAIN)]).unwrap();
    }
    b.pool.commit_now().unwrap();
    let before = b.grains();
    assert!(a.try_write(0, &[4; GRAIN as usize]).unwrap(), "in place again");
    assert_eq!(b.grains(), before);
    b.check();
}

#[test]
fn b2_unmap_of_a_shared_grain_while_the_delete_job_of_its_snapshot_runs_frees_it_once() {
    let b = bench();
    let (a, c) = (b.volume("a", 8 * PAGE), b.volume("c", 8 * PAGE));
    fill(&a, 0, 8 * 64, 1);
    let snapshot = b.snapshot(&a, "s");
    c.copy(0, &CopySource::Snapshot(snapshot.id), 0, 8 * PAGE)
        .unwrap();
    a.unmap(&[(0, 4 * PAGE)]).unwrap();
    b.pool.delete_snapshot(snapshot.id).unwrap();
    let page = b.gate.arm("job.page");
    std::thread::scope(|s| {
        let job = s.spawn(|| b.pool.run_jobs(1).unwrap());
        page.wait();
        a.unmap(&[(0, 8 * PAGE)]).unwrap();
        c.unmap(&[(PAGE, PAGE)]).unwrap();
        page.release();
        job.join().unwrap();
    });
    b.jobs();
    assert_eq!(b.check().references, 0);
    assert_eq!(b.grains(), 7 * 64);
    c.unmap(&[(0, 8 * PAGE)]).unwrap();
    b.check();
    assert_eq!(b.grains(), 0);
}

#[test]
fn a_snapshot_copied_back_over_its_volume_shares_what_has_changed_only() {
    let b = bench();
    let a = b.volume("a", 2 * PAGE);
    fill(&a, 0, 128, 1);
    let first = b.snapshot(&a, "first");
    fill(&a, 3 * GRAIN, 2, 2);
    let second = b.snapshot(&a, "second");
    a.copy(0, &CopySource::Snapshot(first.id), 0, 2 * PAGE).unwrap();
    assert_eq!(b.check().references, 2, "the other grains are in their place");
    assert_eq!((byte(&a, 3 * GRAIN), b.grains()), (1, 130));
    // The same grain at the same place of two versions: two placements, given back one by one.
    b.pool.delete_snapshot(second.id).unwrap();
    b.jobs();
    assert_eq!((b.check().references, b.grains()), (2, 128));
    b.pool.delete_snapshot(first.id).unwrap();
    b.jobs();
    assert_eq!((b.check().references, b.grains()), (0, 128));
    assert_eq!(byte(&a, 4 * GRAIN), 1);
    a.unmap(&[(0, 2 * PAGE)]).unwrap();
    b.check();
    assert_eq!(b.grains(), 0);
}

#[test]
fn a_pin_outlives_snapshot_revert_and_volume_and_leaves_nothing_behind() {
    let b = bench();
    let (a, c) = (b.volume("a", PAGE), b.volume("c", 4 * PAGE));
    fill(&a, 0, 8, 1);
    let snapshot = b.snapshot(&a, "s");
    let epoch = b.pool.stats().epoch;
    let pins = [a.pin().unwrap(), a.pin().unwrap()];
    assert_eq!(
        b.pool.stats().epoch,
        epoch,
        "nothing was written: the snapshot serves"
    );
    fill(&a, 0, 4, 2);
    let later = a.pin().unwrap();
    fill(&a, 0, 4, 3);
    assert_eq!(b.pool.snapshots(None).len(), 1, "pins are not listed");
    b.pool.delete_snapshot(snapshot.id).unwrap();
    let reserve = b.snapshot(&a, "r");
    b.pool.revert(a.id(), reserve.id).unwrap();
    b.pool.delete_volume("a", true).unwrap();
    b.jobs();
    let shows = |pin: &stillpoint_snapshot::Pin| {
        let mut first = [0xee; 2 * GRAIN as usize];
        pin.read(3 * GRAIN, &mut first).unwrap();
        (first[0], first[GRAIN as usize])
    };
    assert_eq!((shows(&pins[0]), shows(&later)), ((1, 1), (2, 1)));
    c.copy(GRAIN, &CopySource::Pin(&later), 0, 8 * GRAIN).unwrap();
    c.copy(PAGE, &CopySource::Pin(&pins[1]), 0, 8 * GRAIN).unwrap();
    b.check();
    // A restart forgets pins that nobody let go.
    let left = open(b.world.after_cut(Loss::Nothing, &mut Rng::new(1)));
    left.jobs();
    assert_eq!((left.check().references, left.grains()), (4, 12));
    assert_eq!(left.pool.stats().snapshots, 0);
    drop((pins, later));
    b.jobs();
    assert_eq!((b.check().references, b.grains()), (4, 12));
    assert_eq!(b.pool.stats().snapshots, 0);
    assert_eq!(
        (byte(&c, GRAIN), byte(&c, PAGE), byte(&c, PAGE + 7 * GRAIN)),
        (2, 1, 1)
    );
}

#[test]
fn a_copy_after_the_newest_snapshot_was_deleted_is_of_the_volume_and_not_of_an_older_snapshot() {
    let b = bench();
    let (from, to) = (b.volume("from", SIZE), b.volume("to", SIZE));
    fill(&from, 0, 70, 1);
    b.snapshot(&from, "old");
    fill(&from, 0, 70, 2);
    let newest = b.snapshot(&from, "new");
    b.pool.delete_snapshot(newest.id).unwrap();
    b.jobs();
    let pin = from.pin().unwrap();
    to.copy(0, &CopySource::Pin(&pin), 0, 70 * GRAIN).unwrap();
    assert_eq!((byte(&to, 0), byte(&to, 69 * GRAIN)), (2, 2));
    drop(pin);
    b.jobs();
    b.check();
}

#[test]
fn refusals() {
    let (b, other) = (bench(), bench());
    let (a, far) = (b.volume("a", PAGE), other.volume("far", PAGE));
    assert!(!a.same_pool(&far) && a.same_pool(&a.clone()));
    assert!(matches!(
        a.copy(0, &CopySource::Volume(&far), 0, 512),
        Err(Error::Refused { .. })
    ));
    let pin = far.pin().unwrap();
    assert!(matches!(
        a.copy(0, &CopySource::Pin(&pin), 0, 512),
        Err(Error::Refused { .. })
    ));
    for (offset, source, len) in [(PAGE, 0, 512), (0, PAGE, 512), (0, 512, PAGE), (u64::MAX, 0, 512)] {
        let done = a.copy(offset, &CopySource::Volume(&a), source, len);
        assert!(matches!(done, Err(Error::OutOfRange { .. })), "{done:?}");
    }
    assert_eq!(
        a.copy(0, &CopySource::Volume(&a), 0, 0).unwrap(),
        Copied::default()
    );
}

/// Not a multiple of the grain.
const SIZE: u64 = 3 * PAGE + 5 * GRAIN + 512;

/// Volumes as byte arrays; copies at any offsets, overlapping or not, unaligned or not.
#[test]
fn copies_are_what_copying_the_bytes_would_be() {
    for seed in 0..number("STILLPOINT_SOAK_COPIES", 6) {
        let mut rng = Rng::new(seed);
        let b = bench();
        let volumes = [b.volume("a", SIZE), b.volume("c", SIZE)];
        let mut model = [vec![0u8; SIZE as usize], vec![0u8; SIZE as usize]];
        let mut pins = Vec::new();
        for step in 0..60u8 {
            let to = rng.index(2);
            let unit = if rng.chance(70) { GRAIN } else { 512 };
            let range = |rng: &mut Rng, len: Option<u64>| {
                let most = if rng.chance(30) { SIZE / unit } else { 20 };
                let len = len.unwrap_or_else(|| (1 + rng.below(most)) * unit);
                let len = len.min(SIZE / unit * unit);
                let at = rng.below((SIZE - len) / unit + 1) * unit;
                (at, len)
            };
            let (at, len) = range(&mut rng, None);
            let place = at as usize..(at + len) as usize;
            match rng.below(10) {
                0..3 => {
                    volumes[to]
                        .write(at, &vec![step + 1; len as usize], false)
                        .unwrap();
                    model[to][place].fill(step + 1);
                }
                3 => {
                    volumes[to].write_zeroes(at, len, rng.chance(50)).unwrap();
                    model[to][place].fill(0);
                }
                4 => pins.push((volumes[to].pin().unwrap(), model[to].clone())),
                5 if !pins.is_empty() => drop(pins.remove(rng.index(pins.len()))),
                6 => b.jobs(),
                _ => {
                    let (from, _) = range(&mut rng, Some(len));
                    let source = rng.index(2);
                    let pin = rng.pick(&pins).filter(|_| rng.chance(30));
                    let bytes = pin.map_or(&model[source], |(_, bytes)| bytes);
                    let bytes = bytes[from as usize..(from + len) as usize].to_vec();
                    let what = pin.map_or(CopySource::Volume(&volumes[source]), |(p, _)| CopySource::Pin(p));
                    volumes[to].copy(at, &what, from, len).unwrap();
                    model[to][place].copy_from_slice(&bytes);
                }
            }
            for (volume, model) in volumes.iter().zip(&model) {
                assert!(bytes(volume, 0, SIZE) == *model, "seed {seed} step {step}");
            }
            if step % 4 == 0 {
                b.check();
            }
        }
        drop(pins);
        b.jobs();
        b.check();
        for volume in &volumes {
            volume.unmap(&[(0, SIZE)]).unwrap();
        }
        b.jobs();
        b.check();
        assert!(b.grains() <= 2, "seed {seed}: only the unaligned ends are left");
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// The grain of every placement is counted by the check, the scrub and the plan of a deletion alike.
#[test]
fn wrong_references_are_found_and_a_plan_knows_them() {
    let b = bench();
    let (a, c) = (b.volume("a", PAGE), b.volume("c", PAGE));
    fill(&a, 0, 10, 1);
    let snapshot = b.snapshot(&a, "s");
    c.copy(0, &CopySource::Volume(&a), 0, 4 * GRAIN).unwrap();
    a.unmap(&[(0, PAGE)]).unwrap();
    let plan = b.pool.plan_delete(&[snapshot.id]).unwrap();
    assert_eq!(plan.freed_bytes, 6 * GRAIN, "the other four are in c");
    c.unmap(&[(0, GRAIN)]).unwrap();
    let unique = b
        .pool
        .unique_bytes(&[snapshot.id], std::time::Duration::MAX)
        .unwrap();
    assert_eq!(unique, [Some(7 * GRAIN)]);
    let scrub = |pool: &Pool| {
        pool.scrub_start(0, true).unwrap();
        while pool.run_scrub(64).unwrap() > 0 {}
        let status = pool.scrub_status().unwrap();
        status.problems.iter().map(|p| p.kind).collect::<Vec<_>>()
    };
    assert_eq!(scrub(&b.pool), []);
    b.check();
    b.pool.shutdown().unwrap();
    let mut meta = b.world.meta();
    let mut change = |at: usize, by: i8| {
        let k = key::references(0, 0);
        let mut counts = decode_references(0, 0, &meta.get(&k).unwrap().unwrap()).unwrap();
        counts[at] = counts[at].checked_add_signed(by).unwrap();
        let mut batch = Batch::default();
        batch.put(k, encode_references(0, 0, &counts));
        meta.apply(&batch).unwrap();
        check_media(&b.world.disk(), &mut meta)
            .unwrap()
            .problems
            .iter()
            .map(|p| p.kind)
            .collect::<Vec<_>>()
    };
    let shared = 2 + 3;
    assert_eq!(
        change(shared, 1),
        [ProblemKind::Leaked],
        "a reference that nothing uses"
    );
    assert_eq!(
        change(shared, -2),
        [ProblemKind::SharedGrain],
        "a placement without a reference"
    );
    let again = open(b.world.after_cut(Loss::Nothing, &mut Rng::new(0)));
    assert_eq!(scrub(&again.pool), [ProblemKind::SharedGrain]);
    assert_eq!(change(shared, 1), []);
}

/// How long a large copy takes, and what others feel of it. Figures, not limits: run it on a quiet machine.
///
/// ```text
/// STILLPOINT_SOAK_GIB=10 cargo test --release -p stillpoint-snapshot --test copy -- --ignored --nocapture
/// ```
#[test]
#[ignore = "a measurement: some GiB of map, on the real store"]
fn a_large_copy_measured() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};
    let size = number("STILLPOINT_SOAK_GIB", 1) << 30;
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::create(&dir.path().join("pool"), &PoolOptions::default()).unwrap();
    let volume = |name: &str| {
        let spec = VolumeSpec {
            name: name.into(),
            size_bytes: size,
            block_size: 512,
            attributes: Vec::new(),
        };
        pool.create_volume(&spec).unwrap()
    };
    let (from, to, other) = (volume("from"), volume("to"), volume("other"));
    let mut filled = (64 << 20).min(size);
    for at in (0..filled).step_by(1 << 20) {
        from.write(at, &vec![7; 1 << 20], false).unwrap();
    }
    while filled < size {
        let more = filled.min(size - filled);
        from.copy(filled, &CopySource::Volume(&from), 0, more).unwrap();
        filled += more;
    }
    pool.checkpoint_now().unwrap();
    let stop = AtomicBool::new(false);
    let slowest = std::thread::scope(|s| {
        let others = s.spawn(|| {
            let (mut worst, mut at) = (Duration::ZERO, 0);
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                other.write(at % size, &[1; 4096], false).unwrap();
                other.read((at * 7) % size / 4096 * 4096, &mut [0; 4096]).unwrap();
                worst = worst.max(begun.elapsed());
                at += 37 * 4096;
                std::thread::sleep(Duration::from_millis(1));
            }
            worst
        });
        for round in 0..3 {
            let begun = Instant::now();
            to.copy(0, &CopySource::Volume(&from), 0, size).unwrap();
            println!("copy {round} of {} GiB: {:?}", size >> 30, begun.elapsed());
            let begun = Instant::now();
            to.unmap(&[(0, size)]).unwrap();
            to.flush().unwrap();
            println!("unmapped in {:?}", begun.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        others.join().unwrap()
    });
    println!(
        "slowest write and read of another volume meanwhile: {slowest:?}; {:?}",
        pool.stats()
    );
    pool.shutdown().unwrap();
}
