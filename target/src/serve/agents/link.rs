//! Snapshot channels: the target dials the agent (agent-protocol.md §1). One per agent and snapshot.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillpoint_agentproto::channel::{Channel, ChannelEvent};
use stillpoint_agentproto::frame::MAX_BODY;
use stillpoint_agentproto::message::{Capabilities, Document, FetchBlob, Gather, Hello, Reply, Request};
use stillpoint_agentproto::tls::{Exactly, Shown};
use stillpoint_agentproto::{AgentId, ErrorCode, Fingerprint, Refusal, SessionId};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Shared;
use super::pipe::{Pipe, Turn};
use super::records::Record;
use super::tls;
use crate::serve::documents::sha256;
use crate::serve::events::code;

/// TCP and TLS each get this long.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Documents of one agent and snapshot.
const MAX_DOCUMENTS: usize = 8;

/// A channel to an agent, open for requests.
pub(super) struct Link {
    pipe: Pipe<TlsStream<TcpStream>>,
    channel: Channel,
    capabilities: Capabilities,
}

/// What a target says of itself.
pub(super) fn hello() -> Hello {
    Hello {
        min_version: stillpoint_agentproto::VERSION,
        max_version: stillpoint_agentproto::VERSION,
        agent_id: None,
        product: format!("stillpoint {}", env!("CARGO_PKG_VERSION")),
        capabilities: Capabilities::default(),
    }
}

/// Dials an agent.
///
/// # Errors
/// `Unreachable` with host, port, direction and what to do; or what the agent answered to the Hello.
pub(super) async fn dial(shared: &Shared, record: &Record) -> Result<Link, Refusal> {
    let port = record.listen_port;
    let Some(address) = record.dialled() else {
        let text = format!(
            "the agent on {} has not registered yet: start stillpoint-agent there",
            record.host
        );
        return Err(Refusal::new(ErrorCode::Unreachable, text));
    };
    let unreachable = |cause: String| {
        let text = format!(
            "the agent on {} cannot be reached at {address} (the target dials the agent): {cause}; allow inbound TCP port {port} in \
             that host's firewall, and check that stillpoint-agent runs there",
            record.host
        );
        Refusal::new(ErrorCode::Unreachable, text).about(address.to_string())
    };
    let stream = match tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(unreachable(error.to_string())),
        Err(_) => {
            return Err(unreachable(format!(
                "no answer within {} s",
                DIAL_TIMEOUT.as_secs()
            )));
        }
    };
    // A Freeze must not wait for a full segment.
    stream
        .set_nodelay(true)
        .map_err(|error| unreachable(error.to_string()))?;
    let pins = Shown::new(Arc::new(Exactly(record.fingerprint)));
    let config = tls::client(&shared.identity, Arc::<Shown>::clone(&pins))
        .map_err(|error| unreachable(error.to_string()))?;
    let handshake = TlsConnector::from(config).connect(tls::server_name(), stream);
    let stream = match tokio::time::timeout(DIAL_TIMEOUT, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let why = || unreachable(format!("no TLS connection with the enrolled agent ({error})"));
            return Err(pins
                .refused()
                .map_or_else(why, |seen| other_key(record, address, seen)));
        }
        Err(_) => return Err(unreachable("the TLS handshake was not completed".to_owned())),
    };
    let channel = Channel::dial(Instant::now(), hello(), shared.generation(), MAX_BODY);
    let mut link = Link {
        pipe: Pipe::new(stream),
        channel,
        capabilities: record.features,
    };
    match link.event().await {
        Ok(ChannelEvent::Opened { hello, .. }) if hello.agent_id.is_none_or(|id| id == record.id) => {
            link.capabilities = hello.capabilities;
            Ok(link)
        }
        Ok(ChannelEvent::Opened { .. }) => Err(unreachable("another agent answers there".to_owned())),
        Ok(ChannelEvent::HelloRefused(refusal)) => Err(refusal),
        Ok(_) => Err(unreachable("it does not speak the protocol".to_owned())),
        Err(why) => Err(unreachable(why)),
    }
}

