//! RESERVE and RELEASE, persistent reservations, and what conflicts with what (SPC-4 §5.12, tables 66 and 67;
//! SBC-3 table 13; SPC-2 §5.5.1; libiscsi's ProutReserve*, Prin*, Reserve6).

use stillpoint_scsi::{BlockError, MAX_REGISTRATIONS, NexusId, Reply, Unit};

use crate::bench::*;

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;
const TYPES: [u8; 6] = [1, 3, 5, 6, 7, 8];

const RELEASED: Option<u16> = Some(0x2a04);
const REGISTRATIONS_PREEMPTED: Option<u16> = Some(0x2a05);

fn list(key: u64, action_key: u64, flags: u8) -> [u8; 24] {
    let mut list = [0; 24];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&action_key.to_be_bytes());
    list[20] = flags;
    list
}

fn out_with(bench: &mut Bench, n: u64, action: u8, kind: u8, list: &[u8]) -> Reply {
    let cdb = [0x5f, action, kind, 0, 0, 0, 0, 0, list.len() as u8, 0];
    bench.send(n, &cdb, list, 0)
}

fn out(bench: &mut Bench, n: u64, action: u8, kind: u8, key: u64, action_key: u64) -> u8 {
    out_with(bench, n, action, kind, &list(key, action_key, 0)).status
}

/// Nexus `n` registers with key `100 + n`.
fn register(bench: &mut Bench, n: u64) {
    assert_eq!(out(bench, n, REGISTER_AND_IGNORE, 0, 0, 100 + n), GOOD);
}

/// What an onlooker without pending unit attentions reads.
fn observe(bench: &mut Bench, cdb: &[u8]) -> bytes::Bytes {
    bench.unit.attach(NexusId(90), initiator(90));
    assert_eq!(bench.attention(90), Some(0x2900));
    let reply = bench.send(90, cdb, &[], u64::MAX);
    bench.unit.detach(NexusId(90));
    assert_eq!(reply.status, GOOD);
    reply.data
}

fn generation(bench: &mut Bench) -> u32 {
    u32_at(&observe(bench, &[0x5e, 0, 0, 0, 0, 0, 0, 0x40, 0, 0]), 0)
}

fn keys(bench: &mut Bench) -> Vec<u64> {
    let data = observe(bench, &[0x5e, 0, 0, 0, 0, 0, 0, 0x40, 0, 0]);
    assert_eq!(u32_at(&data, 4) as usize, data.len() - 8);
    data[8..].chunks(8).map(|key| u64_at(key, 0)).collect()
}

/// Key and type of the reservation.
fn standing(bench: &mut Bench) -> Option<(u64, u8)> {
    let data = observe(bench, &[0x5e, 1, 0, 0, 0, 0, 0, 0x40, 0, 0]);
    (u32_at(&data, 4) == 16).then(|| (u64_at(&data, 8), data[21]))
}

fn attentions(bench: &mut Bench) -> [Option<u16>; 3] {
    [0, 1, 2].map(|n| bench.attention(n))
}

/// A unit reserved by nexus 0, with nexus 1 registered and nexus 2 not.
fn reserved(kind: u8) -> Bench {
    let mut bench = Bench::small();
    register(&mut bench, 0);
    register(&mut bench, 1);
    assert_eq!(out(&mut bench, 0, RESERVE, kind, 100, 0), GOOD);
    bench
}

/// How a command fares against another's persistent reservation, by the columns of the standards' tables.
#[derive(Clone, Copy, PartialEq)]
enum Row {
    /// Allowed in every column.
    Free,
    /// Allowed for everybody under a write exclusive type, and for registrants where the type admits them.
    Reads,
    /// Allowed for the holder, and for registrants where the type admits them.
    Changes,
}

