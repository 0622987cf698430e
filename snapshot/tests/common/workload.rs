//! A seeded workload on a real pool that states in [`Facts`] what it asked for and what was acknowledged.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stillpoint_snapshot::sim::Rng;
use stillpoint_snapshot::{
    Checksums, CloneSpec, CopySource, Error, Hooks, Pin, Point, Pool, PoolOptions, Result, SnapshotSpec,
    Volume, VolumeSpec,
};

use super::facts::{Crash, Facts, Found, SECTOR, Stamp, What, stamped_run, stamps};

/// 1 MiB: four map pages of 64 grains.
const SECTORS: u64 = 2048;
const GRAIN_SECTORS: u64 = 8;
/// Below this grain two threads share grains, above it they own runs of them.
const SHARED_GRAINS: u64 = 128;
const MOST_SNAPSHOTS: usize = 5;
const MOST_CLONES: usize = 2;
/// Points in time that the coordinator keeps for copies.
const MOST_PINS: usize = 2;
/// Two map pages: what zeroes more leaves a tombstone.
const TOMBSTONE_SECTORS: u64 = SECTORS / 2;
/// Volumes of the coordinator grow to at most this.
const MOST_SECTORS: u64 = SECTORS + SECTORS / 2;

/// What a child process is told.
#[derive(Clone, Debug)]
pub(crate) struct Orders {
    pub(crate) dir: PathBuf,
    pub(crate) seed: u64,
    /// Operations per thread; the process then shuts the pool down.
    pub(crate) steps: u64,
    /// Puts the metadata in the place of its copies, by a restore before the work and a compaction in the middle of it.
    /// Without, chance does.
    pub(crate) exchanges: bool,
}

impl Orders {
    pub(crate) fn vars(&self) -> Vec<(&'static str, String)> {
        vec![
            ("STILLPOINT_CHILD_DIR", self.dir.display().to_string()),
            ("STILLPOINT_CHILD_SEED", self.seed.to_string()),
            ("STILLPOINT_CHILD_STEPS", self.steps.to_string()),
            ("STILLPOINT_CHILD_EXCHANGES", self.exchanges.to_string()),
        ]
    }

    /// The orders in the environment; a child without any must fail, not pass.
    pub(crate) fn from_env() -> Self {
        let var = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| panic!("{name}: only the crash tests run this"))
        };
        Self {
            dir: var("STILLPOINT_CHILD_DIR").into(),
            seed: var("STILLPOINT_CHILD_SEED").parse().expect("a seed"),
            steps: var("STILLPOINT_CHILD_STEPS").parse().expect("a count"),
            exchanges: var("STILLPOINT_CHILD_EXCHANGES").parse().expect("yes or no"),
        }
    }

    pub(crate) fn pool(&self) -> PathBuf {
        self.dir.join("pool")
    }

    pub(crate) fn facts(&self) -> PathBuf {
        self.dir.join("facts")
    }
}

/// Small and quick to commit, so that a short run has many commits, checkpoints and jobs.
pub(crate) fn options() -> PoolOptions {
    PoolOptions {
        ballast_bytes: 1 << 20,
        min_free_bytes: 1 << 20,
        commit_ms: 15,
        checkpoint_txgs: 6,
        job_pages: 2,
        tombstone_bytes: TOMBSTONE_SECTORS * SECTOR as u64,
        loan_bytes: 128 << 10,
        seal_after_ms: 0,
        seal_rate: 1 << 30,
        ..PoolOptions::default()
    }
}

/// Notes the steps of what runs in the background.
struct Steps(Arc<Facts>);

impl Hooks for Steps {
    fn at(&self, point: Point) {
        if ["commit.", "checkpoint.", "job.", "zero.", "pin.", "compact."]
            .iter()
            .any(|family| point.starts_with(family))
        {
            self.0.passed(point);
        }
    }
}

/// Opens the pool, or makes it with its three volumes when it is not there; ends with a clean stop. Any error of the
/// store ends it too, after the operation that met it was noted as failed.
pub(crate) fn run(orders: &Orders) -> Result<()> {
    let facts = Arc::new(Facts::append(&orders.facts()));
    let (dir, mut rng) = (orders.pool(), Rng::new(orders.seed));
    facts.passed("process");
    let options = PoolOptions {
        hooks: Some(Arc::new(Steps(Arc::clone(&facts)))),
        ..options()
    };
    let pool = if Pool::exists(&dir) {
        if rng.chance(25) || orders.exchanges {
            remake(&dir, &options, &facts)?;
        }
        Pool::open(&dir, &options)?
    } else {
        Pool::create(&dir, &options)?
    };
    facts.passed("start");
    let done = work(&pool, &facts, orders, rng);
    let stopped = pool.shutdown();
    done.and(stopped)
}

