// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The symbols of modules (`struct mod_kallsyms`, `kernel/module/kallsyms.c`): what is built into
//! the kernel of one distribution is a module of another's, `ipv6` among it. Each module has the
//! part of its ELF symbol table that CONFIG_KALLSYMS keeps.

use super::NAME_LEN;
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};

/// Bytes of `Elf64_Sym`; a name's place is its first member, and where its value is.
const SYMBOL: u64 = 24;
const VALUE: u64 = 8;

/// The most symbols of a module. Debian's largest module has 25,000.
const MAX_SYMBOLS: u64 = 1 << 18;

/// Symbols that are read at once.
const BATCH: u64 = 512;

impl Kernel<'_> {
    /// The address of a symbol of the kernel, or else of the module in which other kernels have it.
    /// `None` where neither has it.
    ///
    /// # Errors
    /// [`KernelError`]: modules or symbols cannot be read.
    pub(crate) fn symbol_or_of_module(
        &self,
        name: &str,
        module: &str,
    ) -> Result<Option<u64>, KernelError> {
        match self.symbols()?.get(name) {
            Some(gva) => Ok(Some(gva)),
            // A kernel without modules has no list of them.
            None if self.symbol("modules").is_err() => Ok(None),
            None => match module_named(self, module)? {
                Some(module) => symbol_of(self, module, name),
                None => Ok(None),
            },
        }
    }
}

/// Where the module with a name is.
fn module_named(kernel: &Kernel<'_>, name: &str) -> Result<Option<u64>, KernelError> {
    let name_at = kernel.offset("module", "name")?;
    for module in kernel.list_of(kernel.symbol("modules")?, "module", "list")? {
        let module = module?;
        let mut found = Bytes::zeroed(NAME_LEN);
        kernel.read(module.wrapping_add(name_at), found.as_mut())?;
        if found.string(0, NAME_LEN) == name {
            return Ok(Some(module));
        }
    }
    Ok(None)
}

/// The address of a module's symbol.
fn symbol_of(kernel: &Kernel<'_>, module: u64, name: &str) -> Result<Option<u64>, KernelError> {
    let table = kernel.read_u64(module.wrapping_add(kernel.offset("module", "kallsyms")?))?;
    let member = |member| {
        kernel.offset("mod_kallsyms", member).map(|at| kernel.read_u64(table.wrapping_add(at)))
    };
    let (symbols, names) = (member("symtab")??, member("strtab")??);
    let count = u64::from(
        kernel.read_u32(table.wrapping_add(kernel.offset("mod_kallsyms", "num_symtab")?))?,
    );
    if count > MAX_SYMBOLS {
        return Err(KernelError::TooMuch { what: "262,144 symbols of a module" });
    }
    let mut wanted = name.as_bytes().to_vec();
    wanted.push(0);
    for first in (0..count).step_by(usize::try_from(BATCH).unwrap_or(1)) {
        let batch = BATCH.min(count - first);
        let mut bytes = Bytes::zeroed(batch * SYMBOL);
        kernel.read(symbols.wrapping_add(first * SYMBOL), bytes.as_mut())?;
        for at in (0..batch).map(|index| index * SYMBOL) {
            let mut found = vec![0; wanted.len()];
            let place = names.wrapping_add(bytes.u32(at).into());
            // The last names may be shorter than this, at the end of their memory.
            if kernel.read(place, &mut found).is_ok() && found == wanted {
                return Ok(Some(bytes.u64(at + VALUE)));
            }
        }
    }
    Ok(None)
}