fn commands() -> Vec<(Row, Vec<u8>, usize)> {
    use Row::{Changes, Free, Reads};
    let mut commands: Vec<(Row, Vec<u8>, usize)> = vec![
        (Free, vec![0x00, 0, 0, 0, 0, 0], 0),
        (Free, vec![0x03, 0, 0, 0, 18, 0], 0),
        (Free, vec![0x12, 0, 0, 0, 36, 0], 0),
        (Free, vec![0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], 0),
        (Free, vec![0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        (Free, cdb(0x9e, 0x10, 0, 32), 0),
        (Free, vec![0x4d, 0, 0x40, 0, 0, 0, 0, 0, 255, 0], 0),
        (Free, vec![0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], 0),
        (Free, vec![0x1b, 0, 0, 0, 1, 0], 0),
        (Free, vec![0x1e, 0, 0, 0, 0, 0], 0),
        (Free, vec![0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0], 0),
        (Reads, cdb(0x9e, 0x12, 0, 24), 0),
        (Changes, vec![0x1b, 0, 0, 0, 0, 0], 0),
        (Changes, vec![0x1b, 0, 0, 0, 0x31, 0], 0),
        (Changes, vec![0x1e, 0, 0, 0, 1, 0], 0),
        (Reads, vec![0x1a, 0, 0x3f, 0, 255, 0], 0),
        (Reads, vec![0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 255, 0], 0),
        (Changes, vec![0x15, 0x10, 0, 0, 0, 0], 0),
        (Changes, vec![0x55, 0x10, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        (Changes, vec![0x1d, 0x04, 0, 0, 0, 0], 0),
        (Reads, vec![0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], 0),
        (Reads, vec![0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], 0),
        (Changes, vec![0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        (Changes, cdb(0x89, 0, 0, 0), 0),
        (Changes, cdb(0x41, 0, 0, 1), 512),
        (Changes, cdb(0x93, 0, 0, 1), 512),
        (Changes, cdb(0x35, 0, 0, 0), 0),
        (Changes, cdb(0x91, 0, 0, 0), 0),
    ];
    for opcode in [0x08, 0x28, 0xa8, 0x88, 0x2f, 0xaf, 0x8f, 0x34, 0x90] {
        commands.push((Reads, cdb(opcode, 0, 0, 1), 0));
    }
    commands.push((Reads, vec![0x37, 0, 0, 0, 0, 0, 0, 0, 4, 0], 0));
    for opcode in [0x0a, 0x2a, 0xaa, 0x8a, 0x2e, 0xae, 0x8e, 0x8b] {
        commands.push((Changes, cdb(opcode, 0, 0, 1), 512));
    }
    commands
}

#[test]
fn the_conflict_table_of_persistent_reservations() {
    for kind in TYPES {
        let write_exclusive = matches!(kind, 1 | 5 | 7);
        let admits_registrants = kind >= 5;
        let mut bench = reserved(kind);
        for (row, cdb, len) in commands() {
            for n in 0..3 {
                let full = n == 0 || (n == 1 && admits_registrants);
                let allowed = full || row == Row::Free || (row == Row::Reads && write_exclusive);
                let status = bench.send(n, &cdb, &vec![0; len], 512).status;
                assert_eq!(
                    status == CONFLICT,
                    !allowed,
                    "type {kind}, nexus {n}, {cdb:02x?}: {status:#x}"
                );
                assert!(
                    !allowed || matches!(status, GOOD | CONDITION_MET),
                    "{cdb:02x?}: {status:#x}"
                );
            }
        }
    }
}

#[test]
fn a_registration_alone_forbids_nothing() {
    let mut bench = Bench::small();
    register(&mut bench, 0);
    for (_, cdb, len) in commands() {
        assert_ne!(
            bench.send(2, &cdb, &vec![0; len], 512).status,
            CONFLICT,
            "{cdb:02x?}"
        );
    }
}

#[test]
fn register_checks_the_key_and_changes_it() {
    let mut bench = Bench::small();
    assert_eq!(
        out(&mut bench, 0, REGISTER, 0, 1, 5),
        CONFLICT,
        "a key where none is registered"
    );
    assert_eq!(out(&mut bench, 0, REGISTER, 0, 0, 5), GOOD);
    assert_eq!(
        out(&mut bench, 0, REGISTER, 0, 0, 6),
        CONFLICT,
        "libiscsi: a second registration fails"
    );
    assert_eq!(out(&mut bench, 0, REGISTER, 0, 5, 6), GOOD);
    assert_eq!(out(&mut bench, 0, REGISTER_AND_IGNORE, 0, 999, 7), GOOD);
    assert_eq!(
        out(&mut bench, 1, REGISTER, 0, 0, 7),
        GOOD,
        "two may have the same key"
    );
    assert_eq!((keys(&mut bench), generation(&mut bench)), (vec![7, 7], 4));
    assert_eq!(out(&mut bench, 0, REGISTER, 0, 7, 0), GOOD);
    assert_eq!(
        out(&mut bench, 2, REGISTER_AND_IGNORE, 0, 0, 0),
        GOOD,
        "nothing to take away"
    );
    assert_eq!(keys(&mut bench), [7]);
}

#[test]
fn registrations_are_bounded() {
    let mut bench = Bench::small();
    for n in 10..10 + MAX_REGISTRATIONS as u64 {
        bench.unit.attach(NexusId(n), initiator(n));
        bench.attention(n);
        register(&mut bench, n);
    }
    let reply = out_with(&mut bench, 0, REGISTER, 0, &list(0, 5, 0));
    assert_eq!(sense(&reply), Some((5, 0x5504)));
}

#[test]
fn the_basic_parameter_list_is_24_bytes() {
    let mut bench = Bench::small();
    for len in [0, 8, 23, 25] {
        assert_eq!(
            sense(&out_with(&mut bench, 0, REGISTER, 0, &vec![0; len])),
            Some((5, 0x1a00)),
            "{len}"
        );
    }
    // Announced, but it did not come.
    let cdb = [0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(sense(&bench.send(0, &cdb, &[0; 16], 0)), Some((5, 0x1a00)));
    // SPEC_I_PT announces more than the basic list.
    assert_eq!(
        sense(&out_with(&mut bench, 0, REGISTER, 0, &list(0, 5, 0x08))),
        Some((5, 0x1a00))
    );
    assert!(keys(&mut bench).is_empty());
}

#[test]
fn every_type_can_be_reserved_and_released() {
    for kind in TYPES {
        let mut bench = reserved(kind);
        let key = if kind >= 7 { 0 } else { 100 };
        assert_eq!(standing(&mut bench), Some((key, kind)));
        assert_eq!(out(&mut bench, 0, RESERVE, kind, 100, 0), GOOD, "the same again");
        let other = if kind == 1 { 3 } else { 1 };
        assert_eq!(
            out(&mut bench, 0, RESERVE, other, 100, 0),
            CONFLICT,
            "not another type"
        );
        let by_registrant = if kind >= 7 { GOOD } else { CONFLICT };
        assert_eq!(out(&mut bench, 1, RESERVE, kind, 101, 0), by_registrant);
        assert_eq!(out(&mut bench, 2, RESERVE, kind, 0, 0), CONFLICT, "unregistered");
        assert_eq!(out(&mut bench, 0, RELEASE, kind, 999, 0), CONFLICT, "wrong key");
        let wrong_type = out_with(&mut bench, 0, RELEASE, other, &list(100, 0, 0));
        assert_eq!(sense(&wrong_type), Some((5, 0x2604)));
        let before = generation(&mut bench);
        assert_eq!(out(&mut bench, 0, RELEASE, kind, 100, 0), GOOD);
        assert_eq!((standing(&mut bench), generation(&mut bench)), (None, before));
        let told = if kind >= 5 { RELEASED } else { None };
        assert_eq!(attentions(&mut bench), [None, told, None], "type {kind}");
        assert_eq!(
            out(&mut bench, 0, RELEASE, kind, 100, 0),
            GOOD,
            "nothing to release"
        );
    }
}

#[test]
fn scope_and_type_must_be_known() {
    let mut bench = Bench::small();
    register(&mut bench, 0);
    for kind in [0, 2, 4, 9, 0xf, 0x11, 0x25] {
        assert_eq!(
            sense(&out_with(&mut bench, 0, RESERVE, kind, &list(100, 0, 0))),
            INVALID_FIELD,
            "{kind:#x}"
        );
    }
}

#[test]
fn release_by_another_registrant_does_nothing() {
    let mut bench = reserved(5);
    assert_eq!(out(&mut bench, 1, RELEASE, 5, 101, 0), GOOD);
    assert_eq!(standing(&mut bench), Some((100, 5)));
    assert_eq!(out(&mut bench, 2, RELEASE, 5, 0, 0), CONFLICT);
}

#[test]
fn a_reservation_ends_with_its_holders_registration_or_the_last_one() {
    for kind in TYPES {
        let mut bench = reserved(kind);
        assert_eq!(out(&mut bench, 0, REGISTER, 0, 100, 0), GOOD);
        match kind {
            7 | 8 => {
                assert_eq!(standing(&mut bench), Some((0, kind)));
                assert_eq!(out(&mut bench, 1, REGISTER, 0, 101, 0), GOOD);
                assert_eq!((standing(&mut bench), attentions(&mut bench)), (None, [None; 3]));
            }
            5 | 6 => assert_eq!(
                (standing(&mut bench), attentions(&mut bench)),
                (None, [None, RELEASED, None])
            ),
            _ => assert_eq!((standing(&mut bench), attentions(&mut bench)), (None, [None; 3])),
        }
    }
}

#[test]
fn clear_takes_everything() {
    let mut bench = reserved(6);
    assert_eq!(out(&mut bench, 2, CLEAR, 0, 0, 0), CONFLICT);
    let before = generation(&mut bench);
    assert_eq!(out(&mut bench, 1, CLEAR, 0, 101, 0), GOOD);
    assert_eq!(
        (standing(&mut bench), keys(&mut bench), generation(&mut bench)),
        (None, vec![], before + 1)
    );
    assert_eq!(attentions(&mut bench), [Some(0x2a03), None, None]);
}

#[test]
fn preempt_removes_registrations() {
    let mut bench = Bench::small();
    register(&mut bench, 0);
    register(&mut bench, 1);
    let before = generation(&mut bench);
    assert_eq!(
        out(&mut bench, 1, PREEMPT, 3, 101, 999),
        CONFLICT,
        "nobody has that key"
    );
    assert_eq!(
        sense(&out_with(&mut bench, 1, PREEMPT, 3, &list(101, 0, 0))),
        Some((5, 0x2600))
    );
    assert_eq!(generation(&mut bench), before, "what fails does not count");
    assert_eq!(out(&mut bench, 1, PREEMPT, 3, 101, 100), GOOD);
    assert_eq!(
        (keys(&mut bench), generation(&mut bench), standing(&mut bench)),
        (vec![101], before + 1, None)
    );
    assert_eq!(attentions(&mut bench), [REGISTRATIONS_PREEMPTED, None, None]);
}

#[test]
fn preempt_takes_the_reservation_over() {
    for kind in [1, 3, 5, 6] {
        let mut bench = reserved(kind);
        register(&mut bench, 2);
        assert_eq!(out(&mut bench, 1, PREEMPT, kind, 101, 100), GOOD);
        assert_eq!(
            (standing(&mut bench), keys(&mut bench)),
            (Some((101, kind)), vec![101, 102])
        );
        assert_eq!(attentions(&mut bench), [REGISTRATIONS_PREEMPTED, None, None]);
        // With another type, those who stay hear of that.
        assert_eq!(out(&mut bench, 1, PREEMPT, 8, 101, 101), GOOD);
        assert_eq!(
            (standing(&mut bench), keys(&mut bench)),
            (Some((0, 8)), vec![101, 102])
        );
        assert_eq!(attentions(&mut bench), [None, None, RELEASED]);
    }
}

#[test]
fn preempt_of_a_registrant_leaves_the_reservation() {
    let mut bench = reserved(5);
    register(&mut bench, 2);
    assert_eq!(out(&mut bench, 0, PREEMPT, 5, 100, 102), GOOD);
    assert_eq!(
        (standing(&mut bench), keys(&mut bench)),
        (Some((100, 5)), vec![100, 101])
    );
    assert_eq!(attentions(&mut bench), [None, None, REGISTRATIONS_PREEMPTED]);
    let zero = out_with(&mut bench, 1, PREEMPT, 5, &list(101, 0, 0));
    assert_eq!(sense(&zero), Some((5, 0x2600)));
}

#[test]
fn preempt_of_all_registrants() {
    for kind in [7, 8] {
        let mut bench = reserved(kind);
        register(&mut bench, 2);
        assert_eq!(out(&mut bench, 1, PREEMPT, kind, 101, 102), GOOD, "one of them");
        assert_eq!(
            (standing(&mut bench), keys(&mut bench)),
            (Some((0, kind)), vec![100, 101])
        );
        assert_eq!(attentions(&mut bench), [None, None, REGISTRATIONS_PREEMPTED]);
        assert_eq!(
            out(&mut bench, 1, PREEMPT, 3, 101, 0),
            GOOD,
            "zero: everybody else, and the reservation"
        );
        assert_eq!(
            (standing(&mut bench), keys(&mut bench)),
            (Some((101, 3)), vec![101])
        );
        assert_eq!(attentions(&mut bench), [REGISTRATIONS_PREEMPTED, None, None]);
    }
}

#[test]
fn preempting_ones_own_key_unregisters() {
    let mut bench = reserved(7);
    assert_eq!(out(&mut bench, 1, REGISTER, 0, 101, 100), GOOD);
    assert_eq!(out(&mut bench, 1, PREEMPT, 7, 100, 100), GOOD);
    assert_eq!((standing(&mut bench), keys(&mut bench)), (None, vec![]));
    assert_eq!(attentions(&mut bench), [REGISTRATIONS_PREEMPTED, None, None]);
}

#[test]
fn preempt_and_abort_names_the_victims() {
    let mut bench = reserved(3);
    assert_eq!(out(&mut bench, 1, PREEMPT_AND_ABORT, 3, 101, 100), GOOD);
    assert_eq!(bench.disk.aborted, [NexusId(0)]);
    assert_eq!(standing(&mut bench), Some((101, 3)));
    assert_eq!(attentions(&mut bench), [REGISTRATIONS_PREEMPTED, None, None]);
    // Somebody who is not logged in has no tasks.
    register(&mut bench, 2);
    bench.unit.detach(NexusId(2));
    assert_eq!(out(&mut bench, 1, PREEMPT_AND_ABORT, 3, 101, 102), GOOD);
    assert_eq!((bench.disk.aborted.len(), keys(&mut bench)), (1, vec![101]));
}

#[test]
fn registrations_outlive_logins_and_resets() {
    let mut bench = reserved(5);
    bench.unit.detach(NexusId(1));
    bench.unit.lun_reset();
    bench.unit.attach(NexusId(9), initiator(1));
    assert_eq!(
        (bench.attention(0), bench.attention(9)),
        (Some(0x2903), Some(0x2900))
    );
    assert_eq!(standing(&mut bench), Some((100, 5)));
    assert_eq!(
        bench.send(9, &cdb(0x2a, 0, 0, 1), &[0; 512], 0).status,
        GOOD,
        "the same I_T nexus"
    );
    // Another ISID is another initiator port.
    let mut other = initiator(1);
    other.isid[5] = 2;
    bench.unit.attach(NexusId(10), other);
    assert_eq!(bench.send(10, &cdb(0x2a, 0, 0, 1), &[0; 512], 0).status, CONFLICT);
    assert_eq!(bench.attention(10), Some(0x2900), "the conflict came first");
}

#[test]
fn capabilities_and_truncation() {
    let mut bench = reserved(1);
    let data = bench.data(&[0x5e, 2, 0, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!(data[..], [0, 8, 0x1d, 0x80, 0xea, 0x01, 0, 0]);
    let keys = bench.data(&[0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0]);
    assert_eq!((keys.len(), u32_at(&keys, 4)), (8, 16));
    for action in 4..0x20 {
        assert_eq!(
            sense(&bench.ask(&[0x5e, action, 0, 0, 0, 0, 0, 0, 255, 0])),
            INVALID_FIELD
        );
    }
}

#[test]
fn full_status_names_every_registrant() {
    let mut bench = reserved(5);
    let data = bench.data(&[0x5e, 3, 0, 0, 0, 0, 0, 0x40, 0, 0]);
    assert_eq!(u32_at(&data, 4) as usize, data.len() - 8);
    let mut rest = &data[8..];
    let mut seen = Vec::new();
    while !rest.is_empty() {
        let len = u32_at(rest, 20) as usize;
        let transport_id = &rest[24..24 + len];
        assert_eq!(
            (transport_id[0], usize::from(u16_at(transport_id, 2)), len % 4),
            (0x45, len - 4, 0)
        );
        let text = String::from_utf8(transport_id[4..].to_vec()).unwrap();
        assert!(text.ends_with('\0'));
        seen.push((
            u64_at(rest, 0),
            rest[12],
            rest[13],
            u16_at(rest, 18),
            text.trim_end_matches('\0').to_owned(),
        ));
        rest = &rest[24 + len..];
    }
    let name = |n: u64| format!("iqn.2026-11.com.example:host{n},i,0x00023d000001");
    assert_eq!(seen, [(100, 1, 5, 1, name(0)), (101, 0, 0, 1, name(1))]);
}

#[test]
fn aptpl_saves_before_the_answer_and_comes_back() {
    let mut bench = Bench::small();
    assert_eq!(
        out_with(&mut bench, 0, REGISTER, 0, &list(0, 100, 0x01)).status,
        GOOD
    );
    assert_eq!(
        bench.data(&[0x5e, 2, 0, 0, 0, 0, 0, 0, 255, 0])[3],
        0x81,
        "PTPL_A"
    );
    assert_eq!(out(&mut bench, 0, RESERVE, 5, 100, 0), GOOD);
    let sequences: Vec<u64> = bench
        .disk
        .saved_reservations
        .iter()
        .map(|saved| saved.0)
        .collect();
    assert_eq!(sequences, [1, 2]);
    let saved = bench.disk.saved_reservations.last().unwrap().1.clone();
    assert_eq!(saved, bench.unit.reservation_state());
    // A power cycle: the nexus logs in again.
    let mut after = Bench::small();
    after.unit.restore_reservations(&saved).unwrap();
    assert_eq!(
        (standing(&mut after), keys(&mut after), generation(&mut after)),
        (Some((100, 5)), vec![100], 0)
    );
    assert_eq!(after.send(2, &cdb(0x2a, 0, 0, 1), &[0; 512], 0).status, CONFLICT);
    assert_eq!(out(&mut after, 0, RELEASE, 5, 100, 0), GOOD);
    let again: Vec<u64> = after
        .disk
        .saved_reservations
        .iter()
        .map(|saved| saved.0)
        .collect();
    assert_eq!(again, [3], "APTPL is still active, and the sequence goes on");
    // The last registration decides: without APTPL, an empty state replaces the saved one.
    assert_eq!(out(&mut after, 0, REGISTER, 0, 100, 100), GOOD);
    let mut empty = Bench::small();
    empty
        .unit
        .restore_reservations(&after.disk.saved_reservations.last().unwrap().1)
        .unwrap();
    assert!(keys(&mut empty).is_empty());
    assert!(after.unit.restore_reservations(b"SPPR").is_err());
}

#[test]
fn a_reservation_that_cannot_be_saved_is_no_success() {
    let mut bench = Bench::small();
    bench.disk.failure = Some(BlockError::Fault);
    assert_eq!(
        sense(&out_with(&mut bench, 0, REGISTER, 0, &list(0, 100, 0x01))),
        Some((4, 0x4400))
    );
}

#[test]
fn restored_reservations_need_a_known_state() {
    let mut unit = Unit::new(spec(stillpoint_scsi::BlockSize::B512, 8));
    for bytes in [&b""[..], b"SPPR\x01", &[0xff; 64]] {
        assert!(unit.restore_reservations(bytes).is_err());
    }
}

const RESERVE_6: [u8; 6] = [0x16, 0, 0, 0, 0, 0];
const RELEASE_6: [u8; 6] = [0x17, 0, 0, 0, 0, 0];

#[test]
fn reserve_excludes_the_others_until_release() {
    let forms: [(&[u8], &[u8]); 2] = [
        (&RESERVE_6, &RELEASE_6),
        (
            &[0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
    ];
    for (reserve, release) in forms {
        let mut bench = Bench::small();
        assert_eq!(bench.ask(reserve).status, GOOD);
        assert_eq!(bench.ask(reserve).status, GOOD, "again by its holder");
        assert_eq!(bench.send(1, reserve, &[], 0).status, CONFLICT);
        assert_eq!(bench.send(1, release, &[], 0).status, GOOD, "without effect");
        // SPC-2 table 10, SBC table 3: what others may still do.
        let free: [&[u8]; 6] = [
            &[0x12, 0, 0, 0, 36, 0],
            &[0x03, 0, 0, 0, 18, 0],
            &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
            &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0x4d, 0, 0x40, 0, 0, 0, 0, 0, 255, 0],
            &[0x1e, 0, 0, 0, 0, 0],
        ];
        for cdb in free {
            assert_eq!(bench.send(1, cdb, &[], 512).status, GOOD, "{cdb:02x?}");
        }
        let barred: [&[u8]; 4] = [
            &[0; 6],
            &[0x1a, 0, 0x3f, 0, 255, 0],
            &cdb(0x28, 0, 0, 1),
            &[0x1b, 0, 0, 0, 0, 0],
        ];
        for cdb in barred {
            assert_eq!(bench.send(1, cdb, &[], 512).status, CONFLICT, "{cdb:02x?}");
            assert_eq!(bench.ask(cdb).status, GOOD);
        }
        // Persistent reservations conflict for everybody.
        for n in 0..2 {
            assert_eq!(out(&mut bench, n, REGISTER, 0, 0, 5), CONFLICT);
            assert_eq!(
                bench.send(n, &[0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0], &[], 8).status,
                CONFLICT
            );
        }
        assert_eq!(bench.ask(release).status, GOOD);
        assert_eq!(bench.send(1, reserve, &[], 0).status, GOOD);
    }
}

#[test]
fn reserve_ends_with_the_login_and_with_a_reset() {
    let mut bench = Bench::small();
    assert_eq!(bench.ask(&RESERVE_6).status, GOOD);
    bench.unit.detach(NexusId(0));
    assert_eq!(bench.send(1, &RESERVE_6, &[], 0).status, GOOD);
    bench.unit.lun_reset();
    assert_eq!([bench.attention(1), bench.attention(2)], [Some(0x2903); 2]);
    assert_eq!(bench.send(2, &RESERVE_6, &[], 0).status, GOOD);
}

#[test]
fn third_parties_and_extents_are_refused() {
    let mut bench = Bench::small();
    for flags in [0x10, 0x01] {
        assert_eq!(sense(&bench.ask(&[0x16, flags, 0, 0, 0, 0])), INVALID_FIELD);
    }
}

#[test]
fn reserve_beside_persistent_reservations() {
    // CRH: GOOD without effect for those who have access anyway.
    let mut bench = reserved(5);
    assert_eq!(
        [0, 1, 2].map(|n| bench.send(n, &RESERVE_6, &[], 0).status),
        [GOOD, GOOD, CONFLICT]
    );
    assert_eq!(
        [0, 1, 2].map(|n| bench.send(n, &RELEASE_6, &[], 0).status),
        [GOOD, GOOD, CONFLICT]
    );
    assert_eq!(
        bench.send(1, &cdb(0x2a, 0, 0, 1), &[0; 512], 0).status,
        GOOD,
        "nothing was reserved"
    );
    let mut exclusive = reserved(1);
    assert_eq!(
        [0, 1, 2].map(|n| exclusive.send(n, &RESERVE_6, &[], 0).status),
        [GOOD, CONFLICT, CONFLICT]
    );
    let mut registered = Bench::small();
    register(&mut registered, 0);
    assert_eq!(
        [0, 1].map(|n| registered.send(n, &RESERVE_6, &[], 0).status),
        [CONFLICT; 2]
    );
}
