//! A Linux guest in QEMU (TCG: it must run where nested virtualisation does not), driven over a serial port.
//!
//! `tests/vm/build` makes its kernel, initrd and root disk from Debian's packages; the root disk is shared by all
//! guests and never written. The host's loopback is 127.0.0.1 in the guest too.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use data_encoding::BASE64;

use crate::cpio::Archive;
use crate::process::{Running, run};
use crate::scratch::{Scratch, free_port};
use crate::tools::{guest_parts, tool};

/// Power-on to control channel; 5 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// What a request may take when the caller does not say.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// More than a script's own limit, for the way there and back.
const CHANNEL_SLACK: Duration = Duration::from_secs(20);

/// A file that the guest finds under `/payload`.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Name below `/payload`.
    pub name: String,
    /// Its bytes.
    pub content: Vec<u8>,
    /// Permissions.
    pub mode: u32,
}

impl Payload {
    /// A program built for the host, without its debug information (the guest is loaded into RAM through an emulated CPU).
    ///
    /// # Errors
    /// `strip` (binutils, which every Rust installation with Debian's linker has) fails.
    pub fn program(scratch: &Scratch, name: &str, binary: &str) -> Result<Self> {
        let stripped = scratch.file(&format!("{name}.stripped"));
        let mut command = Command::new("strip");
        command.args(["--strip-all", "-o"]).arg(&stripped).arg(binary);
        run(&mut command, REQUEST_LIMIT)?.success()?;
        let content = fs::read(&stripped).with_context(|| format!("reading {}", stripped.display()))?;
        Ok(Self {
            name: name.to_owned(),
            content,
            mode: 0o755,
        })
    }

    /// An executable script.
    #[must_use]
    pub fn script(name: &str, text: &str) -> Self {
        Self {
            name: name.to_owned(),
            content: text.as_bytes().to_vec(),
            mode: 0o755,
        }
    }

    /// A plain file.
    #[must_use]
    pub fn text(name: &str, text: &str) -> Self {
        Self {
            name: name.to_owned(),
            content: text.as_bytes().to_vec(),
            mode: 0o644,
        }
    }
}

/// What a guest is made of.
#[derive(Debug)]
pub struct GuestSpec<'a> {
    /// Names its logs.
    pub name: &'a str,
    /// InitiatorName.
    pub initiator: &'a str,
    /// Files under `/payload`.
    pub payload: Vec<Payload>,
    /// TCP ports of the guest that the host must reach.
    pub forward: Vec<u16>,
}

/// What a script in the guest ended with.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Exit code; 124 is a timeout.
    pub code: i32,
    /// The last 48 KiB of both output streams.
    pub output: String,
}

/// A running guest; switched off when dropped.
#[derive(Debug)]
pub struct Guest {
    name: String,
    control: BufReader<UnixStream>,
    sequence: u64,
    forwarded: Vec<(u16, u16)>,
    console: PathBuf,
    _qemu: Running,
}

