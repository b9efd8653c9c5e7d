// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypercalls of an introspector: decoded ([`codec`]), their arguments fetched ([`memory`]),
//! carried out by the mapping engine and the windows ([`view`]). [`xen`] and [`port`] are the two
//! methods (`kvmmem_abi::hypercall`).
//!
//! vCPU threads call this at the exit. A call that waits for the broker is executed again until the
//! answer has arrived ([`deferred`], [`again`]): the guest sees one long call, and serves
//! interrupts during it.
//!
//! | result | when |
//! |---|---|
//! | 0 | done |
//! | `-KVM_EPERM` | the caller was not at CPL 0; the broker does not let this machine map; MAP: the grant is read-only; SEEK: the view has ended |
//! | `-KVM_EINVAL` | own GPA not the start of a page of RAM; target GPA unaligned; the target is this machine; unknown flags; SEEK: no view, or nothing to look for |
//! | `-KVM_EBUSY` | MAP: own page mapped already, or by another vCPU at this moment |
//! | `-KVM_ENOENT` | token unknown, used or expired; UNMAP: own page not mapped; DETACH: no view; SEEK: nothing found |
//! | `-KVM_EFAULT` | an argument's address is not mapped to RAM; MAP: target GPA in a hole or outside of the grant |
//! | `-KVM_ENOMEM` | as many pages mapped as `vm.max_map_count` allows; ATTACH: no view, range or place left |
//! | `-KVM_EAGAIN` | the broker cannot be asked now; the host's kernel refused, and all is as it was |
//! | `-KVM_EOPNOTSUPP` | the machine has no broker; ATTACH, DETACH, SEEK: it has no windows |
//! | `-KVM_ENOSYS` | unknown number |
//!
//! The order of checks keeps a token unused if the call cannot work. Only two checks follow the
//! redemption, since they need the target: its holes and its identity.

mod codec;
mod deferred;
mod exits;
mod memory;
mod port;
mod serve;
mod view;
mod xen;

pub(crate) use serve::Hypercalls;
