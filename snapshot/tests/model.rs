//! The store against plain vectors: random operations on several volumes, compared after each step, checked with the
//! offline check, with power cuts at random calls to the media. One seed is one run; a failing one is shrunk to the
//! steps that matter before it is shown.
//!
//! `STILLPOINT_SEED` runs one seed, `STILLPOINT_SOAK_SEEDS` raises their number.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, Once};

use stillpoint_snapshot::sim::{Call, Failure, Fault, Loss, Rng, World};
use stillpoint_snapshot::{
    Caw, Checksums, CloneSpec, CopySource, DiffTo, Error, ExtentKind, Pin, Pool, PoolOptions, SnapshotChange,
    SnapshotSpec, Volume, VolumeSpec, check_media,
};

use common::facts::{SECTOR, Stamp, stamped, stamped_run, stamps};
use common::model::{GRAIN_SECTORS, Model, ModelSnapshot, ModelVolume, Seen};

const QUICK_SEEDS: u64 = 80;
const STEPS: usize = 70;
const MOST_VOLUMES: usize = 4;
const MOST_SNAPSHOTS: usize = 9;
/// Two map pages and a bit, not a multiple of the grain.
const SECTORS: u64 = 2 * 64 * GRAIN_SECTORS + 3 * GRAIN_SECTORS + 5;
/// Sectors of a map page.
const PAGE_SECTORS: u64 = 64 * GRAIN_SECTORS;
const MOST_SECTORS: u64 = 5 * 64 * GRAIN_SECTORS;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    Zero,
    UnmapMany,
    Flush,
    CompareAndWrite,
    TryWrite,
    Copy,
    Pin,
    Create,
    Snapshot,
    Clone,
    Revert,
    DeleteSnapshot,
    DeleteVolume,
    Grow,
    Rename,
    Hold,
    Jobs,
    Seal,
    Mode,
    Commit,
    Tick,
    Reopen,
    Diff,
    LbaStatus,
}

/// How often each kind comes, of the sum of all.
const WEIGHTS: &[(Kind, u64)] = &[
    (Kind::Write, 34),
    (Kind::Zero, 9),
    (Kind::UnmapMany, 3),
    (Kind::Flush, 7),
    (Kind::CompareAndWrite, 3),
    (Kind::TryWrite, 3),
    (Kind::Copy, 9),
    (Kind::Pin, 3),
    (Kind::Create, 2),
    (Kind::Snapshot, 11),
    (Kind::Clone, 4),
    (Kind::Revert, 4),
    (Kind::DeleteSnapshot, 8),
    (Kind::DeleteVolume, 2),
    (Kind::Grow, 2),
    (Kind::Rename, 1),
    (Kind::Hold, 2),
    (Kind::Jobs, 7),
    (Kind::Seal, 6),
    (Kind::Mode, 2),
    (Kind::Commit, 4),
    (Kind::Tick, 4),
    (Kind::Reopen, 2),
    (Kind::Diff, 4),
    (Kind::LbaStatus, 2),
];

/// A step chooses by its own seed, so that it still means something when others before it are left out.
#[derive(Clone, Copy, Debug)]
struct Step {
    kind: Kind,
    seed: u64,
    trouble: Planned,
}

#[derive(Clone, Copy, Debug)]
enum Planned {
    Nothing,
    /// The power goes at this call of the step, counted from its begin.
    Cut(u64),
    /// A call fails.
    Fault(Fault),
}

fn power_cut(rng: &mut Rng) -> Planned {
    if rng.chance(25) {
        Planned::Cut(rng.below(14))
    } else {
        Planned::Nothing
    }
}

fn media_fault(rng: &mut Rng) -> Planned {
    if !rng.chance(30) {
        return Planned::Nothing;
    }
    let call = *rng.pick(&Call::ALL).unwrap();
    let failure = if rng.chance(30) {
        Failure::NoSpace
    } else {
        Failure::Io
    };
    Planned::Fault(Fault {
        call,
        nth: rng.below(5),
        failure,
        sticky: rng.chance(30),
    })
}

fn steps(seed: u64, trouble: impl Fn(&mut Rng) -> Planned) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    let sum: u64 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    let step = |rng: &mut Rng| {
        let mut ticket = rng.below(sum);
        let kind = WEIGHTS
            .iter()
            .find(|(_, weight)| match ticket.checked_sub(*weight) {
                Some(left) => {
                    ticket = left;
                    false
                }
                None => true,
            });
        let kind = kind.unwrap().0;
        Step {
            kind,
            seed: rng.bits(),
            trouble: trouble(rng),
        }
    };
    (0..STEPS).map(|_| step(&mut rng)).collect()
}

fn options() -> PoolOptions {
    PoolOptions {
        manual: true,
        ballast_bytes: 0,
        min_free_bytes: 0,
        cache_bytes: 8 << 10,
        checkpoint_txgs: 3,
        checkpoint_bytes: 2 << 10,
        job_pages: 2,
        tombstone_bytes: 128 << 10,
        loan_bytes: 128 << 10,
        ..PoolOptions::default()
    }
}

