//! Real databases on a LUN, under a write load: an application-consistent snapshot that starts and has every acknowledged commit,
//! a crash-consistent one beside it, and a server that is stopped, refuses, hangs, or whose agent is killed while it is locked.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::{
    Daemon, Database, Export, Proxy, Running, Scratch, Server, Writer, free_port, run, story, wait_until,
};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");

const IQN: &str = "iqn.2026-11.test:db";
const INITIATOR: &str = "iqn.2026-11.test.host:db";
const LIMIT: Duration = Duration::from_secs(60);
const CONFIG: &str = r#"
[[portal]]
address = "127.0.0.1:$PORT"

[[lun]]
name = "db"
size = "1GiB"

[[target]]
iqn = "iqn.2026-11.test:db"
luns = ["db"]
initiators = ["iqn.2026-11.test.host:db"]
agents = true

[agents]
listen = "127.0.0.1:$AGENTS"
"#;

/// Gives the story time, between the arrival of Freeze and the helper's lock.
const SLOW_HOOK: &str = "#!/bin/sh\n[ \"$1\" = freeze ] && [ -e DIR/slow ] || exit 0\ntouch DIR/freezing\nuntil [ ! -e DIR/freezing ]; do sleep 0.02; done\n";

/// A server with its data on a LUN of a daemon, an agent that knows it, and a writer. The order is that of the end.
struct Scene {
    writer: Option<Writer>,
    server: Option<Server>,
    agent: Option<Running>,
    lun: Export,
    daemon: Daemon,
    proxy: Proxy,
    agent_port: u16,
    database: Database,
    dir: PathBuf,
}

impl Scene {
    fn open(scratch: &Scratch, database: Database) -> Result<Self> {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let dir = scratch.path().to_owned();
        // The servers run as users of their own.
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let lun = Export::mount(&dir, "lun", &daemon.portal(), IQN, INITIATOR, true)?;
        let data = lun.point().join("data");
        database.create(&dir, &data)?;
        let server = Server::start(database, &dir, &data, "server")?;
        let writer = Writer::start(&server)?;
        let mut scene = Self {
            writer: Some(writer),
            server: Some(server),
            agent: None,
            lun,
            daemon,
            proxy: Proxy::start()?,
            agent_port: free_port()?,
            database,
            dir,
        };
        scene.proxy.lead_to(scene.agent_port);
        scene.configure()?;
        scene.enrol()?;
        scene.start_agent()?;
        scene.writer()?.wait_for_more(50)?;
        Ok(scene)
    }

    fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().context("the writer has ended")
    }

    fn configure(&self) -> Result<()> {
        let server = self.server.as_ref().context("the server")?;
        let naa = self.daemon.json(&["lun", "show", "db"])?["naa"].to_string();
        let at = |name: &str| self.dir.join(name).display().to_string();
        let hooks = self.dir.join("hooks.d");
        fs::create_dir(&hooks)?;
        let hook = hooks.join("10-slow");
        fs::write(&hook, SLOW_HOOK.replace("DIR", &self.dir.display().to_string()))?;
        fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let text = format!(
            "listen = \"127.0.0.1:{}\"\nadvertise_port = {}\nstate_dir = \"{}\"\nrun_dir = \"{}\"\nhooks_dir = \"{}\"\n\
             min_interval_s = 1\nlog = \"debug\"\ninitiators = [\"{INITIATOR}\"]\n\
             [[application]]\nkind = \"{}\"\nname = \"shop\"\ndata_dir = \"{}\"\nclient = \"{}\"\nrun_as = \"0\"\n\
             socket = \"{}\"\nlock_s_max = 2\ncredentials = \"{}\"\n\
             [[test_lun]]\npath = \"{}\"\nnaa = {naa}\n",
            self.agent_port,
            self.proxy.port(),
            at("agent-state"),
            at("agent-run"),
            hooks.display(),
            self.database.kind(),
            self.lun.point().join("data").display(),
            self.database.client_script(&self.dir)?.display(),
            server.socket().display(),
            at("credentials"),
            self.lun.image().display(),
        );
        fs::write(self.dir.join("agent.toml"), text)?;
        self.password("")
    }

    /// What the agent's client will log in with.
    fn password(&self, password: &str) -> Result<()> {
        let file = self.dir.join("credentials");
        fs::write(&file, format!("[client]\npassword = \"{password}\"\n"))?;
        let user = self.database.user();
        std::os::unix::fs::chown(&file, Some(user), Some(user))?;
        Ok(fs::set_permissions(
            &file,
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )?)
    }

    fn agent_command(&self) -> Command {
        let mut command = Command::new(AGENT);
        command
            .arg("--config")
            .arg(self.dir.join("agent.toml"))
            .env_remove("RUST_LOG");
        command
    }

    fn enrol(&self) -> Result<()> {
        let created = self.daemon.json(&["agent", "token", "create", "--lun", "db"])?;
        let token = created["token"].as_str().context("a token")?;
        let invitation = format!("{token}@127.0.0.1:{}", self.daemon.agent_port());
        run(self.agent_command().args(["enrol", &invitation]), LIMIT)?
            .success()
            .map(drop)
    }

    fn start_agent(&mut self) -> Result<()> {
        let log = self.dir.join("agent.log");
        self.agent = Some(Running::start(
            "stillpoint-agent",
            self.agent_command().arg("run"),
            &log,
        )?);
        wait_until("the agent to be connected", LIMIT, || {
            let agents = self.daemon.json(&["agent", "list"])?;
            Ok(agents[0]["state"] == "connected")
        })
    }

    fn create(&self, name: &str, options: &[&str]) -> Result<Value> {
        self.daemon
            .json(&[&["snapshot", "create", "db", "--name", name], options].concat())
    }

    /// An application-consistent snapshot is refused for this reason, the preflight says so too, and the writer goes on.
    fn ensure_refused(&self, reason: &str) -> Result<()> {
        let create = ["snapshot", "create", "db", "--consistency", "application"];
        let error = self.daemon.refused(3, &create)?;
        println!("refused: {}", error["message"]);
        ensure!(error.to_string().contains(reason), "{reason:?} is not in {error}");
        Ok(())
    }

    /// Starts a server over a mounted snapshot: what it has of the writer's numbers, how long it took.
    fn look_into(&self, name: &str) -> Result<u64> {
        let mount = self.daemon.json(&["snapshot", "mount", &format!("db@{name}")])?;
        let iqn = mount["iqn"].as_str().context("its target")?;
        let point = format!("look-{name}");
        let export = Export::mount(&self.dir, &point, &self.daemon.portal(), iqn, INITIATOR, false)?;
        let data = export.point().join("data");
        // The first server runs beside it on this host, and PostgreSQL would take its process for an owner of the copy.
        fs::remove_file(data.join("postmaster.pid")).ok();
        let server = Server::start(self.database, &self.dir, &data, &point)?;
        let (count, last) = server.numbers()?;
        ensure!(
            count == last,
            "{count} numbers, and the last one is {last}: some are missing"
        );
        println!(
            "{} from snapshot {name}: {last} commits, answers after {:.1} s",
            self.database.kind(),
            server.ready_after.as_secs_f64()
        );
        if self.database == Database::MariaDb {
            let log = server.log();
            let recovery: Vec<_> = log.lines().filter(|line| line.contains("recover")).collect();
            println!("{}", recovery.join("\n"));
        }
        // "needs no long recovery": seconds, on whatever machine, for a database as small as this one.
        ensure!(server.ready_after < LIMIT, "it took {:?}", server.ready_after);
        server.stop()?;
        Ok(last)
    }
}

