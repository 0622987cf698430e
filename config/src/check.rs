//! From the file as written to the configuration as meant: what the parts mean for each other.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeTable;

use crate::config::{
    Access, AgentTarget, Agents, Chap, ChapAlgorithm, Checksums, Config, Consistency, Credentials, Daemon,
    Grain, Http, HttpUser, Initiators, Lun, Metrics, OnFailure, Origin, PlainTarget, Pool, Portal, Target,
    TargetKind, Tls,
};
use crate::file::reader::Sink;
use crate::file::v1::{self, InitiatorEntry, List, Place};
use crate::limits;
use crate::name::LunName;
use crate::problem::{Problem, Problems, Trouble};
use crate::schedule::{Keep, Schedule};
use crate::secret::Secret;
use crate::size::Size;
use crate::suggest;

/// Where `stillpoint` looks when no file is named.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/stillpoint/stillpoint.toml";
const SYNTAX_WAY_OUT: &str = "correct the TOML here (texts such as sizes and names stand in quotes)";
const DEFAULT_DATA_DIR: &str = "/var/lib/stillpoint";
const DEFAULT_CONTROL_SOCKET: &str = "/run/stillpoint/control.sock";

impl Config {
    /// Reads and checks a file, and the secret files that it names.
    ///
    /// # Errors
    /// Everything that is wrong, each with its line; one problem when the file itself cannot be read.
    pub fn load(file: &Path) -> Result<Self, Problems> {
        Self::parse(&read_text(file)?, file)
    }

    /// Checks a text. `file` names it in problems; relative paths are meant from its directory.
    ///
    /// # Errors
    /// Everything that is wrong, each with its line.
    pub fn parse(text: &str, file: &Path) -> Result<Self, Problems> {
        let mut sink = Sink::new(text, file);
        let (table, errors) = DeTable::parse_recoverable(text);
        report_syntax(&mut sink, &errors);
        let written = v1::read(&mut sink, table.get_ref());
        let config = build(&mut sink, written, Origin::File(file.to_owned()));
        finish(sink, config)
    }

    /// Only where the control socket is, which is all that a client needs: it may not read the secrets.
    ///
    /// # Errors
    /// When the file cannot be read or its `[daemon]` section is wrong.
    pub fn control_socket_of(file: &Path) -> Result<PathBuf, Problems> {
        let text = read_text(file)?;
        let mut sink = Sink::new(&text, file);
        let (table, errors) = DeTable::parse_recoverable(&text);
        report_syntax(&mut sink, &errors);
        let written = v1::read_daemon_only(&mut sink, table.get_ref());
        let daemon = build_daemon(&mut sink, &written);
        finish(sink, daemon).map(|daemon| daemon.control_socket)
    }
}

