//! Runs a child process under the recorder and follows its log.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Compiles a shim of `tests/recorder/` once per test process. There is no skipping: without a C compiler these tests fail.
fn library(name: &str, built: &'static OnceLock<PathBuf>) -> &'static Path {
    built.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/recorder/{name}.c"));
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}.so", std::process::id()));
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .args([&out, &source])
            .args(["-ldl", "-lpthread"])
            .status()
            .expect("a C compiler (Debian: gcc or clang) is needed for the crash tests");
        assert!(status.success(), "the {name} does not compile");
        out
    })
}

/// The library that records what a process does to files.
fn recorder() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    library("recorder", &BUILT)
}

/// The library that makes one call fail.
pub(crate) fn injector() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    library("injector", &BUILT)
}

/// Which of our own syncs the recorder leaves out: the control of the experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeftOut {
    Nothing,
    /// `fdatasync` of every file whose path ends so.
    Fdatasync(&'static str),
}

/// Runs the ignored test `name` of this test binary as a child with `vars`, recording what it does below `root`.
pub(crate) fn record(
    name: &str,
    root: &Path,
    log: &Path,
    left_out: LeftOut,
    vars: &[(&str, String)],
) -> Output {
    let mut command = child(name, vars);
    command
        .env("LD_PRELOAD", recorder())
        .env("RECORDER_ROOT", root)
        .env("RECORDER_LOG", log);
    if let LeftOut::Fdatasync(suffix) = left_out {
        command.env("RECORDER_SKIP_FDATASYNC", suffix);
    }
    command.output().expect("the child starts")
}

/// The ignored test `name` of this test binary as a process of its own.
pub(crate) fn child(name: &str, vars: &[(&str, String)]) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test binary"));
    command.args([name, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.envs(vars.iter().map(|(name, value)| (name, value)));
    command
}

/// A directory for images: in memory where that exists, because every image is synced by the store that opens it.
pub(crate) fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    made.expect("a temporary directory")
}
