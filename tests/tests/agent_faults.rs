//! The network between daemon and agent breaks before each single message of a snapshot, in either direction. Real processes, a real
//! file system, a hook that declares an application.
//!
//! After each of them: the command has ended with 0 or 3, the file system takes writes, the hook was told to go on, nothing is left
//! behind; and a snapshot that claims more than `crash` was taken while the hook held. `STILLPOINT_SOAK_FAULTS=1` (minutes) adds a line that
//! stands still for longer than any keepalive, before each message.

#![expect(clippy::indexing_slicing, reason = "reading a JSON value by key cannot panic")]

use std::fs::{self, File};
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{AgentHost, Fault, Way, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const AGENT: &str = env!("CARGO_BIN_EXE_stillpoint-agent-under-test");
const LIMIT: Duration = Duration::from_secs(60);
/// Longer than the keepalive (3 s), shorter than the hold.
const STALL: Duration = Duration::from_millis(4500);

/// Leaves a mark on the file system for as long as the application is held.
const HOOK: &str = "#!/bin/sh
case $1 in
    freeze) touch $POINT/held ;;
    thaw) rm -f $POINT/held ;;
esac
";

/// What came of a snapshot.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Refused,
    Kept(String),
}

struct Scene {
    host: AgentHost,
    taken: Vec<String>,
}

impl Scene {
    /// One snapshot with a fault; `None` when the snapshot ended before its record came.
    fn round(&mut self, name: &str, fault: Fault, policy: &str) -> Result<Option<End>> {
        self.host.proxy.arm(Some(fault));
        let finished = self.host.daemon.cli(&[
            "--json",
            "snapshot",
            "create",
            "app",
            "--name",
            name,
            "--consistency",
            "application",
            "--on-failure",
            policy,
        ])?;
        let missed = self.host.proxy.arm(None);
        let end = match finished.code {
            3 => End::Refused,
            0 => {
                let created: Value = serde_json::from_str(&finished.stdout)?;
                self.taken.push(name.to_owned());
                End::Kept(created["consistency"].as_str().context("a level")?.to_owned())
            }
            _ => anyhow::bail!("{fault:?}: {finished:?}"),
        };
        ensure!(
            policy == "crash-consistent" || end == End::Refused || end == End::Kept("application".to_owned()),
            "{fault:?}: {end:?}"
        );
        self.ensure_free()
            .with_context(|| format!("after {fault:?}: {end:?}"))?;
        if end == End::Kept("application".to_owned()) {
            self.ensure_held_in(name).with_context(|| format!("{fault:?}"))?;
        }
        Ok((!missed).then_some(end))
    }

    /// Nothing is frozen, held or left behind.
    fn ensure_free(&self) -> Result<()> {
        let began = Instant::now();
        let mut file = File::create(self.host.point().join("proof"))?;
        file.write_all(b"it takes writes")?;
        file.sync_all()?;
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "a write took {:?}",
            began.elapsed()
        );
        wait_until("the hook to be told to go on", LIMIT, || {
            let journals = fs::read_dir(self.host.dir().join("agent-run"))?.flatten();
            let left = journals.filter(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                name.starts_with("frozen-") || name.starts_with("hooks-")
            });
            Ok(left.count() == 0 && !self.host.point().join("held").exists())
        })?;
        let listed = self.host.daemon.json(&["snapshot", "list", "app"])?;
        let names: Vec<_> = listed
            .as_array()
            .into_iter()
            .flatten()
            .map(|row| row["name"].as_str())
            .collect();
        let taken: Vec<_> = self.taken.iter().map(|name| Some(name.as_str())).collect();
        ensure!(
            names.len() == taken.len() && taken.iter().all(|name| names.contains(name)),
            "{names:?}, not {taken:?}"
        );
        Ok(())
    }

    /// The mark of the hook is in the snapshot: it was taken while the application was held.
    fn ensure_held_in(&self, name: &str) -> Result<()> {
        let export = self.host.look_into(name)?;
        ensure!(
            export.point().join("held").exists(),
            "snapshot {name} was not taken while the application was held"
        );
        drop(export);
        self.host
            .daemon
            .json(&["snapshot", "unmount", &format!("app-{name}"), "--force", "--yes"])?;
        Ok(())
    }
}

#[test]
fn a_cut_before_each_message_leaves_nothing_frozen_and_claims_nothing_false() {
    story("agent faults", |scratch| {
        let mut host = AgentHost::new(scratch, BINARY, AGENT)?;
        host.hook("10-held", HOOK, Some("held"))?;
        host.enrol("")?;
        let mut scene = Scene {
            host,
            taken: Vec::new(),
        };
        // One in peace, to learn how many records there are.
        scene.host.create("peace", &["--consistency", "application"])?;
        scene.taken.push("peace".to_owned());
        scene.ensure_held_in("peace")?;
        let records = [Way::There, Way::Back].map(|way| (way, scene.host.proxy.records(way)));
        println!("records of a snapshot's channel: {records:?}");
        let soak = std::env::var_os("STILLPOINT_SOAK_FAULTS").is_some();
        let stalls: &[Option<Duration>] = if soak { &[None, Some(STALL)] } else { &[None] };
        let mut ends = std::collections::BTreeMap::new();
        for stall in stalls {
            for (way, count) in records {
                for record in 0..count {
                    let fault = Fault {
                        way,
                        record,
                        stall: *stall,
                    };
                    let policy = if record % 2 == 0 {
                        "fail"
                    } else {
                        "crash-consistent"
                    };
                    let name =
                        format!("{way:?}{record}{}", if stall.is_some() { "s" } else { "" }).to_lowercase();
                    let end = scene.round(&name, fault, policy)?;
                    *ends.entry(format!("{end:?}")).or_insert(0) += 1;
                }
            }
        }
        println!("ends: {ends:?}");
        // A lost answer to Release is asked for again, and nothing is lost with it.
        ensure!(ends.keys().any(|end| end.contains("application")), "{ends:?}");
        ensure!(ends.keys().any(|end| end.contains("Refused")), "{ends:?}");
        ensure!(ends.keys().any(|end| end.contains("crash")), "{ends:?}");
        // And it still works.
        scene
            .host
            .create("after", &["--consistency", "application"])
            .map(drop)
    });
}
