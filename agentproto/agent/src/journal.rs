//! What is frozen now, written down before it is frozen, in the run directory: `frozen-SESSION.json` names file systems,
//! `hooks-SESSION.json` hooks that were called with `freeze`.
//!
//! The guard uses the second one when the agent dies. Both are the last resort when the guard dies, too: an agent that
//! starts, and `stillpoint-agent thaw`, put right what the journals say. They name the boot, because no freeze outlives one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::hooks::{self, Hook};
use crate::sys;
use crate::volumes::{self, DeviceNumber, Inventory, Mount, Root};

/// One journal file.
#[derive(Debug, Serialize, Deserialize)]
struct Journal {
    boot_id: String,
    volumes: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    dev: String,
    point: PathBuf,
}

/// A hook that was called with `freeze` and not yet with `thaw`.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    path: PathBuf,
    /// Before the verb.
    #[serde(default)]
    arguments: Vec<String>,
    /// Its process group while it runs.
    group: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct BegunHooks {
    boot_id: String,
    hooks: Vec<Begun>,
}

/// The journal of a session's hooks.
#[derive(Debug)]
pub(crate) struct HookJournal {
    path: PathBuf,
    content: BegunHooks,
}

impl HookJournal {
    /// The journal of a session; nothing is written before the first hook.
    pub(crate) fn new(run_dir: &Path, session: &str, root: &Root) -> Self {
        let path = run_dir.join(format!("hooks-{session}.json"));
        Self {
            path,
            content: BegunHooks {
                boot_id: boot_id(root),
                hooks: Vec::new(),
            },
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Before a hook is called.
    pub(crate) fn begin(&mut self, hook: &Hook) -> io::Result<()> {
        self.content.hooks.push(Begun {
            path: hook.path.clone(),
            arguments: hook.arguments.clone(),
            group: None,
        });
        self.write()
    }

    /// While it runs (its process group), and when it has ended.
    pub(crate) fn running(&mut self, group: Option<u32>) -> io::Result<()> {
        if let Some(last) = self.content.hooks.last_mut() {
            last.group = group;
        }
        self.write()
    }

    fn write(&self) -> io::Result<()> {
        replace(&self.path, &serde_json::to_vec(&self.content)?)
    }
}

/// What became of one file system or hook of a journal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// The mount point, or the hook.
    pub(crate) what: PathBuf,
    /// What happened.
    pub(crate) outcome: Outcome,
}

/// What happened to a file system that a journal names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was frozen and is thawed.
    Thawed,
    /// It was not frozen.
    NotFrozen,
    /// It is not mounted any more.
    Gone,
    /// The kernel refused, or the hook failed.
    Failed(String),
    /// The hook was told to go on.
    WentOn,
}

/// Where the journal of a session is.
pub(crate) fn path(run_dir: &Path, session: &str) -> PathBuf {
    run_dir.join(format!("frozen-{session}.json"))
}

/// Writes a journal, in one step (a half-written one would name nothing).
pub(crate) fn write(
    path: &Path,
    root: &Root,
    volumes: impl Iterator<Item = (DeviceNumber, PathBuf)>,
) -> io::Result<()> {
    let volumes = volumes
        .map(|(dev, point)| Entry {
            dev: dev.to_string(),
            point,
        })
        .collect();
    let text = serde_json::to_vec(&Journal {
        boot_id: boot_id(root),
        volumes,
    })?;
    replace(path, &text)
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, text)?;
    fs::rename(beside, path)
}

/// Forgets a journal after the thaw.
pub(crate) fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a journal stays behind: the next start thaws what it names");
    }
}

/// Thaws what the journals of this boot name, outermost first, tells the hooks that they name to go on, and removes them.
pub(crate) fn recover(run_dir: &Path, root: &Root) -> Vec<Recovered> {
    let Ok(entries) = fs::read_dir(run_dir) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    // File systems first: a hook that has to go on writes.
    let thawed = paths
        .iter()
        .filter(|path| is_journal(path))
        .flat_map(|path| thaw_one(path, root));
    let mut recovered: Vec<Recovered> = thawed.collect();
    recovered.extend(
        paths
            .iter()
            .filter(|path| is_hook_journal(path))
            .flat_map(|path| recover_hooks(path, root)),
    );
    recovered
}

