//! Data against recorded checksums.

use super::records::Records;
use super::walk::{Recorded, Walk};
use super::{CheckReport, ProblemKind};
use crate::disk::Disk;

/// Reads grains of a data file.
pub(super) struct Data<'a> {
    disk: &'a dyn Disk,
    grain: Vec<u8>,
    pub(super) verified: u64,
}

impl<'a> Data<'a> {
    pub(super) fn new(disk: &'a dyn Disk, grain_bytes: u32) -> Self {
        Self {
            disk,
            grain: vec![0; grain_bytes as usize],
            verified: 0,
        }
    }

    /// Compares what the last page of a walk has recorded.
    pub(super) fn compare(&mut self, walk: &mut Walk<'_>) {
        for sum in std::mem::take(&mut walk.recorded) {
            self.verified += 1;
            let trouble = match self.crc(sum.grain) {
                Ok(crc) if crc == sum.crc => continue,
                Ok(_) => "is not what was written (checksum)".to_owned(),
                Err(error) => format!("cannot be read ({error})"),
            };
            let text = describe(walk.records, &sum, self.grain.len(), &trouble);
            walk.report.add(ProblemKind::BadData, text);
        }
    }

    /// Tries the grains that could not be read once.
    pub(super) fn retry(&mut self, records: &Records, report: &mut CheckReport) {
        for (grain, _) in records.bad.iter().filter(|(_, bad)| bad.crc.is_none()) {
            if let Err(error) = self.crc(*grain) {
                report.add(
                    ProblemKind::BadData,
                    format!("grain {grain} cannot be read ({error})"),
                );
            }
        }
    }

    fn crc(&mut self, grain: u64) -> std::io::Result<u32> {
        let place = grain * self.grain.len() as u64;
        self.disk.read_at(place, &mut self.grain)?;
        Ok(crc32c::crc32c(&self.grain))
    }
}

fn describe(records: &Records, sum: &Recorded, len: usize, trouble: &str) -> String {
    let name = records.branches.get(&sum.branch).map(|b| b.name.as_str());
    format!(
        "volume {:?}: {len} bytes at {} (branch {}, grain {}): {trouble}",
        name.unwrap_or_default(),
        sum.offset,
        sum.branch.0,
        sum.grain
    )
}
