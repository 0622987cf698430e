//! The PDU recorder, as Wireshark reads it: everything that passed is there in order, what is stored on the LUN is not.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::raw::{Cdb, Nexus, Raw};
use stillpoint_tests::{Daemon, Running, Scratch, qemu_session, run, story, tshark, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const DISK: &str = "iqn.2026-11.test:disk";
const ME: &str = "iqn.2026-11.test.trace:me";
/// What nobody may find in a recording who has not asked for it.
const SECRET: &[u8; 16] = b"SECRET-OF-A-BANK";
const LIMIT: Duration = Duration::from_secs(60);

const CONFIG: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[portal]]\naddress = \"[::1]:$PORT2\"\n\
    [[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 8\n";

fn log_in(address: SocketAddr, initiator: &str) -> Result<Raw> {
    let nexus = Nexus::new(initiator, DISK)
        .key("MaxRecvDataSegmentLength", "262144")
        .key("FirstBurstLength", "262144");
    let mut raw = Raw::login(address, &nexus)?.session()?;
    raw.ready(0)?;
    Ok(raw)
}

fn session(daemon: &Daemon, initiator: &str) -> Result<Value> {
    let list = daemon.json(&["session", "list"])?;
    let found = list
        .as_array()
        .into_iter()
        .flatten()
        .find(|row| row["initiator"] == initiator);
    found
        .cloned()
        .with_context(|| format!("no session of {initiator} in {list}"))
}

/// `stillpoint trace` while it runs.
struct Tracing {
    running: Running,
    file: PathBuf,
    log: PathBuf,
}

impl Tracing {
    fn start(daemon: &Daemon, scratch: &Scratch, name: &str, id: &Value, options: &[&str]) -> Result<Self> {
        let (file, log) = (
            scratch.file(&format!("{name}.pcapng")),
            scratch.file(&format!("{name}.log")),
        );
        let mut command = Command::new(BINARY);
        command
            .arg("--config")
            .arg(daemon.config())
            .args(["--json", "trace", &id.to_string(), "--out"]);
        command.arg(&file).args(options);
        let mut running = Running::start("stillpoint trace", &mut command, &log)?;
        // The first piece is there as soon as the session is being recorded.
        wait_until("the recording to begin", LIMIT, || {
            ensure!(running.ended()?.is_none(), "{}", running.output());
            Ok(fs::metadata(&file).is_ok_and(|meta| meta.len() > 0))
        })?;
        Ok(Self { running, file, log })
    }

    /// What it printed at its end.
    fn finish(mut self) -> Result<(Value, PathBuf)> {
        let code = self.running.wait(LIMIT)?;
        let text = fs::read_to_string(&self.log)?;
        ensure!(code == 0, "stillpoint trace ended with {code}: {text}");
        Ok((
            serde_json::from_str(&text).with_context(|| text.clone())?,
            self.file,
        ))
    }
}

/// One line per iSCSI PDU, with the fields that were asked for.
fn dissect(file: &Path, port: u16, filter: &str, fields: &[&str]) -> Result<Vec<Vec<String>>> {
    let mut command = tshark()?;
    command.arg("-r").arg(file).args([
        "-d",
        &format!("tcp.port=={port},iscsi"),
        "-Y",
        filter,
        "-T",
        "fields",
    ]);
    for field in fields {
        command.args(["-e", field]);
    }
    let printed = run(&mut command, LIMIT)?.success()?;
    Ok(printed
        .lines()
        .map(|line| line.split('\t').map(str::to_owned).collect())
        .collect())
}

/// Writes and reads back 300 KiB of the secret: immediate data, R2Ts, PDUs that are longer than an IP packet.
fn talk(raw: &mut Raw) -> Result<()> {
    raw.run(&Cdb::reads(0, &[0x12, 0, 0, 0, 96, 0], 96))?;
    let data = SECRET.repeat(300 * 1024 / SECRET.len());
    raw.write(0, 0, &data)?;
    ensure!(
        raw.read(0, 0, 600)? == data,
        "what was read is not what was written"
    );
    raw.ping(SECRET)?;
    Ok(())
}

