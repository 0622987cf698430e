//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use serde_json::json;
use stillpoint_agentproto::LunId;
use stillpoint_agentproto::message::{Finding, Severity};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::discover;
use crate::enrol::{Invitation, enrol};
use crate::failure::{self, Failure, REFUSED, UNREACHABLE};
use crate::features::{Feature, Features};
use crate::install::{self, Hand, Tool};
use crate::log;
use crate::plan;
use crate::platform::Platform as _;
use crate::run::Running;
use crate::state::{StateDir, Target};
use crate::status::{self, Connection};
use crate::win::{self, Windows};

/// Snapshot agent of Stillpoint for Windows: holds this host's VSS writers while its target takes a snapshot, and is the hardware
/// provider of its LUNs.
#[derive(Parser)]
#[command(name = "stillpoint-agent", version, arg_required_else_help = true)]
struct Cli {
    /// Configuration file [default: agent.toml in ProgramData\Stillpoint]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of the key and the enrolled targets, instead of the configuration's
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Ask the local network which targets there are (those with `discovery = true` answer)
    Discover {
        /// Ask these instead of everybody
        #[arg(value_name = "HOST[:PORT]")]
        places: Vec<String>,
        /// Listen for answers for so long
        #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = clap::value_parser!(u64).range(1..=60))]
        seconds: u64,
    },
    /// Trust a target, and be trusted by it: `stillpoint agent token create` there prints TOKEN
    Enrol {
        /// One-time token, and where the target listens
        #[arg(value_name = "TOKEN@HOST[:PORT]")]
        invitation: String,
    },
    /// Trust a target no longer
    Unenrol {
        /// Its host, HOST:PORT or fingerprint; may be left out when there is one target only
        target: Option<String>,
    },
    /// Show what this agent takes part in, or change it; no new enrolment is needed
    Features {
        /// Switch on
        #[arg(long, value_name = "FEATURE")]
        enable: Vec<Feature>,
        /// Switch off
        #[arg(long, value_name = "FEATURE")]
        disable: Vec<Feature>,
    },
    /// Install the service, the VSS provider and the firewall rule
    Install {
        /// Do not start the service
        #[arg(long)]
        no_start: bool,
    },
    /// Remove what `install` made; the key and the enrolled targets stay
    Uninstall,
    /// Serve the enrolled targets
    Run {
        /// Under Windows' service manager
        #[arg(long, hide = true)]
        service: bool,
    },
    /// Show targets and connections
    Status,
    /// Show the Stillpoint LUNs of this host with what is mounted on them
    List,
    /// Check whether a snapshot could be taken: exit code 3 when something stands in the way
    Preflight {
        /// Only this LUN (naa.…); all of them otherwise
        #[arg(long = "lun", value_name = "NAA")]
        luns: Vec<LunId>,
    },
}

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match carry_out(&cli) {
        Ok(code) => code,
        Err(error) => failure::tell(cli.json, &error),
    }
}

