//! The tags of all fields. A tag means the same in every message; those of the provider, revert and blob messages (types 18-34)
//! begin at 0x0100.

use super::{
    App, AppState, BlobKind, CutOutcome, DeleteReason, Document, Exclusion, ExclusionKind, Finding,
    FrozenVolume, LunIdentity, LunSupport, LunVolumes, Mode, Mount, Piece, Require, RevertHost,
    RevertOutcome, RevertState, RevertVm, Role, SessionState, Severity, Shadow, ShadowAsk, TakenShadow,
    Visibility,
};
use crate::error::ErrorCode;
use crate::freeze::Level;
use crate::ident::{AgentId, LunId, SessionId, SetId, ShadowId};
use crate::wire::Tag;

pub(super) const SESSION: Tag<SessionId> = Tag::critical(0x01);
pub(super) const AGENT_ID: Tag<AgentId> = Tag::critical(0x02);
pub(super) const LUN: Tag<LunId> = Tag::critical(0x03);

pub(super) const MIN_VERSION: Tag<u8> = Tag::critical(0x10);
pub(super) const MAX_VERSION: Tag<u8> = Tag::critical(0x11);
pub(super) const PRODUCT: Tag<String> = Tag::plain(0x12);
pub(super) const CAPABILITIES: Tag<super::Capabilities> = Tag::plain(0x13);
pub(super) const TOKEN_ID: Tag<[u8; 8]> = Tag::critical(0x14);
pub(super) const MAC: Tag<[u8; 32]> = Tag::critical(0x15);

pub(super) const HOST: Tag<String> = Tag::plain(0x20);
pub(super) const OS: Tag<String> = Tag::plain(0x21);
pub(super) const AGENT_VERSION: Tag<String> = Tag::plain(0x22);
pub(super) const BOOT_ID: Tag<String> = Tag::plain(0x23);
pub(super) const LISTEN_PORT: Tag<u16> = Tag::plain(0x24);
pub(super) const INITIATOR: Tag<String> = Tag::plain(0x25);
pub(super) const LEASE_MS: Tag<u32> = Tag::plain(0x26);
pub(super) const HEARTBEAT_MS: Tag<u32> = Tag::plain(0x27);
pub(super) const MOUNTED: Tag<LunId> = Tag::plain(0x28);
pub(super) const GRANT: Tag<LunIdentity> = Tag::plain(0x29);
pub(super) const STATE: Tag<SessionState> = Tag::plain(0x2a);
pub(super) const FROZEN_MS: Tag<u32> = Tag::plain(0x2b);
pub(super) const CLOCK_UNIX_MS: Tag<u64> = Tag::plain(0x2c);
pub(super) const ADVERTISE_HOST: Tag<String> = Tag::plain(0x2d);

pub(super) const LUN_VOLUMES: Tag<LunVolumes> = Tag::plain(0x30);
pub(super) const IDENTITY: Tag<LunIdentity> = Tag::plain(0x31);
pub(super) const ROLE: Tag<Role> = Tag::plain(0x32);
pub(super) const MOUNT: Tag<Mount> = Tag::plain(0x33);
pub(super) const APP: Tag<App> = Tag::plain(0x34);
pub(super) const PATH: Tag<String> = Tag::plain(0x35);
pub(super) const FILE_SYSTEM: Tag<String> = Tag::plain(0x36);
pub(super) const DEVICE: Tag<String> = Tag::plain(0x37);
pub(super) const READ_ONLY: Tag<bool> = Tag::plain(0x38);
pub(super) const SERIAL: Tag<String> = Tag::plain(0x39);
pub(super) const IQN: Tag<String> = Tag::plain(0x3a);
pub(super) const LUN_NUMBER: Tag<u16> = Tag::plain(0x3b);
pub(super) const SIZE_BYTES: Tag<u64> = Tag::plain(0x3c);
pub(super) const CLUSTER: Tag<bool> = Tag::plain(0x3d);

pub(super) const MODE: Tag<Mode> = Tag::critical(0x40);
pub(super) const FINDING: Tag<Finding> = Tag::plain(0x41);
pub(super) const CODE: Tag<ErrorCode> = Tag::plain(0x42);
pub(super) const SEVERITY: Tag<Severity> = Tag::plain(0x43);
pub(super) const SUBJECT: Tag<String> = Tag::plain(0x44);
pub(super) const TEXT: Tag<String> = Tag::plain(0x45);
pub(super) const RETRY_AFTER_MS: Tag<u32> = Tag::plain(0x46);
/// The session in the way of a refusal or named in a status: information, so not critical as `SESSION` is.
pub(super) const OTHER_SESSION: Tag<SessionId> = Tag::plain(0x47);

