//! From "these LUNs" to "these file systems and hooks", with everything that stands in the way.
//!
//! One function ([`survey`]) looks at the host for Preflight, Prepare and `stillpoint-agent preflight`: what would refuse
//! a snapshot is told beforehand in the same words.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use stillpoint_agentproto::message::{
    App, AppState, Exclusion, ExclusionKind, Finding, LunIdentity, LunVolumes, Mode, Mount, Require, Role,
    Severity,
};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal};

use crate::apps::Application;
use crate::features::Feature;
use crate::freeze::{self, Settings};
use crate::hooks::{self, Call, Hook, HookError, Verb};
use crate::libvirt::KIND as KIND_OF_GUESTS;
use crate::volumes::{self, DeviceNumber, Disk, Inventory, TestLun, Volume};

/// A server that does not answer its helper within this is not there.
const CHECK_TIME_MAX: Duration = Duration::from_secs(10);
/// Bit of CAP_SYS_ADMIN (linux/capability.h): FIFREEZE needs it.
const CAP_SYS_ADMIN: u32 = 21;

/// A finding, and what it would cost.
#[derive(Debug, Clone)]
struct Found {
    finding: Finding,
    /// What cannot take part: with best effort it is left out, otherwise it stops the snapshot.
    part: Option<Part>,
}

/// What can be left out.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// A file system of a LUN.
    Volume(LunId, String),
    /// An application.
    Application(String),
}

/// What the host looks like from the point of view of some LUNs.
#[derive(Debug, Clone)]
pub(crate) struct Survey {
    /// The LUNs asked for.
    luns: Vec<LunId>,
    found: Vec<Found>,
    volumes: Vec<Volume>,
    hooks: Vec<Hook>,
}

/// What a session will freeze.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// The LUNs of the session.
    pub(crate) luns: Vec<LunId>,
    /// In the order of freezing.
    pub(crate) volumes: Vec<Volume>,
    /// In the order of freezing.
    pub(crate) hooks: Vec<Hook>,
    /// A failing application is a failed application, not a failed freeze.
    pub(crate) apps_may_fail: bool,
    /// What is left out.
    pub(crate) exclusions: Vec<Exclusion>,
    /// Every file system on the LUNs that the survey saw, and whether it was read-only (a remount makes it another one).
    seen: BTreeSet<(DeviceNumber, bool)>,
}

impl Plan {
    /// For a session that has nothing of this host.
    pub(crate) fn nothing() -> Self {
        Self {
            luns: Vec::new(),
            volumes: Vec::new(),
            hooks: Vec::new(),
            apps_may_fail: false,
            exclusions: Vec::new(),
            seen: BTreeSet::new(),
        }
    }

    /// Is there nothing of this host in it?
    pub(crate) fn is_nothing(&self) -> bool {
        self.luns.is_empty()
    }

    /// A file system on the LUNs that was mounted (or remounted) after the survey: it is not held, and no label may hide that.
    pub(crate) fn newcomer(&self, inventory: &Inventory) -> Option<String> {
        let names: BTreeSet<String> = self.luns.iter().copied().map(naa).collect();
        let now = inventory.freeze_order(&names);
        now.into_iter()
            .find(|volume| !self.seen.contains(&(volume.dev, volume.read_only)))
            .map(Volume::name)
    }

    /// The applications that will take part.
    pub(crate) fn apps(&self) -> Vec<App> {
        self.hooks
            .iter()
            .filter_map(|hook| app(hook, AppState::Ready, None))
            .collect()
    }
}

/// An application as its hook declares it; `None` for a hook that declares none.
pub(crate) fn app(hook: &Hook, state: AppState, error: Option<String>) -> Option<App> {
    let instance = hook.application.clone()?;
    let component = (hook.kind == hooks::KIND).then(|| hook.name());
    Some(App {
        kind: hook.kind.to_owned(),
        instance,
        component,
        version: hook.version.clone(),
        state,
        error,
        lun: None,
    })
}

