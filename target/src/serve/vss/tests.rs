//! The provider on a daemon without sockets: rules, quotas, identities, restart, the reaper with a clock of its own.

use std::path::Path;

use stillpoint_agentproto::ShadowId;
use stillpoint_agentproto::message::{DeleteReason, LunIdentity, ShadowAsk};
use stillpoint_config::Config;

use super::*;
use crate::serve::state::VolumeKind;
use crate::serve::{apply, open};

const AGENT: AgentId = AgentId([1; 16]);
const HOST: &str = "iqn.1991-05.com.microsoft:backup";
const IQN: &str = "iqn.2026-11.test:sql01";
const DAY_MS: i64 = 24 * 3600 * 1000;

fn config(dir: &Path) -> Config {
    let text = format!(
        "[daemon]\ndata_dir = \"{0}\"\ncontrol_socket = \"{0}/control.sock\"\n[[portal]]\naddress = \"127.0.0.1:3260\"\n\
         [agents]\nlisten = \"127.0.0.1:11169\"\n\
         [[lun]]\nname = \"sql01\"\nsize = \"64MiB\"\n[[lun]]\nname = \"other\"\nsize = \"64MiB\"\n\
         [[target]]\niqn = \"{IQN}\"\nluns = [\"sql01\"]\ninitiators = [\"*\"]\nagents = true\n\
         [[target]]\niqn = \"iqn.2026-11.test:other\"\nluns = [\"other\"]\ninitiators = [\"*\"]\nagents = true\n",
        dir.display()
    );
    Config::parse(&text, &dir.join("stillpoint.toml")).expect("a good file")
}

/// A daemon that serves no port.
struct Bench {
    daemon: Arc<Daemon>,
    _lock: std::fs::File,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn start(dir: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let guard = runtime.enter();
        let (lock, daemon) = open(config(dir), None).unwrap();
        apply::first_start(&daemon).unwrap();
        drop(guard);
        Self {
            daemon,
            _lock: lock,
            runtime,
        }
    }

    /// The daemon is gone, as after a stop.
    fn stop(self) {
        self.daemon.pool.shutdown().unwrap();
        drop(self.daemon);
        drop(self.runtime);
    }

    fn lun(&self, name: &str) -> LunId {
        LunId(self.daemon.registry.lun(name).unwrap().identity().naa)
    }

    fn asker(&self, agent: AgentId) -> Asker {
        Asker {
            agent,
            host: "winsrv".into(),
            luns: vec![self.lun("sql01")],
            initiators: Some(vec![HOST.into()]),
            provides: true,
        }
    }

    fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        serve(&self.daemon, &self.asker(AGENT), request)
    }

    fn begin(&self, number: u8) -> Result<ProvReady, Refusal> {
        match self.ask(Request::ProvBegin(self.begin_ask(number)))? {
            Reply::ProvBegin(ready) => Ok(ready),
            other => panic!("{other:?}"),
        }
    }

    fn begin_ask(&self, number: u8) -> ProvBegin {
        ProvBegin {
            set: SetId([number; 16]),
            shadows: vec![ShadowAsk {
                shadow: ShadowId([number; 16]),
                lun: self.lun("sql01"),
            }],
            initiator: HOST.into(),
            writable: true,
        }
    }

    fn commit(&self, number: u8, token: [u8; 16]) -> Result<ProvTaken, Refusal> {
        let set = SetId([number; 16]);
        match self.ask(Request::ProvCommit(ProvCommit { set, token }))? {
            Reply::ProvCommit(taken) => Ok(taken),
            other => panic!("{other:?}"),
        }
    }

    fn expose(&self, number: u8, visibility: Visibility) -> Result<LunIdentity, Refusal> {
        let ask = ProvExpose {
            set: SetId([number; 16]),
            shadow: ShadowId([number; 16]),
            initiator: HOST.into(),
            visibility,
        };
        match self.ask(Request::ProvExpose(ask))? {
            Reply::ProvExpose(exposed) => Ok(exposed.identity),
            other => panic!("{other:?}"),
        }
    }

    fn delete(&self, number: u8) -> u32 {
        let ask = ProvDelete {
            set: SetId([number; 16]),
            shadow: None,
            why: DeleteReason::Abort,
        };
        match self.ask(Request::ProvDelete(ask)).unwrap() {
            Reply::ProvDelete(gone) => gone.removed,
            other => panic!("{other:?}"),
        }
    }

    /// A set that is taken; its token and the identity that was reserved.
    fn taken(&self, number: u8) -> LunIdentity {
        let ready = self.begin(number).unwrap();
        self.commit(number, ready.token).unwrap();
        ready.shadows[0].identity.clone()
    }

    fn vss_volumes(&self) -> usize {
        let is_copy = |volume: &stillpoint_snapshot::VolumeInfo| {
            crate::serve::state::VolumeTag::of(volume).unwrap().kind == VolumeKind::Vss
        };
        self.daemon
            .pool
            .volumes()
            .iter()
            .filter(|volume| is_copy(volume))
            .count()
    }

    /// Nothing of any set is left.
    fn assert_clean(&self) {
        assert_eq!(self.vss_volumes(), 0);
        assert!(self.daemon.pool.snapshots(None).is_empty());
        assert!(self.daemon.vss.names().is_empty());
        assert!(self.daemon.state.big_list("vss/").is_empty());
        let rules = self.daemon.registry.target(IQN).unwrap().rules();
        assert!(rules.transients.is_empty());
    }
}

