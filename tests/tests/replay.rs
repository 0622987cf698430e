//! Windows and ESXi, played: their logins, their quirks, and what they do when a command takes too long. No Windows and no ESXi is at
//! hand; what they demand is known from measurements of others and from their makers' documents.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stillpoint_tests::raw::{Cdb, Pdu, RESERVED, Raw, Reply, data_out, op};
use stillpoint_tests::replay::Actor;
use stillpoint_tests::{Daemon, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const DISK: &str = "iqn.2026-11.test:disk";
/// LUN of the second disk of the target: a number that a Data-Out which leaves its LUN field empty does not carry.
const SECOND: u8 = 1;

const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
    [[lun]]\nname = \"disk\"\nsize = \"256MiB\"\n[[lun]]\nname = \"second\"\nsize = \"64MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\", \"second\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n";

const CHECK_CONDITION: u8 = 2;
const RESERVATION_CONFLICT: u8 = 0x18;
const ABORT_TASK: u8 = 1;
const LUN_RESET: u8 = 5;
const FUNCTION_COMPLETE: u8 = 0;
const MISCOMPARE: (u8, u8, u8) = (0x0e, 0x1d, 0);
/// ESXi loses the datastore when a heartbeat takes longer.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(8);
/// How long heartbeats go on under load; `STILLPOINT_SOAK_HEARTBEAT_S` makes it longer.
const HEARTBEATS: Duration = Duration::from_secs(6);
/// Between a LUN RESET and the new login of Windows it is 20 s; `STILLPOINT_SOAK_WINDOWS_S` waits as long.
const RELOGIN: Duration = Duration::from_millis(300);
/// Long enough for an answer that must not come.
const QUIET: Duration = Duration::from_millis(300);

fn soak(name: &str, usual: Duration) -> Duration {
    let seconds = std::env::var(name).ok().and_then(|text| text.parse().ok());
    seconds.map_or(usual, Duration::from_secs)
}

fn address(daemon: &Daemon) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], daemon.port()))
}

fn log_in(daemon: &Daemon, actor: &Actor) -> Result<Raw> {
    let mut raw = actor.log_in(address(daemon), Some(DISK))?.raw;
    for lun in [0, SECOND] {
        raw.ready(lun)?;
    }
    Ok(raw)
}

