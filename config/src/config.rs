//! The configuration as meant. Only this crate's checks can make one from text, so whoever holds one need not look again.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::name::{IscsiName, LunName};
use crate::problem::{Problem, Trouble};
use crate::schedule::Schedule;
use crate::secret::Secret;
use crate::size::Size;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it comes from.
    pub origin: Origin,
    /// `[daemon]`.
    pub daemon: Daemon,
    /// `[[portal]]`, in the order of the file.
    pub portals: Vec<Portal>,
    /// `[pool]`.
    pub pool: Pool,
    /// `[[lun]]`, in the order of the file.
    pub luns: Vec<Lun>,
    /// `[[target]]`, in the order of the file.
    pub targets: Vec<Target>,
    /// `[agents]`; present as well when a target has `agents = true`.
    pub agents: Option<Agents>,
    /// `[[schedule]]`.
    pub schedules: Vec<Schedule>,
    /// `[http]`.
    pub http: Option<Http>,
    /// `[metrics]`.
    pub metrics: Option<Metrics>,
    /// Nothing wrong, but worth a look: shown by `config check`, at start and in `status`.
    pub warnings: Vec<Problem>,
    /// Parts of the file that are checked, but that this version does not serve yet.
    pub(crate) unserved: Vec<Unserved>,
}

impl Config {
    /// Parts of the file that are parsed and checked but not served yet: `serve` warns once.
    #[must_use]
    pub fn unserved(&self) -> &[Unserved] {
        &self.unserved
    }

    /// The LUN of that name.
    #[must_use]
    pub fn lun(&self, name: &str) -> Option<&Lun> {
        self.luns.iter().find(|lun| lun.name.as_str() == name)
    }

    /// The target of that iSCSI name.
    #[must_use]
    pub fn target(&self, iqn: &str) -> Option<&Target> {
        self.targets.iter().find(|target| target.iqn.as_str() == iqn)
    }

    /// The targets that serve this LUN.
    pub fn targets_of(&self, lun: &str) -> impl Iterator<Item = &Target> {
        self.targets
            .iter()
            .filter(move |target| target.luns().iter().any(|name| name.as_str() == lun))
    }
}

/// Where a configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Built in: no file was given and none found.
    Embedded,
    /// Read from this file.
    File(PathBuf),
}

/// A part of the file that is checked, but not served yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unserved {
    /// The section or key, as written.
    pub section: String,
    /// Line of the file.
    pub line: usize,
}

/// `[daemon]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// Holds the store, the agents' keys and the event log.
    pub data_dir: PathBuf,
    /// Unix socket of the control plane.
    pub control_socket: PathBuf,
    /// Company id in the NAA-6 identities of new LUNs.
    pub naa_company_id: CompanyId,
    /// What all sessions together may hold of data on its way.
    pub session_memory: Size,
}

/// IEEE company id (24 bits) for NAA-6 designators (SPC-4 §7.8.6.6.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompanyId(pub [u8; 3]);

impl Default for CompanyId {
    /// A locally administered id (second-lowest bit of the first byte): nobody else's.
    fn default() -> Self {
        Self([0x02, 0x53, 0x50])
    }
}

impl FromStr for CompanyId {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<Self, Trouble> {
        let bytes: Option<Vec<u8>> = text
            .split(['-', ':'])
            .map(|byte| {
                u8::from_str_radix(byte, 16)
                    .ok()
                    .filter(|_| byte.len() == 2 && !byte.starts_with('+'))
            })
            .collect();
        bytes
            .and_then(|b| <[u8; 3]>::try_from(b).ok())
            .map(Self)
            .ok_or_else(|| {
                Trouble::new(
                    format!("{text:?} is not a company id"),
                    "write three bytes, as in \"02-53-50\"",
                )
            })
    }
}

impl fmt::Display for CompanyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c] = self.0;
        write!(f, "{a:02x}-{b:02x}-{c:02x}")
    }
}

/// `[[portal]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Portal {
    /// Listening address.
    pub address: SocketAddr,
    /// TargetPortalGroupTag, 1 to 65535.
    pub group: u16,
    /// `host:port` that SendTargets says instead of the address.
    pub advertise: Option<String>,
}

