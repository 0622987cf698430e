//! `lun preflight`: what would refuse the next snapshot of a LUN, found without taking one and without freezing anything.

use std::sync::Arc;

use stillpoint_agentproto::freeze::HOLD_DEFAULT;
use stillpoint_agentproto::message::{Finding, ListVolumes, Mode, Preflight, Reply, Request, Role, Severity};
use stillpoint_agentproto::server::{LunSpec, OnFailure, Spec, Trouble, Witness, examine};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal as WireRefusal, SessionId};

use super::records::Record;
use super::site::{LunFacts, broken_limits};
use super::snapshot::{candidate, code_word, sessions};
use super::view::{PreflightAgent, PreflightFinding, PreflightSession, PreflightView};
use super::{Agents, Shared, link};
use crate::serve::control::api::Refusal;

impl Agents {
    /// `lun preflight`: every session, rule, agent, mount and application that stands in the way.
    ///
    /// # Errors
    /// No such LUN.
    pub(crate) async fn preflight(&self, name: &str, mode: Mode) -> Result<PreflightView, Refusal> {
        let unknown = || {
            Refusal::failed(
                "not_found",
                format!("there is no LUN {name}"),
                "`stillpoint lun list` shows them",
            )
        };
        let facts = self.site()?.lun(name).ok_or_else(unknown)?;
        let shared = &self.0;
        let lun = facts.identity.lun;
        let luns = [LunSpec {
            name: facts.name.clone(),
            identity: facts.identity.clone(),
        }];
        let spec = Spec {
            session: SessionId::from_random([0; 16]),
            snapshot: String::new(),
            luns: luns.to_vec(),
            mode,
            on_failure: OnFailure::Fail,
            hold: HOLD_DEFAULT,
            sessions: sessions(shared, &luns),
            refused: None,
        };
        let records = shared.records.all().into_iter();
        let asked: Vec<_> = records
            .filter(|record| record.luns.contains(&lun))
            .map(|record| tokio::spawn(ask(Arc::clone(shared), record, luns.clone(), mode)))
            .collect();
        let mut witnesses = Vec::new();
        for one in asked {
            match one.await {
                Ok(witness) => witnesses.push(witness),
                Err(error) => std::panic::resume_unwind(Box::new(error.to_string())),
            }
        }
        Ok(report(shared, &facts, &spec, witnesses))
    }
}

/// Asks one agent what a snapshot would ask it first.
async fn ask(shared: Arc<Shared>, record: Record, luns: [LunSpec; 1], mode: Mode) -> Witness {
    let mut witness = Witness::new(candidate(&record, &luns));
    if let Err(refusal) = interview(&shared, &record, &mut witness, mode).await {
        witness.failed(refusal);
    }
    witness
}

async fn interview(
    shared: &Shared,
    record: &Record,
    witness: &mut Witness,
    mode: Mode,
) -> Result<(), WireRefusal> {
    let other = || WireRefusal::new(ErrorCode::Malformed, "the answer is not the one to the request");
    let mut link = link::dial(shared, record).await?;
    let luns = witness.who().luns.clone();
    let Reply::ListVolumes(volumes) = link.ask(Request::ListVolumes(ListVolumes { luns })).await? else {
        return Err(other());
    };
    let luns = witness.saw(volumes);
    if !luns.is_empty() {
        let Reply::Preflight(found) = link.ask(Request::Preflight(Preflight { luns, mode })).await? else {
            return Err(other());
        };
        witness.found(found);
    }
    link.close().await;
    Ok(())
}

fn report(shared: &Shared, facts: &LunFacts, spec: &Spec, witnesses: Vec<Witness>) -> PreflightView {
    let lun = facts.identity.lun;
    let agents: Vec<_> = witnesses
        .iter()
        .map(|witness| agent_view(shared, witness, lun))
        .collect();
    let host_of = |id: AgentId| {
        agents
            .iter()
            .find(|agent| agent.id == id.to_string())
            .map(|agent| agent.host.clone())
    };
    let session_view = |initiator: &String| {
        let speaker = witnesses
            .iter()
            .find(|witness| witness.speaks_for(lun, initiator))
            .map(|witness| witness.who().agent);
        PreflightSession {
            initiator: initiator.clone(),
            agent: speaker.map(|id| id.to_string()),
            host: speaker.and_then(host_of),
        }
    };
    let sessions = spec
        .sessions
        .iter()
        .map(|one| session_view(&one.initiator))
        .collect();
    let own = own_troubles(shared, facts)
        .into_iter()
        .map(|finding| Trouble { agent: None, finding });
    let troubles = own.chain(examine(spec, witnesses));
    let mut findings: Vec<PreflightFinding> = Vec::new();
    for Trouble { agent, finding } in troubles {
        let finding = PreflightFinding {
            severity: finding.severity,
            code: code_word(finding.code),
            subject: Record::clip(&finding.subject),
            text: finding.text,
            agent: agent.map(|id| id.to_string()),
            host: agent.and_then(host_of),
        };
        // Two rules may see the same trouble.
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    PreflightView {
        lun: facts.name.clone(),
        naa: lun.to_string(),
        consistency: match spec.mode {
            Mode::Filesystem => "filesystem",
            Mode::Application => "application",
        }
        .to_owned(),
        ready: findings.iter().all(|finding| finding.severity != Severity::Error),
        checked_at: jiff::Timestamp::now().to_string(),
        findings,
        sessions,
        agents,
    }
}

/// What the target itself has against it: the limits, and a store that takes no snapshots.
fn own_troubles(shared: &Shared, facts: &LunFacts) -> Vec<Finding> {
    let error = |code, subject: &str, text: String| Finding {
        code,
        severity: Severity::Error,
        subject: subject.to_owned(),
        text,
    };
    let mut found: Vec<Finding> = broken_limits(facts)
        .into_iter()
        .map(|refusal| error(refusal.code, &facts.name, refusal.text))
        .collect();
    if shared.bound.get().is_none() {
        let text = "this daemon takes no agents: add [agents] to the configuration and restart it";
        found.push(error(ErrorCode::Unsupported, "agents", text.to_owned()));
    }
    if let Some(reason) = shared.pool.poisoned() {
        let text = format!("the store stopped accepting writes: {reason}; restart the daemon");
        found.push(error(ErrorCode::Internal, "store", text));
    }
    if shared.pool.stats().out_of_space {
        let text = "the store has no space: delete snapshots or give its file system more room";
        found.push(error(ErrorCode::Internal, "store", text.to_owned()));
    }
    found
}

fn agent_view(shared: &Shared, witness: &Witness, lun: LunId) -> PreflightAgent {
    let who = witness.who();
    let volumes = witness.volumes_of(lun);
    let state = shared
        .records
        .get(who.agent)
        .map(|record| shared.view(&record).state);
    PreflightAgent {
        id: who.agent.to_string(),
        host: who.host.clone(),
        version: who.version.clone(),
        state,
        reached: witness.failure().is_none(),
        role: match witness.role(lun) {
            Role::Mounted => "mounted",
            Role::Standby => "standby",
            _ => "none",
        }
        .to_owned(),
        mounts: volumes.map(|volumes| volumes.mounts.clone()).unwrap_or_default(),
        apps: volumes.map(|volumes| volumes.apps.clone()).unwrap_or_default(),
    }
}
