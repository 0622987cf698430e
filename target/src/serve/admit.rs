//! Who may log in, and what becomes of the sessions that were there before.

use std::sync::Arc;
use std::time::Duration;

use stillpoint_iscsi::LoginStatus;

use super::registry::{Control, Registry, Session};

/// How long a session that a new login would replace has to answer a ping before it counts as dead. A host that rebooted, or
/// iPXE handing over to the system that it booted, does not answer; a second path of a living host does.
const PROBE: Duration = Duration::from_secs(2);

/// How long the old session's running commands may hold up the login that replaces it. Windows logs in again 20 s after its
/// LUN RESET: by then something must have been said.
const REPLACE: Duration = Duration::from_secs(10);

/// Decides on a login whose session is already entered in the registry. Returns once nothing of a session that it replaces can
/// reach the medium any more: otherwise a stale write could land after a new one (RFC 7143 §6.3.5).
///
/// # Errors
/// The status for the initiator, when it may not log in.
pub(crate) async fn admit(registry: &Registry, session: &Session) -> Result<(), LoginStatus> {
    let same_nexus = registry.sessions_with(|other| {
        other.id < session.id
            && other.is_nexus(
                &session.initiator,
                session.isid,
                session.target.key(),
                session.portal_group,
            )
    });
    for old in same_nexus {
        tracing::info!(session = old.id, by = session.id, initiator = %old.initiator, "session reinstated by a new login");
        end(&old, "reinstated by a new login").await?;
    }
    limit(registry, session).await
}

/// Keeps one initiator to `max_sessions` of the target: pings the older ones, replaces those that do not answer.
async fn limit(registry: &Registry, session: &Session) -> Result<(), LoginStatus> {
    let rules = session.target.rules();
    let others = registry.sessions_with(|other| {
        other.id < session.id
            && other.initiator == session.initiator
            && other.target.key() == session.target.key()
    });
    let allowed = usize::try_from(rules.max_sessions.max(1)).unwrap_or(usize::MAX);
    let mut over = (others.len() + 1).saturating_sub(allowed);
    for old in others {
        if over == 0 {
            break;
        }
        if answers(&old).await {
            continue;
        }
        tracing::info!(session = old.id, by = session.id, initiator = %old.initiator, "silent session replaced");
        end(&old, "did not answer a ping while its initiator logged in anew").await?;
        over -= 1;
    }
    if over == 0 {
        return Ok(());
    }
    let why = if rules.agents {
        "a LUN that is used with snapshot agents has one path: switch MPIO off for it, or remove `agents = true` from its target"
    } else {
        "the initiator has as many sessions as `max_sessions` of the target allows"
    };
    tracing::warn!(
        initiator = %session.initiator, target = %session.target.iqn(), peer = %session.peer, limit = rules.max_sessions,
        "login refused: {why}"
    );
    Err(LoginStatus::TooManyConnections)
}

/// Whether the session's initiator answers a ping.
async fn answers(session: &Arc<Session>) -> bool {
    let (answered, answer) = tokio::sync::oneshot::channel();
    session.tell(Control::Probe(answered));
    tokio::select! {
        answer = tokio::time::timeout(PROBE, answer) => matches!(answer, Ok(Ok(()))),
        () = session.gone.cancelled() => false,
    }
}

/// Ends a session and waits until nothing of it runs any more.
async fn end(old: &Arc<Session>, reason: &str) -> Result<(), LoginStatus> {
    old.tell(Control::Drop {
        reason: reason.to_owned(),
    });
    tokio::time::timeout(REPLACE, old.gone.cancelled())
        .await
        .map_err(|_| {
            tracing::error!(
                session = old.id,
                "commands of the old session still run: the new login is put off"
            );
            LoginStatus::ServiceUnavailable
        })
}
