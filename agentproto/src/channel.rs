//! One connection: Hello, versions, request ids, deadlines, requests in flight. Both connections of §1 are this.
//!
//! ```text
//! dialler:   HelloSent ── Hello reply ──▶ Open
//! acceptor:  Waiting ── Hello ──▶ Asked ── accept() ──▶ Open        refuse() or 5 s ──▶ Closed
//! ```
//! The owner feeds bytes ([`Channel::receive`]), sends what [`Channel::poll_transmit`] yields, and looks after events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::error::{ErrorCode, Refusal};
use crate::frame::{Decoded, Decoder, Frame, FrameError};
use crate::message::{
    Capabilities, EncodeError, Hello, LogEvent, Message, MessageType, Progress, Reply, Request,
};

/// The first frame of either side has to come in this time.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A frame that has been started has to be complete in this time.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests without an answer, each way.
pub const MAX_IN_FLIGHT: usize = 8;
/// Bytes waiting to be sent, beyond which the owner stops reading ([`Channel::wants_receive`]).
const OUTPUT_HIGH: usize = 1024 * 1024;

/// Why the connection has to be dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// The bytes are no SPA stream.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// No Hello in 5 s.
    #[error("no Hello within {} s", HELLO_TIMEOUT.as_secs())]
    HelloTimeout,
    /// A started frame was not completed in 10 s.
    #[error("a frame was not completed within {} s", FRAME_TIMEOUT.as_secs())]
    FrameTimeout,
    /// Something else came first, or Hello came twice.
    #[error("Hello has to be the first frame, and only the first")]
    HelloOrder,
    /// A request id that is still being answered.
    #[error("request id {0} is still in use")]
    RepeatedId(u32),
}

/// Why a request could not be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Hello is not done, or the channel is closed.
    #[error("the channel is not open")]
    NotOpen,
    /// Only the provider's requests go this way.
    #[error("this message is not one of the provider's")]
    NotProvider,
    /// Eight requests wait already.
    #[error("{MAX_IN_FLIGHT} requests wait for their answers already")]
    TooManyInFlight,
    /// It is larger than the peer would take.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// What came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChannelEvent {
    /// Acceptor: the peer's Hello. Answer with [`Channel::accept`] or [`Channel::refuse`].
    HelloAsked {
        /// What it says.
        hello: Hello,
        /// The generation in its header.
        generation: u32,
    },
    /// Dialler: the peer accepted; requests may be sent.
    Opened {
        /// What it says.
        hello: Hello,
        /// The generation in its header.
        generation: u32,
    },
    /// Dialler: the peer refused the Hello. The channel is closed.
    HelloRefused(Refusal),
    /// Acceptor: the peer's Hello was refused, because there is no version that both ends speak. The channel is closed.
    VersionRefused(Refusal),
    /// A request: answer it with [`Channel::reply`].
    Request {
        /// Its id on this connection.
        id: u32,
        /// The generation in its header.
        generation: u32,
        /// What is asked.
        request: Request,
    },
    /// The answer to a request of ours; `Deadline` when none came in time.
    Reply {
        /// The id that [`Channel::request`] gave.
        id: u32,
        /// The answer.
        result: Result<Reply, Refusal>,
    },
    /// Progress of a request of ours.
    Progress {
        /// The id that [`Channel::request`] gave.
        id: u32,
        /// How far.
        progress: Progress,
    },
    /// A line for the event log.
    Log(LogEvent),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Dialler, Hello sent.
    HelloSent {
        deadline: Instant,
    },
    /// Acceptor, nothing heard.
    Waiting {
        deadline: Instant,
    },
    /// Acceptor, Hello heard, the owner decides.
    Asked {
        id: u32,
        deadline: Instant,
    },
    Open,
    Closed,
}

