//! Properties: no bytes make the target panic or hold without bound; how the bytes are cut makes no difference; every answer
//! of the negotiation follows the result function of its key (RFC 7143 §13).
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use common::*;
use proptest::prelude::*;
use stillpoint_iscsi::pdu::{Bhs, Stage};
use stillpoint_iscsi::{Admission, CmdSn, Event, Outcome, TmfResponse, Tsih, Ttt};

/// A PDU with fields that are close to right often enough to get somewhere.
fn any_pdu() -> impl Strategy<Value = (Bhs, Vec<u8>)> {
    let opcode = prop_oneof![
        4 => Just(0x01u8),
        4 => Just(0x05),
        1 => prop::sample::select(vec![0x00, 0x02, 0x03, 0x04, 0x06, 0x10]),
        1 => any::<u8>(),
    ];
    let small = || prop_oneof![4 => 0u32..4, 1 => any::<u32>(), 1 => Just(u32::MAX)];
    let lengths = prop_oneof![3 => Just(0u32), 2 => 0u32..2048, 1 => any::<u32>()];
    (
        opcode,
        any::<bool>(),
        any::<u8>(),
        small(),
        small(),
        small(),
        small(),
        lengths,
        0usize..700,
        any::<[u8; 16]>(),
    )
        .prop_map(
            |(opcode, immediate, flags, itt, word20, cmd_sn, data_sn, offset, len, cdb)| {
                let mut bhs = [0; 48];
                bhs[0] = opcode | if immediate { 0x40 } else { 0 };
                bhs[1] = flags;
                bhs[16..20].copy_from_slice(&itt.to_be_bytes());
                bhs[20..24].copy_from_slice(&word20.to_be_bytes());
                bhs[24..28].copy_from_slice(&cmd_sn.to_be_bytes());
                bhs[32..48].copy_from_slice(&cdb);
                if opcode == 0x05 {
                    bhs[36..40].copy_from_slice(&data_sn.to_be_bytes());
                    bhs[40..44].copy_from_slice(&offset.to_be_bytes());
                }
                (bhs, vec![0x5a; len])
            },
        )
}

/// What the owner does between PDUs.
#[derive(Debug, Clone, Copy)]
enum Act {
    Nothing,
    Finish,
    Read,
    Abort,
    Sleep(u16),
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Nothing),
        3 => Just(Act::Finish),
        2 => Just(Act::Read),
        1 => Just(Act::Abort),
        1 => (0u16..20_000).prop_map(Act::Sleep),
    ]
}

