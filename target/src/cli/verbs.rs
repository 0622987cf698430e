//! What each verb asks of the daemon, and how its answer is shown.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use serde_json::{Value, json};
use stillpoint_config::Consistency;

use super::args::{
    AgentVerb, CloneVerb, ConfigVerb, Events, GenerationVerb, Global, LunVerb, SessionVerb, SnapshotVerb,
    StoreVerb, TokenVerb, Verb, VolumeVerb,
};
use super::show::{Column, Kind, details, local_time, table};
use super::{client, confirm, err, offline, out, out_json, print, trace};
use crate::serve::control::api::{self, Event, Refusal, Request, SnapshotRef};

pub(crate) fn run(global: &Global, verb: Verb) -> Result<(), Refusal> {
    match verb {
        Verb::Status => print(global, &ask(global, &Request::Status {})?, status),
        Verb::Config(verb) => config(global, verb),
        Verb::Lun(LunVerb::List) => list(global, &Request::LunList {}, "LUNs", LUNS),
        Verb::Lun(LunVerb::Show { lun }) => show(global, &Request::LunShow { lun }),
        Verb::Lun(LunVerb::Preflight { lun, consistency }) => preflight(global, lun, consistency),
        Verb::Volume(verb) => volume(global, verb),
        Verb::Session(SessionVerb::List) => list(global, &Request::SessionList {}, "sessions", SESSIONS),
        Verb::Session(SessionVerb::Drop { id }) => show(global, &Request::SessionDrop { id }),
        Verb::Snapshot(verb) => snapshot(global, verb),
        Verb::Clone(CloneVerb::Create { snapshot, new }) => {
            show(global, &Request::CloneCreate { snapshot, new })
        }
        Verb::Agent(verb) => agent(global, verb),
        Verb::Store(verb) => store(global, verb),
        Verb::Events(options) => events(global, &options),
        Verb::Trace(options) => trace::run(global, &options),
        // Handled before a daemon is asked.
        Verb::Serve(_) | Verb::Generate(_) => Ok(()),
    }
}

