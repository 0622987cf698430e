//! The login phase (RFC 7143 §6.3, §12): stages, keys, CHAP, refusals.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use common::*;
use stillpoint_iscsi::pdu::{LoginRequest, LoginResponse, NopOut, Opcode, Stage};
use stillpoint_iscsi::{
    Admission, AuthFault, ChapAlgorithm, ChapPolicy, Cid, CmdSn, DigestPolicy, Error, Isid, Itt, LoginFault,
    LoginStatus, Phase, Tsih, Ttt,
};

const NAMES: [&str; 3] = [
    "InitiatorName=iqn.2026-01.test:initiator",
    "TargetName=iqn.2026-01.test:disk",
    "SessionType=Normal",
];

fn names_and(keys: &[&str]) -> Vec<u8> {
    text(&NAMES.iter().chain(keys).copied().collect::<Vec<_>>())
}

fn security(next: Option<Stage>) -> LoginRequest {
    login_request(CmdSn(1), Stage::SECURITY, next)
}

fn operational(next: Option<Stage>) -> LoginRequest {
    login_request(CmdSn(1), Stage::OPERATIONAL, next)
}

/// Sends one request that must be refused; the status, on the wire and in the error.
fn refused(pair: &mut Pair, request: &LoginRequest, data: &[u8]) -> LoginStatus {
    let error = pair.send(&request.encode(), data).unwrap_err();
    let Error::LoginRefused(status) = error else {
        panic!("{error}")
    };
    let response = LoginResponse::parse(&pair.only().bhs);
    assert_eq!(response.status, status.code());
    assert!(!response.transit);
    assert!(pair.conn.is_closed());
    status
}

fn refused_at_once(request: &LoginRequest, data: &[u8]) -> LoginStatus {
    refused(&mut Pair::new(config(), Targets::default()), request, data)
}

#[test]
fn one_pdu_login_answers_offered_keys_only() {
    let mut pair = Pair::new(config(), Targets::default());
    let answer = pair.login(&["HeaderDigest=None", "InitialR2T=No"]);
    // TargetPortalGroupTag in the first response, and our own MaxRecvDataSegmentLength.
    assert_eq!(
        answer,
        [
            "TargetPortalGroupTag=1",
            "MaxRecvDataSegmentLength=262144",
            "HeaderDigest=None",
            "InitialR2T=Yes"
        ]
    );
    assert_eq!(pair.conn.info().phase, Phase::FullFeature);
}

#[test]
fn max_cmd_sn_runs_ahead_from_the_first_response() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&security(None).encode(), &names_and(&[])).unwrap();
    let pdu = pair.only();
    let response = LoginResponse::parse(&pdu.bhs);
    assert_eq!(
        (response.numbers.exp_cmd_sn, response.numbers.max_cmd_sn),
        (CmdSn(1), CmdSn(128))
    );
    assert_eq!(response.tsih, Tsih(0), "only the final response has the handle");
    assert_eq!(pdu.text(), ["TargetPortalGroupTag=1"]);
}

#[test]
fn alias_is_declared() {
    let targets = Targets {
        alias: Some("Database".to_owned()),
        ..Targets::default()
    };
    let mut pair = Pair::new(config(), targets);
    assert!(pair.login(&[]).contains(&"TargetAlias=Database".to_owned()));
}

#[test]
fn names_are_mandatory_in_the_first_request() {
    let next = Some(Stage::FULL_FEATURE);
    let status = refused_at_once(&operational(next), &text(&["TargetName=iqn.2026-01.test:disk"]));
    assert_eq!(status, LoginStatus::MissingParameter("InitiatorName"));
    let status = refused_at_once(&operational(next), &text(&["InitiatorName=a"]));
    assert_eq!(status, LoginStatus::MissingParameter("TargetName"));
    let status = refused_at_once(&operational(next), &text(&["InitiatorName=a", "SessionType=Fun"]));
    assert_eq!(status, LoginStatus::SessionTypeNotSupported);
    let long = format!("InitiatorName={}", "a".repeat(224));
    let status = refused_at_once(&operational(next), &text(&[&long, "TargetName=b"]));
    assert_eq!(status.code(), (2, 0));
}

