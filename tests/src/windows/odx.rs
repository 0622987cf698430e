//! ODX: offloaded copies by token (SPC-4 §5.16.6, SBC-3 §5.8 and §5.49), for disks that declare them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::disk::{Disk, OUT_OF_RANGE, Size, byte, bytes, shown, some, u16_at, u32_at, u64_at};
use super::{Check, offload};
use crate::raw::Reply;

/// What Windows gives one POPULATE TOKEN or WRITE USING TOKEN.
const EACH: Duration = Duration::from_secs(4);
const TOKEN_LEN: usize = 512;
/// Source and destination of the copies, in MiB.
const SOURCE: u64 = 8;
const DESTINATION: u64 = 24;

pub(super) const CHECKS: &[Check] = &[
    offload("ODX: 3PC is set", |disk| {
        let data = disk.data(&[0x12, 0, 0, 0, 96, 0], 96)?;
        ensure!(byte(&data, 5)? & 0x08 != 0, "3PC is 0");
        Ok(())
    }),
    offload(
        "ODX: VPD 8Fh has a block device ROD token limits descriptor",
        |disk| {
            let page = disk.page(0x8f)?;
            ensure!(
                u16_at(&page, 2)? >= 0x24,
                "page length {:02x}h",
                u16_at(&page, 2)?
            );
            let limits = limits(&page)?;
            ensure!(u16_at(&limits, 10)? > 0, "MAXIMUM RANGE DESCRIPTORS is 0");
            ensure!(
                u32_at(&limits, 12)? >= u32_at(&limits, 16)?,
                "the default inactivity timeout is above the maximum"
            );
            Ok(())
        },
    ),
    offload("ODX: POPULATE TOKEN gives a token", |disk| {
        let block = u64::from(disk.block);
        let ranges = [((SOURCE << 20) / block, u32::try_from((1 << 20) / block)?)];
        let token = populate(disk, 1, &ranges)?;
        ensure!(token.len() == TOKEN_LEN, "{} bytes", token.len());
        ensure!(
            u16_at(&token, 6)? == 0x1f8,
            "ROD TOKEN LENGTH {:04x}h",
            u16_at(&token, 6)?
        );
        Ok(())
    }),
    offload("ODX: two tokens of the same blocks differ", |disk| {
        let ranges = [(0, 8)];
        ensure!(
            populate(disk, 1, &ranges)? != populate(disk, 2, &ranges)?,
            "a token can be guessed"
        );
        Ok(())
    }),
    offload("ODX: WRITE USING TOKEN copies 4 MiB", |disk| {
        let (source, copy) = copy(disk, 4 << 20, |_| Ok(()))?;
        ensure!(source == copy, "the copy is not the source");
        Ok(())
    }),
    offload("ODX: a token is a point in time", |disk| {
        let (source, copy) = copy(disk, 1 << 20, |disk| {
            let lba = (SOURCE << 20) / u64::from(disk.block);
            let other = disk.pattern(0x0ffe, 64);
            disk.write(Size::Ten, lba, &other)
        })?;
        ensure!(
            source == copy,
            "the copy has what was written after the token was made"
        );
        Ok(())
    }),
    offload("ODX: an offset into the token", |disk| {
        let lba = (SOURCE << 20) / u64::from(disk.block);
        let data = disk.pattern(0x0ff5, 64);
        disk.write(Size::Ten, lba, &data)?;
        let token = populate(disk, 3, &[(lba, 64)])?;
        let to = (DESTINATION << 20) / u64::from(disk.block);
        use_token(disk, 4, &token, 40, &[(to, 8)])?;
        let block = disk.block as usize;
        ensure!(
            Some(disk.read(Size::Ten, to, 8)?.as_slice()) == data.get(40 * block..48 * block),
            "blocks from elsewhere"
        );
        Ok(())
    }),
    offload("ODX: several ranges on both sides", |disk| {
        let block = disk.block as usize;
        let lba = (SOURCE << 20) / u64::from(disk.block);
        let data = disk.pattern(0x5eef, 64);
        disk.write(Size::Ten, lba, &data)?;
        let token = populate(disk, 5, &[(lba + 3, 5), (lba + 32, 11)])?;
        let to = (DESTINATION << 20) / u64::from(disk.block);
        use_token(disk, 6, &token, 0, &[(to + 1, 9), (to + 100, 7)])?;
        let part = |from: usize, to: usize| data.get(from * block..to * block).unwrap_or_default();
        let wanted = [part(3, 8), part(32, 43)].concat();
        let got = [
            disk.read(Size::Ten, to + 1, 9)?,
            disk.read(Size::Ten, to + 100, 7)?,
        ]
        .concat();
        ensure!(got == wanted, "the pieces came together otherwise");
        Ok(())
    }),
    offload("ODX: the zero token fills with zeroes", |disk| {
        let to = (DESTINATION << 20) / u64::from(disk.block);
        let data = disk.pattern(6, 16);
        disk.write(Size::Ten, to, &data)?;
        let mut token = vec![0; TOKEN_LEN];
        // ROD type FFFF0001h, token length 1F8h (SBC-3 §5.49).
        if let Some(head) = token.get_mut(..8) {
            head.copy_from_slice(&[0xff, 0xff, 0x00, 0x01, 0x00, 0x00, 0x01, 0xf8]);
        }
        use_token(disk, 7, &token, 0, &[(to, 16)])?;
        ensure!(disk.read(Size::Ten, to, 16)?.iter().all(|b| *b == 0), "not zero");
        Ok(())
    }),
    offload("ODX: a made-up token is refused", |disk| {
        let mut token = disk.pattern(8, 1);
        token.truncate(TOKEN_LEN);
        if let Some(head) = token.get_mut(..8) {
            head.copy_from_slice(&[0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x01, 0xf8]);
        }
        let (cdb, list) = write_using_token(8, &token, 0, &[(0, 8)])?;
        let reply = disk.give(&cdb, &list)?;
        let (key, asc, _) = reply.sense_code();
        ensure!((reply.status, key, asc) == (2, 5, 0x23), "{}", shown(&reply));
        Ok(())
    }),
    offload("ODX: POPULATE TOKEN beyond the end is refused", |disk| {
        let (cdb, list) = populate_token(9, &[(disk.blocks - 1, 2)])?;
        let reply = disk.give(&cdb, &list)?;
        ensure!(
            reply.status == 2 && reply.sense_code() == OUT_OF_RANGE,
            "{}",
            shown(&reply)
        );
        Ok(())
    }),
    offload(
        "ODX: RECEIVE ROD TOKEN INFORMATION of an unknown list is refused",
        |disk| {
            let reply = disk.ask(&information_cdb(0xdead_beef, 1_024), 1_024)?;
            ensure!(
                reply.status == 2 && reply.sense_code().0 == 5,
                "{}",
                shown(&reply)
            );
            Ok(())
        },
    ),
    offload(
        "ODX: truncated RECEIVE ROD TOKEN INFORMATION keeps its length",
        |disk| {
            populate(disk, 10, &[(0, 8)])?;
            let whole = disk.data(&information_cdb(10, 1_024), 1_024)?;
            let short = disk.data(&information_cdb(10, 32), 32)?;
            ensure!(short.len() == 32 && whole.starts_with(&short), "{short:02x?}");
            Ok(())
        },
    ),
];

