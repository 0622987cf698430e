//! A small initiator of our own, for loads that fio's cannot make: Debian's libiscsi has no data digest.
//!
//! Reads only, one session, a fixed number of commands in flight; digests of what comes are verified.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::fio::{Latencies, Measured, Times};
use crate::points::{Digests, Point};

const BHS: usize = 48;
const DIGEST: usize = 4;
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(20);
/// What one read from the socket may bring.
const INBOX: usize = 1 << 20;
/// Login Request and Response, SCSI Command, SCSI Response, Data-In (RFC 7143 §11.1.1.2).
const LOGIN: u8 = 0x43;
const LOGIN_RESPONSE: u8 = 0x23;
const COMMAND: u8 = 0x01;
const RESPONSE: u8 = 0x21;
const DATA_IN: u8 = 0x25;

/// A PDU that came.
struct Came {
    bhs: [u8; BHS],
    data: Vec<u8>,
}

impl Came {
    fn byte(&self, at: usize) -> u8 {
        self.bhs.get(at).copied().unwrap_or_default()
    }

    fn word(&self, at: usize) -> u32 {
        word(&self.bhs, at)
    }

    fn opcode(&self) -> u8 {
        self.byte(0) & 0x3f
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    four.map_or(0, |four| u32::from_be_bytes(*four))
}

fn put(bhs: &mut [u8; BHS], at: usize, bytes: &[u8]) {
    if let Some(place) = bhs.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// A logged-in session.
struct Session {
    stream: BufReader<TcpStream>,
    lun: u8,
    digests: Digests,
    cmd_sn: u32,
    exp_stat_sn: u32,
    /// Spent in vain otherwise: data is read into the same memory again.
    spare: Vec<u8>,
}

/// `iscsi://HOST:PORT/IQN/LUN` in its parts.
fn parts(url: &str) -> Option<(SocketAddr, &str, u8)> {
    let mut words = url.strip_prefix("iscsi://")?.split('/');
    let (address, iqn, lun) = (words.next()?, words.next()?, words.next()?);
    Some((address.parse().ok()?, iqn, lun.parse().ok()?))
}

impl Session {
    fn log_in(url: &str, digests: Digests) -> Result<Self> {
        let (address, iqn, lun) = parts(url).with_context(|| format!("not an iSCSI URL: {url}"))?;
        let stream = TcpStream::connect_timeout(&address, LIMIT).context("connecting")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut session = Self {
            stream: BufReader::with_capacity(INBOX, stream),
            lun,
            digests: Digests::None,
            cmd_sn: 1,
            exp_stat_sn: 0,
            spare: Vec::new(),
        };
        let (header, data) = digests.keys();
        let text = format!(
            "InitiatorName=iqn.2026-11.bench:own\0TargetName={iqn}\0SessionType=Normal\0HeaderDigest={header}\0DataDigest={data}\0\
             MaxRecvDataSegmentLength=262144\0MaxBurstLength=1048576\0FirstBurstLength=262144\0InitialR2T=No\0ImmediateData=Yes\0"
        );
        let mut bhs = [0; BHS];
        // Transit, from operational negotiation to the full feature phase.
        put(&mut bhs, 0, &[LOGIN, 0x87]);
        put(&mut bhs, 8, &[0x80, 0, 0, 1, 0, 1]);
        put(&mut bhs, 24, &session.cmd_sn.to_be_bytes());
        session.send(bhs, text.as_bytes())?;
        let answer = session.receive()?;
        ensure!(
            answer.opcode() == LOGIN_RESPONSE && answer.byte(36) == 0 && answer.byte(1) & 0x80 != 0,
            "the login failed: status {:02x}{:02x}",
            answer.byte(36),
            answer.byte(37)
        );
        let text = String::from_utf8_lossy(&answer.data).into_owned();
        for (key, value) in [("HeaderDigest", header), ("DataDigest", data)] {
            ensure!(
                text.split('\0').any(|pair| pair == format!("{key}={value}")),
                "the target has no {key}={value}: {text:?}"
            );
        }
        session.exp_stat_sn = answer.word(24).wrapping_add(1);
        session.digests = digests;
        session.ready()?;
        Ok(session)
    }

    /// Sends a PDU with its numbers and digests in place.
    fn send(&mut self, mut bhs: [u8; BHS], data: &[u8]) -> Result<()> {
        put(&mut bhs, 28, &self.exp_stat_sn.to_be_bytes());
        let [_, length @ ..] = u32::try_from(data.len())?.to_be_bytes();
        put(&mut bhs, 5, &length);
        let mut wire = bhs.to_vec();
        if self.digests != Digests::None {
            wire.extend(crc32c::crc32c(&bhs).to_le_bytes());
        }
        wire.extend(data);
        wire.resize(wire.len().next_multiple_of(4), 0);
        ensure!(
            data.is_empty() || self.digests == Digests::None,
            "data of ours goes without digests: only the login has any"
        );
        self.stream.get_mut().write_all(&wire).context("sending")
    }

    /// Starts a command; the tag is the caller's.
    fn start(&mut self, itt: u32, cdb: &[u8], edtl: u32) -> Result<()> {
        let mut bhs = [0; BHS];
        put(&mut bhs, 0, &[COMMAND, if edtl > 0 { 0xc0 } else { 0x80 }]);
        put(&mut bhs, 9, &[self.lun]);
        put(&mut bhs, 16, &itt.to_be_bytes());
        put(&mut bhs, 20, &edtl.to_be_bytes());
        put(&mut bhs, 24, &self.cmd_sn.to_be_bytes());
        put(&mut bhs, 32, cdb);
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        self.send(bhs, &[])
    }

    fn receive(&mut self) -> Result<Came> {
        let mut came = Came {
            bhs: [0; BHS],
            data: std::mem::take(&mut self.spare),
        };
        self.stream.read_exact(&mut came.bhs).context("receiving")?;
        if self.digests != Digests::None {
            ensure!(
                self.digest()? == crc32c::crc32c(&came.bhs),
                "the digest of a header is wrong"
            );
        }
        let len = (came.word(4) & 0x00ff_ffff) as usize;
        came.data.resize(len.next_multiple_of(4), 0);
        self.stream.read_exact(&mut came.data).context("receiving")?;
        if self.digests == Digests::HeaderAndData && len > 0 {
            ensure!(
                self.digest()? == crc32c::crc32c(&came.data),
                "the digest of data is wrong"
            );
        }
        came.data.truncate(len);
        Ok(came)
    }

    fn digest(&mut self) -> Result<u32> {
        let mut word = [0; DIGEST];
        self.stream.read_exact(&mut word).context("receiving a digest")?;
        Ok(u32::from_le_bytes(word))
    }

    /// The next PDU that ends a command: its tag and status. Gives its memory back to the next one.
    fn ended(&mut self) -> Result<(u32, u8)> {
        loop {
            let mut came = self.receive()?;
            let over = match came.opcode() {
                RESPONSE => true,
                DATA_IN => came.byte(1) & 1 != 0,
                // A ping that wants no answer within a short run.
                0x20 => false,
                other => bail!("a PDU of opcode {other:#x} came"),
            };
            self.spare = std::mem::take(&mut came.data);
            if over {
                self.exp_stat_sn = came.word(24).wrapping_add(1);
                return Ok((came.word(16), came.byte(3)));
            }
        }
    }

    /// TEST UNIT READY until the unit attentions are told.
    fn ready(&mut self) -> Result<()> {
        for _ in 0..8 {
            self.start(0, &[0; 6], 0)?;
            if self.ended()?.1 == 0 {
                return Ok(());
            }
        }
        bail!("the unit does not become ready")
    }
}

/// Random reads of the point's size and depth for `seconds`.
pub(crate) fn measure(
    point: &Point,
    url: &str,
    size_bytes: u64,
    seconds: f64,
    server: u32,
) -> Result<Measured> {
    let mut session = Session::log_in(url, point.digests)?;
    let blocks = u16::try_from(point.block / 512)?;
    let places = size_bytes / u64::from(point.block);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut read10 = move || {
        // xorshift64: any spread will do.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let lba = u32::try_from(seed % places * u64::from(blocks)).unwrap_or(0);
        let ([a, b, c, d], [e, f]) = (lba.to_be_bytes(), blocks.to_be_bytes());
        [0x28, 0, a, b, c, d, 0, e, f, 0]
    };
    let mut began: Vec<Instant> = vec![Instant::now(); point.depth as usize];
    let mut latencies = Latencies::default();
    let before = Times::now(Some(server))?;
    let client_before = crate::fio::cpu_seconds(std::process::id())?;
    let start = Instant::now();
    let mut flying = 0;
    for itt in 0..point.depth {
        session.start(itt, &read10(), point.block)?;
        flying += 1;
    }
    while flying > 0 {
        let (itt, status) = session.ended()?;
        ensure!(status == 0, "a read failed: status {status:#x}");
        let place = began.get_mut(itt as usize).context("a tag that we never used")?;
        let now = Instant::now();
        latencies.add(now - *place);
        flying -= 1;
        if (now - start).as_secs_f64() < seconds {
            *place = now;
            session.start(itt, &read10(), point.block)?;
            flying += 1;
        }
    }
    let took = start.elapsed().as_secs_f64();
    let after = Times::now(Some(server))?;
    let client = (crate::fio::cpu_seconds(std::process::id())? - client_before) / took;
    Ok(latencies.measured(point.block, took, client, &before, &after, server))
}
