//! What an operator does with an agent: features, installation, status, and what the commands answer when something is wrong.

#[allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses its part of the harness"
)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod common;

use std::fs;
use std::process::Output;
use std::time::Duration;

use common::{Agent, meet};
use stillpoint_agentproto::Fingerprint;
use stillpoint_agentproto::enrol::Token;
use stillpoint_agentproto::message::Capabilities;

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(bytes)))
}

/// Waits for a condition that another process brings about.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..600 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{what} within a minute");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn features_are_chosen_and_changed_without_a_new_enrolment() {
    let mut agent = Agent::new(&[], "");
    let (target, mut registered) = meet(&mut agent, &[]).await;
    let usual = Capabilities::LINUX_FS.with(Capabilities::HOOKS);
    assert_eq!(registered.register.features, usual);
    let output = agent.verb(&["features", "--disable", "hooks", "--enable", "libvirt", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let shown = json(&output.stdout);
    let states: Vec<_> = shown["features"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|feature| (feature["name"].as_str(), feature["enabled"].as_bool()))
        .collect();
    assert_eq!(
        states,
        [
            (Some("linux-fs"), Some(true)),
            (Some("hooks"), Some(false)),
            (Some("libvirt"), Some(true))
        ]
    );
    // The running agent registers anew by itself, with the same key.
    let again = tokio::time::timeout(Duration::from_secs(60), target.register(&[])).await;
    registered = again.expect("within a minute");
    assert_eq!(
        registered.register.features,
        Capabilities::LINUX_FS.with(Capabilities::LIBVIRT)
    );
    // And keeps the choice over a restart.
    agent.kill();
    drop(registered);
    agent.run();
    let again = tokio::time::timeout(Duration::from_secs(60), target.register(&[])).await;
    let features = again.expect("within a minute").register.features;
    assert_eq!(features, Capabilities::LINUX_FS.with(Capabilities::LIBVIRT));
}

#[test]
fn a_feature_that_there_is_not_or_that_is_named_twice_is_a_usage_error() {
    let agent = Agent::new(&[], "");
    let output = agent.verb(&["features", "--enable", "telepathy"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("linux-fs"),
        "the possible ones are named"
    );
    let output = agent.verb(&["features", "--enable", "hooks", "--disable", "hooks"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_with_a_changed_certificate_is_named_with_both_keys() {
    let mut agent = Agent::new(&[], "");
    let (target, registered) = meet(&mut agent, &[]).await;
    let impostor = target.with_another_key().await;
    drop(registered);
    let refused = tokio::spawn(async move { impostor.register(&[]).await });
    let shown = || {
        let output = tokio::task::block_in_place(|| agent.verb(&["status", "--json"]));
        assert_eq!(output.status.code(), Some(1), "it runs, but is not registered");
        json(&output.stdout)["targets"][0]["connection"]["error"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    wait("the other key is shown", || shown().contains("unenrol"));
    let error = shown();
    assert!(error.contains(&target_key(&agent)), "the pinned key: {error}");
    assert!(error.contains("shows the key"), "{error}");
    assert!(refused.await.is_err(), "the handshake failed there, too");
}

fn target_key(agent: &Agent) -> String {
    let shown = json(&agent.verb(&["status", "--json"]).stdout);
    let key = shown
        .pointer("/targets/0/fingerprint")
        .and_then(serde_json::Value::as_str);
    key.expect("a key").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_target_cannot_reach_is_in_the_agents_status() {
    let mut agent = Agent::new(&[], "");
    let (_target, mut registered) = meet(&mut agent, &[]).await;
    registered
        .say_unreachable("cannot be reached at 10.0.0.9:11169: open it")
        .await;
    let mut shown = None;
    wait("the trouble is shown", || {
        let output = tokio::task::block_in_place(|| agent.verb(&["status", "--json"]));
        let text = json(&output.stdout)["targets"][0]["connection"]["trouble"].clone();
        shown = Some(output.status.code());
        text.as_str().is_some_and(|text| text.contains("10.0.0.9:11169"))
    });
    assert_eq!(shown, Some(Some(1)));
}

#[test]
fn nobody_there_is_exit_4_and_says_what_to_do() {
    let agent = Agent::new(&[], "");
    assert_eq!(agent.verb(&["status"]).status.code(), Some(4), "no agent runs");
    let token = Token::new([5; 16], &Fingerprint([9; 32]));
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("its name")
        .port();
    let place = format!("{}@127.0.0.1:{port}", *token.reveal());
    let output = agent.verb(&["--json", "enrol", &place]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let error = json(&output.stderr)["error"].clone();
    assert_eq!(error["code"], "unreachable");
    let message = error["message"].as_str().expect("a message");
    assert!(
        message.contains(&format!("127.0.0.1:{port}")) && message.contains("from this host"),
        "{message}"
    );
    assert!(
        error["hint"].as_str().is_some_and(|hint| hint.contains("token")),
        "{error}"
    );
    assert!(!stderr(&output).contains("SP1-"), "the token is a secret");
    let output = agent.verb(&["--json", "unenrol"]);
    assert_eq!(json(&output.stderr)["error"]["code"], "not_found");
}

#[test]
fn an_image_is_installed_and_documented() {
    let agent = Agent::new(&[], "");
    let image = agent.dir.path().join("image");
    fs::create_dir(&image).expect("mkdir");
    let root = image.to_str().expect("UTF-8");
    let output = agent.verb(&["install", "--root", root, "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        json(&output.stdout)["done"]
            .as_array()
            .is_some_and(|done| done.len() == 3)
    );
    let program = image.join("usr/local/bin/stillpoint-agent");
    let version = std::process::Command::new(&program)
        .arg("--version")
        .output()
        .expect("it runs");
    assert!(version.status.success());
    assert!(image.join("etc/systemd/system/stillpoint-agent.service").exists());
    let output = agent.verb(&["uninstall", "--root", root]);
    assert!(
        output.status.success() && !program.exists(),
        "{}",
        stderr(&output)
    );

    let man = agent.dir.path().join("man");
    fs::create_dir(&man).expect("mkdir");
    let output = agent.verb(&["generate", "man", man.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{}", stderr(&output));
    let page = fs::read_to_string(man.join("stillpoint-agent.8")).expect("the page");
    for word in ["features", "preflight", "Exit codes"] {
        assert!(page.contains(word), "{word}");
    }
    assert!(man.join("stillpoint-agent-features.8").exists() && man.join("agent.toml.5").exists());
    assert!(
        !man.join("stillpoint-agent-thaw-guard.8").exists(),
        "hidden verbs have no page"
    );
}
