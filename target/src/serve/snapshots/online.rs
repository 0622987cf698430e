//! `snapshot revert` of a LUN that hypervisors use: their hosts let it go, it is switched, they take it again (agent-protocol.md §10).
//!
//! ```text
//! preparing ──RevertReady──▶ released ──▶ switching ──▶ switched ──Reattached──▶ (no record)
//!     └────── any failure ───────┴──▶ RevertDone{failed}, until the agent answers ──▶ (no record)
//! ```
//! The record is durable before the step that its phase names, and the manifest before the LUN is switched. Whatever is cut off, a
//! later start goes on: back to the old content before `switching`, forward to the snapshot's from then on.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_agentproto::message::{
    Finding, Reattached, RevertDone, RevertHost, RevertOutcome, RevertPrepare, RevertReady, RevertState,
    RevertVm,
};
use stillpoint_agentproto::{AgentId, LunId, SessionId};

use super::revert::{Look, end_or_refuse, put_back};
use crate::serve::Daemon;
use crate::serve::agents::told;
use crate::serve::control::api::{Refusal, Revert, SnapshotRef};
use crate::serve::control::{Caller, blocking};
use crate::serve::events::{DAEMON, code};
use crate::serve::registry::LoginHold;

/// How often what is under way is looked after.
const RESUME_EVERY: Duration = Duration::from_secs(2);
/// An end that the agent did not take is tried so often before the command says so; the daemon goes on.
const TRIES: u32 = 3;
const TRY_EVERY: Duration = Duration::from_secs(1);
const PREFIX: &str = "revert/";
const MANIFEST: &str = "revert-manifest/";

/// How far a revert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Phase {
    /// The agent was asked to take the LUN from its hosts.
    Preparing,
    /// It has, and the manifest is kept.
    Released,
    /// The LUN goes back: from here on only forward.
    Switching,
    /// It has gone back.
    Switched,
}

/// A revert under way, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    session: SessionId,
    agent: AgentId,
    lun_id: LunId,
    snapshot: SnapshotRef,
    phase: Phase,
    who: String,
    /// What is said once: the last trouble.
    #[serde(default)]
    trouble: Option<String>,
}

impl Record {
    fn key(lun: &str) -> String {
        format!("{PREFIX}{lun}")
    }

    fn manifest_key(&self) -> String {
        format!("{MANIFEST}{}", self.snapshot.lun)
    }

    /// Durable when it returns. Blocks.
    fn keep(&self, daemon: &Daemon) -> Result<(), Refusal> {
        let bytes = serde_json::to_vec(self).expect("names, numbers and enums are always JSON");
        Ok(daemon
            .state
            .big_put(&Self::key(&self.snapshot.lun), Some(&bytes))?)
    }

    fn of(daemon: &Daemon, lun: &str) -> Option<Self> {
        let bytes = daemon.state.big_get(&Self::key(lun))?;
        let read = serde_json::from_slice(&bytes);
        read.inspect_err(|error| tracing::error!(lun, %error, "the record of a revert is damaged"))
            .ok()
    }

    fn forget(&self, daemon: &Daemon) -> Result<(), Refusal> {
        daemon.state.big_put(&self.manifest_key(), None)?;
        Ok(daemon.state.big_put(&Self::key(&self.snapshot.lun), None)?)
    }
}

/// Changes the phase, durably.
async fn advance(daemon: &Arc<Daemon>, record: &mut Record, phase: Phase) -> Result<(), Refusal> {
    record.phase = phase;
    let kept = record.clone();
    blocking(daemon, move |daemon| kept.keep(daemon)).await
}

/// What the operator sees of hosts, VMs and findings.
pub(super) fn seen(revert: &mut Revert, hosts: &[RevertHost], vms: &[RevertVm], findings: &[Finding]) {
    let host = |host: &RevertHost| json!({ "host": host.host, "state": host.state, "error": host.error });
    let vm = |vm: &RevertVm| {
        json!({
            "name": vm.name, "host": vm.host, "powered_on": vm.powered_on, "state": vm.state, "text": vm.text, "error": vm.error,
        })
    };
    let finding = |finding: &Finding| json!({ "severity": finding.severity, "subject": finding.subject, "text": finding.text });
    revert.hosts = hosts.iter().map(host).map(without_nulls).collect();
    revert.vms = vms.iter().map(vm).map(without_nulls).collect();
    revert.findings = findings.iter().map(finding).collect();
}

