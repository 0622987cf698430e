//! `lun list`, `lun show` and `lun preflight`.

use std::collections::BTreeMap;
use std::sync::Arc;

use stillpoint_config::{Consistency, Initiators};
use stillpoint_snapshot::{VolumeId, VolumeInfo};

use super::api::{BadRange, LunDetail, LunPath, LunRow, Refusal, ShadowCopy, VolumeKind, time_text};
use crate::serve::agents::{Mode, PreflightView};
use crate::serve::state::VolumeTag;
use crate::serve::vss::CopyView;
use crate::serve::{Daemon, Lun};

pub(super) fn list(daemon: &Arc<Daemon>) -> Result<Vec<LunRow>, Refusal> {
    let volumes: BTreeMap<String, VolumeInfo> = daemon
        .pool
        .volumes()
        .into_iter()
        .map(|v| (v.name.clone(), v))
        .collect();
    let snapshots = snapshot_counts(daemon);
    let served = daemon.registry.luns();
    let mut copies = daemon.vss.views(jiff::Timestamp::now().as_millisecond());
    // A LUN whose volume was deleted a moment ago is not listed any more.
    let pairs = served
        .iter()
        .filter_map(|lun| volumes.get(lun.name()).map(|volume| (lun, volume)));
    let mut rows = Vec::new();
    for (lun, volume) in pairs {
        let snapshots = snapshots.get(&volume.id).copied().unwrap_or(0);
        let copy = copies.remove(lun.name());
        rows.push(row(daemon, lun, volume, snapshots, copy.as_ref())?);
    }
    // What is masked is served to nobody, and still holds space.
    rows.extend(copies.values().map(|copy| masked(copy, volumes.get(&copy.name))));
    Ok(rows)
}

/// A shadow copy that no initiator sees now.
fn masked(copy: &CopyView, volume: Option<&VolumeInfo>) -> LunRow {
    LunRow {
        name: copy.name.clone(),
        kind: VolumeKind::Vss,
        size_bytes: copy.size_bytes,
        used_bytes: volume.map_or(0, |volume| volume.mapped_bytes),
        block_size: copy.block_size,
        read_only: !copy.writable,
        targets: Vec::new(),
        sessions: 0,
        snapshots: 0,
        naa: copy.naa.clone(),
        serial: copy.serial.clone(),
        shadow_copy: Some(copy.into()),
    }
}

impl From<&CopyView> for ShadowCopy {
    fn from(copy: &CopyView) -> Self {
        Self {
            owner: copy.owner.clone(),
            agent: copy.agent.clone(),
            set: copy.set.clone(),
            source: copy.source.clone(),
            initiator: copy.shown_to.clone(),
            age_seconds: copy.age_seconds,
        }
    }
}

/// Snapshots of each volume.
pub(super) fn snapshot_counts(daemon: &Daemon) -> BTreeMap<VolumeId, usize> {
    let mut counts = BTreeMap::new();
    for snapshot in daemon.pool.snapshots(None) {
        *counts.entry(snapshot.volume).or_default() += 1;
    }
    counts
}

fn row(
    daemon: &Daemon,
    lun: &Lun,
    volume: &VolumeInfo,
    snapshots: usize,
    copy: Option<&CopyView>,
) -> Result<LunRow, Refusal> {
    let identity = lun.identity();
    Ok(LunRow {
        shadow_copy: copy.map(ShadowCopy::from),
        name: lun.name().to_owned(),
        kind: VolumeTag::of(volume)?.kind,
        size_bytes: volume.size_bytes,
        used_bytes: volume.mapped_bytes,
        block_size: volume.block_size,
        read_only: lun.settings().read_only,
        targets: paths(daemon, lun),
        sessions: daemon.registry.sessions_of_lun(lun.name()).len(),
        snapshots,
        naa: identity.naa_text(),
        serial: identity.serial.clone(),
    })
}