/// One connection's protocol state.
#[derive(Debug)]
pub struct Channel {
    state: State,
    hello: Hello,
    generation: u32,
    decoder: Decoder,
    /// When the frame that has been started must be complete.
    frame_deadline: Option<Instant>,
    next_id: u32,
    /// Requests of ours without an answer: their deadlines.
    asked: BTreeMap<u32, (Instant, MessageType)>,
    /// Requests of the peer without an answer.
    serving: BTreeMap<u32, MessageType>,
    events: VecDeque<ChannelEvent>,
    output: VecDeque<Vec<u8>>,
    output_bytes: usize,
}

impl Channel {
    /// The dialling side: its Hello is the first thing to send. `body_limit` is one of the limits of [`crate::frame`].
    #[must_use]
    pub fn dial(now: Instant, hello: Hello, generation: u32, body_limit: u32) -> Self {
        let state = State::HelloSent {
            deadline: now + HELLO_TIMEOUT,
        };
        let mut channel = Self::new(state, hello, generation, body_limit);
        let hello = Message::Request(Request::Hello(channel.hello.clone()));
        // A Hello is a few short fields: it always fits. Were it otherwise the peer's silence would end the channel.
        let _ = channel.send(0, hello);
        channel
    }

    /// The accepting side: waits for the peer's Hello.
    #[must_use]
    pub fn accepting(now: Instant, hello: Hello, generation: u32, body_limit: u32) -> Self {
        Self::new(
            State::Waiting {
                deadline: now + HELLO_TIMEOUT,
            },
            hello,
            generation,
            body_limit,
        )
    }

    fn new(state: State, hello: Hello, generation: u32, body_limit: u32) -> Self {
        Self {
            state,
            hello,
            generation,
            decoder: Decoder::new(body_limit),
            frame_deadline: None,
            next_id: 1,
            asked: BTreeMap::new(),
            serving: BTreeMap::new(),
            events: VecDeque::new(),
            output: VecDeque::new(),
            output_bytes: 0,
        }
    }

    /// The peer is known now: larger bodies are allowed.
    pub fn authenticated(&mut self) {
        self.decoder.set_limit(crate::frame::MAX_BODY);
    }

    /// The generation that goes into headers from now on.
    pub fn set_generation(&mut self, generation: u32) {
        self.generation = generation;
    }

    /// Takes bytes from the connection.
    ///
    /// # Errors
    /// Drop the connection, after sending what [`Self::poll_transmit`] still has.
    pub fn receive(&mut self, now: Instant, bytes: &[u8]) -> Result<(), ChannelError> {
        self.decoder.feed(bytes);
        while let Some(decoded) = self.next_decoded()? {
            self.frame_deadline = None;
            match decoded {
                Decoded::Frame(frame) => self.frame(frame)?,
                Decoded::BadBody {
                    request_id,
                    message,
                    is_request,
                    error,
                } => {
                    if self.state != State::Open {
                        self.state = State::Closed;
                    }
                    if is_request {
                        self.send_refusal(request_id, message, error.into());
                    }
                }
            }
        }
        if self.decoder.mid_frame() {
            self.frame_deadline.get_or_insert(now + FRAME_TIMEOUT);
        }
        Ok(())
    }

    fn next_decoded(&mut self) -> Result<Option<Decoded>, ChannelError> {
        if self.state == State::Closed {
            return Ok(None);
        }
        Ok(self.decoder.next_frame()?)
    }

    fn frame(&mut self, frame: Frame) -> Result<(), ChannelError> {
        let Frame {
            request_id: id,
            generation,
            message,
        } = frame;
        match (self.state, message) {
            (State::Open, message) => self.open_frame(id, generation, message),
            (State::Waiting { deadline }, Message::Request(Request::Hello(hello))) => {
                self.hello_asked(id, generation, hello, deadline);
                Ok(())
            }
            (State::HelloSent { .. }, Message::Reply(Reply::Hello(hello))) => {
                self.state = State::Open;
                self.events.push_back(ChannelEvent::Opened { hello, generation });
                Ok(())
            }
            (State::HelloSent { .. }, Message::Refused(MessageType(1), refusal)) => {
                self.state = State::Closed;
                self.events.push_back(ChannelEvent::HelloRefused(refusal));
                Ok(())
            }
            _ => Err(ChannelError::HelloOrder),
        }
    }

