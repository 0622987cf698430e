//! An initiator that sends what it is told, right or wrong, and hides nothing of what comes back.
//!
//! Its PDUs are made from offsets of RFC 7143 §11 by code of its own: a mistake of the target's codec cannot hide on both ends.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Length of a basic header segment.
pub const BHS_LEN: usize = 48;
/// Tag that names no task, and transfer tag that names no transfer.
pub const RESERVED: u32 = 0xffff_ffff;
/// How long an answer may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);
/// Data segments and immediate data that Stillpoint takes (its FirstBurstLength and MaxRecvDataSegmentLength).
const SEGMENT: usize = 262_144;

/// Opcodes (RFC 7143 §11.2.1.2).
#[expect(missing_docs, reason = "the RFC's own names")]
pub mod op {
    pub const NOP_OUT: u8 = 0x00;
    pub const SCSI_COMMAND: u8 = 0x01;
    pub const TMF_REQUEST: u8 = 0x02;
    pub const LOGIN_REQUEST: u8 = 0x03;
    pub const TEXT_REQUEST: u8 = 0x04;
    pub const DATA_OUT: u8 = 0x05;
    pub const LOGOUT_REQUEST: u8 = 0x06;
    pub const NOP_IN: u8 = 0x20;
    pub const SCSI_RESPONSE: u8 = 0x21;
    pub const TMF_RESPONSE: u8 = 0x22;
    pub const LOGIN_RESPONSE: u8 = 0x23;
    pub const TEXT_RESPONSE: u8 = 0x24;
    pub const DATA_IN: u8 = 0x25;
    pub const LOGOUT_RESPONSE: u8 = 0x26;
    pub const R2T: u8 = 0x31;
    pub const ASYNC: u8 = 0x32;
    pub const REJECT: u8 = 0x3f;
}

/// The I bit of a request.
pub const IMMEDIATE: u8 = 0x40;

/// One PDU, in either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pdu {
    /// Basic header segment; DataSegmentLength and TotalAHSLength are filled in when it is sent.
    pub bhs: [u8; BHS_LEN],
    /// Additional header segments.
    pub ahs: Vec<u8>,
    /// Data segment without padding.
    pub data: Vec<u8>,
}

impl Pdu {
    /// A request with the F bit and nothing else.
    #[must_use]
    pub fn new(opcode: u8) -> Self {
        let pdu = Self {
            bhs: [0; BHS_LEN],
            ahs: Vec::new(),
            data: Vec::new(),
        };
        pdu.byte(0, opcode).byte(1, 0x80)
    }

    /// Puts one byte.
    ///
    /// # Panics
    /// The header has 48 bytes.
    #[must_use]
    pub fn byte(mut self, at: usize, value: u8) -> Self {
        *self.bhs.get_mut(at).expect("an offset in the header") = value;
        self
    }

    /// Puts bytes.
    ///
    /// # Panics
    /// The header has 48 bytes.
    #[must_use]
    pub fn bytes(mut self, at: usize, value: &[u8]) -> Self {
        let place = self
            .bhs
            .get_mut(at..at + value.len())
            .expect("offsets in the header");
        place.copy_from_slice(value);
        self
    }

    /// Puts a 32-bit number.
    #[must_use]
    pub fn word(self, at: usize, value: u32) -> Self {
        self.bytes(at, &value.to_be_bytes())
    }

    /// Puts the LUN, peripheral device addressing.
    #[must_use]
    pub fn lun(self, lun: u8) -> Self {
        self.bytes(8, &[0, lun, 0, 0, 0, 0, 0, 0])
    }

    /// Puts the initiator task tag.
    #[must_use]
    pub fn itt(self, itt: u32) -> Self {
        self.word(16, itt)
    }

    /// Puts the data segment.
    #[must_use]
    pub fn data(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.data = data.into();
        self
    }

    /// Byte at an offset of the header.
    #[must_use]
    pub fn at(&self, at: usize) -> u8 {
        self.bhs.get(at).copied().unwrap_or_default()
    }

