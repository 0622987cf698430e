//! One backup as VSS wants it: the order of the calls of `IVssBackupComponents` (agent-protocol.md §9; MS docs, "Overview of
//! Processing a Backup Under VSS"). The calls themselves are `win::requester`; a test plays them.
//!
//! ```text
//! prepare: InitializeForBackup SetBackupState SetContext GatherWriterMetadata AddComponent… StartSnapshotSet AddToSnapshotSet…
//!          PrepareForBackup GatherWriterStatus
//! freeze:  DoSnapshotSet ── our provider's PreCommitSnapshots, CommitSnapshots ── GatherWriterStatus
//! end:     SetBackupSucceeded… BackupComplete   |   AbortBackup
//! ```

use std::sync::Arc;

use stillpoint_agentproto::message::{App, AppState};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal};

use crate::hold::Hold;
use crate::volumes::{Inventory, Volume};
use crate::writers::{self, Component, Selection, Wanted, Writer, WriterStatus, hresult};

/// `VSS_CTX_APP_ROLLBACK` with `TRANSPORTABLE`, `NO_AUTORECOVERY` and `TXF_RECOVERY`: nothing is imported here, because the
/// product is the target's snapshot. (The same as qemu-ga's requester.)
pub(crate) const CONTEXT: i32 = 0x9 | TRANSPORTABLE | 0x2 | 0x0200_0000;
/// `VSS_VOLSNAP_ATTR_TRANSPORTABLE`: unknown on client editions.
const TRANSPORTABLE: i32 = 0x20;
/// `VSS_E_UNSUPPORTED_CONTEXT`.
const UNSUPPORTED_CONTEXT: i32 = 0x8004_231b_u32.cast_signed();

/// A call of VSS failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {}", hresult(*.code))]
pub(crate) struct VssError {
    /// Which call.
    pub(crate) call: &'static str,
    /// Its HRESULT.
    pub(crate) code: i32,
}

/// The calls. Those that VSS carries out apart (`IVssAsync`) return when it is done.
pub(crate) trait Vss {
    /// `CreateVssBackupComponents`, `InitializeForBackup`.
    fn initialize(&mut self) -> Result<(), VssError>;
    /// `SetBackupState`: components selected, `VSS_BT_COPY` (a full backup would reset differential bases and truncate logs).
    fn set_backup_state(&mut self) -> Result<(), VssError>;
    /// `SetContext`.
    fn set_context(&mut self, context: i32) -> Result<(), VssError>;
    /// `GatherWriterMetadata` and all of the documents.
    fn gather_writer_metadata(&mut self) -> Result<Vec<Writer>, VssError>;
    /// `AddComponent`.
    fn add_component(&mut self, writer: &Writer, component: &Component) -> Result<(), VssError>;
    /// `StartSnapshotSet`: the set's id.
    fn start_snapshot_set(&mut self) -> Result<u128, VssError>;
    /// `AddToSnapshotSet`, with our provider.
    fn add_to_snapshot_set(&mut self, volume: &str) -> Result<(), VssError>;
    /// `PrepareForBackup`.
    fn prepare_for_backup(&mut self) -> Result<(), VssError>;
    /// `GatherWriterStatus` and all of them, then `FreeWriterStatus`.
    fn gather_writer_status(&mut self) -> Result<Vec<WriterStatus>, VssError>;
    /// `DoSnapshotSet`. Cancels it as soon as `given_up` says so.
    fn do_snapshot_set(&mut self, given_up: &dyn Fn() -> bool) -> Result<(), VssError>;
    /// `SetBackupSucceeded`.
    fn set_backup_succeeded(&mut self, writer: &Writer, component: &Component) -> Result<(), VssError>;
    /// `BackupComplete`.
    fn backup_complete(&mut self) -> Result<(), VssError>;
    /// `AbortBackup`. Harmless when there is nothing to abort.
    fn abort_backup(&mut self);
    /// The backup components document.
    fn document(&mut self) -> Result<String, VssError>;
}

/// Where our provider finds the holds of our own requester.
pub(crate) trait OwnSets {
    /// A set is ours from now on.
    fn add(&self, set: u128, hold: &Arc<Hold>);
    /// It is over.
    fn remove(&self, set: u128);
}

/// What DoSnapshotSet led to.
pub(crate) struct Ended {
    /// It said `VSS_S_ASYNC_FINISHED`, our hold was kept, and every writer is well.
    pub(crate) in_force: bool,
    /// The verdict on each component.
    pub(crate) apps: Vec<App>,
    /// What is wrong.
    pub(crate) reason: Option<String>,
}

/// A backup under way.
pub(crate) struct Backup {
    vss: Box<dyn Vss>,
    selection: Selection,
    set: Option<u128>,
    done: bool,
}

/// What is to be frozen.
pub(crate) struct Order<'a> {
    /// The host.
    pub(crate) inventory: &'a Inventory,
    /// The LUNs of the session.
    pub(crate) luns: &'a [LunId],
    /// Their volumes.
    pub(crate) volumes: &'a [Volume],
    /// Applications.
    pub(crate) wanted: Wanted,
}

impl Backup {
    /// A backup that has not begun.
    pub(crate) fn new(vss: Box<dyn Vss>) -> Self {
        Self {
            vss,
            selection: Selection::default(),
            set: None,
            done: false,
        }
    }

