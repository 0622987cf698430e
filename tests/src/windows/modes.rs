//! MODE SENSE, MODE SELECT and START STOP UNIT.

use anyhow::{Context, Result, ensure};

use super::disk::{Disk, INVALID_FIELD, byte, bytes, u16_at};
use super::{Check, check};

const CACHING: u8 = 0x08;
const POWER: u8 = 0x1a;
const EXCEPTIONS: u8 = 0x1c;
const ALL: u8 = 0x3f;
/// WCE in byte 2 of the caching page.
const WCE: u8 = 0x04;

/// MODE SENSE and MODE SELECT have two CDB lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Six,
    Ten,
}

pub(super) const CHECKS: &[Check] = &[
    check("MODE SENSE(6): all pages, lengths exact", |disk| {
        lengths(disk, Form::Six)
    }),
    check("MODE SENSE(10): all pages, lengths exact", |disk| {
        lengths(disk, Form::Ten)
    }),
    check(
        "MODE SENSE(6): DBD takes the block descriptor and nothing else",
        |disk| descriptors(disk, Form::Six),
    ),
    check(
        "MODE SENSE(10): DBD takes the block descriptor and nothing else",
        |disk| descriptors(disk, Form::Ten),
    ),
    check("MODE SENSE(6): PC current and default end GOOD", |disk| {
        page_controls(disk, Form::Six)
    }),
    check("MODE SENSE(10): PC current and default end GOOD", |disk| {
        page_controls(disk, Form::Ten)
    }),
    check(
        "MODE SENSE(6): PC changeable and saved end GOOD or say why",
        |disk| other_controls(disk, Form::Six),
    ),
    check(
        "MODE SENSE(10): PC changeable and saved end GOOD or say why",
        |disk| other_controls(disk, Form::Ten),
    ),
    check("MODE SENSE(6): page 08h has PS and 20 bytes", |disk| {
        caching_page(disk, Form::Six)
    }),
    check("MODE SENSE(10): page 08h has PS and 20 bytes", |disk| {
        caching_page(disk, Form::Ten)
    }),
    check("MODE SENSE(6): page 1Ch", |disk| {
        has_page(disk, Form::Six, EXCEPTIONS)
    }),
    check("MODE SENSE(10): page 1Ch", |disk| {
        has_page(disk, Form::Ten, EXCEPTIONS)
    }),
    check("MODE SENSE(6): page 1Ah", |disk| has_page(disk, Form::Six, POWER)),
    check("MODE SENSE(10): page 1Ah", |disk| {
        has_page(disk, Form::Ten, POWER)
    }),
    check("MODE SENSE(6): truncation keeps the data length", |disk| {
        truncation(disk, Form::Six)
    }),
    check("MODE SENSE(10): truncation keeps the data length", |disk| {
        truncation(disk, Form::Ten)
    }),
    check("MODE SENSE(6): a page that is not there is refused", |disk| {
        disk.refused(&[0x1a, 0x08, 0x2b, 0, 252, 0], 252, INVALID_FIELD)
    }),
    check("MODE SENSE(6): medium type 0, FUA is told", |disk| {
        let data = sense(disk, Form::Six, 0, ALL, true)?;
        ensure!(byte(&data, 1)? == 0, "medium type {:02x}", byte(&data, 1)?);
        ensure!(byte(&data, 2)? & 0x10 != 0, "DPOFUA is 0: Windows sends no FUA");
        Ok(())
    }),
    check("MODE SELECT(6) without a list ends GOOD", |disk| {
        disk.good(&[0x15, 0, 0, 0, 0, 0])
    }),
    check("MODE SELECT(10) without a list ends GOOD", |disk| {
        disk.good(&[0x55, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }),
    check(
        "MODE SELECT(6): WCE off, current and saved, and on again",
        |disk| write_cache(disk, Form::Six),
    ),
    check(
        "MODE SELECT(10): WCE off, current and saved, and on again",
        |disk| write_cache(disk, Form::Ten),
    ),
    check(
        "MODE SELECT(6): a list that is cut off is refused and changes nothing",
        |disk| {
            let before = sense(disk, Form::Six, 0, CACHING, true)?;
            let mut list = select_list(&before, Form::Six, false)?;
            list.truncate(list.len() - 6);
            let reply = disk.give(&[0x15, 0x10, 0, 0, u8::try_from(list.len())?, 0], &list)?;
            ensure!(
                reply.status == 2 && reply.sense_code().0 == 5,
                "{}",
                super::disk::shown(&reply)
            );
            ensure!(
                sense(disk, Form::Six, 0, CACHING, true)? == before,
                "the page changed"
            );
            Ok(())
        },
    ),
    check("START STOP UNIT: stop", |disk| start_stop(disk, 0, false)),
    check("START STOP UNIT: stop, IMMED", |disk| start_stop(disk, 1, false)),
    check("START STOP UNIT: start", |disk| start_stop(disk, 0, true)),
    check("START STOP UNIT: start, IMMED", |disk| start_stop(disk, 1, true)),
];

fn sense(disk: &mut Disk, form: Form, control: u8, page: u8, no_descriptor: bool) -> Result<Vec<u8>> {
    let (dbd, page) = (if no_descriptor { 0x08 } else { 0 }, control << 6 | page);
    match form {
        Form::Six => disk.data(&[0x1a, dbd, page, 0, 252, 0], 252),
        Form::Ten => disk.data(&[0x5a, dbd, page, 0, 0, 0, 0, 2, 0, 0], 512),
    }
}

/// Length of the header, of the block descriptor, and of all that follows the length field itself.
fn head(data: &[u8], form: Form) -> Result<(usize, usize, usize)> {
    Ok(match form {
        Form::Six => (4, usize::from(byte(data, 3)?), usize::from(byte(data, 0)?) + 1),
        Form::Ten => (
            8,
            usize::from(u16_at(data, 6)?),
            usize::from(u16_at(data, 0)?) + 2,
        ),
    })
}

fn pages(data: &[u8], form: Form) -> Result<&[u8]> {
    let (header, descriptor, _) = head(data, form)?;
    data.get(header + descriptor..)
        .context("the block descriptor is longer than the data")
}

/// The bytes of one page.
fn find(data: &[u8], form: Form, wanted: u8) -> Result<Vec<u8>> {
    let mut rest = pages(data, form)?;
    while !rest.is_empty() {
        let len = if byte(rest, 0)? & 0x40 == 0 {
            usize::from(byte(rest, 1)?) + 2
        } else {
            usize::from(u16_at(rest, 2)?) + 4
        };
        let page = bytes(rest, 0, len)?;
        if byte(page, 0)? & 0x7f == wanted {
            return Ok(page.to_vec());
        }
        rest = rest.get(len..).unwrap_or_default();
    }
    anyhow::bail!("no page {wanted:02x}h in {data:02x?}")
}

fn lengths(disk: &mut Disk, form: Form) -> Result<()> {
    let data = sense(disk, form, 0, ALL, false)?;
    let (_, descriptor, whole) = head(&data, form)?;
    ensure!(whole == data.len(), "{whole} in {} bytes", data.len());
    ensure!(
        matches!(descriptor, 0 | 8),
        "a block descriptor of {descriptor} bytes"
    );
    // Walks to the end exactly.
    find(&data, form, CACHING)?;
    let mut rest = pages(&data, form)?;
    while !rest.is_empty() {
        let len = if byte(rest, 0)? & 0x40 == 0 {
            usize::from(byte(rest, 1)?) + 2
        } else {
            usize::from(u16_at(rest, 2)?) + 4
        };
        rest = rest
            .get(len..)
            .with_context(|| format!("a page beyond the end of {data:02x?}"))?;
    }
    Ok(())
}

fn descriptors(disk: &mut Disk, form: Form) -> Result<()> {
    let with = sense(disk, form, 0, ALL, false)?;
    let without = sense(disk, form, 0, ALL, true)?;
    ensure!(
        head(&without, form)?.1 == 0,
        "the block descriptor stays: {without:02x?}"
    );
    ensure!(pages(&with, form)? == pages(&without, form)?, "the pages differ");
    Ok(())
}

fn page_controls(disk: &mut Disk, form: Form) -> Result<()> {
    for control in [0, 2] {
        let data = sense(disk, form, control, ALL, true)?;
        find(&data, form, CACHING)?;
    }
    Ok(())
}

fn other_controls(disk: &mut Disk, form: Form) -> Result<()> {
    for control in [1, 3_u8] {
        let page = control << 6 | CACHING;
        let reply = match form {
            Form::Six => disk.ask(&[0x1a, 0x08, page, 0, 252, 0], 252)?,
            Form::Ten => disk.ask(&[0x5a, 0x08, page, 0, 0, 0, 0, 2, 0, 0], 512)?,
        };
        // SAVING PARAMETERS NOT SUPPORTED is an answer to PC 3.
        let not_saved = control == 3 && reply.sense_code() == (5, 0x39, 0);
        ensure!(
            reply.status == 0 || not_saved,
            "PC {control}: {}",
            super::disk::shown(&reply)
        );
    }
    Ok(())
}

fn caching_page(disk: &mut Disk, form: Form) -> Result<()> {
    let data = sense(disk, form, 0, CACHING, true)?;
    let page = find(&data, form, CACHING)?;
    ensure!(
        byte(&page, 0)? & 0x80 != 0,
        "PS is 0: Windows cannot save the cache setting"
    );
    ensure!(page.len() == 20, "{} bytes", page.len());
    Ok(())
}

fn has_page(disk: &mut Disk, form: Form, page: u8) -> Result<()> {
    let data = sense(disk, form, 0, page, true)?;
    find(&data, form, page).map(drop)
}

fn truncation(disk: &mut Disk, form: Form) -> Result<()> {
    let whole = sense(disk, form, 0, ALL, true)?;
    let short = match form {
        Form::Six => disk.data(&[0x1a, 0x08, ALL, 0, 4, 0], 4)?,
        Form::Ten => disk.data(&[0x5a, 0x08, ALL, 0, 0, 0, 0, 0, 8, 0], 8)?,
    };
    ensure!(whole.starts_with(&short), "{short:02x?} of {whole:02x?}");
    Ok(())
}

/// A parameter list with the caching page as `data` has it, and WCE as wanted.
fn select_list(data: &[u8], form: Form, wce: bool) -> Result<Vec<u8>> {
    let mut page = find(data, form, CACHING)?;
    if let [first, _, flags, ..] = page.as_mut_slice() {
        // PS is reserved in MODE SELECT.
        *first &= 0x7f;
        *flags = if wce { *flags | WCE } else { *flags & !WCE };
    }
    let header = match form {
        Form::Six => 4,
        Form::Ten => 8,
    };
    Ok([vec![0; header], page].concat())
}

fn select(disk: &mut Disk, form: Form, wce: bool) -> Result<()> {
    let now = sense(disk, form, 0, CACHING, true)?;
    let list = select_list(&now, form, wce)?;
    let len = u8::try_from(list.len())?;
    // PF and SP: the page is a standard one, and is saved.
    match form {
        Form::Six => disk.given(&[0x15, 0x11, 0, 0, len, 0], &list),
        Form::Ten => disk.given(&[0x55, 0x11, 0, 0, 0, 0, 0, 0, len, 0], &list),
    }
}

/// Sets WCE as Windows does, for other groups of the list too.
pub(super) fn set_write_cache(disk: &mut Disk, on: bool) -> Result<()> {
    select(disk, Form::Six, on)
}

fn write_cache(disk: &mut Disk, form: Form) -> Result<()> {
    for wce in [false, true] {
        select(disk, form, wce)?;
        for control in [0, 3] {
            let data = sense(disk, form, control, CACHING, true)?;
            let is = byte(&find(&data, form, CACHING)?, 2)? & WCE != 0;
            ensure!(is == wce, "PC {control}: WCE is {is} after it was set to {wce}");
        }
    }
    Ok(())
}

/// Nothing spins down: the medium stays within reach.
fn start_stop(disk: &mut Disk, immediate: u8, start: bool) -> Result<()> {
    disk.good(&[0x1b, immediate, 0, 0, u8::from(start), 0])?;
    // A stopped disk may ask for a start; Windows sends one.
    disk.good(&[0x1b, 0, 0, 0, 1, 0])?;
    disk.good(&[0; 6])?;
    disk.read(super::disk::Size::Ten, 0, 1).map(drop)
}
