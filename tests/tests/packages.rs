//! The agent's Debian package: built from the program under test, unpacked, and run from there.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stillpoint_tests::{run, story};

const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");
const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn the_agents_package_has_all_that_its_service_names() {
    story("agent package", |scratch| {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = tests
            .parent()
            .context("the workspace")?
            .join("agentproto/agent/packaging/deb");
        let printed = run(
            Command::new("bash").arg(script).arg(AGENT).arg(scratch.path()),
            LIMIT,
        )?
        .success()?;
        let package = printed.trim();
        let field = |name: &str| run(Command::new("dpkg-deb").args(["-f", package, name]), LIMIT)?.success();
        ensure!(field("Package")?.trim() == "stillpoint-agent", "{package}");
        let version = run(Command::new(AGENT).arg("--version"), LIMIT)?.success()?;
        ensure!(version.trim().ends_with(field("Version")?.trim()), "{version}");
        let (tree, control) = (scratch.file("tree"), scratch.file("control"));
        run(Command::new("dpkg-deb").args(["-x", package]).arg(&tree), LIMIT)?.success()?;
        run(
            Command::new("dpkg-deb").args(["-e", package]).arg(&control),
            LIMIT,
        )?
        .success()?;
        let conffiles = fs::read_to_string(control.join("conffiles"))?;
        ensure!(
            conffiles.trim() == "/etc/stillpoint-agent/agent.toml",
            "{conffiles}"
        );
        service_names_what_is_there(&tree)?;
        // The packaged file is what the packaged program reads; no agent runs, which `status` says by 4.
        let mut status = Command::new(tree.join("usr/bin/stillpoint-agent"));
        status
            .arg("--config")
            .arg(tree.join("etc/stillpoint-agent/agent.toml"));
        status
            .arg("--state-dir")
            .arg(scratch.file("state"))
            .args(["status", "--json"]);
        let status = run(&mut status, LIMIT)?;
        ensure!(
            status.code == 4 && status.stdout.contains("\"running\": false"),
            "{status:?}"
        );
        let hooks = fs::metadata(tree.join("etc/stillpoint-agent/hooks.d"))?
            .permissions()
            .mode();
        ensure!(hooks & 0o777 == 0o755, "hooks.d has mode {hooks:o}");
        for script in ["postinst", "prerm", "postrm"] {
            run(Command::new("sh").arg("-n").arg(control.join(script)), LIMIT)?.success()?;
        }
        Ok(())
    });
}

fn service_names_what_is_there(tree: &Path) -> Result<()> {
    let unit = fs::read_to_string(tree.join("lib/systemd/system/stillpoint-agent.service"))?;
    let mut programs = 0;
    for line in unit.lines().filter(|line| line.starts_with("Exec")) {
        let (_, command) = line.split_once('=').context("a setting")?;
        let program = command
            .trim_start_matches('-')
            .split(' ')
            .next()
            .context("a program")?;
        let path = tree.join(program.trim_start_matches('/'));
        ensure!(
            fs::metadata(&path)?.permissions().mode() & 0o111 != 0,
            "{} does not run",
            path.display()
        );
        programs += 1;
    }
    // It thaws whatever ended it.
    ensure!(programs == 2 && unit.contains("ExecStopPost"), "{unit}");
    // A mount namespace of its own would hide file systems from it.
    for setting in ["PrivateTmp=y", "ProtectSystem=", "ProtectHome=", "PrivateMounts="] {
        ensure!(!unit.lines().any(|line| line.starts_with(setting)), "{setting}");
    }
    Ok(())
}