#[test]
fn directory_refuses_and_redirects() {
    let next = Some(Stage::FULL_FEATURE);
    let data = text(&["InitiatorName=a", "TargetName=iqn.unknown"]);
    assert_eq!(refused_at_once(&operational(next), &data), LoginStatus::NotFound);
    let moved = LoginStatus::MovedTemporarily("[2001:db8::1]:3261".to_owned());
    let mut pair = Pair::new(
        config(),
        Targets {
            refuse: Some(moved),
            ..Targets::default()
        },
    );
    pair.send(&operational(next).encode(), &names_and(&[]))
        .unwrap_err();
    let pdu = pair.only();
    assert_eq!(LoginResponse::parse(&pdu.bhs).status, (1, 1));
    // "the comma and portal-group-tag MUST be omitted" (§13.8).
    assert_eq!(pdu.text(), ["TargetAddress=[2001:db8::1]:3261"]);
}

#[test]
fn version_tsih_and_identity() {
    let data = names_and(&[]);
    let newer = LoginRequest {
        version_min: 1,
        version_max: 2,
        ..security(None)
    };
    assert_eq!(refused_at_once(&newer, &data), LoginStatus::UnsupportedVersion);
    let joining = LoginRequest {
        tsih: Tsih(5),
        ..security(None)
    };
    let others = [
        LoginRequest {
            tsih: Tsih(6),
            ..joining
        },
        LoginRequest {
            isid: Isid([9; 6]),
            ..joining
        },
    ];
    for stranger in others {
        assert_eq!(
            refused_at_once(&stranger, &data),
            LoginStatus::SessionDoesNotExist
        );
    }
    assert_eq!(refused_at_once(&joining, &data), LoginStatus::TooManyConnections);
    type Change = fn(&mut LoginRequest);
    let changes: [(&str, Change); 4] = [
        ("InitiatorTaskTag", |r| r.itt = Itt(2)),
        ("ISID", |r| r.isid = Isid([9; 6])),
        ("TSIH", |r| r.tsih = Tsih(1)),
        ("CID", |r| r.cid = Cid(2)),
    ];
    for (name, change) in changes {
        let mut pair = Pair::new(config(), Targets::default());
        pair.send(&security(None).encode(), &data).unwrap();
        pair.only();
        let mut request = security(None);
        change(&mut request);
        let status = refused(&mut pair, &request, &[]);
        assert_eq!(status, LoginStatus::InitiatorError(LoginFault::Changed(name)));
    }
}

#[test]
fn stages_and_flags_are_checked() {
    let data = names_and(&[]);
    let bad = |request: &LoginRequest| match refused_at_once(request, &data) {
        LoginStatus::InitiatorError(fault) => fault,
        other => panic!("{other}"),
    };
    assert_eq!(
        bad(&login_request(CmdSn(1), Stage(2), None)),
        LoginFault::ReservedStage(2)
    );
    assert_eq!(
        bad(&login_request(CmdSn(1), Stage(3), None)),
        LoginFault::ReservedStage(3)
    );
    assert_eq!(
        bad(&operational(Some(Stage(1)))),
        LoginFault::Transition { from: 1, to: 1 }
    );
    assert_eq!(
        bad(&operational(Some(Stage(0)))),
        LoginFault::Transition { from: 1, to: 0 }
    );
    assert_eq!(
        bad(&security(Some(Stage(2)))),
        LoginFault::Transition { from: 0, to: 2 }
    );
    assert_eq!(
        bad(&security(Some(Stage(0)))),
        LoginFault::Transition { from: 0, to: 0 }
    );
    let both = LoginRequest {
        continues: true,
        ..operational(Some(Stage::FULL_FEATURE))
    };
    assert_eq!(bad(&both), LoginFault::TransitAndContinue);
    // Back from operational to security.
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&operational(None).encode(), &data).unwrap();
    pair.only();
    let status = refused(&mut pair, &security(None), &[]);
    assert_eq!(
        status,
        LoginStatus::InitiatorError(LoginFault::WrongStage { expected: 1, got: 0 })
    );
}

