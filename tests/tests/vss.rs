//! A VSS hardware provider's work, as the target sees it: a TLS agent reserves, cuts, exposes and deletes shadow copies while hosts
//! are logged in, over a restart, and under a load of writes.

#![expect(
    clippy::indexing_slicing,
    reason = "a story ends where an answer is not what it should be"
)]

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConnection, StreamOwned};
use stillpoint_agentproto::enrol::{EXPORTER_LABEL, EXPORTER_LEN, Token};
use stillpoint_agentproto::message::{
    Capabilities, DeleteReason, Enrol, Heartbeat, Hello, LunIdentity, ProvBegin, ProvCommit, ProvDelete,
    ProvExpose, ProvQuery, ProvReady, Register, SessionState, ShadowAsk, Visibility,
};
use stillpoint_agentproto::provider::{CallError, Client};
use stillpoint_agentproto::registration::{AgentEnd, AgentEvent, Purpose};
use stillpoint_agentproto::tls::{Anyone, client, server_name};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, SetId, ShadowId};
use stillpoint_tests::raw::{Cdb, Nexus, Raw};
use stillpoint_tests::{Daemon, Guest, GuestSpec, Scratch, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const IQN: &str = "iqn.2026-11.test:sql01";
const HOST: &str = "iqn.1991-05.com.microsoft:backup";
const OTHER: &str = "iqn.1991-05.com.microsoft:other";
const AGENT: AgentId = AgentId([7; 16]);
/// REPORTED LUNS DATA HAS CHANGED.
const LUNS_CHANGED: (u8, u8, u8) = (6, 0x3f, 0x0e);
/// LOGICAL UNIT NOT SUPPORTED.
const NO_LUN: (u8, u8, u8) = (5, 0x25, 0);
/// Whatever a busy machine needs.
const LIMIT: Duration = Duration::from_secs(60);

const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
    [agents]\nlisten = \"127.0.0.1:$AGENTS\"\n\
    [[lun]]\nname = \"sql01\"\nsize = \"64MiB\"\n[[lun]]\nname = \"other\"\nsize = \"64MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:sql01\"\nluns = [\"sql01\"]\ninitiators = [\"*\"]\nagents = true\n\
    [[target]]\niqn = \"iqn.2026-11.test:other\"\nluns = [\"other\"]\ninitiators = [\"*\"]\nagents = true\n";

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// An agent that is a hardware provider and nothing else.
struct Agent {
    address: SocketAddr,
    certificate: rustls::pki_types::CertificateDer<'static>,
    key: Vec<u8>,
    registered: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn hello() -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        agent_id: Some(AGENT),
        product: "story".to_owned(),
        capabilities: Capabilities::VSS_PROVIDER,
    }
}

impl Agent {
    /// Enrols with a token for these LUNs, and registers.
    fn start(daemon: &Daemon, luns: &[&str]) -> Result<Self> {
        let mut arguments = vec!["agent", "token", "create"];
        luns.iter().for_each(|lun| arguments.extend(["--lun", lun]));
        let token = daemon.json(&arguments)?;
        let token = Token::parse(token["token"].as_str().context("a token")?)?;
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certificate = rcgen::CertificateParams::new(Vec::new())?.self_signed(&key)?;
        let mut agent = Self {
            address: SocketAddr::from(([127, 0, 0, 1], daemon.agent_port())),
            certificate: certificate.der().clone(),
            key: key.serialize_der(),
            registered: Arc::default(),
            over: Arc::default(),
            thread: None,
        };
        agent.enrol(&token)?;
        agent.register()?;
        Ok(agent)
    }

