//! Sense data (SPC-4 §4.5): what goes with a CHECK CONDITION, in fixed or descriptor format.

use bytes::{BufMut, Bytes, BytesMut};

/// Sense key (SPC-4 table 48), four bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SenseKey(pub u8);

impl SenseKey {
    /// Nothing to report.
    pub const NO_SENSE: Self = Self(0x0);
    /// Not now; soon.
    pub const NOT_READY: Self = Self(0x2);
    /// The medium could not be read or written.
    pub const MEDIUM_ERROR: Self = Self(0x3);
    /// The device server itself failed.
    pub const HARDWARE_ERROR: Self = Self(0x4);
    /// The command was wrong.
    pub const ILLEGAL_REQUEST: Self = Self(0x5);
    /// Something happened that this I_T nexus has to know before it goes on.
    pub const UNIT_ATTENTION: Self = Self(0x6);
    /// The medium is protected (or, for a thin unit, full).
    pub const DATA_PROTECT: Self = Self(0x7);
    /// A third-party copy ended before it was complete.
    pub const COPY_ABORTED: Self = Self(0xa);
    /// The device server gave the command up; the initiator may send it again.
    pub const ABORTED_COMMAND: Self = Self(0xb);
    /// The data on the medium is not the data that was sent.
    pub const MISCOMPARE: Self = Self(0xe);
}

/// Where an illegal value stands: the sense-key specific field pointer (SPC-4 §4.5.2.4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldPointer {
    /// In the CDB, or else in the parameter list.
    pub in_cdb: bool,
    /// The byte with the field.
    pub byte: u16,
}

/// One sense condition, before it has a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: SenseKey,
    /// ADDITIONAL SENSE CODE.
    pub asc: u8,
    /// ADDITIONAL SENSE CODE QUALIFIER.
    pub ascq: u8,
    /// INFORMATION: an LBA for a medium error, a byte offset for a miscompare.
    pub information: Option<u64>,
    /// Which field was illegal, when one was.
    pub field: Option<FieldPointer>,
    /// Number of the copy segment that failed: COMMAND-SPECIFIC INFORMATION (SPC-4 §5.16.7.4).
    pub segment: Option<u16>,
}

impl Sense {
    /// A sense condition without INFORMATION and field pointer.
    pub const fn new(key: SenseKey, asc: u8, ascq: u8) -> Self {
        Self {
            key,
            asc,
            ascq,
            information: None,
            field: None,
            segment: None,
        }
    }

