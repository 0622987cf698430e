//! PERSISTENT RESERVE IN (SPC-4 §6.15).

use bytes::{BufMut, Bytes, BytesMut};

use crate::{NexusName, TargetPort, cdb::Cdb, plan::Reply, relative_port_id, unit::Unit};

use super::Reservations;

const READ_KEYS: u8 = 0x00;
const READ_RESERVATION: u8 = 0x01;
const REPORT_CAPABILITIES: u8 = 0x02;

/// One of the four service actions; others do not get here, as they are in no table.
pub(crate) fn read(unit: &Unit, cdb: &Cdb) -> Reply {
    let reservations = &unit.reservations;
    let data = match cdb.service_action() {
        READ_KEYS => reservations.keys(),
        READ_RESERVATION => reservations.standing(),
        REPORT_CAPABILITIES => reservations.capabilities(),
        _ => reservations.full_status(&unit.spec.ports),
    };
    Reply::parameter_data(data, u64::from(cdb.u16(7)))
}

impl Reservations {
    /// PRGENERATION and ADDITIONAL LENGTH, then the rest.
    fn with_generation(&self, rest: BytesMut) -> Bytes {
        let mut data = BytesMut::with_capacity(8 + rest.len());
        data.put_u32(self.generation);
        data.put_u32(u32::try_from(rest.len()).unwrap_or(u32::MAX));
        data.put(rest);
        data.freeze()
    }

    fn keys(&self) -> Bytes {
        let mut keys = BytesMut::with_capacity(8 * self.registrations.len());
        for registration in &self.registrations {
            keys.put_u64(registration.key);
        }
        self.with_generation(keys)
    }

    fn standing(&self) -> Bytes {
        let mut data = BytesMut::with_capacity(16);
        if let Some(reservation) = &self.reservation {
            // The key of the holder; zero when all registrants hold it.
            data.put_u64(
                reservation
                    .holder
                    .as_ref()
                    .and_then(|holder| self.key_of(holder))
                    .unwrap_or(0),
            );
            data.put_u32(0);
            data.put_slice(&[0, reservation.kind.code(), 0, 0]);
        }
        self.with_generation(data)
    }

    fn capabilities(&self) -> Bytes {
        // CRH, SIP_C, ATP_C and PTPL_C; TMV, no word on which other commands are let through, and PTPL_A.
        let persists = u8::from(self.aptpl);
        // WR_EX_AR EX_AC_RO WR_EX_RO EX_AC WR_EX; EX_AC_AR.
        Bytes::copy_from_slice(&[0, 8, 0x10 | 0x08 | 0x04 | 0x01, 0x80 | persists, 0xea, 0x01, 0, 0])
    }

    fn full_status(&self, ports: &[TargetPort]) -> Bytes {
        let mut data = BytesMut::with_capacity(96 * self.registrations.len());
        for registration in &self.registrations {
            let held = self
                .reservation
                .as_ref()
                .filter(|_| self.holds(&registration.name));
            data.put_u64(registration.key);
            data.put_u32(0);
            // R_HOLDER, then SCOPE and TYPE of the holders only.
            data.put_slice(&[
                u8::from(held.is_some()),
                held.map_or(0, |reservation| reservation.kind.code()),
            ]);
            data.put_u32(0);
            data.put_u16(relative_port_id(ports, &registration.name.port));
            let transport_id = transport_id(&registration.name);
            data.put_u32(u32::try_from(transport_id.len()).unwrap_or(u32::MAX));
            data.put(transport_id);
        }
        self.with_generation(data)
    }
}

/// TransportID of an iSCSI initiator port (SPC-4 §7.6.4.6): format 01b, `name,i,0x` and the ISID in
/// hexadecimal, null-terminated and padded to a multiple of four, at least twenty bytes.
fn transport_id(name: &NexusName) -> Bytes {
    let [a, b, c, d, e, f] = name.isid;
    let mut text = format!(
        "{},i,0x{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}{f:02x}",
        name.initiator
    )
    .into_bytes();
    text.resize((text.len() + 1).next_multiple_of(4).max(20), 0);
    let mut data = BytesMut::with_capacity(4 + text.len());
    data.put_slice(&[0x45, 0]);
    data.put_u16(u16::try_from(text.len()).unwrap_or(u16::MAX));
    data.put_slice(&text);
    data.freeze()
}
