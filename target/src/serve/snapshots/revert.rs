//! `snapshot revert`: the LUN's content goes back, its identity stays, and what it held until now stays in an automatic snapshot.

use std::sync::Arc;

use stillpoint_agentproto::{LunId, SessionId};
use stillpoint_snapshot::{DiffTo, SnapshotInfo};

use super::create::automatic;
use super::{Meta, find, level, online};
use crate::serve::control::api::{Refusal, Revert, SessionLabel, SnapshotRef, count, time_text};
use crate::serve::control::{Caller, blocking, end_sessions};
use crate::serve::events::code;
use crate::serve::registry::LoginHold;
use crate::serve::state::VolumeTag;
use crate::serve::{Daemon, LunBackend};

/// Names of automatic snapshots begin with this.
const AUTOMATIC: &str = "before-revert";

/// What was allowed, and whether to do it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RevertOptions {
    /// End the sessions of the LUN.
    pub(crate) force: bool,
    /// Power off VMs that run on it.
    pub(crate) power_off: bool,
    /// Only say what would happen.
    pub(crate) plan: bool,
}

pub(crate) async fn revert(
    daemon: &Arc<Daemon>,
    snapshot: SnapshotRef,
    options: RevertOptions,
    caller: &Caller,
) -> Result<Revert, Refusal> {
    let RevertOptions {
        force,
        power_off,
        plan,
    } = options;
    let wanted = snapshot.clone();
    let (reverted, look) = blocking(daemon, move |daemon| look(daemon, &wanted)).await?;
    // A LUN that hypervisors use is taken from them first, and given back afterwards.
    if let Some((look, agent)) =
        look.and_then(|look| daemon.agents.reverter(look.lun_id).map(|agent| (look, agent)))
    {
        return if plan {
            online::plan(daemon, agent, &look, power_off, reverted).await
        } else {
            online::run(daemon, agent, look, (force, power_off), reverted, caller).await
        };
    }
    if plan {
        return Ok(reverted);
    }
    offline(daemon, snapshot, force, reverted, caller).await
}

/// A LUN that nobody uses, or whose sessions may be ended.
async fn offline(
    daemon: &Arc<Daemon>,
    snapshot: SnapshotRef,
    force: bool,
    mut reverted: Revert,
    caller: &Caller,
) -> Result<Revert, Refusal> {
    let _changing = daemon.state.changing().await;
    // An initiator that comes back by itself would go on writing what its caches remember of the old content.
    let targets = daemon.registry.targets_of(&snapshot.lun);
    let _held = LoginHold::new(daemon, targets.iter().map(|target| target.iqn().to_owned()));
    end_or_refuse(daemon, &snapshot.lun, &[], force, &mut reverted, caller).await?;
    if let Some(lun) = daemon.registry.lun(&snapshot.lun) {
        lun.drain().await;
    }
    let who = caller.who.clone();
    let work = snapshot.clone();
    let automatic = blocking(daemon, move |daemon| put_back(daemon, &work, None, &who)).await?;
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

/// Ends the sessions of a LUN, apart from those of initiators that have it detached; refuses while there are others and `force` is
/// not given. Logins are held meanwhile, by the caller.
pub(super) async fn end_or_refuse(
    daemon: &Arc<Daemon>,
    lun: &str,
    detached: &[&String],
    force: bool,
    reverted: &mut Revert,
    caller: &Caller,
) -> Result<(), Refusal> {
    reverted.sessions = sessions(daemon, lun);
    reverted.sessions.retain(|session| {
        !detached
            .iter()
            .any(|name| name.eq_ignore_ascii_case(&session.initiator))
    });
    if reverted.sessions.is_empty() {
        return Ok(());
    }
    if !force {
        return Err(in_use(lun, &reverted.sessions));
    }
    caller.progress(format!(
        "ending {} of {lun}",
        count(reverted.sessions.len(), "session")
    ));
    let reason = format!("LUN {lun} is reverted");
    end_sessions(daemon, reverted.sessions.iter().map(|s| s.id), &reason).await;
    Ok(())
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

/// What an online revert has to know of the snapshot.
pub(super) struct Look {
    pub(super) lun_id: LunId,
    pub(super) snapshot: SnapshotRef,
    pub(super) created_ms: i64,
    /// The session of the agents that took part.
    pub(super) taken_in: Option<SessionId>,
}

/// What a revert would do.
fn look(daemon: &Daemon, snapshot: &SnapshotRef) -> Result<(Revert, Option<Look>), Refusal> {
    let info = find(daemon, snapshot)?;
    let volume = daemon
        .pool
        .volume_by_id(info.volume)
        .ok_or_else(|| gone(snapshot))?;
    if VolumeTag::of(&volume.info()?)?.kind.is_passing() {
        return Err(Refusal::refused(
            "mounted",
            format!("{:?} is a mounted snapshot or a shadow copy", snapshot.lun),
            "unmount it and mount the other one",
        ));
    }
    let changed = daemon.pool.diff(Some(info.id), DiffTo::Head(info.volume))?;
    let look = daemon.registry.lun(&snapshot.lun).map(|lun| Look {
        lun_id: LunId(lun.identity().naa),
        snapshot: snapshot.clone(),
        created_ms: info.created_ms,
        taken_in: Meta::of(&info).proof(&daemon.state, info.id).session,
    });
    let revert = Revert {
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
        agent: None,
        hosts: Vec::new(),
        vms: Vec::new(),
        findings: Vec::new(),
    };
    Ok((revert, look))
}

fn gone(snapshot: &SnapshotRef) -> Refusal {
    Refusal::failed(
        "not_found",
        format!("the volume of {snapshot} is gone"),
        "`stillpoint volume list` shows what there is",
    )
}

/// Takes the automatic snapshot, goes back, and puts the new content below the LUN. Returns the automatic snapshot's name. An online
/// revert, which may be repeated after a crash, names its session: the automatic snapshot of an earlier try is then the one.
pub(super) fn put_back(
    daemon: &Daemon,
    snapshot: &SnapshotRef,
    session: Option<SessionId>,
    who: &str,
) -> Result<String, Refusal> {
    let info: SnapshotInfo = find(daemon, snapshot)?;
    let note = match session {
        None => format!("before the revert to {}", snapshot.name),
        Some(session) => format!("before the revert to {} ({session})", snapshot.name),
    };
    let noted = |one: &SnapshotInfo| Meta::of(one).note.as_ref() == Some(&note);
    let earlier = session.and_then(|_| daemon.pool.snapshots(Some(info.volume)).into_iter().find(noted));
    let before = match earlier {
        Some(before) => before,
        None => automatic(daemon, info.volume, &snapshot.lun, AUTOMATIC, note, who)?,
    };
    let volume = daemon.pool.revert(info.volume, info.id)?;
    if let Some(lun) = daemon.registry.lun(&snapshot.lun) {
        lun.replace_backend(LunBackend::Local(volume));
    }
    Ok(before.name)
}
