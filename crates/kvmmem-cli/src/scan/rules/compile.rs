// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From files of rules to a scanner, and the bytes that memory holds where their strings match.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use boreal::Scanner;
use boreal::compiler::{AddRuleError, Compiler, CompilerParams};
use kvmmem::search::{Atoms, MaskedByte};

use super::includes::{Walk, with_stack};
use crate::escape::escape;
use crate::failure::usage;

/// A rule that each namespace has. While its symbol is false, no condition of the namespace is
/// evaluated.
pub(super) const GATE: &str = "kvmmem_evaluates_conditions";

/// Bits that differ between an ASCII letter's cases.
const CASE: u8 = 0x20;

/// Atoms that are collected: with so many, they are in any memory.
const MAX_ATOMS: usize = 10_000;

/// The gate's symbol.
pub(super) const GATE_SYMBOL: &str = "kvmmem_conditions";

/// CompiledRules rules.
pub(super) struct CompiledRules {
    pub(super) scanner: Scanner,
    /// Bytes that memory holds wherever a string matches; `None` if they cannot be looked for.
    pub(super) atoms: Option<Atoms>,
    /// Whether some rules or strings may be private.
    pub(super) has_private: bool,
}

/// Compiles files of rules. Each file is a namespace, which also gets [`GATE`]. Warnings are
/// logged.
pub(super) fn compile(files: &[PathBuf]) -> Result<CompiledRules> {
    let namespaces = namespaces(files)?;
    let mut walk = Walk::default();
    for file in files {
        walk.next_file();
        walk.visit(file.clone())?;
    }
    let Walk { operators, has_private, .. } = walk;
    let (scanner, atoms) = with_stack(operators, || {
        let mut compiler = Compiler::new();
        compiler.set_params(CompilerParams::default().compute_statistics(true));
        compiler.define_symbol(GATE_SYMBOL, true);
        let mut patterns = Some(Vec::new());
        let gate = format!("private global rule {GATE} {{ condition: {GATE_SYMBOL} }}");
        for (file, namespace) in files.iter().zip(&namespaces) {
            compiler.add_rules_str_in_namespace(&gate, namespace)?;
            match compiler.add_rules_file_in_namespace(file, namespace) {
                Ok(status) => {
                    status.warnings().for_each(|warning| tracing::warn!("{}", lines(warning)));
                    let strings = status.statistics().flat_map(|rule| &rule.strings);
                    strings.for_each(|string| add_atoms(&mut patterns, &string.atoms));
                }
                Err(error) => bail!(explain(&error)),
            }
        }
        Ok((compiler.finalize(), patterns.and_then(Atoms::new)))
    })??;
    Ok(CompiledRules { scanner, atoms, has_private })
}

/// Adds the atoms of a string, in any case: which strings mean letters that way is not known. A
/// string without any is looked for by itself, and then nothing can be passed over.
fn add_atoms(patterns: &mut Option<Vec<Vec<MaskedByte>>>, atoms: &[Vec<u8>]) {
    let fold = |byte: &u8| {
        let mask = if byte.is_ascii_alphabetic() { !CASE } else { 0xff };
        MaskedByte { value: *byte, mask }
    };
    match patterns {
        Some(all) if !atoms.is_empty() && all.len() < MAX_ATOMS => {
            all.extend(atoms.iter().map(|atom| atom.iter().map(fold).collect()));
        }
        _ => *patterns = None,
    }
}

/// The files' namespaces: their names without the extension, or their paths where these are not
/// different.
fn namespaces(files: &[PathBuf]) -> Result<Vec<String>> {
    let stem = |file: &PathBuf| file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let stems: Vec<String> = files.iter().map(stem).collect();
    let mut seen = HashSet::new();
    for file in files {
        // A missing file is an error later.
        if !seen.insert(file.canonicalize().unwrap_or_else(|_| file.clone())) {
            return Err(usage(format!("{} is given twice", file.display())));
        }
    }
    let is_single = |stem: &String| stems.iter().filter(|other| *other == stem).count() == 1;
    let name = |(stem, file): (&String, &PathBuf)| {
        if is_single(stem) { stem.clone() } else { file.display().to_string() }
    };
    Ok(stems.iter().zip(files).map(name).collect())
}

/// Why rules do not compile, and what to do where a module is missing.
fn explain(error: &AddRuleError) -> String {
    let text = lines(error);
    let is_format = |name: &&str| text.ends_with(&format!("unknown import {name}"));
    match ["pe", "elf", "macho", "dotnet", "dex", "magic", "cuckoo"].into_iter().find(is_format) {
        Some(name) => format!(
            "{text}; module {name} parses a whole file, which memory does not hold: use rules without it"
        ),
        None => text,
    }
}

