//! Repair of a pool's metadata, offline: bitmaps, counts and lists are made anew from the map; what cannot be read is named
//! and given up. It never guesses: a part of a volume whose map is lost reads as a medium error until it is
//! written anew, never as older or other data. Works on a copy; the old metadata is kept beside the new.

mod fill;
mod pages;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;

use self::pages::LostPages;
use crate::check::{CheckReport, Placements, Problem, ProblemKind, Records, Tally, Walk, check_parts};
use crate::disk::Disk;
use crate::meta::MetaStore;
use crate::offline::{self, Overlay, each};
use crate::page::MAX_GRAINS;
use crate::record::{Bits, CHUNK_GRAINS, Key, PageKey, SystemRecord, table};
use crate::superblock::Superblock;
use crate::types::{BranchId, Epoch, SnapshotId};
use crate::{Error, Result};

/// What a repair would do, or has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepairPlan {
    /// What the check finds now.
    pub problems: Vec<Problem>,
    /// What is made right without any loss.
    pub fixes: Vec<String>,
    /// What is lost, and where.
    pub losses: Vec<String>,
    /// Commits that are missing: volumes go back to before them. Needs its own yes.
    pub lost_commits: Option<u64>,
    /// Background jobs whose records are damaged. One that was zeroing or copying hid what was there before, which shows
    /// again without it. Needs its own yes.
    pub lost_jobs: Vec<u64>,
}

impl RepairPlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fixes.is_empty()
            && self.losses.is_empty()
            && self.lost_commits.is_none()
            && self.lost_jobs.is_empty()
    }
}

/// What a repair may give up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairOptions {
    /// Only say what would be done.
    pub plan: bool,
    /// Go back to the newest commit that is there (invariant I7 is broken): later ones are lost, and blocks that they freed
    /// and used again show foreign data where no checksum tells.
    pub accept_lost_commits: bool,
    /// Forget background jobs whose records are damaged: where one was zeroing or copying, old data shows again.
    pub accept_lost_jobs: bool,
}

/// Repairs the metadata of the pool in `dir`, which no process may have open. What was there is kept as
/// `meta.before-restore`. Without anything to do, nothing is changed.
///
/// # Errors
/// `Refused` when it cannot be repaired (the text says what to do instead) or when commits are lost and that was not
/// accepted; `NotFound`, `Io`, `NoSpace`.
pub fn repair(dir: &Path, options: RepairOptions) -> Result<RepairPlan> {
    let copy = offline::Copy::of(dir)?;
    let (disk, mut meta) = copy.open()?;
    let repair = Repair::look(&disk, &mut *meta)?;
    if repair.is_wanted(options)? {
        offline::make_new(dir, |new| repair.fill(&mut *meta, new))?;
    }
    Ok(repair.plan)
}

/// Repairs into an empty metadata store. Not durable until the caller flushes and syncs it.
///
/// # Errors
/// As [`repair`].
pub fn repair_media(
    disk: &dyn Disk,
    old: &mut dyn MetaStore,
    new: &mut dyn MetaStore,
    options: RepairOptions,
) -> Result<RepairPlan> {
    let repair = Repair::look(disk, old)?;
    if repair.is_wanted(options)? {
        repair.fill(old, new)?;
    }
    Ok(repair.plan)
}

/// What is known of a damaged pool.
struct Repair {
    plan: RepairPlan,
    system: SystemRecord,
    records: Records,
    /// As it was read; the number of its chunks says where new grains begin.
    before: SystemRecord,
    lost: LostPages,
    used: BTreeMap<u32, Box<Bits>>,
    extra: Placements,
    mapped: Mapped,
}

/// What a pass over the map has found.
struct Walked {
    used: BTreeMap<u32, Box<Bits>>,
    extra: Placements,
    mapped: Mapped,
}

/// Grains that heads and snapshots map.
#[derive(Default)]
struct Mapped {
    heads: BTreeMap<BranchId, u64>,
    snapshots: BTreeMap<SnapshotId, u64>,
}

fn hopeless(what: impl std::fmt::Display) -> Error {
    Error::refused(format!(
        "{what}: this cannot be repaired; restore a dump (`store restore`) or a backup"
    ))
}

