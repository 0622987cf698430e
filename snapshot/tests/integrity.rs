//! Checksums of grains: recorded when they should be, verified by every read, never wrong by a race; bad data is an error
//! for its own range only, is listed, survives a restart and heals.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use stillpoint_snapshot::disk::Disk;
use stillpoint_snapshot::sim::{Call, Failure, Fault, Loss, Rng, World};
use stillpoint_snapshot::{
    BadData, Checksums, CloneSpec, Error, Pool, PoolOptions, SnapshotInfo, SnapshotSpec, StoreEvent, Volume,
    VolumeSpec, check_media,
};

use common::gate::Gate;

struct Bench {
    world: World,
    gate: Gate,
    pool: Pool,
    grain: usize,
}

fn options(gate: &Gate, grain: usize) -> PoolOptions {
    PoolOptions {
        manual: true,
        grain_bytes: grain as u32,
        ballast_bytes: 0,
        min_free_bytes: 0,
        job_pages: 1,
        hooks: Some(Arc::new(gate.clone())),
        ..PoolOptions::default()
    }
}

/// Sectors that say which they are, so that a grain can be found in the data file.
fn content(tag: u8, offset: usize, len: usize) -> Vec<u8> {
    let sector = |n: usize| {
        let mut bytes = [tag; 512];
        bytes[..8].copy_from_slice(&(n as u64).to_be_bytes());
        bytes
    };
    (offset / 512..(offset + len) / 512).flat_map(sector).collect()
}

impl Bench {
    fn new(grain: usize) -> Self {
        let (world, gate) = (World::new(), Gate::default());
        let pool = Pool::create_with(
            Arc::new(world.disk()),
            Box::new(world.meta()),
            &options(&gate, grain),
        )
        .unwrap();
        Self {
            world,
            gate,
            pool,
            grain,
        }
    }

    /// The same pool after a power cut that took nothing.
    fn reopened(&self) -> Self {
        self.pool.commit_now().unwrap();
        let (world, gate) = (
            self.world.after_cut(Loss::Nothing, &mut Rng::new(1)),
            Gate::default(),
        );
        let pool = Pool::open_with(
            Arc::new(world.disk()),
            Box::new(world.meta()),
            &options(&gate, self.grain),
        )
        .unwrap();
        Self {
            world,
            gate,
            pool,
            grain: self.grain,
        }
    }

    fn volume(&self, name: &str, mode: Checksums) -> Volume {
        let spec = VolumeSpec {
            name: name.into(),
            size_bytes: 200 * self.grain as u64,
            block_size: 512,
            attributes: Vec::new(),
        };
        let volume = self.pool.create_volume(&spec).unwrap();
        volume.set_checksums(mode).unwrap();
        assert_eq!(volume.info().unwrap().checksums, mode);
        volume
    }

    fn fill(&self, volume: &Volume, grains: std::ops::Range<usize>, tag: u8) {
        let (at, len) = (grains.start * self.grain, grains.len() * self.grain);
        volume.write(at as u64, &content(tag, at, len), false).unwrap();
    }

    fn snapshot(&self, volume: &Volume, name: &str) -> SnapshotInfo {
        let spec = SnapshotSpec {
            name: name.into(),
            ..SnapshotSpec::default()
        };
        let cut = self.pool.begin_cut(&[volume.id()], &spec).unwrap();
        cut.commit().unwrap().remove(0)
    }

    fn seal(&self) {
        while self.pool.run_sealing(8).unwrap() == 8 {}
        self.pool.commit_now().unwrap();
    }

    fn jobs(&self) {
        while self.pool.run_jobs(8).unwrap() > 0 {}
        self.pool.commit_now().unwrap();
    }

