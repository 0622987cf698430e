//! Every limit of the file, by name. A refusal names the number that stands here.

use crate::size::Size;

/// Default port of an iSCSI portal (RFC 7143 §15, IANA `iscsi-target`).
pub const ISCSI_PORT: u16 = 3260;
/// Default port of the snapshot agents' protocol, on both sides.
pub const AGENT_PORT: u16 = 11_169;
/// A configuration file longer than this is not read: it is something else.
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// A secret, certificate or password file longer than this is not read.
pub const MAX_SECRET_FILE_BYTES: u64 = 4096;
/// LUNs in one file.
pub const MAX_LUNS: usize = 1024;
/// LUNs of one target: what the peripheral addressing method (SAM-5 §4.7.7.2) can name in one byte.
pub const MAX_LUNS_PER_TARGET: usize = 256;
/// Targets in one file.
pub const MAX_TARGETS: usize = 1024;
/// Portals in one file.
pub const MAX_PORTALS: usize = 64;
/// Schedules in one file.
pub const MAX_SCHEDULES: usize = 256;
/// Entries of one access list.
pub const MAX_ACCESS_ENTRIES: usize = 1024;
/// Sessions of one initiator on one target.
pub const MAX_SESSIONS_PER_INITIATOR: u32 = 64;
/// Smallest LUN.
pub const MIN_LUN_BYTES: u64 = 1024 * 1024;
/// Largest LUN: what the store can address with 4 KiB grains.
pub const MAX_LUN_BYTES: u64 = 64 << 40;
/// What all sessions hold of data on its way, unless the file says otherwise.
pub const SESSION_MEMORY: Size = Size(1 << 30);
/// Less than this, and one large command of each of two sessions would not fit.
pub const MIN_SESSION_MEMORY_BYTES: u64 = 64 << 20;
/// Smallest map cache that the store works with.
pub const MIN_CACHE_BYTES: u64 = 16 << 20;
/// Longest path of a Unix socket (`sun_path`, with its terminating zero).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// CHAP secrets shorter than 96 bits can be guessed from one captured login (RFC 7143 §9.2.1).
pub const MIN_CHAP_SECRET_BYTES: usize = 12;
/// Longest CHAP secret.
pub const MAX_CHAP_SECRET_BYTES: usize = 255;
/// Longest iSCSI name in bytes (RFC 7143 §4.2.7.1).
pub const MAX_ISCSI_NAME_BYTES: usize = 223;
/// Longest name of a LUN or snapshot.
pub const MAX_NAME_BYTES: usize = 64;
