//! What becomes of a LUN's persistent reservations when it is reverted, cloned, mounted, grown, and served again.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use stillpoint_tests::raw::{Cdb, Nexus, Raw, Reply};
use stillpoint_tests::{Daemon, story};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const DISK: &str = "iqn.2026-11.test:disk";
const COPY: &str = "iqn.2026-11.test:copy";
const OWNER: &str = "iqn.2026-11.test:owner";
const RIVAL: &str = "iqn.2026-11.test:rival";
const KEY: u64 = 0x5eed;

const GOOD: u8 = 0;
const RESERVATION_CONFLICT: u8 = 0x18;
const WRITE_EXCLUSIVE_REGISTRANTS_ONLY: u8 = 5;

fn config(size: &str, clone: bool) -> String {
    let mut text = format!(
        "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"disk\"\nsize = \"{size}\"\n\
         [[target]]\niqn = \"{DISK}\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n"
    );
    if clone {
        text.push_str(&format!(
            "[[lun]]\nname = \"copy\"\nsize = \"64MiB\"\n\
             [[target]]\niqn = \"{COPY}\"\nluns = [\"copy\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n"
        ));
    }
    text
}

fn log_in(daemon: &Daemon, initiator: &str, target: &str) -> Result<Raw> {
    let address = SocketAddr::from(([127, 0, 0, 1], daemon.port()));
    let mut raw = Raw::login(address, &Nexus::new(initiator, target))?.session()?;
    raw.ready(0)?;
    Ok(raw)
}

/// PERSISTENT RESERVE OUT with APTPL.
fn reserve_out(raw: &mut Raw, action: u8, key: u64, new: u64) -> Result<Reply> {
    let mut list = [key.to_be_bytes(), new.to_be_bytes(), [0; 8]].concat();
    if let Some(flags) = list.get_mut(20) {
        *flags = 1;
    }
    let cdb = [
        0x5f,
        action,
        WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
        0,
        0,
        0,
        0,
        0,
        24,
        0,
    ];
    raw.run_write(&Cdb::writes(0, &cdb, 24), &list)
}

/// The registered keys, and the type of the reservation.
fn standing(raw: &mut Raw) -> Result<(Vec<u64>, Option<u8>)> {
    let read = |raw: &mut Raw, action| -> Result<Vec<u8>> {
        let reply = raw.run(&Cdb::reads(0, &[0x5e, action, 0, 0, 0, 0, 0, 4, 0, 0], 1024))?;
        ensure!(reply.status == GOOD, "PERSISTENT RESERVE IN: {reply:?}");
        Ok(reply.data)
    };
    let keys = read(raw, 0)?;
    let keys = keys.get(8..).unwrap_or_default().chunks_exact(8);
    let keys = keys.filter_map(|key| key.first_chunk().map(|key| u64::from_be_bytes(*key)));
    Ok((keys.collect(), read(raw, 1)?.get(21).copied()))
}

fn write(raw: &mut Raw) -> Result<u8> {
    Ok(raw.run_write(&Cdb::write10(0, 0, 1), &[7; 512])?.status)
}

#[test]
fn reservations_belong_to_the_lun() {
    story("reservations of a LUN", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, &config("64MiB", false))?;
        let mut owner = log_in(&daemon, OWNER, DISK)?;
        ensure!(reserve_out(&mut owner, 0, 0, KEY)?.status == GOOD, "REGISTER");
        ensure!(reserve_out(&mut owner, 1, KEY, 0)?.status == GOOD, "RESERVE");
        let held = (vec![KEY], Some(WRITE_EXCLUSIVE_REGISTRANTS_ONLY));
        ensure!(standing(&mut owner)? == held, "reserved");
        daemon.json(&["snapshot", "create", "disk", "--name", "s"])?;

        // A mounted snapshot and a clone are other LUNs: nobody holds anything there.
        let mounted = daemon.json(&["snapshot", "mount", "disk@s"])?;
        let target = mounted
            .get("iqn")
            .and_then(|iqn| iqn.as_str())
            .context("no iqn")?;
        let name = mounted
            .get("name")
            .and_then(|name| name.as_str())
            .context("no name")?;
        let mut there = log_in(&daemon, RIVAL, target)?;
        ensure!(
            standing(&mut there)? == (vec![], None),
            "the mount has reservations"
        );
        there.logout()?;
        daemon.json(&["snapshot", "unmount", name, "--force", "--yes"])?;
        daemon.json(&["clone", "create", "disk@s", "copy"])?;
        daemon.write_config(&config("64MiB", true))?;
        daemon.text(&["config", "apply", "--yes"])?;
        let mut there = log_in(&daemon, RIVAL, COPY)?;
        ensure!(
            standing(&mut there)? == (vec![], None),
            "the clone has reservations"
        );
        ensure!(write(&mut there)? == GOOD, "the clone is free");
        drop(there);

        // Growing tells every session (6/2A/09) and takes nothing away; nobody has to log in again.
        let mut rival = log_in(&daemon, RIVAL, DISK)?;
        daemon.write_config(&config("128MiB", true))?;
        daemon.text(&["config", "apply", "--yes"])?;
        for raw in [&mut owner, &mut rival] {
            let told = raw.run(&Cdb::none(0, &[0; 6]))?;
            ensure!(
                told.sense_code() == (6, 0x2a, 0x09),
                "CAPACITY DATA HAS CHANGED: {told:?}"
            );
            ensure!(raw.run(&Cdb::none(0, &[0; 6]))?.status == GOOD, "told once");
            let capacity = raw
                .run(&Cdb::reads(0, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8))?
                .data;
            ensure!(
                capacity.get(..4) == Some(&[0, 3, 0xff, 0xff][..]),
                "{capacity:02x?}"
            );
        }
        ensure!(write(&mut rival)? == RESERVATION_CONFLICT, "still reserved");
        ensure!(standing(&mut rival)? == held, "after growing");
        rival.logout()?;
        owner.logout()?;

        // Contents go back, reservations do not: the cluster that held them goes on to hold them.
        daemon.json(&["snapshot", "revert", "disk@s", "--yes"])?;
        let mut rival = log_in(&daemon, RIVAL, DISK)?;
        ensure!(standing(&mut rival)? == held, "after the revert");
        ensure!(
            write(&mut rival)? == RESERVATION_CONFLICT,
            "reserved after the revert"
        );
        ensure!(
            write(&mut log_in(&daemon, OWNER, DISK)?)? == GOOD,
            "the owner writes"
        );

        // And over a restart.
        drop(rival);
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.resume()?;
        let mut rival = log_in(&daemon, RIVAL, DISK)?;
        ensure!(standing(&mut rival)? == held, "after a restart");
        ensure!(
            write(&mut rival)? == RESERVATION_CONFLICT,
            "reserved after a restart"
        );
        Ok(())
    });
}
