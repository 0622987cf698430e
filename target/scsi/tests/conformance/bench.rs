//! A unit, a disk in memory that carries out its operations, and short ways to send commands.

use std::collections::BTreeSet;

use bytes::Bytes;
use stillpoint_scsi::{
    BlockError, BlockOp, BlockResult, BlockSize, Compare, Context, CopyEnd, CopyError, CopyOutcome,
    CopyRequest, CopySegment, CopyUnit, CopyWork, LbaExtent, Limits, NexusId, NexusName, Plan, Reply,
    ReservationChange, RodToken, TargetPort, ThinFigures, Unit, UnitSpec,
};

pub(crate) const GRAIN: u64 = 4096;
pub(crate) const GOOD: u8 = 0x00;
pub(crate) const CHECK: u8 = 0x02;
pub(crate) const CONDITION_MET: u8 = 0x04;
pub(crate) const CONFLICT: u8 = 0x18;

pub(crate) const INVALID_FIELD: Option<(u8, u16)> = Some((5, 0x2400));
pub(crate) const LBA_RANGE: Option<(u8, u16)> = Some((5, 0x2100));
pub(crate) const WRONG_DATA: Option<(u8, u16)> = Some((5, 0x0e03));
pub(crate) const PROTECTED: Option<(u8, u16)> = Some((7, 0x2700));

/// The disk: bytes, and which grains are mapped.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) bytes: Vec<u8>,
    pub(crate) mapped: BTreeSet<u64>,
    pub(crate) flushes: usize,
    /// The range of the last PRE-FETCH.
    pub(crate) prefetched: (u64, u64),
    pub(crate) fua_writes: usize,
    pub(crate) saved_write_cache: Option<bool>,
    pub(crate) saved_reservations: Vec<(u64, Bytes)>,
    pub(crate) aborted: Vec<NexusId>,
    /// Fails every operation with this.
    pub(crate) failure: Option<BlockError>,
}

impl Disk {
    fn at(&mut self, offset: u64, len: u64) -> &mut [u8] {
        assert!(len > 0, "an empty operation");
        let end = offset.checked_add(len).expect("the range does not overflow");
        assert!(
            end <= self.bytes.len() as u64,
            "{offset}+{len} is beyond the capacity"
        );
        &mut self.bytes[offset as usize..end as usize]
    }

    fn write(&mut self, offset: u64, data: &[u8], fua: bool) {
        self.fua_writes += usize::from(fua);
        self.at(offset, data.len() as u64).copy_from_slice(data);
        self.mapped
            .extend(offset / GRAIN..(offset + data.len() as u64).div_ceil(GRAIN));
    }

    fn zero(&mut self, offset: u64, len: u64, unmap: bool) {
        self.at(offset, len).fill(0);
        for grain in offset.div_ceil(GRAIN)..(offset + len) / GRAIN {
            if unmap {
                self.mapped.remove(&grain)
            } else {
                self.mapped.insert(grain)
            };
        }
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Vec<LbaExtent> {
        let mut extents: Vec<LbaExtent> = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let end = ((at / GRAIN + 1) * GRAIN).min(offset + len);
            let mapped = self.mapped.contains(&(at / GRAIN));
            let full = extents.len() == max;
            match extents.last_mut() {
                Some(last) if last.mapped == mapped => last.len += end - at,
                _ if full => break,
                _ => extents.push(LbaExtent {
                    offset: at,
                    len: end - at,
                    mapped,
                }),
            }
            at = end;
        }
        extents
    }

    fn differs(&mut self, offset: u64, data: &[u8]) -> Option<u64> {
        let medium = self.at(offset, data.len() as u64);
        medium
            .iter()
            .zip(data)
            .position(|(a, b)| a != b)
            .map(|at| at as u64)
    }

    fn compared(difference: Option<u64>) -> BlockResult {
        difference.map_or(BlockResult::Done, |offset| {
            BlockResult::Failed(BlockError::Miscompare { offset })
        })
    }

