//! What a snapshot of some LUNs would meet on this host: the preflight, and what Prepare freezes.

use stillpoint_agentproto::message::{
    Exclusion, ExclusionKind, Finding, LunIdentity, LunVolumes, Role, Severity,
};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal};

use crate::volumes::{Disk, Inventory, Volume};

/// The result of a look.
pub(crate) struct Survey {
    /// The host as it was.
    pub(crate) inventory: Inventory,
    /// Volumes to freeze.
    pub(crate) volumes: Vec<Volume>,
    /// What is left out.
    pub(crate) exclusions: Vec<Exclusion>,
    findings: Vec<Finding>,
}

impl Survey {
    /// All findings.
    pub(crate) fn findings(self) -> Vec<Finding> {
        self.findings
    }

    /// The first finding that stops a snapshot.
    pub(crate) fn refuse(&self) -> Result<(), Refusal> {
        match self
            .findings
            .iter()
            .find(|finding| finding.severity == Severity::Error)
        {
            Some(finding) => Err(Refusal::new(finding.code, finding.text.clone()).about(&finding.subject)),
            None => Ok(()),
        }
    }
}

/// Looks. `granted`: what the target lets this agent freeze; `None` on the host itself, where that is not known. `host`: findings that
/// concern every LUN (an SMI-S provider, no VSS).
pub(crate) fn survey(
    inventory: Inventory,
    luns: &[LunId],
    granted: Option<&[LunIdentity]>,
    host: Vec<Finding>,
) -> Survey {
    let mut findings = host;
    let mut exclusions = Vec::new();
    for lun in luns {
        if granted.is_some_and(|granted| !granted.iter().any(|one| one.lun == *lun)) {
            findings.push(error(
                ErrorCode::NotAllowed,
                lun,
                "this target does not let this agent freeze it: `stillpoint agent allow` there",
            ));
            continue;
        }
        let disk = inventory.disk(*lun);
        if let (Some(disk), Some(grant)) = (
            disk,
            granted.and_then(|granted| granted.iter().find(|one| one.lun == *lun)),
        ) {
            findings.extend(mismatch(disk, grant));
        }
        if disk.is_some_and(|disk| disk.multipath) {
            let text = "MPIO claims this disk: a LUN used with agents has one path (mpclaim -u, or one session only)";
            findings.push(error(ErrorCode::LimitMpio, lun, text));
        }
        if inventory.on(&[*lun]).next().is_none() {
            let text = "nothing of it is mounted on this host: no volume of it has a file system here";
            findings.push(error(ErrorCode::NotMounted, lun, text));
        }
    }
    let mut volumes = Vec::new();
    for volume in inventory.on(luns) {
        let other = volume.luns.iter().find(|lun| !luns.contains(lun));
        match (other, volume.elsewhere) {
            (Some(other), _) => findings.push(error(
                ErrorCode::LimitExtent,
                volume.label(),
                format!("it also lies on {other}: snapshot both LUNs together, or keep the volume on one"),
            )),
            (None, true) => findings.push(error(
                ErrorCode::LimitExtent,
                volume.label(),
                "it also lies on a disk that is no LUN: its halves would not fit together",
            )),
            // VSS takes no read-only volume. Nothing of it is frozen, so nothing of it may be claimed.
            (None, false) if volume.read_only => exclusions.push(Exclusion {
                kind: ExclusionKind::Volume,
                subject: volume.label().to_owned(),
                reason: "it is read-only, and VSS freezes no read-only volume".to_owned(),
                lun: volume.luns.first().copied(),
            }),
            (None, false) => volumes.push(volume.clone()),
        }
    }
    Survey {
        inventory,
        volumes,
        exclusions,
        findings,
    }
}

/// Everything that names a LUN has to agree (agent-protocol.md §4).
fn mismatch(disk: &Disk, grant: &LunIdentity) -> Option<Finding> {
    let serial = grant
        .serial
        .as_deref()
        .filter(|serial| serial.trim() != disk.info.serial.trim());
    let size = grant
        .size_bytes
        .filter(|size| disk.size_bytes.is_some_and(|seen| seen != *size));
    let text = match (serial, size) {
        (Some(serial), _) => format!(
            "the target says serial {serial:?}, this host reads {:?}: rescan the disks",
            disk.info.serial
        ),
        (None, Some(size)) => format!(
            "the target says {size} bytes, this host reads {}: rescan the disks",
            disk.size_bytes?
        ),
        (None, None) => return None,
    };
    Some(error(ErrorCode::IdentityMismatch, disk.lun, text))
}

