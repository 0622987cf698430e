//! The rest of the daemon, as seen from here, and the limits of what agents can be used with.

use std::sync::Arc;

use stillpoint_agentproto::message::{LunIdentity, Reply, Request};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal as WireRefusal};

use crate::serve::Daemon;
use crate::serve::events::Code;
use crate::serve::vss::{self, Asker};

/// What this module has to know of a LUN.
#[derive(Clone, Debug)]
pub(crate) struct LunFacts {
    pub(crate) name: String,
    pub(crate) identity: LunIdentity,
    /// Every target that serves it, and what it is like.
    pub(crate) targets: Vec<TargetFacts>,
}

/// What this module has to know of a target.
#[derive(Clone, Debug)]
pub(crate) struct TargetFacts {
    pub(crate) iqn: String,
    pub(crate) agents: bool,
    pub(crate) chap: bool,
    pub(crate) luns: usize,
    pub(crate) portal_groups: usize,
}

/// The rest of the daemon, as seen from here.
pub(crate) trait Site: Send + Sync + 'static {
    /// The LUN of that name, if it is served.
    fn lun(&self, name: &str) -> Option<LunFacts>;
    /// The LUN of that identity, if it is served.
    fn lun_by_id(&self, lun: LunId) -> Option<LunFacts>;
    /// The initiator of each session on a LUN.
    fn initiators(&self, lun: &str) -> Vec<String>;
    /// Carries out a request of the VSS hardware provider. Blocks.
    ///
    /// # Errors
    /// What the rules or the store refuse.
    fn provide(self: Arc<Self>, asker: Asker, request: Request) -> Result<Reply, WireRefusal>;
    /// Something happened.
    fn event(&self, code: Code, subject: String, text: String, who: &str);
}

impl Site for Daemon {
    fn lun(&self, name: &str) -> Option<LunFacts> {
        let lun = self.registry.lun(name)?;
        let targets = self.registry.targets_of(name);
        let first = targets.first();
        let identity = LunIdentity {
            lun: LunId(lun.identity().naa),
            serial: Some(lun.identity().serial.clone()),
            iqn: first.map(|target| target.iqn().to_owned()),
            number: first.and_then(|target| target.rules().number_of(&lun)),
            size_bytes: Some(lun.backend().size_bytes()),
        };
        let targets = targets.iter().map(|target| {
            let rules = target.rules();
            TargetFacts {
                iqn: target.iqn().to_owned(),
                agents: rules.agents,
                chap: rules.chap.is_some(),
                luns: rules.luns.len(),
                portal_groups: rules.portal_groups.len(),
            }
        });
        Some(LunFacts {
            name: name.to_owned(),
            identity,
            targets: targets.collect(),
        })
    }

    fn lun_by_id(&self, lun: LunId) -> Option<LunFacts> {
        let luns = self.registry.luns();
        let found = luns.iter().find(|served| served.identity().naa == lun.0)?;
        self.lun(found.name())
    }

    fn initiators(&self, lun: &str) -> Vec<String> {
        self.registry
            .sessions_of_lun(lun)
            .into_iter()
            .map(|session| session.initiator)
            .collect()
    }

    fn provide(self: Arc<Self>, asker: Asker, request: Request) -> Result<Reply, WireRefusal> {
        vss::serve(&self, &asker, request)
    }

    fn event(&self, code: Code, subject: String, text: String, who: &str) {
        self.events.emit(code, subject, text, who);
    }
}

/// The limits of the application note (agent-protocol.md §8), checked at `agent allow` and before every snapshot. A target with
/// `agents = true` cannot break them; a LUN that is served by another one can.
pub(crate) fn limits(lun: &LunFacts) -> Result<(), WireRefusal> {
    broken_limits(lun).into_iter().next().map_or(Ok(()), Err)
}

/// All of them that are broken.
pub(super) fn broken_limits(lun: &LunFacts) -> Vec<WireRefusal> {
    let name = &lun.name;
    let refuse = |code, text: String| WireRefusal::new(code, text).about(name.clone());
    let mut broken = Vec::new();
    if lun.targets.is_empty() {
        let text = format!("LUN {name} is served by no target: give it one with `agents = true`");
        broken.push(refuse(ErrorCode::NotAllowed, text));
    }
    if lun.targets.len() > 1 {
        let text = format!(
            "LUN {name} is served by several targets: with agents it has one path, remove the others"
        );
        broken.push(refuse(ErrorCode::LimitMpio, text));
    }
    for target in &lun.targets {
        let iqn = &target.iqn;
        if !target.agents {
            let text = format!(
                "target {iqn} of LUN {name} is not used with agents: write `agents = true` there, then `config apply`"
            );
            broken.push(refuse(ErrorCode::NotAllowed, text));
        }
        if target.chap {
            let text =
                format!("target {iqn} uses CHAP, which cannot be used with agents: remove one of them");
            broken.push(refuse(ErrorCode::LimitChap, text));
        }
        if target.luns > 1 {
            let text = format!(
                "target {iqn} carries {} LUNs: a LUN with agents has a target of its own",
                target.luns
            );
            broken.push(refuse(ErrorCode::LimitMultiLun, text));
        }
        if target.portal_groups > 1 {
            let text = format!(
                "target {iqn} is reached through several portal groups: a LUN with agents has one path"
            );
            broken.push(refuse(ErrorCode::LimitMpio, text));
        }
    }
    broken
}
