//! Made-up hosts: a sysfs tree of symbolic links, as the kernel lays it out.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

/// Builds `/sys`, `/proc` and `/etc` of a host below a temporary directory.
pub(crate) struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        let host = Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        };
        for dir in [
            "sys/block",
            "sys/dev/block",
            "sys/class/iscsi_session",
            "proc/self/ns",
            "etc/iscsi",
        ] {
            fs::create_dir_all(host.dir.path().join(dir)).expect("mkdir");
        }
        host.write(
            "etc/iscsi/initiatorname.iscsi",
            "## comment\nInitiatorName=iqn.2026-01.host:conf\n",
        );
        host
    }

    pub(crate) fn root(&self) -> Root {
        Root::at(self.dir.path())
    }

    pub(crate) fn write(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
        fs::write(path, bytes).expect("write");
    }

    fn link(&self, target: impl AsRef<Path>, link: &str) {
        let link = self.dir.path().join(link);
        fs::create_dir_all(link.parent().expect("a parent")).expect("mkdir");
        symlink(target, link).expect("symlink");
    }

    fn abs(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// A disk of iSCSI session `n` with a NAA id that ends in `id`, and one partition (minor + 1).
    pub(crate) fn lun(&self, name: &str, minor: u32, n: u32, id: u8) {
        let device = format!("sys/devices/platform/host{n}/session{n}/target{n}:0:0/{n}:0:0:0");
        let mut page = vec![0, 0x83, 0, 20, 1, 3, 0, 16];
        page.extend([0x60; 15]);
        page.push(id);
        self.write(&format!("{device}/vpd_pg83"), page);
        self.write(&format!("{device}/vpd_pg80"), b"\x00\x80\x00\x04S123");
        self.write(&format!("{device}/vendor"), "STILLPNT\n");
        let disk = format!("{device}/block/{name}");
        self.write(&format!("{disk}/size"), "2097152\n");
        self.write(&format!("{disk}/{name}1/partition"), "1\n");
        self.link(self.abs(&device), &format!("{disk}/device"));
        self.link(self.abs(&disk), &format!("sys/block/{name}"));
        self.link(self.abs(&disk), &format!("sys/dev/block/8:{minor}"));
        self.link(
            self.abs(&format!("{disk}/{name}1")),
            &format!("sys/dev/block/8:{}", minor + 1),
        );
        self.write(
            &format!("sys/class/iscsi_session/session{n}/targetname"),
            "iqn.2026-11.t:sql\n",
        );
        self.write(
            &format!("sys/class/iscsi_session/session{n}/initiatorname"),
            "iqn.2026-01.host:live\n",
        );
    }

    /// A disk without identity, as a virtio disk is.
    fn plain_disk(&self, name: &str, major: u32) {
        let disk = format!("sys/devices/virtual/block/{name}");
        self.write(&format!("{disk}/size"), "8\n");
        self.link(self.abs(&disk), &format!("sys/block/{name}"));
        self.link(self.abs(&disk), &format!("sys/dev/block/{major}:0"));
    }

    /// A device-mapper map over other devices (paths below `sys/dev/block`).
    pub(crate) fn dm(&self, minor: u32, uuid: &str, over: &[&str]) {
        let node = format!("sys/devices/virtual/block/dm-{minor}");
        self.write(&format!("{node}/dm/uuid"), uuid);
        self.write(&format!("{node}/dm/name"), format!("map{minor}"));
        self.write(&format!("{node}/dm/suspended"), "0\n");
        for number in over {
            let below =
                fs::canonicalize(self.abs(&format!("sys/dev/block/{number}"))).expect("a device below");
            let name = below.file_name().expect("a name").to_string_lossy().into_owned();
            self.link(&below, &format!("{node}/slaves/{name}"));
        }
        self.link(self.abs(&node), &format!("sys/block/dm-{minor}"));
        self.link(self.abs(&node), &format!("sys/dev/block/253:{minor}"));
    }

    pub(crate) fn mounts(&self, text: &str) {
        self.write("proc/self/mountinfo", text);
    }

    pub(crate) fn read(&self) -> Inventory {
        Inventory::read(&self.root(), &[])
    }
}

/// The NAA id that [`Host::lun`] makes.
pub(crate) fn naa(id: u8) -> String {
    format!("naa.{}{id:02x}", "60".repeat(15))
}

fn names(volumes: &[&Volume]) -> Vec<String> {
    volumes.iter().map(|v| v.name()).collect()
}

#[test]
fn partition_leads_to_its_lun_with_identity_and_path() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.mounts("1 1 254:0 / / rw - ext4 /dev/vda rw\n2 1 8:1 / /data rw - ext4 /dev/sda1 rw\n");
    let inventory = host.read();
    assert_eq!(inventory.volumes.len(), 1, "the root file system is on no LUN");
    assert_eq!(inventory.volumes[0].naas, BTreeSet::from([naa(7)]));
    assert_eq!(Vec::from_iter(inventory.stillpoint_luns()), [naa(7).as_str()]);
    let id = naa(7);
    let disk = inventory.paths(&id).next().expect("the disk");
    assert_eq!(disk.size_bytes, 1 << 30);
    assert_eq!(disk.serial.as_deref(), Some("S123"));
    let path = disk.path.as_ref().expect("an iSCSI path");
    assert_eq!((path.target.as_str(), path.lun), ("iqn.2026-11.t:sql", 0));
    assert_eq!(
        Vec::from_iter(host.root().initiators()),
        ["iqn.2026-01.host:conf", "iqn.2026-01.host:live"]
    );
}

