//! The failover cluster's validation: persistent reservations as two nodes use them.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::disk::{CONFLICT, Disk, Size, byte, bytes, shown, transfer, u16_at, u32_at, u64_at};
use super::{Check, check};
use crate::raw::{Cdb, Reply};

/// Write exclusive, registrants only: the type that clusters use.
const REGISTRANTS_ONLY: u8 = 5;
const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const REGISTER_AND_IGNORE: u8 = 6;
const READ_KEYS: u8 = 0;
const READ_RESERVATION: u8 = 1;
const REPORT_CAPABILITIES: u8 = 2;
const READ_FULL_STATUS: u8 = 3;
/// Keys of the nodes.
const FIRST: u64 = 0x0001_0000_5350_0001;
const SECOND: u64 = 0x0002_0000_5350_0002;
/// A command under a reservation that takes longer fails the validation.
const LATENCY: Duration = Duration::from_secs(3);

pub(super) const CHECKS: &[Check] = &[
    check("cluster: both nodes see one disk", |disk| {
        let mut other = disk.node("second")?;
        ensure!(disk.identity()? == other.identity()?, "they see two");
        Ok(())
    }),
    check("cluster: a registration is seen by the other node", |disk| {
        let mut other = clean(disk)?;
        register(disk, FIRST)?;
        ensure!(keys(&mut other)? == [FIRST], "keys {:x?}", keys(&mut other)?);
        Ok(())
    }),
    check("cluster: PRGENERATION counts registrations", |disk| {
        let mut other = clean(disk)?;
        let before = generation(disk)?;
        register(disk, FIRST)?;
        register(&mut other, SECOND)?;
        let after = generation(disk)?;
        ensure!(after == before.wrapping_add(2), "{before}, then {after}");
        Ok(())
    }),
    check("cluster: REGISTER with a wrong key conflicts", |disk| {
        clean(disk)?;
        register(disk, FIRST)?;
        conflicts(&out(disk, REGISTER, 0, SECOND, FIRST)?)?;
        ensure!(keys(disk)? == [FIRST], "keys {:x?}", keys(disk)?);
        Ok(())
    }),
    check("cluster: REGISTER of key 0 takes the registration away", |disk| {
        clean(disk)?;
        register(disk, FIRST)?;
        done(&out(disk, REGISTER, 0, FIRST, 0)?)?;
        ensure!(keys(disk)?.is_empty(), "keys {:x?}", keys(disk)?);
        Ok(())
    }),
    check("cluster: RESERVE of type 5 is seen by the other node", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        ensure!(
            holder(&mut other)? == Some((FIRST, REGISTRANTS_ONLY)),
            "{:x?}",
            holder(&mut other)?
        );
        Ok(())
    }),
    check("cluster: who is not registered may read but not write", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        other.read(Size::Ten, 0, 8)?;
        conflicts(&write_block(&mut other)?)?;
        Ok(())
    }),
    check(
        "cluster: who is not registered still gets TUR, INQUIRY, capacity",
        |disk| {
            let mut other = clean(disk)?;
            hold(disk, FIRST)?;
            other.good(&[0; 6])?;
            other.data(&[0x12, 0, 0, 0, 96, 0], 96)?;
            other.data(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8).map(drop)
        },
    ),
    check("cluster: who is registered may write", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        register(&mut other, SECOND)?;
        done(&write_block(&mut other)?)
    }),
    check("cluster: RESERVE without a registration conflicts", |disk| {
        clean(disk)?;
        conflicts(&out(disk, RESERVE, REGISTRANTS_ONLY, FIRST, 0)?)
    }),
    check("cluster: RESERVE while another node holds conflicts", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        register(&mut other, SECOND)?;
        conflicts(&out(&mut other, RESERVE, REGISTRANTS_ONLY, SECOND, 0)?)
    }),
    check("cluster: RESERVE by the holder again ends GOOD", |disk| {
        clean(disk)?;
        hold(disk, FIRST)?;
        done(&out(disk, RESERVE, REGISTRANTS_ONLY, FIRST, 0)?)
    }),
    check("cluster: PREEMPT takes reservation and registration", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        register(&mut other, SECOND)?;
        done(&out(&mut other, PREEMPT, REGISTRANTS_ONLY, SECOND, FIRST)?)?;
        ensure!(keys(&mut other)? == [SECOND], "keys {:x?}", keys(&mut other)?);
        ensure!(
            holder(&mut other)? == Some((SECOND, REGISTRANTS_ONLY)),
            "{:x?}",
            holder(&mut other)?
        );
        Ok(())
    }),
    check("cluster: who was preempted is told, and cannot write", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        register(&mut other, SECOND)?;
        done(&out(&mut other, PREEMPT, REGISTRANTS_ONLY, SECOND, FIRST)?)?;
        let told = disk.ask(&[0; 6], 0)?;
        ensure!(
            told.sense_code().0 == 6 && told.sense_code().1 == 0x2a,
            "no unit attention: {}",
            shown(&told)
        );
        disk.raw.ready(disk.place.lun)?;
        conflicts(&write_block(disk)?)
    }),
    check("cluster: PREEMPT with a key that nobody has conflicts", |disk| {
        clean(disk)?;
        hold(disk, FIRST)?;
        conflicts(&out(disk, PREEMPT, REGISTRANTS_ONLY, FIRST, 0x0bad)?)
    }),
    check("cluster: RELEASE leaves registrations", |disk| {
        clean(disk)?;
        hold(disk, FIRST)?;
        done(&out(disk, RELEASE, REGISTRANTS_ONLY, FIRST, 0)?)?;
        ensure!(
            holder(disk)?.is_none() && keys(disk)? == [FIRST],
            "{:x?}",
            holder(disk)?
        );
        Ok(())
    }),
    check("cluster: CLEAR takes everything", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        register(&mut other, SECOND)?;
        done(&out(&mut other, CLEAR, 0, SECOND, 0)?)?;
        ensure!(
            holder(&mut other)?.is_none() && keys(&mut other)?.is_empty(),
            "something is left"
        );
        Ok(())
    }),
    check("cluster: the reservation outlives the holder's session", |disk| {
        let mut other = clean(disk)?;
        let mut holding = disk.node("third")?;
        hold(&mut holding, FIRST)?;
        holding.raw.hang_up()?;
        drop(holding);
        ensure!(
            holder(&mut other)? == Some((FIRST, REGISTRANTS_ONLY)),
            "{:x?}",
            holder(&mut other)?
        );
        conflicts(&write_block(&mut other)?)?;
        // The same host again, on the same ISID: it holds still.
        let mut again = disk.node("third")?;
        done(&write_block(&mut again)?)?;
        done(&out(&mut again, CLEAR, 0, FIRST, 0)?)
    }),
    check("cluster: arbitration after the owner is gone", |disk| {
        let mut other = clean(disk)?;
        let mut owner = disk.node("third")?;
        hold(&mut owner, FIRST)?;
        owner.raw.hang_up()?;
        drop(owner);
        register(&mut other, SECOND)?;
        let (key, _) = holder(&mut other)?.context("nobody holds")?;
        done(&out(&mut other, PREEMPT, REGISTRANTS_ONLY, SECOND, key)?)?;
        done(&write_block(&mut other)?)?;
        let mut back = disk.node("third")?;
        conflicts(&write_block(&mut back)?)
    }),
    check("cluster: arbitration many times over", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        for round in 0..6_u64 {
            let (challenger, own) = if round % 2 == 0 {
                (&mut other, SECOND + round)
            } else {
                (&mut *disk, FIRST + round)
            };
            challenger.raw.ready(challenger.place.lun)?;
            register(challenger, own)?;
            let (key, _) = holder(challenger)?.context("nobody holds")?;
            done(&out(challenger, PREEMPT, REGISTRANTS_ONLY, own, key)?)
                .with_context(|| format!("round {round}"))?;
            ensure!(
                holder(challenger)? == Some((own, REGISTRANTS_ONLY)),
                "round {round}: {:x?}",
                holder(challenger)?
            );
        }
        Ok(())
    }),
    check("cluster: simultaneous failover has one winner", |disk| {
        clean(disk)?;
        for round in 0..4_u64 {
            simultaneous(disk, round).with_context(|| format!("round {round}"))?;
        }
        Ok(())
    }),
    check(
        "cluster: commands under a reservation are answered in time",
        |disk| {
            clean(disk)?;
            hold(disk, FIRST)?;
            let mut slowest = Duration::ZERO;
            for i in 0..50 {
                let started = Instant::now();
                disk.read(Size::Ten, i * 8, 8)?;
                slowest = slowest.max(started.elapsed());
            }
            ensure!(slowest < LATENCY, "one took {slowest:?}");
            Ok(())
        },
    ),
    check("cluster: PR IN keeps its length when it is cut off", |disk| {
        clean(disk)?;
        register(disk, FIRST)?;
        let data = persistent_in(disk, READ_KEYS, 8)?;
        ensure!(data.len() == 8 && u32_at(&data, 4)? == 8, "{data:02x?}");
        Ok(())
    }),
    check("cluster: REPORT CAPABILITIES names type 5", |disk| {
        let data = persistent_in(disk, REPORT_CAPABILITIES, 8)?;
        ensure!(u16_at(&data, 0)? == 8, "length {}", u16_at(&data, 0)?);
        ensure!(
            byte(&data, 3)? & 0x80 != 0 && byte(&data, 4)? & 0x20 != 0,
            "type mask {:02x?}",
            bytes(&data, 3, 3)?
        );
        Ok(())
    }),
    check("cluster: APTPL is possible", |disk| {
        clean(disk)?;
        let data = persistent_in(disk, REPORT_CAPABILITIES, 8)?;
        ensure!(byte(&data, 2)? & 0x01 != 0, "PTPL_C is 0");
        done(&out_with(disk, REGISTER, 0, (0, FIRST), true)?)?;
        let after = persistent_in(disk, REPORT_CAPABILITIES, 8)?;
        ensure!(byte(&after, 3)? & 0x01 != 0, "PTPL_A is 0 after it was asked for");
        Ok(())
    }),
    check("cluster: READ FULL STATUS names both nodes", |disk| {
        let mut other = clean(disk)?;
        hold(disk, FIRST)?;
        register(&mut other, SECOND)?;
        let data = persistent_in(disk, READ_FULL_STATUS, 1_024)?;
        let text = String::from_utf8_lossy(&data);
        for host in ["first", "second"] {
            ensure!(
                text.contains(&format!("iqn.1991-05.com.microsoft:{host}")),
                "{host} is missing in {data:02x?}"
            );
        }
        let mut at = 8;
        let mut holders = 0;
        while at < data.len() {
            holders += usize::from(byte(&data, at + 12)? & 0x01);
            at += 24 + u32_at(&data, at + 20)? as usize;
        }
        ensure!(holders == 1 && at == data.len(), "{holders} holders");
        clean(disk).map(drop)
    }),
];

