//! Third-party copies: EXTENDED COPY with both list identifiers, tokens, their reports and limits (libiscsi's ExtendedCopy*,
//! ReceiveCopyResults*; what Windows sends for ODX, what ESXi and sg_xcopy send for XCOPY).

use bytes::Bytes;
use proptest::prelude::*;
use stillpoint_scsi::{
    BlockError, BlockOp, CopyEnd, CopyError, CopyOutcome, CopyRequest, NexusId, Plan, Reply, RodToken,
};

use crate::bench::*;

const NAA: [u8; 16] = [0x62, 0x53, 0x50, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13];
const INVALID_LIST: Option<(u8, u16)> = Some((5, 0x2600));
const LIST_LENGTH: Option<(u8, u16)> = Some((5, 0x1a00));

fn cscd(block_len: u32) -> Vec<u8> {
    let mut descriptor = vec![0; 32];
    descriptor[0] = 0xe4;
    descriptor[4..8].copy_from_slice(&[1, 3, 0, 16]);
    descriptor[8..24].copy_from_slice(&NAA);
    descriptor[28..].copy_from_slice(&block_len.to_be_bytes());
    descriptor
}

fn segment(source: u16, destination: u16, blocks: u16, from: u64, to: u64) -> Vec<u8> {
    let mut descriptor = vec![2, 0, 0, 24];
    for field in [source, destination, 0, blocks] {
        descriptor.extend_from_slice(&field.to_be_bytes());
    }
    descriptor.extend_from_slice(&from.to_be_bytes());
    descriptor.extend_from_slice(&to.to_be_bytes());
    descriptor
}

fn lid1(list: u8, usage: u8, units: &[u8], segments: &[u8]) -> Vec<u8> {
    let mut header = vec![list, usage << 3];
    header.extend_from_slice(&(units.len() as u16).to_be_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&(segments.len() as u32).to_be_bytes());
    header.extend_from_slice(&[0; 4]);
    [&header, units, segments].concat()
}

fn lid4(list: u32, flags: u8, units: &[u8], segments: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 48];
    (header[0], header[3], header[15], header[16]) = (1, 0x20, flags, 0xff);
    header[20..24].copy_from_slice(&list.to_be_bytes());
    header[42..44].copy_from_slice(&(units.len() as u16).to_be_bytes());
    header[44..46].copy_from_slice(&(segments.len() as u16).to_be_bytes());
    [&header, units, segments].concat()
}

fn with_lengths(code: u8, action: u8, list: u32, short: bool, len: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1]) = (code, action);
    if short {
        cdb[2] = list as u8;
    } else {
        cdb[2..6].copy_from_slice(&list.to_be_bytes());
    }
    cdb[10..14].copy_from_slice(&len.to_be_bytes());
    cdb
}

fn extended_copy(bench: &mut Bench, action: u8, list: &[u8]) -> Reply {
    bench.give(&with_lengths(0x83, action, 0, true, list.len() as u32), list)
}

/// THIRD-PARTY COPY IN with a four-byte list identifier, or the one of COPY STATUS(LID1).
fn receive(bench: &mut Bench, action: u8, list: u32) -> Reply {
    bench.ask(&with_lengths(0x84, action, list, matches!(action, 0 | 4), 4096))
}

fn token_cdb(action: u8, list: u32, len: usize) -> [u8; 16] {
    let mut cdb = with_lengths(0x83, action, 0, true, len as u32);
    cdb[6..10].copy_from_slice(&list.to_be_bytes());
    cdb
}

