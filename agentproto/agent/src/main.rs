//! The `stillpoint-agent` program.

fn main() -> std::process::ExitCode {
    stillpoint_agent::main()
}
