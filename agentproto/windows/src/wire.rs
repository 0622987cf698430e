//! The provider's connection to a target: blocking, because CommitSnapshots must not depend on another thread's schedule.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};
use stillpoint_agentproto::message::{
    LunIdentity, ProvBegin, ProvCommit, ProvDelete, ProvExpose, ProvQuery, ProvReady,
};
use stillpoint_agentproto::provider::{CallError, Client};
use stillpoint_agentproto::{Fingerprint, LunId};

use crate::features::Features;
use crate::host;
use crate::provider::{Targets, Wire};
use crate::state::{Identity, StateDir};
use crate::tls::{self, Exactly};

/// Name, route, TCP and TLS.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// What lets the protocol's deadlines pass.
const READ_TIME: Duration = Duration::from_millis(100);

struct Connection(Client<StreamOwned<ClientConnection, TcpStream>>);

impl Wire for Connection {
    fn query(&mut self, luns: Vec<LunIdentity>) -> Result<Vec<bool>, CallError> {
        let support = self.0.call(ProvQuery { luns })?;
        Ok(support.luns.iter().map(|lun| lun.supported).collect())
    }

    fn begin(&mut self, ask: ProvBegin) -> Result<ProvReady, CallError> {
        self.0.call(ask)
    }

    fn commit(&mut self, ask: ProvCommit) -> Result<(), CallError> {
        self.0.call(ask).map(drop)
    }

    fn expose(&mut self, ask: ProvExpose) -> Result<LunIdentity, CallError> {
        self.0.call(ask).map(|exposed| exposed.identity)
    }

    fn delete(&mut self, ask: ProvDelete) -> Result<(), CallError> {
        self.0.call(ask).map(drop)
    }
}

/// Where the LUNs of the enrolled targets are told.
pub(crate) trait Grants: Send + Sync {
    /// The target that lets this agent use the LUN.
    fn target_of(&self, lun: LunId) -> Option<Fingerprint>;
}

/// The enrolled targets, dialled when they are needed.
pub(crate) struct Enrolled {
    state: StateDir,
    state_dir: PathBuf,
    identity: Arc<Identity>,
    initiators: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    grants: Mutex<Option<Arc<dyn Grants>>>,
}

impl Enrolled {
    /// With this identity. Nothing is granted before [`Enrolled::follow`].
    pub(crate) fn new(
        state: StateDir,
        state_dir: &Path,
        identity: Arc<Identity>,
        initiators: impl Fn() -> Vec<String> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            state,
            state_dir: state_dir.to_owned(),
            identity,
            initiators: Box::new(initiators),
            grants: Mutex::default(),
        })
    }

    /// Asks these from now on.
    pub(crate) fn follow(&self, grants: Arc<dyn Grants>) {
        *self.grants.lock().unwrap_or_else(PoisonError::into_inner) = Some(grants);
    }
}

impl Targets for Enrolled {
    fn of(&self, lun: LunId) -> Option<Fingerprint> {
        let grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner).clone();
        grants?.target_of(lun)
    }

    fn connect(&self, target: Fingerprint) -> Result<Box<dyn Wire>, String> {
        let targets = self.state.targets().map_err(|error| error.to_string())?;
        let found = targets.into_iter().find(|known| known.fingerprint == target);
        let address = found.ok_or("the target is not enrolled any more")?.address();
        let wire = self.dial(&address, target);
        wire.map_err(|error| format!("{address}: {error:#}"))
    }

    fn initiator(&self) -> Option<String> {
        (self.initiators)().into_iter().next()
    }
}

impl Enrolled {
    fn dial(&self, address: &str, target: Fingerprint) -> anyhow::Result<Box<dyn Wire>> {
        let mut refused = None;
        let mut connected = None;
        for place in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&place, CONNECT_TIME_MAX) {
                Ok(stream) => {
                    connected = Some(stream);
                    break;
                }
                Err(error) => refused = Some(error),
            }
        }
        let Some(mut stream) = connected else {
            anyhow::bail!(
                "cannot be reached: {}",
                refused.map_or_else(|| "no address".to_owned(), |error| error.to_string())
            );
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CONNECT_TIME_MAX))?;
        stream.set_write_timeout(Some(CONNECT_TIME_MAX))?;
        let config = tls::client(&self.identity, Arc::new(Exactly(target)))?;
        let mut session = ClientConnection::new(config, tls::server_name())?;
        // The handshake here and now: afterwards a read timeout means that a deadline is due, and nothing else.
        while session.is_handshaking() {
            session.complete_io(&mut stream)?;
        }
        stream.set_read_timeout(Some(READ_TIME))?;
        let hello = host::hello(
            self.identity.agent_id,
            Features::load(&self.state_dir)?.capabilities(),
        );
        let seen = self.state.generation(target)?;
        let client = Client::open(StreamOwned::new(session, stream), hello, seen, |generation| {
            if generation < seen {
                let text = format!(
                    "the target is at generation {generation}, but {seen} was seen: it is a stale copy"
                );
                return Err(stillpoint_agentproto::Refusal::new(
                    stillpoint_agentproto::ErrorCode::StaleGeneration,
                    text,
                ));
            }
            Ok(())
        })?;
        Ok(Box::new(Connection(client)))
    }
}