/// The store under test beside its model.
struct Rig {
    world: World,
    pool: Pool,
    model: Model,
    stamp: Stamp,
    names: u64,
    /// What each step did, for the message of a failure.
    story: Vec<String>,
    /// What the FUA write of this step made durable: counts once a cut within the step has been judged.
    durable_now: Option<(String, Range<u64>)>,
    /// Points in time that are being kept, and what they show. No restart keeps them.
    pins: Vec<(Pin, Vec<Stamp>)>,
}

/// Why a step did not go well.
#[derive(Debug)]
enum Trouble {
    /// The store said so: right when a fault was planted, wrong otherwise.
    Store(Error),
    /// The store broke a promise.
    Wrong(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

impl From<String> for Trouble {
    fn from(what: String) -> Self {
        Self::Wrong(what)
    }
}

impl From<&str> for Trouble {
    fn from(what: &str) -> Self {
        Self::Wrong(what.to_owned())
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Store(error) => write!(f, "the store says: {error}"),
            Self::Wrong(what) => f.write_str(what),
        }
    }
}

impl Trouble {
    fn at(self, place: &str) -> Self {
        Self::Wrong(format!("{place}: {self}"))
    }
}

fn wrong<T>(what: String) -> Result<T, Trouble> {
    Err(Trouble::Wrong(what))
}

type Verdict = Result<(), Trouble>;

fn open(world: &World) -> Result<Pool, Trouble> {
    Ok(Pool::open_with(
        std::sync::Arc::new(world.disk()),
        Box::new(world.meta()),
        &options(),
    )?)
}

fn see(pool: &Pool) -> Result<Seen, Trouble> {
    let mut seen = Seen::default();
    for info in pool.volumes() {
        let mut bytes = vec![0xee; info.size_bytes as usize];
        pool.volume(&info.name)
            .ok_or("listed but not there")?
            .read(0, &mut bytes)?;
        let stamps = stamps(&bytes).map_err(|what| format!("volume {}: {what}", info.name))?;
        seen.volumes.insert(info.name, (stamps, info.read_only));
    }
    for info in pool.snapshots(None) {
        let mut bytes = vec![0xee; info.size_bytes as usize];
        pool.read_snapshot(info.id, 0, &mut bytes)?;
        let stamps =
            stamps(&bytes).map_err(|what| format!("snapshot {}@{}: {what}", info.volume_name, info.name))?;
        seen.snapshots
            .insert((info.volume_name, info.name), (stamps, info.hold));
    }
    Ok(seen)
}

fn check_world(world: &World) -> Verdict {
    // A copy: the check must not count as calls of the store.
    let still = world.after_cut(Loss::Nothing, &mut Rng::new(0));
    let report = check_media(&still.disk(), &mut still.meta())?;
    if report.is_clean() {
        Ok(())
    } else {
        wrong(format!("check: {report}"))
    }
}

impl Rig {
    fn new() -> Result<Self, Trouble> {
        let world = World::new();
        let disk = std::sync::Arc::new(world.disk());
        let pool = Pool::create_with(disk, Box::new(world.meta()), &options())?;
        let mut rig = Self {
            world,
            pool,
            model: Model::default(),
            stamp: 0,
            names: 0,
            story: Vec::new(),
            durable_now: None,
            pins: Vec::new(),
        };
        rig.create(SECTORS)?;
        rig.create(SECTORS)?;
        Ok(rig)
    }

    fn tell(&mut self, what: String) {
        self.story.push(what);
    }

    fn name(&mut self, prefix: &str) -> String {
        self.names += 1;
        format!("{prefix}{}", self.names)
    }

    /// One step, with its cut or fault, and everything compared afterwards.
    fn step(&mut self, step: Step) -> Verdict {
        self.disturbed_step(step)?;
        if let Some((name, range)) = self.durable_now.take() {
            for sector in range {
                let values = &mut self.model_of(&name).sectors[sector as usize];
                values.drain(..values.len() - 1);
            }
        }
        Ok(())
    }

