//! What a LUN says about itself: page 0x83 as `STORAGE_DEVICE_ID_DESCRIPTOR` brings it, and as VSS wants it
//! (`VDS_LUN_INFORMATION`, MS docs). Owned values; the raw structures are `win::vds`.

use stillpoint_agentproto::LunId;

/// Designators that are looked at; a LUN of ours has three.
const DESIGNATORS_MAX: usize = 64;
/// `StorageIdTypeFCPHName`: NAA (SPC-4 §7.8.6.6).
pub(crate) const TYPE_NAA: u32 = 3;
/// `StorageIdCodeSetBinary`.
pub(crate) const CODE_SET_BINARY: u32 = 1;
/// `StorageIdAssocDevice`: of the logical unit, not of its port.
const ASSOCIATION_LUN: u32 = 0;

/// One designator of page 0x83 (SPC-4 §7.8.6).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Designator {
    /// 1 binary, 2 ASCII, 3 UTF-8.
    pub(crate) code_set: u32,
    /// 1 T10, 2 EUI-64, 3 NAA, 8 SCSI name.
    pub(crate) kind: u32,
    /// Its value.
    pub(crate) value: Vec<u8>,
}

/// `VDS_LUN_INFORMATION` without its pointers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct LunInfo {
    /// INQUIRY, 8 characters at most.
    pub(crate) vendor: String,
    /// INQUIRY, 16 characters at most.
    pub(crate) product: String,
    /// INQUIRY, 4 characters at most.
    pub(crate) revision: String,
    /// Page 0x80.
    pub(crate) serial: String,
    /// Page 0x83, those of the logical unit.
    pub(crate) designators: Vec<Designator>,
}

impl LunInfo {
    /// A LUN of Stillpoint with nothing but its identity.
    pub(crate) fn of_lun(lun: LunId, serial: &str) -> Self {
        Self {
            vendor: crate::volumes::VENDOR.to_owned(),
            serial: serial.to_owned(),
            designators: vec![naa_designator(lun)],
            ..Self::default()
        }
    }

    /// Its name: the first NAA designator of 16 bytes.
    pub(crate) fn lun(&self) -> Option<LunId> {
        self.designators.iter().find_map(|designator| {
            let is_naa = designator.kind == TYPE_NAA && designator.code_set == CODE_SET_BINARY;
            let id: [u8; 16] = designator.value.as_slice().try_into().ok()?;
            // 6h: IEEE registered extended, what every target of ours has.
            let first = id.first().copied()?;
            (is_naa && first >> 4 == 6).then_some(LunId(id))
        })
    }

    /// Whether both have a designator in common: (code set, type, bytes), as VSS compares.
    pub(crate) fn is_same_lun(&self, other: &Self) -> bool {
        self.designators.iter().any(|one| other.designators.contains(one))
    }

    /// The shadow copy of this LUN: its vendor, product and revision, the identity that the target reserved. It must equal
    /// what INQUIRY says later, or the import fails (VSS_S_SOME_SNAPSHOTS_NOT_IMPORTED).
    pub(crate) fn shadow(&self, lun: LunId, serial: &str) -> Self {
        Self {
            serial: serial.to_owned(),
            designators: vec![naa_designator(lun)],
            ..self.clone()
        }
    }

    /// The same for a snapshot of our own requester, which is never imported: an identity that no LUN has. (NAA 3h, locally
    /// assigned: eight bytes, SPC-4 §7.8.6.6.4.)
    pub(crate) fn placeholder(&self, snapshot: [u8; 16]) -> Self {
        let mut value: Vec<u8> = snapshot.iter().take(8).copied().collect();
        if let Some(first) = value.first_mut() {
            *first = 0x30 | (*first & 0x0f);
        }
        let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            serial: hex,
            designators: vec![Designator {
                code_set: CODE_SET_BINARY,
                kind: TYPE_NAA,
                value,
            }],
            ..self.clone()
        }
    }
}

fn naa_designator(lun: LunId) -> Designator {
    Designator {
        code_set: CODE_SET_BINARY,
        kind: TYPE_NAA,
        value: lun.0.to_vec(),
    }
}