    /// Places in the data file where a grain with this content is.
    fn places(&self, tag: u8, grain: usize) -> Vec<u64> {
        let wanted = content(tag, grain * self.grain, self.grain);
        let disk = self.world.disk();
        let mut bytes = vec![0; self.grain];
        let all = 0..disk.size().unwrap().div_ceil(self.grain as u64);
        all.map(|g| g * self.grain as u64)
            .filter(|at| {
                disk.read_at(*at, &mut bytes).unwrap();
                bytes == wanted
            })
            .collect()
    }

    /// Flips one bit of a grain in the data file.
    fn rot(&self, tag: u8, grain: usize, byte: usize) {
        let places = self.places(tag, grain);
        assert_eq!(places.len(), 1, "grain {grain} with {tag}");
        let (disk, at) = (self.world.disk(), places[0] + byte as u64);
        let mut one = [0];
        disk.read_at(at, &mut one).unwrap();
        disk.write_at(at, &[one[0] ^ 0x10]).unwrap();
    }

    fn expect(&self, volume: &Volume, grains: std::ops::Range<usize>, tag: u8) {
        let (at, len) = (grains.start * self.grain, grains.len() * self.grain);
        let mut bytes = vec![0; len];
        volume.read(at as u64, &mut bytes).unwrap();
        assert!(bytes == content(tag, at, len), "grains {grains:?}");
        bytes.fill(0);
        if volume.try_read(at as u64, &mut bytes).unwrap() {
            assert!(bytes == content(tag, at, len), "grains {grains:?}, tried");
        }
    }

    fn expect_snapshot(&self, snapshot: &SnapshotInfo, grains: std::ops::Range<usize>, tag: u8) {
        let (at, len) = (grains.start * self.grain, grains.len() * self.grain);
        let mut bytes = vec![0; len];
        self.pool
            .read_snapshot(snapshot.id, at as u64, &mut bytes)
            .unwrap();
        assert!(
            bytes == content(tag, at, len),
            "grains {grains:?} of {}",
            snapshot.name
        );
    }

    fn listed(&self) -> Vec<(String, Option<String>, u64, u64)> {
        let row = |b: BadData| (b.volume_name, b.snapshot.map(|(_, n)| n), b.offset, b.len);
        self.pool.bad_data(None).unwrap().into_iter().map(row).collect()
    }

    fn check(&self) -> Vec<String> {
        let still = self.world.after_cut(Loss::Nothing, &mut Rng::new(0));
        let report = check_media(&still.disk(), &mut still.meta()).unwrap();
        report.problems.into_iter().map(|p| p.text).collect()
    }
}

/// First bad byte that a read of the range names; `None` = it was read.
fn bad_byte(volume: &Volume, offset: usize, len: usize) -> Option<u64> {
    let mut bytes = vec![0; len];
    match volume.read(offset as u64, &mut bytes) {
        Ok(()) => None,
        Err(Error::Medium { offset }) => Some(offset),
        Err(other) => panic!("{other}"),
    }
}

fn bad_byte_of(b: &Bench, snapshot: &SnapshotInfo, offset: usize, len: usize) -> Option<u64> {
    let mut bytes = vec![0; len];
    match b.pool.read_snapshot(snapshot.id, offset as u64, &mut bytes) {
        Ok(()) => None,
        Err(Error::Medium { offset }) => Some(offset),
        Err(other) => panic!("{other}"),
    }
}

fn row(
    volume: &str,
    snapshot: Option<&str>,
    offset: usize,
    len: usize,
) -> (String, Option<String>, u64, u64) {
    (
        volume.into(),
        snapshot.map(str::to_owned),
        offset as u64,
        len as u64,
    )
}

