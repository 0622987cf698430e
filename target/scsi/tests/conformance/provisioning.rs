//! WRITE SAME, UNMAP, GET LBA STATUS and the figures of a thin unit (SBC-3 §4.7; HLK thin provisioning;
//! libiscsi's WriteSame*, Unmap, GetLBAStatus).

use stillpoint_scsi::BlockSize;

use crate::bench::*;

/// An UNMAP with its list.
fn unmap(bench: &mut Bench, ranges: &[(u64, u32)]) -> stillpoint_scsi::Reply {
    let mut list = vec![0; 8];
    for (lba, count) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    let (all, descriptors) = (list.len() as u16 - 2, list.len() as u16 - 8);
    list[..2].copy_from_slice(&all.to_be_bytes());
    list[2..4].copy_from_slice(&descriptors.to_be_bytes());
    let [high, low] = (list.len() as u16).to_be_bytes();
    bench.give(&[0x42, 0, 0, 0, 0, 0, 0, high, low, 0], &list)
}

#[test]
fn unmapped_blocks_read_as_zeroes() {
    for mut bench in Bench::both() {
        bench.fill(b'a');
        for count in 1..=256 {
            assert_eq!(unmap(&mut bench, &[(0, count)]).status, GOOD);
            let end = count as usize * bench.block;
            assert!(bench.disk.bytes[..end].iter().all(|byte| *byte == 0));
            assert_eq!(bench.disk.bytes[end], b'a');
        }
    }
}

#[test]
fn unmap_takes_many_descriptors_and_counts_them() {
    let mut bench = Bench::small();
    bench.fill(b'a');
    let single: Vec<_> = (0..256).map(|lba| (lba, 1)).collect();
    for count in [1, 2, 255, 256] {
        assert_eq!(unmap(&mut bench, &single[..count]).status, GOOD);
    }
    assert!(bench.disk.bytes[..256 * 512].iter().all(|byte| *byte == 0));
    let too_many: Vec<_> = (0..257).map(|lba| (lba, 1)).collect();
    assert_eq!(sense(&unmap(&mut bench, &too_many)), Some((5, 0x2600)));
}

#[test]
fn unmap_of_nothing_is_good() {
    let mut bench = Bench::small();
    for lba in [0, 1, 4095, 4096] {
        assert_eq!(unmap(&mut bench, &[(lba, 0)]).status, GOOD, "{lba}");
    }
    assert_eq!(unmap(&mut bench, &[]).status, GOOD);
    assert_eq!(bench.ask(&[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0]).status, GOOD);
    let halves: Vec<_> = (0..256).map(|i| (i / 2, 0)).collect();
    assert_eq!(unmap(&mut bench, &halves).status, GOOD);
}

/// ANC_SUP is zero (VPD page B2h): whoever asks for anchored blocks all the same is told which field was wrong, and nothing changes.
#[test]
fn anchors_are_refused_by_their_field() {
    let mut bench = Bench::small();
    bench.fill(b'a');
    let unmap = [0x42, 1, 0, 0, 0, 0, 0, 0, 24, 0];
    let list: Vec<_> = [vec![0, 22, 0, 16, 0, 0, 0, 0], vec![0; 11], vec![8], vec![0; 4]].concat();
    // UNMAP and ANCHOR both: SBC-3 takes ANCHOR alone for an error of its own.
    let same = |flags| (cdb(0x41, flags, 0, 8), cdb(0x93, flags, 0, 8));
    let ((ten, sixteen), (alone_ten, alone_sixteen)) = (same(0x18), same(0x10));
    let refused = [
        bench.give(&unmap, &list),
        bench.give(&ten, &[0; 512]),
        bench.give(&sixteen, &[0; 512]),
        bench.give(&alone_ten, &[0; 512]),
        bench.give(&alone_sixteen, &[0; 512]),
    ];
    for reply in refused {
        assert_eq!(sense(&reply), INVALID_FIELD);
        // SKSV, C/D = the CDB, and the byte (SPC-4 §4.5.2.4.2).
        assert_eq!(reply.sense[15..18], [0xc0, 0, 1]);
    }
    assert_eq!(bench.ask(&cdb(0x28, 0, 0, 8)).data, vec![b'a'; 8 * 512]);
    let page = bench.ask(&[0x12, 1, 0xb2, 0, 64, 0]).data;
    assert_eq!(page[5] & 0x02, 0, "ANC_SUP");
}

