//! VM snapshots around a snapshot of the LUN: made in Prepare, removed after it, and only ours (by name AND reference).
//!
//! ```text
//! journal: which VMs ─▶ CreateSnapshot_Task … (≤ 4 on a host) ─▶ journal: what was made ═══ LUN snapshot ═══▶ RemoveSnapshot_Task … ─▶ no journal
//! ```
//! A crash anywhere leaves the journal: the next start removes what it names. A name has the session's UUID in it, so that one which
//! was made without its reference being noted is known all the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::inventory::{Machine, machines};
use super::settings::VmMode;
use super::soap::{Ref, Soap, SoapError, fault};
use super::vim::Ended;
use super::xml::escape;

/// Tasks of one host at a time: a snapshot stuns its VM, and hosts do not like many at once.
const PER_HOST_MAX: usize = 4;
/// All snapshots of a session: Prepare may take 900 s (agent-protocol.md §5).
const CREATE_TIME_MAX: Duration = Duration::from_secs(840);
/// Removing consolidates disks, which takes long under load.
const REMOVE_TIME_MAX: Duration = Duration::from_secs(840);
/// How often a call without an answer is looked after, and how long between.
const LOOKS: usize = 5;
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Names of the snapshots begin with this.
pub(crate) const PREFIX: &str = "stillpoint-";

/// One VM of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    /// The VM.
    pub(crate) machine: Ref,
    /// Its name.
    pub(crate) name: String,
    /// Its snapshot, once it is known.
    pub(crate) snapshot: Option<Ref>,
}

/// What a session made, or is about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Journal {
    /// The session.
    pub(crate) session: String,
    /// Its VMs.
    pub(crate) members: Vec<Member>,
    #[serde(skip)]
    path: PathBuf,
}

/// The name of a session's snapshots.
pub(crate) fn name_of(session: &str) -> String {
    format!("{PREFIX}{session}")
}

impl Journal {
    /// Notes what is about to be made. Nothing is made before this is on disk.
    pub(crate) fn begin(dir: &Path, session: &str, machines: &[Machine]) -> std::io::Result<Self> {
        super::files::make_dir(dir)?;
        let member = |machine: &Machine| Member {
            machine: machine.this.clone(),
            name: machine.name.clone(),
            snapshot: None,
        };
        let journal = Self {
            session: session.to_owned(),
            members: machines.iter().map(member).collect(),
            path: dir.join(format!("snapshots-{session}.json")),
        };
        journal.write()?;
        Ok(journal)
    }

    /// What earlier sessions left behind. A file that cannot be read is named, and left for somebody to look at.
    pub(crate) fn all(dir: &Path) -> Vec<Self> {
        let mut found = Vec::new();
        for path in files(dir, "snapshots-") {
            let read = std::fs::read(&path).map_err(|error| error.to_string());
            let parsed = read
                .and_then(|bytes| serde_json::from_slice::<Self>(&bytes).map_err(|error| error.to_string()));
            match parsed {
                Ok(journal) => found.push(Self { path, ..journal }),
                Err(error) => {
                    tracing::error!(path = %path.display(), error, "a journal of VM snapshots cannot be read: look for {PREFIX}* by hand")
                }
            }
        }
        found
    }

    fn write(&self) -> std::io::Result<()> {
        super::files::replace(&self.path, &serde_json::to_vec_pretty(self)?)
    }

    fn note(&mut self, machine: &Ref, snapshot: Ref) {
        if let Some(member) = self.members.iter_mut().find(|member| member.machine == *machine) {
            member.snapshot = Some(snapshot);
        }
        // What is made already is known by its name, too.
        if let Err(error) = self.write() {
            tracing::warn!(%error, "the journal of VM snapshots cannot be written");
        }
    }

    fn close(&self) -> std::io::Result<()> {
        super::files::remove(&self.path)
    }
}

/// Files of a directory that begin so.
pub(crate) fn files(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            name.starts_with(prefix) && name.ends_with(".json")
        })
        .collect();
    paths.sort();
    paths
}

/// One VM to take a snapshot of.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The VM.
    pub(crate) machine: Machine,
    /// How.
    pub(crate) mode: VmMode,
}

/// What was done with a VM.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    /// The VM.
    pub(crate) machine: Ref,
    /// How it came to be consistent: `quiesced`, `memory`, `powered off`, `plain`; or why it is not.
    pub(crate) how: Result<&'static str, String>,
}

