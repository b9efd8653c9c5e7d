// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Introspector's side of a machine: pages of v1, views, and the source of tokens. One for all
//! generations of the machine.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use kvmmem_abi::cpuid::DESCRIPTOR_GSI;
use kvmmem_sys::ram::GuestRam;

use super::hypercall::Hypercalls;
use super::source::{TargetEvents, TokenSource, identity};
use super::v1::{MapError, MappingEngine};
use super::views::Views;
use super::window::{Host, Windows};
use crate::config::{HypercallMethod, VmConfig};
use crate::machine::introspector::{Hardware, Introspector, IntrospectorExits};
use crate::machine::platform::{can_window, interrupt_line, zap_single_slots};
use crate::machine::stop::{Failure, StopHandle};
use crate::status::ActiveMethod;

/// What an introspector keeps over resets.
pub(crate) struct Introspection {
    method: ActiveMethod,
    ram: Arc<GuestRam>,
    engine: Arc<MappingEngine>,
    tokens: Option<Arc<dyn TokenSource>>,
    /// Gets the events of the machine's grants.
    views: Arc<Views>,
    has_windows: bool,
}

/// This host cannot forward hypercalls.
#[derive(Debug, thiserror::Error)]
#[error(
    "the host's KVM cannot forward hypercalls (no KVM_CAP_XEN_HVM with INTERCEPT_HCALL); use method port"
)]
pub struct NoXen;

impl Introspection {
    /// An introspector with `ram`, of which at most `limit` pages are replaced, and with these
    /// tokens.
    ///
    /// # Errors
    /// [`NoXen`], or what the host reports when the RAM's file cannot be examined.
    pub(crate) fn new(
        config: &VmConfig,
        kvm: &Kvm,
        ram: &Arc<GuestRam>,
        limit: usize,
        tokens: Option<Arc<dyn TokenSource>>,
        stop: StopHandle,
    ) -> Result<Self, Failure> {
        let method = choose_method(config.hypercalls, kvm)?;
        let engine = Arc::new(MappingEngine::new(ram.clone(), limit)?);
        let views = Arc::new(Views::new(engine.clone(), stop));
        if let Some(tokens) = &tokens {
            let handler: Arc<dyn TargetEvents> = views.clone();
            tokens.set_events(Arc::downgrade(&handler));
        }
        let has_windows = config.window && tokens.is_some() && can_window(kvm);
        Ok(Self { method, ram: ram.clone(), engine, tokens, views, has_windows })
    }

    /// Undoes all mappings and closes all views. No vCPU and no device runs.
    ///
    /// # Errors
    /// [`MapError`]: the machine must not run on.
    pub(crate) fn reset(&self) -> Result<(), MapError> {
        self.views.set_windows(None);
        self.engine.unmap_all()
    }

    /// The windows of a generation.
    fn windows(&self, hardware: Hardware) -> Result<Option<Arc<Windows>>, Failure> {
        let Some(source) = self.tokens.clone().filter(|_| self.has_windows) else {
            return Ok(None);
        };
        zap_single_slots(&hardware.vm);
        let ram_end = self.ram.regions().last().map_or(0, |region| region.gpa + region.len);
        let own_file = identity(self.ram.fd())?;
        let interrupt = interrupt_line(&hardware.vm, DESCRIPTOR_GSI)?;
        let host = Host { hardware, source, own_file, ram_end, interrupt };
        let windows = Arc::new(Windows::new(host)?);
        self.views.set_windows(Some(windows.clone()));
        Ok(Some(windows))
    }
}

impl Introspector for Introspection {
    fn method(&self) -> ActiveMethod {
        self.method
    }

    fn has_windows(&self) -> bool {
        self.has_windows
    }

    fn start(&self, hardware: Hardware) -> Result<Arc<dyn IntrospectorExits>, Failure> {
        let rendezvous = hardware.rendezvous.clone();
        let windows = self.windows(hardware)?;
        Ok(Arc::new(Hypercalls::new(
            self.method,
            self.engine.clone(),
            self.tokens.clone(),
            windows,
            self.ram.memory().clone(),
            rendezvous,
        )))
    }
}

impl Drop for Introspection {
    fn drop(&mut self) {
        self.views.set_windows(None);
    }
}

fn choose_method(wanted: HypercallMethod, kvm: &Kvm) -> Result<ActiveMethod, NoXen> {
    let can_intercept = kvmmem_sys::xen::can_intercept(kvm);
    match wanted {
        HypercallMethod::Port => Ok(ActiveMethod::Port),
        HypercallMethod::Xen | HypercallMethod::Auto if can_intercept => Ok(ActiveMethod::Xen),
        HypercallMethod::Xen => Err(NoXen),
        HypercallMethod::Auto => Ok(ActiveMethod::Port),
    }
}
