//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use stillpoint_agentproto::LunId;
use stillpoint_agentproto::message::{Finding, Mode, Severity};

use crate::config::Config;
use crate::enrol::{Invitation, enrol};
use crate::journal::{self, Outcome};
use crate::plan;
use crate::state::{StateDir, Target};
use crate::volumes::{Inventory, Root};
use crate::{apps, discover, guard, log, report, run};

/// Refused by a rule (operator-interface.md §2).
const REFUSED: u8 = 3;

/// Snapshot agent of Stillpoint: freezes this host's file systems while its target takes a snapshot.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE", help = format!("Configuration file [default: {}]", crate::config::PATH))]
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
    /// Serve the enrolled targets (this is the service)
    Run,
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
    /// Thaw what an agent of this host froze and did not thaw
    Thaw,
    #[command(name = guard::VERB, hide = true)]
    ThawGuard,
    /// Quiesce an application of agent.toml: what the agent calls at freeze and thaw
    #[command(name = apps::VERB, hide = true)]
    Application {
        /// Its name
        name: String,
        /// What to do
        action: apps::Action,
    },
}

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    // First of all: the guard needs nothing else, and nothing else may fail before it.
    if matches!(cli.verb, Verb::ThawGuard) {
        return guard::run();
    }
    match carry_out(&cli) {
        Ok(code) => code,
        Err(error) => {
            tell_error(cli.json, &error);
            ExitCode::FAILURE
        }
    }
}

fn carry_out(cli: &Cli) -> anyhow::Result<ExitCode> {
    let mut config = Config::load(cli.config.as_deref())?;
    if let Some(dir) = &cli.state_dir {
        config.state_dir = std::path::absolute(dir)?;
    }
    match &cli.verb {
        Verb::Discover { places, seconds } => {
            let found = discover::discover(places, Duration::from_secs(*seconds))?;
            report::found(cli.json, &found)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Enrol { invitation } => enrol_verb(cli, &config, invitation),
        Verb::Unenrol { target } => unenrol(cli, &config, target.as_deref()),
        Verb::Run => {
            let _flush = log::start(&config.log)?;
            end_at_panic();
            let served = runtime()?.block_on(run::run(config));
            served.inspect_err(|error| tracing::error!("{error:#}"))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Status => report::status(cli.json, &config),
        Verb::List => list(cli, &config),
        Verb::Preflight { luns } => preflight(cli, &config, luns),
        Verb::Thaw => thaw(cli, &config),
        Verb::ThawGuard => Ok(guard::run()),
        Verb::Application { name, action } => apps::run(&config, name, *action),
    }
}

/// A panic is a bug of ours, and a half-dead agent may hold a freeze: end, and let the guard put everything right.
fn end_at_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    // Two threads at least: one may wait for a slow disk while another has to end a hold.
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, 4);
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("the runtime cannot be started")
}

