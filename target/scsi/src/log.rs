//! LOG SENSE (SPC-4 §6.8): the list of pages, and the logical block provisioning page (SBC-3 §6.4.4).

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    cdb::Cdb,
    plan::{Answer, BlockOp, Reply, ThinFigures},
    sense::Sense,
    unit::{Ready, Unit},
};

const SUPPORTED_PAGES: u8 = 0x00;
const LOGICAL_BLOCK_PROVISIONING: u8 = 0x0c;
const ALL_SUBPAGES: u8 = 0xff;

/// LOG SENSE. Only cumulative values (PC 01b) are kept; as they are also the default and threshold answer,
/// every PC is answered alike.
pub(crate) fn sense(unit: &Unit, cdb: &Cdb) -> Result<Ready, Sense> {
    if cdb.bit(1, 0x01) {
        // SP: there is nothing that could be saved.
        return Err(Sense::invalid_cdb(1));
    }
    let allocation = u64::from(cdb.u16(7));
    match (cdb.byte(2) & 0x3f, cdb.byte(3)) {
        (SUPPORTED_PAGES, 0x00) => Ok(Ready::Reply(Reply::parameter_data(
            Bytes::from_static(&[
                SUPPORTED_PAGES,
                0,
                0,
                2,
                SUPPORTED_PAGES,
                LOGICAL_BLOCK_PROVISIONING,
            ]),
            allocation,
        ))),
        (SUPPORTED_PAGES, ALL_SUBPAGES) => Ok(Ready::Reply(Reply::parameter_data(
            Bytes::from_static(&[
                0x40,
                0xff,
                0,
                6,
                0x00,
                0x00,
                0x00,
                0xff,
                LOGICAL_BLOCK_PROVISIONING,
                0x00,
            ]),
            allocation,
        ))),
        (LOGICAL_BLOCK_PROVISIONING, 0x00) => {
            let start = cdb.u16(5);
            if start > USED {
                return Err(Sense::invalid_cdb(5));
            }
            let threshold_set_bytes = unit.threshold_set_bytes();
            Ok(Ready::Op(
                BlockOp::ThinFigures,
                Answer::ThinLog {
                    threshold_set_bytes,
                    start,
                    allocation,
                },
            ))
        }
        (SUPPORTED_PAGES | LOGICAL_BLOCK_PROVISIONING, _) => Err(Sense::invalid_cdb(3)),
        _ => Err(Sense::invalid_cdb(2)),
    }
}

const AVAILABLE: u16 = 0x0001;
const USED: u16 = 0x0002;

/// The page with its two counts in threshold sets, from parameter `start` on.
pub(crate) fn thin_page(figures: ThinFigures, threshold_set_bytes: u64, start: u16) -> Bytes {
    let sets = |bytes: u64| u32::try_from(bytes / threshold_set_bytes.max(1)).unwrap_or(u32::MAX);
    // Used space is rounded up: a unit that holds one block uses something.
    let used = figures
        .used_bytes
        .saturating_add(threshold_set_bytes.saturating_sub(1));
    let mut parameters = BytesMut::with_capacity(24);
    for (code, count) in [(AVAILABLE, sets(figures.available_bytes)), (USED, sets(used))] {
        if code >= start {
            parameters.put_u16(code);
            // FORMAT AND LINKING 11b: a binary list; length 8.
            parameters.put_slice(&[0x03, 0x08]);
            parameters.put_u32(count);
            // SCOPE: available space is shared with other logical units (10b), used space is this unit's
            // (01b).
            parameters.put_slice(&[if code == AVAILABLE { 0x02 } else { 0x01 }, 0, 0, 0]);
        }
    }
    let mut page = BytesMut::with_capacity(4 + parameters.len());
    // DS one: nothing is saved.
    page.put_slice(&[0x80 | LOGICAL_BLOCK_PROVISIONING, 0]);
    page.put_u16(u16::try_from(parameters.len()).unwrap_or(u16::MAX));
    page.put(parameters);
    page.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_provisioning_page_counts_threshold_sets() {
        let figures = ThinFigures {
            available_bytes: 5 << 20,
            used_bytes: 1,
        };
        let page = thin_page(figures, 1 << 20, 0);
        assert_eq!(page[..4], [0x8c, 0, 0, 24]);
        assert_eq!(page[4..16], [0, 1, 3, 8, 0, 0, 0, 5, 2, 0, 0, 0]);
        assert_eq!(page[16..], [0, 2, 3, 8, 0, 0, 0, 1, 1, 0, 0, 0]);
        assert_eq!(thin_page(figures, 1 << 20, 2)[..8], [0x8c, 0, 0, 12, 0, 2, 3, 8]);
    }
}
