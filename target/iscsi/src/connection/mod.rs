//! One connection, which is one session: MaxConnections=1, ErrorRecoveryLevel=0.
//!
//! - this file: the verbs, and the states of a connection
//! - `login_phase`: Login Requests up to the owner's admission
//! - `full`: the state of a session in full feature phase, and which PDU goes where
//! - `commands`: SCSI commands, their data and their answers
//! - `management`: task management, logout
//! - `text_phase`: Text Requests, SendTargets
//! - `timers`: deadlines and pings

mod commands;
mod full;
mod login_phase;
mod management;
mod text_phase;
mod timers;

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};

use self::full::{Full, Session};
use self::timers::Timers;
use crate::config::ConnectionConfig;
use crate::error::Error;
use crate::event::{Admission, Counters, Directory, EndedTasks, Event, Outcome, Phase, SessionInfo};
use crate::frame::{Digests, Frame};
use crate::login::{DEFAULT_MAX_RECV, Entropy, Login, LoginReply, Names};
use crate::pdu::{AsyncEvent, AsyncMessage, Numbers};
use crate::receive::Receiver;
use crate::record::{Payload, Recorded, Recorder};
use crate::session::CommandWindow;
use crate::transfer::SegmentLimits;
use crate::transmit::{Control, Mark, Transmitter};
use crate::types::{Cid, CmdSn, Isid, Lun, SessionType, StatSn, TaskId, TmfId, TmfResponse, Tsih};

/// Seconds that an initiator has to begin a negotiation that we asked for.
const NEGOTIATE_WITHIN_S: u16 = 15;

/// Where a connection stands, with what is valid there.
enum State {
    /// Logging in.
    Login(Box<Login>),
    /// Login is complete but for the owner's word.
    Admission(Box<Login>, LoginReply),
    /// Logged in.
    Full(Box<Session>),
    /// Over, once everything is sent.
    Closing { logged_out: bool },
}

/// One iSCSI connection of a target, without its socket. See the crate's README for the loop around it.
pub struct Connection {
    config: ConnectionConfig,
    directory: Arc<dyn Directory>,
    now: Instant,
    rx: Receiver,
    tx: Transmitter,
    window: CommandWindow,
    state: State,
    events: VecDeque<Event>,
    timers: Timers,
    who: Who,
    counters: Counters,
    /// A Login or Text Response is not yet sent: the initiator may not go on before (RFC 7143 §6.2).
    our_turn: bool,
    recorder: Option<Box<Recorder>>,
}

/// Who is at the other end.
#[derive(Debug, Default)]
struct Who {
    names: Option<Names>,
    isid: Option<Isid>,
    cid: Option<Cid>,
    tsih: Option<Tsih>,
}

impl Connection {
    /// A connection that was accepted at `now`. Limits that contradict the keys are widened: a transfer is at least a
    /// first burst.
    #[must_use]
    pub fn new(now: Instant, mut config: ConnectionConfig, directory: Arc<dyn Directory>) -> Self {
        config.limits.transfer_bytes = config.limits.transfer_bytes.max(config.keys.first_burst_length);
        config.limits.queue_depth = config.limits.queue_depth.clamp(1, 0xffff);
        let mut entropy = Entropy::new(config.seed);
        let first_stat_sn = StatSn(u32::from_be_bytes(entropy.bytes()));
        // The login has its own, so that StatSN tells nothing about the challenges.
        let login = Login::new(entropy.bytes());
        Self {
            directory,
            now,
            rx: Receiver::new(),
            tx: Transmitter::new(first_stat_sn),
            window: CommandWindow::new(CmdSn(0), config.limits.queue_depth),
            state: State::Login(Box::new(login)),
            events: VecDeque::new(),
            timers: Timers::new(now),
            who: Who::default(),
            counters: Counters::default(),
            our_turn: false,
            recorder: None,
            config,
        }
    }

    /// Where the next bytes from the socket go: the staging buffer, or the task's own data buffer. Never empty.
    pub fn space(&mut self) -> &mut [u8] {
        self.rx.space()
    }

    /// `n` bytes were read into [`Self::space`]. Once the connection is over, they are ignored.
    ///
    /// # Errors
    /// The connection is over: send what [`Self::poll_transmit`] still yields, then close the socket.
    pub fn advance(&mut self, now: Instant, n: usize) -> Result<(), Error> {
        self.now = now;
        if matches!(self.state, State::Closing { .. }) {
            self.rx = Receiver::new();
            return Ok(());
        }
        if n > 0 {
            self.timers.heard(now);
            self.counters.bytes_in += n as u64;
        }
        self.rx.advance(n);
        let result = self.take_pdus();
        self.settle();
        result.map_err(|error| self.fail(error))
    }

