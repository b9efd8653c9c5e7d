// SPDX-License-Identifier: GPL-2.0-only
//! Parameters of the selftest: a hypercall method that CPUID does not offer, descriptor pages in
//! place of the host's answers, allocations that fail.
//!
//! With them root could make the module map any physical memory. So they exist only in a build with
//! KVMMEM_SELFTEST=y, never in the shipped module.

use kernel::prelude::*;

use crate::sys::call::Method;

#[cfg(kvmmem_selftest)]
mod forced {
    pub(super) use kernel::sync::atomic::{Atomic, Relaxed};

    pub(super) use crate::abi::ioctl::PAGE_SIZE;
    pub(super) use crate::module_parameters as parameters;

    /// `_IO('i', 0xf0)`: mappings of a view's memory into the kernel fail for want of memory, as
    /// many as the argument's low 16 bits say, after as many as the next ones say. Those of PCI
    /// devices, which are probed at any time, do not count.
    pub(super) const FAIL_MAPPINGS: u32 = 0x69f0;

    pub(super) static SUCCESSES: Atomic<i64> = Atomic::new(0);
    pub(super) static FAILURES: Atomic<i64> = Atomic::new(0);
}

#[cfg(kvmmem_selftest)]
use forced::*;

/// The method that stands in for CPUID's.
pub(crate) fn method() -> Option<Method> {
    #[cfg(kvmmem_selftest)]
    return match *parameters::force_port.value_ref() {
        0 => parameters::force_vmcall
            .value()
            .then(|| Method::forced(None)),
        port => Some(Method::forced(Some(port))),
    };
    #[cfg(not(kvmmem_selftest))]
    None
}

/// The interrupt of that host, if it has one.
pub(crate) fn gsi() -> Option<u32> {
    #[cfg(kvmmem_selftest)]
    return Some(u32::from(*parameters::force_gsi.value_ref())).filter(|gsi| *gsi != 0);
    #[cfg(not(kvmmem_selftest))]
    None
}

pub(crate) fn has_windows() -> bool {
    #[cfg(kvmmem_selftest)]
    return parameters::force_window.value();
    #[cfg(not(kvmmem_selftest))]
    false
}

/// The page that stands in for the host's answer: the request's first byte is its number.
pub(crate) fn descriptor(_request: &[u8]) -> Option<u64> {
    #[cfg(kvmmem_selftest)]
    if *parameters::test_descriptor.value_ref() != 0 {
        let number = u64::from(*_request.first()?);
        return Some(parameters::test_descriptor.value() + number * PAGE_SIZE);
    }
    None
}

pub(crate) fn ioctl(_cmd: u32, _arg: usize) -> Result {
    #[cfg(kvmmem_selftest)]
    if _cmd == FAIL_MAPPINGS {
        SUCCESSES.store(_arg as i64 >> 16, Relaxed);
        FAILURES.store(_arg as i64 & 0xffff, Relaxed);
        return Ok(());
    }
    Err(ENOTTY)
}

/// `ENOMEM`, as often as was asked for.
pub(crate) fn map_memory() -> Result {
    #[cfg(kvmmem_selftest)]
    {
        if SUCCESSES.load(Relaxed) > 0 && SUCCESSES.fetch_add(-1, Relaxed) > 0 {
            return Ok(());
        }
        if FAILURES.load(Relaxed) > 0 && FAILURES.fetch_add(-1, Relaxed) > 0 {
            return Err(ENOMEM);
        }
    }
    Ok(())
}