    pub(crate) fn run(&mut self, op: &BlockOp, data_out: &[u8], block: usize) -> BlockResult {
        if let Some(error) = self.failure {
            return BlockResult::Failed(error);
        }
        match op {
            BlockOp::Read { offset, len, .. } => {
                return BlockResult::Data(Bytes::copy_from_slice(self.at(*offset, u64::from(*len))));
            }
            BlockOp::Write { offset, len, fua } => self.write(*offset, &data_out[..*len as usize], *fua),
            BlockOp::WriteAndVerify { offset, len, .. } => {
                self.write(*offset, &data_out[..*len as usize], true);
            }
            BlockOp::Verify { offset, len, compare } => {
                let data = match compare {
                    Compare::None => return BlockResult::Done,
                    Compare::Data => data_out[..*len as usize].to_vec(),
                    Compare::OneBlock => data_out[..block].repeat(*len as usize / block),
                };
                return Self::compared(self.differs(*offset, &data));
            }
            BlockOp::WriteZeroes {
                offset, len, unmap, ..
            } => self.zero(*offset, *len, *unmap),
            BlockOp::WriteSame { offset, len, fua } => {
                let data = data_out[..block].repeat(*len as usize / block);
                self.write(*offset, &data, *fua);
            }
            BlockOp::Unmap { ranges } => ranges
                .iter()
                .for_each(|(offset, len)| self.zero(*offset, *len, true)),
            BlockOp::CompareAndWrite { offset, len, fua } => {
                let (compare, new) = data_out.split_at(*len as usize);
                let difference = self.differs(*offset, compare);
                if difference.is_none() {
                    self.write(*offset, new, *fua);
                }
                return Self::compared(difference);
            }
            BlockOp::OrWrite { offset, len, fua } => {
                let medium = self.at(*offset, u64::from(*len)).to_vec();
                let data: Vec<u8> = medium.iter().zip(data_out).map(|(a, b)| a | b).collect();
                self.write(*offset, &data, *fua);
            }
            BlockOp::Flush => self.flushes += 1,
            BlockOp::PreFetch { offset, len } => {
                self.at(*offset, *len);
                self.prefetched = (*offset, *len);
            }
            BlockOp::LbaStatus {
                offset,
                len,
                max_descriptors,
            } => {
                return BlockResult::Extents(self.extents(*offset, *len, *max_descriptors));
            }
            BlockOp::ThinFigures => {
                let used_bytes = self.mapped.len() as u64 * GRAIN;
                return BlockResult::Thin(ThinFigures {
                    available_bytes: 1 << 30,
                    used_bytes,
                });
            }
            BlockOp::SaveModePages(saved) => {
                self.saved_write_cache = Some(saved.write_cache);
                self.flushes += usize::from(saved.flush);
            }
            BlockOp::Copy(_) => panic!("the bench copies"),
            BlockOp::Reservations(ReservationChange {
                save,
                sequence,
                abort_tasks_of,
            }) => {
                self.saved_reservations
                    .extend(save.clone().map(|bytes| (*sequence, bytes)));
                self.aborted.extend(abort_tasks_of);
            }
        }
        BlockResult::Done
    }
}

pub(crate) struct Bench {
    pub(crate) unit: Unit,
    pub(crate) disk: Disk,
    pub(crate) block: usize,
    pub(crate) blocks: u64,
    /// The tokens that were made, with their data.
    pub(crate) tokens: Vec<(RodToken, Vec<u8>)>,
    /// Fails every copy with this.
    pub(crate) copy_failure: Option<CopyError>,
}

