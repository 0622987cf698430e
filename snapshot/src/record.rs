//! Every key and value of the metadata store (the tables of FORMAT.md). Shared by the pool, `check` and `dump`.

use crate::codec::{Dec, Enc, seal, unseal};
use crate::page::{Entry, PAGE_ENTRIES, Page, PageNo};
use crate::types::{BranchId, Checksums, Consistency, Epoch, SnapshotId, SnapshotState, VolumeId};
use crate::{Error, Result};

/// Format that this build reads and writes.
pub const FORMAT: u32 = 1;
/// Grains of an allocation chunk.
pub const CHUNK_GRAINS: usize = 4096;
/// Chunks whose free counts share one value. Half of the 2,048 that would fill 4 KiB: the CRC needs room too.
pub const COUNTS_PER_BLOCK: usize = 1024;
/// Payload of a `J` value, in bytes.
pub const JOURNAL_PAYLOAD_BYTES: usize = 4000;

/// First byte of a key.
pub mod table {
    /// The pool itself.
    pub const SYSTEM: u8 = b'S';
    /// Branches.
    pub const BRANCH: u8 = b'V';
    /// Snapshots.
    pub const SNAPSHOT: u8 = b'N';
    /// Map pages, newest version first.
    pub const PAGE: u8 = b'M';
    /// "This page has a version of this epoch."
    pub const CHANGED: u8 = b'E';
    /// Allocation bitmaps.
    pub const BITMAP: u8 = b'A';
    /// Free counts.
    pub const COUNTS: u8 = b'a';
    /// Delta log.
    pub const JOURNAL: u8 = b'J';
    /// Background jobs.
    pub const JOB: u8 = b'D';
    /// The owner's small values.
    pub const VALUE: u8 = b'K';
    /// Extra references.
    pub const REFERENCES: u8 = b'R';
    /// Known bad grains.
    pub const BAD: u8 = b'B';
}

/// Identifies one version of a map page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageKey {
    /// Branch.
    pub branch: BranchId,
    /// Page within the branch.
    pub page: PageNo,
    /// Epoch of the version.
    pub epoch: Epoch,
}

/// Builds keys.
pub mod key {
    use super::{BranchId, Epoch, PageKey, PageNo, table};

    fn join(table: u8, parts: &[&[u8]]) -> Vec<u8> {
        let mut key = vec![table];
        parts.iter().for_each(|p| key.extend_from_slice(p));
        key
    }

