//! `/etc/stillpoint-agent/agent.toml`: as written ([`file`]) and as meant ([`Config`]).

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use stillpoint_agentproto::LunId;

use crate::apps::{Application, Kind};
use crate::libvirt::Libvirt;
use crate::volumes::TestLun;

/// Where the file is looked for unless `--config` says otherwise.
pub(crate) const PATH: &str = "/etc/stillpoint-agent/agent.toml";
/// The longest hold that this agent ever grants (agent-protocol.md §6).
const HOLD_MS_MAX: u64 = 60_000;
/// The shortest hold in which a target can take a snapshot and its one-second margin fits.
const HOLD_MS_MIN: u64 = 2_000;
/// The longest rest between two freezes that can be asked for.
const MIN_INTERVAL_S_MAX: u64 = 86_400;
/// Time for all `freeze` hooks together (agent-protocol.md §11).
const HOOK_S_MAX: u64 = 30;
/// How long a helper waits for its server's lock, unless the file says otherwise …
const LOCK_S_DEFAULT: u64 = 10;
/// … and at most: the freeze hooks together have 30 s.
const LOCK_S_MAX: u64 = 25;
/// Lists in the file are short.
const LIST_MAX: usize = 64;

/// Everything the agent was told, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    /// Where snapshot channels are accepted.
    pub(crate) listen: SocketAddr,
    /// LUNs that another host of a cluster has mounted.
    pub(crate) standby: Vec<LunId>,
    /// The guests of this host.
    pub(crate) libvirt: Libvirt,
    /// The address that targets are told to dial, when it is not the one that the registration comes from.
    pub(crate) advertise_host: Option<IpAddr>,
    /// The port that targets are told to dial, when it is not `listen`'s.
    pub(crate) advertise_port: Option<u16>,
    /// Keys, pins, generations.
    pub(crate) state_dir: PathBuf,
    /// Journal of what is frozen; must be gone after a reboot.
    pub(crate) run_dir: PathBuf,
    /// Executables run at freeze and thaw.
    pub(crate) hooks_dir: PathBuf,
    /// All `freeze` hooks together end within this.
    pub(crate) hook_time_max: Duration,
    /// Longest hold granted.
    pub(crate) hold_max: Duration,
    /// Rest between two freezes of one LUN.
    pub(crate) min_interval: Duration,
    /// Paths whose file systems are never frozen, beside the agent's own.
    pub(crate) protect: Vec<PathBuf>,
    /// Initiator names of this host that neither `/etc/iscsi` nor sysfs shows.
    pub(crate) initiators: Vec<String>,
    /// Applications that the agent quiesces itself.
    pub(crate) applications: Vec<Application>,
    /// Log filter.
    pub(crate) log: String,
    /// Test only: devices without page 0x83.
    pub(crate) test_luns: Vec<TestLun>,
    /// The file, when it is not the usual one: helpers are started with it.
    pub(crate) file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 11169)),
            standby: Vec::new(),
            libvirt: Libvirt::default(),
            advertise_host: None,
            advertise_port: None,
            state_dir: PathBuf::from("/var/lib/stillpoint-agent"),
            run_dir: PathBuf::from("/run/stillpoint-agent"),
            hooks_dir: PathBuf::from("/etc/stillpoint-agent/hooks.d"),
            hook_time_max: Duration::from_secs(HOOK_S_MAX),
            hold_max: Duration::from_millis(HOLD_MS_MAX),
            min_interval: Duration::from_secs(10),
            protect: vec![PathBuf::from("/var/lib/stillpoint")],
            initiators: Vec::new(),
            applications: Vec::new(),
            log: "info".to_owned(),
            test_luns: Vec::new(),
            file: None,
        }
    }
}

/// All that is wrong with a file, one finding per line, each with file and line.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub(crate) struct Problems(pub(crate) Vec<String>);

