//! What keeps a VM out of a snapshot, and a LUN from a revert (agent-protocol.md §10), in words that say what to do.

use stillpoint_agentproto::ErrorCode;

use super::inventory::{Contents, Machine, View, datastore_of};
use super::settings::VmMode;
use super::soap::Ref;

/// Something in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Obstacle {
    /// The rule.
    pub(crate) code: ErrorCode,
    /// VM, host or datastore.
    pub(crate) subject: String,
    /// What, and what to do.
    pub(crate) text: String,
}

fn obstacle(code: ErrorCode, subject: &str, text: impl Into<String>) -> Obstacle {
    Obstacle {
        code,
        subject: subject.to_owned(),
        text: text.into(),
    }
}

/// What is wrong with the datastore itself: nothing can be done with it.
pub(crate) fn of_datastore(view: &View) -> Vec<Obstacle> {
    let datastore = &view.datastore;
    let mut found = Vec::new();
    if datastore.extents.len() != 1 {
        let text = format!(
            "the datastore lies on {} extents ({}): one LUN can be snapshotted only when it has exactly one; move its VMs to a \
             datastore of one extent",
            datastore.extents.len(),
            datastore.extents.join(", ")
        );
        found.push(obstacle(ErrorCode::LimitExtent, &datastore.name, text));
    }
    for host in view.hosts.iter().filter(|host| host.paths > 1) {
        let text = format!(
            "the host has {} paths to the LUN: agents and multipath cannot be used together, leave one portal",
            host.paths
        );
        found.push(obstacle(ErrorCode::LimitMpio, &host.name, text));
    }
    if view.machines.len() > super::inventory::MACHINES_MAX {
        let text = format!(
            "{} VMs are on the datastore: {} are the most that one snapshot can have",
            view.machines.len(),
            super::inventory::MACHINES_MAX
        );
        found.push(obstacle(ErrorCode::TooLarge, &datastore.name, text));
    }
    found
}

/// Why a VM cannot take part, all of it.
pub(crate) fn of_machine(machine: &Machine, view: &View, mode: VmMode) -> Vec<Obstacle> {
    let mut found = Vec::new();
    let mut add = |code, text: String| found.push(obstacle(code, &machine.name, text));
    if let Some(text) = spread(machine, view) {
        add(ErrorCode::LimitVmSpread, text);
    }
    for device in &machine.devices {
        if let Some(text) = of_device(device) {
            add(ErrorCode::NoQuiesce, text);
        }
    }
    if machine.fault_tolerant {
        add(
            ErrorCode::NoQuiesce,
            "vSphere Fault Tolerance is on: such a VM has no snapshots; switch it off".to_owned(),
        );
    }
    if machine.powered_on && !machine.tools && mode == VmMode::Quiesce {
        let text = "VMware Tools do not run in it, so its guest cannot be quiesced: install them, or give it the mode `memory` \
                    (stillpoint-agent vcenter set --vm)";
        add(ErrorCode::NoQuiesce, text.to_owned());
    }
    found
}

/// Files of a VM outside of the LUN, or of a VM of elsewhere on it.
fn spread(machine: &Machine, view: &View) -> Option<String> {
    let here = view.datastore.name.as_str();
    let mut disks: Vec<&str> = machine
        .devices
        .iter()
        .filter_map(|device| device.at(&["backing", "fileName"]))
        .map(|name| name.text.trim())
        .collect();
    // A CD image elsewhere is no part of the VM.
    disks.retain(|name| name.to_ascii_lowercase().ends_with(".vmdk"));
    let all = machine.files.iter().map(String::as_str).chain(disks);
    let elsewhere: Vec<&str> = all
        .filter_map(datastore_of)
        .filter(|name| *name != here)
        .collect();
    let first = elsewhere.first()?;
    Some(format!(
        "its configuration, disks and snapshots are not on one LUN ({here} and {first}): move it to one datastore"
    ))
}

fn of_device(device: &super::xml::Element) -> Option<String> {
    let label = device
        .at(&["deviceInfo", "label"])
        .map_or("a device", |label| label.text.trim());
    let kind = device.kind.as_deref().unwrap_or_default();
    if kind.contains("PCIPassthrough") {
        return Some(format!(
            "{label} is a PCI device passed through: such a VM has no snapshots while it runs; remove it"
        ));
    }
    if matches!(
        device.text_of("sharedBus"),
        Some("physicalSharing" | "virtualSharing")
    ) {
        return Some(format!(
            "{label} shares its bus with other VMs: such a VM has no snapshots; use in-guest iSCSI for the cluster's disks"
        ));
    }
    let backing = device.child("backing")?;
    if backing.text_of("compatibilityMode") == Some("physicalMode") {
        return Some(format!(
            "{label} is a raw device mapping in physical mode: it has no snapshots; snapshot its own LUN with an agent in the guest"
        ));
    }
    if backing
        .text_of("diskMode")
        .is_some_and(|mode| mode.starts_with("independent"))
    {
        return Some(format!(
            "{label} is an independent disk, which VM snapshots leave out: make it dependent"
        ));
    }
    None
}