impl Repair {
    /// Whether there is anything to do that may be done.
    fn is_wanted(&self, options: RepairOptions) -> Result<bool> {
        if options.plan || self.plan.is_empty() {
            return Ok(false);
        }
        match self.plan.lost_commits {
            Some(commits) if !options.accept_lost_commits => {
                return Err(Error::refused(format!(
                    "{commits} commits are missing: restore a dump (`store restore`) or a backup, or accept their loss \
                     with --accept-lost-commits"
                )));
            }
            _ => {}
        }
        match self.plan.lost_jobs.as_slice() {
            [] => Ok(true),
            _ if options.accept_lost_jobs => Ok(true),
            lost => Err(Error::refused(format!(
                "the records of {} background jobs are damaged, and where one was zeroing or copying, old data would show \
                 again: restore a dump (`store restore`) or a backup, or accept that with --accept-lost-jobs",
                lost.len()
            ))),
        }
    }

    fn look(disk: &dyn Disk, meta: &mut dyn MetaStore) -> Result<Self> {
        let system = match offline::system(meta) {
            Ok(system) => system,
            Err(error @ Error::Corrupt { .. }) => return Err(hopeless(error)),
            Err(error) => return Err(error),
        };
        let report = check_parts(disk, meta, false)?;
        let mut plan = RepairPlan {
            problems: report.problems.clone(),
            ..RepairPlan::default()
        };
        let before = system;
        let mut system = Self::past_superblock(disk, before.clone(), &mut plan)?;
        let records = Self::read_records(meta, &mut plan)?;
        let mut log_damage = None;
        let overlay = Overlay::read(meta, &before, |error| log_damage = Some(error))?;
        if let Some(error) = log_damage {
            return Err(hopeless(error));
        }
        let lost = LostPages::find(meta)?;
        if lost.placeholders(&before).end > MAX_GRAINS {
            return Err(hopeless("too many map pages are damaged"));
        }
        let walked = Self::walk(disk, meta, &before, &records, &overlay, &lost, &mut plan)?;
        let Walked { used, extra, mapped } = walked;
        let last = used.keys().next_back().map_or(0, |chunk| chunk + 1);
        system.chunks = last.max(before.chunks);
        if lost.is_empty() {
            Self::name_shared(&report, &mut plan);
        }
        Self::name_fixes(&report, &mut plan);
        Ok(Self {
            plan,
            system,
            before,
            records,
            lost,
            used,
            extra,
            mapped,
        })
    }

    /// Grains that were given away twice: from now on none of their places is written to.
    fn name_shared(report: &CheckReport, plan: &mut RepairPlan) {
        let shared = report
            .problems
            .iter()
            .filter(|p| p.kind == ProblemKind::SharedGrain);
        let text = |p: &Problem| format!("{}: nobody can tell which place shows its own data", p.text);
        plan.losses.extend(shared.map(text));
    }

    /// The metadata must not be older than the data file: otherwise commits are missing.
    fn past_superblock(disk: &dyn Disk, system: SystemRecord, plan: &mut RepairPlan) -> Result<SystemRecord> {
        let superblock = Superblock::newest(disk)?;
        if superblock.pool_id != system.pool_id || superblock.grain_bytes != system.grain_bytes {
            return Err(hopeless("data file and metadata belong to different pools"));
        }
        let missing = superblock.txg.saturating_sub(system.txg);
        plan.lost_commits = (missing > 0).then_some(missing);
        Ok(SystemRecord {
            txg: system.txg.max(superblock.txg),
            ..system
        })
    }

    fn read_records(meta: &mut dyn MetaStore, plan: &mut RepairPlan) -> Result<Records> {
        let (mut records, mut damaged) = (Records::default(), Vec::new());
        let tables = [
            table::BRANCH,
            table::SNAPSHOT,
            table::JOB,
            table::BAD,
            table::VALUE,
        ];
        for table in tables {
            each(meta, table, |_, (key, value)| {
                if let Err(error) = records.take(&key, &value) {
                    damaged.push((key, error));
                }
                Ok(())
            })?;
        }
        for (bytes, error) in damaged {
            match Key::parse(&bytes)? {
                Key::Snapshot(id) if records.children(id) == 0 => {
                    let name = records.branches.get(&id.branch).map(|b| b.name.as_str());
                    plan.losses.push(format!(
                        "a snapshot of volume {:?} (number {id}): its record is damaged",
                        name.unwrap_or_default()
                    ));
                }
                // Nothing else says what it was: a range that was being zeroed is not marked in the map.
                Key::Job(id) => {
                    plan.lost_jobs.push(id);
                    plan.losses.push(format!(
                        "background job {id}: where it was zeroing or copying, what was there before shows again"
                    ));
                }
                Key::Bad(grain) => plan
                    .losses
                    .push(format!("that grain {grain} is bad: a scrub finds it again")),
                Key::Value(name) => plan
                    .losses
                    .push(format!("the value {name:?} of the daemon: its record is damaged")),
                _ => return Err(hopeless(error)),
            }
        }
        Ok(records)
    }

