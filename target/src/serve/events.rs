//! What operators and auditors read: every event has a stable code, a severity, a subject, a text, and who did it.
//!
//! The newest events are kept in RAM for `stillpoint events`; all of them go to `events.jsonl` in the data directory, which is
//! rotated so that it stays bounded. Writing happens on a thread of its own: an event must never make a session wait for a disk.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

/// Events that `stillpoint events` can show.
const KEPT: usize = 1024;
/// Events that a slow follower may lag behind before it misses some.
const FOLLOW_LAG: usize = 256;
/// Events that wait for the disk; more are kept in RAM only.
const WAITING: usize = 4096;
/// The log is rotated at this size …
const ROTATE_BYTES: u64 = 4 << 20;
/// … and this many old ones are kept.
const ROTATED: u32 = 4;
const FILE: &str = "events.jsonl";

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Severity {
    /// Life goes on.
    Info,
    /// Something is weaker than it should be.
    Warning,
    /// Someone must act.
    Error,
}

/// A kind of event: a number that never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u16, pub(crate) Severity);

/// The codes. 1: daemon; 2: LUNs, volumes, targets; 3: store; 4: sessions; 5: snapshots; 6: agents.
pub(crate) mod code {
    use super::{Code, Severity};

    const fn info(number: u16) -> Code {
        Code(number, Severity::Info)
    }
    const fn warning(number: u16) -> Code {
        Code(number, Severity::Warning)
    }
    const fn error(number: u16) -> Code {
        Code(number, Severity::Error)
    }

    pub(crate) const STARTED: Code = info(1001);
    pub(crate) const CONFIG_APPLIED: Code = info(1003);
    pub(crate) const CONFIG_REFUSED: Code = error(1004);
    pub(crate) const VOLUME_CREATED: Code = info(2001);
    pub(crate) const VOLUME_GROWN: Code = info(2002);
    pub(crate) const TARGET_ADDED: Code = info(2003);
    pub(crate) const TARGET_REMOVED: Code = info(2004);
    pub(crate) const VOLUME_RENAMED: Code = info(2006);
    pub(crate) const VOLUME_DELETED: Code = warning(2007);
    pub(crate) const CLONE_CREATED: Code = info(2008);
    pub(crate) const STORE_POISONED: Code = error(3001);
    pub(crate) const STORE_FULL: Code = error(3002);
    pub(crate) const STORE_SPACE_BACK: Code = info(3003);
    pub(crate) const BAD_DATA: Code = error(3010);
    pub(crate) const BAD_DATA_GONE: Code = info(3011);
    pub(crate) const SCRUB_STARTED: Code = info(3012);
    pub(crate) const SCRUB_CLEAN: Code = info(3013);
    pub(crate) const SCRUB_FOUND: Code = error(3014);
    pub(crate) const STORE_FILLS: Code = warning(3020);
    pub(crate) const STORE_EMPTIER: Code = info(3021);
    pub(crate) const STORE_COMPACTED: Code = info(3022);
    pub(crate) const SESSION_DROPPED: Code = warning(4001);
    pub(crate) const SESSION_TRACED: Code = info(4002);
    pub(crate) const SNAPSHOT_CREATED: Code = info(5001);
    pub(crate) const SNAPSHOT_WEAKER: Code = warning(5002);
    pub(crate) const SNAPSHOT_FAILED: Code = error(5003);
    pub(crate) const SNAPSHOT_DELETED: Code = warning(5004);
    pub(crate) const LUN_REVERTED: Code = warning(5005);
    pub(crate) const SNAPSHOT_MOUNTED: Code = info(5006);
    pub(crate) const SNAPSHOT_UNMOUNTED: Code = info(5007);
    pub(crate) const SNAPSHOT_HELD: Code = info(5008);
    pub(crate) const SNAPSHOT_RELEASED: Code = info(5009);
    pub(crate) const SNAPSHOT_INTERRUPTED: Code = warning(5010);
    pub(crate) const MOUNT_NOT_SERVED: Code = error(5011);
    pub(crate) const REVERT_ENDED: Code = info(5020);
    pub(crate) const REVERT_STUCK: Code = error(5021);
    pub(crate) const VSS_TAKEN: Code = info(5030);
    pub(crate) const VSS_EXPOSED: Code = info(5031);
    pub(crate) const VSS_DELETED: Code = info(5032);
    pub(crate) const VSS_ABANDONED: Code = warning(5033);
    pub(crate) const VSS_TROUBLE: Code = error(5034);
    pub(crate) const AGENT_CHANGED: Code = info(6001);
    pub(crate) const AGENT_TROUBLE: Code = warning(6002);
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Event {
    /// Counts up over restarts.
    pub(crate) id: u64,
    /// RFC 3339, UTC.
    pub(crate) time: String,
    /// `SP-1203`.
    pub(crate) code: String,
    pub(crate) severity: Severity,
    /// The thing: a LUN, a snapshot, an agent.
    pub(crate) subject: String,
    pub(crate) text: String,
    /// The person who caused it; `stillpoint` when nobody did.
    pub(crate) who: String,
}

/// Nobody: the daemon itself.
pub(crate) const DAEMON: &str = "stillpoint";

#[derive(Debug)]
struct Ring {
    events: VecDeque<Event>,
    last_id: u64,
    to_disk: Option<SyncSender<Box<Event>>>,
}

#[derive(Debug)]
struct Inner {
    ring: Mutex<Ring>,
    follow: broadcast::Sender<Event>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// The events of the daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Events(Arc<Inner>);

impl Events {
    /// Opens the log in the data directory and reads back its newest events.
    ///
    /// # Errors
    /// When the log cannot be opened.
    pub(crate) fn open(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join(FILE);
        let mut events = VecDeque::new();
        for file in [rotated(&path, 1), path.clone()] {
            read_back(&file, &mut events)
                .with_context(|| format!("the event log {} cannot be read", file.display()))?;
        }
        let log = Log::open(path)?;
        let (to_disk, from_events) = sync_channel(WAITING);
        let writer = std::thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || log.run(&from_events))
            .context("the event log's thread cannot be started")?;
        let last_id = events.back().map_or(0, |event: &Event| event.id);
        let ring = Ring {
            events,
            last_id,
            to_disk: Some(to_disk),
        };
        let (follow, _) = broadcast::channel(FOLLOW_LAG);
        Ok(Self(Arc::new(Inner {
            ring: Mutex::new(ring),
            follow,
            writer: Mutex::new(Some(writer)),
        })))
    }

