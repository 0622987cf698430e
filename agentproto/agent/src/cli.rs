//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{CommandFactory as _, Parser, Subcommand};
use stillpoint_agentproto::LunId;
use stillpoint_agentproto::message::{Finding, Mode, Severity};

use crate::config::Config;
use crate::enrol::{Invitation, enrol};
use crate::failure::{self, Failure, REFUSED};
use crate::features::{Feature, Features};
use crate::freeze::Settings;
use crate::install::Place;
use crate::journal::{self, Outcome};
use crate::plan;
use crate::state::{StateDir, Target};
use crate::volumes::{Inventory, Root};
use crate::{apps, discover, guard, hooks, libvirt, log, manual, report, run, vcenter};

/// Snapshot agent of Stillpoint: freezes this host's file systems while its target takes a snapshot.
#[derive(Parser)]
#[command(name = "stillpoint-agent", version, after_help = EXIT_CODES, arg_required_else_help = true)]
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
    /// The vCenter whose VMs lie on LUNs of a target
    #[command(subcommand)]
    Vcenter(vcenter::Verb),
    /// Show what this agent takes part in, or choose it; a running agent tells its targets, no new enrolment is needed
    Features {
        /// Switch these on
        #[arg(long, value_name = "FEATURE", value_delimiter = ',')]
        enable: Vec<Feature>,
        /// Switch these off
        #[arg(long, value_name = "FEATURE", value_delimiter = ',')]
        disable: Vec<Feature>,
    },
    /// Make this program a service of systemd, start it at every boot, and now
    Install {
        /// Only put the files in place
        #[arg(long)]
        no_start: bool,
        /// Into the image of another system
        #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true)]
        root: PathBuf,
    },
    /// Stop the service and remove it; settings and keys stay
    Uninstall {
        /// Settings and keys, too
        #[arg(long)]
        purge: bool,
        /// From the image of another system
        #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true)]
        root: PathBuf,
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
    /// Man pages and completions, for packages
    #[command(subcommand, hide = true)]
    Generate(Generate),
    #[command(name = guard::VERB, hide = true)]
    ThawGuard,
    /// Quiesce a guest of this host: what the agent calls at freeze and thaw
    #[command(name = libvirt::VERB, hide = true)]
    Domain {
        /// Its name
        name: String,
        /// What to do
        action: hooks::Verb,
    },
    /// Quiesce an application of agent.toml: what the agent calls at freeze and thaw
    #[command(name = apps::VERB, hide = true)]
    Application {
        /// Its name
        name: String,
        /// What to do
        action: apps::Action,
    },
}

