//! Hooks: executables of a directory, called with the one argument `freeze`, `thaw` or `abort`.
//!
//! Compatible with the `fsfreeze-hook.d` of qemu-ga: a script made for it works unchanged. Because such a script does not know
//! `abort`, `thaw` follows every `freeze`, taken or not; `abort` only comes before it when no snapshot was taken.
//!
//! A hook that quiesces an application says so in a sidecar file `NAME.toml` beside it:
//!
//! ```toml
//! application = "postgresql"    # counts for the level `application` when the hook succeeds
//! mounts = ["/srv/pg"]          # optional: only when one of these is frozen; otherwise the hook is not run
//! ```

use std::collections::VecDeque;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// More hooks than this are a mistake (a directory of something else).
const HOOKS_MAX: usize = 64;
/// What is kept of a hook's output.
const OUTPUT_BYTES_MAX: usize = 2048;
/// For all hooks after the thaw together: the target waits 30 s for the answer to Release (agent-protocol.md §5).
const THAW_TIME_MAX: Duration = Duration::from_secs(20);
/// A hook that is out of time gets SIGTERM, and this much later SIGKILL.
const TERM_GRACE: Duration = Duration::from_millis(500);
/// How often a running hook is looked at.
const POLL: Duration = Duration::from_millis(5);

/// The one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Verb {
    /// Make the application's data consistent on disk and stop writing.
    Freeze,
    /// Go on.
    Thaw,
    /// No snapshot was taken; `thaw` follows.
    Abort,
    /// Would `freeze` work? For the agent's own helpers only.
    Check,
}

impl Verb {
    fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
            Self::Abort => "abort",
            Self::Check => "check",
        }
    }
}

/// One executable of the directory, or one of the agent's own helpers ([`crate::apps`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hook {
    /// Its file.
    pub(crate) path: PathBuf,
    /// Before the verb; a hook of the directory has none.
    pub(crate) arguments: Vec<String>,
    /// `hook`, or which helper it is: the kind of its application.
    pub(crate) kind: &'static str,
    /// The application that it declares.
    pub(crate) application: Option<String>,
    /// The application's version, when its check told it.
    pub(crate) version: Option<String>,
    /// The mount points it is about; empty: all.
    pub(crate) mounts: Vec<PathBuf>,
}

/// One call of a hook.
pub(crate) struct Call<'a> {
    /// Its argument.
    pub(crate) verb: Verb,
    /// It is killed after this.
    pub(crate) allowed: Duration,
    /// What a freeze is about: the mount points that will be frozen, and for how long at most.
    pub(crate) freeze: Option<(&'a [PathBuf], Duration)>,
}

impl Call<'_> {
    /// A call that carries nothing but its verb.
    pub(crate) fn plain(verb: Verb, allowed: Duration) -> Self {
        Self {
            verb,
            allowed,
            freeze: None,
        }
    }
}

/// Environment of `freeze` and `check`: the mount points that will be frozen, one per line.
pub(crate) const ENV_MOUNTS: &str = "STILLPOINT_MOUNTS";
/// Environment of `freeze`: the longest hold, in milliseconds.
pub(crate) const ENV_HOLD_MS: &str = "STILLPOINT_HOLD_MS";
/// The kind under which hooks of the directory report their applications.
pub(crate) const KIND: &str = "hook";

/// Why a hook did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HookError {
    /// It could not be started.
    #[error("{name} cannot be started: {error}")]
    Start {
        /// Which one.
        name: String,
        /// The system's word.
        error: String,
    },
    /// It ended with an error.
    #[error("{name} {verb}: {status}{output}")]
    Failed {
        /// Which one.
        name: String,
        /// Its argument.
        verb: &'static str,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        output: String,
    },
    /// Its process group was killed.
    #[error("{name} {verb} took longer than its {allowed_ms} ms and was killed")]
    Deadline {
        /// Which one.
        name: String,
        /// Its argument.
        verb: &'static str,
        /// What was left of the budget when it started.
        allowed_ms: u128,
    },
    /// The snapshot was given up while it ran.
    #[error("{name} {verb} was killed because the snapshot was given up")]
    Cancelled {
        /// Which one.
        name: String,
        /// Its argument.
        verb: &'static str,
    },
}

