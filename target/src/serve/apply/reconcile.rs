//! Makes volumes, LUNs and targets like the configuration, comparing with what there is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use stillpoint_config::{Config, Size, Target};
use stillpoint_snapshot::{Volume, VolumeSpec};

use super::GRACE;
use crate::serve::control::api::{Refusal, VolumeKind};
use crate::serve::events::code;
use crate::serve::registry::{TargetOrigin, TargetRules};
use crate::serve::snapshots::serve_mounts;
use crate::serve::state::{State, VolumeTag};
use crate::serve::{Daemon, Lun, LunBackend, LunSettings, vss};

/// A LUN over the volume of its name.
pub(crate) fn make_lun(
    daemon: &Daemon,
    name: &str,
    write_cache: bool,
    read_only: bool,
) -> Result<Arc<Lun>, Refusal> {
    let volume = daemon.pool.volume(name).ok_or_else(|| {
        Refusal::failed(
            "not_found",
            format!("there is no volume {name:?}"),
            "`stillpoint volume list` shows them",
        )
    })?;
    let info = volume.info()?;
    let tag = VolumeTag::of(&info)?;
    let settings = LunSettings {
        block_size: info.block_size,
        grain: info.grain_bytes,
        write_cache,
        read_only,
    };
    let lun = Lun::new(
        name,
        tag.identity,
        LunBackend::Local(volume),
        settings,
        daemon.state.clone(),
    )
    .map_err(|e| Refusal::failed("lun", format!("{e:#}"), "see the log"))?;
    lun.set_thin_thresholds(&daemon.pool.room_at_thresholds());
    Ok(lun)
}

/// Makes volumes, LUNs and targets like `config`. Blocks.
///
/// # Errors
/// When something cannot be done. What was done until then stays, and doing it again goes on from there.
pub(crate) fn reconcile(daemon: &Daemon, config: &Config, who: &str) -> Result<(), Refusal> {
    let sizes = check_sizes(daemon, config)?;
    create_missing(&daemon.pool, &daemon.state, config, |name, size| {
        daemon.events.emit(
            code::VOLUME_CREATED,
            format!("volume {name}"),
            format!("created with {size}"),
            who,
        );
    })?;
    for (volume, size) in sizes {
        let name = volume.name()?;
        volume.grow(size.bytes())?;
        if let Some(lun) = daemon.registry.lun(&name) {
            lun.resized();
        }
        daemon.events.emit(
            code::VOLUME_GROWN,
            format!("volume {name}"),
            format!("grown to {size}"),
            who,
        );
    }
    let luns = serve_luns(daemon, config)?;
    serve_targets(daemon, config, &luns, who);
    serve_mounts(daemon, config)?;
    vss::serve_all(daemon);
    let mut passing: BTreeSet<String> = daemon
        .state
        .mounts()?
        .into_iter()
        .map(|mount| mount.name)
        .collect();
    passing.extend(daemon.vss.names());
    for lun in daemon
        .registry
        .luns()
        .iter()
        .filter(|lun| config.lun(lun.name()).is_none() && !passing.contains(lun.name()))
    {
        daemon.registry.remove_lun(lun.name());
    }
    Ok(())
}

/// The volumes that have to grow. What cannot be had is refused before anything is changed.
pub(super) fn check_sizes(daemon: &Daemon, config: &Config) -> Result<Vec<(Volume, Size)>, Refusal> {
    let mut grow = Vec::new();
    for lun in &config.luns {
        let Some(volume) = daemon.pool.volume(lun.name.as_str()) else {
            continue;
        };
        if volume.block_size() != lun.block_size {
            return Err(Refusal::refused(
                "block_size",
                format!(
                    "lun \"{}\": `block_size` is {}, but its volume was made with {}",
                    lun.name,
                    lun.block_size,
                    volume.block_size()
                ),
                format!("write block_size = {}", volume.block_size()),
            ));
        }
        let has = Size(volume.size_bytes());
        if lun.size < has {
            // In bytes when the units would hide the difference.
            let exact = if lun.size.to_string() == has.to_string() {
                format!("{}B", has.bytes())
            } else {
                has.to_string()
            };
            return Err(Refusal::refused(
                "shrink",
                format!(
                    "lun \"{}\": `size` is {}, but its volume has {exact}: shrinking would cut off data",
                    lun.name, lun.size
                ),
                format!("write size = \"{exact}\""),
            ));
        }
        if lun.size > has {
            grow.push((volume, lun.size));
        }
    }
    Ok(grow)
}