#[test]
fn a_bad_unmap_list_unmaps_nothing() {
    let mut spec = spec(BlockSize::B512, 4096);
    spec.limits.max_unmap_blocks = 1024;
    let mut bench = Bench::with(spec);
    bench.fill(b'a');
    assert_eq!(sense(&unmap(&mut bench, &[(0, 8), (4096, 1)])), LBA_RANGE);
    assert_eq!(sense(&unmap(&mut bench, &[(0, 8), (u64::MAX, 2)])), LBA_RANGE);
    assert_eq!(
        sense(&unmap(&mut bench, &[(0, 1000), (2000, 25)])),
        Some((5, 0x2600))
    );
    let unmap = |len: u8| [0x42, 0, 0, 0, 0, 0, 0, 0, len, 0];
    // Shorter than its header; shorter than announced in the CDB; shorter than announced in itself.
    assert_eq!(sense(&bench.give(&unmap(7), &[0; 7])), Some((5, 0x1a00)));
    assert_eq!(sense(&bench.give(&unmap(24), &[0; 8])), Some((5, 0x1a00)));
    let mut lies = [0; 24];
    lies[3] = 32;
    assert_eq!(sense(&bench.give(&unmap(24), &lies)), Some((5, 0x1a00)));
    assert!(bench.disk.bytes.iter().all(|byte| *byte == b'a'));
}

#[test]
fn write_same_fills_zeroes_and_deallocates() {
    for mut bench in Bench::both() {
        let (block, blocks) = (bench.block, bench.blocks);
        for opcode in [0x41, 0x93] {
            for (lba, count) in [(0, 1), (0, 256), (blocks - 256, 256), (1, 7)] {
                bench.fill(0xff);
                let range = lba as usize * block..(lba as usize + count as usize) * block;
                let reply = bench.give(&cdb(opcode, 0, lba, count), &vec![0xa6; block]);
                assert_eq!((reply.status, reply.transfer_len), (GOOD, block as u64));
                assert!(bench.disk.bytes[range.clone()].iter().all(|byte| *byte == 0xa6));
                // UNMAP with zeroes deallocates; with other data it writes the data (LBPRZ).
                assert_eq!(
                    bench.give(&cdb(opcode, 8, lba, count), &vec![3; block]).status,
                    GOOD
                );
                assert!(bench.disk.bytes[range.clone()].iter().all(|byte| *byte == 3));
                let mapped = bench.disk.mapped.len();
                assert_eq!(
                    bench.give(&cdb(opcode, 8, lba, count), &vec![0; block]).status,
                    GOOD
                );
                assert!(bench.disk.bytes[range.clone()].iter().all(|byte| *byte == 0));
                let whole_grains = range.end as u64 / GRAIN
                    - (range.start as u64).div_ceil(GRAIN).min(range.end as u64 / GRAIN);
                assert_eq!(mapped - bench.disk.mapped.len(), whole_grains as usize);
                let outside = bench.disk.bytes.iter().filter(|byte| **byte == 0xff).count();
                assert_eq!(outside, bench.disk.bytes.len() - count as usize * block);
            }
        }
    }
}

#[test]
fn write_same_16_without_data_writes_zeroes() {
    let mut bench = Bench::small();
    bench.fill(0xff);
    let reply = bench.give(&cdb(0x93, 0x01, 8, 8), &[]);
    assert_eq!((reply.status, reply.transfer_len), (GOOD, 0));
    assert!(bench.disk.bytes[8 * 512..16 * 512].iter().all(|byte| *byte == 0));
    assert!(bench.disk.mapped.contains(&1));
    assert_eq!(bench.give(&cdb(0x93, 0x09, 8, 8), &[]).status, GOOD);
    assert!(!bench.disk.mapped.contains(&1));
    // In WRITE SAME(10) that bit is something obsolete, and the data is missing.
    assert_eq!(sense(&bench.give(&cdb(0x41, 0x01, 8, 8), &[])), WRONG_DATA);
}

