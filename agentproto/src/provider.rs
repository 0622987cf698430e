//! The VSS hardware provider: what the target serves, and a client for the agent that is the provider (specification §9).
//!
//! Its requests go from the agent to the target, over the registration channel or over a connection of their own
//! ([`crate::registration::Purpose::Provide`]): VSS holds writes while `CommitSnapshots` runs, so that connection is opened
//! before, and carries one request and one answer then.

use std::io::{ErrorKind, Read, Write};
use std::time::Instant;

use crate::channel::{ChannelError, RequestError};
use crate::error::{ErrorCode, Refusal};
use crate::ident::AgentId;
use crate::message::{
    Hello, ProvBegin, ProvCommit, ProvDelete, ProvExpose, ProvExposed, ProvGone, ProvQuery, ProvReady,
    ProvSupport, ProvTaken, Reply, Request,
};
use crate::registration::{AgentEnd, AgentEvent, Purpose};

/// What the target does for an agent whose key it has pinned. The calls may block.
pub trait Provider {
    /// Could these LUNs be cut?
    ///
    /// # Errors
    /// The agent may not ask at all.
    fn query(&self, agent: AgentId, ask: ProvQuery) -> Result<ProvSupport, Refusal>;

    /// Reserves a set.
    ///
    /// # Errors
    /// A rule says no: nothing is reserved.
    fn begin(&self, agent: AgentId, ask: ProvBegin) -> Result<ProvReady, Refusal>;

    /// Cuts a set. Durable when it returns.
    ///
    /// # Errors
    /// Nothing was cut.
    fn commit(&self, agent: AgentId, ask: ProvCommit) -> Result<ProvTaken, Refusal>;

    /// Shows or hides a shadow copy.
    ///
    /// # Errors
    /// A rule says no: it is as it was.
    fn expose(&self, agent: AgentId, ask: ProvExpose) -> Result<ProvExposed, Refusal>;

    /// Deletes or aborts. Good when there is nothing any more.
    ///
    /// # Errors
    /// Something of it is still there.
    fn delete(&self, agent: AgentId, ask: ProvDelete) -> Result<ProvGone, Refusal>;
}

/// Hands a request of an agent to the provider.
///
/// # Errors
/// What the provider refuses; `Unsupported` for any other request.
pub fn serve(
    provider: &(impl Provider + ?Sized),
    agent: AgentId,
    request: Request,
) -> Result<Reply, Refusal> {
    match request {
        Request::ProvQuery(ask) => provider.query(agent, ask).map(Reply::ProvQuery),
        Request::ProvBegin(ask) => provider.begin(agent, ask).map(Reply::ProvBegin),
        Request::ProvCommit(ask) => provider.commit(agent, ask).map(Reply::ProvCommit),
        Request::ProvExpose(ask) => provider.expose(agent, ask).map(Reply::ProvExpose),
        Request::ProvDelete(ask) => provider.delete(agent, ask).map(Reply::ProvDelete),
        other => {
            let text = format!("message {} is not for the provider", other.message_type().0);
            Err(Refusal::new(ErrorCode::Unsupported, text))
        }
    }
}

/// Whether a request is one that [`serve`] takes.
#[must_use]
pub fn is_provider_request(request: &Request) -> bool {
    matches!(
        request,
        Request::ProvQuery(_)
            | Request::ProvBegin(_)
            | Request::ProvCommit(_)
            | Request::ProvExpose(_)
            | Request::ProvDelete(_)
    )
}

/// A request of the provider, with the type of its answer.
pub trait Ask {
    /// What the target answers.
    type Answer;
    /// The request.
    fn request(self) -> Request;
    /// The answer, when it is one to this kind of request.
    fn answer(reply: Reply) -> Option<Self::Answer>;
}

macro_rules! asks {
    ($($name:ident => $answer:ident),*) => {$(
        impl Ask for $name {
            type Answer = $answer;

            fn request(self) -> Request {
                Request::$name(self)
            }

            fn answer(reply: Reply) -> Option<$answer> {
                match reply {
                    Reply::$name(answer) => Some(answer),
                    _ => None,
                }
            }
        }
    )*};
}
asks!(
    ProvQuery => ProvSupport,
    ProvBegin => ProvReady,
    ProvCommit => ProvTaken,
    ProvExpose => ProvExposed,
    ProvDelete => ProvGone
);

