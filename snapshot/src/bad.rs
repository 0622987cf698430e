//! Grains whose bytes are not what was written, or that the medium cannot read: remembered (`B`), listed by volume,
//! snapshot and range, forgotten when nothing places them any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::inner::Inner;
use crate::page::{Entry, PAGE_ENTRIES, Page, PageNo};
use crate::pool::Pool;
use crate::record::{BAD_PLACES, BadRecord};
use crate::state::State;
use crate::types::{BranchId, Epoch, SnapshotId, SnapshotState, StoreEvent, VolumeId};
use crate::{Error, Result};

/// A grain that was just found to be bad.
pub(crate) struct Bad {
    pub(crate) grain: u64,
    /// What its checksum should be; `None` = it could not be read.
    pub(crate) crc: Option<u32>,
    /// Number of the grain within the volume.
    pub(crate) place: u64,
    /// First byte on the volume that was asked for and cannot be had.
    pub(crate) offset: u64,
}

/// All known bad grains of a pool. Few: all in RAM.
#[derive(Default)]
pub(crate) struct BadGrains {
    grains: BTreeMap<u64, BadRecord>,
    count: Arc<AtomicUsize>,
}

impl BadGrains {
    /// Follows the number of bad grains, without the pool's lock.
    pub(crate) fn counter(&self) -> Arc<AtomicUsize> {
        self.count.clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.grains.len()
    }

    pub(crate) fn contains(&self, grain: u64) -> bool {
        !self.grains.is_empty() && self.grains.contains_key(&grain)
    }

    pub(crate) fn get(&self, grain: u64) -> Option<&BadRecord> {
        self.grains.get(&grain)
    }

    /// Grains, and the checksums that they should have.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u64, Option<u32>)> {
        self.grains.iter().map(|(grain, record)| (*grain, record.crc))
    }

    pub(crate) fn put(&mut self, grain: u64, record: BadRecord) {
        self.grains.insert(grain, record);
        self.count.store(self.grains.len(), Ordering::Release);
    }

    fn remove(&mut self, grain: u64) -> bool {
        let was = self.grains.remove(&grain).is_some();
        self.count.store(self.grains.len(), Ordering::Release);
        was
    }
}

impl State {
    /// Remembers a bad grain with the open transaction group; `true` when it was not known.
    fn note_bad(&mut self, bad: &Bad, now_ms: i64) -> bool {
        let known = self.bad.get(bad.grain).cloned();
        let fresh = known.is_none();
        let mut record = known.clone().unwrap_or(BadRecord {
            crc: None,
            found_ms: now_ms,
            places: Vec::new(),
        });
        record.crc = record.crc.or(bad.crc);
        if let Err(at) = record.places.binary_search(&bad.place)
            && record.places.len() < BAD_PLACES
        {
            record.places.insert(at, bad.place);
        }
        if known.as_ref() != Some(&record) {
            self.bad.put(bad.grain, record);
            self.open.bad.insert(bad.grain);
            self.open.mark();
        }
        fresh
    }

    /// A grain that reads right again is not bad any more.
    pub(crate) fn forget_bad(&mut self, grain: u64) -> bool {
        let was = self.bad.remove(grain);
        if was {
            self.open.bad.insert(grain);
            self.open.mark();
            self.open.events.push(StoreEvent::BadDataGone { grains: 1 });
        }
        was
    }

    /// What the closing transaction group frees is nobody's any more: whatever comes there is new. Gives those of them
    /// that were bad.
    pub(crate) fn forget_freed_bad(&mut self, freed: &[u64]) -> Vec<u64> {
        if self.bad.len() == 0 {
            return Vec::new();
        }
        let bad = freed.iter().copied().filter(|grain| self.bad.remove(*grain));
        bad.collect()
    }
}

impl Inner {
    /// The checksum that a grain's bytes must have: the recorded one, also where only another placement has it.
    pub(crate) fn expected_crc(&self, entry: Entry) -> Option<u32> {
        if entry.crc().is_some() || self.bad_count.load(Ordering::Acquire) == 0 {
            return entry.crc();
        }
        self.state().bad.get(entry.grain()?)?.crc
    }

    /// Remembers what a read found, and tells of what was not known.
    pub(crate) fn found_bad(&self, volume: Option<VolumeId>, found: &[Bad]) {
        let now = self.now_ms();
        let fresh: Vec<&Bad> = {
            let mut state = self.state();
            found.iter().filter(|bad| state.note_bad(bad, now)).collect()
        };
        for bad in fresh {
            let what = match bad.crc {
                Some(_) => "does not have the recorded checksum",
                None => "cannot be read",
            };
            tracing::error!(
                "data file: grain {} {what} (byte {} of a volume)",
                bad.grain,
                bad.offset
            );
            let offset = bad.place * u64::from(self.grain_bytes);
            self.tell(StoreEvent::BadData { volume, offset });
        }
    }
}

