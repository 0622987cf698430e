//! One function per parser: it may refuse the bytes, but not panic, hang or grow. Shared by the libFuzzer program and by the
//! test that replays the corpus on stable Rust.

mod reservations;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stillpoint_iscsi::{
    Admission, Connection, ConnectionConfig, Directory, DiscoveryAsk, Event, Isid, LoginAsk, LoginStatus,
    Outcome, TargetGrant, TargetRecord, TmfResponse, Tsih,
};
use stillpoint_scsi::{
    BlockResult, BlockSize, Context, Limits, NexusId, NexusName, Plan, TargetPort, Unit, UnitSpec,
};

/// A fuzz target.
pub(crate) struct Target {
    /// As `tests/fuzz/run` and the corpus directories spell it.
    pub(crate) name: &'static str,
    /// What it does with an input.
    pub(crate) run: fn(&[u8]),
    /// Inputs to begin with.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub(crate) const ALL: &[Target] = &[
    Target {
        name: "iscsi_login",
        run: iscsi_login,
        seeds: login_seeds,
    },
    Target {
        name: "iscsi_session",
        run: iscsi_session,
        seeds: session_seeds,
    },
    Target {
        name: "scsi_cdb",
        run: scsi_cdb,
        seeds: cdb_seeds,
    },
    Target {
        name: "scsi_lists",
        run: scsi_lists,
        seeds: list_seeds,
    },
    Target {
        name: "scsi_reservations",
        run: reservations::run,
        seeds: reservations::seeds,
    },
    Target {
        name: "agent_frames",
        run: agent_frames,
        seeds: frame_seeds,
    },
    Target {
        name: "agent_token",
        run: agent_token,
        seeds: token_seeds,
    },
    Target {
        name: "config_text",
        run: config_text,
        seeds: config_seeds,
    },
    Target {
        name: "store_records",
        run: store_records,
        seeds: record_seeds,
    },
];

struct Anything;

impl Directory for Anything {
    fn login(&self, _: &LoginAsk<'_>) -> Result<TargetGrant, LoginStatus> {
        Ok(TargetGrant {
            target: 1,
            alias: Some("demo".to_owned()),
            portal_group: 1,
            chap: None,
        })
    }

    fn has_session(&self, _: &str, _: Isid, tsih: Tsih) -> bool {
        tsih.0.is_multiple_of(2)
    }

    fn discover(&self, _: &DiscoveryAsk<'_>) -> Vec<TargetRecord> {
        let portals = vec![
            ("192.0.2.1:3260".to_owned(), 1),
            ("[2001:db8::1]:3260".to_owned(), 1),
        ];
        vec![TargetRecord {
            name: "iqn.2026-11.io.stillpoint:demo".to_owned(),
            portals,
        }]
    }
}

fn connection(now: Instant) -> Connection {
    let address = SocketAddr::from(([127, 0, 0, 1], 3260));
    Connection::new(
        now,
        ConnectionConfig::new(address, address, 1, [7; 32]),
        Arc::new(Anything),
    )
}

/// Feeds bytes as a socket would, and answers every event at once.
fn feed(conn: &mut Connection, now: Instant, mut bytes: &[u8]) {
    while !bytes.is_empty() && !conn.is_closed() {
        let place = conn.space();
        assert!(
            !place.is_empty(),
            "an open connection always has room for the next byte"
        );
        let n = place.len().min(bytes.len());
        let (head, tail) = bytes.split_at(n);
        place[..n].copy_from_slice(head);
        bytes = tail;
        let result = conn.advance(now, n);
        answer(conn, now);
        if result.is_err() {
            return;
        }
    }
}

fn answer(conn: &mut Connection, now: Instant) {
    loop {
        let mut quiet = true;
        while let Some(event) = conn.poll_event() {
            quiet = false;
            match event {
                Event::Admission { .. } => conn.admit(now, Admission::Accept { tsih: Tsih(1) }),
                Event::Command(command) => {
                    let data = if command.read {
                        Bytes::from(vec![0; command.edtl.min(8192) as usize])
                    } else {
                        Bytes::new()
                    };
                    let transfer_len = u64::from(command.edtl);
                    conn.complete(
                        now,
                        command.task,
                        Outcome {
                            data,
                            transfer_len,
                            ..Outcome::default()
                        },
                    );
                }
                Event::TaskManagement { tmf, affected, .. } => {
                    affected
                        .into_iter()
                        .for_each(|task| conn.complete(now, task, Outcome::default()));
                    conn.tmf_complete(now, tmf, TmfResponse::COMPLETE);
                }
                _ => {}
            }
        }
        while let Some(frame) = conn.poll_transmit() {
            quiet = false;
            assert!(frame.len() >= 48, "a PDU has a header");
        }
        if quiet {
            return;
        }
    }
}

