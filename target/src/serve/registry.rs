//! What is served now: targets, their LUNs, and the sessions that use them.
//!
//! A target's rules (access list, CHAP, portal groups, LUNs) are replaced as a whole, so that a reload never shows half of a
//! change; sessions that the new rules still admit live on untouched.

mod hold;
mod transient;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stillpoint_config::{Access, Chap};
use stillpoint_scsi::{TargetPort, UnitAttention};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_util::sync::CancellationToken;

pub(crate) use self::hold::LoginHold;
pub(crate) use self::transient::Transient;
use super::fingerprint::fingerprint;
use super::lun::Lun;

/// Sessions of all targets together. Each holds buffers: a daemon that accepted any number could be made to grow without bound.
pub(crate) const MAX_SESSIONS: usize = 2048;

/// Where a target comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TargetOrigin {
    /// `[[target]]` of the configuration.
    Configured,
    /// A snapshot that an operator mounted.
    Mount,
}

/// Everything about a target that a reload may change.
#[derive(Clone, Debug)]
pub(crate) struct TargetRules {
    /// LUN number and LUN, ascending.
    pub(crate) luns: Vec<(u16, Arc<Lun>)>,
    /// Who may log in.
    pub(crate) access: Access,
    /// What they must prove.
    pub(crate) chap: Option<Chap>,
    /// Portal groups through which the target is reached.
    pub(crate) portal_groups: Vec<u16>,
    /// Sessions of one initiator.
    pub(crate) max_sessions: u32,
    /// Used with snapshot agents: one LUN, no CHAP, one path.
    pub(crate) agents: bool,
    /// Where the target comes from.
    pub(crate) origin: TargetOrigin,
    /// See [`TargetRules::numbers`].
    pub(crate) numbers: OnceLock<Vec<u16>>,
    /// LUNs that one initiator alone sees. New rules keep those of the old ones: see [`Registry::put_target`].
    pub(crate) transients: Vec<Transient>,
}

impl TargetRules {
    /// The LUN behind a number.
    pub(crate) fn lun(&self, number: u16) -> Option<&Arc<Lun>> {
        let at = self
            .luns
            .binary_search_by_key(&number, |(number, _)| *number)
            .ok()?;
        self.luns.get(at).map(|(_, lun)| lun)
    }

    /// The numbers of all LUNs: collected once, since every command needs them.
    pub(crate) fn numbers(&self) -> &[u16] {
        self.numbers
            .get_or_init(|| self.luns.iter().map(|(number, _)| *number).collect())
    }
}

/// One iSCSI target.
#[derive(Debug)]
pub(crate) struct Target {
    /// Never reused while the daemon runs: a session knows its target by it.
    key: u64,
    iqn: String,
    rules: RwLock<Arc<TargetRules>>,
}

impl Target {
    /// The iSCSI name.
    pub(crate) fn iqn(&self) -> &str {
        &self.iqn
    }

    /// The rules in force now.
    pub(crate) fn rules(&self) -> Arc<TargetRules> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Identifies the target to its sessions.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }
}

/// What the control plane may ask of a session's own task.
#[derive(Debug)]
pub(crate) enum Control {
    /// The owner's word on a login.
    Admit(stillpoint_iscsi::Admission),
    /// Send a NOP-In ping; tell when it was answered.
    Probe(tokio::sync::oneshot::Sender<()>),
    /// Ask the initiator to log out, then end the session after the grace (RFC 7143 §11.9.1, AsyncEvent 1).
    Logout {
        /// How long the initiator may take.
        grace: Duration,
        /// For the log.
        reason: String,
    },
    /// Record the session's PDUs.
    Trace(super::trace::Order),
    /// [`Session::end`] was called: nothing else is to be done.
    Wake,
    /// Another I_T nexus cleared the tasks of these LUNs: forget them, send nothing (TAS = 0).
    AbortTasks {
        /// Numbers of the LUNs.
        luns: Vec<u16>,
        /// What the initiator hears of it with its next command.
        cause: UnitAttention,
        /// Told when none of those tasks can begin any more; what runs, a drain of the LUN waits for. Dropped when the session
        /// is ending, which comes to the same.
        done: tokio::sync::oneshot::Sender<()>,
    },
}

