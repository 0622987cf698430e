//! READ CAPACITY, REPORT SUPPORTED OPERATION CODES and the other reports; diagnostics and START STOP UNIT.

use stillpoint_scsi::{BlockSize, TargetPort};

use crate::bench::*;

#[test]
fn capacity_and_its_truncation() {
    let mut bench = Bench::small();
    let whole = bench.data(&cdb(0x9e, 0x10, 0, 32));
    assert_eq!(
        (whole.len(), u64_at(&whole, 0), u32_at(&whole, 8)),
        (32, 4095, 512)
    );
    assert_eq!(whole[12..16], [0, 3, 0xc0, 0]);
    for allocation in 0..32 {
        assert_eq!(
            bench.data(&cdb(0x9e, 0x10, 0, allocation))[..],
            whole[..allocation as usize]
        );
    }
    let short = bench.data(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((u32_at(&short, 0), u32_at(&short, 4)), (4095, 512));
}

#[test]
fn a_large_unit_overflows_read_capacity_10() {
    for (blocks, expected) in [
        (1_u64 << 32, u32::MAX),
        ((1 << 32) + 1, u32::MAX),
        ((1 << 32) - 1, 0xffff_fffe),
    ] {
        let mut unit = stillpoint_scsi::Unit::new(spec(BlockSize::B512, blocks));
        unit.attach(stillpoint_scsi::NexusId(0), initiator(0));
        let context = stillpoint_scsi::Context {
            nexus: stillpoint_scsi::NexusId(0),
            luns: &[0],
            data_in_max: 32,
        };
        let _attention = unit.plan(&context, &[0; 6], &[]);
        let stillpoint_scsi::Plan::Done(reply) = unit.plan(&context, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[])
        else {
            panic!("planned")
        };
        assert_eq!(u32_at(&reply.data, 0), expected);
        let stillpoint_scsi::Plan::Done(reply) = unit.plan(&context, &cdb(0x9e, 0x10, 0, 32), &[]) else {
            panic!("planned")
        };
        assert_eq!(u64_at(&reply.data, 0), blocks - 1);
    }
}

#[test]
fn a_4kn_unit_has_one_block_in_a_physical_one() {
    let [_, mut bench] = Bench::both();
    let data = bench.data(&cdb(0x9e, 0x10, 0, 32));
    assert_eq!((u32_at(&data, 8), data[13]), (4096, 0));
}

/// REPORT SUPPORTED OPERATION CODES.
fn codes(option: u8, opcode: u8, action: u16, allocation: u32) -> Vec<u8> {
    let mut cdb = vec![0xa3, 0x0c, option, opcode];
    cdb.extend(action.to_be_bytes());
    cdb.extend(allocation.to_be_bytes());
    cdb.extend([0, 0]);
    cdb
}

/// (opcode, service action if it has one, CDB length) of all commands, from the report with or without
/// timeouts.
fn all(bench: &mut Bench, timeouts: bool) -> Vec<(u8, Option<u16>, u16)> {
    let data = bench.data(&codes(if timeouts { 0x80 } else { 0 }, 0, 0, 65535));
    assert_eq!(u32_at(&data, 0) as usize, data.len() - 4);
    let size = if timeouts { 20 } else { 8 };
    let descriptor = |d: &[u8]| {
        assert_eq!(d[5] & 0x02 != 0, timeouts, "CTDP");
        if timeouts {
            assert_eq!((u16_at(d, 8), u32_at(d, 16)), (0x0a, 60));
        }
        let action = u16_at(d, 2);
        assert!(
            d[5] & 0x01 != 0 || action == 0,
            "a service action without SERVACTV"
        );
        (d[0], (d[5] & 0x01 != 0).then_some(action), u16_at(d, 6))
    };
    data[4..].chunks(size).map(descriptor).collect()
}

#[test]
fn each_supported_command_is_reported_in_its_own_form_only() {
    let mut bench = Bench::small();
    let commands = all(&mut bench, false);
    assert_eq!(commands, all(&mut bench, true));
    for (opcode, action, len) in commands {
        let (fits, other) = if action.is_some() { (2, 1) } else { (1, 2) };
        let sent = action.unwrap_or(0);
        assert_eq!(
            sense(&bench.ask(&codes(other, opcode, sent, 65535))),
            INVALID_FIELD,
            "{opcode:#x}"
        );
        for form in [fits, 3] {
            let one = bench.data(&codes(form, opcode, sent, 65535));
            assert_eq!(
                (one[1], u16_at(&one, 2), one.len()),
                (3, len, 4 + usize::from(len))
            );
            assert_eq!(one[4], opcode);
            let timed = bench.data(&codes(0x80 | form, opcode, sent, 65535));
            assert_eq!(
                (timed[1], timed.len(), u16_at(&timed, 4 + usize::from(len))),
                (0x83, one.len() + 12, 0x0a)
            );
        }
    }
}

#[test]
fn each_reported_command_is_carried_out_and_each_other_is_not() {
    let mut bench = Bench::small();
    let commands = all(&mut bench, false);
    for opcode in 0..=255 {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        let reported = commands.iter().any(|command| command.0 == opcode);
        let unknown = sense(&bench.ask(&cdb)) == Some((5, 0x2000));
        assert_eq!(unknown, !reported, "{opcode:#x}");
        if !reported {
            assert_eq!(bench.data(&codes(1, opcode, 0, 65535))[..], [0, 1, 0, 0]);
        }
    }
    for action in 0..32_u8 {
        for opcode in [0x5e, 0x5f, 0x9e, 0xa3] {
            let reported =
                commands.contains(&(opcode, Some(u16::from(action)), cdb(opcode, 0, 0, 0).len() as u16));
            if !reported {
                assert_eq!(
                    sense(&bench.ask(&cdb(opcode, action, 0, 0))),
                    INVALID_FIELD,
                    "{opcode:#x} {action:#x}"
                );
            }
        }
    }
}

#[test]
fn usage_data_shows_dpo_and_fua() {
    let mut bench = Bench::small();
    for opcode in [0x28, 0xa8, 0x88, 0x2a, 0xaa, 0x8a, 0x89, 0x8b] {
        assert_eq!(
            bench.data(&codes(1, opcode, 0, 65535))[5] & 0x18,
            0x18,
            "{opcode:#x}"
        );
    }
    let write_same = bench.data(&codes(1, 0x93, 0, 65535));
    assert_eq!(write_same[4..8], [0x93, 0x09, 0xff, 0xff]);
    // The three that Linux asks for when it scans.
    assert_eq!(
        bench.data(&codes(1, 0x12, 0, 512))[..10],
        [0, 3, 0, 6, 0x12, 1, 0xff, 0xff, 0xff, 0]
    );
    assert_eq!(bench.data(&codes(1, 0x41, 0, 512))[3], 10);
}

#[test]
fn target_port_groups_in_both_formats() {
    let mut bench = Bench::small();
    let group = [0x00, 0x01, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1];
    let plain = bench.data(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!((u32_at(&plain, 0), &plain[4..]), (12, &group[..]));
    let extended = bench.data(&[0xa3, 0x2a, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(
        (u32_at(&extended, 0), &extended[4..8], &extended[8..]),
        (16, &[0x10, 0, 0, 0][..], &group[..])
    );
    for allocation in 0..16 {
        assert_eq!(
            bench.data(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 0, allocation, 0, 0])[..],
            plain[..allocation as usize]
        );
    }
    bench.unit.set_ports(vec![
        port(),
        TargetPort {
            portal_group: 7,
            ..port()
        },
        // The same group tag in another target: the ports are counted.
        TargetPort {
            target: "iqn.2026-11.com.example:b".into(),
            ..port()
        },
    ]);
    bench.attention(0);
    let two = bench.data(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!((two[11], [12, 16, 20].map(|at| u32_at(&two, at))), (3, [1, 2, 3]));
    bench.unit.set_ports(vec![TargetPort {
        portal_group: 7,
        ..port()
    }]);
    bench.attention(0);
    let one = bench.data(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!((one[11], u32_at(&one, 12)), (1, 7), "a tag that is unique");
    assert_eq!(
        sense(&bench.ask(&[0xa3, 0x4a, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0])),
        INVALID_FIELD
    );
}

#[test]
fn task_management_functions() {
    let mut bench = Bench::small();
    assert_eq!(
        bench.data(&[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0])[..],
        [0xda, 0, 0, 0]
    );
    let extended = bench.data(&[0xa3, 0x0d, 0x80, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!((extended.len(), extended[3]), (16, 12));
}

#[test]
fn defect_lists_are_empty() {
    let mut bench = Bench::small();
    assert_eq!(
        bench.data(&[0x37, 0, 0x1d, 0, 0, 0, 0, 0, 32, 0])[..],
        [0, 0x1d, 0, 0]
    );
    assert_eq!(
        bench.data(&[0xb7, 0x0d, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0])[..],
        [0, 0x0d, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn log_pages() {
    let mut bench = Bench::small();
    assert_eq!(
        bench.data(&[0x4d, 0, 0x40, 0, 0, 0, 0, 0, 255, 0])[..],
        [0, 0, 0, 2, 0x00, 0x0c]
    );
    assert_eq!(
        bench.data(&[0x4d, 0, 0x40, 0xff, 0, 0, 0, 0, 255, 0])[..4],
        [0x40, 0xff, 0, 6]
    );
    // SP; a page and a subpage that are not there; a start beyond the last parameter.
    for (at, value) in [(1, 0x01), (2, 0x4d), (3, 0x01), (6, 3)] {
        let mut cdb = [0x4d, 0, 0x4c, 0, 0, 0, 0, 0, 255, 0];
        cdb[at] = value;
        assert_eq!(sense(&bench.ask(&cdb)), INVALID_FIELD, "byte {at}");
    }
}

#[test]
fn nothing_spins_down_but_stopping_flushes() {
    let mut bench = Bench::small();
    for (byte_1, byte_4, flushes) in [
        (0, 1, 0),
        (1, 1, 0),
        (0, 0, 1),
        (1, 0, 2),
        (0, 4, 2),
        (0, 0x30, 2),
        (0, 0x10, 2),
    ] {
        assert_eq!(bench.ask(&[0x1b, byte_1, 0, 0, byte_4, 0]).status, GOOD);
        assert_eq!((bench.ask(&[0; 6]).status, bench.disk.flushes), (GOOD, flushes));
    }
    // Eject; reserved power conditions.
    for byte_4 in [0x02, 0x03, 0x40, 0xc0] {
        assert_eq!(sense(&bench.ask(&[0x1b, 0, 0, 0, byte_4, 0])), INVALID_FIELD);
    }
}

#[test]
fn self_tests_pass_and_pages_are_refused() {
    let mut bench = Bench::small();
    for byte_1 in [0x04, 0x00, 0x10, 0xa0, 0xc0] {
        assert_eq!(bench.ask(&[0x1d, byte_1, 0, 0, 0, 0]).status, GOOD);
    }
    assert_eq!(
        sense(&bench.ask(&[0x1d, 0x20, 0, 0, 0, 0])),
        INVALID_FIELD,
        "a background test has no results"
    );
    assert_eq!(sense(&bench.ask(&[0x1d, 0x10, 0, 0, 4, 0])), INVALID_FIELD);
    assert_eq!(sense(&bench.ask(&[0x1c, 1, 0, 0, 4, 0])), Some((5, 0x2000)));
}

#[test]
fn the_medium_cannot_be_removed_and_preventing_that_is_good() {
    let mut bench = Bench::small();
    for (prevent, expected) in [(0, None), (1, None), (2, INVALID_FIELD), (3, INVALID_FIELD)] {
        assert_eq!(sense(&bench.ask(&[0x1e, 0, 0, 0, prevent, 0])), expected);
    }
}