    /// Everything before the freeze.
    ///
    /// # Errors
    /// VSS or a writer refuses.
    pub(crate) fn prepare(
        &mut self,
        order: &Order<'_>,
        sets: &dyn OwnSets,
        hold: &Arc<Hold>,
    ) -> Result<(), Refusal> {
        self.begin(order).map_err(refusal)?;
        let set = self.vss.start_snapshot_set().map_err(refusal)?;
        self.set = Some(set);
        // Before the first volume: VSS calls the provider within AddToSnapshotSet.
        sets.add(set, hold);
        for volume in order.volumes {
            let added = self.vss.add_to_snapshot_set(&volume.name);
            added.map_err(|error| refusal(error).about(volume.label()))?;
        }
        self.vss.prepare_for_backup().map_err(refusal)?;
        let statuses = self.vss.gather_writer_status().map_err(refusal)?;
        self.check(&statuses)
    }

    fn begin(&mut self, order: &Order<'_>) -> Result<(), VssError> {
        self.vss.initialize()?;
        self.vss.set_backup_state()?;
        match self.vss.set_context(CONTEXT) {
            Err(error) if error.code == UNSUPPORTED_CONTEXT => {
                self.vss.set_context(CONTEXT & !TRANSPORTABLE)?;
            }
            other => other?,
        }
        let writers = self.vss.gather_writer_metadata()?;
        self.selection = writers::select(writers, order.inventory, order.luns, order.wanted);
        for selected in &self.selection.selected {
            if let Some((writer, component)) = self.selection.parts(selected) {
                self.vss.add_component(writer, component)?;
            }
        }
        Ok(())
    }

    /// A writer of ours that has failed already: nobody needs to be frozen.
    fn check(&self, statuses: &[WriterStatus]) -> Result<(), Refusal> {
        for selected in &self.selection.selected {
            let Some((writer, _)) = self.selection.parts(selected) else {
                continue;
            };
            let status = statuses.iter().find(|status| status.instance == writer.instance);
            let trouble = match status {
                Some(status) => status.trouble_at_begin(),
                None => Some("gave no status".to_owned()),
            };
            if let Some(trouble) = trouble {
                let text = format!("the VSS writer {} {trouble}", writer.name);
                return Err(Refusal::new(ErrorCode::WriterFailed, text).about(&writer.name));
            }
        }
        Ok(())
    }

    /// What takes part, and what does not.
    pub(crate) fn selection(&self) -> &Selection {
        &self.selection
    }

    /// The writers' and VSS's documents, for the record.
    pub(crate) fn document(&mut self) -> Option<String> {
        let document = self.vss.document();
        document
            .inspect_err(|error| tracing::warn!(%error, "the backup components document is missing"))
            .ok()
    }

    /// Freezes, and returns when VSS has let go: our provider says `frozen` in between.
    ///
    /// # Errors
    /// VSS's refusal, or that it ended without asking our provider.
    pub(crate) fn freeze(&mut self, hold: &Hold) -> Result<(), Refusal> {
        let done = self.vss.do_snapshot_set(&|| hold.is_given_up());
        self.done = done.is_ok();
        match done {
            Err(error) => Err(refusal(error)),
            Ok(()) if hold.was_frozen() => Ok(()),
            Ok(()) => {
                let text =
                    "VSS took a shadow copy without Stillpoint's provider: nothing was held for the target";
                Err(Refusal::new(ErrorCode::NoQuiesce, text))
            }
        }
    }

    /// What came of it: asked before `BackupComplete`, as §9 has it.
    pub(crate) fn ended(&mut self, hold: &Hold, freeze: &Result<(), Refusal>) -> Ended {
        let statuses = self.vss.gather_writer_status();
        let reason = match (freeze, &statuses) {
            (Err(refusal), _) => Some(refusal.text.clone()),
            (Ok(()), _) if !hold.was_kept() => Some("the hold ended before its release".to_owned()),
            (Ok(()), Err(error)) => Some(error.to_string()),
            (Ok(()), Ok(statuses)) => writers::first_trouble(statuses),
        };
        let in_force = self.done && hold.was_kept() && reason.is_none();
        let apps = match statuses {
            Ok(statuses) => self.selection.verdicts(&statuses),
            Err(error) => {
                let failed = |app| App {
                    error: Some(error.to_string()),
                    ..app
                };
                let apps = self.selection.apps(AppState::Failed);
                apps.into_iter().map(failed).collect()
            }
        };
        Ended {
            in_force,
            apps,
            reason,
        }
    }

    /// The end. After a success writers are told so; otherwise VSS forgets the backup.
    pub(crate) fn finish(mut self, success: bool, sets: &dyn OwnSets) -> Option<String> {
        let left = if success && self.done {
            self.complete()
        } else {
            self.vss.abort_backup();
            None
        };
        if let Some(set) = self.set {
            sets.remove(set);
        }
        left
    }

    fn complete(&mut self) -> Option<String> {
        for selected in &self.selection.selected {
            if let Some((writer, component)) = self.selection.parts(selected)
                && let Err(error) = self.vss.set_backup_succeeded(writer, component)
            {
                tracing::warn!(writer = writer.name, %error, "a writer is not told of its backup");
            }
        }
        let complete = self.vss.backup_complete();
        complete.err().map(|error| error.to_string())
    }
}

fn refusal(error: VssError) -> Refusal {
    let code = match error.code.cast_unsigned() {
        0x8004_2301 | 0x8004_2316 => ErrorCode::Busy,
        0x8004_2315 | 0x8004_2318 | 0x8004_2319 | 0x8004_23f0..=0x8004_23f5 => ErrorCode::WriterFailed,
        0x8004_2306 | 0x8004_2313 | 0x8004_2314 => ErrorCode::HoldExpired,
        0x8004_230c | 0x8004_230e | 0x8004_231b => ErrorCode::NoQuiesce,
        _ => ErrorCode::Internal,
    };
    Refusal::new(code, error.to_string())
}

#[cfg(test)]
#[path = "backup_tests.rs"]
mod tests;
