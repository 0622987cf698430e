//! Logins: short cuts, repeated keys, second paths, rules.

use super::*;

/// Sends a login PDU to a fresh connection: a refusal of class 2, or the end of the connection, but no session.
fn refused_login(daemon: &Daemon, what: &str, pdus: &[Pdu]) -> Result<()> {
    let mut raw = Raw::connect(address(daemon))?;
    for pdu in pdus {
        raw.send(pdu)?;
    }
    for pdu in raw
        .ends_within(Duration::from_secs(3))
        .with_context(|| what.to_owned())?
    {
        let partial = pdu.opcode() == op::LOGIN_RESPONSE && pdu.at(36) == 0 && pdu.at(1) & 3 != 3;
        let refusal = pdu.opcode() == op::LOGIN_RESPONSE && pdu.at(36) == 2;
        let reject = pdu.opcode() == op::REJECT;
        ensure!(partial || refusal || reject, "{what}: {pdu:?}");
    }
    Ok(())
}

#[test]
fn p09_the_login_state_machine_takes_no_short_cuts() {
    attack("login states", |daemon| {
        let names = format!("InitiatorName={ME}\0TargetName={DISK}\0");
        let isid = [0, 2, 0x3d, 0, 0, 9];
        let with = |flags: u8| login_request(flags, &isid).data(names.clone());
        let empty = |flags: u8| login_request(flags, &isid);
        refused_login(daemon, "transit and continue", &[with(0xc7)])?;
        refused_login(daemon, "reserved stage", &[with(0x88 | 3)])?;
        refused_login(daemon, "starts in full feature phase", &[with(0x8c | 3)])?;
        refused_login(daemon, "back to security", &[with(0x84)])?;
        refused_login(daemon, "operational, then security", &[with(0x04), empty(0x81)])?;
        refused_login(
            daemon,
            "another ISID in the middle",
            &[with(0x04), login_request(0x87, &[1; 6])],
        )?;
        refused_login(
            daemon,
            "another ITT in the middle",
            &[with(0x04), empty(0x87).itt(99)],
        )?;
        refused_login(
            daemon,
            "a session that does not exist",
            &[with(0x87).bytes(14, &[0x12, 0x34])],
        )?;
        refused_login(
            daemon,
            "a version that does not exist",
            &[with(0x87).byte(2, 9).byte(3, 9)],
        )?;
        refused_login(daemon, "no names", &[empty(0x87)])?;
        refused_login(
            daemon,
            "no target",
            &[empty(0x87).data(format!("InitiatorName={ME}\0"))],
        )?;
        refused_login(
            daemon,
            "a command instead of a login",
            &[Cdb::read10(0, 0, 1).pdu(1)],
        )?;
        refused_login(
            daemon,
            "a command during login",
            &[with(0x04), Cdb::write10(0, 0, 1).pdu(1).data([1; 512])],
        )?;
        refused_login(
            daemon,
            "a ping instead of a login",
            &[Pdu::new(op::NOP_OUT).itt(1)],
        )?;
        refused_login(
            daemon,
            "garbage",
            &[Pdu {
                bhs: [0xee; BHS_LEN],
                ahs: vec![],
                data: vec![0xee; 100],
            }],
        )?;
        refused_login(
            daemon,
            "additional headers",
            &[Pdu {
                ahs: vec![0xaa; 400],
                ..with(0x87)
            }],
        )?;
        let endless: Vec<Pdu> = (0..100)
            .map(|i| if i == 0 { with(0x04) } else { empty(0x04) })
            .collect();
        let mut raw = Raw::connect(address(daemon))?;
        for pdu in &endless {
            if raw.send(pdu).is_err() || !matches!(raw.receive(SERVED)?, Came::Pdu(_)) {
                return Ok(());
            }
        }
        bail!("a hundred login requests without an end");
    });
}