#[test]
fn security_then_operational_then_full_feature() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(
        &security(Some(Stage::OPERATIONAL)).encode(),
        &names_and(&["AuthMethod=CHAP,None"]),
    )
    .unwrap();
    let pdu = pair.only();
    let response = LoginResponse::parse(&pdu.bhs);
    assert_eq!(
        (response.transit, response.current, response.next),
        (true, Stage::SECURITY, Stage::OPERATIONAL)
    );
    assert_eq!(pdu.text(), ["TargetPortalGroupTag=1", "AuthMethod=None"]);
    pair.send(&operational(None).encode(), &text(&["MaxBurstLength=524288"]))
        .unwrap();
    let pdu = pair.only();
    assert!(
        !LoginResponse::parse(&pdu.bhs).transit,
        "the target moves on only when asked to"
    );
    assert_eq!(
        pdu.text(),
        ["MaxRecvDataSegmentLength=262144", "MaxBurstLength=524288"]
    );
    pair.send(&operational(Some(Stage::FULL_FEATURE)).encode(), &[])
        .unwrap();
    pair.silent();
    pair.admit();
    assert!(LoginResponse::parse(&pair.only().bhs).transit);
}

#[test]
fn security_straight_to_full_feature_means_defaults() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&security(Some(Stage::FULL_FEATURE)).encode(), &names_and(&[]))
        .unwrap();
    pair.admit();
    let response = LoginResponse::parse(&pair.only().bhs);
    assert_eq!(
        (response.next, response.tsih),
        (Stage::FULL_FEATURE, Tsih(0x1234))
    );
    let params = pair.conn.info().params.unwrap();
    assert_eq!(
        (
            params.target_max_recv,
            params.first_burst_length,
            params.initial_r2t
        ),
        (8192, 65536, true)
    );
}

#[test]
fn keys_come_once_and_in_their_place() {
    let next = Some(Stage::FULL_FEATURE);
    let fault = |request: &LoginRequest, keys: &[&str]| match refused_at_once(request, &names_and(keys)) {
        LoginStatus::InitiatorError(fault) => fault,
        other => panic!("{other}"),
    };
    let twice = ["MaxBurstLength=512", "MaxBurstLength=512"];
    assert_eq!(
        fault(&operational(next), &twice),
        LoginFault::KeyRepeated("MaxBurstLength".to_owned())
    );
    let twice = ["TargetName=iqn.2026-01.test:disk"];
    assert_eq!(
        fault(&operational(next), &twice),
        LoginFault::KeyRepeated("TargetName".to_owned())
    );
    for key in ["SendTargets=All", "CHAP_A=5", "TargetAddress=a"] {
        let name = key.split_once('=').unwrap().0.to_owned();
        assert_eq!(fault(&operational(next), &[key]), LoginFault::KeyNotAllowed(name));
    }
    for key in [
        "MaxBurstLength=512",
        "HeaderDigest=None",
        "SendTargets=All",
        "KRB_AP_REQ=0x00",
    ] {
        let name = key.split_once('=').unwrap().0.to_owned();
        assert_eq!(fault(&security(next), &[key]), LoginFault::KeyNotAllowed(name));
    }
    assert_eq!(
        fault(&operational(next), &["MaxBurstLength=Reject"]),
        LoginFault::BadValue("MaxBurstLength".to_owned())
    );
    // Twice in two requests.
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&operational(None).encode(), &names_and(&["MaxBurstLength=512"]))
        .unwrap();
    pair.only();
    let status = refused(&mut pair, &operational(next), &text(&["MaxBurstLength=1024"]));
    assert_eq!(
        status,
        LoginStatus::InitiatorError(LoginFault::KeyRepeated("MaxBurstLength".to_owned()))
    );
}

