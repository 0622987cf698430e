//! What real initiators send and cannot do without. The bytes and keys are measured or published facts about them
//! (Microsoft initiator, ESXi, open-iscsi 2.1.8, QEMU 7.2 with libiscsi 1.19, iPXE 1.0.0+2019).
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use common::*;
use stillpoint_iscsi::pdu::{
    Bhs, DataIn, LoginResponse, Opcode, R2t, Residual, ScsiCommand, ScsiResponse, Stage, TextResponse,
    TmfReply,
};
use stillpoint_iscsi::{CmdSn, Isid, Outcome, TmfFunction, TmfResponse, Ttt};

/// A Login Request header as bytes: opcode and flags, ISID, CID, ITT and CmdSN.
fn login_bytes(flags: u8, isid: [u8; 6], cid: u16, itt: u32, cmd_sn: u32) -> Bhs {
    let mut bhs = [0; 48];
    bhs[0] = 0x43;
    bhs[1] = flags;
    bhs[8..14].copy_from_slice(&isid);
    bhs[16..20].copy_from_slice(&itt.to_be_bytes());
    bhs[20..22].copy_from_slice(&cid.to_be_bytes());
    bhs[24..28].copy_from_slice(&cmd_sn.to_be_bytes());
    bhs
}

fn finish(pair: &mut Pair) -> Pdu {
    pair.admit();
    let pdu = pair.only();
    let response = LoginResponse::parse(&pdu.bhs);
    assert_eq!(
        (response.status, response.transit, response.next),
        ((0, 0), true, Stage::FULL_FEATURE)
    );
    assert_eq!(
        response.numbers.max_cmd_sn,
        response.numbers.exp_cmd_sn.plus(127),
        "the window is open"
    );
    pair.event();
    pair.cmd_sn = response.numbers.exp_cmd_sn;
    pdu
}

/// Every answered key was offered, or is one that a target declares.
fn only_offered(offer: &[&str], answer: &[String]) {
    for pair in answer {
        let key = pair.split_once('=').unwrap().0;
        let offered = offer.iter().any(|offer| offer.split_once('=').unwrap().0 == key);
        let declared = ["TargetPortalGroupTag", "TargetAlias", "MaxRecvDataSegmentLength"].contains(&key);
        assert!(offered || declared, "{pair}");
    }
}

const WINDOWS: [u8; 6] = [0x40, 0, 1, 0x37, 0, 0];

fn windows(ours: stillpoint_iscsi::ConnectionConfig) -> (Pair, Vec<String>) {
    let mut pair = Pair::new(ours, Targets::default());
    let names = [
        "InitiatorName=iqn.1991-05.com.microsoft:host",
        "SessionType=Normal",
        "TargetName=iqn.2026-01.test:disk",
        "AuthMethod=None",
    ];
    pair.send(&login_bytes(0x81, WINDOWS, 1, 1, 1), &text(&names))
        .unwrap();
    let pdu = pair.only();
    // Without the portal group in the first response it waits until its login timer ends.
    assert_eq!(pdu.text(), ["TargetPortalGroupTag=1", "AuthMethod=None"]);
    assert_eq!(pdu.bhs[1], 0x81);
    let offer = [
        "HeaderDigest=None,CRC32C",
        "DataDigest=None,CRC32C",
        "ErrorRecoveryLevel=2",
        "InitialR2T=No",
        "ImmediateData=Yes",
        "MaxRecvDataSegmentLength=65536",
        "MaxBurstLength=262144",
        "FirstBurstLength=65536",
        "MaxConnections=32",
        "DataPDUInOrder=Yes",
        "DataSequenceInOrder=Yes",
        "DefaultTime2Wait=0",
        "DefaultTime2Retain=60",
        "MaxOutstandingR2T=16",
    ];
    pair.send(&login_bytes(0x87, WINDOWS, 1, 1, 1), &text(&offer))
        .unwrap();
    let answer = finish(&mut pair).text();
    only_offered(&offer, &answer);
    (pair, answer)
}

