//! Makes what is served like what the file says: at start, by `config apply`, and on SIGHUP.
//!
//! [`reconcile`] compares with what there is and not with what the old file said, so that doing it twice, or again after it failed half-way,
//! is right. Nothing of a file is applied when any part of it is refused.

mod reconcile;

use std::collections::BTreeSet;
use std::sync::Arc;

use stillpoint_config::{Change, Config, Effect, Origin, diff};

use super::control::api::{
    CONFIRMATION, ConfigPlan, PlannedChange, Refusal, SessionLabel, VolumeKind, count,
};
use super::control::{blocking, end_sessions};
use super::events::{DAEMON, code};
use super::registry::Session;
use super::snapshots::close_interrupted;
use super::state::VolumeTag;
use super::{Daemon, store, vss};

pub(crate) use reconcile::{create_missing, make_lun, reconcile};

use reconcile::check_sizes;

/// How long the sessions of a target that is served no longer may take to log out.
const GRACE: std::time::Duration = std::time::Duration::from_secs(5);

/// What there is beside what the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// LUNs that have no volume yet.
    pub(crate) missing: Vec<String>,
    /// Volumes that no LUN names.
    pub(crate) unassigned: Vec<String>,
}

/// Compares volumes with the file.
pub(crate) fn standing(pool: &stillpoint_snapshot::Pool, config: &Config) -> Result<Standing, Refusal> {
    let mut standing = Standing::default();
    let volumes = pool.volumes();
    for volume in &volumes {
        let kind = VolumeTag::of(volume)?.kind;
        let mounted = kind.is_passing();
        match config.lun(&volume.name) {
            Some(_) if kind == VolumeKind::Vss => {
                return Err(Refusal::refused(
                    "shadow_copy",
                    format!(
                        "lun {:?}: a shadow copy of a VSS provider has that name",
                        volume.name
                    ),
                    format!(
                        "name the LUN otherwise, or `stillpoint volume delete {} --yes`",
                        volume.name
                    ),
                ));
            }
            Some(_) if mounted => {
                return Err(Refusal::refused(
                    "mounted",
                    format!("lun {:?}: a mounted snapshot has that name", volume.name),
                    format!(
                        "unmount it (`stillpoint snapshot unmount {}`) or name the LUN otherwise",
                        volume.name
                    ),
                ));
            }
            None if !mounted => standing.unassigned.push(volume.name.clone()),
            _ => {}
        }
    }
    let names: BTreeSet<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
    standing.missing = config
        .luns
        .iter()
        .map(|lun| lun.name.to_string())
        .filter(|name| !names.contains(name.as_str()))
        .collect();
    Ok(standing)
}

