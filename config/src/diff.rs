//! What changes between two configurations, and whose sessions notice.

use std::fmt;

use serde::Serialize;

use crate::config::{Config, Lun, Target};
use crate::name::IscsiName;
use crate::size::Size;

/// One difference between the configuration that runs and the one in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The LUN, target or section.
    pub subject: String,
    /// What changes, in words.
    pub text: String,
    /// What sessions notice of it.
    pub effect: Effect,
    /// Targets whose sessions are touched by it, as `effect` says.
    #[serde(serialize_with = "as_texts")]
    pub targets: Vec<IscsiName>,
}

/// What a change does to sessions. The order is that of harm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// No session notices.
    None,
    /// Sessions go on and are told by a unit attention.
    Told,
    /// Sessions that the new rule does not admit are ended; the others go on.
    EndsExcluded,
    /// Every session of the targets is ended.
    Ends,
    /// It cannot be applied to a running daemon; nothing of the file is.
    Refused,
}

fn as_texts<S: serde::Serializer>(names: &[IscsiName], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(names.iter().map(IscsiName::as_str))
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.text)
    }
}

/// Everything that differs, refusals included: the caller applies all of it, or nothing.
#[must_use]
pub fn diff(old: &Config, new: &Config) -> Vec<Change> {
    let mut changes = Vec::new();
    diff_fixed(old, new, &mut changes);
    diff_luns(old, new, &mut changes);
    diff_targets(old, new, &mut changes);
    diff_later(old, new, &mut changes);
    changes
}

fn push(
    changes: &mut Vec<Change>,
    subject: impl Into<String>,
    effect: Effect,
    targets: Vec<IscsiName>,
    text: impl Into<String>,
) {
    changes.push(Change {
        subject: subject.into(),
        text: text.into(),
        effect,
        targets,
    });
}

/// What only a restart can change, or nothing at all.
fn diff_fixed(old: &Config, new: &Config, changes: &mut Vec<Change>) {
    let restart = "restart the daemon for it, or put the old value back";
    let mut refuse = |subject: &str, text: String| push(changes, subject, Effect::Refused, Vec::new(), text);
    if old.daemon.data_dir != new.daemon.data_dir {
        let (from, to) = (old.daemon.data_dir.display(), new.daemon.data_dir.display());
        refuse(
            "[daemon]",
            format!("`data_dir` changes from {from} to {to}: {restart}"),
        );
    }
    if old.daemon.control_socket != new.daemon.control_socket {
        let (from, to) = (
            old.daemon.control_socket.display(),
            new.daemon.control_socket.display(),
        );
        refuse(
            "[daemon]",
            format!("`control_socket` changes from {from} to {to}: {restart}"),
        );
    }
    if old.daemon.naa_company_id != new.daemon.naa_company_id {
        let (from, to) = (old.daemon.naa_company_id, new.daemon.naa_company_id);
        refuse(
            "[daemon]",
            format!("`naa_company_id` changes from {from} to {to}: {restart}"),
        );
    }
    if old.daemon.session_memory != new.daemon.session_memory {
        let (from, to) = (old.daemon.session_memory, new.daemon.session_memory);
        refuse(
            "[daemon]",
            format!("`session_memory` changes from {from} to {to}: {restart}"),
        );
    }
    let grain = |config: &Config| config.pool.grain.bytes(config.pool.max_size);
    if grain(old) != grain(new) {
        let (from, to) = (Size(grain(old).into()), Size(grain(new).into()));
        refuse(
            "[pool]",
            format!(
                "the grain changes from {from} to {to}, but it is fixed when the pool is created: put the old value back"
            ),
        );
    }
    if old.pool.cache != new.pool.cache {
        refuse(
            "[pool]",
            format!(
                "`cache` changes from {} to {}: {restart}",
                old.pool.cache, new.pool.cache
            ),
        );
    }
    if old.pool.max_size != new.pool.max_size {
        let show = |size: Option<Size>| size.map_or_else(|| "unlimited".to_owned(), |s| s.to_string());
        refuse(
            "[pool]",
            format!(
                "`max_size` changes from {} to {}: {restart}",
                show(old.pool.max_size),
                show(new.pool.max_size)
            ),
        );
    }
    if old.portals != new.portals {
        refuse("[[portal]]", format!("the portals change: {restart}"));
    }
    let listen = |config: &Config| config.agents.map(|a| (a.listen, a.discovery));
    if listen(old) != listen(new) {
        refuse("[agents]", format!("the listener changes: {restart}"));
    }
}

fn diff_luns(old: &Config, new: &Config, changes: &mut Vec<Change>) {
    for lun in &new.luns {
        let name = lun.name.as_str();
        match old.lun(name) {
            None => {
                let text = format!("is added with {}", lun.size);
                push(changes, format!("lun {name:?}"), Effect::None, Vec::new(), text);
            }
            Some(before) => diff_lun(before, lun, new, changes),
        }
    }
    for lun in old.luns.iter().filter(|lun| new.lun(lun.name.as_str()).is_none()) {
        let text = "leaves the file; its volume stays, as unassigned, until `stillpoint volume delete`";
        push(
            changes,
            format!("lun \"{}\"", lun.name),
            Effect::None,
            Vec::new(),
            text,
        );
    }
}

