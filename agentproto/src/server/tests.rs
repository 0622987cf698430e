//! Rules of the coordinator that the simulation does not reach: the order of freezing, the agents' rate limit, late cuts.

use super::*;
use crate::error::ErrorCode;
use crate::ident::{Fingerprint, SessionId};
use crate::message::{
    Aborted, App, AppState, Capabilities, Frozen, FrozenVolume, LunIdentity, LunVolumes, Mode,
    PreflightReport, Prepared, Request, Role, Thawed, Volumes,
};

const LUN: LunId = LunId([6; 16]);
const LINUX: AgentId = AgentId([1; 16]);
const WINDOWS: AgentId = AgentId([2; 16]);

fn identity() -> LunIdentity {
    LunIdentity {
        lun: LUN,
        serial: Some("s1".into()),
        iqn: None,
        number: Some(0),
        size_bytes: Some(1024),
    }
}

fn begin(now: Instant, on_failure: OnFailure, refused: Option<Refusal>) -> Coordinator {
    let candidate = |agent, capabilities| Candidate {
        agent,
        host: format!("{agent}"),
        version: "1".into(),
        fingerprint: Fingerprint([0; 32]),
        capabilities,
        luns: vec![LUN],
        last_mounted: vec![],
    };
    let candidates = vec![
        candidate(LINUX, Capabilities::LINUX_FS),
        candidate(WINDOWS, Capabilities::VSS_REQUESTER),
    ];
    let spec = Spec {
        session: SessionId([9; 16]),
        snapshot: "s".into(),
        luns: vec![LunSpec {
            name: "lun".into(),
            identity: identity(),
        }],
        mode: Mode::Filesystem,
        on_failure,
        hold: Duration::from_secs(20),
        sessions: vec![],
        refused,
    };
    Coordinator::new(now, spec, candidates)
}

fn sends(machine: &mut Coordinator) -> Vec<(u64, AgentId, Request)> {
    let actions = std::iter::from_fn(|| machine.poll_action());
    actions
        .filter_map(|action| match action {
            Action::Send { call, agent, request } => Some((call, agent, request)),
            _ => None,
        })
        .collect()
}

/// Two cluster nodes that see the LUN as `seen`; answers everything up to the point where Prepare is to be answered.
fn to_prepare(machine: &mut Coordinator, now: Instant, seen: &LunIdentity) -> Vec<(u64, AgentId, Request)> {
    for (call, _, _) in sends(machine) {
        let volumes = LunVolumes {
            identity: seen.clone(),
            role: Role::Mounted,
            mounts: vec![],
            apps: vec![],
        };
        let reply = Volumes {
            luns: vec![volumes],
            initiators: vec![],
        };
        machine.replied(now, call, Ok(Reply::ListVolumes(reply)));
    }
    for (call, _, _) in sends(machine) {
        machine.replied(
            now,
            call,
            Ok(Reply::Preflight(PreflightReport { findings: vec![] })),
        );
    }
    sends(machine)
}

fn prepared() -> Result<Reply, Refusal> {
    Ok(Reply::Prepare(Prepared {
        apps: vec![],
        exclusions: vec![],
    }))
}

fn frozen() -> Result<Reply, Refusal> {
    let volume = FrozenVolume {
        lun: LUN,
        path: "/".into(),
        frozen: true,
        error: None,
    };
    Ok(Reply::Freeze(Frozen {
        remaining_ms: 5000,
        volumes: vec![volume],
        apps: vec![],
    }))
}

/// Up to the cut, which is not made yet.
fn to_cut(machine: &mut Coordinator, now: Instant) {
    for (call, ..) in to_prepare(machine, now, &identity()) {
        machine.replied(now, call, prepared());
    }
    assert_eq!(machine.poll_action(), Some(Action::Settle));
    machine.settled(now);
    // VSS writers may take a minute before their hold begins: they go first, and with a hold that VSS grants.
    let windows = sends(machine);
    let [(call, WINDOWS, Request::Freeze(freeze))] = &windows[..] else {
        panic!("{windows:?}")
    };
    assert_eq!(freeze.hold_ms, 8000);
    machine.replied(now, *call, frozen());
    let linux = sends(machine);
    let [(call, LINUX, Request::Freeze(freeze))] = &linux[..] else {
        panic!("{linux:?}")
    };
    assert_eq!(freeze.hold_ms, 20_000);
    machine.replied(now, *call, frozen());
    assert_eq!(machine.poll_action(), Some(Action::Cut));
}

#[test]
fn the_slowest_to_freeze_goes_first() {
    let now = Instant::now();
    to_cut(&mut begin(now, OnFailure::Fail, None), now);
}

