//! What initiators and their test suites ask of a disk, against units with a disk in memory behind them.
#![expect(
    clippy::indexing_slicing,
    reason = "a test that reaches beyond its data has failed"
)]
#![expect(clippy::cast_possible_truncation, reason = "test values fit")]

mod any_cdb;
mod bench;
mod copy;
mod initiators;
mod inquiry;
mod mode;
mod provisioning;
mod read_write;
mod registration;
mod reports;
mod reservations;
mod unit_attention;
