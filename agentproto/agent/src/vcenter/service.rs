//! What the engine asks of the vCenter: which LUNs are datastores, VM snapshots for a session, the two halves of a revert.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stillpoint_agentproto::message::{
    App, AppState, BlobKind, Document, Exclusion, ExclusionKind, Finding, FrozenVolume, LunIdentity,
    LunVolumes, Mount, Require, Role, Severity,
};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal, SessionId};

use super::inventory::{self, Datastore, Machine, View};
use super::rules::{self, Obstacle};
use super::settings::{Settings, VmMode};
use super::snapshots::{self, Journal, PREFIX, Wanted};
use super::soap::{Ref, Soap, SoapError};

/// How often the vCenter is asked which LUNs are mounted where.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(30);
/// VM snapshots of ours that are older are told about.
const LEFTOVER_AGE_H: i64 = 24;

/// The vCenter of this agent.
pub(crate) struct Vcenter {
    state_dir: PathBuf,
    /// As last seen. While the vCenter does not answer, it stays: an agent is required until it says otherwise.
    known: Mutex<BTreeMap<LunId, Known>>,
    /// Sessions with VM snapshots. The lock is held while they are made or removed.
    live: Mutex<HashMap<SessionId, Arc<tokio::sync::Mutex<()>>>>,
    /// The list of VMs of each live session.
    records: Mutex<HashMap<SessionId, Vec<u8>>>,
    pub(super) reverts: super::revert_service::Reverts,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    mounted: bool,
    initiators: Vec<String>,
}

/// What Prepare made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Prepared {
    /// Each VM that takes part, ready.
    pub(crate) apps: Vec<App>,
    /// Each that does not.
    pub(crate) exclusions: Vec<Exclusion>,
    /// Each datastore, as Frozen will tell it.
    pub(crate) volumes: Vec<FrozenVolume>,
    /// The list of VMs, for the snapshot's record.
    record: Option<Document>,
}

impl Prepared {
    /// The VMs in another state: what a VM snapshot holds needs no freezing any more.
    pub(crate) fn apps_in(&self, state: AppState) -> Vec<App> {
        let in_state = |app: &App| App { state, ..app.clone() };
        self.apps.iter().map(in_state).collect()
    }

    /// What the target should fetch.
    pub(crate) fn documents(&self) -> Vec<Document> {
        self.record.iter().cloned().collect()
    }
}