/// `[pool]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Grain size; fixed when the pool is created.
    pub grain: Grain,
    /// Bound of the map cache in RAM.
    pub cache: Size,
    /// The pool does not grow beyond this.
    pub max_size: Option<Size>,
}

/// Grain size of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// By the size of the pool.
    Auto,
    /// 4, 8, 16 or 64 KiB, in bytes.
    Bytes(u32),
}

impl Grain {
    /// The grain size in bytes: 4 KiB, 16 KiB above 4 TiB of pool, 64 KiB above 32 TiB, so that the map stays small.
    #[must_use]
    pub fn bytes(self, pool_size: Option<Size>) -> u32 {
        match (self, pool_size) {
            (Self::Bytes(bytes), _) => bytes,
            (Self::Auto, Some(Size(size))) if size > 32 << 40 => 64 << 10,
            (Self::Auto, Some(Size(size))) if size > 4 << 40 => 16 << 10,
            (Self::Auto, _) => 4 << 10,
        }
    }
}

/// `[[lun]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lun {
    /// The name used everywhere.
    pub name: LunName,
    /// A multiple of the block size.
    pub size: Size,
    /// 512 or 4096 bytes.
    pub block_size: u32,
    /// First value of WCE; what an initiator saved wins.
    pub write_cache: bool,
    /// When grains get a checksum.
    pub checksums: Checksums,
    /// No initiator may write.
    pub read_only: bool,
}

/// When grains get a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checksums {
    /// Never.
    Off,
    /// When a snapshot holds them.
    Sealed,
    /// At each write.
    Always,
}

/// `[[target]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its iSCSI name.
    pub iqn: IscsiName,
    /// Who may log in.
    pub access: Access,
    /// What it serves, and how.
    pub kind: TargetKind,
}

/// The two kinds of targets. The limits of a target with agents are in its type: there is nothing to check later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetKind {
    /// Any number of LUNs, portal groups and sessions; CHAP.
    Plain(PlainTarget),
    /// Used with snapshot agents: one LUN, one path, no CHAP.
    Agent(AgentTarget),
}

/// A target without agents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainTarget {
    /// LUN 0, 1, …
    pub luns: Vec<LunName>,
    /// Portal groups through which it is reached.
    pub portal_groups: Vec<u16>,
    /// Sessions of one initiator.
    pub max_sessions: u32,
    /// Authentication.
    pub chap: Option<Chap>,
}

/// A target whose LUN is used with snapshot agents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentTarget {
    /// LUN 0.
    pub lun: LunName,
    /// The one portal group through which it is reached.
    pub portal_group: u16,
}

impl Target {
    /// The LUNs, LUN 0 first.
    #[must_use]
    pub fn luns(&self) -> &[LunName] {
        match &self.kind {
            TargetKind::Plain(plain) => &plain.luns,
            TargetKind::Agent(agent) => std::slice::from_ref(&agent.lun),
        }
    }

    /// The portal groups.
    #[must_use]
    pub fn portal_groups(&self) -> &[u16] {
        match &self.kind {
            TargetKind::Plain(plain) => &plain.portal_groups,
            TargetKind::Agent(agent) => std::slice::from_ref(&agent.portal_group),
        }
    }

    /// Sessions of one initiator; 1 with agents.
    #[must_use]
    pub fn max_sessions(&self) -> u32 {
        match &self.kind {
            TargetKind::Plain(plain) => plain.max_sessions,
            TargetKind::Agent(_) => 1,
        }
    }

    /// Authentication; none with agents.
    #[must_use]
    pub fn chap(&self) -> Option<&Chap> {
        match &self.kind {
            TargetKind::Plain(plain) => plain.chap.as_ref(),
            TargetKind::Agent(_) => None,
        }
    }

    /// Whether the LUN is used with snapshot agents.
    #[must_use]
    pub fn has_agents(&self) -> bool {
        matches!(self.kind, TargetKind::Agent(_))
    }
}

/// Who may log in to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// By iSCSI name.
    pub initiators: Initiators,
    /// By source network; empty means every network.
    pub allow_from: Vec<IpNet>,
}

