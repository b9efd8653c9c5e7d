// SPDX-License-Identifier: GPL-2.0-only
//! Parameters of the selftest: a hypercall method that CPUID does not offer, descriptor pages in
//! place of the host's answers, allocations that fail.
//!
//! With them root could make the module map any physical memory. So they exist only in a build with
//! KVMMEM_SELFTEST=y, never in the shipped module.

#[cfg(kvmmem_selftest)]
pub(crate) use forced::*;

#[cfg(kvmmem_selftest)]
mod forced {
    use kernel::prelude::*;
    use kernel::sync::atomic::{Atomic, Relaxed};

    use crate::abi::ioctl::PAGE_SIZE;
    use crate::module_parameters as parameters;
    use crate::sys::call::Method;

    /// `_IO('i', 0xf0)`: mappings of a view's memory into the kernel fail for want of memory, as
    /// many as the argument's low 16 bits say, after as many as the next ones say. Those of PCI
    /// devices, which are probed at any time, do not count.
    const FAIL_MAPPINGS: u32 = 0x69f0;

    static SUCCESSES: Atomic<i64> = Atomic::new(0);
    static FAILURES: Atomic<i64> = Atomic::new(0);

    pub(crate) fn method() -> Option<Method> {
        match *parameters::force_port.value_ref() {
            0 => parameters::force_vmcall
                .value()
                .then(|| Method::forced(None)),
            port => Some(Method::forced(Some(port))),
        }
    }

    pub(crate) fn has_windows() -> bool {
        parameters::force_window.value()
    }

    /// The page that stands in for the host's answer: the request's first byte is its number.
    pub(crate) fn descriptor(request: &[u8]) -> Option<u64> {
        let first = parameters::test_descriptor.value();
        let number = u64::from(*request.first()?);
        (first != 0).then_some(first + number * PAGE_SIZE)
    }

    pub(crate) fn ioctl(cmd: u32, arg: usize) -> Result {
        if cmd != FAIL_MAPPINGS {
            return Err(ENOTTY);
        }
        SUCCESSES.store(arg as i64 >> 16, Relaxed);
        FAILURES.store(arg as i64 & 0xffff, Relaxed);
        Ok(())
    }

    /// `ENOMEM`, as often as was asked for.
    pub(crate) fn map_memory() -> Result {
        if SUCCESSES.load(Relaxed) > 0 && SUCCESSES.fetch_add(-1, Relaxed) > 0 {
            return Ok(());
        }
        if FAILURES.load(Relaxed) > 0 && FAILURES.fetch_add(-1, Relaxed) > 0 {
            return Err(ENOMEM);
        }
        Ok(())
    }
}

#[cfg(not(kvmmem_selftest))]
pub(crate) use nothing::*;

#[cfg(not(kvmmem_selftest))]
mod nothing {
    use kernel::prelude::*;

    use crate::sys::call::Method;

    pub(crate) fn method() -> Option<Method> {
        None
    }

    pub(crate) fn has_windows() -> bool {
        false
    }

    pub(crate) fn descriptor(_request: &[u8]) -> Option<u64> {
        None
    }

    pub(crate) fn ioctl(_cmd: u32, _arg: usize) -> Result {
        Err(ENOTTY)
    }

    pub(crate) fn map_memory() -> Result {
        Ok(())
    }
}
