//! Surveys of made-up hosts.

use super::*;
use crate::volumes::tests::{Host, naa as naa_of};

fn lun(id: u8) -> LunId {
    naa_of(id).parse().expect("an identity")
}

fn look(host: &Host, luns: &[LunId], mode: Mode, grants: Option<&[LunIdentity]>) -> Survey {
    survey(&host.read(), &settings(host), &[], luns, mode, grants)
}

fn settings(host: &Host) -> Settings {
    Settings {
        root: host.root(),
        run_dir: "/nonexistent/run".into(),
        hooks_dir: host.root().path("/hooks.d"),
        features: crate::features::Features::default(),
        libvirt: crate::libvirt::Libvirt::default(),
        config_file: None,
        hook_time_max: Duration::from_secs(1),
        protect: Vec::new(),
    }
}

/// One LUN (7) with a btrfs on it. Its device number is anonymous, so any directory can play its mount point.
fn healthy() -> Host {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.write("sys/fs/btrfs/uuid/devices/sda/dev", "8:0");
    host.mounts("2 1 0:40 / /proc rw - btrfs /dev/sda rw\n");
    host
}

fn codes(survey: &Survey) -> Vec<(ErrorCode, Severity)> {
    survey
        .findings()
        .iter()
        .map(|finding| (finding.code, finding.severity))
        .collect()
}

fn grant() -> LunIdentity {
    LunIdentity {
        lun: lun(7),
        serial: Some("S123".to_owned()),
        iqn: Some("iqn.2026-11.t:sql".to_owned()),
        number: Some(0),
        size_bytes: Some(1 << 30),
    }
}

#[test]
fn a_healthy_lun_has_no_findings_and_a_plan() {
    let host = healthy();
    let survey = look(&host, &[lun(7)], Mode::Filesystem, Some(&[grant()]));
    assert_eq!(survey.findings(), []);
    let plan = survey.plan(Require::All).expect("a plan");
    assert_eq!(
        (plan.volumes.len(), plan.exclusions.len(), plan.apps().len()),
        (1, 0, 0)
    );
}

#[test]
fn application_without_a_hook_is_a_warning_only() {
    let survey = look(&healthy(), &[lun(7)], Mode::Application, None);
    assert_eq!(codes(&survey), [(ErrorCode::Unsupported, Severity::Warning)]);
    assert!(survey.plan(Require::All).is_ok());
}

#[test]
fn an_absent_lun_and_an_unmounted_one_are_told_apart() {
    let host = healthy();
    host.lun("sdb", 16, 2, 8);
    let survey = look(&host, &[lun(8), lun(9)], Mode::Filesystem, None);
    let texts: Vec<_> = survey
        .findings()
        .into_iter()
        .map(|finding| finding.text)
        .collect();
    assert!(
        texts[0].contains("no file system of it is mounted") && texts[1].contains("no disk"),
        "{texts:?}"
    );
    let refusal = survey
        .plan(Require::BestEffort)
        .expect_err("best effort needs something to freeze, too");
    assert_eq!(refusal.code, ErrorCode::NotMounted);
}

#[test]
fn identity_must_agree_in_everything_but_size() {
    let host = healthy();
    let with = |change: fn(&mut LunIdentity)| {
        let mut grant = grant();
        change(&mut grant);
        codes(&look(&host, &[lun(7)], Mode::Filesystem, Some(&[grant])))
    };
    let mismatch = [(ErrorCode::IdentityMismatch, Severity::Error)];
    assert_eq!(with(|grant| grant.serial = Some("other".to_owned())), mismatch);
    assert_eq!(
        with(|grant| grant.iqn = Some("iqn.2026-11.t:other".to_owned())),
        mismatch
    );
    assert_eq!(with(|grant| grant.number = Some(1)), mismatch);
    assert_eq!(
        with(|grant| grant.size_bytes = Some(2 << 30)),
        [(ErrorCode::IdentityMismatch, Severity::Warning)]
    );
    let none = codes(&look(&host, &[lun(7)], Mode::Filesystem, Some(&[])));
    assert_eq!(none, [(ErrorCode::NotAllowed, Severity::Error)]);
}

