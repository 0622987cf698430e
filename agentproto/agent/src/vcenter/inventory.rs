//! What the vCenter knows of a LUN: its datastore, the hosts that see it, the VMs on it.

use std::time::Duration;

use super::soap::{Ref, Soap, SoapError, missing};
use super::vim::Object;
use super::xml::Element;

/// VMs of one datastore: each is an entry of a message, whose lists have 256.
pub(crate) const MACHINES_MAX: usize = 250;
/// The browser of a datastore with many directories is slow.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(60);

/// A VMFS datastore.
#[derive(Debug, Clone)]
pub(crate) struct Datastore {
    /// What.
    pub(crate) this: Ref,
    /// As in paths: `[name] dir/file`.
    pub(crate) name: String,
    /// VMFS's own.
    pub(crate) uuid: String,
    /// Canonical names (`naa.…`) of the disks that it lies on.
    pub(crate) extents: Vec<String>,
    /// Hosts that know it.
    pub(crate) hosts: Vec<Ref>,
    /// Those that have it mounted.
    pub(crate) mounted: Vec<Ref>,
    /// VMs with anything on it.
    pub(crate) vms: Vec<Ref>,
    browser: Option<Ref>,
}

/// A host as far as the LUN is concerned.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// What.
    pub(crate) this: Ref,
    /// For people.
    pub(crate) name: String,
    /// Its HostStorageSystem.
    pub(crate) storage: Option<Ref>,
    /// vCenter reaches it.
    pub(crate) connected: bool,
    /// Where its VMs swap, when not beside themselves.
    pub(crate) swap: Option<Ref>,
    /// Where its scratch files are.
    pub(crate) scratch: String,
    /// The LUN's uuid there, and whether it is attached.
    pub(crate) lun: Option<(String, bool)>,
    /// Paths to the LUN.
    pub(crate) paths: usize,
    /// Its iSCSI names.
    pub(crate) initiators: Vec<String>,
}

/// A snapshot of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmSnapshot {
    /// What.
    pub(crate) this: Ref,
    /// Its name.
    pub(crate) name: String,
    /// When (RFC 3339).
    pub(crate) created: String,
}

/// A VM.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// What.
    pub(crate) this: Ref,
    /// For people; not unique.
    pub(crate) name: String,
    /// vCenter's own, unique in it.
    pub(crate) instance_uuid: String,
    /// The SMBIOS UUID, which the guest sees.
    pub(crate) bios_uuid: String,
    /// `[datastore] dir/name.vmx`.
    pub(crate) vmx: String,
    /// Where it runs, or would.
    pub(crate) host: Option<Ref>,
    /// Its resource pool; a template has none.
    pub(crate) pool: Option<Ref>,
    /// The folder in which it is shown.
    pub(crate) folder: Option<Ref>,
    /// Running. A suspended one is not: its memory is on disk.
    pub(crate) powered_on: bool,
    /// A template.
    pub(crate) template: bool,
    /// Fault tolerance is on.
    pub(crate) fault_tolerant: bool,
    /// VMware Tools run in it.
    pub(crate) tools: bool,
    /// Names and addresses of the guest.
    pub(crate) addresses: Vec<String>,
    /// Its virtual hardware.
    pub(crate) devices: Vec<Element>,
    /// Every file of it, as `[datastore] path`.
    pub(crate) files: Vec<String>,
    /// Its snapshots, parents first.
    pub(crate) snapshots: Vec<VmSnapshot>,
}

/// One LUN.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// Its datastore.
    pub(crate) datastore: Datastore,
    /// The hosts that know it.
    pub(crate) hosts: Vec<Host>,
    /// The VMs with anything on it.
    pub(crate) machines: Vec<Machine>,
}

impl View {
    /// The VMs whose configuration is on the datastore: those that go with it.
    pub(crate) fn residents(&self) -> impl Iterator<Item = &Machine> {
        let name = self.datastore.name.as_str();
        self.machines
            .iter()
            .filter(move |machine| datastore_of(&machine.vmx) == Some(name))
    }

    /// A host's name.
    pub(crate) fn host_name(&self, host: Option<&Ref>) -> String {
        let found = self.hosts.iter().find(|known| Some(&known.this) == host);
        found.map_or_else(|| "an unknown host".to_owned(), |host| host.name.clone())
    }
}

/// The datastore of `[datastore] path`.
pub(crate) fn datastore_of(path: &str) -> Option<&str> {
    path.strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
        .map(|(name, _)| name)
}

/// Every VMFS datastore.
pub(crate) async fn datastores(soap: &mut Soap) -> Result<Vec<Datastore>, SoapError> {
    let found = soap
        .find_all("Datastore", &["name", "info", "host", "vm", "browser"])
        .await?;
    Ok(found.iter().filter_map(datastore).collect())
}

