//! The command sequences of real initiators when they find a disk, in their order and with their allocation
//! lengths.

use crate::bench::*;

/// Linux 6.1 with open-iscsi 2.1.8, as measured: the scan of a disk.
#[test]
fn linux_scans_a_disk() {
    let mut bench = Bench::small();
    bench.unit.lun_reset();
    assert_eq!(bench.data(&[0x12, 0, 0, 0, 36, 0]).len(), 36);
    assert_eq!(bench.data(&[0x12, 0, 0, 0, 96, 0]).len(), 96);
    let luns = bench.data(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0]);
    assert_eq!((u32_at(&luns, 0), luns[9], luns[17]), (16, 0, 1));
    for page in [0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2] {
        let head = bench.data(&[0x12, 1, page, 0, 4, 0]);
        let len = u16_at(&head, 2) + 4;
        let [high, low] = len.to_be_bytes();
        assert_eq!(bench.data(&[0x12, 1, page, high, low, 0]).len(), usize::from(len));
    }
    assert_eq!([bench.attention(0), bench.attention(0)], [Some(0x2903), None]);
    assert_eq!(bench.data(&cdb(0x9e, 0x10, 0, 32)).len(), 32);
    assert_eq!(bench.data(&[0x1a, 0, 0x3f, 0, 4, 0])[2] & 0x80, 0);
    let head = bench.data(&[0x1a, 0, 0x08, 0, 4, 0]);
    assert_eq!(
        (head[0], head[3]),
        (31, 8),
        "all of header, block descriptor and page"
    );
    assert_eq!(bench.data(&[0x1a, 0, 0x08, 0, 32, 0])[12], 0x88);
    for (opcode, len) in [(0x12, 6), (0x93, 16), (0x41, 10)] {
        let one = bench.data(&[0xa3, 0x0c, 0x01, opcode, 0, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!((one[1] & 7, u16_at(&one, 2)), (3, len));
    }
    assert_eq!(bench.data(&cdb(0x28, 0, 0, 8)).len(), 4096);
    // sync, then blkdiscard of one grain.
    assert_eq!(bench.ask(&cdb(0x35, 0, 0, 0)).status, GOOD);
    assert_eq!(bench.disk.flushes, 1);
    let list = [
        0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0,
    ];
    assert_eq!(
        bench.give(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list).status,
        GOOD
    );
}

/// QEMU 7.2 / libiscsi 1.19, as measured.
#[test]
fn qemu_opens_a_disk() {
    let mut bench = Bench::small();
    bench.unit.lun_reset();
    assert_eq!(bench.attention(0), Some(0x2903));
    for allocation in [64, 66] {
        assert_eq!(
            bench.data(&[0x12, 0, 0, 0, allocation, 0]).len(),
            usize::from(allocation)
        );
    }
    let modes = bench.data(&[0x1a, 0x08, 0x3f, 0, 255, 0]);
    assert_eq!((usize::from(modes[0]) + 1, modes[3]), (modes.len(), 0));
    assert_eq!(
        bench.data(&cdb(0x9e, 0x10, 0, 32))[14] & 0x80,
        0x80,
        "LBPME: it will use UNMAP"
    );
    for page in [0x00, 0x83, 0xb0, 0xb2] {
        assert!(bench.data(&[0x12, 1, page, 0, 64, 0]).len() >= 8);
    }
}

/// iPXE, as measured: it uses READ CAPACITY(10) and READ(10) and takes a unit attention for "try again".
#[test]
fn ipxe_boots_from_a_disk() {
    let mut bench = Bench::small();
    bench.unit.lun_reset();
    assert_eq!([bench.attention(0), bench.attention(0)], [Some(0x2903), None]);
    assert_eq!(bench.data(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]).len(), 8);
    assert_eq!(bench.data(&cdb(0x28, 0, 64, 1)).len(), 512);
}

/// Windows' disk arrival, as read in the sources of initiators.md.
#[test]
fn windows_finds_a_disk() {
    let mut bench = Bench::small();
    bench.data(&[0x12, 0, 0, 0, 36, 0]);
    for page in [0x00, 0x80, 0x83, 0xb0, 0xb0] {
        let data = bench.data(&[0x12, 1, page, 0, 255, 0]);
        assert_eq!(usize::from(u16_at(&data, 2)) + 4, data.len());
    }
    bench.data(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bench.data(&cdb(0x9e, 0x10, 0, 32));
    bench.data(&[0x1a, 0, 0x08, 0, 192, 0]);
    bench.data(&[0x1a, 0, 0x3f, 0, 192, 0]);
    bench.data(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0]);
}

/// ESXi's polls, its ATS heartbeat and VMFS's RESERVE.
#[test]
fn esxi_polls_and_heartbeats() {
    let mut bench = Bench::small();
    let mut ata_pass_through = [0; 16];
    ata_pass_through[0] = 0x85;
    assert_eq!(sense(&bench.ask(&ata_pass_through)), Some((5, 0x2000)));
    assert_eq!(bench.data(&[0x1a, 0x08, 0x1a, 0, 255, 0])[4] & 0x3f, 0x1a);
    // TEST UNIT READY with the R bit and no length.
    assert_eq!(bench.send(0, &[0; 6], &[], 0).status, GOOD);
    let mut heartbeat = cdb(0x89, 0, 100, 0);
    heartbeat[13] = 1;
    let new = [[0; 512], [1; 512]].concat();
    assert_eq!(bench.give(&heartbeat, &new).status, GOOD);
    assert_eq!(sense(&bench.give(&heartbeat, &new)), Some((0xe, 0x1d00)));
    assert_eq!(bench.ask(&[0x16, 0, 0, 0, 0, 0]).status, GOOD);
    assert_eq!(bench.ask(&[0x17, 0, 0, 0, 0, 0]).status, GOOD);
}

/// HLK: the commands that must simply be good, with the fields that it varies.
#[test]
fn hlk_odds_and_ends() {
    let mut bench = Bench::small();
    assert_eq!(bench.ask(&[0; 6]).status, GOOD);
    let sense_data = bench.data(&[0x03, 0, 0, 0, 255, 0]);
    assert!((0x70..=0x73).contains(&sense_data[0]) && usize::from(sense_data[7]) <= sense_data.len() - 8);
    for opcode in [0x2f, 0x8f] {
        assert_eq!(bench.ask(&cdb(opcode, 0, 0, 0)).status, GOOD);
        assert_eq!(bench.ask(&cdb(opcode, 0, 17, 1)).status, GOOD);
        assert_eq!(sense(&bench.ask(&cdb(opcode, 0, 4095, 2))), LBA_RANGE);
    }
    assert_eq!(
        bench.data(&cdb(0x9e, 0x10, 0, 0)).len(),
        0,
        "READ CAPACITY(16) with allocation 0"
    );
    for immediate in [0, 1] {
        for start in [0, 1] {
            assert_eq!(bench.ask(&[0x1b, immediate, 0, 0, start, 0]).status, GOOD);
        }
    }
}
