//! The login phase.
mod chap;
mod params;

pub use chap::{ChapAlgorithm, ChapPolicy, ChapPolicyError};
pub use params::Params;