impl Guest {
    /// Boots it and waits for its control channel.
    ///
    /// # Errors
    /// The guest cannot be built or does not boot.
    pub fn boot(scratch: &Scratch, spec: GuestSpec<'_>) -> Result<Self> {
        let vm = guest_parts()?;
        let name = spec.name;
        let initrd = scratch.file(&format!("{name}.initrd"));
        fs::write(&initrd, initrd_with(&vm.join("initrd"), &spec.payload)?).context("the guest's initrd")?;
        let forwarded: Vec<(u16, u16)> = spec
            .forward
            .iter()
            .map(|&port| Ok((port, free_port()?)))
            .collect::<Result<_>>()?;
        let socket = scratch.file(&format!("{name}.sock"));
        let console = scratch.file(&format!("{name}-console.log"));

        let mut command = qemu(&vm, &initrd, &socket, &console, spec.initiator, &forwarded)?;
        let mut qemu = Running::start("qemu", &mut command, &scratch.file(&format!("{name}-qemu.log")))?;
        let deadline = Instant::now() + BOOT_LIMIT;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    if let Some(code) = qemu.ended()? {
                        bail!("QEMU ended with exit code {code}: {}", qemu.output());
                    }
                    ensure!(Instant::now() < deadline, "QEMU's serial port: {error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        stream
            .set_read_timeout(Some(BOOT_LIMIT))
            .context("the control channel")?;
        let mut guest = Self {
            name: name.to_owned(),
            control: BufReader::new(stream),
            sequence: 0,
            forwarded,
            console,
            _qemu: qemu,
        };
        guest
            .line_starting("@@ ready")
            .context("the guest did not boot")?;
        Ok(guest)
    }

    /// The host's port that leads to `port` of the guest.
    ///
    /// # Errors
    /// It was not in [`GuestSpec::forward`].
    pub fn forwarded(&self, port: u16) -> Result<u16> {
        let found = self.forwarded.iter().find(|(guest, _)| *guest == port);
        found
            .map(|(_, host)| *host)
            .with_context(|| format!("port {port} of the guest is not forwarded"))
    }

    /// Everything on its console: kernel messages are there.
    #[must_use]
    pub fn console(&self) -> String {
        fs::read(&self.console)
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// Runs a shell script that must succeed (`set -e` is on) and gives what it printed.
    ///
    /// # Errors
    /// It fails, or takes more than a minute.
    pub fn run(&mut self, script: &str) -> Result<String> {
        self.run_for(REQUEST_LIMIT, script)
    }

    /// As [`Self::run`] with another limit.
    ///
    /// # Errors
    /// It fails, or takes longer.
    pub fn run_for(&mut self, limit: Duration, script: &str) -> Result<String> {
        let answer = self.ask(limit, &format!("set -eu\n{script}"))?;
        ensure!(
            answer.code == 0,
            "guest {}: exit code {} of\n{script}\n--- printed:\n{}",
            self.name,
            answer.code,
            answer.output
        );
        Ok(answer.output)
    }

    /// Runs a shell script and gives what came of it.
    ///
    /// # Errors
    /// The control channel fails: the guest is gone.
    pub fn ask(&mut self, limit: Duration, script: &str) -> Result<Answer> {
        self.sequence += 1;
        let request = format!(
            "{} {} {}\n",
            self.sequence,
            limit.as_secs().max(1),
            BASE64.encode(script.as_bytes())
        );
        let stream = self.control.get_mut();
        stream
            .set_read_timeout(Some(limit + CHANNEL_SLACK))
            .context("the control channel")?;
        stream
            .write_all(request.as_bytes())
            .context("the control channel")?;
        let line = self
            .line_starting(&format!("@@ {} ", self.sequence))
            .with_context(|| format!("guest {} did not answer to\n{script}", self.name))?;
        let mut words = line.split_ascii_whitespace().skip(2);
        let code = words
            .next()
            .and_then(|word| word.parse().ok())
            .with_context(|| format!("answer {line:?}"))?;
        let output = BASE64
            .decode(words.next().unwrap_or("").as_bytes())
            .context("the guest's answer")?;
        Ok(Answer {
            code,
            output: String::from_utf8_lossy(&output).into_owned(),
        })
    }

    /// Waits until a script succeeds.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub fn wait_for(&mut self, what: &str, limit: Duration, script: &str) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.ask(REQUEST_LIMIT, script)?;
            if answer.code == 0 {
                return Ok(answer.output);
            }
            ensure!(
                Instant::now() < deadline,
                "guest {}: {what}: not after {limit:?}, exit code {}\n{}",
                self.name,
                answer.code,
                answer.output
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn line_starting(&mut self, start: &str) -> Result<String> {
        loop {
            let mut line = String::new();
            let count = self
                .control
                .read_line(&mut line)
                .with_context(|| format!("waiting for {start:?}"))?;
            ensure!(
                count > 0,
                "the guest's control channel ended while waiting for {start:?}"
            );
            if line.starts_with(start) {
                return Ok(line);
            }
        }
    }
}

fn initrd_with(base: &Path, payload: &[Payload]) -> Result<Vec<u8>> {
    let mut bytes = fs::read(base).with_context(|| format!("reading {}", base.display()))?;
    // A second archive starts at a multiple of four bytes.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut archive = Archive::default();
    for file in payload {
        archive.file(&format!("payload/{}", file.name), file.mode, &file.content);
    }
    bytes.extend_from_slice(&archive.finish());
    Ok(bytes)
}

fn qemu(
    vm: &Path,
    initrd: &Path,
    socket: &Path,
    console: &Path,
    initiator: &str,
    forwarded: &[(u16, u16)],
) -> Result<Command> {
    let mut network = "user,id=n0,ipv6=off".to_owned();
    for (guest, host) in forwarded {
        network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
    }
    let mut command = tool("qemu-system-x86_64")?;
    command
        .args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "768",
            "-M",
            "q35",
        ])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(vm.join("vmlinuz"))
        .arg("-initrd")
        .arg(initrd)
        // no_timer_check: on a busy host the emulated timer may tick too late for the kernel's own test of it, and it panics.
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check guest.initiator={initiator}"
        ))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-serial")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        // snapshot=on: the root disk is one for all guests; what one writes goes to a file without a name.
        .arg("-drive")
        .arg(format!(
            "file={},if=none,id=root,format=raw,snapshot=on",
            vm.join("root.img").display()
        ))
        .args(["-device", "virtio-blk-pci,drive=root", "-netdev", &network])
        .args(["-device", "virtio-net-pci,netdev=n0,romfile="]);
    Ok(command)
}
