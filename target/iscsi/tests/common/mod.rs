//! A small initiator for tests: builds and reads PDUs with code of its own where that matters (framing, padding, digests),
//! so that a mistake of the target's cannot hide on both ends.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stillpoint_iscsi::pdu::{
    Bhs, DataOut, LoginRequest, LoginResponse, NopOut, Numbers, Opcode, Prefix, ScsiCommand, Stage,
    TextRequest, TmfRequest,
};
use stillpoint_iscsi::{
    Admission, ChapPolicy, Cid, CmdSn, Command, Connection, ConnectionConfig, DataSn, Directory,
    DiscoveryAsk, Error, Event, Isid, Itt, LoginAsk, LoginStatus, Lun, Outcome, StatSn, TargetGrant,
    TargetRecord, TaskAttribute, TmfFunction, Tsih, Ttt,
};

pub const TARGET: &str = "iqn.2026-01.test:disk";
pub const INITIATOR: &str = "iqn.2026-01.test:initiator";
pub const GOOD: u8 = 0;
pub const CHECK_CONDITION: u8 = 2;

/// A directory with one target, or as many as a test wants.
#[derive(Default)]
pub struct Targets {
    pub chap: Option<ChapPolicy>,
    pub alias: Option<String>,
    pub refuse: Option<LoginStatus>,
    pub records: Vec<TargetRecord>,
    pub asked: Mutex<Vec<String>>,
}

impl Directory for Targets {
    fn login(&self, ask: &LoginAsk<'_>) -> Result<TargetGrant, LoginStatus> {
        self.asked.lock().unwrap().push(format!(
            "{} {:?} {:?}",
            ask.initiator, ask.target, ask.session_type
        ));
        if let Some(status) = &self.refuse {
            return Err(status.clone());
        }
        if ask.target.is_some_and(|name| name != TARGET) {
            return Err(LoginStatus::NotFound);
        }
        Ok(TargetGrant {
            target: 7,
            alias: self.alias.clone(),
            portal_group: 1,
            chap: self.chap.clone(),
        })
    }

    fn has_session(&self, initiator: &str, isid: Isid, tsih: Tsih) -> bool {
        (initiator, isid, tsih) == (INITIATOR, Isid([0x40, 0, 1, 0x37, 0, 0]), Tsih(5))
    }

    fn discover(&self, ask: &DiscoveryAsk<'_>) -> Vec<TargetRecord> {
        let all = if self.records.is_empty() {
            vec![TargetRecord {
                name: TARGET.to_owned(),
                portals: vec![("[::1]:3260".to_owned(), 1)],
            }]
        } else {
            self.records.clone()
        };
        all.into_iter()
            .filter(|record| ask.target.is_none_or(|name| name == record.name))
            .collect()
    }
}

/// A PDU from the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pdu {
    pub bhs: Bhs,
    pub data: Vec<u8>,
}

impl Pdu {
    pub fn opcode(&self) -> Opcode {
        Prefix::parse(&self.bhs).opcode
    }

    pub fn text(&self) -> Vec<String> {
        let text = String::from_utf8(self.data.clone()).unwrap();
        assert!(
            text.is_empty() || text.ends_with('\0'),
            "text ends with NUL: {text:?}"
        );
        text.split_terminator('\0').map(str::to_owned).collect()
    }

    /// The numbers at bytes 24 to 35.
    pub fn numbers(&self) -> Numbers {
        let word = |at: usize| u32::from_be_bytes(self.bhs[at..at + 4].try_into().unwrap());
        Numbers {
            stat_sn: StatSn(word(24)),
            exp_cmd_sn: CmdSn(word(28)),
            max_cmd_sn: CmdSn(word(32)),
        }
    }
}

/// Both ends: the target's connection, and what an initiator keeps.
pub struct Pair {
    pub conn: Connection,
    pub now: Instant,
    pub header_digest: bool,
    pub data_digest: bool,
    /// Bytes are fed in steps of this.
    pub step: usize,
    pub stat_sn: Option<StatSn>,
    pub cmd_sn: CmdSn,
    inbox: Vec<u8>,
    pub events: VecDeque<Event>,
}

