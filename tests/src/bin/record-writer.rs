//! An application that writes numbered records, for the guest: what it acknowledged must be in a snapshot, what it had not
//! begun must not.
//!
//! ```text
//! record-writer write DIR LOG [CONTROL]     appends records to DIR/records until killed
//! record-writer check DIR                   verifies DIR/records, prints the number of the last record
//! ```
//!
//! Without CONTROL each record is written and fsynced, then acknowledged. With CONTROL (a directory) records are
//! acknowledged at once and kept in memory, as a database keeps dirty pages: only `CONTROL/freeze` makes the writer put them
//! on disk and stand still until that file goes away; it answers with `CONTROL/frozen`. LOG (not on the LUN) gets one
//! line for each acknowledged record: `NUMBER BEGUN_US ACKNOWLEDGED_US`, wall clock of the guest in microseconds.
//!
//! A record is 64 bytes: `record NNNNNNNNNNNN` and a check text that follows from the number, ended by a newline, so that a
//! torn or foreign record shows.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

/// Bytes of one record.
const RECORD_BYTES: usize = 64;
/// Between two records: slow enough for an emulated CPU, fast enough that a freeze of some milliseconds falls among them.
const PAUSE: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["write", dir, log] => write_through(Path::new(dir), Path::new(log)),
        ["write", dir, log, control] => write_buffered(Path::new(dir), Path::new(log), Path::new(control)),
        ["check", dir] => check(Path::new(dir)).map(|last| println!("{last}")),
        _ => Err(anyhow::anyhow!(
            "usage: record-writer write DIR LOG [CONTROL] | check DIR"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("record-writer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write_through(dir: &Path, log: &Path) -> Result<()> {
    let (mut records, mut log) = open(dir, log)?;
    for number in 1.. {
        let begun = now_us()?;
        records.write_all(&record(number)).context("writing a record")?;
        records.sync_all().context("fsync")?;
        acknowledge(&mut log, number, begun)?;
        sleep(PAUSE);
    }
    Ok(())
}

fn write_buffered(dir: &Path, log: &Path, control: &Path) -> Result<()> {
    let (mut records, mut log) = open(dir, log)?;
    let (freeze, frozen) = (control.join("freeze"), control.join("frozen"));
    let mut held = Vec::new();
    for number in 1.. {
        if freeze.exists() {
            records.write_all(&held).context("writing the held records")?;
            records.sync_all().context("fsync")?;
            held.clear();
            fs::write(&frozen, b"").context("answering the hook")?;
            while freeze.exists() {
                sleep(PAUSE);
            }
            fs::remove_file(&frozen).context("going on after the hook")?;
        }
        let begun = now_us()?;
        held.extend_from_slice(&record(number));
        acknowledge(&mut log, number, begun)?;
        sleep(PAUSE);
    }
    Ok(())
}

fn open(dir: &Path, log: &Path) -> Result<(File, File)> {
    let records = File::create_new(dir.join("records")).context("creating the records")?;
    // The file's name is a promise too: without this a crash could lose it.
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .context("fsync of the directory")?;
    let log = File::create(log).context("creating the log")?;
    Ok((records, log))
}

fn acknowledge(log: &mut File, number: u64, begun: u128) -> Result<()> {
    // One write per line: whoever reads the log sees whole lines.
    log.write_all(format!("{number} {begun} {}\n", now_us()?).as_bytes())
        .context("writing the log")
}

fn now_us() -> Result<u128> {
    Ok(SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock")?
        .as_micros())
}

fn record(number: u64) -> [u8; RECORD_BYTES] {
    let mut bytes = [b'.'; RECORD_BYTES];
    // splitmix64's multiplier: neighbours look nothing like each other.
    let check = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let text = format!("record {number:012} {check:016x} ");
    bytes
        .iter_mut()
        .zip(text.bytes())
        .for_each(|(to, from)| *to = from);
    bytes.iter_mut().last().into_iter().for_each(|last| *last = b'\n');
    bytes
}

fn check(dir: &Path) -> Result<u64> {
    let bytes = fs::read(dir.join("records")).context("reading the records")?;
    let whole = bytes.chunks_exact(RECORD_BYTES);
    let rest = whole.remainder().len();
    let mut last = 0;
    for (found, number) in whole.zip(1..) {
        if found != record(number).as_slice() {
            bail!("record {number} is wrong: {:?}", String::from_utf8_lossy(found));
        }
        last = number;
    }
    ensure!(rest == 0, "{rest} bytes of a torn record follow record {last}");
    Ok(last)
}
