//! Disks, volumes and the initiator's name.

use std::collections::BTreeMap;

use stillpoint_agentproto::LunId;
use windows::Win32::Foundation::{CloseHandle, HANDLE};
use windows::Win32::Storage::FileSystem::{
    CreateFileW, FILE_ATTRIBUTE_NORMAL, FILE_SHARE_READ, FILE_SHARE_WRITE, FindFirstVolumeW, FindNextVolumeW,
    FindVolumeClose, GetVolumeInformationW, GetVolumePathNamesForVolumeNameW, OPEN_EXISTING,
};
use windows::Win32::System::IO::DeviceIoControl;
use windows::Win32::System::Ioctl::{
    IOCTL_DISK_GET_LENGTH_INFO, IOCTL_STORAGE_QUERY_PROPERTY, PropertyStandardQuery, STORAGE_PROPERTY_ID,
    STORAGE_PROPERTY_QUERY, StorageDeviceIdProperty, StorageDeviceProperty,
};
use windows::Win32::System::LibraryLoader::{GetProcAddress, LOAD_LIBRARY_SEARCH_SYSTEM32, LoadLibraryExW};
use windows::core::{PCSTR, PCWSTR, PWSTR};

use crate::config::TestLun;
use crate::lun_info::{self, LunInfo};
use crate::volumes::{Disk, Inventory, VENDOR, Volume};

/// Disks that are looked at.
const DISKS_MAX: u32 = 512;
/// Numbers without a disk in a row: the end. (Numbers are given again, so holes are short.)
const HOLES_MAX: u32 = 32;
/// Volumes that are looked at.
const VOLUMES_MAX: usize = 1024;
/// An answer of a driver, in bytes.
const ANSWER_MAX: usize = 16 * 1024;
/// `IOCTL_VOLUME_GET_VOLUME_DISK_EXTENTS` (winioctl.h).
const IOCTL_VOLUME_GET_VOLUME_DISK_EXTENTS: u32 = 0x0056_0000;
/// `FILE_READ_ONLY_VOLUME`.
const READ_ONLY_VOLUME: u32 = 0x0008_0000;
/// `MAX_ISCSI_NAME_LEN`, with its zero.
const ISCSI_NAME_MAX: usize = 224;

/// An open device.
struct Device(HANDLE);

impl Device {
    fn open(name: &str) -> Option<Self> {
        let name = super::wide(name);
        let share = FILE_SHARE_READ | FILE_SHARE_WRITE;
        // SAFETY: the name ends with a zero; the handle is closed when this goes. No access is asked for: queries need none.
        let opened = unsafe {
            CreateFileW(
                PCWSTR(name.as_ptr()),
                0,
                share,
                None,
                OPEN_EXISTING,
                FILE_ATTRIBUTE_NORMAL,
                None,
            )
        };
        opened.ok().map(Self)
    }

    fn ask(&self, code: u32, question: &[u8]) -> Option<Vec<u8>> {
        let mut answer = vec![0u8; ANSWER_MAX];
        let mut len = 0;
        // SAFETY: both buffers live through the call, with their true lengths.
        let asked = unsafe {
            DeviceIoControl(
                self.0,
                code,
                (!question.is_empty()).then_some(question.as_ptr().cast()),
                u32::try_from(question.len()).ok()?,
                Some(answer.as_mut_ptr().cast()),
                u32::try_from(answer.len()).ok()?,
                Some(&raw mut len),
                None,
            )
        };
        asked.ok()?;
        answer.truncate(usize::try_from(len).ok()?);
        Some(answer)
    }

    fn property(&self, id: STORAGE_PROPERTY_ID) -> Option<Vec<u8>> {
        let mut question = [0u8; size_of::<STORAGE_PROPERTY_QUERY>()];
        question.get_mut(..4)?.copy_from_slice(&id.0.to_le_bytes());
        question
            .get_mut(4..8)?
            .copy_from_slice(&PropertyStandardQuery.0.to_le_bytes());
        self.ask(IOCTL_STORAGE_QUERY_PROPERTY, &question)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: ours, and closed once.
        unsafe { CloseHandle(self.0) }.ok();
    }
}

