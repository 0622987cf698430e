//! What operators get to read. Each case is a file with something wrong, and the lines they must see.

#![expect(clippy::indexing_slicing, reason = "a test may panic, also in its helpers")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use proptest::prelude::*;
use stillpoint_config::{Change, Config, Effect, diff};

const GOOD: &str = r#"
[daemon]
data_dir = "/tmp/x"
[[portal]]
address = "127.0.0.1:3260"
[[lun]]
name = "a"
size = "1GiB"
[[lun]]
name = "b"
size = "2GiB"
[[target]]
iqn = "iqn.2026-11.com.example:a"
luns = ["a"]
initiators = ["iqn.2026-11.com.example:host"]
agents = true
[[target]]
iqn = "iqn.2026-11.com.example:b"
luns = ["b"]
initiators = ["iqn.2026-11.com.example:host"]
"#;

fn good() -> Config {
    Config::parse(GOOD, Path::new("stillpoint.toml")).expect("right")
}

fn problems(text: &str) -> Vec<String> {
    match Config::parse(text, Path::new("stillpoint.toml")) {
        Ok(config) => panic!("no problem found: {config:?}"),
        Err(problems) => problems.0.iter().map(ToString::to_string).collect(),
    }
}

/// `GOOD` with one replacement must give exactly one problem that contains `wanted`.
#[track_caller]
fn one(from: &str, to: &str, wanted: &str) {
    assert!(GOOD.contains(from), "{from}");
    let found = problems(&GOOD.replacen(from, to, 1));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].contains(wanted), "{}\nwanted: {wanted}", found[0]);
}

/// What replaces what in `GOOD`, and what the operator must read then.
const MISTAKES: &[(&str, &str, &str)] = &[
    (
        "data_dir",
        "data_dri",
        "stillpoint.toml:3: [daemon]: unknown key `data_dri`: did you mean `data_dir`?",
    ),
    (
        "[daemon]",
        "[deamon]",
        "the file: unknown key `deamon`: did you mean `daemon`?",
    ),
    (
        "\"1GiB\"",
        "\"1GB\"",
        "stillpoint.toml:8: lun \"a\": `size`: \"GB\" is not a unit of size: write \"1GiB\"",
    ),
    (
        "size = \"1GiB\"",
        "size = 1073741824",
        "stillpoint.toml:8: lun \"a\": `size` is of type integer: write a text in quotes",
    ),
    (
        "size = \"1GiB\"",
        "",
        "stillpoint.toml:6: lun \"a\": `size` is missing: add for example `size = \"500GiB\"`",
    ),
    ("\"1GiB\"", "\"512B\"", "out of range"),
    (
        "\"1GiB\"",
        "\"1048577B\"",
        "512-byte blocks: write for example \"1048576B\"",
    ),
    (
        "name = \"b\"",
        "name = \"b\"\nblock_size = 1024",
        "`block_size`: 1024 is no size",
    ),
    (
        "luns = [\"b\"]",
        "luns = [\"bb\"]",
        "stillpoint.toml:19: target \"iqn.2026-11.com.example:b\": there is no LUN \"bb\": did you mean",
    ),
    (
        "luns = [\"b\"]",
        "luns = [\"b\", \"b\"]",
        "`luns` names \"b\" twice",
    ),
    ("luns = [\"b\"]", "luns = []", "`luns` is empty"),
    (
        "\"iqn.2026-11.com.example:b\"",
        "\"iqn.2026-11.com.example:a\"",
        "is in the file twice (first in line 13)",
    ),
    (
        "\"iqn.2026-11.com.example:b\"",
        "\"iqn.com.example:b\"",
        "is not an iSCSI name",
    ),
    (
        "127.0.0.1:3260",
        "localhost:3260",
        "is not an IP address with a port",
    ),
    (
        "initiators = [\"iqn.2026-11.com.example:host\"]",
        "initiators = [\"iqn.*\"]",
        "`*` stands only alone",
    ),
    (
        "agents = true",
        "agents = true\nmax_sessions = 2",
        "one path (no MPIO): write 1, or remove the key",
    ),
    (
        "agents = true",
        "agents = true\nportal_groups = [1, 2]\n[[portal]]\naddress=\"[::1]:3260\"\ngroup=2",
        "has one path (no MPIO): keep one",
    ),
    (
        "agents = true",
        "agents = true\nportal_groups = [7]",
        "no `[[portal]]` has group 7",
    ),
    (
        "agents = true",
        "agents = true\nallow_from = []",
        "nobody could log in",
    ),
    (
        "agents = true",
        "agents = true\nallow_from = [\"10.0.0.1/8\"]",
        "write \"10.0.0.0/8\" for the network, or \"10.0.0.1\" for the host",
    ),
    (
        "agents = true",
        "agents = \"yes\"",
        "`agents` is of type string: write true or false",
    ),
    (
        "luns = [\"b\"]",
        "luns = [\"b\", \"a\"]",
        "LUN a is also on target \"iqn.2026-11.com.example:b\", but a LUN with `agents` has one path",
    ),
    (
        "[daemon]",
        "[pool]\ncache = \"1MiB\"\n[daemon]",
        "`cache`: 1MiB is too small",
    ),
    (
        "[daemon]",
        "[pool]\ngrain = \"5KiB\"\n[daemon]",
        "use one of auto, 4KiB, 8KiB, 16KiB, 64KiB",
    ),
    (
        "[daemon]",
        "[http]\nlisten = \"0.0.0.0:8480\"\n[daemon]",
        "add `tls` and at least one `[[http.user]]`",
    ),
    (
        "[daemon]",
        "[metrics]\nlisten = \"127.0.0.1:3260\"\n[daemon]",
        "is already taken by portal",
    ),
    (
        "[daemon]",
        "[agents]\non_failure = \"ignore\"\n[daemon]",
        "use one of fail, crash-consistent",
    ),
    (
        "[daemon]",
        "[daemon]\nnaa_company_id = \"1\"",
        "write three bytes",
    ),
    (
        "[daemon]",
        "[daemon]\nsession_memory = \"1MiB\"",
        "`session_memory`: 1MiB is less than one large command needs",
    ),
];