    fn hello_asked(&mut self, id: u32, generation: u32, hello: Hello, deadline: Instant) {
        if hello.min_version > crate::VERSION || hello.max_version < crate::VERSION {
            let refusal = Refusal::new(ErrorCode::Unsupported, no_common_version(&self.hello, &hello));
            self.send_refusal(id, MessageType(1), refusal.clone());
            self.state = State::Closed;
            self.events.push_back(ChannelEvent::VersionRefused(refusal));
            return;
        }
        self.state = State::Asked { id, deadline };
        self.events
            .push_back(ChannelEvent::HelloAsked { hello, generation });
    }

    fn open_frame(&mut self, id: u32, generation: u32, message: Message) -> Result<(), ChannelError> {
        match message {
            Message::Request(Request::Hello(_)) => return Err(ChannelError::HelloOrder),
            Message::Request(request) => self.incoming(id, generation, request)?,
            Message::Reply(reply) => {
                if self.answers(id, reply.message_type()) {
                    self.events.push_back(ChannelEvent::Reply {
                        id,
                        result: Ok(reply),
                    });
                }
            }
            Message::Refused(message, refusal) => {
                if self.answers(id, message) {
                    self.events.push_back(ChannelEvent::Reply {
                        id,
                        result: Err(refusal),
                    });
                }
            }
            Message::Progress(message, progress) => {
                if self.asked.get(&id).is_some_and(|(_, asked)| *asked == message) {
                    self.events.push_back(ChannelEvent::Progress { id, progress });
                }
            }
            Message::Log(event) => self.events.push_back(ChannelEvent::Log(event)),
        }
        Ok(())
    }

    /// Whether this answers a request of ours that still waits. A late answer (its deadline is over) is no news.
    fn answers(&mut self, id: u32, message: MessageType) -> bool {
        let fits = self.asked.get(&id).is_some_and(|(_, asked)| *asked == message);
        if fits {
            self.asked.remove(&id);
        }
        fits
    }

    fn incoming(&mut self, id: u32, generation: u32, request: Request) -> Result<(), ChannelError> {
        if self.serving.contains_key(&id) {
            return Err(ChannelError::RepeatedId(id));
        }
        let message = request.message_type();
        if self.serving.len() >= MAX_IN_FLIGHT {
            let text = format!("{MAX_IN_FLIGHT} requests are in flight on this connection");
            self.send_refusal(id, message, Refusal::new(ErrorCode::Busy, text));
            return Ok(());
        }
        self.serving.insert(id, message);
        self.events.push_back(ChannelEvent::Request {
            id,
            generation,
            request,
        });
        Ok(())
    }

    /// Acceptor: the Hello is fine; answers it.
    pub fn accept(&mut self) {
        if let State::Asked { id, .. } = self.state {
            self.state = State::Open;
            let hello = Message::Reply(Reply::Hello(self.hello.clone()));
            let _ = self.send(id, hello);
        }
    }

    /// Acceptor: the Hello is refused; the channel closes once the refusal is sent.
    pub fn refuse(&mut self, refusal: Refusal) {
        if let State::Asked { id, .. } = self.state {
            self.send_refusal(id, MessageType(1), refusal);
            self.state = State::Closed;
        }
    }

