//! The servers: each with the same LUNs on the same file system.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stillpoint_tests::{Daemon, Running, Scratch, free_port, run, wait_until};

use crate::fio::Address;

const START_LIMIT: Duration = Duration::from_secs(20);

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// Our release daemon, no snapshot.
    Stillpoint,
    /// The same, with a snapshot taken right before each measurement.
    AfterSnapshot,
    /// The same, with many snapshots.
    ManySnapshots,
    /// tgt of Debian.
    Tgt,
    /// istgt of Debian.
    Istgt,
    /// nbdkit's file plugin: the ceiling, and not iSCSI.
    Nbdkit,
    /// The file itself, by pread and pwrite.
    Raw,
}

impl Peer {
    /// Column heading.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stillpoint => "stillpoint",
            Self::AfterSnapshot => "right-after",
            Self::ManySnapshots => "many-snaps",
            Self::Tgt => "tgt",
            Self::Istgt => "istgt",
            Self::Nbdkit => "nbdkit",
            Self::Raw => "raw-file",
        }
    }
}

/// What a server is made of.
#[derive(Debug, Clone)]
pub(crate) struct Plan<'a> {
    /// Our daemon.
    pub(crate) daemon: &'a Path,
    /// Directory with the peers' programs.
    pub(crate) tools: &'a Path,
    /// Where the images lie.
    pub(crate) on: &'a Path,
    /// How many LUNs.
    pub(crate) luns: u32,
    /// Bytes of each.
    pub(crate) size_bytes: u64,
}

/// A server that runs.
pub(crate) struct Served {
    /// Who.
    pub(crate) peer: Peer,
    /// Its LUNs.
    pub(crate) luns: Vec<Address>,
    daemon: Option<Daemon>,
    running: Option<Running>,
    _scratch: Scratch,
    snapshots: u32,
}

impl Served {
    /// Starts a server with empty LUNs.
    pub(crate) fn start(peer: Peer, plan: &Plan<'_>) -> Result<Self> {
        let scratch = Scratch::below(plan.on)?;
        let mut served = Self {
            peer,
            luns: Vec::new(),
            daemon: None,
            running: None,
            _scratch: scratch,
            snapshots: 0,
        };
        let started = match peer {
            Peer::Stillpoint | Peer::AfterSnapshot | Peer::ManySnapshots => served.stillpoint(plan),
            Peer::Tgt => served.tgt(plan),
            Peer::Istgt => served.istgt(plan),
            Peer::Nbdkit => served.nbdkit(plan),
            Peer::Raw => served
                .images(plan)
                .map(|images| served.luns = images.into_iter().map(Address::File).collect()),
        };
        started.with_context(|| format!("starting {}", peer.name()))?;
        Ok(served)
    }

    fn dir(&self) -> &Path {
        self._scratch.path()
    }

    /// The server's process.
    pub(crate) fn pid(&self) -> Option<u32> {
        let daemon = self.daemon.as_ref().and_then(Daemon::pid);
        daemon.or_else(|| self.running.as_ref().map(Running::id))
    }

    /// Takes a snapshot of the first LUN.
    pub(crate) fn snapshot(&mut self) -> Result<()> {
        self.snapshots += 1;
        let name = format!("s{}", self.snapshots);
        let daemon = self.daemon.as_ref().context("only our daemon takes snapshots")?;
        daemon.text(&[
            "snapshot",
            "create",
            "lun0",
            "--name",
            &name,
            "--consistency",
            "crash",
        ])?;
        Ok(())
    }

    fn stillpoint(&mut self, plan: &Plan<'_>) -> Result<()> {
        let mut config = String::from("[[portal]]\naddress = \"127.0.0.1:$PORT\"\n");
        for n in 0..plan.luns {
            writeln!(
                config,
                "[[lun]]\nname = \"lun{n}\"\nsize = \"{}B\"",
                plan.size_bytes
            )?;
            writeln!(
                config,
                "[[target]]\niqn = \"iqn.2026-11.bench:lun{n}\"\nluns = [\"lun{n}\"]"
            )?;
            writeln!(config, "initiators = [\"*\"]\nmax_sessions = 64")?;
        }
        let binary = plan.daemon.to_str().context("the daemon's path")?;
        let daemon = Daemon::start(binary, &self._scratch, &config)?;
        self.luns = (0..plan.luns)
            .map(|n| Address::Iscsi(daemon.url(&format!("iqn.2026-11.bench:lun{n}"), 0)))
            .collect();
        self.daemon = Some(daemon);
        Ok(())
    }

    fn images(&self, plan: &Plan<'_>) -> Result<Vec<PathBuf>> {
        (0..plan.luns)
            .map(|n| {
                let path = self.dir().join(format!("lun{n}.img"));
                let file = File::create(&path).context("an image")?;
                file.set_len(plan.size_bytes).context("an image")?;
                Ok(path)
            })
            .collect()
    }

    fn spawn(&mut self, program: &str, command: &mut Command) -> Result<()> {
        let log = self.dir().join(format!("{program}.log"));
        self.running = Some(Running::start(program, command, &log)?);
        Ok(())
    }

