//! One served LUN: SCSI unit above, storage below.
//!
//! The unit's lock is short and never held across I/O. Every block operation holds a token from before it is planned until it
//! has ended, so that a reset, a revert or a removal can wait for exactly the operations that were issued before it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;
use stillpoint_iscsi::{Command, Outcome};
use stillpoint_scsi::{
    BlockError, BlockOp, BlockResult, Context, CopyError, CopyOutcome, CopyTicket, NexusId, NexusName, Plan,
    Reply, ReservationChange, RodToken, TargetPort, Unit, UnitAttention, UnitSpec,
};

use super::backend::LunBackend;
use super::copy::Job;
use super::operations::{Operations, Running};
use super::registry::{Control, Registry, Session, TargetRules};
use super::state::{Identity, State};

/// What the configuration says of a LUN, and what its volume is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LunSettings {
    /// 512 or 4096.
    pub(crate) block_size: u32,
    /// Grain of the pool in bytes: the physical block and the granularity of UNMAP.
    pub(crate) grain: u32,
    /// First value of WCE.
    pub(crate) write_cache: bool,
    /// No initiator may write.
    pub(crate) read_only: bool,
}

/// Counters of one LUN since the daemon's start.
#[derive(Debug, Default)]
struct Counters {
    commands: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

/// What `lun show` tells of a LUN that is served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LunFigures {
    /// Commands since the start.
    pub(crate) commands: u64,
    /// Bytes read by initiators since the start.
    pub(crate) read_bytes: u64,
    /// Bytes written by initiators since the start.
    pub(crate) written_bytes: u64,
    /// WCE as it is now: an initiator may have changed it.
    pub(crate) write_cache: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Lun {
    name: String,
    identity: Identity,
    settings: LunSettings,
    read_only: AtomicBool,
    state: State,
    unit: Mutex<Unit>,
    backend: RwLock<LunBackend>,
    operations: Operations,
    counters: Counters,
}

impl Lun {
    /// Serves `backend` under `identity`.
    ///
    /// # Errors
    /// When the saved reservations of the LUN cannot be read back: serving it without them could let a fenced host write.
    pub(crate) fn new(
        name: &str,
        identity: Identity,
        backend: LunBackend,
        settings: LunSettings,
        state: State,
    ) -> anyhow::Result<Arc<Self>> {
        let saved = state.lun_saved(name);
        let mut unit = Unit::new(UnitSpec {
            naa: identity.naa,
            serial: identity.serial.clone(),
            revision: revision(),
            block_size: if settings.block_size == 4096 {
                stillpoint_scsi::BlockSize::B4096
            } else {
                stillpoint_scsi::BlockSize::B512
            },
            grain: settings.grain,
            blocks: backend.size_bytes() / u64::from(settings.block_size),
            write_cache: saved.write_cache.unwrap_or(settings.write_cache),
            read_only: settings.read_only,
            ports: Vec::new(),
            limits: stillpoint_scsi::Limits::default(),
        });
        if let Some(reservations) = saved.reservations {
            unit.restore_reservations(&reservations).map_err(|error| {
                anyhow::anyhow!("LUN {name:?}: its saved persistent reservations cannot be read ({error}): restore the data directory")
            })?;
        }
        Ok(Arc::new(Self {
            name: name.to_owned(),
            identity,
            settings,
            read_only: AtomicBool::new(settings.read_only),
            state,
            unit: Mutex::new(unit),
            backend: RwLock::new(backend),
            operations: Operations::default(),
            counters: Counters::default(),
        }))
    }

    /// The name used everywhere.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// NAA and serial.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// As configured now.
    pub(crate) fn settings(&self) -> LunSettings {
        LunSettings {
            read_only: self.read_only.load(Relaxed),
            ..self.settings
        }
    }