    /// `S`.
    #[must_use]
    pub fn system() -> Vec<u8> {
        vec![table::SYSTEM]
    }
    /// `V` branch.
    #[must_use]
    pub fn branch(b: BranchId) -> Vec<u8> {
        join(table::BRANCH, &[&b.0.to_be_bytes()])
    }
    /// `N` branch epoch.
    #[must_use]
    pub fn snapshot(b: BranchId, e: Epoch) -> Vec<u8> {
        join(table::SNAPSHOT, &[&b.0.to_be_bytes(), &e.0.to_be_bytes()])
    }
    /// `M` branch page !epoch: the newest version is the first.
    #[must_use]
    pub fn page(k: PageKey) -> Vec<u8> {
        join(
            table::PAGE,
            &[
                &k.branch.0.to_be_bytes(),
                &k.page.to_be_bytes(),
                &(!k.epoch.0).to_be_bytes(),
            ],
        )
    }
    /// After every version of the page.
    #[must_use]
    pub fn page_end(b: BranchId, page: PageNo) -> Vec<u8> {
        join(
            table::PAGE,
            &[&b.0.to_be_bytes(), &page.to_be_bytes(), &[0xff; 5]],
        )
    }
    /// After every page of the branch.
    #[must_use]
    pub fn pages_end(b: BranchId) -> Vec<u8> {
        join(table::PAGE, &[&b.0.to_be_bytes(), &[0xff; 9]])
    }
    /// `E` branch epoch page.
    #[must_use]
    pub fn changed(k: PageKey) -> Vec<u8> {
        changed_from(k.branch, k.epoch, k.page)
    }
    /// `E` branch epoch page, from its parts.
    #[must_use]
    pub fn changed_from(b: BranchId, e: Epoch, page: PageNo) -> Vec<u8> {
        join(
            table::CHANGED,
            &[&b.0.to_be_bytes(), &e.0.to_be_bytes(), &page.to_be_bytes()],
        )
    }
    /// After every `E` key of the branch up to and including `e`.
    #[must_use]
    pub fn changed_end(b: BranchId, e: Epoch) -> Vec<u8> {
        join(
            table::CHANGED,
            &[&b.0.to_be_bytes(), &e.0.to_be_bytes(), &[0xff; 5]],
        )
    }
    /// `A` chunk.
    #[must_use]
    pub fn bitmap(chunk: u32) -> Vec<u8> {
        join(table::BITMAP, &[&chunk.to_be_bytes()])
    }
    /// `a` block.
    #[must_use]
    pub fn counts(block: u32) -> Vec<u8> {
        join(table::COUNTS, &[&block.to_be_bytes()])
    }
    /// `J` txg sequence.
    #[must_use]
    pub fn journal(txg: u64, seq: u32) -> Vec<u8> {
        join(table::JOURNAL, &[&txg.to_be_bytes(), &seq.to_be_bytes()])
    }
    /// `D` id.
    #[must_use]
    pub fn job(id: u64) -> Vec<u8> {
        join(table::JOB, &[&id.to_be_bytes()])
    }
    /// `R` chunk part.
    #[must_use]
    pub fn references(chunk: u32, part: u8) -> Vec<u8> {
        join(table::REFERENCES, &[&chunk.to_be_bytes(), &[part]])
    }
    /// `R` chunk 255 index: after the parts of the chunk.
    #[must_use]
    pub fn spilled(chunk: u32, index: u16) -> Vec<u8> {
        join(
            table::REFERENCES,
            &[&chunk.to_be_bytes(), &[super::SPILLED], &index.to_be_bytes()],
        )
    }
    /// After every `R` key of the chunk.
    #[must_use]
    pub fn references_end(chunk: u32) -> Vec<u8> {
        join(table::REFERENCES, &[&chunk.to_be_bytes(), &[0xff; 4]])
    }
    /// `B` grain.
    #[must_use]
    pub fn bad(grain: u64) -> Vec<u8> {
        join(table::BAD, &[&grain.to_be_bytes()])
    }
    /// `K` name.
    #[must_use]
    pub fn value(name: &str) -> Vec<u8> {
        join(table::VALUE, &[name.as_bytes()])
    }
}

/// A key taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// `S`
    System,
    /// `V`
    Branch(BranchId),
    /// `N`
    Snapshot(SnapshotId),
    /// `M`
    Page(PageKey),
    /// `E`
    Changed(PageKey),
    /// `A`
    Bitmap(u32),
    /// `a`
    Counts(u32),
    /// `J` (txg, sequence)
    Journal(u64, u32),
    /// `D`
    Job(u64),
    /// `R` (chunk, part)
    References(u32, u8),
    /// `R` of one grain that has very many (chunk, index)
    Spilled(u32, u16),
    /// `B`
    Bad(u64),
    /// `K`
    Value(String),
}

impl Key {
    /// Takes a key apart.
    ///
    /// # Errors
    /// `Corrupt` when the table is unknown or the length is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut d = Dec::new(bytes, "metadata key");
        let key = match d.u8()? {
            table::SYSTEM => Self::System,
            table::BRANCH => Self::Branch(BranchId(d.u32()?)),
            table::SNAPSHOT => Self::Snapshot(SnapshotId {
                branch: BranchId(d.u32()?),
                epoch: Epoch(d.u32()?),
            }),
            table::PAGE => {
                let (branch, page, epoch) = (BranchId(d.u32()?), d.u32()?, Epoch(!d.u32()?));
                Self::Page(PageKey { branch, page, epoch })
            }
            table::CHANGED => {
                let (branch, epoch, page) = (BranchId(d.u32()?), Epoch(d.u32()?), d.u32()?);
                Self::Changed(PageKey { branch, page, epoch })
            }
            table::BITMAP => Self::Bitmap(d.u32()?),
            table::COUNTS => Self::Counts(d.u32()?),
            table::JOURNAL => Self::Journal(d.u64()?, d.u32()?),
            table::JOB => Self::Job(d.u64()?),
            table::REFERENCES => match (d.u32()?, d.u8()?) {
                (chunk, SPILLED) => Self::Spilled(chunk, d.u16()?),
                (chunk, part) => Self::References(chunk, part),
            },
            table::BAD => Self::Bad(d.u64()?),
            table::VALUE => {
                let name = bytes.get(1..).unwrap_or_default().to_vec();
                return String::from_utf8(name)
                    .map(Self::Value)
                    .map_err(|_| d.bad("not UTF-8"));
            }
            _ => return Err(d.bad(&crate::codec::hex(bytes))),
        };
        d.end()?;
        Ok(key)
    }
}

