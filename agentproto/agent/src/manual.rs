//! Man pages and completions, from the definitions of the command line: what `generate` writes.

use std::path::Path;

/// One page per verb, in the section of administrators' commands, and agent.toml(5).
pub(crate) fn pages(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
    std::fs::write(dir.join("agent.toml.5"), include_str!("../man/agent.toml.5"))?;
    verbs(command, dir)
}

fn verbs(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        verbs(verb, dir)?;
    }
    clap_mangen::Man::new(command.clone())
        .section("8")
        .generate_to(dir)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    /// Every key of the example, which is every key there is ([`crate::config`]), has its paragraph.
    #[test]
    fn the_page_of_the_file_names_every_key() {
        let page = include_str!("../man/agent.toml.5");
        let example = include_str!("../packaging/agent.toml");
        let mut keys = 0;
        for line in example.lines() {
            let line = line.trim_start_matches(['#', ' ']);
            let Some((key, _)) = line.split_once(" = ") else {
                continue;
            };
            if !key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
                assert!(page.contains(&format!("\n.B {key} ")), "{key} is missing");
                keys += 1;
            }
        }
        assert!(
            keys > 20,
            "{keys} keys were found: has the example changed its form?"
        );
    }
}
