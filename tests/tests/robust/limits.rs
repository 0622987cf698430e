//! Peers that ask for too much, too often, or that do not read.

use super::*;

#[test]
fn p04_a_peer_that_never_reads_costs_little_and_delays_nobody() {
    attack("peer that never reads", |daemon| {
        let mut raws = Vec::new();
        let before = memory(daemon)?;
        for i in 0..4 {
            let mut raw = log_in(daemon, &format!("{ME}{i}"))?;
            let ping = Pdu::new(op::NOP_OUT | IMMEDIATE)
                .word(20, RESERVED)
                .data(vec![0x77; 65_536]);
            let stream = raw.stream()?;
            stream.set_write_timeout(Some(Duration::from_millis(500)))?;
            for _ in 0..128 {
                raw.start(&Cdb::read10(0, 0, 2048), &[])?;
            }
            let mut pings = 0u32;
            while pings < 4000 {
                let itt = raw.new_itt();
                if raw.request(ping.clone().itt(itt)).is_err() {
                    break;
                }
                pings += 1;
            }
            ensure!(
                pings < 4000,
                "256 MiB of pings were taken although no echo was read"
            );
            raws.push(raw);
            served_in_time(daemon)?;
        }
        // Per session: 32 MiB of read data, 4 MiB of echoes, what one batch of frames holds.
        let grown = memory(daemon)?.saturating_sub(before);
        ensure!(
            grown < 4 * (48 << 10),
            "4 peers that read nothing cost {grown} KiB"
        );
        Ok(())
    });
}

#[test]
fn p04_all_sessions_share_one_memory() {
    let config = format!("session_memory = \"64MiB\"\n{CONFIG}");
    attack_on("robust 4: one memory for all sessions", &config, |daemon| {
        served_in_time(daemon)?;
        let before = memory(daemon)?;
        let mut hogs = Vec::new();
        for number in 0..24 {
            let nexus = Nexus::new(&format!("iqn.2026-11.test.robust:hog{number}"), DISK)
                .key("MaxRecvDataSegmentLength", "262144")
                .key("FirstBurstLength", "65536");
            let mut hog = Raw::login(address(daemon), &nexus)?.session()?;
            hog.ready(0)?;
            // 32 MiB to read, which nobody takes, and 64 MiB to write, of which only the beginning ever comes: 2.3 GiB in all.
            for _ in 0..32 {
                hog.start(&Cdb::read10(0, 0, 2048), &[])?;
            }
            for _ in 0..16 {
                hog.start(&Cdb::write10(0, 0, 8192), &[7; 65536])?;
            }
            hogs.push(hog);
        }
        let mut most = 0;
        for _ in 0..5 {
            served_in_time(daemon)?;
            most = most.max(memory(daemon)?.saturating_sub(before));
        }
        println!(
            "story robust: 24 sessions that ask for 2.3 GiB of a session_memory of 64 MiB: {} MiB more",
            most >> 10
        );
        ensure!(most < 192 << 10, "the daemon grew by {most} KiB");
        // Whoever comes when they are gone has all of it.
        drop(hogs);
        let mut raw = log_in(daemon, OTHER)?;
        for _ in 0..4 {
            ensure!(raw.read(0, 0, 8192)?.len() == 4 << 20, "a large read");
        }
        Ok(())
    });
}

#[test]
fn p05_immediate_commands_have_a_limit_of_their_own() {
    attack("immediate commands", |daemon| {
        let mut raw = log_in(daemon, ME)?;
        for _ in 0..64 {
            let itt = raw.new_itt();
            let pdu = Cdb::write10(0, 0, 128)
                .pdu(itt)
                .byte(0, op::SCSI_COMMAND | IMMEDIATE);
            raw.request(pdu)?;
        }
        let came = raw.listen(QUIET)?;
        let rejects = came
            .iter()
            .filter(|pdu| pdu.opcode() == op::REJECT && pdu.at(2) == 0x06)
            .count();
        let asks = came.iter().filter(|pdu| pdu.opcode() == op::R2T).count();
        ensure!(
            rejects >= 32 && asks <= 32,
            "{rejects} rejects, {asks} R2Ts of 64 immediate writes"
        );
        // The window is not touched by any of it.
        raw.read(0, 0, 1)?;
        ensure!(raw.tmf(LUN_RESET, 0)? == 0, "a LUN RESET gets through");
        raw.ready(0)
    });
}

#[test]
fn p06_half_finished_peers_delay_nobody() {
    attack("half-finished peers", |daemon| {
        let mut held = Vec::new();
        for i in 0..20 {
            let mut raw = Raw::connect(address(daemon))?;
            let request = Nexus::new(&format!("{OTHER}{i}"), DISK).request().wire();
            raw.send_bytes(&request[..request.len() - 1 - i])?;
            held.push(raw);
        }
        for i in 0..8 {
            let mut raw = log_in(daemon, &format!("{ME}{i}"))?;
            let wire = raw.number(Cdb::write10(0, 0, 8).pdu(1).data([1; 4096])).wire();
            raw.send_bytes(&wire[..wire.len() - 100])?;
            held.push(raw);
        }
        served_in_time(daemon).map(drop)
    });
}