    fn disturbed_step(&mut self, step: Step) -> Verdict {
        let before = self.model.clone();
        let mut rng = Rng::new(step.seed);
        match step.trouble {
            Planned::Nothing => {}
            Planned::Cut(call) => self.world.capture(call),
            Planned::Fault(fault) => self.world.fail(fault),
        }
        let result = self.run(step.kind, &mut rng);
        self.world.heal();
        match (result, step.trouble) {
            (Err(Trouble::Store(_)), Planned::Fault(_)) => self.after_fault(&before, &mut rng),
            (Ok(()), Planned::Fault(_)) if self.pool.poisoned().is_some() => {
                self.after_fault(&before, &mut rng)
            }
            (result, planned) => {
                result?;
                self.model
                    .equals(&see(&self.pool)?)
                    .map_err(|what| format!("reads: {what}"))?;
                check_world(&self.world)?;
                if matches!(planned, Planned::Cut(_)) {
                    self.after_cut(&before, &mut rng)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// The state must be the one before the step or the one after it.
    fn either(&self, before: &Model, seen: &Seen) -> Result<Model, Trouble> {
        let mut model = match (before.allows(seen), self.model.allows(seen)) {
            (Ok(()), _) => before.clone(),
            (_, Ok(())) => self.model.clone(),
            (Err(before), Err(after)) => {
                return wrong(format!("neither before ({before}) nor after ({after})"));
            }
        };
        model.clock = self.model.clock;
        for (name, volume) in &mut model.volumes {
            // A copy may write what was there: the content does not tell whether it came to that.
            if let Some(after) = self
                .model
                .volumes
                .get(name)
                .filter(|v| v.reverted == volume.reverted)
            {
                volume.touched.extend(&after.touched);
            }
        }
        Ok(model)
    }

    /// Opens what a cut at the captured call left.
    fn after_cut(&mut self, before: &Model, rng: &mut Rng) -> Verdict {
        let loss = *rng
            .pick(&[Loss::All, Loss::Random, Loss::Random, Loss::Random, Loss::Nothing])
            .unwrap();
        let Some(world) = self.world.captured(loss, rng) else {
            return Ok(());
        };
        let told = |trouble: Trouble| trouble.at(&format!("after a cut ({loss:?})"));
        let (pool, mut model) = self.reopened(&world, before).map_err(told)?;
        if rng.chance(50) {
            // Go on from there.
            self.pins.clear();
            (self.world, self.pool, self.model) = (world, pool, model);
            return Ok(self.pool.commit_now()?);
        }
        while pool.run_jobs(64)? > 0 {}
        pool.step()?;
        model
            .equals(&see(&pool)?)
            .map_err(|what| format!("after a cut and all jobs: {what}"))?;
        model.clock += 1;
        check_world(&world).map_err(told)
    }

    fn reopened(&self, world: &World, before: &Model) -> Result<(Pool, Model), Trouble> {
        check_world(world)?;
        let pool = open(world)?;
        let seen = see(&pool)?;
        let mut model = self.either(before, &seen)?;
        model.settle(&seen);
        Ok((pool, model))
    }

    /// A call to the media failed. Reads must go on with what was there, and a new start must find everything that
    /// was promised.
    fn after_fault(&mut self, before: &Model, rng: &mut Rng) -> Verdict {
        if self.pool.poisoned().is_none() {
            self.either(before, &see(&self.pool)?)
                .map_err(|trouble| trouble.at("reads after a fault"))?;
        }
        let loss = *rng.pick(&[Loss::Random, Loss::Nothing]).unwrap();
        let world = self.world.after_cut(loss, rng);
        let told = |trouble: Trouble| trouble.at(&format!("new start after a fault ({loss:?})"));
        let (pool, model) = self.reopened(&world, before).map_err(told)?;
        self.pins.clear();
        (self.world, self.pool, self.model) = (world, pool, model);
        Ok(())
    }

    fn run(&mut self, kind: Kind, rng: &mut Rng) -> Verdict {
        match kind {
            Kind::Write => self.write(rng),
            Kind::TryWrite => self.try_write(rng),
            Kind::Zero => self.zero(rng),
            Kind::UnmapMany => self.unmap_many(rng),
            Kind::CompareAndWrite => self.compare_and_write(rng),
            Kind::Flush => self.flush(rng),
            Kind::Copy => self.copy(rng),
            Kind::Pin => self.pin(rng),
            Kind::Create if self.model.volumes.len() < MOST_VOLUMES => self.create(1 + rng.below(SECTORS)),
            Kind::Snapshot if self.model.snapshots.len() < MOST_SNAPSHOTS => self.snapshot(rng),
            Kind::Clone if self.model.volumes.len() < MOST_VOLUMES => self.clone_snapshot(rng),
            Kind::Revert => self.revert(rng),
            Kind::DeleteSnapshot => self.delete_snapshot(rng),
            Kind::DeleteVolume if self.model.volumes.len() > 1 => self.delete_volume(rng),
            Kind::Grow => self.grow(rng),
            Kind::Rename => self.rename(rng),
            Kind::Hold => self.hold(rng),
            Kind::Jobs => self
                .pool
                .run_jobs(1 + rng.index(3))
                .map(drop)
                .map_err(Trouble::from),
            Kind::Seal => self
                .pool
                .run_sealing(1 + rng.index(3))
                .map(drop)
                .map_err(Trouble::from),
            Kind::Mode => match self.any_volume(rng, false) {
                Some((_, volume)) => {
                    let modes = [Checksums::Off, Checksums::Sealed, Checksums::Always];
                    let mode = *rng.pick(&modes).unwrap();
                    volume.set_checksums(mode).map_err(Trouble::from)
                }
                None => Ok(()),
            },
            Kind::Commit => self.pool.commit_now().map_err(Trouble::from),
            Kind::Tick => self.pool.step().map(drop).map_err(Trouble::from),
            Kind::Reopen => self.reopen(),
            Kind::Diff => self.diff(rng),
            Kind::LbaStatus => self.lba_status(rng),
            Kind::Create | Kind::Snapshot | Kind::Clone | Kind::DeleteVolume => Ok(()),
        }
    }

    fn any_volume(&self, rng: &mut Rng, writable: bool) -> Option<(String, Volume)> {
        let fits = |(_, volume): &(&String, &ModelVolume)| !writable || !volume.read_only;
        let names: Vec<&String> = self
            .model
            .volumes
            .iter()
            .filter(fits)
            .map(|(name, _)| name)
            .collect();
        let name = (*rng.pick(&names)?).clone();
        let volume = self.pool.volume(&name).expect("the model knows it");
        Some((name, volume))
    }

    fn model_of(&mut self, name: &str) -> &mut ModelVolume {
        self.model.volumes.get_mut(name).expect("the model knows it")
    }

    /// A range that often hits the same few grains.
    fn range(&self, rng: &mut Rng, name: &str) -> (u64, u64) {
        let len = self.model.volumes[name].len();
        let start = if rng.chance(60) {
            rng.below(12 * GRAIN_SECTORS) % len
        } else {
            rng.below(len)
        };
        let most = match rng.below(10) {
            0..5 => 8,
            5..8 => 40,
            _ => 700,
        };
        let aligned = rng.chance(40);
        let start = if aligned {
            start / GRAIN_SECTORS * GRAIN_SECTORS
        } else {
            start
        };
        let count = 1 + rng.below(most.min(len - start));
        let count = if aligned {
            count.next_multiple_of(GRAIN_SECTORS).min(len - start)
        } else {
            count
        };
        (start, count)
    }

    fn write(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, true) else {
            return Ok(());
        };
        let (sector, count) = self.range(rng, &name);
        self.tell(format!("write {name} {sector}+{count} with {}", self.stamp + 1));
        let fua = rng.chance(10);
        self.stamp += 1;
        let stamp = self.stamp;
        let clock = self.model.tick();
        self.model_of(&name).set(clock, sector, count, stamp);
        volume.write(sector * SECTOR as u64, &stamped_run(sector, count, stamp), fua)?;
        if fua {
            self.durable_now = Some((name, sector..sector + count));
        }
        Ok(())
    }

    fn try_write(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, true) else {
            return Ok(());
        };
        let (sector, count) = self.range(rng, &name);
        self.tell(format!(
            "try to write {name} {sector}+{count} with {}",
            self.stamp + 1
        ));
        let (offset, stamp) = (sector * SECTOR as u64, self.stamp + 1);
        self.stamp = stamp;
        let clock = self.model.tick();
        self.model_of(&name).set(clock, sector, count, stamp);
        let bytes = stamped_run(sector, count, stamp);
        self.world.set_reluctant(rng.chance(30));
        let done = volume.try_write(offset, &bytes).map_err(Trouble::from);
        let mut back = vec![0xee; bytes.len()];
        let read = volume.try_read(offset, &mut back).map_err(Trouble::from);
        self.world.set_reluctant(false);
        if !done? {
            volume.write(offset, &bytes, false)?;
        } else if read? && back != bytes {
            return wrong(format!("try_read of {name} does not return what try_write wrote"));
        }
        Ok(())
    }

    fn zero(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, true) else {
            return Ok(());
        };
        let (sector, count) = if rng.chance(25) {
            (0, self.model.volumes[&name].len())
        } else {
            self.range(rng, &name)
        };
        self.tell(format!("zero {name} {sector}+{count}"));
        let clock = self.model.tick();
        self.model_of(&name).set(clock, sector, count, 0);
        volume
            .write_zeroes(sector * SECTOR as u64, count * SECTOR as u64, rng.chance(50))
            .map_err(Trouble::from)
    }

    fn unmap_many(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, true) else {
            return Ok(());
        };
        let mut ranges = Vec::new();
        let clock = self.model.tick();
        for _ in 0..1 + rng.below(4) {
            let (sector, count) = self.range(rng, &name);
            self.tell(format!("unmap {name} {sector}+{count}"));
            ranges.push((sector * SECTOR as u64, count * SECTOR as u64));
            self.model_of(&name).set(clock, sector, count, 0);
        }
        volume.unmap(&ranges).map_err(Trouble::from)
    }

