//! `snapshot mount` and `unmount`: a snapshot served as a LUN of its own, under its own target and identity, kept over restarts.
//!
//! The mount is remembered before its volume is made, and forgotten after it is deleted: whatever a crash leaves, the next start finds
//! the record, and a record without a volume is a mount that never began or has ended.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use stillpoint_config::{
    Access, Config, Initiators, IscsiName, LunName, MAX_ACCESS_ENTRIES, MAX_ISCSI_NAME_BYTES, MAX_NAME_BYTES,
};
use stillpoint_snapshot::CloneSpec;

use super::{find, free_name};
use crate::serve::control::api::{MountReply, Refusal, SessionLabel, SnapshotRef, VolumeKind, count, done};
use crate::serve::control::{Caller, blocking, end_sessions, luns};
use crate::serve::events::{DAEMON, code};
use crate::serve::registry::{TargetOrigin, TargetRules};
use crate::serve::state::{Mount, VolumeTag};
use crate::serve::{Daemon, apply};

/// How long the sessions of an unmounted snapshot may take to log out.
const GRACE: std::time::Duration = std::time::Duration::from_secs(5);

pub(crate) async fn mount(
    daemon: &Arc<Daemon>,
    snapshot: SnapshotRef,
    read_only: bool,
    initiators: Vec<String>,
    who: &str,
) -> Result<MountReply, Refusal> {
    let _changing = daemon.state.changing().await;
    let who = who.to_owned();
    blocking(daemon, move |daemon| {
        let info = find(daemon, &snapshot)?;
        let mount = plan(daemon, &snapshot, read_only, initiators, &who)?;
        rules_access(&daemon.config(), &mount)?;
        daemon.state.put_mount(&mount)?;
        if let Err(refusal) = make(daemon, &mount, info.id) {
            // Nothing is left of a mount that failed.
            if daemon.pool.volume(&mount.name).is_some() {
                daemon.pool.delete_volume(&mount.name, true)?;
            }
            daemon.state.remove_mount(&mount.name)?;
            return Err(refusal);
        }
        daemon.events.emit(
            code::SNAPSHOT_MOUNTED,
            format!("snapshot {snapshot}"),
            format!("mounted as {} on {}", mount.name, mount.iqn),
            &who,
        );
        reply(daemon, &mount)
    })
    .await
}

/// Chooses names that nobody has.
fn plan(
    daemon: &Daemon,
    snapshot: &SnapshotRef,
    read_only: bool,
    initiators: Vec<String>,
    who: &str,
) -> Result<Mount, Refusal> {
    let config = daemon.config();
    if initiators.len() > MAX_ACCESS_ENTRIES {
        return Err(Refusal::refused(
            "limit",
            format!("{} initiators", initiators.len()),
            format!("name at most {MAX_ACCESS_ENTRIES}"),
        ));
    }
    let mut named = Vec::new();
    for initiator in initiators {
        let name = initiator
            .parse::<IscsiName>()
            .map_err(|t| Refusal::usage("bad_initiator", t.trouble, t.way_out))?;
        named.push(name.to_string());
    }
    let taken = |name: &str| daemon.pool.volume(name).is_some() || config.lun(name).is_some();
    let base = format!("{}-{}", snapshot.lun, snapshot.name);
    let name = free_name(base.get(..MAX_NAME_BYTES - 4).unwrap_or(&base), taken);
    let parent = config
        .targets_of(&snapshot.lun)
        .next()
        .map(|target| target.iqn.to_string());
    let iqn = mount_iqn(parent.as_deref(), &snapshot.lun, &snapshot.name)?;
    let iqn = free_name(&iqn, |iqn| {
        daemon.registry.target(iqn).is_some() || config.target(iqn).is_some()
    });
    if iqn.len() > MAX_ISCSI_NAME_BYTES {
        return Err(Refusal::refused(
            "limit",
            format!("the target name {iqn} would be too long"),
            "use a shorter snapshot name",
        ));
    }
    Ok(Mount {
        name,
        lun: snapshot.lun.clone(),
        snapshot: snapshot.name.clone(),
        iqn,
        read_only,
        initiators: (!named.is_empty()).then_some(named),
        created_at: jiff::Timestamp::now().to_string(),
        created_by: who.to_owned(),
    })
}