#[test]
fn p10_keys_come_once_and_text_is_put_together_first() {
    attack("login text", |daemon| {
        let isid = [0, 2, 0x3d, 0, 0, 9];
        let names = format!("InitiatorName={ME}\0TargetName={DISK}\0");
        let twice = format!("{names}MaxBurstLength=65536\0MaxBurstLength=65536\0");
        refused_login(
            daemon,
            "the same key twice",
            &[login_request(0x87, &isid).data(twice)],
        )?;
        refused_login(
            daemon,
            "no equals sign",
            &[login_request(0x87, &isid).data(format!("{names}Bogus\0"))],
        )?;
        // A key cut in two by a continuation, byte by byte.
        let text = format!("{names}HeaderDigest=None\0");
        let mut raw = Raw::connect(address(daemon))?;
        for (i, byte) in text.as_bytes().iter().enumerate().take(40) {
            raw.send(&login_request(0x44, &isid).data([*byte]))?;
            let answer = raw.expect("an empty response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
            ensure!(
                answer.at(36) == 0 && answer.data.is_empty(),
                "after {i} bytes: {answer:?}"
            );
        }
        raw.send(&login_request(0x87, &isid).data(&text.as_bytes()[40..]))?;
        let answer = raw.expect("the last response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        ensure!(answer.at(36) == 0 && answer.at(1) & 0x83 == 0x83, "{answer:?}");
        ensure!(
            answer.text().contains(&"HeaderDigest=None".to_owned()),
            "{answer:?}"
        );
        // Text without an end is cut off.
        let mut raw = Raw::connect(address(daemon))?;
        let piece = login_request(0x44, &isid).data(vec![b'A'; 8192]);
        for _ in 0..20 {
            if raw.send(&piece).is_err() {
                break;
            }
            match raw.receive(SERVED)? {
                Came::Pdu(pdu) if pdu.at(36) == 0 => {}
                Came::Pdu(pdu) => {
                    ensure!(pdu.at(36) == 2, "{pdu:?}");
                    return raw.ends_within(SERVED).map(drop);
                }
                _ => return Ok(()),
            }
        }
        bail!("160 KiB of login text were collected");
    });
}

#[test]
fn p10_oversize_text_after_login_is_refused() {
    attack("oversize text", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        let itt = raw.new_itt();
        let mut ttt = RESERVED;
        let mut refused = false;
        for _ in 0..20 {
            let text = Pdu::new(op::TEXT_REQUEST | IMMEDIATE)
                .byte(1, 0x40)
                .itt(itt)
                .word(20, ttt);
            raw.request(text.data(vec![b'A'; 8192]))?;
            let answer = raw.expect("an answer to text", |pdu| {
                matches!(pdu.opcode(), op::TEXT_RESPONSE | op::REJECT)
            })?;
            if answer.opcode() == op::REJECT {
                refused = true;
                break;
            }
            ttt = answer.word_at(20);
        }
        ensure!(refused, "160 KiB of text were collected");
        raw.read(0, 0, 1)?;
        ensure!(raw.ping(b"still here")? == b"still here");
        Ok(())
    });
}

#[test]
fn p11_names_are_case_sensitive_and_hexadecimal_is_legal() {
    attack("key names and values", |daemon| {
        let nexus = Nexus::new(ME, DISK)
            .key("MaxBurstLength", "0x4000")
            .key("ImmediateData", "yes")
            .key("immediatedata", "Yes");
        // A key that does not begin with a capital is no key; the login as a whole may be refused for it, but not misread.
        let raw = Raw::login(address(daemon), &nexus)?;
        ensure!(matches!(raw, Login::Refused(2, _)), "{raw:?}");
        let nexus = Nexus::new(ME, DISK)
            .key("MaxBurstLength", "0x4000")
            .key("FirstBurstLength", "0X200")
            .key("ImmediateData", "yes");
        let raw = Raw::login(address(daemon), &nexus)?.session()?;
        let has = |text: &str| raw.login_text.iter().any(|pair| pair == text);
        ensure!(
            has("MaxBurstLength=16384") && has("FirstBurstLength=512"),
            "{:?}",
            raw.login_text
        );
        ensure!(
            has("ImmediateData=Reject"),
            "a lower-case boolean is no boolean: {:?}",
            raw.login_text
        );
        Ok(())
    });
}

const AGENTS: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"disk\"\nsize = \"16MiB\"\n\
    [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nagents = true\n\
    [agents]\nlisten = \"127.0.0.1:$AGENTS\"\n";

/// Answers pings until the connection ends; how many there were.
fn keep_alive(mut raw: Raw) -> (Arc<AtomicU32>, thread::JoinHandle<Raw>) {
    let pings = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&pings);
    let thread = thread::spawn(move || {
        while let Ok(Came::Pdu(pdu)) = raw.receive(Duration::from_millis(2500)) {
            if raw::is_ping(&pdu) {
                counter.fetch_add(1, Ordering::Relaxed);
                if raw.pong(&pdu).is_err() {
                    break;
                }
            }
        }
        raw
    });
    (pings, thread)
}

