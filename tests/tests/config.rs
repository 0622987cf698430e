//! The config file: what is refused and how, what a reload changes and whom it leaves alone, who may log in.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use stillpoint_tests::{
    Daemon, Scratch, free_port, qemu_img, qemu_io, qemu_session, run, story, tool, wait_until,
};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const LIMIT: Duration = Duration::from_secs(30);

fn lun(name: &str, size: &str) -> String {
    format!(
        "[[lun]]\nname = \"{name}\"\nsize = \"{size}\"\n\
         [[target]]\niqn = \"iqn.2026-11.test:{name}\"\nluns = [\"{name}\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n"
    )
}

const PORTAL: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n";

#[test]
fn every_error_is_listed_with_its_line() {
    story("config errors", |scratch| {
        let text = "[daemon]\ndata_dir = \"data\"\ncolour = \"blue\"\n\
                    [[lun]]\nname = \"a\"\nsize = \"10 parsecs\"\n\
                    [[lun]]\nname = \"b\"\nsize = \"1GiB\"\nblock_size = 520\n\
                    [[lun]]\nname = \"c\"\nsize = \"1GiB\"\n\
                    [[target]]\niqn = \"not an iqn\"\nluns = [\"a\"]\n\
                    [[target]]\niqn = \"iqn.2026-11.test:b\"\nluns = [\"b\", \"c\", \"missing\"]\nagents = true\n\
                    [target.chap]\nuser = \"u\"\nsecret_file = \"nowhere\"\n";
        let file = scratch.file("wrong.toml");
        fs::write(&file, text)?;
        let finished = run(Command::new(BINARY).args(["config", "check"]).arg(&file), LIMIT)?;
        ensure!(finished.code == 1, "exit code {}", finished.code);
        let shown = finished.stderr;
        let lines: Vec<&str> = text.lines().collect();
        for wrong in ["colour", "parsecs", "520", "not an iqn", "missing", "nowhere"] {
            let line = lines
                .iter()
                .position(|line| line.contains(wrong))
                .context("a line of the text")?
                + 1;
            ensure!(
                shown.contains(&format!("wrong.toml:{line}:")),
                "{wrong} in line {line} was not found:\n{shown}"
            );
        }
        ensure!(shown.contains("chap") && shown.contains("agents"), "{shown}");
        ensure!(!scratch.file("data").exists(), "a check made a data directory");

        let serve = run(Command::new(BINARY).args(["serve", "--config"]).arg(&file), LIMIT)?;
        ensure!(
            serve.code != 0 && serve.stderr.contains("parsecs"),
            "{}",
            serve.stderr
        );
        let none = run(
            Command::new(BINARY).args(["serve", "--config", "/nowhere/at.toml"]),
            LIMIT,
        )?;
        ensure!(
            none.code != 0 && none.stderr.contains("/nowhere/at.toml"),
            "{}",
            none.stderr
        );
        Ok(())
    });
}

#[test]
fn a_thousand_targets_start_and_come_back() {
    story("a thousand targets", |scratch| {
        let luns: String = (0..1000)
            .map(|number| lun(&format!("l{number}"), "1GiB"))
            .collect();
        // Within the harness's limit for a start; work that grows with the cube of their number does not end in it.
        let mut daemon = Daemon::start(BINARY, scratch, &format!("{PORTAL}{luns}"))?;
        let names = daemon.json(&["lun", "list"])?;
        ensure!(names.as_array().is_some_and(|luns| luns.len() == 1000), "{names}");
        daemon.stop()?;
        daemon.resume()?;
        let last = daemon.url("iqn.2026-11.test:l999", 0);
        qemu_io(&last, &["write -P 7 0 64k", "read -P 7 0 64k"])?.success()?;
        Ok(())
    });
}