/// The LUN's own target name and the snapshot's: `iqn.2026-11.com.example:sql01.20261122t160000z`.
fn mount_iqn(parent: Option<&str>, lun: &str, snapshot: &str) -> Result<String, Refusal> {
    let text = match parent {
        Some(parent) if parent.starts_with("iqn.") && parent.contains(':') => format!("{parent}.{snapshot}"),
        Some(parent) if parent.starts_with("iqn.") => format!("{parent}:{snapshot}"),
        // `eui.` and `naa.` names have no room for more.
        _ => format!("iqn.2026-11.io.stillpoint:{lun}.{snapshot}"),
    };
    let name: IscsiName = text
        .parse()
        .map_err(|t: stillpoint_config::Trouble| Refusal::refused("bad_name", t.trouble, t.way_out))?;
    Ok(name.to_string())
}

/// Makes the volume and serves it.
fn make(daemon: &Daemon, mount: &Mount, snapshot: stillpoint_snapshot::SnapshotId) -> Result<(), Refusal> {
    let origin = format!("{}@{}", mount.lun, mount.snapshot);
    let config = daemon.config();
    let tag = VolumeTag::new(config.daemon.naa_company_id, VolumeKind::Mount, Some(origin))?;
    let spec = CloneSpec {
        name: mount.name.clone(),
        read_only: mount.read_only,
        attributes: tag.to_bytes(),
    };
    daemon.pool.clone_snapshot(snapshot, &spec)?;
    serve(daemon, &config, mount)
}

/// Who may log in to a mount, and how: as to the LUN itself, unless initiators were named.
fn rules_access(
    config: &Config,
    mount: &Mount,
) -> Result<(Access, Option<stillpoint_config::Chap>, Vec<u16>, u32), Refusal> {
    let own = config.targets_of(&mount.lun).next();
    let groups = || {
        config
            .portals
            .iter()
            .map(|portal| portal.group)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    };
    let named = mount.initiators.as_ref().map(|names| {
        // They were checked when the mount was made.
        let names = names
            .iter()
            .filter_map(|name| name.parse::<IscsiName>().ok())
            .collect();
        Access {
            initiators: Initiators::These(names),
            allow_from: Vec::new(),
        }
    });
    match (named, own) {
        (Some(access), Some(own)) => Ok((
            access,
            own.chap().cloned(),
            own.portal_groups().to_vec(),
            own.max_sessions(),
        )),
        (Some(access), None) => Ok((access, None, groups(), 1)),
        (None, Some(own)) => Ok((
            own.access.clone(),
            own.chap().cloned(),
            own.portal_groups().to_vec(),
            own.max_sessions(),
        )),
        (None, None) => Err(Refusal::refused(
            "nobody",
            format!(
                "no target serves LUN {:?}, so nobody could log in to its snapshot",
                mount.lun
            ),
            "name who may with --initiator",
        )),
    }
}

/// Serves a mount, or gives the target of one that is served new rules.
fn serve(daemon: &Daemon, config: &Config, mount: &Mount) -> Result<(), Refusal> {
    let (access, chap, portal_groups, max_sessions) = rules_access(config, mount)?;
    let lun = match daemon.registry.lun(&mount.name) {
        Some(lun) => lun,
        None => apply::make_lun(daemon, &mount.name, true, mount.read_only)?,
    };
    let rules = TargetRules {
        luns: vec![(0, lun)],
        access,
        chap,
        portal_groups,
        max_sessions,
        agents: false,
        origin: TargetOrigin::Mount,
        numbers: OnceLock::new(),
        transients: Vec::new(),
    };
    daemon.registry.put_target(&mount.iqn, rules);
    Ok(())
}

/// Serves every mount by these rules: at start, and when the LUNs' access lists have changed. One that cannot be served does not
/// keep the others from it.
pub(crate) fn serve_mounts(daemon: &Daemon, config: &Config) -> Result<(), Refusal> {
    for mount in daemon.state.mounts()? {
        if daemon.pool.volume(&mount.name).is_none() {
            daemon.state.remove_mount(&mount.name)?;
            continue;
        }
        if let Err(refusal) = serve(daemon, config, &mount) {
            // Rules that nobody can tell any more must not stay in force.
            daemon.registry.remove_target(&mount.iqn, GRACE);
            daemon.events.emit(
                code::MOUNT_NOT_SERVED,
                format!("mount {}", mount.name),
                format!(
                    "is not served: {}: unmount it, or {}",
                    refusal.message, refusal.hint
                ),
                DAEMON,
            );
        }
    }
    Ok(())
}