fn act(pair: &mut Pair, running: &mut Vec<stillpoint_iscsi::TaskId>, act: Act) {
    match act {
        Act::Nothing => {}
        Act::Finish => {
            while let Some(event) = pair.conn.poll_event() {
                match event {
                    Event::Command(command) => {
                        assert!(command.data.len() <= command.edtl as usize);
                        running.push(command.task);
                    }
                    Event::TaskManagement { tmf, .. } => {
                        pair.conn.tmf_complete(pair.now, tmf, TmfResponse::COMPLETE)
                    }
                    _ => {}
                }
            }
            for task in running.drain(..) {
                let outcome = Outcome {
                    data: bytes(&[7; 600]),
                    transfer_len: 600,
                    ..Outcome::default()
                };
                pair.conn.complete(pair.now, task, outcome);
            }
        }
        Act::Read => {
            pair.receive();
        }
        Act::Abort => {
            pair.conn.abort_lun_tasks(None);
        }
        Act::Sleep(ms) => {
            let _ = pair.sleep(std::time::Duration::from_millis(u64::from(ms)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_at_login(bytes in prop::collection::vec(any::<u8>(), 0..2000), step in 1usize..600) {
        let mut pair = Pair::new(config(), Targets::default());
        pair.step = step;
        let _ = pair.send_bytes(&bytes);
        prop_assert!(!pair.conn.space().is_empty());
        pair.receive();
    }

    #[test]
    fn arbitrary_text_at_login(text in "[A-Za-z0-9=,~.\\x00-]{0,400}", stage in 0u8..2, transit: bool) {
        let mut pair = Pair::new(config(), Targets::default());
        let names = format!("InitiatorName=a\0TargetName={TARGET}\0{text}");
        let request = login_request(CmdSn(1), Stage(stage), transit.then_some(Stage::FULL_FEATURE));
        let _ = pair.send(&request.encode(), names.as_bytes());
        for pdu in pair.receive() {
            prop_assert!(pdu.data.len() <= 8192);
        }
    }

    #[test]
    fn arbitrary_pdus_in_a_session(
        pdus in prop::collection::vec((any_pdu(), any_act()), 1..60),
        digests: bool,
        unsolicited: bool,
    ) {
        let mut ours = config();
        ours.keys.initial_r2t = !unsolicited;
        ours.limits.queue_depth = 4;
        ours.limits.write_buffer_bytes = 4096;
        ours.limits.read_buffer_bytes = 4096;
        let digest = if digests { "CRC32C" } else { "None" };
        let mut pair = Pair::new(ours, Targets::default());
        pair.cmd_sn = CmdSn(0);
        pair.login(&["InitialR2T=No", &format!("HeaderDigest={digest}"), &format!("DataDigest={digest}")]);
        let mut running = Vec::new();
        for ((bhs, data), owner) in pdus {
            if pair.send(&bhs, &data).is_err() {
                break;
            }
            act(&mut pair, &mut running, owner);
            prop_assert!(pair.conn.outstanding() <= 4 + 16 + running.len());
            prop_assert!(!pair.conn.space().is_empty());
            if let Some(deadline) = pair.conn.poll_timeout() {
                prop_assert!(deadline >= pair.now || pair.conn.is_closed() || pair.conn.handle_timeout(pair.now).is_ok());
            }
        }
        pair.receive();
        // After an error nothing is left to be done but to close.
        pair.conn.close();
        prop_assert!(pair.conn.is_closed());
    }

    #[test]
    fn cutting_makes_no_difference(
        pdus in prop::collection::vec(any_pdu(), 1..30),
        step in 1usize..5000,
        digests: bool,
    ) {
        let run = |step: usize| {
            let mut pair = Pair::new(config(), Targets::default());
            pair.cmd_sn = CmdSn(0);
            pair.step = step;
            let digest = if digests { "CRC32C" } else { "None" };
            pair.login(&[&format!("HeaderDigest={digest}"), &format!("DataDigest={digest}")]);
            let all: Vec<u8> = pdus.iter().flat_map(|(bhs, data)| wire(bhs, &[], data, digests, digests)).collect();
            let result = pair.send_bytes(&all);
            let mut commands = Vec::new();
            while let Some(event) = pair.conn.poll_event() {
                if let Event::Command(command) = event {
                    commands.push((command.itt, command.data.clone()));
                    pair.good(&command);
                }
            }
            (result, commands, pair.receive())
        };
        prop_assert_eq!(run(step), run(usize::MAX));
    }
}

/// The result function of a key, written down from the RFC and not from our code.
#[derive(Debug, Clone, Copy)]
enum Rule {
    Min { low: u64, high: u64, ours: u64 },
    Max { low: u64, high: u64, ours: u64 },
    Or(bool),
    And(bool),
}

const RULES: [(&str, Rule); 10] = [
    (
        "MaxBurstLength",
        Rule::Min {
            low: 512,
            high: 16_777_215,
            ours: 1_048_576,
        },
    ),
    (
        "MaxOutstandingR2T",
        Rule::Min {
            low: 1,
            high: 65535,
            ours: 4,
        },
    ),
    (
        "DefaultTime2Wait",
        Rule::Max {
            low: 0,
            high: 3600,
            ours: 2,
        },
    ),
    (
        "DefaultTime2Retain",
        Rule::Min {
            low: 0,
            high: 3600,
            ours: 20,
        },
    ),
    (
        "MaxConnections",
        Rule::Min {
            low: 1,
            high: 65535,
            ours: 1,
        },
    ),
    (
        "ErrorRecoveryLevel",
        Rule::Min {
            low: 0,
            high: 2,
            ours: 0,
        },
    ),
    ("InitialR2T", Rule::Or(true)),
    ("ImmediateData", Rule::And(true)),
    ("DataPDUInOrder", Rule::Or(true)),
    ("DataSequenceInOrder", Rule::Or(true)),
];

fn expected(rule: Rule, number: u64, yes: bool) -> String {
    let word = |yes: bool| if yes { "Yes" } else { "No" }.to_owned();
    match rule {
        Rule::Min { low, high, ours } if (low..=high).contains(&number) => number.min(ours).to_string(),
        Rule::Max { low, high, ours } if (low..=high).contains(&number) => number.max(ours).to_string(),
        Rule::Min { .. } | Rule::Max { .. } => "Reject".to_owned(),
        Rule::Or(ours) => word(yes || ours),
        Rule::And(ours) => word(yes && ours),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn answers_follow_the_result_functions(
        offers in prop::collection::vec(
            (prop_oneof![0u64..10, 0u64..5000, 0u64..20_000_000, any::<u64>()], any::<bool>(), any::<bool>(), any::<bool>()),
            RULES.len(),
        ),
        first_burst in 512u64..16_777_215,
    ) {
        let mut keys = Vec::new();
        let mut want = Vec::new();
        let mut max_burst = 262_144;
        for ((key, rule), (number, yes, hex, offered)) in RULES.into_iter().zip(offers) {
            if !offered {
                continue;
            }
            let value = match rule {
                Rule::Or(_) | Rule::And(_) => if yes { "Yes" } else { "No" }.to_owned(),
                _ if hex => format!("0x{number:x}"),
                _ => number.to_string(),
            };
            let answer = expected(rule, number, yes);
            if key == "MaxBurstLength" && answer != "Reject" {
                max_burst = answer.parse().unwrap();
            }
            keys.push(format!("{key}={value}"));
            want.push(format!("{key}={answer}"));
        }
        keys.insert(0, format!("FirstBurstLength={first_burst}"));
        want.push(format!("FirstBurstLength={}", first_burst.min(262_144).min(max_burst)));
        let mut pair = Pair::new(config(), Targets::default());
        let names = [format!("InitiatorName={INITIATOR}"), format!("TargetName={TARGET}")];
        let all: Vec<&str> = names.iter().chain(&keys).map(String::as_str).collect();
        let request = login_request(CmdSn(1), Stage::OPERATIONAL, Some(Stage::FULL_FEATURE));
        pair.send(&request.encode(), &text(&all)).unwrap();
        pair.event();
        pair.conn.admit(pair.now, Admission::Accept { tsih: Tsih(1) });
        let answer = pair.only().text();
        prop_assert_eq!(&answer[2..], &want[..]);
        let params = pair.conn.info().params.unwrap();
        prop_assert!(params.first_burst_length <= params.max_burst_length);
        let nop = nop_out(1, Ttt::RESERVED, true, CmdSn(1));
        pair.send(&nop.encode(), &[]).unwrap();
    }
}