#[test]
fn always_verifies_every_read_and_redirects_every_write() {
    for grain in [4096, 16_384] {
        let b = Bench::new(grain);
        let v = b.volume("v", Checksums::Always);
        let told = b.pool.subscribe();
        b.fill(&v, 0..100, 1);
        b.expect(&v, 0..100, 1);
        let before = b.places(1, 7);
        b.fill(&v, 7..8, 2);
        assert_ne!(
            before,
            b.places(2, 7),
            "a grain with a checksum is never overwritten (I5)"
        );
        // A part of a grain: merged, with a checksum of the whole.
        v.write((8 * grain + 512) as u64, &content(3, 8 * grain + 512, 512), false)
            .unwrap();
        assert_eq!(bad_byte(&v, 0, 100 * grain), None);
        b.pool.commit_now().unwrap();
        assert!(b.check().is_empty());

        b.rot(1, 20, grain - 1);
        b.rot(1, 22, 0);
        for b in [&b, &b.reopened()] {
            let v = b.pool.volume("v").unwrap();
            assert_eq!(bad_byte(&v, 19 * grain, 10 * grain), Some(20 * grain as u64));
            assert_eq!(bad_byte(&v, 20 * grain + 512, 512), Some(20 * grain as u64 + 512));
            assert_eq!(bad_byte(&v, 21 * grain, grain), None, "its neighbour is read");
            assert_eq!(bad_byte(&v, 22 * grain, 512), Some(22 * grain as u64));
            let mut one = [0; 512];
            assert!(!v.try_read(20 * grain as u64, &mut one).unwrap());
            assert_eq!(
                b.listed(),
                [
                    row("v", None, 20 * grain, grain),
                    row("v", None, 22 * grain, grain)
                ]
            );
            assert_eq!(b.pool.stats().bad_grains, 2);
        }
        assert_eq!(b.check().len(), 2, "{:?}", b.check());
        let events: Vec<_> = told.try_iter().collect();
        let bad = |n: usize| StoreEvent::BadData {
            volume: Some(v.id()),
            offset: (n * grain) as u64,
        };
        assert_eq!(events, [bad(20), bad(22)], "each is told once");

        // A part cannot be merged into what cannot be read; the whole grain can be written, or unmapped.
        let part = v.write((20 * grain + 1024) as u64, &[9; 512], false);
        assert!(matches!(part, Err(Error::Medium { offset }) if offset == (20 * grain + 1024) as u64));
        b.fill(&v, 20..21, 4);
        v.unmap(&[((22 * grain) as u64, grain as u64)]).unwrap();
        assert_eq!(bad_byte(&v, 0, 100 * grain), None);
        assert!(b.listed().is_empty());
        b.pool.commit_now().unwrap();
        assert!(
            told.try_iter()
                .any(|e| e == StoreEvent::BadDataGone { grains: 2 })
        );
        assert_eq!(b.reopened().pool.stats().bad_grains, 0);
        assert!(b.check().is_empty());
    }
}

