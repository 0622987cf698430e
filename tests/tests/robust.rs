//! What hostile, broken and unlucky initiators do, against the real daemon over TCP. The daemon may refuse them, answer them or drop
//! them; it may not crash, grow, acknowledge wrong data, or let anybody else wait.

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
fn served_in_time(daemon: &Daemon) -> Result<()> {
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
    Ok(())
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

/// A write whose Data-Out breaks a rule ends with ABORTED COMMAND, changes nothing, and the session goes on.
fn broken_write(
    raw: &mut Raw,
    what: &str,
    break_it: impl FnOnce(&mut Raw, &Pdu) -> Result<()>,
) -> Result<()> {
    let itt = raw.start(&Cdb::write10(0, 0, 128), &[])?;
    let ask = r2t(raw, itt)?;
    break_it(raw, &ask)?;
    let reply = raw.finish(itt).with_context(|| what.to_owned())?;
    ensure!(
        reply.status == CHECK_CONDITION && reply.sense_code().0 == ABORTED_COMMAND,
        "{what}: {reply:?}"
    );
    ensure!(
        raw.read(0, 0, 128)?.iter().all(|byte| *byte == 0),
        "{what}: the broken write reached the medium"
    );
    Ok(())
}

#[test]
fn p01_lengths_and_offsets_are_checked_against_the_command() {
    attack("lengths and offsets of Data-Out", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        broken_write(&mut raw, "more data than asked for", |raw, ask| {
            raw.send(&data_out(ask, 0, 0, true).data(vec![1; 65_536 + 512]))
        })?;
        broken_write(&mut raw, "less data than asked for", |raw, ask| {
            raw.send(&data_out(ask, 0, 0, true).data(vec![1; 512]))
        })?;
        broken_write(&mut raw, "an offset beyond the transfer", |raw, ask| {
            raw.send(&data_out(ask, 0, 0xffff_fe00, true).data(vec![1; 65_536]))
        })?;
        broken_write(&mut raw, "an offset that was not asked for", |raw, ask| {
            raw.send(&data_out(ask, 0, 0, false).data(vec![1; 512]))?;
            raw.send(&data_out(ask, 1, 1024, true).data(vec![1; 65_536 - 1024]))
        })?;
        broken_write(&mut raw, "the same DataSN twice", |raw, ask| {
            raw.send(&data_out(ask, 0, 0, false).data(vec![1; 512]))?;
            raw.send(&data_out(ask, 0, 512, true).data(vec![1; 65_536 - 512]))
        })?;
        broken_write(&mut raw, "a DataSN left out", |raw, ask| {
            raw.send(&data_out(ask, 1, 0, true).data(vec![1; 65_536]))
        })?;
        // A transfer tag that never was: rejected, and the command still gets its data.
        let itt = raw.start(&Cdb::write10(0, 0, 8), &[])?;
        let ask = r2t(&mut raw, itt)?;
        let stray = data_out(&ask, 0, 0, true)
            .word(16, 0xdead)
            .word(20, 0xbeef)
            .data(vec![7; 512]);
        raw.send(&stray)?;
        rejected(&mut raw, &stray)?;
        raw.satisfy(&ask, &[9; 4096])?;
        ensure!(raw.finish(itt)?.status == GOOD);
        ensure!(raw.read(0, 0, 8)? == [9; 4096]);
        Ok(())
    });
}

#[test]
fn p02_cdb_length_expected_length_and_sent_bytes_are_three_numbers() {
    attack("three lengths", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        raw.write(0, 0, &[3; 8192])?;
        // Reads: the initiator takes less, and more, than the CDB gives.
        let less = raw.run(&Cdb::read10(0, 0, 16).edtl(512))?;
        ensure!(
            (less.status, less.data.len(), less.residual_flags, less.residual) == (GOOD, 512, 4, 7680),
            "{less:?}"
        );
        let more = raw.run(&Cdb::read10(0, 0, 16).edtl(65_536))?;
        ensure!(
            (more.status, more.data.len(), more.residual_flags, more.residual) == (GOOD, 8192, 2, 57_344),
            "{more:?}"
        );
        // Writes: fewer bytes than the CDB wants never change what was not sent.
        let short = raw.run_write(&Cdb::write10(0, 0, 16).edtl(512), &[4; 512])?;
        let now = raw.read(0, 0, 16)?;
        ensure!(
            now[512..] == [3; 8192 - 512],
            "a short write changed more than was sent ({short:?})"
        );
        ensure!(short.residual_flags == 4 && short.residual == 7680, "{short:?}");
        let long = raw.run_write(&Cdb::write10(0, 0, 1).edtl(8192), &[5; 8192])?;
        ensure!((long.residual_flags, long.residual) == (2, 7680), "{long:?}");
        ensure!(
            raw.read(0, 1, 15)? == [3; 15 * 512],
            "a long write went beyond its CDB"
        );
        // Immediate data beyond the expected length, and a write that is said to be a read.
        let itt = raw.start(&Cdb::write10(0, 0, 1), &[6; 4096])?;
        ensure!(
            raw.finish(itt)?.status == CHECK_CONDITION,
            "more immediate data than announced"
        );
        let mut wrong = Cdb::write10(0, 2, 1).pdu(0);
        wrong.bhs[1] = 0xc0;
        let itt = raw.new_itt();
        raw.request(wrong.itt(itt))?;
        let reply = raw.finish(itt)?;
        ensure!(
            reply.data.is_empty() && raw.read(0, 2, 1)? == [3; 512],
            "a WRITE without data wrote: {reply:?}"
        );
        Ok(())
    });
}

#[test]
fn p03_nothing_is_allocated_on_an_announced_length() {
    attack("announced lengths", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        let before = memory(daemon)?;
        let mut held = Vec::new();
        for i in 0..8 {
            let mut one =
                Raw::login(address(daemon), &Nexus::new(&format!("{OTHER}{i}"), DISK))?.session()?;
            one.ready(0)?;
            // 8 MiB each, of which R2Ts ask for the first; nothing is sent.
            for _ in 0..32 {
                one.start(&Cdb::write10(0, 0, 16_384), &[])?;
            }
            // And the header of 256 KiB of immediate data that does not follow.
            let itt = one.new_itt();
            let half = one.number(Cdb::write10(0, 0, 512).pdu(itt));
            one.send_bytes(&half.announcing(262_144))?;
            held.push(one);
        }
        thread::sleep(QUIET);
        let grown = memory(daemon)?.saturating_sub(before);
        ensure!(
            grown < 48 << 10,
            "2 GiB announced and nothing sent: {grown} KiB more"
        );
        raw.read(0, 0, 8)?;
        served_in_time(daemon)?;
        // Before login there is less patience: no segment longer than 8192 bytes.
        let mut stranger = Raw::connect(address(daemon))?;
        stranger.send_bytes(&login_request(0x87, &[0; 6]).announcing(0x00ff_ffff))?;
        stranger.ends_within(SERVED)?;
        Ok(())
    });
}

#[test]
fn p04_a_peer_that_never_reads_costs_little_and_delays_nobody() {
    attack("peer that never reads", |daemon| {
        let mut raws = Vec::new();
        let before = memory(daemon)?;
        for i in 0..4 {
            let mut raw = log_in(daemon, &format!("{ME}{i}"))?;
            let ping = Pdu::new(op::NOP_OUT | IMMEDIATE)
                .word(20, RESERVED)
                .data(vec![0x77; 65_536]);
            let stream = raw.stream()?;
            stream.set_write_timeout(Some(Duration::from_millis(500)))?;
            for _ in 0..128 {
                raw.start(&Cdb::read10(0, 0, 2048), &[])?;
            }
            let mut pings = 0u32;
            while pings < 4000 {
                let itt = raw.new_itt();
                if raw.request(ping.clone().itt(itt)).is_err() {
                    break;
                }
                pings += 1;
            }
            ensure!(
                pings < 4000,
                "256 MiB of pings were taken although no echo was read"
            );
            raws.push(raw);
            served_in_time(daemon)?;
        }
        // Per session: 32 MiB of read data, 4 MiB of echoes, what one batch of frames holds.
        let grown = memory(daemon)?.saturating_sub(before);
        ensure!(
            grown < 4 * (48 << 10),
            "4 peers that read nothing cost {grown} KiB"
        );
        Ok(())
    });
}

