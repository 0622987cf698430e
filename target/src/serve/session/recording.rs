//! A session's PDUs for `stillpoint trace`.

use super::Task;
use crate::serve::trace::{self, Trace};

impl Task {
    /// Begins to record for somebody, or ends it.
    pub(super) fn trace(&mut self, order: trace::Order) {
        let Some(session) = &self.session else { return };
        if let Some((trace, payload)) = Trace::begin(order, session, self.trace.as_ref()) {
            self.trace = Some(trace);
            self.conn.record(Some(payload));
        }
    }

    /// Hands on what was recorded since the last time.
    pub(super) fn record(&mut self) {
        let Some(trace) = &mut self.trace else { return };
        while let Some(pdu) = self.conn.poll_recorded() {
            if !trace.record(&pdu) {
                self.trace = None;
                self.conn.record(None);
                return;
            }
        }
    }
}