/// The main job: both kinds of snapshot under load.
fn snapshots_under_load(scene: &Scene) -> Result<()> {
    let ready = scene.daemon.json(&["lun", "preflight", "db"])?;
    ensure!(ready["ready"] == true, "{ready}");
    let app = &ready["agents"][0]["apps"][0];
    ensure!(
        app["kind"] == scene.database.kind() && app["instance"] == "shop",
        "{ready}"
    );
    let before = scene.writer()?.acknowledged();
    let created = scene.create("app", &["--consistency", "application"])?;
    let thawed = scene.writer()?.acknowledged();
    ensure!(created["consistency"] == "application", "{created}");
    let app = &created["agents"][0]["apps"][0];
    ensure!(
        app["state"] == "thawed" && app["kind"] == scene.database.kind(),
        "{created}"
    );
    ensure!(
        app["version"]
            .as_str()
            .is_some_and(|version| version.starts_with("1")),
        "{created}"
    );
    println!("held {} ms", created["agents"][0]["held_ms"]);
    scene.writer()?.wait_for_more(50)?;
    let before_crash = scene.writer()?.acknowledged();
    scene.create("crash", &["--consistency", "crash"])?;
    scene.writer()?.wait_for_more(20)?;
    let last = scene.look_into("app")?;
    ensure!(
        last >= before,
        "{before} was acknowledged before the snapshot, which ends with {last}"
    );
    ensure!(
        last <= thawed + 1,
        "{last} is in the snapshot, and {thawed} was the last when it was done"
    );
    let last = scene.look_into("crash")?;
    ensure!(
        last >= before_crash,
        "{before_crash} was acknowledged, the crash-consistent snapshot ends with {last}"
    );
    Ok(())
}

/// The agent is killed while the server is locked and its file system frozen, and the target's word does not come through.
fn agent_killed_while_it_holds(scene: &mut Scene) -> Result<()> {
    fs::write(scene.dir.join("slow"), "")?;
    let create = [
        "--json",
        "snapshot",
        "create",
        "db",
        "--consistency",
        "application",
    ];
    let mut command = Command::new(BINARY);
    command.arg("--config").arg(scene.daemon.config()).args(create);
    let mut creating = Running::start("snapshot create", &mut command, &scene.dir.join("create.log"))?;
    wait_until("the freeze hooks", LIMIT, || {
        Ok(scene.dir.join("freezing").exists())
    })?;
    scene.proxy.hold();
    fs::remove_file(scene.dir.join("slow"))?;
    fs::remove_file(scene.dir.join("freezing"))?;
    let mark = scene.dir.join("agent-run/app-shop.frozen");
    wait_until("the server to be locked", LIMIT, || Ok(mark.exists()))?;
    scene.agent.as_ref().context("the agent")?.signal(Signal::KILL)?;
    scene.writer()?.wait_for_more(20)?;
    wait_until("the helper to be told to go on", LIMIT, || Ok(!mark.exists()))?;
    scene.proxy.let_go();
    let code = creating.wait(LIMIT)?;
    ensure!(code == 3, "exit code {code}: {}", creating.output());
    scene.agent = None;
    scene.start_agent()
}

/// A server that was stopped, in an orderly way, takes no part: refused, or `filesystem` with the exclusion named.
fn server_stopped(scene: &mut Scene) -> Result<()> {
    let acknowledged = scene.writer.take().context("the writer")?.finish()?;
    scene.server.take().context("the server")?.stop()?;
    scene.ensure_refused("shop")?;
    let options = ["--consistency", "application", "--on-failure", "crash-consistent"];
    let created = scene.create("stopped", &options)?;
    ensure!(created["consistency"] == "filesystem", "{created}");
    let shown = scene.daemon.json(&["snapshot", "show", "db@stopped"])?;
    let exclusion = &shown["agents"][0]["exclusions"][0];
    ensure!(
        exclusion["kind"] == "application" && exclusion["subject"] == "shop",
        "{shown}"
    );
    let last = scene.look_into("stopped")?;
    ensure!(
        last == acknowledged,
        "{acknowledged} acknowledged, {last} in the snapshot"
    );
    Ok(())
}

