//! I/O errors and "no space" at the n-th call of every kind on every kind of file, sled's own files among them, met by a
//! real process (`recorder/injector.c`).
//!
//! After each: the process ends by itself with an error that names the cause, or went on; the pool opens again when the
//! fault is gone, the check finds nothing, every flushed write and every acknowledged snapshot is there
//! (`common/facts.rs`). A process that had one file fail keeps what it acknowledged, as after kill -9; only a failed sync
//! of the data file may take what was not flushed.
//!
//! `STILLPOINT_SOAK_FAULTS` sets how many places in each row of calls fail (the quick run takes a few rows only),
//! `STILLPOINT_SEED` repeats a run; `tests/soak store` runs all of it.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use stillpoint_snapshot::sim::Rng;

use common::counts::Counts;
use common::facts::Crash;
use common::recorder::{self, child, injector};
use common::workload::{self, Orders};

const QUICK_FAULTS: usize = 26;
/// Operations of each thread of a process.
const STEPS: u64 = 40;
/// Far above what a loaded machine needs: a process that is still there then hangs.
const PATIENCE: Duration = Duration::from_secs(120);
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

/// The workload itself, in a process of its own, which may be refused.
#[test]
#[ignore = "run as a child by the tests of this file"]
fn workload_child() {
    match workload::run(&Orders::from_env()) {
        Ok(()) => println!("ended well"),
        Err(error) => println!("ended with: {error}"),
    }
}

/// One call that fails.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fault {
    call: String,
    file: String,
    nth: u64,
    errno: i32,
    sticky: bool,
}

impl Fault {
    fn text(&self) -> String {
        let sticky = u8::from(self.sticky);
        format!("{} {} {} {} {sticky}", self.call, self.file, self.nth, self.errno)
    }

    /// What may be lost: the sync of the data file is the one promise that cannot be kept otherwise.
    fn crash(&self) -> Crash {
        if self.call == "sync" && self.file == "data" {
            Crash::Power
        } else {
            Crash::Kill
        }
    }
}

/// Where the processes of one row start: an empty directory, or a pool with a history.
struct Scene {
    name: &'static str,
    dir: tempfile::TempDir,
    /// Calls that a process makes from here, and how often.
    calls: BTreeMap<(String, String), u64>,
}

fn scene(name: &'static str, seed: u64, history: bool) -> Scene {
    let dir = recorder::scratch();
    if history {
        let output = run(dir.path(), seed, &[]);
        assert!(text(&output).contains("ended well"), "{}", text(&output));
    }
    let (trial, report) = (copy(dir.path()), recorder::scratch());
    let report = report.path().join("counts");
    let output = run(
        trial.path(),
        seed + 1,
        &[("INJECTOR_COUNTS", report.display().to_string())],
    );
    assert!(text(&output).contains("ended well"), "{}", text(&output));
    let calls = fs::read_to_string(&report).unwrap();
    let calls = calls.lines().map(|line| {
        let [call, file, count] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        ((call.to_owned(), file.to_owned()), count.parse().unwrap())
    });
    Scene {
        name,
        dir,
        // The test's own record is no file of the store.
        calls: calls.filter(|((_, file), _)| file != "facts").collect(),
    }
}