    fn dial(&self) -> Result<Tls> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()));
        let config = client(&self.certificate, &key, Arc::new(Anyone))?;
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        let mut tls = StreamOwned::new(ClientConnection::new(config, server_name())?, stream);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        tls.sock.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(tls)
    }

    fn enrol(&self, token: &Token) -> Result<()> {
        let mut tls = self.dial()?;
        let exporter = tls
            .conn
            .export_keying_material([0; EXPORTER_LEN], EXPORTER_LABEL, None)?;
        let enrol = Enrol {
            agent_id: AGENT,
            token_id: token.id(),
            mac: token.agent_mac(AGENT, &exporter),
            host: "winsrv".to_owned(),
        };
        let mut end = AgentEnd::new(Instant::now(), hello(), 0, Purpose::Enrol(enrol));
        loop {
            match turn(&mut end, &mut tls)? {
                AgentEvent::Enrolled(_) => return Ok(()),
                AgentEvent::Refused(refusal) => bail!("enrolment refused: {refusal}"),
                _ => {}
            }
        }
    }

    /// Registers in the background, again and again as an agent does, and waits for the first time.
    fn register(&mut self) -> Result<()> {
        let (registered, over) = (Arc::clone(&self.registered), Arc::clone(&self.over));
        let dialler = Self {
            address: self.address,
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            registered: Arc::default(),
            over: Arc::default(),
            thread: None,
        };
        self.thread = Some(std::thread::spawn(move || {
            while !over.load(Ordering::SeqCst) {
                // The daemon is down for a while in this story.
                drop(stay(&dialler, &registered, &over));
                registered.store(false, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(100));
            }
        }));
        self.wait_registered()
    }

    fn wait_registered(&self) -> Result<()> {
        wait_until("the agent's registration", LIMIT, || {
            Ok(self.registered.load(Ordering::SeqCst))
        })
    }

    /// A connection for the provider's requests.
    fn client(&self) -> Result<Client<Tls>> {
        Ok(Client::open(self.dial()?, hello(), 0, |_| Ok(()))?)
    }
}

/// One registration, until it ends.
fn stay(agent: &Agent, registered: &AtomicBool, over: &AtomicBool) -> Result<()> {
    let register = Register {
        host: "winsrv".to_owned(),
        os: "Windows Server".to_owned(),
        agent_version: "1".to_owned(),
        boot_id: "b".to_owned(),
        listen_port: 9,
        advertise_host: None,
        features: Capabilities::VSS_PROVIDER,
        initiators: vec![HOST.to_owned()],
        mounted: vec![],
    };
    let mut tls = agent.dial()?;
    let mut end = AgentEnd::new(Instant::now(), hello(), 0, Purpose::Register(register));
    while !over.load(Ordering::SeqCst) {
        match turn(&mut end, &mut tls)? {
            AgentEvent::Registered { .. } => registered.store(true, Ordering::SeqCst),
            AgentEvent::HeartbeatDue => end.heartbeat(
                Instant::now(),
                Heartbeat {
                    state: SessionState::Idle,
                    session: None,
                    frozen_ms: None,
                    clock_unix_ms: 0,
                    mounted: vec![],
                },
            ),
            AgentEvent::Refused(refusal) => bail!("{refusal}"),
            AgentEvent::LeaseLost => bail!("the lease is over"),
            _ => {}
        }
    }
    Ok(())
}

/// Moves bytes until something came in; a pause of the stream comes back as [`AgentEvent::Luns`] of nothing.
fn turn(end: &mut AgentEnd, tls: &mut Tls) -> Result<AgentEvent> {
    use std::io::{ErrorKind, Read as _, Write as _};
    if let Some(event) = end.poll_event() {
        return Ok(event);
    }
    while let Some(bytes) = end.poll_transmit() {
        tls.write_all(&bytes)?;
    }
    tls.flush()?;
    let mut buffer = [0; 4096];
    match tls.read(&mut buffer) {
        Ok(0) => bail!("the target closed the connection"),
        Ok(count) => end.receive(Instant::now(), &buffer[..count])?,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            end.handle_timeout(Instant::now())?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(end.poll_event().unwrap_or(AgentEvent::Luns(vec![])))
}

fn lun_id(daemon: &Daemon, name: &str) -> Result<LunId> {
    let shown = daemon.json(&["lun", "show", name])?;
    Ok(shown["naa"].as_str().context("naa")?.parse()?)
}

fn ask(number: u8, lun: LunId) -> ProvBegin {
    ProvBegin {
        set: SetId([number; 16]),
        shadows: vec![ShadowAsk {
            shadow: ShadowId([number; 16]),
            lun,
        }],
        initiator: HOST.to_owned(),
        writable: true,
    }
}

fn expose(number: u8, visibility: Visibility) -> ProvExpose {
    ProvExpose {
        set: SetId([number; 16]),
        shadow: ShadowId([number; 16]),
        initiator: HOST.to_owned(),
        visibility,
    }
}

fn delete(number: u8) -> ProvDelete {
    ProvDelete {
        set: SetId([number; 16]),
        shadow: None,
        why: DeleteReason::Delete,
    }
}

fn commit(number: u8, ready: &ProvReady) -> ProvCommit {
    ProvCommit {
        set: SetId([number; 16]),
        token: ready.token,
    }
}

fn login(daemon: &Daemon, initiator: &str) -> Result<Raw> {
    let address = SocketAddr::from(([127, 0, 0, 1], daemon.port()));
    let mut raw = Raw::login(address, &Nexus::new(initiator, IQN))?.session()?;
    raw.ready(0)?;
    Ok(raw)
}

/// The numbers of REPORT LUNS.
fn luns(raw: &mut Raw) -> Result<Vec<u8>> {
    let reply = raw.run(&Cdb::reads(0, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0], 4096))?;
    ensure!(reply.status == 0, "REPORT LUNS: {reply:?}");
    let list = reply.data.get(8..).unwrap_or_default();
    Ok(list.chunks_exact(8).map(|entry| entry[1]).collect())
}

