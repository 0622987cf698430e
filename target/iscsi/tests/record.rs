//! The recorder: what it shows is what passed, byte for byte, and without leave nothing of what is stored.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use common::*;
use stillpoint_iscsi::pdu::R2t;
use stillpoint_iscsi::{Direction, Outcome, Payload, Recorded, Ttt};

const DIGESTS: [&str; 2] = ["HeaderDigest=CRC32C", "DataDigest=CRC32C"];
const LEN: u32 = 70_001;

/// INQUIRY, a write with immediate and solicited data, a read, a ping; and the bytes of both directions.
fn conversation(pair: &mut Pair) -> (Vec<u8>, Vec<u8>) {
    let (mut to, mut from) = (Vec::new(), Vec::new());
    let mut send = |pair: &mut Pair, bhs: &[u8; 48], data: &[u8]| {
        let bytes = wire(bhs, &[], data, pair.header_digest, pair.data_digest);
        pair.send_bytes(&bytes).unwrap();
        to.extend_from_slice(&bytes);
    };
    let mut receive = |pair: &mut Pair| {
        let mut heads = Vec::new();
        while let Some(frame) = pair.conn.poll_transmit() {
            let bytes = frame.chunks().concat();
            heads.push(*bytes.first_chunk::<48>().unwrap());
            from.extend_from_slice(&bytes);
        }
        heads
    };
    let inquiry = {
        let mut command = read(1, 36);
        command.cdb[0] = 0x12;
        command.cmd_sn = pair.next_cmd_sn();
        command
    };
    send(pair, &inquiry.encode(), &[]);
    answer_read(pair, b"about the device");
    receive(pair);

    let mut command = write(2, LEN);
    command.cdb[0] = 0x2a;
    command.cmd_sn = pair.next_cmd_sn();
    let secret = pattern(1, LEN as usize);
    send(pair, &command.encode(), &secret[..5]);
    let r2t = R2t::parse(&receive(pair)[0]);
    let rest = &secret[5..];
    send(pair, &data_out(2, r2t.ttt, 0, 5, true).encode(), rest);
    let command = pair.command();
    assert_eq!(command.data[..], secret[..]);
    pair.good(&command);
    receive(pair);

    let mut command = read(3, LEN);
    command.cdb[0] = 0x28;
    command.cmd_sn = pair.next_cmd_sn();
    send(pair, &command.encode(), &[]);
    answer_read(pair, &secret);
    receive(pair);

    send(
        pair,
        &nop_out(4, Ttt::RESERVED, true, pair.cmd_sn).encode(),
        b"a ping",
    );
    receive(pair);
    (to, from)
}

fn answer_read(pair: &mut Pair, data: &[u8]) {
    let command = pair.command();
    let outcome = Outcome {
        data: bytes(data),
        transfer_len: data.len() as u64,
        ..Outcome::default()
    };
    pair.complete(&command, outcome);
}

fn take(pair: &mut Pair) -> Vec<Recorded> {
    std::iter::from_fn(|| pair.conn.poll_recorded()).collect()
}

#[test]
fn with_leave_the_recording_is_what_passed() {
    for keys in [&[][..], &DIGESTS] {
        for step in [usize::MAX, 7] {
            let mut pair = Pair::logged_in(config(), keys);
            pair.step = step;
            pair.conn.record(Some(Payload::Keep));
            let (to, from) = conversation(&mut pair);
            let recorded = take(&mut pair);
            for (direction, passed) in [(Direction::In, to), (Direction::Out, from)] {
                let mine = recorded.iter().filter(|pdu| pdu.direction == direction);
                let shown: Vec<u8> = mine.clone().flat_map(|pdu| pdu.shown.to_vec()).collect();
                assert!(
                    shown == passed,
                    "{direction:?} with {keys:?}: {} of {} bytes",
                    shown.len(),
                    passed.len()
                );
                assert!(mine.into_iter().all(|pdu| pdu.shown.len() == pdu.wire_len));
            }
            pair.conn.record(None);
            conversation(&mut pair);
            assert!(take(&mut pair).is_empty());
        }
    }
}

#[test]
fn without_leave_it_shows_the_device_and_not_its_content() {
    for keys in [&[][..], &DIGESTS] {
        let mut pair = Pair::logged_in(config(), keys);
        pair.conn.record(Some(Payload::Redact));
        let (to, from) = conversation(&mut pair);
        let recorded = take(&mut pair);
        for (direction, passed) in [(Direction::In, to), (Direction::Out, from)] {
            let mine = recorded.iter().filter(|pdu| pdu.direction == direction);
            let lens: usize = mine.clone().map(|pdu| pdu.wire_len).sum();
            assert_eq!(lens, passed.len(), "lengths on the wire are told");
            let mut at = 0;
            for pdu in mine {
                assert_eq!(
                    pdu.shown,
                    passed[at..at + pdu.shown.len()],
                    "what is shown is a beginning"
                );
                at += pdu.wire_len;
            }
        }
        let shown: Vec<u8> = recorded.iter().flat_map(|pdu| pdu.shown.to_vec()).collect();
        let has = |what: &[u8]| shown.windows(what.len()).any(|window| window == what);
        let secret = pattern(1, LEN as usize);
        assert!(has(b"about the device"));
        assert!(
            !has(&secret[..5]) && !has(&secret[5..13]) && !has(&secret[60_000..60_008]) && !has(b"a ping")
        );
    }
}

#[test]
fn a_tag_that_is_used_again_hides_again() {
    let mut pair = Pair::logged_in(config(), &[]);
    pair.conn.record(Some(Payload::Redact));
    for (opcode, shown) in [(0x12, true), (0x28, false), (0xa0, true), (0x88, false)] {
        let mut command = read(9, 16);
        command.cdb[0] = opcode;
        pair.scsi(command, &[]);
        if opcode == 0xa0 {
            // It ends without an answer, as after a reset by another session: the tag stays open.
            let _command = pair.command();
            pair.conn.abort_lun_tasks(None);
            continue;
        }
        answer_read(&mut pair, b"sixteen bytes of");
        pair.receive();
        let data_in = take(&mut pair).pop().unwrap();
        assert_eq!(data_in.shown.len() > 48, shown, "{opcode:#04x}");
    }
}
