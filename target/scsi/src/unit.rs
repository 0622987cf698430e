//! One logical unit as its I_T nexuses share it: the way of a command from CDB to plan.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    NexusId, NexusName, TargetPort,
    attention::{Pending, UnitAttention},
    block,
    cdb::{Cdb, opcode as op},
    command::{Lookup, lookup},
    copy::{self, Copies},
    inquiry, log, lun, mode,
    plan::{Answer, BlockOp, Plan, Planned, Reply, status},
    report,
    reservation::{self, Reservations, RestoreError},
    sense::Sense,
};

/// LOGICAL BLOCK LENGTH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockSize {
    /// 512 bytes.
    B512,
    /// 4096 bytes ("4Kn").
    B4096,
}

impl BlockSize {
    /// In bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }

    /// The size of so many bytes, if there is one.
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        match bytes {
            512 => Some(Self::B512),
            4096 => Some(Self::B4096),
            _ => None,
        }
    }
}

/// Largest physical block that is reported: Windows takes no disk with a larger one.
const MAX_PHYSICAL_BLOCK: u32 = 4096;
/// Space is counted in threshold sets of this size (VPD page B2h, log page 0Ch).
const THRESHOLD_SET_BYTES: u64 = 1 << 20;

/// What one command may ask for; VPD page B0h tells the initiators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// MAXIMUM TRANSFER LENGTH, bytes.
    pub max_transfer_bytes: u32,
    /// MAXIMUM WRITE SAME LENGTH, bytes: filling takes time, and ESXi gives a command 8 seconds. Not far above the
    /// transfer length: libiscsi 1.19 writes as many blocks in one command before it unmaps them in one.
    pub max_write_same_bytes: u64,
    /// MAXIMUM UNMAP LBA COUNT, blocks.
    pub max_unmap_blocks: u32,
    /// MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT.
    pub max_unmap_descriptors: u32,
    /// MAXIMUM COMPARE AND WRITE LENGTH, blocks.
    pub max_compare_and_write_blocks: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_transfer_bytes: 8 << 20,
            max_write_same_bytes: 16 << 20,
            max_unmap_blocks: 1 << 20,
            max_unmap_descriptors: 256,
            max_compare_and_write_blocks: u8::MAX,
        }
    }
}

/// What a unit is made of.
#[derive(Debug, Clone)]
pub struct UnitSpec {
    /// NAA IEEE registered extended identifier (type 6); never reused.
    pub naa: [u8; 16],
    /// UNIT SERIAL NUMBER, printable ASCII, at most 200 bytes (the rest is cut off); never reused.
    pub serial: String,
    /// PRODUCT REVISION LEVEL.
    pub revision: [u8; 4],
    /// Logical block length.
    pub block_size: BlockSize,
    /// Granularity of the store in bytes, a power of two: unmap granularity, and physical block length up to
    /// 4096.
    pub grain: u32,
    /// Capacity in logical blocks, at least one.
    pub blocks: u64,
    /// WCE at power on: the configured value, or what an initiator saved.
    pub write_cache: bool,
    /// Refuses every write with DATA PROTECT.
    pub read_only: bool,
    /// All target ports that lead here.
    pub ports: Vec<TargetPort>,
    /// Limits of one command.
    pub limits: Limits,
}

/// The circumstances of one command.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Who sent it.
    pub nexus: NexusId,
    /// All LUNs of the target, for REPORT LUNS.
    pub luns: &'a [u16],
    /// Data-in that the initiator takes: the expected data transfer length if the command reads (R bit), else
    /// zero.
    pub data_in_max: u64,
}

/// What a command comes down to, before it is wrapped up.
#[derive(Debug)]
pub(crate) enum Ready {
    Reply(Reply),
    /// An operation that moves no data of the command, or parameter data.
    Op(BlockOp, Answer),
    /// An operation with the bytes that the command wanted to move.
    Transfer(BlockOp, Answer, u64),
    /// An answer, and an operation that follows it.
    Early(Reply, BlockOp),
}

#[derive(Debug)]
pub(crate) struct Nexus {
    pub(crate) name: NexusName,
    pending: Pending,
}

/// One logical unit. The owner keeps it behind a lock; every call is short.
#[derive(Debug)]
pub struct Unit {
    pub(crate) spec: UnitSpec,
    pub(crate) modes: mode::ModePages,
    pub(crate) nexuses: BTreeMap<NexusId, Nexus>,
    pub(crate) reservations: Reservations,
    pub(crate) copies: Copies,
}

