//! Data of commands (RFC 7143 §4.2.5.2, §11.3, §11.4, §11.7, §11.8): every way in, every way out, and every way to break it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use bytes::Bytes;
use common::*;
use stillpoint_iscsi::pdu::{DataIn, Opcode, R2t, Reject, Residual, ScsiCommand, ScsiResponse};
use stillpoint_iscsi::{
    Cdb, CmdSn, ConnectionConfig, DataSn, Error, Outcome, R2tSn, RejectReason, TaskAttribute, Ttt,
};

const UNSOLICITED: [&str; 4] = [
    "InitialR2T=No",
    "ImmediateData=Yes",
    "FirstBurstLength=65536",
    "MaxBurstLength=262144",
];

fn unsolicited() -> Pair {
    let mut ours = config();
    ours.keys.initial_r2t = false;
    Pair::logged_in(ours, &UNSOLICITED)
}

fn response(pdu: &Pdu) -> ScsiResponse {
    assert_eq!(pdu.opcode(), Opcode::SCSI_RESPONSE);
    ScsiResponse::parse(&pdu.bhs)
}

fn r2t(pdu: &Pdu) -> R2t {
    assert_eq!(pdu.opcode(), Opcode::R2T, "{pdu:?}");
    assert_eq!(pdu.bhs[1], 0x80);
    R2t::parse(&pdu.bhs)
}

/// Sense key, ASC, ASCQ of a CHECK CONDITION.
fn sense(pdu: &Pdu) -> (u8, u8, u8) {
    assert_eq!(response(pdu).status, CHECK_CONDITION);
    assert_eq!(pdu.data[..2], [0, 18], "SenseLength");
    (pdu.data[4], pdu.data[14], pdu.data[15])
}

fn rejected(pdu: &Pdu) -> RejectReason {
    assert_eq!(pdu.opcode(), Opcode::REJECT);
    assert_eq!(pdu.data.len() % 4, 0);
    Reject::parse(&pdu.bhs).reason
}

#[test]
fn immediate_data_is_the_whole_write() {
    let mut pair = Pair::logged_in(config(), &[]);
    let data = pattern(1, 4096);
    pair.scsi(write(1, 4096), &data);
    let command = pair.command();
    assert_eq!(command.data, data);
    assert!(command.write && !command.read && !command.immediate);
    assert_eq!(
        (command.edtl, command.lun.number(), command.attribute),
        (4096, Some(0), TaskAttribute::SIMPLE)
    );
    pair.good(&command);
    let pdu = pair.only();
    let answer = response(&pdu);
    assert_eq!(
        (answer.status, answer.residual, answer.exp_data_sn),
        (GOOD, Residual::Exact, DataSn(0))
    );
    assert_eq!(
        (answer.numbers.exp_cmd_sn, answer.numbers.max_cmd_sn),
        (CmdSn(2), CmdSn(129))
    );
}

#[test]
fn r2t_starts_after_the_immediate_data() {
    // ESXi: 8 KiB of immediate data, then Data-Out.
    let mut pair = Pair::logged_in(config(), &["MaxBurstLength=262144"]);
    let data = pattern(2, 65536);
    pair.scsi(write(1, 65536), &data[..8192]);
    let pdu = pair.only();
    let ask = r2t(&pdu);
    assert_eq!(
        (ask.buffer_offset, ask.desired_len, ask.r2t_sn),
        (8192, 57344, R2tSn(0))
    );
    assert_eq!(ask.lun.number(), Some(0));
    pair.no_event();
    pair.data_out(1, ask.ttt, 0, 8192, true, &data[8192..]);
    let command = pair.command();
    assert_eq!(command.data, data);
    pair.good(&command);
    let answer = response(&pair.only());
    // R2T carries the next StatSN and does not consume it.
    assert_eq!(answer.numbers.stat_sn, ask.numbers.stat_sn);
}

