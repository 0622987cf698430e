//! From the file as written to the configuration as meant: what the parts mean for each other.

mod around;
mod target;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeTable;

use self::around::{build_agents, build_http, build_schedule, check_listeners};
use self::target::{build_target, check_sharing};
use crate::config::{Checksums, Config, Daemon, Grain, Lun, Metrics, Origin, Pool, Portal, Target};
use crate::file::reader::Sink;
use crate::file::v1::{self, List};
use crate::limits;
use crate::name::LunName;
use crate::problem::{Problem, Problems, Trouble};
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
        daemon_of(file).map(|daemon| daemon.control_socket)
    }

    /// Only where the data is, for work on the store of a stopped daemon.
    ///
    /// # Errors
    /// When the file cannot be read or its `[daemon]` section is wrong.
    pub fn data_dir_of(file: &Path) -> Result<PathBuf, Problems> {
        daemon_of(file).map(|daemon| daemon.data_dir)
    }
}

fn daemon_of(file: &Path) -> Result<Daemon, Problems> {
    let text = read_text(file)?;
    let mut sink = Sink::new(&text, file);
    let (table, errors) = DeTable::parse_recoverable(&text);
    report_syntax(&mut sink, &errors);
    let written = v1::read_daemon_only(&mut sink, table.get_ref());
    let daemon = build_daemon(&mut sink, &written);
    finish(sink, daemon)
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
    let session_memory = daemon.session_memory.as_ref();
    if let Some(memory) = session_memory.filter(|m| m.get_ref().bytes() < limits::MIN_SESSION_MEMORY_BYTES) {
        let trouble = Trouble::new(
            format!(
                "`session_memory`: {} is less than one large command needs",
                memory.get_ref()
            ),
            format!("write at least {}", Size(limits::MIN_SESSION_MEMORY_BYTES)),
        );
        sink.problem(&memory.span(), "[daemon]", trouble);
    }
    Daemon {
        session_memory: session_memory.map_or(limits::SESSION_MEMORY, |m| *m.get_ref()),
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