impl Unit {
    /// A unit after power on: no I_T nexus, no reservation.
    ///
    /// # Panics
    /// On a specification that no logical unit can have: no blocks, a grain that is no power of two or below
    /// the block length, a capacity of 2^64 bytes or more.
    pub fn new(mut spec: UnitSpec) -> Self {
        let block_size = spec.block_size.bytes();
        assert!(spec.blocks > 0, "a logical unit has at least one block");
        assert!(
            spec.blocks.checked_mul(u64::from(block_size)).is_some(),
            "capacity overflows 64 bits"
        );
        assert!(
            spec.grain.is_power_of_two() && spec.grain >= block_size,
            "grain {} is no granularity",
            spec.grain
        );
        spec.serial.retain(|c| matches!(c, ' '..='~'));
        spec.serial.truncate(200);
        let modes = mode::ModePages::new(spec.write_cache);
        Self {
            spec,
            modes,
            nexuses: BTreeMap::new(),
            reservations: Reservations::default(),
            copies: Copies::default(),
        }
    }

    /// Registers an I_T nexus: its first command hears of the power on. A nexus of the same id is replaced.
    pub fn attach(&mut self, nexus: NexusId, name: NexusName) {
        self.detach(nexus);
        let mut pending = Pending::default();
        pending.raise(UnitAttention::PowerOn);
        self.nexuses.insert(nexus, Nexus { name, pending });
    }

    /// I_T nexus loss: a RESERVE of it ends, its persistent registrations stay.
    pub fn detach(&mut self, nexus: NexusId) {
        self.nexuses.remove(&nexus);
        self.reservations.nexus_lost(nexus);
        self.copies.nexus_lost(nexus);
    }

    /// Plans one command. `data_out` is all that came of the data-out, however much the CDB speaks of.
    pub fn plan(&mut self, context: &Context<'_>, cdb: &[u8], data_out: &[u8]) -> Plan {
        let descriptor_sense = self.modes.current.descriptor_sense;
        let (op, answer, transfer_len) = match self.decide(context, &Cdb::new(cdb), data_out) {
            Ok(Ready::Reply(reply)) => return Plan::Done(reply.cut(context.data_in_max)),
            Ok(Ready::Early(reply, op)) => return Plan::Early(reply, op),
            Ok(Ready::Op(op, answer)) => (op, answer, 0),
            Ok(Ready::Transfer(op, answer, transfer_len)) => (op, answer, transfer_len),
            Err(sense) => return Plan::Done(Reply::check(sense, descriptor_sense)),
        };
        let (data_in_max, block_size) = (context.data_in_max, self.block_size());
        Plan::Op(Planned {
            op,
            answer,
            transfer_len,
            data_in_max,
            block_size,
            descriptor_sense,
        })
    }

    /// Reservation conflict, then unit attention, then the command itself: RESERVATION CONFLICT takes
    /// precedence over CHECK CONDITION (SAM-5 §5.3.3), and the unit attention stays for a command that is let
    /// in.
    fn decide(&mut self, context: &Context<'_>, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
        let found = lookup(cdb);
        let Some(nexus) = self.nexuses.get_mut(&context.nexus) else {
            // The owner detached it while this command was on its way: nobody waits for the answer.
            return Ok(Ready::Reply(Reply::status(status::BUSY)));
        };
        if let Lookup::Known(command) = found {
            let access = command.access.of(cdb);
            if self.reservations.conflicts(context.nexus, &nexus.name, access) {
                return Ok(Ready::Reply(Reply::status(status::RESERVATION_CONFLICT)));
            }
        }
        match cdb.opcode() {
            // These three never fail with a unit attention (SAM-5 §5.14.1); the last two may still clear one.
            op::INQUIRY => {}
            op::REPORT_LUNS => nexus.pending.clear(UnitAttention::ReportLunsChanged),
            op::REQUEST_SENSE => return request_sense(nexus, cdb).map(Ready::Reply),
            _ => {
                if let Some(attention) = nexus.pending.take() {
                    return Err(attention.sense());
                }
            }
        }
        match found {
            Lookup::Known(_) => {}
            Lookup::UnknownServiceAction => return Err(Sense::invalid_cdb(1)),
            Lookup::Unknown => return Err(Sense::INVALID_OPCODE),
        }
        no_auto_contingent_allegiance(cdb)?;
        self.dispatch(context, cdb, data_out)
    }