/// The block device ROD token limits descriptor of page 8Fh, header included.
fn limits(page: &[u8]) -> Result<Vec<u8>> {
    let mut at = 4;
    while at < page.len() {
        let len = usize::from(u16_at(page, at + 2)?) + 4;
        if u16_at(page, at)? == 0 {
            return Ok(bytes(page, at, len)?.to_vec());
        }
        at += len;
    }
    anyhow::bail!("no descriptor of type 0000h in {page:02x?}")
}

fn descriptors(ranges: &[(u64, u32)]) -> Result<Vec<u8>> {
    let mut list = u16::try_from(16 * ranges.len())?.to_be_bytes().to_vec();
    for (lba, blocks) in ranges {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&blocks.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    Ok(list)
}

fn third_party_cdb(code: u8, action: u8, list_id: u32, len: u32) -> Vec<u8> {
    let populate_or_write = [[code, action, 0, 0, 0, 0].as_slice(), &list_id.to_be_bytes()].concat();
    [populate_or_write, len.to_be_bytes().to_vec(), vec![0, 0]].concat()
}

fn information_cdb(list_id: u32, allocation: u32) -> Vec<u8> {
    [
        [0x84, 0x07].as_slice(),
        &list_id.to_be_bytes(),
        &[0; 4],
        &allocation.to_be_bytes(),
        &[0, 0],
    ]
    .concat()
}

fn populate_token(list_id: u32, ranges: &[(u64, u32)]) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0; 14];
    list.extend(descriptors(ranges)?);
    set_length(&mut list)?;
    let cdb = third_party_cdb(0x83, 0x10, list_id, u32::try_from(list.len())?);
    Ok((cdb, list))
}

fn write_using_token(
    list_id: u32,
    token: &[u8],
    offset_blocks: u64,
    ranges: &[(u64, u32)],
) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0; 8];
    list.extend_from_slice(&offset_blocks.to_be_bytes());
    list.extend_from_slice(token);
    list.extend_from_slice(&[0; 6]);
    list.extend(descriptors(ranges)?);
    set_length(&mut list)?;
    let cdb = third_party_cdb(0x83, 0x11, list_id, u32::try_from(list.len())?);
    Ok((cdb, list))
}

/// The first two bytes count those after them.
fn set_length(list: &mut [u8]) -> Result<()> {
    let len = u16::try_from(list.len() - 2)?;
    list.get_mut(..2)
        .context("a list has a length")?
        .copy_from_slice(&len.to_be_bytes());
    Ok(())
}

