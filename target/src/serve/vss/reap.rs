//! What agents forget: reservations that nobody committed, copies that nobody uses.

use std::sync::Arc;
use std::time::Duration;

use super::record::{Copy, SetRecord, SetState};
use super::{BEGUN_MAX_MS, copies, lock, now_ms};
use crate::serve::Daemon;
use crate::serve::events::{DAEMON, code};

/// How often to look.
const EVERY: Duration = Duration::from_secs(60);
/// A copy goes after this long without a session that sees it and without I/O.
const IDLE_MS: i64 = 24 * 3600 * 1000;

/// How a copy was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Use {
    /// A session sees it.
    session: bool,
    /// Commands since its LUN was made.
    commands: u64,
}

/// What is to be done about a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    /// A host has it and does nothing with it: the operator is told, once.
    Warn,
    Delete,
}

/// Judges one copy at `now_ms`. A host that is logged in keeps it, used or not: deleting a disk below a mounted file system would be
/// worse than the space that it holds, and the quotas bound that.
fn judge(copy: &mut Copy, used: Use, now_ms: i64) -> Due {
    if used.commands != copy.commands {
        copy.commands = used.commands;
        copy.used_ms = now_ms;
        copy.warned = false;
    }
    let idle_since = |then: i64| now_ms.saturating_sub(then) >= IDLE_MS;
    if used.session {
        copy.seen_ms = now_ms;
        if idle_since(copy.used_ms) && !copy.warned {
            copy.warned = true;
            return Due::Warn;
        }
        return Due::Nothing;
    }
    if idle_since(copy.used_ms.max(copy.seen_ms)) {
        return Due::Delete;
    }
    Due::Nothing
}

/// Looks after the sets until the daemon stops.
pub(crate) async fn watch(daemon: Arc<Daemon>) {
    let mut every = tokio::time::interval(EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = daemon.shutdown.cancelled() => return,
        }
        let looking = Arc::clone(&daemon);
        let looked = tokio::task::spawn_blocking(move || look(&looking, now_ms())).await;
        if let Err(error) = looked {
            tracing::error!(%error, "the VSS sets could not be looked after");
        }
    }
}

/// One look. Blocks.
pub(super) fn look(daemon: &Arc<Daemon>, now_ms: i64) {
    for shared in daemon.vss.all() {
        let mut set = lock(&shared);
        match set.state {
            SetState::Gone => {}
            SetState::Begun if now_ms.saturating_sub(set.begun_ms) >= i64::from(BEGUN_MAX_MS) => {
                give_up(daemon, &mut set, None, "it was never committed");
            }
            SetState::Begun => {}
            SetState::Taken => look_at(daemon, &mut set, now_ms),
        }
    }
}

fn look_at(daemon: &Arc<Daemon>, set: &mut SetRecord, now_ms: i64) {
    let mut due = Vec::new();
    for copy in &mut set.copies {
        let used = Use {
            session: !daemon.registry.sessions_of_lun(&copy.name).is_empty(),
            commands: daemon
                .registry
                .lun(&copy.name)
                .map_or(0, |lun| lun.figures().commands),
        };
        due.push((copy.name.clone(), judge(copy, used, now_ms)));
    }
    for (name, due) in due {
        match due {
            Due::Nothing => {}
            Due::Warn => {
                let text = format!(
                    "no I/O for 24 h: was it left behind by the backup on {}? `stillpoint volume delete {name} --yes` takes it away from that host",
                    set.host
                );
                daemon
                    .events
                    .emit(code::VSS_ABANDONED, format!("lun {name}"), text, DAEMON);
            }
            Due::Delete => {
                let Some(copy) = set.copies.iter_mut().find(|copy| copy.name == name) else {
                    continue;
                };
                copy.shadows.truncate(1);
                let shadow = copy.shadows.first().copied();
                if shadow.is_some() {
                    give_up(daemon, set, shadow, "no session and no I/O for 24 h");
                }
            }
        }
    }
}

fn give_up(
    daemon: &Arc<Daemon>,
    set: &mut SetRecord,
    shadow: Option<stillpoint_agentproto::ShadowId>,
    why: &str,
) {
    let subject = format!("vss set {}", set.set);
    let text = format!("left behind by the agent on {}, deleted: {why}", set.host);
    match copies::delete(daemon, set, shadow, why) {
        Ok(_) => daemon.events.emit(code::VSS_ABANDONED, subject, text, DAEMON),
        Err(refusal) => daemon
            .events
            .emit(code::VSS_TROUBLE, subject, refusal.text, DAEMON),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stillpoint_agentproto::LunId;
    use stillpoint_snapshot::VolumeId;

    use crate::serve::state::Identity;

    const HOUR_MS: i64 = 3_600_000;

    fn copy() -> Copy {
        let identity = Identity {
            naa: [6; 16],
            serial: "S".into(),
        };
        let source = (LunId([5; 16]), "sql01".to_owned(), VolumeId(1));
        Copy::new(
            source,
            "iqn.t".into(),
            "vss-1".into(),
            identity,
            (1 << 20, 512),
            0,
        )
    }

    #[test]
    fn a_copy_goes_after_a_day_without_session_and_io() {
        let mut copy = copy();
        let alone = |commands| Use {
            session: false,
            commands,
        };
        let seen = |commands| Use {
            session: true,
            commands,
        };
        assert_eq!(judge(&mut copy, alone(0), 24 * HOUR_MS - 1), Due::Nothing);
        // I/O begins the day anew.
        assert_eq!(judge(&mut copy, alone(1), 24 * HOUR_MS), Due::Nothing);
        assert_eq!(judge(&mut copy, alone(1), 48 * HOUR_MS - 1), Due::Nothing);
        // A host that has it keeps it; the operator hears of it once.
        assert_eq!(judge(&mut copy, seen(1), 48 * HOUR_MS), Due::Warn);
        assert_eq!(judge(&mut copy, seen(1), 49 * HOUR_MS), Due::Nothing);
        assert_eq!(judge(&mut copy, seen(2), 50 * HOUR_MS), Due::Nothing);
        assert_eq!(judge(&mut copy, seen(2), 74 * HOUR_MS), Due::Warn);
        // From when the host went, not from its last I/O.
        assert_eq!(judge(&mut copy, alone(2), 98 * HOUR_MS - 1), Due::Nothing);
        // A clock that was set back deletes nothing.
        assert_eq!(judge(&mut copy, alone(2), 0), Due::Nothing);
        assert_eq!(judge(&mut copy, alone(2), 98 * HOUR_MS), Due::Delete);
    }
}