#[test]
fn an_application_that_failed_is_not_missing_from_the_record() {
    let who = Candidate {
        agent: LINUX,
        host: "h".into(),
        version: "1".into(),
        fingerprint: Fingerprint([0; 32]),
        capabilities: Capabilities::LINUX_FS,
        luns: vec![LUN],
        last_mounted: vec![LUN],
    };
    let app = |name: &str, state, error: Option<&str>| App {
        kind: "hook".into(),
        instance: name.into(),
        component: None,
        version: None,
        state,
        error: error.map(str::to_owned),
        lun: None,
    };
    let mut party = Party::new(who);
    party.prepared = Some(Prepared {
        apps: vec![
            app("db", AppState::Ready, None),
            app("mail", AppState::Ready, None),
        ],
        exclusions: vec![],
    });
    party.frozen = Some(Frozen {
        remaining_ms: 1,
        volumes: vec![],
        apps: vec![
            app("db", AppState::Frozen, None),
            app("mail", AppState::Failed, Some("full")),
        ],
    });
    party.thawed = Some(Thawed {
        held_ms: 1,
        hold_ok: true,
        apps: vec![app("db", AppState::Thawed, None)],
        reason: None,
        documents: vec![],
    });
    let apps = party.report().apps;
    let states: Vec<_> = apps
        .iter()
        .map(|app| (app.instance.as_str(), app.state))
        .collect();
    assert_eq!(states, [("db", AppState::Thawed), ("mail", AppState::Failed)]);
    assert_eq!(apps[1].error.as_deref(), Some("full"));
}

#[test]
fn the_agents_rate_limit_is_waited_for_once_it_is_short() {
    let now = Instant::now();
    let mut machine = begin(now, OnFailure::Fail, None);
    let asks = to_prepare(&mut machine, now, &identity());
    let busy = Refusal::new(ErrorCode::Busy, "frozen less than 10 s ago").retry_after(4000);
    machine.replied(now, asks[0].0, Err(busy));
    machine.replied(now, asks[1].0, prepared());
    assert_eq!(sends(&mut machine), []);
    let later = now + Duration::from_secs(4);
    assert_eq!(machine.poll_timeout(), Some(later));
    machine.handle_timeout(later);
    let again = sends(&mut machine);
    assert!(
        matches!(&again[..], [(_, agent, Request::Prepare(_))] if *agent == asks[0].1),
        "{again:?}"
    );
    let far = Refusal::new(ErrorCode::Busy, "not before tomorrow").retry_after(60_000);
    machine.replied(later, again[0].0, Err(far));
    assert!(
        sends(&mut machine)
            .iter()
            .all(|(_, _, request)| matches!(request, Request::Abort(_)))
    );
}

#[test]
fn a_cut_of_more_than_two_seconds_is_refused_and_what_it_made_is_discarded() {
    let now = Instant::now();
    let mut machine = begin(now, OnFailure::Fail, None);
    to_cut(&mut machine, now);
    let late = now + CUT_MAX;
    machine.handle_timeout(late);
    let aborts = sends(&mut machine);
    let aborts: Vec<_> = aborts
        .iter()
        .filter(|(_, _, request)| matches!(request, Request::Abort(_)))
        .collect();
    assert_eq!(
        aborts.len(),
        2,
        "nobody stays frozen for a cut that does not come"
    );
    for (call, ..) in aborts {
        machine.replied(
            late,
            *call,
            Ok(Reply::Abort(Aborted {
                held_ms: Some(2000),
                reason: None,
            })),
        );
    }
    machine.cut_made(late, Ok(1), &[]);
    assert_eq!(machine.poll_action(), Some(Action::Discard));
    machine.cut_durable(late, Ok(()));
    machine.discarded(late, Ok(()));
    let sent: Vec<_> = std::iter::from_fn(|| machine.poll_action()).collect();
    assert!(
        !sent.iter().any(|action| matches!(action, Action::Promote(_))),
        "{sent:?}"
    );
}

fn unreachable() -> Result<Reply, Refusal> {
    Err(Refusal::new(ErrorCode::Unreachable, "the connection broke"))
}

/// Up to Release, which the Windows agent answers and the other one never hears; how long it is repeated.
fn release_repeated_for(registered: bool) -> (Coordinator, Instant, Duration) {
    let now = Instant::now();
    let mut machine = begin(now, OnFailure::Fail, None);
    to_cut(&mut machine, now);
    machine.cut_made(now, Ok(1), &[]);
    machine.cut_durable(now, Ok(()));
    machine.registered(LINUX, registered);
    let mut last = now;
    let mut at = now;
    loop {
        let sent = sends(&mut machine);
        if sent
            .iter()
            .any(|(_, _, request)| matches!(request, Request::Abort(_)))
        {
            return (machine, at, last - now);
        }
        for (call, agent, request) in sent {
            match request {
                Request::Release(_) if agent == WINDOWS => machine.replied(
                    at,
                    call,
                    Ok(Reply::Release(Thawed {
                        held_ms: 9,
                        hold_ok: true,
                        apps: vec![],
                        reason: None,
                        documents: vec![],
                    })),
                ),
                Request::Release(_) => {
                    last = at;
                    machine.replied(at, call, unreachable());
                }
                _ => machine.replied(at, call, unreachable()),
            }
        }
        if machine.stage == Stage::Discarding {
            machine.discarded(at, Ok(()));
        }
        at = machine.poll_timeout().unwrap_or(at).max(at);
        machine.handle_timeout(at);
        assert!(at < now + Duration::from_secs(300), "it never gives up");
    }
}

