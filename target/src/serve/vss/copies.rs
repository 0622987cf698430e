//! Copies as LUNs: made when first exposed, shown and masked, deleted, and served again after a restart.

use std::sync::Arc;

use stillpoint_agentproto::{ErrorCode, Refusal, ShadowId};
use stillpoint_snapshot::{CloneSpec, Error as StoreError, SnapshotInfo};

use super::record::{Copy, SetRecord, SetState};
use super::{internal, lock, now_ms};
use crate::serve::control::api::{Refusal as Told, VolumeKind};
use crate::serve::events::{DAEMON, code};
use crate::serve::state::VolumeTag;
use crate::serve::{Daemon, Lun, apply};

/// Shows a copy to an initiator. Its volume is made the first time.
pub(super) fn expose(
    daemon: &Arc<Daemon>,
    set: &mut SetRecord,
    shadow: ShadowId,
    initiator: &str,
) -> Result<(), Refusal> {
    let copy = set.copy_of(shadow)?.clone();
    if copy.going {
        return Err(Refusal::new(
            ErrorCode::WrongState,
            format!("{} is being deleted", copy.name),
        ));
    }
    let lun = served(daemon, set, &copy)?;
    let Some(number) = daemon.registry.show(&copy.iqn, &lun, initiator, copy.number) else {
        let text = format!(
            "target {} is not served any more, or has no LUN number left, so {} cannot be shown",
            copy.iqn, copy.name
        );
        return Err(Refusal::new(ErrorCode::WrongState, text));
    };
    let news = copy.shown_to.as_deref() != Some(initiator) || copy.number != Some(number);
    let kept = set.copy_mut(shadow)?;
    kept.shown_to = Some(initiator.to_owned());
    kept.number = Some(number);
    kept.used_ms = now_ms();
    if !news {
        return Ok(());
    }
    if let Err(error) = set.store(&daemon.state) {
        daemon.registry.hide(&lun);
        *set.copy_mut(shadow)? = copy;
        return Err(internal(&error));
    }
    let text = format!(
        "shown to {initiator} as LUN {number} of {}: a copy of {}@{}",
        copy.iqn, copy.source_name, set.snapshot
    );
    daemon
        .events
        .emit(code::VSS_EXPOSED, format!("lun {}", copy.name), text, &set.who());
    Ok(())
}

/// The LUN of a copy; its volume is made if there is none.
fn served(daemon: &Daemon, set: &SetRecord, copy: &Copy) -> Result<Arc<Lun>, Refusal> {
    if let Some(lun) = daemon.registry.lun(&copy.name) {
        return Ok(lun);
    }
    let tag = VolumeTag {
        identity: copy.scsi_identity(),
        kind: VolumeKind::Vss,
        origin: Some(format!("{}@{}", copy.source_name, set.snapshot)),
    };
    match daemon.pool.volume(&copy.name) {
        Some(volume) => {
            let info = volume.info().map_err(|error| internal(&error))?;
            let found = VolumeTag::of(&info).map_err(|error| internal(&error))?;
            if (found.kind, &found.identity) != (tag.kind, &tag.identity) {
                return Err(internal(&format!("volume {} is not this copy", copy.name)));
            }
        }
        None => {
            let snapshot = snapshot_of(daemon, set, copy).ok_or_else(|| {
                let text = format!("the snapshot {}@{} is gone", copy.source_name, set.snapshot);
                Refusal::new(ErrorCode::UnknownSession, text)
            })?;
            let spec = CloneSpec {
                name: copy.name.clone(),
                read_only: !set.writable,
                attributes: tag.to_bytes(),
            };
            daemon
                .pool
                .clone_snapshot(snapshot.id, &spec)
                .map_err(|error| internal(&error))?;
        }
    }
    apply::make_lun(daemon, &copy.name, true, !set.writable).map_err(|refusal| internal(&refusal.message))
}

fn snapshot_of(daemon: &Daemon, set: &SetRecord, copy: &Copy) -> Option<SnapshotInfo> {
    let snapshots = daemon.pool.snapshots(Some(copy.volume()));
    snapshots
        .into_iter()
        .find(|snapshot| snapshot.name == set.snapshot)
}

