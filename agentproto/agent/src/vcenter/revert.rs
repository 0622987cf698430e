//! The online revert (agent-protocol.md §10): the hosts let the LUN go, the target switches it, the hosts take it again.
//!
//! ```text
//! RevertPrepare: power off · UnregisterVM · UnmountVmfsVolume · DetachScsiLun     ─▶ manifest
//!                                    the target keeps the manifest and switches the LUN
//! RevertDone:    AttachScsiLun · RescanVmfs · MountVmfsVolume · RegisterVM_Task · RevertToSnapshot_Task · PowerOnVM_Task
//! ```
//! Every step looks first and does only what is not done: `InvalidState` and a repeat are the same thing. So RevertDone is also the way
//! back from a RevertPrepare that failed half-way, and both may be repeated after a crash of either end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::inventory::{Machine, all_configurations, datastores, hosts, machines};
use super::manifest::{HostEntry, MachineEntry, Manifest};
use super::snapshots::name_of;
use super::soap::{Ref, Soap, SoapError, fault};
use super::xml::escape;

/// A task of one VM.
const TASK_TIME_MAX: Duration = Duration::from_secs(300);
/// How often a step whose answer was lost, or that a host refuses for a moment, is tried …
const TRIES: u32 = 3;
/// … and how long between.
const TRY_EVERY: Duration = Duration::from_millis(500);

/// The agent's own note of a revert under way.
pub(crate) fn journal_path(dir: &Path, session: &str) -> PathBuf {
    dir.join(format!("revert-{session}.json"))
}

/// Keeps the manifest before anything is touched.
pub(crate) fn keep(dir: &Path, manifest: &Manifest) -> Result<(), String> {
    let write = || {
        super::files::make_dir(dir).and_then(|()| {
            let bytes = manifest.to_bytes().map_err(std::io::Error::other)?;
            super::files::replace(&journal_path(dir, &manifest.session), &bytes)
        })
    };
    write().map_err(|error| format!("the manifest cannot be kept: {error}"))
}

/// A manifest that was kept.
pub(crate) fn kept(dir: &Path, session: &str) -> Option<Manifest> {
    let bytes = std::fs::read(journal_path(dir, session)).ok()?;
    Manifest::parse(&bytes)
        .inspect_err(|error| tracing::error!(session, error, "the manifest of a revert cannot be read"))
        .ok()
}

/// A step that failed.
fn told(what: &str, name: &str, error: &SoapError) -> String {
    format!("{name}: {what}: {error}")
}

/// Makes the hosts let the LUN go.
pub(crate) async fn take_apart(
    soap: &mut Soap,
    manifest: &Manifest,
    tell: &(dyn Fn(String) + Send + Sync),
) -> Result<(), String> {
    for entry in &manifest.machines {
        tell(format!("{} leaves the inventory", entry.name));
        let mut tries = Tries::default();
        let end = loop {
            if let Some(end) = tries.end(remove_machine(soap, entry).await).await {
                break end;
            }
        };
        end.map_err(|error| told("it cannot leave the inventory", &entry.name, &error))?;
    }
    for entry in &manifest.hosts {
        tell(format!("{} lets the LUN go", entry.name));
        let mut tries = Tries::default();
        let end = loop {
            if let Some(end) = tries
                .end(let_go(soap, entry, &manifest.datastore_uuid).await)
                .await
            {
                break end;
            }
        };
        end.map_err(|error| told("it cannot let the LUN go", &entry.name, &error))?;
    }
    // What came into the inventory meanwhile would lose its disks.
    let now = datastores(soap).await.map_err(|error| error.to_string())?;
    let late = now
        .iter()
        .find(|datastore| datastore.uuid == manifest.datastore_uuid)
        .filter(|datastore| !datastore.mounted.is_empty());
    match late {
        Some(datastore) => Err(format!(
            "{} is mounted on a host again: look who uses it, then try again",
            datastore.name
        )),
        None => Ok(()),
    }
}

/// Repeats a step that may have been carried out, or that a host refused for the moment.
#[derive(Default)]
struct Tries(u32);

impl Tries {
    /// How the step ended; `None`: again.
    async fn end(&mut self, result: Result<(), SoapError>) -> Option<Result<(), SoapError>> {
        self.0 += 1;
        match result {
            Err(error) if self.0 < TRIES => {
                tracing::debug!(%error, tries = self.0, "a step of a revert is tried again");
                tokio::time::sleep(TRY_EVERY * self.0).await;
                None
            }
            result => Some(result),
        }
    }
}

async fn remove_machine(soap: &mut Soap, entry: &MachineEntry) -> Result<(), SoapError> {
    let found = machines(soap, std::slice::from_ref(&entry.machine)).await?;
    let Some(machine) = found.first().filter(|machine| machine.vmx == entry.vmx) else {
        return Ok(());
    };
    if machine.powered_on {
        match soap
            .run("PowerOffVM_Task", &machine.this, "", TASK_TIME_MAX)
            .await
        {
            Err(error) if !error.is("InvalidPowerState") => return Err(error),
            _ => {}
        }
    }
    match soap.call("UnregisterVM", &machine.this, "").await {
        Err(error) if !error.is("ManagedObjectNotFound") => Err(error),
        _ => Ok(()),
    }
}

