//! `/proc/PID/mountinfo` (proc(5)): one line per mount.

use std::path::PathBuf;

/// A block device's number, as the kernel writes it (`8:1`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct DeviceNumber {
    /// Major number; 0 for file systems without one block device (btrfs, tmpfs, nfs).
    pub(crate) major: u32,
    /// Minor number.
    pub(crate) minor: u32,
}

impl DeviceNumber {
    /// Reads `MAJOR:MINOR`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }

    /// From a `st_dev` or `st_rdev`.
    pub(crate) fn from_raw(dev: u64) -> Self {
        Self {
            major: rustix::fs::major(dev),
            minor: rustix::fs::minor(dev),
        }
    }
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// One mount of one mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Unique in its namespace.
    pub(crate) id: u32,
    /// The mount that this one lies on.
    pub(crate) parent: u32,
    /// The superblock's device: the same for all mounts of one file system.
    pub(crate) dev: DeviceNumber,
    /// What part of the file system is mounted: `/` unless it is a bind mount or a subvolume.
    pub(crate) root: PathBuf,
    /// Where.
    pub(crate) point: PathBuf,
    /// `ext4`, `xfs`, …
    pub(crate) fs_type: String,
    /// The device as the mounter named it.
    pub(crate) source: String,
    /// The superblock itself is read-only (not only this mount).
    pub(crate) read_only: bool,
}

/// Parses a whole file; lines that cannot be understood are left out (the kernel may add file systems with odd sources,
/// and one of them must not hide the others).
pub(crate) fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &str) -> Option<Mount> {
    let (mount, superblock) = line.split_once(" - ")?;
    let mut fields = mount.split(' ');
    let id = fields.next()?.parse().ok()?;
    let parent = fields.next()?.parse().ok()?;
    let dev = DeviceNumber::parse(fields.next()?)?;
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    let mut fields = superblock.split(' ');
    let fs_type = fields.next()?.to_owned();
    let source = unescape(fields.next()?).to_string_lossy().into_owned();
    let read_only = fields
        .next()
        .unwrap_or_default()
        .split(',')
        .any(|option| option == "ro");
    Some(Mount {
        id,
        parent,
        dev,
        root,
        point,
        fs_type,
        source,
        read_only,
    })
}

/// Space, tab, newline and backslash are written `\040` and so on.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        match (first, octal(tail)) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(digits.get(..3)?).ok()?;
    u8::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_manuals_line_with_and_without_optional_fields() {
        // proc(5), /proc/pid/mountinfo.
        let text = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                    37 36 8:1 / /a\\040b\\134c rw - ext4 /dev/sda1 ro\nnonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!(mounts[0].dev, DeviceNumber { major: 98, minor: 0 });
        assert!(!mounts[0].read_only);
        assert_eq!(mounts[1].point, Path::new("/a b\\c"));
        assert!(mounts[1].read_only);
    }

    #[test]
    fn truncated_lines_never_panic() {
        let line = "36 35 98:0 /mnt1 /m\\04 rw,noatime master:1 - ext3 /dev/root rw";
        for end in 0..line.len() {
            let _ = parse(&line[..end]);
        }
    }
}