/// Everything of the host; `test_luns` are folders that stand for volumes.
pub(super) fn inventory(test_luns: &[TestLun]) -> Inventory {
    let disks = disks();
    let mut volumes = volumes(&disks);
    let mut disks: Vec<Disk> = disks
        .into_values()
        .filter(|disk| disk.lun != LunId([0; 16]))
        .collect();
    for (index, test) in test_luns.iter().enumerate() {
        disks.push(Disk {
            number: DISKS_MAX + u32::try_from(index).unwrap_or(0),
            lun: test.naa,
            info: LunInfo::of_lun(test.naa, &test.serial),
            size_bytes: None,
            multipath: false,
        });
        volumes.push(Volume {
            name: test.path.clone(),
            mounts: vec![test.path.clone()],
            file_system: "NTFS".to_owned(),
            read_only: false,
            luns: vec![test.naa],
            elsewhere: false,
        });
    }
    Inventory { disks, volumes }
}

/// By number. A disk without an NAA name has the name of zeros: its volumes lie "elsewhere".
fn disks() -> BTreeMap<u32, Disk> {
    let mut disks = BTreeMap::new();
    let mut holes = 0;
    for number in 0..DISKS_MAX {
        let Some(device) = Device::open(&format!(r"\\.\PhysicalDrive{number}")) else {
            holes += 1;
            if holes > HOLES_MAX {
                break;
            }
            continue;
        };
        holes = 0;
        let info = info_of(&device).unwrap_or_default();
        let length = device.ask(IOCTL_DISK_GET_LENGTH_INFO, &[]);
        let size_bytes = length.and_then(|bytes| Some(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?)));
        let bus = device
            .property(StorageDeviceProperty)
            .and_then(|bytes| bus(&bytes));
        let multipath = info.vendor == VENDOR && bus == Some(BUS_SCSI);
        tracing::trace!(number, bus, iscsi = bus == Some(BUS_ISCSI), "a disk");
        disks.insert(
            number,
            Disk {
                number,
                lun: info.lun().unwrap_or(LunId([0; 16])),
                info,
                size_bytes,
                multipath,
            },
        );
    }
    disks
}

/// `BusTypeiScsi`, and what MPIO's own disks say instead when it has claimed the paths of an iSCSI LUN (`BusTypeScsi`; not seen on a
/// real server yet, see README).
const BUS_ISCSI: u32 = 9;
const BUS_SCSI: u32 = 1;

/// `STORAGE_DEVICE_DESCRIPTOR.BusType`.
fn bus(descriptor: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(descriptor.get(28..32)?.try_into().ok()?))
}

/// What a device (a disk, or VSS's name of one) says about itself.
pub(super) fn lun_info(device: &str) -> Option<LunInfo> {
    info_of(&Device::open(device)?)
}

fn info_of(device: &Device) -> Option<LunInfo> {
    let designators = lun_info::designators(&device.property(StorageDeviceIdProperty)?)?;
    let descriptor = device.property(StorageDeviceProperty).unwrap_or_default();
    // Offsets 12, 16, 20, 24 of STORAGE_DEVICE_DESCRIPTOR lead to texts in the same answer.
    let text = |at: usize| {
        let offset =
            usize::try_from(u32::from_le_bytes(descriptor.get(at..at + 4)?.try_into().ok()?)).ok()?;
        let rest = descriptor.get(offset..).filter(|_| offset != 0)?;
        let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
        Some(String::from_utf8_lossy(rest.get(..end)?).trim().to_owned())
    };
    Some(LunInfo {
        vendor: text(12).unwrap_or_default(),
        product: text(16).unwrap_or_default(),
        revision: text(20).unwrap_or_default(),
        serial: text(24).unwrap_or_default(),
        designators,
    })
}

