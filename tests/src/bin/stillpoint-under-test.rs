//! The daemon, built for the stories: cargo gives `CARGO_BIN_EXE_…` only to the package that has the binary.

fn main() -> std::process::ExitCode {
    stillpoint::main()
}
