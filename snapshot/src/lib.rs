//! Stillpoint.
#![forbid(unsafe_code)]

#[cfg(feature = "sim")]
pub mod sim;