impl Standing {
    /// A mistyped or renamed LUN must not appear as an empty disk: while a volume is unassigned, new ones are made only when
    /// somebody says so.
    fn doubt(&self) -> Option<Refusal> {
        let (missing, unassigned) = (self.missing.first()?, self.unassigned.first()?);
        let names = |list: &[String]| {
            list.iter()
                .map(|name| format!("{name:?}"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        Some(Refusal::refused(
            CONFIRMATION,
            format!(
                "LUN {} has no volume yet, while volume {} belongs to no LUN: was it renamed, or mistyped?",
                names(&self.missing),
                names(&self.unassigned)
            ),
            format!(
                "`stillpoint volume rename {unassigned} {missing}` keeps its data; if a new, empty disk is meant, `stillpoint config apply --yes`"
            ),
        ))
    }
}

/// Serves what the file says, before any portal opens. Blocks.
///
/// # Errors
/// When something of it cannot be served; the text says what to do.
pub(crate) fn first_start(daemon: &Arc<Daemon>) -> anyhow::Result<()> {
    let config = daemon.config();
    let said = |refusal: Refusal| anyhow::anyhow!("{}: {}", refusal.message, refusal.hint);
    let standing = standing(&daemon.pool, &config).map_err(said)?;
    if let Some(doubt) = standing.doubt() {
        return Err(said(doubt));
    }
    close_interrupted(&daemon.pool, &daemon.events).map_err(said)?;
    reconcile(daemon, &config, DAEMON).map_err(said)?;
    vss::restore(daemon).map_err(said)?;
    store::watch(daemon)?;
    let luns = daemon.registry.luns().len();
    daemon.events.emit(
        code::STARTED,
        "daemon",
        format!(
            "version {} started with {}",
            env!("CARGO_PKG_VERSION"),
            count(luns, "LUN")
        ),
        DAEMON,
    );
    Ok(())
}

/// What the file would change. Blocks.
fn look(daemon: &Daemon) -> Result<(Config, Vec<Change>, ConfigPlan), Refusal> {
    let running = daemon.config();
    let Origin::File(file) = &running.origin else {
        return Err(Refusal::refused(
            "embedded",
            "the daemon runs the built-in configuration, which has no file",
            "write a file and start it with `stillpoint serve --config FILE`",
        ));
    };
    let config = Config::load(file).map_err(|problems| {
        let details: Vec<String> = problems.0.iter().map(ToString::to_string).collect();
        Refusal::failed(
            "config",
            format!("{} has {}:", file.display(), count(details.len(), "problem")),
            "nothing was changed",
        )
        .with_details(details)
    })?;
    let standing = standing(&daemon.pool, &config)?;
    check_mount_names(daemon, &config)?;
    let changes = diff(&running, &config);
    // What the comparison of the files refuses is listed with everything else; this finds what differs from the volumes.
    if changes.iter().all(|change| change.effect != Effect::Refused) {
        check_sizes(daemon, &config)?;
    }
    let sessions = daemon.registry.sessions_with(|_| true);
    let planned = changes.iter().map(|change| PlannedChange {
        subject: change.subject.clone(),
        text: change.text.clone(),
        effect: effect_word(change.effect).to_owned(),
        ends_sessions: ended(change, &config, &sessions)
            .map(|session| label(session))
            .collect(),
    });
    let plan = ConfigPlan {
        file: file.display().to_string(),
        changes: planned.collect(),
        creates_volumes: standing.missing,
        unassigned_volumes: standing.unassigned,
        warnings: config.warnings.iter().map(ToString::to_string).collect(),
        unserved: config
            .unserved()
            .iter()
            .map(|part| format!("{} (line {})", part.section, part.line))
            .collect(),
        applied: false,
    };
    Ok((config, changes, plan))
}

/// A target of the file must not take the name of a mounted snapshot's target.
fn check_mount_names(daemon: &Daemon, config: &Config) -> Result<(), Refusal> {
    let mounts = daemon.state.mounts()?;
    match mounts.iter().find(|mount| config.target(&mount.iqn).is_some()) {
        None => Ok(()),
        Some(mount) => Err(Refusal::refused(
            "mounted",
            format!(
                "target \"{}\" is that of the mounted snapshot {}",
                mount.iqn, mount.name
            ),
            "unmount it, or choose another `iqn`",
        )),
    }
}

fn effect_word(effect: Effect) -> &'static str {
    match effect {
        Effect::None => "none",
        Effect::Told => "told",
        Effect::EndsExcluded => "ends_excluded",
        Effect::Ends => "ends",
        Effect::Refused => "refused",
    }
}

fn label(session: &Session) -> SessionLabel {
    SessionLabel {
        id: session.id,
        initiator: session.initiator.clone(),
        target: session.target.iqn().to_owned(),
        peer: session.peer.to_string(),
    }
}

/// The sessions that a change ends.
fn ended<'a>(
    change: &'a Change,
    config: &'a Config,
    sessions: &'a [Arc<Session>],
) -> impl Iterator<Item = &'a Arc<Session>> {
    let touched = sessions.iter().filter(|session| {
        change
            .targets
            .iter()
            .any(|iqn| iqn.as_str() == session.target.iqn())
    });
    touched.filter(move |session| match change.effect {
        Effect::Ends => true,
        Effect::EndsExcluded => excluded(session, config, sessions),
        Effect::None | Effect::Told | Effect::Refused => false,
    })
}

