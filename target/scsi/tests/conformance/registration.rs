//! PERSISTENT RESERVE OUT that concerns other ports: SPEC_I_PT, ALL_TG_PT and REGISTER AND MOVE (SPC-4 §5.12.7, §5.12.8).

use proptest::prelude::*;
use stillpoint_scsi::{BlockSize, MAX_REGISTRATIONS, NexusId, NexusName, Reply, TargetPort, Unit};

use crate::bench::*;

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const REGISTER_AND_IGNORE: u8 = 6;
const REGISTER_AND_MOVE: u8 = 7;
const ALL_TG_PT: u8 = 0x04;
const SPEC_I_PT: u8 = 0x08;

const INVALID_LIST: Option<(u8, u16)> = Some((5, 0x2600));
const LIST_LENGTH: Option<(u8, u16)> = Some((5, 0x1a00));

/// Ports of two targets with the same portal group tags.
fn ports() -> Vec<TargetPort> {
    let port = |target: &str, portal_group| TargetPort {
        target: target.into(),
        portal_group,
    };
    vec![
        port("iqn.2026-11.com.example:a", 1),
        port("iqn.2026-11.com.example:a", 2),
        port("iqn.2026-11.com.example:sql01", 1),
    ]
}

fn shared() -> Bench {
    let mut spec = spec(BlockSize::B512, 4096);
    spec.ports = ports();
    Bench::with(spec)
}

fn transport_id(initiator: &str, isid: Option<&str>) -> Vec<u8> {
    let mut text = initiator.as_bytes().to_vec();
    if let Some(isid) = isid {
        text.extend_from_slice(b",i,0x");
        text.extend_from_slice(isid.as_bytes());
    }
    text.resize((text.len() + 1).next_multiple_of(4).max(20), 0);
    let mut id = vec![if isid.is_some() { 0x45 } else { 0x05 }, 0, 0, text.len() as u8];
    id.extend_from_slice(&text);
    id
}

fn host(n: u64) -> String {
    format!("iqn.2026-11.com.example:host{n}")
}

fn list(key: u64, action_key: u64, flags: u8, ids: &[Vec<u8>]) -> Vec<u8> {
    let mut list = [key.to_be_bytes(), action_key.to_be_bytes(), [0; 8]].concat();
    list[20] = flags;
    if flags & SPEC_I_PT != 0 {
        let ids = ids.concat();
        list.extend_from_slice(&(ids.len() as u32).to_be_bytes());
        list.extend_from_slice(&ids);
    }
    list
}

fn move_list(key: u64, action_key: u64, flags: u8, port: u16, id: &[u8]) -> Vec<u8> {
    let mut list = [key.to_be_bytes(), action_key.to_be_bytes()].concat();
    list.extend_from_slice(&[0, flags]);
    list.extend_from_slice(&port.to_be_bytes());
    list.extend_from_slice(&(id.len() as u32).to_be_bytes());
    list.extend_from_slice(id);
    list
}

fn out(bench: &mut Bench, n: u64, action: u8, kind: u8, list: &[u8]) -> Reply {
    let [high, low] = (list.len() as u16).to_be_bytes();
    bench.send(n, &[0x5f, action, kind, 0, 0, 0, 0, high, low, 0], list, 0)
}

/// Key, R_HOLDER, relative target port identifier and name of each registrant.
fn registrants(bench: &mut Bench) -> Vec<(u64, bool, u16, String)> {
    let data = bench.data(&[0x5e, 3, 0, 0, 0, 0, 0, 0x40, 0, 0]);
    let mut rest = &data[8..];
    let mut seen = Vec::new();
    while !rest.is_empty() {
        let len = u32_at(rest, 20) as usize;
        let text = String::from_utf8(rest[28..24 + len].to_vec()).expect("UTF-8");
        seen.push((
            u64_at(rest, 0),
            rest[12] & 1 != 0,
            u16_at(rest, 18),
            text.trim_end_matches('\0').to_owned(),
        ));
        rest = &rest[24 + len..];
    }
    seen
}

fn port_name(n: u64, isid: &str) -> String {
    format!("{},i,0x{isid}", host(n))
}

const ISID: &str = "00023d000001";