#[test]
fn postgresql() {
    story("PostgreSQL on a LUN", |scratch| {
        let mut scene = Scene::open(scratch, Database::PostgreSql)?;
        snapshots_under_load(&scene)?;
        // It accepts connections (the kernel does) and never answers.
        let server = scene.server.as_ref().context("the server")?;
        server.signal(Signal::STOP)?;
        let refused = scene.ensure_refused("postgresql");
        server.signal(Signal::CONT)?;
        refused?;
        scene.writer()?.wait_for_more(20)?;
        // The right to make a checkpoint is asked for beforehand.
        server.sql("CREATE ROLE other SUPERUSER LOGIN; ALTER ROLE postgres NOSUPERUSER")?;
        let refused = scene.ensure_refused("pg_checkpoint");
        run(
            server
                .client()?
                .args(["-U", "other", "-c", "ALTER ROLE postgres SUPERUSER"]),
            LIMIT,
        )?
        .success()?;
        refused?;
        agent_killed_while_it_holds(&mut scene)?;
        server_stopped(&mut scene)
    });
}

#[test]
fn mariadb() {
    story("MariaDB on a LUN", |scratch| {
        let mut scene = Scene::open(scratch, Database::MariaDb)?;
        snapshots_under_load(&scene)?;
        agent_killed_while_it_holds(&mut scene)?;
        scene.password("wrong")?;
        scene.ensure_refused("Access denied")?;
        scene.password("")?;
        another_backup_holds_the_lock(&scene)?;
        locks_end_by_themselves(&scene)?;
        server_stopped(&mut scene)
    });
}

/// Somebody else's `BACKUP STAGE`: ours waits for its time, and gives up.
fn another_backup_holds_the_lock(scene: &Scene) -> Result<()> {
    let server = scene.server.as_ref().context("the server")?;
    let mut client = server
        .client()?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = client.stdin.take().context("its input")?;
    let other = Running::adopt("another backup", client);
    std::io::Write::write_all(&mut input, b"BACKUP STAGE START;\n")?;
    wait_until("the other backup", LIMIT, || {
        let locks =
            server.sql("SELECT count(*) FROM information_schema.processlist WHERE command = 'Sleep'")?;
        Ok(locks != "0")
    })?;
    scene.ensure_refused("Lock wait timeout")?;
    let options = ["--consistency", "application", "--on-failure", "crash-consistent"];
    let created = scene.create("beside", &options)?;
    ensure!(created["consistency"] == "filesystem", "{created}");
    let app = &created["agents"][0]["apps"][0];
    ensure!(
        app["state"] == "failed" && app["error"].to_string().contains("Lock wait"),
        "{created}"
    );
    drop(input);
    drop(other);
    scene.writer()?.wait_for_more(20)
}

/// A lock that nobody releases ends with its time, and with its process; its thaw then says that it did not last.
fn locks_end_by_themselves(scene: &Scene) -> Result<()> {
    let helper = |verb: &str| {
        let mut command = scene.agent_command();
        command.args(["application", "shop", verb]);
        command
    };
    run(&mut helper("freeze"), LIMIT)?.success()?;
    let before = scene.writer()?.acknowledged();
    let second = run(&mut helper("freeze"), LIMIT)?;
    ensure!(
        second.code == 1 && second.stderr.contains("another snapshot holds"),
        "{second:?}"
    );
    ensure!(
        scene.writer()?.acknowledged() <= before + 1,
        "commits went on under the lock"
    );
    run(&mut helper("thaw"), LIMIT)?.success()?;
    scene.writer()?.wait_for_more(20)?;
    let mut freeze = helper("freeze");
    run(freeze.env("STILLPOINT_HOLD_MS", "200"), LIMIT)?.success()?;
    // `hook_s_max` (30 s by default) is part of a lock's time; its process can be ended at once.
    let holder = fs::read_dir("/proc")?.flatten().find_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let own = line.contains(&scene.dir.display().to_string()) && line.contains("application shop hold");
        entry.file_name().to_str().filter(|_| own)?.parse::<i32>().ok()
    });
    let holder = holder
        .and_then(rustix::process::Pid::from_raw)
        .context("the lock's process")?;
    rustix::process::kill_process(holder, Signal::KILL)?;
    scene.writer()?.wait_for_more(20)?;
    let thaw = run(&mut helper("thaw"), LIMIT)?;
    ensure!(
        thaw.code == 1 && thaw.stderr.contains("given up before the thaw"),
        "{thaw:?}"
    );
    Ok(())
}
