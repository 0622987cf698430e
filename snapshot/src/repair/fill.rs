//! The new metadata: everything that was read, and everything that follows from it.

use super::pages::bad_records;
use super::{Mapped, Repair};
use crate::Result;
use crate::meta::{Batch, MetaStore};
use crate::offline::{Overlay, each};
use crate::record::{
    self, BranchRecord, CHUNK_GRAINS, COUNTS_PER_BLOCK, ChunkCount, JobKind, JobRecord, Key, PageKey,
    SnapshotRecord, SystemRecord, key, table,
};
use crate::refs::Refs;
use crate::types::{Epoch, SnapshotState};

/// Changes per batch.
const BATCH: usize = 1024;

struct Out<'a> {
    meta: &'a mut dyn MetaStore,
    batch: Batch,
}

impl Out<'_> {
    fn put(&mut self, key: Vec<u8>, value: Vec<u8>) -> Result<()> {
        self.batch.put(key, value);
        if self.batch.changes.len() < BATCH {
            return Ok(());
        }
        self.meta.apply(&std::mem::take(&mut self.batch))
    }
}

impl Repair {
    /// Fills an empty store. The pool record comes last: without it nothing opens.
    pub(super) fn fill(&self, old: &mut dyn MetaStore, new: &mut dyn MetaStore) -> Result<()> {
        let mut out = Out {
            meta: new,
            batch: Batch::default(),
        };
        self.fill_pages(old, &mut out)?;
        self.fill_records(&mut out)?;
        each(old, table::VALUE, |_, (key, value)| {
            // A damaged one was named.
            match Key::parse(&key) {
                Ok(Key::Value(name)) if record::decode_value(&name, &value).is_ok() => out.put(key, value),
                _ => Ok(()),
            }
        })?;
        self.fill_bitmaps(&mut out)?;
        let system = SystemRecord {
            checkpoint: self.system.txg,
            next_job: self.next_job(),
            ..self.system.clone()
        };
        out.put(key::system(), system.encode())?;
        out.meta.apply(&std::mem::take(&mut out.batch))
    }

    fn fill_pages(&self, old: &mut dyn MetaStore, out: &mut Out<'_>) -> Result<()> {
        let overlay = Overlay::read(old, &self.before, |_| {})?;
        let placeholders = self.lost.placeholders(&self.before);
        let now = jiff::Timestamp::now().as_millisecond();
        self.lost
            .each_page(old, &self.before, &self.records, &overlay, |page, _| {
                for (grain, bad) in bad_records(&page, &placeholders, now) {
                    out.put(key::bad(grain), bad.encode(grain))?;
                }
                for (epoch, content) in &page.versions {
                    let place = PageKey {
                        branch: page.branch,
                        page: page.page,
                        epoch: *epoch,
                    };
                    out.put(key::page(place), record::encode_page(place, content))?;
                    out.put(key::changed(place), Vec::new())?;
                }
                Ok(())
            })
    }

    fn fill_records(&self, out: &mut Out<'_>) -> Result<()> {
        let Mapped { heads, snapshots } = &self.mapped;
        for (id, branch) in &self.records.branches {
            let record = BranchRecord {
                mapped_grains: heads.get(id).map_or(branch.mapped_grains, |n| {
                    n.wrapping_add_signed(self.records.ahead(*id, Epoch(u32::MAX)))
                }),
                ..branch.clone()
            };
            out.put(key::branch(*id), record.encode(*id))?;
        }
        for (id, snapshot) in &self.records.snapshots {
            let record = SnapshotRecord {
                mapped_grains: snapshots.get(id).map_or(snapshot.mapped_grains, |n| {
                    n.wrapping_add_signed(self.records.ahead(id.branch, id.epoch))
                }),
                ..snapshot.clone()
            };
            out.put(key::snapshot(id.branch, id.epoch), record.encode(*id))?;
        }
        for (id, job) in self
            .records
            .jobs
            .iter()
            .map(|(id, job)| (*id, *job))
            .chain(self.new_jobs())
        {
            out.put(key::job(id), job.encode(id))?;
        }
        for (grain, bad) in &self.records.bad {
            out.put(key::bad(*grain), bad.encode(*grain))?;
        }
        Ok(())
    }

    /// Jobs that the state of the records calls for and that are gone.
    fn new_jobs(&self) -> impl Iterator<Item = (u64, JobRecord)> {
        let records = &self.records;
        let dying = records
            .snapshots
            .iter()
            .filter(|(_, n)| n.state == SnapshotState::Dying);
        let dying = dying.map(|(id, _)| JobKind::DropSnapshot(*id));
        let empty = records.branches.iter().filter(|(id, branch)| {
            !branch.head && records.snapshots_of(**id).next().is_none() && records.children_of(**id) == 0
        });
        let empty = empty.map(|(id, _)| JobKind::DropHead(*id));
        let missing = dying.chain(empty).filter(|kind| !records.has_job(|k| k == *kind));
        let first = records
            .jobs
            .keys()
            .next_back()
            .map_or(0, |id| id + 1)
            .max(self.system.next_job);
        (first..).zip(missing.map(JobRecord::new))
    }

    fn next_job(&self) -> u64 {
        let new = self.new_jobs().last().map_or(0, |(id, _)| id + 1);
        let old = self.records.jobs.keys().next_back().map_or(0, |id| id + 1);
        new.max(old).max(self.system.next_job)
    }

    fn fill_bitmaps(&self, out: &mut Out<'_>) -> Result<()> {
        let mut counts = Vec::new();
        for chunk in 0..self.system.chunks {
            let used = self.used.get(&chunk);
            let taken: u32 = used.map_or(0, |bits| bits.iter().map(|word| word.count_ones()).sum());
            let all = u32::try_from(CHUNK_GRAINS).unwrap_or(u32::MAX);
            let extra = self.extra.get(&chunk);
            counts.push(ChunkCount {
                free: u16::try_from(all.saturating_sub(taken)).unwrap_or(0),
                shared: extra.is_some(),
            });
            if let Some(extra) = extra {
                let refs = Refs::of(extra.iter().copied().enumerate().filter(|(_, n)| *n > 0));
                for (key, value) in refs.encode_all(chunk) {
                    value.map_or(Ok(()), |value| out.put(key, value))?;
                }
            }
            if let Some(bits) = used {
                out.put(key::bitmap(chunk), record::encode_bitmap(chunk, bits))?;
            }
        }
        for (block, counts) in (0u32..).zip(counts.chunks(COUNTS_PER_BLOCK)) {
            out.put(key::counts(block), record::encode_counts(block, counts))?;
        }
        Ok(())
    }
}
