//! The process that keeps a session, and with it the server's lock, between `freeze` and `thaw`.
//!
//! ```text
//!  freeze ── starts ──▶ hold ── locks the server, leaves freeze's process group, listens at RUN/app-NAME.sock
//!    │◀── "held" ────────┤
//!    ╵                   │ … the agent freezes, the target cuts, the agent thaws …
//!  thaw ── connects ────▶│ unlocks, says whether the lock was there until now, ends
//!                        ╳ its own timer: the session ends, and with it the lock, whatever became of the others
//! ```
//!
//! Nothing else holds the lock: when this process ends, however it ends, its client reads the end of its input and the server
//! ends the session. A killed agent therefore cannot leave a server locked.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::client::Client;
use super::{ASK_TIME_MAX, Helper, VERB, by};

/// What `hold` says when the lock is there.
const HELD: &str = "held";
/// What `hold` answers to `thaw` when the lock was there until then.
const RELEASED: &str = "released";
/// What `thaw` sends.
const THAW: u8 = b'T';
/// Whoever connects and says nothing is no `thaw`.
const LOOK_TIME_MAX: Duration = Duration::from_millis(500);
/// How often the holder looks at its clock and its client.
const POLL: Duration = Duration::from_millis(5);
/// An answer longer than this is none of ours.
const ANSWER_BYTES_MAX: u64 = 4096;

/// `freeze`: returns when the server is locked.
pub(super) fn start(helper: &Helper<'_>) -> Result<(), String> {
    let mut command = Command::new("/proc/self/exe");
    if let Some(config) = &helper.app.config {
        command.arg("--config").arg(config);
    }
    command.args([VERB, &helper.app.name, "hold"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command
        .spawn()
        .map_err(|error| format!("the lock's process: {error}"))?;
    let mut said = String::new();
    // It closes its output once it has said how it went.
    if let Some(output) = child.stdout.take() {
        output
            .take(ANSWER_BYTES_MAX)
            .read_to_string(&mut said)
            .map_err(|error| format!("the lock's process: {error}"))?;
    }
    match said.trim() {
        HELD => Ok(()),
        why => {
            // It is ending: nothing is left of it when this returns.
            child.wait().ok();
            Err(if why.is_empty() {
                "the lock's process ended".to_owned()
            } else {
                why.to_owned()
            })
        }
    }
}

/// `hold`: locks, waits for `thaw` or for its time, unlocks.
pub(super) fn serve(
    helper: &Helper<'_>,
    lock: impl FnOnce(&Helper<'_>, &mut Client) -> Result<(), String>,
    unlock: impl FnOnce(&mut Client) -> Result<(), String>,
) -> Result<(), String> {
    let (socket, mark) = (helper.run_file("sock")?, helper.run_file("frozen")?);
    let locked = prepare(helper, &socket).and_then(|(listener, mut client)| {
        lock(helper, &mut client)?;
        std::fs::write(&mark, "").map_err(|error| format!("{}: {error}", mark.display()))?;
        Ok((listener, client))
    });
    let (listener, client) = match locked {
        Ok(locked) => locked,
        Err(why) => return tell(&why),
    };
    // From here on `freeze` may be over, and nobody may end its process group for our sake. It fails only when this process leads
    // a group already.
    rustix::process::setsid().ok();
    tell(HELD)?;
    let result = wait(&listener, client, by(helper.hold_max), unlock);
    std::fs::remove_file(&socket).ok();
    result
}

fn prepare(helper: &Helper<'_>, socket: &Path) -> Result<(UnixListener, Client), String> {
    if UnixStream::connect(socket).is_ok() {
        return Err("another snapshot holds this application".to_owned());
    }
    // Left by a holder that was killed.
    std::fs::remove_file(socket).ok();
    let listen = || -> std::io::Result<UnixListener> {
        let listener = UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let listener = listen().map_err(|error| format!("{}: {error}", socket.display()))?;
    Ok((listener, helper.connect()?))
}

/// One line, and the end of standard output: `freeze` reads until there.
fn tell(text: &str) -> Result<(), String> {
    crate::report::print(text).map_err(|error| error.to_string())?;
    let nothing = std::fs::File::options().write(true).open("/dev/null");
    let closed = nothing.and_then(|nothing| Ok(rustix::stdio::dup2_stdout(&nothing)?));
    closed.map_err(|error| error.to_string())
}

fn wait(
    listener: &UnixListener,
    mut client: Client,
    deadline: Instant,
    unlock: impl FnOnce(&mut Client) -> Result<(), String>,
) -> Result<(), String> {
    loop {
        match listener.accept() {
            // Somebody who only looks whether this process is there.
            Ok((stream, _)) if !asks_for_thaw(&stream) => {}
            Ok((mut stream, _)) => {
                let answer = match unlock(&mut client) {
                    Ok(()) => RELEASED.to_owned(),
                    Err(why) => format!("the server did not keep its lock until the end: {why}"),
                };
                // Commits go on before anybody waits for this answer to be read.
                drop(client);
                stream.write_all(answer.as_bytes()).ok();
                return Ok(());
            }
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error.to_string()),
            Err(_) if Instant::now() >= deadline => return Ok(()),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

fn asks_for_thaw(mut stream: &UnixStream) -> bool {
    let mut byte = [0];
    let read = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(LOOK_TIME_MAX)))
        .and_then(|()| stream.read(&mut byte));
    matches!(read, Ok(1)) && byte == [THAW]
}

/// `thaw`: says whether the lock was held until now.
pub(super) fn end(helper: &Helper<'_>) -> Result<(), String> {
    let (socket, mark) = (helper.run_file("sock")?, helper.run_file("frozen")?);
    let was_locked = std::fs::remove_file(&mark).is_ok();
    let Ok(mut stream) = UnixStream::connect(&socket) else {
        let why = "the lock was given up before the thaw: its time was over, or its process was ended";
        // Without the mark its freeze failed: there is nothing to let go on.
        return if was_locked { Err(why.to_owned()) } else { Ok(()) };
    };
    let mut said = String::new();
    let read = stream
        .write_all(&[THAW])
        .and_then(|()| stream.set_read_timeout(Some(2 * ASK_TIME_MAX)))
        .and_then(|()| (&mut stream).take(ANSWER_BYTES_MAX).read_to_string(&mut said));
    match (read, said.as_str()) {
        (Ok(_), RELEASED) => Ok(()),
        (Ok(_), "") => Err("the lock's process ended without a word".to_owned()),
        (Ok(_), why) => Err(why.to_owned()),
        (Err(error), _) => Err(format!("the lock's process does not answer: {error}")),
    }
}
