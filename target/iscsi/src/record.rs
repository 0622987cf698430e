//! What passes on a connection, for a recorder: each PDU with its header, and as much of its data as may be shown.
//!
//! Costs one look at an `Option` per PDU while nobody records.

use std::collections::{HashSet, VecDeque};
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};

use crate::frame::{Digests, Frame, padding};
use crate::pdu::{
    BHS_LEN, Bhs, DataIn, DataOut, LoginRequest, Opcode, Prefix, ScsiCommand, ScsiResponse, Stage,
};
use crate::receive::{Received, Sink};
use crate::types::Itt;

/// What a recorder may see of the blocks that pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// Nothing of the LUN's content: what commands about the device carry (INQUIRY, MODE SENSE …) is shown, blocks and ping
    /// data are not.
    Redact,
    /// Everything. CHAP's names, challenges and responses are blanked all the same.
    Keep,
}

/// Which way a PDU went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the initiator.
    In,
    /// To the initiator.
    Out,
}

/// One PDU that passed.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// When it was complete here, or was handed out to be sent.
    pub at: Instant,
    /// Which way.
    pub direction: Direction,
    /// Its bytes from the header on; fewer than `wire_len` where data is not shown.
    pub shown: Bytes,
    /// Bytes that it took on the wire: header, digests, data and padding.
    pub wire_len: usize,
}

/// SCSI commands whose data tells of the device and not of what is stored on it. Copy and token commands are not among them:
/// whoever has a token can read what it stands for.
const ABOUT_THE_DEVICE: [u8; 16] = [
    0x03, // REQUEST SENSE
    0x12, // INQUIRY
    0x15, // MODE SELECT(6)
    0x1a, // MODE SENSE(6)
    0x25, // READ CAPACITY(10)
    0x37, // READ DEFECT DATA(10)
    0x42, // UNMAP
    0x4d, // LOG SENSE
    0x55, // MODE SELECT(10)
    0x5a, // MODE SENSE(10)
    0x5e, // PERSISTENT RESERVE IN
    0x5f, // PERSISTENT RESERVE OUT
    0x9e, // READ CAPACITY(16), GET LBA STATUS
    0xa0, // REPORT LUNS
    0xa3, // MAINTENANCE IN
    0xb7, // READ DEFECT DATA(12)
];

/// Commands about the device that may be open at once and still be recognised: more than any window holds.
const OPEN_MAX: usize = 1 << 16;

/// Login keys that hold nothing worth hiding; the values of all others in the security stage are blanked.
const HARMLESS_KEYS: [&[u8]; 8] = [
    b"InitiatorName",
    b"InitiatorAlias",
    b"TargetName",
    b"TargetAlias",
    b"TargetAddress",
    b"TargetPortalGroupTag",
    b"SessionType",
    b"AuthMethod",
];

/// The recorder of one connection. Its owner takes what [`Self::poll`] yields after every verb.
#[derive(Debug)]
pub(crate) struct Recorder {
    payload: Payload,
    /// Open commands about the device.
    open: HashSet<Itt>,
    /// The initiator's last login text goes on in its next PDU: a value may be cut in two.
    theirs_continues: bool,
    /// Ours does.
    ours_continues: bool,
    queue: VecDeque<Recorded>,
}

impl Recorder {
    pub(crate) fn new(payload: Payload) -> Self {
        Self {
            payload,
            open: HashSet::new(),
            theirs_continues: false,
            ours_continues: false,
            queue: VecDeque::new(),
        }
    }

    pub(crate) fn poll(&mut self) -> Option<Recorded> {
        self.queue.pop_front()
    }

    /// A PDU came.
    pub(crate) fn received(&mut self, now: Instant, received: &Received, digests: Digests) {
        let Received { head, sink, .. } = received;
        let data_len = head.prefix.data_len as usize;
        let data = match sink {
            Sink::Into(buffer) => buffer.newest(data_len),
            Sink::Discard => &[],
        };
        let mut bytes = BytesMut::with_capacity(BHS_LEN + head.ahs.len() + data_len + 12);
        bytes.put_slice(&head.bhs);
        bytes.put_slice(&head.ahs);
        if digests.header {
            let word = crc32c::crc32c(&bytes);
            bytes.put_u32_le(word);
        }
        let tail = tail_len(data_len, digests.data);
        let wire_len = bytes.len() + data_len + tail;
        // What went nowhere is not here to be shown.
        if data.len() == data_len
            && let Some(data) = self.visible(Direction::In, &head.bhs, data)
        {
            let start = bytes.len();
            bytes.put_slice(&data);
            put_tail(&mut bytes, start, digests.data);
        }
        self.push(now, Direction::In, bytes.freeze(), wire_len);
    }

    /// A PDU goes.
    pub(crate) fn sent(&mut self, now: Instant, frame: &Frame) {
        let Some(bhs) = frame.head().first_chunk::<BHS_LEN>() else {
            return;
        };
        let digest = frame.tail().len() > padding(frame.data().len());
        let mut bytes = BytesMut::from(frame.head());
        if let Some(data) = self.visible(Direction::Out, bhs, frame.data()) {
            let start = bytes.len();
            bytes.put_slice(&data);
            put_tail(&mut bytes, start, digest);
        }
        self.push(now, Direction::Out, bytes.freeze(), frame.len());
    }