#[test]
fn a_second_path_to_an_agent_target_is_refused_while_the_first_answers() {
    attack_on("second path, first answers", AGENTS, |daemon| {
        let first = log_in(daemon, ME)?;
        let (pings, thread) = keep_alive(first);
        for isid in [2, 3] {
            let (class, detail) = Raw::login(address(daemon), &Nexus::new(ME, DISK).isid(isid))?.refusal()?;
            ensure!((class, detail) == (2, 6), "refused with {class:02x}{detail:02x}");
        }
        ensure!(pings.load(Ordering::Relaxed) >= 2, "the first session was asked");
        // Another initiator is no second path.
        log_in(daemon, OTHER)?.logout()?;
        let mut first = thread.join().expect("no panic");
        first.ready(0)?;
        ensure!(daemon.log().contains("MPIO"), "the log tells the operator why");
        Ok(())
    });
}

#[test]
fn a_silent_first_session_of_an_agent_target_is_replaced() {
    attack_on("silent first session", AGENTS, |daemon| {
        let mut first = log_in(daemon, ME)?;
        let started = Instant::now();
        let mut second = Raw::login(address(daemon), &Nexus::new(ME, DISK).isid(2))?.session()?;
        let took = started.elapsed();
        ensure!(
            took > Duration::from_millis(1800) && took < Duration::from_millis(3500),
            "replaced after {took:?}"
        );
        second.ready(0)?;
        first.ends_within(SERVED)?;
        ensure!(sessions(daemon)?.len() == 1);
        Ok(())
    });
}

#[test]
fn two_paths_at_once_to_an_agent_target_leave_the_first() {
    attack_on("two paths at once", AGENTS, |daemon| {
        // The first login is still being decided on (it replaces a silent session) when the second comes.
        let dead = log_in(daemon, ME)?;
        let target = address(daemon);
        let first = thread::spawn(move || -> Result<Raw> {
            Raw::login(target, &Nexus::new(ME, DISK).isid(2))?.session()
        });
        thread::sleep(Duration::from_millis(700));
        let second = thread::spawn(move || Raw::login(target, &Nexus::new(ME, DISK).isid(3)));
        let first = first
            .join()
            .expect("no panic")
            .context("the first of two paths")?;
        let (_, alive) = keep_alive(first);
        let second = second.join().expect("no panic")?;
        ensure!(
            matches!(second, Login::Refused(2, 6)),
            "the path that came second: {second:?}"
        );
        let mut first = alive.join().expect("no panic");
        first.ready(0)?;
        drop(dead);
        Ok(())
    });
}

