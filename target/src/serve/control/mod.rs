//! The control socket: one request per connection, answered in lines of JSON ([`api`]).
//!
//! Work goes on when its client leaves: a snapshot half taken is worse than one that nobody waited for.

mod agents;
pub(crate) mod api;
pub(crate) mod luns;
mod scrub;
mod verbs;
mod volumes;

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

use self::api::{Line, MAX_REQUEST_BYTES, Refusal, Request};
use super::Daemon;

pub(crate) use agents::check_lun as check_agent_lun;
pub(crate) use verbs::{blocking, end_sessions};
pub(crate) use volumes::{create_stopped, rename_stopped};

/// Clients at the same time; more wait to be accepted.
const MAX_CLIENTS: usize = 64;
/// A client that connects has this long to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that does not read its answer is left.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Lines that wait for a slow client.
const LINES: usize = 64;
/// The socket belongs to this group, when the system has it.
const GROUP: &str = "stillpoint";

/// Who asks, and how to tell them that work goes on.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// For events: the user's name on this machine.
    pub(crate) who: String,
    lines: mpsc::Sender<Line>,
}

impl Caller {
    /// Says what is being done now. A client that has left, or does not read, misses it.
    pub(crate) fn progress(&self, text: impl Into<String>) {
        if let Err(error) = self.lines.try_send(Line::Progress(text.into())) {
            tracing::debug!(%error, "progress not shown");
        }
    }

    /// Sends an event; false when the client has left.
    async fn event(&self, event: api::Event) -> bool {
        self.lines.send(Line::Event(event)).await.is_ok()
    }

    /// Sends a piece of a file; false when the client has left.
    pub(crate) async fn data(&self, bytes: &[u8]) -> bool {
        let text = data_encoding::BASE64.encode(bytes);
        self.lines.send(Line::Data(text)).await.is_ok()
    }

    /// Returns when the client has left.
    pub(crate) async fn left(&self) {
        self.lines.closed().await;
    }
}

/// Opens the socket and answers on it until the daemon stops.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) fn listen(daemon: &Arc<Daemon>) -> anyhow::Result<()> {
    let path = daemon.control_socket.clone();
    let listener =
        bind(&path).with_context(|| format!("the control socket {} cannot be opened", path.display()))?;
    let daemon = Arc::clone(daemon);
    daemon.tracker.clone().spawn(async move {
        let seats = Arc::new(Semaphore::new(MAX_CLIENTS));
        tokio::select! {
            () = accept(&daemon, &listener, &seats) => {}
            () = daemon.shutdown.cancelled() => {}
        }
        drop(listener);
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!(path = %path.display(), %error, "control socket not removed");
        }
    });
    Ok(())
}

async fn accept(daemon: &Arc<Daemon>, listener: &UnixListener, seats: &Arc<Semaphore>) {
    loop {
        let Ok(seat) = Arc::clone(seats).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let daemon = Arc::clone(daemon);
                daemon.tracker.clone().spawn(async move {
                    if let Err(error) = serve(&daemon, stream).await {
                        tracing::debug!(%error, "control client lost");
                    }
                    drop(seat);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "control client not accepted");
                // Out of file descriptors, most likely: trying again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Binds the socket; one that a killed daemon left behind is replaced. The caller holds the lock of the data directory, so a
/// socket that still answers belongs to another data directory: taking its place would cut off that daemon.
fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            anyhow::ensure!(
                std::os::unix::net::UnixStream::connect(path).is_err(),
                "another daemon answers there: stop it, or choose another `control_socket`"
            );
            std::fs::remove_file(path).context("the old socket cannot be removed")?;
        }
        Ok(_) => anyhow::bail!(
            "something that is not a socket is in its place: move it away, or choose another `control_socket`"
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
                std::fs::create_dir_all(parent)
                    .with_context(|| format!("{} cannot be made", parent.display()))?;
            }
        }
        Err(error) => return Err(error.into()),
    }
    let listener = UnixListener::bind(path)?;
    if let Some(group) = group_id(GROUP)
        && let Err(error) = std::os::unix::fs::chown(path, None, Some(group))
    {
        tracing::warn!(path = %path.display(), %error, "the control socket does not belong to group {GROUP}: only its owner can use it");
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .context("its permissions cannot be set")?;
    Ok(listener)
}

/// Numbers of a line-based system file by name: `name:x:number:…` in /etc/group and /etc/passwd.
fn system_ids(file: &Path) -> BTreeMap<String, u32> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let entry = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let id = fields.nth(1)?.parse().ok()?;
        Some((name, id))
    };
    text.lines().filter_map(entry).collect()
}

