//! What the command line prints: for people, or with `--json` for scripts.

use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::{Value, json};
use stillpoint_agentproto::message::{Finding, LunVolumes, Severity};

use crate::config::Config;
use crate::discover::Found;
use crate::failure::UNREACHABLE;
use crate::features::{self, Feature, Features};
use crate::journal::{Outcome, Recovered};
use crate::state::StateDir;
use crate::status::{self, Connection};
use crate::{journal, run};

/// One line. An output that is closed (`| head`) is an error of its own, no panic.
pub(crate) fn print(line: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")
}

/// One JSON value.
pub(crate) fn print_json(value: &Value) -> io::Result<()> {
    print(&format!("{value:#}"))
}

/// `status`: exit code 0 when an agent runs, is registered everywhere and reached from there; 4 when none runs, 1 otherwise.
pub(crate) fn status(json: bool, config: &Config) -> anyhow::Result<ExitCode> {
    let state = StateDir::open(&config.state_dir)?;
    let (agent_id, targets) = (state.identity()?.agent_id, state.targets()?);
    let features = Features::load(&config.state_dir)?;
    let running = run::is_running(&config.run_dir);
    let connections = if running {
        status::read(&config.run_dir)
    } else {
        status::Connections::new()
    };
    let frozen = journal::names(&config.run_dir);
    let registered = |target| {
        matches!(
            connections.get(target),
            Some(Connection::Registered { trouble: None, .. })
        )
    };
    let well = running && !targets.is_empty() && targets.iter().all(|target| registered(&target.fingerprint));
    if json {
        let target = |target: &crate::state::Target| {
            let connection = connections.get(&target.fingerprint);
            json!({ "host": target.host, "port": target.port, "fingerprint": target.fingerprint,
                    "enrolled_at": target.enrolled_at, "connection": connection })
        };
        let targets: Vec<Value> = targets.iter().map(target).collect();
        print_json(
            &json!({ "agent_id": agent_id, "version": env!("CARGO_PKG_VERSION"), "running": running,
                            "listen": config.listen, "features": features.capabilities().names(),
                            "targets": targets, "sessions_frozen": frozen }),
        )?;
    } else {
        let does = if running { "runs" } else { "does not run" };
        print(&format!("agent {agent_id} {does}, port {}", config.listen.port()))?;
        print(&format!(
            "takes part with {}",
            features.capabilities().names().join(", ")
        ))?;
        for target in &targets {
            print(&format!(
                "target {}: {}",
                target.address(),
                connection(connections.get(&target.fingerprint))
            ))?;
        }
        if targets.is_empty() {
            print("not enrolled: `stillpoint-agent enrol TOKEN@HOST`")?;
        }
        for session in frozen {
            print(&format!("frozen now by session {session}"))?;
        }
    }
    Ok(match (well, running) {
        (true, _) => ExitCode::SUCCESS,
        (false, true) => ExitCode::FAILURE,
        (false, false) => ExitCode::from(UNREACHABLE),
    })
}

fn connection(connection: Option<&Connection>) -> String {
    match connection {
        Some(Connection::Registered {
            trouble: Some(trouble),
            ..
        }) => format!("registered, but {trouble}"),
        Some(Connection::Registered { luns, .. }) if luns.is_empty() => {
            "registered, no LUNs allowed yet (`stillpoint agent allow` on the target)".to_owned()
        }
        Some(Connection::Registered { luns, .. }) => format!("registered, {}", luns.join(", ")),
        Some(Connection::Down { error }) => format!("not registered: {error}"),
        Some(Connection::Connecting) => "connecting".to_owned(),
        None => "not connected".to_owned(),
    }
}

