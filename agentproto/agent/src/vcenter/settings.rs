//! What `vcenter set` saves: `vcenter/settings.json` in the state directory, mode 0600. The password is in it and nowhere else: not in
//! agent.toml, not in a log, not in what the target gets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::inventory::Machine;
use super::soap::Access;
use super::thumbprint::Thumbprint;

/// VMs with a mode of their own.
const OVERRIDES_MAX: usize = 1_000;
/// A settings file is short.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How a VM is made consistent before the LUN is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum VmMode {
    /// VMware Tools quiesce the guest's file systems (and VSS writers).
    Quiesce,
    /// The snapshot includes the memory: the guest goes on from that very moment.
    Memory,
    /// Quiesce; memory for a VM where that fails.
    Both,
    /// Neither: its disks are as after a power cut.
    Plain,
}

impl VmMode {
    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quiesce => "quiesce",
            Self::Memory => "memory",
            Self::Both => "both",
            Self::Plain => "plain",
        }
    }
}

/// Everything about the vCenter.
#[derive(Clone)]
pub(crate) struct Settings {
    /// Where, and as whom.
    pub(crate) access: Access,
    /// For every VM that has no mode of its own.
    pub(crate) mode: VmMode,
    /// By the VM's name, or its instance UUID.
    pub(crate) overrides: BTreeMap<String, VmMode>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    host: String,
    user: String,
    password: String,
    certificate_sha256: Thumbprint,
    mode: VmMode,
    #[serde(default)]
    vms: BTreeMap<String, VmMode>,
}

/// Settings that cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// The system's word.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: std::io::Error,
    },
    /// Not what `vcenter set` writes.
    #[error("{path} is damaged: write it anew with `stillpoint-agent vcenter set`")]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
}

impl Settings {
    /// The directory of everything about the vCenter.
    pub(crate) fn dir(state_dir: &Path) -> PathBuf {
        state_dir.join("vcenter")
    }

    /// The file.
    pub(crate) fn path(state_dir: &Path) -> PathBuf {
        Self::dir(state_dir).join("settings.json")
    }

    /// What was set, if anything was.
    pub(crate) fn load(state_dir: &Path) -> Result<Option<Self>, SettingsError> {
        let path = Self::path(state_dir);
        let read = std::fs::metadata(&path).and_then(|meta| {
            if meta.len() > FILE_BYTES_MAX {
                return Err(std::io::Error::other("it is too large"));
            }
            std::fs::read(&path)
        });
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SettingsError::Io { path, error }),
        };
        // The parser's own message would quote the text, and the password is in it.
        let saved: Saved = serde_json::from_slice(&bytes).map_err(|_| SettingsError::Corrupt { path })?;
        Ok(Some(Self {
            access: Access {
                host: saved.host,
                user: saved.user,
                password: SecretString::from(saved.password),
                thumbprint: saved.certificate_sha256,
            },
            mode: saved.mode,
            overrides: saved.vms,
        }))
    }

    /// Keeps them.
    pub(crate) fn save(&self, state_dir: &Path) -> Result<(), SettingsError> {
        let path = Self::path(state_dir);
        let io = |error| SettingsError::Io {
            path: path.clone(),
            error,
        };
        let saved = Saved {
            host: self.access.host.clone(),
            user: self.access.user.clone(),
            password: self.access.password.expose_secret().to_owned(),
            certificate_sha256: self.access.thumbprint,
            mode: self.mode,
            vms: self.overrides.clone(),
        };
        let text = serde_json::to_vec_pretty(&saved).map_err(|error| io(error.into()))?;
        super::files::make_dir(&Self::dir(state_dir)).map_err(io)?;
        super::files::replace(&path, &text).map_err(io)
    }

    /// How this VM is treated.
    pub(crate) fn mode_of(&self, machine: &Machine) -> VmMode {
        let by_uuid = self.overrides.get(&machine.instance_uuid);
        by_uuid
            .or_else(|| self.overrides.get(&machine.name))
            .copied()
            .unwrap_or(self.mode)
    }
}