    /// 32-bit number at an offset of the header.
    #[must_use]
    pub fn word_at(&self, at: usize) -> u32 {
        let bytes = self.bhs.get(at..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    /// Opcode without the I bit.
    #[must_use]
    pub fn opcode(&self) -> u8 {
        self.at(0) & 0x3f
    }

    /// Initiator task tag.
    #[must_use]
    pub fn tag(&self) -> u32 {
        self.word_at(16)
    }

    /// `key=value` pairs of the data segment.
    #[must_use]
    pub fn text(&self) -> Vec<String> {
        String::from_utf8_lossy(&self.data)
            .split_terminator('\0')
            .map(str::to_owned)
            .collect()
    }

    /// As it goes over the wire, with true lengths.
    #[must_use]
    pub fn wire(&self) -> Vec<u8> {
        let mut bytes = self.announcing(self.data.len());
        bytes.extend_from_slice(&self.data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// The header alone, with any DataSegmentLength.
    #[must_use]
    pub fn announcing(&self, data_len: usize) -> Vec<u8> {
        let mut bhs = self.bhs;
        let [_, length @ ..] = u32::try_from(data_len).unwrap_or(u32::MAX).to_be_bytes();
        if let Some([ahs_words, place @ ..]) = bhs.get_mut(4..8) {
            *ahs_words = u8::try_from(self.ahs.len() / 4).unwrap_or(u8::MAX);
            place.copy_from_slice(&length);
        }
        [bhs.as_slice(), &self.ahs].concat()
    }
}

/// Who logs in where.
#[derive(Debug, Clone)]
pub struct Nexus {
    /// iSCSI name of the initiator.
    pub initiator: String,
    /// `None`: a discovery session.
    pub target: Option<String>,
    /// Initiator's part of the session identifier.
    pub isid: [u8; 6],
    /// Keys after the names.
    pub keys: Vec<(String, String)>,
}

impl Nexus {
    /// A session to `target` with keys that leave everything to the target.
    #[must_use]
    pub fn new(initiator: &str, target: &str) -> Self {
        Self {
            initiator: initiator.to_owned(),
            target: Some(target.to_owned()),
            isid: [0, 2, 0x3d, 0, 0, 1],
            keys: Vec::new(),
        }
    }

    /// With another last byte of the ISID.
    #[must_use]
    pub fn isid(mut self, last: u8) -> Self {
        self.isid = [0, 2, 0x3d, 0, 0, last];
        self
    }

    /// With one more key.
    #[must_use]
    pub fn key(mut self, key: &str, value: &str) -> Self {
        self.keys.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The Login Request that says everything at once: operational stage, on to full feature phase.
    #[must_use]
    pub fn request(&self) -> Pdu {
        let mut text = format!("InitiatorName={}\0", self.initiator);
        match &self.target {
            Some(target) => text.push_str(&format!("TargetName={target}\0SessionType=Normal\0")),
            None => text.push_str("SessionType=Discovery\0"),
        }
        for (key, value) in &self.keys {
            text.push_str(&format!("{key}={value}\0"));
        }
        login_request(0x87, &self.isid).data(text)
    }
}

/// A Login Request with these flags (T, C, CSG, NSG), CmdSN 1.
#[must_use]
pub fn login_request(flags: u8, isid: &[u8; 6]) -> Pdu {
    Pdu::new(op::LOGIN_REQUEST | IMMEDIATE)
        .byte(1, flags)
        .bytes(8, isid)
        .itt(1)
        .bytes(20, &[0, 1])
        .word(24, 1)
}

/// How a login ended.
#[derive(Debug)]
pub enum Login {
    /// In full feature phase.
    In(Box<Raw>),
    /// Status-Class and Status-Detail.
    Refused(u8, u8),
    /// The target closed the connection without an answer.
    Closed,
}

impl Login {
    /// The session.
    ///
    /// # Errors
    /// There is none.
    pub fn session(self) -> Result<Raw> {
        match self {
            Self::In(raw) => Ok(*raw),
            other => bail!("the login failed: {other:?}"),
        }
    }

    /// Status-Class and Status-Detail of a refusal.
    ///
    /// # Errors
    /// It was not refused.
    pub fn refusal(self) -> Result<(u8, u8)> {
        match self {
            Self::Refused(class, detail) => Ok((class, detail)),
            other => bail!("the login should have been refused: {other:?}"),
        }
    }
}

/// What came of a wait.
#[derive(Debug)]
pub enum Came {
    /// A PDU.
    Pdu(Pdu),
    /// Nothing within the time.
    Nothing,
    /// The end of the connection.
    End,
}

/// The answer to a SCSI command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// SCSI status.
    pub status: u8,
    /// Sense data.
    pub sense: Vec<u8>,
    /// Data-In.
    pub data: Vec<u8>,
    /// Overflow (04h) and underflow (02h) bits.
    pub residual_flags: u8,
    /// Residual count.
    pub residual: u32,
    /// StatSN.
    pub stat_sn: u32,
}

impl Reply {
    /// Sense key, ASC and ASCQ of fixed or descriptor sense data.
    #[must_use]
    pub fn sense_code(&self) -> (u8, u8, u8) {
        let byte = |at: usize| self.sense.get(at).copied().unwrap_or_default();
        match byte(0) & 0x7f {
            0x72 | 0x73 => (byte(1) & 0x0f, byte(2), byte(3)),
            _ => (byte(2) & 0x0f, byte(12), byte(13)),
        }
    }
}

/// One SCSI command to come.
#[derive(Debug, Clone)]
pub struct Cdb {
    lun: u8,
    cdb: Vec<u8>,
    flags: u8,
    edtl: u32,
}

impl Cdb {
    /// A command without data.
    #[must_use]
    pub fn none(lun: u8, cdb: &[u8]) -> Self {
        Self {
            lun,
            cdb: cdb.to_vec(),
            flags: 0x80,
            edtl: 0,
        }
    }

    /// A command that reads up to `edtl` bytes.
    #[must_use]
    pub fn reads(lun: u8, cdb: &[u8], edtl: u32) -> Self {
        Self {
            lun,
            cdb: cdb.to_vec(),
            flags: 0xc0,
            edtl,
        }
    }

    /// A command that writes `edtl` bytes.
    #[must_use]
    pub fn writes(lun: u8, cdb: &[u8], edtl: u32) -> Self {
        Self {
            lun,
            cdb: cdb.to_vec(),
            flags: 0xa0,
            edtl,
        }
    }

    /// READ(10) of 512-byte blocks.
    #[must_use]
    pub fn read10(lun: u8, lba: u32, blocks: u16) -> Self {
        Self::reads(lun, &rw10(0x28, lba, blocks), u32::from(blocks) * 512)
    }

    /// WRITE(10) of 512-byte blocks.
    #[must_use]
    pub fn write10(lun: u8, lba: u32, blocks: u16) -> Self {
        Self::writes(lun, &rw10(0x2a, lba, blocks), u32::from(blocks) * 512)
    }

    /// With a task attribute (1 SIMPLE, 2 ORDERED, 3 HEAD OF QUEUE).
    #[must_use]
    pub fn attribute(mut self, attribute: u8) -> Self {
        self.flags = self.flags & !7 | attribute;
        self
    }

    /// With an expected data transfer length of its own.
    #[must_use]
    pub fn edtl(mut self, edtl: u32) -> Self {
        self.edtl = edtl;
        self
    }

    /// The SCSI Command PDU, without its numbers.
    #[must_use]
    pub fn pdu(&self, itt: u32) -> Pdu {
        let pdu = Pdu::new(op::SCSI_COMMAND)
            .byte(1, self.flags)
            .lun(self.lun)
            .itt(itt)
            .word(20, self.edtl);
        pdu.bytes(32, self.cdb.get(..16).unwrap_or(&self.cdb))
    }
}

fn rw10(code: u8, lba: u32, blocks: u16) -> [u8; 10] {
    let ([l0, l1, l2, l3], [b0, b1]) = (lba.to_be_bytes(), blocks.to_be_bytes());
    [code, 0, l0, l1, l2, l3, 0, b0, b1, 0]
}

/// One TCP connection to the target.
#[derive(Debug)]
pub struct Raw {
    stream: TcpStream,
    inbox: Vec<u8>,
    /// PDUs that were read while another was waited for.
    aside: VecDeque<Pdu>,
    /// CmdSN of the next command.
    pub cmd_sn: u32,
    /// ExpStatSN of the next request.
    pub exp_stat_sn: u32,
    next_itt: u32,
    /// Highest MaxCmdSN seen.
    pub max_cmd_sn: u32,
    /// ExpCmdSN seen last.
    pub exp_cmd_sn: u32,
    /// TSIH that the target gave.
    pub tsih: u16,
    /// Text of the last Login Response.
    pub login_text: Vec<String>,
    /// Longest data segment that the target takes.
    pub segment: usize,
    /// Longest immediate data.
    pub first_burst: usize,
    /// Longest data segment that this end has declared; a longer Data-In is a fault.
    pub own_segment: usize,
}

impl Raw {
    /// A TCP connection, nothing sent.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, LIMIT)
            .with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(Self {
            stream,
            inbox: Vec::new(),
            aside: VecDeque::new(),
            cmd_sn: 1,
            exp_stat_sn: 0,
            next_itt: 0x100,
            max_cmd_sn: 0,
            exp_cmd_sn: 0,
            tsih: 0,
            login_text: Vec::new(),
            segment: SEGMENT,
            first_burst: SEGMENT,
            own_segment: usize::MAX,
        })
    }

    /// Connects and logs in.
    ///
    /// # Errors
    /// Nobody listens, or the answer is no Login Response.
    pub fn login(address: SocketAddr, nexus: &Nexus) -> Result<Login> {
        let mut raw = Self::connect(address)?;
        // A target that is full may close at once: then the request finds no reader.
        let sent = raw.send(&nexus.request());
        let answer = match raw.receive(LIMIT) {
            Ok(Came::Pdu(answer)) => answer,
            Ok(Came::End) => return Ok(Login::Closed),
            Ok(Came::Nothing) => bail!("no Login Response in {LIMIT:?}"),
            Err(error) => {
                return if sent.is_err() {
                    Ok(Login::Closed)
                } else {
                    Err(error)
                };
            }
        };
        ensure!(
            answer.opcode() == op::LOGIN_RESPONSE,
            "not a Login Response: {answer:?}"
        );
        if answer.at(36) != 0 {
            return Ok(Login::Refused(answer.at(36), answer.at(37)));
        }
        ensure!(answer.at(1) & 0x83 == 0x83, "the login goes on: {answer:?}");
        raw.login_text = answer.text();
        raw.tsih = u16::from_be_bytes([answer.at(14), answer.at(15)]);
        Ok(Login::In(Box::new(raw)))
    }

    /// A further handle on the socket, for another thread.
    ///
    /// # Errors
    /// No file descriptor left.
    pub fn stream(&self) -> Result<TcpStream> {
        self.stream.try_clone().context("cloning a socket")
    }

    /// A tag that no task of this connection had.
    pub fn new_itt(&mut self) -> u32 {
        self.next_itt += 1;
        self.next_itt
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection is gone, or the target does not read.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("sending")
    }

    /// Sends a PDU with the numbers that it carries.
    ///
    /// # Errors
    /// The connection is gone, or the target does not read.
    pub fn send(&mut self, pdu: &Pdu) -> Result<()> {
        self.send_bytes(&pdu.wire())
    }

    /// Puts CmdSN and ExpStatSN, and counts CmdSN on unless the PDU is immediate.
    pub fn number(&mut self, pdu: Pdu) -> Pdu {
        let pdu = pdu.word(24, self.cmd_sn).word(28, self.exp_stat_sn);
        if pdu.at(0) & IMMEDIATE == 0 {
            self.cmd_sn = self.cmd_sn.wrapping_add(1);
        }
        pdu
    }

    /// Sends a request with its numbers.
    ///
    /// # Errors
    /// The connection is gone, or the target does not read.
    pub fn request(&mut self, pdu: Pdu) -> Result<()> {
        let pdu = self.number(pdu);
        self.send(&pdu)
    }

    /// Waits for the next PDU.
    ///
    /// # Errors
    /// The system refuses to read.
    pub fn receive(&mut self, limit: Duration) -> Result<Came> {
        match self.aside.pop_front() {
            Some(pdu) => Ok(Came::Pdu(pdu)),
            None => self.next_pdu(limit),
        }
    }

    fn next_pdu(&mut self, limit: Duration) -> Result<Came> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(pdu) = self.take_pdu() {
                return Ok(Came::Pdu(pdu));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Came::Nothing);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = vec![0; 64 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(Came::End),
                Ok(n) => self.inbox.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(Came::Nothing);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Came::End),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("receiving"),
            }
        }
    }

