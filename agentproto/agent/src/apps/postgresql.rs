//! PostgreSQL. A cut of all its files at one moment is what a crash leaves, and it recovers from that by its write-ahead log: no
//! committed transaction is lost (PostgreSQL documentation, "File System Level Backup"). A checkpoint first makes that quick.
//! No lock is held: the server goes on until its file system is frozen.

use std::path::PathBuf;
use std::process::Command;

use super::client::Client;
use super::{ASK_TIME_MAX, Application, Helper, by};

/// What has to be on, or a crash may lose or tear something.
const SAFE: &str = "fsync,full_page_writes";

/// A session.
pub(super) fn connect(app: &Application) -> Result<Client, String> {
    let mut command = Command::new(&app.client);
    command.args(["-X", "-q", "-A", "-t", "-w", "-F", "\t", "-v", "ON_ERROR_STOP=1"]);
    command.args([
        "-h",
        &app.socket,
        "-p",
        &app.port.to_string(),
        "-U",
        &app.user,
        "-d",
        "postgres",
    ]);
    command
        .env("PGCONNECT_TIMEOUT", "5")
        .env("PGAPPNAME", "stillpoint-agent");
    // A snapshot taken on a standby or in a busy pool: never wait for another session's lock.
    command.env(
        "PGOPTIONS",
        format!("-c lock_timeout={}", app.lock_max.as_millis()),
    );
    if let Some(credentials) = &app.credentials {
        command.env("PGPASSFILE", credentials);
    }
    Client::start(command, &app.run_as)
}

/// Would a checkpoint work, and do all the files lie on what will be frozen? The server's version.
pub(super) fn check(helper: &Helper<'_>) -> Result<String, String> {
    examine(helper, &mut helper.connect()?)
}

fn examine(helper: &Helper<'_>, client: &mut Client) -> Result<String, String> {
    let deadline = by(ASK_TIME_MAX);
    let one = |rows: Vec<String>| rows.into_iter().next().unwrap_or_default();
    // From version 15 on, pg_checkpoint is the right to this; before, only a superuser has it.
    let may = client.ask(
        "SELECT rolsuper OR (current_setting('server_version_num')::int >= 150000 AND EXISTS (SELECT FROM pg_roles AS r WHERE \
         r.rolname = 'pg_checkpoint' AND pg_has_role(current_user, r.oid, 'member'))) FROM pg_roles WHERE rolname = current_user",
        deadline,
    )?;
    if one(may) != "t" {
        let user = &helper.app.user;
        return Err(format!(
            "the user {user} may not make a checkpoint: GRANT pg_checkpoint, pg_read_all_settings TO {user} (before version 15: a superuser)"
        ));
    }
    let unsafe_settings = client.ask(
        &format!("SELECT name FROM pg_settings WHERE name = ANY(string_to_array('{SAFE}', ',')) AND setting <> 'on'"),
        deadline,
    )?;
    if let Some(setting) = unsafe_settings.first() {
        return Err(format!(
            "{setting} is off: what it writes does not survive a crash, nor a snapshot; turn it on"
        ));
    }
    let data_dir = one(client.ask("SHOW data_directory", deadline)?);
    let spaces = "SELECT spcname, pg_tablespace_location(oid) FROM pg_tablespace WHERE pg_tablespace_location(oid) <> ''";
    let spaces = client.ask(spaces, deadline)?;
    let space = |row: &String| {
        let (name, path) = row.split_once('\t')?;
        Some((format!("its tablespace {name}"), PathBuf::from(path)))
    };
    let mut others: Vec<_> = spaces.iter().filter_map(space).collect();
    others.push((
        "its write-ahead log".to_owned(),
        helper.app.data_dir.join("pg_wal"),
    ));
    helper.on_frozen_mounts(&data_dir, &others)?;
    Ok(one(client.ask("SHOW server_version", deadline)?))
}

/// Examines and makes a checkpoint.
pub(super) fn freeze(helper: &Helper<'_>) -> Result<(), String> {
    let mut client = helper.connect()?;
    examine(helper, &mut client)?;
    let began = start_time(&mut client)?;
    // The hooks' own deadline ends one that takes too long.
    client.ask("CHECKPOINT", by(helper.hold_max))?;
    let mark = helper.run_file("frozen")?;
    std::fs::write(&mark, began).map_err(|error| format!("{}: {error}", mark.display()))
}

/// The server still runs, and is the one that was asked to make the checkpoint.
pub(super) fn thaw(helper: &Helper<'_>) -> Result<(), String> {
    let mark = helper.run_file("frozen")?;
    let Ok(before) = std::fs::read_to_string(&mark) else {
        // Its freeze failed: there is nothing to let go on.
        return Ok(());
    };
    std::fs::remove_file(&mark).map_err(|error| format!("{}: {error}", mark.display()))?;
    let now = start_time(&mut helper.connect()?)?;
    if now == before {
        return Ok(());
    }
    Err("the server was restarted while its file system was frozen".to_owned())
}

fn start_time(client: &mut Client) -> Result<String, String> {
    let rows = client.ask("SELECT pg_postmaster_start_time()", by(ASK_TIME_MAX))?;
    rows.into_iter()
        .next()
        .ok_or_else(|| "the server did not say when it was started".to_owned())
}
