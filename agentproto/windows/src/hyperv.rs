//! Hyper-V: a checkpoint **with memory** of each VM on the LUN, made before the cut and removed after it, where the operator chose
//! that (`[hyperv] checkpoints = "memory"`). Without it, the Hyper-V VSS writer makes production checkpoints inside the guests.
//!
//! All through PowerShell's module `Hyper-V`: constant scripts, their values in the environment, JSON back. What was made is written down
//! before it is made, so that a service that died removes it at its next start, and nothing but ours.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use stillpoint_agentproto::message::{App, AppState, Exclusion, ExclusionKind};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal};

use crate::volumes::Inventory;

/// A VM with much memory takes its time; Prepare has 120 s for all of them.
const CHECKPOINT_TIME_MAX: Duration = Duration::from_secs(100);
/// For a list, or a removal (the merge goes on in the background).
const CALL_TIME_MAX: Duration = Duration::from_secs(60);
/// More VMs than a host runs.
const VMS_MAX: usize = 256;
/// Output of PowerShell that is looked at, in bytes.
const OUTPUT_MAX: u64 = 1024 * 1024;

const LIST: &str = "$ErrorActionPreference='Stop'; ConvertTo-Json -Depth 4 -InputObject @(Get-VM | ForEach-Object { \
    @{ id=\"$($_.Id)\"; name=$_.Name; state=\"$($_.State)\"; \
    paths=@($_.ConfigurationLocation; $_.SnapshotFileLocation; $_.HardDrives | ForEach-Object { $_.Path }) } })";
const MAKE: &str = "$ErrorActionPreference='Stop'; $vm=Get-VM -Id $env:STILLPOINT_VM; $old=$vm.CheckpointType; \
    Set-VM -VM $vm -CheckpointType Standard; \
    try { $c=Checkpoint-VM -VM $vm -SnapshotName $env:STILLPOINT_CHECKPOINT -Passthru; \
    ConvertTo-Json -InputObject @{ id=\"$($c.Id)\" } } finally { Set-VM -VM $vm -CheckpointType $old }";
const REMOVE: &str = "$ErrorActionPreference='Stop'; Get-VMSnapshot -VM (Get-VM -Id $env:STILLPOINT_VM) | \
    Where-Object { $_.Name -eq $env:STILLPOINT_CHECKPOINT } | Remove-VMSnapshot; ConvertTo-Json -InputObject @{ gone=$true }";

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Vm {
    id: String,
    /// For people.
    pub(crate) name: String,
    state: String,
    #[serde(default)]
    paths: Vec<Option<String>>,
}

impl Vm {
    fn is_off(&self) -> bool {
        matches!(self.state.as_str(), "Off" | "Saved")
    }

    fn app(&self, lun: Option<LunId>, state: AppState) -> App {
        let component = if self.is_off() {
            "off"
        } else {
            "checkpoint with memory"
        };
        App {
            kind: "hyperv-vm".to_owned(),
            instance: self.name.clone(),
            component: Some(component.to_owned()),
            version: None,
            state,
            error: None,
            lun,
        }
    }
}

/// One checkpoint, written down before it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    vm: String,
    vm_name: String,
    checkpoint: String,
}

/// Where the VMs stand after Prepare.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    made: Vec<Made>,
    vms: Vec<(Vm, Option<LunId>)>,
    /// VMs that take no part, and why.
    pub(crate) exclusions: Vec<Exclusion>,
}

impl Checkpoints {
    /// The VMs that take part, in one state.
    pub(crate) fn apps(&self, state: AppState) -> Vec<App> {
        self.vms.iter().map(|(vm, lun)| vm.app(*lun, state)).collect()
    }
}

/// PowerShell and the list of what was made.
#[derive(Debug, Clone)]
pub(crate) struct HyperV {
    powershell: PathBuf,
    journal: PathBuf,
}

impl HyperV {
    /// With this PowerShell; the list lies in the state directory.
    pub(crate) fn new(powershell: &Path, state_dir: &Path) -> Self {
        Self {
            powershell: powershell.to_owned(),
            journal: state_dir.join("checkpoints.json"),
        }
    }

    /// Makes a checkpoint of each running VM that lies wholly on the LUNs. With `all`, one that cannot is an error.
    pub(crate) fn checkpoint(
        &self,
        session: &str,
        inventory: &Inventory,
        luns: &[LunId],
        all: bool,
    ) -> Result<Checkpoints, Refusal> {
        let vms: Vec<Vm> = self
            .call(LIST, &[], CALL_TIME_MAX)
            .map_err(|why| internal(&why))?;
        let mut done = Checkpoints::default();
        let ends = Instant::now() + CHECKPOINT_TIME_MAX;
        for vm in vms.into_iter().take(VMS_MAX) {
            let outcome = match place(&vm, inventory, luns) {
                Place::Elsewhere => continue,
                Place::Spread(other) => Err((
                    ErrorCode::LimitVmSpread,
                    format!(
                        "it has files on {other}: configuration, disks and checkpoints must lie on one LUN"
                    ),
                )),
                // A VM that is off is consistent as it lies there.
                Place::Here(lun) if vm.is_off() => Ok(lun),
                Place::Here(lun) => self
                    .make(&vm, session, ends, &mut done)
                    .map(|()| lun)
                    .map_err(|why| (ErrorCode::NoQuiesce, why)),
            };
            match outcome {
                Ok(lun) => done.vms.push((vm, lun)),
                Err((code, why)) if all => {
                    self.remove(&done);
                    return Err(Refusal::new(code, format!("VM {}: {why}", vm.name)).about(&vm.name));
                }
                Err((_, reason)) => done.exclusions.push(Exclusion {
                    kind: ExclusionKind::Application,
                    subject: vm.name.clone(),
                    reason,
                    lun: None,
                }),
            }
        }
        Ok(done)
    }