const LUNS: &[Column] = &[
    Column("NAME", "name", Kind::Text),
    Column("SIZE", "size_bytes", Kind::Bytes),
    Column("USED", "used_bytes", Kind::Bytes),
    Column("BLOCK", "block_size", Kind::Number),
    Column("LUN", "targets.0.lun", Kind::Number),
    Column("TARGET", "targets.0.iqn", Kind::Text),
    Column("SESSIONS", "sessions", Kind::Number),
    Column("SNAPSHOTS", "snapshots", Kind::Number),
    Column("KIND", "kind", Kind::Text),
    Column("OF", "source", Kind::Text),
    Column("FOR", "owner", Kind::Text),
    Column("MADE", "age_seconds", Kind::Ago),
];
const VOLUMES: &[Column] = &[
    Column("NAME", "name", Kind::Text),
    Column("STATE", "state", Kind::Text),
    Column("KIND", "kind", Kind::Text),
    Column("SIZE", "size_bytes", Kind::Bytes),
    Column("USED", "used_bytes", Kind::Bytes),
    Column("SNAPSHOTS", "snapshots", Kind::Number),
    Column("MADE OF", "origin", Kind::Text),
    Column("CREATED", "created_at", Kind::Time),
];
const SESSIONS: &[Column] = &[
    Column("ID", "id", Kind::Number),
    Column("INITIATOR", "initiator", Kind::Text),
    Column("IS", "fingerprint", Kind::Text),
    Column("FROM", "peer", Kind::Text),
    Column("TARGET", "target", Kind::Text),
    Column("LUNS", "luns", Kind::List),
    Column("STATE", "state", Kind::Text),
    Column("READ", "read_bytes", Kind::Bytes),
    Column("WRITTEN", "written_bytes", Kind::Bytes),
    Column("SINCE", "since", Kind::Time),
];
const SNAPSHOTS: &[Column] = &[
    Column("LUN", "lun", Kind::Text),
    Column("NAME", "name", Kind::Text),
    Column("CONSISTENCY", "consistency", Kind::Text),
    Column("CREATED", "created_at", Kind::Time),
    Column("SIZE", "size_bytes", Kind::Bytes),
    Column("REFERENCED", "referenced_bytes", Kind::Bytes),
    Column("UNIQUE", "unique_bytes", Kind::Bytes),
    Column("HELD", "hold", Kind::Flag),
    Column("LOCKED UNTIL", "locked_until", Kind::Time),
    Column("USED BY", "used_by", Kind::List),
    Column("NOTE", "note", Kind::Text),
];
const CREATED: &[Column] = &[
    Column("LUN", "lun", Kind::Text),
    Column("NAME", "name", Kind::Text),
    Column("CONSISTENCY", "consistency", Kind::Text),
    Column("ASKED", "requested", Kind::Text),
    Column("CUT MS", "cut_ms", Kind::Number),
];
const DOCUMENTS: &[Column] = &[
    Column("KIND", "kind", Kind::Text),
    Column("SIZE", "size_bytes", Kind::Bytes),
    Column("AGENT", "agent", Kind::Text),
    Column("SHA-256", "sha256", Kind::Text),
];
const DELETED: &[Column] = &[
    Column("LUN", "lun", Kind::Text),
    Column("NAME", "name", Kind::Text),
    Column("DELETED", "deleted", Kind::Flag),
    Column("KEPT BY CLONES", "kept_by_clones", Kind::List),
];
const EXTENTS: &[Column] = &[
    Column("OFFSET", "offset_bytes", Kind::Number),
    Column("LENGTH", "length_bytes", Kind::Number),
    Column("KIND", "kind", Kind::Text),
];
const CHANGES: &[Column] = &[
    Column("WHAT", "subject", Kind::Text),
    Column("SESSIONS", "effect", Kind::Text),
    Column("CHANGE", "text", Kind::Text),
];
const AGENTS: &[Column] = &[
    Column("ID", "id", Kind::Text),
    Column("HOST", "host", Kind::Text),
    Column("STATE", "state", Kind::Text),
    Column("VERSION", "version", Kind::Text),
    Column("LUNS", "luns", Kind::List),
    Column("HEARTBEAT", "last_heartbeat_seconds", Kind::Ago),
    Column("TROUBLE", "trouble", Kind::Text),
];

const FINDINGS: &[Column] = &[
    Column("SEVERITY", "severity", Kind::Text),
    Column("CODE", "code", Kind::Text),
    Column("HOST", "host", Kind::Text),
    Column("SUBJECT", "subject", Kind::Text),
    Column("TROUBLE AND WAY OUT", "text", Kind::Text),
];
const WITNESSES: &[Column] = &[
    Column("AGENT", "id", Kind::Text),
    Column("HOST", "host", Kind::Text),
    Column("REACHED", "reached", Kind::Flag),
    Column("ROLE", "role", Kind::Text),
];
const SPOKEN_FOR: &[Column] = &[
    Column("SESSION OF", "initiator", Kind::Text),
    Column("AGENT", "agent", Kind::Text),
    Column("HOST", "host", Kind::Text),
];

/// Asks without events; progress goes to standard error, where it does not disturb `--json`.
fn ask(global: &Global, request: &Request) -> Result<Value, Refusal> {
    let show_progress = !global.quiet && !global.json;
    client::ask(
        global,
        request,
        |text| {
            if show_progress {
                err(&format!("{text}\n"))
            }
        },
        |_| Ok(()),
    )
}

fn show(global: &Global, request: &Request) -> Result<(), Refusal> {
    print(global, &ask(global, request)?, details)
}

