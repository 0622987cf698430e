//! What the kernel says about block devices: `/sys/dev/block/MAJ:MIN` → partition → dm, LVM, md, loop → SCSI disk → LUN.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::mountinfo::DeviceNumber;

/// How far down a stack of devices (LVM on LUKS on multipath on …) is followed. The kernel's own limit for dm is lower.
const STACK_DEPTH_MAX: usize = 16;

/// A view of `/sys`, `/proc`, `/etc` and `/dev` below some root: `/` in service, a made-up tree in tests.
#[derive(Debug, Clone)]
pub(crate) struct Root(PathBuf);

/// A disk, as its SCSI identity pages and its iSCSI session describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Kernel name (`sda`).
    pub(crate) name: String,
    /// Page 0x83 NAA designator: `naa.` and hex digits, lower case.
    pub(crate) naa: String,
    /// Page 0x80.
    pub(crate) serial: Option<String>,
    /// Vendor in its INQUIRY data.
    pub(crate) vendor: String,
    /// Capacity, bytes.
    pub(crate) size_bytes: u64,
    /// The iSCSI path it is reached by; `None` for other transports.
    pub(crate) path: Option<IscsiPath>,
}

/// Where the initiator reaches a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IscsiPath {
    /// The target's name.
    pub(crate) target: String,
    /// The initiator's name in this session.
    pub(crate) initiator: Option<String>,
    /// LUN number.
    pub(crate) lun: u64,
}

/// The bottom of a stack of devices.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Ground {
    /// Kernel names of the whole disks at the bottom.
    pub(crate) disks: BTreeSet<String>,
    /// A dm-multipath map lies between.
    pub(crate) multipath: bool,
    /// A suspended device-mapper table lies between: somebody else holds its I/O.
    pub(crate) suspended: Option<String>,
    /// Loop devices on the way: each is a file system inside a file of another file system.
    pub(crate) loops: usize,
}

impl Root {
    /// The real one.
    pub(crate) fn real() -> Self {
        Self(PathBuf::from("/"))
    }