#[test]
fn one_mistake_gives_one_problem_with_line_cause_and_way_out() {
    for (from, to, wanted) in MISTAKES {
        one(from, to, wanted);
    }
    let lun_c = "[[lun]]\nname = \"c\"\nsize = \"1GiB\"\n[daemon]";
    let two = GOOD
        .replacen("[daemon]", lun_c, 1)
        .replacen("luns = [\"b\"]", "luns = [\"c\"]", 1);
    let found = problems(&two.replacen("luns = [\"a\"]", "luns = [\"a\", \"b\"]", 1));
    assert!(
        found.len() == 1 && found[0].contains("a target with `agents` has exactly one LUN"),
        "{found:#?}"
    );
    let long = format!("[daemon]\ncontrol_socket = \"/{}\"", "x".repeat(120));
    one("[daemon]", &long, "Unix sockets allow 107");
}

#[test]
fn schedules_are_checked_although_they_are_not_served_yet() {
    let schedule = |extra: &str| {
        format!("[[schedule]]\nname = \"s\"\nluns = [\"a\"]\ncron = \"0 * * * *\"\n{extra}\n[daemon]")
    };
    let with = |extra: &str| GOOD.replacen("[daemon]", &schedule(extra), 1);
    let config = Config::parse(&with("consistency = \"application\""), Path::new("x.toml")).expect("right");
    assert_eq!(config.unserved()[0].section, "schedule");
    one(
        "[daemon]",
        &schedule("timezone = \"Mars/Olympus\""),
        "is not a time zone",
    );
    one("[daemon]", &schedule("keep = { last = 0 }"), "keeps nothing");
    one(
        "[daemon]",
        &schedule("keep = { lats = 1, daily = 1 }"),
        "did you mean `last`?",
    );
    one("[daemon]", &schedule("lock = \"7\""), "no unit");
    let on_b = schedule("consistency = \"filesystem\"").replace("\"a\"", "\"b\"");
    one("[daemon]", &on_b, "no target with `agents = true` serves b");
    one(
        "[daemon]",
        &schedule("").replace("0 * * * *", "0 0 30 2 *"),
        "never comes",
    );
}

#[test]
fn every_mistake_is_listed_in_the_order_of_lines() {
    let text = GOOD
        .replacen("data_dir", "datadir", 1)
        .replacen("\"1GiB\"", "\"1 GB\"", 1)
        .replacen("luns = [\"b\"]", "luns = [\"nix\"]", 1)
        .replacen("agents = true", "agents = true\nmax_sessions = 3\n", 1);
    let found = problems(&text);
    assert_eq!(found.len(), 4, "{found:#?}");
    let lines: Vec<usize> = found
        .iter()
        .map(|p| p.split(':').nth(1).and_then(|l| l.parse().ok()).expect("line"))
        .collect();
    assert!(lines.is_sorted(), "{lines:?}");
}

