//! Pools as earlier builds left them: every fixture in `fixtures/` opens, holds what it held, and goes on working.
//!
//! A fixture is the directory of a pool whose process was killed with jobs in flight and changes in the warm log,
//! beside a text with the content of every volume and snapshot. A fixture of a released format is kept for ever and
//! never made again. A new one, when the format has grown:
//!
//! ```text
//! STILLPOINT_FIXTURE=format-1-something cargo test -p stillpoint-snapshot --test fixtures -- --ignored make_a_fixture
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use stillpoint_snapshot::sim::Rng;
use stillpoint_snapshot::{
    Checksums, CloneSpec, Consistency, CopySource, Pool, PoolOptions, SnapshotId, SnapshotSpec, Volume,
    VolumeSpec, check, dump, restore,
};

const SECTOR: u64 = 512;
const GRAIN: u64 = 4096;
const PAGE: u64 = 64 * GRAIN;
/// 2026-11-23: fixed, so that nothing in a fixture depends on when it was made.
const NOW_MS: i64 = 1_795_392_000_000;
/// The kernel that "runs" while a fixture is made: opening with another name is a power cut, with this one a kill.
const BOOT: &str = "the boot of the fixture";
const MOST_BYTES: u64 = 100 << 10;

fn options(boot: &str) -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        job_pages: 1,
        boot_id: Some(boot.to_owned()),
        clock: Some(std::sync::Arc::new(|| NOW_MS)),
        ..PoolOptions::default()
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// What a sector holds that `stamp` wrote: alike words, so that a fixture compresses.
fn sector_bytes(sector: u64, stamp: u64) -> [u8; SECTOR as usize] {
    let word = if stamp == 0 {
        0
    } else {
        stamp << 48 | sector << 8 | 0xa5
    };
    let mut bytes = [0; SECTOR as usize];
    for slot in bytes.chunks_exact_mut(8) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Which stamp each sector has.
fn stamps(name: &str, bytes: &[u8]) -> Vec<u64> {
    let stamp = |(sector, bytes): (usize, &[u8])| {
        let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap()) >> 48;
        assert!(
            sector_bytes(sector as u64, stamp) == *bytes,
            "{name}: sector {sector} is not what one write left"
        );
        stamp
    };
    bytes
        .chunks_exact(SECTOR as usize)
        .enumerate()
        .map(stamp)
        .collect()
}

/// Everything that a pool shows, as text: one line for each volume, snapshot and small value.
fn content(pool: &Pool) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let runs = |name: &str, bytes: &[u8]| {
        let mut text = String::new();
        for run in stamps(name, bytes).chunk_by(|a, b| a == b) {
            let _ = write!(text, " {}*{}", run[0], run.len());
        }
        text
    };
    for info in pool.volumes() {
        let mut bytes = vec![0; info.size_bytes as usize];
        let volume = pool.volume(&info.name).unwrap();
        volume.read(0, &mut bytes).unwrap();
        for extent in volume.lba_status(0, info.size_bytes, usize::MAX).unwrap() {
            all.insert(format!(
                "extent {:?} {:012} {:?} {}",
                info.name, extent.offset, extent.kind, extent.len
            ));
        }
        // Not in the older ones, which have the default everywhere.
        if info.checksums != Checksums::default() {
            all.insert(format!("checksums {:?} {:?}", info.name, info.checksums));
        }
        all.insert(format!(
            "volume {:?} id {} block {} read-only {} attributes {:?} created {}:{}",
            info.name,
            info.id,
            info.block_size,
            info.read_only,
            info.attributes,
            info.created_ms,
            runs(&info.name, &bytes)
        ));
    }
    for info in pool.snapshots(None) {
        let mut bytes = vec![0; info.size_bytes as usize];
        pool.read_snapshot(info.id, 0, &mut bytes).unwrap();
        all.insert(format!(
            "snapshot {:?} of {:?} id {} block {} {:?} hold {} locked {} meta {:?} created {}:{}",
            info.name,
            info.volume_name,
            info.id,
            info.block_size,
            info.consistency,
            info.hold,
            info.lock_until_ms,
            info.meta,
            info.created_ms,
            runs(&info.name, &bytes)
        ));
    }
    for (name, value) in pool.meta_list("") {
        all.insert(format!("value {name:?} {value:?}"));
    }
    all
}