/// A task that has to be done for a VM, at most [`PER_HOST_MAX`] at once on its host.
struct Job {
    machine: Ref,
    host: Option<Ref>,
    method: &'static str,
    this: Ref,
    args: String,
}

/// Runs jobs, and tells each end as it comes.
async fn run_all(soap: &mut Soap, mut jobs: Vec<Job>, limit: Duration) -> Vec<(Ref, Ended)> {
    let deadline = Instant::now() + limit;
    let mut running: BTreeMap<Ref, (Ref, Option<Ref>)> = BTreeMap::new();
    let mut ends = Vec::new();
    while !jobs.is_empty() || !running.is_empty() {
        let busy = |running: &BTreeMap<Ref, (Ref, Option<Ref>)>, host: &Option<Ref>| {
            running.values().filter(|(_, on)| on == host).count() >= PER_HOST_MAX
        };
        let mut waiting = Vec::new();
        for job in std::mem::take(&mut jobs) {
            if busy(&running, &job.host) {
                waiting.push(job);
                continue;
            }
            match soap.start(job.method, &job.this, &job.args).await {
                Ok(task) => {
                    running.insert(task, (job.machine, job.host));
                }
                Err(error) => ends.push((job.machine, Err(error))),
            }
        }
        jobs = waiting;
        let tasks: Vec<Ref> = running.keys().cloned().collect();
        match soap.wait_any(&tasks).await {
            Ok(done) => {
                for (task, end) in done {
                    if let Some((machine, _)) = running.remove(&task) {
                        ends.push((machine, end));
                    }
                }
            }
            Err(error) if Instant::now() >= deadline || !error.is_unknown() => {
                ends.extend(
                    std::mem::take(&mut running)
                        .into_values()
                        .map(|(machine, _)| (machine, Err(error.clone()))),
                );
            }
            Err(error) => tracing::debug!(%error, "asked again"),
        }
        if Instant::now() >= deadline {
            let late = || {
                fault(
                    "the task",
                    "Timedout",
                    &format!("not done within {} s", limit.as_secs()),
                )
            };
            for task in running.keys() {
                if let Err(error) = soap.call("CancelTask", task, "").await {
                    tracing::debug!(%error, "a task cannot be cancelled");
                }
            }
            ends.extend(
                std::mem::take(&mut running)
                    .into_values()
                    .map(|(machine, _)| (machine, Err(late()))),
            );
            ends.extend(
                std::mem::take(&mut jobs)
                    .into_iter()
                    .map(|job| (job.machine, Err(late()))),
            );
        }
    }
    ends
}

fn create_args(name: &str, memory: bool, quiesce: bool) -> String {
    format!(
        "<name>{}</name><description>made by Stillpoint for a snapshot of the LUN; it is removed afterwards</description>\
         <memory>{memory}</memory><quiesce>{quiesce}</quiesce>",
        escape(name)
    )
}

/// Takes a snapshot of each VM. The journal must name them all.
pub(crate) async fn create(soap: &mut Soap, journal: &mut Journal, wanted: &[Wanted]) -> Vec<Made> {
    let name = name_of(&journal.session);
    let deadline = Instant::now() + CREATE_TIME_MAX;
    let mut made = Vec::new();
    let mut round: Vec<(Wanted, bool)> = wanted.iter().map(|one| (one.clone(), false)).collect();
    while !round.is_empty() {
        let job = |(one, again): &(Wanted, bool)| {
            let machine = &one.machine;
            let memory =
                machine.powered_on && (one.mode == VmMode::Memory || (one.mode == VmMode::Both && *again));
            let quiesce = machine.powered_on && !memory && matches!(one.mode, VmMode::Quiesce | VmMode::Both);
            Job {
                machine: machine.this.clone(),
                host: machine.host.clone(),
                method: "CreateSnapshot_Task",
                this: machine.this.clone(),
                args: create_args(&name, memory, quiesce),
            }
        };
        let jobs = round.iter().map(job).collect();
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ends: BTreeMap<Ref, Ended> = run_all(soap, jobs, left).await.into_iter().collect();
        let mut again = Vec::new();
        for (one, second) in round {
            let end = ends
                .remove(&one.machine.this)
                .unwrap_or_else(|| Err(fault("CreateSnapshot_Task", "no end", "")));
            let end = settle(soap, &one.machine.this, &name, end).await;
            match end {
                Ok(snapshot) => {
                    journal.note(&one.machine.this, snapshot);
                    let how = match (one.machine.powered_on, one.mode, second) {
                        (false, ..) => "powered off",
                        (true, VmMode::Plain, _) => "plain",
                        (true, VmMode::Memory, _) | (true, VmMode::Both, true) => "memory",
                        (true, VmMode::Quiesce, _) | (true, VmMode::Both, false) => "quiesced",
                    };
                    made.push(Made {
                        machine: one.machine.this,
                        how: Ok(how),
                    });
                }
                Err(error) if one.mode == VmMode::Both && !second && one.machine.powered_on => {
                    tracing::info!(vm = one.machine.name, %error, "cannot be quiesced: its memory is taken instead");
                    again.push((one, true));
                }
                Err(error) => made.push(Made {
                    machine: one.machine.this,
                    how: Err(error.to_string()),
                }),
            }
        }
        round = again;
    }
    made
}

