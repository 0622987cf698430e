//! Is the address under which an agent finds this target one that may change? Agents dial the target by it, and targets used with
//! agents need a fixed one (agent-protocol.md §8).
//!
//! The kernel knows: an address that a DHCP client or a router's advertisement set has a lifetime, and lacks the flag of a permanent
//! one (rtnetlink(7), `ifa_flags`; `ip address` shows it as "dynamic").

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// linux/socket.h
const AF_NETLINK: i32 = 16;
/// linux/netlink.h
const NETLINK_ROUTE: i32 = 0;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_HEADER_LEN: usize = 16;
/// linux/rtnetlink.h
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// linux/if_addr.h: `struct ifaddrmsg` is family, prefix length, flags, scope, index.
const IFADDR_LEN: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_PERMANENT: u8 = 0x80;
/// The kernel answers at once.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// A host with more addresses than fit is not looked at to the end.
const MESSAGES_MAX: usize = 256;

/// Whether this host holds `address` for a time only; `None` when it does not hold it, or the kernel does not tell.
pub(super) fn is_temporary(address: IpAddr) -> Option<bool> {
    let found = look(address);
    found.unwrap_or_else(|error| {
        tracing::debug!(%error, "the kernel does not tell whether this host's address is permanent");
        None
    })
}

fn look(address: IpAddr) -> io::Result<Option<bool>> {
    let mut socket = Socket::new(
        Domain::from(AF_NETLINK),
        Type::RAW,
        Some(Protocol::from(NETLINK_ROUTE)),
    )?;
    socket.set_read_timeout(Some(ANSWER_TIME_MAX))?;
    socket.send(&request())?;
    let mut buffer = vec![0; 32 * 1024];
    for _ in 0..MESSAGES_MAX {
        let count = socket.read(&mut buffer)?;
        match scan(buffer.get(..count).unwrap_or_default(), address) {
            Scan::Found(temporary) => return Ok(Some(temporary)),
            Scan::End => return Ok(None),
            Scan::More => {}
        }
    }
    Ok(None)
}

/// "All addresses of all interfaces."
fn request() -> [u8; NLMSG_HEADER_LEN + IFADDR_LEN] {
    let mut request = [0; NLMSG_HEADER_LEN + IFADDR_LEN];
    let header = [
        // Length (24), type, flags, then sequence and port of nobody.
        24_u32.to_ne_bytes().as_slice(),
        &RTM_GETADDR.to_ne_bytes(),
        &NLM_F_REQUEST_DUMP.to_ne_bytes(),
    ]
    .concat();
    for (to, from) in request.iter_mut().zip(header) {
        *to = from;
    }
    request
}

#[derive(Debug, PartialEq, Eq)]
enum Scan {
    Found(bool),
    More,
    End,
}

/// Reads one datagram of the answer: messages of a header and a body, each at a multiple of 4 bytes.
fn scan(mut datagram: &[u8], address: IpAddr) -> Scan {
    while let Some((length, kind)) = header(datagram) {
        let Some(message) = datagram.get(NLMSG_HEADER_LEN..length) else {
            return Scan::End;
        };
        match kind {
            NLMSG_DONE | NLMSG_ERROR => return Scan::End,
            RTM_NEWADDR => {
                if let Some(temporary) = temporary(message, address) {
                    return Scan::Found(temporary);
                }
            }
            _ => {}
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Scan::More
}

fn header(message: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(message.get(..4)?.try_into().ok()?);
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let length = usize::try_from(length).ok()?;
    (length >= NLMSG_HEADER_LEN).then_some((length, kind))
}

/// Whether this message is about `address`, and it is not permanent.
fn temporary(message: &[u8], address: IpAddr) -> Option<bool> {
    let flags = *message.get(2)?;
    let mut attributes = message.get(IFADDR_LEN..)?;
    while let Some(length) = attributes.get(..2).and_then(|length| length.try_into().ok()) {
        let length = usize::from(u16::from_ne_bytes(length));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        // IFA_ADDRESS of a point-to-point link is the other end's; its own one is IFA_LOCAL then, and the other's is never ours.
        if [IFA_ADDRESS, IFA_LOCAL].contains(&kind) && ip(value) == Some(address) {
            return Some(flags & IFA_F_PERMANENT == 0);
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(value) {
        return Some(IpAddr::V4(Ipv4Addr::from(octets)));
    }
    let octets = <[u8; 16]>::try_from(value).ok()?;
    Some(IpAddr::V6(Ipv6Addr::from(octets)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One RTM_NEWADDR as the kernel sends it: 10.0.0.5/24 on interface 2.
    fn message(flags: u8) -> Vec<u8> {
        let mut message = vec![2, 24, flags, 0, 2, 0, 0, 0];
        for kind in [IFA_ADDRESS, IFA_LOCAL] {
            message.extend(8_u16.to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend([10, 0, 0, 5]);
        }
        let length = u32::try_from(NLMSG_HEADER_LEN + message.len()).expect("short");
        let mut whole = length.to_ne_bytes().to_vec();
        whole.extend(RTM_NEWADDR.to_ne_bytes());
        whole.extend([0; 10]);
        whole.extend(message);
        whole
    }

    #[test]
    fn an_address_without_the_flag_is_temporary() {
        let ours = IpAddr::from([10, 0, 0, 5]);
        assert_eq!(scan(&message(0), ours), Scan::Found(true));
        assert_eq!(scan(&message(IFA_F_PERMANENT), ours), Scan::Found(false));
        assert_eq!(scan(&message(0), IpAddr::from([10, 0, 0, 6])), Scan::More);
        let both = [message(0), message(IFA_F_PERMANENT)].concat();
        assert_eq!(scan(&both, ours), Scan::Found(true), "the first one is");
    }

    #[test]
    fn no_prefix_and_no_flipped_bit_panics_or_hangs() {
        let ours = IpAddr::from([10, 0, 0, 5]);
        let whole = [message(0), message(0)].concat();
        for end in 0..whole.len() {
            scan(&whole[..end], ours);
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            scan(&flipped, ours);
        }
    }

    #[test]
    fn the_kernel_knows_the_loopback_for_ever() {
        match look(IpAddr::V4(Ipv4Addr::LOCALHOST)) {
            Ok(found) => assert_eq!(found, Some(false)),
            Err(error) => eprintln!("SKIPPED: no rtnetlink here: {error}"),
        }
        assert_eq!(
            is_temporary(IpAddr::from([203, 0, 113, 77])),
            None,
            "not an address of this host"
        );
    }
}
