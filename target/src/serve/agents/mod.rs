//! The daemon's end of the snapshot agents: who they are, whether they are there, and snapshots that they take part in.
//!
//! A `crash` snapshot never gets near this module. The protocol's decisions are made in `stillpoint_agentproto`; here are the
//! sockets, the clock, the keys and the records.
//!
//! ```text
//! listen (agent ─▶ target): enrol, register, heartbeat ──▶ records, live
//! snapshot: Coordinator ◀──▶ link (target ─▶ agent, one task each)   ◀──▶ Cutter (the store, on a blocking thread)
//! ```

mod link;
mod listen;
mod pipe;
mod records;
mod snapshot;
#[cfg(test)]
mod tests;
mod tls;
mod view;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use stillpoint_agentproto::enrol::{Token, TokenBook};
use stillpoint_agentproto::message::{
    Heartbeat, ListVolumes, LunIdentity, Preflight, Reply, Request, SessionState, Status,
};
use stillpoint_agentproto::registration::LEASE;
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal as WireRefusal};
use stillpoint_config::Config;
use stillpoint_snapshot::Pool;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use snapshot::{Cutter, SnapshotAsk, refusal};
pub(crate) use stillpoint_agentproto::message::{Level, Mode};
pub(crate) use stillpoint_agentproto::server::{OnFailure, Verdict};
pub(crate) use view::{AgentState, AgentView, LastFreeze, TestView, TokenView};

use super::Daemon;
use super::control::api::Refusal;
use super::events::{Code, DAEMON, code};
use records::{MAX_LUNS, Record, Records};

/// What this module has to know of a LUN.
#[derive(Clone, Debug)]
pub(crate) struct LunFacts {
    pub(crate) name: String,
    pub(crate) identity: LunIdentity,
    /// Every target that serves it, and what it is like.
    pub(crate) targets: Vec<TargetFacts>,
}

/// What this module has to know of a target.
#[derive(Clone, Debug)]
pub(crate) struct TargetFacts {
    pub(crate) iqn: String,
    pub(crate) agents: bool,
    pub(crate) chap: bool,
    pub(crate) luns: usize,
    pub(crate) portal_groups: usize,
}

/// The rest of the daemon, as seen from here.
pub(crate) trait Site: Send + Sync + 'static {
    /// The LUN of that name, if it is served.
    fn lun(&self, name: &str) -> Option<LunFacts>;
    /// The LUN of that identity, if it is served.
    fn lun_by_id(&self, lun: LunId) -> Option<LunFacts>;
    /// The initiator of each session on a LUN.
    fn initiators(&self, lun: &str) -> Vec<String>;
    /// Something happened.
    fn event(&self, code: Code, subject: String, text: String, who: &str);
}

impl Site for Daemon {
    fn lun(&self, name: &str) -> Option<LunFacts> {
        let lun = self.registry.lun(name)?;
        let targets = self.registry.targets_of(name);
        let first = targets.first();
        let identity = LunIdentity {
            lun: LunId(lun.identity().naa),
            serial: Some(lun.identity().serial.clone()),
            iqn: first.map(|target| target.iqn().to_owned()),
            number: first.and_then(|target| target.rules().number_of(&lun)),
            size_bytes: Some(lun.backend().size_bytes()),
        };
        let targets = targets.iter().map(|target| {
            let rules = target.rules();
            TargetFacts {
                iqn: target.iqn().to_owned(),
                agents: rules.agents,
                chap: rules.chap.is_some(),
                luns: rules.luns.len(),
                portal_groups: rules.portal_groups.len(),
            }
        });
        Some(LunFacts {
            name: name.to_owned(),
            identity,
            targets: targets.collect(),
        })
    }

    fn lun_by_id(&self, lun: LunId) -> Option<LunFacts> {
        let luns = self.registry.luns();
        let found = luns.iter().find(|served| served.identity().naa == lun.0)?;
        self.lun(found.name())
    }

    fn initiators(&self, lun: &str) -> Vec<String> {
        self.registry
            .sessions_of_lun(lun)
            .into_iter()
            .map(|session| session.initiator)
            .collect()
    }