fn datastore(object: &Object) -> Option<Datastore> {
    let vmfs = object.prop("info")?.child("vmfs")?;
    let extents = vmfs.all("extent").filter_map(|extent| extent.text_of("diskName"));
    let mounts = object
        .prop("host")
        .map(|list| list.children.as_slice())
        .unwrap_or_default();
    let hosts = mounts
        .iter()
        .filter_map(|mount| Some((Ref::of(mount.child("key")?)?, mount.child("mountInfo")?)));
    let hosts: Vec<_> = hosts.collect();
    // `mounted` is not set by a host that never unmounted anything.
    let mounted = hosts
        .iter()
        .filter(|(_, info)| info.child("mounted").is_none() || info.is_true("mounted"));
    Some(Datastore {
        this: object.this.clone(),
        name: object.text("name"),
        uuid: vmfs.text_of("uuid").unwrap_or_default().to_owned(),
        extents: extents.map(|name| name.to_ascii_lowercase()).collect(),
        mounted: mounted.map(|(host, _)| host.clone()).collect(),
        hosts: hosts.iter().map(|(host, _)| host.clone()).collect(),
        vms: object.references("vm"),
        browser: object.reference("browser"),
    })
}

/// Everything about a datastore; `naa` is the LUN asked for.
pub(crate) async fn view(soap: &mut Soap, datastore: Datastore, naa: &str) -> Result<View, SoapError> {
    let hosts = hosts(soap, &datastore.hosts, naa).await?;
    let machines = machines(soap, &datastore.vms).await?;
    Ok(View {
        datastore,
        hosts,
        machines,
    })
}

/// The hosts, with what they know of a LUN.
pub(crate) async fn hosts(soap: &mut Soap, of: &[Ref], naa: &str) -> Result<Vec<Host>, SoapError> {
    const PATHS: [&str; 5] = [
        "name",
        "runtime.connectionState",
        "configManager.storageSystem",
        "configManager.advancedOption",
        "config.localSwapDatastore",
    ];
    let mut found = Vec::new();
    for object in soap.properties(of, &PATHS).await? {
        let mut host = Host {
            this: object.this.clone(),
            name: object.text("name"),
            storage: object.reference("configManager.storageSystem"),
            connected: object.text("runtime.connectionState") == "connected",
            swap: object.reference("config.localSwapDatastore"),
            scratch: String::new(),
            lun: None,
            paths: 0,
            initiators: Vec::new(),
        };
        if host.connected
            && let Some(options) = object.reference("configManager.advancedOption")
        {
            host.scratch = scratch(soap, &options).await?;
        }
        if let Some(storage) = host.storage.clone() {
            devices(soap, &storage, naa, &mut host).await?;
        }
        found.push(host);
    }
    Ok(found)
}

async fn scratch(soap: &mut Soap, options: &Ref) -> Result<String, SoapError> {
    let answer = soap
        .read(
            "QueryOptions",
            options,
            "<name>ScratchConfig.CurrentScratchLocation</name>",
        )
        .await;
    match answer {
        Ok(answer) => Ok(answer
            .child("returnval")
            .and_then(|option| option.text_of("value"))
            .unwrap_or_default()
            .to_owned()),
        // A host without the option has no scratch on a datastore.
        Err(error) if error.is("InvalidName") => Ok(String::new()),
        Err(error) => Err(error),
    }
}

async fn devices(soap: &mut Soap, storage: &Ref, naa: &str, host: &mut Host) -> Result<(), SoapError> {
    const PATHS: [&str; 3] = [
        "storageDeviceInfo.scsiLun",
        "storageDeviceInfo.hostBusAdapter",
        "storageDeviceInfo.multipathInfo",
    ];
    let found = soap.properties(std::slice::from_ref(storage), &PATHS).await?;
    let object = found
        .first()
        .ok_or_else(|| missing("RetrievePropertiesEx", "HostStorageSystem"))?;
    let list = |path| {
        object
            .prop(path)
            .map(|list| list.children.as_slice())
            .unwrap_or_default()
    };
    let lun = list(PATHS[0]).iter().find(|lun| {
        lun.text_of("canonicalName")
            .is_some_and(|name| name.eq_ignore_ascii_case(naa))
    });
    if let Some(lun) = lun {
        let state = lun.text_of("operationalState").unwrap_or_default();
        let uuid = lun.text_of("uuid").unwrap_or_default().to_owned();
        host.lun = Some((uuid, state != "off"));
        let key = lun.text_of("key").unwrap_or_default();
        let paths = object
            .prop(PATHS[2])
            .map(|info| info.children.as_slice())
            .unwrap_or_default();
        let of_lun = paths
            .iter()
            .filter(|multi| multi.name == "lun" && multi.text_of("lun") == Some(key));
        host.paths = of_lun.map(|multi| multi.all("path").count()).sum();
    }
    let names = list(PATHS[1])
        .iter()
        .filter_map(|adapter| adapter.text_of("iScsiName"));
    host.initiators = names.filter(|name| !name.is_empty()).map(str::to_owned).collect();
    Ok(())
}