#[test]
fn one_r2t_asks_for_a_whole_burst_and_next_ones_follow() {
    let mut pair = Pair::logged_in(config(), &["MaxBurstLength=262144", "MaxOutstandingR2T=1"]);
    let data = pattern(3, 600_000);
    pair.scsi(write(1, 600_000), &[]);
    let mut offset = 0;
    for (number, len) in [262_144, 262_144, 75_712].into_iter().enumerate() {
        let ask = r2t(&pair.only());
        assert_eq!(
            (ask.buffer_offset, ask.desired_len, ask.r2t_sn),
            (offset, len, R2tSn(number as u32))
        );
        // Windows: four Data-Out of 64 KiB.
        let mut sn = 0;
        let end = offset + len;
        while offset < end {
            let piece = (end - offset).min(65536);
            let bytes = &data[offset as usize..(offset + piece) as usize];
            pair.data_out(1, ask.ttt, sn, offset, offset + piece == end, bytes);
            sn += 1;
            offset += piece;
        }
    }
    assert_eq!(pair.command().data, data);
}

#[test]
fn outstanding_r2ts_are_as_many_as_agreed() {
    for (offer, expected) in [("1", 1), ("3", 3), ("16", 4)] {
        let mut pair = Pair::logged_in(
            config(),
            &["MaxBurstLength=512", &format!("MaxOutstandingR2T={offer}")],
        );
        pair.scsi(write(1, 5120), &[]);
        let asks: Vec<R2t> = pair.receive().iter().map(r2t).collect();
        assert_eq!(asks.len(), expected);
        // Answered in order, each with one PDU; a new R2T follows each.
        let data = pattern(4, 5120);
        let mut open: std::collections::VecDeque<R2t> = asks.into();
        while let Some(ask) = open.pop_front() {
            let at = ask.buffer_offset as usize;
            pair.data_out(
                1,
                ask.ttt,
                0,
                ask.buffer_offset,
                true,
                &data[at..at + ask.desired_len as usize],
            );
            open.extend(pair.receive().iter().map(r2t));
        }
        assert_eq!(pair.command().data, data);
    }
}

#[test]
fn unsolicited_data_with_and_without_immediate() {
    for immediate in [0, 512, 65535] {
        let mut pair = unsolicited();
        let data = pattern(5, 100_000);
        pair.scsi(
            ScsiCommand {
                is_final: false,
                ..write(1, 100_000)
            },
            &data[..immediate],
        );
        pair.silent();
        let middle = immediate.midpoint(65536);
        let at = u32::try_from(immediate).unwrap();
        if middle > immediate {
            pair.data_out(1, Ttt::RESERVED, 0, at, false, &data[immediate..middle]);
        }
        let sn = u32::from(middle > immediate);
        pair.data_out(
            1,
            Ttt::RESERVED,
            sn,
            u32::try_from(middle).unwrap(),
            true,
            &data[middle..65536],
        );
        let ask = r2t(&pair.only());
        assert_eq!((ask.buffer_offset, ask.desired_len), (65536, 34464));
        pair.data_out(1, ask.ttt, 0, 65536, true, &data[65536..]);
        assert_eq!(pair.command().data, data);
    }
}

#[test]
fn unsolicited_data_may_be_all_of_it() {
    let mut pair = unsolicited();
    let data = pattern(6, 3000);
    pair.scsi(
        ScsiCommand {
            is_final: false,
            ..write(1, 3000)
        },
        &[],
    );
    // Commands may come between (§4.2.5.2).
    pair.scsi(plain(2), &[]);
    pair.data_out(1, Ttt::RESERVED, 0, 0, true, &data);
    let first = pair.command();
    assert_eq!(first.itt.0, 1, "in CmdSN order among those that are ready");
    assert_eq!(first.data, data);
    assert_eq!(pair.command().itt.0, 2);
}

