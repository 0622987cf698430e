//! Snapshots as operators see them: list, show, hold, delete, compare; [`create`], [`revert`] and [`mount`] have their own files.

mod create;
mod documents;
mod mount;
mod online;
mod revert;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_config::Consistency;
use stillpoint_snapshot::{DiffTo, SnapshotChange, SnapshotId, SnapshotInfo};

use super::Daemon;
use super::control::api::{
    BadRange, Diff, DiffExtent, Refusal, SnapshotDeletePlan, SnapshotDetail, SnapshotRef, SnapshotRow, done,
    time_text,
};
use super::control::{blocking, luns};
use super::events::code;
use super::state::State;

pub(crate) use create::{close_interrupted, create};
pub(crate) use documents::{one as document, rows as document_rows};
pub(crate) use mount::{mount, serve_mounts, unmount};
pub(crate) use online::watch as watch_reverts;
pub(crate) use revert::{RevertOptions, revert};

/// How long `snapshot list` counts what each snapshot alone holds. What is known between two snapshots stays known.
const COUNTING: Duration = Duration::from_secs(3);

/// Extents of one `snapshot diff`: more would not fit an answer, and nobody reads them.
const MAX_EXTENTS: usize = 200_000;

/// What the daemon remembers of a snapshot, as JSON in the store's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Meta {
    requested: Consistency,
    #[serde(default)]
    cut_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    created_by: String,
    /// The agents have not all answered yet. What a crash leaves like this is a `crash` snapshot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pending: bool,
    /// Who took part and why less is proved, when that is too long for the record: it is in the saved state.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    elsewhere: bool,
    #[serde(flatten)]
    proof: Proof,
}

/// What the agents reported.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Proof {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    agents: Vec<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
    /// When they prepared, froze and thawed, in milliseconds from the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    times: Option<Value>,
    /// The session of the agents: VM snapshots are called after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session: Option<stillpoint_agentproto::SessionId>,
}

/// Where the proof of a snapshot is, when it is too long for the record.
fn proof_key(id: SnapshotId) -> String {
    format!("proof/{id}")
}

impl Meta {
    /// What the store's record says. One that cannot be read is shown as the least that the record itself proves.
    fn of(snapshot: &SnapshotInfo) -> Self {
        serde_json::from_slice(&snapshot.meta).unwrap_or_else(|_| Self {
            requested: level(snapshot.consistency),
            cut_ms: 0,
            group_id: None,
            note: None,
            created_by: "unknown".to_owned(),
            pending: false,
            elsewhere: false,
            proof: Proof::default(),
        })
    }

