//! What one connection may do, and how long it may take.

use core::net::SocketAddr;
use core::time::Duration;
use std::sync::Arc;

use crate::memory::SharedMemory;

/// Which digests we are willing to use (RFC 7143 §13.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestPolicy {
    /// The first of the initiator's list that is `None` or `CRC32C`.
    Offered,
    /// `CRC32C` if it is offered at all, else `None`.
    Prefer,
    /// `CRC32C` or no login.
    Require,
    /// `None` or no login.
    Never,
}

/// Our side of the negotiation, the limits and the times of one connection.
#[derive(Debug, Clone)]
pub struct ConnectionConfig {
    /// Address of the initiator.
    pub peer: SocketAddr,
    /// Address that the initiator connected to.
    pub local: SocketAddr,
    /// Portal group that `local` belongs to.
    pub portal_group: u16,
    /// Randomness for CHAP challenges and identifiers: 32 fresh bytes per connection.
    pub seed: [u8; 32],
    /// Our values of the keys.
    pub keys: KeyConfig,
    /// Bounds on what the peer can make us hold.
    pub limits: LimitConfig,
    /// Deadlines.
    pub times: TimeConfig,
    /// What all connections of the owner hold together; without it each has only its own bounds.
    pub memory: Option<Arc<SharedMemory>>,
}

impl ConnectionConfig {
    /// The defaults, for this pair of addresses.
    #[must_use]
    pub fn new(peer: SocketAddr, local: SocketAddr, portal_group: u16, seed: [u8; 32]) -> Self {
        Self {
            peer,
            local,
            portal_group,
            seed,
            keys: KeyConfig::default(),
            limits: LimitConfig::default(),
            times: TimeConfig::default(),
            memory: None,
        }
    }
}

/// Our values of the operational keys (RFC 7143 §13).
#[derive(Debug, Clone)]
pub struct KeyConfig {
    /// Header digest.
    pub header_digest: DigestPolicy,
    /// Data digest.
    pub data_digest: DigestPolicy,
    /// InitialR2T: whether every Data-Out needs an R2T. Yes by default, the safe answer to Windows.
    pub initial_r2t: bool,
    /// ImmediateData.
    pub immediate_data: bool,
    /// MaxRecvDataSegmentLength that we declare, in bytes.
    pub max_recv_data_segment_length: u32,
    /// MaxBurstLength, in bytes.
    pub max_burst_length: u32,
    /// FirstBurstLength, in bytes.
    pub first_burst_length: u32,
    /// MaxOutstandingR2T per task.
    pub max_outstanding_r2t: u16,
    /// DefaultTime2Wait, in seconds.
    pub default_time2wait_s: u16,
    /// DefaultTime2Retain, in seconds.
    pub default_time2retain_s: u16,
}

impl Default for KeyConfig {
    fn default() -> Self {
        Self {
            header_digest: DigestPolicy::Offered,
            data_digest: DigestPolicy::Offered,
            initial_r2t: true,
            immediate_data: true,
            max_recv_data_segment_length: 262_144,
            max_burst_length: 1_048_576,
            first_burst_length: 262_144,
            max_outstanding_r2t: 4,
            default_time2wait_s: 2,
            default_time2retain_s: 20,
        }
    }
}

/// Bounds on what the peer can make us hold.
#[derive(Debug, Clone)]
pub struct LimitConfig {
    /// Commands in the window (MaxCmdSN - ExpCmdSN + 1 when idle). All LUNs of a session share it.
    pub queue_depth: u32,
    /// Immediate SCSI commands and task management requests that may be open at once.
    pub immediate_commands: usize,
    /// Bytes of write data promised or held for the session; beyond, R2Ts wait.
    pub write_buffer_bytes: usize,
    /// Bytes of read data asked for or waiting to be sent for the session; beyond, commands wait.
    pub read_buffer_bytes: usize,
    /// The most bytes of one command that are collected or sent. A command that wants more gets a residual.
    pub transfer_bytes: u32,
    /// Bytes of answers without read data (echoes, rejects, text) waiting to be sent at which receiving pauses.
    pub output_bytes: usize,
}

impl Default for LimitConfig {
    fn default() -> Self {
        Self {
            queue_depth: 128,
            immediate_commands: 16,
            write_buffer_bytes: 32 << 20,
            read_buffer_bytes: 32 << 20,
            transfer_bytes: 32 << 20,
            output_bytes: 4 << 20,
        }
    }
}

/// Deadlines.
#[derive(Debug, Clone)]
pub struct TimeConfig {
    /// From the connection to the full feature phase.
    pub login: Duration,
    /// Silence after which we ping.
    pub ping_idle: Duration,
    /// Silence after a ping that ends the connection of an initiator known to take part in NOP.
    pub ping_answer: Duration,
    /// Silence that ends the connection of an initiator that never sent a NOP-Out (iPXE answers no ping).
    pub silent: Duration,
    /// Silence that ends a discovery session: there we may not ping (RFC 7143 §7.4.3).
    pub discovery: Duration,
    /// How long the peer may read nothing while there is something to send.
    pub stall: Duration,
    /// How long solicited data may take to come.
    pub data_out: Duration,
    /// How long an abort of many tasks waits for data that was asked for (RFC 7143 §4.2.3.3): initiators that abort fast send
    /// none, and wait for our answer.
    pub aborted_data: Duration,
    /// How long the owner may take to finish the tasks of a session that logged out.
    pub cleanup: Duration,
}

impl Default for TimeConfig {
    fn default() -> Self {
        Self {
            login: Duration::from_secs(15),
            ping_idle: Duration::from_secs(15),
            ping_answer: Duration::from_secs(15),
            silent: Duration::from_secs(1800),
            discovery: Duration::from_secs(120),
            stall: Duration::from_secs(60),
            data_out: Duration::from_secs(60),
            aborted_data: Duration::from_secs(2),
            cleanup: Duration::from_secs(15),
        }
    }
}
