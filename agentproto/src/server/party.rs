//! One agent, as the coordinator of a snapshot sees it.

use std::time::{Duration, Instant};

use super::Candidate;
use crate::error::{ErrorCode, Refusal};
use crate::freeze::{Evidence, HOLD_VSS};
use crate::ident::LunId;
use crate::message::{App, Capabilities, Finding, Frozen, LunVolumes, Prepared, Role, Thawed, Volumes};
use crate::server::verdict::{AgentReport, Outcome};

/// The steps that wait for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    ListVolumes,
    Preflight,
    Prepare,
    Freeze,
    Release,
    Complete,
    Abort,
}

/// The one request that waits for an answer (pings apart).
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) number: u64,
    pub(super) step: Step,
    pub(super) deadline: Instant,
}

#[derive(Debug)]
pub(super) struct Party {
    pub(super) who: Candidate,
    pub(super) call: Option<Call>,
    pub(super) retry: Option<(Instant, Step)>,
    /// When the step that is repeated failed first.
    pub(super) unreached_since: Option<Instant>,
    /// Its registration lives.
    pub(super) registered: bool,
    pub(super) volumes: Option<Volumes>,
    pub(super) findings: Vec<Finding>,
    pub(super) prepare_sent: bool,
    pub(super) freeze_sent: bool,
    pub(super) prepared: Option<Prepared>,
    pub(super) frozen: Option<Frozen>,
    pub(super) thawed: Option<Thawed>,
    pub(super) failed: Option<Refusal>,
    pub(super) aborted: bool,
}

impl Party {
    pub(super) fn new(who: Candidate) -> Self {
        Self {
            who,
            call: None,
            retry: None,
            unreached_since: None,
            registered: true,
            volumes: None,
            findings: Vec::new(),
            prepare_sent: false,
            freeze_sent: false,
            prepared: None,
            frozen: None,
            thawed: None,
            failed: None,
            aborted: false,
        }
    }

    /// Nothing is under way with it.
    pub(super) fn is_settled(&self) -> bool {
        self.call.is_none() && self.retry.is_none()
    }

    /// Slowest to freeze first: VM snapshots are done already, VSS writers take their time before the hold begins.
    pub(super) fn freeze_class(&self) -> u8 {
        if self.who.capabilities.has(Capabilities::VMWARE) {
            0
        } else if self.who.capabilities.has(Capabilities::VSS_REQUESTER) {
            1
        } else {
            2
        }
    }

    /// The hold to ask for, in milliseconds.
    pub(super) fn hold_ms(&self, asked: Duration) -> u32 {
        let vss = self.who.capabilities.has(Capabilities::VSS_REQUESTER);
        let hold = if vss { asked.min(HOLD_VSS) } else { asked };
        u32::try_from(hold.as_millis()).unwrap_or(u32::MAX)
    }

    pub(super) fn volumes_of(&self, lun: LunId) -> Option<&LunVolumes> {
        self.volumes
            .as_ref()?
            .luns
            .iter()
            .find(|volumes| volumes.identity.lun == lun)
    }

    pub(super) fn role(&self, lun: LunId) -> Role {
        if !self.who.luns.contains(&lun) {
            return Role::None;
        }
        match (&self.volumes, self.volumes_of(lun)) {
            (_, Some(volumes)) => volumes.role,
            (Some(_), None) => Role::None,
            // "stays required until it says otherwise, also while disconnected"
            (None, _) if self.who.last_mounted.contains(&lun) => Role::Mounted,
            (None, _) => Role::None,
        }
    }

    /// The LUNs for which this agent has to freeze.
    pub(super) fn required_luns(&self) -> Vec<LunId> {
        self.who
            .luns
            .iter()
            .copied()
            .filter(|lun| self.role(*lun) == Role::Mounted)
            .collect()
    }

    pub(super) fn is_required(&self) -> bool {
        !self.required_luns().is_empty()
    }

    pub(super) fn has_initiator(&self, initiator: &str) -> bool {
        let known = self
            .volumes
            .as_ref()
            .map_or(&[][..], |volumes| &volumes.initiators);
        known.iter().any(|known| known.eq_ignore_ascii_case(initiator))
    }

    pub(super) fn evidence(&self) -> Option<Evidence<'_>> {
        Some(Evidence {
            prepared: self.prepared.as_ref()?,
            frozen: self.frozen.as_ref()?,
            thawed: self.thawed.as_ref()?,
        })
    }

    fn outcome(&self) -> Outcome {
        let standby = self.who.luns.iter().any(|lun| self.role(*lun) == Role::Standby);
        match (&self.failed, &self.thawed) {
            _ if !self.is_required() && standby => Outcome::Standby,
            _ if !self.is_required() => Outcome::NotInvolved,
            (_, Some(thawed)) if thawed.hold_ok => Outcome::HoldOk,
            (Some(refusal), _) if refusal.code == ErrorCode::Unreachable => Outcome::Unreachable,
            (Some(_), _) => Outcome::Failed,
            (None, Some(_)) => Outcome::HoldLost,
            (None, None) => Outcome::Aborted,
        }
    }

    /// Every application that it named, as it was last told. One that failed at a step is not named in the next ones; it must not
    /// be missing from the record.
    fn apps(&self) -> Vec<App> {
        let mut apps: Vec<App> = Vec::new();
        let told = [
            self.prepared.as_ref().map(|prepared| &prepared.apps),
            self.frozen.as_ref().map(|frozen| &frozen.apps),
            self.thawed.as_ref().map(|thawed| &thawed.apps),
        ];
        for app in told.into_iter().flatten().flatten() {
            let same = |known: &&mut App| {
                (&known.kind, &known.instance, &known.component) == (&app.kind, &app.instance, &app.component)
            };
            match apps.iter_mut().find(same) {
                Some(known) => known.clone_from(app),
                None => apps.push(app.clone()),
            }
        }
        apps
    }

    pub(super) fn report(&self) -> AgentReport {
        let reason = self.thawed.as_ref().and_then(|thawed| thawed.reason.clone());
        AgentReport {
            id: self.who.agent,
            host: self.who.host.clone(),
            version: self.who.version.clone(),
            fingerprint: self.who.fingerprint,
            outcome: self.outcome(),
            detail: self.failed.as_ref().map(ToString::to_string).or(reason),
            findings: self.findings.clone(),
            apps: self.apps(),
            exclusions: self
                .prepared
                .as_ref()
                .map(|prepared| prepared.exclusions.clone())
                .unwrap_or_default(),
            held_ms: self.thawed.as_ref().map(|thawed| thawed.held_ms),
        }
    }
}