fn list(global: &Global, request: &Request, noun: &str, columns: &[Column]) -> Result<(), Refusal> {
    let value = ask(global, request)?;
    if !global.json && !global.quiet && value.as_array().is_some_and(Vec::is_empty) {
        err(&format!("no {noun}\n"));
        return Ok(());
    }
    print(global, &value, |value| rows(value, columns))
}

/// Exit code 3 when a snapshot would be refused: for monitoring.
fn preflight(global: &Global, lun: String, consistency: Consistency) -> Result<(), Refusal> {
    let value = ask(global, &Request::LunPreflight { lun, consistency })?;
    let is_ready = value.get("ready").and_then(Value::as_bool) == Some(true);
    print(global, &value, readiness)?;
    if is_ready {
        return Ok(());
    }
    Err(Refusal::refused(super::ALREADY_TOLD, "it would be refused", ""))
}

fn readiness(value: &Value) -> String {
    let text = |key| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let (lun, level) = (text("lun"), text("consistency"));
    let is_ready = value.get("ready").and_then(Value::as_bool) == Some(true);
    let mut out = if is_ready {
        format!("{lun}: ready for a snapshot with --consistency {level}\n")
    } else {
        format!("{lun}: a snapshot with --consistency {level} would be refused\n")
    };
    for (noun, columns) in [
        ("findings", FINDINGS),
        ("agents", WITNESSES),
        ("sessions", SPOKEN_FOR),
    ] {
        let list = value.get(noun).unwrap_or(&Value::Null);
        if list.as_array().is_some_and(|list| !list.is_empty()) {
            out.push('\n');
            out.push_str(&rows(list, columns));
        }
    }
    out
}

fn rows(value: &Value, columns: &[Column]) -> String {
    table(value.as_array().map_or(&[], Vec::as_slice), columns)
}

fn status(value: &Value) -> String {
    let mut value = value.clone();
    let warnings = value.as_object_mut().and_then(|object| object.remove("warnings"));
    let mut text = details(&value);
    for warning in warnings.as_ref().and_then(Value::as_array).into_iter().flatten() {
        text.push_str(&format!("warning: {}\n", warning.as_str().unwrap_or_default()));
    }
    text
}

fn config(global: &Global, verb: ConfigVerb) -> Result<(), Refusal> {
    match verb {
        ConfigVerb::Check { file } => offline::config_check(global, file),
        ConfigVerb::Plan => {
            let value = ask(global, &Request::ConfigPlan {})?;
            print(global, &value, plan)?;
            refused_changes(&value)
        }
        ConfigVerb::Apply => {
            let value = match ask(
                global,
                &Request::ConfigApply {
                    confirmed: global.yes,
                },
            ) {
                Err(refusal) if refusal.code == api::CONFIRMATION && std::io::stdin().is_terminal() => {
                    err(&format!("{refusal}\n"));
                    for detail in &refusal.details {
                        err(&format!("  {detail}\n"));
                    }
                    confirm(global, "Apply it?")?;
                    ask(global, &Request::ConfigApply { confirmed: true })?
                }
                Err(refusal) if refusal.exit == api::EXIT_UNREACHABLE => {
                    return print(global, &offline::config_apply(global, refusal)?, details);
                }
                answer => answer?,
            };
            print(global, &value, plan)
        }
    }
}

fn plan(value: &Value) -> String {
    let mut text = match value.get("changes") {
        Some(changes) if changes.as_array().is_some_and(|c| !c.is_empty()) => rows(changes, CHANGES),
        _ => "nothing changes\n".to_owned(),
    };
    let list = |key: &str| value.get(key).and_then(Value::as_array).into_iter().flatten();
    for change in list("changes") {
        for session in change
            .get("ends_sessions")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let word = |key: &str| {
                session
                    .get(key)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            text.push_str(&format!(
                "ends session {} of {} from {}\n",
                session["id"],
                word("initiator"),
                word("peer")
            ));
        }
    }
    for (key, label) in [
        ("unassigned_volumes", "unassigned volume"),
        ("warnings", "warning"),
        ("unserved", "not served yet"),
    ] {
        for item in list(key) {
            text.push_str(&format!("{label}: {}\n", item.as_str().unwrap_or_default()));
        }
    }
    text
}

