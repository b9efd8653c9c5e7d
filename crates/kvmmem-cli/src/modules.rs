// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem modules`: the modules that a Linux guest's kernel has loaded.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_linux::modules::{Module, Modules, State};
use serde::Serialize;

use crate::linux::{Damage, Guest, collect};
use crate::number::Hex;
use crate::output::Output;
use crate::table::{Table, mark};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    #[command(flatten)]
    table: Table,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
SIZE is that of all its memory, bytes; USES is how often it is used, BASE where its code is. A ! after a state says that the
module changed whenever it was read; a ?, that some of it could not be read (\"damaged\" in JSON).

Exit codes:
  0  done
  1  failed, standard error says why: no kernel was found, or one without symbols or types, or its list is damaged
  2  the command line is wrong
  3  some of it could not be read, standard error says how much; the rest was printed
  4  the guest was restarted while it was read";

/// A module, as JSON.
#[derive(Serialize)]
struct ModuleLine<'a> {
    name: &'a str,
    size: u64,
    references: u32,
    used_by: &'a [String],
    state: &'static str,
    base: Hex,
    /// Where its `struct module` is.
    module: Hex,
    torn: bool,
    damaged: bool,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let modules = self.guest.with_kernel("modules", |kernel| {
            collect(|| Modules::new(kernel)).context("cannot list the modules")
        })?;
        let header = ["MODULE", "SIZE", "USES", "STATE", "BASE", "USED BY"];
        self.table.print(output, &modules.rows, ModuleLine::new, header, row)?;
        let mut damage = Damage::default();
        damage.missing(modules.lost, "module", "modules");
        damage.marked(modules.rows.iter().map(|module| module.is_damaged));
        self.guest.end(damage)
    }
}

fn row(module: &Module) -> [String; 6] {
    [
        module.name.clone(),
        module.size.to_string(),
        module.references.to_string(),
        format!("{}{}", state(module.state), mark(module.is_torn, module.is_damaged)),
        format!("{:#x}", module.base),
        module.used_by.join(","),
    ]
}

fn state(state: State) -> &'static str {
    match state {
        State::Live => "live",
        State::Loading => "loading",
        State::Unloading => "unloading",
    }
}

impl<'a> ModuleLine<'a> {
    fn new(module: &'a Module) -> Self {
        Self {
            name: &module.name,
            size: module.size,
            references: module.references,
            used_by: &module.used_by,
            state: state(module.state),
            base: Hex(module.base),
            module: Hex(module.gva),
            torn: module.is_torn,
            damaged: module.is_damaged,
        }
    }
}