    /// A made-up tree.
    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// `path` (absolute) below this root.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    /// A whole small text file, trimmed; `None` when it cannot be read.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        read_text(&self.path(path))
    }

    /// Every whole disk with a NAA designator.
    pub(crate) fn disks(&self) -> Vec<Disk> {
        let mut disks: Vec<Disk> = names(&self.path("/sys/block"))
            .iter()
            .filter_map(|name| self.disk(name))
            .collect();
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        disks
    }

    /// The initiator names of live iSCSI sessions and of `/etc/iscsi/initiatorname.iscsi`.
    pub(crate) fn initiators(&self) -> BTreeSet<String> {
        let sessions = names(&self.path("/sys/class/iscsi_session"));
        let live = sessions
            .iter()
            .filter_map(|s| self.text(&format!("/sys/class/iscsi_session/{s}/initiatorname")));
        let configured = self.text("/etc/iscsi/initiatorname.iscsi").unwrap_or_default();
        let configured = configured
            .lines()
            .filter_map(|l| l.trim().strip_prefix("InitiatorName="))
            .map(str::to_owned);
        live.chain(configured)
            .map(|name| name.trim().to_owned())
            .filter(|n| !n.is_empty() && n != "(null)")
            .collect()
    }

    /// Follows a device down to its disks; `stop` names devices (by kernel name) that count as disks themselves.
    pub(crate) fn ground(&self, dev: DeviceNumber, stop: &BTreeSet<String>) -> Ground {
        let mut ground = Ground::default();
        if let Ok(node) = fs::canonicalize(self.path(&format!("/sys/dev/block/{dev}"))) {
            self.descend(&node, stop, STACK_DEPTH_MAX, &mut ground);
        }
        ground
    }

    fn descend(&self, node: &Path, stop: &BTreeSet<String>, depth: usize, ground: &mut Ground) {
        let Some(depth) = depth.checked_sub(1) else { return };
        let node = if node.join("partition").exists() {
            node.parent().unwrap_or(node)
        } else {
            node
        };
        let name = node
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if stop.contains(&name) {
            ground.disks.insert(name);
            return;
        }
        let dm_uuid = read_text(&node.join("dm/uuid")).unwrap_or_default();
        // kpartx names its maps part1-mpath-…; the map itself is mpath-….
        ground.multipath |= dm_uuid.starts_with("mpath-");
        if read_text(&node.join("dm/suspended")).as_deref() == Some("1") {
            ground.suspended = Some(read_text(&node.join("dm/name")).unwrap_or_else(|| name.clone()));
        }
        if let Some(below) = self.loop_file_device(node) {
            ground.loops += 1;
            return self.descend(&below, stop, depth, ground);
        }
        let slaves = names(&node.join("slaves"));
        for slave in &slaves {
            if let Ok(slave) = fs::canonicalize(node.join("slaves").join(slave)) {
                self.descend(&slave, stop, depth, ground);
            }
        }
        if slaves.is_empty() {
            ground.disks.insert(name);
        }
    }

    /// For a loop device: the device below the file system that its backing file lies on.
    fn loop_file_device(&self, node: &Path) -> Option<PathBuf> {
        use std::os::unix::fs::MetadataExt;
        let file = read_text(&node.join("loop/backing_file"))?;
        let dev = DeviceNumber::from_raw(fs::metadata(self.path(&file)).ok()?.dev());
        fs::canonicalize(self.path(&format!("/sys/dev/block/{dev}"))).ok()
    }

    /// The devices of the btrfs that has `source` as one of its devices: its `st_dev` is anonymous.
    pub(crate) fn btrfs_devices(&self, source: &str) -> Vec<DeviceNumber> {
        let source = fs::canonicalize(self.path(source)).unwrap_or_else(|_| PathBuf::from(source));
        let Some(name) = source.file_name().map(|n| n.to_string_lossy().into_owned()) else {
            return Vec::new();
        };
        for uuid in names(&self.path("/sys/fs/btrfs")) {
            let devices = self.path(&format!("/sys/fs/btrfs/{uuid}/devices"));
            let members = names(&devices);
            if members.contains(&name) {
                let numbers = members
                    .iter()
                    .filter_map(|m| read_text(&devices.join(m).join("dev")));
                return numbers.filter_map(|n| DeviceNumber::parse(&n)).collect();
            }
        }
        Vec::new()
    }

    /// The kernel name of a block device node, or of the loop device over a regular file.
    pub(crate) fn block_name(&self, path: &Path) -> Option<String> {
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let path = fs::canonicalize(path).ok()?;
        let meta = fs::metadata(&path).ok()?;
        if meta.file_type().is_block_device() {
            let node = self.path(&format!("/sys/dev/block/{}", DeviceNumber::from_raw(meta.rdev())));
            return Some(
                fs::canonicalize(node)
                    .ok()?
                    .file_name()?
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        let backed_by = |name: &String| {
            let file = self.text(&format!("/sys/block/{name}/loop/backing_file"));
            file.is_some_and(|file| Path::new(&file) == path)
        };
        names(&self.path("/sys/block")).into_iter().find(backed_by)
    }

    /// Capacity of a whole device, bytes.
    pub(crate) fn size_bytes(&self, name: &str) -> u64 {
        let sectors = self
            .text(&format!("/sys/block/{name}/size"))
            .and_then(|t| t.parse::<u64>().ok());
        // The file counts sectors of 512 bytes, whatever the disk's block size is.
        sectors.unwrap_or_default().saturating_mul(512)
    }

    fn disk(&self, name: &str) -> Option<Disk> {
        let device = self.path(&format!("/sys/block/{name}/device"));
        let page83 = fs::read(device.join("vpd_pg83")).ok();
        let naa = page83
            .as_deref()
            .and_then(naa_of_page83)
            .or_else(|| naa_of_wwid(&device))?;
        let page80 = fs::read(device.join("vpd_pg80")).ok();
        let serial = page80.and_then(|page| Some(String::from_utf8_lossy(page.get(4..)?).trim().to_owned()));
        let vendor = read_text(&device.join("vendor")).unwrap_or_default();
        let size_bytes = self.size_bytes(name);
        Some(Disk {
            name: name.to_owned(),
            naa,
            serial,
            vendor,
            size_bytes,
            path: self.iscsi_path(&device),
        })
    }

    /// The device directory is `…/sessionN/targetH:C:T/H:C:T:L` when iSCSI carries it.
    fn iscsi_path(&self, device: &Path) -> Option<IscsiPath> {
        let device = fs::canonicalize(device).ok()?;
        let lun = device.file_name()?.to_str()?.rsplit(':').next()?.parse().ok()?;
        let session = device
            .iter()
            .filter_map(|part| part.to_str())
            .find(|part| is_session(part))?
            .to_owned();
        let target = self.text(&format!("/sys/class/iscsi_session/{session}/targetname"))?;
        let initiator = self.text(&format!("/sys/class/iscsi_session/{session}/initiatorname"));
        Some(IscsiPath {
            target,
            initiator,
            lun,
        })
    }
}

fn is_session(part: &str) -> bool {
    part.strip_prefix("session")
        .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn naa_of_wwid(device: &Path) -> Option<String> {
    let wwid = read_text(&device.join("wwid"))?.to_ascii_lowercase();
    wwid.starts_with("naa.").then_some(wwid)
}

/// The NAA designator of the logical unit in a page 0x83 (SPC-4 §7.8.6): association 0, type 3, binary.
/// The longest wins: a NAA-6 designator names the LUN, a NAA-5 beside it may name the port's vendor.
pub(crate) fn naa_of_page83(page: &[u8]) -> Option<String> {
    let length = usize::from(u16::from_be_bytes([*page.get(2)?, *page.get(3)?]));
    let mut rest = page.get(4..)?;
    rest = rest.get(..length.min(rest.len()))?;
    let mut best: Option<&[u8]> = None;
    while let [code_set, kind, _, len, tail @ ..] = rest {
        let Some(value) = tail.get(..usize::from(*len)) else {
            break;
        };
        let is_naa = code_set & 0x0f == 1 && kind & 0x3f == 3;
        if is_naa && best.is_none_or(|best| best.len() < value.len()) {
            best = Some(value);
        }
        rest = tail.get(usize::from(*len)..).unwrap_or_default();
    }
    best.map(|value| format!("naa.{}", data_encoding::HEXLOWER.encode(value)))
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
}

fn read_text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page as LIO answers it: T10 vendor id, NAA-6, and a relative port (association 1).
    const PAGE: &[u8] = &[
        0x00, 0x83, 0x00, 0x28, // header: 40 bytes follow
        0x02, 0x01, 0x00, 0x08, b'S', b'T', b'I', b'L', b'L', b'P', b'N', b'T', // T10
        0x01, 0x03, 0x00, 0x10, 0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, // NAA
        0x51, 0x94, 0x00, 0x04, 0, 0, 0, 1, // relative target port
    ];

    #[test]
    fn naa_designator_of_the_unit_is_found() {
        assert_eq!(
            naa_of_page83(PAGE).as_deref(),
            Some("naa.600102030405060708090a0b0c0d0e0f")
        );
    }

    #[test]
    fn no_prefix_and_no_flipped_bit_panics() {
        for end in 0..PAGE.len() {
            let _ = naa_of_page83(&PAGE[..end]);
            for bit in 0..8 {
                let mut page = PAGE.to_vec();
                page[end] ^= 1 << bit;
                let _ = naa_of_page83(&page);
            }
        }
    }

    #[test]
    fn port_designators_do_not_name_the_unit() {
        let mut page = PAGE.to_vec();
        page[17] = 0x13; // association 1: a port's NAA
        assert_eq!(naa_of_page83(&page), None);
    }
}