    /// Records an event. Does not block.
    pub(crate) fn emit(&self, code: Code, subject: impl Into<String>, text: impl Into<String>, who: &str) {
        let mut ring = self.0.lock();
        ring.last_id += 1;
        let event = Event {
            id: ring.last_id,
            time: jiff::Timestamp::now().to_string(),
            code: format!("SP-{:04}", code.0),
            severity: code.1,
            subject: subject.into(),
            text: text.into(),
            who: who.to_owned(),
        };
        if ring.events.len() == KEPT {
            ring.events.pop_front();
        }
        ring.events.push_back(event.clone());
        let written = ring
            .to_disk
            .as_ref()
            .map(|to_disk| to_disk.try_send(Box::new(event.clone())));
        // Sent under the lock, so that a follower sees the events in their order. Nobody following is no error.
        let _followers = self.0.follow.send(event.clone());
        drop(ring);
        if let Some(Err(TrySendError::Full(_))) = written {
            tracing::warn!(code = %event.code, "the disk is too slow for the event log: an event is kept in memory only");
        }
        log(&event);
    }

    /// The newest events, oldest first.
    pub(crate) fn newest(&self, count: usize) -> Vec<Event> {
        let ring = self.0.lock();
        ring.events
            .iter()
            .skip(ring.events.len().saturating_sub(count))
            .cloned()
            .collect()
    }

    /// The newest events, and every later one: none is lost between the two.
    pub(crate) fn follow(&self, count: usize) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let ring = self.0.lock();
        let later = self.0.follow.subscribe();
        (
            ring.events
                .iter()
                .skip(ring.events.len().saturating_sub(count))
                .cloned()
                .collect(),
            later,
        )
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    /// The last events of a daemon that stops belong into the log too.
    fn drop(&mut self) {
        self.lock().to_disk = None;
        if let Some(writer) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take()
            && writer.join().is_err()
        {
            tracing::error!("the event log's thread has panicked");
        }
    }
}

fn log(event: &Event) {
    let Event {
        code,
        subject,
        text,
        who,
        ..
    } = event;
    match event.severity {
        Severity::Info => tracing::info!(%code, %who, "{subject}: {text}"),
        Severity::Warning => tracing::warn!(%code, %who, "{subject}: {text}"),
        Severity::Error => tracing::error!(%code, %who, "{subject}: {text}"),
    }
}

/// Reads the events of one file. A line that a crash has cut is skipped: the log is a record for people, not a source of truth.
fn read_back(path: &Path, events: &mut VecDeque<Event>) -> std::io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for line in BufReader::new(file).split(b'\n') {
        if let Ok(event) = serde_json::from_slice::<Event>(&line?) {
            if events.len() == KEPT {
                events.pop_front();
            }
            events.push_back(event);
        }
    }
    Ok(())
}

fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// The file that the events are appended to.
struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// One complaint per outage.
    failing: bool,
}

impl Log {
    fn open(path: PathBuf) -> anyhow::Result<Self> {
        let open = || -> std::io::Result<(File, u64)> {
            let file = File::options().create(true).append(true).open(&path)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        };
        let (file, bytes) =
            open().with_context(|| format!("the event log {} cannot be opened", path.display()))?;
        Ok(Self {
            path,
            file,
            bytes,
            failing: false,
        })
    }

    fn run(mut self, events: &Receiver<Box<Event>>) {
        while let Ok(event) = events.recv() {
            match self.append(&event) {
                Ok(()) => self.failing = false,
                Err(error) if !self.failing => {
                    self.failing = true;
                    tracing::error!(path = %self.path.display(), %error, "the event log cannot be written");
                }
                Err(_) => {}
            }
        }
    }

    fn append(&mut self, event: &Event) -> std::io::Result<()> {
        if self.bytes >= ROTATE_BYTES {
            self.rotate()?;
        }
        // A leading line end too: a line that a full disk has cut must not swallow this one. Empty lines are skipped.
        let mut line = if self.failing { b"\n".to_vec() } else { Vec::new() };
        serde_json::to_writer(&mut line, event)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> std::io::Result<()> {
        for number in (1..ROTATED).rev() {
            let from = rotated(&self.path, number);
            if from.exists() {
                fs::rename(from, rotated(&self.path, number + 1))?;
            }
        }
        fs::rename(&self.path, rotated(&self.path, 1))?;
        self.file = File::options().create(true).append(true).open(&self.path)?;
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_a_restart_and_keep_counting() {
        let dir = tempfile::tempdir().expect("dir");
        let events = Events::open(dir.path()).expect("open");
        events.emit(code::VOLUME_CREATED, "lun a", "volume made", "ann");
        events.emit(code::STORE_FULL, "pool", "no space", DAEMON);
        drop(events);
        // A crash cuts a line.
        let mut file = File::options()
            .append(true)
            .open(dir.path().join(FILE))
            .expect("log");
        file.write_all(b"{\"id\":3,\"ti\n").expect("write");
        let events = Events::open(dir.path()).expect("reopen");
        events.emit(code::STORE_SPACE_BACK, "pool", "space is back", DAEMON);
        let all = events.newest(10);
        let codes: Vec<&str> = all.iter().map(|e| e.code.as_str()).collect();
        assert_eq!(codes, ["SP-2001", "SP-3002", "SP-3003"]);
        assert_eq!(all.iter().map(|e| e.id).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!((all[0].who.as_str(), all[1].severity), ("ann", Severity::Error));
        assert_eq!(events.newest(1)[0].id, 3);
    }

    #[test]
    fn the_log_is_bounded() {
        let dir = tempfile::tempdir().expect("dir");
        let mut log = Log::open(dir.path().join(FILE)).expect("open");
        let event = Event {
            id: 1,
            time: String::new(),
            code: "SP-0001".into(),
            severity: Severity::Info,
            subject: String::new(),
            text: "x".repeat(1 << 20),
            who: String::new(),
        };
        for _ in 0..60 {
            log.append(&event).expect("append");
        }
        let files = fs::read_dir(dir.path()).expect("dir").count();
        assert_eq!(files, 1 + ROTATED as usize);
        let bytes: u64 = fs::read_dir(dir.path())
            .expect("dir")
            .map(|e| e.expect("entry").metadata().expect("meta").len())
            .sum();
        assert!(
            bytes <= (ROTATE_BYTES + (2 << 20)) * u64::from(ROTATED + 1),
            "{bytes}"
        );
    }

    #[test]
    fn a_follower_misses_nothing_between_the_past_and_the_future() {
        let dir = tempfile::tempdir().expect("dir");
        let events = Events::open(dir.path()).expect("open");
        events.emit(code::STARTED, "daemon", "one", DAEMON);
        let (past, mut later) = events.follow(10);
        events.emit(code::STARTED, "daemon", "two", DAEMON);
        assert_eq!(past.len(), 1);
        assert_eq!(later.try_recv().expect("later").text, "two");
        assert!(later.try_recv().is_err());
    }
}