fn played(name: &str, body: impl FnOnce(&mut Daemon) -> Result<()>) {
    story(name, |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        body(&mut daemon)?;
        ensure!(!daemon.log().contains("panicked"), "a panic in the daemon");
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}

/// Deterministic bytes.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

fn refused(reply: &Reply, sense: (u8, u8, u8)) -> Result<()> {
    ensure!(
        reply.status == CHECK_CONDITION && reply.sense_code() == sense,
        "{sense:02x?} was expected: {reply:?}"
    );
    Ok(())
}

fn tmf_response(raw: &mut Raw, itt: u32) -> Result<u8> {
    Ok(raw
        .expect("a task management response", |pdu| {
            pdu.opcode() == op::TMF_RESPONSE && pdu.tag() == itt
        })?
        .at(2))
}

#[test]
fn windows_logs_in() {
    played("windows: login and discovery", |daemon| {
        let login = Actor::windows("sql01").log_in(address(daemon), Some(DISK))?;
        for (key, value) in [
            ("AuthMethod", "None"),
            ("HeaderDigest", "None"),
            ("DataDigest", "None"),
            ("ErrorRecoveryLevel", "0"),
            ("InitialR2T", "Yes"),
            ("ImmediateData", "Yes"),
            ("MaxBurstLength", "262144"),
            ("FirstBurstLength", "65536"),
            ("MaxConnections", "1"),
            ("MaxRecvDataSegmentLength", "262144"),
            ("TargetPortalGroupTag", "1"),
        ] {
            ensure!(
                login.value(key) == Some(value),
                "{key}: {:?} instead of {value}",
                login.value(key)
            );
        }
        let window = login.raw.max_cmd_sn.wrapping_sub(login.raw.exp_cmd_sn) + 1;
        ensure!(window >= 32, "room for {window} commands after the login");

        let mut discovery = Actor::windows("sql01").log_in(address(daemon), None)?.raw;
        let itt = discovery.new_itt();
        let request = Pdu::new(op::TEXT_REQUEST).itt(itt).word(20, RESERVED);
        discovery.request(request.data("SendTargets=All\0"))?;
        let listed = discovery.expect("SendTargets", |pdu| pdu.opcode() == op::TEXT_RESPONSE)?;
        // One key each, the portal group tag after a comma: anything else is an "invalid SendTargets response".
        let wanted = format!("TargetName={DISK}\0TargetAddress=127.0.0.1:{},1\0", daemon.port());
        ensure!(
            listed.data == wanted.as_bytes(),
            "SendTargets: {:?}",
            String::from_utf8_lossy(&listed.data)
        );
        discovery.logout()
    });
}

#[test]
fn windows_finds_a_disk() {
    played("windows: disk arrival", |daemon| {
        let mut raw = Actor::windows("sql01").log_in(address(daemon), Some(DISK))?.raw;
        // In the order of the disk class driver; unit attentions of the new session may hit any command but these.
        let sequence: [(&[u8], u32); 12] = [
            (&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], 16),
            (&[0x12, 0, 0, 0, 36, 0], 36),
            (&[0x12, 1, 0x00, 0, 255, 0], 255),
            (&[0x12, 1, 0x80, 0, 255, 0], 255),
            (&[0x12, 1, 0x83, 0, 255, 0], 255),
            (&[0x12, 1, 0xb0, 0, 64, 0], 64),
            (&[0x12, 1, 0xb0, 0, 255, 0], 255),
            (&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8),
            (&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32),
            (&[0x1a, 0, 0x08, 0, 192, 0], 192),
            (&[0x1a, 0, 0x3f, 0, 192, 0], 192),
            (&[0xa0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0], 512),
        ];
        for (cdb, len) in sequence {
            let mut reply = raw.run(&Cdb::reads(0, cdb, len))?;
            if reply.sense_code().0 == 6 {
                raw.ready(0)?;
                reply = raw.run(&Cdb::reads(0, cdb, len))?;
            }
            ensure!(
                reply.status == 0 && !reply.data.is_empty(),
                "{cdb:02x?}: {reply:?}"
            );
            let short = len - u32::try_from(reply.data.len())?;
            let flags = if short == 0 { 0 } else { 2 };
            ensure!(
                (reply.residual_flags, reply.residual) == (flags, short),
                "{cdb:02x?}: residual {:02x} {}",
                reply.residual_flags,
                reply.residual
            );
        }
        Ok(())
    });
}

/// 256 KiB each: Windows cuts everything longer into these.
const WINDOWS_PIECE: usize = 262_144;

/// Four writes of 256 KiB in flight, their data in pieces of 64 KiB, the LUN field of Data-Out left empty.
#[test]
fn windows_moves_data() {
    played("windows: four commands of 256 KiB in flight", |daemon| {
        let mut raw = log_in(daemon, &Actor::windows("sql01"))?;
        let blocks = u32::try_from(WINDOWS_PIECE / 512)?;
        for round in 0..8_u32 {
            let datas: Vec<Vec<u8>> = (0..4)
                .map(|i| pattern(u64::from(round * 4 + i), WINDOWS_PIECE))
                .collect();
            let mut tags = Vec::new();
            for (i, data) in (0..).zip(&datas) {
                let lba = (round * 4 + i) * blocks;
                let command = Cdb::write10(SECOND, lba, u16::try_from(blocks)?);
                let burst = raw.first_burst;
                tags.push(raw.start(&command, data.get(..burst).context("a burst")?)?);
            }
            for (tag, data) in tags.iter().zip(&datas) {
                fill(&mut raw, *tag, data)?;
            }
            let mut reads = Vec::new();
            for i in 0..4 {
                let command = Cdb::read10(SECOND, (round * 4 + i) * blocks, u16::try_from(blocks)?);
                reads.push(raw.start(&command, &[])?);
            }
            for (tag, data) in reads.iter().zip(&datas) {
                let reply = raw.finish(*tag)?;
                ensure!(
                    reply.status == 0 && reply.data == *data,
                    "round {round}: other data came back than was written"
                );
            }
        }
        Ok(())
    });
}

