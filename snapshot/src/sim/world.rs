//! A disk and a metadata store in memory that share one moment of power cut.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Loss, Medium, Rng};
use crate::disk::Disk;
use crate::meta::{Barrier, Batch, MetaStore, Pair};
use crate::{Error, Result};

/// What the store asks of its media, for counting and for faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// Data file: read.
    Read,
    /// Data file: write.
    Write,
    /// Data file: sync.
    Sync,
    /// Data file: punch a hole.
    Punch,
    /// Metadata: get or scan.
    MetaRead,
    /// Metadata: apply a batch.
    MetaApply,
    /// Metadata: flush.
    MetaFlush,
    /// Metadata: the barrier.
    MetaSync,
}

impl Call {
    /// All calls.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Sync,
        Self::Punch,
        Self::MetaRead,
        Self::MetaApply,
        Self::MetaFlush,
        Self::MetaSync,
    ];
}

/// What a failing call says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// EIO. A failing sync also forgets what it was asked to keep, as page caches do.
    Io,
    /// ENOSPC.
    NoSpace,
}

impl Failure {
    fn error(self) -> io::Error {
        match self {
            Self::Io => io::Error::from_raw_os_error(5),
            Self::NoSpace => io::Error::from_raw_os_error(28),
        }
    }
}

/// A call that is to fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which.
    pub call: Call,
    /// The how-manyth of its kind from now on, from 0.
    pub nth: u64,
    /// How.
    pub failure: Failure,
    /// Whether all later ones fail as well.
    pub sticky: bool,
}

/// Metadata in memory: what is applied, and which batches a cut may still take away.
#[derive(Clone, Debug, Default)]
struct Meta {
    applied: BTreeMap<Vec<u8>, Vec<u8>>,
    durable: BTreeMap<Vec<u8>, Vec<u8>>,
    pending: Vec<Batch>,
    /// Batches ever made durable; with `flushed`, the position up to which a barrier counts.
    settled: u64,
    flushed: u64,
}

fn change(map: &mut BTreeMap<Vec<u8>, Vec<u8>>, batch: &Batch) {
    for (key, value) in &batch.changes {
        match value {
            Some(value) => map.insert(key.clone(), value.clone()),
            None => map.remove(key),
        };
    }
}

impl Meta {
    fn apply(&mut self, batch: &Batch) {
        change(&mut self.applied, batch);
        self.pending.push(batch.clone());
    }

    fn make_durable(&mut self, mark: u64) {
        let covered = usize::try_from(mark.saturating_sub(self.settled)).unwrap_or(usize::MAX);
        for batch in self.pending.drain(..covered.min(self.pending.len())) {
            change(&mut self.durable, &batch);
            self.settled += 1;
        }
    }

    /// Whole batches in their order: sled's log is cut where it is torn.
    fn after_cut(&self, loss: Loss, rng: &mut Rng) -> Self {
        let mut left = self.durable.clone();
        for batch in self.pending.iter().take(rng.kept(self.pending.len(), loss)) {
            change(&mut left, batch);
        }
        Self {
            applied: left.clone(),
            durable: left,
            ..Self::default()
        }
    }
}

#[derive(Clone, Debug, Default)]
struct State {
    disk: Medium,
    meta: Meta,
    calls: u64,
    count: BTreeMap<Call, u64>,
    faults: Vec<Fault>,
    /// Bytes that the data file may hold; `None` = no bound.
    capacity: Option<u64>,
    reluctant: bool,
    delay: Duration,
    capture_at: Option<u64>,
    captured: Option<Box<(Medium, Meta)>>,
}

impl State {
    /// Counts a call, takes the picture that was asked for, and says whether the call fails.
    fn enter(&mut self, call: Call) -> io::Result<()> {
        if self.capture_at == Some(self.calls) {
            self.captured = Some(Box::new((self.disk.clone(), self.meta.clone())));
        }
        self.calls += 1;
        *self.count.entry(call).or_default() += 1;
        let due = self
            .faults
            .iter()
            .position(|fault| fault.call == call && fault.nth == 0);
        for fault in self.faults.iter_mut().filter(|fault| fault.call == call) {
            fault.nth = fault.nth.saturating_sub(1);
        }
        let Some(fault) = due.and_then(|due| self.faults.get(due).copied().map(|fault| (due, fault))) else {
            return Ok(());
        };
        if !fault.1.sticky {
            self.faults.remove(fault.0);
        }
        Err(fault.1.failure.error())
    }

    fn has_room(&self, offset: u64, len: usize) -> bool {
        let Some(capacity) = self.capacity else {
            return true;
        };
        let more = self.disk.would_allocate(offset, len as u64);
        more == 0 || self.disk.allocated() + more <= capacity
    }
}

/// One simulated machine: a data file and a metadata store. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct World(Arc<Mutex<State>>);