fn iscsi_login(data: &[u8]) {
    let now = Instant::now();
    let mut conn = connection(now);
    feed(&mut conn, now, data);
    // A deadline that passes is no panic either.
    drop(conn.handle_timeout(now + Duration::from_secs(3600)));
    answer(&mut conn, now);
}

/// The first byte chooses the digests that were negotiated, the rest comes after the login.
fn iscsi_session(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else {
        return;
    };
    let now = Instant::now();
    let mut conn = connection(now);
    let digest = |bit: u8| if choice & bit == 0 { "None" } else { "CRC32C" };
    let more = [
        format!("HeaderDigest={}", digest(1)),
        format!("DataDigest={}", digest(2)),
    ];
    feed(&mut conn, now, &login(&more));
    feed(&mut conn, now, rest);
    drop(conn.handle_timeout(now + Duration::from_secs(60)));
    answer(&mut conn, now);
}

/// A Login Request as QEMU sends it: one PDU from the operational stage to the full feature phase.
fn login(more: &[String]) -> Vec<u8> {
    let mut text = String::new();
    let fixed = [
        "InitiatorName=iqn.2008-11.org.linux-kvm",
        "TargetName=iqn.2026-11.io.stillpoint:demo",
        "SessionType=Normal",
    ];
    for key in fixed.iter().copied().chain(more.iter().map(String::as_str)) {
        text.push_str(key);
        text.push('\0');
    }
    let mut pdu = vec![0; 48];
    pdu[0] = 0x43;
    pdu[1] = 0x87;
    pdu[5..8].copy_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes()[1..]);
    pdu[8..14].copy_from_slice(&[0x80, 0, 0, 1, 2, 3]);
    pdu[19] = 1;
    pdu[27] = 1;
    pdu.extend_from_slice(text.as_bytes());
    pdu.resize(pdu.len().next_multiple_of(4), 0);
    pdu
}

fn login_seeds() -> Vec<Vec<u8>> {
    let windows = [
        "HeaderDigest=None,CRC32C",
        "InitialR2T=No",
        "MaxBurstLength=262144",
        "ErrorRecoveryLevel=2",
        "MaxConnections=32",
    ];
    let mut security = login(&["AuthMethod=CHAP,None".to_owned()]);
    security[1] = 0x81;
    vec![login(&[]), login(&windows.map(str::to_owned)), security]
}

/// A header with CmdSN 1, which is the first after [`login`].
fn pdu(opcode: u8, flags: u8, itt: u32, edtl: u32, cdb: &[u8], data: &[u8]) -> Vec<u8> {
    let mut pdu = vec![0; 48];
    (pdu[0], pdu[1]) = (opcode, flags);
    pdu[5..8].copy_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes()[1..]);
    pdu[16..20].copy_from_slice(&itt.to_be_bytes());
    pdu[20..24].copy_from_slice(&edtl.to_be_bytes());
    pdu[27] = 1;
    pdu[32..32 + cdb.len()].copy_from_slice(cdb);
    pdu.extend_from_slice(data);
    pdu.resize(pdu.len().next_multiple_of(4), 0);
    pdu
}

