// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker as [`TokenSource`]: tokens are redeemed over the machine's connection to it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use kvmmem_abi::errno::KvmError;
use kvmmem_client::ClientError;
use kvmmem_client::vmm::{
    self, Caller, RedeemError, Region, Registration, Target, Token, ViewCounters, VmIdentity,
    VmmLink,
};
use kvmmem_proto::map::MemoryMap;
use kvmmem_sys::ram::GuestRam;
use uuid::Uuid;

use super::source::{PageGrant, TargetEvents, TargetMemory, TokenSource, ViewGrant};
use crate::config::VmConfig;

/// Registers the machine with the broker at `socket`; it stays registered until the link is
/// dropped.
///
/// An introspectable machine hands out `fd`, the file of `ram`.
pub(crate) fn register(
    config: &VmConfig,
    socket: &Path,
    ram: &GuestRam,
    fd: Option<OwnedFd>,
) -> Result<VmmLink, ClientError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let identity = VmIdentity {
        name: config.name.clone(),
        uuid: Uuid::from_bytes(config.uuid),
        vcpus: config.vcpus.into(),
        start_time_ms: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
        cid: config.cid,
        introspectable: config.introspectable,
        introspector: config.introspector,
    };
    let regions = if config.introspectable { regions(ram) } else { Vec::new() };
    let registration = Registration { identity, vcpu_questions: config.introspectable, regions };
    VmmLink::connect(socket, registration, fd)
}

/// The memory map of `ram`, as the broker has it.
pub(crate) fn regions(ram: &GuestRam) -> Vec<Region> {
    ram.regions()
        .into_iter()
        .map(|region| Region { gpa: region.gpa, len: region.len, offset: region.gpa, file: 0 })
        .collect()
}

impl TokenSource for VmmLink {
    fn redeem(&self, token: &Token) -> Result<PageGrant, KvmError> {
        let redeemed = VmmLink::redeem(self, token).map_err(number)?;
        Ok(PageGrant { grant: redeemed.grant, target: redeemed.target, scope: redeemed.scope })
    }

    fn claim(&self, token: &Token) -> Option<PageGrant> {
        let redeemed = VmmLink::claim(self, token)?;
        Some(PageGrant { grant: redeemed.grant, target: redeemed.target, scope: redeemed.scope })
    }

    fn connection(&self) -> u64 {
        VmmLink::connection(self)
    }

    fn is_revoked(&self, grant: u64) -> bool {
        VmmLink::is_revoked(self, grant)
    }

    fn attach(
        &self,
        token: &Token,
        caller: &Caller,
        read_only: bool,
    ) -> Result<ViewGrant, KvmError> {
        let vmm::ViewGrant { view, grant, target, scope } =
            VmmLink::attach(self, token, caller, read_only).map_err(number)?;
        Ok(ViewGrant { view, grant, target, scope })
    }

    fn current(&self, view: u64) -> Option<Arc<dyn TargetMemory>> {
        VmmLink::current(self, view).map(|target| -> Arc<dyn TargetMemory> { target })
    }

    fn detached(&self, view: u64, counters: ViewCounters) {
        VmmLink::detached(self, view, counters);
    }

    fn counters(&self, view: u64, counters: ViewCounters) {
        VmmLink::counters(self, view, counters);
    }

    fn set_events(&self, handler: Weak<dyn TargetEvents>) {
        VmmLink::set_events(self, handler);
    }
}

fn number(error: RedeemError) -> KvmError {
    match error {
        RedeemError::Unknown => KvmError::NoEnt,
        RedeemError::Unavailable | RedeemError::NoDescriptors => KvmError::Again,
        RedeemError::Denied => KvmError::Perm,
        RedeemError::Private => KvmError::OpNotSupp,
    }
}

impl TargetMemory for Target {
    fn id(&self) -> u64 {
        Target::id(self)
    }

    fn uuid(&self) -> [u8; 16] {
        Target::uuid(self).into_bytes()
    }

    fn generation(&self) -> u64 {
        Target::generation(self)
    }

    fn file(&self, index: u32) -> Option<BorrowedFd<'_>> {
        Target::file(self, index)
    }

    fn map(&self) -> &MemoryMap {
        Target::map(self)
    }
}
