//! `stillpoint-agent run`: journal thaw, listener, one engine and one registration per enrolled target.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use stillpoint_agentproto::Fingerprint;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::engine::{Engine, Shared};
use crate::features::Features;
use crate::freeze::Settings;
use crate::journal::{self, Outcome, Recovered};
use crate::listener::{Engines, Listener};
use crate::registration::Registration;
use crate::state::{Identity, StateDir, Target};
use crate::status::{Board, Connection};
use crate::tls::{self, Enrolled};
use crate::vcenter::Vcenter;
use crate::volumes::Root;

/// How soon an `enrol`, an `unenrol` or a choice of `features` is noticed.
const TARGETS_EVERY: Duration = Duration::from_secs(1);
/// Hooks have 20 s after a thaw; then the agent ends whatever they do.
const STOP_TIME_MAX: Duration = Duration::from_secs(25);

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let _lock = lock_run_dir(&config.run_dir)?;
    let root = Root::real();
    report(&journal::recover(&config.run_dir, &root));
    let state = StateDir::open(&config.state_dir)?;
    let identity = Arc::new(state.identity()?);
    let pins = Arc::new(Enrolled::default());
    let acceptor = TlsAcceptor::from(tls::server(&identity, Arc::clone(&pins) as Arc<dyn tls::Pins>)?);
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.with_context(|| format!("{} cannot be listened on", config.listen))?;
    tracing::info!(agent_id = %identity.agent_id, listen = %config.listen, "stillpoint-agent {}", env!("CARGO_PKG_VERSION"));
    let board = Arc::new(Board::new(&config.run_dir));
    let features = Features::load(&config.state_dir)?;
    let shared = Arc::new(Shared {
        settings: settings(&config, root, features.clone()),
        vcenter: Vcenter::new(&config.state_dir),
        config,
        state,
        features: Mutex::new(features),
    });
    tokio::spawn(Arc::clone(&shared.vcenter).watch());
    let mut agent = Running {
        shared,
        identity,
        pins,
        board,
        engines: Arc::default(),
        none_said: false,
    };
    let accepting = Listener::new(Arc::clone(&agent.identity), acceptor, Arc::clone(&agent.engines));
    tokio::spawn(accepting.run(listener));
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut look = tokio::time::interval(TARGETS_EVERY);
    loop {
        tokio::select! {
            _ = look.tick() => {
                agent.follow_features();
                agent.follow_targets()?;
            }
            _ = term.recv() => break,
            _ = int.recv() => break,
        }
    }
    tracing::info!("stopping: thaws and cleans up first");
    agent.stop().await;
    Ok(())
}

/// The rules of every freeze.
pub(crate) fn settings(config: &Config, root: Root, features: Features) -> Settings {
    let mut protect = config.protect.clone();
    protect.push(config.state_dir.clone());
    Settings {
        root,
        run_dir: config.run_dir.clone(),
        hooks_dir: config.hooks_dir.clone(),
        hook_time_max: config.hook_time_max,
        protect,
        features,
        libvirt: config.libvirt.clone(),
        config_file: config.file.clone(),
    }
}

/// One agent per run directory: two would thaw each other's freezes at their starts.
fn lock_run_dir(run_dir: &Path) -> anyhow::Result<File> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(run_dir);
    made.with_context(|| format!("{} cannot be made", run_dir.display()))?;
    let file = File::create(run_dir.join("agent.lock")).context("agent.lock")?;
    // Tried more than once: `status` takes the lock for a moment to see whether it is free.
    for _ in 0..10 {
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(file);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!(
        "another stillpoint-agent runs already (it holds {}/agent.lock)",
        run_dir.display()
    );
}

/// Does an agent run over this directory?
pub(crate) fn is_running(run_dir: &Path) -> bool {
    let Ok(file) = File::open(run_dir.join("agent.lock")) else {
        return false;
    };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}

/// Tells what a journal thaw did.
pub(crate) fn report(recovered: &[Recovered]) {
    for Recovered { what, outcome } in recovered {
        let point = what.display();
        match outcome {
            Outcome::Thawed => tracing::error!(%point, "was still frozen by an agent that ended: thawed"),
            Outcome::NotFrozen => {
                tracing::info!(%point, "an agent ended during a freeze; it is thawed already")
            }
            Outcome::Gone => {
                tracing::info!(%point, "an agent ended during a freeze; it is not mounted any more")
            }
            Outcome::WentOn => {
                tracing::warn!(hook = %point, "was frozen by an agent that ended: told to go on")
            }
            Outcome::Failed(error) => tracing::error!(%point, error, "cannot be thawed: look at it"),
        }
    }
}

struct Running {
    shared: Arc<Shared>,
    identity: Arc<Identity>,
    pins: Arc<Enrolled>,
    board: Arc<Board>,
    engines: Arc<Engines>,
    none_said: bool,
}

impl Running {
    /// Takes up what `features` chose; the registrations tell the targets.
    fn follow_features(&self) {
        match Features::load(&self.shared.config.state_dir) {
            Ok(chosen) => {
                let mut features = self
                    .shared
                    .features
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if *features != chosen {
                    tracing::info!(features = ?chosen.capabilities().names(), "the choice of features changed");
                    *features = chosen;
                }
            }
            Err(error) => {
                tracing::error!(%error, "the choice of features cannot be read; the last one stays")
            }
        }
    }

    /// Takes up targets that were enrolled and drops those that were unenrolled.
    fn follow_targets(&mut self) -> anyhow::Result<()> {
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
        for gone in known
            .iter()
            .filter(|known| !targets.iter().any(|target| target.fingerprint == **known))
        {
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

    /// All engines at once: their hooks must not wait for each other.
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

    fn engines(
        &self,
    ) -> std::sync::MutexGuard<'_, std::collections::HashMap<Fingerprint, (Arc<Engine>, CancellationToken)>>
    {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