/// What this host has, as far as the agent takes part in it: without the feature `linux-fs` it answers for no file system.
pub(crate) fn inventory(settings: &Settings, test_luns: &[TestLun]) -> Inventory {
    let mut inventory = Inventory::read(&settings.root, test_luns);
    if !settings.features.has(Feature::LinuxFs) {
        inventory.volumes.clear();
    }
    inventory
}

/// The host's name for a LUN.
pub(crate) fn naa(lun: LunId) -> String {
    lun.to_string()
}

/// Looks at the host. `grants` is what the target said about its LUNs when this agent registered; without a target (the
/// command line asks) nothing is compared.
pub(crate) fn survey(
    inventory: &Inventory,
    settings: &Settings,
    apps: &[Application],
    luns: &[LunId],
    mode: Mode,
    grants: Option<&[LunIdentity]>,
) -> Survey {
    let mut survey = Survey {
        luns: luns.to_vec(),
        found: Vec::new(),
        volumes: Vec::new(),
        hooks: Vec::new(),
    };
    if !settings.features.has(Feature::LinuxFs) {
        let text = "this agent freezes no file systems: `stillpoint-agent features --enable linux-fs`";
        survey.error(ErrorCode::Unsupported, "agent", text);
    }
    let names: BTreeSet<String> = luns.iter().copied().map(naa).collect();
    survey.volumes = inventory.freeze_order(&names).into_iter().cloned().collect();
    if !may_freeze(settings) {
        survey.error(
            ErrorCode::Unsupported,
            "agent",
            "it may not freeze file systems: run it as root (CAP_SYS_ADMIN)",
        );
    }
    for lun in luns {
        survey.lun(inventory, *lun, grants);
    }
    let protected = freeze::protected(settings);
    for volume in survey.volumes.clone() {
        survey.volume(&volume, &names, &protected);
    }
    survey.read_hooks(settings, mode, apps);
    survey
}

