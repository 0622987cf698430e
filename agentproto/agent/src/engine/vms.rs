//! VMs of a vCenter in the sessions of an engine: what a VM snapshot holds needs no freezing, so it goes beside the file systems.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillpoint_agentproto::client::{Asked, FreezeReport, ThawReport};
use stillpoint_agentproto::message::{
    AppState, LunVolumes, PreflightReport, Prepare, Prepared, Reply, Request, Volumes,
};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal, SessionId};

use super::{Engine, lock};
use crate::plan::Plan;
use crate::vcenter;

impl Engine {
    /// The LUNs of which the vCenter speaks, and the rest.
    fn split(&self, luns: &[LunId]) -> (Vec<LunId>, Vec<LunId>) {
        luns.iter().partition(|lun| self.shared.vcenter.owns(**lun))
    }

    /// Answers ListVolumes.
    pub(super) async fn volumes(self: Arc<Self>, asked: Asked, luns: Vec<LunId>) {
        self.await_grants(&luns).await;
        let result = self.look_at(luns).await;
        self.feed(|agent| agent.answer(asked, result));
    }

    async fn look_at(self: &Arc<Self>, luns: Vec<LunId>) -> Result<Reply, Refusal> {
        let granted = self.granted().unwrap_or_default();
        let luns: Vec<LunId> = luns.into_iter().filter(|lun| granted.contains(lun)).collect();
        let datastores = self.datastores(&luns).await?;
        let engine = Arc::clone(self);
        let listed = tokio::task::spawn_blocking(move || engine.list(&luns)).await;
        let listed = listed.map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))?;
        let Reply::ListVolumes(mut volumes) = listed? else {
            return Err(Refusal::new(ErrorCode::Internal, "no list of volumes"));
        };
        merge(&mut volumes, datastores);
        volumes.initiators.extend(self.shared.vcenter.initiators());
        volumes.initiators.truncate(crate::host::INITIATORS_MAX);
        Ok(Reply::ListVolumes(volumes))
    }

    /// A vCenter that does not answer is no reason to be silent about the host's own LUNs, but about its datastores it is.
    async fn datastores(&self, luns: &[LunId]) -> Result<Vec<LunVolumes>, Refusal> {
        let vcenter = &self.shared.vcenter;
        if !vcenter.is_set() {
            return Ok(Vec::new());
        }
        match vcenter.list(luns).await {
            Err(refusal) if !luns.iter().any(|lun| vcenter.owns(*lun)) => {
                tracing::warn!("the vCenter: {refusal}");
                Ok(Vec::new())
            }
            result => result,
        }
    }

    /// Answers Preflight.
    pub(super) async fn findings(
        self: Arc<Self>,
        asked: Asked,
        luns: Vec<LunId>,
        mode: stillpoint_agentproto::message::Mode,
    ) {
        self.await_grants(&luns).await;
        let (datastores, own) = self.split(&luns);
        let mut findings = Vec::new();
        if !datastores.is_empty() {
            findings.extend(self.shared.vcenter.preflight(&datastores).await);
        }
        if !own.is_empty() {
            let engine = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || engine.survey(&own, mode).findings()).await;
            findings.extend(looked.unwrap_or_default());
        }
        // A list of a message has 256 entries; the gravest come first.
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity as u8));
        findings.truncate(256);
        self.feed(|agent| agent.answer(asked, Ok(Reply::Preflight(PreflightReport { findings }))));
    }

    /// Carries out Prepare.
    pub(super) async fn prepare_all(self: Arc<Self>, prepare: Prepare) {
        let session = prepare.session;
        self.await_grants(&prepare.luns).await;
        let result = self.plan_all(&prepare).await;
        self.feed(|agent| agent.prepared(Instant::now(), session, result));
    }

    async fn plan_all(self: &Arc<Self>, prepare: &Prepare) -> Result<Prepared, Refusal> {
        let session = prepare.session;
        let (datastores, own) = self.split(&prepare.luns);
        let plan = if own.is_empty() {
            Plan::nothing()
        } else {
            let (engine, mode) = (Arc::clone(self), prepare.mode);
            let surveyed = tokio::task::spawn_blocking(move || engine.survey(&own, mode)).await;
            let surveyed = surveyed.map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))?;
            surveyed.plan(prepare.require)?
        };
        let mut prepared = Prepared {
            apps: plan.apps(),
            exclusions: plan.exclusions.clone(),
        };
        let mut vms = None;
        if !datastores.is_empty() {
            let granted = self.granted().unwrap_or_default();
            if let Some(foreign) = datastores.iter().find(|lun| !granted.contains(lun)) {
                let text = format!(
                    "this agent has no right to {foreign}: `stillpoint agent allow` on the target gives it"
                );
                return Err(Refusal::new(ErrorCode::NotAllowed, text));
            }
            let made = self
                .shared
                .vcenter
                .prepare(session, &datastores, prepare.require)
                .await?;
            prepared.apps.extend(made.apps.iter().cloned());
            prepared.exclusions.extend(made.exclusions.iter().cloned());
            vms = Some(made);
        }
        if let Some(live) = lock(&self.sessions).get_mut(&session) {
            live.plan = Some(plan);
            live.vms = vms;
        }
        Ok(prepared)
    }

    /// Freezes a session that has VMs only: they are held by their snapshots already. `false`: there is more to freeze.
    pub(super) fn freeze_vms(&self, session: SessionId) -> bool {
        let report = {
            let mut sessions = lock(&self.sessions);
            let Some(live) = sessions.get_mut(&session) else {
                return false;
            };
            match (&live.vms, &live.plan) {
                (Some(vms), Some(plan)) if plan.is_nothing() => {
                    live.vms_held = true;
                    FreezeReport {
                        volumes: vms.volumes.clone(),
                        apps: vms.apps_in(AppState::Frozen),
                    }
                }
                _ => return false,
            }
        };
        self.feed(|agent| {
            if agent.hold_started(Instant::now(), session).is_some() {
                agent.frozen(Instant::now(), session, Ok(report));
            }
        });
        true
    }

    /// Ends the hold of a session that has VMs only. `false`: there is something to thaw.
    pub(super) fn thaw_vms(&self, session: SessionId, released: bool) -> bool {
        let report = {
            let mut sessions = lock(&self.sessions);
            let Some(live) = sessions.get_mut(&session) else {
                return false;
            };
            let held = std::mem::take(&mut live.vms_held);
            let Some(vms) = live.vms.as_ref().filter(|_| held) else {
                return false;
            };
            ThawReport {
                in_force: released,
                apps: vms.apps_in(AppState::Thawed),
                reason: (!released).then(|| "the hold was ended before its release".to_owned()),
                held: None,
                documents: vms.documents(),
            }
        };
        self.feed(|agent| agent.thawed(Instant::now(), session, report));
        true
    }

    /// The VMs of a session that also freezes file systems.
    pub(super) fn vms_of(&self, session: SessionId) -> Option<vcenter::Prepared> {
        lock(&self.sessions)
            .get(&session)
            .and_then(|live| live.vms.clone())
    }

    /// Removes what Prepare made at the vCenter.
    pub(super) async fn clean_vms(self: Arc<Self>, session: SessionId) {
        let left = self.shared.vcenter.clean(session).await;
        lock(&self.sessions).remove(&session);
        self.feed(|agent| agent.cleaned(Instant::now(), session, left));
    }

    /// A revert, or a piece of a document.
    pub(super) async fn other(self: Arc<Self>, asked: Asked, request: Request) {
        let vcenter = Arc::clone(&self.shared.vcenter);
        let lun = match &request {
            Request::RevertPrepare(ask) => Some(ask.lun),
            Request::RevertDone(ask) => Some(ask.lun),
            _ => None,
        };
        if let Some(lun) = lun {
            self.await_grants(&[lun]).await;
            if !self.granted().unwrap_or_default().contains(&lun) {
                let text = format!(
                    "this agent has no right to {lun}: `stillpoint agent allow` on the target gives it"
                );
                return self
                    .feed(|agent| agent.answer(asked, Err(Refusal::new(ErrorCode::NotAllowed, text))));
            }
        }
        let result = match request {
            Request::RevertPrepare(ask) => vcenter.revert_prepare(ask).await.map(Reply::RevertPrepare),
            Request::RevertDone(ask) => vcenter.revert_done(ask).await.map(Reply::RevertDone),
            Request::FetchBlob(ask) => vcenter.fetch(&ask).map(Reply::FetchBlob),
            Request::Blob(piece) => vcenter.take_piece(&piece).map(Reply::Blob),
            other => {
                let text = format!("this agent does not serve message {}", other.message_type().0);
                Err(Refusal::new(ErrorCode::Unsupported, text))
            }
        };
        self.feed(|agent| agent.answer(asked, result));
    }
}

/// What the vCenter says of a LUN counts more than what this host sees of it.
fn merge(volumes: &mut Volumes, datastores: Vec<LunVolumes>) {
    let mut told: HashMap<LunId, LunVolumes> = datastores
        .into_iter()
        .map(|one| (one.identity.lun, one))
        .collect();
    for own in &mut volumes.luns {
        // A host that has mounted it as well has a file system of its own to freeze: both are told.
        if let Some(datastore) = told.remove(&own.identity.lun) {
            let mut datastore = datastore;
            datastore.mounts.append(&mut own.mounts);
            datastore.apps.append(&mut own.apps);
            datastore.identity = own.identity.clone();
            *own = datastore;
        }
    }
    volumes.luns.extend(told.into_values());
}

/// Between Prepare and Freeze VM snapshots of a large datastore take long (agent-protocol.md §6).
pub(super) fn idle(vcenter: &vcenter::Vcenter) -> Duration {
    if vcenter.is_set() {
        stillpoint_agentproto::freeze::PREPARED_IDLE_VMWARE
    } else {
        stillpoint_agentproto::freeze::PREPARED_IDLE
    }
}
