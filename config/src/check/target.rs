//! Targets: access lists, CHAP, and the limits of a LUN with agents.

use toml::Spanned;

use super::check_lun_names;
use crate::config::{
    Access, AgentTarget, Chap, ChapAlgorithm, Credentials, Initiators, PlainTarget, Target, TargetKind,
};
use crate::file::reader::Sink;
use crate::file::v1::{self, InitiatorEntry};
use crate::limits;
use crate::problem::Trouble;
use crate::secret::Secret;

pub(super) fn build_target(sink: &mut Sink, target: &v1::Target, file: &v1::File) -> Option<Target> {
    let thing = &target.place.thing;
    let before = sink.problems.len();
    check_lun_names(sink, thing, &target.luns, &file.lun_names);
    check_portal_groups(sink, target, &file.portals);
    let access = build_access(sink, target);
    let kind = if target.agents {
        agent_target(sink, target)
    } else {
        plain_target(sink, target)
    };
    (sink.problems.len() == before).then_some(())?;
    Some(Target {
        iqn: target.iqn.get_ref().clone(),
        access,
        kind: kind?,
    })
}

fn check_portal_groups(sink: &mut Sink, target: &v1::Target, portals: &[v1::Portal]) {
    let known: Vec<u32> = portals
        .iter()
        .map(|p| p.group.as_ref().map_or(1, |g| *g.get_ref()))
        .collect();
    let thing = &target.place.thing;
    if known.is_empty() {
        if !sink.damaged && sink.problems.iter().all(|p| !p.thing.contains("portal")) {
            let trouble = Trouble::new(
                "no portal serves it",
                "add a `[[portal]]` with `address = \"0.0.0.0:3260\"`",
            );
            sink.problem(&target.place.at, thing, trouble);
        }
        return;
    }
    let Some(groups) = &target.portal_groups else {
        if !known.contains(&1) {
            let trouble = Trouble::new(
                "no portal is in group 1, which is the default",
                "add `portal_groups` with a group that has a portal",
            );
            sink.problem(&target.place.at, thing, trouble);
        }
        return;
    };
    if groups.get_ref().is_empty() {
        let trouble = Trouble::new(
            "`portal_groups` is empty, so nobody could reach the target",
            "write `portal_groups = [1]`",
        );
        sink.problem(&groups.span(), thing, trouble);
    }
    for group in groups.get_ref() {
        if !known.contains(group.get_ref()) {
            let trouble = Trouble::new(
                format!("`portal_groups`: no `[[portal]]` has group {}", group.get_ref()),
                "add a portal of that group, or name another group",
            );
            sink.problem(&group.span(), thing, trouble);
        }
    }
}

fn build_access(sink: &mut Sink, target: &v1::Target) -> Access {
    let thing = &target.place.thing;
    let entries = target
        .initiators
        .as_ref()
        .map_or(&[][..], |list| list.get_ref().as_slice());
    let anyone = entries.iter().find(|e| *e.get_ref() == InitiatorEntry::Anyone);
    if let Some(star) = anyone {
        if entries.len() > 1 {
            let trouble = Trouble::new(
                "`initiators` has \"*\" beside names",
                "write only \"*\" for anyone, or only the names",
            );
            sink.problem(&star.span(), thing, trouble);
        } else if target.chap.is_none() {
            let trouble = Trouble::new(
                "any initiator may log in, without a password",
                "name the initiators, or add `[target.chap]`",
            );
            sink.warn(&star.span(), thing, trouble);
        }
    }
    if entries.is_empty() {
        let trouble = Trouble::new(
            "`initiators` is empty, so nobody may log in",
            "add the initiators' names, or \"*\" for anyone",
        );
        sink.warn(&target.place.at, thing, trouble);
    }
    if let Some(networks) = target.allow_from.as_ref().filter(|n| n.get_ref().is_empty()) {
        let trouble = Trouble::new(
            "`allow_from` is empty, so nobody could log in",
            "add networks, or remove the key to allow every network",
        );
        sink.problem(&networks.span(), thing, trouble);
    }
    let names = entries.iter().filter_map(|e| match e.get_ref() {
        InitiatorEntry::Name(name) => Some(name.clone()),
        InitiatorEntry::Anyone => None,
    });
    let initiators = if anyone.is_some() {
        Initiators::Anyone
    } else {
        Initiators::These(names.collect())
    };
    let networks = target
        .allow_from
        .as_ref()
        .map_or(&[][..], |list| list.get_ref().as_slice());
    Access {
        initiators,
        allow_from: networks.iter().map(|n| *n.get_ref()).collect(),
    }
}

fn groups_of(target: &v1::Target) -> Vec<u16> {
    match &target.portal_groups {
        None => vec![1],
        Some(list) => list
            .get_ref()
            .iter()
            .filter_map(|g| u16::try_from(*g.get_ref()).ok())
            .collect(),
    }
}