#[test]
fn unknown_keys_are_not_understood_in_both_stages() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(
        &security(Some(Stage::OPERATIONAL)).encode(),
        &names_and(&["X-com.example.a=1"]),
    )
    .unwrap();
    assert!(
        pair.only()
            .text()
            .contains(&"X-com.example.a=NotUnderstood".to_owned())
    );
    pair.send(
        &operational(None).encode(),
        &text(&["X-com.example.b=1", "Foo=2"]),
    )
    .unwrap();
    let answer = pair.only().text();
    assert!(answer.ends_with(&[
        "X-com.example.b=NotUnderstood".to_owned(),
        "Foo=NotUnderstood".to_owned()
    ]));
}

#[test]
fn answers_to_our_declarations_are_no_offers() {
    let mut pair = Pair::new(config(), Targets::default());
    let answer = pair.login(&["TargetAlias=NotUnderstood", "TargetPortalGroupTag=NotUnderstood"]);
    assert_eq!(answer.len(), 2);
}

#[test]
fn text_over_several_requests_is_put_together_first() {
    let mut pair = Pair::new(config(), Targets::default());
    let whole = names_and(&["InitialR2T=No", "MaxBurstLength=524288"]);
    let cut = whole.len() - 9;
    let first = LoginRequest {
        continues: true,
        ..operational(None)
    };
    pair.send(&first.encode(), &whole[..cut]).unwrap();
    let pdu = pair.only();
    // "MUST answer with a [...] Login Response with no data segment" (§6.2).
    assert_eq!((pdu.data.len(), pdu.bhs[1] & 0xc0), (0, 0));
    pair.send(&operational(Some(Stage::FULL_FEATURE)).encode(), &whole[cut..])
        .unwrap();
    pair.admit();
    assert!(pair.only().text().contains(&"MaxBurstLength=524288".to_owned()));
}

#[test]
fn text_has_a_cap_and_logins_have_an_end() {
    let mut pair = Pair::new(config(), Targets::default());
    let request = LoginRequest {
        continues: true,
        ..operational(None)
    }
    .encode();
    for _ in 0..8 {
        pair.send(&request, &[b'a'; 8192]).unwrap();
        pair.only();
    }
    let error = pair.send(&request, &[b'a'; 8192]).unwrap_err();
    assert!(matches!(
        error,
        Error::LoginRefused(LoginStatus::InitiatorError(LoginFault::Text(_)))
    ));

    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&security(None).encode(), &names_and(&[])).unwrap();
    let error = loop {
        pair.receive();
        if let Err(error) = pair.send(&security(None).encode(), &[]) {
            break error;
        }
    };
    assert_eq!(
        error,
        Error::LoginRefused(LoginStatus::InitiatorError(LoginFault::TooManyRequests))
    );
}

#[test]
fn long_answers_are_fetched_with_empty_requests() {
    let keys: Vec<String> = (0..120).map(|i| format!("X-{}{i}=1", "k".repeat(57))).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let data = names_and(&keys);
    let mut pair = Pair::new(config(), Targets::default());
    let (first, rest) = data.split_at(8192.min(data.len()));
    assert!(rest.is_empty());
    pair.send(&operational(Some(Stage::FULL_FEATURE)).encode(), first)
        .unwrap();
    let one = pair.only();
    let response = LoginResponse::parse(&one.bhs);
    assert!(response.continues && !response.transit && one.data.len() == 8192);
    pair.send(&operational(Some(Stage::FULL_FEATURE)).encode(), &[])
        .unwrap();
    pair.admit();
    let two = pair.only();
    assert!(LoginResponse::parse(&two.bhs).transit);
    let all = String::from_utf8([one.data, two.data].concat()).unwrap();
    assert_eq!(
        all.split_terminator('\0')
            .filter(|pair| pair.ends_with("=NotUnderstood"))
            .count(),
        120
    );
}