    fn event(&self, code: Code, subject: String, text: String, who: &str) {
        self.events.emit(code, subject, text, who);
    }
}

/// The limits of the application note (agent-protocol.md §8), checked at `agent allow` and before every snapshot. A target with
/// `agents = true` cannot break them; a LUN that is served by another one can.
fn limits(lun: &LunFacts) -> Result<(), WireRefusal> {
    let refuse = |code, text: String| Err(WireRefusal::new(code, text).about(lun.name.clone()));
    let name = &lun.name;
    let [target] = lun.targets.as_slice() else {
        let text = match lun.targets.len() {
            0 => format!("LUN {name} is served by no target: give it one with `agents = true`"),
            _ => format!(
                "LUN {name} is served by several targets: a LUN with agents has one path, remove the others"
            ),
        };
        return refuse(ErrorCode::LimitMpio, text);
    };
    let iqn = &target.iqn;
    if !target.agents {
        let text = format!(
            "target {iqn} of LUN {name} is not used with agents: write `agents = true` there, then `config apply`"
        );
        return refuse(ErrorCode::NotAllowed, text);
    }
    if target.chap {
        return refuse(
            ErrorCode::LimitChap,
            format!("target {iqn} uses CHAP, which cannot be used with agents: remove one of them"),
        );
    }
    if target.luns > 1 {
        let text = format!(
            "target {iqn} carries {} LUNs: a LUN with agents has a target of its own",
            target.luns
        );
        return refuse(ErrorCode::LimitMultiLun, text);
    }
    if target.portal_groups > 1 {
        let text =
            format!("target {iqn} is reached through several portal groups: a LUN with agents has one path");
        return refuse(ErrorCode::LimitMpio, text);
    }
    Ok(())
}

/// An agent that is registered now.
#[derive(Debug)]
struct Live {
    /// Which connection this is.
    number: u64,
    heard: Instant,
    /// What the last dial-back came to.
    reachable: Option<Result<(), String>>,
    initiators: Vec<String>,
    state: SessionState,
    frozen_ms: Option<u32>,
    kick: CancellationToken,
}

impl Live {
    fn new(number: u64, kick: CancellationToken, initiators: Vec<String>) -> Self {
        Self {
            number,
            heard: Instant::now(),
            reachable: None,
            initiators,
            state: SessionState::Idle,
            frozen_ms: None,
            kick,
        }
    }
}

#[derive(Debug)]
struct Shared {
    identity: tls::Identity,
    pool: Pool,
    records: Records,
    tokens: Mutex<TokenBook>,
    live: Mutex<BTreeMap<AgentId, Live>>,
    last_freeze: Mutex<BTreeMap<AgentId, LastFreeze>>,
    /// Snapshots of one LUN wait for each other.
    locks: Mutex<BTreeMap<LunId, Arc<tokio::sync::Mutex<()>>>>,
    gate: Arc<listen::Gate>,
    generation: AtomicU32,
    /// The highest that an agent has seen of this target.
    seen_generation: AtomicU32,
    connections: AtomicU64,
    listen: Option<SocketAddr>,
    bound: OnceLock<SocketAddr>,
    site: OnceLock<Weak<dyn Site>>,
    tasks: OnceLock<(TaskTracker, CancellationToken)>,
}