#[test]
fn reload_leaves_other_sessions_alone() {
    story("reload under a live session", |scratch| {
        let (one, two) = (lun("one", "64MiB"), lun("two", "64MiB"));
        let daemon = Daemon::start(BINARY, scratch, &[PORTAL, &one, &two].concat())?;
        let url = daemon.url("iqn.2026-11.test:one", 0);
        let _session = qemu_session(scratch, "one", &url)?;
        wait_until("the session", LIMIT, || Ok(sessions(&daemon)?.len() == 1))?;
        let before = sessions(&daemon)?;

        // Add one, grow one, take one away.
        let (grown, three) = (lun("one", "128MiB"), lun("three", "32MiB"));
        daemon.write_config(&[PORTAL, &grown, &three].concat())?;
        let plan = daemon.text(&["config", "plan"])?;
        ensure!(
            ["one", "two", "three"].iter().all(|name| plan.contains(name)),
            "{plan}"
        );
        ensure!(
            daemon
                .json(&["lun", "list"])?
                .as_array()
                .is_some_and(|luns| luns.len() == 2),
            "a plan changed something"
        );
        daemon.text(&["config", "apply", "--yes"])?;
        ensure!(
            sessions(&daemon)? == before,
            "the session of an unaffected target was touched"
        );
        ensure!(
            daemon.json(&["lun", "show", "one"])?["size_bytes"] == 128 << 20,
            "LUN one did not grow"
        );
        qemu_io(
            &daemon.url("iqn.2026-11.test:three", 0),
            &["write -P 3 0 1M", "read -P 3 0 1M"],
        )?
        .success()?;
        qemu_io(&url, &["write -P 1 100M 1M"])?.success()?;
        ensure!(
            qemu_img(&["info", "-f", "raw", &daemon.url("iqn.2026-11.test:two", 0)])?.code != 0,
            "target two is still there"
        );
        let unassigned = daemon.json(&["volume", "list"])?.to_string();
        ensure!(
            unassigned.contains("two"),
            "the volume of a LUN that left the file must stay: {unassigned}"
        );

        // SIGHUP does the same.
        let shared =
            "[[target]]\niqn = \"iqn.2026-11.test:again\"\nluns = [\"three\"]\ninitiators = [\"*\"]\n";
        daemon.write_config(&[PORTAL, &grown, &three, shared].concat())?;
        daemon.signal(Signal::HUP)?;
        wait_until("target `again`", LIMIT, || {
            Ok(qemu_img(&["info", "-f", "raw", &daemon.url("iqn.2026-11.test:again", 0)])?.code == 0)
        })?;
        ensure!(sessions(&daemon)? == before, "SIGHUP touched the session");

        // A file with a mistake changes nothing, and neither does shrinking.
        daemon.write_config(&[PORTAL, &lun("one", "64MiB"), &three].concat())?;
        let refusal = daemon.refused(3, &["config", "apply", "--yes"])?;
        ensure!(refusal.to_string().contains("one"), "{refusal}");
        daemon.write_config(&[PORTAL, "[[lun]]\nname = 7\n"].concat())?;
        ensure!(
            daemon.cli(&["config", "apply", "--yes"])?.code != 0,
            "a broken file was applied"
        );
        daemon.signal(Signal::HUP)?;
        ensure!(
            daemon.json(&["lun", "show", "one"])?["size_bytes"] == 128 << 20,
            "a refused file changed something"
        );
        ensure!(sessions(&daemon)? == before, "a refused file touched the session");
        Ok(())
    });
}

fn sessions(daemon: &Daemon) -> Result<Vec<String>> {
    let list = daemon.json(&["session", "list"])?;
    let mut ids: Vec<String> = list
        .as_array()
        .into_iter()
        .flatten()
        .map(|s| s["id"].to_string())
        .collect();
    ids.sort();
    Ok(ids)
}

#[test]
fn a_renamed_lun_does_not_appear_as_an_empty_disk() {
    story("unassigned volumes", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, &[PORTAL, &lun("accounts", "32MiB")].concat())?;
        qemu_io(
            &daemon.url("iqn.2026-11.test:accounts", 0),
            &["write -P 0x77 0 1M"],
        )?
        .success()?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");

        daemon.write_config(&[PORTAL, &lun("acounts", "32MiB")].concat())?;
        let (_, said) = daemon.refuses_to_start()?;
        for word in ["accounts", "acounts", "volume rename", "config apply"] {
            ensure!(said.contains(word), "the refusal does not name `{word}`: {said}");
        }

        // The way out that the refusal names, with the daemon stopped: the volume gets the LUN's new name.
        daemon.text(&["volume", "rename", "accounts", "acounts"])?;
        daemon.resume()?;
        qemu_io(&daemon.url("iqn.2026-11.test:acounts", 0), &["read -P 0x77 0 1M"])?.success()?;
        daemon.write_config(PORTAL)?;
        daemon.text(&["config", "apply", "--yes"])?;
        let left = volume(&daemon, "acounts")?;
        ensure!(left["state"] == "unassigned", "{left}");
        daemon.text(&["volume", "rename", "acounts", "ledger"])?;
        daemon.write_config(&[PORTAL, &lun("ledger", "32MiB")].concat())?;
        daemon.text(&["config", "apply", "--yes"])?;
        qemu_io(&daemon.url("iqn.2026-11.test:ledger", 0), &["read -P 0x77 0 1M"])?.success()?;

        // Deleting asks; a volume in use is never deleted.
        daemon.refused(3, &["volume", "delete", "ledger", "--yes"])?;
        daemon.write_config(PORTAL)?;
        daemon.text(&["config", "apply", "--yes"])?;
        ensure!(
            daemon.cli(&["volume", "delete", "ledger"])?.code != 0,
            "deleted without a question"
        );
        daemon.text(&["volume", "delete", "ledger", "--yes"])?;
        ensure!(
            daemon
                .json(&["volume", "list"])?
                .as_array()
                .is_some_and(Vec::is_empty),
            "the volume is still there"
        );
        Ok(())
    });
}