fn read_text(file: &Path) -> Result<String, Problems> {
    let whole = |trouble: String, way_out: &str| {
        let way_out = way_out.to_owned();
        Problems(vec![Problem {
            file: file.to_owned(),
            line: 0,
            thing: "the file".to_owned(),
            trouble,
            way_out,
        }])
    };
    let cannot = |e: std::io::Error| {
        whole(
            format!("cannot be read ({e})"),
            "check the path and its permissions",
        )
    };
    let mut bytes = Vec::new();
    // A bound on what is read, not on what `stat` says: pipes and /proc files have no length.
    File::open(file)
        .map_err(cannot)?
        .take(limits::MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() as u64 > limits::MAX_FILE_BYTES {
        return Err(whole(
            format!("is longer than {}", Size(limits::MAX_FILE_BYTES)),
            "name a configuration file",
        ));
    }
    String::from_utf8(bytes)
        .map_err(|e| whole(format!("is not UTF-8 ({})", e.utf8_error()), "save it as UTF-8"))
}

fn report_syntax(sink: &mut Sink, errors: &[toml::de::Error]) {
    sink.damaged = !errors.is_empty();
    for error in errors {
        let trouble = error.message().trim().replace('\n', ", ");
        sink.problem(
            &error.span().unwrap_or(0..0),
            "the file",
            Trouble::new(trouble, SYNTAX_WAY_OUT),
        );
    }
}

/// Only without a problem is there a value. Problems come in the order of the lines, one syntax error per line.
fn finish<T>(mut sink: Sink, value: T) -> Result<T, Problems> {
    if sink.problems.is_empty() {
        return Ok(value);
    }
    // What is read out of a damaged line says nothing beyond that the line is damaged.
    let damaged: Vec<usize> = sink
        .problems
        .iter()
        .filter(|p| p.way_out == SYNTAX_WAY_OUT)
        .map(|p| p.line)
        .collect();
    sink.problems
        .retain(|p| p.way_out == SYNTAX_WAY_OUT || !damaged.contains(&p.line));
    sink.problems.sort_by_key(|p| p.line);
    sink.problems
        .dedup_by(|a, b| a.line == b.line && a.way_out == SYNTAX_WAY_OUT && b.way_out == SYNTAX_WAY_OUT);
    Err(Problems(sink.problems))
}

/// Cross-checks. What has a problem of its own is missing from the result, which nobody gets to see then.
fn build(sink: &mut Sink, file: v1::File, origin: Origin) -> Config {
    let daemon = build_daemon(sink, &file.daemon);
    let portals = build_portals(sink, &file.portals);
    let pool = build_pool(sink, &file.pool);
    unique(
        sink,
        "lun",
        file.luns
            .iter()
            .map(|l| (l.name.get_ref().as_str(), l.name.span())),
    );
    let luns: Vec<Lun> = file.luns.iter().filter_map(|lun| build_lun(sink, lun)).collect();
    unique(
        sink,
        "target",
        file.targets
            .iter()
            .map(|t| (t.iqn.get_ref().as_str(), t.iqn.span())),
    );
    let targets: Vec<Target> = file
        .targets
        .iter()
        .filter_map(|t| build_target(sink, t, &file))
        .collect();
    check_sharing(sink, &file);
    let agents = build_agents(file.agents.as_ref(), &targets);
    unique(
        sink,
        "schedule",
        file.schedules
            .iter()
            .map(|s| (s.name.get_ref().as_str(), s.name.span())),
    );
    let schedules = file
        .schedules
        .iter()
        .map(|s| build_schedule(sink, s, &file))
        .collect();
    check_listeners(sink, &file, agents.as_ref());
    let http = file.http.map(|http| build_http(sink, http));
    let metrics = file.metrics.map(|m| Metrics {
        listen: m.listen.into_inner(),
    });
    sink.warnings.sort_by_key(|w| w.line);
    sink.unserved.sort_by_key(|u| u.line);
    sink.unserved.dedup_by(|a, b| a.section == b.section);
    let (warnings, unserved) = (
        std::mem::take(&mut sink.warnings),
        std::mem::take(&mut sink.unserved),
    );
    Config {
        origin,
        daemon,
        portals,
        pool,
        luns,
        targets,
        agents,
        schedules,
        http,
        metrics,
        warnings,
        unserved,
    }
}

/// Reports every name after its first appearance.
fn unique<'a>(sink: &mut Sink, noun: &str, names: impl Iterator<Item = (&'a str, Range<usize>)>) {
    let mut seen = BTreeMap::new();
    for (name, at) in names {
        if let Some(line) = seen.get(name) {
            let trouble = Trouble::new(
                format!("is in the file twice (first in line {line})"),
                "rename or remove one of them",
            );
            sink.problem(&at, &format!("{noun} {name:?}"), trouble);
        } else {
            seen.insert(name, sink.line(&at));
        }
    }
}

fn build_daemon(sink: &mut Sink, daemon: &v1::Daemon) -> Daemon {
    if let Some(socket) = &daemon.control_socket {
        let length = OsStr::as_bytes(socket.get_ref().as_os_str()).len();
        if length > limits::MAX_SOCKET_PATH_BYTES {
            let trouble = Trouble::new(
                format!("`control_socket`: the path has {length} bytes"),
                format!(
                    "Unix sockets allow {}: choose a shorter one, such as {DEFAULT_CONTROL_SOCKET}",
                    limits::MAX_SOCKET_PATH_BYTES
                ),
            );
            sink.problem(&socket.span(), "[daemon]", trouble);
        }
    }
    Daemon {
        data_dir: daemon
            .data_dir
            .as_ref()
            .map_or_else(|| DEFAULT_DATA_DIR.into(), |d| d.get_ref().clone()),
        control_socket: daemon
            .control_socket
            .as_ref()
            .map_or_else(|| DEFAULT_CONTROL_SOCKET.into(), |c| c.get_ref().clone()),
        naa_company_id: daemon
            .naa_company_id
            .as_ref()
            .map(|id| *id.get_ref())
            .unwrap_or_default(),
    }
}