fn work(pool: &Pool, facts: &Facts, orders: &Orders, rng: Rng) -> Result<()> {
    for name in ["a", "b", "p"] {
        if pool.volume(name).is_none() {
            let what = What::Create {
                volume: name.to_owned(),
                sectors: SECTORS,
            };
            step(facts, 0, &what, |_| create(pool, name))?;
        }
    }
    observe(pool, facts, pool.volumes().into_iter().map(|info| info.name))?;
    std::thread::scope(|scope| {
        let writers = [1, 2].map(|thread| scope.spawn(move || write(pool, facts, thread, orders)));
        let coordinator = Coordinator {
            pool,
            facts,
            rng,
            pins: Vec::new(),
        };
        let coordinator = coordinator.run(orders);
        let ended = writers.map(|writer| writer.join().expect("no panic"));
        ended.into_iter().fold(coordinator, Result::and)
    })
}

/// Notes what volumes hold now; nobody may write to them meanwhile.
fn observe(pool: &Pool, facts: &Facts, names: impl IntoIterator<Item = String>) -> Result<()> {
    for name in names {
        let volume = pool.volume(&name).expect("listed");
        let mut bytes = vec![0xee; volume.size_bytes() as usize];
        volume.read(0, &mut bytes)?;
        let stamps = stamps(&bytes).expect("whole sectors");
        let what = What::Observed { volume: name, stamps };
        facts.done(facts.begin(0, &what));
    }
    Ok(())
}

/// Makes the metadata anew from its dump, as `store dump` and `store restore` do.
fn remake(dir: &Path, options: &PoolOptions, facts: &Facts) -> Result<()> {
    // A dump shows what is committed: what the warm log has must be committed first.
    Pool::open(dir, options)?.shutdown()?;
    let mut text = Vec::new();
    stillpoint_snapshot::dump(dir, &mut text)?;
    let kept = dir.join("meta.before-restore");
    if kept.exists() {
        std::fs::remove_dir_all(&kept).expect("the operator can remove it");
    }
    step(facts, 0, &What::Restore, |_| {
        stillpoint_snapshot::restore(&mut text.as_slice(), dir)
    })
}

fn create(pool: &Pool, name: &str) -> Result<Volume> {
    let spec = VolumeSpec {
        name: name.to_owned(),
        size_bytes: SECTORS * SECTOR as u64,
        block_size: 512,
        attributes: b"test".to_vec(),
    };
    let volume = pool.create_volume(&spec)?;
    if name == "b" {
        volume.set_checksums(Checksums::Always)?;
    }
    Ok(volume)
}