#[test]
fn sealed_data_is_verified_in_the_head_the_snapshot_and_the_clone() {
    let b = Bench::new(4096);
    let v = b.volume("v", Checksums::Sealed);
    b.fill(&v, 0..100, 1);
    // Nothing holds it, nothing is recorded: what rots here is not found.
    let s1 = b.snapshot(&v, "one");
    b.fill(&v, 10..20, 2);
    let s2 = b.snapshot(&v, "two");
    let spec = CloneSpec {
        name: "c".into(),
        read_only: false,
        attributes: Vec::new(),
    };
    let clone = b.pool.clone_snapshot(s1.id, &spec).unwrap();
    b.fill(&clone, 50..51, 3);
    b.fill(&v, 60..61, 4);
    b.seal();
    let all = b.pool.snapshots(None);
    assert!(all.iter().all(|s| s.sealed), "{all:?}");
    assert_eq!(b.pool.run_sealing(3).unwrap(), 0, "done");
    assert!(b.check().is_empty());
    b.expect_snapshot(&s1, 0..100, 1);
    b.rot(1, 5, 77);
    b.rot(2, 15, 78);
    for b in [&b, &b.reopened()] {
        let (v, c) = (b.pool.volume("v").unwrap(), b.pool.volume("c").unwrap());
        assert_eq!(bad_byte_of(b, &s1, 0, 100 * 4096), Some(5 * 4096));
        assert_eq!(bad_byte_of(b, &s1, 6 * 4096, 94 * 4096), None);
        assert_eq!(bad_byte_of(b, &s2, 6 * 4096, 94 * 4096), Some(15 * 4096));
        assert_eq!(bad_byte(&v, 0, 200 * 4096), Some(5 * 4096));
        assert_eq!(bad_byte(&v, 6 * 4096, 94 * 4096), Some(15 * 4096));
        assert_eq!(
            bad_byte(&c, 0, 200 * 4096),
            Some(5 * 4096),
            "a clone sees its parent's"
        );
        assert_eq!(
            b.listed(),
            [
                row("v", None, 5 * 4096, 4096),
                row("v", None, 15 * 4096, 4096),
                row("v", Some("one"), 5 * 4096, 4096),
                row("v", Some("two"), 5 * 4096, 4096),
                row("v", Some("two"), 15 * 4096, 4096),
                row("c", None, 5 * 4096, 4096),
            ]
        );
    }
    // The head heals, its history does not.
    b.fill(&v, 0..20, 5);
    b.fill(&clone, 0..20, 6);
    assert_eq!(
        (bad_byte(&v, 0, 100 * 4096), bad_byte(&clone, 0, 100 * 4096)),
        (None, None)
    );
    assert_eq!(
        b.listed(),
        [
            row("v", Some("one"), 5 * 4096, 4096),
            row("v", Some("two"), 5 * 4096, 4096),
            row("v", Some("two"), 15 * 4096, 4096)
        ]
    );
    b.pool.delete_snapshot(s2.id).unwrap();
    b.jobs();
    assert_eq!(b.listed(), [row("v", Some("one"), 5 * 4096, 4096)]);
    assert_eq!(
        b.pool.stats().bad_grains,
        1,
        "the other one's last placement went"
    );
    b.pool.delete_snapshot(s1.id).unwrap();
    b.pool.delete_volume("c", true).unwrap();
    b.jobs();
    assert_eq!((b.listed().len(), b.pool.stats().bad_grains), (0, 0));
    assert!(b.check().is_empty());
}

#[test]
fn what_was_sealed_is_not_overwritten_after_its_snapshot_went() {
    let b = Bench::new(4096);
    let v = b.volume("v", Checksums::Sealed);
    b.fill(&v, 0..10, 1);
    let s = b.snapshot(&v, "s");
    b.seal();
    b.pool.delete_snapshot(s.id).unwrap();
    b.jobs();
    let place = b.places(1, 3);
    b.fill(&v, 3..4, 2);
    assert_ne!(b.places(2, 3), place, "the head's entry has the checksum (I5)");
    b.pool.commit_now().unwrap();
    // Its new grain has none, and nothing holds it.
    let place = b.places(2, 3);
    b.fill(&v, 3..4, 3);
    assert_eq!(b.places(3, 3), place);
    b.expect(&v, 0..3, 1);
    assert!(b.check().is_empty() && b.reopened().check().is_empty());
}

