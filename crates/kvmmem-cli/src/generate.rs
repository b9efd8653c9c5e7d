// SPDX-License-Identifier: Apache-2.0 OR MIT
//! For packagers, not for users: manual pages and completions, made from the command line's own
//! definition.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Command, CommandFactory, ValueEnum};
use clap_complete::Shell;

use crate::Cli;

#[derive(Args)]
pub(crate) struct Arguments {
    /// What to make
    what: What,

    /// The folder to write to
    directory: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Manual pages of kvmmem, its verbs and kvmmemd
    Man,
    /// Completions for bash, zsh and fish
    Completions,
}

impl Arguments {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        match self.what {
            What::Man => man(&self.directory)?,
            What::Completions => completions(&self.directory)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn man(directory: &Path) -> Result<()> {
    let write = || -> std::io::Result<()> {
        clap_mangen::generate_to(visible(), directory)?;
        let mut page = Vec::new();
        let daemon = kvmmem_broker::options::Options::command();
        clap_mangen::Man::new(daemon).section("8").render(&mut page)?;
        std::fs::write(directory.join("kvmmemd.8"), page)
    };
    write().with_context(|| format!("cannot write manual pages to {}", directory.display()))
}

fn completions(directory: &Path) -> Result<()> {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut visible(), "kvmmem", directory)
            .with_context(|| format!("cannot write completions to {}", directory.display()))?;
    }
    Ok(())
}

/// The command line without its hidden verbs, which completions would offer all the same.
fn visible() -> Command {
    let all = Cli::command();
    let verbs: Vec<_> = all.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().collect();
    let named = all.get_about().cloned().unwrap_or_default();
    Command::new("kvmmem")
        .version(env!("CARGO_PKG_VERSION"))
        .propagate_version(true)
        .about(named)
        .after_help(all.get_after_help().cloned().unwrap_or_default())
        .args(all.get_arguments().cloned())
        .subcommands(verbs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_visible_verb_has_a_page_and_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        man(folder.path()).unwrap();
        completions(folder.path()).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let page = format!("kvmmem-{}.1", verb.get_name());
            assert!(read(&page).contains(".SH SYNOPSIS"), "{page}");
            for file in ["kvmmem.bash", "_kvmmem", "kvmmem.fish"] {
                assert!(read(file).contains(verb.get_name()), "{file} lacks {}", verb.get_name());
            }
        }
        assert!(read("kvmmem.1").contains("KVMMEM_TOKEN"));
        assert!(read("kvmmemd.8").contains("LISTEN_FDS"));
        assert!(!read("kvmmem.bash").contains("generate"));
        assert!(!folder.path().join("kvmmem-generate.1").exists());
    }
}
