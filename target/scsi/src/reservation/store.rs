//! Persistent reservations as bytes, for APTPL.
//!
//! ```text
//! "SPPR" version:u8 = 1  sequence:u64  kind:u8 (0 = no reservation)  holder:u16 (0xffff = all registrants)
//! count:u16  count x { key:u64  isid:[u8; 6]  portal group:u16  initiator  target }
//! CRC32C of everything before: u32
//! ```
//!
//! Texts are a 16-bit length and bytes; all numbers are big-endian. The sequence is the one of
//! [`crate::ReservationChange`]: a unit that is taken away and comes back counts on from there, or the owner would
//! take its first changes for old ones.

use bytes::{BufMut, Bytes, BytesMut};

use crate::{NexusName, TargetPort};

use super::{Kind, MAX_REGISTRATIONS, Registration, Reservation, Reservations};

const MAGIC: [u8; 4] = *b"SPPR";
const VERSION: u8 = 1;
const ALL_REGISTRANTS: u16 = u16::MAX;

/// Why a saved state is not taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Cut off, altered, or not a state of reservations.
    #[error("the saved reservations are damaged")]
    Damaged,
    /// Written by a later version.
    #[error("the saved reservations have format {found}, and this program knows up to {VERSION}")]
    Version {
        /// The version found.
        found: u8,
    },
}

/// An APTPL of zero saves the absence of everything: after a power loss nothing is registered.
pub(super) fn encode(reservations: &Reservations) -> Bytes {
    let (registrations, reservation) = if reservations.aptpl {
        (
            reservations.registrations.as_slice(),
            reservations.reservation.as_ref(),
        )
    } else {
        (&[] as &[Registration], None)
    };
    let mut data = BytesMut::with_capacity(16 + 96 * registrations.len());
    data.put_slice(&MAGIC);
    data.put_u8(VERSION);
    data.put_u64(reservations.sequence);
    data.put_u8(reservation.map_or(0, |r| r.kind.code()));
    let holder = reservation.and_then(|r| r.holder.as_ref());
    let position = holder.and_then(|holder| registrations.iter().position(|r| r.name == *holder));
    data.put_u16(
        position
            .and_then(|at| u16::try_from(at).ok())
            .unwrap_or(ALL_REGISTRANTS),
    );
    data.put_u16(u16::try_from(registrations.len()).unwrap_or(u16::MAX));
    for Registration { name, key } in registrations {
        data.put_u64(*key);
        data.put_slice(&name.isid);
        data.put_u16(name.port.portal_group);
        put_text(&mut data, &name.initiator);
        put_text(&mut data, &name.port.target);
    }
    data.put_u32(crc32c::crc32c(&data));
    data.freeze()
}

/// iSCSI names have at most 223 bytes.
fn put_text(data: &mut BytesMut, text: &str) {
    data.put_u16(u16::try_from(text.len()).unwrap_or(u16::MAX));
    data.put_slice(
        text.as_bytes()
            .get(..usize::from(u16::MAX))
            .unwrap_or(text.as_bytes()),
    );
}

/// Reads fields off the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], RestoreError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(RestoreError::Damaged)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u16(&mut self) -> Result<u16, RestoreError> {
        self.take().map(u16::from_be_bytes)
    }

    fn text(&mut self) -> Result<String, RestoreError> {
        let len = usize::from(self.u16()?);
        let (text, rest): (&'a [u8], _) = self.0.split_at_checked(len).ok_or(RestoreError::Damaged)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).map_err(|_| RestoreError::Damaged)
    }

    fn registration(&mut self) -> Result<Registration, RestoreError> {
        let key = u64::from_be_bytes(self.take()?);
        let isid = self.take()?;
        let portal_group = self.u16()?;
        let initiator = self.text()?;
        let port = TargetPort {
            target: self.text()?,
            portal_group,
        };
        Ok(Registration {
            name: NexusName {
                initiator,
                isid,
                port,
            },
            key,
        })
    }
}