fn without_nulls(mut value: Value) -> Value {
    if let Value::Object(map) = &mut value {
        map.retain(|_, value| !value.is_null());
    }
    value
}

/// What it would do.
pub(super) async fn plan(
    daemon: &Arc<Daemon>,
    agent: AgentId,
    look: &Look,
    power_off: bool,
    mut revert: Revert,
) -> Result<Revert, Refusal> {
    let ask = ask(look, new_session()?, power_off, true);
    let (ready, _) = daemon
        .agents
        .revert_prepare(agent, ask)
        .await
        .map_err(|refusal| told(&refusal))?;
    seen(&mut revert, &ready.hosts, &ready.vms, &ready.findings);
    revert.agent = Some(daemon.agents.host_of(agent));
    Ok(revert)
}

fn new_session() -> Result<SessionId, Refusal> {
    let mut random = [0; 16];
    let filled = getrandom::fill(&mut random);
    filled.map_err(|error| {
        Refusal::failed(
            "random",
            format!("no random numbers: {error}"),
            "look at the system's log",
        )
    })?;
    Ok(SessionId::from_random(random))
}

fn ask(look: &Look, session: SessionId, power_off: bool, plan_only: bool) -> RevertPrepare {
    RevertPrepare {
        session,
        lun: look.lun_id,
        snapshot: look.snapshot.to_string(),
        taken_in: look.taken_in,
        cut_unix_ms: u64::try_from(look.created_ms).ok(),
        power_off,
        plan_only,
    }
}

