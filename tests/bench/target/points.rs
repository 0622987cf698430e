//! What is measured: one load each.

/// What is protected by CRC32C on the wire (RFC 7143 §13.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Digests {
    /// Nothing.
    None,
    /// Headers.
    Header,
    /// Headers and data.
    HeaderAndData,
}

impl Digests {
    /// The values of HeaderDigest and DataDigest.
    pub(crate) fn keys(self) -> (&'static str, &'static str) {
        match self {
            Self::None => ("None", "None"),
            Self::Header => ("CRC32C", "None"),
            Self::HeaderAndData => ("CRC32C", "CRC32C"),
        }
    }
}

/// One load on one or several LUNs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    /// As in the tables.
    pub(crate) name: &'static str,
    /// fio's `rw`.
    pub(crate) rw: &'static str,
    /// Bytes of one I/O.
    pub(crate) block: u32,
    /// Commands in flight of each session.
    pub(crate) depth: u32,
    /// LUNs, each with its own sessions.
    pub(crate) luns: u32,
    /// Sessions on each LUN.
    pub(crate) sessions: u32,
    /// A flush after each so many writes; 0 = none.
    pub(crate) flush_each: u32,
    /// CRC32C over each header, and over data.
    pub(crate) digests: Digests,
    /// Made by the bench's own initiator, and not by fio: random reads.
    pub(crate) own_initiator: bool,
    /// A further LUN is written at queue depth 32 all the while, and not counted.
    pub(crate) neighbour: bool,
}

const PLAIN: Point = Point {
    name: "",
    rw: "randread",
    block: 4096,
    depth: 1,
    luns: 1,
    sessions: 1,
    flush_each: 0,
    digests: Digests::None,
    own_initiator: false,
    neighbour: false,
};

const fn point(name: &'static str, rw: &'static str, block: u32, depth: u32) -> Point {
    Point {
        name,
        rw,
        block,
        depth,
        ..PLAIN
    }
}

/// A load of the bench's own initiator.
const fn own(name: &'static str, block: u32, depth: u32, digests: Digests) -> Point {
    Point {
        own_initiator: true,
        digests,
        ..point(name, "randread", block, depth)
    }
}

/// Everything, in the order of the table.
pub(crate) const POINTS: &[Point] = &[
    point("4k-read-qd1", "randread", 4096, 1),
    point("4k-write-qd1", "randwrite", 4096, 1),
    point("4k-read-qd32", "randread", 4096, 32),
    point("4k-write-qd32", "randwrite", 4096, 32),
    point("4k-mix70-qd32", "randrw", 4096, 32),
    point("64k-read-qd16", "read", 65_536, 16),
    point("64k-write-qd16", "write", 65_536, 16),
    point("1m-read-qd8", "read", 1_048_576, 8),
    point("1m-write-qd8", "write", 1_048_576, 8),
    Point {
        flush_each: 1,
        ..point("4k-write-flush", "randwrite", 4096, 1)
    },
    Point {
        flush_each: 1,
        sessions: 4,
        ..point("4k-write-flush-4s", "randwrite", 4096, 1)
    },
    Point {
        sessions: 4,
        ..point("4k-read-4s-qd8", "randread", 4096, 8)
    },
    Point {
        sessions: 4,
        ..point("4k-write-4s-qd8", "randwrite", 4096, 8)
    },
    Point {
        luns: 16,
        ..point("4k-read-16luns-qd4", "randread", 4096, 4)
    },
    Point {
        luns: 16,
        ..point("4k-write-16luns-qd4", "randwrite", 4096, 4)
    },
    Point {
        digests: Digests::Header,
        ..point("4k-read-qd32-hdgst", "randread", 4096, 32)
    },
    own("own-4k-read-qd32", 4096, 32, Digests::None),
    own("own-4k-read-qd32-h", 4096, 32, Digests::Header),
    own("own-4k-read-qd32-hd", 4096, 32, Digests::HeaderAndData),
    own("own-64k-read-qd16", 65_536, 16, Digests::None),
    own("own-64k-read-qd16-hd", 65_536, 16, Digests::HeaderAndData),
    Point {
        neighbour: true,
        ..point("4k-read-qd1-noisy", "randread", 4096, 1)
    },
];

/// The points that are measured after snapshots as well.
pub(crate) const SNAPSHOT_POINTS: &[&str] = &[
    "4k-read-qd1",
    "4k-write-qd1",
    "4k-read-qd32",
    "4k-write-qd32",
    "64k-read-qd16",
    "64k-write-qd16",
    "1m-write-qd8",
    "4k-write-flush",
];

/// What a hurried run measures on disk: where a disk makes a difference.
pub(crate) const DISK_POINTS: &[&str] = &[
    "4k-read-qd1",
    "4k-write-qd1",
    "4k-read-qd32",
    "4k-write-qd32",
    "64k-read-qd16",
    "64k-write-qd16",
    "1m-read-qd8",
    "1m-write-qd8",
    "4k-write-flush",
    "4k-write-flush-4s",
];