/// How a host stands to the LUN now: mounted, attached.
async fn stands(
    soap: &mut Soap,
    entry: &HostEntry,
    lun: &str,
    uuid: &str,
) -> Result<(bool, bool), SoapError> {
    let now = hosts(soap, std::slice::from_ref(&entry.host), lun).await?;
    let attached = now
        .first()
        .and_then(|host| host.lun.as_ref())
        .is_some_and(|(_, attached)| *attached);
    let known = datastores(soap).await?;
    let mounted = known
        .iter()
        .any(|datastore| datastore.uuid == uuid && datastore.mounted.contains(&entry.host));
    Ok((mounted, attached))
}

/// A call that a repeat finds done.
async fn once(soap: &mut Soap, method: &str, this: &Ref, args: &str) -> Result<(), SoapError> {
    match soap.call(method, this, args).await {
        Err(error) if !error.is("InvalidState") => Err(error),
        _ => Ok(()),
    }
}

async fn let_go(soap: &mut Soap, entry: &HostEntry, uuid: &str) -> Result<(), SoapError> {
    if entry.mounted {
        let args = format!("<vmfsUuid>{}</vmfsUuid>", escape(uuid));
        once(soap, "UnmountVmfsVolume", &entry.storage, &args).await?;
    }
    if entry.attached {
        let args = format!("<lunUuid>{}</lunUuid>", escape(&entry.lun_uuid));
        once(soap, "DetachScsiLun", &entry.storage, &args).await?;
    }
    Ok(())
}

/// Which VMs are back at their snapshots, kept beside the manifest: a repeat must not take them back again once they run.
struct Progress {
    path: PathBuf,
    back: Vec<String>,
}

impl Progress {
    fn path(dir: &Path, session: &str) -> PathBuf {
        dir.join(format!("back-{session}.json"))
    }

    fn read(dir: &Path, session: &str) -> Self {
        let path = Self::path(dir, session);
        let bytes = std::fs::read(&path).unwrap_or_default();
        Self {
            back: serde_json::from_slice(&bytes).unwrap_or_default(),
            path,
        }
    }

    fn has(&self, entry: &MachineEntry) -> bool {
        self.back.contains(&entry.vmx)
    }

    fn note(&mut self, entry: &MachineEntry) {
        self.back.push(entry.vmx.clone());
        let kept = serde_json::to_vec(&self.back).map_err(std::io::Error::from);
        if let Err(error) = kept.and_then(|bytes| super::files::replace(&self.path, &bytes)) {
            tracing::warn!(%error, "how far a revert is cannot be kept");
        }
    }
}

/// Forgets a revert that is over.
pub(crate) fn forget(dir: &Path, session: &str) -> std::io::Result<()> {
    super::files::remove(&Progress::path(dir, session))?;
    super::files::remove(&journal_path(dir, session))
}

/// How each host and VM came out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Came {
    /// Host or VM.
    pub(crate) subject: String,
    /// What was done, or what failed.
    pub(crate) result: Result<String, String>,
}

/// Gives the LUN back to the hosts and the VMs to the inventory. `reverted`: the LUN is back at its snapshot.
pub(crate) async fn put_together(
    soap: &mut Soap,
    manifest: &Manifest,
    reverted: bool,
    dir: &Path,
    tell: &(dyn Fn(String) + Send + Sync),
) -> Vec<Came> {
    let mut came = Vec::new();
    let mut progress = Progress::read(dir, &manifest.session);
    for entry in &manifest.hosts {
        tell(format!("{} takes the LUN again", entry.name));
        let mut tries = Tries::default();
        let result = loop {
            if let Some(end) = tries.end(take(soap, entry, manifest).await).await {
                break end;
            }
        };
        came.push(Came {
            subject: entry.name.clone(),
            result: result
                .map(|()| "has the datastore again".to_owned())
                .map_err(|error| error.to_string()),
        });
    }
    for entry in &manifest.machines {
        tell(format!("{} comes back", entry.name));
        let mut said = String::new();
        let mut tries = Tries::default();
        let result = loop {
            let progress = reverted.then_some(&mut progress);
            let end = bring_back(soap, entry, manifest, progress, &mut said).await;
            if let Some(end) = tries.end(end).await {
                break end;
            }
        };
        came.push(Came {
            subject: entry.name.clone(),
            result: result.map(|()| said).map_err(|error| error.to_string()),
        });
    }
    // A call of an earlier try that was cut off may have been carried out only now: look once more.
    for (entry, came) in manifest.hosts.iter().zip(&mut came) {
        let wanted = (entry.mounted, entry.attached);
        let again = match stands(soap, entry, &manifest.lun, &manifest.datastore_uuid).await {
            Ok(now) if came.result.is_err() || now == wanted => Ok(()),
            Ok(_) => take(soap, entry, manifest).await,
            Err(error) => Err(error),
        };
        if let Err(error) = again {
            came.result = Err(error.to_string());
        }
    }
    came
}