/// Another key is no fault of the network: dialling again does not help, and the firewall is not to blame.
fn other_key(record: &Record, address: SocketAddr, seen: Fingerprint) -> Refusal {
    let text = format!(
        "what answers at {address} is not the agent that was enrolled on {}: it has the key {seen}, pinned is {}. If the agent was \
         installed anew: `stillpoint agent revoke {}`, and enrol it again; if not, another machine has its address",
        record.host, record.fingerprint, record.id
    );
    Refusal::new(ErrorCode::Unreachable, text).about(address.to_string())
}

impl Link {
    /// Sends a request; the answer comes as an event.
    pub(super) fn request(&mut self, request: Request) -> Result<u32, Refusal> {
        let sent = self.channel.request(Instant::now(), request, self.capabilities);
        sent.map_err(|error| Refusal::new(ErrorCode::Unreachable, error.to_string()))
    }

    /// The next thing that comes in. Dropping the future loses nothing.
    pub(super) async fn event(&mut self) -> Result<ChannelEvent, String> {
        loop {
            if let Some(event) = self.channel.poll_event() {
                // Agents ask nothing here; an answer keeps them from waiting.
                if let ChannelEvent::Request { id, .. } = event {
                    let refusal = Refusal::new(
                        ErrorCode::Unsupported,
                        "the target answers no requests on a snapshot channel",
                    );
                    self.channel.reply(id, Err(refusal));
                    continue;
                }
                return Ok(event);
            }
            while let Some(bytes) = self.channel.poll_transmit() {
                self.pipe.push(&bytes);
            }
            if self.channel.is_closed() {
                return Err("the connection was closed".to_owned());
            }
            let turn = self
                .pipe
                .turn(self.channel.wants_receive(), self.channel.poll_timeout())
                .await;
            let now = Instant::now();
            match turn.map_err(|error| lost(&error))? {
                Turn::Read(count) => self
                    .channel
                    .receive(now, self.pipe.bytes(count))
                    .map_err(|error| error.to_string())?,
                Turn::Time => self
                    .channel
                    .handle_timeout(now)
                    .map_err(|error| error.to_string())?,
            }
        }
    }

    /// One request, one answer; for everything that is no snapshot.
    pub(super) async fn ask(&mut self, request: Request) -> Result<Reply, Refusal> {
        let asked = self.request(request)?;
        loop {
            match self.event().await {
                Ok(ChannelEvent::Reply { id, result }) if id == asked => return result,
                Ok(_) => {}
                Err(why) => return Err(Refusal::new(ErrorCode::Unreachable, why)),
            }
        }
    }

    /// Closes the channel in an orderly way.
    pub(super) async fn close(self) {
        self.pipe.finish().await;
    }
}

fn lost(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "the agent closed the connection".to_owned(),
        _ => format!("the connection broke: {error}"),
    }
}

/// What the coordinator of a snapshot hears.
pub(super) enum Heard {
    /// The answer to a call.
    Reply {
        /// Its number.
        call: u64,
        /// What.
        result: Result<Reply, Refusal>,
    },
    /// For the person who waits.
    Progress(String),
    /// The channel is gone.
    Lost(AgentId),
}