impl Config {
    /// Reads the file; a missing default file means defaults, a missing named file is an error.
    pub(crate) fn load(named: Option<&Path>) -> Result<Self, Problems> {
        let path = named.unwrap_or_else(|| Path::new(PATH));
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Self {
                file: named.and_then(|path| std::path::absolute(path).ok()),
                ..Self::parse(&text, path)?
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                Ok(Self::default())
            }
            Err(error) => Err(Problems(vec![format!(
                "{}: cannot be read: {error}",
                path.display()
            )])),
        }
    }

    /// Checks a whole text and lists every problem.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, Problems> {
        let spec: file::Spec = toml::from_str(text).map_err(|error| {
            let line = line_of(text, error.span().map_or(0, |span| span.start));
            Problems(vec![format!("{}:{line}: {}", path.display(), error.message())])
        })?;
        let mut check = Checker {
            text,
            path,
            problems: Vec::new(),
        };
        let config = check.config(spec);
        if check.problems.is_empty() {
            return Ok(config);
        }
        check.problems.sort_by_key(|(line, _)| *line);
        Err(Problems(
            check.problems.into_iter().map(|(_, text)| text).collect(),
        ))
    }

    /// The port targets dial.
    pub(crate) fn dialled_port(&self) -> u16 {
        self.advertise_port.unwrap_or_else(|| self.listen.port())
    }
}

