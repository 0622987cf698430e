//! The agent's rules, one by one. The schedules nobody thinks of are in `tests/simulation.rs`.

use super::*;
use crate::message::{Abort, AppState, Complete, CutOutcome, Freeze, Frozen, Release, Status, Thawed};

const LUN: LunId = LunId([6; 16]);
const HOLD: u32 = 5000;

/// An agent, a clock, and a channel.
struct Bench {
    agent: Agent,
    now: Instant,
    next_id: u32,
    channel: u64,
}

impl Bench {
    fn new() -> Self {
        Self {
            agent: Agent::new(Config::default(), 3),
            now: Instant::now(),
            next_id: 1,
            channel: 1,
        }
    }

    fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        if self.agent.poll_timeout().is_some_and(|at| at <= self.now) {
            self.agent.handle_timeout(self.now);
        }
    }

    fn ask_at(&mut self, generation: u32, request: Request) -> Vec<Output> {
        let asked = Asked {
            channel: self.channel,
            id: self.next_id,
        };
        self.next_id += 1;
        self.agent.request(self.now, asked, generation, request);
        self.outputs()
    }

    fn ask(&mut self, request: Request) -> Vec<Output> {
        self.ask_at(3, request)
    }

    fn outputs(&mut self) -> Vec<Output> {
        let all = std::iter::from_fn(|| self.agent.poll_output());
        all.filter(|output| !matches!(output, Output::Log(_))).collect()
    }

    fn prepare(&mut self, session: SessionId) {
        let request = prepare(session);
        assert!(matches!(self.ask(request)[..], [Output::Work(Work::Prepare(_))]));
        self.agent.prepared(
            self.now,
            session,
            Ok(Prepared {
                apps: vec![],
                exclusions: vec![],
            }),
        );
        assert!(matches!(
            self.outputs()[..],
            [Output::Reply {
                result: Ok(Reply::Prepare(_)),
                ..
            }]
        ));
    }

    fn freeze(&mut self, session: SessionId) -> Frozen {
        let outputs = self.ask(freeze(session));
        let [Output::Work(Work::Freeze { hold, .. })] = outputs[..] else {
            panic!("{outputs:?}")
        };
        assert_eq!(hold, Duration::from_millis(u64::from(HOLD)));
        let deadline = self.agent.hold_started(self.now, session).unwrap();
        assert_eq!(deadline, self.now + hold);
        let report = FreezeReport {
            volumes: vec![],
            apps: vec![],
        };
        self.agent.frozen(self.now, session, Ok(report));
        let outputs = self.outputs();
        let [
            Output::Reply {
                result: Ok(Reply::Freeze(frozen)),
                ..
            },
        ] = &outputs[..]
        else {
            panic!("{outputs:?}")
        };
        frozen.clone()
    }

    fn thawed(&mut self, session: SessionId, report: ThawReport) -> Vec<Output> {
        self.agent.thawed(self.now, session, report);
        self.outputs()
    }
}

fn session(n: u8) -> SessionId {
    SessionId([n; 16])
}

fn prepare(session: SessionId) -> Request {
    let (mode, require) = (Mode::Filesystem, Require::BestEffort);
    Request::Prepare(Prepare {
        session,
        luns: vec![LUN],
        mode,
        hold_ms: HOLD,
        require,
    })
}

fn freeze(session: SessionId) -> Request {
    Request::Freeze(Freeze {
        session,
        hold_ms: HOLD,
    })
}

fn release(session: SessionId) -> Request {
    Request::Release(Release {
        session,
        outcome: CutOutcome::Taken,
        snapshot: None,
        cut_unix_ms: None,
    })
}

fn abort(session: SessionId) -> Request {
    Request::Abort(Abort {
        session,
        reason: "test".into(),
    })
}

fn clean_thaw() -> ThawReport {
    ThawReport {
        in_force: true,
        apps: vec![],
        reason: None,
        held: None,
        documents: vec![],
    }
}

