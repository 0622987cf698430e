//! The interleavings that break a naive redirect-on-write store, each by name (snapshot-store.md §8.0), forced with
//! pause points and followed by power cuts. The letters are those of that list, and begin the names of the tests:
//!
//! | | what | where |
//! |---|---|---|
//! | a | a snapshot deleted in the open group, its grain overwritten, a cut to the group before | here |
//! | b | UNMAP of a grain while the delete job of its snapshot runs | here; shared grains: `b2` in copy.rs |
//! | c | a lonely old page version | here |
//! | d, d2 | a flush, and an overwrite in place, while the group of the write closes | here |
//! | e | pages changed by the next group while one is written | here |
//! | f to f5 | a slow read of a grain that is released and used again: by UNMAP, delete, revert, a loan; a copy from it | here |
//! | g | sealing against delete and overwrite | `sealing_that_races_delete_and_overwrite_gives_no_false_error` in integrity.rs |
//! | h | two writes to different sectors of one held grain | here |
//! | i, i2 | a copy against an in-place write already chosen; a reference that is dropped | copy.rs |
//! | j | WRITE SAME of a tebibyte, snapshot, mount | here |
//! | k | revert, delete, a hundred times | here |
//! | l, l2 | what a cut waits for; a cut over several volumes | here |
//! | m | mount and revert after a grow | here |
//! | n | free and allocate within one group (§8.7) | here |

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use stillpoint_snapshot::sim::{Loss, Rng, World};
use stillpoint_snapshot::{
    CloneSpec, CopySource, Pool, PoolOptions, SnapshotId, SnapshotInfo, SnapshotSpec, Volume, VolumeSpec,
    check_media,
};

use common::gate::Gate;

const GRAIN: u64 = 4096;
const PAGE: u64 = 64 * GRAIN;

/// A pool on simulated media whose threads are the test's own.
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
        job_pages: 1,
        hooks: Some(Arc::new(gate)),
        ..PoolOptions::default()
    }
}

fn open(world: World) -> Bench {
    let gate = Gate::default();
    let pool = Pool::open_with(
        Arc::new(world.disk()),
        Box::new(world.meta()),
        &options(gate.clone()),
    )
    .unwrap();
    Bench { world, gate, pool }
}

fn bench() -> Bench {
    bench_with(PoolOptions::default().loan_bytes)
}

/// Where copies of more than so many bytes are loans.
fn bench_with(loan_bytes: u64) -> Bench {
    let (world, gate) = (World::new(), Gate::default());
    let options = PoolOptions {
        loan_bytes,
        ..options(gate.clone())
    };
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options).unwrap();
    Bench { world, gate, pool }
}

fn read(volume: &Volume, offset: u64) -> u8 {
    let mut bytes = [0xee; GRAIN as usize];
    volume.read(offset, &mut bytes).unwrap();
    assert!(
        bytes.iter().all(|byte| *byte == bytes[0]),
        "a torn grain at {offset}"
    );
    bytes[0]
}

fn fill(volume: &Volume, offset: u64, grains: u64, byte: u8) {
    volume
        .write(offset, &vec![byte; (grains * GRAIN) as usize], false)
        .unwrap();
}

/// Something that must not have ended yet.
fn still_waits(handle: &ScopedJoinHandle<'_, ()>) {
    std::thread::sleep(Duration::from_millis(60));
    assert!(!handle.is_finished(), "it did not wait");
}

impl Bench {
    fn volume(&self, name: &str, bytes: u64) -> Volume {
        let spec = VolumeSpec {
            name: name.into(),
            size_bytes: bytes,
            block_size: 512,
            attributes: Vec::new(),
        };
        self.pool.create_volume(&spec).unwrap()
    }

    fn snapshot(&self, volumes: &[&Volume], name: &str) -> SnapshotInfo {
        let ids: Vec<_> = volumes.iter().map(|volume| volume.id()).collect();
        let spec = SnapshotSpec {
            name: name.into(),
            ..SnapshotSpec::default()
        };
        self.pool
            .begin_cut(&ids, &spec)
            .unwrap()
            .commit()
            .unwrap()
            .remove(0)
    }