    fn take_pdu(&mut self) -> Option<Pdu> {
        let bhs = *self.inbox.first_chunk::<BHS_LEN>()?;
        let mut pdu = Pdu {
            bhs,
            ahs: Vec::new(),
            data: Vec::new(),
        };
        let data_len = (pdu.word_at(4) & 0x00ff_ffff) as usize;
        let total = BHS_LEN + data_len.next_multiple_of(4);
        pdu.data = self.inbox.get(BHS_LEN..total)?.get(..data_len)?.to_vec();
        self.inbox.drain(..total);
        self.note(&pdu);
        Some(pdu)
    }

    /// Keeps the numbers of what came.
    fn note(&mut self, pdu: &Pdu) {
        let peeks = pdu.opcode() == op::R2T || (pdu.opcode() == op::NOP_IN && pdu.tag() == RESERVED);
        let has_status = pdu.opcode() != op::DATA_IN || pdu.at(1) & 1 != 0;
        if has_status && !peeks {
            self.exp_stat_sn = pdu.word_at(24).wrapping_add(1);
        }
        self.exp_cmd_sn = pdu.word_at(28);
        self.max_cmd_sn = pdu.word_at(32);
    }

    /// Waits for a PDU that `wanted` chooses; others are put aside, pings are answered.
    ///
    /// # Errors
    /// It does not come in time, or the connection ends.
    pub fn expect(&mut self, what: &str, wanted: impl Fn(&Pdu) -> bool) -> Result<Pdu> {
        if let Some(at) = self.aside.iter().position(&wanted) {
            return self.aside.remove(at).context("it was just there");
        }
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.next_pdu(deadline.saturating_duration_since(Instant::now()))? {
                Came::Pdu(pdu) if wanted(&pdu) => return Ok(pdu),
                Came::Pdu(pdu) if is_ping(&pdu) => self.pong(&pdu)?,
                Came::Pdu(pdu) => self.aside.push_back(pdu),
                Came::Nothing => bail!("{what}: not in {LIMIT:?}; aside: {:?}", self.aside),
                Came::End => bail!("{what}: the connection ended; aside: {:?}", self.aside),
            }
        }
    }

    /// Answers a ping.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn pong(&mut self, ping: &Pdu) -> Result<()> {
        let pong = Pdu::new(op::NOP_OUT | IMMEDIATE)
            .itt(RESERVED)
            .word(20, ping.word_at(20));
        self.request(pong)
    }

    /// Waits until the target closes the connection; what still comes is given back.
    ///
    /// # Errors
    /// It stays open.
    pub fn ends_within(&mut self, limit: Duration) -> Result<Vec<Pdu>> {
        let deadline = Instant::now() + limit;
        let mut last: Vec<Pdu> = self.aside.drain(..).collect();
        loop {
            match self.next_pdu(deadline.saturating_duration_since(Instant::now()))? {
                Came::Pdu(pdu) => last.push(pdu),
                Came::End => return Ok(last),
                Came::Nothing => bail!("the connection is still open after {limit:?}; came: {last:?}"),
            }
        }
    }

    /// Everything that comes within `time`, pings answered.
    ///
    /// # Errors
    /// The connection ends.
    pub fn listen(&mut self, time: Duration) -> Result<Vec<Pdu>> {
        let deadline = Instant::now() + time;
        let mut all: Vec<Pdu> = self.aside.drain(..).collect();
        loop {
            match self.next_pdu(deadline.saturating_duration_since(Instant::now()))? {
                Came::Pdu(pdu) if is_ping(&pdu) => self.pong(&pdu)?,
                Came::Pdu(pdu) => all.push(pdu),
                Came::Nothing => return Ok(all),
                Came::End => bail!("the connection ended; came: {all:?}"),
            }
        }
    }

    /// Sends a SCSI command with this immediate data; its tag.
    ///
    /// # Errors
    /// The connection is gone, or the target does not read.
    pub fn start(&mut self, cdb: &Cdb, immediate: &[u8]) -> Result<u32> {
        let itt = self.new_itt();
        self.request(cdb.pdu(itt).data(immediate))?;
        Ok(itt)
    }

    /// Waits for the status of a command, and puts its data together.
    ///
    /// # Errors
    /// It does not come, or Data-In breaks the rules (DataSN and offsets in order).
    pub fn finish(&mut self, itt: u32) -> Result<Reply> {
        let mut reply = Reply {
            status: 0,
            sense: vec![],
            data: vec![],
            residual_flags: 0,
            residual: 0,
            stat_sn: 0,
        };
        let mut data_sn = 0;
        loop {
            let answer =
                |pdu: &Pdu| pdu.tag() == itt && matches!(pdu.opcode(), op::DATA_IN | op::SCSI_RESPONSE);
            let pdu = self.expect(&format!("the answer to command {itt:#x}"), answer)?;
            if pdu.opcode() == op::DATA_IN {
                ensure!(
                    pdu.data.len() <= self.own_segment,
                    "Data-In of {} bytes, longer than the {} that were declared",
                    pdu.data.len(),
                    self.own_segment
                );
                ensure!(
                    pdu.word_at(36) == data_sn,
                    "DataSN {} instead of {data_sn}",
                    pdu.word_at(36)
                );
                ensure!(
                    pdu.word_at(40) as usize == reply.data.len(),
                    "offset {} after {}",
                    pdu.word_at(40),
                    reply.data.len()
                );
                data_sn += 1;
                reply.data.extend_from_slice(&pdu.data);
            }
            let over = pdu.opcode() == op::SCSI_RESPONSE || pdu.at(1) & 1 != 0;
            if over {
                reply.status = pdu.at(3);
                reply.residual_flags = pdu.at(1) & 6;
                reply.residual = pdu.word_at(44);
                reply.stat_sn = pdu.word_at(24);
                if pdu.opcode() == op::SCSI_RESPONSE {
                    reply.sense = pdu.data.get(2..).unwrap_or_default().to_vec();
                }
                return Ok(reply);
            }
        }
    }

    /// Carries out a command without data, or one that reads.
    ///
    /// # Errors
    /// No answer.
    pub fn run(&mut self, cdb: &Cdb) -> Result<Reply> {
        let itt = self.start(cdb, &[])?;
        self.finish(itt)
    }

    /// Carries out a command that writes: immediate data, then what R2Ts ask for.
    ///
    /// # Errors
    /// No answer, or an R2T for data that there is not.
    pub fn run_write(&mut self, cdb: &Cdb, data: &[u8]) -> Result<Reply> {
        let itt = self.start(
            cdb,
            data.get(..data.len().min(self.first_burst)).unwrap_or_default(),
        )?;
        loop {
            let mine = |pdu: &Pdu| pdu.tag() == itt && matches!(pdu.opcode(), op::R2T | op::SCSI_RESPONSE);
            let pdu = self.expect("an R2T or the status of a write", mine)?;
            if pdu.opcode() == op::SCSI_RESPONSE {
                self.aside.push_front(pdu);
                return self.finish(itt);
            }
            self.satisfy(&pdu, data)?;
        }
    }

    /// Sends what an R2T asks for, out of the command's whole data.
    ///
    /// # Errors
    /// There is not so much data, or the connection is gone.
    pub fn satisfy(&mut self, r2t: &Pdu, data: &[u8]) -> Result<()> {
        let (offset, len) = (r2t.word_at(40) as usize, r2t.word_at(44) as usize);
        let wanted = data
            .get(offset..offset + len)
            .with_context(|| format!("an R2T beyond the data: {r2t:?}"))?;
        let segment = self.segment;
        let count = wanted.chunks(segment).count();
        for (i, piece) in wanted.chunks(segment).enumerate() {
            let last = i + 1 == count;
            let pdu =
                data_out(r2t, u32::try_from(i)?, u32::try_from(offset + i * segment)?, last).data(piece);
            let pdu = pdu.word(28, self.exp_stat_sn);
            self.send(&pdu)?;
        }
        Ok(())
    }

    /// TEST UNIT READY until the unit attentions of a new session are told.
    ///
    /// # Errors
    /// The unit does not become ready.
    pub fn ready(&mut self, lun: u8) -> Result<()> {
        for _ in 0..8 {
            if self.run(&Cdb::none(lun, &[0; 6]))?.status == 0 {
                return Ok(());
            }
        }
        bail!("the unit does not become ready")
    }

    /// READ(10), which must succeed.
    ///
    /// # Errors
    /// It does not.
    pub fn read(&mut self, lun: u8, lba: u32, blocks: u16) -> Result<Vec<u8>> {
        let reply = self.run(&Cdb::read10(lun, lba, blocks))?;
        ensure!(reply.status == 0, "READ(10): {reply:?}");
        Ok(reply.data)
    }

    /// WRITE(10), which must succeed.
    ///
    /// # Errors
    /// It does not.
    pub fn write(&mut self, lun: u8, lba: u32, data: &[u8]) -> Result<()> {
        let reply = self.run_write(&Cdb::write10(lun, lba, u16::try_from(data.len() / 512)?), data)?;
        ensure!(reply.status == 0, "WRITE(10): {reply:?}");
        Ok(())
    }

    /// A ping with this text, and its echo.
    ///
    /// # Errors
    /// It is not answered.
    pub fn ping(&mut self, text: &[u8]) -> Result<Vec<u8>> {
        let itt = self.new_itt();
        self.request(
            Pdu::new(op::NOP_OUT | IMMEDIATE)
                .itt(itt)
                .word(20, RESERVED)
                .data(text),
        )?;
        Ok(self
            .expect("the echo of a ping", |pdu| {
                pdu.opcode() == op::NOP_IN && pdu.tag() == itt
            })?
            .data)
    }

    /// A task management function; its tag.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn start_tmf(&mut self, function: u8, lun: u8, referenced: u32, ref_cmd_sn: u32) -> Result<u32> {
        let itt = self.new_itt();
        let pdu = Pdu::new(op::TMF_REQUEST | IMMEDIATE)
            .byte(1, 0x80 | function)
            .lun(lun)
            .itt(itt);
        self.request(pdu.word(20, referenced).word(32, ref_cmd_sn))?;
        Ok(itt)
    }

    /// A task management function and its response.
    ///
    /// # Errors
    /// It is not answered.
    pub fn tmf(&mut self, function: u8, lun: u8) -> Result<u8> {
        let itt = self.start_tmf(function, lun, RESERVED, 0)?;
        Ok(self
            .expect("a task management response", |pdu| {
                pdu.opcode() == op::TMF_RESPONSE && pdu.tag() == itt
            })?
            .at(2))
    }

    /// Logs out, and waits for the end of the connection.
    ///
    /// # Errors
    /// The target does not answer, or does not close.
    pub fn logout(&mut self) -> Result<()> {
        let itt = self.new_itt();
        self.request(Pdu::new(op::LOGOUT_REQUEST | IMMEDIATE).itt(itt))?;
        self.expect("a Logout Response", |pdu| {
            pdu.opcode() == op::LOGOUT_RESPONSE && pdu.tag() == itt
        })?;
        self.ends_within(LIMIT).map(drop)
    }

    /// Closes our half, so that the target sees the end.
    ///
    /// # Errors
    /// The connection is gone already.
    pub fn hang_up(&self) -> Result<()> {
        self.stream.shutdown(Shutdown::Both).context("closing a socket")
    }
}

/// Whether this is a ping of the target's.
#[must_use]
pub fn is_ping(pdu: &Pdu) -> bool {
    pdu.opcode() == op::NOP_IN && pdu.word_at(20) != RESERVED
}

/// A Data-Out for an R2T, without data.
#[must_use]
pub fn data_out(r2t: &Pdu, data_sn: u32, offset: u32, last: bool) -> Pdu {
    let pdu = Pdu::new(op::DATA_OUT)
        .byte(1, if last { 0x80 } else { 0 })
        .itt(r2t.tag());
    pdu.word(20, r2t.word_at(20)).word(36, data_sn).word(40, offset)
}
