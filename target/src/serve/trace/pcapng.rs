//! pcapng (draft-ietf-opsawg-pcapng) with iSCSI PDUs in the TCP segments that might have carried them.
//!
//! The daemon sees a byte stream and no packets, so Ethernet, IP and TCP are made up around it: one segment per PDU, more for a
//! PDU that is longer than an IP packet. Sequence numbers count the bytes of the stream from 1 at the start of the recording;
//! they go on over PDUs that are not in the file. Data that is not shown is cut off a packet's end, as a capture with a short
//! snapshot length would: its length on the wire stays.

use std::net::{IpAddr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

use stillpoint_iscsi::{Direction, Recorded};

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const LINKTYPE_ETHERNET: u16 = 1;

const OPT_COMMENT: u16 = 1;
const OPT_USERAPPL: u16 = 4;
const OPT_IF_NAME: u16 = 2;
const OPT_IF_TSRESOL: u16 = 9;
const OPT_EPB_DROPCOUNT: u16 = 4;

/// Bytes of the stream in one segment at most: with its headers it fits an IP packet of either version.
const SEGMENT_MAX: usize = 65_000;
/// PSH and ACK.
const TCP_FLAGS: u8 = 0x18;
const TCP: u8 = 6;
const ETHERNET_LEN: usize = 14;

/// Both ends of the recorded connection, and how far the stream is.
#[derive(Debug)]
pub(super) struct Writer {
    initiator: End,
    target: End,
}

#[derive(Clone, Copy, Debug)]
struct End {
    address: SocketAddr,
    /// Locally administered; made up.
    mac: [u8; 6],
    /// Number of the next byte from this end.
    next: u32,
}

/// Puts a block around its body.
fn block(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let padded = body.len().next_multiple_of(4);
    let len = u32::try_from(padded + 12).unwrap_or(u32::MAX).to_le_bytes();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&len);
    out.extend_from_slice(body);
    out.resize(out.len() + padded - body.len(), 0);
    out.extend_from_slice(&len);
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    // A name of 223 bytes is the longest text here.
    let value = value.get(..usize::from(u16::MAX)).unwrap_or(value);
    body.extend_from_slice(&code.to_le_bytes());
    body.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn end_of_options(body: &mut Vec<u8>) {
    body.extend_from_slice(&[0; 4]);
}

impl Writer {
    pub(super) fn new(initiator: SocketAddr, target: SocketAddr) -> Self {
        let end = |address: SocketAddr, last| End {
            address: SocketAddr::new(address.ip().to_canonical(), address.port()),
            mac: [2, 0, 0, 0, 0, last],
            next: 1,
        };
        Self {
            initiator: end(initiator, 1),
            target: end(target, 2),
        }
    }

    /// What a file begins with.
    pub(super) fn head(&self, interface: &str, comment: &str) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        let mut body = Vec::new();
        body.extend_from_slice(&BYTE_ORDER.to_le_bytes());
        // Version 1.0; the length of the section is not known.
        body.extend_from_slice(&[1, 0, 0, 0]);
        body.extend_from_slice(&u64::MAX.to_le_bytes());
        option(&mut body, OPT_COMMENT, comment.as_bytes());
        option(
            &mut body,
            OPT_USERAPPL,
            concat!("stillpoint ", env!("CARGO_PKG_VERSION")).as_bytes(),
        );
        end_of_options(&mut body);
        block(&mut out, SECTION_HEADER, &body);
        body.clear();
        body.extend_from_slice(&LINKTYPE_ETHERNET.to_le_bytes());
        // Reserved; no snapshot length.
        body.extend_from_slice(&[0; 6]);
        option(&mut body, OPT_IF_NAME, interface.as_bytes());
        // Times count nanoseconds.
        option(&mut body, OPT_IF_TSRESOL, &[9]);
        end_of_options(&mut body);
        block(&mut out, INTERFACE, &body);
        out
    }

    /// Appends a PDU. `missed` is how many before it were not recorded.
    pub(super) fn pdu(&mut self, out: &mut Vec<u8>, time: SystemTime, pdu: &Recorded, missed: u64) {
        let mut missed = missed;
        let mut at = 0;
        while at < pdu.wire_len {
            let len = (pdu.wire_len - at).min(SEGMENT_MAX);
            let shown = pdu
                .shown
                .get(at..pdu.shown.len().min(at + len))
                .unwrap_or_default();
            self.segment(out, time, pdu.direction, shown, len, std::mem::take(&mut missed));
            at += len;
        }
    }

    /// Counts a PDU that is not recorded.
    pub(super) fn skip(&mut self, pdu: &Recorded) {
        let (from, _) = self.ends(pdu.direction);
        from.advance(pdu.wire_len);
    }

    fn ends(&mut self, direction: Direction) -> (&mut End, &mut End) {
        match direction {
            Direction::In => (&mut self.initiator, &mut self.target),
            Direction::Out => (&mut self.target, &mut self.initiator),
        }
    }

    fn segment(
        &mut self,
        out: &mut Vec<u8>,
        time: SystemTime,
        direction: Direction,
        shown: &[u8],
        len: usize,
        missed: u64,
    ) {
        let (from, to) = self.ends(direction);
        let packet = frame(from, to, shown, len);
        from.advance(len);
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let wire_len = packet.len() - shown.len() + len;
        let mut body = Vec::with_capacity(packet.len() + 48);
        // Interface 0.
        body.extend_from_slice(&[0; 4]);
        for word in [ns >> 32, ns & 0xffff_ffff] {
            body.extend_from_slice(&u32::try_from(word).unwrap_or(u32::MAX).to_le_bytes());
        }
        for length in [packet.len(), wire_len] {
            body.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        }
        body.extend_from_slice(&packet);
        body.resize(body.len().next_multiple_of(4), 0);
        if missed > 0 {
            option(&mut body, OPT_EPB_DROPCOUNT, &missed.to_le_bytes());
            end_of_options(&mut body);
        }
        block(out, ENHANCED_PACKET, &body);
    }
}

