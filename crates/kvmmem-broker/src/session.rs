// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a tool sees of a target over KVMI.

use std::sync::Weak;

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::dispatch::TargetVm;
use kvmmem_kvmi::reply::PhysicalSlot;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::map::PAGE_SIZE;

use crate::broker::Broker;
use crate::hook::{Hook, Owner};
use crate::introspector::list::Introspectors;
use crate::ram::AccessError;
use crate::registry::Vm;

/// What a tool sees of a target.
pub(crate) struct Session<'a> {
    pub(crate) broker: &'a Broker,
    pub(crate) introspectors: &'a Weak<Introspectors>,
    pub(crate) vm: &'a Vm,
    pub(crate) hook: &'a Hook,
}

impl TargetVm for Session<'_> {
    fn name(&self) -> &str {
        &self.vm.identity().name
    }

    fn uuid(&self) -> [u8; 16] {
        self.vm.identity().uuid.into_bytes()
    }

    fn start_time_ms(&self) -> i64 {
        self.vm.identity().start_time_ms
    }

    fn vcpu_count(&self) -> u32 {
        self.vm.identity().vcpus
    }

    fn max_gfn(&self) -> u64 {
        self.vm.ram().map_or(0, |ram| ram.layout().map.end_gfn())
    }

    fn slot(&self, gfn: u64) -> Result<PhysicalSlot, KvmError> {
        let layout = self.vm.ram().ok_or(KvmError::Inval)?.layout();
        let gpa = gfn.checked_mul(PAGE_SIZE).ok_or(KvmError::Inval)?;
        let region = layout.map.region_of(gpa).ok_or(KvmError::Inval)?;
        Ok(PhysicalSlot {
            gfn: (region.gpa / PAGE_SIZE).into(),
            pages: (region.len / PAGE_SIZE).into(),
        })
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), KvmError> {
        let ram = self.vm.ram().ok_or(KvmError::Inval)?;
        ram.read(gpa, buffer).map_err(|error| code(&error))
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), KvmError> {
        let ram = self.vm.ram().ok_or(KvmError::Inval)?;
        ram.write(gpa, data).map_err(|error| code(&error))
    }

    fn mint_token(&self) -> Result<Token, KvmError> {
        if self.hook.is_stopped() {
            return Err(KvmError::Perm);
        }
        let (endpoint, owner) = (self.hook.endpoint(), self.hook.owner());
        let introspectors = self.introspectors.upgrade();
        if let Owner::Vm(tool) = owner
            && let Some(introspector) = introspectors.and_then(|all| all.get(tool))
        {
            return introspector.mint(self.vm, endpoint);
        }
        self.broker.mint(self.broker.now(), self.vm, endpoint, owner)
    }
}

/// KVMI's number for an access that failed.
fn code(error: &AccessError) -> KvmError {
    match error {
        AccessError::Hole(_) => KvmError::Inval,
        AccessError::System { .. } => KvmError::Fault,
    }
}
