//! The two slots at the start of the data file: they name the pool and remember how far its commits had come.

use crate::codec::{Dec, Enc, seal, unseal};
use crate::disk::Disk;
use crate::record::FORMAT;
use crate::{Error, Result};

/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 4096;
/// Bytes at the start of the data file that no grain uses.
pub const RESERVED_BYTES: u64 = 2 * SLOT_BYTES;
const MAGIC: &[u8; 16] = b"STILLPOINT DATA\n";

/// What a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Names the pool.
    pub pool_id: [u8; 16],
    /// Grain in bytes.
    pub grain_bytes: u32,
    /// A transaction group that was durable in the metadata store when the slot was written.
    pub txg: u64,
}

impl Superblock {
    /// Slot number that a transaction group is written to.
    #[must_use]
    pub fn slot(txg: u64) -> u64 {
        txg % 2
    }

    /// The slot's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Enc::default();
        e.raw(MAGIC);
        e.u32(FORMAT);
        e.raw(&self.pool_id);
        e.u32(self.grain_bytes);
        e.u64(self.txg);
        let mut bytes = seal(MAGIC, e.into_bytes());
        bytes.resize(4096, 0);
        bytes
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// `Corrupt`, or `Version` for a newer format.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        const LEN: usize = 16 + 4 + 16 + 4 + 8 + 4;
        let sealed = bytes
            .get(..LEN)
            .ok_or_else(|| Error::corrupt("superblock", "too short"))?;
        let payload = unseal(MAGIC, sealed).map_err(|_| Error::corrupt("superblock", "checksum"))?;
        let mut d = Dec::new(payload, "superblock");
        if d.raw(16)? != MAGIC {
            return Err(d.bad("magic"));
        }
        let found = d.u32()?;
        if found != FORMAT {
            return Err(Error::Version {
                found,
                supported: FORMAT,
            });
        }
        Ok(Self {
            pool_id: d.array()?,
            grain_bytes: d.u32()?,
            txg: d.u64()?,
        })
    }

    /// Both slots of a data file.
    ///
    /// # Errors
    /// `Io`; each slot has its own verdict.
    pub fn read(disk: &dyn Disk) -> Result<[Result<Self>; 2]> {
        let slot = |n: u64| -> Result<Result<Self>> {
            let mut bytes = vec![0; 4096];
            disk.read_at(n * SLOT_BYTES, &mut bytes)
                .map_err(|e| Error::io("read", "superblock", e))?;
            Ok(Self::decode(&bytes))
        };
        Ok([slot(0)?, slot(1)?])
    }

    /// The newest valid slot. One bad slot is what a power cut during its write leaves.
    ///
    /// # Errors
    /// `Io`, `Version`, or `Corrupt` when neither is valid.
    pub fn newest(disk: &dyn Disk) -> Result<Self> {
        match Self::read(disk)? {
            [Ok(a), Ok(b)] => Ok(if a.txg >= b.txg { a } else { b }),
            [Ok(one), Err(e)] | [Err(e), Ok(one)] => {
                tracing::warn!("one superblock slot is not valid ({e}); using the other");
                Ok(one)
            }
            [Err(v @ Error::Version { .. }), _] | [_, Err(v)] => Err(v),
        }
    }

    /// Writes this into both slots of a new data file.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_both(&self, disk: &dyn Disk) -> Result<()> {
        [0, 1].iter().try_for_each(|slot| self.write_to(*slot, disk))
    }

    /// Writes this into its slot. Not synced: the next sync of the data file makes it durable.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, disk: &dyn Disk) -> Result<()> {
        self.write_to(Self::slot(self.txg), disk)
    }

    fn write_to(&self, slot: u64, disk: &dyn Disk) -> Result<()> {
        disk.write_at(slot * SLOT_BYTES, &self.encode())
            .map_err(|e| Error::io("write", "superblock", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_slot_leaves_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let disk = crate::disk::FileDisk::create(&dir.path().join("data")).unwrap();
        assert!(Superblock::newest(&disk).is_err());
        let at = |txg| Superblock {
            pool_id: [3; 16],
            grain_bytes: 4096,
            txg,
        };
        at(4).write(&disk).unwrap();
        at(5).write(&disk).unwrap();
        assert_eq!(Superblock::newest(&disk).unwrap(), at(5));
        disk.write_at(SLOT_BYTES + 30, b"x").unwrap();
        assert_eq!(Superblock::newest(&disk).unwrap(), at(4));
        disk.write_at(30, b"x").unwrap();
        assert!(Superblock::newest(&disk).is_err());
    }
}
