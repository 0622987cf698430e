//! INQUIRY (SPC-4 §6.6) and the vital product data pages (SPC-4 §7.8, SBC-3 §6.6).

use bytes::{BufMut, Bytes, BytesMut};

use crate::{TargetPort, cdb::Cdb, copy::limits, plan::Reply, sense::Sense, unit::Unit};

/// T10 VENDOR IDENTIFICATION of every unit.
pub const VENDOR: [u8; 8] = *b"STILLPNT";
/// PRODUCT IDENTIFICATION of every unit: ESXi copies only between units with the same one.
pub const PRODUCT: [u8; 16] = *b"VIRTUAL DISK    ";

/// SPC-4.
const VERSION: u8 = 0x06;
/// HISUP (Windows finds LUNs above 8 only with it) and RESPONSE DATA FORMAT 2.
const FORMAT: u8 = 0x12;
/// Claimed standards: SAM-5, iSCSI, SPC-4, SBC-3 (SPC-4 annex E.2: architecture, transport, primary, device
/// type).
const VERSION_DESCRIPTORS: [u16; 4] = [0x00a0, 0x0960, 0x0460, 0x04c0];

const SUPPORTED_PAGES: u8 = 0x00;
const UNIT_SERIAL_NUMBER: u8 = 0x80;
const DEVICE_IDENTIFICATION: u8 = 0x83;
const EXTENDED_INQUIRY: u8 = 0x86;
const MODE_PAGE_POLICY: u8 = 0x87;
const THIRD_PARTY_COPY: u8 = 0x8f;
const BLOCK_LIMITS: u8 = 0xb0;
const BLOCK_CHARACTERISTICS: u8 = 0xb1;
const LOGICAL_BLOCK_PROVISIONING: u8 = 0xb2;

/// Every page of VPD page 00h; each one is readable, and they ascend.
const PAGES: [u8; 9] = [
    SUPPORTED_PAGES,
    UNIT_SERIAL_NUMBER,
    DEVICE_IDENTIFICATION,
    EXTENDED_INQUIRY,
    MODE_PAGE_POLICY,
    THIRD_PARTY_COPY,
    BLOCK_LIMITS,
    BLOCK_CHARACTERISTICS,
    LOGICAL_BLOCK_PROVISIONING,
];

/// INQUIRY. `port` is the target port through which it came.
///
/// # Errors
/// INVALID FIELD IN CDB: a page code without EVPD, the obsolete CMDDT bit, or a page that is not in the list.
pub(crate) fn inquiry(unit: &Unit, port: &TargetPort, cdb: &Cdb) -> Result<Reply, Sense> {
    let allocation = u64::from(cdb.u16(3));
    if cdb.bit(1, 0x02) {
        return Err(Sense::invalid_cdb(1));
    }
    let page = cdb.byte(2);
    if !cdb.bit(1, 0x01) {
        if page != 0 {
            return Err(Sense::invalid_cdb(2));
        }
        return Ok(Reply::parameter_data(standard(unit), allocation));
    }
    let body = match page {
        SUPPORTED_PAGES => Bytes::from_static(&PAGES),
        UNIT_SERIAL_NUMBER => Bytes::copy_from_slice(unit.spec.serial.as_bytes()),
        DEVICE_IDENTIFICATION => device_identification(unit, port),
        EXTENDED_INQUIRY => extended_inquiry(),
        // All pages and subpages are shared by all I_T nexuses.
        MODE_PAGE_POLICY => Bytes::from_static(&[0x3f, 0xff, 0, 0]),
        THIRD_PARTY_COPY => limits::page(unit),
        BLOCK_LIMITS => block_limits(unit),
        BLOCK_CHARACTERISTICS => block_characteristics(),
        LOGICAL_BLOCK_PROVISIONING => provisioning(unit),
        _ => return Err(Sense::invalid_cdb(2)),
    };
    let mut data = BytesMut::with_capacity(4 + body.len());
    data.put_slice(&[0x00, page]);
    data.put_u16(u16::try_from(body.len()).unwrap_or(u16::MAX));
    data.put(body);
    Ok(Reply::parameter_data(data.freeze(), allocation))
}

fn standard(unit: &Unit) -> Bytes {
    let mut data = [0_u8; 96];
    data[2] = VERSION;
    data[3] = FORMAT;
    data[4] = 96 - 5;
    // TPGS: implicit asymmetric access, which is one group that is always active; 3PC.
    data[5] = 0x10 | 0x08;
    // MULTIP.
    data[6] = if unit.spec.ports.len() > 1 { 0x10 } else { 0 };
    // CMDQUE.
    data[7] = 0x02;
    data[8..16].copy_from_slice(&VENDOR);
    data[16..32].copy_from_slice(&PRODUCT);
    data[32..36].copy_from_slice(&unit.spec.revision);
    for (to, from) in data[58..66].chunks_exact_mut(2).zip(VERSION_DESCRIPTORS) {
        to.copy_from_slice(&from.to_be_bytes());
    }
    Bytes::copy_from_slice(&data)
}