    fn push(&mut self, at: Instant, direction: Direction, shown: Bytes, wire_len: usize) {
        self.queue.push_back(Recorded {
            at,
            direction,
            shown,
            wire_len,
        });
    }

    /// The data of a PDU as it may be shown, if at all.
    fn visible(&mut self, direction: Direction, bhs: &Bhs, data: &[u8]) -> Option<Bytes> {
        let keep = self.payload == Payload::Keep;
        let show = match Prefix::parse(bhs).opcode {
            Opcode::LOGIN_REQUEST | Opcode::LOGIN_RESPONSE => return self.login_text(direction, bhs, data),
            Opcode::SCSI_COMMAND => self.begins(&ScsiCommand::parse(bhs)) || keep,
            Opcode::DATA_OUT => self.open.contains(&DataOut::parse(bhs).itt) || keep,
            Opcode::DATA_IN => {
                let pdu = DataIn::parse(bhs);
                let about_the_device = self.open.contains(&pdu.itt);
                if pdu.status.is_some() {
                    self.open.remove(&pdu.itt);
                }
                about_the_device || keep
            }
            Opcode::SCSI_RESPONSE => {
                self.open.remove(&ScsiResponse::parse(bhs).itt);
                true
            }
            Opcode::TEXT_REQUEST | Opcode::TEXT_RESPONSE | Opcode::REJECT | Opcode::ASYNC_MESSAGE => true,
            _ => keep,
        };
        show.then(|| Bytes::copy_from_slice(data))
    }

    /// Whether the data of this command, now and later, tells of the device.
    fn begins(&mut self, command: &ScsiCommand) -> bool {
        let [opcode, ..] = command.cdb;
        if !ABOUT_THE_DEVICE.contains(&opcode) {
            // The tag is another command's now, whatever became of the first.
            self.open.remove(&command.itt);
            return false;
        }
        if self.open.len() >= OPEN_MAX {
            // Commands that were aborted never end: forgetting hides data, it shows none.
            self.open.clear();
        }
        self.open.insert(command.itt)
    }

    /// Login text without what CHAP proves itself with. The operational stage has nothing to hide.
    fn login_text(&mut self, direction: Direction, bhs: &Bhs, data: &[u8]) -> Option<Bytes> {
        // Both directions have their flags at the same place.
        let header = LoginRequest::parse(bhs);
        let continues = match direction {
            Direction::In => &mut self.theirs_continues,
            Direction::Out => &mut self.ours_continues,
        };
        let is_continuation = core::mem::replace(continues, header.continues);
        if header.current == Stage::OPERATIONAL {
            return Some(Bytes::copy_from_slice(data));
        }
        // It may begin in the middle of a value.
        (!is_continuation).then(|| blank_values(data))
    }
}

fn tail_len(data_len: usize, digest: bool) -> usize {
    if data_len == 0 {
        return 0;
    }
    padding(data_len) + if digest { 4 } else { 0 }
}

/// Padding and digest after data that begins at `start`.
fn put_tail(bytes: &mut BytesMut, start: usize, digest: bool) {
    let len = bytes.len() - start;
    if len == 0 {
        return;
    }
    bytes.put_bytes(0, padding(len));
    if digest {
        let word = crc32c::crc32c(bytes.get(start..).unwrap_or_default());
        bytes.put_u32_le(word);
    }
}

/// The text with `x` for every character of a value that may be secret.
fn blank_values(text: &[u8]) -> Bytes {
    let mut shown = BytesMut::with_capacity(text.len());
    for pair in text.split_inclusive(|byte| *byte == 0) {
        let key_len = pair.iter().position(|byte| *byte == b'=').unwrap_or(0);
        let (key, value) = pair.split_at(key_len);
        if HARMLESS_KEYS.contains(&key) {
            shown.put_slice(pair);
            continue;
        }
        shown.put_slice(key);
        shown.extend(value.iter().map(|byte| match byte {
            b'=' | 0 => *byte,
            _ => b'x',
        }));
    }
    shown.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_chap_are_blanked() {
        let text = b"AuthMethod=CHAP\0CHAP_A=5\0CHAP_N=user\0CHAP_R=0x12=34\0";
        assert_eq!(
            blank_values(text)[..],
            b"AuthMethod=CHAP\0CHAP_A=x\0CHAP_N=xxxx\0CHAP_R=xxxx=xx\0"[..]
        );
        // A pair that is cut, and one without a value.
        assert_eq!(blank_values(b"CHAP_R=0x1")[..], b"CHAP_R=xxx"[..]);
        assert_eq!(blank_values(b"secret\0")[..], b"xxxxxx\0"[..]);
    }

    #[test]
    fn a_value_cut_in_two_is_not_shown_by_its_second_half() {
        let mut recorder = Recorder::new(Payload::Keep);
        let login = |continues| {
            let mut bhs = [0; BHS_LEN];
            bhs[0] = 0x43;
            bhs[1] = if continues { 0x40 } else { 0 };
            bhs
        };
        let first = recorder.visible(Direction::In, &login(true), b"CHAP_N=me\0CHAP_R=0x");
        assert_eq!(first.as_deref(), Some(&b"CHAP_N=xx\0CHAP_R=xx"[..]));
        assert_eq!(recorder.visible(Direction::In, &login(false), b"1234\0"), None);
        let next = recorder.visible(Direction::In, &login(false), b"SessionType=Normal\0");
        assert_eq!(next.as_deref(), Some(&b"SessionType=Normal\0"[..]));
    }
}
