//! The daemon: everything that `stillpoint serve` runs.
//!
//! The order of a start is the order of trust: store, saved state, agents, LUNs, targets, and only then the portals. Windows
//! logs in as soon as a port answers, is refused when its LUN is not there yet, and gives up.

mod access;
mod admit;
pub(crate) mod agents;
pub(crate) mod apply;
mod backend;
mod buffers;
pub(crate) mod control;
mod copy;
mod documents;
pub(crate) mod events;
mod fingerprint;
mod lun;
mod net;
mod operations;
mod reactor;
pub(crate) mod registry;
mod secrets;
mod session;
pub(crate) mod snapshots;
pub(crate) mod state;
pub(crate) mod store;
mod trace;
pub(crate) mod vss;
mod welcome;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use stillpoint_config::{Config, Origin};
use stillpoint_snapshot::{Pool, PoolOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use backend::LunBackend;
pub(crate) use lun::{Lun, LunSettings};
pub(crate) use registry::Registry;

/// Sessions get this long to log out when the daemon stops.
const LOGOUT_GRACE: Duration = Duration::from_secs(3);
/// Their running commands get this much longer: only a disk that hangs takes it.
const COMMANDS_GRACE: Duration = Duration::from_secs(20);
/// Threads that may wait for the disk. A flush holds one until its commit, so there are many.
const IO_THREADS: usize = 256;

/// Exit code after a panic, as the Rust runtime uses it.
const PANICKED: i32 = 101;

/// What `stillpoint serve` was told on the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServeOptions {
    /// `--config`.
    pub(crate) config: Option<PathBuf>,
    /// `--listen`, for the embedded default.
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// `--socket`.
    pub(crate) socket: Option<PathBuf>,
}

/// What the parts of the daemon share.
#[derive(Debug)]
pub(crate) struct Daemon {
    config: RwLock<Arc<Config>>,
    /// Where the control socket listens.
    pub(crate) control_socket: PathBuf,
    pub(crate) pool: Pool,
    pub(crate) registry: Registry,
    pub(crate) agents: agents::Agents,
    pub(crate) events: events::Events,
    pub(crate) state: state::State,
    pub(crate) copies: copy::Copies,
    /// Snapshot sets of VSS hardware providers.
    pub(crate) vss: vss::Sets,
    /// Connections that have not logged in.
    pending: Arc<net::Pending>,
    /// The threads that serve connections.
    reactors: reactor::Reactors,
    /// Where work that may block goes.
    pub(crate) workers: tokio::runtime::Handle,
    /// For data on its way, of all sessions together.
    memory: Arc<stillpoint_iscsi::SharedMemory>,
    /// Some of it came back that a session waits for.
    memory_freed: Arc<Notify>,
    /// Cancelled when the daemon stops.
    pub(crate) shutdown: CancellationToken,
    /// Every task; a stop waits for them.
    pub(crate) tracker: TaskTracker,
    pub(crate) started: jiff::Timestamp,
}

impl Daemon {
    /// The configuration in force.
    pub(crate) fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts a new configuration in force; the caller has carried out what changed.
    pub(crate) fn set_config(&self, config: Config) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }
}

/// A panic is a bug of ours, and a half-dead daemon is worse than a restart: the store reopens clean. The one exception is the
/// store's metadata thread, which catches the panics of its library and stops the pool with a reason.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if std::thread::current().name() != Some(stillpoint_snapshot::METADATA_THREAD) {
            tracing::error!("a bug in stillpoint: {panic}");
            std::process::exit(PANICKED);
        }
    }));
}

/// Every connection is a file descriptor, and the usual soft limit of 1024 is kept for programs that use `select`.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, ?limit, "the limit of open files cannot be raised");
    }
}

/// Runs the daemon until SIGTERM or SIGINT.
pub(crate) fn main(options: &ServeOptions) -> anyhow::Result<ExitCode> {
    end_on_panic();
    secrets::keep_out_of_cores();
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("stillpoint")
        .max_blocking_threads(IO_THREADS)
        .build()
        .context("the runtime cannot be started")?;
    let result = runtime.block_on(run(options));
    // Whatever still waits (a blocked disk) must not keep the process from ending.
    runtime.shutdown_timeout(Duration::from_secs(5));
    result
}