fn range_list(header: Vec<u8>, ranges: &[(u64, u32)]) -> Vec<u8> {
    let mut list = header;
    for (lba, blocks) in ranges {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&blocks.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    let said = (list.len() - 2) as u16;
    list[..2].copy_from_slice(&said.to_be_bytes());
    list
}

fn populate_list(seconds: u32, ranges: &[(u64, u32)]) -> Vec<u8> {
    let mut header = vec![0; 16];
    header[4..8].copy_from_slice(&seconds.to_be_bytes());
    header[14..16].copy_from_slice(&(16 * ranges.len() as u16).to_be_bytes());
    range_list(header, ranges)
}

fn write_list(token: &[u8], skip: u64, ranges: &[(u64, u32)]) -> Vec<u8> {
    let mut header = vec![0; 536];
    header[8..16].copy_from_slice(&skip.to_be_bytes());
    header[16..528].copy_from_slice(token);
    header[534..536].copy_from_slice(&(16 * ranges.len() as u16).to_be_bytes());
    range_list(header, ranges)
}

fn zero_token() -> Vec<u8> {
    let mut token = vec![0; 512];
    token[..8].copy_from_slice(&[0xff, 0xff, 0, 1, 0, 0, 1, 0xf8]);
    token
}

fn populate(bench: &mut Bench, list: u32, ranges: &[(u64, u32)]) -> Reply {
    let data = populate_list(0, ranges);
    bench.give(&token_cdb(0x10, list, data.len()), &data)
}

fn write_using(bench: &mut Bench, list: u32, token: &[u8], skip: u64, ranges: &[(u64, u32)]) -> Reply {
    let data = write_list(token, skip, ranges);
    bench.give(&token_cdb(0x11, list, data.len()), &data)
}

/// The token that RECEIVE ROD TOKEN INFORMATION brings.
fn token_of(bench: &mut Bench, list: u32) -> Vec<u8> {
    let data = receive(bench, 7, list).data;
    assert_eq!(u32_at(&data, 0) as usize, data.len() - 4);
    assert_eq!((data[4], data[5], data[12], data[15]), (0x10, 1, 0, 0xf1));
    assert_eq!((data[13], u32_at(&data, 32), u16_at(&data, 36)), (0, 514, 0));
    data[38..].to_vec()
}

fn block(bench: &Bench, lba: usize) -> &[u8] {
    &bench.disk.bytes[lba * bench.block..(lba + 1) * bench.block]
}

/// Every block says its number.
fn numbered(bench: &mut Bench) {
    let size = bench.block;
    for (n, block) in bench.disk.bytes.chunks_mut(size).enumerate() {
        block.fill((n as u8).wrapping_add(1));
    }
}

#[test]
fn extended_copy_copies_and_reports() {
    for mut bench in Bench::both() {
        numbered(&mut bench);
        let size = bench.block as u32;
        let segments = [segment(0, 0, 3, 5, 100), segment(0, 1, 1, 101, 200)].concat();
        let units = [cscd(size), cscd(0)].concat();
        let list = lid1(9, 0, &units, &segments);
        let reply = extended_copy(&mut bench, 0, &list);
        assert_eq!((reply.status, reply.transfer_len), (GOOD, list.len() as u64));
        assert_eq!(block(&bench, 102)[0], 8);
        assert_eq!(
            block(&bench, 200)[0],
            7,
            "the second segment sees what the first one wrote"
        );
        let data = receive(&mut bench, 0, 9).data;
        assert_eq!(
            (u32_at(&data, 0), data[4], u16_at(&data, 5), data[7]),
            (8, 1, 2, 0)
        );
        assert_eq!(u32_at(&data, 8), 4 * size);
        assert_eq!(receive(&mut bench, 4, 9).data[..], [0; 4], "nothing failed");
        // With four-byte identifiers.
        let list = lid4(0x1234_5678, 0, &units, &segments);
        assert_eq!(extended_copy(&mut bench, 1, &list).status, GOOD);
        let data = receive(&mut bench, 5, 0x1234_5678).data;
        assert_eq!((u32_at(&data, 0), data.len(), data[4], data[5]), (28, 32, 1, 1));
        assert_eq!((u64_at(&data, 16), u16_at(&data, 24)), (4 * u64::from(size), 2));
    }
}

#[test]
fn a_list_of_no_bytes_is_no_error_and_a_cut_one_is() {
    let mut bench = Bench::small();
    for action in [0, 1, 0x10, 0x11] {
        assert_eq!(
            bench.give(&with_lengths(0x83, action, 0, true, 0), &[]).status,
            GOOD
        );
    }
    let list = lid1(1, 0, &cscd(512), &segment(0, 0, 1, 0, 8));
    for cut in [1, 15, 16 + 31, 16 + 32, 16 + 32 + 27] {
        assert_eq!(
            sense(&extended_copy(&mut bench, 0, &list[..cut])),
            LIST_LENGTH,
            "{cut}"
        );
        let cdb = with_lengths(0x83, 0, 0, true, list.len() as u32);
        assert_eq!(
            sense(&bench.give(&cdb, &list[..cut])),
            LIST_LENGTH,
            "{cut} bytes came"
        );
    }
    // Units without segments ask for nothing.
    assert_eq!(
        extended_copy(&mut bench, 0, &lid1(1, 0, &cscd(512), &[])).status,
        GOOD
    );
}

#[test]
fn descriptors_are_bounded_and_known() {
    let mut bench = Bench::small();
    let parameters = receive(&mut bench, 3, 0).data;
    assert_eq!(u32_at(&parameters, 0) as usize, parameters.len() - 4);
    let (units, segments) = (u16_at(&parameters, 8) as usize, u16_at(&parameters, 10) as usize);
    assert_eq!((units, segments), (16, 256));
    assert_eq!(u32_at(&parameters, 12) as usize, units * 32 + segments * 28);
    assert_eq!((u32_at(&parameters, 16), parameters[37]), (65535 * 512, 9));
    assert_eq!(parameters[43..], [2, 0x02, 0xe4]);
    let one = segment(0, 0, 1, 0, 8);
    let too_many = lid1(1, 0, &cscd(512).repeat(units + 1), &one);
    assert_eq!(sense(&extended_copy(&mut bench, 0, &too_many)), Some((5, 0x2606)));
    let too_many = lid1(1, 0, &cscd(512), &one.repeat(segments + 1));
    assert_eq!(sense(&extended_copy(&mut bench, 0, &too_many)), Some((5, 0x2608)));
    let too_long = lid1(1, 0, &cscd(512).repeat(units + 1), &one.repeat(segments + 1));
    assert_eq!(sense(&extended_copy(&mut bench, 0, &too_long)), LIST_LENGTH);
    let full = lid1(1, 0, &cscd(512).repeat(units), &one.repeat(segments));
    assert_eq!(extended_copy(&mut bench, 0, &full).status, GOOD);
    let mut other = cscd(512);
    other[0] = 0xe0;
    assert_eq!(
        sense(&extended_copy(&mut bench, 0, &lid1(1, 0, &other, &one))),
        Some((5, 0x2607))
    );
    let mut tape = cscd(512);
    tape[1] = 1;
    assert_eq!(
        sense(&extended_copy(&mut bench, 0, &lid1(1, 0, &tape, &one))),
        Some((10, 0x0d03))
    );
    let mut stream = one.clone();
    stream[0] = 3;
    assert_eq!(
        sense(&extended_copy(&mut bench, 0, &lid1(1, 0, &cscd(512), &stream))),
        Some((5, 0x2609))
    );
    let mut short = one.clone();
    short[3] = 20;
    assert_eq!(
        sense(&extended_copy(&mut bench, 0, &lid1(1, 0, &cscd(512), &short))),
        INVALID_LIST
    );
    // LU ID TYPE means nothing for this descriptor (SPC-4).
    let mut lu_id = cscd(512);
    lu_id[1] = 0xc0;
    assert_eq!(
        extended_copy(&mut bench, 0, &lid1(1, 0, &lu_id, &one)).status,
        GOOD
    );
    let mut inline = lid1(1, 0, &cscd(512), &one);
    inline[15] = 4;
    assert_eq!(sense(&extended_copy(&mut bench, 0, &inline)), Some((5, 0x260b)));
    for at in [0, 3, 16] {
        let mut format = lid4(1, 0, &cscd(512), &one);
        format[at] ^= 1;
        assert_eq!(
            sense(&extended_copy(&mut bench, 1, &format)),
            INVALID_LIST,
            "byte {at}"
        );
    }
}

#[test]
fn a_failed_segment_is_named() {
    let mut bench = Bench::small();
    let good = segment(0, 0, 1, 0, 8);
    let unreachable = lid1(3, 0, &cscd(512), &[good.clone(), segment(0, 1, 1, 0, 8)].concat());
    let reply = extended_copy(&mut bench, 0, &unreachable);
    assert_eq!(sense(&reply), Some((10, 0x0804)));
    assert_eq!(reply.sense[10..12], [0, 1]);
    let beyond = lid1(
        3,
        0,
        &cscd(512),
        &[good.clone(), segment(0, 0, 2, 0, 4095)].concat(),
    );
    let reply = extended_copy(&mut bench, 0, &beyond);
    assert_eq!(
        (sense(&reply), &reply.sense[10..12]),
        (Some((10, 0x0000)), &[0, 1][..])
    );
    let status = receive(&mut bench, 0, 3).data;
    assert_eq!((status[4], u16_at(&status, 5), u32_at(&status, 8)), (2, 1, 512));
    let details = receive(&mut bench, 4, 3).data;
    assert_eq!(
        (u32_at(&details, 0), details[56], u16_at(&details, 58)),
        (74, 2, 18)
    );
    assert_eq!(details[60..], reply.sense[..]);
    let mut other = cscd(512);
    other[8] ^= 0x0f;
    let foreign = lid1(3, 0, &other, &good);
    assert_eq!(sense(&extended_copy(&mut bench, 0, &foreign)), Some((10, 0x0d02)));
    let mut text = cscd(512);
    text[4] = 2;
    assert_eq!(
        sense(&extended_copy(&mut bench, 0, &lid1(3, 0, &text, &good))),
        Some((10, 0x0d02))
    );
    assert_eq!(
        sense(&extended_copy(&mut bench, 0, &lid1(3, 0, &cscd(4096), &good))),
        INVALID_LIST
    );
    bench.disk.failure = Some(BlockError::NoSpace);
    let full = extended_copy(&mut bench, 0, &lid1(3, 0, &cscd(512), &good));
    assert_eq!(sense(&full), Some((10, 0x2707)));
}

#[test]
fn list_identifiers_belong_to_one_nexus_and_one_width() {
    let mut bench = Bench::small();
    for action in [0, 4, 5, 7] {
        assert_eq!(
            sense(&receive(&mut bench, action, 1)),
            INVALID_FIELD,
            "no copy yet"
        );
    }
    let list = lid1(1, 0, &cscd(512), &segment(0, 0, 1, 0, 8));
    assert_eq!(extended_copy(&mut bench, 0, &list).status, GOOD);
    assert_eq!(receive(&mut bench, 0, 1).status, GOOD);
    assert_eq!(sense(&receive(&mut bench, 5, 1)), INVALID_FIELD);
    let cdb = with_lengths(0x84, 0, 1, true, 12);
    assert_eq!(sense(&bench.send(1, &cdb, &[], 12)), INVALID_FIELD, "another's");
    // Without an identifier nothing is kept; 11b with one is an error, 01b is reserved.
    let none = lid1(0, 3, &cscd(512), &segment(0, 0, 1, 0, 8));
    assert_eq!(extended_copy(&mut bench, 0, &none).status, GOOD);
    assert_eq!(sense(&receive(&mut bench, 0, 0)), INVALID_FIELD);
    for usage in [1, 3] {
        let list = lid1(4, usage, &cscd(512), &segment(0, 0, 1, 0, 8));
        assert_eq!(sense(&extended_copy(&mut bench, 0, &list)), INVALID_LIST);
    }
    // A new login knows nothing of them.
    bench.unit.attach(NexusId(0), initiator(0));
    bench.attention(0);
    assert_eq!(sense(&receive(&mut bench, 0, 1)), INVALID_FIELD);
}

/// Plans a command of nexus `n` without carrying it out.
fn begin(bench: &mut Bench, n: u64, cdb: &[u8], data: &[u8]) -> Plan {
    let context = stillpoint_scsi::Context {
        nexus: NexusId(n),
        luns: &[0],
        data_in_max: 0,
    };
    bench.unit.plan(&context, cdb, data)
}

fn request(plan: Plan) -> CopyRequest {
    match plan {
        Plan::Op(planned) => match planned.op() {
            BlockOp::Copy(request) => request.clone(),
            other => panic!("{other:?}"),
        },
        Plan::Early(_, BlockOp::Copy(request)) => request,
        other => panic!("{other:?}"),
    }
}

#[test]
fn running_copies_are_counted_told_and_cancelled() {
    let mut bench = Bench::small();
    let list = |id: u32| lid4(id, 0, &cscd(512), &segment(0, 0, 1, 0, 8));
    let cdb = with_lengths(0x83, 1, 0, true, list(0).len() as u32);
    let first = request(begin(&mut bench, 0, &cdb, &list(0)));
    assert!(bench.unit.copy_progress(first.ticket, 0, 300));
    let data = receive(&mut bench, 5, 0).data;
    assert_eq!((data[5], u64_at(&data, 16)), (0x11, 300));
    assert_eq!(
        sense(&bench.give(&cdb, &list(0))),
        Some((5, 0x0016)),
        "in progress"
    );
    let mut tickets = vec![first.ticket];
    for id in 1..16 {
        tickets.push(request(begin(&mut bench, u64::from(id % 3), &cdb, &list(id))).ticket);
    }
    assert_eq!(bench.give(&cdb, &list(99)).status, 0x08, "BUSY");
    // Only one's own can be aborted.
    let abort = with_lengths(0x83, 0x1c, 0, false, 0);
    assert_eq!(sense(&bench.send(1, &abort, &[], 0)), INVALID_FIELD);
    assert_eq!(bench.ask(&abort).status, GOOD);
    assert!(!bench.unit.copy_progress(first.ticket, 0, 400));
    let outcome = CopyOutcome {
        segments: 0,
        bytes: 400,
        end: CopyEnd::Failed(CopyError::Block(BlockError::Aborted)),
    };
    bench.unit.copy_ended(first.ticket, &outcome);
    let data = receive(&mut bench, 5, 0).data;
    assert_eq!((data[5], data[12], data[13], u64_at(&data, 16)), (2, 2, 18, 400));
    assert_eq!((data.len(), data[32 + 2]), (32 + 18, 10));
    assert!(bench.unit.copy_progress(tickets[3], 0, 0));
    bench.unit.detach(NexusId(0));
    assert!(!bench.unit.copy_progress(tickets[3], 0, 0), "its nexus is gone");
    assert!(bench.unit.copy_progress(tickets[1], 0, 0));
    bench.unit.lun_reset();
    assert!(!bench.unit.copy_progress(tickets[1], 0, 0), "reset");
    for ticket in &tickets {
        bench.unit.copy_ended(*ticket, &outcome);
        assert!(!bench.unit.copy_progress(*ticket, 0, 0), "it is over");
    }
    bench.unit.attach(NexusId(0), initiator(0));
    bench.attention(0);
    assert_eq!(bench.give(&cdb, &list(99)).status, GOOD, "there is room again");
}

#[test]
fn an_immediate_copy_answers_first() {
    let mut bench = Bench::small();
    numbered(&mut bench);
    let list = lid4(5, 1, &cscd(512), &segment(0, 0, 1, 3, 50));
    let cdb = with_lengths(0x83, 1, 0, true, list.len() as u32);
    let plan = begin(&mut bench, 0, &cdb, &list);
    let Plan::Early(reply, BlockOp::Copy(request)) = plan else {
        panic!("{plan:?}");
    };
    assert_eq!((reply.status, reply.transfer_len), (GOOD, list.len() as u64));
    assert_eq!(receive(&mut bench, 5, 5).data[5], 0x12, "in the background");
    bench.copy(&request);
    assert_eq!((receive(&mut bench, 5, 5).data[5], block(&bench, 50)[0]), (1, 4));
}

#[test]
fn remembered_copies_are_bounded() {
    let mut bench = Bench::small();
    for id in 0..40 {
        let list = lid4(id, 0, &cscd(512), &segment(0, 0, 1, 0, 8));
        assert_eq!(extended_copy(&mut bench, 1, &list).status, GOOD);
    }
    assert_eq!(
        sense(&receive(&mut bench, 5, 7)),
        INVALID_FIELD,
        "the oldest are forgotten"
    );
    assert_eq!(receive(&mut bench, 5, 8).status, GOOD);
}

#[test]
fn a_token_is_a_point_in_time() {
    for mut bench in Bench::both() {
        numbered(&mut bench);
        assert_eq!(populate(&mut bench, 7, &[(10, 2), (2, 1)]).status, GOOD);
        let token = token_of(&mut bench, 7);
        assert_eq!(token[..8], [0, 0x80, 0, 0, 0, 0, 1, 0xf8]);
        assert_eq!(
            (&token[24..40], u64_at(&token, 56)),
            (&NAA[..], 3 * bench.block as u64)
        );
        assert!(token[128..].iter().any(|byte| *byte != 0));
        bench.fill(0xee);
        assert_eq!(
            write_using(&mut bench, 8, &token, 0, &[(20, 1), (30, 2)]).status,
            GOOD
        );
        assert_eq!([20, 30, 31].map(|lba| block(&bench, lba)[0]), [11, 12, 3]);
        let data = receive(&mut bench, 7, 8).data;
        assert_eq!(data[4], 0x11, "of WRITE USING TOKEN");
        assert_eq!(
            (data[5], u64_at(&data, 16), u32_at(&data, 32), data.len()),
            (1, 3, 0, 36)
        );
        // From an offset on, and again: a token is not used up.
        assert_eq!(write_using(&mut bench, 9, &token, 2, &[(40, 1)]).status, GOOD);
        assert_eq!(block(&bench, 40)[0], 3);
        for (skip, blocks) in [(3, 1), (2, 2), (u64::MAX, 1)] {
            assert_eq!(
                sense(&write_using(&mut bench, 9, &token, skip, &[(40, blocks)])),
                INVALID_LIST
            );
        }
    }
}

#[test]
fn the_zero_token_writes_zeroes() {
    let mut bench = Bench::small();
    bench.fill(0xee);
    assert_eq!(
        write_using(&mut bench, 1, &zero_token(), 12, &[(8, 8), (100, 1)]).status,
        GOOD
    );
    assert_eq!(
        [7, 8, 15, 16, 100].map(|lba| block(&bench, lba)[0]),
        [0xee, 0, 0, 0xee, 0]
    );
    assert_eq!(u64_at(&receive(&mut bench, 7, 1).data, 16), 9);
}

#[test]
fn tokens_that_are_none_are_refused() {
    let mut bench = Bench::small();
    populate(&mut bench, 1, &[(0, 1)]);
    let token = token_of(&mut bench, 1);
    for at in [8, 24, 128, 511] {
        let mut forged = token.clone();
        forged[at] ^= 1;
        assert_eq!(
            sense(&write_using(&mut bench, 2, &forged, 0, &[(8, 1)])),
            Some((5, 0x2304)),
            "byte {at}"
        );
    }
    let with = |at: usize, byte: u8| {
        let mut token = token.clone();
        token[at] = byte;
        token
    };
    assert_eq!(
        sense(&write_using(&mut bench, 2, &with(7, 0), 0, &[(8, 1)])),
        Some((5, 0x230a))
    );
    assert_eq!(
        sense(&write_using(&mut bench, 2, &with(0, 1), 0, &[(8, 1)])),
        Some((5, 0x2301))
    );
    for (error, expected) in [
        (CopyError::TokenExpired, 0x2307),
        (CopyError::TokenCancelled, 0x2308),
        (CopyError::NoTokenResources, 0x550d),
    ] {
        bench.copy_failure = Some(error);
        assert_eq!(
            sense(&write_using(&mut bench, 2, &token, 0, &[(8, 1)])),
            Some((5, expected))
        );
    }
    bench.copy_failure = Some(CopyError::Block(BlockError::NoSpace));
    let reply = write_using(&mut bench, 2, &token, 0, &[(8, 1)]);
    assert_eq!(sense(&reply), Some((7, 0x2707)), "as a write without space");
    let data = receive(&mut bench, 7, 2).data;
    assert_eq!((data[5], data[12], data[13]), (2, 2, 18));
    assert_eq!((&data[32..50], u32_at(&data, 50)), (&reply.sense[..], 0));
}

#[test]
fn token_lists_are_checked_field_by_field() {
    let mut bench = Bench::small();
    let blocks = bench.blocks;
    for (header, action, make) in [
        (16, 0x10_u8, populate_list(0, &[(0, 1), (8, 1)])),
        (536, 0x11, write_list(&zero_token(), 0, &[(0, 1), (8, 1)])),
    ] {
        let send =
            |bench: &mut Bench, list: &[u8]| sense(&bench.give(&token_cdb(action, 1, list.len()), list));
        assert_eq!(send(&mut bench, &make), None);
        assert_eq!(send(&mut bench, &make[..header - 1]), LIST_LENGTH);
        assert_eq!(
            send(&mut bench, &make[..header + 16]),
            LIST_LENGTH,
            "it says that it is longer"
        );
        let with = |at: usize, value: u16| {
            let mut list = make.clone();
            list[at..at + 2].copy_from_slice(&value.to_be_bytes());
            list
        };
        assert_eq!(
            send(&mut bench, &with(0, header as u16 + 13)),
            INVALID_LIST,
            "no range"
        );
        assert_eq!(send(&mut bench, &with(header - 2, 15)), INVALID_LIST);
        assert_eq!(
            send(&mut bench, &with(header - 2, 33)),
            INVALID_LIST,
            "more than came"
        );
        assert_eq!(
            send(&mut bench, &with(header - 2, 31)),
            None,
            "a part of a descriptor is none"
        );
        let with_ranges = |ranges: &[(u64, u32)]| match action {
            0x10 => populate_list(0, ranges),
            _ => write_list(&zero_token(), 0, ranges),
        };
        assert_eq!(send(&mut bench, &with_ranges(&[(blocks - 1, 2)])), LBA_RANGE);
        assert_eq!(send(&mut bench, &with_ranges(&[(u64::MAX, 2)])), LBA_RANGE);
        assert_eq!(
            send(&mut bench, &with_ranges(&[(9, 2), (0, 10)])),
            INVALID_LIST,
            "overlap"
        );
        assert_eq!(send(&mut bench, &with_ranges(&[(9, 2), (0, 9)])), None);
        let many: Vec<(u64, u32)> = (0..65).map(|n| (n, 1)).collect();
        assert_eq!(send(&mut bench, &with_ranges(&many)), Some((5, 0x2608)));
        assert_eq!(send(&mut bench, &with_ranges(&many[..64])), None);
    }
    // A token of nothing cannot be used; writing nothing is done at once.
    assert_eq!(sense(&populate(&mut bench, 1, &[(5, 0)])), INVALID_LIST);
    assert_eq!(
        write_using(&mut bench, 1, &zero_token(), 0, &[(5, 0)]).status,
        GOOD
    );
    let list = populate_list(301, &[(0, 1)]);
    assert_eq!(
        sense(&bench.give(&token_cdb(0x10, 1, list.len()), &list)),
        INVALID_LIST
    );
    for (kind, expected) in [(0x0080_0000_u32, None), (0x0001_0000, INVALID_LIST)] {
        let mut list = populate_list(300, &[(0, 1)]);
        list[2] = 0x80;
        list[8..12].copy_from_slice(&kind.to_be_bytes());
        assert_eq!(
            sense(&bench.give(&token_cdb(0x10, 1, list.len()), &list)),
            expected
        );
    }
}

#[test]
fn a_write_that_took_long_enough_says_how_far_it_is() {
    let mut bench = Bench::small();
    let list = write_list(&zero_token(), 0, &[(0, 100)]);
    let request = request(begin(&mut bench, 0, &token_cdb(0x11, 4, list.len()), &list));
    let outcome = CopyOutcome {
        segments: 0,
        bytes: 60 * 512,
        end: CopyEnd::Partial,
    };
    bench.unit.copy_ended(request.ticket, &outcome);
    let data = receive(&mut bench, 7, 4).data;
    assert_eq!((data[5], data[12], u64_at(&data, 16)), (3, 0, 60));
}

#[test]
fn copies_respect_reservations_and_write_protection() {
    let mut bench = Bench::small();
    let key = [[0; 8], 5_u64.to_be_bytes(), [0; 8]].concat();
    assert_eq!(
        bench.send(1, &[0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0], &key, 0).status,
        GOOD
    );
    let key = [5_u64.to_be_bytes(), [0; 8], [0; 8]].concat();
    assert_eq!(
        bench.send(1, &[0x5f, 1, 1, 0, 0, 0, 0, 0, 24, 0], &key, 0).status,
        GOOD
    );
    let list = lid1(1, 0, &cscd(512), &segment(0, 0, 1, 0, 8));
    assert_eq!(extended_copy(&mut bench, 0, &list).status, CONFLICT);
    assert_eq!(
        write_using(&mut bench, 1, &zero_token(), 0, &[(0, 1)]).status,
        CONFLICT
    );
    assert_eq!(receive(&mut bench, 3, 0).status, CONFLICT);
    assert_eq!(
        populate(&mut bench, 1, &[(0, 1)]).status,
        GOOD,
        "it reads, and that is allowed"
    );
    assert_eq!(receive(&mut bench, 7, 1).status, GOOD);
    assert_eq!(bench.unit.copy_admits(NexusId(0), false), Ok(()));
    assert_eq!(bench.unit.copy_admits(NexusId(0), true), Err(CopyError::Reserved));
    assert_eq!(bench.unit.copy_admits(NexusId(1), true), Ok(()));
    assert_eq!(
        bench.unit.copy_admits(NexusId(77), false),
        Err(CopyError::Unreachable)
    );
    let mut protected = Bench::read_only();
    assert_eq!(
        sense(&write_using(&mut protected, 1, &zero_token(), 0, &[(0, 1)])),
        PROTECTED
    );
    assert_eq!(populate(&mut protected, 1, &[(0, 1)]).status, GOOD);
    assert_eq!(
        sense(&extended_copy(&mut protected, 0, &list)),
        Some((10, 0x2700))
    );
}

#[test]
fn the_third_party_copy_page() {
    for mut bench in Bench::both() {
        let block = bench.block as u64;
        assert_eq!(bench.data(&[0x12, 0, 0, 0, 96, 0])[5] & 0x08, 0x08, "3PC");
        let page = bench.data(&[0x12, 1, 0x8f, 4, 0, 0]);
        assert_eq!((page[1], u16_at(&page, 2) as usize), (0x8f, page.len() - 4));
        let mut kinds = Vec::new();
        let mut rest = &page[4..];
        while !rest.is_empty() {
            let len = 4 + u16_at(rest, 2) as usize;
            assert_eq!(len % 4, 0);
            kinds.push(u16_at(rest, 0));
            rest = &rest[len..];
        }
        assert_eq!(kinds, [0, 1, 4, 8, 0x106, 0x108, 0x8001]);
        // Block device ROD token limits come first.
        let limits = &page[4..40];
        assert_eq!((u16_at(limits, 2), u16_at(limits, 10)), (0x20, 64));
        assert_eq!((u32_at(limits, 12), u32_at(limits, 16)), (300, 60));
        assert_eq!(
            (u64_at(limits, 20), u64_at(limits, 28)),
            ((64 << 30) / block, (256 << 20) / block)
        );
        let commands = &page[40..];
        let len = commands[4] as usize;
        assert_eq!(
            commands[5..5 + len],
            [
                0x83, 5, 0x00, 0x01, 0x10, 0x11, 0x1c, 0x84, 5, 0x00, 0x03, 0x04, 0x05, 0x07
            ]
        );
    }
}

#[test]
fn the_secret_is_in_no_log() {
    let bench = Bench::small();
    let token = bench.unit.rod_token(512, 17, &[0xa5; RodToken::SECRET_LEN]);
    assert_eq!(format!("{token:?}"), "RodToken(17)");
    assert_eq!(token.identifier(), 17);
    assert_eq!(token, token.clone());
    assert_ne!(
        token,
        bench.unit.rod_token(512, 17, &[0xa4; RodToken::SECRET_LEN])
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// Lists whose lengths, counts and contents have nothing to do with each other: no panic, and what is planned stays
    /// inside the unit and the limits.
    #[test]
    fn hostile_lists(
        action in prop_oneof![Just(0_u8), Just(1), Just(0x10), Just(0x11)],
        base in 0..5_u8,
        changes in prop::collection::vec((0..700_usize, prop_oneof![any::<u8>(), Just(0), Just(0xff)]), 0..8),
        cut in 0..900_usize,
        said in prop_oneof![Just(None), (0..1000_u32).prop_map(Some), any::<u32>().prop_map(Some)],
    ) {
        let mut list = match base {
            0 => lid1(1, 0, &cscd(512).repeat(3), &segment(0, 2, 9, 0, 80).repeat(4)),
            1 => lid4(1, 0, &cscd(512), &segment(0, 0, 9, 0, 80).repeat(9)),
            2 => populate_list(9, &[(0, 5), (9, 7), (20, 2)]),
            3 => write_list(&zero_token(), 0, &[(0, 5), (9, 7), (20, 2)]),
            _ => vec![0; 800],
        };
        for (at, byte) in changes {
            if let Some(to) = list.get_mut(at) { *to = byte; }
        }
        list.truncate(cut);
        let mut bench = Bench::small();
        let cdb = with_lengths(0x83, action, 0, true, said.unwrap_or(list.len() as u32));
        let reply = bench.give(&cdb, &Bytes::from(list));
        prop_assert!(matches!(reply.status, 0x00 | 0x02));
    }

    #[test]
    fn any_question_about_copies(action in 0..32_u8, list in any::<u32>(), allocation in 0..2000_u32) {
        let mut bench = Bench::small();
        populate(&mut bench, list, &[(0, 1)]);
        let reply = bench.ask(&with_lengths(0x84, action, list, false, allocation));
        prop_assert!(reply.data.len() <= allocation as usize);
        prop_assert_eq!(reply.status == CHECK, !matches!(action, 3 | 5 | 7));
    }
}