/// Seals a payload under its key.
#[must_use]
pub fn sealed(key: &[u8], payload: Vec<u8>) -> Vec<u8> {
    seal(key, payload)
}

/// Value of `S`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemRecord {
    /// Names the pool; the data file's superblocks carry it too.
    pub pool_id: [u8; 16],
    /// Grain in bytes.
    pub grain_bytes: u32,
    /// Newest closed transaction group: this value closes it.
    pub txg: u64,
    /// `J` values up to and including this transaction group are in their pages.
    pub checkpoint: u64,
    /// Next epoch.
    pub epoch: Epoch,
    /// Next branch number.
    pub next_branch: u32,
    /// Next job number.
    pub next_job: u64,
    /// Chunks that the data file has.
    pub chunks: u32,
}

impl SystemRecord {
    /// The value, sealed.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Enc::default();
        e.u32(FORMAT);
        e.raw(&self.pool_id);
        e.u32(self.grain_bytes);
        e.u64(self.txg);
        e.u64(self.checkpoint);
        e.u32(self.epoch.0);
        e.u32(self.next_branch);
        e.u64(self.next_job);
        e.u32(self.chunks);
        seal(&key::system(), e.into_bytes())
    }

    /// Reads a value.
    ///
    /// # Errors
    /// `Corrupt`, or `Version` for a format that this build does not know.
    pub fn decode(value: &[u8]) -> Result<Self> {
        let mut d = Dec::new(unseal(&key::system(), value)?, "pool record");
        let found = d.u32()?;
        if found != FORMAT {
            return Err(Error::Version {
                found,
                supported: FORMAT,
            });
        }
        let record = Self {
            pool_id: d.array()?,
            grain_bytes: d.u32()?,
            txg: d.u64()?,
            checkpoint: d.u64()?,
            epoch: Epoch(d.u32()?),
            next_branch: d.u32()?,
            next_job: d.u64()?,
            chunks: d.u32()?,
        };
        d.end()?;
        Ok(record)
    }
}

/// Value of `V`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchRecord {
    /// The volume whose history this branch is part of.
    pub volume: VolumeId,
    /// Whether the volume is this branch now; otherwise it only carries snapshots (or is being freed).
    pub head: bool,
    /// Refuses writes.
    pub read_only: bool,
    /// When checksums of its grains are recorded.
    pub checksums: Checksums,
    /// Name of the volume (of a head) or its last name.
    pub name: String,
    /// The owner's bytes.
    pub attributes: Vec<u8>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Snapshot below.
    pub parent: Option<SnapshotId>,
    /// Epoch that it writes with.
    pub current: Epoch,
    /// Entries of the head that are backed by a grain.
    pub mapped_grains: u64,
    /// Milliseconds since 1970 UTC.
    pub created_ms: i64,
}

const RECORD_VERSION: u8 = 1;
const FLAG_HEAD: u8 = 1;
const FLAG_READ_ONLY: u8 = 2;
const FLAG_PARENT: u8 = 4;
const FLAG_SUMS_OFF: u8 = 8;
const FLAG_SUMS_ALWAYS: u8 = 16;
/// In the byte of the owner's hold of a snapshot.
const FLAG_HOLD: u8 = 1;
const FLAG_SEALED: u8 = 2;

fn version(d: &mut Dec<'_>) -> Result<()> {
    match d.u8()? {
        RECORD_VERSION => Ok(()),
        found => Err(Error::Version {
            found: found.into(),
            supported: RECORD_VERSION.into(),
        }),
    }
}

impl BranchRecord {
    /// The value, sealed under its key.
    #[must_use]
    pub fn encode(&self, id: BranchId) -> Vec<u8> {
        let mut e = Enc::default();
        e.u8(RECORD_VERSION);
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        e.u8(flag(self.head, FLAG_HEAD)
            | flag(self.read_only, FLAG_READ_ONLY)
            | flag(self.checksums == Checksums::Off, FLAG_SUMS_OFF)
            | flag(self.checksums == Checksums::Always, FLAG_SUMS_ALWAYS)
            | flag(self.parent.is_some(), FLAG_PARENT));
        e.u32(self.volume.0);
        e.u64(self.size_bytes);
        e.u32(self.block_size);
        e.u32(self.current.0);
        e.u64(self.mapped_grains);
        e.i64(self.created_ms);
        if let Some(parent) = self.parent {
            e.u32(parent.branch.0);
            e.u32(parent.epoch.0);
        }
        e.bytes(self.name.as_bytes());
        e.bytes(&self.attributes);
        seal(&key::branch(id), e.into_bytes())
    }