/// What `session list` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SessionView {
    /// Names the session in `session drop`.
    pub(crate) id: u64,
    /// iSCSI name of the initiator.
    pub(crate) initiator: String,
    /// Which initiator it seems to be: `windows`, `esxi`, `linux`, `ipxe`, `qemu`, `libiscsi` or `unknown`.
    pub(crate) fingerprint: String,
    /// Its own part of the session's identity, 12 hexadecimal digits.
    pub(crate) isid: String,
    /// Ours.
    pub(crate) tsih: u16,
    /// iSCSI name of the target.
    pub(crate) target: String,
    /// Names of the LUNs that the session sees.
    pub(crate) luns: Vec<String>,
    /// Address of the initiator.
    pub(crate) peer: SocketAddr,
    /// Our address.
    pub(crate) portal: SocketAddr,
    /// RFC 3339.
    pub(crate) since: String,
    /// `login` until the full feature phase, then `active`.
    pub(crate) state: String,
    /// Negotiated: `None` or `CRC32C`.
    pub(crate) header_digest: String,
    /// Negotiated: `None` or `CRC32C`.
    pub(crate) data_digest: String,
    /// Commands received.
    pub(crate) commands: u64,
    /// Bytes read by the initiator.
    pub(crate) read_bytes: u64,
    /// Bytes written by the initiator.
    pub(crate) written_bytes: u64,
}

/// Counters of one session; written by its task, read by `session list`.
#[derive(Debug, Default)]
pub(crate) struct SessionFigures {
    pub(crate) commands: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) active: std::sync::atomic::AtomicBool,
    pub(crate) header_digest: std::sync::atomic::AtomicBool,
    pub(crate) data_digest: std::sync::atomic::AtomicBool,
}

/// A normal session, or one that is about to become one.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) initiator: String,
    pub(crate) isid: [u8; 6],
    pub(crate) tsih: u16,
    pub(crate) target: Arc<Target>,
    pub(crate) peer: SocketAddr,
    pub(crate) portal: SocketAddr,
    pub(crate) portal_group: u16,
    pub(crate) since: jiff::Timestamp,
    pub(crate) figures: SessionFigures,
    pub(crate) control: mpsc::Sender<Control>,
    ending: OnceLock<String>,
    /// Cancelled when the session's task has let go of everything: no command of it touches the medium any more.
    pub(crate) gone: CancellationToken,
}

impl Session {
    /// Whether this is the I_T nexus of a login (RFC 7143 §6.3.5): same initiator name, ISID and target portal group.
    pub(crate) fn is_nexus(&self, initiator: &str, isid: [u8; 6], target: u64, portal_group: u16) -> bool {
        self.initiator == initiator
            && self.isid == isid
            && self.target.key == target
            && self.portal_group == portal_group
    }

    /// Whether its login is complete: before, the initiator has proved nothing.
    pub(crate) fn is_active(&self) -> bool {
        self.figures.active.load(Ordering::Relaxed)
    }

    /// Asks the session's task for something. One that does not take its messages is ended: what it was asked may be what a
    /// reset by another host waits for.
    pub(crate) fn tell(&self, what: Control) {
        if let Err(TrySendError::Full(what)) = self.control.try_send(what) {
            tracing::warn!(session = self.id, initiator = %self.initiator, ?what, "session ended: it does not take its messages");
            self.end("it does not take its control messages");
        }
    }

    /// Ends the session: from now on it begins no command. [`Self::gone`] says when its last one is over.
    pub(crate) fn end(&self, reason: &str) {
        if self.ending.set(reason.to_owned()).is_ok() {
            // A full queue wakes the task as well, and behind a closed one there is none to wake.
            drop(self.control.try_send(Control::Wake));
        }
    }

    /// Why the session is ending, if it is.
    pub(crate) fn ending(&self) -> Option<&str> {
        self.ending.get().map(String::as_str)
    }

