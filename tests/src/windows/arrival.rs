//! The commands with which Windows greets a disk, and those that ask whether it is there.

use anyhow::{Result, ensure};

use super::disk::{Disk, INVALID_FIELD, Size, byte, bytes, read_capacity_16, u16_at, u32_at, u64_at, vpd};
use super::{Check, check};
use crate::raw::Cdb;

const REPORT_LUNS: u8 = 0xa0;

pub(super) const CHECKS: &[Check] = &[
    check("arrival: INQUIRY of 36 bytes", |disk| {
        let data = disk.data(&[0x12, 0, 0, 0, 36, 0], 36)?;
        ensure!(data.len() == 36, "{} bytes", data.len());
        Ok(())
    }),
    check("arrival: VPD page 00h with allocation 255", |disk| {
        let data = disk.data(&vpd(0x00, 255), 255)?;
        let pages = data.get(4..).unwrap_or_default();
        ensure!(
            pages.contains(&0x80) && pages.contains(&0x83),
            "pages {pages:02x?}"
        );
        ensure!(pages.is_sorted(), "pages out of order: {pages:02x?}");
        Ok(())
    }),
    check("arrival: VPD page 80h with allocation 255", |disk| {
        let data = disk.data(&vpd(0x80, 255), 255)?;
        ensure!(
            data.len() > 4 && byte(&data, 1)? == 0x80,
            "no serial number: {data:02x?}"
        );
        Ok(())
    }),
    check("arrival: VPD page 83h with allocation 255", |disk| {
        let data = disk.data(&vpd(0x83, 255), 255)?;
        ensure!(
            data.len() > 4 && byte(&data, 1)? == 0x83,
            "no designators: {data:02x?}"
        );
        Ok(())
    }),
    check("arrival: VPD page B0h twice, the same", |disk| {
        ensure!(disk.page(0xb0)? == disk.page(0xb0)?, "it changes");
        Ok(())
    }),
    check("arrival: READ CAPACITY(10)", |disk| {
        let data = disk.data(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8)?;
        let last = u32::try_from(disk.blocks - 1).unwrap_or(u32::MAX);
        ensure!(
            (u32_at(&data, 0)?, u32_at(&data, 4)?) == (last, disk.block),
            "{data:02x?}, and READ CAPACITY(16) says {} blocks of {}",
            disk.blocks,
            disk.block
        );
        Ok(())
    }),
    check("arrival: READ CAPACITY(16) of 12 bytes is 12 bytes", |disk| {
        let data = disk.data(&read_capacity_16(12), 12)?;
        ensure!(
            data.len() == 12 && u64_at(&data, 0)? + 1 == disk.blocks,
            "{data:02x?}"
        );
        Ok(())
    }),
    check("arrival: MODE SENSE(6) of page 08h", |disk| {
        let data = disk.data(&[0x1a, 0, 0x08, 0, 192, 0], 192)?;
        ensure!(data.len() > 4, "{data:02x?}");
        Ok(())
    }),
    check("arrival: the disk is not write protected", |disk| {
        let data = disk.data(&[0x1a, 0, 0x3f, 0, 192, 0], 192)?;
        ensure!(
            byte(&data, 2)? & 0x80 == 0,
            "WP is set: Windows makes it read-only"
        );
        Ok(())
    }),
    check(
        "arrival: REPORT LUNS with room for 8 bytes more than the header",
        |disk| {
            let whole = report_luns(disk, 0, 1024)?;
            let short = report_luns(disk, 0, 16)?;
            ensure!(short.len() <= 16, "{} bytes of 16", short.len());
            ensure!(
                u32_at(&short, 0)? == u32_at(&whole, 0)?,
                "truncation changed the list's length"
            );
            Ok(())
        },
    ),
    check(
        "arrival: REPORT LUNS has the LUN, single level, at most 255",
        |disk| {
            let data = report_luns(disk, 0, 1024)?;
            let list = data.get(8..).unwrap_or_default();
            ensure!(u32_at(&data, 0)? as usize == list.len(), "length: {data:02x?}");
            let luns: Vec<&[u8]> = list.chunks(8).collect();
            ensure!(luns.len() <= 255, "{} LUNs", luns.len());
            for lun in &luns {
                ensure!(
                    bytes(lun, 2, 6)? == [0; 6] && byte(lun, 0)? >> 6 < 2,
                    "not single level: {lun:02x?}"
                );
            }
            let own = [0, disk.place.lun, 0, 0, 0, 0, 0, 0];
            ensure!(luns.contains(&own.as_slice()), "the LUN is missing: {data:02x?}");
            Ok(())
        },
    ),
    check("arrival: LUN 0 answers INQUIRY", |disk| {
        let reply = disk.raw.run(&Cdb::reads(0, &[0x12, 0, 0, 0, 36, 0], 36))?;
        ensure!(reply.status == 0 && reply.data.len() == 36, "{reply:?}");
        Ok(())
    }),
    check("arrival: 1 MiB as four READ(10) of 256 KiB in flight", |disk| {
        let blocks = 262_144 / disk.block;
        let mut tags = Vec::new();
        for i in 0..4 {
            let cdb = super::disk::transfer(0x28, Size::Ten, 0, u64::from(i * blocks), blocks)?;
            let command = Cdb::reads(disk.place.lun, &cdb, 262_144);
            tags.push(disk.raw.start(&command, &[])?);
        }
        for tag in tags {
            let reply = disk.raw.finish(tag)?;
            ensure!(
                reply.status == 0 && reply.data.len() == 262_144,
                "{} bytes, status {:02x}",
                reply.data.len(),
                reply.status
            );
        }
        Ok(())
    }),
    check("TEST UNIT READY ends GOOD", |disk| disk.good(&[0; 6])),
    check("REQUEST SENSE ends GOOD with fixed sense data", |disk| {
        let data = disk.data(&[0x03, 0, 0, 0, 252, 0], 252)?;
        let code = byte(&data, 0)? & 0x7f;
        ensure!((0x70..=0x73).contains(&code), "response code {code:02x}h");
        ensure!(
            usize::from(byte(&data, 7)?) + 8 <= data.len(),
            "additional length {} in {} bytes",
            byte(&data, 7)?,
            data.len()
        );
        Ok(())
    }),
    check("REQUEST SENSE with DESC ends GOOD with sense data", |disk| {
        let data = disk.data(&[0x03, 1, 0, 0, 252, 0], 252)?;
        let code = byte(&data, 0)? & 0x7f;
        ensure!((0x70..=0x73).contains(&code), "response code {code:02x}h");
        Ok(())
    }),
    check("REQUEST SENSE with allocation 0 ends GOOD", |disk| {
        disk.good(&[0x03, 0, 0, 0, 0, 0])
    }),
    check("READ CAPACITY(16) with allocation 0 ends GOOD", |disk| {
        disk.good(&read_capacity_16(0))
    }),
    check(
        "READ CAPACITY(16): capacity, block length, reserved bytes",
        |disk| {
            let data = disk.data(&read_capacity_16(32), 32)?;
            ensure!(data.len() == 32, "{} bytes", data.len());
            ensure!(
                matches!(u32_at(&data, 8)?, 512 | 4096),
                "block length {}",
                u32_at(&data, 8)?
            );
            ensure!(bytes(&data, 16, 16)? == [0; 16], "reserved bytes: {data:02x?}");
            Ok(())
        },
    ),
    check(
        "READ CAPACITY(16): lowest aligned address lies in a physical block",
        |disk| {
            let data = disk.data(&read_capacity_16(32), 32)?;
            let per_physical = 1_u16 << (byte(&data, 13)? & 0x0f);
            ensure!(
                u16_at(&data, 14)? & 0x3fff < per_physical,
                "LOWEST ALIGNED LBA {} of {per_physical}",
                u16_at(&data, 14)? & 0x3fff
            );
            Ok(())
        },
    ),
    check("REPORT LUNS with a reserved SELECT REPORT is refused", |disk| {
        let reply = disk.ask(&[REPORT_LUNS, 0, 0x55, 0, 0, 0, 0, 0, 4, 0, 0, 0], 1024)?;
        ensure!(
            reply.status == 2 && reply.sense_code() == INVALID_FIELD,
            "{}",
            super::disk::shown(&reply)
        );
        Ok(())
    }),
];

fn report_luns(disk: &mut Disk, select: u8, allocation: u16) -> Result<Vec<u8>> {
    let [high, low] = allocation.to_be_bytes();
    let cdb = [REPORT_LUNS, 0, select, 0, 0, 0, 0, 0, high, low, 0, 0];
    disk.data(&cdb, u32::from(allocation))
}