/// What is wrong with the directory: a snapshot must not be taken on a guess.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirError {
    /// It could not be read.
    #[error("{path}: cannot be read: {error}")]
    Read {
        /// File or directory.
        path: PathBuf,
        /// The system's word.
        error: String,
    },
    /// A sidecar is not what it should be.
    #[error("{path}: {error}")]
    Sidecar {
        /// The file.
        path: PathBuf,
        /// Where and what.
        error: String,
    },
    /// It could be changed by somebody who is not root.
    #[error("{path}: others than root may write it, and it runs as root: chown root and chmod go-w it")]
    Writable {
        /// The file or the directory.
        path: PathBuf,
    },
    /// Not a directory of hooks.
    #[error("{path}: more than {HOOKS_MAX} hooks")]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Sidecar {
    application: String,
    #[serde(default)]
    mounts: Vec<PathBuf>,
}

impl Hook {
    /// An executable of the hooks' directory.
    fn of_directory(path: PathBuf, application: Option<String>, mounts: Vec<PathBuf>) -> Self {
        Self {
            path,
            arguments: Vec::new(),
            kind: KIND,
            application,
            version: None,
            mounts,
        }
    }

    /// File name.
    pub(crate) fn name(&self) -> String {
        self.path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// Which one, for messages.
    fn label(&self) -> String {
        match &self.application {
            Some(application) if self.kind != KIND => format!("{} {application:?}", self.kind),
            _ => format!("hook {}", self.name()),
        }
    }

    /// Is it about one of these mount points?
    pub(crate) fn concerns(&self, points: &[PathBuf]) -> bool {
        self.mounts.is_empty() || self.mounts.iter().any(|mount| points.contains(mount))
    }

    /// Runs it to its end; what it printed. `started` is told its process group; `cancelled` is asked all the while.
    ///
    /// It gets its own process group, no standard input, and an environment of PATH and what the call is about.
    pub(crate) fn run(
        &self,
        call: &Call<'_>,
        started: &mut dyn FnMut(u32),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<String, HookError> {
        let (verb, allowed) = (call.verb, call.allowed);
        let deadline = Instant::now() + allowed;
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).arg(verb.as_str());
        command.current_dir("/").env_clear();
        command.env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        if let Some((mounts, hold)) = call.freeze {
            let mounts: Vec<_> = mounts.iter().map(|mount| mount.as_os_str()).collect();
            command.env(ENV_MOUNTS, mounts.join("\n".as_ref()));
            command.env(ENV_HOLD_MS, hold.as_millis().to_string());
        }
        command.stdin(Stdio::null()).process_group(0);
        let (output, writer) = std::io::pipe().map_err(|error| self.start_error(&error))?;
        let second = writer.try_clone().map_err(|error| self.start_error(&error))?;
        let mut child = command
            .stdout(writer)
            .stderr(second)
            .spawn()
            .map_err(|error| self.start_error(&error))?;
        started(child.id());
        // The command holds the pipe's write ends: without this our own end would keep it open.
        drop(command);
        let mut tail = Tail::new(output);
        let ended = loop {
            tail.drain();
            match child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) if cancelled() => {
                    break Err(HookError::Cancelled {
                        name: self.label(),
                        verb: verb.as_str(),
                    });
                }
                Ok(None) if Instant::now() >= deadline => {
                    let allowed_ms = allowed.as_millis();
                    break Err(HookError::Deadline {
                        name: self.label(),
                        verb: verb.as_str(),
                        allowed_ms,
                    });
                }
                Ok(None) => std::thread::sleep(POLL),
                Err(error) => break Err(self.start_error(&error)),
            }
        };
        let status = ended.inspect_err(|_| end_group(&mut child))?;
        tail.drain();
        if status.success() {
            return Ok(tail.text());
        }
        let (name, verb, said) = (self.label(), verb.as_str(), tail.text());
        // Our own helpers say why; their status says nothing more.
        let (status, output) = match (said.is_empty(), self.kind == KIND) {
            (true, _) => (status.to_string(), said),
            (false, true) => (status.to_string(), format!(": {said}")),
            (false, false) => (String::new(), said),
        };
        Err(HookError::Failed {
            name,
            verb,
            status,
            output,
        })
    }

    fn start_error(&self, error: &std::io::Error) -> HookError {
        HookError::Start {
            name: self.label(),
            error: error.to_string(),
        }
    }
}

