//! The `stillpoint` program.

fn main() -> std::process::ExitCode {
    stillpoint::main()
}