    fn compare_and_write(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, true) else {
            return Ok(());
        };
        let (sector, count) = self.range(rng, &name);
        let count = count.min(8);
        self.tell(format!(
            "compare and write {name} {sector}+{count} with {}",
            self.stamp + 1
        ));
        let now = self.model.volumes[&name].now();
        let range = sector as usize..(sector + count) as usize;
        let mut compare: Vec<u8> = (sector..)
            .zip(&now[range])
            .flat_map(|(at, &stamp)| stamped(at, stamp))
            .collect();
        let differs = rng.chance(40).then(|| rng.index(compare.len()));
        if let Some(at) = differs {
            compare[at] ^= 0x10;
        }
        self.stamp += 1;
        let stamp = self.stamp;
        if differs.is_none() {
            let clock = self.model.tick();
            self.model_of(&name).set(clock, sector, count, stamp);
        }
        let new = stamped_run(sector, count, stamp);
        let answer = volume.compare_and_write(sector * SECTOR as u64, &compare, &new, false)?;
        match (differs, answer) {
            (None, Caw::Done) => Ok(()),
            (Some(at), Caw::Miscompare { offset }) if offset == at as u64 => Ok(()),
            (differs, answer) => wrong(format!("compare-and-write differs at {differs:?}: {answer:?}")),
        }
    }