#[test]
fn max_sessions_acl_and_portal_groups_are_kept() {
    const RULES: &str = "[[portal]]\naddress = \"127.0.0.1:$PORT\"\ngroup = 1\n[[portal]]\naddress = \"[::1]:$PORT2\"\ngroup = 2\n\
        [[lun]]\nname = \"disk\"\nsize = \"16MiB\"\n[[lun]]\nname = \"friends\"\nsize = \"16MiB\"\n[[lun]]\nname = \"far\"\nsize = \"16MiB\"\n\
        [[lun]]\nname = \"six\"\nsize = \"16MiB\"\n\
        [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\nmax_sessions = 2\nportal_groups = [1]\n\
        [[target]]\niqn = \"iqn.2026-11.test:friends\"\nluns = [\"friends\"]\ninitiators = [\"iqn.2026-11.test.robust:friend\"]\n\
        portal_groups = [1]\n\
        [[target]]\niqn = \"iqn.2026-11.test:far\"\nluns = [\"far\"]\ninitiators = [\"*\"]\nallow_from = [\"10.0.0.0/8\"]\n\
        portal_groups = [1]\n\
        [[target]]\niqn = \"iqn.2026-11.test:six\"\nluns = [\"six\"]\ninitiators = [\"*\"]\nportal_groups = [2]\n";
    attack_on("limits and access", RULES, |daemon| {
        let four = address(daemon);
        let six: SocketAddr = format!("[::1]:{}", daemon.second_port()).parse()?;
        let refused =
            |initiator: &str, target: &str| Raw::login(four, &Nexus::new(initiator, target))?.refusal();
        ensure!(
            refused(ME, "iqn.2026-11.test:friends")? == (2, 2),
            "not on the list"
        );
        ensure!(refused(ME, "iqn.2026-11.test:far")? == (2, 2), "not from here");
        ensure!(
            refused(ME, "iqn.2026-11.test:six")? == (1, 1),
            "not through this portal, but through another"
        );
        // A real initiator goes where it is sent.
        qemu_io(
            &daemon.url("iqn.2026-11.test:six", 0),
            &["write -P 0x66 0 64k", "read -P 0x66 0 64k"],
        )?
        .success()?;
        ensure!(refused(ME, "iqn.2026-11.test:none")? == (2, 3), "no such target");
        Raw::login(
            four,
            &Nexus::new("IQN.2026-11.test.robust:FRIEND", "iqn.2026-11.test:friends"),
        )?
        .session()
        .context("case of names")?;
        let mut through_six = Raw::login(six, &Nexus::new(ME, "iqn.2026-11.test:six"))?
            .session()
            .context("IPv6")?;
        through_six.ready(0)?;
        through_six.write(0, 0, &[6; 4096])?;
        ensure!(through_six.read(0, 0, 8)? == [6; 4096]);
        let mut discovery = Nexus::new(ME, DISK);
        discovery.target = None;
        let mut raw = Raw::login(six, &discovery)?.session()?;
        let itt = raw.new_itt();
        raw.request(
            Pdu::new(op::TEXT_REQUEST)
                .itt(itt)
                .word(20, RESERVED)
                .data("SendTargets=All\0"),
        )?;
        let text = raw
            .expect("SendTargets", |pdu| pdu.opcode() == op::TEXT_RESPONSE)?
            .text();
        ensure!(
            text.contains(&format!("TargetAddress=[::1]:{},2", daemon.second_port())),
            "{text:?}"
        );
        ensure!(
            !text
                .iter()
                .any(|pair| pair.contains(":friends") || pair.contains(":far")),
            "a stranger learns of closed targets: {text:?}"
        );
        // max_sessions = 2: two that answer are kept.
        let (_, one) = keep_alive(Raw::login(four, &Nexus::new(ME, DISK).isid(1))?.session()?);
        let (_, two) = keep_alive(Raw::login(four, &Nexus::new(ME, DISK).isid(2))?.session()?);
        ensure!(
            Raw::login(four, &Nexus::new(ME, DISK).isid(3))?.refusal()? == (2, 6),
            "a third session"
        );
        for thread in [one, two] {
            thread.join().expect("no panic").ready(0)?;
        }
        Ok(())
    });
}

