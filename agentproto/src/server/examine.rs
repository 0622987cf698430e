//! What would stand in the way of a snapshot, without taking one (`lun preflight`): the rules of a snapshot's preflight, all of
//! them instead of the first, in the same words.

use super::ask::{Candidate, Spec};
use super::party::Party;
use super::rules;
use crate::error::{ErrorCode, Refusal};
use crate::ident::{AgentId, LunId};
use crate::message::{Finding, LunVolumes, PreflightReport, Role, Severity, Volumes};

/// One agent that is asked, and what it said so far.
#[derive(Debug)]
pub struct Witness(Party);

/// Something that an operator should know, and whose agent found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The agent it is about, if it is one.
    pub agent: Option<AgentId>,
    /// What. Severity `Error`: the snapshot would be refused.
    pub finding: Finding,
}

impl Witness {
    /// An agent that was not asked yet.
    #[must_use]
    pub fn new(who: Candidate) -> Self {
        Self(Party::new(who))
    }

    /// What it sees. The LUNs to send Preflight for: those that it would have to freeze.
    pub fn saw(&mut self, volumes: Volumes) -> Vec<LunId> {
        self.0.volumes = Some(volumes);
        self.0.required_luns()
    }

    /// What its preflight found.
    pub fn found(&mut self, report: PreflightReport) {
        self.0.findings = report.findings;
    }

    /// It could not be asked, or refused to answer.
    pub fn failed(&mut self, refusal: Refusal) {
        self.0.failed = Some(refusal);
    }

    /// Who it is.
    #[must_use]
    pub fn who(&self) -> &Candidate {
        &self.0.who
    }

    /// Why it could not be asked.
    #[must_use]
    pub fn failure(&self) -> Option<&Refusal> {
        self.0.failed.as_ref()
    }

    /// What it is to a LUN, as far as is known.
    #[must_use]
    pub fn role(&self, lun: LunId) -> Role {
        self.0.role(lun)
    }

    /// What it sees of a LUN.
    #[must_use]
    pub fn volumes_of(&self, lun: LunId) -> Option<&LunVolumes> {
        self.0.volumes_of(lun)
    }

    /// Does it speak for this initiator?
    #[must_use]
    pub fn speaks_for(&self, lun: LunId, initiator: &str) -> bool {
        rules::speaker(std::slice::from_ref(&self.0), lun, initiator).is_some()
    }
}

/// Everything that stands in the way of the snapshot (severity `Error`, first), and what is worth knowing beside it. Asks
/// nothing of `spec` that a snapshot would not; its session and name do not matter.
#[must_use]
pub fn examine(spec: &Spec, witnesses: Vec<Witness>) -> Vec<Trouble> {
    let parties: Vec<Party> = witnesses.into_iter().map(|witness| witness.0).collect();
    let agent = |at: Option<usize>| at.and_then(|at| parties.get(at)).map(|party| party.who.agent);
    let mut broken = rules::troubles(spec, &parties);
    let knows = |party: &Party, lun| {
        let apps = party.volumes_of(lun).map(|volumes| volumes.apps.as_slice());
        apps.unwrap_or_default()
            .iter()
            .any(|app| app.lun.is_none_or(|on| on == lun))
    };
    // Who has nothing mounted, or could not be asked, was named already.
    let unheard = parties.iter().any(|party| party.failed.is_some());
    if !unheard
        && !broken
            .iter()
            .any(|(_, refusal)| refusal.code == ErrorCode::NotMounted)
    {
        broken.extend(rules::without_application(spec, &parties, knows).map(|refusal| (None, refusal)));
    }
    let errors = broken.into_iter().map(|(at, refusal)| Trouble {
        agent: agent(at),
        finding: finding(refusal, Severity::Error),
    });
    let mut all: Vec<Trouble> = errors.collect();
    for party in &parties {
        let id = Some(party.who.agent);
        let optional = party.failed.clone().filter(|_| !party.is_required());
        all.extend(optional.map(|refusal| Trouble {
            agent: id,
            finding: finding(refusal, Severity::Warning),
        }));
        let remarks = party
            .findings
            .iter()
            .filter(|finding| finding.severity != Severity::Error);
        all.extend(remarks.map(|remark| Trouble {
            agent: id,
            finding: remark.clone(),
        }));
    }
    all
}

fn finding(refusal: Refusal, severity: Severity) -> Finding {
    let Refusal {
        code, text, subject, ..
    } = refusal;
    Finding {
        code,
        severity,
        subject: subject.unwrap_or_default(),
        text,
    }
}