    /// From a volume, a snapshot or a pin to the same place of a volume: sectors carry their numbers.
    fn copy(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, true) else {
            return Ok(());
        };
        let (mut sector, mut count) = self.range(rng, &name);
        let sectors = self.model.volumes[&name].len();
        if rng.chance(40) && sectors >= PAGE_SECTORS {
            // Whole pages, which are lent.
            sector = rng.below(sectors / PAGE_SECTORS) * PAGE_SECTORS;
            count = (PAGE_SECTORS + rng.below(600)).min(sectors - sector);
        }
        let (offset, len) = (sector * SECTOR as u64, count * SECTOR as u64);
        let (other, handle) = self.any_volume(rng, false).unwrap();
        let snapshot = self.any_snapshot(rng);
        let pin = (!self.pins.is_empty()).then(|| rng.index(self.pins.len()));
        let (from, stamps, source) = match (rng.below(3), &snapshot, pin) {
            (0, Some(snapshot), _) => (
                format!("{}@{}", snapshot.volume, snapshot.name),
                snapshot.stamps.clone(),
                CopySource::Snapshot(self.id(snapshot)),
            ),
            (1, _, Some(pin)) => (
                format!("pin {pin}"),
                self.pins[pin].1.clone(),
                CopySource::Pin(&self.pins[pin].0),
            ),
            _ => (
                other.clone(),
                self.model.volumes[&other].now(),
                CopySource::Volume(&handle),
            ),
        };
        if sector + count > stamps.len() as u64 {
            return match volume.copy(offset, &source, offset, len) {
                Err(Error::OutOfRange { .. }) => Ok(()),
                other => wrong(format!("a copy from beyond the end: {other:?}")),
            };
        }
        self.story
            .push(format!("copy {name} {sector}+{count} from {from}"));
        let done = volume.copy(offset, &source, offset, len);
        let clock = self.model.tick();
        for at in sector..sector + count {
            self.model_of(&name).set(clock, at, 1, stamps[at as usize]);
        }
        let done = done?;
        if done.referenced_bytes + done.copied_bytes != len {
            return wrong(format!("a copy of {len} bytes: {done:?}"));
        }
        self.durable_now = Some((name, sector..sector + count));
        Ok(())
    }

    /// Keeps a point in time, or lets one go; those that are kept show what they did.
    fn pin(&mut self, rng: &mut Rng) -> Verdict {
        for (pin, stamps_then) in &self.pins {
            let mut bytes = vec![0xee; pin.size_bytes() as usize];
            pin.read(0, &mut bytes)?;
            let found = stamps(&bytes).map_err(|what| format!("{pin:?}: {what}"))?;
            if found != *stamps_then {
                return wrong(format!("{pin:?} has changed"));
            }
        }
        if self.pins.len() > 2 || (!self.pins.is_empty() && rng.chance(40)) {
            let at = rng.index(self.pins.len());
            self.tell(format!("let {:?} go", self.pins[at].0));
            self.pins.remove(at);
            return Ok(());
        }
        let (name, volume) = self.any_volume(rng, false).unwrap();
        self.tell(format!("pin {name}"));
        let now = self.model.volumes[&name].now();
        self.pins.push((volume.pin()?, now));
        Ok(())
    }

    fn flush(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, false) else {
            return Ok(());
        };
        volume.flush()?;
        self.model_of(&name).flushed();
        Ok(())
    }

    fn create(&mut self, sectors: u64) -> Verdict {
        let name = self.name("v");
        self.tell(format!("create {name} of {sectors}"));
        let spec = VolumeSpec {
            name: name.clone(),
            size_bytes: sectors * SECTOR as u64,
            block_size: 512,
            attributes: name.clone().into_bytes(),
        };
        self.model.volumes.insert(name, ModelVolume::empty(sectors));
        self.pool.create_volume(&spec).map(drop).map_err(Trouble::from)
    }

    fn snapshot(&mut self, rng: &mut Rng) -> Verdict {
        let names: Vec<String> = self
            .model
            .volumes
            .keys()
            .filter(|_| rng.chance(60))
            .cloned()
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = names
            .iter()
            .map(|name| self.pool.volume(name).unwrap().id())
            .collect();
        let spec = SnapshotSpec {
            name: self.name("s"),
            ..SnapshotSpec::default()
        };
        let when = self.model.tick();
        self.tell(format!("snapshot {} of {names:?}", spec.name));
        for name in &names {
            let volume = &self.model.volumes[name];
            self.model.snapshots.push(ModelSnapshot {
                volume: name.clone(),
                name: spec.name.clone(),
                stamps: volume.now(),
                hold: false,
                when,
                touched: volume.touched.clone(),
                reverted: volume.reverted,
            });
        }
        let records = self.pool.begin_cut(&ids, &spec)?.commit()?;
        if records.len() != names.len() {
            return wrong(format!("{} records for {} volumes", records.len(), names.len()));
        }
        // The commit that carries the records carries all that they hold, so the heads are durable as well.
        names.iter().for_each(|name| self.model_of(name).flushed());
        Ok(())
    }

    fn any_snapshot(&self, rng: &mut Rng) -> Option<ModelSnapshot> {
        rng.pick(&self.model.snapshots).cloned()
    }

    fn id(&self, snapshot: &ModelSnapshot) -> stillpoint_snapshot::SnapshotId {
        self.pool
            .snapshot(&snapshot.volume, &snapshot.name)
            .expect("the model knows it")
            .id
    }

    fn clone_snapshot(&mut self, rng: &mut Rng) -> Verdict {
        let Some(snapshot) = self.any_snapshot(rng) else {
            return Ok(());
        };
        let spec = CloneSpec {
            name: self.name("c"),
            read_only: rng.chance(30),
            attributes: Vec::new(),
        };
        self.tell(format!(
            "clone {}@{} as {}",
            snapshot.volume, snapshot.name, spec.name
        ));
        let clock = self.model.tick();
        self.model.volumes.insert(
            spec.name.clone(),
            ModelVolume::of(&snapshot.stamps, spec.read_only, clock),
        );
        match self.pool.clone_snapshot(self.id(&snapshot), &spec) {
            Err(Error::Limit { .. }) => drop(self.model.volumes.remove(&spec.name)),
            other => drop(other?),
        }
        Ok(())
    }

    fn revert(&mut self, rng: &mut Rng) -> Verdict {
        let Some(snapshot) = self.any_snapshot(rng) else {
            return Ok(());
        };
        self.tell(format!("revert to {}@{}", snapshot.volume, snapshot.name));
        let volume = self.pool.volume(&snapshot.volume).unwrap();
        if self.model.volumes[&snapshot.volume].read_only {
            return Ok(());
        }
        let clock = self.model.tick();
        let new = ModelVolume::of(&snapshot.stamps, false, clock);
        let old = std::mem::replace(self.model_of(&snapshot.volume), new);
        match self.pool.revert(volume.id(), self.id(&snapshot)) {
            Err(Error::Limit { .. }) => {
                *self.model_of(&snapshot.volume) = old;
                return Ok(());
            }
            other => drop(other?),
        }
        if volume.size_bytes() != snapshot.stamps.len() as u64 * SECTOR as u64 {
            return wrong("a handle from before the revert has the old size".to_owned());
        }
        Ok(())
    }

    fn delete_snapshot(&mut self, rng: &mut Rng) -> Verdict {
        let Some(snapshot) = self.any_snapshot(rng) else {
            return Ok(());
        };
        self.tell(format!("delete snapshot {}@{}", snapshot.volume, snapshot.name));
        let result = self.pool.delete_snapshot(self.id(&snapshot));
        if snapshot.hold {
            return match result {
                Err(Error::Refused { .. }) => Ok(()),
                other => wrong(format!("a held snapshot must not be deleted: {other:?}")),
            };
        }
        self.model
            .snapshots
            .retain(|other| (&other.volume, &other.name) != (&snapshot.volume, &snapshot.name));
        result.map_err(Trouble::from)
    }

    fn delete_volume(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, handle)) = self.any_volume(rng, false) else {
            return Ok(());
        };
        self.tell(format!("delete {name}"));
        if self.model.snapshots_of(&name).any(|snapshot| snapshot.hold) {
            return Ok(());
        }
        let with_snapshots = self.model.snapshots_of(&name).next().is_some();
        if with_snapshots && self.pool.delete_volume(&name, false).is_ok() {
            return wrong("a volume with snapshots was deleted without asking for that".to_owned());
        }
        self.model.volumes.remove(&name);
        self.model.snapshots.retain(|snapshot| snapshot.volume != name);
        self.pool.delete_volume(&name, with_snapshots)?;
        match handle.read(0, &mut [0; SECTOR]) {
            Err(Error::NotFound { .. }) => Ok(()),
            other => wrong(format!("a handle of a deleted volume still reads: {other:?}")),
        }
    }

    fn grow(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, true) else {
            return Ok(());
        };
        let len = self.model.volumes[&name].len();
        let more = rng.below((MOST_SECTORS - len).min(200) + 1);
        self.tell(format!("grow {name} by {more}"));
        self.model_of(&name).sectors.extend(vec![vec![0]; more as usize]);
        volume
            .grow((len + more) * SECTOR as u64)
            .map(drop)
            .map_err(Trouble::from)
    }

    fn rename(&mut self, rng: &mut Rng) -> Verdict {
        let Some((old, _)) = self.any_volume(rng, false) else {
            return Ok(());
        };
        let new = self.name("r");
        self.tell(format!("rename {old} to {new}"));
        let volume = self.model.volumes.remove(&old).unwrap();
        self.model.volumes.insert(new.clone(), volume);
        for snapshot in self
            .model
            .snapshots
            .iter_mut()
            .filter(|snapshot| snapshot.volume == old)
        {
            snapshot.volume.clone_from(&new);
        }
        self.pool.rename_volume(&old, &new).map_err(Trouble::from)
    }

    fn hold(&mut self, rng: &mut Rng) -> Verdict {
        let Some(snapshot) = self.any_snapshot(rng) else {
            return Ok(());
        };
        let change = SnapshotChange {
            hold: Some(!snapshot.hold),
            ..SnapshotChange::default()
        };
        let id = self.id(&snapshot);
        let same =
            |other: &&mut ModelSnapshot| (&other.volume, &other.name) == (&snapshot.volume, &snapshot.name);
        self.model.snapshots.iter_mut().find(same).unwrap().hold = !snapshot.hold;
        self.pool
            .set_snapshot(id, &change)
            .map(drop)
            .map_err(Trouble::from)
    }

    fn reopen(&mut self) -> Verdict {
        self.pool.shutdown()?;
        self.pins.clear();
        self.model.volumes.values_mut().for_each(ModelVolume::flushed);
        self.pool = open(&self.world)?;
        Ok(())
    }

    fn diff(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, false) else {
            return Ok(());
        };
        let mut line: Vec<ModelSnapshot> = self.model.snapshots_of(&name).cloned().collect();
        line.sort_by_key(|snapshot| snapshot.when);
        let to = rng.index(line.len() + 1);
        let from = rng.index(to + 1).checked_sub(1).map(|from| line[from].clone());
        let model = &self.model.volumes[&name];
        let (target, now, touched, reverted) = match line.get(to) {
            Some(snapshot) => {
                let id = DiffTo::Snapshot(self.id(snapshot));
                (
                    id,
                    snapshot.stamps.clone(),
                    snapshot.touched.clone(),
                    snapshot.reverted,
                )
            }
            None => (
                DiffTo::Head(volume.id()),
                model.now(),
                model.touched.clone(),
                model.reverted,
            ),
        };
        let old = from.as_ref().map_or_else(Vec::new, |from| from.stamps.clone());
        let since = from.as_ref().map_or(0, |from| from.when);
        let extents = self.pool.diff(from.as_ref().map(|from| self.id(from)), target)?;
        let mut named = std::collections::BTreeSet::new();
        for extent in &extents {
            let sectors = extent.offset / SECTOR as u64..(extent.offset + extent.len) / SECTOR as u64;
            for sector in sectors {
                named.insert(sector / GRAIN_SECTORS);
                let stamp = now.get(sector as usize).copied();
                if extent.kind != ExtentKind::Data && stamp.is_some_and(|stamp| stamp != 0) {
                    return wrong(format!(
                        "diff of {name} calls sector {sector} {:?}, it holds {stamp:?}",
                        extent.kind
                    ));
                }
            }
        }
        for (sector, &stamp) in now.iter().enumerate() {
            let grain = sector as u64 / GRAIN_SECTORS;
            if stamp != old.get(sector).copied().unwrap_or(0) && !named.contains(&grain) {
                return wrong(format!("diff of {name} from {since} leaves out grain {grain}"));
            }
        }
        let strange = named
            .iter()
            .find(|grain| touched.get(grain).is_none_or(|&when| when <= since));
        match strange {
            Some(grain) if reverted <= since && (reverted == 0 || from.is_some()) => wrong(format!(
                "diff of {name} from {since} names grain {grain}, which nobody wrote: {extents:?}"
            )),
            _ => Ok(()),
        }
    }

    fn lba_status(&mut self, rng: &mut Rng) -> Verdict {
        let Some((name, volume)) = self.any_volume(rng, false) else {
            return Ok(());
        };
        let model = &self.model.volumes[&name];
        let now = model.now();
        let extents = volume.lba_status(0, model.len() * SECTOR as u64, usize::MAX >> 8)?;
        let mut at = 0;
        for extent in extents {
            if extent.offset != at {
                return wrong(format!("LBA status of {name} has a gap before {}", extent.offset));
            }
            at += extent.len;
            let sectors = (extent.offset / SECTOR as u64) as usize..(at / SECTOR as u64) as usize;
            if extent.kind != ExtentKind::Data && now[sectors].iter().any(|&stamp| stamp != 0) {
                return wrong(format!("LBA status of {name} calls data a hole: {extent:?}"));
            }
        }
        if at == model.len() * SECTOR as u64 {
            Ok(())
        } else {
            wrong(format!("LBA status of {name} ends at {at}"))
        }
    }

    /// Everything deleted must leave nothing behind.
    fn empty(&mut self) -> Verdict {
        self.pins.clear();
        for snapshot in self.model.snapshots.clone() {
            let change = SnapshotChange {
                hold: Some(false),
                ..SnapshotChange::default()
            };
            self.pool.set_snapshot(self.id(&snapshot), &change)?;
        }
        for name in self.model.volumes.keys() {
            self.pool.delete_volume(name, true)?;
        }
        while self.pool.run_jobs(64)? > 0 {}
        self.pool.commit_now()?;
        check_world(&self.world)?;
        let stats = self.pool.stats();
        if stats.allocated_bytes != 0 || stats.snapshots != 0 || stats.jobs != 0 {
            return wrong(format!("everything is deleted, and there is left: {stats:?}"));
        }
        let left = self
            .world
            .pairs()
            .into_iter()
            .filter(|(key, _)| b"MENVD".contains(&key[0]))
            .count();
        if left == 0 {
            Ok(())
        } else {
            wrong(format!("{left} records are left of nothing"))
        }
    }
}

