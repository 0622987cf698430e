//! The parameter lists of EXTENDED COPY (SPC-4 §6.4, §6.5) with list identifiers of one byte and of four.
//!
//! Units are named by identification descriptors (E4h), segments copy from block device to block device (02h): what ESXi
//! and sg_xcopy send.

use crate::{
    cdb::Cdb,
    sense::{Sense, SenseKey},
};

use super::{CopySegment, CopyUnit, CopyWork, List, ListId, Parsed, limits};

const CSCD_LEN: usize = 32;
const SEGMENT_LEN: usize = 28;

/// Where the lists of descriptors are in the parameter list.
struct Layout {
    header: usize,
    units_len: usize,
    segments_len: usize,
    /// Byte of the header that a wrong length of the unit list is reported at.
    units_len_at: u16,
    segments_len_at: u16,
}

/// EXTENDED COPY(LID1): a header of 16 bytes.
///
/// # Errors
/// The sense of a list that is wrong.
pub(super) fn lid1(cdb: &Cdb, data_out: &[u8]) -> Result<Option<Parsed>, Sense> {
    let Some(list) = List::of(cdb, data_out)? else {
        return Ok(None);
    };
    let id = list.byte(0)?;
    let listed = list_id(list.byte(1)?, ListId::One(id), id == 0, 0)?;
    let layout = Layout {
        header: 16,
        units_len: usize::from(list.u16(2)?),
        segments_len: usize::try_from(list.u32(8)?).map_err(|_| Sense::LIST_LENGTH)?,
        units_len_at: 2,
        segments_len_at: 8,
    };
    if list.u32(12)? != 0 {
        return Err(Sense::INLINE_DATA);
    }
    parsed(list, listed, false, &layout).map(Some)
}

/// EXTENDED COPY(LID4): a header of 48 bytes.
///
/// # Errors
/// The sense of a list that is wrong.
pub(super) fn lid4(cdb: &Cdb, data_out: &[u8]) -> Result<Option<Parsed>, Sense> {
    let Some(list) = List::of(cdb, data_out)? else {
        return Ok(None);
    };
    // PARAMETER LIST FORMAT, and the one header descriptor that there is.
    if list.byte(0)? != 0x01 {
        return Err(Sense::invalid_list(0));
    }
    if list.u16(2)? != 0x0020 {
        return Err(Sense::invalid_list(2));
    }
    if list.byte(16)? != 0xff {
        return Err(Sense::invalid_list(16));
    }
    let id = list.u32(20)?;
    let listed = list_id(list.byte(1)?, ListId::Four(id), id == 0, 20)?;
    let immediate = list.byte(15)? & 0x01 != 0;
    let layout = Layout {
        header: 48,
        units_len: usize::from(list.u16(42)?),
        segments_len: usize::from(list.u16(44)?),
        units_len_at: 42,
        segments_len_at: 44,
    };
    if list.u16(46)? != 0 {
        return Err(Sense::INLINE_DATA);
    }
    parsed(list, listed, immediate, &layout).map(Some)
}

/// LIST ID USAGE: 00b and 10b name the copy (whether its data is held does not matter, as there is none), 11b does not,
/// and then the identifier has to be zero.
fn list_id(flags: u8, id: ListId, is_zero: bool, at: u16) -> Result<Option<ListId>, Sense> {
    match (flags >> 3) & 0x03 {
        0b00 | 0b10 => Ok(Some(id)),
        0b11 if is_zero => Ok(None),
        0b11 => Err(Sense::invalid_list(at)),
        _ => Err(Sense::invalid_list(1)),
    }
}

