// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's introspectors behind the door.

use std::sync::{Arc, Weak};

use kvmmem_kvmi::token::Token;

use super::serve::Views;
use crate::broker::{Broker, Refused};
use crate::introspector::Opened;
use crate::wire::{Caller, Refusal};

/// The broker, as long as it lives.
pub(super) struct Introspectors(pub(super) Weak<Broker>);

impl Introspectors {
    fn broker(&self) -> Result<Arc<Broker>, Refused> {
        self.0.upgrade().ok_or_else(|| Refused::new(Refusal::Busy, "the broker ends"))
    }
}

impl Views for Introspectors {
    type View = Opened;

    fn may_ask(&self, cid: u32) -> Result<(), Refused> {
        let broker = self.broker()?;
        match broker.introspectors().by_cid(cid) {
            Some(_) => Ok(()),
            None => Err(stranger(&broker, cid)),
        }
    }

    fn open(&self, cid: u32, token: &Token, caller: &Caller, read_only: bool) -> Result<Opened, Refused> {
        let broker = self.broker()?;
        let introspector = broker.introspectors().by_cid(cid).ok_or_else(|| stranger(&broker, cid))?;
        Ok(introspector.open(token, caller, read_only)?)
    }

    fn number(view: &Opened) -> u64 {
        view.view()
    }

    fn has_ended(view: &Opened) -> bool {
        view.ended()
    }
}

/// Why a VM has no views here.
fn stranger(broker: &Broker, cid: u32) -> Refused {
    let known = broker.registry().introspector(cid);
    let words = match known {
        Some(vm) => format!(
            "{:?} has views by hypercall: its host's kvmmem vm offers them, and the module kvmmem asks for them",
            vm.registration().name
        ),
        None => format!(
            "the VM of context id {cid} is no introspector of this host: kvmmem introspector add there makes it one"
        ),
    };
    Refused::new(Refusal::Denied, words)
}