    /// NO ADDITIONAL SENSE INFORMATION: what REQUEST SENSE says when there is nothing to say.
    pub const NONE: Self = Self::new(SenseKey::NO_SENSE, 0x00, 0x00);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x20, 0x00);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x21, 0x00);
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const NO_SUCH_UNIT: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x25, 0x00);
    /// PARAMETER LIST LENGTH ERROR.
    pub const LIST_LENGTH: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x1a, 0x00);
    /// INVALID FIELD IN COMMAND INFORMATION UNIT: the data that came is not what the CDB speaks of.
    pub const DATA_OUT_LENGTH: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x0e, 0x03);
    /// INVALID RELEASE OF PERSISTENT RESERVATION.
    pub const INVALID_RELEASE: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x04);
    /// OPERATION IN PROGRESS: this list identifier names a copy that runs.
    pub const OPERATION_IN_PROGRESS: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x00, 0x16);
    /// TOO MANY TARGET DESCRIPTORS.
    pub const TOO_MANY_TARGETS: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x06);
    /// UNSUPPORTED TARGET DESCRIPTOR TYPE CODE.
    pub const UNSUPPORTED_TARGET: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x07);
    /// TOO MANY SEGMENT DESCRIPTORS.
    pub const TOO_MANY_SEGMENTS: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x08);
    /// UNSUPPORTED SEGMENT DESCRIPTOR TYPE CODE.
    pub const UNSUPPORTED_SEGMENT: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x09);
    /// INLINE DATA LENGTH EXCEEDED: there is none.
    pub const INLINE_DATA: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x0b);
    /// INVALID TOKEN OPERATION, UNSUPPORTED TOKEN TYPE.
    pub const TOKEN_TYPE: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x23, 0x01);
    /// INVALID TOKEN OPERATION, INVALID TOKEN LENGTH.
    pub const TOKEN_LENGTH: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x23, 0x0a);
    /// INSUFFICIENT REGISTRATION RESOURCES.
    pub const NO_REGISTRATION_RESOURCES: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x55, 0x04);
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: Self = Self::new(SenseKey::DATA_PROTECT, 0x27, 0x00);
    /// LOGICAL UNIT SOFTWARE WRITE PROTECTED (the SWP bit of the control mode page).
    pub const SOFTWARE_WRITE_PROTECTED: Self = Self::new(SenseKey::DATA_PROTECT, 0x27, 0x02);
    /// SPACE ALLOCATION FAILED WRITE PROTECT: a thin unit without space.
    pub const NO_SPACE: Self = Self::new(SenseKey::DATA_PROTECT, 0x27, 0x07);
    /// LOGICAL UNIT NOT READY, SPACE ALLOCATION IN PROGRESS: Windows repeats the command four times, a second apart.
    pub const SPACE_IN_PROGRESS: Self = Self::new(SenseKey::NOT_READY, 0x04, 0x14);
    /// INTERNAL TARGET FAILURE.
    pub const TARGET_FAILURE: Self = Self::new(SenseKey::HARDWARE_ERROR, 0x44, 0x00);

    /// INVALID FIELD IN CDB, pointing at its byte.
    pub const fn invalid_cdb(byte: u16) -> Self {
        Self {
            field: Some(FieldPointer { in_cdb: true, byte }),
            ..Self::new(SenseKey::ILLEGAL_REQUEST, 0x24, 0x00)
        }
    }

    /// INVALID FIELD IN PARAMETER LIST, pointing at its byte.
    pub const fn invalid_list(byte: u16) -> Self {
        Self {
            field: Some(FieldPointer { in_cdb: false, byte }),
            ..Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x00)
        }
    }

    /// MISCOMPARE DURING VERIFY OPERATION; `offset` counts bytes from the start of the data-out buffer (SBC-3
    /// §5.2).
    pub const fn miscompare(offset: u64) -> Self {
        Self {
            information: Some(offset),
            ..Self::new(SenseKey::MISCOMPARE, 0x1d, 0x00)
        }
    }

    /// The same condition with a field pointer to this byte of the parameter list.
    #[must_use]
    pub(crate) fn pointing(mut self, byte: usize) -> Self {
        self.field = Some(FieldPointer {
            in_cdb: false,
            byte: u16::try_from(byte).unwrap_or(u16::MAX),
        });
        self
    }

    /// The same condition with an INFORMATION field.
    #[must_use]
    pub const fn with_information(mut self, information: u64) -> Self {
        self.information = Some(information);
        self
    }

    /// Encodes in descriptor format (72h) when `descriptor`, else in fixed format (70h, 18 bytes).
    pub fn encode(&self, descriptor: bool) -> Bytes {
        if descriptor {
            self.encode_descriptor()
        } else {
            self.encode_fixed()
        }
    }

    fn encode_fixed(&self) -> Bytes {
        let mut s = [0_u8; 18];
        s[0] = 0x70;
        // INFORMATION has four bytes here: a larger value leaves VALID at zero (SPC-4 §4.5.3).
        if let Some(Ok(information)) = self.information.map(u32::try_from) {
            s[0] |= 0x80;
            s[3..7].copy_from_slice(&information.to_be_bytes());
        }
        s[2] = self.key.0;
        s[7] = 10;
        if let Some(segment) = self.segment {
            // Bytes 8 and 9 would point at the sense data of the copy's source and destination; none is forwarded.
            s[10..12].copy_from_slice(&segment.to_be_bytes());
        }
        s[12] = self.asc;
        s[13] = self.ascq;
        if let Some(field) = self.field {
            let [high, low] = field.byte.to_be_bytes();
            (s[15], s[16], s[17]) = (field_flags(field), high, low);
        }
        Bytes::copy_from_slice(&s)
    }

    fn encode_descriptor(&self) -> Bytes {
        let mut s = BytesMut::with_capacity(40);
        s.put_slice(&[0x72, self.key.0, self.asc, self.ascq, 0, 0, 0]);
        let when = |there: bool, len: u8| if there { len } else { 0 };
        s.put_u8(
            when(self.information.is_some(), 12)
                + when(self.segment.is_some(), 12)
                + when(self.field.is_some(), 8),
        );
        if let Some(information) = self.information {
            s.put_slice(&[0x00, 0x0a, 0x80, 0x00]);
            s.put_u64(information);
        }
        if let Some(segment) = self.segment {
            s.put_slice(&[0x01, 0x0a, 0, 0]);
            s.put_u64(u64::from(segment));
        }
        if let Some(field) = self.field {
            s.put_slice(&[0x02, 0x06, 0, 0, field_flags(field)]);
            s.put_u16(field.byte);
            s.put_u8(0);
        }
        s.freeze()
    }
}

/// SKSV, and C/D for the CDB; BPV stays zero: we point at bytes.
const fn field_flags(field: FieldPointer) -> u8 {
    if field.in_cdb { 0xc0 } else { 0x80 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format_points_at_the_field() {
        let sense = Sense::invalid_cdb(8).encode(false);
        assert_eq!(
            &sense[..],
            [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xc0, 0, 8]
        );
    }

    #[test]
    fn fixed_format_carries_information_only_when_it_fits() {
        let small = Sense::miscompare(0x1ff).encode(false);
        assert_eq!(small[0], 0xf0);
        assert_eq!(small[3..7], [0, 0, 1, 0xff]);
        let large = Sense::new(SenseKey::MEDIUM_ERROR, 0x11, 0)
            .with_information(1 << 33)
            .encode(false);
        assert_eq!(large[0], 0x70);
        assert_eq!(large[3..7], [0; 4]);
    }

    #[test]
    fn descriptor_format_carries_sixty_four_bits() {
        let sense = Sense::new(SenseKey::MEDIUM_ERROR, 0x11, 0)
            .with_information(1 << 33)
            .encode(true);
        assert_eq!(&sense[..8], [0x72, 3, 0x11, 0, 0, 0, 0, 12]);
        assert_eq!(&sense[8..], [0, 10, 0x80, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
        let field = Sense::invalid_list(0x102).encode(true);
        assert_eq!(
            &field[..],
            [0x72, 5, 0x26, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0x80, 1, 2, 0]
        );
    }

    #[test]
    fn the_failed_segment_is_command_specific_information() {
        let sense = Sense {
            segment: Some(0x102),
            ..Sense::new(SenseKey::COPY_ABORTED, 0x0d, 0x02)
        };
        assert_eq!(sense.encode(false)[8..12], [0, 0, 1, 2]);
        let descriptor = sense.encode(true);
        assert_eq!(descriptor[..8], [0x72, 0x0a, 0x0d, 0x02, 0, 0, 0, 12]);
        assert_eq!(descriptor[8..], [1, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    }
}
