//! RevertPrepare and RevertDone, as the target asks them; both may be asked again, by a target or an agent that was started anew.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use stillpoint_agentproto::message::{
    Blob, BlobKind, BlobOk, Document, FetchBlob, Finding, Gather, MAX_BLOB, Reattached, RevertDone,
    RevertHost, RevertOutcome, RevertPrepare, RevertReady, RevertState, RevertVm, Severity, piece_of,
};
use stillpoint_agentproto::{ErrorCode, Refusal, SessionId};

use super::inventory::{self, View};
use super::manifest::{Asked, Manifest};
use super::revert::{self, Came};
use super::rules::{self, Obstacle, Residents};
use super::service::{Vcenter, finding, lock, refusal, shorten};
use super::snapshots::files;
use super::soap::Soap;

/// Entries of a list in a message.
const LIST_MAX: usize = 256;
/// Answers of reverts that are over, kept for repeats.
const ANSWERS_MAX: usize = 64;
/// Manifests that the target hands over at the same time.
const GATHERS_MAX: usize = 4;

/// What is under way.
#[derive(Default)]
pub(crate) struct Reverts {
    /// One at a time: two reverts of one vCenter would wait for each other's hosts.
    one: tokio::sync::Mutex<()>,
    gathers: Mutex<HashMap<SessionId, Gather>>,
}

/// How a revert ended, kept for a target that did not hear it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Over {
    lines: Vec<(String, Result<String, String>, bool)>,
}

impl Vcenter {
    /// Makes the hosts let the LUN go, or says what that would mean.
    ///
    /// # Errors
    /// A rule stands in the way, or a step failed: then everything is as it was, or the text says what is not.
    pub(crate) async fn revert_prepare(&self, ask: RevertPrepare) -> Result<RevertReady, Refusal> {
        let _one = self.reverts.one.lock().await;
        if over_path(&self.dir(), ask.session).exists() {
            return Err(Refusal::new(ErrorCode::WrongState, "this revert is over already"));
        }
        let (settings, mut soap) = self.session().await?;
        let residents = vcenter_names(&settings.access.host).await;
        let result = self.prepare_revert(&mut soap, &ask, &residents).await;
        soap.logout().await;
        result
    }

    async fn prepare_revert(
        &self,
        soap: &mut Soap,
        ask: &RevertPrepare,
        names: &[String],
    ) -> Result<RevertReady, Refusal> {
        let dir = self.dir();
        if let (false, Some(manifest)) = (ask.plan_only, revert::kept(&dir, &ask.session.to_string())) {
            return self.take_apart(soap, &manifest).await;
        }
        let view = self
            .views(soap, &[ask.lun])
            .await
            .map_err(|error| refusal(&error))?
            .pop();
        let Some((_, view)) = view else {
            let text = format!("no datastore of this vCenter lies on {}", ask.lun);
            return Err(Refusal::new(ErrorCode::NotMounted, text));
        };
        let contents = inventory::contents(soap, &view.datastore)
            .await
            .map_err(|error| refusal(&error))?;
        let strangers = revert::strangers(soap, &contents.configurations)
            .await
            .map_err(|error| refusal(&error))?;
        let own = std::fs::read_to_string("/sys/class/dmi/id/product_uuid").ok();
        let who = Residents {
            vcenter: names,
            own_uuid: own.as_deref().map(str::trim),
        };
        let obstacles = rules::of_revert(&view, &contents, &who, ask.power_off);
        let asked = Asked {
            session: ask.session.to_string(),
            lun: ask.lun.to_string(),
            snapshot: ask.snapshot.clone(),
            taken_session: ask.taken_in.map(|session| session.to_string()),
        };
        let manifest = Manifest::new(asked, &view, strangers);
        if ask.plan_only {
            return Ok(ready(&manifest, RevertState::Planned, &view, obstacles));
        }
        if let Some(first) = obstacles.first() {
            let texts: Vec<String> = obstacles
                .iter()
                .map(|one| format!("{}: {}", one.subject, one.text))
                .collect();
            return Err(Refusal::new(first.code, shorten(&texts.join("; "))).about(first.subject.clone()));
        }
        revert::keep(&dir, &manifest).map_err(|error| Refusal::new(ErrorCode::Internal, error))?;
        self.take_apart(soap, &manifest).await
    }

