// SPDX-License-Identifier: GPL-2.0-only
//! Reboot notifier. C header: `include/linux/reboot.h`.

use core::ffi::{c_int, c_void};

use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::types::Opaque;

// The kernel's own, which `bindings` lacks.
#[allow(improper_ctypes)]
extern "C" {
    fn register_reboot_notifier(block: *mut bindings::notifier_block) -> c_int;
    fn unregister_reboot_notifier(block: *mut bindings::notifier_block) -> c_int;
}

#[repr(C)]
struct Block {
    // First, so that a pointer to the notifier is a pointer to the block.
    notifier: Opaque<bindings::notifier_block>,
    call: fn(),
}

/// Has a function called when the machine goes down or starts another kernel. Not any more once
/// dropped.
///
/// # Invariants
///
/// The block is registered.
pub(crate) struct RebootHook(KBox<Block>);

// SAFETY: the notifier is reached by the kernel's chain only, under the chain's lock; the function
// pointer is never written.
unsafe impl Send for RebootHook {}
// SAFETY: a shared reference gives no access to the notifier.
unsafe impl Sync for RebootHook {}

impl RebootHook {
    pub(crate) fn register(call: fn()) -> Result<Self> {
        let notifier = Opaque::new(bindings::notifier_block {
            notifier_call: Some(on_reboot),
            ..pin_init::zeroed()
        });
        let block = KBox::new(Block { notifier, call }, GFP_KERNEL)?;
        // SAFETY: the block is on the heap and stays there until `drop` has taken it off the chain.
        to_result(unsafe { register_reboot_notifier(block.notifier.get()) })?;
        // INVARIANT: just registered.
        Ok(Self(block))
    }
}

impl Drop for RebootHook {
    fn drop(&mut self) {
        // SAFETY: registered by the invariant. On return the chain does not call it, and no call is
        // under way: the chain's lock is held for writing while the block is taken off.
        unsafe { unregister_reboot_notifier(self.0.notifier.get()) };
    }
}

/// # Safety
///
/// `notifier` is that of a registered [`Block`].
unsafe extern "C" fn on_reboot(
    notifier: *mut bindings::notifier_block,
    _action: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: by the function's contract `notifier` is a registered block's first field, which
    // stays until it is taken off the chain; `call` is read only.
    let call = unsafe { (*notifier.cast::<Block>()).call };
    call();
    // NOTIFY_DONE.
    0
}
