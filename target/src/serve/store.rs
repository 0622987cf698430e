//! What the store reports: events for operators, unit attentions for initiators.

use std::sync::{Arc, Weak};

use stillpoint_config::Size;
use stillpoint_snapshot::StoreEvent;

use super::Daemon;
use super::control::api::count;
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
