//! What has to be true before anything is frozen (specification §7, last paragraph, and §8).

use super::party::Party;
use super::{IscsiSession, LunSpec, Spec};
use crate::error::{ErrorCode, Refusal};
use crate::ident::LunId;
use crate::message::{ExclusionKind, LunIdentity, Mode, Role, Severity};

/// The first rule that is broken once every agent has reported, with the place of the party it is about.
pub(super) fn preflight(spec: &Spec, parties: &[Party]) -> Result<(), (Option<usize>, Refusal)> {
    if let Some(refusal) = spec.refused.clone() {
        return Err((None, refusal));
    }
    for (at, party) in parties.iter().enumerate() {
        if let Some(refusal) = party.failed.clone().filter(|_| party.is_required()) {
            return Err((Some(at), refusal));
        }
        if let Some(finding) = party
            .findings
            .iter()
            .find(|finding| finding.severity == Severity::Error)
        {
            let refusal = Refusal::new(finding.code, finding.text.clone()).about(finding.subject.clone());
            return Err((Some(at), refusal));
        }
    }
    for lun in &spec.luns {
        of_lun(spec, lun, parties)?;
    }
    Ok(())
}

fn of_lun(spec: &Spec, lun: &LunSpec, parties: &[Party]) -> Result<(), (Option<usize>, Refusal)> {
    let id = lun.identity.lun;
    for (at, party) in parties.iter().enumerate() {
        if let Some(seen) = party.volumes_of(id).map(|volumes| &volumes.identity)
            && let Some(difference) = mismatch(&lun.identity, seen)
        {
            let text = format!(
                "the agent sees LUN {} with {difference}: is it the same disk?",
                lun.name
            );
            return Err((
                Some(at),
                Refusal::new(ErrorCode::IdentityMismatch, text).about(lun.name.clone()),
            ));
        }
    }
    if !parties.iter().any(|party| party.role(id) == Role::Mounted) {
        let text = format!(
            "no agent has a file system of LUN {} mounted, so nobody can prove more than `crash`: mount it, enrol and allow \
             the agent of its host, or take the snapshot with --consistency crash",
            lun.name
        );
        return Err((
            None,
            Refusal::new(ErrorCode::NotMounted, text).about(lun.name.clone()),
        ));
    }
    if let Some((at, text)) = double_mount(lun, parties) {
        return Err((
            Some(at),
            Refusal::new(ErrorCode::Conflict, text).about(lun.name.clone()),
        ));
    }
    if let Some(refusal) = several_paths(lun, &spec.sessions) {
        return Err((None, refusal));
    }
    strangers(lun, &spec.sessions, parties).map_or(Ok(()), |refusal| Err((None, refusal)))
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

/// A session of a host that no required or standby agent speaks for: an unseen writer would make the label a lie.
pub(super) fn strangers(lun: &LunSpec, sessions: &[IscsiSession], parties: &[Party]) -> Option<Refusal> {
    let id: LunId = lun.identity.lun;
    let known = |initiator: &str| {
        let speaks = |party: &&Party| party.role(id) != Role::None && party.has_initiator(initiator);
        parties.iter().find(speaks).is_some()
    };
    let stranger = sessions
        .iter()
        .find(|session| session.lun == id && !known(&session.initiator))?;
    let text = format!(
        "{} is logged in to LUN {}, but no agent speaks for it: log it out, or install an agent there and allow it",
        stranger.initiator, lun.name
    );
    Some(Refusal::new(ErrorCode::NotAllowed, text).about(stranger.initiator.clone()))
}

/// After Prepare: whether what was asked for can still be reached. Only asked when less is not acceptable.
pub(super) fn reachable(spec: &Spec, parties: &[Party]) -> Result<(), (Option<usize>, Refusal)> {
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
    if spec.mode == Mode::Filesystem {
        return Ok(());
    }
    for lun in &spec.luns {
        let id = lun.identity.lun;
        let apps = parties.iter().filter(|party| party.role(id) == Role::Mounted);
        let mut apps = apps
            .filter_map(|party| party.prepared.as_ref())
            .flat_map(|prepared| &prepared.apps);
        if !apps.any(|app| app.lun.is_none_or(|on| on == id)) {
            let text = format!(
                "no agent knows an application on LUN {}, so `filesystem` is the most that can be proved: declare it in a \
                 hook of the agent, or ask for --consistency filesystem",
                lun.name
            );
            return Err((
                None,
                Refusal::new(ErrorCode::NoQuiesce, text).about(lun.name.clone()),
            ));
        }
    }
    Ok(())
}
