//! A disk as the checks see it: commands with the status that they must have, and fields of what comes back.

use std::collections::VecDeque;

use anyhow::{Context, Result, bail, ensure};

use super::Place;
use crate::raw::{Cdb, Raw, Reply};
use crate::replay::Actor;

/// ILLEGAL REQUEST, INVALID FIELD IN CDB.
pub(super) const INVALID_FIELD: (u8, u8, u8) = (5, 0x24, 0);
/// ILLEGAL REQUEST, LOGICAL BLOCK ADDRESS OUT OF RANGE.
pub(super) const OUT_OF_RANGE: (u8, u8, u8) = (5, 0x21, 0);
/// RESERVATION CONFLICT.
pub(super) const CONFLICT: u8 = 0x18;
/// Commands that a pipelined load keeps in flight.
const DEPTH: usize = 16;

/// Byte of a reply.
pub(super) fn byte(data: &[u8], at: usize) -> Result<u8> {
    data.get(at)
        .copied()
        .with_context(|| format!("no byte {at} in {} bytes", data.len()))
}

/// Some bytes of a reply.
pub(super) fn bytes(data: &[u8], at: usize, len: usize) -> Result<&[u8]> {
    data.get(at..at + len)
        .with_context(|| format!("no bytes {at}+{len} in {} bytes", data.len()))
}

/// Big-endian number of 2 bytes.
pub(super) fn u16_at(data: &[u8], at: usize) -> Result<u16> {
    Ok(bytes(data, at, 2)?
        .iter()
        .fold(0, |sum, b| sum << 8 | u16::from(*b)))
}

/// Big-endian number of 4 bytes.
pub(super) fn u32_at(data: &[u8], at: usize) -> Result<u32> {
    Ok(bytes(data, at, 4)?
        .iter()
        .fold(0, |sum, b| sum << 8 | u32::from(*b)))
}

/// Big-endian number of 8 bytes.
pub(super) fn u64_at(data: &[u8], at: usize) -> Result<u64> {
    Ok(bytes(data, at, 8)?
        .iter()
        .fold(0, |sum, b| sum << 8 | u64::from(*b)))
}

/// Printable ASCII.
pub(super) fn ensure_ascii(what: &str, text: &[u8]) -> Result<()> {
    ensure!(
        !text.is_empty() && text.iter().all(|b| (0x20..0x7f).contains(b)),
        "{what} is not printable ASCII: {text:02x?}"
    );
    Ok(())
}

/// CDB length of a read, write or verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    Six,
    Ten,
    Twelve,
    Sixteen,
}

/// Deterministic pseudo-random numbers (xorshift64).
#[derive(Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }
}

/// One logged-in disk.
#[derive(Debug)]
pub struct Disk {
    pub(super) raw: Raw,
    pub(super) place: Place,
    /// Bytes of a logical block.
    pub(super) block: u32,
    /// Logical blocks.
    pub(super) blocks: u64,
}

impl Disk {
    /// Logs in as Windows on `host` and waits until the disk is ready.
    ///
    /// # Errors
    /// The login fails or the disk does not become ready.
    pub fn open(place: &Place, host: &str) -> Result<Self> {
        let mut raw = Actor::windows(host).log_in(place.address, Some(&place.iqn))?.raw;
        raw.ready(place.lun)?;
        let mut disk = Self {
            raw,
            place: place.clone(),
            block: 512,
            blocks: 0,
        };
        let capacity = disk.data(&read_capacity_16(32), 32)?;
        disk.blocks = u64_at(&capacity, 0)? + 1;
        disk.block = u32_at(&capacity, 8)?;
        Ok(disk)
    }

    /// The same disk, as another node of the cluster sees it.
    ///
    /// # Errors
    /// The login fails.
    pub(super) fn node(&self, host: &str) -> Result<Self> {
        Self::open(&self.place, host)
    }

    /// Serial number and page 83h.
    ///
    /// # Errors
    /// One of the pages cannot be read.
    pub fn identity(&mut self) -> Result<(Vec<u8>, Vec<u8>)> {
        let (serial, designators) = (self.page(0x80)?, self.page(0x83)?);
        let naa = super::identity::designators(&designators)?
            .into_iter()
            .find(|designator| designator.association == 0 && designator.kind == 3)
            .map_or_else(Vec::new, |designator| designator.bytes.to_vec());
        Ok((serial.get(4..).unwrap_or_default().to_vec(), naa))
    }