pub(crate) fn read_all(volume: &Volume) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; volume.size_bytes() as usize];
    volume.read(0, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// One writer: its sectors are its own, half of its grains are shared with the other writer.
fn write(pool: &Pool, facts: &Facts, thread: u64, orders: &Orders) -> Result<()> {
    let mut rng = Rng::new(orders.seed ^ (thread << 40));
    let volumes = ["a", "b"].map(|name| pool.volume(name).expect("made before"));
    for _ in 0..orders.steps {
        let volume = &volumes[rng.index(2)];
        let name = volume.name()?;
        let (sector, count) = own_range(&mut rng, thread);
        let done = match rng.below(100) {
            0..12 => step(facts, thread, &What::Flush { volume: name }, |_| volume.flush()),
            12..24 => {
                let what = What::Zero {
                    volume: name,
                    sector,
                    count,
                };
                let unmap = rng.chance(50);
                step(facts, thread, &what, |_| zero(volume, sector, count, unmap))
            }
            n => {
                let fua = n < 32;
                let what = What::Write {
                    volume: name,
                    sector,
                    count,
                    fua,
                };
                step(facts, thread, &what, |op| put(volume, sector, count, op, fua))
            }
        };
        go_on(done)?;
    }
    Ok(())
}

/// An initiator goes on after an error of a medium or of space, and after the jobs are so far behind that reverts are as
/// deep as they may be; nobody does after the pool has stopped.
fn go_on(done: Result<()>) -> Result<()> {
    match done {
        Err(Error::NoSpace | Error::Io { .. } | Error::Medium { .. } | Error::Limit { .. }) => Ok(()),
        other => other,
    }
}

fn own_range(rng: &mut Rng, thread: u64) -> (u64, u64) {
    let mine = thread % 2;
    if rng.chance(60) {
        // Four sectors of a grain are mine, the other four are my neighbour's.
        let grain = rng.below(SHARED_GRAINS);
        let start = rng.below(4);
        (grain * GRAIN_SECTORS + mine * 4 + start, 1 + rng.below(4 - start))
    } else {
        let runs = (SECTORS / GRAIN_SECTORS - SHARED_GRAINS) / 16;
        let first = (SHARED_GRAINS + rng.below(runs) * 16 + mine * 8) * GRAIN_SECTORS;
        let start = if rng.chance(50) {
            rng.below(8) * GRAIN_SECTORS
        } else {
            rng.below(64)
        };
        (first + start, 1 + rng.below(64 - start))
    }
}

/// As the daemon writes: without waiting where that is possible.
fn put(volume: &Volume, sector: u64, count: u64, op: Stamp, fua: bool) -> Result<()> {
    let (offset, data) = (sector * SECTOR as u64, stamped_run(sector, count, op));
    if !fua && volume.try_write(offset, &data)? {
        return Ok(());
    }
    volume.write(offset, &data, fua)
}

fn zero(volume: &Volume, sector: u64, count: u64, unmap: bool) -> Result<()> {
    let (offset, len) = (sector * SECTOR as u64, count * SECTOR as u64);
    if unmap {
        volume.unmap(&[(offset, len)])
    } else {
        volume.write_zeroes(offset, len, false)
    }
}

fn step<T>(facts: &Facts, thread: u64, what: &What, run: impl FnOnce(Stamp) -> Result<T>) -> Result<()> {
    let op = facts.begin(thread, what);
    match run(op) {
        Ok(_) => facts.done(op),
        Err(error) => {
            facts.failed(op);
            return Err(error);
        }
    }
    Ok(())
}

/// A point in time of a volume, and what it shows.
struct Pinned {
    pin: Pin,
    /// As the facts call it.
    volume: String,
    name: String,
    shows: Vec<Stamp>,
}

/// Takes, deletes, clones and reverts; writes to the volumes that are its own (`p` and the clones).
struct Coordinator<'a> {
    pool: &'a Pool,
    facts: &'a Facts,
    rng: Rng,
    pins: Vec<Pinned>,
}

