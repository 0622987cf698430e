//! MODE SENSE and MODE SELECT (HLK; libiscsi's ModeSense6 family).

use stillpoint_scsi::{BlockError, BlockSize, UnitSpec};

use crate::bench::*;

const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;

/// MODE SENSE(6) of one page without block descriptors; PC in the page byte.
fn page(bench: &mut Bench, code: u8) -> Vec<u8> {
    bench.data(&[0x1a, 0x08, code, 0, 255, 0])[4..].to_vec()
}

/// MODE SELECT(6), PF set, of one page as MODE SENSE gave it, after `change`.
fn select(
    bench: &mut Bench,
    n: u64,
    code: u8,
    save: bool,
    change: impl FnOnce(&mut Vec<u8>),
) -> stillpoint_scsi::Reply {
    let mut list = vec![0; 4];
    list.extend(page(bench, code));
    list[4] &= 0x7f;
    change(&mut list);
    let cdb = [0x15, 0x10 | u8::from(save), 0, 0, list.len() as u8, 0];
    bench.send(n, &cdb, &list, 0)
}

fn write_cache(bench: &mut Bench, control: u8) -> bool {
    page(bench, control << 6 | CACHING)[2] & 0x04 != 0
}

#[test]
fn all_pages_are_there_with_exact_lengths() {
    let mut bench = Bench::small();
    for control in 0..4 {
        let data = bench.data(&[0x1a, 0x08, control << 6 | 0x3f, 0, 255, 0]);
        assert_eq!(usize::from(data[0]) + 1, data.len());
        let mut codes = Vec::new();
        let mut rest = &data[4..];
        while let [code, len, ..] = rest {
            codes.push(code & 0x3f);
            rest = &rest[2 + usize::from(*len)..];
        }
        assert_eq!(codes, [0x01, 0x02, 0x08, 0x0a, 0x1a, 0x1c], "PC {control}");
        let long = bench.data(&[0x5a, 0x08, control << 6 | 0x3f, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(usize::from(u16_at(&long, 0)) + 2, long.len());
        assert_eq!(long[8..], data[4..]);
        let with_subpages = bench.data(&[0x5a, 0x08, control << 6 | 0x3f, 0xff, 0, 0, 0, 2, 0, 0]);
        assert_eq!(with_subpages.len(), long.len() + 16);
        assert_eq!(with_subpages[long.len()..][..4], [0x5c, 0x02, 0, 12]);
    }
}

#[test]
fn subpages() {
    let mut bench = Bench::small();
    let len = |reply: stillpoint_scsi::Reply| (reply.status == GOOD).then(|| reply.data.len());
    let mut ask = |code, subpage| len(bench.ask(&[0x1a, 0x08, code, subpage, 255, 0]));
    assert_eq!(
        [ask(0x1c, 0), ask(0x1c, 2), ask(0x1c, 0xff), ask(0x1c, 1)],
        [Some(16), Some(20), Some(32), None]
    );
    assert_eq!(
        [ask(0x08, 0), ask(0x08, 0xff), ask(0x08, 2)],
        [Some(24), Some(24), None]
    );
    // ESXi polls 1Ah, which is there; 19h is not.
    assert_eq!([ask(0x1a, 0), ask(0x19, 0), ask(0x00, 0)], [Some(44), None, None]);
}

#[test]
fn dbd_takes_the_block_descriptor_away_and_nothing_else() {
    for mut bench in Bench::both() {
        let without = bench.data(&[0x1a, 0x08, 0x3f, 0, 255, 0]);
        let with = bench.data(&[0x1a, 0x00, 0x3f, 0, 255, 0]);
        assert_eq!((without[1], without[3], with[3]), (0, 0, 8));
        assert_eq!(without[4..], with[12..]);
        assert_eq!(
            (u64::from(u32_at(&with, 4)), u32_at(&with, 8) as usize),
            (bench.blocks, bench.block)
        );
        let long = bench.data(&[0x5a, 0x10, 0x3f, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(
            (long[4], u16_at(&long, 6), u64_at(&long, 8)),
            (1, 16, bench.blocks)
        );
        assert_eq!(
            (u32_at(&long, 20) as usize, &long[24..]),
            (bench.block, &without[4..])
        );
        let short = bench.data(&[0x5a, 0x00, 0x3f, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!((short[4], u16_at(&short, 6)), (0, 8));
    }
}

#[test]
fn the_caching_page_can_be_saved() {
    let mut bench = Bench::small();
    let data = bench.data(&[0x1a, 0x08, CACHING, 0, 255, 0]);
    assert_eq!((data.len(), data[4], data[5]), (24, 0x80 | CACHING, 18));
    assert_eq!((data[1], data[3]), (0, 0), "medium type, block descriptor length");
    assert_eq!(data[2], 0x10, "DPOFUA, not WP");
    let mut changeable = vec![0; 20];
    (changeable[0], changeable[1], changeable[2]) = (0x88, 18, 0x04);
    assert_eq!(page(&mut bench, 0x48), changeable);
}

#[test]
fn mode_select_without_a_list_is_good() {
    let mut bench = Bench::small();
    for flags in [0x00, 0x01, 0x10, 0x11] {
        assert_eq!(bench.ask(&[0x15, flags, 0, 0, 0, 0]).status, GOOD);
        assert_eq!(bench.ask(&[0x55, flags, 0, 0, 0, 0, 0, 0, 0, 0]).status, GOOD);
    }
}

#[test]
fn the_write_cache_is_switched_off_saved_and_restored() {
    let mut bench = Bench::small();
    assert_eq!([0, 2, 3].map(|pc| write_cache(&mut bench, pc)), [true; 3]);
    assert_eq!(
        select(&mut bench, 0, CACHING, false, |list| list[6] &= !0x04).status,
        GOOD
    );
    assert_eq!(
        [0, 2, 3].map(|pc| write_cache(&mut bench, pc)),
        [false, true, true]
    );
    assert_eq!(
        (bench.disk.flushes, bench.disk.saved_write_cache),
        (1, None),
        "acknowledged data is made durable"
    );
    // From here on every write is one through the cache.
    assert_eq!(bench.give(&cdb(0x2a, 0, 0, 1), &[0; 512]).status, GOOD);
    assert_eq!(bench.disk.fua_writes, 1);
    assert_eq!(select(&mut bench, 0, CACHING, true, |_| {}).status, GOOD);
    assert_eq!(
        (
            [0, 3].map(|pc| write_cache(&mut bench, pc)),
            bench.disk.saved_write_cache
        ),
        ([false; 2], Some(false))
    );
    // A reset goes back to the saved value.
    assert_eq!(
        select(&mut bench, 0, CACHING, false, |list| list[6] |= 0x04).status,
        GOOD
    );
    assert!(bench.unit.write_cache());
    bench.unit.lun_reset();
    assert_eq!(bench.attention(0), Some(0x2903));
    assert!(!bench.unit.write_cache());
    assert_eq!(
        select(&mut bench, 0, CACHING, true, |list| list[6] |= 0x04).status,
        GOOD
    );
    assert_eq!(bench.disk.saved_write_cache, Some(true));
}

#[test]
fn a_save_that_fails_is_told() {
    let mut bench = Bench::small();
    bench.disk.failure = Some(BlockError::Fault);
    assert_eq!(
        sense(&select(&mut bench, 0, CACHING, true, |list| list[6] &= !0x04)),
        Some((4, 0x4400))
    );
}

#[test]
fn the_other_initiators_hear_of_a_change_and_only_of_a_change() {
    let mut bench = Bench::small();
    assert_eq!(select(&mut bench, 1, CACHING, false, |_| {}).status, GOOD);
    assert_eq!([0, 1, 2].map(|n| bench.attention(n)), [None; 3]);
    assert_eq!(
        select(&mut bench, 1, CACHING, false, |list| list[6] &= !0x04).status,
        GOOD
    );
    assert_eq!(
        [0, 1, 2].map(|n| bench.attention(n)),
        [Some(0x2a01), None, Some(0x2a01)]
    );
}

#[test]
fn sense_data_follows_d_sense() {
    let mut bench = Bench::small();
    let beyond = cdb(0x88, 0, u64::MAX, 1);
    assert_eq!(bench.ask(&beyond).sense[0], 0x70);
    assert_eq!(
        select(&mut bench, 0, CONTROL, false, |list| list[6] |= 0x04).status,
        GOOD
    );
    let reply = bench.ask(&beyond);
    assert_eq!((reply.sense[0], sense(&reply)), (0x72, LBA_RANGE));
    bench.disk.failure = Some(BlockError::Medium { offset: 512 });
    assert_eq!(bench.ask(&cdb(0x28, 0, 0, 2)).sense[0], 0x72);
    assert_eq!(
        select(&mut bench, 0, CONTROL, false, |list| list[6] &= !0x04).status,
        GOOD
    );
    assert_eq!(bench.ask(&beyond).sense[0], 0x70);
}

#[test]
fn software_write_protection() {
    let mut bench = Bench::small();
    assert_eq!(page(&mut bench, 0x40 | CONTROL)[4], 0x08, "SWP is changeable");
    assert_eq!(
        select(&mut bench, 0, CONTROL, false, |list| list[8] |= 0x08).status,
        GOOD
    );
    assert_eq!(bench.data(&[0x1a, 0, 0x3f, 0, 255, 0])[2], 0x90, "WP");
    assert_eq!(bench.ask(&cdb(0x28, 0, 0, 1)).status, GOOD);
    assert_eq!(
        sense(&bench.give(&cdb(0x2a, 0, 0, 1), &[0; 512])),
        Some((7, 0x2702))
    );
    assert_eq!(
        select(&mut bench, 0, CONTROL, false, |list| list[8] &= !0x08).status,
        GOOD
    );
    assert_eq!(bench.give(&cdb(0x2a, 0, 0, 1), &[0; 512]).status, GOOD);
}

#[test]
fn a_read_only_unit_says_so() {
    let mut bench = Bench::read_only();
    assert_eq!(bench.data(&[0x1a, 0, 0x3f, 0, 255, 0])[2], 0x90);
    bench.unit.set_read_only(false);
    assert_eq!(bench.attention(0), Some(0x2a01));
    assert_eq!(bench.give(&cdb(0x2a, 0, 0, 1), &[0; 512]).status, GOOD);
}

#[test]
fn a_configured_write_cache_off_is_the_default() {
    let mut bench = Bench::with(UnitSpec {
        write_cache: false,
        ..spec(BlockSize::B512, 4096)
    });
    assert_eq!([0, 2, 3].map(|pc| write_cache(&mut bench, pc)), [false; 3]);
}

#[test]
fn a_list_that_changes_what_cannot_change_changes_nothing() {
    let mut bench = Bench::small();
    let bad = Some((5, 0x2600));
    assert_eq!(
        sense(&select(&mut bench, 0, CACHING, true, |list| list[6] = 0x01)),
        bad,
        "RCD"
    );
    assert_eq!(
        sense(&select(&mut bench, 0, CACHING, true, |list| list[5] = 17)),
        bad,
        "page length"
    );
    assert_eq!(
        sense(&select(&mut bench, 0, 0x01, true, |list| list[7] = 1)),
        bad,
        "retry count"
    );
    assert_eq!(
        sense(&select(&mut bench, 0, CACHING, true, |list| list[4] = 0x19)),
        bad,
        "unknown page"
    );
    assert_eq!(
        sense(&select(&mut bench, 0, CACHING, true, |list| list[4] = 0x48)),
        bad,
        "unknown subpage"
    );
    // A good page before a bad one counts for nothing.
    let reply = select(&mut bench, 0, CACHING, true, |list| {
        list[6] &= !0x04;
        list.extend([0x19, 0]);
    });
    assert_eq!((sense(&reply), write_cache(&mut bench, 0)), (bad, true));
    let cut = Some((5, 0x1a00));
    for len in [1, 3, 5, 6, 23] {
        assert_eq!(
            sense(&select(&mut bench, 0, CACHING, true, |list| list.truncate(len))),
            cut,
            "{len}"
        );
    }
    // Announced longer than what came.
    assert_eq!(sense(&bench.give(&[0x15, 0x10, 0, 0, 24, 0], &[0; 4])), cut);
    // RTD, and pages without PF.
    assert_eq!(
        sense(&bench.give(&[0x15, 0x12, 0, 0, 4, 0], &[0; 4])),
        INVALID_FIELD
    );
    assert_eq!(
        sense(&bench.give(&[0x15, 0x00, 0, 0, 4, 0], &[0; 4])),
        INVALID_FIELD
    );
    assert_eq!(bench.disk.saved_write_cache, None);
}

#[test]
fn block_descriptors_may_repeat_what_is_and_nothing_else() {
    let mut bench = Bench::small();
    let caching = page(&mut bench, CACHING);
    let mut give = |blocks: u32, length: u32| {
        let mut list = vec![0, 0, 0, 8];
        list.extend(blocks.to_be_bytes());
        list.extend(length.to_be_bytes());
        list.extend(&caching);
        sense(&bench.give(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list))
    };
    for blocks in [0, 4096, u32::MAX] {
        assert_eq!(give(blocks, 512), None);
    }
    assert_eq!(give(4095, 512), Some((5, 0x2600)));
    assert_eq!(give(4096, 4096), Some((5, 0x2600)));
    let mut long = vec![0, 0, 0, 0, 1, 0, 0, 16];
    long.extend(4096_u64.to_be_bytes());
    long.extend([0, 0, 0, 0, 0, 0, 2, 0]);
    long.extend(&caching);
    let cdb = [0x55, 0x10, 0, 0, 0, 0, 0, 0, long.len() as u8, 0];
    assert_eq!(bench.give(&cdb, &long).status, GOOD);
}
