//! One run of fio, and what it and the kernel say about it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use stillpoint_tests::run;

use crate::points::{Digests, Point};

/// Clock ticks of `/proc` (USER_HZ, fixed on Linux).
const TICKS_PER_SECOND: f64 = 100.0;
/// Beyond the run time: login, logout, a slow disk.
const SLACK: Duration = Duration::from_secs(60);

/// How fio reaches one LUN.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    /// `iscsi://HOST:PORT/IQN/LUN`.
    Iscsi(String),
    /// `nbd://HOST:PORT/NAME`.
    Nbd(String),
    /// A file, without any server.
    File(PathBuf),
}

/// What one run gave.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    /// I/Os per second.
    pub(crate) iops: f64,
    /// MiB per second.
    pub(crate) mib_s: f64,
    /// Completion latency in µs.
    pub(crate) p50_us: f64,
    /// As `p50_us`.
    pub(crate) p99_us: f64,
    /// As `p50_us`.
    pub(crate) p999_us: f64,
    /// CPU time of the server for one I/O, in µs.
    pub(crate) server_us: f64,
    /// CPU time of fio in cores.
    pub(crate) client_cores: f64,
    /// CPU time of the server in cores.
    pub(crate) server_cores: f64,
    /// How busy all processors were, 0 to 1, whoever kept them so.
    pub(crate) box_load: f64,
    /// The server's resident memory afterwards, in bytes.
    pub(crate) rss_bytes: u64,
}

/// Runs a load.
pub(crate) struct Fio<'a> {
    /// The program.
    pub(crate) program: PathBuf,
    /// Where its job file goes.
    pub(crate) dir: &'a Path,
    /// Run time.
    pub(crate) seconds: f64,
    /// Bytes of a LUN.
    pub(crate) size_bytes: u64,
}

impl Fio<'_> {
    /// Measures `point` against a server.
    pub(crate) fn measure(&self, point: &Point, luns: &[Address], server: Option<u32>) -> Result<Measured> {
        if point.own_initiator {
            let (Some(Address::Iscsi(url)), Some(pid)) = (luns.first(), server) else {
                bail!("{}: not an iSCSI target", point.name);
            };
            return crate::initiator::measure(point, url, self.size_bytes, self.seconds, pid);
        }
        let text = self.job_file(point, luns)?;
        let before = Times::now(server)?;
        let report = self.run(&text, point.digests == Digests::Header)?;
        let after = Times::now(server)?;
        measured(&report, &before, &after, server)
    }

    /// Writes all of a LUN once in pieces of `block` bytes.
    pub(crate) fn fill(&self, lun: &Address, block: u32) -> Result<()> {
        let mut text = String::from("[global]\nthread=1\n");
        writeln!(
            text,
            "size={}\nrw=write\nbs={block}\niodepth=8\nend_fsync=1\n[fill]",
            self.size_bytes
        )?;
        address(&mut text, lun)?;
        self.run(&text, false).map(drop)
    }

    fn job_file(&self, point: &Point, luns: &[Address]) -> Result<String> {
        let wanted = point.luns + u32::from(point.neighbour);
        ensure!(
            luns.len() >= wanted as usize,
            "{}: {} LUNs are too few",
            point.name,
            luns.len()
        );
        // Percentiles need one distribution over all sessions; each job's generator starts elsewhere.
        let mut text =
            String::from("[global]\nthread=1\ntime_based=1\nrandrepeat=0\nnorandommap=1\ndirect=0\n");
        writeln!(
            text,
            "size={}\nruntime={}ms",
            self.size_bytes,
            (self.seconds * 1000.0).round()
        )?;
        for (number, lun) in luns.iter().take(point.luns as usize).enumerate() {
            writeln!(
                text,
                "[measured{number}]\ngroup_reporting=1\nnumjobs={}",
                point.sessions
            )?;
            writeln!(
                text,
                "rw={}\nbs={}\niodepth={}",
                point.rw, point.block, point.depth
            )?;
            if point.rw == "randrw" {
                writeln!(text, "rwmixread=70")?;
            }
            if point.flush_each > 0 {
                writeln!(text, "fdatasync={}", point.flush_each)?;
            }
            address(&mut text, lun)?;
        }
        if point.neighbour {
            let lun = luns.get(point.luns as usize).context("the neighbour's LUN")?;
            writeln!(
                text,
                "[neighbour]\nnew_group=1\nrw=randwrite\nbs=4096\niodepth=32"
            )?;
            address(&mut text, lun)?;
        }
        Ok(text)
    }

    fn run(&self, job: &str, digest: bool) -> Result<Value> {
        let file = self.dir.join("job.fio");
        fs::write(&file, job).context("fio's job file")?;
        let mut command = Command::new(&self.program);
        command
            .args(["--output-format=json"])
            .arg(&file)
            .current_dir(self.dir);
        if digest {
            // See tests/bench/tools. nbdkit and the raw file know no digests.
            command.env("BENCH_HEADER_DIGEST", "1");
        }
        let limit = Duration::from_secs_f64(self.seconds) + SLACK;
        let text = run(&mut command, limit)?
            .success()
            .with_context(|| job.to_owned())?;
        // Engines print their own lines before the document.
        let start = text.find('{').context("fio printed no JSON")?;
        serde_json::from_str(text.get(start..).unwrap_or_default()).context("fio's JSON")
    }
}