impl Shared {
    fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    fn next_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed)
    }

    fn tokens(&self) -> MutexGuard<'_, TokenBook> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<AgentId, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn site(&self) -> Option<Arc<dyn Site>> {
        self.site.get().and_then(Weak::upgrade)
    }

    fn event(&self, code: Code, subject: String, text: String) {
        self.event_by(code, subject, text, DAEMON);
    }

    fn event_by(&self, code: Code, subject: String, text: String, who: &str) {
        if let Some(site) = self.site() {
            site.event(code, subject, text, who);
        }
    }

    /// A task that the daemon waits for when it stops.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        match self.tasks.get() {
            Some((tracker, _)) => drop(tracker.spawn(task)),
            None => drop(tokio::spawn(task)),
        }
    }

    /// Store work of the registration channel, on a thread that may wait.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T, WireRefusal> {
        let shared = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&shared)).await;
        let done = done.map_err(anyhow::Error::from).and_then(|result| result);
        done.map_err(|error| WireRefusal::new(ErrorCode::Internal, format!("{error:#}")))
    }

    /// The agent's Hello says what it has seen of this target: more than we are at means that our data came from a backup.
    fn saw_generation(&self, seen: u32, product: &str) {
        self.seen_generation.fetch_max(seen, Ordering::SeqCst);
        if seen > self.generation() {
            let text = format!(
                "an agent ({}) has seen generation {seen} of this target, which is at {}: was the data directory restored from a \
                 backup? Then run `stillpoint agent generation bump`; if another daemon runs on a copy of this data, stop one",
                Record::clip(product),
                self.generation()
            );
            self.event(code::AGENT_TROUBLE, "agents".to_owned(), text);
        }
    }

    /// Takes a heartbeat. True when the agent's port was not reached the last time: try again.
    fn heard(&self, id: AgentId, number: u64, heartbeat: &Heartbeat) -> bool {
        let mut live = self.live();
        let Some(live) = live.get_mut(&id).filter(|live| live.number == number) else {
            return false;
        };
        live.heard = Instant::now();
        live.state = heartbeat.state;
        live.frozen_ms = heartbeat.frozen_ms;
        matches!(live.reachable, Some(Err(_)))
    }

    /// Notes what a dial-back came to; true when that is news.
    fn dialled_back(&self, id: AgentId, number: u64, outcome: Result<(), String>) -> bool {
        let mut live = self.live();
        let Some(live) = live.get_mut(&id).filter(|live| live.number == number) else {
            return false;
        };
        let news = live.reachable.as_ref().map(Result::is_ok) != Some(outcome.is_ok());
        live.reachable = Some(outcome);
        news
    }

    /// The LUNs that an agent is allowed on and that are served.
    fn grants(&self, record: &Record) -> Vec<LunIdentity> {
        let Some(site) = self.site() else {
            return Vec::new();
        };
        record
            .luns
            .iter()
            .filter_map(|lun| site.lun_by_id(*lun))
            .map(|lun| lun.identity)
            .collect()
    }

    fn lun_name(&self, lun: LunId) -> String {
        self.site()
            .and_then(|site| site.lun_by_id(lun))
            .map_or_else(|| lun.to_string(), |lun| lun.name)
    }

    fn view(&self, record: &Record) -> AgentView {
        let names = |luns: &[LunId]| luns.iter().map(|lun| self.lun_name(*lun)).collect::<Vec<_>>();
        let (luns, mounted) = (names(&record.luns), names(&record.mounted));
        let last_freeze = self
            .last_freeze
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&record.id)
            .cloned();
        let live = self.live();
        let live = live.get(&record.id).filter(|live| live.heard.elapsed() < LEASE);
        let (state, trouble) = match live.map(|live| &live.reachable) {
            None => (AgentState::Disconnected, None),
            Some(None) => (AgentState::Checking, None),
            Some(Some(Ok(()))) => (AgentState::Connected, None),
            Some(Some(Err(why))) => (AgentState::Unreachable, Some(why.clone())),
        };
        let busy = live.filter(|live| live.state != SessionState::Idle);
        AgentView {
            id: record.id.to_string(),
            host: record.host.clone(),
            os: record.os.clone(),
            version: record.version.clone(),
            state,
            trouble,
            address: record
                .address
                .map(|ip| SocketAddr::new(ip, record.listen_port).to_string()),
            fingerprint: record.fingerprint.to_string(),
            luns,
            mounted,
            features: record.features.names().into_iter().map(str::to_owned).collect(),
            initiators: live.map(|live| live.initiators.clone()).unwrap_or_default(),
            session_state: busy.map(|live| live.state.to_string()),
            frozen_ms: live.and_then(|live| live.frozen_ms),
            last_freeze,
            enrolled_at: record.enrolled_at.clone(),
            registered_at: record.registered_at.clone(),
            last_heartbeat_seconds: live.map(|live| live.heard.elapsed().as_secs()),
        }
    }
}

