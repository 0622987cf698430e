//! A diskless boot: iPXE's own initiator reads the boot sector of a LUN, and the boot sector says so on the serial port.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stillpoint_tests::{Daemon, Running, Scratch, Tgt, qemu_img, story, tool, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_stillpoint-under-test");
/// Firmware, DHCP, TFTP, login and one read on an emulated CPU; 20 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const WORDS: &str = "booted from a LUN";
const INITIATOR: &str = "iqn.2026-11.test.ipxe:one";

/// 16-bit code that writes [`WORDS`] to the first serial port and stops.
fn boot_sector() -> Vec<u8> {
    let mut sector = vec![
        0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
        0xbe, 0x15, 0x7c, // mov si, words (the sector is loaded at 0x7c00)
        0xac, 0x84, 0xc0, 0x74, 0x06, // next: lodsb; test al, al; jz end
        0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // mov dx, COM1; out dx, al; jmp next
        0xf4, 0xeb, 0xfd, // end: hlt; jmp end
    ];
    sector.extend_from_slice(WORDS.as_bytes());
    sector.resize(510, 0);
    sector.extend_from_slice(&[0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

/// Puts the boot sector on the LUN and boots a machine without disks from it.
fn boots(scratch: &Scratch, port: u16, iqn: &str, lun: u16) -> Result<()> {
    let image = scratch.file("boot.img");
    fs::write(&image, boot_sector()).context("the boot image")?;
    let url = format!("iscsi://127.0.0.1:{port}/{iqn}/{lun}");
    qemu_img(&[
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        &image.display().to_string(),
        &url,
    ])?
    .success()?;

    let tftp = scratch.file("tftp");
    fs::create_dir(&tftp)?;
    let script =
        format!("#!ipxe\nset initiator-iqn {INITIATOR}\nsanboot iscsi:10.0.2.2::{port}:{lun:x}:{iqn}\n");
    fs::write(tftp.join("boot.ipxe"), script)?;
    let serial = scratch.file("serial.log");
    let mut command = tool("qemu-system-x86_64")?;
    command
        .args([
            "-accel",
            "tcg",
            "-m",
            "128",
            "-M",
            "pc",
            "-display",
            "none",
            "-no-reboot",
            "-boot",
            "n",
            "-nodefaults",
        ])
        .args(["-serial", &format!("file:{}", serial.display())])
        .args([
            "-nic",
            &format!(
                "user,ipv6=off,model=virtio-net-pci,tftp={},bootfile=boot.ipxe",
                tftp.display()
            ),
        ]);
    let mut qemu = Running::start("qemu", &mut command, &scratch.file("qemu.log"))?;
    wait_until("the boot sector to speak", BOOT_LIMIT, || {
        ensure!(qemu.ended()?.is_none(), "QEMU ended: {}", qemu.output());
        let said = fs::read(&serial).unwrap_or_default();
        Ok(String::from_utf8_lossy(&said).contains(WORDS))
    })
}

#[test]
fn ipxe_boots_from_a_lun() {
    story("iPXE boot", |scratch| {
        let config = format!(
            "[[portal]]\naddress = \"127.0.0.1:$PORT\"\n[[lun]]\nname = \"boot\"\nsize = \"16MiB\"\n\
             [[target]]\niqn = \"iqn.2026-11.test:boot\"\nluns = [\"boot\"]\n\
             initiators = [\"{INITIATOR}\", \"iqn.2008-11.org.linux-kvm\"]\n"
        );
        let daemon = Daemon::start(BINARY, scratch, &config)?;
        boots(scratch, daemon.port(), "iqn.2026-11.test:boot", 0)
    });
}

#[test]
fn the_same_story_is_fair_to_tgt() {
    story("oracle: iPXE boot", |scratch| {
        let tgt = Tgt::start(scratch, 16 << 20)?;
        boots(scratch, tgt.port(), tgt.iqn(), 1)
    });
}
