//! One freeze, from the hooks to the thaw (agent-protocol.md §11).
//!
//! ```text
//!  refuse what must not be frozen ─▶ guard ready ─▶ hooks `freeze` ─▶ syncfs ─▶ journal ─▶ guard's timer
//!      ─▶ hold begins ─▶ FIFREEZE innermost … outermost ═══ frozen ═══▶ FITHAW outermost … innermost
//!      ─▶ guard disarmed ─▶ journal removed ─▶ hooks (`abort`, when not taken, then) `thaw` in reverse ─▶ guard ends
//! ```
//!
//! [`Freezer::freeze`] and [`Freezer::release`] block and run on a thread of their own. [`Hold`] is what they share with
//! the rest of the agent: [`Hold::break_off`] thaws at once, from any thread, in whatever state the freeze is.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::features::Features;
use crate::guard::{Guard, GuardError};
use crate::hooks::{self, Call, Hook, HookError, Verb};
use crate::journal::{self, HookJournal};
use crate::libvirt::Libvirt;
use crate::sys;
use crate::volumes::{self, DeviceNumber, Root, Volume};

/// What to freeze.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    /// The session's name: names the journal.
    pub(crate) session: String,
    /// In the order of freezing.
    pub(crate) volumes: Vec<Volume>,
    /// In the order of freezing.
    pub(crate) hooks: Vec<Hook>,
    /// A hook that declares an application may fail: the application then fails, not the freeze.
    pub(crate) apps_may_fail: bool,
    /// From before the first FIFREEZE to the last FITHAW.
    pub(crate) hold: Duration,
}

/// What every freeze of this agent has in common.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The host.
    pub(crate) root: Root,
    /// Where journals are.
    pub(crate) run_dir: PathBuf,
    /// Where hooks are.
    pub(crate) hooks_dir: PathBuf,
    /// For all `freeze` hooks together.
    pub(crate) hook_time_max: Duration,
    /// Never freeze the file systems that these lie on.
    pub(crate) protect: Vec<PathBuf>,
    /// What this agent takes part in, as it was when the look at the host began.
    pub(crate) features: Features,
    /// How to ask for guests.
    pub(crate) libvirt: Libvirt,
    /// The agent's file, when it is not the usual one.
    pub(crate) config_file: Option<PathBuf>,
}

/// Why nothing is frozen (any more).
#[derive(Debug, thiserror::Error)]
pub(crate) enum FreezeError {
    /// The agent needs that file system to thaw again.
    #[error("{point} holds {what}: freezing it would stop the agent itself; move one of them")]
    Protected {
        /// The mount.
        point: String,
        /// The path on it.
        what: String,
    },
    /// A mount point could not be opened.
    #[error("{point} cannot be opened: {error}")]
    Open {
        /// The mount.
        point: String,
        /// The system's word.
        error: String,
    },
    /// No guard, no freeze.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Dirty data could not be written, or the journal.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's word.
        error: String,
    },
    /// EBUSY.
    #[error(
        "{point} is frozen already, by another program (fsfreeze, a backup, another agent): thaw it there first"
    )]
    Foreign {
        /// The mount.
        point: String,
    },
    /// FIFREEZE failed otherwise.
    #[error("{point} ({fs_type}) cannot be frozen: {error}")]
    Refused {
        /// The mount.
        point: String,
        /// Its file system.
        fs_type: String,
        /// The system's word.
        error: String,
    },
    /// [`Hold::break_off`] came in between.
    #[error("given up while freezing: {0}")]
    BrokenOff(Broken),
}

/// Why a hold ended before its release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    /// The agent's timer.
    #[error("the hold expired")]
    Expired,
    /// The guard's timer: the agent itself was too slow.
    #[error("the thaw guard ended the hold: the agent was stopped or too slow")]
    GuardFired,
    /// FITHAW answered EINVAL.
    #[error("{0} was thawed by another program during the hold")]
    Somebody(String),
    /// FITHAW answered another error.
    #[error("{0}")]
    ThawFailed(String),
    /// Abort, a lost channel, a lost lease, the agent's end.
    #[error("{0}")]
    Asked(String),
}

