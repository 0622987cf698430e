//! Carries out requests. Whatever may wait for a disk runs on a worker thread.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;

use super::api::{PoolSpace, Refusal, Request, Status, count, done};
use super::{Caller, luns, scrub, volumes};
use crate::serve::events::code;
use crate::serve::{Daemon, apply, snapshots, store, trace};

/// How long an initiator may take to log out before its session is cut.
pub(crate) const LOGOUT_GRACE: Duration = Duration::from_secs(5);

pub(super) async fn run(daemon: &Arc<Daemon>, request: Request, caller: &Caller) -> Result<Value, Refusal> {
    match request {
        Request::Status {} => answer(&blocking(daemon, |daemon| Ok(status(daemon))).await?),
        Request::ConfigPlan {} => answer(&apply::plan(daemon).await?),
        Request::ConfigApply { confirmed } => answer(&apply::apply(daemon, confirmed, &caller.who).await?),
        Request::LunList {} => answer(&blocking(daemon, luns::list).await?),
        Request::LunShow { lun } => answer(&blocking(daemon, move |daemon| luns::show(daemon, &lun)).await?),
        Request::LunPreflight { lun, consistency } => {
            answer(&luns::preflight(daemon, &lun, consistency).await?)
        }
        Request::VolumeList {} => answer(&blocking(daemon, volumes::list).await?),
        Request::VolumeRename { old, new } => volumes::rename(daemon, &old, &new, &caller.who).await,
        Request::VolumeDelete { name } => volumes::delete(daemon, &name, &caller.who).await,
        Request::SessionList {} => answer(&daemon.registry.sessions()),
        Request::SessionDrop { id } => drop_session(daemon, id, caller).await,
        Request::Trace(request) => trace::run(daemon, request, caller).await,
        Request::SnapshotCreate(create) => snapshots::create(daemon, create, caller).await,
        Request::SnapshotList { lun } => {
            answer(&blocking(daemon, move |daemon| snapshots::list(daemon, lun.as_deref())).await?)
        }
        Request::SnapshotShow { snapshot } => {
            answer(&blocking(daemon, move |daemon| snapshots::show(daemon, &snapshot)).await?)
        }
        Request::SnapshotDocuments {
            snapshot, kind: None, ..
        } => answer(&blocking(daemon, move |daemon| snapshots::document_rows(daemon, &snapshot)).await?),
        Request::SnapshotDocuments {
            snapshot,
            kind: Some(kind),
            agent,
        } => answer(
            &blocking(daemon, move |daemon| {
                snapshots::document(daemon, &snapshot, &kind, agent.as_deref())
            })
            .await?,
        ),
        Request::SnapshotDelete {
            snapshots,
            plan: true,
        } => answer(&blocking(daemon, move |daemon| snapshots::plan_delete(daemon, snapshots)).await?),
        Request::SnapshotDelete {
            snapshots,
            plan: false,
        } => snapshots::delete(daemon, snapshots, &caller.who).await,
        Request::SnapshotHold { snapshot, hold } => {
            answer(&snapshots::hold(daemon, snapshot, hold, &caller.who).await?)
        }
        Request::SnapshotDiff { from, to } => {
            answer(&blocking(daemon, move |daemon| snapshots::diff(daemon, from, to)).await?)
        }
        Request::SnapshotRevert {
            snapshot,
            force,
            power_off,
            plan,
        } => {
            let options = snapshots::RevertOptions {
                force,
                power_off,
                plan,
            };
            answer(&Box::pin(snapshots::revert(daemon, snapshot, options, caller)).await?)
        }
        Request::SnapshotMount {
            snapshot,
            read_only,
            initiators,
        } => answer(&snapshots::mount(daemon, snapshot, read_only, initiators, &caller.who).await?),
        Request::SnapshotUnmount { name, force } => snapshots::unmount(daemon, &name, force, caller).await,
        Request::CloneCreate { snapshot, new } => {
            answer(&volumes::clone(daemon, snapshot, new, &caller.who).await?)
        }
        Request::StoreScrub { action } => answer(&scrub::run(daemon, action, caller).await?),
        Request::StoreStats {} => blocking(daemon, store::stats).await,
        Request::StoreCompact {} => store::compact(daemon, caller).await,
        Request::Events {
            follow: false,
            newest,
        } => answer(&daemon.events.newest(newest)),
        Request::Events { follow: true, newest } => follow(daemon, newest, caller).await,
        agent => super::agents::run(daemon, agent, caller).await,
    }
}

/// The answer as JSON.
pub(super) fn answer(value: &impl Serialize) -> Result<Value, Refusal> {
    serde_json::to_value(value)
        .map_err(|e| Refusal::failed("internal", format!("the answer is no JSON: {e}"), "report this"))
}

/// Runs what may wait for a disk on a worker thread.
pub(crate) async fn blocking<T: Send + 'static>(
    daemon: &Arc<Daemon>,
    work: impl FnOnce(&Arc<Daemon>) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let daemon = Arc::clone(daemon);
    tokio::task::spawn_blocking(move || work(&daemon))
        .await
        .unwrap_or_else(|e| {
            Err(Refusal::failed(
                "internal",
                format!("the daemon failed at it: {e}"),
                "see its log, and report this",
            ))
        })
}

