//! Enrolment tokens that outlive a restart: `agents/tokens.json` in the data directory, mode 0600, beside the key.
//!
//! Every change is durable before anybody is told of it: a token that was used, or burnt by wrong guesses, must not come back.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use stillpoint_agentproto::enrol::{EXPORTER_LEN, Grant, SavedToken, Token, TokenBook};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal};
use zeroize::Zeroizing;

use super::tls;

const FILE: &str = "tokens.json";
/// A token that lives longer is a password; whatever a clock that was set back says.
pub(crate) const MAX_TTL: Duration = Duration::from_secs(7 * 86_400);

/// One token in the file.
#[derive(Serialize, Deserialize)]
struct Kept {
    token: String,
    luns: Vec<LunId>,
    /// Unix time in milliseconds.
    expires_unix_ms: i64,
    failures: u8,
}

/// The tokens, and their file.
#[derive(Debug)]
pub(super) struct Tokens {
    dir: PathBuf,
    book: Mutex<TokenBook>,
}

impl Tokens {
    /// Reads the tokens that still wait. Blocks.
    pub(super) fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Zeroizing::default(),
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
        };
        let kept: Vec<Kept> = if text.is_empty() {
            Vec::new()
        } else {
            serde_json::from_slice(&text).with_context(|| {
                format!(
                    "{} is damaged: remove it, and make new enrolment tokens",
                    path.display()
                )
            })?
        };
        let now_ms = jiff::Timestamp::now().as_millisecond();
        let saved = |kept: Kept| SavedToken {
            left: u64::try_from(kept.expires_unix_ms.saturating_sub(now_ms))
                .map_or(Duration::ZERO, Duration::from_millis)
                .min(MAX_TTL),
            text: Zeroizing::new(kept.token),
            luns: kept.luns,
            failures: kept.failures,
        };
        let mut book = TokenBook::default();
        book.restore(Instant::now(), kept.into_iter().map(saved).collect());
        Ok(Self {
            dir: dir.to_owned(),
            book: Mutex::new(book),
        })
    }

    /// Remembers a token. Blocks.
    ///
    /// # Errors
    /// Too many wait, or the file cannot be written.
    pub(super) fn add(&self, token: Token, luns: Vec<LunId>, ttl: Duration) -> Result<(), Refusal> {
        let mut book = self.lock();
        book.add(Instant::now(), token, luns, ttl)?;
        self.keep(&mut book)
    }

    /// Answers an `Enrol`. Blocks.
    ///
    /// # Errors
    /// It is not valid, or that it was used cannot be written down.
    pub(super) fn enrol(
        &self,
        agent: AgentId,
        token_id: [u8; 8],
        mac: &[u8; 32],
        exporter: &[u8; EXPORTER_LEN],
    ) -> Result<Grant, Refusal> {
        let mut book = self.lock();
        let before = book.changes();
        let result = book.enrol(Instant::now(), agent, token_id, mac, exporter);
        if book.changes() != before {
            self.keep(&mut book)?;
        }
        result
    }

    fn keep(&self, book: &mut TokenBook) -> Result<(), Refusal> {
        let now_ms = jiff::Timestamp::now().as_millisecond();
        let kept = |saved: SavedToken| Kept {
            token: saved.text.to_string(),
            luns: saved.luns,
            expires_unix_ms: now_ms.saturating_add(i64::try_from(saved.left.as_millis()).unwrap_or(0)),
            failures: saved.failures,
        };
        let kept: Vec<Kept> = book.save(Instant::now()).into_iter().map(kept).collect();
        let path = self.dir.join(FILE);
        let text = serde_json::to_vec(&kept).map(Zeroizing::new);
        let written = text
            .map_err(anyhow::Error::from)
            .and_then(|text| Ok(tls::replace(&self.dir, &path, &text)?));
        written.map_err(|error| {
            let text = format!("{} cannot be written: {error}", path.display());
            Refusal::new(ErrorCode::Internal, text)
        })
    }

    fn lock(&self) -> MutexGuard<'_, TokenBook> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
