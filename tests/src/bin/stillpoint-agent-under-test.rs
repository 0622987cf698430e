//! The agent, built for the stories.

fn main() -> std::process::ExitCode {
    stillpoint_agent::main()
}
