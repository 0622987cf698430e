//! One line of a dump, and the texts of its fields.

use serde::{Deserialize, Serialize};

use crate::page::{Entry, PAGE_ENTRIES, Page};
use crate::record::{self, Bits, BranchRecord, CHUNK_GRAINS, JobRecord, Key, SnapshotRecord, SystemRecord};
use crate::refs::Refs;
use crate::types::{BranchId, Checksums, Consistency, Epoch, SnapshotId, SnapshotState};
use crate::{Error, Result};

/// The owner's bytes: text where they are text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bytes {
    Text(String),
    Hex(String),
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes).map_or_else(|error| Self::Hex(hex(error.as_bytes())), Self::Text)
    }
}

impl Bytes {
    pub(super) fn into_bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Text(text) => Some(text.into_bytes()),
            Self::Hex(text) => unhex(&text),
        }
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(
        digits
            .chunks_exact(2)
            .filter_map(|pair| Some(pair.first()? << 4 | pair.last()?))
            .collect(),
    )
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Line {
    Stillpoint {
        dump: u32,
        format: u32,
    },
    Pool {
        id: String,
        grain_bytes: u32,
        txg: u64,
        epoch: u32,
        next_branch: u32,
        next_job: u64,
        chunks: u32,
    },
    Branch {
        id: u32,
        volume: u32,
        head: bool,
        read_only: bool,
        #[serde(default)]
        checksums: Checksums,
        name: String,
        attributes: Bytes,
        size_bytes: u64,
        block_size: u32,
        parent: Option<(u32, u32)>,
        epoch: u32,
        mapped_grains: u64,
        created_ms: i64,
    },
    Snapshot {
        branch: u32,
        epoch: u32,
        name: String,
        state: SnapshotState,
        consistency: Consistency,
        hold: bool,
        #[serde(default)]
        sealed: bool,
        lock_until_ms: i64,
        created_ms: i64,
        size_bytes: u64,
        block_size: u32,
        mapped_grains: u64,
        meta: Bytes,
    },
    Job {
        id: u64,
        kind: record::JobKind,
        cursor: u32,
        #[serde(default)]
        masked: u64,
        #[serde(default)]
        gained: i64,
    },
    Value {
        name: String,
        value: Bytes,
    },
    /// A known bad grain, with the checksum that it should have.
    Bad {
        grain: u64,
        crc: Option<u32>,
        found_ms: i64,
        places: Vec<u64>,
    },
    /// Entries as runs: `count*grain@birth`, `count*zero@birth`, `count*-` (hole); with recorded checksums
    /// `count*grain@birth#crc,crc,…` (hexadecimal).
    Page {
        branch: u32,
        page: u32,
        epoch: u32,
        entries: String,
    },
    /// Grains in use as ranges `first+count`.
    Used {
        chunk: u32,
        grains: String,
    },
    /// Extra references of grains of a chunk, as runs `first+count*references`.
    References {
        chunk: u32,
        counts: String,
    },
    /// A dump without its end is not restored.
    End {
        lines: u64,
    },
}

pub(super) fn pool_line(system: &SystemRecord) -> Line {
    Line::Pool {
        id: hex(&system.pool_id),
        grain_bytes: system.grain_bytes,
        txg: system.txg,
        epoch: system.epoch.0,
        next_branch: system.next_branch,
        next_job: system.next_job,
        chunks: system.chunks,
    }
}

pub(super) fn record_line(key: &Key, value: &[u8]) -> Result<Line> {
    Ok(match key {
        Key::Branch(id) => branch_line(*id, BranchRecord::decode(*id, value)?),
        Key::Snapshot(id) => snapshot_line(*id, SnapshotRecord::decode(*id, value)?),
        Key::Job(id) => {
            let job = JobRecord::decode(*id, value)?;
            Line::Job {
                id: *id,
                kind: job.kind,
                cursor: job.cursor,
                masked: job.masked,
                gained: job.gained,
            }
        }
        Key::Value(name) => Line::Value {
            name: name.clone(),
            value: record::decode_value(name, value)?.into(),
        },
        Key::Bad(grain) => {
            let bad = record::BadRecord::decode(*grain, value)?;
            Line::Bad {
                grain: *grain,
                crc: bad.crc,
                found_ms: bad.found_ms,
                places: bad.places,
            }
        }
        other => {
            return Err(Error::corrupt(
                "metadata key",
                format!("{other:?} in the wrong table"),
            ));
        }
    })
}

