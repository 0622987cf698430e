//! What the daemon itself must not forget: identities, mounted snapshots, what initiators saved on their LUNs.
//!
//! Identities live in the attributes of their volume, so that they follow it through rename and revert and die with it. The rest
//! are keys of the store's small durable map. Everything here blocks until it is durable: call it from a worker.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use stillpoint_config::CompanyId;
use stillpoint_snapshot::{Error as StoreError, Pool, VolumeInfo};

/// Largest value that is cut into pieces (persistent reservations, details of a snapshot).
const BIG_BYTES: usize = 1 << 20;
/// Piece of a large value: fits a value of the store's map.
const PIECE_BYTES: usize = 4000;

/// A key of the store's map and its new value; None removes it.
type Put = (String, Option<Vec<u8>>);

/// What can go wrong with the saved state.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What was read back makes no sense.
    #[error("the saved {what} cannot be read: {why}")]
    Damaged {
        /// The thing.
        what: String,
        /// How it is damaged.
        why: String,
    },
    /// Too much to be saved.
    #[error("{what} of {bytes} bytes is too large to be saved (at most {BIG_BYTES})")]
    TooLarge {
        /// The thing.
        what: String,
        /// Its size.
        bytes: usize,
    },
    /// The system gives no randomness.
    #[error("no random numbers for a new identity: {0}")]
    Random(getrandom::Error),
}

/// How initiators tell this LUN from every other one. Never reused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// NAA IEEE Registered Extended designator (SPC-4 §7.8.6.6.5).
    pub(crate) naa: [u8; 16],
    /// Unit serial number (VPD page 80h).
    pub(crate) serial: String,
}

impl Identity {
    /// A new one: 100 random bits below the company id, so that two pools never make the same.
    pub(crate) fn new(company: CompanyId) -> Result<Self, StateError> {
        let mut random = [0u8; 13];
        getrandom::fill(&mut random).map_err(StateError::Random)?;
        Ok(Self::from_random(company, random))
    }

    fn from_random(company: CompanyId, random: [u8; 13]) -> Self {
        let [a, b, c] = company.0;
        let [first, rest @ ..] = random;
        let mut naa = [0u8; 16];
        // Four bits of NAA (6), then the 24 bits of the company id, then 100 bits of our own.
        let head = [
            0x60 | a >> 4,
            a << 4 | b >> 4,
            b << 4 | c >> 4,
            c << 4 | first & 0x0f,
        ];
        for (to, from) in naa.iter_mut().zip(head.into_iter().chain(rest)) {
            *to = from;
        }
        // 80 of the random bits: still unique, and short enough for every tool that shows it.
        let serial = data_encoding::HEXUPPER.encode(rest.get(2..).unwrap_or_default());
        Self { naa, serial }
    }

    /// `naa.` and 32 hexadecimal digits, as initiators show it.
    pub(crate) fn naa_text(&self) -> String {
        format!("naa.{}", data_encoding::HEXLOWER.encode(&self.naa))
    }
}

/// What a volume is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum VolumeKind {
    /// A `[[lun]]`, or one that was.
    Lun,
    /// Made by `clone create`.
    Clone,
    /// Made by `snapshot mount`, and gone with `snapshot unmount`.
    Mount,
    /// A shadow copy of a VSS hardware provider.
    Vss,
}

impl VolumeKind {
    /// Served by the daemon's own records and not by a `[[lun]]`; gone when its work is done.
    pub(crate) fn is_passing(self) -> bool {
        matches!(self, Self::Mount | Self::Vss)
    }
}

/// The attributes of a volume, as JSON in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Attributes {
    naa: String,
    serial: String,
    kind: VolumeKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    origin: Option<String>,
}

/// What the daemon wrote to a volume's attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumeTag {
    pub(crate) identity: Identity,
    pub(crate) kind: VolumeKind,
    /// `LUN@NAME` that it was made of.
    pub(crate) origin: Option<String>,
}