    fn view(&self) -> SessionView {
        let digest = |on: &std::sync::atomic::AtomicBool| {
            if on.load(Ordering::Relaxed) {
                "CRC32C"
            } else {
                "None"
            }
            .to_owned()
        };
        let figures = &self.figures;
        SessionView {
            id: self.id,
            initiator: self.initiator.clone(),
            fingerprint: fingerprint(&self.initiator, self.isid).to_owned(),
            isid: data_encoding::HEXLOWER.encode(&self.isid),
            tsih: self.tsih,
            target: self.target.iqn.clone(),
            luns: self
                .target
                .rules()
                .shown_to(&self.initiator)
                .map(|(_, lun)| lun.name().to_owned())
                .collect(),
            peer: self.peer,
            portal: self.portal,
            since: self.since.to_string(),
            state: if figures.active.load(Ordering::Relaxed) {
                "active"
            } else {
                "login"
            }
            .to_owned(),
            header_digest: digest(&figures.header_digest),
            data_digest: digest(&figures.data_digest),
            commands: figures.commands.load(Ordering::Relaxed),
            read_bytes: figures.read_bytes.load(Ordering::Relaxed),
            written_bytes: figures.written_bytes.load(Ordering::Relaxed),
        }
    }
}

/// A listening portal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PortalView {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// TargetPortalGroupTag.
    pub(crate) group: u16,
    /// What SendTargets says instead.
    pub(crate) advertise: Option<String>,
}

#[derive(Debug, Default)]
struct Tables {
    targets: BTreeMap<String, Arc<Target>>,
    luns: BTreeMap<String, Arc<Lun>>,
    portals: Vec<PortalView>,
}

impl Tables {
    /// Tells every LUN through which target ports it is reached: VPD page 83h and persistent reservations name them.
    fn tell_ports(&self) {
        // One walk over the targets: a start adds them one by one, and asking each target for each LUN took minutes with 1,000 of both.
        let mut ports: BTreeMap<*const Lun, Vec<TargetPort>> = BTreeMap::new();
        let rules: Vec<_> = self
            .targets
            .values()
            .map(|target| (&target.iqn, target.rules()))
            .collect();
        for (iqn, rules) in &rules {
            for (_, lun) in rules.all_luns() {
                let groups = rules.portal_groups.iter();
                ports
                    .entry(Arc::as_ptr(lun))
                    .or_default()
                    .extend(groups.map(|&portal_group| TargetPort {
                        target: (*iqn).clone(),
                        portal_group,
                    }));
            }
        }
        for lun in self.luns.values() {
            lun.set_ports(ports.remove(&Arc::as_ptr(lun)).unwrap_or_default());
        }
    }
}

#[derive(Debug, Default)]
struct Sessions {
    by_id: BTreeMap<u64, Arc<Session>>,
    last_tsih: u16,
    /// Targets that take no logins now, with the number of holds.
    held: BTreeMap<String, usize>,
    /// The daemon stops: nobody logs in any more.
    closed: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    tables: RwLock<Tables>,
    sessions: Mutex<Sessions>,
    last_target: AtomicU64,
    last_session: AtomicU64,
}

/// What a login brings, for [`Registry::enter`].
#[derive(Debug)]
pub(crate) struct Entering {
    pub(crate) initiator: String,
    pub(crate) isid: [u8; 6],
    pub(crate) target: Arc<Target>,
    pub(crate) peer: SocketAddr,
    pub(crate) portal: SocketAddr,
    pub(crate) portal_group: u16,
    pub(crate) control: mpsc::Sender<Control>,
}

/// Why [`Registry::enter`] refuses a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotNow {
    /// The daemon has [`MAX_SESSIONS`].
    Full,
    /// The target takes no logins for a moment, or the daemon stops.
    Held,
}

impl Registry {
    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All targets, by name.
    pub(crate) fn targets(&self) -> Vec<Arc<Target>> {
        self.read().targets.values().cloned().collect()
    }

    /// The target of that name. Names are compared in lower case (RFC 3722).
    pub(crate) fn target(&self, iqn: &str) -> Option<Arc<Target>> {
        self.read().targets.get(&iqn.to_lowercase()).cloned()
    }

    /// The target that a session was granted.
    pub(crate) fn target_by_key(&self, key: u64) -> Option<Arc<Target>> {
        self.read()
            .targets
            .values()
            .find(|target| target.key == key)
            .cloned()
    }