/// # Errors
/// [`RestoreError`]; the checksum is looked at before anything but magic and version.
pub(super) fn decode(state: &[u8]) -> Result<Reservations, RestoreError> {
    let (body, crc) = state.split_last_chunk::<4>().ok_or(RestoreError::Damaged)?;
    let mut fields = Fields(body);
    if fields.take::<4>()? != MAGIC {
        return Err(RestoreError::Damaged);
    }
    let [version] = fields.take()?;
    if version != VERSION {
        return Err(RestoreError::Version { found: version });
    }
    if crc32c::crc32c(body) != u32::from_be_bytes(*crc) {
        return Err(RestoreError::Damaged);
    }
    let sequence = u64::from_be_bytes(fields.take()?);
    let [kind] = fields.take()?;
    let holder = fields.u16()?;
    let count = usize::from(fields.u16()?);
    if count > MAX_REGISTRATIONS {
        return Err(RestoreError::Damaged);
    }
    let registrations = (0..count)
        .map(|_| fields.registration())
        .collect::<Result<Vec<_>, _>>()?;
    if !fields.0.is_empty() {
        return Err(RestoreError::Damaged);
    }
    let reservation = reservation(kind, holder, &registrations)?;
    let aptpl = !registrations.is_empty();
    Ok(Reservations {
        registrations,
        reservation,
        aptpl,
        sequence,
        ..Reservations::default()
    })
}

fn reservation(
    kind: u8,
    holder: u16,
    registrations: &[Registration],
) -> Result<Option<Reservation>, RestoreError> {
    if kind == 0 {
        return Ok(None);
    }
    let kind = Kind::from_code(kind).ok_or(RestoreError::Damaged)?;
    let holder = registrations
        .get(usize::from(holder))
        .map(|registration| registration.name.clone());
    if holder.is_some() == kind.all_registrants() || registrations.is_empty() {
        return Err(RestoreError::Damaged);
    }
    Ok(Some(Reservation { kind, holder }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: u8) -> NexusName {
        let port = TargetPort {
            target: "iqn.2026-11.com.example:t".into(),
            portal_group: 1,
        };
        NexusName {
            initiator: format!("iqn.2026-11.com.example:i{n}"),
            isid: [n; 6],
            port,
        }
    }

    fn state(kind: Option<Kind>) -> Reservations {
        let registrations = (0..3)
            .map(|n| Registration {
                name: name(n),
                key: u64::from(n) + 7,
            })
            .collect();
        let reservation = kind.map(|kind| Reservation {
            kind,
            holder: (!kind.all_registrants()).then(|| name(1)),
        });
        Reservations {
            registrations,
            reservation,
            generation: 9,
            aptpl: true,
            sequence: 17,
            ..Reservations::default()
        }
    }

    #[test]
    fn round_trip_of_every_type_without_the_generation() {
        for code in [0, 1, 3, 5, 6, 7, 8] {
            let before = state(Kind::from_code(code));
            let after = decode(&encode(&before)).unwrap();
            assert_eq!(after.registrations, before.registrations);
            assert_eq!(after.reservation, before.reservation);
            assert_eq!((after.generation, after.aptpl, after.sequence), (0, true, 17));
        }
    }

    #[test]
    fn without_aptpl_nothing_is_kept() {
        let mut reservations = state(Some(Kind::ExclusiveAccess));
        reservations.aptpl = false;
        let after = decode(&encode(&reservations)).unwrap();
        assert!(after.registrations.is_empty() && after.reservation.is_none() && !after.aptpl);
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let whole = encode(&state(Some(Kind::WriteExclusive)));
        for at in 0..whole.len() {
            assert_eq!(
                decode(&whole[..at]).err(),
                Some(RestoreError::Damaged),
                "cut at {at}"
            );
            let mut altered = whole.to_vec();
            altered[at] ^= 0x40;
            assert!(decode(&altered).is_err(), "altered at {at}");
        }
        let mut later = whole.to_vec();
        later[4] = 2;
        assert_eq!(decode(&later).err(), Some(RestoreError::Version { found: 2 }));
    }
}