impl World {
    /// An empty machine.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, call: Call) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        state.enter(call)?;
        if state.delay.is_zero() {
            return Ok(state);
        }
        let delay = state.delay;
        drop(state);
        std::thread::sleep(delay);
        Ok(self.lock())
    }

    /// The data file.
    #[must_use]
    pub fn disk(&self) -> SimDisk {
        SimDisk(self.clone())
    }

    /// The metadata store.
    #[must_use]
    pub fn meta(&self) -> SimMeta {
        SimMeta(self.clone())
    }

    /// The machine that a power cut now could leave. This one goes on.
    #[must_use]
    pub fn after_cut(&self, loss: Loss, rng: &mut Rng) -> Self {
        self.after_cuts(loss, loss, rng)
    }

    /// As [`World::after_cut`], with a loss of its own for the data file and for the metadata.
    #[must_use]
    pub fn after_cuts(&self, disk: Loss, meta: Loss, rng: &mut Rng) -> Self {
        let state = self.lock();
        Self::left((&state.disk, &state.meta), (disk, meta), rng)
    }

    fn left(of: (&Medium, &Meta), loss: (Loss, Loss), rng: &mut Rng) -> Self {
        let (disk, meta) = (of.0.after_cut(loss.0, rng), of.1.after_cut(loss.1, rng));
        Self(Arc::new(Mutex::new(State {
            disk,
            meta,
            ..State::default()
        })))
    }

    /// Takes a picture right before the `after`-th call from now on (0 = the next one).
    pub fn capture(&self, after: u64) {
        let mut state = self.lock();
        state.capture_at = Some(state.calls + after);
        state.captured = None;
    }

    /// The machine that a power cut at the captured moment could leave, once that moment has come.
    #[must_use]
    pub fn captured(&self, loss: Loss, rng: &mut Rng) -> Option<Self> {
        let state = self.lock();
        let (disk, meta) = &**state.captured.as_ref()?;
        Some(Self::left((disk, meta), (loss, loss), rng))
    }

    /// Calls so far, of all kinds.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Calls of one kind so far.
    #[must_use]
    pub fn count(&self, call: Call) -> u64 {
        self.lock().count.get(&call).copied().unwrap_or(0)
    }

    /// Makes a call fail.
    pub fn fail(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Takes back all faults that have not happened.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    /// Bounds the bytes that the data file may hold.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().capacity = bytes;
    }

    /// Makes every call that must not wait say that it would have to.
    pub fn set_reluctant(&self, reluctant: bool) {
        self.lock().reluctant = reluctant;
    }

    /// Makes every call take this long.
    pub fn set_delay(&self, delay: Duration) {
        self.lock().delay = delay;
    }

    /// Bytes of the data file that are not holes.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.lock().disk.allocated()
    }

    /// Changes one bit of the data file behind the store's back.
    pub fn flip_data_bit(&self, bit: u64) {
        let mut state = self.lock();
        let mut byte = [0];
        if state.disk.read(bit / 8, &mut byte) == 1 {
            let flipped = byte.map(|byte| byte ^ (1 << (bit % 8)));
            state.disk.write(bit / 8, &flipped);
        }
    }

    /// All keys and values of the metadata store, for looking and for damaging.
    #[must_use]
    pub fn pairs(&self) -> Vec<Pair> {
        self.lock()
            .meta
            .applied
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    /// Changes the metadata behind the store's back.
    pub fn tamper(&self, batch: &Batch) {
        let mut state = self.lock();
        change(&mut state.meta.applied, batch);
        change(&mut state.meta.durable, batch);
    }
}

/// The data file of a [`World`].
#[derive(Clone, Debug)]
pub struct SimDisk(World);

impl Disk for SimDisk {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.0.enter(Call::Read)?;
        let there = state.disk.read(offset, buf);
        buf.get_mut(there..).unwrap_or_default().fill(0);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.0.lock().reluctant {
            buf.fill(0xdb);
            return Ok(false);
        }
        self.read_at(offset, buf).map(|()| true)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.0.enter(Call::Write)?;
        if !state.has_room(offset, data.len()) {
            return Err(Failure::NoSpace.error());
        }
        state.disk.write(offset, data);
        Ok(())
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        if self.0.lock().reluctant {
            // The trait allows it, so the store must stand it: half is written, and the answer is "no".
            // Whole sectors where there are several: no page cache tears one by itself.
            let half = data.len() / 2;
            let whole = half - half % 512;
            let half = data
                .get(..if whole > 0 { whole } else { half })
                .unwrap_or_default();
            return self.write_at(offset, half).map(|()| false);
        }
        self.write_at(offset, data).map(|()| true)
    }

    fn sync_data(&self) -> io::Result<()> {
        // Covers what was written before it began, whatever is written while it runs.
        let mark = self.0.lock().disk.mark();
        match self.0.enter(Call::Sync) {
            Ok(mut state) => state.disk.make_durable(mark),
            Err(error) => {
                self.0.lock().disk.forget(mark);
                return Err(error);
            }
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.enter(Call::Punch)?.disk.punch(offset, len);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().disk.len())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let state = self.0.lock();
        Ok(state.capacity.map_or(u64::MAX >> 8, |capacity| {
            capacity.saturating_sub(state.disk.allocated())
        }))
    }
}

