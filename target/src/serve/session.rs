//! One task owns one connection: its socket, its protocol state and its commands in flight.
//!
//! The loop below is the whole data path: bytes from the socket straight into the place that the protocol names, commands to
//! the LUN, outcomes back, PDUs out in one `writev`. Nothing here blocks: what may wait for a disk goes to a worker and comes
//! back through `done`.

mod recording;
mod reset;
mod socket;
mod watch;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use stillpoint_iscsi::{
    Admission, Command, Connection, Event, Frame, LoginStatus, Outcome, TaskId, TmfId, TmfResponse, Tsih,
};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;

use super::Daemon;
use super::access::{Portal, connection_config};
use super::admit::admit;
use super::copy::{Cancel, Job};
use super::lun::{Lun, Planned, Step, absent};
use super::net::{DiscoveryName, DiscoveryPlace, PendingSeat};
use super::reactor::Place;
use super::registry::{Control, Entering, NotNow, Session};
use super::trace::Trace;
use watch::Habits;

/// What one `readv` may bring beyond the place that the protocol named: the next PDUs' headers.
const AHEAD: usize = 64 << 10;
/// Control messages that wait for the task.
const CONTROLS: usize = 1024;
/// A peer that reads nothing for this long while there is something to send is given up.
const STALL: Duration = Duration::from_secs(60);
/// A session that ends has this long to send what it still has to say.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Serves a connection until it ends.
pub(crate) async fn run(
    daemon: Arc<Daemon>,
    stream: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
    portal_group: u16,
    place: Place,
    seat: PendingSeat,
) {
    let span = tracing::info_span!("conn", %peer, initiator = tracing::field::Empty, session = tracing::field::Empty);
    match Task::new(daemon, peer, local, portal_group, place, seat) {
        Ok(mut task) => task.serve(&stream).instrument(span).await,
        Err(error) => tracing::error!(%peer, %error, "connection closed: the system gives no random numbers"),
    }
}

/// A command that a worker has finished.
struct Finished {
    task: TaskId,
    /// `None`: it has been answered before.
    outcome: Option<Outcome>,
}

/// Why the loop ends.
#[derive(Debug)]
enum End {
    /// The protocol is through: logout, or a refused login.
    Closed,
    /// The peer closed or the network failed.
    Socket(io::Error),
    /// A rule of the protocol was broken, or a deadline passed.
    Protocol(stillpoint_iscsi::Error),
    /// The control plane said so.
    Dropped(String),
    /// It had not logged in, and is not waited for any longer.
    Cut(&'static str),
}

struct Task {
    daemon: Arc<Daemon>,
    conn: Connection,
    peer: SocketAddr,
    local: SocketAddr,
    portal_group: u16,
    place: Place,
    seat: Option<PendingSeat>,
    /// A normal session, from its admission on.
    session: Option<Arc<Session>>,
    /// LUNs that know this session's I_T nexus.
    attached: Vec<(u16, Arc<Lun>)>,
    controls: mpsc::Receiver<Control>,
    control: mpsc::Sender<Control>,
    done: mpsc::UnboundedReceiver<Finished>,
    finish: mpsc::UnboundedSender<Finished>,
    tmf_done: mpsc::UnboundedReceiver<(TmfId, TmfResponse)>,
    tmf_finish: mpsc::UnboundedSender<(TmfId, TmfResponse)>,
    /// Commands that workers have, those that are answered already among them; the protocol layer bounds their number and their
    /// bytes.
    running: BTreeMap<TaskId, Cancel>,
    probes: Vec<oneshot::Sender<()>>,
    /// When the session is ended whatever the initiator does.
    deadline: Option<(Instant, String)>,
    ahead: Vec<u8>,
    ahead_at: usize,
    ahead_end: usize,
    out: VecDeque<Frame>,
    /// Bytes of `out`'s first frame that the socket has taken.
    sent: usize,
    /// Who records what passes, if anybody.
    trace: Option<Trace>,
    /// Since when the socket takes nothing. The protocol layer watches what it still has, not what waits in `out`.
    stalled: Option<Instant>,
    /// What its waits were like lately.
    habits: Habits,
    /// Commands so far.
    commands: u64,
}

impl Task {
    fn new(
        daemon: Arc<Daemon>,
        peer: SocketAddr,
        local: SocketAddr,
        portal_group: u16,
        place: Place,
        seat: PendingSeat,
    ) -> Result<Self, getrandom::Error> {
        let config = connection_config(&daemon, peer, local, portal_group)?;
        let conn = Connection::new(Instant::now(), config, Arc::new(Portal::new(Arc::clone(&daemon))));
        let (control, controls) = mpsc::channel(CONTROLS);
        let (finish, done) = mpsc::unbounded_channel();
        let (tmf_finish, tmf_done) = mpsc::unbounded_channel();
        Ok(Self {
            daemon,
            conn,
            peer,
            local,
            portal_group,
            place,
            seat: Some(seat),
            session: None,
            attached: Vec::new(),
            controls,
            control,
            done,
            finish,
            tmf_done,
            tmf_finish,
            running: BTreeMap::new(),
            probes: Vec::new(),
            deadline: None,
            ahead: vec![0; AHEAD],
            ahead_at: 0,
            ahead_end: 0,
            out: VecDeque::new(),
            sent: 0,
            trace: None,
            stalled: None,
            habits: Habits::default(),
            commands: 0,
        })
    }