/// Tells the hooks of a journal to go on, in the place of an agent that is gone.
pub(crate) fn recover_hooks(path: &Path, root: &Root) -> Vec<Recovered> {
    // The guard and a new agent may both come here: the one that gets the file does it.
    let claimed = path.with_extension("claimed");
    if fs::rename(path, &claimed).is_err() {
        return Vec::new();
    }
    let journal: Option<BegunHooks> = read(&claimed);
    let journal = journal.filter(|journal| journal.boot_id == boot_id(root));
    let begun = journal.map(|journal| journal.hooks).unwrap_or_default();
    let hook = |begun: &Begun| Hook {
        path: begun.path.clone(),
        arguments: begun.arguments.clone(),
        kind: hooks::KIND,
        application: None,
        version: None,
        mounts: Vec::new(),
    };
    let hooks: Vec<Hook> = begun.iter().map(hook).collect();
    for (hook, begun) in hooks.iter().zip(&begun) {
        if let Some(group) = begun.group {
            hooks::end_abandoned(hook, group);
        }
    }
    let said = hooks::go_on(&hooks.iter().collect::<Vec<_>>(), false);
    remove(&claimed);
    let outcome = |said: Result<(), hooks::HookError>| match said {
        Ok(()) => Outcome::WentOn,
        Err(error) => Outcome::Failed(error.to_string()),
    };
    let recovered = hooks.into_iter().zip(said);
    recovered
        .map(|(hook, said)| Recovered {
            what: hook.path,
            outcome: outcome(said),
        })
        .collect()
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    fs::read(path)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
}

fn is_hook_journal(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("hooks-") && name.ends_with(".json")
}

fn is_journal(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("frozen-") && name.ends_with(".json")
}

fn thaw_one(path: &Path, root: &Root) -> Vec<Recovered> {
    let Some(journal) = read::<Journal>(path) else {
        tracing::warn!(path = %path.display(), "a journal that cannot be read: it is left for a person to look at");
        return Vec::new();
    };
    let mut recovered = Vec::new();
    if journal.boot_id == boot_id(root) {
        let mounts = Inventory::mounts(root);
        recovered = journal
            .volumes
            .iter()
            .rev()
            .map(|entry| thaw_entry(entry, &mounts))
            .collect();
    }
    let failed = |one: &Recovered| matches!(one.outcome, Outcome::Failed(_));
    if !recovered.iter().any(failed) {
        remove(path);
    }
    recovered
}

/// By device number, not by path: the mount may have moved.
fn thaw_entry(entry: &Entry, mounts: &[Mount]) -> Recovered {
    let dev = DeviceNumber::parse(&entry.dev);
    let mut outcome = Outcome::Gone;
    let mut at = entry.point.clone();
    for mount in mounts.iter().filter(|mount| Some(mount.dev) == dev) {
        at.clone_from(&mount.point);
        outcome = match volumes::open(&mount.point, mount.dev).and_then(|dir| sys::thaw(&dir)) {
            Ok(()) => Outcome::Thawed,
            Err(error) if sys::was_not_frozen(&error) => Outcome::NotFrozen,
            Err(error) => Outcome::Failed(error.to_string()),
        };
        if !matches!(outcome, Outcome::Failed(_)) {
            break;
        }
    }
    Recovered { what: at, outcome }
}

/// The sessions that have a journal now.
pub(crate) fn names(run_dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run_dir) else {
        return Vec::new();
    };
    let paths = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| is_journal(path));
    let stem = |path: PathBuf| {
        path.file_stem()
            .map(|stem| stem.to_string_lossy().replacen("frozen-", "", 1))
    };
    paths.filter_map(stem).collect()
}

/// The kernel's name for this boot.
pub(crate) fn boot_id(root: &Root) -> String {
    root.text("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(boot: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(dir.path().join("proc/sys/kernel/random")).expect("mkdir");
        fs::create_dir_all(dir.path().join("proc/self")).expect("mkdir");
        fs::write(dir.path().join("proc/sys/kernel/random/boot_id"), boot).expect("write");
        dir
    }

    fn journal(run: &Path, root: &Root) -> PathBuf {
        let path = path(run, "abc");
        let volumes = [(DeviceNumber { major: 9, minor: 9 }, PathBuf::from("/gone"))];
        write(&path, root, volumes.into_iter()).expect("a journal");
        path
    }

    #[test]
    fn an_unmounted_volume_is_gone_and_the_journal_with_it() {
        let (host, run) = (host("b1"), tempfile::tempdir().expect("a temporary directory"));
        let root = Root::at(host.path());
        let path = journal(run.path(), &root);
        let gone = Recovered {
            what: "/gone".into(),
            outcome: Outcome::Gone,
        };
        assert_eq!(recover(run.path(), &root), [gone]);
        assert!(!path.exists());
    }

    #[test]
    fn a_journal_of_another_boot_thaws_nothing() {
        let (host, run) = (host("b1"), tempfile::tempdir().expect("a temporary directory"));
        let path = journal(run.path(), &Root::at(host.path()));
        fs::write(host.path().join("proc/sys/kernel/random/boot_id"), "b2").expect("write");
        assert_eq!(recover(run.path(), &Root::at(host.path())), []);
        assert!(!path.exists(), "it can never be true again");
    }

    #[test]
    fn garbage_is_left_for_a_person() {
        let (host, run) = (host("b1"), tempfile::tempdir().expect("a temporary directory"));
        let path = path(run.path(), "abc");
        fs::write(&path, "{").expect("write");
        assert_eq!(recover(run.path(), &Root::at(host.path())), []);
        assert!(path.exists());
    }
}
