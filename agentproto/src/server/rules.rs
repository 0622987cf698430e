//! What has to be true before anything is frozen (specification §7, last paragraph, and §8).

use super::party::Party;
use super::{IscsiSession, LunSpec, OnFailure, Spec};
use crate::error::{ErrorCode, Refusal};
use crate::ident::LunId;
use crate::message::{ExclusionKind, Finding, LunIdentity, Mode, Role, Severity};

/// A rule that is broken: the place of the party it is about, if it is one, and what is wrong.
pub(super) type Broken = (Option<usize>, Refusal);

/// The first rule that is broken once every agent has reported.
pub(super) fn preflight(spec: &Spec, parties: &[Party]) -> Result<(), Broken> {
    troubles(spec, parties).into_iter().next().map_or(Ok(()), Err)
}

/// Every rule that is broken once every agent has reported, the gravest first.
pub(super) fn troubles(spec: &Spec, parties: &[Party]) -> Vec<Broken> {
    let mut found: Vec<Broken> = spec
        .refused
        .iter()
        .map(|refusal| (None, refusal.clone()))
        .collect();
    for (at, party) in parties.iter().enumerate() {
        let failed = party.failed.clone().filter(|_| party.is_required());
        found.extend(failed.map(|refusal| (Some(at), refusal)));
        let errors = party
            .findings
            .iter()
            .filter(|finding| finding.severity == Severity::Error && stops(spec, finding));
        found.extend(errors.map(|finding| {
            let refusal = Refusal::new(finding.code, finding.text.clone());
            (Some(at), refusal.about(finding.subject.clone()))
        }));
    }
    for lun in &spec.luns {
        of_lun(spec, lun, parties, &mut found);
    }
    found
}

/// An application that cannot take part stops nothing when less than asked for is acceptable: Prepare names it as an exclusion, and the
/// file systems are frozen all the same.
fn stops(spec: &Spec, finding: &Finding) -> bool {
    spec.on_failure == OnFailure::Fail || finding.code != ErrorCode::WriterFailed
}

fn of_lun(spec: &Spec, lun: &LunSpec, parties: &[Party], found: &mut Vec<Broken>) {
    let id = lun.identity.lun;
    for (at, party) in parties.iter().enumerate() {
        if let Some(seen) = party.volumes_of(id).map(|volumes| &volumes.identity)
            && let Some(difference) = mismatch(&lun.identity, seen)
        {
            let text = format!(
                "the agent sees LUN {} with {difference}: is it the same disk?",
                lun.name
            );
            let refusal = Refusal::new(ErrorCode::IdentityMismatch, text).about(lun.name.clone());
            found.push((Some(at), refusal));
        }
    }
    if !parties.iter().any(|party| party.role(id) == Role::Mounted) {
        let text = format!(
            "no agent has a file system of LUN {} mounted, so nobody can prove more than `crash`: mount it, enrol and allow \
             the agent of its host, or take the snapshot with --consistency crash",
            lun.name
        );
        let refusal = Refusal::new(ErrorCode::NotMounted, text).about(lun.name.clone());
        found.push((None, refusal));
    }
    if let Some((at, text)) = double_mount(lun, parties) {
        let refusal = Refusal::new(ErrorCode::Conflict, text).about(lun.name.clone());
        found.push((Some(at), refusal));
    }
    found.extend(several_paths(lun, &spec.sessions).map(|refusal| (None, refusal)));
    // An agent that was not heard may speak for any session; that it was not heard is named already.
    if parties
        .iter()
        .all(|party| party.failed.is_none() || !party.is_required())
    {
        let strangers = strangers(lun, &spec.sessions, parties);
        found.extend(strangers.into_iter().map(|refusal| (None, refusal)));
    }
}

/// How an identity that an agent read differs from ours; what one side does not tell is no difference.
fn mismatch(ours: &LunIdentity, seen: &LunIdentity) -> Option<String> {
    fn differs<T: PartialEq>(a: Option<&T>, b: Option<&T>) -> bool {
        matches!((a, b), (Some(a), Some(b)) if a != b)
    }
    // Page 80h is padded with blanks by some readers.
    if differs(
        ours.serial.as_deref().map(str::trim).as_ref(),
        seen.serial.as_deref().map(str::trim).as_ref(),
    ) {
        return Some(format!("serial {:?}", seen.serial.as_deref().unwrap_or_default()));
    }
    if differs(ours.iqn.as_ref(), seen.iqn.as_ref()) {
        return Some(format!("target {}", seen.iqn.as_deref().unwrap_or_default()));
    }
    if differs(ours.number.as_ref(), seen.number.as_ref()) {
        return Some(format!("LUN number {}", seen.number.unwrap_or_default()));
    }
    // A LUN that was grown stays at its old size on the host until somebody rescans it: the same disk all the same.
    let larger = matches!((ours.size_bytes, seen.size_bytes), (Some(ours), Some(seen)) if seen > ours);
    larger.then(|| format!("{} bytes", seen.size_bytes.unwrap_or_default()))
}

