//! Tombstones: very large ranges that read as zeroes at once. The model test makes them at random, with cuts and faults.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::sync::Arc;

use stillpoint_snapshot::sim::{Loss, Rng, World};
use stillpoint_snapshot::{
    CloneSpec, CopySource, DiffTo, ExtentKind, Pool, PoolOptions, SnapshotInfo, SnapshotSpec, Volume,
    VolumeSpec, check_media, dump_meta, restore_meta,
};

const GRAIN: u64 = 4096;
const PAGE: u64 = 64 * GRAIN;
const SIZE: u64 = 8 * PAGE;

struct Bench {
    world: World,
    pool: Pool,
}

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        job_pages: 2,
        checkpoint_txgs: 3,
        tombstone_bytes: 2 * PAGE,
        ..PoolOptions::default()
    }
}

fn bench() -> Bench {
    let world = World::new();
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options());
    Bench {
        pool: pool.unwrap(),
        world,
    }
}

fn open(world: World) -> Bench {
    let pool = Pool::open_with(Arc::new(world.disk()), Box::new(world.meta()), &options());
    Bench {
        pool: pool.unwrap(),
        world,
    }
}

fn byte(volume: &Volume, offset: u64) -> u8 {
    let mut bytes = [0xee; GRAIN as usize];
    volume.read(offset, &mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == bytes[0]), "a torn grain at {offset}");
    bytes[0]
}

fn fill(volume: &Volume, offset: u64, grains: u64, byte: u8) {
    let data = vec![byte; (grains * GRAIN) as usize];
    volume.write(offset, &data, false).unwrap();
}

