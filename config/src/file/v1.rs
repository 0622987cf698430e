//! The first version of the file format: one struct per section, each value with its place.
//!
//! A struct here says that its own keys are right one by one. What they mean for each other is `check`'s business.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use croner::Cron;
use ipnet::IpNet;
use jiff::tz::TimeZone;
use toml::Spanned;
use toml::de::DeTable;

use super::reader::{Section, Sink};
use crate::config::{ChapAlgorithm, Checksums, CompanyId, Consistency, Grain, OnFailure, Role};
use crate::limits;
use crate::listen::{parse_advertise, parse_listen};
use crate::name::{IscsiName, LunName};
use crate::problem::Trouble;
use crate::schedule::{Keep, parse_cron, parse_timezone};
use crate::secret::Secret;
use crate::size::Size;

/// A list whose entries keep their places.
pub(crate) type List<T> = Spanned<Vec<Spanned<T>>>;

/// Where a section stands and how problems name it.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) at: std::ops::Range<usize>,
    pub(crate) thing: String,
}

pub(crate) struct File {
    pub(crate) daemon: Daemon,
    pub(crate) portals: Vec<Portal>,
    pub(crate) pool: Pool,
    pub(crate) luns: Vec<Lun>,
    /// Every name written in a `[[lun]]`, also of those that have another problem: a reference to them is right.
    pub(crate) lun_names: Vec<String>,
    pub(crate) targets: Vec<Target>,
    pub(crate) agents: Option<Agents>,
    pub(crate) schedules: Vec<Schedule>,
    pub(crate) http: Option<Http>,
    pub(crate) metrics: Option<Metrics>,
}

#[derive(Default)]
pub(crate) struct Daemon {
    pub(crate) data_dir: Option<Spanned<PathBuf>>,
    pub(crate) control_socket: Option<Spanned<PathBuf>>,
    pub(crate) naa_company_id: Option<Spanned<CompanyId>>,
    pub(crate) session_memory: Option<Spanned<Size>>,
}

pub(crate) struct Portal {
    pub(crate) place: Place,
    pub(crate) address: Spanned<SocketAddr>,
    pub(crate) group: Option<Spanned<u32>>,
    pub(crate) advertise: Option<Spanned<String>>,
}

#[derive(Default)]
pub(crate) struct Pool {
    pub(crate) grain: Option<Spanned<Grain>>,
    pub(crate) cache: Option<Spanned<Size>>,
    pub(crate) max_size: Option<Spanned<Size>>,
}

pub(crate) struct Lun {
    pub(crate) place: Place,
    pub(crate) name: Spanned<LunName>,
    pub(crate) size: Spanned<Size>,
    pub(crate) block_size: Option<Spanned<u32>>,
    pub(crate) write_cache: Option<Spanned<bool>>,
    pub(crate) checksums: Option<Spanned<Checksums>>,
    pub(crate) read_only: Option<Spanned<bool>>,
}

/// An entry of `initiators`.
#[derive(Clone, PartialEq)]
pub(crate) enum InitiatorEntry {
    Anyone,
    Name(IscsiName),
}

pub(crate) struct Target {
    pub(crate) place: Place,
    pub(crate) iqn: Spanned<IscsiName>,
    pub(crate) luns: List<LunName>,
    pub(crate) portal_groups: Option<List<u32>>,
    pub(crate) initiators: Option<List<InitiatorEntry>>,
    pub(crate) allow_from: Option<List<IpNet>>,
    pub(crate) max_sessions: Option<Spanned<u32>>,
    pub(crate) agents: bool,
    pub(crate) chap: Option<Chap>,
}

pub(crate) struct Chap {
    pub(crate) place: Place,
    pub(crate) user: Option<Spanned<String>>,
    pub(crate) secret: Option<Spanned<Secret>>,
    pub(crate) mutual_user: Option<Spanned<String>>,
    pub(crate) mutual_secret: Option<Spanned<Secret>>,
    pub(crate) algorithms: Option<List<ChapAlgorithm>>,
}

pub(crate) struct Agents {
    pub(crate) place: Place,
    pub(crate) listen: Option<Spanned<SocketAddr>>,
    pub(crate) discovery: Option<Spanned<bool>>,
    pub(crate) on_failure: Option<Spanned<OnFailure>>,
}

pub(crate) struct Schedule {
    pub(crate) place: Place,
    pub(crate) name: Spanned<LunName>,
    pub(crate) luns: List<LunName>,
    pub(crate) cron: Spanned<(String, Cron)>,
    pub(crate) timezone: Option<Spanned<TimeZone>>,
    pub(crate) consistency: Option<Spanned<Consistency>>,
    pub(crate) on_failure: Option<Spanned<OnFailure>>,
    pub(crate) keep: Option<(Place, Keep)>,
    pub(crate) lock: Option<Spanned<Duration>>,
}