#[test]
fn registering_for_other_initiator_ports_is_all_or_nothing() {
    let mut bench = Bench::small();
    let ids = [
        transport_id(&host(1), Some(ISID)),
        // A host that never logged in, in capital letters.
        transport_id(&host(7).to_uppercase(), Some("00023D00000A")),
        // The whole device: its one port that is known.
        transport_id(&host(2), None),
    ];
    let unknown = [transport_id(&host(8), None)];
    let refused = out(&mut bench, 0, REGISTER, 0, &list(0, 5, SPEC_I_PT, &unknown));
    assert_eq!(sense(&refused), INVALID_LIST, "no port of that device is known");
    assert!(registrants(&mut bench).is_empty());
    let reply = out(&mut bench, 0, REGISTER, 0, &list(0, 5, SPEC_I_PT, &ids));
    assert_eq!(
        (reply.status, reply.transfer_len),
        (GOOD, list(0, 5, SPEC_I_PT, &ids).len() as u64)
    );
    let names: Vec<_> = registrants(&mut bench).into_iter().map(|r| (r.0, r.3)).collect();
    assert_eq!(
        names,
        [
            (5, port_name(0, ISID)),
            (5, port_name(1, ISID)),
            (5, port_name(7, "00023d00000a")),
            (5, port_name(2, ISID)),
        ]
    );
    // From a registered I_T nexus, and with REGISTER AND IGNORE EXISTING KEY, it is an error.
    for action in [REGISTER, REGISTER_AND_IGNORE] {
        let again = out(&mut bench, 0, action, 0, &list(5, 6, SPEC_I_PT, &ids));
        assert_eq!(sense(&again), INVALID_LIST, "action {action}");
    }
    // Whoever is registered already keeps the key it has.
    assert_eq!(out(&mut bench, 1, REGISTER, 0, &list(5, 0, 0, &[])).status, GOOD);
    let of_two = [transport_id(&host(2), Some(ISID))];
    assert_eq!(
        out(&mut bench, 1, REGISTER, 0, &list(0, 9, SPEC_I_PT, &of_two)).status,
        GOOD
    );
    let keys: Vec<_> = registrants(&mut bench).into_iter().map(|r| r.0).collect();
    assert_eq!(keys, [5, 5, 5, 9]);
}

#[test]
fn too_many_named_ports_register_nobody() {
    let mut bench = Bench::small();
    let ids: Vec<_> = (0..MAX_REGISTRATIONS as u64)
        .map(|n| transport_id(&host(100 + n), Some(ISID)))
        .collect();
    let reply = out(&mut bench, 0, REGISTER, 0, &list(0, 5, SPEC_I_PT, &ids));
    assert_eq!(sense(&reply), Some((5, 0x5504)));
    assert!(registrants(&mut bench).is_empty());
    assert_eq!(
        out(&mut bench, 0, REGISTER, 0, &list(0, 5, SPEC_I_PT, &ids[1..])).status,
        GOOD
    );
    assert_eq!(registrants(&mut bench).len(), MAX_REGISTRATIONS);
}

#[test]
fn all_target_ports_register_and_unregister_together() {
    let mut bench = shared();
    assert_eq!(
        out(&mut bench, 0, REGISTER, 0, &list(0, 5, ALL_TG_PT, &[])).status,
        GOOD
    );
    let seen: Vec<_> = registrants(&mut bench).into_iter().map(|r| (r.0, r.2)).collect();
    // Counted, as both targets have a portal group 1; the sender came through the third.
    assert_eq!(seen, [(5, 3), (5, 1), (5, 2)]);
    let elsewhere = NexusName {
        port: ports()[0].clone(),
        ..initiator(0)
    };
    bench.unit.attach(NexusId(10), elsewhere);
    assert_eq!(bench.attention(10), Some(0x2900));
    assert_eq!(out(&mut bench, 10, RESERVE, 1, &list(5, 0, 0, &[])).status, GOOD);
    // It was registered there, so the key can be changed there alone.
    assert_eq!(out(&mut bench, 10, REGISTER, 0, &list(5, 6, 0, &[])).status, GOOD);
    assert_eq!(
        out(&mut bench, 0, REGISTER, 0, &list(5, 0, ALL_TG_PT, &[])).status,
        GOOD
    );
    assert!(registrants(&mut bench).is_empty(), "everywhere");
    assert_eq!(
        bench.send(1, &cdb(0x2a, 0, 0, 1), &[0; 512], 0).status,
        GOOD,
        "released"
    );
}

#[test]
fn the_port_of_the_answer_is_the_port_of_full_status() {
    let mut bench = shared();
    let page = bench.data(&[0x12, 1, 0x83, 2, 0, 0]);
    let relative = page
        .windows(8)
        .find(|d| d[..2] == [0x51, 0x94] && d[3] == 4)
        .expect("designator");
    assert_eq!(u32_at(relative, 4), 3);
    let groups = bench.data(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0]);
    assert_eq!(
        (
            groups[11],
            u32_at(&groups, 12),
            u32_at(&groups, 16),
            u32_at(&groups, 20)
        ),
        (3, 1, 2, 3)
    );
}