impl Bench {
    fn volume(&self, name: &str) -> Volume {
        let spec = VolumeSpec {
            name: name.into(),
            size_bytes: SIZE,
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

    fn clone(&self, of: &SnapshotInfo, name: &str) -> Volume {
        let spec = CloneSpec {
            name: name.into(),
            read_only: false,
            attributes: Vec::new(),
        };
        self.pool.clone_snapshot(of.id, &spec).unwrap()
    }

    fn shows(&self, snapshot: &SnapshotInfo, offset: u64) -> u8 {
        let mut bytes = [0xee; GRAIN as usize];
        self.pool.read_snapshot(snapshot.id, offset, &mut bytes).unwrap();
        bytes[0]
    }

    fn jobs(&self) {
        while self.pool.run_jobs(8).unwrap() > 0 {}
        self.pool.commit_now().unwrap();
    }

    fn check(&self) {
        self.pool.commit_now().unwrap();
        let still = self.world.after_cut(Loss::Nothing, &mut Rng::new(0));
        let report = check_media(&still.disk(), &mut still.meta()).unwrap();
        assert!(report.is_clean(), "{report}");
    }

    fn grains(&self) -> u64 {
        self.pool.stats().allocated_bytes / GRAIN
    }

    /// What every kind of power cut at this moment leaves, before and after all jobs.
    fn cuts(&self, look: impl Fn(&Self)) {
        self.check();
        for (seed, loss) in (0..).zip([Loss::All, Loss::Nothing, Loss::Random]) {
            let left = open(self.world.after_cut(loss, &mut Rng::new(seed)));
            left.check();
            look(&left);
            left.pool.run_jobs(1).unwrap();
            left.check();
            look(&left);
            left.jobs();
            left.check();
            look(&left);
        }
    }
}

#[test]
fn j2_a_large_unmap_is_there_at_once_for_head_snapshots_and_clones_but_not_for_older_ones() {
    let b = bench();
    let a = b.volume("a");
    fill(&a, 0, SIZE / GRAIN, 1);
    let before = b.snapshot(&a, "before");
    fill(&a, PAGE, 1, 2);
    a.unmap(&[(GRAIN / 2, SIZE - GRAIN)]).unwrap();
    assert_eq!(b.pool.stats().jobs, 1, "the pages are still to be done");
    let status = a.lba_status(GRAIN, SIZE - 2 * GRAIN, 9).unwrap();
    assert_eq!((status.len(), status[0].kind), (1, ExtentKind::Hole));
    let after = b.snapshot(&a, "after");
    let c = b.clone(&after, "c");
    // Partial writes on both sides of the snapshot merge zeroes.
    a.write(3 * PAGE + 512, &[7; 512], false).unwrap();
    c.write(4 * PAGE + 512, &[8; 512], false).unwrap();
    let look = |b: &Bench| {
        let (a, c) = (b.pool.volume("a").unwrap(), b.pool.volume("c").unwrap());
        for volume in [&a, &c] {
            assert_eq!(
                [byte(volume, PAGE), byte(volume, 5 * PAGE), byte(volume, 7 * PAGE)],
                [0; 3]
            );
        }
        let mut grain = [0xee; GRAIN as usize];
        a.read(3 * PAGE, &mut grain).unwrap();
        assert!(grain[..512] == [0; 512] && grain[1024..] == [0; 3072]);
        c.read(4 * PAGE, &mut grain).unwrap();
        assert!(grain[..512] == [0; 512] && grain[1024..] == [0; 3072]);
        let shows = |name: &str, at: u64| b.shows(&b.pool.snapshot("a", name).unwrap(), at);
        assert_eq!((shows("before", PAGE), shows("before", 3 * PAGE)), (1, 1));
        assert_eq!((shows("after", PAGE), shows("after", 3 * PAGE)), (0, 0));
        let from = Some(b.pool.snapshot("a", "before").unwrap().id);
        let to = DiffTo::Snapshot(b.pool.snapshot("a", "after").unwrap().id);
        let changed: u64 = b.pool.diff(from, to).unwrap().iter().map(|e| e.len).sum();
        assert_eq!(changed, SIZE, "the diff knows what is not worked through yet");
    };
    look(&b);
    b.cuts(look);
    // Text and back, with the job in flight.
    let still = b.world.after_cut(Loss::Nothing, &mut Rng::new(0));
    let mut text = Vec::new();
    dump_meta(&mut still.meta(), &mut text).unwrap();
    let restored = World::new();
    restore_meta(&mut text.as_slice(), &mut restored.meta()).unwrap();
    assert!(
        check_media(&still.disk(), &mut restored.meta())
            .unwrap()
            .is_clean()
    );
    b.jobs();
    look(&b);
    b.pool.delete_snapshot(before.id).unwrap();
    b.jobs();
    b.check();
    // The two half grains at the ends (a and its clone share them), and one in each of a and c.
    assert_eq!(b.grains(), 4);
}

#[test]
fn zeroes_stay_zeroes_and_holes_stay_holes() {
    let b = bench();
    let a = b.volume("a");
    fill(&a, 0, 3 * 64, 1);
    a.write_zeroes(0, SIZE, false).unwrap();
    let kinds = |a: &Volume| {
        let status = a.lba_status(0, SIZE, 9).unwrap();
        status.iter().map(|e| (e.kind, e.len / PAGE)).collect::<Vec<_>>()
    };
    let expected = [(ExtentKind::Zero, 3), (ExtentKind::Hole, 5)];
    assert_eq!(kinds(&a), expected);
    b.jobs();
    b.check();
    assert_eq!((kinds(&a), b.grains()), (expected.to_vec(), 0));
    assert_eq!(a.info().unwrap().mapped_bytes, 0, "the count has followed");
}

#[test]
fn many_at_once_revert_delete_grow_and_copies_give_everything_back() {
    let b = bench();
    let (a, c) = (b.volume("a"), b.volume("c"));
    // More than may be at once: the last ones are worked through before they are answered.
    for n in 0..20u8 {
        fill(&a, 0, SIZE / GRAIN, n + 1);
        if n % 5 == 0 {
            b.snapshot(&a, &format!("s{n}"));
        }
        let at = u64::from(n % 4) * PAGE;
        a.unmap(&[(at, 4 * PAGE)]).unwrap();
        assert_eq!((byte(&a, at), byte(&a, at + 4 * PAGE - GRAIN)), (0, 0));
    }
    c.copy(0, &CopySource::Volume(&a), 0, SIZE).unwrap();
    a.unmap(&[(0, SIZE)]).unwrap();
    assert_eq!((byte(&c, 7 * PAGE), byte(&c, 4 * PAGE)), (20, 0));
    let s5 = b.pool.snapshot("a", "s5").unwrap();
    b.pool.revert(a.id(), s5.id).unwrap();
    assert_eq!(byte(&a, 7 * PAGE), 6);
    a.grow(SIZE + PAGE).unwrap();
    a.unmap(&[(0, SIZE + PAGE)]).unwrap();
    b.cuts(|left| {
        let c = left.pool.volume("c").unwrap();
        assert_eq!((byte(&c, 7 * PAGE), byte(&c, 4 * PAGE)), (20, 0));
    });
    b.pool.delete_volume("a", true).unwrap();
    b.jobs();
    b.check();
    assert_eq!(byte(&c, 7 * PAGE), 20);
    b.pool.delete_volume("c", false).unwrap();
    b.jobs();
    b.check();
    assert_eq!((b.grains(), b.pool.stats().jobs), (0, 0));
}