    /// Reads a value.
    ///
    /// # Errors
    /// `Corrupt` or `Version`.
    pub fn decode(id: BranchId, value: &[u8]) -> Result<Self> {
        let mut d = Dec::new(unseal(&key::branch(id), value)?, "volume record");
        version(&mut d)?;
        let flags = d.u8()?;
        let (volume, size_bytes, block_size) = (VolumeId(d.u32()?), d.u64()?, d.u32()?);
        let (current, mapped_grains, created_ms) = (Epoch(d.u32()?), d.u64()?, d.i64()?);
        let parent = match flags & FLAG_PARENT {
            0 => None,
            _ => Some(SnapshotId {
                branch: BranchId(d.u32()?),
                epoch: Epoch(d.u32()?),
            }),
        };
        let record = Self {
            volume,
            head: flags & FLAG_HEAD != 0,
            read_only: flags & FLAG_READ_ONLY != 0,
            checksums: match flags & (FLAG_SUMS_OFF | FLAG_SUMS_ALWAYS) {
                0 => Checksums::Sealed,
                FLAG_SUMS_OFF => Checksums::Off,
                FLAG_SUMS_ALWAYS => Checksums::Always,
                _ => return Err(d.bad("mode of checksums")),
            },
            name: d.text()?,
            attributes: d.bytes()?,
            size_bytes,
            block_size,
            parent,
            current,
            mapped_grains,
            created_ms,
        };
        d.end()?;
        Ok(record)
    }
}

/// Value of `N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Name.
    pub name: String,
    /// Milliseconds since 1970 UTC.
    pub created_ms: i64,
    /// Size of the volume at the cut, in bytes.
    pub size_bytes: u64,
    /// Logical block size at the cut, in bytes.
    pub block_size: u32,
    /// Entries backed by a grain at the cut.
    pub mapped_grains: u64,
    /// Level proved.
    pub consistency: Consistency,
    /// Life.
    pub state: SnapshotState,
    /// Not to be deleted.
    pub hold: bool,
    /// The checksums of what it added to the one before have been recorded.
    pub sealed: bool,
    /// Not to be deleted before; 0 = no lock.
    pub lock_until_ms: i64,
    /// The owner's bytes.
    pub meta: Vec<u8>,
}

impl SnapshotRecord {
    /// The value, sealed under its key.
    #[must_use]
    pub fn encode(&self, id: SnapshotId) -> Vec<u8> {
        let mut e = Enc::default();
        e.u8(RECORD_VERSION);
        e.u8(match self.state {
            SnapshotState::Live => 0,
            SnapshotState::Hidden => 1,
            SnapshotState::Dying => 2,
        });
        e.u8(match self.consistency {
            Consistency::Crash => 0,
            Consistency::Filesystem => 1,
            Consistency::Application => 2,
        });
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        e.u8(flag(self.hold, FLAG_HOLD) | flag(self.sealed, FLAG_SEALED));
        e.i64(self.created_ms);
        e.i64(self.lock_until_ms);
        e.u64(self.size_bytes);
        e.u32(self.block_size);
        e.u64(self.mapped_grains);
        e.bytes(self.name.as_bytes());
        e.bytes(&self.meta);
        seal(&key::snapshot(id.branch, id.epoch), e.into_bytes())
    }

