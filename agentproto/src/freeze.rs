//! Holds, cut windows, and what may be claimed (specification §§6, 7). The rules, apart from the machines that use them.

use std::time::{Duration, Instant};

use crate::ident::LunId;
use crate::message::{App, AppState, ExclusionKind, Frozen, Prepared, Thawed};
use crate::wire::wire_enum;

/// The hold that the target asks of a Linux agent unless configured otherwise.
pub const HOLD_DEFAULT: Duration = Duration::from_secs(5);
/// The hold that the target asks of a VSS agent: the kernel cancels at 10 s.
pub const HOLD_VSS: Duration = Duration::from_secs(8);
/// The longest hold that a Linux agent grants.
pub const HOLD_MAX: Duration = Duration::from_secs(60);
/// Prepared and no Freeze for this long: the agent aborts.
pub const PREPARED_IDLE: Duration = Duration::from_secs(300);
/// The same with VM snapshots.
pub const PREPARED_IDLE_VMWARE: Duration = Duration::from_secs(1800);
/// One frozen session per LUN in this time (the agent enforces it).
pub const MIN_INTERVAL: Duration = Duration::from_secs(10);
/// The target sends `Status` this often while something is frozen.
pub const KEEPALIVE: Duration = Duration::from_secs(1);
/// An agent that is frozen and hears nothing for this long thaws.
pub const KEEPALIVE_LOST: Duration = Duration::from_secs(3);
/// Before the end of the smallest hold, so much is no time for a cut any more.
pub const CUT_MARGIN: Duration = Duration::from_secs(1);
/// A cut that takes longer is refused.
pub const CUT_MAX: Duration = Duration::from_secs(2);
/// The budget of the freeze hooks, outside the hold.
pub const HOOK_BUDGET: Duration = Duration::from_secs(30);

wire_enum!(
    /// What a snapshot can claim. Ordered: more is more.
    Level {
        /// As after a power cut.
        Crash = 0 "crash",
        /// Every file system on the LUN was frozen.
        Filesystem = 1 "filesystem",
        /// And every application on it took part.
        Application = 2 "application",
    }
);

/// One freeze's time, on the agent's monotonic clock. Nothing extends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    started: Instant,
    deadline: Instant,
}

impl Hold {
    /// Starts a hold: before the first FIFREEZE, after the freeze hooks.
    #[must_use]
    pub fn start(now: Instant, asked: Duration, cap: Duration) -> Self {
        Self {
            started: now,
            deadline: now + asked.min(cap),
        }
    }

    /// When it ends by itself.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it is still in force.
    #[must_use]
    pub fn in_force(&self, now: Instant) -> bool {
        now < self.deadline
    }

    /// What is left, in milliseconds, rounded down: a promise to the target must not be longer than the truth.
    #[must_use]
    pub fn remaining_ms(&self, now: Instant) -> u32 {
        millis(self.deadline.saturating_duration_since(now))
    }

    /// How long it has lasted, in milliseconds.
    #[must_use]
    pub fn held_ms(&self, now: Instant) -> u32 {
        millis(now.saturating_duration_since(self.started))
    }
}

/// The time in which the target may cut: the smallest of what the agents said is left, less a margin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutWindow {
    cut_by: Option<Instant>,
}

impl CutWindow {
    /// Takes a `Frozen` that arrived at `now` (the receiver's clock; clocks are never compared).
    pub fn narrow(&mut self, now: Instant, remaining_ms: u32) {
        let left = Duration::from_millis(u64::from(remaining_ms)).saturating_sub(CUT_MARGIN);
        let by = now + left;
        self.cut_by = Some(self.cut_by.map_or(by, |old| old.min(by)));
    }

    /// The last moment for a cut, once somebody is frozen.
    #[must_use]
    pub fn cut_by(&self) -> Option<Instant> {
        self.cut_by
    }

    /// Whether a cut begun now can be of use.
    #[must_use]
    pub fn is_open(&self, now: Instant) -> bool {
        self.cut_by.is_some_and(|by| now < by)
    }
}

/// What one required agent said in the course of a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// Its Prepared.
    pub prepared: &'a Prepared,
    /// Its Frozen.
    pub frozen: &'a Frozen,
    /// Its Thawed.
    pub thawed: &'a Thawed,
}

/// What is proved for a LUN, and what keeps it from more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The level.
    pub level: Level,
    /// Why it is not higher; empty for `application`.
    pub shortfalls: Vec<String>,
}

