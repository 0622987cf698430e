//! Stillpoint.
#![forbid(unsafe_code)]