/// Tells hooks that were called with `freeze` to go on, the last one first: `abort` when no snapshot was taken, then `thaw`
/// in any case. What `thaw` said, in the order of `hooks`.
pub(crate) fn go_on(hooks: &[&Hook], taken: bool) -> Vec<Result<(), HookError>> {
    let deadline = Instant::now() + THAW_TIME_MAX;
    // A hook gets a second even when others used all the time: it must not miss its thaw.
    let left = || {
        deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_secs(1))
    };
    let run = |hook: &Hook, verb| {
        hook.run(&Call::plain(verb, left()), &mut |_| {}, &|| false)
            .map(drop)
    };
    let tell = |hook: &&Hook| {
        if !taken && let Err(error) = run(hook, Verb::Abort) {
            // A hook made for qemu-ga does not know `abort`.
            tracing::debug!(%error, "a hook did not take `abort`");
        }
        run(hook, Verb::Thaw)
    };
    let mut said: Vec<_> = hooks.iter().rev().map(tell).collect();
    said.reverse();
    said
}

/// Ends a hook whose `freeze` still runs although its agent is gone. `group` may have been given to others since: the
/// command line tells.
pub(crate) fn end_abandoned(hook: &Hook, group: u32) {
    let line = std::fs::read(format!("/proc/{group}/cmdline")).unwrap_or_default();
    let path = hook.path.as_os_str().as_encoded_bytes();
    let is_it = line.split(|byte| *byte == 0).any(|word| word == path);
    if is_it && let Some(group) = i32::try_from(group).ok().and_then(Pid::from_raw) {
        // It may end by itself in this very moment.
        rustix::process::kill_process_group(group, Signal::KILL).ok();
    }
}

/// The hooks of a directory in the order of their names. A missing directory has none.
///
/// Names that end in `~` or hold anything but letters, digits, `_` and `-` (and one suffix) are editors' leftovers, as qemu-ga
/// has it: a `.rpmsave` or `.dpkg-old` must not run. Files that are not executable are left out.
pub(crate) fn read_dir(dir: &Path) -> Result<Vec<Hook>, DirError> {
    let read = |error: std::io::Error| DirError::Read {
        path: dir.to_owned(),
        error: error.to_string(),
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read(error)),
    };
    check_owner_writes(dir)?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(read)?.path();
        if is_hook(&path) {
            paths.push(path);
        }
    }
    if paths.len() > HOOKS_MAX {
        return Err(DirError::TooMany { path: dir.to_owned() });
    }
    paths.sort();
    paths.into_iter().map(with_sidecar).collect()
}

fn is_hook(path: &Path) -> bool {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let is_leftover = [
        ".rpmsave",
        ".rpmorig",
        ".rpmnew",
        ".dpkg-old",
        ".dpkg-new",
        ".dpkg-dist",
        ".sample",
        ".bak",
        ".toml",
    ]
    .iter()
    .any(|suffix| name.ends_with(suffix));
    let runs =
        std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    runs && !is_leftover && !name.ends_with('~') && !name.starts_with('.')
}

