//! Persistent reservations of one unit under any sequence of commands, resets, logins and restarts. What PERSISTENT RESERVE IN
//! says of them decides who may read and write, and what was given to the owner for saving is what a restart brings back.

use bytes::Bytes;
use stillpoint_scsi::{
    BlockOp, BlockSize, Context, Limits, NexusId, NexusName, Plan, Reply, TargetPort, Unit, UnitSpec,
};

const HOSTS: [&str; 3] = [
    "iqn.2026-11.example:a",
    "iqn.2026-11.example:b",
    "iqn.2026-11.example:c",
];
const CONFLICT: u8 = 0x18;

fn name(host: usize) -> NexusName {
    NexusName {
        initiator: HOSTS[host].to_owned(),
        isid: [0x80, 0, 0, 0, 0, 1],
        port: TargetPort {
            target: "iqn.2026-11.io.stillpoint:demo".to_owned(),
            portal_group: 1,
        },
    }
}

fn new_unit() -> Unit {
    let mut unit = Unit::new(UnitSpec {
        naa: [0x60; 16],
        serial: "0123456789abcdef".to_owned(),
        revision: *b"0.1 ",
        block_size: BlockSize::B512,
        grain: 4096,
        blocks: 1 << 20,
        write_cache: true,
        read_only: false,
        ports: vec![name(0).port],
        limits: Limits::default(),
    });
    (0..HOSTS.len()).for_each(|host| unit.attach(nexus(host), name(host)));
    unit
}

fn nexus(host: usize) -> NexusId {
    NexusId(host as u64)
}

fn plan(unit: &mut Unit, host: usize, cdb: &[u8], data_out: &[u8]) -> Plan {
    // REQUEST SENSE takes one unit attention each time.
    let context = Context {
        nexus: nexus(host),
        luns: &[0],
        data_in_max: 1 << 16,
    };
    while let Plan::Done(reply) = unit.plan(&context, &[3, 0, 0, 0, 18, 0], &[])
        && reply.data.get(2).is_some_and(|key| key & 0x0f != 0)
    {}
    unit.plan(&context, cdb, data_out)
}

fn report(unit: &mut Unit, action: u8) -> Bytes {
    match plan(unit, 0, &[0x5e, action, 0, 0, 0, 0, 0, 0xff, 0xff, 0], &[]) {
        Plan::Done(Reply { status: 0, data, .. }) => data,
        other => panic!("PERSISTENT RESERVE IN {action}: {other:?}"),
    }
}

/// What READ FULL STATUS says, without PRGENERATION.
#[derive(Debug, Default, PartialEq, Eq)]
struct Standing {
    registered: [bool; 3],
    holds: [bool; 3],
    kind: u8,
}

fn standing(unit: &mut Unit) -> Standing {
    let data = report(unit, 3);
    let mut standing = Standing::default();
    let mut rest = &data[8..];
    while !rest.is_empty() {
        let len = 24 + u32::from_be_bytes([rest[20], rest[21], rest[22], rest[23]]) as usize;
        let (descriptor, more) = rest.split_at(len);
        let text = String::from_utf8_lossy(&descriptor[28..]);
        let host = HOSTS.iter().position(|host| text.starts_with(host));
        let host = host.unwrap_or_else(|| panic!("nobody of ours: {text}"));
        assert!(!standing.registered[host], "{} is registered twice", HOSTS[host]);
        standing.registered[host] = true;
        if descriptor[12] & 1 != 0 {
            standing.holds[host] = true;
            standing.kind = descriptor[13] & 0x0f;
        }
        rest = more;
    }
    standing
}

/// Those who may are let in, and nobody else.
fn check(unit: &mut Unit) {
    let now = standing(unit);
    let reservation = report(unit, 1);
    assert_eq!(
        reservation.get(21).map_or(0, |kind| kind & 0x0f),
        now.kind,
        "{now:?}"
    );
    let holders = now.holds.iter().filter(|holds| **holds).count();
    match now.kind {
        0 => assert_eq!(holders, 0),
        7 | 8 => assert_eq!(now.holds, now.registered),
        _ => assert_eq!(holders, 1, "{now:?}"),
    }
    for host in 0..HOSTS.len() {
        let admitted = now.kind == 0 || now.holds[host] || (now.kind >= 5 && now.registered[host]);
        let readable = admitted || matches!(now.kind, 1 | 5 | 7);
        let conflicts = |plan: &Plan| matches!(plan, Plan::Done(reply) if reply.status == CONFLICT);
        let write = plan(unit, host, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512]);
        assert_eq!(conflicts(&write), !admitted, "a write of {host}: {now:?}");
        let read = plan(unit, host, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
        assert_eq!(conflicts(&read), !readable, "a read of {host}: {now:?}");
    }
}

/// Input: steps of six bytes: host, what, type, key, new key, flags.
pub(super) fn run(data: &[u8]) {
    let mut unit = new_unit();
    let mut saved: Option<Bytes> = None;
    for step in data.chunks_exact(6).take(64) {
        let host = usize::from(step[0]) % HOSTS.len();
        match step[1] % 11 {
            8 => unit.lun_reset(),
            9 => {
                unit.detach(nexus(host));
                unit.attach(nexus(host), name(host));
            }
            10 => {
                // PTPL_A of REPORT CAPABILITIES: whether anything is to come back.
                let kept = report(&mut unit, 2)[3] & 1 != 0;
                let before = standing(&mut unit);
                unit = new_unit();
                if let Some(saved) = &saved {
                    unit.restore_reservations(saved)
                        .unwrap_or_else(|error| panic!("{error}"));
                }
                let expected = if kept { before } else { Standing::default() };
                assert_eq!(standing(&mut unit), expected, "after a restart");
            }
            action => {
                let mut list = [0; 24];
                (list[7], list[15], list[20]) = (step[3] % 4, step[4] % 4, step[5] & 0x0d);
                let cdb = [0x5f, action, step[2] & 0x0f, 0, 0, 0, 0, 0, 24, 0];
                if let Plan::Op(planned) = plan(&mut unit, host, &cdb, &list)
                    && let BlockOp::Reservations(change) = planned.op()
                    && change.save.is_some()
                {
                    saved.clone_from(&change.save);
                }
            }
        }
        check(&mut unit);
        if let Some(saved) = &saved {
            assert_eq!(
                *saved,
                unit.reservation_state(),
                "what is saved is not what stands"
            );
        }
    }
}

/// Everybody registers, with APTPL; each type is reserved; preempted, released, cleared, restarted.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let register = [[0, 6, 0, 0, 1, 1], [1, 6, 0, 0, 2, 1], [2, 6, 0, 0, 3, 1]].concat();
    [1, 3, 5, 6, 7, 8]
        .into_iter()
        .map(|kind| {
            let steps = [
                [0, 1, kind, 1, 0, 0],
                [1, 1, kind, 2, 0, 0],
                [0, 10, 0, 0, 0, 0],
                [1, 4, kind, 2, 1, 0],
                [2, 5, 5, 3, 2, 0],
                [1, 9, 0, 0, 0, 0],
                [2, 2, 5, 3, 0, 0],
                [0, 8, 0, 0, 0, 0],
                [2, 0, 0, 3, 0, 0],
                [0, 3, 0, 1, 0, 0],
                [0, 10, 0, 0, 0, 0],
            ];
            [register.clone(), steps.concat()].concat()
        })
        .collect()
}