fn session_seeds() -> Vec<Vec<u8>> {
    let read = pdu(0x01, 0xc1, 5, 512, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
    let write = pdu(
        0x01,
        0xa1,
        6,
        8192,
        &[0x2a, 0, 0, 0, 0, 0, 0, 0, 16, 0],
        &[0x5a; 512],
    );
    let mut data_out = pdu(0x05, 0x80, 6, 0, &[], &[0xa5; 7680]);
    data_out[40..44].copy_from_slice(&512_u32.to_be_bytes());
    let nop = pdu(0x40, 0x80, 7, 0xffff_ffff, &[], b"ping");
    let reset = pdu(0x42, 0x85, 8, 0xffff_ffff, &[], &[]);
    let text = pdu(0x44, 0x80, 9, 0xffff_ffff, &[], b"SendTargets=All\0");
    let logout = pdu(0x46, 0x80, 10, 0, &[], &[]);
    [
        vec![read],
        vec![write.clone(), data_out],
        vec![nop, text],
        vec![write, reset],
        vec![logout],
    ]
    .into_iter()
    .map(|pdus| std::iter::once(0).chain(pdus.into_iter().flatten()).collect())
    .collect()
}

/// Input: length of the CDB, CDB, data-out. The same unit gets every command twice, from two I_T nexuses.
fn scsi_cdb(data: &[u8]) {
    let Some((&len, rest)) = data.split_first() else {
        return;
    };
    let (cdb, data_out) = rest.split_at(rest.len().min(usize::from(len)));
    carry_out(cdb, data_out);
}

/// Commands with parameter lists: operation code, service action, byte of the CDB that starts the length, its bytes.
const LISTED: &[(u8, u8, usize, usize)] = &[
    (0x83, 0x00, 10, 4),
    (0x83, 0x01, 10, 4),
    (0x83, 0x10, 10, 4),
    (0x83, 0x11, 10, 4),
    (0x5f, 0x00, 5, 4),
    (0x5f, 0x06, 5, 4),
    (0x5f, 0x07, 5, 4),
    (0x42, 0x00, 7, 2),
    (0x55, 0x11, 7, 2),
    (0x15, 0x11, 4, 1),
];

/// The first byte chooses the command, the second says how much longer (or shorter) than the list its length is.
fn scsi_lists(data: &[u8]) {
    let [which, longer, list @ ..] = data else { return };
    let (opcode, action, at, bytes) = LISTED[usize::from(*which) % LISTED.len()];
    let said = i64::try_from(list.len()).unwrap_or(0) + i64::from(i8::from_ne_bytes([*longer]));
    let mut cdb = [0; 16];
    (cdb[0], cdb[1]) = (opcode, action);
    let said = u64::try_from(said.max(0)).unwrap_or(0).to_be_bytes();
    cdb[at..at + bytes].copy_from_slice(&said[8 - bytes..]);
    carry_out(&cdb, list);
}

fn list_seeds() -> Vec<Vec<u8>> {
    let unit = [
        &[0xe4, 0, 0, 0, 1, 3, 0, 16][..],
        &[0x60; 16],
        &[0, 0, 0, 0, 0, 0, 2, 0],
    ]
    .concat();
    let segment = [&[2, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 8][..], &[0; 15], &[64]].concat();
    let lid1 = [
        &[1, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0][..],
        &unit,
        &segment,
    ]
    .concat();
    let mut lid4 = vec![0; 48];
    (lid4[0], lid4[3], lid4[16], lid4[23], lid4[43], lid4[45]) = (1, 0x20, 0xff, 1, 32, 28);
    lid4.extend([unit, segment].concat());
    let range = [0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0, 0];
    let populate = [&[0, 30, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 16][..], &range].concat();
    let mut write = vec![0; 536];
    (write[0], write[1], write[535]) = (2, 38, 16);
    write[16..24].copy_from_slice(&[0xff, 0xff, 0, 1, 0, 0, 1, 0xf8]);
    write.extend(range);
    let unmap = [
        0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0,
    ];
    let caching = [&[0; 8][..], &[8, 18, 4], &[0; 17]].concat();
    let lists = [
        lid1,
        lid4,
        populate,
        write,
        register_others(),
        [&[0; 15][..], &[5], &[0; 8]].concat(),
        register_and_move(),
        unmap.to_vec(),
        caching.clone(),
        caching[4..].to_vec(),
    ];
    (0..)
        .zip(lists)
        .map(|(which, list)| [&[which, 0][..], &list].concat())
        .collect()
}

/// Carries one command out on units of both block sizes.
fn carry_out(cdb: &[u8], data_out: &[u8]) {
    const LUN: u64 = 1 << 30;
    let port = TargetPort {
        target: "iqn.2026-11.io.stillpoint:demo".to_owned(),
        portal_group: 1,
    };
    for (block_size, bytes) in [(BlockSize::B512, 512), (BlockSize::B4096, 4096)] {
        let mut unit = Unit::new(UnitSpec {
            naa: [0x60; 16],
            serial: "0123456789abcdef".to_owned(),
            revision: *b"0.1 ",
            block_size,
            grain: 4096,
            blocks: LUN / bytes,
            write_cache: true,
            read_only: false,
            ports: vec![port.clone()],
            limits: Limits::default(),
        });
        for nexus in [1, 2] {
            let name = NexusName {
                initiator: format!("iqn.2026-11.example:{nexus}"),
                isid: [0x80, 0, 0, 0, 0, nexus],
                port: port.clone(),
            };
            unit.attach(NexusId(nexus.into()), name);
        }
        // The first command of a nexus meets its unit attention, the second is carried out.
        for nexus in [1, 1, 2, 2] {
            let context = Context {
                nexus: NexusId(nexus),
                luns: &[0],
                data_in_max: 1 << 16,
            };
            let reply = match unit.plan(&context, cdb, data_out) {
                Plan::Done(reply) => reply,
                Plan::Early(reply, op) => {
                    inside(&op, LUN, data_out.len());
                    reply
                }
                Plan::Op(planned) => {
                    inside(planned.op(), LUN, data_out.len());
                    planned.finish(BlockResult::Done)
                }
            };
            assert!(
                reply.status != 2 || !reply.sense.is_empty(),
                "every CHECK CONDITION carries sense"
            );
        }
    }
    drop(stillpoint_scsi::absent_lun(cdb, &[0, 1]));
}

fn inside(op: &stillpoint_scsi::BlockOp, size: u64, sent: usize) {
    use stillpoint_scsi::BlockOp as Op;
    let (offset, len, data) = match *op {
        Op::Read { offset, len, .. } => (offset, u64::from(len), 0),
        Op::Write { offset, len, .. }
        | Op::WriteAndVerify { offset, len, .. }
        | Op::OrWrite { offset, len, .. } => (offset, u64::from(len), len as usize),
        Op::CompareAndWrite { offset, len, .. } => (offset, u64::from(len), 2 * len as usize),
        Op::Verify { offset, len, .. } => (offset, u64::from(len), 0),
        Op::WriteZeroes { offset, len, .. }
        | Op::PreFetch { offset, len }
        | Op::LbaStatus { offset, len, .. } => (offset, len, 0),
        Op::WriteSame { offset, len, .. } => (offset, len, 512),
        Op::Copy(ref request) => return inside_copy(&request.work, size),
        Op::Unmap { ref ranges } => {
            assert!(
                ranges
                    .iter()
                    .all(|(offset, len)| offset.checked_add(*len).is_some_and(|end| end <= size))
            );
            return;
        }
        _ => return,
    };
    assert!(
        offset.checked_add(len).is_some_and(|end| end <= size),
        "{op:?} ends behind the LUN"
    );
    assert!(data <= sent, "{op:?} needs more data than was sent");
}

fn inside_copy(work: &stillpoint_scsi::CopyWork, size: u64) {
    use stillpoint_scsi::CopyWork as Work;
    match work {
        Work::Segments { units, segments } => {
            assert!(segments.len() <= 256, "too many segments");
            let known = |index: u16| usize::from(index) < units.len();
            assert!(segments.iter().all(|s| known(s.source) && known(s.destination)));
        }
        Work::Populate { ranges, .. } | Work::WriteToken { ranges, .. } | Work::WriteZeroes { ranges } => {
            assert!(ranges.len() <= 64, "too many ranges");
            let fits = |(offset, len): &(u64, u64)| offset.checked_add(*len).is_some_and(|end| end <= size);
            assert!(ranges.iter().all(fits), "{ranges:?} end behind the LUN");
        }
    }
}

/// TransportID of an initiator port, 36 bytes.
fn transport_id() -> Vec<u8> {
    let mut id = vec![0x45, 0, 0, 32];
    id.extend_from_slice(b"iqn.1991-05.h,i,0x");
    id.extend_from_slice(b"00023d000001\0\0");
    id
}

/// REGISTER with SPEC_I_PT.
fn register_others() -> Vec<u8> {
    let mut list = vec![0; 28];
    list[15] = 5;
    list[20] = 0x09;
    list[27] = 36;
    list.extend(transport_id());
    list
}

fn register_and_move() -> Vec<u8> {
    let mut list = vec![0; 24];
    list[7] = 5;
    list[15] = 6;
    list[19] = 1;
    list[23] = 36;
    list.extend(transport_id());
    list
}

fn cdb_seeds() -> Vec<Vec<u8>> {
    let with_data = |cdb: &[u8], data: &[u8]| [&[u8::try_from(cdb.len()).unwrap()], cdb, data].concat();
    let unmap = [
        0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0,
    ];
    vec![
        with_data(&[0x12, 0, 0, 0, 36, 0], &[]),
        with_data(&[0x12, 1, 0x83, 0, 255, 0], &[]),
        with_data(&[0x1a, 0, 0x3f, 0, 255, 0], &[]),
        with_data(
            &[0x15, 0x11, 0, 0, 24, 0],
            &[&[0; 4][..], &[8, 18, 4], &[0; 17]].concat(),
        ),
        with_data(&[0x28, 0, 0, 0, 0, 1, 0, 0, 8, 0], &[]),
        with_data(&[0x2a, 8, 0, 0, 0, 1, 0, 0, 1, 0], &[1; 512]),
        with_data(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &unmap),
        with_data(&[0x5f, 0, 0, 0, 0, 0, 0, 0, 64, 0], &register_others()),
        with_data(&[0x5f, 7, 0, 0, 0, 0, 0, 0, 60, 0], &register_and_move()),
        with_data(
            &[0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0],
            &[&[0; 8][..], &[1; 8], &[0; 8]].concat(),
        ),
        with_data(&[0x5e, 3, 0, 0, 0, 0, 0, 1, 0, 0], &[]),
        with_data(&[0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], &[2; 1024]),
        with_data(&[0x93, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[0; 512]),
        with_data(&[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], &[]),
        with_data(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0], &[]),
        with_data(&[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0], &[]),
    ]
}

fn agent_frames(data: &[u8]) {
    use stillpoint_agentproto::channel::Channel;
    use stillpoint_agentproto::frame::{MAX_BODY, MAX_BODY_UNAUTHENTICATED};
    let now = Instant::now();
    for limit in [MAX_BODY_UNAUTHENTICATED, MAX_BODY] {
        let mut channel = Channel::accepting(now, hello(), 1, limit);
        // One byte at a time and all at once must be the same to the channel; which one, the length of the input chooses.
        let piece = if data.len().is_multiple_of(2) {
            data.len().max(1)
        } else {
            1
        };
        for bytes in data.chunks(piece) {
            let result = channel.receive(now, bytes);
            while channel.poll_event().is_some() {
                channel.accept();
            }
            while channel.poll_transmit().is_some() {}
            if result.is_err() {
                break;
            }
        }
    }
}

fn hello() -> stillpoint_agentproto::message::Hello {
    stillpoint_agentproto::message::Hello {
        min_version: 1,
        max_version: 1,
        agent_id: None,
        product: "fuzz".to_owned(),
        capabilities: stillpoint_agentproto::message::Capabilities::default(),
    }
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let now = Instant::now();
    let mut dialer = stillpoint_agentproto::channel::Channel::dial(
        now,
        hello(),
        1,
        stillpoint_agentproto::frame::MAX_BODY,
    );
    let mut seed = Vec::new();
    while let Some(bytes) = dialer.poll_transmit() {
        seed.extend_from_slice(&bytes);
    }
    let hello = seed.clone();
    seed.extend(provider_and_revert_frames());
    vec![hello, seed]
}

/// One frame of each message with records and documents in it, so that the fuzzer need not find their tags.
fn provider_and_revert_frames() -> Vec<u8> {
    use stillpoint_agentproto::frame::Frame;
    use stillpoint_agentproto::message::{
        Blob, BlobKind, Message, Piece, ProvBegin, ProvCommit, Request, RevertPrepare, ShadowAsk,
    };
    use stillpoint_agentproto::{LunId, SessionId, SetId, ShadowId};
    let set = SetId([1; 16]);
    let ask = ShadowAsk {
        shadow: ShadowId([2; 16]),
        lun: LunId([3; 16]),
    };
    let requests = [
        Request::ProvBegin(ProvBegin {
            set,
            shadows: vec![ask.clone(), ask],
            initiator: "iqn.2026-11.test:host".to_owned(),
            writable: true,
        }),
        Request::ProvCommit(ProvCommit { set, token: [4; 16] }),
        Request::RevertPrepare(RevertPrepare {
            session: SessionId([5; 16]),
            lun: LunId([3; 16]),
            snapshot: "a".to_owned(),
            taken_in: Some(SessionId([6; 16])),
            cut_unix_ms: Some(7),
            power_off: false,
            plan_only: true,
        }),
        Request::Blob(Blob {
            session: SessionId([5; 16]),
            kind: BlobKind::RevertManifest,
            offset_bytes: 0,
            total_bytes: 4,
            bytes: Piece(b"{}\n\n".to_vec()),
        }),
    ];
    let mut out = Vec::new();
    for (request_id, request) in (1..).zip(requests) {
        let frame = Frame {
            request_id,
            generation: 1,
            message: Message::Request(request),
        };
        out.extend(frame.encode().expect("short frames"));
    }
    out
}

fn agent_token(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        drop(stillpoint_agentproto::enrol::Token::parse(text));
    }
}

