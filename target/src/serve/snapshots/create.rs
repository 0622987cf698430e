//! `snapshot create`: one cut of all the LUNs, and the level that the agents prove for it.
//!
//! The record is always born as `crash` and pending. It is raised in one durable commit after every agent said that its hold was in
//! force at the cut; a daemon that dies in between leaves an honest `crash` snapshot.

use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use stillpoint_config::{Consistency, LunName, OnFailure};
use stillpoint_snapshot::limits::SNAPSHOT_META_BYTES;
use stillpoint_snapshot::{Cut, Pool, SnapshotChange, SnapshotId, SnapshotInfo, SnapshotSpec, VolumeId};

use super::{Meta, Proof, free_name, proof_key, row, stamp};
use crate::serve::agents::{self, Cutter, Level, Mode, SnapshotAsk, Verdict};
use crate::serve::control::api::{Refusal, SnapshotCreate, VolumeKind};
use crate::serve::control::{Caller, blocking, luns};
use crate::serve::events::{DAEMON, Events, code};
use crate::serve::state::{State, VolumeTag};
use crate::serve::{Daemon, control};

/// LUNs in one cut.
const MAX_LUNS: usize = 64;
/// A remark is for people.
const MAX_NOTE_BYTES: usize = 512;
/// A lock that nobody can undo is not longer than this.
const MAX_LOCK_SECONDS: u64 = 20 * 365 * 86_400;

pub(crate) async fn create(
    daemon: &Arc<Daemon>,
    request: SnapshotCreate,
    caller: &Caller,
) -> Result<Value, Refusal> {
    let who = caller.who.clone();
    let single = request.luns.len() == 1;
    let luns = request.luns.clone();
    let consistency = request.consistency;
    let on_failure = request
        .on_failure
        .unwrap_or_else(|| daemon.config().agents.map_or(OnFailure::Fail, |a| a.on_failure));
    let job = blocking(daemon, move |daemon| Job::new(daemon, request, &who)).await?;
    let name = job.spec_name.clone();
    let subject = format!("snapshot {}@{name}", luns.join(","));
    let rows = if consistency == Consistency::Crash {
        blocking(daemon, move |daemon| job.crash(daemon)).await
    } else {
        consistent(daemon, job, consistency, on_failure, caller).await
    };
    match rows {
        Ok(rows) => {
            let weaker = rows.iter().any(|row| row["consistency"] != row["requested"]);
            let event = if weaker {
                code::SNAPSHOT_WEAKER
            } else {
                code::SNAPSHOT_CREATED
            };
            let proved = rows
                .first()
                .and_then(|row| row["consistency"].as_str())
                .unwrap_or_default()
                .to_owned();
            let text = if weaker {
                format!("taken, but less is proved than {consistency}: {proved}")
            } else {
                format!("taken: {proved}")
            };
            daemon.events.emit(event, subject, text, &caller.who);
            match <[Value; 1]>::try_from(rows) {
                Ok([row]) if single => Ok(row),
                Ok(rows) => Ok(Value::from(rows.to_vec())),
                Err(rows) => Ok(Value::from(rows)),
            }
        }
        Err(refusal) => {
            daemon.events.emit(
                code::SNAPSHOT_FAILED,
                subject,
                refusal.message.clone(),
                &caller.who,
            );
            Err(refusal)
        }
    }
}

/// Everything that is decided before the first agent is called.
struct Job {
    volumes: Vec<VolumeId>,
    luns: Vec<String>,
    spec_name: String,
    meta: Meta,
    lock_until_ms: i64,
}