    /// The storage below, now.
    pub(crate) fn backend(&self) -> LunBackend {
        self.backend
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Puts other storage below the LUN: after a revert it keeps its identity, and every initiator is told that the medium
    /// may have changed. The caller has made sure that nobody is logged in, or means it.
    pub(crate) fn replace_backend(&self, backend: LunBackend) {
        let blocks = backend.size_bytes() / u64::from(self.settings.block_size);
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = backend;
        let mut unit = self.unit();
        unit.capacity_changed(blocks);
        unit.content_replaced();
    }

    /// The backend has grown: every initiator gets CAPACITY DATA HAS CHANGED (6/2A/09).
    pub(crate) fn resized(&self) {
        let blocks = self.backend().size_bytes() / u64::from(self.settings.block_size);
        self.unit().capacity_changed(blocks);
    }

    /// Allows or refuses writes from now on; initiators see it in the WP bit of MODE SENSE and in the sense of a refused write.
    pub(crate) fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Relaxed);
        self.unit().set_read_only(read_only);
    }

    /// The targets through which the LUN is reached, for its VPD page 83h.
    pub(crate) fn set_ports(&self, ports: Vec<TargetPort>) {
        self.unit().set_ports(ports);
    }

    /// A target of the LUN has other LUNs now (6/3F/0E).
    pub(crate) fn report_luns_changed(&self) {
        self.unit().report_luns_changed();
    }

    /// What is left in the pool, in bytes, when its thresholds are passed: mode page 1Ch/02h lists them.
    pub(crate) fn set_thin_thresholds(&self, available_bytes: &[u64]) {
        self.unit().set_thin_thresholds(available_bytes);
    }

    /// As [`Self::report_luns_changed`], for these sessions alone.
    pub(crate) fn report_luns_changed_to(&self, sessions: &[u64]) {
        let nexuses: Vec<_> = sessions.iter().copied().map(NexusId).collect();
        self.unit().report_luns_changed_to(&nexuses);
    }

    /// The pool below has passed a threshold of fullness (6/38/07).
    pub(crate) fn thin_threshold_reached(&self) {
        self.unit().thin_threshold_reached();
    }

    /// What it did since the start.
    pub(crate) fn figures(&self) -> LunFigures {
        let counters = &self.counters;
        LunFigures {
            commands: counters.commands.load(Relaxed),
            read_bytes: counters.read_bytes.load(Relaxed),
            written_bytes: counters.written_bytes.load(Relaxed),
            write_cache: self.unit().write_cache(),
        }
    }

    /// Waits for the block operations that were issued before the call; later ones do not hold it up.
    pub(crate) async fn drain(&self) {
        self.operations.drain().await;
    }

    /// A command of a session is about to run. Whoever ends the session and then drains the LUN has waited for it, or it sees
    /// that the session is ending: so this comes first, then that look, then [`Self::plan`].
    pub(crate) fn begin(&self) -> Running {
        self.operations.begin()
    }

    /// Whether somebody waits for this operation of the LUN.
    pub(crate) fn is_waited_for(&self, running: &Running) -> bool {
        self.operations.is_waited_for(running)
    }

    /// A session's I_T nexus uses the LUN.
    pub(crate) fn attach(&self, session: &Session) {
        let port = TargetPort {
            target: session.target.iqn().to_owned(),
            portal_group: session.portal_group,
        };
        let name = NexusName {
            initiator: session.initiator.clone(),
            isid: session.isid,
            port,
        };
        self.unit().attach(NexusId(session.id), name);
    }

    /// The session has ended; its registrations stay.
    pub(crate) fn detach(&self, session: u64) {
        self.unit().detach(NexusId(session));
    }

    /// LOGICAL UNIT RESET or a target reset.
    pub(crate) fn reset(&self) {
        self.unit().lun_reset();
    }

    /// Another session ended this one's tasks.
    pub(crate) fn tasks_ended(&self, session: u64, cause: UnitAttention) {
        self.unit().tasks_ended(NexusId(session), cause);
    }

