// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command that was meant where a word is none: an action without its noun, or a noun without
//! its action.

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};

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

/// Adds it to what clap says of a command line.
pub(crate) fn add(error: &mut clap::Error, words: impl IntoIterator<Item = String>) {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return;
    }
    let first = words.into_iter().find(|word| !word.starts_with('-'));
    let meant = MEANT.iter().find(|(word, _)| Some(*word) == first.as_deref());
    if let Some((_, command)) = meant {
        error.remove(ContextKind::SuggestedSubcommand);
        let tip = StyledStr::from(format!("the command is 'kvmmem {command}'"));
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
    }
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
            add(&mut error, words.iter().skip(1).map(|word| (*word).to_owned()));
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
        add(&mut other, ["target".to_owned()]);
        assert_eq!(other.render().to_string(), before);
    }
}