    /// Whether VPD page 00h names a page.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn lists_page(&mut self, page: u8) -> Result<bool> {
        Ok(self.page(0)?.get(4..).is_some_and(|pages| pages.contains(&page)))
    }

    fn reads(&self, cdb: &[u8], len: u32) -> Cdb {
        Cdb::reads(self.place.lun, cdb, len)
    }

    /// A command that may read up to `len` bytes; residuals are checked.
    pub(super) fn ask(&mut self, cdb: &[u8], len: u32) -> Result<Reply> {
        let command = if len == 0 {
            Cdb::none(self.place.lun, cdb)
        } else {
            self.reads(cdb, len)
        };
        let reply = self.raw.run(&command)?;
        let missing = match reply.residual_flags {
            2 => reply.residual as usize,
            _ => 0,
        };
        ensure!(
            reply.status != 0 || reply.data.len() + missing == len as usize,
            "{} bytes of {len} came, and the residual says {missing}",
            reply.data.len()
        );
        ensure!(
            reply.status != 2 || reply.sense.len() >= 8,
            "CHECK CONDITION without sense: {reply:?}"
        );
        Ok(reply)
    }

    /// Data of a command that must end GOOD.
    pub(super) fn data(&mut self, cdb: &[u8], len: u32) -> Result<Vec<u8>> {
        let reply = self.ask(cdb, len)?;
        ensure!(reply.status == 0, "{cdb:02x?}: {}", shown(&reply));
        Ok(reply.data)
    }

    /// A command without data that must end GOOD.
    pub(super) fn good(&mut self, cdb: &[u8]) -> Result<()> {
        self.data(cdb, 0).map(drop)
    }

    /// A command that must end with CHECK CONDITION and this sense.
    pub(super) fn refused(&mut self, cdb: &[u8], len: u32, sense: (u8, u8, u8)) -> Result<()> {
        let reply = self.ask(cdb, len)?;
        ensure!(
            reply.status == 2 && reply.sense_code() == sense,
            "{cdb:02x?}: {} instead of {sense:02x?}",
            shown(&reply)
        );
        Ok(())
    }

    /// A command with data-out.
    pub(super) fn give(&mut self, cdb: &[u8], data: &[u8]) -> Result<Reply> {
        let command = Cdb::writes(self.place.lun, cdb, u32::try_from(data.len())?);
        self.raw.run_write(&command, data)
    }

    /// A command with data-out that must end GOOD.
    pub(super) fn given(&mut self, cdb: &[u8], data: &[u8]) -> Result<()> {
        let reply = self.give(cdb, data)?;
        ensure!(reply.status == 0, "{cdb:02x?}: {}", shown(&reply));
        Ok(())
    }

    /// A VPD page, whole.
    pub(super) fn page(&mut self, page: u8) -> Result<Vec<u8>> {
        let data = self.data(&vpd(page, 512), 512)?;
        ensure!(
            byte(&data, 1)? == page,
            "page {page:02x} came as {:02x}",
            byte(&data, 1)?
        );
        ensure!(
            usize::from(u16_at(&data, 2)?) + 4 == data.len(),
            "page {page:02x}: length {} in {} bytes",
            u16_at(&data, 2)?,
            data.len()
        );
        Ok(data)
    }

    /// Whole blocks of a pattern.
    pub(super) fn pattern(&self, seed: u64, blocks: u32) -> Vec<u8> {
        let mut dice = Dice::new(seed);
        let words = blocks as usize * self.block as usize / 8;
        (0..words).flat_map(|_| dice.next().to_le_bytes()).collect()
    }

    pub(super) fn read(&mut self, size: Size, lba: u64, blocks: u32) -> Result<Vec<u8>> {
        let cdb = transfer(read_code(size), size, 0, lba, blocks)?;
        self.data(&cdb, blocks * self.block)
    }

    pub(super) fn write(&mut self, size: Size, lba: u64, data: &[u8]) -> Result<()> {
        let blocks = u32::try_from(data.len())? / self.block;
        let cdb = transfer(read_code(size) + 2, size, 0, lba, blocks)?;
        self.given(&cdb, data)
    }

    /// Writes one block to each address, several in flight, then reads all of them back in the same way.
    pub(super) fn write_and_read_all(&mut self, size: Size, lbas: &[u64], seed: u64) -> Result<()> {
        let image = |disk: &Self, lba: u64| disk.pattern(seed ^ (lba << 8), 1);
        let mut flying = VecDeque::new();
        for lba in lbas {
            let cdb = transfer(read_code(size) + 2, size, 0, *lba, 1)?;
            let command = Cdb::writes(self.place.lun, &cdb, self.block);
            // One block is immediate data for every target that takes any.
            let data = image(self, *lba);
            flying.push_back(self.raw.start(&command, &data)?);
            if flying.len() == DEPTH {
                self.ends_good(&mut flying)?;
            }
        }
        while !flying.is_empty() {
            self.ends_good(&mut flying)?;
        }
        for batch in lbas.chunks(DEPTH) {
            let mut tags = Vec::new();
            for lba in batch {
                let cdb = transfer(read_code(size), size, 0, *lba, 1)?;
                tags.push((*lba, self.raw.start(&self.reads(&cdb, self.block), &[])?));
            }
            for (lba, tag) in tags {
                let reply = self.raw.finish(tag)?;
                ensure!(reply.status == 0, "reading LBA {lba}: {}", shown(&reply));
                ensure!(
                    reply.data == image(self, lba),
                    "LBA {lba} reads otherwise than it was written"
                );
            }
        }
        Ok(())
    }

    fn ends_good(&mut self, flying: &mut VecDeque<u32>) -> Result<()> {
        let tag = flying.pop_front().context("nothing is in flight")?;
        let reply = self.raw.finish(tag)?;
        ensure!(reply.status == 0, "a write: {}", shown(&reply));
        Ok(())
    }
}

