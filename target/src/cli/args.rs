//! The command line. Man pages and completions are made from these definitions.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use stillpoint_config::{Consistency, ISCSI_PORT, OnFailure, Size, parse_duration, parse_listen};

use crate::serve::control::api::SnapshotRef;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage; also when a question would be needed, nobody can be asked, and --yes is not given
  3  refused by a rule: a limit, a lock, sessions, no agent that could prove the level asked for
  4  no daemon answers";

/// Userspace iSCSI target whose snapshots can be trusted.
///
/// `stillpoint serve` is the daemon; every other command talks to it over its control socket.
#[derive(Debug, Parser)]
#[command(name = "stillpoint", version, max_term_width = 100, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Configuration file; commands read from it where the control socket is
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Control socket of the daemon
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Do not ask
    #[arg(long, short = 'y', global = true)]
    pub(crate) yes: bool,
    /// Print less
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Log more (twice: everything)
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run the daemon; without a configuration file, with a demo LUN
    Serve(Serve),
    /// Show how the daemon is
    Status,
    /// Check, preview and apply the configuration file
    #[command(subcommand)]
    Config(ConfigVerb),
    /// LUNs that are served
    #[command(subcommand)]
    Lun(LunVerb),
    /// Volumes of the store, also those that no LUN names
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Sessions of initiators
    #[command(subcommand)]
    Session(SessionVerb),
    /// Take, look into, revert to and delete snapshots
    #[command(subcommand)]
    Snapshot(SnapshotVerb),
    /// Volumes made of snapshots
    #[command(subcommand)]
    Clone(CloneVerb),
    /// Snapshot agents on the applications' hosts
    #[command(subcommand)]
    Agent(AgentVerb),
    /// The store below the volumes
    #[command(subcommand)]
    Store(StoreVerb),
    /// Show what happened
    Events(Events),
    /// Record the PDUs of a session as pcapng, for Wireshark
    Trace(Trace),
    /// Print shell completions or write man pages
    #[command(subcommand, hide = true)]
    Generate(GenerateVerb),
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Open the demo to other hosts: ADDR[:PORT]
    #[arg(long, value_name = "ADDR", value_parser = listen_address)]
    pub(crate) listen: Option<std::net::SocketAddr>,
}

