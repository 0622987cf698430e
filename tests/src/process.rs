//! Child processes that cannot outlive their story.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(20);

/// What a finished command left.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Exit code; a signal counts as 128 + its number, as in a shell.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Standard output of a command that must have succeeded.
    ///
    /// # Errors
    /// The exit code was not 0; the message carries both streams.
    pub fn success(self) -> Result<String> {
        ensure!(
            self.code == 0,
            "exit code {}\n{}{}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }

    /// Standard error of a command that must have ended with `code`.
    ///
    /// # Errors
    /// It ended with another one.
    pub fn refused(self, code: i32) -> Result<String> {
        ensure!(
            self.code == code,
            "exit code {} instead of {code}\n{}{}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self.stderr)
    }
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or runs longer than `limit` (it is killed then).
pub fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let note = PidNote::write(&child);
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = wait_child(&mut child, limit)?;
    if status.is_none() {
        child.kill().ok();
        child.wait().ok();
    }
    drop(note);
    let stdout = stdout.join().unwrap_or_default();
    let stderr = stderr.join().unwrap_or_default();
    match status {
        Some(status) => Ok(Finished {
            code: shell_code(status),
            stdout,
            stderr,
        }),
        None => bail!("still running after {limit:?}: {shown}\n{stdout}{stderr}"),
    }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            pipe.read_to_end(&mut bytes).ok();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait_child(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait().context("waiting for a child")? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(POLL);
    }
}

fn shell_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A process that goes on beside the story; killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    log: PathBuf,
    _note: PidNote,
}

impl Running {
    /// Starts `command` with both output streams appended to `log`.
    ///
    /// # Errors
    /// The log or the process cannot be created.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cloning a log handle")?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let note = PidNote::write(&child);
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            _note: note,
        })
    }

    /// Takes charge of a process that was started otherwise, and whose streams somebody else reads.
    #[must_use]
    pub fn adopt(name: &str, child: Child) -> Self {
        let note = PidNote::write(&child);
        Self {
            name: name.to_owned(),
            child,
            log: PathBuf::new(),
            _note: note,
        }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// All that it printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        fs::read(&self.log)
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// Whether it has ended, and how.
    ///
    /// # Errors
    /// The system refuses to say.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        Ok(self
            .child
            .try_wait()
            .context("waiting for a child")?
            .map(shell_code))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process has ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a process id")?;
        kill_process(pid, signal).with_context(|| format!("signal to {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<i32> {
        match wait_child(&mut self.child, limit)? {
            Some(status) => Ok(shell_code(status)),
            None => bail!("{} still runs after {limit:?}", self.name),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Waits until `ready` says so.
///
/// # Errors
/// It does not within `limit`; `what` names the thing waited for.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !ready().with_context(|| format!("while waiting for {what}"))? {
        ensure!(Instant::now() < deadline, "{what}: not after {limit:?}");
        thread::sleep(POLL);
    }
    Ok(())
}

/// A file named like the process id while the process lives, for `tests/run`: a story that is itself killed runs no
/// destructor, and the script then ends what it left.
#[derive(Debug)]
struct PidNote(Option<PathBuf>);

impl PidNote {
    fn write(child: &Child) -> Self {
        let note =
            std::env::var_os("STILLPOINT_TEST_PIDS").map(|dir| Path::new(&dir).join(child.id().to_string()));
        Self(note.filter(|path| File::create(path).is_ok()))
    }
}

impl Drop for PidNote {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            fs::remove_file(path).ok();
        }
    }
}
