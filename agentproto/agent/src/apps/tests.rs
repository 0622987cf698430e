//! What needs no server. The real ones are in the story `databases`.

use super::*;

fn mount(id: u32, point: &str) -> Mount {
    crate::volumes::mount_for_tests(id, point)
}

fn application(data_dir: &Path) -> Application {
    Application {
        kind: Kind::Mariadb,
        name: "shop".to_owned(),
        data_dir: data_dir.to_owned(),
        client: "/bin/false".into(),
        run_as: "0".to_owned(),
        socket: String::new(),
        port: 0,
        user: "root".to_owned(),
        credentials: None,
        lock_max: Duration::from_secs(1),
        config: Some("/etc/stillpoint-agent/agent.toml".into()),
    }
}

#[test]
fn a_path_lies_on_the_deepest_and_latest_mount_over_it() {
    let mounts = [
        mount(1, "/"),
        mount(2, "/srv"),
        mount(3, "/srv/pg"),
        mount(4, "/srv/pgx"),
    ];
    let of = |path: &str| mount_of(Path::new(path), &mounts);
    assert_eq!(of("/srv/pg/data"), Some("/srv/pg".into()));
    assert_eq!(of("/srv/pgdata"), Some("/srv".into()));
    assert_eq!(of("/srv/pg"), Some("/srv/pg".into()));
    assert_eq!(mount_of(Path::new("/x"), &[]), None);
}

#[test]
fn a_helper_is_a_hook_of_the_file_system_that_its_data_lies_on() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let hook = application(dir.path()).hook(&Root::real());
    assert_eq!(
        hook.arguments,
        [
            "--config",
            "/etc/stillpoint-agent/agent.toml",
            "application",
            "shop"
        ]
    );
    assert_eq!(hook.mounts.len(), 1);
    assert!(dir.path().starts_with(&hook.mounts[0]) && hook.mounts[0] != dir.path());
    let absent = application(Path::new("/nonexistent/data")).hook(&Root::real());
    assert_eq!(
        absent.mounts,
        [PathBuf::from("/nonexistent/data")],
        "never every mount"
    );
}

#[test]
fn another_servers_data_and_what_lies_outside_are_named() {
    let (dir, other) = (
        tempfile::tempdir().expect("a temporary directory"),
        tempfile::tempdir().expect("a temporary directory"),
    );
    let app = application(dir.path());
    let mounts = Inventory::mounts(&Root::real());
    let own = mount_of(&dir.path().canonicalize().expect("there"), &mounts).expect("it is mounted");
    let helper = |frozen: Option<Vec<PathBuf>>| Helper {
        app: &app,
        run_dir: Path::new("/nonexistent"),
        mounts: frozen,
        hold_max: Duration::from_secs(1),
    };
    let data = dir.path().display().to_string();
    assert_eq!(
        helper(Some(vec![own.clone()])).on_frozen_mounts(&data, &[]),
        Ok(())
    );
    assert_eq!(
        helper(None).on_frozen_mounts(&data, &[("x".to_owned(), "/proc".into())]),
        Ok(())
    );
    let wrong = helper(None).on_frozen_mounts(&other.path().display().to_string(), &[]);
    assert!(wrong.is_err_and(|why| why.contains("correct `data_dir`")));
    let outside = [("its write-ahead log".to_owned(), PathBuf::from("/proc"))];
    let wrong = helper(Some(vec![own])).on_frozen_mounts(&data, &outside);
    assert!(wrong.is_err_and(|why| why.starts_with("its write-ahead log (/proc) lies outside")));
    let wrong = helper(Some(vec!["/nonexistent".into()])).on_frozen_mounts(&data, &[]);
    assert!(wrong.is_err_and(|why| why.starts_with("its data directory")));
}

#[test]
fn a_client_that_cannot_log_in_is_the_reason() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let app = application(dir.path());
    let helper = Helper {
        app: &app,
        run_dir: dir.path(),
        mounts: None,
        hold_max: Duration::from_secs(1),
    };
    let error = mariadb::check(&helper).expect_err("false says nothing");
    assert_eq!(error, "the client ended without a word");
    assert_eq!(
        hold::end(&helper),
        Ok(()),
        "nothing was locked, so nothing was lost"
    );
    std::fs::write(dir.path().join("app-shop.frozen"), "").expect("a mark");
    assert!(hold::end(&helper).is_err_and(|why| why.contains("given up before the thaw")));
}
