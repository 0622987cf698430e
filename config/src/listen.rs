//! Addresses to listen on, and to advertise.

use std::net::{IpAddr, SocketAddr};

use crate::problem::Trouble;

/// Parses `ADDR[:PORT]`; IPv6 as `[::]:3260`, `[::]` or `::`.
///
/// # Errors
/// For host names (a name may resolve to something else tomorrow) and for port 0 (nobody would know the port).
pub fn parse_listen(text: &str, default_port: u16) -> Result<SocketAddr, Trouble> {
    let bare = text
        .strip_prefix('[')
        .and_then(|t| t.strip_suffix(']'))
        .unwrap_or(text);
    let address = text
        .parse::<SocketAddr>()
        .ok()
        .or_else(|| {
            bare.parse::<IpAddr>()
                .ok()
                .map(|ip| SocketAddr::new(ip, default_port))
        })
        .ok_or_else(|| {
            Trouble::new(
                format!("{text:?} is not an IP address with a port"),
                format!("write for example \"0.0.0.0:{default_port}\" or \"[::]:{default_port}\""),
            )
        })?;
    if address.port() == 0 {
        return Err(Trouble::new(
            "port 0 is not a port that anybody could connect to",
            format!("write port {default_port}"),
        ));
    }
    Ok(address)
}

/// Parses what SendTargets shall say instead of the listening address: `HOST[:PORT]` (RFC 7143 §13.8 `TargetAddress`).
///
/// # Errors
/// When the text is neither an address nor a DNS name.
pub fn parse_advertise(text: &str, default_port: u16) -> Result<String, Trouble> {
    if let Ok(address) = parse_listen(text, default_port) {
        if address.ip().is_unspecified() {
            return Err(Trouble::new(
                format!("{text:?} means \"every address\" and cannot be connected to"),
                "write the address or name that initiators use",
            ));
        }
        return Ok(address.to_string());
    }
    let (host, port) = text
        .rsplit_once(':')
        .map_or((text, Some(default_port)), |(h, p)| {
            (h, p.parse().ok().filter(|p| *p != 0))
        });
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    match port {
        Some(port) if host.len() <= 253 && host.split('.').all(label) => Ok(format!("{host}:{port}")),
        _ => Err(Trouble::new(
            format!("{text:?} is neither an address nor a host name with a port"),
            format!("write for example \"san1.example:{default_port}\""),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_addresses() {
        for (text, shown) in [
            ("0.0.0.0:3260", "0.0.0.0:3260"),
            ("0.0.0.0", "0.0.0.0:3260"),
            ("[::]:860", "[::]:860"),
            ("[::1]", "[::1]:3260"),
            ("::1", "[::1]:3260"),
        ] {
            assert_eq!(parse_listen(text, 3260).expect(text).to_string(), shown);
        }
        for text in ["", "san1:3260", "0.0.0.0:99999", "1.2.3.4:0", "[::"] {
            assert!(parse_listen(text, 3260).is_err(), "{text}");
        }
    }

    #[test]
    fn advertised_addresses() {
        assert_eq!(
            parse_advertise("san1.example", 3260).expect("name"),
            "san1.example:3260"
        );
        assert_eq!(
            parse_advertise("san1.example:3261", 3260).expect("name"),
            "san1.example:3261"
        );
        assert_eq!(
            parse_advertise("[fd00::1]:3260", 3260).expect("v6"),
            "[fd00::1]:3260"
        );
        for text in ["0.0.0.0:3260", "a..b", "-x:1", "x:0", "x:port", "a b", ""] {
            assert!(parse_advertise(text, 3260).is_err(), "{text}");
        }
    }
}