fn address(text: &mut String, lun: &Address) -> Result<()> {
    match lun {
        Address::Iscsi(url) => writeln!(text, "ioengine=libiscsi\nfilename={}", url.replace(':', "\\:"))?,
        Address::Nbd(uri) => writeln!(text, "ioengine=nbd\nuri={uri}")?,
        Address::File(path) => writeln!(text, "ioengine=psync\nfilename={}", path.display())?,
    }
    Ok(())
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or(0.0)
}

fn measured(report: &Value, before: &Times, after: &Times, server: Option<u32>) -> Result<Measured> {
    let jobs = report
        .get("jobs")
        .and_then(Value::as_array)
        .context("fio reports no jobs")?;
    let ours: Vec<&Value> = jobs
        .iter()
        .filter(|job| {
            job.get("jobname")
                .and_then(Value::as_str)
                .is_some_and(|name| name.starts_with("measured"))
        })
        .collect();
    ensure!(!ours.is_empty(), "fio reports no measured job");
    for job in jobs {
        ensure!(number(job, "/error") == 0.0, "fio saw an I/O error: {job}");
    }
    let sum = |jobs: &[&Value], field: &str| -> f64 {
        let both = ["read", "write"].map(|way| {
            jobs.iter()
                .map(|job| number(job, &format!("/{way}/{field}")))
                .sum::<f64>()
        });
        both.iter().sum()
    };
    let all: Vec<&Value> = jobs.iter().collect();
    let (ios, seconds) = (sum(&all, "total_ios"), (after.wall - before.wall).max(1e-9));
    // With several LUNs there are several groups: the middle one stands for them.
    let percentile = |wanted: &str| {
        let mut found: Vec<f64> = ours
            .iter()
            .map(|job| {
                let way = if number(job, "/read/total_ios") >= number(job, "/write/total_ios") {
                    "read"
                } else {
                    "write"
                };
                number(job, &format!("/{way}/clat_ns/percentile/{wanted}")) / 1000.0
            })
            .collect();
        crate::median(&mut found)
    };
    let client: f64 = jobs
        .iter()
        .map(|job| {
            (number(job, "/usr_cpu") + number(job, "/sys_cpu")) / 100.0
                * number(job, "/job options/numjobs").max(1.0)
        })
        .sum();
    let server_seconds = after.server - before.server;
    Ok(Measured {
        iops: sum(&ours, "iops"),
        mib_s: sum(&ours, "bw_bytes") / f64::from(1 << 20),
        p50_us: percentile("50.000000"),
        p99_us: percentile("99.000000"),
        p999_us: percentile("99.900000"),
        server_us: server_seconds * 1e6 / ios.max(1.0),
        client_cores: client,
        server_cores: server_seconds / seconds,
        box_load: (after.busy - before.busy) / (after.total - before.total).max(1e-9),
        rss_bytes: server.map_or(0, rss),
    })
}

