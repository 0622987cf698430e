//! The full feature phase beyond data (RFC 7143 §4.2.2, §11.5, §11.9 to §11.19): window, order, task management, NOP, text,
//! logout, asynchronous messages, time.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::*;
use stillpoint_iscsi::pdu::{
    AsyncEvent, AsyncMessage, DataIn, LogoutRequest, LogoutResponse, NopIn, Opcode, R2t, Reject, ScsiCommand,
    ScsiResponse, SnackRequest, TextRequest, TextResponse, TmfReply,
};
use stillpoint_iscsi::{
    Cid, CmdSn, Command, EndedTasks, Error, Event, Itt, LogoutReason, Lun, Outcome, Phase, RejectReason,
    StatSn, TargetRecord, TaskAttribute, TaskId, TmfFunction, TmfId, TmfResponse, Ttt,
};

fn pair() -> Pair {
    Pair::logged_in(config(), &[])
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn rejected(pdu: &Pdu) -> RejectReason {
    assert_eq!(pdu.opcode(), Opcode::REJECT, "{pdu:?}");
    Reject::parse(&pdu.bhs).reason
}

fn tmf_reply(pdu: &Pdu) -> (u32, TmfResponse) {
    assert_eq!(pdu.opcode(), Opcode::TMF_RESPONSE, "{pdu:?}");
    let reply = TmfReply::parse(&pdu.bhs);
    (reply.itt.0, reply.response)
}

fn tmf_event(pair: &mut Pair) -> (TmfId, TmfFunction, Vec<TaskId>) {
    match pair.event() {
        Event::TaskManagement {
            tmf,
            function,
            affected,
            ..
        } => (tmf, function, affected),
        other => panic!("{other:?}"),
    }
}

fn start(pair: &mut Pair, itt: u32) -> Command {
    pair.scsi(plain(itt), &[]);
    pair.command()
}

// Command window

#[test]
fn numbers_outside_the_window_and_duplicates_are_met_with_silence() {
    let mut pair = pair();
    let send = |pair: &mut Pair, cmd_sn: u32| {
        let command = ScsiCommand {
            cmd_sn: CmdSn(cmd_sn),
            ..plain(cmd_sn)
        };
        pair.send(&command.encode(), &[]).unwrap();
    };
    for cmd_sn in [0, 129, 1 << 31, u32::MAX] {
        send(&mut pair, cmd_sn);
    }
    pair.silent();
    pair.no_event();
    send(&mut pair, 1);
    send(&mut pair, 1);
    let command = pair.command();
    pair.no_event();
    pair.good(&command);
    assert_eq!(pair.only().numbers().exp_cmd_sn, CmdSn(2));
    assert_eq!(pair.conn.info().counters.outside_window, 5);
}

#[test]
fn commands_ahead_wait_until_the_hole_is_filled() {
    let mut pair = pair();
    let send = |pair: &mut Pair, cmd_sn: u32| {
        pair.send(
            &ScsiCommand {
                cmd_sn: CmdSn(cmd_sn),
                ..plain(cmd_sn)
            }
            .encode(),
            &[],
        )
        .unwrap();
    };
    send(&mut pair, 3);
    pair.send(&nop_out(77, Ttt::RESERVED, false, CmdSn(4)).encode(), &[])
        .unwrap();
    send(&mut pair, 2);
    pair.no_event();
    pair.silent();
    send(&mut pair, 1);
    let order: Vec<u32> = (0..3).map(|_| pair.command().itt.0).collect();
    assert_eq!(order, [1, 2, 3]);
    let pdu = pair.only();
    assert_eq!(
        (pdu.opcode(), pdu.numbers().exp_cmd_sn),
        (Opcode::NOP_IN, CmdSn(5))
    );
}

#[test]
fn the_window_moves_only_when_answers_leave() {
    let mut ours = config();
    ours.limits.queue_depth = 2;
    let mut pair = Pair::logged_in(ours, &[]);
    let first = start(&mut pair, 1);
    let second = start(&mut pair, 2);
    // Closed: the third is ignored.
    pair.send(
        &ScsiCommand {
            cmd_sn: CmdSn(3),
            ..plain(3)
        }
        .encode(),
        &[],
    )
    .unwrap();
    pair.no_event();
    pair.good(&first);
    pair.good(&second);
    // Answered but not sent: a peer that does not read gets no more room.
    pair.send(
        &ScsiCommand {
            cmd_sn: CmdSn(3),
            ..plain(3)
        }
        .encode(),
        &[],
    )
    .unwrap();
    pair.no_event();
    let numbers: Vec<_> = pair
        .receive()
        .iter()
        .map(|pdu| pdu.numbers().max_cmd_sn)
        .collect();
    assert_eq!(numbers, [CmdSn(3), CmdSn(4)]);
    pair.cmd_sn = CmdSn(3);
    start(&mut pair, 3);
}

#[test]
fn immediate_commands_have_a_limit_of_their_own() {
    let mut pair = pair();
    let limit = config().limits.immediate_commands as u32;
    let mut running = Vec::new();
    for itt in 0..limit {
        pair.scsi(
            ScsiCommand {
                immediate: true,
                ..plain(itt)
            },
            &[],
        );
        running.push(pair.command());
    }
    assert!(running[0].immediate);
    pair.scsi(
        ScsiCommand {
            immediate: true,
            ..plain(limit)
        },
        &[],
    );
    assert_eq!(rejected(&pair.only()), RejectReason::TOO_MANY_IMMEDIATE);
    pair.no_event();
    pair.good(&running[0]);
    pair.only();
    pair.scsi(
        ScsiCommand {
            immediate: true,
            ..plain(limit)
        },
        &[],
    );
    pair.command();
    // None of this touched the window.
    pair.scsi(plain(500), &[]);
    let command = pair.command();
    pair.good(&command);
    assert_eq!(pair.only().numbers().exp_cmd_sn, CmdSn(2));
}

#[test]
fn receiving_pauses_while_nobody_reads_our_answers() {
    let mut pair = Pair::logged_in(config(), &["MaxRecvDataSegmentLength=65536"]);
    let nop = nop_out(1, Ttt::RESERVED, true, CmdSn(1)).encode();
    let mut sent = 0;
    while !pair.conn.receiving_paused() {
        pair.send(&nop, &[0; 65536]).unwrap();
        sent += 1;
        assert!(sent <= 64, "4 MiB of echoes");
    }
    assert_eq!(sent, 64);
    pair.receive();
    assert!(!pair.conn.receiving_paused());
}

// Task attributes

#[test]
fn ordered_tasks_wait_for_older_and_hold_back_newer_ones_of_their_lun() {
    let mut pair = pair();
    let with = |itt, attribute, number| ScsiCommand {
        attribute,
        lun: lun(number),
        ..plain(itt)
    };
    pair.scsi(with(1, TaskAttribute::SIMPLE, 0), &[]);
    pair.scsi(with(2, TaskAttribute::ORDERED, 0), &[]);
    pair.scsi(with(3, TaskAttribute::SIMPLE, 0), &[]);
    pair.scsi(with(4, TaskAttribute::SIMPLE, 1), &[]);
    pair.scsi(with(5, TaskAttribute::HEAD_OF_QUEUE, 0), &[]);
    let mut started = Vec::new();
    while let Some(Event::Command(command)) = pair.poll_event() {
        started.push(command);
    }
    assert_eq!(
        started.iter().map(|command| command.itt.0).collect::<Vec<_>>(),
        [5, 1, 4]
    );
    for command in &started {
        pair.no_event();
        pair.good(command);
        if command.itt.0 == 1 {
            break;
        }
    }
    let ordered = pair.command();
    assert_eq!(ordered.itt.0, 2);
    pair.no_event();
    pair.good(&ordered);
    assert_eq!(pair.command().itt.0, 3);
}

#[test]
fn an_ordered_command_that_arrives_early_waits_for_its_elders() {
    let mut pair = pair();
    pair.cmd_sn = CmdSn(2);
    let ordered = ScsiCommand {
        attribute: TaskAttribute::ORDERED,
        ..plain(1)
    };
    pair.scsi(ordered, &[]);
    pair.no_event();
    pair.cmd_sn = CmdSn(1);
    pair.scsi(plain(2), &[]);
    let elder = pair.command();
    assert_eq!(elder.itt.0, 2);
    pair.no_event();
    pair.good(&elder);
    assert_eq!(pair.command().itt.0, 1);
}

#[test]
fn a_write_that_waits_for_data_holds_back_nobody() {
    let mut pair = pair();
    pair.scsi(write(1, 512), &[]);
    pair.scsi(plain(2), &[]);
    assert_eq!(pair.command().itt.0, 2);
}

// Task management

#[test]
fn abort_of_a_running_task_waits_for_the_owner() {
    let mut pair = pair();
    let command = start(&mut pair, 1);
    pair.tmf(TmfFunction::ABORT_TASK, 100, 1, CmdSn(1));
    let (tmf, function, affected) = tmf_event(&mut pair);
    assert_eq!(
        (function, &affected[..]),
        (TmfFunction::ABORT_TASK, &[command.task][..])
    );
    pair.conn.tmf_complete(pair.now, tmf, TmfResponse::COMPLETE);
    pair.silent();
    assert_eq!(pair.conn.outstanding(), 1);
    // The tag is free for the initiator only with the response; its status never comes.
    pair.good(&command);
    let pdu = pair.only();
    assert_eq!(tmf_reply(&pdu), (100, TmfResponse::COMPLETE));
    assert_eq!(
        pdu.numbers().max_cmd_sn,
        CmdSn(129),
        "the place in the window is free again"
    );
    assert_eq!(pair.conn.outstanding(), 0);
    pair.good(&command);
    pair.silent();
}

#[test]
fn abort_of_a_task_that_waits_for_data_needs_nobody() {
    let mut pair = pair();
    pair.scsi(write(1, 65536), &[]);
    let ask = R2t::parse(&pair.only().bhs);
    pair.tmf(TmfFunction::ABORT_TASK, 100, 1, CmdSn(1));
    assert_eq!(tmf_reply(&pair.only()), (100, TmfResponse::COMPLETE));
    pair.no_event();
    // Late data is expected, and goes nowhere; not even into a new task with the old tag.
    pair.data_out(1, ask.ttt, 0, 0, false, &[1; 512]);
    pair.silent();
    pair.scsi(write(1, 512), &[]);
    let again = R2t::parse(&pair.only().bhs);
    pair.data_out(1, ask.ttt, 1, 512, true, &[1; 512]);
    pair.silent();
    pair.data_out(1, again.ttt, 0, 0, true, &[2; 512]);
    assert_eq!(pair.command().data, [2; 512][..]);
    pair.no_event();
}

#[test]
fn abort_of_a_task_in_the_middle_of_its_data() {
    let mut pair = pair();
    pair.scsi(write(1, 65536), &[]);
    let ask = R2t::parse(&pair.only().bhs);
    let bytes = wire(
        &data_out(1, ask.ttt, 0, 0, true).encode(),
        &[],
        &[1; 65536],
        false,
        false,
    );
    pair.send_bytes(&bytes[..30_000]).unwrap();
    assert!(pair.conn.abort_lun_tasks(None).running.is_empty());
    pair.send_bytes(&bytes[30_000..]).unwrap();
    pair.no_event();
    assert_eq!(pair.conn.outstanding(), 0);
    // What comes is the news that the window has moved, and no complaint about the data.
    let pdu = pair.only();
    assert_eq!(
        (pdu.opcode(), NopIn::parse(&pdu.bhs).ttt),
        (Opcode::NOP_IN, Ttt::RESERVED)
    );
    assert_eq!(pdu.numbers().max_cmd_sn, CmdSn(129));
}

#[test]
fn abort_of_nothing_follows_the_three_cases() {
    let mut pair = pair();
    let command = start(&mut pair, 1);
    pair.good(&command);
    pair.only();
    // c) Ended long ago.
    pair.tmf(TmfFunction::ABORT_TASK, 100, 1, CmdSn(1));
    assert_eq!(tmf_reply(&pair.only()), (100, TmfResponse::TASK_DOES_NOT_EXIST));
    // b) Never came: its CmdSN counts as received from now on.
    pair.cmd_sn = CmdSn(4);
    pair.tmf(TmfFunction::ABORT_TASK, 101, 2, CmdSn(2));
    let pdu = pair.only();
    assert_eq!(tmf_reply(&pdu), (101, TmfResponse::COMPLETE));
    assert_eq!(
        (pdu.numbers().exp_cmd_sn, pdu.numbers().max_cmd_sn),
        (CmdSn(3), CmdSn(130))
    );
    pair.send(
        &ScsiCommand {
            cmd_sn: CmdSn(2),
            ..plain(2)
        }
        .encode(),
        &[],
    )
    .unwrap();
    pair.no_event();
    // Plugging the hole sets free what waited behind it.
    pair.send(&nop_out(9, Ttt::RESERVED, false, CmdSn(4)).encode(), &[])
        .unwrap();
    pair.silent();
    pair.cmd_sn = CmdSn(5);
    pair.tmf(TmfFunction::ABORT_TASK, 102, 3, CmdSn(3));
    let opcodes: Vec<_> = pair.receive().iter().map(Pdu::opcode).collect();
    assert_eq!(opcodes, [Opcode::NOP_IN, Opcode::TMF_RESPONSE]);
}

#[test]
fn abort_of_a_task_management_function_is_rejected() {
    let mut pair = pair();
    pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, 100, u32::MAX, CmdSn(0));
    tmf_event(&mut pair);
    pair.tmf(TmfFunction::ABORT_TASK, 101, 100, CmdSn(1));
    assert_eq!(tmf_reply(&pair.only()), (101, TmfResponse::REJECTED));
}