#[test]
fn login_waits_for_our_answer_and_for_admission() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&security(None).encode(), &names_and(&[])).unwrap();
    assert_eq!(
        pair.send(&security(None).encode(), &[]),
        Err(Error::LoginOutOfTurn)
    );
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&operational(Some(Stage::FULL_FEATURE)).encode(), &names_and(&[]))
        .unwrap();
    assert_eq!(
        pair.send(&operational(None).encode(), &[]),
        Err(Error::LoginOutOfTurn)
    );
}

#[test]
fn the_owner_may_refuse() {
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&operational(Some(Stage::FULL_FEATURE)).encode(), &names_and(&[]))
        .unwrap();
    pair.event();
    pair.conn
        .admit(pair.now, Admission::Refuse(LoginStatus::OutOfResources));
    assert!(!pair.conn.is_closed(), "the refusal is still to be sent");
    assert_eq!(LoginResponse::parse(&pair.only().bhs).status, (3, 2));
    assert!(pair.conn.is_closed());
    pair.no_event();
}

#[test]
fn other_pdus_before_login_end_the_connection() {
    let nop = NopOut {
        ..nop_out(1, Ttt::RESERVED, true, CmdSn(1))
    }
    .encode();
    let mut pair = Pair::new(config(), Targets::default());
    assert_eq!(pair.send(&nop, &[]), Err(Error::NotLoggedIn { opcode: 0 }));
    pair.silent();
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(&security(None).encode(), &names_and(&[])).unwrap();
    pair.only();
    assert_eq!(pair.send(&nop, &[]), Err(Error::NotLoggedIn { opcode: 0 }));
    assert_eq!(LoginResponse::parse(&pair.only().bhs).status, (2, 0xb));
    let http: Vec<u8> = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".repeat(4);
    let mut pair = Pair::new(config(), Targets::default());
    assert!(pair.send_bytes(&http).is_err());
}

#[test]
fn login_pdus_have_at_most_8192_bytes() {
    let mut pair = Pair::new(config(), Targets::default());
    let error = pair.send(&security(None).encode(), &[0; 8193]).unwrap_err();
    assert_eq!(
        error,
        Error::SegmentTooLong {
            opcode: Opcode::LOGIN_REQUEST.0,
            len: 8193,
            max: 8192
        }
    );
}

#[test]
fn first_burst_follows_max_burst_whatever_the_order() {
    let mut pair = Pair::new(config(), Targets::default());
    let answer = pair.login(&["FirstBurstLength=262144", "MaxBurstLength=65536"]);
    assert!(
        answer.contains(&"FirstBurstLength=65536".to_owned()),
        "{answer:?}"
    );
    // In a later request the answer cannot be taken back: what holds is the smaller one.
    let mut pair = Pair::new(config(), Targets::default());
    pair.send(
        &operational(None).encode(),
        &names_and(&["FirstBurstLength=262144"]),
    )
    .unwrap();
    pair.only();
    pair.send(
        &operational(Some(Stage::FULL_FEATURE)).encode(),
        &text(&["MaxBurstLength=65536"]),
    )
    .unwrap();
    pair.admit();
    pair.only();
    assert_eq!(pair.conn.info().params.unwrap().first_burst_length, 65536);
}

#[test]
fn required_digests_are_required() {
    let mut strict = config();
    strict.keys.header_digest = DigestPolicy::Require;
    let mut pair = Pair::new(strict.clone(), Targets::default());
    let status = refused(
        &mut pair,
        &operational(Some(Stage::FULL_FEATURE)),
        &names_and(&[]),
    );
    assert_eq!(status, LoginStatus::MissingParameter("HeaderDigest"));
    let mut pair = Pair::new(strict, Targets::default());
    let answer = pair.login(&["HeaderDigest=None,CRC32C"]);
    assert!(answer.contains(&"HeaderDigest=CRC32C".to_owned()));
}

// CHAP

const SECRET: &[u8] = b"initiator-secret";
const MUTUAL: &[u8] = b"our-own-secret!!";

