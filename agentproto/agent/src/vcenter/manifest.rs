//! What a revert takes apart and puts together again. The target keeps it before it switches the LUN: whoever has it can finish the
//! revert, also on another agent. PROTOCOL.md describes it.

use serde::{Deserialize, Serialize};

use super::inventory::{Machine, View, datastore_of};
use super::soap::Ref;

/// Says what it is.
const FORMAT: &str = "stillpoint-vcenter-manifest";
/// Of the format.
const VERSION: u32 = 1;
/// As long as a blob may be (agent-protocol.md §3).
pub(crate) const BYTES_MAX: usize = 4 << 20;

/// A host that gives the LUN up and takes it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostEntry {
    /// The host.
    pub(crate) host: Ref,
    /// Its name.
    pub(crate) name: String,
    /// Its HostStorageSystem.
    pub(crate) storage: Ref,
    /// The LUN's uuid there.
    pub(crate) lun_uuid: String,
    /// It had the LUN attached.
    pub(crate) attached: bool,
    /// It had the datastore mounted.
    pub(crate) mounted: bool,
    /// Its iSCSI names: their sessions stay, with the device detached.
    pub(crate) initiators: Vec<String>,
}

/// A VM that leaves the inventory and comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineEntry {
    /// What it was.
    pub(crate) machine: Ref,
    /// Its name.
    pub(crate) name: String,
    /// Unique in the vCenter.
    pub(crate) instance_uuid: String,
    /// `[datastore] dir/name.vmx`.
    pub(crate) vmx: String,
    /// Where it is shown.
    pub(crate) folder: Ref,
    /// Its resource pool; a template has none.
    pub(crate) pool: Option<Ref>,
    /// Where it ran.
    pub(crate) host: Ref,
    /// It ran.
    pub(crate) powered_on: bool,
    /// A template.
    pub(crate) template: bool,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    format: String,
    version: u32,
    /// The revert's.
    pub(crate) session: String,
    /// Canonical name.
    pub(crate) lun: String,
    /// `LUN@NAME`.
    pub(crate) snapshot: String,
    /// The session in which the snapshot was taken: its VM snapshots are called after it.
    pub(crate) taken_session: Option<String>,
    /// The datastore's name.
    pub(crate) datastore: String,
    /// VMFS's UUID.
    pub(crate) datastore_uuid: String,
    /// Who gives it up.
    pub(crate) hosts: Vec<HostEntry>,
    /// What leaves the inventory.
    pub(crate) machines: Vec<MachineEntry>,
    /// Configurations on the datastore that are in no inventory, and stay so.
    pub(crate) strangers: Vec<String>,
}

/// What the target asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    /// The revert's session.
    pub(crate) session: String,
    /// Canonical name of the LUN.
    pub(crate) lun: String,
    /// `LUN@NAME`.
    pub(crate) snapshot: String,
    /// The snapshot's session.
    pub(crate) taken_session: Option<String>,
}

impl Manifest {
    /// Of what there is. The rules must have let it pass.
    pub(crate) fn new(asked: Asked, view: &View, strangers: Vec<String>) -> Self {
        let host = |host: &super::inventory::Host| {
            let (lun_uuid, attached) = host.lun.clone()?;
            Some(HostEntry {
                host: host.this.clone(),
                name: host.name.clone(),
                storage: host.storage.clone()?,
                lun_uuid,
                attached,
                mounted: view.datastore.mounted.contains(&host.this),
                initiators: host.initiators.clone(),
            })
        };
        let machine = |machine: &Machine| {
            Some(MachineEntry {
                machine: machine.this.clone(),
                name: machine.name.clone(),
                instance_uuid: machine.instance_uuid.clone(),
                vmx: machine.vmx.clone(),
                folder: machine.folder.clone()?,
                pool: machine.pool.clone(),
                host: machine.host.clone()?,
                powered_on: machine.powered_on,
                template: machine.template,
            })
        };
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            session: asked.session,
            lun: asked.lun,
            snapshot: asked.snapshot,
            taken_session: asked.taken_session,
            datastore: view.datastore.name.clone(),
            datastore_uuid: view.datastore.uuid.clone(),
            hosts: view.hosts.iter().filter_map(host).collect(),
            machines: view.residents().filter_map(machine).collect(),
            strangers,
        }
    }

    /// As the target keeps it.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let bytes = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        if bytes.len() > BYTES_MAX {
            return Err(format!(
                "the manifest has {} bytes, {BYTES_MAX} are the most",
                bytes.len()
            ));
        }
        Ok(bytes)
    }

    /// Reads one that this or another agent made.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > BYTES_MAX {
            return Err(format!("a manifest of {} bytes", bytes.len()));
        }
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|error| format!("no manifest: {error}"))?;
        if manifest.format != FORMAT || manifest.version != VERSION {
            return Err(format!(
                "a manifest of another kind ({} version {})",
                manifest.format, manifest.version
            ));
        }
        let here = |machine: &MachineEntry| datastore_of(&machine.vmx) == Some(manifest.datastore.as_str());
        if let Some(odd) = manifest.machines.iter().find(|machine| !here(machine)) {
            return Err(format!("a manifest with a VM of elsewhere: {}", odd.vmx));
        }
        Ok(manifest)
    }
}