impl End {
    fn advance(&mut self, bytes: usize) {
        // Sequence numbers wrap (RFC 9293 §3.4).
        let bytes = u32::try_from(bytes % (1 << 32)).unwrap_or(0);
        self.next = self.next.wrapping_add(bytes);
    }
}

/// Ethernet, IP and TCP headers with what is shown of a segment of `len` bytes.
fn frame(from: &End, to: &End, shown: &[u8], len: usize) -> Vec<u8> {
    let mut segment = Vec::with_capacity(20 + shown.len());
    segment.extend_from_slice(&from.address.port().to_be_bytes());
    segment.extend_from_slice(&to.address.port().to_be_bytes());
    segment.extend_from_slice(&from.next.to_be_bytes());
    // Everything that came before is acknowledged: the daemon has no knowledge of acknowledgements.
    segment.extend_from_slice(&to.next.to_be_bytes());
    // Five words of header; a window that is never closed; checksum below, no urgent data.
    segment.extend_from_slice(&[5 << 4, TCP_FLAGS, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(shown);
    let tcp_len = u16::try_from(20 + len).unwrap_or(u16::MAX);
    let mut packet = Vec::with_capacity(ETHERNET_LEN + 40 + segment.len());
    packet.extend_from_slice(&to.mac);
    packet.extend_from_slice(&from.mac);
    let pseudo = match (from.address.ip(), to.address.ip()) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            packet.extend_from_slice(&tcp_len.to_be_bytes());
            packet.extend_from_slice(&[TCP, 64]);
            let addresses = [source.octets(), destination.octets()].concat();
            packet.extend_from_slice(&addresses);
            addresses
        }
        (source, destination) => {
            let addresses = [v4(source), v4(destination)].concat();
            let total = tcp_len.saturating_add(20).to_be_bytes();
            // No options, may not be fragmented.
            let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, TCP, 0, 0];
            header.extend_from_slice(&addresses);
            let sum = checksum(&[&header]);
            put(&mut header, 10, sum);
            packet.extend_from_slice(&[0x08, 0x00]);
            packet.extend_from_slice(&header);
            addresses
        }
    };
    if shown.len() == len {
        let sum = checksum(&[&pseudo, &[0, TCP], &tcp_len.to_be_bytes(), &segment]);
        put(&mut segment, 16, sum);
    }
    packet.extend_from_slice(&segment);
    packet
}

/// A socket has two addresses of one family.
fn v4(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => [0; 4],
    }
}

fn put(bytes: &mut [u8], at: usize, word: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&word.to_be_bytes());
    }
}

