//! What the tasks of this module share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use stillpoint_agentproto::message::{Capabilities, Heartbeat, LunIdentity, SessionState};
use stillpoint_agentproto::registration::LEASE;
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal as WireRefusal};
use stillpoint_snapshot::Pool;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::records::{Record, Records};
use super::tokens::Tokens;
use super::view::{AgentState, AgentView, LastFreeze};
use super::{Site, listen, tls};
use crate::serve::documents::Documents;
use crate::serve::events::{Code, DAEMON, code};
use crate::serve::vss::Asker;

/// A clock that is off by more is told to the operator.
const CLOCK_OFF_MAX_MS: u64 = 60_000;

/// An agent that is registered now.
#[derive(Debug)]
pub(super) struct Live {
    /// Which connection this is.
    pub(super) number: u64,
    pub(super) heard: Instant,
    /// What the last dial-back came to.
    pub(super) reachable: Option<Result<(), String>>,
    pub(super) initiators: Vec<String>,
    pub(super) state: SessionState,
    pub(super) frozen_ms: Option<u32>,
    /// By how much its clock is ahead of ours, when that is too much to be the network.
    pub(super) clock_off_seconds: Option<i64>,
    pub(super) kick: CancellationToken,
}

impl Live {
    pub(super) fn new(number: u64, kick: CancellationToken, initiators: Vec<String>) -> Self {
        Self {
            number,
            heard: Instant::now(),
            reachable: None,
            initiators,
            state: SessionState::Idle,
            frozen_ms: None,
            clock_off_seconds: None,
            kick,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) identity: tls::Identity,
    pub(super) pool: Pool,
    pub(super) records: Records,
    pub(super) tokens: Tokens,
    pub(super) documents: Documents,
    pub(super) live: Mutex<BTreeMap<AgentId, Live>>,
    pub(super) last_freeze: Mutex<BTreeMap<AgentId, LastFreeze>>,
    /// Snapshots of one LUN wait for each other.
    pub(super) locks: Mutex<BTreeMap<LunId, Arc<tokio::sync::Mutex<()>>>>,
    pub(super) gate: Arc<listen::Gate>,
    pub(super) generation: AtomicU32,
    /// The highest that an agent has seen of this target.
    pub(super) seen_generation: AtomicU32,
    pub(super) connections: AtomicU64,
    pub(super) listen: Option<SocketAddr>,
    /// Answer agents that ask by UDP which targets there are.
    pub(super) discovery: bool,
    pub(super) bound: OnceLock<SocketAddr>,
    pub(super) site: OnceLock<Weak<dyn Site>>,
    pub(super) tasks: OnceLock<(TaskTracker, CancellationToken)>,
}

impl Shared {
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn next_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn live(&self) -> MutexGuard<'_, BTreeMap<AgentId, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn site(&self) -> Option<Arc<dyn Site>> {
        self.site.get().and_then(Weak::upgrade)
    }

    pub(super) fn event(&self, code: Code, subject: String, text: String) {
        self.event_by(code, subject, text, DAEMON);
    }

    pub(super) fn event_by(&self, code: Code, subject: String, text: String, who: &str) {
        if let Some(site) = self.site() {
            site.event(code, subject, text, who);
        }
    }

    /// A task that the daemon waits for when it stops.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        match self.tasks.get() {
            Some((tracker, _)) => drop(tracker.spawn(task)),
            None => drop(tokio::spawn(task)),
        }
    }

    /// Store work of the registration channel, on a thread that may wait.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T, WireRefusal> {
        let shared = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&shared)).await;
        let done = done.map_err(anyhow::Error::from).and_then(|result| result);
        done.map_err(|error| WireRefusal::new(ErrorCode::Internal, format!("{error:#}")))
    }

    /// The agent's Hello says what it has seen of this target: more than we are at means that our data came from a backup.
    pub(super) fn saw_generation(&self, seen: u32, product: &str) {
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

    /// Takes a heartbeat that came at `unix_ms`. True when the agent's port was not reached the last time: try again.
    pub(super) fn heard(&self, id: AgentId, number: u64, heartbeat: &Heartbeat, unix_ms: i64) -> bool {
        let mut live = self.live();
        let Some(live) = live.get_mut(&id).filter(|live| live.number == number) else {
            return false;
        };
        live.heard = Instant::now();
        live.state = heartbeat.state;
        live.frozen_ms = heartbeat.frozen_ms;
        live.clock_off_seconds = clock_off_seconds(heartbeat.clock_unix_ms, unix_ms);
        matches!(live.reachable, Some(Err(_)))
    }

    /// Notes what a dial-back came to; true when that is news.
    pub(super) fn dialled_back(&self, id: AgentId, number: u64, outcome: Result<(), String>) -> bool {
        let mut live = self.live();
        let Some(live) = live.get_mut(&id).filter(|live| live.number == number) else {
            return false;
        };
        let news = live.reachable.as_ref().map(Result::is_ok) != Some(outcome.is_ok());
        live.reachable = Some(outcome);
        news
    }

    /// The LUNs that an agent is allowed on and that are served.
    pub(super) fn grants(&self, record: &Record) -> Vec<LunIdentity> {
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

    /// What a request of the VSS provider is judged by.
    pub(super) fn asker(&self, agent: AgentId) -> Option<Asker> {
        let record = self.records.get(agent)?;
        let live = self.live();
        let live = live.get(&agent).filter(|live| live.heard.elapsed() < LEASE);
        Some(Asker {
            agent,
            host: record.host,
            luns: record.luns,
            initiators: live.map(|live| live.initiators.clone()),
            provides: record.features.has(Capabilities::VSS_PROVIDER),
        })
    }

    pub(super) fn lun_name(&self, lun: LunId) -> String {
        self.site()
            .and_then(|site| site.lun_by_id(lun))
            .map_or_else(|| lun.to_string(), |lun| lun.name)
    }

    pub(super) fn view(&self, record: &Record) -> AgentView {
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
            address: record.dialled().map(|address| address.to_string()),
            advertised: record.unapproved().map(|host| host.to_string()),
            clock_off_seconds: live.and_then(|live| live.clock_off_seconds),
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

/// By how many seconds an agent's clock is ahead; `None` within what a heartbeat may need on its way. No rule rests on clocks, but
/// people who read two logs do.
pub(super) fn clock_off_seconds(theirs_unix_ms: u64, ours_unix_ms: i64) -> Option<i64> {
    let off_ms = i64::try_from(theirs_unix_ms)
        .unwrap_or(i64::MAX)
        .saturating_sub(ours_unix_ms);
    (off_ms.unsigned_abs() > CLOCK_OFF_MAX_MS).then_some(off_ms / 1000)
}
