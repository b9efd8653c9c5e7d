// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every command line in the documentation and in the help is one that this binary takes.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::error::{ContextKind, ErrorKind};

use crate::Cli;

/// README.md and the pages in docs/.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut found = vec![root.join("README.md")];
    let mut folders = vec![root.join("docs")];
    while let Some(folder) = folders.pop() {
        let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let (inner, files): (Vec<_>, Vec<_>) = paths.partition(|path| path.is_dir());
        folders.extend(inner);
        found.extend(
            files.into_iter().filter(|path| path.extension().is_some_and(|end| end == "md")),
        );
    }
    found
}

/// The commands in fenced blocks: the lines of shell scripts, continued ones joined, and what is
/// typed at a prompt.
fn fenced(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let (mut language, mut goes_on) = ("", false);
    for line in text.lines() {
        if let Some(after) = line.strip_prefix("```") {
            (language, goes_on) = (after, false);
        } else if language == "sh" {
            match lines.last_mut().filter(|_| goes_on) {
                Some(last) => *last += line.trim_start(),
                None => lines.push(line.to_owned()),
            }
            goes_on = line.ends_with('\\');
            if goes_on {
                lines.last_mut().unwrap().pop();
            }
        } else if language == "console" {
            let typed = line.strip_prefix("# ").or_else(|| line.strip_prefix("$ "));
            lines.extend(typed.map(str::to_owned));
        }
    }
    lines
}

/// The code spans outside of blocks.
fn inline(text: &str) -> Vec<String> {
    let mut is_within = false;
    let outside = text.lines().filter(|line| {
        let is_fence = line.starts_with("```");
        is_within ^= is_fence;
        !is_within && !is_fence
    });
    let text = outside.collect::<Vec<_>>().join("\n");
    text.split("\n\n")
        .flat_map(|part| part.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect()
}

/// The commands of a line that run `program`, as words.
fn commands(line: &str, program: &str) -> Vec<Vec<String>> {
    let parts = line.split(['|', ';', '(', ')', '&']);
    let parts = parts.map(|part| part.split_once(['<', '>']).map_or(part, |(before, _)| before));
    let words = parts.filter_map(shlex::split);
    let is_setting = |word: &String| word.contains('=') && !word.starts_with('-');
    let words = words.map(|words| words.into_iter().skip_while(is_setting).collect::<Vec<_>>());
    words.filter(|words| words.first().is_some_and(|first| first == program)).collect()
}

/// Whether words are missing from a command line, and none is wrong.
fn is_incomplete(error: &clap::Error) -> bool {
    let value = error.get(ContextKind::InvalidValue).map(ToString::to_string);
    match error.kind() {
        ErrorKind::InvalidValue => value.is_some_and(|value| value.is_empty()),
        kind => matches!(
            kind,
            ErrorKind::MissingRequiredArgument
                | ErrorKind::MissingSubcommand
                | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
                | ErrorKind::DisplayHelp
                | ErrorKind::DisplayVersion
        ),
    }
}

#[test]
fn every_command_in_the_documentation_is_taken() {
    let mut count = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for line in fenced(&text) {
            for words in commands(&line, "kvmmem") {
                count += 1;
                if let Err(error) = Cli::try_parse_from(&words) {
                    panic!("{}: {line}\n{error}", page.display());
                }
            }
            for words in commands(&line, "kvmmemd") {
                if let Err(error) = kvmmem_broker::Options::try_parse_from(&words) {
                    panic!("{}: {line}\n{error}", page.display());
                }
            }
        }
        // In running text a command may be named without what it needs, or with `...` in its place,
        // and an option without its value.
        for span in inline(&text) {
            for mut words in commands(&span, "kvmmem") {
                words.retain(|word| word != "...");
                if let Err(error) = Cli::try_parse_from(&words) {
                    assert!(is_incomplete(&error), "{}: `{span}`: {error}", page.display());
                }
            }
        }
    }
    assert!(count > 30, "only {count} commands were found");
}

#[test]
fn every_command_in_the_help_is_taken() {
    let mut cli = crate::command();
    cli.build();
    let verbs: Vec<String> = cli.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    for verb in verbs {
        let help = cli.find_subcommand_mut(&verb).unwrap().render_long_help().to_string();
        for line in
            help.lines().filter(|line| line.contains(": kvmmem ") && !line.starts_with("Usage"))
        {
            let (_, example) = line.split_once(": ").unwrap();
            for words in commands(example.trim_end_matches('.'), "kvmmem") {
                assert!(Cli::try_parse_from(&words).is_ok(), "{verb}: {line}");
            }
        }
    }
}

#[test]
fn the_commands_of_a_page_are_found() {
    let page = "`a b`\n\n```sh\nX=1 kvmmem grant create web1 \\\n    --rw   # a token\nqemu $(kvmmem qemu-args) x\nkvmmemd\n```\n\
                ```rust\nkvmmem no\n```\n```console\n# kvmmem grant list > list\nkvmmem no\n```\n";
    let lines = fenced(page);
    assert_eq!(lines.len(), 4, "{lines:?}");
    let found: Vec<String> = lines
        .iter()
        .flat_map(|line| commands(line, "kvmmem"))
        .map(|words| words.join(" "))
        .collect();
    assert_eq!(found, ["kvmmem grant create web1 --rw", "kvmmem qemu-args", "kvmmem grant list"]);
    assert_eq!(inline("`a b` c `d`"), ["a b", "d"]);
}

#[test]
fn every_help_states_its_exit_codes_once() {
    fn check(command: &mut clap::Command, count: &mut usize) {
        if !command.has_subcommands() {
            *count += 1;
            let help = command.render_long_help().to_string();
            let name = command.get_name();
            assert_eq!(help.matches("Exit codes:").count(), 1, "{name}: {help}");
            let (_, codes) = help.split_once("Exit codes:").unwrap();
            for code in ["\n  0  ", "\n  1  ", "\n  2  "] {
                assert_eq!(codes.matches(code).count(), 1, "{name} {code:?}: {help}");
            }
        }
        let below = command.get_subcommands_mut().filter(|below| below.get_name() != "help");
        below.for_each(|below| check(below, count));
    }
    let (mut command, mut count) = (crate::command(), 0);
    command.build();
    check(&mut command, &mut count);
    assert!(count > 30, "{count} commands");
}