/// Hides a copy; what was written to it stays.
pub(super) fn mask(daemon: &Arc<Daemon>, set: &mut SetRecord, shadow: ShadowId) -> Result<(), Refusal> {
    let copy = set.copy_of(shadow)?.clone();
    withdraw(daemon, &copy.name);
    if copy.shown_to.is_none() {
        return Ok(());
    }
    let kept = set.copy_mut(shadow)?;
    kept.shown_to = None;
    kept.used_ms = now_ms();
    set.store(&daemon.state).map_err(|error| internal(&error))
}

/// Nobody sees the LUN any more, and nothing of it runs.
fn withdraw(daemon: &Arc<Daemon>, name: &str) {
    let Some(lun) = daemon.registry.lun(name) else {
        return;
    };
    daemon.registry.hide(&lun);
    daemon.registry.remove_lun(name);
    daemon.workers.block_on(lun.drain());
}

/// Deletes one shadow copy, or all of the set; returns how many there were. Blocks.
pub(super) fn delete(
    daemon: &Arc<Daemon>,
    set: &mut SetRecord,
    shadow: Option<ShadowId>,
    why: &str,
) -> Result<u32, Refusal> {
    let before = shadows(set);
    let mut names = Vec::new();
    if let Some(shadow) = shadow {
        let Ok(copy) = set.copy_mut(shadow) else {
            return Ok(0);
        };
        if copy.shadows.len() > 1 {
            // Another volume of the same LUN is still in use.
            copy.shadows.retain(|one| *one != shadow);
            set.store(&daemon.state).map_err(|error| internal(&error))?;
            return Ok(1);
        }
        names.push(copy.name.clone());
    } else {
        names.extend(set.copies.iter().map(|copy| copy.name.clone()));
    }
    for copy in set.copies.iter_mut().filter(|copy| names.contains(&copy.name)) {
        copy.going = true;
    }
    // From here on a restart goes on with the deletion: a copy whose writes are gone must not come back as it was at first.
    set.store(&daemon.state).map_err(|error| internal(&error))?;
    for name in &names {
        remove(daemon, set, name)?;
    }
    if set.copies.is_empty() {
        set.forget(&daemon.state).map_err(|error| internal(&error))?;
        set.state = SetState::Gone;
    } else {
        set.store(&daemon.state).map_err(|error| internal(&error))?;
    }
    daemon.vss.shrunk(set);
    daemon.events.emit(
        code::VSS_DELETED,
        format!("vss set {}", set.set),
        format!("{}: {why}", names.join(", ")),
        &set.who(),
    );
    Ok(before.saturating_sub(shadows(set)))
}

