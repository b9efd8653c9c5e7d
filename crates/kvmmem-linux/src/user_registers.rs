// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers that a thread had as it entered the kernel (`task_pt_regs()` of the kernel), and
//! the auxiliary vector of its process.

use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};
use crate::tasks::Task;

/// Bytes of `struct pt_regs`: 21 registers.
const PT_REGS: u64 = 21 * 8;

/// Sizes of a kernel stack: as it is, and with KASAN.
const STACKS: [u64; 2] = [16 << 10, 32 << 10];

/// What lies above the registers: nothing, or the two words that FRED pushes.
const PADDINGS: [u64; 2] = [0, 16];

/// Selectors of user mode: code of 64 and of 32 bits, and the stack.
const USER_CS: u64 = 0x33;
const USER32_CS: u64 = 0x23;
const USER_SS: u64 = 0x2b;

/// The most words of an auxiliary vector.
const MAX_AUXV: usize = 128;

/// A thread's registers in user mode, in the order of `struct pt_regs`, and its segment bases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserRegisters {
    /// R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI.
    pub general: [u64; 15],
    /// Number of the system call that it entered with, or -1.
    pub orig_rax: u64,
    /// RIP.
    pub rip: u64,
    /// CS.
    pub cs: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RSP.
    pub rsp: u64,
    /// SS.
    pub ss: u64,
    /// FS.base, which programs find their thread's variables by.
    pub fs_base: u64,
    /// GS.base.
    pub gs_base: u64,
}

impl Kernel<'_> {
    /// The registers in user mode of a thread that waits in the kernel. `None` for one that runs,
    /// whose registers are a vCPU's, for the kernel's own, and where the stack does not look as
    /// it should.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn user_registers(&self, task: &Task) -> Result<Option<UserRegisters>, KernelError> {
        let object = self.object("task_struct", task.gva)?;
        // A kernel for one processor has no such member, and runs nothing else while it is read. In
        // 7.3 it is a byte.
        let runs = object.has("on_cpu") && object.get("on_cpu")? != 0;
        if task.is_kernel || runs {
            return Ok(None);
        }
        let (stack, fs_base, gs_base) =
            (object.get("stack")?, object.get("thread.fsbase")?, object.get("thread.gsbase")?);
        for (size, padding) in
            STACKS.into_iter().flat_map(|size| PADDINGS.map(|padding| (size, padding)))
        {
            let mut bytes = Bytes::zeroed(PT_REGS);
            let at = stack.wrapping_add(size - padding - PT_REGS);
            // Beyond a stack of the smaller size there may be nothing.
            if self.read(at, bytes.as_mut()).is_err() {
                continue;
            }
            let mut registers = UserRegisters::read(&bytes);
            if registers.is_plausible() {
                (registers.fs_base, registers.gs_base) = (fs_base, gs_base);
                return Ok(Some(registers));
            }
        }
        Ok(None)
    }

    /// The auxiliary vector that a process was started with, as /proc/PID/auxv has it: pairs of
    /// words; the last pair is zero. Empty for a process without memory.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn auxiliary_vector(&self, task: &Task) -> Result<Vec<u64>, KernelError> {
        let mm = self.read_u64(task.gva.wrapping_add(self.offset("task_struct", "mm")?))?;
        let mut words = Vec::new();
        if mm == 0 || task.is_kernel {
            return Ok(words);
        }
        let vector = mm.wrapping_add(self.offset("mm_struct", "saved_auxv")?);
        while words.len() < MAX_AUXV {
            let [key, value] = [0, 8].map(|at| vector.wrapping_add(words.len() as u64 * 8 + at));
            let (key, value) = (self.read_u64(key)?, self.read_u64(value)?);
            words.extend([key, value]);
            if key == 0 {
                return Ok(words);
            }
        }
        Err(KernelError::Malformed { what: "the auxiliary vector".to_owned(), gva: vector })
    }
}

impl UserRegisters {
    fn read(bytes: &Bytes) -> Self {
        let word = |index: u64| bytes.u64(index * 8);
        let mut general = [0; 15];
        for (register, index) in general.iter_mut().zip(0..) {
            *register = word(index);
        }
        Self {
            general,
            orig_rax: word(15),
            rip: word(16),
            cs: word(17),
            rflags: word(18),
            rsp: word(19),
            ss: word(20),
            ..Self::default()
        }
    }

    /// Whether it is user mode's, in its half of the addresses.
    fn is_plausible(&self) -> bool {
        const LIMIT: u64 = 1 << 56;
        [USER_CS, USER32_CS].contains(&self.cs)
            && self.ss == USER_SS
            && self.rip < LIMIT
            && self.rsp < LIMIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_in_the_order_of_the_kernels_structure() {
        let mut bytes = Bytes::zeroed(PT_REGS);
        for (word, value) in bytes.as_mut().chunks_exact_mut(8).zip(1u64..) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        let registers = UserRegisters::read(&bytes);
        assert_eq!((registers.general[0], registers.general[14], registers.orig_rax), (1, 15, 16));
        assert_eq!(
            (registers.rip, registers.cs, registers.rflags, registers.rsp, registers.ss),
            (17, 18, 19, 20, 21)
        );
        assert!(!registers.is_plausible());
        let user = UserRegisters {
            cs: 0x33,
            ss: 0x2b,
            rip: 0x40_1000,
            rsp: 0x7fff_f7ff_e000,
            ..registers
        };
        assert!(user.is_plausible());
        assert!(!UserRegisters { rip: 0xffff_ffff_8100_0000, ..user }.is_plausible());
    }
}
