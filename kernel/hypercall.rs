// SPDX-License-Identifier: GPL-2.0-only
//! Hypercalls: which method CPUID offers, and the error that a tool gets for the host's answer.
//!
//! `choose` runs once, when the module is loaded. After that every file that calls the host asks
//! [`method`], and every file that serves views asks [`transport`].

use kernel::prelude::*;
use kernel::sync::SetOnce;

use crate::abi::cpuid::{FEATURE_WINDOW, LEAF_SIGNATURE};
use crate::abi::errno::KvmError;
use crate::sys::call::{Method, Offer, PagesRestored};
use crate::sys::pci;
use crate::{knobs, stats};

static METHOD: SetOnce<Method> = SetOnce::new();

/// Set if the host restored the pages that an earlier kernel of this machine had replaced.
static RESTORED: SetOnce<PagesRestored> = SetOnce::new();

/// How the memory of a view's target gets into this machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// In a window that the host opens by hypercall.
    Windows,
    /// In PCI devices that the VMM plugs in. There are no hypercalls.
    Devices,
    /// Not at all: the host serves v1's hypercalls only.
    None,
}

static TRANSPORT: SetOnce<Transport> = SetOnce::new();

static GSI: SetOnce<u32> = SetOnce::new();

/// The interrupt that the host raises when views' descriptors have changed, if it has one.
pub(crate) fn gsi() -> Option<u32> {
    GSI.copy()
}

/// The method chosen when the module was loaded; `EOPNOTSUPP` if the host has none.
pub(crate) fn method() -> Result<Method> {
    METHOD.copy().ok_or(EOPNOTSUPP)
}

/// The transport of views, as found when the module was loaded.
pub(crate) fn transport() -> Transport {
    TRANSPORT.copy().unwrap_or(Transport::Devices)
}

/// Chooses the method that CPUID offers, `vmcall` first. Without hypercalls there may be devices:
/// `ENODEV` without a PCI bus.
pub(crate) fn choose() -> Result {
    let offered = match knobs::method() {
        Some(method) => Some((method, 0, knobs::gsi())),
        None => offered()?,
    };
    let Some((method, features, gsi)) = offered else {
        TRANSPORT.populate(Transport::Devices);
        pr_info!("this host serves no hypercalls (v1); it may show views as PCI devices\n");
        return Ok(());
    };
    let has_window = knobs::has_windows() || features & FEATURE_WINDOW != 0;
    let (transport, what) = if has_window {
        (Transport::Windows, "v1 and views")
    } else {
        (Transport::None, "v1 only, no views")
    };
    pr_info!("the host is called by {method} and offers {what}\n");
    METHOD.populate(method);
    if let Some(gsi) = gsi {
        GSI.populate(gsi);
    }
    TRANSPORT.populate(transport);
    // A kernel before this one may have left pages replaced: started by kexec, this one takes them
    // for ordinary RAM.
    match method.keep_all().map_err(error) {
        Ok(restored) => {
            RESTORED.populate(restored);
        }
        // A host of version 0.1.0 does not know the call.
        Err(EOPNOTSUPP) => {}
        Err(answer) => {
            pr_warn!(
                "the host did not give back pages that were replaced before: {}\n",
                answer.to_errno()
            );
        }
    }
    Ok(())
}

/// Has the host restore all replaced pages, also those whose undo it refused before.
pub(crate) fn close_pages() {
    let Ok(method) = method() else { return };
    let count = stats::MAPPED.value() + stats::QUARANTINED.value();
    let answer = match RESTORED.as_ref() {
        Some(restored) => restored.zero_all(),
        None => method.keep_all().map(drop),
    };
    match answer.map_err(error) {
        Ok(()) if count > 0 => pr_notice!("the host gave {count} pages back before the reboot\n"),
        Err(error) if count > 0 => {
            pr_err!(
                "{count} pages show targets' memory across the reboot: {}\n",
                error.to_errno()
            );
        }
        _ => {}
    }
}

/// The method, the feature bits and the GSI; `None` if there is only a PCI bus.
fn offered() -> Result<Option<(Method, u32, Option<u32>)>> {
    let Some(offer) = Offer::read() else {
        if pci::has_bus() {
            return Ok(None);
        }
        pr_err!(
            "this machine's host does not serve kvmmem: CPUID leaf {:#x} has no KVMMEMKVMMEM signature, and there is no PCI bus\n",
            LEAF_SIGNATURE
        );
        return Err(ENODEV);
    };
    let Offer {
        features,
        port,
        method,
        gsi,
    } = offer;
    if method.is_none() {
        pr_err!(
            "the host offers neither vmcall nor a doorbell port (features {features:#x}, port {port:#x})\n"
        );
    }
    Ok(Some((method.ok_or(ENODEV)?, features, gsi)))
}

/// The error that a tool gets for the host's `answer`, which is not 0: EIO unless it is one of
/// KVM's errors.
pub(crate) fn error(answer: i64) -> Error {
    KvmError::from_result(answer).map_or(EIO, |error| Error::from_errno(-error.errno()))
}