#[test]
fn answers_that_wait_leave_before_the_response() {
    let mut pair = pair();
    let command = start(&mut pair, 1);
    pair.good(&command);
    pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, 100, u32::MAX, CmdSn(0));
    let (tmf, ..) = tmf_event(&mut pair);
    pair.conn.tmf_complete(pair.now, tmf, TmfResponse::COMPLETE);
    let opcodes: Vec<_> = pair.receive().iter().map(Pdu::opcode).collect();
    assert_eq!(opcodes, [Opcode::SCSI_RESPONSE, Opcode::TMF_RESPONSE]);
}

#[test]
fn scopes_of_functions() {
    // Tasks: 1 and 2 run on LUN 0, 3 runs on LUN 1, 4 waits for data on LUN 0, 5 waits for data on LUN 1.
    for (function, running, waiting) in [
        (TmfFunction::ABORT_TASK_SET, &[1, 2][..], &[5][..]),
        (TmfFunction::CLEAR_TASK_SET, &[1, 2], &[5]),
        (TmfFunction::LOGICAL_UNIT_RESET, &[1, 2], &[5]),
        (TmfFunction::TARGET_WARM_RESET, &[1, 2, 3], &[]),
        (TmfFunction::TARGET_COLD_RESET, &[1, 2, 3], &[]),
    ] {
        let mut pair = pair();
        let mut commands = Vec::new();
        for (itt, number) in [(1, 0), (2, 0), (3, 1)] {
            pair.scsi(
                ScsiCommand {
                    lun: lun(number),
                    ..plain(itt)
                },
                &[],
            );
            commands.push(pair.command());
        }
        let mut asks = Vec::new();
        for (itt, number) in [(4, 0), (5, 1)] {
            pair.scsi(
                ScsiCommand {
                    lun: lun(number),
                    ..write(itt, 512)
                },
                &[],
            );
            asks.push(R2t::parse(&pair.only().bhs));
        }
        pair.tmf(function, 100, u32::MAX, CmdSn(0));
        let (tmf, got, affected) = tmf_event(&mut pair);
        assert_eq!(got, function);
        let expected: Vec<_> = commands
            .iter()
            .filter(|command| running.contains(&command.itt.0))
            .map(|command| command.task)
            .collect();
        assert_eq!(affected, expected, "{function:?}");
        for ask in &asks {
            pair.data_out(ask.itt.0, ask.ttt, 0, 0, true, &[1; 512]);
        }
        let mut left = Vec::new();
        while let Some(Event::Command(command)) = pair.poll_event() {
            left.push(command.itt.0);
        }
        assert_eq!(left, waiting, "{function:?}");
        pair.conn.tmf_complete(pair.now, tmf, TmfResponse::COMPLETE);
        for command in commands.iter().filter(|command| running.contains(&command.itt.0)) {
            pair.silent();
            pair.good(command);
        }
        assert_eq!(tmf_reply(&pair.only()), (100, TmfResponse::COMPLETE));
        assert_eq!(pair.conn.is_closed(), function == TmfFunction::TARGET_COLD_RESET);
    }
}