pub(crate) fn spec(block_size: BlockSize, blocks: u64) -> UnitSpec {
    UnitSpec {
        naa: [0x62, 0x53, 0x50, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
        serial: "SP0123456789abcdef".into(),
        revision: *b"0001",
        block_size,
        grain: GRAIN as u32,
        blocks,
        write_cache: true,
        read_only: false,
        ports: vec![port()],
        limits: Limits::default(),
    }
}

pub(crate) fn port() -> TargetPort {
    TargetPort {
        target: "iqn.2026-11.com.example:sql01".into(),
        portal_group: 1,
    }
}

/// Initiator `n` with the same ISID as ever.
pub(crate) fn initiator(n: u64) -> NexusName {
    NexusName {
        initiator: format!("iqn.2026-11.com.example:host{n}"),
        isid: [0, 2, 0x3d, 0, 0, 1],
        port: port(),
    }
}

impl Bench {
    /// A unit with three I_T nexuses (0, 1, 2) that have heard of the power on.
    pub(crate) fn with(spec: UnitSpec) -> Self {
        let (block, blocks) = (spec.block_size.bytes() as usize, spec.blocks);
        let mut unit = Unit::new(spec);
        (0..3).for_each(|n| unit.attach(NexusId(n), initiator(n)));
        let disk = Disk {
            bytes: vec![0; block * blocks as usize],
            ..Disk::default()
        };
        let mut bench = Self {
            unit,
            disk,
            block,
            blocks,
            tokens: Vec::new(),
            copy_failure: None,
        };
        (0..3).for_each(|n| {
            bench.attention(n);
        });
        bench
    }

    /// 512-byte blocks over 4096-byte grains.
    pub(crate) fn small() -> Self {
        Self::with(spec(BlockSize::B512, 4096))
    }

    /// Both block sizes.
    pub(crate) fn both() -> [Self; 2] {
        [Self::small(), Self::with(spec(BlockSize::B4096, 1024))]
    }

    pub(crate) fn read_only() -> Self {
        Self::with(UnitSpec {
            read_only: true,
            ..spec(BlockSize::B512, 4096)
        })
    }

    /// Sends a command for I_T nexus `n` with room for `data_in_max` bytes of data-in.
    pub(crate) fn send(&mut self, n: u64, cdb: &[u8], data_out: &[u8], data_in_max: u64) -> Reply {
        let context = Context {
            nexus: NexusId(n),
            luns: &[0, 1],
            data_in_max,
        };
        let reply = match self.unit.plan(&context, cdb, data_out) {
            Plan::Done(reply) => reply,
            Plan::Early(reply, op) => {
                self.run(&op, data_out);
                reply
            }
            Plan::Op(planned) => {
                let result = self.run(planned.op(), data_out);
                planned.finish(result)
            }
        };
        assert_eq!(
            reply.status == CHECK,
            !reply.sense.is_empty(),
            "{cdb:02x?}: {reply:?}"
        );
        reply
    }

    fn run(&mut self, op: &BlockOp, data_out: &[u8]) -> BlockResult {
        match op {
            BlockOp::Copy(request) => BlockResult::Copied(self.copy(request)),
            op => self.disk.run(op, data_out, self.block),
        }
    }

    /// Carries a copy out, as far as it concerns this unit alone.
    pub(crate) fn copy(&mut self, request: &CopyRequest) -> CopyOutcome {
        let mut outcome = CopyOutcome {
            segments: 0,
            bytes: 0,
            end: CopyEnd::Done,
        };
        let failure = self
            .copy_failure
            .or_else(|| self.disk.failure.map(CopyError::Block));
        let done = match (&request.work, failure) {
            (_, Some(error)) => Err(error),
            (CopyWork::Segments { units, segments }, _) => segments.iter().try_for_each(|segment| {
                outcome.bytes += self.copy_segment(units, segment)?;
                outcome.segments += 1;
                Ok(())
            }),
            (CopyWork::Populate { ranges, .. }, _) => {
                let data: Vec<u8> = ranges
                    .iter()
                    .flat_map(|(offset, len)| self.disk.at(*offset, *len).to_vec())
                    .collect();
                outcome.bytes = data.len() as u64;
                let number = self.tokens.len() as u64;
                let token =
                    self.unit
                        .rod_token(outcome.bytes, number, &[number as u8 + 1; RodToken::SECRET_LEN]);
                self.tokens.push((token.clone(), data));
                outcome.end = CopyEnd::Token(token);
                Ok(())
            }
            (CopyWork::WriteToken { token, skip, ranges }, _) => {
                let found = self.tokens.iter().find(|(known, _)| known == token);
                match found.map(|(_, data)| data.clone()) {
                    None => Err(CopyError::TokenUnknown),
                    Some(data) => {
                        let rest = data
                            .get(usize::try_from(*skip).unwrap_or(usize::MAX)..)
                            .unwrap_or_default();
                        let wanted: u64 = ranges.iter().map(|(_, len)| len).sum();
                        if wanted > rest.len() as u64 {
                            Err(CopyError::TokenTooShort)
                        } else {
                            let mut at = 0;
                            for (offset, len) in ranges {
                                let end = at + *len as usize;
                                self.disk.write(*offset, &rest[at..end], false);
                                at = end;
                            }
                            outcome.bytes = wanted;
                            Ok(())
                        }
                    }
                }
            }
            (CopyWork::WriteZeroes { ranges }, _) => {
                for (offset, len) in ranges {
                    self.disk.zero(*offset, *len, false);
                    outcome.bytes += len;
                }
                Ok(())
            }
        };
        if let Err(error) = done {
            outcome.end = CopyEnd::Failed(error);
        }
        self.unit.copy_ended(request.ticket, &outcome);
        outcome
    }

    fn copy_segment(&mut self, units: &[CopyUnit], segment: &CopySegment) -> Result<u64, CopyError> {
        for index in [segment.source, segment.destination] {
            let unit = units[usize::from(index)];
            if unit.naa != Some([0x62, 0x53, 0x50, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]) {
                return Err(CopyError::Unreachable);
            }
            if ![0, self.block as u32].contains(&unit.block_len) {
                return Err(CopyError::BlockLength);
            }
        }
        self.unit.copy_admits(NexusId(0), true)?;
        let block = self.block as u64;
        let count = u64::from(segment.blocks);
        let fits = |lba: u64| lba.checked_add(count).is_some_and(|end| end <= self.blocks);
        if !fits(segment.source_lba) || !fits(segment.destination_lba) {
            return Err(CopyError::OutOfRange);
        }
        if count > 0 {
            let data = self.disk.at(segment.source_lba * block, count * block).to_vec();
            self.disk.write(segment.destination_lba * block, &data, false);
        }
        Ok(count * block)
    }

    /// A command of nexus 0 without data-out and with all the room that it wants.
    pub(crate) fn ask(&mut self, cdb: &[u8]) -> Reply {
        self.send(0, cdb, &[], u64::MAX >> 1)
    }

    /// The same, and it must be GOOD.
    pub(crate) fn data(&mut self, cdb: &[u8]) -> Bytes {
        let reply = self.ask(cdb);
        assert_eq!(reply.status, GOOD, "{cdb:02x?}: {:?}", sense(&reply));
        reply.data
    }

    /// A command of nexus 0 with data-out.
    pub(crate) fn give(&mut self, cdb: &[u8], data_out: &[u8]) -> Reply {
        self.send(0, cdb, data_out, 0)
    }

    /// Takes one unit attention of nexus `n` with TEST UNIT READY.
    pub(crate) fn attention(&mut self, n: u64) -> Option<u16> {
        sense(&self.send(n, &[0; 6], &[], 0)).map(|(key, asc)| {
            assert_eq!(key, 6);
            asc
        })
    }

    pub(crate) fn fill(&mut self, byte: u8) {
        let len = self.disk.bytes.len() as u64;
        self.disk.bytes.fill(byte);
        self.disk.mapped = (0..len / GRAIN).collect();
    }
}

/// Sense key and ASC/ASCQ, from either format.
pub(crate) fn sense(reply: &Reply) -> Option<(u8, u16)> {
    let s = &reply.sense;
    match s.first()? & 0x7f {
        0x70 => Some((s[2] & 0x0f, u16::from_be_bytes([s[12], s[13]]))),
        0x72 => Some((s[1] & 0x0f, u16::from_be_bytes([s[2], s[3]]))),
        other => panic!("sense format {other:#x}"),
    }
}

/// READ, WRITE, VERIFY … CDBs by operation code: byte 1, LBA and count in the places of the code's length.
pub(crate) fn cdb(opcode: u8, flags: u8, lba: u64, count: u32) -> Vec<u8> {
    let mut cdb = match opcode >> 5 {
        0 => vec![0; 6],
        1 | 2 => vec![0; 10],
        5 => vec![0; 12],
        _ => vec![0; 16],
    };
    cdb[0] = opcode;
    match cdb.len() {
        6 => {
            cdb[1..4].copy_from_slice(&(lba as u32).to_be_bytes()[1..]);
            cdb[4] = count as u8;
        }
        10 => {
            cdb[2..6].copy_from_slice(&(lba as u32).to_be_bytes());
            cdb[7..9].copy_from_slice(&(count as u16).to_be_bytes());
        }
        12 => {
            cdb[2..6].copy_from_slice(&(lba as u32).to_be_bytes());
            cdb[6..10].copy_from_slice(&count.to_be_bytes());
        }
        _ => {
            cdb[2..10].copy_from_slice(&lba.to_be_bytes());
            cdb[10..14].copy_from_slice(&count.to_be_bytes());
        }
    }
    if cdb.len() > 6 {
        cdb[1] = flags;
    }
    cdb
}

pub(crate) fn u16_at(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([data[at], data[at + 1]])
}

pub(crate) fn u32_at(data: &[u8], at: usize) -> u32 {
    (u32::from(u16_at(data, at)) << 16) | u32::from(u16_at(data, at + 2))
}

pub(crate) fn u64_at(data: &[u8], at: usize) -> u64 {
    (u64::from(u32_at(data, at)) << 32) | u64::from(u32_at(data, at + 4))
}
