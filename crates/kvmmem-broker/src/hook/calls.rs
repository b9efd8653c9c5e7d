// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What operators ask for: hooks made and undone.

use std::sync::Arc;

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{Answer, Refusal};

use super::count::HookSlot;
use super::{Hook, Owner, driver};
use crate::audit::Event;
use crate::core::call_error::CallError;
use crate::core::vms::FIRST_CID;
use crate::service::Service;

impl Service {
    /// Connects a target to a tool, for as long as both last.
    ///
    /// # Errors
    /// Where there is no such target or no such VM of a tool, the target has the hook already, or
    /// there are too many.
    pub(crate) fn hook(
        &self,
        peer: Credentials,
        target: &str,
        endpoint: Endpoint,
    ) -> Result<Answer, CallError> {
        let vm = self.broker().find(target)?;
        if !vm.identity().introspectable {
            return Err(CallError::new(
                Refusal::Denied,
                format!("{target:?} is not introspectable"),
            ));
        }
        let owner = self.owner_of(&endpoint, peer)?;
        let counted = HookSlot::new(self.broker(), peer)?;
        let hook = vm.hooks().add(endpoint.clone(), owner)?;
        let made = Event::Hook { vm: &vm, endpoint: &endpoint, on: true, by: peer };
        self.broker().audit().write(made);
        // The end of a VM is marked before the hooks to it are undone: one that was added since is
        // undone here.
        if let Owner::Vm(tool) = owner
            && self.broker().vm(tool).is_none()
        {
            self.broker().end_hooks(&vm, tool);
            return Err(CallError::new(Refusal::Unknown, "the tool's VM has just ended"));
        }
        let started = driver::start(
            self.broker(),
            self.introspectors(),
            (self.reactor(), self.sessions()),
            &vm,
            Arc::clone(&hook),
            counted,
        );
        if let Err(error) = started {
            let is_this = |other: &Arc<Hook>| Arc::ptr_eq(other, &hook);
            self.broker().end_hooks_for(&vm, is_this, "it could not be started");
            return Err(CallError::new(Refusal::Limit, format!("cannot start the hook: {error}")));
        }
        Ok(Answer::Done)
    }

    /// Whose the tool at an endpoint is.
    fn owner_of(&self, endpoint: &Endpoint, asker: Credentials) -> Result<Owner, CallError> {
        match endpoint {
            Endpoint::Unix(_) => Ok(Owner::Host(asker)),
            Endpoint::Vsock { cid, .. } if *cid < FIRST_CID => {
                let message = format!(
                    "vsock context id {cid} is the host's; a tool on the host listens at a unix socket, unix:PATH"
                );
                Err(CallError::new(Refusal::Invalid, message))
            }
            Endpoint::Vsock { cid, .. } => {
                let vm = self.broker().vm_with_cid(*cid);
                let unknown = || {
                    let message = format!(
                        "no VM with vsock context id {cid} is registered; start it, or add it with `kvmmem \
                         introspector add`, and hook it then"
                    );
                    CallError::new(Refusal::Unknown, message)
                };
                vm.map(|vm| Owner::Vm(vm.id())).ok_or_else(unknown)
            }
        }
    }

    /// Undoes a hook. With the last one to an introspector under a stock QEMU, what tools there
    /// have mapped of the target ends.
    pub(crate) fn unhook(
        &self,
        peer: Credentials,
        target: &str,
        endpoint: &Endpoint,
    ) -> Result<Answer, CallError> {
        let vm = self.broker().find(target)?;
        let owner = vm.hooks().remove(endpoint)?;
        self.broker().audit().write(Event::Hook { vm: &vm, endpoint, on: false, by: peer });
        if let Owner::Vm(tool) = owner
            && let Some(introspector) = self.introspectors().get(tool)
        {
            introspector.unhooked(&vm, peer);
        }
        Ok(Answer::Done)
    }

    /// Makes a token as a hook of a target gets it whose tool is in VM `tool`, or on the host.
    ///
    /// # Errors
    /// As where a tool asks for one.
    pub fn mint_token(&self, target: u64, tool: Option<u64>) -> Result<Token, KvmError> {
        let introspector = tool.and_then(|tool| self.introspectors().get(tool));
        match introspector.zip(self.broker().vm(target)) {
            Some((introspector, vm)) => introspector.mint(&vm, &Endpoint::Unix("tool".into())),
            None => self.broker().mint_token(target, tool),
        }
    }
}
