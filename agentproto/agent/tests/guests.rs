//! Guests of a KVM host: a stand-in for virsh plays libvirt, the file system and the agent are real.

#[allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses its part of the harness"
)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use common::{Agent, LUN, Volume, can_freeze, meet};
use stillpoint_agentproto::SessionId;
use stillpoint_agentproto::message::{AppState, CutOutcome, Mode};

/// Two guests run; `db` has its disk on the LUN, `other` elsewhere. `$DIR/count` says how many file systems a thaw finds frozen,
/// `$DIR/ping` whether the guest's agent answers.
const VIRSH: &str = r#"#!/bin/sh
[ "$1 $2 $3" = "-q -c test:///default" ] || { echo "error: options: $*" >&2; exit 1; }
shift 3
echo "$*" >> $DIR/calls
case "$*" in
    "list --name") printf 'db\nother\n\n' ;;
    "domblklist --details --domain db") printf ' file disk vda $POINT/db.img\n file cdrom sda -\n' ;;
    "domblklist --details --domain other") printf ' file disk vda $DIR/other.img\n' ;;
    qemu-agent-command*) [ -e $DIR/ping ] && echo '{"return":{}}' || { echo 'error: Guest agent is not responding' >&2; exit 1; } ;;
    "domfsfreeze --domain db") echo "Froze 2 filesystem(s)" ;;
    "domfsthaw --domain db") echo "Thawed $(cat $DIR/count) filesystem(s)" ;;
    *) echo "error: unknown: $*" >&2; exit 1 ;;
esac
"#;

fn session(byte: u8) -> SessionId {
    SessionId::from_random([byte; 16])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_on_the_lun_is_frozen_first_and_its_early_thaw_is_no_proof() {
    if !can_freeze() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let volume = Volume::new(dir.path(), "srv");
    fs::write(volume.point.join("db.img"), "").expect("an image");
    fs::write(dir.path().join("other.img"), "").expect("an image");
    let at = |name: &str| dir.path().join(name);
    let virsh = VIRSH
        .replace("$DIR", dir.path().to_str().expect("UTF-8"))
        .replace("$POINT", volume.point.to_str().expect("UTF-8"));
    fs::write(at("virsh"), virsh).expect("the stand-in");
    fs::set_permissions(at("virsh"), fs::Permissions::from_mode(0o755)).expect("chmod");
    let libvirt = format!(
        "[libvirt]\nvirsh = \"{}\"\nconnect = \"test:///default\"",
        at("virsh").display()
    );
    let mut agent = Agent::new(&[(&volume.image, LUN)], &libvirt);
    assert!(agent.verb(&["features", "--enable", "libvirt"]).status.success());
    let (target, _registered) = meet(&mut agent, &[LUN]).await;
    let mut wire = target.dial(agent.port).await.expect("a snapshot channel");

    // Its qemu-ga does not answer: said before anything is frozen.
    let found = wire.preflight(&[LUN], Mode::Application).await.findings;
    assert!(
        found.len() == 1 && found[0].text.contains("qemu-ga does not answer"),
        "{found:?}"
    );
    assert!(wire.prepare(session(1), &[LUN], Mode::Application).await.is_err());

    fs::write(at("ping"), "").expect("the guest's agent");
    fs::write(at("count"), "2").expect("a count");
    let prepared = wire
        .prepare(session(2), &[LUN], Mode::Application)
        .await
        .expect("prepared");
    let app = &prepared.apps[0];
    assert_eq!(
        (prepared.apps.len(), app.kind.as_str(), app.instance.as_str()),
        (1, "libvirt", "db")
    );
    let frozen = wire.freeze(session(2), 5000).await.expect("frozen");
    assert_eq!(frozen.apps[0].state, AppState::Frozen);
    let thawed = wire.release(session(2), CutOutcome::Taken).await;
    assert!(
        thawed.hold_ok && thawed.apps[0].state == AppState::Thawed,
        "{thawed:?}"
    );
    let calls = fs::read_to_string(at("calls")).expect("calls");
    let of_guest: Vec<_> = calls.lines().filter(|line| line.starts_with("domfs")).collect();
    assert_eq!(of_guest, ["domfsfreeze --domain db", "domfsthaw --domain db"]);

    // It went on by itself meanwhile, as a Windows guest does after 10 s.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    fs::write(at("count"), "0").expect("a count");
    wire.prepare(session(3), &[LUN], Mode::Application)
        .await
        .expect("prepared");
    wire.freeze(session(3), 5000).await.expect("frozen");
    let thawed = wire.release(session(3), CutOutcome::Taken).await;
    assert!(!thawed.hold_ok, "{thawed:?}");
    assert_eq!(thawed.apps[0].state, AppState::Failed);
    let error = thawed.apps[0].error.as_deref().unwrap_or_default();
    assert!(error.contains("did not hold"), "{error}");

    // Without the feature nobody asks libvirt, and the guest takes no part.
    assert!(agent.verb(&["features", "--disable", "libvirt"]).status.success());
    fs::write(at("calls"), "").expect("forgotten");
    let list = agent.verb(&["list", "--json"]);
    assert!(list.status.success());
    assert_eq!(fs::read_to_string(at("calls")).expect("calls"), "");
}