    fn dispatch(&mut self, context: &Context<'_>, cdb: &Cdb, data_out: &[u8]) -> Result<Ready, Sense> {
        match cdb.opcode() {
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => block::read(self, context, cdb),
            op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => block::write(self, cdb, data_out),
            op::WRITE_AND_VERIFY_10 | op::WRITE_AND_VERIFY_12 | op::WRITE_AND_VERIFY_16 => {
                block::write_and_verify(self, cdb, data_out)
            }
            op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => block::verify(self, cdb, data_out),
            op::PRE_FETCH_10 | op::PRE_FETCH_16 => block::prefetch(self, cdb),
            op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => block::synchronize(self, cdb),
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => block::write_same(self, cdb, data_out),
            op::UNMAP => block::unmap(self, cdb, data_out),
            op::COMPARE_AND_WRITE => block::compare_and_write(self, cdb, data_out),
            op::ORWRITE_16 => block::or_write(self, cdb, data_out),
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => mode::select(self, context.nexus, cdb, data_out),
            op::LOG_SENSE => log::sense(self, cdb),
            op::THIRD_PARTY_COPY_OUT => copy::out(self, context, cdb, data_out),
            op::PERSISTENT_RESERVE_OUT => reservation::out(self, context.nexus, cdb, data_out),
            op::RESERVE_6 | op::RESERVE_10 | op::RELEASE_6 | op::RELEASE_10 => {
                reservation::reserve_or_release(self, context.nexus, cdb).map(Ready::Reply)
            }
            op::START_STOP_UNIT => start_stop(cdb),
            op::SERVICE_ACTION_IN_16 if cdb.service_action() == 0x12 => block::lba_status(self, cdb),
            _ => self.report(context, cdb).map(Ready::Reply),
        }
    }

    /// The commands that only return parameter data, or nothing.
    fn report(&self, context: &Context<'_>, cdb: &Cdb) -> Result<Reply, Sense> {
        match (cdb.opcode(), cdb.service_action()) {
            (op::TEST_UNIT_READY, _) => Ok(Reply::good()),
            (op::INQUIRY, _) => match self.nexuses.get(&context.nexus) {
                Some(nexus) => inquiry::inquiry(self, &nexus.name.port, cdb),
                None => Ok(Reply::status(status::BUSY)),
            },
            (op::REPORT_LUNS, _) => lun::report_luns(cdb, context.luns),
            (op::MODE_SENSE_6 | op::MODE_SENSE_10, _) => mode::sense(self, cdb),
            (op::READ_CAPACITY_10, _) => Ok(report::capacity_10(self)),
            (op::SERVICE_ACTION_IN_16, 0x10) => Ok(report::capacity_16(self, cdb)),
            (op::READ_DEFECT_DATA_10 | op::READ_DEFECT_DATA_12, _) => Ok(report::defects(cdb)),
            (op::MAINTENANCE_IN, 0x0a) => report::target_port_groups(self, cdb),
            (op::MAINTENANCE_IN, 0x0c) => report::operation_codes(cdb),
            (op::MAINTENANCE_IN, 0x0d) => Ok(report::task_management(cdb)),
            (op::PERSISTENT_RESERVE_IN, _) => Ok(reservation::read(self, cdb)),
            (op::THIRD_PARTY_COPY_IN, _) => copy::receive(self, context.nexus, cdb),
            (op::SEND_DIAGNOSTIC, _) => send_diagnostic(cdb),
            // The medium cannot be removed: to prevent that is always granted.
            (op::PREVENT_ALLOW_MEDIUM_REMOVAL, _) if cdb.byte(4) & 0x02 == 0 => Ok(Reply::good()),
            (op::PREVENT_ALLOW_MEDIUM_REMOVAL, _) => Err(Sense::invalid_cdb(4)),
            _ => Err(Sense::INVALID_OPCODE),
        }
    }

    /// LOGICAL UNIT RESET (SAM-5 §6.3.3), after the owner ended all tasks: a RESERVE ends, saved mode pages
    /// come back, every I_T nexus hears of it, the one that asked for it too.
    pub fn lun_reset(&mut self) {
        self.reservations.reset();
        self.modes.reset();
        self.copies.reset();
        self.raise(UnitAttention::DeviceReset);
    }

