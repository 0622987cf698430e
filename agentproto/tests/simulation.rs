//! Both machines against each other: fake clock, a network that delays and drops connections, hosts that are slow,
//! fail, or die, a store that is slow or fails, a target that dies. Many thousands of schedules; the seed is in the
//! message of every failure (`SEED=n cargo test -p stillpoint-agentproto --test simulation` runs one; with
//! `STILLPOINT_SOAK_SCHEDULES=100000` it runs so many instead of 12,000).
//!
//! What must hold in every one of them:
//! - every freeze ends, at the latest a thaw's length after its hold;
//! - the coordinator comes to an end, with a verdict, and leaves no session behind on any agent;
//! - no level is recorded that was not true at the moment of the cut;
//! - `on_failure = fail` never leaves a snapshot below the level asked for.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a simulation that goes wrong has to stop"
)]
#![expect(clippy::too_many_lines, reason = "one arm per event, and nothing else")]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::{Duration, Instant};

use stillpoint_agentproto::client::{self, Asked, FreezeReport, Output, ThawReport, Work};
use stillpoint_agentproto::freeze::{HOLD_DEFAULT, HOLD_MAX, Level};
use stillpoint_agentproto::message::{
    App, AppState, Capabilities, Exclusion, ExclusionKind, FrozenVolume, LunIdentity, LunVolumes, Mode,
    Mount, PreflightReport, Prepared, Reply, Request, Role, Volumes,
};
use stillpoint_agentproto::server::{
    Action, Candidate, Coordinator, IscsiSession, LunSpec, OnFailure, Spec, Verdict,
};
use stillpoint_agentproto::{AgentId, ErrorCode, Fingerprint, LunId, Refusal, SessionId};

const SCHEDULES: u64 = 12_000;
/// A thaw takes at most this long in the simulated hosts, and the guard is at most this late.
const THAW_MAX: u64 = 200;

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        n != 0 && self.below(n) == 0
    }
}

/// How bad this world is: "one in n", 0 = never.
struct Weather {
    drop: u64,
    dial_fails: u64,
    slow: u64,
    work_fails: u64,
    foreign_thaw: u64,
    agent_dies: u64,
    cut_fails: u64,
    cut_slow: u64,
    target_dies_at: Option<u64>,
}

impl Weather {
    fn roll(dice: &mut Dice) -> Self {
        let pick = |dice: &mut Dice, choices: &[u64]| {
            choices[usize::try_from(dice.below(choices.len() as u64)).unwrap()]
        };
        Self {
            drop: pick(dice, &[0, 0, 40, 12, 5]),
            dial_fails: pick(dice, &[0, 0, 10, 3]),
            slow: pick(dice, &[0, 20, 6, 3]),
            work_fails: pick(dice, &[0, 0, 20, 6]),
            foreign_thaw: pick(dice, &[0, 0, 0, 4]),
            agent_dies: pick(dice, &[0, 0, 60, 15]),
            cut_fails: pick(dice, &[0, 0, 0, 6]),
            cut_slow: pick(dice, &[0, 0, 8, 3]),
            target_dies_at: dice.one_in(8).then(|| dice.below(9_000)),
        }
    }
}

#[derive(Debug)]
enum Event {
    ToAgent {
        agent: usize,
        channel: u64,
        call: u64,
        request: Request,
    },
    ToTarget {
        agent: usize,
        channel: u64,
        call: u64,
        result: Result<Reply, Refusal>,
    },
    Undelivered {
        call: u64,
    },
    TargetSeesLoss {
        agent: usize,
        channel: u64,
    },
    AgentSeesLoss {
        agent: usize,
        channel: u64,
    },
    Prepared {
        agent: usize,
        life: u64,
        session: SessionId,
    },
    HooksDone {
        agent: usize,
        life: u64,
        session: SessionId,
        app_failed: bool,
    },
    FsFrozen {
        agent: usize,
        life: u64,
        session: SessionId,
        app_failed: bool,
    },
    FreezeFailed {
        agent: usize,
        life: u64,
        session: SessionId,
    },
    Guard {
        agent: usize,
        frozen_no: u64,
    },
    ForeignThaw {
        agent: usize,
        frozen_no: u64,
    },
    ThawDone {
        agent: usize,
        life: u64,
        session: SessionId,
    },
    Cleaned {
        agent: usize,
        life: u64,
        session: SessionId,
    },
    Restart {
        agent: usize,
    },
    Settled,
    CutInstant {
        fails: bool,
    },
    CutMade {
        fails: bool,
    },
    Durable {
        fails: bool,
    },
    Recorded {
        fails: bool,
    },
    Discarded,
    TargetDies,
}

