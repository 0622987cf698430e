//! Numbers, lengths and headers that contradict each other or the standard.

use super::*;

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