/// Gives a write all the data that R2Ts ask for; it must end GOOD. R2Ts begin after the immediate data, and none is longer than a burst.
fn fill(raw: &mut Raw, tag: u32, data: &[u8]) -> Result<()> {
    let mut given = raw.first_burst.min(data.len());
    while given < data.len() {
        let ask = raw.expect("an R2T", |pdu| pdu.opcode() == op::R2T && pdu.tag() == tag)?;
        ensure!(ask.at(1) == 0x80, "byte 1 of an R2T is {:02x}", ask.at(1));
        ensure!(
            ask.word_at(40) as usize == given,
            "an R2T at {} after {given} bytes",
            ask.word_at(40)
        );
        ensure!(ask.word_at(44) <= 262_144, "an R2T for {} bytes", ask.word_at(44));
        ensure!(
            data_out(&ask, 0, 0, true).bhs[8..16] == [0; 8],
            "this client means to leave the LUN field empty"
        );
        raw.satisfy(&ask, data)?;
        given += ask.word_at(44) as usize;
    }
    let reply = raw.finish(tag)?;
    ensure!(
        reply.status == 0 && reply.residual_flags == 0,
        "a write: {reply:?}"
    );
    Ok(())
}

/// After 60 s without an answer Windows sends LUN RESET, and 20 s later a new login on the same ISID. Nothing of the old session may
/// reach the medium afterwards.
#[test]
fn windows_resets_and_comes_again() {
    played(
        "windows: LUN RESET and a new login while commands run",
        |daemon| {
            let actor = Actor::windows("sql01");
            let mut old = log_in(daemon, &actor)?;
            let before = pattern(1, WINDOWS_PIECE);
            write_whole(&mut old, 0, &before)?;
            // Four writes wait for their data, as if the disk hung.
            let mut tags = Vec::new();
            for _ in 0..4 {
                tags.push(old.start(&Cdb::write10(0, 0, 512), &[])?);
            }
            let mut asks = Vec::new();
            for tag in &tags {
                asks.push(old.expect("an R2T", |pdu| pdu.opcode() == op::R2T && pdu.tag() == *tag)?);
            }
            let reset = old.start_tmf(LUN_RESET, 0, RESERVED, 0)?;
            ensure!(
                tmf_response(&mut old, reset)? == FUNCTION_COMPLETE,
                "LUN RESET was refused"
            );
            // Data of the reset writes comes late.
            for ask in &asks {
                old.satisfy(ask, &pattern(66, WINDOWS_PIECE))?;
            }
            let came = old.listen(QUIET)?;
            ensure!(
                came.iter()
                    .all(|pdu| pdu.opcode() != op::SCSI_RESPONSE || !tags.contains(&pdu.tag())),
                "a status after its task was reset: {came:?}"
            );
            // Further writes hang, and the old session is still there when the new one comes.
            old.ready(0)?;
            let hanging = old.start(&Cdb::write10(0, 0, 512), &[])?;
            let ask = old.expect("an R2T", |pdu| pdu.opcode() == op::R2T && pdu.tag() == hanging)?;
            thread::sleep(soak("STILLPOINT_SOAK_WINDOWS_S", RELOGIN));

            let mut new = actor.log_in(address(daemon), Some(DISK))?.raw;
            new.ready(0)?;
            let after = pattern(2, WINDOWS_PIECE);
            ensure!(
                read_whole(&mut new, 0)? == before,
                "a write without its data, or one that was reset, reached the medium"
            );
            write_whole(&mut new, 0, &after)?;
            // The old connection is dead; what it still sends goes nowhere.
            old.satisfy(&ask, &pattern(66, WINDOWS_PIECE)).ok();
            old.ends_within(Duration::from_secs(5))
                .context("the replaced session's connection")?;
            ensure!(
                read_whole(&mut new, 0)? == after,
                "stale data of the old session replaced newer data"
            );
            Ok(())
        },
    );
}

fn write_whole(raw: &mut Raw, lba: u32, data: &[u8]) -> Result<()> {
    let command = Cdb::write10(0, lba, u16::try_from(data.len() / 512)?);
    let reply = raw.run_write(&command, data)?;
    ensure!(reply.status == 0, "WRITE(10): {reply:?}");
    Ok(())
}

fn read_whole(raw: &mut Raw, lba: u32) -> Result<Vec<u8>> {
    raw.read(0, lba, u16::try_from(WINDOWS_PIECE / 512)?)
}

