//! What Windows calls a proper disk: a suite of our own after the HLK's "SCSI Compliance Test 2.0", its thin provisioning and ODX
//! tests, the failover cluster's validation, and the commands with which Windows greets a disk.
//!
//! Each check logs in as Windows does, for itself, and looks at one thing. A table names them; a target passes or fails each of
//! them on a LUN of any kind.

mod arrival;
mod cluster;
mod data;
mod disk;
mod identity;
mod modes;
mod odx;
mod thin;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;

pub use disk::Disk;

/// Where a disk is.
#[derive(Debug, Clone)]
pub struct Place {
    /// The portal.
    pub address: SocketAddr,
    /// The target.
    pub iqn: String,
    /// The LUN.
    pub lun: u8,
}

/// On which disks a check is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// All.
    Always,
    /// Those that list VPD page 8Fh: Windows then takes ODX for granted.
    OffloadDeclared,
}

/// One thing that has to be true.
struct Check {
    name: &'static str,
    due: Due,
    run: fn(&mut Disk) -> Result<()>,
}

const fn check(name: &'static str, run: fn(&mut Disk) -> Result<()>) -> Check {
    Check {
        name,
        due: Due::Always,
        run,
    }
}

const fn offload(name: &'static str, run: fn(&mut Disk) -> Result<()>) -> Check {
    Check {
        name,
        due: Due::OffloadDeclared,
        run,
    }
}

/// The whole list. What could leave a disk unusable comes last.
fn checks() -> impl Iterator<Item = &'static Check> {
    let groups = [
        arrival::CHECKS,
        identity::CHECKS,
        modes::CHECKS,
        data::CHECKS,
        thin::CHECKS,
        odx::CHECKS,
        cluster::CHECKS,
        data::FUZZ,
    ];
    groups.into_iter().flatten()
}

/// What came of the list on one disk.
#[derive(Debug, Default)]
pub struct Score {
    /// Checks that hold.
    pub passed: usize,
    /// The others, with the reason.
    pub failed: Vec<(&'static str, String)>,
    /// Checks of a function that the disk does not declare.
    pub not_declared: usize,
    /// The check that took longest.
    pub slowest: (Duration, &'static str),
}

impl Score {
    /// Names and reasons of what failed, one a line.
    #[must_use]
    pub fn failures(&self) -> String {
        let lines = self.failed.iter().map(|(name, why)| format!("  {name}: {why}\n"));
        lines.collect()
    }
}

/// Runs the list on a disk, whose content is lost.
///
/// # Errors
/// The disk cannot be reached at all.
pub fn score(place: &Place) -> Result<Score> {
    let offload = Disk::open(place, "first")?.lists_page(0x8f)?;
    let mut score = Score::default();
    for check in checks() {
        if check.due == Due::OffloadDeclared && !offload {
            score.not_declared += 1;
            continue;
        }
        let started = Instant::now();
        let outcome = Disk::open(place, "first").and_then(|mut disk| (check.run)(&mut disk));
        score.slowest = score.slowest.max((started.elapsed(), check.name));
        match outcome {
            Ok(()) => score.passed += 1,
            Err(error) => {
                score.failed.push((check.name, format!("{error:#}")));
                // One fault is one failure: a reservation that is left must not fail what follows.
                Disk::open(place, "first").and_then(|mut disk| cluster::clear(&mut disk))?;
            }
        }
    }
    Ok(score)
}