/// The file as written. Its own type, so that a later version of it can come without touching the rest.
mod file {
    use serde::Deserialize;
    use std::net::IpAddr;
    use std::path::PathBuf;
    use stillpoint_agentproto::LunId;
    use toml::Spanned;

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub(super) struct Spec {
        pub(super) listen: Option<Spanned<String>>,
        pub(super) advertise_port: Option<Spanned<u16>>,
        pub(super) advertise_host: Option<Spanned<IpAddr>>,
        pub(super) standby: Option<Spanned<Vec<LunId>>>,
        pub(super) libvirt: Option<Spanned<Libvirt>>,
        pub(super) state_dir: Option<Spanned<PathBuf>>,
        pub(super) run_dir: Option<Spanned<PathBuf>>,
        pub(super) hooks_dir: Option<Spanned<PathBuf>>,
        pub(super) hook_s_max: Option<Spanned<u64>>,
        pub(super) hold_ms_max: Option<Spanned<u64>>,
        pub(super) min_interval_s: Option<Spanned<u64>>,
        pub(super) protect: Option<Spanned<Vec<PathBuf>>>,
        pub(super) initiators: Option<Spanned<Vec<String>>>,
        pub(super) log: Option<Spanned<String>>,
        pub(super) application: Vec<Spanned<Application>>,
        pub(super) test_lun: Vec<Spanned<Lun>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Libvirt {
        pub(super) virsh: Option<PathBuf>,
        pub(super) connect: Option<String>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Application {
        pub(super) kind: crate::apps::Kind,
        pub(super) name: String,
        pub(super) data_dir: PathBuf,
        pub(super) client: Option<PathBuf>,
        pub(super) run_as: Option<String>,
        pub(super) socket: Option<String>,
        pub(super) port: Option<u16>,
        pub(super) user: Option<String>,
        pub(super) credentials: Option<PathBuf>,
        pub(super) lock_s_max: Option<u64>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Lun {
        pub(super) path: PathBuf,
        pub(super) naa: String,
    }
}

struct Checker<'a> {
    text: &'a str,
    path: &'a Path,
    /// Line and text.
    problems: Vec<(usize, String)>,
}

impl Checker<'_> {
    fn config(&mut self, spec: file::Spec) -> Config {
        let default = Config::default();
        let listen = spec.listen.and_then(|value| self.listen(&value));
        let seconds = |value: Option<u64>, other: Duration| value.map_or(other, Duration::from_secs);
        let hook_s = spec
            .hook_s_max
            .and_then(|v| self.within("hook_s_max", &v, 1, HOOK_S_MAX));
        let hold_ms = spec
            .hold_ms_max
            .and_then(|v| self.within("hold_ms_max", &v, HOLD_MS_MIN, HOLD_MS_MAX));
        let interval_s = spec
            .min_interval_s
            .and_then(|v| self.within("min_interval_s", &v, 1, MIN_INTERVAL_S_MAX));
        Config {
            listen: listen.unwrap_or(default.listen),
            standby: spec.standby.map_or(default.standby, |v| self.standby(v)),
            libvirt: spec.libvirt.map_or(default.libvirt, |v| self.libvirt(v)),
            advertise_host: spec.advertise_host.and_then(|v| self.host(&v)),
            advertise_port: spec.advertise_port.and_then(|v| self.port(&v)),
            state_dir: self.dir("state_dir", spec.state_dir, default.state_dir),
            run_dir: self.dir("run_dir", spec.run_dir, default.run_dir),
            hooks_dir: self.dir("hooks_dir", spec.hooks_dir, default.hooks_dir),
            hook_time_max: seconds(hook_s, default.hook_time_max),
            hold_max: hold_ms.map_or(default.hold_max, Duration::from_millis),
            min_interval: seconds(interval_s, default.min_interval),
            protect: spec.protect.map_or(default.protect, |v| self.paths("protect", v)),
            initiators: spec.initiators.map_or(default.initiators, |v| self.names(v)),
            applications: self.applications(spec.application),
            log: spec.log.map_or(default.log, |v| self.log(v)),
            test_luns: self.test_luns(spec.test_lun),
            file: None,
        }
    }

    fn listen(&mut self, value: &toml::Spanned<String>) -> Option<SocketAddr> {
        let address = value.get_ref().parse().ok();
        if address.is_none() {
            let text = format!(
                "`listen = {:?}` is no address: write ADDR:PORT, \"0.0.0.0:11169\"",
                value.get_ref()
            );
            self.problem(value, &text);
        }
        address
    }

    fn port(&mut self, value: &toml::Spanned<u16>) -> Option<u16> {
        if *value.get_ref() == 0 {
            self.problem(
                value,
                "`advertise_port = 0` cannot be dialled: write the port the target reaches",
            );
        }
        Some(*value.get_ref())
    }

    fn host(&mut self, value: &toml::Spanned<IpAddr>) -> Option<IpAddr> {
        let host = *value.get_ref();
        if host.is_unspecified() || host.is_multicast() {
            self.problem(
                value,
                &format!(
                    "`advertise_host = \"{host}\"` cannot be dialled: write the address the target reaches"
                ),
            );
        }
        Some(host)
    }

    fn standby(&mut self, value: toml::Spanned<Vec<LunId>>) -> Vec<LunId> {
        self.limit("standby", &value);
        value.into_inner()
    }

    fn libvirt(&mut self, value: toml::Spanned<file::Libvirt>) -> Libvirt {
        let default = Libvirt::default();
        let (virsh, connect) = (value.get_ref().virsh.clone(), value.get_ref().connect.clone());
        if virsh.as_ref().is_some_and(|path| !path.is_absolute()) {
            self.problem(&value, "`virsh` of [libvirt] is an absolute path");
        }
        // It becomes an argument of virsh.
        if connect
            .as_ref()
            .is_some_and(|uri| !uri.contains("://") || uri.starts_with('-'))
        {
            self.problem(
                &value,
                "`connect` of [libvirt] is a URI such as \"qemu:///system\"",
            );
        }
        Libvirt {
            virsh: virsh.unwrap_or(default.virsh),
            connect: connect.unwrap_or(default.connect),
        }
    }

    fn within(&mut self, key: &str, value: &toml::Spanned<u64>, low: u64, high: u64) -> Option<u64> {
        let number = *value.get_ref();
        if !(low..=high).contains(&number) {
            self.problem(
                value,
                &format!("`{key} = {number}` is out of range: write {low} to {high}"),
            );
        }
        Some(number)
    }

    fn dir(&mut self, key: &str, value: Option<toml::Spanned<PathBuf>>, other: PathBuf) -> PathBuf {
        let Some(value) = value else { return other };
        if !value.get_ref().is_absolute() {
            self.problem(
                &value,
                &format!("`{key}` must be an absolute path: the agent has no working directory"),
            );
        }
        value.into_inner()
    }

    fn paths(&mut self, key: &str, value: toml::Spanned<Vec<PathBuf>>) -> Vec<PathBuf> {
        self.limit(key, &value);
        if value.get_ref().iter().any(|path| !path.is_absolute()) {
            self.problem(&value, &format!("`{key}` takes absolute paths"));
        }
        value.into_inner()
    }

    fn names(&mut self, value: toml::Spanned<Vec<String>>) -> Vec<String> {
        self.limit("initiators", &value);
        let is_name = |name: &String| ["iqn.", "eui.", "naa."].iter().any(|kind| name.starts_with(kind));
        if let Some(bad) = value
            .get_ref()
            .iter()
            .find(|name| !is_name(name) || name.len() > 223)
        {
            let text = format!(
                "`{bad}` is no iSCSI name: it starts with iqn., eui. or naa. and has at most 223 bytes"
            );
            self.problem(&value, &text);
        }
        value.into_inner()
    }

    fn log(&mut self, value: toml::Spanned<String>) -> String {
        if tracing_subscriber::EnvFilter::try_new(value.get_ref()).is_err() {
            self.problem(
                &value,
                "`log` is no filter: write error, warn, info, debug or trace",
            );
        }
        value.into_inner()
    }

    fn applications(&mut self, values: Vec<toml::Spanned<file::Application>>) -> Vec<Application> {
        let mut names = std::collections::BTreeSet::new();
        for value in &values {
            let app = value.get_ref();
            let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if app.name.is_empty() || app.name.len() > 64 || !app.name.chars().all(is_name) {
                self.problem(
                    value,
                    "`name` of an application has 1 to 64 letters, digits, `-`, `_`, `.`",
                );
            }
            if !names.insert(app.name.clone()) {
                self.problem(
                    value,
                    &format!("two applications are called {:?}: rename one", app.name),
                );
            }
            let paths = [Some(&app.data_dir), app.client.as_ref(), app.credentials.as_ref()];
            if paths.into_iter().flatten().any(|path| !path.is_absolute()) {
                self.problem(
                    value,
                    "`data_dir`, `client` and `credentials` of an application are absolute paths",
                );
            }
            if app.kind == Kind::Mariadb && app.port.is_some() {
                self.problem(
                    value,
                    "`port` is for postgresql: mariadb is reached through its `socket`",
                );
            }
            if !(1..=LOCK_S_MAX).contains(&app.lock_s_max.unwrap_or(LOCK_S_DEFAULT)) {
                self.problem(
                    value,
                    &format!("`lock_s_max` is out of range: write 1 to {LOCK_S_MAX}"),
                );
            }
        }
        if let Some(value) = values.get(LIST_MAX) {
            self.problem(value, &format!("more than {LIST_MAX} applications"));
        }
        let config = self.path.to_owned();
        values
            .into_iter()
            .map(|value| application(value.into_inner(), config.clone()))
            .collect()
    }

    fn test_luns(&mut self, values: Vec<toml::Spanned<file::Lun>>) -> Vec<TestLun> {
        values.into_iter().map(|value| self.test_lun(value)).collect()
    }

    fn test_lun(&mut self, value: toml::Spanned<file::Lun>) -> TestLun {
        let naa = value.get_ref().naa.to_ascii_lowercase();
        let digits = naa.strip_prefix("naa.").unwrap_or_default();
        if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            self.problem(
                &value,
                "`naa` of a test_lun is naa. and 32 hex digits: `stillpoint lun show` prints it",
            );
        }
        if !value.get_ref().path.is_absolute() {
            self.problem(&value, "`path` of a test_lun must be absolute");
        }
        TestLun {
            path: value.into_inner().path,
            naa,
        }
    }

