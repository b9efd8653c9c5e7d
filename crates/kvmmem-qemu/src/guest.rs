// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a guest as it would be if a layout and a choice of mappings were right: for them
//! to be checked by.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use kvmmem_proto::map::Region;

use super::backing::Backing;
use super::layout::Layout;
use super::obstacle::Obstacle;
use super::process::Process;

/// Where a mapping's bytes are read from: a file, and the place in it of the first byte.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    file: Arc<File>,
    offset: u64,
}

/// Guest-physical memory.
pub(crate) struct Guest<'a> {
    layout: &'a Layout,
    /// What each backend is taken for, by their numbers.
    windows: Vec<Window>,
}

impl Window {
    /// What a mapping of a VMM holds. Its own file is read where it can be, which takes fewer
    /// rights.
    pub(crate) fn open(process: &Process, backing: &Backing) -> Result<Self, Obstacle> {
        let shared = match backing.shared {
            Some((id, offset)) => process.open_file(id)?.map(|file| (file, offset)),
            None => None,
        };
        let (file, offset) = match shared {
            Some(shared) => shared,
            None => (process.memory()?, backing.hva),
        };
        Ok(Self { file: Arc::new(file.into()), offset })
    }
}

impl<'a> Guest<'a> {
    pub(crate) fn new(layout: &'a Layout, windows: Vec<Window>) -> Self {
        Self { layout, windows }
    }

    /// Copies guest-physical memory out. What is no RAM is left as it is; `None` where RAM cannot
    /// be read.
    pub(crate) fn read(&self, gpa: u64, bytes: &mut [u8]) -> Option<()> {
        let end = gpa.checked_add(u64::try_from(bytes.len()).ok()?)?;
        for region in &self.layout.regions {
            let (first, last) = (gpa.max(region.gpa), end.min(region.gpa.checked_add(region.len)?));
            if first < last {
                let start = usize::try_from(first - gpa).ok()?;
                let part = bytes.get_mut(start..usize::try_from(last - gpa).ok()?)?;
                self.read_region(region, first - region.gpa, part)?;
            }
        }
        Some(())
    }

    fn read_region(&self, region: &Region, start: u64, bytes: &mut [u8]) -> Option<()> {
        let window = self.windows.get(usize::try_from(region.file).ok()?)?;
        let place = window.offset.checked_add(region.offset)?.checked_add(start)?;
        window.file.read_exact_at(bytes, place).ok()
    }
}