#[test]
fn esxi_scans_and_polls() {
    played("esxi: login, scan, polls", |daemon| {
        // The login limit of ESXi is in the actor.
        let mut raw = log_in(daemon, &Actor::esxi("esx1"))?;
        for lun in [0, SECOND] {
            // TEST UNIT READY with the R bit and no length.
            let itt = raw.new_itt();
            let tur = Pdu::new(op::SCSI_COMMAND).byte(1, 0xc0).lun(lun).itt(itt);
            raw.request(tur)?;
            let reply = raw.finish(itt)?;
            ensure!(
                (reply.status, reply.residual_flags, reply.data.len()) == (0, 0, 0),
                "TEST UNIT READY with R: {reply:?}"
            );
            // ATA PASS-THROUGH(16), on every LUN, for ever.
            for _ in 0..16 {
                let mut cdb = [0; 16];
                cdb[..2].copy_from_slice(&[0x85, 0x08]);
                refused(&raw.run(&Cdb::reads(lun, &cdb, 512))?, (5, 0x20, 0))?;
            }
            // Never 2/08/00 (floods the log), never 5/25/00 (the device is lost for good).
            for page in [0x00, 0x08, 0x0a, 0x1a, 0x1c, 0x3f] {
                let reply = raw.run(&Cdb::reads(lun, &[0x1a, 0, page, 0, 255, 0], 255))?;
                ensure!(
                    reply.status == 0 || reply.sense_code() == (5, 0x24, 0),
                    "MODE SENSE of page {page:02x}: {reply:?}"
                );
            }
            for page in [0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2] {
                let reply = raw.run(&Cdb::reads(lun, &[0x12, 1, page, 0, 255, 0], 255))?;
                ensure!(reply.status == 0, "VPD page {page:02x}: {reply:?}");
            }
        }
        // XCOPY is tried only between LUNs of one product.
        let product = |raw: &mut Raw, lun| -> Result<Vec<u8>> {
            let data = raw.run(&Cdb::reads(lun, &[0x12, 0, 0, 0, 96, 0], 96))?.data;
            Ok(data.get(8..32).context("vendor and product")?.to_vec())
        };
        ensure!(
            product(&mut raw, 0)? == product(&mut raw, SECOND)?,
            "two products"
        );
        Ok(())
    });
}

#[test]
fn esxi_formats_with_reservations() {
    played("esxi: RESERVE(6) and RELEASE(6) between two hosts", |daemon| {
        let mut one = log_in(daemon, &Actor::esxi("esx1"))?;
        let mut two = log_in(daemon, &Actor::esxi("esx2"))?;
        let bare = |code| Cdb::none(0, &[code, 0, 0, 0, 0, 0]);
        ensure!(one.run(&bare(0x16))?.status == 0, "RESERVE(6)");
        one.write(0, 0, &pattern(5, 8_192))?;
        ensure!(
            two.run(&bare(0x16))?.status == RESERVATION_CONFLICT,
            "both hosts reserved"
        );
        let reply = two.run_write(&Cdb::write10(0, 0, 1), &[6; 512])?;
        ensure!(
            reply.status == RESERVATION_CONFLICT,
            "a write past a RESERVE: {reply:?}"
        );
        // Also ATS: it is atomic against reservations.
        let reply = two.run_write(&ats(0), &[0; 1024])?;
        ensure!(
            reply.status == RESERVATION_CONFLICT,
            "an ATS past a RESERVE: {reply:?}"
        );
        // A release by the other host does nothing, and is no error.
        ensure!(two.run(&bare(0x17))?.status == 0, "RELEASE(6) of another's");
        ensure!(
            two.run(&bare(0x16))?.status == RESERVATION_CONFLICT,
            "released by another"
        );
        ensure!(one.run(&bare(0x17))?.status == 0, "RELEASE(6)");
        ensure!(two.run(&bare(0x16))?.status == 0, "RESERVE(6) after the release");
        // A LUN RESET is how ESXi breaks the lock of a host that is gone.
        ensure!(one.tmf(LUN_RESET, 0)? == FUNCTION_COMPLETE, "LUN RESET");
        one.ready(0)?;
        ensure!(
            one.run(&bare(0x16))?.status == 0,
            "the reset left the reservation"
        );
        Ok(())
    });
}

/// COMPARE AND WRITE of one block.
fn ats(lba: u32) -> Cdb {
    let mut cdb = [0; 16];
    cdb[0] = 0x89;
    cdb[6..10].copy_from_slice(&lba.to_be_bytes());
    cdb[13] = 1;
    Cdb::writes(0, &cdb, 1024)
}

fn heartbeat(host: u8, beat: u64) -> Vec<u8> {
    [beat.to_be_bytes().to_vec(), vec![host; 504]].concat()
}

