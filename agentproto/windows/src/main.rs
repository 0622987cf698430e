//! The `stillpoint-agent` program for Windows.

fn main() -> std::process::ExitCode {
    stillpoint_agent_windows::main()
}
