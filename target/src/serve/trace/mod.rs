//! `stillpoint trace`: the PDUs of one session as pcapng, while it runs.
//!
//! The session's task makes the bytes and never waits for whoever takes them: what finds no room is counted, and the file says
//! where it is missing.

mod pcapng;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use stillpoint_iscsi::{Payload, Recorded};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::Daemon;
use super::control::Caller;
use super::control::api::{Refusal, TraceRequest, done};
use super::events::code;
use super::registry::{Control, Session};

/// Bytes that wait for the client; a session must not hold more because somebody records it.
const WAITING_BYTES: usize = 8 << 20;
/// Pieces that wait for the client.
const WAITING: usize = 1024;
/// The session's task answers within a turn of its loop.
const ANSWER: Duration = Duration::from_secs(5);

/// What the session's task is asked to do.
#[derive(Debug)]
pub(crate) struct Order {
    payload: Payload,
    max_bytes: u64,
    figures: Arc<Figures>,
    pieces: mpsc::Sender<Piece>,
    room: Arc<Semaphore>,
    /// Whether it does; not when it is being recorded already.
    started: oneshot::Sender<bool>,
}

/// Bytes of the file.
#[derive(Debug)]
struct Piece {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

#[derive(Debug, Default)]
struct Figures {
    pdus: AtomicU64,
    missed: AtomicU64,
    bytes: AtomicU64,
}

/// The recording side, in the session's task.
#[derive(Debug)]
pub(crate) struct Trace {
    writer: pcapng::Writer,
    figures: Arc<Figures>,
    pieces: mpsc::Sender<Piece>,
    room: Arc<Semaphore>,
    left: u64,
    /// PDUs that were missed since the last one in the file.
    missed: u64,
    /// One moment on both clocks.
    clocks: (Instant, SystemTime),
}

impl Trace {
    /// Begins to record `session`, unless somebody does already. Whoever asked is told.
    pub(crate) fn begin(order: Order, session: &Session, before: Option<&Self>) -> Option<(Self, Payload)> {
        // A client that left is noticed with the next PDU only.
        let busy = before.is_some_and(|before| !before.pieces.is_closed());
        if order.started.send(!busy).is_err() || busy {
            return None;
        }
        let writer = pcapng::Writer::new(session.peer, session.portal);
        let mut trace = Self {
            figures: order.figures,
            pieces: order.pieces,
            room: order.room,
            left: order.max_bytes,
            missed: 0,
            clocks: (Instant::now(), SystemTime::now()),
            writer,
        };
        let hidden = match order.payload {
            Payload::Redact => "; contents of blocks are left out",
            Payload::Keep => "",
        };
        let comment = format!(
            "session {} of {} at {}{hidden}",
            session.id,
            session.initiator,
            session.target.iqn()
        );
        let head = trace.writer.head(&format!("session {}", session.id), &comment);
        (trace.put(head)).then_some((trace, order.payload))
    }

    /// Puts one PDU into the file. `false` when the recording is over.
    pub(crate) fn record(&mut self, pdu: &Recorded) -> bool {
        if self.pieces.is_closed() {
            return false;
        }
        let (instant, time) = self.clocks;
        let time = time + pdu.at.saturating_duration_since(instant);
        let mut bytes = Vec::with_capacity(pdu.shown.len() + 128);
        // A PDU that is missed must not be half in the file: first the room, then the bytes.
        if self.pieces.capacity() == 0 || self.room.available_permits() < pdu.shown.len() + MADE_UP_MAX {
            self.writer.skip(pdu);
            self.missed += 1;
            self.figures.missed.fetch_add(1, Relaxed);
            return true;
        }
        self.writer
            .pdu(&mut bytes, time, pdu, std::mem::take(&mut self.missed));
        if bytes.len() as u64 > self.left {
            return false;
        }
        self.figures.pdus.fetch_add(1, Relaxed);
        self.put(bytes)
    }

    /// `false` when nobody takes it any more.
    fn put(&mut self, bytes: Vec<u8>) -> bool {
        let permits = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(permits) else {
            return false;
        };
        self.left = self.left.saturating_sub(bytes.len() as u64);
        self.figures.bytes.fetch_add(bytes.len() as u64, Relaxed);
        self.pieces.try_send(Piece { bytes, _room: room }).is_ok()
    }
}

/// Headers and blocks around one PDU: 260 segments of the longest one there can be.
const MADE_UP_MAX: usize = 64 << 10;

/// Records a session until the client leaves, the time or the size is up, or the session ends.
pub(crate) async fn run(
    daemon: &Arc<Daemon>,
    request: TraceRequest,
    caller: &Caller,
) -> Result<Value, Refusal> {
    let id = request.session;
    let sessions = daemon.registry.sessions_with(|session| session.id == id);
    let Some(session) = sessions.first() else {
        return Err(no_session(id));
    };
    let figures = Arc::new(Figures::default());
    let (pieces, mut incoming) = mpsc::channel(WAITING);
    let (started, answer) = oneshot::channel();
    session.tell(Control::Trace(Order {
        payload: if request.payload {
            Payload::Keep
        } else {
            Payload::Redact
        },
        max_bytes: request.max_bytes,
        figures: Arc::clone(&figures),
        pieces,
        room: Arc::new(Semaphore::new(WAITING_BYTES)),
        started,
    }));
    match tokio::time::timeout(ANSWER, answer).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => {
            return Err(Refusal::refused(
                "busy",
                format!("session {id} is being recorded already"),
                "wait until that ends, or stop it (Ctrl-C)",
            ));
        }
        _ => return Err(no_session(id)),
    }
    let payload = if request.payload {
        "with the contents of blocks"
    } else {
        "without the contents of blocks"
    };
    daemon.events.emit(
        code::SESSION_TRACED,
        format!("target {}", session.target.iqn()),
        format!(
            "session {id} of {} from {} is being recorded, {payload}",
            session.initiator, session.peer
        ),
        &caller.who,
    );
    let ended = copy(&mut incoming, &request, caller, session).await;
    Ok(done([
        ("session", json!(id)),
        ("pdus", json!(figures.pdus.load(Relaxed))),
        ("missed_pdus", json!(figures.missed.load(Relaxed))),
        ("file_bytes", json!(figures.bytes.load(Relaxed))),
        ("ended_by", json!(ended)),
    ]))
}

/// Hands the pieces on; says why it ended.
async fn copy(
    incoming: &mut mpsc::Receiver<Piece>,
    request: &TraceRequest,
    caller: &Caller,
    session: &Session,
) -> &'static str {
    let duration = request.seconds.map(Duration::from_secs);
    let time_is_up = async {
        match duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(time_is_up);
    loop {
        tokio::select! {
            piece = incoming.recv() => match piece {
                Some(piece) => {
                    if !caller.data(&piece.bytes).await {
                        return "client";
                    }
                }
                None if session.ending().is_some() || session.gone.is_cancelled() => return "session",
                None => return "size",
            },
            () = &mut time_is_up => break,
            () = caller.left() => return "client",
        }
    }
    // What was recorded by then belongs to the file.
    incoming.close();
    while let Some(piece) = incoming.recv().await {
        if !caller.data(&piece.bytes).await {
            return "client";
        }
    }
    "duration"
}

fn no_session(id: u64) -> Refusal {
    Refusal::failed(
        "not_found",
        format!("there is no session {id}"),
        "`stillpoint session list` shows them",
    )
}