/// TEST UNIT READY of LUN 0: the unit attention that waits, if one does.
fn attention(raw: &mut Raw) -> Result<Option<(u8, u8, u8)>> {
    let reply = raw.run(&Cdb::none(0, &[0; 6]))?;
    Ok((reply.status != 0).then(|| reply.sense_code()))
}

/// A vital product data page of a LUN, without its header.
fn page(raw: &mut Raw, lun: u8, page: u8) -> Result<Vec<u8>> {
    let reply = raw.run(&Cdb::reads(lun, &[0x12, 1, page, 0, 255, 0], 255))?;
    ensure!(reply.status == 0, "INQUIRY: {reply:?}");
    Ok(reply.data.get(4..).unwrap_or_default().to_vec())
}

fn block(byte: u8) -> [u8; 512] {
    [byte; 512]
}

#[test]
fn shadow_copies_come_and_go() {
    story("vss", |scratch: &Scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let agent = Agent::start(&daemon, &["sql01"])?;
        let lun = lun_id(&daemon, "sql01")?;
        let mut host = login(&daemon, HOST)?;
        let mut other = login(&daemon, OTHER)?;
        let mut vss = agent.client()?;
        refusals(&daemon, &mut vss, lun)?;

        host.write(0, 0, &block(1))?;
        let ready = vss.call(ask(1, lun))?;
        let reserved = ready.shadows[0].identity.clone();
        host.write(0, 0, &block(2))?;
        taken(&agent, 1, &ready)?;
        host.write(0, 0, &block(3))?;
        ensure!(
            luns(&mut host)? == [0] && attention(&mut host)?.is_none(),
            "not to be seen before it is exposed"
        );

        let shown = vss.call(expose(1, Visibility::Exposed))?.identity;
        ensure!(
            (shown.lun, &shown.serial) == (reserved.lun, &reserved.serial),
            "{shown:?} {reserved:?}"
        );
        ensure!(
            shown.number == Some(1) && shown.iqn.as_deref() == Some(IQN),
            "{shown:?}"
        );
        ensure!(attention(&mut host)? == Some(LUNS_CHANGED), "the host is told");
        ensure!(attention(&mut other)?.is_none(), "the other is not");
        seen(&mut host, &reserved)?;
        unseen(&mut other)?;
        listed(&daemon)?;

        // Over a kill: the same LUN, the same number, what was written to it, and to nobody else.
        daemon.kill()?;
        daemon.resume()?;
        let mut host = login(&daemon, HOST)?;
        let mut other = login(&daemon, OTHER)?;
        ensure!(luns(&mut host)? == [0, 1], "shown again after a restart");
        ensure!(identity(&mut host)? == (reserved.lun, reserved.serial.clone().unwrap_or_default()));
        host.ready(1)?;
        ensure!(host.read(1, 0, 1)? == block(9));
        unseen(&mut other)?;
        agent.wait_registered()?;
        let mut vss = wait_for_client(&agent)?;
        let again = vss.call(expose(1, Visibility::Exposed))?.identity;
        ensure!(again == shown, "{again:?}");

        ensure!(attention(&mut host)?.is_none());
        ensure!(vss.call(delete(1))?.removed == 1 && vss.call(delete(1))?.removed == 0);
        ensure!(attention(&mut host)? == Some(LUNS_CHANGED));
        ensure!(luns(&mut host)? == [0]);
        let gone = host.run(&Cdb::read10(1, 0, 1))?;
        ensure!(gone.sense_code() == NO_LUN, "{gone:?}");
        ensure!(host.read(0, 0, 1)? == block(3), "its source is what it was");
        clean(&daemon)
    });
}