/// A plan that cannot be applied ends with the code of a refusal, for scripts that only look at that.
fn refused_changes(value: &Value) -> Result<(), Refusal> {
    let changes = value
        .get("changes")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let refused: Vec<String> = changes
        .filter(|change| change["effect"] == "refused")
        .map(|change| {
            format!(
                "{}: {}",
                change["subject"].as_str().unwrap_or_default(),
                change["text"].as_str().unwrap_or_default()
            )
        })
        .collect();
    if refused.is_empty() {
        return Ok(());
    }
    Err(Refusal::refused(
        "config_refused",
        "this cannot be applied to a running daemon:",
        "nothing of the file is applied until that is solved",
    )
    .with_details(refused))
}

fn volume(global: &Global, verb: VolumeVerb) -> Result<(), Refusal> {
    match verb {
        VolumeVerb::List => list(global, &Request::VolumeList {}, "volumes", VOLUMES),
        VolumeVerb::Rename { old, new } => {
            let value = match ask(
                global,
                &Request::VolumeRename {
                    old: old.clone(),
                    new: new.clone(),
                },
            ) {
                Err(refusal) if refusal.exit == api::EXIT_UNREACHABLE => {
                    offline::volume_rename(global, &old, &new, refusal)?
                }
                answer => answer?,
            };
            print(global, &value, details)
        }
        VolumeVerb::Delete { name } => {
            confirm(
                global,
                &format!("Delete volume {name} with all its data and snapshots?"),
            )?;
            show(global, &Request::VolumeDelete { name })
        }
    }
}

/// `snapshot documents`: a table, or one document as it is.
fn documents(
    global: &Global,
    snapshot: SnapshotRef,
    kind: Option<String>,
    agent: Option<String>,
    out: Option<&std::path::Path>,
) -> Result<(), Refusal> {
    let is_list = kind.is_none();
    let request = Request::SnapshotDocuments {
        snapshot,
        kind,
        agent,
    };
    if is_list {
        return list(global, &request, "documents", DOCUMENTS);
    }
    let value = ask(global, &request)?;
    if global.json && out.is_none() {
        return print(global, &value, details);
    }
    let broken = |error: String| Refusal::failed("document", error, "report this");
    let content = value
        .get("content_base64")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let bytes = data_encoding::BASE64
        .decode(content.as_bytes())
        .map_err(|error| broken(error.to_string()))?;
    let written = match out {
        Some(path) => std::fs::write(path, &bytes).map_err(|error| format!("{}: {error}", path.display())),
        None => std::io::stdout()
            .write_all(&bytes)
            .map_err(|error| error.to_string()),
    };
    written.map_err(|error| {
        Refusal::failed(
            "io",
            format!("the document cannot be written: {error}"),
            "choose another --out",
        )
    })
}

/// `snapshot create`.
fn take(global: &Global, create: super::args::SnapshotCreate) -> Result<(), Refusal> {
    let request = Request::SnapshotCreate(api::SnapshotCreate {
        luns: create.luns,
        name: create.name,
        consistency: create.consistency,
        on_failure: create.on_failure,
        lock_seconds: create.lock.as_ref().map(Duration::as_secs),
        note: create.note,
    });
    let value = ask(global, &request)?;
    print(global, &value, |value| match value {
        Value::Array(_) => rows(value, CREATED),
        one => rows(&json!([one]), CREATED),
    })
}