fn diff_lun(old: &Lun, new: &Lun, config: &Config, changes: &mut Vec<Change>) {
    let subject = format!("lun \"{}\"", new.name);
    let served = || {
        config
            .targets_of(new.name.as_str())
            .map(|t| t.iqn.clone())
            .collect::<Vec<_>>()
    };
    if new.size > old.size {
        push(
            changes,
            &subject,
            Effect::Told,
            served(),
            format!("grows from {} to {}", old.size, new.size),
        );
    } else if new.size < old.size {
        let text = format!(
            "`size` shrinks from {} to {}, which would cut off data: put {} back, or make a smaller LUN beside it",
            old.size, new.size, old.size
        );
        push(changes, &subject, Effect::Refused, Vec::new(), text);
    }
    if old.block_size != new.block_size {
        let text = format!(
            "`block_size` changes from {} to {}, but it is fixed when the volume is created: put the old value back",
            old.block_size, new.block_size
        );
        push(changes, &subject, Effect::Refused, Vec::new(), text);
    }
    if old.read_only != new.read_only {
        let text = if new.read_only {
            "becomes read-only"
        } else {
            "becomes writable"
        };
        // No session ends: writes that are refused from now on say why, and hosts ask MODE SENSE again at their next scan.
        push(changes, &subject, Effect::Told, served(), text);
    }
    if old.write_cache != new.write_cache {
        // WCE under a running session is the initiators' to change (MODE SELECT); this is only where a LUN starts from.
        let text = format!(
            "`write_cache` is {} from the next start on, unless an initiator saved another value",
            new.write_cache
        );
        push(changes, &subject, Effect::None, Vec::new(), text);
    }
    if old.checksums != new.checksums {
        push(changes, &subject, Effect::None, Vec::new(), "`checksums` changes");
    }
}

fn diff_targets(old: &Config, new: &Config, changes: &mut Vec<Change>) {
    for target in &new.targets {
        let iqn = target.iqn.as_str();
        match old.target(iqn) {
            None => push(
                changes,
                format!("target {iqn:?}"),
                Effect::None,
                Vec::new(),
                "is added",
            ),
            Some(before) => diff_target(before, target, changes),
        }
    }
    for target in old
        .targets
        .iter()
        .filter(|t| new.target(t.iqn.as_str()).is_none())
    {
        push(
            changes,
            format!("target \"{}\"", target.iqn),
            Effect::Ends,
            vec![target.iqn.clone()],
            "is removed",
        );
    }
}

fn diff_target(old: &Target, new: &Target, changes: &mut Vec<Change>) {
    let subject = format!("target \"{}\"", new.iqn);
    let mut change = |effect, text: &str| push(changes, &subject, effect, vec![new.iqn.clone()], text);
    if old.has_agents() != new.has_agents() {
        change(
            Effect::EndsExcluded,
            if new.has_agents() {
                "is now used with agents: one path"
            } else {
                "is no longer used with agents"
            },
        );
    }
    if old.luns() != new.luns() {
        if new.luns().starts_with(old.luns()) {
            change(Effect::Told, "has more LUNs");
        } else {
            // LUN numbers would mean other disks under a running session: that must look like another disk.
            change(Effect::Ends, "has other LUNs, or the same under other numbers");
        }
    }
    if old.portal_groups() != new.portal_groups() {
        change(Effect::EndsExcluded, "is reached through other portal groups");
    }
    if old.access != new.access {
        change(Effect::EndsExcluded, "has another access list");
    }
    if old.max_sessions() != new.max_sessions() {
        change(
            Effect::None,
            &format!(
                "allows {} sessions per initiator, for new logins",
                new.max_sessions()
            ),
        );
    }
    if old.chap() != new.chap() {
        let text = match (old.chap(), new.chap()) {
            (None, _) => "asks for CHAP, at the next login",
            (_, None) => "does not ask for CHAP any more",
            _ => "has other CHAP settings or secrets, for the next login",
        };
        change(Effect::None, text);
    }
}

/// Settings that touch no session.
fn diff_later(old: &Config, new: &Config, changes: &mut Vec<Change>) {
    let on_failure = |config: &Config| config.agents.map(|a| a.on_failure);
    if let (Some(before), Some(after)) = (on_failure(old), on_failure(new))
        && before != after
    {
        push(
            changes,
            "[agents]",
            Effect::None,
            Vec::new(),
            format!("`on_failure` is now \"{after}\""),
        );
    }
    if old.schedules != new.schedules {
        push(
            changes,
            "[[schedule]]",
            Effect::None,
            Vec::new(),
            "the schedules change",
        );
    }
    if old.http != new.http {
        push(
            changes,
            "[http]",
            Effect::None,
            Vec::new(),
            "the web settings change",
        );
    }
    if old.metrics != new.metrics {
        push(
            changes,
            "[metrics]",
            Effect::None,
            Vec::new(),
            "the metrics settings change",
        );
    }
}