    fn read_snapshot(&self, id: SnapshotId, offset: u64) -> u8 {
        let mut bytes = [0xee; GRAIN as usize];
        self.pool.read_snapshot(id, offset, &mut bytes).unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == bytes[0]),
            "a torn grain at {offset}"
        );
        bytes[0]
    }

    fn jobs(&self) {
        while self.pool.run_jobs(8).unwrap() > 0 {}
        self.pool.commit_now().unwrap();
    }

    fn check(&self) {
        check(&self.world);
    }

    /// Power cuts at this moment: every way in which data and metadata may have been lost.
    fn cuts(&self, look: impl Fn(&Self)) {
        let all = [Loss::All, Loss::Nothing, Loss::Random];
        for (seed, (disk, meta)) in (0..).zip(all.iter().flat_map(|disk| all.map(|meta| (*disk, meta)))) {
            let left = self.world.after_cuts(disk, meta, &mut Rng::new(seed));
            check(&left);
            let bench = open(left);
            look(&bench);
            bench.jobs();
            bench.check();
        }
    }

    /// Deletes everything and expects every grain back.
    fn empties(&self) {
        for info in self.pool.volumes() {
            self.pool.delete_volume(&info.name, true).unwrap();
        }
        self.jobs();
        self.check();
        assert_eq!(self.pool.stats().allocated_bytes, 0);
    }

    fn named(&self, name: &str) -> Volume {
        self.pool.volume(name).unwrap()
    }
}

fn check(world: &World) {
    let still = world.after_cut(Loss::Nothing, &mut Rng::new(0));
    let report = check_media(&still.disk(), &mut still.meta()).unwrap();
    assert!(report.is_clean(), "{report}");
}

/// Runs something beside the test's own thread.
fn beside<'scope>(
    scope: &'scope Scope<'scope, '_>,
    run: impl FnOnce() + Send + 'scope,
) -> ScopedJoinHandle<'scope, ()> {
    scope.spawn(run)
}

#[test]
fn a_snapshot_deleted_in_the_open_group_survives_a_cut_to_the_group_before() {
    let b = bench();
    let v = b.volume("v", PAGE);
    fill(&v, 0, 4, 1);
    let snapshot = b.snapshot(&[&v], "s");
    std::thread::scope(|scope| {
        let pause = b.gate.arm("commit.closed");
        let deletion = beside(scope, || b.pool.delete_snapshot(snapshot.id).unwrap());
        pause.wait();
        // The deletion is not durable: whatever happens to the grains now, the snapshot may come back.
        fill(&v, 0, 2, 2);
        v.unmap(&[(2 * GRAIN, GRAIN)]).unwrap();
        b.cuts(|left| {
            if let Some(found) = left.pool.snapshot("v", "s") {
                (0..4).for_each(|grain| assert_eq!(left.read_snapshot(found.id, grain * GRAIN), 1));
            }
        });
        let came_back = b.world.after_cuts(Loss::Nothing, Loss::All, &mut Rng::new(1));
        assert!(
            open(came_back).pool.snapshot("v", "s").is_some(),
            "the cut of this test is the one to before"
        );
        pause.release();
        deletion.join().unwrap();
    });
    // Job steps that are not durable either.
    for _ in 0..4 {
        b.pool.run_jobs(1).unwrap();
        fill(&v, 0, 4, 3);
        b.cuts(|left| {
            if let Some(found) = left.pool.snapshot("v", "s") {
                assert_eq!(left.read_snapshot(found.id, 0), 1);
            }
        });
    }
    b.empties();
}

#[test]
fn b_unmap_of_a_grain_while_the_delete_job_of_its_snapshot_runs_frees_it_once() {
    // Enough pages for several steps of the job; of each, half of the grains are redirected, half are shared.
    const PAGES: u64 = 40;
    let b = bench();
    let v = b.volume("v", PAGES * PAGE);
    (0..PAGES).for_each(|page| fill(&v, page * PAGE, 12, 1));
    let snapshot = b.snapshot(&[&v], "s");
    (0..PAGES).for_each(|page| fill(&v, page * PAGE, 6, 2));
    b.pool.delete_snapshot(snapshot.id).unwrap();
    std::thread::scope(|scope| {
        for round in 0..3 {
            let pause = b.gate.arm("job.page");
            let job = beside(scope, || assert_eq!(b.pool.run_jobs(1).unwrap(), 1));
            pause.wait();
            // On pages that the job has passed, is at, and has not seen.
            for page in 0..PAGES {
                v.unmap(&[
                    (page * PAGE + round * GRAIN, GRAIN),
                    (page * PAGE + (6 + round) * GRAIN, GRAIN),
                ])
                .unwrap();
            }
            b.cuts(|left| assert_eq!(read(&left.named("v"), 11 * GRAIN), 1));
            pause.release();
            job.join().unwrap();
            b.pool.commit_now().unwrap();
            b.check();
        }
    });
    b.jobs();
    b.check();
    assert_eq!(b.pool.stats().allocated_bytes, PAGES * 6 * GRAIN);
    b.empties();
}

