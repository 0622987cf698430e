//! What the store reports (events for operators, unit attentions for initiators), and its verbs `stats` and `compact`.

use std::sync::{Arc, Weak};

use serde_json::{Value, json};
use stillpoint_config::Size;
use stillpoint_snapshot::StoreEvent;

use super::Daemon;
use super::control::api::{Refusal, count};
use super::control::{Caller, blocking};
use super::events::{DAEMON, code};

/// Listens to the store until it ends.
///
/// # Errors
/// The thread cannot be started.
pub(crate) fn watch(daemon: &Arc<Daemon>) -> anyhow::Result<()> {
    let reports = daemon.pool.subscribe();
    // The store holds the other end, and the daemon the store: a strong reference would keep all of them for ever.
    let daemon = Arc::downgrade(daemon);
    std::thread::Builder::new()
        .name("store-events".to_owned())
        .spawn(move || {
            while let Ok(report) = reports.recv() {
                let Some(daemon) = Weak::upgrade(&daemon) else {
                    return;
                };
                take(&daemon, report);
            }
        })?;
    Ok(())
}

fn take(daemon: &Daemon, report: StoreEvent) {
    let tell = |code, text: String| daemon.events.emit(code, "store", text, DAEMON);
    match report {
        StoreEvent::Poisoned { reason } => tell(
            code::STORE_POISONED,
            format!("stopped accepting writes: {reason}; restart the daemon to recover"),
        ),
        StoreEvent::OutOfSpace => tell(
            code::STORE_FULL,
            "has no space for new data: delete snapshots or give its file system more room".to_owned(),
        ),
        StoreEvent::BadData { volume, offset } => {
            let volume = volume.and_then(|volume| daemon.pool.volume_by_id(volume)?.name().ok());
            let (subject, lun) = match volume {
                Some(name) => (format!("volume {name}"), name),
                None => ("store".to_owned(), "LUN".to_owned()),
            };
            let text = format!(
                "the data at byte {offset} cannot be had: `stillpoint lun show {lun}` lists all that is bad; write it anew, or take it from a snapshot or a backup"
            );
            daemon.events.emit(code::BAD_DATA, subject, text, DAEMON);
        }
        StoreEvent::BadDataGone { grains } => tell(
            code::BAD_DATA_GONE,
            format!(
                "{} of bad data gone: overwritten, or of no use any more",
                count(grains, "grain")
            ),
        ),
        StoreEvent::ScrubEnded { problems: 0 } => {
            tell(code::SCRUB_CLEAN, "the scrub found nothing wrong".to_owned());
        }
        StoreEvent::ScrubEnded { problems } => tell(
            code::SCRUB_FOUND,
            format!("the scrub found {problems} problems: `stillpoint store scrub --status` lists them"),
        ),
        StoreEvent::SpaceRecovered => tell(code::STORE_SPACE_BACK, "has space again".to_owned()),
        StoreEvent::Threshold {
            percent,
            reached,
            used_bytes,
            available_bytes,
        } => {
            let (used, left) = (Size(used_bytes), Size(available_bytes));
            // Without `max_size` they move with the file system's free space: whoever is told looks them up.
            let room = daemon.pool.room_at_thresholds();
            daemon
                .registry
                .luns()
                .iter()
                .for_each(|lun| lun.set_thin_thresholds(&room));
            if reached {
                tell(
                    code::STORE_FILLS,
                    format!(
                        "is more than {percent}% full ({used} in use, {left} left): delete snapshots or give it more room"
                    ),
                );
                for lun in daemon.registry.luns() {
                    lun.thin_threshold_reached();
                }
            } else {
                tell(
                    code::STORE_EMPTIER,
                    format!("is below {percent}% again ({used} in use, {left} left)"),
                );
            }
        }
        other => tracing::debug!(?other, "store"),
    }
}

/// `store stats`: sizes and counters, and what the metadata would need without sled's garbage.
pub(crate) fn stats(daemon: &Arc<Daemon>) -> Result<Value, Refusal> {
    let internal = |e: serde_json::Error| Refusal::failed("internal", e.to_string(), "report this");
    let mut value = serde_json::to_value(daemon.pool.stats()).map_err(internal)?;
    // A store that has stopped still shows what it knows.
    let live = daemon.pool.metadata_live_bytes().ok();
    if let Some(object) = value.as_object_mut() {
        object.insert("metadata_live_bytes".to_owned(), json!(live));
    }
    Ok(value)
}

/// `store compact`. It goes on when the client leaves.
pub(crate) async fn compact(daemon: &Arc<Daemon>, caller: &Caller) -> Result<Value, Refusal> {
    let (say, mut said) = tokio::sync::mpsc::unbounded_channel();
    let work = blocking(daemon, move |daemon| {
        let report = daemon.pool.compact(|what, bytes| {
            // Nobody listens any more when the client has left.
            drop(say.send(format!("{what} {}", Size(bytes))));
        })?;
        Ok(report)
    });
    tokio::pin!(work);
    let report = loop {
        tokio::select! {
            report = &mut work => break report?,
            Some(text) = said.recv() => caller.progress(text),
        }
    };
    let (before, after) = (Size(report.before_bytes), Size(report.after_bytes));
    daemon.events.emit(
        code::STORE_COMPACTED,
        "store",
        format!("its metadata was compacted from {before} to {after}"),
        &caller.who,
    );
    serde_json::to_value(report).map_err(|e| Refusal::failed("internal", e.to_string(), "report this"))
}
