//! The whole way over loopback: TLS, enrolment, registration, snapshots, against an agent made of `agentproto::client`.

use std::sync::atomic::{AtomicBool, AtomicU32};

use rustls::pki_types::ServerName;
use stillpoint_agentproto::channel::{Channel, ChannelEvent};
use stillpoint_agentproto::client::{self, Asked, FreezeReport, Output, ThawReport, Work};
use stillpoint_agentproto::enrol::{EXPORTER_LABEL, EXPORTER_LEN};
use stillpoint_agentproto::frame::MAX_BODY;
use stillpoint_agentproto::message::{
    App, AppState, BlobKind, Capabilities, Document, Enrol, FrozenVolume, Hello, LunIdentity, LunVolumes,
    Mount, PreflightReport, Prepared, Register, Role, Severity, Volumes, piece_of,
};
use stillpoint_agentproto::registration::{AgentEnd, AgentEvent, Purpose};
use stillpoint_agentproto::server::{Outcome, Phase};
use stillpoint_agentproto::{AgentId, ErrorCode, Fingerprint, SessionId};
use stillpoint_snapshot::PoolOptions;
use tokio::net::{TcpListener, TcpStream};

use super::pipe::{Pipe, Turn};
use super::site::TargetFacts;
use super::view::AgentState;
use super::*;
use crate::serve::events::Code;
use crate::serve::vss::Asker;
use stillpoint_agentproto::message::{Heartbeat, SessionState};

const LUN: LunId = LunId([0x62; 16]);
const INITIATOR: &str = "iqn.2026-11.test:host";

#[derive(Default)]
struct FakeSite {
    sessions: Mutex<Vec<String>>,
    chap: AtomicBool,
    events: Mutex<Vec<String>>,
}

impl Site for FakeSite {
    fn lun(&self, name: &str) -> Option<LunFacts> {
        let identity = LunIdentity {
            lun: LUN,
            serial: None,
            iqn: None,
            number: Some(0),
            size_bytes: Some(1 << 30),
        };
        let chap = self.chap.load(Ordering::SeqCst);
        let target = TargetFacts {
            iqn: "iqn.t".into(),
            agents: true,
            chap,
            luns: 1,
            portal_groups: 1,
        };
        (name == "sql01").then(|| LunFacts {
            name: name.to_owned(),
            identity,
            targets: vec![target],
        })
    }

    fn lun_by_id(&self, lun: LunId) -> Option<LunFacts> {
        (lun == LUN).then(|| self.lun("sql01")).flatten()
    }

    fn initiators(&self, _lun: &str) -> Vec<String> {
        self.sessions.lock().unwrap().clone()
    }

    fn provide(self: Arc<Self>, _asker: Asker, _request: Request) -> Result<Reply, WireRefusal> {
        Err(WireRefusal::new(ErrorCode::Unsupported, "not in this test"))
    }

    fn event(&self, _code: Code, subject: String, text: String, _who: &str) {
        self.events.lock().unwrap().push(format!("{subject}: {text}"));
    }
}

/// A daemon's end, with nothing around it.
struct Daemonlet {
    agents: Agents,
    site: Arc<FakeSite>,
    shutdown: CancellationToken,
    tracker: TaskTracker,
    pool: Pool,
    dir: tempfile::TempDir,
}

impl Daemonlet {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::create(&dir.path().join("pool"), &PoolOptions::default()).unwrap();
        let agents = Agents::open_at(Some("127.0.0.1:0".parse().unwrap()), true, dir.path(), &pool).unwrap();
        let site = Arc::new(FakeSite {
            sessions: Mutex::new(vec![INITIATOR.to_owned()]),
            ..FakeSite::default()
        });
        let (shutdown, tracker) = (CancellationToken::new(), TaskTracker::new());
        let seen: Arc<dyn Site> = Arc::<FakeSite>::clone(&site);
        agents
            .start(Arc::downgrade(&seen), tracker.clone(), shutdown.clone())
            .await
            .unwrap();
        Self {
            agents,
            site,
            shutdown,
            tracker,
            pool,
            dir,
        }
    }

    fn address(&self) -> SocketAddr {
        self.agents.listening().unwrap()
    }

    fn token(&self) -> Token {
        let view = self
            .agents
            .token_create(&["sql01".to_owned()], Duration::from_secs(60), "tester")
            .unwrap();
        assert!(
            view.enrol
                .contains(&format!("{}@127.0.0.1:{}", view.token, self.address().port()))
        );
        Token::parse(&view.token).ok().unwrap()
    }

    /// Waits until the agent's state is as wanted.
    async fn state(&self, host: &str, wanted: AgentState) -> AgentView {
        for _ in 0..1200 {
            match self.agents.show(host) {
                Ok(view) if view.state == wanted => return view,
                _ => tokio::time::sleep(Duration::from_millis(25)).await,
            }
        }
        panic!("{host} does not become {wanted:?}: {:?}", self.agents.show(host));
    }

    async fn snapshot(&self, mode: Mode, on_failure: OnFailure, host: &Host) -> (Verdict, Store) {
        let ask = SnapshotAsk {
            name: "s1".into(),
            luns: vec!["sql01".into()],
            mode,
            on_failure,
        };
        self.agents.snapshot(ask, host.store(), |_| {}).await
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(5), self.tracker.wait())
            .await
            .expect("tasks end");
        self.pool.shutdown().unwrap();
    }
}