fn status(daemon: &Arc<Daemon>) -> Status {
    let config = daemon.config();
    let stats = daemon.pool.stats();
    let mut warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
    let mut errors = Vec::new();
    if let Some(reason) = daemon.pool.poisoned() {
        errors.push(format!(
            "the store stopped accepting writes: {reason}; restart the daemon"
        ));
    }
    if stats.out_of_space {
        errors.push(
            "the store has no space for new data: delete snapshots or give its file system more room"
                .to_owned(),
        );
    }
    if stats.recovery_incomplete {
        errors.push(
            "the daemon was killed, and its log of the last second is damaged: writes that were not flushed may be lost; check the file systems on the LUNs, then restart the daemon"
                .to_owned(),
        );
    }
    if stats.bad_grains > 0 {
        errors.push(format!(
            "{} of data cannot be had: `stillpoint lun show` and `stillpoint store scrub` list them; write them anew, or take them from a snapshot or a backup",
            count(stats.bad_grains, "grain")
        ));
    }
    if stats.threshold_percent > 0 && !stats.out_of_space {
        warnings.push(format!(
            "the store is more than {}% full: delete snapshots or give it more room",
            stats.threshold_percent
        ));
    }
    let unassigned = apply::standing(&daemon.pool, &config)
        .map(|standing| standing.unassigned)
        .unwrap_or_else(|refusal| {
            errors.push(refusal.message);
            Vec::new()
        });
    let mounts = daemon.state.mounts().unwrap_or_else(|error| {
        errors.push(error.to_string());
        Vec::new()
    });
    let health = match (errors.is_empty(), warnings.is_empty()) {
        (false, _) => "error",
        (true, false) => "warning",
        (true, true) => "ok",
    };
    errors.append(&mut warnings);
    let uptime = jiff::Timestamp::now().duration_since(daemon.started).as_secs();
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        health: health.to_owned(),
        warnings: errors,
        started_at: daemon.started.to_string(),
        uptime_seconds: u64::try_from(uptime).unwrap_or(0),
        config: match &config.origin {
            stillpoint_config::Origin::Embedded => "embedded".to_owned(),
            stillpoint_config::Origin::File(file) => file.display().to_string(),
        },
        data_dir: config.daemon.data_dir.display().to_string(),
        portals: daemon.registry.portals(),
        targets: daemon
            .registry
            .targets()
            .iter()
            .map(|target| target.iqn().to_owned())
            .collect(),
        luns: daemon
            .registry
            .luns()
            .iter()
            .map(|lun| lun.name().to_owned())
            .collect(),
        sessions: daemon.registry.sessions().len(),
        volumes: stats.volumes,
        unassigned_volumes: unassigned,
        snapshots: daemon.pool.snapshots(None).len(),
        mounts: mounts.len(),
        pool: PoolSpace {
            used_bytes: stats.allocated_bytes,
            available_bytes: stats.available_bytes,
            metadata_bytes: stats.metadata_bytes,
            grain_bytes: stats.grain_bytes,
            out_of_space: stats.out_of_space,
        },
    }
}

async fn drop_session(daemon: &Arc<Daemon>, id: u64, caller: &Caller) -> Result<Value, Refusal> {
    let Some(session) = daemon
        .registry
        .sessions()
        .into_iter()
        .find(|session| session.id == id)
    else {
        return Err(Refusal::failed(
            "not_found",
            format!("there is no session {id}"),
            "`stillpoint session list` shows them",
        ));
    };
    caller.progress(format!("asking {} to log out", session.initiator));
    daemon
        .registry
        .drop_session(id, LOGOUT_GRACE, &format!("dropped by {}", caller.who))
        .await;
    let text = format!(
        "session {id} of {} from {} was ended",
        session.initiator, session.peer
    );
    daemon.events.emit(
        code::SESSION_DROPPED,
        format!("target {}", session.target),
        text,
        &caller.who,
    );
    Ok(done([
        ("id", json!(id)),
        ("initiator", json!(session.initiator)),
        ("dropped", json!(true)),
    ]))
}

/// Ends sessions, all at the same time; returns when nothing of them touches the medium any more.
pub(crate) async fn end_sessions(daemon: &Arc<Daemon>, ids: impl IntoIterator<Item = u64>, reason: &str) {
    let ending: Vec<_> = ids
        .into_iter()
        .map(|id| {
            let (daemon, reason) = (Arc::clone(daemon), reason.to_owned());
            tokio::spawn(async move { daemon.registry.drop_session(id, LOGOUT_GRACE, &reason).await })
        })
        .collect();
    for end in ending {
        if let Err(error) = end.await {
            tracing::error!(%error, "ending a session failed");
        }
    }
}

async fn follow(daemon: &Arc<Daemon>, newest: usize, caller: &Caller) -> Result<Value, Refusal> {
    let (past, mut later) = daemon.events.follow(newest);
    for event in past {
        if !caller.event(event).await {
            return Ok(Value::Null);
        }
    }
    loop {
        let event = tokio::select! {
            event = later.recv() => event,
            () = caller.left() => return Ok(Value::Null),
            () = daemon.shutdown.cancelled() => return Ok(Value::Null),
        };
        match event {
            Ok(event) => {
                if !caller.event(event).await {
                    return Ok(Value::Null);
                }
            }
            Err(RecvError::Lagged(missed)) => caller.progress(format!(
                "{missed} events were too fast to be shown; they are in the event log"
            )),
            Err(RecvError::Closed) => return Ok(Value::Null),
        }
    }
}
