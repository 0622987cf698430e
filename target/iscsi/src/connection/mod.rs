//! One connection, which is one session: MaxConnections=1, ErrorRecoveryLevel=0.
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::config::ConnectionConfig;
use crate::error::Error;
use crate::event::{Admission, Directory, Event, Outcome, SessionInfo};
use crate::frame::Frame;
use crate::types::{Lun, TaskId, TmfId, TmfResponse};

/// One connection.
pub struct Connection { config: ConnectionConfig, directory: Arc<dyn Directory>, staging: Vec<u8> }

#[expect(missing_docs, clippy::unused_self, clippy::needless_pass_by_value, reason = "signatures are published before bodies")]
impl Connection {
    pub fn new(_now: Instant, config: ConnectionConfig, directory: Arc<dyn Directory>) -> Self { Self { config, directory, staging: vec![0; 16384] } }
    pub fn space(&mut self) -> &mut [u8] { &mut self.staging }
    pub fn advance(&mut self, _now: Instant, _n: usize) -> Result<(), Error> { Ok(()) }
    pub fn receiving_paused(&self) -> bool { false }
    pub fn poll_event(&mut self) -> Option<Event> { None }
    pub fn poll_transmit(&mut self) -> Option<Frame> { None }
    pub fn wants_transmit(&self) -> bool { false }
    pub fn poll_timeout(&self) -> Option<Instant> { None }
    pub fn handle_timeout(&mut self, _now: Instant) -> Result<(), Error> { Ok(()) }
    pub fn admit(&mut self, _now: Instant, _admission: Admission) {}
    pub fn complete(&mut self, _now: Instant, _task: TaskId, _outcome: Outcome) {}
    pub fn tmf_complete(&mut self, _now: Instant, _tmf: TmfId, _response: TmfResponse) {}
    pub fn ping(&mut self, _now: Instant) {}
    pub fn request_logout(&mut self, _now: Instant, _after: Duration) {}
    pub fn request_negotiation(&mut self, _now: Instant) {}
    pub fn send_async_scsi(&mut self, _lun: Lun, _sense: Bytes) {}
    pub fn abort_lun_tasks(&mut self, _lun: Option<Lun>) -> Vec<TaskId> { Vec::new() }
    pub fn outstanding(&self) -> usize { 0 }
    pub fn info(&self) -> SessionInfo { let _ = (&self.config, &self.directory); unreachable!() }
    pub fn drop_session(&mut self) {}
    pub fn close(&mut self) {}
    pub fn is_closed(&self) -> bool { false }
}
