//! The sending half of a connection: what waits to be sent, and the numbers that each PDU carries.
//!
//! Headers get StatSN, ExpCmdSN and MaxCmdSN when they leave, not when they are queued: so they are always the newest.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::frame::{Digests, Frame};
use crate::pdu::{BHS_LEN, Bhs, Numbers};
use crate::session::CommandWindow;
use crate::transfer::{Outbound, SegmentLimits};
use crate::types::StatSn;

/// What a PDU does with StatSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stat {
    /// Takes the next one.
    Advance,
    /// Carries the next one and leaves it (R2T, our NOP-In).
    Peek,
    /// Carries none: reserved (Data-In without status).
    Reserved,
}

/// What the connection wants to know when a PDU leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    None,
    /// A ping: its time runs from here.
    Ping,
    /// A Text or Login Response: the initiator may send the next request.
    Turn,
}

/// A PDU without the numbers.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) bhs: Bhs,
    pub(crate) data: Bytes,
    pub(crate) stat: Stat,
    pub(crate) mark: Mark,
}

impl Control {
    pub(crate) fn new(bhs: Bhs, data: Bytes) -> Self {
        Self {
            bhs,
            data,
            stat: Stat::Advance,
            mark: Mark::None,
        }
    }

    pub(crate) fn peek(bhs: Bhs) -> Self {
        Self {
            bhs,
            data: Bytes::new(),
            stat: Stat::Peek,
            mark: Mark::None,
        }
    }

    pub(crate) fn marked(self, mark: Mark) -> Self {
        Self { mark, ..self }
    }

    fn weight(&self) -> usize {
        BHS_LEN + self.data.len()
    }
}

/// Commands answered in order, and what must not overtake their answers.
#[derive(Debug)]
enum Bulk {
    Answer(Outbound),
    Fenced(Control),
}

/// What left with a frame.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) frame: Frame,
    pub(crate) mark: Mark,
    /// Bytes of read data in it.
    pub(crate) read_bytes: usize,
    /// A command is over; whether it was in the window.
    pub(crate) command_over: Option<bool>,
}

/// Everything that waits to be sent.
#[derive(Debug)]
pub(crate) struct Transmitter {
    stat_sn: StatSn,
    digests: Digests,
    /// Digests to come, and how many urgent PDUs leave before.
    digests_after: Option<(usize, Digests)>,
    urgent: VecDeque<Control>,
    bulk: VecDeque<Bulk>,
    /// Bytes of PDUs other than answers to commands.
    control_bytes: usize,
}

impl Transmitter {
    pub(crate) fn new(stat_sn: StatSn) -> Self {
        Self {
            stat_sn,
            digests: Digests::default(),
            digests_after: None,
            urgent: VecDeque::new(),
            bulk: VecDeque::new(),
            control_bytes: 0,
        }
    }

    /// From the first PDU on that is queued after those that wait now: the response that ends login has no digests.
    pub(crate) fn set_digests_after_queue(&mut self, digests: Digests) {
        self.digests_after = Some((self.urgent.len(), digests));
    }

    pub(crate) fn control_bytes(&self) -> usize {
        self.control_bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.bulk.is_empty()
    }

    /// Goes before answers that wait.
    pub(crate) fn send(&mut self, control: Control) {
        self.control_bytes += control.weight();
        self.urgent.push_back(control);
    }

    /// Goes after every answer that waits (a task management response, a logout response).
    pub(crate) fn send_fenced(&mut self, control: Control) {
        self.control_bytes += control.weight();
        self.bulk.push_back(Bulk::Fenced(control));
    }

    pub(crate) fn answer(&mut self, outbound: Outbound) {
        self.bulk.push_back(Bulk::Answer(outbound));
    }

    /// Drops answers, whole or half sent, and what waits behind them: their session is over. A task management response
    /// must not leave without the answers that it follows.
    pub(crate) fn drop_answers(&mut self) {
        for bulk in self.bulk.drain(..) {
            if let Bulk::Fenced(control) = bulk {
                self.control_bytes -= control.weight();
            }
        }
    }

    /// Drops everything: the peer does not read.
    pub(crate) fn clear(&mut self) {
        self.urgent.clear();
        self.bulk.clear();
        self.control_bytes = 0;
    }

    /// The next frame.
    pub(crate) fn next(&mut self, window: &mut CommandWindow, limits: SegmentLimits) -> Option<Sent> {
        if let Some(control) = self.urgent.pop_front() {
            return Some(self.send_control(control, window));
        }
        if let Some(Bulk::Answer(_)) = self.bulk.front() {
            return self.send_answer(window, limits);
        }
        match self.bulk.pop_front()? {
            Bulk::Fenced(control) => Some(self.send_control(control, window)),
            // It was looked at above.
            Bulk::Answer(_) => None,
        }
    }

    fn send_control(&mut self, control: Control, window: &CommandWindow) -> Sent {
        self.control_bytes -= control.weight();
        Sent {
            mark: control.mark,
            frame: self.frame(control.bhs, control.data, control.stat, window),
            read_bytes: 0,
            command_over: None,
        }
    }

    /// The next piece of the answer whose turn it is.
    fn send_answer(&mut self, window: &mut CommandWindow, limits: SegmentLimits) -> Option<Sent> {
        let Some(Bulk::Answer(answer)) = self.bulk.front_mut() else {
            return None;
        };
        let before = answer.unsent();
        let piece = answer.next_piece(limits);
        let (read_bytes, windowed) = (before - answer.unsent(), answer.windowed);
        let over = piece.is_last();
        // The place in the window is free as soon as the status says so, hence in the same PDU.
        if over && windowed {
            window.release();
        }
        let (bhs, data) = piece.encode();
        let stat = if over { Stat::Advance } else { Stat::Reserved };
        if over {
            self.bulk.pop_front();
        }
        Some(Sent {
            frame: self.frame(bhs, data, stat, window),
            mark: Mark::None,
            read_bytes,
            command_over: over.then_some(windowed),
        })
    }

    fn frame(&mut self, mut bhs: Bhs, data: Bytes, stat: Stat, window: &CommandWindow) -> Frame {
        match &mut self.digests_after {
            Some((0, digests)) => {
                self.digests = *digests;
                self.digests_after = None;
            }
            Some((before, _)) => *before -= 1,
            None => {}
        }
        let numbers = Numbers {
            stat_sn: if stat == Stat::Reserved {
                StatSn(0)
            } else {
                self.stat_sn
            },
            exp_cmd_sn: window.exp_cmd_sn(),
            max_cmd_sn: window.max_cmd_sn(),
        };
        numbers.write(&mut bhs);
        if stat == Stat::Advance {
            self.stat_sn = self.stat_sn.next();
        }
        Frame::new(bhs, data, self.digests)
    }
}
