//! What is kept of each agent over restarts, and the target's generation: values in the store's own key space.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use stillpoint_agentproto::message::Capabilities;
use stillpoint_agentproto::{AgentId, Fingerprint, LunId};
use stillpoint_snapshot::Pool;

/// Agents that can be enrolled.
pub(super) const MAX_AGENTS: usize = 256;
/// LUNs of one agent. A record must fit into one value of the store.
pub(super) const MAX_LUNS: usize = 32;
/// Texts of a record (host, operating system …) in bytes.
const MAX_TEXT: usize = 200;
const PREFIX: &str = "agent/";
const GENERATION: &str = "agents/generation";

/// One enrolled agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: AgentId,
    pub(super) fingerprint: Fingerprint,
    /// The LUNs that it may see and freeze.
    pub(super) luns: Vec<LunId>,
    /// The LUNs that its last report had mounted: it stays required for them until it says otherwise.
    pub(super) mounted: Vec<LunId>,
    pub(super) host: String,
    pub(super) os: String,
    pub(super) version: String,
    pub(super) features: Capabilities,
    /// Where its registration came from.
    pub(super) address: Option<std::net::IpAddr>,
    pub(super) listen_port: u16,
    /// Where the agent asks to be dialled instead (address translation).
    #[serde(default)]
    pub(super) advertised: Option<std::net::IpAddr>,
    /// The advertised address that an operator approved.
    #[serde(default)]
    pub(super) approved: Option<std::net::IpAddr>,
    /// RFC 3339.
    pub(super) enrolled_at: String,
    pub(super) registered_at: Option<String>,
}

impl Record {
    /// Where the target dials this agent: never where it merely asks to be dialled.
    pub(super) fn dialled(&self) -> Option<std::net::SocketAddr> {
        let approved = self
            .approved
            .filter(|approved| Some(*approved) == self.advertised);
        approved
            .or(self.address)
            .map(|ip| std::net::SocketAddr::new(ip, self.listen_port))
    }

    /// Where it asks to be dialled, as long as nobody approved it.
    pub(super) fn unapproved(&self) -> Option<std::net::IpAddr> {
        self.advertised
            .filter(|host| self.approved != Some(*host) && self.address != Some(*host))
    }

    /// Cuts texts that came from the agent, so that the record always fits.
    pub(super) fn clip(text: &str) -> String {
        let end = (0..=MAX_TEXT.min(text.len()))
            .rev()
            .find(|end| text.is_char_boundary(*end))
            .unwrap_or(0);
        let cut = text.get(..end).unwrap_or_default();
        // Names from other hosts must not steer the operator's terminal.
        cut.chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect()
    }
}

/// All records, with their copy in the store.
#[derive(Debug)]
pub(super) struct Records {
    pool: Pool,
    by_id: Mutex<BTreeMap<AgentId, Record>>,
}

impl Records {
    /// Reads all records.
    pub(super) fn open(pool: &Pool) -> anyhow::Result<Self> {
        let mut by_id = BTreeMap::new();
        for (key, value) in pool.meta_list(PREFIX) {
            let record: Record = serde_json::from_slice(&value).with_context(|| {
                format!("the record {key} in the store is damaged: run `stillpoint store check`")
            })?;
            by_id.insert(record.id, record);
        }
        Ok(Self {
            pool: pool.clone(),
            by_id: Mutex::new(by_id),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<AgentId, Record>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn all(&self) -> Vec<Record> {
        self.lock().values().cloned().collect()
    }

    pub(super) fn get(&self, id: AgentId) -> Option<Record> {
        self.lock().get(&id).cloned()
    }

    pub(super) fn by_fingerprint(&self, fingerprint: Fingerprint) -> Option<Record> {
        self.lock()
            .values()
            .find(|record| record.fingerprint == fingerprint)
            .cloned()
    }

    /// Adds a record; durable when it returns. Blocks.
    pub(super) fn add(&self, record: Record) -> anyhow::Result<()> {
        let mut by_id = self.lock();
        anyhow::ensure!(
            by_id.len() < MAX_AGENTS,
            "{MAX_AGENTS} agents are enrolled: revoke those that are gone"
        );
        anyhow::ensure!(
            !by_id.contains_key(&record.id),
            "agent {} is enrolled already",
            record.id
        );
        self.store(&record)?;
        by_id.insert(record.id, record);
        Ok(())
    }

    /// Changes a record; durable when it returns. `None` when there is no such agent (any more). Blocks.
    pub(super) fn change(
        &self,
        id: AgentId,
        change: impl FnOnce(&mut Record),
    ) -> anyhow::Result<Option<Record>> {
        let mut by_id = self.lock();
        let Some(record) = by_id.get_mut(&id) else {
            return Ok(None);
        };
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            self.store(&changed)?;
            record.clone_from(&changed);
        }
        Ok(Some(changed))
    }

    /// Forgets an agent; durable when it returns. Blocks.
    pub(super) fn remove(&self, id: AgentId) -> anyhow::Result<Option<Record>> {
        let mut by_id = self.lock();
        if by_id.contains_key(&id) {
            self.pool
                .meta_put(&format!("{PREFIX}{id}"), None)
                .context("the agent's record cannot be removed")?;
        }
        Ok(by_id.remove(&id))
    }

    fn store(&self, record: &Record) -> anyhow::Result<()> {
        let value = serde_json::to_vec(record).context("the agent's record cannot be written down")?;
        self.pool
            .meta_put(&format!("{PREFIX}{}", record.id), Some(&value))
            .context("the agent's record cannot be stored")
    }
}

/// Raises the target's generation to above `seen`, durably, and returns it. Blocks.
pub(super) fn raise_generation(pool: &Pool, seen: u32) -> anyhow::Result<u32> {
    let stored = match pool.meta_get(GENERATION) {
        None => 0,
        Some(bytes) => {
            let bytes = bytes
                .as_slice()
                .try_into()
                .context("the generation in the store is damaged: run `stillpoint store check`")?;
            u32::from_be_bytes(bytes)
        }
    };
    let generation = stored
        .max(seen)
        .checked_add(1)
        .context("the target's generation has come to its end")?;
    pool.meta_put(GENERATION, Some(&generation.to_be_bytes()))
        .context("the generation cannot be stored")?;
    Ok(generation)
}