fn carry_out(cli: &Cli) -> anyhow::Result<ExitCode> {
    let mut config =
        Config::load(cli.config.as_deref()).map_err(|error| Failure::usage(format!("{error:#}"), ""))?;
    if let Some(dir) = &cli.state_dir {
        config.state_dir = std::path::absolute(dir)?;
    }
    match &cli.verb {
        Verb::Discover { places, seconds } => {
            let found = discover::discover(places, Duration::from_secs(*seconds))?;
            if cli.json {
                return show(&json!(found));
            }
            for one in &found {
                println!("{}  {}  key {}", one.name, one.address, one.fingerprint);
            }
            if found.is_empty() {
                println!(
                    "no target answered: it needs `discovery = true`, and UDP port 11169 open; enrolling works without"
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Enrol { invitation } => enrol_verb(cli, &config, invitation),
        Verb::Unenrol { target } => unenrol(cli, &config, target.as_deref()),
        Verb::Features { enable, disable } => features(cli, &config, enable, disable),
        Verb::Install { no_start } => install_verb(cli, &config, *no_start),
        Verb::Uninstall => uninstall(cli, &config),
        Verb::Run { service } => run(config, *service),
        Verb::Status => status_verb(cli, &config),
        Verb::List => list(cli, &config),
        Verb::Preflight { luns } => preflight(cli, &config, luns),
    }
}

fn show(value: &serde_json::Value) -> anyhow::Result<ExitCode> {
    println!("{value:#}");
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    // Two threads at least: one may wait for a slow disk while another has to end a hold.
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime cannot be started")
}

fn enrol_verb(cli: &Cli, config: &Config, invitation: &str) -> anyhow::Result<ExitCode> {
    let invitation = Invitation::parse(invitation)?;
    let state = StateDir::open(&config.state_dir)?;
    let features = Features::load(&config.state_dir)?;
    let target = runtime()?.block_on(enrol(&state, &features, invitation))?;
    let agent_id = state.identity()?.agent_id;
    if cli.json {
        return show(&json!({ "agent_id": agent_id, "target": target }));
    }
    println!("enrolled with {} as {agent_id}", target.address());
    println!("the target's key has the fingerprint {}", target.fingerprint);
    println!("if the service does not run yet: `stillpoint-agent install`");
    Ok(ExitCode::SUCCESS)
}

fn unenrol(cli: &Cli, config: &Config, name: Option<&str>) -> anyhow::Result<ExitCode> {
    let state = StateDir::open(&config.state_dir)?;
    let targets = state.targets()?;
    let is_named = |target: &&Target| {
        let names = |name: &str| {
            target.host == name || target.address() == name || target.fingerprint.to_string() == name
        };
        name.is_none_or(names)
    };
    let found: Vec<&Target> = targets.iter().filter(is_named).collect();
    let target = match found.as_slice() {
        [one] => *one,
        [] => {
            let message = format!("not enrolled with {}", name.unwrap_or("any target"));
            return Err(Failure::failed("not_found", message, "see `stillpoint-agent status`").into());
        }
        _ => {
            let message = format!("{} targets are meant", found.len());
            return Err(Failure::usage(
                message,
                "give HOST:PORT or the fingerprint from `stillpoint-agent status`",
            )
            .into());
        }
    };
    state.remove_target(target.fingerprint)?;
    if cli.json {
        return show(&json!({ "target": target }));
    }
    println!(
        "{} is trusted no longer; on the target: `stillpoint agent revoke`",
        target.address()
    );
    Ok(ExitCode::SUCCESS)
}

fn features(cli: &Cli, config: &Config, enable: &[Feature], disable: &[Feature]) -> anyhow::Result<ExitCode> {
    if enable.iter().any(|feature| disable.contains(feature)) {
        return Err(Failure::usage("a feature is to be switched on and off", "name it once").into());
    }
    // Makes the directory, too: features may be chosen before the first enrolment.
    StateDir::open(&config.state_dir)?;
    let mut features = Features::load(&config.state_dir)?;
    let before = features;
    for feature in enable {
        features.set(*feature, true);
    }
    for feature in disable {
        features.set(*feature, false);
    }
    if features != before {
        features.write(&config.state_dir)?;
    }
    if cli.json {
        let all = features.all();
        let rows: Vec<_> = all
            .iter()
            .map(|(name, on)| json!({ "name": name, "enabled": on }))
            .collect();
        return show(&json!({ "features": rows }));
    }
    for (name, on) in features.all() {
        println!("{name:<14} {}", if on { "on" } else { "off" });
    }
    Ok(ExitCode::SUCCESS)
}

/// Windows itself.
struct Here;

impl Hand for Here {
    fn tool(&mut self, tool: &Tool) -> Result<(), String> {
        tool.run()
    }

    fn provider(&mut self, registered: bool) -> Result<(), String> {
        let done = if registered {
            win::register::register()
        } else {
            win::register::unregister()
        };
        done.map_err(|error| crate::writers::hresult(error.code().0))
    }
}

fn steps(cli: &Cli, config: &Config) -> anyhow::Result<Vec<install::Step>> {
    let program = std::env::current_exe()?;
    let file = cli.config.as_deref().map(std::path::absolute).transpose()?;
    let class = format!("{{{:?}}}", windows::core::GUID::from_u128(win::register::CLASS));
    Ok(install::steps(
        &program,
        file.as_deref(),
        config.listen.port(),
        &class,
    ))
}

fn install_verb(cli: &Cli, config: &Config, no_start: bool) -> anyhow::Result<ExitCode> {
    if let Some(refusal) = Windows::refusals().into_iter().next() {
        let code = if refusal.code == stillpoint_agentproto::ErrorCode::LimitSmis {
            "limit_smis"
        } else {
            "unsupported"
        };
        return Err(Failure::refused(code, refusal.text, "nothing was installed").into());
    }
    // The key's directory gets its access list before there is a key.
    StateDir::open(&config.state_dir)?;
    let mut steps = steps(cli, config)?;
    if no_start {
        steps.retain(|step| *step != install::Step::Start);
    }
    let installed = install::install(&steps, &mut Here);
    installed.map_err(|error| {
        Failure::failed(
            "install_failed",
            error,
            "run it as Administrator; what was done is undone",
        )
    })?;
    if cli.json {
        return show(
            &json!({ "installed": true, "service": install::SERVICE, "port": config.listen.port() }),
        );
    }
    println!(
        "installed: service {}, VSS provider, firewall rule for TCP port {}",
        install::SERVICE,
        config.listen.port()
    );
    Ok(ExitCode::SUCCESS)
}

fn uninstall(cli: &Cli, config: &Config) -> anyhow::Result<ExitCode> {
    let left = install::uninstall(&steps(cli, config)?, &mut Here);
    if let Some(left) = left.first() {
        let message = format!("VSS keeps the provider: {left}");
        return Err(Failure::failed(
            "uninstall_failed",
            message,
            "end the backups that use it, then try again",
        )
        .into());
    }
    if cli.json {
        return show(&json!({ "installed": false }));
    }
    println!(
        "removed; the key and the enrolled targets stay in {}",
        config.state_dir.display()
    );
    Ok(ExitCode::SUCCESS)
}

fn host(config: &Config) -> Windows {
    Windows {
        test_luns: config.test_luns.clone(),
    }
}

fn run(config: Config, service: bool) -> anyhow::Result<ExitCode> {
    if !service {
        let _flush = log::start(&config.log)?;
        let stop = CancellationToken::new();
        serve(config, stop, true)?;
        return Ok(ExitCode::SUCCESS);
    }
    win::service::run(move |stop| {
        let file = crate::config::home().join("agent.log");
        if win::service::log_to(&file).is_err() {
            return false;
        }
        let Ok(_flush) = log::start(&config.log) else { return false };
        serve(config, stop, false).inspect_err(|error| tracing::error!("{error:#}")).is_ok()
    })
    .context("the service manager does not know this process: `stillpoint-agent run` without --service runs it here")?;
    Ok(ExitCode::SUCCESS)
}

/// Until it is stopped; on a console, Ctrl-C stops it, too.
fn serve(config: Config, stop: CancellationToken, console: bool) -> anyhow::Result<()> {
    // A panic is a bug of ours, and a half-dead agent may hold writes: end, and VSS lets go.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
    win::com::join().context("COM")?;
    win::com::secure().context("COM's security")?;
    let platform = Arc::new(host(&config));
    let running = Running::new(config, platform)?;
    let _served = win::com::serve(running.provider()).context("the provider's COM class")?;
    runtime()?.block_on(async move {
        if console {
            let stop = stop.clone();
            tokio::spawn(async move {
                if tokio::signal::ctrl_c().await.is_ok() {
                    stop.cancel();
                }
            });
        }
        running.run(stop).await
    })
}

fn status_verb(cli: &Cli, config: &Config) -> anyhow::Result<ExitCode> {
    let state = StateDir::open(&config.state_dir)?;
    let (agent_id, targets) = (state.identity()?.agent_id, state.targets()?);
    let features = Features::load(&config.state_dir)?;
    // Somebody listens there: it is the agent, or nobody can be.
    let probe = std::net::SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, config.listen.port()));
    let running = std::net::TcpStream::connect_timeout(&probe, Duration::from_secs(2)).is_ok();
    let connections = if running {
        status::read(&config.state_dir)
    } else {
        status::Connections::new()
    };
    let registered = |target: &Target| {
        matches!(
            connections.get(&target.fingerprint),
            Some(Connection::Registered { .. })
        )
    };
    let well = running && !targets.is_empty() && targets.iter().all(registered);
    if cli.json {
        let rows: Vec<_> = targets
            .iter()
            .map(|target| {
                json!({ "host": target.host, "port": target.port, "fingerprint": target.fingerprint,
                        "enrolled_at": target.enrolled_at, "connection": connections.get(&target.fingerprint) })
            })
            .collect();
        show(
            &json!({ "agent_id": agent_id, "version": env!("CARGO_PKG_VERSION"), "running": running,
                      "listen": config.listen, "features": features.capabilities().names(), "targets": rows }),
        )?;
    } else {
        println!(
            "agent {agent_id} {}, port {}",
            if running { "runs" } else { "does not run" },
            config.listen.port()
        );
        for target in &targets {
            let state = match connections.get(&target.fingerprint) {
                Some(Connection::Registered { luns, .. }) if luns.is_empty() => {
                    "registered, no LUNs allowed yet".to_owned()
                }
                Some(Connection::Registered { luns, .. }) => format!("registered, {}", luns.join(", ")),
                Some(Connection::Down { error }) => format!("not registered: {error}"),
                Some(Connection::Connecting) => "connecting".to_owned(),
                None => "not connected".to_owned(),
            };
            println!("target {}: {state}", target.address());
        }
        if targets.is_empty() {
            println!("not enrolled: `stillpoint-agent enrol TOKEN@HOST`");
        }
    }
    Ok(match (running, well) {
        (_, true) => ExitCode::SUCCESS,
        (true, false) => ExitCode::FAILURE,
        (false, false) => ExitCode::from(UNREACHABLE),
    })
}

fn list(cli: &Cli, config: &Config) -> anyhow::Result<ExitCode> {
    let inventory = host(config).inventory();
    let luns = plan::list(&inventory, &inventory.stillpoint_luns());
    if cli.json {
        return show(&json!(luns));
    }
    for lun in &luns {
        println!(
            "{}  serial {}",
            lun.identity.lun,
            lun.identity.serial.as_deref().unwrap_or("?")
        );
        for mount in &lun.mounts {
            println!(
                "  {}  {}{}",
                mount.path,
                mount.file_system,
                if mount.read_only { ", read-only" } else { "" }
            );
        }
        if lun.mounts.is_empty() {
            println!("  nothing of it is mounted");
        }
    }
    if luns.is_empty() {
        println!("this host has no Stillpoint LUN");
    }
    Ok(ExitCode::SUCCESS)
}

fn preflight(cli: &Cli, config: &Config, asked: &[LunId]) -> anyhow::Result<ExitCode> {
    let host = host(config);
    let inventory = host.inventory();
    let luns = if asked.is_empty() {
        inventory.stillpoint_luns()
    } else {
        asked.to_vec()
    };
    if luns.is_empty() {
        let hint = "log in to a target first (iscsicpl, or Connect-IscsiTarget)";
        return Err(Failure::failed("no_lun", "this host has no Stillpoint LUN", hint).into());
    }
    let mut findings: Vec<Finding> = Windows::refusals();
    // Each LUN alone, as a snapshot of it would be.
    for lun in luns {
        findings.extend(plan::survey(inventory.clone(), &[lun], None, Vec::new()).findings());
    }
    let stops = findings.iter().any(|finding| finding.severity == Severity::Error);
    if cli.json {
        show(&json!({ "findings": findings }))?;
    } else {
        for Finding {
            code,
            severity,
            subject,
            text,
        } in &findings
        {
            println!("{severity}: {subject}: {text} [{code}]");
        }
        if findings.is_empty() {
            println!("ready");
        }
    }
    Ok(if stops {
        ExitCode::from(REFUSED)
    } else {
        ExitCode::SUCCESS
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
