//! Files that nobody else may read. On Windows a directory gets an access list for SYSTEM and Administrators, and its files inherit it.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

/// A directory, and those above it.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        std::fs::create_dir_all(above)?;
    }
    #[cfg(windows)]
    crate::win::security::make_private_dir(path)?;
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(path)?;
    Ok(())
}

/// A new file.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Makes a directory's entries durable, where that is asked for apart. (NTFS keeps its journal in order by itself.)
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(path)?.sync_all()?;
    #[cfg(windows)]
    let _ = path;
    Ok(())
}
