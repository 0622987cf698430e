//! What this agent takes part in, chosen by the operator and changed without a new enrolment: `features.json` in the state
//! directory holds the choices that differ from the default. A running agent notices a change within a second, and registers anew.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use stillpoint_agentproto::message::Capabilities;

use crate::config::Config;
use crate::state::{self, StateError};

/// The file in the state directory.
pub(crate) const FILE: &str = "features.json";

/// Something an agent may do, or leave to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Feature {
    /// Freeze the file systems of this host
    LinuxFs,
    /// Run the executables of the hooks' directory
    Hooks,
    /// Freeze the guests of this KVM host through libvirt and their qemu-ga
    Libvirt,
}

/// All of them, in the order of `features`.
pub(crate) const ALL: [Feature; 3] = [Feature::LinuxFs, Feature::Hooks, Feature::Libvirt];

impl Feature {
    /// As the command line and the target spell it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::LinuxFs => "linux-fs",
            Self::Hooks => "hooks",
            Self::Libvirt => "libvirt",
        }
    }

    /// As the wire spells it.
    fn capability(self) -> Capabilities {
        match self {
            Self::LinuxFs => Capabilities::LINUX_FS,
            Self::Hooks => Capabilities::HOOKS,
            Self::Libvirt => Capabilities::LIBVIRT,
        }
    }

    /// Without a choice. libvirt has to be asked for: its guests are other people's machines.
    fn default_on(self) -> bool {
        self != Self::Libvirt
    }
}

/// Why a feature that is switched on would not work here.
pub(crate) fn trouble(feature: Feature, config: &Config) -> Option<String> {
    let virsh = &config.libvirt.virsh;
    (feature == Feature::Libvirt && !virsh.exists()).then(|| {
        format!(
            "{} is missing: install libvirt-clients, or set `virsh` in [libvirt] of agent.toml",
            virsh.display()
        )
    })
}

/// The choices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Features(BTreeMap<Feature, bool>);

impl Features {
    /// Reads the choices; none were made when there is no file.
    pub(crate) fn load(state_dir: &Path) -> Result<Self, StateError> {
        let path = state_dir.join(FILE);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| StateError::Corrupt {
                path,
                what: format!("{error}; remove it to have the defaults"),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(StateError::Io { path, error }),
        }
    }

    /// Keeps the choices.
    pub(crate) fn store(&self, state_dir: &Path) -> Result<(), StateError> {
        let path = state_dir.join(FILE);
        let text = serde_json::to_vec(self).map_err(|error| StateError::Corrupt {
            path: path.clone(),
            what: error.to_string(),
        })?;
        state::replace(&path, &text).map_err(|error| StateError::Io { path, error })
    }

    /// Is it switched on?
    pub(crate) fn has(&self, feature: Feature) -> bool {
        self.0
            .get(&feature)
            .copied()
            .unwrap_or_else(|| feature.default_on())
    }

    /// Switches it on or off; whether that changed anything.
    pub(crate) fn set(&mut self, feature: Feature, on: bool) -> bool {
        let changes = self.has(feature) != on;
        self.0.insert(feature, on);
        changes
    }

    /// What Hello and Register say.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let on = ALL.into_iter().filter(|feature| self.has(*feature));
        Capabilities(on.fold(0, |bits, feature| bits | feature.capability().0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_kept_and_the_rest_is_the_default() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut features = Features::load(dir.path()).expect("no file");
        assert_eq!(features, Features::default());
        let usual = Capabilities::LINUX_FS.0 | Capabilities::HOOKS.0;
        assert_eq!(features.capabilities(), Capabilities(usual));
        assert!(features.set(Feature::Hooks, false) && features.set(Feature::Libvirt, true));
        assert!(!features.set(Feature::LinuxFs, true), "it was on");
        features.store(dir.path()).expect("written");
        let read = Features::load(dir.path()).expect("read");
        assert_eq!(read, features);
        let chosen = Capabilities::LINUX_FS.0 | Capabilities::LIBVIRT.0;
        assert_eq!(read.capabilities(), Capabilities(chosen));
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join(FILE), "{\"warp-drive\": true}").expect("write");
        let error = Features::load(dir.path()).expect_err("an unknown feature");
        assert!(error.to_string().contains(FILE), "{error}");
    }

    #[test]
    fn names_are_those_of_the_wire() {
        for feature in ALL {
            assert_eq!(feature.capability().names(), [feature.name()]);
        }
    }
}