#[test]
fn reads_are_cut_to_the_initiators_segments_with_status_in_the_last() {
    let mut pair = Pair::logged_in(
        config(),
        &["MaxRecvDataSegmentLength=1000", "MaxBurstLength=2500"],
    );
    pair.scsi(read(1, 6000), &[]);
    let command = pair.command();
    let data = Bytes::from(pattern(7, 5500));
    pair.complete(
        &command,
        Outcome {
            data: data.clone(),
            transfer_len: 5500,
            ..Outcome::default()
        },
    );
    let pdus = pair.receive();
    let lens: Vec<_> = pdus.iter().map(|pdu| pdu.data.len()).collect();
    assert_eq!(lens, [1000, 1000, 500, 1000, 1000, 500, 500]);
    let mut offset = 0;
    for (number, pdu) in pdus.iter().enumerate() {
        let header = DataIn::parse(&pdu.bhs);
        assert_eq!(
            (header.data_sn, header.buffer_offset),
            (DataSn(number as u32), offset)
        );
        assert_eq!(header.is_final, [2, 5, 6].contains(&number), "PDU {number}");
        assert_eq!(
            header.status,
            (number == 6).then_some((GOOD, Residual::Underflow(500)))
        );
        offset += u32::try_from(pdu.data.len()).unwrap();
    }
    assert_eq!(
        pdus.iter().flat_map(|pdu| pdu.data.clone()).collect::<Vec<_>>(),
        data
    );
}

#[test]
fn data_in_shares_the_owners_buffer() {
    let mut pair = Pair::logged_in(config(), &["MaxRecvDataSegmentLength=65536"]);
    pair.scsi(read(1, 100_000), &[]);
    let command = pair.command();
    let data = Bytes::from(pattern(8, 100_000));
    pair.complete(
        &command,
        Outcome {
            data: data.clone(),
            transfer_len: 100_000,
            ..Outcome::default()
        },
    );
    let frame = pair.conn.poll_transmit().unwrap();
    assert_eq!(frame.data().as_ptr(), data.as_ptr());
    assert_eq!(
        pair.conn.poll_transmit().unwrap().data().as_ptr(),
        data[65536..].as_ptr()
    );
}

#[test]
fn residuals_in_both_places() {
    // (EDTL, bytes delivered, SPDTL) as in libiscsi's READ10 residual tests.
    for (edtl, delivered, residual) in [
        (0, 512, Residual::Overflow(512)),
        (10_000, 512, Residual::Underflow(9488)),
        (200, 512, Residual::Overflow(312)),
        (512, 1024, Residual::Overflow(512)),
        (512, 512, Residual::Exact),
        (96, 0, Residual::Underflow(96)),
    ] {
        let mut pair = Pair::logged_in(config(), &[]);
        pair.scsi(read(1, edtl), &[]);
        let command = pair.command();
        let outcome = Outcome {
            data: Bytes::from(pattern(9, delivered)),
            transfer_len: delivered as u64,
            ..Outcome::default()
        };
        pair.complete(&command, outcome);
        let pdu = pair.only();
        let sent = delivered.min(edtl as usize);
        assert_eq!(pdu.data.len(), sent);
        if sent == 0 {
            assert_eq!(response(&pdu).residual, residual, "EDTL {edtl}");
        } else {
            assert_eq!(
                DataIn::parse(&pdu.bhs).status,
                Some((GOOD, residual)),
                "EDTL {edtl}"
            );
        }
    }
}

#[test]
fn check_condition_after_data_has_its_own_response() {
    let mut pair = Pair::logged_in(config(), &[]);
    pair.scsi(read(1, 4096), &[]);
    let command = pair.command();
    pair.complete(
        &command,
        Outcome {
            status: CHECK_CONDITION,
            sense: Bytes::from_static(&[0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0]),
            data: Bytes::from(pattern(10, 1024)),
            transfer_len: 1024,
        },
    );
    let pdus = pair.receive();
    assert_eq!(pdus.len(), 2);
    let first = DataIn::parse(&pdus[0].bhs);
    assert_eq!((first.is_final, first.status), (true, None));
    assert_eq!(sense(&pdus[1]), (3, 0x11, 0));
    let answer = response(&pdus[1]);
    assert_eq!(
        (answer.residual, answer.exp_data_sn),
        (Residual::Underflow(3072), DataSn(1))
    );
}