fn snapshot(global: &Global, verb: SnapshotVerb) -> Result<(), Refusal> {
    match verb {
        SnapshotVerb::Create(create) => take(global, create),
        SnapshotVerb::List { lun } => list(global, &Request::SnapshotList { lun }, "snapshots", SNAPSHOTS),
        SnapshotVerb::Show { snapshot } => show(global, &Request::SnapshotShow { snapshot }),
        SnapshotVerb::Documents {
            snapshot,
            kind,
            agent,
            out,
        } => documents(global, snapshot, kind, agent, out.as_deref()),
        SnapshotVerb::Delete {
            snapshots,
            plan: true,
        } => show(
            global,
            &Request::SnapshotDelete {
                snapshots,
                plan: true,
            },
        ),
        SnapshotVerb::Delete {
            snapshots,
            plan: false,
        } => {
            let names: Vec<String> = snapshots.iter().map(ToString::to_string).collect();
            confirm(global, &format!("Delete snapshot {}?", names.join(", ")))?;
            let value = ask(
                global,
                &Request::SnapshotDelete {
                    snapshots,
                    plan: false,
                },
            )?;
            print(global, &value, |value| match value {
                Value::Array(_) => rows(value, DELETED),
                one => details(one),
            })
        }
        SnapshotVerb::Hold { snapshot } => show(global, &Request::SnapshotHold { snapshot, hold: true }),
        SnapshotVerb::Release { snapshot } => show(
            global,
            &Request::SnapshotHold {
                snapshot,
                hold: false,
            },
        ),
        SnapshotVerb::Diff { from, to } => {
            let value = ask(global, &Request::SnapshotDiff { from, to })?;
            print(global, &value, |value| {
                let changed = value["changed_bytes"].as_u64().unwrap_or(0);
                format!(
                    "{}changed: {}\n",
                    rows(&value["extents"], EXTENTS),
                    stillpoint_config::Size(changed)
                )
            })
        }
        SnapshotVerb::Revert {
            snapshot,
            force,
            power_off,
            plan,
        } => revert(global, snapshot, (force, power_off), plan),
        SnapshotVerb::Mount {
            snapshot,
            read_only,
            initiator,
        } => show(
            global,
            &Request::SnapshotMount {
                snapshot,
                read_only,
                initiators: initiator,
            },
        ),
        SnapshotVerb::Unmount { name, force } => unmount(global, name, force),
    }
}

fn unmount(global: &Global, name: String, force: bool) -> Result<(), Refusal> {
    let question = format!("Unmount {name}? What was written to it is gone then.");
    confirm(global, &question)?;
    show(global, &Request::SnapshotUnmount { name, force })
}

/// Shows the plan before it asks: what is lost, and whose sessions end.
fn revert(
    global: &Global,
    snapshot: SnapshotRef,
    (force, power_off): (bool, bool),
    plan: bool,
) -> Result<(), Refusal> {
    if plan {
        return show(
            global,
            &Request::SnapshotRevert {
                snapshot,
                force,
                power_off,
                plan: true,
            },
        );
    }
    if !global.yes {
        if std::io::stdin().is_terminal() {
            err(&details(&ask(
                global,
                &Request::SnapshotRevert {
                    snapshot: snapshot.clone(),
                    force,
                    power_off,
                    plan: true,
                },
            )?));
        }
        confirm(global, &format!("Revert {} to {snapshot}?", snapshot.lun))?;
    }
    show(
        global,
        &Request::SnapshotRevert {
            snapshot,
            force,
            power_off,
            plan: false,
        },
    )
}

fn agent(global: &Global, verb: AgentVerb) -> Result<(), Refusal> {
    match verb {
        AgentVerb::Token(TokenVerb::Create { luns, ttl }) => {
            let value = ask(
                global,
                &Request::AgentTokenCreate {
                    luns,
                    ttl_seconds: ttl.as_secs(),
                },
            )?;
            print(global, &value, details)
        }
        AgentVerb::Generation(GenerationVerb::Bump) => show(global, &Request::AgentGenerationBump {}),
        AgentVerb::List => list(global, &Request::AgentList {}, "agents", AGENTS),
        AgentVerb::Show { id } => show(global, &Request::AgentShow { id }),
        AgentVerb::Test { id } => show(global, &Request::AgentTest { id }),
        AgentVerb::Allow { id, lun } => show(global, &Request::AgentAllow { id, lun }),
        AgentVerb::Approve { id } => show(global, &Request::AgentApprove { id }),
        AgentVerb::Revoke { id } => {
            confirm(
                global,
                &format!("Revoke agent {id}? It must enrol again to take part in snapshots."),
            )?;
            show(global, &Request::AgentRevoke { id })
        }
    }
}