    /// All hosts let go, or all have it again.
    async fn take_apart(&self, soap: &mut Soap, manifest: &Manifest) -> Result<RevertReady, Refusal> {
        let dir = self.dir();
        if let Err(why) = revert::take_apart(soap, manifest, &tell).await {
            tracing::warn!("a revert is given up: {why}");
            let came = revert::put_together(soap, manifest, false, &dir, &tell).await;
            let left: Vec<String> = came
                .iter()
                .filter_map(|one| {
                    one.result
                        .as_ref()
                        .err()
                        .map(|error| format!("{}: {error}", one.subject))
                })
                .collect();
            let text = if left.is_empty() {
                revert::forget(&dir, &manifest.session)
                    .map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))?;
                format!("{why}; every host has the LUN again, and every VM is registered as before")
            } else {
                format!("{why}; not back as before: {}", left.join("; "))
            };
            return Err(Refusal::new(ErrorCode::Internal, shorten(&text)));
        }
        let bytes = manifest
            .to_bytes()
            .map_err(|error| Refusal::new(ErrorCode::TooLarge, error))?;
        Ok(RevertReady {
            hosts: hosts_of(manifest, RevertState::Released),
            vms: vms_of(manifest, RevertState::Released),
            vms_total: total(manifest),
            findings: Vec::new(),
            manifest: document(BlobKind::RevertManifest, &bytes),
        })
    }

    /// A piece of a document that this agent made.
    pub(crate) fn fetch(&self, ask: &FetchBlob) -> Result<Blob, Refusal> {
        let bytes = match ask.kind {
            BlobKind::RevertManifest => revert::kept(&self.dir(), &ask.session.to_string())
                .and_then(|manifest| manifest.to_bytes().ok()),
            BlobKind::VmManifest => self.record(ask.session),
            _ => None,
        };
        let piece = bytes.and_then(|bytes| piece_of(&bytes, ask.session, ask.kind, ask.offset_bytes));
        piece.ok_or_else(|| Refusal::new(ErrorCode::UnknownSession, "no such document here"))
    }

    /// A piece of the manifest as the target kept it.
    pub(crate) fn take_piece(&self, piece: &Blob) -> Result<BlobOk, Refusal> {
        if piece.kind != BlobKind::RevertManifest {
            return Err(Refusal::new(
                ErrorCode::Unsupported,
                "only the manifest of a revert is taken",
            ));
        }
        let mut gathers = lock(&self.reverts.gathers);
        if gathers.len() >= GATHERS_MAX && !gathers.contains_key(&piece.session) {
            return Err(Refusal::new(ErrorCode::Busy, "other manifests are under way"));
        }
        let gather = gathers
            .entry(piece.session)
            .or_insert_with(|| Gather::new(piece.session, piece.kind));
        gather
            .take(piece)
            .map_err(|error| Refusal::new(ErrorCode::Malformed, error.to_string()))?;
        Ok(BlobOk {
            received_bytes: gather.next_offset(),
        })
    }

    /// Gives the LUN back to the hosts.
    ///
    /// # Errors
    /// The manifest is not here, or the vCenter cannot be asked: to be tried again.
    pub(crate) async fn revert_done(&self, ask: RevertDone) -> Result<Reattached, Refusal> {
        let _one = self.reverts.one.lock().await;
        let dir = self.dir();
        if let Some(over) = Over::read(&over_path(&dir, ask.session)) {
            return Ok(over.answer());
        }
        let Some(manifest) = self.manifest(&ask)? else {
            // Nothing was touched: RevertPrepare keeps its manifest before it does anything.
            return Ok(Over { lines: Vec::new() }.answer());
        };
        if manifest.lun != ask.lun.to_string() || manifest.session != ask.session.to_string() {
            return Err(Refusal::new(
                ErrorCode::IdentityMismatch,
                "the manifest is of another revert",
            ));
        }
        // Kept here, too: whoever asks next finds the same.
        revert::keep(&dir, &manifest).map_err(|error| Refusal::new(ErrorCode::Internal, error))?;
        let (_, mut soap) = self.session().await?;
        let came = revert::put_together(
            &mut soap,
            &manifest,
            ask.outcome == RevertOutcome::Reverted,
            &dir,
            &tell,
        )
        .await;
        // The target counts on hearing soon that the datastore is mounted again.
        if let Err(error) = self.see(&mut soap).await {
            tracing::warn!("the vCenter: {error}");
        }
        soap.logout().await;
        let hosts = manifest.hosts.len();
        let over = Over {
            lines: came
                .into_iter()
                .enumerate()
                .map(|(at, Came { subject, result })| (subject, result, at < hosts))
                .collect(),
        };
        if over.lines.iter().all(|(_, result, _)| result.is_ok()) {
            let ended = over
                .write(&dir, ask.session)
                .and_then(|()| revert::forget(&dir, &manifest.session));
            ended.map_err(|error| {
                Refusal::new(
                    ErrorCode::Internal,
                    format!("the end of the revert cannot be noted: {error}"),
                )
            })?;
            lock(&self.reverts.gathers).remove(&ask.session);
        }
        Ok(over.answer())
    }

    /// Our own, or the one that the target handed over.
    fn manifest(&self, ask: &RevertDone) -> Result<Option<Manifest>, Refusal> {
        if let Some(manifest) = revert::kept(&self.dir(), &ask.session.to_string()) {
            return Ok(Some(manifest));
        }
        let Some(wanted) = &ask.manifest else {
            return match ask.outcome {
                RevertOutcome::Failed => Ok(None),
                RevertOutcome::Reverted => Err(Refusal::new(
                    ErrorCode::UnknownSession,
                    "no manifest of this revert is here: hand it over first",
                )),
            };
        };
        let gathers = lock(&self.reverts.gathers);
        let bytes = gathers.get(&ask.session).and_then(Gather::whole);
        let bytes = bytes.filter(|bytes| <[u8; 32]>::from(Sha256::digest(bytes)) == wanted.sha256);
        let Some(bytes) = bytes else {
            return Err(Refusal::new(
                ErrorCode::UnknownSession,
                "the manifest of this revert is not here: hand it over first",
            ));
        };
        Manifest::parse(bytes)
            .map(Some)
            .map_err(|error| Refusal::new(ErrorCode::Malformed, shorten(&error)))
    }
}

