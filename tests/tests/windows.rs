//! The Windows list: what Windows calls a proper disk, on every kind of LUN; and on tgt, which shows that the list is fair.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use stillpoint_tests::windows::{Disk, Place, Score, score};
use stillpoint_tests::{Daemon, Tgt, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");

fn lun(name: &str, more: &str) -> String {
    format!(
        "[[lun]]\nname = \"{name}\"\nsize = \"128MiB\"\n{more}\n\
         [[target]]\niqn = \"iqn.2026-11.test:{name}\"\nluns = [\"{name}\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n"
    )
}

fn config(with_clone: bool) -> String {
    let mut text = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n".to_owned();
    text.push_str(&lun("plain", ""));
    text.push_str(&lun("large", "block_size = 4096"));
    if with_clone {
        text.push_str(&lun("twin", ""));
    }
    text
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn report(kind: &str, score: &Score) {
    let (slowest, name) = score.slowest;
    println!(
        "story windows list, {kind}: {} passed, {} failed, {} not declared; `{name}` took {slowest:.1?}",
        score.passed,
        score.failed.len(),
        score.not_declared
    );
}

/// The kinds of LUNs that there are: a plain one, one of 4096-byte blocks, a clone, a mounted snapshot.
fn kinds(daemon: &Daemon) -> Result<Vec<(&'static str, Place)>> {
    let place = |iqn: &str| Place {
        address: loopback(daemon.port()),
        iqn: iqn.to_owned(),
        lun: 0,
    };
    daemon.json(&[
        "snapshot",
        "create",
        "plain",
        "--name",
        "base",
        "--consistency",
        "crash",
    ])?;
    daemon.json(&["clone", "create", "plain@base", "twin"])?;
    daemon.write_config(&config(true))?;
    daemon.text(&["config", "apply", "--yes"])?;
    let mounted = daemon.json(&["snapshot", "mount", "plain@base"])?;
    let iqn = mounted
        .get("iqn")
        .and_then(Value::as_str)
        .with_context(|| format!("no iqn in {mounted}"))?;
    Ok(vec![
        ("plain LUN", place("iqn.2026-11.test:plain")),
        ("LUN of 4096-byte blocks", place("iqn.2026-11.test:large")),
        ("clone", place("iqn.2026-11.test:twin")),
        ("mounted snapshot", place(iqn)),
    ])
}

#[test]
fn every_kind_of_lun_is_a_proper_disk() {
    story("windows list", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, &config(false))?;
        let kinds = kinds(&daemon)?;
        let mut identities = Vec::new();
        for (_, place) in &kinds {
            identities.push(Disk::open(place, "first")?.identity()?);
        }
        for (i, (serial, naa)) in identities.iter().enumerate() {
            let same = |(s, n): &&(Vec<u8>, Vec<u8>)| s == serial || n == naa;
            ensure!(
                identities.iter().skip(i + 1).find(same).is_none(),
                "two LUNs have one identity: Windows takes them for one disk: {identities:02x?}"
            );
        }
        // Each kind has a LUN of its own: side by side, on all cores.
        let scores = thread::scope(|scope| -> Result<Vec<Score>> {
            let runs: Vec<_> = kinds
                .iter()
                .map(|(_, place)| scope.spawn(|| score(place)))
                .collect();
            runs.into_iter()
                .map(|run| run.join().map_err(|_| anyhow!("a run panicked"))?)
                .collect()
        })?;
        let mut failures = String::new();
        for ((kind, _), score) in kinds.iter().zip(&scores) {
            report(kind, score);
            ensure!(score.not_declared == 0, "{kind}: ODX is not declared any more");
            if !score.failed.is_empty() {
                writeln!(failures, "{kind}:\n{}", score.failures())?;
            }
        }
        ensure!(failures.is_empty(), "{failures}");
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}

#[test]
fn the_list_is_fair_to_tgt() {
    story("oracle: windows list", |scratch| {
        let tgt = Tgt::start(scratch, 128 << 20)?;
        let score = score(&Place {
            address: loopback(tgt.port()),
            iqn: tgt.iqn().to_owned(),
            lun: 1,
        })?;
        report("tgt", &score);
        println!("{}", score.failures());
        ensure!(
            (11..50).contains(&score.failed.len()),
            "{} failures of tgt: a fair list finds its known faults and little else",
            score.failed.len()
        );
        Ok(())
    });
}
