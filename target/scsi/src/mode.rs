//! Mode pages (SPC-4 §7.5, SBC-3 §6.5): MODE SENSE and MODE SELECT.
//!
//! Three bits can be changed: WCE, D_SENSE and SWP. Only WCE is kept over restarts, as only page 08h says PS.

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    NexusId,
    attention::UnitAttention,
    cdb::{Cdb, opcode},
    plan::{Answer, BlockOp, Reply},
    sense::Sense,
    unit::{Ready, Unit},
};

/// What an initiator saved with MODE SELECT, for the owner to keep over restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedModePages {
    /// WCE.
    pub write_cache: bool,
    /// The write cache was switched off just now: everything acknowledged must be durable before the answer.
    pub flush: bool,
}

/// The changeable bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) write_cache: bool,
    pub(crate) descriptor_sense: bool,
    pub(crate) software_write_protect: bool,
}

/// Current values, and the saved and default ones behind them.
#[derive(Debug)]
pub(crate) struct ModePages {
    pub(crate) current: Settings,
    saved_write_cache: bool,
    default_write_cache: bool,
    /// Soft thresholds of the available space, in threshold sets.
    thresholds: Vec<u32>,
}

/// Most thresholds that mode page 1Ch/02h lists: MODE SENSE(6) has 255 bytes for all pages.
pub const MAX_THIN_THRESHOLDS: usize = 4;

impl ModePages {
    pub(crate) const fn new(write_cache: bool) -> Self {
        Self {
            current: Self::start(write_cache),
            saved_write_cache: write_cache,
            default_write_cache: write_cache,
            thresholds: Vec::new(),
        }
    }

    /// Whether these are others than before.
    pub(crate) fn set_thresholds(&mut self, thresholds: Vec<u32>) -> bool {
        let changed = self.thresholds != thresholds;
        self.thresholds = thresholds;
        changed
    }

    const fn start(write_cache: bool) -> Settings {
        Settings {
            write_cache,
            descriptor_sense: false,
            software_write_protect: false,
        }
    }

    /// A reset brings the saved values back (SPC-4 §5.6.4).
    pub(crate) const fn reset(&mut self) {
        self.current = Self::start(self.saved_write_cache);
    }

    const fn values(&self, control: PageControl) -> Settings {
        match control {
            PageControl::Current => self.current,
            PageControl::Changeable => Settings {
                write_cache: true,
                descriptor_sense: true,
                software_write_protect: true,
            },
            PageControl::Default => Self::start(self.default_write_cache),
            PageControl::Saved => Self::start(self.saved_write_cache),
        }
    }
}

/// PC of MODE SENSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PageControl {
    Current,
    Changeable,
    Default,
    Saved,
}

const READ_WRITE_ERROR_RECOVERY: u8 = 0x01;
const DISCONNECT_RECONNECT: u8 = 0x02;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const POWER_CONDITION: u8 = 0x1a;
const INFORMATIONAL_EXCEPTIONS: u8 = 0x1c;
const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// Page code and subpage code, in the order in which MODE SENSE returns them.
const PAGES: [(u8, u8); 7] = [
    (READ_WRITE_ERROR_RECOVERY, 0),
    (DISCONNECT_RECONNECT, 0),
    (CACHING, 0),
    (CONTROL, 0),
    (POWER_CONDITION, 0),
    (INFORMATIONAL_EXCEPTIONS, 0),
    // Logical block provisioning (SBC-3 §6.5.8): the thresholds that the owner watches.
    (INFORMATIONAL_EXCEPTIONS, 2),
];