impl Vcenter {
    /// Of this agent.
    pub(crate) fn new(state_dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            state_dir: state_dir.to_owned(),
            known: Mutex::default(),
            live: Mutex::default(),
            records: Mutex::default(),
            reverts: super::revert_service::Reverts::default(),
        })
    }

    /// Was it set?
    pub(crate) fn is_set(&self) -> bool {
        Settings::path(&self.state_dir).exists()
    }

    /// Is this LUN a datastore, as far as is known?
    pub(crate) fn owns(&self, lun: LunId) -> bool {
        lock(&self.known).contains_key(&lun)
    }

    /// The LUNs that hosts have mounted.
    pub(crate) fn mounted(&self, of: &[LunId]) -> Vec<LunId> {
        let known = lock(&self.known);
        let mounted = |lun: &LunId| known.get(lun).is_some_and(|known| known.mounted);
        of.iter().copied().filter(mounted).collect()
    }

    /// The hosts' iSCSI names.
    pub(crate) fn initiators(&self) -> Vec<String> {
        let known = lock(&self.known);
        let names: BTreeSet<String> = known
            .values()
            .flat_map(|known| known.initiators.clone())
            .collect();
        names.into_iter().collect()
    }

    pub(super) fn dir(&self) -> PathBuf {
        Settings::dir(&self.state_dir)
    }

    /// The settings and a session.
    pub(super) async fn session(&self) -> Result<(Settings, Soap), Refusal> {
        let settings = Settings::load(&self.state_dir)
            .map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))?;
        let Some(settings) = settings else {
            let text = "no vCenter is set: run `stillpoint-agent vcenter set`";
            return Err(Refusal::new(ErrorCode::Unsupported, text));
        };
        let soap = Soap::login(settings.access.clone())
            .await
            .map_err(|error| refusal(&error))?;
        Ok((settings, soap))
    }

    /// Looks for ever: which LUNs are datastores, and what a crash left behind.
    pub(crate) async fn watch(self: Arc<Self>) {
        loop {
            if self.is_set() {
                self.look().await;
            } else {
                lock(&self.known).clear();
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self) {
        let result = async {
            let (_, mut soap) = self.session().await?;
            self.sweep(&mut soap).await;
            let seen = self.see(&mut soap).await;
            soap.logout().await;
            seen.map_err(|error| refusal(&error))
        };
        if let Err(refusal) = result.await {
            tracing::warn!("the vCenter: {refusal}");
        }
    }

    /// Asks which datastores there are, and remembers it.
    pub(super) async fn see(&self, soap: &mut Soap) -> Result<Vec<Datastore>, SoapError> {
        let found = inventory::datastores(soap).await?;
        let mut known = BTreeMap::new();
        for datastore in &found {
            for (lun, naa) in luns_of(datastore) {
                let hosts = inventory::hosts(soap, &datastore.hosts, &naa).await?;
                known.insert(
                    lun,
                    Known {
                        mounted: !datastore.mounted.is_empty(),
                        initiators: hosts.into_iter().flat_map(|host| host.initiators).collect(),
                    },
                );
            }
        }
        *lock(&self.known) = known;
        Ok(found)
    }

    /// Removes what sessions that are over left behind.
    async fn sweep(&self, soap: &mut Soap) {
        for journal in Journal::all(&self.dir()) {
            let live = journal
                .session
                .parse()
                .is_ok_and(|session: SessionId| lock(&self.live).contains_key(&session));
            if live {
                continue;
            }
            let session = journal.session.clone();
            match snapshots::remove(soap, journal).await {
                Ok(()) => tracing::warn!(session, "VM snapshots of a session that was cut off are removed"),
                Err(error) => tracing::error!(session, "{error}"),
            }
        }
    }

    /// What is on these LUNs; a LUN that is no datastore is not in the answer.
    pub(crate) async fn list(&self, luns: &[LunId]) -> Result<Vec<LunVolumes>, Refusal> {
        let (settings, mut soap) = self.session().await?;
        let result = self.views(&mut soap, luns).await;
        soap.logout().await;
        let views = result.map_err(|error| refusal(&error))?;
        Ok(views
            .iter()
            .map(|(lun, view)| volumes_of(*lun, view, &settings))
            .collect())
    }

    /// The initiators of the hosts of these LUNs, and all that is on them.
    pub(super) async fn views(
        &self,
        soap: &mut Soap,
        luns: &[LunId],
    ) -> Result<Vec<(LunId, View)>, SoapError> {
        let found = self.see(soap).await?;
        let mut views = Vec::new();
        for datastore in found {
            for (lun, naa) in luns_of(&datastore) {
                if luns.contains(&lun) {
                    views.push((lun, inventory::view(soap, datastore.clone(), &naa).await?));
                }
            }
        }
        Ok(views)
    }

    /// Everything that would keep a VM out, or stop the snapshot.
    pub(crate) async fn preflight(&self, luns: &[LunId]) -> Vec<Finding> {
        let look = async {
            let (settings, mut soap) = self.session().await?;
            let views = self.views(&mut soap, luns).await;
            soap.logout().await;
            Ok::<_, Refusal>((settings, views.map_err(|error| refusal(&error))?))
        };
        let (settings, views) = match look.await {
            Ok(found) => found,
            Err(refusal) => {
                return vec![Finding {
                    code: refusal.code,
                    severity: Severity::Error,
                    subject: "vCenter".to_owned(),
                    text: refusal.text,
                }];
            }
        };
        let mut findings = Vec::new();
        for (_, view) in &views {
            let (stopping, left_out, _) = judge(view, &settings);
            let obstacles = stopping.into_iter().chain(left_out);
            findings.extend(obstacles.map(|obstacle| finding(obstacle, Severity::Error)));
            findings.extend(self.leftovers(view));
        }
        findings
    }

    /// VM snapshots of ours that nobody will remove. A revert brings such back: they are not swept.
    fn leftovers(&self, view: &View) -> Vec<Finding> {
        let ours: BTreeSet<String> = Journal::all(&self.dir())
            .iter()
            .map(|journal| snapshots::name_of(&journal.session))
            .collect();
        let oldest = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(LEFTOVER_AGE_H);
        let mut findings = Vec::new();
        for machine in &view.machines {
            for snapshot in machine
                .snapshots
                .iter()
                .filter(|snapshot| snapshot.name.starts_with(PREFIX) && !ours.contains(&snapshot.name))
            {
                if snapshot
                    .created
                    .parse::<jiff::Timestamp>()
                    .is_ok_and(|created| created < oldest)
                {
                    findings.push(Finding {
                        code: ErrorCode::Unsupported,
                        severity: Severity::Warning,
                        subject: machine.name.clone(),
                        text: format!(
                            "its VM snapshot {} is older than {LEFTOVER_AGE_H} h and grows: remove it in the vSphere client if nobody needs it",
                            snapshot.name
                        ),
                    });
                }
            }
        }
        findings
    }

    /// Takes a snapshot of each VM on these LUNs.
    ///
    /// # Errors
    /// Nothing can be prepared, or `require` is `All` and a VM cannot take part; nothing is left behind then.
    pub(crate) async fn prepare(
        &self,
        session: SessionId,
        luns: &[LunId],
        require: Require,
    ) -> Result<Prepared, Refusal> {
        let slot = self.slot(session);
        let _making = slot.lock().await;
        let (settings, mut soap) = self.session().await?;
        let result = self
            .prepare_in(&mut soap, &settings, session, luns, require)
            .await;
        soap.logout().await;
        result
    }

    async fn prepare_in(
        &self,
        soap: &mut Soap,
        settings: &Settings,
        session: SessionId,
        luns: &[LunId],
        require: Require,
    ) -> Result<Prepared, Refusal> {
        let views = self.views(soap, luns).await.map_err(|error| refusal(&error))?;
        let mut prepared = Prepared::default();
        let mut wanted: Vec<(LunId, Wanted)> = Vec::new();
        for (lun, view) in &views {
            let (stopping, left_out, taking_part) = judge(view, settings);
            stop_at(&stopping)?;
            if require == Require::All {
                stop_at(&left_out)?;
            }
            prepared.exclusions.extend(
                left_out
                    .into_iter()
                    .map(|obstacle| exclusion(*lun, obstacle.subject, obstacle.text)),
            );
            wanted.extend(taking_part.into_iter().map(|one| (*lun, one)));
            prepared.volumes.push(FrozenVolume {
                lun: *lun,
                path: format!("datastore {}", view.datastore.name),
                frozen: true,
                error: None,
            });
        }
        let vms: Vec<Machine> = wanted.iter().map(|(_, one)| one.machine.clone()).collect();
        let journal = Journal::begin(&self.dir(), &session.to_string(), &vms);
        let mut journal = journal.map_err(|error| {
            Refusal::new(
                ErrorCode::Internal,
                format!("the journal of VM snapshots cannot be written: {error}"),
            )
        })?;
        let all: Vec<Wanted> = wanted.iter().map(|(_, one)| one.clone()).collect();
        let made = snapshots::create(soap, &mut journal, &all).await;
        let ends: HashMap<Ref, Result<&'static str, String>> =
            made.into_iter().map(|made| (made.machine, made.how)).collect();
        for (lun, one) in &wanted {
            match ends.get(&one.machine.this) {
                Some(Ok(how)) => prepared.apps.push(app(*lun, &one.machine, how)),
                Some(Err(error)) => {
                    prepared
                        .exclusions
                        .push(exclusion(*lun, one.machine.name.clone(), error.clone()))
                }
                None => prepared.exclusions.push(exclusion(
                    *lun,
                    one.machine.name.clone(),
                    "no snapshot was taken".to_owned(),
                )),
            }
        }
        if let (Require::All, Some(first)) = (require, prepared.exclusions.first()) {
            let text = format!("{}: {}", first.subject, first.reason);
            let refusal = Refusal::new(ErrorCode::NoQuiesce, text).about(first.subject.clone());
            if let Err(error) = snapshots::remove(soap, journal).await {
                tracing::error!(%session, "{error}");
            }
            return Err(refusal);
        }
        let record = record(session, &all, &journal, &prepared);
        prepared.record = super::revert_service::document(BlobKind::VmManifest, &record);
        lock(&self.records).insert(session, record);
        Ok(prepared)
    }

    /// The list of VMs of a session.
    pub(super) fn record(&self, session: SessionId) -> Option<Vec<u8>> {
        lock(&self.records).get(&session).cloned()
    }

    /// Removes what a session made; what could not be removed. Nothing for a session that made nothing.
    pub(crate) async fn clean(&self, session: SessionId) -> Option<String> {
        let slot = lock(&self.live).get(&session).cloned()?;
        // A Prepare that still runs is waited for: what it makes after we looked would stay.
        let _removing = slot.lock().await;
        let own = Journal::all(&self.dir())
            .into_iter()
            .find(|journal| journal.session == session.to_string());
        let left = match own {
            None => None,
            Some(journal) => match self.session().await {
                Ok((_, mut soap)) => {
                    let removed = snapshots::remove(&mut soap, journal).await;
                    soap.logout().await;
                    removed.err()
                }
                Err(refusal) => Some(format!(
                    "VM snapshots {} are left behind: {refusal}; they are removed later",
                    snapshots::name_of(&journal.session)
                )),
            },
        };
        lock(&self.records).remove(&session);
        // From now on the watch sweeps what is left.
        lock(&self.live).remove(&session);
        left
    }

    fn slot(&self, session: SessionId) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(lock(&self.live).entry(session).or_default())
    }
}