fn parsed(list: List<'_>, id: Option<ListId>, immediate: bool, layout: &Layout) -> Result<Parsed, Sense> {
    let Layout {
        header,
        units_len,
        segments_len,
        ..
    } = *layout;
    // Before the counts: MAXIMUM DESCRIPTOR LIST LENGTH bounds both lists together.
    if units_len.saturating_add(segments_len) > limits::MAX_DESCRIPTOR_BYTES {
        return Err(Sense::LIST_LENGTH);
    }
    let (_, rest) = list.split(header)?;
    let (units, rest) = rest.split(units_len)?;
    let (segments, _) = rest.split(segments_len)?;
    if units_len % CSCD_LEN != 0 {
        return Err(Sense::invalid_list(layout.units_len_at));
    }
    if units_len / CSCD_LEN > limits::MAX_CSCD {
        return Err(Sense::TOO_MANY_TARGETS);
    }
    let units: Vec<CopyUnit> = (header..)
        .step_by(CSCD_LEN)
        .zip(units.0.chunks_exact(CSCD_LEN))
        .map(|(at, bytes)| unit(List(bytes), at))
        .collect::<Result<_, _>>()?;
    let segments = self::segments(segments, units.len(), header + units_len, layout.segments_len_at)?;
    Ok(Parsed {
        list: id,
        immediate,
        work: CopyWork::Segments { units, segments },
        transfer_len: list.0.len() as u64,
    })
}

/// Identification descriptor CSCD descriptor (SPC-4 §6.4.5.2). LU ID TYPE and NUL are of no meaning for it.
fn unit(descriptor: List<'_>, at: usize) -> Result<CopyUnit, Sense> {
    if descriptor.byte(0)? != limits::IDENTIFICATION_CSCD {
        return Err(Sense::UNSUPPORTED_TARGET.pointing(at));
    }
    if descriptor.byte(1)? & 0x1f != 0 {
        // INCORRECT COPY TARGET DEVICE TYPE: all units here are block devices.
        return Err(Sense::new(SenseKey::COPY_ABORTED, 0x0d, 0x03));
    }
    let designator = descriptor.array::<4>(4)?;
    // CODE SET binary; ASSOCIATION logical unit and DESIGNATOR TYPE NAA; DESIGNATOR LENGTH.
    let [code_set, kind, _, len] = designator;
    let is_naa = code_set & 0x0f == 0x01 && kind & 0x3f == 0x03 && len == 16;
    Ok(CopyUnit {
        naa: if is_naa { Some(descriptor.array(8)?) } else { None },
        block_len: descriptor.u32(28)? & 0x00ff_ffff,
    })
}

/// `at` is where the segments start in the whole list.
fn segments(list: List<'_>, units: usize, at: usize, len_at: u16) -> Result<Vec<CopySegment>, Sense> {
    let mut segments = Vec::new();
    let mut rest = list;
    while !rest.0.is_empty() {
        let at = at + (list.0.len() - rest.0.len());
        if rest.byte(0)? != limits::BLOCK_TO_BLOCK_SEGMENT {
            return Err(Sense::UNSUPPORTED_SEGMENT.pointing(at));
        }
        if usize::from(rest.u16(2)?) != SEGMENT_LEN - 4 {
            return Err(Sense::invalid_list(0).pointing(at + 2));
        }
        if segments.len() >= limits::MAX_SEGMENTS {
            return Err(Sense::TOO_MANY_SEGMENTS);
        }
        let (one, next) = rest.split(SEGMENT_LEN).map_err(|_| Sense::invalid_list(len_at))?;
        let number = u16::try_from(segments.len()).unwrap_or(u16::MAX);
        segments.push(segment(one, units, number)?);
        rest = next;
    }
    Ok(segments)
}

/// Block device to block device (SPC-4 §6.4.6.3).
fn segment(descriptor: List<'_>, units: usize, number: u16) -> Result<CopySegment, Sense> {
    let segment = CopySegment {
        source: descriptor.u16(4)?,
        destination: descriptor.u16(6)?,
        blocks: descriptor.u16(10)?,
        by_destination: descriptor.byte(1)? & 0x02 != 0,
        source_lba: descriptor.u64(12)?,
        destination_lba: descriptor.u64(20)?,
    };
    if [segment.source, segment.destination]
        .iter()
        .any(|index| usize::from(*index) >= units)
    {
        // UNREACHABLE COPY TARGET.
        return Err(Sense {
            segment: Some(number),
            ..Sense::new(SenseKey::COPY_ABORTED, 0x08, 0x04)
        });
    }
    Ok(segment)
}
