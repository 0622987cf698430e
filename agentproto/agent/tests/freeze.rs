//! The real agent freezes a real ext4: what it promises, and that every freeze ends.

#[allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses its part of the harness"
)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Agent, LUN, Volume, Writer, can_freeze, meet, session};
use stillpoint_agentproto::ErrorCode;
use stillpoint_agentproto::LunId;
use stillpoint_agentproto::message::{
    AppState, CutOutcome, Mode, Request, Role, SessionState, Severity, Status,
};
use stillpoint_agentproto::message::{ListVolumes, Reply};

const HOLD_MS: u32 = 5000;

/// Taken apart in this order, so that it goes in the reverse: what lies in the directory is unmounted before it is removed.
struct Stage {
    _dir: tempfile::TempDir,
    volume: Volume,
    writer: Writer,
    agent: Agent,
}

fn stage(more: &str) -> Option<Stage> {
    if !can_freeze() {
        return None;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let volume = Volume::new(dir.path(), "data");
    let writer = Writer::start(&volume.point);
    let agent = Agent::new(&[(&volume.image, LUN)], more);
    Some(Stage {
        _dir: dir,
        volume,
        writer,
        agent,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_stands_still_from_frozen_to_release() {
    let Some(Stage {
        _dir,
        volume,
        writer,
        mut agent,
    }) = stage("min_interval_s = 10")
    else {
        return;
    };
    let (target, registered) = meet(&mut agent, &[LUN]).await;
    assert_eq!(
        registered.register.initiators.last().map(String::as_str),
        Some("iqn.2026-01.test:host")
    );
    assert_eq!(registered.register.listen_port, agent.port);
    agent.wait_for_log("registered with");
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    assert_eq!(wire.preflight(&[LUN], Mode::Filesystem).await.findings, []);
    let Ok(Reply::ListVolumes(volumes)) = wire
        .ask(Request::ListVolumes(ListVolumes { luns: vec![LUN] }))
        .await
    else {
        panic!("no volumes")
    };
    assert_eq!(volumes.luns[0].role, Role::Mounted);
    assert_eq!(
        volumes.luns[0].mounts[0].path,
        volume.point.to_str().expect("UTF-8")
    );

    let one = session();
    let prepared = wire
        .prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    assert!(prepared.apps.is_empty() && prepared.exclusions.is_empty());
    assert!(writer.moves(), "Prepare freezes nothing");
    let frozen = wire.freeze(one, HOLD_MS).await.expect("frozen");
    assert!(frozen.volumes.len() == 1 && frozen.volumes[0].frozen);
    assert!(frozen.remaining_ms > 3000 && frozen.remaining_ms <= HOLD_MS);
    assert!(writer.stands_still());
    assert_eq!((agent.journals(), agent.guards().len()), (1, 1));
    let thawed = wire.release(one, CutOutcome::Taken).await;
    assert!(thawed.hold_ok && thawed.reason.is_none(), "{thawed:?}");
    assert!(thawed.held_ms >= 200 && thawed.held_ms < 4000);
    writer
        .wait_moving(Duration::from_secs(2))
        .expect("it writes again");
    assert_eq!((agent.journals(), agent.guards().len()), (0, 0));

    // The rate limit is the agent's own (§6).
    let refusal = wire
        .prepare(session(), &[LUN], Mode::Filesystem)
        .await
        .expect_err("too soon");
    assert_eq!(refusal.code, ErrorCode::Busy);
    assert!(refusal.retry_after_ms.is_some_and(|ms| ms > 1000 && ms <= 10_001));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_killed_while_frozen_leaves_nothing_frozen() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, HOLD_MS).await.expect("frozen");
    assert!(writer.stands_still());
    agent.kill();
    let took = writer
        .wait_moving(Duration::from_millis(u64::from(HOLD_MS)))
        .expect("the guard thaws within the hold");
    assert!(
        took < Duration::from_secs(2),
        "the guard saw the agent's end after {took:?}"
    );
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(agent.journals(), 0, "the guard removed the journal");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_stopped_while_frozen_is_thawed_by_its_guard() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, 2000).await.expect("frozen");
    agent.signal("STOP");
    assert!(writer.stands_still());
    writer
        .wait_moving(Duration::from_secs(4))
        .expect("the guard's own timer");
    agent.signal("CONT");
    let thawed = wire.release(one, CutOutcome::Taken).await;
    assert!(!thawed.hold_ok, "{thawed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hold_ends_by_itself_and_proves_nothing() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    let began = Instant::now();
    wire.freeze(one, 2500).await.expect("frozen");
    // The keepalive, each second, does not extend it.
    let mut state = SessionState::Frozen;
    while state == SessionState::Frozen {
        assert!(began.elapsed() < Duration::from_secs(4), "frozen beyond the hold");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let Ok(Reply::Status(status)) = wire.ask(Request::Status(Status { session: Some(one) })).await else {
            panic!()
        };
        state = status.state;
    }
    assert!(
        began.elapsed() >= Duration::from_millis(2400),
        "{:?}",
        began.elapsed()
    );
    assert!(writer.moves());
    let thawed = wire.release(one, CutOutcome::Taken).await;
    assert!(
        !thawed.hold_ok
            && thawed
                .reason
                .as_deref()
                .is_some_and(|why| why.contains("expired")),
        "{thawed:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_channel_thaws_at_once_and_the_target_can_still_ask() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, HOLD_MS).await.expect("frozen");
    assert!(writer.stands_still());
    drop(wire);
    writer
        .wait_moving(Duration::from_secs(2))
        .expect("thawed when the channel went");
    let mut wire = target.dial(agent.port).await.expect("a second channel");
    let thawed = wire.release(one, CutOutcome::Taken).await;
    assert!(!thawed.hold_ok, "{thawed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_on_the_channel_thaws_after_three_seconds() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, 20_000).await.expect("frozen");
    assert!(writer.stands_still());
    writer
        .wait_moving(Duration::from_secs(5))
        .expect("three pings missed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thaw_by_somebody_else_is_found_out() {
    let Some(Stage {
        _dir,
        volume,
        writer: _writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, HOLD_MS).await.expect("frozen");
    assert!(volume.fsfreeze("-u"));
    let thawed = wire.release(one, CutOutcome::Taken).await;
    assert!(
        !thawed.hold_ok
            && thawed
                .reason
                .as_deref()
                .is_some_and(|why| why.contains("another program")),
        "{thawed:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_freeze_is_named_and_left_alone() {
    let Some(Stage {
        _dir,
        volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    assert!(volume.fsfreeze("-f"));
    let refusal = wire
        .freeze(one, HOLD_MS)
        .await
        .expect_err("frozen by somebody else");
    assert!(
        refusal.code == ErrorCode::Busy && refusal.text.contains("frozen already"),
        "{refusal}"
    );
    assert!(writer.stands_still(), "it is not ours to thaw");
    assert!(volume.fsfreeze("-u"));
    wire.abort(one).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_starts_thaws_what_its_journal_names() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, HOLD_MS).await.expect("frozen");
    // The worst case: agent and guard die together, as under the OOM killer.
    let guard = agent.guards()[0];
    std::process::Command::new("kill")
        .args(["-KILL", &guard.to_string(), &agent.pid().to_string()])
        .status()
        .expect("kill");
    agent.wait();
    assert!(writer.stands_still());
    assert_eq!(agent.journals(), 1);
    agent.run();
    writer
        .wait_moving(Duration::from_secs(2))
        .expect("the new agent thaws");
    agent.wait_for_log("was still frozen by an agent that ended: thawed");
    assert_eq!(agent.journals(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_verb_thaw_helps_without_an_agent() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, HOLD_MS).await.expect("frozen");
    let guard = agent.guards()[0];
    std::process::Command::new("kill")
        .args(["-KILL", &guard.to_string(), &agent.pid().to_string()])
        .status()
        .expect("kill");
    agent.wait();
    assert!(writer.stands_still());
    let output = agent.verb(&["thaw"]);
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains(": thawed"),
        "{output:?}"
    );
    writer.wait_moving(Duration::from_secs(2)).expect("thawed");
    let output = agent.verb(&["thaw"]);
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("nothing is frozen"),
        "{output:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_agent_thaws_first() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    wire.freeze(one, HOLD_MS).await.expect("frozen");
    agent.signal("TERM");
    writer.wait_moving(Duration::from_secs(2)).expect("thawed");
    agent.wait();
    assert_eq!(agent.journals(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_run_around_the_freeze_and_their_application_counts() {
    let Some(Stage {
        _dir,
        volume,
        writer: _writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let calls = agent.dir.path().join("calls");
    let record = format!("echo \"$(basename $0) $1\" >> {}", calls.display());
    agent.hook("10-plain", &record, None);
    // It writes to the volume itself, as a database that flushes does: before the freeze, or it would hang.
    let flush = format!(
        "{record}; [ $1 = freeze ] && echo flushed > {}/flushed || true",
        volume.point.display()
    );
    agent.hook("20-app", &flush, Some("application = \"ledger\"\n"));
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    assert_eq!(wire.preflight(&[LUN], Mode::Application).await.findings, []);
    let one = session();
    let prepared = wire
        .prepare(one, &[LUN], Mode::Application)
        .await
        .expect("prepared");
    assert_eq!(
        (prepared.apps[0].instance.as_str(), prepared.apps[0].state),
        ("ledger", AppState::Ready)
    );
    let frozen = wire.freeze(one, HOLD_MS).await.expect("frozen");
    assert_eq!(frozen.apps[0].state, AppState::Frozen);
    assert_eq!(
        fs::read_to_string(volume.point.join("flushed")).expect("reading works"),
        "flushed\n"
    );
    let thawed = wire.release(one, CutOutcome::Taken).await;
    assert!(
        thawed.hold_ok && thawed.apps[0].state == AppState::Thawed,
        "{thawed:?}"
    );
    let said = fs::read_to_string(&calls).expect("calls");
    assert_eq!(
        said,
        "10-plain freeze\n20-app freeze\n20-app thaw\n10-plain thaw\n"
    );

    // A `filesystem` snapshot does not bother the application.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    fs::remove_file(&calls).expect("removed");
    let two = session();
    assert!(
        wire.prepare(two, &[LUN], Mode::Filesystem)
            .await
            .expect("prepared")
            .apps
            .is_empty()
    );
    wire.freeze(two, HOLD_MS).await.expect("frozen");
    // Not taken: hooks hear `abort`, and then `thaw` all the same.
    assert!(!wire.release(two, CutOutcome::NotTaken).await.hold_ok);
    assert_eq!(
        fs::read_to_string(&calls).expect("calls"),
        "10-plain freeze\n10-plain abort\n10-plain thaw\n"
    );
}

/// Waits until the hooks have said what is expected.
async fn calls_become(path: &std::path::Path, expected: &str) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while fs::read_to_string(path).unwrap_or_default() != expected {
        assert!(Instant::now() < deadline, "{:?}", fs::read_to_string(path));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_go_on_when_the_agent_is_killed() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer: _writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let calls = agent.dir.path().join("calls");
    let record = format!("echo \"$(basename $0) $1\" >> {}", calls.display());
    agent.hook("10-app", &record, Some("application = \"ledger\"\n"));
    agent.hook(
        "20-slow",
        &format!(
            "{record}; [ $1 != freeze ] || [ ! -e {0}.slow ] || sleep 60",
            calls.display()
        ),
        None,
    );
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Application)
        .await
        .expect("prepared");
    wire.freeze(one, HOLD_MS).await.expect("frozen");
    agent.kill();
    let frozen = "10-app freeze\n20-slow freeze\n";
    let go_on = "20-slow abort\n20-slow thaw\n10-app abort\n10-app thaw\n";
    calls_become(&calls, &format!("{frozen}{go_on}")).await;

    // Killed while a hook is still freezing: that hook is ended first.
    fs::remove_file(&calls).expect("removed");
    fs::write(agent.dir.path().join("calls.slow"), "").expect("written");
    agent.run();
    let _registered = target.register(&[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let two = session();
    wire.prepare(two, &[LUN], Mode::Application)
        .await
        .expect("prepared");
    let freezing = tokio::time::timeout(Duration::from_millis(700), wire.freeze(two, HOLD_MS)).await;
    assert!(freezing.is_err(), "the hook sleeps");
    agent.kill();
    calls_become(&calls, &format!("{frozen}{go_on}")).await;
    let hook = agent.dir.path().join("hooks.d/20-slow");
    let runs = |pid: fs::DirEntry| {
        let line = fs::read(pid.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(hook.to_str().expect("UTF-8"))
    };
    assert!(
        !fs::read_dir("/proc").expect("proc").flatten().any(runs),
        "the abandoned hook is gone"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_hook_fails_the_freeze_and_nothing_stays() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let calls = agent.dir.path().join("calls");
    let record = format!("echo \"$(basename $0) $1\" >> {}", calls.display());
    agent.hook("10-good", &record, None);
    agent.hook(
        "20-bad",
        &format!("{record}; [ $1 != freeze ] || {{ echo no such database; exit 4; }}"),
        None,
    );
    agent.hook("30-never", &record, None);
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    let refusal = wire.freeze(one, HOLD_MS).await.expect_err("the hook fails");
    assert_eq!(refusal.code, ErrorCode::HookFailed);
    assert!(
        refusal.text.contains("20-bad") && refusal.text.contains("no such database"),
        "{refusal}"
    );
    assert!(writer.moves());
    wire.abort(one).await;
    let said = fs::read_to_string(&calls).expect("calls");
    let expected = "10-good freeze\n20-bad freeze\n20-bad abort\n20-bad thaw\n10-good abort\n10-good thaw\n";
    assert_eq!(said, expected);
    assert_eq!((agent.journals(), agent.guards().len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nested_and_bind_mounts_are_frozen_once_each() {
    let Some(Stage {
        _dir,
        volume,
        writer: _writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    // A file system inside a file of the first one, mounted inside it: innermost first, or its flush would hang.
    let inner = Volume::new(&volume.point, "inner");
    let bind = _dir.path().join("bind");
    fs::create_dir(&bind).expect("mkdir");
    let mounted = std::process::Command::new("mount")
        .arg("--bind")
        .args([&volume.point, &bind])
        .status();
    assert!(mounted.expect("mount").success());
    let inner_writer = Writer::start(&inner.point);
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    let frozen = wire.freeze(one, HOLD_MS).await;
    let still = inner_writer.stands_still();
    let thawed = wire.release(one, CutOutcome::Taken).await;
    std::process::Command::new("umount")
        .arg(&bind)
        .status()
        .expect("umount");
    let paths: Vec<_> = frozen
        .expect("frozen")
        .volumes
        .into_iter()
        .map(|volume| volume.path)
        .collect();
    assert_eq!(
        paths,
        [
            inner.point.to_str().expect("UTF-8"),
            volume.point.to_str().expect("UTF-8")
        ]
    );
    assert!(still && thawed.hold_ok, "{thawed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_mounted_after_prepare_is_not_passed_over() {
    let Some(Stage {
        _dir,
        volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let one = session();
    wire.prepare(one, &[LUN], Mode::Filesystem)
        .await
        .expect("prepared");
    let inner = Volume::new(&volume.point, "inner");
    let refusal = wire.freeze(one, HOLD_MS).await.expect_err("a new mount");
    assert!(
        refusal.text.contains("mounted after Prepare") && refusal.text.contains("inner"),
        "{refusal}"
    );
    writer
        .wait_moving(Duration::from_secs(2))
        .expect("nothing stays frozen");
    wire.abort(one).await;
    drop(inner);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_agent_needs_is_never_frozen() {
    let Some(Stage {
        _dir,
        volume,
        writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let state = volume.point.join("agent-state");
    agent.configure(
        &[(&volume.image, LUN)],
        &format!("state_dir = \"{}\"", state.display()),
    );
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let findings = wire.preflight(&[LUN], Mode::Filesystem).await.findings;
    assert_eq!(
        (findings.len(), findings[0].severity, findings[0].code),
        (1, Severity::Error, ErrorCode::NoQuiesce)
    );
    let refusal = wire
        .prepare(session(), &[LUN], Mode::Filesystem)
        .await
        .expect_err("refused");
    assert!(refusal.text.contains("stop the agent itself"), "{refusal}");
    assert!(writer.moves());
    let output = agent.verb(&["preflight"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lun_that_was_not_granted_is_refused() {
    let Some(Stage {
        _dir,
        volume: _volume,
        writer: _writer,
        mut agent,
    }) = stage("")
    else {
        return;
    };
    let (target, registered) = meet(&mut agent, &[]).await;
    let serving = tokio::spawn(async move {
        let mut registered = registered;
        loop {
            registered.heartbeat(|_| true).await;
        }
    });
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    let refusal = wire
        .prepare(session(), &[LUN], Mode::Filesystem)
        .await
        .expect_err("not granted");
    assert_eq!(refusal.code, ErrorCode::NotAllowed);
    let Ok(Reply::ListVolumes(volumes)) = wire
        .ask(Request::ListVolumes(ListVolumes { luns: vec![LUN] }))
        .await
    else {
        panic!("no volumes")
    };
    assert!(volumes.luns.is_empty(), "what is not granted is not shown either");
    let absent = LunId([0x60; 16]);
    let codes: Vec<_> = wire
        .preflight(&[absent], Mode::Filesystem)
        .await
        .findings
        .iter()
        .map(|f| f.code)
        .collect();
    assert_eq!(codes, [ErrorCode::NotMounted]);
    serving.abort();
}
