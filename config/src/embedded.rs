//! The built-in configuration of `stillpoint serve` without a file.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use crate::config::{
    Access, AgentTarget, Agents, Checksums, CompanyId, Config, Daemon, Grain, Http, Initiators, Lun,
    OnFailure, Origin, Pool, Portal, Target, TargetKind,
};
use crate::limits::{AGENT_PORT, ISCSI_PORT, SESSION_MEMORY};
use crate::name::{IscsiName, LunName};
use crate::problem::Problem;
use crate::size::Size;

/// Data directory of the built-in configuration, below the working directory.
pub const EMBEDDED_DATA_DIR: &str = "stillpoint-data";
/// The one LUN of the built-in configuration.
pub const EMBEDDED_LUN: &str = "demo";
/// The one target of the built-in configuration.
pub const EMBEDDED_IQN: &str = "iqn.2026-11.io.stillpoint:demo";

impl Config {
    /// The built-in configuration: one thin 1 GiB LUN for anyone on this machine, or on `listen`.
    #[must_use]
    pub fn embedded(data_dir: PathBuf, listen: Option<SocketAddr>) -> Self {
        let name: LunName = EMBEDDED_LUN.parse().expect("a constant that the tests parse");
        let iqn: IscsiName = EMBEDDED_IQN.parse().expect("a constant that the tests parse");
        let open = listen.filter(|address| !address.ip().is_loopback());
        let warnings = open.map(|address| Problem {
            file: "--listen".into(),
            line: 0,
            thing: format!("target {EMBEDDED_IQN:?}"),
            trouble: format!("any initiator that reaches {address} may log in, without a password"),
            way_out: "use it for a demonstration only; a configuration file names the initiators".to_owned(),
        });
        let warnings = warnings.into_iter().collect();
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            origin: Origin::Embedded,
            daemon: Daemon {
                control_socket: data_dir.join("control.sock"),
                data_dir,
                naa_company_id: CompanyId::default(),
                session_memory: SESSION_MEMORY,
            },
            portals: vec![Portal {
                address: listen.unwrap_or_else(|| local(ISCSI_PORT)),
                group: 1,
                advertise: None,
            }],
            pool: Pool {
                grain: Grain::Auto,
                cache: Size(256 << 20),
                max_size: None,
            },
            luns: vec![Lun {
                name: name.clone(),
                size: Size(1 << 30),
                block_size: 512,
                write_cache: true,
                checksums: Checksums::Sealed,
                read_only: false,
            }],
            targets: vec![Target {
                iqn,
                access: Access {
                    initiators: Initiators::Anyone,
                    allow_from: Vec::new(),
                },
                // With agents, so that the first LUN can also be the first application-consistent snapshot.
                kind: TargetKind::Agent(AgentTarget {
                    lun: name,
                    portal_group: 1,
                }),
            }],
            agents: Some(Agents {
                listen: local(AGENT_PORT),
                discovery: false,
                on_failure: OnFailure::Fail,
            }),
            schedules: Vec::new(),
            http: Some(Http {
                listen: local(8480),
                tls: None,
                users: Vec::new(),
            }),
            metrics: None,
            warnings,
            unserved: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_is_what_the_contract_says() {
        let config = Config::embedded(EMBEDDED_DATA_DIR.into(), None);
        assert_eq!(config.portals[0].address.to_string(), "127.0.0.1:3260");
        assert_eq!(
            config.daemon.control_socket,
            PathBuf::from("stillpoint-data/control.sock")
        );
        assert_eq!(config.lun("demo").expect("demo").size, Size(1 << 30));
        assert_eq!(config.targets_of("demo").count(), 1);
        assert!(config.unserved().is_empty());
        let open = Config::embedded("x".into(), Some("0.0.0.0:3260".parse().expect("address")));
        assert_eq!(open.portals[0].address.to_string(), "0.0.0.0:3260");
        assert!(config.warnings.is_empty() && open.warnings[0].to_string().contains("without a password"));
    }
}