#[test]
fn data_that_the_initiator_does_not_expect_is_not_sent() {
    // READ flagged as a write (libiscsi's Read10Invalid), and a command that says neither.
    for command in [write(1, 512), plain(1)] {
        let mut pair = Pair::logged_in(config(), &[]);
        let data = if command.write {
            pattern(11, 512)
        } else {
            Vec::new()
        };
        pair.scsi(command, &data);
        let command = pair.command();
        pair.complete(
            &command,
            Outcome {
                data: bytes(&[1; 512]),
                transfer_len: 512,
                ..Outcome::default()
            },
        );
        let pdu = pair.only();
        let expected = if command.edtl == 512 {
            Residual::Exact
        } else {
            Residual::Overflow(512)
        };
        assert_eq!((response(&pdu).status, response(&pdu).residual), (GOOD, expected));
    }
}

#[test]
fn test_unit_ready_with_r_bit_and_no_length() {
    let mut pair = Pair::logged_in(config(), &[]);
    pair.scsi(read(1, 0), &[]);
    let command = pair.command();
    pair.good(&command);
    assert_eq!(response(&pair.only()).residual, Residual::Exact);
}

#[test]
fn extended_cdb_and_bidirectional_lengths() {
    let mut pair = Pair::logged_in(config(), &[]);
    let mut command = write(1, 512);
    command.read = true;
    command.cdb = [0x7f; 16];
    command.cmd_sn = pair.next_cmd_sn();
    let mut ahs = vec![0, 17, 1, 0];
    ahs.extend([9; 16]);
    ahs.extend([0, 5, 2, 0, 0, 0, 4, 0]);
    let data = pattern(12, 512);
    pair.send_bytes(&wire(&command.encode(), &ahs, &data, false, false))
        .unwrap();
    let got = pair.command();
    assert!(matches!(&got.cdb, Cdb::Extended(cdb) if cdb.len() == 32 && cdb[16..] == [9; 16]));
    assert_eq!((got.bidi_read_edtl, &got.data[..]), (Some(1024), &data[..]));
    pair.complete(
        &got,
        Outcome {
            data: bytes(&[1; 1000]),
            transfer_len: 500,
            ..Outcome::default()
        },
    );
    let pdus = pair.receive();
    assert_eq!(
        DataIn::parse(&pdus[0].bhs).status,
        None,
        "bidirectional: never in a Data-In"
    );
    let answer = response(&pdus[1]);
    assert_eq!(
        (answer.residual, answer.bidi_residual),
        (Residual::Underflow(12), Residual::Underflow(24))
    );
}

#[test]
fn malformed_additional_segments_end_the_connection() {
    let mut pair = Pair::logged_in(config(), &[]);
    let mut command = plain(1);
    command.cmd_sn = pair.next_cmd_sn();
    let bytes = wire(&command.encode(), &[0, 200, 1, 0], &[], false, false);
    assert_eq!(pair.send_bytes(&bytes), Err(Error::MalformedAhs));
    let mut pair = Pair::logged_in(config(), &[]);
    let nop = nop_out(1, Ttt::RESERVED, true, CmdSn(1)).encode();
    let bytes = wire(&nop, &[0; 4], &[], false, false);
    assert_eq!(pair.send_bytes(&bytes), Err(Error::UnexpectedAhs { opcode: 0 }));
}

#[test]
fn segments_longer_than_declared_end_the_connection() {
    let mut pair = Pair::logged_in(config(), &[]);
    let bytes = wire(
        &nop_out(1, Ttt::RESERVED, true, CmdSn(1)).encode(),
        &[],
        &vec![0; 262_145],
        false,
        false,
    );
    let expected = Error::SegmentTooLong {
        opcode: 0,
        len: 262_145,
        max: 262_144,
    };
    assert_eq!(pair.send_bytes(&bytes), Err(expected));
}

// Broken transfers: the command ends with CHECK CONDITION, after its last sequence has ended, and never reaches the owner.