fn build_portals(sink: &mut Sink, portals: &[v1::Portal]) -> Vec<Portal> {
    let mut built: Vec<Portal> = Vec::new();
    for portal in portals {
        let address = *portal.address.get_ref();
        if built.iter().any(|p| p.address == address) {
            let trouble = Trouble::new("is in the file twice", "remove one of them");
            sink.problem(&portal.place.at, &portal.place.thing, trouble);
        }
        built.push(Portal {
            address,
            group: portal
                .group
                .as_ref()
                .and_then(|g| u16::try_from(*g.get_ref()).ok())
                .unwrap_or(1),
            advertise: portal.advertise.as_ref().map(|a| a.get_ref().clone()),
        });
    }
    built
}

fn build_pool(sink: &mut Sink, pool: &v1::Pool) -> Pool {
    let get = |size: &Option<Spanned<Size>>| size.as_ref().map(|s| *s.get_ref());
    let built = Pool {
        grain: pool.grain.as_ref().map_or(Grain::Auto, |g| *g.get_ref()),
        cache: get(&pool.cache).unwrap_or(Size(256 << 20)),
        max_size: get(&pool.max_size),
    };
    if let Some(cache) = pool
        .cache
        .as_ref()
        .filter(|c| c.get_ref().bytes() < limits::MIN_CACHE_BYTES)
    {
        let way_out = format!("write at least {}", Size(limits::MIN_CACHE_BYTES));
        sink.problem(
            &cache.span(),
            "[pool]",
            Trouble::new(
                format!("`cache`: {} is too small to work with", cache.get_ref()),
                way_out,
            ),
        );
    }
    if let Some(max) = pool
        .max_size
        .as_ref()
        .filter(|m| m.get_ref().bytes() < limits::MIN_LUN_BYTES)
    {
        let way_out = format!("write at least {}", Size(limits::MIN_LUN_BYTES));
        sink.problem(
            &max.span(),
            "[pool]",
            Trouble::new(format!("`max_size`: {} holds nothing", max.get_ref()), way_out),
        );
    }
    built
}

fn build_lun(sink: &mut Sink, lun: &v1::Lun) -> Option<Lun> {
    let thing = &lun.place.thing;
    let before = sink.problems.len();
    let block_size = match &lun.block_size {
        None => 512,
        Some(size) if matches!(size.get_ref(), 512 | 4096) => *size.get_ref(),
        Some(size) => {
            let trouble = Trouble::new(
                format!("`block_size`: {} is no size of a disk's block", size.get_ref()),
                "write 512 or 4096",
            );
            sink.problem(&size.span(), thing, trouble);
            512
        }
    };
    let size = *lun.size.get_ref();
    let (smallest, largest) = (Size(limits::MIN_LUN_BYTES), Size(limits::MAX_LUN_BYTES));
    if size < smallest || size > largest {
        let trouble = Trouble::new(
            format!("`size`: {size} is out of range"),
            format!("write a size from {smallest} to {largest}"),
        );
        sink.problem(&lun.size.span(), thing, trouble);
    } else if !size.bytes().is_multiple_of(u64::from(block_size)) {
        let down = size.bytes() - size.bytes() % u64::from(block_size);
        let trouble = Trouble::new(
            format!(
                "`size`: {} bytes are no whole number of {block_size}-byte blocks",
                size.bytes()
            ),
            format!("write for example \"{down}B\""),
        );
        sink.problem(&lun.size.span(), thing, trouble);
    }
    (sink.problems.len() == before).then(|| Lun {
        name: lun.name.get_ref().clone(),
        size,
        block_size,
        write_cache: lun.write_cache.as_ref().is_none_or(|w| *w.get_ref()),
        checksums: lun.checksums.as_ref().map_or(Checksums::Sealed, |c| *c.get_ref()),
        read_only: lun.read_only.as_ref().is_some_and(|r| *r.get_ref()),
    })
}