    /// Sends a request; its answer (or `Deadline`) comes as [`ChannelEvent::Reply`]. `agent` decides the deadline.
    ///
    /// # Errors
    /// Nothing was sent.
    pub fn request(
        &mut self,
        now: Instant,
        request: Request,
        agent: Capabilities,
    ) -> Result<u32, RequestError> {
        if self.state != State::Open {
            return Err(RequestError::NotOpen);
        }
        if self.asked.len() >= MAX_IN_FLIGHT {
            return Err(RequestError::TooManyInFlight);
        }
        let id = self.next_id;
        let deadline = now + request.deadline(agent);
        let message = request.message_type();
        self.send(id, Message::Request(request))?;
        // Ids wrap after four thousand million requests; none of them can still be waiting then.
        self.next_id = self.next_id.wrapping_add(1).max(1);
        self.asked.insert(id, (deadline, message));
        Ok(id)
    }

    /// Answers a request of the peer. An id that is not waiting is ignored; an answer that does not fit the limits
    /// becomes the refusal `TooLarge`.
    pub fn reply(&mut self, id: u32, result: Result<Reply, Refusal>) {
        let Some(message) = self.serving.remove(&id) else {
            return;
        };
        let content = match result {
            Ok(reply) => Message::Reply(reply),
            Err(refusal) => Message::Refused(message, refusal),
        };
        if let Err(error) = self.send(id, content) {
            self.send_refusal(id, message, Refusal::new(ErrorCode::TooLarge, error.to_string()));
        }
    }

    /// Tells how far a request of the peer is.
    pub fn progress(&mut self, id: u32, progress: Progress) {
        if let Some(message) = self.serving.get(&id).copied() {
            let _ = self.send(id, Message::Progress(message, progress));
        }
    }

    /// Sends a line for the peer's event log. Lost when the channel is not open.
    pub fn log(&mut self, event: LogEvent) {
        if self.state == State::Open {
            let _ = self.send(0, Message::Log(event));
        }
    }

    /// What came in.
    pub fn poll_event(&mut self) -> Option<ChannelEvent> {
        self.events.pop_front()
    }

    /// The next bytes to send.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        let bytes = self.output.pop_front()?;
        self.output_bytes -= bytes.len();
        Some(bytes)
    }

    /// Whether the owner should read on: a peer that asks without reading the answers is not listened to.
    #[must_use]
    pub fn wants_receive(&self) -> bool {
        self.output_bytes < OUTPUT_HIGH && self.state != State::Closed
    }

    /// Whether requests can be sent.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether nothing will come any more: send the rest and close the connection.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// The earliest deadline.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let hello = match self.state {
            State::HelloSent { deadline } | State::Waiting { deadline } | State::Asked { deadline, .. } => {
                Some(deadline)
            }
            State::Open => None,
            State::Closed => return None,
        };
        let answers = self.asked.values().map(|(deadline, _)| *deadline);
        answers.chain(hello).chain(self.frame_deadline).min()
    }

    /// Lets deadlines pass.
    ///
    /// # Errors
    /// Drop the connection.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), ChannelError> {
        match self.state {
            State::HelloSent { deadline } | State::Waiting { deadline } | State::Asked { deadline, .. }
                if deadline <= now =>
            {
                self.state = State::Closed;
                return Err(ChannelError::HelloTimeout);
            }
            _ => {}
        }
        if self.frame_deadline.is_some_and(|deadline| deadline <= now) {
            self.state = State::Closed;
            return Err(ChannelError::FrameTimeout);
        }
        let over: BTreeSet<u32> = self
            .asked
            .iter()
            .filter(|(_, (deadline, _))| *deadline <= now)
            .map(|(id, _)| *id)
            .collect();
        self.asked.retain(|id, _| !over.contains(id));
        for id in over {
            let refusal = Refusal::new(ErrorCode::Deadline, "no answer in time");
            self.events.push_back(ChannelEvent::Reply {
                id,
                result: Err(refusal),
            });
        }
        Ok(())
    }

    fn send_refusal(&mut self, id: u32, message: MessageType, refusal: Refusal) {
        // A refusal is five short fields, its text is cut to fit: it always can be sent.
        let _ = self.send(id, Message::Refused(message, refusal));
    }

    fn send(&mut self, request_id: u32, message: Message) -> Result<(), EncodeError> {
        let bytes = Frame {
            request_id,
            generation: self.generation,
            message,
        }
        .encode()?;
        self.output_bytes += bytes.len();
        self.output.push_back(bytes);
        Ok(())
    }
}