fn faulty(pair: &mut Pair, expected: (u8, u8)) {
    pair.no_event();
    let pdu = pair.only();
    assert_eq!(sense(&pdu), (0x0b, expected.0, expected.1));
    assert_eq!(pair.conn.info().counters.transfer_faults, 1);
    assert_eq!(pair.conn.outstanding(), 0);
    // The session goes on, with its window whole.
    pair.scsi(plain(99), &[]);
    let command = pair.command();
    pair.good(&command);
    let answer = response(&pair.only());
    assert_eq!(answer.numbers.max_cmd_sn, answer.numbers.exp_cmd_sn.plus(127));
}

#[test]
fn data_sn_must_count() {
    // libiscsi's DataSnInvalid: two PDUs numbered 0, one numbered 27, one numbered -1, and 1 before 0.
    for numbers in [&[0, 0][..], &[27], &[0xffff_ffff], &[1, 0]] {
        let mut pair = Pair::logged_in(config(), &["ImmediateData=No"]);
        pair.scsi(write(1, 512 * numbers.len() as u32), &[]);
        let ask = r2t(&pair.only());
        for (at, number) in numbers.iter().enumerate() {
            pair.no_event();
            pair.silent();
            pair.data_out(
                1,
                ask.ttt,
                *number,
                512 * at as u32,
                at + 1 == numbers.len(),
                &[1; 512],
            );
        }
        faulty(&mut pair, (0x47, 0x05));
    }
}

#[test]
fn offsets_and_amounts_must_fit() {
    let cases: [(&str, u32, bool, usize); 4] = [
        ("offset before", 0, true, 1024),
        ("offset after", 1000, true, 1024),
        ("more than asked for", 512, true, 1028),
        ("less than asked for", 512, true, 1000),
    ];
    for (name, offset, is_final, len) in cases {
        let mut pair = Pair::logged_in(config(), &[]);
        pair.scsi(write(1, 1536), &[1; 512]);
        let ask = r2t(&pair.only());
        assert_eq!((ask.buffer_offset, ask.desired_len), (512, 1024), "{name}");
        pair.data_out(1, ask.ttt, 0, offset, is_final, &vec![2; len]);
        faulty(&mut pair, (0x0c, 0x0d));
    }
}

#[test]
fn offsets_near_the_end_of_the_number_space() {
    let mut pair = Pair::logged_in(config(), &[]);
    pair.scsi(write(1, u32::MAX), &[]);
    let ask = r2t(&pair.receive()[0]);
    pair.data_out(1, ask.ttt, 0, u32::MAX, false, &[2; 512]);
    pair.data_out(1, ask.ttt, 0, u32::MAX - 3, false, &[2; 512]);
    pair.silent();
}

#[test]
fn a_failed_task_waits_for_all_its_sequences() {
    let mut pair = Pair::logged_in(config(), &["MaxBurstLength=512", "MaxOutstandingR2T=2"]);
    pair.scsi(write(1, 2048), &[]);
    let asks: Vec<R2t> = pair.receive().iter().map(r2t).collect();
    pair.data_out(1, asks[0].ttt, 5, 0, true, &[1; 512]);
    // No more R2Ts, and no status before the second sequence has ended.
    pair.silent();
    pair.data_out(1, asks[1].ttt, 0, 512, true, &[1; 512]);
    faulty(&mut pair, (0x47, 0x05));
}

#[test]
fn r2ts_are_answered_in_order() {
    let mut pair = Pair::logged_in(config(), &["MaxBurstLength=512", "MaxOutstandingR2T=2"]);
    pair.scsi(write(1, 1024), &[]);
    let asks: Vec<R2t> = pair.receive().iter().map(r2t).collect();
    pair.data_out(1, asks[1].ttt, 0, 512, true, &[1; 512]);
    pair.data_out(1, asks[0].ttt, 0, 0, true, &[1; 512]);
    faulty(&mut pair, (0x0c, 0x0d));
}