fn chap(mutual: bool, algorithms: &[ChapAlgorithm]) -> Targets {
    let mutual = mutual.then(|| ("target-user".to_owned(), MUTUAL.to_vec()));
    Targets {
        chap: Some(ChapPolicy::new("user", SECRET, mutual, algorithms).unwrap()),
        ..Targets::default()
    }
}

fn value<'a>(answer: &'a [String], key: &str) -> &'a str {
    answer
        .iter()
        .find_map(|pair| pair.split_once('=').filter(|(name, _)| *name == key))
        .unwrap_or_else(|| panic!("{key} in {answer:?}"))
        .1
}

fn unhex(value: &str) -> Vec<u8> {
    data_encoding::HEXLOWER_PERMISSIVE
        .decode(value.strip_prefix("0x").unwrap().as_bytes())
        .unwrap()
}

fn hex(bytes: &[u8]) -> String {
    format!("0x{}", data_encoding::HEXLOWER.encode(bytes))
}

/// Goes through CHAP up to our challenge; algorithm, identifier and challenge.
fn challenged(pair: &mut Pair, offer: &str) -> (ChapAlgorithm, u8, Vec<u8>) {
    pair.send(&security(None).encode(), &names_and(&["AuthMethod=CHAP,None"]))
        .unwrap();
    let pdu = pair.only();
    assert_eq!(value(&pdu.text(), "AuthMethod"), "CHAP");
    assert!(!LoginResponse::parse(&pdu.bhs).transit);
    pair.send(&security(None).encode(), &text(&[&format!("CHAP_A={offer}")]))
        .unwrap();
    let answer = pair.only().text();
    let algorithm = ChapAlgorithm::from_number(value(&answer, "CHAP_A").parse().unwrap()).unwrap();
    (
        algorithm,
        value(&answer, "CHAP_I").parse().unwrap(),
        unhex(value(&answer, "CHAP_C")),
    )
}