#[test]
fn revoked_access_holds_for_a_login_that_had_begun() {
    attack("revoked in the middle of a login", |daemon| {
        let mut raw = Raw::connect(address(daemon))?;
        raw.send(
            &login_request(0x04, &[0, 2, 0x3d, 0, 0, 1])
                .data(format!("InitiatorName={ME}\0TargetName={DISK}\0")),
        )?;
        let answer = raw.expect("a Login Response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        ensure!(answer.at(36) == 0);
        daemon.write_config(&CONFIG.replace("[\"*\"]", &format!("[\"{OTHER}\"]")))?;
        daemon.text(&["config", "apply", "--yes"])?;
        raw.send(&login_request(0x87, &[0, 2, 0x3d, 0, 0, 1]))?;
        let answer = raw.expect("a Login Response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        ensure!(
            (answer.at(36), answer.at(37)) == (2, 2),
            "logged in with access that was revoked: {answer:?}"
        );
        Ok(())
    });
}

#[test]
fn a_discovery_session_begun_anew_ends_the_old_one() {
    attack("discovery sessions of one name", |daemon| {
        let mut discovery = Nexus::new(ME, DISK);
        discovery.target = None;
        let mut other = Raw::login(address(daemon), &discovery.clone().isid(9))?.session()?;
        let mut old = Raw::login(address(daemon), &discovery)?.session()?;
        let mut new = Raw::login(address(daemon), &discovery)?.session()?;
        old.ends_within(SERVED)?;
        for raw in [&mut other, &mut new] {
            let itt = raw.new_itt();
            raw.request(
                Pdu::new(op::TEXT_REQUEST)
                    .itt(itt)
                    .word(20, RESERVED)
                    .data("SendTargets=All\0"),
            )?;
            raw.expect("SendTargets", |pdu| pdu.opcode() == op::TEXT_RESPONSE)?;
        }
        Ok(())
    });
}

#[test]
fn a_session_is_dropped_while_its_login_is_being_decided() {
    attack_on("drop during admission", AGENTS, |daemon| {
        let mut silent = log_in(daemon, ME)?;
        let target = address(daemon);
        let login = thread::spawn(move || Raw::login(target, &Nexus::new(ME, DISK).isid(2)));
        let mut pending = None;
        wait_until("the second login in the table", SERVED, || {
            let of_state = |row: &Value| row.get("state").and_then(Value::as_str) == Some("login");
            pending = sessions(daemon)?.into_iter().find(of_state);
            Ok(pending.is_some())
        })?;
        let id = pending
            .as_ref()
            .and_then(|row| row.get("id"))
            .and_then(Value::as_u64)
            .context("an id")?;
        let started = Instant::now();
        daemon.text(&["session", "drop", &id.to_string()])?;
        let took = started.elapsed();
        ensure!(took < Duration::from_millis(1500), "the drop took {took:?}");
        let login = login.join().expect("no panic")?;
        ensure!(matches!(login, Login::Closed), "the dropped login: {login:?}");
        // What was being decided goes on to its end; the next login finds the table as it should be.
        thread::sleep(Duration::from_secs(2));
        silent.ends_within(SERVED)?;
        log_in(daemon, ME)?.logout()?;
        wait_until("an empty table", SERVED, || Ok(sessions(daemon)?.is_empty()))
    });
}

#[test]
fn a_second_connection_of_a_session_is_refused_and_the_first_goes_on() {
    attack("MCS", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        let rows = sessions(daemon)?;
        let tsih = rows
            .first()
            .and_then(|row| row.get("tsih"))
            .and_then(Value::as_u64);
        let tsih = u16::try_from(tsih.context("no tsih")?)?;
        let join = |tsih: u16, cid: u8| -> Result<(u8, u8)> {
            let mut second = Raw::connect(address(daemon))?;
            let request = Nexus::new(ME, DISK).request();
            second.send(&request.bytes(14, &tsih.to_be_bytes()).byte(21, cid))?;
            let refusal = second.expect("a Login Response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
            second.ends_within(SERVED)?;
            Ok((refusal.at(36), refusal.at(37)))
        };
        for cid in [0, 1, 7] {
            ensure!(join(tsih, cid)? == (2, 6), "MaxConnections is 1");
            ensure!(
                join(tsih.wrapping_add(1), cid)? == (2, 0x0a),
                "there is no such session"
            );
        }
        ensure!(raw.ping(b"still here")? == b"still here");
        raw.read(0, 0, 8).map(drop)
    });
}