fn store(global: &Global, verb: StoreVerb) -> Result<(), Refusal> {
    match verb {
        StoreVerb::Stats => show(global, &Request::StoreStats {}),
        StoreVerb::Compact => show(global, &Request::StoreCompact {}),
        StoreVerb::Scrub {
            rate,
            restart,
            status,
            stop,
        } => scrub(
            global,
            match (status, stop) {
                (true, _) => api::ScrubAction::Status,
                (_, true) => api::ScrubAction::Stop,
                _ => api::ScrubAction::Run {
                    rate: rate.map(stillpoint_config::Size::bytes),
                    restart,
                },
            },
        ),
        StoreVerb::Check { data, data_dir } => offline::store_check(global, data_dir, data),
        StoreVerb::Repair {
            plan,
            accept_lost_commits,
            accept_lost_jobs,
            data_dir,
        } => {
            let options = stillpoint_snapshot::RepairOptions {
                plan,
                accept_lost_commits,
                accept_lost_jobs,
            };
            offline::store_repair(global, data_dir, options)
        }
        StoreVerb::Dump { data_dir, out } => offline::store_dump(global, data_dir, out),
        StoreVerb::Restore { file, data_dir } => offline::store_restore(global, data_dir, &file),
    }
}

/// Prints what a scrub found; finding something is a failure.
fn scrub(global: &Global, action: api::ScrubAction) -> Result<(), Refusal> {
    let value = ask(global, &Request::StoreScrub { action })?;
    print(global, &value, details)?;
    match value.get("problem_count").and_then(Value::as_u64) {
        None | Some(0) => Ok(()),
        Some(n) => Err(Refusal::failed(
            "store_damaged",
            format!(
                "the scrub found {}",
                api::count(usize::try_from(n).unwrap_or(usize::MAX), "problem")
            ),
            "write bad data anew, or take it from a snapshot or a backup; for the rest stop the daemon and `stillpoint store check`",
        )),
    }
}

fn events(global: &Global, options: &Events) -> Result<(), Refusal> {
    let request = Request::Events {
        follow: options.follow,
        newest: options.newest,
    };
    if !options.follow {
        let value = ask(global, &request)?;
        if global.json {
            return out_json(&value);
        }
        for event in value.as_array().into_iter().flatten() {
            if let Ok(event) = serde_json::from_value(event.clone()) {
                out(&event_line(&event));
            }
        }
        return Ok(());
    }
    // One line per event, so that a reader need not wait for the end of a list that has none.
    let show = |streamed| {
        let client::Streamed::Event(event) = streamed else {
            return Ok(());
        };
        let line = if global.json {
            format!("{}\n", serde_json::to_string(&event)?)
        } else {
            event_line(&event)
        };
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(line.as_bytes())?;
        stdout.flush()
    };
    client::ask(global, &request, |_| {}, show).map(drop)
}

fn event_line(event: &Event) -> String {
    let severity = match event.severity {
        api::Severity::Info => "info",
        api::Severity::Warning => "warning",
        api::Severity::Error => "error",
    };
    let line = format!(
        "{}  {}  {severity:7}  {}: {}",
        local_time(&event.time),
        event.code,
        event.subject,
        event.text
    );
    let line: String = line
        .chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect();
    if event.who == crate::serve::events::DAEMON {
        format!("{line}\n")
    } else {
        format!("{line} (by {})\n", event.who)
    }
}