#[test]
fn a_reset_waits_for_tasks_that_were_aborted_before_it() {
    let mut pair = pair();
    let command = start(&mut pair, 1);
    pair.tmf(TmfFunction::ABORT_TASK, 100, 1, CmdSn(1));
    let (abort, ..) = tmf_event(&mut pair);
    pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, 101, u32::MAX, CmdSn(0));
    let (reset, _, affected) = tmf_event(&mut pair);
    assert_eq!(affected, [command.task]);
    pair.conn.tmf_complete(pair.now, reset, TmfResponse::COMPLETE);
    pair.conn.tmf_complete(pair.now, abort, TmfResponse::COMPLETE);
    pair.silent();
    pair.good(&command);
    let replies: Vec<_> = pair.receive().iter().map(tmf_reply).collect();
    assert_eq!(
        replies,
        [(100, TmfResponse::COMPLETE), (101, TmfResponse::COMPLETE)]
    );
}

#[test]
fn functions_that_need_more_than_we_have() {
    for (function, response) in [
        (TmfFunction::CLEAR_ACA, TmfResponse::NOT_SUPPORTED),
        (TmfFunction::TASK_REASSIGN, TmfResponse::REASSIGN_NOT_SUPPORTED),
        (TmfFunction(0), TmfResponse::NOT_SUPPORTED),
        (TmfFunction(9), TmfResponse::NOT_SUPPORTED),
        (TmfFunction(127), TmfResponse::NOT_SUPPORTED),
    ] {
        let mut pair = pair();
        pair.tmf(function, 100, 1, CmdSn(0));
        assert_eq!(tmf_reply(&pair.only()), (100, response));
        pair.no_event();
    }
}