/// Reports names that no `[[lun]]` has, and names written twice.
fn check_lun_names(sink: &mut Sink, thing: &str, luns: &List<LunName>, known: &[String]) {
    for (i, lun) in luns.get_ref().iter().enumerate() {
        let name = lun.get_ref().as_str();
        if luns
            .get_ref()
            .iter()
            .take(i)
            .any(|earlier| earlier.get_ref() == lun.get_ref())
        {
            sink.problem(
                &lun.span(),
                thing,
                Trouble::new(format!("`luns` names {name:?} twice"), "remove one of them"),
            );
        } else if !sink.damaged && !known.iter().any(|k| k == name) {
            let way_out = match suggest::nearest(name, known.iter().map(String::as_str)) {
                Some(near) => format!("did you mean {near:?}?"),
                None => format!("add a `[[lun]]` with `name = {name:?}`"),
            };
            sink.problem(
                &lun.span(),
                thing,
                Trouble::new(format!("there is no LUN {name:?}"), way_out),
            );
        }
    }
}

fn build_target(sink: &mut Sink, target: &v1::Target, file: &v1::File) -> Option<Target> {
    let thing = &target.place.thing;
    let before = sink.problems.len();
    check_lun_names(sink, thing, &target.luns, &file.lun_names);
    check_portal_groups(sink, target, &file.portals);
    let access = build_access(sink, target);
    let kind = if target.agents {
        agent_target(sink, target)
    } else {
        plain_target(sink, target)
    };
    (sink.problems.len() == before).then_some(())?;
    Some(Target {
        iqn: target.iqn.get_ref().clone(),
        access,
        kind: kind?,
    })
}

fn check_portal_groups(sink: &mut Sink, target: &v1::Target, portals: &[v1::Portal]) {
    let known: Vec<u32> = portals
        .iter()
        .map(|p| p.group.as_ref().map_or(1, |g| *g.get_ref()))
        .collect();
    let thing = &target.place.thing;
    if known.is_empty() {
        if !sink.damaged && sink.problems.iter().all(|p| !p.thing.contains("portal")) {
            let trouble = Trouble::new(
                "no portal serves it",
                "add a `[[portal]]` with `address = \"0.0.0.0:3260\"`",
            );
            sink.problem(&target.place.at, thing, trouble);
        }
        return;
    }
    let Some(groups) = &target.portal_groups else {
        if !known.contains(&1) {
            let trouble = Trouble::new(
                "no portal is in group 1, which is the default",
                "add `portal_groups` with a group that has a portal",
            );
            sink.problem(&target.place.at, thing, trouble);
        }
        return;
    };
    if groups.get_ref().is_empty() {
        let trouble = Trouble::new(
            "`portal_groups` is empty, so nobody could reach the target",
            "write `portal_groups = [1]`",
        );
        sink.problem(&groups.span(), thing, trouble);
    }
    for group in groups.get_ref() {
        if !known.contains(group.get_ref()) {
            let trouble = Trouble::new(
                format!("`portal_groups`: no `[[portal]]` has group {}", group.get_ref()),
                "add a portal of that group, or name another group",
            );
            sink.problem(&group.span(), thing, trouble);
        }
    }
}

fn build_access(sink: &mut Sink, target: &v1::Target) -> Access {
    let thing = &target.place.thing;
    let entries = target
        .initiators
        .as_ref()
        .map_or(&[][..], |list| list.get_ref().as_slice());
    let anyone = entries.iter().find(|e| *e.get_ref() == InitiatorEntry::Anyone);
    if let Some(star) = anyone {
        if entries.len() > 1 {
            let trouble = Trouble::new(
                "`initiators` has \"*\" beside names",
                "write only \"*\" for anyone, or only the names",
            );
            sink.problem(&star.span(), thing, trouble);
        } else if target.chap.is_none() {
            let trouble = Trouble::new(
                "any initiator may log in, without a password",
                "name the initiators, or add `[target.chap]`",
            );
            sink.warn(&star.span(), thing, trouble);
        }
    }
    if entries.is_empty() {
        let trouble = Trouble::new(
            "`initiators` is empty, so nobody may log in",
            "add the initiators' names, or \"*\" for anyone",
        );
        sink.warn(&target.place.at, thing, trouble);
    }
    if let Some(networks) = target.allow_from.as_ref().filter(|n| n.get_ref().is_empty()) {
        let trouble = Trouble::new(
            "`allow_from` is empty, so nobody could log in",
            "add networks, or remove the key to allow every network",
        );
        sink.problem(&networks.span(), thing, trouble);
    }
    let names = entries.iter().filter_map(|e| match e.get_ref() {
        InitiatorEntry::Name(name) => Some(name.clone()),
        InitiatorEntry::Anyone => None,
    });
    let initiators = if anyone.is_some() {
        Initiators::Anyone
    } else {
        Initiators::These(names.collect())
    };
    let networks = target
        .allow_from
        .as_ref()
        .map_or(&[][..], |list| list.get_ref().as_slice());
    Access {
        initiators,
        allow_from: networks.iter().map(|n| *n.get_ref()).collect(),
    }
}