/// What the protocol's ListVolumes answers.
pub(crate) fn list(inventory: &Inventory, luns: &[LunId]) -> Vec<LunVolumes> {
    let one = |lun: &LunId| {
        let one = [*lun];
        let mounts: Vec<_> = inventory.on(&one).map(Volume::mount).collect();
        let disk = inventory.disk(*lun);
        if disk.is_none() && mounts.is_empty() {
            return None;
        }
        let role = if mounts.is_empty() {
            Role::None
        } else {
            Role::Mounted
        };
        Some(LunVolumes {
            identity: LunIdentity {
                lun: *lun,
                serial: disk.map(|disk| disk.info.serial.clone()),
                iqn: None,
                number: None,
                size_bytes: disk.and_then(|disk| disk.size_bytes),
            },
            role,
            mounts,
            apps: Vec::new(),
        })
    };
    luns.iter().filter_map(one).collect()
}

/// The refusal of `require = all`.
pub(crate) fn left_out(exclusion: &Exclusion) -> Refusal {
    let code = match exclusion.kind {
        ExclusionKind::Volume => ErrorCode::NoQuiesce,
        ExclusionKind::Application => ErrorCode::WriterFailed,
    };
    Refusal::new(
        code,
        format!("{} cannot take part: {}", exclusion.subject, exclusion.reason),
    )
    .about(&exclusion.subject)
}

/// A volume that was not in the set.
pub(crate) fn newcomer(volume: &Volume) -> Refusal {
    let point = volume.label();
    let text = format!("{point} was mounted after Prepare and was not frozen: take the snapshot again");
    Refusal::new(ErrorCode::NoQuiesce, text).about(point)
}

/// A finding that stops snapshots.
pub(crate) fn error(code: ErrorCode, subject: impl std::fmt::Display, text: impl Into<String>) -> Finding {
    Finding {
        code,
        severity: Severity::Error,
        subject: subject.to_string(),
        text: text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::tests::{disk, lun, volume};

    fn grant(byte: u8) -> LunIdentity {
        LunIdentity {
            lun: lun(byte),
            serial: Some("0001".to_owned()),
            iqn: None,
            number: None,
            size_bytes: Some(1 << 30),
        }
    }

    fn codes(inventory: &Inventory, luns: &[LunId], granted: &[LunIdentity]) -> Vec<ErrorCode> {
        let findings = survey(inventory.clone(), luns, Some(granted), Vec::new()).findings();
        findings.into_iter().map(|finding| finding.code).collect()
    }

    #[test]
    fn every_rule_is_named() {
        let mut inventory = Inventory {
            disks: vec![disk(1), disk(2)],
            volumes: vec![volume(r"S:\", &[lun(1)])],
        };
        let all = [grant(1), grant(2)];
        assert_eq!(codes(&inventory, &[lun(1)], &all), []);
        assert_eq!(codes(&inventory, &[lun(1)], &[]), [ErrorCode::NotAllowed]);
        assert_eq!(codes(&inventory, &[lun(2)], &all), [ErrorCode::NotMounted]);
        let grown = LunIdentity {
            size_bytes: Some(1 << 31),
            ..grant(1)
        };
        assert_eq!(
            codes(&inventory, &[lun(1)], &[grown]),
            [ErrorCode::IdentityMismatch]
        );
        inventory.disks[0].multipath = true;
        assert_eq!(codes(&inventory, &[lun(1)], &all), [ErrorCode::LimitMpio]);
        inventory.disks[0].multipath = false;
        inventory.volumes[0].luns.push(lun(2));
        assert_eq!(codes(&inventory, &[lun(1)], &all), [ErrorCode::LimitExtent]);
        assert_eq!(codes(&inventory, &[lun(1), lun(2)], &all), []);
        inventory.volumes[0].elsewhere = true;
        assert_eq!(
            codes(&inventory, &[lun(1), lun(2)], &all),
            [ErrorCode::LimitExtent]
        );
    }

    #[test]
    fn a_volume_makes_this_agent_required() {
        let inventory = Inventory {
            disks: vec![disk(1), disk(2)],
            volumes: vec![volume(r"S:\", &[lun(1)])],
        };
        let listed = list(&inventory, &[lun(1), lun(2), lun(3)]);
        let roles: Vec<Role> = listed.iter().map(|one| one.role).collect();
        assert_eq!(roles, [Role::Mounted, Role::None]);
        assert_eq!(listed[0].mounts[0].path, r"S:\");
    }
}