    /// Reads a value.
    ///
    /// # Errors
    /// `Corrupt` or `Version`.
    pub fn decode(id: SnapshotId, value: &[u8]) -> Result<Self> {
        let mut d = Dec::new(
            unseal(&key::snapshot(id.branch, id.epoch), value)?,
            "snapshot record",
        );
        version(&mut d)?;
        let state = match d.u8()? {
            0 => SnapshotState::Live,
            1 => SnapshotState::Hidden,
            2 => SnapshotState::Dying,
            _ => return Err(d.bad("state")),
        };
        let consistency = match d.u8()? {
            0 => Consistency::Crash,
            1 => Consistency::Filesystem,
            2 => Consistency::Application,
            _ => return Err(d.bad("consistency")),
        };
        let (flags, created_ms, lock_until_ms) = (d.u8()?, d.i64()?, d.i64()?);
        let (size_bytes, block_size, mapped_grains) = (d.u64()?, d.u32()?, d.u64()?);
        let (name, meta) = (d.text()?, d.bytes()?);
        d.end()?;
        Ok(Self {
            name,
            created_ms,
            size_bytes,
            block_size,
            mapped_grains,
            consistency,
            state,
            hold: flags & FLAG_HOLD != 0,
            sealed: flags & FLAG_SEALED != 0,
            lock_until_ms,
            meta,
        })
    }
}

/// Value of `M`, sealed under its key.
#[must_use]
pub fn encode_page(k: PageKey, page: &Page) -> Vec<u8> {
    seal(&key::page(k), page.encode())
}

/// Reads a value of `M`.
///
/// # Errors
/// `Corrupt`: also when a page was found under another key than its own.
pub fn decode_page(k: PageKey, value: &[u8]) -> Result<Page> {
    Page::decode(unseal(&key::page(k), value)?)
}

/// One bit for each grain of a chunk; set = in use.
pub type Bits = [u64; CHUNK_GRAINS / 64];

/// Value of `A`, sealed under its key.
#[must_use]
pub fn encode_bitmap(chunk: u32, bits: &Bits) -> Vec<u8> {
    let mut e = Enc::default();
    e.u8(RECORD_VERSION);
    bits.iter().for_each(|w| e.u64(*w));
    seal(&key::bitmap(chunk), e.into_bytes())
}

/// Reads a value of `A`.
///
/// # Errors
/// `Corrupt` or `Version`.
pub fn decode_bitmap(chunk: u32, value: &[u8]) -> Result<Bits> {
    let mut d = Dec::new(unseal(&key::bitmap(chunk), value)?, "allocation bitmap");
    version(&mut d)?;
    let mut bits = [0; CHUNK_GRAINS / 64];
    for word in &mut bits {
        *word = d.u64()?;
    }
    d.end()?;
    Ok(bits)
}

/// What is known of a chunk without its bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkCount {
    /// Free grains.
    pub free: u16,
    /// Some grain of it has extra references: there are `R` values.
    pub shared: bool,
}

/// In a free count: the chunk has `R` values.
const COUNT_SHARED: u16 = 1 << 15;

/// Value of `a`, sealed under its key: free grains of each chunk of the block.
#[must_use]
pub fn encode_counts(block: u32, counts: &[ChunkCount]) -> Vec<u8> {
    let mut e = Enc::default();
    e.u8(RECORD_VERSION);
    let flag = |shared: bool| if shared { COUNT_SHARED } else { 0 };
    counts.iter().for_each(|c| e.u16(c.free | flag(c.shared)));
    seal(&key::counts(block), e.into_bytes())
}

/// Reads a value of `a`.
///
/// # Errors
/// `Corrupt` or `Version`.
pub fn decode_counts(block: u32, value: &[u8]) -> Result<Vec<ChunkCount>> {
    let mut d = Dec::new(unseal(&key::counts(block), value)?, "free counts");
    version(&mut d)?;
    let mut counts = Vec::new();
    while !d.is_empty() {
        let n = d.u16()?;
        let (free, shared) = (n & !COUNT_SHARED, n & COUNT_SHARED != 0);
        if usize::from(free) > CHUNK_GRAINS || counts.len() >= COUNTS_PER_BLOCK {
            return Err(d.bad("count"));
        }
        counts.push(ChunkCount { free, shared });
    }
    Ok(counts)
}

/// Grains whose extra references share one value of `R`.
pub const REFERENCE_PART: usize = CHUNK_GRAINS / 2;
/// In `R`: as many or more; the exact count has a key of its own. As the part in a key: that key.
pub const SPILLED: u8 = 255;
const REFERENCES_RAW: u8 = 1;
const REFERENCES_RUNS: u8 = 2;