#[test]
fn c_a_lonely_old_page_version_is_freed_once() {
    let b = bench();
    let v = b.volume("v", 2 * PAGE);
    fill(&v, 0, 64, 1);
    let first = b.snapshot(&[&v], "first");
    let second = b.snapshot(&[&v], "second");
    // Nothing was written between: the version stays when its snapshot goes.
    b.pool.delete_snapshot(first.id).unwrap();
    b.jobs();
    b.check();
    b.pool.delete_snapshot(second.id).unwrap();
    b.jobs();
    b.check();
    fill(&v, 0, 8, 2);
    v.unmap(&[(4 * GRAIN, 20 * GRAIN)]).unwrap();
    let third = b.snapshot(&[&v], "third");
    fill(&v, 0, 2, 3);
    v.unmap(&[(30 * GRAIN, 10 * GRAIN)]).unwrap();
    b.pool.delete_snapshot(third.id).unwrap();
    b.cuts(|left| assert_eq!(read(&left.named("v"), 50 * GRAIN), 1));
    b.jobs();
    b.check();
    assert_eq!(b.pool.stats().allocated_bytes, (64 - 20 - 10) * GRAIN);
    b.empties();
}

#[test]
fn d_a_flush_that_arrives_while_the_group_of_the_write_is_closing_waits_for_it() {
    for point in ["commit.closed", "commit.synced", "commit.journaled"] {
        let b = bench();
        let v = b.volume("v", PAGE);
        fill(&v, 0, 1, 7);
        std::thread::scope(|scope| {
            let pause = b.gate.arm(point);
            let commit = beside(scope, || b.pool.commit_now().unwrap());
            pause.wait();
            let flush = beside(scope, || v.flush().unwrap());
            still_waits(&flush);
            b.cuts(|left| assert!([0, 7].contains(&read(&left.named("v"), 0))));
            pause.release();
            flush.join().unwrap();
            b.cuts(|left| assert_eq!(read(&left.named("v"), 0), 7, "flushed, cut at {point}"));
            commit.join().unwrap();
        });
    }
}

#[test]
fn d2_an_overwrite_in_place_during_a_commit_is_covered_by_the_next_flush() {
    for point in [
        "commit.closed",
        "commit.synced",
        "commit.journaled",
        "commit.durable",
        "commit.released",
    ] {
        let b = bench();
        let v = b.volume("v", PAGE);
        fill(&v, 0, 1, 1);
        v.flush().unwrap();
        fill(&v, GRAIN, 1, 1);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let pause = b.gate.arm(point);
            let commit = beside(scope, || b.pool.commit_now().unwrap());
            pause.wait();
            fill(&v, 0, 1, 2);
            let flush = beside(scope, || {
                v.flush().unwrap();
                done.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(30));
            if done.load(Ordering::SeqCst) {
                b.cuts(|left| assert_eq!(read(&left.named("v"), 0), 2, "flushed while {point}"));
            }
            pause.release();
            flush.join().unwrap();
            commit.join().unwrap();
            b.cuts(|left| assert_eq!(read(&left.named("v"), 0), 2, "flushed after {point}"));
        });
    }
}