struct Queued(u64, u64, Event);

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// One host: the truth about its file system, and its agent.
struct Host {
    id: AgentId,
    agent: client::Agent,
    /// Counts restarts: work of an earlier life has no effect.
    life: u64,
    up: bool,
    mounted: bool,
    app: bool,
    frozen: Option<Frozen>,
    frozen_count: u64,
    cancelled: BTreeSet<SessionId>,
    /// The app froze and is held.
    app_frozen: bool,
    app_failed_thaw: bool,
    generation_seen: u32,
    channel: Option<u64>,
    calls: BTreeMap<u64, u64>,
    last_down: u64,
    last_up: u64,
}

struct Frozen {
    session: SessionId,
    since: u64,
    number: u64,
    hold_ms: u64,
}

struct Truth {
    frozen: Vec<bool>,
    apps: Vec<bool>,
}

struct World {
    dice: Dice,
    weather: Weather,
    base: Instant,
    now: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    order: u64,
    coordinator: Option<Coordinator>,
    hosts: Vec<Host>,
    dead: BTreeSet<u64>,
    next_channel: u64,
    asked: BTreeMap<(usize, Asked), u64>,
    truth: Option<Truth>,
    promoted: Option<Verdict>,
    discarded: bool,
    decided: Option<Verdict>,
    closed: bool,
    generation: u32,
}

const LUN: LunId = LunId([6; 16]);

fn identity() -> LunIdentity {
    LunIdentity {
        lun: LUN,
        serial: None,
        iqn: None,
        number: Some(0),
        size_bytes: Some(1 << 30),
    }
}

fn app(state: AppState) -> App {
    App {
        kind: "hook".into(),
        instance: "db".into(),
        component: None,
        version: None,
        state,
        error: None,
        lun: None,
    }
}

impl World {
    fn new(seed: u64) -> (Self, Mode, OnFailure) {
        let mut dice = Dice(seed);
        let weather = Weather::roll(&mut dice);
        let base = Instant::now();
        let count = 1 + dice.below(3);
        let hosts = (0..count).map(|n| Host {
            id: AgentId([u8::try_from(n).unwrap() + 1; 16]),
            agent: client::Agent::new(client::Config::default(), 0),
            life: 0,
            up: true,
            mounted: n == 0 || !dice.one_in(3),
            app: !dice.one_in(3),
            frozen: None,
            frozen_count: 0,
            cancelled: BTreeSet::new(),
            app_frozen: false,
            app_failed_thaw: false,
            generation_seen: 0,
            channel: None,
            calls: BTreeMap::new(),
            last_down: 0,
            last_up: 0,
        });
        let hosts: Vec<_> = hosts.collect();
        let mode = if dice.one_in(2) {
            Mode::Application
        } else {
            Mode::Filesystem
        };
        let on_failure = if dice.one_in(2) {
            OnFailure::Fail
        } else {
            OnFailure::CrashConsistent
        };
        let candidates = hosts.iter().map(|host| Candidate {
            agent: host.id,
            host: host.id.to_string(),
            version: "1".into(),
            fingerprint: Fingerprint([0; 32]),
            capabilities: Capabilities::LINUX_FS,
            luns: vec![LUN],
            last_mounted: if host.mounted { vec![LUN] } else { vec![] },
        });
        let candidates = candidates.collect();
        let spec = Spec {
            session: SessionId([9; 16]),
            snapshot: "s".into(),
            luns: vec![LunSpec {
                name: "lun".into(),
                identity: identity(),
            }],
            mode,
            on_failure,
            hold: HOLD_DEFAULT,
            sessions: vec![IscsiSession {
                lun: LUN,
                initiator: "iqn.h0".into(),
            }],
            refused: None,
        };
        let mut world = Self {
            dice,
            weather,
            base,
            now: 0,
            queue: BinaryHeap::new(),
            order: 0,
            coordinator: Some(Coordinator::new(base, spec, candidates)),
            hosts,
            dead: BTreeSet::new(),
            next_channel: 1,
            asked: BTreeMap::new(),
            truth: None,
            promoted: None,
            discarded: false,
            decided: None,
            closed: false,
            generation: 1,
        };
        if let Some(at) = world.weather.target_dies_at {
            world.after(at, Event::TargetDies);
        }
        (world, mode, on_failure)
    }