#[test]
fn p04_all_sessions_share_one_memory() {
    let config = format!("session_memory = \"64MiB\"\n{CONFIG}");
    attack_on("robust 4: one memory for all sessions", &config, |daemon| {
        served_in_time(daemon)?;
        let before = memory(daemon)?;
        let mut hogs = Vec::new();
        for number in 0..24 {
            let nexus = Nexus::new(&format!("iqn.2026-11.test.robust:hog{number}"), DISK)
                .key("MaxRecvDataSegmentLength", "262144")
                .key("FirstBurstLength", "65536");
            let mut hog = Raw::login(address(daemon), &nexus)?.session()?;
            hog.ready(0)?;
            // 32 MiB to read, which nobody takes, and 64 MiB to write, of which only the beginning ever comes: 2.3 GiB in all.
            for _ in 0..32 {
                hog.start(&Cdb::read10(0, 0, 2048), &[])?;
            }
            for _ in 0..16 {
                hog.start(&Cdb::write10(0, 0, 8192), &[7; 65536])?;
            }
            hogs.push(hog);
        }
        let mut most = 0;
        for _ in 0..5 {
            served_in_time(daemon)?;
            most = most.max(memory(daemon)?.saturating_sub(before));
        }
        println!(
            "story robust: 24 sessions that ask for 2.3 GiB of a session_memory of 64 MiB: {} MiB more",
            most >> 10
        );
        ensure!(most < 192 << 10, "the daemon grew by {most} KiB");
        // Whoever comes when they are gone has all of it.
        drop(hogs);
        let mut raw = log_in(daemon, OTHER)?;
        for _ in 0..4 {
            ensure!(raw.read(0, 0, 8192)?.len() == 4 << 20, "a large read");
        }
        Ok(())
    });
}

#[test]
fn p05_immediate_commands_have_a_limit_of_their_own() {
    attack("immediate commands", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        for _ in 0..64 {
            let itt = raw.new_itt();
            let pdu = Cdb::write10(0, 0, 128)
                .pdu(itt)
                .byte(0, op::SCSI_COMMAND | IMMEDIATE);
            raw.request(pdu)?;
        }
        let came = raw.listen(QUIET)?;
        let rejects = came
            .iter()
            .filter(|pdu| pdu.opcode() == op::REJECT && pdu.at(2) == 0x06)
            .count();
        let asks = came.iter().filter(|pdu| pdu.opcode() == op::R2T).count();
        ensure!(
            rejects >= 32 && asks <= 32,
            "{rejects} rejects, {asks} R2Ts of 64 immediate writes"
        );
        // The window is not touched by any of it.
        raw.read(0, 0, 1)?;
        ensure!(raw.tmf(LUN_RESET, 0)? == 0, "a LUN RESET gets through");
        raw.ready(0)
    });
}

#[test]
fn p06_half_finished_peers_delay_nobody() {
    attack("half-finished peers", |daemon| {
        let mut held = Vec::new();
        for i in 0..20 {
            let mut raw = Raw::connect(address(daemon))?;
            let request = Nexus::new(&format!("{OTHER}{i}"), DISK).request().wire();
            raw.send_bytes(&request[..request.len() - 1 - i])?;
            held.push(raw);
        }
        for i in 0..8 {
            let mut raw = log_in(daemon, &format!("{ME}{i}"))?;
            let wire = raw.number(Cdb::write10(0, 0, 8).pdu(1).data([1; 4096])).wire();
            raw.send_bytes(&wire[..wire.len() - 100])?;
            held.push(raw);
        }
        served_in_time(daemon)
    });
}

#[test]
fn p07_a_flood_without_login_locks_nobody_out() {
    attack("flood of connections", |daemon| {
        let before = memory(daemon)?;
        let stop = Arc::new(AtomicBool::new(false));
        let target = address(daemon);
        let flood = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let mut held = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(stream) = TcpStream::connect_timeout(&target, SERVED) {
                        held.push(stream);
                    }
                    if held.len() > 700 {
                        held.drain(..200);
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            })
        };
        // The whole allowance is taken, from the very address of those who behave.
        thread::sleep(Duration::from_millis(1000));
        let served = (0..5).try_for_each(|_| served_in_time(daemon));
        let grown = memory(daemon)?.saturating_sub(before);
        stop.store(true, Ordering::Relaxed);
        flood.join().ok();
        served?;
        ensure!(grown < 64 << 10, "the flood costs {grown} KiB");
        Ok(())
    });
}

#[test]
fn p07_login_has_a_deadline_also_for_one_byte_a_second() {
    attack("login deadline", |daemon| {
        let started = Instant::now();
        let mut silent = Raw::connect(address(daemon))?;
        let mut slow = Raw::connect(address(daemon))?;
        let mut begun = Raw::connect(address(daemon))?;
        // In the middle of the login: the security stage, and then nothing.
        begun.send(&login_request(0x00, &[0; 6]).data(format!("InitiatorName={ME}\0TargetName={DISK}\0")))?;
        begun.expect("a Login Response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        let wire = Nexus::new(ME, DISK).request().wire();
        let mut ended = None;
        for byte in &wire {
            if slow.send_bytes(&[*byte]).is_err() {
                break;
            }
            if let Came::End = slow.receive(Duration::from_secs(1))? {
                ended = Some(started.elapsed());
                break;
            }
            ensure!(
                started.elapsed() < Duration::from_secs(20),
                "one byte a second holds a connection for {:?}",
                started.elapsed()
            );
        }
        let ended = ended.unwrap_or_else(|| started.elapsed());
        ensure!(
            ended > Duration::from_secs(5),
            "the slow login had only {ended:?}"
        );
        silent.ends_within(Duration::from_secs(2))?;
        begun.ends_within(Duration::from_secs(2))?;
        served_in_time(daemon)
    });
}

#[test]
fn p08_a_duplicate_or_far_command_number_is_met_with_silence() {
    attack("CmdSN", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        raw.write(0, 0, &[1; 512])?;
        let next = raw.cmd_sn;
        // Behind, a duplicate, and beyond the window: each would write if it were carried out.
        for sn in [
            next.wrapping_sub(1),
            next.wrapping_sub(100),
            raw.max_cmd_sn.wrapping_add(1),
            raw.max_cmd_sn.wrapping_add(0x4000_0000),
        ] {
            let itt = raw.new_itt();
            raw.send(
                &Cdb::write10(0, 0, 1)
                    .pdu(itt)
                    .word(24, sn)
                    .word(28, raw.exp_stat_sn)
                    .data([9; 512]),
            )?;
            no_answer(&mut raw, itt)?;
        }
        ensure!(
            raw.read(0, 0, 1)? == [1; 512],
            "a command outside the window was carried out"
        );
        // Ahead, within the window: it waits for the one before it.
        let (ahead, due) = (raw.new_itt(), raw.new_itt());
        let sn = raw.cmd_sn;
        raw.send(
            &Cdb::read10(0, 0, 1)
                .attribute(2)
                .pdu(ahead)
                .word(24, sn.wrapping_add(1))
                .word(28, raw.exp_stat_sn),
        )?;
        no_answer(&mut raw, ahead)?;
        raw.send(
            &Cdb::write10(0, 0, 1)
                .pdu(due)
                .word(24, sn)
                .word(28, raw.exp_stat_sn)
                .data([2; 512]),
        )?;
        raw.cmd_sn = sn.wrapping_add(2);
        ensure!(raw.finish(due)?.status == GOOD);
        // ORDERED counts by the numbers, not by the order of arrival.
        ensure!(
            raw.finish(ahead)?.data == [2; 512],
            "an ORDERED read overtook the write before it"
        );
        Ok(())
    });
}