/// The store: notes what it was told, and whether the host was frozen at the cut.
struct Store {
    steps: Vec<&'static str>,
    frozen: Arc<AtomicBool>,
    frozen_at_cut: bool,
    cut_fails: bool,
}

impl Cutter for Store {
    fn settle(&mut self) -> anyhow::Result<()> {
        self.steps.push("settle");
        Ok(())
    }
    fn cut(&mut self) -> anyhow::Result<()> {
        self.steps.push("cut");
        self.frozen_at_cut = self.frozen.load(Ordering::SeqCst);
        anyhow::ensure!(!self.cut_fails, "the disk is gone");
        Ok(())
    }
    fn commit(&mut self) -> anyhow::Result<()> {
        self.steps.push("commit");
        Ok(())
    }
    fn promote(&mut self, verdict: &Verdict) -> anyhow::Result<()> {
        assert!(verdict.kept);
        self.steps.push("promote");
        Ok(())
    }
    fn discard(&mut self) -> anyhow::Result<()> {
        self.steps.push("discard");
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Behaviour {
    Good,
    /// Closes the connection instead of answering Freeze.
    DropsAtFreeze,
    /// Somebody thaws behind its back.
    ThawedByOthers,
}

/// An application's host with its agent.
struct Host {
    id: AgentId,
    identity: Arc<tls::Identity>,
    _dir: tempfile::TempDir,
    port: u16,
    frozen: Arc<AtomicBool>,
    behaviour: Arc<Mutex<Behaviour>>,
    app: Arc<AtomicBool>,
    generation: Arc<AtomicU32>,
    listener: tokio::task::JoinHandle<()>,
    target: Fingerprint,
    address: SocketAddr,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

fn agent_hello(id: AgentId) -> Hello {
    let capabilities = Capabilities::LINUX_FS.with(Capabilities::HOOKS);
    Hello {
        min_version: 1,
        max_version: 1,
        agent_id: Some(id),
        product: "fake 1".into(),
        capabilities,
    }
}

impl Host {
    async fn new(daemon: &Daemonlet, number: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = Arc::new(tls::Identity::open(dir.path()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let id = AgentId([number; 16]);
        let frozen = Arc::new(AtomicBool::new(false));
        let behaviour = Arc::new(Mutex::new(Behaviour::Good));
        let app = Arc::new(AtomicBool::new(false));
        let generation = Arc::new(AtomicU32::new(0));
        let config = client::Config {
            min_interval: Duration::ZERO,
            ..client::Config::default()
        };
        let agent = Arc::new(Mutex::new(client::Agent::new(config, 0)));
        let serving = (
            Arc::clone(&identity),
            Arc::clone(&frozen),
            Arc::clone(&behaviour),
            Arc::clone(&app),
        );
        let listener = tokio::spawn(async move {
            let (identity, frozen, behaviour, app) = serving;
            let acceptor = tokio_rustls::TlsAcceptor::from(tls::server(&identity).unwrap());
            let mut number = 0;
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                number += 1;
                let Ok(stream) = acceptor.accept(stream).await else {
                    continue;
                };
                let work = FakeWork {
                    id,
                    agent: Arc::clone(&agent),
                    frozen: Arc::clone(&frozen),
                    behaviour: Arc::clone(&behaviour),
                    app: Arc::clone(&app),
                    number,
                };
                tokio::spawn(work.serve(stream));
            }
        });
        let target = daemon.agents.0.identity.fingerprint;
        let address = daemon.address();
        Self {
            id,
            identity,
            _dir: dir,
            port,
            frozen,
            behaviour,
            app,
            generation,
            listener,
            target,
            address,
        }
    }

    fn store(&self) -> Store {
        Store {
            steps: Vec::new(),
            frozen: Arc::clone(&self.frozen),
            frozen_at_cut: false,
            cut_fails: false,
        }
    }

    fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    async fn dial(&self) -> tokio_rustls::client::TlsStream<TcpStream> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let pins = Arc::new(stillpoint_agentproto::tls::Exactly(self.target));
        let config = tls::client(&self.identity, pins).unwrap();
        let name = ServerName::try_from("stillpoint").unwrap();
        tokio_rustls::TlsConnector::from(config)
            .connect(name, stream)
            .await
            .unwrap()
    }

    /// Enrols; the answer, verified.
    async fn enrol(&self, token: &Token) -> Result<(), WireRefusal> {
        let stream = self.dial().await;
        let exporter = stream
            .get_ref()
            .1
            .export_keying_material([0; EXPORTER_LEN], EXPORTER_LABEL, None)
            .unwrap();
        assert!(token.is_for(&self.target));
        let mac = token.agent_mac(self.id, &exporter);
        let enrol = Enrol {
            agent_id: self.id,
            token_id: token.id(),
            mac,
            host: format!("host{}", self.id.0[0]),
        };
        let mut end = AgentEnd::new(Instant::now(), agent_hello(self.id), 0, Purpose::Enrol(enrol));
        let mut pipe = Pipe::new(stream);
        loop {
            match next(&mut end, &mut pipe).await.expect("answered") {
                AgentEvent::Enrolled(ok) => {
                    assert!(token.verify_target(self.id, &exporter, &ok.mac));
                    return Ok(());
                }
                AgentEvent::Refused(refusal) => return Err(refusal),
                _ => {}
            }
        }
    }

    /// Registers, and stays: until the returned task ends (the target closed the connection) or is aborted.
    async fn register(&self, port: u16) -> Result<tokio::task::JoinHandle<()>, WireRefusal> {
        let (mut end, mut pipe) = self.begin(port, None).await?;
        Ok(tokio::spawn(async move {
            while next(&mut end, &mut pipe).await.is_ok() {}
        }))
    }

    /// Registers.
    async fn begin(
        &self,
        port: u16,
        advertise_host: Option<&str>,
    ) -> Result<(AgentEnd, Pipe<tokio_rustls::client::TlsStream<TcpStream>>), WireRefusal> {
        let register = Register {
            advertise_host: advertise_host.map(str::to_owned),
            host: format!("host{}", self.id.0[0]),
            os: "TestOS\u{1b}[31m".into(),
            agent_version: "1".into(),
            boot_id: "b".into(),
            listen_port: port,
            features: Capabilities::LINUX_FS,
            initiators: vec![INITIATOR.into()],
            mounted: vec![LUN, LunId([9; 16])],
        };
        let generation = self.generation.load(Ordering::SeqCst);
        let mut end = AgentEnd::new(
            Instant::now(),
            agent_hello(self.id),
            generation,
            Purpose::Register(register),
        );
        let mut pipe = Pipe::new(self.dial().await);
        loop {
            match next(&mut end, &mut pipe).await.expect("answered") {
                AgentEvent::Registered { luns } => {
                    assert_eq!(luns.len(), 1, "the allow-list");
                    return Ok((end, pipe));
                }
                AgentEvent::Refused(refusal) => return Err(refusal),
                _ => {}
            }
        }
    }
}

async fn next<S: tokio::io::AsyncRead + tokio::io::AsyncWrite>(
    end: &mut AgentEnd,
    pipe: &mut Pipe<S>,
) -> std::io::Result<AgentEvent> {
    loop {
        if let Some(event) = end.poll_event() {
            return Ok(event);
        }
        while let Some(bytes) = end.poll_transmit() {
            pipe.push(&bytes);
        }
        match pipe.turn(true, end.poll_timeout()).await? {
            Turn::Read(count) => end.receive(Instant::now(), pipe.bytes(count)).unwrap(),
            Turn::Time => end.handle_timeout(Instant::now()).unwrap(),
        }
    }
}

fn other(request: Request) -> Result<Reply, WireRefusal> {
    match request {
        Request::FetchBlob(fetch) => {
            let piece = piece_of(&document(), fetch.session, fetch.kind, fetch.offset_bytes);
            Ok(Reply::FetchBlob(piece.expect("within the document")))
        }
        _ => Err(WireRefusal::new(ErrorCode::Unsupported, "not in this test")),
    }
}

/// A document that needs several pieces.
fn document() -> Vec<u8> {
    (0..300_000u32).flat_map(u32::to_be_bytes).take(300_000).collect()
}

/// What every fake agent announces: one as it is, and one that is not what it says.
fn documents() -> Vec<Document> {
    let content = document();
    let sha256 = crate::serve::documents::sha256(&content)
        .as_ref()
        .try_into()
        .unwrap();
    let total_bytes = u32::try_from(content.len()).unwrap();
    let named = |kind, sha256| Document {
        kind,
        total_bytes,
        sha256,
    };
    vec![
        named(BlobKind::BackupComponents, sha256),
        named(BlobKind::WriterMetadata, [0; 32]),
    ]
}

struct FakeWork {
    id: AgentId,
    agent: Arc<Mutex<client::Agent>>,
    frozen: Arc<AtomicBool>,
    behaviour: Arc<Mutex<Behaviour>>,
    app: Arc<AtomicBool>,
    number: u64,
}

impl FakeWork {
    async fn serve(self, stream: tokio_rustls::server::TlsStream<TcpStream>) {
        let mut channel = Channel::accepting(Instant::now(), agent_hello(self.id), 0, MAX_BODY);
        let mut pipe = Pipe::new(stream);
        loop {
            while let Some(event) = channel.poll_event() {
                let now = Instant::now();
                let mut agent = self.agent.lock().unwrap();
                match event {
                    ChannelEvent::HelloAsked { generation, .. } => match agent.fence(now, generation) {
                        Ok(()) => channel.accept(),
                        Err(refusal) => channel.refuse(refusal),
                    },
                    ChannelEvent::Request {
                        id,
                        generation,
                        request,
                    } => {
                        agent.request(
                            now,
                            Asked {
                                channel: self.number,
                                id,
                            },
                            generation,
                            request,
                        );
                    }
                    _ => {}
                }
            }
            if !self.outputs(&mut channel) {
                self.agent
                    .lock()
                    .unwrap()
                    .channel_lost(Instant::now(), self.number);
                self.outputs(&mut channel);
                return;
            }
            while let Some(bytes) = channel.poll_transmit() {
                pipe.push(&bytes);
            }
            let until = self
                .agent
                .lock()
                .unwrap()
                .poll_timeout()
                .into_iter()
                .chain(channel.poll_timeout())
                .min();
            match pipe.turn(true, until).await {
                Ok(Turn::Read(count)) => channel.receive(Instant::now(), pipe.bytes(count)).unwrap(),
                Ok(Turn::Time) => {
                    channel.handle_timeout(Instant::now()).unwrap();
                    self.agent.lock().unwrap().handle_timeout(Instant::now());
                }
                Err(_) => {
                    self.agent
                        .lock()
                        .unwrap()
                        .channel_lost(Instant::now(), self.number);
                    self.outputs(&mut channel);
                    return;
                }
            }
        }
    }

    /// Does what the machine wants; false = drop the connection.
    fn outputs(&self, channel: &mut Channel) -> bool {
        let mut agent = self.agent.lock().unwrap();
        let mut alive = true;
        while let Some(output) = agent.poll_output() {
            match output {
                Output::Reply { asked, result } if asked.channel == self.number => {
                    channel.reply(asked.id, result)
                }
                Output::Work(work) => alive &= self.work(&mut agent, work),
                _ => {}
            }
        }
        alive
    }

    fn app(&self, state: AppState) -> Vec<App> {
        let app = App {
            kind: "hook".into(),
            instance: "db".into(),
            component: None,
            version: None,
            state,
            error: None,
            lun: None,
        };
        if self.app.load(Ordering::SeqCst) {
            vec![app]
        } else {
            vec![]
        }
    }

    fn work(&self, agent: &mut client::Agent, work: Work) -> bool {
        let now = Instant::now();
        let behaviour = *self.behaviour.lock().unwrap();
        match work {
            Work::ListVolumes { asked, .. } => {
                let identity = LunIdentity {
                    lun: LUN,
                    serial: None,
                    iqn: None,
                    number: None,
                    size_bytes: None,
                };
                let mount = Mount {
                    path: "/srv".into(),
                    file_system: "ext4".into(),
                    device: "/dev/sda".into(),
                    read_only: false,
                    cluster: false,
                };
                let luns = vec![LunVolumes {
                    identity,
                    role: Role::Mounted,
                    mounts: vec![mount],
                    apps: self.app(AppState::Ready),
                }];
                agent.answer(
                    asked,
                    Ok(Reply::ListVolumes(Volumes {
                        luns,
                        initiators: vec![INITIATOR.into()],
                    })),
                );
            }
            Work::Preflight { asked, .. } => {
                agent.answer(asked, Ok(Reply::Preflight(PreflightReport { findings: vec![] })));
            }
            Work::Prepare(prepare) => {
                let apps = self.app(AppState::Ready);
                agent.prepared(
                    now,
                    prepare.session,
                    Ok(Prepared {
                        apps,
                        exclusions: vec![],
                    }),
                );
            }
            Work::Other { asked, request } => agent.answer(asked, other(request)),
            Work::Freeze { .. } if behaviour == Behaviour::DropsAtFreeze => return false,
            Work::Freeze { session, .. } => {
                agent.hold_started(now, session).unwrap();
                self.frozen.store(true, Ordering::SeqCst);
                let volumes = vec![FrozenVolume {
                    lun: LUN,
                    path: "/srv".into(),
                    frozen: true,
                    error: None,
                }];
                agent.frozen(
                    now,
                    session,
                    Ok(FreezeReport {
                        volumes,
                        apps: self.app(AppState::Frozen),
                    }),
                );
            }
            Work::Thaw { session, .. } => {
                self.frozen.store(false, Ordering::SeqCst);
                let in_force = behaviour != Behaviour::ThawedByOthers;
                agent.thawed(
                    now,
                    session,
                    ThawReport {
                        in_force,
                        apps: self.app(AppState::Thawed),
                        reason: None,
                        held: None,
                        documents: documents(),
                    },
                );
            }
            Work::Clean { session, .. } => agent.cleaned(now, session, None),
        }
        true
    }
}

async fn connected() -> (Daemonlet, Host, tokio::task::JoinHandle<()>) {
    let daemon = Daemonlet::start().await;
    let host = Host::new(&daemon, 1).await;
    host.enrol(&daemon.token()).await.unwrap();
    let registration = host.register(host.port).await.unwrap();
    daemon.state("host1", AgentState::Connected).await;
    (daemon, host, registration)
}

const FULL: [&str; 4] = ["settle", "cut", "commit", "promote"];

/// They come after the verdict, before the agent forgets.
async fn kept_documents(daemon: &Daemonlet, session: SessionId) {
    let kept = daemon.agents.documents();
    let told = || {
        let events = daemon.site.events.lock().unwrap();
        events
            .iter()
            .any(|event| event.contains("writer-metadata") && event.contains("not kept"))
    };
    for _ in 0..600 {
        if !kept.list(session).unwrap().is_empty() && told() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        told(),
        "what is not what it says is not kept, and the operator hears of it"
    );
    let rows = kept.list(session).unwrap();
    let kinds: Vec<_> = rows.iter().map(|row| row.kind.as_str()).collect();
    assert_eq!(kinds, ["backup-components"]);
    assert_eq!(
        kept.read(session, &rows[0].agent, &rows[0].kind).unwrap(),
        document()
    );
}

#[tokio::test]
async fn an_agent_enrols_registers_and_is_dialled_back() {
    let (daemon, host, registration) = connected().await;
    let view = daemon.agents.show(&host.id.to_string()).unwrap();
    assert_eq!(
        (view.luns, view.mounted),
        (vec!["sql01".to_owned()], vec!["sql01".to_owned()])
    );
    assert_eq!(
        view.os, "TestOS [31m",
        "control characters of other hosts do not reach the terminal"
    );
    assert_eq!(view.address, Some(format!("127.0.0.1:{}", host.port)));
    let test = daemon.agents.test("host1").await.unwrap();
    assert!(test.ready && test.findings.is_empty());
    // Everything is kept over a restart, except that nobody is connected, and the generation is higher.
    let again = Agents::open_at(None, false, daemon.dir.path(), &daemon.pool).unwrap();
    assert_eq!(again.0.generation(), daemon.agents.0.generation() + 1);
    assert_eq!(again.0.identity.fingerprint, daemon.agents.0.identity.fingerprint);
    assert_eq!(again.show("host1").unwrap().state, AgentState::Disconnected);
    daemon.stop().await;
    tokio::time::timeout(Duration::from_secs(5), registration)
        .await
        .expect("closed")
        .unwrap();
}

#[tokio::test]
async fn tokens_are_used_once_and_pins_are_not_replaced() {
    let daemon = Daemonlet::start().await;
    let host = Host::new(&daemon, 1).await;
    assert_eq!(host.register(1).await.unwrap_err().code, ErrorCode::NotEnrolled);
    let token = daemon.token();
    host.enrol(&token).await.unwrap();
    let other = Host::new(&daemon, 2).await;
    assert_eq!(
        other.enrol(&token).await.unwrap_err().code,
        ErrorCode::NotEnrolled
    );
    // The same id with another key, and the same key again: both only after a revoke.
    let thief = Host::new(&daemon, 1).await;
    assert_eq!(
        thief.enrol(&daemon.token()).await.unwrap_err().code,
        ErrorCode::NotAllowed
    );
    assert_eq!(
        host.enrol(&daemon.token()).await.unwrap_err().code,
        ErrorCode::NotAllowed
    );
    daemon.agents.revoke("host1", "tester").await.unwrap();
    thief.enrol(&daemon.token()).await.unwrap();
    let events = daemon.site.events.lock().unwrap().join("\n");
    assert!(
        events.contains("revoked") && events.contains("wrong, used or expired token"),
        "{events}"
    );
    daemon.stop().await;
}

#[tokio::test]
async fn an_unreachable_port_is_told_at_registration() {
    let daemon = Daemonlet::start().await;
    let host = Host::new(&daemon, 1).await;
    host.enrol(&daemon.token()).await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let _registration = host.register(closed).await.unwrap();
    let view = daemon.state("host1", AgentState::Unreachable).await;
    let trouble = view.trouble.unwrap();
    for part in [
        "host1",
        &format!("127.0.0.1:{closed}"),
        "the target dials the agent",
        "firewall",
    ] {
        assert!(trouble.contains(part), "{trouble}");
    }
    let (verdict, store) = daemon.snapshot(Mode::Filesystem, OnFailure::Fail, &host).await;
    let told = refusal(&verdict);
    assert_eq!((told.exit, told.code.as_str()), (3, "unreachable"));
    assert!(told.message.contains(&closed.to_string()), "{}", told.message);
    assert!(
        store.steps.is_empty(),
        "a refusal of the preflight touches nothing: {:?}",
        store.steps
    );
    daemon.stop().await;
}

/// A replacement of the agent's key is no fault of the network, and the message says so.
#[tokio::test]
async fn another_key_at_the_agents_address_is_named() {
    let daemon = Daemonlet::start().await;
    let host = Host::new(&daemon, 1).await;
    host.enrol(&daemon.token()).await.unwrap();
    let stranger = Host::new(&daemon, 2).await;
    let _registration = host.register(stranger.port).await.unwrap();
    let trouble = daemon
        .state("host1", AgentState::Unreachable)
        .await
        .trouble
        .unwrap();
    let (pinned, seen) = (host.identity.fingerprint, stranger.identity.fingerprint);
    for part in [
        "agent revoke",
        "host1",
        &format!("127.0.0.1:{}", stranger.port),
        &pinned.to_string(),
        &seen.to_string(),
    ] {
        assert!(trouble.contains(part), "{part}: {trouble}");
    }
    assert!(!trouble.contains("firewall"), "{trouble}");
    daemon.stop().await;
}

/// A registration must not make the target dial whom the agent names: an operator has to approve it.
#[tokio::test]
async fn an_advertised_host_is_dialled_once_it_is_approved() {
    let daemon = Daemonlet::start().await;
    let host = Host::new(&daemon, 1).await;
    host.enrol(&daemon.token()).await.unwrap();
    let refusal = daemon.agents.approve("host1", "tester").await.unwrap_err();
    assert_eq!((refusal.exit, refusal.code.as_str()), (3, "nothing_to_approve"));
    let registration = host.begin(host.port, Some("127.0.0.2")).await.unwrap();
    let view = daemon.state("host1", AgentState::Connected).await;
    assert_eq!(view.address, Some(format!("127.0.0.1:{}", host.port)));
    assert_eq!(view.advertised.as_deref(), Some("127.0.0.2"));
    let events = daemon.site.events.lock().unwrap().join("\n");
    assert!(events.contains("asks to be dialled at 127.0.0.2"), "{events}");
    daemon.agents.approve("host1", "tester").await.unwrap();
    drop(registration);
    let _registration = host.begin(host.port, Some("127.0.0.2")).await.unwrap();
    // Nothing listens at that address of the loopback: the trouble names it.
    let view = daemon.state("host1", AgentState::Unreachable).await;
    assert_eq!(
        (view.address, view.advertised),
        (Some(format!("127.0.0.2:{}", host.port)), None)
    );
    // Another one needs another approval; until then the source is dialled.
    let _registration = host.begin(host.port, Some("127.0.0.3")).await.unwrap();
    let view = daemon.state("host1", AgentState::Connected).await;
    assert_eq!(view.advertised.as_deref(), Some("127.0.0.3"));
    assert_eq!(
        host.begin(host.port, Some("san1")).await.err().unwrap().code,
        ErrorCode::Malformed
    );
    daemon.stop().await;
}

#[tokio::test]
async fn a_wrong_clock_is_told_once_and_costs_nothing() {
    let daemon = Daemonlet::start().await;
    let host = Host::new(&daemon, 1).await;
    host.enrol(&daemon.token()).await.unwrap();
    let (mut end, mut pipe) = host.begin(host.port, None).await.unwrap();
    daemon.state("host1", AgentState::Connected).await;
    let now_unix_ms = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap();
    for _ in 0..2 {
        end.heartbeat(
            Instant::now(),
            Heartbeat {
                state: SessionState::Idle,
                session: None,
                frozen_ms: None,
                clock_unix_ms: now_unix_ms - 7_200_000,
                mounted: vec![LUN],
            },
        );
        while !matches!(next(&mut end, &mut pipe).await.unwrap(), AgentEvent::Luns(_)) {}
    }
    let view = daemon.agents.show("host1").unwrap();
    let off = view.clock_off_seconds.expect("it is off");
    assert!((-7_200 - 600..=-7_200).contains(&off), "{off}");
    let events = daemon.site.events.lock().unwrap().clone();
    let told: Vec<_> = events
        .iter()
        .filter(|event| event.contains("the clock of host1"))
        .collect();
    assert!(
        told.len() == 1 && told[0].contains("behind") && told[0].contains("NTP"),
        "{told:?}"
    );
    daemon.stop().await;
}

#[test]
fn a_clock_is_off_beyond_a_minute() {
    use super::shared::clock_off_seconds;
    assert_eq!(clock_off_seconds(160_000, 100_000), None);
    assert_eq!(clock_off_seconds(160_001, 100_000), Some(60));
    assert_eq!(clock_off_seconds(0, 3_600_000), Some(-3_600));
    assert_eq!(clock_off_seconds(u64::MAX, 0), Some(i64::MAX / 1000));
}

#[tokio::test]
async fn levels_are_what_is_proved() {
    let (daemon, host, _registration) = connected().await;
    let (verdict, store) = daemon.snapshot(Mode::Filesystem, OnFailure::Fail, &host).await;
    assert_eq!(
        (verdict.kept, verdict.lowest()),
        (true, Level::Filesystem),
        "{verdict:?}"
    );
    assert_eq!(store.steps, FULL);
    assert!(store.frozen_at_cut && !host.frozen.load(Ordering::SeqCst));
    // Without an application, `application` is refused before anything is frozen …
    let (verdict, store) = daemon.snapshot(Mode::Application, OnFailure::Fail, &host).await;
    assert!(!verdict.kept && store.steps.is_empty(), "{verdict:?}");
    assert_eq!(refusal(&verdict).exit, 3);
    // … or recorded as what it is.
    let (verdict, _) = daemon
        .snapshot(Mode::Application, OnFailure::CrashConsistent, &host)
        .await;
    assert_eq!((verdict.kept, verdict.lowest()), (true, Level::Filesystem));
    assert!(verdict.failure.is_some());
    host.app.store(true, Ordering::SeqCst);
    let (verdict, store) = daemon.snapshot(Mode::Application, OnFailure::Fail, &host).await;
    assert_eq!(
        (verdict.kept, verdict.lowest()),
        (true, Level::Application),
        "{verdict:?}"
    );
    assert_eq!(store.steps, FULL);
    assert_eq!(
        daemon.agents.show("host1").unwrap().last_freeze.unwrap().outcome,
        "hold-ok"
    );
    kept_documents(&daemon, verdict.session).await;
    daemon.stop().await;
}

#[tokio::test]
async fn an_agent_that_dies_while_freezing_leaves_no_lie() {
    let (daemon, host, _registration) = connected().await;
    host.behave(Behaviour::DropsAtFreeze);
    let (verdict, store) = daemon.snapshot(Mode::Filesystem, OnFailure::Fail, &host).await;
    assert!(!verdict.kept && store.steps == ["settle"], "{:?}", store.steps);
    assert_eq!(verdict.failure.as_ref().unwrap().phase, Phase::Freeze);
    assert_eq!(refusal(&verdict).exit, 3);
    let (verdict, store) = daemon
        .snapshot(Mode::Filesystem, OnFailure::CrashConsistent, &host)
        .await;
    assert_eq!((verdict.kept, verdict.lowest()), (true, Level::Crash));
    assert_eq!(store.steps, FULL);
    host.behave(Behaviour::ThawedByOthers);
    let (verdict, store) = daemon.snapshot(Mode::Filesystem, OnFailure::Fail, &host).await;
    assert!(!verdict.kept, "{verdict:?}");
    assert_eq!(store.steps, ["settle", "cut", "commit", "discard"]);
    assert_eq!(verdict.agents[0].outcome, Outcome::HoldLost);
    daemon.stop().await;
}

#[tokio::test]
async fn unseen_writers_second_paths_and_chap_are_refused() {
    let (daemon, host, _registration) = connected().await;
    for (sessions, part) in [
        (vec![INITIATOR, "iqn.stranger"], "no agent speaks for it"),
        (vec![INITIATOR, INITIATOR], "more than one session"),
    ] {
        *daemon.site.sessions.lock().unwrap() = sessions.into_iter().map(str::to_owned).collect();
        let (verdict, store) = daemon.snapshot(Mode::Filesystem, OnFailure::Fail, &host).await;
        let told = refusal(&verdict);
        assert!(
            told.exit == 3 && told.message.contains(part) && store.steps.is_empty(),
            "{told:?}"
        );
    }
    daemon.site.sessions.lock().unwrap().truncate(1);
    daemon.site.chap.store(true, Ordering::SeqCst);
    let (verdict, _) = daemon.snapshot(Mode::Filesystem, OnFailure::Fail, &host).await;
    assert_eq!(refusal(&verdict).code, "limit_chap");
    let refused = daemon.agents.allow("host1", "sql01", "tester").await.unwrap_err();
    assert_eq!((refused.code.as_str(), refused.exit), ("limit_chap", 3));
    assert!(
        daemon
            .agents
            .token_create(&["nope".to_owned()], Duration::from_secs(1), "t")
            .is_err()
    );
    daemon.stop().await;
}

/// Everything at once, in the words of the refusals, and nothing is frozen for it.
#[tokio::test]
async fn a_preflight_names_all_that_stands_in_the_way() {
    let (daemon, host, _registration) = connected().await;
    let codes = |view: &PreflightView| {
        let errors = view.findings.iter().filter(|f| f.severity == Severity::Error);
        errors.map(|f| f.code.clone()).collect::<Vec<_>>()
    };
    let view = daemon.agents.preflight("sql01", Mode::Filesystem).await.unwrap();
    assert!(view.ready && view.findings.is_empty(), "{view:?}");
    assert_eq!(view.agents[0].role, "mounted");
    assert_eq!(
        view.sessions[0].agent.as_deref(),
        Some(view.agents[0].id.as_str())
    );
    // Without an application nobody can prove `application`.
    let view = daemon.agents.preflight("sql01", Mode::Application).await.unwrap();
    assert_eq!((view.ready, codes(&view)), (false, vec!["no_quiesce".to_owned()]));
    host.app.store(true, Ordering::SeqCst);
    let view = daemon.agents.preflight("sql01", Mode::Application).await.unwrap();
    assert!(view.ready && view.agents[0].apps.len() == 1, "{view:?}");
    let sessions = [INITIATOR, INITIATOR, "iqn.stranger", "iqn.other"];
    *daemon.site.sessions.lock().unwrap() = sessions.map(str::to_owned).to_vec();
    daemon.site.chap.store(true, Ordering::SeqCst);
    let view = daemon.agents.preflight("sql01", Mode::Application).await.unwrap();
    assert_eq!(
        codes(&view),
        ["limit_chap", "limit_mpio", "not_allowed", "not_allowed"],
        "{view:?}"
    );
    let spoken_for: Vec<bool> = view
        .sessions
        .iter()
        .map(|session| session.agent.is_some())
        .collect();
    assert_eq!(spoken_for, [true, true, false, false]);
    // Nobody knows whom an agent that does not answer would have spoken for.
    host.listener.abort();
    let view = daemon.agents.preflight("sql01", Mode::Application).await.unwrap();
    assert_eq!(
        codes(&view),
        ["limit_chap", "unreachable", "limit_mpio"],
        "{view:?}"
    );
    assert!(!view.agents[0].reached && view.agents[0].role == "mounted");
    assert!(!host.frozen.load(Ordering::SeqCst));
    assert_eq!(
        daemon
            .agents
            .preflight("nope", Mode::Application)
            .await
            .unwrap_err()
            .exit,
        1
    );
    daemon.stop().await;
}

/// A token survives a restart with its LUNs; once used, it stays used, and it is in no file but the private one.
#[tokio::test]
async fn tokens_survive_a_restart_and_stay_used() {
    use std::os::unix::fs::PermissionsExt as _;
    let daemon = Daemonlet::start().await;
    let (token, reserve) = (daemon.token(), daemon.token());
    let file = daemon.dir.path().join("agents/tokens.json");
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(
        std::fs::read_to_string(&file)
            .unwrap()
            .contains(&**token.reveal())
    );
    let host = Host::new(&daemon, 1).await;
    host.enrol(&token).await.unwrap();
    assert!(
        !std::fs::read_to_string(&file)
            .unwrap()
            .contains(&**token.reveal())
    );
    // The same data directory, read by the next daemon.
    let again = Agents::open_at(None, false, daemon.dir.path(), &daemon.pool).unwrap();
    let exporter = [1; EXPORTER_LEN];
    let enrol = |token: &Token, id| {
        again
            .0
            .tokens
            .enrol(id, token.id(), &token.agent_mac(id, &exporter), &exporter)
    };
    assert!(enrol(&token, AgentId([8; 16])).is_err());
    // Relayed: the MAC belongs to another TLS session.
    let relayed = again.0.tokens.enrol(
        AgentId([9; 16]),
        reserve.id(),
        &reserve.agent_mac(AgentId([9; 16]), &[2; EXPORTER_LEN]),
        &exporter,
    );
    assert_eq!(relayed.unwrap_err().code, ErrorCode::NotEnrolled);
    assert_eq!(enrol(&reserve, AgentId([9; 16])).unwrap().luns, [LUN]);
    std::fs::write(&file, "[{").unwrap();
    let damaged = Agents::open_at(None, false, daemon.dir.path(), &daemon.pool).unwrap_err();
    assert!(
        format!("{damaged:#}").contains("make new enrolment tokens"),
        "{damaged:#}"
    );
    daemon.stop().await;
}

#[tokio::test]
async fn a_probe_is_answered_where_agents_register() {
    use stillpoint_agentproto::discovery::{Answer, Probe};
    let daemon = Daemonlet::start().await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let probe = Probe {
        min_version: 1,
        max_version: 1,
        nonce: [5; 8],
    };
    let mut buffer = [0; 512];
    // Too short a probe gets nothing; the answer that comes is that of the whole one.
    socket.send_to(b"SPD1", daemon.address()).await.unwrap();
    socket.send_to(&probe.encode(), daemon.address()).await.unwrap();
    let received = tokio::time::timeout(Duration::from_secs(5), socket.recv_from(&mut buffer)).await;
    let (count, from) = received.expect("an answer").unwrap();
    assert_eq!(from, daemon.address());
    let answer = Answer::parse(&buffer[..count]).unwrap();
    assert_eq!((answer.nonce, answer.port), ([5; 8], daemon.address().port()));
    assert_eq!(answer.fingerprint, daemon.agents.0.identity.fingerprint);
    daemon.stop().await;
}

#[tokio::test]
async fn a_failed_cut_is_a_failure_and_the_agent_thaws() {
    let (daemon, host, _registration) = connected().await;
    let ask = SnapshotAsk {
        name: "s".into(),
        luns: vec!["sql01".into()],
        mode: Mode::Filesystem,
        on_failure: OnFailure::CrashConsistent,
    };
    let store = Store {
        cut_fails: true,
        ..host.store()
    };
    let (verdict, store) = daemon.agents.snapshot(ask, store, |_| {}).await;
    assert!(!verdict.kept && store.frozen_at_cut);
    let told = refusal(&verdict);
    assert!(
        told.exit == 1 && told.message.contains("the disk is gone"),
        "{told:?}"
    );
    assert!(!host.frozen.load(Ordering::SeqCst));
    daemon.stop().await;
}

#[tokio::test]
async fn revoke_drops_the_agent_and_a_bump_brings_everybody_back() {
    let (daemon, host, registration) = connected().await;
    let before = daemon.agents.0.generation();
    host.generation.store(before + 5, Ordering::SeqCst);
    let second = host.register(host.port).await.unwrap();
    // The newer connection replaces the older one.
    tokio::time::timeout(Duration::from_secs(5), registration)
        .await
        .expect("replaced")
        .unwrap();
    let events = daemon.site.events.lock().unwrap().join("\n");
    assert!(events.contains("agent generation bump"), "{events}");
    assert_eq!(daemon.agents.generation_bump("tester").await.unwrap(), before + 6);
    tokio::time::timeout(Duration::from_secs(5), second)
        .await
        .expect("kicked")
        .unwrap();
    let third = host.register(host.port).await.unwrap();
    daemon.agents.revoke("host1", "tester").await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), third)
        .await
        .expect("dropped")
        .unwrap();
    assert_eq!(
        host.register(host.port).await.unwrap_err().code,
        ErrorCode::NotEnrolled
    );
    assert!(daemon.agents.list().is_empty());
    daemon.stop().await;
}

#[tokio::test]
async fn silence_and_noise_are_dropped() {
    let daemon = Daemonlet::start().await;
    let mut noise = TcpStream::connect(daemon.address()).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut noise, b"GET / HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut noise, &mut rest);
    // A TLS alert and the end; never an answer to what was asked.
    let _reset = tokio::time::timeout(Duration::from_secs(2), read)
        .await
        .expect("dropped at once");
    assert!(!rest.starts_with(b"HTTP"));
    // The fifth connection of one source that says nothing is closed at once.
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(TcpStream::connect(daemon.address()).await.unwrap());
    }
    let mut fifth = silent.pop().unwrap();
    let ended = tokio::time::timeout(
        Duration::from_secs(2),
        tokio::io::AsyncReadExt::read(&mut fifth, &mut [0]),
    )
    .await;
    assert!(matches!(ended.expect("closed at once"), Ok(0) | Err(_)));
    daemon.stop().await;
}

/// "snapshots never wait for the registration listener" (agent-protocol.md §12), and the agent that is registered stays.
#[tokio::test]
async fn a_flood_of_strangers_does_not_hold_up_a_snapshot() {
    let (daemon, host, registration) = connected().await;
    let (address, made) = (daemon.address(), Arc::new(AtomicU32::new(0)));
    let counted = Arc::clone(&made);
    let flood = tokio::spawn(async move {
        let mut held = std::collections::VecDeque::new();
        loop {
            if let Ok(stream) = TcpStream::connect(address).await {
                held.push_back(stream);
                counted.fetch_add(1, Ordering::SeqCst);
            }
            if held.len() > MAX_HELD {
                held.pop_front();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    while made.load(Ordering::SeqCst) < 100 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (verdict, store) = daemon.snapshot(Mode::Filesystem, OnFailure::Fail, &host).await;
    assert_eq!(store.steps, FULL, "{:?}", verdict.failure);
    assert!(store.frozen_at_cut && !registration.is_finished() && !flood.is_finished());
    flood.abort();
    daemon.stop().await;
}

/// More than the places for strangers.
const MAX_HELD: usize = 80;
