//! The offline tools: check finds what is planted, dump and restore give the same pool back, and a damaged value is
//! never taken for data.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use stillpoint_snapshot::meta::Batch;
use stillpoint_snapshot::sim::{Loss, Rng, World};
use stillpoint_snapshot::{
    CheckReport, CloneSpec, Error, Pool, PoolOptions, ProblemKind, SnapshotSpec, VolumeSpec, check,
    check_media, dump, dump_meta, restore, restore_meta,
};

const GRAIN: u64 = 4096;
const PAGE: u64 = 64 * GRAIN;

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        job_pages: 1,
        ..PoolOptions::default()
    }
}

/// Content of everything in a pool.
type Content = BTreeMap<String, Vec<u8>>;

fn content(pool: &Pool) -> Result<Content, Error> {
    let mut all = Content::new();
    for info in pool.volumes() {
        let mut bytes = vec![0; info.size_bytes as usize];
        pool.volume(&info.name).unwrap().read(0, &mut bytes)?;
        all.insert(format!("{} {:?}", info.name, info.attributes), bytes);
    }
    for info in pool.snapshots(None) {
        let mut bytes = vec![0; info.size_bytes as usize];
        pool.read_snapshot(info.id, 0, &mut bytes)?;
        all.insert(
            format!(
                "{}@{} {:?} {}",
                info.volume_name, info.name, info.meta, info.created_ms
            ),
            bytes,
        );
    }
    for (name, value) in pool.meta_list("") {
        all.insert(format!("value {name}"), value);
    }
    Ok(all)
}

/// A pool with something in every table: pages stored and in the log, snapshots, a clone, a revert, unfinished jobs.
fn furnish(pool: &Pool) {
    let spec = |name: &str| VolumeSpec {
        name: name.into(),
        size_bytes: 3 * PAGE,
        block_size: 512,
        attributes: vec![0xff, 0x00, b'"'],
    };
    let (v, w) = (
        pool.create_volume(&spec("v")).unwrap(),
        pool.create_volume(&spec("w")).unwrap(),
    );
    let mut rng = Rng::new(9);
    let mut cuts = Vec::new();
    for round in 0..5u8 {
        for _ in 0..60 {
            let grain = rng.below(3 * 64);
            v.write(grain * GRAIN, &[round + 1; GRAIN as usize], false)
                .unwrap();
            w.write(grain * GRAIN + 512, &[round + 101; 1024], false).unwrap();
        }
        v.write_zeroes(rng.below(64) * GRAIN, 3 * GRAIN, round % 2 == 0)
            .unwrap();
        let spec = SnapshotSpec {
            name: format!("s{round}"),
            meta: vec![round, 0x80],
            ..SnapshotSpec::default()
        };
        cuts.push(
            pool.begin_cut(&[v.id(), w.id()], &spec)
                .unwrap()
                .commit()
                .unwrap(),
        );
        if round == 2 {
            pool.checkpoint_now().unwrap();
        }
    }
    // Without a write after it, a snapshot is the same as its volume, and nobody could tell that its record is gone.
    for grain in 0..3 {
        v.write(grain * PAGE, &[66; GRAIN as usize], false).unwrap();
    }
    let clone = CloneSpec {
        name: "clone \"é\"".into(),
        read_only: false,
        attributes: b"{\"a\":1}".to_vec(),
    };
    let clone = pool.clone_snapshot(cuts[1][0].id, &clone).unwrap();
    clone.write(0, &[77; 5000], false).unwrap();
    pool.revert(w.id(), cuts[3][1].id).unwrap();
    w.write(PAGE, &[78; 5000], false).unwrap();
    pool.delete_snapshot(cuts[2][0].id).unwrap();
    pool.delete_snapshot(cuts[1][0].id).unwrap();
    pool.run_jobs(1).unwrap();
    pool.meta_put("agent/1", Some(b"key")).unwrap();
    pool.meta_put("agent/2", Some(&[0xfe, 0xff])).unwrap();
    pool.commit_now().unwrap();
}

fn furnished() -> World {
    let world = World::new();
    let pool = Pool::create_with(Arc::new(world.disk()), Box::new(world.meta()), &options()).unwrap();
    furnish(&pool);
    world.after_cut(Loss::Nothing, &mut Rng::new(0))
}

fn open(world: &World) -> Result<Pool, Error> {
    Pool::open_with(Arc::new(world.disk()), Box::new(world.meta()), &options())
}

fn report(world: &World) -> CheckReport {
    check_media(&world.disk(), &mut world.meta()).unwrap()
}

/// The same machine with one value replaced or removed.
fn tampered(world: &World, key: &[u8], value: Option<Vec<u8>>) -> World {
    let copy = world.after_cut(Loss::Nothing, &mut Rng::new(0));
    let mut batch = Batch::default();
    match value {
        Some(value) => batch.put(key.to_vec(), value),
        None => batch.remove(key.to_vec()),
    }
    copy.tamper(&batch);
    copy
}