impl Proof {
    fn crash(why: impl Into<String>) -> Self {
        Self {
            level: Level::Crash,
            shortfalls: vec![why.into()],
        }
    }
}

/// The level that the required agents of a LUN proved. An agent that did not answer has no evidence: pass `None`, and
/// nothing above `crash` is proved. An empty list proves nothing either.
#[must_use]
pub fn prove(lun: LunId, evidence: &[Option<Evidence<'_>>]) -> Proof {
    if evidence.is_empty() {
        return Proof::crash("no agent was asked");
    }
    let Some(evidence) = evidence.iter().copied().collect::<Option<Vec<_>>>() else {
        return Proof::crash("an agent gave no answer");
    };
    if let Some(one) = evidence.iter().find(|one| !one.thawed.hold_ok) {
        return Proof::crash(
            one.thawed
                .reason
                .clone()
                .unwrap_or_else(|| "the hold was not in force".into()),
        );
    }
    let missing: Vec<String> = evidence.iter().filter_map(|one| unfrozen(lun, one)).collect();
    if !missing.is_empty() {
        return Proof {
            level: Level::Crash,
            shortfalls: missing,
        };
    }
    let lacking = applications_lacking(lun, &evidence);
    let level = if lacking.is_empty() {
        Level::Application
    } else {
        Level::Filesystem
    };
    Proof {
        level,
        shortfalls: lacking,
    }
}

/// Why an agent does not prove `filesystem` for a LUN.
fn unfrozen(lun: LunId, evidence: &Evidence<'_>) -> Option<String> {
    let on_lun = |of: Option<LunId>| of.is_none_or(|of| of == lun);
    let mut exclusions = evidence.prepared.exclusions.iter();
    if let Some(left_out) = exclusions.find(|e| e.kind == ExclusionKind::Volume && on_lun(e.lun)) {
        return Some(format!("{} was left out: {}", left_out.subject, left_out.reason));
    }
    let mut volumes = evidence
        .frozen
        .volumes
        .iter()
        .filter(|volume| volume.lun == lun)
        .peekable();
    if volumes.peek().is_none() {
        return Some(format!("no file system of {lun} was frozen"));
    }
    let bad = volumes.find(|volume| !volume.frozen)?;
    Some(format!(
        "{} was not frozen: {}",
        bad.path,
        bad.error.as_deref().unwrap_or("no reason given")
    ))
}

/// Why `application` is not proved for a LUN; empty when it is.
fn applications_lacking(lun: LunId, evidence: &[Evidence<'_>]) -> Vec<String> {
    let on_lun = |of: Option<LunId>| of.is_none_or(|of| of == lun);
    let mut lacking = Vec::new();
    let mut took_part = 0;
    for one in evidence {
        let exclusions = one.prepared.exclusions.iter().filter(|e| on_lun(e.lun));
        lacking.extend(exclusions.map(|e| format!("{} was left out: {}", e.subject, e.reason)));
        let known = one
            .prepared
            .apps
            .iter()
            .chain(&one.frozen.apps)
            .chain(&one.thawed.apps);
        let mut names: Vec<&App> = known.filter(|app| on_lun(app.lun)).collect();
        names.sort_by_key(|app| name_of(app));
        names.dedup_by_key(|app| name_of(app));
        for app in names {
            match failure_of(app, one) {
                None => took_part += 1,
                Some(why) => lacking.push(format!("{} {}: {why}", app.kind, app.instance)),
            }
        }
    }
    if took_part == 0 && lacking.is_empty() {
        lacking.push("no application is known on it".into());
    }
    lacking
}

fn name_of(app: &App) -> (&str, &str, Option<&str>) {
    (&app.kind, &app.instance, app.component.as_deref())
}

/// Why an application does not count: it must have said `frozen` in Frozen and `thawed` in Thawed.
fn failure_of(app: &App, evidence: &Evidence<'_>) -> Option<String> {
    let steps = [
        (&evidence.frozen.apps, AppState::Frozen),
        (&evidence.thawed.apps, AppState::Thawed),
    ];
    steps.into_iter().find_map(|(said, wanted)| {
        let Some(said) = said.iter().find(|said| name_of(said) == name_of(app)) else {
            return Some(format!("did not report `{wanted}`"));
        };
        let bad = said.state != wanted;
        bad.then(|| {
            said.error
                .clone()
                .unwrap_or_else(|| format!("{} instead of {wanted}", said.state))
        })
    })
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Exclusion, FrozenVolume};

    const LUN: LunId = LunId([6; 16]);
    const OTHER: LunId = LunId([7; 16]);

    fn app(name: &str, state: AppState) -> App {
        App {
            kind: "hook".into(),
            instance: name.into(),
            component: None,
            version: None,
            state,
            error: None,
            lun: None,
        }
    }

    fn volume(lun: LunId, frozen: bool) -> FrozenVolume {
        FrozenVolume {
            lun,
            path: "/srv".into(),
            frozen,
            error: None,
        }
    }

    struct Said(Prepared, Frozen, Thawed);

    impl Said {
        fn good(apps: &[&str]) -> Self {
            let at = |state| apps.iter().map(|name| app(name, state)).collect::<Vec<_>>();
            Self(
                Prepared {
                    apps: at(AppState::Ready),
                    exclusions: vec![],
                },
                Frozen {
                    remaining_ms: 4000,
                    volumes: vec![volume(LUN, true)],
                    apps: at(AppState::Frozen),
                },
                Thawed {
                    held_ms: 9,
                    hold_ok: true,
                    apps: at(AppState::Thawed),
                    reason: None,
                    documents: vec![],
                },
            )
        }

        fn evidence(&self) -> Option<Evidence<'_>> {
            Some(Evidence {
                prepared: &self.0,
                frozen: &self.1,
                thawed: &self.2,
            })
        }
    }

    fn level(said: &[&Said]) -> Level {
        let evidence: Vec<_> = said.iter().map(|said| said.evidence()).collect();
        prove(LUN, &evidence).level
    }

    #[test]
    fn nothing_is_claimed_without_proof() {
        assert_eq!(prove(LUN, &[]).level, Level::Crash);
        let good = Said::good(&["db"]);
        assert_eq!(prove(LUN, &[good.evidence(), None]).level, Level::Crash);
        assert_eq!(prove(OTHER, &[good.evidence()]).level, Level::Crash);
        assert_eq!(level(&[&good]), Level::Application);
        assert_eq!(level(&[&Said::good(&[])]), Level::Filesystem);
        assert_eq!(level(&[&good, &Said::good(&[])]), Level::Application);
    }

    #[test]
    fn each_shortfall_costs_its_level() {
        let mut expired = Said::good(&["db"]);
        expired.2.hold_ok = false;
        assert_eq!(level(&[&Said::good(&["db"]), &expired]), Level::Crash);
        let mut half = Said::good(&["db"]);
        half.1.volumes.push(volume(LUN, false));
        assert_eq!(level(&[&half]), Level::Crash);
        for (kind, on, proved) in [
            (ExclusionKind::Volume, None, Level::Crash),
            (ExclusionKind::Volume, Some(OTHER), Level::Application),
            (ExclusionKind::Application, Some(LUN), Level::Filesystem),
        ] {
            let mut left_out = Said::good(&["db"]);
            left_out.0.exclusions.push(Exclusion {
                kind,
                subject: "x".into(),
                reason: "y".into(),
                lun: on,
            });
            assert_eq!(level(&[&left_out]), proved, "{kind} {on:?}");
        }
    }

    #[test]
    fn an_application_must_succeed_at_every_step() {
        let mut silent = Said::good(&["db", "mail"]);
        silent.2.apps.pop();
        assert_eq!(level(&[&silent]), Level::Filesystem);
        let mut failed = Said::good(&["db", "mail"]);
        failed.1.apps[1] = app("mail", AppState::Failed);
        assert_eq!(level(&[&failed]), Level::Filesystem);
        let mut never_frozen = Said::good(&["db"]);
        never_frozen.1.apps.clear();
        assert_eq!(level(&[&never_frozen]), Level::Filesystem);
    }

    #[test]
    fn the_window_is_the_smallest_hold_less_the_margin() {
        let start = Instant::now();
        let mut window = CutWindow::default();
        assert!(!window.is_open(start));
        window.narrow(start, 5000);
        window.narrow(start + Duration::from_millis(500), 8000);
        assert!(window.is_open(start + Duration::from_millis(3999)));
        assert!(!window.is_open(start + Duration::from_secs(4)));
        let hold = Hold::start(start, Duration::from_secs(90), HOLD_MAX);
        assert_eq!(hold.deadline(), start + HOLD_MAX);
        assert!(!hold.in_force(start + HOLD_MAX));
        assert_eq!(hold.remaining_ms(start + Duration::from_micros(1)), 59_999);
    }
}
