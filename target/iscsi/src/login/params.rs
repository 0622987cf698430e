//! What login agreed on. Only login can make it, so that no later code looks at text again.

/// The operational parameters of a connection (RFC 7143 §13): the result of a finished negotiation.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Params {
    /// HeaderDigest=CRC32C.
    pub header_digest: bool,
    /// DataDigest=CRC32C.
    pub data_digest: bool,
    /// InitialR2T.
    pub initial_r2t: bool,
    /// ImmediateData.
    pub immediate_data: bool,
    /// MaxRecvDataSegmentLength of the initiator: the most bytes in one PDU of ours.
    pub initiator_max_recv: u32,
    /// MaxRecvDataSegmentLength of ours: the most bytes in one PDU of the initiator's.
    pub target_max_recv: u32,
    /// MaxBurstLength, in bytes.
    pub max_burst_length: u32,
    /// FirstBurstLength, in bytes; never above `max_burst_length`.
    pub first_burst_length: u32,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u16,
    /// DefaultTime2Wait, in seconds.
    pub time2wait_s: u16,
    /// DefaultTime2Retain, in seconds.
    pub time2retain_s: u16,
}

/// MaxRecvDataSegmentLength before anything else is declared (RFC 7143 §13.12).
pub(crate) const DEFAULT_MAX_RECV: u32 = 8192;

impl Params {
    /// What holds when no key is negotiated: the defaults of RFC 7143 §13. We have declared `target_max_recv`, or not.
    pub(crate) fn new() -> Self {
        Self {
            header_digest: false,
            data_digest: false,
            initial_r2t: true,
            immediate_data: true,
            initiator_max_recv: DEFAULT_MAX_RECV,
            target_max_recv: DEFAULT_MAX_RECV,
            max_burst_length: 262_144,
            first_burst_length: 65536,
            max_outstanding_r2t: 1,
            time2wait_s: 2,
            time2retain_s: 20,
        }
    }

    /// FirstBurstLength MUST NOT exceed MaxBurstLength (RFC 7143 §13.14): checked when all keys are known.
    pub(crate) fn sealed(mut self) -> Self {
        self.first_burst_length = self.first_burst_length.min(self.max_burst_length);
        self
    }
}
