//! `volume list|rename|delete` and `clone create`.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use stillpoint_config::{Config, LunName};
use stillpoint_snapshot::{CloneSpec, Pool, PoolOptions};

use super::api::{CloneReply, Refusal, SnapshotRef, VolumeKind, VolumeRow, count, done, time_text};
use super::blocking;
use super::luns::snapshot_counts;
use crate::serve::events::{Events, code};
use crate::serve::state::{State, VolumeTag};
use crate::serve::{Daemon, apply, snapshots, vss};

pub(super) fn list(daemon: &Arc<Daemon>) -> Result<Vec<VolumeRow>, Refusal> {
    let config = daemon.config();
    let snapshots = snapshot_counts(daemon);
    let row = |volume: stillpoint_snapshot::VolumeInfo| {
        let tag = VolumeTag::of(&volume)?;
        let state = match (tag.kind, config.lun(&volume.name)) {
            (VolumeKind::Mount, _) => "mounted",
            (VolumeKind::Vss, _) => "shadow_copy",
            (_, Some(_)) => "assigned",
            (_, None) => "unassigned",
        };
        Ok(VolumeRow {
            kind: tag.kind,
            state: state.to_owned(),
            size_bytes: volume.size_bytes,
            used_bytes: volume.mapped_bytes,
            block_size: volume.block_size,
            read_only: volume.read_only,
            snapshots: snapshots.get(&volume.id).copied().unwrap_or(0),
            origin: tag.origin,
            created_at: time_text(volume.created_ms),
            naa: tag.identity.naa_text(),
            serial: tag.identity.serial,
            name: volume.name,
        })
    };
    daemon.pool.volumes().into_iter().map(row).collect()
}

/// A volume that the operator may rename or delete: it is there, no mount, and no `[[lun]]` names it.
fn unassigned(daemon: &Daemon, name: &str) -> Result<stillpoint_snapshot::Volume, Refusal> {
    let Some(volume) = daemon.pool.volume(name) else {
        return Err(Refusal::failed(
            "not_found",
            format!("there is no volume {name:?}"),
            "`stillpoint volume list` shows them",
        ));
    };
    if VolumeTag::of(&volume.info()?)?.kind == VolumeKind::Mount {
        return Err(Refusal::refused(
            "mounted",
            format!("{name:?} is a mounted snapshot"),
            format!("`stillpoint snapshot unmount {name}` ends it"),
        ));
    }
    if daemon.config().lun(name).is_some() || daemon.registry.lun(name).is_some() {
        return Err(Refusal::refused(
            "assigned",
            format!("volume {name:?} is a LUN of the configuration"),
            "take it out of the file and `stillpoint config apply` first",
        ));
    }
    Ok(volume)
}

pub(super) async fn rename(daemon: &Arc<Daemon>, old: &str, new: &str, who: &str) -> Result<Value, Refusal> {
    let _changing = daemon.state.changing().await;
    let (old, new, who) = (old.to_owned(), new.to_owned(), who.to_owned());
    blocking(daemon, move |daemon| {
        unassigned(daemon, &old)?;
        rename_in(&daemon.pool, &daemon.state, &old, &new)?;
        daemon.events.emit(
            code::VOLUME_RENAMED,
            format!("volume {new}"),
            format!("was called {old}"),
            &who,
        );
        Ok(done([("old", json!(old)), ("new", json!(new))]))
    })
    .await
}

fn rename_in(pool: &Pool, state: &State, old: &str, new: &str) -> Result<(), Refusal> {
    new.parse::<LunName>()
        .map_err(|t| Refusal::usage("bad_name", t.trouble, t.way_out))?;
    if pool.volume(new).is_some() {
        return Err(Refusal::failed(
            "exists",
            format!("there is a volume {new:?} already"),
            "choose another name",
        ));
    }
    // First what was saved: a crash in between leaves the volume under its old name, with nothing saved but defaults,
    // and never somebody else's reservations under the new one.
    state.renamed(old, new)?;
    Ok(pool.rename_volume(old, new)?)
}

/// The store of a stopped daemon, whose lock the caller holds.
fn stopped(data_dir: &Path) -> Result<(Pool, State, Events), Refusal> {
    let pool = Pool::open(&data_dir.join("pool"), &PoolOptions::default())?;
    let events = Events::open(data_dir).map_err(|e| Refusal::failed("events", format!("{e:#}"), ""))?;
    Ok((pool.clone(), State::open(&pool), events))
}

