//! What the agent says about itself and its host.

use stillpoint_agentproto::message::{Capabilities, Hello, Register};
use stillpoint_agentproto::{AgentId, LunId, VERSION};

use crate::config::Config;
use crate::platform::Platform;

/// Initiator names that fit into a message.
const INITIATORS_MAX: usize = 256;

/// The first frame of this agent on any connection.
pub(crate) fn hello(agent_id: AgentId, capabilities: Capabilities) -> Hello {
    Hello {
        min_version: VERSION,
        max_version: VERSION,
        agent_id: Some(agent_id),
        product: format!("stillpoint-agent {} (Windows)", env!("CARGO_PKG_VERSION")),
        capabilities,
    }
}

/// The host's name, as its environment has it.
pub(crate) fn name(_root: &crate::volumes::Root) -> String {
    std::env::var("COMPUTERNAME")
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unnamed".to_owned())
}

/// What Register says.
pub(crate) fn register(
    platform: &dyn Platform,
    config: &Config,
    features: Capabilities,
    mounted: Vec<LunId>,
) -> Register {
    Register {
        host: name(&crate::volumes::Root::real()),
        os: platform.os(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: platform.boot_id(),
        listen_port: config.dialled_port(),
        advertise_host: None,
        features,
        initiators: initiators(platform, config),
        mounted,
    }
}

/// Every initiator name of the host.
pub(crate) fn initiators(platform: &dyn Platform, config: &Config) -> Vec<String> {
    let mut names = platform.initiators();
    names.extend(config.initiators.iter().cloned());
    names.sort_unstable();
    names.dedup();
    names.truncate(INITIATORS_MAX);
    names
}
