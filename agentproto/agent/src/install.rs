//! `stillpoint-agent install | uninstall`: this program as a systemd service, for hosts without the Debian package.
//!
//! | what | where |
//! |---|---|
//! | the program | `/usr/local/bin/stillpoint-agent` (unless it lies in a system directory already) |
//! | the service | `/etc/systemd/system/stillpoint-agent.service` |
//! | settings | `/etc/stillpoint-agent/agent.toml`, never overwritten; `hooks.d` |
//!
//! Run again it brings all this up to date (that is how one upgrades). `uninstall` leaves settings and keys, unless told `--purge`.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::config;
use crate::failure::Failure;

const UNIT: &str = include_str!("../packaging/stillpoint-agent.service");
const SETTINGS: &str = include_str!("../packaging/agent.toml");
const NAME: &str = "stillpoint-agent.service";
/// What the unit of the package says; another place is put in its stead.
const PACKAGED: &str = "/usr/bin/stillpoint-agent";
const INSTALLED: &str = "/usr/local/bin/stillpoint-agent";
/// dpkg's list of the package's files: the package is upgraded and removed by dpkg.
const DPKG_LIST: &str = "/var/lib/dpkg/info/stillpoint-agent.list";

/// Where to install, and whether to tell systemd.
pub(crate) struct Place {
    /// `/`, or the directory of an image that is being made.
    pub(crate) root: PathBuf,
    /// Without it nothing is enabled or started.
    pub(crate) start: bool,
}

/// What was done, a line each.
pub(crate) type Done = Vec<String>;

impl Place {
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn is_this_host(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Installs this program, or brings an installation up to date.
    pub(crate) fn install(&self) -> Result<Done, Failure> {
        self.refuse_package()?;
        if self.is_this_host() && self.start {
            need_systemd()?;
        }
        let mut done = Done::new();
        let program = self.program(&mut done)?;
        let unit = self.at("/etc/systemd/system").join(NAME);
        write(&unit, UNIT.replace(PACKAGED, &program).as_bytes(), 0o644)?;
        done.push(format!("service: {}", unit.display()));
        let hooks = self.at("/etc/stillpoint-agent/hooks.d");
        let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(&hooks);
        made.map_err(|error| io_failure(&hooks, &error))?;
        let settings = self.at(config::PATH);
        if settings.exists() {
            done.push(format!("settings: {} (kept)", settings.display()));
        } else {
            write(&settings, SETTINGS.as_bytes(), 0o644)?;
            done.push(format!("settings: {}", settings.display()));
        }
        if self.is_this_host() && self.start {
            systemctl(&["daemon-reload"])?;
            systemctl(&["enable", NAME])?;
            // Not `start`: after an upgrade the old program would go on.
            systemctl(&["restart", NAME])?;
            done.push("the service is enabled and runs".to_owned());
        }
        Ok(done)
    }

    /// Copies the running program, and says where the service will find it.
    fn program(&self, done: &mut Done) -> Result<String, Failure> {
        let own = std::env::current_exe().map_err(|error| io_failure(Path::new("/proc/self/exe"), &error))?;
        let own_dir = own.parent().unwrap_or_else(|| Path::new("/"));
        if self.is_this_host()
            && ["/usr/bin", "/usr/sbin", "/usr/local/bin"]
                .map(Path::new)
                .contains(&own_dir)
        {
            done.push(format!("program: {}", own.display()));
            return Ok(own.display().to_string());
        }
        let program = fs::read(&own).map_err(|error| io_failure(&own, &error))?;
        let place = self.at(INSTALLED);
        write(&place, &program, 0o755)?;
        done.push(format!("program: {}", place.display()));
        Ok(INSTALLED.to_owned())
    }

    /// Stops and removes what [`Self::install`] made.
    pub(crate) fn uninstall(&self, purge: bool, state_dir: &Path) -> Result<Done, Failure> {
        self.refuse_package()?;
        let mut done = Done::new();
        let unit = self.at("/etc/systemd/system").join(NAME);
        if !unit.exists() && !purge {
            let message = format!("nothing is installed here: there is no {}", unit.display());
            return Err(Failure::failed(
                "not_installed",
                message,
                "`stillpoint-agent status` says whether an agent runs",
            ));
        }
        if self.is_this_host() && self.start && unit.exists() {
            need_systemd()?;
            // Its ExecStopPost thaws whatever is frozen.
            systemctl(&["disable", "--now", NAME])?;
            done.push("the service is stopped and disabled".to_owned());
        }
        for path in [unit, self.at(INSTALLED)] {
            if remove(&path)? {
                done.push(format!("removed: {}", path.display()));
            }
        }
        if self.is_this_host() && self.start {
            systemctl(&["daemon-reload"])?;
        }
        if purge {
            let state = self.at(&state_dir.display().to_string());
            for path in [self.at("/etc/stillpoint-agent"), state] {
                match fs::remove_dir_all(&path) {
                    Ok(()) => done.push(format!("removed: {}", path.display())),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(io_failure(&path, &error)),
                }
            }
            done.push("on each target: `stillpoint agent revoke`".to_owned());
        }
        Ok(done)
    }

    fn refuse_package(&self) -> Result<(), Failure> {
        if !self.at(DPKG_LIST).exists() {
            return Ok(());
        }
        let message = "this host has the Debian package stillpoint-agent, which brings its own service";
        let hint =
            "`apt install ./stillpoint-agent_*.deb` upgrades it, `apt remove stillpoint-agent` removes it";
        Err(Failure::refused("package", message, hint))
    }
}

fn need_systemd() -> Result<(), Failure> {
    // systemd's own test, sd_booted(3).
    if Path::new("/run/systemd/system").is_dir() {
        return Ok(());
    }
    let message = "this host does not run systemd";
    let hint = "`install --no-start` puts the files in place; let your service manager run `stillpoint-agent run`, and \
                `stillpoint-agent thaw` whenever it ended";
    Err(Failure::refused("no_systemd", message, hint))
}

fn systemctl(arguments: &[&str]) -> Result<(), Failure> {
    let what = format!("systemctl {}", arguments.join(" "));
    let output = Command::new("systemctl").args(arguments).output();
    let output =
        output.map_err(|error| Failure::failed("systemd", format!("{what}: {error}"), "install systemd"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let message = format!("{what} failed: {}", said.trim());
    Err(Failure::failed(
        "systemd",
        message,
        "`journalctl -u stillpoint-agent` may say more; run as root",
    ))
}

/// Writes a file wholly or not at all; a program that runs is replaced, not changed.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Failure> {
    let beside = path.with_extension("new");
    let written = || -> io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&beside, bytes)?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(mode))?;
        fs::File::open(&beside)?.sync_all()?;
        fs::rename(&beside, path)
    };
    written().map_err(|error| io_failure(path, &error))
}