fn refused(outputs: &[Output]) -> &Refusal {
    let [
        Output::Reply {
            result: Err(refusal), ..
        },
    ] = outputs
    else {
        panic!("{outputs:?}")
    };
    refusal
}

fn thawed(outputs: &[Output]) -> &Thawed {
    let [
        Output::Reply {
            result: Ok(Reply::Release(thawed)),
            ..
        },
    ] = outputs
    else {
        panic!("{outputs:?}")
    };
    thawed
}

fn is_thaw(outputs: &[Output], released_in_time: bool) -> bool {
    matches!(outputs, [Output::Work(Work::Thaw { released, .. })] if *released == released_in_time)
}

#[test]
fn a_session_runs_from_prepare_to_complete() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    assert_eq!(bench.freeze(session(1)).remaining_ms, HOLD);
    bench.pass(700);
    assert!(is_thaw(&bench.ask(release(session(1))), true));
    let outputs = bench.thawed(session(1), clean_thaw());
    assert_eq!(
        *thawed(&outputs),
        Thawed {
            held_ms: 700,
            hold_ok: true,
            apps: vec![],
            reason: None,
            documents: vec![],
        }
    );
    let complete = Request::Complete(Complete {
        session: session(1),
        level: Level::Filesystem,
    });
    assert!(matches!(
        bench.ask(complete)[..],
        [Output::Work(Work::Clean {
            recorded: Some(Level::Filesystem),
            ..
        })]
    ));
    bench.agent.cleaned(bench.now, session(1), None);
    assert!(matches!(
        bench.outputs()[..],
        [Output::Reply {
            result: Ok(Reply::Complete(_)),
            ..
        }]
    ));
    assert!(bench.agent.is_idle());
}

#[test]
fn repeats_get_the_stored_answer_and_other_content_conflicts() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    assert!(matches!(
        bench.ask(prepare(session(1)))[..],
        [Output::Reply {
            result: Ok(Reply::Prepare(_)),
            ..
        }]
    ));
    let other = Request::Prepare(Prepare {
        session: session(1),
        luns: vec![LUN, LunId([7; 16])],
        mode: Mode::Filesystem,
        hold_ms: HOLD,
        require: Require::BestEffort,
    });
    assert_eq!(refused(&bench.ask(other)).code, ErrorCode::Conflict);
    bench.freeze(session(1));
    assert!(is_thaw(&bench.ask(release(session(1))), true));
    // A repeat while the thaw runs waits for the same answer, also over another connection.
    bench.channel = 2;
    assert_eq!(bench.ask(release(session(1))), []);
    let outputs = bench.thawed(session(1), clean_thaw());
    assert_eq!(outputs.len(), 2, "both are answered: {outputs:?}");
    assert!(thawed(&bench.ask(release(session(1)))).hold_ok);
}

#[test]
fn a_hold_ends_by_itself_and_cannot_be_claimed_afterwards() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    bench.freeze(session(1));
    // The keepalive: something is heard every second.
    for _ in 0..4 {
        bench.pass(1000);
        let status = Request::Status(Status { session: None });
        assert!(matches!(
            bench.ask(status)[..],
            [Output::Reply {
                result: Ok(Reply::Status(_)),
                ..
            }]
        ));
    }
    bench.pass(999);
    assert_eq!(bench.outputs(), []);
    bench.pass(1);
    assert!(is_thaw(&bench.outputs(), false));
    bench.thawed(session(1), clean_thaw());
    let outputs = bench.ask(release(session(1)));
    assert!(!thawed(&outputs).hold_ok, "{outputs:?}");
}

/// The timer may be late (a busy host): the clock decides, not whether the timer has run.
#[test]
fn a_release_after_the_deadline_is_no_proof_even_if_nobody_thawed() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    bench.freeze(session(1));
    bench.now += Duration::from_millis(u64::from(HOLD));
    assert!(is_thaw(&bench.ask(release(session(1))), false));
    let outputs = bench.thawed(session(1), clean_thaw());
    assert!(!thawed(&outputs).hold_ok);
}

