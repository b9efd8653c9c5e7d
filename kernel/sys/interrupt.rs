// SPDX-License-Identifier: GPL-2.0-only
//! Handler of an interrupt that is named by its GSI. C headers: `include/linux/acpi.h`,
//! `include/linux/interrupt.h`.

use core::ffi::{c_int, c_uint, c_void};
use core::ptr;

use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::{Arc, ArcBorrow};

/// What an interrupt calls. In hard interrupt context: it must not sleep.
pub(crate) trait Interrupted: Send + Sync {
    fn interrupted(this: ArcBorrow<'_, Self>);
}

/// Calls an object at each interrupt of a GSI, which is edge-triggered and shared. Not any more
/// once dropped.
///
/// # Invariants
///
/// The GSI is registered, `irq` is its number in this kernel, and the handler of `object` is
/// requested for it.
pub(crate) struct InterruptHandler<T: Interrupted> {
    gsi: u32,
    irq: c_uint,
    object: Arc<T>,
}

impl<T: Interrupted> InterruptHandler<T> {
    /// May sleep.
    pub(crate) fn request(gsi: u32, object: Arc<T>) -> Result<Self> {
        const ACPI_EDGE_SENSITIVE: c_int = 1;
        const ACPI_ACTIVE_HIGH: c_int = 0;
        // SAFETY: no device is needed; a GSI that the machine lacks is refused. The caller may
        // sleep.
        let irq = unsafe {
            bindings::acpi_register_gsi(ptr::null_mut(), gsi, ACPI_EDGE_SENSITIVE, ACPI_ACTIVE_HIGH)
        };
        let irq = c_uint::try_from(irq).map_err(|_| Error::from_errno(irq))?;
        // SAFETY: `on_interrupt` is for the object that is passed along. That stays alive until
        // `drop` has freed the handler, because the result holds a count.
        let requested = to_result(unsafe {
            bindings::request_irq(
                irq,
                Some(on_interrupt::<T>),
                bindings::IRQF_SHARED as usize,
                c"kvmmem".as_ptr().cast(),
                Arc::as_ptr(&object).cast_mut().cast(),
            )
        });
        if let Err(error) = requested {
            // SAFETY: registered above, and nothing uses it.
            unsafe { bindings::acpi_unregister_gsi(gsi) };
            return Err(error);
        }
        // INVARIANT: just registered and requested.
        Ok(Self { gsi, irq, object })
    }
}

impl<T: Interrupted> Drop for InterruptHandler<T> {
    fn drop(&mut self) {
        let object: *mut c_void = Arc::as_ptr(&self.object).cast_mut().cast();
        // SAFETY: requested for this object and registered, by the invariant. free_irq waits for
        // handlers under way, so none has the object afterwards.
        unsafe {
            bindings::free_irq(self.irq, object);
            bindings::acpi_unregister_gsi(self.gsi);
        }
    }
}

/// # Safety
///
/// `object` is that of an [`InterruptHandler<T>`] that is not dropped yet.
unsafe extern "C" fn on_interrupt<T: Interrupted>(
    _irq: c_int,
    object: *mut c_void,
) -> bindings::irqreturn_t {
    // SAFETY: by the function's contract the handler holds a count of the object, and its drop
    // waits for this call.
    T::interrupted(unsafe { ArcBorrow::from_raw(object.cast::<T>()) });
    // The line is edge-triggered and belongs to this module alone: each interrupt is for all
    // handlers.
    bindings::irqreturn::IRQ_HANDLED
}