fn reply(daemon: &Daemon, mount: &Mount) -> Result<MountReply, Refusal> {
    let lun = daemon
        .registry
        .lun(&mount.name)
        .ok_or_else(|| luns::unknown(daemon, &mount.name))?;
    let path = luns::paths(daemon, &lun)
        .into_iter()
        .next()
        .ok_or_else(|| luns::unknown(daemon, &mount.name))?;
    Ok(MountReply {
        name: mount.name.clone(),
        iqn: mount.iqn.clone(),
        lun: path.lun,
        portals: path.portals,
        snapshot: format!("{}@{}", mount.lun, mount.snapshot),
        source_lun: mount.lun.clone(),
        read_only: mount.read_only,
        initiators: path.initiators,
        naa: lun.identity().naa_text(),
        serial: lun.identity().serial.clone(),
    })
}

pub(crate) async fn unmount(
    daemon: &Arc<Daemon>,
    name: &str,
    force: bool,
    caller: &Caller,
) -> Result<Value, Refusal> {
    name.parse::<LunName>()
        .map_err(|t| Refusal::usage("bad_name", t.trouble, t.way_out))?;
    let _changing = daemon.state.changing().await;
    let Some(mount) = daemon.state.mount(name)? else {
        return Err(Refusal::failed(
            "not_found",
            format!("there is no mounted snapshot {name:?}"),
            "`stillpoint lun list` shows them, with the kind `mount`",
        ));
    };
    let sessions = daemon.registry.sessions_of_target(&mount.iqn);
    if !sessions.is_empty() && !force {
        let names: Vec<String> = sessions
            .iter()
            .map(|s| SessionLabel::from(s).to_string())
            .collect();
        return Err(Refusal::refused(
            "sessions",
            format!("{name} is in use by {}", names.join(", ")),
            "log out there, or add --force to end the sessions",
        ));
    }
    // First nobody can log in any more, then those who are there go.
    daemon.registry.remove_target(&mount.iqn, GRACE);
    let ids: Vec<u64> = daemon
        .registry
        .sessions_of_target(&mount.iqn)
        .iter()
        .map(|session| session.id)
        .collect();
    if !ids.is_empty() {
        caller.progress(format!("ending {} of {name}", count(ids.len(), "session")));
    }
    end_sessions(daemon, ids, "the snapshot is unmounted").await;
    if let Some(lun) = daemon.registry.remove_lun(name) {
        lun.drain().await;
    }
    let who = caller.who.clone();
    blocking(daemon, move |daemon| {
        if daemon.pool.volume(&mount.name).is_some() {
            daemon.pool.delete_volume(&mount.name, true)?;
        }
        daemon.state.forget(&mount.name)?;
        daemon.state.remove_mount(&mount.name)?;
        let subject = format!("snapshot {}@{}", mount.lun, mount.snapshot);
        daemon.events.emit(
            code::SNAPSHOT_UNMOUNTED,
            subject,
            format!("{} is unmounted", mount.name),
            &who,
        );
        Ok(done([("name", json!(mount.name)), ("unmounted", json!(true))]))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_named_after_the_lun_s_target_and_the_snapshot() {
        let iqn = |parent: Option<&str>| mount_iqn(parent, "sql01", "20261122T160000Z").expect("a name");
        assert_eq!(
            iqn(Some("iqn.2026-11.com.example:sql01")),
            "iqn.2026-11.com.example:sql01.20261122t160000z"
        );
        assert_eq!(
            iqn(Some("iqn.2026-11.com.example")),
            "iqn.2026-11.com.example:20261122t160000z"
        );
        assert_eq!(
            iqn(Some("eui.02004567a425678d")),
            "iqn.2026-11.io.stillpoint:sql01.20261122t160000z"
        );
        assert_eq!(iqn(None), "iqn.2026-11.io.stillpoint:sql01.20261122t160000z");
    }

    #[test]
    fn a_mount_follows_the_access_list_of_its_lun_unless_initiators_are_named() {
        let config = Config::embedded("x".into(), None);
        let mount = Mount {
            name: "demo-s".into(),
            lun: "demo".into(),
            snapshot: "s".into(),
            iqn: "iqn.x".into(),
            read_only: false,
            initiators: None,
            created_at: String::new(),
            created_by: String::new(),
        };
        let (access, chap, groups, _) = rules_access(&config, &mount).expect("the demo's own");
        assert_eq!(
            (access.initiators, chap, groups),
            (Initiators::Anyone, None, vec![1])
        );
        let named = Mount {
            initiators: Some(vec!["iqn.2026-11.com.example:a".into()]),
            ..mount.clone()
        };
        let (access, ..) = rules_access(&config, &named).expect("named");
        assert!(
            access.initiators.admits("iqn.2026-11.com.example:A")
                && !access.initiators.admits("iqn.2026-11.com.example:b")
        );
        let orphan = Mount {
            lun: "gone".into(),
            ..mount
        };
        assert_eq!(rules_access(&config, &orphan).expect_err("nobody").code, "nobody");
    }
}