async fn run(options: &ServeOptions) -> anyhow::Result<ExitCode> {
    let config = load(options)?;
    for problem in &config.warnings {
        tracing::warn!("{problem}");
    }
    for part in config.unserved() {
        tracing::warn!(
            line = part.line,
            "{}: parsed and checked, but not served by this version",
            part.section
        );
    }
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be handled")?;
    let data_dir = config.daemon.data_dir.clone();
    let (_lock, daemon) = tokio::task::spawn_blocking({
        let control_socket = options.socket.clone();
        move || open(config, control_socket)
    })
    .await??;
    agents::listen(&daemon).await?;
    tokio::task::spawn_blocking({
        let daemon = Arc::clone(&daemon);
        move || apply::first_start(&daemon)
    })
    .await??;
    let portals = net::bind(&daemon.config().portals)?;
    daemon
        .registry
        .set_portals(portals.iter().map(|(_, view)| view.clone()).collect());
    control::listen(&daemon)?;
    for (listener, view) in portals {
        daemon
            .tracker
            .spawn(net::serve(Arc::clone(&daemon), listener, view));
    }
    daemon.tracker.spawn(copy::expire(Arc::clone(&daemon)));
    daemon
        .tracker
        .spawn(snapshots::watch_reverts(Arc::clone(&daemon)));
    daemon.tracker.spawn(vss::watch(Arc::clone(&daemon)));
    ready(&daemon, &data_dir);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload(&daemon).await,
        }
    }
    stop(&daemon).await?;
    Ok(ExitCode::SUCCESS)
}

/// The configuration: the file that was named, the file in its usual place, or the embedded default.
fn load(options: &ServeOptions) -> anyhow::Result<Config> {
    let usual = Path::new(stillpoint_config::DEFAULT_CONFIG_FILE);
    let file = options
        .config
        .as_deref()
        .or_else(|| usual.exists().then_some(usual));
    match file {
        Some(file) => {
            anyhow::ensure!(
                options.listen.is_none(),
                "--listen is for the embedded default; with {} write [[portal]] address = \"…\" there",
                file.display()
            );
            Ok(Config::load(file)?)
        }
        None => Ok(Config::embedded(
            PathBuf::from(stillpoint_config::EMBEDDED_DATA_DIR),
            options.listen,
        )),
    }
}

/// Opens what is on disk. Blocks.
fn open(config: Config, control_socket: Option<PathBuf>) -> anyhow::Result<(File, Arc<Daemon>)> {
    let data_dir = config.daemon.data_dir.clone();
    std::fs::create_dir_all(&data_dir).with_context(|| {
        format!(
            "data_dir {} cannot be made: choose a directory that this user may write",
            data_dir.display()
        )
    })?;
    let lock = lock(&data_dir)?;
    let pool = open_pool(&config, &data_dir.join("pool"))?;
    let events = events::Events::open(&data_dir)?;
    let state = state::State::open(&pool);
    let agents = agents::Agents::open(&config, &data_dir, &pool)?;
    let control_socket = control_socket.unwrap_or_else(|| config.daemon.control_socket.clone());
    let memory_freed = Arc::new(Notify::new());
    let wake = Arc::clone(&memory_freed);
    let session_memory = usize::try_from(config.daemon.session_memory.bytes())
        .context("[daemon] session_memory is larger than this machine can address")?;
    let memory = stillpoint_iscsi::SharedMemory::new(session_memory, move || wake.notify_waiters());
    let daemon = Daemon {
        config: RwLock::new(Arc::new(config)),
        control_socket,
        pool,
        registry: Registry::default(),
        agents,
        events,
        state,
        copies: copy::Copies::default(),
        vss: vss::Sets::default(),
        pending: Arc::default(),
        reactors: reactor::Reactors::start().context("the network threads cannot be started")?,
        workers: tokio::runtime::Handle::current(),
        memory,
        memory_freed,
        shutdown: CancellationToken::new(),
        tracker: TaskTracker::new(),
        started: jiff::Timestamp::now(),
    };
    Ok((lock, Arc::new(daemon)))
}

/// Two daemons on one store would destroy it.
fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let path = data_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("{} cannot be opened", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            anyhow::bail!(
                "another stillpoint runs on {}: stop it, or choose another data_dir",
                data_dir.display()
            )
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("{} cannot be locked", path.display()))
        }
    }
}

