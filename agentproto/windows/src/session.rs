//! One session with its backup, on a thread of its own: VSS's objects belong to the thread that made them.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use stillpoint_agentproto::client::{FreezeReport, ThawReport};
use stillpoint_agentproto::message::{AppState, BlobKind, FrozenVolume, Level, Prepare, Prepared, Require};
use stillpoint_agentproto::{Refusal, SessionId};

use crate::backup::{Backup, Order};
use crate::engine::Engine;
use crate::hold::{Hold, Told};
use crate::hyperv::Checkpoints;
use crate::plan;
use crate::volumes::Volume;
use crate::writers::Wanted;

/// What the engine wants next. (Thaw goes to the [`Hold`].)
#[derive(Debug)]
pub(crate) enum Word {
    /// DoSnapshotSet.
    Freeze,
    /// Finish: with the level that was recorded, or undo.
    Clean(Option<Level>),
}

/// The thread's state.
pub(crate) struct Session {
    pub(crate) engine: Arc<Engine>,
    pub(crate) prepare: Prepare,
    pub(crate) hold: Arc<Hold>,
}

/// What was prepared.
struct Ready {
    backup: Backup,
    volumes: Vec<Volume>,
    checkpoints: Checkpoints,
}

/// What the hold tells the engine, from within VSS's calls.
pub(crate) struct Teller {
    pub(crate) engine: std::sync::Weak<Engine>,
    pub(crate) session: SessionId,
}

impl Told for Teller {
    fn hold_started(&self) -> Option<Instant> {
        let engine = self.engine.upgrade()?;
        engine.feed(|agent| agent.hold_started(Instant::now(), self.session))
    }

    fn frozen(&self) {
        if let Some(engine) = self.engine.upgrade() {
            engine.frozen(self.session);
        }
    }
}

impl Session {
    /// From Prepare to Clean.
    pub(crate) fn run(self, words: &Receiver<Word>) {
        let id = self.prepare.session;
        let mut ready = match self.get_ready() {
            Ok((ready, prepared)) => {
                self.engine
                    .feed(|agent| agent.prepared(Instant::now(), id, Ok(prepared)));
                Some(ready)
            }
            Err(refusal) => {
                self.engine
                    .feed(|agent| agent.prepared(Instant::now(), id, Err(refusal)));
                None
            }
        };
        loop {
            match (words.recv(), &mut ready) {
                (Ok(Word::Freeze), Some(ready)) => self.freeze(ready),
                (Ok(Word::Freeze), None) => {}
                (Ok(Word::Clean(recorded)), _) => {
                    let left = ready.and_then(|ready| self.clean(ready, recorded.is_some()));
                    return self.engine.feed(|agent| agent.cleaned(Instant::now(), id, left));
                }
                // The engine is gone without a word.
                (Err(_), _) => {
                    ready.and_then(|ready| self.clean(ready, false));
                    return;
                }
            }
        }
    }

    fn get_ready(&self) -> Result<(Ready, Prepared), Refusal> {
        let Prepare {
            session,
            luns,
            mode,
            require,
            ..
        } = &self.prepare;
        let shared = self.engine.shared();
        let survey = self.engine.survey(luns, *mode);
        survey.refuse()?;
        let volumes = survey.volumes.clone();
        let all = *require == Require::All;
        let features = self.engine.features();
        let memory = features.hyperv && shared.config.memory_checkpoints;
        let checkpoints = if memory {
            shared
                .hyperv
                .checkpoint(&session.to_string(), &survey.inventory, luns, all)?
        } else {
            Checkpoints::default()
        };
        let wanted = Wanted {
            mssql: features.mssql,
            hyperv: features.hyperv,
            // A VM with a checkpoint needs no second one through its writer.
            hyperv_writer: !memory,
        };
        let order = Order {
            inventory: &survey.inventory,
            luns,
            volumes: &volumes,
            wanted,
        };
        let vss = shared.platform.vss();
        let prepared = vss.and_then(|vss| {
            let mut backup = Backup::new(vss);
            match backup.prepare(&order, shared.provider.as_ref(), &self.hold) {
                Ok(()) => Ok(backup),
                Err(refusal) => {
                    backup.finish(false, shared.provider.as_ref());
                    Err(refusal)
                }
            }
        });
        let backup = prepared.inspect_err(|_| self.forget(&checkpoints))?;
        let selection = backup.selection();
        let exclusions = [
            &survey.exclusions[..],
            &selection.exclusions,
            &checkpoints.exclusions,
        ]
        .concat();
        if all && let Some(left_out) = exclusions.first() {
            let refusal = plan::left_out(left_out);
            backup.finish(false, shared.provider.as_ref());
            self.forget(&checkpoints);
            return Err(refusal);
        }
        let apps = [selection.apps(AppState::Ready), checkpoints.apps(AppState::Ready)].concat();
        self.engine
            .set_report(*session, self.report(&volumes, &backup, &checkpoints));
        let ready = Ready {
            backup,
            volumes,
            checkpoints,
        };
        Ok((ready, Prepared { apps, exclusions }))
    }

