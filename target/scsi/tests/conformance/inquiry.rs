//! INQUIRY and its vital product data (HLK "SCSI Compliance Test 2.0"; libiscsi's Inquiry family).

use stillpoint_scsi::BlockSize;

use crate::bench::*;

fn vpd(bench: &mut Bench, page: u8) -> bytes::Bytes {
    bench.data(&[0x12, 1, page, 2, 0, 0])
}

#[test]
fn standard_data_is_what_windows_calls_a_proper_disk() {
    let mut bench = Bench::small();
    let data = bench.data(&[0x12, 0, 0, 0, 255, 0]);
    assert!((36..=255).contains(&data.len()));
    assert_eq!(data[0], 0, "type and qualifier");
    assert_eq!(data[1], 0, "not removable");
    assert!((4..=6).contains(&data[2]), "version");
    assert_eq!(
        data[3], 0x12,
        "HiSup and data format 2, neither AERC nor TrmTsk nor NormACA"
    );
    assert_eq!(usize::from(data[4]), data.len() - 5);
    assert_eq!(data[5] & 0x09, 0x08, "3PC, no PROTECT");
    assert_eq!(data[7] & 0x02, 0x02, "CmdQue");
    assert_eq!(data[8..16], *b"STILLPNT");
    assert_eq!(data[16..32], *b"VIRTUAL DISK    ");
    assert_eq!(data[32..36], *b"0001");
    let versions: Vec<u16> = data[58..74].chunks(2).map(|pair| u16_at(pair, 0)).collect();
    assert_eq!(versions, [0x00a0, 0x0960, 0x0460, 0x04c0, 0, 0, 0, 0]);
}

#[test]
fn truncation_is_no_error_and_changes_nothing_else() {
    let mut bench = Bench::small();
    let whole = bench.data(&[0x12, 0, 0, 1, 0, 0]);
    for allocation in 0..=255 {
        let data = bench.data(&[0x12, 0, 0, 0, allocation, 0]);
        assert_eq!(data[..], whole[..whole.len().min(usize::from(allocation))]);
    }
    assert_eq!(
        bench.data(&[0x12, 0, 0, 0x01, 0xff, 0]),
        bench.data(&[0x12, 0, 0, 0x02, 0x00, 0])
    );
    for page in [0x00, 0x80, 0x83, 0x86, 0x87, 0x8f, 0xb0, 0xb1, 0xb2] {
        let whole = vpd(&mut bench, page);
        assert_eq!(bench.data(&[0x12, 1, page, 0, 4, 0])[..], whole[..4]);
    }
}

#[test]
fn a_page_code_needs_evpd_and_cmddt_is_gone() {
    let mut bench = Bench::small();
    assert_eq!(sense(&bench.ask(&[0x12, 0, 1, 1, 0, 0])), INVALID_FIELD);
    assert_eq!(sense(&bench.ask(&[0x12, 2, 0, 1, 0, 0])), INVALID_FIELD);
    assert_eq!(sense(&bench.ask(&[0x12, 1, 0xc0, 1, 0, 0])), INVALID_FIELD);
}

#[test]
fn every_listed_page_is_readable_and_says_its_own_length() {
    for mut bench in Bench::both() {
        let pages = vpd(&mut bench, 0x00)[4..].to_vec();
        assert_eq!(pages, [0x00, 0x80, 0x83, 0x86, 0x87, 0x8f, 0xb0, 0xb1, 0xb2]);
        for page in pages {
            let data = vpd(&mut bench, page);
            assert_eq!((data[0], data[1]), (0, page));
            assert_eq!(usize::from(u16_at(&data, 2)), data.len() - 4, "{page:#x}");
        }
    }
}

#[test]
fn the_serial_number_is_printable() {
    let mut spec = spec(BlockSize::B512, 8);
    spec.serial = "SP\u{7}-\u{e9}1 ".repeat(100);
    let mut bench = Bench::with(spec);
    let data = vpd(&mut bench, 0x80);
    assert_eq!(data.len(), 204);
    assert!(data[4..].iter().all(|byte| (0x20..0x7f).contains(byte)));
}

#[test]
fn device_identification_names_unit_and_port() {
    let mut bench = Bench::small();
    let data = vpd(&mut bench, 0x83);
    let mut designators = Vec::new();
    let mut rest = &data[4..];
    while let [code, kind, _, len, ..] = rest {
        let (body, next) = rest[4..].split_at(usize::from(*len));
        designators.push((*code, *kind, body.to_vec()));
        rest = next;
    }
    let naa = vec![0x62, 0x53, 0x50, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13];
    let t10 = b"STILLPNTVIRTUAL DISK    SP0123456789abcdef".to_vec();
    let name = b"iqn.2026-11.com.example:sql01,t,0x0001\0\0".to_vec();
    let expected = vec![
        (0x01, 0x03, naa),
        (0x02, 0x01, t10),
        (0x51, 0x94, vec![0, 0, 0, 1]),
        (0x51, 0x95, vec![0, 0, 0, 1]),
        (0x53, 0x98, name),
    ];
    assert_eq!(designators, expected);
}

#[test]
fn block_characteristics_say_that_nothing_rotates() {
    let mut bench = Bench::small();
    let data = vpd(&mut bench, 0xb1);
    assert_eq!((data.len(), u16_at(&data, 4)), (64, 1));
}
