// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of rules and what they include, checked before the compiler sees them. They come from
//! anywhere: what would make the compiler recurse without a bound is refused.
//!
//! | may be nested | bound |
//! |---|---|
//! | includes | 16 deep, as YARA has it, and 1,000 in all |
//! | operators of a condition | the compiler takes 40; it parses and drops any number, which takes stack for each |
//! | parentheses, regular expressions, hex strings | by the compiler |

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use boreal_parser::file::YaraFileComponent;
use rustix::fs::OFlags;

use crate::text_file::utf8;

/// Includes within includes.
const MAX_DEPTH: usize = 16;

/// Includes of one file and all that it includes.
const MAX_INCLUDES: usize = 1000;

/// Bytes of one file.
const MAX_LEN: u64 = 64 << 20;

/// What may be an operator, in one file.
pub(super) const MAX_OPERATORS: usize = 1 << 20;

/// Stack of the compiler, bytes: in all, and for each operator.
const STACK: usize = 8 << 20;
const STACK_OF_OPERATOR: usize = 512;

/// A walk through a file of rules and what it includes.
#[derive(Default)]
pub(super) struct Walk {
    /// The files from the first one to the present one.
    chain: Vec<PathBuf>,
    includes: usize,
    /// What may be an operator in the file that has the most.
    pub(super) operators: usize,
    /// Whether the word is in one of them.
    pub(super) has_private: bool,
}

impl Walk {
    /// Begins with another file of rules.
    pub(super) fn next_file(&mut self) {
        self.chain.clear();
        self.includes = 0;
    }

    /// Checks a file and all that it includes.
    pub(super) fn visit(&mut self, file: PathBuf) -> Result<()> {
        let text =
            read(&file).with_context(|| format!("cannot read the rules in {}", file.display()))?;
        let operators = operators(&text);
        ensure!(
            operators <= MAX_OPERATORS,
            "{} has {operators} operators, at most {MAX_OPERATORS} are taken: split the file",
            file.display()
        );
        self.operators = self.operators.max(operators);
        self.has_private |= text.contains("private");
        if !text.contains("include") {
            return Ok(());
        }
        let included = with_stack(operators, || {
            // The compiler reports text that does not parse.
            let components =
                boreal_parser::parse(&text).map(|file| file.components).unwrap_or_default();
            let paths = components.into_iter().filter_map(|component| match component {
                YaraFileComponent::Include(include) => Some(include.path),
                _ => None,
            });
            paths.collect::<Vec<String>>()
        })?;
        let directory = file.parent().unwrap_or_else(|| Path::new("")).to_owned();
        self.chain.push(file);
        for path in included {
            // The compiler reports a missing file, with the place of the include.
            let Ok(path) = directory.join(path).canonicalize() else { continue };
            self.includes += 1;
            let first =
                self.chain.first().map(|file| file.display().to_string()).unwrap_or_default();
            if self.chain.iter().any(|file| file.canonicalize().is_ok_and(|file| file == path)) {
                bail!("{} includes itself, by way of {first}", path.display());
            }
            ensure!(
                self.chain.len() <= MAX_DEPTH,
                "{first} has more than {MAX_DEPTH} includes within includes: {} is one too many",
                path.display()
            );
            ensure!(self.includes <= MAX_INCLUDES, "{first} has more than {MAX_INCLUDES} includes");
            self.visit(path)?;
        }
        self.chain.pop();
        Ok(())
    }
}

/// The text of a file.
fn read(path: &Path) -> Result<String> {
    // The compiler reads it again; a pipe would not have it twice, and would wait for a writer.
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits())?;
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let metadata = file.metadata()?;
    ensure!(metadata.is_file(), "it is not a regular file: write the rules to one");
    ensure!(
        metadata.len() <= MAX_LEN,
        "it has {} bytes, at most {MAX_LEN} are taken",
        metadata.len()
    );
    read_text(&file)
}

fn read_text(file: &File) -> Result<String> {
    let mut bytes = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut bytes)?;
    utf8(bytes)
}

/// At least as many as a condition in the text has operators that nest: those in comments and
/// strings count too.
fn operators(text: &str) -> usize {
    const SIGNS: &[u8] = b"~-+*\\%&|^<>=!";
    const WORDS: [&str; 7] =
        ["not", "defined", "contains", "startswith", "endswith", "iequals", "matches"];
    let signs = text.bytes().filter(|byte| SIGNS.contains(byte)).count();
    signs + WORDS.map(|word| text.matches(word).count()).iter().sum::<usize>()
}

/// Runs `act` with a stack for that many nested operators.
pub(super) fn with_stack<T: Send>(operators: usize, act: impl FnOnce() -> T + Send) -> Result<T> {
    let stack = STACK + operators * STACK_OF_OPERATOR;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("kvmmem-rules".into()).stack_size(stack);
        let thread = thread.spawn_scoped(scope, act);
        let thread = thread.with_context(|| format!("no memory for a stack of {stack} bytes"))?;
        thread.join().map_err(|_| anyhow!("the rules cannot be compiled"))
    })
}
