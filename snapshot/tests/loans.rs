//! Loans: large copies within the pool that are there at once. The model test makes them at random too, with cuts and faults.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillpoint_snapshot::sim::{Loss, Rng, World};
use stillpoint_snapshot::{
    CloneSpec, CopySource, DiffTo, Pool, PoolOptions, SnapshotInfo, SnapshotSpec, Volume, VolumeSpec, check,
    check_media, dump_meta, restore_meta,
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
        loan_bytes: PAGE,
        tombstone_bytes: 3 * PAGE,
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

fn spec(name: &str, size_bytes: u64) -> VolumeSpec {
    VolumeSpec {
        name: name.into(),
        size_bytes,
        block_size: 512,
        attributes: Vec::new(),
    }
}

impl Bench {
    fn volume(&self, name: &str) -> Volume {
        self.pool.create_volume(&spec(name, SIZE)).unwrap()
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
fn a_copy_is_one_point_in_time_for_head_snapshots_and_clones_before_its_pages_are_taken_over() {
    let b = bench();
    let (from, to) = (b.volume("from"), b.volume("to"));
    for page in 0..8u8 {
        fill(&from, u64::from(page) * PAGE, 64, page + 1);
        fill(&to, u64::from(page) * PAGE, 64, 100 + page);
    }
    let old = b.snapshot(&to, "old");
    // Pages 1 to 6 of the source, three grains further on.
    let done = to
        .copy(PAGE + 3 * GRAIN, &CopySource::Volume(&from), PAGE, 6 * PAGE)
        .unwrap();
    assert_eq!((done.referenced_bytes, done.copied_bytes), (6 * PAGE, 0));
    assert_eq!(b.pool.stats().jobs, 1);
    let during = b.snapshot(&to, "during");
    let clone = b.clone(&during, "clone");
    // The source goes on, and so do those that show it.
    fill(&from, 3 * PAGE, 64, 55);
    fill(&to, 4 * PAGE + 9 * GRAIN, 1, 77);
    to.write(5 * PAGE + 512, &[78; 512], false).unwrap();
    to.unmap(&[(2 * PAGE, 4 * GRAIN)]).unwrap();
    fill(&clone, 3 * PAGE, 2, 79);
    let after = b.snapshot(&to, "after");
    b.pool.commit_now().unwrap();
    let ids = (to.name().unwrap(), clone.name().unwrap());
    b.cuts(|b| {
        let (to, clone) = (b.pool.volume(&ids.0).unwrap(), b.pool.volume(&ids.1).unwrap());
        let lent = |offset: u64| u8::try_from((offset - 3 * GRAIN) / PAGE).unwrap() + 1;
        let range = PAGE + 3 * GRAIN..7 * PAGE + 3 * GRAIN;
        for at in (0..SIZE).step_by(GRAIN as usize) {
            let before = 100 + u8::try_from(at / PAGE).unwrap();
            let copied = if range.contains(&at) { lent(at) } else { before };
            assert_eq!(b.shows(&old, at), before, "old at {at}");
            assert_eq!(b.shows(&during, at), copied, "during at {at}");
            if at != 5 * PAGE {
                let head = match at / GRAIN {
                    g if g == 4 * 64 + 9 => 77,
                    g if (128..132).contains(&g) => 0,
                    _ => copied,
                };
                assert_eq!((byte(&to, at), b.shows(&after, at)), (head, head), "head at {at}");
            }
            let expected = if (192..194).contains(&(at / GRAIN)) {
                79
            } else {
                copied
            };
            assert_eq!(byte(&clone, at), expected, "clone at {at}");
        }
        let mut sectors = [0; 1536];
        to.read(5 * PAGE, &mut sectors).unwrap();
        assert_eq!(
            (sectors[0], sectors[512], sectors[1024]),
            (lent(5 * PAGE), 78, lent(5 * PAGE))
        );
        let changed = b.pool.diff(Some(old.id), DiffTo::Snapshot(during.id)).unwrap();
        assert_eq!(
            changed.iter().map(|e| e.len).sum::<u64>(),
            6 * PAGE,
            "{changed:?}"
        );
    });
    // What is dumped in between is restored in between.
    let still = b.world.after_cut(Loss::Nothing, &mut Rng::new(1));
    let mut text = Vec::new();
    dump_meta(&mut still.meta(), &mut text).unwrap();
    let fresh = World::new();
    restore_meta(&mut text.as_slice(), &mut fresh.meta()).unwrap();
    let report = check_media(&still.disk(), &mut fresh.meta()).unwrap();
    assert!(report.is_clean(), "{report}");
    // Everything goes, in the worst order, before its pages were taken over.
    b.pool.delete_volume("from", false).unwrap();
    b.pool.revert(to.id(), during.id).unwrap();
    for snapshot in [&during, &old, &after] {
        b.pool.delete_snapshot(snapshot.id).unwrap();
        b.check();
    }
    assert_eq!(byte(&to, 3 * PAGE + 3 * GRAIN), 4);
    b.jobs();
    b.check();
    assert_eq!((byte(&to, 3 * PAGE + 3 * GRAIN), byte(&clone, 3 * PAGE)), (4, 79));
    b.pool.delete_volume("clone", false).unwrap();
    to.unmap(&[(0, SIZE)]).unwrap();
    b.jobs();
    b.check();
    assert_eq!((b.grains(), b.pool.stats().snapshots), (0, 0));
}

#[test]
fn a_copy_in_pieces_is_one_loan_and_a_chain_of_loans_is_bounded() {
    let b = bench();
    let (from, to) = (b.volume("from"), b.volume("to"));
    for page in 0..8u8 {
        fill(&from, u64::from(page) * PAGE, 64, page + 1);
    }
    let pin = from.pin().unwrap();
    // Pieces that meet within a page.
    for at in (0..SIZE).step_by(2 * PAGE as usize) {
        let (begin, end) = (at.saturating_sub(GRAIN), at + 2 * PAGE - GRAIN);
        to.copy(begin, &CopySource::Pin(&pin), begin, end - begin)
            .unwrap();
    }
    assert_eq!(b.pool.stats().loans, 1);
    drop(pin);
    let pages = |v: &Volume| (0..7).map(|p| byte(v, p * PAGE)).collect::<Vec<_>>();
    assert_eq!(pages(&to), (1..=7).collect::<Vec<_>>());
    let mut chain = vec![to];
    for n in 0..7 {
        let next = b.volume(&format!("n{n}"));
        next.copy(GRAIN, &CopySource::Volume(chain.last().unwrap()), 0, 7 * PAGE)
            .unwrap();
        chain.push(next);
    }
    // The fifth would follow four others: it was done at once, and the chain begins anew above it.
    assert_eq!(b.pool.stats().loans, 4 + 3);
    b.cuts(|b| {
        for n in 0..7u64 {
            let v = b.pool.volume(&format!("n{n}")).unwrap();
            assert_eq!(byte(&v, 2 * PAGE + (n + 1) * GRAIN), 3, "link {n}");
        }
    });
    // Onto itself, shifted: each grain is read before it is copied over.
    let last = chain.pop().unwrap();
    let before: Vec<u8> = (0..SIZE / GRAIN).map(|g| byte(&last, g * GRAIN)).collect();
    last.copy(PAGE - GRAIN, &CopySource::Volume(&last), 0, 7 * PAGE)
        .unwrap();
    b.jobs();
    b.check();
    for g in 63..63 + 7 * 64 {
        assert_eq!(byte(&last, g as u64 * GRAIN), before[g - 63], "grain {g}");
    }
}

/// What a volume or a snapshot shows: a byte for each grain.
type Shown = Vec<u8>;

/// Plain bytes beside the pool; every kind of operation on and from ranges that are lent.
struct Plain {
    b: Bench,
    heads: BTreeMap<String, Shown>,
    /// Name, volume, content.
    snapshots: Vec<(String, String, Shown)>,
    made: u32,
}

const GRAINS: usize = (SIZE / GRAIN) as usize;

impl Plain {
    fn handle(&self, name: &str) -> Volume {
        self.b.pool.volume(name).unwrap()
    }

    fn info(&self, at: usize) -> SnapshotInfo {
        let (name, volume, _) = &self.snapshots[at];
        self.b.pool.snapshot(volume, name).unwrap()
    }

    fn range(rng: &mut Rng) -> Range<usize> {
        let len = if rng.chance(60) {
            1 + rng.index(5)
        } else {
            1 + rng.index(GRAINS)
        };
        let first = rng.index(GRAINS - len + 1);
        first..first + len
    }

    fn step(&mut self, rng: &mut Rng, n: u8) {
        let names: Vec<String> = self.heads.keys().cloned().collect();
        let name = rng.pick(&names).unwrap().clone();
        let volume = self.handle(&name);
        let range = Self::range(rng);
        let (offset, len) = (range.start as u64 * GRAIN, range.len() as u64 * GRAIN);
        let head = self.heads.get_mut(&name).unwrap();
        let kind = rng.below(20);
        println!(
            "step {n}: {kind} on {name} {range:?}; {:?}",
            self.b.pool.stats().loans
        );
        match kind {
            0..4 => {
                fill(&volume, offset, range.len() as u64, n);
                head[range].fill(n);
            }
            4 => {
                volume.write_zeroes(offset, len, rng.chance(50)).unwrap();
                head[range].fill(0);
            }
            5..11 => {
                let len = if rng.chance(80) {
                    64 + rng.index(GRAINS - 64)
                } else {
                    range.len()
                };
                let (to, at) = (rng.index(GRAINS - len + 1), rng.index(GRAINS - len + 1));
                let other = rng.pick(&names).unwrap().clone();
                let snapshot =
                    (!self.snapshots.is_empty() && rng.chance(40)).then(|| rng.index(self.snapshots.len()));
                let handle = self.handle(&other);
                let (source, shown) = match snapshot {
                    Some(s) => (CopySource::Snapshot(self.info(s).id), self.snapshots[s].2.clone()),
                    None => (CopySource::Volume(&handle), self.heads[&other].clone()),
                };
                println!("copy {len} to {to} from {other} or {snapshot:?} {at}");
                volume
                    .copy(to as u64 * GRAIN, &source, at as u64 * GRAIN, len as u64 * GRAIN)
                    .unwrap();
                self.heads.get_mut(&name).unwrap()[to..to + len].copy_from_slice(&shown[at..at + len]);
            }
            11..13 if self.snapshots.len() < 6 => {
                self.made += 1;
                let made = format!("s{}", self.made);
                self.b.snapshot(&volume, &made);
                self.snapshots
                    .push((made, name.clone(), self.heads[&name].clone()));
            }
            13 if !self.snapshots.is_empty() && self.heads.len() < 5 => {
                let at = rng.index(self.snapshots.len());
                self.made += 1;
                let made = format!("c{}", self.made);
                self.b.clone(&self.info(at), &made);
                self.heads.insert(made, self.snapshots[at].2.clone());
            }
            14 => {
                let own = (0..self.snapshots.len()).filter(|s| self.snapshots[*s].1 == name);
                let own: Vec<usize> = own.collect();
                if let Some(at) = rng.pick(&own).copied()
                    && self.b.pool.revert(volume.id(), self.info(at).id).is_ok()
                {
                    self.heads.insert(name, self.snapshots[at].2.clone());
                }
            }
            15 if !self.snapshots.is_empty() => {
                let at = rng.index(self.snapshots.len());
                self.b.pool.delete_snapshot(self.info(at).id).unwrap();
                self.snapshots.remove(at);
            }
            16 if self.heads.len() > 2 && !self.snapshots.iter().any(|(_, v, _)| *v == name) => {
                self.b.pool.delete_volume(&name, false).unwrap();
                self.heads.remove(&name);
            }
            17 => {
                // What was overwritten in place is in no commit.
                volume.flush().unwrap();
                let loss = [Loss::All, Loss::Nothing, Loss::Random][rng.index(3)];
                let world = self.b.world.after_cut(loss, rng);
                self.b = open(world);
            }
            18 => drop(self.b.pool.run_sealing(2).unwrap()),
            _ => drop(self.b.pool.run_jobs(1 + rng.index(3)).unwrap()),
        }
    }

    fn compare(&self, what: &str) {
        let grains = |bytes: Vec<u8>| bytes.chunks(GRAIN as usize).map(|g| g[0]).collect::<Shown>();
        for (name, shown) in &self.heads {
            let mut bytes = vec![0xee; SIZE as usize];
            self.handle(name).read(0, &mut bytes).unwrap();
            same(&grains(bytes), shown, &format!("{what}: volume {name}"));
        }
        for (at, (name, volume, shown)) in self.snapshots.iter().enumerate() {
            let mut bytes = vec![0xee; SIZE as usize];
            self.b
                .pool
                .read_snapshot(self.info(at).id, 0, &mut bytes)
                .unwrap();
            same(
                &grains(bytes),
                shown,
                &format!("{what}: snapshot {name} of {volume}"),
            );
        }
    }
}

fn same(found: &Shown, expected: &Shown, what: &str) {
    let wrong = found
        .iter()
        .zip(expected)
        .enumerate()
        .filter(|(_, (a, b))| a != b);
    let wrong: Vec<_> = wrong.map(|(at, (a, b))| (at, *a, *b)).collect();
    assert!(wrong.is_empty(), "{what}: (grain, found, expected) {wrong:?}");
}

/// `STILLPOINT_SOAK_LOANS=1000` runs as many.
#[test]
fn whatever_happens_to_lent_ranges_is_what_copying_the_bytes_would_be() {
    let seeds = std::env::var("STILLPOINT_SOAK_LOANS").map_or(25, |n| n.parse().unwrap());
    let mut loans = 0;
    let first = std::env::var("STILLPOINT_SEED").map_or(0, |n| n.parse().unwrap());
    for seed in first..first + seeds {
        let mut rng = Rng::new(seed);
        // In the message of a failure.
        println!("seed {seed}");
        let mut plain = Plain {
            b: bench(),
            heads: BTreeMap::new(),
            snapshots: Vec::new(),
            made: 0,
        };
        for name in ["a", "b"] {
            plain.b.volume(name);
            plain.heads.insert(name.into(), vec![0; GRAINS]);
        }
        for n in 0..60 {
            plain.step(&mut rng, n + 1);
            loans += plain.b.pool.stats().loans;
            if n % 3 == 0 || std::env::var_os("STILLPOINT_SEED").is_some() {
                plain.compare(&format!("seed {seed} step {n}"));
            }
            if n % 6 == 0 {
                plain.b.check();
            }
        }
        plain.b.jobs();
        plain.compare(&format!("seed {seed} at the end"));
        plain.b.check();
        for at in (0..plain.snapshots.len()).rev() {
            plain.b.pool.delete_snapshot(plain.info(at).id).unwrap();
        }
        for name in plain.heads.keys() {
            plain.b.pool.delete_volume(name, false).unwrap();
        }
        plain.b.jobs();
        plain.b.check();
        assert_eq!(
            (plain.b.grains(), plain.b.pool.stats().snapshots),
            (0, 0),
            "seed {seed}: {:?}",
            plain.b.pool.stats()
        );
    }
    assert!(loans > 0);
}

/// On the real store with its background, 10 GiB that are all written: the answer does not wait for the map.
#[test]
fn ten_gib_are_copied_in_less_than_a_second_and_taken_over_in_the_background() {
    const COPIED: u64 = 10 << 30;
    const LARGE: u64 = 64 << 10;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    let options = PoolOptions {
        grain_bytes: LARGE as u32,
        ballast_bytes: 1 << 20,
        min_free_bytes: 1 << 20,
        ..PoolOptions::default()
    };
    let pool = Pool::create(&path, &options).unwrap();
    let from = pool.create_volume(&spec("from", COPIED)).unwrap();
    let to = pool.create_volume(&spec("to", COPIED)).unwrap();
    from.write(0, &vec![7; 64 * LARGE as usize], false).unwrap();
    let mut filled = 64 * LARGE;
    while filled < COPIED {
        let more = filled.min(COPIED - filled);
        from.copy(filled, &CopySource::Volume(&from), 0, more).unwrap();
        filled += more;
    }
    wait_for_jobs(&pool);
    assert_eq!(from.info().unwrap().mapped_bytes, COPIED);
    from.write(COPIED - 4096, &[8; 4096], false).unwrap();
    from.flush().unwrap();
    let begun = Instant::now();
    to.copy(0, &CopySource::Volume(&from), 0, COPIED).unwrap();
    let took = begun.elapsed();
    // Point in time, also where the source goes on.
    from.write(0, &[9; 4096], false).unwrap();
    let mut bytes = [0; 4096];
    for (at, expected) in [(0, 7), (5 << 30, 7), (COPIED - 4096, 8)] {
        to.read(at, &mut bytes).unwrap();
        assert_eq!(bytes, [expected; 4096], "at {at}");
    }
    println!("10 GiB by reference: {took:?}; {:?}", pool.stats());
    assert!(took < Duration::from_secs(1), "{took:?}");
    wait_for_jobs(&pool);
    assert_eq!(to.info().unwrap().mapped_bytes, COPIED);
    assert_eq!(pool.stats().snapshots, 0, "what the copy kept is gone");
    to.read(COPIED / 2, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
    pool.shutdown().unwrap();
    let report = check(&path).unwrap();
    assert!(report.is_clean(), "{report}");
}

fn wait_for_jobs(pool: &Pool) {
    let begun = Instant::now();
    while pool.stats().jobs > 0 {
        assert!(begun.elapsed() < Duration::from_secs(300), "{:?}", pool.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_tombstone_above_loans_counts_what_it_takes() {
    for (cut, unmap) in [(false, false), (true, false), (false, true), (true, true)] {
        let options = PoolOptions {
            loan_bytes: PAGE / 2,
            tombstone_bytes: PAGE / 2,
            cache_bytes: 8 << 10,
            checkpoint_bytes: 2 << 10,
            ..options()
        };
        let world = World::new();
        let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options).unwrap();
        let mut b = Bench { world, pool };
        let volume = |name: &str| b.pool.create_volume(&spec(name, 1053 * 512)).unwrap();
        let (v1, v2) = (volume("v1"), volume("v2"));
        v2.write(376 * 512, &[1; 368 * 512], false).unwrap();
        v1.copy(0, &CopySource::Volume(&v2), 0, 599 * 512).unwrap();
        v1.copy(512 * 512, &CopySource::Volume(&v1), 512 * 512, 541 * 512)
            .unwrap();
        v1.write_zeroes(0, 1053 * 512, unmap).unwrap();
        b.check();
        if cut {
            let world = b.world.after_cut(Loss::Nothing, &mut Rng::new(1));
            let pool = Pool::open_with(Arc::new(world.disk()), Box::new(world.meta()), &options).unwrap();
            b = Bench { world, pool };
        }
        while b.pool.run_jobs(1).unwrap() > 0 {
            b.check();
        }
        b.check();
    }
}