impl Coordinator<'_> {
    fn run(mut self, orders: &Orders) -> Result<()> {
        for step in 0..orders.steps {
            if orders.exchanges && step == orders.steps / 2 {
                go_on(self.compact())?;
            }
            let done = match self.rng.below(100) {
                0..33 => self.write(),
                33..38 => self.bury(),
                38..39 => self.compact(),
                39..42 => self.pin(),
                42..48 => self.copy(),
                48..58 => self.flush(),
                58..73 => self.snapshot(),
                73..84 => self.delete_snapshot(),
                84..90 => self.revert(),
                90..93 => self.clone(),
                93..96 => self.grow(),
                96..98 => self.checksums(),
                _ => self.delete_clone(),
            };
            if done.is_err() {
                go_on(done)?;
                // What a failed write left is copied, cut and reverted to later: it has to be known.
                go_on(observe(self.pool, self.facts, self.own()))?;
            }
        }
        Ok(())
    }

    fn own(&self) -> Vec<String> {
        let names = self.pool.volumes().into_iter().map(|info| info.name);
        names.filter(|name| name != "a" && name != "b").collect()
    }

    fn live(&self) -> Vec<(String, stillpoint_snapshot::SnapshotInfo)> {
        self.pool
            .snapshots(None)
            .into_iter()
            .map(|info| (info.volume_name.clone(), info))
            .collect()
    }

    fn write(&mut self) -> Result<()> {
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        let sectors = handle.size_bytes() / SECTOR as u64;
        let sector = self.rng.below(sectors);
        let count = 1 + self.rng.below(40.min(sectors - sector));
        // Half of the time whole grains: those may go without waiting.
        let (sector, count) = if self.rng.chance(50) {
            let first = sector - sector % GRAIN_SECTORS;
            (first, count.next_multiple_of(GRAIN_SECTORS).min(sectors - first))
        } else {
            (sector, count)
        };
        if self.rng.chance(15) {
            let unmap = self.rng.chance(50);
            let what = What::Zero {
                volume,
                sector,
                count,
            };
            step(self.facts, 0, &what, |_| zero(&handle, sector, count, unmap))
        } else {
            let what = What::Write {
                volume,
                sector,
                count,
                fua: false,
            };
            step(self.facts, 0, &what, |op| put(&handle, sector, count, op, false))
        }
    }

    /// Between its own volumes, whose content at any time is known; at the same place, since sectors carry their number.
    fn copy(&mut self) -> Result<()> {
        if !self.pins.is_empty() && self.rng.chance(40) {
            return self.copy_pinned();
        }
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        let snapshots = self.own_snapshots();
        let snapshot = self
            .rng
            .pick(&snapshots)
            .filter(|_| self.rng.clone().chance(60))
            .cloned();
        let (source, size, snapshot) = match snapshot {
            Some((source, info)) => (source, info.size_bytes, Some(info)),
            None => {
                let source = self.rng.pick(&own).expect("p is always there").clone();
                let size = self.pool.volume(&source).expect("listed").size_bytes();
                (source, size, None)
            }
        };
        let (sector, count) = self.some_range(size.min(handle.size_bytes()));
        let what = What::Copy {
            volume,
            sector,
            count,
            source: source.clone(),
            snapshot: snapshot.as_ref().map(|info| info.name.clone()),
        };
        let from = self.pool.volume(&source);
        let (offset, len) = (sector * SECTOR as u64, count * SECTOR as u64);
        step(self.facts, 0, &what, |_| match (&snapshot, &from) {
            (Some(info), _) => handle.copy(offset, &CopySource::Snapshot(info.id), offset, len),
            (None, Some(from)) => handle.copy(offset, &CopySource::Volume(from), offset, len),
            (None, None) => unreachable!("picked from the list"),
        })
    }

    /// Of one that was taken before; whatever happened to its volume since.
    fn copy_pinned(&mut self) -> Result<()> {
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        let at = self.rng.index(self.pins.len());
        let size = self.pins[at].pin.size_bytes().min(handle.size_bytes());
        let (sector, count) = self.some_range(size);
        let pinned = &self.pins[at];
        let what = What::Copy {
            volume,
            sector,
            count,
            source: pinned.volume.clone(),
            snapshot: Some(pinned.name.clone()),
        };
        let (offset, len) = (sector * SECTOR as u64, count * SECTOR as u64);
        step(self.facts, 0, &what, |_| {
            handle.copy(offset, &CopySource::Pin(&pinned.pin), offset, len)
        })
    }

    /// Sectors of the first `size` bytes, more often whole grains than not.
    fn some_range(&mut self, size: u64) -> (u64, u64) {
        let sectors = size / SECTOR as u64;
        let (mut sector, mut count) = (self.rng.below(sectors), 1 + self.rng.below(1200));
        if self.rng.chance(70) {
            sector -= sector % GRAIN_SECTORS;
            count = count.next_multiple_of(GRAIN_SECTORS);
        }
        (sector, count.min(sectors - sector))
    }

    /// Keeps a volume as it is, or lets one go that must not have changed.
    fn pin(&mut self) -> Result<()> {
        if self.pins.len() == MOST_PINS {
            let at = self.rng.index(MOST_PINS);
            let pinned = self.pins.swap_remove(at);
            let mut bytes = vec![0xee; pinned.pin.size_bytes() as usize];
            pinned.pin.read(0, &mut bytes)?;
            let found = stamps(&bytes).expect("whole sectors");
            assert!(found == pinned.shows, "pin {} has changed", pinned.name);
            return Ok(());
        }
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        let name = format!("pin{}", self.rng.bits());
        let what = What::Pin {
            volume: volume.clone(),
            name: name.clone(),
        };
        let mut made = None;
        step(self.facts, 0, &what, |_| {
            made = Some(handle.pin()?);
            Ok(())
        })?;
        let mut bytes = vec![0xee; handle.size_bytes() as usize];
        handle.read(0, &mut bytes)?;
        self.pins.push(Pinned {
            pin: made.expect("just made"),
            volume,
            name,
            shows: stamps(&bytes).expect("whole sectors"),
        });
        Ok(())
    }

    /// Zeroes enough of a volume for a tombstone, not by whole pages.
    fn bury(&mut self) -> Result<()> {
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        let sectors = handle.size_bytes() / SECTOR as u64;
        let sector = self.rng.below(sectors - TOMBSTONE_SECTORS);
        let more = self.rng.below(sectors - TOMBSTONE_SECTORS - sector);
        let count = TOMBSTONE_SECTORS + 1 + more;
        let unmap = self.rng.chance(50);
        let what = What::Bury {
            volume,
            sector,
            count,
        };
        step(self.facts, 0, &what, |_| zero(&handle, sector, count, unmap))
    }

    fn compact(&mut self) -> Result<()> {
        step(self.facts, 0, &What::Compact, |_| self.pool.compact(|_, _| {}))
    }

    fn checksums(&mut self) -> Result<()> {
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        let modes = [Checksums::Off, Checksums::Sealed, Checksums::Always];
        let mode = *self.rng.pick(&modes).expect("three");
        step(self.facts, 0, &What::Checksums { volume }, |_| {
            handle.set_checksums(mode)
        })
    }

    fn grow(&mut self) -> Result<()> {
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        let old = handle.size_bytes() / SECTOR as u64;
        // Not by whole grains: the last grain of the old size is completed.
        let sectors = old + 1 + self.rng.below(200);
        if sectors > MOST_SECTORS {
            return Ok(());
        }
        step(self.facts, 0, &What::Grow { volume, sectors }, |_| {
            handle.grow(sectors * SECTOR as u64)
        })
    }

    fn flush(&mut self) -> Result<()> {
        let own = self.own();
        let volume = self.rng.pick(&own).expect("p is always there").clone();
        let handle = self.pool.volume(&volume).expect("listed");
        step(self.facts, 0, &What::Flush { volume }, |_| handle.flush())
    }

    fn snapshot(&mut self) -> Result<()> {
        if self.live().len() >= MOST_SNAPSHOTS * 3 {
            return self.delete_snapshot();
        }
        let mut volumes = vec!["a".to_owned(), "b".to_owned(), "p".to_owned()];
        volumes.extend(self.own().into_iter().filter(|name| name != "p"));
        volumes.truncate(2 + self.rng.index(volumes.len() - 1));
        let ids: Vec<_> = volumes
            .iter()
            .map(|name| self.pool.volume(name).expect("listed").id())
            .collect();
        let name = format!("s{}", self.rng.bits());
        let spec = SnapshotSpec {
            name: name.clone(),
            ..SnapshotSpec::default()
        };
        step(self.facts, 0, &What::Snapshot { name, volumes }, |_| {
            self.pool.begin_cut(&ids, &spec)?.commit()
        })
    }

    fn delete_snapshot(&mut self) -> Result<()> {
        let live = self.live();
        let Some((volume, info)) = self.rng.pick(&live).cloned() else {
            return Ok(());
        };
        let what = What::DeleteSnapshot {
            volume,
            snapshot: info.name,
        };
        step(self.facts, 0, &what, |_| self.pool.delete_snapshot(info.id))
    }

    fn own_snapshots(&self) -> Vec<(String, stillpoint_snapshot::SnapshotInfo)> {
        self.live()
            .into_iter()
            .filter(|(volume, _)| volume != "a" && volume != "b")
            .collect()
    }

    fn revert(&mut self) -> Result<()> {
        let own = self.own_snapshots();
        let Some((volume, info)) = self.rng.pick(&own).cloned() else {
            return Ok(());
        };
        if !self.pool.volumes().iter().any(|known| known.name == volume) {
            return Ok(());
        }
        let what = What::Revert {
            volume: volume.clone(),
            snapshot: info.name.clone(),
        };
        step(self.facts, 0, &what, |_| self.pool.revert(info.volume, info.id))?;
        if self.rng.chance(50) {
            return Ok(());
        }
        // Nothing but the new head stands on it then: the branch is folded into its child.
        let what = What::DeleteSnapshot {
            volume,
            snapshot: info.name,
        };
        step(self.facts, 0, &what, |_| self.pool.delete_snapshot(info.id))
    }

    fn clone(&mut self) -> Result<()> {
        if self.own().len() > MOST_CLONES {
            return self.delete_clone();
        }
        let own = self.own_snapshots();
        let Some((volume, info)) = self.rng.pick(&own).cloned() else {
            return Ok(());
        };
        let to = format!("c{}", self.rng.bits());
        let what = What::Clone {
            volume,
            snapshot: info.name,
            to: to.clone(),
        };
        let spec = CloneSpec {
            name: to,
            read_only: false,
            attributes: Vec::new(),
        };
        step(self.facts, 0, &what, |_| self.pool.clone_snapshot(info.id, &spec))
    }

    fn delete_clone(&mut self) -> Result<()> {
        let clones: Vec<String> = self.own().into_iter().filter(|name| name != "p").collect();
        let Some(volume) = self.rng.pick(&clones).cloned() else {
            return Ok(());
        };
        for (_, info) in self.live().into_iter().filter(|(name, _)| *name == volume) {
            let what = What::DeleteSnapshot {
                volume: volume.clone(),
                snapshot: info.name,
            };
            step(self.facts, 0, &what, |_| self.pool.delete_snapshot(info.id))?;
        }
        step(
            self.facts,
            0,
            &What::DeleteVolume {
                volume: volume.clone(),
            },
            |_| self.pool.delete_volume(&volume, false),
        )
    }
}