#[test]
fn p07_a_flood_without_login_locks_nobody_out() {
    attack("flood of connections", |daemon| {
        let before = memory(daemon)?;
        let stop = Arc::new(AtomicBool::new(false));
        let target = address(daemon);
        let flood = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let (mut held, mut came) = (Vec::new(), 0_u32);
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(stream) = TcpStream::connect_timeout(&target, SERVED) {
                        held.push(stream);
                        came += 1;
                    }
                    if held.len() > 700 {
                        held.drain(..200);
                    }
                    thread::sleep(Duration::from_millis(1));
                }
                came
            })
        };
        // The whole allowance is taken, from the very address of those who behave.
        thread::sleep(Duration::from_millis(1000));
        let served: Result<Vec<Duration>> = (0..5).map(|_| served_in_time(daemon)).collect();
        let grown = memory(daemon)?.saturating_sub(before);
        stop.store(true, Ordering::Relaxed);
        let came = flood.join().unwrap_or_default();
        let slowest = served?.into_iter().max().unwrap_or_default();
        println!(
            "story robust: {came} connections without a login, up to 700 at once: {grown} KiB more, a login with its I/O took {slowest:?} at most"
        );
        ensure!(grown < 64 << 10, "the flood costs {grown} KiB");
        Ok(())
    });
}

#[test]
fn p07_login_has_a_deadline_also_for_one_byte_a_second() {
    attack("login deadline", |daemon| {
        let started = Instant::now();
        let mut silent = Raw::connect(address(daemon))?;
        let mut slow = Raw::connect(address(daemon))?;
        let mut begun = Raw::connect(address(daemon))?;
        // In the middle of the login: the security stage, and then nothing.
        begun.send(&login_request(0x00, &[0; 6]).data(format!("InitiatorName={ME}\0TargetName={DISK}\0")))?;
        begun.expect("a Login Response", |pdu| pdu.opcode() == op::LOGIN_RESPONSE)?;
        let wire = Nexus::new(ME, DISK).request().wire();
        let mut ended = None;
        for byte in &wire {
            if slow.send_bytes(&[*byte]).is_err() {
                break;
            }
            if let Came::End = slow.receive(Duration::from_secs(1))? {
                ended = Some(started.elapsed());
                break;
            }
            ensure!(
                started.elapsed() < Duration::from_secs(20),
                "one byte a second holds a connection for {:?}",
                started.elapsed()
            );
        }
        let ended = ended.unwrap_or_else(|| started.elapsed());
        ensure!(
            ended > Duration::from_secs(5),
            "the slow login had only {ended:?}"
        );
        silent.ends_within(Duration::from_secs(2))?;
        begun.ends_within(Duration::from_secs(2))?;
        served_in_time(daemon).map(drop)
    });
}

#[test]
fn a_peer_that_floods_hears_its_own_control_messages() {
    attack("flood of pings that is read", |daemon| {
        let mut writers = Vec::new();
        let mut readers = Vec::new();
        for i in 0..4 {
            let raw = log_in(daemon, &format!("{ME}{i}"))?;
            let mut reader = raw.stream()?;
            readers.push(thread::spawn(move || {
                std::io::copy(&mut reader, &mut std::io::sink()).ok()
            }));
            writers.push(thread::spawn(move || {
                let mut raw = raw;
                let ping = Pdu::new(op::NOP_OUT | IMMEDIATE)
                    .itt(1)
                    .word(20, RESERVED)
                    .data(vec![0x77; 512]);
                let wire = raw.number(ping).wire().repeat(256);
                while raw.send_bytes(&wire).is_ok() {}
            }));
        }
        thread::sleep(QUIET);
        served_in_time(daemon).context("while four sessions flood")?;
        let id = session_id(daemon, &format!("{ME}0"))?;
        let started = Instant::now();
        daemon.text(&["session", "drop", &id.to_string()])?;
        ensure!(
            started.elapsed() < Duration::from_secs(8),
            "the drop of a busy session took {:?}",
            started.elapsed()
        );
        ensure!(
            session_id(daemon, &format!("{ME}0")).is_err(),
            "the session is gone"
        );
        // A reset by somebody else reaches the others while they flood.
        let mut by = log_in(daemon, OTHER)?;
        ensure!(by.tmf(LUN_RESET, 0)? == 0);
        let ids: Vec<u64> = (1..4)
            .map(|i| session_id(daemon, &format!("{ME}{i}")))
            .collect::<Result<_>>()?;
        drop(by);
        daemon.stop().and_then(|code| {
            if code == 0 {
                Ok(())
            } else {
                bail!("exit code {code}")
            }
        })?;
        ensure!(ids.len() == 3);
        writers.into_iter().for_each(|thread| drop(thread.join()));
        readers.into_iter().for_each(|thread| drop(thread.join()));
        Ok(())
    });
}

#[test]
fn p07_discovery_sessions_are_limited_like_strangers() {
    attack("flood of discovery sessions", |daemon| {
        let mut discovery = Nexus::new(ME, DISK);
        discovery.target = None;
        let mut first = Raw::login(address(daemon), &discovery)?.session()?;
        let mut held = Vec::new();
        for _ in 0..100 {
            held.push(Raw::login(address(daemon), &discovery)?.session()?);
        }
        first
            .ends_within(SERVED)
            .context("the oldest of a hundred discovery sessions")?;
        served_in_time(daemon).map(drop)
    });
}