/// Sends a login PDU to a fresh connection: a refusal of class 2, or the end of the connection, but no session.
fn refused_login(daemon: &Daemon, what: &str, pdus: &[Pdu]) -> Result<()> {
    let mut raw = Raw::connect(address(daemon))?;
    for pdu in pdus {
        raw.send(pdu)?;
    }
    for pdu in raw
        .ends_within(Duration::from_secs(3))
        .with_context(|| what.to_owned())?
    {
        let partial = pdu.opcode() == op::LOGIN_RESPONSE && pdu.at(36) == 0 && pdu.at(1) & 3 != 3;
        let refusal = pdu.opcode() == op::LOGIN_RESPONSE && pdu.at(36) == 2;
        let reject = pdu.opcode() == op::REJECT;
        ensure!(partial || refusal || reject, "{what}: {pdu:?}");
    }
    Ok(())
}

#[test]
fn p09_the_login_state_machine_takes_no_short_cuts() {
    attack("login states", |daemon| {
        let names = format!("InitiatorName={ME}\0TargetName={DISK}\0");
        let isid = [0, 2, 0x3d, 0, 0, 9];
        let with = |flags: u8| login_request(flags, &isid).data(names.clone());
        let empty = |flags: u8| login_request(flags, &isid);
        refused_login(daemon, "transit and continue", &[with(0xc7)])?;
        refused_login(daemon, "reserved stage", &[with(0x88 | 3)])?;
        refused_login(daemon, "starts in full feature phase", &[with(0x8c | 3)])?;
        refused_login(daemon, "back to security", &[with(0x84)])?;
        refused_login(daemon, "operational, then security", &[with(0x04), empty(0x81)])?;
        refused_login(
            daemon,
            "another ISID in the middle",
            &[with(0x04), login_request(0x87, &[1; 6])],
        )?;
        refused_login(
            daemon,
            "another ITT in the middle",
            &[with(0x04), empty(0x87).itt(99)],
        )?;
        refused_login(
            daemon,
            "a session that does not exist",
            &[with(0x87).bytes(14, &[0x12, 0x34])],
        )?;
        refused_login(
            daemon,
            "a version that does not exist",
            &[with(0x87).byte(2, 9).byte(3, 9)],
        )?;
        refused_login(daemon, "no names", &[empty(0x87)])?;
        refused_login(
            daemon,
            "no target",
            &[empty(0x87).data(format!("InitiatorName={ME}\0"))],
        )?;
        refused_login(
            daemon,
            "a command instead of a login",
            &[Cdb::read10(0, 0, 1).pdu(1)],
        )?;
        refused_login(
            daemon,
            "a command during login",
            &[with(0x04), Cdb::write10(0, 0, 1).pdu(1).data([1; 512])],
        )?;
        refused_login(
            daemon,
            "a ping instead of a login",
            &[Pdu::new(op::NOP_OUT).itt(1)],
        )?;
        refused_login(
            daemon,
            "garbage",
            &[Pdu {
                bhs: [0xee; BHS_LEN],
                ahs: vec![],
                data: vec![0xee; 100],
            }],
        )?;
        refused_login(
            daemon,
            "additional headers",
            &[Pdu {
                ahs: vec![0xaa; 400],
                ..with(0x87)
            }],
        )?;
        let endless: Vec<Pdu> = (0..100)
            .map(|i| if i == 0 { with(0x04) } else { empty(0x04) })
            .collect();
        let mut raw = Raw::connect(address(daemon))?;
        for pdu in &endless {
            if raw.send(pdu).is_err() || !matches!(raw.receive(SERVED)?, Came::Pdu(_)) {
                return Ok(());
            }
        }
        bail!("a hundred login requests without an end");
    });
}