/// A pool as the judge sees it.
pub(crate) struct FoundPool<'a>(pub(crate) &'a Pool);

impl Found for FoundPool<'_> {
    fn volumes(&self) -> Vec<String> {
        self.0.volumes().into_iter().map(|info| info.name).collect()
    }

    fn read_volume(&self, name: &str) -> std::result::Result<Vec<u8>, String> {
        read_all(&self.0.volume(name).ok_or("gone")?).map_err(|what| format!("volume {name}: {what}"))
    }

    fn snapshots(&self) -> Vec<(String, String)> {
        self.0
            .snapshots(None)
            .into_iter()
            .map(|info| (info.volume_name, info.name))
            .collect()
    }

    fn read_snapshot(&self, volume: &str, snapshot: &str) -> std::result::Result<Vec<u8>, String> {
        let info = self.0.snapshot(volume, snapshot).ok_or("gone")?;
        let mut bytes = vec![0xee; info.size_bytes as usize];
        self.0
            .read_snapshot(info.id, 0, &mut bytes)
            .map_err(|error| format!("{volume}@{snapshot}: {error}"))?;
        Ok(bytes)
    }
}

/// What a crash left, and what was under way when it came.
pub(crate) struct Verdict {
    pub(crate) judged: std::result::Result<(), String>,
    pub(crate) under_way: BTreeSet<String>,
}