impl Access {
    /// Whether this initiator may log in from this address.
    #[must_use]
    pub fn admits(&self, initiator: &str, from: IpAddr) -> bool {
        // A dual-stack socket reports IPv4 peers as ::ffff:a.b.c.d; the operator wrote a.b.c.d.
        let from = from.to_canonical();
        self.initiators.admits(initiator)
            && (self.allow_from.is_empty() || self.allow_from.iter().any(|net| net.contains(&from)))
    }
}

/// The initiators of an access list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Initiators {
    /// `"*"`.
    Anyone,
    /// These; empty means nobody.
    These(Vec<IscsiName>),
}

impl Initiators {
    /// Whether the list names this initiator; upper and lower case are the same (RFC 3722).
    #[must_use]
    pub fn admits(&self, initiator: &str) -> bool {
        match self {
            Self::Anyone => true,
            Self::These(names) => {
                let initiator = initiator.to_lowercase();
                names.iter().any(|name| name.as_str() == initiator)
            }
        }
    }
}

/// CHAP of a target (RFC 7143 §12.1.3, RFC 1994).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chap {
    /// What the initiator proves.
    pub initiator: Credentials,
    /// What the target proves in return.
    pub mutual: Option<Credentials>,
    /// Offered in this order.
    pub algorithms: Vec<ChapAlgorithm>,
}

/// A user and its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// CHAP_N.
    pub user: String,
    /// The shared secret.
    pub secret: Secret,
}

/// CHAP_A (IANA "PPP Authentication Algorithms").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChapAlgorithm {
    /// 8.
    #[serde(rename = "sha3-256")]
    Sha3_256,
    /// 7.
    Sha256,
    /// 6.
    Sha1,
    /// 5: the one that every initiator knows.
    Md5,
}

/// `[agents]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agents {
    /// Registration channel.
    pub listen: SocketAddr,
    /// Answers "scan for targets".
    pub discovery: bool,
    /// Default of manual snapshots.
    pub on_failure: OnFailure,
}

/// `[http]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// Pages and API.
    pub listen: SocketAddr,
    /// Needed beyond loopback.
    pub tls: Option<Tls>,
    /// Needed beyond loopback.
    pub users: Vec<HttpUser>,
}

/// Certificate and key, as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// PEM certificate chain.
    pub cert: PathBuf,
    /// PEM key.
    pub key: PathBuf,
}

/// `[[http.user]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpUser {
    /// Login name.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Argon2 hash in PHC format.
    pub password_hash: Secret,
}

/// `[metrics]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    /// May be the same as `http.listen`.
    pub listen: SocketAddr,
}

