//! Which mounted file systems lie on which LUNs of this host.
//!
//! A mount is followed from its superblock's device number through partitions, device-mapper, LVM, md and loop devices
//! to whole disks, and a disk is a LUN by its page 0x83 NAA designator (agent-protocol.md §4). Device names and mount
//! sources are never trusted for this: they differ from boot to boot.

mod mountinfo;
mod sysfs;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

pub(crate) use mountinfo::{DeviceNumber, Mount};
pub(crate) use sysfs::{Disk, Root};

/// The vendor of every Stillpoint LUN (INQUIRY).
const VENDOR: &str = "STILLPNT";
/// File systems whose superblock implements the freeze (agent-protocol.md §11).
const FREEZABLE: [&str; 8] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2"];

/// A device without page 0x83 that stands for a LUN: only tests need it (a loop device over a FUSE export).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TestLun {
    /// A block device, or the regular file behind a loop device.
    pub(crate) path: PathBuf,
    /// `naa.` and hex digits.
    pub(crate) naa: String,
}

/// A mounted file system (one superblock) on at least one LUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// The superblock's device number.
    pub(crate) dev: DeviceNumber,
    /// Where it is mounted, best place first (a mount of its root, nearest to `/`).
    pub(crate) points: Vec<PathBuf>,
    /// `ext4`, `xfs`, …
    pub(crate) fs_type: String,
    /// The device as the mounter named it.
    pub(crate) source: String,
    /// The superblock is read-only: nothing to freeze.
    pub(crate) read_only: bool,
    /// Every LUN that a part of it lies on.
    pub(crate) naas: BTreeSet<String>,
    /// It lies on disks that are not LUNs, too.
    pub(crate) other_disks: BTreeSet<String>,
    /// It is reached through dm-multipath.
    pub(crate) multipath: bool,
    /// A device-mapper table below it that somebody suspended.
    pub(crate) suspended: Option<String>,
    /// It is mounted only in another mount namespace: the process to ask.
    pub(crate) foreign: Option<String>,
    /// Nesting: loop devices below it, then mounts above it.
    order: (usize, usize, u32),
}

impl Volume {
    /// Where it is mounted, for people.
    pub(crate) fn name(&self) -> String {
        self.points
            .first()
            .map(|p| p.display().to_string())
            .unwrap_or_default()
    }

    /// Can FIFREEZE hold it?
    pub(crate) fn is_freezable(&self) -> bool {
        FREEZABLE.contains(&self.fs_type.as_str())
    }

    /// Must FIFREEZE hold it? A read-only superblock of another kind has nothing to hold.
    pub(crate) fn needs_freeze(&self) -> bool {
        !self.read_only
    }
}

/// What this host has.
#[derive(Debug, Default, Clone)]
pub(crate) struct Inventory {
    /// LUNs, one entry per path.
    pub(crate) disks: Vec<Disk>,
    /// File systems on them.
    pub(crate) volumes: Vec<Volume>,
}

impl Inventory {
    /// Reads it afresh: mounts come and go, so nothing is cached between two snapshots.
    pub(crate) fn read(root: &Root, test_luns: &[TestLun]) -> Self {
        let mut disks = root.disks();
        disks.extend(test_luns.iter().filter_map(|lun| test_disk(root, lun)));
        let by_name: BTreeMap<_, _> = disks.iter().map(|d| (d.name.clone(), d.naa.clone())).collect();
        let here = Self::mounts(root);
        let mut volumes = volumes_of(root, &here, &by_name);
        let known: BTreeSet<_> = here.iter().map(|mount| mount.dev).collect();
        for (owner, mounts) in other_namespaces(root) {
            let unseen: Vec<_> = mounts
                .into_iter()
                .filter(|mount| !known.contains(&mount.dev))
                .collect();
            for mut volume in volumes_of(root, &unseen, &by_name) {
                if !volumes.iter().any(|v| v.dev == volume.dev) {
                    volume.foreign = Some(owner.clone());
                    volumes.push(volume);
                }
            }
        }
        Self { disks, volumes }
    }

    /// The mounts of our own namespace.
    pub(crate) fn mounts(root: &Root) -> Vec<Mount> {
        mountinfo::parse(&root.text("/proc/self/mountinfo").unwrap_or_default())
    }

    /// The paths to a LUN.
    pub(crate) fn paths<'a>(&'a self, naa: &'a str) -> impl Iterator<Item = &'a Disk> {
        self.disks.iter().filter(move |disk| disk.naa == naa)
    }

    /// The LUNs of Stillpoint targets, each once.
    pub(crate) fn stillpoint_luns(&self) -> BTreeSet<&str> {
        self.disks
            .iter()
            .filter(|disk| disk.vendor == VENDOR)
            .map(|disk| disk.naa.as_str())
            .collect()
    }

    /// The file systems on a LUN.
    pub(crate) fn on<'a>(&'a self, naa: &'a str) -> impl Iterator<Item = &'a Volume> {
        self.volumes
            .iter()
            .filter(move |volume| volume.naas.contains(naa))
    }

    /// The file systems on any of these LUNs in the order of freezing: innermost first, outermost last.
    ///
    /// A file system inside a file of another one comes before it, or its dirty pages would meet a frozen file system.
    pub(crate) fn freeze_order(&self, naas: &BTreeSet<String>) -> Vec<&Volume> {
        let mut volumes: Vec<_> = self
            .volumes
            .iter()
            .filter(|v| !v.naas.is_disjoint(naas))
            .collect();
        volumes.sort_by_key(|volume| std::cmp::Reverse(volume.order));
        volumes
    }
}

