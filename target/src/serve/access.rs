//! Who may see and use which target through which portal: the protocol's view of the registry.

use std::net::SocketAddr;
use std::sync::Arc;

use stillpoint_config::{Chap, ChapAlgorithm, Credentials};
use stillpoint_iscsi::{
    ChapPolicy, ConnectionConfig, Directory, DiscoveryAsk, Isid, LoginAsk, LoginStatus, TargetGrant,
    TargetRecord, Tsih,
};

use super::Daemon;
use super::registry::{Session, TargetRules};

/// The targets as one connection may see them.
pub(crate) struct Portal {
    daemon: Arc<Daemon>,
}

impl Portal {
    pub(crate) fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }
}

/// The settings of a new connection.
///
/// # Errors
/// When the system gives no randomness: CHAP challenges without it could be replayed.
pub(crate) fn connection_config(
    daemon: &Daemon,
    peer: SocketAddr,
    local: SocketAddr,
    portal_group: u16,
) -> Result<ConnectionConfig, getrandom::Error> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)?;
    let mut config = ConnectionConfig::new(peer, local, portal_group, seed);
    config.memory = Some(Arc::clone(&daemon.memory));
    Ok(config)
}

impl Directory for Portal {
    fn login(&self, ask: &LoginAsk<'_>) -> Result<TargetGrant, LoginStatus> {
        let Some(name) = ask.target else {
            return Ok(TargetGrant {
                target: 0,
                alias: None,
                portal_group: ask.portal_group,
                chap: None,
            });
        };
        let refuse = |status: LoginStatus, why: &str| {
            tracing::warn!(initiator = ask.initiator, target_name = name, peer = %ask.peer, "login refused: {why}");
            status
        };
        let target = self.daemon.registry.target(name).ok_or_else(|| {
            refuse(
                LoginStatus::NotFound,
                "no target has this name (`stillpoint lun list` shows them)",
            )
        })?;
        let rules = target.rules();
        if !rules.access.admits(ask.initiator, ask.peer.ip()) {
            let why = "the target's `initiators` and `allow_from` do not admit it";
            return Err(refuse(LoginStatus::AuthorizationFailure, why));
        }
        if !rules.portal_groups.contains(&ask.portal_group) {
            return Err(
                match self
                    .daemon
                    .registry
                    .addresses(&rules, ask.local)
                    .into_iter()
                    .next()
                {
                    // "Temporarily", because the configuration may change again.
                    Some((address, _)) => {
                        tracing::info!(initiator = ask.initiator, target_name = name, %address, "login redirected to the target's portal group");
                        LoginStatus::MovedTemporarily(address)
                    }
                    None => refuse(
                        LoginStatus::NotFound,
                        "the target is not reached through this portal's group (`portal_groups`), and its own has no portal here",
                    ),
                },
            );
        }
        let chap = rules.chap.as_ref().map(policy).transpose().map_err(|error| {
            tracing::error!(target_name = name, %error, "CHAP of the target cannot be used");
            LoginStatus::TargetError
        })?;
        Ok(TargetGrant {
            target: target.key(),
            alias: alias(&rules),
            portal_group: ask.portal_group,
            chap,
        })
    }

    fn has_session(&self, initiator: &str, isid: Isid, tsih: Tsih) -> bool {
        let named = |session: &Session| {
            session.tsih == tsih.0
                && session.isid == isid.0
                && session.is_active()
                && session.initiator.eq_ignore_ascii_case(initiator)
        };
        !self.daemon.registry.sessions_with(named).is_empty()
    }

    fn discover(&self, ask: &DiscoveryAsk<'_>) -> Vec<TargetRecord> {
        let targets = self.daemon.registry.targets();
        let wanted = targets.iter().filter(|target| {
            ask.target
                .is_none_or(|name| name.eq_ignore_ascii_case(target.iqn()))
        });
        wanted
            .filter_map(|target| {
                let rules = target.rules();
                // An initiator that may not log in does not learn that the target exists.
                let admitted = rules.access.admits(ask.initiator, ask.peer.ip());
                let portals = if admitted {
                    self.daemon.registry.addresses(&rules, ask.local)
                } else {
                    Vec::new()
                };
                (!portals.is_empty()).then(|| TargetRecord {
                    name: target.iqn().to_owned(),
                    portals,
                })
            })
            .collect()
    }
}

/// TargetAlias: what the operator calls it.
fn alias(rules: &TargetRules) -> Option<String> {
    let names: Vec<&str> = rules.luns.iter().map(|(_, lun)| lun.name()).collect();
    // A long list says nothing to a person, and the key's value is at most 255 bytes (RFC 7143 §13.6).
    Some(names.join(",")).filter(|text| !text.is_empty() && text.len() <= 64)
}

fn policy(chap: &Chap) -> Result<ChapPolicy, stillpoint_iscsi::ChapPolicyError> {
    let Credentials { user, secret } = &chap.initiator;
    let mutual = chap
        .mutual
        .as_ref()
        .map(|mutual| (mutual.user.clone(), mutual.secret.expose().to_vec()));
    let algorithms = chap.algorithms.iter().map(|algorithm| match algorithm {
        ChapAlgorithm::Sha3_256 => stillpoint_iscsi::ChapAlgorithm::Sha3_256,
        ChapAlgorithm::Sha256 => stillpoint_iscsi::ChapAlgorithm::Sha256,
        ChapAlgorithm::Sha1 => stillpoint_iscsi::ChapAlgorithm::Sha1,
        ChapAlgorithm::Md5 => stillpoint_iscsi::ChapAlgorithm::Md5,
    });
    ChapPolicy::new(
        user.clone(),
        secret.expose().to_vec(),
        mutual,
        algorithms.collect::<Vec<_>>(),
    )
}