#[test]
fn silence_a_lost_channel_a_lost_lease_and_a_stop_thaw_at_once() {
    type Cause = (&'static str, fn(&mut Bench));
    let causes: [Cause; 4] = [
        ("silence", |bench| bench.pass(3000)),
        ("channel", |bench| bench.agent.channel_lost(bench.now, 1)),
        ("lease", |bench| bench.agent.lease_lost(bench.now)),
        ("stop", |bench| bench.agent.stop(bench.now)),
    ];
    for (name, cause) in causes {
        let mut bench = Bench::new();
        bench.prepare(session(1));
        bench.freeze(session(1));
        cause(&mut bench);
        assert!(is_thaw(&bench.outputs(), false), "{name}");
        bench.agent.thawed(bench.now, session(1), clean_thaw());
        bench.outputs();
        bench.channel = 2;
        let outputs = bench.ask(release(session(1)));
        let proved = outputs.iter().any(|output| {
            matches!(output, Output::Reply { result: Ok(Reply::Release(thawed)), .. } if thawed.hold_ok)
        });
        assert!(!proved, "{name}");
    }
}

#[test]
fn the_hold_that_was_measured_is_told_without_the_hooks_after_it() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    bench.freeze(session(1));
    bench.ask(release(session(1)));
    bench.pass(2000);
    let report = ThawReport {
        held: Some(Duration::from_millis(40)),
        ..clean_thaw()
    };
    let outputs = bench.thawed(session(1), report);
    assert_eq!((thawed(&outputs).held_ms, thawed(&outputs).hold_ok), (40, true));
}

#[test]
fn what_others_thawed_or_an_application_failed_is_no_proof() {
    let failed = App {
        kind: "hook".into(),
        instance: "db".into(),
        component: None,
        version: None,
        state: AppState::Failed,
        error: None,
        lun: None,
    };
    for report in [
        ThawReport {
            in_force: false,
            ..clean_thaw()
        },
        ThawReport {
            apps: vec![failed],
            ..clean_thaw()
        },
    ] {
        let mut bench = Bench::new();
        bench.prepare(session(1));
        bench.freeze(session(1));
        bench.ask(release(session(1)));
        let outputs = bench.thawed(session(1), report);
        assert!(!thawed(&outputs).hold_ok && thawed(&outputs).reason.is_some());
    }
}

#[test]
fn one_session_per_lun_and_one_freeze_per_interval() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    let outputs = bench.ask(prepare(session(2)));
    assert_eq!(
        (refused(&outputs).code, refused(&outputs).session),
        (ErrorCode::Busy, Some(session(1)))
    );
    bench.freeze(session(1));
    bench.ask(release(session(1)));
    bench.thawed(session(1), clean_thaw());
    bench.pass(2000);
    let outputs = bench.ask(prepare(session(2)));
    assert_eq!(
        (refused(&outputs).code, refused(&outputs).retry_after_ms),
        (ErrorCode::Busy, Some(8001))
    );
    bench.pass(8001);
    bench.prepare(session(2));
}

/// A target that keeps a prepared session for later cannot get around the rate limit with it.
#[test]
fn the_rate_limit_holds_for_sessions_that_were_prepared_before() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    bench.agent.frozen_at.insert(LUN, bench.now);
    assert_eq!(refused(&bench.ask(freeze(session(1)))).code, ErrorCode::Busy);
    bench.pass(10_000);
    bench.freeze(session(1));
}