/// Carries the requests of one snapshot to one agent: dials when there is something to say, and again after a loss.
pub(super) async fn speak(
    shared: &Arc<Shared>,
    record: &Record,
    mut asks: UnboundedReceiver<(u64, Request)>,
    heard: &UnboundedSender<Heard>,
) {
    let mut link: Option<Link> = None;
    let mut calls: BTreeMap<u32, u64> = BTreeMap::new();
    let mut documents: Vec<Document> = Vec::new();
    // The coordinator is gone when nobody listens; then the loop ends with `asks`.
    let tell = |what| drop(heard.send(what));
    loop {
        tokio::select! {
            ask = asks.recv() => {
                let Some((call, request)) = ask else { break };
                // A ping is no reason to dial: what was frozen over a lost channel has thawed.
                if link.is_none() && !matches!(request, Request::Status(_)) {
                    match dial(shared, record).await {
                        Ok(fresh) => link = Some(fresh),
                        Err(result) => {
                            tell(Heard::Reply { call, result: Err(result) });
                            continue;
                        }
                    }
                }
                if let (Some(link), Request::Complete(complete)) = (&mut link, &request) {
                    // Complete makes the agent forget: what the target shall keep, it has before.
                    for document in std::mem::take(&mut documents) {
                        keep(shared, record, link, complete.session, &document).await;
                    }
                }
                let gone = || Refusal::new(ErrorCode::Unreachable, "there is no connection");
                match link.as_mut().ok_or_else(gone).and_then(|link| link.request(request)) {
                    Ok(id) => drop(calls.insert(id, call)),
                    Err(refusal) => tell(Heard::Reply { call, result: Err(refusal) }),
                }
            }
            event = next(&mut link) => match event {
                Ok(ChannelEvent::Reply { id, result }) => {
                    if let Ok(Reply::Release(thawed)) = &result {
                        documents = thawed.documents.iter().take(MAX_DOCUMENTS).cloned().collect();
                    }
                    if let Some(call) = calls.remove(&id) {
                        tell(Heard::Reply { call, result });
                    }
                }
                Ok(ChannelEvent::Progress { progress, .. }) => {
                    tell(Heard::Progress(format!("{}: {}", record.host, Record::clip(&progress.text))));
                }
                Ok(_) => {}
                Err(why) => {
                    link = None;
                    for call in std::mem::take(&mut calls).into_values() {
                        tell(Heard::Reply { call, result: Err(Refusal::new(ErrorCode::Unreachable, why.clone())) });
                    }
                    tell(Heard::Lost(record.id));
                }
            }
        }
    }
    if let Some(link) = link {
        link.close().await;
    }
}

/// Fetches one document and keeps it with the session. The snapshot is good without it; the operator is told.
async fn keep(
    shared: &Arc<Shared>,
    record: &Record,
    link: &mut Link,
    session: SessionId,
    document: &Document,
) {
    let kept = async {
        let bytes = fetch(link, session, document).await?;
        let (agent, kind) = (record.id, document.kind);
        shared
            .blocking(move |shared| shared.documents.put(session, agent, kind, &bytes))
            .await
    };
    if let Err(refusal) = kept.await {
        let text = format!(
            "the document {} of {} for a snapshot was not kept: {}",
            document.kind, record.host, refusal.text
        );
        shared.event(code::AGENT_TROUBLE, record.id.to_string(), text);
    }
}

async fn fetch(link: &mut Link, session: SessionId, document: &Document) -> Result<Vec<u8>, Refusal> {
    let wrong = |text: String| Refusal::new(ErrorCode::Malformed, text);
    let mut gather = Gather::new(session, document.kind);
    while gather.whole().is_none() {
        let request = Request::FetchBlob(FetchBlob {
            session,
            kind: document.kind,
            offset_bytes: gather.next_offset(),
        });
        let Reply::FetchBlob(piece) = link.ask(request).await? else {
            return Err(wrong("another answer than was asked for".to_owned()));
        };
        // Each piece brings the document on, or the agent could keep the target busy for ever.
        let before = gather.next_offset();
        gather.take(&piece).map_err(|error| wrong(error.to_string()))?;
        if gather.next_offset() == before && gather.whole().is_none() {
            return Err(wrong("a piece that brings nothing new".to_owned()));
        }
    }
    let bytes = gather.whole().unwrap_or_default().to_vec();
    if sha256(&bytes).as_ref() != document.sha256 {
        return Err(wrong("its content is not what was announced".to_owned()));
    }
    Ok(bytes)
}

async fn next(link: &mut Option<Link>) -> Result<ChannelEvent, String> {
    match link {
        Some(link) => link.event().await,
        None => std::future::pending().await,
    }
}
