//! The order of the calls, and what may be claimed.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use stillpoint_agentproto::message::ExclusionKind;

use super::*;
use crate::hold::Told;
use crate::volumes::tests::lun;
use crate::writers::tests::{WANTED, component, inventory, sql};

type Calls = Arc<Mutex<Vec<String>>>;

/// Plays VSS: DoSnapshotSet calls the hold as the provider does.
struct Play {
    calls: Calls,
    hold: Arc<Hold>,
    writer: Writer,
    begin: (i32, i32),
    end: (i32, i32),
    context: Option<i32>,
    fails_at: Option<(&'static str, i32)>,
    skips_provider: bool,
    done: bool,
}

impl Play {
    fn call(&self, text: String) -> Result<(), VssError> {
        let failure = self.fails_at.filter(|(call, _)| text.starts_with(call));
        self.calls.lock().expect("no panic").push(text);
        match failure {
            Some((call, code)) => Err(VssError { call, code }),
            None => Ok(()),
        }
    }
}

impl Vss for Play {
    fn initialize(&mut self) -> Result<(), VssError> {
        self.call("initialize".into())
    }
    fn set_backup_state(&mut self) -> Result<(), VssError> {
        self.call("state".into())
    }
    fn set_context(&mut self, context: i32) -> Result<(), VssError> {
        self.call(format!("context {context:x}"))?;
        if self.context.is_some_and(|refused| refused == context) {
            return Err(VssError {
                call: "SetContext",
                code: UNSUPPORTED_CONTEXT,
            });
        }
        Ok(())
    }
    fn gather_writer_metadata(&mut self) -> Result<Vec<Writer>, VssError> {
        self.call("metadata".into()).map(|()| vec![self.writer.clone()])
    }
    fn add_component(&mut self, _: &Writer, component: &Component) -> Result<(), VssError> {
        self.call(format!("add {}", component.name))
    }
    fn start_snapshot_set(&mut self) -> Result<u128, VssError> {
        self.call("start".into()).map(|()| 77)
    }
    fn add_to_snapshot_set(&mut self, volume: &str) -> Result<(), VssError> {
        self.call(format!("volume {volume}"))
    }
    fn prepare_for_backup(&mut self) -> Result<(), VssError> {
        self.call("prepare".into())
    }
    fn gather_writer_status(&mut self) -> Result<Vec<WriterStatus>, VssError> {
        self.call("status".into())?;
        let (state, failure) = if self.done { self.end } else { self.begin };
        Ok(vec![WriterStatus {
            instance: self.writer.instance,
            class: self.writer.class,
            name: self.writer.name.clone(),
            state,
            failure,
        }])
    }
    fn do_snapshot_set(&mut self, given_up: &dyn Fn() -> bool) -> Result<(), VssError> {
        self.call("snapshot".into())?;
        self.done = true;
        let veto = VssError {
            call: "DoSnapshotSet",
            code: 0x8004_2306_u32.cast_signed(),
        };
        if given_up() {
            return Err(veto);
        }
        if self.skips_provider {
            return Ok(());
        }
        self.hold
            .pre_commit()
            .and_then(|()| self.hold.commit())
            .map_err(|_| veto)
    }
    fn set_backup_succeeded(&mut self, _: &Writer, component: &Component) -> Result<(), VssError> {
        self.call(format!("succeeded {}", component.name))
    }
    fn backup_complete(&mut self) -> Result<(), VssError> {
        self.call("complete".into())
    }
    fn abort_backup(&mut self) {
        self.call("abort".into()).expect("never fails");
    }
    fn document(&mut self) -> Result<String, VssError> {
        Ok("<xml/>".into())
    }
}

/// Releases at once, within "frozen".
struct AtOnce {
    word: bool,
    hold: Mutex<std::sync::Weak<Hold>>,
}

impl Told for Arc<AtOnce> {
    fn hold_started(&self) -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(600))
    }
    fn frozen(&self) {
        let hold = self.hold.lock().expect("no panic").upgrade();
        hold.expect("alive").thaw(self.word);
    }
}

#[derive(Default)]
struct Sets(Mutex<Vec<String>>);

impl OwnSets for Sets {
    fn add(&self, set: u128, _: &Arc<Hold>) {
        self.0.lock().expect("no panic").push(format!("+{set}"));
    }
    fn remove(&self, set: u128) {
        self.0.lock().expect("no panic").push(format!("-{set}"));
    }
}

struct Scene {
    calls: Calls,
    hold: Arc<Hold>,
    sets: Sets,
    result: Result<Ended, Refusal>,
    selection: Selection,
}

