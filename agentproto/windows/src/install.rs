//! `install` and `uninstall`: what has to be told to Windows, in order, with Windows' own tools. What was done is undone when a later
//! step fails, and each step is good when it was done before.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The service.
pub(crate) const SERVICE: &str = "StillpointAgent";
/// The firewall's rule.
const RULE: &str = "Stillpoint agent";

/// One command of Windows: program in System32, arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tool {
    program: &'static str,
    arguments: Vec<String>,
}

impl Tool {
    fn new(program: &'static str, arguments: &[&str]) -> Self {
        Self {
            program,
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        }
    }

    /// Runs it.
    pub(crate) fn run(&self) -> Result<(), String> {
        let root = std::env::var_os("SystemRoot").map_or_else(|| PathBuf::from(r"C:\Windows"), PathBuf::from);
        let path = root.join("System32").join(self.program);
        let output = Command::new(&path).args(&self.arguments).output();
        let output = output.map_err(|error| format!("{}: {error}", path.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let line = said
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("no reason given")
            .trim()
            .to_owned();
        Err(format!("{} {}: {line}", self.program, self.arguments.join(" ")))
    }
}

/// A step of the installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Tools that do it (all of them), and those that undo it.
    Tools {
        /// For people.
        what: &'static str,
        /// Does it.
        make: Vec<Tool>,
        /// Undoes it; what is not there is no error.
        undo: Vec<Tool>,
    },
    /// `IVssAdmin::RegisterProvider`.
    Provider,
    /// Last: the service runs.
    Start,
}

/// The steps, in order. `class`: the provider's COM class, in braces.
pub(crate) fn steps(program: &Path, config: Option<&Path>, port: u16, class: &str) -> Vec<Step> {
    let program = program.display().to_string();
    let config = config.map_or_else(String::new, |config| {
        format!(" --config \"{}\"", config.display())
    });
    let line = format!("\"{program}\"{config} run --service");
    vec![
        service(&line),
        com_class(class),
        firewall(&program, port),
        Step::Provider,
        Step::Start,
    ]
}

fn service(line: &str) -> Step {
    let about = "Application-consistent snapshots of Stillpoint LUNs (VSS)";
    let sc = |arguments: &[&str]| Tool::new("sc.exe", arguments);
    Step::Tools {
        what: "service",
        make: vec![
            sc(&[
                "create",
                SERVICE,
                "binPath=",
                line,
                "start=",
                "auto",
                "DisplayName=",
                "Stillpoint agent",
            ]),
            sc(&["description", SERVICE, about]),
            sc(&[
                "failure",
                SERVICE,
                "reset=",
                "86400",
                "actions=",
                "restart/5000/restart/30000//",
            ]),
        ],
        undo: vec![sc(&["stop", SERVICE]), sc(&["delete", SERVICE])],
    }
}

/// VSS starts the class through the service manager: an AppID that names the service.
fn com_class(class: &str) -> Step {
    let name = "Stillpoint Hardware Provider";
    let class_key = format!(r"HKLM\SOFTWARE\Classes\CLSID\{class}");
    let app_key = format!(r"HKLM\SOFTWARE\Classes\AppID\{class}");
    let add = |key: &str, more: &[&str]| Tool::new("reg.exe", &[&["add", key], more, &["/f"]].concat());
    let delete = |key: &str| Tool::new("reg.exe", &["delete", key, "/f"]);
    Step::Tools {
        what: "COM class",
        make: vec![
            add(&class_key, &["/ve", "/d", name]),
            add(&class_key, &["/v", "AppID", "/d", class]),
            add(&app_key, &["/ve", "/d", name]),
            add(&app_key, &["/v", "LocalService", "/d", SERVICE]),
        ],
        undo: vec![delete(&class_key), delete(&app_key)],
    }
}

fn firewall(program: &str, port: u16) -> Step {
    let rule = format!("name={RULE}");
    let place = [format!("localport={port}"), format!("program={program}")];
    let netsh = |verb: &str, more: &[&str]| {
        Tool::new(
            "netsh.exe",
            &[&["advfirewall", "firewall", verb, "rule", &rule], more].concat(),
        )
    };
    let [port, program] = &place;
    Step::Tools {
        what: "firewall rule",
        make: vec![netsh(
            "add",
            &["dir=in", "action=allow", "protocol=TCP", port, program],
        )],
        undo: vec![netsh("delete", &[])],
    }
}

/// Carries steps out.
pub(crate) trait Hand {
    /// A tool.
    fn tool(&mut self, tool: &Tool) -> Result<(), String>;
    /// VSS's list of providers: on it, or off.
    fn provider(&mut self, registered: bool) -> Result<(), String>;
}

/// Installs; what was done is undone when something fails.
pub(crate) fn install(steps: &[Step], hand: &mut dyn Hand) -> Result<(), String> {
    for (index, step) in steps.iter().enumerate() {
        if let Err(error) = make(step, hand) {
            let done = steps.get(..=index).unwrap_or_default();
            uninstall(done, hand);
            return Err(error);
        }
    }
    Ok(())
}

fn make(step: &Step, hand: &mut dyn Hand) -> Result<(), String> {
    match step {
        Step::Tools { what, make, undo } => {
            // Done before, perhaps with another program or port: again from the start.
            for tool in undo {
                hand.tool(tool).ok();
            }
            make.iter()
                .try_for_each(|tool| hand.tool(tool))
                .map_err(|error| format!("{what}: {error}"))
        }
        Step::Provider => hand
            .provider(true)
            .map_err(|error| format!("VSS does not take the provider: {error}")),
        Step::Start => hand
            .tool(&Tool::new("sc.exe", &["start", SERVICE]))
            .map_err(|error| format!("the service does not start: {error}")),
    }
}

/// Undoes all steps, last first; what could not be undone.
pub(crate) fn uninstall(steps: &[Step], hand: &mut dyn Hand) -> Vec<String> {
    let mut left = Vec::new();
    for step in steps.iter().rev() {
        match step {
            Step::Provider => left.extend(hand.provider(false).err()),
            Step::Tools { undo, .. } => {
                for tool in undo {
                    if let Err(error) = hand.tool(tool) {
                        tracing::debug!(error, "there was nothing to undo");
                    }
                }
            }
            // Stopped with the service's own step.
            Step::Start => {}
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        done: Vec<String>,
        fails: Option<&'static str>,
    }

    impl Recorder {
        fn note(&mut self, text: String) -> Result<(), String> {
            let fails = self.fails.is_some_and(|word| text.starts_with(word));
            self.done.push(text);
            if fails {
                Err("access is denied".to_owned())
            } else {
                Ok(())
            }
        }
    }

    impl Hand for Recorder {
        fn tool(&mut self, tool: &Tool) -> Result<(), String> {
            self.note(format!("{} {}", tool.program, tool.arguments.join(" ")))
        }
        fn provider(&mut self, registered: bool) -> Result<(), String> {
            self.note(format!("provider {registered}"))
        }
    }

    fn all() -> Vec<Step> {
        steps(
            Path::new(r"C:\Program Files\Stillpoint\stillpoint-agent.exe"),
            None,
            11169,
            "{1d6e}",
        )
    }

    #[test]
    fn the_provider_is_told_last_and_the_service_started_after_it() {
        let mut hand = Recorder::default();
        install(&all(), &mut hand).expect("installed");
        let at = |word: &str| {
            hand.done
                .iter()
                .position(|done| done.starts_with(word))
                .unwrap_or_else(|| panic!("{word}"))
        };
        assert!(
            at("sc.exe create") < at("reg.exe add")
                && at("reg.exe add") < at("netsh.exe advfirewall firewall add")
        );
        assert!(
            at("netsh.exe advfirewall firewall add") < at("provider true")
                && at("provider true") < at("sc.exe start")
        );
        let create = &hand.done[at("sc.exe create")];
        assert!(
            create.contains(r#"binPath= "C:\Program Files\Stillpoint\stillpoint-agent.exe" run --service"#),
            "{create}"
        );
        let rule = &hand.done[at("netsh.exe advfirewall firewall add")];
        assert!(
            rule.contains("localport=11169") && rule.contains("dir=in"),
            "{rule}"
        );
    }

    #[test]
    fn a_step_that_fails_leaves_nothing() {
        let mut hand = Recorder {
            fails: Some("provider true"),
            ..Recorder::default()
        };
        let error = install(&all(), &mut hand).expect_err("the provider is not taken");
        assert!(error.contains("access is denied"));
        let after = hand
            .done
            .iter()
            .position(|done| done == "provider true")
            .expect("tried");
        let undone = &hand.done[after + 1..];
        assert_eq!(undone[0], "provider false");
        for word in [
            "netsh.exe advfirewall firewall delete",
            "reg.exe delete",
            "sc.exe delete",
        ] {
            assert!(
                undone.iter().any(|done| done.starts_with(word)),
                "{word}: {undone:?}"
            );
        }
        assert!(!hand.done.iter().any(|done| done.starts_with("sc.exe start")));
    }
}