/// `volume rename` without a daemon: one that refuses to start because of the name names this as the way out.
pub(crate) fn rename_stopped(data_dir: &Path, old: &str, new: &str, who: &str) -> Result<Value, Refusal> {
    let (pool, state, events) = stopped(data_dir)?;
    let Some(volume) = pool.volume(old) else {
        return Err(Refusal::failed(
            "not_found",
            format!("there is no volume {old:?}"),
            "",
        ));
    };
    if VolumeTag::of(&volume.info()?)?.kind.is_passing() {
        return Err(Refusal::refused(
            "mounted",
            format!("{old:?} is a mounted snapshot or a shadow copy"),
            "start the daemon, and unmount or delete it",
        ));
    }
    rename_in(&pool, &state, old, new)?;
    events.emit(
        code::VOLUME_RENAMED,
        format!("volume {new}"),
        format!("was called {old} (the daemon did not run)"),
        who,
    );
    pool.shutdown()?;
    Ok(done([("old", json!(old)), ("new", json!(new))]))
}

/// `config apply --yes` without a daemon: makes the new, empty volumes that a plain start refuses to make.
pub(crate) fn create_stopped(data_dir: &Path, config: &Config, who: &str) -> Result<Vec<String>, Refusal> {
    let (pool, state, events) = stopped(data_dir)?;
    apply::standing(&pool, config)?;
    let mut created = Vec::new();
    apply::create_missing(&pool, &state, config, |name, size| {
        events.emit(
            code::VOLUME_CREATED,
            format!("volume {name}"),
            format!("created with {size} (the daemon did not run)"),
            who,
        );
        created.push(name.to_owned());
    })?;
    pool.shutdown()?;
    Ok(created)
}

pub(super) async fn delete(daemon: &Arc<Daemon>, name: &str, who: &str) -> Result<Value, Refusal> {
    let (name, who) = (name.to_owned(), who.to_owned());
    let shadow_copy = {
        let (name, who) = (name.clone(), who.clone());
        blocking(daemon, move |daemon| vss::delete_by_operator(daemon, &name, &who)).await?
    };
    if shadow_copy {
        return Ok(done([
            ("name", json!(name)),
            ("deleted", json!(true)),
            ("snapshots_deleted", json!(1)),
        ]));
    }
    let _changing = daemon.state.changing().await;
    blocking(daemon, move |daemon| {
        let volume = unassigned(daemon, &name)?;
        let snapshots = daemon.pool.snapshots(Some(volume.id()));
        for snapshot in &snapshots {
            snapshots::check_deletable(daemon, snapshot)?;
        }
        daemon.pool.delete_volume(&name, true)?;
        daemon.state.forget(&name)?;
        let text = format!("deleted with {}", count(snapshots.len(), "snapshot"));
        daemon
            .events
            .emit(code::VOLUME_DELETED, format!("volume {name}"), text, &who);
        Ok(done([
            ("name", json!(name)),
            ("deleted", json!(true)),
            ("snapshots_deleted", json!(snapshots.len())),
        ]))
    })
    .await
}

pub(super) async fn clone(
    daemon: &Arc<Daemon>,
    snapshot: SnapshotRef,
    new: String,
    who: &str,
) -> Result<CloneReply, Refusal> {
    let _changing = daemon.state.changing().await;
    let who = who.to_owned();
    blocking(daemon, move |daemon| {
        new.parse::<LunName>()
            .map_err(|t| Refusal::usage("bad_name", t.trouble, t.way_out))?;
        let info = snapshots::find(daemon, &snapshot)?;
        let config = daemon.config();
        // A `[[lun]]` that waits for its volume would suddenly be served with this content.
        if config.lun(&new).is_some() {
            return Err(Refusal::refused(
                "assigned",
                format!("the configuration has a LUN {new:?} already"),
                "choose another name, or take that LUN out of the file first",
            ));
        }
        let tag = VolumeTag::new(
            config.daemon.naa_company_id,
            VolumeKind::Clone,
            Some(snapshot.to_string()),
        )?;
        let spec = CloneSpec {
            name: new.clone(),
            read_only: false,
            attributes: tag.to_bytes(),
        };
        let volume = daemon.pool.clone_snapshot(info.id, &spec)?;
        daemon.events.emit(
            code::CLONE_CREATED,
            format!("volume {new}"),
            format!("made of {snapshot}"),
            &who,
        );
        Ok(CloneReply {
            name: new,
            snapshot: snapshot.to_string(),
            size_bytes: volume.size_bytes(),
            block_size: volume.block_size(),
            naa: tag.identity.naa_text(),
            serial: tag.identity.serial,
        })
    })
    .await
}