pub fn addresses() -> (SocketAddr, SocketAddr) {
    (
        "192.0.2.9:49152".parse().unwrap(),
        "192.0.2.1:3260".parse().unwrap(),
    )
}

pub fn config() -> ConnectionConfig {
    let (peer, local) = addresses();
    ConnectionConfig::new(peer, local, 1, [7; 32])
}

impl Pair {
    pub fn new(config: ConnectionConfig, targets: Targets) -> Self {
        Self::with_directory(config, Arc::new(targets))
    }

    pub fn with_directory(config: ConnectionConfig, directory: Arc<dyn Directory>) -> Self {
        let now = Instant::now();
        Self {
            conn: Connection::new(now, config, directory),
            now,
            header_digest: false,
            data_digest: false,
            step: usize::MAX,
            stat_sn: None,
            cmd_sn: CmdSn(1),
            inbox: Vec::new(),
            events: VecDeque::new(),
        }
    }

    /// A session in full feature phase with the keys that are given (on top of names).
    pub fn logged_in(config: ConnectionConfig, keys: &[&str]) -> Self {
        let mut pair = Self::new(config, Targets::default());
        pair.login(keys);
        pair
    }

    pub fn login(&mut self, keys: &[&str]) -> Vec<String> {
        let names = [
            format!("InitiatorName={INITIATOR}"),
            format!("TargetName={TARGET}"),
        ];
        let all: Vec<&str> = names
            .iter()
            .map(String::as_str)
            .chain(["SessionType=Normal"])
            .chain(keys.iter().copied())
            .collect();
        self.login_with(&all)
    }

    /// One-PDU login in the operational stage.
    pub fn login_with(&mut self, keys: &[&str]) -> Vec<String> {
        let request = login_request(self.cmd_sn, Stage::OPERATIONAL, Some(Stage::FULL_FEATURE));
        self.send(&request.encode(), &text(keys)).unwrap();
        self.admit();
        let pdu = self.only();
        let response = LoginResponse::parse(&pdu.bhs);
        assert_eq!(
            (response.status, response.transit, response.next),
            ((0, 0), true, Stage::FULL_FEATURE)
        );
        assert_eq!(response.tsih, Tsih(0x1234));
        assert!(matches!(self.event(), Event::LoggedIn));
        let params = self.conn.info().params.unwrap();
        self.header_digest = params.header_digest;
        self.data_digest = params.data_digest;
        pdu.text()
    }

    pub fn admit(&mut self) {
        match self.event() {
            Event::Admission { .. } => self
                .conn
                .admit(self.now, Admission::Accept { tsih: Tsih(0x1234) }),
            other => panic!("{other:?}"),
        }
    }

    /// Sends a PDU without additional segments.
    pub fn send(&mut self, bhs: &Bhs, data: &[u8]) -> Result<(), Error> {
        self.send_bytes(&wire(bhs, &[], data, self.header_digest, self.data_digest))
    }

    pub fn send_bytes(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let space = self.conn.space();
            assert!(!space.is_empty(), "space is never empty");
            let n = space.len().min(bytes.len()).min(self.step);
            space[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            self.conn.advance(self.now, n)?;
        }
        Ok(())
    }

    /// Everything the target has to send now; checks framing, digests and StatSN on the way.
    pub fn receive(&mut self) -> Vec<Pdu> {
        let mut pdus = Vec::new();
        while let Some(pdu) = self.receive_one() {
            pdus.push(pdu);
        }
        pdus
    }

    pub fn receive_one(&mut self) -> Option<Pdu> {
        let frame = self.conn.poll_transmit()?;
        let bytes = frame.chunks().concat();
        assert_eq!(bytes.len(), frame.len());
        let bhs: Bhs = bytes[..48].try_into().unwrap();
        let login = Prefix::parse(&bhs).opcode == Opcode::LOGIN_RESPONSE;
        let pdu = read_pdu(&bytes, self.header_digest && !login, self.data_digest && !login);
        self.check_stat_sn(&pdu);
        Some(pdu)
    }