/// The Internet checksum (RFC 1071); every piece but the last has an even length.
fn checksum(pieces: &[&[u8]]) -> u16 {
    let words = pieces.iter().flat_map(|piece| piece.chunks(2));
    let mut sum: u32 = words
        .map(|word| match word {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            [high] => u32::from(u16::from_be_bytes([*high, 0])),
            _ => 0,
        })
        .fold(0, |sum, word| {
            let sum = sum + word;
            (sum & 0xffff) + (sum >> 16)
        });
    sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn recorded(direction: Direction, shown: &[u8], wire_len: usize) -> Recorded {
        Recorded {
            at: Instant::now(),
            direction,
            shown: bytes::Bytes::copy_from_slice(shown),
            wire_len,
        }
    }

    /// Captured length, length on the wire and packet of each packet block.
    fn packets(mut file: &[u8]) -> Vec<(usize, usize, Vec<u8>)> {
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let mut found = Vec::new();
        while !file.is_empty() {
            let len = word(file, 4) as usize;
            assert_eq!(len % 4, 0);
            assert_eq!(
                word(file, len - 4) as usize,
                len,
                "the length stands at both ends"
            );
            if word(file, 0) == ENHANCED_PACKET {
                let captured = word(file, 20) as usize;
                found.push((
                    captured,
                    word(file, 24) as usize,
                    file[28..28 + captured].to_vec(),
                ));
            }
            file = &file[len..];
        }
        found
    }

    fn sequence(packet: &[u8], ip_len: usize) -> (u32, u32) {
        let tcp = &packet[14 + ip_len..];
        let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
        (word(4), word(8))
    }

    #[test]
    fn sequence_numbers_follow_the_stream_over_hidden_and_missed_data() {
        let mut writer = Writer::new(
            "192.0.2.1:5000".parse().unwrap(),
            "192.0.2.2:3260".parse().unwrap(),
        );
        let mut file = writer.head("session 1", "a comment");
        let time = UNIX_EPOCH + Duration::from_secs(1);
        writer.pdu(&mut file, time, &recorded(Direction::In, &[1; 48], 48), 0);
        writer.pdu(&mut file, time, &recorded(Direction::Out, &[2; 48], 150_048), 0);
        writer.skip(&recorded(Direction::In, &[], 1000));
        writer.pdu(&mut file, time, &recorded(Direction::In, &[3; 48], 48), 1);
        let packets = packets(&file);
        let lens: Vec<_> = packets
            .iter()
            .map(|(captured, wire, _)| (captured - 54, wire - 54))
            .collect();
        assert_eq!(lens, [(48, 48), (48, 65_000), (0, 65_000), (0, 20_048), (48, 48)]);
        let numbers: Vec<_> = packets
            .iter()
            .map(|(_, _, packet)| sequence(packet, 20))
            .collect();
        assert_eq!(
            numbers,
            [(1, 1), (1, 49), (65_001, 49), (130_001, 49), (1049, 150_049)]
        );
        // IPv4's total length speaks of the wire.
        assert_eq!(packets[1].2[16..18], 65_040_u16.to_be_bytes());
    }

    #[test]
    fn checksums_are_those_of_the_standards() {
        // RFC 1071 §3: the sum of these is ddf2.
        assert_eq!(
            checksum(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]),
            !0xddf2
        );
        for (from, to, ip_len) in [
            ("192.0.2.1:5000", "192.0.2.2:3260", 20),
            ("[2001:db8::1]:5000", "[2001:db8::2]:3260", 40),
        ] {
            let mut writer = Writer::new(from.parse().unwrap(), to.parse().unwrap());
            let mut file = Vec::new();
            writer.pdu(&mut file, UNIX_EPOCH, &recorded(Direction::In, &[7; 51], 51), 0);
            let (_, _, packet) = &packets(&file)[0];
            let tcp = &packet[14 + ip_len..];
            let addresses = if ip_len == 20 {
                &packet[26..34]
            } else {
                &packet[22..54]
            };
            let len = u16::try_from(tcp.len()).unwrap().to_be_bytes();
            assert_eq!(
                checksum(&[addresses, &[0, TCP], &len, tcp]),
                0,
                "a right checksum sums up to zero"
            );
            if ip_len == 20 {
                assert_eq!(checksum(&[&packet[14..34]]), 0);
            }
        }
    }

    #[test]
    fn a_mapped_address_is_the_one_it_stands_for() {
        let mut writer = Writer::new(
            "[::ffff:192.0.2.1]:5000".parse().unwrap(),
            "[::ffff:192.0.2.2]:3260".parse().unwrap(),
        );
        let mut file = Vec::new();
        writer.pdu(&mut file, UNIX_EPOCH, &recorded(Direction::Out, &[7; 48], 48), 0);
        assert_eq!(packets(&file)[0].2[12..15], [0x08, 0x00, 0x45]);
    }
}