/// snapshot-store.md §8.0 g.
#[test]
fn sealing_that_races_delete_and_overwrite_gives_no_false_error() {
    let b = Bench::new(4096);
    let v = b.volume("v", Checksums::Sealed);
    b.fill(&v, 0..20, 1);
    let s = b.snapshot(&v, "s");
    b.fill(&v, 0..1, 2);
    std::thread::scope(|scope| {
        let pause = b.gate.arm("seal.read");
        let sealer = scope.spawn(|| b.pool.run_sealing(1).unwrap());
        pause.wait();
        // The bytes were read, nothing is recorded yet. The snapshot goes, the head writes: as long as the sealer is
        // between the two, it holds what it has read.
        b.pool.delete_snapshot(s.id).unwrap();
        let job = scope.spawn(|| b.pool.run_jobs(1).unwrap());
        std::thread::sleep(Duration::from_millis(60));
        assert!(!job.is_finished(), "a job does not end the hold meanwhile");
        b.fill(&v, 4..8, 3);
        assert_eq!(b.places(1, 5).len(), 1, "still held: written elsewhere");
        pause.release();
        sealer.join().unwrap();
        job.join().unwrap();
    });
    b.fill(&v, 8..12, 4);
    for b in [&b, &b.reopened()] {
        let v = b.pool.volume("v").unwrap();
        b.expect(&v, 0..1, 2);
        b.expect(&v, 1..4, 1);
        b.expect(&v, 4..8, 3);
        b.expect(&v, 8..12, 4);
        b.jobs();
        b.seal();
        b.expect(&v, 12..20, 1);
        assert!(b.check().is_empty(), "{:?}", b.check());
    }
    // Power cuts at any later moment leave neither a checksum of bytes that changed nor bytes without an owner.
    for seed in 0..12 {
        let losses = [Loss::All, Loss::Nothing, Loss::Random];
        let pair = (losses[seed % 3], losses[seed / 3 % 3]);
        let left = b.world.after_cuts(pair.0, pair.1, &mut Rng::new(seed as u64));
        let report = check_media(&left.disk(), &mut left.meta()).unwrap();
        assert!(report.is_clean(), "{report}");
    }
}

#[test]
fn sealing_after_the_last_step_of_a_job_revives_nothing() {
    let b = Bench::new(4096);
    let v = b.volume("v", Checksums::Sealed);
    b.fill(&v, 0..130, 1);
    let one = b.snapshot(&v, "one");
    b.fill(&v, 0..130, 2);
    let two = b.snapshot(&v, "two");
    b.fill(&v, 0..130, 3);
    b.pool.delete_snapshot(one.id).unwrap();
    std::thread::scope(|scope| {
        // The job has removed versions in RAM; its commit has not come yet.
        let pause = b.gate.arm("commit.closed");
        let job = scope.spawn(|| b.jobs());
        pause.wait();
        let sealer = scope.spawn(|| b.seal());
        std::thread::sleep(Duration::from_millis(30));
        pause.release();
        job.join().unwrap();
        sealer.join().unwrap();
    });
    b.jobs();
    b.seal();
    b.expect_snapshot(&two, 0..130, 2);
    b.expect(&v, 0..130, 3);
    assert!(b.check().is_empty(), "{:?}", b.check());
    b.pool.delete_volume("v", true).unwrap();
    b.jobs();
    assert_eq!(b.pool.stats().allocated_bytes, 0);
}

#[test]
fn the_mode_counts_for_later_writes_and_survives() {
    let b = Bench::new(4096);
    let v = b.volume("v", Checksums::Off);
    b.fill(&v, 0..10, 1);
    let s = b.snapshot(&v, "s");
    b.seal();
    assert!(
        !b.pool.snapshot_by_id(s.id).unwrap().sealed,
        "off: nothing is recorded"
    );
    b.rot(1, 2, 1);
    assert_eq!(bad_byte(&v, 0, 10 * 4096), None, "and nothing is found");
    v.set_checksums(Checksums::Always).unwrap();
    b.fill(&v, 4..5, 2);
    let place = b.places(2, 4);
    b.fill(&v, 4..5, 3);
    assert_ne!(b.places(3, 4), place);
    let r = b.reopened();
    assert_eq!(r.pool.volume("v").unwrap().checksums(), Checksums::Always);
    v.set_checksums(Checksums::Off).unwrap();
    b.rot(3, 4, 9);
    assert_eq!(
        bad_byte(&v, 4 * 4096, 4096),
        Some(4 * 4096),
        "what is recorded is verified"
    );
    b.fill(&v, 4..5, 4);
    let place = b.places(4, 4);
    b.fill(&v, 4..5, 5);
    assert_eq!(b.places(5, 4), place, "in place again");
}

