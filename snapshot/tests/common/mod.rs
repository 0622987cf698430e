//! What the crash tests share.
#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod counts;
pub(crate) mod facts;
pub(crate) mod gate;
pub(crate) mod model;
pub(crate) mod recorder;
pub(crate) mod replay;
pub(crate) mod workload;