/// Reads `NAME=MODE`.
pub(crate) fn parse_override(text: &str) -> Result<(String, VmMode), String> {
    let (name, mode) = text
        .rsplit_once('=')
        .ok_or("write NAME=MODE, for example db1=memory")?;
    let mode = <VmMode as clap::ValueEnum>::from_str(mode, true)?;
    if name.is_empty() {
        return Err("write NAME=MODE, for example db1=memory".to_owned());
    }
    Ok((name.to_owned(), mode))
}

/// `HOST:PORT`, with HTTPS's port when none is given.
pub(crate) fn parse_host(text: &str) -> Result<String, String> {
    let bare = text
        .strip_prefix("https://")
        .unwrap_or(text)
        .trim_end_matches('/');
    let with_port = match bare.rsplit_once(':') {
        Some((name, port)) if !name.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => {
            !name.contains(':') || name.ends_with(']')
        }
        _ => false,
    };
    let ok = |c: char| c.is_ascii_alphanumeric() || ".-_:[]".contains(c);
    if bare.is_empty() || !bare.chars().all(ok) {
        return Err(format!("{text:?} is no host: write HOST or HOST:PORT"));
    }
    Ok(match with_port {
        true => bare.to_owned(),
        false if bare.contains(':') && !bare.starts_with('[') => format!("[{bare}]:443"),
        false => format!("{bare}:443"),
    })
}

/// Adds overrides; refuses more than can be kept.
pub(crate) fn add_overrides(
    to: &mut BTreeMap<String, VmMode>,
    more: &[(String, VmMode)],
) -> Result<(), String> {
    to.extend(more.iter().cloned());
    if to.len() > OVERRIDES_MAX {
        return Err(format!("more than {OVERRIDES_MAX} VMs with a mode of their own"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            access: Access {
                host: "vc:443".to_owned(),
                user: "agent".to_owned(),
                password: SecretString::from("s3cret-word"),
                thumbprint: Thumbprint::of(b"x"),
            },
            mode: VmMode::Both,
            overrides: [("db1".to_owned(), VmMode::Memory)].into(),
        }
    }

    #[test]
    fn settings_are_kept_privately() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(Settings::load(dir.path()).expect("nothing yet").is_none());
        settings().save(dir.path()).expect("saved");
        let loaded = Settings::load(dir.path()).expect("read").expect("there");
        assert_eq!(loaded.access.password.expose_secret(), "s3cret-word");
        assert_eq!(
            (loaded.mode, loaded.overrides),
            (VmMode::Both, settings().overrides)
        );
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = std::fs::metadata(Settings::path(dir.path()))
                .expect("there")
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn a_damaged_file_does_not_tell_the_password() {
        let dir = tempfile::tempdir().expect("a directory");
        settings().save(dir.path()).expect("saved");
        let path = Settings::path(dir.path());
        let text = std::fs::read_to_string(&path)
            .expect("there")
            .replace("\"both\"", "\"s3cret-word");
        std::fs::write(&path, text).expect("written");
        let Err(error) = Settings::load(dir.path()) else {
            panic!("it is damaged")
        };
        assert!(!error.to_string().contains("s3cret-word"), "{error}");
    }

    #[test]
    fn hosts_get_the_port_of_https() {
        for (text, host) in [
            ("vc", "vc:443"),
            ("https://vc.lab/", "vc.lab:443"),
            ("vc:8989", "vc:8989"),
            ("[::1]:8989", "[::1]:8989"),
            ("fd00::7", "[fd00::7]:443"),
        ] {
            assert_eq!(parse_host(text).as_deref(), Ok(host), "{text}");
        }
        assert!(parse_host("a b").is_err() && parse_host("").is_err());
        assert_eq!(parse_override("a=b=plain"), Ok(("a=b".to_owned(), VmMode::Plain)));
        assert!(parse_override("db1").is_err() && parse_override("db1=often").is_err());
    }
}
