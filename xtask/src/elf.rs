// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks that a program is static, so that it runs in a VM without libraries.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

/// Program header type of the dynamic linker's name (elf(5)).
const PT_INTERP: u32 = 3;

/// x86-64's machine number.
const EM_X86_64: u16 = 62;

/// Why the VMs could not run this file, if so.
pub(crate) fn check(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    match is_static(&bytes) {
        Some(true) => Ok(()),
        Some(false) => bail!(
            "{} is linked dynamically, and the VMs have no libraries: link it statically \
             (cc -static, or RUSTFLAGS=\"-C target-feature=+crt-static\")",
            path.display()
        ),
        None => bail!("{} is no program for 64-bit x86 Linux", path.display()),
    }
}

/// `None` if the bytes are not a 64-bit x86 ELF file.
fn is_static(bytes: &[u8]) -> Option<bool> {
    if !bytes.starts_with(b"\x7fELF\x02\x01") || half(bytes, 18)? != EM_X86_64 {
        return None;
    }
    let offset = usize::try_from(u64::from_le_bytes(*bytes.get(32..)?.first_chunk()?)).ok()?;
    let (size, count) = (usize::from(half(bytes, 54)?), usize::from(half(bytes, 56)?));
    for index in 0..count {
        let header = bytes.get(offset.checked_add(index * size)?..)?;
        if u32::from_le_bytes(*header.first_chunk()?) == PT_INTERP {
            return Some(false);
        }
    }
    Some(true)
}

fn half(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn this_test_is_linked_dynamically_unless_built_static() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(is_static(&bytes), Some(cfg!(target_feature = "crt-static")));
    }

    #[test]
    fn a_script_is_no_program() {
        assert_eq!(is_static(b"#!/bin/sh\n"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(mut bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Some(start) = bytes.get_mut(..6) {
                start.copy_from_slice(b"\x7fELF\x02\x01");
            }
            if let Some(machine) = bytes.get_mut(18..20) {
                machine.copy_from_slice(&EM_X86_64.to_le_bytes());
            }
            let _ = is_static(&bytes);
        }
    }
}