#[test]
fn p10_keys_come_once_and_text_is_put_together_first() {
    attack("login text", |daemon| {
        let isid = [0, 2, 0x3d, 0, 0, 9];
        let names = format!("InitiatorName={ME}\0TargetName={DISK}\0");
        let twice = format!("{names}MaxBurstLength=65536\0MaxBurstLength=65536\0");
        refused_login(
            daemon,
            "the same key twice",
            &[login_request(0x87, &isid).data(twice)],
        )?;
        refused_login(
            daemon,
            "no equals sign",
            &[login_request(0x87, &isid).data(format!("{names}Bogus\0"))],
        )?;
        // A key cut in two by a continuation, byte by byte.
        let text = format!("{names}HeaderDigest=None\0");
        let mut raw = Raw::connect(address(daemon))?;
        for (i, byte) in text.as_bytes().iter().enumerate().take(40) {
            raw.send(&login_request(0x44, &isid).data([*byte]))?;
            let answer = raw.expect("an empty response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
            ensure!(
                answer.at(36) == 0 && answer.data.is_empty(),
                "after {i} bytes: {answer:?}"
            );
        }
        raw.send(&login_request(0x87, &isid).data(&text.as_bytes()[40..]))?;
        let answer = raw.expect("the last response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        ensure!(answer.at(36) == 0 && answer.at(1) & 0x83 == 0x83, "{answer:?}");
        ensure!(
            answer.text().contains(&"HeaderDigest=None".to_owned()),
            "{answer:?}"
        );
        // Text without an end is cut off.
        let mut raw = Raw::connect(address(daemon))?;
        let piece = login_request(0x44, &isid).data(vec![b'A'; 8192]);
        for _ in 0..20 {
            if raw.send(&piece).is_err() {
                break;
            }
            match raw.receive(SERVED)? {
                Came::Pdu(pdu) if pdu.at(36) == 0 => {}
                Came::Pdu(pdu) => {
                    ensure!(pdu.at(36) == 2, "{pdu:?}");
                    return raw.ends_within(SERVED).map(drop);
                }
                _ => return Ok(()),
            }
        }
        bail!("160 KiB of login text were collected");
    });
}

#[test]
fn p10_oversize_text_after_login_is_refused() {
    attack("oversize text", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        let itt = raw.new_itt();
        let mut ttt = RESERVED;
        let mut refused = false;
        for _ in 0..20 {
            let text = Pdu::new(op::TEXT_REQUEST | IMMEDIATE)
                .byte(1, 0x40)
                .itt(itt)
                .word(20, ttt);
            raw.request(text.data(vec![b'A'; 8192]))?;
            let answer = raw.expect("an answer to text", |pdu| {
                matches!(pdu.opcode(), op::TEXT_RESPONSE | op::REJECT)
            })?;
            if answer.opcode() == op::REJECT {
                refused = true;
                break;
            }
            ttt = answer.word_at(20);
        }
        ensure!(refused, "160 KiB of text were collected");
        raw.read(0, 0, 1)?;
        ensure!(raw.ping(b"still here")? == b"still here");
        Ok(())
    });
}

#[test]
fn p11_names_are_case_sensitive_and_hexadecimal_is_legal() {
    attack("key names and values", |daemon| {
        let nexus = Nexus::new(ME, DISK)
            .key("MaxBurstLength", "0x4000")
            .key("ImmediateData", "yes")
            .key("immediatedata", "Yes");
        // A key that does not begin with a capital is no key; the login as a whole may be refused for it, but not misread.
        let raw = Raw::login(address(daemon), &nexus)?;
        ensure!(matches!(raw, Login::Refused(2, _)), "{raw:?}");
        let nexus = Nexus::new(ME, DISK)
            .key("MaxBurstLength", "0x4000")
            .key("FirstBurstLength", "0X200")
            .key("ImmediateData", "yes");
        let raw = Raw::login(address(daemon), &nexus)?.session()?;
        let has = |text: &str| raw.login_text.iter().any(|pair| pair == text);
        ensure!(
            has("MaxBurstLength=16384") && has("FirstBurstLength=512"),
            "{:?}",
            raw.login_text
        );
        ensure!(
            has("ImmediateData=Reject"),
            "a lower-case boolean is no boolean: {:?}",
            raw.login_text
        );
        Ok(())
    });
}

#[test]
fn p12_what_is_sent_obeys_the_limits_of_the_other_side() {
    attack("limits of the initiator", |daemon| {
        let nexus = Nexus::new(ME, DISK)
            .key("MaxRecvDataSegmentLength", "512")
            .key("MaxBurstLength", "2048")
            .key("FirstBurstLength", "512");
        let mut raw = Raw::login(address(daemon), &nexus)?.session()?;
        raw.ready(0)?;
        let itt = raw.start(&Cdb::read10(0, 0, 17), &[])?;
        let mut burst = 0;
        loop {
            let pdu = raw.expect("Data-In", |pdu| pdu.opcode() == op::DATA_IN && pdu.tag() == itt)?;
            ensure!(pdu.data.len() <= 512, "a segment of {}", pdu.data.len());
            burst += pdu.data.len();
            ensure!(burst <= 2048, "a burst of {burst}");
            if pdu.at(1) & 0x80 != 0 {
                burst = 0;
            }
            if pdu.at(1) & 1 != 0 {
                break;
            }
        }
        ensure!(
            raw.ping(&[0x41; 4096])?.len() <= 512,
            "an echo longer than the initiator takes"
        );
        let itt = raw.start(&Cdb::write10(0, 0, 64), &[])?;
        for turn in 0..16 {
            let ask = r2t(&mut raw, itt)?;
            ensure!(ask.word_at(44) <= 2048, "an R2T for {}", ask.word_at(44));
            raw.satisfy(&ask, &[turn; 64 * 512])?;
        }
        ensure!(raw.finish(itt)?.status == GOOD);
        let mut discovery = Nexus::new(ME, DISK).key("MaxRecvDataSegmentLength", "512");
        discovery.target = None;
        let mut raw = Raw::login(address(daemon), &discovery)?.session()?;
        let itt = raw.new_itt();
        raw.request(
            Pdu::new(op::TEXT_REQUEST)
                .itt(itt)
                .word(20, RESERVED)
                .data("SendTargets=All\0"),
        )?;
        let answer = raw.expect("SendTargets", |pdu| pdu.opcode() == op::TEXT_RESPONSE)?;
        ensure!(
            answer.data.len() <= 512 && answer.text().contains(&format!("TargetName={DISK}")),
            "{answer:?}"
        );
        Ok(())
    });
}

#[test]
fn p13_after_an_abort_nothing_of_the_task_happens() {
    attack("aborted write", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        let ref_cmd_sn = raw.cmd_sn;
        let itt = raw.start(&Cdb::write10(0, 0, 128), &[])?;
        let ask = r2t(&mut raw, itt)?;
        raw.send(&data_out(&ask, 0, 0, false).data(vec![1; 512]))?;
        let tmf = raw.start_tmf(ABORT_TASK, 0, itt, ref_cmd_sn)?;
        ensure!(tmf_response(&mut raw, tmf)? == 0, "the abort is complete");
        raw.send(&data_out(&ask, 1, 512, true).data(vec![1; 65_536 - 512]))?;
        no_answer(&mut raw, itt)?;
        ensure!(
            raw.read(0, 0, 128)?.iter().all(|byte| *byte == 0),
            "the aborted write reached the medium"
        );
        // An abort of what never was.
        let tmf = raw.start_tmf(ABORT_TASK, 0, 0xdead, ref_cmd_sn)?;
        ensure!(tmf_response(&mut raw, tmf)? == 1, "no such task");
        Ok(())
    });
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

#[test]
fn p13_after_a_reset_by_another_session_nothing_old_happens() {
    attack("reset under writes of others", |daemon| {
        let mut by = log_in(daemon, OTHER)?;
        let mut third = log_in(daemon, "iqn.2026-11.test.robust:third")?;
        let mut raw = log_in(daemon, ME)?;
        for round in 0..6 {
            let tags = write_many(&mut raw, 0, 100, 0x11)?;
            // Two resets at once: the answer to the second may not come earlier because the first waits already.
            let first = third.start_tmf(LUN_RESET, 0, RESERVED, 0)?;
            ensure!(by.tmf(LUN_RESET, 0)? == 0);
            by.ready(0)?;
            for i in 0..100 {
                by.write(0, i * 8, &[0x22; 4096])?;
            }
            all_are(&mut by, 0, 100, 0x22).with_context(|| format!("round {round}"))?;
            ensure!(tmf_response(&mut third, first)? == 0);
            third.ready(0)?;
            // TAS = 0: what was aborted has no status; what has one was over before.
            let late = raw.listen(QUIET)?;
            let answered: Vec<u32> = late
                .iter()
                .filter(|pdu| pdu.opcode() == op::SCSI_RESPONSE)
                .map(Pdu::tag)
                .collect();
            ensure!(answered.iter().all(|tag| tags.contains(tag)), "{answered:?}");
            all_are(&mut by, 0, 100, 0x22).with_context(|| format!("round {round}, later"))?;
            raw.ready(0)?;
        }
        // A half-collected write of another session goes with the reset too.
        let itt = raw.start(&Cdb::write10(1, 0, 128), &[])?;
        let ask = r2t(&mut raw, itt)?;
        by.ready(1)?;
        ensure!(by.tmf(LUN_RESET, 1)? == 0);
        raw.satisfy(&ask, &[0x33; 65_536])?;
        no_answer(&mut raw, itt)?;
        ensure!(
            raw.run(&Cdb::none(1, &[0; 6]))?.sense_code().0 == 6,
            "the reset is told as a unit attention"
        );
        raw.ready(1)?;
        ensure!(raw.read(1, 0, 128)?.iter().all(|byte| *byte == 0));
        Ok(())
    });
}

#[test]
fn p13_reinstatement_waits_for_the_writes_of_the_old_session() {
    attack("reinstatement under writes", |daemon| {
        let mut old = log_in(daemon, ME)?;
        for round in 0..8 {
            write_many(&mut old, 0, 100, 0x11)?;
            let mut new = log_in(daemon, ME)?;
            for i in 0..100 {
                new.write(0, i * 8, &[0x22; 4096])?;
            }
            all_are(&mut new, 0, 100, 0x22).with_context(|| format!("round {round}"))?;
            old.ends_within(Duration::from_secs(3))
                .context("the old session")?;
            all_are(&mut new, 0, 100, 0x22).with_context(|| format!("round {round}, later"))?;
            ensure!(sessions(daemon)?.len() == 1, "one session is left");
            old = new;
        }
        Ok(())
    });
}

#[test]
fn p13_many_logins_of_one_nexus_at_once_leave_one() {
    attack("reinstatement by many", |daemon| {
        let target = address(daemon);
        let threads: Vec<_> = (0..12)
            .map(|_| thread::spawn(move || Raw::login(target, &Nexus::new(ME, DISK))))
            .collect();
        let logins: Vec<_> = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect();
        let mut raws: Vec<_> = logins
            .into_iter()
            .filter_map(|login| login.ok()?.session().ok())
            .collect();
        let alive = raws.iter_mut().filter_map(|raw| raw.ready(0).ok()).count();
        ensure!(alive == 1, "{alive} sessions of one I_T nexus are alive");
        ensure!(sessions(daemon)?.len() == 1);
        log_in(daemon, ME).map(drop)
    });
}

#[test]
fn p14_every_check_condition_has_sense_and_truncation_is_no_error() {
    attack("sense and truncation", |daemon| {
        let mut raw = Raw::login(address(daemon), &Nexus::new(ME, DISK))?.session()?;
        let sense = |reply: Reply| {
            ensure!(
                reply.status == CHECK_CONDITION && reply.sense.len() >= 18,
                "{reply:?}"
            );
            Ok(reply.sense_code())
        };
        ensure!(
            sense(raw.run(&Cdb::none(0, &[0; 6]))?)?.0 == 6,
            "a new nexus hears a unit attention"
        );
        raw.ready(0)?;
        ensure!(sense(raw.run(&Cdb::none(0, &[0xff; 16]))?)? == (5, 0x20, 0));
        ensure!(sense(raw.run(&Cdb::read10(0, 131_072, 1))?)? == (5, 0x21, 0));
        ensure!(
            sense(raw.run(&Cdb::read10(7, 0, 1))?)? == (5, 0x25, 0),
            "no such LUN"
        );
        ensure!(sense(raw.run_write(&Cdb::write10(0, 131_071, 2), &[1; 1024])?)? == (5, 0x21, 0));
        for (cdb, name) in [
            ([0x12, 0, 0, 0, 0, 0], "INQUIRY"),
            ([0x1a, 0, 0x3f, 0, 0, 0], "MODE SENSE"),
            ([3, 0, 0, 0, 0, 0], "REQUEST SENSE"),
        ] {
            for allocation in [0, 1, 5, 255] {
                let mut cdb = cdb;
                cdb[4] = allocation;
                let reply = raw.run(&Cdb::reads(0, &cdb, allocation.into()))?;
                ensure!(
                    reply.status == GOOD && reply.data.len() <= allocation.into(),
                    "{name} with {allocation}: {reply:?}"
                );
            }
        }
        // INQUIRY and REPORT LUNS answer where there is nothing.
        ensure!(raw.run(&Cdb::reads(7, &[0x12, 0, 0, 0, 36, 0], 36))?.data.first() == Some(&0x7f));
        ensure!(
            raw.run(&Cdb::reads(0, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], 16))?
                .status
                == GOOD
        );
        Ok(())
    });
}