    fn limit<T>(&mut self, key: &str, value: &toml::Spanned<Vec<T>>) {
        if value.get_ref().len() > LIST_MAX {
            self.problem(value, &format!("`{key}` has more than {LIST_MAX} entries"));
        }
    }

    fn problem<T>(&mut self, at: &toml::Spanned<T>, text: &str) {
        let line = line_of(self.text, at.span().start);
        self.problems
            .push((line, format!("{}:{line}: {text}", self.path.display())));
    }
}

/// With the defaults of Debian's packages.
fn application(app: file::Application, config: PathBuf) -> Application {
    let (client, run_as, socket, user) = match app.kind {
        Kind::Postgresql => ("/usr/bin/psql", "postgres", "/var/run/postgresql", "postgres"),
        Kind::Mariadb => ("/usr/bin/mariadb", "root", "/run/mysqld/mysqld.sock", "root"),
    };
    Application {
        kind: app.kind,
        name: app.name,
        data_dir: app.data_dir,
        client: app.client.unwrap_or_else(|| PathBuf::from(client)),
        run_as: app.run_as.unwrap_or_else(|| run_as.to_owned()),
        socket: app.socket.unwrap_or_else(|| socket.to_owned()),
        port: app.port.unwrap_or(5432),
        user: app.user.unwrap_or_else(|| user.to_owned()),
        credentials: app.credentials,
        lock_max: Duration::from_secs(app.lock_s_max.unwrap_or(LOCK_S_DEFAULT)),
        config: std::path::absolute(config).ok(),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&b| b == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("agent.toml")).map_err(|p| p.to_string())
    }

    #[test]
    fn an_empty_file_means_the_documented_defaults() {
        let config = parse("").expect("defaults");
        assert_eq!(config, Config::default());
        assert_eq!(config.dialled_port(), 11169);
    }

    #[test]
    fn the_packaged_example_is_accepted() {
        let config = parse(include_str!("../packaging/agent.toml")).expect("the example");
        assert_eq!(config, Config::default(), "the example shows the defaults");
    }

    #[test]
    fn unknown_keys_are_errors_with_their_line() {
        let problem = parse("log = \"info\"\nlisten_on = \"0.0.0.0:1\"\n").expect_err("unknown key");
        assert!(
            problem.starts_with("agent.toml:2: unknown field `listen_on`"),
            "{problem}"
        );
        let problem =
            parse("[[test_lun]]\npath = \"/dev/loop0\"\nnaa = \"naa.6\"\nsize = 1\n").expect_err("unknown");
        assert!(
            problem.starts_with("agent.toml:4: unknown field `size`"),
            "{problem}"
        );
    }

    #[test]
    fn every_problem_is_listed_with_its_line() {
        let text = "listen = \"here\"\nhold_ms_max = 60001\nmin_interval_s = 0\nstate_dir = \"x\"\n\
                    advertise_port = 0\ninitiators = [\"fred\"]\n[[test_lun]]\npath = \"loop\"\nnaa = \"naa.60\"\n";
        let problems = parse(text).expect_err("seven problems");
        let lines: Vec<_> = problems.lines().filter_map(|l| l.split(':').nth(1)).collect();
        assert_eq!(lines, ["1", "2", "3", "4", "5", "6", "7", "7"], "{problems}");
    }

    #[test]
    fn applications_have_debians_defaults_and_are_checked() {
        let text = "[[application]]\nkind = \"postgresql\"\nname = \"pg\"\ndata_dir = \"/srv/pg\"\n\
                    [[application]]\nkind = \"mariadb\"\nname = \"shop\"\ndata_dir = \"/srv/my\"\nlock_s_max = 3\n";
        let apps = parse(text).expect("two applications").applications;
        assert_eq!((apps[0].run_as.as_str(), apps[0].port), ("postgres", 5432));
        assert_eq!(
            (apps[1].socket.as_str(), apps[1].lock_max),
            ("/run/mysqld/mysqld.sock", Duration::from_secs(3))
        );
        assert!(apps[0].config.as_ref().is_some_and(|path| path.is_absolute()));
        let problems = parse(
            &text
                .replace("shop", "pg")
                .replace("/srv/my", "my")
                .replace("= 3", "= 99"),
        )
        .expect_err("a name twice, a relative path, too long a wait");
        assert_eq!(problems.lines().count(), 3, "{problems}");
        assert!(parse("[[application]]\nkind = \"oracle\"\nname = \"x\"\ndata_dir = \"/x\"\n").is_err());
    }

    #[test]
    fn limits_are_inclusive() {
        let config =
            parse("hold_ms_max = 60000\nmin_interval_s = 1\nhook_s_max = 30\n").expect("at the limits");
        assert_eq!(config.hold_max, Duration::from_secs(60));
        assert!(parse("hook_s_max = 31").is_err());
        assert!(parse("hold_ms_max = 1999").is_err());
    }
}