fn volume(daemon: &Daemon, name: &str) -> Result<serde_json::Value> {
    let list = daemon.json(&["volume", "list"])?;
    let found = list
        .as_array()
        .into_iter()
        .flatten()
        .find(|volume| volume["name"] == name);
    found
        .cloned()
        .with_context(|| format!("no volume {name} in {list}"))
}

#[test]
fn access_lists_and_portals() {
    story("access lists, IPv6, discovery", |scratch| {
        let only = "iqn.2026-11.test.host:friend";
        let daemon = Daemon::start(
            BINARY,
            scratch,
            &format!(
                "{PORTAL}[[portal]]\naddress = \"[::1]:$PORT2\"\ngroup = 2\n\
                 [[lun]]\nname = \"open\"\nsize = \"16MiB\"\n[[lun]]\nname = \"far\"\nsize = \"16MiB\"\n[[lun]]\nname = \"shut\"\nsize = \"16MiB\"\n\
                 [[target]]\niqn = \"iqn.2026-11.test:open\"\nluns = [\"open\"]\nportal_groups = [1, 2]\ninitiators = [\"{only}\"]\n\
                 [[target]]\niqn = \"iqn.2026-11.test:far\"\nluns = [\"far\"]\ninitiators = [\"*\"]\nallow_from = [\"192.0.2.0/24\"]\n\
                 [[target]]\niqn = \"iqn.2026-11.test:shut\"\nluns = [\"shut\"]\n"
            ),
        )?;
        let inquiry = |portal: &str, iqn: &str, initiator: &str| {
            run(
                tool("iscsi-inq")?
                    .args(["-i", initiator])
                    .arg(format!("iscsi://{portal}/{iqn}/0")),
                LIMIT,
            )
        };
        let v6 = format!("[::1]:{}", daemon.second_port());
        for portal in [daemon.portal(), v6.clone()] {
            let printed = inquiry(&portal, "iqn.2026-11.test:open", only)?.success()?;
            ensure!(
                printed.contains("STILLPNT") && printed.contains("VIRTUAL DISK"),
                "{printed}"
            );
            ensure!(
                inquiry(&portal, "iqn.2026-11.test:open", "iqn.2026-11.test.host:stranger")?.code != 0,
                "a stranger got in"
            );
            ensure!(
                inquiry(&portal, "iqn.2026-11.test:far", only)?.code != 0,
                "allow_from does not count"
            );
            ensure!(
                inquiry(&portal, "iqn.2026-11.test:shut", only)?.code != 0,
                "an empty list must mean nobody"
            );
        }
        let listed = run(
            tool("iscsi-ls")?
                .args(["-i", only])
                .arg(format!("iscsi://{}", daemon.portal())),
            LIMIT,
        )?;
        let listed = listed.success()?;
        ensure!(listed.contains("iqn.2026-11.test:open"), "discovery: {listed}");
        ensure!(
            !listed.contains("iqn.2026-11.test:shut"),
            "discovery shows what nobody may use: {listed}"
        );
        ensure!(
            listed.contains(&v6) && listed.contains(&daemon.portal()),
            "discovery does not list both portals: {listed}"
        );
        // A target that anyone may use is worth a warning.
        let status = daemon.text(&["status"])?;
        ensure!(
            status.contains("iqn.2026-11.test:far"),
            "status does not warn about `*`: {status}"
        );
        Ok(())
    });
}

#[test]
fn embedded_default_serves_a_demo() {
    story("embedded default", embedded_default);
}

fn embedded_default(scratch: &Scratch) -> Result<()> {
    let port = free_port()?;
    let iqn = "iqn.2026-11.io.stillpoint:demo";
    let mut command = Command::new(BINARY);
    command
        .args(["serve", "--listen", &format!("127.0.0.1:{port}")])
        .current_dir(scratch.path());
    let mut serve = stillpoint_tests::Running::start("serve", &mut command, &scratch.file("serve.log"))?;
    let url = format!("iscsi://127.0.0.1:{port}/{iqn}/0");
    wait_until("the demo", LIMIT, || {
        ensure!(serve.ended()?.is_none(), "it ended: {}", serve.output());
        Ok(qemu_img(&["info", "-f", "raw", &url])?.code == 0)
    })?;
    qemu_io(&url, &["write -P 9 0 1M", "read -P 9 0 1M"])?.success()?;
    let said = serve.output();
    for word in [iqn, "iscsiadm", "Windows", "ESXi"] {
        ensure!(
            said.contains(word),
            "the start does not say how to connect ({word}): {said}"
        );
    }
    // The CLI finds the demo's socket by itself in the same directory.
    let status = run(
        Command::new(BINARY).args(["status"]).current_dir(scratch.path()),
        LIMIT,
    )?
    .success()?;
    ensure!(status.contains("demo"), "{status}");
    ensure!(
        scratch.file("stillpoint-data").is_dir(),
        "the data is not where it should be"
    );
    serve.signal(Signal::TERM)?;
    ensure!(serve.wait(LIMIT)? == 0, "SIGTERM must end it with 0");
    Ok(())
}