fn holds_secret(file: &Path) -> Result<bool> {
    Ok(fs::read(file)?
        .windows(SECRET.len())
        .any(|window| window == SECRET))
}

/// Nothing in the file is malformed, missing or out of order. Data that was left out is no fault of the file.
fn ensure_sound(file: &Path, port: u16) -> Result<()> {
    let faults = "_ws.malformed || tcp.analysis.lost_segment || tcp.analysis.ack_lost_segment || tcp.analysis.out_of_order \
                  || tcp.analysis.retransmission || tcp.checksum.status == \"Bad\" || ip.checksum.status == \"Bad\"";
    let mut command = tshark()?;
    command.arg("-r").arg(file).args([
        "-d",
        &format!("tcp.port=={port},iscsi"),
        "-o",
        "tcp.check_checksum:TRUE",
    ]);
    let printed = run(
        command.args(["-o", "ip.check_checksum:TRUE", "-Y", faults]),
        LIMIT,
    )?
    .success()?;
    ensure!(printed.is_empty(), "Wireshark complains:\n{printed}");
    Ok(())
}

#[test]
fn wireshark_reads_a_recording_and_finds_no_data_of_the_lun() {
    story("trace: dissected by tshark", |scratch| {
        let mut daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        for (name, port, address) in [
            ("v4", daemon.port(), format!("127.0.0.1:{}", daemon.port())),
            (
                "v6",
                daemon.second_port(),
                format!("[::1]:{}", daemon.second_port()),
            ),
        ] {
            for options in [&[][..], &["--payload"]] {
                let name = format!("{name}{}", options.len());
                let mut raw = log_in(address.parse()?, ME)?;
                let row = session(&daemon, ME)?;
                ensure!(row["fingerprint"] == "linux", "{row}");
                let tracing = Tracing::start(&daemon, scratch, &name, &row["id"], options)?;
                talk(&mut raw)?;
                raw.logout()?;
                let (result, file) = tracing.finish()?;
                ensure!(
                    result["ended_by"] == "session" && result["missed_pdus"] == 0,
                    "{result}"
                );
                ensure!(result["file_bytes"] == fs::metadata(&file)?.len(), "{result}");
                ensure!(
                    fs::metadata(&file)?.permissions().mode() & 0o077 == 0,
                    "others may read it"
                );
                ensure!(holds_secret(&file)? != options.is_empty(), "{name}: {options:?}");
                ensure_sound(&file, port)?;
                let pdus = dissect(&file, port, "iscsi", &["iscsi.opcode"])?;
                let opcodes: Vec<&str> = pdus
                    .iter()
                    .filter_map(|line| line.first())
                    .map(String::as_str)
                    .collect();
                for opcode in [
                    "0x01", "0x25", "0x31", "0x05", "0x21", "0x00", "0x20", "0x06", "0x26",
                ] {
                    ensure!(opcodes.contains(&opcode), "no {opcode} in {opcodes:?}");
                }
                let logged_out = opcodes.ends_with(&["0x06", "0x26"]);
                ensure!(
                    logged_out && pdus.len() == usize::try_from(result["pdus"].as_u64().unwrap_or(0))?,
                    "{} PDUs dissected of {result}: {opcodes:?}",
                    pdus.len()
                );
                // The SCSI layer is dissected too: an INQUIRY's answer is not hidden.
                let inquiry = dissect(
                    &file,
                    port,
                    "scsi.inquiry.vendor_id",
                    &["scsi.inquiry.vendor_id", "scsi.inquiry.product_id"],
                )?;
                ensure!(
                    inquiry
                        .first()
                        .is_some_and(|line| line.first().is_some_and(|vendor| vendor == "STILLPNT")),
                    "{inquiry:?}"
                );
            }
        }
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        Ok(())
    });
}