#[test]
fn the_owners_refusal_is_the_response() {
    let mut pair = pair();
    pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, 100, u32::MAX, CmdSn(0));
    let (tmf, ..) = tmf_event(&mut pair);
    pair.conn
        .tmf_complete(pair.now, tmf, TmfResponse::LUN_DOES_NOT_EXIST);
    assert_eq!(tmf_reply(&pair.only()), (100, TmfResponse::LUN_DOES_NOT_EXIST));
}

#[test]
fn open_functions_are_limited() {
    let mut pair = pair();
    for itt in 0..16 {
        pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, itt, u32::MAX, CmdSn(0));
    }
    pair.silent();
    pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, 99, u32::MAX, CmdSn(0));
    assert_eq!(rejected(&pair.only()), RejectReason::TOO_MANY_IMMEDIATE);
}

/// A LUN with a write that waits for two bursts, and another LUN with one.
fn two_luns_wait_for_data() -> (Pair, [R2t; 3]) {
    let mut pair = Pair::logged_in(config(), &["MaxBurstLength=262144", "MaxOutstandingR2T=4"]);
    let mut asks = Vec::new();
    for (itt, number, bursts) in [(1, 0, 2), (2, 1, 1)] {
        let edtl = bursts << 18;
        let lun = lun(number);
        pair.scsi(
            ScsiCommand {
                lun,
                ..write(itt, edtl)
            },
            &[],
        );
        asks.extend(pair.receive().iter().map(|pdu| R2t::parse(&pdu.bhs)));
    }
    (pair, asks.try_into().unwrap())
}

#[test]
fn a_function_on_many_tasks_waits_for_data_that_was_asked_for() {
    for function in [
        TmfFunction::ABORT_TASK_SET,
        TmfFunction::CLEAR_TASK_SET,
        TmfFunction::LOGICAL_UNIT_RESET,
    ] {
        let (mut pair, [first, second, other]) = two_luns_wait_for_data();
        pair.tmf(function, 100, u32::MAX, CmdSn(0));
        let (tmf, _, affected) = tmf_event(&mut pair);
        assert!(affected.is_empty(), "the owner runs nothing");
        pair.conn.tmf_complete(pair.now, tmf, TmfResponse::COMPLETE);
        let send = |pair: &mut Pair, ask: &R2t, sn, offset, is_final| {
            pair.data_out(
                ask.itt.0,
                ask.ttt,
                sn,
                ask.buffer_offset + offset,
                is_final,
                &[1; 4096],
            );
        };
        send(&mut pair, &first, 0, 0, true);
        send(&mut pair, &second, 0, 0, false);
        pair.silent();
        send(&mut pair, &second, 1, 4096, true);
        assert_eq!(
            tmf_reply(&pair.only()),
            (100, TmfResponse::COMPLETE),
            "{function:?}"
        );
        // The other LUN's write goes on; the tags of before mean nothing any more.
        pair.data_out(other.itt.0, other.ttt, 0, 0, false, &[1; 4096]);
        pair.silent();
        send(&mut pair, &second, 2, 8192, true);
        assert_eq!(rejected(&pair.only()), RejectReason::INVALID_FIELD);
        pair.no_event();
    }
}

#[test]
fn an_initiator_that_aborts_fast_is_not_waited_for_long() {
    let (mut pair, asks) = two_luns_wait_for_data();
    pair.tmf(TmfFunction::TARGET_WARM_RESET, 100, u32::MAX, CmdSn(0));
    let (tmf, ..) = tmf_event(&mut pair);
    pair.conn.tmf_complete(pair.now, tmf, TmfResponse::COMPLETE);
    pair.silent();
    let limit = config().times.aborted_data;
    pair.sleep(limit - secs(1)).unwrap();
    pair.silent();
    pair.sleep(secs(1)).unwrap();
    assert_eq!(tmf_reply(&pair.only()), (100, TmfResponse::COMPLETE));
    // What comes late all the same goes nowhere, and nobody complains about it.
    for ask in &asks {
        pair.data_out(ask.itt.0, ask.ttt, 0, ask.buffer_offset, true, &[1; 4096]);
    }
    pair.silent();
    pair.no_event();
    // ABORT TASK waits for nothing (§11.5.1).
    pair.scsi(write(3, 4096), &[]);
    pair.only();
    pair.tmf(TmfFunction::ABORT_TASK, 101, 3, CmdSn(3));
    assert_eq!(tmf_reply(&pair.only()), (101, TmfResponse::COMPLETE));
}

#[test]
fn another_nexus_clears_our_tasks() {
    let mut pair = pair();
    let command = start(&mut pair, 1);
    let other = {
        pair.scsi(
            ScsiCommand {
                lun: lun(1),
                ..plain(2)
            },
            &[],
        );
        pair.command()
    };
    pair.scsi(write(3, 512), &[]);
    pair.only();
    let ended = EndedTasks {
        count: 2,
        running: vec![command.task],
    };
    assert_eq!(pair.conn.abort_lun_tasks(Some(lun(0))), ended);
    let again = EndedTasks { count: 0, ..ended };
    assert_eq!(pair.conn.abort_lun_tasks(Some(lun(0))), again, "it still runs");
    pair.receive();
    pair.good(&command);
    pair.silent();
    pair.good(&other);
    assert_eq!(pair.only().opcode(), Opcode::SCSI_RESPONSE);
}

#[test]
fn a_lun_is_the_same_in_both_addressing_methods() {
    let mut pair = pair();
    let flat = ScsiCommand {
        lun: Lun([0x40, 0, 0, 0, 0, 0, 0, 0]),
        ..plain(1)
    };
    pair.scsi(flat, &[]);
    let command = pair.command();
    assert_eq!(pair.conn.abort_lun_tasks(Some(lun(0))).running, [command.task]);
    assert!(!lun(1).names_same(command.lun) && !Lun([0xc1, 1, 0, 0, 0, 0, 0, 0]).names_same(lun(0)));
}

// NOP