fn assert_same(name: &str, actual: &BTreeSet<String>, expected: &BTreeSet<String>) {
    let differ: Vec<_> = actual.symmetric_difference(expected).collect();
    assert!(differ.is_empty(), "{name} differs: {differ:#?}");
}

fn assert_clean(dir: &Path) {
    let report = check(dir).unwrap();
    assert!(report.is_clean(), "{}: {report}", dir.display());
}

fn tar(arguments: &[&str], dir: &Path, archive: &Path) {
    let mut command = Command::new("tar");
    command
        .arg("-C")
        .arg(dir)
        .args(["-I", "gzip -9n"])
        .args(arguments);
    // The archive's name follows the last option; what to pack follows it.
    let output = command
        .args([archive])
        .args(arguments.contains(&"-c").then_some("."))
        .output();
    let output = output.expect("tar");
    assert!(
        output.status.success(),
        "tar: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn unpacked(archive: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    tar(&["-x", "-f"], dir.path(), archive);
    dir
}

fn lines(path: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn empties(pool: &Pool) {
    for info in pool.snapshots(None).iter().filter(|info| info.hold) {
        let change = stillpoint_snapshot::SnapshotChange {
            hold: Some(false),
            ..Default::default()
        };
        pool.set_snapshot(info.id, &change).unwrap();
    }
    for info in pool.volumes() {
        pool.delete_volume(&info.name, true).unwrap();
    }
    while pool.run_jobs(64).unwrap() > 0 {}
    pool.commit_now().unwrap();
    assert_eq!(pool.stats().allocated_bytes, 0, "every grain is free again");
}

/// Opens one fixture in every way in which a later build may meet it.
fn opens(archive: &Path) {
    let name = archive.file_name().unwrap().to_str().unwrap();
    let size = fs::metadata(archive).unwrap().len();
    assert!(size <= MOST_BYTES, "{name} has {size} bytes");

    // After a power cut: what was committed, without the warm log.
    let dir = unpacked(archive);
    let pool = dir.path().join("pool");
    assert_clean(&pool);
    let opened = Pool::open(&pool, &options("another boot")).unwrap();
    assert_same(name, &content(&opened), &lines(&dir.path().join("committed")));
    drop(opened);

    // After a kill: the warm log is replayed; then jobs end, new operations work, and everything can be freed.
    let dir = unpacked(archive);
    let pool = dir.path().join("pool");
    let expected = lines(&dir.path().join("acknowledged"));
    let opened = Pool::open(&pool, &options(BOOT)).unwrap();
    assert_same(name, &content(&opened), &expected);
    assert!(opened.stats().jobs > 0, "{name}: jobs were in flight");
    while opened.run_jobs(8).unwrap() + opened.run_sealing(8).unwrap() > 0 {}
    assert_same(name, &content(&opened), &expected);
    opened.shutdown().unwrap();
    assert_clean(&pool);

    // Its dump makes the same pool.
    let mut text = Vec::new();
    dump(&pool, &mut text).unwrap();
    restore(&mut text.as_slice(), &pool).unwrap();
    assert_clean(&pool);
    let opened = Pool::open(&pool, &options(BOOT)).unwrap();
    assert_same(name, &content(&opened), &expected);
    let first = opened.volumes().into_iter().find(|info| !info.read_only).unwrap();
    let volume = opened.volume(&first.name).unwrap();
    let cut = snapshot(&opened, &[&volume], "made by a later build")[0];
    fill(&volume, 0, 8, 999);
    opened.revert(volume.id(), cut).unwrap();
    opened.delete_snapshot(cut).unwrap();
    while opened.run_jobs(8).unwrap() > 0 {}
    assert_same(name, &content(&opened), &expected);
    empties(&opened);
    opened.shutdown().unwrap();
    assert_clean(&pool);
}

#[test]
fn every_fixture_opens_and_holds_what_it_held() {
    let mut found = Vec::new();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.ends_with(".tar.gz"), "{name} is no fixture");
        opens(&path);
        found.push(name);
    }
    assert!(found.iter().any(|name| name == "format-1.tar.gz"), "{found:?}");
}