#[test]
fn a_read_error_of_the_disk_is_the_same_trouble() {
    let b = Bench::new(4096);
    let v = b.volume("v", Checksums::Off);
    b.fill(&v, 0..10, 1);
    // The read of the run fails, then that of its third grain.
    for nth in [0, 3] {
        b.world.fail(Fault {
            call: Call::Read,
            nth,
            failure: Failure::Io,
            sticky: false,
        });
    }
    assert_eq!(bad_byte(&v, 0, 10 * 4096), Some(2 * 4096));
    b.world.heal();
    assert_eq!(b.listed(), [row("v", None, 2 * 4096, 4096)]);
    b.expect(&v, 0..10, 1);
    let b = b.reopened();
    let v = b.pool.volume("v").unwrap();
    assert_eq!(
        b.listed(),
        [row("v", None, 2 * 4096, 4096)],
        "it stays on the list"
    );
    // Written elsewhere, although nothing holds it; so it is gone from the list.
    let place = b.places(1, 2);
    b.fill(&v, 2..3, 2);
    assert_ne!(b.places(2, 2), place);
    b.pool.commit_now().unwrap();
    assert!(b.listed().is_empty() && b.check().is_empty());
}

#[test]
fn dump_and_restore_keep_checksums_and_bad_grains() {
    let b = Bench::new(4096);
    let v = b.volume("v", Checksums::Always);
    b.fill(&v, 0..70, 1);
    let s = b.snapshot(&v, "s");
    b.seal();
    b.rot(1, 9, 9);
    assert_eq!(bad_byte(&v, 9 * 4096, 512), Some(9 * 4096));
    b.pool.commit_now().unwrap();
    let mut text = Vec::new();
    stillpoint_snapshot::dump_meta(&mut b.world.meta(), &mut text).unwrap();
    let empty = World::new();
    stillpoint_snapshot::restore_meta(&mut text.as_slice(), &mut empty.meta()).unwrap();
    let pool = Pool::open_with(
        Arc::new(b.world.disk()),
        Box::new(empty.meta()),
        &options(&Gate::default(), 4096),
    )
    .unwrap();
    let v = pool.volume("v").unwrap();
    assert_eq!(v.checksums(), Checksums::Always);
    assert!(pool.snapshot_by_id(s.id).unwrap().sealed);
    assert_eq!(pool.stats().bad_grains, 1);
    assert_eq!(bad_byte(&v, 0, 70 * 4096), Some(9 * 4096));
    let mut again = Vec::new();
    pool.commit_now().unwrap();
    stillpoint_snapshot::dump_meta(&mut b.world.meta(), &mut again).unwrap();
    assert_eq!(text, again);
}

#[test]
fn a_data_file_that_was_cut_off_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    let options = PoolOptions {
        ballast_bytes: 0,
        min_free_bytes: 0,
        ..PoolOptions::default()
    };
    let pool = Pool::create(&path, &options).unwrap();
    let spec = VolumeSpec {
        name: "v".into(),
        size_bytes: 1 << 20,
        block_size: 512,
        attributes: Vec::new(),
    };
    let v = pool.create_volume(&spec).unwrap();
    v.write(0, &[7; 40 * 4096], true).unwrap();
    v.unmap(&[(30 * 4096, 10 * 4096)]).unwrap();
    pool.shutdown().unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(path.join("data"))
        .unwrap();
    let whole = file.metadata().unwrap().len();
    // What nothing uses may be missing: nobody reads it.
    file.set_len(whole - 10 * 4096).unwrap();
    Pool::open(&path, &options).unwrap().shutdown().unwrap();
    file.set_len(whole - 11 * 4096).unwrap();
    match Pool::open(&path, &options) {
        Err(Error::Corrupt { what, where_ }) => assert!(where_.contains("cut off"), "{what}: {where_}"),
        other => panic!("{other:?}"),
    }
    assert!(!stillpoint_snapshot::check(&path).unwrap().is_clean());
}
