//! A simulation of both ends with a fake clock and a seed: an initiator that uses every way to move data, aborts, resets,
//! breaks digests and is cut off anywhere; an owner that finishes commands late and in any order; and a disk that must hold
//! what was acknowledged, and nothing of what was aborted.
//!
//! A failure names its seed: `SEED=… cargo test -p stillpoint-iscsi --test sim one_seed -- --nocapture`.
//! `STILLPOINT_SOAK_SEEDS` raises the number of seeds: 30,000 are more than 100,000 sessions.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::*;
use stillpoint_iscsi::pdu::{
    Bhs, DataIn, LogoutRequest, NopIn, Opcode, Prefix, R2t, Residual, ScsiCommand, ScsiResponse, Stage,
    TmfReply, TmfRequest,
};
use stillpoint_iscsi::{
    Admission, Cid, CmdSn, Command, Connection, ConnectionConfig, DataSn, Event, Itt, LogoutReason, Outcome,
    SharedMemory, StatSn, TaskAttribute, TmfFunction, TmfId, TmfResponse, Tsih, Ttt,
};

/// Regions of the disk. Each belongs to one command at a time.
const REGIONS: usize = 12;
const REGION_LEN: usize = 24 << 10;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() >> 11).unwrap() % n
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// What a region holds, as far as the initiator can know.
#[derive(Clone)]
enum Content {
    Known(Vec<u8>),
    /// A write was aborted or cut off: this or that.
    Either(Vec<u8>, Vec<u8>),
}

/// The owner: commands that it runs, and the disk.
struct Owner {
    disk: Vec<Vec<u8>>,
    running: Vec<Command>,
    tmfs: Vec<TmfId>,
    writes_done: u64,
}

impl Owner {
    fn run(&mut self, command: &Command) -> Outcome {
        let region = usize::from(command.cdb[1]);
        let len = command.edtl as usize;
        if command.cdb[0] == 0x8a {
            assert_eq!(command.data.len(), len, "all data is there");
            self.disk[region][..len].copy_from_slice(&command.data);
            self.writes_done += 1;
            return Outcome {
                transfer_len: len as u64,
                ..Outcome::default()
            };
        }
        let data = Bytes::copy_from_slice(&self.disk[region][..len.min(REGION_LEN)]);
        Outcome {
            transfer_len: data.len() as u64,
            data,
            ..Outcome::default()
        }
    }
}

/// A command as the initiator knows it.
struct Op {
    region: usize,
    cmd_sn: CmdSn,
    write: Option<Vec<u8>>,
    len: usize,
    got: Vec<u8>,
    next_data_sn: u32,
    corrupted: bool,
    aborting: bool,
}

struct Keys {
    header_digest: bool,
    data_digest: bool,
    initial_r2t: bool,
    immediate: bool,
    first_burst: usize,
    max_burst: usize,
    target_max: usize,
    initiator_max: usize,
}

