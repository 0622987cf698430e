//! How sessions begin anew and end.

use super::*;

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