/// The agents of this daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Agents(Arc<Shared>);

impl Agents {
    /// Reads key and records, and begins a new generation. Blocks.
    pub(crate) fn open(config: &Config, data_dir: &Path, pool: &Pool) -> anyhow::Result<Self> {
        Self::open_at(config.agents.as_ref().map(|agents| agents.listen), data_dir, pool)
    }

    fn open_at(listen: Option<SocketAddr>, data_dir: &Path, pool: &Pool) -> anyhow::Result<Self> {
        let identity =
            tls::Identity::open(&data_dir.join("agents")).context("the key for the snapshot agents")?;
        let generation = records::raise_generation(pool, 0)?;
        Ok(Self(Arc::new(Shared {
            identity,
            pool: pool.clone(),
            records: Records::open(pool)?,
            tokens: Mutex::default(),
            live: Mutex::default(),
            last_freeze: Mutex::default(),
            locks: Mutex::default(),
            gate: Arc::default(),
            generation: AtomicU32::new(generation),
            seen_generation: AtomicU32::new(0),
            connections: AtomicU64::new(1),
            listen,
            bound: OnceLock::new(),
            site: OnceLock::new(),
            tasks: OnceLock::new(),
        })))
    }

    /// Binds the registration listener and serves it until the shutdown.
    async fn start(
        &self,
        site: Weak<dyn Site>,
        tracker: TaskTracker,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let once =
            self.0.site.set(site).is_ok() && self.0.tasks.set((tracker.clone(), shutdown.clone())).is_ok();
        anyhow::ensure!(once, "the agents are served already");
        let Some(listen) = self.0.listen else {
            return Ok(());
        };
        let listener = tokio::net::TcpListener::bind(listen).await.with_context(|| {
            format!("[agents] listen = \"{listen}\" cannot be opened: is another stillpoint running? Choose another address or port")
        })?;
        let bound = listener
            .local_addr()
            .context("the agents' listener has no address")?;
        let config = tls::server(&self.0.identity)?;
        if self.0.bound.set(bound).is_ok() {
            tracker.spawn(listen::serve(Arc::clone(&self.0), listener, config, shutdown));
        }
        Ok(())
    }

    /// Where agents register.
    pub(crate) fn listening(&self) -> Option<SocketAddr> {
        self.0.bound.get().copied()
    }

    fn site(&self) -> Result<Arc<dyn Site>, Refusal> {
        let stops = || {
            Refusal::failed(
                "stopping",
                "the daemon is starting or stopping",
                "try again in a moment",
            )
        };
        self.0.site().ok_or_else(stops)
    }

    /// The facts of a LUN that may be used with agents.
    fn usable(&self, name: &str) -> Result<LunFacts, Refusal> {
        let unknown = || {
            Refusal::failed(
                "not_found",
                format!("there is no LUN {name}"),
                "`stillpoint lun list` shows them",
            )
        };
        let lun = self.site()?.lun(name).ok_or_else(unknown)?;
        limits(&lun).map_err(|refusal| snapshot::wire_refusal(&refusal))?;
        Ok(lun)
    }

