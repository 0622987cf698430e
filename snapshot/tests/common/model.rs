//! The reference: volumes and snapshots as plain vectors of stamps, with what a power cut may leave of them.
//!
//! Per sector a volume keeps every value that may be found after a cut: the one of the last flush and all later ones.
//! Names, snapshots, clones, sizes and holds are durable once acknowledged, so they have one value.

use std::collections::BTreeMap;

use super::facts::Stamp;

/// Sectors of a grain of the pool under test (4 KiB).
pub(crate) const GRAIN_SECTORS: u64 = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelVolume {
    /// Per sector what may be found, oldest first; the last is what reads return now.
    pub(crate) sectors: Vec<Vec<Stamp>>,
    pub(crate) read_only: bool,
    /// Per grain when it was last written: a diff may name no others.
    pub(crate) touched: BTreeMap<u64, u64>,
    /// When the volume began as a clone or was last reverted: diffs across that are judged by content only.
    pub(crate) reverted: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelSnapshot {
    pub(crate) volume: String,
    pub(crate) name: String,
    pub(crate) stamps: Vec<Stamp>,
    pub(crate) hold: bool,
    /// Clock of the model when it was taken.
    pub(crate) when: u64,
    /// [`ModelVolume::touched`] and [`ModelVolume::reverted`] at that time.
    pub(crate) touched: BTreeMap<u64, u64>,
    pub(crate) reverted: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) volumes: BTreeMap<String, ModelVolume>,
    pub(crate) snapshots: Vec<ModelSnapshot>,
    pub(crate) clock: u64,
}

impl ModelVolume {
    pub(crate) fn empty(sectors: u64) -> Self {
        Self {
            sectors: vec![vec![0]; sectors as usize],
            read_only: false,
            touched: BTreeMap::new(),
            reverted: 0,
        }
    }

    pub(crate) fn of(stamps: &[Stamp], read_only: bool, clock: u64) -> Self {
        let sectors = stamps.iter().map(|&stamp| vec![stamp]).collect();
        Self {
            sectors,
            read_only,
            reverted: clock,
            ..Self::empty(0)
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    pub(crate) fn now(&self) -> Vec<Stamp> {
        self.sectors
            .iter()
            .map(|values| values.last().copied().unwrap_or(0))
            .collect()
    }

    pub(crate) fn set(&mut self, clock: u64, sector: u64, count: u64, stamp: Stamp) {
        for sector in sector..sector + count {
            let values = &mut self.sectors[sector as usize];
            if values.last() != Some(&stamp) {
                values.push(stamp);
            }
            self.touched.insert(sector / GRAIN_SECTORS, clock);
        }
    }

    /// Everything that was acknowledged is durable.
    pub(crate) fn flushed(&mut self) {
        for values in &mut self.sectors {
            values.drain(..values.len().saturating_sub(1));
        }
    }

    pub(crate) fn settle(&mut self, found: &[Stamp]) {
        self.sectors = found.iter().map(|&stamp| vec![stamp]).collect();
    }
}

/// What was found in a pool after a cut.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Name to (stamps, read only).
    pub(crate) volumes: BTreeMap<String, (Vec<Stamp>, bool)>,
    /// (volume, snapshot) to (stamps, held).
    pub(crate) snapshots: BTreeMap<(String, String), (Vec<Stamp>, bool)>,
}

impl Model {
    pub(crate) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub(crate) fn snapshots_of(&self, volume: &str) -> impl Iterator<Item = &ModelSnapshot> {
        self.snapshots
            .iter()
            .filter(move |snapshot| snapshot.volume == volume)
    }

    /// Compares with what reads return in a running pool.
    pub(crate) fn equals(&self, seen: &Seen) -> Result<(), String> {
        self.matches(seen, |values, found| values.last() == Some(&found))
    }

    /// Compares with what a power cut left.
    pub(crate) fn allows(&self, seen: &Seen) -> Result<(), String> {
        self.matches(seen, |values, found| values.contains(&found))
    }

    fn matches(&self, seen: &Seen, fits: impl Fn(&[Stamp], Stamp) -> bool) -> Result<(), String> {
        let names: Vec<_> = self.volumes.keys().collect();
        let found: Vec<_> = seen.volumes.keys().collect();
        if names != found {
            return Err(format!("volumes {found:?}, not {names:?}"));
        }
        for (name, volume) in &self.volumes {
            let (stamps, read_only) = &seen.volumes[name];
            if *read_only != volume.read_only || stamps.len() != volume.sectors.len() {
                return Err(format!(
                    "volume {name}: {} sectors, read only {read_only}",
                    stamps.len()
                ));
            }
            for (sector, (&stamp, values)) in stamps.iter().zip(&volume.sectors).enumerate() {
                if !fits(values, stamp) {
                    return Err(format!(
                        "volume {name} sector {sector} holds {stamp}, not one of {values:?}"
                    ));
                }
            }
        }
        let mut expected: BTreeMap<(String, String), &ModelSnapshot> = BTreeMap::new();
        for snapshot in &self.snapshots {
            expected.insert((snapshot.volume.clone(), snapshot.name.clone()), snapshot);
        }
        if !expected.keys().eq(seen.snapshots.keys()) {
            return Err(format!(
                "snapshots {:?}, not {:?}",
                seen.snapshots.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>()
            ));
        }
        for (key, snapshot) in expected {
            let (stamps, hold) = &seen.snapshots[&key];
            if *hold != snapshot.hold || stamps.len() != snapshot.stamps.len() {
                return Err(format!("snapshot {key:?}: {} sectors, held {hold}", stamps.len()));
            }
            if let Some(sector) = stamps.iter().zip(&snapshot.stamps).position(|(a, b)| a != b) {
                return Err(format!(
                    "snapshot {key:?} sector {sector} holds {}, not {}",
                    stamps[sector], snapshot.stamps[sector]
                ));
            }
        }
        Ok(())
    }

    /// Goes on with what a cut left.
    pub(crate) fn settle(&mut self, seen: &Seen) {
        for (name, volume) in &mut self.volumes {
            volume.settle(&seen.volumes[name].0);
        }
    }
}