fn play(steps: &[Step]) -> Result<(), String> {
    let story = Mutex::new(Vec::new());
    let run = || -> Verdict {
        let mut rig = Rig::new()?;
        for (number, step) in steps.iter().enumerate() {
            let result = rig.step(*step);
            story.lock().unwrap().append(&mut rig.story);
            story
                .lock()
                .unwrap()
                .push(format!("{number}: {:?} {:?}", step.kind, step.trouble));
            result.map_err(|trouble| trouble.at(&format!("step {number} {:?}", step.kind)))?;
        }
        rig.empty().map_err(|trouble| trouble.at("at the end"))
    };
    let verdict = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(verdict) => verdict.map_err(|trouble| trouble.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            Err(format!(
                "panic: {}",
                text.or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("?")
            ))
        }
    };
    verdict.map_err(|what| format!("{what}\nafter:\n{}", story.lock().unwrap().join("\n")))
}

thread_local! {
    static SHRINKING: Cell<bool> = const { Cell::new(false) };
}

/// Keeps the hundreds of failures of a shrink out of the output; the last one is told.
fn quiet_while_shrinking() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if !SHRINKING.get() {
                usual(info);
            }
        }));
    });
}

/// Leaves out what is not needed for a failure, larger pieces first.
fn shrink(mut steps: Vec<Step>, mut failure: String) -> String {
    let mut piece = steps.len() / 2;
    while piece > 0 {
        let mut at = 0;
        while at < steps.len() {
            let mut fewer = steps.clone();
            fewer.drain(at..(at + piece).min(steps.len()));
            match play(&fewer) {
                Err(what) => (steps, failure) = (fewer, what),
                Ok(()) => at += piece,
            }
        }
        piece /= 2;
    }
    for at in 0..steps.len() {
        let mut calmer = steps.clone();
        calmer[at].trouble = Planned::Nothing;
        if let Err(what) = play(&calmer) {
            (steps, failure) = (calmer, what);
        }
    }
    failure
}

fn run_seeds(what: &str, quick: u64, trouble: impl Fn(&mut Rng) -> Planned + Copy) {
    let seeds = match number("STILLPOINT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("STILLPOINT_SOAK_SEEDS").unwrap_or(quick),
    };
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let all = steps(seed, trouble);
        if let Err(what) = play(&all) {
            println!("seed {seed} failed ({what}); shrinking");
            quiet_while_shrinking();
            SHRINKING.set(true);
            let what = shrink(all, what);
            SHRINKING.set(false);
            panic!("STILLPOINT_SEED={seed}: {what}");
        }
    }
    println!("soak {what}: {count} histories of {STEPS} steps");
}

#[test]
fn random_operations_and_power_cuts_agree_with_plain_vectors() {
    run_seeds("random operations with power cuts", QUICK_SEEDS, power_cut);
}

#[test]
fn failing_media_lose_nothing_that_was_flushed() {
    run_seeds("random operations with failing media", QUICK_SEEDS, media_fault);
}
