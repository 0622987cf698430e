//! The warm log: its files, and pools whose process died.

use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::inner::Directory;
use crate::meta_client::Meta;
use crate::record::PageKey;
use crate::sim::{Call, Failure, Fault, World};
use crate::{Epoch, Pool, PoolOptions, SnapshotSpec, Volume, VolumeSpec, open};

const G: usize = 4096;

fn identity() -> Identity {
    Identity {
        pool_id: [1; 16],
        boot_id: "boot".into(),
    }
}

fn delta(page: PageNo, entry: Entry) -> Delta {
    Delta {
        key: PageKey {
            branch: BranchId(1),
            page,
            epoch: Epoch::ZERO,
        },
        mask: 1,
        entries: vec![entry],
    }
}

/// A medium in RAM; `room` bytes can be written to it.
#[derive(Default)]
struct Ram {
    files: Mutex<[Vec<u8>; 2]>,
    room: std::sync::atomic::AtomicUsize,
}

impl Ram {
    fn take(&self, bytes: usize) -> io::Result<()> {
        let room = self.room.load(Ordering::SeqCst);
        self.room.store(room.saturating_sub(bytes), Ordering::SeqCst);
        if room < bytes {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    }
}

impl WarmMedium for Arc<Ram> {
    fn read(&self, file: usize) -> io::Result<Vec<u8>> {
        Ok(lock(&self.files)[file].clone())
    }
    fn rewrite(&self, file: usize, bytes: &[u8]) -> io::Result<()> {
        self.take(bytes.len())?;
        lock(&self.files)[file] = bytes.to_vec();
        Ok(())
    }
    fn write_at(&self, file: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let files = &mut lock(&self.files)[file];
        let at = usize::try_from(offset).unwrap();
        files.resize(at, 0);
        let fits = self.take(bytes.len());
        files.extend_from_slice(if fits.is_ok() { bytes } else { &bytes[..3] });
        fits
    }
}

fn log(room: usize) -> (Arc<Ram>, WarmLog) {
    let ram = Arc::new(Ram::default());
    ram.room.store(room, Ordering::SeqCst);
    (ram.clone(), WarmLog::new(Box::new(ram), identity()))
}

fn ticket(txg: u64, sequence: u64) -> Ticket {
    Ticket { txg, sequence }
}

#[test]
fn two_groups_live_side_by_side_and_the_third_replaces_the_first() {
    let (_ram, warm) = log(1 << 20);
    assert!(warm.append(ticket(5, 1), &delta(1, Entry::HOLE)));
    assert!(warm.append(ticket(6, 3), &delta(3, Entry::HOLE)));
    assert!(
        warm.append(ticket(5, 2), &delta(2, Entry::mapped(9, Epoch(1)))),
        "later, but of the group before"
    );
    let sequences = |warm: &WarmLog| {
        let mut all: Vec<_> = warm
            .read()
            .into_iter()
            .flat_map(|(t, r)| r.into_iter().map(move |(s, _)| (t, s)))
            .collect();
        all.sort_unstable();
        all
    };
    assert_eq!(sequences(&warm), vec![(5, 1), (5, 2), (6, 3)]);
    assert!(warm.append(ticket(7, 4), &delta(4, Entry::HOLE)));
    assert!(
        warm.append(ticket(5, 5), &delta(5, Entry::HOLE)),
        "durable by now: nothing to remember"
    );
    assert_eq!(sequences(&warm), vec![(6, 3), (7, 4)]);
    warm.invalidate();
    assert!(warm.read().is_empty() && !warm.append(ticket(7, 6), &delta(6, Entry::HOLE)));
}

#[test]
fn torn_and_foreign_files_are_not_believed() {
    let (ram, warm) = log(1 << 20);
    for s in 1..=3 {
        assert!(warm.append(ticket(4, s), &delta(1, Entry::mapped(s, Epoch(1)))));
    }
    let whole = lock(&ram.files)[0].clone();
    let count = |bytes: &[u8], of: &Identity| of.parse(bytes).map(|(_, r)| r.len());
    assert_eq!(count(&whole, &identity()), Some(3));
    for cut in 0..whole.len() {
        assert!(
            count(&whole[..cut], &identity()).is_none_or(|n| n < 3),
            "cut at {cut}"
        );
    }
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 0x10;
        assert!(count(&bad, &identity()).is_none_or(|n| n < 3), "bit of byte {at}");
    }
    assert_eq!(
        count(
            &whole,
            &Identity {
                boot_id: "tool".into(),
                ..identity()
            }
        ),
        None,
        "another boot"
    );
    assert_eq!(
        count(
            &whole,
            &Identity {
                boot_id: "longer than it was".into(),
                ..identity()
            }
        ),
        None
    );
    assert_eq!(
        count(
            &whole,
            &Identity {
                pool_id: [2; 16],
                ..identity()
            }
        ),
        None,
        "another pool"
    );
}