/// What a hook did.
#[derive(Debug, Clone)]
pub(crate) struct HookResult {
    /// The hook.
    pub(crate) hook: Hook,
    /// Why `freeze` failed, if it did: it takes no part.
    pub(crate) freeze_error: Option<String>,
    /// Why `thaw` failed, if it did.
    pub(crate) thaw_error: Option<String>,
}

/// How a hold ended.
#[derive(Debug, Clone)]
pub(crate) struct Released {
    /// Why the hold was not in force until its release, if it was not.
    pub(crate) broken: Option<Broken>,
    /// Every hook that was run.
    pub(crate) hooks: Vec<HookResult>,
    /// From the beginning of the hold until everything was thawed.
    pub(crate) held: Duration,
}

/// What is frozen, shared by the freezing thread and those who may end the hold.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order of freezing.
    frozen: Vec<(String, OwnedFd)>,
    limit: Duration,
    began: Option<Instant>,
    ended: Option<Instant>,
    broken: Option<Broken>,
}

impl Hold {
    /// A hold that has not begun.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Ends the hold now: thaws what is frozen and stops the freezing of the rest. Later calls change nothing.
    pub(crate) fn break_off(&self, why: Broken) {
        let mut state = self.lock();
        if state.ended.is_none() {
            state.broken.get_or_insert(why);
            state.thaw();
        }
    }

    fn is_broken(&self) -> bool {
        self.lock().broken.is_some()
    }

    /// What broke it, as an error of the freeze.
    fn check(&self) -> Result<(), FreezeError> {
        self.lock()
            .broken
            .clone()
            .map_or(Ok(()), |why| Err(FreezeError::BrokenOff(why)))
    }

    fn begin(&self, limit: Duration) {
        let mut state = self.lock();
        assert!(state.began.is_none(), "a hold begins once");
        state.began = Some(Instant::now());
        state.limit = limit;
    }

    /// One more is frozen; it is thawed at once when the hold was broken off during the ioctl.
    fn add(&self, point: String, dir: OwnedFd) -> Result<(), FreezeError> {
        let mut state = self.lock();
        state.frozen.push((point, dir));
        match state.broken.clone() {
            Some(why) => {
                state.thaw();
                Err(FreezeError::BrokenOff(why))
            }
            None => Ok(()),
        }
    }