/// A range that cannot be read, as one volume or one of its snapshots shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadData {
    /// Volume in whose history it is.
    pub volume: VolumeId,
    /// Name of that volume; empty when it is gone and only clones keep its snapshot.
    pub volume_name: String,
    /// The snapshot that shows it, and its name (empty of a hidden one); `None` = the volume as it is now.
    pub snapshot: Option<(SnapshotId, String)>,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The medium answered, with other bytes than were written; otherwise it did not answer.
    pub checksum: bool,
    /// When it was found, in milliseconds since 1970 UTC.
    pub found_ms: i64,
}

/// Who may see a bad grain: a head or a snapshot.
struct Viewer {
    branch: BranchId,
    epoch: Epoch,
    size_bytes: u64,
    seen_as: BadData,
}

impl Pool {
    /// Every known range of bad data, of one volume and its snapshots or of all: by volume, the volume itself before its
    /// snapshots, by offset. Found by reads, by the recording of checksums and by a scrub.
    ///
    /// # Errors
    /// `Corrupt`, `Poisoned`.
    pub fn bad_data(&self, volume: Option<VolumeId>) -> Result<Vec<BadData>> {
        let inner = &self.inner;
        let _no_jobs = inner
            .job_gate
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let (bad, viewers) = {
            let state = inner.state();
            (state.bad.grains.clone(), state.viewers(volume))
        };
        let mut list = Vec::new();
        if bad.is_empty() {
            return Ok(list);
        }
        for viewer in viewers {
            inner.bad_of(&viewer, &bad, &mut list)?;
        }
        Ok(list)
    }
}

impl State {
    fn viewers(&self, volume: Option<VolumeId>) -> Vec<Viewer> {
        let wanted = |id: &VolumeId| volume.is_none_or(|v| v == *id);
        let name = |id: VolumeId| {
            let head = self.volumes.get(&id).and_then(|s| self.branches.get(&s.head()));
            head.map(|b| b.record.name.clone()).unwrap_or_default()
        };
        let seen_as = |volume, snapshot| BadData {
            volume,
            volume_name: name(volume),
            snapshot,
            offset: 0,
            len: 0,
            checksum: false,
            found_ms: 0,
        };
        let heads = self.volumes.values().filter(|s| wanted(&s.id)).map(|s| Viewer {
            branch: s.head(),
            epoch: Epoch(u32::MAX),
            size_bytes: s.size(),
            seen_as: seen_as(s.id, None),
        });
        let live = self
            .snapshots
            .iter()
            .filter(|(_, n)| n.state == SnapshotState::Live);
        let snapshots = live.filter_map(|(id, n)| {
            let volume = self.branches.get(&id.branch)?.record.volume;
            wanted(&volume).then(|| Viewer {
                branch: id.branch,
                epoch: id.epoch,
                size_bytes: n.size_bytes,
                seen_as: seen_as(volume, Some((*id, n.name.clone()))),
            })
        });
        let mut all: Vec<Viewer> = heads.chain(snapshots).collect();
        all.sort_by_key(|v| (v.seen_as.volume, v.seen_as.snapshot.as_ref().map(|(id, _)| *id)));
        all
    }
}

impl Inner {
    /// Adds the bad ranges that one viewer sees, neighbours joined.
    fn bad_of(&self, viewer: &Viewer, bad: &BTreeMap<u64, BadRecord>, list: &mut Vec<BadData>) -> Result<()> {
        let grain_bytes = u64::from(self.grain_bytes);
        let mut places: Vec<(u64, u64, &BadRecord)> = Vec::new();
        for (grain, record) in bad {
            places.extend(record.places.iter().map(|place| (*place, *grain, record)));
        }
        places.sort_by_key(|(place, grain, _)| (*place, *grain));
        let mut page: Option<(PageNo, Page)> = None;
        let first = list.len();
        for (place, grain, record) in places {
            let offset = place * grain_bytes;
            if offset >= viewer.size_bytes {
                continue;
            }
            let no = PageNo::try_from(place / PAGE_ENTRIES as u64)
                .map_err(|_| Error::corrupt("bad grain", format!("position {place}")))?;
            let index = u8::try_from(place % PAGE_ENTRIES as u64).expect("64 entries");
            if page.as_ref().is_none_or(|(have, _)| *have != no) {
                page = Some((no, self.resolve(viewer.branch, viewer.epoch, no)?.1));
            }
            let shown = page.as_ref().and_then(|(_, p)| p.at(index).grain());
            if shown != Some(grain) {
                continue;
            }
            let checksum = record.crc.is_some();
            let len = grain_bytes.min(viewer.size_bytes - offset);
            match list.get_mut(first..).and_then(<[BadData]>::last_mut) {
                Some(last) if last.offset + last.len == offset && last.checksum == checksum => {
                    last.len += len
                }
                _ => list.push(BadData {
                    offset,
                    len,
                    checksum,
                    found_ms: record.found_ms,
                    ..viewer.seen_as.clone()
                }),
            }
        }
        Ok(())
    }
}
