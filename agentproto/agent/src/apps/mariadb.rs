//! MariaDB. `BACKUP STAGE` (MariaDB documentation) flushes what is not transactional, and stops commits and DDL for as long as its
//! session holds it: the binary log, the engines and the tables of every kind then agree with each other in the cut.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::client::Client;
use super::{ASK_TIME_MAX, Application, Helper, by};

/// A session. Its lock ends with it.
pub(super) fn connect(app: &Application) -> Result<Client, String> {
    let mut command = Command::new(&app.client);
    // Has to be the first option.
    if let Some(credentials) = &app.credentials {
        command.arg(format!("--defaults-extra-file={}", credentials.display()));
    }
    command.args([
        "--batch",
        "--skip-column-names",
        "--unbuffered",
        "--raw",
        "--skip-reconnect",
    ]);
    command.args(["--connect-timeout=5", "--protocol=socket"]);
    command
        .arg(format!("--socket={}", app.socket))
        .arg(format!("--user={}", app.user));
    Client::start(command, &app.run_as)
}

/// Would `BACKUP STAGE` work, and do all the files lie on what will be frozen? The server's version.
pub(super) fn check(helper: &Helper<'_>) -> Result<String, String> {
    examine(helper, &mut helper.connect()?)
}

fn examine(helper: &Helper<'_>, client: &mut Client) -> Result<String, String> {
    let deadline = by(ASK_TIME_MAX);
    let version = one(client.ask("SELECT @@version", deadline)?);
    if !version.contains("MariaDB") {
        return Err(format!(
            "version {version} is no MariaDB, and has no BACKUP STAGE: write a hook for it"
        ));
    }
    let doublewrite = one(client.ask("SELECT @@innodb_doublewrite", deadline)?);
    if doublewrite == "0" || doublewrite == "OFF" {
        return Err("innodb_doublewrite is off: a page that is half written in the cut cannot be repaired; turn it on".to_owned());
    }
    let data_dir = one(client.ask("SELECT @@datadir", deadline)?);
    let mut others = Vec::new();
    for (what, variable) in [
        ("its redo log", "innodb_log_group_home_dir"),
        ("its system tablespace", "innodb_data_home_dir"),
        ("its undo logs", "innodb_undo_directory"),
    ] {
        let path = one(client.ask(&format!("SELECT IFNULL(@@{variable}, '')"), deadline)?);
        if !path.is_empty() {
            others.push((what.to_owned(), Path::new(&data_dir).join(path)));
        }
    }
    let binlog = one(client.ask("SELECT IFNULL(@@log_bin_basename, '')", deadline)?);
    if let Some(dir) = Path::new(&binlog).parent().filter(|dir| dir.is_absolute()) {
        others.push(("its binary log".to_owned(), dir.to_owned()));
    }
    others.extend(tables_elsewhere(Path::new(&data_dir)));
    helper.on_frozen_mounts(&data_dir, &others)?;
    Ok(version)
}

/// Tables and databases that lie elsewhere: symbolic links, and InnoDB's `.isl` files, which hold the path of a table's file. Looked
/// up on the disk, because the server's own tables for it differ from version to version.
fn tables_elsewhere(data_dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let databases = entries(data_dir).filter(|entry| entry.path().is_dir());
    let tables = databases.flat_map(|database| entries(&database.path()).collect::<Vec<_>>());
    let elsewhere = |entry: std::fs::DirEntry| {
        let path = entry.path();
        let what = format!("what {} leads to", path.display());
        if entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
            return Some((what, path));
        }
        if path.extension().is_none_or(|extension| extension != "isl") {
            return None;
        }
        let file = std::fs::read_to_string(&path).ok()?;
        Some((what, PathBuf::from(file.trim())))
    };
    entries(data_dir).chain(tables).filter_map(elsewhere).collect()
}

/// Stops commits; the session then holds them.
pub(super) fn lock(helper: &Helper<'_>, client: &mut Client) -> Result<(), String> {
    examine(helper, client)?;
    let deadline = by(helper.app.lock_max + ASK_TIME_MAX);
    let seconds = helper.app.lock_max.as_secs().max(1);
    client.ask(&format!("SET SESSION lock_wait_timeout = {seconds}"), deadline)?;
    // A session that waits must not be ended while it holds: our own timer does that.
    client.ask("SET SESSION wait_timeout = 3600", deadline)?;
    client.ask("BACKUP STAGE START", deadline)?;
    client.ask("BACKUP STAGE BLOCK_COMMIT", deadline)?;
    // With innodb_flush_log_at_trx_commit = 0 a commit may still be in memory only.
    client.ask("FLUSH ENGINE LOGS", deadline).map(drop)
}

/// Lets commits go on.
pub(super) fn unlock(client: &mut Client) -> Result<(), String> {
    client.ask("BACKUP STAGE END", by(ASK_TIME_MAX)).map(drop)
}

fn one(rows: Vec<String>) -> String {
    rows.into_iter().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_lie_elsewhere_are_found() {
        let (data, other) = (
            tempfile::tempdir().expect("a temporary directory"),
            tempfile::tempdir().expect("a temporary directory"),
        );
        std::fs::create_dir(data.path().join("shop")).expect("a database");
        std::fs::write(data.path().join("shop/own.ibd"), "").expect("a table");
        assert_eq!(tables_elsewhere(data.path()), []);
        std::fs::write(data.path().join("shop/far.isl"), "/mnt/far.ibd\n").expect("a link of InnoDB");
        std::os::unix::fs::symlink(other.path(), data.path().join("linked")).expect("a linked database");
        let mut paths: Vec<_> = tables_elsewhere(data.path())
            .into_iter()
            .map(|(_, path)| path)
            .collect();
        paths.sort();
        assert_eq!(paths, [PathBuf::from("/mnt/far.ibd"), data.path().join("linked")]);
    }
}
