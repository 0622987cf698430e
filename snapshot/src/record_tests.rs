//! Round trips of every record.

use super::*;

fn id() -> SnapshotId {
    SnapshotId {
        branch: BranchId(3),
        epoch: Epoch(9),
    }
}

#[test]
fn keys_parse_back_and_order_versions_newest_first() {
    let k = PageKey {
        branch: BranchId(3),
        page: 8,
        epoch: Epoch(9),
    };
    for (bytes, parsed) in [
        (key::system(), Key::System),
        (key::branch(BranchId(3)), Key::Branch(BranchId(3))),
        (key::snapshot(BranchId(3), Epoch(9)), Key::Snapshot(id())),
        (key::page(k), Key::Page(k)),
        (key::changed(k), Key::Changed(k)),
        (key::bitmap(5), Key::Bitmap(5)),
        (key::counts(5), Key::Counts(5)),
        (key::journal(7, 1), Key::Journal(7, 1)),
        (key::job(7), Key::Job(7)),
        (key::bad(1 << 33), Key::Bad(1 << 33)),
        (key::value("a/b"), Key::Value("a/b".into())),
    ] {
        assert_eq!(Key::parse(&bytes).unwrap(), parsed);
    }
    assert!(Key::parse(b"?").is_err() && Key::parse(b"V123").is_err() && Key::parse(b"").is_err());
    let newer = PageKey {
        epoch: Epoch(10),
        ..k
    };
    assert!(key::page(newer) < key::page(k));
    assert!(key::page(k) < key::page_end(k.branch, k.page));
    assert!(
        key::page_end(k.branch, k.page)
            < key::page(PageKey {
                page: 9,
                epoch: Epoch::MAX,
                ..k
            })
    );
    assert!(key::page_end(k.branch, u32::MAX) <= key::pages_end(k.branch));
}

#[test]
fn records_round_trip() {
    let s = SystemRecord {
        pool_id: [7; 16],
        grain_bytes: 4096,
        txg: 5,
        checkpoint: 2,
        epoch: Epoch(6),
        next_branch: 7,
        next_job: 8,
        chunks: 9,
    };
    assert_eq!(SystemRecord::decode(&s.encode()).unwrap(), s);
    let mut b = BranchRecord {
        volume: VolumeId(2),
        head: true,
        read_only: false,
        checksums: Checksums::Always,
        name: "sql01".into(),
        attributes: vec![0; crate::limits::ATTRIBUTES_BYTES],
        size_bytes: 1 << 40,
        block_size: 512,
        parent: Some(id()),
        current: Epoch(4),
        mapped_grains: 77,
        created_ms: -1,
    };
    assert_eq!(
        BranchRecord::decode(BranchId(3), &b.encode(BranchId(3))).unwrap(),
        b
    );
    assert!(
        BranchRecord::decode(BranchId(4), &b.encode(BranchId(3))).is_err(),
        "bound to its key"
    );
    (b.parent, b.read_only, b.checksums) = (None, true, Checksums::Off);
    b.name = "n".repeat(crate::limits::NAME_BYTES);
    assert_eq!(
        BranchRecord::decode(BranchId(3), &b.encode(BranchId(3))).unwrap(),
        b
    );
    assert!(b.encode(BranchId(3)).len() <= crate::meta::MAX_VALUE_BYTES);
    let n = SnapshotRecord {
        name: "n".repeat(crate::limits::NAME_BYTES),
        created_ms: 1,
        size_bytes: 2,
        block_size: 4096,
        mapped_grains: 3,
        consistency: Consistency::Application,
        state: SnapshotState::Dying,
        hold: true,
        sealed: true,
        lock_until_ms: 4,
        meta: vec![1; crate::limits::SNAPSHOT_META_BYTES],
    };
    assert!(n.encode(id()).len() <= crate::meta::MAX_VALUE_BYTES);
    assert_eq!(SnapshotRecord::decode(id(), &n.encode(id())).unwrap(), n);
    assert_eq!(decode_value("k", &encode_value("k", b"v")).unwrap(), b"v");
    let bits = [0x1234u64; 64];
    assert_eq!(decode_bitmap(1, &encode_bitmap(1, &bits)).unwrap(), bits);
}

#[test]
fn jobs_round_trip() {
    for kind in [
        JobKind::DropSnapshot(id()),
        JobKind::DropHead(BranchId(3)),
        JobKind::Collapse {
            from: id(),
            into: BranchId(5),
        },
        JobKind::Zero {
            branch: BranchId(3),
            epoch: Epoch(9),
            first: 4,
            end: 1 << 28,
            unmap: false,
        },
        JobKind::Lend {
            to: id(),
            from: SnapshotId {
                branch: BranchId(8),
                epoch: Epoch(2),
            },
            first: 4,
            end: 1 << 28,
            grain: 1 << 33,
        },
    ] {
        let zero = matches!(kind, JobKind::Zero { .. });
        let lend = matches!(kind, JobKind::Lend { .. });
        let j = JobRecord {
            cursor: 12,
            masked: if zero { 7 } else { 0 },
            gained: if lend { -7 } else { 0 },
            ..JobRecord::new(kind)
        };
        assert_eq!(JobRecord::decode(1, &j.encode(1)).unwrap(), j);
    }
}

#[test]
fn counts_round_trip() {
    let count = |n: usize| ChunkCount {
        free: u16::try_from(4 * n).unwrap(),
        shared: n.is_multiple_of(3),
    };
    let counts: Vec<_> = (0..COUNTS_PER_BLOCK).map(count).collect();
    assert_eq!(decode_counts(1, &encode_counts(1, &counts)).unwrap(), counts);
}

#[test]
fn journal_splits_below_the_value_limit_and_keeps_order() {
    let delta = |page: u32, mask: u64| Delta {
        key: PageKey {
            branch: BranchId(1),
            page,
            epoch: Epoch(2),
        },
        mask,
        entries: indices(mask)
            .map(|i| {
                if i % 2 == 0 {
                    Entry::HOLE
                } else {
                    Entry::mapped(u64::from(i), Epoch(2))
                }
            })
            .collect(),
    };
    let deltas: Vec<_> = (0..50)
        .map(|p| delta(p, if p % 3 == 0 { u64::MAX } else { 0b1010_0001 }))
        .collect();
    let values = encode_journal(4, &deltas);
    assert!(values.len() > 1);
    let mut back = Vec::new();
    for (i, (k, v)) in values.iter().enumerate() {
        assert!(v.len() <= crate::meta::MAX_VALUE_BYTES);
        assert_eq!(Key::parse(k).unwrap(), Key::Journal(4, u32::try_from(i).unwrap()));
        back.extend(decode_journal(4, u32::try_from(i).unwrap(), v).unwrap());
    }
    assert_eq!(back, deltas);
}