#[test]
fn two_paths_are_the_limit_mpio() {
    let host = healthy();
    host.lun("sdb", 16, 2, 7);
    let survey = look(&host, &[lun(7)], Mode::Filesystem, None);
    assert_eq!(codes(&survey), [(ErrorCode::LimitMpio, Severity::Error)]);
    assert!(survey.findings()[0].text.contains("sda, sdb"));
    assert_eq!(
        survey.plan(Require::BestEffort).expect_err("a limit").code,
        ErrorCode::LimitMpio
    );
}

#[test]
fn a_claim_by_dm_multipath_over_one_path_is_the_limit_mpio_too() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.dm(0, "mpath-360", &["8:0"]);
    host.mounts("2 1 253:0 / /lv ro - ext4 /dev/mapper/x ro\n");
    assert_eq!(
        codes(&look(&host, &[lun(7)], Mode::Filesystem, None)),
        [(ErrorCode::LimitMpio, Severity::Error)]
    );
}

#[test]
fn a_file_system_over_another_lun_needs_both_in_the_snapshot() {
    let host = healthy();
    host.lun("sdb", 16, 2, 8);
    host.write("sys/fs/btrfs/uuid/devices/sdb/dev", "8:16");
    let one = look(&host, &[lun(7)], Mode::Filesystem, None);
    assert_eq!(codes(&one), [(ErrorCode::Unsupported, Severity::Error)]);
    assert!(one.findings()[0].text.contains(&naa_of(8)));
    assert_eq!(
        look(&host, &[lun(7), lun(8)], Mode::Filesystem, None).findings(),
        []
    );
}

#[test]
fn what_cannot_be_frozen_stops_all_or_is_left_out_by_best_effort() {
    let host = healthy();
    host.mounts("2 1 0:40 / /proc rw - btrfs /dev/sda rw\n3 1 8:1 / /boot/efi rw - vfat /dev/sda1 rw\n");
    let survey = look(&host, &[lun(7)], Mode::Filesystem, None);
    assert_eq!(codes(&survey), [(ErrorCode::NoQuiesce, Severity::Error)]);
    assert_eq!(
        survey
            .clone()
            .plan(Require::All)
            .expect_err("all")
            .subject
            .as_deref(),
        Some("/boot/efi")
    );
    let plan = survey.plan(Require::BestEffort).expect("the rest");
    assert_eq!(
        plan.volumes.iter().map(Volume::name).collect::<Vec<_>>(),
        ["/proc"]
    );
    assert_eq!(
        (plan.exclusions[0].kind, plan.exclusions[0].lun),
        (ExclusionKind::Volume, Some(lun(7)))
    );
}

#[test]
fn a_read_only_file_system_of_any_kind_is_in_order() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.mounts("3 1 8:1 / /iso ro - iso9660 /dev/sda1 ro\n");
    let survey = look(&host, &[lun(7)], Mode::Filesystem, None);
    assert_eq!(survey.findings(), []);
    assert!(
        survey
            .plan(Require::All)
            .expect("a plan")
            .volumes
            .iter()
            .all(|volume| !volume.needs_freeze())
    );
}

#[test]
fn a_later_mount_and_a_remount_are_newcomers() {
    let host = healthy();
    let plan = look(&host, &[lun(7)], Mode::Filesystem, None)
        .plan(Require::All)
        .expect("a plan");
    assert_eq!(plan.newcomer(&host.read()), None);
    host.mounts("2 1 0:40 / /proc rw - btrfs /dev/sda rw\n3 1 8:1 / /new rw - ext4 /dev/sda1 rw\n");
    assert_eq!(plan.newcomer(&host.read()).as_deref(), Some("/new"));
    host.mounts("2 1 0:40 / /proc rw - btrfs /dev/sda ro\n");
    assert_eq!(plan.newcomer(&host.read()).as_deref(), Some("/proc"));
    host.mounts("");
    assert_eq!(plan.newcomer(&host.read()), None, "an unmount hides no writer");
}

