//! Real databases on a LUN, under a write load: an application-consistent snapshot that starts and has every acknowledged commit,
//! a crash-consistent one beside it, and a server that is stopped, refuses, hangs, or whose agent is killed while it is locked.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use stillpoint_tests::{AgentHost, Database, Running, Scratch, Server, Writer, run, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");

const LIMIT: Duration = Duration::from_secs(60);

/// A password that the server does not know.
const WRONG: &str = "correct-horse-battery";

/// Gives the story time, between the arrival of Freeze and the helper's lock.
const SLOW_HOOK: &str = "#!/bin/sh\n[ \"$1\" = freeze ] && [ -e $DIR/slow ] || exit 0\ntouch $DIR/freezing\nuntil [ ! -e $DIR/freezing ]; do sleep 0.02; done\n";

/// A server with its data on a LUN of a daemon, an agent that knows it, and a writer. The order is that of the end.
struct Scene {
    writer: Option<Writer>,
    server: Option<Server>,
    host: AgentHost,
    database: Database,
}

impl Scene {
    fn open(scratch: &Scratch, database: Database) -> Result<Self> {
        let host = AgentHost::new(scratch, BINARY, AGENT)?;
        let data = host.point().join("data");
        database.create(host.dir(), &data)?;
        let server = Server::start(database, host.dir(), &data, "server")?;
        let writer = Writer::start(&server)?;
        host.hook("10-slow", SLOW_HOOK, None)?;
        let application = format!(
            "[[application]]\nkind = \"{}\"\nname = \"shop\"\ndata_dir = \"{}\"\nclient = \"{}\"\nrun_as = \"0\"\n\
             socket = \"{}\"\nlock_s_max = 2\ncredentials = \"{}\"\n",
            database.kind(),
            data.display(),
            database.client_script(host.dir())?.display(),
            server.socket().display(),
            host.dir().join("credentials").display(),
        );
        let mut scene = Self {
            writer: Some(writer),
            server: Some(server),
            host,
            database,
        };
        scene.password("")?;
        scene.host.enrol(&application)?;
        scene.writer()?.wait_for_more(50)?;
        Ok(scene)
    }

    fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().context("the writer has ended")
    }

    fn server(&self) -> Result<&Server> {
        self.server.as_ref().context("the server has ended")
    }

    /// What the agent's client will log in with.
    fn password(&self, password: &str) -> Result<()> {
        let file = self.host.dir().join("credentials");
        fs::write(&file, format!("[client]\npassword = \"{password}\"\n"))?;
        let user = self.database.user();
        std::os::unix::fs::chown(&file, Some(user), Some(user))?;
        Ok(fs::set_permissions(
            &file,
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )?)
    }

    /// An application-consistent snapshot is refused for this reason.
    fn ensure_refused(&self, reason: &str) -> Result<()> {
        let create = ["snapshot", "create", "app", "--consistency", "application"];
        let error = self.host.daemon.refused(3, &create)?;
        println!("refused: {}", error["message"]);
        ensure!(error.to_string().contains(reason), "{reason:?} is not in {error}");
        Ok(())
    }

    /// Starts a server over a mounted snapshot: what it has of the writer's numbers, how long it took.
    fn look_into(&self, name: &str) -> Result<u64> {
        let export = self.host.look_into(name)?;
        let data = export.point().join("data");
        // The first server runs beside it on this host, and PostgreSQL would take its process for an owner of the copy.
        fs::remove_file(data.join("postmaster.pid")).ok();
        let server = Server::start(self.database, self.host.dir(), &data, &format!("look-{name}"))?;
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
    let ready = scene.host.daemon.json(&["lun", "preflight", "app"])?;
    ensure!(ready["ready"] == true, "{ready}");
    let app = &ready["agents"][0]["apps"][0];
    ensure!(
        app["kind"] == scene.database.kind() && app["instance"] == "shop",
        "{ready}"
    );
    let before = scene.writer()?.acknowledged();
    let created = scene.host.create("app", &["--consistency", "application"])?;
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
    scene.host.create("crash", &["--consistency", "crash"])?;
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
    fs::write(scene.host.dir().join("slow"), "")?;
    let create = [
        "--json",
        "snapshot",
        "create",
        "app",
        "--consistency",
        "application",
    ];
    let mut command = Command::new(BINARY);
    command
        .arg("--config")
        .arg(scene.host.daemon.config())
        .args(create);
    let mut creating = Running::start(
        "snapshot create",
        &mut command,
        &scene.host.dir().join("create.log"),
    )?;
    wait_until("the freeze hooks", LIMIT, || {
        Ok(scene.host.dir().join("freezing").exists())
    })?;
    scene.host.proxy.hold();
    fs::remove_file(scene.host.dir().join("slow"))?;
    fs::remove_file(scene.host.dir().join("freezing"))?;
    let mark = scene.host.dir().join("agent-run/app-shop.frozen");
    wait_until("the server to be locked", LIMIT, || Ok(mark.exists()))?;
    scene.host.agent()?.signal(Signal::KILL)?;
    scene.writer()?.wait_for_more(20)?;
    wait_until("the helper to be told to go on", LIMIT, || Ok(!mark.exists()))?;
    scene.host.proxy.let_go();
    let code = creating.wait(LIMIT)?;
    ensure!(code == 3, "exit code {code}: {}", creating.output());
    scene.host.start_agent()
}

/// A server that was stopped, in an orderly way, takes no part: refused, or `filesystem` with the exclusion named.
fn server_stopped(scene: &mut Scene) -> Result<()> {
    let acknowledged = scene.writer.take().context("the writer")?.finish()?;
    scene.server.take().context("the server has ended")?.stop()?;
    scene.ensure_refused("shop")?;
    let options = ["--consistency", "application", "--on-failure", "crash-consistent"];
    let created = scene.host.create("stopped", &options)?;
    ensure!(created["consistency"] == "filesystem", "{created}");
    let shown = scene.host.daemon.json(&["snapshot", "show", "app@stopped"])?;
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
        let server = scene.server()?;
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
        scene.password(WRONG)?;
        scene.ensure_refused("Access denied")?;
        // The password went from its file to the client, and nowhere else.
        let events = scene.host.daemon.text(&["events", "--json"])?;
        for (what, text) in [
            ("the agent's log", scene.host.agent()?.output()),
            ("the daemon's log", scene.host.daemon.log()),
            ("events", events),
        ] {
            ensure!(
                !text.contains(WRONG) && !text.is_empty(),
                "the password is in {what}"
            );
        }
        scene.password("")?;
        another_backup_holds_the_lock(&scene)?;
        locks_end_by_themselves(&scene)?;
        server_stopped(&mut scene)
    });
}

/// Somebody else's `BACKUP STAGE`: ours waits for its time, and gives up.
fn another_backup_holds_the_lock(scene: &Scene) -> Result<()> {
    let server = scene.server()?;
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
    let created = scene.host.create("beside", &options)?;
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
        let mut command = scene.host.agent_command();
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
        let own =
            line.contains(&scene.host.dir().display().to_string()) && line.contains("application shop hold");
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
