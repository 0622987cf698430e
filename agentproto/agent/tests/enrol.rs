//! Enrolment, pins and generations between two real processes over loopback.

#[allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses its part of the harness"
)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod common;

use std::process::Output;
use std::time::Duration;

use common::{Agent, Target, Wire, meet};
use stillpoint_agentproto::Fingerprint;
use stillpoint_agentproto::enrol::Token;
use stillpoint_agentproto::message::{Reply, Request, SessionState, Status};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn status(wire: &mut Wire<tokio_rustls::client::TlsStream<TcpStream>>) -> SessionState {
    match wire.ask(Request::Status(Status { session: None })).await {
        Ok(Reply::Status(report)) => report.state,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_does_not_know_the_token_is_not_pinned() {
    let agent = Agent::new(&[], "");
    let target = Target::new().await;
    let token = Token::new([5; 16], &target.fingerprint);
    let invitation = target.invitation(&token);
    let serving = tokio::spawn(async move { target.enrol(&token, false).await });
    let output = tokio::task::block_in_place(|| agent.verb(&["enrol", &invitation]));
    serving.await.expect("served to its end");
    assert!(
        !output.status.success() && stderr(&output).contains("nothing was pinned"),
        "{}",
        stderr(&output)
    );
    assert!(String::from_utf8_lossy(&agent.verb(&["status"]).stdout).contains("not enrolled"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_man_in_the_middle_with_another_key_hears_nothing() {
    let agent = Agent::new(&[], "");
    let target = Target::new().await;
    // The token names another key than the one that answers.
    let token = Token::new([5; 16], &Fingerprint([9; 32]));
    let invitation = target.invitation(&token);
    let serving = tokio::spawn(async move { target.enrol(&token, true).await });
    let output = tokio::task::block_in_place(|| agent.verb(&["enrol", &invitation]));
    assert_eq!(output.status.code(), Some(3), "refused: {}", stderr(&output));
    assert!(stderr(&output).contains("another target"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("SP1-"), "the token is a secret");
    assert!(serving.await.is_err(), "the handshake failed on its side, too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_enrolled_target_gets_in_and_unenrol_ends_it() {
    let mut agent = Agent::new(&[], "");
    let (target, _registered) = meet(&mut agent, &[]).await;
    let stranger = Target::new().await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");
    assert_eq!(status(&mut wire).await, SessionState::Idle);
    stranger
        .dial(agent.port)
        .await
        .err()
        .expect("a stranger is refused in the handshake");
    let shown = agent.verb(&["status", "--json"]);
    assert!(shown.status.success(), "{shown:?}");
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!(shown["running"], true);
    assert_eq!(shown["targets"][0]["connection"]["state"], "registered");

    let output = agent.verb(&["unenrol", &target.fingerprint.to_string()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let gone = tokio::time::timeout(Duration::from_secs(5), wire.event())
        .await
        .expect("within 5 s");
    assert!(gone.is_none(), "the live channel is dropped");
    target
        .dial(agent.port)
        .await
        .err()
        .expect("the key is pinned no longer");
    let output = agent.verb(&["unenrol"]);
    assert!(!output.status.success() && stderr(&output).contains("not enrolled with any target"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_of_an_older_generation_is_refused_also_after_a_restart() {
    let mut agent = Agent::new(&[], "");
    let (mut target, registered) = meet(&mut agent, &[]).await;
    target.generation = 7;
    let mut wire = target.dial(agent.port).await.expect("a newer generation");
    status(&mut wire).await;
    target.generation = 6;
    let refusal = target.dial(agent.port).await.err().expect("stale");
    assert!(refusal.contains("StaleGeneration"), "{refusal}");
    agent.kill();
    drop((wire, registered));
    agent.run();
    let refusal = loop {
        match target.dial(agent.port).await {
            // The new process opens its port and reads its pins within its first moments.
            Err(refusal) if !refusal.contains("Stale") => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(refusal) => break refusal,
            Ok(_) => panic!("the generation was forgotten"),
        }
    };
    assert!(refusal.contains("7 was seen"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_registration_is_made_again() {
    let mut agent = Agent::new(&[], "");
    let (target, registered) = meet(&mut agent, &[]).await;
    drop(registered);
    let again = tokio::time::timeout(Duration::from_secs(5), target.register(&[])).await;
    assert_eq!(again.expect("within 5 s").register.listen_port, agent.port);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_say_nothing_get_four_places_and_five_seconds() {
    let mut agent = Agent::new(&[], "");
    let (target, _registered) = meet(&mut agent, &[]).await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(
            TcpStream::connect(("127.0.0.1", agent.port))
                .await
                .expect("connected"),
        );
    }
    let mut fifth = TcpStream::connect(("127.0.0.1", agent.port))
        .await
        .expect("connected");
    let closed = tokio::time::timeout(Duration::from_secs(1), fifth.read(&mut [0; 1]))
        .await
        .expect("closed at once");
    assert!(matches!(closed, Ok(0) | Err(_)));
    let mut byte = [0; 1];
    let first = silent.first_mut().expect("four of them");
    let closed = tokio::time::timeout(Duration::from_secs(7), first.read(&mut byte))
        .await
        .expect("after 5 s");
    assert!(matches!(closed, Ok(0) | Err(_)));
    tokio::time::sleep(Duration::from_millis(200)).await;
    target
        .dial(agent.port)
        .await
        .map(|_| ())
        .expect("the places are free again");
}

#[test]
fn mistakes_of_the_operator_are_explained() {
    let agent = Agent::new(&[], "hold_ms = 5\n");
    let output = agent.verb(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("agent.toml:8: unknown field `hold_ms`"),
        "{}",
        stderr(&output)
    );
    let agent = Agent::new(&[], "");
    assert!(stderr(&agent.verb(&["enrol", "san1"])).contains("TOKEN@HOST"));
    assert_eq!(agent.verb(&["enroll", "x@y"]).status.code(), Some(2));
    let output = agent.verb(&["--json", "enrol", "SP1-X@san1"]);
    assert_eq!(output.status.code(), Some(2));
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).expect("JSON");
    assert!(
        error["error"]["message"]
            .as_str()
            .is_some_and(|message| message.contains("token"))
    );
}