#[test]
fn a_record_that_did_not_fit_is_overwritten_by_the_next() {
    let (ram, warm) = log(150);
    assert!(warm.append(ticket(4, 1), &delta(1, Entry::HOLE)));
    while warm.append(ticket(4, 2), &delta(2, Entry::HOLE)) {}
    ram.room.store(1000, Ordering::SeqCst);
    assert!(warm.append(ticket(4, 9), &delta(9, Entry::HOLE)));
    let (_, records) = warm.read().pop().unwrap();
    assert_eq!(records.last().unwrap().0, 9);
}

// Pools whose process died: the directory is copied while the pool lives. The page cache is what a copy reads.

#[test]
fn after_a_clear_the_next_record_has_a_header_again() {
    let (_ram, warm) = log(1 << 20);
    assert!(warm.append(ticket(5, 1), &delta(1, Entry::HOLE)));
    warm.clear();
    assert!(warm.append(ticket(5, 2), &delta(2, Entry::HOLE)));
    let found = warm.read();
    assert_eq!(found, vec![(5, vec![(2, delta(2, Entry::HOLE))])]);
}

/// A flush that fails in `call`: whether the log still knows the write before it.
fn kept_when(call: Call) -> bool {
    let world = World::new();
    let meta = Meta::direct(Box::new(world.meta()));
    let directory = Directory {
        lock: None,
        warm: Some((Box::new(log(1 << 20).0), "boot".into())),
    };
    let inner = open::create_on(Arc::new(world.disk()), meta, &options(), directory).unwrap();
    let pool = Pool {
        inner: Arc::new(inner),
    };
    let volume = pool
        .create_volume(&VolumeSpec {
            name: "v".into(),
            size_bytes: 1 << 20,
            block_size: 512,
            attributes: Vec::new(),
        })
        .unwrap();
    fill(&volume, 0, 1);
    world.fail(Fault {
        call,
        nth: 0,
        failure: Failure::Io,
        sticky: true,
    });
    assert!(volume.flush().is_err() && pool.poisoned().is_some(), "{call:?}");
    let warm = pool.inner.warm.as_ref().unwrap();
    let next = Ticket {
        txg: pool.inner.state().open.id,
        sequence: u64::MAX,
    };
    assert_eq!(
        warm.append(next, &delta(1, Entry::HOLE)),
        call != Call::Sync,
        "{call:?}"
    );
    warm.read()
        .iter()
        .any(|(_, records)| records.iter().any(|(s, _)| *s != u64::MAX))
}

#[test]
fn only_a_failed_sync_of_the_data_file_forbids_a_replay() {
    assert!(!kept_when(Call::Sync));
    for call in [Call::MetaApply, Call::MetaFlush, Call::MetaSync] {
        assert!(kept_when(call), "{call:?}");
    }
}

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        ..PoolOptions::default()
    }
}

struct Place(tempfile::TempDir);

impl Place {
    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn killed(&self, from: &str, to: &str) -> PathBuf {
        let status = std::process::Command::new("cp")
            .arg("-r")
            .arg(self.at(from))
            .arg(self.at(to))
            .status();
        assert!(status.unwrap().success());
        self.at(to)
    }
}

fn start() -> (Place, Pool, Volume) {
    let place = Place(tempfile::tempdir().unwrap());
    let pool = Pool::create(&place.at("p"), &options()).unwrap();
    let spec = VolumeSpec {
        name: "v".into(),
        size_bytes: 1 << 30,
        block_size: 512,
        attributes: Vec::new(),
    };
    let v = pool.create_volume(&spec).unwrap();
    (place, pool, v)
}

fn fill(v: &Volume, grain: u64, byte: u8) {
    v.write(grain * G as u64, &[byte; G], false).unwrap();
}

fn bytes(pool: &Pool, grains: &[u64]) -> Vec<u8> {
    let v = pool.volume("v").unwrap();
    let one = |g: &u64| {
        let mut buf = [0; 1];
        v.read(g * G as u64, &mut buf).unwrap();
        buf[0]
    };
    grains.iter().map(one).collect()
}

#[test]
fn a_killed_process_loses_nothing_that_was_acknowledged() {
    let (place, pool, v) = start();
    (0..200).for_each(|i| fill(&v, i, 1));
    v.flush().unwrap();
    fill(&v, 5, 2);
    fill(&v, 300, 3);
    fill(&v, 300, 4);
    v.unmap(&[(0, 2 * G as u64)]).unwrap();
    v.write_zeroes(2 * G as u64, G as u64, false).unwrap();
    fill(&v, 0, 5);
    v.write(70 * G as u64 + 1000, &[6; 10], false).unwrap();
    let at = [0, 1, 2, 3, 5, 300, 70];
    let expected = vec![5, 0, 0, 1, 2, 4, 1];
    assert_eq!(bytes(&pool, &at), expected);
    let dir = place.killed("p", "q");
    let report = crate::check(&dir).unwrap();
    assert!(report.is_clean() && report.warm_operations == 4, "{report}");
    pool.step().unwrap();
    let again = Pool::open(&dir, &options()).unwrap();
    assert_eq!(bytes(&again, &at), expected);
    assert_eq!(again.stats().allocated_bytes, pool.stats().allocated_bytes);
    assert_eq!(
        again.volume("v").unwrap().info().unwrap().mapped_bytes,
        v.info().unwrap().mapped_bytes
    );
    again.shutdown().unwrap();
    assert!(crate::check(&dir).unwrap().is_clean());
    // It is durable now: nothing is replayed a second time.
    let third = Pool::open(&dir, &options()).unwrap();
    assert_eq!(bytes(&third, &at), expected);
}