/// Makes the volumes of LUNs that have none.
pub(crate) fn create_missing(
    pool: &stillpoint_snapshot::Pool,
    state: &State,
    config: &Config,
    mut made: impl FnMut(&str, Size),
) -> Result<(), Refusal> {
    let missing: Vec<_> = config
        .luns
        .iter()
        .filter(|lun| pool.volume(lun.name.as_str()).is_none())
        .collect();
    // A volume of that name that was deleted may have left something that an initiator saved.
    state.forget_all(missing.iter().map(|lun| lun.name.as_str()))?;
    let specs = missing
        .iter()
        .map(|lun| {
            let tag = VolumeTag::new(config.daemon.naa_company_id, VolumeKind::Lun, None)?;
            Ok(VolumeSpec {
                name: lun.name.to_string(),
                size_bytes: lun.size.bytes(),
                block_size: lun.block_size,
                attributes: tag.to_bytes(),
            })
        })
        .collect::<Result<Vec<_>, Refusal>>()?;
    pool.create_volumes(&specs)?;
    for lun in missing {
        made(lun.name.as_str(), lun.size);
    }
    Ok(())
}

/// The store's mode of checksums. It counts for later writes and snapshots.
fn checksums(mode: stillpoint_config::Checksums) -> stillpoint_snapshot::Checksums {
    match mode {
        stillpoint_config::Checksums::Off => stillpoint_snapshot::Checksums::Off,
        stillpoint_config::Checksums::Sealed => stillpoint_snapshot::Checksums::Sealed,
        stillpoint_config::Checksums::Always => stillpoint_snapshot::Checksums::Always,
    }
}

/// The LUNs of the file. Those that are served already live on.
fn serve_luns(daemon: &Daemon, config: &Config) -> Result<BTreeMap<String, Arc<Lun>>, Refusal> {
    let mut luns = BTreeMap::new();
    for lun in &config.luns {
        let name = lun.name.to_string();
        let served = match daemon.registry.lun(&name) {
            Some(served) => served,
            None => {
                let made = make_lun(daemon, &name, lun.write_cache, lun.read_only)?;
                daemon.registry.put_lun(Arc::clone(&made));
                made
            }
        };
        if let Some(volume) = daemon.pool.volume(&name) {
            volume.set_checksums(checksums(lun.checksums))?;
        }
        if served.settings().read_only != lun.read_only {
            served.set_read_only(lun.read_only);
        }
        luns.insert(name, served);
    }
    Ok(luns)
}

fn serve_targets(daemon: &Daemon, config: &Config, luns: &BTreeMap<String, Arc<Lun>>, who: &str) {
    for target in daemon.registry.targets() {
        let configured = target.rules().origin == TargetOrigin::Configured;
        if configured && config.target(target.iqn()).is_none() {
            daemon.registry.remove_target(target.iqn(), GRACE);
            daemon.events.emit(
                code::TARGET_REMOVED,
                format!("target {}", target.iqn()),
                "is no longer served",
                who,
            );
        }
    }
    for target in &config.targets {
        let known = daemon.registry.target(target.iqn.as_str()).is_some();
        daemon
            .registry
            .put_target(target.iqn.as_str(), rules(target, luns));
        if !known {
            daemon.events.emit(
                code::TARGET_ADDED,
                format!("target {}", target.iqn),
                "is served",
                who,
            );
        }
    }
}

fn rules(target: &Target, luns: &BTreeMap<String, Arc<Lun>>) -> TargetRules {
    let numbered = (0u16..).zip(target.luns());
    TargetRules {
        luns: numbered
            .filter_map(|(number, name)| luns.get(name.as_str()).map(|lun| (number, Arc::clone(lun))))
            .collect(),
        access: target.access.clone(),
        chap: target.chap().cloned(),
        portal_groups: target.portal_groups().to_vec(),
        max_sessions: target.max_sessions(),
        agents: target.has_agents(),
        origin: TargetOrigin::Configured,
        numbers: OnceLock::new(),
        transients: Vec::new(),
    }
}