fn persistent_in(disk: &mut Disk, action: u8, allocation: u16) -> Result<Vec<u8>> {
    let [high, low] = allocation.to_be_bytes();
    let cdb = [0x5e, action, 0, 0, 0, 0, 0, high, low, 0];
    disk.data(&cdb, u32::from(allocation))
}

fn out_with(disk: &mut Disk, action: u8, kind: u8, keys: (u64, u64), aptpl: bool) -> Result<Reply> {
    let mut list = [keys.0.to_be_bytes(), keys.1.to_be_bytes()].concat();
    list.extend_from_slice(&[0, 0, 0, 0, u8::from(aptpl), 0, 0, 0]);
    disk.give(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list)
}

/// PERSISTENT RESERVE OUT with RESERVATION KEY and SERVICE ACTION RESERVATION KEY.
fn out(disk: &mut Disk, action: u8, kind: u8, key: u64, other_key: u64) -> Result<Reply> {
    out_with(disk, action, kind, (key, other_key), false)
}

fn done(reply: &Reply) -> Result<()> {
    ensure!(reply.status == 0, "{}", shown(reply));
    Ok(())
}

fn conflicts(reply: &Reply) -> Result<()> {
    ensure!(
        reply.status == CONFLICT,
        "{} instead of RESERVATION CONFLICT",
        shown(reply)
    );
    Ok(())
}

