//! Order of commands, aborts, resets, fences.

use super::*;

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

/// Commands of one session in the order in which they were sent, until a reset of another one was answered. Those that never
/// get an answer were ended by the reset, and a unit attention must come after the last of them: an initiator that takes it
/// before would wait for that command until its own time limit.
fn lost_and_told(raw: &mut Raw, by: &mut Raw) -> Result<(usize, bool)> {
    let mut tags = write_many(raw, 0, 60, 0x11)?;
    let reset = by.start_tmf(LUN_RESET, 0, RESERVED, 0)?;
    for i in 60..100 {
        let itt = raw.new_itt();
        raw.request(
            Cdb::write10(0, i * 8, 8)
                .pdu(itt)
                .byte(33, 0x08)
                .data([0x11; 4096]),
        )?;
        tags.push(itt);
    }
    ensure!(tmf_response(by, reset)? == 0, "the reset is complete");
    let last = raw.start(&Cdb::none(0, &[0; 6]), &[])?;
    tags.push(last);
    let mut answers: BTreeMap<u32, u8> = BTreeMap::new();
    while !answers.contains_key(&last) {
        let pdu = raw.expect("the last answer", |pdu| pdu.opcode() == op::SCSI_RESPONSE)?;
        // Fixed format sense behind its length: the additional sense code.
        let told = if pdu.at(3) == CHECK_CONDITION {
            pdu.data.get(2 + 12).copied().unwrap_or_default()
        } else {
            0
        };
        answers.insert(pdu.tag(), told);
    }
    for pdu in raw.listen(QUIET)? {
        if pdu.opcode() == op::SCSI_RESPONSE {
            answers.insert(pdu.tag(), 0);
        }
    }
    let lost = tags.iter().rposition(|tag| !answers.contains_key(tag));
    let count = tags.iter().filter(|tag| !answers.contains_key(tag)).count();
    let after = tags.iter().skip(lost.map_or(0, |at| at + 1));
    let told = after.filter_map(|tag| answers.get(tag)).any(|asc| *asc == 0x29);
    Ok((count, told))
}

#[test]
fn p13_a_reset_by_another_session_is_told_after_the_last_command_that_it_ended() {
    attack("resets are told", |daemon| {
        let (mut raw, mut by) = (log_in(daemon, ME)?, log_in(daemon, OTHER)?);
        let mut ended = 0;
        for round in 0..40 {
            let (lost, told) = lost_and_told(&mut raw, &mut by)?;
            ensure!(
                lost == 0 || told,
                "round {round}: {lost} commands ended without a word"
            );
            ended += lost;
            raw.ready(0)?;
            by.ready(0)?;
        }
        println!("story robust: 40 resets ended {ended} commands of another session, and it heard of each");
        Ok(())
    });
}

#[test]
fn a_task_set_belongs_to_one_session() {
    attack("task sets", |daemon| {
        const CLEAR_TASK_SET: u8 = 4;
        let (mut raw, mut other) = (log_in(daemon, ME)?, log_in(daemon, OTHER)?);
        let page = raw.run(&Cdb::reads(0, &[0x1a, 8, 0x0a, 0, 255, 0], 255))?;
        ensure!(
            page.data.get(6).map(|byte| byte >> 5) == Some(1),
            "TST is not 001b: {page:?}"
        );
        let itt = raw.start(&Cdb::write10(0, 0, 128), &[])?;
        let ask = r2t(&mut raw, itt)?;
        ensure!(other.tmf(CLEAR_TASK_SET, 0)? == 0);
        raw.satisfy(&ask, &[0x33; 65_536])?;
        ensure!(
            raw.finish(itt)?.status == GOOD,
            "another session's task was cleared"
        );
        // Its own are, once the data that was asked for is here.
        let itt = raw.start(&Cdb::write10(0, 0, 128), &[])?;
        let ask = r2t(&mut raw, itt)?;
        let clear = raw.start_tmf(CLEAR_TASK_SET, 0, RESERVED, 0)?;
        no_answer(&mut raw, clear)?;
        raw.satisfy(&ask, &[0x44; 65_536])?;
        ensure!(tmf_response(&mut raw, clear)? == 0);
        ensure!(raw.read(0, 0, 128)?.iter().all(|byte| *byte == 0x33));
        ensure!(raw.tmf(CLEAR_TASK_SET, 9)? == 2, "no such LUN");
        other.ready(0)
    });
}
