// SPDX-License-Identifier: GPL-2.0-only
//! Notifiers of the machine's going down and of its sleep. C headers: `include/linux/reboot.h`,
//! `include/linux/suspend.h`.

use core::ffi::{c_int, c_void};

use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::types::Opaque;

// The block is opaque there: only a pointer passes.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_register_reboot_notifier(block: *mut bindings::notifier_block) -> c_int;
    fn kvmmem_unregister_reboot_notifier(block: *mut bindings::notifier_block) -> c_int;
    fn kvmmem_register_pm_notifier(block: *mut bindings::notifier_block) -> c_int;
    fn kvmmem_unregister_pm_notifier(block: *mut bindings::notifier_block) -> c_int;
}

/// What happens to the machine.
#[derive(Clone, Copy)]
pub(crate) enum Event {
    /// It goes down, or starts another kernel.
    Down,
    /// It is about to sleep (suspend, hibernation), or to become the machine of an image. An error
    /// keeps it from that.
    Sleep,
    /// It is awake, or did not come to sleep.
    Awake,
}

type Call = fn(Event) -> Result;

#[repr(C)]
struct Block {
    // First, so that a pointer to the notifier is a pointer to the block.
    notifier: Opaque<bindings::notifier_block>,
    call: Call,
}

type Notify = unsafe extern "C" fn(*mut bindings::notifier_block, usize, *mut c_void) -> c_int;

impl Block {
    fn new(notify: Notify, call: Call) -> Result<KBox<Self>> {
        let notifier = Opaque::new(bindings::notifier_block {
            notifier_call: Some(notify),
            ..pin_init::zeroed()
        });
        Ok(KBox::new(Self { notifier, call }, GFP_KERNEL)?)
    }
}

/// Has a function called at each [`Event`]. Not any more once dropped.
///
/// # Invariants
///
/// The first block is on the chain of reboots, the second one on that of sleep.
pub(crate) struct PowerHook(KBox<Block>, KBox<Block>);

// SAFETY: the notifiers are reached by the kernel's chains only, under the chains' locks; the
// function pointers are never written.
unsafe impl Send for PowerHook {}
// SAFETY: a shared reference gives no access to the notifiers.
unsafe impl Sync for PowerHook {}

impl PowerHook {
    pub(crate) fn register(call: Call) -> Result<Self> {
        let down = Block::new(on_reboot, call)?;
        let sleep = Block::new(on_sleep, call)?;
        // SAFETY: the block is on the heap and stays there until it is taken off the chain, here or
        // by `drop`.
        to_result(unsafe { kvmmem_register_reboot_notifier(down.notifier.get()) })?;
        // SAFETY: the block is on the heap and stays there until `drop` takes it off the chain.
        let result = to_result(unsafe { kvmmem_register_pm_notifier(sleep.notifier.get()) });
        if result.is_err() {
            // SAFETY: just registered. On return the chain does not call it.
            unsafe { kvmmem_unregister_reboot_notifier(down.notifier.get()) };
        }
        // INVARIANT: just registered, unless an error leaves.
        result.map(|()| Self(down, sleep))
    }
}

impl Drop for PowerHook {
    fn drop(&mut self) {
        // SAFETY: registered by the invariant. On return the chains do not call them, and no call
        // is under way: a chain's lock is held for writing while a block is taken off.
        unsafe {
            kvmmem_unregister_pm_notifier(self.1.notifier.get());
            kvmmem_unregister_reboot_notifier(self.0.notifier.get());
        }
    }
}

/// # Safety
///
/// `notifier` is that of a registered [`Block`].
unsafe fn call(notifier: *mut bindings::notifier_block, event: Event) -> Result {
    // SAFETY: by the function's contract `notifier` is a registered block's first field, which
    // stays until it is taken off the chain; `call` is read only.
    let call = unsafe { (*notifier.cast::<Block>()).call };
    call(event)
}

/// # Safety
///
/// `notifier` is that of a registered [`Block`].
unsafe extern "C" fn on_reboot(
    notifier: *mut bindings::notifier_block,
    _action: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: by the function's contract, which is that of `call` too.
    let _ = unsafe { call(notifier, Event::Down) };
    // NOTIFY_DONE.
    0
}

/// # Safety
///
/// `notifier` is that of a registered [`Block`].
unsafe extern "C" fn on_sleep(
    notifier: *mut bindings::notifier_block,
    action: usize,
    _data: *mut c_void,
) -> c_int {
    // PM_HIBERNATION_PREPARE, PM_SUSPEND_PREPARE and PM_RESTORE_PREPARE are odd; what follows each
    // when it is over is the next number.
    let event = if action % 2 == 1 {
        Event::Sleep
    } else {
        Event::Awake
    };
    // SAFETY: by the function's contract, which is that of `call` too.
    match unsafe { call(notifier, event) } {
        // NOTIFY_DONE.
        Ok(()) => 0,
        // `notifier_from_errno()`.
        Err(error) => 0x8000 | (1 - error.to_errno()),
    }
}
