//! PDUs.
/// Bytes of a basic header segment (RFC 7143 §11.2.1).
pub const BHS_LEN: usize = 48;
/// A basic header segment as it is on the wire.
pub type Bhs = [u8; BHS_LEN];
