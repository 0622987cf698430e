//! The contract of the commands: names, JSON shapes, exit codes (0 done, 1 failed, 2 usage, 3 refused, 4 unreachable).

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{Daemon, qemu_io, qemu_session, run, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const LIMIT: Duration = Duration::from_secs(30);
const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
    [[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n\
    [[lun]]\nname = \"app\"\nsize = \"64MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 2\n\
    [[target]]\niqn = \"iqn.2026-11.test:app\"\nluns = [\"app\"]\ninitiators = [\"*\"]\nagents = true\n\
    [agents]\nlisten = \"127.0.0.1:$AGENTS\"\n";

fn list(value: &Value) -> Result<&Vec<Value>> {
    value
        .as_array()
        .with_context(|| format!("a list was promised: {value}"))
}

#[test]
fn every_verb_prints_its_shape() {
    story("CLI shapes", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        ensure!(daemon.json(&["status"])?.is_object(), "status");
        for empty in [
            &["session", "list"][..],
            &["snapshot", "list"],
            &["agent", "list"],
            &["schedule", "list"],
        ] {
            // Not every build serves schedules; the others must be empty lists, not nothing.
            let finished = daemon.cli(&[empty, &["--json"]].concat())?;
            if empty.first() == Some(&"schedule") && finished.code != 0 {
                continue;
            }
            ensure!(finished.stdout.trim() == "[]", "{empty:?}: {finished:?}");
        }
        let luns = daemon.json(&["lun", "list"])?;
        ensure!(list(&luns)?.len() == 2, "{luns}");
        for lun in list(&luns)? {
            ensure!(lun["size_bytes"] == 64 << 20 && lun["name"].is_string(), "{lun}");
        }
        let shown = daemon.json(&["lun", "show", "disk"])?;
        ensure!(
            shown["name"] == "disk" && shown["size_bytes"] == 64 << 20,
            "{shown}"
        );
        ensure!(
            shown.to_string().contains("naa."),
            "lun show names the identity: {shown}"
        );
        ensure!(
            list(&daemon.json(&["volume", "list"])?)?.len() == 2,
            "volume list"
        );
        ensure!(
            !list(&daemon.json(&["events"])?)?.is_empty(),
            "a start is an event"
        );
        ensure!(daemon.json(&["store", "stats"])?.is_object(), "store stats");
        // Global options stand before or after the verb, and people get tables.
        let before = daemon.text(&["--json", "lun", "list"])?;
        ensure!(
            serde_json::from_str::<Value>(&before).is_ok_and(|value| value == luns),
            "{before}"
        );
        let table = daemon.text(&["lun", "list"])?;
        ensure!(
            table.contains("disk") && table.contains("64 MiB") || table.contains("64MiB"),
            "{table}"
        );
        Ok(())
    });
}

#[test]
fn exit_codes_and_errors() {
    story("CLI exit codes", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        for wrong in [
            &["frobnicate"][..],
            &["lun", "show"],
            &["snapshot", "create", "disk", "--consistency", "magic"],
        ] {
            ensure!(daemon.cli(wrong)?.code == 2, "{wrong:?} must be a usage error");
        }
        daemon.refused(1, &["lun", "show", "nowhere"])?;
        daemon.refused(1, &["snapshot", "show", "disk@nowhere"])?;
        // Rules.
        // A report, not an error: on standard output, and the exit code says the rest.
        for (lun, code) in [("app", "not_mounted"), ("disk", "not_allowed")] {
            let report = daemon.cli(&["lun", "preflight", lun, "--json"])?;
            ensure!(report.code == 3 && report.stderr.is_empty(), "{report:?}");
            let report: Value = serde_json::from_str(&report.stdout)?;
            ensure!(report["ready"] == false && report["lun"] == lun, "{report}");
            let found = list(&report["findings"])?;
            ensure!(found.iter().any(|finding| finding["code"] == code), "{report}");
        }
        daemon.refused(2, &["lun", "preflight", "app", "--consistency", "crash"])?;
        daemon.refused(1, &["lun", "preflight", "nope"])?;
        let refusal = daemon.refused(3, &["agent", "token", "create", "--lun", "disk"])?;
        ensure!(
            refusal["message"]
                .as_str()
                .is_some_and(|text| text.contains("agents")),
            "{refusal}"
        );
        for level in ["filesystem", "application"] {
            daemon.refused(3, &["snapshot", "create", "app", "--consistency", level])?;
            daemon.refused(3, &["snapshot", "create", "disk", "--consistency", level])?;
        }
        ensure!(
            list(&daemon.json(&["snapshot", "list"])?)?.is_empty(),
            "a refused snapshot was kept"
        );
        let allowed = [
            "snapshot",
            "create",
            "app",
            "--consistency",
            "application",
            "--on-failure",
            "crash-consistent",
        ];
        let created = daemon.json(&allowed)?;
        ensure!(
            created["consistency"] == "crash" && created["requested"] == "application",
            "{created}"
        );
        // Running and stopped.
        ensure!(
            daemon.cli(&["store", "check"])?.code == 3,
            "store check wants the daemon stopped"
        );
        ensure!(daemon.stop()? == 0, "SIGTERM must end the daemon with 0");
        daemon.refused(4, &["status"])?;
        daemon.refused(4, &["lun", "preflight", "app"])?;
        daemon.refused(4, &["snapshot", "create", "disk"])?;
        daemon.text(&["store", "check"])?;
        Ok(())
    });
}

#[test]
fn tokens_and_secrets_stay_out_of_logs() {
    story("secrets stay out of logs", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let created = daemon.json(&["agent", "token", "create", "--lun", "app", "--ttl", "1m"])?;
        let token = created["token"]
            .as_str()
            .with_context(|| format!("no token in {created}"))?;
        let (_, secret) = token
            .split_once("SP1-")
            .with_context(|| format!("{token} is no token"))?;
        for place in [
            daemon.log(),
            daemon.text(&["events"])?,
            daemon.json(&["agent", "list"])?.to_string(),
        ] {
            ensure!(!place.contains(secret), "the token was written down:\n{place}");
        }
        Ok(())
    });
}