    /// The unit has another capacity now.
    pub fn capacity_changed(&mut self, blocks: u64) {
        assert!(
            blocks > 0 && blocks.checked_mul(u64::from(self.block_size())).is_some(),
            "impossible capacity"
        );
        if self.spec.blocks != blocks {
            self.spec.blocks = blocks;
            self.raise(UnitAttention::CapacityChanged);
        }
    }

    /// The target has other LUNs now.
    pub fn report_luns_changed(&mut self) {
        self.raise(UnitAttention::ReportLunsChanged);
    }

    /// As [`Self::report_luns_changed`], for these I_T nexuses alone: a LUN came or went that no other one sees.
    pub fn report_luns_changed_to(&mut self, nexuses: &[NexusId]) {
        for id in nexuses {
            if let Some(nexus) = self.nexuses.get_mut(id) {
                nexus.pending.raise(UnitAttention::ReportLunsChanged);
            }
        }
    }

    /// A write crossed a threshold of the space below: every I_T nexus is told (6/38/07).
    pub fn thin_threshold_reached(&mut self) {
        self.raise(UnitAttention::ThinThreshold);
    }

    /// The thresholds of available space, in bytes, that mode page 1Ch/02h lists; the owner watches them. The first
    /// [`crate::MAX_THIN_THRESHOLDS`] count.
    pub fn set_thin_thresholds(&mut self, available_bytes: &[u64]) {
        let sets = available_bytes
            .iter()
            .map(|bytes| u32::try_from(bytes / THRESHOLD_SET_BYTES).unwrap_or(u32::MAX));
        if self
            .modes
            .set_thresholds(sets.take(mode::MAX_THIN_THRESHOLDS).collect())
        {
            self.raise(UnitAttention::ModeParametersChanged);
        }
    }

    /// The contents are others under the same identity: the unit was reverted.
    pub fn content_replaced(&mut self) {
        self.raise(UnitAttention::MediumChanged);
    }

    /// Another I_T nexus ended the tasks of this one: TAS is zero, so this is how it hears of it. To be called when no task of
    /// before can begin any more, and before the first one afterwards: an attention that is raised earlier may be taken by a
    /// task that then ends without a word.
    pub fn tasks_ended(&mut self, victim: NexusId, cause: UnitAttention) {
        if let Some(nexus) = self.nexuses.get_mut(&victim) {
            nexus.pending.raise(cause);
        }
    }

    /// Other target ports lead here now.
    pub fn set_ports(&mut self, ports: Vec<TargetPort>) {
        if self.spec.ports != ports {
            self.spec.ports = ports;
            self.raise(UnitAttention::InquiryChanged);
        }
    }

    /// Makes the unit read-only or writable.
    pub fn set_read_only(&mut self, read_only: bool) {
        if self.spec.read_only != read_only {
            self.spec.read_only = read_only;
            self.raise(UnitAttention::ModeParametersChanged);
        }
    }

    /// Raises a unit attention for every I_T nexus.
    fn raise(&mut self, attention: UnitAttention) {
        for nexus in self.nexuses.values_mut() {
            nexus.pending.raise(attention);
        }
    }

    /// Raises it for every I_T nexus but the one that caused it.
    pub(crate) fn raise_except(&mut self, cause: NexusId, attention: UnitAttention) {
        for (_, nexus) in self.nexuses.iter_mut().filter(|(id, _)| **id != cause) {
            nexus.pending.raise(attention);
        }
    }

    /// Raises it for the I_T nexus of this name, when it is logged in.
    pub(crate) fn raise_for(&mut self, name: &NexusName, attention: UnitAttention) {
        for nexus in self.nexuses.values_mut().filter(|nexus| nexus.name == *name) {
            nexus.pending.raise(attention);
        }
    }

    /// WCE as it is now.
    pub const fn write_cache(&self) -> bool {
        self.modes.current.write_cache
    }

    /// Logical block length in bytes.
    pub const fn block_size(&self) -> u32 {
        self.spec.block_size.bytes()
    }

    /// Capacity in bytes.
    pub const fn capacity_bytes(&self) -> u64 {
        self.spec.blocks * self.block_size() as u64
    }

