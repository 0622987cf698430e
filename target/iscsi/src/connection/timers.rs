//! Deadlines and pings. All of them are looked at in one place, [`Connection::next_deadline`], so that a deadline which
//! wakes the owner is always one that is then acted upon.

use std::time::Instant;

use super::management::OpenTmf;
use super::{Connection, State};
use crate::config::TimeConfig;
use crate::error::Error;
use crate::memory::RETRY;
use crate::pdu::AsyncEvent;
use crate::types::{SessionType, Ttt};

/// What the connection remembers of time.
#[derive(Debug)]
pub(super) struct Timers {
    started: Instant,
    last_heard: Instant,
    /// The peer takes part in NOP: it sent one, or answered one.
    knows_nop: bool,
    ping: Option<Ping>,
    /// Since when the peer has read nothing while there is something to send.
    stalled_since: Option<Instant>,
    last_data: Instant,
    logout_by: Option<Instant>,
}

/// A ping that is not answered.
#[derive(Debug)]
struct Ping {
    ttt: Ttt,
    for_owner: bool,
    /// When it was sent; before, it waits in the queue.
    left: Option<Instant>,
}

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Login,
    Logout,
    Cleanup,
    DataOut,
    Stall,
    AbortedData,
    Ping,
    Pong,
    Silence,
    Memory,
}

impl Timers {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            started: now,
            last_heard: now,
            knows_nop: false,
            ping: None,
            stalled_since: None,
            last_data: now,
            logout_by: None,
        }
    }

    pub(super) fn heard(&mut self, now: Instant) {
        self.last_heard = now;
    }

    pub(super) fn logged_in(&mut self, now: Instant) {
        self.last_heard = now;
    }

    /// A frame was taken: the peer reads.
    pub(super) fn sent(&mut self, now: Instant, was_last: bool) {
        self.stalled_since = (!was_last).then_some(now);
    }

    /// Starts or stops the clock for a peer that does not read.
    pub(super) fn watch_output(&mut self, now: Instant, empty: bool) {
        if empty {
            self.stalled_since = None;
        } else {
            self.stalled_since.get_or_insert(now);
        }
    }

    pub(super) fn data_progress(&mut self, now: Instant) {
        self.last_data = now;
    }

    pub(super) fn logout_requested(&mut self, by: Instant) {
        self.logout_by = Some(by);
    }

    pub(super) fn initiator_pings(&mut self) {
        self.knows_nop = true;
    }

    /// Whether a ping is on its way; if so, its answer will be for the owner as well.
    pub(super) fn ping_is_open(&mut self, for_owner: bool) -> bool {
        match &mut self.ping {
            Some(ping) => {
                ping.for_owner |= for_owner;
                true
            }
            None => false,
        }
    }

    pub(super) fn ping_queued(&mut self, ttt: Ttt, for_owner: bool) {
        self.ping = Some(Ping {
            ttt,
            for_owner,
            left: None,
        });
    }

    pub(super) fn ping_left(&mut self, now: Instant) {
        if let Some(ping) = &mut self.ping {
            ping.left = Some(now);
        }
    }

    /// A ping was answered. Whether the owner waits for it.
    pub(super) fn pong(&mut self, ttt: Ttt) -> bool {
        match self.ping.take_if(|ping| ping.ttt == ttt) {
            Some(ping) => {
                self.knows_nop = true;
                ping.for_owner
            }
            None => false,
        }
    }

    /// Silence of a normal session: first we ping; an initiator that knows NOP must then answer, another has longer.
    fn silence(&self, times: &TimeConfig) -> Option<(Instant, Due)> {
        match &self.ping {
            None => Some((self.last_heard + times.ping_idle, Due::Ping)),
            // It waits behind other frames: if the peer reads nothing, that is a stall.
            Some(Ping { left: None, .. }) => None,
            Some(Ping { left: Some(left), .. }) if self.knows_nop => {
                Some((self.last_heard.max(*left) + times.ping_answer, Due::Pong))
            }
            Some(_) => Some((self.last_heard + times.silent, Due::Silence)),
        }
    }
}

impl Connection {
    /// When [`Self::handle_timeout`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.next_deadline().map(|(at, _)| at)
    }

    /// Acts on every deadline that has passed.
    ///
    /// # Errors
    /// The connection is over: send what [`Self::poll_transmit`] still yields, then close the socket.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), Error> {
        self.now = now;
        if self.receiving_paused() {
            // Whatever the peer says waits in the socket.
            self.timers.heard(now);
            self.timers.data_progress(now);
        }
        while let Some((at, due)) = self.next_deadline() {
            if at > now {
                break;
            }
            if let Err(error) = self.act(due) {
                return Err(self.fail(error));
            }
            self.settle();
        }
        Ok(())
    }

    fn next_deadline(&self) -> Option<(Instant, Due)> {
        let (timers, times) = (&self.timers, &self.config.times);
        let stall = timers
            .stalled_since
            .map(|since| (since + times.stall, Due::Stall));
        let session = match &self.state {
            State::Login(_) | State::Admission(..) => {
                return Some((timers.started + times.login, Due::Login));
            }
            State::Closing { .. } => return stall,
            State::Full(session) => session,
        };
        let silence = match session.session_type {
            _ if session.is_logging_out() => None,
            SessionType::Normal => timers.silence(times),
            SessionType::Discovery => Some((timers.last_heard + times.discovery, Due::Silence)),
        };
        let data_out =
            (session.budget.open_sequences() > 0).then(|| (timers.last_data + times.data_out, Due::DataOut));
        let cleanup = session
            .logout
            .as_ref()
            .map(|logout| (logout.deadline, Due::Cleanup));
        let aborted = session.tmfs.values().filter_map(OpenTmf::data_deadline).min();
        let aborted = aborted.map(|until| (until, Due::AbortedData));
        let logout = timers.logout_by.map(|by| (by, Due::Logout));
        let paused = session.must_pause(self.now).then(|| self.now + RETRY);
        let memory = session.share.retry_at.or(paused).map(|at| (at, Due::Memory));
        [silence, data_out, cleanup, logout, stall, memory, aborted]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }

    fn act(&mut self, due: Due) -> Result<(), Error> {
        match due {
            Due::Login => Err(Error::LoginTimeout),
            Due::Logout => {
                let (cid, wait) = match (&self.state, self.who.cid) {
                    (State::Full(session), Some(cid)) => (cid.0, session.time2wait_s()),
                    _ => (0, 0),
                };
                self.send_async(AsyncEvent::DROP_CONNECTION, [cid, wait, 0]);
                Err(Error::LogoutTimeout)
            }
            Due::Cleanup => Err(Error::CleanupTimeout),
            Due::DataOut => Err(Error::DataOutTimeout),
            Due::Stall => {
                // Nothing that waits will ever leave.
                self.tx.clear();
                Err(Error::PeerNotReading)
            }
            Due::AbortedData => {
                if let Some(mut full) = self.full() {
                    full.aborted_data_overdue();
                }
                Ok(())
            }
            Due::Ping => {
                if let Some(mut full) = self.full() {
                    full.ping(false);
                    // Nothing has come for a while: what it used to need is not kept for it.
                    full.session.pool.clear();
                }
                Ok(())
            }
            Due::Pong => Err(Error::PingTimeout),
            Due::Silence => Err(Error::Silent),
            Due::Memory => {
                self.memory_freed(self.now);
                Ok(())
            }
        }
    }
}