/// The logical block provisioning page: SITUA zero (every I_T nexus hears of a threshold), and a descriptor for each one:
/// enabled, soft, armed while space decreases; the resource is available space (SBC-3 table 221).
fn provisioning_page(thresholds: &[u32], changeable: bool) -> Vec<u8> {
    let len = 12 + 8 * thresholds.len();
    let mut bytes = vec![
        0x40 | INFORMATIONAL_EXCEPTIONS,
        2,
        0,
        u8::try_from(len).unwrap_or(u8::MAX),
    ];
    bytes.resize(16, 0);
    for count in thresholds {
        bytes.extend_from_slice(&[0x80, 0x01, 0, 0]);
        bytes.extend_from_slice(&count.to_be_bytes());
    }
    if changeable {
        bytes.iter_mut().skip(4).for_each(|byte| *byte = 0);
    }
    bytes
}

/// One page as MODE SENSE returns it. `changeable` leaves out every bit that MODE SELECT cannot change.
fn page(code: (u8, u8), values: Settings, thresholds: &[u32], changeable: bool) -> Vec<u8> {
    let fixed = |byte: u8| if changeable { 0 } else { byte };
    let bit = |set: bool, mask: u8| if set { mask } else { 0 };
    let (page_code, subpage) = code;
    if subpage != 0 {
        return provisioning_page(thresholds, changeable);
    }
    let (first, head, len): (u8, &[u8], u8) = match page_code {
        // PS: what MODE SELECT sets here can be saved.
        CACHING => (0x80, &[bit(values.write_cache, 0x04)], 18),
        // TST 001b: a task set for each I_T nexus, so that an ORDERED task and CLEAR TASK SET are a matter of its sender alone.
        // GLTSD: no log parameter is saved. QUEUE ALGORITHM MODIFIER 1: commands may be reordered.
        CONTROL => (
            0,
            &[
                bit(values.descriptor_sense, 0x04) | fixed(0x22),
                fixed(0x10),
                bit(values.software_write_protect, 0x08),
            ],
            10,
        ),
        // DEXCPT: no informational exceptions are reported.
        INFORMATIONAL_EXCEPTIONS => (0, &[fixed(0x08)], 10),
        DISCONNECT_RECONNECT => (0, &[], 14),
        POWER_CONDITION => (0, &[], 38),
        _ => (0, &[], 10),
    };
    let mut bytes = vec![first | page_code, len];
    bytes.extend_from_slice(head);
    bytes.resize(2 + usize::from(len), 0);
    bytes
}

/// MODE SENSE(6) and (10).
///
/// # Errors
/// INVALID FIELD IN CDB for a page or subpage that is not there.
pub(crate) fn sense(unit: &Unit, cdb: &Cdb) -> Result<Reply, Sense> {
    let short = cdb.opcode() == opcode::MODE_SENSE_6;
    let control = match cdb.byte(2) >> 6 {
        0 => PageControl::Current,
        1 => PageControl::Changeable,
        2 => PageControl::Default,
        _ => PageControl::Saved,
    };
    let values = unit.modes.values(control);
    let (wanted, subpage) = (cdb.byte(2) & 0x3f, cdb.byte(3));
    if !matches!(subpage, 0 | ALL_SUBPAGES) && !PAGES.contains(&(wanted, subpage)) {
        return Err(Sense::invalid_cdb(3));
    }
    let mut pages = Vec::new();
    for code in PAGES {
        let sub_matches = subpage == ALL_SUBPAGES || subpage == code.1;
        if (wanted == code.0 || wanted == ALL_PAGES) && sub_matches {
            let changeable = control == PageControl::Changeable;
            pages.extend(page(code, values, &unit.modes.thresholds, changeable));
        }
    }
    if pages.is_empty() {
        return Err(Sense::invalid_cdb(2));
    }
    let long_lba = !short && cdb.bit(1, 0x10);
    let descriptor = if cdb.bit(1, 0x08) {
        Bytes::new()
    } else {
        block_descriptor(unit, long_lba)
    };
    let allocation = if short {
        u64::from(cdb.byte(4))
    } else {
        u64::from(cdb.u16(7))
    };
    Ok(Reply::parameter_data(
        with_header(unit, short, long_lba, &descriptor, &pages),
        allocation,
    ))
}