#[test]
fn windows_logs_in() {
    let (pair, answer) = windows(config());
    for expected in [
        "HeaderDigest=None",
        "DataDigest=None",
        "ErrorRecoveryLevel=0",
        "InitialR2T=Yes",
        "ImmediateData=Yes",
        "MaxRecvDataSegmentLength=262144",
        "MaxBurstLength=262144",
        "FirstBurstLength=65536",
        "MaxConnections=1",
        "DefaultTime2Wait=2",
        "DefaultTime2Retain=20",
        "MaxOutstandingR2T=4",
    ] {
        assert!(answer.contains(&expected.to_owned()), "{expected} in {answer:?}");
    }
    assert_eq!(pair.conn.info().isid, Some(Isid(WINDOWS)));
}

#[test]
fn windows_writes_256_kib_in_four_data_out_with_a_foreign_lun() {
    for initial_r2t in [true, false] {
        let mut ours = config();
        ours.keys.initial_r2t = initial_r2t;
        let (mut pair, _) = windows(ours);
        let data = pattern(1, 262_144);
        pair.scsi(write(7, 262_144), &data[..65536]);
        let pdu = pair.only();
        let ask = R2t::parse(&pdu.bhs);
        // Byte 1 is 0x80: with 0x00 it logs iScsiPrt event 23 and drops. StatSN is the next, not consumed.
        assert_eq!((pdu.opcode(), pdu.bhs[1]), (Opcode::R2T, 0x80));
        assert_eq!((ask.buffer_offset, ask.desired_len), (65536, 196_608));
        for (number, offset) in (65536..262_144).step_by(65536).enumerate() {
            let last = offset == 196_608;
            pair.data_out(
                7,
                ask.ttt,
                number as u32,
                offset as u32,
                last,
                &data[offset..offset + 65536],
            );
        }
        let command = pair.command();
        assert_eq!(command.data, data);
        pair.good(&command);
        assert_eq!(
            ScsiResponse::parse(&pair.only().bhs).numbers.stat_sn,
            ask.numbers.stat_sn
        );
    }
}