fn volumes(disks: &BTreeMap<u32, Disk>) -> Vec<Volume> {
    let mut name = [0u16; 64];
    // SAFETY: the buffer's length goes with it.
    let Ok(search) = (unsafe { FindFirstVolumeW(&mut name) }) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    while found.len() < VOLUMES_MAX {
        let end = name.iter().position(|unit| *unit == 0).unwrap_or(name.len());
        found.push(String::from_utf16_lossy(name.get(..end).unwrap_or_default()));
        // SAFETY: as above; the search is open.
        if unsafe { FindNextVolumeW(search, &mut name) }.is_err() {
            break;
        }
    }
    // SAFETY: opened above, closed once.
    unsafe { FindVolumeClose(search) }.ok();
    found.into_iter().filter_map(|name| volume(name, disks)).collect()
}

fn volume(name: String, disks: &BTreeMap<u32, Disk>) -> Option<Volume> {
    let terminated = super::wide(&name);
    let mut file_system = [0u16; 32];
    let mut flags = 0;
    // SAFETY: the name ends with a zero, buffers come with their lengths.
    let read = unsafe {
        GetVolumeInformationW(
            PCWSTR(terminated.as_ptr()),
            None,
            None,
            None,
            Some(&raw mut flags),
            Some(&mut file_system),
        )
    };
    // Nothing is mounted on a volume without a file system.
    read.ok()?;
    let end = file_system.iter().position(|unit| *unit == 0).unwrap_or(0);
    let device = Device::open(name.trim_end_matches('\\'));
    let extents = device.and_then(|device| device.ask(IOCTL_VOLUME_GET_VOLUME_DISK_EXTENTS, &[]));
    let numbers = extents.map(|bytes| disk_numbers(&bytes)).unwrap_or_default();
    let mut luns = Vec::new();
    let mut elsewhere = numbers.is_empty();
    for number in numbers {
        match disks
            .get(&number)
            .map(|disk| disk.lun)
            .filter(|lun| *lun != LunId([0; 16]))
        {
            Some(lun) if !luns.contains(&lun) => luns.push(lun),
            Some(_) => {}
            None => elsewhere = true,
        }
    }
    Some(Volume {
        mounts: mounts(&terminated),
        file_system: String::from_utf16_lossy(file_system.get(..end)?),
        read_only: flags & READ_ONLY_VOLUME != 0,
        luns,
        elsewhere,
        name,
    })
}

/// `VOLUME_DISK_EXTENTS`: a count, then at offset 8 entries of 24 bytes that begin with the disk's number.
fn disk_numbers(bytes: &[u8]) -> Vec<u32> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let count = word(0).and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
    (0..count.min(VOLUMES_MAX))
        .map_while(|index| word(8 + index * 24))
        .collect()
}

fn mounts(name: &[u16]) -> Vec<String> {
    let mut paths = vec![0u16; 8 * 1024];
    let mut len = 0;
    // SAFETY: the name ends with a zero, the buffer comes with its length.
    let read =
        unsafe { GetVolumePathNamesForVolumeNameW(PCWSTR(name.as_ptr()), Some(&mut paths), &raw mut len) };
    if read.is_err() {
        return Vec::new();
    }
    let texts = paths.split(|unit| *unit == 0).take_while(|text| !text.is_empty());
    texts.map(String::from_utf16_lossy).collect()
}

/// The name of Microsoft's initiator; its library is not on every edition.
pub(super) fn initiator() -> Option<String> {
    type GetName = unsafe extern "system" fn(PWSTR) -> u32;
    let library = super::wide("iscsidsc.dll");
    let mut name = [0u16; ISCSI_NAME_MAX];
    // SAFETY: the names end with a zero; the function has this signature (MS docs: GetIScsiInitiatorNodeNameW) and writes
    // MAX_ISCSI_NAME_LEN units at most. The library stays loaded.
    let status = unsafe {
        let library = LoadLibraryExW(PCWSTR(library.as_ptr()), None, LOAD_LIBRARY_SEARCH_SYSTEM32).ok()?;
        let function = GetProcAddress(library, PCSTR(c"GetIScsiInitiatorNodeNameW".as_ptr().cast()))?;
        let function: GetName =
            std::mem::transmute::<unsafe extern "system" fn() -> isize, GetName>(function);
        function(PWSTR(name.as_mut_ptr()))
    };
    let end = name.iter().position(|unit| *unit == 0)?;
    let name = String::from_utf16_lossy(name.get(..end)?);
    (status == 0 && !name.is_empty()).then_some(name)
}
