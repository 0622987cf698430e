//! The thaw guard: a second small process that outlives the agent and thaws what the agent froze.
//!
//! ```text
//!  agent                              guard (own session, memory locked, directories open)
//!    │ hold, journals, directories ───▶│ opens /proc/AGENT/fd/N, mlockall
//!    │◀───────────────────────── Ready │
//!    │ hooks `freeze` …                │
//!    │ Go ────────────────────────────▶│ its own timer starts: the whole hold
//!    │◀───────────────────────── Armed │
//!    │ FIFREEZE … FITHAW               │
//!    │ Disarm ────────────────────────▶│ answers whether its timer had fired
//!    │ hooks `thaw` …                  │
//!    │ Bye ───────────────────────────▶│ ends
//!    ╳ (the socket closes, any time)   │ thaws if armed, tells the hooks to go on, removes the journals, ends
//! ```
//!
//! The kernel has no timeout for a frozen file system [M, agent-protocol.md §11]: without the guard, an agent that is
//! killed or stopped while it holds a freeze would leave the host's writers asleep for ever (and the applications behind its
//! hooks quiesced).

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::mm::{MlockAllFlags, mlockall};

use crate::journal;
use crate::sys;
use crate::volumes::Root;

/// The hidden verb that makes a process a guard.
pub(crate) const VERB: &str = "thaw-guard";
/// A guard that does not answer within this is no guard: nothing is frozen then.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// An order longer than this is no order of ours.
const ORDER_BYTES_MAX: u64 = 64 * 1024;
/// How often the guard thaws again once its timer has fired and the agent has not said anything.
const AGAIN: Duration = Duration::from_millis(50);
/// How long the guard goes on thawing after the agent's end. The socket closes when the last thread of the agent is gone,
/// so no FIFREEZE of it can still be under way; this is for the case that a kernel closes files earlier than that.
const AFTERMATH: Duration = Duration::from_secs(1);

const READY: u8 = b'R';
const GO: u8 = b'G';
const ARMED: u8 = b'A';
const DISARM: u8 = b'D';
const BYE: u8 = b'B';
const KEPT: u8 = b'K';
const FIRED: u8 = b'F';
const ERROR: u8 = b'E';

/// Why there is no guard.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuardError {
    /// The process could not be started.
    #[error("the thaw guard cannot be started: {0}")]
    Start(#[source] io::Error),
    /// It did not answer as it should.
    #[error("the thaw guard does not answer: {0}")]
    Silent(#[source] io::Error),
    /// It said why it cannot guard.
    #[error("the thaw guard refuses: {0}")]
    Refused(String),
}

/// The agent's end of a guard.
pub(crate) struct Guard {
    child: Child,
    socket: UnixStream,
}

impl Guard {
    /// Starts a guard over these directories (in the order of freezing), and waits until it is ready.
    ///
    /// `journals` (of file systems, of hooks) are what the guard carries out and removes in the agent's place.
    pub(crate) fn start(dirs: &[OwnedFd], hold: Duration, journals: [&Path; 2]) -> Result<Self, GuardError> {
        let (socket, theirs) = UnixStream::pair().map_err(GuardError::Start)?;
        socket
            .set_read_timeout(Some(ANSWER_TIME_MAX))
            .map_err(GuardError::Start)?;
        // Our own binary, also when the file was replaced by an upgrade meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg(VERB).current_dir("/").env_clear();
        command
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().map_err(GuardError::Start)?;
        drop(command);
        let mut guard = Self { child, socket };
        guard
            .socket
            .write_all(order(dirs, hold, journals).as_bytes())
            .map_err(GuardError::Silent)?;
        guard.expect(READY)?;
        Ok(guard)
    }

    /// Starts the guard's timer. From here on the hold ends in time whatever happens to the agent.
    pub(crate) fn arm(&mut self) -> Result<(), GuardError> {
        self.socket.write_all(&[GO]).map_err(GuardError::Silent)?;
        self.expect(ARMED)
    }

    /// Everything is thawed: stops the guard's timer. `true` when it had not fired.
    pub(crate) fn disarm(&mut self) -> bool {
        self.socket.write_all(&[DISARM]).is_ok() && matches!(self.answer(), Ok(KEPT))
    }

    /// The hooks go on: lets the guard end.
    pub(crate) fn dismiss(mut self) {
        if let Err(error) = self.socket.write_all(&[BYE]) {
            tracing::debug!(%error, "the thaw guard has ended already");
        }
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "the thaw guard could not be waited for");
        }
    }

    fn expect(&mut self, wanted: u8) -> Result<(), GuardError> {
        match self.answer().map_err(GuardError::Silent)? {
            got if got == wanted => Ok(()),
            ERROR => {
                let mut text = String::new();
                let read = (&mut self.socket).take(1024).read_to_string(&mut text);
                Err(GuardError::Refused(
                    read.map_or_else(|error| error.to_string(), |_| text),
                ))
            }
            other => Err(GuardError::Refused(format!(
                "it said {other:#04x}, not {wanted:#04x}"
            ))),
        }
    }

    fn answer(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.socket.read_exact(&mut byte)?;
        Ok(byte[0])
    }
}

