//! The parameter lists of PERSISTENT RESERVE OUT (SPC-4 §6.16.3, §6.16.4) and the TransportIDs in them (§7.6.4.6).

use crate::{NexusName, TargetPort, cdb::Cdb, relative_port_id, sense::Sense};

use super::{
    Kind,
    change::{REGISTER, REGISTER_AND_MOVE, Refusal},
};

/// iSCSI names have at most 223 bytes (RFC 7143 §4.2.7).
const MAX_NAME: usize = 223;

/// The parameter list and what the CDB says of the reservation.
#[derive(Debug)]
pub(super) struct Parameters {
    /// RESERVATION KEY: who the sender says it is.
    pub(super) key: u64,
    /// SERVICE ACTION RESERVATION KEY: the new key, or the one to preempt.
    pub(super) action_key: u64,
    pub(super) aptpl: bool,
    /// ALL_TG_PT: the registration is meant for all target ports.
    pub(super) all_ports: bool,
    /// SPEC_I_PT: initiator ports to register beside the sender.
    pub(super) others: Option<Vec<TransportId>>,
    /// REGISTER AND MOVE: where to.
    pub(super) destination: Option<Destination>,
    /// Of the CDB: SCOPE zero (logical unit) and a known TYPE.
    pub(super) kind: Option<Kind>,
    /// Length of the list in bytes.
    pub(super) len: u64,
}

/// Where REGISTER AND MOVE moves the reservation.
#[derive(Debug)]
pub(super) struct Destination {
    /// UNREG: the sender's registration goes.
    pub(super) unregister: bool,
    /// RELATIVE TARGET PORT IDENTIFIER.
    pub(super) port: u16,
    pub(super) initiator: TransportId,
}

/// An iSCSI initiator, or one port of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TransportId {
    pub(super) initiator: String,
    /// `None`: the whole initiator device (format 00b).
    pub(super) isid: Option<[u8; 6]>,
}

fn u16_at(list: &[u8], at: usize) -> Result<u16, Sense> {
    let field = list.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().map(u16::from_be_bytes).ok_or(Sense::LIST_LENGTH)
}

fn u32_at(list: &[u8], at: usize) -> Result<u32, Sense> {
    let field = list.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().map(u32::from_be_bytes).ok_or(Sense::LIST_LENGTH)
}

fn u64_at(list: &[u8], at: usize) -> Result<u64, Sense> {
    let field = list.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().map(u64::from_be_bytes).ok_or(Sense::LIST_LENGTH)
}

fn byte_at(list: &[u8], at: usize) -> Result<u8, Sense> {
    list.get(at).copied().ok_or(Sense::LIST_LENGTH)
}

impl Parameters {
    /// Length of the basic parameter list: without SPEC_I_PT and but for REGISTER AND MOVE the only one.
    const BASIC_LEN: usize = 24;

    /// # Errors
    /// PARAMETER LIST LENGTH ERROR when the list does not have exactly the length that its fields and the CDB say, or did
    /// not come whole; INVALID FIELD IN PARAMETER LIST for a TransportID that is none, and for SPEC_I_PT in any other
    /// service action than REGISTER.
    pub(super) fn parse(cdb: &Cdb, data_out: &[u8]) -> Result<Self, Sense> {
        let len = usize::try_from(cdb.u32(5)).map_err(|_| Sense::LIST_LENGTH)?;
        let list = data_out.get(..len).ok_or(Sense::LIST_LENGTH)?;
        let moves = cdb.service_action() == REGISTER_AND_MOVE;
        let flags = byte_at(list, if moves { 17 } else { 20 })?;
        let specifies = !moves && flags & 0x08 != 0;
        if specifies && cdb.service_action() != REGISTER {
            return Err(Sense::invalid_list(20));
        }
        if !moves && !specifies && len != Self::BASIC_LEN {
            return Err(Sense::LIST_LENGTH);
        }
        Ok(Self {
            key: u64_at(list, 0)?,
            action_key: u64_at(list, 8)?,
            aptpl: flags & 0x01 != 0,
            all_ports: !moves && flags & 0x04 != 0,
            others: specifies.then(|| Self::others(list)).transpose()?,
            destination: moves.then(|| Destination::parse(list, flags)).transpose()?,
            kind: if cdb.byte(2) >> 4 == 0 {
                Kind::from_code(cdb.byte(2) & 0x0f)
            } else {
                None
            },
            len: u64::from(cdb.u32(5)),
        })
    }

