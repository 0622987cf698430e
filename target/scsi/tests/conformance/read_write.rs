//! Reads, writes, verifies: every length of CDB, zero blocks, the end of the unit, flags, residuals. The
//! cases are those of libiscsi's test suite (Read*, Write*, WriteVerify*, Verify*, OrWrite, Prefetch*) and of
//! Microsoft's HLK.

use stillpoint_scsi::{BlockError, BlockOp, BlockSize, Context, NexusId, Plan, Unit};

use crate::bench::*;

const READS: [u8; 4] = [0x08, 0x28, 0xa8, 0x88];
const WRITES: [u8; 4] = [0x0a, 0x2a, 0xaa, 0x8a];
const WRITE_VERIFIES: [u8; 3] = [0x2e, 0xae, 0x8e];
const VERIFIES: [u8; 3] = [0x2f, 0xaf, 0x8f];
const OR_WRITE: u8 = 0x8b;
const COMPARE_AND_WRITE: u8 = 0x89;

#[test]
fn what_is_written_is_read_by_every_length_of_cdb() {
    for mut bench in Bench::both() {
        for (n, write) in WRITES.into_iter().chain(WRITE_VERIFIES).enumerate() {
            let lba = 3 + n as u64;
            let data = vec![n as u8 + 1; 2 * bench.block];
            let written = bench.give(&cdb(write, 0, lba, 2), &data);
            assert_eq!(
                (written.status, written.transfer_len),
                (GOOD, data.len() as u64),
                "{write:#x}"
            );
            for read in READS {
                assert_eq!(bench.data(&cdb(read, 0, lba, 2)), data, "{write:#x} {read:#x}");
            }
        }
    }
}

#[test]
fn six_byte_cdbs_move_256_blocks_for_zero() {
    let mut bench = Bench::small();
    let data = vec![0xa5; 256 * 512];
    assert_eq!(bench.give(&cdb(0x0a, 0, 1, 0), &data).status, GOOD);
    assert_eq!(bench.data(&cdb(0x08, 0, 1, 0)), data);
    assert_eq!(bench.disk.bytes[257 * 512], 0);
}

#[test]
fn zero_blocks_are_good_inside_and_out_of_range_behind_the_end() {
    for mut bench in Bench::both() {
        let (blocks, codes) = (bench.blocks, [0x28, 0xa8, 0x88, 0x2a, 0xaa, 0x8a, OR_WRITE]);
        for opcode in codes
            .into_iter()
            .chain(WRITE_VERIFIES)
            .chain(VERIFIES)
            .chain([0x35, 0x91])
        {
            assert_eq!(bench.ask(&cdb(opcode, 0, 0, 0)).status, GOOD, "{opcode:#x}");
            assert_eq!(bench.ask(&cdb(opcode, 0, blocks, 0)).status, GOOD, "{opcode:#x}");
            for lba in [blocks + 1, 0x8000_0000, u64::MAX] {
                assert_eq!(
                    sense(&bench.ask(&cdb(opcode, 0, lba, 0))),
                    LBA_RANGE,
                    "{opcode:#x} {lba:#x}"
                );
            }
        }
        assert_eq!(bench.ask(&cdb(COMPARE_AND_WRITE, 0, 0, 0)).status, GOOD);
    }
}

#[test]
fn a_range_that_crosses_the_end_is_refused_whole() {
    for mut bench in Bench::both() {
        let blocks = bench.blocks;
        let all = READS
            .into_iter()
            .chain(WRITES)
            .chain(WRITE_VERIFIES)
            .chain(VERIFIES)
            .chain([OR_WRITE, 0x34, 0x90]);
        for opcode in all {
            let ranges = [(blocks - 1, 2), (blocks, 1), (blocks + 1, 1), (0x001f_ffff, 1)];
            for (lba, count) in ranges {
                let data = vec![0xee; count as usize * bench.block];
                let reply = bench.send(0, &cdb(opcode, 0, lba, count), &data, data.len() as u64);
                assert_eq!(sense(&reply), LBA_RANGE, "{opcode:#x} at {lba}");
            }
            if (0x80..0xa0).contains(&opcode) {
                assert_eq!(
                    sense(&bench.ask(&cdb(opcode, 0, u64::MAX, 1))),
                    LBA_RANGE,
                    "{opcode:#x} wraps"
                );
            }
        }
        assert!(
            bench.disk.bytes.iter().all(|byte| *byte == 0),
            "nothing was written"
        );
    }
}