#[test]
fn e_pages_changed_by_the_next_group_while_a_group_is_written_are_not_in_it() {
    for point in [
        "commit.closed",
        "commit.synced",
        "commit.journaled",
        "commit.durable",
    ] {
        let b = bench();
        let v = b.volume("v", PAGE);
        fill(&v, 0, 8, 1);
        v.flush().unwrap();
        b.snapshot(&[&v], "s");
        fill(&v, 0, 2, 2);
        fill(&v, 10 * GRAIN, 2, 2);
        std::thread::scope(|scope| {
            let pause = b.gate.arm(point);
            let commit = beside(scope, || b.pool.commit_now().unwrap());
            pause.wait();
            // The same page: a grain of the closing group, a held one, a fresh one, and one given back.
            fill(&v, 0, 1, 3);
            fill(&v, 4 * GRAIN, 1, 3);
            fill(&v, 20 * GRAIN, 1, 3);
            v.unmap(&[(11 * GRAIN, GRAIN)]).unwrap();
            pause.release();
            commit.join().unwrap();
        });
        b.check();
        b.cuts(|left| {
            let v = left.named("v");
            assert!([2, 3].contains(&read(&v, 0)));
            assert_eq!(read(&v, GRAIN), 2);
            assert_eq!(read(&v, 4 * GRAIN), 1, "redirected by a group that never closed");
            assert_eq!(read(&v, 20 * GRAIN), 0);
            assert!([2, 0].contains(&read(&v, 11 * GRAIN)));
            let s = left.pool.snapshot("v", "s").unwrap();
            (0..8).for_each(|grain| assert_eq!(left.read_snapshot(s.id, grain * GRAIN), 1));
        });
        v.flush().unwrap();
        b.cuts(|left| assert_eq!(read(&left.named("v"), 4 * GRAIN), 3));
        b.empties();
    }
}

/// Takes every free grain there is for another volume, as many as `grains`.
fn reuse(b: &Bench, grains: u64) {
    b.pool.commit_now().unwrap();
    b.pool.step().unwrap();
    let other = b.volume("other", 16 * PAGE);
    for grain in 0..grains {
        fill(&other, grain * GRAIN, 1, 0xbb);
    }
    b.pool.commit_now().unwrap();
}

#[test]
fn f_a_slow_read_of_a_released_grain_never_returns_another_volumes_data() {
    let b = bench();
    let v = b.volume("v", PAGE);
    fill(&v, 0, 64, 1);
    v.flush().unwrap();
    std::thread::scope(|scope| {
        let pause = b.gate.arm("read.looked_up");
        let reader = beside(scope, || {
            let byte = read(&v, 0);
            assert!([0, 1].contains(&byte), "another volume's data: {byte:#x}");
        });
        pause.wait();
        let unmap = beside(scope, || v.unmap(&[(0, PAGE)]).unwrap());
        std::thread::sleep(Duration::from_millis(40));
        reuse(&b, 200);
        pause.release();
        reader.join().unwrap();
        unmap.join().unwrap();
    });
    b.check();
    b.empties();
}

#[test]
fn f2_a_slow_read_of_a_deleted_snapshot_never_returns_another_volumes_data() {
    let b = bench();
    let v = b.volume("v", PAGE);
    fill(&v, 0, 64, 1);
    let snapshot = b.snapshot(&[&v], "s");
    fill(&v, 0, 64, 2);
    v.flush().unwrap();
    std::thread::scope(|scope| {
        let pause = b.gate.arm("read.looked_up");
        let reader = beside(scope, || {
            let mut bytes = [0xee; GRAIN as usize];
            if b.pool.read_snapshot(snapshot.id, 0, &mut bytes).is_ok() {
                assert!(
                    bytes.iter().all(|byte| *byte == 1),
                    "another volume's data: {:#x}",
                    bytes[0]
                );
            }
        });
        pause.wait();
        let deletion = beside(scope, || {
            b.pool.delete_snapshot(snapshot.id).unwrap();
            b.jobs();
        });
        std::thread::sleep(Duration::from_millis(40));
        reuse(&b, 100);
        pause.release();
        reader.join().unwrap();
        deletion.join().unwrap();
    });
    b.check();
    b.empties();
}

#[test]
fn f3_a_slow_read_across_a_revert_never_returns_another_volumes_data() {
    let b = bench();
    let v = b.volume("v", PAGE);
    fill(&v, 0, 64, 1);
    let snapshot = b.snapshot(&[&v], "s");
    fill(&v, 0, 64, 2);
    v.flush().unwrap();
    std::thread::scope(|scope| {
        let pause = b.gate.arm("read.looked_up");
        let reader = beside(scope, || {
            let byte = read(&v, 0);
            assert!([1, 2].contains(&byte), "another volume's data: {byte:#x}");
        });
        pause.wait();
        let revert = beside(scope, || {
            b.pool.revert(v.id(), snapshot.id).unwrap();
            b.jobs();
        });
        std::thread::sleep(Duration::from_millis(40));
        reuse(&b, 100);
        pause.release();
        reader.join().unwrap();
        revert.join().unwrap();
    });
    assert_eq!(read(&v, 0), 1);
    b.check();
    b.empties();
}

