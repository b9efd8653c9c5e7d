// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes the manual pages and completions for the packages, from the programs' own definitions of
//! their command lines: `cargo xtask dist` runs it.
#![deny(unsafe_code)]

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser};
use clap_complete::Shell;
use kvmmem_broker::Options;

#[derive(Parser)]
#[command(about = "Writes manual pages and completions")]
struct Arguments {
    /// The folder to write to
    folder: PathBuf,
}

fn main() -> Result<()> {
    let folder = Arguments::parse().folder;
    write(&folder).with_context(|| format!("cannot write to {}", folder.display()))
}

/// Pages for kvmmem, each of its commands and kvmmemd, and completions for bash, zsh and fish.
fn write(folder: &Path) -> std::io::Result<()> {
    clap_mangen::generate_to(kvmmem_cli::command(), folder)?;
    let mut page = Vec::new();
    clap_mangen::Man::new(Options::command()).section("8").render(&mut page)?;
    std::fs::write(folder.join("kvmmemd.8"), page)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut kvmmem_cli::command(), "kvmmem", folder)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    /// The command and those below it, each by its words.
    fn all(command: &Command, words: &[&str]) -> Vec<Vec<String>> {
        let words = [words, &[command.get_name()]].concat();
        let mut found = vec![words.iter().map(|word| (*word).to_owned()).collect()];
        found.extend(command.get_subcommands().flat_map(|below| all(below, &words)));
        found
    }

    #[test]
    fn every_command_has_a_page_and_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let completions = ["kvmmem.bash", "_kvmmem", "kvmmem.fish"].map(|name| (name, read(name)));
        let commands = all(&kvmmem_cli::command(), &[]);
        assert!(commands.len() > 30, "{commands:?}");
        for words in commands {
            let page = read(&format!("{}.1", words.join("-")));
            assert!(page.contains(".SH SYNOPSIS"), "{words:?}");
            for (name, text) in &completions {
                assert!(text.contains(words.last().unwrap()), "{name} lacks {words:?}");
            }
        }
        assert!(read("kvmmem.1").contains("KVMMEM_TOKEN"));
        assert!(read("kvmmem-grant-create.1").contains("Exit codes"));
        assert!(read("kvmmemd.8").contains("LISTEN_FDS"));
    }
}