/// Standard data of a LUN without a logical unit: peripheral qualifier 011b, type 1Fh.
pub(crate) fn absent() -> Bytes {
    let mut data = [0_u8; 36];
    data[0] = 0x7f;
    data[2] = VERSION;
    data[3] = FORMAT;
    data[4] = 36 - 5;
    data[7] = 0x02;
    data[8..16].copy_from_slice(&VENDOR);
    data[16..32].copy_from_slice(&PRODUCT);
    Bytes::copy_from_slice(&data)
}

/// One designation descriptor: `association` 0 logical unit, 1 target port; binary unless `text` says ASCII
/// or UTF-8.
fn designator(data: &mut BytesMut, code_set: u8, association: u8, kind: u8, bytes: &[u8]) {
    // PROTOCOL IDENTIFIER (iSCSI) with PIV for what belongs to the port.
    let (protocol, piv) = if association == 0 {
        (0x00, 0x00)
    } else {
        (0x50, 0x80)
    };
    data.put_slice(&[protocol | code_set, piv | (association << 4) | kind, 0]);
    data.put_u8(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
    data.put_slice(bytes);
}

const BINARY: u8 = 1;
const ASCII: u8 = 2;
const UTF8: u8 = 3;

fn device_identification(unit: &Unit, port: &TargetPort) -> Bytes {
    let mut data = BytesMut::with_capacity(160);
    designator(&mut data, BINARY, 0, 0x3, &unit.spec.naa);
    let mut t10 = Vec::with_capacity(24 + unit.spec.serial.len());
    t10.extend_from_slice(&VENDOR);
    t10.extend_from_slice(&PRODUCT);
    t10.extend_from_slice(unit.spec.serial.as_bytes());
    designator(&mut data, ASCII, 0, 0x1, &t10);
    let [high, low] = crate::relative_port_id(&unit.spec.ports, port).to_be_bytes();
    designator(&mut data, BINARY, 1, 0x4, &[0, 0, high, low]);
    designator(
        &mut data,
        BINARY,
        1,
        0x5,
        &[0, 0, 0, crate::report::TARGET_PORT_GROUP],
    );
    // A SCSI name string is null-terminated and padded with nulls to a multiple of four (SPC-4 §7.8.6.11).
    let mut name = port.name().into_bytes();
    name.resize((name.len() + 1).next_multiple_of(4), 0);
    designator(&mut data, UTF8, 1, 0x8, &name);
    data.freeze()
}

fn extended_inquiry() -> Bytes {
    let mut body = [0_u8; 60];
    // HEADSUP, ORDSUP, SIMPSUP.
    body[1] = 0x07;
    // V_SUP: WCE is what a volatile cache it is.
    body[2] = 0x01;
    Bytes::copy_from_slice(&body)
}

fn block_limits(unit: &Unit) -> Bytes {
    let limits = &unit.spec.limits;
    let blocks = |bytes: u64| bytes / u64::from(unit.block_size());
    let grain = unit.spec.grain / unit.block_size();
    let mut body = BytesMut::with_capacity(60);
    // WSNZ: a WRITE SAME without a length does not fill the unit.
    body.put_u8(0x01);
    body.put_u8(limits.max_compare_and_write_blocks);
    body.put_u16(u16::try_from(grain).unwrap_or(u16::MAX));
    body.put_u32(u32::try_from(blocks(u64::from(limits.max_transfer_bytes))).unwrap_or(u32::MAX));
    // No optimal transfer length and no maximum for PRE-FETCH.
    body.put_u64(0);
    body.put_u32(limits.max_unmap_blocks);
    body.put_u32(limits.max_unmap_descriptors);
    body.put_u32(grain);
    // UGAVALID: granules start at LBA 0.
    body.put_u32(0x8000_0000);
    body.put_u64(blocks(limits.max_write_same_bytes));
    body.put_bytes(0, 60 - 40);
    body.freeze()
}

fn block_characteristics() -> Bytes {
    let mut body = [0_u8; 60];
    // MEDIUM ROTATION RATE 1: nothing rotates.
    body[1] = 0x01;
    Bytes::copy_from_slice(&body)
}

fn provisioning(unit: &Unit) -> Bytes {
    // LBPU, LBPWS, LBPWS10, LBPRZ 001b; no anchors, no provisioning group. Type 2: thin.
    Bytes::copy_from_slice(&[unit.threshold_exponent(), 0x80 | 0x40 | 0x20 | 0x04, 0x02, 0x00])
}