fn fill(volume: &Volume, grain: u64, grains: u64, stamp: u64) {
    let first = grain * GRAIN / SECTOR;
    let sectors = first..first + grains * GRAIN / SECTOR;
    let bytes: Vec<u8> = sectors.flat_map(|sector| sector_bytes(sector, stamp)).collect();
    volume.write(grain * GRAIN, &bytes, false).unwrap();
}

fn patch(volume: &Volume, sector: u64, sectors: u64, stamp: u64) {
    let bytes: Vec<u8> = (sector..sector + sectors)
        .flat_map(|sector| sector_bytes(sector, stamp))
        .collect();
    volume.write(sector * SECTOR, &bytes, false).unwrap();
}

fn snapshot(pool: &Pool, volumes: &[&Volume], name: &str) -> Vec<SnapshotId> {
    let ids: Vec<_> = volumes.iter().map(|volume| volume.id()).collect();
    let spec = SnapshotSpec {
        name: name.to_owned(),
        consistency: Consistency::Filesystem,
        meta: name.as_bytes().to_vec(),
        ..SnapshotSpec::default()
    };
    let cut = pool.begin_cut(&ids, &spec).unwrap().commit().unwrap();
    cut.into_iter().map(|info| info.id).collect()
}

fn clone(pool: &Pool, id: SnapshotId, name: &str, read_only: bool) -> Volume {
    let spec = CloneSpec {
        name: name.to_owned(),
        read_only,
        attributes: b"clone".to_vec(),
    };
    pool.clone_snapshot(id, &spec).unwrap()
}

/// Something in every table: pages stored and in the log, group snapshots, clones, a revert, jobs of every kind.
fn furnish(pool: &Pool) {
    let volume = |name: &str, size_bytes: u64, block_size: u32| {
        let spec = VolumeSpec {
            name: name.to_owned(),
            size_bytes,
            block_size,
            attributes: vec![0xff, 0x00, b'"'],
        };
        pool.create_volume(&spec).unwrap()
    };
    let data = volume("data", 3 * PAGE + 3 * GRAIN + 512, 512);
    let log = volume("log \"é\"", 2 * PAGE, 4096);
    let undone = volume("undone", 2 * PAGE, 512);
    let summed = volume("summed", 2 * PAGE, 4096);
    summed.set_checksums(Checksums::Always).unwrap();
    let plain = volume("plain", PAGE, 512);
    plain.set_checksums(Checksums::Off).unwrap();
    for round in 1..=2 {
        fill(&summed, 3, 5, round);
        patch(&summed, 70 * 8, 8, round + 10);
        fill(&plain, 0, 2, round);
        snapshot(pool, &[&summed, &plain], &format!("sum {round}"));
    }
    let mut rng = Rng::new(1);
    let mut cuts = Vec::new();
    for round in 1..=4 {
        for _ in 0..14 {
            fill(&data, rng.below(190), 1 + rng.below(3), round);
            fill(&log, rng.below(120), 1 + rng.below(3), round);
        }
        patch(&data, rng.below(1500), 5, round + 10);
        data.write_zeroes(rng.below(180) * GRAIN, 3 * GRAIN, round % 2 == 0)
            .unwrap();
        cuts.push(snapshot(pool, &[&data, &log], &format!("s{round}")));
        if round == 2 {
            pool.checkpoint_now().unwrap();
        }
    }
    (0..3).for_each(|page| fill(&data, page * 64 + 5, 1, 20));
    log.grow(3 * PAGE).unwrap();
    fill(&log, 2 * 64 + 60, 4, 21);
    let mount = clone(pool, cuts[0][0], "mount", true);
    assert!(mount.is_read_only());
    let copy = clone(pool, cuts[1][1], "copy", false);
    fill(&copy, 7, 9, 22);
    snapshot(pool, &[&copy], "of the copy");
    fill(&copy, 9, 2, 23);
    let hold = stillpoint_snapshot::SnapshotChange {
        hold: Some(true),
        ..Default::default()
    };
    pool.set_snapshot(cuts[3][1], &hold).unwrap();
    pool.meta_put("agent/1", Some(b"key")).unwrap();
    pool.meta_put("agent/2", Some(&[0xfe, 0xff])).unwrap();

    // A head that is dropped (revert), a branch that is folded into its child, and a snapshot that is deleted: all three
    // kinds of jobs, the last one begun.
    (0..2).for_each(|page| fill(&undone, page * 64, 3, 30));
    let base = snapshot(pool, &[&undone], "base")[0];
    (0..2).for_each(|page| fill(&undone, page * 64 + 1, 3, 31));
    pool.revert(undone.id(), base).unwrap();
    while pool.run_jobs(8).unwrap() > 0 {}
    fill(&undone, 1, 1, 32);
    pool.delete_snapshot(base).unwrap();
    // Grains placed twice and more, in heads and below snapshots; sectors carry their place, so at the same place only.
    let twin = volume("twin", 3 * PAGE, 512);
    let of = |volume: &Volume, id| volume.copy(0, &CopySource::Snapshot(id), 0, 2 * PAGE).unwrap();
    of(&twin, cuts[1][0]);
    snapshot(pool, &[&twin], "with references");
    of(&twin, cuts[3][0]);
    let again = volume("again", 2 * PAGE, 512);
    again.copy(0, &CopySource::Volume(&twin), 0, PAGE).unwrap();
    // Some of what snapshots hold has its checksum, some has not yet.
    pool.run_sealing(3).unwrap();
    pool.revert(log.id(), cuts[2][1]).unwrap();
    patch(&log, 64 * 8, 8, 33);
    pool.delete_snapshot(cuts[2][0]).unwrap();
    pool.run_jobs(1).unwrap();
    pool.commit_now().unwrap();
}