impl Measured {
    /// For the JSON file.
    pub(crate) fn json(&self) -> Value {
        json!({
            "iops": self.iops, "mib_per_s": self.mib_s, "p50_us": self.p50_us, "p99_us": self.p99_us, "p999_us": self.p999_us,
            "server_us_per_io": self.server_us, "client_cores": self.client_cores, "server_cores": self.server_cores,
            "box_load": self.box_load, "rss_bytes": self.rss_bytes,
        })
    }
}

/// Latencies of commands, collected by a load that is not fio's.
#[derive(Debug, Default)]
pub(crate) struct Latencies(Vec<Duration>);

impl Latencies {
    /// One command took this long.
    pub(crate) fn add(&mut self, one: Duration) {
        self.0.push(one);
    }

    fn percentile(&self, share: f64) -> f64 {
        // Of at most some millions: exact in f64, and not negative.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let at = (self.0.len() as f64 * share) as usize;
        let one = self.0.get(at).or_else(|| self.0.last());
        one.map_or(0.0, |one| one.as_secs_f64() * 1e6)
    }

    /// What a load of commands of `block` bytes gave that ran for `seconds`.
    pub(crate) fn measured(
        mut self,
        block: u32,
        seconds: f64,
        client_cores: f64,
        before: &Times,
        after: &Times,
        server: u32,
    ) -> Measured {
        self.0.sort_unstable();
        let iops = self.0.len() as f64 / seconds.max(1e-9);
        let server_seconds = after.server - before.server;
        Measured {
            iops,
            mib_s: iops * f64::from(block) / f64::from(1 << 20),
            p50_us: self.percentile(0.5),
            p99_us: self.percentile(0.99),
            p999_us: self.percentile(0.999),
            server_us: server_seconds * 1e6 / (self.0.len() as f64).max(1.0),
            client_cores,
            server_cores: server_seconds / seconds.max(1e-9),
            box_load: (after.busy - before.busy) / (after.total - before.total).max(1e-9),
            rss_bytes: rss(server),
        }
    }
}

/// Processor times as the kernel counts them, in seconds.
pub(crate) struct Times {
    wall: f64,
    server: f64,
    busy: f64,
    total: f64,
}

impl Times {
    /// Now.
    pub(crate) fn now(server: Option<u32>) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let cpu: Vec<f64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_ascii_whitespace()
            .skip(1)
            .take(8)
            .filter_map(|word| word.parse().ok())
            .collect();
        let total: f64 = cpu.iter().sum();
        let idle: f64 = cpu.iter().skip(3).take(2).sum();
        let uptime = fs::read_to_string("/proc/uptime").context("/proc/uptime")?;
        Ok(Self {
            wall: uptime
                .split(' ')
                .next()
                .and_then(|word| word.parse().ok())
                .context("/proc/uptime")?,
            server: server.map(cpu_seconds).transpose()?.unwrap_or(0.0),
            busy: (total - idle) / TICKS_PER_SECOND,
            total: total / TICKS_PER_SECOND,
        })
    }
}

/// User and system time of a process with all its threads, in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the server has ended")?;
    // The name may have spaces; the fields behind its parenthesis have none. They start with field 3.
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let ticks: f64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|word| word.parse::<f64>().ok())
        .sum();
    Ok(ticks / TICKS_PER_SECOND)
}

/// Resident memory of a process without file pages, in bytes.
pub(crate) fn rss(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}