#[test]
fn sessions_are_listed_and_dropped() {
    story("sessions", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let url = daemon.url("iqn.2026-11.test:disk", 0);
        let _session = qemu_session(scratch, "one", &url)?;
        let mut id = String::new();
        wait_until("the session", LIMIT, || {
            let sessions = daemon.json(&["session", "list"])?;
            let Some(session) = list(&sessions)?.first() else {
                return Ok(false);
            };
            ensure!(
                session["initiator"]
                    .as_str()
                    .is_some_and(|name| name.starts_with("iqn.")),
                "{session}"
            );
            ensure!(session["target"] == "iqn.2026-11.test:disk", "{session}");
            id = session["id"]
                .as_str()
                .map_or_else(|| session["id"].to_string(), str::to_owned);
            Ok(true)
        })?;
        daemon.text(&["session", "drop", &id, "--yes"])?;
        // libiscsi comes back by itself, as another session.
        wait_until("the session to be gone", LIMIT, || {
            let sessions = daemon.json(&["session", "list"])?;
            Ok(!list(&sessions)?.iter().any(|s| {
                s["id"]
                    .as_str()
                    .map_or_else(|| s["id"].to_string(), str::to_owned)
                    == id
            }))
        })?;
        ensure!(
            daemon.cli(&["session", "drop", &id, "--yes"])?.code == 1,
            "a session that is gone cannot be dropped"
        );
        ensure!(daemon.stop()? == 0, "SIGTERM with a session logged in");
        Ok(())
    });
}

#[test]
fn offline_store() {
    story("store check, dump, restore", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let url = daemon.url("iqn.2026-11.test:disk", 0);
        qemu_io(&url, &["write -P 0x11 0 4M"])?.success()?;
        daemon.text(&["snapshot", "create", "disk", "--name", "first"])?;
        qemu_io(&url, &["write -P 0x22 1M 1M"])?.success()?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");

        daemon.text(&["store", "check"])?;
        let dump = daemon.text(&["store", "dump"])?;
        ensure!(
            dump.contains("disk") && dump.contains("first"),
            "the dump names neither volume nor snapshot"
        );
        ensure!(
            dump == daemon.text(&["store", "dump"])?,
            "two dumps of one store differ"
        );

        // Bytes gone wrong are found, and a dump brings the metadata back.
        damage(&daemon)?;
        let checked = daemon.cli(&["store", "check"])?;
        ensure!(checked.code == 1, "a damaged store passed: {checked:?}");
        let file = scratch.file("dump.txt");
        std::fs::write(&file, dump)?;
        let file = file.display().to_string();
        ensure!(
            daemon.cli(&["store", "restore", &file])?.code != 0,
            "restored without a question"
        );
        daemon.text(&["store", "restore", &file, "--yes"])?;
        ensure!(
            daemon.data().join("pool/meta.before-restore").exists(),
            "the replaced metadata was not kept"
        );
        daemon.text(&["store", "check"])?;
        daemon.resume()?;
        qemu_io(
            &url,
            &["read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x11 2M 2M"],
        )?
        .success()?;
        ensure!(
            daemon
                .json(&["snapshot", "list", "disk"])?
                .to_string()
                .contains("first"),
            "the snapshot is lost"
        );
        Ok(())
    });
}

/// Turns 4 KiB of the metadata's log over.
fn damage(daemon: &Daemon) -> Result<()> {
    let found = run(
        Command::new("find")
            .arg(daemon.data())
            .args(["-type", "f", "-name", "db"]),
        LIMIT,
    )?
    .success()?;
    let file = std::path::PathBuf::from(
        found
            .lines()
            .next()
            .context("no file `db` of the metadata store")?,
    );
    let mut bytes = std::fs::read(&file)?;
    let turned = bytes
        .iter_mut()
        .filter(|byte| **byte != 0)
        .take(4096)
        .map(|byte| *byte = !*byte)
        .count();
    ensure!(turned > 0, "{} is empty", file.display());
    std::fs::write(&file, bytes).context("damaging the metadata")
}

#[test]
fn completions_and_help() {
    story("help", |_scratch| {
        for words in [&["--help"][..], &["snapshot", "create", "--help"], &["--version"]] {
            let printed = run(Command::new(BINARY).args(words), LIMIT)?.success()?;
            ensure!(!printed.is_empty(), "{words:?} printed nothing");
        }
        Ok(())
    });
}