    /// The additional parameter data of SPEC_I_PT: a length, then TransportIDs.
    fn others(list: &[u8]) -> Result<Vec<TransportId>, Sense> {
        let len = u32_at(list, 24)?;
        let mut ids = list.get(28..).ok_or(Sense::LIST_LENGTH)?;
        if usize::try_from(len) != Ok(ids.len()) {
            return Err(Sense::LIST_LENGTH);
        }
        let mut others = Vec::new();
        while !ids.is_empty() {
            let at = list.len() - ids.len();
            let (id, rest) = TransportId::split(ids, at)?;
            others.push(id);
            ids = rest;
        }
        Ok(others)
    }

    pub(super) fn kind(&self) -> Result<Kind, Refusal> {
        self.kind.ok_or(Refusal::Check(Sense::invalid_cdb(2)))
    }
}

impl Destination {
    fn parse(list: &[u8], flags: u8) -> Result<Self, Sense> {
        let id = list.get(24..).ok_or(Sense::LIST_LENGTH)?;
        if usize::try_from(u32_at(list, 20)?) != Ok(id.len()) {
            return Err(Sense::LIST_LENGTH);
        }
        let (initiator, rest) = TransportId::split(id, 24)?;
        if !rest.is_empty() {
            return Err(Sense::LIST_LENGTH);
        }
        Ok(Self {
            unregister: flags & 0x02 != 0,
            port: u16_at(list, 18)?,
            initiator,
        })
    }

    /// The I_T nexus that it names. The sender's own target comes first, should an identifier be ambiguous.
    ///
    /// # Errors
    /// INVALID FIELD IN PARAMETER LIST when there is no such port here, or no single initiator port is named.
    pub(super) fn nexus(&self, sender: &NexusName, ports: &[TargetPort]) -> Result<NexusName, Refusal> {
        let port = ports
            .iter()
            .chain([&sender.port])
            .find(|port| relative_port_id(ports, port) == self.port)
            .ok_or(Refusal::Check(Sense::invalid_list(18)))?;
        let isid = self
            .initiator
            .isid
            .ok_or(Refusal::Check(Sense::invalid_list(24)))?;
        Ok(NexusName {
            initiator: self.initiator.initiator.clone(),
            isid,
            port: port.clone(),
        })
    }
}

impl TransportId {
    /// Takes one TransportID off the front; `at` is where it starts in the whole list.
    fn split(ids: &[u8], at: usize) -> Result<(Self, &[u8]), Sense> {
        let invalid = Sense::invalid_list(u16::try_from(at).unwrap_or(u16::MAX));
        let len = usize::from(u16_at(ids, 2)?);
        let (id, rest) = ids.split_at_checked(4 + len).ok_or(Sense::LIST_LENGTH)?;
        let first = byte_at(id, 0)?;
        // PROTOCOL IDENTIFIER 5h; the length is a multiple of four and at least twenty.
        if first & 0x0f != 0x05 || len < 20 || len % 4 != 0 {
            return Err(invalid);
        }
        let text = id.get(4..).unwrap_or_default();
        let parsed = match first >> 6 {
            0 => Self::device(text),
            1 => Self::port(text),
            _ => None,
        };
        Ok((parsed.ok_or(invalid)?, rest))
    }

    /// The text before the null bytes, which end it and pad it.
    fn text(bytes: &[u8]) -> Option<&str> {
        let end = bytes.iter().position(|byte| *byte == 0)?;
        let (text, padding) = bytes.split_at_checked(end)?;
        if padding.iter().any(|byte| *byte != 0) {
            return None;
        }
        core::str::from_utf8(text).ok()
    }

    /// As the daemon spells names: in lower case (RFC 3722).
    fn name(text: &str) -> Option<String> {
        let plain = |c: char| !c.is_control() && !c.is_whitespace() && c != ',';
        (!text.is_empty() && text.len() <= MAX_NAME && text.chars().all(plain)).then(|| text.to_lowercase())
    }

    fn device(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            initiator: Self::name(Self::text(bytes)?)?,
            isid: None,
        })
    }

    /// `name,i,0x` and twelve hexadecimal digits.
    fn port(bytes: &[u8]) -> Option<Self> {
        let (name, digits) = Self::text(bytes)?.split_once(",i,0x")?;
        if digits.len() != 12 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        let isid = u64::from_str_radix(digits, 16).ok()?;
        let [_, _, isid @ ..] = isid.to_be_bytes();
        Some(Self {
            initiator: Self::name(name)?,
            isid: Some(isid),
        })
    }
}
