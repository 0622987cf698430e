//! The service without Windows' service manager: provider, listener, one engine and one registration per enrolled target.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use stillpoint_agentproto::{Fingerprint, LunId};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::engine::{Engine, Shared};
use crate::features::Features;
use crate::hyperv::HyperV;
use crate::ledger::Ledger;
use crate::listener::{Engines, Listener};
use crate::platform::Platform;
use crate::provider::Provider;
use crate::registration::Registration;
use crate::state::{Identity, StateDir, Target};
use crate::status::{Board, Connection};
use crate::tls;
use crate::wire::{Enrolled, Grants};

/// How soon an `enrol`, `unenrol` or `features` is noticed.
const TARGETS_EVERY: Duration = Duration::from_secs(1);
/// VSS ends a snapshot set in this time.
const STOP_TIME_MAX: Duration = Duration::from_secs(25);

/// All that runs.
pub(crate) struct Running {
    shared: Arc<Shared>,
    identity: Arc<Identity>,
    pins: Arc<tls::Enrolled>,
    board: Arc<Board>,
    engines: Arc<Engines>,
    none_said: bool,
}

/// The grants of all engines.
struct OfEngines(Arc<Engines>);

impl Grants for OfEngines {
    fn target_of(&self, lun: LunId) -> Option<Fingerprint> {
        let engines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let grants = |engine: &Engine| engine.granted().is_some_and(|luns| luns.contains(&lun));
        let found = engines
            .iter()
            .find(|(_, (engine, _))| engine.features().vss_provider && grants(engine));
        found.map(|(target, _)| *target)
    }
}

impl Running {
    /// Everything but sockets. VSS may call the provider from now on.
    pub(crate) fn new(config: Config, platform: Arc<dyn Platform>) -> anyhow::Result<Self> {
        let state = StateDir::open(&config.state_dir)?;
        let identity = Arc::new(state.identity()?);
        let names = (Arc::clone(&platform), config.clone());
        let targets = Enrolled::new(
            state.clone(),
            &config.state_dir,
            Arc::clone(&identity),
            move || crate::host::initiators(names.0.as_ref(), &names.1),
        );
        let engines: Arc<Engines> = Arc::default();
        targets.follow(Arc::new(OfEngines(Arc::clone(&engines))));
        let provider = Provider::new(targets, Ledger::open(&config.state_dir));
        let hyperv = HyperV::new(&config.powershell, &config.state_dir);
        let features = Features::load(&config.state_dir)?;
        let shared = Shared {
            state,
            platform,
            provider: Arc::new(provider),
            hyperv,
            features: watch::Sender::new(features),
            config,
        };
        Ok(Self {
            board: Arc::new(Board::new(&shared.config.state_dir)),
            shared: Arc::new(shared),
            identity,
            pins: Arc::default(),
            engines,
            none_said: false,
        })
    }

    /// What COM hands to VSS.
    pub(crate) fn provider(&self) -> Arc<Provider> {
        Arc::clone(&self.shared.provider)
    }

    /// Serves until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let pins = Arc::clone(&self.pins) as Arc<dyn tls::Pins>;
        let acceptor = TlsAcceptor::from(tls::server(&self.identity, pins)?);
        let listen = self.shared.config.listen;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.with_context(|| format!("{listen} cannot be listened on"))?;
        tracing::info!(agent_id = %self.identity.agent_id, %listen, "stillpoint-agent {} for Windows", env!("CARGO_PKG_VERSION"));
        let accepting = Listener::new(Arc::clone(&self.identity), acceptor, Arc::clone(&self.engines));
        tokio::spawn(accepting.run(listener));
        self.sweep();
        let mut look = tokio::time::interval(TARGETS_EVERY);
        loop {
            tokio::select! {
                _ = look.tick() => self.follow()?,
                () = stop.cancelled() => break,
            }
        }
        tracing::info!("stopping: lets go and cleans up first");
        self.stop().await;
        Ok(())
    }

    /// Checkpoints of a service that died.
    fn sweep(&self) {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || {
            for left in shared.hyperv.sweep() {
                tracing::warn!("left behind: {left}");
            }
        });
    }

    /// Takes up targets that were enrolled, drops those that were unenrolled, and reads the choices again.
    fn follow(&mut self) -> anyhow::Result<()> {
        match Features::load(&self.shared.config.state_dir) {
            Ok(features) => {
                self.shared
                    .features
                    .send_if_modified(|now| std::mem::replace(now, features) != features);
            }
            Err(error) => {
                tracing::error!(%error, "the choices of features cannot be read; the old ones go on")
            }
        }
        let targets = match self.shared.state.targets() {
            Ok(targets) => targets,
            Err(error) => {
                tracing::error!(%error, "the enrolled targets cannot be read; those known go on");
                return Ok(());
            }
        };
        if targets.is_empty() && !self.none_said {
            tracing::warn!("not enrolled with any target: `stillpoint-agent enrol TOKEN@HOST`");
        }
        self.none_said = targets.is_empty();
        let known: Vec<Fingerprint> = self.engines().keys().copied().collect();
        let is_there = |known: &Fingerprint| targets.iter().any(|target| target.fingerprint == *known);
        for gone in known.iter().filter(|known| !is_there(known)) {
            self.drop_target(*gone);
        }
        for target in targets
            .iter()
            .filter(|target| !known.contains(&target.fingerprint))
        {
            self.take_up(target.clone())?;
        }
        self.pins
            .set(targets.iter().map(|target| target.fingerprint).collect());
        Ok(())
    }

    fn take_up(&self, target: Target) -> anyhow::Result<()> {
        let fingerprint = target.fingerprint;
        let generation = self.shared.state.generation(fingerprint)?;
        let engine = Engine::new(Arc::clone(&self.shared), fingerprint, generation);
        let cancel = CancellationToken::new();
        self.engines()
            .insert(fingerprint, (Arc::clone(&engine), cancel.clone()));
        self.board.set(fingerprint, Connection::Connecting);
        tokio::spawn(Arc::clone(&engine).drive());
        let (shared, identity, board) = (
            Arc::clone(&self.shared),
            Arc::clone(&self.identity),
            Arc::clone(&self.board),
        );
        let registration = Registration::new(shared, identity, target, engine, board);
        tokio::spawn(async move {
            tokio::select! {
                () = registration.run() => {}
                () = cancel.cancelled() => {}
            }
        });
        Ok(())
    }

    fn drop_target(&self, fingerprint: Fingerprint) {
        let Some((engine, cancel)) = self.engines().remove(&fingerprint) else {
            return;
        };
        tracing::info!(target = %fingerprint, "unenrolled: its connections are dropped");
        cancel.cancel();
        self.board.remove(fingerprint);
        tokio::spawn(async move { engine.stop(STOP_TIME_MAX).await });
    }

    /// All engines at once: they must not wait for each other.
    async fn stop(&self) {
        let engines: Vec<_> = self.engines().values().cloned().collect();
        let mut stops = tokio::task::JoinSet::new();
        for (engine, cancel) in engines {
            stops.spawn(async move {
                engine.stop(STOP_TIME_MAX).await;
                cancel.cancel();
            });
        }
        stops.join_all().await;
    }

    fn engines(&self) -> MutexGuard<'_, HashMap<Fingerprint, (Arc<Engine>, CancellationToken)>> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