    /// What the agents reported, from wherever it is.
    fn proof(&self, state: &State, id: SnapshotId) -> Proof {
        if !self.elsewhere {
            return self.proof.clone();
        }
        let bytes = state.big_get(&proof_key(id)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings, numbers and JSON values are always JSON")
    }
}

/// The store's word for a level.
fn level(consistency: stillpoint_snapshot::Consistency) -> Consistency {
    match consistency {
        stillpoint_snapshot::Consistency::Crash => Consistency::Crash,
        stillpoint_snapshot::Consistency::Filesystem => Consistency::Filesystem,
        stillpoint_snapshot::Consistency::Application => Consistency::Application,
    }
}

/// The snapshot, or the refusal that says what there is instead.
pub(crate) fn find(daemon: &Daemon, snapshot: &SnapshotRef) -> Result<SnapshotInfo, Refusal> {
    if let Some(info) = daemon.pool.snapshot(&snapshot.lun, &snapshot.name) {
        return Ok(info);
    }
    if daemon.pool.volume(&snapshot.lun).is_none() {
        return Err(luns::unknown(daemon, &snapshot.lun));
    }
    Err(Refusal::failed(
        "not_found",
        format!("LUN {:?} has no snapshot {:?}", snapshot.lun, snapshot.name),
        format!("`stillpoint snapshot list {}` shows them", snapshot.lun),
    ))
}

fn row(daemon: &Daemon, snapshot: &SnapshotInfo, unique_bytes: Option<u64>) -> SnapshotRow {
    let meta = Meta::of(snapshot);
    let proof = meta.proof(&daemon.state, snapshot.id);
    let now = jiff::Timestamp::now().as_millisecond();
    SnapshotRow {
        lun: snapshot.volume_name.clone(),
        name: snapshot.name.clone(),
        id: snapshot.id.to_string(),
        consistency: level(snapshot.consistency),
        requested: meta.requested,
        created_at: time_text(snapshot.created_ms),
        cut_ms: meta.cut_ms,
        group_id: meta.group_id,
        size_bytes: snapshot.size_bytes,
        referenced_bytes: snapshot.mapped_bytes,
        unique_bytes,
        hold: snapshot.hold,
        locked_until: (snapshot.lock_until_ms > now).then(|| time_text(snapshot.lock_until_ms)),
        note: meta.note,
        created_by: meta.created_by,
        used_by: used_by(daemon, snapshot),
        agents: proof.agents,
        reasons: proof.reasons,
        times: proof.times,
    }
}

/// Volumes that were made of the snapshot. The LUN itself after a revert is none: deleting the snapshot leaves it as it is.
fn used_by(daemon: &Daemon, snapshot: &SnapshotInfo) -> Vec<String> {
    if snapshot.children == 0 {
        return Vec::new();
    }
    let stands_on = |volume: &stillpoint_snapshot::VolumeInfo| {
        volume.parent == Some(snapshot.id) && volume.id != snapshot.volume
    };
    daemon
        .pool
        .volumes()
        .into_iter()
        .filter(stands_on)
        .map(|volume| volume.name)
        .collect()
}

pub(crate) fn list(daemon: &Arc<Daemon>, lun: Option<&str>) -> Result<Vec<SnapshotRow>, Refusal> {
    let volume = match lun {
        None => None,
        Some(name) => Some(
            daemon
                .pool
                .volume(name)
                .ok_or_else(|| luns::unknown(daemon, name))?
                .id(),
        ),
    };
    let mut snapshots = daemon.pool.snapshots(volume);
    snapshots.sort_by(|a, b| {
        (&a.volume_name, a.id.epoch, a.created_ms).cmp(&(&b.volume_name, b.id.epoch, b.created_ms))
    });
    snapshots.retain(|s| !s.volume_name.is_empty());
    let ids: Vec<SnapshotId> = snapshots.iter().map(|s| s.id).collect();
    let rows = snapshots.iter().zip(unique(daemon, &ids, COUNTING));
    Ok(rows
        .map(|(snapshot, unique)| row(daemon, snapshot, unique))
        .collect())
}

/// One snapshot with all that is known of it.
fn one(daemon: &Daemon, snapshot: &SnapshotInfo) -> SnapshotRow {
    let unique = unique(daemon, &[snapshot.id], Duration::MAX);
    row(daemon, snapshot, unique.first().copied().flatten())
}

/// What each of them alone holds. A store that has stopped still lists its snapshots, uncounted.
fn unique(daemon: &Daemon, ids: &[SnapshotId], limit: Duration) -> Vec<Option<u64>> {
    daemon.pool.unique_bytes(ids, limit).unwrap_or_else(|error| {
        tracing::warn!(%error, "the space that snapshots hold cannot be counted");
        vec![None; ids.len()]
    })
}

pub(crate) fn show(daemon: &Arc<Daemon>, snapshot: &SnapshotRef) -> Result<SnapshotDetail, Refusal> {
    let info = find(daemon, snapshot)?;
    let mut bad_data = BadRange::list(&daemon.pool, Some(info.volume))?;
    bad_data.retain(|bad| bad.snapshot.as_ref() == Some(&info.name));
    let session = session_of(daemon, &info);
    let documents = session.map_or_else(|| Ok(Vec::new()), |session| documents::list(daemon, session))?;
    Ok(SnapshotDetail {
        row: one(daemon, &info),
        vms: documents::vms(daemon, session, &documents),
        session: session.map(|session| session.to_string()),
        documents,
        sealed: info.sealed,
        bad_data,
    })
}

pub(crate) async fn hold(
    daemon: &Arc<Daemon>,
    snapshot: SnapshotRef,
    hold: bool,
    who: &str,
) -> Result<SnapshotRow, Refusal> {
    let who = who.to_owned();
    blocking(daemon, move |daemon| {
        let info = find(daemon, &snapshot)?;
        let change = SnapshotChange {
            hold: Some(hold),
            ..SnapshotChange::default()
        };
        let info = daemon.pool.set_snapshot(info.id, &change)?;
        let (event, text) = if hold {
            (code::SNAPSHOT_HELD, "is held: it cannot be deleted")
        } else {
            (code::SNAPSHOT_RELEASED, "is released")
        };
        daemon
            .events
            .emit(event, format!("snapshot {snapshot}"), text, &who);
        Ok(one(daemon, &info))
    })
    .await
}

/// Whether a snapshot may be deleted; the store checks again.
pub(crate) fn check_deletable(daemon: &Daemon, snapshot: &SnapshotInfo) -> Result<(), Refusal> {
    let name = format!("{}@{}", snapshot.volume_name, snapshot.name);
    if snapshot.hold {
        return Err(Refusal::refused(
            "held",
            format!("snapshot {name} is held"),
            format!("`stillpoint snapshot release {name}` first"),
        ));
    }
    if snapshot.lock_until_ms > jiff::Timestamp::now().as_millisecond() {
        return Err(Refusal::refused(
            "locked",
            format!(
                "snapshot {name} is locked until {}",
                time_text(snapshot.lock_until_ms)
            ),
            "nobody can delete it before",
        ));
    }
    if let Some(host) = daemon.vss.holder(&snapshot.volume_name, &snapshot.name) {
        return Err(Refusal::refused(
            "shadow_copy",
            format!("snapshot {name} belongs to a VSS backup of {host}"),
            "it is deleted when that backup is done; `stillpoint lun list` shows its shadow copies, which `stillpoint volume delete` removes",
        ));
    }
    let mounts = daemon.state.mounts()?;
    if let Some(mount) = mounts
        .iter()
        .find(|mount| mount.lun == snapshot.volume_name && mount.snapshot == snapshot.name)
    {
        return Err(Refusal::refused(
            "mounted",
            format!("snapshot {name} is mounted as {}", mount.name),
            format!("`stillpoint snapshot unmount {}` first", mount.name),
        ));
    }
    Ok(())
}

/// What deleting these snapshots together would give back. A refusal says what forbids it.
pub(crate) fn plan_delete(
    daemon: &Arc<Daemon>,
    snapshots: Vec<SnapshotRef>,
) -> Result<SnapshotDeletePlan, Refusal> {
    let ids = deletable(daemon, &snapshots)?
        .iter()
        .map(|s| s.id)
        .collect::<Vec<_>>();
    let plan = daemon.pool.plan_delete(&ids)?;
    let kept = snapshots
        .iter()
        .zip(&ids)
        .filter(|(_, id)| plan.kept.contains(id));
    Ok(SnapshotDeletePlan {
        kept_by_clones: kept.map(|(name, _)| name.clone()).collect(),
        frees_bytes: plan.freed_bytes,
        snapshots,
    })
}

/// The agents' session in which a snapshot was taken.
fn session_of(daemon: &Daemon, snapshot: &SnapshotInfo) -> Option<stillpoint_agentproto::SessionId> {
    Meta::of(snapshot).proof(&daemon.state, snapshot.id).session
}

fn deletable(daemon: &Daemon, snapshots: &[SnapshotRef]) -> Result<Vec<SnapshotInfo>, Refusal> {
    let checked = |snapshot| {
        let info = find(daemon, snapshot)?;
        check_deletable(daemon, &info)?;
        Ok(info)
    };
    snapshots.iter().map(checked).collect()
}

/// Deletes all of them or none. One gives an object, several an array.
pub(crate) async fn delete(
    daemon: &Arc<Daemon>,
    snapshots: Vec<SnapshotRef>,
    who: &str,
) -> Result<Value, Refusal> {
    // Together with a mount of the same snapshot, one of them must lose.
    let _changing = daemon.state.changing().await;
    let who = who.to_owned();
    blocking(daemon, move |daemon| {
        let infos = deletable(daemon, &snapshots)?;
        let clones: Vec<_> = infos.iter().map(|info| used_by(daemon, info)).collect();
        let ids: Vec<SnapshotId> = infos.iter().map(|info| info.id).collect();
        let sessions: Vec<_> = infos.iter().filter_map(|info| session_of(daemon, info)).collect();
        daemon.pool.delete_snapshots(&ids)?;
        documents::forget(daemon, sessions);
        let mut answers = Vec::new();
        for ((snapshot, id), clones) in snapshots.iter().zip(ids).zip(clones) {
            daemon.state.big_put(&proof_key(id), None)?;
            let text = if clones.is_empty() {
                "deleted; its space is given back in the background".to_owned()
            } else {
                format!("deleted; {} stands on it and keeps its data", clones.join(", "))
            };
            daemon
                .events
                .emit(code::SNAPSHOT_DELETED, format!("snapshot {snapshot}"), text, &who);
            answers.push(done([
                ("lun", json!(snapshot.lun)),
                ("name", json!(snapshot.name)),
                ("deleted", json!(true)),
                ("kept_by_clones", json!(clones)),
            ]));
        }
        match answers.as_slice() {
            [one] => Ok(one.clone()),
            _ => Ok(Value::Array(answers)),
        }
    })
    .await
}

pub(crate) fn diff(
    daemon: &Arc<Daemon>,
    from: SnapshotRef,
    to: Option<SnapshotRef>,
) -> Result<Diff, Refusal> {
    let older = find(daemon, &from)?;
    let younger = match &to {
        Some(to) if to.lun != from.lun => {
            return Err(Refusal::usage(
                "other_lun",
                format!("{from} and {to} are of different LUNs"),
                "compare snapshots of one LUN",
            ));
        }
        Some(to) => DiffTo::Snapshot(find(daemon, to)?.id),
        None => DiffTo::Head(older.volume),
    };
    let mut extents = Vec::new();
    let mut start = Some(0);
    while let Some(at) = start {
        let part = daemon.pool.diff_part(Some(older.id), younger, at, MAX_EXTENTS)?;
        extents.extend(part.extents);
        start = part.next;
        if extents.len() > MAX_EXTENTS {
            return Err(Refusal::refused(
                "limit",
                format!("more than {MAX_EXTENTS} ranges changed"),
                "compare snapshots that are closer to each other",
            ));
        }
    }
    let extents: Vec<DiffExtent> = extents
        .iter()
        .map(|e| DiffExtent {
            offset_bytes: e.offset,
            length_bytes: e.len,
            kind: e.kind,
        })
        .collect();
    Ok(Diff {
        from,
        to,
        changed_bytes: extents.iter().map(|e| e.length_bytes).sum(),
        extents,
    })
}

/// UTC as in a default name: `20261122T160000Z`.
fn stamp() -> String {
    jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// `base`, or `base-2`, `base-3` … until nobody has that name.
fn free_name(base: &str, taken: impl Fn(&str) -> bool) -> String {
    let numbered = (2u64..).map(|n| format!("{base}-{n}"));
    std::iter::once(base.to_owned())
        .chain(numbered)
        .find(|name| !taken(name))
        .unwrap_or_else(|| base.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_when_taken() {
        assert_eq!(free_name("a", |_| false), "a");
        assert_eq!(free_name("a", |name| ["a", "a-2"].contains(&name)), "a-3");
        let stamp = stamp();
        assert!(
            stamp.len() == 16 && stamp.ends_with('Z') && stamp.as_bytes()[8] == b'T',
            "{stamp}"
        );
    }

    #[test]
    fn a_record_without_readable_remarks_claims_nothing() {
        let meta: Meta =
            serde_json::from_slice(br#"{"requested":"application","created_by":"ann"}"#).expect("short form");
        assert!(!meta.pending && meta.proof.agents.is_empty());
        let bytes = Meta {
            pending: true,
            ..meta
        }
        .to_bytes();
        let back: Meta = serde_json::from_slice(&bytes).expect("read back");
        assert!(back.pending && back.requested == Consistency::Application);
    }
}
