//! Applications that the agent quiesces itself: one module per kind, each driven through the application's own client program.
//!
//! ```text
//!  agent ── check, freeze, thaw (as it calls a hook) ──▶ stillpoint-agent application NAME VERB ──▶ psql, mariadb
//!                                          freeze of MariaDB: └──▶ hold (a process of its own, keeps the session with the lock)
//! ```
//!
//! A helper is a [`Hook`] with arguments, so that all that holds for hooks holds for it: deadline, process group, journal, and
//! the guard that tells it to go on when the agent is gone. The client program brings every way of authentication that the
//! server knows, and reads its password itself, from the file in which it looks for one: the agent never sees it.

mod client;
mod hold;
mod mariadb;
mod postgresql;

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::hooks::{self, Hook};
use crate::volumes::{Inventory, Mount, Root};

/// The hidden verb that makes a process a helper.
pub(crate) const VERB: &str = "application";
/// A helper that was called by hand, without the agent's word on the hold, keeps a lock no longer than this.
const HOLD_DEFAULT: Duration = Duration::from_secs(10);
/// Asking a server how it is.
const ASK_TIME_MAX: Duration = Duration::from_secs(8);

/// What kind of application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// PostgreSQL: a checkpoint, then what a crash would leave, which is what it is made for.
    Postgresql,
    /// MariaDB: commits stop, for as long as the hold lasts.
    Mariadb,
}

impl Kind {
    /// As records show it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Postgresql => "postgresql",
            Self::Mariadb => "mariadb",
        }
    }
}

/// One `[[application]]` of agent.toml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Application {
    /// What it is.
    pub(crate) kind: Kind,
    /// Its name in records and messages.
    pub(crate) name: String,
    /// The server's data directory: says on which file system it lies, and is compared with what the server says.
    pub(crate) data_dir: PathBuf,
    /// The client program.
    pub(crate) client: PathBuf,
    /// The user of the host that the client runs as.
    pub(crate) run_as: String,
    /// PostgreSQL: the directory of its socket, or a host; MariaDB: its socket.
    pub(crate) socket: String,
    /// PostgreSQL's port.
    pub(crate) port: u16,
    /// The user of the server.
    pub(crate) user: String,
    /// PostgreSQL: a .pgpass; MariaDB: an option file with a [client] section.
    pub(crate) credentials: Option<PathBuf>,
    /// How long to wait for the server's lock.
    pub(crate) lock_max: Duration,
    /// The agent's file, for the helper's own process.
    pub(crate) config: Option<PathBuf>,
}

impl Application {
    /// As something that the agent calls at freeze and thaw.
    pub(crate) fn hook(&self, root: &Root) -> Hook {
        let mut arguments = Vec::new();
        if let Some(config) = &self.config {
            arguments.extend(["--config".to_owned(), config.display().to_string()]);
        }
        arguments.extend([VERB.to_owned(), self.name.clone()]);
        let mounts = Inventory::mounts(root);
        let mount = std::fs::canonicalize(&self.data_dir)
            .ok()
            .and_then(|path| mount_of(&path, &mounts));
        Hook {
            // Our own binary, also when the file was replaced by an upgrade meanwhile.
            path: PathBuf::from("/proc/self/exe"),
            arguments,
            kind: self.kind.as_str(),
            application: Some(self.name.clone()),
            version: None,
            // Never empty, which would mean "all": a server whose directory is not there is on no LUN.
            mounts: vec![mount.unwrap_or_else(|| self.data_dir.clone())],
        }
    }
}

/// What a helper does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Action {
    /// Would `freeze` work? Prints the server's version.
    Check,
    /// Make the server's files consistent, and keep them so.
    Freeze,
    /// Let it go on.
    Thaw,
    /// Nothing: `thaw` follows.
    Abort,
    /// Keep the lock of `freeze`, in a process of its own.
    Hold,
}

/// Runs a helper. What it prints on standard error is the reason in records and messages.
pub(crate) fn run(config: &Config, name: &str, action: Action) -> anyhow::Result<ExitCode> {
    let found = config.applications.iter().find(|app| app.name == name);
    let result = match found {
        Some(app) => Helper::new(app, config).act(action),
        None => Err(format!("agent.toml has no [[application]] with name = {name:?}")),
    };
    Ok(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            // Nobody can be told that standard error is gone.
            std::io::Write::write_all(&mut std::io::stderr(), format!("{why}\n").as_bytes()).ok();
            ExitCode::FAILURE
        }
    })
}