/// `features`
pub(crate) fn features(json: bool, config: &Config, features: &Features) -> io::Result<()> {
    let trouble = |feature| features::trouble(feature, config).filter(|_| features.has(feature));
    if json {
        let one = |feature: Feature| json!({ "name": feature.name(), "enabled": features.has(feature), "trouble": trouble(feature) });
        return print_json(&json!({ "features": features::ALL.map(one) }));
    }
    for feature in features::ALL {
        let state = if features.has(feature) { "on" } else { "off" };
        let trouble = trouble(feature).map_or_else(String::new, |trouble| format!("  ({trouble})"));
        print(&format!("{:<10} {state}{trouble}", feature.name()))?;
    }
    Ok(())
}

/// `install`, `uninstall`
pub(crate) fn done(json: bool, done: &[String], next: &str) -> io::Result<()> {
    if json {
        return print_json(&json!({ "done": done }));
    }
    done.iter()
        .map(String::as_str)
        .chain(Some(next).filter(|next| !next.is_empty()))
        .try_for_each(print)
}

/// `discover`
pub(crate) fn found(json: bool, found: &[Found]) -> io::Result<()> {
    if json {
        return print_json(&json!(found));
    }
    for Found {
        name,
        address,
        fingerprint,
        ..
    } in found
    {
        print(&format!("{name}  {address}  key {fingerprint}"))?;
    }
    if found.is_empty() {
        return print(
            "no target answered: it needs `discovery = true`, and UDP port 11169 open; enrolling works without",
        );
    }
    print("on the target, `stillpoint agent token create`; here, `stillpoint-agent enrol TOKEN@HOST`")
}

/// `list`
pub(crate) fn luns(json: bool, luns: &[LunVolumes]) -> io::Result<()> {
    if json {
        return print_json(&json!(luns));
    }
    if luns.is_empty() {
        return print("this host has no Stillpoint LUN");
    }
    for LunVolumes {
        identity,
        mounts,
        apps,
        ..
    } in luns
    {
        let iqn = identity.iqn.as_deref().unwrap_or("(not iSCSI)");
        let number = identity
            .number
            .map_or_else(String::new, |number| format!(" LUN {number}"));
        print(&format!("{}  {iqn}{number}", identity.lun))?;
        for mount in mounts {
            let read_only = if mount.read_only { ", read-only" } else { "" };
            print(&format!(
                "  {}  {} on {}{read_only}",
                mount.path, mount.file_system, mount.device
            ))?;
        }
        for app in apps {
            print(&format!(
                "  application {} (hook {})",
                app.instance,
                app.component.as_deref().unwrap_or("?")
            ))?;
        }
        if mounts.is_empty() {
            print("  nothing of it is mounted")?;
        }
    }
    Ok(())
}

/// `preflight`
pub(crate) fn findings(json: bool, findings: &[Finding]) -> io::Result<()> {
    if json {
        return print_json(&json!({ "findings": findings }));
    }
    for Finding {
        code,
        severity,
        subject,
        text,
    } in findings
    {
        let severity = match severity {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        print(&format!("{severity}: {subject}: {text} [{code}]"))?;
    }
    if findings.is_empty() {
        print("ready")
    } else {
        Ok(())
    }
}

/// `thaw`
pub(crate) fn thawed(json: bool, recovered: &[Recovered]) -> io::Result<()> {
    let word = |outcome: &Outcome| match outcome {
        Outcome::Thawed => "thawed".to_owned(),
        Outcome::NotFrozen => "was not frozen".to_owned(),
        Outcome::Gone => "is not mounted any more".to_owned(),
        Outcome::WentOn => "hook told to go on".to_owned(),
        Outcome::Failed(error) => format!("cannot be thawed: {error}"),
    };
    if json {
        let one = |one: &Recovered| json!({ "what": one.what, "outcome": word(&one.outcome) });
        return print_json(&recovered.iter().map(one).collect());
    }
    for one in recovered {
        print(&format!("{}: {}", one.what.display(), word(&one.outcome)))?;
    }
    if recovered.is_empty() {
        print("nothing is frozen by an agent of this host")
    } else {
        Ok(())
    }
}