/// DPOFUA is always there; WP tells Windows that the disk is read-only as a whole.
fn device_specific(unit: &Unit) -> u8 {
    0x10 | if unit.write_protection().is_some() {
        0x80
    } else {
        0
    }
}

fn with_header(unit: &Unit, short: bool, long_lba: bool, descriptor: &[u8], pages: &[u8]) -> Bytes {
    let mut data = BytesMut::with_capacity(8 + descriptor.len() + pages.len());
    let rest = descriptor.len() + pages.len();
    let descriptor_len = u8::try_from(descriptor.len()).unwrap_or(0);
    if short {
        data.put_slice(&[
            u8::try_from(3 + rest).unwrap_or(u8::MAX),
            0,
            device_specific(unit),
            descriptor_len,
        ]);
    } else {
        data.put_u16(u16::try_from(6 + rest).unwrap_or(u16::MAX));
        data.put_slice(&[0, device_specific(unit), u8::from(long_lba), 0, 0, descriptor_len]);
    }
    data.put_slice(descriptor);
    data.put_slice(pages);
    data.freeze()
}

/// Short (8 bytes) or long LBA (16 bytes) mode parameter block descriptor (SBC-3 §6.5.2).
fn block_descriptor(unit: &Unit, long_lba: bool) -> Bytes {
    let mut data = BytesMut::with_capacity(16);
    if long_lba {
        data.put_u64(unit.spec.blocks);
        data.put_u32(0);
    } else {
        data.put_u32(u32::try_from(unit.spec.blocks).unwrap_or(u32::MAX));
    }
    // Block lengths have 24 bits in the short form and fit both.
    data.put_u32(unit.block_size());
    data.freeze()
}

/// MODE SELECT(6) and (10).
///
/// # Errors
/// PARAMETER LIST LENGTH ERROR for a list that is cut off, INVALID FIELD IN PARAMETER LIST for one that
/// changes what cannot be changed. Nothing is changed then.
pub(crate) fn select(unit: &mut Unit, nexus: NexusId, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
    let short = cdb.opcode() == opcode::MODE_SELECT_6;
    let len = if short {
        usize::from(cdb.byte(4))
    } else {
        usize::from(cdb.u16(7))
    };
    if cdb.bit(1, 0x02) {
        // RTD (revert to defaults) is not supported.
        return Err(Sense::invalid_cdb(1));
    }
    if len == 0 {
        return Ok(Ready::Reply(Reply::good()));
    }
    if !cdb.bit(1, 0x10) {
        // PF zero: all pages would be vendor specific.
        return Err(Sense::invalid_cdb(1));
    }
    let list = data_out.get(..len).ok_or(Sense::LIST_LENGTH)?;
    let wanted = parse_list(unit, short, list)?;
    Ok(apply(unit, nexus, wanted, cdb.bit(1, 0x01), len as u64))
}

/// Makes the settings current (and saved): the others hear of it, and acknowledged data reaches the medium
/// when the write cache goes.
fn apply(unit: &mut Unit, nexus: NexusId, wanted: Settings, save: bool, transfer_len: u64) -> Ready {
    let before = std::mem::replace(&mut unit.modes.current, wanted);
    let flush = before.write_cache && !wanted.write_cache;
    let saved_changes = save && unit.modes.saved_write_cache != wanted.write_cache;
    if save {
        unit.modes.saved_write_cache = wanted.write_cache;
    }
    if before != wanted || saved_changes {
        unit.raise_except(nexus, UnitAttention::ModeParametersChanged);
    }
    let op = match (save, flush) {
        (true, flush) => BlockOp::SaveModePages(SavedModePages {
            write_cache: wanted.write_cache,
            flush,
        }),
        (false, true) => BlockOp::Flush,
        (false, false) => return Ready::Reply(Reply::took(transfer_len)),
    };
    Ready::Transfer(op, Answer::Good, transfer_len)
}