    /// `agent token create`.
    ///
    /// # Errors
    /// No listener, an unknown LUN, a LUN that cannot be used with agents, too many tokens.
    pub(crate) fn token_create(
        &self,
        luns: &[String],
        ttl: Duration,
        who: &str,
    ) -> Result<TokenView, Refusal> {
        let Some(listening) = self.listening() else {
            let message = "this daemon takes no agents: the configuration has no [agents] section";
            return Err(Refusal::refused(
                "no_agents",
                message,
                "add [agents] with listen = \"0.0.0.0:11169\" and restart",
            ));
        };
        if luns.len() > MAX_LUNS {
            let message = format!("{} LUNs for one agent: {MAX_LUNS} are possible", luns.len());
            return Err(Refusal::refused("limit", message, "name fewer LUNs"));
        }
        let mut ids: Vec<LunId> = Vec::new();
        for lun in luns {
            ids.push(self.usable(lun)?.identity.lun);
        }
        ids.sort_unstable();
        ids.dedup();
        let mut secret = zeroize::Zeroizing::new([0; 16]);
        getrandom::fill(&mut *secret).map_err(|error| {
            Refusal::failed(
                "random",
                format!("no random numbers: {error}"),
                "look at the system's log",
            )
        })?;
        let token = Token::new(*secret, &self.0.identity.fingerprint);
        let text = token.reveal();
        let expires = jiff::Timestamp::now() + ttl;
        let added = self.0.tokens().add(Instant::now(), token, ids, ttl);
        added.map_err(|refusal| Refusal::refused("limit", refusal.text, ""))?;
        let said = format!(
            "enrolment token made, good for {} s, LUNs: {}",
            ttl.as_secs(),
            luns.join(", ")
        );
        self.0
            .event_by(code::AGENT_CHANGED, "agents".to_owned(), said, who);
        let host = if listening.ip().is_unspecified() {
            "THIS-HOST".to_owned()
        } else {
            listening.ip().to_string()
        };
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host
        };
        let enrol = format!("stillpoint-agent enrol {}@{host}:{}", *text, listening.port());
        Ok(TokenView {
            token: text.to_string(),
            expires_at: expires.to_string(),
            luns: luns.to_vec(),
            enrol,
        })
    }

    /// `agent list`.
    pub(crate) fn list(&self) -> Vec<AgentView> {
        self.0
            .records
            .all()
            .iter()
            .map(|record| self.0.view(record))
            .collect()
    }

    /// `agent show`.
    ///
    /// # Errors
    /// No such agent.
    pub(crate) fn show(&self, id: &str) -> Result<AgentView, Refusal> {
        self.find(id).map(|record| self.0.view(&record))
    }

    /// An agent by its id, a unique beginning of it, or its host.
    fn find(&self, text: &str) -> Result<Record, Refusal> {
        let all = self.0.records.all();
        if let Some(exact) = all.iter().find(|record| record.id.to_string() == text) {
            return Ok(exact.clone());
        }
        let wanted = text.to_lowercase();
        let named = |record: &&Record| {
            record.host.to_lowercase() == wanted
                || (wanted.len() >= 4 && record.id.to_string().starts_with(&wanted))
        };
        let found: Vec<&Record> = all.iter().filter(named).collect();
        match found.as_slice() {
            [one] => Ok((*one).clone()),
            [] => Err(Refusal::failed(
                "not_found",
                format!("there is no agent {text}"),
                "`stillpoint agent list` shows them",
            )),
            _ => Err(Refusal::failed(
                "ambiguous",
                format!("{text} names {} agents", found.len()),
                "use the agent's id",
            )),
        }
    }

    /// `agent test`: dials the agent as a snapshot would, and asks what a preflight asks.
    ///
    /// # Errors
    /// It cannot be reached, or refuses.
    pub(crate) async fn test(&self, id: &str) -> Result<TestView, Refusal> {
        let record = self.find(id)?;
        let shared = Arc::clone(&self.0);
        let result = test(&shared, &record).await;
        let reached = result
            .as_ref()
            .map(|_| ())
            .map_err(|refusal| refusal.text.clone());
        let number = shared.live().get(&record.id).map(|live| live.number);
        if let Some(number) = number {
            shared.dialled_back(record.id, number, reached);
        }
        result.map_err(|refusal| snapshot::wire_refusal(&refusal))
    }

    /// `agent allow`.
    ///
    /// # Errors
    /// No such agent or LUN; a LUN that cannot be used with agents; too many LUNs.
    pub(crate) async fn allow(&self, id: &str, lun: &str, who: &str) -> Result<AgentView, Refusal> {
        let record = self.find(id)?;
        let facts = self.usable(lun)?;
        let lun_id = facts.identity.lun;
        if !record.luns.contains(&lun_id) && record.luns.len() >= MAX_LUNS {
            let message = format!("agent {} is allowed on {MAX_LUNS} LUNs already", record.id);
            return Err(Refusal::refused(
                "limit",
                message,
                "revoke it and enrol it for fewer LUNs",
            ));
        }
        let changed = self.0.blocking(move |shared| {
            shared.records.change(record.id, |record| {
                if !record.luns.contains(&lun_id) {
                    record.luns.push(lun_id);
                }
            })
        });
        let changed = changed
            .await
            .map_err(|refusal| snapshot::wire_refusal(&refusal))?;
        let gone = || Refusal::failed("not_found", format!("agent {id} was revoked meanwhile"), "");
        let record = changed.ok_or_else(gone)?;
        self.0.event_by(
            code::AGENT_CHANGED,
            record.id.to_string(),
            format!("allowed on LUN {lun}"),
            who,
        );
        Ok(self.0.view(&record))
    }

    /// `agent revoke`: forgets its key and drops its live connections.
    ///
    /// # Errors
    /// No such agent, or the store does not write.
    pub(crate) async fn revoke(&self, id: &str, who: &str) -> Result<AgentView, Refusal> {
        let record = self.find(id)?;
        let view = self.0.view(&record);
        let agent = record.id;
        let removed = self.0.blocking(move |shared| shared.records.remove(agent)).await;
        removed.map_err(|refusal| snapshot::wire_refusal(&refusal))?;
        if let Some(live) = self.0.live().remove(&agent) {
            live.kick.cancel();
        }
        self.0
            .last_freeze
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&agent);
        self.0.event_by(
            code::AGENT_CHANGED,
            agent.to_string(),
            format!("revoked ({})", record.host),
            who,
        );
        Ok(view)
    }

    /// `agent generation bump`: after the data directory came back from a backup.
    ///
    /// # Errors
    /// The store does not write.
    pub(crate) async fn generation_bump(&self, who: &str) -> Result<u32, Refusal> {
        let raised = self.0.blocking(|shared| {
            let seen = shared
                .seen_generation
                .load(Ordering::SeqCst)
                .max(shared.generation());
            records::raise_generation(&shared.pool, seen)
        });
        let generation = raised.await.map_err(|refusal| snapshot::wire_refusal(&refusal))?;
        self.0.generation.store(generation, Ordering::SeqCst);
        let text = format!("the generation of this target is {generation} now");
        self.0
            .event_by(code::AGENT_CHANGED, "agents".to_owned(), text, who);
        // Every agent has to hear it: they come back by themselves.
        self.0.live().values().for_each(|live| live.kick.cancel());
        Ok(generation)
    }
}