    fn take_pdus(&mut self) -> Result<(), Error> {
        loop {
            let digests = match &self.state {
                State::Full(session) => session.digests(),
                State::Closing { .. } => return Ok(()),
                _ => Digests::default(),
            };
            if self.rx.wants_header() {
                let Some(head) = self.rx.next_head(digests.header)? else {
                    return Ok(());
                };
                let sink = match self.full() {
                    Some(mut full) => full.sink_for(&head)?,
                    None => self.login_sink(&head)?,
                };
                self.rx.begin(head, sink);
            }
            let Some(received) = self.rx.finish(digests) else {
                return Ok(());
            };
            self.counters.pdus_in += 1;
            if let Some(recorder) = &mut self.recorder {
                recorder.received(self.now, &received, digests);
            }
            match self.full() {
                Some(mut full) => full.on_pdu(received)?,
                None => self.on_login_pdu(&received)?,
            }
            self.settle();
        }
    }

    /// Whether the owner should leave the socket alone for now: too many answers wait to be sent, or too much data is held.
    #[must_use]
    pub fn receiving_paused(&self) -> bool {
        let short_of_memory = matches!(&self.state, State::Full(session) if session.must_pause(self.now));
        short_of_memory || self.tx.control_bytes() >= self.config.limits.output_bytes
    }

    /// Whether something waits for [`crate::SharedMemory`].
    #[must_use]
    pub fn waits_for_memory(&self) -> bool {
        matches!(&self.state, State::Full(session) if session.share.retry_at.is_some() || session.must_pause(self.now))
    }

    /// Some of the shared memory is free again. Commands that wait inside come with [`Self::poll_event`].
    pub fn memory_freed(&mut self, now: Instant) {
        self.now = now;
        if let Some(mut full) = self.full() {
            full.session.share.retry_at = None;
            full.pump_r2ts();
        }
        self.settle();
    }