    /// Serves a target, or gives one that is served new rules. Sessions live on; LUNs that came or went are announced to them.
    pub(crate) fn put_target(&self, iqn: &str, mut rules: TargetRules) -> Arc<Target> {
        let mut tables = self.write();
        for (_, lun) in &rules.luns {
            tables.luns.insert(lun.name().to_owned(), Arc::clone(lun));
        }
        let name = iqn.to_lowercase();
        let known = tables.targets.get(&name).cloned();
        if let Some(target) = known {
            rules.transients.clone_from(&target.rules().transients);
            let before = std::mem::replace(
                &mut *target.rules.write().unwrap_or_else(PoisonError::into_inner),
                Arc::new(rules),
            );
            let after = target.rules();
            let numbers = |rules: &TargetRules| {
                rules
                    .luns
                    .iter()
                    .map(|(n, lun)| (*n, lun.name().to_owned()))
                    .collect::<Vec<_>>()
            };
            if numbers(&before) != numbers(&after) {
                // Every LUN that stays tells its initiators to ask REPORT LUNS again (SPC-4: 6/3F/0E).
                after.luns.iter().for_each(|(_, lun)| lun.report_luns_changed());
            }
            tables.tell_ports();
            return target;
        }
        let key = self.last_target.fetch_add(1, Ordering::Relaxed) + 1;
        let target = Arc::new(Target {
            key,
            iqn: name.clone(),
            rules: RwLock::new(Arc::new(rules)),
        });
        tables.targets.insert(name, Arc::clone(&target));
        tables.tell_ports();
        target
    }

    /// Stops serving a target: nobody can log in any more; its sessions are asked to log out and ended after `grace`. Returns
    /// how many there were.
    pub(crate) fn remove_target(&self, iqn: &str, grace: Duration) -> usize {
        let mut tables = self.write();
        let Some(target) = tables.targets.remove(&iqn.to_lowercase()) else {
            return 0;
        };
        tables.tell_ports();
        drop(tables);
        let sessions: Vec<_> = self.sessions_with(|session| session.target.key == target.key);
        for session in &sessions {
            session.tell(Control::Logout {
                grace,
                reason: format!("target {iqn} is no longer served"),
            });
        }
        sessions.len()
    }

    /// Makes a LUN known that no target serves yet.
    pub(crate) fn put_lun(&self, lun: Arc<Lun>) {
        self.write().luns.insert(lun.name().to_owned(), lun);
    }

    /// Forgets a LUN that no target serves any more.
    pub(crate) fn remove_lun(&self, name: &str) -> Option<Arc<Lun>> {
        self.write().luns.remove(name)
    }

    /// The LUN of that name.
    pub(crate) fn lun(&self, name: &str) -> Option<Arc<Lun>> {
        self.read().luns.get(name).cloned()
    }

    /// All LUNs, by name.
    pub(crate) fn luns(&self) -> Vec<Arc<Lun>> {
        self.read().luns.values().cloned().collect()
    }

    /// The targets that serve a LUN.
    pub(crate) fn targets_of(&self, lun: &str) -> Vec<Arc<Target>> {
        let serves =
            |target: &&Arc<Target>| target.rules().all_luns().any(|(_, served)| served.name() == lun);
        self.read().targets.values().filter(serves).cloned().collect()
    }

    /// The portals that listen.
    pub(crate) fn portals(&self) -> Vec<PortalView> {
        self.read().portals.clone()
    }

    /// Says which portals listen.
    pub(crate) fn set_portals(&self, portals: Vec<PortalView>) {
        self.write().portals = portals;
    }

    /// Sessions for which `wanted` holds.
    pub(crate) fn sessions_with(&self, wanted: impl Fn(&Session) -> bool) -> Vec<Arc<Session>> {
        self.lock_sessions()
            .by_id
            .values()
            .filter(|session| wanted(session))
            .cloned()
            .collect()
    }

    /// All sessions.
    pub(crate) fn sessions(&self) -> Vec<SessionView> {
        self.sessions_with(|_| true)
            .iter()
            .map(|session| session.view())
            .collect()
    }

    /// The sessions of one target.
    pub(crate) fn sessions_of_target(&self, iqn: &str) -> Vec<SessionView> {
        let iqn = iqn.to_lowercase();
        self.sessions_with(|session| session.target.iqn == iqn)
            .iter()
            .map(|session| session.view())
            .collect()
    }

    /// The sessions that see a LUN.
    pub(crate) fn sessions_of_lun(&self, lun: &str) -> Vec<SessionView> {
        let targets = self.targets_of(lun);
        let sees = |session: &Session| {
            let rules = session.target.rules();
            targets.iter().any(|target| target.key == session.target.key)
                && rules
                    .shown_to(&session.initiator)
                    .any(|(_, shown)| shown.name() == lun)
        };
        self.sessions_with(sees)
            .iter()
            .map(|session| session.view())
            .collect()
    }

