//! Secrets: read from files of their own, never shown.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use zeroize::Zeroizing;

use crate::limits::MAX_SECRET_FILE_BYTES;
use crate::problem::Trouble;

/// A secret. Its `Debug` shows nothing of it, it has no `Display` and no `Serialize`, and its memory is cleared.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Wraps the bytes of a secret.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The secret itself, for the one place that computes with it.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Reads a secret file. One trailing line end is not part of the secret: editors add it.
    ///
    /// # Errors
    /// When the file is missing, unreadable, readable by everyone, empty, too long or has several lines.
    pub(crate) fn read(path: &Path) -> Result<Self, Trouble> {
        let shown = path.display();
        let file = File::open(path).map_err(|e| {
            Trouble::new(
                format!("cannot read {shown} ({e})"),
                "create the file, readable only by the daemon's user (mode 0600)",
            )
        })?;
        let metadata = file
            .metadata()
            .map_err(|e| Trouble::new(format!("cannot examine {shown} ({e})"), "check the file"))?;
        if !metadata.is_file() {
            return Err(Trouble::new(
                format!("{shown} is not a file"),
                "name the file that holds the secret",
            ));
        }
        // Others may neither read nor write it, and the group may not write it: who can write a secret knows it.
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o027 != 0 {
            return Err(Trouble::new(
                format!("{shown} has mode {mode:04o}, so other users can reach the secret"),
                format!("chmod 0600 {shown}"),
            ));
        }
        let mut bytes = Zeroizing::new(Vec::new());
        file.take(MAX_SECRET_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| Trouble::new(format!("cannot read {shown} ({e})"), "check the file"))?;
        if bytes.len() as u64 > MAX_SECRET_FILE_BYTES {
            return Err(Trouble::new(
                format!("{shown} is longer than {MAX_SECRET_FILE_BYTES} bytes"),
                "put only the secret into it",
            ));
        }
        for end in [b'\n', b'\r'] {
            if bytes.last() == Some(&end) {
                bytes.pop();
            }
        }
        if bytes.is_empty() {
            return Err(Trouble::new(
                format!("{shown} is empty"),
                "put the secret into it",
            ));
        }
        if bytes.iter().any(|b| matches!(b, b'\n' | b'\r' | 0)) {
            return Err(Trouble::new(
                format!("{shown} has more than one line"),
                "put only the secret into it, on one line",
            ));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8], mode: u32) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("secret");
        std::fs::write(&path, bytes).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        (dir, path)
    }

    #[test]
    fn a_line_end_is_not_part_of_the_secret() {
        for text in ["correct horse", "correct horse\n", "correct horse\r\n"] {
            let (_dir, path) = file(text.as_bytes(), 0o600);
            assert_eq!(Secret::read(&path).expect("secret").expose(), b"correct horse");
        }
    }

    #[test]
    fn wrong_files_are_refused_with_a_way_out() {
        for (bytes, mode, why) in [
            (&b"x"[..], 0o644, "chmod 0600"),
            (b"x", 0o620, "chmod 0600"),
            (b"", 0o600, "is empty"),
            (b"\n", 0o600, "is empty"),
            (b"a\nb\n", 0o600, "more than one line"),
            (&[b'x'; 5000], 0o600, "longer than"),
        ] {
            let (_dir, path) = file(bytes, mode);
            let trouble = Secret::read(&path).expect_err(why);
            assert!(trouble.to_string().contains(why), "{trouble}");
        }
        let (dir, _path) = file(b"x", 0o600);
        assert!(Secret::read(&dir.path().join("none")).is_err());
        assert!(Secret::read(dir.path()).is_err(), "a directory");
    }

    #[test]
    fn a_secret_is_never_shown() {
        let secret = Secret::new(b"hunter2hunter2".to_vec());
        assert!(!format!("{secret:?}").contains("hunter"));
    }

    #[test]
    fn group_may_read_so_that_the_daemon_needs_not_own_the_file() {
        let (_dir, path) = file(b"correct horse", 0o640);
        assert!(Secret::read(&path).is_ok());
    }
}
