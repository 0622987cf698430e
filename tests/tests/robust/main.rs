//! What hostile, broken and unlucky initiators do, against the real daemon over TCP. The daemon may refuse them, answer them or drop
//! them; it may not crash, grow, acknowledge wrong data, or let anybody else wait.

mod data;
mod limits;
mod login;
mod sessions;
mod tasks;

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::raw::{
    self, BHS_LEN, Came, Cdb, IMMEDIATE, Login, Nexus, Pdu, RESERVED, Raw, Reply, data_out, login_request, op,
};
use stillpoint_tests::{Daemon, qemu_io, story, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");

const DISK: &str = "iqn.2026-11.test:disk";

const ME: &str = "iqn.2026-11.test.robust:me";

const OTHER: &str = "iqn.2026-11.test.robust:other";

const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
    [[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n[[lun]]\nname = \"second\"\nsize = \"16MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\", \"second\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n";

const GOOD: u8 = 0;

const CHECK_CONDITION: u8 = 2;

const RESERVATION_CONFLICT: u8 = 0x18;

const ABORTED_COMMAND: u8 = 0x0b;

const ABORT_TASK: u8 = 1;

const LUN_RESET: u8 = 5;

/// What a client that behaves may have to wait, whatever others do. The build under test is not optimised.
const SERVED: Duration = Duration::from_secs(1);

/// Long enough for an answer that must not come.
const QUIET: Duration = Duration::from_millis(300);

fn address(daemon: &Daemon) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], daemon.port()))
}

fn log_in(daemon: &Daemon, initiator: &str) -> Result<Raw> {
    let mut raw = Raw::login(address(daemon), &Nexus::new(initiator, DISK))?.session()?;
    raw.ready(0)?;
    Ok(raw)
}

/// One story with a daemon of its own.
fn attack(name: &str, body: impl FnOnce(&mut Daemon) -> Result<()>) {
    attack_on(name, CONFIG, body);
}

fn attack_on(name: &str, config: &str, body: impl FnOnce(&mut Daemon) -> Result<()>) {
    story(name, |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, config)?;
        body(&mut daemon)?;
        // Whatever was done to it: it lives, it serves, and no task of it died.
        let mut raw = match Raw::login(
            address(&daemon),
            &Nexus::new("iqn.2026-11.test.robust:last", DISK),
        ) {
            Ok(Login::In(raw)) => *raw,
            // The story has stopped the daemon, or serves another target.
            _ => return Ok(()),
        };
        raw.ready(0)?;
        raw.read(0, 0, 1)?;
        ensure!(!daemon.log().contains("panicked"), "a panic in the daemon");
        Ok(())
    });
}

/// Resident memory of the daemon in KiB.
fn memory(daemon: &Daemon) -> Result<u64> {
    let pid = daemon.pid().context("the daemon does not run")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("VmRSS")?;
    line.trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .context("VmRSS is a number")
}

/// A stranger logs in, writes and reads within the time that anybody may expect.
fn served_in_time(daemon: &Daemon) -> Result<Duration> {
    let started = Instant::now();
    let mut raw = log_in(daemon, "iqn.2026-11.test.robust:bystander")?;
    raw.ready(1)?;
    raw.write(1, 8, &[0x5a; 4096])?;
    ensure!(
        raw.read(1, 8, 8)? == [0x5a; 4096],
        "the bystander reads something else than it wrote"
    );
    raw.logout()?;
    let took = started.elapsed();
    ensure!(took < SERVED, "the bystander was served after {took:?} only");
    Ok(took)
}

fn sessions(daemon: &Daemon) -> Result<Vec<Value>> {
    let list = daemon.json(&["session", "list"])?;
    let rows = list
        .as_array()
        .or_else(|| list.get("sessions").and_then(Value::as_array));
    rows.cloned().with_context(|| format!("session list: {list}"))
}

fn session_id(daemon: &Daemon, initiator: &str) -> Result<u64> {
    let rows = sessions(daemon)?;
    let mine = rows
        .iter()
        .find(|row| row.get("initiator").and_then(Value::as_str) == Some(initiator));
    mine.and_then(|row| row.get("id"))
        .and_then(Value::as_u64)
        .with_context(|| format!("no session of {initiator}: {rows:?}"))
}

fn no_answer(raw: &mut Raw, itt: u32) -> Result<()> {
    let came = raw.listen(QUIET)?;
    ensure!(
        came.iter().all(|pdu| pdu.tag() != itt),
        "an answer that must not come: {came:?}"
    );
    Ok(())
}

fn rejected(raw: &mut Raw, sent: &Pdu) -> Result<u8> {
    let reject = raw.expect("a Reject", |pdu| pdu.opcode() == op::REJECT)?;
    ensure!(
        reject.data.starts_with(&sent.announcing(sent.data.len())),
        "the Reject does not carry the header: {reject:?}"
    );
    Ok(reject.at(2))
}

fn r2t(raw: &mut Raw, itt: u32) -> Result<Pdu> {
    raw.expect("an R2T", |pdu| pdu.opcode() == op::R2T && pdu.tag() == itt)
}

fn tmf_response(raw: &mut Raw, itt: u32) -> Result<u8> {
    Ok(raw
        .expect("a task management response", |pdu| {
            pdu.opcode() == op::TMF_RESPONSE && pdu.tag() == itt
        })?
        .at(2))
}

/// FUA writes of 4 KiB of one byte to consecutive places: they go through a worker thread, and are all received when this returns.
fn write_many(raw: &mut Raw, lun: u8, count: u32, byte: u8) -> Result<Vec<u32>> {
    let mut tags = Vec::new();
    for i in 0..count {
        let itt = raw.new_itt();
        let pdu = Cdb::write10(lun, i * 8, 8).pdu(itt).byte(33, 0x08);
        raw.request(pdu.data([byte; 4096]))?;
        tags.push(itt);
    }
    let echo = raw.new_itt();
    raw.request(Pdu::new(op::NOP_OUT | IMMEDIATE).itt(echo).word(20, RESERVED))?;
    raw.expect("the echo", |pdu| pdu.opcode() == op::NOP_IN && pdu.tag() == echo)?;
    Ok(tags)
}

fn all_are(raw: &mut Raw, lun: u8, count: u32, byte: u8) -> Result<()> {
    for i in 0..count {
        let block = raw.read(lun, i * 8, 8)?;
        ensure!(
            block == [byte; 4096],
            "block {i} holds {:#x}, not {byte:#x}: a write of the past",
            block.first().copied().unwrap_or_default()
        );
    }
    Ok(())
}