#[test]
fn release_is_repeated_to_the_end_of_the_lease_and_shorter_for_an_agent_that_is_gone() {
    let (_, _, lasted) = release_repeated_for(true);
    assert!(
        lasted > Duration::from_secs(85) && lasted < Duration::from_secs(90),
        "{lasted:?}"
    );
    let (_, _, lasted) = release_repeated_for(false);
    assert!(
        lasted > Duration::from_secs(9) && lasted < Duration::from_secs(10),
        "{lasted:?}"
    );
}

/// The proof comes late, over a new connection, and counts.
#[test]
fn a_release_that_is_answered_at_last_keeps_the_proof() {
    let now = Instant::now();
    let mut machine = begin(now, OnFailure::Fail, None);
    to_cut(&mut machine, now);
    machine.cut_made(now, Ok(1), &[]);
    machine.cut_durable(now, Ok(()));
    let releases = sends(&mut machine);
    for (call, ..) in &releases {
        machine.replied(now, *call, unreachable());
    }
    let late = now + Duration::from_secs(60);
    machine.handle_timeout(late);
    let again = sends(&mut machine);
    let again: Vec<_> = again
        .iter()
        .filter(|(_, _, request)| matches!(request, Request::Release(_)))
        .collect();
    assert_eq!(again.len(), 2);
    for (call, ..) in again {
        let thawed = Thawed {
            held_ms: 9,
            hold_ok: true,
            apps: vec![],
            reason: None,
            documents: vec![],
        };
        machine.replied(late, *call, Ok(Reply::Release(thawed)));
    }
    let Some(Action::Promote(verdict)) = machine.poll_action() else {
        panic!("nothing was proved")
    };
    assert_eq!(verdict.lowest(), Level::Filesystem);
}

#[test]
fn abort_is_repeated_until_it_is_answered_and_not_for_ever() {
    let (mut machine, now, _) = release_repeated_for(false);
    // Taken out by `release_repeated_for`, and lost: it is repeated.
    let aborts = |machine: &mut Coordinator| {
        let sent = sends(machine).into_iter();
        sent.filter(|(_, _, request)| matches!(request, Request::Abort(_)))
            .collect::<Vec<_>>()
    };
    let mut at = now;
    let mut count = 0;
    while let Some(next) = machine.poll_timeout() {
        at = at.max(next);
        machine.handle_timeout(at);
        for (call, agent, _) in aborts(&mut machine) {
            count += usize::from(agent == LINUX);
            machine.replied(at, call, unreachable());
        }
    }
    // Every 500 ms for 30 s, after the 36 s in which the first one went unanswered.
    assert!((50..=61).contains(&count), "{count} times");
    assert_eq!(machine.stage, Stage::Closed);
    let lasted = at - now;
    assert!(lasted < Duration::from_secs(120), "{lasted:?}");
}

#[test]
fn another_disk_is_refused_but_one_that_was_not_rescanned_after_growing_is_not() {
    let now = Instant::now();
    for (seen, fits) in [
        (
            LunIdentity {
                serial: Some("s1   ".into()),
                ..identity()
            },
            true,
        ),
        (
            LunIdentity {
                size_bytes: Some(512),
                ..identity()
            },
            true,
        ),
        (
            LunIdentity {
                size_bytes: Some(2048),
                ..identity()
            },
            false,
        ),
        (
            LunIdentity {
                serial: Some("s2".into()),
                ..identity()
            },
            false,
        ),
        (
            LunIdentity {
                number: Some(1),
                ..identity()
            },
            false,
        ),
    ] {
        let mut machine = begin(now, OnFailure::Fail, None);
        assert_eq!(
            to_prepare(&mut machine, now, &seen).len(),
            if fits { 2 } else { 0 },
            "{seen:?}"
        );
    }
}

#[test]
fn what_the_target_itself_refuses_freezes_nobody() {
    let now = Instant::now();
    let refused = Refusal::new(ErrorCode::LimitChap, "CHAP");
    let mut machine = begin(now, OnFailure::Fail, Some(refused));
    assert_eq!(to_prepare(&mut machine, now, &identity()), []);
    assert!(machine.decided);
    assert_eq!(
        machine.failure.map(|failure| failure.refusal.code),
        Some(ErrorCode::LimitChap)
    );
}