/// The blocks of the heartbeats of two hosts, as on VMFS: side by side.
const HEARTBEAT_LBA: u32 = 2_048;

/// Heartbeats go on while snapshots are taken and deleted, the store is scrubbed, and others write.
#[test]
fn esxi_heartbeats_under_load() {
    played(
        "esxi: ATS heartbeats under snapshots, scrubs, deletes",
        |daemon| {
            let over = AtomicBool::new(false);
            let daemon = &*daemon;
            let time = soak("STILLPOINT_SOAK_HEARTBEAT_S", HEARTBEATS);
            let (beats, slowest) = thread::scope(|scope| -> Result<_> {
                let over = &over;
                let hosts: Vec<_> = [1_u8, 2]
                    .into_iter()
                    .map(|host| scope.spawn(move || beat(daemon, host, over)))
                    .collect();
                let writer = scope.spawn(move || load(daemon, over));
                let done = administer(daemon, time);
                over.store(true, Ordering::Relaxed);
                let mut sum = (0, Duration::ZERO);
                for host in hosts {
                    let (beats, slowest) = host.join().map_err(|_| anyhow::anyhow!("a host panicked"))??;
                    sum = (sum.0 + beats, sum.1.max(slowest));
                }
                writer
                    .join()
                    .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
                let rounds = done?;
                println!("story esxi heartbeats: {rounds} rounds of snapshots, scrub, deletes");
                Ok(sum)
            })?;
            println!("story esxi heartbeats: {beats} of two hosts, the slowest took {slowest:.1?}");
            ensure!(beats >= 20, "only {beats} heartbeats: the story proves nothing");
            ensure!(
                slowest < HEARTBEAT_LIMIT,
                "a heartbeat took {slowest:?}: the datastore is lost"
            );
            Ok(())
        },
    );
}

