// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tips for command lines that do not parse: the command where an action lacks its noun or a noun
//! its action, and `--target` where a word may be a target's name.

use clap::Command;
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::shell::quote;

/// First word of the command line, and the command that was meant.
const MEANT: [(&str, &str); 9] = [
    ("discover", "host discover"),
    ("grant", "grant create"),
    ("grants", "grant list"),
    ("hook", "hook add"),
    ("introspectors", "introspector list"),
    ("policy", "policy show"),
    ("revoke", "grant revoke"),
    ("targets", "target list"),
    ("unhook", "hook remove"),
];

/// Adds a tip to the error of a command line with these words.
pub(crate) fn add(
    error: &mut clap::Error,
    words: impl IntoIterator<Item = String>,
    command: &Command,
) {
    let words: Vec<String> = words.into_iter().collect();
    let first = words.iter().find(|word| !word.starts_with('-')).map(String::as_str);
    let tip = match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let meant = MEANT.iter().find(|(word, _)| Some(*word) == first);
            let Some((_, meant)) = meant else { return };
            error.remove(ContextKind::SuggestedSubcommand);
            format!("the command is 'kvmmem {meant}'")
        }
        ErrorKind::UnknownArgument | ErrorKind::ValueValidation => {
            let verb = first.and_then(|verb| command.find_subcommand(verb));
            let takes_target = |verb: &Command| {
                verb.get_arguments().any(|argument| argument.get_long() == Some("target"))
            };
            let Some(word) = misplaced(error).filter(|_| verb.is_some_and(takes_target)) else {
                return;
            };
            format!("to name a target, use '--target {}'", quote(&word))
        }
        _ => return,
    };
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
}

/// The word that the command line has where there is no place for it, or where another kind of word
/// belongs, if it may be a name.
fn misplaced(error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let word = match error.kind() {
        ErrorKind::UnknownArgument => text(ContextKind::InvalidArg)?,
        // The value of an option is not misplaced.
        _ if text(ContextKind::InvalidArg)?.starts_with('-') => return None,
        _ => text(ContextKind::InvalidValue)?,
    };
    word.starts_with(|first: char| first.is_alphabetic()).then_some(word)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::Cli;

    #[test]
    fn the_command_that_was_meant_is_named() {
        for (first, meant) in MEANT {
            let words = ["kvmmem", "--json", first, "web-1"];
            let mut error = Cli::try_parse_from(words).map(drop).unwrap_err();
            let words = words.iter().skip(1).map(|word| (*word).to_owned());
            add(&mut error, words, &crate::command());
            let text = error.render().to_string();
            assert!(text.contains(&format!("tip: the command is 'kvmmem {meant}'")), "{text}");
            // It is one.
            let mut command = crate::command();
            for word in meant.split(' ') {
                command = command.find_subcommand(word).unwrap().clone();
            }
        }
        let mut other = Cli::try_parse_from(["kvmmem", "target", "web-1"]).map(drop).unwrap_err();
        let before = other.render().to_string();
        add(&mut other, ["target".to_owned()], &crate::command());
        assert_eq!(other.render().to_string(), before);
    }
}
