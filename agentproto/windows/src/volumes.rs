//! Disks and volumes of this host as the rules see them. Reading them is `win::disks`.

use stillpoint_agentproto::LunId;
use stillpoint_agentproto::message::Mount;

use crate::lun_info::LunInfo;

/// What Stillpoint's LUNs say as vendor in INQUIRY.
pub(crate) const VENDOR: &str = "STILLPNT";

/// This host as it is. (The modules shared with the Linux agent read theirs below a root directory.)
pub(crate) struct Root;

impl Root {
    /// The host.
    pub(crate) fn real() -> Self {
        Self
    }
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// `\\.\PhysicalDriveN`.
    pub(crate) number: u32,
    /// The NAA designator of page 0x83.
    pub(crate) lun: LunId,
    /// The rest of what it says about itself.
    pub(crate) info: LunInfo,
    /// Its length in bytes.
    pub(crate) size_bytes: Option<u64>,
    /// Claimed by MPIO.
    pub(crate) multipath: bool,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// `\\?\Volume{…}\`: what VSS calls it.
    pub(crate) name: String,
    /// Drive letters and folders, with a backslash at the end.
    pub(crate) mounts: Vec<String>,
    /// NTFS, ReFS, CSVFS …
    pub(crate) file_system: String,
    /// No writes.
    pub(crate) read_only: bool,
    /// Every LUN that it lies on.
    pub(crate) luns: Vec<LunId>,
    /// Whether it also lies on something that is no LUN of a target.
    pub(crate) elsewhere: bool,
}

impl Volume {
    /// A cluster shared volume: several hosts write.
    pub(crate) fn is_cluster(&self) -> bool {
        self.file_system.eq_ignore_ascii_case("CSVFS")
    }

    /// What people call it.
    pub(crate) fn label(&self) -> &str {
        self.mounts.first().unwrap_or(&self.name)
    }

    /// As the protocol shows it.
    pub(crate) fn mount(&self) -> Mount {
        Mount {
            path: self.label().to_owned(),
            file_system: self.file_system.to_lowercase(),
            device: self.name.clone(),
            read_only: self.read_only,
            cluster: self.is_cluster(),
        }
    }
}

/// Everything of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Inventory {
    /// Disks with an NAA designator.
    pub(crate) disks: Vec<Disk>,
    /// Volumes.
    pub(crate) volumes: Vec<Volume>,
}

impl Inventory {
    /// The disk that a LUN is.
    pub(crate) fn disk(&self, lun: LunId) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.lun == lun)
    }

    /// The volumes that lie on one of these LUNs.
    pub(crate) fn on<'a>(&'a self, luns: &'a [LunId]) -> impl Iterator<Item = &'a Volume> {
        let lies_on = |volume: &&Volume| volume.luns.iter().any(|lun| luns.contains(lun));
        self.volumes.iter().filter(lies_on)
    }

    /// Of these LUNs, those with a volume.
    pub(crate) fn mounted(&self, luns: &[LunId]) -> Vec<LunId> {
        let used = |lun: &&LunId| self.volumes.iter().any(|volume| volume.luns.contains(lun));
        luns.iter().filter(used).copied().collect()
    }

    /// Disks that say they are Stillpoint's.
    pub(crate) fn stillpoint_luns(&self) -> Vec<LunId> {
        let ours = self.disks.iter().filter(|disk| disk.info.vendor == VENDOR);
        ours.map(|disk| disk.lun).collect()
    }

    /// The volume that a path lies on: the one with the longest mount that begins it. Windows' names have no case.
    pub(crate) fn volume_of(&self, path: &str) -> Option<&Volume> {
        let of = |volume: &Volume| {
            let mounts = volume.mounts.iter().chain(std::iter::once(&volume.name));
            mounts
                .filter(|mount| begins(path, mount))
                .map(|mount| mount.len())
                .max()
        };
        let volumes = self
            .volumes
            .iter()
            .filter_map(|volume| Some((of(volume)?, volume)));
        volumes.max_by_key(|(len, _)| *len).map(|(_, volume)| volume)
    }
}

/// Whether `path` lies in the folder `mount`.
fn begins(path: &str, mount: &str) -> bool {
    let mount = mount.trim_end_matches('\\');
    let Some(start) = path.get(..mount.len()) else {
        return false;
    };
    let rest = path.get(mount.len()..).unwrap_or_default();
    start.eq_ignore_ascii_case(mount) && (rest.is_empty() || rest.starts_with('\\'))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn lun(byte: u8) -> LunId {
        let mut id = [byte; 16];
        id[0] = 0x60;
        LunId(id)
    }

    pub(crate) fn disk(byte: u8) -> Disk {
        Disk {
            number: u32::from(byte),
            lun: lun(byte),
            info: LunInfo::of_lun(lun(byte), "0001"),
            size_bytes: Some(1 << 30),
            multipath: false,
        }
    }

    pub(crate) fn volume(mount: &str, luns: &[LunId]) -> Volume {
        Volume {
            name: format!(r"\\?\Volume{{{}}}\", mount.len()),
            mounts: vec![mount.to_owned()],
            file_system: "NTFS".to_owned(),
            read_only: false,
            luns: luns.to_vec(),
            elsewhere: luns.is_empty(),
        }
    }

    #[test]
    fn a_path_lies_on_the_volume_with_the_longest_mount() {
        let inventory = Inventory {
            disks: vec![disk(1)],
            volumes: vec![volume(r"C:\", &[]), volume(r"C:\Data\", &[lun(1)])],
        };
        let mount = |path| inventory.volume_of(path).map(Volume::label);
        assert_eq!(mount(r"c:\data\sales.mdf"), Some(r"C:\Data\"));
        assert_eq!(mount(r"C:\DATA"), Some(r"C:\Data\"));
        assert_eq!(
            mount(r"C:\Database\x"),
            Some(r"C:\"),
            "a longer name is no folder of it"
        );
        assert_eq!(mount(r"D:\x"), None);
        assert_eq!(mount("C:\\Dät"), Some(r"C:\"));
        assert_eq!(inventory.mounted(&[lun(1), lun(2)]), [lun(1)]);
    }
}
