// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Targets whose VMM does not register them: an operator adds them, and the broker follows their
//! process.
//!
//! `kvmmem-qemu` finds and opens their RAM; the modules here register it, follow resets and changes
//! of RAM over QMP, and notice the VMM's end.

mod lifecycle;
mod listening;
mod register;
pub(crate) mod watch;