#[test]
fn unsolicited_data_that_was_not_agreed_on() {
    // ImmediateData=No.
    let mut pair = Pair::logged_in(config(), &["ImmediateData=No"]);
    pair.scsi(write(1, 512), &[1; 512]);
    faulty(&mut pair, (0x0c, 0x0c));
    // InitialR2T=Yes, and unsolicited Data-Out all the same.
    let mut pair = Pair::logged_in(config(), &[]);
    pair.scsi(
        ScsiCommand {
            is_final: false,
            ..write(1, 1024)
        },
        &[],
    );
    let ask = r2t(&pair.only());
    pair.data_out(1, Ttt::RESERVED, 0, 0, true, &[1; 1024]);
    pair.silent();
    pair.data_out(1, ask.ttt, 0, 0, true, &[1; 1024]);
    faulty(&mut pair, (0x0c, 0x0c));
    // Data with a command that writes nothing.
    let mut pair = Pair::logged_in(config(), &[]);
    pair.scsi(read(1, 512), &[1; 512]);
    faulty(&mut pair, (0x0c, 0x0c));
}

#[test]
fn unsolicited_data_of_the_wrong_amount() {
    // More immediate data than expected data.
    let mut pair = Pair::logged_in(config(), &[]);
    pair.scsi(write(1, 100), &[1; 512]);
    faulty(&mut pair, (0x0c, 0x0d));
    // More than FirstBurstLength.
    let mut pair = Pair::logged_in(config(), &["FirstBurstLength=512"]);
    pair.scsi(write(1, 2048), &[1; 1024]);
    faulty(&mut pair, (0x0c, 0x0d));
    // Less than FirstBurstLength, though there is more to send (§11.4.7.2).
    let mut pair = unsolicited();
    pair.scsi(
        ScsiCommand {
            is_final: false,
            ..write(1, 100_000)
        },
        &[],
    );
    pair.data_out(1, Ttt::RESERVED, 0, 0, true, &[1; 512]);
    faulty(&mut pair, (0x0c, 0x0d));
}

#[test]
fn data_of_tasks_that_do_not_exist_is_rejected_with_its_header() {
    let mut pair = Pair::logged_in(config(), &[]);
    let header = data_out(77, Ttt(5), 0, 0, true).encode();
    pair.send(&header, &[1; 512]).unwrap();
    let pdu = pair.only();
    assert_eq!(rejected(&pdu), RejectReason::INVALID_FIELD);
    assert_eq!(pdu.data[8..], header[8..]);
    assert_eq!(pdu.data[5..8], [0, 2, 0], "the header as it came");
    // A command whose data is complete takes no more.
    pair.scsi(write(1, 512), &[1; 512]);
    pair.data_out(1, Ttt::RESERVED, 0, 0, true, &[2; 512]);
    assert_eq!(rejected(&pair.only()), RejectReason::INVALID_FIELD);
    assert_eq!(pair.command().data, [1; 512][..]);
}

#[test]
fn flags_and_tags_of_commands_are_checked() {
    let mut pair = Pair::logged_in(config(), &[]);
    pair.scsi(
        ScsiCommand {
            is_final: false,
            ..read(1, 512)
        },
        &[],
    );
    assert_eq!(
        rejected(&pair.only()),
        RejectReason::INVALID_FIELD,
        "at least one of W and F"
    );
    pair.scsi(plain(0xffff_ffff), &[]);
    assert_eq!(rejected(&pair.only()), RejectReason::INVALID_FIELD);
    pair.scsi(plain(5), &[]);
    pair.scsi(plain(5), &[]);
    let pdu = pair.only();
    assert_eq!(rejected(&pdu), RejectReason::TASK_IN_PROGRESS);
    // Rejected commands used their CmdSN, and their place is free again.
    assert_eq!(
        (pdu.numbers().exp_cmd_sn, pdu.numbers().max_cmd_sn),
        (CmdSn(5), CmdSn(131))
    );
    let command = pair.command();
    pair.good(&command);
    assert_eq!(response(&pair.only()).numbers.max_cmd_sn, CmdSn(132));
    pair.no_event();
}

// Digests

fn with_digests(step: usize) -> Pair {
    let mut pair = Pair::new(config(), Targets::default());
    pair.step = step;
    pair.login(&["HeaderDigest=CRC32C", "DataDigest=CRC32C"]);
    pair
}