fn group_id(name: &str) -> Option<u32> {
    system_ids(&PathBuf::from("/etc/group")).get(name).copied()
}

/// The user behind a connection.
fn user(stream: &UnixStream) -> String {
    stream
        .peer_cred()
        .map_or_else(|_| "unknown".to_owned(), |cred| user_name(cred.uid()))
}

/// A user, by name where /etc/passwd knows it.
pub(crate) fn user_name(uid: u32) -> String {
    let users = system_ids(&PathBuf::from("/etc/passwd"));
    users
        .into_iter()
        .find(|(_, id)| *id == uid)
        .map_or_else(|| format!("uid {uid}"), |(name, _)| name)
}

async fn serve(daemon: &Arc<Daemon>, mut stream: UnixStream) -> std::io::Result<()> {
    let who = user(&stream);
    let (mut reader, mut writer) = stream.split();
    let request = match tokio::time::timeout(REQUEST_TIMEOUT, read_request(&mut reader)).await {
        Ok(Ok(request)) => request,
        Ok(Err(refusal)) => return write_line(&mut writer, &Line::Error(refusal)).await,
        Err(_) => return Ok(()),
    };
    let follows = matches!(request, Request::Events { follow: true, .. } | Request::Trace(_));
    let (lines, mut answers) = mpsc::channel(LINES);
    let caller = Caller {
        who,
        lines: lines.clone(),
    };
    let work = Arc::clone(daemon);
    daemon.tracker.spawn(async move {
        let end = match verbs::run(&work, request, &caller).await {
            Ok(value) => Line::Result(value),
            Err(refusal) => Line::Error(refusal),
        };
        drop(caller);
        if lines.send(end).await.is_err() {
            tracing::debug!("the client has left before the answer");
        }
    });
    let mut rest = [0u8; 64];
    loop {
        tokio::select! {
            line = answers.recv() => match line {
                Some(line) => write_line(&mut writer, &line).await?,
                None => return Ok(()),
            },
            // Who follows something that has no end leaves by closing; everybody else gets an answer, also when they have closed their side.
            read = reader.read(&mut rest), if follows => if read? == 0 { return Ok(()) },
        }
    }
}

async fn read_request(reader: impl tokio::io::AsyncRead + Unpin) -> Result<Request, Refusal> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(reader.take(MAX_REQUEST_BYTES));
    let malformed = |why: String| {
        Refusal::usage(
            "bad_request",
            format!("the request cannot be read: {why}"),
            "use a client of this version",
        )
    };
    reader
        .read_until(b'\n', &mut line)
        .await
        .map_err(|e| malformed(e.to_string()))?;
    if line.last() != Some(&b'\n') {
        return Err(malformed(format!(
            "it has no end within {MAX_REQUEST_BYTES} bytes"
        )));
    }
    serde_json::from_slice(&line).map_err(|e| malformed(e.to_string()))
}

async fn write_line(writer: &mut (impl tokio::io::AsyncWrite + Unpin), line: &Line) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    match tokio::time::timeout(WRITE_TIMEOUT, writer.write_all(&bytes)).await {
        Ok(written) => written,
        Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_are_bounded_and_must_be_whole() {
        let status = read_request(&b"{\"verb\":\"status\"}\n"[..]).await;
        assert_eq!(status.expect("right"), Request::Status {});
        for bytes in [&b""[..], b"{\"verb\":\"status\"}", b"nonsense\n", b"\xff\xfe\n"] {
            assert_eq!(
                read_request(bytes).await.expect_err("wrong").exit,
                api::EXIT_USAGE
            );
        }
        let long = vec![b' '; usize::try_from(MAX_REQUEST_BYTES).expect("small") + 10];
        assert!(
            read_request(&long[..])
                .await
                .expect_err("long")
                .message
                .contains("no end within")
        );
    }

    #[tokio::test]
    async fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("sub/control.sock");
        let listener = bind(&path).expect("first");
        assert_eq!(
            std::fs::metadata(&path).expect("socket").permissions().mode() & 0o777,
            0o660
        );
        assert!(
            bind(&path)
                .expect_err("alive")
                .to_string()
                .contains("another daemon")
        );
        drop(listener);
        bind(&path).expect("a dead socket is replaced");
        let file = dir.path().join("file");
        std::fs::write(&file, "x").expect("write");
        assert!(
            bind(&file)
                .expect_err("a file")
                .to_string()
                .contains("not a socket")
        );
        assert_eq!(std::fs::read(&file).expect("still there"), b"x");
    }
}