/// Through which targets a LUN is reached, by whom.
pub(crate) fn paths(daemon: &Daemon, lun: &Lun) -> Vec<LunPath> {
    let targets = daemon.registry.targets_of(lun.name());
    let path = |target: &Arc<crate::serve::registry::Target>| {
        let rules = target.rules();
        let initiators = match &rules.access.initiators {
            _ if rules.transient(lun).is_some() => rules
                .transient(lun)
                .map(|one| one.initiator.clone())
                .into_iter()
                .collect(),
            Initiators::Anyone => vec!["*".to_owned()],
            Initiators::These(names) => names.iter().map(ToString::to_string).collect(),
        };
        Some(LunPath {
            iqn: target.iqn().to_owned(),
            lun: rules.number_of(lun)?,
            agents: rules.agents,
            chap: rules.chap.is_some(),
            initiators,
            allow_from: rules.access.allow_from.iter().map(ToString::to_string).collect(),
            portals: portals(daemon, &rules.portal_groups),
        })
    };
    targets.iter().filter_map(path).collect()
}

/// Addresses of portal groups, as SendTargets says them where that differs.
pub(crate) fn portals(daemon: &Daemon, groups: &[u16]) -> Vec<String> {
    let portals = daemon
        .registry
        .portals()
        .into_iter()
        .filter(|portal| groups.contains(&portal.group));
    portals
        .map(|portal| portal.advertise.unwrap_or_else(|| portal.address.to_string()))
        .collect()
}

pub(super) fn show(daemon: &Arc<Daemon>, name: &str) -> Result<LunDetail, Refusal> {
    let copies = daemon.vss.views(jiff::Timestamp::now().as_millisecond());
    let (Some(lun), Some(volume)) = (daemon.registry.lun(name), daemon.pool.volume(name)) else {
        return Err(unknown(daemon, name));
    };
    let volume = volume.info()?;
    let snapshots = daemon.pool.snapshots(Some(volume.id)).len();
    let figures = lun.figures();
    Ok(LunDetail {
        row: row(daemon, &lun, &volume, snapshots, copies.get(name))?,
        grain_bytes: volume.grain_bytes,
        write_cache: figures.write_cache,
        write_cache_configured: lun.settings().write_cache,
        write_cache_saved: daemon.state.saved_write_cache(name),
        origin: VolumeTag::of(&volume)?.origin,
        created_at: time_text(volume.created_ms),
        checksums: volume.checksums,
        bad_data: BadRange::list(&daemon.pool, Some(volume.id))?,
        commands: figures.commands,
        read_bytes: figures.read_bytes,
        written_bytes: figures.written_bytes,
        session_list: daemon.registry.sessions_of_lun(name),
    })
}

/// What would refuse the next snapshot of this level.
pub(super) async fn preflight(
    daemon: &Arc<Daemon>,
    name: &str,
    consistency: Consistency,
) -> Result<PreflightView, Refusal> {
    let mode = match consistency {
        Consistency::Application => Mode::Application,
        Consistency::Filesystem => Mode::Filesystem,
        Consistency::Crash => {
            return Err(Refusal::usage(
                "usage",
                "a crash-consistent snapshot asks nobody: there is nothing to check",
                "--consistency is application or filesystem",
            ));
        }
    };
    if daemon.registry.lun(name).is_none() {
        return Err(unknown(daemon, name));
    }
    daemon.agents.preflight(name, mode).await
}

/// The refusal of a name that no served LUN has.
pub(crate) fn unknown(daemon: &Daemon, name: &str) -> Refusal {
    if daemon.pool.volume(name).is_some() {
        return Refusal::failed(
            "not_served",
            format!("volume {name:?} exists, but no LUN serves it"),
            format!("add a `[[lun]]` with name = {name:?} and `stillpoint config apply`"),
        );
    }
    Refusal::failed(
        "not_found",
        format!("there is no LUN {name:?}"),
        "`stillpoint lun list` shows them",
    )
}