fn parse_list(unit: &Unit, short: bool, list: &[u8]) -> Result<Settings, Sense> {
    let header = if short { 4 } else { 8 };
    let (head, rest) = list.split_at_checked(header).ok_or(Sense::LIST_LENGTH)?;
    let (long_lba, descriptor_len) = match head {
        [_, _, _, len] => (false, usize::from(*len)),
        [_, _, _, _, flags, _, high, low] => {
            (flags & 0x01 != 0, usize::from(u16::from_be_bytes([*high, *low])))
        }
        _ => return Err(Sense::LIST_LENGTH),
    };
    let (descriptor, mut pages) = rest.split_at_checked(descriptor_len).ok_or(Sense::LIST_LENGTH)?;
    check_descriptor(unit, long_lba, descriptor, header)?;
    let mut settings = unit.modes.current;
    while !pages.is_empty() {
        let at = list.len() - pages.len();
        pages = parse_page(unit, &mut settings, pages, at)?;
    }
    Ok(settings)
}

/// Neither capacity nor block length can be set: a descriptor has to say what is, or nothing (zeroes, all
/// ones).
fn check_descriptor(unit: &Unit, long_lba: bool, descriptor: &[u8], at: usize) -> Result<(), Sense> {
    let bad = |offset: usize| Sense::invalid_list(u16::try_from(at + offset).unwrap_or(u16::MAX));
    if descriptor.is_empty() {
        return Ok(());
    }
    let expected = block_descriptor(unit, long_lba);
    if descriptor.len() != expected.len() {
        return Err(bad(0));
    }
    let count_len = if long_lba { 8 } else { 4 };
    let (count, length) = descriptor.split_at(count_len);
    let (expected_count, expected_length) = expected.split_at(count_len);
    let keeps = |byte: u8| count.iter().all(|b| *b == byte);
    if count != expected_count && !keeps(0x00) && !keeps(0xff) {
        return Err(bad(0));
    }
    // Byte 4 of the short form is reserved, and is zero in what we send.
    if length != expected_length {
        return Err(bad(count_len));
    }
    Ok(())
}

/// Takes one page off the list; `at` is where it starts in the whole list.
fn parse_page<'a>(
    unit: &Unit,
    settings: &mut Settings,
    list: &'a [u8],
    at: usize,
) -> Result<&'a [u8], Sense> {
    let bad = |offset: usize| Sense::invalid_list(u16::try_from(at + offset).unwrap_or(u16::MAX));
    let (first, second) = match list {
        [first, second, ..] => (*first, *second),
        _ => return Err(Sense::LIST_LENGTH),
    };
    let code = (first & 0x3f, if first & 0x40 == 0 { 0 } else { second });
    if !PAGES.contains(&code) || (code.1 == 0 && first & 0x40 != 0) {
        return Err(bad(0));
    }
    let thresholds = &unit.modes.thresholds;
    let current = page(code, unit.modes.current, thresholds, false);
    let mask = page(code, unit.modes.values(PageControl::Changeable), thresholds, true);
    let header = if code.1 == 0 { 2 } else { 4 };
    if list
        .iter()
        .take(header)
        .skip(1)
        .ne(current.iter().take(header).skip(1))
    {
        // PAGE LENGTH (and subpage code) must be what MODE SENSE reports.
        return Err(bad(1));
    }
    let (new, rest) = list.split_at_checked(current.len()).ok_or(Sense::LIST_LENGTH)?;
    for (offset, ((new, current), mask)) in new.iter().zip(&current).zip(&mask).enumerate().skip(header) {
        if (new ^ current) & !mask != 0 {
            return Err(bad(offset));
        }
    }
    let bit = |offset: usize, mask: u8| new.get(offset).is_some_and(|byte| byte & mask != 0);
    match code.0 {
        CACHING => settings.write_cache = bit(2, 0x04),
        CONTROL => {
            settings.descriptor_sense = bit(2, 0x04);
            settings.software_write_protect = bit(4, 0x08);
        }
        _ => {}
    }
    Ok(rest)
}
