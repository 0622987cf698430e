//! The agent's sessions: one machine per enrolled target (specification §6, "Agent, per session").
//!
//! ```text
//! Preparing ─▶ Prepared ─▶ Freezing ─▶ Frozen ─▶ Thawing ─▶ Thawed ─▶ Cleaning ─▶ Completed | Aborted
//!                              hold over, channel lost, keepalive lost, Abort, stop, lease lost: thaw NOW, hold_ok = false
//! ```
//! The machine decides *that* something happens; [`Work`] tells the owner what to do, and the owner answers with
//! [`Agent::prepared`], [`Agent::hold_started`], [`Agent::frozen`], [`Agent::thawed`], [`Agent::cleaned`].

mod session;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::error::{ErrorCode, Refusal};
use crate::freeze::{HOLD_MAX, KEEPALIVE_LOST, MIN_INTERVAL, PREPARED_IDLE};
use crate::ident::{LunId, SessionId};
use crate::message::{
    Aborted, App, Document, FrozenVolume, Level, LogEvent, Mode, Prepare, Prepared, Reply, Request, Require,
    SessionState, Severity, StatusReport,
};
use session::Session;
use state::{Ending, State};

/// Finished sessions whose answers are kept for repeats.
pub const MAX_SESSIONS: usize = 64;
/// How long they are kept.
pub const KEEP_RESULTS: Duration = Duration::from_secs(24 * 3600);
/// Hooks and freezing together may take this long before the target has given up.
const FREEZE_DEADLINE: Duration = Duration::from_secs(60);

/// The agent's own rules. The target cannot change them.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// One frozen session per LUN in this time.
    pub min_interval: Duration,
    /// The longest hold that is granted.
    pub hold_max: Duration,
    /// Prepared (or thawed) and nothing more for so long: clean up.
    pub idle: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            min_interval: MIN_INTERVAL,
            hold_max: HOLD_MAX,
            idle: PREPARED_IDLE,
        }
    }
}

/// Where a reply goes: the owner's number of the channel, and the request's id on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    /// The owner's number; never reused while the agent runs.
    pub channel: u64,
    /// The request's id.
    pub id: u32,
}

/// What the owner has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this answer.
    Reply {
        /// Where to.
        asked: Asked,
        /// What.
        result: Result<Reply, Refusal>,
    },
    /// Do this.
    Work(Work),
    /// Store the highest generation seen, before the next answer goes out.
    SaveGeneration(u32),
    /// Write this into the agent's event log (every freeze is in it).
    Log(LogEvent),
}

/// Work for the owner. Slow work runs apart: the machine must go on to be fed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Look; answer the request through [`Agent::answer`].
    ListVolumes {
        /// Where the answer goes.
        asked: Asked,
        /// Which LUNs.
        luns: Vec<LunId>,
    },
    /// Check; answer the request through [`Agent::answer`].
    Preflight {
        /// Where the answer goes.
        asked: Asked,
        /// Which LUNs.
        luns: Vec<LunId>,
        /// What for.
        mode: Mode,
    },
    /// A request whose state the owner keeps itself (RevertPrepare, RevertDone, Blob, FetchBlob): answer it through
    /// [`Agent::answer`]. A repeat comes again.
    Other {
        /// Where the answer goes.
        asked: Asked,
        /// What is asked.
        request: Request,
    },
    /// Get ready, then [`Agent::prepared`].
    Prepare(Prepare),
    /// Run the freeze hooks, call [`Agent::hold_started`], freeze, then [`Agent::frozen`].
    Freeze {
        /// The session.
        session: SessionId,
        /// Its LUNs.
        luns: Vec<LunId>,
        /// What the snapshot shall claim.
        mode: Mode,
        /// What an application that cannot take part means.
        require: Require,
        /// The longest hold, capped already. The owner's guard uses it too.
        hold: Duration,
    },
    /// Thaw everything of the session, now, also while Freeze still runs (which has to stop); then [`Agent::thawed`].
    Thaw {
        /// The session.
        session: SessionId,
        /// Whether the target asked for it and all was in order.
        released: bool,
    },
    /// Remove what Prepare made (cancel it if it runs), then [`Agent::cleaned`].
    Clean {
        /// The session.
        session: SessionId,
        /// The level that was recorded, or nothing: the session failed (hooks get `abort`).
        recorded: Option<Level>,
    },
}

/// What freezing led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreezeReport {
    /// Each file system of the LUNs.
    pub volumes: Vec<FrozenVolume>,
    /// Each application.
    pub apps: Vec<App>,
}