/// Whether the new rules would not let this session in.
fn excluded(session: &Session, config: &Config, sessions: &[Arc<Session>]) -> bool {
    let Some(target) = config.target(session.target.iqn()) else {
        return true;
    };
    let older = sessions.iter().filter(|other| {
        other.id < session.id
            && other.initiator == session.initiator
            && other.target.key() == session.target.key()
    });
    !target.access.admits(&session.initiator, session.peer.ip())
        || !target.portal_groups().contains(&session.portal_group)
        // One path: the first one stays.
        || (target.has_agents() && older.count() > 0)
}

/// `config plan`.
///
/// # Errors
/// When the file is wrong.
pub(crate) async fn plan(daemon: &Arc<Daemon>) -> Result<ConfigPlan, Refusal> {
    blocking(daemon, |daemon| look(daemon).map(|(_, _, plan)| plan)).await
}

/// What was agreed to beforehand.
#[derive(Clone, Copy, Debug)]
struct Agreed {
    /// Sessions may be ended.
    sessions: bool,
    /// Volumes may be made while others are unassigned.
    volumes: bool,
}

/// `config apply`.
///
/// # Errors
/// When the file is wrong, something of it is refused, or it needs a yes that was not given.
pub(crate) async fn apply(daemon: &Arc<Daemon>, confirmed: bool, who: &str) -> Result<ConfigPlan, Refusal> {
    carry_out(
        daemon,
        Agreed {
            sessions: confirmed,
            volumes: confirmed,
        },
        who,
    )
    .await
}

/// SIGHUP: who sends it wants the file applied, but has not been told of empty disks.
///
/// # Errors
/// When the file is not applied; everything goes on as before.
pub(crate) async fn reload(daemon: &Arc<Daemon>) -> anyhow::Result<()> {
    match carry_out(
        daemon,
        Agreed {
            sessions: true,
            volumes: false,
        },
        "SIGHUP",
    )
    .await
    {
        Ok(_) => Ok(()),
        Err(refusal) => {
            let details = refusal
                .details
                .iter()
                .map(|detail| format!("; {detail}"))
                .collect::<String>();
            Err(anyhow::anyhow!("{}{details}: {}", refusal.message, refusal.hint))
        }
    }
}

async fn carry_out(daemon: &Arc<Daemon>, agreed: Agreed, who: &str) -> Result<ConfigPlan, Refusal> {
    let _changing = daemon.state.changing().await;
    let done = try_carry_out(daemon, agreed, who).await;
    if let Err(refusal) = &done
        && refusal.code != CONFIRMATION
    {
        daemon.events.emit(
            code::CONFIG_REFUSED,
            "configuration",
            format!("not applied: {}", refusal.message),
            who,
        );
    }
    done
}

async fn try_carry_out(daemon: &Arc<Daemon>, agreed: Agreed, who: &str) -> Result<ConfigPlan, Refusal> {
    let (config, changes, mut plan) = blocking(daemon, |daemon| look(daemon)).await?;
    check_agreed(&changes, &plan, agreed)?;
    let mut ends: BTreeSet<u64> = plan
        .changes
        .iter()
        .flat_map(|change| &change.ends_sessions)
        .map(|session| session.id)
        .collect();
    let person = who.to_owned();
    let config = blocking(daemon, move |daemon| {
        reconcile(daemon, &config, &person).map_err(|refusal| Refusal {
            hint: format!(
                "{}; then `stillpoint config apply` again: it goes on where it stopped",
                refusal.hint
            ),
            ..refusal
        })?;
        Ok(config)
    })
    .await?;
    // Somebody may have logged in between the look and the new rules: nobody keeps an access that was just revoked.
    let now = daemon.registry.sessions_with(|_| true);
    ends.extend(
        changes
            .iter()
            .flat_map(|change| ended(change, &config, &now))
            .map(|session| session.id),
    );
    daemon.set_config(config);
    end_sessions(daemon, ends, "the configuration was changed").await;
    for change in &changes {
        daemon.events.emit(
            code::CONFIG_APPLIED,
            change.subject.clone(),
            change.text.clone(),
            who,
        );
    }
    plan.applied = true;
    Ok(plan)
}

