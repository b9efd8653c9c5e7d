// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dispatcher: carries decoded hypercalls out.

use std::sync::Arc;
use std::task::Poll;

use kvm_ioctls::VcpuFd;
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{UNMAP_ALL_KEEP, UNMAP_ALL_ZERO};
use vm_memory::GuestMemoryMmap;

use super::codec::Hypercall;
use super::deferred::DeferredRequests;
use super::memory::VirtualMemory;
use super::view::{self, AttachKey};
use crate::introspect::source::{PageGrant, Token, TokenSource, ViewGrant};
use crate::introspect::v1::{MapError, MappingEngine};
use crate::introspect::window::Windows;
use crate::limit::warn_limited;
use crate::machine::registers;
use crate::machine::rendezvous::Rendezvous;
use crate::status::ActiveMethod;

/// What an introspector's vCPUs share to serve hypercalls.
pub(crate) struct Hypercalls {
    method: ActiveMethod,
    engine: Arc<MappingEngine>,
    tokens: Option<Arc<dyn TokenSource>>,
    windows: Option<Arc<Windows>>,
    memory: GuestMemoryMmap,
    rendezvous: Arc<Rendezvous>,
    redeemed: DeferredRequests<RedeemKey, PageGrant>,
    attached: DeferredRequests<AttachKey, ViewGrant>,
}

/// Key of a MAP that waits for the broker.
#[derive(PartialEq)]
struct RedeemKey {
    call: Hypercall,
    token: Token,
    connection: u64,
}

impl Hypercalls {
    pub(crate) fn new(
        method: ActiveMethod,
        engine: Arc<MappingEngine>,
        tokens: Option<Arc<dyn TokenSource>>,
        windows: Option<Arc<Windows>>,
        memory: GuestMemoryMmap,
        rendezvous: Arc<Rendezvous>,
    ) -> Self {
        let (redeemed, attached) = (DeferredRequests::new(), DeferredRequests::new());
        Self { method, engine, tokens, windows, memory, rendezvous, redeemed, attached }
    }

    /// How hypercalls reach this VMM.
    pub(super) fn method(&self) -> ActiveMethod {
        self.method
    }

    /// Counts a guest's write to read-only memory at `gpa`; false if no window is there.
    pub(super) fn refuse_write(&self, gpa: u64) -> bool {
        self.windows.as_ref().is_some_and(|windows| windows.refuse_write(gpa))
    }

    /// Carries out a hypercall of `vcpu`, number `id`, made at privilege level `cpl`; the result is
    /// 0 or a negative `KVM_Exxx`. One that is pending is to be made again.
    pub(super) fn serve(&self, id: u8, vcpu: &VcpuFd, cpl: u8, call: Hypercall) -> Poll<i64> {
        let done =
            if cpl == 0 { self.dispatch(id, vcpu, call) } else { Poll::Ready(Err(KvmError::Perm)) };
        done.map(|done| match done {
            Ok(()) => 0,
            Err(error) => -i64::from(error.number()),
        })
    }

    fn dispatch(&self, id: u8, vcpu: &VcpuFd, call: Hypercall) -> Poll<Result<(), KvmError>> {
        let translate = |gva| self.translate(id, vcpu, gva);
        let memory = VirtualMemory { translate, memory: &self.memory };
        let done = match call {
            Hypercall::MemMap { token_gva, target_gpa, own_gpa } => {
                let tokens = self.tokens.as_ref();
                let redeem = || {
                    let tokens = tokens.ok_or(MapError::Token(KvmError::OpNotSupp))?;
                    self.redeem(tokens, call, memory.token(token_gva).map_err(MapError::Token)?)
                };
                let is_revoked = |grant| tokens.is_none_or(|tokens| tokens.is_revoked(grant));
                self.engine.map(own_gpa, target_gpa, redeem, is_revoked)
            }
            Hypercall::MemUnmap { own_gpa } => self.engine.unmap(own_gpa),
            Hypercall::UnmapAll { content: UNMAP_ALL_ZERO } => self.engine.unmap_all(),
            Hypercall::UnmapAll { content: UNMAP_ALL_KEEP } => {
                // What another vCPU writes meanwhile would be lost.
                let paused = self.rendezvous.pause();
                if let Err(error) = &paused {
                    warn_limited!(%error, "pages are given back while the guest runs");
                }
                self.engine.unmap_all_keeping()
            }
            Hypercall::UnmapAll { .. } => return Poll::Ready(Err(KvmError::Inval)),
            Hypercall::Attach { request_gva, result_gva } => {
                let (windows, tokens) =
                    (self.windows()?, self.tokens.as_ref().ok_or(KvmError::OpNotSupp)?);
                return view::attach(windows, &memory, (request_gva, result_gva), |opening| {
                    view::open(&self.attached, tokens, opening)
                });
            }
            Hypercall::Detach { descriptor_gpa } => {
                return Poll::Ready(view::detach(self.windows()?, descriptor_gpa));
            }
            Hypercall::Seek { descriptor_gpa, position_gva, what } => {
                return view::seek(self.windows()?, &memory, descriptor_gpa, position_gva, what);
            }
            Hypercall::Unknown { number } => {
                warn_limited!(number = format_args!("{number:#x}"), "unknown hypercall refused");
                return Poll::Ready(Err(KvmError::NoSys));
            }
        };
        if matches!(done, Err(MapError::Pending)) {
            return Poll::Pending;
        }
        Poll::Ready(done.map_err(|error| {
            let number = error.number();
            match error {
                MapError::Host(source) => warn_limited!(
                    error = &source as &dyn std::error::Error,
                    "the host refused a hypercall's mapping"
                ),
                error => warn_limited!(%error, "hypercall refused"),
            }
            number
        }))
    }

    /// Uses a token up for the page that `call` names.
    fn redeem(
        &self,
        tokens: &Arc<dyn TokenSource>,
        call: Hypercall,
        token: Token,
    ) -> Result<PageGrant, MapError> {
        if let Some(redeemed) = tokens.claim(&token) {
            return Ok(redeemed);
        }
        let (tokens, connection) = (tokens.clone(), tokens.connection());
        let key = RedeemKey { call, token: token.clone(), connection };
        // What was redeemed for nothing holds nothing at the broker.
        match self.redeemed.fetch(key, move || tokens.redeem(&token), drop) {
            Poll::Ready(redeemed) => redeemed.map_err(MapError::Token),
            Poll::Pending => Err(MapError::Pending),
        }
    }

    /// The GPA behind a guest-virtual address, as the vCPU's page tables have it. These may be in a
    /// window, so that this counts as entering the guest; no lock is held.
    fn translate(&self, id: u8, vcpu: &VcpuFd, gva: u64) -> Option<u64> {
        let inside = self.rendezvous.enter(id, || registers::read(vcpu).ok());
        let found = vcpu.translate_gva(gva);
        drop(inside);
        found.ok().filter(|found| found.valid != 0).map(|found| found.physical_address)
    }

    fn windows(&self) -> Result<&Windows, KvmError> {
        self.windows.as_deref().ok_or(KvmError::OpNotSupp)
    }
}