fn copy(from: &Path) -> tempfile::TempDir {
    let to = recorder::scratch();
    // Sparse files stay sparse.
    let done = Command::new("cp")
        .args(["-a", "--sparse=always"])
        .arg(from.join("."))
        .arg(to.path())
        .status();
    assert!(done.unwrap().success());
    to
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// One process of the workload below `dir`. It has to end by itself.
fn run(dir: &Path, seed: u64, vars: &[(&str, String)]) -> Output {
    let dir = fs::canonicalize(dir).unwrap();
    let orders = Orders {
        dir: dir.clone(),
        seed,
        steps: STEPS,
        exchanges: false,
    };
    let said = PathBuf::from(format!("{}.said", dir.display()));
    let out = fs::File::create(&said).unwrap();
    let mut process = child("workload_child", &orders.vars())
        .env("LD_PRELOAD", injector())
        .env("INJECTOR_ROOT", &dir)
        .env("RUST_BACKTRACE", "0")
        .envs(vars.iter().map(|(name, value)| (name, value)))
        .stdout(out.try_clone().unwrap())
        .stderr(Stdio::from(out))
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            process.kill().unwrap();
            process.wait().unwrap();
            panic!("{vars:?}: it hangs\n{}", fs::read_to_string(&said).unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let output = Output {
        status,
        stdout: fs::read(&said).unwrap(),
        stderr: Vec::new(),
    };
    fs::remove_file(&said).unwrap();
    output
}

/// How the process took it, or what is wrong with that.
fn outcome(output: &Output) -> Result<&'static str, String> {
    let text = text(output);
    if !output.status.success() {
        return Err(format!("it ended with {}: {text}", output.status));
    }
    if text.contains("ended well") {
        return Ok("went on");
    }
    let (_, error) = text.split_once("ended with: ").ok_or("it said nothing")?;
    let error = error.lines().next().unwrap_or_default();
    // sled hides some causes behind words of its own.
    let causes = [
        "o space left",
        "no space",
        "nput/output error",
        "unreadable data",
        "damaged",
        "lost commits",
        "o such file",
    ];
    if !causes.iter().any(|cause| error.contains(cause)) {
        return Err(format!("an unclear error: {error}"));
    }
    Ok(if error.contains("stopped accepting writes") {
        "stopped"
    } else {
        "refused"
    })
}

fn try_fault(scene: &Scene, seed: u64, fault: &Fault, counts: &mut Counts) {
    let dir = copy(scene.dir.path());
    let output = run(dir.path(), seed + 1, &[("INJECTOR_FAULT", fault.text())]);
    let facts = fs::read_to_string(dir.path().join("facts")).unwrap_or_default();
    let judged = outcome(&output).and_then(|outcome| {
        counts.add([
            format!("{} {}", fault.call, fault.file),
            outcome.to_owned(),
            scene.name.to_owned(),
        ]);
        workload::judge(dir.path(), &facts, fault.crash()).judged
    });
    if let Err(what) = judged {
        let kept = dir.keep();
        panic!(
            "STILLPOINT_SEED={seed} {} {:?}: {what}\n{}\nkept in {}",
            scene.name,
            fault.text(),
            text(&output),
            kept.display()
        );
    }
}

/// Errors that a call may give.
fn errors(call: &str) -> &'static [i32] {
    match call {
        "read" | "range" | "unlink" => &[EIO],
        _ => &[ENOSPC, EIO],
    }
}

/// `places` calls of each row: the first, the last, and others between.
fn faults(scene: &Scene, places: u64, rng: &mut Rng) -> Vec<Fault> {
    let mut all = Vec::new();
    for ((call, file), &count) in &scene.calls {
        // The first read of sled's log is ours, and finds a bad device before sled does; what sled reads later is in the
        // page cache then. An error there would make it begin a new log over the old.
        let reads_of_sled = call == "read" && file == "db";
        for place in 0..places.min(if reads_of_sled { 1 } else { count }) {
            let nth = match place {
                0 => 0,
                // Threads do not take the same steps in each run: the last call may not come at all, so a bit earlier.
                1 => count - 1 - count / 8,
                _ => rng.below(count),
            };
            let errors = errors(call);
            all.push(Fault {
                call: call.clone(),
                file: file.clone(),
                nth,
                errno: errors[rng.index(errors.len())],
                sticky: rng.chance(50),
            });
        }
    }
    all.sort();
    all.dedup();
    all
}

#[test]
fn an_error_of_any_call_loses_nothing_that_was_acknowledged() {
    let seed = number("STILLPOINT_SEED").unwrap_or(5);
    let mut rng = Rng::new(seed);
    let mut counts = Counts::default();
    let soak = number("STILLPOINT_SOAK_FAULTS");
    for scene in [scene("first start", seed, false), scene("open", seed, true)] {
        for (call, file) in [
            ("write", "data"),
            ("sync", "data"),
            ("read", "data"),
            ("write", "db"),
            ("sync", "db"),
            ("write", "warm"),
        ] {
            let key = (call.to_owned(), file.to_owned());
            // A new pool's data file has another name while it is made; nothing is read from it.
            assert!(
                scene.calls.contains_key(&key) || scene.name == "first start",
                "{}: no {call} of {file} is seen: {:?}",
                scene.name,
                scene.calls
            );
        }
        let mut all = faults(&scene, soak.unwrap_or(2), &mut rng);
        if soak.is_none() {
            // Always the one that once emptied the pool.
            let worst = |fault: &Fault| fault.call == "read" && fault.file == "db";
            let (kept, mut others): (Vec<_>, Vec<_>) = all.into_iter().partition(worst);
            while others.len() > QUICK_FAULTS / 2 {
                others.swap_remove(rng.index(others.len()));
            }
            all = kept.into_iter().chain(others).collect();
        }
        for fault in all {
            try_fault(&scene, seed, &fault, &mut counts);
        }
    }
    counts.print("failing calls", "calls");
}