/// After a restart the registration comes back by itself; until it has, the provider is refused.
fn wait_for_client(agent: &Agent) -> Result<Client<Tls>> {
    let mut client = None;
    wait_until("the provider's connection", LIMIT, || {
        let Ok(mut fresh) = agent.client() else {
            return Ok(false);
        };
        let served = fresh.call(expose(1, Visibility::Exposed)).is_ok();
        client = Some(fresh);
        Ok(served)
    })?;
    client.context("a connection")
}

fn refusals(daemon: &Daemon, vss: &mut Client<Tls>, lun: LunId) -> Result<()> {
    let mut refused = |ask: ProvBegin| match vss.call(ask) {
        Err(CallError::Refused(refusal)) => Ok(refusal.code),
        other => bail!("it should have been refused: {other:?}"),
    };
    let foreign = lun_id(daemon, "other")?;
    ensure!(
        refused(ask(1, foreign))? == ErrorCode::NotAllowed,
        "another's LUN"
    );
    let stranger = ProvBegin {
        initiator: OTHER.to_owned(),
        ..ask(1, lun)
    };
    ensure!(refused(stranger)? == ErrorCode::NotAllowed, "another's initiator");
    let identity = |lun| LunIdentity {
        lun,
        serial: None,
        iqn: None,
        number: None,
        size_bytes: None,
    };
    let support = vss.call(ProvQuery {
        luns: vec![identity(lun), identity(foreign)],
    })?;
    let answers: Vec<bool> = support.luns.iter().map(|lun| lun.supported).collect();
    ensure!(answers == [true, false], "{support:?}");
    Ok(())
}

fn identity(host: &mut Raw) -> Result<(LunId, String)> {
    host.ready(1)?;
    let designators = page(host, 1, 0x83)?;
    // The first designator of type 3 with association 0.
    let mut rest = designators.as_slice();
    let naa = loop {
        let (Some(kind), Some(len)) = (rest.get(1), rest.get(3)) else {
            bail!("no NAA designator in {designators:x?}");
        };
        let end = 4 + usize::from(*len);
        if kind & 0x3f == 3 {
            break rest.get(4..end).context("a whole designator")?;
        }
        rest = rest.get(end..).context("another designator")?;
    };
    let serial = String::from_utf8(page(host, 1, 0x80)?)?;
    Ok((LunId(naa.try_into()?), serial.trim().to_owned()))
}

/// The copy as its host has it.
fn seen(host: &mut Raw, reserved: &LunIdentity) -> Result<()> {
    ensure!(luns(host)? == [0, 1]);
    let (naa, serial) = identity(host)?;
    ensure!(
        naa == reserved.lun,
        "page 83h is what was reserved: {naa} {reserved:?}"
    );
    ensure!(
        Some(&serial) == reserved.serial.as_ref(),
        "page 80h too: {serial} {reserved:?}"
    );
    ensure!(host.read(1, 0, 1)? == block(2), "as it was at the commit");
    host.write(1, 0, &block(9))?;
    let flush = host.run(&Cdb::none(1, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]))?;
    ensure!(flush.status == 0, "{flush:?}");
    ensure!(
        host.read(1, 0, 1)? == block(9) && host.read(0, 0, 1)? == block(3),
        "writable, and apart from its source"
    );
    Ok(())
}

fn unseen(other: &mut Raw) -> Result<()> {
    ensure!(luns(other)? == [0]);
    let refused = other.run(&Cdb::read10(1, 0, 1))?;
    ensure!(refused.sense_code() == NO_LUN, "{refused:?}");
    Ok(())
}

/// What an operator sees.
fn listed(daemon: &Daemon) -> Result<()> {
    let list = daemon.json(&["lun", "list"])?;
    let rows = list.as_array().context("a list")?;
    let row = rows
        .iter()
        .find(|row| row["kind"] == "vss")
        .context("the shadow copy")?;
    ensure!(row["owner"] == "winsrv" && row["initiator"] == HOST, "{row}");
    ensure!(
        row["source"]
            .as_str()
            .is_some_and(|source| source.starts_with("sql01@vss-")),
        "{row}"
    );
    ensure!(
        row["name"].as_str().is_some_and(|name| name.starts_with("vss-")),
        "{row}"
    );
    ensure!(
        row["age_seconds"].is_u64() && row["targets"][0]["iqn"] == IQN,
        "{row}"
    );
    let source = row["source"].as_str().unwrap_or_default();
    daemon.refused(3, &["snapshot", "delete", source, "--yes"])?;
    let preflight = daemon.json(&["lun", "show", "sql01"])?;
    ensure!(preflight["targets"][0]["lun"] == 0, "{preflight}");
    Ok(())
}