fn tell(what: String) {
    tracing::info!("revert: {what}");
}

/// The name that was set, and its addresses: a VM that has one of them is the vCenter.
async fn vcenter_names(host: &str) -> Vec<String> {
    let name = host
        .rsplit_once(':')
        .map_or(host, |(name, _)| name)
        .trim_matches(['[', ']'])
        .to_owned();
    let mut names = vec![name];
    if let Ok(found) = tokio::net::lookup_host(host).await {
        names.extend(found.map(|address| address.ip().to_string()));
    }
    names
}

/// A document, as it is announced; none when it is too long to be fetched.
pub(super) fn document(kind: BlobKind, bytes: &[u8]) -> Option<Document> {
    Some(Document {
        kind,
        total_bytes: u32::try_from(bytes.len())
            .ok()
            .filter(|total| *total <= MAX_BLOB)?,
        sha256: Sha256::digest(bytes).into(),
    })
}

fn total(manifest: &Manifest) -> u32 {
    u32::try_from(manifest.machines.len() + manifest.strangers.len()).unwrap_or(u32::MAX)
}

fn hosts_of(manifest: &Manifest, state: RevertState) -> Vec<RevertHost> {
    let host = |entry: &super::manifest::HostEntry| RevertHost {
        host: entry.name.clone(),
        initiators: entry.initiators.clone(),
        state,
        error: None,
    };
    manifest.hosts.iter().map(host).take(LIST_MAX).collect()
}