fn write(daemon: &Daemon, lun: &str, byte: u8) {
    daemon
        .pool
        .volume(lun)
        .unwrap()
        .write(0, &[byte; 4096], true)
        .unwrap();
}

fn read(daemon: &Daemon, lun: &str) -> u8 {
    let mut buffer = [0; 512];
    daemon.pool.volume(lun).unwrap().read(0, &mut buffer).unwrap();
    buffer[0]
}

#[test]
fn a_set_lives_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    write(&bench.daemon, "sql01", 1);
    let ready = bench.begin(1).unwrap();
    let reserved = ready.shadows[0].identity.clone();
    assert!(reserved.number.is_none() && reserved.lun != bench.lun("sql01"));
    let expose = bench.expose(1, Visibility::Exposed).unwrap_err();
    assert_eq!(
        expose.code,
        ErrorCode::WrongState,
        "nothing is there to be shown before the commit"
    );
    write(&bench.daemon, "sql01", 2);
    let taken = bench.commit(1, ready.token).unwrap();
    write(&bench.daemon, "sql01", 3);
    assert_eq!(
        bench.commit(1, ready.token),
        Ok(taken.clone()),
        "a repeat gets the same answer"
    );
    assert_eq!(bench.daemon.pool.snapshots(None).len(), 1);
    let shown = bench.expose(1, Visibility::Exposed).unwrap();
    assert_eq!((shown.lun, &shown.serial), (reserved.lun, &reserved.serial));
    assert_eq!(shown.number, Some(1));
    assert_eq!(shown.iqn.as_deref(), Some(IQN));
    let name = &taken.shadows[0].name;
    let lun = bench.daemon.registry.lun(name).unwrap();
    assert_eq!(lun.identity().naa, reserved.lun.0);
    assert_eq!(read(&bench.daemon, name), 2, "as it was at the commit");
    let rules = bench.daemon.registry.target(IQN).unwrap().rules();
    assert_eq!(rules.numbers_for(&HOST.to_uppercase()).into_owned(), [0, 1]);
    assert_eq!(rules.numbers_for("iqn.of.another").into_owned(), [0]);
    // Masked and shown again it has what was written to it, and its number.
    write(&bench.daemon, name, 9);
    assert_eq!(bench.expose(1, Visibility::Masked).unwrap().number, None);
    assert!(bench.daemon.registry.lun(name).is_none());
    assert_eq!(bench.expose(1, Visibility::Exposed).unwrap(), shown);
    assert_eq!((read(&bench.daemon, name), read(&bench.daemon, "sql01")), (9, 3));
    assert_eq!(bench.delete(1), 1);
    assert_eq!(bench.delete(1), 0, "gone is gone");
    bench.assert_clean();
    bench.stop();
}