/// Who must not lose the LUN: the vCenter, this agent, and what hosts keep on the datastore.
pub(crate) struct Residents<'a> {
    /// Host name of the vCenter, as set, and its addresses.
    pub(crate) vcenter: &'a [String],
    /// The SMBIOS UUID of this machine, if it has one.
    pub(crate) own_uuid: Option<&'a str>,
}

/// Why the LUN cannot be reverted while its hosts run.
pub(crate) fn of_revert(
    view: &View,
    contents: &Contents,
    who: &Residents<'_>,
    power_off: bool,
) -> Vec<Obstacle> {
    let mut found = of_datastore(view);
    let datastore = &view.datastore;
    for machine in &view.machines {
        let mut add = |code, text: String| found.push(obstacle(code, &machine.name, text));
        let is = |name: &String| who.vcenter.iter().any(|ours| ours.eq_ignore_ascii_case(name));
        if machine.addresses.iter().any(is) {
            add(ErrorCode::Unsupported, "it is the vCenter itself: it would be gone in the middle of the revert; move it to another datastore".to_owned());
        }
        if who
            .own_uuid
            .is_some_and(|uuid| same_uuid(uuid, &machine.bios_uuid))
        {
            add(ErrorCode::Unsupported, "this agent runs in it: it would be gone in the middle of the revert; move it to another datastore".to_owned());
        }
        if let Some(text) = spread(machine, view) {
            add(ErrorCode::LimitVmSpread, text);
        }
        let resident = datastore_of(&machine.vmx) == Some(datastore.name.as_str());
        if machine.powered_on && !power_off && resident {
            add(
                ErrorCode::WrongState,
                "it runs: shut it down, or allow the revert to power it off (--power-off)".to_owned(),
            );
        }
        if machine.host.is_none() || machine.folder.is_none() || (machine.pool.is_none() && !machine.template)
        {
            add(ErrorCode::WrongState, "the vCenter does not say where it belongs (no host, folder or pool): it could not be registered again".to_owned());
        }
    }
    of_hosts(view, &mut found);
    if contents.heartbeats {
        found.push(obstacle(
            ErrorCode::Unsupported,
            &datastore.name,
            "vSphere HA keeps heartbeats on it: choose other heartbeat datastores for the cluster first",
        ));
    }
    found
}

fn of_hosts(view: &View, found: &mut Vec<Obstacle>) {
    let datastore = &view.datastore;
    let keeps = |place: &Ref| *place == datastore.this;
    for host in &view.hosts {
        let mut add = |code, text: &str| found.push(obstacle(code, &host.name, text));
        if !host.connected {
            add(
                ErrorCode::Unreachable,
                "the vCenter does not reach the host, which may use the LUN: bring it back, or remove it from the inventory",
            );
        }
        if host.swap.as_ref().is_some_and(keeps) {
            add(
                ErrorCode::Unsupported,
                "its VMs swap on the datastore: choose another swap datastore for the host",
            );
        }
        let scratch = host.scratch.trim_start_matches("/vmfs/volumes/");
        let place = scratch.split('/').next().unwrap_or_default();
        if !place.is_empty() && (place == datastore.uuid || place == datastore.name) {
            add(
                ErrorCode::Unsupported,
                "its scratch files are on the datastore: set ScratchConfig.ConfiguredScratchLocation elsewhere and restart it",
            );
        }
        if host.storage.is_none() || host.lun.is_none() {
            add(
                ErrorCode::IdentityMismatch,
                "it has the datastore, but not the LUN among its devices: rescan it",
            );
        }
    }
}

/// Linux and Windows show the first three fields of an SMBIOS UUID in either order of bytes.
fn same_uuid(a: &str, b: &str) -> bool {
    let digits = |text: &str| {
        text.chars()
            .filter(char::is_ascii_hexdigit)
            .collect::<String>()
            .to_ascii_lowercase()
    };
    let (a, b) = (digits(a), digits(b));
    let swapped = |text: &str| -> Option<String> {
        let bytes: Vec<&str> = (0..16)
            .map(|at| text.get(at * 2..at * 2 + 2))
            .collect::<Option<_>>()?;
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        order.iter().map(|at: &usize| bytes.get(*at).copied()).collect()
    };
    a.len() == 32 && (a == b || swapped(&a).as_deref() == Some(b.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_compared_in_both_orders_of_bytes() {
        let shown = "564d1234-5678-9abc-def0-112233445566";
        assert!(same_uuid(shown, &shown.to_uppercase()));
        assert!(same_uuid("34124d56-7856-bc9a-def0-112233445566", shown));
        assert!(!same_uuid("", "") && !same_uuid(shown, "564d1234-5678-9abc-def0-112233445567"));
    }
}