/// Judges the pool and the facts below `dir`, which is the image of a crash or the leavings of a killed process.
pub(crate) fn judge(dir: &Path, facts: &str, crash: Crash) -> Verdict {
    let history = super::facts::History::read(facts, crash);
    let mut under_way = history.under_way();
    let judged = judge_pool(&dir.join("pool"), &history, crash, &mut under_way);
    Verdict { judged, under_way }
}

fn judge_pool(
    dir: &Path,
    history: &super::facts::History,
    crash: Crash,
    under_way: &mut BTreeSet<String>,
) -> std::result::Result<(), String> {
    let options = || PoolOptions {
        // The replay runs on the kernel that wrote the image; it must not pass for the same boot.
        boot_id: (crash == Crash::Power).then(|| "the boot after".to_owned()),
        ..options()
    };
    if !Pool::exists(dir) {
        if history.acknowledged() > 0 {
            return Err("the pool is gone".to_owned());
        }
        // Nothing was promised yet; the operator must be able to start again.
        let pool = Pool::create(dir, &options()).map_err(|error| format!("no new start: {error}"))?;
        return pool.shutdown().map_err(|error| error.to_string());
    }
    let report = stillpoint_snapshot::check(dir).map_err(|error| format!("check: {error}"))?;
    if !report.is_clean() {
        return Err(format!("check: {report}"));
    }
    let mut text = Vec::new();
    stillpoint_snapshot::dump(dir, &mut text).map_err(|error| format!("dump: {error}"))?;
    let text = String::from_utf8_lossy(&text);
    let jobs = ["drop_snapshot", "drop_head", "collapse", "zero"];
    let unfinished = jobs.iter().filter(|kind| text.contains(&format!("\"{kind}\"")));
    under_way.extend(unfinished.map(|kind| format!("job {kind}")));
    let pool = Pool::open(dir, &options()).map_err(|error| format!("open: {error}"))?;
    let verdict = history.judge(&FoundPool(&pool));
    pool.shutdown().map_err(|error| error.to_string())?;
    verdict
}
