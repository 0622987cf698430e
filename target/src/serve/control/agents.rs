//! `agent …`: the coordinator does the work, this hands it on.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::api::{Refusal, Request};
use super::verbs::answer;
use super::{Caller, blocking};
use crate::serve::Daemon;
use crate::serve::agents::MAX_TTL;

pub(super) async fn run(daemon: &Arc<Daemon>, request: Request, caller: &Caller) -> Result<Value, Refusal> {
    let who = caller.who.clone();
    match request {
        Request::AgentTokenCreate { luns, ttl_seconds } => {
            let ttl = Duration::from_secs(ttl_seconds);
            if ttl.is_zero() || ttl > MAX_TTL {
                return Err(Refusal::refused(
                    "limit",
                    "a token lives from one second to 7 days",
                    "choose another --ttl",
                ));
            }
            for lun in &luns {
                check_lun(daemon, lun)?;
            }
            answer(&blocking(daemon, move |daemon| daemon.agents.token_create(&luns, ttl, &who)).await?)
        }
        Request::AgentList {} => answer(&daemon.agents.list()),
        Request::AgentShow { id } => answer(&daemon.agents.show(&id)?),
        Request::AgentTest { id } => answer(&daemon.agents.test(&id).await?),
        Request::AgentAllow { id, lun } => {
            check_lun(daemon, &lun)?;
            answer(&daemon.agents.allow(&id, &lun, &who).await?)
        }
        Request::AgentApprove { id } => answer(&daemon.agents.approve(&id, &who).await?),
        Request::AgentRevoke { id } => answer(&daemon.agents.revoke(&id, &who).await?),
        Request::AgentGenerationBump {} => {
            let generation = daemon.agents.generation_bump(&who).await?;
            Ok(super::api::done([("generation", generation.into())]))
        }
        other => Err(Refusal::usage(
            "bad_request",
            format!("{other:?} is not about agents"),
            "report this",
        )),
    }
}

/// The limits of a LUN with agents, named before anything is made (agent-protocol.md §8).
pub(crate) fn check_lun(daemon: &Daemon, lun: &str) -> Result<(), Refusal> {
    let config = daemon.config();
    if config.lun(lun).is_none() {
        return Err(super::luns::unknown(daemon, lun));
    }
    let mut targets = config.targets_of(lun);
    let Some(target) = targets.next() else {
        return Err(Refusal::refused(
            "no_agents",
            format!("no target serves LUN {lun:?}, so no agent can use it"),
            "add a `[[target]]` with `agents = true` for it",
        ));
    };
    if !target.has_agents() {
        return Err(Refusal::refused(
            "no_agents",
            format!(
                "target {} of LUN {lun:?} does not have `agents = true`",
                target.iqn
            ),
            "set it (then no CHAP, one LUN, one path) and `stillpoint config apply`",
        ));
    }
    Ok(())
}