#[test]
fn syntax_errors_are_all_listed_without_noise_about_what_they_hide() {
    let text = GOOD
        .replacen("\"1GiB\"", "1GiB", 1)
        .replacen("\"2GiB\"", "2GiB\"", 1);
    let found = problems(&text);
    assert!(
        found.iter().any(|p| p.starts_with("stillpoint.toml:8: ")),
        "{found:#?}"
    );
    assert!(
        found.iter().any(|p| p.starts_with("stillpoint.toml:11: ")),
        "{found:#?}"
    );
    assert!(
        found
            .iter()
            .all(|p| !p.contains("is missing") && !p.contains("there is no LUN")),
        "{found:#?}"
    );
}

#[test]
fn chap_and_agents_exclude_each_other() {
    let dir = tempfile::tempdir().expect("dir");
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "correct horse battery").expect("write");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let chap = format!(
        "[target.chap]\nuser = \"u\"\nsecret_file = \"{}\"\n",
        secret.display()
    );
    one(
        "agents = true\n",
        &format!("agents = true\n{chap}"),
        "`chap` cannot be used with `agents`",
    );

    let plain = format!("{GOOD}{chap}");
    let config = Config::parse(&plain, Path::new("x.toml")).expect("right");
    assert_eq!(
        config.targets[1].chap().expect("chap").initiator.secret.expose(),
        b"correct horse battery"
    );

    let same = format!(
        "{plain}mutual_user = \"t\"\nmutual_secret_file = \"{}\"\n",
        secret.display()
    );
    assert!(problems(&same)[0].contains("both directions of CHAP have the same secret"));
    let half = format!("{plain}mutual_user = \"t\"\n");
    assert!(problems(&half)[0].contains("`mutual_user` without `mutual_secret_file`"));
    let weak = plain.replace("user = \"u\"", "user = \"u\"\nalgorithms = [\"md4\"]");
    assert!(problems(&weak)[0].contains("did you mean \"md5\"?"));

    std::fs::write(&secret, "short").expect("write");
    let config = Config::parse(&plain, Path::new("x.toml")).expect("right");
    assert!(
        config.warnings[0].to_string().contains("can be guessed"),
        "{:?}",
        config.warnings
    );
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).expect("chmod");
    assert!(problems(&plain)[0].contains("chmod 0600"));
    std::fs::remove_file(&secret).expect("remove");
    assert!(problems(&plain)[0].contains("cannot read"));
}

#[test]
fn open_and_closed_access_lists_are_warned_about() {
    let open = GOOD.replace("\"iqn.2026-11.com.example:host\"", "\"*\"");
    let config = Config::parse(&open, Path::new("x.toml")).expect("right");
    assert_eq!(config.warnings.len(), 2);
    assert!(
        config.warnings[0]
            .to_string()
            .contains("any initiator may log in")
    );
    let closed = GOOD.replacen("[\"iqn.2026-11.com.example:host\"]", "[]", 1);
    let config = Config::parse(&closed, Path::new("x.toml")).expect("right");
    assert!(config.warnings[0].to_string().contains("nobody may log in"));
    let lonely = GOOD.replacen("[[lun]]", "[[lun]]\nname = \"c\"\nsize = \"1GiB\"\n[[lun]]", 1);
    let config = Config::parse(&lonely, Path::new("x.toml")).expect("right");
    assert!(config.warnings[0].to_string().contains("no target serves it"));
}

#[test]
fn relative_paths_are_meant_from_the_file() {
    let text = GOOD.replacen("/tmp/x", "data", 1);
    let config = Config::parse(&text, Path::new("/srv/san/stillpoint.toml")).expect("right");
    assert_eq!(config.daemon.data_dir, Path::new("/srv/san/data"));
}

#[test]
fn a_client_finds_the_socket_of_a_file_whose_secrets_it_may_not_read() {
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join("s.toml");
    let text = format!("{GOOD}[target.chap]\nuser = \"u\"\nsecret_file = \"/nowhere\"\n").replacen(
        "[daemon]",
        "[daemon]\ncontrol_socket = \"c.sock\"",
        1,
    );
    std::fs::write(&file, text).expect("write");
    assert!(Config::load(&file).is_err());
    assert_eq!(
        Config::control_socket_of(&file).expect("socket"),
        dir.path().join("c.sock")
    );
    assert!(
        Config::control_socket_of(&dir.path().join("none"))
            .expect_err("none")
            .to_string()
            .contains("cannot be read")
    );
}

#[test]
fn agents_have_defaults_as_soon_as_a_target_uses_them() {
    let config = good();
    assert_eq!(config.agents.expect("agents").listen.to_string(), "0.0.0.0:11169");
    let without = GOOD.replacen("agents = true", "", 1);
    assert!(
        Config::parse(&without, Path::new("x.toml"))
            .expect("right")
            .agents
            .is_none()
    );
}

