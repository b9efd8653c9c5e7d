// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of one process, by its virtual addresses: the same as the guest's for what goes
//! through it. It is a process of a Linux guest, by its number, or the one that runs on a vCPU, of
//! any guest.

use anyhow::{Context, Result, bail};
use clap::Args;
use kvmmem_linux::Space;
use kvmmem_linux::space::{Extent, MappedError};
use kvmmem_memory::paging::AddressSpace;
use kvmmem_memory::{Memory, MemoryError, Range, VectoredError};

use crate::input::{Input, InputMemory};
use crate::linux::{Choice, RestartCheck, process, with_kernel};
use crate::number::{Address, Hex, integer, parse};
use crate::range::GpaRange;

/// Looks at tables that change, before their error counts.
const TRIES: u32 = 3;

#[derive(Args)]
pub(crate) struct Process {
    /// Of a Linux guest: the memory of this process alone, by its virtual addresses, as far as it
    /// is in memory
    #[arg(long, value_name = "PID", value_parser = integer(0..=u32::MAX))]
    pid: Option<u32>,
    /// The memory of the process that runs on this vCPU, by its virtual addresses: the lower half
    /// of the vCPU's address space, as far as it is in memory. The first vCPU is 0; its
    /// registers come with --target, or from an ELF dump
    #[arg(long, value_name = "N", conflicts_with = "pid", value_parser = integer(0..=u32::MAX))]
    vcpu: Option<u32>,
    /// Of several kernels, the one whose VMCOREINFO note is at this guest-physical address
    #[arg(long, value_name = "GPA", value_parser = parse, requires = "pid", conflicts_with = "kernel")]
    note: Option<u64>,
    /// Of several kernels, the one in the address space of this CR3, its own or that of one of its
    /// processes
    #[arg(long, value_name = "CR3", value_parser = parse, requires = "pid")]
    kernel: Option<u64>,
}

impl Process {
    /// Whether the memory is a process's.
    pub(crate) fn is_given(&self) -> bool {
        self.pid.is_some() || self.vcpu.is_some()
    }

    /// Opens the memory in which the process is; a whole guest's reaches into each of `wanted`.
    pub(crate) fn open(
        &self,
        input: &Input,
        verb: &str,
        wanted: &[GpaRange],
    ) -> Result<(InputMemory, Option<AddressSpace>)> {
        match self.vcpu {
            Some(vcpu) => {
                input.open_at_vcpu(verb, vcpu).map(|(opened, space)| (opened, Some(space)))
            }
            // Where a process lies is not known yet.
            None => Ok((input.open(verb, if self.is_given() { &[] } else { wanted })?, None)),
        }
    }

    /// An address of that memory.
    pub(crate) fn address(&self, at: u64) -> Address {
        if self.is_given() { Address::Gva(Hex(at)) } else { Address::Gpa(Hex(at)) }
    }

    /// Calls `act` with the memory of the process if one was named, else the guest's. `space` is
    /// that of [`Process::open`].
    pub(crate) fn with_memory<R>(
        &self,
        input: &Input,
        opened: &InputMemory,
        space: Option<AddressSpace>,
        act: impl FnOnce(&dyn Memory) -> Result<R>,
    ) -> Result<R> {
        let memory = opened.memory();
        match (self.pid, space, self.vcpu) {
            (Some(pid), ..) => {
                let choice = Choice { note: self.note, kernel: self.kernel };
                with_kernel(input, opened, choice, |kernel, _| {
                    let space = kernel.space_of(&process(kernel, pid, &input.arguments())?)?;
                    let extents = in_memory(&space, &format!("process {pid}"))?;
                    act(&ProcessMemory { memory, extents })
                })
            }
            (None, Some(space), Some(vcpu)) => {
                let restart = RestartCheck::begin(opened)?;
                let on = format!("the process on vCPU {vcpu} (CR3 {:#x})", space.cr3);
                let extents = in_memory(&Space::new(memory, space, 0), &on);
                restart.settle(
                    None,
                    extents.and_then(|extents| act(&ProcessMemory { memory, extents })),
                )
            }
            _ => act(memory),
        }
    }
}

/// What the process called `whose` has in memory, which is something.
fn in_memory(space: &Space<'_>, whose: &str) -> Result<Vec<Extent>> {
    let extents =
        mapped(space).with_context(|| format!("cannot tell what {whose} has in memory"))?;
    if extents.is_empty() {
        bail!("{whose} has nothing in memory");
    }
    Ok(extents)
}