#[test]
fn windows_asks_for_luns_with_an_allocation_of_16() {
    let (mut pair, _) = windows(config());
    let mut command = read(9, 16);
    command.cdb[0] = 0xa0;
    command.cdb[9] = 16;
    pair.scsi(command, &[]);
    let command = pair.command();
    let luns = [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    pair.complete(
        &command,
        Outcome {
            data: bytes(&luns),
            transfer_len: 16,
            ..Outcome::default()
        },
    );
    let pdu = pair.only();
    assert_eq!(DataIn::parse(&pdu.bhs).status, Some((GOOD, Residual::Exact)));
    // A missing pad makes it lose the frames: the length on the wire is always whole words (checked by the harness).
    let mut command = read(10, 255);
    command.cdb[0] = 0x12;
    pair.scsi(command, &[]);
    let command = pair.command();
    pair.complete(
        &command,
        Outcome {
            data: bytes(&[1; 5]),
            transfer_len: 5,
            ..Outcome::default()
        },
    );
    assert_eq!(
        DataIn::parse(&pair.only().bhs).status,
        Some((GOOD, Residual::Underflow(250)))
    );
}

#[test]
fn windows_resets_and_logs_in_again() {
    let (mut pair, _) = windows(config());
    pair.scsi(read(1, 512), &[]);
    let slow = pair.command();
    pair.tmf(TmfFunction::LOGICAL_UNIT_RESET, 2, u32::MAX, CmdSn(0));
    let stillpoint_iscsi::Event::TaskManagement { tmf, affected, .. } = pair.event() else {
        panic!()
    };
    assert_eq!(affected, [slow.task]);
    pair.conn.tmf_complete(pair.now, tmf, TmfResponse::COMPLETE);
    pair.silent();
    // The new session's login ends this one; what the disk says afterwards goes nowhere.
    pair.conn.close();
    pair.good(&slow);
    pair.silent();
    windows(config());
}

#[test]
fn linux_logs_in_with_one_pdu() {
    let mut pair = Pair::new(config(), Targets::default());
    let offer = [
        "InitiatorName=iqn.1993-08.org.debian:01:abc",
        "InitiatorAlias=guest",
        "TargetName=iqn.2026-01.test:disk",
        "SessionType=Normal",
        "HeaderDigest=None",
        "DataDigest=None",
        "DefaultTime2Wait=2",
        "DefaultTime2Retain=0",
        "IFMarker=No",
        "OFMarker=No",
        "ErrorRecoveryLevel=0",
        "InitialR2T=No",
        "ImmediateData=Yes",
        "MaxBurstLength=16776192",
        "FirstBurstLength=262144",
        "MaxOutstandingR2T=1",
        "MaxConnections=1",
        "DataPDUInOrder=Yes",
        "DataSequenceInOrder=Yes",
        "MaxRecvDataSegmentLength=262144",
    ];
    pair.send(&login_bytes(0x87, [0, 2, 0x3d, 0, 0, 1], 0, 0, 1), &text(&offer))
        .unwrap();
    let answer = finish(&mut pair).text();
    only_offered(&offer, &answer);
    for expected in [
        "IFMarker=No",
        "OFMarker=No",
        "MaxBurstLength=1048576",
        "FirstBurstLength=262144",
    ] {
        assert!(answer.contains(&expected.to_owned()), "{expected} in {answer:?}");
    }
    let info = pair.conn.info();
    assert_eq!(info.initiator_alias.as_deref(), Some("guest"));
    assert_eq!(info.isid.unwrap().to_string(), "00023d000001");
    // 1 MiB in one WRITE(10): the first burst immediate, then one R2T for the rest.
    let data = pattern(2, 1 << 20);
    pair.scsi(write(1, 1 << 20), &data[..262_144]);
    let ask = R2t::parse(&pair.only().bhs);
    assert_eq!((ask.buffer_offset, ask.desired_len), (262_144, 786_432));
    for (number, offset) in (262_144..1 << 20).step_by(262_144).enumerate() {
        let last = offset == 786_432;
        pair.data_out(
            1,
            ask.ttt,
            number as u32,
            offset as u32,
            last,
            &data[offset..offset + 262_144],
        );
    }
    assert_eq!(pair.command().data, data);
    // Its pings, every five seconds.
    pair.send(
        &nop_out(0x1000_0000, Ttt::RESERVED, true, pair.cmd_sn).encode(),
        &[],
    )
    .unwrap();
    assert_eq!(pair.only().opcode(), Opcode::NOP_IN);
}

#[test]
fn linux_asks_for_four_bytes_of_each_page_first() {
    let mut pair = Pair::logged_in(config(), &["MaxRecvDataSegmentLength=262144"]);
    let page = pattern(3, 64);
    for edtl in [4, 64] {
        pair.scsi(read(edtl, edtl), &[]);
        let command = pair.command();
        // The SCSI layer truncates by ALLOCATION LENGTH: no residual.
        let data = bytes(&page[..edtl as usize]);
        pair.complete(
            &command,
            Outcome {
                data,
                transfer_len: u64::from(edtl),
                ..Outcome::default()
            },
        );
        assert_eq!(
            DataIn::parse(&pair.only().bhs).status,
            Some((GOOD, Residual::Exact))
        );
    }
}

#[test]
fn open_iscsi_with_chap_begins_with_security_and_no_transit() {
    let secret = b"chap-secret-12";
    let chap =
        stillpoint_iscsi::ChapPolicy::new("u", secret, None, stillpoint_iscsi::ChapAlgorithm::ALL).unwrap();
    let mut pair = Pair::new(
        config(),
        Targets {
            chap: Some(chap),
            ..Targets::default()
        },
    );
    let isid = [0, 2, 0x3d, 0, 0, 1];
    let names = [
        "InitiatorName=iqn.1993-08.org.debian:01:abc",
        "TargetName=iqn.2026-01.test:disk",
        "AuthMethod=CHAP,None",
    ];
    pair.send(&login_bytes(0x00, isid, 0, 0, 1), &text(&names))
        .unwrap();
    assert!(pair.only().text().contains(&"AuthMethod=CHAP".to_owned()));
    pair.send(&login_bytes(0x00, isid, 0, 0, 1), &text(&["CHAP_A=5"]))
        .unwrap();
    let answer = pair.only().text();
    let value = |key: &str| answer.iter().find_map(|pair| pair.strip_prefix(key)).unwrap();
    let challenge = data_encoding::HEXLOWER
        .decode(value("CHAP_C=0x").as_bytes())
        .unwrap();
    let identifier = value("CHAP_I=").parse().unwrap();
    let response = stillpoint_iscsi::ChapAlgorithm::Md5.response(identifier, secret, &challenge);
    let response = format!("CHAP_R=0x{}", data_encoding::HEXLOWER.encode(&response));
    pair.send(&login_bytes(0x81, isid, 0, 0, 1), &text(&["CHAP_N=u", &response]))
        .unwrap();
    assert_eq!(pair.only().bhs[1], 0x81);
    pair.send(&login_bytes(0x87, isid, 0, 0, 1), &text(&["HeaderDigest=None"]))
        .unwrap();
    finish(&mut pair);
}

#[test]
fn qemu_logs_in() {
    let mut pair = Pair::new(config(), Targets::default());
    let offer = [
        "InitiatorName=iqn.2008-11.org.linux-kvm",
        "TargetName=iqn.2026-01.test:disk",
        "SessionType=Normal",
        "HeaderDigest=None,CRC32C",
        "DataDigest=None",
        "InitialR2T=No",
        "ImmediateData=Yes",
        "MaxBurstLength=262144",
        "FirstBurstLength=262144",
        "DefaultTime2Wait=2",
        "MaxRecvDataSegmentLength=262144",
        "IFMarker=No",
        "OFMarker=No",
    ];
    pair.send(&login_bytes(0x87, [0x80, 1, 2, 3, 0, 0], 1, 1, 0), &text(&offer))
        .unwrap();
    only_offered(&offer, &finish(&mut pair).text());
    assert_eq!(pair.cmd_sn, CmdSn(0));
}

#[test]
fn ipxe_boots() {
    let mut pair = Pair::new(config(), Targets::default());
    let isid = [0x40, 0, 0x27, 0x12, 0x34, 0x56];
    let names = [
        "InitiatorName=iqn.2010-04.org.ipxe:abc",
        "TargetName=iqn.2026-01.test:disk",
        "SessionType=Normal",
        "AuthMethod=None",
    ];
    pair.send(&login_bytes(0x81, isid, 0, 1, 0), &text(&names))
        .unwrap();
    assert_eq!(pair.only().text(), ["TargetPortalGroupTag=1", "AuthMethod=None"]);
    let offer = [
        "HeaderDigest=None",
        "DataDigest=None",
        "MaxConnections=1",
        "InitialR2T=Yes",
        "ImmediateData=No",
        "MaxRecvDataSegmentLength=8192",
        "MaxBurstLength=262144",
        "FirstBurstLength=65536",
        "DefaultTime2Wait=0",
        "DefaultTime2Retain=0",
        "MaxOutstandingR2T=1",
        "DataPDUInOrder=Yes",
        "DataSequenceInOrder=Yes",
        "ErrorRecoveryLevel=0",
    ];
    pair.send(&login_bytes(0x87, isid, 0, 1, 0), &text(&offer))
        .unwrap();
    let answer = finish(&mut pair).text();
    only_offered(&offer, &answer);
    assert!(
        !answer
            .iter()
            .any(|pair| pair.ends_with("Irrelevant") || pair.ends_with("Reject")),
        "{answer:?}"
    );
    pair.scsi(read(2, 65536), &[]);
    let command = pair.command();
    pair.complete(
        &command,
        Outcome {
            data: vec![1; 65536].into(),
            transfer_len: 65536,
            ..Outcome::default()
        },
    );
    assert_eq!(pair.receive().len(), 8, "its segments have 8192 bytes");
    // It never answers a ping, and is not ended for that while the operator looks at a boot menu.
    let times = config().times;
    pair.sleep(times.ping_idle).unwrap();
    pair.receive();
    pair.sleep(times.ping_answer * 20).unwrap();
    assert!(!pair.conn.is_closed());
}

fn esxi() -> Pair {
    let mut pair = Pair::new(config(), Targets::default());
    let offer = [
        "InitiatorName=iqn.1998-01.com.vmware:esx-1",
        "TargetName=iqn.2026-01.test:disk",
        "SessionType=Normal",
        "HeaderDigest=None",
        "DataDigest=None",
        "ErrorRecoveryLevel=0",
        "MaxBurstLength=262144",
        "FirstBurstLength=262144",
        "MaxRecvDataSegmentLength=131072",
    ];
    pair.send(&login_bytes(0x87, [0, 2, 0x3d, 0, 0, 1], 1, 1, 1), &text(&offer))
        .unwrap();
    finish(&mut pair);
    pair
}

#[test]
fn esxi_polls_with_the_r_bit() {
    let mut pair = esxi();
    // TEST UNIT READY with the R bit and EDTL 0, and the 85h poll that is answered with 5/20/00.
    pair.scsi(read(1, 0), &[]);
    let command = pair.command();
    pair.good(&command);
    assert_eq!(ScsiResponse::parse(&pair.only().bhs).residual, Residual::Exact);
    pair.scsi(
        ScsiCommand {
            edtl: 512,
            ..read(2, 512)
        },
        &[],
    );
    let command = pair.command();
    let sense = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0];
    pair.complete(
        &command,
        Outcome {
            status: CHECK_CONDITION,
            sense: bytes(&sense),
            ..Outcome::default()
        },
    );
    let pdu = pair.only();
    assert_eq!(ScsiResponse::parse(&pdu.bhs).residual, Residual::Underflow(512));
    assert_eq!((pdu.data.len(), pdu.data[4], pdu.data[14]), (20, 5, 0x20));
}

