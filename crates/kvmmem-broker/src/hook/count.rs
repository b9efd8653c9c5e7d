// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hook's share of the hooks that there may be.

use std::sync::{Arc, Weak};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::Refusal;

use crate::broker::Broker;
use crate::core::call_error::CallError;

/// A hook among those that there may be, given back on drop.
#[derive(Debug)]
pub(crate) struct HookSlot {
    broker: Weak<Broker>,
    uid: u32,
}

impl HookSlot {
    pub(super) fn new(broker: &Arc<Broker>, who: Credentials) -> Result<Self, CallError> {
        let taken = broker.take_hook(who);
        taken.map_err(|error| CallError::new(Refusal::Limit, format!("hooks: {error}")))?;
        Ok(Self { broker: Arc::downgrade(broker), uid: who.uid })
    }
}

impl Drop for HookSlot {
    fn drop(&mut self) {
        if let Some(broker) = self.broker.upgrade() {
            broker.give_back_hook(self.uid);
        }
    }
}