#[test]
fn a_reservation_moves_with_a_new_key() {
    for unregister in [false, true] {
        let mut bench = shared();
        out(&mut bench, 0, REGISTER, 0, &list(0, 100, 0, &[]));
        out(&mut bench, 1, REGISTER, 0, &list(0, 101, 0, &[]));
        assert_eq!(out(&mut bench, 0, RESERVE, 3, &list(100, 0, 0, &[])).status, GOOD);
        let to = transport_id(&host(9), Some(ISID));
        let flags = if unregister { 0x02 } else { 0 };
        let reply = out(
            &mut bench,
            0,
            REGISTER_AND_MOVE,
            0,
            &move_list(100, 77, flags, 2, &to),
        );
        assert_eq!(reply.status, GOOD);
        let mut expected = vec![
            (100, false, 3, port_name(0, ISID)),
            (101, false, 3, port_name(1, ISID)),
            (77, true, 2, port_name(9, ISID)),
        ];
        if unregister {
            expected.remove(0);
        }
        assert_eq!(registrants(&mut bench), expected);
        assert_eq!(
            bench.send(0, &cdb(0x28, 0, 0, 1), &[], 512).status,
            CONFLICT,
            "it is out"
        );
        let there = NexusName {
            port: ports()[1].clone(),
            ..initiator(9)
        };
        bench.unit.attach(NexusId(9), there);
        assert_eq!(bench.attention(9), Some(0x2900));
        assert_eq!(
            bench.send(9, &cdb(0x28, 0, 0, 1), &[], 512).status,
            GOOD,
            "it is in"
        );
        // Nobody lost anything that it has to hear of.
        assert_eq!(bench.attention(1), None);
    }
}

#[test]
fn moving_to_a_registrant_changes_its_key() {
    let mut bench = Bench::small();
    out(&mut bench, 0, REGISTER, 0, &list(0, 100, 0, &[]));
    out(&mut bench, 1, REGISTER, 0, &list(0, 101, 0, &[]));
    out(&mut bench, 0, RESERVE, 5, &list(100, 0, 0, &[]));
    let to = transport_id(&host(1), Some(ISID));
    assert_eq!(
        out(
            &mut bench,
            0,
            REGISTER_AND_MOVE,
            0,
            &move_list(100, 55, 0, 1, &to)
        )
        .status,
        GOOD
    );
    let seen: Vec<_> = registrants(&mut bench).into_iter().map(|r| (r.0, r.1)).collect();
    assert_eq!(seen, [(100, false), (55, true)]);
}

#[test]
fn what_cannot_be_moved_stays() {
    let mut bench = Bench::small();
    let to = transport_id(&host(1), Some(ISID));
    let good = move_list(100, 55, 0, 1, &to);
    assert_eq!(
        out(&mut bench, 0, REGISTER_AND_MOVE, 0, &good).status,
        CONFLICT,
        "unregistered"
    );
    out(&mut bench, 0, REGISTER, 0, &list(0, 100, 0, &[]));
    out(&mut bench, 2, REGISTER, 0, &list(0, 102, 0, &[]));
    assert_eq!(
        sense(&out(&mut bench, 0, REGISTER_AND_MOVE, 0, &good)),
        INVALID_FIELD,
        "no reservation"
    );
    for kind in [7, 8] {
        out(&mut bench, 0, RESERVE, kind, &list(100, 0, 0, &[]));
        assert_eq!(
            out(&mut bench, 0, REGISTER_AND_MOVE, 0, &good).status,
            CONFLICT,
            "type {kind}"
        );
        out(&mut bench, 0, 2, kind, &list(100, 0, 0, &[]));
        bench.attention(2);
    }
    out(&mut bench, 0, RESERVE, 1, &list(100, 0, 0, &[]));
    let by_other = move_list(102, 55, 0, 1, &to);
    assert_eq!(
        sense(&out(&mut bench, 2, REGISTER_AND_MOVE, 0, &by_other)),
        INVALID_FIELD,
        "no holder"
    );
    let wrong_key = move_list(1, 55, 0, 1, &to);
    assert_eq!(
        out(&mut bench, 0, REGISTER_AND_MOVE, 0, &wrong_key).status,
        CONFLICT
    );
    let myself = transport_id(&host(0), Some(ISID));
    let device = transport_id(&host(1), None);
    for (list, what) in [
        (move_list(100, 0, 0, 1, &to), "no key"),
        (move_list(100, 55, 0, 9, &to), "no such port"),
        (move_list(100, 55, 0, 1, &myself), "itself"),
        (move_list(100, 55, 0, 1, &device), "no single port"),
    ] {
        assert_eq!(
            sense(&out(&mut bench, 0, REGISTER_AND_MOVE, 0, &list)),
            INVALID_LIST,
            "{what}"
        );
    }
    for cut in [
        &good[..24],
        &good[..good.len() - 4],
        &[good.clone(), vec![0; 4]].concat()[..],
    ] {
        assert_eq!(sense(&out(&mut bench, 0, REGISTER_AND_MOVE, 0, cut)), LIST_LENGTH);
    }
    let seen: Vec<_> = registrants(&mut bench).into_iter().map(|r| (r.0, r.1)).collect();
    assert_eq!(seen, [(100, true), (102, false)]);
}