#[test]
fn write_same_refuses_what_it_does_not_do() {
    let mut bench = Bench::with(spec(BlockSize::B512, 256 * 1024));
    for opcode in [0x41, 0x93] {
        let mut ask = |flags, lba, count, came: usize| {
            sense(&bench.give(&cdb(opcode, flags, lba, count), &vec![0; came]))
        };
        // Anchors; the obsolete LBDATA and PBDATA.
        for flags in [0x10, 0x18, 0x02, 0x04] {
            assert_eq!(ask(flags, 0, 1, 512), INVALID_FIELD);
        }
        // WSNZ: no count is no "until the end".
        assert_eq!(ask(0, 0, 0, 512), INVALID_FIELD);
        assert_eq!(ask(8, 100, 0, 512), INVALID_FIELD);
        for (lba, count) in [(256 * 1024, 1), (256 * 1024 - 1, 2), (0x8000_0000, 1)] {
            assert_eq!(ask(0, lba, count, 512), LBA_RANGE);
        }
        // libiscsi's InvalidDataOutSize.
        assert_eq!(ask(8, 0, 1, 256), WRONG_DATA);
        assert_eq!(ask(8, 0, 1, 1024), WRONG_DATA);
    }
    let limit = 16 * 1024 * 1024 / 512;
    assert_eq!(bench.give(&cdb(0x93, 0, 0, limit), &[0; 512]).status, GOOD);
    assert_eq!(
        sense(&bench.give(&cdb(0x93, 0, 0, limit + 1), &[0; 512])),
        INVALID_FIELD
    );
}

fn lba_status(bench: &mut Bench, lba: u64, allocation: u32) -> stillpoint_scsi::Reply {
    let mut cdb = cdb(0x9e, 0x12, lba, 0);
    cdb[10..14].copy_from_slice(&allocation.to_be_bytes());
    bench.ask(&cdb)
}

#[test]
fn lba_status_tells_mapped_from_deallocated() {
    let mut bench = Bench::small();
    assert_eq!(
        bench.give(&cdb(0x2a, 0, 0, 264), &vec![b'A'; 264 * 512]).status,
        GOOD
    );
    for lba in (0..248).step_by(8) {
        assert_eq!(unmap(&mut bench, &[(lba, 8)]).status, GOOD);
        let next = lba_status(&mut bench, lba + 8, 24).data;
        assert_eq!((u32_at(&next, 0), u64_at(&next, 8), next[20]), (20, lba + 8, 0));
        assert_eq!(u64::from(u32_at(&next, 16)), 264 - (lba + 8));
    }
    let hole = lba_status(&mut bench, 3, 24).data;
    assert_eq!((u64_at(&hole, 8), u32_at(&hole, 16), hole[20]), (3, 245, 1));
    let all = lba_status(&mut bench, 0, 1024).data;
    assert_eq!(u32_at(&all, 0), 4 + 3 * 16);
    let ranges: Vec<_> = (0..3)
        .map(|n| (u64_at(&all, 8 + 16 * n), u32_at(&all, 16 + 16 * n)))
        .collect();
    assert_eq!(ranges, [(0, 248), (248, 16), (264, 4096 - 264)]);
}

#[test]
fn lba_status_ends_with_the_capacity() {
    let mut bench = Bench::small();
    for back in 1..=256 {
        let data = lba_status(&mut bench, 4096 - back, 24).data;
        assert_eq!(
            (data.len(), u64_at(&data, 8), u64::from(u32_at(&data, 16))),
            (24, 4096 - back, back)
        );
    }
    for lba in [4096, 4097, 1 << 63, u64::MAX] {
        assert_eq!(sense(&lba_status(&mut bench, lba, 24)), LBA_RANGE);
    }
    assert_eq!(lba_status(&mut bench, 0, 0).status, GOOD);
}