#[test]
fn pings_are_echoed_within_the_initiators_limits() {
    let mut pair = Pair::logged_in(config(), &["MaxRecvDataSegmentLength=512"]);
    let data = pattern(1, 1000);
    pair.send(&nop_out(5, Ttt::RESERVED, true, CmdSn(1)).encode(), &data)
        .unwrap();
    let pdu = pair.only();
    let echo = NopIn::parse(&pdu.bhs);
    assert_eq!(
        (echo.itt, echo.ttt, &pdu.data[..]),
        (Itt(5), Ttt::RESERVED, &data[..512])
    );
    // Not immediate: takes a CmdSN.
    let sn = pair.next_cmd_sn();
    pair.send(&nop_out(6, Ttt::RESERVED, false, sn).encode(), b"abc")
        .unwrap();
    let pdu = pair.only();
    assert_eq!(
        (&pdu.data[..], pdu.numbers().exp_cmd_sn, pdu.numbers().max_cmd_sn),
        (&b"abc"[..], CmdSn(2), CmdSn(129))
    );
    // Only an acknowledgement: no answer.
    pair.send(&nop_out(u32::MAX, Ttt::RESERVED, true, CmdSn(2)).encode(), &[])
        .unwrap();
    pair.silent();
    let sn = pair.next_cmd_sn();
    pair.send(&nop_out(u32::MAX, Ttt::RESERVED, false, sn).encode(), &[])
        .unwrap();
    assert_eq!(rejected(&pair.only()), RejectReason::PROTOCOL_ERROR);
}

#[test]
fn the_owners_ping_is_answered() {
    let mut pair = pair();
    pair.conn.ping(pair.now);
    pair.conn.ping(pair.now);
    let pdu = pair.only();
    let ping = NopIn::parse(&pdu.bhs);
    assert_eq!((ping.itt, pdu.data.len()), (Itt::RESERVED, 0));
    assert_ne!(ping.ttt, Ttt::RESERVED);
    pair.send(
        &nop_out(u32::MAX, Ttt(ping.ttt.0 + 1), true, CmdSn(1)).encode(),
        &[],
    )
    .unwrap();
    pair.no_event();
    pair.send(&nop_out(u32::MAX, ping.ttt, true, CmdSn(1)).encode(), &[])
        .unwrap();
    assert!(matches!(pair.event(), Event::Pong));
    pair.silent();
}

#[test]
fn idle_sessions_are_pinged_and_silent_ones_end() {
    let mut pair = pair();
    let times = config().times;
    pair.send(&nop_out(1, Ttt::RESERVED, true, CmdSn(1)).encode(), &[])
        .unwrap();
    pair.only();
    assert_eq!(pair.conn.poll_timeout(), Some(pair.now + times.ping_idle));
    pair.sleep(times.ping_idle).unwrap();
    let ping = NopIn::parse(&pair.only().bhs);
    pair.send(&nop_out(u32::MAX, ping.ttt, true, CmdSn(1)).encode(), &[])
        .unwrap();
    pair.no_event();
    // The next ping gets no answer.
    pair.sleep(times.ping_idle).unwrap();
    pair.only();
    assert_eq!(pair.conn.poll_timeout(), Some(pair.now + times.ping_answer));
    assert_eq!(pair.sleep(times.ping_answer), Err(Error::PingTimeout));
    assert!(pair.conn.is_closed());
}

#[test]
fn an_initiator_that_never_spoke_nop_may_be_silent_for_long() {
    // iPXE answers no ping: do not kill it for that.
    let mut pair = pair();
    let times = config().times;
    pair.sleep(times.ping_idle).unwrap();
    assert_eq!(pair.only().opcode(), Opcode::NOP_IN);
    assert_eq!(
        pair.conn.poll_timeout(),
        Some(pair.now - times.ping_idle + times.silent)
    );
    pair.sleep(times.ping_answer * 10).unwrap();
    let command = start(&mut pair, 1);
    pair.good(&command);
    pair.only();
    assert_eq!(pair.sleep(times.silent), Err(Error::Silent));
}

#[test]
fn a_peer_that_does_not_read_is_dropped() {
    let mut pair = pair();
    let command = start(&mut pair, 1);
    pair.good(&command);
    let stall = config().times.stall;
    pair.sleep(stall / 2).unwrap();
    pair.receive();
    // Read in time: the clock starts anew.
    let command = start(&mut pair, 2);
    pair.good(&command);
    pair.sleep(stall / 2).unwrap();
    assert_eq!(pair.sleep(stall / 2), Err(Error::PeerNotReading));
    assert!(pair.conn.is_closed(), "nothing is left to be sent");
}

#[test]
fn solicited_data_must_come() {
    let mut pair = pair();
    let wait = config().times.data_out;
    pair.scsi(write(1, 1024), &[]);
    let ask = R2t::parse(&pair.only().bhs);
    pair.sleep(wait / 2).unwrap();
    pair.receive();
    pair.data_out(1, ask.ttt, 0, 0, false, &[1; 512]);
    pair.sleep(wait / 2).unwrap();
    pair.receive();
    assert_eq!(pair.sleep(wait / 2), Err(Error::DataOutTimeout));
}

// Text

#[test]
fn send_targets_in_a_discovery_session() {
    let records = vec![
        TargetRecord {
            name: TARGET.to_owned(),
            portals: vec![
                ("192.0.2.1:3260".to_owned(), 1),
                ("[2001:db8::1]:3260".to_owned(), 2),
            ],
        },
        TargetRecord {
            name: "iqn.2026-01.test:other".to_owned(),
            portals: vec![("192.0.2.1:3260".to_owned(), 1)],
        },
    ];
    let mut pair = Pair::new(
        config(),
        Targets {
            records,
            ..Targets::default()
        },
    );
    let answer = pair.login_with(&[&format!("InitiatorName={INITIATOR}"), "SessionType=Discovery"]);
    assert_eq!(
        answer,
        ["MaxRecvDataSegmentLength=262144"],
        "no target, no portal group"
    );
    let mut ask = |value: &str| {
        let sn = pair.next_cmd_sn();
        pair.send(
            &text_request(3, Ttt::RESERVED, sn).encode(),
            &text(&[&format!("SendTargets={value}")]),
        )
        .unwrap();
        let pdu = pair.only();
        let response = TextResponse::parse(&pdu.bhs);
        assert_eq!(
            (response.is_final, response.ttt, response.itt),
            (true, Ttt::RESERVED, Itt(3))
        );
        pdu.text()
    };
    assert_eq!(
        ask("All"),
        [
            "TargetName=iqn.2026-01.test:disk",
            "TargetAddress=192.0.2.1:3260,1",
            "TargetAddress=[2001:db8::1]:3260,2",
            "TargetName=iqn.2026-01.test:other",
            "TargetAddress=192.0.2.1:3260,1",
        ]
    );
    assert_eq!(
        ask("iqn.2026-01.test:other"),
        [
            "TargetName=iqn.2026-01.test:other",
            "TargetAddress=192.0.2.1:3260,1"
        ]
    );
    assert_eq!(ask("iqn.2026-01.test:none"), [""; 0]);
    assert_eq!(ask(""), ["SendTargets=Reject"]);
}