fn listen_address(text: &str) -> Result<std::net::SocketAddr, stillpoint_config::Trouble> {
    parse_listen(text, ISCSI_PORT)
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigVerb {
    /// List everything that is wrong with a configuration file; needs no daemon
    Check {
        /// The file
        file: Option<PathBuf>,
    },
    /// Show what the changed file would do, and whose sessions it touches
    Plan,
    /// Do what the changed file says; sessions that are not affected go on
    Apply,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LunVerb {
    /// List the LUNs
    List,
    /// Show one LUN
    Show {
        /// Name of the LUN
        lun: String,
    },
    /// Say whether agents could prove the next snapshot; exit code 0 ready, 3 it would be refused
    Preflight {
        /// Name of the LUN
        lun: String,
        /// What it shall prove: application or filesystem
        #[arg(long, default_value = "application", value_name = "LEVEL")]
        consistency: Consistency,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeVerb {
    /// List the volumes
    List,
    /// Give a volume the name of a renamed [[lun]]
    Rename {
        /// Its name
        old: String,
        /// Its new name
        new: String,
    },
    /// Delete an unassigned volume and its snapshots
    Delete {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SessionVerb {
    /// List the sessions
    List,
    /// Ask an initiator to log out, then end its session
    Drop {
        /// Number from `session list`
        id: u64,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Take a snapshot; several LUNs are cut at the same moment
    Create(SnapshotCreate),
    /// List snapshots
    List {
        /// Only of this LUN
        lun: Option<String>,
    },
    /// Show one snapshot, and who proved its consistency
    Show {
        /// LUN@NAME
        snapshot: SnapshotRef,
    },
    /// List what agents handed over with a snapshot (VSS backup components, manifests of VMs), or bring one out
    Documents {
        /// LUN@NAME
        snapshot: SnapshotRef,
        /// Bring this one out: backup-components, writer-metadata or vm-manifest
        #[arg(long)]
        kind: Option<String>,
        /// Of this agent, when several have one
        #[arg(long, requires = "kind", value_name = "ID")]
        agent: Option<String>,
        /// Write it to this file instead of standard output
        #[arg(long, requires = "kind", value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Delete snapshots: all that are named, or none
    Delete {
        /// LUN@NAME …
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<SnapshotRef>,
        /// Only show how much space that would give back
        #[arg(long)]
        plan: bool,
    },
    /// Protect a snapshot from deletion until it is released
    Hold {
        /// LUN@NAME
        snapshot: SnapshotRef,
    },
    /// End the protection of `hold`
    Release {
        /// LUN@NAME
        snapshot: SnapshotRef,
    },
    /// List the ranges that changed between two snapshots, or since one
    Diff {
        /// LUN@NAME of the older side
        from: SnapshotRef,
        /// LUN@NAME of the younger side; else the LUN as it is now
        to: Option<SnapshotRef>,
    },
    /// Put a LUN back to a snapshot; an automatic snapshot is taken first
    Revert {
        /// LUN@NAME
        snapshot: SnapshotRef,
        /// End the sessions of the LUN
        #[arg(long)]
        force: bool,
        /// Power off VMs that run on the LUN (their hosts let it go and take it again)
        #[arg(long)]
        power_off: bool,
        /// Only show what would happen
        #[arg(long)]
        plan: bool,
    },
    /// Serve a snapshot as a LUN of its own
    Mount {
        /// LUN@NAME
        snapshot: SnapshotRef,
        /// Let nobody write to it
        #[arg(long)]
        read_only: bool,
        /// Who may log in (default: who may log in to the LUN)
        #[arg(long, value_name = "IQN")]
        initiator: Vec<String>,
    },
    /// Stop serving a mounted snapshot; what was written to it is gone
    Unmount {
        /// Name from `snapshot mount`
        name: String,
        /// End its sessions
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotCreate {
    /// LUN[,LUN…]
    #[arg(required = true, value_delimiter = ',', value_name = "LUN")]
    pub(crate) luns: Vec<String>,
    /// Name (default: the UTC time)
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// What must be proved: crash, filesystem or application
    #[arg(long, default_value = "crash", value_name = "LEVEL")]
    pub(crate) consistency: Consistency,
    /// When it cannot be proved: fail, or crash-consistent
    #[arg(long, value_name = "POLICY")]
    pub(crate) on_failure: Option<OnFailure>,
    /// Nobody can delete it before, as in 7d
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(crate) lock: Option<Duration>,
    /// A remark for people
    #[arg(long, value_name = "TEXT")]
    pub(crate) note: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CloneVerb {
    /// Make a volume of a snapshot; a [[lun]] of its name serves it
    Create {
        /// LUN@NAME
        snapshot: SnapshotRef,
        /// Name of the new volume
        new: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentVerb {
    /// Tokens with which agents enrol
    #[command(subcommand)]
    Token(TokenVerb),
    /// The count by which agents recognise a daemon that went back in time
    #[command(subcommand)]
    Generation(GenerationVerb),
    /// List the agents
    List,
    /// Show one agent
    Show {
        /// Its id, or the beginning of it, or its host
        id: String,
    },
    /// Call an agent back and ask whether a snapshot would work
    Test {
        /// Its id, or the beginning of it, or its host
        id: String,
    },
    /// Let an agent freeze a LUN
    Allow {
        /// Its id, or the beginning of it, or its host
        id: String,
        /// Name of the LUN
        lun: String,
    },
    /// Dial an agent where it asks to be dialled (`advertise_host`), not where its registration comes from
    Approve {
        /// Its id, or the beginning of it, or its host
        id: String,
    },
    /// Trust an agent no longer
    Revoke {
        /// Its id, or the beginning of it, or its host
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenVerb {
    /// Make a token for one enrolment
    Create {
        /// LUN that the agent may freeze; may be given several times
        #[arg(long = "lun", value_name = "LUN")]
        luns: Vec<String>,
        /// How long it can be used
        #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = parse_duration)]
        ttl: Duration,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum GenerationVerb {
    /// Raise it, after the data directory was restored from a backup
    Bump,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StoreVerb {
    /// Verify every structure of the store; the daemon must be stopped
    Check {
        /// Read all data that has a recorded checksum, too
        #[arg(long)]
        data: bool,
        /// The data directory, when no configuration names it
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
    /// Show sizes and counters; the daemon must run. Reads all metadata
    Stats,
    /// Rewrite the store's metadata without garbage; the daemon must run, and serves meanwhile
    Compact,
    /// Verify checksums and structures while the daemon works; leaving the command lets it go on, calling it again rejoins
    Scrub {
        /// Bytes per second that are read at most; 0B = as fast as it can [default: 64MiB]
        #[arg(long, value_name = "SIZE")]
        rate: Option<Size>,
        /// Begin at the start, whatever has been done
        #[arg(long)]
        restart: bool,
        /// Only show how far it is, or what the last one found
        #[arg(long, conflicts_with_all = ["rate", "restart"])]
        status: bool,
        /// Stop it where it is; it goes on from there when it is called again
        #[arg(long, conflicts_with_all = ["rate", "restart", "status"])]
        stop: bool,
    },
    /// Write the store's metadata as text; the daemon must be stopped
    Dump {
        /// The data directory, when no configuration names it
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Write to a file instead of standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Make bitmaps, counts and lists anew, and give up what cannot be read; the daemon must be stopped
    Repair {
        /// Only say what would be done, and what would be lost
        #[arg(long)]
        plan: bool,
        /// Go back to the newest commit that is there, when later ones are missing
        #[arg(long)]
        accept_lost_commits: bool,
        /// Forget background jobs whose records are damaged: where one was zeroing or copying, old data shows again
        #[arg(long)]
        accept_lost_jobs: bool,
        /// The data directory, when no configuration names it
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
    /// Rebuild the metadata from a dump; the daemon must be stopped
    Restore {
        /// The dump; `-` is standard input
        file: PathBuf,
        /// The data directory, when no configuration names it
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// Number from `session list`
    pub(crate) session: u64,
    /// The file to write; `-` is standard output
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Record the contents of blocks too; without it they are left out. CHAP secrets never are in the file
    #[arg(long)]
    pub(crate) payload: bool,
    /// End when the file has this size
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    pub(crate) max_size: Size,
    /// End after this time; else it ends with the session, with the size, or with Ctrl-C
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(crate) duration: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Go on showing events as they happen
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// How many past events to show
    #[arg(long, short = 'n', default_value_t = 100, value_name = "COUNT")]
    pub(crate) newest: usize,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GenerateVerb {
    /// Shell completions on standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Man pages into a directory
    Man {
        /// The directory
        dir: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_stand_before_or_after_the_verb() {
        for line in [
            "stillpoint --json --socket s lun list",
            "stillpoint lun --json list --socket s",
            "stillpoint lun list --json --socket s",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).expect(line);
            assert!(cli.global.json && cli.global.socket == Some("s".into()), "{line}");
        }
    }

    #[test]
    fn every_verb_of_the_contract_parses() {
        for line in [
            "serve --listen 0.0.0.0",
            "status",
            "config check f.toml",
            "config plan",
            "config apply --yes",
            "lun list",
            "lun show a",
            "volume list",
            "volume rename a b",
            "volume delete a --yes",
            "session list",
            "session drop 3",
            "snapshot create a,b --name n --consistency application --on-failure crash-consistent --lock 7d --note x",
            "snapshot list",
            "snapshot list a",
            "snapshot show a@b",
            "snapshot delete a@b",
            "snapshot delete a@b a@c --plan",
            "snapshot hold a@b",
            "snapshot release a@b",
            "snapshot diff a@b",
            "snapshot diff a@b a@c",
            "snapshot revert a@b --force --plan",
            "snapshot mount a@b --read-only --initiator iqn.2026-11.x:a --initiator iqn.2026-11.x:b",
            "snapshot unmount a-b --force",
            "clone create a@b c",
            "agent token create --lun a --lun b --ttl 15m",
            "agent list",
            "agent show x",
            "agent test x",
            "agent allow x a",
            "agent revoke x",
            "agent generation bump",
            "store check",
            "store stats",
            "store compact",
            "store dump",
            "store restore dump.txt",
            "events",
            "events --follow",
            "trace 3 --out t.pcapng",
            "trace 3 --out - --payload --max-size 1GiB --duration 30s",
        ] {
            let words = std::iter::once("stillpoint").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "snapshot show ab",
            "snapshot create",
            "session drop x",
            "trace 3",
            "snapshot create a --lock 7",
            "frobnicate",
        ] {
            let words = std::iter::once("stillpoint").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