pub(crate) struct Http {
    pub(crate) place: Place,
    pub(crate) listen: Spanned<SocketAddr>,
    pub(crate) tls: Option<Tls>,
    pub(crate) users: Vec<HttpUser>,
}

pub(crate) struct Tls {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

pub(crate) struct HttpUser {
    pub(crate) name: Spanned<String>,
    pub(crate) role: Role,
    pub(crate) password_hash: Secret,
}

pub(crate) struct Metrics {
    pub(crate) place: Place,
    pub(crate) listen: Spanned<SocketAddr>,
}

impl Section<'_, '_> {
    fn place(&self) -> Place {
        Place {
            at: self.at.clone(),
            thing: self.thing.clone(),
        }
    }
}

/// Reads the whole document.
pub(crate) fn read(sink: &mut Sink, table: &DeTable<'_>) -> File {
    let mut root = Section::new(table, 0..0, "the file");
    let daemon = root
        .table(sink, "daemon", "[daemon]")
        .map(|s| read_daemon(sink, s))
        .unwrap_or_default();
    let portals = root.tables(sink, "portal", limits::MAX_PORTALS, "portal", "address");
    let portals = portals.into_iter().filter_map(|s| read_portal(sink, s)).collect();
    let pool = root
        .table(sink, "pool", "[pool]")
        .map(|s| read_pool(sink, s))
        .unwrap_or_default();
    let luns = root.tables(sink, "lun", limits::MAX_LUNS, "lun", "name");
    let lun_names = luns
        .iter()
        .filter_map(|s| s.peek("name"))
        .map(str::to_owned)
        .collect();
    let luns = luns.into_iter().filter_map(|s| read_lun(sink, s)).collect();
    let targets = root.tables(sink, "target", limits::MAX_TARGETS, "target", "iqn");
    let targets = targets.into_iter().filter_map(|s| read_target(sink, s)).collect();
    let agents = root
        .table(sink, "agents", "[agents]")
        .map(|s| read_agents(sink, s));
    let schedules = root.tables(sink, "schedule", limits::MAX_SCHEDULES, "schedule", "name");
    let schedules = schedules
        .into_iter()
        .filter_map(|s| read_schedule(sink, s))
        .collect();
    let http = root
        .table(sink, "http", "[http]")
        .and_then(|s| read_http(sink, s));
    let metrics = root
        .table(sink, "metrics", "[metrics]")
        .and_then(|s| read_metrics(sink, s));
    root.finish(sink);
    File {
        daemon,
        portals,
        pool,
        luns,
        lun_names,
        targets,
        agents,
        schedules,
        http,
        metrics,
    }
}

/// Reads only `[daemon]`: for clients, which may not read the secrets that the rest of the file names.
pub(crate) fn read_daemon_only(sink: &mut Sink, table: &DeTable<'_>) -> Daemon {
    let mut root = Section::new(table, 0..0, "the file");
    root.table(sink, "daemon", "[daemon]")
        .map(|s| read_daemon(sink, s))
        .unwrap_or_default()
}

fn path(sink: &Sink) -> impl Fn(&str) -> Result<PathBuf, Trouble> + use<> {
    let base = sink.directory();
    move |text| match text {
        "" => Err(Trouble::new("the path is empty", "write a path")),
        text => Ok(base.join(text)),
    }
}

fn read_daemon(sink: &mut Sink, mut s: Section<'_, '_>) -> Daemon {
    let path = path(sink);
    let daemon = Daemon {
        data_dir: s.text(sink, "data_dir", &path),
        control_socket: s.text(sink, "control_socket", &path),
        naa_company_id: s.text(sink, "naa_company_id", str::parse),
        session_memory: s.text(sink, "session_memory", str::parse),
    };
    s.finish(sink);
    daemon
}

fn read_portal(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<Portal> {
    let address = s.required(sink, "address", "\"0.0.0.0:3260\"", |t| {
        parse_listen(t, limits::ISCSI_PORT)
    });
    let group = s.integer(sink, "group", 1..65_536);
    let advertise = s.text(sink, "advertise", |t| parse_advertise(t, limits::ISCSI_PORT));
    let place = s.place();
    s.finish(sink);
    Some(Portal {
        place,
        address: address?,
        group,
        advertise,
    })
}

fn read_pool(sink: &mut Sink, mut s: Section<'_, '_>) -> Pool {
    let pool = Pool {
        grain: s.text(sink, "grain", str::parse),
        cache: s.text(sink, "cache", str::parse),
        max_size: s.text(sink, "max_size", str::parse),
    };
    s.finish(sink);
    pool
}

fn read_lun(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<Lun> {
    let name = s.required(sink, "name", "\"sql01\"", str::parse);
    let size = s.required(sink, "size", "\"500GiB\"", str::parse);
    let block_size = s.integer(sink, "block_size", 0..1 << 32);
    let write_cache = s.boolean(sink, "write_cache");
    let checksums = s.text(sink, "checksums", str::parse);
    let read_only = s.boolean(sink, "read_only");
    let place = s.place();
    s.finish(sink);
    Some(Lun {
        place,
        name: name?,
        size: size?,
        block_size,
        write_cache,
        checksums,
        read_only,
    })
}

fn read_target(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<Target> {
    let iqn = s.required(sink, "iqn", "\"iqn.2026-11.com.example:sql01\"", str::parse);
    if !s.has("luns") {
        s.missing(sink, "luns", "[\"sql01\"]");
    }
    let luns = s.texts(sink, "luns", limits::MAX_LUNS_PER_TARGET, str::parse);
    let portal_groups = s.integers(sink, "portal_groups", limits::MAX_PORTALS, 1..65_536);
    let initiators = s.texts(sink, "initiators", limits::MAX_ACCESS_ENTRIES, parse_initiator);
    let allow_from = s.texts(sink, "allow_from", limits::MAX_ACCESS_ENTRIES, parse_network);
    let max_sessions = s.integer(
        sink,
        "max_sessions",
        1..u64::from(limits::MAX_SESSIONS_PER_INITIATOR) + 1,
    );
    let agents = s.boolean(sink, "agents").is_some_and(Spanned::into_inner);
    let thing = s.thing.clone();
    let chap = s.table(sink, "chap", thing).map(|c| read_chap(sink, c));
    let place = s.place();
    s.finish(sink);
    Some(Target {
        place,
        iqn: iqn?,
        luns: luns?,
        portal_groups,
        initiators,
        allow_from,
        max_sessions,
        agents,
        chap,
    })
}

fn read_chap(sink: &mut Sink, mut s: Section<'_, '_>) -> Chap {
    let path = path(sink);
    let secret = |text: &str| Secret::read(&path(text)?);
    let chap = Chap {
        user: s.required(sink, "user", "\"sql01\"", parse_user),
        secret: s.required(sink, "secret_file", "\"/etc/stillpoint/sql01.chap\"", secret),
        mutual_user: s.text(sink, "mutual_user", parse_user),
        mutual_secret: s.text(sink, "mutual_secret_file", secret),
        algorithms: s.texts(sink, "algorithms", 4, str::parse),
        place: s.place(),
    };
    if s.has("mutual_user") != s.has("mutual_secret_file") {
        let (there, gone) = if s.has("mutual_user") {
            ("mutual_user", "mutual_secret_file")
        } else {
            ("mutual_secret_file", "mutual_user")
        };
        let trouble = Trouble::new(
            format!("`{there}` without `{gone}`"),
            "mutual CHAP takes both: add the other, or remove this one",
        );
        sink.problem(&s.at, &s.thing, trouble);
    }
    s.finish(sink);
    chap
}

fn read_agents(sink: &mut Sink, mut s: Section<'_, '_>) -> Agents {
    let agents = Agents {
        place: s.place(),
        listen: s.text(sink, "listen", |t| parse_listen(t, limits::AGENT_PORT)),
        discovery: s.boolean(sink, "discovery"),
        on_failure: s.text(sink, "on_failure", str::parse),
    };
    s.finish(sink);
    agents
}

fn read_schedule(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<Schedule> {
    sink.unserved(&s.at, "schedule");
    let name = s.required(sink, "name", "\"sql01-hourly\"", str::parse);
    if !s.has("luns") {
        s.missing(sink, "luns", "[\"sql01\"]");
    }
    let luns = s.texts(sink, "luns", limits::MAX_LUNS, str::parse);
    let cron = s.required(sink, "cron", "\"0 * * * *\"", |t| {
        Ok((t.to_owned(), parse_cron(t)?))
    });
    let timezone = s.text(sink, "timezone", parse_timezone);
    let consistency = s.text(sink, "consistency", str::parse);
    let on_failure = s.text(sink, "on_failure", str::parse);
    let thing = format!("{}: `keep`", s.thing);
    let keep = s.table(sink, "keep", thing).map(|k| read_keep(sink, k));
    let lock = s.text(sink, "lock", crate::duration::parse_duration);
    let place = s.place();
    s.finish(sink);
    Some(Schedule {
        place,
        name: name?,
        luns: luns?,
        cron: cron?,
        timezone,
        consistency,
        on_failure,
        keep,
        lock,
    })
}

fn read_keep(sink: &mut Sink, mut s: Section<'_, '_>) -> (Place, Keep) {
    let mut count = |key| s.integer(sink, key, 0..100_000).map_or(0, Spanned::into_inner);
    let keep = Keep {
        last: count("last"),
        hourly: count("hourly"),
        daily: count("daily"),
        weekly: count("weekly"),
        monthly: count("monthly"),
        yearly: count("yearly"),
    };
    let place = s.place();
    s.finish(sink);
    (place, keep)
}

fn read_http(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<Http> {
    sink.unserved(&s.at, "http");
    let listen = s.required(sink, "listen", "\"127.0.0.1:8480\"", |t| parse_listen(t, 8480));
    let tls = s
        .table(sink, "tls", "[http] `tls`")
        .and_then(|t| read_tls(sink, t));
    let users = s.tables(sink, "user", 256, "http.user", "name");
    let users = users
        .into_iter()
        .filter_map(|u| read_http_user(sink, u))
        .collect();
    let place = s.place();
    s.finish(sink);
    Some(Http {
        place,
        listen: listen?,
        tls,
        users,
    })
}

fn read_tls(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<Tls> {
    let path = path(sink);
    let existing = |text: &str| {
        let path = path(text)?;
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() => Ok(path),
            Ok(_) => Err(Trouble::new(
                format!("{} is not a file", path.display()),
                "name a PEM file",
            )),
            Err(e) => Err(Trouble::new(
                format!("cannot read {} ({e})", path.display()),
                "create the file, or correct the path",
            )),
        }
    };
    let cert = s.required(sink, "cert", "\"/etc/stillpoint/cert.pem\"", existing);
    let key = s.required(sink, "key", "\"/etc/stillpoint/key.pem\"", existing);
    s.finish(sink);
    Some(Tls {
        cert: cert?.into_inner(),
        key: key?.into_inner(),
    })
}

fn read_http_user(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<HttpUser> {
    let path = path(sink);
    let name = s.required(sink, "name", "\"ops\"", parse_user);
    let role = s.required(sink, "role", "\"operator\"", str::parse);
    let hash = s.required(
        sink,
        "password_file",
        "\"/etc/stillpoint/ops.password\"",
        |text| {
            let hash = Secret::read(&path(text)?)?;
            if hash.expose().starts_with(b"$argon2") {
                return Ok(hash);
            }
            Err(Trouble::new(
                "the file does not hold an Argon2 hash",
                "write one in PHC format, beginning with $argon2id$",
            ))
        },
    );
    s.finish(sink);
    Some(HttpUser {
        name: name?,
        role: role?.into_inner(),
        password_hash: hash?.into_inner(),
    })
}

fn read_metrics(sink: &mut Sink, mut s: Section<'_, '_>) -> Option<Metrics> {
    sink.unserved(&s.at, "metrics");
    let listen = s.required(sink, "listen", "\"127.0.0.1:9480\"", |t| parse_listen(t, 9480));
    let place = s.place();
    s.finish(sink);
    Some(Metrics {
        place,
        listen: listen?,
    })
}

fn parse_initiator(text: &str) -> Result<InitiatorEntry, Trouble> {
    match text {
        "*" => Ok(InitiatorEntry::Anyone),
        text if text.contains('*') => Err(Trouble::new(
            format!("{text:?}: `*` stands only alone"),
            "write every name in full, or only \"*\" for anyone",
        )),
        text => text.parse().map(InitiatorEntry::Name),
    }
}

fn parse_network(text: &str) -> Result<IpNet, Trouble> {
    let network = match text.parse::<std::net::IpAddr>() {
        Ok(host) => IpNet::from(host),
        Err(_) => text.parse::<IpNet>().map_err(|_| {
            Trouble::new(
                format!("{text:?} is not a network"),
                "write for example \"10.0.0.0/8\" or \"fd00::/8\"",
            )
        })?,
    };
    if network.addr() != network.network() {
        let way_out = format!(
            "write {:?} for the network, or {:?} for the host",
            network.trunc().to_string(),
            network.addr().to_string()
        );
        return Err(Trouble::new(
            format!("{text:?} has bits beyond its prefix"),
            way_out,
        ));
    }
    Ok(network)
}

fn parse_user(text: &str) -> Result<String, Trouble> {
    if text.is_empty() || text.len() > 255 || text.chars().any(char::is_control) {
        return Err(Trouble::new(
            format!("{text:?} is not a user name"),
            "use 1 to 255 printable characters",
        ));
    }
    Ok(text.to_owned())
}