#[test]
fn discovery_sessions_take_text_and_logout_only() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.login_with(&[&format!("InitiatorName={INITIATOR}"), "SessionType=Discovery"]);
    pair.scsi(plain(1), &[]);
    assert_eq!(rejected(&pair.only()), RejectReason::PROTOCOL_ERROR);
    pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, 2, u32::MAX, CmdSn(0));
    assert_eq!(rejected(&pair.only()), RejectReason::PROTOCOL_ERROR);
    for itt in [3, u32::MAX] {
        pair.send(&nop_out(itt, Ttt::RESERVED, true, CmdSn(2)).encode(), b"ping")
            .unwrap();
        assert_eq!(rejected(&pair.only()), RejectReason::PROTOCOL_ERROR);
    }
    pair.no_event();
    pair.conn.ping(pair.now);
    pair.silent();
    let idle = config().times.discovery;
    assert_eq!(pair.sleep(idle), Err(Error::Silent));
}

#[test]
fn send_targets_in_a_normal_session_knows_its_own_target() {
    let mut pair = pair();
    let mut ask = |value: &str| {
        let sn = pair.next_cmd_sn();
        pair.send(
            &text_request(3, Ttt::RESERVED, sn).encode(),
            &text(&[&format!("SendTargets={value}")]),
        )
        .unwrap();
        pair.only().text()
    };
    let own = ["TargetName=iqn.2026-01.test:disk", "TargetAddress=[::1]:3260,1"];
    assert_eq!(ask(""), own);
    assert_eq!(ask(TARGET), own);
    assert_eq!(ask("All"), ["SendTargets=Reject"]);
    assert_eq!(ask("iqn.2026-01.test:other"), ["SendTargets=Reject"]);
}

#[test]
fn long_text_is_fetched_in_pieces() {
    let records: Vec<_> = (0..300)
        .map(|i| TargetRecord {
            name: format!("iqn.2026-01.test:disk{i}"),
            portals: vec![("192.0.2.1:3260".to_owned(), 1)],
        })
        .collect();
    let mut pair = Pair::new(
        config(),
        Targets {
            records,
            ..Targets::default()
        },
    );
    pair.login_with(&[
        &format!("InitiatorName={INITIATOR}"),
        "SessionType=Discovery",
        "MaxRecvDataSegmentLength=512",
    ]);
    let mut all = Vec::new();
    let mut ttt = Ttt::RESERVED;
    let mut data = text(&["SendTargets=All"]);
    loop {
        let sn = pair.next_cmd_sn();
        pair.send(&text_request(3, ttt, sn).encode(), &data).unwrap();
        data.clear();
        let pdu = pair.only();
        let response = TextResponse::parse(&pdu.bhs);
        assert!(pdu.data.len() <= 512);
        all.extend(pdu.data);
        assert_eq!(response.continues, !response.is_final);
        if response.is_final {
            assert_eq!(response.ttt, Ttt::RESERVED);
            break;
        }
        assert_ne!(response.ttt, Ttt::RESERVED);
        ttt = response.ttt;
    }
    assert_eq!(
        String::from_utf8(all).unwrap().matches("TargetName=").count(),
        300
    );
}

#[test]
fn text_exchanges_are_reset_and_stale_tags_rejected() {
    let records: Vec<_> = (0..100)
        .map(|i| TargetRecord {
            name: format!("iqn.2026-01.test:disk{i}"),
            portals: Vec::new(),
        })
        .collect();
    let mut pair = Pair::new(
        config(),
        Targets {
            records,
            ..Targets::default()
        },
    );
    pair.login_with(&[
        &format!("InitiatorName={INITIATOR}"),
        "SessionType=Discovery",
        "MaxRecvDataSegmentLength=512",
    ]);
    let mut send = |ttt: Ttt, itt: u32, data: &[u8]| {
        let sn = pair.next_cmd_sn();
        pair.send(&text_request(itt, ttt, sn).encode(), data).unwrap();
        pair.only()
    };
    let all = text(&["SendTargets=All"]);
    let first = TextResponse::parse(&send(Ttt::RESERVED, 3, &all).bhs).ttt;
    let second = TextResponse::parse(&send(Ttt::RESERVED, 3, &all).bhs).ttt;
    assert_ne!(first, second);
    assert_eq!(rejected(&send(first, 3, &[])), RejectReason::INVALID_FIELD);
    // The rejection ended the exchange.
    assert_eq!(rejected(&send(second, 3, &[])), RejectReason::INVALID_FIELD);
    let third = TextResponse::parse(&send(Ttt::RESERVED, 3, &all).bhs).ttt;
    assert_eq!(rejected(&send(third, 3, &all)), RejectReason::PROTOCOL_ERROR);
}