fn check_agreed(changes: &[Change], plan: &ConfigPlan, agreed: Agreed) -> Result<(), Refusal> {
    let refused: Vec<String> = changes
        .iter()
        .filter(|c| c.effect == Effect::Refused)
        .map(ToString::to_string)
        .collect();
    if !refused.is_empty() {
        let message = match refused.as_slice() {
            [one] => one.clone(),
            many => format!("{} changes cannot be applied to a running daemon", many.len()),
        };
        return Err(Refusal::refused("config_refused", message, "nothing was changed").with_details(refused));
    }
    let standing = Standing {
        missing: plan.creates_volumes.clone(),
        unassigned: plan.unassigned_volumes.clone(),
    };
    if !agreed.volumes
        && let Some(doubt) = standing.doubt()
    {
        return Err(doubt);
    }
    let ends: Vec<String> = plan
        .changes
        .iter()
        .flat_map(|c| &c.ends_sessions)
        .map(ToString::to_string)
        .collect();
    if !agreed.sessions && !ends.is_empty() {
        let message = format!("{} would be ended:", count(ends.len(), "session"));
        let hint = "`stillpoint config plan` shows why; `stillpoint config apply --yes` does it";
        return Err(Refusal::refused(CONFIRMATION, message, hint).with_details(ends));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unassigned_volume_beside_a_new_lun_raises_a_doubt() {
        let standing = |missing: &[&str], unassigned: &[&str]| Standing {
            missing: missing.iter().map(ToString::to_string).collect(),
            unassigned: unassigned.iter().map(ToString::to_string).collect(),
        };
        assert!(standing(&["new"], &[]).doubt().is_none());
        assert!(standing(&[], &["old"]).doubt().is_none());
        let doubt = standing(&["acounts"], &["accounts"]).doubt().expect("doubt");
        let text = format!("{} {}", doubt.message, doubt.hint);
        for word in [
            "acounts",
            "\"accounts\"",
            "volume rename accounts acounts",
            "config apply --yes",
        ] {
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn what_was_not_agreed_to_is_not_done() {
        let plan = ConfigPlan {
            file: "f".into(),
            changes: vec![PlannedChange {
                subject: "target".into(),
                text: "is removed".into(),
                effect: "ends".into(),
                ends_sessions: vec![SessionLabel {
                    id: 1,
                    initiator: "i".into(),
                    target: "t".into(),
                    peer: "p".into(),
                }],
            }],
            creates_volumes: vec![],
            unassigned_volumes: vec!["old".into()],
            warnings: vec![],
            unserved: vec![],
            applied: false,
        };
        let no = Agreed {
            sessions: false,
            volumes: false,
        };
        let refusal = check_agreed(&[], &plan, no).expect_err("a session ends");
        assert_eq!(
            (refusal.code.as_str(), refusal.exit, refusal.details.len()),
            (CONFIRMATION, 3, 1)
        );
        assert!(check_agreed(&[], &plan, Agreed { sessions: true, ..no }).is_ok());
        let creates = ConfigPlan {
            creates_volumes: vec!["new".into()],
            ..plan
        };
        assert!(check_agreed(&[], &creates, Agreed { sessions: true, ..no }).is_err());
        assert!(
            check_agreed(
                &[],
                &creates,
                Agreed {
                    sessions: true,
                    volumes: true
                }
            )
            .is_ok()
        );
        let refused = Change {
            subject: "lun".into(),
            text: "shrinks".into(),
            effect: Effect::Refused,
            targets: vec![],
        };
        let refusal = check_agreed(
            &[refused],
            &creates,
            Agreed {
                sessions: true,
                volumes: true,
            },
        )
        .expect_err("never");
        assert_eq!(refusal.code, "config_refused");
    }
}