#[test]
fn one_superblock_with_bind_mounts_is_one_volume_at_its_root() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.mounts("2 1 8:0 /sub /srv/bind rw - ext4 /dev/sda rw\n3 1 8:0 / /data rw - ext4 /dev/sda rw\n");
    let inventory = host.read();
    assert_eq!(inventory.volumes.len(), 1);
    assert_eq!(
        inventory.volumes[0].points,
        [Path::new("/data"), Path::new("/srv/bind")]
    );
}

#[test]
fn nested_mounts_freeze_innermost_first() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.lun("sdb", 16, 2, 8);
    host.lun("sdc", 32, 3, 9);
    host.mounts(
        "1 0 254:0 / / rw - ext4 /dev/vda rw\n2 1 8:0 / /a rw - ext4 /dev/sda rw\n\
         3 2 8:16 / /a/b rw - xfs /dev/sdb rw\n4 3 8:32 / /a/b/c rw - ext4 /dev/sdc rw\n",
    );
    let inventory = host.read();
    assert_eq!(
        names(&inventory.freeze_order(&BTreeSet::from([naa(7), naa(8), naa(9)]))),
        ["/a/b/c", "/a/b", "/a"]
    );
    assert_eq!(
        names(&inventory.freeze_order(&BTreeSet::from([naa(8)]))),
        ["/a/b"]
    );
}

#[test]
fn lvm_over_two_luns_and_a_local_disk_names_all_of_them() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.lun("sdb", 16, 2, 8);
    host.plain_disk("vda", 254);
    host.dm(0, "LVM-abc", &["8:1", "8:16", "254:0"]);
    host.mounts("2 1 253:0 / /lv rw - xfs /dev/mapper/vg-lv rw\n");
    let volume = host.read().volumes.remove(0);
    assert_eq!(volume.naas, BTreeSet::from([naa(7), naa(8)]));
    assert_eq!(volume.other_disks, BTreeSet::from(["vda".to_owned()]));
    assert!(!volume.multipath);
}

#[test]
fn multipath_is_seen_through_kpartx_and_lvm() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.lun("sdb", 16, 2, 7);
    host.dm(0, "mpath-360", &["8:0", "8:16"]);
    host.dm(1, "part1-mpath-360", &["253:0"]);
    host.dm(2, "LVM-x", &["253:1"]);
    host.mounts("2 1 253:2 / /lv rw - ext4 /dev/mapper/x rw\n");
    let inventory = host.read();
    assert!(inventory.volumes[0].multipath);
    assert_eq!(inventory.paths(&naa(7)).count(), 2);
}

#[test]
fn suspended_device_mapper_table_is_named() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.dm(0, "LVM-abc", &["8:0"]);
    host.write("sys/devices/virtual/block/dm-0/dm/suspended", "1\n");
    host.mounts("2 1 253:0 / /lv rw - ext4 /dev/mapper/x rw\n");
    assert_eq!(host.read().volumes[0].suspended.as_deref(), Some("map0"));
}

#[test]
fn btrfs_finds_all_its_devices_behind_an_anonymous_number() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.lun("sdb", 16, 2, 8);
    for (name, number) in [("sda", "8:0"), ("sdb", "8:16")] {
        host.write(&format!("sys/fs/btrfs/uuid/devices/{name}/dev"), number);
    }
    host.mounts("2 1 0:40 /@ /b rw - btrfs /dev/sda rw\n");
    assert_eq!(host.read().volumes[0].naas, BTreeSet::from([naa(7), naa(8)]));
}

#[test]
fn mount_inside_another_namespace_is_seen_and_marked() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.mounts("1 1 254:0 / / rw - ext4 /dev/vda rw\n");
    symlink("mnt:[1]", host.dir.path().join("proc/self/ns/mnt")).expect("symlink");
    for (pid, ns) in [("10", "mnt:[1]"), ("20", "mnt:[2]")] {
        host.write(&format!("proc/{pid}/comm"), "postgres\n");
        host.write(
            &format!("proc/{pid}/mountinfo"),
            "9 1 8:1 / /pg rw - ext4 /dev/sda1 rw\n",
        );
        fs::create_dir_all(host.dir.path().join(format!("proc/{pid}/ns"))).expect("mkdir");
        symlink(ns, host.dir.path().join(format!("proc/{pid}/ns/mnt"))).expect("symlink");
    }
    let inventory = host.read();
    assert_eq!(inventory.volumes.len(), 1);
    assert_eq!(inventory.volumes[0].foreign.as_deref(), Some("postgres (pid 20)"));
}

#[test]
fn a_host_without_any_sysfs_has_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let inventory = Inventory::read(&Root::at(dir.path()), &[]);
    assert!(inventory.volumes.is_empty() && inventory.disks.is_empty());
}