    /// What the owner must do next. To be asked until `None` after every other verb, and again when frames were sent:
    /// commands that read wait here while too much read data is unsent.
    pub fn poll_event(&mut self) -> Option<Event> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        self.full()?.next_command().map(Event::Command)
    }

    /// The next PDU to send, if any.
    pub fn poll_transmit(&mut self) -> Option<Frame> {
        let limits = match &self.state {
            State::Full(session) => session.segment_limits(),
            _ => SegmentLimits {
                max_recv: DEFAULT_MAX_RECV,
                max_burst: u32::MAX,
            },
        };
        let sent = self.tx.next(&mut self.window, limits)?;
        self.timers.sent(self.now, self.tx.is_empty());
        match sent.mark {
            Mark::None => {}
            Mark::Ping => self.timers.ping_left(self.now),
            Mark::Turn => self.our_turn = false,
        }
        if let State::Full(session) = &mut self.state {
            session.on_sent(sent.read_bytes, sent.command_over);
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.sent(self.now, &sent.frame);
        }
        self.counters.pdus_out += 1;
        self.counters.bytes_out += sent.frame.len() as u64;
        Some(sent.frame)
    }

    /// Whether [`Self::poll_transmit`] would yield something.
    #[must_use]
    pub fn wants_transmit(&self) -> bool {
        !self.tx.is_empty()
    }

    /// The owner's word on [`Event::Admission`]. Without such a question it does nothing.
    pub fn admit(&mut self, now: Instant, admission: Admission) {
        self.now = now;
        self.on_admission(admission);
        self.settle();
    }

    /// A command ended. For a task that was aborted meanwhile this only says that nothing of it happens any more.
    pub fn complete(&mut self, now: Instant, task: TaskId, outcome: Outcome) {
        self.now = now;
        if let Some(mut full) = self.full() {
            full.complete(task, outcome);
        }
        self.settle();
    }

    /// A task management function was carried out, or not. The response leaves once every task it affects was completed.
    pub fn tmf_complete(&mut self, now: Instant, tmf: TmfId, response: TmfResponse) {
        self.now = now;
        if let Some(mut full) = self.full() {
            full.tmf_complete(tmf, response);
        }
        self.settle();
    }

    /// Asks the initiator for a sign of life: [`Event::Pong`] when it answers. iPXE never does.
    pub fn ping(&mut self, now: Instant) {
        self.now = now;
        if let Some(mut full) = self.full() {
            full.ping(true);
        }
        self.settle();
    }

    /// Asks the initiator to log out within `after` (asynchronous event 1), and drops the connection if it does not.
    /// A connection that has no normal session is closed at once (RFC 7143 §7.4.3).
    pub fn request_logout(&mut self, now: Instant, after: Duration) {
        self.now = now;
        let seconds = u16::try_from(after.as_secs()).unwrap_or(u16::MAX);
        if self.send_async(AsyncEvent::LOGOUT, [0, 0, seconds]) {
            self.timers.logout_requested(now + after);
        } else {
            self.close();
        }
        self.settle();
    }

    /// Asks the initiator to negotiate (asynchronous event 4). Nothing happens if it does not.
    pub fn request_negotiation(&mut self, now: Instant) {
        self.now = now;
        self.send_async(AsyncEvent::NEGOTIATE, [0, 0, NEGOTIATE_WITHIN_S]);
        self.settle();
    }

    /// Reports a SCSI event with its sense data (asynchronous event 0).
    pub fn send_async_scsi(&mut self, lun: Lun, sense: &[u8]) {
        if self.has_normal_session() {
            let mut data = BytesMut::with_capacity(2 + sense.len());
            data.put_u16(u16::try_from(sense.len()).unwrap_or(u16::MAX));
            data.put_slice(sense);
            self.queue_async(lun, AsyncEvent::SCSI, [0; 3], data.freeze());
        }
        self.settle();
    }

    /// Another I_T nexus ended the tasks of this LUN (`None`: of every LUN). They end without a status (TAS=0).
    pub fn abort_lun_tasks(&mut self, lun: Option<Lun>) -> EndedTasks {
        let ended = self
            .full()
            .map(|mut full| full.abort_for_other(lun))
            .unwrap_or_default();
        self.settle();
        ended
    }

    /// Records every PDU from now on, or no longer. What was recorded and not taken is dropped.
    pub fn record(&mut self, payload: Option<Payload>) {
        self.recorder = payload.map(|payload| Box::new(Recorder::new(payload)));
    }

    /// The next PDU that was recorded; to be asked until `None` after every verb and every frame.
    pub fn poll_recorded(&mut self) -> Option<Recorded> {
        self.recorder.as_mut()?.poll()
    }

    /// Tasks that exist, aborted ones that the owner still runs included.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        match &self.state {
            State::Full(session) => session.outstanding(),
            _ => 0,
        }
    }

    /// Tells the initiator that the session is dropped (asynchronous event 3), and closes.
    pub fn drop_session(&mut self) {
        if let State::Full(session) = &self.state {
            let wait = session.time2wait_s();
            self.send_async(AsyncEvent::DROP_SESSION, [0, wait, 0]);
        }
        self.close();
    }

    /// Ends the session without a word. Answers that wait are dropped.
    pub fn close(&mut self) {
        if !matches!(self.state, State::Closing { .. }) {
            self.tx.drop_answers();
            self.state = State::Closing { logged_out: false };
        }
        self.settle();
    }

    /// Whether the connection is over and everything is sent: time to shut the socket down.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closing { .. }) && self.tx.is_empty()
    }

    /// What `session list` shows.
    #[must_use]
    pub fn info(&self) -> SessionInfo {
        let names = self.who.names.as_ref();
        SessionInfo {
            initiator: names.map(|names| names.initiator.clone()),
            initiator_alias: names.and_then(|names| names.initiator_alias.clone()),
            target_name: names.and_then(|names| names.target.clone()),
            session_type: names.map_or(SessionType::Normal, |names| names.session_type),
            isid: self.who.isid,
            tsih: self.who.tsih,
            cid: self.who.cid,
            params: match &self.state {
                State::Full(session) => Some(session.params().clone()),
                _ => None,
            },
            phase: match &self.state {
                State::Login(_) => Phase::Login,
                State::Admission(..) => Phase::Admission,
                State::Full(session) if session.is_logging_out() => Phase::LoggedOut,
                State::Full(_) => Phase::FullFeature,
                State::Closing { logged_out: true } => Phase::LoggedOut,
                State::Closing { logged_out: false } => Phase::Closed,
            },
            counters: self.counters,
        }
    }

    /// The session in full feature phase, with all it needs of the connection.
    fn full(&mut self) -> Option<Full<'_>> {
        let State::Full(session) = &mut self.state else {
            return None;
        };
        Some(Full {
            now: self.now,
            config: &self.config,
            directory: &*self.directory,
            session,
            tx: &mut self.tx,
            window: &mut self.window,
            events: &mut self.events,
            timers: &mut self.timers,
            who: &mut self.who,
            counters: &mut self.counters,
            our_turn: &mut self.our_turn,
        })
    }

    /// After every verb: a session that is over begins to close, and the clock for a peer that does not read is set.
    fn settle(&mut self) {
        if let State::Full(session) = &self.state
            && session.is_over()
        {
            self.state = State::Closing { logged_out: true };
        }
        self.timers.watch_output(self.now, self.tx.is_empty());
    }

    /// The connection is over because of this.
    fn fail(&mut self, error: Error) -> Error {
        self.close();
        error
    }

    fn has_normal_session(&self) -> bool {
        matches!(&self.state, State::Full(session) if session.session_type() == SessionType::Normal)
    }

    /// Discovery sessions get no asynchronous messages (RFC 7143 §7.4.3).
    fn send_async(&mut self, event: AsyncEvent, parameters: [u16; 3]) -> bool {
        let may = self.has_normal_session();
        if may {
            self.queue_async(Lun::default(), event, parameters, Bytes::new());
        }
        may
    }

    fn queue_async(&mut self, lun: Lun, event: AsyncEvent, parameters: [u16; 3], data: Bytes) {
        let message = AsyncMessage {
            lun,
            numbers: Numbers::default(),
            event,
            vendor_code: 0,
            parameters,
        };
        self.tx.send(Control::new(message.encode(), data));
    }
}