/// The same words for both ends: who is the older one, and what to do.
fn no_common_version(ours: &Hello, theirs: &Hello) -> String {
    let (old, new) = if theirs.max_version < ours.min_version {
        (theirs, ours)
    } else {
        (ours, theirs)
    };
    format!(
        "no common protocol version: {} speaks {} to {}, {} speaks {} to {}: upgrade {}",
        old.product,
        old.min_version,
        old.max_version,
        new.product,
        new.min_version,
        new.max_version,
        old.product
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{MAX_BODY, MAX_BODY_UNAUTHENTICATED};
    use crate::message::Status;

    fn hello(product: &str) -> Hello {
        let capabilities = Capabilities::default();
        Hello {
            min_version: 1,
            max_version: 1,
            agent_id: None,
            product: product.into(),
            capabilities,
        }
    }

    fn carry(now: Instant, from: &mut Channel, to: &mut Channel) {
        while let Some(bytes) = from.poll_transmit() {
            to.receive(now, &bytes).unwrap();
        }
    }

    fn open(now: Instant) -> (Channel, Channel) {
        let mut a = Channel::dial(now, hello("a"), 7, MAX_BODY);
        let mut b = Channel::accepting(now, hello("b"), 0, MAX_BODY);
        carry(now, &mut a, &mut b);
        assert_eq!(
            b.poll_event(),
            Some(ChannelEvent::HelloAsked {
                hello: hello("a"),
                generation: 7
            })
        );
        b.accept();
        carry(now, &mut b, &mut a);
        assert_eq!(
            a.poll_event(),
            Some(ChannelEvent::Opened {
                hello: hello("b"),
                generation: 0
            })
        );
        (a, b)
    }

    fn status() -> Request {
        Request::Status(Status { session: None })
    }

    #[test]
    fn requests_are_answered_or_run_out_of_time() {
        let now = Instant::now();
        let (mut a, mut b) = open(now);
        let first = a.request(now, status(), Capabilities::default()).unwrap();
        let second = a.request(now, status(), Capabilities::default()).unwrap();
        carry(now, &mut a, &mut b);
        let Some(ChannelEvent::Request {
            id, generation: 7, ..
        }) = b.poll_event()
        else {
            panic!()
        };
        let refusal = Refusal::new(ErrorCode::Internal, "no");
        b.reply(id, Err(refusal.clone()));
        carry(now, &mut b, &mut a);
        assert_eq!(
            a.poll_event(),
            Some(ChannelEvent::Reply {
                id: first,
                result: Err(refusal.clone())
            })
        );
        let late = a.poll_timeout().unwrap();
        assert_eq!(late, now + Duration::from_secs(5));
        a.handle_timeout(late).unwrap();
        let Some(ChannelEvent::Reply {
            id,
            result: Err(refused),
        }) = a.poll_event()
        else {
            panic!()
        };
        assert_eq!((id, refused.code), (second, ErrorCode::Deadline));
        b.reply(second, Err(refusal));
        carry(late, &mut b, &mut a);
        assert_eq!(a.poll_event(), None);
    }

    #[test]
    fn requests_in_flight_are_bounded_on_both_sides() {
        let now = Instant::now();
        let (mut a, mut b) = open(now);
        for _ in 0..MAX_IN_FLIGHT {
            a.request(now, status(), Capabilities::default()).unwrap();
        }
        assert_eq!(
            a.request(now, status(), Capabilities::default()),
            Err(RequestError::TooManyInFlight)
        );
        carry(now, &mut a, &mut b);
        let ninth = Frame {
            request_id: 99,
            generation: 0,
            message: Message::Request(status()),
        };
        b.receive(now, &ninth.encode().unwrap()).unwrap();
        assert_eq!(std::iter::from_fn(|| b.poll_event()).count(), MAX_IN_FLIGHT);
        let mut decoder = Decoder::new(MAX_BODY);
        decoder.feed(&b.poll_transmit().unwrap());
        let Some(Decoded::Frame(Frame {
            request_id: 99,
            message: Message::Refused(_, refusal),
            ..
        })) = decoder.next_frame().unwrap()
        else {
            panic!()
        };
        assert_eq!(refusal.code, ErrorCode::Busy);
    }

    #[test]
    fn silence_and_half_frames_end_the_channel() {
        let now = Instant::now();
        let mut waiting = Channel::accepting(now, hello("b"), 0, MAX_BODY_UNAUTHENTICATED);
        assert_eq!(waiting.poll_timeout(), Some(now + HELLO_TIMEOUT));
        assert_eq!(
            waiting.handle_timeout(now + HELLO_TIMEOUT),
            Err(ChannelError::HelloTimeout)
        );
        assert!(waiting.is_closed());
        let (mut a, _) = open(now);
        a.receive(now, b"SPA1").unwrap();
        // More bytes of the same frame do not buy more time (slow loris).
        a.receive(now + Duration::from_secs(9), b"\x01").unwrap();
        assert_eq!(a.poll_timeout(), Some(now + FRAME_TIMEOUT));
        assert_eq!(
            a.handle_timeout(now + FRAME_TIMEOUT),
            Err(ChannelError::FrameTimeout)
        );
    }

    #[test]
    fn anything_before_hello_and_a_second_hello_are_errors() {
        let now = Instant::now();
        let mut b = Channel::accepting(now, hello("b"), 0, MAX_BODY);
        let early = Frame {
            request_id: 1,
            generation: 0,
            message: Message::Request(status()),
        };
        assert_eq!(
            b.receive(now, &early.encode().unwrap()),
            Err(ChannelError::HelloOrder)
        );
        let (_, mut b) = open(now);
        let again = Frame {
            request_id: 1,
            generation: 0,
            message: Message::Request(Request::Hello(hello("a"))),
        };
        assert_eq!(
            b.receive(now, &again.encode().unwrap()),
            Err(ChannelError::HelloOrder)
        );
    }

    #[test]
    fn no_common_version_is_told() {
        let now = Instant::now();
        let new = Hello {
            min_version: 2,
            max_version: 3,
            ..hello("a")
        };
        let mut a = Channel::dial(now, new, 0, MAX_BODY);
        let mut b = Channel::accepting(now, hello("b"), 0, MAX_BODY);
        carry(now, &mut a, &mut b);
        assert!(b.is_closed());
        let Some(ChannelEvent::VersionRefused(told)) = b.poll_event() else {
            panic!("the accepting end's operator hears of it, too")
        };
        carry(now, &mut b, &mut a);
        let Some(ChannelEvent::HelloRefused(refusal)) = a.poll_event() else {
            panic!()
        };
        assert_eq!(refusal.code, ErrorCode::Unsupported);
        assert_eq!(refusal, told);
        assert!(
            refusal.text.ends_with("upgrade b"),
            "the older end is named: {refusal}"
        );
    }

    #[test]
    fn unknown_requests_are_refused_and_the_connection_stays() {
        let now = Instant::now();
        let (mut a, mut b) = open(now);
        b.receive(now, b"SPA1\x01\0\0\x60\0\0\0\x07\0\0\0\0\0\0\0\0")
            .unwrap();
        a.asked.insert(7, (now + FRAME_TIMEOUT, MessageType(96)));
        carry(now, &mut b, &mut a);
        let Some(ChannelEvent::Reply {
            id: 7,
            result: Err(refusal),
        }) = a.poll_event()
        else {
            panic!()
        };
        assert_eq!(refusal.code, ErrorCode::UnknownMessage);
        assert!(b.is_open());
    }
}
