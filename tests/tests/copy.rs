//! Third-party copies through the daemon: EXTENDED COPY between LUNs and targets, tokens, what stays out of reach, and points in
//! time while the source is overwritten in place.

#![expect(
    clippy::indexing_slicing,
    reason = "lists of known length are filled in; an index out of range fails the test"
)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stillpoint_tests::raw::{Cdb, Nexus, Raw, Reply};
use stillpoint_tests::{Daemon, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const HOST: &str = "iqn.2026-11.test:host";
const PAIR: &str = "iqn.2026-11.test:pair";
const OTHER: &str = "iqn.2026-11.test:other";

const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
    [[lun]]\nname = \"one\"\nsize = \"64MiB\"\n[[lun]]\nname = \"two\"\nsize = \"64MiB\"\n\
    [[lun]]\nname = \"large\"\nsize = \"64MiB\"\nblock_size = 4096\n\
    [[lun]]\nname = \"apart\"\nsize = \"64MiB\"\n[[lun]]\nname = \"fixed\"\nsize = \"64MiB\"\nread_only = true\n\
    [[target]]\niqn = \"iqn.2026-11.test:pair\"\nluns = [\"one\", \"two\", \"large\", \"fixed\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n\
    [[target]]\niqn = \"iqn.2026-11.test:other\"\nluns = [\"apart\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n";

const GOOD: u8 = 0;
const COPY_STATUS: u8 = 0x05;
const LUN_RESET: u8 = 5;
/// How long a copy may take to begin on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

fn address(daemon: &Daemon) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], daemon.port()))
}

fn log_in(daemon: &Daemon, initiator: &str, target: &str, luns: &[u8]) -> Result<Raw> {
    let mut raw = Raw::login(address(daemon), &Nexus::new(initiator, target))?.session()?;
    for lun in luns {
        raw.ready(*lun)?;
    }
    Ok(raw)
}