/// Opens a mount point and makes sure that it leads to the file system `dev`: another mount may cover it.
///
/// A btrfs gives every subvolume a number of its own in `st_dev`, and only its superblock's in mountinfo: with major
/// number 0 nothing can be compared.
pub(crate) fn open(point: &Path, dev: DeviceNumber) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let dir = rustix::fs::open(point, flags, rustix::fs::Mode::empty())?;
    let found = DeviceNumber::from_raw(rustix::fs::fstat(&dir)?.st_dev);
    if dev.major != 0 && found != dev {
        let text = format!(
            "{} leads to device {found}, not {dev}: another mount covers it",
            point.display()
        );
        return Err(io::Error::other(text));
    }
    Ok(dir)
}

fn test_disk(root: &Root, lun: &TestLun) -> Option<Disk> {
    let name = root.block_name(&lun.path)?;
    let size_bytes = root.size_bytes(&name);
    Some(Disk {
        name,
        naa: lun.naa.clone(),
        serial: None,
        vendor: VENDOR.to_owned(),
        size_bytes,
        path: None,
    })
}

/// Groups the mounts of one namespace by superblock and keeps those that lie on a LUN.
fn volumes_of(root: &Root, mounts: &[Mount], luns: &BTreeMap<String, String>) -> Vec<Volume> {
    let stop: BTreeSet<String> = luns.keys().cloned().collect();
    let mut superblocks: BTreeMap<DeviceNumber, Vec<&Mount>> = BTreeMap::new();
    for mount in mounts {
        superblocks.entry(mount.dev).or_default().push(mount);
    }
    let volume = |(dev, of): (DeviceNumber, Vec<&Mount>)| volume(root, dev, of, mounts, &stop, luns);
    superblocks.into_iter().filter_map(volume).collect()
}

fn volume(
    root: &Root,
    dev: DeviceNumber,
    mut of: Vec<&Mount>,
    all: &[Mount],
    stop: &BTreeSet<String>,
    luns: &BTreeMap<String, String>,
) -> Option<Volume> {
    of.sort_by_key(|mount| (mount.root.as_os_str() != "/", depth(mount, all), mount.id));
    let first = *of.first()?;
    let devices = if dev.major == 0 && first.fs_type == "btrfs" {
        root.btrfs_devices(&first.source)
    } else {
        vec![dev]
    };
    let grounds: Vec<_> = devices.into_iter().map(|dev| root.ground(dev, stop)).collect();
    let disks: BTreeSet<&String> = grounds.iter().flat_map(|ground| &ground.disks).collect();
    let naas: BTreeSet<String> = disks.iter().filter_map(|name| luns.get(*name).cloned()).collect();
    if naas.is_empty() {
        return None;
    }
    Some(Volume {
        dev,
        points: of.iter().map(|mount| mount.point.clone()).collect(),
        fs_type: first.fs_type.clone(),
        source: first.source.clone(),
        read_only: first.read_only,
        naas,
        other_disks: disks
            .into_iter()
            .filter(|name| !luns.contains_key(*name))
            .cloned()
            .collect(),
        multipath: grounds.iter().any(|ground| ground.multipath),
        suspended: grounds.iter().find_map(|ground| ground.suspended.clone()),
        foreign: None,
        order: (
            grounds.iter().map(|g| g.loops).max().unwrap_or_default(),
            depth(first, all),
            first.id,
        ),
    })
}

/// Mounts between this one and the root of its namespace.
fn depth(mount: &Mount, all: &[Mount]) -> usize {
    let by_id: BTreeMap<u32, u32> = all.iter().map(|m| (m.id, m.parent)).collect();
    let parents = std::iter::successors(Some(mount.parent), |id| by_id.get(id).copied());
    // The topmost mount may be its own parent: a chain is never longer than the list.
    parents
        .take_while(|id| by_id.contains_key(id))
        .take(all.len())
        .count()
}

/// The mounts of every other mount namespace, with the name of one process in each.
///
/// A LUN mounted only inside a container has a writer that this agent would not see otherwise, and the label on the
/// snapshot would be a lie.
fn other_namespaces(root: &Root) -> Vec<(String, Vec<Mount>)> {
    let namespace = |pid: &str| std::fs::read_link(root.path(&format!("/proc/{pid}/ns/mnt"))).ok();
    let mut seen: BTreeSet<PathBuf> = namespace("self").into_iter().collect();
    let Ok(processes) = std::fs::read_dir(root.path("/proc")) else {
        return Vec::new();
    };
    let mut others = Vec::new();
    for process in processes.flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|b| b.is_ascii_digit()) || !namespace(&pid).is_some_and(|ns| seen.insert(ns)) {
            continue;
        }
        let comm = root.text(&format!("/proc/{pid}/comm")).unwrap_or_default();
        let mounts = root.text(&format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        others.push((format!("{comm} (pid {pid})"), mountinfo::parse(&mounts)));
    }
    others
}

/// A mount of some file system at this place.
#[cfg(test)]
pub(crate) fn mount_for_tests(id: u32, point: &str) -> Mount {
    let line = format!("{id} 0 8:{id} / {point} rw - ext4 /dev/sda rw");
    mountinfo::parse(&line).pop().expect("a line of mountinfo")
}

#[cfg(test)]
pub(crate) mod tests;
