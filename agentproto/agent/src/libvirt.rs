//! Guests of this KVM host whose disks lie on file systems of a LUN: each is an application, frozen through its qemu-ga by
//! libvirt (`virsh domfsfreeze`) before the host's own file systems are, and thawed after them.
//!
//! A guest is a [`Hook`] with arguments, as every application that the agent quiesces itself: deadline, process group, journal and
//! guard are the same. A freeze of nothing is no freeze: a Windows guest without working VSS answers "Froze 0 filesystem(s)", and a
//! guest that thawed by itself (VSS does after 10 s) thaws fewer file systems than it froze. Neither is a proof.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::apps::mount_of;
use crate::config::Config;
use crate::hooks::{self, Hook, Verb};
use crate::volumes::{Inventory, Mount, Root};

/// The hidden verb that makes a process the helper of one guest.
pub(crate) const VERB: &str = "domain";
/// The kind under which guests are recorded.
pub(crate) const KIND: &str = "libvirt";
/// Guests of one host that are looked at; a host with more needs several LUNs, and thereby several looks.
const DOMAINS_MAX: usize = 256;
/// libvirt answers at once, or its daemon hangs.
const ASK_TIME_MAX: Duration = Duration::from_secs(8);
/// What is read of one answer.
const ANSWER_BYTES_MAX: u64 = 256 * 1024;
/// How often a running virsh is looked at.
const POLL: Duration = Duration::from_millis(5);

/// `[libvirt]` of agent.toml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Libvirt {
    /// The program.
    pub(crate) virsh: PathBuf,
    /// The connection's URI.
    pub(crate) connect: String,
}

impl Default for Libvirt {
    fn default() -> Self {
        Self {
            virsh: PathBuf::from("/usr/bin/virsh"),
            connect: "qemu:///system".to_owned(),
        }
    }
}

impl Libvirt {
    /// The guests that run and have a disk on a file system of this host.
    ///
    /// # Errors
    /// libvirt cannot be asked: which guests there are is not known then.
    pub(crate) fn hooks(&self, root: &Root, config: Option<&Path>) -> Result<Vec<Hook>, String> {
        let mounts = Inventory::mounts(root);
        let mut hooks = Vec::new();
        for domain in self.domains()? {
            let on = points(&self.disks(&domain)?, &mounts);
            if on.is_empty() {
                continue;
            }
            let mut arguments = Vec::new();
            if let Some(config) = config {
                arguments.extend(["--config".to_owned(), config.display().to_string()]);
            }
            arguments.extend([VERB.to_owned(), "--".to_owned(), domain.clone()]);
            hooks.push(Hook {
                // Our own binary, also when the file was replaced by an upgrade meanwhile.
                path: PathBuf::from("/proc/self/exe"),
                arguments,
                kind: KIND,
                application: Some(domain),
                version: None,
                mounts: on.into_iter().collect(),
            });
        }
        Ok(hooks)
    }

    /// Every guest that is not shut off: one that is, is consistent as it lies there.
    fn domains(&self) -> Result<Vec<String>, String> {
        let listed = self.virsh(&["list", "--name"])?;
        let names: Vec<String> = listed
            .lines()
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect();
        if names.len() > DOMAINS_MAX {
            return Err(format!("more than {DOMAINS_MAX} guests run on this host"));
        }
        Ok(names)
    }

    fn disks(&self, domain: &str) -> Result<Vec<Disk>, String> {
        let listed = self.virsh(&["domblklist", "--details", "--domain", domain])?;
        Ok(listed.lines().filter_map(disk).collect())
    }

    /// Runs virsh to its end; what it printed.
    fn virsh(&self, arguments: &[&str]) -> Result<String, String> {
        let what = format!("virsh {}", arguments.join(" "));
        let mut command = Command::new(&self.virsh);
        command.arg("-q").arg("-c").arg(&self.connect).args(arguments);
        command.env("LC_ALL", "C").stdin(Stdio::null());
        run(command, ASK_TIME_MAX).map_err(|why| format!("{what}: {why}"))
    }
}

/// A disk of a guest, as `domblklist --details` has it.
#[derive(Debug, PartialEq, Eq)]
struct Disk {
    /// `vda` …
    target: String,
    source: PathBuf,
}