#[test]
fn text_negotiation_in_full_feature_phase() {
    let mut pair = pair();
    let sn = pair.next_cmd_sn();
    let first = TextRequest {
        is_final: false,
        ..text_request(3, Ttt::RESERVED, sn)
    };
    let keys = [
        "MaxRecvDataSegmentLength=512",
        "HeaderDigest=CRC32C",
        "X-com.example=1",
        "InitiatorAlias=me",
    ];
    pair.send(&first.encode(), &text(&keys)).unwrap();
    let pdu = pair.only();
    assert_eq!(pdu.text(), ["HeaderDigest=Reject", "X-com.example=NotUnderstood"]);
    let response = TextResponse::parse(&pdu.bhs);
    assert!(!response.is_final);
    assert_eq!(pair.conn.info().initiator_alias.as_deref(), Some("me"));
    // "only become effective after the negotiation sequence is completed" (§6.4).
    assert_eq!(pair.conn.info().params.unwrap().initiator_max_recv, 8192);
    let sn = pair.next_cmd_sn();
    pair.send(&text_request(3, response.ttt, sn).encode(), &[])
        .unwrap();
    pair.only();
    assert_eq!(pair.conn.info().params.unwrap().initiator_max_recv, 512);
    pair.scsi(read(1, 1024), &[]);
    let command = pair.command();
    pair.complete(
        &command,
        Outcome {
            data: Bytes::from_static(&[0; 1024]),
            transfer_len: 1024,
            ..Outcome::default()
        },
    );
    assert_eq!(pair.receive().len(), 2);
    // A key twice, continuation with F, a second request before our answer.
    for (request, data) in [
        (
            TextRequest {
                ..text_request(4, Ttt::RESERVED, CmdSn(0))
            },
            text(&["X-a=1", "X-a=1"]),
        ),
        (
            TextRequest {
                continues: true,
                ..text_request(4, Ttt::RESERVED, CmdSn(0))
            },
            text(&["X-a=1"]),
        ),
    ] {
        let cmd_sn = pair.next_cmd_sn();
        pair.send(&TextRequest { cmd_sn, ..request }.encode(), &data)
            .unwrap();
        assert_eq!(rejected(&pair.only()), RejectReason::PROTOCOL_ERROR);
    }
    for _ in 0..2 {
        let cmd_sn = pair.next_cmd_sn();
        pair.send(&text_request(5, Ttt::RESERVED, cmd_sn).encode(), &[])
            .unwrap();
    }
    let opcodes: Vec<_> = pair.receive().iter().map(Pdu::opcode).collect();
    assert_eq!(opcodes, [Opcode::TEXT_RESPONSE, Opcode::REJECT]);
}

#[test]
fn text_continues_and_has_a_cap() {
    let mut pair = pair();
    let mut ttt = Ttt::RESERVED;
    let whole = text(&["X-com.example.long.name=1"]);
    for (piece, continues) in [(&whole[..7], true), (&whole[7..], false)] {
        let cmd_sn = pair.next_cmd_sn();
        let request = TextRequest {
            continues,
            is_final: !continues,
            ..text_request(3, ttt, cmd_sn)
        };
        pair.send(&request.encode(), piece).unwrap();
        let pdu = pair.only();
        ttt = TextResponse::parse(&pdu.bhs).ttt;
        if !continues {
            assert_eq!(pdu.text(), ["X-com.example.long.name=NotUnderstood"]);
        }
    }
    let cmd_sn = pair.next_cmd_sn();
    pair.send(
        &text_request(3, Ttt::RESERVED, cmd_sn).encode(),
        &vec![b'a'; 70_000],
    )
    .unwrap();
    assert_eq!(rejected(&pair.only()), RejectReason::OUT_OF_RESOURCES);
}

// What is never allowed

#[test]
fn login_snack_and_unknown_opcodes_are_rejected_with_their_header() {
    let mut pair = pair();
    let login = login_request(CmdSn(1), stillpoint_iscsi::pdu::Stage(0), None).encode();
    pair.send(&login, &text(&["InitiatorName=a"])).unwrap();
    let pdu = pair.only();
    assert_eq!(rejected(&pdu), RejectReason::PROTOCOL_ERROR);
    assert_eq!(pdu.data[8..48], login[8..48]);
    let snack = SnackRequest {
        kind: 1,
        lun: lun(0),
        itt: Itt::RESERVED,
        ttt: Ttt::RESERVED,
        exp_stat_sn: StatSn(0),
        beg_run: 0,
        run_length: 0,
    };
    pair.send(&snack.encode(), &[]).unwrap();
    assert_eq!(rejected(&pair.only()), RejectReason::SNACK);
    for opcode in [0x07, 0x1c, 0x20, 0x25, 0x3f] {
        let mut bhs = [0; 48];
        bhs[0] = opcode | 0x40;
        pair.send(&bhs, &[1; 100]).unwrap();
        assert_eq!(rejected(&pair.only()), RejectReason::NOT_SUPPORTED);
    }
    pair.no_event();
}

#[test]
fn reject_holds_the_additional_segments_too() {
    let mut pair = pair();
    let mut command = plain(1);
    command.is_final = false;
    command.cmd_sn = pair.next_cmd_sn();
    let ahs = [0, 5, 2, 0, 0, 0, 4, 0];
    pair.send_bytes(&wire(&command.encode(), &ahs, &[], false, false))
        .unwrap();
    let pdu = pair.only();
    assert_eq!(rejected(&pdu), RejectReason::INVALID_FIELD);
    assert_eq!((pdu.data.len(), &pdu.data[48..]), (56, &ahs[..]));
}

// Logout

fn logout(pair: &mut Pair, reason: LogoutReason, cid: u16) {
    let request = LogoutRequest {
        immediate: true,
        reason,
        itt: Itt(200),
        cid: Cid(cid),
        cmd_sn: pair.cmd_sn,
        exp_stat_sn: StatSn(0),
    };
    pair.send(&request.encode(), &[]).unwrap();
}

#[test]
fn logout_closes() {
    for (reason, cid) in [
        (LogoutReason::CLOSE_SESSION, 99),
        (LogoutReason::CLOSE_CONNECTION, 1),
    ] {
        let mut pair = pair();
        logout(&mut pair, reason, cid);
        assert!(matches!(pair.event(), Event::LoggedOut { reason: got } if got == reason));
        let pdu = pair.only();
        let response = LogoutResponse::parse(&pdu.bhs);
        assert_eq!((response.response, response.itt), (0, Itt(200)));
        assert!(pair.conn.is_closed());
        assert_eq!(pair.conn.info().phase, Phase::LoggedOut);
        // What comes after is ignored.
        pair.send(&nop_out(1, Ttt::RESERVED, true, CmdSn(1)).encode(), &[])
            .unwrap();
        pair.silent();
    }
}