fn vms_of(manifest: &Manifest, state: RevertState) -> Vec<RevertVm> {
    let names: HashMap<_, _> = manifest
        .hosts
        .iter()
        .map(|host| (&host.host, &host.name))
        .collect();
    let known = manifest.machines.iter().map(|entry| RevertVm {
        name: entry.name.clone(),
        instance_uuid: Some(entry.instance_uuid.clone()).filter(|uuid| !uuid.is_empty()),
        moref: Some(entry.machine.id.clone()),
        host: names.get(&entry.host).map(|name| (*name).clone()),
        vmx_path: Some(entry.vmx.clone()),
        powered_on: entry.powered_on,
        state,
        text: Some("it goes back to the snapshot and is registered anew under another reference (moref): what it wrote since is lost".to_owned()),
        error: None,
    });
    let strangers = manifest.strangers.iter().map(|vmx| RevertVm {
        name: vmx.clone(),
        instance_uuid: None,
        moref: None,
        host: None,
        vmx_path: Some(vmx.clone()),
        powered_on: false,
        state: RevertState::LeftOut,
        text: None,
        error: Some("it is not in the inventory: its files go back, but it is not registered".to_owned()),
    });
    known.chain(strangers).take(LIST_MAX).collect()
}

fn ready(manifest: &Manifest, state: RevertState, view: &View, obstacles: Vec<Obstacle>) -> RevertReady {
    let guests = view
        .machines
        .iter()
        .filter(|machine| !view.residents().any(|resident| resident.this == machine.this));
    let foreign = guests.map(|machine| Finding {
        code: ErrorCode::LimitVmSpread,
        severity: Severity::Warning,
        subject: machine.name.clone(),
        text: format!(
            "it has files on the datastore, but its configuration is elsewhere; it runs on {}",
            view.host_name(machine.host.as_ref())
        ),
    });
    let stopping = obstacles
        .into_iter()
        .map(|obstacle| finding(obstacle, Severity::Error));
    RevertReady {
        hosts: hosts_of(manifest, state),
        vms: vms_of(manifest, state),
        vms_total: total(manifest),
        findings: stopping.chain(foreign).take(LIST_MAX).collect(),
        manifest: None,
    }
}

fn over_path(dir: &Path, session: SessionId) -> std::path::PathBuf {
    dir.join(format!("over-{session}.json"))
}

impl Over {
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Keeps the newest.
    fn write(&self, dir: &Path, session: SessionId) -> std::io::Result<()> {
        let bytes = serde_json::to_vec(self)?;
        super::files::replace(&over_path(dir, session), &bytes)?;
        let age = |path: &std::path::PathBuf| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
        let mut all = files(dir, "over-");
        all.sort_by_key(age);
        for old in all.iter().rev().skip(ANSWERS_MAX) {
            super::files::remove(old)?;
        }
        Ok(())
    }

    fn answer(&self) -> Reattached {
        let state = |result: &Result<String, String>| match result {
            Ok(_) => RevertState::Restored,
            Err(_) => RevertState::Failed,
        };
        let error = |result: &Result<String, String>| result.as_ref().err().map(|error| shorten(error));
        let (hosts, vms): (Vec<_>, Vec<_>) = self.lines.iter().partition(|(_, _, is_host)| *is_host);
        let host = |(name, result, _): &&(String, Result<String, String>, bool)| RevertHost {
            host: name.clone(),
            initiators: Vec::new(),
            state: state(result),
            error: error(result),
        };
        let vm = |(name, result, _): &&(String, Result<String, String>, bool)| RevertVm {
            name: name.clone(),
            instance_uuid: None,
            moref: None,
            host: None,
            vmx_path: None,
            powered_on: false,
            state: state(result),
            text: result.as_ref().ok().map(|text| shorten(text)),
            error: error(result),
        };
        Reattached {
            hosts: hosts.iter().map(host).take(LIST_MAX).collect(),
            vms: vms.iter().map(vm).take(LIST_MAX).collect(),
            vms_total: u32::try_from(vms.len()).unwrap_or(u32::MAX),
            findings: Vec::new(),
        }
    }
}