/// Copies a page over all of `v` by a loan, frees what `v` had, and gives it to another volume; as far as that goes.
fn lend_over(b: &Bench, v: &Volume, from: &Volume, pause: common::gate::Pause) {
    std::thread::scope(|scope| {
        let copier = beside(scope, || {
            v.copy(0, &CopySource::Volume(from), 0, PAGE).unwrap();
            b.jobs();
        });
        for _ in 0..30 {
            std::thread::sleep(Duration::from_millis(10));
            if copier.is_finished() {
                break;
            }
        }
        reuse(b, 200);
        pause.release();
        copier.join().unwrap();
    });
}

#[test]
fn f4_a_slow_read_across_a_loan_never_returns_another_volumes_data() {
    let b = bench_with(GRAIN);
    let (v, from) = (b.volume("v", PAGE), b.volume("from", PAGE));
    fill(&v, 0, 64, 1);
    fill(&from, 0, 64, 2);
    v.flush().unwrap();
    std::thread::scope(|scope| {
        let pause = b.gate.arm("read.looked_up");
        let reader = beside(scope, || {
            let byte = read(&v, 0);
            assert!([1, 2].contains(&byte), "another volume's data: {byte:#x}");
        });
        pause.wait();
        lend_over(&b, &v, &from, pause);
        reader.join().unwrap();
    });
    assert_eq!(read(&v, 0), 2);
    b.check();
    b.empties();
}

#[test]
fn f5_a_slow_copy_from_under_a_loan_takes_no_reference_to_what_is_free() {
    let b = bench_with(8 * GRAIN);
    let (v, from, to) = (b.volume("v", PAGE), b.volume("from", PAGE), b.volume("to", PAGE));
    fill(&v, 0, 64, 1);
    fill(&from, 0, 64, 2);
    v.flush().unwrap();
    std::thread::scope(|scope| {
        let pause = b.gate.arm("copy.looked_up");
        let copier = beside(scope, || {
            to.copy(0, &CopySource::Volume(&v), 0, 4 * GRAIN).unwrap();
        });
        pause.wait();
        lend_over(&b, &v, &from, pause);
        copier.join().unwrap();
    });
    assert!([1, 2].contains(&read(&to, 0)));
    assert_eq!(read(&v, 0), 2);
    b.check();
    b.empties();
}

#[test]
fn h_two_writes_to_different_sectors_of_one_held_grain_are_both_there() {
    for point in ["write.chosen", "write.data"] {
        let b = bench();
        let v = b.volume("v", PAGE);
        fill(&v, 0, 1, 1);
        let snapshot = b.snapshot(&[&v], "s");
        std::thread::scope(|scope| {
            let pause = b.gate.arm(point);
            let first = beside(scope, || v.write(0, &[2; 512], false).unwrap());
            pause.wait();
            let second = beside(scope, || v.write(512, &[3; 512], false).unwrap());
            std::thread::sleep(Duration::from_millis(40));
            pause.release();
            first.join().unwrap();
            second.join().unwrap();
        });
        v.flush().unwrap();
        b.cuts(|left| {
            let mut bytes = [0xee; GRAIN as usize];
            left.named("v").read(0, &mut bytes).unwrap();
            assert!(
                bytes[..512].iter().all(|byte| *byte == 2),
                "the first write is lost, {point}"
            );
            assert!(
                bytes[512..1024].iter().all(|byte| *byte == 3),
                "the second write is lost, {point}"
            );
            assert!(bytes[1024..].iter().all(|byte| *byte == 1));
            assert_eq!(left.read_snapshot(snapshot.id, 0), 1);
        });
        b.empties();
    }
}