fn changes(from: &str, to: &str) -> Vec<Change> {
    assert!(GOOD.contains(from), "{from}");
    let new = Config::parse(&GOOD.replacen(from, to, 1), Path::new("stillpoint.toml")).expect("right");
    diff(&good(), &new)
}

#[track_caller]
fn one_change(from: &str, to: &str, effect: Effect, wanted: &str) {
    let found = changes(from, to);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].effect, effect, "{found:#?}");
    assert!(found[0].to_string().contains(wanted), "{}", found[0]);
}

#[test]
fn a_plan_names_what_changes_and_whose_sessions_it_touches() {
    assert!(diff(&good(), &good()).is_empty());
    one_change(
        "\"1GiB\"",
        "\"3GiB\"",
        Effect::Told,
        "lun \"a\": grows from 1GiB to 3GiB",
    );
    assert_eq!(
        changes("\"1GiB\"", "\"3GiB\"")[0].targets[0].as_str(),
        "iqn.2026-11.com.example:a"
    );
    one_change("\"1GiB\"", "\"512MiB\"", Effect::Refused, "put 1GiB back");
    one_change(
        "\"1GiB\"",
        "\"1GiB\"\nblock_size = 4096",
        Effect::Refused,
        "fixed when the volume is created",
    );
    one_change(
        "\"1GiB\"",
        "\"1GiB\"\nread_only = true",
        Effect::Told,
        "becomes read-only",
    );
    one_change(
        "\"1GiB\"",
        "\"1GiB\"\nwrite_cache = false",
        Effect::None,
        "`write_cache` is false from the next start on",
    );
    one_change("/tmp/x", "/tmp/y", Effect::Refused, "restart the daemon");
    one_change(
        "[daemon]",
        "[pool]\ngrain = \"16KiB\"\n[daemon]",
        Effect::Refused,
        "fixed when the pool is created",
    );
    one_change("127.0.0.1:3260", "127.0.0.1:3261", Effect::Refused, "[[portal]]");
}

#[test]
fn target_changes_touch_only_their_target() {
    let added = changes(
        "agents = true",
        "agents = true\n[[target]]\niqn = \"iqn.2026-11.com.example:c\"\nluns = [\"b\"]\n",
    );
    assert_eq!(
        (added.len(), added[0].effect, added[0].targets.len()),
        (1, Effect::None, 0)
    );
    let access = changes(
        "\"iqn.2026-11.com.example:host\"",
        "\"iqn.2026-11.com.example:other\"",
    );
    assert_eq!((access.len(), access[0].effect), (1, Effect::EndsExcluded));
    // The same three LUNs, under other numbers of one target.
    let with = |luns: &str| {
        let text = GOOD.replacen(
            "name = \"b\"",
            "name = \"c\"\nsize = \"1GiB\"\n[[lun]]\nname = \"b\"",
            1,
        );
        Config::parse(&text.replace("luns = [\"b\"]", luns), Path::new("x")).expect("right")
    };
    let (one, appended, renumbered) = (
        with("luns = [\"b\"]"),
        with("luns = [\"b\", \"c\"]"),
        with("luns = [\"c\", \"b\"]"),
    );
    let effect = |from: &Config, to: &Config| diff(from, to).iter().map(|c| c.effect).collect::<Vec<_>>();
    assert_eq!(effect(&one, &appended), [Effect::Told]);
    assert_eq!(effect(&appended, &one), [Effect::Ends]);
    assert_eq!(effect(&one, &renumbered), [Effect::Ends]);
    assert_eq!(effect(&good(), &one), [Effect::None], "a LUN is added");
}

#[test]
fn a_change_is_json_with_snake_case() {
    let json = serde_json::to_value(changes("\"1GiB\"", "\"3GiB\"")).expect("json");
    assert_eq!(json[0]["effect"], "told");
    assert_eq!(json[0]["targets"][0], "iqn.2026-11.com.example:a");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Bad input gives problems, never a panic.
    #[test]
    fn any_damage_is_survived(at in 0usize..GOOD.len(), put in "[\\[\\]\"=a-z0-9\n .#{}]{0,4}", cut in 0usize..8) {
        let mut text = GOOD.to_owned();
        let end = (at + cut).min(text.len());
        text.replace_range(at..end, &put);
        if let Err(problems) = Config::parse(&text, Path::new("stillpoint.toml")) {
            prop_assert!(!problems.0.is_empty());
        }
    }
}