fn shadows(set: &SetRecord) -> u32 {
    let count: usize = set.copies.iter().map(|copy| copy.shadows.len()).sum();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Takes everything of one copy away: its LUN, its volume, its snapshot.
fn remove(daemon: &Arc<Daemon>, set: &mut SetRecord, name: &str) -> Result<(), Refusal> {
    let Some(copy) = set.copies.iter().find(|copy| copy.name == name).cloned() else {
        return Ok(());
    };
    withdraw(daemon, name);
    match daemon.pool.delete_volume(name, true) {
        Ok(()) | Err(StoreError::NotFound { .. }) => {}
        Err(error) => return Err(internal(&error)),
    }
    daemon.state.forget(name).map_err(|error| internal(&error))?;
    if let Some(snapshot) = snapshot_of(daemon, set, &copy) {
        match daemon.pool.delete_snapshots(&[snapshot.id]) {
            Ok(()) | Err(StoreError::NotFound { .. }) => {}
            // Somebody held it: it is theirs now.
            Err(StoreError::Refused { .. }) => {
                let text = format!(
                    "is held or locked, so it stays when its VSS set goes: `stillpoint snapshot delete {}@{}` when it is no longer needed",
                    copy.source_name, set.snapshot
                );
                let subject = format!("snapshot {}@{}", copy.source_name, set.snapshot);
                daemon.events.emit(code::VSS_ABANDONED, subject, text, DAEMON);
            }
            Err(error) => return Err(internal(&error)),
        }
    }
    set.copies.retain(|copy| copy.name != name);
    Ok(())
}

/// `volume delete` of a shadow copy; false when the name is none. Blocks.
pub(crate) fn delete_by_operator(daemon: &Arc<Daemon>, name: &str, who: &str) -> Result<bool, Told> {
    for set in daemon.vss.all() {
        let mut set = lock(&set);
        let Some(copy) = set.copies.iter_mut().find(|copy| copy.name == name) else {
            continue;
        };
        // With it go all the volumes that it is a copy of.
        copy.shadows.truncate(1);
        let Some(shadow) = copy.shadows.first().copied() else {
            continue;
        };
        let deleted = delete(daemon, &mut set, Some(shadow), &format!("deleted by {who}"));
        deleted.map_err(|refusal| Told::failed("store", refusal.text, "see `stillpoint events`"))?;
        return Ok(true);
    }
    Ok(false)
}

/// At start: what a set was is what it is again, or it goes. Blocks.
///
/// # Errors
/// The saved state cannot be read.
pub(crate) fn restore(daemon: &Arc<Daemon>) -> Result<(), Told> {
    for mut set in SetRecord::load(&daemon.state)? {
        // The time in which nobody could use them does not count.
        set.copies.iter_mut().for_each(|copy| copy.used_ms = now_ms());
        let unfinished = set.copies.iter().any(|copy| copy.going);
        if set.state == SetState::Taken && !unfinished {
            daemon.vss.enter(set);
            continue;
        }
        daemon.vss.enter(set.clone());
        let Some(shared) = daemon.vss.get(set.set) else {
            continue;
        };
        let mut set = lock(&shared);
        let (shadow, why) = if set.state == SetState::Taken {
            let going = set.copies.iter().find(|copy| copy.going);
            (
                going.and_then(|copy| copy.shadows.first().copied()),
                "its deletion was interrupted by a restart",
            )
        } else {
            (None, "the daemon was restarted before its commit was answered")
        };
        if let Err(refusal) = delete(daemon, &mut set, shadow, why) {
            let subject = format!("vss set {}", set.set);
            daemon
                .events
                .emit(code::VSS_TROUBLE, subject, refusal.text, DAEMON);
        }
    }
    serve_all(daemon);
    Ok(())
}

/// Serves every copy that is to be seen and is not: after a start, or after its target came back. Blocks.
pub(crate) fn serve_all(daemon: &Daemon) {
    for shared in daemon.vss.all() {
        let mut set = lock(&shared);
        if set.state != SetState::Taken {
            continue;
        }
        let hidden = |copy: &&Copy| copy.shown_to.is_some() && !copy.going && !is_shown(daemon, copy);
        let copies: Vec<Copy> = set.copies.iter().filter(hidden).cloned().collect();
        for copy in copies {
            let shown = served(daemon, &set, &copy).and_then(|lun| {
                let initiator = copy.shown_to.as_deref().unwrap_or_default();
                let number = daemon.registry.show(&copy.iqn, &lun, initiator, copy.number);
                number.ok_or_else(|| internal(&format!("target {} is not served", copy.iqn)))
            });
            match shown {
                Ok(number) => {
                    if let Some(kept) = set.copies.iter_mut().find(|kept| kept.name == copy.name) {
                        kept.number = Some(number);
                    }
                }
                Err(refusal) => {
                    let text = format!("cannot be served: {}", refusal.text);
                    daemon
                        .events
                        .emit(code::VSS_TROUBLE, format!("lun {}", copy.name), text, DAEMON);
                }
            }
        }
    }
}

fn is_shown(daemon: &Daemon, copy: &Copy) -> bool {
    let lun = daemon.registry.lun(&copy.name);
    let target = daemon.registry.target(&copy.iqn);
    matches!((lun, target), (Some(lun), Some(target)) if target.rules().transient(&lun).is_some())
}