#[test]
fn a_recording_has_bounds_and_disturbs_nobody() {
    story("trace: bounds", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let address = SocketAddr::from(([127, 0, 0, 1], daemon.port()));
        let mut raw = log_in(address, ME)?;
        let id = session(&daemon, ME)?["id"].clone();

        let small = Tracing::start(
            &daemon,
            scratch,
            "small",
            &id,
            &["--payload", "--max-size", "64KiB"],
        )?;
        let second = scratch.file("second.pcapng").display().to_string();
        let error = daemon.refused(3, &["trace", &id.to_string(), "--out", &second])?;
        ensure!(error["code"] == "busy", "{error}");
        talk(&mut raw)?;
        let (result, file) = small.finish()?;
        ensure!(
            result["ended_by"] == "size" && fs::metadata(&file)?.len() <= 64 << 10,
            "{result}"
        );
        ensure_sound(&file, daemon.port())?;

        let error = daemon.refused(1, &["trace", "4711", "--out", &second])?;
        ensure!(
            error["code"] == "not_found" && !Path::new(&second).exists(),
            "{error}"
        );

        let brief = Tracing::start(&daemon, scratch, "brief", &id, &["--duration", "1s"])?;
        raw.ready(0)?;
        let (result, _) = brief.finish()?;
        ensure!(
            result["ended_by"] == "duration" && result["pdus"] == 2,
            "{result}"
        );

        // Ctrl-C: the file is whole, and the session can be recorded again at once.
        let mut left = Tracing::start(&daemon, scratch, "left", &id, &[])?;
        talk(&mut raw)?;
        wait_until("the answer to the ping to be in the file", LIMIT, || {
            Ok(dissect(
                &left.file,
                daemon.port(),
                "iscsi.opcode == 0x20",
                &["iscsi.opcode"],
            )?
            .len()
                == 1)
        })?;
        left.running.signal(Signal::INT)?;
        left.running.wait(LIMIT)?;
        ensure_sound(&left.file, daemon.port())?;
        let again = Tracing::start(&daemon, scratch, "again", &id, &["--duration", "1s"])?;
        again.finish()?;

        // Whoever records and does not read costs the session nothing but PDUs that are missing in the file.
        let stopped = Tracing::start(&daemon, scratch, "stopped", &id, &["--payload"])?;
        stopped.running.signal(Signal::STOP)?;
        for _ in 0..40 {
            talk(&mut raw)?;
        }
        stopped.running.signal(Signal::CONT)?;
        raw.logout()?;
        let (result, file) = stopped.finish()?;
        ensure!(
            result["missed_pdus"].as_u64().is_some_and(|missed| missed > 0),
            "{result}"
        );
        let dropped = dissect(
            &file,
            daemon.port(),
            "tcp.analysis.lost_segment || tcp.analysis.ack_lost_segment",
            &["frame.number"],
        )?;
        ensure!(!dropped.is_empty(), "the file hides that PDUs are missing");
        let events = daemon.json(&["events"])?.to_string();
        ensure!(
            events.contains("SP-4002") && events.contains("with the contents of blocks"),
            "{events}"
        );
        Ok(())
    });
}

#[test]
fn real_initiators_are_named() {
    story("trace: QEMU is known by its fingerprint", |scratch| {
        let daemon = Daemon::start(BINARY, scratch, CONFIG)?;
        let qemu = qemu_session(scratch, "qemu", &daemon.url(DISK, 0))?;
        wait_until("QEMU to log in", LIMIT, || {
            let list = daemon.json(&["session", "list"])?;
            Ok(list[0]["fingerprint"] == "qemu" && list[0]["state"] == "active")
        })?;
        ensure!(
            daemon.text(&["session", "list"])?.contains("qemu"),
            "the table has no column for it"
        );
        drop(qemu);
        Ok(())
    });
}
