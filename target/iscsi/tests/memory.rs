//! One memory for many sessions: bounded, fair, and never a reason to hang.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use common::*;
use stillpoint_iscsi::pdu::{NopIn, Opcode, R2t};
use stillpoint_iscsi::{Command, ConnectionConfig, Error, Event, Outcome, SharedMemory, Ttt};

const MIB: usize = 1 << 20;
/// 64 KiB of it belong to each session.
const CAP: usize = 4 * MIB;
const FLOOR: usize = CAP / 64;
const KEYS: [&str; 3] = [
    "MaxRecvDataSegmentLength=262144",
    "FirstBurstLength=65536",
    "MaxBurstLength=262144",
];

fn shared(memory: &Arc<SharedMemory>) -> ConnectionConfig {
    let mut config = config();
    config.memory = Some(Arc::clone(memory));
    config
}

/// One end that writes and reads much, and does what it is asked to as soon as it is read.
struct Client {
    pair: Pair,
    /// Wire bytes that the target has not taken.
    out: VecDeque<(Vec<u8>, Vec<u8>)>,
    running: Vec<Command>,
    done: usize,
    obeys: bool,
}

impl Client {
    fn new(memory: &Arc<SharedMemory>, obeys: bool) -> Self {
        Self {
            pair: Pair::logged_in(shared(memory), &KEYS),
            out: VecDeque::new(),
            running: Vec::new(),
            done: 0,
            obeys,
        }
    }

    fn write(&mut self, itt: u32, len: usize) {
        let mut command = write(itt, len as u32);
        command.cmd_sn = self.pair.next_cmd_sn();
        self.out
            .push_back((command.encode().to_vec(), vec![1; len.min(65536)]));
    }

    fn read(&mut self, itt: u32, len: usize) {
        let mut command = read(itt, len as u32);
        command.cmd_sn = self.pair.next_cmd_sn();
        self.out.push_back((command.encode().to_vec(), Vec::new()));
    }