fn remove(path: &Path) -> Result<bool, Failure> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_failure(path, &error)),
    }
}

fn io_failure(path: &Path, error: &io::Error) -> Failure {
    let hint = if error.kind() == io::ErrorKind::PermissionDenied {
        "run it as root"
    } else {
        ""
    };
    Failure::failed("io", format!("{}: {error}", path.display()), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(dir: &tempfile::TempDir) -> Place {
        Place {
            root: dir.path().to_owned(),
            start: true,
        }
    }

    #[test]
    fn an_image_gets_program_service_and_settings_and_loses_them() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let place = place(&dir);
        place.install().expect("installed");
        let unit = fs::read_to_string(place.at("/etc/systemd/system").join(NAME)).expect("the unit");
        assert!(
            unit.contains("ExecStart=/usr/local/bin/stillpoint-agent run"),
            "{unit}"
        );
        assert!(!unit.contains(PACKAGED), "{unit}");
        let program = fs::metadata(place.at(INSTALLED)).expect("the program");
        assert_eq!(program.permissions().mode() & 0o777, 0o755);
        // What the operator wrote stays, over an upgrade and over `uninstall`.
        fs::write(place.at(config::PATH), "log = \"debug\"\n").expect("write");
        let done = place.install().expect("again");
        assert!(done.iter().any(|line| line.ends_with("(kept)")), "{done:?}");
        let state = Path::new("/var/lib/stillpoint-agent");
        fs::create_dir_all(place.at("/var/lib/stillpoint-agent/targets")).expect("mkdir");
        place.uninstall(false, state).expect("uninstalled");
        assert!(!place.at(INSTALLED).exists() && place.at(config::PATH).exists());
        let error = place.uninstall(false, state).expect_err("nothing is there");
        assert_eq!((error.exit, error.code.as_str()), (1, "not_installed"));
        place.uninstall(true, state).expect("purged");
        assert!(
            !place.at("/etc/stillpoint-agent").exists() && !place.at("/var/lib/stillpoint-agent").exists()
        );
    }

    #[test]
    fn a_package_is_left_to_dpkg() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let place = place(&dir);
        write(&place.at(DPKG_LIST), b"/.\n", 0o644).expect("a list");
        for result in [
            place.install(),
            place.uninstall(true, Path::new("/var/lib/stillpoint-agent")),
        ] {
            assert_eq!(result.expect_err("refused").exit, crate::failure::REFUSED);
        }
    }
}