fn proof(keys: &[String]) -> Vec<u8> {
    text(&keys.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn chap_one_way_with_every_algorithm() {
    for (offer, expected) in [
        ("5", ChapAlgorithm::Md5),
        ("6,5", ChapAlgorithm::Sha1),
        ("7,6,5", ChapAlgorithm::Sha256),
        // open-iscsi's own order: SHA3-256, SHA256, SHA1, MD5.
        ("8,7,6,5", ChapAlgorithm::Sha3_256),
        ("0x7", ChapAlgorithm::Sha256),
        ("56,128,5", ChapAlgorithm::Md5),
    ] {
        let mut pair = Pair::new(config(), chap(false, &ChapAlgorithm::ALL));
        let (algorithm, identifier, challenge) = challenged(&mut pair, offer);
        assert_eq!(algorithm, expected);
        assert_eq!(challenge.len(), algorithm.challenge_len());
        let response = algorithm.response(identifier, SECRET, &challenge);
        let data = proof(&["CHAP_N=user".to_owned(), format!("CHAP_R={}", hex(&response))]);
        pair.send(&security(Some(Stage::OPERATIONAL)).encode(), &data)
            .unwrap();
        let pdu = pair.only();
        assert!(LoginResponse::parse(&pdu.bhs).transit);
        assert_eq!(pdu.data.len(), 0);
    }
}

#[test]
fn chap_mutual_proves_us() {
    for base64 in [false, true] {
        let mut pair = Pair::new(config(), chap(true, &ChapAlgorithm::ALL));
        let (algorithm, identifier, challenge) = challenged(&mut pair, "7");
        let response = algorithm.response(identifier, SECRET, &challenge);
        let theirs = pattern(1, 32);
        let encode = |bytes: &[u8]| {
            if base64 {
                format!("0b{}", data_encoding::BASE64.encode(bytes))
            } else {
                hex(bytes)
            }
        };
        let data = proof(&[
            "CHAP_N=user".to_owned(),
            format!("CHAP_R={}", encode(&response)),
            "CHAP_I=42".to_owned(),
            format!("CHAP_C={}", encode(&theirs)),
        ]);
        pair.send(&security(Some(Stage::OPERATIONAL)).encode(), &data)
            .unwrap();
        let pdu = pair.only();
        let answer = pdu.text();
        assert_eq!(value(&answer, "CHAP_N"), "target-user");
        assert_eq!(
            unhex(value(&answer, "CHAP_R")),
            algorithm.response(42, MUTUAL, &theirs)
        );
        assert!(LoginResponse::parse(&pdu.bhs).transit);
    }
}

/// After our challenge sends what `keys` makes of the right response and of our challenge; the reason of the refusal.
fn chap_fails(mutual: bool, keys: impl Fn(String, &[u8]) -> Vec<String>) -> AuthFault {
    let mut pair = Pair::new(config(), chap(mutual, &ChapAlgorithm::ALL));
    let (algorithm, identifier, challenge) = challenged(&mut pair, "5");
    let right = hex(&algorithm.response(identifier, SECRET, &challenge));
    let data = proof(&keys(right, &challenge));
    match refused(&mut pair, &security(Some(Stage::OPERATIONAL)), &data) {
        LoginStatus::AuthenticationFailure(fault) => fault,
        other => panic!("{other}"),
    }
}

#[test]
fn chap_refuses_what_proves_nothing() {
    let n = || "CHAP_N=user".to_owned();
    let wrong = hex(&[0; 16]);
    assert_eq!(
        chap_fails(false, |_, _| vec![n(), format!("CHAP_R={wrong}")]),
        AuthFault::WrongSecret
    );
    assert_eq!(
        chap_fails(false, |_, _| vec![n(), "CHAP_R=0x00".to_owned()]),
        AuthFault::WrongSecret
    );
    assert_eq!(
        chap_fails(false, |r, _| vec![
            "CHAP_N=someone".to_owned(),
            format!("CHAP_R={r}")
        ]),
        AuthFault::UnknownUser
    );
    assert_eq!(
        chap_fails(false, |r, _| vec![format!("CHAP_R={r}")]),
        AuthFault::OutOfTurn("CHAP_N")
    );
    assert_eq!(
        chap_fails(false, |_, _| vec![n()]),
        AuthFault::OutOfTurn("CHAP_R")
    );
    assert_eq!(
        chap_fails(false, |_, _| vec![n(), "CHAP_R=17".to_owned()]),
        AuthFault::Unreadable("CHAP_R")
    );
    let long = format!("CHAP_R={}", hex(&[0; 1025]));
    assert_eq!(
        chap_fails(false, |_, _| vec![n(), long.clone()]),
        AuthFault::Unreadable("CHAP_R")
    );
}

#[test]
fn chap_mutual_refusals() {
    let keys = |r: String, i: &str, c: String| {
        vec![
            "CHAP_N=user".to_owned(),
            format!("CHAP_R={r}"),
            format!("CHAP_I={i}"),
            format!("CHAP_C={c}"),
        ]
    };
    let theirs = hex(&[1; 16]);
    // Nobody may use us to learn the answer to our own challenge.
    assert_eq!(
        chap_fails(true, |r, ours| keys(r, "1", hex(ours))),
        AuthFault::ReflectedChallenge
    );
    assert_eq!(
        chap_fails(false, |r, _| keys(r, "1", theirs.clone())),
        AuthFault::NoMutualSecret
    );
    assert_eq!(
        chap_fails(true, |r, _| keys(r, "256", theirs.clone())),
        AuthFault::Unreadable("CHAP_I")
    );
    assert_eq!(
        chap_fails(true, |r, _| keys(r, "1", hex(&[1; 1025]))),
        AuthFault::Unreadable("CHAP_C")
    );
    assert_eq!(
        chap_fails(true, |r, _| keys(r, "1", theirs.clone())[..3].to_vec()),
        AuthFault::OutOfTurn("CHAP_C")
    );
    // A wrong response gets no proof of ours.
    assert_eq!(
        chap_fails(true, |_, _| keys(hex(&[0; 16]), "1", theirs.clone())),
        AuthFault::WrongSecret
    );
}

#[test]
fn chap_cannot_be_avoided() {
    let auth = |request: &LoginRequest, keys: &[&str]| {
        let mut pair = Pair::new(config(), chap(false, &[ChapAlgorithm::Sha256]));
        match refused(&mut pair, request, &names_and(keys)) {
            LoginStatus::AuthenticationFailure(fault) => fault,
            other => panic!("{other}"),
        }
    };
    let (op, full) = (Some(Stage::OPERATIONAL), Some(Stage::FULL_FEATURE));
    assert_eq!(auth(&operational(full), &[]), AuthFault::ChapNotOffered);
    assert_eq!(auth(&security(op), &[]), AuthFault::ChapNotOffered);
    assert_eq!(auth(&security(full), &[]), AuthFault::ChapNotOffered);
    assert_eq!(
        auth(&security(op), &["AuthMethod=None"]),
        AuthFault::ChapNotOffered
    );
    assert_eq!(
        auth(&security(op), &["AuthMethod=KRB5,SRP"]),
        AuthFault::ChapNotOffered
    );
    assert_eq!(
        auth(&security(None), &["AuthMethod=CHAP", "CHAP_A=5"]),
        AuthFault::NoAlgorithm
    );
    assert_eq!(
        auth(&security(None), &["CHAP_A=7"]),
        AuthFault::OutOfTurn("AuthMethod")
    );
    let early = ["AuthMethod=CHAP", "CHAP_N=user", "CHAP_R=0x00"];
    assert_eq!(auth(&security(None), &early), AuthFault::OutOfTurn("CHAP_A"));
}

#[test]
fn chap_offer_may_come_with_the_method_and_waiting_is_no_failure() {
    let mut pair = Pair::new(config(), chap(false, &ChapAlgorithm::ALL));
    // T is set, as some initiators always do: we stay.
    pair.send(
        &security(Some(Stage::OPERATIONAL)).encode(),
        &names_and(&["AuthMethod=CHAP"]),
    )
    .unwrap();
    assert!(!LoginResponse::parse(&pair.only().bhs).transit);
    let mut pair = Pair::new(config(), chap(false, &ChapAlgorithm::ALL));
    pair.send(
        &security(None).encode(),
        &names_and(&["AuthMethod=CHAP", "CHAP_A=8,5"]),
    )
    .unwrap();
    assert_eq!(value(&pair.only().text(), "CHAP_A"), "8");
}

#[test]
fn a_target_without_secrets_cannot_do_chap() {
    let status = refused_at_once(&security(None), &names_and(&["AuthMethod=CHAP"]));
    assert_eq!(status, LoginStatus::AuthenticationFailure(AuthFault::NoMethod));
    let status = refused_at_once(&security(None), &names_and(&["CHAP_A=5"]));
    assert_eq!(
        status,
        LoginStatus::AuthenticationFailure(AuthFault::OutOfTurn("CHAP"))
    );
}

#[test]
fn challenges_differ() {
    let challenge = |seed| {
        let mut pair = Pair::new(
            stillpoint_iscsi::ConnectionConfig {
                seed: [seed; 32],
                ..config()
            },
            chap(false, &ChapAlgorithm::ALL),
        );
        challenged(&mut pair, "7").2
    };
    assert_ne!(challenge(1), challenge(2));
    assert_eq!(challenge(1), challenge(1), "a simulation can be repeated");
}

#[test]
fn login_has_a_deadline() {
    let mut pair = Pair::new(config(), Targets::default());
    let deadline = pair.conn.poll_timeout().unwrap();
    pair.send(&security(None).encode(), &names_and(&[])).unwrap();
    pair.only();
    assert_eq!(
        pair.conn.poll_timeout(),
        Some(deadline),
        "requests do not extend it"
    );
    assert_eq!(pair.sleep(deadline - pair.now), Err(Error::LoginTimeout));
    assert!(pair.conn.is_closed());
}
