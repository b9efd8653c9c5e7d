// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Words of the commands that messages suggest, quoted so that a shell reads them back when they
//! are pasted.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::escape::escape;

/// The word as a POSIX shell reads it. A word that a terminal would interpret, or that is not
/// UTF-8, is written as `$'...'`, which bash, zsh, ksh and busybox read.
pub(crate) fn quote(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref();
    let plain = word.to_str().filter(|text| escape(text) == **text);
    plain
        .and_then(|text| shlex::try_quote(text).ok())
        .map_or_else(|| ansi_c(word.as_bytes()), Into::into)
}

fn ansi_c(word: &[u8]) -> String {
    let byte = |byte: &u8| match byte {
        b'\'' | b'\\' => format!("\\{}", char::from(*byte)),
        0x20..0x7f => char::from(*byte).to_string(),
        _ => format!("\\x{byte:02x}"),
    };
    format!("$'{}'", word.iter().map(byte).collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_words_stay_as_they_are() {
        for word in ["/run/web-1.qmp", "web_1", "4711", "a.b:c@d+e"] {
            assert_eq!(quote(word), word);
        }
        assert_eq!(quote("/run/web 1;reboot"), "'/run/web 1;reboot'");
        assert_eq!(quote("a\x1b[2J'\n"), "$'a\\x1b[2J\\'\\x0a'");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_shell_reads_any_word_back(word in proptest::collection::vec(1u8.., 0..40)) {
            let quoted = quote(OsStr::from_bytes(&word));
            prop_assert!(!quoted.bytes().any(|byte| byte < 0x20 || byte == 0x7f), "{}", quoted);
            let script = format!("printf %s {quoted}");
            let output = Command::new("bash").args(["-c", &script]).env("LC_ALL", "C").output().unwrap();
            prop_assert_eq!(&output.stdout, &word, "{}", quoted);
        }
    }
}