fn token_seeds() -> Vec<Vec<u8>> {
    let fingerprint = stillpoint_agentproto::Fingerprint::of_spki(b"a public key");
    let token = stillpoint_agentproto::enrol::Token::new([9; 16], &fingerprint);
    vec![token.reveal().as_bytes().to_vec(), b"SP1-".to_vec()]
}

fn config_text(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        drop(stillpoint_config::Config::parse(
            text,
            Path::new("stillpoint.toml"),
        ));
    }
}

fn config_seeds() -> Vec<Vec<u8>> {
    let text = include_str!("../../config/examples/minimal.toml");
    vec![
        text.as_bytes().to_vec(),
        b"[[lun]]\nname = \"a\"\nsize = \"1GiB\"\n".to_vec(),
    ]
}

/// Input: length of the key, key, payload. The payload is sealed first: a checksum would stop almost every input otherwise, and
/// damage that a checksum catches is no parser's work.
fn store_records(data: &[u8]) {
    use stillpoint_snapshot::record::{self, Key};
    let Some((&len, rest)) = data.split_first() else {
        return;
    };
    let (key, payload) = rest.split_at(rest.len().min(usize::from(len)));
    let Ok(parsed) = Key::parse(key) else { return };
    let value = record::sealed(key, payload.to_vec());
    for value in [&value[..], payload] {
        match &parsed {
            Key::System => drop(record::SystemRecord::decode(value)),
            Key::Branch(id) => drop(record::BranchRecord::decode(*id, value)),
            Key::Snapshot(id) => drop(record::SnapshotRecord::decode(*id, value)),
            Key::Page(page) => drop(record::decode_page(*page, value)),
            Key::Changed(_) => {}
            Key::Bad(grain) => drop(record::BadRecord::decode(*grain, value)),
            Key::Bitmap(chunk) => drop(record::decode_bitmap(*chunk, value)),
            Key::Counts(block) => drop(record::decode_counts(*block, value)),
            Key::Journal(txg, sequence) => drop(record::decode_journal(*txg, *sequence, value)),
            Key::References(chunk, part) => drop(record::decode_references(*chunk, *part, value)),
            Key::Spilled(chunk, index) => drop(record::decode_spilled(*chunk, *index, value)),
            Key::Job(id) => drop(record::JobRecord::decode(*id, value)),
            Key::Value(name) => drop(record::decode_value(name, value)),
        }
    }
}

fn record_seeds() -> Vec<Vec<u8>> {
    use stillpoint_snapshot::record::key;
    let keys = [
        key::system(),
        key::bitmap(3),
        key::bad(7),
        key::counts(1),
        key::journal(7, 0),
        key::job(1),
        key::value("name"),
    ];
    let seed = |key: &Vec<u8>| [&[u8::try_from(key.len()).unwrap()], &key[..], &[0; 96]].concat();
    keys.iter().map(seed).collect()
}