    /// Decides what a command means.
    pub(crate) fn plan(
        &self,
        session: &Session,
        rules: &TargetRules,
        command: Command,
        token: Running,
    ) -> Step {
        self.counters.commands.fetch_add(1, Relaxed);
        self.counters
            .written_bytes
            .fetch_add(command.data.len() as u64, Relaxed);
        let numbers = rules.numbers_for(&session.initiator);
        let context = Context {
            nexus: NexusId(session.id),
            luns: &numbers,
            data_in_max: if command.read {
                command.bidi_read_edtl.unwrap_or(command.edtl).into()
            } else {
                0
            },
        };
        match self.unit().plan(&context, &command.cdb, &command.data) {
            Plan::Done(reply) => Step::Answer(self.outcome(reply)),
            Plan::Early(reply, op) => Step::Early(self.outcome(reply), Trailing { op, token }),
            Plan::Op(planned) => Step::Work(Planned {
                planned,
                data: command.data,
                token,
            }),
        }
    }

    fn outcome(&self, reply: Reply) -> Outcome {
        self.counters
            .read_bytes
            .fetch_add(reply.data.len() as u64, Relaxed);
        outcome(reply)
    }

    fn unit(&self) -> MutexGuard<'_, Unit> {
        self.unit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a session's I_T nexus may read the LUN, or write it, as part of a copy.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn copy_admits(&self, session: &Session, writes: bool) -> Result<(), CopyError> {
        self.unit().copy_admits(NexusId(session.id), writes)
    }

    /// How far a copy is; `false` when it is to end.
    pub(crate) fn copy_progress(&self, ticket: CopyTicket, segments: u16, bytes: u64) -> bool {
        self.unit().copy_progress(ticket, segments, bytes)
    }

    /// A copy is over; what became of it is kept for RECEIVE COPY RESULTS.
    pub(crate) fn copy_ended(&self, ticket: CopyTicket, outcome: &CopyOutcome) {
        self.unit().copy_ended(ticket, outcome);
    }

    /// Makes a token of a point in time of this LUN.
    pub(crate) fn rod_token(
        &self,
        bytes: u64,
        identifier: u64,
        secret: &[u8; RodToken::SECRET_LEN],
    ) -> RodToken {
        self.unit().rod_token(bytes, identifier, secret)
    }

    /// PERSISTENT RESERVE OUT: what must survive is durable, and what was preempted has ended, before the answer.
    async fn reserve(self: &Arc<Self>, change: &ReservationChange, registry: &Registry) -> BlockResult {
        if let Some(save) = change.save.clone() {
            let (lun, sequence) = (Arc::clone(self), change.sequence);
            let saving = move || lun.state.save_reservations(&lun.name, sequence, &save);
            let saved = match tokio::task::spawn_blocking(saving).await {
                Ok(saved) => saved.map_err(anyhow::Error::from),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = saved {
                tracing::error!(lun = %self.name, %error, "persistent reservations could not be saved");
                return BlockResult::Failed(BlockError::Fault);
            }
        }
        let victims = registry.sessions_with(|session| change.abort_tasks_of.contains(&NexusId(session.id)));
        let mut waits = Vec::new();
        for victim in &victims {
            // A target that serves the LUN no longer has no queued commands for it either.
            let Some(number) = victim.target.rules().number_of(self) else {
                continue;
            };
            let (done, wait) = tokio::sync::oneshot::channel();
            victim.tell(Control::AbortTasks {
                luns: vec![number],
                cause: UnitAttention::CommandsCleared,
                done,
            });
            waits.push(wait);
        }
        for wait in waits {
            // A session that is ending starts no commands any more.
            drop(wait.await);
        }
        if !victims.is_empty() {
            self.drain().await;
        }
        BlockResult::Done
    }
}

/// What becomes of a command next.
#[derive(Debug)]
pub(crate) enum Step {
    /// It is over.
    Answer(Outcome),
    /// This is to be done for it.
    Work(Planned),
    /// It is over for the initiator, and this is still to be done.
    Early(Outcome, Trailing),
}

/// What an answered command left to do (IMMED).
#[derive(Debug)]
pub(crate) struct Trailing {
    op: BlockOp,
    /// Counts the operation as running.
    token: Running,
}

