//! Commands that need no daemon, or must not have one: `config check`, `store check|dump|restore`.

use std::fs::{File, TryLockError};
use std::io::{BufRead, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stillpoint_config::{Config, DEFAULT_CONFIG_FILE, EMBEDDED_DATA_DIR};
use stillpoint_snapshot::{RepairOptions, RepairPlan};

use super::args::Global;
use super::{config_refusal, out};
use crate::serve::control::api::{Refusal, count};
use crate::serve::control::{self, user_name};

/// `config check [FILE]`.
pub(crate) fn config_check(global: &Global, file: Option<PathBuf>) -> Result<(), Refusal> {
    let file = file
        .or_else(|| global.config.clone())
        .unwrap_or_else(|| DEFAULT_CONFIG_FILE.into());
    let config = Config::load(&file).map_err(|problems| {
        let problems_json = serde_json::to_value(&problems.0).unwrap_or_default();
        if global.json {
            let error = json!({"code": "config", "message": format!("{}: {}", file.display(), count(problems.0.len(), "problem")), "hint": "", "problems": problems_json});
            super::err(&format!("{}\n", json!({ "error": error })));
            return Refusal { code: super::ALREADY_TOLD.to_owned(), ..config_refusal(&problems) };
        }
        config_refusal(&problems)
    })?;
    if global.json {
        let report = json!({
            "file": file, "ok": true, "luns": config.luns.len(), "targets": config.targets.len(),
            "warnings": config.warnings, "unserved": config.unserved(),
        });
        return super::out_json(&report);
    }
    for warning in &config.warnings {
        super::err(&format!("warning: {warning}\n"));
    }
    for part in config.unserved() {
        super::err(&format!(
            "warning: {}:{}: {}: checked, but this version does not serve it yet\n",
            file.display(),
            part.line,
            part.section
        ));
    }
    if !global.quiet {
        out(&format!(
            "{}: right ({}, {})\n",
            file.display(),
            count(config.luns.len(), "LUN"),
            count(config.targets.len(), "target")
        ));
    }
    Ok(())
}

/// The data directory, and the lock that proves that no daemon uses it.
fn stopped_data(global: &Global, data_dir: Option<PathBuf>) -> Result<(PathBuf, File), Refusal> {
    let data_dir = match (data_dir, &global.config) {
        (Some(dir), _) => dir,
        (None, Some(file)) => Config::data_dir_of(file).map_err(|p| config_refusal(&p))?,
        (None, None) if Path::new(DEFAULT_CONFIG_FILE).exists() => {
            Config::data_dir_of(Path::new(DEFAULT_CONFIG_FILE)).map_err(|p| config_refusal(&p))?
        }
        (None, None) => EMBEDDED_DATA_DIR.into(),
    };
    let lock = data_dir.join("lock");
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    let opened = match options.open(&lock) {
        // What only looks works there too; what would write is told so when it does.
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => File::open(&lock),
        other => other,
    };
    let file = opened.map_err(|error| {
        Refusal::failed(
            "data_dir",
            format!("{} cannot be opened ({error})", lock.display()),
            "say where the data directory is with --data-dir or --config",
        )
    })?;
    match file.try_lock() {
        Ok(()) => Ok((data_dir, file)),
        Err(TryLockError::WouldBlock) => Err(Refusal::refused(
            "daemon_runs",
            format!("a daemon uses the store in {}", data_dir.display()),
            "stop it first: `systemctl stop stillpoint`",
        )),
        Err(TryLockError::Error(error)) => Err(Refusal::failed(
            "data_dir",
            format!("{} cannot be locked ({error})", lock.display()),
            "check the file system",
        )),
    }
}

/// The store of a stopped daemon.
fn stopped_store(global: &Global, data_dir: Option<PathBuf>) -> Result<(PathBuf, File), Refusal> {
    stopped_data(global, data_dir).map(|(data_dir, lock)| (data_dir.join("pool"), lock))
}

/// Who runs this command.
fn me() -> String {
    user_name(rustix::process::getuid().as_raw())
}

/// The configuration file of a daemon that does not run.
fn config_file(global: &Global) -> Option<PathBuf> {
    let usual = Path::new(DEFAULT_CONFIG_FILE);
    global
        .config
        .clone()
        .or_else(|| usual.exists().then(|| usual.to_owned()))
}

/// `volume rename` while no daemon runs: a start that refuses because of a renamed LUN names it as the way out.
pub(crate) fn volume_rename(
    global: &Global,
    old: &str,
    new: &str,
    unreachable: Refusal,
) -> Result<Value, Refusal> {
    if config_file(global).is_none() {
        return Err(unreachable);
    }
    let (data_dir, _lock) = stopped_data(global, None).map_err(|_| unreachable)?;
    control::rename_stopped(&data_dir, old, new, &me())
}

/// `config apply --yes` while no daemon runs: makes the volumes that a plain start refuses to make.
pub(crate) fn config_apply(global: &Global, unreachable: Refusal) -> Result<Value, Refusal> {
    let Some(file) = config_file(global).filter(|_| global.yes) else {
        return Err(unreachable);
    };
    let (data_dir, _lock) = stopped_data(global, None).map_err(|_| unreachable)?;
    let config = Config::load(&file).map_err(|problems| config_refusal(&problems))?;
    let created = control::create_stopped(&data_dir, &config, &me())?;
    Ok(
        json!({"file": file, "creates_volumes": created, "applied": false, "daemon": "stopped: the rest is applied when it starts"}),
    )
}

fn store_error(error: stillpoint_snapshot::Error) -> Refusal {
    Refusal {
        hint: String::new(),
        ..error.into()
    }
}

/// What no check can see (FORMAT.md, "What I7 does not close").
const CANNOT_SEE: &str =
    "not visible: damage in sled's log that took away the very last commit, when no sync followed it\n";

/// `store check`.
pub(crate) fn store_check(global: &Global, data_dir: Option<PathBuf>, data: bool) -> Result<(), Refusal> {
    let (pool, _lock) = stopped_store(global, data_dir)?;
    let report = if data {
        stillpoint_snapshot::check_data(&pool)
    } else {
        stillpoint_snapshot::check(&pool)
    };
    let report = report.map_err(store_error)?;
    let problems: Vec<String> = report
        .problems
        .iter()
        .map(|problem| problem.text.clone())
        .collect();
    let value = json!({
        "clean": report.is_clean(), "txg": report.txg, "superblock_txg": report.superblock_txg, "branches": report.branches,
        "snapshots": report.snapshots, "page_versions": report.page_versions, "deltas": report.deltas,
        "grains_used": report.grains_used, "grains_verified": report.grains_verified, "bad_grains": report.bad_grains, "jobs": report.jobs, "problem_count": report.problem_count, "problems": problems,
    });
    super::print(global, &value, super::show::details)?;
    if report.is_clean() {
        if !global.json && !global.quiet {
            out(CANNOT_SEE);
        }
        return Ok(());
    }
    Err(Refusal::failed(
        "store_damaged",
        format!("the store has {} problems", report.problem_count),
        "`stillpoint store repair --plan` says what can be repaired; bad data is written anew, or taken from a snapshot or a backup",
    ))
}

/// `store repair`: says what it would do, asks, does it.
pub(crate) fn store_repair(
    global: &Global,
    data_dir: Option<PathBuf>,
    options: RepairOptions,
) -> Result<(), Refusal> {
    let (pool, _lock) = stopped_store(global, data_dir)?;
    let look = RepairOptions {
        plan: true,
        ..options
    };
    let plan = stillpoint_snapshot::repair(&pool, look).map_err(store_error)?;
    if options.plan || plan.is_empty() {
        return super::print(global, &repair_view(&plan, &pool, false), super::show::details);
    }
    if let Some(commits) = plan.lost_commits.filter(|_| !options.accept_lost_commits) {
        return Err(Refusal::refused(
            "lost_commits",
            format!(
                "the metadata lacks {} that the data file has seen",
                count(usize::try_from(commits).unwrap_or(usize::MAX), "commit")
            ),
            "restore a dump (`store restore`) or a backup; --accept-lost-commits goes back to before them: what was written since is lost, and blocks that were freed and used again since show foreign data where no checksum tells",
        ));
    }
    if !plan.lost_jobs.is_empty() && !options.accept_lost_jobs {
        return Err(Refusal::refused(
            "lost_jobs",
            format!(
                "the records of {} are damaged, and what a job was zeroing or copying would show old data again",
                count(plan.lost_jobs.len(), "background job")
            ),
            "restore a dump (`store restore`) or a backup; --accept-lost-jobs forgets these jobs: blocks that were unmapped, zeroed or copied shortly before may show what was there before",
        ));
    }
    if !global.json && !global.quiet {
        super::err(&super::show::details(&repair_view(&plan, &pool, false)));
    }
    super::confirm(
        global,
        &format!(
            "Repair the store in {}? The old metadata is kept beside the new.",
            pool.display()
        ),
    )?;
    let done = stillpoint_snapshot::repair(&pool, options).map_err(store_error)?;
    super::print(global, &repair_view(&done, &pool, true), super::show::details)
}

fn repair_view(plan: &RepairPlan, pool: &Path, repaired: bool) -> Value {
    let problems: Vec<&str> = plan
        .problems
        .iter()
        .map(|problem| problem.text.as_str())
        .collect();
    json!({
        "store": pool, "repaired": repaired, "needed": !plan.is_empty(), "lost_commits": plan.lost_commits, "lost_jobs": plan.lost_jobs,
        "losses": plan.losses, "fixes": plan.fixes, "problem_count": problems.len(), "problems": problems,
    })
}

/// `store dump`.
pub(crate) fn store_dump(
    global: &Global,
    data_dir: Option<PathBuf>,
    to: Option<PathBuf>,
) -> Result<(), Refusal> {
    let (pool, _lock) = stopped_store(global, data_dir)?;
    let failed = |what: String, error: std::io::Error| {
        Refusal::failed("io", format!("{what} cannot be written ({error})"), "")
    };
    match to {
        None => {
            let mut writer = BufWriter::new(std::io::stdout().lock());
            stillpoint_snapshot::dump(&pool, &mut writer).map_err(store_error)?;
            writer.flush().map_err(|e| failed("the dump".to_owned(), e))
        }
        Some(path) => {
            let name = path.display().to_string();
            let file = File::create_new(&path).map_err(|e| failed(name.clone(), e))?;
            let mut writer = BufWriter::new(&file);
            let written = stillpoint_snapshot::dump(&pool, &mut writer)
                .map_err(store_error)
                .and_then(|()| writer.flush().map_err(|e| failed(name.clone(), e)))
                // A dump that a power cut can still undo is no safety net.
                .and_then(|()| file.sync_all().map_err(|e| failed(name.clone(), e)));
            // What was not flushed is not worth another try.
            drop(writer.into_parts());
            if let Err(refusal) = written {
                // A part of a dump must not pass for one.
                std::fs::remove_file(&path).ok();
                return Err(refusal);
            }
            let bytes = file.metadata().map_err(|e| failed(name.clone(), e))?.len();
            super::print(
                global,
                &json!({"file": path, "size_bytes": bytes}),
                super::show::details,
            )
        }
    }
}

/// `store restore FILE`.
pub(crate) fn store_restore(global: &Global, data_dir: Option<PathBuf>, from: &Path) -> Result<(), Refusal> {
    let (pool, _lock) = stopped_store(global, data_dir)?;
    super::confirm(
        global,
        &format!(
            "Replace the metadata of the store in {} by that of {}?",
            pool.display(),
            from.display()
        ),
    )?;
    let mut reader: Box<dyn BufRead> = if from == Path::new("-") {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        let file = File::open(from).map_err(|e| {
            Refusal::failed(
                "io",
                format!("{} cannot be read ({e})", from.display()),
                "name a file that `store dump` wrote",
            )
        })?;
        Box::new(BufReader::new(file))
    };
    stillpoint_snapshot::restore(&mut *reader, &pool).map_err(store_error)?;
    let value: Value = json!({"restored": true, "store": pool});
    super::print(global, &value, super::show::details)
}