#[test]
fn rules_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    let refused = |asker: Asker, request: Request| serve(&bench.daemon, &asker, request).unwrap_err().code;
    let ask = bench.begin_ask(1);
    let begin = |ask: &ProvBegin| Request::ProvBegin(ask.clone());
    let good = bench.asker(AGENT);
    let off = Asker {
        provides: false,
        ..good.clone()
    };
    assert_eq!(refused(off, begin(&ask)), ErrorCode::NotAllowed);
    let away = Asker {
        initiators: None,
        ..good.clone()
    };
    assert_eq!(refused(away, begin(&ask)), ErrorCode::WrongState);
    let foreign = ProvBegin {
        initiator: "iqn.of.another".into(),
        ..ask.clone()
    };
    assert_eq!(refused(good.clone(), begin(&foreign)), ErrorCode::NotAllowed);
    let mut others_lun = ask.clone();
    others_lun.shadows[0].lun = bench.lun("other");
    assert_eq!(refused(good.clone(), begin(&others_lun)), ErrorCode::NotAllowed);
    let mut twice = ask.clone();
    twice.shadows.push(twice.shadows[0].clone());
    assert_eq!(refused(good.clone(), begin(&twice)), ErrorCode::Malformed);
    let empty = ProvBegin {
        shadows: vec![],
        ..ask.clone()
    };
    assert_eq!(refused(good, begin(&empty)), ErrorCode::TooLarge);
    bench.assert_clean();

    let ready = bench.begin(1).unwrap();
    assert_eq!(bench.begin(1).unwrap(), ready, "a repeat reserves nothing new");
    let other = ProvBegin {
        writable: false,
        ..ask
    };
    assert_eq!(bench.ask(begin(&other)).unwrap_err().code, ErrorCode::Conflict);
    assert_eq!(bench.commit(1, [0; 16]).unwrap_err().code, ErrorCode::NotAllowed);
    assert_eq!(
        bench.commit(2, ready.token).unwrap_err().code,
        ErrorCode::UnknownSession
    );
    // Another agent does not even learn of the set.
    let stranger = bench.asker(AgentId([2; 16]));
    let set = SetId([1; 16]);
    let commit = Request::ProvCommit(ProvCommit {
        set,
        token: ready.token,
    });
    assert_eq!(refused(stranger, commit), ErrorCode::UnknownSession);
    assert_eq!(bench.delete(1), 1);
    bench.assert_clean();
    bench.stop();
}

#[test]
fn what_the_host_reads_of_its_disk_has_to_agree() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    let lun = bench.daemon.registry.lun("sql01").unwrap();
    let good = LunIdentity {
        lun: bench.lun("sql01"),
        serial: Some(format!(" {} ", lun.identity().serial.to_lowercase())),
        iqn: Some(IQN.to_uppercase()),
        number: Some(0),
        size_bytes: Some(64 << 20),
    };
    let serial = LunIdentity {
        serial: Some("X".into()),
        ..good.clone()
    };
    let size = LunIdentity {
        size_bytes: Some(1),
        ..good.clone()
    };
    let other = LunIdentity {
        lun: bench.lun("other"),
        ..good.clone()
    };
    let luns = vec![good, serial, size, other];
    let Reply::ProvQuery(support) = bench.ask(Request::ProvQuery(ProvQuery { luns })).unwrap() else {
        panic!()
    };
    let codes: Vec<_> = support.luns.iter().map(|lun| (lun.supported, lun.code)).collect();
    let mismatch = (false, Some(ErrorCode::IdentityMismatch));
    assert_eq!(
        codes,
        [
            (true, None),
            mismatch,
            mismatch,
            (false, Some(ErrorCode::NotAllowed))
        ]
    );
    bench.stop();
}

#[test]
fn quotas_bound_sets_and_copies() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    for number in 1..=4 {
        bench.taken(number);
    }
    assert_eq!(
        bench.begin(5).unwrap_err().code,
        ErrorCode::Busy,
        "four sets of one agent"
    );
    let second = bench.asker(AgentId([2; 16]));
    for number in 5..=8 {
        serve(
            &bench.daemon,
            &second,
            Request::ProvBegin(bench.begin_ask(number)),
        )
        .unwrap();
    }
    let third = bench.asker(AgentId([3; 16]));
    let refused = serve(&bench.daemon, &third, Request::ProvBegin(bench.begin_ask(9))).unwrap_err();
    assert_eq!(
        (refused.code, refused.subject.as_deref()),
        (ErrorCode::Busy, Some("sql01"))
    );
    assert_eq!(bench.delete(1), 1);
    bench.begin(9).unwrap();
    bench.stop();
}