/// What thawing found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThawReport {
    /// Everything was still frozen when it was thawed (no FITHAW said EINVAL).
    pub in_force: bool,
    /// Each application.
    pub apps: Vec<App>,
    /// What went wrong.
    pub reason: Option<String>,
    /// What the target should fetch before Complete (VSS: backup components, writers' metadata).
    pub documents: Vec<Document>,
    /// How long the hold lasted, when the owner measured it; otherwise it counts until this report, thaw hooks included.
    pub held: Option<Duration>,
}

/// All sessions with one target.
pub struct Agent {
    config: Config,
    generation: u32,
    sessions: BTreeMap<SessionId, Session>,
    /// When each LUN was last frozen; entries older than the rate limit are dropped.
    frozen_at: BTreeMap<LunId, Instant>,
    stopping: bool,
    outputs: VecDeque<Output>,
}

impl Agent {
    /// The sessions with a target whose highest generation seen so far is known from disk (0 = none).
    #[must_use]
    pub fn new(config: Config, generation_seen: u32) -> Self {
        Self {
            config,
            generation: generation_seen,
            sessions: BTreeMap::new(),
            frozen_at: BTreeMap::new(),
            stopping: false,
            outputs: VecDeque::new(),
        }
    }

    /// Checks a generation (of a Hello, on either connection, or of a request). A higher one is remembered, and ends
    /// every session of an older one: the target that had them is gone.
    ///
    /// # Errors
    /// `StaleGeneration`: refuse the Hello.
    pub fn fence(&mut self, now: Instant, generation: u32) -> Result<(), Refusal> {
        if generation < self.generation {
            let text = format!(
                "this target is at generation {generation}, but {} was seen: it was restored from a backup or is a stale \
                 copy; if it is the right one, run `stillpoint agent generation bump` there",
                self.generation
            );
            return Err(Refusal::new(ErrorCode::StaleGeneration, text));
        }
        if generation > self.generation {
            self.generation = generation;
            self.outputs.push_back(Output::SaveGeneration(generation));
            let older = |session: &Session| session.generation < generation;
            self.end_where(now, "the target was restarted", Ending::Clean, older);
        }
        Ok(())
    }

    /// The highest generation seen: goes into the headers of this agent's frames.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Takes a request of a snapshot channel. Answers come as [`Output::Reply`], sooner or later.
    pub fn request(&mut self, now: Instant, asked: Asked, generation: u32, request: Request) {
        self.heard(now, asked.channel);
        if let Err(refusal) = self.fence(now, generation) {
            self.answer(asked, Err(refusal));
            return;
        }
        match request {
            Request::Status(status) => {
                let report = self.status(now, status.session);
                self.answer(asked, Ok(Reply::Status(report)));
            }
            Request::ListVolumes(list) => self.work(Work::ListVolumes {
                asked,
                luns: list.luns,
            }),
            Request::Preflight(ask) => self.work(Work::Preflight {
                asked,
                luns: ask.luns,
                mode: ask.mode,
            }),
            request @ (Request::RevertPrepare(_)
            | Request::RevertDone(_)
            | Request::Blob(_)
            | Request::FetchBlob(_)) => self.work(Work::Other { asked, request }),
            request => match request.session() {
                Some(session) => self.step(now, asked, session, request),
                None => {
                    let text = "this message is not for the snapshot channel of an agent";
                    self.answer(asked, Err(Refusal::new(ErrorCode::Unsupported, text)));
                }
            },
        }
    }

    /// A frame came on a channel: the keepalive of what is frozen over it.
    pub fn heard(&mut self, now: Instant, channel: u64) {
        for session in self
            .sessions
            .values_mut()
            .filter(|session| session.channel == channel)
        {
            session.heard = now;
        }
    }

    /// A snapshot channel is gone: what was frozen over it thaws now.
    pub fn channel_lost(&mut self, now: Instant, channel: u64) {
        self.end_where(now, "the snapshot channel was lost", Ending::Wait, |session| {
            session.channel == channel
        });
        for session in self.sessions.values_mut() {
            session.forget_channel(channel);
        }
    }

    /// The lease at the target is over (no answered heartbeat for so long): what is frozen thaws now.
    pub fn lease_lost(&mut self, now: Instant) {
        self.end_where(now, "the lease of the target is over", Ending::Wait, |_| true);
    }

