//! `store scrub`: it runs in the store, whoever watches; a client only begins, watches or stops it.

use std::sync::Arc;
use std::time::Duration;

use stillpoint_snapshot::{Pool, ScrubStatus};

use super::api::{BadRange, Refusal, ScrubAction, ScrubView, time_text};
use super::{Caller, blocking};
use crate::serve::Daemon;
use crate::serve::events::code;

/// Bytes per second, unless somebody says otherwise.
const RATE: u64 = 64 << 20;
/// How often a client hears of it.
const LOOK: Duration = Duration::from_millis(500);

pub(super) async fn run(
    daemon: &Arc<Daemon>,
    action: ScrubAction,
    caller: &Caller,
) -> Result<ScrubView, Refusal> {
    let who = caller.who.clone();
    match action {
        ScrubAction::Status => {}
        ScrubAction::Stop => blocking(daemon, |daemon| Ok(daemon.pool.scrub_stop()?)).await?,
        ScrubAction::Run { rate, restart } => {
            blocking(daemon, move |daemon| begin(daemon, rate, restart, &who)).await?;
            watch(daemon, caller).await;
        }
    }
    blocking(daemon, |daemon| view(&daemon.pool)).await
}

fn begin(daemon: &Daemon, rate: Option<u64>, restart: bool, who: &str) -> Result<(), Refusal> {
    let before = daemon.pool.scrub_status().filter(|status| status.running);
    let rate = rate
        .or_else(|| before.as_ref().map(|status| status.rate))
        .unwrap_or(RATE);
    daemon.pool.scrub_start(rate, restart)?;
    if before.is_none() || restart {
        daemon
            .events
            .emit(code::SCRUB_STARTED, "store", "a scrub runs", who);
    }
    Ok(())
}

/// Until it ends, is stopped, or the client leaves.
async fn watch(daemon: &Arc<Daemon>, caller: &Caller) {
    let mut last = String::new();
    loop {
        let Some(status) = daemon.pool.scrub_status().filter(|status| status.running) else {
            return;
        };
        let text = format!("scrub: {} {} %", phase(&status), status.percent);
        if text != last {
            caller.progress(text.clone());
            last = text;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = caller.left() => return,
            () = daemon.shutdown.cancelled() => return,
        }
        if daemon.pool.poisoned().is_some() {
            return;
        }
    }
}

fn phase(status: &ScrubStatus) -> &'static str {
    match status.phase {
        stillpoint_snapshot::ScrubPhase::Records => "records",
        stillpoint_snapshot::ScrubPhase::Map => "map",
        stillpoint_snapshot::ScrubPhase::Data => "data",
        stillpoint_snapshot::ScrubPhase::Done => "done",
    }
}

fn view(pool: &Pool) -> Result<ScrubView, Refusal> {
    let status = pool.scrub_status();
    let state = match &status {
        None => "never",
        Some(status) if status.running => "running",
        Some(status) if status.ended_ms.is_some() => "done",
        Some(_) => "stopped",
    };
    let known = status.is_some();
    let status = status.unwrap_or_default();
    let grain = u64::from(pool.stats().grain_bytes);
    Ok(ScrubView {
        state: state.to_owned(),
        phase: status.phase,
        percent: status.percent,
        started_at: known.then(|| time_text(status.started_ms)),
        ended_at: status.ended_ms.map(time_text),
        rate_bytes: status.rate,
        txg: status.txg,
        records: status.records,
        page_versions: status.page_versions,
        verified_bytes: status.grains_verified * grain,
        unverified_bytes: status.grains_without * grain,
        problem_count: status.problem_count,
        problems: status.problems.into_iter().map(|problem| problem.text).collect(),
        bad_data: BadRange::list(pool, None)?,
    })
}
