//! Files for a guest as a cpio archive ("newc"), which the kernel unpacks over the initrd that it is appended to.

use std::path::Path;

/// One archive in the making.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds a file; `path` is relative to the root, its directories are added first (again and again: harmless).
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        let mut parents: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        parents.reverse();
        for parent in parents
            .into_iter()
            .filter_map(Path::to_str)
            .filter(|p| !p.is_empty())
        {
            self.entry(parent, 0o040_755, &[]);
        }
        self.entry(path, 0o100_000 | mode, content);
    }

    /// The archive with its end mark, padded so that it may follow another one.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        // inode, mode, uid, gid, nlink, mtime, size, device and rdevice (major, minor), name with its NUL, checksum (unused)
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            length(content.len()),
            0,
            0,
            0,
            0,
            length(name.len() + 1),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("files for a guest are far below 4 GiB")
}
