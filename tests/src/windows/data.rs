//! Reads, writes, cache and VERIFY; and commands with random fields.

use anyhow::{Result, ensure};

use super::disk::{Dice, Disk, OUT_OF_RANGE, Size, transfer};
use super::modes::set_write_cache;
use super::{Check, check};
use crate::raw::Cdb;

/// Commands of a sequential or random run.
const RUN: u64 = 1_000;
/// The large transfer of the HLK, in bytes.
const LARGE: u32 = 12 << 20;
/// One command of it.
const PIECE: u32 = 256 << 10;
const SYNCHRONIZE_CACHE: u8 = 0x35;
const DPO: u8 = 0x10;
const FUA: u8 = 0x08;

pub(super) const CHECKS: &[Check] = &[
    check("READ(6) and WRITE(6): one block comes back", |disk| {
        round_trip(disk, Size::Six)
    }),
    check("READ(10) and WRITE(10): blocks come back", |disk| {
        round_trip(disk, Size::Ten)
    }),
    check("READ(12) and WRITE(12): blocks come back", |disk| {
        round_trip(disk, Size::Twelve)
    }),
    check("READ(16) and WRITE(16): blocks come back", |disk| {
        round_trip(disk, Size::Sixteen)
    }),
    check("READ(6): length 0 is 256 blocks", |disk| {
        let data = disk.read(Size::Six, 0, 256)?;
        ensure!(data.len() == 256 * disk.block as usize, "{} bytes", data.len());
        Ok(())
    }),
    check("READ(6): reads overlap", |disk| overlap(disk, Size::Six)),
    check("READ(10): reads overlap", |disk| overlap(disk, Size::Ten)),
    check("READ(16): reads overlap", |disk| overlap(disk, Size::Sixteen)),
    check("READ(6) and WRITE(6): 1000 sequential", |disk| {
        sequential(disk, Size::Six)
    }),
    check("READ(10) and WRITE(10): 1000 sequential", |disk| {
        sequential(disk, Size::Ten)
    }),
    check("READ(16) and WRITE(16): 1000 sequential", |disk| {
        sequential(disk, Size::Sixteen)
    }),
    check("READ(6) and WRITE(6): 1000 random", |disk| {
        random(disk, Size::Six)
    }),
    check("READ(10) and WRITE(10): 1000 random", |disk| {
        random(disk, Size::Ten)
    }),
    check("READ(16) and WRITE(16): 1000 random", |disk| {
        random(disk, Size::Sixteen)
    }),
    check("WRITE(10): 12 MiB, cache on, then SYNCHRONIZE CACHE", |disk| {
        large(disk, Size::Ten, true)
    }),
    check("WRITE(16): 12 MiB, cache on, then SYNCHRONIZE CACHE", |disk| {
        large(disk, Size::Sixteen, true)
    }),
    check("WRITE(10): 12 MiB, cache off, then SYNCHRONIZE CACHE", |disk| {
        large(disk, Size::Ten, false)
    }),
    check("WRITE(16): 12 MiB, cache off, then SYNCHRONIZE CACHE", |disk| {
        large(disk, Size::Sixteen, false)
    }),
    check("WRITE(10) with FUA, and with DPO", |disk| forced(disk, Size::Ten)),
    check("WRITE(16) with FUA, and with DPO", |disk| {
        forced(disk, Size::Sixteen)
    }),
    check("SYNCHRONIZE CACHE(10) of the whole disk ends GOOD", |disk| {
        disk.good(&[SYNCHRONIZE_CACHE, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }),
    check("READ(10) and WRITE(10) of no blocks end GOOD", |disk| {
        for code in [0x28, 0x2a] {
            disk.good(&transfer(code, Size::Ten, 0, 0, 0)?)?;
        }
        Ok(())
    }),
    check("READ(10) beyond the end is refused", |disk| {
        beyond(disk, 0x28, Size::Ten)
    }),
    check("READ(16) beyond the end is refused", |disk| {
        beyond(disk, 0x88, Size::Sixteen)
    }),
    check("WRITE(10) beyond the end is refused", |disk| {
        beyond(disk, 0x2a, Size::Ten)
    }),
    check("WRITE(16) beyond the end is refused", |disk| {
        beyond(disk, 0x8a, Size::Sixteen)
    }),
    check("VERIFY(10) of no blocks ends GOOD", |disk| {
        verify(disk, Size::Ten, 0, 0)
    }),
    check("VERIFY(16) of no blocks ends GOOD", |disk| {
        verify(disk, Size::Sixteen, 0, 0)
    }),
    check("VERIFY(10) of a random block ends GOOD", |disk| {
        let lba = Dice::new(10).below(disk.blocks);
        verify(disk, Size::Ten, lba, 1)
    }),
    check("VERIFY(16) of a random block ends GOOD", |disk| {
        let lba = Dice::new(16).below(disk.blocks);
        verify(disk, Size::Sixteen, lba, 1)
    }),
    check("VERIFY(10) of the last block ends GOOD", |disk| {
        verify(disk, Size::Ten, disk.blocks - 1, 1)
    }),
    check(
        "VERIFY(10) of two blocks at the last address is refused",
        |disk| {
            let cdb = transfer(0x2f, Size::Ten, 0, disk.blocks - 1, 2)?;
            disk.refused(&cdb, 0, OUT_OF_RANGE)
        },
    ),
    check(
        "VERIFY(16) of two blocks at the last address is refused",
        |disk| {
            let cdb = transfer(0x8f, Size::Sixteen, 0, disk.blocks - 1, 2)?;
            disk.refused(&cdb, 0, OUT_OF_RANGE)
        },
    ),
];

pub(super) const FUZZ: &[Check] = &[
    check("random fields: commands without data", |disk| {
        random_fields(disk, &[0x00, 0x1b, 0x2f, 0x35, 0x8f, 0x91], Way::None)
    }),
    check("random fields: commands that read settings", |disk| {
        random_fields(disk, &[0x03, 0x12, 0x1a, 0x25, 0x5a, 0x9e, 0xa0], Way::In)
    }),
    check("random fields: commands that read the medium", |disk| {
        random_fields(disk, &[0x08, 0x28, 0x88, 0xa8], Way::In)
    }),
    check("random fields: commands that change something", |disk| {
        random_fields(disk, &[0x0a, 0x15, 0x2a, 0x55, 0x8a, 0xaa, 0x42], Way::Out)
    }),
    check("after the random fields the disk is as before", |disk| {
        disk.good(&[0; 6])?;
        round_trip(disk, Size::Ten)
    }),
];

fn round_trip(disk: &mut Disk, size: Size) -> Result<()> {
    let blocks = if size == Size::Six { 1 } else { 16 };
    let data = disk.pattern(0x51de ^ u64::from(blocks), blocks);
    let lba = 1_000;
    disk.write(size, lba, &data)?;
    ensure!(
        disk.read(size, lba, blocks)? == data,
        "other data came back than was written"
    );
    Ok(())
}

fn overlap(disk: &mut Disk, size: Size) -> Result<()> {
    let data = disk.pattern(77, 64);
    disk.write(Size::Ten, 2_000, &data)?;
    let block = disk.block as usize;
    for first in 0..8_u32 {
        let read = disk.read(size, 2_000 + u64::from(first), 32)?;
        let wanted = data.get(first as usize * block..(first as usize + 32) * block);
        ensure!(
            Some(read.as_slice()) == wanted,
            "a read that overlaps the last one, at block {first}"
        );
    }
    Ok(())
}

fn sequential(disk: &mut Disk, size: Size) -> Result<()> {
    let lbas: Vec<u64> = (4_000..4_000 + RUN).collect();
    disk.write_and_read_all(size, &lbas, 0x5e9)
}

fn random(disk: &mut Disk, size: Size) -> Result<()> {
    let end = match size {
        Size::Six => disk.blocks.min(1 << 21),
        _ => disk.blocks,
    };
    let mut dice = Dice::new(end ^ 0x4a4d);
    let mut lbas: Vec<u64> = (0..RUN).map(|_| dice.below(end)).collect();
    // Two writes of one block in flight may land in either order.
    lbas.sort_unstable();
    lbas.dedup();
    lbas.reverse();
    disk.write_and_read_all(size, &lbas, 0x4a4d)
}

fn large(disk: &mut Disk, size: Size, cache: bool) -> Result<()> {
    if cache {
        return large_transfer(disk, size);
    }
    set_write_cache(disk, false)?;
    let done = large_transfer(disk, size);
    set_write_cache(disk, true)?;
    done
}

fn large_transfer(disk: &mut Disk, size: Size) -> Result<()> {
    let blocks = PIECE / disk.block;
    let image = |disk: &Disk, i: u32| disk.pattern(u64::from(i) ^ 0x12ab, blocks);
    for i in 0..LARGE / PIECE {
        let data = image(disk, i);
        disk.write(size, u64::from(i * blocks), &data)?;
    }
    disk.good(&[SYNCHRONIZE_CACHE, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
    for i in 0..LARGE / PIECE {
        ensure!(
            disk.read(size, u64::from(i * blocks), blocks)? == image(disk, i),
            "piece {i} reads otherwise than it was written"
        );
    }
    Ok(())
}

fn forced(disk: &mut Disk, size: Size) -> Result<()> {
    let (write, read) = match size {
        Size::Sixteen => (0x8a, 0x88),
        _ => (0x2a, 0x28),
    };
    for (seed, flags) in [(1, FUA), (2, FUA | DPO), (3, DPO)] {
        let data = disk.pattern(seed, 8);
        disk.given(&transfer(write, size, flags, 3_000, 8)?, &data)?;
        let back = disk.data(&transfer(read, size, flags, 3_000, 8)?, 8 * disk.block)?;
        ensure!(
            back == data,
            "flags {flags:02x}: other data came back than was written"
        );
    }
    Ok(())
}

fn beyond(disk: &mut Disk, code: u8, size: Size) -> Result<()> {
    let cdb = transfer(code, size, 0, disk.blocks - 1, 2)?;
    if code & 2 == 0 {
        return disk.refused(&cdb, 2 * disk.block, OUT_OF_RANGE);
    }
    let before = disk.read(Size::Sixteen, disk.blocks - 1, 1)?;
    let reply = disk.give(&cdb, &disk.pattern(9, 2))?;
    ensure!(
        reply.status == 2 && reply.sense_code() == OUT_OF_RANGE,
        "{}",
        super::disk::shown(&reply)
    );
    ensure!(
        disk.read(Size::Sixteen, disk.blocks - 1, 1)? == before,
        "the last block was written nevertheless"
    );
    Ok(())
}

fn verify(disk: &mut Disk, size: Size, lba: u64, blocks: u32) -> Result<()> {
    let code = if size == Size::Sixteen { 0x8f } else { 0x2f };
    disk.good(&transfer(code, size, 0, lba, blocks)?)
}

/// What a command with random fields does with data.
#[derive(Debug, Clone, Copy)]
enum Way {
    None,
    In,
    Out,
}

/// Every command is answered, with sense data when it fails; the disk is ready afterwards.
fn random_fields(disk: &mut Disk, codes: &[u8], way: Way) -> Result<()> {
    const EACH: usize = 40;
    let mut dice = Dice::new(codes.len() as u64 ^ 0xf022);
    for code in codes {
        for _ in 0..EACH {
            let len = match code >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                _ => 12,
            };
            let mut cdb: Vec<u8> = (0..len).map(|_| dice.byte()).collect();
            let last = len - 1;
            for (at, field) in cdb.iter_mut().enumerate() {
                match at {
                    0 => *field = *code,
                    // NACA and its neighbours are not a field of the command; LOEJ would eject.
                    _ if at == last => *field = 0,
                    4 if *code == 0x1b => *field &= 0x01,
                    _ => {}
                }
            }
            let moved = u32::try_from(dice.below(9))? * disk.block;
            let lun = disk.place.lun;
            let reply = match way {
                Way::None => disk.raw.run(&Cdb::none(lun, &cdb))?,
                Way::In => disk.raw.run(&Cdb::reads(lun, &cdb, moved))?,
                Way::Out => {
                    let data: Vec<u8> = (0..moved).map(|_| dice.byte()).collect();
                    disk.raw.run_write(&Cdb::writes(lun, &cdb, moved), &data)?
                }
            };
            ensure!(
                reply.status != 2 || reply.sense.len() >= 8,
                "{cdb:02x?}: CHECK CONDITION without sense"
            );
            ensure!(
                matches!(reply.status, 0 | 2 | 4),
                "{cdb:02x?}: status {:02x}",
                reply.status
            );
            ensure!(
                reply.data.len() <= moved as usize,
                "{cdb:02x?}: {} bytes of {moved}",
                reply.data.len()
            );
        }
    }
    disk.raw.ready(disk.place.lun)
}