#[test]
fn suspended_and_hidden_volumes_are_named() {
    let host = Host::new();
    host.lun("sda", 0, 1, 7);
    host.dm(0, "LVM-abc", &["8:0"]);
    host.write("sys/devices/virtual/block/dm-0/dm/suspended", "1\n");
    host.mounts("2 1 253:0 / /lv rw - ext4 /dev/mapper/x rw\n");
    let survey = look(&host, &[lun(7)], Mode::Filesystem, None);
    assert!(
        survey.findings()[0].text.contains("dmsetup resume map0"),
        "{:?}",
        survey.findings()
    );
}

#[test]
fn without_the_right_to_freeze_nothing_is_promised() {
    let host = healthy();
    host.write("proc/self/status", "Name:\tagent\nCapEff:\t00000000a80425fb\n");
    let survey = look(&host, &[lun(7)], Mode::Filesystem, None);
    assert_eq!(codes(&survey), [(ErrorCode::Unsupported, Severity::Error)]);
    host.write("proc/self/status", "Name:\tagent\nCapEff:\t000001ffffffffff\n");
    assert_eq!(look(&host, &[lun(7)], Mode::Filesystem, None).findings(), []);
}

#[test]
fn a_broken_hook_directory_stops_the_snapshot() {
    use std::os::unix::fs::PermissionsExt;
    let host = healthy();
    host.write("hooks.d/10-db", "#!/bin/sh\n");
    let path = host.root().path("/hooks.d/10-db");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    host.write("hooks.d/10-db.toml", "application = 7\n");
    let survey = look(&host, &[lun(7)], Mode::Filesystem, None);
    assert_eq!(codes(&survey), [(ErrorCode::HookFailed, Severity::Error)]);
    host.write("hooks.d/10-db.toml", "application = \"ledger\"\n");
    let apps = look(&host, &[lun(7)], Mode::Application, None)
        .plan(Require::All)
        .expect("a plan")
        .apps();
    assert_eq!(
        (apps[0].kind.as_str(), apps[0].instance.as_str(), apps[0].state),
        ("hook", "ledger", AppState::Ready)
    );
    // A snapshot of file systems does not need it, and lists it all the same.
    assert!(
        look(&host, &[lun(7)], Mode::Filesystem, None)
            .plan(Require::All)
            .expect("a plan")
            .hooks
            .is_empty()
    );
    let listed = list(
        &host.read(),
        &hooks::read_dir(&host.root().path("/hooks.d")).expect("hooks"),
        &[lun(7), lun(9)],
        &[],
    );
    assert_eq!(
        (listed.len(), listed[0].role, listed[0].apps.len()),
        (1, Role::Mounted, 1)
    );
}

#[test]
fn a_lun_of_a_cluster_is_standby_until_it_is_mounted() {
    let host = Host::new();
    host.lun("sdb", 16, 1, 7);
    host.mounts("");
    let role = |standby: &[LunId]| list(&host.read(), &[], &[lun(7)], standby)[0].role;
    assert_eq!((role(&[]), role(&[lun(7)])), (Role::None, Role::Standby));
    host.mounts("30 1 8:17 / /srv rw - ext4 /dev/sdb1 rw\n");
    assert_eq!(role(&[lun(7)]), Role::Mounted, "the failover came");
}

#[test]
fn without_their_features_file_systems_and_hooks_take_no_part() {
    let host = Host::new();
    host.lun("sdb", 16, 1, 7);
    host.mounts("30 1 8:17 / /srv rw - ext4 /dev/sdb1 rw\n");
    host.write("hooks.d/10-db.toml", "application = 7\n");
    let mut settings = settings(&host);
    settings.features.set(Feature::Hooks, false);
    assert_eq!(hooks(&settings, &[]).expect("none is read"), []);
    assert_eq!(inventory(&settings, &[]).volumes.len(), 1);
    settings.features.set(Feature::LinuxFs, false);
    let seen = inventory(&settings, &[]);
    assert!(seen.volumes.is_empty() && seen.disks.len() == 1);
    let survey = survey(&seen, &settings, &[], &[lun(7)], Mode::Filesystem, None);
    let told = survey.findings();
    assert!(
        told.iter()
            .any(|finding| finding.text.contains("--enable linux-fs")),
        "{told:?}"
    );
}