#[test]
fn j_write_same_of_a_tebibyte_of_zeroes_then_snapshot_then_mount_reads_zeroes() {
    for unmap in [true, false] {
        let b = bench();
        let tebibyte = 1 << 40;
        let v = b.volume("v", 2 * tebibyte);
        let places = [0, GRAIN, PAGE * 1000, tebibyte / 2 + 3 * GRAIN, tebibyte - GRAIN];
        places.iter().for_each(|place| fill(&v, *place, 1, 1));
        fill(&v, tebibyte, 1, 9);
        b.snapshot(&[&v], "before");
        places.iter().for_each(|place| fill(&v, *place + GRAIN * 2, 1, 2));
        // Not aligned to grains: the edges keep what is beside them.
        v.write_zeroes(512, tebibyte - 512, unmap).unwrap();
        let snapshot = b.snapshot(&[&v], "after");
        fill(&v, GRAIN, 1, 3);
        b.cuts(|left| {
            let spec = CloneSpec {
                name: "mount".into(),
                read_only: true,
                attributes: Vec::new(),
            };
            let mount = left.pool.clone_snapshot(snapshot.id, &spec).unwrap();
            let mut edge = [0xee; 1024];
            mount.read(0, &mut edge).unwrap();
            assert!(edge[..512].iter().all(|byte| *byte == 1) && edge[512..].iter().all(|byte| *byte == 0));
            for place in &places[1..] {
                assert_eq!(read(&mount, *place), 0);
                assert_eq!(read(&mount, (*place + 2 * GRAIN) % tebibyte), 0);
            }
            assert_eq!(read(&mount, tebibyte), 9);
            let before = left.pool.snapshot("v", "before").unwrap();
            places
                .iter()
                .for_each(|place| assert_eq!(left.read_snapshot(before.id, *place), 1));
        });
        b.empties();
    }
}

#[test]
fn k_revert_then_delete_the_snapshot_gives_everything_back_a_hundred_times() {
    let b = bench();
    let v = b.volume("v", 3 * PAGE);
    fill(&v, 0, 3 * 64, 1);
    v.flush().unwrap();
    let full = b.pool.stats().allocated_bytes;
    assert_eq!(full, 3 * PAGE);
    for round in 0..100u32 {
        let snapshot = b.snapshot(&[&v], &format!("s{round}"));
        fill(&v, u64::from(round % 3) * PAGE, 64, 2);
        fill(&v, 70 * GRAIN, 3, 3);
        b.pool.revert(v.id(), snapshot.id).unwrap();
        b.pool.delete_snapshot(snapshot.id).unwrap();
        if round % 9 == 0 {
            b.pool.run_jobs(1).unwrap();
            b.cuts(|left| assert_eq!(read(&left.named("v"), 70 * GRAIN), 1));
        }
        b.jobs();
        b.check();
        assert_eq!(b.pool.stats().allocated_bytes, full, "round {round}");
        assert_eq!(b.pool.stats().snapshots, 0, "round {round}");
    }
    (0..3 * 64).for_each(|grain| assert_eq!(read(&v, grain * GRAIN), 1));
    b.empties();
}

#[test]
fn l_a_cut_waits_for_operations_already_issued_and_for_nothing_else() {
    let b = bench();
    let v = b.volume("v", PAGE);
    let w = b.volume("w", PAGE);
    fill(&v, 0, 2, 1);
    fill(&w, 0, 2, 1);
    // Nothing is in flight (an initiator that sits on an R2T has issued nothing): the cut is at once.
    b.snapshot(&[&v, &w], "idle");
    std::thread::scope(|scope| {
        let pause = b.gate.arm("write.data");
        let issued = beside(scope, || fill(&v, 0, 1, 2));
        pause.wait();
        let cut = beside(scope, || drop(b.snapshot(&[&v, &w], "busy")));
        still_waits(&cut);
        // Issued after the cut began to wait for this volume: waits, and is not in it.
        let late = beside(scope, || fill(&v, GRAIN, 1, 3));
        still_waits(&late);
        pause.release();
        issued.join().unwrap();
        cut.join().unwrap();
        late.join().unwrap();
    });
    let at = |volume: &str, grain: u64| {
        b.read_snapshot(b.pool.snapshot(volume, "busy").unwrap().id, grain * GRAIN)
    };
    assert_eq!((at("v", 0), at("v", 1), at("w", 0)), (2, 1, 1));
    assert_eq!(read(&v, GRAIN), 3);
    b.cuts(|left| {
        let id = |volume: &str| left.pool.snapshot(volume, "busy").unwrap().id;
        assert_eq!(
            (left.read_snapshot(id("v"), 0), left.read_snapshot(id("w"), 0)),
            (2, 1)
        );
    });
    b.empties();
}