    fn tgt(&mut self, plan: &Plan<'_>) -> Result<()> {
        let images = self.images(plan)?;
        let (port, control) = (free_port()?, free_port()?);
        let portal = format!("portal=127.0.0.1:{port}");
        let mut command = Command::new(plan.tools.join("tgtd"));
        command.args(["-f", "-C", &control.to_string(), "--iscsi", &portal]);
        self.spawn("tgtd", &mut command)?;
        let admin = |arguments: &str| -> Result<String> {
            let mut command = Command::new(plan.tools.join("tgtadm"));
            command
                .args(["-C", &control.to_string(), "--lld", "iscsi"])
                .args(arguments.split(' '));
            run(&mut command, START_LIMIT)?
                .success()
                .with_context(|| format!("tgtadm {arguments}"))
        };
        wait_until("tgtd", START_LIMIT, || {
            Ok(admin("--op show --mode target").is_ok())
        })?;
        for (n, image) in images.iter().enumerate() {
            let tid = n + 1;
            admin(&format!(
                "--op new --mode target --tid {tid} -T iqn.2026-11.bench:lun{n}"
            ))?;
            admin(&format!(
                "--op new --mode logicalunit --tid {tid} --lun 1 -b {}",
                image.display()
            ))?;
            // It answers digests with None until told otherwise.
            admin(&format!(
                "--op update --mode target --tid {tid} --name HeaderDigest --value CRC32C,None"
            ))?;
            admin(&format!(
                "--op update --mode target --tid {tid} --name DataDigest --value CRC32C,None"
            ))?;
            admin(&format!("--op bind --mode target --tid {tid} -I ALL"))?;
            self.luns.push(Address::Iscsi(format!(
                "iscsi://127.0.0.1:{port}/iqn.2026-11.bench:lun{n}/1"
            )));
        }
        Ok(())
    }

    fn istgt(&mut self, plan: &Plan<'_>) -> Result<()> {
        let images = self.images(plan)?;
        let (port, control) = (free_port()?, free_port()?);
        let dir = self.dir().display().to_string();
        for name in ["auth.conf", "istgtcontrol.conf"] {
            fs::write(self.dir().join(name), "").context("istgt's files")?;
        }
        let mut config = format!(
            "[Global]\nNodeBase \"iqn.2026-11.bench\"\nPidFile {dir}/istgt.pid\nAuthFile {dir}/auth.conf\nLogFacility \"local7\"\nTimeout 30\n\
             NopInInterval 20\nDiscoveryAuthMethod None\nMaxSessions 64\nMaxConnections 4\nMaxR2T 32\nMaxOutstandingR2T 16\nDefaultTime2Wait 2\n\
             DefaultTime2Retain 60\nFirstBurstLength 262144\nMaxBurstLength 1048576\nMaxRecvDataSegmentLength 262144\nInitialR2T Yes\n\
             ImmediateData Yes\nDataPDUInOrder Yes\nDataSequenceInOrder Yes\nErrorRecoveryLevel 0\n\
             [UnitControl]\nAuthMethod None\nAuthGroup None\nPortal UC1 127.0.0.1:{control}\nNetmask 127.0.0.1\n\
             [PortalGroup1]\nPortal DA1 127.0.0.1:{port}\n[InitiatorGroup1]\nInitiatorName \"ALL\"\nNetmask 127.0.0.1\n"
        );
        for (n, image) in images.iter().enumerate() {
            writeln!(
                config,
                "[LogicalUnit{}]\nTargetName \"lun{n}\"\nMapping PortalGroup1 InitiatorGroup1\nAuthMethod None\nAuthGroup None\n\
                 UseDigest Auto\nUnitType Disk\nQueueDepth 64\nLUN0 Storage {} Auto",
                n + 1,
                image.display()
            )?;
            self.luns.push(Address::Iscsi(format!(
                "iscsi://127.0.0.1:{port}/iqn.2026-11.bench:lun{n}/0"
            )));
        }
        let file = self.dir().join("istgt.conf");
        fs::write(&file, config).context("istgt's config")?;
        let mut command = Command::new(plan.tools.join("istgt"));
        command.arg("-D").arg("-c").arg(file);
        self.spawn("istgt", &mut command)?;
        self.listens(port)
    }

    fn nbdkit(&mut self, plan: &Plan<'_>) -> Result<()> {
        self.images(plan)?;
        let port = free_port()?;
        let plugin = plan
            .tools
            .join("../root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-file-plugin.so");
        ensure!(plugin.exists(), "{} is not there", plugin.display());
        let mut command = Command::new(plan.tools.join("nbdkit"));
        command
            .args(["-f", "-i", "127.0.0.1", "-p", &port.to_string()])
            .arg(plugin);
        command.arg(format!("dir={}", self.dir().display()));
        self.spawn("nbdkit", &mut command)?;
        self.luns = (0..plan.luns)
            .map(|n| Address::Nbd(format!("nbd://127.0.0.1:{port}/lun{n}.img")))
            .collect();
        self.listens(port)
    }

    fn listens(&mut self, port: u16) -> Result<()> {
        let running = self.running.as_mut().context("a server")?;
        wait_until("the server to listen", START_LIMIT, || {
            if let Some(code) = running.ended()? {
                anyhow::bail!("it ended with exit code {code}:\n{}", running.output());
            }
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok())
        })
    }
}