fn enrol_verb(cli: &Cli, config: &Config, invitation: &str) -> anyhow::Result<ExitCode> {
    let invitation = Invitation::parse(invitation)?;
    let state = StateDir::open(&config.state_dir)?;
    let target = runtime()?.block_on(enrol(&state, invitation))?;
    let agent_id = state.identity()?.agent_id;
    if cli.json {
        report::print_json(&serde_json::json!({ "agent_id": agent_id, "target": target }))?;
    } else {
        report::print(&format!("enrolled with {} as {agent_id}", target.address()))?;
        report::print(&format!(
            "the target's key has the fingerprint {}",
            target.fingerprint
        ))?;
        if !run::is_running(&config.run_dir) {
            report::print("the agent does not run yet: `stillpoint-agent run`, or start its service")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn unenrol(cli: &Cli, config: &Config, name: Option<&str>) -> anyhow::Result<ExitCode> {
    let state = StateDir::open(&config.state_dir)?;
    let targets = state.targets()?;
    let is_named = |target: &&Target| {
        name.is_none_or(|name| {
            target.host == name || target.address() == name || target.fingerprint.to_string() == name
        })
    };
    let found: Vec<&Target> = targets.iter().filter(is_named).collect();
    let target = match found.as_slice() {
        [one] => *one,
        [] => bail!(
            "not enrolled with {}: see `stillpoint-agent status`",
            name.unwrap_or("any target")
        ),
        _ => bail!(
            "{} targets are meant: give HOST:PORT or the fingerprint from `status`",
            found.len()
        ),
    };
    state.remove_target(target.fingerprint)?;
    if cli.json {
        report::print_json(&serde_json::json!({ "target": target }))?;
    } else {
        let address = target.address();
        report::print(&format!(
            "{address} is trusted no longer; on the target: `stillpoint agent revoke`"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn inventory(config: &Config) -> Inventory {
    Inventory::read(&Root::real(), &config.test_luns)
}

fn stillpoint_luns(inventory: &Inventory) -> Vec<LunId> {
    inventory
        .stillpoint_luns()
        .into_iter()
        .filter_map(|naa| naa.parse().ok())
        .collect()
}

fn list(cli: &Cli, config: &Config) -> anyhow::Result<ExitCode> {
    let inventory = inventory(config);
    let hooks = plan::hooks(&run::settings(config, Root::real()), &config.applications)?;
    let luns = plan::list(&inventory, &hooks, &stillpoint_luns(&inventory));
    report::luns(cli.json, &luns)?;
    Ok(ExitCode::SUCCESS)
}

fn preflight(cli: &Cli, config: &Config, asked: &[LunId]) -> anyhow::Result<ExitCode> {
    let inventory = inventory(config);
    let luns = if asked.is_empty() {
        stillpoint_luns(&inventory)
    } else {
        asked.to_vec()
    };
    if luns.is_empty() {
        bail!("this host has no Stillpoint LUN: log in to a target first");
    }
    let settings = run::settings(config, Root::real());
    // Each LUN alone, as a snapshot of it would be.
    let survey = |lun| {
        let one = [lun];
        plan::survey(
            &inventory,
            &settings,
            &config.applications,
            &one,
            Mode::Application,
            None,
        )
        .findings()
    };
    let findings: Vec<Finding> = luns.into_iter().flat_map(survey).collect();
    report::findings(cli.json, &findings)?;
    let stops = findings.iter().any(|finding| finding.severity == Severity::Error);
    Ok(if stops {
        ExitCode::from(REFUSED)
    } else {
        ExitCode::SUCCESS
    })
}

fn thaw(cli: &Cli, config: &Config) -> anyhow::Result<ExitCode> {
    let recovered = journal::recover(&config.run_dir, &Root::real());
    report::thawed(cli.json, &recovered)?;
    let failed = recovered
        .iter()
        .any(|one| matches!(one.outcome, Outcome::Failed(_)));
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn tell_error(json: bool, error: &anyhow::Error) {
    let text = if json {
        let error = serde_json::json!({ "code": "failed", "message": format!("{error:#}"), "hint": null });
        serde_json::json!({ "error": error }).to_string()
    } else {
        format!("stillpoint-agent: {error:#}")
    };
    // Nobody can be told that standard error is gone.
    std::io::Write::write_all(&mut std::io::stderr(), format!("{text}\n").as_bytes()).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_stand_before_and_after_the_verb() {
        for line in ["a --config /x status --json", "a status --json --config /x"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(cli.json && cli.config == Some(PathBuf::from("/x")));
        }
    }

    #[test]
    fn a_lun_is_an_naa_identity() {
        assert!(Cli::try_parse_from(["a", "preflight", "--lun", "sda"]).is_err());
        let lun = "naa.60000000000000000000000000000001";
        assert!(Cli::try_parse_from(["a", "preflight", "--lun", lun]).is_ok());
    }
}
