//! Thin provisioning: limits, log page, GET LBA STATUS, UNMAP.

use anyhow::{Context, Result, ensure};

use super::disk::{Disk, INVALID_FIELD, OUT_OF_RANGE, Size, byte, read_capacity_16, u16_at, u32_at, u64_at};
use super::{Check, check};

pub(super) const CHECKS: &[Check] = &[
    check("thin: READ CAPACITY(16) says LBPME", |disk| {
        let data = disk.data(&read_capacity_16(32), 32)?;
        ensure!(byte(&data, 14)? & 0x80 != 0, "LBPME is 0");
        Ok(())
    }),
    check("thin: VPD B0h has page length 3Ch", |disk| {
        let page = disk.page(0xb0)?;
        ensure!(u16_at(&page, 2)? == 0x3c, "{:02x}h", u16_at(&page, 2)?);
        Ok(())
    }),
    check("thin: VPD B0h allows UNMAP", |disk| {
        let page = disk.page(0xb0)?;
        ensure!(u32_at(&page, 20)? > 0, "MAXIMUM UNMAP LBA COUNT is 0");
        ensure!(
            u32_at(&page, 24)? > 0,
            "MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT is 0"
        );
        Ok(())
    }),
    check("thin: VPD B0h names the granularity, a power of two", |disk| {
        let page = disk.page(0xb0)?;
        let grain = u32_at(&page, 28)?;
        ensure!(grain.is_power_of_two(), "OPTIMAL UNMAP GRANULARITY {grain}");
        let alignment = u32_at(&page, 32)?;
        ensure!(
            alignment & 0x8000_0000 == 0 || alignment & 0x7fff_ffff < grain,
            "UNMAP GRANULARITY ALIGNMENT {alignment:08x}"
        );
        Ok(())
    }),
    check("thin: VPD B2h says thin and UNMAP", |disk| {
        let page = disk.page(0xb2)?;
        ensure!(
            byte(&page, 5)? & 0x01 != 0 || u16_at(&page, 2)? == 4,
            "DP is 0 and the page has {} bytes",
            page.len()
        );
        ensure!(byte(&page, 5)? & 0x80 != 0, "LBPU is 0");
        ensure!(
            byte(&page, 6)? & 0x07 == 2,
            "provisioning type {}",
            byte(&page, 6)? & 7
        );
        Ok(())
    }),
    check("thin: LBPRZ is the same in both places", |disk| {
        let capacity = byte(&disk.data(&read_capacity_16(32), 32)?, 14)? & 0x40 != 0;
        let page = byte(&disk.page(0xb2)?, 5)? & 0x1c != 0;
        ensure!(capacity == page, "READ CAPACITY(16): {capacity}, VPD B2h: {page}");
        ensure!(capacity, "zeroes are not promised: NTFS does not trim");
        Ok(())
    }),
    check("thin: LOG SENSE lists page 0Ch", |disk| {
        let page = log_page(disk, 0)?;
        let list = page.get(4..).unwrap_or_default();
        ensure!(list.contains(&0x0c), "{list:02x?}");
        Ok(())
    }),
    check("thin: log page 0Ch is well formed", |disk| {
        let page = log_page(disk, 0x0c)?;
        let parameters = parameters(&page)?;
        ensure!(!parameters.is_empty(), "no parameter");
        Ok(())
    }),
    check("thin: log page 0Ch counts free and used resources", |disk| {
        let page = log_page(disk, 0x0c)?;
        let list = parameters(&page)?;
        for wanted in [1, 2] {
            ensure!(
                list.iter().any(|(code, _)| *code == wanted),
                "no parameter {wanted:04x}: {list:?}"
            );
        }
        Ok(())
    }),
    check("thin: GET LBA STATUS tells written from unwritten", |disk| {
        let grain = granularity(disk)?;
        unmap(disk, &[(0, 4 * grain)])?;
        write_zone(disk, u64::from(grain), grain)?;
        ensure!(!mapped(disk, 0)?, "what was unmapped is mapped");
        ensure!(mapped(disk, u64::from(grain))?, "what was written is not mapped");
        Ok(())
    }),
    check("thin: GET LBA STATUS stays within the disk", |disk| {
        let start = disk.blocks - 8;
        let data = lba_status(disk, start, 256)?;
        ensure!(data.len() > 20, "{} bytes", data.len());
        for descriptor in data.get(8..).unwrap_or_default().chunks(16) {
            let end = u64_at(descriptor, 0)? + u64::from(u32_at(descriptor, 8)?);
            ensure!(end <= disk.blocks, "it ends at {end} of {}", disk.blocks);
        }
        Ok(())
    }),
    check("thin: GET LBA STATUS beyond the end is refused", |disk| {
        let cdb = lba_status_cdb(disk.blocks, 256);
        disk.refused(&cdb, 256, OUT_OF_RANGE)
    }),
    check("thin: UNMAP deallocates, and zeroes are read", |disk| {
        let grain = granularity(disk)?;
        let start = 8 * u64::from(grain);
        write_zone(disk, start, 4 * grain)?;
        unmap(disk, &[(start, 4 * grain)])?;
        ensure!(!mapped(disk, start)?, "still mapped after UNMAP");
        let blocks = (4 * grain).min(64);
        let data = disk.read(Size::Ten, start, blocks)?;
        ensure!(data.iter().all(|b| *b == 0), "an unmapped block is not zero");
        Ok(())
    }),
    check("thin: UNMAP of two ranges", |disk| {
        let grain = granularity(disk)?;
        let zone = u64::from(grain);
        write_zone(disk, 16 * zone, 4 * grain)?;
        unmap(disk, &[(16 * zone, grain), (18 * zone, grain)])?;
        let seen = (0..4)
            .map(|i| mapped(disk, (16 + i) * zone))
            .collect::<Result<Vec<bool>>>()?;
        ensure!(seen == [false, true, false, true], "mapped: {seen:?}");
        Ok(())
    }),
    check(
        "thin: UNMAP of a part of a granule loses nothing beside it",
        |disk| {
            let data = disk.pattern(3, 16);
            disk.write(Size::Ten, 8_192, &data)?;
            unmap(disk, &[(8_194, 3)])?;
            let now = disk.read(Size::Ten, 8_192, 16)?;
            let block = disk.block as usize;
            let same = |from: usize, to: usize| {
                now.get(from * block..to * block) == data.get(from * block..to * block)
            };
            ensure!(same(0, 2) && same(5, 16), "blocks beside the range changed");
            Ok(())
        },
    ),
    check("thin: used resources fall after UNMAP", |disk| {
        let exponent = byte(&disk.page(0xb2)?, 4)?;
        let sets = 1_u64 << exponent;
        // Sixteen threshold sets, within reason.
        let blocks = u32::try_from((16 * sets).min(disk.blocks / 4))?;
        let used = |page: &[u8]| -> Result<u32> {
            let list = parameters(page)?;
            let found = list.iter().find(|(code, _)| *code == 2).map(|(_, count)| *count);
            found.with_context(|| format!("no used resources in {list:?}"))
        };
        unmap(disk, &[(0, blocks)])?;
        write_zone(disk, 0, blocks)?;
        let full = used(&log_page(disk, 0x0c)?)?;
        unmap(disk, &[(0, blocks)])?;
        let empty = used(&log_page(disk, 0x0c)?)?;
        ensure!(
            empty < full,
            "{full} threshold sets before UNMAP, {empty} after it"
        );
        Ok(())
    }),
    check("thin: UNMAP without a list ends GOOD", |disk| {
        disk.good(&[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }),
    check("thin: UNMAP beyond the end is refused", |disk| {
        let list = unmap_list(&[(disk.blocks - 1, 2)])?;
        let reply = disk.give(&unmap_cdb(&list)?, &list)?;
        ensure!(
            reply.status == 2 && reply.sense_code() == OUT_OF_RANGE,
            "{}",
            super::disk::shown(&reply)
        );
        Ok(())
    }),
    check("thin: LOG SENSE of a page that is not there is refused", |disk| {
        disk.refused(&[0x4d, 0, 0x7e, 0, 0, 0, 0, 1, 0, 0], 256, INVALID_FIELD)
    }),
];

/// Blocks of what UNMAP gives back as one; eight where the disk does not say, which one check finds fault with.
fn granularity(disk: &mut Disk) -> Result<u32> {
    Ok(u32_at(&disk.page(0xb0)?, 28)?.max(8))
}

fn write_zone(disk: &mut Disk, start: u64, blocks: u32) -> Result<()> {
    let piece = 262_144 / disk.block;
    let mut at = 0;
    while at < blocks {
        let count = piece.min(blocks - at);
        let data = disk.pattern(start ^ u64::from(at), count);
        disk.write(Size::Sixteen, start + u64::from(at), &data)?;
        at += count;
    }
    Ok(())
}

fn unmap_list(ranges: &[(u64, u32)]) -> Result<Vec<u8>> {
    let described = u16::try_from(16 * ranges.len())?;
    let mut list = [
        (described + 6).to_be_bytes(),
        described.to_be_bytes(),
        [0; 2],
        [0; 2],
    ]
    .concat();
    for (lba, blocks) in ranges {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&blocks.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    Ok(list)
}

fn unmap_cdb(list: &[u8]) -> Result<[u8; 10]> {
    let [high, low] = u16::try_from(list.len())?.to_be_bytes();
    Ok([0x42, 0, 0, 0, 0, 0, 0, high, low, 0])
}

fn unmap(disk: &mut Disk, ranges: &[(u64, u32)]) -> Result<()> {
    let list = unmap_list(ranges)?;
    disk.given(&unmap_cdb(&list)?, &list)
}

fn lba_status_cdb(lba: u64, allocation: u32) -> Vec<u8> {
    [
        [0x9e, 0x12].as_slice(),
        &lba.to_be_bytes(),
        &allocation.to_be_bytes(),
        &[0, 0],
    ]
    .concat()
}

fn lba_status(disk: &mut Disk, lba: u64, allocation: u32) -> Result<Vec<u8>> {
    disk.data(&lba_status_cdb(lba, allocation), allocation)
}

fn mapped(disk: &mut Disk, lba: u64) -> Result<bool> {
    let data = lba_status(disk, lba, 24)?;
    ensure!(
        u64_at(&data, 8)? == lba,
        "asked for {lba}, told about {}",
        u64_at(&data, 8)?
    );
    Ok(byte(&data, 20)? & 0x0f == 0)
}

fn log_page(disk: &mut Disk, page: u8) -> Result<Vec<u8>> {
    // PC 01b: cumulative values.
    disk.data(&[0x4d, 0, 0x40 | page, 0, 0, 0, 0, 4, 0, 0], 1_024)
}

/// Parameter codes and counts of log page 0Ch, whose form is checked.
fn parameters(page: &[u8]) -> Result<Vec<(u16, u32)>> {
    ensure!(
        byte(page, 0)? == 0x8c,
        "DS, SPF and page code are {:02x}h",
        byte(page, 0)?
    );
    let len = usize::from(u16_at(page, 2)?);
    ensure!(
        len + 4 == page.len() && len % 12 == 0,
        "page length {len} in {} bytes",
        page.len()
    );
    let mut list = Vec::new();
    for parameter in page.get(4..).unwrap_or_default().chunks(12) {
        let code = u16_at(parameter, 0)?;
        ensure!((1..=0xff).contains(&code), "parameter {code:04x}h");
        ensure!(
            byte(parameter, 2)? & 0x03 == 3 && byte(parameter, 3)? == 8,
            "format and length of parameter {code:04x}h: {parameter:02x?}"
        );
        list.push((code, u32_at(parameter, 4)?));
    }
    Ok(list)
}