struct World {
    rng: Rng,
    now: Instant,
    conn: Connection,
    owner: Owner,
    contents: Vec<Content>,
    keys: Keys,
    to_target: Vec<u8>,
    /// Bytes of `to_target` that the target has.
    delivered: usize,
    ops: BTreeMap<u32, Op>,
    tmfs: BTreeMap<u32, Vec<u32>>,
    next_itt: u32,
    cmd_sn: CmdSn,
    max_cmd_sn: CmdSn,
    acknowledged: u64,
    reads_checked: u64,
    logged_out: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            rng.next();
        }
        let disk = vec![vec![0; REGION_LEN]; REGIONS];
        let now = Instant::now();
        let (conn, keys) = Self::connect(&mut rng, now);
        let mut world = Self {
            rng,
            now,
            conn,
            owner: Owner {
                disk,
                running: Vec::new(),
                tmfs: Vec::new(),
                writes_done: 0,
            },
            contents: vec![Content::Known(vec![0; REGION_LEN]); REGIONS],
            keys,
            to_target: Vec::new(),
            delivered: 0,
            ops: BTreeMap::new(),
            tmfs: BTreeMap::new(),
            next_itt: 0,
            cmd_sn: CmdSn(0),
            max_cmd_sn: CmdSn(0),
            acknowledged: 0,
            reads_checked: 0,
            logged_out: false,
        };
        world.log_in();
        world
    }

    fn connect(rng: &mut Rng, now: Instant) -> (Connection, Keys) {
        let (peer, local) = addresses();
        let mut config = ConnectionConfig::new(peer, local, 1, [u8::try_from(rng.below(256)).unwrap(); 32]);
        config.keys.initial_r2t = rng.chance(50);
        config.keys.immediate_data = rng.chance(80);
        config.keys.max_recv_data_segment_length = rng.pick(&[512, 4096, 262_144]);
        config.keys.first_burst_length = rng.pick(&[512, 8192, 65536]);
        config.keys.max_burst_length = rng.pick(&[512, 5000, 65536, 1 << 20]);
        config.limits.queue_depth = u32::try_from(rng.pick(&[1, 2, 8, 128])).unwrap();
        config.limits.write_buffer_bytes = rng.pick(&[1, 20_000, 1 << 20]);
        config.limits.read_buffer_bytes = rng.pick(&[1, 50_000, 1 << 20]);
        if rng.chance(50) {
            config.memory = Some(SharedMemory::new(rng.pick(&[1, 40_000, 1 << 20]), || {}));
        }
        let keys = Keys {
            header_digest: false,
            data_digest: false,
            initial_r2t: true,
            immediate: true,
            first_burst: 0,
            max_burst: 0,
            target_max: 0,
            initiator_max: 0,
        };
        (Connection::new(now, config, Arc::new(Targets::default())), keys)
    }

    fn log_in(&mut self) {
        self.cmd_sn = CmdSn(u32::try_from(self.rng.next() >> 32).unwrap());
        let digest = |on: bool| if on { "CRC32C" } else { "None" };
        let (header, data) = (self.rng.chance(50), self.rng.chance(50));
        let initiator_max = self.rng.pick(&[512, 1000, 8192, 262_144]);
        let yes_no = |yes: bool| if yes { "Yes" } else { "No" };
        let keys = [
            format!("InitiatorName={INITIATOR}"),
            format!("TargetName={TARGET}"),
            format!("HeaderDigest={}", digest(header)),
            format!("DataDigest={}", digest(data)),
            format!("InitialR2T={}", yes_no(self.rng.chance(30))),
            format!("ImmediateData={}", yes_no(self.rng.chance(80))),
            format!("MaxRecvDataSegmentLength={initiator_max}"),
            format!("MaxBurstLength={}", self.rng.pick(&[512, 10_000, 262_144])),
            format!("FirstBurstLength={}", self.rng.pick(&[512, 4096, 65536])),
            format!("MaxOutstandingR2T={}", self.rng.pick(&[1, 2, 16])),
        ];
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let request = login_request(self.cmd_sn, Stage::OPERATIONAL, Some(Stage::FULL_FEATURE)).encode();
        self.to_target
            .extend(wire(&request, &[], &text(&keys), false, false));
        while self.delivered < self.to_target.len() {
            self.deliver();
        }
        assert!(matches!(self.conn.poll_event(), Some(Event::Admission { .. })));
        self.conn.admit(self.now, Admission::Accept { tsih: Tsih(1) });
        assert!(matches!(self.conn.poll_event(), Some(Event::LoggedIn)));
        let params = self.conn.info().params.unwrap();
        self.keys = Keys {
            header_digest: header,
            data_digest: data,
            initial_r2t: params.initial_r2t,
            immediate: params.immediate_data,
            first_burst: params.first_burst_length as usize,
            max_burst: params.max_burst_length as usize,
            target_max: params.target_max_recv as usize,
            initiator_max,
        };
        let frame = self.conn.poll_transmit().unwrap();
        let bytes = frame.chunks().concat();
        self.max_cmd_sn = CmdSn(u32::from_be_bytes(bytes[32..36].try_into().unwrap()));
    }

    fn put(&mut self, bhs: &Bhs, data: &[u8]) {
        self.to_target.extend(wire(
            bhs,
            &[],
            data,
            self.keys.header_digest,
            self.keys.data_digest,
        ));
    }

    /// Some bytes reach the target.
    fn deliver(&mut self) {
        let space = self.conn.space();
        let waiting = &self.to_target[self.delivered..];
        let most = space.len().min(waiting.len());
        let n = if self.rng.chance(50) {
            most
        } else {
            self.rng.below(most) + 1
        };
        space[..n].copy_from_slice(&waiting[..n]);
        self.delivered += n;
        if self.delivered == self.to_target.len() {
            self.to_target.clear();
            self.delivered = 0;
        }
        self.conn.advance(self.now, n).unwrap();
    }

    fn step(&mut self) {
        self.now += Duration::from_micros(self.rng.next() % 1000);
        match self.rng.below(10) {
            0..=1 => self.issue(),
            2..=4 if self.delivered < self.to_target.len() && !self.conn.receiving_paused() => self.deliver(),
            5..=6 => self.transmit(),
            7..=8 => self.serve(),
            9 => self.disturb(),
            _ => self.let_time_pass(),
        }
    }

    /// A command that finds no memory is tried again after a while; a function waits for data that may never come.
    fn let_time_pass(&mut self) {
        let waits = self.conn.waits_for_memory() || !self.tmfs.is_empty();
        if waits && self.rng.chance(40) {
            self.now += Duration::from_secs(1);
            self.conn.handle_timeout(self.now).unwrap();
        }
    }

    fn new_itt(&mut self) -> u32 {
        self.next_itt += 1;
        self.next_itt
    }

    /// A new command on a region that no other command uses.
    fn issue(&mut self) {
        if self.logged_out || self.max_cmd_sn.precedes(self.cmd_sn) {
            return;
        }
        let region = self.rng.below(REGIONS);
        if self.ops.values().any(|op| op.region == region) {
            return;
        }
        let itt = self.new_itt();
        let len = if self.rng.chance(20) {
            self.rng.below(16)
        } else {
            self.rng.below(REGION_LEN)
        } + 1;
        let data = self.rng.chance(50).then(|| pattern(self.rng.next(), len));
        let cmd_sn = self.cmd_sn;
        self.cmd_sn = cmd_sn.next();
        let mut command = ScsiCommand {
            cmd_sn,
            ..if data.is_some() {
                write(itt, 0)
            } else {
                read(itt, 0)
            }
        };
        command.edtl = u32::try_from(len).unwrap();
        command.cdb[0] = if data.is_some() { 0x8a } else { 0x88 };
        command.cdb[1] = u8::try_from(region).unwrap();
        command.attribute = self.rng.pick(&[
            TaskAttribute::SIMPLE,
            TaskAttribute::SIMPLE,
            TaskAttribute::ORDERED,
            TaskAttribute::HEAD_OF_QUEUE,
        ]);
        let mut op = Op {
            region,
            cmd_sn,
            write: data.clone(),
            len,
            got: Vec::new(),
            next_data_sn: 0,
            corrupted: false,
            aborting: false,
        };
        match data {
            None => self.put(&command.encode(), &[]),
            Some(data) => self.issue_write(command, &mut op, &data),
        }
        self.ops.insert(itt, op);
    }

    /// Immediate data, unsolicited data, both or neither.
    fn issue_write(&mut self, command: ScsiCommand, op: &mut Op, data: &[u8]) {
        let first = data.len().min(self.keys.first_burst);
        let most = first.min(self.keys.target_max);
        let immediate = match self.keys.immediate {
            true if self.rng.chance(70) => self.rng.below(most + 1),
            _ => 0,
        };
        let unsolicited = !self.keys.initial_r2t && immediate < first && self.rng.chance(70);
        let command = ScsiCommand {
            is_final: !unsolicited,
            ..command
        };
        self.put(&command.encode(), &data[..immediate]);
        if unsolicited {
            self.data_out(op, command.itt.0, Ttt::RESERVED, immediate, first);
        }
    }

    fn data_out(&mut self, op: &mut Op, itt: u32, ttt: Ttt, mut from: usize, to: usize) {
        let data = op.write.clone().unwrap();
        let mut data_sn = 0;
        while from < to {
            let most = self.keys.target_max.min(to - from);
            let len = if self.rng.chance(60) {
                most
            } else {
                self.rng.below(most) + 1
            };
            let header = data_out(itt, ttt, data_sn, u32::try_from(from).unwrap(), from + len == to).encode();
            let mut bytes = wire(
                &header,
                &[],
                &data[from..from + len],
                self.keys.header_digest,
                self.keys.data_digest,
            );
            if self.keys.data_digest && self.rng.chance(1) {
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
                op.corrupted = true;
            }
            self.to_target.extend(bytes);
            data_sn += 1;
            from += len;
        }
    }

    /// A frame or more leaves the target.
    fn transmit(&mut self) {
        for _ in 0..=self.rng.below(4) {
            let Some(frame) = self.conn.poll_transmit() else {
                return;
            };
            self.receive(&frame.chunks().concat());
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let bhs: Bhs = bytes[..48].try_into().unwrap();
        let header_len = if self.keys.header_digest { 52 } else { 48 };
        let len = Prefix::parse(&bhs).data_len as usize;
        assert!(len <= self.keys.initiator_max, "our limit holds");
        let data = &bytes[header_len..header_len + len];
        let max = CmdSn(u32::from_be_bytes(bhs[32..36].try_into().unwrap()));
        if self.max_cmd_sn.precedes(max) {
            self.max_cmd_sn = max;
        }
        match Prefix::parse(&bhs).opcode {
            Opcode::R2T => self.on_r2t(R2t::parse(&bhs)),
            Opcode::DATA_IN => self.on_data_in(DataIn::parse(&bhs), data),
            Opcode::SCSI_RESPONSE => {
                let response = ScsiResponse::parse(&bhs);
                self.on_status(response.itt.0, response.status, response.residual, data);
            }
            Opcode::TMF_RESPONSE => self.on_tmf_response(TmfReply::parse(&bhs)),
            Opcode::NOP_IN => {
                let nop = NopIn::parse(&bhs);
                if nop.itt == Itt::RESERVED && nop.ttt != Ttt::RESERVED {
                    let answer = nop_out(u32::MAX, nop.ttt, true, self.cmd_sn).encode();
                    self.put(&answer, &[]);
                }
            }
            Opcode::REJECT => {
                let rejected = ScsiCommand::parse(data[..48].try_into().unwrap());
                assert!(
                    self.ops.get(&rejected.itt.0).is_none_or(|op| op.corrupted),
                    "rejected: {rejected:?}"
                );
            }
            Opcode::LOGOUT_RESPONSE => {}
            other => panic!("{other:?}"),
        }
    }

    fn on_r2t(&mut self, ask: R2t) {
        let itt = ask.itt.0;
        // After an abort the initiator still answers, or not, as it likes.
        let Some(mut op) = self.ops.remove(&itt) else {
            return;
        };
        let (from, to) = (
            ask.buffer_offset as usize,
            (ask.buffer_offset + ask.desired_len) as usize,
        );
        assert!(ask.desired_len as usize <= self.keys.max_burst && to <= op.len && ask.desired_len > 0);
        if !op.aborting || self.rng.chance(50) {
            self.data_out(&mut op, itt, ask.ttt, from, to);
        }
        self.ops.insert(itt, op);
    }

    fn on_data_in(&mut self, header: DataIn, data: &[u8]) {
        let op = self
            .ops
            .get_mut(&header.itt.0)
            .expect("data of a command that exists");
        assert_eq!(header.data_sn, DataSn(op.next_data_sn));
        assert_eq!(header.buffer_offset as usize, op.got.len());
        op.next_data_sn += 1;
        op.got.extend_from_slice(data);
        assert!(op.got.len() <= op.len);
        if let Some((status, residual)) = header.status {
            self.on_status(header.itt.0, status, residual, &[]);
        }
    }

    fn on_status(&mut self, itt: u32, status: u8, residual: Residual, sense: &[u8]) {
        let op = self
            .ops
            .remove(&itt)
            .expect("status of a command that exists, once");
        if status == CHECK_CONDITION {
            assert!(op.corrupted, "only a broken digest fails a command");
            assert_eq!((sense[4], sense[14], sense[15]), (0x0b, 0x47, 0x05));
            return;
        }
        assert_eq!((status, residual), (GOOD, Residual::Exact));
        assert!(!op.corrupted, "a write with a broken digest was acknowledged");
        match op.write {
            Some(data) => {
                self.acknowledged += 1;
                self.contents[op.region] = Content::Known(merge(self.disk_image(op.region), &data));
            }
            None => self.check_read(&op),
        }
    }

    /// A whole image of the region: what the initiator knows, or what is there where it cannot know.
    fn disk_image(&self, region: usize) -> Vec<u8> {
        match &self.contents[region] {
            Content::Known(image) => image.clone(),
            Content::Either(..) => self.owner.disk[region].clone(),
        }
    }

    fn check_read(&mut self, op: &Op) {
        assert_eq!(op.got.len(), op.len);
        self.reads_checked += 1;
        let fits = |image: &[u8]| image[..op.len] == op.got;
        match &self.contents[op.region] {
            Content::Known(image) => assert!(fits(image), "read what was never written"),
            Content::Either(one, other) => assert!(fits(one) || fits(other), "neither the old nor the new"),
        }
    }

    /// A write ended without a status: its region holds the old or the new, and the disk says which.
    fn lost(&mut self, op: &Op) {
        let Some(data) = &op.write else { return };
        let old = self.disk_image_before(op.region);
        let new = merge(old.clone(), data);
        self.contents[op.region] = Content::Either(old, new);
    }

    fn disk_image_before(&self, region: usize) -> Vec<u8> {
        match &self.contents[region] {
            Content::Known(image) => image.clone(),
            Content::Either(one, other) => {
                let now = &self.owner.disk[region];
                if now == other { other.clone() } else { one.clone() }
            }
        }
    }

    /// From now on nothing may change the region: settle what it holds.
    fn settle(&mut self, region: usize) {
        if let Content::Either(one, other) = &self.contents[region] {
            let now = self.owner.disk[region].clone();
            assert!(now == *one || now == *other, "half a write");
            self.contents[region] = Content::Known(now);
        }
    }

    /// The owner takes commands and finishes some.
    fn serve(&mut self) {
        while let Some(event) = self.conn.poll_event() {
            match event {
                Event::Command(command) => self.owner.running.push(command),
                Event::TaskManagement { tmf, affected, .. } => {
                    // Affected tasks may still be finished by the disk, or not.
                    for task in affected {
                        let at = self.owner.running.iter().position(|command| command.task == task);
                        if let Some(at) = at
                            && self.rng.chance(50)
                        {
                            let command = self.owner.running.swap_remove(at);
                            self.conn.complete(self.now, command.task, Outcome::default());
                        }
                    }
                    self.owner.tmfs.push(tmf);
                }
                Event::LoggedOut { .. } => self.logged_out = true,
                Event::Pong => {}
                other => panic!("{other:?}"),
            }
        }
        for _ in 0..self.rng.below(3) {
            if !self.owner.running.is_empty() {
                let at = self.rng.below(self.owner.running.len());
                let command = self.owner.running.swap_remove(at);
                let outcome = self.owner.run(&command);
                self.conn.complete(self.now, command.task, outcome);
            }
        }
        if self.rng.chance(50)
            && let Some(tmf) = self.owner.tmfs.pop()
        {
            self.conn.tmf_complete(self.now, tmf, TmfResponse::COMPLETE);
        }
    }

    fn disturb(&mut self) {
        match self.rng.below(8) {
            0 | 1 => self.abort_one(),
            2 => self.reset(),
            3 => {
                let itt = self.new_itt();
                let nop = nop_out(itt, Ttt::RESERVED, true, self.cmd_sn).encode();
                let data = pattern(1, self.rng.below(200));
                self.put(&nop, &data);
            }
            4 => self.conn.ping(self.now),
            5 if self.rng.chance(20) => self.log_out(),
            _ => {}
        }
    }

    fn tmf(&mut self, function: TmfFunction, referenced: u32, ref_cmd_sn: CmdSn, affected: Vec<u32>) {
        if self.logged_out || self.tmfs.len() > 8 {
            return;
        }
        for itt in &affected {
            self.ops.get_mut(itt).unwrap().aborting = true;
        }
        let itt = self.new_itt();
        let request = TmfRequest {
            immediate: true,
            function,
            lun: lun(0),
            itt: Itt(itt),
            referenced_itt: Itt(referenced),
            cmd_sn: self.cmd_sn,
            exp_stat_sn: StatSn(0),
            ref_cmd_sn,
            exp_data_sn: DataSn(0),
        };
        self.put(&request.encode(), &[]);
        self.tmfs.insert(itt, affected);
    }

    fn abort_one(&mut self) {
        let open: Vec<u32> = self
            .ops
            .iter()
            .filter(|(_, op)| !op.aborting)
            .map(|(itt, _)| *itt)
            .collect();
        if !open.is_empty() {
            let itt = self.rng.pick(&open);
            let cmd_sn = self.ops[&itt].cmd_sn;
            self.tmf(TmfFunction::ABORT_TASK, itt, cmd_sn, vec![itt]);
        }
    }

    fn reset(&mut self) {
        let open: Vec<u32> = self
            .ops
            .iter()
            .filter(|(_, op)| !op.aborting)
            .map(|(itt, _)| *itt)
            .collect();
        let function = self.rng.pick(&[
            TmfFunction::LOGICAL_UNIT_RESET,
            TmfFunction::ABORT_TASK_SET,
            TmfFunction::TARGET_WARM_RESET,
        ]);
        self.tmf(function, u32::MAX, CmdSn(0), open);
    }

    /// After the response no status of an affected task comes, and the disk does not change any more for it.
    fn on_tmf_response(&mut self, reply: TmfReply) {
        assert!([TmfResponse::COMPLETE, TmfResponse::TASK_DOES_NOT_EXIST].contains(&reply.response));
        for itt in self.tmfs.remove(&reply.itt.0).unwrap() {
            // Those that are still here got no status: they end with the response.
            if let Some(op) = self.ops.remove(&itt) {
                assert_eq!(reply.response, TmfResponse::COMPLETE);
                self.lost(&op);
                self.settle(op.region);
                let still = self.owner.running.iter().any(|command| command.itt.0 == itt);
                assert!(!still, "an aborted task runs on after the response");
            }
        }
    }

    fn log_out(&mut self) {
        if self.logged_out {
            return;
        }
        let itt = self.new_itt();
        let request = LogoutRequest {
            immediate: true,
            reason: LogoutReason::CLOSE_SESSION,
            itt: Itt(itt),
            cid: Cid(1),
            cmd_sn: self.cmd_sn,
            exp_stat_sn: StatSn(0),
        };
        self.put(&request.encode(), &[]);
        self.logged_out = true;
    }

    /// The connection is gone; what the owner runs may or may not happen before the next session begins.
    fn cut(&mut self) {
        self.conn.close();
        while let Some(command) = self.owner.running.pop() {
            let outcome = if self.rng.chance(50) {
                self.owner.run(&command)
            } else {
                Outcome::default()
            };
            self.conn.complete(self.now, command.task, outcome);
        }
        self.owner.tmfs.clear();
        let ops = std::mem::take(&mut self.ops);
        for op in ops.values() {
            self.lost(op);
            self.settle(op.region);
        }
        self.tmfs.clear();
        self.to_target.clear();
        self.delivered = 0;
        self.logged_out = false;
        let (conn, keys) = Self::connect(&mut self.rng, self.now);
        self.conn = conn;
        self.keys = keys;
        self.log_in();
    }

    /// Everything comes to rest: nothing hangs, whatever the limits are.
    fn drain(&mut self) {
        for _ in 0..200_000 {
            if self.ops.is_empty() && self.tmfs.is_empty() {
                break;
            }
            match self.rng.below(4) {
                0 if self.delivered < self.to_target.len() && !self.conn.receiving_paused() => self.deliver(),
                1 => self.transmit(),
                2 => self.let_time_pass(),
                _ => self.serve(),
            }
            if self.conn.is_closed() {
                return;
            }
        }
        assert!(
            self.ops.is_empty() && self.tmfs.is_empty(),
            "{} commands hang",
            self.ops.len()
        );
        assert_eq!(self.conn.outstanding(), 0);
        for (region, content) in self.contents.iter().enumerate() {
            let Content::Known(image) = content else {
                panic!("settled")
            };
            assert!(*image == self.owner.disk[region], "region {region}");
        }
    }
}