fn groups_of(target: &v1::Target) -> Vec<u16> {
    match &target.portal_groups {
        None => vec![1],
        Some(list) => list
            .get_ref()
            .iter()
            .filter_map(|g| u16::try_from(*g.get_ref()).ok())
            .collect(),
    }
}

/// The limits of a LUN with agents (agent-protocol.md §8): no CHAP, one LUN, one path.
fn agent_target(sink: &mut Sink, target: &v1::Target) -> Option<TargetKind> {
    let thing = &target.place.thing;
    if let Some(chap) = &target.chap {
        let trouble = Trouble::new(
            "`chap` cannot be used with `agents` (agents log in to the LUN without a password)",
            "remove one of them; `initiators` and `allow_from` still say who may log in",
        );
        sink.problem(&chap.place.at, thing, trouble);
    }
    if target.luns.get_ref().len() != 1 {
        let trouble = Trouble::new(
            format!(
                "`luns` has {} entries, but a target with `agents` has exactly one LUN",
                target.luns.get_ref().len()
            ),
            "give each LUN a target of its own",
        );
        sink.problem(&target.luns.span(), thing, trouble);
    }
    if let Some(groups) = target.portal_groups.as_ref().filter(|g| g.get_ref().len() > 1) {
        let trouble = Trouble::new(
            format!(
                "`portal_groups` has {} entries, but a target with `agents` has one path (no MPIO)",
                groups.get_ref().len()
            ),
            "keep one of the groups",
        );
        sink.problem(&groups.span(), thing, trouble);
    }
    if let Some(sessions) = target.max_sessions.as_ref().filter(|m| *m.get_ref() != 1) {
        let trouble = Trouble::new(
            format!(
                "`max_sessions` is {}, but a target with `agents` has one path (no MPIO)",
                sessions.get_ref()
            ),
            "write 1, or remove the key",
        );
        sink.problem(&sessions.span(), thing, trouble);
    }
    let lun = target.luns.get_ref().first()?.get_ref().clone();
    let portal_group = groups_of(target).first().copied()?;
    Some(TargetKind::Agent(AgentTarget { lun, portal_group }))
}

fn plain_target(sink: &mut Sink, target: &v1::Target) -> Option<TargetKind> {
    if target.luns.get_ref().is_empty() {
        let trouble = Trouble::new("`luns` is empty", "name at least one LUN, or remove the target");
        sink.problem(&target.luns.span(), &target.place.thing, trouble);
    }
    let chap = match &target.chap {
        None => None,
        Some(chap) => Some(build_chap(sink, chap)?),
    };
    Some(TargetKind::Plain(PlainTarget {
        luns: target
            .luns
            .get_ref()
            .iter()
            .map(|l| l.get_ref().clone())
            .collect(),
        portal_groups: groups_of(target),
        max_sessions: target.max_sessions.as_ref().map_or(1, |m| *m.get_ref()),
        chap,
    }))
}

