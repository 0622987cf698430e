//! The command line: parse, ask the daemon, show the answer, end with the right code.

mod args;
mod client;
mod offline;
mod show;
mod trace;
mod verbs;

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use serde_json::{Value, json};
use stillpoint_config::Problems;

use self::args::{Cli, GenerateVerb, Global, Verb};
use crate::serve::ServeOptions;
use crate::serve::control::api::{EXIT_USAGE, Refusal, count};

/// Code of a refusal that was already shown in a shape of its own: only its exit code is left to tell.
const ALREADY_TOLD: &str = "already_told";

/// Runs the program.
pub(crate) fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let global = cli.global.clone();
    if let Verb::Serve(serve) = cli.verb {
        return run_daemon(&global, serve.listen);
    }
    let done = match cli.verb {
        Verb::Generate(generate) => generate_files(&generate),
        verb => verbs::run(&global, verb),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => refuse(global.json, &refusal),
    }
}

fn run_daemon(global: &Global, listen: Option<std::net::SocketAddr>) -> ExitCode {
    start_logging(global);
    let options = ServeOptions {
        config: global.config.clone(),
        listen,
        socket: global.socket.clone(),
    };
    match crate::serve::main(&options) {
        Ok(code) => code,
        Err(error) => {
            let refusal = match error.downcast_ref::<Problems>() {
                Some(problems) => config_refusal(problems),
                None => Refusal::failed("serve", format!("{error:#}"), ""),
            };
            refuse(global.json, &refusal)
        }
    }
}

/// The log goes to standard error; `RUST_LOG` wins over `-q` and `-v`.
fn start_logging(global: &Global) {
    use tracing_subscriber::EnvFilter;
    let level = match (global.quiet, global.verbose) {
        (true, _) => "warn",
        (false, 0) => "info",
        (false, 1) => "debug",
        (false, _) => "trace",
    };
    // sled's own words are for its developers.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},sled=warn")));
    let stderr = std::io::stderr();
    // Under systemd the journal has the time already.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(stderr.is_terminal())
        .with_writer(std::io::stderr);
    let started = match (global.json, journal) {
        (true, _) => subscriber.json().try_init(),
        (false, true) => subscriber.without_time().try_init(),
        (false, false) => subscriber.try_init(),
    };
    if let Err(error) = started {
        err(&format!("warning: the log cannot be written: {error}\n"));
    }
}

/// What clap says of a wrong command line; `--help` and `--version` come this way too, and are no errors.
fn usage(error: &clap::Error) -> ExitCode {
    let json = std::env::args_os().any(|arg| arg == "--json");
    if !error.use_stderr() || !json {
        // Printing fails only when nobody reads it.
        drop(error.print());
        return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
    }
    let text = error.to_string();
    let message = text
        .lines()
        .next()
        .unwrap_or_default()
        .trim_start_matches("error: ")
        .to_owned();
    refuse(true, &Refusal::usage("usage", message, "see `stillpoint --help`"))
}

/// Shows why something was not done, and ends with its code.
fn refuse(json: bool, refusal: &Refusal) -> ExitCode {
    if refusal.code == ALREADY_TOLD {
        return ExitCode::from(refusal.exit);
    }
    if json {
        let mut error = json!({"code": refusal.code, "message": refusal.message, "hint": refusal.hint});
        if !refusal.details.is_empty()
            && let Some(object) = error.as_object_mut()
        {
            object.insert("details".to_owned(), json!(refusal.details));
        }
        err(&format!("{}\n", json!({ "error": error })));
    } else {
        let mut text = format!("error: {}\n", refusal.message);
        for detail in &refusal.details {
            text.push_str(&format!("  {detail}\n"));
        }
        if !refusal.hint.is_empty() {
            text.push_str(&format!("hint: {}\n", refusal.hint));
        }
        err(&text);
    }
    ExitCode::from(refusal.exit)
}

/// Every problem of a configuration file.
fn config_refusal(problems: &Problems) -> Refusal {
    let details: Vec<String> = problems.0.iter().map(ToString::to_string).collect();
    let (message, details) = match <[String; 1]>::try_from(details) {
        Ok([one]) => (one, Vec::new()),
        Err(many) => (
            format!("the configuration has {}:", count(many.len(), "problem")),
            many,
        ),
    };
    Refusal::failed("config", message, "").with_details(details)
}

/// Asks the person at the terminal, unless `--yes` was given.
fn confirm(global: &Global, question: &str) -> Result<(), Refusal> {
    if global.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Refusal::usage(
            "confirmation",
            format!("{question} Nobody can be asked here"),
            "add --yes if that is meant",
        ));
    }
    err(&format!("{question} [y/N] "));
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Refusal::refused("declined", "nothing was done", ""))
}

/// Prints to standard output. A reader that has gone (`| head`) is no error.
fn out(text: &str) {
    drop(std::io::stdout().write_all(text.as_bytes()));
}

/// Prints to standard error.
fn err(text: &str) {
    drop(std::io::stderr().write_all(text.as_bytes()));
}

fn out_json(value: &Value) -> Result<(), Refusal> {
    let text =
        serde_json::to_string_pretty(value).map_err(|e| Refusal::failed("internal", e.to_string(), ""))?;
    out(&format!("{text}\n"));
    Ok(())
}

/// Prints an answer as `--json` or for people.
fn print(global: &Global, value: &Value, for_people: impl Fn(&Value) -> String) -> Result<(), Refusal> {
    if global.json {
        return out_json(value);
    }
    if !global.quiet {
        out(&for_people(value));
    }
    Ok(())
}

fn generate_files(verb: &GenerateVerb) -> Result<(), Refusal> {
    match verb {
        GenerateVerb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "stillpoint", &mut script);
            out(&String::from_utf8_lossy(&script));
            Ok(())
        }
        GenerateVerb::Man { dir } => {
            let mut command = Cli::command().disable_help_subcommand(true);
            command.build();
            man_pages(&command, dir).map_err(|e| {
                let message = format!("man pages cannot be written to {} ({e})", dir.display());
                Refusal::failed("io", message, "name a directory")
            })
        }
    }
}

/// One page per verb, in the section of administrators' commands.
fn man_pages(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        man_pages(verb, dir)?;
    }
    clap_mangen::Man::new(command.clone())
        .section("8")
        .generate_to(dir)?;
    Ok(())
}
