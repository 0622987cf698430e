//! The Debian packages: built from the programs under test, unpacked, and run from there.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stillpoint_tests::{Scratch, run, story};

const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");
const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const LIMIT: Duration = Duration::from_secs(180);

/// An unpacked package.
struct Package {
    tree: PathBuf,
    control: PathBuf,
}

impl Package {
    /// Makes the package with `script`, and looks at what it says of itself.
    fn new(scratch: &Scratch, name: &str, script: &str, program: &str) -> Result<Self> {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = tests.parent().context("the workspace")?.join(script);
        let mut make = Command::new("bash");
        make.arg(script).arg(program).arg(scratch.path());
        let printed = run(&mut make, LIMIT)?.success()?;
        let package = printed.trim();
        let field = |name: &str| run(Command::new("dpkg-deb").args(["-f", package, name]), LIMIT)?.success();
        ensure!(field("Package")?.trim() == name, "{package}");
        let version = run(Command::new(program).arg("--version"), LIMIT)?.success()?;
        ensure!(version.trim().ends_with(field("Version")?.trim()), "{version}");
        let contents = run(Command::new("dpkg-deb").args(["--contents", package]), LIMIT)?.success()?;
        for line in contents.lines() {
            ensure!(line.contains(" root/root "), "not root's: {line}");
            let mode = line.split(' ').next().unwrap_or_default();
            // d rwx rwx rwx
            ensure!(
                !mode.get(4..).unwrap_or_default().contains('w'),
                "others may write: {line}"
            );
        }
        let this = Self {
            tree: scratch.file("tree"),
            control: scratch.file("control"),
        };
        run(
            Command::new("dpkg-deb").args(["-x", package]).arg(&this.tree),
            LIMIT,
        )?
        .success()?;
        run(
            Command::new("dpkg-deb").args(["-e", package]).arg(&this.control),
            LIMIT,
        )?
        .success()?;
        for script in ["postinst", "prerm", "postrm"] {
            run(Command::new("sh").arg("-n").arg(this.control.join(script)), LIMIT)?.success()?;
        }
        this.manuals()?;
        Ok(this)
    }

    /// The pages that the unit points at are there, whole.
    fn manuals(&self) -> Result<()> {
        let units = self.tree.join("lib/systemd/system");
        let unit = fs::read_dir(&units)?.next().context("a unit")??.path();
        let unit = fs::read_to_string(unit)?;
        let line = unit.lines().find_map(|line| line.strip_prefix("Documentation="));
        let mut pages = 0;
        for page in line.context("Documentation=")?.split(' ') {
            let page = page.strip_prefix("man:").context("man:")?;
            let (name, section) = page.split_once('(').context("a section")?;
            let section = section.trim_end_matches(')');
            let file = self
                .tree
                .join(format!("usr/share/man/man{section}/{name}.{section}.gz"));
            let text = run(Command::new("gzip").arg("-dc").arg(&file), LIMIT)?.success()?;
            ensure!(text.contains(".SH NAME"), "{}", file.display());
            pages += 1;
        }
        ensure!(pages == 2, "{unit}");
        Ok(())
    }
}

#[test]
fn the_agents_package_has_all_that_its_service_names() {
    story("agent package", |scratch| {
        let package = Package::new(
            scratch,
            "stillpoint-agent",
            "agentproto/agent/packaging/deb",
            AGENT,
        )?;
        let Package { tree, control } = &package;
        let conffiles = fs::read_to_string(control.join("conffiles"))?;
        ensure!(
            conffiles.trim() == "/etc/stillpoint-agent/agent.toml",
            "{conffiles}"
        );
        service_names_what_is_there(tree)?;
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
        Ok(())
    });
}

#[test]
fn the_targets_package_has_all_that_its_service_names() {
    story("target package", |scratch| {
        let package = Package::new(scratch, "stillpoint", "config/packaging/deb", BINARY)?;
        let tree = &package.tree;
        let unit = fs::read_to_string(tree.join("lib/systemd/system/stillpoint.service"))?;
        ensure!(unit.contains("ExecStart=/usr/bin/stillpoint serve"), "{unit}");
        // Its user is made by what the package brings.
        let users = fs::read_to_string(tree.join("usr/lib/sysusers.d/stillpoint.conf"))?;
        ensure!(
            unit.contains("User=stillpoint") && users.lines().any(|line| line.starts_with("u stillpoint ")),
            "{users}"
        );
        let program = tree.join("usr/bin/stillpoint");
        for example in fs::read_dir(tree.join("usr/share/doc/stillpoint/examples"))? {
            let example = example?.path();
            // Those that name files of their own (secrets, certificates) are checked where the files can be made.
            if ["agents.toml", "minimal.toml"]
                .contains(&example.file_name().and_then(|n| n.to_str()).unwrap_or_default())
            {
                run(
                    Command::new(&program).args(["config", "check"]).arg(&example),
                    LIMIT,
                )?
                .success()?;
            }
        }
        // No purge deletes LUNs.
        let postrm = fs::read_to_string(package.control.join("postrm"))?;
        ensure!(!postrm.contains("rm -"), "{postrm}");
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