fn play(word: bool, change: impl FnOnce(&mut Play)) -> Scene {
    let told = Arc::new(AtOnce {
        word,
        hold: Mutex::default(),
    });
    let hold = Arc::new(Hold::new(Box::new(Arc::clone(&told))));
    *told.hold.lock().expect("no panic") = Arc::downgrade(&hold);
    let calls = Calls::default();
    let mut vss = Play {
        calls: Arc::clone(&calls),
        hold: Arc::clone(&hold),
        writer: sql(vec![component("SRV\\sales", true, &[r"S:\db"])]),
        begin: (1, 0),
        end: (5, 0),
        context: None,
        fails_at: None,
        skips_provider: false,
        done: false,
    };
    change(&mut vss);
    let (inventory, luns) = (inventory(), [lun(1)]);
    let volumes: Vec<Volume> = inventory.on(&luns).cloned().collect();
    let order = Order {
        inventory: &inventory,
        luns: &luns,
        volumes: &volumes,
        wanted: WANTED,
    };
    let sets = Sets::default();
    let mut backup = Backup::new(Box::new(vss));
    let result = backup.prepare(&order, &sets, &hold).map(|()| {
        let freeze = backup.freeze(&hold);
        backup.ended(&hold, &freeze)
    });
    let selection = backup.selection().clone();
    let success = matches!(&result, Ok(ended) if ended.in_force);
    assert_eq!(backup.finish(success, &sets), None);
    Scene {
        calls,
        hold,
        sets,
        result,
        selection,
    }
}

impl Scene {
    fn calls(&self) -> String {
        self.calls.lock().expect("no panic").join(", ")
    }

    fn ended(&self) -> &Ended {
        self.result.as_ref().unwrap_or_else(|refusal| panic!("{refusal}"))
    }
}

#[test]
fn the_calls_come_in_the_order_of_the_specification() {
    let scene = play(true, |_| {});
    let volume = inventory().volumes[1].name.clone();
    assert_eq!(
        scene.calls(),
        format!(
            "initialize, state, context 200002b, metadata, add sales, start, volume {volume}, prepare, status, snapshot, status, \
             succeeded sales, complete"
        )
    );
    assert!(scene.ended().in_force && scene.hold.was_kept());
    assert_eq!(scene.ended().apps[0].state, AppState::Thawed);
    assert_eq!(*scene.sets.0.lock().expect("no panic"), ["+77", "-77"]);
    assert!(
        scene
            .selection
            .exclusions
            .iter()
            .all(|one| one.kind == ExclusionKind::Application)
    );
}

#[test]
fn a_client_edition_gets_its_context_without_transportable() {
    let scene = play(true, |vss| vss.context = Some(CONTEXT));
    assert!(
        scene
            .calls()
            .contains("context 200002b, context 200000b, metadata"),
        "{}",
        scene.calls()
    );
    assert!(scene.ended().in_force);
}

#[test]
fn nothing_but_a_kept_hold_and_well_writers_is_in_force() {
    type Change = fn(&mut Play);
    let bad: [(bool, Change, &str); 6] = [
        (false, |_| {}, "PROVIDER_VETO"),
        (true, |vss| vss.end = (10, 0), "FAILED_AT_THAW"),
        (
            true,
            |vss| vss.end = (5, 0x8004_23f3_u32.cast_signed()),
            "RETRYABLE",
        ),
        (true, |vss| vss.end = (3, 0), "WAITING_FOR_THAW"),
        (
            true,
            |vss| vss.skips_provider = true,
            "without Stillpoint's provider",
        ),
        (
            true,
            |vss| vss.fails_at = Some(("snapshot", 0x8004_2314_u32.cast_signed())),
            "HOLD_WRITES_TIMEOUT",
        ),
    ];
    for (word, change, why) in bad {
        let scene = play(word, change);
        let ended = scene.ended();
        let reason = ended.reason.as_deref().unwrap_or_default();
        assert!(!ended.in_force && reason.contains(why), "{why}: {reason}");
        assert!(scene.calls().ends_with("abort"), "{why}: {}", scene.calls());
    }
}

#[test]
fn a_writer_that_failed_already_spares_everybody_the_freeze() {
    let scene = play(true, |vss| vss.begin = (7, 0));
    let refusal = scene.result.as_ref().err().expect("refused");
    assert_eq!(refusal.code, ErrorCode::WriterFailed);
    assert!(!scene.calls().contains("snapshot") && scene.calls().ends_with("abort"));
    assert!(!scene.hold.was_frozen());
}

#[test]
fn every_call_that_fails_is_told_and_ends_in_an_abort() {
    let calls = [
        "initialize",
        "state",
        "metadata",
        "add",
        "start",
        "volume",
        "prepare",
        "status",
    ];
    for call in calls {
        let scene = play(true, |vss| {
            vss.fails_at = Some((call, 0x8004_2316_u32.cast_signed()))
        });
        let refusal = scene.result.as_ref().err().unwrap_or_else(|| panic!("{call}"));
        assert_eq!(refusal.code, ErrorCode::Busy, "{call}");
        assert!(refusal.text.contains("another program"), "{call}: {refusal}");
        assert!(scene.calls().ends_with("abort"), "{call}: {}", scene.calls());
    }
}