/// Heartbeats of one host: each replaces the one before. How many, and the slowest.
fn beat(daemon: &Daemon, host: u8, over: &AtomicBool) -> Result<(u64, Duration)> {
    let mut raw = log_in(daemon, &Actor::esxi(&format!("esx{host}")))?;
    let lba = HEARTBEAT_LBA + u32::from(host);
    raw.write(0, lba, &heartbeat(host, 0))?;
    let (mut count, mut slowest) = (0, Duration::ZERO);
    while !over.load(Ordering::Relaxed) {
        let started = Instant::now();
        let data = [heartbeat(host, count), heartbeat(host, count + 1)].concat();
        let reply = raw.run_write(&ats(lba), &data)?;
        slowest = slowest.max(started.elapsed());
        ensure!(reply.status == 0, "heartbeat {count} of host {host}: {reply:?}");
        count += 1;
        // Every tenth is sent again as if the answer had been lost: it must miscompare in the beat's own bytes.
        if count % 10 == 0 {
            let reply = raw.run_write(&ats(lba), &data)?;
            refused(&reply, MISCOMPARE)?;
            ensure!(
                miscompare_offset(&reply).is_some_and(|offset| offset < 8),
                "where it differs: {reply:?}"
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok((count, slowest))
}

/// INFORMATION of fixed sense data, or of the information descriptor.
fn miscompare_offset(reply: &Reply) -> Option<u64> {
    let sense = &reply.sense;
    match sense.first()? & 0x7f {
        0x72 => {
            let found = sense.get(8..)?.chunks(12).find(|d| d.first() == Some(&0))?;
            Some(u64::from_be_bytes(*found.get(4..)?.first_chunk()?))
        }
        _ => Some(u32::from_be_bytes(*sense.get(3..)?.first_chunk()?).into()),
    }
}

/// Writes of 64 KiB all over the disk, so that snapshots have something to keep.
fn load(daemon: &Daemon, over: &AtomicBool) -> Result<()> {
    let mut raw = log_in(daemon, &Actor::windows("busy"))?;
    let mut at = 0_u32;
    while !over.load(Ordering::Relaxed) {
        let data = pattern(u64::from(at), 65_536);
        let lba = 4_096 + at * 7_919 % 3_000 * 128;
        raw.write(0, lba, &data)?;
        ensure!(raw.read(0, lba, 128)? == data, "LBA {lba} reads otherwise");
        at += 1;
    }
    Ok(())
}

/// Snapshots, a scrub, deletes, again and again. How many rounds.
fn administer(daemon: &Daemon, time: Duration) -> Result<u32> {
    let until = Instant::now() + time;
    let mut rounds = 0;
    while Instant::now() < until {
        for n in 0..3 {
            let name = format!("r{rounds}-{n}");
            daemon.json(&[
                "snapshot",
                "create",
                "disk",
                "--name",
                &name,
                "--consistency",
                "crash",
            ])?;
        }
        // As fast as it can, from the start; finding anything is a failure.
        daemon.text(&["store", "scrub", "--rate", "0B", "--restart"])?;
        for n in 0..3 {
            daemon.json(&["snapshot", "delete", &format!("disk@r{rounds}-{n}"), "--yes"])?;
        }
        rounds += 1;
    }
    Ok(rounds)
}

/// Many hosts want one lock: each round has exactly one winner, and the losers are told where they differ.
#[test]
fn esxi_locks_have_one_owner() {
    played("esxi: ATS locks of four hosts", |daemon| {
        let daemon = &*daemon;
        let mut first = log_in(daemon, &Actor::esxi("esx0"))?;
        for round in 0..25_u32 {
            let lba = 64 + round;
            first.write(0, lba, &[0; 512])?;
        }
        let barrier = std::sync::Barrier::new(4);
        let results = thread::scope(|scope| -> Result<Vec<Vec<bool>>> {
            let hosts: Vec<_> = (1..=4_u8)
                .map(|host| {
                    let barrier = &barrier;
                    scope.spawn(move || -> Result<Vec<bool>> {
                        // Whoever fails still has to come to the barrier: fail after the rounds.
                        let mut raw = log_in(daemon, &Actor::esxi(&format!("esx{host}")));
                        let mut won = Vec::new();
                        let mut trouble = None;
                        for round in 0..25_u32 {
                            barrier.wait();
                            let outcome =
                                raw.as_mut()
                                    .map_err(|e| anyhow::anyhow!("{e:#}"))
                                    .and_then(|raw| {
                                        let data = [vec![0; 512], vec![host; 512]].concat();
                                        let reply = raw.run_write(&ats(64 + round), &data)?;
                                        if reply.status != 0 {
                                            refused(&reply, MISCOMPARE)?;
                                            ensure!(
                                                miscompare_offset(&reply) == Some(0),
                                                "offset: {reply:?}"
                                            );
                                        }
                                        Ok(reply.status == 0)
                                    });
                            match outcome {
                                Ok(owner) => won.push(owner),
                                Err(error) => trouble = Some(error),
                            }
                        }
                        trouble.map_or(Ok(won), Err)
                    })
                })
                .collect();
            hosts
                .into_iter()
                .map(|host| host.join().map_err(|_| anyhow::anyhow!("a host panicked"))?)
                .collect()
        })?;
        for round in 0..25_usize {
            let owners: Vec<u8> = (1..=4_u8)
                .zip(&results)
                .filter(|(_, won)| won[round])
                .map(|(host, _)| host)
                .collect();
            let lba = 64 + u32::try_from(round)?;
            let block = first.read(0, lba, 1)?;
            ensure!(
                owners.len() == 1 && block == vec![owners[0]; 512],
                "round {round}: owners {owners:?}, on the disk {:02x}",
                block[0]
            );
        }
        Ok(())
    });
}

/// ESXi aborts writes that starve. It takes "task does not exist" for a reason to reset, and closes the connection after four rejected aborts.
#[test]
fn esxi_aborts_slow_writes() {
    played("esxi: aborts of slow and of finished writes", |daemon| {
        let mut raw = log_in(daemon, &Actor::esxi("esx1"))?;
        let before = pattern(7, 65_536);
        raw.write(0, 0, &before)?;
        for round in 0..6 {
            let sn = raw.cmd_sn;
            let burst = raw.first_burst;
            let late = pattern(70 + round, 65_536);
            let slow = raw.start(&Cdb::write10(0, 0, 128), late.get(..burst).context("a burst")?)?;
            let ask = raw.expect("an R2T", |pdu| pdu.opcode() == op::R2T && pdu.tag() == slow)?;
            let abort = raw.start_tmf(ABORT_TASK, 0, slow, sn)?;
            ensure!(
                tmf_response(&mut raw, abort)? == FUNCTION_COMPLETE,
                "round {round}: the abort of a running write"
            );
            // The data of the aborted write was on its way.
            raw.satisfy(&ask, &late)?;
            let came = raw.listen(QUIET / 3)?;
            ensure!(
                came.iter().all(|pdu| pdu.tag() != slow),
                "an answer of an aborted write: {came:?}"
            );
            ensure!(
                raw.read(0, 0, 128)? == before,
                "the aborted write reached the medium"
            );
            // A write that has ended: complete, not "does not exist".
            let sn = raw.cmd_sn;
            let ended = raw.start(&Cdb::write10(0, 4_000, 8), &[9; 4_096])?;
            ensure!(raw.finish(ended)?.status == 0, "a short write");
            let abort = raw.start_tmf(ABORT_TASK, 0, ended, sn)?;
            let response = tmf_response(&mut raw, abort)?;
            ensure!(
                response == FUNCTION_COMPLETE,
                "round {round}: the abort of a finished write was answered with {response}"
            );
        }
        raw.ready(0)
    });
}

/// Delete and Zero as VMFS sends them, on ranges that no granule fits.
#[test]
fn esxi_zeroes_and_deletes() {
    played("esxi: WRITE SAME and UNMAP of odd ranges", |daemon| {
        let mut raw = log_in(daemon, &Actor::esxi("esx1"))?;
        let mut model = pattern(11, 1 << 20);
        raw.write(0, 0, &model)?;
        for (start, blocks) in [(3_u32, 5_u32), (8, 8), (100, 333), (1_001, 1_000)] {
            let range = start as usize * 512..(start + blocks) as usize * 512;
            if blocks % 2 == 0 {
                let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
                list.extend_from_slice(&u64::from(start).to_be_bytes());
                list.extend_from_slice(&blocks.to_be_bytes());
                list.extend_from_slice(&[0; 4]);
                let cdb = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
                let reply = raw.run_write(&Cdb::writes(0, &cdb, 24), &list)?;
                ensure!(reply.status == 0, "UNMAP: {reply:?}");
            } else {
                let mut cdb = [0; 16];
                cdb[0] = 0x93;
                cdb[6..10].copy_from_slice(&start.to_be_bytes());
                cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
                let reply = raw.run_write(&Cdb::writes(0, &cdb, 512), &[0; 512])?;
                ensure!(reply.status == 0, "WRITE SAME(16): {reply:?}");
            }
            model[range].fill(0);
            ensure!(
                raw.read(0, 0, 2_048)? == model,
                "{start}+{blocks}: more or less than the range is zero"
            );
        }
        Ok(())
    });
}

/// A CSCD descriptor that names a LUN by its NAA identifier (SPC-4 §6.4.5.6).
fn by_naa(raw: &mut Raw, lun: u8) -> Result<[u8; 32]> {
    let page = raw.run(&Cdb::reads(lun, &[0x12, 1, 0x83, 0, 255, 0], 255))?.data;
    let mut rest = page.get(4..).context("page 83h")?;
    while let [code_set, kind, _, len, ..] = *rest {
        let end = 4 + usize::from(len);
        let bytes = rest.get(4..end).context("a designator")?;
        if kind & 0x3f == 0x03 {
            let mut descriptor = [0; 32];
            descriptor[0] = 0xe4;
            descriptor[4..8].copy_from_slice(&[code_set & 0x0f, 0x03, 0, len]);
            descriptor[8..24].copy_from_slice(bytes.get(..16).context("a NAA of 16 bytes")?);
            descriptor[29..32].copy_from_slice(&[0, 2, 0]);
            return Ok(descriptor);
        }
        rest = rest.get(end..).unwrap_or_default();
    }
    anyhow::bail!("no NAA identifier in {page:02x?}")
}

/// Clone: EXTENDED COPY (LID1) between two LUNs, which ESXi tries when both say 3PC and are of one product.
#[test]
fn esxi_clones_between_luns() {
    played("esxi: XCOPY between LUNs", |daemon| {
        let mut raw = log_in(daemon, &Actor::esxi("esx1"))?;
        let inquiry = raw.run(&Cdb::reads(0, &[0x12, 0, 0, 0, 36, 0], 36))?.data;
        ensure!(
            inquiry.get(5).is_some_and(|byte| byte & 0x08 != 0),
            "3PC is not set: ESXi copies by itself"
        );
        let (mut source, blocks) = (Vec::new(), 8_192_u32);
        for i in 0..16_u32 {
            let piece = pattern(u64::from(0xc10e + i), 262_144);
            write_whole(&mut raw, 1_000 + i * 512, &piece)?;
            source.extend(piece);
        }
        let mut list = vec![0; 16];
        list[0] = 1;
        list[2..4].copy_from_slice(&64_u16.to_be_bytes());
        list[8..12].copy_from_slice(&(28_u32 * 2).to_be_bytes());
        list.extend(by_naa(&mut raw, 0)?);
        list.extend(by_naa(&mut raw, SECOND)?);
        // Two segments that meet at a block that no granule begins with.
        for (from, count) in [(0_u32, 3_333), (3_333, blocks - 3_333)] {
            list.extend([0x02, 0, 0, 0x18, 0, 0, 0, 1, 0, 0]);
            list.extend(u16::try_from(count)?.to_be_bytes());
            list.extend(u64::from(1_000 + from).to_be_bytes());
            list.extend(u64::from(2_001 + from).to_be_bytes());
        }
        let len = u8::try_from(list.len())?;
        let cdb = [0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, len, 0, 0];
        let reply = raw.run_write(&Cdb::writes(0, &cdb, u32::from(len)), &list)?;
        ensure!(reply.status == 0, "EXTENDED COPY: {reply:?}");
        let mut copy = Vec::new();
        for i in 0..16_u32 {
            copy.extend(raw.read(SECOND, 2_001 + i * 512, 512)?);
        }
        ensure!(copy == source, "the copy is not the source");
        for lba in [2_000, 2_001 + blocks] {
            ensure!(
                raw.read(SECOND, lba, 1)? == [0; 512],
                "block {lba} beside the copy changed"
            );
        }
        Ok(())
    });
}

/// A reservation with APTPL is there after a restart of the daemon, and one without is not.
#[test]
fn a_clusters_reservation_outlives_the_daemon() {
    played("windows: a persistent reservation over a restart", |daemon| {
        let (mine, key) = (Actor::windows("node1"), 0x5350_u64);
        let out = |action: u8, first: u64, second: u64| {
            let cdb = [0x5f, action, 5, 0, 0, 0, 0, 0, 24, 0];
            let keys = [first.to_be_bytes(), second.to_be_bytes()].concat();
            (
                Cdb::writes(0, &cdb, 24),
                [keys, vec![0, 0, 0, 0, 1, 0, 0, 0]].concat(),
            )
        };
        let mut raw = log_in(daemon, &mine)?;
        for (action, first, second) in [(6, 0, key), (1, key, 0)] {
            let (command, list) = out(action, first, second);
            let reply = raw.run_write(&command, &list)?;
            ensure!(reply.status == 0, "service action {action}: {reply:?}");
        }
        for blow in ["stop", "kill"] {
            if blow == "stop" {
                daemon.stop()?;
            } else {
                daemon.kill()?;
            }
            daemon.resume()?;
            let mut other = log_in(daemon, &Actor::windows("node2"))?;
            let reply = other.run_write(&Cdb::write10(0, 0, 1), &[1; 512])?;
            ensure!(
                reply.status == RESERVATION_CONFLICT,
                "after {blow} the other node may write: {reply:?}"
            );
            let mut again = log_in(daemon, &mine)?;
            let reply = again.run_write(&Cdb::write10(0, 0, 1), &[2; 512])?;
            ensure!(
                reply.status == 0,
                "after {blow} the owner may not write: {reply:?}"
            );
        }
        // The last REGISTER says what is kept (SPC-4 §6.14.3): this one with APTPL = 0 keeps nothing.
        let mut raw = log_in(daemon, &mine)?;
        let (command, mut list) = out(0, key, key);
        list[20] = 0;
        let reply = raw.run_write(&command, &list)?;
        ensure!(reply.status == 0, "register without APTPL: {reply:?}");
        let mut other = log_in(daemon, &Actor::windows("node2"))?;
        let reply = other.run_write(&Cdb::write10(0, 0, 1), &[1; 512])?;
        ensure!(
            reply.status == RESERVATION_CONFLICT,
            "the reservation was to stay until the restart: {reply:?}"
        );
        daemon.kill()?;
        daemon.resume()?;
        let mut other = log_in(daemon, &Actor::windows("node2"))?;
        let reply = other.run_write(&Cdb::write10(0, 0, 1), &[1; 512])?;
        ensure!(
            reply.status == 0,
            "a reservation that was not to be kept: {reply:?}"
        );
        Ok(())
    });
}
