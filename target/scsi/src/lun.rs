//! Addressing of logical units: REPORT LUNS, and the commands that a LUN without a logical unit still
//! answers.

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    cdb::{Cdb, opcode},
    inquiry,
    plan::Reply,
    sense::Sense,
};

/// One LUN as REPORT LUNS lists it: peripheral addressing below 256, flat space addressing above (SAM-5
/// §4.7.7).
const fn encode(lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    if high == 0 {
        [0, low, 0, 0, 0, 0, 0, 0]
    } else {
        [0x40 | (high & 0x3f), low, 0, 0, 0, 0, 0, 0]
    }
}

/// REPORT LUNS (SPC-4 §6.33). Every SELECT REPORT that a device without well-known and administrative logical
/// units can answer is answered.
///
/// # Errors
/// INVALID FIELD IN CDB for a SELECT REPORT that is reserved or asks for subsidiary logical units.
pub(crate) fn report_luns(cdb: &Cdb, luns: &[u16]) -> Result<Reply, Sense> {
    let listed = match cdb.byte(2) {
        // All but well-known; all; all that are not subsidiary.
        0x00 | 0x02 | 0x11 => luns,
        // Well-known logical units; administrative logical units: there are none.
        0x01 | 0x10 => &[],
        _ => return Err(Sense::invalid_cdb(2)),
    };
    let mut data = BytesMut::with_capacity(8 + 8 * listed.len());
    data.put_u32(u32::try_from(8 * listed.len()).unwrap_or(u32::MAX));
    data.put_u32(0);
    for lun in listed {
        data.put_slice(&encode(*lun));
    }
    Ok(Reply::parameter_data(data.freeze(), u64::from(cdb.u32(6))))
}

/// Answers a command that was sent to a LUN without a logical unit (SPC-4 §6.6, SAM-5 §5.11): INQUIRY says
/// that there could be one, REPORT LUNS says which there are, REQUEST SENSE says what is wrong, everything
/// else fails with it.
pub fn absent_lun(cdb: &[u8], luns: &[u16]) -> Reply {
    let cdb = Cdb::new(cdb);
    let answer = match cdb.opcode() {
        opcode::INQUIRY if cdb.bit(1, 0x01) || cdb.byte(2) != 0 => Err(Sense::invalid_cdb(2)),
        opcode::INQUIRY => Ok(Reply::parameter_data(inquiry::absent(), u64::from(cdb.u16(3)))),
        opcode::REPORT_LUNS => report_luns(&cdb, luns),
        opcode::REQUEST_SENSE => {
            let sense: Bytes = Sense::NO_SUCH_UNIT.encode(cdb.bit(1, 0x01));
            Ok(Reply::parameter_data(sense, u64::from(cdb.byte(4))))
        }
        _ => Err(Sense::NO_SUCH_UNIT),
    };
    answer.unwrap_or_else(|sense| Reply::check(sense, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_luns_are_peripheral_and_large_ones_flat() {
        assert_eq!(encode(7), [0, 7, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode(0x123), [0x41, 0x23, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn truncation_leaves_the_list_length_alone() {
        // Windows 2003 asks with an allocation length of 16 first.
        let cdb = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0];
        let reply = absent_lun(&cdb, &[0, 1, 300]);
        assert_eq!(reply.data[..], [0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let none = absent_lun(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0]);
        assert_eq!((none.status, none.data.len()), (0, 0));
    }

    #[test]
    fn select_reports() {
        let length = |select: u8| {
            let reply = absent_lun(&[0xa0, 0, select, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[0, 1]);
            (reply.status == 0).then(|| reply.data.len())
        };
        assert_eq!([0, 1, 2, 3].map(length), [Some(24), Some(8), Some(24), None]);
        assert_eq!(
            [0x10, 0x11, 0x12, 0x13].map(length),
            [Some(8), Some(24), None, None]
        );
    }

    #[test]
    fn an_absent_lun_answers_three_commands() {
        let inquiry = absent_lun(&[0x12, 0, 0, 0, 96, 0], &[0]);
        assert_eq!((inquiry.status, inquiry.data[0]), (0, 0x7f));
        let sense = absent_lun(&[0x03, 0, 0, 0, 252, 0], &[0]);
        assert_eq!((sense.status, sense.data[2], sense.data[12]), (0, 5, 0x25));
        let ready = absent_lun(&[0; 6], &[0]);
        assert_eq!((ready.status, ready.sense[2], ready.sense[12]), (2, 5, 0x25));
    }
}
