//! Large things through the daemon: a LUN of 64 TiB, many LUNs in one pool. `STILLPOINT_SOAK_LUNS` sets their number (1000 is what
//! is meant to work well); the times are printed.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Result, ensure};
use stillpoint_tests::raw::{Cdb, Nexus, Raw};
use stillpoint_tests::{Daemon, qemu_io, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const TIB: u64 = 1 << 40;

#[test]
fn a_lun_of_64_tib() {
    story("64 TiB", |scratch| {
        let config = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"huge\"\nsize = \"64TiB\"\n\
                      [[target]]\niqn = \"iqn.2026-11.test:huge\"\nluns = [\"huge\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n";
        let mut daemon = Daemon::start(BINARY, scratch, config)?;
        let nexus = Nexus::new("iqn.2026-11.test:a", "iqn.2026-11.test:huge");
        let mut session = Raw::login(daemon.portal().parse()?, &nexus)?.session()?;
        session.ready(0)?;
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
        let answer = session.run(&Cdb::reads(0, &cdb, 32))?;
        let last = answer
            .data
            .get(..8)
            .and_then(|b| b.try_into().ok())
            .map(u64::from_be_bytes);
        ensure!(last == Some(64 * TIB / 512 - 1), "READ CAPACITY(16): {answer:?}");
        drop(session);

        let url = daemon.url("iqn.2026-11.test:huge", 0);
        let ends = [0, 2 * TIB - 512, 2 * TIB, 4 * TIB - 4096, 64 * TIB - 65536];
        let writes: Vec<String> = ends
            .iter()
            .map(|at| format!("write -P 0x6{} {at} 65536", at % 7))
            .collect();
        let reads: Vec<String> = ends
            .iter()
            .map(|at| format!("read -P 0x6{} {at} 65024", at % 7))
            .collect();
        let asked = |lines: &[String]| -> Result<()> {
            // The second overlaps the third: in their order, so that the later one wins where they meet.
            let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
            qemu_io(&url, &lines)?.success().map(drop)
        };
        asked(&writes)?;
        qemu_io(&url, &["flush"])?.success()?;
        asked(&[reads.as_slice().split_at(2).1, &reads[..1]].concat())?;
        daemon.json(&["snapshot", "create", "huge", "--name", "s"])?;
        qemu_io(&url, &[&format!("write -P 0x77 {} 65536", 64 * TIB - 65536)])?.success()?;
        let diff = daemon.json(&["snapshot", "diff", "huge@s"])?;
        ensure!(
            diff["changed_bytes"] == 65536 && diff["extents"][0]["offset_bytes"] == 64 * TIB - 65536,
            "{diff}"
        );
        let beyond = qemu_io(&url, &[&format!("write -P 1 {} 65536", 64 * TIB)])?;
        ensure!(
            beyond.code != 0 || beyond.stdout.contains("rror"),
            "written beyond the end"
        );
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.resume()?;
        qemu_io(&url, &[&format!("read -P 0x77 {} 65536", 64 * TIB - 65536)])?.success()?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.text(&["store", "check"])?;
        Ok(())
    });
}

#[test]
fn many_luns() {
    story("many LUNs", |scratch| {
        let count: usize = std::env::var("STILLPOINT_SOAK_LUNS").map_or(Ok(60), |n| n.parse())?;
        let mut config = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n".to_owned();
        for n in 0..count {
            writeln!(config, "[[lun]]\nname = \"l{n}\"\nsize = \"1GiB\"")?;
        }
        for n in 0..count {
            writeln!(
                config,
                "[[target]]\niqn = \"iqn.2026-11.test:l{n}\"\nluns = [\"l{n}\"]\ninitiators = [\"*\"]"
            )?;
        }
        let begun = Instant::now();
        let mut daemon = Daemon::start(BINARY, scratch, &config)?;
        let first = begun.elapsed();
        let last = daemon.url(&format!("iqn.2026-11.test:l{}", count - 1), 0);
        qemu_io(&last, &["write -P 5 0 1M", "flush"])?.success()?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        let begun = Instant::now();
        daemon.resume()?;
        let again = begun.elapsed();
        let begun = Instant::now();
        let list = daemon.json(&["lun", "list"])?;
        let listed = begun.elapsed();
        ensure!(
            list.as_array().is_some_and(|l| l.len() == count),
            "LUNs are missing"
        );
        qemu_io(&last, &["read -P 5 0 1M"])?.success()?;
        println!(
            "story many LUNs: {count} LUNs: first start {first:?}, later {again:?}, `lun list` {listed:?}"
        );
        Ok(())
    });
}