    /// Passes over the map as it will be: what it uses, what it counts, what is lost.
    fn walk(
        disk: &dyn Disk,
        meta: &mut dyn MetaStore,
        system: &SystemRecord,
        records: &Records,
        overlay: &Overlay,
        lost: &LostPages,
        plan: &mut RepairPlan,
    ) -> Result<Walked> {
        let mut used = BTreeMap::new();
        let mut report = CheckReport::default();
        let size = disk
            .size()
            .map_err(|error| Error::io("stat", "data file", error))?;
        let placeholders = lost.placeholders(system);
        let mut walk = Walk {
            records,
            report: &mut report,
            used: &mut used,
            tally: Tally::default(),
            changed: BTreeSet::new(),
            recorded: Vec::new(),
            extra: Placements::new(),
            limit: size
                .div_ceil(system.grain_bytes.max(1).into())
                .max(placeholders.end)
                .min(MAX_GRAINS),
            grain_bytes: system.grain_bytes.into(),
            abandoned: records.abandoned(),
        };
        lost.each_page(meta, system, records, overlay, |page, losses| {
            walk.page(&page);
            walk.recorded.clear();
            plan.losses.extend(losses);
            Ok(())
        })?;
        for grain in 0..crate::open::reserved_grains(system.grain_bytes) {
            walk.mark(grain);
        }
        let (mapped, extra) = (Mapped::of(records, &walk.tally), walk.extra);
        Ok(Walked { used, extra, mapped })
    }

    /// What is made right by making everything anew that follows from the map.
    fn name_fixes(report: &CheckReport, plan: &mut RepairPlan) {
        let count = |kinds: &[ProblemKind]| {
            let of = report.problems.iter().filter(|p| kinds.contains(&p.kind));
            of.count()
        };
        let fixes = [
            (
                count(&[
                    ProblemKind::Leaked,
                    ProblemKind::NotAllocated,
                    ProblemKind::SharedGrain,
                ]),
                "bitmaps and references are made anew from the map",
            ),
            (
                count(&[ProblemKind::Inconsistent]),
                "counts and lists are made anew from the map",
            ),
            (
                count(&[ProblemKind::UselessVersion]),
                "page versions that nobody sees are removed",
            ),
            (
                count(&[ProblemKind::Damaged]),
                "damaged records are removed or made anew",
            ),
        ];
        let found = fixes.into_iter().filter(|(n, _)| *n > 0);
        plan.fixes = found.map(|(n, what)| format!("{what} ({n} problems)")).collect();
    }
}

impl Mapped {
    /// Parents have smaller numbers, so what a branch inherits is known when its turn comes.
    fn of(records: &Records, tally: &Tally) -> Self {
        let mut mapped = Self::default();
        for (&id, branch) in &records.branches {
            let below = branch.parent.and_then(|p| mapped.snapshots.get(&p).copied());
            let below = below.unwrap_or(0);
            let more = |n: Option<&i64>| below.saturating_add_signed(n.copied().unwrap_or(0));
            for (snapshot, _) in records.snapshots_of(id) {
                let n = more(tally.snapshots.get(snapshot));
                mapped.snapshots.insert(*snapshot, n);
            }
            if branch.head {
                mapped.heads.insert(id, more(tally.heads.get(&id)));
            }
        }
        mapped
    }
}

/// Grains of chunks that the pool does not have yet: places for entries whose grain is not known.
fn first_new_grain(system: &SystemRecord) -> u64 {
    u64::from(system.chunks) * CHUNK_GRAINS as u64
}

/// Whether anybody sees a version from `epoch` on until the next: a snapshot, the head, or a job that frees it.
fn is_seen(records: &Records, at: PageKey, until: Option<Epoch>) -> bool {
    let Some(branch) = records.branches.get(&at.branch) else {
        return false;
    };
    // In any state: the job of a dying one frees what it holds.
    let mut snapshots = records.snapshots_of(at.branch).map(|(id, _)| id.epoch);
    let held = snapshots.any(|e| e >= at.epoch && until.is_none_or(|next| e < next));
    held || (until.is_none() && (branch.head || records.abandoned().contains(&at.branch)))
}