#[test]
fn protection_fields_must_be_zero() {
    let mut bench = Bench::small();
    let checked = READS
        .into_iter()
        .chain(WRITES)
        .filter(|opcode| *opcode > 0x0a)
        .chain(WRITE_VERIFIES);
    for opcode in checked
        .chain(VERIFIES)
        .chain([OR_WRITE, COMPARE_AND_WRITE, 0x41, 0x93])
    {
        for protect in 1..8 {
            let reply = bench.send(0, &cdb(opcode, protect << 5, 0, 1), &[0; 512], 512);
            assert_eq!(sense(&reply), INVALID_FIELD, "{opcode:#x} with {protect}");
        }
    }
}

#[test]
fn dpo_is_accepted_and_fua_reaches_the_store() {
    let mut bench = Bench::small();
    for opcode in [0x28, 0xa8, 0x88] {
        for flags in [0x10, 0x08, 0x18] {
            assert_eq!(bench.ask(&cdb(opcode, flags, 0, 1)).status, GOOD);
        }
    }
    for opcode in [0x2a, 0xaa, 0x8a, OR_WRITE] {
        bench.disk.fua_writes = 0;
        // DPO, FUA, FUA_NV (obsolete) and their sum: libiscsi's Write*.Flags.
        for (flags, expected) in [(0x10, 0), (0x08, 1), (0x0a, 2), (0x02, 2), (0x1a, 3)] {
            assert_eq!(
                bench.give(&cdb(opcode, flags, 0, 1), &[0; 512]).status,
                GOOD,
                "{opcode:#x}"
            );
            assert_eq!(bench.disk.fua_writes, expected, "{opcode:#x} {flags:#x}");
        }
    }
}

#[test]
fn reads_count_residuals_against_what_the_cdb_asks_for() {
    for mut bench in Bench::both() {
        bench.fill(7);
        let block = bench.block as u64;
        for opcode in [0x28, 0xa8, 0x88] {
            // (blocks, room for data-in) and what comes: libiscsi's Read*.Residuals, and READ flagged as a
            // write.
            for (count, room) in [(1, 0), (1, 10_000), (1, 200), (2, block)] {
                let reply = bench.send(0, &cdb(opcode, 0, 0, count), &[], room);
                assert_eq!(reply.status, GOOD);
                assert_eq!(reply.transfer_len, u64::from(count) * block);
                assert_eq!(reply.data.len() as u64, room.min(u64::from(count) * block));
            }
            let as_write = bench.send(0, &cdb(opcode, 0, 0, 1), &vec![0xa6; bench.block], 0);
            assert_eq!((as_write.status, as_write.data.len()), (GOOD, 0));
        }
    }
}

#[test]
fn what_has_no_room_is_not_even_read() {
    let mut unit = Unit::new(spec(BlockSize::B512, 4096));
    unit.attach(NexusId(0), initiator(0));
    let context = Context {
        nexus: NexusId(0),
        luns: &[0],
        data_in_max: 700,
    };
    let _attention = unit.plan(&context, &[0; 6], &[]);
    let Plan::Op(planned) = unit.plan(&context, &cdb(0x28, 0, 0, 100), &[]) else {
        panic!("not planned")
    };
    assert_eq!(
        *planned.op(),
        BlockOp::Read {
            offset: 0,
            len: 1024,
            fua: false
        }
    );
}