    /// The VMs on the LUNs that could not take part.
    pub(crate) fn spread(
        &self,
        inventory: &Inventory,
        luns: &[LunId],
    ) -> Result<Vec<(String, String)>, String> {
        let vms: Vec<Vm> = self.call(LIST, &[], CALL_TIME_MAX)?;
        let spread = |vm: Vm| match place(&vm, inventory, luns) {
            Place::Spread(other) => Some((vm.name, other)),
            _ => None,
        };
        Ok(vms.into_iter().filter_map(spread).collect())
    }

    fn make(&self, vm: &Vm, session: &str, ends: Instant, done: &mut Checkpoints) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Answer {
            #[expect(dead_code, reason = "an answer without it is none")]
            id: String,
        }
        let left = ends
            .checked_duration_since(Instant::now())
            .ok_or("no time is left for its checkpoint")?;
        let made = Made {
            vm: vm.id.clone(),
            vm_name: vm.name.clone(),
            checkpoint: format!("stillpoint-{session}"),
        };
        self.note(|list| list.push(made.clone()))?;
        done.made.push(made.clone());
        let values = [
            ("STILLPOINT_VM", made.vm.as_str()),
            ("STILLPOINT_CHECKPOINT", made.checkpoint.as_str()),
        ];
        self.call::<Answer>(MAKE, &values, left).map(drop)
    }

    /// Removes what was made; names what could not be.
    pub(crate) fn remove(&self, done: &Checkpoints) -> Option<String> {
        let left = self.remove_all(&done.made);
        (!left.is_empty()).then(|| left.join("; "))
    }

    /// Removes what a service that died left behind.
    pub(crate) fn sweep(&self) -> Vec<String> {
        let list = self.list();
        self.remove_all(&list)
    }

    fn remove_all(&self, made: &[Made]) -> Vec<String> {
        let mut left = Vec::new();
        for one in made {
            let values = [
                ("STILLPOINT_VM", one.vm.as_str()),
                ("STILLPOINT_CHECKPOINT", one.checkpoint.as_str()),
            ];
            match self.call::<serde_json::Value>(REMOVE, &values, CALL_TIME_MAX) {
                Ok(_) => {
                    if let Err(error) = self.note(|list| list.retain(|other| other != one)) {
                        tracing::warn!(error, "the list of checkpoints is not up to date");
                    }
                }
                Err(why) => left.push(format!(
                    "checkpoint {} of VM {}: {why}",
                    one.checkpoint, one.vm_name
                )),
            }
        }
        left
    }

    fn list(&self) -> Vec<Made> {
        std::fs::read(&self.journal)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    fn note(&self, change: impl FnOnce(&mut Vec<Made>)) -> Result<(), String> {
        let mut list = self.list();
        change(&mut list);
        let text = serde_json::to_vec(&list).map_err(|error| error.to_string())?;
        crate::state::replace(&self.journal, &text)
            .map_err(|error| format!("{}: {error}", self.journal.display()))
    }

    fn call<T: for<'a> Deserialize<'a>>(
        &self,
        script: &str,
        values: &[(&str, &str)],
        limit: Duration,
    ) -> Result<T, String> {
        let mut command = Command::new(&self.powershell);
        command.args(["-NoProfile", "-NonInteractive", "-Command", script]);
        command.envs(values.iter().copied()).stdin(Stdio::null());
        let text = output_within(command, limit)?;
        serde_json::from_str(&text).map_err(|error| format!("PowerShell answered no JSON ({error})"))
    }
}

/// Runs it; what it printed, or what went wrong.
fn output_within(mut command: Command, limit: Duration) -> Result<String, String> {
    use std::io::Read as _;
    let name = command.get_program().to_string_lossy().into_owned();
    let spawned = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("{name}: {error}"))?;
    let read = |from: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What cannot be read is missing in the answer, which is then none.
            from.map(|from| from.take(OUTPUT_MAX).read_to_end(&mut bytes).ok());
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|pipe| Box::new(pipe) as Box<_>));
    let err = read(child.stderr.take().map(|pipe| Box::new(pipe) as Box<_>));
    let ends = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| format!("{name}: {error}"))? {
            break status;
        }
        if Instant::now() >= ends {
            child.kill().ok();
            child.wait().ok();
            return Err(format!("{name} did not end within {} s", limit.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = |reader: std::thread::JoinHandle<String>| reader.join().unwrap_or_default();
    let (out, err) = (text(out), text(err));
    if status.success() {
        return Ok(out);
    }
    let line = err
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no reason given");
    Err(line.chars().take(400).collect())
}

enum Place {
    Elsewhere,
    Here(Option<LunId>),
    Spread(String),
}

fn place(vm: &Vm, inventory: &Inventory, luns: &[LunId]) -> Place {
    let mut here = Vec::new();
    let mut other = None;
    for path in vm.paths.iter().flatten() {
        match inventory
            .volume_of(path)
            .filter(|volume| volume.luns.iter().any(|lun| luns.contains(lun)))
        {
            Some(volume) => here.extend(volume.luns.iter().copied()),
            None => other = other.or_else(|| Some(path.clone())),
        }
    }
    here.sort_unstable();
    here.dedup();
    match (here.as_slice(), other) {
        ([], _) => Place::Elsewhere,
        (_, Some(other)) => Place::Spread(other),
        ([one], None) => Place::Here(Some(*one)),
        (_, None) => Place::Here(None),
    }
}

fn internal(why: &str) -> Refusal {
    Refusal::new(
        ErrorCode::Internal,
        format!("the VMs of this host cannot be listed: {why}"),
    )
}

#[cfg(all(test, unix))]
#[path = "hyperv_tests.rs"]
mod tests;
