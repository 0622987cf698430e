//! The tokens that are alive.
//!
//! A token is proof by itself: whoever shows all of its 512 bytes may write what it stands for. It holds a point in time, and
//! with that space, so it dies when nobody has used it for a while, and with the daemon.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stillpoint_scsi::{BlockError, CopyError, RodToken};

use crate::serve::backend::Pinned;

/// Tokens at once. Windows makes one for each 256 MiB that it copies and leaves them to their end.
const MAX_TOKENS: usize = 1024;
/// Tokens that are over and still known, to say so.
const MAX_OVER: usize = 256;

/// What a token stands for.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) point: Pinned,
    /// One behind the other; bytes at the point in time.
    pub(super) ranges: Vec<(u64, u64)>,
}

#[derive(Debug)]
struct Alive {
    token: RodToken,
    held: Arc<Held>,
    inactivity: Duration,
    last_use: Instant,
    /// It has been written to where it was made for: the first to go when there are too many.
    used: bool,
}

impl Alive {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_use) >= self.inactivity
    }
}

#[derive(Debug, Default)]
struct Table {
    alive: BTreeMap<u64, Alive>,
    over: VecDeque<(RodToken, CopyError)>,
}

impl Table {
    /// Takes a token out of the living; what it held is the caller's to drop, without the lock.
    fn end(&mut self, identifier: u64, why: CopyError) -> Option<Arc<Held>> {
        let alive = self.alive.remove(&identifier)?;
        self.over.push_back((alive.token, why));
        if self.over.len() > MAX_OVER {
            self.over.pop_front();
        }
        Some(alive.held)
    }

    /// Makes room for one more: the one that is longest unused among those that have served.
    fn make_room(&mut self) -> Result<Option<Arc<Held>>, CopyError> {
        if self.alive.len() < MAX_TOKENS {
            return Ok(None);
        }
        let oldest = self
            .alive
            .iter()
            .filter(|(_, alive)| alive.used)
            .min_by_key(|(_, alive)| alive.last_use)
            .map(|(identifier, _)| *identifier)
            .ok_or(CopyError::NoTokenResources)?;
        Ok(self.end(oldest, CopyError::TokenCancelled))
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Tokens(Mutex<Table>);

impl Tokens {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a token for `held`; `make` gets its number and its secret.
    ///
    /// # Errors
    /// When there are too many, or the system gives no randomness.
    pub(super) fn insert(
        &self,
        held: Held,
        inactivity: Duration,
        make: impl FnOnce(u64, &[u8; RodToken::SECRET_LEN]) -> RodToken,
    ) -> Result<RodToken, CopyError> {
        let mut secret = [0; RodToken::SECRET_LEN];
        let mut number = [0; 8];
        if let Err(error) = getrandom::fill(&mut secret).and_then(|()| getrandom::fill(&mut number)) {
            tracing::error!(%error, "no token can be made: the system gives no random numbers");
            return Err(CopyError::Block(BlockError::Fault));
        }
        let token = make(u64::from_ne_bytes(number), &secret);
        let now = Instant::now();
        self.expire(now);
        let mut table = self.lock();
        let evicted = table.make_room()?;
        table.alive.insert(
            token.identifier(),
            Alive {
                token: token.clone(),
                held: Arc::new(held),
                inactivity,
                last_use: now,
                used: false,
            },
        );
        drop(table);
        drop(evicted);
        Ok(token)
    }

    /// What the token stands for; that counts as a use.
    ///
    /// # Errors
    /// That it is over, or was never made here.
    pub(super) fn get(&self, token: &RodToken, now: Instant) -> Result<Arc<Held>, CopyError> {
        self.expire(now);
        let mut table = self.lock();
        if let Some(alive) = table.alive.get_mut(&token.identifier())
            && alive.token == *token
        {
            alive.last_use = now;
            return Ok(Arc::clone(&alive.held));
        }
        let over = table.over.iter().find(|(known, _)| known == token);
        Err(over.map_or(CopyError::TokenUnknown, |(_, why)| *why))
    }

    /// All that was asked of it is written.
    pub(super) fn used(&self, token: &RodToken, now: Instant) {
        if let Some(alive) = self.lock().alive.get_mut(&token.identifier()) {
            (alive.last_use, alive.used) = (now, true);
        }
    }

    /// Ends those that nobody has used for too long.
    pub(super) fn expire(&self, now: Instant) {
        let mut table = self.lock();
        let over: Vec<u64> = table
            .alive
            .iter()
            .filter(|(_, alive)| alive.is_over(now))
            .map(|(identifier, _)| *identifier)
            .collect();
        let held: Vec<_> = over
            .into_iter()
            .filter_map(|identifier| table.end(identifier, CopyError::TokenExpired))
            .collect();
        drop(table);
        drop(held);
    }

    /// Ends all: the daemon stops, and the store wants to close.
    pub(super) fn clear(&self) {
        let alive = std::mem::take(&mut self.lock().alive);
        drop(alive);
    }
}