/// The LUNs of a datastore that a Stillpoint target can have.
fn luns_of(datastore: &Datastore) -> Vec<(LunId, String)> {
    let parsed = datastore
        .extents
        .iter()
        .filter_map(|naa| Some((naa.parse().ok()?, naa.clone())));
    parsed.collect()
}

/// What stops the snapshot, what is left out of it, and what takes part.
fn judge(view: &View, settings: &Settings) -> (Vec<Obstacle>, Vec<Obstacle>, Vec<Wanted>) {
    let stopping = rules::of_datastore(view);
    let (mut left_out, mut wanted) = (Vec::new(), Vec::new());
    for machine in view.machines.iter().filter(|machine| !machine.template) {
        let mode = settings.mode_of(machine);
        let mut obstacles = rules::of_machine(machine, view, mode);
        if mode == VmMode::Plain && machine.powered_on {
            obstacles.push(Obstacle {
                code: ErrorCode::NoQuiesce,
                subject: machine.name.clone(),
                text: "it is to be taken `plain`, so its disks are as after a power cut: choose quiesce, memory or both for it, or accept less \
                       (--on-failure crash-consistent)"
                    .to_owned(),
            });
        }
        let plain_only = mode == VmMode::Plain && obstacles.len() == 1 && machine.powered_on;
        if obstacles.is_empty() || plain_only {
            wanted.push(Wanted {
                machine: machine.clone(),
                mode,
            });
        }
        left_out.extend(obstacles);
    }
    (stopping, left_out, wanted)
}

