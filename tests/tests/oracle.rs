//! The harness against tgt, another target. It shows that the stories are fair (another target passes what must pass) and that
//! they can fail (tgt's known faults are found).

use std::time::Duration;

use anyhow::ensure;
use stillpoint_tests::{Guest, GuestSpec, Outcome, Payload, Tgt, story, suite};

const MIB: u64 = 1 << 20;

#[test]
fn conformance_suite_finds_the_known_faults_of_tgt() {
    story("oracle: iscsi-test-cu", |scratch| {
        let tgt = Tgt::start(scratch, 256 * MIB)?;
        let lane = (tgt.url(), tgt.url());
        let names = ["Read10.Simple", "Unmap.ZeroBlocks", "CompareAndWrite.Simple"].map(str::to_owned);
        let outcomes = suite(&names, &[lane])?.outcomes;
        ensure!(
            outcomes.get("Read10.Simple") == Some(&Outcome::Passed),
            "{outcomes:?}"
        );
        ensure!(
            matches!(outcomes.get("Unmap.ZeroBlocks"), Some(Outcome::Failed(_))),
            "{outcomes:?}"
        );
        ensure!(
            matches!(outcomes.get("CompareAndWrite.Simple"), Some(Outcome::Skipped(_))),
            "{outcomes:?}"
        );
        Ok(())
    });
}

#[test]
fn guest_makes_a_file_system_on_tgt() {
    story("oracle: guest", |scratch| {
        let tgt = Tgt::start(scratch, 256 * MIB)?;
        let mut guest = Guest::boot(
            scratch,
            GuestSpec {
                name: "guest",
                initiator: "iqn.2026-11.test.guest:oracle",
                payload: vec![Payload::text("hello", "from the host\n")],
                forward: vec![],
            },
        )?;
        ensure!(
            guest.run("cat /payload/hello")? == "from the host\n",
            "the payload did not arrive"
        );
        ensure!(
            guest.ask(Duration::from_secs(1), "sleep 5")?.code == 124,
            "a request's time limit does not work"
        );
        guest.run(&format!(
            "disk=$(iscsi-login {} {} 1)
             mkfs.ext4 -q $disk; mount $disk /mnt
             head -c 8M /dev/zero | tr '\\0' x >/mnt/file; sync
             sum=$(sha256sum </mnt/file)
             umount /mnt; mount $disk /mnt
             [ \"$(sha256sum </mnt/file)\" = \"$sum\" ]
             umount /mnt; e2fsck -fn $disk
             iscsiadm -m node -u >/dev/null",
            tgt.portal(),
            tgt.iqn()
        ))?;
        Ok(())
    });
}