#[test]
fn a_lower_generation_is_refused_and_a_higher_one_ends_what_the_old_one_began() {
    let mut bench = Bench::new();
    assert_eq!(
        refused(&bench.ask_at(2, prepare(session(1)))).code,
        ErrorCode::StaleGeneration
    );
    bench.prepare(session(1));
    bench.freeze(session(1));
    let outputs = bench.ask_at(4, Request::Status(Status { session: None }));
    assert!(matches!(
        outputs[..],
        [
            Output::SaveGeneration(4),
            Output::Work(Work::Thaw { .. }),
            Output::Reply { .. }
        ]
    ));
    let outputs = bench.thawed(session(1), clean_thaw());
    assert!(
        matches!(outputs[..], [Output::Work(Work::Clean { recorded: None, .. })]),
        "{outputs:?}"
    );
    bench.agent.cleaned(bench.now, session(1), None);
    assert!(bench.agent.is_idle());
    assert_eq!(bench.agent.generation(), 4);
}

#[test]
fn abort_is_good_in_every_state_and_before_the_beginning() {
    let mut bench = Bench::new();
    assert!(matches!(
        bench.ask(abort(session(1)))[..],
        [Output::Reply {
            result: Ok(Reply::Abort(_)),
            ..
        }]
    ));
    assert_eq!(
        refused(&bench.ask(prepare(session(1)))).code,
        ErrorCode::WrongState
    );
    // While Prepare runs: whoever waits for it hears of it, and what it makes is cleaned up.
    bench.ask(prepare(session(2)));
    let outputs = bench.ask(abort(session(2)));
    assert!(matches!(
        outputs[..],
        [
            Output::Reply { result: Err(_), .. },
            Output::Work(Work::Clean { .. })
        ]
    ));
    bench.agent.prepared(
        bench.now,
        session(2),
        Ok(Prepared {
            apps: vec![],
            exclusions: vec![],
        }),
    );
    assert_eq!(bench.outputs(), []);
    bench.agent.cleaned(bench.now, session(2), None);
    assert!(matches!(
        bench.outputs()[..],
        [Output::Reply {
            result: Ok(Reply::Abort(_)),
            ..
        }]
    ));
    assert!(matches!(
        bench.ask(abort(session(2)))[..],
        [Output::Reply {
            result: Ok(Reply::Abort(_)),
            ..
        }]
    ));
}

#[test]
fn prepared_sessions_and_finished_ones_do_not_stay_for_ever() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    bench.pass(300_000);
    assert!(matches!(
        bench.outputs()[..],
        [Output::Work(Work::Clean { recorded: None, .. })]
    ));
    bench.agent.cleaned(bench.now, session(1), None);
    for n in 0..=u8::MAX {
        bench.ask(abort(session(n)));
    }
    assert_eq!(bench.agent.sessions.len(), MAX_SESSIONS);
    bench.now += KEEP_RESULTS;
    bench.agent.handle_timeout(bench.now);
    assert!(bench.agent.sessions.is_empty());
}

#[test]
fn a_freeze_that_fails_or_outlasts_its_hold_is_undone() {
    let mut bench = Bench::new();
    bench.prepare(session(1));
    bench.ask(freeze(session(1)));
    bench.agent.frozen(
        bench.now,
        session(1),
        Err(Refusal::new(ErrorCode::HookFailed, "hook")),
    );
    let outputs = bench.outputs();
    assert!(
        matches!(&outputs[..], [Output::Reply { result: Err(r), .. }, Output::Work(Work::Thaw { .. })] if r.code == ErrorCode::HookFailed),
        "{outputs:?}"
    );
    let mut bench = Bench::new();
    bench.prepare(session(1));
    bench.ask(freeze(session(1)));
    bench.agent.hold_started(bench.now, session(1)).unwrap();
    bench.now += Duration::from_millis(u64::from(HOLD));
    bench.agent.frozen(
        bench.now,
        session(1),
        Ok(FreezeReport {
            volumes: vec![],
            apps: vec![],
        }),
    );
    assert_eq!(bench.outputs().len(), 2, "HoldExpired, and a thaw");
    assert_eq!(
        bench.agent.hold_started(bench.now, session(1)),
        None,
        "nothing may be frozen any more"
    );
}