/// The answer to a copy by token, in the time that Windows gives it.
fn in_time(disk: &mut Disk, cdb: &[u8], list: &[u8]) -> Result<Reply> {
    let started = Instant::now();
    let reply = disk.give(cdb, list)?;
    let took = started.elapsed();
    ensure!(
        took < EACH,
        "it took {took:?}; Windows then does without ODX for three minutes"
    );
    Ok(reply)
}

/// RECEIVE ROD TOKEN INFORMATION of a list that ended well: blocks moved, and what follows the sense data.
fn information(disk: &mut Disk, list_id: u32, action: u8) -> Result<(u64, Vec<u8>)> {
    let data = disk.data(&information_cdb(list_id, 1_024), 1_024)?;
    ensure!(
        u32_at(&data, 0)? as usize + 4 == data.len(),
        "AVAILABLE DATA: {data:02x?}"
    );
    ensure!(
        byte(&data, 4)? & 0x1f == action,
        "about service action {:02x}h",
        byte(&data, 4)?
    );
    let status = byte(&data, 5)? & 0x7f;
    ensure!(
        matches!(status, 0x01 | 0x03),
        "COPY OPERATION STATUS {status:02x}h"
    );
    let moved = u64_at(&data, 16)?
        << match byte(&data, 15)? {
            0xf1 => 0,
            units => anyhow::bail!("TRANSFER COUNT UNITS {units:02x}h: Windows counts blocks"),
        };
    let sense = usize::from(byte(&data, 13)?);
    Ok((moved, data.get(32 + sense..).unwrap_or_default().to_vec()))
}

/// A token for these blocks.
fn populate(disk: &mut Disk, list_id: u32, ranges: &[(u64, u32)]) -> Result<Vec<u8>> {
    let (cdb, list) = populate_token(list_id, ranges)?;
    let reply = in_time(disk, &cdb, &list)?;
    ensure!(reply.status == 0, "POPULATE TOKEN: {}", shown(&reply));
    let (moved, rest) = information(disk, list_id, 0x10)?;
    let wanted: u64 = ranges.iter().map(|(_, blocks)| u64::from(*blocks)).sum();
    ensure!(moved == wanted, "the token is of {moved} blocks, not {wanted}");
    let descriptors = u32_at(&rest, 0)? as usize;
    ensure!(
        descriptors == TOKEN_LEN + 2 && rest.len() == descriptors + 4,
        "token descriptors of {descriptors} bytes in {}",
        rest.len()
    );
    some("no token", rest.get(6..6 + TOKEN_LEN).map(<[u8]>::to_vec))
}

/// Writes by token, all of the ranges: the target may do less at once, and is asked again then.
fn use_token(disk: &mut Disk, list_id: u32, token: &[u8], offset: u64, ranges: &[(u64, u32)]) -> Result<()> {
    let mut done = 0;
    let wanted: u64 = ranges.iter().map(|(_, blocks)| u64::from(*blocks)).sum();
    while done < wanted {
        let left = after(ranges, done);
        let (cdb, list) = write_using_token(list_id, token, offset + done, &left)?;
        let reply = in_time(disk, &cdb, &list)?;
        ensure!(reply.status == 0, "WRITE USING TOKEN: {}", shown(&reply));
        let (moved, _) = information(disk, list_id, 0x11)?;
        ensure!(
            moved > 0 && done + moved <= wanted,
            "{moved} blocks of {}",
            wanted - done
        );
        done += moved;
    }
    Ok(())
}

/// What is left of ranges after `done` blocks of them.
fn after(ranges: &[(u64, u32)], done: u64) -> Vec<(u64, u32)> {
    let mut skip = done;
    let mut left = Vec::new();
    for (lba, blocks) in ranges {
        let passed = skip.min(u64::from(*blocks));
        skip -= passed;
        let rest = u32::try_from(u64::from(*blocks) - passed).unwrap_or(0);
        if rest > 0 {
            left.push((lba + passed, rest));
        }
    }
    left
}

/// Writes a source, makes its token, does something, copies: the source as it was, and the copy.
fn copy(
    disk: &mut Disk,
    len: u32,
    between: impl FnOnce(&mut Disk) -> Result<()>,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let block = u64::from(disk.block);
    let (from, to) = ((SOURCE << 20) / block, (DESTINATION << 20) / block);
    let piece = 262_144 / disk.block;
    let blocks = len / disk.block;
    let source = disk.pattern(u64::from(len), blocks);
    for (i, data) in (0_u32..).zip(source.chunks(262_144)) {
        disk.write(Size::Ten, from + u64::from(i * piece), data)?;
    }
    let token = populate(disk, 20, &[(from, blocks)])?;
    between(disk)?;
    use_token(disk, 21, &token, 0, &[(to, blocks)])?;
    let mut copy = Vec::new();
    for i in 0..blocks.div_ceil(piece) {
        let count = piece.min(blocks - i * piece);
        copy.extend(disk.read(Size::Ten, to + u64::from(i * piece), count)?);
    }
    Ok((source, copy))
}
