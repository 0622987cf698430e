//! Checkpoints with a shell script in PowerShell's place.

use std::fs;

use super::*;
use crate::volumes::tests::lun;
use crate::writers::tests::inventory;

struct Host {
    dir: tempfile::TempDir,
    hyperv: HyperV,
}

fn host(vms: &str) -> Host {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shell = dir.path().join("powershell");
    // A link, not a file that was just written: another test may fork while it is open, and then it is "busy".
    std::os::unix::fs::symlink(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/powershell"), &shell)
        .expect("linked");
    fs::write(dir.path().join("vms.json"), vms).expect("written");
    let hyperv = HyperV::new(&shell, dir.path());
    Host { dir, hyperv }
}

impl Host {
    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        text.lines().map(ToOwned::to_owned).collect()
    }
}

const VMS: &str = r#"[
 {"id":"a1","name":"web","state":"Running","paths":["S:\\vm\\web", null, "S:\\vm\\web\\disk.vhdx"]},
 {"id":"a2","name":"off","state":"Off","paths":["S:\\vm\\off"]},
 {"id":"a3","name":"wide","state":"Running","paths":["S:\\vm\\wide", "C:\\vm\\wide.vhdx"]},
 {"id":"a4","name":"else","state":"Running","paths":["C:\\vm\\else"]},
 {"id":"bad","name":"full","state":"Running","paths":["S:\\vm\\full"]}]"#;

#[test]
fn each_running_vm_gets_a_checkpoint_that_is_removed() {
    let host = host(VMS);
    let done = host
        .hyperv
        .checkpoint("s1", &inventory(), &[lun(1)], false)
        .expect("best effort");
    let names: Vec<String> = done
        .apps(AppState::Ready)
        .into_iter()
        .map(|app| app.instance)
        .collect();
    assert_eq!(names, ["web", "off"]);
    let left_out: Vec<&str> = done.exclusions.iter().map(|one| one.subject.as_str()).collect();
    assert_eq!(left_out, ["wide", "full"]);
    assert!(
        done.exclusions[0].reason.contains("wide.vhdx")
            && done.exclusions[1].reason.contains("not enough memory")
    );
    assert_eq!(host.log(), ["make a1 stillpoint-s1", "make bad stillpoint-s1"]);
    assert_eq!(host.hyperv.remove(&done), None);
    assert!(host.log().contains(&"remove a1 stillpoint-s1".to_owned()));
    assert!(host.hyperv.list().is_empty(), "nothing is written down any more");
}

#[test]
fn one_that_cannot_fails_all_where_all_are_required() {
    let host = host(VMS);
    let refusal = host
        .hyperv
        .checkpoint("s2", &inventory(), &[lun(1)], true)
        .expect_err("wide is spread");
    assert_eq!(
        (refusal.code, refusal.subject.as_deref()),
        (ErrorCode::LimitVmSpread, Some("wide"))
    );
    assert_eq!(host.log(), ["make a1 stillpoint-s2", "remove a1 stillpoint-s2"]);
    assert_eq!(
        host.hyperv.spread(&inventory(), &[lun(1)]).expect("listed").len(),
        1
    );
}

#[test]
fn a_service_that_died_leaves_a_list_and_the_next_one_sweeps() {
    let host = host(VMS);
    host.hyperv
        .checkpoint("s3", &inventory(), &[lun(1)], false)
        .expect("made, and never removed");
    fs::write(host.dir.path().join("stuck"), "").expect("written");
    let left = host.hyperv.sweep();
    assert!(left.len() == 2 && left[0].contains("VM web"), "{left:?}");
    fs::remove_file(host.dir.path().join("stuck")).expect("removed");
    assert!(host.hyperv.sweep().is_empty());
    assert!(host.hyperv.list().is_empty() && host.hyperv.sweep().is_empty());
}

#[test]
fn a_shell_that_hangs_or_talks_nonsense_is_an_error() {
    let host = host("no json");
    let refusal = host
        .hyperv
        .checkpoint("s4", &inventory(), &[lun(1)], false)
        .expect_err("nonsense");
    assert!(refusal.text.contains("no JSON"), "{refusal}");
    let mut hangs = Command::new("/bin/sleep");
    hangs.arg("600");
    assert!(
        output_within(hangs, Duration::from_millis(50))
            .expect_err("killed")
            .contains("did not end")
    );
    assert!(output_within(Command::new("/nonexistent/powershell"), CALL_TIME_MAX).is_err());
}
