//! INQUIRY and the vital product data pages.

use anyhow::{Result, ensure};

use super::disk::{Disk, INVALID_FIELD, byte, bytes, ensure_ascii, u16_at, vpd};
use super::{Check, check};

/// Words with a claim to a standard: version descriptors.
const DESCRIPTORS: (usize, usize) = (58, 16);

pub(super) const CHECKS: &[Check] = &[
    check("INQUIRY: 36 to 255 bytes", |disk| {
        let data = standard(disk)?;
        ensure!((36..=255).contains(&data.len()), "{} bytes", data.len());
        Ok(())
    }),
    check("INQUIRY: EVPD 0 with a page code is refused", |disk| {
        disk.refused(&[0x12, 0, 0x80, 0, 255, 0], 255, INVALID_FIELD)
    }),
    check("INQUIRY: a page that is not in the list is refused", |disk| {
        disk.refused(&vpd(0xfe, 255), 255, INVALID_FIELD)
    }),
    check("INQUIRY: peripheral qualifier 0, type 0, not removable", |disk| {
        let data = standard(disk)?;
        ensure!(
            byte(&data, 0)? == 0 && byte(&data, 1)? & 0x80 == 0,
            "{:02x?}",
            bytes(&data, 0, 2)?
        );
        Ok(())
    }),
    check("INQUIRY: version 4, 5 or 6", |disk| {
        let version = byte(&standard(disk)?, 2)?;
        ensure!((4..=6).contains(&version), "version {version}");
        Ok(())
    }),
    check("INQUIRY: response data format 2", |disk| {
        let format = byte(&standard(disk)?, 3)? & 0x0f;
        ensure!(format == 2, "format {format}");
        Ok(())
    }),
    check("INQUIRY: HiSup", |disk| {
        ensure!(
            byte(&standard(disk)?, 3)? & 0x10 != 0,
            "HiSup is 0: LUNs above 8 are not found"
        );
        Ok(())
    }),
    check("INQUIRY: additional length is the rest", |disk| {
        let data = standard(disk)?;
        ensure!(
            usize::from(byte(&data, 4)?) + 5 == data.len(),
            "{} in {} bytes",
            byte(&data, 4)?,
            data.len()
        );
        Ok(())
    }),
    check("INQUIRY: truncation keeps the additional length", |disk| {
        let whole = standard(disk)?;
        let short = disk.data(&[0x12, 0, 0, 0, 5, 0], 5)?;
        ensure!(
            short.len() == 5 && byte(&short, 4)? == byte(&whole, 4)?,
            "{short:02x?}"
        );
        Ok(())
    }),
    check("INQUIRY: vendor identification is ASCII", |disk| {
        ensure_ascii("the vendor", bytes(&standard(disk)?, 8, 8)?)
    }),
    check("INQUIRY: product identification is ASCII", |disk| {
        ensure_ascii("the product", bytes(&standard(disk)?, 16, 16)?)
    }),
    check("INQUIRY: product revision is ASCII", |disk| {
        ensure_ascii("the revision", bytes(&standard(disk)?, 32, 4)?)
    }),
    check("INQUIRY: version descriptors", |disk| {
        let data = standard(disk)?;
        let (at, len) = DESCRIPTORS;
        ensure!(
            bytes(&data, at, len)?.iter().any(|b| *b != 0),
            "none of eight is there"
        );
        Ok(())
    }),
    check("INQUIRY: tagged commands", |disk| {
        ensure!(byte(&standard(disk)?, 7)? & 0x02 != 0, "CMDQUE is 0");
        Ok(())
    }),
    check("INQUIRY with allocation 0 ends GOOD", |disk| {
        disk.good(&[0x12, 0, 0, 0, 0, 0])
    }),
    check("VPD: every page of the list is readable", |disk| {
        let list = disk.page(0)?;
        for page in list.get(4..).unwrap_or_default() {
            disk.page(*page)?;
        }
        Ok(())
    }),
    check("VPD: a page's head says the length of the whole page", |disk| {
        let list = disk.page(0)?;
        for page in list.get(4..).unwrap_or_default() {
            let (head, whole) = (disk.data(&vpd(*page, 4), 4)?, disk.page(*page)?);
            ensure!(
                bytes(&whole, 0, 4)? == head,
                "page {page:02x}: {head:02x?} is not the head of {whole:02x?}"
            );
        }
        Ok(())
    }),
    check("VPD 80h: the serial number is ASCII", |disk| {
        let page = disk.page(0x80)?;
        ensure_ascii("the serial number", page.get(4..).unwrap_or_default())
    }),
    check("VPD 83h: designators are well formed", |disk| {
        let page = disk.page(0x83)?;
        for designator in designators(&page)? {
            ensure!(
                matches!(designator.code_set, 1..=3) && !designator.bytes.is_empty(),
                "{designator:02x?}"
            );
            if matches!(designator.code_set, 2 | 3) {
                let text = String::from_utf8_lossy(designator.bytes);
                ensure!(
                    !text.trim_end_matches('\0').is_empty(),
                    "an empty name: {designator:02x?}"
                );
            }
        }
        Ok(())
    }),
    check("VPD 83h: one that names the disk, of type 2, 3 or 8", |disk| {
        let page = disk.page(0x83)?;
        let list = designators(&page)?;
        ensure!(
            list.iter()
                .any(|d| d.association == 0 && matches!(d.kind, 2 | 3 | 8)),
            "{list:02x?}"
        );
        Ok(())
    }),
    check("VPD 83h: a NAA identifier has the length of its kind", |disk| {
        let page = disk.page(0x83)?;
        for d in designators(&page)?.into_iter().filter(|d| d.kind == 3) {
            let wanted = match byte(d.bytes, 0)? >> 4 {
                6 => 16,
                _ => 8,
            };
            ensure!(
                d.code_set == 1 && d.bytes.len() == wanted,
                "{d:02x?} should have {wanted} bytes"
            );
        }
        Ok(())
    }),
    check("VPD B1h: the rotation rate is a known one", |disk| {
        let page = disk.page(0xb1)?;
        let rate = u16_at(&page, 4)?;
        ensure!(matches!(rate, 0 | 1 | 0x0401..=0xfffe), "rate {rate}");
        Ok(())
    }),
];

fn standard(disk: &mut Disk) -> Result<Vec<u8>> {
    disk.data(&[0x12, 0, 0, 0, 255, 0], 255)
}

/// One designation descriptor (SPC-4 §7.8.6).
#[derive(Debug)]
pub(super) struct Designator<'a> {
    code_set: u8,
    pub(super) association: u8,
    pub(super) kind: u8,
    pub(super) bytes: &'a [u8],
}

/// The descriptors of page 83h.
pub(super) fn designators(page: &[u8]) -> Result<Vec<Designator<'_>>> {
    let mut list = Vec::new();
    let mut at = 4;
    while at < page.len() {
        let len = usize::from(byte(page, at + 3)?);
        list.push(Designator {
            code_set: byte(page, at)? & 0x0f,
            association: byte(page, at + 1)? >> 4 & 0x03,
            kind: byte(page, at + 1)? & 0x0f,
            bytes: bytes(page, at + 4, len)?,
        });
        at += 4 + len;
    }
    ensure!(!list.is_empty(), "no designator at all");
    Ok(list)
}