async fn take(soap: &mut Soap, entry: &HostEntry, manifest: &Manifest) -> Result<(), SoapError> {
    if entry.attached {
        let args = format!("<lunUuid>{}</lunUuid>", escape(&entry.lun_uuid));
        once(soap, "AttachScsiLun", &entry.storage, &args).await?;
    }
    if entry.mounted {
        let (mounted, _) = stands(soap, entry, &manifest.lun, &manifest.datastore_uuid).await?;
        if !mounted {
            soap.call("RescanVmfs", &entry.storage, "").await?;
            let args = format!("<vmfsUuid>{}</vmfsUuid>", escape(&manifest.datastore_uuid));
            once(soap, "MountVmfsVolume", &entry.storage, &args).await?;
        }
    }
    Ok(())
}

async fn bring_back(
    soap: &mut Soap,
    entry: &MachineEntry,
    manifest: &Manifest,
    reverted: Option<&mut Progress>,
    said: &mut String,
) -> Result<(), SoapError> {
    let machine = match find(soap, entry).await? {
        Some(machine) => machine,
        None => register(soap, entry, manifest).await?,
    };
    *said = format!("registered as {}", machine.this);
    if let Some(progress) = reverted
        && !progress.has(entry)
        // One that runs again was brought back by an earlier try: it must not lose what it has done since.
        && !machine.powered_on
    {
        let wanted = manifest.taken_session.as_deref().map(name_of);
        let snapshot = machine
            .snapshots
            .iter()
            .find(|snapshot| Some(&snapshot.name) == wanted.as_ref());
        match snapshot {
            Some(snapshot) => {
                soap.run(
                    "RevertToSnapshot_Task",
                    &snapshot.this,
                    "<suppressPowerOn>true</suppressPowerOn>",
                    TASK_TIME_MAX,
                )
                .await?;
                said.push_str(", back at its own snapshot");
            }
            None => said.push_str(", without a VM snapshot of that time: its disks are as after a power cut"),
        }
        progress.note(entry);
    }
    if entry.powered_on {
        let now = machines(soap, std::slice::from_ref(&machine.this)).await?;
        if now.first().is_some_and(|now| !now.powered_on) {
            match soap.run("PowerOnVM_Task", &machine.this, "", TASK_TIME_MAX).await {
                Err(error) if !error.is("InvalidPowerState") => return Err(error),
                _ => said.push_str(", powered on"),
            }
        }
    }
    Ok(())
}

/// The VM, if it is in the inventory: under its old reference, or a new one.
async fn find(soap: &mut Soap, entry: &MachineEntry) -> Result<Option<Machine>, SoapError> {
    let old = machines(soap, std::slice::from_ref(&entry.machine)).await?;
    if let Some(machine) = old.into_iter().find(|machine| machine.vmx == entry.vmx) {
        return Ok(Some(machine));
    }
    let all = soap.find_all("VirtualMachine", &["config.files"]).await?;
    let same = all.iter().find(|object| {
        object
            .prop("config.files")
            .and_then(|files| files.text_of("vmPathName"))
            == Some(entry.vmx.as_str())
    });
    match same {
        Some(object) => Ok(machines(soap, std::slice::from_ref(&object.this)).await?.pop()),
        None => Ok(None),
    }
}

async fn register(soap: &mut Soap, entry: &MachineEntry, manifest: &Manifest) -> Result<Machine, SoapError> {
    const METHOD: &str = "RegisterVM_Task";
    // Its own host, or, when that has gone, any that has the datastore.
    let others = manifest
        .hosts
        .iter()
        .filter(|host| host.mounted)
        .map(|host| &host.host);
    let mut last = fault(METHOD, "NotFound", "no host has the datastore");
    for host in std::iter::once(&entry.host).chain(others.filter(|host| **host != entry.host)) {
        let pool = entry
            .pool
            .as_ref()
            .map(|pool| pool.arg("pool"))
            .unwrap_or_default();
        let args = format!(
            "<path>{}</path><name>{}</name><asTemplate>{}</asTemplate>{pool}{}",
            escape(&entry.vmx),
            escape(&entry.name),
            entry.template,
            host.arg("host")
        );
        match soap.run(METHOD, &entry.folder, &args, TASK_TIME_MAX).await {
            Ok(_) => {}
            // Somebody was quicker, perhaps ourselves.
            Err(error) if error.is("AlreadyExists") || error.is_unknown() => {}
            Err(error) => {
                last = error;
                continue;
            }
        }
        if let Some(machine) = find(soap, entry).await? {
            return Ok(machine);
        }
    }
    Err(last)
}

/// Configurations on the datastore that no inventory has.
pub(crate) async fn strangers(soap: &mut Soap, on_datastore: &[String]) -> Result<Vec<String>, SoapError> {
    let known = all_configurations(soap).await?;
    Ok(on_datastore
        .iter()
        .filter(|path| !known.contains(path))
        .cloned()
        .collect())
}