#[test]
fn a_power_cut_leaves_what_was_flushed() {
    let (place, _pool, v) = start();
    fill(&v, 0, 1);
    v.flush().unwrap();
    fill(&v, 1, 2);
    let dir = place.killed("p", "q");
    let other = PoolOptions {
        boot_id: Some("another boot".into()),
        ..options()
    };
    let again = Pool::open(&dir, &other).unwrap();
    assert_eq!(bytes(&again, &[0, 1]), vec![1, 0], "only what was flushed");
}

#[test]
fn a_kill_after_a_cut_that_was_not_durable_keeps_the_newest_content() {
    let (place, pool, v) = start();
    fill(&v, 0, 1);
    v.flush().unwrap();
    fill(&v, 1, 2);
    let spec = SnapshotSpec {
        name: "s".into(),
        ..SnapshotSpec::default()
    };
    let cut = pool.begin_cut(&[v.id()], &spec).unwrap();
    fill(&v, 0, 3);
    fill(&v, 1, 4);
    let again = Pool::open(&place.killed("p", "q"), &options()).unwrap();
    assert_eq!(
        (bytes(&again, &[0, 1]), again.snapshots(None).len()),
        (vec![3, 4], 0)
    );
    // Once acknowledged it is there, and what came after is in the head only.
    cut.commit().unwrap();
    fill(&v, 1, 5);
    let again = Pool::open(&place.killed("p", "r"), &options()).unwrap();
    assert_eq!(bytes(&again, &[0, 1]), vec![3, 5]);
    let id = again.snapshot("v", "s").unwrap().id;
    let mut buf = [0; 1];
    again.read_snapshot(id, G as u64, &mut buf).unwrap();
    assert_eq!(buf, [2]);
    // Grains of both lives are counted once.
    again.delete_snapshot(id).unwrap();
    again.step().unwrap();
    while again.run_jobs(10).unwrap() > 0 {}
    again.step().unwrap();
    assert_eq!(again.stats().allocated_bytes, 2 * G as u64);
}

#[test]
fn overlapping_writes_keep_their_order_across_a_commit_in_flight() {
    let (place, pool, v) = start();
    (0..10).for_each(|i| fill(&v, i, 1));
    // Killed inside of a commit: one group closing, the next one open, both only in the log.
    let gate = Arc::new(Gate {
        dir: place.at("p"),
        to: place.at("q"),
        v: Mutex::new(Some(v.clone())),
    });
    pool.shutdown().unwrap();
    let options = PoolOptions {
        hooks: Some(gate.clone()),
        ..options()
    };
    let pool = Pool::open(&place.at("p"), &options).unwrap();
    let v = pool.volume("v").unwrap();
    *lock(&gate.v) = Some(v.clone());
    (0..10).for_each(|i| v.unmap(&[(i * G as u64, G as u64)]).unwrap());
    (5..20).for_each(|i| fill(&v, i, 2));
    v.flush().unwrap();
    let again = Pool::open(&place.at("q"), &self::options()).unwrap();
    assert_eq!(bytes(&again, &[0, 5, 6, 7, 8, 19]), vec![0, 2, 3, 0, 4, 2]);
    again.shutdown().unwrap();
    assert!(crate::check(&place.at("q")).unwrap().is_clean());
}

/// Writes to the next group while one is closed, then takes the picture.
struct Gate {
    dir: PathBuf,
    to: PathBuf,
    v: Mutex<Option<Volume>>,
}

impl crate::Hooks for Gate {
    fn at(&self, point: crate::Point) {
        if point != "commit.closed" {
            return;
        }
        let Some(v) = lock(&self.v).take() else { return };
        if v.read(0, &mut [0]).is_err() {
            return;
        }
        fill(&v, 6, 3);
        v.unmap(&[(7 * G as u64, G as u64)]).unwrap();
        v.unmap(&[(8 * G as u64, G as u64)]).unwrap();
        fill(&v, 8, 4);
        let status = std::process::Command::new("cp")
            .arg("-r")
            .arg(&self.dir)
            .arg(&self.to)
            .status();
        assert!(status.unwrap().success());
    }
}
