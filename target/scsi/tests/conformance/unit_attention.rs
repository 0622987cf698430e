//! Unit attentions: who hears what, and which commands do not mind.

use stillpoint_scsi::{Context, NexusId, Plan, TargetPort, UnitAttention};

use crate::bench::*;

#[test]
fn a_new_nexus_hears_of_the_power_on_once() {
    let mut bench = Bench::small();
    bench.unit.attach(NexusId(7), initiator(7));
    assert_eq!([bench.attention(7), bench.attention(7)], [Some(0x2900), None]);
    // Attached again, as after a session reinstatement.
    bench.unit.attach(NexusId(7), initiator(7));
    assert_eq!(bench.attention(7), Some(0x2900));
}

#[test]
fn inquiry_and_report_luns_do_not_mind_and_leave_it_pending() {
    let mut bench = Bench::small();
    bench.unit.lun_reset();
    assert_eq!(bench.ask(&[0x12, 0, 0, 0, 96, 0]).status, GOOD);
    assert_eq!(bench.ask(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).status, GOOD);
    assert_eq!(
        sense(&bench.ask(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        Some((6, 0x2903))
    );
    assert_eq!(bench.ask(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]).status, GOOD);
}

#[test]
fn request_sense_returns_it_as_data() {
    let mut bench = Bench::small();
    bench.unit.lun_reset();
    let fixed = bench.data(&[0x03, 0, 0, 0, 252, 0]);
    assert_eq!((fixed[0], fixed[2], fixed[12], fixed[13]), (0x70, 6, 0x29, 0x03));
    assert_eq!(usize::from(fixed[7]), fixed.len() - 8);
    let nothing = bench.data(&[0x03, 1, 0, 0, 252, 0]);
    assert_eq!(nothing[..], [0x72, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn report_luns_answers_the_news_that_it_is_about() {
    let mut bench = Bench::small();
    bench.unit.report_luns_changed();
    assert_eq!(bench.ask(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).status, GOOD);
    assert_eq!([0, 1].map(|n| bench.attention(n)), [None, Some(0x3f0e)]);
}

#[test]
fn every_event_has_its_code_and_reaches_everybody() {
    let mut bench = Bench::small();
    let both = |bench: &mut Bench| [0, 1].map(|n| bench.attention(n));
    bench.unit.capacity_changed(8192);
    assert_eq!(both(&mut bench), [Some(0x2a09); 2]);
    assert_eq!(u32_at(&bench.data(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0), 8191);
    bench.unit.capacity_changed(8192);
    assert_eq!(both(&mut bench), [None; 2], "nothing changed");
    bench.unit.content_replaced();
    assert_eq!(both(&mut bench), [Some(0x2800); 2]);
    bench.unit.set_ports(vec![
        port(),
        TargetPort {
            portal_group: 2,
            ..port()
        },
    ]);
    assert_eq!(both(&mut bench), [Some(0x3f03); 2]);
    for victim in [1, 99] {
        let cause = UnitAttention::CommandsCleared;
        bench.unit.tasks_ended(NexusId(victim), cause);
    }
    assert_eq!(both(&mut bench), [None, Some(0x2f00)]);
}

#[test]
fn several_are_told_one_by_one_most_urgent_first() {
    let mut bench = Bench::small();
    bench.unit.report_luns_changed();
    bench.unit.capacity_changed(8192);
    bench.unit.lun_reset();
    let told: Vec<_> = std::iter::from_fn(|| bench.attention(0)).collect();
    assert_eq!(told, [0x2903, 0x2a09, 0x3f0e]);
}

#[test]
fn an_unknown_nexus_is_told_to_try_again() {
    let mut bench = Bench::small();
    bench.unit.detach(NexusId(0));
    let context = Context {
        nexus: NexusId(0),
        luns: &[0],
        data_in_max: 512,
    };
    let Plan::Done(reply) = bench.unit.plan(&context, &cdb(0x28, 0, 0, 1), &[]) else {
        panic!("planned")
    };
    assert_eq!(reply.status, 0x08);
}

#[test]
fn naca_is_refused_wherever_the_control_byte_is() {
    let mut bench = Bench::small();
    for (opcode, service_action) in [
        (0x00, 0),
        (0x03, 0),
        (0x12, 0),
        (0x28, 0),
        (0xa8, 0),
        (0x88, 0),
        (0x9e, 0x10),
    ] {
        let mut cdb = cdb(opcode, service_action, 0, 0);
        *cdb.last_mut().unwrap() = 0x04;
        assert_eq!(sense(&bench.ask(&cdb)), INVALID_FIELD, "{opcode:#x}");
    }
}