impl Job {
    fn new(daemon: &Daemon, request: SnapshotCreate, who: &str) -> Result<Self, Refusal> {
        let SnapshotCreate {
            luns,
            name,
            consistency,
            on_failure: _,
            lock_seconds,
            note,
        } = request;
        if luns.is_empty() || luns.len() > MAX_LUNS {
            return Err(Refusal::refused(
                "limit",
                format!("{} LUNs in one snapshot", luns.len()),
                format!("name 1 to {MAX_LUNS}"),
            ));
        }
        let mut volumes = Vec::new();
        for lun in &luns {
            let id = snapshottable(daemon, lun)?;
            if volumes.contains(&id) {
                return Err(Refusal::usage(
                    "twice",
                    format!("LUN {lun:?} is named twice"),
                    "name it once",
                ));
            }
            volumes.push(id);
        }
        if let Some(note) = note.as_ref().filter(|note| note.len() > MAX_NOTE_BYTES) {
            let message = format!("the note has {} bytes", note.len());
            return Err(Refusal::refused(
                "limit",
                message,
                format!("write at most {MAX_NOTE_BYTES}"),
            ));
        }
        if lock_seconds.is_some_and(|lock| lock > MAX_LOCK_SECONDS) {
            return Err(Refusal::refused(
                "limit",
                "nobody could delete the snapshot within 20 years",
                "choose a shorter --lock",
            ));
        }
        let taken = |name: &str| luns.iter().any(|lun| daemon.pool.snapshot(lun, name).is_some());
        let spec_name = match name {
            None => free_name(&stamp(), taken),
            Some(name) => {
                name.parse::<LunName>()
                    .map_err(|t| Refusal::usage("bad_name", t.trouble, t.way_out))?;
                if taken(&name) {
                    let message = format!("there is a snapshot {name:?} of {} already", luns.join(" or "));
                    return Err(Refusal::failed("exists", message, "choose another --name"));
                }
                name
            }
        };
        let lock_ms = i64::try_from(lock_seconds.unwrap_or(0) * 1000).unwrap_or(i64::MAX);
        let lock_until_ms = if lock_ms == 0 {
            0
        } else {
            jiff::Timestamp::now().as_millisecond().saturating_add(lock_ms)
        };
        let meta = Meta {
            requested: consistency,
            cut_ms: 0,
            group_id: (luns.len() > 1).then(|| uuid::Uuid::new_v4().to_string()),
            note,
            created_by: who.to_owned(),
            pending: consistency > Consistency::Crash,
            elsewhere: false,
            proof: Proof::default(),
        };
        Ok(Self {
            volumes,
            luns,
            spec_name,
            meta,
            lock_until_ms,
        })
    }

    fn spec(&self) -> SnapshotSpec {
        SnapshotSpec {
            name: self.spec_name.clone(),
            consistency: stillpoint_snapshot::Consistency::Crash,
            meta: self.meta.to_bytes(),
            // A pending record may have to be discarded, which a lock would forbid: it is locked when it is kept.
            lock_until_ms: if self.meta.pending { 0 } else { self.lock_until_ms },
            hold: false,
            created_ms: 0,
        }
    }