#[test]
#[ignore = "makes a new fixture; see the head of this file"]
fn make_a_fixture() {
    let name = std::env::var("STILLPOINT_FIXTURE").expect("STILLPOINT_FIXTURE: the name of the new fixture");
    let archive = fixtures().join(format!("{name}.tar.gz"));
    assert!(!archive.exists(), "{name} exists: a fixture is never made again");
    let (live, packed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = Pool::create(live.path(), &options(BOOT)).unwrap();
    furnish(&pool);
    let text = |lines: BTreeSet<String>| {
        lines
            .into_iter()
            .fold(String::new(), |all, line| all + &line + "\n")
    };
    fs::write(packed.path().join("committed"), text(content(&pool))).unwrap();

    // Acknowledged and not committed: in the warm log only.
    let data = pool.volume("data").unwrap();
    fill(&data, 100, 3, 40);
    data.write_zeroes(110 * GRAIN, 2 * GRAIN, true).unwrap();
    data.write_zeroes(112 * GRAIN, 2 * GRAIN, false).unwrap();
    fill(&pool.volume("copy").unwrap(), 30, 1, 41);
    fs::write(packed.path().join("acknowledged"), text(content(&pool))).unwrap();
    copy_tree(live.path(), &packed.path().join("pool"));

    let mut lines = Vec::new();
    dump(&packed.path().join("pool"), &mut lines).unwrap();
    let lines = String::from_utf8(lines).unwrap();
    let kinds: BTreeMap<&str, usize> = ["drop_snapshot", "drop_head", "collapse"]
        .map(|kind| (kind, lines.matches(&format!("\"{kind}\"")).count()))
        .into();
    assert!(kinds.values().all(|count| *count > 0), "{kinds:?}\n{lines}");
    tar(
        &[
            "--sort=name",
            "--mtime=@0",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "-S",
            "-c",
            "-f",
        ],
        packed.path(),
        &archive,
    );
    opens(&archive);
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}
