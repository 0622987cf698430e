//! The client's end of the control socket.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stillpoint_config::{Config, DEFAULT_CONFIG_FILE, EMBEDDED_DATA_DIR};

use super::args::Global;
use crate::serve::control::api::{Event, Line, MAX_REPLY_BYTES, Refusal, Request};

/// Where the daemon's socket is: `--socket`, or what the configuration says, or what `serve` without one uses here.
///
/// # Errors
/// When a named configuration file cannot be read.
pub(crate) fn socket_path(global: &Global) -> Result<PathBuf, Refusal> {
    if let Some(socket) = &global.socket {
        return Ok(socket.clone());
    }
    if let Some(file) = &global.config {
        return Config::control_socket_of(file).map_err(|problems| super::config_refusal(&problems));
    }
    let usual = Path::new(DEFAULT_CONFIG_FILE);
    // A client may not be allowed to read the daemon's file; then the usual socket is the best guess.
    if let Ok(socket) = Config::control_socket_of(usual) {
        return Ok(socket);
    }
    let embedded = Path::new(EMBEDDED_DATA_DIR).join("control.sock");
    if embedded.exists() && !usual.exists() {
        return Ok(embedded);
    }
    Ok(PathBuf::from("/run/stillpoint/control.sock"))
}

/// What the daemon says on the way, besides progress.
#[derive(Debug)]
pub(crate) enum Streamed {
    /// Of `events --follow`.
    Event(Event),
    /// Of `trace`.
    Data(Vec<u8>),
}

/// Asks the daemon, and hands on what it says on the way.
///
/// # Errors
/// What the daemon refused, or that it does not answer.
pub(crate) fn ask(
    global: &Global,
    request: &Request,
    mut progress: impl FnMut(&str),
    mut streamed: impl FnMut(Streamed) -> std::io::Result<()>,
) -> Result<Value, Refusal> {
    let path = socket_path(global)?;
    let stream = UnixStream::connect(&path).map_err(|error| unreachable(&path, &error))?;
    let lost = |error: &std::io::Error| {
        Refusal::unreachable(
            format!("the daemon went away before it had answered ({error})"),
            "see its log; what was asked may have been done: look before asking again",
        )
    };
    let mut line = serde_json::to_vec(request).map_err(|e| Refusal::failed("internal", e.to_string(), ""))?;
    line.push(b'\n');
    (&stream).write_all(&line).map_err(|e| lost(&e))?;
    let mut reader = BufReader::new(&stream);
    loop {
        let mut line = Vec::new();
        reader
            .by_ref()
            .take(MAX_REPLY_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(|e| lost(&e))?;
        if line.last() != Some(&b'\n') {
            return Err(lost(&std::io::ErrorKind::UnexpectedEof.into()));
        }
        let line = serde_json::from_slice(&line).map_err(|e| unreadable(&e))?;
        let piece = match line {
            Line::Progress(text) => {
                progress(&text);
                continue;
            }
            Line::Event(event) => Streamed::Event(event),
            Line::Data(text) => {
                let bytes = data_encoding::BASE64.decode(text.as_bytes());
                Streamed::Data(bytes.map_err(|e| unreadable(&e))?)
            }
            Line::Result(value) => return Ok(value),
            Line::Error(refusal) => return Err(refusal),
        };
        // Nobody reads our output any more, as in `stillpoint events --follow | head`.
        if streamed(piece).is_err() {
            return Ok(Value::Null);
        }
    }
}

fn unreadable(error: &dyn std::error::Error) -> Refusal {
    Refusal::failed(
        "protocol",
        format!("the daemon's answer cannot be read ({error})"),
        "use the client of the daemon's version",
    )
}

fn unreachable(path: &Path, error: &std::io::Error) -> Refusal {
    let hint = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "run it as the daemon's user, or join the group `stillpoint`",
        _ => "start it with `stillpoint serve`, or say where it listens with --socket or --config",
    };
    Refusal::unreachable(format!("no daemon answers on {} ({error})", path.display()), hint)
}
