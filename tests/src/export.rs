//! A LUN as a mounted file system of this host, without the kernel's initiator: libiscsi in `qemu-storage-daemon`, its FUSE export
//! as a file, a loop device over that. Needs root, `/dev/fuse` and loop devices.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::process::{Running, run, wait_until};
use crate::tools::tool;

/// mkfs, mount and the export's start.
const LIMIT: Duration = Duration::from_secs(60);

/// The export's end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// One LUN, mounted. It is unmounted, and its session ended, when this is dropped.
#[derive(Debug)]
pub struct Export {
    image: PathBuf,
    point: PathBuf,
    is_mounted: bool,
    session: Running,
}

impl Export {
    /// Logs in to a target and makes `DIR/NAME.img` (the LUN) and `DIR/NAME` (the mount point); `format` makes a file system first.
    ///
    /// # Errors
    /// The session, the export, mkfs or mount fails.
    pub fn mount(
        dir: &Path,
        name: &str,
        portal: &str,
        iqn: &str,
        initiator: &str,
        format: bool,
    ) -> Result<Self> {
        let (image, point) = (dir.join(format!("{name}.img")), dir.join(name));
        File::create(&image).context("the export's file")?;
        fs::create_dir_all(&point)?;
        let before = fs::metadata(&image)?.len();
        let mut command = tool("qemu-storage-daemon")?;
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=iscsi,node-name=d,transport=tcp,portal={portal},target={iqn},lun=0,initiator-name={initiator}"
            ))
            .arg("--export")
            .arg(format!(
                "type=fuse,id=e,node-name=d,mountpoint={},writable=on,growable=off",
                image.display()
            ));
        let log = dir.join(format!("{name}-export.log"));
        let mut session = Running::start("qemu-storage-daemon", &mut command, &log)?;
        wait_until("the FUSE export", LIMIT, || {
            if let Some(code) = session.ended()? {
                anyhow::bail!("qemu-storage-daemon ended with {code}:\n{}", session.output());
            }
            Ok(fs::metadata(&image)?.len() > before)
        })?;
        if format {
            run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image), LIMIT)?.success()?;
        }
        let mut export = Self {
            image,
            point,
            is_mounted: false,
            session,
        };
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(&export.image).arg(&export.point);
        run(&mut mount, LIMIT)?.success()?;
        export.is_mounted = true;
        Ok(export)
    }

    /// The LUN as a file: what a `[[test_lun]]` of the agent names.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Where it is mounted.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if self.is_mounted {
            // A story that failed half-way may have left it frozen. Neither can be helped when it fails.
            run(Command::new("fsfreeze").arg("-u").arg(&self.point), LIMIT).ok();
            run(Command::new("umount").arg("-l").arg(&self.point), LIMIT).ok();
        }
        // Told to end, it takes its FUSE mount along; killed, it leaves a dead one.
        self.session.signal(Signal::TERM).ok();
        self.session.wait(END_LIMIT).ok();
        run(Command::new("umount").args(["-q", "-l"]).arg(&self.image), LIMIT).ok();
    }
}