    /// What Frozen will say: made now, because nothing is made while writes are held.
    fn report(&self, volumes: &[Volume], backup: &Backup, checkpoints: &Checkpoints) -> FreezeReport {
        let on = |lun: &stillpoint_agentproto::LunId| {
            let lun = *lun;
            let volumes = volumes.iter().filter(move |volume| volume.luns.contains(&lun));
            volumes.map(move |volume| FrozenVolume {
                lun,
                path: volume.label().to_owned(),
                frozen: true,
                error: None,
            })
        };
        FreezeReport {
            volumes: self.prepare.luns.iter().flat_map(on).collect(),
            apps: [
                backup.selection().apps(AppState::Frozen),
                checkpoints.apps(AppState::Frozen),
            ]
            .concat(),
        }
    }

    fn freeze(&self, ready: &mut Ready) {
        let id = self.prepare.session;
        let mut result = ready.backup.freeze(&self.hold);
        if let Err(refusal) = &result
            && !self.hold.was_frozen()
        {
            let refusal = refusal.clone();
            self.engine
                .feed(|agent| agent.frozen(Instant::now(), id, Err(refusal)));
        }
        // The machine always has a word: Release, or a thaw of its own.
        self.hold.word();
        if let (Ok(()), Some(late)) = (&result, self.newcomer(ready)) {
            result = Err(late);
        }
        let ended = ready.backup.ended(&self.hold, &result);
        let mut apps = ended.apps;
        apps.extend(ready.checkpoints.apps(AppState::Thawed));
        let document = ready.backup.document();
        let kept = document.and_then(|text| {
            self.engine
                .keep(id, BlobKind::BackupComponents, text.into_bytes())
        });
        let documents = kept.into_iter().collect();
        let report = ThawReport {
            in_force: ended.in_force,
            apps,
            reason: ended.reason,
            documents,
            held: self.hold.held(),
        };
        self.engine.feed(|agent| agent.thawed(Instant::now(), id, report));
    }

    /// A volume that appeared on the LUN after Prepare was not in the set.
    fn newcomer(&self, ready: &Ready) -> Option<Refusal> {
        let inventory = self.engine.shared().platform.inventory();
        let known = |volume: &&Volume| ready.volumes.iter().any(|known| known.name == volume.name);
        let late = inventory.on(&self.prepare.luns).find(|volume| !known(volume))?;
        Some(plan::newcomer(late))
    }

    fn forget(&self, checkpoints: &Checkpoints) {
        if let Some(left) = self.engine.shared().hyperv.remove(checkpoints) {
            tracing::warn!(
                left,
                "checkpoints are left behind; the next start of the service removes them"
            );
        }
    }

    fn clean(&self, ready: Ready, success: bool) -> Option<String> {
        let shared = self.engine.shared();
        let left = [
            ready.backup.finish(success, shared.provider.as_ref()),
            shared.hyperv.remove(&ready.checkpoints),
        ];
        let left: Vec<String> = left.into_iter().flatten().collect();
        (!left.is_empty()).then(|| left.join("; "))
    }
}