#[test]
fn the_pages_of_a_thin_unit_agree() {
    for mut bench in Bench::both() {
        let block = bench.block as u64;
        let limits = bench.data(&[0x12, 1, 0xb0, 0, 255, 0]);
        assert_eq!((limits.len(), limits[3]), (64, 0x3c));
        assert_eq!((u32_at(&limits, 20), u32_at(&limits, 24)), (1 << 20, 256));
        assert_eq!(u64::from(u32_at(&limits, 28)) * block, GRAIN);
        assert_eq!(u32_at(&limits, 32), 0x8000_0000);
        let thin = bench.data(&[0x12, 1, 0xb2, 0, 255, 0]);
        assert_eq!((thin.len(), thin[5], thin[6]), (8, 0xe4, 2));
        let capacity = bench.data(&cdb(0x9e, 0x10, 0, 32));
        assert_eq!(capacity[14], 0xc0, "LBPME and LBPRZ as in B2h");
        assert_eq!(1 << capacity[13], GRAIN / block);
        // HLK: DS, page length a multiple of twelve, parameters with format and linking 3 and length 8.
        bench.fill(1);
        let log = bench.data(&[0x4d, 0, 0x4c, 0, 0, 0, 0, 0, 255, 0]);
        assert_eq!(
            (log[0], u16_at(&log, 2) % 12, log.len()),
            (0x8c, 0, 4 + usize::from(u16_at(&log, 2)))
        );
        for parameter in log[4..].chunks(12) {
            assert!((1..=0xff).contains(&u16_at(parameter, 0)));
            assert_eq!(parameter[2..4], [3, 8]);
        }
        let set = block << thin[4];
        assert_eq!(u64::from(u32_at(&log, 8)) * set, 1 << 30);
        assert_eq!(u64::from(u32_at(&log, 20)) * set, block * bench.blocks);
    }
}

#[test]
fn used_space_sinks_with_unmap() {
    let mut bench = Bench::small();
    bench.fill(1);
    let used = |bench: &mut Bench| u32_at(&bench.data(&[0x4d, 0, 0x4c, 0, 0, 0, 0, 0, 255, 0]), 20);
    let before = used(&mut bench);
    assert_eq!(unmap(&mut bench, &[(0, 4096)]).status, GOOD);
    assert!(used(&mut bench) < before);
}

#[test]
fn thresholds_are_listed_and_their_crossing_is_heard_by_all() {
    let mut bench = Bench::small();
    let page = |bench: &mut Bench, control: u8| {
        bench.data(&[0x1a, 0x08, control << 6 | 0x1c, 2, 255, 0])[4..].to_vec()
    };
    assert_eq!(page(&mut bench, 0)[..4], [0x5c, 2, 0, 12], "none yet");
    bench.unit.set_thin_thresholds(&[25 << 30, 5 << 30]);
    assert_eq!([0, 1, 2].map(|n| bench.attention(n)), [Some(0x2a01); 3]);
    bench.unit.set_thin_thresholds(&[25 << 30, 5 << 30]);
    assert_eq!(bench.attention(0), None, "nothing has changed");
    let data = page(&mut bench, 0);
    assert_eq!((data.len(), &data[..4]), (32, &[0x5c, 2, 0, 28][..]));
    assert_eq!(
        data[16..],
        [0x80, 1, 0, 0, 0, 0, 0x64, 0, 0x80, 1, 0, 0, 0, 0, 0x14, 0]
    );
    assert!(
        page(&mut bench, 1)[4..].iter().all(|byte| *byte == 0),
        "not changeable"
    );
    // What was read can be sent back; anything else cannot.
    let mut list = [vec![0; 4], data].concat();
    assert_eq!(bench.give(&[0x15, 0x10, 0, 0, 36, 0], &list).status, GOOD);
    list[4 + 23] ^= 1;
    assert_eq!(
        sense(&bench.give(&[0x15, 0x10, 0, 0, 36, 0], &list)),
        Some((5, 0x2600))
    );
    bench.unit.thin_threshold_reached();
    assert_eq!([0, 1, 2].map(|n| bench.attention(n)), [Some(0x3807); 3]);
    assert_eq!(bench.attention(0), None, "once");
    bench.disk.failure = Some(stillpoint_scsi::BlockError::Growing);
    assert_eq!(
        sense(&bench.give(&cdb(0x2a, 0, 0, 1), &[1; 512])),
        Some((2, 0x0414))
    );
}