/// The snapshot that a call made. One whose answer was lost may have made it: look, for a while.
async fn settle(soap: &mut Soap, machine: &Ref, name: &str, end: Ended) -> Result<Ref, SoapError> {
    let unknown = match &end {
        Ok(Some(snapshot)) => return Ok(snapshot.clone()),
        Ok(None) => true,
        Err(error) => error.is_unknown(),
    };
    for look in 0..LOOKS {
        if !unknown {
            break;
        }
        if look > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        if let Ok(found) = machines(soap, std::slice::from_ref(machine)).await {
            let snapshots = found.iter().flat_map(|machine| &machine.snapshots);
            if let Some(snapshot) = snapshots.into_iter().find(|snapshot| snapshot.name == name) {
                return Ok(snapshot.this.clone());
            }
        }
    }
    match end {
        Err(error) => Err(error),
        Ok(_) => Err(fault(
            "CreateSnapshot_Task",
            "NotFound",
            "the snapshot is not there",
        )),
    }
}

/// Removes what the journal names, and then the journal. What could not be removed stays in it.
pub(crate) async fn remove(soap: &mut Soap, mut journal: Journal) -> Result<(), String> {
    let name = name_of(&journal.session);
    let mut failed = Vec::new();
    // Twice: the first round may have lost answers, the second sees what is really there.
    for _ in 0..2 {
        failed.clear();
        let vms: Vec<Ref> = journal
            .members
            .iter()
            .map(|member| member.machine.clone())
            .collect();
        let found = match machines(soap, &vms).await {
            Ok(found) => found,
            Err(error) => return Err(format!("VM snapshots {name} could not be looked for: {error}")),
        };
        let mut jobs = Vec::new();
        for machine in &found {
            let member = journal
                .members
                .iter()
                .find(|member| member.machine == machine.this);
            let noted = member.and_then(|member| member.snapshot.as_ref());
            // Ours is what has our name, and the reference that we noted if we noted one.
            let ours = machine.snapshots.iter().filter(|snapshot| {
                snapshot.name == name && noted.is_none_or(|noted| *noted == snapshot.this)
            });
            jobs.extend(ours.map(|snapshot| Job {
                machine: machine.this.clone(),
                host: machine.host.clone(),
                method: "RemoveSnapshot_Task",
                this: snapshot.this.clone(),
                args: "<removeChildren>false</removeChildren><consolidate>true</consolidate>".to_owned(),
            }));
        }
        if jobs.is_empty() {
            break;
        }
        for (machine, end) in run_all(soap, jobs, REMOVE_TIME_MAX).await {
            if let Err(error) = end {
                let vm = found
                    .iter()
                    .find(|found| found.this == machine)
                    .map_or("a VM", |found| &found.name);
                failed.push((machine, format!("{vm}: {error}")));
            }
        }
        if failed.is_empty() {
            break;
        }
    }
    if failed.is_empty() {
        return journal
            .close()
            .map_err(|error| format!("the journal of VM snapshots cannot be removed: {error}"));
    }
    journal
        .members
        .retain(|member| failed.iter().any(|(machine, _)| *machine == member.machine));
    if let Err(error) = journal.write() {
        tracing::warn!(%error, "the journal of VM snapshots cannot be written");
    }
    let texts: Vec<String> = failed.into_iter().map(|(_, text)| text).collect();
    Err(format!(
        "VM snapshots {name} are left behind: {}",
        texts.join("; ")
    ))
}