pub(super) fn branch_line(id: BranchId, branch: BranchRecord) -> Line {
    Line::Branch {
        id: id.0,
        volume: branch.volume.0,
        head: branch.head,
        read_only: branch.read_only,
        checksums: branch.checksums,
        name: branch.name,
        attributes: branch.attributes.into(),
        size_bytes: branch.size_bytes,
        block_size: branch.block_size,
        parent: branch.parent.map(|parent| (parent.branch.0, parent.epoch.0)),
        epoch: branch.current.0,
        mapped_grains: branch.mapped_grains,
        created_ms: branch.created_ms,
    }
}

pub(super) fn snapshot_line(id: SnapshotId, snapshot: SnapshotRecord) -> Line {
    Line::Snapshot {
        branch: id.branch.0,
        epoch: id.epoch.0,
        name: snapshot.name,
        state: snapshot.state,
        consistency: snapshot.consistency,
        hold: snapshot.hold,
        sealed: snapshot.sealed,
        lock_until_ms: snapshot.lock_until_ms,
        created_ms: snapshot.created_ms,
        size_bytes: snapshot.size_bytes,
        block_size: snapshot.block_size,
        mapped_grains: snapshot.mapped_grains,
        meta: snapshot.meta.into(),
    }
}

pub(super) fn entries_text(page: &Page) -> String {
    let mut runs: Vec<(u64, Entry, Vec<String>)> = Vec::new();
    for entry in page.iter() {
        let crc = entry.crc().map(|crc| format!("{crc:08x}"));
        match runs.last_mut() {
            Some((count, first, crcs)) if entry.continues(*first, *count) => {
                *count += 1;
                crcs.extend(crc);
            }
            _ => runs.push((1, entry, crc.into_iter().collect())),
        }
    }
    let run = |(count, first, crcs): &(u64, Entry, Vec<String>)| {
        let sums = if crcs.is_empty() {
            String::new()
        } else {
            format!("#{}", crcs.join(","))
        };
        format!("{count}*{:?}{sums}", first.with_crc(None))
    };
    runs.iter().map(run).collect::<Vec<_>>().join(" ")
}

pub(super) fn parse_entries(text: &str) -> Option<Page> {
    let mut page = Page::default();
    let mut index = 0u8;
    for run in text.split(' ') {
        let (count, rest) = run.split_once('*')?;
        let (entry, crcs) = match rest.split_once('#') {
            Some((entry, crcs)) => (entry, Some(crcs)),
            None => (rest, None),
        };
        let mut crcs = crcs.map(|text| text.split(','));
        for n in 0..count.parse::<u64>().ok()? {
            if usize::from(index) >= PAGE_ENTRIES {
                return None;
            }
            let crc = match &mut crcs {
                Some(texts) => Some(u32::from_str_radix(texts.next()?, 16).ok()?),
                None => None,
            };
            page.set(index, parse_entry(entry, n)?.with_crc(crc));
            index += 1;
        }
        if crcs.is_some_and(|mut texts| texts.next().is_some()) {
            return None;
        }
    }
    (usize::from(index) == PAGE_ENTRIES).then_some(page)
}

pub(super) fn parse_entry(text: &str, n: u64) -> Option<Entry> {
    if text == "-" {
        return Some(Entry::HOLE);
    }
    let (place, birth) = text.split_once('@')?;
    let birth = birth
        .parse()
        .ok()
        .map(Epoch)
        .filter(|birth| *birth <= Epoch::MAX)?;
    if place == "zero" {
        return Some(Entry::zero(birth));
    }
    let grain = place
        .parse::<u64>()
        .ok()?
        .checked_add(n)
        .filter(|grain| *grain < crate::page::MAX_GRAINS)?;
    Some(Entry::mapped(grain, birth))
}

pub(super) fn references_line(chunk: u32, refs: &Refs) -> Line {
    let mut runs: Vec<(usize, usize, u64)> = Vec::new();
    for (index, n) in refs.iter() {
        match runs.last_mut() {
            Some((first, count, same)) if *first + *count == index && *same == n => *count += 1,
            _ => runs.push((index, 1, n)),
        }
    }
    let text = runs
        .iter()
        .map(|(first, count, n)| format!("{first}+{count}*{n}"));
    Line::References {
        chunk,
        counts: text.collect::<Vec<_>>().join(" "),
    }
}