fn order(dirs: &[OwnedFd], hold: Duration, journals: [&Path; 2]) -> String {
    let [volumes, hooks] = journals.map(Path::display);
    let mut order = format!("{}\n{volumes}\n{hooks}\n", hold.as_millis());
    for dir in dirs {
        // By descriptor, not by path: a mount over the path must not lead the guard to another file system.
        order.push_str(&format!("/proc/{}/fd/{}\n", std::process::id(), dir.as_raw_fd()));
    }
    order.push('\n');
    order
}

/// The guard process, from start to end.
pub(crate) fn run() -> ExitCode {
    let socket = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from);
    match socket.and_then(|mut socket| serve(&mut socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(socket: &mut UnixStream) -> io::Result<()> {
    let watch = match Watch::prepare(socket) {
        Ok(watch) => watch,
        Err(error) => {
            socket.write_all(&[ERROR])?;
            return socket.write_all(error.to_string().as_bytes());
        }
    };
    // Whatever becomes of the talk: the agent says Bye, or the guard puts everything right.
    let mut armed = false;
    if !matches!(watch.talk(socket, &mut armed), Ok(true)) {
        watch.aftermath(armed);
    }
    Ok(())
}

struct Watch {
    hold: Duration,
    journal: PathBuf,
    hook_journal: PathBuf,
    /// In the order of thawing.
    dirs: Vec<File>,
}

impl Watch {
    fn prepare(socket: &mut UnixStream) -> io::Result<Self> {
        let text = read_order(socket)?;
        let mut lines = text.lines();
        let invalid = || io::Error::new(ErrorKind::InvalidData, "not an order of the agent");
        let hold_ms = lines
            .next()
            .and_then(|line| line.parse().ok())
            .ok_or_else(invalid)?;
        let journal = lines.next().map(PathBuf::from).ok_or_else(invalid)?;
        let hook_journal = lines.next().map(PathBuf::from).ok_or_else(invalid)?;
        let mut dirs = lines
            .filter(|line| !line.is_empty())
            .map(File::open)
            .collect::<io::Result<Vec<_>>>()?;
        dirs.reverse();
        // A session of its own: a terminal's ^C or hang-up must not take the guard with the agent. It fails only when
        // the process leads a group already, and then it has what is wanted.
        rustix::process::setsid().ok();
        // Without CAP_SYS_RESOURCE the score stays; the guard is small and rarely the one to be chosen.
        std::fs::write("/proc/self/oom_score_adj", "-1000").ok();
        // A page fault while the file systems sleep could wait for one of them.
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)?;
        Ok(Self {
            hold: Duration::from_millis(hold_ms),
            journal,
            hook_journal,
            dirs,
        })
    }

    /// Until the agent says Bye (`true`) or is gone. `armed` is true while file systems may be frozen.
    fn talk(&self, socket: &mut UnixStream, armed: &mut bool) -> io::Result<bool> {
        socket.write_all(&[READY])?;
        let mut deadline = None;
        let mut fired = false;
        loop {
            let left = deadline.map(|deadline: Instant| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                fired = true;
                self.thaw();
            }
            // A zero timeout would mean to wait for ever. After the hold the thaw is repeated until the agent speaks.
            socket.set_read_timeout(left.map(|left| if left.is_zero() { AGAIN } else { left }))?;
            let mut byte = [0];
            match socket.read(&mut byte) {
                Ok(0) => return Ok(false),
                Ok(_) => match byte {
                    [GO] => {
                        deadline = Some(Instant::now() + self.hold);
                        *armed = true;
                        socket.write_all(&[ARMED])?;
                    }
                    [DISARM] => {
                        deadline = None;
                        *armed = false;
                        socket.write_all(&[if fired { FIRED } else { KEPT }])?;
                    }
                    [BYE] => return Ok(true),
                    _ => {}
                },
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The agent is gone.
    fn aftermath(&self, armed: bool) {
        let end = Instant::now() + AFTERMATH;
        if armed {
            self.thaw();
            while Instant::now() < end {
                std::thread::sleep(AGAIN);
                self.thaw();
            }
        }
        std::fs::remove_file(&self.journal).ok();
        journal::recover_hooks(&self.hook_journal, &Root::real());
    }

    /// Not being frozen (EINVAL) is what is wanted; any other error cannot be helped here and is tried again.
    fn thaw(&self) {
        for dir in &self.dirs {
            sys::thaw(dir).ok();
        }
    }
}

fn read_order(socket: &mut UnixStream) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    let mut limited = socket.take(ORDER_BYTES_MAX);
    while !text.ends_with(b"\n\n") {
        limited.read_exact(&mut byte)?;
        text.extend(byte);
    }
    String::from_utf8(text).map_err(|_| io::Error::new(ErrorKind::InvalidData, "an order that is not UTF-8"))
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}