#[test]
fn digests_hold_from_the_first_pdu_of_the_full_feature_phase() {
    for step in [1, 13, 5000, usize::MAX] {
        let mut pair = with_digests(step);
        let data = pattern(13, 20_001);
        pair.scsi(write(1, 20_001), &data[..5001]);
        let ask = r2t(&pair.only());
        pair.data_out(1, ask.ttt, 0, 5001, true, &data[5001..]);
        let command = pair.command();
        assert_eq!(command.data, data);
        pair.good(&command);
        pair.only();
        pair.scsi(read(2, 3), &[]);
        let command = pair.command();
        pair.complete(
            &command,
            Outcome {
                data: bytes(b"abc"),
                transfer_len: 3,
                ..Outcome::default()
            },
        );
        assert_eq!(pair.only().data, b"abc");
    }
}

#[test]
fn a_broken_header_digest_ends_the_connection() {
    let mut pair = with_digests(usize::MAX);
    let mut bytes = wire(
        &nop_out(1, Ttt::RESERVED, true, CmdSn(1)).encode(),
        &[],
        &[],
        true,
        true,
    );
    bytes[20] ^= 1;
    assert!(matches!(pair.send_bytes(&bytes), Err(Error::HeaderDigest { .. })));
}

fn corrupt(header: &stillpoint_iscsi::pdu::Bhs, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire(header, &[], data, true, true);
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40;
    bytes
}

#[test]
fn a_broken_data_digest_fails_the_write() {
    let mut pair = with_digests(usize::MAX);
    pair.scsi(write(1, 1024), &[]);
    let ask = r2t(&pair.only());
    let header = data_out(1, ask.ttt, 0, 0, false).encode();
    pair.send_bytes(&corrupt(&header, &[1; 512])).unwrap();
    let pdu = pair.only();
    assert_eq!(rejected(&pdu), RejectReason::DATA_DIGEST);
    pair.data_out(1, ask.ttt, 1, 512, true, &[1; 512]);
    faulty(&mut pair, (0x47, 0x05));
}

#[test]
fn a_broken_data_digest_on_a_numbered_pdu_is_rejected_and_ends_the_session() {
    let mut pair = with_digests(usize::MAX);
    let mut command = write(1, 512);
    command.cmd_sn = pair.next_cmd_sn();
    let error = pair
        .send_bytes(&corrupt(&command.encode(), &[1; 512]))
        .unwrap_err();
    assert_eq!(error, Error::DataDigest { opcode: 1 });
    assert_eq!(rejected(&pair.only()), RejectReason::DATA_DIGEST);
    pair.no_event();
    // On an immediate PDU nothing is lost but the PDU.
    let mut pair = with_digests(usize::MAX);
    let nop = nop_out(1, Ttt::RESERVED, true, CmdSn(1)).encode();
    pair.send_bytes(&corrupt(&nop, &[1; 512])).unwrap();
    assert_eq!(rejected(&pair.only()), RejectReason::DATA_DIGEST);
}

// Bounds

fn small(change: impl FnOnce(&mut ConnectionConfig)) -> ConnectionConfig {
    let mut ours = config();
    change(&mut ours);
    ours
}

#[test]
fn r2ts_wait_for_the_write_budget() {
    let ours = small(|c| c.limits.write_buffer_bytes = 100_000);
    let mut pair = Pair::logged_in(ours, &["ImmediateData=No", "MaxBurstLength=40000"]);
    for itt in 1..=4 {
        pair.scsi(write(itt, 40_000), &[]);
    }
    let asks: Vec<R2t> = pair.receive().iter().map(r2t).collect();
    assert_eq!(asks.iter().map(|ask| ask.itt.0).collect::<Vec<_>>(), [1, 2]);
    for ask in &asks {
        pair.data_out(ask.itt.0, ask.ttt, 0, 0, true, &[1; 40_000]);
    }
    // Both are complete and with the owner: their memory is still taken.
    let (first, second) = (pair.command(), pair.command());
    pair.silent();
    pair.good(&first);
    let pdus = pair.receive();
    assert_eq!(r2t(&pdus[0]).itt.0, 3);
    pair.good(&second);
    let pdus = pair.receive();
    assert_eq!(r2t(&pdus[0]).itt.0, 4);
}

