//! A whole stage for the agent: a real ext4 on a loop device, the real program, and a target that speaks the protocol.
//!
//! Everything is put back when the stage goes, also after a failed test: thawed, unmounted, detached, ended.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use stillpoint_agentproto::channel::{Channel, ChannelEvent};
use stillpoint_agentproto::enrol::{EXPORTER_LABEL, Token};
use stillpoint_agentproto::frame::MAX_BODY;
use stillpoint_agentproto::message::{
    Abort, Capabilities, CutOutcome, EnrolOk, Freeze, Frozen, Heartbeat, HeartbeatOk, Hello, LogEvent,
    LunIdentity, Mode, Preflight, PreflightReport, Prepare, Prepared, Register, RegisterOk, Release, Reply,
    Request, Require, Severity, Thawed,
};
use stillpoint_agentproto::{ErrorCode, Fingerprint, LunId, Refusal, SessionId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The LUN that the loop device stands for.
pub const LUN: LunId = LunId([0x60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x2a]);

fn tool(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn must(program: &str, args: &[&str]) {
    let output = tool(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Can file systems be frozen here? A test that cannot run says so loudly.
pub fn can_freeze() -> bool {
    let root = rustix::process::geteuid().is_root();
    let loops = Path::new("/dev/loop-control").exists();
    let tools = ["mkfs.ext4", "mount", "umount", "fsfreeze"];
    let missing: Vec<_> = tools
        .iter()
        .filter(|t| Command::new(t).arg("--version").output().is_err())
        .collect();
    if root && loops && missing.is_empty() {
        return true;
    }
    eprintln!(
        "SKIPPED: freezing for real needs root ({root}), loop devices ({loops}) and tools (missing: {missing:?})"
    );
    false
}

/// A mounted ext4 in a file.
pub struct Volume {
    pub image: PathBuf,
    pub point: PathBuf,
}

impl Volume {
    pub fn new(dir: &Path, name: &str) -> Self {
        let volume = Self {
            image: dir.join(format!("{name}.img")),
            point: dir.join(name),
        };
        fs::File::create(&volume.image)
            .expect("an image")
            .set_len(48 << 20)
            .expect("its size");
        fs::create_dir(&volume.point).expect("a mount point");
        let image = volume.image.to_str().expect("UTF-8");
        must("mkfs.ext4", &["-q", image]);
        must(
            "mount",
            &["-o", "loop", image, volume.point.to_str().expect("UTF-8")],
        );
        volume
    }

    pub fn fsfreeze(&self, option: &str) -> bool {
        tool("fsfreeze", &[option, self.point.to_str().expect("UTF-8")])
            .status
            .success()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.fsfreeze("-u");
        tool("umount", &["-l", self.point.to_str().expect("UTF-8")]);
    }
}

/// Writes and fsyncs without end, and counts.
pub struct Writer {
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Writer {
    pub fn start(point: &Path) -> Self {
        let writer = Self {
            count: Arc::default(),
            stop: Arc::default(),
        };
        let (count, stop) = (Arc::clone(&writer.count), Arc::clone(&writer.stop));
        let mut file = fs::File::create(point.join("records")).expect("a file");
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                file.write_all(b"record\n")
                    .and_then(|()| file.sync_data())
                    .expect("a write");
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        writer.wait_moving(Duration::from_secs(5)).expect("it writes");
        writer
    }

    /// Does it stand still? (It writes some hundred records a second otherwise.)
    pub fn stands_still(&self) -> bool {
        let before = self.count.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(200));
        // One write may have been under way when the freeze began.
        self.count.load(Ordering::Relaxed) <= before + 1
    }

    /// Does it write?
    pub fn moves(&self) -> bool {
        self.wait_moving(Duration::from_secs(5)).is_some()
    }

    /// How long until it moves again.
    pub fn wait_moving(&self, limit: Duration) -> Option<Duration> {
        let (began, before) = (Instant::now(), self.count.load(Ordering::Relaxed));
        while began.elapsed() < limit {
            if self.count.load(Ordering::Relaxed) > before + 1 {
                return Some(began.elapsed());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The agent's files and process.
pub struct Agent {
    pub dir: tempfile::TempDir,
    pub port: u16,
    child: Option<Child>,
}

impl Agent {
    /// An agent for these volumes (path of the image, LUN); further lines of its configuration in `more`.
    pub fn new(luns: &[(&Path, LunId)], more: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let port = free_port();
        fs::create_dir(dir.path().join("hooks.d")).expect("mkdir");
        let agent = Self {
            dir,
            port,
            child: None,
        };
        agent.configure(luns, more);
        agent
    }

    pub fn configure(&self, luns: &[(&Path, LunId)], more: &str) {
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        let mut text = String::new();
        if !more.contains("state_dir") {
            text.push_str(&format!("state_dir = \"{}\"\n", at("state")));
        }
        text.push_str(&format!(
            "listen = \"127.0.0.1:{}\"\nrun_dir = \"{}\"\nhooks_dir = \"{}\"\nlog = \"debug\"\n\
             initiators = [\"iqn.2026-01.test:host\"]\n{more}\n",
            self.port,
            at("run"),
            at("hooks.d"),
        ));
        if !more.contains("min_interval_s") {
            text.insert_str(0, "min_interval_s = 1\n");
        }
        for (path, lun) in luns {
            text.push_str(&format!(
                "[[test_lun]]\npath = \"{}\"\nnaa = \"{lun}\"\n",
                path.display()
            ));
        }
        fs::write(self.dir.path().join("agent.toml"), text).expect("a configuration");
    }

    pub fn hook(&self, name: &str, script: &str, sidecar: Option<&str>) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.dir.path().join("hooks.d").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a hook");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        if let Some(text) = sidecar {
            fs::write(path.with_file_name(format!("{name}.toml")), text).expect("a sidecar");
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
        command
            .arg("--config")
            .arg(self.dir.path().join("agent.toml"))
            .env_remove("RUST_LOG");
        command
    }

    /// Runs a verb to its end.
    pub fn verb(&self, args: &[&str]) -> Output {
        self.command().args(args).output().expect("the agent's program")
    }

    pub fn run(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .expect("a log");
        let child = self
            .command()
            .arg("run")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.child = Some(child.expect("the agent's program"));
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    pub fn signal(&self, name: &str) {
        must("kill", &[&format!("-{name}"), &self.pid().to_string()]);
    }

    pub fn kill(&mut self) {
        self.signal("KILL");
        self.wait();
    }

    pub fn wait(&mut self) {
        self.child.take().expect("it runs").wait().expect("waited for");
    }

    /// The guards that this agent has now.
    pub fn guards(&self) -> Vec<u32> {
        let parent = self.pid().to_string();
        let pids = fs::read_dir("/proc").expect("proc").flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)) == Some(&parent)
                && line.contains("thaw-guard")
        })
        .collect()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn wait_for_log(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} never came:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn journals(&self) -> usize {
        let entries = fs::read_dir(self.dir.path().join("run"))
            .expect("the run directory")
            .flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("frozen-"))
            .count()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        if std::thread::panicking() {
            eprintln!("--- the agent's log:\n{}", self.log());
        }
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("its number")
        .port()
}

/// The target's key, registration port and generation.
pub struct Target {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    pub fingerprint: Fingerprint,
    listener: TcpListener,
    pub generation: u32,
}

/// A connection with the protocol on it, and nothing clever.
pub struct Wire<S> {
    pub stream: S,
    pub channel: Channel,
}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Wire<S> {
    pub async fn flush(&mut self) {
        while let Some(bytes) = self.channel.poll_transmit() {
            self.stream.write_all(&bytes).await.expect("sent");
        }
        self.stream.flush().await.expect("sent");
    }

    /// The next event; `None` when the agent closed.
    pub async fn event(&mut self) -> Option<ChannelEvent> {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            if let Some(event) = self.channel.poll_event() {
                return Some(event);
            }
            self.flush().await;
            let count = self.stream.read(&mut buffer).await.unwrap_or(0);
            if count == 0 {
                return None;
            }
            self.channel
                .receive(Instant::now(), &buffer[..count])
                .expect("frames");
        }
    }

    /// Asks and waits for the answer, at most 20 s.
    pub async fn ask(&mut self, request: Request) -> Result<Reply, Refusal> {
        let id = self
            .channel
            .request(Instant::now(), request, Capabilities::default())
            .expect("sent");
        let answer = async {
            loop {
                match self.event().await.expect("the agent closed the channel") {
                    ChannelEvent::Reply { id: of, result } if of == id => return result,
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), answer)
            .await
            .expect("an answer in time")
    }

    pub async fn preflight(&mut self, luns: &[LunId], mode: Mode) -> PreflightReport {
        match self
            .ask(Request::Preflight(Preflight {
                luns: luns.to_vec(),
                mode,
            }))
            .await
        {
            Ok(Reply::Preflight(report)) => report,
            other => panic!("{other:?}"),
        }
    }

    pub async fn prepare(
        &mut self,
        session: SessionId,
        luns: &[LunId],
        mode: Mode,
    ) -> Result<Prepared, Refusal> {
        let (luns, hold_ms, require) = (luns.to_vec(), 5000, Require::All);
        match self
            .ask(Request::Prepare(Prepare {
                session,
                luns,
                mode,
                hold_ms,
                require,
            }))
            .await
        {
            Ok(Reply::Prepare(prepared)) => Ok(prepared),
            Err(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    pub async fn freeze(&mut self, session: SessionId, hold_ms: u32) -> Result<Frozen, Refusal> {
        match self.ask(Request::Freeze(Freeze { session, hold_ms })).await {
            Ok(Reply::Freeze(frozen)) => Ok(frozen),
            Err(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    pub async fn release(&mut self, session: SessionId, outcome: CutOutcome) -> Thawed {
        match self
            .ask(Request::Release(Release {
                session,
                outcome,
                snapshot: None,
                cut_unix_ms: None,
            }))
            .await
        {
            Ok(Reply::Release(thawed)) => thawed,
            other => panic!("{other:?}"),
        }
    }

    pub async fn abort(&mut self, session: SessionId) {
        let reason = "the test says so".to_owned();
        let answer = self.ask(Request::Abort(Abort { session, reason })).await;
        assert!(matches!(answer, Ok(Reply::Abort(_))), "{answer:?}");
    }
}

/// What a registration channel brought.
pub struct Registered {
    pub register: Register,
    wire: Wire<tokio_rustls::server::TlsStream<TcpStream>>,
    luns: Vec<LunId>,
    pub logs: Vec<LogEvent>,
}

impl Registered {
    /// Tells the agent that its port was not reached.
    pub async fn say_unreachable(&mut self, text: &str) {
        self.wire.channel.log(LogEvent {
            severity: Severity::Error,
            code: ErrorCode::Unreachable,
            subject: "here".to_owned(),
            text: text.to_owned(),
        });
        self.wire.flush().await;
    }

    /// Serves heartbeats until one satisfies `wanted`.
    pub async fn heartbeat(&mut self, wanted: impl Fn(&Heartbeat) -> bool) -> Heartbeat {
        let waiting = async {
            loop {
                match self
                    .wire
                    .event()
                    .await
                    .expect("the agent closed the registration")
                {
                    ChannelEvent::Request {
                        id,
                        request: Request::Heartbeat(heartbeat),
                        ..
                    } => {
                        let luns = identities(&self.luns);
                        self.wire
                            .channel
                            .reply(id, Ok(Reply::Heartbeat(HeartbeatOk { luns })));
                        self.wire.flush().await;
                        if wanted(&heartbeat) {
                            return heartbeat;
                        }
                    }
                    ChannelEvent::Log(event) => self.logs.push(event),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), waiting)
            .await
            .expect("a heartbeat in time")
    }
}

fn identities(luns: &[LunId]) -> Vec<LunIdentity> {
    let identity = |lun: &LunId| LunIdentity {
        lun: *lun,
        serial: None,
        iqn: None,
        number: None,
        size_bytes: None,
    };
    luns.iter().map(identity).collect()
}

fn hello() -> Hello {
    let capabilities = Capabilities::default();
    Hello {
        min_version: 1,
        max_version: 1,
        agent_id: None,
        product: "test target".to_owned(),
        capabilities,
    }
}

impl Target {
    pub async fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["stillpoint".to_owned()]).expect("parameters");
        let certificate = params.self_signed(&key).expect("a certificate").der().clone();
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).expect("a certificate");
        let fingerprint = Fingerprint::of_spki(parsed.public_key().raw);
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self {
            certificate,
            key,
            fingerprint,
            listener,
            generation: 3,
        }
    }

    /// Another machine in this one's place: the same port, another key.
    pub async fn with_another_key(self) -> Self {
        let Self { certificate, key, .. } = Self::new().await;
        Self {
            certificate,
            key,
            ..self
        }
    }

    /// `TOKEN@HOST:PORT` of a token.
    pub fn invitation(&self, token: &Token) -> String {
        format!(
            "{}@{}",
            *token.reveal(),
            self.listener.local_addr().expect("an address")
        )
    }

    async fn accept(&self) -> (Wire<tokio_rustls::server::TlsStream<TcpStream>>, [u8; 32]) {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_client_cert_verifier(Arc::new(Anyone(provider)))
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .expect("our key");
        let (stream, _) = self.listener.accept().await.expect("a connection");
        let stream = tokio_rustls::TlsAcceptor::from(Arc::new(config))
            .accept(stream)
            .await
            .expect("TLS");
        let exporter = stream
            .get_ref()
            .1
            .export_keying_material([0; 32], EXPORTER_LABEL, None)
            .expect("exporter");
        let channel = Channel::accepting(Instant::now(), hello(), self.generation, MAX_BODY);
        let mut wire = Wire { stream, channel };
        let Some(ChannelEvent::HelloAsked { .. }) = wire.event().await else {
            panic!("no Hello")
        };
        wire.channel.accept();
        wire.flush().await;
        (wire, exporter)
    }

    /// Serves one enrolment; `honest` targets prove that they know the token.
    pub async fn enrol(&self, token: &Token, honest: bool) {
        let (mut wire, exporter) = self.accept().await;
        let Some(ChannelEvent::Request {
            id,
            request: Request::Enrol(enrol),
            ..
        }) = wire.event().await
        else {
            panic!("no Enrol")
        };
        assert_eq!(enrol.token_id, token.id());
        assert!(
            token.verify_agent(enrol.agent_id, &exporter, &enrol.mac),
            "bound to the token and this TLS session"
        );
        let mac = if honest {
            token.target_mac(enrol.agent_id, &exporter)
        } else {
            [0; 32]
        };
        wire.channel.reply(id, Ok(Reply::Enrol(EnrolOk { mac })));
        wire.flush().await;
        // The agent closes.
        assert!(wire.event().await.is_none());
    }

    /// Serves a registration.
    pub async fn register(&self, luns: &[LunId]) -> Registered {
        let (mut wire, _) = self.accept().await;
        let Some(ChannelEvent::Request {
            id,
            request: Request::Register(register),
            ..
        }) = wire.event().await
        else {
            panic!("no Register")
        };
        let ok = RegisterOk {
            lease_ms: 90_000,
            heartbeat_ms: 500,
            luns: identities(luns),
        };
        wire.channel.reply(id, Ok(Reply::Register(ok)));
        wire.flush().await;
        Registered {
            register,
            wire,
            luns: luns.to_vec(),
            logs: Vec::new(),
        }
    }

    /// Dials the agent's snapshot port.
    pub async fn dial(&self, port: u16) -> Result<Wire<tokio_rustls::client::TlsStream<TcpStream>>, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())
            .expect("our key");
        let stream = TcpStream::connect(("127.0.0.1", port))
            .await
            .map_err(|error| error.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from("stillpoint").expect("a name");
        let stream = connector
            .connect(name, stream)
            .await
            .map_err(|error| error.to_string())?;
        let channel = Channel::dial(Instant::now(), hello(), self.generation, MAX_BODY);
        let mut wire = Wire { stream, channel };
        match wire.event().await {
            Some(ChannelEvent::Opened { .. }) => Ok(wire),
            Some(ChannelEvent::HelloRefused(refusal)) => Err(refusal.to_string()),
            other => Err(format!("{other:?}")),
        }
    }
}

/// The whole beginning: enrols the agent, starts it and waits for its registration and the first mounts.
pub async fn meet(agent: &mut Agent, luns: &[LunId]) -> (Target, Registered) {
    let target = Target::new().await;
    let token = Token::new([5; 16], &target.fingerprint);
    let invitation = target.invitation(&token);
    let program = (agent.command(), invitation);
    let enrolling = tokio::task::spawn_blocking(move || {
        let (mut command, invitation) = program;
        command
            .arg("enrol")
            .arg(invitation)
            .output()
            .expect("the agent's program")
    });
    target.enrol(&token, true).await;
    let output = enrolling.await.expect("joined");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    agent.run();
    let mut registered = target.register(luns).await;
    registered
        .heartbeat(|heartbeat| luns.iter().all(|lun| heartbeat.mounted.contains(lun)))
        .await;
    (target, registered)
}

/// Random enough for a test: a counter in a UUID.
pub fn session() -> SessionId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    SessionId::from_random(bytes)
}

/// Takes any key: the tests look at who it is themselves.
#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.2".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    };
}

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    signatures!();
}

impl rustls::server::danger::ClientCertVerifier for Anyone {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::server::danger::ClientCertVerified, rustls::Error> {
        Ok(rustls::server::danger::ClientCertVerified::assertion())
    }
    signatures!();
}
