//! The command descriptor block: sixteen bytes and the fields that commands have in common.

/// Operation codes that this device server knows.
#[expect(missing_docs, reason = "the names are the standards' command names")]
pub mod opcode {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SELECT_6: u8 = 0x15;
    pub const RESERVE_6: u8 = 0x16;
    pub const RELEASE_6: u8 = 0x17;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const SEND_DIAGNOSTIC: u8 = 0x1d;
    pub const PREVENT_ALLOW_MEDIUM_REMOVAL: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const WRITE_AND_VERIFY_10: u8 = 0x2e;
    pub const VERIFY_10: u8 = 0x2f;
    pub const PRE_FETCH_10: u8 = 0x34;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const READ_DEFECT_DATA_10: u8 = 0x37;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const LOG_SENSE: u8 = 0x4d;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const RESERVE_10: u8 = 0x56;
    pub const RELEASE_10: u8 = 0x57;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const PERSISTENT_RESERVE_IN: u8 = 0x5e;
    pub const PERSISTENT_RESERVE_OUT: u8 = 0x5f;
    pub const THIRD_PARTY_COPY_OUT: u8 = 0x83;
    pub const THIRD_PARTY_COPY_IN: u8 = 0x84;
    pub const READ_16: u8 = 0x88;
    pub const COMPARE_AND_WRITE: u8 = 0x89;
    pub const WRITE_16: u8 = 0x8a;
    pub const ORWRITE_16: u8 = 0x8b;
    pub const WRITE_AND_VERIFY_16: u8 = 0x8e;
    pub const VERIFY_16: u8 = 0x8f;
    pub const PRE_FETCH_16: u8 = 0x90;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const MAINTENANCE_IN: u8 = 0xa3;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const WRITE_AND_VERIFY_12: u8 = 0xae;
    pub const VERIFY_12: u8 = 0xaf;
    pub const READ_DEFECT_DATA_12: u8 = 0xb7;
}

/// A CDB of up to sixteen bytes, padded with zeroes: iSCSI has room for sixteen, and longer ones are of
/// commands that this device server does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cdb(pub(crate) [u8; 16]);

impl Cdb {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut cdb = [0; 16];
        for (to, from) in cdb.iter_mut().zip(bytes) {
            *to = *from;
        }
        Self(cdb)
    }

    pub(crate) const fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// SERVICE ACTION of the commands that have one, in the low five bits of byte 1.
    pub(crate) const fn service_action(&self) -> u8 {
        self.0[1] & 0x1f
    }

    pub(crate) fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    pub(crate) fn bit(&self, at: usize, mask: u8) -> bool {
        self.byte(at) & mask != 0
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        (u32::from(self.u16(at)) << 16) | u32::from(self.u16(at + 2))
    }

    pub(crate) fn u64(&self, at: usize) -> u64 {
        (u64::from(self.u32(at)) << 32) | u64::from(self.u32(at + 4))
    }

    /// Length in bytes as the group code of the operation code gives it (SPC-4 §4.2.5.1); 16 for the groups
    /// without one.
    pub(crate) const fn len(&self) -> usize {
        match self.0[0] >> 5 {
            0 => 6,
            1 | 2 => 10,
            5 => 12,
            _ => 16,
        }
    }

    /// CONTROL, the last byte.
    pub(crate) fn control(&self) -> u8 {
        self.byte(self.len() - 1)
    }

    /// The LBA and transfer length of a media access CDB, by its length (SBC-3 §4.2, "CDB usage"). In a
    /// 6-byte CDB a length of zero means 256 blocks (READ(6), WRITE(6)).
    pub(crate) fn extent(&self) -> Blocks {
        let (lba, count) = match self.len() {
            6 => {
                let lba = self.u32(0) & 0x001f_ffff;
                let count = u32::from(self.0[4]);
                (u64::from(lba), if count == 0 { 256 } else { count })
            }
            10 => (u64::from(self.u32(2)), u32::from(self.u16(7))),
            12 => (u64::from(self.u32(2)), self.u32(6)),
            _ => (self.u64(2), self.u32(10)),
        };
        Blocks {
            lba,
            count: u64::from(count),
        }
    }

    /// The byte in which the transfer length starts: where a field pointer points when it is too large.
    pub(crate) const fn length_field(&self) -> u16 {
        match self.len() {
            6 => 4,
            10 => 7,
            12 => 6,
            _ => 10,
        }
    }
}

/// A run of logical blocks as a CDB names it: not yet checked against the capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) lba: u64,
    pub(crate) count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_by_cdb_length() {
        let cases: [(&[u8], u64, u64); 6] = [
            (&[0x08, 0xff, 0xff, 0xff, 0, 0], 0x1f_ffff, 256),
            (&[0x0a, 0, 0, 1, 3, 0], 1, 3),
            (&[0x28, 0, 1, 2, 3, 4, 0, 5, 6, 0], 0x0102_0304, 0x0506),
            (&[0xa8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0], 0x0102_0304, 0x0506_0708),
            (
                &[0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0],
                0x0102_0304_0506_0708,
                0x090a_0b0c,
            ),
            (&[0x28, 0, 0xff], 0xff00_0000, 0),
        ];
        for (bytes, lba, count) in cases {
            assert_eq!(Cdb::new(bytes).extent(), Blocks { lba, count }, "{bytes:02x?}");
        }
    }
}