#[test]
fn a_write_beyond_the_budget_goes_through_alone() {
    let ours = small(|c| c.limits.write_buffer_bytes = 1000);
    let mut pair = Pair::logged_in(
        ours,
        &["ImmediateData=No", "MaxBurstLength=4096", "MaxOutstandingR2T=4"],
    );
    let data = pattern(14, 10_000);
    pair.scsi(write(1, 10_000), &[]);
    pair.scsi(write(2, 512), &[]);
    for _ in 0..3 {
        let ask = r2t(&pair.only());
        assert_eq!(ask.itt.0, 1);
        let (from, to) = (
            ask.buffer_offset as usize,
            (ask.buffer_offset + ask.desired_len) as usize,
        );
        pair.data_out(1, ask.ttt, 0, ask.buffer_offset, true, &data[from..to]);
    }
    let command = pair.command();
    assert_eq!(command.data, data);
    pair.good(&command);
    assert_eq!(r2t(&pair.receive()[0]).itt.0, 2);
}

#[test]
fn transfers_are_collected_up_to_the_limit() {
    let ours = small(|c| c.limits.transfer_bytes = 300_000);
    let mut pair = Pair::logged_in(ours, &["ImmediateData=No"]);
    pair.scsi(write(1, 4_000_000_000), &[]);
    let ask = r2t(&pair.only());
    // MaxBurstLength was not negotiated: the default holds.
    assert_eq!(ask.desired_len, 262_144);
    pair.data_out(1, ask.ttt, 0, 0, false, &[1; 200_000]);
    pair.data_out(1, ask.ttt, 1, 200_000, true, &[1; 62_144]);
    let ask = r2t(&pair.only());
    assert_eq!(ask.desired_len, 37_856);
    pair.data_out(1, ask.ttt, 0, 262_144, true, &[1; 37_856]);
    let command = pair.command();
    assert_eq!((command.edtl, command.data.len()), (4_000_000_000, 300_000));
}

#[test]
fn reads_wait_while_too_much_is_unsent() {
    let ours = small(|c| c.limits.read_buffer_bytes = 100_000);
    let mut pair = Pair::logged_in(ours, &[]);
    for itt in 1..=4 {
        pair.scsi(read(itt, 40_000), &[]);
    }
    let (first, second) = (pair.command(), pair.command());
    pair.no_event();
    let data = Bytes::from(pattern(15, 40_000));
    for command in [&first, &second] {
        pair.complete(
            command,
            Outcome {
                data: data.clone(),
                transfer_len: 40_000,
                ..Outcome::default()
            },
        );
    }
    // Answered, but the peer has not read yet.
    pair.no_event();
    pair.receive();
    assert_eq!((pair.command().itt.0, pair.command().itt.0), (3, 4));
    // One that is larger than the bound runs alone.
    let mut pair = Pair::logged_in(small(|c| c.limits.read_buffer_bytes = 100), &[]);
    pair.scsi(read(1, 40_000), &[]);
    pair.command();
}

#[test]
fn announced_lengths_cost_nothing() {
    // 128 commands that announce 4 GB each, and Data-Out headers that announce 256 KiB and send nothing.
    let mut pair = Pair::logged_in(config(), &["ImmediateData=No"]);
    for itt in 0..128 {
        pair.scsi(write(itt, u32::MAX), &[]);
    }
    let asked: u64 = pair
        .receive()
        .iter()
        .map(|pdu| u64::from(r2t(pdu).desired_len))
        .sum();
    assert!(asked <= 33 << 20, "{asked}");
    // The window is closed: the next is ignored without a word.
    pair.scsi(write(999, 512), &[]);
    pair.silent();
    assert_eq!(pair.conn.info().counters.outside_window, 1);
}
