//! Whatever comes: no panic, sense with every CHECK CONDITION, and no operation outside the capacity (the
//! disk of the bench asserts that, and `Bench::send` the sense).

use proptest::prelude::*;
use stillpoint_scsi::{BlockOp, BlockSize, Context, NexusId, Plan, Unit, absent_lun};

use crate::bench::*;

/// Operation codes of ours half of the time, anything else otherwise.
fn any_opcode() -> impl Strategy<Value = u8> {
    let known = vec![
        0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x16, 0x17, 0x1a, 0x1b, 0x1d, 0x1e, 0x25, 0x28, 0x2a, 0x2e, 0x2f,
        0x34, 0x35, 0x37, 0x41, 0x42, 0x4d, 0x55, 0x56, 0x57, 0x5a, 0x5e, 0x5f, 0x83, 0x84, 0x88, 0x89, 0x8a,
        0x8b, 0x8e, 0x8f, 0x90, 0x91, 0x93, 0x9e, 0xa0, 0xa3, 0xa8, 0xaa, 0xae, 0xaf, 0xb7,
    ];
    prop_oneof![4 => proptest::sample::select(known), 1 => any::<u8>()]
}

/// Mostly zeroes and small numbers, so that the deeper checks are reached.
fn any_byte() -> impl Strategy<Value = u8> {
    prop_oneof![4 => Just(0), 2 => 0..32_u8, 2 => any::<u8>(), 1 => Just(0xff)]
}

fn any_command() -> impl Strategy<Value = (u64, Vec<u8>, Vec<u8>, u64)> {
    let cdb = (any_opcode(), prop::collection::vec(any_byte(), 0..20))
        .prop_map(|(opcode, rest)| [vec![opcode], rest].concat());
    let len = prop_oneof![Just(0), Just(24), Just(512), Just(1024), 0..3000_usize];
    let data = (len, any_byte()).prop_flat_map(|(len, fill)| {
        (
            prop::collection::vec(any_byte(), len.min(40)),
            Just(len),
            Just(fill),
        )
            .prop_map(|(mut data, len, fill)| {
                data.resize(len, fill);
                data
            })
    });
    (0..4_u64, cdb, data, prop_oneof![Just(0), Just(512), any::<u64>()])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_commands(commands in prop::collection::vec(any_command(), 1..40), large in any::<bool>()) {
        let [small, four_kilobytes] = Bench::both();
        let mut bench = if large { four_kilobytes } else { small };
        for (n, cdb, data, room) in commands {
            let reply = bench.send(n, &cdb, &data, room);
            prop_assert!(matches!(reply.status, 0x00 | 0x02 | 0x04 | 0x08 | 0x18), "{:#x}", reply.status);
            prop_assert!(reply.status == 0x00 || reply.data.is_empty());
            prop_assert!(reply.sense.len() <= 252);
        }
        let state = bench.unit.reservation_state();
        prop_assert!(bench.unit.restore_reservations(&state).is_ok());
    }

    #[test]
    fn ranges_of_a_huge_unit_stay_inside(
        blocks in prop_oneof![Just(1), Just(u64::MAX / 4096), 1..u64::MAX / 4096],
        (opcode, flags) in (proptest::sample::select(vec![0x88_u8, 0x8a, 0x8b, 0x8e, 0x8f, 0x90, 0x91, 0x93, 0x9e]), 0..16_u8),
        lba in prop_oneof![any::<u64>(), 0..64_u64],
        count in prop_oneof![any::<u32>(), 0..64_u32],
    ) {
        let mut unit = Unit::new(spec(BlockSize::B4096, blocks));
        unit.attach(NexusId(0), initiator(0));
        let context = Context { nexus: NexusId(0), luns: &[0], data_in_max: 1 << 40 };
        let _attention = unit.plan(&context, &[0; 6], &[]);
        let flags = if opcode == 0x9e { 0x12 } else { flags & 0x0b };
        let data = vec![1; 64 * 4096];
        if let Plan::Op(planned) = unit.plan(&context, &cdb(opcode, flags, lba, count), &data) {
            let (offset, len) = match *planned.op() {
                BlockOp::Read { offset, len, .. }
                | BlockOp::Write { offset, len, .. }
                | BlockOp::WriteAndVerify { offset, len, .. }
                | BlockOp::Verify { offset, len, .. }
                | BlockOp::OrWrite { offset, len, .. } => (offset, u64::from(len)),
                BlockOp::WriteZeroes { offset, len, .. }
                | BlockOp::WriteSame { offset, len, .. }
                | BlockOp::PreFetch { offset, len }
                | BlockOp::LbaStatus { offset, len, .. } => (offset, len),
                BlockOp::Flush => return Ok(()),
                ref other => panic!("{opcode:#x} became {other:?}"),
            };
            prop_assert!(len > 0 && offset % 4096 == 0 && len % 4096 == 0);
            prop_assert!(offset.checked_add(len).is_some_and(|end| end <= unit.capacity_bytes()));
        }
    }

    #[test]
    fn an_absent_lun_answers_anything(bytes in prop::collection::vec(any::<u8>(), 0..32), luns in prop::collection::vec(any::<u16>(), 0..300)) {
        let reply = absent_lun(&bytes, &luns);
        prop_assert_eq!(reply.status == CHECK, !reply.sense.is_empty());
    }
}