/// The limits of a LUN with agents (agent-protocol.md §8): no CHAP, one LUN, one path.
fn agent_target(sink: &mut Sink, target: &v1::Target) -> Option<TargetKind> {
    let thing = &target.place.thing;
    if let Some(chap) = &target.chap {
        let trouble = Trouble::new(
            "`chap` cannot be used with `agents` (agents log in to the LUN without a password)",
            "remove one of them; `initiators` and `allow_from` still say who may log in",
        );
        sink.problem(&chap.place.at, thing, trouble);
    }
    if target.luns.get_ref().len() != 1 {
        let trouble = Trouble::new(
            format!(
                "`luns` has {} entries, but a target with `agents` has exactly one LUN",
                target.luns.get_ref().len()
            ),
            "give each LUN a target of its own",
        );
        sink.problem(&target.luns.span(), thing, trouble);
    }
    if let Some(groups) = target.portal_groups.as_ref().filter(|g| g.get_ref().len() > 1) {
        let trouble = Trouble::new(
            format!(
                "`portal_groups` has {} entries, but a target with `agents` has one path (no MPIO)",
                groups.get_ref().len()
            ),
            "keep one of the groups",
        );
        sink.problem(&groups.span(), thing, trouble);
    }
    if let Some(sessions) = target.max_sessions.as_ref().filter(|m| *m.get_ref() != 1) {
        let trouble = Trouble::new(
            format!(
                "`max_sessions` is {}, but a target with `agents` has one path (no MPIO)",
                sessions.get_ref()
            ),
            "write 1, or remove the key",
        );
        sink.problem(&sessions.span(), thing, trouble);
    }
    let lun = target.luns.get_ref().first()?.get_ref().clone();
    let portal_group = groups_of(target).first().copied()?;
    Some(TargetKind::Agent(AgentTarget { lun, portal_group }))
}

fn plain_target(sink: &mut Sink, target: &v1::Target) -> Option<TargetKind> {
    if target.luns.get_ref().is_empty() {
        let trouble = Trouble::new("`luns` is empty", "name at least one LUN, or remove the target");
        sink.problem(&target.luns.span(), &target.place.thing, trouble);
    }
    let chap = match &target.chap {
        None => None,
        Some(chap) => Some(build_chap(sink, chap)?),
    };
    Some(TargetKind::Plain(PlainTarget {
        luns: target
            .luns
            .get_ref()
            .iter()
            .map(|l| l.get_ref().clone())
            .collect(),
        portal_groups: groups_of(target),
        max_sessions: target.max_sessions.as_ref().map_or(1, |m| *m.get_ref()),
        chap,
    }))
}

fn build_chap(sink: &mut Sink, chap: &v1::Chap) -> Option<Chap> {
    let thing = &chap.place.thing;
    for (key, secret) in [
        ("secret_file", &chap.secret),
        ("mutual_secret_file", &chap.mutual_secret),
    ] {
        let Some(secret) = secret else { continue };
        let length = secret.get_ref().expose().len();
        if length > limits::MAX_CHAP_SECRET_BYTES {
            let way_out = format!("use at most {}", limits::MAX_CHAP_SECRET_BYTES);
            sink.problem(
                &secret.span(),
                thing,
                Trouble::new(format!("`{key}`: the secret has {length} bytes"), way_out),
            );
        } else if length < limits::MIN_CHAP_SECRET_BYTES {
            let way_out = format!(
                "use {} to 16, which every initiator accepts",
                limits::MIN_CHAP_SECRET_BYTES
            );
            let trouble = Trouble::new(
                format!("`{key}`: a secret of {length} bytes can be guessed from one login"),
                way_out,
            );
            sink.warn(&secret.span(), thing, trouble);
        }
    }
    if let (Some(one), Some(other)) = (&chap.secret, &chap.mutual_secret)
        && one.get_ref() == other.get_ref()
    {
        // RFC 7143 §9.2.1: "the same secret MUST NOT be used for both directions": an attacker could reflect the challenge.
        let trouble = Trouble::new(
            "both directions of CHAP have the same secret",
            "use another one in `mutual_secret_file`",
        );
        sink.problem(&other.span(), thing, trouble);
    }
    let algorithms = match &chap.algorithms {
        None => vec![
            ChapAlgorithm::Sha3_256,
            ChapAlgorithm::Sha256,
            ChapAlgorithm::Sha1,
            ChapAlgorithm::Md5,
        ],
        Some(list) if list.get_ref().is_empty() => {
            let trouble = Trouble::new(
                "`algorithms` is empty",
                "name at least one of sha3-256, sha256, sha1, md5, or remove the key",
            );
            sink.problem(&list.span(), thing, trouble);
            return None;
        }
        Some(list) => list.get_ref().iter().map(|a| *a.get_ref()).collect(),
    };
    let credentials = |user: &Option<Spanned<String>>, secret: &Option<Spanned<Secret>>| {
        Some(Credentials {
            user: user.as_ref()?.get_ref().clone(),
            secret: secret.as_ref()?.get_ref().clone(),
        })
    };
    let mutual = credentials(&chap.mutual_user, &chap.mutual_secret);
    Some(Chap {
        initiator: credentials(&chap.user, &chap.secret)?,
        mutual,
        algorithms,
    })
}

/// A LUN with agents is on one target only; a LUN on no target is worth a warning.
pub(super) fn check_sharing(sink: &mut Sink, file: &v1::File) {
    for lun in &file.luns {
        let name = lun.name.get_ref();
        let serving: Vec<&v1::Target> = file
            .targets
            .iter()
            .filter(|t| t.luns.get_ref().iter().any(|l| l.get_ref() == name))
            .collect();
        if let Some(agent) = serving.iter().find(|t| t.agents)
            && let Some(other) = serving.iter().find(|t| t.place.at != agent.place.at)
        {
            let trouble = Trouble::new(
                format!(
                    "LUN {name} is also on target \"{}\", but a LUN with `agents` has one path",
                    other.iqn.get_ref()
                ),
                "serve it from one target only",
            );
            sink.problem(&agent.place.at, &agent.place.thing, trouble);
        }
        if serving.is_empty() && !sink.damaged && sink.problems.is_empty() {
            let trouble = Trouble::new("no target serves it", "add it to the `luns` of a `[[target]]`");
            sink.warn(&lun.place.at, &lun.place.thing, trouble);
        }
    }
}