    async fn serve(&mut self, stream: &TcpStream) {
        let end = loop {
            match self.turn(stream).await {
                Ok(()) => {}
                Err(end) => break end,
            }
        };
        match &end {
            End::Closed => tracing::debug!("connection closed"),
            End::Socket(error) => tracing::info!(%error, "connection lost"),
            End::Protocol(error) => tracing::warn!(%error, "connection dropped"),
            End::Dropped(reason) => tracing::info!(%reason, "session ended"),
            // Of a flood there would be thousands.
            End::Cut(reason) => tracing::debug!(%reason, "connection closed"),
        }
        let speak = !matches!(end, End::Socket(_) | End::Cut(_));
        self.wind_up(stream, speak).await;
    }

    /// One round: everything that is ready, then wait for something to be.
    async fn turn(&mut self, stream: &TcpStream) -> Result<(), End> {
        if let Some(reason) = self.session.as_ref().and_then(|session| session.ending()) {
            return Err(End::Dropped(reason.to_owned()));
        }
        let daemon = Arc::clone(&self.daemon);
        // From here on a wake-up is not missed, though nobody waits for it yet.
        let memory_freed = daemon.memory_freed.notified();
        self.events();
        self.write(stream)?;
        // What was sent may have made room for commands that waited inside the protocol layer.
        while self.events() {
            self.write(stream)?;
        }
        if self.conn.is_closed() {
            return Err(End::Closed);
        }
        let wakes = self.wakes();
        if wakes.is_some_and(|at| at <= Instant::now()) {
            // Not left to the wait below: a peer that never stops sending would put its deadlines off for ever.
            return self.timeout();
        }
        let sleep = async {
            match wakes {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let reads = !self.conn.receiving_paused();
        let buffered = reads && self.ahead_at < self.ahead_end;
        let mut more = false;
        let (began, before) = (Instant::now(), self.commands);
        let on_workers = !self.running.is_empty();
        let habit = self.habits.of(on_workers);
        let worth_it = habit.is_worth_it(began);
        let permit = worth_it.then(|| daemon.reactors.watch()).flatten();
        tokio::select! {
            biased;
            why = cut(self.seat.as_ref()), if self.seat.is_some() => return Err(End::Cut(why)),
            Some(control) = self.controls.recv() => self.control(control),
            Some(finished) = self.done.recv() => self.finished(finished),
            () = memory_freed, if self.conn.waits_for_memory() => self.conn.memory_freed(Instant::now()),
            Some((tmf, response)) = self.tmf_done.recv() => self.conn.tmf_complete(Instant::now(), tmf, response),
            ready = stream.writable(), if !self.out.is_empty() => ready.map_err(End::Socket)?,
            () = std::future::ready(()), if buffered => more = self.read(stream)?,
            ready = stream.readable(), if reads => {
                ready.map_err(End::Socket)?;
                more = self.read(stream)?;
            }
            () = habit.watch(began), if permit.is_some() => return Ok(()),
            () = sleep => self.timeout()?,
        }
        drop(permit);
        let brought = self.commands - before;
        self.habits.of(on_workers).came(began, Instant::now(), brought);
        while let Ok(finished) = self.done.try_recv() {
            self.finished(finished);
        }
        if more {
            // This peer can keep the loop busy for ever: the other connections of this thread, and our own messages, get
            // their turn.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// The next deadline of all.
    fn wakes(&self) -> Option<Instant> {
        let stall = self.stalled.map(|since| since + STALL);
        let deadline = self.deadline.as_ref().map(|(at, _)| *at);
        [self.conn.poll_timeout(), deadline, stall]
            .into_iter()
            .flatten()
            .min()
    }

    fn timeout(&mut self) -> Result<(), End> {
        let now = Instant::now();
        if let Some((_, reason)) = self.deadline.take_if(|(at, _)| *at <= now) {
            return Err(End::Dropped(reason));
        }
        if self.stalled.is_some_and(|since| since + STALL <= now) {
            return Err(End::Socket(io::ErrorKind::TimedOut.into()));
        }
        self.conn.handle_timeout(now).map_err(End::Protocol)
    }

    /// Does what the protocol layer asks; `false` when it asked for nothing.
    fn events(&mut self) -> bool {
        let mut any = false;
        while let Some(event) = self.conn.poll_event() {
            any = true;
            match event {
                Event::Admission {
                    initiator,
                    isid,
                    target,
                    ..
                } => self.admission(&initiator, isid.0, target),
                Event::LoggedIn => self.logged_in(),
                Event::Command(command) => self.command(command),
                Event::TaskManagement {
                    tmf,
                    function,
                    lun,
                    affected,
                } => {
                    self.cancel(&affected);
                    self.task_management(tmf, function, lun);
                }
                Event::Pong => self.probes.drain(..).for_each(|probe| {
                    let _ = probe.send(());
                }),
                Event::LoggedOut { reason } => {
                    tracing::info!(?reason, "initiator logged out");
                    self.running.values().for_each(Cancel::cancel);
                }
                other => tracing::debug!(?other, "event without a meaning for the daemon"),
            }
        }
        any
    }

    /// The login is complete but for the daemon's word. Deciding may take seconds (a silent session is pinged), so it runs
    /// beside the loop and answers through `control`.
    fn admission(&mut self, initiator: &str, isid: [u8; 6], target: Option<u64>) {
        let now = Instant::now();
        let name = |place| DiscoveryName {
            initiator: initiator.to_lowercase(),
            isid,
            place,
        };
        let named = |iqn: &str| name(DiscoveryPlace::Target(iqn.to_lowercase(), self.portal_group));
        let Some(key) = target else {
            let name = match self.conn.info().target_name {
                Some(iqn) => named(&iqn),
                None => name(DiscoveryPlace::Portal(self.local)),
            };
            if let Some(seat) = &mut self.seat {
                seat.discovers(name);
            }
            self.conn.admit(now, Admission::Accept { tsih: Tsih(1) });
            return;
        };
        let Some(target) = self.daemon.registry.target_by_key(key) else {
            self.conn
                .admit(now, Admission::Refuse(LoginStatus::TargetRemoved));
            return;
        };
        let entered = self.daemon.registry.enter(Entering {
            initiator: initiator.to_lowercase(),
            isid,
            target,
            peer: self.peer,
            portal: self.local,
            portal_group: self.portal_group,
            control: self.control.clone(),
        });
        let session = match entered {
            Ok(session) => session,
            Err(why) => {
                tracing::warn!(?why, limit = super::registry::MAX_SESSIONS, "login put off");
                let status = match why {
                    NotNow::Full => LoginStatus::OutOfResources,
                    NotNow::Held => LoginStatus::ServiceUnavailable,
                };
                self.conn.admit(now, Admission::Refuse(status));
                return;
            }
        };
        let span = tracing::Span::current();
        span.record("initiator", tracing::field::display(&session.initiator));
        span.record("session", session.id);
        self.session = Some(Arc::clone(&session));
        if let Some(seat) = &self.seat {
            seat.replaces_discovery(&named(session.target.iqn()));
        }
        // From here on it counts among the sessions. A discovery session keeps its seat: nobody has proved anything there.
        self.seat = None;
        let (daemon, control) = (Arc::clone(&self.daemon), self.control.clone());
        let decide = async move {
            let admission = match admit(&daemon.registry, &session).await {
                Ok(()) => Admission::Accept {
                    tsih: Tsih(session.tsih),
                },
                Err(status) => Admission::Refuse(status),
            };
            // The task may be gone by now: then there is nobody to tell.
            drop(control.send(Control::Admit(admission)).await);
        };
        self.daemon.tracker.spawn(decide.in_current_span());
    }

    fn logged_in(&mut self) {
        if !self.probes.is_empty() {
            // Asked for while the login was being decided on.
            self.conn.ping(Instant::now());
        }
        let info = self.conn.info();
        let Some(session) = &self.session else {
            tracing::debug!("discovery session");
            return;
        };
        if let Some(params) = &info.params {
            session.figures.header_digest.store(params.header_digest, Relaxed);
            session.figures.data_digest.store(params.data_digest, Relaxed);
        }
        session.figures.active.store(true, Relaxed);
        tracing::info!(target_name = %session.target.iqn(), isid = ?info.isid, tsih = session.tsih, "session logged in");
        let rules = session.target.rules();
        let initiator = session.initiator.clone();
        for (number, lun) in rules.shown_to(&initiator) {
            self.attach(number, lun);
        }
    }

    fn attach(&mut self, number: u16, lun: &Arc<Lun>) {
        let Some(session) = &self.session else { return };
        if !self.attached.iter().any(|(_, known)| Arc::ptr_eq(known, lun)) {
            // Shadow copies come and go while a session stays: it must not keep all that it ever saw.
            let rules = session.target.rules();
            self.attached.retain(|(_, known)| {
                let shown = rules.number_of(known).is_some();
                if !shown {
                    known.detach(session.id);
                }
                shown
            });
            lun.attach(session);
            self.attached.push((number, Arc::clone(lun)));
        }
    }

    fn command(&mut self, command: Command) {
        let now = Instant::now();
        self.commands += 1;
        let Some(session) = self.session.clone() else {
            // A discovery session has no LUNs; the protocol layer refuses commands there.
            self.conn.complete(now, command.task, absent(&command.cdb, &[]));
            return;
        };
        session.figures.commands.fetch_add(1, Relaxed);
        session
            .figures
            .written_bytes
            .fetch_add(command.data.len() as u64, Relaxed);
        let rules = session.target.rules();
        let found = command
            .lun
            .number()
            .and_then(|n| rules.find_for(n, &session.initiator));
        let Some((number, lun)) = found else {
            let numbers = rules.numbers_for(&session.initiator);
            self.conn
                .complete(now, command.task, absent(&command.cdb, &numbers));
            return;
        };
        self.attach(number, lun);
        let token = lun.begin();
        if session.ending().is_some() {
            // Whoever ended it may have waited for its commands already. Unanswered: the connection goes down with it.
            return;
        }
        let task = command.task;
        // Nobody else on this thread, and no other command of ours, is held up.
        let may_sync = self.running.is_empty() && self.place.is_alone();
        let step = match lun.plan(&session, &rules, command, token) {
            Step::Work(planned) => planned.try_now(lun, may_sync),
            step => step,
        };
        match step {
            Step::Answer(outcome) => self.answer(task, outcome),
            Step::Early(outcome, trailing) => {
                self.answer(task, outcome);
                self.work(task, lun, |job| {
                    trailing.execute(job);
                    None
                });
            }
            Step::Work(planned) => self.start(task, lun, planned),
        }
    }

    fn answer(&mut self, task: TaskId, outcome: Outcome) {
        if let Some(session) = &self.session {
            session
                .figures
                .read_bytes
                .fetch_add(outcome.data.len() as u64, Relaxed);
        }
        self.conn.complete(Instant::now(), task, outcome);
    }

    /// Hands a command to a worker thread, or to a task of its own when it waits for other sessions.
    fn start(&mut self, task: TaskId, lun: &Arc<Lun>, planned: Planned) {
        if !planned.waits_for_others() {
            self.work(task, lun, move |job| Some(planned.execute(job)));
            return;
        }
        let (daemon, lun, finish) = (Arc::clone(&self.daemon), Arc::clone(lun), self.finish.clone());
        self.running.insert(task, Cancel::default());
        let span = tracing::debug_span!("task", task = task.get(), lun = lun.name());
        let reserve = async move {
            let outcome = Some(planned.reserve(&lun, &daemon.registry).await);
            // The connection may be gone meanwhile: then nobody waits for the outcome.
            drop(finish.send(Finished { task, outcome }));
        };
        self.daemon.tracker.spawn(reserve.instrument(span));
    }

    /// Has a worker thread do something for a command.
    fn work(
        &mut self,
        task: TaskId,
        lun: &Arc<Lun>,
        what: impl FnOnce(&Job<'_>) -> Option<Outcome> + Send + 'static,
    ) {
        // Commands come within a session.
        let Some(session) = self.session.clone() else {
            return;
        };
        let (daemon, lun, finish) = (Arc::clone(&self.daemon), Arc::clone(lun), self.finish.clone());
        let cancel = Cancel::default();
        self.running.insert(task, cancel.clone());
        let span = tracing::debug_span!("task", task = task.get(), lun = lun.name());
        self.daemon.workers.spawn_blocking(move || {
            let job = Job {
                daemon: &daemon,
                session: &session,
                lun: &lun,
                cancel: &cancel,
            };
            let outcome = span.in_scope(|| what(&job));
            drop(finish.send(Finished { task, outcome }));
        });
    }

    fn finished(&mut self, finished: Finished) {
        self.running.remove(&finished.task);
        if let Some(outcome) = finished.outcome {
            self.answer(finished.task, outcome);
        }
    }

    /// These commands are aborted: those that can end early do.
    fn cancel(&self, tasks: &[TaskId]) {
        for task in tasks {
            if let Some(cancel) = self.running.get(task) {
                cancel.cancel();
            }
        }
    }

    fn control(&mut self, control: Control) {
        let now = Instant::now();
        match control {
            Control::Admit(admission) => self.conn.admit(now, admission),
            Control::Probe(answered) => {
                self.probes.retain(|probe| !probe.is_closed());
                self.probes.push(answered);
                self.conn.ping(now);
            }
            Control::Logout { grace, reason } => {
                self.conn.request_logout(now, grace);
                self.deadline = Some((now + grace, reason));
            }
            Control::Trace(order) => self.trace(order),
            Control::Wake => {}
            Control::AbortTasks { luns, cause, done } => {
                // Tasks that run end without a trace; the sender waits for them by draining the LUN.
                for number in luns {
                    self.abort_lun(number, cause);
                }
                let _ = done.send(());
            }
        }
    }

    /// Ends the session: waits for its running commands, lets go of its LUNs, and says what is left to say.
    async fn wind_up(&mut self, stream: &TcpStream, speak: bool) {
        // Whoever waits for an answer to a message is let go: two sessions that end and wait for each other would never end.
        self.controls.close();
        while self.controls.try_recv().is_ok() {}
        self.conn.close();
        // A command that runs may still write. Whoever replaces this session waits for `gone`.
        self.running.values().for_each(Cancel::cancel);
        while !self.running.is_empty() {
            let Some(finished) = self.done.recv().await else {
                break;
            };
            self.running.remove(&finished.task);
        }
        if let Some(session) = self.session.take() {
            for (_, lun) in self.attached.drain(..) {
                lun.detach(session.id);
            }
            self.daemon.registry.leave(&session);
        }
        // Last: a peer that reads nothing holds up nobody who waits for the session's end.
        if speak {
            let last_words = async {
                while self.write(stream).is_ok() && !self.out.is_empty() && stream.writable().await.is_ok() {}
            };
            drop(tokio::time::timeout(LAST_WORDS, last_words).await);
        }
    }
}

/// Resolves when a connection that has not logged in has to make room.
async fn cut(seat: Option<&PendingSeat>) -> &'static str {
    match seat {
        Some(seat) => seat.taken().await,
        None => std::future::pending().await,
    }
}

impl Drop for Task {
    /// A panic elsewhere in the process, or a runtime that shuts down, must not leave a session in the table.
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            self.daemon.registry.leave(&session);
        }
    }
}