impl VolumeTag {
    /// The tag of a new volume.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub(crate) fn new(
        company: CompanyId,
        kind: VolumeKind,
        origin: Option<String>,
    ) -> Result<Self, StateError> {
        Ok(Self {
            identity: Identity::new(company)?,
            kind,
            origin,
        })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let attributes = Attributes {
            naa: data_encoding::HEXLOWER.encode(&self.identity.naa),
            serial: self.identity.serial.clone(),
            kind: self.kind,
            origin: self.origin.clone(),
        };
        serde_json::to_vec(&attributes).expect("strings and an enum are always JSON")
    }

    pub(crate) fn of(volume: &VolumeInfo) -> Result<Self, StateError> {
        let damaged = |why: String| StateError::Damaged {
            what: format!("identity of volume {:?}", volume.name),
            why,
        };
        let attributes: Attributes =
            serde_json::from_slice(&volume.attributes).map_err(|e| damaged(e.to_string()))?;
        let naa = data_encoding::HEXLOWER_PERMISSIVE
            .decode(attributes.naa.as_bytes())
            .map_err(|e| damaged(e.to_string()))?;
        let naa = <[u8; 16]>::try_from(naa).map_err(|naa| damaged(format!("{} bytes of NAA", naa.len())))?;
        Ok(Self {
            identity: Identity {
                naa,
                serial: attributes.serial,
            },
            kind: attributes.kind,
            origin: attributes.origin,
        })
    }
}

/// A mounted snapshot: kept over restarts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// Name of the mount, of its LUN and of its volume.
    pub(crate) name: String,
    /// LUN that the snapshot is of.
    pub(crate) lun: String,
    /// The snapshot's name.
    pub(crate) snapshot: String,
    /// Its target.
    pub(crate) iqn: String,
    pub(crate) read_only: bool,
    /// None: the access list of the LUN's own target.
    pub(crate) initiators: Option<Vec<String>>,
    /// RFC 3339.
    pub(crate) created_at: String,
    pub(crate) created_by: String,
}

/// What initiators saved on a LUN.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LunSaved {
    /// WCE of the caching mode page (MODE SELECT with SP).
    pub(crate) write_cache: Option<bool>,
    /// Persistent reservations (APTPL).
    pub(crate) reservations: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Inner {
    pool: Pool,
    /// The newest saved reservations of each LUN, by the unit's own count. Held while saving: an older save waits, and then
    /// finds that it is superseded.
    saves: Mutex<BTreeMap<String, u64>>,
    /// One change of what is served at a time.
    changing: tokio::sync::Mutex<()>,
}

/// The saved state. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct State(Arc<Inner>);

fn mount_key(name: &str) -> String {
    format!("mount/{name}")
}

fn write_cache_key(lun: &str) -> String {
    format!("wce/{lun}")
}

fn reservations_key(lun: &str) -> String {
    format!("pr/{lun}")
}

impl State {
    /// The state that is kept in this pool.
    pub(crate) fn open(pool: &Pool) -> Self {
        Self(Arc::new(Inner {
            pool: pool.clone(),
            saves: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }))
    }

    /// Held by whoever changes what is served (apply, mount, revert, rename …): two of them at once could each see half of the
    /// other's work.
    pub(crate) async fn changing(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.0.changing.lock().await
    }

    fn saves(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.0.saves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What initiators saved on this LUN. A unit that starts from it counts its saves anew.
    pub(crate) fn lun_saved(&self, lun: &str) -> LunSaved {
        self.saves().remove(lun);
        let write_cache = self
            .0
            .pool
            .meta_get(&write_cache_key(lun))
            .map(|value| value == b"1");
        LunSaved {
            write_cache,
            reservations: self.big_get(&reservations_key(lun)),
        }
    }

    /// WCE, as an initiator saved it.
    pub(crate) fn saved_write_cache(&self, lun: &str) -> Option<bool> {
        self.0
            .pool
            .meta_get(&write_cache_key(lun))
            .map(|value| value == b"1")
    }

    /// MODE SELECT with the Save Pages bit.
    pub(crate) fn save_write_cache(&self, lun: &str, on: bool) -> Result<(), StateError> {
        Ok(self
            .0
            .pool
            .meta_put(&write_cache_key(lun), Some(if on { b"1" } else { b"0" }))?)
    }

    /// PERSISTENT RESERVE OUT with APTPL. A save that was overtaken by a newer one is dropped: the newer one is durable.
    pub(crate) fn save_reservations(&self, lun: &str, sequence: u64, state: &[u8]) -> Result<(), StateError> {
        let mut saves = self.saves();
        if saves.get(lun).is_some_and(|newest| *newest >= sequence) {
            return Ok(());
        }
        self.big_put(&reservations_key(lun), Some(state))?;
        saves.insert(lun.to_owned(), sequence);
        Ok(())
    }

    /// The volume of a LUN has another name: what initiators saved goes with it.
    pub(crate) fn renamed(&self, old: &str, new: &str) -> Result<(), StateError> {
        let saved = self.lun_saved(old);
        let mut puts = self.big_puts(&reservations_key(new), saved.reservations.as_deref())?;
        puts.extend(self.big_puts(&reservations_key(old), None)?);
        puts.push((write_cache_key(new), self.0.pool.meta_get(&write_cache_key(old))));
        puts.push((write_cache_key(old), None));
        Ok(self.0.pool.meta_put_many(&puts)?)
    }

    /// The volume of a LUN is gone, and what was saved on it too.
    pub(crate) fn forget(&self, lun: &str) -> Result<(), StateError> {
        self.forget_all(std::iter::once(lun))
    }

    /// As [`State::forget`] of several, in one commit; none when nothing was saved.
    pub(crate) fn forget_all<'a>(&self, luns: impl Iterator<Item = &'a str>) -> Result<(), StateError> {
        let mut puts = Vec::new();
        for lun in luns {
            self.saves().remove(lun);
            puts.extend(self.big_puts(&reservations_key(lun), None)?);
            let key = write_cache_key(lun);
            if self.0.pool.meta_get(&key).is_some() {
                puts.push((key, None));
            }
        }
        if puts.is_empty() {
            return Ok(());
        }
        Ok(self.0.pool.meta_put_many(&puts)?)
    }