fn build_chap(sink: &mut Sink, chap: &v1::Chap) -> Option<Chap> {
    let thing = &chap.place.thing;
    for (key, secret) in [
        ("secret_file", &chap.secret),
        ("mutual_secret_file", &chap.mutual_secret),
    ] {
        let Some(secret) = secret else { continue };
        let length = secret.get_ref().expose().len();
        if length > limits::MAX_CHAP_SECRET_BYTES {
            let way_out = format!("use at most {}", limits::MAX_CHAP_SECRET_BYTES);
            sink.problem(
                &secret.span(),
                thing,
                Trouble::new(format!("`{key}`: the secret has {length} bytes"), way_out),
            );
        } else if length < limits::MIN_CHAP_SECRET_BYTES {
            let way_out = format!(
                "use {} to 16, which every initiator accepts",
                limits::MIN_CHAP_SECRET_BYTES
            );
            let trouble = Trouble::new(
                format!("`{key}`: a secret of {length} bytes can be guessed from one login"),
                way_out,
            );
            sink.warn(&secret.span(), thing, trouble);
        }
    }
    if let (Some(one), Some(other)) = (&chap.secret, &chap.mutual_secret)
        && one.get_ref() == other.get_ref()
    {
        // RFC 7143 §9.2.1: "the same secret MUST NOT be used for both directions": an attacker could reflect the challenge.
        let trouble = Trouble::new(
            "both directions of CHAP have the same secret",
            "use another one in `mutual_secret_file`",
        );
        sink.problem(&other.span(), thing, trouble);
    }
    let algorithms = match &chap.algorithms {
        None => vec![
            ChapAlgorithm::Sha3_256,
            ChapAlgorithm::Sha256,
            ChapAlgorithm::Sha1,
            ChapAlgorithm::Md5,
        ],
        Some(list) if list.get_ref().is_empty() => {
            let trouble = Trouble::new(
                "`algorithms` is empty",
                "name at least one of sha3-256, sha256, sha1, md5, or remove the key",
            );
            sink.problem(&list.span(), thing, trouble);
            return None;
        }
        Some(list) => list.get_ref().iter().map(|a| *a.get_ref()).collect(),
    };
    let credentials = |user: &Option<Spanned<String>>, secret: &Option<Spanned<Secret>>| {
        Some(Credentials {
            user: user.as_ref()?.get_ref().clone(),
            secret: secret.as_ref()?.get_ref().clone(),
        })
    };
    let mutual = credentials(&chap.mutual_user, &chap.mutual_secret);
    Some(Chap {
        initiator: credentials(&chap.user, &chap.secret)?,
        mutual,
        algorithms,
    })
}

/// A LUN with agents is on one target only; a LUN on no target is worth a warning.
fn check_sharing(sink: &mut Sink, file: &v1::File) {
    for lun in &file.luns {
        let name = lun.name.get_ref();
        let serving: Vec<&v1::Target> = file
            .targets
            .iter()
            .filter(|t| t.luns.get_ref().iter().any(|l| l.get_ref() == name))
            .collect();
        if let Some(agent) = serving.iter().find(|t| t.agents)
            && let Some(other) = serving.iter().find(|t| t.place.at != agent.place.at)
        {
            let trouble = Trouble::new(
                format!(
                    "LUN {name} is also on target \"{}\", but a LUN with `agents` has one path",
                    other.iqn.get_ref()
                ),
                "serve it from one target only",
            );
            sink.problem(&agent.place.at, &agent.place.thing, trouble);
        }
        if serving.is_empty() && !sink.damaged && sink.problems.is_empty() {
            let trouble = Trouble::new("no target serves it", "add it to the `luns` of a `[[target]]`");
            sink.warn(&lun.place.at, &lun.place.thing, trouble);
        }
    }
}

fn build_agents(agents: Option<&v1::Agents>, targets: &[Target]) -> Option<Agents> {
    if agents.is_none() && !targets.iter().any(Target::has_agents) {
        return None;
    }
    let listen = agents.and_then(|a| a.listen.as_ref()).map(|l| *l.get_ref());
    Some(Agents {
        listen: listen.unwrap_or_else(|| (std::net::Ipv4Addr::UNSPECIFIED, limits::AGENT_PORT).into()),
        discovery: agents
            .and_then(|a| a.discovery.as_ref())
            .is_some_and(|d| *d.get_ref()),
        on_failure: agents
            .and_then(|a| a.on_failure.as_ref())
            .map_or(OnFailure::Fail, |o| *o.get_ref()),
    })
}