    /// Ends a session: asks for a logout, waits for `grace`, then cuts. Returns when nothing of it touches the medium any more;
    /// `false` when there is no such session.
    pub(crate) async fn drop_session(&self, id: u64, grace: Duration, reason: &str) -> bool {
        let Some(session) = self.lock_sessions().by_id.get(&id).cloned() else {
            return false;
        };
        if !grace.is_zero() {
            session.tell(Control::Logout {
                grace,
                reason: reason.to_owned(),
            });
            drop(tokio::time::timeout(grace + Duration::from_secs(1), session.gone.cancelled()).await);
        }
        session.end(reason);
        session.gone.cancelled().await;
        true
    }

    /// Nobody logs in any more. Returns the sessions that there are.
    pub(crate) fn close(&self) -> Vec<Arc<Session>> {
        let mut sessions = self.lock_sessions();
        sessions.closed = true;
        sessions.by_id.values().cloned().collect()
    }

    /// Enters a session in the table, before its login is answered: of two logins at once, each sees the other.
    ///
    /// # Errors
    /// When the daemon has as many sessions as it may have, or the target takes no logins now.
    pub(crate) fn enter(&self, entering: Entering) -> Result<Arc<Session>, NotNow> {
        let mut sessions = self.lock_sessions();
        if sessions.closed || sessions.held.contains_key(entering.target.iqn()) {
            return Err(NotNow::Held);
        }
        if sessions.by_id.len() >= MAX_SESSIONS {
            return Err(NotNow::Full);
        }
        let mut tsih = sessions.last_tsih;
        loop {
            // TSIH 0 asks for a new session, so it names none (RFC 7143 §11.12.6). There are fewer sessions than numbers.
            tsih = tsih.wrapping_add(1).max(1);
            if sessions.by_id.values().all(|session| session.tsih != tsih) {
                break;
            }
        }
        sessions.last_tsih = tsih;
        let Entering {
            initiator,
            isid,
            target,
            peer,
            portal,
            portal_group,
            control,
        } = entering;
        let session = Arc::new(Session {
            id: self.last_session.fetch_add(1, Ordering::Relaxed) + 1,
            initiator,
            isid,
            tsih,
            target,
            peer,
            portal,
            portal_group,
            since: jiff::Timestamp::now(),
            figures: SessionFigures::default(),
            control,
            ending: OnceLock::new(),
            gone: CancellationToken::new(),
        });
        sessions.by_id.insert(session.id, Arc::clone(&session));
        Ok(session)
    }

    /// The session's task has let go of everything.
    pub(crate) fn leave(&self, session: &Session) {
        self.lock_sessions().by_id.remove(&session.id);
        session.gone.cancel();
    }

    /// What SendTargets lists for one target: the addresses of its portal groups (RFC 7143 §4.3).
    ///
    /// A portal that listens on every address says the one at which it was reached: the initiator can reach that.
    pub(crate) fn addresses(&self, rules: &TargetRules, local: SocketAddr) -> Vec<(String, u16)> {
        let shown = |portal: &PortalView| {
            let text = portal.advertise.clone().unwrap_or_else(|| {
                let ip = if portal.address.ip().is_unspecified() {
                    local.ip()
                } else {
                    portal.address.ip()
                };
                SocketAddr::new(ip.to_canonical(), portal.address.port()).to_string()
            });
            (text, portal.group)
        };
        // A portal on a wildcard of the other family does not answer at `local`'s address.
        let reachable = |portal: &&PortalView| {
            portal.advertise.is_some()
                || !portal.address.ip().is_unspecified()
                || match local.ip().to_canonical() {
                    IpAddr::V4(_) => portal.address.is_ipv4(),
                    IpAddr::V6(_) => portal.address.is_ipv6(),
                }
        };
        let portals = self.portals();
        portals
            .iter()
            .filter(|portal| rules.portal_groups.contains(&portal.group))
            .filter(reachable)
            .map(shown)
            .collect()
    }
}

/// Sessions without sockets, for tests.
#[cfg(test)]
pub(super) mod testing {
    use stillpoint_config::Initiators;

    use super::*;

    pub(crate) const TARGET: &str = "iqn.2026-11.test:disk";

