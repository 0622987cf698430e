//! libiscsi's conformance suite, one process per test: a reservation left by a failed test would fail all that follow.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::process::run;
use crate::qemu_img::qemu_io;
use crate::tools::tool;

/// One test. The longest compares some 250 MiB byte by byte, in a daemon built without optimisation: 30 s on a busy machine.
const TEST_LIMIT: Duration = Duration::from_secs(180);

/// Tests that take zeroes on the disk for granted beyond what they write themselves (`MultipathIO.CompareAndWrite` compares one block more than
/// it has zeroed).
const WANT_ZEROES: &str = "MultipathIO.CompareAndWrite";

/// What came of one test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All assertions held.
    Passed,
    /// The suite skipped it, or a part of it: its reason.
    Skipped(String),
    /// What the suite printed.
    Failed(String),
}

/// What a LUN may skip and fail; everything else must pass. Each entry is a prefix of test names with a reason.
#[derive(Debug, Clone, Copy)]
pub struct Lists<'a> {
    /// Tests that may be skipped.
    pub skips: &'a [(&'a str, &'a str)],
    /// Tests that fail on every target.
    pub failures: &'a [(&'a str, &'a str)],
}

/// Outcomes of a whole run by test name.
#[derive(Debug, Default)]
pub struct Tally {
    /// By name without the family (`Read10.Simple`).
    pub outcomes: BTreeMap<String, Outcome>,
    /// The test that took longest.
    pub slowest: (Duration, String),
}

impl Tally {
    /// Passed, skipped, failed.
    #[must_use]
    pub fn counts(&self) -> (usize, usize, usize) {
        let count = |wanted: fn(&Outcome) -> bool| self.outcomes.values().filter(|o| wanted(o)).count();
        (
            count(|o| matches!(o, Outcome::Passed)),
            count(|o| matches!(o, Outcome::Skipped(_))),
            count(|o| matches!(o, Outcome::Failed(_))),
        )
    }

    /// Every outcome that `lists` does not allow, readable.
    #[must_use]
    pub fn surprises(&self, lists: Lists<'_>) -> Vec<String> {
        let listed =
            |list: &[(&str, &str)], name: &str| list.iter().any(|(prefix, _)| name.starts_with(prefix));
        self.outcomes
            .iter()
            .filter_map(|(name, outcome)| match outcome {
                Outcome::Passed => None,
                Outcome::Skipped(_) if listed(lists.skips, name) => None,
                Outcome::Failed(_) if listed(lists.failures, name) => None,
                Outcome::Skipped(reason) => Some(format!("{name} was skipped: {reason}")),
                Outcome::Failed(text) => Some(format!("{name} failed:\n{text}")),
            })
            .collect()
    }
}

/// Names of all tests of the suite, as this version lists them.
///
/// # Errors
/// The suite cannot be started.
pub fn tests_of_suite() -> Result<Vec<String>> {
    let text = run(tool("iscsi-test-cu")?.arg("--list"), TEST_LIMIT)?.success()?;
    let names: Vec<String> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("ALL."))
        .filter(|name| name.contains('.'))
        .map(str::to_owned)
        .collect();
    ensure!(
        names.len() > 200,
        "iscsi-test-cu lists only {} tests",
        names.len()
    );
    Ok(names)
}

/// Runs `tests` one after another on each of `lanes`, the lanes side by side. A lane is a LUN of its own with two URLs (the
/// multipath tests want two); all lanes are equal, and each test runs on one of them.
///
/// # Errors
/// The suite cannot be started, or a test runs for ever.
pub fn suite(tests: &[String], lanes: &[(String, String)]) -> Result<Tally> {
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    thread::scope(|scope| {
        let workers: Vec<_> = lanes
            .iter()
            .map(|lane| {
                scope.spawn(|| -> Result<()> {
                    while let Some(name) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let started = Instant::now();
                        let outcome = one(name, lane)?;
                        let took = (started.elapsed(), name.clone());
                        let mut tally = tally.lock().expect("no worker panics");
                        tally.slowest = tally.slowest.clone().max(took);
                        tally.outcomes.insert(name.clone(), outcome);
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    Ok(tally.into_inner().expect("no worker panics"))
}

/// What `WriteSame10.ZeroBlocks` and `WriteSame16.ZeroBlocks` print behind "[SKIPPED]" **after** they have sent their command to
/// a unit with WSNZ = 1 and have seen it refused with INVALID FIELD IN CDB. That is the whole test for such a unit, so it
/// passed. (WSNZ = 0 would make the suite's `UnmapUntilEnd` want blocks unmapped by a pattern that is not zeroes, against SBC-3.)
const REFUSAL_CHECKED: &str = "does not support 0-blocks.";

fn one(name: &str, lane: &(String, String)) -> Result<Outcome> {
    if name.starts_with(WANT_ZEROES) {
        qemu_io(&lane.0, &["write -z 0 4M"])?
            .success()
            .context("zeroing the disk")?;
    }
    let mut command = tool("iscsi-test-cu")?;
    command.args([
        "--dataloss",
        "--fail",
        "--verbose",
        &format!("--test=ALL.{name}"),
        &lane.0,
        &lane.1,
    ]);
    let finished = run(&mut command, TEST_LIMIT).with_context(|| format!("iscsi-test-cu {name}"))?;
    let text = format!("{}{}", finished.stdout, finished.stderr);
    // An exit code alone proves nothing: the suite must say that it ran exactly one test.
    let ran = text.lines().any(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        matches!(words.as_slice(), ["tests", "1", "1", ..])
    });
    if finished.code != 0 || !ran {
        return Ok(Outcome::Failed(format!("exit code {}\n{text}", finished.code)));
    }
    let skip = text
        .lines()
        .filter(|line| !line.contains(REFUSAL_CHECKED))
        .find_map(|line| line.split_once("[SKIPPED]"));
    Ok(match skip {
        Some((_, reason)) => Outcome::Skipped(reason.trim().to_owned()),
        None => Outcome::Passed,
    })
}
