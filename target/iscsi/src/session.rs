//! Bounds of a session: the command window, and the bytes that one initiator can make us hold.

use crate::types::CmdSn;

/// What the number of a command means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is the next one.
    Next,
    /// It is within the window, but others are missing before it.
    Ahead,
    /// A duplicate, or outside the window: "MUST silently ignore" (RFC 7143 §4.2.2.1).
    Outside,
}

/// ExpCmdSN and MaxCmdSN (RFC 7143 §4.2.2.1). Every number that was taken is released once, when its command is over;
/// that, and nothing else, moves MaxCmdSN.
#[derive(Debug)]
pub(crate) struct CommandWindow {
    exp: CmdSn,
    max: CmdSn,
    ahead: Vec<CmdSn>,
}

impl CommandWindow {
    pub(crate) fn new(first: CmdSn, depth: u32) -> Self {
        assert!(depth > 0 && depth < 1 << 16, "a window has room");
        Self {
            exp: first,
            max: first.plus(depth - 1),
            ahead: Vec::new(),
        }
    }

    pub(crate) fn exp_cmd_sn(&self) -> CmdSn {
        self.exp
    }

    pub(crate) fn max_cmd_sn(&self) -> CmdSn {
        self.max
    }

    /// Whether commands are missing before one that is here.
    pub(crate) fn has_holes(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Whether every command before this one is here too.
    pub(crate) fn is_due(&self, sn: CmdSn) -> bool {
        sn.precedes(self.exp)
    }

    /// Whether a command may still come with this number.
    pub(crate) fn is_open(&self, sn: CmdSn) -> bool {
        !sn.precedes(self.exp) && !self.max.precedes(sn) && !self.ahead.contains(&sn)
    }

    /// A non-immediate command with this number came.
    pub(crate) fn take(&mut self, sn: CmdSn) -> Place {
        if !self.is_open(sn) {
            return Place::Outside;
        }
        if sn != self.exp {
            self.ahead.push(sn);
            return Place::Ahead;
        }
        self.exp = self.exp.next();
        while let Some(at) = self.ahead.iter().position(|ahead| *ahead == self.exp) {
            self.ahead.swap_remove(at);
            self.exp = self.exp.next();
        }
        Place::Next
    }

    /// A taken number is over: there is room for one more.
    pub(crate) fn release(&mut self) {
        self.max = self.max.next();
    }
}

/// Bytes of write data that are promised to the initiator or held.
#[derive(Debug)]
pub(crate) struct WriteBudget {
    cap: usize,
    used: usize,
    /// Of `used`: bytes of commands that the owner runs, which come back without the initiator's doing.
    running: usize,
    /// Sequences of Data-Out PDUs that have not ended: solicited and unsolicited.
    open_sequences: usize,
}

impl WriteBudget {
    pub(crate) fn new(cap: usize) -> Self {
        Self {
            cap,
            used: 0,
            running: 0,
            open_sequences: 0,
        }
    }

    /// Whether an R2T for `len` bytes may be sent now. Above the cap only when nothing else can make progress: no data is
    /// on its way, the owner runs no write, and (`idle`) it could not start any command.
    pub(crate) fn allows(&self, len: usize, idle: bool) -> bool {
        self.used + len <= self.cap || (idle && self.is_quiet())
    }

    pub(crate) fn reserve(&mut self, len: usize) {
        self.used += len;
    }

    pub(crate) fn release(&mut self, len: usize) {
        assert!(len <= self.used, "released more than reserved");
        self.used -= len;
    }

    pub(crate) fn run(&mut self, len: usize) {
        self.running += len;
    }

    pub(crate) fn ran(&mut self, len: usize) {
        assert!(len <= self.running, "more came back than was out");
        self.running -= len;
        self.release(len);
    }

    pub(crate) fn sequences_begin(&mut self, n: usize) {
        self.open_sequences += n;
    }

    pub(crate) fn sequences_end(&mut self, n: usize) {
        assert!(n <= self.open_sequences, "more sequences ended than began");
        self.open_sequences -= n;
    }

    /// No data is on its way, and the owner runs no write.
    pub(crate) fn is_quiet(&self) -> bool {
        self.open_sequences == 0 && self.running == 0
    }

    pub(crate) fn open_sequences(&self) -> usize {
        self.open_sequences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_takes_each_number_once() {
        let mut window = CommandWindow::new(CmdSn(0xffff_fffe), 4);
        assert_eq!(window.max_cmd_sn(), CmdSn(1));
        assert_eq!(window.take(CmdSn(0xffff_fffd)), Place::Outside);
        assert_eq!(window.take(CmdSn(2)), Place::Outside);
        assert_eq!(window.take(CmdSn(0xffff_fffe)), Place::Next);
        assert_eq!(window.take(CmdSn(0xffff_fffe)), Place::Outside);
        assert_eq!(window.take(CmdSn(1)), Place::Ahead);
        assert_eq!(window.take(CmdSn(1)), Place::Outside);
        assert_eq!(window.exp_cmd_sn(), CmdSn(0xffff_ffff));
        assert!(window.has_holes() && !window.is_due(CmdSn(1)));
        assert_eq!(window.take(CmdSn(0)), Place::Ahead);
        assert_eq!(window.take(CmdSn(0xffff_ffff)), Place::Next);
        assert_eq!(window.exp_cmd_sn(), CmdSn(2));
        assert!(!window.has_holes() && window.is_due(CmdSn(1)));
        // Closed: MaxCmdSN = ExpCmdSN - 1 (§4.2.2.1).
        assert_eq!(window.max_cmd_sn(), CmdSn(1));
        assert_eq!(window.take(CmdSn(2)), Place::Outside);
        window.release();
        assert_eq!(window.take(CmdSn(2)), Place::Next);
    }

    #[test]
    fn budget_goes_over_its_cap_only_when_nothing_else_moves() {
        let mut budget = WriteBudget::new(10);
        assert!(
            budget.allows(100, true),
            "one command longer than the cap gets through alone"
        );
        budget.reserve(8);
        budget.sequences_begin(1);
        assert!(budget.allows(2, true) && !budget.allows(3, true));
        budget.sequences_end(1);
        assert!(budget.allows(3, true) && !budget.allows(3, false));
        budget.run(8);
        assert!(!budget.allows(3, true), "the owner will give bytes back");
        budget.ran(8);
        assert!(budget.allows(10, true));
    }
}
