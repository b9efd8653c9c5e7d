// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's introspectors, as the guest endpoint sees them.

use std::sync::{Arc, Weak};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::guest::MappedBy;
use kvmmem_proto::message::{Caller, Refusal};

use super::serve::Views;
use crate::broker::Broker;
use crate::core::call_error::CallError;
use crate::introspector::list::Introspectors;
use crate::introspector::{Introspector, OpenView};
use crate::reactor::{self, Reactor};

/// The broker and its introspectors, as long as they live.
pub(crate) struct IntrospectorViews {
    pub(crate) broker: Weak<Broker>,
    pub(crate) introspectors: Weak<Introspectors>,
}

impl IntrospectorViews {
    /// The introspector with a vsock context id.
    fn of(&self, cid: u32) -> Result<Arc<Introspector>, CallError> {
        let both = self.broker.upgrade().zip(self.introspectors.upgrade());
        let (broker, introspectors) =
            both.ok_or_else(|| CallError::new(Refusal::Busy, "the broker ends"))?;
        introspectors.by_cid(cid).ok_or_else(|| unknown_peer(&broker, cid))
    }
}

impl Views for IntrospectorViews {
    type View = OpenView;

    fn may_ask(&self, cid: u32) -> Result<(), CallError> {
        self.of(cid).map(drop)
    }

    fn open(
        &self,
        cid: u32,
        token: &Token,
        caller: &Caller,
        read_only: bool,
        mapped_by: MappedBy,
    ) -> Result<OpenView, CallError> {
        // It may take seconds, and the broker need not wait for it to end.
        Ok(self.of(cid)?.open(token, caller, read_only, mapped_by)?)
    }

    fn number(view: &OpenView) -> u64 {
        view.view()
    }

    fn ticket(view: &OpenView) -> Token {
        view.ticket().clone()
    }

    fn tool_has_closed(view: &OpenView) {
        view.tool_has_closed();
    }

    fn has_ended(view: &OpenView) -> bool {
        view.ended()
    }

    fn wake_at_end(view: &OpenView, reactor: &Reactor, token: reactor::Token) {
        view.wake_at_end(reactor, token);
    }
}

/// Why a VM has no views here.
fn unknown_peer(broker: &Broker, cid: u32) -> CallError {
    let introspector = broker.vm_with_cid(cid).filter(|vm| vm.identity().introspector);
    let words = match introspector {
        Some(vm) => format!(
            "{:?} runs under kvmmem vm, whose views come by hypercall and not by this guest \
             endpoint: update the module kvmmem in it",
            vm.identity().name
        ),
        None => format!(
            "the VM with context id {cid} is not an introspector of this host; to make it one: kvmmem introspector add"
        ),
    };
    CallError::new(Refusal::Denied, words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::limits::Limits;

    #[test]
    fn an_unknown_peer_is_told_how_to_become_an_introspector() {
        let broker = Arc::new(Broker::new(Limits::default()));
        let introspectors = Arc::<Introspectors>::default();
        let endpoint = IntrospectorViews {
            broker: Arc::downgrade(&broker),
            introspectors: Arc::downgrade(&introspectors),
        };
        let refused = endpoint.may_ask(7).unwrap_err();
        assert_eq!(refused.refusal, Refusal::Denied);
        assert!(
            refused.message.contains("context id 7 ")
                && refused.message.contains("introspector add")
        );
        let caller = Caller { pid: 1, uid: 0, comm: "x".into() };
        let refused =
            endpoint.open(7, &Token::new([1; 4]), &caller, true, MappedBy::Module).unwrap_err();
        assert_eq!(refused.refusal, Refusal::Denied);
        drop(broker);
        assert_eq!(endpoint.may_ask(7).unwrap_err().refusal, Refusal::Busy);
    }
}