/// Value of `R`, sealed under its key: extra references of [`REFERENCE_PART`] grains, one byte each.
#[must_use]
pub fn encode_references(chunk: u32, part: u8, counts: &[u8]) -> Vec<u8> {
    let runs: Vec<&[u8]> = counts.chunk_by(|a, b| a == b).collect();
    let mut e = Enc::default();
    e.u8(RECORD_VERSION);
    if runs.len() * 3 < counts.len() {
        e.u8(REFERENCES_RUNS);
        for run in runs {
            e.u16(u16::try_from(run.len()).expect("at most a part"));
            e.u8(run.first().copied().unwrap_or(0));
        }
    } else {
        e.u8(REFERENCES_RAW);
        e.raw(counts);
    }
    seal(&key::references(chunk, part), e.into_bytes())
}

/// Reads a value of `R`.
///
/// # Errors
/// `Corrupt` or `Version`.
pub fn decode_references(chunk: u32, part: u8, value: &[u8]) -> Result<Vec<u8>> {
    let mut d = Dec::new(unseal(&key::references(chunk, part), value)?, "extra references");
    version(&mut d)?;
    let mut counts = Vec::with_capacity(REFERENCE_PART);
    match d.u8()? {
        REFERENCES_RAW => counts.extend_from_slice(d.raw(REFERENCE_PART)?),
        REFERENCES_RUNS => {
            while !d.is_empty() {
                let (len, count) = (d.u16()?, d.u8()?);
                counts.resize(counts.len() + usize::from(len), count);
                if counts.len() > REFERENCE_PART {
                    return Err(d.bad("runs too long"));
                }
            }
        }
        _ => return Err(d.bad("unknown kind")),
    }
    d.end()?;
    if counts.len() != REFERENCE_PART || usize::from(part) >= CHUNK_GRAINS / REFERENCE_PART {
        return Err(d.bad("part"));
    }
    Ok(counts)
}

/// Value of the `R` key of one grain: its exact count of extra references.
#[must_use]
pub fn encode_spilled(chunk: u32, index: u16, count: u64) -> Vec<u8> {
    let mut e = Enc::default();
    e.u8(RECORD_VERSION);
    e.u64(count);
    seal(&key::spilled(chunk, index), e.into_bytes())
}

/// Reads the value of the `R` key of one grain.
///
/// # Errors
/// `Corrupt` or `Version`.
pub fn decode_spilled(chunk: u32, index: u16, value: &[u8]) -> Result<u64> {
    let mut d = Dec::new(unseal(&key::spilled(chunk, index), value)?, "extra references");
    version(&mut d)?;
    let count = d.u64()?;
    if usize::from(index) >= CHUNK_GRAINS {
        return Err(d.bad("grain"));
    }
    d.end()?;
    Ok(count)
}

/// New entries of one page version in one transaction group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// The version that they belong to.
    pub key: PageKey,
    /// Bit `i` set: entry `i` changed.
    pub mask: u64,
    /// The new entries, in ascending order of their index.
    pub entries: Vec<Entry>,
}

impl Delta {
    /// Index and entry of each change.
    pub fn changes(&self) -> impl Iterator<Item = (u8, Entry)> + '_ {
        indices(self.mask).zip(self.entries.iter().copied())
    }

    pub(crate) fn encode(&self, e: &mut Enc) {
        e.u32(self.key.branch.0);
        e.u32(self.key.page);
        e.u32(self.key.epoch.0);
        e.u64(self.mask);
        // Holes carry no entry: an UNMAP of a whole page costs 28 bytes instead of 540.
        let held = self
            .changes()
            .filter(|(_, x)| !x.is_hole())
            .fold(0u64, |m, (i, _)| m | 1 << i);
        e.u64(held);
        self.entries
            .iter()
            .filter(|x| !x.is_hole())
            .for_each(|x| x.encode(e));
    }

    pub(crate) fn decode(d: &mut Dec<'_>) -> Result<Self> {
        let key = PageKey {
            branch: BranchId(d.u32()?),
            page: d.u32()?,
            epoch: Epoch(d.u32()?),
        };
        let (mask, held) = (d.u64()?, d.u64()?);
        if held & !mask != 0 {
            return Err(d.bad("mask"));
        }
        let mut entries = Vec::new();
        for i in indices(mask) {
            entries.push(if held & (1 << i) == 0 {
                Entry::HOLE
            } else {
                Entry::decode(d)?
            });
        }
        Ok(Self { key, mask, entries })
    }
}

/// Indices of the set bits, ascending.
pub(crate) fn indices(mask: u64) -> impl Iterator<Item = u8> {
    (0..64u8).filter(move |i| mask & (1 << i) != 0)
}