#[test]
fn p15_full_feature_phase_refuses_login_and_rejects_with_the_whole_header() {
    attack("rejects", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        for (what, pdu) in [
            ("a login", Nexus::new(ME, DISK).request()),
            ("an unknown opcode", Pdu::new(0x1d).itt(7)),
            ("a target's opcode", Pdu::new(op::DATA_IN).itt(8)),
            ("a SNACK", Pdu::new(0x10).itt(9)),
            (
                "data for nobody",
                Pdu::new(op::DATA_OUT)
                    .itt(0x7777)
                    .word(20, 0x8888)
                    .data(vec![1; 600]),
            ),
        ] {
            raw.send(&pdu)?;
            let reason = rejected(&mut raw, &pdu).with_context(|| what.to_owned())?;
            ensure!(reason != 0, "{what}");
        }
        let again = raw.number(Cdb::write10(0, 0, 128).pdu(0x55));
        raw.send(&again)?;
        r2t(&mut raw, 0x55)?;
        let again = raw.number(Cdb::write10(0, 0, 128).pdu(0x55));
        raw.send(&again)?;
        ensure!(rejected(&mut raw, &again)? == 0x07, "a tag in use");
        // A logout of another connection, and a text request for what only login may change.
        let itt = raw.new_itt();
        raw.request(
            Pdu::new(op::LOGOUT_REQUEST | IMMEDIATE)
                .byte(1, 0x81)
                .itt(itt)
                .bytes(20, &[0x77, 0x77]),
        )?;
        let reply = raw.expect("a Logout Response", |pdu| pdu.opcode() == op::LOGOUT_RESPONSE)?;
        ensure!(reply.at(2) == 1, "CID not found: {reply:?}");
        let itt = raw.new_itt();
        raw.request(
            Pdu::new(op::TEXT_REQUEST)
                .itt(itt)
                .word(20, RESERVED)
                .data("MaxBurstLength=65536\0"),
        )?;
        let reply = raw.expect("a text answer", |pdu| pdu.opcode() == op::TEXT_RESPONSE)?;
        ensure!(reply.text() == ["MaxBurstLength=Reject"], "{reply:?}");
        raw.read(0, 0, 1).map(drop)
    });
}

#[test]
fn additional_header_garbage_ends_one_connection_at_most() {
    attack("additional headers", |daemon| {
        let mut fine = log_in(daemon, OTHER)?;
        for ahs in [
            vec![0xff; 1020],
            vec![0, 0, 1, 0],
            vec![0, 3, 1, 0, 1, 1, 1, 1],
            vec![0, 5, 2, 0, 0, 0, 0, 1, 0, 5, 2, 0, 0, 0, 0, 1],
            vec![0; 64],
        ] {
            let mut raw = log_in(daemon, ME)?;
            let itt = raw.new_itt();
            let pdu = raw.number(Pdu {
                ahs: ahs.clone(),
                ..Cdb::write10(0, 0, 1).pdu(itt).data([0x66; 512])
            });
            raw.send(&pdu)?;
            let came = raw.receive(SERVED)?;
            // A Reject, a status, or the end of this connection; never silence.
            ensure!(!matches!(came, Came::Nothing), "{ahs:?} is met with silence");
            fine.read(0, 0, 1)?;
        }
        let mut raw = log_in(daemon, ME)?;
        raw.send(&Pdu {
            ahs: vec![1; 8],
            ..Pdu::new(op::NOP_OUT | IMMEDIATE).itt(1)
        })?;
        ensure!(
            !matches!(raw.receive(SERVED)?, Came::Nothing),
            "additional headers of a ping are met with silence"
        );
        fine.read(0, 0, 1).map(drop)
    });
}

#[test]
fn an_unanswered_r2t_holds_up_neither_snapshots_nor_others() {
    attack("unanswered R2T", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        for _ in 0..64 {
            raw.start(&Cdb::write10(0, 0, 2048), &[])?;
        }
        let itt = raw.start(&Cdb::none(0, &[0; 6]), &[])?;
        raw.finish(itt)
            .context("a command behind writes that wait for their data")?;
        let started = Instant::now();
        daemon.text(&["snapshot", "create", "disk"])?;
        ensure!(
            started.elapsed() < Duration::from_secs(3),
            "the snapshot took {:?}",
            started.elapsed()
        );
        served_in_time(daemon)?;
        ensure!(raw.tmf(LUN_RESET, 0)? == 0);
        raw.ready(0)
    });
}

#[test]
fn a_peer_that_floods_hears_its_own_control_messages() {
    attack("flood of pings that is read", |daemon| {
        let mut writers = Vec::new();
        let mut readers = Vec::new();
        for i in 0..4 {
            let raw = log_in(daemon, &format!("{ME}{i}"))?;
            let mut reader = raw.stream()?;
            readers.push(thread::spawn(move || {
                std::io::copy(&mut reader, &mut std::io::sink()).ok()
            }));
            writers.push(thread::spawn(move || {
                let mut raw = raw;
                let ping = Pdu::new(op::NOP_OUT | IMMEDIATE)
                    .itt(1)
                    .word(20, RESERVED)
                    .data(vec![0x77; 512]);
                let wire = raw.number(ping).wire().repeat(256);
                while raw.send_bytes(&wire).is_ok() {}
            }));
        }
        thread::sleep(QUIET);
        served_in_time(daemon).context("while four sessions flood")?;
        let id = session_id(daemon, &format!("{ME}0"))?;
        let started = Instant::now();
        daemon.text(&["session", "drop", &id.to_string()])?;
        ensure!(
            started.elapsed() < Duration::from_secs(8),
            "the drop of a busy session took {:?}",
            started.elapsed()
        );
        ensure!(
            session_id(daemon, &format!("{ME}0")).is_err(),
            "the session is gone"
        );
        // A reset by somebody else reaches the others while they flood.
        let mut by = log_in(daemon, OTHER)?;
        ensure!(by.tmf(LUN_RESET, 0)? == 0);
        let ids: Vec<u64> = (1..4)
            .map(|i| session_id(daemon, &format!("{ME}{i}")))
            .collect::<Result<_>>()?;
        drop(by);
        daemon.stop().and_then(|code| {
            if code == 0 {
                Ok(())
            } else {
                bail!("exit code {code}")
            }
        })?;
        ensure!(ids.len() == 3);
        writers.into_iter().for_each(|thread| drop(thread.join()));
        readers.into_iter().for_each(|thread| drop(thread.join()));
        Ok(())
    });
}

