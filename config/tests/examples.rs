//! Every example must be right: operators copy them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use stillpoint_config::{Config, Target};

/// The files that the examples name below /etc/stillpoint, with something plausible in them.
const FILES: [(&str, &str); 6] = [
    ("archive.chap", "archive-secret\n"),
    ("cluster1.chap", "cluster1-secret\n"),
    ("san1.chap", "the-target-itself\n"),
    (
        "ops.password",
        "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2g\n",
    ),
    ("cert.pem", "not looked into\n"),
    ("key.pem", "not looked into\n"),
];

fn parse(example: &Path) -> Config {
    let etc = tempfile::tempdir().expect("a temporary directory");
    for (name, content) in FILES {
        let path = etc.path().join(name);
        std::fs::write(&path, content).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    }
    let text = std::fs::read_to_string(example).expect("the example");
    let text = text.replace("/etc/stillpoint", etc.path().to_str().expect("a plain path"));
    match Config::parse(&text, example) {
        Ok(config) => config,
        Err(problems) => panic!("{problems}"),
    }
}

#[test]
fn every_example_is_right() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut count = 0;
    for entry in std::fs::read_dir(dir).expect("examples") {
        let path = entry.expect("entry").path();
        let config = parse(&path);
        assert!(
            config.warnings.is_empty(),
            "{}: {:?}",
            path.display(),
            config.warnings
        );
        count += 1;
    }
    assert!(count >= 4, "{count} examples");
}

#[test]
fn the_full_example_has_every_key_and_says_what_is_not_served() {
    let config = parse(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/full.toml"));
    assert_eq!(config.portals.len(), 2);
    assert_eq!(config.targets.iter().filter(|t| Target::has_agents(t)).count(), 1);
    assert_eq!(config.targets[1].chap().expect("chap").algorithms.len(), 4);
    assert_eq!(config.schedules[0].lock.map(|l| l.as_secs()), Some(7 * 86_400));
    let sections: Vec<&str> = config.unserved().iter().map(|u| u.section.as_str()).collect();
    assert_eq!(sections, ["schedule", "http", "metrics"]);
    assert!(
        !format!("{config:?}").contains("archive-secret"),
        "secrets are not shown"
    );
}
