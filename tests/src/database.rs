//! Real PostgreSQL and MariaDB servers, and a writer that knows which of its commits were acknowledged.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::process::{Running, run, wait_until};
use crate::tools::database_tool;

/// Initialising, starting (with recovery) and stopping a server on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
/// One statement.
const ASK_LIMIT: Duration = Duration::from_secs(30);

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Database {
    /// PostgreSQL 15.
    PostgreSql,
    /// MariaDB 10.11.
    MariaDb,
}

impl Database {
    /// As the agent calls it.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::PostgreSql => "postgresql",
            Self::MariaDb => "mariadb",
        }
    }

    /// The numeric user of its files and processes.
    #[must_use]
    pub fn user(self) -> u32 {
        match self {
            Self::PostgreSql => 26,
            Self::MariaDb => 27,
        }
    }

    /// Its superuser's name.
    #[must_use]
    pub fn superuser(self) -> &'static str {
        match self {
            Self::PostgreSql => "postgres",
            Self::MariaDb => "root",
        }
    }

    fn client_program(self) -> &'static str {
        match self {
            Self::PostgreSql => "/usr/lib/postgresql/15/bin/psql",
            Self::MariaDb => "/usr/bin/mariadb",
        }
    }

    /// Makes an empty database in `data`; `shared` holds everything of the story.
    ///
    /// # Errors
    /// The directory cannot be made, or the server's own program fails.
    pub fn create(self, shared: &Path, data: &Path) -> Result<()> {
        fs::create_dir(data)?;
        chown(data, Some(self.user()), Some(self.user()))?;
        let mut command = match self {
            Self::PostgreSql => {
                let mut command = database_tool(self.user(), shared, "/usr/lib/postgresql/15/bin/initdb")?;
                command.args(["-A", "trust", "-U", "postgres", "-D"]).arg(data);
                command
            }
            Self::MariaDb => {
                let mut command = database_tool(self.user(), shared, "/usr/bin/mariadb-install-db")?;
                command.args([
                    "--no-defaults",
                    "--force",
                    "--skip-name-resolve",
                    "--skip-test-db",
                ]);
                command.arg("--auth-root-authentication-method=normal");
                command.arg(format!("--datadir={}", data.display()));
                command
            }
        };
        run(&mut command, LIMIT)?.success().map(drop)
    }

    /// A client of its own for the agent's configuration: a script that runs the packages' one in their tree.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn client_script(self, shared: &Path) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let command = database_tool(self.user(), shared, self.client_program())?;
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
        let path = shared.join(format!("{}-client", self.kind()));
        fs::write(&path, format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" ")))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }
}

/// A running server. It is killed when dropped.
#[derive(Debug)]
pub struct Server {
    database: Database,
    shared: PathBuf,
    sockets: PathBuf,
    process: Running,
    /// From its start until it answered: recovery, mostly.
    pub ready_after: Duration,
}

impl Server {
    /// Starts the server over `data` and waits until it answers. `name` names its log and its sockets.
    ///
    /// # Errors
    /// It ends, or does not answer in time.
    pub fn start(database: Database, shared: &Path, data: &Path, name: &str) -> Result<Self> {
        let sockets = shared.join(format!("{name}-sockets"));
        fs::create_dir_all(&sockets)?;
        chown(&sockets, Some(database.user()), Some(database.user()))?;
        let mut command = match database {
            Database::PostgreSql => {
                let mut command =
                    database_tool(database.user(), shared, "/usr/lib/postgresql/15/bin/postgres")?;
                command.arg("-D").arg(data);
                for setting in [
                    "listen_addresses=".to_owned(),
                    format!("unix_socket_directories={}", sockets.display()),
                    "shared_buffers=16MB".to_owned(),
                ] {
                    command.arg("-c").arg(setting);
                }
                command
            }
            Database::MariaDb => {
                let mut command = database_tool(database.user(), shared, "/usr/sbin/mariadbd")?;
                command.args([
                    "--no-defaults",
                    "--skip-networking",
                    "--innodb-buffer-pool-size=32M",
                ]);
                command.arg(format!("--datadir={}", data.display()));
                command.arg(format!("--socket={}/sock", sockets.display()));
                command.arg(format!("--pid-file={}/pid", sockets.display()));
                command
            }
        };
        let started = Instant::now();
        let process = Running::start(name, &mut command, &shared.join(format!("{name}.log")))?;
        let mut server = Self {
            database,
            shared: shared.to_owned(),
            sockets,
            process,
            ready_after: Duration::ZERO,
        };
        wait_until("the server to answer", LIMIT, || {
            if let Some(code) = server.process.ended()? {
                anyhow::bail!("{name} ended with {code}:\n{}", server.process.output());
            }
            Ok(server.sql("SELECT 1").is_ok())
        })?;
        server.ready_after = started.elapsed();
        Ok(server)
    }

