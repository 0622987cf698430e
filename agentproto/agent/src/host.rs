//! What the agent says about itself and its host.

use stillpoint_agentproto::message::{Capabilities, Hello, Register};
use stillpoint_agentproto::{AgentId, LunId, VERSION};

use crate::config::Config;
use crate::journal;
use crate::volumes::Root;

/// Initiator names that fit into a message.
pub(crate) const INITIATORS_MAX: usize = 256;

/// The first frame of this agent on any connection.
pub(crate) fn hello(agent_id: AgentId, capabilities: Capabilities) -> Hello {
    Hello {
        min_version: VERSION,
        max_version: VERSION,
        agent_id: Some(agent_id),
        product: format!("stillpoint-agent {}", env!("CARGO_PKG_VERSION")),
        capabilities,
    }
}

/// The host's name.
pub(crate) fn name(root: &Root) -> String {
    root.text("/proc/sys/kernel/hostname")
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unnamed".to_owned())
}

/// What Register says.
pub(crate) fn register(
    root: &Root,
    config: &Config,
    features: Capabilities,
    mounted: Vec<LunId>,
) -> Register {
    Register {
        host: name(root),
        os: os(root),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: journal::boot_id(root),
        listen_port: config.dialled_port(),
        advertise_host: config.advertise_host.map(|host| host.to_string()),
        features,
        initiators: initiators(root, config),
        mounted,
    }
}

/// Every initiator name of the host: the target refuses a label when a session on the LUN belongs to nobody it knows.
pub(crate) fn initiators(root: &Root, config: &Config) -> Vec<String> {
    let mut names = root.initiators();
    names.extend(config.initiators.iter().cloned());
    names.into_iter().take(INITIATORS_MAX).collect()
}

fn os(root: &Root) -> String {
    let release = root.text("/etc/os-release").unwrap_or_default();
    let pretty = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let system = pretty.map_or("Linux", |name| name.trim_matches('"')).to_owned();
    match root.text("/proc/sys/kernel/osrelease") {
        Some(kernel) => format!("{system}, Linux {kernel}"),
        None => system,
    }
}
