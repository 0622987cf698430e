//! libiscsi's conformance suite (Debian's 1.19) on a thin LUN, a LUN of 4096-byte blocks and a read-only LUN.

use anyhow::{Result, ensure};
use stillpoint_tests::{Daemon, Lists, Tally, story, suite, tests_of_suite};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");

/// Fails on every target, so probably the suite's own fault.
const FAILURES: &[(&str, &str)] = &[
    (
        "iSCSITMF.LUNResetSimpleAsync",
        "the suite expects the reconnect that it does not make; tgt, LIO, istgt fail too",
    ),
    (
        "iSCSITMF.AbortTaskSimpleAsync",
        "asserts in the client when the write has finished before its abort is sent",
    ),
];

/// Skips on any LUN: functions that this version does not have, or that a disk with a fixed medium has not.
const SKIPS: &[(&str, &str)] = &[
    (
        "Sanitize.",
        "SANITIZE is optional, and the suite wants a flag for it",
    ),
    ("WriteAtomic16.", "WRITE ATOMIC is optional"),
    ("PreventAllow.", "the LUN is not removable"),
    ("NoMedia.", "the LUN is not removable"),
    ("StartStopUnit.", "ejecting needs a removable LUN"),
    ("ReadDefectData", "READ DEFECT DATA is optional"),
];

/// What needs another kind of LUN than the thin one, and runs there.
const THIN_SKIPS: &[(&str, &str)] = &[("ReadOnly.", "runs on the read-only LUN")];

/// Fails only where a physical block has several logical ones.
const THIN_FAILURES: &[(&str, &str)] = &[(
    "GetLBAStatus.UnmapSingle",
    "asks for LBA i+1 and wants the answer to be about i+8; passes on 4096-byte blocks, and fails on tgt too",
)];

/// What needs several logical blocks in a physical one; it runs on the thin LUN.
const LARGE_BLOCK_SKIPS: &[(&str, &str)] = &[
    ("ReadOnly.", "runs on the read-only LUN"),
    ("CompareAndWrite.InvalidDataOutSize", "LBPPB < 2"),
    ("WriteSame10.InvalidDataOutSize", "LBPPB < 2"),
    ("WriteSame16.InvalidDataOutSize", "LBPPB < 2"),
    ("WriteSame10.UnmapUnaligned", "LBPPB < 2"),
    ("WriteSame16.UnmapUnaligned", "LBPPB < 2"),
];

/// The suite's reservation tests write one block with 512 bytes of data whatever the block size is.
const LARGE_BLOCK_FAILURES: &[(&str, &str)] = &[(
    "ProutReserve.Access",
    "a 4096-byte block cannot be written with 512 bytes; passes on the thin LUN",
)];

/// Tests that a write-protected LUN must pass: those that only read, and the one about write protection itself. The others
/// write, and fail on any read-only LUN.
const READING: &[&str] = &[
    "Inquiry.",
    "Mandatory.",
    "ModeSense6.",
    "Prefetch",
    "PrinReadKeys.",
    "PrinReportCapabilities.",
    "Read10.",
    "Read12.",
    "Read16.",
    "Read6.",
    "ReadCapacity",
    "ReadOnly.",
    "ReportSupportedOpcodes.",
    "TestUnitReady.",
    "Verify10.",
    "Verify12.",
    "Verify16.",
];

fn config(lun: &str) -> String {
    let mut text = String::new();
    // Two equal LUNs, so that the suite runs on both cores; two portals, because the multipath tests want two paths.
    for name in ["one", "two"] {
        text.push_str(&format!(
            "[[lun]]\nname = \"{name}\"\nsize = \"1GiB\"\n{lun}\n\
             [[target]]\niqn = \"iqn.2026-11.test:{name}\"\nluns = [\"{name}\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n"
        ));
    }
    text + "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[portal]]\naddress = \"127.0.0.1:$PORT2\"\n"
}

fn lanes(daemon: &Daemon) -> Vec<(String, String)> {
    ["one", "two"]
        .iter()
        .map(|name| {
            let iqn = format!("iqn.2026-11.test:{name}");
            let second = format!("iscsi://127.0.0.1:{}/{iqn}/0", daemon.second_port());
            (daemon.url(&iqn, 0), second)
        })
        .collect()
}

fn judge(kind: &str, tally: &Tally, skips: &[(&str, &str)], failures: &[(&str, &str)]) -> Result<()> {
    let (passed, skipped, failed) = tally.counts();
    let (slowest, name) = &tally.slowest;
    println!(
        "story iscsi-test-cu, {kind}: {passed} passed, {skipped} skipped, {failed} failed; {name} took {slowest:.1?}"
    );
    let (skips, failures) = ([SKIPS, skips].concat(), [FAILURES, failures].concat());
    let surprises = tally.surprises(Lists {
        skips: &skips,
        failures: &failures,
    });
    ensure!(
        surprises.is_empty(),
        "{} outcomes that are not allowed:\n{}",
        surprises.len(),
        surprises.join("\n")
    );
    // The lists are for exceptions; a suite that skips most tests proves nothing.
    ensure!(
        passed * 3 > tally.outcomes.len() * 2,
        "only {passed} of {} tests passed",
        tally.outcomes.len()
    );
    Ok(())
}

/// The kinds of LUN differ in what they can be asked. Together they must leave nothing out but what [`SKIPS`] and [`FAILURES`] name.
#[test]
fn every_test_passes_on_some_kind_of_lun() {
    story("iscsi-test-cu: nothing is left out", |_| {
        let listed = |lists: &[&[(&str, &str)]], name: &str| {
            lists
                .iter()
                .flat_map(|list| list.iter())
                .any(|(prefix, _)| name.starts_with(prefix))
        };
        let left_out: Vec<String> = tests_of_suite()?
            .into_iter()
            .filter(|name| {
                !listed(&[SKIPS, FAILURES], name)
                    && listed(&[THIN_SKIPS, THIN_FAILURES], name)
                    && listed(&[LARGE_BLOCK_SKIPS, LARGE_BLOCK_FAILURES], name)
                    && !READING.iter().any(|prefix| name.starts_with(prefix))
            })
            .collect();
        ensure!(left_out.is_empty(), "excepted on every kind of LUN: {left_out:?}");
        Ok(())
    });
}

#[test]
fn thin_lun() {
    story("iscsi-test-cu on a thin LUN", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, &config(""))?;
        let tally = suite(&tests_of_suite()?, &lanes(&daemon))?;
        judge("thin LUN", &tally, THIN_SKIPS, THIN_FAILURES)?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}

#[test]
fn lun_of_4096_byte_blocks() {
    story("iscsi-test-cu on 4096-byte blocks", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, &config("block_size = 4096"))?;
        let tally = suite(&tests_of_suite()?, &lanes(&daemon))?;
        judge(
            "4096-byte blocks",
            &tally,
            LARGE_BLOCK_SKIPS,
            LARGE_BLOCK_FAILURES,
        )?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}

#[test]
fn read_only_lun() {
    story("iscsi-test-cu on a read-only LUN", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, &config("read_only = true"))?;
        let mut tests = tests_of_suite()?;
        tests.retain(|name| READING.iter().any(|prefix| name.starts_with(prefix)));
        let tally = suite(&tests, &lanes(&daemon))?;
        judge("read-only LUN", &tally, &[], &[])?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}