/// One call of a helper.
struct Helper<'a> {
    app: &'a Application,
    /// Where the files of a hold are.
    run_dir: &'a Path,
    /// The mount points that will be frozen; `None` when called by hand.
    mounts: Option<Vec<PathBuf>>,
    /// How long the lock may last.
    hold_max: Duration,
}

impl<'a> Helper<'a> {
    fn new(app: &'a Application, config: &'a Config) -> Self {
        let mounts = std::env::var_os(hooks::ENV_MOUNTS);
        let mounts = mounts.map(|mounts| mounts.to_string_lossy().lines().map(PathBuf::from).collect());
        let hold = std::env::var(hooks::ENV_HOLD_MS).ok();
        let hold = hold
            .and_then(|ms| ms.parse().ok())
            .map_or(HOLD_DEFAULT, Duration::from_millis);
        Self {
            app,
            run_dir: &config.run_dir,
            mounts,
            // The other hooks have their turn before the hold begins.
            hold_max: hold + config.hook_time_max,
        }
    }

    fn act(&self, action: Action) -> Result<(), String> {
        match (action, self.app.kind) {
            (Action::Check, Kind::Postgresql) => postgresql::check(self).and_then(|version| say(&version)),
            (Action::Check, Kind::Mariadb) => mariadb::check(self).and_then(|version| say(&version)),
            (Action::Freeze, Kind::Postgresql) => postgresql::freeze(self),
            (Action::Freeze, Kind::Mariadb) => hold::start(self),
            (Action::Thaw, Kind::Postgresql) => postgresql::thaw(self),
            (Action::Thaw, Kind::Mariadb) => hold::end(self),
            (Action::Hold, Kind::Mariadb) => hold::serve(self, mariadb::lock, mariadb::unlock),
            (Action::Hold, Kind::Postgresql) | (Action::Abort, _) => Ok(()),
        }
    }

    fn connect(&self) -> Result<client::Client, String> {
        match self.app.kind {
            Kind::Postgresql => postgresql::connect(self.app),
            Kind::Mariadb => mariadb::connect(self.app),
        }
    }

    /// A file of this application in the run directory, which is made if need be.
    fn run_file(&self, suffix: &str) -> Result<PathBuf, String> {
        let dir = self.run_dir;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| format!("{} cannot be made: {error}", dir.display()))?;
        Ok(dir.join(format!("app-{}.{suffix}", self.app.name)))
    }

    /// Every directory of the server has to lie on what will be frozen, or the cut would tear it apart.
    fn on_frozen_mounts(&self, data_dir: &str, others: &[(String, PathBuf)]) -> Result<(), String> {
        let canonical = |path: &Path| {
            std::fs::canonicalize(path)
                .map_err(|error| format!("{} cannot be looked at: {error}", path.display()))
        };
        let (said, meant) = (canonical(Path::new(data_dir))?, canonical(&self.app.data_dir)?);
        if said != meant {
            return Err(format!(
                "the server that answers has its data in {}, not in {}: correct `data_dir` or `socket` in agent.toml",
                said.display(),
                meant.display()
            ));
        }
        let Some(frozen) = &self.mounts else { return Ok(()) };
        let mounts = Inventory::mounts(&Root::real());
        let data = [("its data directory".to_owned(), said)];
        for (what, path) in data.iter().chain(others) {
            let path = canonical(path)?;
            let mount = mount_of(&path, &mounts);
            if !mount.is_some_and(|mount| frozen.contains(&mount)) {
                return Err(format!(
                    "{what} ({}) lies outside of this snapshot: take one of all its LUNs together, or move it",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

fn say(version: &str) -> Result<(), String> {
    crate::report::print(version).map_err(|error| error.to_string())
}

/// The mount point that a path (canonical) lies on.
pub(crate) fn mount_of(path: &Path, mounts: &[Mount]) -> Option<PathBuf> {
    let over = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    // A later mount covers an earlier one at the same place.
    over.max_by_key(|mount| (mount.point.components().count(), mount.id))
        .map(|mount| mount.point.clone())
}

/// When a step that began now has to be done.
fn by(limit: Duration) -> Instant {
    Instant::now() + limit
}

#[cfg(test)]
mod tests;