/// Splits the deltas of a transaction group into `J` values of bounded length, sealed under their keys.
#[must_use]
pub fn encode_journal(txg: u64, deltas: &[Delta]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut out: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut payload = Vec::new();
    let finish = |payload: Vec<u8>, out: &mut Vec<(Vec<u8>, Vec<u8>)>| {
        if !payload.is_empty() {
            let seq = u32::try_from(out.len()).expect("a transaction group has far fewer values");
            let k = key::journal(txg, seq);
            let v = seal(&k, payload);
            out.push((k, v));
        }
    };
    for delta in deltas {
        let mut e = Enc::default();
        delta.encode(&mut e);
        let bytes = e.into_bytes();
        if payload.len() + bytes.len() > JOURNAL_PAYLOAD_BYTES {
            finish(std::mem::take(&mut payload), &mut out);
        }
        payload.extend_from_slice(&bytes);
    }
    finish(payload, &mut out);
    out
}

/// Reads a value of `J`.
///
/// # Errors
/// `Corrupt`.
pub fn decode_journal(txg: u64, seq: u32, value: &[u8]) -> Result<Vec<Delta>> {
    let mut d = Dec::new(unseal(&key::journal(txg, seq), value)?, "delta log");
    let mut deltas = Vec::new();
    while !d.is_empty() {
        deltas.push(Delta::decode(&mut d)?);
    }
    Ok(deltas)
}

/// A count of mapped grains for people: while a loan runs it may be below zero.
pub(crate) fn counted(mapped_grains: u64) -> u64 {
    u64::try_from(mapped_grains.cast_signed()).unwrap_or(0)
}

/// What a background job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Frees what only this dying snapshot holds.
    DropSnapshot(SnapshotId),
    /// Frees what only the head of this branch holds.
    DropHead(BranchId),
    /// Folds a branch whose only snapshot is hidden into its only child.
    Collapse {
        /// The branch that goes.
        from: SnapshotId,
        /// The child that stays.
        into: BranchId,
    },
    /// Zeroes whole pages of a branch for everybody who looks as of a later epoch (a tombstone).
    Zero {
        /// The branch.
        branch: BranchId,
        /// What was born up to here is gone.
        epoch: Epoch,
        /// First page.
        first: PageNo,
        /// The page after the last.
        end: PageNo,
        /// To holes; otherwise what was mapped becomes explicit zeroes.
        unmap: bool,
    },
    /// Gives whole pages of a branch what a snapshot shows, for everybody who looks as of a later epoch (a loan).
    Lend {
        /// The branch, and the snapshot of what it showed before.
        to: SnapshotId,
        /// Whose pages are lent.
        from: SnapshotId,
        /// First page.
        first: PageNo,
        /// The page after the last.
        end: PageNo,
        /// Number of the lender's grain that the first entry of the first page shows.
        grain: u64,
    },
}

/// Value of `D`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobRecord {
    /// What it does.
    pub kind: JobKind,
    /// Pages below this one are done.
    pub cursor: PageNo,
    /// Of a tombstone: entries with a grain that it has taken from what the map shows. 0 of others.
    pub masked: u64,
    /// Of a loan: by how many entries with a grain the map shows more than the counts say so far. 0 of others.
    pub gained: i64,
}

impl JobRecord {
    /// A job that has done nothing yet.
    #[must_use]
    pub fn new(kind: JobKind) -> Self {
        Self {
            kind,
            cursor: 0,
            masked: 0,
            gained: 0,
        }
    }

    /// The value, sealed under its key.
    #[must_use]
    pub fn encode(&self, id: u64) -> Vec<u8> {
        let mut e = Enc::default();
        e.u8(RECORD_VERSION);
        let (kind, branch, epoch, into) = match self.kind {
            JobKind::DropSnapshot(s) => (1, s.branch, s.epoch, BranchId(0)),
            JobKind::DropHead(b) => (2, b, Epoch::ZERO, BranchId(0)),
            JobKind::Collapse { from, into } => (3, from.branch, from.epoch, into),
            JobKind::Zero {
                branch,
                epoch,
                first,
                unmap,
                ..
            } => (if unmap { 4 } else { 5 }, branch, epoch, BranchId(first)),
            JobKind::Lend { to, first, .. } => (6, to.branch, to.epoch, BranchId(first)),
        };
        e.u8(kind);
        e.u32(branch.0);
        e.u32(epoch.0);
        e.u32(into.0);
        e.u32(self.cursor);
        if let JobKind::Zero { end, .. } = self.kind {
            e.u32(end);
            e.u64(self.masked);
        }
        if let JobKind::Lend { from, end, grain, .. } = self.kind {
            e.u32(end);
            e.i64(self.gained);
            e.u32(from.branch.0);
            e.u32(from.epoch.0);
            e.u64(grain);
        }
        seal(&key::job(id), e.into_bytes())
    }