#[test]
fn logout_that_cannot_be_is_refused_politely() {
    for (reason, cid, expected) in [
        (LogoutReason::CLOSE_CONNECTION, 9, 1),
        (LogoutReason::REMOVE_FOR_RECOVERY, 1, 2),
        (LogoutReason::REMOVE_FOR_RECOVERY, 9, 1),
    ] {
        let mut pair = pair();
        logout(&mut pair, reason, cid);
        assert_eq!(LogoutResponse::parse(&pair.only().bhs).response, expected);
        pair.no_event();
        start(&mut pair, 1);
    }
    let mut pair = pair();
    logout(&mut pair, LogoutReason(7), 1);
    assert_eq!(rejected(&pair.only()), RejectReason::INVALID_FIELD);
}

#[test]
fn logout_waits_for_what_the_owner_runs_and_drops_the_rest() {
    let mut pair = pair();
    let done = start(&mut pair, 1);
    let running = start(&mut pair, 2);
    pair.scsi(write(3, 512), &[]);
    pair.receive();
    pair.good(&done);
    logout(&mut pair, LogoutReason::CLOSE_SESSION, 1);
    assert!(matches!(pair.event(), Event::LoggedOut { .. }));
    pair.no_event();
    pair.silent();
    assert_eq!(
        (pair.conn.info().phase, pair.conn.outstanding()),
        (Phase::LoggedOut, 1)
    );
    pair.good(&running);
    assert_eq!(pair.only().opcode(), Opcode::LOGOUT_RESPONSE);
    assert!(pair.conn.is_closed());
}

#[test]
fn logout_does_not_wait_for_ever() {
    let mut pair = pair();
    start(&mut pair, 1);
    logout(&mut pair, LogoutReason::CLOSE_SESSION, 1);
    let cleanup = config().times.cleanup;
    assert_eq!(pair.sleep(cleanup), Err(Error::CleanupTimeout));
    assert!(pair.conn.is_closed());
}

// Asynchronous messages

fn async_message(pdu: &Pdu) -> AsyncMessage {
    assert_eq!(pdu.opcode(), Opcode::ASYNC_MESSAGE);
    AsyncMessage::parse(&pdu.bhs)
}

#[test]
fn a_logout_is_asked_for_and_enforced() {
    let mut pair = pair();
    pair.conn.request_logout(pair.now, secs(5));
    let message = async_message(&pair.only());
    assert_eq!(
        (message.event, message.parameters),
        (AsyncEvent::LOGOUT, [0, 0, 5])
    );
    // Commands are still served.
    let command = start(&mut pair, 1);
    pair.good(&command);
    pair.only();
    assert_eq!(pair.conn.poll_timeout(), Some(pair.now + secs(5)));
    assert_eq!(pair.sleep(secs(5)), Err(Error::LogoutTimeout));
    let message = async_message(&pair.only());
    assert_eq!(
        (message.event, message.parameters),
        (AsyncEvent::DROP_CONNECTION, [1, 2, 0])
    );
    assert!(pair.conn.is_closed());
}

#[test]
fn sessions_are_dropped_with_a_word() {
    let mut pair = pair();
    let command = start(&mut pair, 1);
    pair.good(&command);
    pair.conn.drop_session();
    let message = async_message(&pair.only());
    assert_eq!(
        (message.event, message.parameters),
        (AsyncEvent::DROP_SESSION, [0, 2, 0])
    );
    assert!(pair.conn.is_closed());
}

#[test]
fn other_asynchronous_messages() {
    let mut pair = pair();
    pair.conn.send_async_scsi(lun(3), &[0x70, 0, 6]);
    let pdu = pair.only();
    assert_eq!(
        (async_message(&pdu).event, async_message(&pdu).lun),
        (AsyncEvent::SCSI, lun(3))
    );
    assert_eq!(pdu.data, [0, 3, 0x70, 0, 6]);
    pair.conn.request_negotiation(pair.now);
    assert_eq!(async_message(&pair.only()).event, AsyncEvent::NEGOTIATE);
}

#[test]
fn discovery_sessions_get_no_asynchronous_messages() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.login_with(&[&format!("InitiatorName={INITIATOR}"), "SessionType=Discovery"]);
    pair.conn.send_async_scsi(lun(0), &[1]);
    pair.conn.request_logout(pair.now, secs(5));
    pair.silent();
    assert!(pair.conn.is_closed());
}

#[test]
fn close_drops_answers_and_ends() {
    let mut pair = pair();
    pair.scsi(read(1, 512), &[]);
    let command = pair.command();
    pair.complete(
        &command,
        Outcome {
            data: bytes(&[1; 512]),
            transfer_len: 512,
            ..Outcome::default()
        },
    );
    pair.conn.close();
    assert!(pair.conn.is_closed());
    pair.silent();
    pair.good(&command);
}

#[test]
fn small_answers_overtake_large_reads() {
    let mut pair = pair();
    pair.scsi(read(1, 100_000), &[]);
    let command = pair.command();
    pair.complete(
        &command,
        Outcome {
            data: vec![1; 100_000].into(),
            transfer_len: 100_000,
            ..Outcome::default()
        },
    );
    let first = pair.receive_one().unwrap();
    assert_eq!(DataIn::parse(&first.bhs).buffer_offset, 0);
    pair.scsi(write(2, 512), &[]);
    pair.send(&nop_out(3, Ttt::RESERVED, true, pair.cmd_sn).encode(), &[])
        .unwrap();
    let opcodes: Vec<_> = (0..3).map(|_| pair.receive_one().unwrap().opcode()).collect();
    assert_eq!(opcodes, [Opcode::R2T, Opcode::NOP_IN, Opcode::DATA_IN]);
    let last = pair.receive().pop().unwrap();
    assert!(DataIn::parse(&last.bhs).status.is_some());
}

#[test]
fn status_numbers_wrap() {
    let mut pair = pair();
    // StatSN is checked on every PDU by the harness; the first one is random, and 0xffffffff + 1 = 0.
    for itt in 0..300 {
        let command = start(&mut pair, itt);
        pair.good(&command);
        let answer = ScsiResponse::parse(&pair.only().bhs);
        assert_eq!(answer.numbers.exp_cmd_sn, CmdSn(itt + 2));
    }
}