/// Why a call of the [`Client`] brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The target says no (or, with `Deadline`, nothing in time): the connection is good.
    #[error("the target refused: {0}")]
    Refused(Refusal),
    /// The connection: dial again.
    #[error("the connection to the target failed: {0}")]
    Io(#[from] std::io::Error),
    /// The peer broke the protocol: dial again.
    #[error("the target broke the protocol: {0}")]
    Protocol(#[from] ChannelError),
    /// It could not be sent.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The target closed the connection: dial again.
    #[error("the target closed the connection")]
    Closed,
}

/// A connection of its own for the provider's requests, over any stream whose TLS handshake is done and whose peer is the
/// enrolled target. It blocks: `CommitSnapshots` must not depend on another thread's schedule.
///
/// Give the stream a read timeout (100 ms is good): it is what lets deadlines pass.
pub struct Client<S> {
    stream: S,
    end: AgentEnd,
    incoming: Box<[u8]>,
}

impl<S: Read + Write> Client<S> {
    /// Says Hello. `fence` judges the target's generation ([`crate::client::Agent::fence`]).
    ///
    /// # Errors
    /// The target refuses, or `fence` does, or the connection fails.
    pub fn open(
        stream: S,
        hello: Hello,
        generation_seen: u32,
        fence: impl FnOnce(u32) -> Result<(), Refusal>,
    ) -> Result<Self, CallError> {
        let end = AgentEnd::new(Instant::now(), hello, generation_seen, Purpose::Provide);
        let mut client = Self {
            stream,
            end,
            incoming: vec![0; 16 * 1024].into_boxed_slice(),
        };
        loop {
            match client.event()? {
                AgentEvent::Hello { generation, .. } => {
                    fence(generation).map_err(CallError::Refused)?;
                    return Ok(client);
                }
                AgentEvent::Refused(refusal) => return Err(CallError::Refused(refusal)),
                _ => {}
            }
        }
    }

    /// Asks, and waits for the answer, for as long as the protocol allows it to take.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn call<A: Ask>(&mut self, ask: A) -> Result<A::Answer, CallError> {
        let asked = self.end.provider(Instant::now(), ask.request())?;
        loop {
            match self.event()? {
                AgentEvent::Answer { id, result } if id == asked => {
                    let reply = result.map_err(CallError::Refused)?;
                    // The channel lets only a reply of the request's own type through.
                    return A::answer(reply).ok_or(CallError::Closed);
                }
                AgentEvent::Refused(refusal) => return Err(CallError::Refused(refusal)),
                _ => {}
            }
        }
    }

    /// The stream, to change its timeouts.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    fn event(&mut self) -> Result<AgentEvent, CallError> {
        loop {
            if let Some(event) = self.end.poll_event() {
                return Ok(event);
            }
            if self.end.is_closed() {
                return Err(CallError::Closed);
            }
            while let Some(bytes) = self.end.poll_transmit() {
                self.stream.write_all(&bytes)?;
            }
            self.stream.flush()?;
            match self.stream.read(&mut self.incoming) {
                Ok(0) => return Err(CallError::Closed),
                Ok(count) => {
                    let bytes = self.incoming.get(..count).unwrap_or_default();
                    self.end.receive(Instant::now(), bytes)?;
                }
                Err(error) if is_pause(error.kind()) => self.end.handle_timeout(Instant::now())?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A read timeout (Unix says `WouldBlock`, Windows `TimedOut`) or a signal: time for deadlines.
fn is_pause(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::ident::{SetId, ShadowId};
    use crate::message::{
        Capabilities, DeleteReason, LunIdentity, LunSupport, Register, ShadowAsk, Visibility,
    };
    use crate::registration::{Peer, TargetEnd, TargetEvent};
    use crate::{LunId, message::LogEvent, message::Severity};

    const AGENT: AgentId = AgentId([1; 16]);
    const SET: SetId = SetId([2; 16]);
    const LUN: LunId = LunId([3; 16]);

    /// Answers everything, and says who asked what.
    #[derive(Default)]
    struct Echo(std::cell::RefCell<Vec<(AgentId, &'static str)>>);

    impl Echo {
        fn note(&self, agent: AgentId, what: &'static str) {
            self.0.borrow_mut().push((agent, what));
        }
    }

    impl Provider for Echo {
        fn query(&self, agent: AgentId, ask: ProvQuery) -> Result<ProvSupport, Refusal> {
            self.note(agent, "query");
            let supported = |lun: LunIdentity| LunSupport {
                lun: lun.lun,
                supported: true,
                code: None,
                text: None,
            };
            Ok(ProvSupport {
                luns: ask.luns.into_iter().map(supported).collect(),
            })
        }

        fn begin(&self, agent: AgentId, _: ProvBegin) -> Result<ProvReady, Refusal> {
            self.note(agent, "begin");
            Ok(ProvReady {
                token: [9; 16],
                waits_ms: 1,
                shadows: vec![],
            })
        }

        fn commit(&self, agent: AgentId, ask: ProvCommit) -> Result<ProvTaken, Refusal> {
            self.note(agent, "commit");
            if ask.token != [9; 16] {
                return Err(Refusal::new(ErrorCode::NotAllowed, "another token"));
            }
            Ok(ProvTaken {
                cut_unix_ms: Some(1),
                shadows: vec![],
            })
        }

        fn expose(&self, agent: AgentId, ask: ProvExpose) -> Result<ProvExposed, Refusal> {
            self.note(agent, "expose");
            let identity = identity();
            Ok(ProvExposed {
                visibility: ask.visibility,
                identity,
            })
        }

        fn delete(&self, agent: AgentId, _: ProvDelete) -> Result<ProvGone, Refusal> {
            self.note(agent, "delete");
            Ok(ProvGone { removed: 1 })
        }
    }

    fn identity() -> LunIdentity {
        LunIdentity {
            lun: LUN,
            serial: None,
            iqn: None,
            number: None,
            size_bytes: None,
        }
    }

    fn hello(agent_id: Option<AgentId>) -> Hello {
        Hello {
            min_version: 1,
            max_version: 1,
            agent_id,
            product: "x".into(),
            capabilities: Capabilities::default(),
        }
    }

    /// A target behind a stream, without threads: what is written is served at once, what it says is read.
    struct Wire {
        target: TargetEnd,
        echo: Echo,
        answers: bool,
        out: VecDeque<u8>,
    }

    impl Wire {
        fn new(peer: Peer, answers: bool) -> Self {
            Self {
                target: TargetEnd::new(Instant::now(), hello(None), 4, peer),
                echo: Echo::default(),
                answers,
                out: VecDeque::new(),
            }
        }
    }

    impl Write for Wire {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.target.receive(Instant::now(), bytes).unwrap();
            while let Some(event) = self.target.poll_event() {
                if let TargetEvent::Provider { id, request } = event
                    && self.answers
                {
                    let result = serve(&self.echo, AGENT, request);
                    // A line in between does not disturb.
                    self.target.log(LogEvent {
                        severity: Severity::Info,
                        code: ErrorCode(0),
                        subject: "x".into(),
                        text: "y".into(),
                    });
                    self.target.provided(id, result);
                }
            }
            while let Some(bytes) = self.target.poll_transmit() {
                self.out.extend(bytes);
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Read for Wire {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            if self.out.is_empty() {
                // As a socket with a read timeout does.
                std::thread::sleep(std::time::Duration::from_millis(20));
                return Err(ErrorKind::WouldBlock.into());
            }
            // In small pieces, as a network may.
            let count = self.out.len().min(7).min(to.len());
            for (to, from) in to.iter_mut().zip(self.out.drain(..count)) {
                *to = from;
            }
            Ok(count)
        }
    }

    fn begin() -> ProvBegin {
        ProvBegin {
            set: SET,
            shadows: vec![ShadowAsk {
                shadow: ShadowId([4; 16]),
                lun: LUN,
            }],
            initiator: "iqn.x".into(),
            writable: true,
        }
    }

    #[test]
    fn every_request_comes_to_the_provider_and_back() {
        let wire = Wire::new(Peer::Known(AGENT), true);
        let mut client = Client::open(wire, hello(Some(AGENT)), 4, |generation| {
            assert_eq!(generation, 4);
            Ok(())
        })
        .unwrap();
        let luns = vec![identity()];
        assert!(client.call(ProvQuery { luns }).unwrap().luns[0].supported);
        let ready = client.call(begin()).unwrap();
        let token = ready.token;
        assert_eq!(
            client.call(ProvCommit { set: SET, token }).unwrap().cut_unix_ms,
            Some(1)
        );
        let wrong = client.call(ProvCommit {
            set: SET,
            token: [0; 16],
        });
        assert!(matches!(wrong, Err(CallError::Refused(refusal)) if refusal.code == ErrorCode::NotAllowed));
        let expose = ProvExpose {
            set: SET,
            shadow: ShadowId([4; 16]),
            initiator: "iqn.x".into(),
            visibility: Visibility::Exposed,
        };
        assert_eq!(client.call(expose).unwrap().identity, identity());
        let delete = ProvDelete {
            set: SET,
            shadow: None,
            why: DeleteReason::Delete,
        };
        assert_eq!(client.call(delete).unwrap().removed, 1);
        let said: Vec<_> = client.stream().echo.0.borrow().clone();
        let names = ["query", "begin", "commit", "commit", "expose", "delete"];
        assert_eq!(said, names.map(|name| (AGENT, name)));
    }

    #[test]
    fn a_commit_that_is_not_answered_is_over_after_its_second() {
        let wire = Wire::new(Peer::Known(AGENT), false);
        let mut client = Client::open(wire, hello(Some(AGENT)), 0, |_| Ok(())).unwrap();
        let commit = ProvCommit {
            set: SET,
            token: [9; 16],
        };
        let late = client.call(commit);
        assert!(matches!(late, Err(CallError::Refused(refusal)) if refusal.code == ErrorCode::Deadline));
    }

    #[test]
    fn an_unknown_key_provides_nothing_and_a_stale_target_is_left() {
        let wire = Wire::new(Peer::Unknown, true);
        let mut client = Client::open(wire, hello(Some(AGENT)), 0, |_| Ok(())).unwrap();
        let refused = client.call(begin());
        assert!(
            matches!(refused, Err(CallError::Refused(refusal)) if refusal.code == ErrorCode::NotEnrolled)
        );
        assert!(client.stream().echo.0.borrow().is_empty());
        let stale = Client::open(Wire::new(Peer::Known(AGENT), true), hello(Some(AGENT)), 9, |_| {
            Err(Refusal::new(ErrorCode::StaleGeneration, "old"))
        });
        assert!(
            matches!(stale, Err(CallError::Refused(refusal)) if refusal.code == ErrorCode::StaleGeneration)
        );
    }

    #[test]
    fn provider_requests_go_beside_a_registration() {
        let now = Instant::now();
        let register = Register {
            host: "h".into(),
            os: "o".into(),
            agent_version: "1".into(),
            boot_id: "b".into(),
            advertise_host: None,
            listen_port: 11169,
            features: Capabilities::VSS_PROVIDER,
            initiators: vec![],
            mounted: vec![],
        };
        let mut agent = AgentEnd::new(now, hello(Some(AGENT)), 0, Purpose::Register(register));
        let mut target = TargetEnd::new(now, hello(None), 4, Peer::Known(AGENT));
        let carry = |agent: &mut AgentEnd, target: &mut TargetEnd| {
            while let Some(bytes) = agent.poll_transmit() {
                target.receive(now, &bytes).unwrap();
            }
            while let Some(bytes) = target.poll_transmit() {
                agent.receive(now, &bytes).unwrap();
            }
        };
        carry(&mut agent, &mut target);
        carry(&mut agent, &mut target);
        // The registration is not answered yet, and does not hold the provider up.
        let id = agent
            .provider(now, Request::ProvQuery(ProvQuery { luns: vec![] }))
            .unwrap();
        carry(&mut agent, &mut target);
        let asked = std::iter::from_fn(|| target.poll_event()).find_map(|event| match event {
            TargetEvent::Provider { id, request } => Some((id, request)),
            _ => None,
        });
        let (at, request) = asked.expect("it came");
        target.provided(at, serve(&Echo::default(), AGENT, request));
        target.registered(now, Ok(vec![]));
        carry(&mut agent, &mut target);
        let events: Vec<_> = std::iter::from_fn(|| agent.poll_event()).collect();
        assert!(
            events
                .iter()
                .any(|event| matches!(event, AgentEvent::Answer { id: got, result: Ok(_) } if *got == id))
        );
        assert!(events.contains(&AgentEvent::Registered { luns: vec![] }));
        // Only the provider's requests go this way.
        let other = Request::Status(crate::message::Status { session: None });
        assert!(agent.provider(now, other).is_err());
    }
}