    fn at(&self) -> Instant {
        self.base + Duration::from_millis(self.now)
    }

    fn after(&mut self, ms: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Queued(self.now + ms, self.order, event)));
    }

    fn delay(&mut self, usual: u64, slow: u64) -> u64 {
        let limit = if self.dice.one_in(self.weather.slow) {
            slow
        } else {
            usual
        };
        self.dice.below(limit + 1)
    }

    fn run(&mut self) {
        for _ in 0..100_000 {
            self.drain();
            let queued = self.queue.peek().map(|Reverse(queued)| queued.0);
            let timers = self.coordinator.iter().filter_map(Coordinator::poll_timeout);
            let timers = timers.chain(
                self.hosts
                    .iter()
                    .filter(|h| h.up)
                    .filter_map(|host| host.agent.poll_timeout()),
            );
            // Up to the next whole millisecond, so that a deadline is never met early.
            let timer = timers
                .map(|at| u64::try_from((at - self.base).as_micros().div_ceil(1000)).unwrap())
                .min();
            let Some(next) = [queued, timer].into_iter().flatten().min() else {
                return;
            };
            self.now = self.now.max(next);
            if queued == Some(next) {
                let Reverse(Queued(_, _, event)) = self.queue.pop().unwrap();
                self.handle(event);
            } else {
                let now = self.at();
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.handle_timeout(now);
                }
                for host in self.hosts.iter_mut().filter(|host| host.up) {
                    host.agent.handle_timeout(now);
                }
            }
            self.check_freezes();
        }
        panic!("the world does not come to rest");
    }

    fn check_freezes(&self) {
        for host in &self.hosts {
            if let Some(frozen) = &host.frozen {
                let lasted = self.now - frozen.since;
                assert!(
                    lasted <= frozen.hold_ms + THAW_MAX,
                    "frozen for {lasted} ms with a hold of {}",
                    frozen.hold_ms
                );
            }
        }
    }

    fn drain(&mut self) {
        loop {
            if let Some(action) = self.coordinator.as_mut().and_then(Coordinator::poll_action) {
                self.action(action);
                continue;
            }
            let next = (0..self.hosts.len()).find_map(|at| {
                let host = &mut self.hosts[at];
                host.agent.poll_output().map(|output| (at, output))
            });
            match next {
                Some((at, output)) if self.hosts[at].up => self.output(at, output),
                Some(_) => {}
                None => return,
            }
        }
    }

    fn action(&mut self, action: Action) {
        match action {
            Action::Send { call, agent, request } => {
                let at = self.hosts.iter().position(|host| host.id == agent).unwrap();
                self.send_down(at, call, request);
            }
            Action::Settle => {
                let ms = self.delay(50, 1500);
                self.after(ms, Event::Settled);
            }
            Action::Cut => {
                let slow = self.dice.one_in(self.weather.cut_slow);
                let ms = if slow {
                    self.dice.below(4000)
                } else {
                    self.dice.below(100)
                };
                let fails = self.dice.one_in(self.weather.cut_fails);
                self.after(ms, Event::CutInstant { fails });
            }
            Action::Promote(verdict) => {
                self.promoted = Some(*verdict);
                let fails = self.dice.one_in(self.weather.cut_fails);
                let ms = self.delay(30, 3000);
                self.after(ms, Event::Recorded { fails });
            }
            Action::Discard => {
                self.discarded = true;
                let ms = self.delay(30, 3000);
                self.after(ms, Event::Discarded);
            }
            Action::Decided(verdict) => {
                assert!(self.decided.is_none(), "decided twice");
                self.decided = Some(*verdict);
            }
            Action::Closed => self.closed = true,
        }
    }

    fn send_down(&mut self, at: usize, call: u64, request: Request) {
        if self.hosts[at].channel.is_none() {
            if !self.hosts[at].up || self.dice.one_in(self.weather.dial_fails) {
                let ms = self.delay(5, 5000);
                self.after(ms, Event::Undelivered { call });
                return;
            }
            let channel = self.next_channel;
            self.next_channel += 1;
            let (now, generation) = (self.at(), self.generation);
            let host = &mut self.hosts[at];
            host.channel = Some(channel);
            // The Hello of the new channel is fenced before anything else.
            host.agent
                .fence(now, generation)
                .expect("one target, rising generations");
        }
        let channel = self.hosts[at].channel.unwrap();
        self.hosts[at].calls.insert(call, channel);
        let ms = self.delay(5, 2500);
        let when = (self.now + ms).max(self.hosts[at].last_down);
        self.hosts[at].last_down = when;
        self.after(
            when - self.now,
            Event::ToAgent {
                agent: at,
                channel,
                call,
                request,
            },
        );
        self.maybe_drop(at, channel);
    }

    fn maybe_drop(&mut self, at: usize, channel: u64) {
        if self.dice.one_in(self.weather.drop) && self.dead.insert(channel) {
            let (target, agent) = (self.dice.below(6000), self.dice.below(12_000));
            self.after(target, Event::TargetSeesLoss { agent: at, channel });
            self.after(agent, Event::AgentSeesLoss { agent: at, channel });
        }
    }

    fn output(&mut self, at: usize, output: Output) {
        let life = self.hosts[at].life;
        match output {
            Output::Reply { asked, result } => {
                let Some(call) = self.asked.remove(&(at, asked)) else {
                    panic!("a reply to nothing")
                };
                let ms = self.delay(5, 2500);
                let when = (self.now + ms).max(self.hosts[at].last_up);
                self.hosts[at].last_up = when;
                let event = Event::ToTarget {
                    agent: at,
                    channel: asked.channel,
                    call,
                    result,
                };
                self.after(when - self.now, event);
                self.maybe_drop(at, asked.channel);
            }
            Output::SaveGeneration(generation) => self.hosts[at].generation_seen = generation,
            Output::Log(_) => {}
            Output::Work(work) => {
                if self.dice.one_in(self.weather.agent_dies) {
                    self.kill_agent(at);
                    return;
                }
                self.work(at, life, work);
            }
        }
    }

    fn work(&mut self, at: usize, life: u64, work: Work) {
        match work {
            Work::ListVolumes { asked, .. } => {
                let host = &mut self.hosts[at];
                let mount = Mount {
                    path: "/srv".into(),
                    file_system: "gfs2".into(),
                    device: "sda".into(),
                    read_only: false,
                    cluster: true,
                };
                let role = if host.mounted { Role::Mounted } else { Role::None };
                let luns = vec![LunVolumes {
                    identity: identity(),
                    role,
                    mounts: vec![mount],
                    apps: vec![],
                }];
                let reply = Volumes {
                    luns,
                    initiators: vec![format!("iqn.h{at}")],
                };
                host.agent.answer(asked, Ok(Reply::ListVolumes(reply)));
            }
            Work::Preflight { asked, .. } => {
                let report = PreflightReport { findings: vec![] };
                self.hosts[at].agent.answer(asked, Ok(Reply::Preflight(report)));
            }
            Work::Prepare(prepare) => {
                let ms = self.delay(100, 8000);
                self.after(
                    ms,
                    Event::Prepared {
                        agent: at,
                        life,
                        session: prepare.session,
                    },
                );
            }
            Work::Freeze { session, .. } => {
                let ms = self.delay(200, 25_000);
                let failed = self.dice.one_in(self.weather.work_fails);
                let event = match (failed, self.dice.one_in(2)) {
                    (true, true) => Event::FreezeFailed {
                        agent: at,
                        life,
                        session,
                    },
                    (app_failed, _) => Event::HooksDone {
                        agent: at,
                        life,
                        session,
                        app_failed,
                    },
                };
                self.after(ms, event);
            }
            Work::Other { asked, .. } => {
                let refusal = Refusal::new(ErrorCode::Unsupported, "not in this simulation");
                self.hosts[at].agent.answer(asked, Err(refusal));
            }
            Work::Thaw { session, .. } => {
                self.hosts[at].cancelled.insert(session);
                let ms = self.dice.below(THAW_MAX);
                self.after(
                    ms,
                    Event::ThawDone {
                        agent: at,
                        life,
                        session,
                    },
                );
            }
            Work::Clean { session, .. } => {
                let ms = self.delay(50, 5000);
                self.after(
                    ms,
                    Event::Cleaned {
                        agent: at,
                        life,
                        session,
                    },
                );
            }
        }
    }

    /// SIGKILL: the guard thaws at once, the agent comes back knowing nothing but its generation.
    fn kill_agent(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        host.up = false;
        host.life += 1;
        host.frozen = None;
        host.app_frozen = false;
        if let Some(channel) = host.channel {
            self.dead.insert(channel);
            let ms = self.dice.below(3000);
            self.after(ms, Event::TargetSeesLoss { agent: at, channel });
        }
        let ms = self.dice.below(8000);
        self.after(ms, Event::Restart { agent: at });
    }

    fn handle(&mut self, event: Event) {
        let now = self.at();
        match event {
            Event::ToAgent {
                agent,
                channel,
                call,
                request,
            } => {
                if !self.dead.contains(&channel) && self.hosts[agent].up {
                    let asked = Asked {
                        channel,
                        id: u32::try_from(call).unwrap(),
                    };
                    self.asked.insert((agent, asked), call);
                    let generation = self.generation;
                    self.hosts[agent].agent.request(now, asked, generation, request);
                }
            }
            Event::ToTarget {
                agent,
                channel,
                call,
                result,
            } => {
                let known = self.hosts[agent].calls.get(&call) == Some(&channel);
                if !self.dead.contains(&channel) && known {
                    self.hosts[agent].calls.remove(&call);
                    self.with_coordinator(|coordinator| coordinator.replied(now, call, result));
                }
            }
            Event::Undelivered { call } => self.undelivered(call),
            Event::TargetSeesLoss { agent, channel } => {
                if self.hosts[agent].channel == Some(channel) {
                    self.hosts[agent].channel = None;
                }
                let lost: Vec<u64> = self.hosts[agent]
                    .calls
                    .iter()
                    .filter(|(_, on)| **on == channel)
                    .map(|(call, _)| *call)
                    .collect();
                for call in lost {
                    self.hosts[agent].calls.remove(&call);
                    self.undelivered(call);
                }
                let id = self.hosts[agent].id;
                self.with_coordinator(|coordinator| coordinator.channel_lost(now, id));
            }
            Event::AgentSeesLoss { agent, channel } => self.hosts[agent].agent.channel_lost(now, channel),
            Event::Restart { agent } => {
                let host = &mut self.hosts[agent];
                host.agent = client::Agent::new(client::Config::default(), host.generation_seen);
                host.up = true;
                self.asked.retain(|(at, _), _| *at != agent);
            }
            Event::Prepared { agent, life, session } if life == self.hosts[agent].life => {
                let result = self.prepare_result(agent);
                self.hosts[agent].agent.prepared(now, session, result);
            }
            Event::Settled => self.with_coordinator(|coordinator| coordinator.settled(now)),
            Event::TargetDies => self.kill_target(),
            Event::CutInstant { fails } => {
                self.truth = (!fails).then(|| Truth {
                    frozen: self.hosts.iter().map(|host| host.frozen.is_some()).collect(),
                    apps: self
                        .hosts
                        .iter()
                        .map(|host| host.app && host.app_frozen)
                        .collect(),
                });
                let ms = self.delay(5, 1500);
                self.after(ms, Event::CutMade { fails });
            }
            Event::CutMade { fails } => {
                let result = if fails { Err("disk".to_owned()) } else { Ok(1) };
                self.with_coordinator(|coordinator| coordinator.cut_made(now, result, &[]));
                if !fails {
                    let fails = self.dice.one_in(self.weather.cut_fails);
                    let ms = self.delay(50, 4000);
                    self.after(ms, Event::Durable { fails });
                }
            }
            Event::Durable { fails } => {
                let result = if fails { Err("disk".to_owned()) } else { Ok(()) };
                self.with_coordinator(|coordinator| coordinator.cut_durable(now, result));
            }
            Event::Recorded { fails } => {
                if fails {
                    self.promoted = None;
                }
                let result = if fails { Err("disk".to_owned()) } else { Ok(()) };
                self.with_coordinator(|coordinator| coordinator.promoted(now, result));
            }
            Event::Discarded => self.with_coordinator(|coordinator| coordinator.discarded(now, Ok(()))),
            other => self.host_event(other),
        }
    }

    fn host_event(&mut self, event: Event) {
        let now = self.at();
        match event {
            Event::FreezeFailed { agent, life, session } if life == self.hosts[agent].life => {
                let refusal = Refusal::new(ErrorCode::HookFailed, "hook");
                self.hosts[agent].agent.frozen(now, session, Err(refusal));
            }
            Event::HooksDone {
                agent,
                life,
                session,
                app_failed,
            } if life == self.hosts[agent].life => {
                let Some(deadline) = self.hosts[agent].agent.hold_started(now, session) else {
                    return;
                };
                let ms = self.delay(100, 7000);
                let hold_ms = u64::try_from((deadline - now).as_millis()).unwrap();
                let host = &mut self.hosts[agent];
                host.frozen_count += 1;
                let number = host.frozen_count;
                host.frozen = Some(Frozen {
                    session,
                    since: self.now,
                    number,
                    hold_ms,
                });
                host.app_frozen = host.app && !app_failed;
                let late = self.dice.below(THAW_MAX);
                self.after(
                    hold_ms + late,
                    Event::Guard {
                        agent,
                        frozen_no: number,
                    },
                );
                if self.dice.one_in(self.weather.foreign_thaw) {
                    let ms = self.dice.below(hold_ms);
                    self.after(
                        ms,
                        Event::ForeignThaw {
                            agent,
                            frozen_no: number,
                        },
                    );
                }
                self.after(
                    ms,
                    Event::FsFrozen {
                        agent,
                        life,
                        session,
                        app_failed,
                    },
                );
            }
            Event::FsFrozen {
                agent,
                life,
                session,
                app_failed,
            } if life == self.hosts[agent].life => {
                let host = &mut self.hosts[agent];
                if host.cancelled.contains(&session) {
                    return;
                }
                let state = if app_failed {
                    AppState::Failed
                } else {
                    AppState::Frozen
                };
                let volumes = vec![FrozenVolume {
                    lun: LUN,
                    path: "/srv".into(),
                    frozen: true,
                    error: None,
                }];
                let apps = if host.app { vec![app(state)] } else { vec![] };
                host.agent
                    .frozen(now, session, Ok(FreezeReport { volumes, apps }));
            }
            Event::Guard { agent, frozen_no } | Event::ForeignThaw { agent, frozen_no } => {
                let host = &mut self.hosts[agent];
                if host
                    .frozen
                    .as_ref()
                    .is_some_and(|frozen| frozen.number == frozen_no)
                {
                    host.frozen = None;
                }
            }
            Event::ThawDone { agent, life, session } if life == self.hosts[agent].life => {
                let app_fails = self.dice.one_in(self.weather.work_fails);
                let host = &mut self.hosts[agent];
                let in_force = host.frozen.take_if(|frozen| frozen.session == session).is_some();
                host.app_failed_thaw = app_fails;
                let apps = match (host.app, host.app_frozen, app_fails) {
                    (false, ..) | (_, false, _) => vec![],
                    (_, _, true) => vec![app(AppState::Failed)],
                    (_, _, false) => vec![app(AppState::Thawed)],
                };
                host.app_frozen = false;
                host.agent.thawed(
                    now,
                    session,
                    ThawReport {
                        in_force,
                        apps,
                        reason: None,
                        held: None,
                        documents: vec![],
                    },
                );
            }
            Event::Cleaned { agent, life, session } if life == self.hosts[agent].life => {
                self.hosts[agent].agent.cleaned(now, session, None);
            }
            _ => {}
        }
    }

    fn prepare_result(&mut self, at: usize) -> Result<Prepared, Refusal> {
        if self.dice.one_in(self.weather.work_fails) {
            return Err(Refusal::new(ErrorCode::HookFailed, "no"));
        }
        let excluded = self.dice.one_in(self.weather.work_fails);
        let kind = ExclusionKind::Application;
        let exclusion = Exclusion {
            kind,
            subject: "x".into(),
            reason: "y".into(),
            lun: None,
        };
        let exclusions = if excluded { vec![exclusion] } else { vec![] };
        let apps = if self.hosts[at].app {
            vec![app(AppState::Ready)]
        } else {
            vec![]
        };
        Ok(Prepared { apps, exclusions })
    }

    fn undelivered(&mut self, call: u64) {
        let now = self.at();
        let refusal = Refusal::new(ErrorCode::Unreachable, "gone");
        self.with_coordinator(|coordinator| coordinator.replied(now, call, Err(refusal)));
    }

    fn with_coordinator(&mut self, act: impl FnOnce(&mut Coordinator)) {
        if let Some(coordinator) = &mut self.coordinator {
            act(coordinator);
        }
    }

    fn kill_target(&mut self) {
        self.coordinator = None;
        for at in 0..self.hosts.len() {
            if let Some(channel) = self.hosts[at].channel.take() {
                self.dead.insert(channel);
                let ms = self.dice.below(20_000);
                self.after(ms, Event::AgentSeesLoss { agent: at, channel });
            }
        }
    }

    fn check_end(&self, mode: Mode, on_failure: OnFailure) -> Option<Level> {
        for host in &self.hosts {
            assert!(host.frozen.is_none(), "left frozen");
            assert!(host.agent.is_idle(), "a session was left behind");
        }
        let wanted = if mode == Mode::Application {
            Level::Application
        } else {
            Level::Filesystem
        };
        let recorded = self.promoted.as_ref().map_or(Level::Crash, Verdict::lowest);
        if recorded >= Level::Filesystem {
            let truth = self.truth.as_ref().expect("a level without a cut");
            for (at, host) in self.hosts.iter().enumerate().filter(|(_, host)| host.mounted) {
                assert!(
                    truth.frozen[at],
                    "host {at} was not frozen at the cut, and {recorded} was recorded"
                );
                let lied = recorded == Level::Application && host.app && !truth.apps[at];
                assert!(!lied, "the application of host {at} did not take part");
            }
            let apps = self.hosts.iter().any(|host| host.mounted && host.app);
            assert!(
                recorded < Level::Application || apps,
                "application without an application"
            );
        }
        if self.weather.target_dies_at.is_some() {
            return None;
        }
        assert!(self.closed, "not closed");
        let verdict = self.decided.as_ref().expect("no verdict");
        if verdict.kept {
            assert!(self.truth.is_some(), "kept without a cut");
            assert_eq!(verdict.lowest(), recorded, "told something else than recorded");
            if on_failure == OnFailure::Fail {
                assert!(verdict.lowest() >= wanted, "kept below what was asked for");
            }
            assert!(
                verdict.lowest() >= wanted || verdict.failure.is_some(),
                "less, and no word why"
            );
        } else {
            assert!(verdict.failure.is_some(), "no snapshot, and no word why");
        }
        Some(if verdict.kept {
            verdict.lowest()
        } else {
            return None;
        })
    }
}