impl Survey {
    /// Everything, for Preflight.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        self.found.iter().map(|found| found.finding.clone()).collect()
    }

    /// What a session would do, or why there cannot be one.
    pub(crate) fn plan(self, require: Require) -> Result<Plan, Refusal> {
        let best_effort = require == Require::BestEffort;
        let stops = |found: &&Found| {
            found.finding.severity == Severity::Error && !(best_effort && found.part.is_some())
        };
        let stopping: Vec<&Finding> = self
            .found
            .iter()
            .filter(stops)
            .map(|found| &found.finding)
            .collect();
        if let Some(first) = stopping.first() {
            let text = stopping
                .iter()
                .map(|f| format!("{}: {}", f.subject, f.text))
                .collect::<Vec<_>>()
                .join("; ");
            return Err(Refusal::new(first.code, text).about(first.subject.clone()));
        }
        let errors = self
            .found
            .iter()
            .filter(|found| found.finding.severity == Severity::Error);
        let left_out: Vec<_> = errors
            .filter_map(|found| Some((found.part.clone()?, found.finding.text.clone())))
            .collect();
        let seen = self
            .volumes
            .iter()
            .map(|volume| (volume.dev, volume.read_only))
            .collect();
        let names: BTreeSet<&String> = left_out
            .iter()
            .filter_map(|(part, _)| match part {
                Part::Volume(_, name) => Some(name),
                Part::Application(_) => None,
            })
            .collect();
        let volumes: Vec<Volume> = self
            .volumes
            .into_iter()
            .filter(|v| !names.contains(&v.name()))
            .collect();
        let exclusion = |(part, reason)| {
            let (kind, subject, lun) = match part {
                Part::Volume(lun, name) => (ExclusionKind::Volume, name, Some(lun)),
                Part::Application(name) => (ExclusionKind::Application, name, None),
            };
            Exclusion {
                kind,
                subject,
                reason,
                lun,
            }
        };
        let exclusions = left_out.into_iter().map(exclusion).collect();
        Ok(Plan {
            luns: self.luns,
            volumes,
            hooks: self.hooks,
            apps_may_fail: best_effort,
            exclusions,
            seen,
        })
    }

    fn lun(&mut self, inventory: &Inventory, lun: LunId, grants: Option<&[LunIdentity]>) {
        let name = naa(lun);
        let paths: Vec<&Disk> = inventory.paths(&name).collect();
        let Some(first) = paths.first() else {
            return self.error(
                ErrorCode::NotMounted,
                &name,
                "this host has no disk of this identity: log in to its target",
            );
        };
        if paths.len() > 1 || inventory.on(&name).any(|volume| volume.multipath) {
            let disks: Vec<_> = paths.iter().map(|disk| disk.name.as_str()).collect();
            let text = format!(
                "it is reached over more than one path ({}): log out of all sessions but one, and release it from dm-multipath",
                disks.join(", ")
            );
            self.error(ErrorCode::LimitMpio, &name, &text);
        }
        if inventory.on(&name).next().is_none() {
            self.error(
                ErrorCode::NotMounted,
                &name,
                "no file system of it is mounted on this host",
            );
        }
        match grants.map(|grants| grants.iter().find(|grant| grant.lun == lun)) {
            None => {}
            Some(None) => {
                let text = "this agent has no right to it: `stillpoint agent allow` on the target gives it";
                self.error(ErrorCode::NotAllowed, &name, text);
            }
            Some(Some(grant)) => self.identity(grant, first),
        }
    }

    /// The target's word and the disk's own must agree (agent-protocol.md §4).
    fn identity(&mut self, grant: &LunIdentity, disk: &Disk) {
        // A test-only device has nothing but the name that the configuration gave it.
        let Some(path) = &disk.path else { return };
        let mut differ = |what: &str, theirs: Option<String>, ours: Option<String>| {
            if let (Some(theirs), Some(ours)) = (theirs, ours)
                && theirs != ours
            {
                let text = format!(
                    "its {what} is {ours:?} on this host ({}), the target says {theirs:?}",
                    disk.name
                );
                self.error(ErrorCode::IdentityMismatch, &grant.lun.to_string(), &text);
            }
        };
        differ("serial", grant.serial.clone(), disk.serial.clone());
        differ("target name", grant.iqn.clone(), Some(path.target.clone()));
        differ(
            "LUN number",
            grant.number.map(|n| n.to_string()),
            Some(path.lun.to_string()),
        );
        if grant
            .size_bytes
            .is_some_and(|size_bytes| size_bytes != disk.size_bytes)
        {
            // No error: a LUN that has grown can be snapshotted before its host has looked again.
            let text = format!(
                "{} has another size than the target says: rescan it (`iscsiadm -m session -R`)",
                disk.name
            );
            let finding = finding(
                ErrorCode::IdentityMismatch,
                Severity::Warning,
                &grant.lun.to_string(),
                &text,
            );
            self.found.push(Found { finding, part: None });
        }
    }

    fn volume(&mut self, volume: &Volume, names: &BTreeSet<String>, protected: &[(PathBuf, String)]) {
        let mut bad = |code, text: String| {
            for lun in self.luns.clone() {
                if volume.naas.contains(&naa(lun)) {
                    let finding = finding(code, Severity::Error, &volume.name(), &text);
                    self.found.push(Found {
                        finding,
                        part: Some(Part::Volume(lun, volume.name())),
                    });
                }
            }
        };
        if let Some(process) = &volume.foreign {
            let text =
                format!("it is mounted only in the mount namespace of {process}: mount it on the host, too");
            return bad(ErrorCode::NoQuiesce, text);
        }
        if !volume.naas.is_subset(names) || !volume.other_disks.is_empty() {
            let outside = volume
                .naas
                .difference(names)
                .chain(&volume.other_disks)
                .cloned()
                .collect::<Vec<_>>();
            let text = format!(
                "it lies on {}, too, which this snapshot does not include",
                outside.join(", ")
            );
            bad(ErrorCode::Unsupported, text);
        }
        if !volume.needs_freeze() {
            return;
        }
        if !volume.is_freezable() {
            let text = format!(
                "{} cannot be frozen: unmount it or mount it read-only",
                volume.fs_type
            );
            return bad(ErrorCode::NoQuiesce, text);
        }
        if let Some(map) = &volume.suspended {
            let text = format!(
                "its device-mapper map {map} is suspended by another program: `dmsetup resume {map}`"
            );
            return bad(ErrorCode::NoQuiesce, text);
        }
        if let Some(what) = freeze::protects(volume, protected) {
            let text =
                format!("{what} lies on it: freezing it would stop the agent itself; move one of them");
            return bad(ErrorCode::NoQuiesce, text);
        }
        let opened = volume.points.iter().map(|point| volumes::open(point, volume.dev));
        if let Some(Err(error)) = opened.reduce(Result::or) {
            bad(ErrorCode::NoQuiesce, format!("it cannot be opened: {error}"));
        }
    }

    fn read_hooks(&mut self, settings: &Settings, mode: Mode, apps: &[Application]) {
        let points: Vec<PathBuf> = self
            .volumes
            .iter()
            .flat_map(|volume| volume.points.clone())
            .collect();
        match directory(settings) {
            // A `filesystem` snapshot needs no application: one that fails must not stop it.
            Ok(hooks) => {
                let wanted = |hook: &Hook| mode == Mode::Application || hook.application.is_none();
                self.hooks = hooks
                    .into_iter()
                    .filter(|hook| hook.concerns(&points) && wanted(hook))
                    .collect();
            }
            Err(error) => self.error(ErrorCode::HookFailed, "hooks", &error.to_string()),
        }
        if mode == Mode::Filesystem {
            return;
        }
        // After the hooks: what holds a lock holds it shortest.
        let guests = guests(settings).unwrap_or_else(|why| {
            self.application_error(KIND_OF_GUESTS, &format!("its guests are not known: {why}"));
            Vec::new()
        });
        let helpers = apps.iter().map(|app| app.hook(&settings.root)).chain(guests);
        let helpers: Vec<Hook> = helpers.filter(|helper| helper.concerns(&points)).collect();
        // All at once: several servers that hang must not add up beyond the target's patience.
        let checked: Vec<_> = std::thread::scope(|scope| {
            let points = &points;
            let check = |helper: Hook| scope.spawn(move || (check(&helper, points), helper));
            let running: Vec<_> = helpers.into_iter().map(check).collect();
            running
                .into_iter()
                .map(std::thread::ScopedJoinHandle::join)
                .collect()
        });
        for checked in checked {
            match checked {
                Ok((result, helper)) => self.helper(helper, result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        let declared = self.hooks.iter().any(|hook| hook.application.is_some())
            || self
                .found
                .iter()
                .any(|found| matches!(found.part, Some(Part::Application(_))));
        if !declared {
            let text =
                "no helper and no hook declares an application: the snapshot can prove `filesystem` at most";
            self.found.push(Found {
                finding: finding(ErrorCode::Unsupported, Severity::Warning, "hooks", text),
                part: None,
            });
        }
    }

    /// A helper that would fail is left out, or stops the snapshot before anything is frozen.
    fn helper(&mut self, mut helper: Hook, checked: Result<String, HookError>) {
        match checked {
            Ok(version) => {
                helper.version = Some(version).filter(|version| !version.is_empty());
                self.hooks.push(helper);
            }
            Err(error) => {
                let name = helper.application.unwrap_or_default();
                self.application_error(&name, &error.to_string());
            }
        }
    }

    fn application_error(&mut self, name: &str, text: &str) {
        self.found.push(Found {
            finding: finding(ErrorCode::WriterFailed, Severity::Error, name, text),
            part: Some(Part::Application(name.to_owned())),
        });
    }

    fn error(&mut self, code: ErrorCode, subject: &str, text: &str) {
        self.found.push(Found {
            finding: finding(code, Severity::Error, subject, text),
            part: None,
        });
    }
}

/// Would this helper's freeze work? Its application's version.
fn check(helper: &Hook, points: &[PathBuf]) -> Result<String, HookError> {
    let call = Call {
        verb: Verb::Check,
        allowed: CHECK_TIME_MAX,
        freeze: Some((points, Duration::ZERO)),
    };
    helper.run(&call, &mut |_| {}, &|| false)
}

/// The hooks of the directory, unless they were switched off.
fn directory(settings: &Settings) -> Result<Vec<Hook>, hooks::DirError> {
    if settings.features.has(Feature::Hooks) {
        hooks::read_dir(&settings.hooks_dir)
    } else {
        Ok(Vec::new())
    }
}

/// The guests of this host, if they are to be frozen.
fn guests(settings: &Settings) -> Result<Vec<Hook>, String> {
    if !settings.features.has(Feature::Libvirt) {
        return Ok(Vec::new());
    }
    settings
        .libvirt
        .hooks(&settings.root, settings.config_file.as_deref())
}

/// Every hook and helper, in the order of freezing.
pub(crate) fn hooks(settings: &Settings, apps: &[Application]) -> Result<Vec<Hook>, hooks::DirError> {
    let mut hooks = directory(settings)?;
    hooks.extend(apps.iter().map(|app| app.hook(&settings.root)));
    // Guests that cannot be asked for are named by the preflight, not by a list.
    hooks.extend(guests(settings).unwrap_or_default());
    Ok(hooks)
}

/// What `ListVolumes` answers: the LUNs that this host has.
///
/// `standby` are those that another host of a cluster has mounted: this host's session on them is accounted for.
pub(crate) fn list(
    inventory: &Inventory,
    hooks: &[Hook],
    luns: &[LunId],
    standby: &[LunId],
) -> Vec<LunVolumes> {
    luns.iter()
        .filter_map(|lun| list_one(inventory, hooks, *lun, standby.contains(lun)))
        .collect()
}

fn list_one(inventory: &Inventory, hooks: &[Hook], lun: LunId, standby: bool) -> Option<LunVolumes> {
    let name = naa(lun);
    let disk = inventory.paths(&name).next()?;
    let volumes: Vec<&Volume> = inventory.on(&name).collect();
    let points: Vec<PathBuf> = volumes.iter().flat_map(|volume| volume.points.clone()).collect();
    let role = match (volumes.is_empty(), standby) {
        (false, _) => Role::Mounted,
        (true, true) => Role::Standby,
        (true, false) => Role::None,
    };
    let path = disk.path.as_ref();
    let identity = LunIdentity {
        lun,
        serial: disk.serial.clone(),
        iqn: path.map(|path| path.target.clone()),
        number: path.and_then(|path| u16::try_from(path.lun).ok()),
        size_bytes: Some(disk.size_bytes),
    };
    let concerned = hooks
        .iter()
        .filter(|hook| !points.is_empty() && hook.concerns(&points));
    let apps = concerned
        .filter_map(|hook| app(hook, AppState::Ready, None))
        .collect();
    Some(LunVolumes {
        identity,
        role,
        mounts: volumes.into_iter().map(mount).collect(),
        apps,
    })
}

fn mount(volume: &Volume) -> Mount {
    Mount {
        path: volume.name(),
        file_system: volume.fs_type.clone(),
        device: volume.source.clone(),
        read_only: volume.read_only,
        cluster: ["gfs2", "ocfs2"].contains(&volume.fs_type.as_str()),
    }
}

/// The LUNs among these that have something mounted here.
pub(crate) fn mounted(inventory: &Inventory, luns: &[LunId]) -> Vec<LunId> {
    luns.iter()
        .copied()
        .filter(|lun| inventory.on(&naa(*lun)).next().is_some())
        .collect()
}

fn may_freeze(settings: &Settings) -> bool {
    let status = settings.root.text("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    // A kernel that does not tell is asked by the freeze itself.
    bits.is_none_or(|bits| bits >> CAP_SYS_ADMIN & 1 == 1)
}

fn finding(code: ErrorCode, severity: Severity, subject: &str, text: &str) -> Finding {
    Finding {
        code,
        severity,
        subject: subject.to_owned(),
        text: text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