#[test]
fn esxi_gets_no_false_underflow_on_writes() {
    let mut pair = esxi();
    let data = pattern(4, 16384);
    pair.scsi(write(1, 16384), &data[..8192]);
    let ask = R2t::parse(&pair.only().bhs);
    assert_eq!((ask.buffer_offset, ask.desired_len), (8192, 8192));
    pair.data_out(1, ask.ttt, 0, 8192, true, &data[8192..]);
    let command = pair.command();
    pair.good(&command);
    let pdu = pair.only();
    assert_eq!(
        (ScsiResponse::parse(&pdu.bhs).residual, pdu.bhs[1]),
        (Residual::Exact, 0x80)
    );
}

#[test]
fn esxi_aborts_what_has_just_ended() {
    let mut pair = esxi();
    pair.scsi(plain(1), &[]);
    let command = pair.command();
    pair.good(&command);
    pair.only();
    pair.tmf(TmfFunction::ABORT_TASK, 50, 1, CmdSn(1));
    assert_eq!(TmfReply::parse(&pair.only().bhs).response, TmfResponse::COMPLETE);
    // What never was is still not there, for ESXi too.
    pair.tmf(TmfFunction::ABORT_TASK, 51, 77, CmdSn(1));
    assert_eq!(
        TmfReply::parse(&pair.only().bhs).response,
        TmfResponse::TASK_DOES_NOT_EXIST
    );
}

#[test]
fn discovery_as_windows_does_it() {
    let mut pair = Pair::new(config(), Targets::default());
    let offer = [
        "InitiatorName=iqn.1991-05.com.microsoft:host",
        "SessionType=Discovery",
        "HeaderDigest=None,CRC32C",
        "DataDigest=None,CRC32C",
        "MaxRecvDataSegmentLength=65536",
        "DefaultTime2Wait=0",
        "DefaultTime2Retain=60",
    ];
    pair.send(&login_bytes(0x87, WINDOWS, 1, 1, 1), &text(&offer))
        .unwrap();
    only_offered(&offer, &finish(&mut pair).text());
    let sn = pair.next_cmd_sn();
    pair.send(
        &text_request(2, Ttt::RESERVED, sn).encode(),
        &text(&["SendTargets=All"]),
    )
    .unwrap();
    let pdu = pair.only();
    assert!(TextResponse::parse(&pdu.bhs).is_final);
    // Two separate keys, and the group after a comma.
    assert_eq!(
        pdu.data,
        b"TargetName=iqn.2026-01.test:disk\0TargetAddress=[::1]:3260,1\0"
    );
}