fn has_jobs_and_log(world: &World) {
    let tables: std::collections::BTreeSet<u8> = world.pairs().iter().map(|(key, _)| key[0]).collect();
    for table in b"SVNMEAaJDK" {
        assert!(
            tables.contains(table),
            "nothing in table {}: the test would prove less",
            char::from(*table)
        );
    }
}

#[test]
fn a_sound_pool_passes_and_every_flipped_bit_and_missing_record_is_found() {
    let world = furnished();
    has_jobs_and_log(&world);
    let sound = report(&world);
    assert!(sound.is_clean(), "{sound}");
    assert!(
        sound.page_versions > 10 && sound.snapshots > 5 && sound.grains_used > 100,
        "{sound}"
    );
    let mut rng = Rng::new(4);
    for (key, value) in world.pairs() {
        for _ in 0..3 {
            let mut flipped = value.clone();
            let Some(at) = value.len().checked_sub(1).map(|last| rng.index(last + 1)) else {
                break;
            };
            flipped[at] ^= 1 << rng.below(8);
            let found = report(&tampered(&world, &key, Some(flipped)));
            assert!(
                !found.is_clean(),
                "a flipped bit of {key:x?} at {at} was not found"
            );
        }
        // The owner's values are independent of everything else, so one that is gone cannot be missed.
        if key[0] != b'K' {
            let found = report(&tampered(&world, &key, None));
            assert!(!found.is_clean(), "that {key:x?} is missing was not found");
        }
    }
}

#[test]
fn the_check_names_what_is_wrong() {
    let world = furnished();
    let kinds = |world: &World| {
        report(world)
            .problems
            .into_iter()
            .map(|problem| problem.kind)
            .collect::<Vec<_>>()
    };
    let bitmap = world.pairs().into_iter().find(|(key, _)| key[0] == b'A').unwrap();
    // Another chunk's bitmap under this key: sealed well, but not for this place.
    let mut elsewhere = bitmap.0.clone();
    elsewhere[4] ^= 1;
    assert!(kinds(&tampered(&world, &elsewhere, Some(bitmap.1.clone()))).contains(&ProblemKind::Damaged));
    // Without bitmaps everything counts as free.
    assert!(kinds(&tampered(&world, &bitmap.0, None)).contains(&ProblemKind::NotAllocated));
    // Without one page its grains are used by nobody.
    let page = world
        .pairs()
        .into_iter()
        .rfind(|(key, _)| key[0] == b'M')
        .unwrap();
    let found = kinds(&tampered(&world, &page.0, None));
    assert!(
        found.contains(&ProblemKind::Leaked) || found.contains(&ProblemKind::Inconsistent),
        "{found:?}"
    );
    // Metadata of an earlier commit beside the data file of a later one (I7).
    let pool = open(&world).unwrap();
    let early: Vec<_> = world.pairs();
    pool.meta_put("later", Some(b"1")).unwrap();
    pool.meta_put("later", Some(b"2")).unwrap();
    pool.shutdown().unwrap();
    let behind = world.after_cut(Loss::Nothing, &mut Rng::new(0));
    let mut batch = Batch::default();
    behind.pairs().into_iter().for_each(|(key, _)| batch.remove(key));
    early.into_iter().for_each(|(key, value)| batch.put(key, value));
    behind.tamper(&batch);
    assert!(kinds(&behind).contains(&ProblemKind::LostCommits));
    assert!(
        matches!(open(&behind), Err(Error::LostCommits { .. })),
        "and the pool does not open"
    );
    // Both superblocks gone.
    let world = furnished();
    world.flip_data_bit(8 * 20);
    world.flip_data_bit(8 * (4096 + 20));
    assert!(kinds(&world).contains(&ProblemKind::Damaged));
    assert!(open(&world).is_err());
}

#[test]
fn a_flipped_bit_of_the_metadata_is_an_error_and_never_other_data() {
    let world = furnished();
    let before = content(&open(&world.after_cut(Loss::Nothing, &mut Rng::new(0))).unwrap()).unwrap();
    let mut rng = Rng::new(5);
    // All of them, as it happens: opening reads the last bitmap too.
    let (mut errors, mut harmless) = (0, 0);
    for (key, value) in world.pairs().into_iter().filter(|(_, value)| !value.is_empty()) {
        let mut flipped = value.clone();
        let at = rng.index(value.len());
        flipped[at] ^= 1 << rng.below(8);
        let damaged = tampered(&world, &key, Some(flipped));
        let result = catch_unwind(AssertUnwindSafe(|| content(&open(&damaged)?)));
        match result.unwrap_or_else(|_| panic!("a flipped bit of {key:x?} makes the store panic")) {
            Err(_) => errors += 1,
            Ok(after) => {
                assert!(after == before, "a flipped bit of {key:x?} changes data");
                harmless += 1;
            }
        }
    }
    assert!(
        errors > 20 && errors > harmless,
        "{errors} errors, {harmless} harmless"
    );
}