fn register(disk: &mut Disk, key: u64) -> Result<()> {
    done(&out(disk, REGISTER_AND_IGNORE, 0, 0, key)?)
}

fn hold(disk: &mut Disk, key: u64) -> Result<()> {
    register(disk, key)?;
    done(&out(disk, RESERVE, REGISTRANTS_ONLY, key, 0)?)
}

/// Leaves no registration and no reservation.
pub(super) fn clear(disk: &mut Disk) -> Result<()> {
    register(disk, FIRST)?;
    done(&out(disk, CLEAR, 0, FIRST, 0)?)?;
    disk.raw.ready(disk.place.lun)
}

/// As [`clear`]; a second node that is ready.
fn clean(disk: &mut Disk) -> Result<Disk> {
    clear(disk)?;
    disk.node("second")
}

fn keys(disk: &mut Disk) -> Result<Vec<u64>> {
    let data = persistent_in(disk, READ_KEYS, 1_024)?;
    let list = data.get(8..).unwrap_or_default();
    ensure!(u32_at(&data, 4)? as usize == list.len(), "length: {data:02x?}");
    list.chunks(8).map(|key| u64_at(key, 0)).collect()
}

fn generation(disk: &mut Disk) -> Result<u32> {
    u32_at(&persistent_in(disk, READ_KEYS, 8)?, 0)
}