#[test]
fn a_restart_keeps_what_was_answered_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    write(&bench.daemon, "sql01", 1);
    let reserved = bench.taken(1);
    let shown = bench.expose(1, Visibility::Exposed).unwrap();
    let name = bench.daemon.vss.names().remove(0);
    write(&bench.daemon, &name, 7);
    let token = bench.begin(2).unwrap().token;
    bench.taken(3);
    bench.stop();

    let bench = Bench::start(dir.path());
    assert_eq!(
        bench.commit(2, token).unwrap_err().code,
        ErrorCode::UnknownSession
    );
    assert_eq!(bench.daemon.pool.snapshots(None).len(), 2);
    let rules = bench.daemon.registry.target(IQN).unwrap().rules();
    assert_eq!(
        rules.numbers_for(HOST).into_owned(),
        [0, shown.number.unwrap()],
        "shown again, the masked one not"
    );
    let lun = bench.daemon.registry.lun(&name).unwrap();
    assert_eq!(LunId(lun.identity().naa), reserved.lun);
    assert_eq!(read(&bench.daemon, &name), 7);
    assert_eq!(bench.expose(1, Visibility::Exposed).unwrap(), shown);
    assert_eq!((bench.delete(1), bench.delete(3)), (1, 1));
    bench.assert_clean();
    bench.stop();
}

#[test]
fn an_interrupted_deletion_is_finished_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    bench.taken(1);
    bench.expose(1, Visibility::Exposed).unwrap();
    {
        let set = bench.daemon.vss.get(SetId([1; 16])).unwrap();
        let mut set = lock(&set);
        set.copies[0].going = true;
        set.store(&bench.daemon.state).unwrap();
    }
    bench.stop();
    let bench = Bench::start(dir.path());
    bench.assert_clean();
    bench.stop();
}

#[test]
fn two_volumes_of_one_lun_are_one_copy() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    let mut ask = bench.begin_ask(1);
    let second = ShadowId([2; 16]);
    ask.shadows.push(ShadowAsk {
        shadow: second,
        lun: bench.lun("sql01"),
    });
    let Reply::ProvBegin(ready) = bench.ask(Request::ProvBegin(ask)).unwrap() else {
        panic!()
    };
    assert_eq!(ready.shadows.len(), 2);
    assert_eq!(ready.shadows[0].identity, ready.shadows[1].identity);
    bench.commit(1, ready.token).unwrap();
    bench.expose(1, Visibility::Exposed).unwrap();
    let delete = |shadow| {
        let ask = ProvDelete {
            set: SetId([1; 16]),
            shadow: Some(shadow),
            why: DeleteReason::Delete,
        };
        match bench.ask(Request::ProvDelete(ask)).unwrap() {
            Reply::ProvDelete(gone) => gone.removed,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(delete(second), 1);
    assert_eq!(bench.vss_volumes(), 1, "the other volume still stands on it");
    assert_eq!(delete(second), 0);
    assert_eq!(delete(ShadowId([1; 16])), 1);
    bench.assert_clean();
    bench.stop();
}

#[test]
fn what_agents_forget_goes() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    bench.begin(1).unwrap();
    bench.taken(2);
    bench.taken(3);
    bench.expose(3, Visibility::Exposed).unwrap();
    let now = now_ms();
    reap::look(&bench.daemon, now);
    assert_eq!(bench.daemon.vss.names().len(), 3);
    reap::look(&bench.daemon, now + i64::from(BEGUN_MAX_MS));
    assert_eq!(
        bench.daemon.vss.names().len(),
        2,
        "the one that was never committed"
    );
    reap::look(&bench.daemon, now + DAY_MS - 60_000);
    assert_eq!(bench.daemon.vss.names().len(), 2);
    reap::look(&bench.daemon, now + DAY_MS + 60_000);
    bench.assert_clean();
    let events = bench.daemon.events.newest(100);
    let left: Vec<_> = events.iter().filter(|event| event.code == "SP-5033").collect();
    assert_eq!(left.len(), 3, "{events:?}");
    assert!(left.iter().all(|event| event.text.contains("winsrv")));
    bench.stop();
}

#[test]
fn operators_see_copies_and_can_take_them_away() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path());
    bench.taken(1);
    bench.expose(1, Visibility::Exposed).unwrap();
    let views = bench.daemon.vss.views(now_ms() + 90_000);
    let (name, view) = views.iter().next().unwrap();
    assert_eq!(view.owner, "winsrv");
    assert!(view.source.starts_with("sql01@vss-") && view.age_seconds >= 90);
    let snapshot = bench.daemon.pool.snapshots(None).remove(0);
    let refused = crate::serve::snapshots::check_deletable(&bench.daemon, &snapshot).unwrap_err();
    assert_eq!((refused.code.as_str(), refused.exit), ("shadow_copy", 3));
    assert!(!delete_by_operator(&bench.daemon, "sql01", "ann").unwrap());
    assert!(delete_by_operator(&bench.daemon, name, "ann").unwrap());
    bench.assert_clean();
    bench.stop();
}