fn clean(daemon: &Daemon) -> Result<()> {
    let list = daemon.json(&["lun", "list"])?;
    ensure!(list.as_array().is_some_and(|rows| rows.len() == 2), "{list}");
    let snapshots = daemon.json(&["snapshot", "list"])?;
    ensure!(snapshots.as_array().is_some_and(Vec::is_empty), "{snapshots}");
    Ok(())
}

/// Blocks that the writer goes round.
const BLOCKS: u64 = 256;
const DEPTH: usize = 32;

/// What the writer has done, in numbers of writes: all up to `acked` were answered, none beyond `begun` was sent.
#[derive(Default)]
struct Progress {
    acked: AtomicU64,
    begun: AtomicU64,
}

/// Writes its own number to block `number % BLOCKS`, 32 at a time, each block once at a time.
fn write_on(raw: &mut Raw, progress: &Progress, over: &AtomicBool) -> Result<()> {
    let mut flying = VecDeque::new();
    let mut number = 0;
    while !over.load(Ordering::SeqCst) {
        while flying.len() < DEPTH {
            number += 1;
            progress.begun.store(number, Ordering::SeqCst);
            let mut data = [0; 512];
            data[..8].copy_from_slice(&number.to_be_bytes());
            let lba = u32::try_from(number % BLOCKS)?;
            flying.push_back(raw.start(&Cdb::write10(0, lba, 1), &data)?);
        }
        let oldest = flying.pop_front().context("a write")?;
        let reply = raw.finish(oldest)?;
        ensure!(reply.status == 0, "{reply:?}");
        progress
            .acked
            .store(number - flying.len() as u64, Ordering::SeqCst);
    }
    Ok(())
}

/// Commits while 32 writes are always under way: within a second, and each cut holds what was acknowledged before, nothing that
/// was begun after, and of every block exactly one of its writes.
#[test]
fn a_commit_under_load_is_quick_and_one_instant() {
    story("vss-load", |scratch: &Scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let agent = Agent::start(&daemon, &["sql01"])?;
        let lun = lun_id(&daemon, "sql01")?;
        let (progress, over) = (Arc::new(Progress::default()), Arc::new(AtomicBool::new(false)));
        let mut writer = login(&daemon, OTHER)?;
        let load = std::thread::spawn({
            let (progress, over) = (Arc::clone(&progress), Arc::clone(&over));
            move || write_on(&mut writer, &progress, &over)
        });
        let result = commits(&daemon, &agent, lun, &progress);
        over.store(true, Ordering::SeqCst);
        load.join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        let took = result?;
        println!("commits under 32 writes: {took:?}");
        let quick = took.iter().filter(|took| **took < Duration::from_secs(1)).count();
        ensure!(quick > 0, "no commit within a second: {took:?}");
        clean(&daemon)
    });
}

fn commits(daemon: &Daemon, agent: &Agent, lun: LunId, progress: &Progress) -> Result<Vec<Duration>> {
    wait_until("a load", LIMIT, || {
        Ok(progress.acked.load(Ordering::SeqCst) > 1000)
    })?;
    let mut host = login(daemon, HOST)?;
    let mut took = Vec::new();
    for number in 1..=8 {
        // Each on its own connection: one that waited too long is left behind, as a provider does.
        let mut vss = agent.client()?;
        let ready = vss.call(ask(number, lun))?;
        let before = progress.acked.load(Ordering::SeqCst);
        let began = Instant::now();
        let committed = vss.call(commit(number, &ready));
        took.push(began.elapsed());
        let after = progress.begun.load(Ordering::SeqCst);
        if matches!(&committed, Err(CallError::Refused(refusal)) if refusal.code == ErrorCode::Deadline) {
            // The machine is busy: what was cut too late goes.
            agent.client()?.call(delete(number))?;
            continue;
        }
        committed?;
        vss.call(expose(number, Visibility::Exposed))?;
        host.ready(0)?;
        host.ready(1)?;
        let data = host.read(1, 0, u16::try_from(BLOCKS)?)?;
        one_instant(&data, before, after)?;
        ensure!(vss.call(delete(number))?.removed == 1);
        host.ready(0)?;
    }
    Ok(took)
}