    /// Asks nobody.
    fn crash(mut self, daemon: &Daemon) -> Result<Vec<Value>, Refusal> {
        // What is dirty goes first, so that the commit of the cut has little to do.
        daemon.pool.flush()?;
        let started = Instant::now();
        let cut = daemon.pool.begin_cut(&self.volumes, &self.spec())?;
        self.meta.cut_ms = milliseconds(started);
        let snapshots = cut.commit()?;
        // The time of the cut is known only after its record was written. The snapshot is good without that remark.
        let change = SnapshotChange {
            meta: Some(self.meta.to_bytes()),
            ..SnapshotChange::default()
        };
        let remarked = snapshots.into_iter().map(|snapshot| {
            daemon
                .pool
                .set_snapshot(snapshot.id, &change)
                .unwrap_or_else(|error| {
                    tracing::warn!(%error, "the time of a cut was not recorded");
                    snapshot
                })
        });
        rows(daemon, &remarked.collect::<Vec<_>>())
    }
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// The rows of new snapshots.
fn rows(daemon: &Daemon, snapshots: &[SnapshotInfo]) -> Result<Vec<Value>, Refusal> {
    let row = |snapshot: &SnapshotInfo| {
        serde_json::to_value(row(daemon, snapshot, None))
            .map_err(|e| Refusal::failed("internal", e.to_string(), "report this"))
    };
    snapshots.iter().map(row).collect()
}

/// The volume of a LUN that a snapshot can be taken of.
fn snapshottable(daemon: &Daemon, lun: &str) -> Result<VolumeId, Refusal> {
    let Some(volume) = daemon.pool.volume(lun) else {
        return Err(luns::unknown(daemon, lun));
    };
    let info = volume.info()?;
    let kind = VolumeTag::of(&info)?.kind;
    if kind == VolumeKind::Vss {
        return Err(Refusal::refused(
            "shadow_copy",
            format!("{lun:?} is a shadow copy of a VSS provider, which is gone when its backup is done"),
            "take the snapshot of its source (`stillpoint lun list` shows it)",
        ));
    }
    if kind == VolumeKind::Mount {
        return Err(Refusal::refused(
            "mounted",
            format!("{lun:?} is a mounted snapshot, which is gone when it is unmounted"),
            "make a volume of its snapshot with `stillpoint clone create` and use that",
        ));
    }
    Ok(info.id)
}

async fn consistent(
    daemon: &Arc<Daemon>,
    job: Job,
    consistency: Consistency,
    on_failure: OnFailure,
    caller: &Caller,
) -> Result<Vec<Value>, Refusal> {
    if on_failure == OnFailure::Fail {
        for lun in &job.luns {
            control::check_agent_lun(daemon, lun)?;
        }
    }
    let ask = SnapshotAsk {
        name: job.spec_name.clone(),
        luns: job.luns.clone(),
        mode: if consistency == Consistency::Application {
            Mode::Application
        } else {
            Mode::Filesystem
        },
        on_failure: match on_failure {
            OnFailure::Fail => agents::OnFailure::Fail,
            OnFailure::CrashConsistent => agents::OnFailure::CrashConsistent,
        },
    };
    let cutter = PoolCutter {
        pool: daemon.pool.clone(),
        state: daemon.state.clone(),
        job,
        cut: None,
        made: Vec::new(),
    };
    let progress = caller.clone();
    let (verdict, cutter) = daemon
        .agents
        .snapshot(ask, cutter, move |text| progress.progress(text))
        .await;
    if !verdict.kept {
        return Err(agents::refusal(&verdict));
    }
    blocking(daemon, move |daemon| rows(daemon, &cutter.made)).await
}

/// The store's end of a snapshot with agents.
#[derive(Debug)]
struct PoolCutter {
    pool: Pool,
    state: State,
    job: Job,
    cut: Option<Cut>,
    made: Vec<SnapshotInfo>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("luns", &self.luns)
            .field("name", &self.spec_name)
            .finish_non_exhaustive()
    }
}

impl Cutter for PoolCutter {
    fn settle(&mut self) -> anyhow::Result<()> {
        Ok(self.pool.flush()?)
    }

    fn cut(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        self.cut = Some(self.pool.begin_cut(&self.job.volumes, &self.job.spec())?);
        self.job.meta.cut_ms = milliseconds(started);
        Ok(())
    }

    fn commit(&mut self) -> anyhow::Result<()> {
        let cut = self
            .cut
            .take()
            .ok_or_else(|| anyhow::anyhow!("there is no cut to commit"))?;
        self.made = cut.commit()?;
        Ok(())
    }

    fn promote(&mut self, verdict: &Verdict) -> anyhow::Result<()> {
        let mut changes = Vec::new();
        for (snapshot, lun) in self.made.iter().zip(&verdict.levels) {
            let failure = verdict.failure.iter().map(ToString::to_string);
            let proof = Proof {
                agents: verdict
                    .agents
                    .iter()
                    .map(serde_json::to_value)
                    .collect::<Result<_, _>>()?,
                reasons: failure.chain(lun.shortfalls.iter().cloned()).collect(),
                times: Some(serde_json::to_value(verdict.times)?),
                session: Some(verdict.session),
            };
            let meta = self.remember(snapshot.id, proof)?;
            let change = SnapshotChange {
                consistency: Some(match lun.level {
                    Level::Crash => stillpoint_snapshot::Consistency::Crash,
                    Level::Filesystem => stillpoint_snapshot::Consistency::Filesystem,
                    Level::Application => stillpoint_snapshot::Consistency::Application,
                }),
                meta: Some(meta.to_bytes()),
                lock_until_ms: (self.job.lock_until_ms > 0).then_some(self.job.lock_until_ms),
                ..SnapshotChange::default()
            };
            changes.push((snapshot.id, change));
        }
        anyhow::ensure!(
            changes.len() == self.made.len(),
            "the verdict does not speak of every LUN"
        );
        self.made = self.pool.set_snapshots(&changes)?;
        Ok(())
    }