#[test]
fn writes_take_whole_blocks_and_never_more_than_the_cdb_says() {
    for mut bench in Bench::both() {
        let block = bench.block;
        for opcode in [0x2a, 0xaa, 0x8a]
            .into_iter()
            .chain(WRITE_VERIFIES)
            .chain([OR_WRITE])
        {
            // (blocks in the CDB, bytes that come): libiscsi's Write*.Residuals and WriteVerify*.Residuals.
            let cases = [
                (1, 0),
                (1, 10_000),
                (1, 200),
                (2, block),
                (1, 2 * block),
                (2, block + 1),
                (3, 2 * block),
            ];
            for (count, came) in cases {
                bench.disk.bytes.fill(b'a');
                if opcode == OR_WRITE {
                    bench.disk.bytes.fill(0);
                }
                let before = bench.disk.bytes[0];
                let reply = bench.give(&cdb(opcode, 0, 0, count), &vec![b'b'; came]);
                let wanted = count as usize * block;
                let torn = came < wanted && !came.is_multiple_of(block);
                assert_eq!(
                    sense(&reply),
                    if torn { WRONG_DATA } else { None },
                    "{opcode:#x} {count} {came}"
                );
                assert_eq!(reply.transfer_len, wanted as u64);
                let changed = if torn { 0 } else { wanted.min(came) };
                assert!(bench.disk.bytes[..changed].iter().all(|byte| *byte == b'b'));
                assert!(
                    bench.disk.bytes[changed..4 * block]
                        .iter()
                        .all(|byte| *byte == before)
                );
            }
        }
    }
}

#[test]
fn verify_compares_all_one_block_or_nothing() {
    for mut bench in Bench::both() {
        bench.fill(7);
        let block = bench.block;
        for opcode in VERIFIES {
            let mut data = vec![7; 4 * block];
            assert_eq!(bench.give(&cdb(opcode, 0x02, 1, 4), &data).status, GOOD);
            data[3 * block + 5] ^= b'X';
            let miscompare = bench.give(&cdb(opcode, 0x02, 1, 4), &data);
            assert_eq!(sense(&miscompare), Some((0xe, 0x1d00)));
            assert_eq!(
                (miscompare.sense[0], u32_at(&miscompare.sense, 3)),
                (0xf0, 3 * block as u32 + 5)
            );
            // BYTCHK 00b: data that comes anyway is not looked at.
            let unread = bench.give(&cdb(opcode, 0x00, 1, 4), &data);
            assert_eq!((unread.status, unread.transfer_len), (GOOD, 0));
            assert_eq!(bench.give(&cdb(opcode, 0x06, 1, 4), &data[..block]).status, GOOD);
            assert_eq!(
                sense(&bench.give(&cdb(opcode, 0x06, 1, 4), &vec![8; block])),
                Some((0xe, 0x1d00))
            );
            assert_eq!(sense(&bench.give(&cdb(opcode, 0x04, 1, 4), &data)), INVALID_FIELD);
            assert_eq!(
                sense(&bench.give(&cdb(opcode, 0x02, 1, 4), &data[..block])),
                WRONG_DATA
            );
            assert_eq!(bench.give(&cdb(opcode, 0x12, 1, 1), &data).status, GOOD, "DPO");
        }
    }
}

#[test]
fn write_and_verify_knows_two_values_of_bytchk() {
    let mut bench = Bench::small();
    for opcode in WRITE_VERIFIES {
        for (bytchk, expected) in [(0, None), (2, None), (4, INVALID_FIELD), (6, INVALID_FIELD)] {
            assert_eq!(
                sense(&bench.give(&cdb(opcode, bytchk, 0, 1), &[1; 512])),
                expected
            );
        }
    }
}

#[test]
fn or_write_sets_bits() {
    for mut bench in Bench::both() {
        bench.fill(0xa5);
        let data = vec![0x5a; 2 * bench.block];
        assert_eq!(bench.give(&cdb(OR_WRITE, 0, 0, 2), &data).status, GOOD);
        assert!(bench.disk.bytes[..data.len()].iter().all(|byte| *byte == 0xff));
        assert_eq!(bench.disk.bytes[data.len()], 0xa5);
    }
}

/// COMPARE AND WRITE has its count in byte 13.
fn compare_and_write(flags: u8, lba: u64, count: u8) -> Vec<u8> {
    let mut cdb = cdb(COMPARE_AND_WRITE, flags, lba, 0);
    cdb[13] = count;
    cdb
}