fn open_pool(config: &Config, dir: &Path) -> anyhow::Result<Pool> {
    let size = config.pool.max_size.or_else(|| file_system_size(dir));
    let options = PoolOptions {
        grain_bytes: config.pool.grain.bytes(size),
        cache_bytes: usize::try_from(config.pool.cache.bytes())
            .context("[pool] cache is larger than this machine can address")?,
        max_bytes: config.pool.max_size.map_or(0, stillpoint_config::Size::bytes),
        ..PoolOptions::default()
    };
    let pool = if Pool::exists(dir) {
        Pool::open(dir, &options)
    } else {
        Pool::create(dir, &options)
    };
    let pool = pool.with_context(|| format!("the store in {} cannot be opened", dir.display()))?;
    let grain = pool.stats().grain_bytes;
    if let stillpoint_config::Grain::Bytes(wanted) = config.pool.grain
        && wanted != grain
    {
        anyhow::bail!(
            "[pool] grain = {} but the store in {} was made with {}: the grain is fixed at creation; write that, or use another data_dir",
            stillpoint_config::Size(wanted.into()),
            dir.display(),
            stillpoint_config::Size(grain.into())
        );
    }
    let suits = stillpoint_config::Grain::Auto.bytes(size);
    if let (Some(size), true) = (size, grain < suits) {
        tracing::warn!(
            "the pool can hold {size}, and was made with grains of {}: its map may become large ({} grains suit it). The grain is fixed at creation; bound the pool with [pool] max_size, or move the volumes to a new data_dir",
            stillpoint_config::Size(grain.into()),
            stillpoint_config::Size(suits.into())
        );
    }
    Ok(pool)
}

/// What the file system of the pool can hold, when the operator sets no bound.
fn file_system_size(dir: &Path) -> Option<stillpoint_config::Size> {
    let there = dir.ancestors().find(|path| path.exists())?;
    let fs = rustix::fs::statvfs(there).ok()?;
    Some(stillpoint_config::Size(fs.f_blocks.saturating_mul(fs.f_frsize)))
}

/// Tells systemd and the person at the terminal that initiators can connect.
fn ready(daemon: &Arc<Daemon>, data_dir: &Path) {
    let portals = daemon.registry.portals();
    for portal in &portals {
        tracing::info!(portal = %portal.address, group = portal.group, "portal open");
    }
    tracing::info!(
        targets = daemon.registry.targets().len(), luns = daemon.registry.luns().len(), data_dir = %data_dir.display(), "ready"
    );
    if daemon.config().origin == Origin::Embedded {
        print!("{}", welcome::text(daemon));
    }
    notify(&[sd_notify::NotifyState::Ready]);
    if let Some(period) = sd_notify::watchdog_enabled() {
        let shutdown = daemon.shutdown.clone();
        // Tokio's own loop must turn for this to go on: that is what the watchdog watches.
        daemon.tracker.spawn(async move {
            let mut tick = tokio::time::interval(period / 2);
            while tokio::select! { _ = tick.tick() => true, () = shutdown.cancelled() => false } {
                notify(&[sd_notify::NotifyState::Watchdog]);
            }
        });
    }
}

async fn reload(daemon: &Arc<Daemon>) {
    if let Ok(now) = sd_notify::NotifyState::monotonic_usec_now() {
        notify(&[sd_notify::NotifyState::Reloading, now]);
    }
    if let Err(error) = apply::reload(daemon).await {
        tracing::error!("the configuration was not applied, everything goes on as before: {error:#}");
    }
    notify(&[sd_notify::NotifyState::Ready]);
}

/// Stops in the order of a start, backwards: no new sessions, the running ones log out, their commands end, the store commits.
async fn stop(daemon: &Arc<Daemon>) -> anyhow::Result<()> {
    tracing::info!("stopping");
    notify(&[sd_notify::NotifyState::Stopping]);
    daemon.shutdown.cancel();
    let sessions = daemon.registry.close();
    let ends = futures_all(sessions.iter().map(|session| {
        daemon
            .registry
            .drop_session(session.id, LOGOUT_GRACE, "the daemon stops")
    }));
    if tokio::time::timeout(LOGOUT_GRACE + COMMANDS_GRACE, ends)
        .await
        .is_err()
    {
        tracing::error!("commands of some sessions do not end: the store is closed under them");
    }
    daemon.tracker.close();
    if tokio::time::timeout(LOGOUT_GRACE, daemon.tracker.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            left = daemon.tracker.len(),
            "some connections did not end in time"
        );
    }
    let pool = daemon.pool.clone();
    tokio::task::spawn_blocking(move || pool.shutdown())
        .await?
        .context("the final commit failed")?;
    tracing::info!("stopped");
    Ok(())
}

/// Waits for all of them at the same time.
async fn futures_all(futures: impl Iterator<Item = impl Future<Output = bool> + Send>) {
    let mut waits: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        waits.retain_mut(|wait| wait.as_mut().poll(context).is_pending());
        if waits.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

fn notify(state: &[sd_notify::NotifyState<'_>]) {
    // Outside systemd there is no socket to tell, which is no error.
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}
