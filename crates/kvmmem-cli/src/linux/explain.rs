// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a Linux guest cannot be read, in one line: which guest, what is missing, and what to do
//! next.

use anyhow::{Error, anyhow};
use kvmmem::view::{State, View};
use kvmmem_linux::symbols::TableError;
use kvmmem_linux::{FindError, KernelError};
use kvmmem_memory::DumpFile;

use super::choice::command;
use crate::failure;
use crate::input::InputMemory;

/// The lowest address at which QEMU ends RAM before the PCI hole (q35, with 2.75 GiB and more).
const PCI_HOLE: u64 = 0x8000_0000;

/// The error with the guest's name.
pub(crate) fn explain(error: Error, opened: &InputMemory) -> Error {
    let (guest, dump) = match opened {
        InputMemory::File(dump) => (opened.name(), Some(dump)),
        InputMemory::View(..) => (opened.name(), None),
    };
    if failure::exit_code(&error).is_some() {
        return error;
    }
    if let Some(end) = opened.view().and_then(end) {
        return anyhow!("{guest}: {end}");
    }
    let cause = error.chain().find_map(|cause| line(cause, dump.is_some()));
    let error = match cause {
        Some(line) => anyhow!("{guest}: {line}"),
        None if dump.is_some() && error.chain().any(is_damage) => error.context(format!(
            "{guest} is damaged, or was cut short: dump the guest again, with --pause if it runs"
        )),
        None => error,
    };
    match dump.and_then(missing_record) {
        Some(text) => error.context(text),
        None => error,
    }
}

/// Why nothing of a view can be read any more: what was being read then does not matter.
fn end(view: &View) -> Option<&'static str> {
    match view.status().ok()?.state {
        State::Open => None,
        State::Revoked => Some("the grant was revoked: ask its owner for a new token"),
        State::Gone => Some("the virtual machine has ended, or the broker has"),
    }
}

/// Whether what the kernel's structures lead to is not there.
fn is_damage(cause: &(dyn std::error::Error + 'static)) -> bool {
    use KernelError::{Broken, Endless, Malformed, Read};
    let cause = cause.downcast_ref();
    matches!(cause, Some(Read { .. } | Malformed { .. } | Broken { .. } | Endless { .. }))
}

/// How to explain one cause.
fn line(cause: &(dyn std::error::Error + 'static), is_file: bool) -> Option<String> {
    match cause.downcast_ref() {
        Some(FindError::NoKernel | FindError::NoneFits { .. }) if is_file => Some(format!(
            "{cause}, or the dump was cut short; kvmmem read, scan and strings work with any system"
        )),
        Some(FindError::NoKernel | FindError::NoneFits { .. }) => Some(format!(
            "{cause}: run the command again once it has booted; kvmmem read, scan and strings work with any system"
        )),
        Some(FindError::Ambiguous { candidates }) => {
            let commands: Vec<String> = candidates.iter().map(command).collect();
            Some(format!("{cause}; choose one: {}", commands.join(" or ")))
        }
        Some(FindError::TooMany) => Some(format!("{cause}: --note GPA, or --kernel CR3 of a vCPU")),
        Some(FindError::NotInSpace { .. }) => {
            Some(format!("{cause}: leave --kernel out, and the error lists those that there are"))
        }
        Some(FindError::NotThere { .. }) => {
            Some(format!("{cause}: leave --note out, and the error lists those that do"))
        }
        _ => match cause.downcast_ref()? {
            KernelError::NoTypes => Some(format!("{cause}: kvmmem dmesg prints it")),
            KernelError::Symbols(table) => match **table {
                TableError::NotFound => Some(format!("{table}; kvmmem dmesg needs no symbols")),
                _ => Some(format!("{cause}: {table}; kvmmem dmesg needs no symbols")),
            },
            KernelError::Types(types) => {
                Some(format!("{cause}: {types}; kvmmem dmesg needs no types"))
            }
            KernelError::NoSymbol { .. } | KernelError::NoType { .. } | KernelError::Member(_) => {
                Some(cause.to_string())
            }
            _ => None,
        },
    }
}

/// What may be wrong with a raw dump whose record is missing.
fn missing_record(dump: &DumpFile) -> Option<String> {
    let has_hole = dump.segments().iter().any(|segment| segment.range.end() > PCI_HOLE);
    dump.missing_record().filter(|_| has_hole).map(|record| {
        format!(
            "there is no {}, the record of this raw dump, so that each byte was taken for that at its address; a copy of \
             the RAM of a guest with a PCI hole is not like that: put the record there, or dump the guest with kvmmem dump",
            record.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_that_is_too_large_does_not_make_a_dump_a_damaged_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(0x1000).unwrap();
        let opened = InputMemory::File(DumpFile::open(file.path()).unwrap());
        let explained = |error: KernelError| format!("{:#}", explain(error.into(), &opened));
        let advice = "is damaged, or was cut short: dump the guest again";
        let damage = KernelError::Malformed { what: "a length".to_owned(), gva: 0x1000 };
        assert!(explained(damage).contains(advice));
        let text = explained(KernelError::TooMuch { what: "1 GiB of files" });
        assert!(text.contains("1 GiB of files") && !text.contains(advice), "{text}");
    }
}