#[test]
fn a_session_that_logs_out_without_reading_is_let_go() {
    attack("logout without reading", |daemon| {
        let nexus = Nexus::new(ME, DISK)
            .key("MaxRecvDataSegmentLength", "1048576")
            .key("MaxBurstLength", "1048576");
        let mut raw = Raw::login(address(daemon), &nexus)?.session()?;
        raw.ready(0)?;
        for _ in 0..20 {
            raw.start(&Cdb::read10(0, 0, 2048), &[])?;
        }
        thread::sleep(QUIET);
        let itt = raw.new_itt();
        raw.request(Pdu::new(op::LOGOUT_REQUEST | IMMEDIATE).itt(itt))?;
        wait_until(
            "the session that logged out to be gone",
            Duration::from_secs(6),
            || Ok(session_id(daemon, ME).is_err()),
        )
    });
}

const AGENTS: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"disk\"\nsize = \"16MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nagents = true\n\
    [agents]\nlisten = \"127.0.0.1:$AGENTS\"\n";

/// Answers pings until the connection ends; how many there were.
fn keep_alive(mut raw: Raw) -> (Arc<AtomicU32>, thread::JoinHandle<Raw>) {
    let pings = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&pings);
    let thread = thread::spawn(move || {
        while let Ok(Came::Pdu(pdu)) = raw.receive(Duration::from_millis(2500)) {
            if raw::is_ping(&pdu) {
                counter.fetch_add(1, Ordering::Relaxed);
                if raw.pong(&pdu).is_err() {
                    break;
                }
            }
        }
        raw
    });
    (pings, thread)
}

#[test]
fn a_second_path_to_an_agent_target_is_refused_while_the_first_answers() {
    attack_on("second path, first answers", AGENTS, |daemon| {
        let first = log_in(daemon, ME)?;
        let (pings, thread) = keep_alive(first);
        for isid in [2, 3] {
            let (class, detail) = Raw::login(address(daemon), &Nexus::new(ME, DISK).isid(isid))?.refusal()?;
            ensure!((class, detail) == (2, 6), "refused with {class:02x}{detail:02x}");
        }
        ensure!(pings.load(Ordering::Relaxed) >= 2, "the first session was asked");
        // Another initiator is no second path.
        log_in(daemon, OTHER)?.logout()?;
        let mut first = thread.join().expect("no panic");
        first.ready(0)?;
        ensure!(daemon.log().contains("MPIO"), "the log tells the operator why");
        Ok(())
    });
}

#[test]
fn a_silent_first_session_of_an_agent_target_is_replaced() {
    attack_on("silent first session", AGENTS, |daemon| {
        let mut first = log_in(daemon, ME)?;
        let started = Instant::now();
        let mut second = Raw::login(address(daemon), &Nexus::new(ME, DISK).isid(2))?.session()?;
        let took = started.elapsed();
        ensure!(
            took > Duration::from_millis(1800) && took < Duration::from_millis(3500),
            "replaced after {took:?}"
        );
        second.ready(0)?;
        first.ends_within(SERVED)?;
        ensure!(sessions(daemon)?.len() == 1);
        Ok(())
    });
}

#[test]
fn two_paths_at_once_to_an_agent_target_leave_the_first() {
    attack_on("two paths at once", AGENTS, |daemon| {
        // The first login is still being decided on (it replaces a silent session) when the second comes.
        let dead = log_in(daemon, ME)?;
        let target = address(daemon);
        let first = thread::spawn(move || -> Result<Raw> {
            Raw::login(target, &Nexus::new(ME, DISK).isid(2))?.session()
        });
        thread::sleep(Duration::from_millis(700));
        let second = thread::spawn(move || Raw::login(target, &Nexus::new(ME, DISK).isid(3)));
        let first = first
            .join()
            .expect("no panic")
            .context("the first of two paths")?;
        let (_, alive) = keep_alive(first);
        let second = second.join().expect("no panic")?;
        ensure!(
            matches!(second, Login::Refused(2, 6)),
            "the path that came second: {second:?}"
        );
        let mut first = alive.join().expect("no panic");
        first.ready(0)?;
        drop(dead);
        Ok(())
    });
}

#[test]
fn max_sessions_acl_and_portal_groups_are_kept() {
    const RULES: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\ngroup = 1\n[[portal]]\naddress = \"[::1]:$PORT2\"\ngroup = 2\n\
        [[lun]]\nname = \"disk\"\nsize = \"16MiB\"\n[[lun]]\nname = \"friends\"\nsize = \"16MiB\"\n[[lun]]\nname = \"far\"\nsize = \"16MiB\"\n\
        [[lun]]\nname = \"six\"\nsize = \"16MiB\"\n\
        [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 2\nportal_groups = [1]\n\
        [[target]]\niqn = \"iqn.2026-11.test:friends\"\nluns = [\"friends\"]\ninitiators = [\"iqn.2026-11.test.robust:friend\"]\n\
        portal_groups = [1]\n\
        [[target]]\niqn = \"iqn.2026-11.test:far\"\nluns = [\"far\"]\ninitiators = [\"*\"]\nallow_from = [\"10.0.0.0/8\"]\n\
        portal_groups = [1]\n\
        [[target]]\niqn = \"iqn.2026-11.test:six\"\nluns = [\"six\"]\ninitiators = [\"*\"]\nportal_groups = [2]\n";
    attack_on("limits and access", RULES, |daemon| {
        let four = address(daemon);
        let six: SocketAddr = format!("[::1]:{}", daemon.second_port()).parse()?;
        let refused =
            |initiator: &str, target: &str| Raw::login(four, &Nexus::new(initiator, target))?.refusal();
        ensure!(
            refused(ME, "iqn.2026-11.test:friends")? == (2, 2),
            "not on the list"
        );
        ensure!(refused(ME, "iqn.2026-11.test:far")? == (2, 2), "not from here");
        ensure!(
            refused(ME, "iqn.2026-11.test:six")? == (1, 1),
            "not through this portal, but through another"
        );
        // A real initiator goes where it is sent.
        qemu_io(
            &daemon.url("iqn.2026-11.test:six", 0),
            &["write -P 0x66 0 64k", "read -P 0x66 0 64k"],
        )?
        .success()?;
        ensure!(refused(ME, "iqn.2026-11.test:none")? == (2, 3), "no such target");
        Raw::login(
            four,
            &Nexus::new("IQN.2026-11.test.robust:FRIEND", "iqn.2026-11.test:friends"),
        )?
        .session()
        .context("case of names")?;
        let mut through_six = Raw::login(six, &Nexus::new(ME, "iqn.2026-11.test:six"))?
            .session()
            .context("IPv6")?;
        through_six.ready(0)?;
        through_six.write(0, 0, &[6; 4096])?;
        ensure!(through_six.read(0, 0, 8)? == [6; 4096]);
        let mut discovery = Nexus::new(ME, DISK);
        discovery.target = None;
        let mut raw = Raw::login(six, &discovery)?.session()?;
        let itt = raw.new_itt();
        raw.request(
            Pdu::new(op::TEXT_REQUEST)
                .itt(itt)
                .word(20, RESERVED)
                .data("SendTargets=All\0"),
        )?;
        let text = raw
            .expect("SendTargets", |pdu| pdu.opcode() == op::TEXT_RESPONSE)?
            .text();
        ensure!(
            text.contains(&format!("TargetAddress=[::1]:{},2", daemon.second_port())),
            "{text:?}"
        );
        ensure!(
            !text
                .iter()
                .any(|pair| pair.contains(":friends") || pair.contains(":far")),
            "a stranger learns of closed targets: {text:?}"
        );
        // max_sessions = 2: two that answer are kept.
        let (_, one) = keep_alive(Raw::login(four, &Nexus::new(ME, DISK).isid(1))?.session()?);
        let (_, two) = keep_alive(Raw::login(four, &Nexus::new(ME, DISK).isid(2))?.session()?);
        ensure!(
            Raw::login(four, &Nexus::new(ME, DISK).isid(3))?.refusal()? == (2, 6),
            "a third session"
        );
        for thread in [one, two] {
            thread.join().expect("no panic").ready(0)?;
        }
        Ok(())
    });
}