impl Trailing {
    /// Carries it out; blocks. A failure is logged by the backend, and meets the next command that needs what failed.
    pub(crate) fn execute(self, job: &Job<'_>) {
        let Self { op, token } = self;
        if let BlockOp::Copy(request) = &op {
            drop(job.run(request, &token));
        } else {
            drop(job.lun.backend().execute(&op, &[], job.lun.settings.block_size));
        }
    }
}

/// A command that needs its LUN's storage.
#[derive(Debug)]
pub(crate) struct Planned {
    planned: stillpoint_scsi::Planned,
    data: Bytes,
    /// Counts the operation as running.
    token: Running,
}

impl Planned {
    /// Carries the command out if that needs no waiting; else it is still to be done, by [`Planned::execute`] on a worker.
    /// `may_sync`: see [`Backend::try_execute`](super::backend::Backend::try_execute).
    pub(crate) fn try_now(self, lun: &Lun, may_sync: bool) -> Step {
        match lun.backend().try_execute(self.planned.op(), &self.data, may_sync) {
            Some(result) => Step::Answer(lun.outcome(self.planned.finish(result))),
            None => Step::Work(self),
        }
    }

    /// Whether it waits for other sessions, and so belongs to [`Planned::reserve`]: workers that wait for one another could
    /// all be taken.
    pub(crate) fn waits_for_others(&self) -> bool {
        matches!(self.planned.op(), BlockOp::Reservations(_))
    }

    /// Carries a PERSISTENT RESERVE OUT out.
    pub(crate) async fn reserve(self, lun: &Arc<Lun>, registry: &Registry) -> Outcome {
        let Self { planned, token, .. } = self;
        // It waits for the LUN's running operations, of which it must not be one.
        drop(token);
        let result = match planned.op() {
            BlockOp::Reservations(change) => lun.reserve(change, registry).await,
            _ => BlockResult::Failed(BlockError::Fault),
        };
        lun.outcome(planned.finish(result))
    }

    /// Carries the command out; blocks.
    pub(crate) fn execute(self, job: &Job<'_>) -> Outcome {
        let lun = job.lun;
        let Self { planned, data, token } = self;
        let result = match planned.op() {
            BlockOp::Copy(request) => match job.run(request, &token) {
                Some(outcome) => BlockResult::Copied(outcome),
                None => BlockResult::Failed(BlockError::Busy),
            },
            BlockOp::SaveModePages(pages) => {
                let flushed = if pages.flush {
                    lun.backend()
                        .execute(&BlockOp::Flush, &[], lun.settings.block_size)
                } else {
                    BlockResult::Done
                };
                match (flushed, lun.state.save_write_cache(&lun.name, pages.write_cache)) {
                    (BlockResult::Done, Ok(())) => BlockResult::Done,
                    (_, Err(error)) => {
                        tracing::error!(lun = %lun.name, %error, "mode pages could not be saved");
                        BlockResult::Failed(BlockError::Fault)
                    }
                    (failed, Ok(())) => failed,
                }
            }
            // Aborted before it began: nobody hears of the result, and the medium is left alone.
            _ if job.cancel.is_cancelled() => BlockResult::Failed(BlockError::Aborted),
            op => lun.backend().execute(op, &data, lun.settings.block_size),
        };
        lun.outcome(planned.finish(result))
    }
}

/// The answer of a LUN number behind which there is nothing.
pub(crate) fn absent(cdb: &[u8], luns: &[u16]) -> Outcome {
    outcome(stillpoint_scsi::absent_lun(cdb, luns))
}

fn outcome(reply: Reply) -> Outcome {
    let Reply {
        status,
        sense,
        data,
        transfer_len,
    } = reply;
    Outcome {
        status,
        sense,
        data,
        transfer_len,
    }
}

/// PRODUCT REVISION LEVEL: major and minor version in four characters.
fn revision() -> [u8; 4] {
    let text = format!(
        "{}.{}",
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR")
    );
    let mut revision = [b' '; 4];
    revision
        .iter_mut()
        .zip(text.bytes())
        .for_each(|(to, from)| *to = from);
    revision
}
