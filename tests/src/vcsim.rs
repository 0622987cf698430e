//! A vCenter with three hosts and two datastores, the first of them on the LUN of a daemon (`tests/vm/vcsim`).

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::{Running, wait_until};
use crate::tools::made;

/// It starts in less than two seconds on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(60);
/// One question of a test.
const ASK_LIMIT: Duration = Duration::from_secs(30);
/// Who the agent logs in as; the password of no other machine.
pub const USER: &str = "agent@vsphere.local";
/// Looked for in every log.
pub const PASSWORD: &str = "f00l-0f-a-p4ssw0rd";

/// The running simulator.
#[derive(Debug)]
pub struct Vcsim {
    running: Running,
    sdk: String,
    control: String,
    fingerprint: String,
}

impl Vcsim {
    /// Starts it. `content`: a program that prints `cut` when the LUN is back at its snapshot.
    ///
    /// # Errors
    /// It cannot be built, or does not come up.
    pub fn start(dir: &Path, naa: &str, iqns: &[&str], content: &Path) -> Result<Self> {
        let program = made("vcsim", "vcsim")?.join("bin/vcsim");
        let mut command = Command::new(program);
        // Datastores are directories in its temporary directory.
        command
            .env("TMPDIR", dir)
            .args(["-username", USER, "-password", PASSWORD, "-luns", naa])
            .args(["-iqns", &iqns.join(",")])
            .arg("-content")
            .arg(content);
        let running = Running::start("vcsim", &mut command, &dir.join("vcsim.log"))?;
        let mut line = None;
        wait_until("the vCenter to start", START_LIMIT, || {
            line = running
                .output()
                .lines()
                .find(|line| line.starts_with("vcsim sdk="))
                .map(str::to_owned);
            Ok(line.is_some())
        })?;
        let line = line.unwrap_or_default();
        let word = |key: &str| {
            let found = line.split(' ').find_map(|word| word.strip_prefix(key));
            found
                .map(str::to_owned)
                .with_context(|| format!("no {key} in {line:?}"))
        };
        Ok(Self {
            sdk: word("sdk=")?,
            control: word("control=")?,
            fingerprint: word("sha256=")?,
            running,
        })
    }

    /// `HOST:PORT` of the SDK.
    #[must_use]
    pub fn sdk(&self) -> &str {
        &self.sdk
    }

    /// SHA-256 of its certificate.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Everything that it logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.running.output()
    }

    /// Asks the control port.
    ///
    /// # Errors
    /// No answer, or none with status 200.
    pub fn control(&self, path: &str, body: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(&self.control)?;
        stream.set_read_timeout(Some(ASK_LIMIT))?;
        write!(
            stream,
            "POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        ensure!(head.contains(" 200 "), "{path}: {answer}");
        Ok(serde_json::from_str(body)?)
    }

    /// Hosts, VMs, and the calls since the last reset.
    ///
    /// # Errors
    /// No answer.
    pub fn state(&self) -> Result<Value> {
        self.control("/state", "")
    }

    /// Forgets calls and rules.
    ///
    /// # Errors
    /// No answer.
    pub fn reset(&self) -> Result<()> {
        self.control("/reset", "").map(drop)
    }

    /// What happens to a call: `{"At": 3, "Kind": "lost"}`.
    ///
    /// # Errors
    /// No answer.
    pub fn rule(&self, rule: &str) -> Result<()> {
        self.control("/rule", rule).map(drop)
    }

    /// Changes a VM.
    ///
    /// # Errors
    /// No such VM or change.
    pub fn vm(&self, name: &str, set: &str) -> Result<()> {
        self.control(&format!("/vm?name={name}&set={set}"), "").map(drop)
    }
}