fn run_one(seed: u64) -> Option<Level> {
    let (mut world, mode, on_failure) = World::new(seed);
    world.run();
    world.check_end(mode, on_failure)
}

#[test]
fn no_schedule_leaves_anything_frozen_or_claims_what_is_not_proved() {
    if let Ok(seed) = std::env::var("SEED") {
        run_one(seed.parse().unwrap());
        return;
    }
    let soak = std::env::var("STILLPOINT_SOAK_SCHEDULES").ok();
    let schedules = soak.map_or(SCHEDULES, |number| number.parse().unwrap());
    let mut reached: BTreeMap<Option<Level>, u64> = BTreeMap::new();
    for seed in 0..schedules {
        let result = std::panic::catch_unwind(|| run_one(seed));
        let Ok(level) = result else { panic!("seed {seed}") };
        *reached.entry(level).or_default() += 1;
    }
    // The weather must leave room for every end, or the test would prove nothing.
    for level in [
        None,
        Some(Level::Crash),
        Some(Level::Filesystem),
        Some(Level::Application),
    ] {
        let times = reached.get(&level).copied().unwrap_or_default();
        assert!(
            times > schedules / 50,
            "only {times} schedules ended with {level:?}: {reached:?}"
        );
    }
    println!("{reached:?}");
}

/// The simulation can fail: an agent that thaws late is caught.
#[test]
#[should_panic(expected = "frozen for")]
fn a_freeze_beyond_its_hold_is_caught() {
    let (mut world, ..) = World::new(1);
    world.now = 10;
    let hold_ms = u64::try_from(HOLD_MAX.as_millis()).unwrap();
    world.hosts[0].frozen = Some(Frozen {
        session: SessionId([0; 16]),
        since: 10,
        number: 1,
        hold_ms,
    });
    world.now += hold_ms + THAW_MAX + 1;
    world.check_freezes();
}
