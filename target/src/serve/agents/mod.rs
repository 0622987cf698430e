//! The daemon's end of the snapshot agents: who they are, whether they are there, and snapshots that they take part in.
//!
//! A `crash` snapshot never gets near this module. The protocol's decisions are made in `stillpoint_agentproto`; here are the
//! sockets, the clock, the keys and the records.
//!
//! ```text
//! listen (agent ─▶ target): enrol, register, heartbeat ──▶ records, live
//! snapshot: Coordinator ◀──▶ link (target ─▶ agent, one task each)   ◀──▶ Cutter (the store, on a blocking thread)
//! ```

mod discovery;
mod lease;
mod link;
mod listen;
mod pipe;
mod preflight;
mod records;
mod revert;
mod shared;
mod site;
mod snapshot;
#[cfg(test)]
mod tests;
mod tls;
mod tokens;
mod view;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use stillpoint_agentproto::enrol::Token;
use stillpoint_agentproto::message::{ListVolumes, Preflight, Reply, Request, Status};
use stillpoint_agentproto::{LunId, Refusal as WireRefusal};
use stillpoint_config::Config;
use stillpoint_snapshot::Pool;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use revert::told;
use shared::Shared;
use site::limits;
pub(crate) use site::{LunFacts, Site, limits as lun_limits};
pub(crate) use snapshot::{Cutter, SnapshotAsk, refusal};
pub(crate) use stillpoint_agentproto::message::{Level, Mode};
pub(crate) use stillpoint_agentproto::server::{OnFailure, Verdict};
pub(crate) use tokens::MAX_TTL;
pub(crate) use view::{AgentView, PreflightView, TestView, TokenView};

use super::Daemon;
use super::control::api::Refusal;
use super::documents::Documents;
use super::events::code;
use records::{MAX_LUNS, Record, Records};

/// The agents of this daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Agents(Arc<Shared>);

impl Agents {
    /// Reads key and records, and begins a new generation. Blocks.
    pub(crate) fn open(config: &Config, data_dir: &Path, pool: &Pool) -> anyhow::Result<Self> {
        let agents = config.agents.as_ref();
        let discovery = agents.is_some_and(|agents| agents.discovery);
        Self::open_at(agents.map(|agents| agents.listen), discovery, data_dir, pool)
    }

    fn open_at(
        listen: Option<SocketAddr>,
        discovery: bool,
        data_dir: &Path,
        pool: &Pool,
    ) -> anyhow::Result<Self> {
        let identity =
            tls::Identity::open(&data_dir.join("agents")).context("the key for the snapshot agents")?;
        let generation = records::raise_generation(pool, 0)?;
        Ok(Self(Arc::new(Shared {
            identity,
            pool: pool.clone(),
            records: Records::open(pool)?,
            tokens: tokens::Tokens::open(&data_dir.join("agents"))?,
            documents: Documents::new(data_dir),
            live: Mutex::default(),
            last_freeze: Mutex::default(),
            locks: Mutex::default(),
            gate: Arc::default(),
            generation: AtomicU32::new(generation),
            seen_generation: AtomicU32::new(0),
            connections: AtomicU64::new(1),
            listen,
            discovery,
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
        if self.0.discovery {
            discovery::start(&self.0, bound, &tracker, shutdown.clone()).await?;
        }
        if self.0.bound.set(bound).is_ok() {
            tracker.spawn(listen::serve(Arc::clone(&self.0), listener, config, shutdown));
        }
        Ok(())
    }

    /// Where agents register.
    pub(crate) fn listening(&self) -> Option<SocketAddr> {
        self.0.bound.get().copied()
    }

    /// What agents handed over with snapshots.
    pub(crate) fn documents(&self) -> &Documents {
        &self.0.documents
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
        let added = self.0.tokens.add(token, ids, ttl);
        added.map_err(|refusal| snapshot::wire_refusal(&refusal))?;
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

    /// `agent approve`: dials it where it asks to be dialled, from now on.
    ///
    /// # Errors
    /// No such agent; it asks for nothing; the store does not write.
    pub(crate) async fn approve(&self, id: &str, who: &str) -> Result<AgentView, Refusal> {
        let record = self.find(id)?;
        let Some(host) = record.unapproved() else {
            let message = format!("the agent on {} asks for no other address", record.host);
            let hint = "`advertise_host` in its agent.toml asks for one";
            return Err(Refusal::refused("nothing_to_approve", message, hint));
        };
        let changed = self.0.blocking(move |shared| {
            shared
                .records
                .change(record.id, |record| record.approved = Some(host))
        });
        let changed = changed
            .await
            .map_err(|refusal| snapshot::wire_refusal(&refusal))?;
        let gone = || Refusal::failed("not_found", format!("agent {id} was revoked meanwhile"), "");
        let record = changed.ok_or_else(gone)?;
        let text = format!("is dialled at {host} from now on");
        self.0
            .event_by(code::AGENT_CHANGED, record.id.to_string(), text, who);
        // It comes back at once, and is dialled back at the new address.
        if let Some(live) = self.0.live().get(&record.id) {
            live.kick.cancel();
        }
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
        address: record.dialled().map(|address| address.to_string()),
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
