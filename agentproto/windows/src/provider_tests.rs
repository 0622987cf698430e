//! Sets of backup programs against a target that is played.

use std::collections::BTreeMap;

use stillpoint_agentproto::{ErrorCode, Refusal};

use super::*;

/// Notes what is asked, and reserves what is asked for.
#[derive(Default)]
struct Target {
    asked: Mutex<Vec<String>>,
    refuses: Mutex<Option<&'static str>>,
    /// LUN by shadow copy.
    alive: Mutex<BTreeMap<ShadowId, LunId>>,
}

struct Played(Arc<Target>);

fn short(id: [u8; 16]) -> u8 {
    id[15]
}

impl Played {
    fn ask(&self, text: String) -> Result<(), CallError> {
        let refuses = lock(&self.0.refuses).is_some_and(|word| text.starts_with(word));
        lock(&self.0.asked).push(text);
        if refuses {
            return Err(CallError::Refused(Refusal::new(
                ErrorCode::Deadline,
                "not within a second",
            )));
        }
        Ok(())
    }
}

fn copy_of(shadow: ShadowId) -> LunId {
    let mut id = shadow.0;
    id[0] = 0x60;
    LunId(id)
}

fn identity(shadow: ShadowId) -> LunIdentity {
    LunIdentity {
        lun: copy_of(shadow),
        serial: Some(format!("s{}", short(shadow.0))),
        iqn: None,
        number: None,
        size_bytes: None,
    }
}

impl Wire for Played {
    fn query(&mut self, luns: Vec<LunIdentity>) -> Result<Vec<bool>, CallError> {
        self.ask(format!("query {}", luns.len())).map(|()| Vec::new())
    }
    fn begin(&mut self, ask: ProvBegin) -> Result<ProvReady, CallError> {
        let shadows: Vec<u8> = ask.shadows.iter().map(|one| short(one.shadow.0)).collect();
        self.ask(format!(
            "begin {} {shadows:?} {} {}",
            short(ask.set.0),
            ask.initiator,
            ask.writable
        ))?;
        let reserved = ask.shadows.into_iter().map(|one| {
            lock(&self.0.alive).insert(one.shadow, one.lun);
            Shadow {
                shadow: one.shadow,
                source: one.lun,
                identity: identity(one.shadow),
            }
        });
        Ok(ProvReady {
            token: [short(ask.set.0); 16],
            waits_ms: 60_000,
            shadows: reserved.collect(),
        })
    }
    fn commit(&mut self, ask: ProvCommit) -> Result<(), CallError> {
        assert_eq!(ask.token, [short(ask.set.0); 16]);
        self.ask(format!("commit {}", short(ask.set.0)))
    }
    fn expose(&mut self, ask: ProvExpose) -> Result<LunIdentity, CallError> {
        self.ask(format!("expose {}", short(ask.shadow.0)))?;
        Ok(identity(ask.shadow))
    }
    fn delete(&mut self, ask: ProvDelete) -> Result<(), CallError> {
        let what = ask
            .shadow
            .map_or_else(|| "all".to_owned(), |one| short(one.0).to_string());
        self.ask(format!("delete {} {what} {:?}", short(ask.set.0), ask.why))?;
        let mut alive = lock(&self.0.alive);
        match ask.shadow {
            Some(shadow) => {
                alive.remove(&shadow);
            }
            None => alive.clear(),
        }
        Ok(())
    }
}

struct One(Arc<Target>);

impl Targets for One {
    fn of(&self, lun: LunId) -> Option<Fingerprint> {
        (lun.0[15] < 100).then_some(Fingerprint([1; 32]))
    }
    fn connect(&self, _: Fingerprint) -> Result<Box<dyn Wire>, String> {
        Ok(Box::new(Played(Arc::clone(&self.0))))
    }
    fn initiator(&self) -> Option<String> {
        Some("iqn.1991-05.com.microsoft:backup".to_owned())
    }
}

struct Stage {
    target: Arc<Target>,
    provider: Provider,
    dir: tempfile::TempDir,
}

fn stage() -> Stage {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let target = Arc::new(Target::default());
    let provider = Provider::new(Arc::new(One(Arc::clone(&target))), Ledger::open(dir.path()));
    Stage {
        target,
        provider,
        dir,
    }
}

impl Stage {
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.target.asked))
    }
}

fn info(byte: u8) -> LunInfo {
    let mut id = [0; 16];
    (id[0], id[15]) = (0x60, byte);
    LunInfo::of_lun(LunId(id), "0001")
}