/// `file   disk   vda   /srv/vm/one.qcow2`; what has no path on this host (network, volume) lies on no LUN's file system.
fn disk(line: &str) -> Option<Disk> {
    let mut rest = line.trim();
    let mut word = || {
        let (word, after) = rest.split_once(char::is_whitespace)?;
        rest = after.trim_start();
        Some(word)
    };
    let (_kind, device, target) = (word()?, word()?, word()?);
    // A CD is not written; an empty drive is "-".
    (["disk", "lun"].contains(&device) && rest.starts_with('/')).then(|| Disk {
        target: target.to_owned(),
        source: PathBuf::from(rest),
    })
}

/// Where disks lie; one whose file is gone lies nowhere.
fn points(disks: &[Disk], mounts: &[Mount]) -> BTreeSet<PathBuf> {
    disks.iter().filter_map(|disk| point(disk, mounts)).collect()
}

fn point(disk: &Disk, mounts: &[Mount]) -> Option<PathBuf> {
    let path = std::fs::canonicalize(&disk.source).ok()?;
    // A device of its own lies on no file system, although its node does.
    if path.starts_with("/dev") {
        return None;
    }
    mount_of(&path, mounts)
}

/// Runs the helper of a guest. What it prints on standard error is the reason in records and messages.
pub(crate) fn helper(config: &Config, domain: &str, verb: Verb) -> ExitCode {
    let helper = Helper {
        libvirt: &config.libvirt,
        run_dir: &config.run_dir,
        domain,
    };
    match helper.act(verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            // Nobody can be told that standard error is gone.
            std::io::Write::write_all(&mut std::io::stderr(), format!("{why}\n").as_bytes()).ok();
            ExitCode::FAILURE
        }
    }
}

struct Helper<'a> {
    libvirt: &'a Libvirt,
    run_dir: &'a Path,
    domain: &'a str,
}

impl Helper<'_> {
    fn act(&self, verb: Verb) -> Result<(), String> {
        match verb {
            Verb::Check => self.check(),
            Verb::Freeze => self.freeze(),
            Verb::Thaw => self.thaw(),
            // `thaw` follows.
            Verb::Abort => Ok(()),
        }
    }

    fn check(&self) -> Result<(), String> {
        self.all_disks_are_frozen()?;
        let ping = [
            "qemu-agent-command",
            "--timeout",
            "5",
            "--domain",
            self.domain,
            r#"{"execute":"guest-ping"}"#,
        ];
        self.libvirt.virsh(&ping).map(drop).map_err(|why| {
            format!("its qemu-ga does not answer ({why}): install and start qemu-guest-agent in the guest, and give it the channel")
        })
    }

    /// A guest that is cut on one disk and not on the other is torn apart.
    fn all_disks_are_frozen(&self) -> Result<(), String> {
        let Some(frozen) = std::env::var_os(hooks::ENV_MOUNTS) else {
            return Ok(());
        };
        let frozen: Vec<PathBuf> = frozen.to_string_lossy().lines().map(PathBuf::from).collect();
        let mounts = Inventory::mounts(&Root::real());
        for disk in self.libvirt.disks(self.domain)? {
            if !point(&disk, &mounts).is_some_and(|point| frozen.contains(&point)) {
                return Err(format!(
                    "its disk {} ({}) lies outside of this snapshot: take one of all its LUNs together, or move it",
                    disk.target,
                    disk.source.display()
                ));
            }
        }
        Ok(())
    }

    fn freeze(&self) -> Result<(), String> {
        let mark = self.mark()?;
        // Before the freeze: whatever ends this process, `thaw` knows that the guest may be frozen.
        std::fs::write(&mark, "?").map_err(|error| format!("{}: {error}", mark.display()))?;
        let said = self.libvirt.virsh(&["domfsfreeze", "--domain", self.domain])?;
        let count = count(&said).ok_or_else(|| format!("virsh domfsfreeze says {said:?}"))?;
        if count == 0 {
            return Err("its qemu-ga froze no file system: without VSS (Windows) or with all of them excluded, nothing is held".to_owned());
        }
        std::fs::write(&mark, count.to_string()).map_err(|error| format!("{}: {error}", mark.display()))
    }

    fn thaw(&self) -> Result<(), String> {
        let mark = self.mark()?;
        let Ok(frozen) = std::fs::read_to_string(&mark) else {
            // Its freeze did not begin.
            return Ok(());
        };
        let thawed = self.libvirt.virsh(&["domfsthaw", "--domain", self.domain]);
        std::fs::remove_file(&mark).map_err(|error| format!("{}: {error}", mark.display()))?;
        let said = thawed?;
        let thawed = count(&said).ok_or_else(|| format!("virsh domfsthaw says {said:?}"))?;
        match frozen.trim().parse::<u32>() {
            Ok(frozen) if thawed < frozen => Err(format!(
                "of {frozen} frozen file systems {thawed} were still frozen at the thaw: the guest did not hold until then"
            )),
            Ok(_) => Ok(()),
            Err(_) => Err("its freeze was not finished".to_owned()),
        }
    }

    fn mark(&self) -> Result<PathBuf, String> {
        let dir = self.run_dir;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| format!("{} cannot be made: {error}", dir.display()))?;
        // A guest's name may hold anything but `/` and a newline; its bytes in hex hold neither.
        let name = data_encoding::HEXLOWER.encode(self.domain.as_bytes());
        Ok(dir.join(format!("domain-{name}.frozen")))
    }
}