#[test]
fn a_session_is_dropped_with_a_word_and_without_an_answer() {
    attack("session drop", |daemon| {
        let mut polite = log_in(daemon, ME)?;
        let mut deaf = log_in(daemon, OTHER)?;
        let drop = |initiator: &str| -> Result<Duration> {
            let id = session_id(daemon, initiator)?;
            let started = Instant::now();
            daemon.text(&["session", "drop", &id.to_string()])?;
            ensure!(
                session_id(daemon, initiator).is_err(),
                "the session of {initiator} is gone"
            );
            Ok(started.elapsed())
        };
        thread::scope(|scope| -> Result<()> {
            let cli = scope.spawn(|| drop(ME));
            let word = polite.expect("a logout request", |pdu| pdu.opcode() == op::ASYNC)?;
            ensure!(word.at(36) == 1, "AsyncEvent {}", word.at(36));
            polite.logout()?;
            let took = cli.join().expect("no panic")?;
            ensure!(
                took < Duration::from_secs(3),
                "a session that logs out when asked took {took:?}"
            );
            Ok(())
        })?;
        let took = drop(OTHER)?;
        ensure!(
            took < Duration::from_secs(15),
            "a session that does not took {took:?}"
        );
        let last = deaf.ends_within(SERVED)?;
        ensure!(
            last.iter()
                .any(|pdu| pdu.opcode() == op::ASYNC && pdu.at(36) == 1),
            "{last:?}"
        );
        Ok(())
    });
}

#[test]
fn sessions_are_asked_to_log_out_when_what_they_use_goes_away() {
    const TWO: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"disk\"\nsize = \"16MiB\"\n\
        [[lun]]\nname = \"second\"\nsize = \"16MiB\"\n[[lun]]\nname = \"gone\"\nsize = \"16MiB\"\n\
        [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\", \"second\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n";
    const GONE: &str =
        "[[target]]\niqn = \"iqn.2026-11.test:gone\"\nluns = [\"gone\"]\ninitiators = [\"*\"]\n";
    attack_on("logout requests", &format!("{TWO}{GONE}"), |daemon| {
        let asked = |raw: &mut Raw| -> Result<()> {
            let word = raw.expect("a logout request", |pdu| pdu.opcode() == op::ASYNC)?;
            ensure!(word.at(36) == 1, "AsyncEvent {}", word.at(36));
            raw.logout()
        };
        // A target that is no longer served.
        let mut stays = log_in(daemon, ME)?;
        let mut leaves =
            Raw::login(address(daemon), &Nexus::new(OTHER, "iqn.2026-11.test:gone"))?.session()?;
        leaves.ready(0)?;
        daemon.write_config(TWO)?;
        thread::scope(|scope| -> Result<()> {
            let cli = scope.spawn(|| daemon.text(&["config", "apply", "--yes"]));
            asked(&mut leaves)?;
            cli.join().expect("no panic").map(drop)
        })?;
        stays.ready(0)?;
        // One LUN of several: whoever may be using it is asked too, and finds the others when it comes back.
        daemon.write_config(&TWO.replace("[\"disk\", \"second\"]", "[\"disk\"]"))?;
        thread::scope(|scope| -> Result<()> {
            let cli = scope.spawn(|| daemon.text(&["config", "apply", "--yes"]));
            asked(&mut stays)?;
            cli.join().expect("no panic").map(drop)
        })?;
        let absent = log_in(daemon, ME)?.run(&Cdb::none(1, &[0; 6]))?;
        ensure!(absent.sense_code() == (5, 0x25, 0), "{absent:?}");
        // The daemon stops.
        let mut last = log_in(daemon, OTHER)?;
        daemon.signal(Signal::TERM)?;
        asked(&mut last)?;
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}

#[test]
fn revoked_access_holds_for_a_login_that_had_begun() {
    attack("revoked in the middle of a login", |daemon| {
        let mut raw = Raw::connect(address(daemon))?;
        raw.send(
            &login_request(0x04, &[0, 2, 0x3d, 0, 0, 1])
                .data(format!("InitiatorName={ME}\0TargetName={DISK}\0")),
        )?;
        let answer = raw.expect("a Login Response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        ensure!(answer.at(36) == 0);
        daemon.write_config(&CONFIG.replace("[\"*\"]", &format!("[\"{OTHER}\"]")))?;
        daemon.text(&["config", "apply", "--yes"])?;
        raw.send(&login_request(0x87, &[0, 2, 0x3d, 0, 0, 1]))?;
        let answer = raw.expect("a Login Response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        ensure!(
            (answer.at(36), answer.at(37)) == (2, 2),
            "logged in with access that was revoked: {answer:?}"
        );
        Ok(())
    });
}

#[test]
fn ordered_commands_keep_their_place() {
    attack("task attributes", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        for round in 0..20u8 {
            let mut tags = Vec::new();
            for i in 0..8 {
                let itt = raw.new_itt();
                raw.request(Cdb::write10(0, i * 8, 8).pdu(itt).byte(33, 8).data([round; 4096]))?;
                tags.push(itt);
            }
            let ordered = raw.start(&Cdb::write10(0, 0, 64).attribute(2), &[round | 0x80; 32_768])?;
            let read = raw.start(&Cdb::read10(0, 0, 64).attribute(1), &[])?;
            ensure!(
                raw.finish(read)?.data == [round | 0x80; 32_768],
                "round {round}: a read overtook an ORDERED write"
            );
            ensure!(raw.finish(ordered)?.status == GOOD);
            for itt in tags {
                ensure!(raw.finish(itt)?.status == GOOD);
            }
        }
        Ok(())
    });
}

fn reserve_out(action: u8, kind: u8, key: u64, action_key: u64) -> (Cdb, Vec<u8>) {
    let list = [key.to_be_bytes(), action_key.to_be_bytes(), [0; 8]].concat();
    (
        Cdb::writes(0, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], 24),
        list,
    )
}

#[test]
fn preempt_and_abort_fences_a_host_that_writes() {
    attack("PREEMPT AND ABORT", |daemon| {
        let (mut old, mut new) = (log_in(daemon, ME)?, log_in(daemon, OTHER)?);
        new.ready(1)?;
        old.ready(1)?;
        let out = |raw: &mut Raw, action, key, action_key| -> Result<u8> {
            let (cdb, list) = reserve_out(action, 5, key, action_key);
            Ok(raw.run_write(&cdb, &list)?.status)
        };
        for round in 0..4 {
            ensure!(
                out(&mut old, 6, 0, 0xa)? == GOOD && out(&mut new, 6, 0, 0xb)? == GOOD,
                "REGISTER"
            );
            ensure!(out(&mut old, 1, 0xa, 0)? == GOOD, "RESERVE");
            let tags = write_many(&mut old, 0, 60, 0x11)?;
            // The other LUN has nothing to do with it: its commands get their answers.
            let aside = old.start(&Cdb::write10(1, 0, 8), &[0x44; 4096])?;
            ensure!(out(&mut new, 5, 0xb, 0xa)? == GOOD, "PREEMPT AND ABORT");
            for i in 0..60 {
                new.write(0, i * 8, &[0x22; 4096])?;
            }
            ensure!(
                old.finish(aside)?.status == GOOD,
                "a command on another LUN was lost"
            );
            let late = old.listen(QUIET)?;
            ensure!(
                late.iter()
                    .all(|pdu| pdu.opcode() != op::SCSI_RESPONSE || tags.contains(&pdu.tag())),
                "{late:?}"
            );
            all_are(&mut new, 0, 60, 0x22).with_context(|| format!("round {round}"))?;
            old.ready(0)?;
            ensure!(
                old.run_write(&Cdb::write10(0, 0, 8), &[0x11; 4096])?.status == RESERVATION_CONFLICT,
                "the old host is fenced"
            );
            ensure!(out(&mut new, 3, 0xb, 0)? == GOOD, "CLEAR");
            old.ready(0)?;
        }
        // Both at once: one wins, and both get an answer.
        ensure!(out(&mut old, 6, 0, 0xa)? == GOOD && out(&mut new, 6, 0, 0xb)? == GOOD);
        let (cdb, list) = reserve_out(5, 5, 0xa, 0xb);
        let one = old.start(&cdb, &list)?;
        let (cdb, list) = reserve_out(5, 5, 0xb, 0xa);
        let two = new.start(&cdb, &list)?;
        let answered = |raw: &mut Raw, itt: u32| -> Result<Option<u8>> {
            Ok(raw
                .listen(Duration::from_millis(800))?
                .iter()
                .find(|pdu| pdu.tag() == itt)
                .map(|pdu| pdu.at(3)))
        };
        let ends = [answered(&mut old, one)?, answered(&mut new, two)?];
        ensure!(
            ends.iter().filter(|end| **end == Some(GOOD)).count() == 1,
            "{ends:?}"
        );
        old.ready(0)?;
        new.ready(0)
    });
}

#[test]
fn a_read_only_lun_takes_flushes_and_refuses_writes() {
    attack_on(
        "read-only LUN",
        &CONFIG.replace("size = \"64MiB\"\n", "size = \"64MiB\"\nread_only = true\n"),
        |daemon| {
            let mut raw = log_in(daemon, ME)?;
            let reply = raw.run_write(&Cdb::write10(0, 0, 8), &[1; 4096])?;
            ensure!(
                reply.status == CHECK_CONDITION && reply.sense_code().0 == 7,
                "{reply:?}"
            );
            let flush = raw.run(&Cdb::none(0, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]))?;
            ensure!(flush.status == GOOD, "{flush:?}");
            ensure!(raw.read(0, 0, 8)? == [0; 4096]);
            Ok(())
        },
    );
}

