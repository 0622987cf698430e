//! Which LUNs a copy may touch: those that its initiator reaches itself.

use std::sync::Arc;

use stillpoint_scsi::{BlockError, CopyError, CopyUnit};

use super::Job;
use crate::serve::backend::LunBackend;
use crate::serve::lun::Lun;
use crate::serve::operations::Running;
use crate::serve::registry::Session;

/// A LUN that a copy uses, and by which right.
pub(super) struct Reached {
    pub(super) lun: Arc<Lun>,
    /// The session through which the initiator reaches it.
    pub(super) session: Arc<Session>,
    /// The storage below when the copy began: nothing replaces it while the copy counts as an operation.
    pub(super) backend: LunBackend,
    /// Counts the copy as an operation of the LUN.
    running: Running,
    writes: bool,
}

impl Reached {
    /// Whether the copy may go on here.
    ///
    /// # Errors
    /// A reservation that came meanwhile (the host was fenced), or somebody waits for the copy: a reset, a revert, a PREEMPT AND
    /// ABORT.
    pub(super) fn go_on(&self) -> Result<(), CopyError> {
        let shown = self.session.ending().is_none() && self.session.shows(&self.lun);
        if !shown || self.lun.is_waited_for(&self.running) {
            return Err(CopyError::Block(BlockError::Aborted));
        }
        self.lun.copy_admits(&self.session, self.writes)
    }

    pub(super) fn block_size(&self) -> u64 {
        self.lun.settings().block_size.into()
    }
}

/// Finds the LUN that `unit` names among `reached`, or adds it; returns its index.
///
/// # Errors
/// [`CopyError`]: no such LUN in reach, reserved, write protected, or of another block length than the initiator believes.
pub(super) fn find(
    job: &Job<'_>,
    reached: &mut Vec<Reached>,
    unit: &CopyUnit,
    writes: bool,
) -> Result<usize, CopyError> {
    let naa = unit.naa.ok_or(CopyError::Unreachable)?;
    let known = reached.iter().position(|r| r.lun.identity().naa == naa);
    let index = match known {
        Some(index) => index,
        None => {
            reached.push(enter(job, naa, writes)?);
            reached.len() - 1
        }
    };
    let found = reached.get_mut(index).ok_or(CopyError::Unreachable)?;
    if unit.block_len != 0 && unit.block_len != found.lun.settings().block_size {
        return Err(CopyError::BlockLength);
    }
    if writes && !found.writes {
        found.lun.copy_admits(&found.session, true)?;
        found.writes = true;
    }
    Ok(index)
}

/// Takes a LUN into the copy through the first session that may.
fn enter(job: &Job<'_>, naa: [u8; 16], writes: bool) -> Result<Reached, CopyError> {
    let luns = job.daemon.registry.luns();
    let lun = luns
        .into_iter()
        .find(|lun| lun.identity().naa == naa)
        .ok_or(CopyError::Unreachable)?;
    let mut refused = CopyError::Unreachable;
    for session in sessions(job) {
        // In this order: whoever takes the LUN away, or ends the session, then drains the LUN.
        let running = lun.begin();
        if session.ending().is_some() || !session.shows(&lun) {
            continue;
        }
        match lun.copy_admits(&session, writes) {
            Ok(()) => {
                return Ok(Reached {
                    backend: lun.backend(),
                    lun,
                    session,
                    running,
                    writes,
                });
            }
            Err(CopyError::Unreachable) => {}
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// The sessions of this initiator, its own first.
///
/// A name alone proves nothing: a session to another target counts when it comes from the same address, and when that target
/// asks for no CHAP, or for the very secret that the asking session has proved.
fn sessions(job: &Job<'_>) -> impl Iterator<Item = Arc<Session>> + use<> {
    let own = Arc::clone(job.session);
    let proved = own.target.rules().chap.clone();
    let others = job.daemon.registry.sessions_with(|other| {
        let chap = &other.target.rules().chap;
        other.id != own.id
            && other.is_active()
            && other.initiator == own.initiator
            && other.peer.ip().to_canonical() == own.peer.ip().to_canonical()
            && (chap.is_none() || *chap == proved)
    });
    std::iter::once(own).chain(others)
}