    /// Persistent reservations as bytes, for [`Self::restore_reservations`]; empty registrations unless APTPL
    /// is active.
    pub fn reservation_state(&self) -> Bytes {
        self.reservations.persistent()
    }

    /// Takes persistent reservations back after a restart.
    ///
    /// # Errors
    /// When the bytes are damaged or of an unknown version; nothing is changed then.
    pub fn restore_reservations(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.reservations = Reservations::restore(state)?;
        Ok(())
    }

    pub(crate) fn check(&self, sense: Sense) -> Reply {
        Reply::check(sense, self.modes.current.descriptor_sense)
    }

    /// Why a write cannot be, if so.
    pub(crate) const fn write_protection(&self) -> Option<Sense> {
        if self.spec.read_only {
            Some(Sense::WRITE_PROTECTED)
        } else if self.modes.current.software_write_protect {
            Some(Sense::SOFTWARE_WRITE_PROTECTED)
        } else {
            None
        }
    }

    /// LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT.
    pub(crate) fn physical_exponent(&self) -> u8 {
        let physical = self.spec.grain.min(MAX_PHYSICAL_BLOCK);
        exponent(u64::from(physical / self.block_size()))
    }

    pub(crate) const fn threshold_set_bytes(&self) -> u64 {
        THRESHOLD_SET_BYTES
    }

    /// THRESHOLD EXPONENT: a threshold set in blocks, as a power of two.
    pub(crate) fn threshold_exponent(&self) -> u8 {
        exponent(THRESHOLD_SET_BYTES / u64::from(self.block_size()))
    }
}

/// Of a power of two below 2^64.
fn exponent(power: u64) -> u8 {
    u8::try_from(power.trailing_zeros()).unwrap_or(0)
}

/// NACA: ACA is not supported (NORMACA is zero in INQUIRY), so it must not be asked for (SAM-5 §5.9).
fn no_auto_contingent_allegiance(cdb: &Cdb) -> Result<(), Sense> {
    if cdb.control() & 0x04 != 0 {
        return Err(Sense::invalid_cdb(u16::try_from(cdb.len() - 1).unwrap_or(0)));
    }
    Ok(())
}

/// REQUEST SENSE (SPC-4 §6.39): a pending unit attention as parameter data, and thereby cleared.
fn request_sense(nexus: &mut Nexus, cdb: &Cdb) -> Result<Reply, Sense> {
    no_auto_contingent_allegiance(cdb)?;
    let sense = nexus.pending.take().map_or(Sense::NONE, UnitAttention::sense);
    Ok(Reply::parameter_data(
        sense.encode(cdb.bit(1, 0x01)),
        u64::from(cdb.byte(4)),
    ))
}

/// START STOP UNIT (SBC-3 §5.25): nothing spins. Stopping makes data durable first unless NO_FLUSH, as guests
/// do it when they shut down; LOEJ needs a medium that can be removed.
fn start_stop(cdb: &Cdb) -> Result<Ready, Sense> {
    let power_condition = cdb.byte(4) >> 4;
    // 0 START_VALID, 1-3 ACTIVE IDLE STANDBY, 7 LU_CONTROL, A-B FORCE_IDLE_0 FORCE_STANDBY_0.
    if !matches!(power_condition, 0..=3 | 7 | 0xa | 0xb) {
        return Err(Sense::invalid_cdb(4));
    }
    // LOEJ and START are ignored with a power condition.
    if power_condition == 0 && cdb.bit(4, 0x02) {
        return Err(Sense::invalid_cdb(4));
    }
    let stops = power_condition == 0 && !cdb.bit(4, 0x01);
    if stops && !cdb.bit(4, 0x04) {
        return Ok(Ready::Op(BlockOp::Flush, Answer::Good));
    }
    Ok(Ready::Reply(Reply::good()))
}

/// SEND DIAGNOSTIC (SPC-4 §6.42): the default self test and the foreground ones pass; there are no diagnostic
/// pages and no log page with results of background tests.
fn send_diagnostic(cdb: &Cdb) -> Result<Reply, Sense> {
    if cdb.u16(3) != 0 {
        return Err(Sense::invalid_cdb(3));
    }
    let (code, default_test) = (cdb.byte(1) >> 5, cdb.bit(1, 0x04));
    match (code, default_test) {
        (0, _) | (4..=6, false) => Ok(Reply::good()),
        _ => Err(Sense::invalid_cdb(1)),
    }
}