    fn discard(&mut self) -> anyhow::Result<()> {
        self.cut = None;
        for snapshot in self.made.drain(..) {
            self.pool.delete_snapshot(snapshot.id)?;
        }
        Ok(())
    }
}

impl PoolCutter {
    /// What the record remembers; a long proof goes into the saved state first, so that the record never points to nothing.
    fn remember(&self, id: SnapshotId, proof: Proof) -> anyhow::Result<Meta> {
        let meta = Meta {
            pending: false,
            proof,
            ..self.job.meta.clone()
        };
        if meta.to_bytes().len() <= SNAPSHOT_META_BYTES {
            return Ok(meta);
        }
        self.state
            .big_put(&proof_key(id), Some(&serde_json::to_vec(&meta.proof)?))?;
        Ok(Meta {
            elsewhere: true,
            proof: Proof::default(),
            ..meta
        })
    }
}

/// At start: a daemon that died between cut and proof left records that are pending. What they prove is `crash`.
pub(crate) fn close_interrupted(pool: &Pool, events: &Events) -> Result<(), Refusal> {
    for snapshot in pool.snapshots(None) {
        let meta = Meta::of(&snapshot);
        if !meta.pending {
            continue;
        }
        let reason = "the daemon ended before the agents had answered".to_owned();
        let meta = Meta {
            pending: false,
            proof: Proof {
                reasons: vec![reason],
                ..Proof::default()
            },
            ..meta
        };
        let change = SnapshotChange {
            meta: Some(meta.to_bytes()),
            ..SnapshotChange::default()
        };
        pool.set_snapshot(snapshot.id, &change)?;
        let subject = format!("snapshot {}@{}", snapshot.volume_name, snapshot.name);
        events.emit(
            code::SNAPSHOT_INTERRUPTED,
            subject,
            "interrupted by the end of the daemon: it is crash-consistent only",
            DAEMON,
        );
    }
    Ok(())
}

/// An automatic snapshot, taken before something that cannot be undone otherwise.
pub(super) fn automatic(
    daemon: &Daemon,
    volume: VolumeId,
    lun: &str,
    prefix: &str,
    note: String,
    who: &str,
) -> Result<SnapshotInfo, Refusal> {
    let name = free_name(&format!("{prefix}-{}", stamp()), |name| {
        daemon.pool.snapshot(lun, name).is_some()
    });
    let meta = Meta {
        requested: Consistency::Crash,
        cut_ms: 0,
        group_id: None,
        note: Some(note),
        created_by: who.to_owned(),
        pending: false,
        elsewhere: false,
        proof: Proof::default(),
    };
    let spec = SnapshotSpec {
        name,
        meta: meta.to_bytes(),
        ..SnapshotSpec::default()
    };
    let made = daemon.pool.begin_cut(&[volume], &spec)?.commit()?;
    let made = made.into_iter().next();
    made.ok_or_else(|| Refusal::failed("internal", "the store took no snapshot", "report this"))
}

#[cfg(test)]
mod tests {
    use stillpoint_agentproto::ident::{AgentId, Fingerprint, LunId};
    use stillpoint_agentproto::server::{AgentReport, LunLevel, Outcome, Times};
    use stillpoint_snapshot::{PoolOptions, VolumeSpec};

    use super::*;

    fn pool() -> (tempfile::TempDir, Pool) {
        let dir = tempfile::tempdir().expect("dir");
        let options = PoolOptions {
            ballast_bytes: 0,
            ..PoolOptions::default()
        };
        let pool = Pool::create(&dir.path().join("pool"), &options).expect("pool");
        (dir, pool)
    }

    fn cutter(pool: &Pool, lock_until_ms: i64) -> PoolCutter {
        let spec = VolumeSpec {
            name: "a".into(),
            size_bytes: 1 << 20,
            block_size: 512,
            attributes: Vec::new(),
        };
        let volume = pool.create_volume(&spec).expect("volume");
        let meta = Meta {
            requested: Consistency::Application,
            cut_ms: 0,
            group_id: None,
            note: None,
            created_by: "ann".into(),
            pending: true,
            elsewhere: false,
            proof: Proof::default(),
        };
        let job = Job {
            volumes: vec![volume.id()],
            luns: vec!["a".into()],
            spec_name: "s".into(),
            meta,
            lock_until_ms,
        };
        PoolCutter {
            pool: pool.clone(),
            state: State::open(pool),
            job,
            cut: None,
            made: Vec::new(),
        }
    }