/// `Froze 2 filesystem(s)`, `Thawed 2 filesystem(s)`.
fn count(said: &str) -> Option<u32> {
    let mut words = said.split_whitespace();
    let verb = words.next()?;
    ["Froze", "Thawed"]
        .contains(&verb)
        .then(|| words.next()?.parse().ok())
        .flatten()
}

/// Runs a command to its end; its output, or the last line of its complaint.
fn run(mut command: Command, limit: Duration) -> Result<String, String> {
    let deadline = Instant::now() + limit;
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let reader = |stream: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(stream) = stream {
                stream.take(ANSWER_BYTES_MAX).read_to_end(&mut text).ok();
            }
            String::from_utf8_lossy(&text).trim().to_owned()
        })
    };
    let output = reader(child.stdout.take().map(|stream| Box::new(stream) as _));
    let errors = reader(child.stderr.take().map(|stream| Box::new(stream) as _));
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
            Ok(None) => {
                child.kill().ok();
                child.wait().ok();
                return Err(format!("no answer within {} s", limit.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        }
    };
    let (output, errors) = (
        output.join().unwrap_or_default(),
        errors.join().unwrap_or_default(),
    );
    if status.success() {
        return Ok(output);
    }
    let told = errors
        .lines()
        .last()
        .unwrap_or_default()
        .trim_start_matches("error: ");
    Err(if told.is_empty() {
        status.to_string()
    } else {
        told.to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::mount_for_tests;

    #[test]
    fn disks_are_read_as_virsh_prints_them() {
        // virsh 9.0: `domblklist --details` without its header (-q).
        let lines = " file    disk     vda   /srv/vm/my guest.qcow2\n block   disk     vdb   /dev/mapper/vg-data\n \
                     file    cdrom    sda   -\n network disk     vdc   pool/image\n file    cdrom    sdb   /srv/iso/a.iso\n";
        let disks: Vec<Disk> = lines.lines().filter_map(disk).collect();
        let sources: Vec<_> = disks
            .iter()
            .map(|disk| disk.source.to_str().unwrap_or_default())
            .collect();
        assert_eq!(sources, ["/srv/vm/my guest.qcow2", "/dev/mapper/vg-data"]);
    }

    #[test]
    fn a_guest_lies_where_its_files_lie() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let dir = dir.path().canonicalize().expect("its real name");
        let image = dir.join("a.img");
        std::fs::write(&image, "").expect("an image");
        let mounts = [
            mount_for_tests(1, "/"),
            mount_for_tests(2, dir.to_str().expect("UTF-8")),
        ];
        let disk = |source: &str| Disk {
            target: "vda".to_owned(),
            source: PathBuf::from(source),
        };
        let disks = [
            disk(image.to_str().expect("UTF-8")),
            disk("/dev/null"),
            disk("/gone/x.img"),
        ];
        assert_eq!(points(&disks, &mounts), BTreeSet::from([dir]));
    }

    #[test]
    fn only_a_number_of_file_systems_is_a_freeze() {
        assert_eq!(count("Froze 2 filesystem(s)"), Some(2));
        assert_eq!(count("Thawed 0 filesystem(s)\n"), Some(0));
        assert_eq!(count(""), None);
        assert_eq!(count("Froze some"), None);
    }

    #[test]
    fn a_program_that_hangs_or_fails_says_so() {
        let mut slow = Command::new("sleep");
        slow.arg("60");
        let error = run(slow, Duration::from_millis(50)).expect_err("killed");
        assert!(error.starts_with("no answer"), "{error}");
        let mut fails = Command::new("sh");
        fails.args(["-c", "echo 'error: no domain' >&2; exit 1"]);
        assert_eq!(run(fails, Duration::from_secs(60)), Err("no domain".to_owned()));
    }
}
