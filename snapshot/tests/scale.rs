//! Large pools on real files: a map that is larger than its cache, a volume of 64 TiB, a thousand volumes. `tests/soak scale`
//! runs them in their full size (`STILLPOINT_SOAK_MAP_MIB`, `STILLPOINT_SOAK_CACHE_MIB`) and prints the figures.

#![expect(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is its purpose"
)]

use std::fs;
use std::io::{BufReader, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use stillpoint_snapshot::sim::Rng;
use stillpoint_snapshot::{DiffTo, Pool, PoolOptions, SnapshotSpec, VolumeSpec, check, dump, restore};

const GRAIN: u64 = 4096;
const PAGE_ENTRIES: u64 = 64;
/// Bytes of a page whose entries are no runs.
const PAGE_BYTES: u64 = PAGE_ENTRIES * 8;
const CHUNK_GRAINS: u64 = 4096;
const TIB: u64 = 1 << 40;
/// Far above what a loaded machine needs for the small sizes; the soak prints the time.
const PATIENCE: Duration = Duration::from_secs(120);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

fn options(cache_bytes: usize) -> PoolOptions {
    PoolOptions {
        ballast_bytes: 0,
        min_free_bytes: 0,
        cache_bytes,
        ..PoolOptions::default()
    }
}

fn spec(name: &str, size_bytes: u64) -> VolumeSpec {
    VolumeSpec {
        name: name.into(),
        size_bytes,
        block_size: 512,
        attributes: Vec::new(),
    }
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A pool whose volume has `pages` full pages, none of which is a run: written as a dump, which is the quick way to a
/// map of this size. The data file is as long as it says, and sparse.
fn with_map(dir: &Path, pages: u64) {
    let pool = Pool::create(dir, &options(1 << 20)).unwrap();
    pool.create_volume(&spec("large", 64 * TIB)).unwrap();
    pool.shutdown().unwrap();
    drop(pool);
    let mut small = Vec::new();
    dump(dir, &mut small).unwrap();
    let small = String::from_utf8(small).unwrap();
    let grains = pages * PAGE_ENTRIES;
    // Chunk 0 has the superblocks.
    let chunks = 1 + grains.div_ceil(CHUNK_GRAINS);
    let text_path = dir.join("text");
    let mut text = std::io::BufWriter::new(fs::File::create(&text_path).unwrap());
    let mut lines = 0;
    for line in small.lines().filter(|line| !line.starts_with("{\"end\"")) {
        let line = line
            .replace("\"mapped_grains\":0", &format!("\"mapped_grains\":{grains}"))
            .replace("\"chunks\":1", &format!("\"chunks\":{chunks}"))
            .replace("\"chunks\":0", &format!("\"chunks\":{chunks}"));
        if line.starts_with("{\"used\"") {
            continue;
        }
        writeln!(text, "{line}").unwrap();
        lines += 1;
    }
    for page in 0..pages {
        let last = CHUNK_GRAINS + (page + 1) * PAGE_ENTRIES - 1;
        // Backwards: no entry goes on where the one before it ended.
        let entries: Vec<String> = (0..PAGE_ENTRIES).map(|i| format!("1*{}@1", last - i)).collect();
        let entries = entries.join(" ");
        writeln!(
            text,
            "{{\"page\":{{\"branch\":1,\"page\":{page},\"epoch\":1,\"entries\":\"{entries}\"}}}}"
        )
        .unwrap();
        lines += 1;
    }
    for chunk in 0..chunks {
        let used = match chunk {
            0 => 2,
            _ => (grains - (chunk - 1) * CHUNK_GRAINS).min(CHUNK_GRAINS),
        };
        writeln!(text, "{{\"used\":{{\"chunk\":{chunk},\"grains\":\"0+{used}\"}}}}").unwrap();
        lines += 1;
    }
    writeln!(text, "{{\"end\":{{\"lines\":{lines}}}}}").unwrap();
    drop(text);
    let data = fs::File::options().write(true).open(dir.join("data")).unwrap();
    data.set_len((CHUNK_GRAINS + grains) * GRAIN).unwrap();
    let reader = fs::File::open(&text_path).unwrap();
    restore(&mut BufReader::new(reader), dir).unwrap();
    fs::remove_file(&text_path).unwrap();
    fs::remove_dir_all(dir.join("meta.before-restore")).unwrap();
}

/// Opening reads no map, and reading all over it keeps no more of it than the cache may have.
#[test]
fn a_map_larger_than_its_cache() {
    let soak = number("STILLPOINT_SOAK_MAP_MIB");
    let pages = (soak.unwrap_or(4) << 20) / PAGE_BYTES;
    let cache = number("STILLPOINT_SOAK_CACHE_MIB").unwrap_or(1) << 20;
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("pool");
    let begun = Instant::now();
    with_map(&dir, pages);
    let made = begun.elapsed();
    let before = resident_kib();
    let begun = Instant::now();
    let pool = Pool::open(&dir, &options(usize::try_from(cache).unwrap())).unwrap();
    let opened = begun.elapsed();
    let after_open = resident_kib();
    assert!(opened < PATIENCE, "{opened:?}");
    let misses = pool.stats().page_misses;
    assert!(misses < 16, "opening has looked {misses} pages up");
    let volume = pool.volume("large").unwrap();
    let (mut rng, mut buffer) = (Rng::new(1), vec![1; 4096]);
    // Each page once on average, and some changed.
    for n in 0..pages {
        let at = rng.below(pages * PAGE_ENTRIES) * GRAIN;
        if n % 16 == 0 {
            volume.write(at, &buffer, false).unwrap();
        } else {
            volume.read(at, &mut buffer).unwrap();
        }
    }
    let stats = pool.stats();
    let most = usize::try_from(cache / PAGE_BYTES).unwrap();
    assert!(
        stats.cached_pages <= most + stats.dirty_pages,
        "{} pages are cached, {most} of {PAGE_BYTES} bytes would fill the cache",
        stats.cached_pages
    );
    let at_work = resident_kib();
    println!(
        "soak scale: {} MiB of map made in {made:.1?} ({} MiB on disk), opened in {opened:.2?} with {} MiB more resident, \
         {} MiB after {pages} random reads and writes with a cache of {} MiB; {} pages cached",
        (pages * PAGE_BYTES) >> 20,
        stats.metadata_bytes >> 20,
        after_open.saturating_sub(before) >> 10,
        at_work.saturating_sub(before) >> 10,
        cache >> 20,
        stats.cached_pages,
    );
    pool.shutdown().unwrap();
    drop(pool);
    if soak.is_none() {
        let report = check(&dir).unwrap();
        assert!(report.is_clean(), "{report}");
    }
}

#[test]
fn a_volume_of_64_tib_costs_what_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("pool");
    let pool = Pool::create(&dir, &options(1 << 20)).unwrap();
    let volume = pool.create_volume(&spec("huge", 64 * TIB)).unwrap();
    let places = [0, 2 * TIB - 512, 17 * TIB + 1536, 64 * TIB - 512];
    for (n, at) in (1u8..).zip(places) {
        volume.write(at, &[n; 512], false).unwrap();
    }
    let spec = SnapshotSpec {
        name: "s".into(),
        ..SnapshotSpec::default()
    };
    let id = pool.begin_cut(&[volume.id()], &spec).unwrap().commit().unwrap();
    let id = id.first().unwrap().id;
    volume.write(64 * TIB - 512, &[9; 512], false).unwrap();
    let changed = pool.diff(Some(id), DiffTo::Head(volume.id())).unwrap();
    let changed: Vec<(u64, u64)> = changed.iter().map(|e| (e.offset, e.len)).collect();
    assert_eq!(changed, [(64 * TIB - GRAIN, GRAIN)]);
    // All of it at once, but for the last grain: by a tombstone.
    volume.unmap(&[(0, 64 * TIB - GRAIN)]).unwrap();
    pool.shutdown().unwrap();
    drop(pool);
    let pool = Pool::open(&dir, &options(1 << 20)).unwrap();
    let volume = pool.volume("huge").unwrap();
    let mut bytes = [7; 512];
    for (n, at) in (1u8..).zip(places) {
        volume.read(at, &mut bytes).unwrap();
        assert!(bytes == [if at == 64 * TIB - 512 { 9 } else { 0 }; 512], "{at}");
        pool.read_snapshot(id, at, &mut bytes).unwrap();
        assert!(bytes == [n; 512], "{at}");
    }
    assert_eq!(pool.stats().allocated_bytes, 5 * GRAIN);
    pool.shutdown().unwrap();
    let kept: u64 = fs::metadata(dir.join("data")).unwrap().len();
    assert!(kept < 64 << 20, "the data file has {kept} bytes");
}

#[test]
fn a_thousand_volumes_in_one_pool() {
    let count = number("STILLPOINT_SOAK_VOLUMES").unwrap_or(1000);
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("pool");
    let pool = Pool::create(&dir, &options(1 << 20)).unwrap();
    let begun = Instant::now();
    let specs: Vec<VolumeSpec> = (0..count).map(|n| spec(&format!("v{n}"), TIB)).collect();
    for batch in specs.chunks(256) {
        pool.create_volumes(batch).unwrap();
    }
    let made = begun.elapsed();
    for n in 0..count {
        let volume = pool.volume(&format!("v{n}")).unwrap();
        volume
            .write(n * GRAIN, &n.to_be_bytes().repeat(512), false)
            .unwrap();
    }
    pool.shutdown().unwrap();
    drop(pool);
    let begun = Instant::now();
    let pool = Pool::open(&dir, &options(1 << 20)).unwrap();
    let opened = begun.elapsed();
    assert_eq!(pool.volumes().len() as u64, count);
    let mut bytes = [0; 4096];
    for n in 0..count {
        let volume = pool.volume(&format!("v{n}")).unwrap();
        volume.read(n * GRAIN, &mut bytes).unwrap();
        assert!(bytes == *n.to_be_bytes().repeat(512), "v{n}");
    }
    println!("soak scale: {count} volumes made in {made:.1?}, opened in {opened:.2?}");
    // All in one cut.
    let ids: Vec<_> = pool.volumes().iter().map(|info| info.id).collect();
    let spec = SnapshotSpec {
        name: "all".into(),
        ..SnapshotSpec::default()
    };
    let begun = Instant::now();
    let cut = pool.begin_cut(&ids, &spec).unwrap().commit().unwrap();
    assert_eq!(cut.len() as u64, count);
    println!(
        "soak scale: one cut over {count} volumes took {:.2?}",
        begun.elapsed()
    );
    pool.shutdown().unwrap();
}