    /// The one way to a hold that was in force until its end.
    fn end(&self) -> (Duration, Option<Broken>) {
        let mut state = self.lock();
        let began = state.began.unwrap_or_else(Instant::now);
        if began.elapsed() >= state.limit {
            state.broken.get_or_insert(Broken::Expired);
        }
        state.thaw();
        let ended = *state.ended.get_or_insert_with(Instant::now);
        (ended.saturating_duration_since(began), state.broken.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock panics; if it did, thawing would matter more than the poison.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Outermost first: the reverse of freezing.
    fn thaw(&mut self) {
        while let Some((point, dir)) = self.frozen.pop() {
            match sys::thaw(&dir) {
                Ok(()) => {}
                // At the end of the hold the guard may be first, by microseconds.
                Err(error) if sys::was_not_frozen(&error) => {
                    let over = self.began.is_some_and(|began| began.elapsed() >= self.limit);
                    self.broken.get_or_insert(if over {
                        Broken::Expired
                    } else {
                        Broken::Somebody(point)
                    });
                }
                Err(error) => {
                    tracing::error!(point, %error, "cannot be thawed: run `stillpoint-agent thaw`");
                    let why = format!("{point} cannot be thawed: {error}");
                    self.broken.get_or_insert(Broken::ThawFailed(why));
                }
            }
        }
        if self.began.is_some() {
            self.ended.get_or_insert_with(Instant::now);
        }
    }
}

/// A freeze that is in force.
pub(crate) struct Freezer {
    settings: Settings,
    hold: Arc<Hold>,
    guard: Option<Guard>,
    journal: PathBuf,
    hook_journal: HookJournal,
    ran: Vec<HookResult>,
}

impl Freezer {
    /// Freezes everything in the order, or nothing.
    ///
    /// `begin` is called once, when the hold begins: after the hooks, before the first FIFREEZE. Its `false` stops everything.
    ///
    /// # Errors
    /// Whatever the error, nothing is frozen any more and the hooks that ran were told to go on.
    pub(crate) fn freeze(
        settings: &Settings,
        order: &Order,
        hold: &Arc<Hold>,
        begin: impl FnOnce() -> bool,
    ) -> Result<Self, Box<(FreezeError, Released)>> {
        let journal = journal::path(&settings.run_dir, &order.session);
        let mut freezer = Self {
            settings: settings.clone(),
            hold: Arc::clone(hold),
            guard: None,
            journal,
            hook_journal: HookJournal::new(&settings.run_dir, &order.session, &settings.root),
            ran: Vec::new(),
        };
        match freezer.steps(order, begin) {
            Ok(()) => Ok(freezer),
            Err(error) => {
                hold.break_off(Broken::Asked(error.to_string()));
                let released = freezer.release(false);
                Err(Box::new((error, released)))
            }
        }
    }

    fn steps(&mut self, order: &Order, begin: impl FnOnce() -> bool) -> Result<(), FreezeError> {
        let volumes: Vec<&Volume> = order
            .volumes
            .iter()
            .filter(|volume| volume.needs_freeze())
            .collect();
        refuse_protected(&self.settings, &volumes)?;
        let mut dirs = volumes
            .iter()
            .map(|volume| open(volume))
            .collect::<Result<Vec<_>, _>>()?;
        let journals = [self.journal.as_path(), self.hook_journal.path()];
        self.guard = Some(Guard::start(&dirs, order.hold, journals)?);
        self.freeze_hooks(order)?;
        for (volume, dir) in volumes.iter().zip(&dirs) {
            self.hold.check()?;
            rustix::fs::syncfs(dir).map_err(|e| io_error(format!("{}: syncfs", volume.name()), &e.into()))?;
        }
        let entries = volumes
            .iter()
            .map(|volume| (volume.dev, volume.points.first().cloned().unwrap_or_default()));
        journal::write(&self.journal, &self.settings.root, entries)
            .map_err(|error| io_error(self.journal.display().to_string(), &error))?;
        if let Some(guard) = &mut self.guard {
            guard.arm()?;
        }
        if !begin() {
            self.hold.break_off(Broken::Asked(
                "the session was ended before the hold began".to_owned(),
            ));
        }
        self.hold.begin(order.hold);
        for (volume, dir) in volumes.iter().zip(dirs.drain(..)) {
            self.hold.check()?;
            sys::freeze(&dir).map_err(|error| freeze_error(volume, &error))?;
            self.hold.add(volume.name(), dir)?;
        }
        Ok(())
    }

    /// All hooks share one budget, so that ten slow ones cannot stop the application ten times as long.
    fn freeze_hooks(&mut self, order: &Order) -> Result<(), FreezeError> {
        let deadline = Instant::now() + self.settings.hook_time_max;
        let hold = Arc::clone(&self.hold);
        let frozen = order.volumes.iter().flat_map(|volume| volume.points.clone());
        let mounts: Vec<PathBuf> = frozen.collect();
        for hook in &order.hooks {
            self.hold.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            self.hook_journal
                .begin(hook)
                .map_err(|error| journal_error(&error))?;
            let journal = &mut self.hook_journal;
            let call = Call {
                verb: Verb::Freeze,
                allowed: left,
                freeze: Some((&mounts, order.hold)),
            };
            let result = hook.run(&call, &mut |group| note(journal, Some(group)), &|| {
                hold.is_broken()
            });
            note(journal, None);
            let error = result.as_ref().err().map(ToString::to_string);
            // Kept before the error is returned: a hook that failed half-way has to be told to go on, too.
            self.ran.push(HookResult {
                hook: hook.clone(),
                freeze_error: error,
                thaw_error: None,
            });
            match result {
                Err(error) if !(order.apps_may_fail && hook.application.is_some()) => {
                    return Err(error.into());
                }
                _ => {}
            }
        }
        self.hold.check()
    }

    /// What the `freeze` hooks said.
    pub(crate) fn hooks(&self) -> &[HookResult] {
        &self.ran
    }

    /// Ends the hold and tells the hooks to go on. Thawing comes first, everything else can wait.
    pub(crate) fn release(mut self, taken: bool) -> Released {
        let (held, mut broken) = self.hold.end();
        tracing::debug!(held_ms = held.as_millis(), ?broken, "thawed");
        if let Some(guard) = &mut self.guard
            && !guard.disarm()
        {
            broken.get_or_insert(Broken::GuardFired);
        }
        journal::remove(&self.journal);
        self.thaw_hooks(taken && broken.is_none());
        journal::remove(self.hook_journal.path());
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        Released {
            broken,
            hooks: self.ran,
            held,
        }
    }

    fn thaw_hooks(&mut self, taken: bool) {
        let hooks: Vec<&Hook> = self.ran.iter().map(|ran| &ran.hook).collect();
        let said = hooks::go_on(&hooks, taken);
        for (ran, said) in self.ran.iter_mut().zip(said) {
            if let Err(error) = said {
                tracing::error!(%error, "a hook failed at thaw: look at its application");
                ran.thaw_error = Some(error.to_string());
            }
        }
    }
}

/// The group only serves to end a hook that outlives its agent: without it the hook is told to go on all the same.
fn note(journal: &mut HookJournal, group: Option<u32>) {
    if let Err(error) = journal.running(group) {
        tracing::debug!(%error, "the journal of hooks cannot be written");
    }
}

fn journal_error(error: &std::io::Error) -> FreezeError {
    io_error("the journal of hooks cannot be written".to_owned(), error)
}

/// The paths that must stay writable while something is frozen, and what they are.
pub(crate) fn protected(settings: &Settings) -> Vec<(PathBuf, String)> {
    let mut paths: Vec<_> = settings
        .protect
        .iter()
        .map(|path| (path.clone(), path.display().to_string()))
        .collect();
    let exe = std::env::current_exe()
        .ok()
        .map(|path| (path, "the agent's program".to_owned()));
    paths.extend(exe);
    paths.push((settings.run_dir.clone(), "the agent's run directory".to_owned()));
    paths.push((PathBuf::from("/run"), "/run".to_owned()));
    paths.push((PathBuf::from("/var/log"), "the host's logs".to_owned()));
    paths.extend([1, 2].map(|fd| {
        (
            PathBuf::from(format!("/proc/self/fd/{fd}")),
            "the agent's log".to_owned(),
        )
    }));
    paths
}

/// Which protected path lies on this file system, if one does.
pub(crate) fn protects(volume: &Volume, protected: &[(PathBuf, String)]) -> Option<String> {
    protected
        .iter()
        .find(|(path, _)| lies_on(path, volume))
        .map(|(_, what)| what.clone())
}

fn lies_on(path: &Path, volume: &Volume) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = std::fs::metadata(path) else {
        return false;
    };
    let dev = DeviceNumber::from_raw(meta.dev());
    // A btrfs subvolume has a number of its own: compare with the one at the mount point, too.
    let at_point = |point: &PathBuf| std::fs::metadata(point).is_ok_and(|at| at.dev() == meta.dev());
    dev == volume.dev || (volume.dev.major == 0 && volume.points.iter().any(at_point))
}

fn refuse_protected(settings: &Settings, volumes: &[&Volume]) -> Result<(), FreezeError> {
    let protected = protected(settings);
    for volume in volumes {
        if let Some(what) = protects(volume, &protected) {
            return Err(FreezeError::Protected {
                point: volume.name(),
                what,
            });
        }
    }
    Ok(())
}

/// The first of its mount points that leads to it.
fn open(volume: &Volume) -> Result<OwnedFd, FreezeError> {
    let mut last = "it is not mounted".to_owned();
    for point in &volume.points {
        match volumes::open(point, volume.dev) {
            Ok(dir) => return Ok(dir),
            Err(error) => last = error.to_string(),
        }
    }
    Err(FreezeError::Open {
        point: volume.name(),
        error: last,
    })
}

fn freeze_error(volume: &Volume, error: &std::io::Error) -> FreezeError {
    let point = volume.name();
    if sys::is_frozen_already(error) {
        return FreezeError::Foreign { point };
    }
    FreezeError::Refused {
        point,
        fs_type: volume.fs_type.clone(),
        error: error.to_string(),
    }
}

fn io_error(what: String, error: &std::io::Error) -> FreezeError {
    FreezeError::Io {
        what,
        error: error.to_string(),
    }
}
