//! What this agent takes part in: chosen with `features`, kept in `features.json` of the state directory, changed while the
//! agent runs and without a new enrolment.

use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use stillpoint_agentproto::message::Capabilities;

const FILE: &str = "features.json";

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Feature {
    /// Drives VSS writers for snapshots that the target takes
    VssRequester,
    /// Serves backup programs of this host as VSS hardware provider
    VssProvider,
    /// Lets the VMs of Hyper-V take part
    Hyperv,
    /// Lets SQL Server take part
    Mssql,
}

/// Which are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub(crate) struct Features {
    /// Snapshots of the target.
    pub(crate) vss_requester: bool,
    /// Snapshots of backup programs.
    pub(crate) vss_provider: bool,
    /// VMs.
    pub(crate) hyperv: bool,
    /// SQL Server.
    pub(crate) mssql: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            vss_requester: true,
            vss_provider: true,
            hyperv: true,
            mssql: true,
        }
    }
}

impl Features {
    /// As chosen; all of them before anything was chosen.
    pub(crate) fn load(state_dir: &Path) -> anyhow::Result<Self> {
        let path = state_dir.join(FILE);
        match std::fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(anyhow::anyhow!("{}: {error}", path.display())),
        }
    }

    /// Keeps the choice.
    pub(crate) fn write(&self, state_dir: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        Ok(crate::state::replace(&state_dir.join(FILE), &text)?)
    }

    /// Switches one.
    pub(crate) fn set(&mut self, feature: Feature, on: bool) {
        *match feature {
            Feature::VssRequester => &mut self.vss_requester,
            Feature::VssProvider => &mut self.vss_provider,
            Feature::Hyperv => &mut self.hyperv,
            Feature::Mssql => &mut self.mssql,
        } = on;
    }

    /// Name and state of each.
    pub(crate) fn all(&self) -> [(&'static str, bool); 4] {
        [
            ("vss-requester", self.vss_requester),
            ("vss-provider", self.vss_provider),
            ("hyperv", self.hyperv),
            ("mssql", self.mssql),
        ]
    }

    /// As the protocol tells them.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let bits = [
            (self.vss_requester, Capabilities::VSS_REQUESTER),
            (self.vss_provider, Capabilities::VSS_PROVIDER),
            (self.hyperv, Capabilities::HYPERV),
            (self.mssql, Capabilities::MSSQL),
        ];
        let on = bits.into_iter().filter(|(on, _)| *on);
        on.fold(Capabilities::default(), |all, (_, bit)| all.with(bit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_kept_and_told() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut features = Features::load(dir.path()).expect("the default");
        assert_eq!(
            features.capabilities().names(),
            ["vss-requester", "vss-provider", "hyperv", "mssql"]
        );
        features.set(Feature::Hyperv, false);
        features.write(dir.path()).expect("written");
        let again = Features::load(dir.path()).expect("read");
        assert_eq!(
            again.capabilities().names(),
            ["vss-requester", "vss-provider", "mssql"]
        );
        std::fs::write(dir.path().join(FILE), r#"{"vmware":true}"#).expect("written");
        assert!(
            Features::load(dir.path())
                .expect_err("unknown")
                .to_string()
                .contains("features.json")
        );
    }
}