    fn check_stat_sn(&mut self, pdu: &Pdu) {
        let opcode = pdu.opcode();
        let got = pdu.numbers().stat_sn;
        if opcode == Opcode::DATA_IN && pdu.bhs[1] & 1 == 0 {
            assert_eq!(got, StatSn(0), "reserved");
            return;
        }
        if let Some(expected) = self.stat_sn {
            assert_eq!(got, expected, "StatSN of {opcode:?}");
        }
        let itt = u32::from_be_bytes(pdu.bhs[16..20].try_into().unwrap());
        let peeks = opcode == Opcode::R2T || (opcode == Opcode::NOP_IN && itt == u32::MAX);
        self.stat_sn = Some(if peeks { got } else { got.next() });
    }

    /// Exactly one PDU.
    pub fn only(&mut self) -> Pdu {
        let mut pdus = self.receive();
        assert_eq!(pdus.len(), 1, "{pdus:?}");
        pdus.remove(0)
    }

    pub fn silent(&mut self) {
        assert_eq!(self.receive(), []);
    }

    pub fn event(&mut self) -> Event {
        self.poll_event().expect("an event")
    }

    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front().or_else(|| self.conn.poll_event())
    }

    pub fn no_event(&mut self) {
        if let Some(event) = self.poll_event() {
            panic!("{event:?}");
        }
    }

    pub fn command(&mut self) -> Command {
        match self.event() {
            Event::Command(command) => command,
            other => panic!("{other:?}"),
        }
    }

    pub fn complete(&mut self, command: &Command, outcome: Outcome) {
        self.conn.complete(self.now, command.task, outcome);
    }

    pub fn good(&mut self, command: &Command) {
        self.complete(
            command,
            Outcome {
                transfer_len: u64::from(command.edtl),
                ..Outcome::default()
            },
        );
    }

    pub fn next_cmd_sn(&mut self) -> CmdSn {
        let sn = self.cmd_sn;
        self.cmd_sn = sn.next();
        sn
    }

    /// A SCSI command with the next CmdSN.
    pub fn scsi(&mut self, command: ScsiCommand, data: &[u8]) {
        let cmd_sn = if command.immediate {
            self.cmd_sn
        } else {
            self.next_cmd_sn()
        };
        self.send(&ScsiCommand { cmd_sn, ..command }.encode(), data)
            .unwrap();
    }

    pub fn data_out(&mut self, itt: u32, ttt: Ttt, data_sn: u32, offset: u32, is_final: bool, data: &[u8]) {
        self.send(&data_out(itt, ttt, data_sn, offset, is_final).encode(), data)
            .unwrap();
    }

    pub fn sleep(&mut self, duration: Duration) -> Result<(), Error> {
        self.now += duration;
        self.conn.handle_timeout(self.now)
    }

    pub fn tmf(&mut self, function: TmfFunction, itt: u32, referenced: u32, ref_cmd_sn: CmdSn) {
        let request = TmfRequest {
            immediate: true,
            function,
            lun: lun(0),
            itt: Itt(itt),
            referenced_itt: Itt(referenced),
            cmd_sn: self.cmd_sn,
            exp_stat_sn: StatSn(0),
            ref_cmd_sn,
            exp_data_sn: DataSn(0),
        };
        self.send(&request.encode(), &[]).unwrap();
    }
}

pub fn lun(number: u16) -> Lun {
    Lun::from_number(number).unwrap()
}

pub fn data_out(itt: u32, ttt: Ttt, data_sn: u32, buffer_offset: u32, is_final: bool) -> DataOut {
    DataOut {
        is_final,
        // Windows does not fill it.
        lun: Lun([0xff; 8]),
        itt: Itt(itt),
        ttt,
        exp_stat_sn: StatSn(0),
        data_sn: DataSn(data_sn),
        buffer_offset,
    }
}