fn copies(name: &str, body: impl FnOnce(&mut Daemon) -> Result<()>) {
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

/// Writes in commands that need no R2T.
fn fill(raw: &mut Raw, lun: u8, data: &[u8]) -> Result<()> {
    for (lba, piece) in (0..).step_by(128).zip(data.chunks(128 * 512)) {
        raw.write(lun, lba, piece)?;
    }
    Ok(())
}

fn good(reply: Reply) -> Result<Reply> {
    ensure!(reply.status == GOOD, "{reply:?}");
    Ok(reply)
}

fn refused(reply: &Reply, sense: (u8, u8, u8)) -> Result<()> {
    ensure!(
        reply.status == 2 && reply.sense_code() == sense,
        "{sense:02x?} was expected: {reply:?}"
    );
    Ok(())
}

/// The NAA designator of a LUN.
fn naa(raw: &mut Raw, lun: u8) -> Result<[u8; 16]> {
    let page = good(raw.run(&Cdb::reads(lun, &[0x12, 1, 0x83, 2, 0, 0], 512))?)?.data;
    let found = page.get(8..).and_then(|designator| designator.first_chunk());
    found.copied().context("no designator in VPD page 83h")
}

fn with_length(mut cdb: [u8; 16], len: usize) -> [u8; 16] {
    cdb[10..14].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    cdb
}

/// EXTENDED COPY(LID4) from the first unit to the second, in segments `(blocks, from, to)`.
fn extended_copy(raw: &mut Raw, lun: u8, units: &[[u8; 16]], segments: &[(u16, u64, u64)]) -> Result<Reply> {
    let list = copy_list(units, segments);
    let cdb = with_length([0x83, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], list.len());
    let edtl = u32::try_from(list.len())?;
    raw.run_write(&Cdb::writes(lun, &cdb, edtl), &list)
}

fn copy_list(units: &[[u8; 16]], segments: &[(u16, u64, u64)]) -> Vec<u8> {
    let mut list = vec![0; 48];
    (list[0], list[3], list[16], list[23]) = (1, 0x20, 0xff, 9);
    let len = |count: usize, each: usize| u16::try_from(count * each).unwrap_or(u16::MAX).to_be_bytes();
    list[42..44].copy_from_slice(&len(units.len(), 32));
    list[44..46].copy_from_slice(&len(segments.len(), 28));
    for naa in units {
        list.extend_from_slice(&[0xe4, 0, 0, 0, 1, 3, 0, 16]);
        list.extend_from_slice(naa);
        list.extend_from_slice(&[0; 8]);
    }
    let last = u8::try_from(units.len() - 1).unwrap_or(0);
    for (blocks, from, to) in segments {
        list.extend_from_slice(&[2, 0, 0, 24, 0, 0, 0, last, 0, 0]);
        list.extend_from_slice(&blocks.to_be_bytes());
        list.extend_from_slice(&from.to_be_bytes());
        list.extend_from_slice(&to.to_be_bytes());
    }
    list
}

/// COPY OPERATION STATUS of the copy of [`copy_list`]; `None` when the LUN knows of none.
fn copy_status(raw: &mut Raw) -> Result<Option<u8>> {
    let cdb = with_length([0x84, COPY_STATUS, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 64);
    let reply = raw.run(&Cdb::reads(0, &cdb, 64))?;
    Ok(reply.data.get(5).copied())
}

/// Ranges `(lba, blocks)` behind a fixed part.
fn ranges(mut list: Vec<u8>, ranges: &[(u64, u32)]) -> Vec<u8> {
    let len = u16::try_from(16 * ranges.len()).unwrap_or(u16::MAX).to_be_bytes();
    let at = list.len() - 2;
    list[at..].copy_from_slice(&len);
    for (lba, blocks) in ranges {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&blocks.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    let said = u16::try_from(list.len() - 2).unwrap_or(u16::MAX).to_be_bytes();
    list[..2].copy_from_slice(&said);
    list
}

fn token_command(raw: &mut Raw, lun: u8, action: u8, list: &[u8]) -> Result<Reply> {
    let cdb = with_length(
        [0x83, action, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0],
        list.len(),
    );
    raw.run_write(&Cdb::writes(lun, &cdb, u32::try_from(list.len())?), list)
}

fn populate(raw: &mut Raw, lun: u8, of: &[(u64, u32)]) -> Result<Vec<u8>> {
    good(token_command(raw, lun, 0x10, &ranges(vec![0; 16], of))?)?;
    let data = information(raw, lun)?;
    ensure!(data.get(5) == Some(&1), "{data:02x?}");
    let token = data.get(38..550).context("no token")?;
    Ok(token.to_vec())
}

/// RECEIVE ROD TOKEN INFORMATION of list identifier 7.
fn information(raw: &mut Raw, lun: u8) -> Result<Vec<u8>> {
    let cdb = with_length([0x84, 7, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1024);
    Ok(good(raw.run(&Cdb::reads(lun, &cdb, 1024))?)?.data)
}

fn write_using(raw: &mut Raw, lun: u8, token: &[u8], skip: u64, to: &[(u64, u32)]) -> Result<Reply> {
    let mut list = vec![0; 536];
    list[8..16].copy_from_slice(&skip.to_be_bytes());
    list[16..528].copy_from_slice(token);
    token_command(raw, lun, 0x11, &ranges(list, to))
}

#[test]
fn extended_copy_between_luns_and_targets() {
    copies("EXTENDED COPY between LUNs", |daemon| {
        let mut raw = log_in(daemon, HOST, PAIR, &[0, 1, 2, 3])?;
        let (one, two, large) = (naa(&mut raw, 0)?, naa(&mut raw, 1)?, naa(&mut raw, 2)?);
        let data = pattern(1, 1 << 20);
        fill(&mut raw, 0, &data)?;
        // Aligned to grains, unaligned at both ends, and with another place in the grain on either side.
        for (lun, (blocks, from, to)) in [(1, (2048, 0, 8192)), (1, (100, 3, 19)), (1, (1000, 8, 20001))] {
            good(extended_copy(&mut raw, 0, &[one, two], &[(blocks, from, to)])?)?;
            let copied = raw.read(lun, u32::try_from(to)?, blocks)?;
            let at = usize::try_from(from)? * 512;
            ensure!(
                copied[..] == data[at..at + usize::from(blocks) * 512],
                "{blocks} blocks from {from} to {to}"
            );
        }
        // Any of the LUNs may be asked; what was not written is copied as zeroes.
        good(extended_copy(
            &mut raw,
            2,
            &[two, one],
            &[(8, 60_000, 16), (8, 8192, 24)],
        )?)?;
        ensure!(
            raw.read(0, 16, 8)?.iter().all(|byte| *byte == 0),
            "a hole is copied as one"
        );
        ensure!(raw.read(0, 24, 8)?[..] == data[..4096], "the second segment");
        // Within one LUN, and overlapping: as if all had been read first.
        fill(&mut raw, 0, &data)?;
        good(extended_copy(&mut raw, 0, &[one], &[(800, 0, 100)])?)?;
        ensure!(raw.read(0, 100, 800)?[..] == data[..800 * 512], "an overlap");
        // Blocks of 512 bytes to blocks of 4096 bytes: counted in blocks of the source.
        good(extended_copy(&mut raw, 0, &[one, large], &[(16, 100, 4)])?)?;
        let copied = good(raw.run(&Cdb::reads(2, &[0x28, 0, 0, 0, 0, 4, 0, 0, 2, 0], 8192))?)?.data;
        ensure!(copied[..] == data[..8192], "to larger blocks");
        refused(
            &extended_copy(&mut raw, 0, &[one, large], &[(12, 100, 4)])?,
            (0x0a, 0x26, 0x0a),
        )?;
        // What cannot be: behind the end, write protected.
        let blocks = 64 << 11;
        refused(
            &extended_copy(&mut raw, 0, &[one, two], &[(2, 0, blocks - 1)])?,
            (0x0a, 0, 0),
        )?;
        let fixed = naa(&mut raw, 3)?;
        refused(
            &extended_copy(&mut raw, 0, &[one, fixed], &[(2, 0, 0)])?,
            (0x0a, 0x27, 0),
        )?;
        good(extended_copy(&mut raw, 3, &[fixed, two], &[(8, 0, 0)])?)?;
        // A LUN of another target: only for an initiator that is logged in there.
        let apart = naa(&mut log_in(daemon, "iqn.2026-11.test:stranger", OTHER, &[0])?, 0)?;
        refused(
            &extended_copy(&mut raw, 0, &[one, apart], &[(8, 100, 0)])?,
            (0x0a, 0x0d, 0x02),
        )?;
        let mut there = log_in(daemon, HOST, OTHER, &[0])?;
        good(extended_copy(&mut raw, 0, &[one, apart], &[(8, 100, 0)])?)?;
        ensure!(there.read(0, 0, 8)?[..] == data[..4096], "in another target");
        // Another host's reservation there is respected.
        let mut rival = log_in(daemon, "iqn.2026-11.test:rival", OTHER, &[0])?;
        for (action, kind, key, new) in [(0, 0, 0, 5_u8), (1, 1, 5, 0)] {
            let mut list = [0; 24];
            (list[7], list[15]) = (key, new);
            let cdb = [0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0];
            good(rival.run_write(&Cdb::writes(0, &cdb, 24), &list)?)?;
        }
        refused(
            &extended_copy(&mut raw, 0, &[one, apart], &[(8, 100, 0)])?,
            (0x0a, 0x0d, 0x01),
        )?;
        good(extended_copy(&mut raw, 0, &[apart, two], &[(8, 0, 0)])?)?;
        let status = with_length([0x84, COPY_STATUS, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 64);
        let status = good(raw.run(&Cdb::reads(0, &status, 64))?)?.data;
        ensure!(
            status.get(5) == Some(&1) && status.get(23) == Some(&0),
            "4096 bytes: {status:02x?}"
        );
        Ok(())
    });
}

#[test]
fn tokens_show_a_point_in_time() {
    copies("tokens", |daemon| {
        let mut raw = log_in(daemon, HOST, PAIR, &[0, 1, 2])?;
        let (old, new) = (pattern(1, 1 << 20), pattern(2, 1 << 20));
        fill(&mut raw, 0, &old)?;
        let token = populate(&mut raw, 0, &[(8, 1000), (0, 8), (1500, 3)])?;
        // In place twice: the first write after a point in time goes elsewhere, the second stays there.
        fill(&mut raw, 0, &new)?;
        fill(&mut raw, 0, &new)?;
        good(write_using(&mut raw, 1, &token, 0, &[(64, 500), (4096, 511)])?)?;
        let bytes = |from: usize, blocks: usize| &old[from * 512..(from + blocks) * 512];
        let expected = [bytes(8, 1000), bytes(0, 8), bytes(1500, 3)].concat();
        let copied = [raw.read(1, 64, 500)?, raw.read(1, 4096, 511)?].concat();
        ensure!(
            copied == expected,
            "the token shows what was there when it was made"
        );
        let data = information(&mut raw, 1)?;
        ensure!(
            data.get(5) == Some(&1) && data.get(22..24) == Some(&[3, 0xf3][..]),
            "1011 blocks: {data:02x?}"
        );
        // From another session too, and back onto the source.
        let mut there = log_in(daemon, HOST, OTHER, &[0])?;
        good(write_using(&mut there, 0, &token, 1000, &[(0, 8)])?)?;
        ensure!(there.read(0, 0, 8)?[..] == *bytes(0, 8), "in another target");
        // And by another host: a token is worth what it says to whoever holds it (Hyper-V hands them on), hence unguessable.
        let mut guest = log_in(daemon, "iqn.2026-11.com.example:another-host", OTHER, &[0])?;
        good(write_using(&mut guest, 0, &token, 1000, &[(16, 8)])?)?;
        ensure!(guest.read(0, 16, 8)?[..] == *bytes(0, 8), "by another initiator");
        good(write_using(&mut raw, 0, &token, 0, &[(8, 1000)])?)?;
        ensure!(raw.read(0, 8, 1000)?[..] == *bytes(8, 1000), "back");
        // 512-byte blocks into 4096-byte blocks.
        good(write_using(&mut raw, 2, &token, 0, &[(3, 2)])?)?;
        let copied = good(raw.run(&Cdb::reads(2, &[0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0], 8192))?)?.data;
        ensure!(copied[..] == *bytes(8, 16), "to larger blocks");
        refused(&write_using(&mut raw, 1, &token, 1000, &[(0, 12)])?, (5, 0x26, 0))?;
        let mut forged = token.clone();
        forged[200] ^= 1;
        refused(&write_using(&mut raw, 1, &forged, 0, &[(0, 8)])?, (5, 0x23, 0x04))?;
        // Zeroes.
        let mut zeroes = vec![0; 512];
        zeroes[..8].copy_from_slice(&[0xff, 0xff, 0, 1, 0, 0, 1, 0xf8]);
        good(write_using(&mut raw, 0, &zeroes, 0, &[(3, 1000)])?)?;
        ensure!(raw.read(0, 3, 1000)?.iter().all(|byte| *byte == 0), "zeroes");
        // A token that nobody uses for its time dies; its list says one second.
        let mut list = vec![0; 16];
        list[7] = 1;
        good(token_command(&mut raw, 0, 0x10, &ranges(list, &[(0, 8)]))?)?;
        let short = information(&mut raw, 0)?
            .get(38..550)
            .context("no token")?
            .to_vec();
        good(write_using(&mut raw, 1, &short, 0, &[(0, 8)])?)?;
        thread::sleep(Duration::from_millis(1500));
        refused(&write_using(&mut raw, 1, &short, 0, &[(0, 8)])?, (5, 0x23, 0x07))?;
        good(write_using(&mut raw, 1, &token, 0, &[(0, 8)])?)?;
        Ok(())
    });
}

#[test]
fn a_copy_is_a_point_in_time_while_the_source_changes() {
    copies("a copy while the source is overwritten in place", |daemon| {
        let mut raw = log_in(daemon, HOST, PAIR, &[0, 1])?;
        let units = [naa(&mut raw, 0)?, naa(&mut raw, 1)?];
        // The writer puts round after round into twenty places, from the first to the last; the range is longer than what is
        // copied at once.
        const BLOCKS: u16 = 20 * STEP;
        const STEP: u16 = 2048;
        let places = || (0..u32::from(BLOCKS)).step_by(STEP.into());
        for place in places() {
            raw.write(0, place, &[0; 512])?;
        }
        let over = AtomicBool::new(false);
        let rounds = thread::scope(|scope| {
            let mut writer = log_in(daemon, "iqn.2026-11.test:writer", PAIR, &[0])?;
            let over = &over;
            let writing = scope.spawn(move || {
                let mut round = 0_u32;
                while !over.load(Ordering::Relaxed) {
                    round += 1;
                    for block in places() {
                        writer.write(0, block, &[&round.to_be_bytes()[..], &[0; 508]].concat())?;
                    }
                }
                Ok::<_, anyhow::Error>(round)
            });
            let checked = (0..30).try_for_each(|turn| {
                // Aligned and by data in turns.
                let to = 50_000 + turn % 2;
                good(extended_copy(&mut raw, 0, &units, &[(BLOCKS, 0, to.into())])?)?;
                let mut seen = Vec::new();
                for place in places() {
                    let block = raw.read(1, to + place, 1)?;
                    seen.push(block.first_chunk().map_or(0, |round| u32::from_be_bytes(*round)));
                }
                // At any moment a prefix is of one round, and the rest of the one before.
                let (first, last) = (
                    seen.first().copied().unwrap_or(0),
                    seen.last().copied().unwrap_or(0),
                );
                ensure!(
                    seen.is_sorted_by(|a, b| a >= b) && first <= last + 1,
                    "no point in time: {seen:?}"
                );
                Ok(())
            });
            over.store(true, Ordering::Relaxed);
            let rounds = writing.join().expect("the writer")?;
            checked.map(|()| rounds)
        })?;
        ensure!(rounds > 1, "the writer wrote nothing meanwhile");
        println!("story copy: 30 copies within {rounds} rounds of writing");
        Ok(())
    });
}

#[test]
fn a_copy_ends_with_a_reset_and_with_its_session() {
    copies("aborted copies", |daemon| {
        let mut raw = log_in(daemon, HOST, PAIR, &[0, 1])?;
        let units = [naa(&mut raw, 0)?, naa(&mut raw, 1)?];
        fill(&mut raw, 0, &pattern(3, 30 << 20))?;
        // By data, hundreds of times the same: minutes, if nothing ended it.
        let segments = vec![(60_000, 0, 3); 256];
        let list = copy_list(&units, &segments);
        let cdb = with_length([0x83, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], list.len());
        let copy = Cdb::writes(0, &cdb, u32::try_from(list.len())?);
        let begun = Instant::now();
        raw.start(&copy, &list)?;
        while copy_status(&mut raw)? != Some(0x11) {
            ensure!(begun.elapsed() < LIMIT, "the copy does not begin");
        }
        ensure!(raw.tmf(LUN_RESET, 0)? == 0, "function complete");
        for lun in [0, 1] {
            raw.ready(lun)?;
        }
        ensure!(copy_status(&mut raw)? == Some(2), "it ended with an error");
        // A reset of the LUN that is written to, and a host that reserves it, end copies which another LUN was asked for.
        let running = |raw: &mut Raw| -> Result<u32> {
            let itt = raw.start(&copy, &list)?;
            while copy_status(raw)? != Some(0x11) {
                ensure!(begun.elapsed() < LIMIT, "the copy does not begin");
            }
            Ok(itt)
        };
        // A copy that has not reached its destination yet rightly survives a reset there: then once more.
        let mut resets = 0;
        loop {
            let itt = running(&mut raw)?;
            ensure!(raw.tmf(LUN_RESET, 1)? == 0, "function complete");
            let reply = raw.finish(itt)?;
            raw.ready(1)?;
            resets += 1;
            if reply.status != 0 || resets == 5 {
                refused(&reply, (0x0a, 0, 0))?;
                break;
            }
        }
        let itt = running(&mut raw)?;
        let mut rival = log_in(daemon, "iqn.2026-11.test:rival", PAIR, &[1])?;
        for (action, kind, key, new) in [(0, 0, 0, 5_u8), (1, 1, 5, 0)] {
            let mut list = [0; 24];
            (list[7], list[15]) = (key, new);
            let cdb = [0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0];
            good(rival.run_write(&Cdb::writes(1, &cdb, 24), &list)?)?;
        }
        refused(&raw.finish(itt)?, (0x0a, 0x0d, 0x01))?;
        let mut list_5 = [0; 24];
        list_5[7] = 5;
        let clear = [0x5f, 3, 0, 0, 0, 0, 0, 0, 24, 0];
        good(rival.run_write(&Cdb::writes(1, &clear, 24), &list_5)?)?;
        running(&mut raw)?;
        raw.hang_up()?;
        drop(raw);
        // The same initiator port again: it is let in when the copy has ended.
        let mut raw = log_in(daemon, HOST, PAIR, &[0, 1])?;
        println!("story copy: four copies ended within {:.1?}", begun.elapsed());
        good(extended_copy(&mut raw, 0, &units, &[(8, 0, 0)])?)?;
        Ok(())
    });
}