    fn verdict(level: Level, agents: usize) -> Verdict {
        let report = |i: usize| AgentReport {
            id: AgentId((i as u128).to_be_bytes()),
            host: format!("host{i}"),
            version: "1".into(),
            fingerprint: Fingerprint([0; 32]),
            outcome: Outcome::HoldOk,
            detail: None,
            findings: Vec::new(),
            apps: Vec::new(),
            exclusions: Vec::new(),
            held_ms: Some(12),
        };
        Verdict {
            session: stillpoint_agentproto::SessionId([1; 16]),
            kept: true,
            levels: vec![LunLevel {
                lun: LunId([0; 16]),
                level,
                shortfalls: vec!["no application".into()],
            }],
            failure: None,
            agents: (0..agents).map(report).collect(),
            times: Times::default(),
        }
    }

    #[test]
    fn a_record_is_born_as_crash_and_raised_by_the_verdict() {
        let (_dir, pool) = pool();
        let until = jiff::Timestamp::now().as_millisecond() + 3_600_000;
        let mut cutter = cutter(&pool, until);
        cutter.settle().expect("settle");
        cutter.cut().expect("cut");
        cutter.commit().expect("commit");
        let born = pool.snapshot("a", "s").expect("durable");
        assert_eq!(born.consistency, stillpoint_snapshot::Consistency::Crash);
        assert!(Meta::of(&born).pending && born.lock_until_ms == 0);
        cutter.promote(&verdict(Level::Filesystem, 1)).expect("promote");
        let kept = pool.snapshot("a", "s").expect("kept");
        assert_eq!(kept.consistency, stillpoint_snapshot::Consistency::Filesystem);
        let meta = Meta::of(&kept);
        assert!(!meta.pending && kept.lock_until_ms == until);
        assert_eq!(
            (meta.proof.agents.len(), meta.proof.reasons),
            (1, vec!["no application".to_owned()])
        );
    }

    #[test]
    fn what_was_not_proved_is_discarded_although_it_was_to_be_locked() {
        let (_dir, pool) = pool();
        let mut cutter = cutter(&pool, i64::MAX);
        cutter.cut().expect("cut");
        cutter.commit().expect("commit");
        cutter.discard().expect("discard");
        assert!(pool.snapshots(None).is_empty());
    }

    #[test]
    fn a_long_proof_is_kept_beside_the_record() {
        let (_dir, pool) = pool();
        let mut cutter = cutter(&pool, 0);
        cutter.cut().expect("cut");
        cutter.commit().expect("commit");
        cutter.promote(&verdict(Level::Application, 60)).expect("promote");
        let kept = pool.snapshot("a", "s").expect("kept");
        let meta = Meta::of(&kept);
        assert!(meta.elsewhere && meta.proof.agents.is_empty());
        assert_eq!(meta.proof(&State::open(&pool), kept.id).agents.len(), 60);
    }

    #[test]
    fn a_snapshot_that_a_crash_interrupted_is_closed_as_crash() {
        let (dir, pool) = pool();
        let mut cutter = cutter(&pool, 0);
        cutter.cut().expect("cut");
        cutter.commit().expect("commit");
        let events = Events::open(dir.path()).expect("events");
        close_interrupted(&pool, &events).expect("close");
        let closed = pool.snapshot("a", "s").expect("still there");
        let meta = Meta::of(&closed);
        assert_eq!(closed.consistency, stillpoint_snapshot::Consistency::Crash);
        assert!(!meta.pending && meta.requested == Consistency::Application && meta.proof.reasons.len() == 1);
        assert_eq!(
            events.newest(1).first().map(|e| e.code.clone()).as_deref(),
            Some("SP-5010")
        );
        close_interrupted(&pool, &events).expect("again");
        assert_eq!(events.newest(10).len(), 1, "closed once");
    }
}
