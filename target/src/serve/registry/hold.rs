//! Logins that are put off for a moment.

use std::sync::Arc;

use crate::serve::Daemon;

/// While it lives, nobody can log in to its targets: what needs a LUN without sessions is not overtaken by an initiator that
/// comes back. Initiators are told to try again.
#[derive(Debug)]
pub(crate) struct LoginHold {
    daemon: Arc<Daemon>,
    targets: Vec<String>,
}

impl LoginHold {
    /// Holds the logins of these targets.
    pub(crate) fn new(daemon: &Arc<Daemon>, targets: impl IntoIterator<Item = String>) -> Self {
        let targets: Vec<_> = targets.into_iter().map(|iqn| iqn.to_lowercase()).collect();
        let mut sessions = daemon.registry.lock_sessions();
        for iqn in &targets {
            *sessions.held.entry(iqn.clone()).or_default() += 1;
        }
        drop(sessions);
        Self {
            daemon: Arc::clone(daemon),
            targets,
        }
    }
}

impl Drop for LoginHold {
    fn drop(&mut self) {
        let mut sessions = self.daemon.registry.lock_sessions();
        for iqn in &self.targets {
            if let Some(holds) = sessions.held.get_mut(iqn) {
                *holds -= 1;
                if *holds == 0 {
                    sessions.held.remove(iqn);
                }
            }
        }
    }
}