/// Two hosts that write to one file system which is not made for it: the second agent's place.
fn double_mount(lun: &LunSpec, parties: &[Party]) -> Option<(usize, String)> {
    let writes = |party: &Party| {
        let volumes = party
            .volumes_of(lun.identity.lun)
            .filter(|volumes| volumes.role == Role::Mounted);
        volumes.is_some_and(|volumes| {
            volumes
                .mounts
                .iter()
                .any(|mount| !mount.read_only && !mount.cluster)
        })
    };
    let mut writers = parties.iter().enumerate().filter(|(_, party)| writes(party));
    let (_, first) = writers.next()?;
    let (at, second) = writers.next()?;
    let text = format!(
        "{} and {} both have a file system of LUN {} mounted for writing, and it is no cluster file system: unmount one, \
         the data is in danger",
        first.who.host, second.who.host, lun.name
    );
    Some((at, text))
}

/// Agents cannot be used with multipath: a second session of one initiator to the LUN is one.
fn several_paths(lun: &LunSpec, sessions: &[IscsiSession]) -> Option<Refusal> {
    let of_lun: Vec<_> = sessions
        .iter()
        .filter(|session| session.lun == lun.identity.lun)
        .collect();
    let doubled = of_lun.iter().find(|one| {
        of_lun
            .iter()
            .filter(|other| other.initiator.eq_ignore_ascii_case(&one.initiator))
            .count()
            > 1
    })?;
    let text = format!(
        "{} has more than one session to LUN {}: agents and multipath cannot be used together, log one out",
        doubled.initiator, lun.name
    );
    Some(Refusal::new(ErrorCode::LimitMpio, text).about(doubled.initiator.clone()))
}

/// The party that speaks for an initiator on a LUN.
pub(super) fn speaker<'a>(parties: &'a [Party], lun: LunId, initiator: &str) -> Option<&'a Party> {
    let speaks = |party: &&Party| party.role(lun) != Role::None && party.has_initiator(initiator);
    parties.iter().find(speaks)
}

/// Sessions of hosts that no required or standby agent speaks for: an unseen writer would make the label a lie.
pub(super) fn strangers(lun: &LunSpec, sessions: &[IscsiSession], parties: &[Party]) -> Vec<Refusal> {
    let id: LunId = lun.identity.lun;
    let unknown = sessions
        .iter()
        .filter(|session| session.lun == id && speaker(parties, id, &session.initiator).is_none());
    let refusal = |session: &IscsiSession| {
        let text = format!(
            "{} is logged in to LUN {}, but no agent speaks for it: log it out, or install an agent there and allow it",
            session.initiator, lun.name
        );
        Refusal::new(ErrorCode::NotAllowed, text).about(session.initiator.clone())
    };
    unknown.map(refusal).collect()
}

/// After Prepare: whether what was asked for can still be reached. Only asked when less is not acceptable.
pub(super) fn reachable(spec: &Spec, parties: &[Party]) -> Result<(), Broken> {
    let relevant = |kind| spec.mode == Mode::Application || kind == ExclusionKind::Volume;
    for (at, party) in parties.iter().enumerate() {
        let Some(prepared) = &party.prepared else { continue };
        if let Some(left_out) = prepared
            .exclusions
            .iter()
            .find(|exclusion| relevant(exclusion.kind))
        {
            let text = format!("{} would be left out: {}", left_out.subject, left_out.reason);
            return Err((Some(at), Refusal::new(ErrorCode::NoQuiesce, text)));
        }
    }
    let prepared = |party: &Party, lun| {
        let apps = party.prepared.iter().flat_map(|prepared| &prepared.apps);
        apps.into_iter().any(|app| app.lun.is_none_or(|on| on == lun))
    };
    without_application(spec, parties, prepared).map_or(Ok(()), |refusal| Err((None, refusal)))
}

/// A LUN on which nobody knows an application although `application` is wanted. `knows` looks at one party that has it mounted.
pub(super) fn without_application(
    spec: &Spec,
    parties: &[Party],
    knows: impl Fn(&Party, LunId) -> bool,
) -> Option<Refusal> {
    if spec.mode == Mode::Filesystem {
        return None;
    }
    let known = |lun: &&LunSpec| {
        let id = lun.identity.lun;
        parties
            .iter()
            .any(|party| party.role(id) == Role::Mounted && knows(party, id))
    };
    let lun = spec.luns.iter().find(|lun| !known(lun))?;
    let text = format!(
        "no agent knows an application on LUN {}, so `filesystem` is the most that can be proved: declare it to the agent of \
         its host (a helper of agent.toml, or a hook), or ask for --consistency filesystem",
        lun.name
    );
    Some(Refusal::new(ErrorCode::NoQuiesce, text).about(lun.name.clone()))
}