    /// Everything that can happen without waiting.
    fn turn(&mut self) {
        while !self.pair.conn.receiving_paused()
            && let Some((bhs, data)) = self.out.pop_front()
        {
            self.pair.send(bhs[..].try_into().unwrap(), &data).unwrap();
        }
        while let Some(event) = self.pair.conn.poll_event() {
            let Event::Command(command) = event else {
                panic!("{event:?}")
            };
            self.running.push(command);
        }
        for command in std::mem::take(&mut self.running) {
            let data = if command.read {
                vec![2; command.edtl as usize]
            } else {
                Vec::new()
            };
            let outcome = Outcome {
                data: data.into(),
                transfer_len: command.edtl.into(),
                ..Outcome::default()
            };
            self.pair.complete(&command, outcome);
        }
        while self.obeys
            && let Some(pdu) = self.pair.receive_one()
        {
            match pdu.opcode() {
                Opcode::R2T => {
                    let ask = R2t::parse(&pdu.bhs);
                    let bhs = data_out(ask.itt.0, ask.ttt, 0, ask.buffer_offset, true).encode();
                    // Data that was asked for goes before commands that are not sent yet.
                    self.out
                        .push_front((bhs.to_vec(), vec![1; ask.desired_len as usize]));
                }
                Opcode::SCSI_RESPONSE => self.done += 1,
                Opcode::DATA_IN => self.done += usize::from(pdu.bhs[1] & 1),
                Opcode::NOP_IN => {
                    // Behind everything else that waits to be read.
                    let ping = NopIn::parse(&pdu.bhs);
                    let pong = nop_out(u32::MAX, ping.ttt, true, self.pair.cmd_sn).encode();
                    self.out.push_back((pong.to_vec(), Vec::new()));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn many_greedy_sessions_all_get_through() {
    let woken = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&woken);
    let memory = SharedMemory::new(CAP, move || flag.store(true, SeqCst));
    let mut clients: Vec<_> = (0..12).map(|_| Client::new(&memory, true)).collect();
    // 12 MiB unasked for at once, in commands that want 240 MiB: without a bound it would all be held.
    for client in &mut clients {
        (1..=16).for_each(|itt| client.write(itt, MIB));
        (17..=20).for_each(|itt| client.read(itt, MIB));
    }
    let (mut most, mut waits) = (0, 0);
    while clients.iter().any(|client| client.done < 20) {
        let before: usize = clients.iter().map(|client| client.done).sum();
        for client in &mut clients {
            client.turn();
            most = most.max(memory.used());
        }
        let after: usize = clients.iter().map(|client| client.done).sum();
        let moved = after != before || woken.swap(false, SeqCst);
        for client in &mut clients {
            if moved {
                client.pair.conn.memory_freed(client.pair.now);
            } else {
                client.pair.sleep(Duration::from_secs(1)).unwrap();
            }
        }
        waits += usize::from(!moved);
        assert!(
            waits < 1000,
            "somebody hangs: {:?}",
            clients.iter().map(|c| c.done).collect::<Vec<_>>()
        );
    }
    assert_eq!(memory.used(), 0, "all of it came back");
    // What is promised stays below the cap, overdrafts are rare; what comes unasked is stopped where a session has its floor.
    // One session has the turn: it may hold one command more, and what it sends behind that.
    let (unasked, turn) = (12 * (FLOOR + 65536), MIB + 16 * 65536);
    assert!(most <= CAP + CAP / 2 + unasked + turn, "{most} bytes");
    assert!(most > CAP, "the test puts the memory under pressure: {most}");
}

#[test]
fn a_small_client_does_not_wait_for_those_who_sit_on_their_data() {
    let memory = SharedMemory::new(CAP, || {});
    let mut hogs: Vec<_> = (0..8).map(|_| Client::new(&memory, false)).collect();
    for hog in &mut hogs {
        (1..=16).for_each(|itt| hog.write(itt, MIB));
        (17..=20).for_each(|itt| hog.read(itt, MIB));
        hog.turn();
    }
    assert!(memory.used() >= CAP / 2);
    assert!(hogs.iter().any(|hog| hog.pair.conn.waits_for_memory()));
    let mut small = Client::new(&memory, true);
    for itt in 1..=50 {
        small.write(itt, 16 << 10);
        small.read(100 + itt, 64 << 10);
        for _ in 0..4 {
            small.turn();
        }
        assert_eq!(small.done, 2 * itt as usize, "without any time passing");
    }
    let used = memory.used();
    hogs.clear();
    assert!(
        used > 0 && memory.used() == 0,
        "a session that ends gives everything back"
    );
}

#[test]
fn a_session_that_is_not_read_for_want_of_memory_is_not_called_silent() {
    let memory = SharedMemory::new(1, || {});
    let mut pair = Pair::logged_in(shared(&memory), &KEYS);
    // It takes part in NOP: from now on it must answer pings.
    pair.send(&nop_out(7, Ttt::RESERVED, true, pair.cmd_sn).encode(), &[])
        .unwrap();
    pair.only();
    pair.scsi(write(1, 4096), &[1; 4096]);
    let command = pair.command();
    assert!(pair.conn.receiving_paused() && pair.conn.waits_for_memory());
    for _ in 0..100 {
        // It reads our ping; its answer waits in the socket.
        pair.sleep(Duration::from_secs(1)).unwrap();
        pair.receive();
    }
    pair.good(&command);
    pair.only();
    assert!(!pair.conn.receiving_paused() && !pair.conn.waits_for_memory());
    pair.sleep(Duration::from_secs(14)).unwrap();
    let over = pair.sleep(Duration::from_secs(2)).and_then(|()| {
        pair.receive();
        pair.sleep(Duration::from_secs(16))
    });
    assert_eq!(over, Err(Error::PingTimeout), "now it could have answered");
}
