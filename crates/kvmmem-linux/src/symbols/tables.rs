// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables of kallsyms: their addresses, which the VMCOREINFO note has from 6.0 on, and their
//! content.

use super::addresses::Scheme;
use super::error::TableError;
use super::index::Symbols;
use super::names::{MAX_TOKEN_BYTES, Names, Tokens};
use crate::space::Space;
use crate::vmcoreinfo::{KERNEL_MAP, Note};

/// The addresses of all symbols with a name.
pub(crate) type Addresses<'a> = dyn Fn(&str) -> Vec<u64> + 'a;

/// Bytes of compressed names that are read at a time.
const CHUNK: usize = 256 << 10;

/// Bytes of kallsyms_token_index: 256 numbers of 2 bytes.
pub(super) const INDEX_BYTES: usize = 512;

/// How many of the note's addresses must be those of the table, at least.
const MIN_RIGHT: usize = 4;

/// Where the tables lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tables {
    /// How many symbols there are.
    pub(super) count: u32,
    pub(super) names: u64,
    pub(super) token_table: u64,
    pub(super) token_index: u64,
    pub(super) offsets: u64,
    /// Where the base of the offsets is, in kernels that have one.
    pub(super) base: Option<u64>,
}

/// The places that the note gives, if it gives them.
pub(super) fn of_note(space: &Space<'_>, note: &Note) -> Option<Tables> {
    let place = |name: &str| note.symbol(&format!("kallsyms_{name}"));
    let mut count = [0; 4];
    space.read(place("num_syms")?, &mut count).ok()?;
    Some(Tables {
        count: u32::from_le_bytes(count),
        names: place("names")?,
        token_table: place("token_table")?,
        token_index: place("token_index")?,
        offsets: place("offsets")?,
        base: place("relative_base"),
    })
}

/// Whether addresses match those in the note.
pub(super) fn fit_note(note: &Note, addresses: &Addresses<'_>) -> bool {
    // Symbols of the image: the note's other addresses are values of pointers.
    let known = note.symbols().filter(|(_, address)| *address >= KERNEL_MAP);
    let mut right = 0;
    for (found, address) in known.map(|(name, address)| (addresses(name), address)) {
        if !found.is_empty() && !found.contains(&address) {
            return false;
        }
        right += usize::from(!found.is_empty());
    }
    right >= MIN_RIGHT
}

impl Tables {
    /// Reads the tables.
    pub(super) fn read(
        &self,
        space: &Space<'_>,
        fits: &dyn Fn(&Addresses<'_>) -> bool,
    ) -> Result<Symbols, TableError> {
        let names = Names::read(self.count, self.tokens(space)?, |done| {
            read_some(space, self.names.checked_add(done as u64)?, CHUNK)
        })?;
        let mut symbols = Symbols::new(names);
        symbols.addresses = self.addresses(space, fits, &symbols)?;
        Ok(symbols)
    }

    pub(super) fn tokens(&self, space: &Space<'_>) -> Result<Tokens, TableError> {
        let index = read(space, self.token_index, INDEX_BYTES)?;
        let (index, _) = index.as_chunks::<2>();
        let index: Vec<u16> = index.iter().map(|entry| u16::from_le_bytes(*entry)).collect();
        let table = read_some(space, self.token_table, MAX_TOKEN_BYTES);
        table
            .and_then(|table| Tokens::new(table, &index))
            .ok_or(TableError::Read { gva: self.token_table })
    }

    /// The address of each symbol, by the scheme that fits.
    pub(super) fn addresses(
        &self,
        space: &Space<'_>,
        fits: &dyn Fn(&Addresses<'_>) -> bool,
        symbols: &Symbols,
    ) -> Result<Vec<u64>, TableError> {
        let bytes = read(space, self.offsets, symbols.len() * 4)?;
        let (offsets, _) = bytes.as_chunks::<4>();
        let offsets: Vec<i32> = offsets.iter().map(|offset| i32::from_le_bytes(*offset)).collect();
        let base = match self.base {
            Some(gva) => read(space, gva, 8)?.first_chunk().map(|base| u64::from_le_bytes(*base)),
            None => None,
        };
        let address = |scheme: Scheme, index: usize| {
            scheme.address(*offsets.get(index)?, self.offsets.wrapping_add(4 * index as u64), base)
        };
        let fits = |scheme: &Scheme| {
            fits(&|name| {
                symbols.numbers(name).filter_map(|index| address(*scheme, index)).collect()
            })
        };
        let scheme = Scheme::ALL.into_iter().find(fits).ok_or(TableError::Addresses)?;
        Ok((0..symbols.len()).map(|index| address(scheme, index).unwrap_or(0)).collect())
    }
}

/// Reads `len` bytes.
pub(super) fn read(space: &Space<'_>, gva: u64, len: usize) -> Result<Vec<u8>, TableError> {
    let mut bytes = vec![0; len];
    space.read(gva, &mut bytes).map_err(|_| TableError::Read { gva })?;
    Ok(bytes)
}

/// Reads `len` bytes, or those up to the first that cannot be read.
pub(super) fn read_some(space: &Space<'_>, gva: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    if let Err(error) = space.read(gva, &mut bytes) {
        bytes.truncate(usize::try_from(error.gva().wrapping_sub(gva)).ok()?);
    }
    Some(bytes)
}