fn merge(mut image: Vec<u8>, data: &[u8]) -> Vec<u8> {
    image[..data.len()].copy_from_slice(data);
    image
}

struct Report {
    acknowledged: u64,
    reads: u64,
    sessions: u64,
}

fn simulate(seed: u64, steps: usize) -> Report {
    let mut world = World::new(seed);
    let mut sessions = 1;
    for _ in 0..steps {
        world.step();
        if world.rng.below(400) == 0 || world.conn.is_closed() {
            if world.rng.chance(50) {
                world.drain();
            }
            world.cut();
            sessions += 1;
        }
    }
    world.drain();
    Report {
        acknowledged: world.acknowledged,
        reads: world.reads_checked,
        sessions,
    }
}

fn run(seeds: impl Iterator<Item = u64>, steps: usize) -> Report {
    let mut all = Report {
        acknowledged: 0,
        reads: 0,
        sessions: 0,
    };
    for seed in seeds {
        let result = std::panic::catch_unwind(|| simulate(seed, steps));
        let Ok(report) = result else { panic!("SEED={seed}") };
        all.acknowledged += report.acknowledged;
        all.reads += report.reads;
        all.sessions += report.sessions;
    }
    all
}

/// Some 2,000 sessions, in seconds.
const QUICK_SEEDS: u64 = 600;

#[test]
fn many_seeds() {
    let seeds = std::env::var("STILLPOINT_SOAK_SEEDS").map_or(QUICK_SEEDS, |seeds| seeds.parse().unwrap());
    let all = run(1..=seeds, 1200);
    println!(
        "{seeds} seeds: {} sessions, {} writes acknowledged, {} reads checked",
        all.sessions, all.acknowledged, all.reads
    );
    // The simulation does something: it would otherwise pass for nothing.
    assert!(all.sessions > 3 * seeds, "{} sessions", all.sessions);
    assert!(all.acknowledged > 5 * seeds, "{} writes", all.acknowledged);
    assert!(all.reads > 5 * seeds, "{} reads", all.reads);
}

#[test]
fn one_seed() {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(42);
    simulate(seed, 1200);
}
