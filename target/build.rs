//! Fails early when Cargo builds into this source directory.
//!
//! `target/` is source here. Run with `--manifest-path` from elsewhere, Cargo ignores `.cargo/config.toml`, builds into
//! `target/`, and a later `cargo clean` would delete the source.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let out = std::env::var("OUT_DIR").expect("Cargo sets OUT_DIR for build scripts");
    let source =
        std::env::var("CARGO_MANIFEST_DIR").expect("Cargo sets CARGO_MANIFEST_DIR for build scripts");
    assert!(
        !Path::new(&out).starts_with(&source),
        "Cargo is building into {source}, which is source code: run cargo inside the repository, or set \
         CARGO_TARGET_DIR to a directory outside target/"
    );
}