async fn test(shared: &Shared, record: &Record) -> Result<TestView, WireRefusal> {
    let mut link = link::dial(shared, record).await?;
    let began = Instant::now();
    link.ask(Request::Status(Status { session: None })).await?;
    let round_trip_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let luns = record.luns.clone();
    let volumes = match link
        .ask(Request::ListVolumes(ListVolumes { luns: luns.clone() }))
        .await?
    {
        Reply::ListVolumes(volumes) => volumes.luns,
        _ => Vec::new(),
    };
    let findings = match link
        .ask(Request::Preflight(Preflight {
            luns,
            mode: Mode::Application,
        }))
        .await?
    {
        Reply::Preflight(report) => report.findings,
        _ => Vec::new(),
    };
    link.close().await;
    Ok(TestView {
        id: record.id.to_string(),
        host: record.host.clone(),
        address: record
            .address
            .map(|ip| SocketAddr::new(ip, record.listen_port).to_string()),
        round_trip_ms,
        ready: TestView::is_ready(&volumes, &findings),
        volumes,
        findings,
    })
}

/// Binds `[agents] listen` and serves agents until the daemon stops. Does nothing without that section.
pub(crate) async fn listen(daemon: &Arc<Daemon>) -> anyhow::Result<()> {
    let site: Arc<dyn Site> = Arc::<Daemon>::clone(daemon);
    daemon
        .agents
        .start(
            Arc::downgrade(&site),
            daemon.tracker.clone(),
            daemon.shutdown.clone(),
        )
        .await
}