    /// The agent stops: thaw, clean up, and take nothing new. Run until [`Self::is_idle`].
    pub fn stop(&mut self, now: Instant) {
        self.stopping = true;
        let why = "the agent stops";
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        for id in ids {
            if let Some(session) = self.sessions.get_mut(&id) {
                session.end(now, why, Ending::Clean, &mut self.outputs);
            }
        }
    }

    /// Whether nothing is under way: every session has ended and been cleaned up.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sessions.values().all(Session::is_over)
    }

    /// Answers a ListVolumes or Preflight (or anything else that has no session).
    pub fn answer(&mut self, asked: Asked, result: Result<Reply, Refusal>) {
        self.outputs.push_back(Output::Reply { asked, result });
    }

    /// What [`Work::Prepare`] led to.
    pub fn prepared(&mut self, now: Instant, session: SessionId, result: Result<Prepared, Refusal>) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.prepared(now, result, &mut self.outputs);
        }
    }

    /// The hold begins: after the hooks, before the first file system is frozen. `None` = do not freeze (any more).
    pub fn hold_started(&mut self, now: Instant, session: SessionId) -> Option<Instant> {
        let cap = self.config.hold_max;
        let session = self.sessions.get_mut(&session)?;
        let deadline = session.start_hold(now, cap)?;
        for lun in &session.luns {
            self.frozen_at.insert(*lun, now);
        }
        Some(deadline)
    }

    /// What [`Work::Freeze`] led to. After a failure [`Work::Thaw`] follows: parts may be frozen.
    pub fn frozen(&mut self, now: Instant, session: SessionId, result: Result<FreezeReport, Refusal>) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.frozen(now, result, &mut self.outputs);
        }
    }

    /// What [`Work::Thaw`] led to.
    pub fn thawed(&mut self, now: Instant, session: SessionId, report: ThawReport) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.thawed(now, report, &mut self.outputs);
        }
    }

    /// What [`Work::Clean`] led to; `left_behind` names what could not be removed.
    pub fn cleaned(&mut self, now: Instant, session: SessionId, left_behind: Option<String>) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.cleaned(now, left_behind, &mut self.outputs);
        }
    }

    /// Tells the target how far a Prepare (or another long step) is: where to send [`crate::message::Progress`].
    #[must_use]
    pub fn waiting_for(&self, session: SessionId) -> Vec<Asked> {
        self.sessions
            .get(&session)
            .map(Session::waiters)
            .unwrap_or_default()
    }

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.sessions
            .values()
            .filter_map(|session| session.deadline(self.config.idle))
            .min()
    }

    /// Lets deadlines pass: the hold, the keepalive, idle sessions.
    pub fn handle_timeout(&mut self, now: Instant) {
        for session in self.sessions.values_mut() {
            session.expire(now, self.config.idle, &mut self.outputs);
        }
        self.forget_old(now);
    }

    /// The session that a heartbeat tells about: state, id, and for how long something has been frozen.
    #[must_use]
    pub fn in_flight(&self, now: Instant) -> (SessionState, Option<SessionId>, Option<u32>) {
        let busy = self
            .sessions
            .values()
            .filter(|session| !session.is_over())
            .max_by_key(|s| s.urgency());
        busy.map_or((SessionState::Idle, None, None), |session| {
            (session.state(), Some(session.id), session.frozen_ms(now))
        })
    }

    fn status(&self, now: Instant, session: Option<SessionId>) -> StatusReport {
        let found = match session {
            Some(id) => self.sessions.get(&id),
            None => self
                .sessions
                .values()
                .filter(|session| !session.is_over())
                .max_by_key(|s| s.urgency()),
        };
        match found {
            Some(session) => session.report(now),
            None => StatusReport {
                state: SessionState::Idle,
                session,
                held_ms: None,
                last_result: None,
            },
        }
    }

    fn work(&mut self, work: Work) {
        self.outputs.push_back(Output::Work(work));
    }

    fn step(&mut self, now: Instant, asked: Asked, id: SessionId, request: Request) {
        if let Some(session) = self.sessions.get_mut(&id) {
            if session.repeats(asked, &request, &mut self.outputs) {
                return;
            }
            if matches!(request, Request::Freeze(_))
                && let Some(refusal) = self.too_soon(now, id)
            {
                // Not stored: the same Freeze may come again when the time is over.
                self.answer(asked, Err(refusal));
                return;
            }
            if let Some(session) = self.sessions.get_mut(&id) {
                session.step(now, asked, request, self.config.hold_max, &mut self.outputs);
            }
            return;
        }
        match request {
            Request::Prepare(prepare) => match self.admit(now, &prepare) {
                Ok(()) => self.begin(now, asked, prepare),
                Err(refusal) => self.answer(asked, Err(refusal)),
            },
            Request::Abort(_) => {
                // Remembered, so that a Prepare that was overtaken by its Abort does not begin afterwards.
                self.make_room(now);
                self.sessions
                    .insert(id, Session::aborted(now, id, self.generation));
                self.answer(
                    asked,
                    Ok(Reply::Abort(Aborted {
                        held_ms: None,
                        reason: None,
                    })),
                );
            }
            _ => self.answer(
                asked,
                Err(Refusal::new(ErrorCode::UnknownSession, "no such session here")),
            ),
        }
    }

    /// Whether a new session may begin.
    fn admit(&mut self, now: Instant, prepare: &Prepare) -> Result<(), Refusal> {
        if self.stopping {
            return Err(Refusal::new(ErrorCode::Busy, "the agent stops"));
        }
        if prepare.luns.is_empty() {
            return Err(Refusal::new(ErrorCode::Malformed, "a session needs a LUN"));
        }
        let blocks = |session: &&Session| {
            session.holds_luns() && session.luns.iter().any(|l| prepare.luns.contains(l))
        };
        if let Some(other) = self.sessions.values().find(blocks) {
            let text = format!("session {} is {} on this LUN", other.id, other.state());
            return Err(Refusal::new(ErrorCode::Busy, text).held_by(other.id));
        }
        if let Some(refusal) = self.rate_limit(now, &prepare.luns) {
            return Err(refusal);
        }
        if !self.make_room(now) {
            return Err(Refusal::new(
                ErrorCode::Busy,
                format!("{MAX_SESSIONS} sessions are under way"),
            ));
        }
        Ok(())
    }

    fn begin(&mut self, now: Instant, asked: Asked, prepare: Prepare) {
        let session = Session::preparing(now, asked, self.generation, prepare.clone());
        self.sessions.insert(prepare.session, session);
        self.work(Work::Prepare(prepare));
    }

    fn too_soon(&self, now: Instant, id: SessionId) -> Option<Refusal> {
        let session = self
            .sessions
            .get(&id)
            .filter(|session| matches!(session.state, State::Prepared { .. }))?;
        self.rate_limit(now, &session.luns)
    }

    fn rate_limit(&self, now: Instant, luns: &[LunId]) -> Option<Refusal> {
        let again = luns
            .iter()
            .filter_map(|lun| self.frozen_at.get(lun))
            .max()?
            .checked_add(self.config.min_interval)?;
        let wait = again.checked_duration_since(now).filter(|wait| !wait.is_zero())?;
        let ms = u32::try_from(wait.as_millis())
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        let text = format!("frozen less than {} s ago", self.config.min_interval.as_secs());
        Some(Refusal::new(ErrorCode::Busy, text).retry_after(ms))
    }

    /// Ends sessions under way that match.
    fn end_where(&mut self, now: Instant, why: &str, ending: Ending, matches: impl Fn(&Session) -> bool) {
        for session in self.sessions.values_mut().filter(|session| matches(session)) {
            session.end(now, why, ending, &mut self.outputs);
        }
    }

    fn forget_old(&mut self, now: Instant) {
        self.sessions
            .retain(|_, session| !session.is_over() || now < session.since + KEEP_RESULTS);
        let interval = self.config.min_interval;
        self.frozen_at.retain(|_, at| now < *at + interval);
    }

    /// Makes room for one more session, at the cost of the oldest one that is over.
    fn make_room(&mut self, now: Instant) -> bool {
        self.forget_old(now);
        if self.sessions.len() < MAX_SESSIONS {
            return true;
        }
        let over = self.sessions.values().filter(|session| session.is_over());
        let Some(oldest) = over.min_by_key(|session| session.since).map(|session| session.id) else {
            return false;
        };
        self.sessions.remove(&oldest);
        true
    }
}

fn log(severity: Severity, code: ErrorCode, subject: impl Into<String>, text: impl Into<String>) -> Output {
    Output::Log(LogEvent {
        severity,
        code,
        subject: subject.into(),
        text: text.into(),
    })
}

/// When a session that is frozen has to be thawed because nothing is heard.
fn keepalive_deadline(heard: Instant) -> Instant {
    heard + KEEPALIVE_LOST
}