/// What a process has in memory, looked up again where that changes meanwhile.
pub(crate) fn mapped(space: &Space<'_>) -> Result<Vec<Extent>, MappedError> {
    let mut result = space.mapped();
    for _ in 1..TRIES {
        if result.is_ok() {
            break;
        }
        result = space.mapped();
    }
    result
}

/// Memory whose addresses are a process's.
struct ProcessMemory<'m> {
    memory: &'m dyn Memory,
    /// Ascending by virtual address, disjoint.
    extents: Vec<Extent>,
}

impl ProcessMemory<'_> {
    /// The extents from the one that has `gva` on, or from the first after it.
    fn from(&self, gva: u64) -> &[Extent] {
        let first = self.extents.partition_point(|extent| extent.gva + extent.len <= gva);
        self.extents.get(first..).unwrap_or_default()
    }

    /// The next stretch without a hole at or after `gva`.
    fn next(&self, gva: u64) -> Option<Range> {
        let extents = self.from(gva);
        let first = extents.first()?;
        let start = first.gva.max(gva);
        let mut end = first.gva;
        for extent in extents {
            if extent.gva != end {
                break;
            }
            end += extent.len;
        }
        Some(Range { gpa: start, len: end - start })
    }
}

impl Memory for ProcessMemory<'_> {
    fn read_at(&self, gva: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let (mut at, mut rest) = (gva, buf);
        let mut pieces = Vec::new();
        for extent in self.from(gva) {
            if rest.is_empty() {
                break;
            }
            let inside = at.checked_sub(extent.gva).ok_or(MemoryError::Hole { gpa: at })?;
            let len = usize::try_from(extent.len - inside).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            pieces.push((extent.gpa + inside, now));
            at += len as u64;
            rest = later;
        }
        if !rest.is_empty() {
            return Err(MemoryError::Hole { gpa: at });
        }
        self.memory.read_vectored(&mut pieces).map_err(|VectoredError { source, .. }| source)
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        let mut ranges: Vec<Range> = Vec::new();
        for extent in &self.extents {
            match ranges.last_mut() {
                Some(last) if last.end() == extent.gva => last.len += extent.len,
                _ => ranges.push(Range { gpa: extent.gva, len: extent.len }),
            }
        }
        Ok(ranges)
    }

    fn data_from(&self, gva: u64) -> Result<Option<Range>, MemoryError> {
        Ok(self.next(gva))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RAM in which each byte is its page's number.
    struct Ram;

    impl Memory for Ram {
        fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
            buf.iter_mut()
                .zip(gpa..)
                .for_each(|(byte, gpa)| *byte = u8::try_from(gpa / 0x1000).unwrap());
            Ok(())
        }

        fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
            Ok(vec![Range { gpa: 0, len: 0x10_0000 }])
        }
    }

    #[test]
    fn pages_that_lie_apart_are_neighbours() {
        let extent = |gva, gpa, len| Extent { gva, gpa, len };
        let extents = vec![
            extent(0x40_0000, 0x5000, 0x2000),
            extent(0x40_2000, 0x3000, 0x1000),
            extent(0x50_0000, 0x1000, 0x1000),
        ];
        let memory = ProcessMemory { memory: &Ram, extents };
        let ranges = [Range { gpa: 0x40_0000, len: 0x3000 }, Range { gpa: 0x50_0000, len: 0x1000 }];
        assert_eq!(memory.ranges().unwrap(), ranges);
        assert_eq!(memory.data_from(0).unwrap(), Some(ranges[0]));
        assert_eq!(
            memory.data_from(0x40_2800).unwrap(),
            Some(Range { gpa: 0x40_2800, len: 0x800 })
        );
        assert_eq!(memory.data_from(0x40_3000).unwrap(), Some(ranges[1]));
        assert_eq!(memory.data_from(0x50_1000).unwrap(), None);
        let mut buffer = [0; 0x1002];
        memory.read_at(0x40_1fff, &mut buffer[..3]).unwrap();
        assert_eq!(buffer[..3], [6, 3, 3]);
        memory.read_at(0x40_0fff, &mut buffer).unwrap();
        assert_eq!((buffer[0], buffer[1], buffer[0x1001]), (5, 6, 3));
        for (gva, hole) in
            [(0x40_2fff, 0x40_3000), (0x40_3000, 0x40_3000), (0x50_0fff, 0x50_1000), (0, 0)]
        {
            let error = memory.read_at(gva, &mut buffer[..2]).unwrap_err();
            assert!(matches!(error, MemoryError::Hole { gpa } if gpa == hole), "{gva:#x}: {error}");
        }
    }
}