#[derive(Subcommand)]
enum Generate {
    /// Man pages into a directory
    Man {
        /// The directory
        dir: PathBuf,
    },
    /// Shell completions on standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 refused by a rule, 4 unreachable (the target; for `status`, the agent).";

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    // First of all: the guard needs nothing else, and nothing else may fail before it.
    if matches!(cli.verb, Verb::ThawGuard) {
        return guard::run();
    }
    match carry_out(&cli) {
        Ok(code) => code,
        Err(error) => failure::tell(cli.json, &error),
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
        Verb::Features { enable, disable } => features(cli, &config, enable, disable),
        Verb::Install { no_start, root } => {
            let place = Place {
                root: std::path::absolute(root)?,
                start: !no_start,
            };
            let done = place.install()?;
            report::done(cli.json, &done, "next: `stillpoint-agent enrol TOKEN@HOST`")?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Uninstall { purge, root } => {
            let place = Place {
                root: std::path::absolute(root)?,
                start: true,
            };
            report::done(cli.json, &place.uninstall(*purge, &config.state_dir)?, "")?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Generate(what) => generate(what),
        Verb::Vcenter(verb) => vcenter_verb(cli, &config, verb),
        Verb::Run => {
            let _flush = log::start(&config.log)?;
            end_at_panic();
            keep_out_of_cores();
            let served = runtime()?.block_on(run::run(config));
            served.inspect_err(|error| tracing::error!("{error:#}"))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Status => report::status(cli.json, &config),
        Verb::List => list(cli, &config),
        Verb::Preflight { luns } => preflight(cli, &config, luns),
        Verb::Thaw => thaw(cli, &config),
        Verb::ThawGuard => Ok(guard::run()),
        Verb::Domain { name, action } => Ok(libvirt::helper(&config, name, *action)),
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

/// Memory holds the private key: a core dump, and `gcore`, show registers and the list of mappings only (core(5)). The filter is
/// inherited; a hook or helper that needs whole cores of its own sets it anew.
fn keep_out_of_cores() {
    if std::env::var_os("STILLPOINT_FULL_CORE").is_some() {
        tracing::warn!("STILLPOINT_FULL_CORE is set: a core dump of this process shows its key");
        return;
    }
    if let Err(error) = std::fs::write("/proc/self/coredump_filter", "0") {
        tracing::warn!(%error, "a core dump of this process would show its key: /proc/self/coredump_filter cannot be written");
    }
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
    let features = Features::load(&config.state_dir)?;
    let target = runtime()?.block_on(enrol(&state, &features, invitation))?;
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

fn features(cli: &Cli, config: &Config, enable: &[Feature], disable: &[Feature]) -> anyhow::Result<ExitCode> {
    if let Some(both) = enable.iter().find(|feature| disable.contains(feature)) {
        let message = format!("{} is to be switched on and off", both.name());
        return Err(Failure::usage(message, "name it once").into());
    }
    // Makes the directory, too: features may be chosen before the first enrolment.
    StateDir::open(&config.state_dir)?;
    let mut features = Features::load(&config.state_dir)?;
    let all = enable.iter().map(|feature| (*feature, true));
    let all = all.chain(disable.iter().map(|feature| (*feature, false)));
    let mut changed = false;
    for (feature, on) in all {
        changed |= features.set(feature, on);
    }
    if changed {
        features.store(&config.state_dir)?;
    }
    report::features(cli.json, config, &features)?;
    Ok(ExitCode::SUCCESS)
}

fn generate(what: &Generate) -> anyhow::Result<ExitCode> {
    let mut command = Cli::command().disable_help_subcommand(true);
    match what {
        Generate::Man { dir } => {
            command.build();
            manual::pages(&command, dir)
                .with_context(|| format!("man pages cannot be written to {}", dir.display()))?;
        }
        Generate::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut command, "stillpoint-agent", &mut script);
            report::print(String::from_utf8_lossy(&script).trim_end())?;
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
        [] => {
            let message = format!("not enrolled with {}", name.unwrap_or("any target"));
            return Err(Failure::failed("not_found", message, "see `stillpoint-agent status`").into());
        }
        _ => {
            let message = format!("{} targets are meant", found.len());
            let hint = "give HOST:PORT or the fingerprint from `status`";
            return Err(Failure::failed("ambiguous", message, hint).into());
        }
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

fn vcenter_verb(cli: &Cli, config: &Config, verb: &vcenter::Verb) -> anyhow::Result<ExitCode> {
    StateDir::open(&config.state_dir)?;
    runtime()?.block_on(vcenter::run(cli.json, config, verb))?;
    Ok(ExitCode::SUCCESS)
}

/// What a snapshot would be planned with.
fn look(config: &Config) -> anyhow::Result<(Settings, Inventory)> {
    let features = Features::load(&config.state_dir)?;
    let settings = run::settings(config, Root::real(), features);
    let inventory = plan::inventory(&settings, &config.test_luns);
    Ok((settings, inventory))
}

fn stillpoint_luns(inventory: &Inventory) -> Vec<LunId> {
    inventory
        .stillpoint_luns()
        .into_iter()
        .filter_map(|naa| naa.parse().ok())
        .collect()
}

fn list(cli: &Cli, config: &Config) -> anyhow::Result<ExitCode> {
    let (settings, inventory) = look(config)?;
    let hooks = plan::hooks(&settings, &config.applications)?;
    let luns = plan::list(&inventory, &hooks, &stillpoint_luns(&inventory), &config.standby);
    report::luns(cli.json, &luns)?;
    Ok(ExitCode::SUCCESS)
}

fn preflight(cli: &Cli, config: &Config, asked: &[LunId]) -> anyhow::Result<ExitCode> {
    let (settings, inventory) = look(config)?;
    let luns = if asked.is_empty() {
        stillpoint_luns(&inventory)
    } else {
        asked.to_vec()
    };
    if luns.is_empty() {
        let message = "this host has no Stillpoint LUN: no snapshot can be taken with this agent";
        return Err(Failure::refused("no_lun", message, "log in to a target first").into());
    }
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
