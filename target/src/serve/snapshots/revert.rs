//! `snapshot revert`: the LUN's content goes back, its identity stays, and what it held until now stays in an automatic snapshot.

use std::sync::Arc;

use stillpoint_snapshot::{DiffTo, SnapshotInfo};

use super::create::automatic;
use super::{find, level};
use crate::serve::control::api::{Refusal, Revert, SessionLabel, SnapshotRef, VolumeKind, count, time_text};
use crate::serve::control::{Caller, blocking, end_sessions};
use crate::serve::events::code;
use crate::serve::registry::LoginHold;
use crate::serve::state::VolumeTag;
use crate::serve::{Daemon, LunBackend};

/// Names of automatic snapshots begin with this.
const AUTOMATIC: &str = "before-revert";

pub(crate) async fn revert(
    daemon: &Arc<Daemon>,
    snapshot: SnapshotRef,
    force: bool,
    plan: bool,
    caller: &Caller,
) -> Result<Revert, Refusal> {
    let wanted = snapshot.clone();
    let mut reverted = blocking(daemon, move |daemon| look(daemon, &wanted)).await?;
    if plan {
        return Ok(reverted);
    }
    let _changing = daemon.state.changing().await;
    // An initiator that comes back by itself would go on writing what its caches remember of the old content.
    let targets = daemon.registry.targets_of(&snapshot.lun);
    let _held = LoginHold::new(daemon, targets.iter().map(|target| target.iqn().to_owned()));
    reverted.sessions = sessions(daemon, &snapshot.lun);
    if !reverted.sessions.is_empty() {
        if !force {
            return Err(in_use(&snapshot.lun, &reverted.sessions));
        }
        caller.progress(format!(
            "ending {} of {}",
            count(reverted.sessions.len(), "session"),
            snapshot.lun
        ));
        end_sessions(
            daemon,
            reverted.sessions.iter().map(|s| s.id),
            &format!("LUN {} is reverted", snapshot.lun),
        )
        .await;
    }
    if let Some(lun) = daemon.registry.lun(&snapshot.lun) {
        lun.drain().await;
    }
    let who = caller.who.clone();
    let work = snapshot.clone();
    let automatic = blocking(daemon, move |daemon| go_back(daemon, &work, &who)).await?;
    let text = format!(
        "reverted to {snapshot}; what it held until now is in {}@{automatic}",
        snapshot.lun
    );
    daemon.events.emit(
        code::LUN_REVERTED,
        format!("lun {}", snapshot.lun),
        text,
        &caller.who,
    );
    reverted.automatic_snapshot = Some(automatic);
    reverted.reverted = true;
    Ok(reverted)
}

fn sessions(daemon: &Daemon, lun: &str) -> Vec<SessionLabel> {
    daemon
        .registry
        .sessions_of_lun(lun)
        .iter()
        .map(SessionLabel::from)
        .collect()
}

fn in_use(lun: &str, sessions: &[SessionLabel]) -> Refusal {
    let names: Vec<String> = sessions.iter().map(ToString::to_string).collect();
    Refusal::refused(
        "sessions",
        format!("LUN {lun:?} is in use by {}", names.join(", ")),
        "unmount it and log out there, or add --force to end the sessions (what their hosts have cached is lost)",
    )
}

/// What a revert would do.
fn look(daemon: &Daemon, snapshot: &SnapshotRef) -> Result<Revert, Refusal> {
    let info = find(daemon, snapshot)?;
    let volume = daemon
        .pool
        .volume_by_id(info.volume)
        .ok_or_else(|| gone(snapshot))?;
    if VolumeTag::of(&volume.info()?)?.kind == VolumeKind::Mount {
        return Err(Refusal::refused(
            "mounted",
            format!("{:?} is a mounted snapshot", snapshot.lun),
            "unmount it and mount the other one",
        ));
    }
    let changed = daemon.pool.diff(Some(info.id), DiffTo::Head(info.volume))?;
    Ok(Revert {
        lun: snapshot.lun.clone(),
        snapshot: snapshot.name.clone(),
        created_at: time_text(info.created_ms),
        consistency: level(info.consistency),
        changed_bytes: changed.iter().map(|extent| extent.len).sum(),
        size_before_bytes: volume.size_bytes(),
        size_after_bytes: info.size_bytes,
        sessions: sessions(daemon, &snapshot.lun),
        automatic_snapshot: None,
        reverted: false,
    })
}

fn gone(snapshot: &SnapshotRef) -> Refusal {
    Refusal::failed(
        "not_found",
        format!("the volume of {snapshot} is gone"),
        "`stillpoint volume list` shows what there is",
    )
}

/// Takes the automatic snapshot, goes back, and puts the new content below the LUN. Returns the automatic snapshot's name.
fn go_back(daemon: &Daemon, snapshot: &SnapshotRef, who: &str) -> Result<String, Refusal> {
    let info: SnapshotInfo = find(daemon, snapshot)?;
    let note = format!("before the revert to {}", snapshot.name);
    let before = automatic(daemon, info.volume, &snapshot.lun, AUTOMATIC, note, who)?;
    let volume = daemon.pool.revert(info.volume, info.id)?;
    if let Some(lun) = daemon.registry.lun(&snapshot.lun) {
        lun.replace_backend(LunBackend::Local(volume));
    }
    Ok(before.name)
}