#[test]
fn dump_and_restore_give_the_same_pool_back() {
    let world = furnished();
    let mut text = Vec::new();
    dump_meta(&mut world.meta(), &mut text).unwrap();
    let before = content(&open(&world.after_cut(Loss::Nothing, &mut Rng::new(0))).unwrap()).unwrap();
    // The data file stays, the metadata is made anew.
    let mut batch = Batch::default();
    world.pairs().into_iter().for_each(|(key, _)| batch.remove(key));
    world.tamper(&batch);
    restore_meta(&mut &text[..], &mut world.meta()).unwrap();
    assert!(report(&world).is_clean(), "{}", report(&world));
    let mut again = Vec::new();
    dump_meta(&mut world.meta(), &mut again).unwrap();
    assert_eq!(
        String::from_utf8(text).unwrap(),
        String::from_utf8(again).unwrap()
    );
    let pool = open(&world).unwrap();
    assert!(content(&pool).unwrap() == before);
    while pool.run_jobs(8).unwrap() > 0 {}
    pool.commit_now().unwrap();
    assert!(content(&pool).unwrap() == before, "the jobs of the dump go on");
    assert!(report(&world).is_clean());
}

#[test]
fn a_cut_or_changed_dump_is_refused_with_its_line() {
    let world = furnished();
    let mut text = Vec::new();
    dump_meta(&mut world.meta(), &mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let try_lines = |lines: &[&str]| {
        let text = lines.join("\n");
        restore_meta(&mut text.as_bytes(), &mut World::new().meta())
    };
    try_lines(&lines).unwrap();
    assert!(try_lines(&lines[..lines.len() - 1]).is_err(), "without its end");
    assert!(try_lines(&lines[1..]).is_err(), "without its beginning");
    assert!(
        try_lines(&[&lines[..5], &lines[6..]].concat()).is_err(),
        "without a line in the middle"
    );
    assert!(
        try_lines(&[&lines[..], &lines[3..4]].concat()).is_err(),
        "with something after the end"
    );
    assert!(try_lines(&[]).is_err());
    let mut other = lines.clone();
    other[7] = "{\"page\":{\"branch\":1,\"page\":0,\"epoch\":1,\"entries\":\"63*-\"}}";
    let error = try_lines(&other).unwrap_err().to_string();
    assert!(error.contains("line 8"), "{error}");
    let newer = lines[0].replace("\"format\":1", "\"format\":9");
    other[0] = &newer;
    assert!(matches!(try_lines(&other), Err(Error::Version { found: 9, .. })));
}

fn copy_of(dir: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_of(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn bytes_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(bytes_of(&path));
        } else {
            all.insert(path.display().to_string(), fs::read(&path).unwrap());
        }
    }
    all
}

#[test]
fn the_tools_work_on_real_files_change_nothing_and_refuse_a_pool_in_use() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("pool");
    assert!(matches!(check(&dir), Err(Error::NotFound { .. })));
    let pool = Pool::create(&dir, &options()).unwrap();
    furnish(&pool);
    assert!(matches!(check(&dir), Err(Error::Refused { .. })), "in use");
    assert!(
        matches!(dump(&dir, &mut Vec::new()), Err(Error::Refused { .. })),
        "in use"
    );
    let before = content(&pool).unwrap();
    pool.shutdown().unwrap();
    drop(pool);
    let files = bytes_of(&dir);
    let report = check(&dir).unwrap();
    assert!(report.is_clean(), "{report}");
    let mut text = Vec::new();
    dump(&dir, &mut text).unwrap();
    assert!(bytes_of(&dir) == files, "check and dump change nothing");
    let copy = scratch.path().join("copy");
    copy_of(&dir, &copy);
    let untouched = bytes_of(&copy);
    assert!(restore(&mut &text[..text.len() / 2], &copy).is_err());
    assert!(bytes_of(&copy) == untouched, "a failed restore changes nothing");
    // The metadata is damaged: it is replaced and kept.
    fs::write(copy.join("meta/db"), b"nothing of use").unwrap();
    assert!(check(&copy).map_or(true, |report| !report.is_clean()));
    restore(&mut &text[..], &copy).unwrap();
    assert_eq!(
        fs::read(copy.join("meta.before-restore/db")).unwrap(),
        b"nothing of use"
    );
    assert!(check(&copy).unwrap().is_clean());
    assert!(
        matches!(restore(&mut &text[..], &copy), Err(Error::Refused { .. })),
        "one is kept already"
    );
    let pool = Pool::open(&copy, &options()).unwrap();
    assert!(content(&pool).unwrap() == before);
    assert!(
        matches!(restore(&mut &text[..], &copy), Err(Error::Refused { .. })),
        "in use"
    );
    // A dump that the data file has left behind would give grains away twice.
    pool.meta_put("later", Some(b"1")).unwrap();
    pool.shutdown().unwrap();
    drop(pool);
    fs::remove_dir_all(copy.join("meta.before-restore")).unwrap();
    assert!(matches!(
        restore(&mut &text[..], &copy),
        Err(Error::LostCommits { .. })
    ));
    let other = scratch.path().join("other");
    Pool::create(&other, &options()).unwrap().shutdown().unwrap();
    assert!(
        matches!(restore(&mut &text[..], &other), Err(Error::Refused { .. })),
        "of another pool"
    );
    assert!(matches!(
        restore(&mut &text[..], scratch.path()),
        Err(Error::NotFound { .. })
    ));
}