    /// What the agent's configuration calls `socket`.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        match self.database {
            Database::PostgreSql => self.sockets.clone(),
            Database::MariaDb => self.sockets.join("sock"),
        }
    }

    /// What it printed.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Shuts it down in an orderly way.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(mut self) -> Result<()> {
        self.process.signal(if self.database == Database::PostgreSql {
            Signal::INT
        } else {
            Signal::TERM
        })?;
        self.process.wait(LIMIT).map(drop)
    }

    /// A client of it that reads statements from its standard input.
    ///
    /// # Errors
    /// The packages cannot be fetched.
    pub fn client(&self) -> Result<Command> {
        let mut command = database_tool(self.database.user(), &self.shared, self.database.client_program())?;
        match self.database {
            Database::PostgreSql => {
                command.args([
                    "-X",
                    "-q",
                    "-A",
                    "-t",
                    "-w",
                    "-v",
                    "ON_ERROR_STOP=1",
                    "-U",
                    "postgres",
                ]);
                command.arg("-h").arg(&self.sockets).arg("postgres");
            }
            Database::MariaDb => {
                command.args(["--no-defaults", "--batch", "--skip-column-names", "--unbuffered"]);
                command.args(["--user=root", "--skip-reconnect"]);
                command.arg(format!("--socket={}/sock", self.sockets.display()));
            }
        }
        Ok(command)
    }

    /// Carries out statements; what they print.
    ///
    /// # Errors
    /// One of them fails.
    pub fn sql(&self, text: &str) -> Result<String> {
        let mut command = self.client()?;
        command.arg(if self.database == Database::PostgreSql {
            "-c"
        } else {
            "-e"
        });
        let printed = run(command.arg(text), ASK_LIMIT)?.success()?;
        Ok(printed.trim().to_owned())
    }

    /// The numbers that are there: how many, and the highest.
    ///
    /// # Errors
    /// The table cannot be read.
    pub fn numbers(&self) -> Result<(u64, u64)> {
        let schema = self.schema();
        let printed = self.sql(&format!(
            "SELECT count(*), coalesce(max(n), 0) FROM {schema}numbers"
        ))?;
        let mut numbers = printed.split(['|', '\t']).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(count)), Some(Ok(last))) => Ok((count, last)),
            _ => anyhow::bail!("the server printed {printed:?}"),
        }
    }

    fn schema(&self) -> &'static str {
        match self.database {
            Database::PostgreSql => "",
            Database::MariaDb => "story.",
        }
    }
}

/// Commits 1, 2, 3 … each in a transaction of its own, and notes each once the server acknowledged it.
#[derive(Debug)]
pub struct Writer {
    acknowledged: Arc<AtomicU64>,
    trouble: Arc<Mutex<Option<String>>>,
    stop: Arc<AtomicBool>,
    client: Running,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    /// Makes the table (and keeps the pages of the database dirty), then writes.
    ///
    /// # Errors
    /// The table cannot be made, or the client cannot be started.
    pub fn start(server: &Server) -> Result<Self> {
        let schema = server.schema();
        if server.database == Database::MariaDb {
            server.sql("CREATE DATABASE story")?;
        }
        server.sql(&format!(
            "CREATE TABLE {schema}numbers (n bigint PRIMARY KEY, filler varchar(500))"
        ))?;
        let mut child = server
            .client()?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("the writer's client")?;
        let input = child.stdin.take().context("its input")?;
        let output = child.stdout.take().context("its output")?;
        let acknowledged: Arc<AtomicU64> = Arc::default();
        let (trouble, stop): (Arc<Mutex<Option<String>>>, Arc<AtomicBool>) = Default::default();
        let (count, why, end) = (Arc::clone(&acknowledged), Arc::clone(&trouble), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            if let Err(error) = write(schema, input, output, &count, &end) {
                *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{error:#}"));
            }
        });
        Ok(Self {
            acknowledged,
            trouble,
            stop,
            client: Running::adopt("the writer's client", child),
            thread: Some(thread),
        })
    }

    /// The last number whose commit the server acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits until so many more commits were acknowledged.
    ///
    /// # Errors
    /// They are not, or a commit failed.
    pub fn wait_for_more(&self, count: u64) -> Result<()> {
        let goal = self.acknowledged() + count;
        wait_until("more commits", ASK_LIMIT, || {
            let trouble = self
                .trouble
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            ensure!(trouble.is_none(), "the writer failed: {trouble:?}");
            Ok(self.acknowledged() >= goal)
        })
    }

    /// Ends it.
    ///
    /// # Errors
    /// A commit had failed.
    pub fn finish(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
        let trouble = self
            .trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        ensure!(trouble.is_none(), "the writer failed: {trouble:?}");
        self.client.wait(ASK_LIMIT)?;
        Ok(self.acknowledged())
    }
}

fn write(
    schema: &str,
    mut input: impl Write,
    output: impl std::io::Read,
    acknowledged: &AtomicU64,
    stop: &AtomicBool,
) -> Result<()> {
    let mut output = BufReader::new(output);
    let mut line = String::new();
    for n in 1_u64.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        // Each statement is a transaction; the second one is only answered when the first is committed.
        writeln!(
            input,
            "INSERT INTO {schema}numbers VALUES ({n}, repeat('x', 500));\nSELECT {n};"
        )?;
        input.flush()?;
        line.clear();
        ensure!(output.read_line(&mut line)? > 0, "the server went away at {n}");
        ensure!(line.trim() == n.to_string(), "the server said {line:?} to {n}");
        acknowledged.store(n, Ordering::SeqCst);
    }
    Ok(())
}