/// A command with neither direction; CmdSN is filled in when it is sent.
pub fn plain(itt: u32) -> ScsiCommand {
    ScsiCommand {
        immediate: false,
        is_final: true,
        read: false,
        write: false,
        attribute: TaskAttribute::SIMPLE,
        lun: lun(0),
        itt: Itt(itt),
        edtl: 0,
        cmd_sn: CmdSn(0),
        exp_stat_sn: StatSn(0),
        cdb: [0; 16],
    }
}

pub fn read(itt: u32, edtl: u32) -> ScsiCommand {
    ScsiCommand {
        read: true,
        edtl,
        ..plain(itt)
    }
}

pub fn write(itt: u32, edtl: u32) -> ScsiCommand {
    ScsiCommand {
        write: true,
        edtl,
        ..plain(itt)
    }
}

pub fn nop_out(itt: u32, ttt: Ttt, immediate: bool, cmd_sn: CmdSn) -> NopOut {
    NopOut {
        immediate,
        lun: lun(0),
        itt: Itt(itt),
        ttt,
        cmd_sn,
        exp_stat_sn: StatSn(0),
    }
}

pub fn text_request(itt: u32, ttt: Ttt, cmd_sn: CmdSn) -> TextRequest {
    TextRequest {
        immediate: false,
        is_final: true,
        continues: false,
        lun: lun(0),
        itt: Itt(itt),
        ttt,
        cmd_sn,
        exp_stat_sn: StatSn(0),
    }
}

pub fn login_request(cmd_sn: CmdSn, current: Stage, next: Option<Stage>) -> LoginRequest {
    LoginRequest {
        immediate: true,
        transit: next.is_some(),
        continues: false,
        current,
        next: next.unwrap_or(Stage(0)),
        version_max: 0,
        version_min: 0,
        isid: Isid([0x40, 0, 1, 0x37, 0, 0]),
        tsih: Tsih(0),
        itt: Itt(1),
        cid: Cid(1),
        cmd_sn,
        exp_stat_sn: StatSn(0),
    }
}

pub fn text(keys: &[&str]) -> Vec<u8> {
    keys.iter().flat_map(|key| key.bytes().chain([0])).collect()
}

/// Bytes that depend on place and seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).to_le_bytes()
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(4), 0);
    padded
}

/// A PDU as an initiator puts it on the wire.
pub fn wire(bhs: &Bhs, ahs: &[u8], data: &[u8], header_digest: bool, data_digest: bool) -> Vec<u8> {
    let mut bytes = bhs.to_vec();
    bytes[4] = u8::try_from(ahs.len() / 4).unwrap();
    bytes[5..8].copy_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes()[1..]);
    bytes.extend_from_slice(ahs);
    if header_digest {
        let word = crc(&bytes);
        bytes.extend_from_slice(&word);
    }
    let data = padded(data);
    bytes.extend_from_slice(&data);
    if data_digest && !data.is_empty() {
        bytes.extend_from_slice(&crc(&data));
    }
    bytes
}

/// Reads exactly one PDU of the target's.
fn read_pdu(bytes: &[u8], header_digest: bool, data_digest: bool) -> Pdu {
    let bhs: Bhs = bytes[..48].try_into().unwrap();
    assert_eq!(bhs[4], 0, "response PDUs have no additional segments");
    let mut rest = &bytes[48..];
    if header_digest {
        assert_eq!(rest[..4], crc(&bhs), "header digest");
        rest = &rest[4..];
    }
    let len = u32::from_be_bytes([0, bhs[5], bhs[6], bhs[7]]) as usize;
    let padded_len = len.next_multiple_of(4);
    let data = rest[..len].to_vec();
    if data_digest && len > 0 {
        assert_eq!(
            rest[padded_len..padded_len + 4],
            crc(&rest[..padded_len]),
            "data digest"
        );
        rest = &rest[4..];
    }
    assert_eq!(rest.len(), padded_len, "nothing but padding after the data");
    Pdu { bhs, data }
}

pub fn bytes(data: &[u8]) -> Bytes {
    Bytes::copy_from_slice(data)
}