fn with_sidecar(path: PathBuf) -> Result<Hook, DirError> {
    check_owner_writes(&path)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".toml");
    let beside = path.with_file_name(name);
    let text = match std::fs::read_to_string(&beside) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Hook::of_directory(path, None, Vec::new()));
        }
        Err(error) => {
            return Err(DirError::Read {
                path: beside,
                error: error.to_string(),
            });
        }
    };
    let sidecar = |error: String| DirError::Sidecar {
        path: beside.clone(),
        error,
    };
    let meant: Sidecar = toml::from_str(&text).map_err(|error| sidecar(error.to_string()))?;
    if meant.application.trim().is_empty() || meant.application.len() > 128 {
        return Err(sidecar(
            "`application` is the name of the application, 1 to 128 bytes".to_owned(),
        ));
    }
    Ok(Hook::of_directory(path, Some(meant.application), meant.mounts))
}

fn check_owner_writes(path: &Path) -> Result<(), DirError> {
    let me = rustix::process::geteuid().as_raw();
    let others = |meta: std::fs::Metadata| {
        meta.permissions().mode() & 0o022 != 0 || (meta.uid() != 0 && meta.uid() != me)
    };
    if std::fs::metadata(path).is_ok_and(others) {
        return Err(DirError::Writable {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Ends the whole process group: a hook's children must not outlive the snapshot.
fn end_group(child: &mut Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let signal = |signal| group.map(|group| rustix::process::kill_process_group(group, signal));
    signal(Signal::TERM);
    let deadline = Instant::now() + TERM_GRACE;
    while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(POLL);
    }
    signal(Signal::KILL);
    // Fails only when the child was waited for already.
    drop(child.wait());
}

/// Reads a pipe without waiting and keeps its last bytes, so that a chatty hook neither blocks nor fills our memory.
struct Tail {
    pipe: Option<std::io::PipeReader>,
    kept: VecDeque<u8>,
}

impl Tail {
    fn new(pipe: std::io::PipeReader) -> Self {
        let set = rustix::fs::fcntl_getfl(&pipe)
            .and_then(|flags| rustix::fs::fcntl_setfl(&pipe, flags | rustix::fs::OFlags::NONBLOCK));
        // A pipe that would block is not read at all: losing its text is better than losing the deadline.
        Self {
            pipe: set.is_ok().then_some(pipe),
            kept: VecDeque::new(),
        }
    }

    fn drain(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut buffer = [0; 4096];
        // Bounded per call: a hook that writes without end must not keep us from looking at the clock.
        for _ in 0..16 {
            match pipe.read(&mut buffer) {
                Ok(count) if count > 0 => self.kept.extend(buffer.get(..count).unwrap_or_default()),
                _ => return,
            }
            let over = self.kept.len().saturating_sub(OUTPUT_BYTES_MAX);
            self.kept.drain(..over);
        }
    }

    fn text(mut self) -> String {
        String::from_utf8_lossy(self.kept.make_contiguous())
            .trim()
            .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a temporary directory"))
        }

        fn hook(&self, name: &str, script: &str) -> Hook {
            let path = self.0.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
            Hook::of_directory(path, None, Vec::new())
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.path().join(name), text).expect("write");
        }
    }

    fn run(hook: &Hook, verb: Verb, ms: u64) -> Result<String, HookError> {
        // A fork of another test's thread may hold the script open for writing for a moment (ETXTBSY).
        loop {
            match hook.run(
                &Call::plain(verb, Duration::from_millis(ms)),
                &mut |_| {},
                &|| false,
            ) {
                Err(HookError::Start { error, .. }) if error.contains("busy") => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                result => return result,
            }
        }
    }

    #[test]
    fn directory_order_sidecars_and_leftovers() {
        let dir = Dir::new();
        dir.hook("20-b", "");
        dir.hook("10-a.sh", "");
        dir.hook("30-c.dpkg-old", "");
        dir.hook("40-d~", "");
        dir.write("50-not-executable", "#!/bin/sh\n");
        dir.write("20-b.toml", "application = \"postgresql\"\nmounts = [\"/pg\"]\n");
        let hooks = read_dir(dir.0.path()).expect("hooks");
        assert_eq!(
            hooks.iter().map(Hook::name).collect::<Vec<_>>(),
            ["10-a.sh", "20-b"]
        );
        assert_eq!(hooks[1].application.as_deref(), Some("postgresql"));
        assert!(hooks[1].concerns(&["/x".into(), "/pg".into()]));
        assert!(!hooks[1].concerns(&["/x".into()]));
        assert!(hooks[0].concerns(&["/x".into()]));
    }

    #[test]
    fn a_missing_directory_is_empty_and_a_bad_sidecar_is_an_error() {
        assert!(
            read_dir(Path::new("/nonexistent/hooks.d"))
                .expect("no directory")
                .is_empty()
        );
        let dir = Dir::new();
        dir.hook("a", "");
        dir.write("a.toml", "aplication = \"x\"\n");
        let error = read_dir(dir.0.path())
            .expect_err("a spelling mistake")
            .to_string();
        assert!(error.contains("aplication"), "{error}");
    }

    #[test]
    fn what_others_may_write_is_not_run() {
        let dir = Dir::new();
        let hook = dir.hook("a", "");
        fs::set_permissions(&hook.path, fs::Permissions::from_mode(0o777)).expect("chmod");
        assert!(matches!(read_dir(dir.0.path()), Err(DirError::Writable { .. })));
        fs::set_permissions(&hook.path, fs::Permissions::from_mode(0o755)).expect("chmod");
        assert!(read_dir(dir.0.path()).is_ok());
        // Only root can give a file away.
        if std::os::unix::fs::chown(&hook.path, Some(65534), None).is_ok() {
            assert!(matches!(read_dir(dir.0.path()), Err(DirError::Writable { .. })));
        }
    }

    #[test]
    fn argument_exit_code_and_output_arrive() {
        let dir = Dir::new();
        let hook = dir.hook(
            "h",
            "[ \"$#$1\" = 1thaw ] && exit 0; echo \"no $1 here\" >&2; exit 3",
        );
        assert_eq!(run(&hook, Verb::Thaw, 5000), Ok(String::new()));
        let error = run(&hook, Verb::Freeze, 5000)
            .expect_err("it exits 3")
            .to_string();
        assert_eq!(error, "hook h freeze: exit status: 3: no freeze here");
    }

    #[test]
    fn a_hook_out_of_time_dies_with_its_children() {
        let dir = Dir::new();
        let pid_file = dir.0.path().join("pid");
        let hook = dir.hook(
            "h",
            &format!("trap '' TERM; sleep 60 & echo $! > {}; wait", pid_file.display()),
        );
        let started = Instant::now();
        let error = run(&hook, Verb::Freeze, 300).expect_err("too slow");
        assert!(
            matches!(error, HookError::Deadline { allowed_ms: 300, .. }),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(5));
        let pid: i32 = fs::read_to_string(&pid_file)
            .expect("its child")
            .trim()
            .parse()
            .expect("a pid");
        let gone = || match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while !gone() {
            assert!(Instant::now() < deadline, "the child of the hook still lives");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_snapshot_given_up_ends_the_hook_at_once() {
        let dir = Dir::new();
        let hook = dir.hook("h", "sleep 60");
        let started = Instant::now();
        let cancelled = || started.elapsed() > Duration::from_millis(100);
        let call = Call::plain(Verb::Freeze, Duration::from_secs(30));
        let result = hook.run(&call, &mut |_| {}, &cancelled);
        assert!(
            matches!(result, Err(HookError::Cancelled { .. } | HookError::Start { .. })),
            "{result:?}"
        );
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn endless_output_neither_blocks_nor_fills_memory() {
        let dir = Dir::new();
        let hook = dir.hook("h", "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; i=$((i+1)); done; exit 1");
        let error = run(&hook, Verb::Freeze, 20_000).expect_err("exit 1").to_string();
        assert!(error.len() < OUTPUT_BYTES_MAX + 100);
    }
}