/// The message, each line without what a terminal would not show. The level that the compiler
/// writes after the place is left out: the caller prints it before the message.
fn lines(message: &impl fmt::Display) -> String {
    let text = message.to_string();
    let level = [": error: ", ": warning: "]
        .into_iter()
        .filter_map(|level| Some((text.find(level)?, level)))
        .min();
    let text = level.map_or_else(|| text.clone(), |(_, level)| text.replacen(level, ": ", 1));
    text.lines().map(escape).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::path::Path;
    use std::slice::from_ref;

    use super::super::includes::MAX_OPERATORS;
    use super::*;

    /// Compiles the first of files that are written to one directory. The names of its rules, or
    /// the error's whole chain.
    fn compiled(files: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        let compiled = compile(from_ref(&directory.path().join(files[0].0)));
        compiled.map(|compiled| names(&compiled)).map_err(|error| format!("{error:#}"))
    }

    fn names(compiled: &CompiledRules) -> Vec<String> {
        let rules = compiled.scanner.rules().filter(|rule| rule.name != GATE);
        rules.map(|rule| format!("{}:{}", rule.namespace, rule.name)).collect()
    }

    #[test]
    fn rules_that_include_themselves_are_refused() {
        let own = compiled(&[("a.yar", "include \"a.yar\"")]).unwrap_err();
        assert!(own.contains("a.yar includes itself"), "{own}");
        let circle = compiled(&[
            ("a.yar", "include \"b.yar\""),
            ("b.yar", "rule b { condition: true } include \"./a.yar\""),
        ]);
        let circle = circle.unwrap_err();
        assert!(circle.contains("a.yar includes itself, by way of"), "{circle}");
        // Neither in a comment nor in a string.
        let rule = "// include \"a.yar\"\nrule a { strings: $a = \"include \\\"a.yar\\\"\" condition: $a }";
        assert_eq!(compiled(&[("a.yar", rule)]).unwrap(), ["a:a"]);
    }

    #[test]
    fn includes_have_a_bound() {
        let names: Vec<String> = (0..3000).map(|number| format!("{number}.yar")).collect();
        let chain = |count: usize| -> Vec<(String, String)> {
            let include = |number: usize| format!("include \"{}\"", names[number + 1]);
            let mut files: Vec<_> =
                (0..count).map(|number| (names[number].clone(), include(number))).collect();
            files.push((names[count].clone(), "rule a { condition: true }".into()));
            files
        };
        let compiled = |files: Vec<(String, String)>| {
            let files: Vec<(&str, &str)> =
                files.iter().map(|(name, text)| (&**name, &**text)).collect();
            compiled(&files)
        };
        assert_eq!(compiled(chain(16)).unwrap(), ["0:a"]);
        for count in [17, 2999] {
            let error = compiled(chain(count)).unwrap_err();
            assert!(error.contains("more than 16 includes within includes"), "{error}");
        }
        let many = "include \"b.yar\"\n".repeat(1001);
        let error =
            compiled(vec![("a.yar".into(), many), ("b.yar".into(), String::new())]).unwrap_err();
        assert!(error.contains("more than 1000 includes"), "{error}");
        let error = compiled(vec![("a.yar".into(), "include \"none.yar\"".into())]).unwrap_err();
        assert!(error.contains("a.yar:1:") && error.contains("none.yar"), "{error}");
    }

    #[test]
    fn conditions_that_are_nested_deeply_are_refused() {
        for (count, before, end, words) in [
            (100_000, "not ", "true", "max depth"),
            (MAX_OPERATORS - 10, "~", "1 == 1", "max depth"),
            (MAX_OPERATORS + 1, "~", "1 == 1", "split the file"),
        ] {
            let rule = format!("rule a {{ condition: {}{end} }}", before.repeat(count));
            let error = compiled(&[("a.yar", &rule)]).unwrap_err();
            assert!(error.contains(words), "{count} {before}: {error}");
        }
        let mut sum = "rule a { condition: 1".to_owned();
        (0..100_000).for_each(|_| sum.write_str("+1").unwrap());
        let error = compiled(&[("a.yar", &format!("{sum} == 1 }}"))]).unwrap_err();
        assert!(error.contains("max depth"), "{error}");
    }

    #[test]
    fn what_is_no_file_of_rules_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
        let binary = directory.path().join("binary");
        std::fs::write(&binary, [0xff, 0xfe]).unwrap();
        for (path, words) in [
            (directory.path().join("none.yar"), "No such file"),
            (directory.path().to_owned(), "not a regular file"),
            (fifo, "not a regular file"),
            (binary, "line 1 is not UTF-8 text"),
        ] {
            let error = format!("{:#}", compile(from_ref(&path)).err().unwrap());
            let expected = format!("cannot read the rules in {}", path.display());
            assert!(error.starts_with(&expected) && error.contains(words), "{error}");
        }
    }

    #[test]
    fn each_file_has_a_namespace_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "rule same { condition: true }").unwrap();
            path
        };
        let files = [file("a/rules.yar"), file("b/rules.yar"), file("other.yar")];
        let compiled = compile(&files).unwrap();
        let path = |file: &Path| format!("{}:same", file.display());
        assert_eq!(names(&compiled), [path(&files[0]), path(&files[1]), "other:same".into()]);
        let error =
            compile(&[files[0].clone(), directory.path().join("a/../a/rules.yar")]).err().unwrap();
        assert!(error.to_string().ends_with("is given twice"), "{error}");
    }

    #[test]
    fn what_does_not_compile_is_told_with_its_place() {
        for (text, words) in [
            ("rule a { condition: $b }", "rules.yar:1:"),
            ("import \"pe\"\nrule a { condition: pe.is_pe }", "module pe parses a whole file"),
            ("import \"nothing\"\nrule a { condition: true }", "unknown import nothing"),
            ("rule \u{1b}[2J { condition: true }", "rules.yar:1:"),
        ] {
            let error = compiled(&[("rules.yar", text)]).unwrap_err();
            assert!(error.contains(words) && !error.contains('\u{1b}'), "{error}");
        }
    }
}