fn one_instant(data: &[u8], before: u64, after: u64) -> Result<()> {
    for (at, block) in data.chunks_exact(512).enumerate() {
        let (head, tail) = block.split_at(8);
        ensure!(tail.iter().all(|byte| *byte == 0), "block {at} is torn");
        let found = u64::from_be_bytes(head.try_into()?);
        let at = at as u64;
        // The last write of this block that was acknowledged before the commit was sent.
        let acked = before - (before + BLOCKS - at) % BLOCKS;
        ensure!(found % BLOCKS == at, "block {at} holds write {found}");
        ensure!(
            found >= acked,
            "block {at} holds write {found}: {acked} was acknowledged before the commit"
        );
        ensure!(
            found <= after,
            "block {at} holds write {found}: only {after} had been begun when the commit was answered"
        );
    }
    Ok(())
}

/// The kernel's initiator as the backup host: it sees the LUN after a rescan, reads what was frozen, writes to it, and it vanishes.
#[test]
fn a_linux_guest_backs_up_from_a_shadow_copy() {
    story("vss-guest", |scratch: &Scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let agent = Agent::start(&daemon, &["sql01"])?;
        let lun = lun_id(&daemon, "sql01")?;
        let spec = GuestSpec {
            name: "backup",
            initiator: HOST,
            payload: Vec::new(),
            forward: Vec::new(),
        };
        let mut guest = Guest::boot(scratch, spec)?;
        guest.run(&format!(
            "iscsiadm -m discovery -t sendtargets -p {} >/dev/null; iscsiadm -m node -T {IQN} --login >/dev/null",
            daemon.portal()
        ))?;
        let disk = guest_disk(&mut guest, 0)?;
        guest.run(&format!(
            "mkfs.ext4 -q {disk}; mkdir -p /data /copy; mount {disk} /data; echo before > /data/file; sync"
        ))?;
        let mut vss = agent.client()?;
        let ready = vss.call(ask(1, lun))?;
        taken(&agent, 1, &ready)?;
        guest.run("echo after > /data/file; sync")?;
        let mut vss = agent.client()?;
        let shown = vss.call(expose(1, Visibility::Exposed))?.identity;
        let rescan = "iscsiadm -m session --rescan >/dev/null";
        guest.run(rescan)?;
        let number = shown.number.context("a number")?;
        let copy = guest_disk(&mut guest, number)?;
        let wwid = guest.run(&format!(
            "cat /sys/block/{}/device/wwid",
            copy.trim_start_matches("/dev/")
        ))?;
        ensure!(wwid.trim() == shown.lun.to_string(), "{wwid} {shown:?}");
        let frozen = guest.run(&format!(
            "mount {copy} /copy; cat /copy/file; echo mine > /copy/file; sync; cat /copy/file /data/file; umount /copy; e2fsck -fn {copy} >/dev/null 2>&1 && echo clean"
        ))?;
        let words: Vec<&str> = frozen.split_whitespace().collect();
        ensure!(words == ["before", "mine", "after", "clean"], "{frozen}");
        ensure!(agent.client()?.call(delete(1))?.removed == 1);
        let left = guest.run(&format!(
            "{rescan}; sg_turs {copy} >/dev/null 2>&1 && echo ready || echo gone
             sg_luns {disk} | grep -c '^ *[0-9a-f]\\{{16\\}}' || true
             cat /data/file"
        ))?;
        let words: Vec<&str> = left.split_whitespace().collect();
        ensure!(words == ["gone", "1", "after"], "{left}");
        clean(&daemon)
    });
}

/// A commit on a busy machine: one that was answered too late is asked again, and is the same.
fn taken(agent: &Agent, number: u8, ready: &ProvReady) -> Result<()> {
    wait_until("the commit", LIMIT, || {
        match agent.client()?.call(commit(number, ready)) {
            Ok(_) => Ok(true),
            Err(CallError::Refused(refusal)) if refusal.code == ErrorCode::Deadline => Ok(false),
            Err(error) => Err(error.into()),
        }
    })
}

/// The disk that a LUN is in the guest.
fn guest_disk(guest: &mut Guest, number: u16) -> Result<String> {
    let found = guest.wait_for(
        "the disk",
        LIMIT,
        &format!(
            "for b in /sys/class/iscsi_session/session*/device/target*/*:{number}/block/*; do
                 [ -b /dev/${{b##*/}} ] && echo /dev/${{b##*/}} && exit 0
             done
             exit 1"
        ),
    )?;
    Ok(found.trim().to_owned())
}