#[test]
fn l2_a_cut_over_several_volumes_is_whole_or_absent_after_a_power_cut() {
    for point in ["commit.closed", "commit.synced", "commit.journaled"] {
        let b = bench();
        let (v, w) = (b.volume("v", PAGE), b.volume("w", PAGE));
        fill(&v, 0, 1, 1);
        fill(&w, 0, 1, 1);
        std::thread::scope(|scope| {
            let pause = b.gate.arm(point);
            let cut = beside(scope, || drop(b.snapshot(&[&v, &w], "s")));
            pause.wait();
            // I/O goes on before the cut is durable, and is not in it.
            fill(&v, 0, 1, 2);
            fill(&w, 0, 1, 2);
            let look = |left: &Bench| {
                let found = ["v", "w"].map(|volume| left.pool.snapshot(volume, "s"));
                assert_eq!(found[0].is_some(), found[1].is_some(), "half a cut");
                found
                    .iter()
                    .flatten()
                    .for_each(|info| assert_eq!(left.read_snapshot(info.id, 0), 1));
            };
            b.cuts(look);
            pause.release();
            cut.join().unwrap();
            b.cuts(|left| {
                assert!(left.pool.snapshot("v", "s").is_some(), "acknowledged");
                look(left);
            });
        });
        b.empties();
    }
}

#[test]
fn m_mount_and_revert_after_a_grow_have_the_size_of_the_snapshot() {
    let b = bench();
    // Not a multiple of the grain: growing completes the last grain.
    let small = PAGE + 3 * GRAIN + 1024;
    let v = b.volume("v", small);
    fill(&v, 0, 1, 1);
    v.write(small - 1024, &[1; 1024], false).unwrap();
    let snapshot = b.snapshot(&[&v], "s");
    v.grow(4 * PAGE).unwrap();
    let mut beyond = [0xee; 512];
    v.read(small, &mut beyond).unwrap();
    assert_eq!(beyond, [0; 512], "what a grow adds reads as zeroes");
    fill(&v, 3 * PAGE, 1, 2);
    v.write(small, &[2; 512], false).unwrap();
    b.cuts(|left| {
        let spec = CloneSpec {
            name: "mount".into(),
            read_only: false,
            attributes: Vec::new(),
        };
        let mount = left.pool.clone_snapshot(snapshot.id, &spec).unwrap();
        assert_eq!(mount.size_bytes(), small);
        assert!(mount.read(small, &mut [0; 512]).is_err(), "beyond the end");
        mount.grow(4 * PAGE).unwrap();
        assert_eq!(read(&mount, 3 * PAGE), 0);
        let mut beyond = [0xee; 512];
        mount.read(small, &mut beyond).unwrap();
        assert_eq!(beyond, [0; 512]);
    });
    b.pool.revert(v.id(), snapshot.id).unwrap();
    assert_eq!((v.size_bytes(), b.named("v").size_bytes()), (small, small));
    b.cuts(|left| {
        let v = left.named("v");
        assert_eq!(v.size_bytes(), small);
        v.grow(4 * PAGE).unwrap();
        assert_eq!(
            (read(&v, 0), read(&v, 3 * PAGE)),
            (1, 0),
            "what was beyond the end is gone for good"
        );
    });
    b.jobs();
    b.check();
    b.empties();
}

#[test]
fn n_a_grain_given_back_is_not_written_before_its_release_is_durable() {
    // §8.7: free and allocate within one group must not touch a grain that the last durable map shows.
    let b = bench();
    let v = b.volume("v", 2 * PAGE);
    let w = b.volume("w", 8 * PAGE);
    fill(&v, 0, 64, 1);
    v.flush().unwrap();
    v.unmap(&[(0, PAGE)]).unwrap();
    for grain in 0..400 {
        fill(&w, grain * GRAIN, 1, 0xbb);
        if grain % 40 == 0 {
            b.cuts(|left| assert!([0, 1].contains(&read(&left.named("v"), 0))));
        }
    }
    b.empties();
}