/// Makes an enum with one word per variant that `FromStr`, `Display` and the error text share.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal, { $($(#[$vdoc:meta])* $variant:ident => $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $word)] $variant),+ }

        impl $name {
            /// Every word, in order.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word of the configuration file.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl FromStr for $name {
            type Err = Trouble;

            fn from_str(text: &str) -> Result<Self, Trouble> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(unknown_word(text, $what, Self::WORDS)),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

words! {
    /// How consistent a snapshot is asked, or proved, to be. The order is that of strength.
    Consistency, "a level of consistency", {
        /// As after a power cut.
        Crash => "crash",
        /// Every file system on the LUN was frozen.
        Filesystem => "filesystem",
        /// And every application on it took part.
        Application => "application",
    }
}
words! {
    /// What to do when the level asked for cannot be proved.
    OnFailure, "a policy", {
        /// No snapshot.
        Fail => "fail",
        /// A snapshot of the level that was proved.
        CrashConsistent => "crash-consistent",
    }
}
words! {
    /// What a web user may do.
    Role, "a role", {
        /// Look.
        Viewer => "viewer",
        /// Take, mount and delete snapshots.
        Operator => "operator",
        /// Everything.
        Admin => "admin",
    }
}

/// The refusal of a word that is not on the list.
pub(crate) fn unknown_word(text: &str, what: &str, words: &[&str]) -> Trouble {
    let way_out = match crate::suggest::nearest(text, words.iter().copied()) {
        Some(word) => format!("did you mean \"{word}\"? (one of {})", words.join(", ")),
        None => format!("use one of {}", words.join(", ")),
    };
    Trouble::new(format!("{text:?} is not {what}"), way_out)
}

impl FromStr for Checksums {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<Self, Trouble> {
        match text {
            "off" => Ok(Self::Off),
            "sealed" => Ok(Self::Sealed),
            "always" => Ok(Self::Always),
            _ => Err(unknown_word(
                text,
                "a mode of checksums",
                &["off", "sealed", "always"],
            )),
        }
    }
}

impl FromStr for ChapAlgorithm {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<Self, Trouble> {
        match text {
            "sha3-256" => Ok(Self::Sha3_256),
            "sha256" => Ok(Self::Sha256),
            "sha1" => Ok(Self::Sha1),
            "md5" => Ok(Self::Md5),
            _ => Err(unknown_word(
                text,
                "a CHAP algorithm",
                &["sha3-256", "sha256", "sha1", "md5"],
            )),
        }
    }
}

impl FromStr for Grain {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<Self, Trouble> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let Size(bytes) = text.parse()?;
        match u32::try_from(bytes) {
            Ok(grain) if [4 << 10, 8 << 10, 16 << 10, 64 << 10].contains(&grain) => Ok(Self::Bytes(grain)),
            _ => Err(Trouble::new(
                format!("{text:?} is not a grain size"),
                "use one of auto, 4KiB, 8KiB, 16KiB, 64KiB",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn company_ids() {
        assert_eq!("02-53-50".parse::<CompanyId>(), Ok(CompanyId::default()));
        assert_eq!(
            "00:0c:29".parse::<CompanyId>().expect("colons").to_string(),
            "00-0c-29"
        );
        for text in ["", "02-53", "2-53-50", "02-53-50-00", "zz-53-50", "+2-53-50"] {
            assert!(text.parse::<CompanyId>().is_err(), "{text}");
        }
    }

    #[test]
    fn grains_follow_the_size_of_the_pool() {
        assert_eq!(Grain::Auto.bytes(None), 4096);
        assert_eq!(Grain::Auto.bytes(Some(Size(4 << 40))), 4096);
        assert_eq!(Grain::Auto.bytes(Some(Size(5 << 40))), 16_384);
        assert_eq!(Grain::Auto.bytes(Some(Size(33 << 40))), 65_536);
        assert_eq!(Grain::Bytes(8192).bytes(Some(Size(33 << 40))), 8192);
        assert!("12KiB".parse::<Grain>().is_err());
    }

    #[test]
    fn levels_are_ordered_by_strength() {
        assert!(
            Consistency::Crash < Consistency::Filesystem
                && Consistency::Filesystem < Consistency::Application
        );
        let trouble = "aplication".parse::<Consistency>().expect_err("typo");
        assert!(
            trouble.to_string().contains("did you mean \"application\""),
            "{trouble}"
        );
    }

    #[test]
    fn access_by_name_and_network() {
        let access = Access {
            initiators: Initiators::These(vec!["iqn.2026-11.com.example:a".parse().expect("name")]),
            allow_from: vec!["10.0.0.0/8".parse().expect("net")],
        };
        let from = |text: &str| text.parse::<IpAddr>().expect("address");
        assert!(access.admits("iqn.2026-11.com.example:A", from("10.1.2.3")));
        assert!(access.admits("iqn.2026-11.com.example:a", from("::ffff:10.1.2.3")));
        assert!(!access.admits("iqn.2026-11.com.example:a", from("11.1.2.3")));
        assert!(!access.admits("iqn.2026-11.com.example:b", from("10.1.2.3")));
        let nobody = Access {
            initiators: Initiators::These(vec![]),
            allow_from: vec![],
        };
        assert!(!nobody.admits("iqn.2026-11.com.example:a", from("10.1.2.3")));
        let anyone = Access {
            initiators: Initiators::Anyone,
            allow_from: vec![],
        };
        assert!(anyone.admits("whatever", from("fe80::1")));
    }
}