    /// Rules without LUNs that admit everybody.
    pub(crate) fn rules(max_sessions: u32) -> TargetRules {
        TargetRules {
            luns: Vec::new(),
            access: Access {
                initiators: Initiators::Anyone,
                allow_from: Vec::new(),
            },
            chap: None,
            portal_groups: vec![1],
            max_sessions,
            agents: false,
            origin: TargetOrigin::Configured,
            numbers: OnceLock::new(),
            transients: Vec::new(),
        }
    }

    /// A login of this initiator that is entered in the table, and what its task would receive.
    pub(crate) fn enter(
        registry: &Registry,
        initiator: &str,
        isid: u8,
    ) -> Result<(Arc<Session>, mpsc::Receiver<Control>), NotNow> {
        let (control, controls) = mpsc::channel(4);
        let session = registry.enter(Entering {
            initiator: initiator.to_owned(),
            isid: [0, 2, 0x3d, 0, 0, isid],
            target: registry.target(TARGET).expect("the target is served"),
            peer: SocketAddr::from(([192, 0, 2, 1], 50_000)),
            portal: SocketAddr::from(([192, 0, 2, 2], 3260)),
            portal_group: 1,
            control,
        })?;
        Ok((session, controls))
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{TARGET, enter, rules};
    use super::*;

    fn registry() -> Registry {
        let registry = Registry::default();
        registry.put_target(TARGET, rules(1));
        registry
    }

    #[test]
    fn handles_are_unique_and_never_zero() {
        let registry = registry();
        registry.lock_sessions().last_tsih = u16::MAX - 2;
        let sessions: Vec<_> = (0..6).map(|i| enter(&registry, "a", i).unwrap().0).collect();
        let handles: Vec<u16> = sessions.iter().map(|session| session.tsih).collect();
        assert_eq!(handles, [u16::MAX - 1, u16::MAX, 1, 2, 3, 4]);
        registry.lock_sessions().last_tsih = 0;
        assert_eq!(
            enter(&registry, "a", 9).unwrap().0.tsih,
            5,
            "those in use are passed over"
        );
    }

    #[test]
    fn nobody_enters_a_full_or_a_stopping_daemon() {
        let registry = registry();
        let held: Vec<_> = (0..MAX_SESSIONS)
            .map(|_| enter(&registry, "a", 1).unwrap())
            .collect();
        assert_eq!(enter(&registry, "a", 1).unwrap_err(), NotNow::Full);
        registry.leave(&held[7].0);
        enter(&registry, "a", 1).unwrap();
        assert_eq!(registry.close().len(), MAX_SESSIONS);
        assert_eq!(enter(&registry, "a", 1).unwrap_err(), NotNow::Held);
    }

    #[test]
    fn a_session_that_takes_no_messages_is_ended() {
        let registry = registry();
        let (session, mut controls) = enter(&registry, "a", 1).unwrap();
        let mut waits = Vec::new();
        for _ in 0..5 {
            let (done, wait) = tokio::sync::oneshot::channel();
            session.tell(Control::AbortTasks {
                luns: vec![0],
                cause: UnitAttention::DeviceReset,
                done,
            });
            waits.push(wait);
        }
        assert!(
            session.ending().is_some(),
            "what it did not take could never be done"
        );
        assert!(waits[4].try_recv().is_err());
        assert_eq!(controls.len(), 4);
        controls.close();
        session.end("another reason");
        assert!(
            session.ending().unwrap().contains("messages"),
            "the first reason counts"
        );
    }

    #[test]
    fn an_end_wakes_the_task() {
        let registry = registry();
        let (session, mut controls) = enter(&registry, "a", 1).unwrap();
        session.end("test");
        assert!(matches!(controls.try_recv(), Ok(Control::Wake)));
        session.end("test");
        assert!(controls.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_drop_waits_until_the_session_has_let_go() {
        let registry = registry();
        let (session, mut controls) = enter(&registry, "a", 1).unwrap();
        let dropping = registry.drop_session(session.id, Duration::from_millis(10), "test");
        let task = async {
            assert!(matches!(controls.recv().await, Some(Control::Logout { .. })));
            // It does not log out; after the grace it is told again.
            assert!(matches!(controls.recv().await, Some(Control::Wake)));
            assert_eq!(session.ending(), Some("test"));
            registry.leave(&session);
        };
        let (dropped, ()) = tokio::join!(dropping, task);
        assert!(dropped && registry.sessions().is_empty());
        assert!(!registry.drop_session(session.id, Duration::ZERO, "test").await);
    }
}
