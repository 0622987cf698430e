//! `agent.toml` in ProgramData: every key is optional, an unknown one is an error.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use stillpoint_agentproto::LunId;

/// VSS itself lets go after 10 s.
const HOLD_MS_MAX: u64 = 9_000;
/// The target's margin of a second has to fit.
const HOLD_MS_MIN: u64 = 2_000;
/// A day.
const INTERVAL_S_MAX: u64 = 86_400;

/// As meant.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Snapshot channels: targets dial this.
    pub(crate) listen: SocketAddr,
    /// The port that the target has to dial, behind address translation.
    pub(crate) advertise_port: Option<u16>,
    /// Key, enrolled targets, choices.
    pub(crate) state_dir: PathBuf,
    /// The longest hold granted.
    pub(crate) hold_max: Duration,
    /// Rest between two freezes of one LUN.
    pub(crate) min_interval: Duration,
    /// Initiator names that Windows does not show.
    pub(crate) initiators: Vec<String>,
    /// Filter of the log.
    pub(crate) log: String,
    /// Checkpoints with memory instead of production checkpoints.
    pub(crate) memory_checkpoints: bool,
    /// PowerShell.
    pub(crate) powershell: PathBuf,
    /// Folders that stand for a LUN (tests).
    pub(crate) test_luns: Vec<TestLun>,
}

/// Test only: a folder that stands for a volume on a LUN.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TestLun {
    /// The folder.
    pub(crate) path: String,
    /// The LUN.
    pub(crate) naa: LunId,
    /// Page 0x80.
    #[serde(default)]
    pub(crate) serial: String,
}

/// How VMs are made consistent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Checkpoints {
    /// Through the Hyper-V VSS writer, inside the guests.
    #[default]
    Production,
    /// A checkpoint with memory of each VM, before the cut.
    Memory,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HyperVSpec {
    checkpoints: Checkpoints,
    powershell: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Spec {
    listen: Option<String>,
    advertise_port: Option<u16>,
    state_dir: Option<PathBuf>,
    hold_ms_max: Option<u64>,
    min_interval_s: Option<u64>,
    initiators: Vec<String>,
    log: Option<String>,
    hyperv: HyperVSpec,
    test_lun: Vec<TestLun>,
}

/// `C:\ProgramData\Stillpoint`.
pub(crate) fn home() -> PathBuf {
    std::env::var_os("ProgramData")
        .map_or_else(|| PathBuf::from(r"C:\ProgramData"), PathBuf::from)
        .join("Stillpoint")
}

impl Config {
    /// Reads `path`; without one the usual place, where the file may be missing.
    pub(crate) fn load(path: Option<&Path>) -> anyhow::Result<Self> {
        let usual = home().join("agent.toml");
        let file = path.unwrap_or(&usual);
        match std::fs::read_to_string(file) {
            Ok(text) => Self::parse(&text).with_context(|| file.display().to_string()),
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => Self::parse(""),
            Err(error) => Err(error).with_context(|| file.display().to_string()),
        }
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let spec: Spec = toml::from_str(text)?;
        let listen = spec.listen.as_deref().unwrap_or("0.0.0.0:11169");
        let Ok(listen) = listen.parse() else {
            bail!("`listen = {listen:?}` is no address: write ADDR:PORT, \"0.0.0.0:11169\"");
        };
        if spec.advertise_port == Some(0) {
            bail!("`advertise_port = 0` cannot be dialled: write the port that the target reaches");
        }
        let within = |key, value: Option<u64>, default, low, high| match value.unwrap_or(default) {
            value if (low..=high).contains(&value) => Ok(value),
            value => bail!("`{key} = {value}` is out of range: write {low} to {high}"),
        };
        let hold = within("hold_ms_max", spec.hold_ms_max, 8_000, HOLD_MS_MIN, HOLD_MS_MAX)?;
        let interval = within("min_interval_s", spec.min_interval_s, 10, 1, INTERVAL_S_MAX)?;
        if let Some(bad) = spec
            .initiators
            .iter()
            .find(|name| !["iqn.", "eui.", "naa."].iter().any(|kind| name.starts_with(kind)))
        {
            bail!("`initiators`: {bad:?} is no initiator name: write iqn.…, eui.… or naa.…");
        }
        Ok(Self {
            listen,
            advertise_port: spec.advertise_port,
            state_dir: spec.state_dir.unwrap_or_else(|| home().join("state")),
            hold_max: Duration::from_millis(hold),
            min_interval: Duration::from_secs(interval),
            initiators: spec.initiators,
            log: spec.log.unwrap_or_else(|| "info".to_owned()),
            memory_checkpoints: spec.hyperv.checkpoints == Checkpoints::Memory,
            powershell: spec
                .hyperv
                .powershell
                .unwrap_or_else(|| PathBuf::from("powershell.exe")),
            test_luns: spec.test_lun,
        })
    }

    /// The port that the target dials.
    pub(crate) fn dialled_port(&self) -> u16 {
        self.advertise_port.unwrap_or_else(|| self.listen.port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let shipped = Config::parse(include_str!("../packaging/agent.toml")).expect("the shipped file");
        let default = Config::parse("").expect("no file");
        assert_eq!(
            (shipped.listen, shipped.hold_max),
            (default.listen, default.hold_max)
        );
        assert_eq!(
            (shipped.min_interval, &shipped.log),
            (default.min_interval, &default.log)
        );
        assert!(!shipped.memory_checkpoints && shipped.test_luns.is_empty());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_way_out() {
        for (text, word) in [
            ("listen = \"here\"", "ADDR:PORT"),
            ("advertise_port = 0", "advertise_port"),
            ("hold_ms_max = 10000", "2000 to 9000"),
            ("min_interval_s = 0", "1 to 86400"),
            ("initiators = [\"me\"]", "iqn."),
            ("hyperv.checkpoints = \"saved\"", "memory"),
            ("[[test_lun]]\npath = 'S:\\'\nnaa = \"sda\"", "naa"),
            ("colour = 1", "colour"),
        ] {
            let error = format!("{:#}", Config::parse(text).expect_err(text));
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(
            Config::parse("hyperv.checkpoints = \"memory\"")
                .expect("good")
                .memory_checkpoints
        );
    }
}