fn stop_at(obstacles: &[Obstacle]) -> Result<(), Refusal> {
    let Some(first) = obstacles.first() else {
        return Ok(());
    };
    let texts: Vec<String> = obstacles
        .iter()
        .map(|one| format!("{}: {}", one.subject, one.text))
        .collect();
    Err(Refusal::new(first.code, shorten(&texts.join("; "))).about(first.subject.clone()))
}

/// Text of a message has 1,024 bytes at most.
pub(super) fn shorten(text: &str) -> String {
    const MAX: usize = 1_000;
    if text.len() <= MAX {
        return text.to_owned();
    }
    let end = (0..=MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{} …", text.get(..end).unwrap_or_default())
}

fn exclusion(lun: LunId, subject: String, reason: String) -> Exclusion {
    // A guest that was not quiesced has file systems on the LUN that were not either: nothing above `crash`.
    Exclusion {
        kind: ExclusionKind::Volume,
        subject,
        reason: shorten(&reason),
        lun: Some(lun),
    }
}

pub(super) fn finding(obstacle: Obstacle, severity: Severity) -> Finding {
    Finding {
        code: obstacle.code,
        severity,
        subject: obstacle.subject,
        text: shorten(&obstacle.text),
    }
}

/// A VM as records name it: name, reference, and how it came to be consistent.
fn app(lun: LunId, machine: &Machine, how: &str) -> App {
    App {
        kind: "vmware".to_owned(),
        instance: machine.name.clone(),
        component: Some(machine.this.id.clone()),
        version: Some(how.to_owned()),
        state: AppState::Ready,
        error: None,
        lun: Some(lun),
    }
}

/// The VMs of a snapshot (PROTOCOL.md §11).
fn record(session: SessionId, vms: &[Wanted], journal: &Journal, prepared: &Prepared) -> Vec<u8> {
    let one = |wanted: &Wanted| {
        let machine = &wanted.machine;
        let member = journal
            .members
            .iter()
            .find(|member| member.machine == machine.this);
        let app = prepared
            .apps
            .iter()
            .find(|app| app.component.as_ref() == Some(&machine.this.id));
        serde_json::json!({
            "name": machine.name, "moref": machine.this.id, "instance_uuid": machine.instance_uuid, "vmx": machine.vmx,
            "powered_on": machine.powered_on, "snapshot": member.and_then(|member| member.snapshot.as_ref()).map(|snapshot| &snapshot.id),
            "taken": app.and_then(|app| app.version.as_ref()),
        })
    };
    let vms: Vec<_> = vms.iter().map(one).collect();
    serde_json::json!({ "format": "stillpoint-vm-manifest", "version": 1, "session": session.to_string(), "vms": vms }).to_string().into_bytes()
}

fn volumes_of(lun: LunId, view: &View, settings: &Settings) -> LunVolumes {
    let apps = view.machines.iter().filter(|machine| !machine.template);
    LunVolumes {
        identity: LunIdentity {
            lun,
            serial: None,
            iqn: None,
            number: None,
            size_bytes: None,
        },
        role: if view.datastore.mounted.is_empty() {
            Role::None
        } else {
            Role::Mounted
        },
        mounts: vec![Mount {
            path: format!("datastore {}", view.datastore.name),
            file_system: "VMFS".to_owned(),
            device: view.datastore.uuid.clone(),
            read_only: false,
            cluster: true,
        }],
        apps: apps
            .map(|machine| app(lun, machine, settings.mode_of(machine).name()))
            .take(inventory::MACHINES_MAX)
            .collect(),
    }
}

/// How an error of the vCenter is told to the target.
pub(super) fn refusal(error: &SoapError) -> Refusal {
    let (code, text) = match error {
        SoapError::Http(_) => (ErrorCode::Unreachable, error.to_string()),
        SoapError::Fault { kind, .. } if kind == "InvalidLogin" => (
            ErrorCode::NotAllowed,
            "the vCenter does not accept the user or the password: set them with `stillpoint-agent vcenter set`".to_owned(),
        ),
        SoapError::Fault { kind, .. } if kind == "NoPermission" => {
            (ErrorCode::NotAllowed, format!("{error}: the account of `vcenter set` lacks a privilege (see the README)"))
        }
        _ => (ErrorCode::Internal, error.to_string()),
    };
    Refusal::new(code, shorten(&text)).about("vCenter")
}

/// No code that holds one of these locks panics half-way through a change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