    /// Reads a value.
    ///
    /// # Errors
    /// `Corrupt` or `Version`.
    pub fn decode(id: u64, value: &[u8]) -> Result<Self> {
        let mut d = Dec::new(unseal(&key::job(id), value)?, "job record");
        version(&mut d)?;
        let kind = d.u8()?;
        let (branch, epoch, into) = (BranchId(d.u32()?), Epoch(d.u32()?), BranchId(d.u32()?));
        let from = SnapshotId { branch, epoch };
        let cursor = d.u32()?;
        let (mut end, mut masked, mut gained) = (0, 0, 0);
        match kind {
            4 | 5 => (end, masked) = (d.u32()?, d.u64()?),
            6 => (end, gained) = (d.u32()?, d.i64()?),
            _ => {}
        }
        let kind = match kind {
            6 => JobKind::Lend {
                to: from,
                from: SnapshotId {
                    branch: BranchId(d.u32()?),
                    epoch: Epoch(d.u32()?),
                },
                first: into.0,
                end,
                grain: d.u64()?,
            },
            4 | 5 => JobKind::Zero {
                branch,
                epoch,
                first: into.0,
                end,
                unmap: kind == 4,
            },
            1 => JobKind::DropSnapshot(from),
            2 => JobKind::DropHead(branch),
            3 => JobKind::Collapse { from, into },
            _ => return Err(d.bad("kind")),
        };
        d.end()?;
        Ok(Self {
            kind,
            cursor,
            masked,
            gained,
        })
    }
}

/// Most positions that are remembered of one bad grain.
pub const BAD_PLACES: usize = 64;

/// Value of `B`: a grain whose bytes are not what was written, or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRecord {
    /// The checksum that its bytes should have; `None` = the medium refused to read it, and no checksum is recorded.
    pub crc: Option<u32>,
    /// When it was found, in milliseconds since 1970 UTC.
    pub found_ms: i64,
    /// Where it was met: numbers of grains within a volume, ascending, at most [`BAD_PLACES`].
    pub places: Vec<u64>,
}

impl BadRecord {
    /// The value, sealed under its key.
    #[must_use]
    pub fn encode(&self, grain: u64) -> Vec<u8> {
        let mut e = Enc::default();
        e.u8(RECORD_VERSION);
        e.u8(u8::from(self.crc.is_some()));
        e.u32(self.crc.unwrap_or(0));
        e.i64(self.found_ms);
        self.places.iter().take(BAD_PLACES).for_each(|p| e.u64(*p));
        seal(&key::bad(grain), e.into_bytes())
    }

    /// Reads a value.
    ///
    /// # Errors
    /// `Corrupt` or `Version`.
    pub fn decode(grain: u64, value: &[u8]) -> Result<Self> {
        let mut d = Dec::new(unseal(&key::bad(grain), value)?, "bad grain");
        version(&mut d)?;
        let (has_crc, crc, found_ms) = (d.u8()?, d.u32()?, d.i64()?);
        let mut places = Vec::new();
        while !d.is_empty() {
            if places.len() >= BAD_PLACES {
                return Err(d.bad("too many positions"));
            }
            places.push(d.u64()?);
        }
        Ok(Self {
            crc: (has_crc != 0).then_some(crc),
            found_ms,
            places,
        })
    }
}

/// Value of `K`, sealed under its key.
#[must_use]
pub fn encode_value(name: &str, value: &[u8]) -> Vec<u8> {
    seal(&key::value(name), value.to_vec())
}

/// Reads a value of `K`.
///
/// # Errors
/// `Corrupt`.
pub fn decode_value(name: &str, value: &[u8]) -> Result<Vec<u8>> {
    unseal(&key::value(name), value).map(<[u8]>::to_vec)
}

const _: () = assert!(CHUNK_GRAINS.is_multiple_of(PAGE_ENTRIES));

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