#[test]
fn transport_ids_that_are_none_are_refused() {
    let good = transport_id(&host(1), Some(ISID));
    let with = |at: usize, byte: u8| {
        let mut id = good.clone();
        id[at] = byte;
        id
    };
    let text = |text: &str| {
        let mut id = transport_id(text, None);
        id[0] = 0x45;
        id
    };
    for (id, what) in [
        (with(0, 0x46), "another protocol"),
        (with(0, 0x85), "a reserved format"),
        (with(good.len() - 1, b'x'), "no null byte at the end"),
        (text("iqn.2026-11.com.example:host1"), "no ISID"),
        (text("iqn.2026-11.com.example:h,i,0x00023d00000"), "eleven digits"),
        (text("iqn.2026-11.com.example:h,i,0x+0023d000001"), "a sign"),
        (text(",i,0x00023d000001"), "no name"),
        (text("iqn.2026 11,i,0x00023d000001"), "a space"),
    ] {
        let mut bench = Bench::small();
        let reply = out(
            &mut bench,
            0,
            REGISTER,
            0,
            &list(0, 5, SPEC_I_PT, std::slice::from_ref(&id)),
        );
        assert_eq!(sense(&reply), INVALID_LIST, "{what}");
        assert!(registrants(&mut bench).is_empty());
    }
}

#[test]
fn moved_and_named_registrations_survive_a_restart() {
    let mut bench = Bench::small();
    let ids = [transport_id(&host(7), Some(ISID))];
    out(&mut bench, 0, REGISTER, 0, &list(0, 5, SPEC_I_PT | 1, &ids));
    out(&mut bench, 0, RESERVE, 1, &list(5, 0, 0, &[]));
    let to = transport_id(&host(7), Some(ISID));
    assert_eq!(
        out(
            &mut bench,
            0,
            REGISTER_AND_MOVE,
            0,
            &move_list(5, 6, 0x03, 1, &to)
        )
        .status,
        GOOD
    );
    let (_, saved) = bench.disk.saved_reservations.last().expect("APTPL").clone();
    let mut after = Bench::small();
    after.unit.restore_reservations(&saved).unwrap();
    assert_eq!(registrants(&mut after), [(6, true, 1, port_name(7, ISID))]);
    // Without APTPL on the move nothing would be kept.
    assert_eq!(after.data(&[0x5e, 2, 0, 0, 0, 0, 0, 0, 8, 0])[3] & 1, 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Lengths and contents at odds: no panic, and a refusal changes nothing.
    #[test]
    fn hostile_lists(
        action in prop_oneof![Just(REGISTER), Just(REGISTER_AND_IGNORE), Just(REGISTER_AND_MOVE), 1..6_u8],
        mut bytes in prop::collection::vec(prop_oneof![3 => Just(0_u8), 1 => any::<u8>()], 0..120),
        flags in any::<u8>(),
        said in 0..140_u16,
        inner in 0..100_u32,
        good_tail in any::<bool>(),
    ) {
        let mut bench = shared();
        let mut unit_list = list(0, 5, 0, &[]);
        unit_list[20] = 1;
        prop_assert_eq!(out(&mut bench, 1, REGISTER, 0, &unit_list).status, GOOD);
        let before = bench.unit.reservation_state();
        if let Some(flag) = bytes.get_mut(20) { *flag = flags; }
        if bytes.len() >= 28 { bytes[24..28].copy_from_slice(&inner.to_be_bytes()); }
        if good_tail { bytes.extend(transport_id(&host(3), Some(ISID))); }
        let [high, low] = said.to_be_bytes();
        let reply = bench.send(0, &[0x5f, action, 1, 0, 0, 0, 0, high, low, 0], &bytes, 0);
        if reply.status != GOOD {
            prop_assert_eq!(bench.unit.reservation_state(), before);
        }
        let state = bench.unit.reservation_state();
        prop_assert!(Unit::new(spec(BlockSize::B512, 4096)).restore_reservations(&state).is_ok());
    }
}