pub(super) const HOLD_MS: Tag<u32> = Tag::critical(0x50);
pub(super) const REQUIRE: Tag<Require> = Tag::critical(0x51);
pub(super) const EXCLUSION: Tag<Exclusion> = Tag::critical(0x52);
pub(super) const EXCLUSION_KIND: Tag<ExclusionKind> = Tag::critical(0x53);
pub(super) const KIND: Tag<String> = Tag::plain(0x54);
pub(super) const INSTANCE: Tag<String> = Tag::plain(0x55);
pub(super) const COMPONENT: Tag<String> = Tag::plain(0x56);
pub(super) const APP_VERSION: Tag<String> = Tag::plain(0x57);
pub(super) const APP_STATE: Tag<AppState> = Tag::critical(0x58);
pub(super) const ERROR: Tag<String> = Tag::plain(0x59);
pub(super) const REMAINING_MS: Tag<u32> = Tag::critical(0x5a);
pub(super) const FROZEN_VOLUME: Tag<FrozenVolume> = Tag::critical(0x5b);
pub(super) const FROZEN: Tag<bool> = Tag::critical(0x5c);
pub(super) const OUTCOME: Tag<CutOutcome> = Tag::critical(0x5d);
pub(super) const SNAPSHOT: Tag<String> = Tag::plain(0x5e);
pub(super) const CUT_UNIX_MS: Tag<u64> = Tag::plain(0x5f);
pub(super) const HELD_MS: Tag<u32> = Tag::plain(0x60);
pub(super) const HOLD_OK: Tag<bool> = Tag::critical(0x61);
pub(super) const LEVEL: Tag<Level> = Tag::critical(0x62);
pub(super) const REASON: Tag<String> = Tag::plain(0x63);
pub(super) const DONE: Tag<u32> = Tag::plain(0x64);
pub(super) const TOTAL: Tag<u32> = Tag::plain(0x65);
pub(super) const LAST_RESULT: Tag<String> = Tag::plain(0x66);

pub(super) const BLOB_KIND: Tag<BlobKind> = Tag::critical(0x100);
pub(super) const OFFSET_BYTES: Tag<u32> = Tag::critical(0x101);
pub(super) const TOTAL_BYTES: Tag<u32> = Tag::critical(0x102);
pub(super) const BYTES: Tag<Piece> = Tag::critical(0x103);
pub(super) const SHA256: Tag<[u8; 32]> = Tag::plain(0x104);
pub(super) const DOCUMENT: Tag<Document> = Tag::plain(0x105);

pub(super) const POWER_OFF: Tag<bool> = Tag::critical(0x110);
pub(super) const PLAN_ONLY: Tag<bool> = Tag::critical(0x111);
pub(super) const REVERT_STATE: Tag<RevertState> = Tag::critical(0x112);
pub(super) const REVERT_HOST: Tag<RevertHost> = Tag::critical(0x113);
pub(super) const REVERT_VM: Tag<RevertVm> = Tag::plain(0x114);
pub(super) const INSTANCE_UUID: Tag<String> = Tag::plain(0x115);
pub(super) const MOREF: Tag<String> = Tag::plain(0x116);
pub(super) const POWERED_ON: Tag<bool> = Tag::plain(0x117);
pub(super) const REVERT_OUTCOME: Tag<RevertOutcome> = Tag::critical(0x118);

pub(super) const SET: Tag<SetId> = Tag::critical(0x120);
pub(super) const SHADOW: Tag<ShadowId> = Tag::critical(0x121);
pub(super) const SHADOW_ASK: Tag<ShadowAsk> = Tag::critical(0x122);
pub(super) const SHADOW_COPY: Tag<Shadow> = Tag::critical(0x123);
pub(super) const TAKEN_SHADOW: Tag<TakenShadow> = Tag::critical(0x124);
pub(super) const COMMIT_TOKEN: Tag<[u8; 16]> = Tag::critical(0x125);
pub(super) const WRITABLE: Tag<bool> = Tag::critical(0x126);
pub(super) const VISIBILITY: Tag<Visibility> = Tag::critical(0x127);
pub(super) const DELETE_REASON: Tag<DeleteReason> = Tag::critical(0x128);
pub(super) const SUPPORTED: Tag<bool> = Tag::critical(0x129);
pub(super) const LUN_SUPPORT: Tag<LunSupport> = Tag::critical(0x12a);
