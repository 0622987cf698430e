//! A conversation with a client program: statements on its standard input, rows on its standard output.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What is kept of its complaints, in bytes.
const STDERR_MAX: u64 = 2048;
/// Rows of one answer: a few settings, a few directories.
const ROWS_MAX: usize = 4096;
/// How long a client that was told to end may take.
const END_TIME_MAX: Duration = Duration::from_millis(500);

/// One session of a client program. It ends, and with it every lock of the session, when this is dropped.
pub(super) struct Client {
    child: Child,
    /// Until it is told to end.
    input: Option<ChildStdin>,
    rows: Receiver<String>,
    complaints: Receiver<String>,
    /// Numbers the marks that tell where an answer ends.
    asked: u32,
}

impl Client {
    /// Starts a client as a user of this host. Whether the server lets it in shows with the first statement.
    pub(super) fn start(mut command: Command, run_as: &str) -> Result<Self, String> {
        let program = command.get_program().to_string_lossy().into_owned();
        let user = user(run_as)?;
        command.env("HOME", &user.home).env("LC_ALL", "C.UTF-8");
        if user.uid != rustix::process::geteuid().as_raw() {
            command.uid(user.uid).gid(user.gid);
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            format!("{program} cannot be started: {error}: see `client` and `run_as` in agent.toml")
        })?;
        let input = child.stdin.take();
        let (row, rows) = channel();
        let (complaint, complaints) = channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                let lines = BufReader::new(output).lines().map_while(Result::ok);
                // It ends when nobody listens any more.
                for line in lines {
                    if row.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        if let Some(errors) = child.stderr.take() {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                let mut errors = errors;
                errors.by_ref().take(STDERR_MAX).read_to_end(&mut text).ok();
                complaint
                    .send(String::from_utf8_lossy(&text).trim().to_owned())
                    .ok();
                // A client that goes on complaining must not wait for a reader.
                std::io::copy(&mut errors, &mut std::io::sink()).ok();
            });
        }
        Ok(Self {
            child,
            input,
            rows,
            complaints,
            asked: 0,
        })
    }

    /// Lets the server carry out a statement (without the semicolon); its rows, columns apart by tabs.
    pub(super) fn ask(&mut self, statement: &str, by: Instant) -> Result<Vec<String>, String> {
        self.asked += 1;
        let mark = format!("stillpoint-{}", self.asked);
        let text = format!("{statement};\nSELECT '{mark}';\n");
        let written = self.input.as_mut().map(|input| input.write_all(text.as_bytes()));
        if !matches!(written, Some(Ok(()))) {
            return Err(self.last_words());
        }
        let mut rows = Vec::new();
        loop {
            let left = by.saturating_duration_since(Instant::now());
            match self.rows.recv_timeout(left) {
                Ok(row) if row == mark => return Ok(rows),
                Ok(row) if rows.len() < ROWS_MAX => rows.push(row),
                Ok(_) => return Err("the server's answer is too long".to_owned()),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("the server did not answer in time ({statement})"));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.last_words()),
            }
        }
    }

    /// Why it ended.
    pub(super) fn last_words(&mut self) -> String {
        let said = self.complaints.recv_timeout(END_TIME_MAX).unwrap_or_default();
        // Around the server's word the clients repeat the statement, and ask back.
        let lines: Vec<&str> = said
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        let is_error = |line: &&&str| line.to_ascii_lowercase().contains("error");
        let told = lines.iter().rfind(is_error).or_else(|| lines.last());
        told.map_or_else(
            || "the client ended without a word".to_owned(),
            |line| (*line).to_owned(),
        )
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The end of its input ends it, and the server then ends the session; one that waits for its server is killed.
        drop(self.input.take());
        let deadline = Instant::now() + END_TIME_MAX;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A user of this host.
#[derive(Debug, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
    home: String,
}

/// Servers run as local system users, so `/etc/passwd` is enough; a number needs no entry.
fn user(name: &str) -> Result<User, String> {
    let text = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    if let Some(user) = user_in(&text, name) {
        return Ok(user);
    }
    let uid: u32 = name.parse().map_err(|_| {
        format!("`run_as = {name:?}`: /etc/passwd has no such user; write another, or its number")
    })?;
    Ok(User {
        uid,
        gid: uid,
        home: "/".to_owned(),
    })
}

fn user_in(passwd: &str, name: &str) -> Option<User> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    fields.into_iter().find_map(|fields| match fields.as_slice() {
        [user, _, uid, gid, _, home, ..] if *user == name || *uid == name => Some(User {
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: (*home).to_owned(),
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: &str = "0";

    fn sh(script: &str) -> Client {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        let me = rustix::process::geteuid().as_raw().to_string();
        Client::start(command, &me).expect("a shell")
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// Echoes what a `SELECT '…';` asks for, as a client with a server does.
    const ECHO: &str = "while read -r line; do case $line in SELECT*) line=${line#*\\'}; echo \"${line%\\'*}\";; ROWS*) echo a; echo b;; BAD*) echo 'BAD;' >&2; echo 'ERROR 1: no such thing' >&2; echo 'Is it there?' >&2; exit 1;; esac; done";

    #[test]
    fn rows_come_up_to_the_mark_and_the_session_stays() {
        let mut client = sh(ECHO);
        assert_eq!(
            client.ask("ROWS", soon()),
            Ok(vec!["a".to_owned(), "b".to_owned()])
        );
        assert_eq!(client.ask("NOTHING", soon()), Ok(vec![]));
        assert!(matches!(client.child.try_wait(), Ok(None)));
    }

    #[test]
    fn the_error_in_a_complaint_is_the_reason() {
        let mut client = sh(ECHO);
        assert_eq!(
            client.ask("BAD", soon()),
            Err("ERROR 1: no such thing".to_owned())
        );
    }

    #[test]
    fn a_server_that_hangs_is_given_up_and_its_client_killed() {
        let mut client = sh("trap '' TERM; sleep 60 & wait");
        let error = client
            .ask("BEGIN", Instant::now() + Duration::from_millis(50))
            .expect_err("nobody answers");
        assert!(error.contains("in time"), "{error}");
        let pid = client.child.id();
        drop(client);
        assert!(
            !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            "it was waited for"
        );
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres:x:105:113:PG:/var/lib/postgresql:/bin/bash\n";
        let user = user_in(passwd, "postgres").expect("there");
        assert_eq!(
            (user.uid, user.gid, user.home.as_str()),
            (105, 113, "/var/lib/postgresql")
        );
        assert_eq!(user_in(passwd, "105"), Some(user));
        assert_eq!(user_in(passwd, "mysql"), None);
        assert!(super::user("nobody-of-that-name").is_err());
        assert_eq!(super::user(ME).map(|user| user.uid), Ok(0));
    }
}