#[test]
fn sigterm_during_writes_loses_nothing_that_was_acknowledged() {
    attack("SIGTERM during writes", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        let idle = Raw::connect(address(daemon))?;
        let writer = thread::spawn(move || {
            let mut acknowledged = Vec::new();
            for turn in 1u32.. {
                let lba = turn * 7919 % 8192 * 8;
                let block: Vec<u8> = turn.to_be_bytes().repeat(1024);
                match raw.run_write(&Cdb::write10(0, lba, 8), &block) {
                    Ok(reply) if reply.status == GOOD => acknowledged.push((lba, turn)),
                    _ => break,
                }
            }
            acknowledged
        });
        thread::sleep(Duration::from_millis(700));
        let started = Instant::now();
        let code = daemon.stop()?;
        let took = started.elapsed();
        ensure!(code == 0, "exit code {code}");
        ensure!(took < Duration::from_secs(10), "the stop took {took:?}");
        let acknowledged = writer.join().expect("no panic");
        ensure!(
            acknowledged.len() > 20,
            "only {} writes: the story proves nothing",
            acknowledged.len()
        );
        drop(idle);
        daemon.resume()?;
        let mut raw = log_in(daemon, ME)?;
        let last = acknowledged.len();
        let newest: BTreeMap<u32, u32> = acknowledged.into_iter().collect();
        let mut lost = Vec::new();
        for (lba, turn) in newest {
            // The write after the last one acknowledged may have been carried out, or not.
            let block = raw.read(0, lba, 8)?;
            let holds = |turn: u32| block == turn.to_be_bytes().repeat(1024);
            let was_next = u32::try_from(last + 1)? == turn + 8192;
            if !(holds(turn) || was_next && holds(turn + 8192)) {
                lost.push((
                    turn,
                    block.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)),
                ));
            }
        }
        ensure!(
            lost.is_empty(),
            "of {last} acknowledged writes these are lost: {lost:?}"
        );
        Ok(())
    });
}

#[test]
fn p07_discovery_sessions_are_limited_like_strangers() {
    attack("flood of discovery sessions", |daemon| {
        let mut discovery = Nexus::new(ME, DISK);
        discovery.target = None;
        let mut first = Raw::login(address(daemon), &discovery)?.session()?;
        let mut held = Vec::new();
        for _ in 0..100 {
            held.push(Raw::login(address(daemon), &discovery)?.session()?);
        }
        first
            .ends_within(SERVED)
            .context("the oldest of a hundred discovery sessions")?;
        served_in_time(daemon)
    });
}

#[test]
fn a_discovery_session_begun_anew_ends_the_old_one() {
    attack("discovery sessions of one name", |daemon| {
        let mut discovery = Nexus::new(ME, DISK);
        discovery.target = None;
        let mut other = Raw::login(address(daemon), &discovery.clone().isid(9))?.session()?;
        let mut old = Raw::login(address(daemon), &discovery)?.session()?;
        let mut new = Raw::login(address(daemon), &discovery)?.session()?;
        old.ends_within(SERVED)?;
        for raw in [&mut other, &mut new] {
            let itt = raw.new_itt();
            raw.request(
                Pdu::new(op::TEXT_REQUEST)
                    .itt(itt)
                    .word(20, RESERVED)
                    .data("SendTargets=All\0"),
            )?;
            raw.expect("SendTargets", |pdu| pdu.opcode() == op::TEXT_RESPONSE)?;
        }
        Ok(())
    });
}

#[test]
fn a_session_is_dropped_while_its_login_is_being_decided() {
    attack_on("drop during admission", AGENTS, |daemon| {
        let mut silent = log_in(daemon, ME)?;
        let target = address(daemon);
        let login = thread::spawn(move || Raw::login(target, &Nexus::new(ME, DISK).isid(2)));
        let mut pending = None;
        wait_until("the second login in the table", SERVED, || {
            let of_state = |row: &Value| row.get("state").and_then(Value::as_str) == Some("login");
            pending = sessions(daemon)?.into_iter().find(of_state);
            Ok(pending.is_some())
        })?;
        let id = pending
            .as_ref()
            .and_then(|row| row.get("id"))
            .and_then(Value::as_u64)
            .context("an id")?;
        let started = Instant::now();
        daemon.text(&["session", "drop", &id.to_string()])?;
        let took = started.elapsed();
        ensure!(took < Duration::from_millis(1500), "the drop took {took:?}");
        let login = login.join().expect("no panic")?;
        ensure!(matches!(login, Login::Closed), "the dropped login: {login:?}");
        // What was being decided goes on to its end; the next login finds the table as it should be.
        thread::sleep(Duration::from_secs(2));
        silent.ends_within(SERVED)?;
        log_in(daemon, ME)?.logout()?;
        wait_until("an empty table", SERVED, || Ok(sessions(daemon)?.is_empty()))
    });
}

#[test]
fn a_revert_is_not_overtaken_by_an_initiator_that_comes_back() {
    attack("revert under logins", |daemon| {
        let mut raw = log_in(daemon, OTHER)?;
        raw.write(0, 0, &[1; 4096])?;
        daemon.text(&["snapshot", "create", "disk", "--name", "old"])?;
        raw.write(0, 0, &[2; 4096])?;
        raw.logout()?;
        let (target, stop) = (address(daemon), AtomicBool::new(false));
        thread::scope(|scope| -> Result<()> {
            let eager = scope.spawn(|| {
                let mut logins = 0;
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(Login::In(mut raw)) = Raw::login(target, &Nexus::new(ME, DISK)) {
                        logins += 1;
                        // As a host does: writes what its cache remembers, at once.
                        let stale = Cdb::write10(0, 64, 8);
                        loop {
                            let lost = raw.run_write(&stale, &[3; 4096]).is_err();
                            if lost || stop.load(Ordering::Relaxed) {
                                break;
                            }
                        }
                    }
                    thread::sleep(Duration::from_millis(5));
                }
                logins
            });
            thread::sleep(QUIET);
            let reverted = daemon.text(&["snapshot", "revert", "disk@old", "--force", "--yes"]);
            stop.store(true, Ordering::Relaxed);
            ensure!(
                eager.join().expect("no panic") > 0,
                "nobody came back: the story proves nothing"
            );
            reverted.map(drop)
        })?;
        let mut raw = log_in(daemon, OTHER)?;
        ensure!(raw.read(0, 0, 8)? == [1; 4096], "the content of the snapshot");
        Ok(())
    });
}