fn build_schedule(sink: &mut Sink, schedule: &v1::Schedule, file: &v1::File) -> Schedule {
    let thing = &schedule.place.thing;
    check_lun_names(sink, thing, &schedule.luns, &file.lun_names);
    if schedule.luns.get_ref().is_empty() {
        let trouble = Trouble::new("`luns` is empty", "name at least one LUN, or remove the schedule");
        sink.problem(&schedule.luns.span(), thing, trouble);
    }
    let consistency = schedule
        .consistency
        .as_ref()
        .map_or(Consistency::Crash, |c| *c.get_ref());
    if let Some(written) = schedule
        .consistency
        .as_ref()
        .filter(|c| *c.get_ref() > Consistency::Crash)
    {
        for lun in schedule.luns.get_ref() {
            let name = lun.get_ref();
            let agents = file
                .targets
                .iter()
                .any(|t| t.agents && t.luns.get_ref().iter().any(|l| l.get_ref() == name));
            if !agents && file.lun_names.iter().any(|k| k == name.as_str()) && !sink.damaged {
                let trouble = Trouble::new(
                    format!(
                        "`consistency` is {consistency}, but no target with `agents = true` serves {name}"
                    ),
                    "set `agents = true` on its target, or write `consistency = \"crash\"`",
                );
                sink.problem(&written.span(), thing, trouble);
            }
        }
    }
    if let Some((place, _)) = schedule
        .keep
        .as_ref()
        .filter(|(_, keep)| *keep == Keep::default())
    {
        let trouble = Trouble::new(
            "keeps nothing",
            "write for example { last = 4, daily = 7 }, or remove the key to keep everything",
        );
        sink.problem(&place.at, &place.thing, trouble);
    }
    let (cron_text, cron) = schedule.cron.get_ref().clone();
    Schedule {
        name: schedule.name.get_ref().clone(),
        luns: schedule
            .luns
            .get_ref()
            .iter()
            .map(|l| l.get_ref().clone())
            .collect(),
        cron_text,
        cron,
        timezone: schedule.timezone.as_ref().map(|t| t.get_ref().clone()),
        consistency,
        on_failure: schedule
            .on_failure
            .as_ref()
            .map_or(OnFailure::CrashConsistent, |o| *o.get_ref()),
        keep: schedule.keep.as_ref().map(|(_, keep)| *keep),
        lock: schedule.lock.as_ref().map(|l| *l.get_ref()),
    }
}

fn build_http(sink: &mut Sink, http: v1::Http) -> Http {
    let thing = &http.place.thing;
    if !http.listen.get_ref().ip().is_loopback() && (http.tls.is_none() || http.users.is_empty()) {
        let trouble = Trouble::new(
            format!("`listen`: {} is reached from other hosts", http.listen.get_ref()),
            "add `tls` and at least one `[[http.user]]`, or listen on 127.0.0.1",
        );
        sink.problem(&http.listen.span(), thing, trouble);
    }
    unique(
        sink,
        "http.user",
        http.users
            .iter()
            .map(|u| (u.name.get_ref().as_str(), u.name.span())),
    );
    Http {
        listen: http.listen.into_inner(),
        tls: http.tls.map(|t| Tls {
            cert: t.cert,
            key: t.key,
        }),
        users: http
            .users
            .into_iter()
            .map(|u| HttpUser {
                name: u.name.into_inner(),
                role: u.role,
                password_hash: u.password_hash,
            })
            .collect(),
    }
}

/// Two listeners cannot share an address; only `[metrics]` may join `[http]`.
fn check_listeners(sink: &mut Sink, file: &v1::File, agents: Option<&Agents>) {
    let mut taken: Vec<(std::net::SocketAddr, String)> = file
        .portals
        .iter()
        .map(|p| (*p.address.get_ref(), p.place.thing.clone()))
        .collect();
    let mut claim = |sink: &mut Sink, address: std::net::SocketAddr, place: &Place| {
        if let Some((_, other)) = taken.iter().find(|(a, _)| *a == address) {
            let trouble = Trouble::new(
                format!("`listen`: {address} is already taken by {other}"),
                "choose another port",
            );
            sink.problem(&place.at, &place.thing, trouble);
        }
        taken.push((address, place.thing.clone()));
    };
    if let (Some(agents), Some(section)) = (agents, &file.agents) {
        claim(sink, agents.listen, &section.place);
    }
    if let Some(http) = &file.http {
        claim(sink, *http.listen.get_ref(), &http.place);
    }
    if let Some(metrics) = &file.metrics
        && file
            .http
            .as_ref()
            .is_none_or(|http| http.listen.get_ref() != metrics.listen.get_ref())
    {
        claim(sink, *metrics.listen.get_ref(), &metrics.place);
    }
}