#[test]
fn a_set_goes_its_whole_way() {
    let stage = stage();
    let provider = &stage.provider;
    provider.begin_prepare(1, 10, &[info(3)]).expect("taken");
    // A second volume on the same LUN, and one over two LUNs.
    provider.begin_prepare(1, 20, &[info(3)]).expect("taken");
    provider.begin_prepare(1, 40, &[info(4), info(5)]).expect("taken");
    provider.end_prepare(1).expect("reserved");
    assert_eq!(
        stage.asked(),
        ["begin 1 [10, 40, 41] iqn.1991-05.com.microsoft:backup true"]
    );
    provider.pre_commit(1).expect("alive");
    provider.commit(1).expect("cut");
    assert_eq!(stage.asked(), ["query 0", "commit 1"]);
    provider.post_commit(1).expect("kept");
    let copies = provider.target_luns(&[info(4), info(5)]).expect("known");
    let serials: Vec<&str> = copies.iter().map(|copy| copy.serial.as_str()).collect();
    assert_eq!(serials, ["s40", "s41"]);
    assert!(!copies[0].is_same_lun(&info(4)), "the copy has a name of its own");
    provider.final_commit(1).expect("nothing to do");
    // The service starts again; VSS knows nothing but the LUN.
    let again = Provider::new(
        Arc::new(One(Arc::clone(&stage.target))),
        Ledger::open(stage.dir.path()),
    );
    assert!(again.supports(&copies));
    again.locate(&copies).expect("shown");
    again.lun_empty(&copies[0]).expect("deleted");
    assert_eq!(stage.asked(), ["expose 40", "expose 41", "delete 1 40 Delete"]);
    let twice = again.lun_empty(&copies[0]).expect_err("gone");
    assert!(matches!(twice, ProviderError::NotFound(_)));
}

#[test]
fn an_abort_in_any_state_leaves_nothing() {
    for steps in 0..5 {
        let stage = stage();
        let provider = &stage.provider;
        let all: [&dyn Fn() -> Result<(), ProviderError>; 4] = [
            &|| provider.begin_prepare(1, 10, &[info(3)]),
            &|| provider.end_prepare(1),
            &|| provider.commit(1),
            &|| provider.post_commit(1),
        ];
        for step in &all[..steps] {
            step().expect("good");
        }
        provider.abort(1).expect("aborted");
        provider.abort(1).expect("twice is no error");
        assert!(lock(&stage.target.alive).is_empty(), "{steps}");
        assert!(provider.target_luns(&[info(3)]).is_err(), "{steps}");
        assert!(
            matches!(provider.commit(1), Err(ProviderError::NotFound(_))),
            "{steps}"
        );
        assert_eq!(
            Ledger::open(stage.dir.path()).find(copy_of(ShadowId(10u128.to_be_bytes()))),
            None
        );
    }
}

#[test]
fn two_sets_at_once_do_not_mix() {
    let stage = stage();
    let provider = &stage.provider;
    std::thread::scope(|scope| {
        for set in [1u8, 2] {
            scope.spawn(move || {
                let id = u128::from(set);
                provider
                    .begin_prepare(id, id * 10, &[info(set + 2)])
                    .expect("taken");
                provider.end_prepare(id).expect("reserved");
                provider.pre_commit(id).expect("alive");
                provider.commit(id).expect("cut");
                provider.post_commit(id).expect("kept");
            });
        }
    });
    for (set, serial) in [(1, "s10"), (2, "s20")] {
        let copies = provider.target_luns(&[info(set + 2)]).expect("known");
        assert_eq!(copies[0].serial, serial);
    }
}

#[test]
fn a_commit_that_the_target_does_not_make_is_a_veto_and_is_undone() {
    let stage = stage();
    let provider = &stage.provider;
    provider.begin_prepare(1, 10, &[info(3)]).expect("taken");
    provider.end_prepare(1).expect("reserved");
    *lock(&stage.target.refuses) = Some("commit");
    let error = provider.commit(1).expect_err("refused");
    assert!(
        matches!(&error, ProviderError::Veto(why) if why.contains("within a second")),
        "{error:?}"
    );
    assert!(matches!(provider.post_commit(1), Err(ProviderError::State(_))));
    provider.abort(1).expect("aborted");
    assert!(lock(&stage.target.alive).is_empty());
}

#[test]
fn what_is_not_ours_or_out_of_order_is_refused() {
    let stage = stage();
    let provider = &stage.provider;
    assert!(
        provider.supports(&[info(3)]) && !provider.supports(&[info(3), info(200)]) && !provider.supports(&[])
    );
    assert!(matches!(
        provider.begin_prepare(1, 1, &[info(200)]),
        Err(ProviderError::Veto(_))
    ));
    assert!(matches!(provider.end_prepare(9), Err(ProviderError::NotFound(_))));
    provider.begin_prepare(1, 1, &[info(3)]).expect("taken");
    assert!(matches!(provider.commit(1), Err(ProviderError::State(_))));
    provider.end_prepare(1).expect("reserved");
    assert!(matches!(
        provider.begin_prepare(1, 2, &[info(3)]),
        Err(ProviderError::State(_))
    ));
    for set in 2..=u128::try_from(SETS_MAX).expect("few") {
        provider.begin_prepare(set, set, &[info(3)]).expect("taken");
    }
    let many = provider.begin_prepare(99, 99, &[info(3)]).expect_err("too many");
    assert!(matches!(many, ProviderError::Veto(_)));
}
