//! kill -9 at random moments, on the real store; every round goes on with what the one before left.
//!
//! `STILLPOINT_SOAK_ROUNDS` raises the number of rounds, `STILLPOINT_SEED` repeats a run; `tests/soak store` runs all of
//! it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is its purpose"
)]

mod common;

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use stillpoint_snapshot::sim::Rng;

use common::counts::Counts;
use common::facts::Crash;
use common::recorder::{self, child};
use common::workload::{self, Orders};

const QUICK_ROUNDS: u64 = 25;
/// The facts of a pool are judged from its first round on: after so many a new pool keeps that short.
const ROUNDS_PER_POOL: u64 = 9;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is not a number"))
    })
}

/// The workload itself, in a process of its own.
#[test]
#[ignore = "run as a child by the test of this file"]
fn workload_child() {
    workload::run(&Orders::from_env()).unwrap();
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged() {
    let seed = number("STILLPOINT_SEED", 3);
    let mut rng = Rng::new(seed);
    let mut scratch = recorder::scratch();
    let mut worked = 0;
    let mut counts = Counts::default();
    let rounds = number("STILLPOINT_SOAK_ROUNDS", QUICK_ROUNDS);
    for round in 0..rounds {
        if round % ROUNDS_PER_POOL == ROUNDS_PER_POOL - 1 {
            scratch = recorder::scratch();
        }
        let orders = Orders {
            dir: scratch.path().to_owned(),
            seed: seed * 1000 + round,
            steps: u64::MAX,
            exchanges: false,
        };
        let mut process = child("workload_child", &orders.vars())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the child starts");
        std::thread::sleep(Duration::from_millis(5 + rng.below(400)));
        process.kill().unwrap();
        let output = process.wait_with_output().unwrap();
        assert!(
            output.status.code().is_none(),
            "round {round}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let facts = fs::read_to_string(orders.facts()).unwrap_or_default();
        worked += usize::from(facts.contains(" snapshot "));
        let verdict = workload::judge(scratch.path(), &facts, Crash::Kill);
        counts.add(verdict.under_way);
        if let Err(what) = verdict.judged {
            let kept = scratch.keep();
            panic!(
                "STILLPOINT_SEED={seed} round {round}: {what}\nkept in {}",
                kept.display()
            );
        }
    }
    counts.print("kill -9", "rounds");
    assert!(
        worked as u64 > rounds / 3,
        "the rounds were too short to prove anything: {worked} of {rounds}"
    );
}