/// Status and sense of a reply for messages.
pub(super) fn shown(reply: &Reply) -> String {
    let (key, asc, ascq) = reply.sense_code();
    match reply.status {
        2 => format!("CHECK CONDITION {key:x}/{asc:02x}/{ascq:02x}"),
        status => format!("status {status:02x}h"),
    }
}

const fn read_code(size: Size) -> u8 {
    match size {
        Size::Six => 0x08,
        Size::Ten => 0x28,
        Size::Twelve => 0xa8,
        Size::Sixteen => 0x88,
    }
}

/// CDB of a command with LBA and length in blocks; `flags` is its byte 1.
pub(super) fn transfer(code: u8, size: Size, flags: u8, lba: u64, blocks: u32) -> Result<Vec<u8>> {
    let [.., l5, l6, l7] = lba.to_be_bytes();
    let [b0, b1, b2, b3] = blocks.to_be_bytes();
    let short = u32::try_from(lba).map(u32::to_be_bytes);
    Ok(match size {
        Size::Six => {
            ensure!(
                lba < 1 << 21 && blocks <= 256,
                "six bytes cannot say {lba}+{blocks}"
            );
            // 256 blocks are said as 0.
            vec![code, l5, l6, l7, b3, 0]
        }
        Size::Ten => [[code, flags].as_slice(), &short?, &[0, b2, b3, 0]].concat(),
        Size::Twelve => [[code, flags].as_slice(), &short?, &[b0, b1, b2, b3, 0, 0]].concat(),
        Size::Sixteen => [
            [code, flags].as_slice(),
            &lba.to_be_bytes(),
            &[b0, b1, b2, b3, 0, 0],
        ]
        .concat(),
    })
}

/// INQUIRY of a VPD page.
pub(super) fn vpd(page: u8, allocation: u16) -> [u8; 6] {
    let [high, low] = allocation.to_be_bytes();
    [0x12, 1, page, high, low, 0]
}

/// READ CAPACITY(16).
pub(super) fn read_capacity_16(allocation: u8) -> [u8; 16] {
    [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, allocation, 0, 0]
}

/// A loop that must find something.
pub(super) fn some<T>(what: &str, found: Option<T>) -> Result<T> {
    match found {
        Some(found) => Ok(found),
        None => bail!("{what}"),
    }
}