const MACHINE_PATHS: [&str; 17] = [
    "name",
    "config.instanceUuid",
    "config.uuid",
    "config.files",
    "config.template",
    "config.ftInfo",
    "config.hardware.device",
    "runtime.host",
    "runtime.powerState",
    "resourcePool",
    "parent",
    "layoutEx.file",
    "guest.toolsRunningStatus",
    "guest.ipAddress",
    "guest.hostName",
    "guest.net",
    "snapshot",
];

/// These VMs; one that is gone is left out.
pub(crate) async fn machines(soap: &mut Soap, of: &[Ref]) -> Result<Vec<Machine>, SoapError> {
    let found = soap.properties(of, &MACHINE_PATHS).await?;
    Ok(found.iter().map(machine).collect())
}

fn machine(object: &Object) -> Machine {
    let files = object.prop("config.files");
    let file = |name| {
        files
            .and_then(|files| files.text_of(name))
            .unwrap_or_default()
            .to_owned()
    };
    let layout = object
        .prop("layoutEx.file")
        .map(|list| list.children.as_slice())
        .unwrap_or_default();
    let mut all: Vec<String> = layout
        .iter()
        .filter_map(|file| file.text_of("name"))
        .map(str::to_owned)
        .collect();
    all.extend(["vmPathName", "snapshotDirectory", "suspendDirectory"].map(file));
    all.retain(|name| datastore_of(name).is_some());
    let net = object.prop("guest.net").map(Element::walk).unwrap_or_default();
    let more = net
        .iter()
        .filter(|element| element.name == "ipAddress")
        .map(|element| element.text.trim().to_owned());
    let mut addresses: Vec<String> = vec![object.text("guest.ipAddress"), object.text("guest.hostName")];
    addresses.extend(more);
    addresses.retain(|address| !address.is_empty());
    Machine {
        this: object.this.clone(),
        name: object.text("name"),
        instance_uuid: object.text("config.instanceUuid"),
        bios_uuid: object.text("config.uuid"),
        vmx: file("vmPathName"),
        host: object.reference("runtime.host"),
        pool: object.reference("resourcePool"),
        folder: object.reference("parent"),
        powered_on: object.text("runtime.powerState") == "poweredOn",
        template: object.text("config.template") == "true",
        fault_tolerant: object.prop("config.ftInfo").is_some(),
        tools: object.text("guest.toolsRunningStatus") == "guestToolsRunning",
        addresses,
        devices: object
            .prop("config.hardware.device")
            .map(|list| list.children.clone())
            .unwrap_or_default(),
        files: all,
        snapshots: object.prop("snapshot").map(snapshots).unwrap_or_default(),
    }
}

fn snapshots(tree: &Element) -> Vec<VmSnapshot> {
    let mut found = Vec::new();
    for element in tree.walk() {
        let entry = ["rootSnapshotList", "childSnapshotList"].contains(&element.name.as_str());
        if let (true, Some(this)) = (entry, element.child("snapshot").and_then(Ref::of)) {
            found.push(VmSnapshot {
                this,
                name: element.text_of("name").unwrap_or_default().to_owned(),
                created: element.text_of("createTime").unwrap_or_default().to_owned(),
            });
        }
    }
    found
}

/// What else lies on a datastore: configurations of VMs, and what hosts keep there.
pub(crate) struct Contents {
    /// Every `.vmx` and `.vmtx`.
    pub(crate) configurations: Vec<String>,
    /// vSphere HA keeps its heartbeats there.
    pub(crate) heartbeats: bool,
}

/// Looks through a datastore.
pub(crate) async fn contents(soap: &mut Soap, datastore: &Datastore) -> Result<Contents, SoapError> {
    let browser = datastore
        .browser
        .as_ref()
        .ok_or_else(|| missing("Datastore", "browser"))?;
    let patterns = ["*.vmx", "*.vmtx", "protectedlist", "host-*-hb", "host-*-poweron"];
    let found = soap
        .search(browser, &datastore.name, &patterns, SEARCH_TIME_MAX)
        .await?;
    let ends = |path: &str, end: &str| path.to_ascii_lowercase().ends_with(end);
    let (configurations, others): (Vec<String>, Vec<String>) = found
        .into_iter()
        .partition(|path| ends(path, ".vmx") || ends(path, ".vmtx"));
    Ok(Contents {
        configurations,
        heartbeats: others.iter().any(|path| path.contains(".vSphere-HA")),
    })
}

/// All VMs of the inventory, by their configuration.
pub(crate) async fn all_configurations(soap: &mut Soap) -> Result<Vec<String>, SoapError> {
    let found = soap.find_all("VirtualMachine", &["config.files"]).await?;
    let path = |object: &Object| {
        object
            .prop("config.files")
            .and_then(|files| files.text_of("vmPathName"))
            .map(str::to_owned)
    };
    Ok(found.iter().filter_map(path).collect())
}