/// Does it.
pub(super) async fn run(
    daemon: &Arc<Daemon>,
    agent: AgentId,
    look: Look,
    (force, power_off): (bool, bool),
    mut revert: Revert,
    caller: &Caller,
) -> Result<Revert, Refusal> {
    let _lock = daemon.agents.lock_lun(look.lun_id).await;
    finish_earlier(daemon, &look.snapshot.lun).await?;
    let mut record = Record {
        session: new_session()?,
        agent,
        lun_id: look.lun_id,
        snapshot: look.snapshot.clone(),
        phase: Phase::Preparing,
        who: caller.who.clone(),
        trouble: None,
    };
    revert.agent = Some(daemon.agents.host_of(agent));
    advance(daemon, &mut record, Phase::Preparing).await?;
    caller.progress(format!(
        "{}: the hosts let LUN {} go",
        daemon.agents.host_of(agent),
        look.snapshot.lun
    ));
    let done = match release(daemon, &mut record, &look, power_off).await {
        Ok(ready) => switch(daemon, &mut record, &ready, force, &mut revert, caller).await,
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = done
        && record.phase != Phase::Switched
    {
        return Err(give_up(daemon, &record, refusal).await);
    }
    caller.progress(format!(
        "{}: the hosts take LUN {} again",
        daemon.agents.host_of(agent),
        look.snapshot.lun
    ));
    let reattached = end_with_patience(daemon, &record).await?;
    seen(
        &mut revert,
        &reattached.hosts,
        &reattached.vms,
        &reattached.findings,
    );
    revert.reverted = true;
    Ok(revert)
}

/// RevertPrepare, and the manifest is kept.
async fn release(
    daemon: &Arc<Daemon>,
    record: &mut Record,
    look: &Look,
    power_off: bool,
) -> Result<RevertReady, Refusal> {
    let ask = ask(look, record.session, power_off, false);
    let (ready, manifest) = daemon
        .agents
        .revert_prepare(record.agent, ask)
        .await
        .map_err(|refusal| told(&refusal))?;
    let manifest = manifest.ok_or_else(|| {
        Refusal::failed(
            "manifest",
            "the agent sent no manifest of what it took apart",
            "see the agent's log",
        )
    })?;
    let key = record.manifest_key();
    blocking(daemon, move |daemon| {
        Ok(daemon.state.big_put(&key, Some(&manifest))?)
    })
    .await?;
    advance(daemon, record, Phase::Released).await?;
    Ok(ready)
}

/// The LUN goes back.
async fn switch(
    daemon: &Arc<Daemon>,
    record: &mut Record,
    ready: &RevertReady,
    force: bool,
    revert: &mut Revert,
    caller: &Caller,
) -> Result<(), Refusal> {
    let lun = record.snapshot.lun.clone();
    let _changing = daemon.state.changing().await;
    let targets = daemon.registry.targets_of(&lun);
    let _held = LoginHold::new(daemon, targets.iter().map(|target| target.iqn().to_owned()));
    // ESXi stays logged in, with the device detached.
    let detached: Vec<&String> = ready.hosts.iter().flat_map(|host| &host.initiators).collect();
    end_or_refuse(daemon, &lun, &detached, force, revert, caller).await?;
    advance(daemon, record, Phase::Switching).await?;
    if let Some(lun) = daemon.registry.lun(&lun) {
        lun.drain().await;
    }
    revert.automatic_snapshot = Some(go_on_switching(daemon, record).await?);
    Ok(())
}

/// The LUN goes back, however far it was.
async fn go_on_switching(daemon: &Arc<Daemon>, record: &mut Record) -> Result<String, Refusal> {
    let work = record.clone();
    let automatic = blocking(daemon, move |daemon| {
        put_back(daemon, &work.snapshot, Some(work.session), &work.who)
    })
    .await?;
    advance(daemon, record, Phase::Switched).await?;
    let text = format!(
        "reverted to {} while its hosts run; what it held until now is in {}@{automatic}",
        record.snapshot, record.snapshot.lun
    );
    let subject = format!("lun {}", record.snapshot.lun);
    daemon.events.emit(code::LUN_REVERTED, subject, text, &record.who);
    Ok(automatic)
}

/// Tells the agent how it ended, and forgets the revert when all is back.
async fn end(daemon: &Arc<Daemon>, record: &Record) -> Result<Reattached, Refusal> {
    let outcome = match record.phase {
        Phase::Preparing | Phase::Released => RevertOutcome::Failed,
        Phase::Switching | Phase::Switched => RevertOutcome::Reverted,
    };
    let key = record.manifest_key();
    let manifest = blocking(daemon, move |daemon| Ok(daemon.state.big_get(&key))).await?;
    let ask = RevertDone {
        session: record.session,
        lun: record.lun_id,
        outcome,
        manifest: None,
    };
    let reattached = daemon
        .agents
        .revert_done(record.agent, ask, manifest.as_deref())
        .await;
    let reattached = reattached.map_err(|refusal| told(&refusal))?;
    let hosts = reattached
        .hosts
        .iter()
        .filter(|host| host.state == RevertState::Failed)
        .map(|host| (&host.host, &host.error));
    let vms = reattached
        .vms
        .iter()
        .filter(|vm| vm.state == RevertState::Failed)
        .map(|vm| (&vm.name, &vm.error));
    let left: Vec<String> = hosts
        .chain(vms)
        .map(|(name, error)| format!("{name}: {}", error.as_deref().unwrap_or("no reason given")))
        .collect();
    if !left.is_empty() {
        return Err(Refusal::failed(
            "not_reattached",
            format!(
                "not everything of LUN {} is back: {}",
                record.snapshot.lun,
                left.join("; ")
            ),
            "mend it there; the daemon goes on trying, `stillpoint events` tells when it is done",
        ));
    }
    let forget = record.clone();
    blocking(daemon, move |daemon| forget.forget(daemon)).await?;
    Ok(reattached)
}

async fn end_with_patience(daemon: &Arc<Daemon>, record: &Record) -> Result<Reattached, Refusal> {
    let mut tries = 1;
    loop {
        match end(daemon, record).await {
            Err(refusal) if tries < TRIES => {
                tracing::debug!(lun = record.snapshot.lun, %refusal, "tried again");
                tokio::time::sleep(TRY_EVERY * tries).await;
                tries += 1;
            }
            result => return result,
        }
    }
}

/// The LUN keeps its content, and its hosts get it back.
async fn give_up(daemon: &Arc<Daemon>, record: &Record, why: Refusal) -> Refusal {
    if record.phase == Phase::Switching {
        // The store did not do it. The hosts must not see a LUN that may still change: the watch goes on.
        let text = format!(
            "{}; the revert goes on as soon as the store works again",
            why.message
        );
        return Refusal { message: text, ..why };
    }
    match end_with_patience(daemon, record).await {
        Ok(_) => why,
        Err(error) => {
            let text = format!(
                "{}; the hosts do not have LUN {} back yet: {}",
                why.message, record.snapshot.lun, error.message
            );
            Refusal {
                message: text,
                exit: crate::serve::control::api::EXIT_FAILED,
                ..why
            }
        }
    }
}

/// An earlier revert of the LUN that was cut off comes to its end first.
async fn finish_earlier(daemon: &Arc<Daemon>, lun: &str) -> Result<(), Refusal> {
    let name = lun.to_owned();
    let Some(record) = blocking(daemon, move |daemon| Ok(Record::of(daemon, &name))).await? else {
        return Ok(());
    };
    resume(daemon, record).await.map_err(|refusal| {
        let text = format!(
            "an earlier revert of LUN {lun} has not come to its end: {}",
            refusal.message
        );
        Refusal {
            message: text,
            ..refusal
        }
    })
}

async fn resume(daemon: &Arc<Daemon>, mut record: Record) -> Result<(), Refusal> {
    if record.phase == Phase::Switching {
        let _changing = daemon.state.changing().await;
        go_on_switching(daemon, &mut record).await?;
    }
    let reattached = end(daemon, &record).await;
    let subject = format!("lun {}", record.snapshot.lun);
    match reattached {
        Ok(_) => {
            let what = if record.phase == Phase::Switched {
                "is back at the snapshot"
            } else {
                "keeps what it held"
            };
            let text = format!(
                "the revert to {} that was cut off is over: the LUN {what}, its hosts have it again",
                record.snapshot
            );
            daemon.events.emit(code::REVERT_ENDED, subject, text, DAEMON);
            Ok(())
        }
        Err(refusal) => {
            // Said when it changes, not each time.
            if record.trouble.as_deref() != Some(refusal.message.as_str()) {
                let text = format!(
                    "the revert to {} is not over: {}",
                    record.snapshot, refusal.message
                );
                daemon.events.emit(code::REVERT_STUCK, subject, text, DAEMON);
                record.trouble = Some(refusal.message.clone());
                let kept = record.clone();
                blocking(daemon, move |daemon| kept.keep(daemon)).await?;
            }
            Err(refusal)
        }
    }
}

/// Looks after reverts that were cut off, until the daemon stops: what is cut off then, the next start goes on with.
pub(crate) async fn watch(daemon: Arc<Daemon>) {
    let looking = async {
        loop {
            let luns = blocking(&daemon, |daemon| Ok(daemon.state.luns_of_values(PREFIX))).await;
            for lun in luns.unwrap_or_default() {
                look_after(&daemon, &lun).await;
            }
            tokio::time::sleep(RESUME_EVERY).await;
        }
    };
    tokio::select! {
        () = looking => {}
        () = daemon.shutdown.cancelled() => {}
    }
}

async fn look_after(daemon: &Arc<Daemon>, lun: &str) {
    let Some(first) = Record::of(daemon, lun) else {
        return;
    };
    // A command that carries it out holds the lock.
    let _lock = daemon.agents.lock_lun(first.lun_id).await;
    let Some(record) = Record::of(daemon, lun).filter(|record| record.session == first.session) else {
        return;
    };
    if let Err(refusal) = resume(daemon, record).await {
        tracing::debug!(lun, %refusal, "a revert is not over");
    }
}
