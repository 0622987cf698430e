//! QEMU's block driver (libiscsi) as the initiator: images in and out, unmap, zeroes, CHAP.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillpoint_tests::{Daemon, qemu_img, qemu_io, run, story, tool};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
const LIMIT: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// Bytes that no compression, zero detection or repetition can fake.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def0_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn write(path: &Path, bytes: &[u8]) -> Result<String> {
    fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))?;
    Ok(path.display().to_string())
}

#[test]
fn images_go_in_and_come_out() {
    story("qemu-img convert and compare", |scratch| {
        let daemon = Daemon::start(
            BINARY,
            scratch,
            "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
             [[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n\
             [[lun]]\nname = \"disk4k\"\nsize = \"64MiB\"\nblock_size = 4096\n\
             [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\", \"disk4k\"]\ninitiators = [\"*\"]\nmax_sessions = 4\n",
        )?;
        // Data, a hole of zeroes, data that ends within a grain.
        let mut image = pattern(20 * MIB);
        image.resize(40 * MIB, 0);
        image.extend_from_slice(&pattern(3 * MIB + 512));
        image.resize(64 * MIB, 0);
        let source = write(&scratch.file("source.img"), &image)?;
        let back = scratch.file("back.img").display().to_string();
        for lun in [0, 1] {
            let url = daemon.url("iqn.2026-11.test:disk", lun);
            let info: Value =
                serde_json::from_str(&qemu_img(&["info", "--output=json", "-f", "raw", &url])?.success()?)?;
            ensure!(info["virtual-size"] == 64 * MIB, "{info}");
            qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", &source, &url])?.success()?;
            qemu_img(&["compare", "-f", "raw", "-F", "raw", &source, &url])?.success()?;
            qemu_img(&["convert", "-f", "raw", "-O", "raw", &url, &back])?.success()?;
            ensure!(fs::read(&back)? == image, "LUN {lun} gave other bytes back");
        }
        // The comparison must be able to fail.
        let mut other = image;
        other[30 * MIB] = 1;
        let other = write(&scratch.file("other.img"), &other)?;
        let url = daemon.url("iqn.2026-11.test:disk", 0);
        qemu_img(&["compare", "-f", "raw", "-F", "raw", &other, &url])?.refused(1)?;
        Ok(())
    });
}

#[test]
fn unmap_zeroes_and_misalignment() {
    story("qemu-io unmap and zeroes", |scratch| {
        let mut daemon = Daemon::start(
            BINARY,
            scratch,
            "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
             [[lun]]\nname = \"disk\"\nsize = \"64MiB\"\n\
             [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\n",
        )?;
        let url = daemon.url("iqn.2026-11.test:disk", 0);
        qemu_io(
            &url,
            &[
                "write -P 0xa5 0 8M",
                "discard 1M 2M",
                "write -z 4M 1M",
                "write -z -u 6M 1M",
                // Neither start nor end on a grain: neighbours must keep their bytes.
                "write -P 0x5a 8390144 3584",
                "write -z 5000704 1536",
                "flush",
                "read -P 0xa5 0 1M",
                "read -P 0 1M 2M",
                "read -P 0xa5 3M 1M",
                "read -P 0 4M 1M",
                "read -P 0xa5 5M 1M",
                "read -P 0 6M 1M",
                "read -P 0xa5 7M 1M",
                "read -P 0 8388608 1536",
                "read -P 0x5a 8390144 3584",
                "read -P 0 8393728 512",
            ],
        )?
        .success()?;
        // A wrong pattern must be found.
        ensure!(
            qemu_io(&url, &["read -P 0xa5 1M 1M"])?.code != 0,
            "qemu-io did not see a wrong pattern"
        );

        let map: Value =
            serde_json::from_str(&qemu_img(&["map", "--output=json", "-f", "raw", &url])?.success()?)?;
        let is_hole = |at: usize| {
            map.as_array().into_iter().flatten().any(|extent| {
                let (start, length) = (extent["start"].as_u64(), extent["length"].as_u64());
                let inside = start
                    .zip(length)
                    .is_some_and(|(s, l)| (s..s + l).contains(&(at as u64)));
                inside && extent["data"] == false
            })
        };
        ensure!(
            !is_hole(0) && is_hole(2 * MIB) && !is_hole(7 * MIB) && is_hole(32 * MIB),
            "{map}"
        );

        // All of it is still there after a restart.
        ensure!(daemon.stop()? == 0, "the daemon did not end well");
        daemon.resume()?;
        qemu_io(
            &url,
            &[
                "read -P 0xa5 0 1M",
                "read -P 0 1M 2M",
                "read -P 0x5a 8390144 3584",
            ],
        )?
        .success()?;
        Ok(())
    });
}

#[test]
fn chap_md5_by_libiscsi() {
    story("CHAP by libiscsi", |scratch| {
        write(&scratch.file("secret"), b"a-good-secret-of-length")?;
        write(&scratch.file("mutual"), b"another-good-secret")?;
        for secret in ["secret", "mutual"] {
            run(
                std::process::Command::new("chmod")
                    .arg("600")
                    .arg(scratch.file(secret)),
                LIMIT,
            )?
            .success()?;
        }
        let daemon = Daemon::start(
            BINARY,
            scratch,
            "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n\
             [[lun]]\nname = \"disk\"\nsize = \"16MiB\"\n\
             [[target]]\niqn = \"iqn.2026-11.test:disk\"\nluns = [\"disk\"]\ninitiators = [\"*\"]\n\
             [target.chap]\nuser = \"alice\"\nsecret_file = \"$DIR/secret\"\n\
             mutual_user = \"target\"\nmutual_secret_file = \"$DIR/mutual\"\n",
        )?;
        let portal = daemon.portal();
        let url = |who: &str| format!("iscsi://{who}{portal}/iqn.2026-11.test:disk/0");
        qemu_io(
            &url("alice%a-good-secret-of-length@"),
            &["write -P 1 0 4k", "read -P 1 0 4k"],
        )?
        .success()?;
        for wrong in [
            "",
            "alice%a-wrong-secret-of-length@",
            "bob%a-good-secret-of-length@",
        ] {
            let refused = qemu_img(&["info", "-f", "raw", &url(wrong)])?;
            ensure!(refused.code != 0, "login as {wrong:?} was accepted");
        }
        // The target proves itself too: libiscsi checks the answer against `target_user` and `target_password`.
        let listed = |target: &str| {
            let url = url("alice%a-good-secret-of-length@");
            run(
                tool("iscsi-inq")?.arg(format!("{url}?target_user=target&target_password={target}")),
                LIMIT,
            )
        };
        listed("another-good-secret")?.success()?;
        ensure!(
            listed("not-what-it-knows!")?.code != 0,
            "a target with a wrong secret was believed"
        );
        Ok(())
    });
}