/// Reads a `STORAGE_DEVICE_ID_DESCRIPTOR` (MS docs, ntddstor.h) and gives the designators of the logical unit. `None` when it is
/// not well formed: the bytes come from a driver, and a device behind it.
pub(crate) fn designators(bytes: &[u8]) -> Option<Vec<Designator>> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (size, count) = (word(4)?, word(8)?);
    let bytes = bytes.get(..usize::try_from(size).ok()?)?;
    let mut found = Vec::new();
    let mut at = 12;
    for index in 0..usize::try_from(count).ok()?.min(DESIGNATORS_MAX) {
        // STORAGE_IDENTIFIER: CodeSet, Type (4 bytes each), IdentifierSize, NextOffset (2 each), Association (4), bytes.
        let (code_set, kind) = (word(at)?, word(at + 4)?);
        let sizes = word(at + 8)?;
        let (len, next) = (
            usize::try_from(sizes & 0xffff).ok()?,
            usize::try_from(sizes >> 16).ok()?,
        );
        if word(at + 12)? == ASSOCIATION_LUN {
            let value = bytes.get(at + 16..at + 16 + len)?.to_vec();
            found.push(Designator {
                code_set,
                kind,
                value,
            });
        }
        if next == 0 {
            // NextOffset of the last one is 0: more are only promised.
            return (index + 1 == usize::try_from(count).ok()?).then_some(found);
        }
        at += next;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identifier(kind: u32, association: u32, value: &[u8], last: bool) -> Vec<u8> {
        let padded = (16 + value.len()).next_multiple_of(4);
        let mut bytes = [1u32.to_le_bytes(), kind.to_le_bytes()].concat();
        bytes.extend_from_slice(&u16::try_from(value.len()).expect("short").to_le_bytes());
        let next = if last {
            0
        } else {
            u16::try_from(padded).expect("short")
        };
        bytes.extend_from_slice(&next.to_le_bytes());
        bytes.extend_from_slice(&association.to_le_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(padded, 0);
        bytes
    }

    fn descriptor(identifiers: &[Vec<u8>]) -> Vec<u8> {
        let body = identifiers.concat();
        let words = [12, 12 + body.len(), identifiers.len()].map(|n| u32::try_from(n).expect("short"));
        let mut bytes = words.map(u32::to_le_bytes).concat();
        bytes.extend_from_slice(&body);
        bytes
    }

    #[test]
    fn the_naa_of_the_logical_unit_is_its_name() {
        let lun = LunId([0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        let bytes = descriptor(&[
            identifier(1, 0, b"STILLPNTdisk", false),
            // The target port's own NAA name is not the LUN's.
            identifier(3, 1, &[0x66; 16], false),
            identifier(3, 0, &lun.0, true),
        ]);
        let found = designators(&bytes).expect("well formed");
        assert_eq!(found.len(), 2);
        let info = LunInfo {
            designators: found,
            ..LunInfo::default()
        };
        assert_eq!(info.lun(), Some(lun));
        assert!(info.is_same_lun(&LunInfo::of_lun(lun, "x")));
        assert!(!info.is_same_lun(&info.placeholder([7; 16])));
    }

    #[test]
    fn no_bytes_make_it_panic_and_cut_ones_are_refused() {
        let whole = descriptor(&[
            identifier(1, 0, b"abcd", false),
            identifier(3, 0, &[0x60; 16], true),
        ]);
        for len in 0..whole.len() {
            assert_eq!(designators(&whole[..len]), None, "{len} bytes");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut broken = whole.clone();
                broken[at] ^= 1 << bit;
                // Whatever comes out of it: never a panic, and never bytes beyond the descriptor.
                let found = designators(&broken).unwrap_or_default();
                assert!(found.iter().all(|one| one.value.len() <= whole.len()));
            }
        }
        let endless = descriptor(&[identifier(1, 1, b"", false)]);
        assert_eq!(designators(&endless), Some(Vec::new()));
    }

    #[test]
    fn a_shadow_keeps_the_model_and_nothing_of_the_identity() {
        let source = LunInfo {
            product: "VIRTUAL-DISK".to_owned(),
            ..LunInfo::of_lun(LunId([0x60; 16]), "1")
        };
        let shadow = source.shadow(LunId([0x61; 16]), "2");
        assert_eq!(
            (shadow.lun(), shadow.serial.as_str()),
            (Some(LunId([0x61; 16])), "2")
        );
        assert_eq!(shadow.product, source.product);
        assert!(!shadow.is_same_lun(&source));
    }
}