    /// All mounts, by name. One that cannot be read is an error: its LUN would silently be missing.
    pub(crate) fn mounts(&self) -> Result<Vec<Mount>, StateError> {
        self.0
            .pool
            .meta_list("mount/")
            .iter()
            .map(|(key, value)| decode(key, value))
            .collect()
    }

    /// The mount of that name.
    pub(crate) fn mount(&self, name: &str) -> Result<Option<Mount>, StateError> {
        let key = mount_key(name);
        self.0
            .pool
            .meta_get(&key)
            .map(|value| decode(&key, &value))
            .transpose()
    }

    /// Remembers a mount.
    pub(crate) fn put_mount(&self, mount: &Mount) -> Result<(), StateError> {
        let value = serde_json::to_vec(mount).expect("strings are always JSON");
        Ok(self.0.pool.meta_put(&mount_key(&mount.name), Some(&value))?)
    }

    /// Forgets a mount.
    pub(crate) fn remove_mount(&self, name: &str) -> Result<(), StateError> {
        Ok(self.0.pool.meta_put(&mount_key(name), None)?)
    }

    /// A value of any length up to [`BIG_BYTES`].
    pub(crate) fn big_get(&self, key: &str) -> Option<Vec<u8>> {
        let pieces = self.0.pool.meta_list(&format!("{key}/"));
        // The keys of the pieces end in four digits, so the map's order is theirs.
        (!pieces.is_empty()).then(|| pieces.into_iter().flat_map(|(_, piece)| piece).collect())
    }

    /// The names behind a prefix that have a value of any length.
    pub(crate) fn luns_of_values(&self, prefix: &str) -> Vec<String> {
        let pieces = self.0.pool.meta_list(prefix).into_iter();
        let first =
            pieces.filter_map(|(key, _)| Some(key.strip_prefix(prefix)?.strip_suffix("/0000")?.to_owned()));
        first.collect()
    }

    /// All values of any length whose key begins with `prefix`.
    pub(crate) fn big_list(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let mut values: Vec<(String, Vec<u8>)> = Vec::new();
        // In the order of the keys, so that the pieces of one value come one after another.
        for (piece_key, piece) in self.0.pool.meta_list(prefix) {
            let Some((key, _)) = piece_key.rsplit_once('/') else {
                continue;
            };
            match values.last_mut() {
                Some((last, value)) if last == key => value.extend(piece),
                _ => values.push((key.to_owned(), piece)),
            }
        }
        values
    }

    /// Writes, replaces or removes a value of any length up to [`BIG_BYTES`], all pieces in one commit.
    pub(crate) fn big_put(&self, key: &str, value: Option<&[u8]>) -> Result<(), StateError> {
        Ok(self.0.pool.meta_put_many(&self.big_puts(key, value)?)?)
    }

    fn big_puts(&self, key: &str, value: Option<&[u8]>) -> Result<Vec<Put>, StateError> {
        let bytes = value.map_or(0, <[u8]>::len);
        if bytes > BIG_BYTES {
            return Err(StateError::TooLarge {
                what: key.to_owned(),
                bytes,
            });
        }
        // An empty value is one empty piece: it is there, unlike none.
        let pieces: Vec<&[u8]> = match value {
            None => Vec::new(),
            Some([]) => vec![&[]],
            Some(value) => value.chunks(PIECE_BYTES).collect(),
        };
        let stale = self
            .0
            .pool
            .meta_list(&format!("{key}/"))
            .into_iter()
            .skip(pieces.len())
            .map(|(key, _)| (key, None));
        let puts = pieces
            .iter()
            .enumerate()
            .map(|(i, piece)| (format!("{key}/{i:04}"), Some(piece.to_vec())));
        Ok(puts.chain(stale).collect())
    }
}

fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, StateError> {
    serde_json::from_slice(value).map_err(|e| StateError::Damaged {
        what: key.to_owned(),
        why: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_naa_6_with_the_company_id() {
        let identity = Identity::from_random(CompanyId([0x02, 0x53, 0x50]), [0xff; 13]);
        assert_eq!(identity.naa_text(), "naa.6025350fffffffffffffffffffffffff");
        assert_eq!(identity.serial, "FFFFFFFFFFFFFFFFFFFF");
        let one = Identity::new(CompanyId::default()).expect("random");
        let two = Identity::new(CompanyId::default()).expect("random");
        assert!(one.naa != two.naa && one.serial != two.serial);
        assert_eq!(one.naa[0] >> 4, 6);
    }

    #[test]
    fn a_tag_reads_back_from_a_volume() {
        let tag = VolumeTag {
            identity: Identity::new(CompanyId::default()).expect("random"),
            kind: VolumeKind::Mount,
            origin: Some("sql01@x".into()),
        };
        let mut volume = VolumeInfo {
            id: stillpoint_snapshot::VolumeId(1),
            name: "v".into(),
            size_bytes: 0,
            block_size: 512,
            grain_bytes: 4096,
            attributes: tag.to_bytes(),
            parent: None,
            read_only: false,
            checksums: stillpoint_snapshot::Checksums::Sealed,
            mapped_bytes: 0,
            created_ms: 0,
        };
        assert_eq!(VolumeTag::of(&volume).expect("tag"), tag);
        volume.attributes = b"{}".to_vec();
        assert!(
            VolumeTag::of(&volume)
                .expect_err("damaged")
                .to_string()
                .contains("identity of volume \"v\"")
        );
    }

    fn state() -> (tempfile::TempDir, State) {
        let dir = tempfile::tempdir().expect("dir");
        let options = stillpoint_snapshot::PoolOptions {
            ballast_bytes: 0,
            ..Default::default()
        };
        let pool = Pool::create(&dir.path().join("pool"), &options).expect("pool");
        (dir, State::open(&pool))
    }

    #[test]
    fn large_values_shrink_grow_and_go() {
        let (_dir, state) = state();
        for bytes in [10_000, 1, 0, PIECE_BYTES, PIECE_BYTES + 1] {
            let value: Vec<u8> = (0..bytes)
                .map(|i| u8::try_from(i % 251).expect("small"))
                .collect();
            state.big_put("x", Some(&value)).expect("put");
            assert_eq!(state.big_get("x"), Some(value), "{bytes}");
        }
        state.big_put("x", None).expect("remove");
        assert_eq!(state.big_get("x"), None);
        assert!(matches!(
            state.big_put("x", Some(&vec![0; BIG_BYTES + 1])),
            Err(StateError::TooLarge { .. })
        ));
    }

    #[test]
    fn an_older_save_never_overwrites_a_newer_one() {
        let (_dir, state) = state();
        state.save_reservations("a", 2, b"new").expect("save");
        state.save_reservations("a", 1, b"old").expect("save");
        assert_eq!(state.lun_saved("a").reservations.as_deref(), Some(&b"new"[..]));
        // The unit was made anew from what was saved, and counts from the start.
        state.save_reservations("a", 1, b"newer").expect("save");
        assert_eq!(state.lun_saved("a").reservations.as_deref(), Some(&b"newer"[..]));
    }

    #[test]
    fn what_was_saved_follows_a_rename_and_ends_with_the_volume() {
        let (_dir, state) = state();
        state.save_write_cache("a", false).expect("save");
        state.save_reservations("a", 1, &[7; 9000]).expect("save");
        state.renamed("a", "b").expect("rename");
        assert_eq!(state.lun_saved("a"), LunSaved::default());
        let saved = state.lun_saved("b");
        assert_eq!(
            (saved.write_cache, saved.reservations.map(|r| r.len())),
            (Some(false), Some(9000))
        );
        state.forget("b").expect("forget");
        assert_eq!(state.lun_saved("b"), LunSaved::default());
    }
}
