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
    limit(registry, session).await?;
    still_welcome(registry, session)
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

/// Whether the rules that hold now let the session in. They may have changed since its first Login Request, and whoever changed
/// them ended only the sessions that were in the table by then.
fn still_welcome(registry: &Registry, session: &Session) -> Result<(), LoginStatus> {
    let Some(target) = registry.target_by_key(session.target.key()) else {
        return Err(LoginStatus::TargetRemoved);
    };
    let rules = target.rules();
    if !rules.portal_groups.contains(&session.portal_group) {
        return Err(LoginStatus::NotFound);
    }
    if !rules.access.admits(&session.initiator, session.peer.ip()) {
        return Err(LoginStatus::AuthorizationFailure);
    }
    Ok(())
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
    old.end(reason);
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use stillpoint_config::{Access, Initiators};
    use tokio::sync::mpsc::Receiver;

    use super::super::registry::TargetRules;
    use super::super::registry::testing::{TARGET, enter, rules};
    use super::*;

    fn registry(max_sessions: u32) -> Arc<Registry> {
        let registry = Arc::new(Registry::default());
        registry.put_target(TARGET, rules(max_sessions));
        registry
    }

    /// What a session's task does: answers pings if it is `alive`, and lets go when it is ended.
    fn task(registry: &Arc<Registry>, session: &Arc<Session>, mut controls: Receiver<Control>, alive: bool) {
        let (registry, session) = (Arc::clone(registry), Arc::clone(session));
        tokio::spawn(async move {
            let mut probes = Vec::new();
            while let Some(control) = controls.recv().await {
                if session.ending().is_some() {
                    break;
                }
                match control {
                    Control::Probe(answer) if alive => drop(answer.send(())),
                    other => probes.push(other),
                }
            }
            // Its last command takes a moment.
            tokio::time::sleep(Duration::from_millis(50)).await;
            registry.leave(&session);
        });
    }

    fn login(registry: &Arc<Registry>, initiator: &str, isid: u8, alive: bool) -> Arc<Session> {
        let (session, controls) = enter(registry, initiator, isid).unwrap();
        task(registry, &session, controls, alive);
        session
    }

    #[tokio::test]
    async fn reinstatement_waits_for_the_end_of_the_old_session() {
        let registry = registry(1);
        let old = login(&registry, "a", 1, true);
        let stranger = login(&registry, "b", 1, true);
        let new = login(&registry, "a", 1, true);
        assert_eq!(admit(&registry, &new).await, Ok(()));
        assert!(old.gone.is_cancelled() && stranger.ending().is_none());
        assert_eq!(registry.sessions().len(), 2);
    }

    #[tokio::test]
    async fn many_logins_of_one_nexus_at_once_leave_the_last() {
        let registry = registry(1);
        let sessions: Vec<_> = (0..20).map(|_| login(&registry, "a", 1, true)).collect();
        let admissions: Vec<_> = sessions
            .iter()
            .rev()
            .map(|session| {
                let (registry, session) = (Arc::clone(&registry), Arc::clone(session));
                tokio::spawn(async move { admit(&registry, &session).await })
            })
            .collect();
        let started = Instant::now();
        for admission in admissions {
            admission.await.unwrap().unwrap();
        }
        assert!(
            started.elapsed() < PROBE,
            "none waits for another that waits for it"
        );
        let left = registry.sessions();
        assert_eq!(
            left.iter().map(|view| view.id).collect::<Vec<_>>(),
            [sessions[19].id]
        );
    }

    #[tokio::test]
    async fn a_second_path_is_refused_while_the_first_answers() {
        let registry = registry(1);
        let first = login(&registry, "a", 1, true);
        let second = login(&registry, "a", 2, true);
        assert_eq!(
            admit(&registry, &second).await,
            Err(LoginStatus::TooManyConnections)
        );
        assert!(first.ending().is_none());
        let other = login(&registry, "b", 2, true);
        assert_eq!(
            admit(&registry, &other).await,
            Ok(()),
            "max_sessions counts each initiator"
        );
    }

    #[tokio::test]
    async fn silent_sessions_make_room() {
        let registry = registry(2);
        let answering = login(&registry, "a", 1, true);
        let silent = login(&registry, "a", 2, false);
        let new = login(&registry, "a", 3, true);
        let started = Instant::now();
        assert_eq!(admit(&registry, &new).await, Ok(()));
        assert!(started.elapsed() >= PROBE && silent.gone.is_cancelled() && answering.ending().is_none());
    }

    #[tokio::test]
    async fn rules_that_changed_during_the_login_hold() {
        let registry = registry(1);
        let session = login(&registry, "a", 1, true);
        let closed = TargetRules {
            access: Access {
                initiators: Initiators::These(Vec::new()),
                allow_from: Vec::new(),
            },
            ..rules(1)
        };
        registry.put_target(TARGET, closed);
        assert_eq!(
            admit(&registry, &session).await,
            Err(LoginStatus::AuthorizationFailure)
        );
        registry.put_target(
            TARGET,
            TargetRules {
                portal_groups: vec![2],
                ..rules(1)
            },
        );
        assert_eq!(admit(&registry, &session).await, Err(LoginStatus::NotFound));
        registry.remove_target(TARGET, Duration::ZERO);
        assert_eq!(admit(&registry, &session).await, Err(LoginStatus::TargetRemoved));
    }
}