/// The metadata store of a [`World`].
#[derive(Clone, Debug)]
pub struct SimMeta(World);

fn meta_error(source: io::Error) -> Error {
    Error::io("simulate", "metadata", source)
}

impl MetaStore for SimMeta {
    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let state = self.0.enter(Call::MetaRead).map_err(meta_error)?;
        Ok(state.meta.applied.get(key).cloned())
    }

    fn scan(&mut self, from: &[u8], below: &[u8], limit: usize) -> Result<Vec<Pair>> {
        let state = self.0.enter(Call::MetaRead).map_err(meta_error)?;
        if from >= below {
            return Ok(Vec::new());
        }
        let range = state.meta.applied.range(from.to_vec()..below.to_vec());
        Ok(range
            .take(limit)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    fn last(&mut self, from: &[u8], below: &[u8]) -> Result<Option<Pair>> {
        let state = self.0.enter(Call::MetaRead).map_err(meta_error)?;
        if from >= below {
            return Ok(None);
        }
        let mut range = state.meta.applied.range(from.to_vec()..below.to_vec());
        Ok(range.next_back().map(|(key, value)| (key.clone(), value.clone())))
    }

    fn apply(&mut self, batch: &Batch) -> Result<()> {
        self.0
            .enter(Call::MetaApply)
            .map_err(meta_error)?
            .meta
            .apply(batch);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let mut state = self.0.enter(Call::MetaFlush).map_err(meta_error)?;
        state.meta.flushed = state.meta.settled + state.meta.pending.len() as u64;
        Ok(())
    }

    fn barrier(&self) -> Arc<dyn Barrier> {
        Arc::new(SimBarrier(self.0.clone()))
    }

    fn size_on_disk(&mut self) -> Result<u64> {
        let state = self.0.lock();
        Ok(state
            .meta
            .applied
            .iter()
            .map(|(key, value)| (key.len() + value.len()) as u64)
            .sum())
    }
}

struct SimBarrier(World);

impl Barrier for SimBarrier {
    fn sync(&self) -> Result<()> {
        let mark = self.0.lock().meta.flushed;
        let mut state = self.0.enter(Call::MetaSync).map_err(meta_error)?;
        state.meta.make_durable(mark);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(meta: &mut SimMeta, key: &[u8]) {
        let mut batch = Batch::default();
        batch.put(key.to_vec(), b"x".to_vec());
        batch.put([key, b"+"].concat(), b"x".to_vec());
        meta.apply(&batch).unwrap();
    }

    #[test]
    fn a_barrier_covers_what_was_flushed_and_a_cut_keeps_whole_batches_in_order() {
        let world = World::new();
        let mut meta = world.meta();
        put(&mut meta, b"a");
        meta.flush().unwrap();
        put(&mut meta, b"b");
        meta.barrier().sync().unwrap();
        put(&mut meta, b"c");
        let keys = |world: &World| {
            world
                .pairs()
                .into_iter()
                .map(|(key, _)| key.len())
                .collect::<Vec<_>>()
        };
        let mut rng = Rng::new(4);
        assert_eq!(keys(&world.after_cut(Loss::All, &mut rng)), [1, 2]);
        assert_eq!(
            keys(&world.after_cut(Loss::Nothing, &mut rng)),
            [1, 2, 1, 2, 1, 2]
        );
        let lens: std::collections::BTreeSet<usize> = (0..100)
            .map(|_| keys(&world.after_cut(Loss::Random, &mut rng)).len())
            .collect();
        assert_eq!(lens.into_iter().collect::<Vec<_>>(), [2, 4, 6]);
    }

    #[test]
    fn faults_come_when_asked_and_pictures_are_of_their_moment() {
        let world = World::new();
        let disk = world.disk();
        world.fail(Fault {
            call: Call::Write,
            nth: 1,
            failure: Failure::NoSpace,
            sticky: false,
        });
        world.capture(1);
        disk.write_at(0, b"one").unwrap();
        assert_eq!(
            disk.write_at(0, b"two").unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
        disk.write_at(0, b"two").unwrap();
        disk.sync_data().unwrap();
        let mut buf = [0; 3];
        let before = world.captured(Loss::Nothing, &mut Rng::new(1)).unwrap();
        before.disk().read_at(0, &mut buf).unwrap();
        assert_eq!(&buf, b"one");
        world.set_capacity(Some(4096));
        disk.write_at(10, b"fits").unwrap();
        assert_eq!(
            disk.write_at(4096, b"does not").unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
        world.set_reluctant(true);
        assert!(!disk.try_write_at(0, b"half").unwrap() && !disk.try_read_at(0, &mut buf).unwrap());
        disk.read_at(0, &mut buf).unwrap();
        assert_eq!(&buf, b"hao");
    }
}