#[test]
fn compare_and_write_writes_all_or_tells_where_it_differs() {
    for mut bench in Bench::both() {
        bench.fill(b'A');
        let (block, last) = (bench.block, bench.blocks - 1);
        for (lba, count) in [(0, 1_u8), (last, 1), (5, 255), (last - 254, 255)] {
            let half = usize::from(count) * block;
            let start = lba as usize * block;
            bench.fill(b'A');
            let mut data = [vec![b'A'; half], vec![b'B'; half]].concat();
            let done = bench.give(&compare_and_write(0, lba, count), &data);
            assert_eq!((done.status, done.transfer_len), (GOOD, 2 * half as u64));
            assert!(
                bench.disk.bytes[start..start + half]
                    .iter()
                    .all(|byte| *byte == b'B')
            );
            data[..half].fill(b'B');
            data[half - 27] = b'C';
            data[half..].fill(b'D');
            let miscompare = bench.give(&compare_and_write(0, lba, count), &data);
            assert_eq!(sense(&miscompare), Some((0xe, 0x1d00)));
            assert_eq!(u32_at(&miscompare.sense, 3), half as u32 - 27);
            assert!(
                bench.disk.bytes[start..start + half]
                    .iter()
                    .all(|byte| *byte == b'B')
            );
        }
    }
}

#[test]
fn compare_and_write_refuses_other_lengths() {
    let mut bench = Bench::small();
    for (count, came) in [(1, 512), (1, 2048), (3, 2048), (1, 0), (1, 1025)] {
        assert_eq!(
            sense(&bench.give(&compare_and_write(0, 0, count), &vec![0; came])),
            WRONG_DATA
        );
    }
    // libiscsi 1.19 sends 256 blocks with a count that has wrapped to zero.
    let wrapped = bench.give(&compare_and_write(0, 0, 0), &vec![0; 2 * 256 * 512]);
    assert_eq!(sense(&wrapped), INVALID_FIELD);
    for flags in [0x10, 0x08, 0x18] {
        assert_eq!(
            bench.give(&compare_and_write(flags, 0, 1), &[0; 1024]).status,
            GOOD
        );
    }
    assert_eq!(
        sense(&bench.give(&compare_and_write(0, 4095, 2), &[0; 2048])),
        LBA_RANGE
    );
    let mut spec = spec(BlockSize::B512, 4096);
    spec.limits.max_compare_and_write_blocks = 1;
    let mut one = Bench::with(spec);
    assert_eq!(
        sense(&one.give(&compare_and_write(0, 0, 2), &[0; 2048])),
        INVALID_FIELD
    );
}

#[test]
fn prefetch_is_met_and_bounded() {
    for mut bench in Bench::both() {
        let blocks = bench.blocks;
        for opcode in [0x34, 0x90] {
            let size = bench.block as u64;
            for (flags, lba, count) in [(0, 0, 1), (2, 0, 1), (0, blocks - 1, 1), (0, 0, 256), (0, 7, 0)] {
                assert_eq!(bench.ask(&cdb(opcode, flags, lba, count)).status, CONDITION_MET);
                let count = if count == 0 {
                    blocks - lba
                } else {
                    u64::from(count)
                };
                assert_eq!(bench.disk.prefetched, (lba * size, count * size));
            }
            assert_eq!(sense(&bench.ask(&cdb(opcode, 0, blocks + 1, 0))), LBA_RANGE);
        }
    }
}

#[test]
fn prefetch_of_more_than_the_cache_takes_is_good_but_not_met() {
    let mut bench = Bench::with(spec(BlockSize::B512, 64 * 1024));
    for flags in [0, 2] {
        assert_eq!(bench.ask(&cdb(0x90, flags, 1, 0)).status, GOOD);
        assert_eq!(bench.disk.prefetched, (512, 16 << 20));
        assert_eq!(bench.ask(&cdb(0x90, flags, 0, 32 * 1024)).status, CONDITION_MET);
    }
    bench.disk.failure = Some(BlockError::Medium { offset: 0 });
    assert_eq!(sense(&bench.ask(&cdb(0x90, 0, 0, 1))), Some((3, 0x1100)));
    assert_eq!(
        bench.ask(&cdb(0x90, 2, 0, 1)).status,
        CONDITION_MET,
        "answered before"
    );
}