pub(super) fn parse_references(text: &str) -> Option<Refs> {
    let mut counts = Vec::new();
    for run in text.split(' ').filter(|run| !run.is_empty()) {
        let (range, n) = run.split_once('*')?;
        let (first, count) = range.split_once('+')?;
        let (first, count): (usize, usize) = (first.parse().ok()?, count.parse().ok()?);
        let n: u64 = n.parse().ok()?;
        let end = first.checked_add(count).filter(|end| *end <= CHUNK_GRAINS)?;
        counts.extend((first..end).map(|index| (index, n)));
    }
    Some(Refs::of(counts))
}

pub(super) fn ranges_text(bits: &Bits) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for grain in 0..CHUNK_GRAINS {
        if bits
            .get(grain / 64)
            .is_some_and(|word| word & (1 << (grain % 64)) != 0)
        {
            match ranges.last_mut() {
                Some((first, count)) if *first + *count == grain => *count += 1,
                _ => ranges.push((grain, 1)),
            }
        }
    }
    let text: Vec<String> = ranges
        .iter()
        .map(|(first, count)| format!("{first}+{count}"))
        .collect();
    text.join(" ")
}

pub(super) fn parse_ranges(text: &str) -> Option<Bits> {
    let mut bits = [0u64; CHUNK_GRAINS / 64];
    for range in text.split(' ').filter(|range| !range.is_empty()) {
        let (first, count) = range.split_once('+')?;
        let (first, count): (usize, usize) = (first.parse().ok()?, count.parse().ok()?);
        for grain in first..first.checked_add(count).filter(|end| *end <= CHUNK_GRAINS)? {
            *bits.get_mut(grain / 64)? |= 1 << (grain % 64);
        }
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_ranges_read_back() {
        let mut page = Page::default();
        for index in 3..40 {
            page.set(index, Entry::mapped(1000 + u64::from(index), Epoch(7)));
        }
        page.set(20, Entry::zero(Epoch(9)));
        page.set(21, Entry::mapped(5, Epoch(8)));
        let text = entries_text(&page);
        assert_eq!(text, "3*- 17*1003@7 1*zero@9 1*5@8 18*1022@7 24*-");
        assert_eq!(parse_entries(&text), Some(page.clone()));
        page.set(21, Entry::mapped(5, Epoch(8)).with_crc(Some(0xab)));
        page.set(22, page.at(22).with_crc(Some(1)));
        page.set(23, page.at(23).with_crc(Some(2)));
        let text = entries_text(&page);
        assert_eq!(
            text,
            "3*- 17*1003@7 1*zero@9 1*5@8#000000ab 2*1022@7#00000001,00000002 16*1024@7 24*-"
        );
        assert_eq!(parse_entries(&text), Some(page));
        for bad in [
            "64*5@9#0",
            "1*5@9#0,1 63*-",
            "",
            "63*-",
            "65*-",
            "64*x",
            "1*5",
            "64*5@999999999999",
            "99999999999*-",
        ] {
            assert_eq!(parse_entries(bad), None, "{bad}");
        }
        let mut bits = [0; CHUNK_GRAINS / 64];
        bits[0] = 0b1101;
        bits[63] = 1 << 63;
        assert_eq!(ranges_text(&bits), "0+1 2+2 4095+1");
        assert_eq!(parse_ranges("0+1 2+2 4095+1"), Some(bits));
        assert!(parse_ranges("4095+2").is_none() && parse_ranges("1+18446744073709551615").is_none());
        assert_eq!(parse_ranges(""), Some([0; CHUNK_GRAINS / 64]));
        let refs = Refs::of([(0, 1), (1, 1), (2, 300), (4095, 1)]);
        let Line::References { counts, .. } = references_line(7, &refs) else {
            panic!("of references");
        };
        assert_eq!(counts, "0+2*1 2+1*300 4095+1*1");
        assert_eq!(parse_references(&counts), Some(refs));
        assert!(parse_references("4095+2*1").is_none() && parse_references("5+1").is_none());
    }

    #[test]
    fn the_owners_bytes_read_back() {
        for bytes in [&b"{\"naa\":1}"[..], &[0xff, 0x00, 0x80], b""] {
            assert_eq!(Bytes::from(bytes.to_vec()).into_bytes().unwrap(), bytes);
        }
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
    }
}