/// Key and type of the reservation.
fn holder(disk: &mut Disk) -> Result<Option<(u64, u8)>> {
    let data = persistent_in(disk, READ_RESERVATION, 64)?;
    if u32_at(&data, 4)? == 0 {
        return Ok(None);
    }
    Ok(Some((u64_at(&data, 8)?, byte(&data, 21)? & 0x0f)))
}

fn write_block(disk: &mut Disk) -> Result<Reply> {
    let data = disk.pattern(0xc1, 1);
    disk.give(&transfer(0x2a, Size::Ten, 0, 12, 1)?, &data)
}

/// Two nodes preempt a third at the same moment: one of them wins, the loser hears of it, and one key is left that holds.
fn simultaneous(disk: &mut Disk, round: u64) -> Result<()> {
    let old = FIRST + 0x100 + round;
    disk.raw.ready(disk.place.lun)?;
    hold(disk, old)?;
    let race = |host: &str, key: u64| -> Result<(u64, u8)> {
        let mut node = disk.node(host)?;
        register(&mut node, key)?;
        let command = Cdb::writes(
            node.place.lun,
            &[0x5f, PREEMPT, REGISTRANTS_ONLY, 0, 0, 0, 0, 0, 24, 0],
            24,
        );
        let list = [key.to_be_bytes().as_slice(), &old.to_be_bytes(), &[0; 8]].concat();
        Ok((key, node.raw.run_write(&command, &list)?.status))
    };
    let (own, its) = (SECOND + 0x100 + round, SECOND + 0x200 + round);
    let (one, two) = thread::scope(|scope| {
        let one = scope.spawn(|| race("second", own));
        let two = scope.spawn(|| race("third", its));
        (one.join(), two.join())
    });
    let outcomes = [one, two]
        .into_iter()
        .map(|outcome| outcome.map_err(|_| anyhow::anyhow!("a node panicked"))?)
        .collect::<Result<Vec<_>>>()?;
    let winners: Vec<u64> = outcomes
        .iter()
        .filter(|(_, status)| *status == 0)
        .map(|(key, _)| *key)
        .collect();
    let mut witness = disk.node("witness")?;
    let (key, _) = holder(&mut witness)?.context("nobody holds")?;
    ensure!(
        winners == [key],
        "{outcomes:x?}, and {key:x} holds: two nodes think that they own the disk, or none"
    );
    ensure!(
        keys(&mut witness)?.iter().all(|k| *k != old),
        "the old key is still there"
    );
    register(&mut witness, 0xee)?;
    done(&out(&mut witness, CLEAR, 0, 0xee, 0)?)
}