#[test]
fn an_immediate_synchronize_cache_answers_first_and_flushes_after() {
    let mut bench = Bench::small();
    for opcode in [0x35, 0x91] {
        let before = bench.disk.flushes;
        for flags in [0, 2] {
            assert_eq!(bench.ask(&cdb(opcode, flags, 0, 0)).status, GOOD);
        }
        assert_eq!(bench.disk.flushes, before + 2);
        assert_eq!(sense(&bench.ask(&cdb(opcode, 2, bench.blocks + 1, 0))), LBA_RANGE);
        bench.disk.failure = Some(BlockError::Fault);
        assert_eq!(sense(&bench.ask(&cdb(opcode, 0, 0, 0))), Some((4, 0x4400)));
        assert_eq!(bench.ask(&cdb(opcode, 2, 0, 0)).status, GOOD);
        bench.disk.failure = None;
    }
}

#[test]
fn one_command_moves_no_more_than_the_maximum_transfer_length() {
    let mut bench = Bench::with(spec(BlockSize::B512, 64 * 1024));
    let limit = 8 * 1024 * 1024 / 512;
    assert_eq!(bench.ask(&cdb(0xa8, 0, 0, limit)).status, GOOD);
    for opcode in [0xa8, 0x88, 0xaa, 0x8a, OR_WRITE, 0xae, 0xaf] {
        assert_eq!(
            sense(&bench.ask(&cdb(opcode, 0, 0, limit + 1))),
            INVALID_FIELD,
            "{opcode:#x}"
        );
    }
}

#[test]
fn a_read_only_unit_reads_and_refuses_what_changes_the_medium() {
    let mut bench = Bench::read_only();
    for opcode in READS.into_iter().chain([0x2f, 0xaf, 0x8f, 0x35, 0x91]) {
        assert_eq!(bench.ask(&cdb(opcode, 0, 0, 1)).status, GOOD, "{opcode:#x}");
    }
    for opcode in WRITES
        .into_iter()
        .chain(WRITE_VERIFIES)
        .chain([OR_WRITE, 0x41, 0x93])
    {
        assert_eq!(
            sense(&bench.give(&cdb(opcode, 0, 0, 1), &[0xa6; 512])),
            PROTECTED,
            "{opcode:#x}"
        );
    }
    // libiscsi's ReadOnly sends WRITE SAME with UNMAP and no data at all.
    assert_eq!(sense(&bench.give(&cdb(0x41, 0x08, 0, 1), &[])), PROTECTED);
    assert_eq!(sense(&bench.give(&cdb(0x93, 0x08, 0, 1), &[])), PROTECTED);
    assert_eq!(
        sense(&bench.give(&compare_and_write(0, 0, 1), &[0; 1024])),
        PROTECTED
    );
    let unmap = [
        0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0,
    ];
    assert_eq!(
        sense(&bench.give(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &unmap)),
        PROTECTED
    );
    // Wrong fields and ranges are told as on any unit.
    assert_eq!(
        sense(&bench.give(&cdb(0x2a, 0x20, 0, 1), &[0; 512])),
        INVALID_FIELD
    );
    assert_eq!(sense(&bench.give(&cdb(0x2a, 0, 4096, 1), &[0; 512])), LBA_RANGE);
    assert_eq!(bench.give(&cdb(0x2a, 0, 0, 0), &[]).status, GOOD);
    assert!(bench.disk.mapped.is_empty());
}

#[test]
fn backend_errors_reach_the_initiator_with_their_address() {
    let mut bench = Bench::small();
    bench.disk.failure = Some(BlockError::Medium { offset: 9 * 512 });
    let reply = bench.ask(&cdb(0x28, 0, 8, 4));
    assert_eq!((sense(&reply), u32_at(&reply.sense, 3)), (Some((3, 0x1100)), 9));
    bench.disk.failure = Some(BlockError::NoSpace);
    assert_eq!(
        sense(&bench.give(&cdb(0x2a, 0, 0, 1), &[0; 512])),
        Some((7, 0x2707))
    );
    bench.disk.failure = Some(BlockError::Fault);
    assert_eq!(sense(&bench.ask(&cdb(0x35, 0, 0, 0))), Some((4, 0x4400)));
    bench.disk.failure = Some(BlockError::Busy);
    assert_eq!(bench.ask(&cdb(0x28, 0, 0, 1)).status, 0x08);
}
